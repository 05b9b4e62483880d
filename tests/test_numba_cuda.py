"""
The numba.cuda kernels in Numba's simulator, without a GPU: against their references, and with faults planted in them.

The simulator has to be asked for before numba.cuda is imported, so everything simulated runs in a process of its own.
Tiles are 4 x 4 there and blocks 2 x 2 threads (and once as large as they are), so that small arrays have many tiles;
the table's own examples are drawn to fit. The simulator's threads run as they like, which hides what is missing in most
runs. So here each thread of a block runs alone from one barrier to the next, in the order of their numbers and again in
the opposite order, on memory full of NaN: what a missing `cuda.syncthreads` leaves to chance differs between the two.
"""

import contextlib
import functools
import multiprocessing
import re
import subprocess
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minillm.kernels import attention, cross_entropy, numba_cuda
from minillm.kernels.kernel import KERNELS, Kernel
from tests.strategies import LAYOUTS, in_layout
from tests.test_kernels import call, example, largest_error

ROOT = Path(__file__).parents[1]
PATH = ROOT / "kernels/numba_cuda.py"
SOURCE = PATH.read_text(encoding="utf-8")

SMALL = (("TILE = 32", "TILE = 4"), ("SIDE = 8", "SIDE = 2"), ("THREADS = 128", "THREADS = 4"))
TABLE = {kernel.name: kernel for kernel in KERNELS if "numba_cuda" in kernel.versions}
EXAMPLES = [("ragged", 736), ("ragged", 418), ("ragged", 2), ("extreme", 736), ("extreme", 954)]  # the quick one first
LITTLE = 21

# ------------------------------------------------------------------ in the process of the simulator


class Diverged(Exception):
    """Some threads of a block wait at a barrier that others do not come to."""


def one_at_a_time(backwards):
    """What the simulator runs a block with: one thread at a time, each from one barrier to the next."""
    from numba.cuda.simulator import kernel as simulator

    def locked():
        lock = threading.Lock()
        lock.acquire()
        return lock

    class Thread(simulator.BlockThread):
        def run(self):
            self.turn.acquire()
            if not self.abort:
                super().run()
            self.at = "its end"
            if not self.abort:
                self.back.release()

        def syncthreads(self):
            frame = sys._getframe(2)
            self.at = f"{frame.f_code.co_name}, line {frame.f_lineno}"
            self.back.release()
            self.turn.acquire()
            if self.abort:
                raise RuntimeError("the block was given up")

    class Block(simulator.BlockManager):
        def run(self, grid_point, *arguments):
            for array in simulator._get_kernel_context().shared._allocations.values():
                array[...] = np.nan
            back, threads = locked(), []
            for block_point in np.ndindex(*self._block_dim):
                thread = Thread(functools.partial(self._f, *arguments), self, grid_point, block_point, False)
                thread.turn, thread.back = locked(), back
                thread.start()
                threads.append(thread)
            try:
                places = set()
                while places != {"its end"}:
                    places = set()
                    for thread in threads[::-1] if backwards else threads:
                        thread.turn.release()
                        back.acquire()
                        if thread.exception:
                            raise thread.exception[0].with_traceback(thread.exception[1])
                        places.add(thread.at)
                    if len(places) > 1:
                        raise Diverged(f"the threads of block {grid_point} are at {' and at '.join(sorted(places))}")
            finally:
                for thread in threads:
                    thread.abort = True
                    thread.turn.release()

    return Block


@contextlib.contextmanager
def harsh(backwards=False):
    """The simulator with blocks that run `one_at_a_time`, and memory that begins as NaN."""
    from numba.cuda.simulator import kernel, kernelapi

    def shared(self, shape, dtype):
        frame = sys._getframe(1)
        at = frame.f_code, frame.f_lineno
        if at not in self._allocations:
            self._allocations[at] = np.full(shape, np.nan, dtype)
        return self._allocations[at]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BlockManager", one_at_a_time(backwards))
        patch.setattr(kernelapi.FakeCUDAShared, "array", shared)
        patch.setattr(kernelapi.FakeCUDALocal, "array", lambda self, shape, dtype: np.full(shape, np.nan, dtype))
        yield


@functools.cache
def variant(changes):
    """kernels/numba_cuda.py with these texts in the place of others: sizes, or a fault."""
    source = SOURCE
    for old, new in changes:
        if source.count(old) != 1:  # no AssertionError, which would pass for a fault that was caught
            raise LookupError(f"{source.count(old)} times in numba_cuda.py: {old}")
        source = source.replace(old, new)
    module = types.ModuleType("minillm.kernels.numba_cuda")
    module.__package__ = "minillm.kernels"
    exec(compile(source, PATH, "exec"), vars(module))
    for name, function in list(vars(module).items()):
        if getattr(function, "_device", False):  # part of the kernels that call it, as on a GPU, and faster
            setattr(module, name, function.fn)
    module.empty = lambda like, shape, dtype=None: np.full(shape, np.nan, dtype or like.dtype)
    return module


@contextlib.contextmanager
def installed(changes):
    """The table's numba_cuda versions are those of the changed module, and what a call of a Kernel runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in TABLE.items():
            patch.setitem(kernel.versions, "numba_cuda", getattr(variant(changes), name))
        patch.setattr(Kernel, "choose", lambda kernel, x: "numba_cuda")
        yield


def run(kernel, args, changes=(), backwards=False):
    with harsh(backwards), installed((*SMALL, *changes)):
        return call(kernel, "numba_cuda", args, {})


def compare(name, changes=()):
    """AssertionError unless a kernel, with these changes, does what its contract says."""
    kernel = TABLE[name]
    for size, seed in EXAMPLES:
        args, _ = example(kernel, seed, size=size)
        results, expected = run(kernel, args, changes), call(kernel, "reference", args, {})
        assert [r.dtype for r in results] == [e.dtype for e in expected]
        error = largest_error(results, expected)
        assert error <= 1e-10, f"{size} {seed}: {error}"
        for first, again in zip(results, run(kernel, args, changes, backwards=True), strict=True):
            assert np.array_equal(first, again, equal_nan=True), f"{size} {seed}: the order of the threads matters"


def float32_errors(name, size):
    """The largest errors over some examples: in float32, and of the reference in float32."""
    kernel, ours, naive = TABLE[name], [], []
    for seed in (2, 16, 21, 22, 23):
        with harsh(), installed(SMALL):  # a backward gets what the forward saved, in the same precision
            args, _ = example(kernel, seed, np.float32, size)
        wide = tuple(x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x for x in args)
        exact, results = call(kernel, "reference", wide, {}), run(kernel, args)
        assert all(r.dtype == np.float32 for r in results)
        ours.append(largest_error(results, exact))
        naive.append(largest_error(call(kernel, "reference", args, {}), exact))
    return max(ours), max(naive)


def properties():
    """What the examples hold, by name: how many of them."""
    found = dict.fromkeys(["cache", "groups", "documents", "sees nothing", "key tiles", "head tiles", "ragged head"], 0)
    found |= dict.fromkeys(["ignored", "forbidden tokens", "long rows", "short rows"], 0)
    for size, seed in EXAMPLES:
        (q, k, _, start, _), _ = example(attention.forward, seed, size=size)
        Tq, Tk, D = q.shape[1], k.shape[1], q.shape[3]
        found["cache"] += Tq < Tk
        found["groups"] += 1 < k.shape[2] < q.shape[2]
        found["documents"] += any(len(set(row)) > 1 for row in start)
        found["sees nothing"] += (start > np.arange(Tq) + Tk - Tq).any()
        found["key tiles"] += Tk > 2 * attention.TILE
        found["head tiles"] += D > attention.TILE
        found["ragged head"] += D % attention.TILE != 0
        (logits, targets, _), _ = example(cross_entropy.forward, seed, size=size)
        found["ignored"] += (targets < 0).any()
        found["forbidden tokens"] += np.isinf(logits).any()
        found["long rows"] += logits.shape[1] > 8
        found["short rows"] += logits.shape[1] < 4
    return found


def errors_of_calls():
    """{name: error} of the table's versions on two tiles of keys, and on rows longer than a block has threads."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((1, T, 1, 3)) for T in (3, 33, 33, 3))
    start = np.array([[0, 0, 2]], np.int32)
    saved = attention.reference_forward(q, k, v, start, 0.5)
    logits, targets = rng.standard_normal((2, 150)), np.array([149, -100])
    rows = *cross_entropy.reference_forward(logits, targets, 0.7)[:2], *rng.standard_normal((4, 2)), 0.7
    calls = {
        "attention_forward": (q, k, v, start, 0.5),
        "attention_backward": (do, q, k, v, *saved, start, 0.5),
        "cross_entropy_forward": (logits, targets, 0.7),
        "cross_entropy_backward": (logits, targets, *rows),
        "cross_entropy_backward_inplace": (logits, targets, *rows),
    }
    return {
        name: largest_error(call(TABLE[name], "numba_cuda", args, {}), call(TABLE[name], "reference", args, {}))
        for name, args in calls.items()
    }


def at_their_own_size():
    with harsh():
        return errors_of_calls()


def in_numbas_own_simulator():
    """The errors of one example each, on threads that run as they like and memory as it comes."""
    drawn = {name: example(kernel, LITTLE) for name, kernel in TABLE.items()}
    with installed(SMALL):
        return {
            name: largest_error(
                call(TABLE[name], "numba_cuda", *drawn[name]), call(TABLE[name], "reference", *drawn[name])
            )
            for name in TABLE
        }


def sixteen_bits(name, dtype):
    """The error of 16-bit arguments against float64 ones, and whether the dtypes are the reference's."""
    args, _ = example(TABLE[name], LITTLE, dtype)
    results, expected = run(TABLE[name], args), call(TABLE[name], "reference", args, {})
    exact = call(TABLE[name], "reference", *example(TABLE[name], LITTLE))
    same = [r.dtype for r in results] == [e.dtype for e in expected]
    return largest_error([r.astype(np.float64) for r in results], exact), same


def layouts(name):
    """The layouts, out of all, in which the arguments give other bits than contiguous ones or were written into."""
    kernel, wrong = TABLE[name], []
    args, _ = example(kernel, LITTLE)
    for layout in LAYOUTS:
        arranged = [in_layout(x, layout) if isinstance(x, np.ndarray) else x for x in args]
        plain = [np.array(x, order="C") if isinstance(x, np.ndarray) else x for x in arranged]
        results, expected = run(kernel, arranged), run(kernel, plain)
        same = [np.array_equal(r, e, equal_nan=True) for r, e in zip(results, expected, strict=True)]
        kept = [np.array_equal(a, p) for a, p in zip(arranged, plain, strict=True)]
        if not all(same + kept):
            wrong.append(layout)
    return wrong


def rows_apart():
    """In place, of logits whose rows lie apart: the largest difference, and whether what lies between was touched."""
    logits, *rest = example(cross_entropy.backward_inplace, LITTLE)[0]
    memory = np.full((len(logits), logits.shape[1] + 3), np.nan, logits.dtype)
    apart = memory[:, :-3]
    apart[:] = logits
    found = variant(SMALL).cross_entropy_backward_inplace(apart, *rest)
    expected = cross_entropy.reference_backward(logits, *rest)
    return found is apart, np.abs(found - expected).max(), np.isnan(memory[:, -3:]).all()


def nothing_to_do():
    """The results for no queries, no batch and no rows."""
    module, results = variant(SMALL), []
    for B, Tq, Tk in ((0, 3, 3), (2, 0, 3), (2, 0, 0)):
        q, k, start = np.zeros((B, Tq, 2, 4)), np.zeros((B, Tk, 1, 4)), np.zeros((B, Tq), np.int32)
        o, lse = module.attention_forward(q, k, k, start, 1)
        results.append(
            (o.shape, lse.shape, *(x.any() for x in module.attention_backward(q, q, k, k, o, lse, start, 1)))
        )
    logits, none = np.zeros((0, 5)), np.zeros(0, int)
    results += [[x.shape for x in module.cross_entropy_forward(logits, none, 1)]]
    results += [module.cross_entropy_backward(logits, none, *6 * [np.zeros(0)], 1).shape]
    return results


def junk():
    """Attention on left-padded rows, and with other numbers in the padding: the results of both."""
    rng = np.random.default_rng(2)
    q, k, v, do = (rng.standard_normal((2, 7, 2, 5)) for _ in range(4))
    start = np.repeat(np.array([[2], [5]], np.int32), 7, 1)
    results = []
    for _ in range(2):
        saved = run(TABLE["attention_forward"], (q, k, v, start, 0.5))
        gradients = run(TABLE["attention_backward"], (do, q, k, v, *saved, start, 0.5))
        results.append([x for o in (saved[0], *gradients) for x in (o[0, 2:], o[1, 5:])])
        for b, pad in enumerate((2, 5)):
            for x in (q, k, v):
                x[b, :pad] = 1e6 * rng.standard_normal(x[b, :pad].shape)
    return results


def a_nan():
    """o where one query is NaN."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((1, 7, 2, 5)) for _ in range(3))
    q[0, 3, 1] = np.nan
    return run(TABLE["attention_forward"], (q, k, v, np.zeros((1, 7), np.int32), 0.5))[0]


# ------------------------------------------------------------------ the tests


def _begin():
    attention.TILE = 4  # the examples' lengths lie around it


@pytest.fixture(scope="module")
def simulated():
    """simulated(f, *arguments): what f returns in the process of the simulator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_ENABLE_CUDASIM", "1")
        patch.setenv("MINILLM_KERNELS", "reference")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
            yield lambda f, *arguments: pool.submit(f, *arguments).result()


every_kernel = pytest.mark.parametrize("name", list(TABLE))


def test_the_table_has_them():
    assert TABLE.keys() == {
        "attention_forward",
        "attention_backward",
        "cross_entropy_forward",
        "cross_entropy_backward",
        "cross_entropy_backward_inplace",
    }


def test_the_examples_hold_what_is_hard(simulated):
    assert all(simulated(properties).values()), simulated(properties)


@every_kernel
def test_float64_equals_the_reference_in_either_order_of_the_threads(simulated, name):
    simulated(compare, name)


@pytest.mark.parametrize("size", ["ragged", "extreme"])
@every_kernel
def test_float32_is_as_exact_as_naive_float32(simulated, name, size):
    ours, naive = simulated(float32_errors, name, size)
    assert ours <= max(3 * naive, 4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("way", [at_their_own_size, in_numbas_own_simulator], ids=lambda way: way.__name__)
def test_without_what_the_tests_change(simulated, way):
    errors = simulated(way)
    assert errors.keys() == TABLE.keys()
    assert max(errors.values()) <= 1e-10


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@every_kernel
def test_sixteen_bit_floats_go_through(simulated, name, dtype):
    error, same = simulated(sixteen_bits, name, dtype)
    assert same
    assert error <= (0.01 if dtype == np.float16 else 0.06)


@pytest.mark.parametrize("name", [name for name in TABLE if not name.endswith("_inplace")])
def test_any_layout_and_no_input_touched(simulated, name):
    assert simulated(layouts, name) == []


def test_rows_of_logits_may_lie_apart(simulated):
    same, error, untouched = simulated(rows_apart)
    assert same and error <= 1e-6 and untouched


def test_nothing_to_do(simulated):
    first, second, third, *rows = simulated(nothing_to_do)
    assert first == ((0, 3, 2, 4), (0, 2, 3), False, False, False)
    assert second == third == ((2, 0, 2, 4), (2, 2, 0), False, False, False)
    assert rows == [[(0,)] * 5, (0, 5)]


def test_what_no_query_sees_changes_no_bit(simulated):
    first, second = simulated(junk)
    assert len(first) == 8
    assert all(np.array_equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


def test_a_nan_comes_out_where_it_went_in_and_only_there(simulated):
    o = simulated(a_nan)
    assert np.isnan(o[0, 3, 1]).all()
    assert np.isnan(o).sum() == 5


# ------------------------------------------------------------------ planted faults


def dropped(statement):
    """A fault for each place where a kernel says `statement`: there it says `pass` instead."""
    numbers = {}
    for line in re.finditer(rf"^ +{re.escape(statement)}$", SOURCE, re.MULTILINE):
        whole = SOURCE[SOURCE.rfind("\ndef ", 0, line.start()) + 1 : line.end()]  # from the function's first line
        function = whole.removeprefix("def ").split("(")[0]
        numbers[function] = numbers.get(function, 0) + 1
        yield function, f"without {statement} {numbers[function]}", whole, whole.removesuffix(statement) + "pass"


FORWARD, QUERIES, KEYS = "_attention_forward", "_attention_backward_queries", "_attention_backward_keys"
CE_FORWARD, CE_BACKWARD = "_cross_entropy_forward", "_cross_entropy_backward"

# (function, the fault, text that occurs once, what a tired author might have written)
FAULTS = [
    *dropped("cuda.syncthreads()"),
    *dropped("_clear(c)"),
    ("_copy_rows", "the tile's rest is not 0", "tile[r, d] = 0", "pass"),
    ("_copy_rows", "a head's last columns read on", "and d0 + d < D", ""),
    ("_copy_rows", "the last rows read on", "if r < rows and d0", "if d0"),
    ("_bounds", "a query does not see itself", "i + shift + 1 - j0", "i + shift - j0"),
    ("_bounds", "a query sees the next key", "i + shift + 1 - j0", "i + shift + 2 - j0"),
    ("_bounds", "documents are not kept apart", "max(start[b, i] - j0, 0)", "0"),
    ("_bounds", "a cache's keys are not counted", "min(i + shift + 1 - j0, TILE)", "min(i + 1 - j0, TILE)"),
    (FORWARD, "o is not rescaled", "o[b, i0 + i, h, d] * correction[i] +", "o[b, i0 + i, h, d] +"),
    (FORWARD, "the sum is not rescaled", "total[r] *= correction[r]", "pass"),
    (FORWARD, "the highest of earlier tiles is forgotten", "highest = top[r]", "highest = nothing"),
    (FORWARD, "no case for rows that have seen nothing", " if highest != nothing else one", ""),
    (FORWARD, "masked scores are not masked", "if s[i, j] != nothing else zero", "if True else zero"),
    (FORWARD, "rows that see nothing divide by 0", "one / total[r] if total[r] != 0 else total[r]", "one / total[r]"),
    (FORWARD, "lse without the largest", "top[r] + math.log(total[r])", "math.log(total[r])"),
    (FORWARD, "o is not cleared", "_zero_rows(o, b, i0, h, rows, D)", "pass"),
    (
        "_products",
        "one row's scale is lost",
        "rows, d0, D, scale)\n        _copy_rows(right",
        "rows, d0, D, left.dtype.type(1))\n        _copy_rows(right",
    ),
    (FORWARD, "heads read key heads in turns", "hk = h // (H // Hk)\n    y, x, t", "hk = h % Hk\n    y, x, t"),
    (FORWARD, "the first sum is anything", "top[r], total[r] = nothing, 0", "top[r] = nothing"),
    (QUERIES, "dq is not cleared", "_zero_rows(dq, b, i0, h, rows, D)", "pass"),
    (KEYS, "dk is not cleared", "_zero_rows(dk, b, j0, hk, columns, D)", "pass"),
    (KEYS, "dv is not cleared", "_zero_rows(dv, b, j0, hk, columns, D)", "pass"),
    (QUERIES, "delta is left out", "* (c[r, n] - delta[b, h, i0 + i])", "* c[r, n]"),
    (
        QUERIES,
        "dq without the scale",
        "_copy_rows(right, k, b, j0, hk, columns, d0, D, scale)",
        "_copy_rows(right, k, b, j0, hk, columns, d0, D, one)",
    ),
    (KEYS, "delta is left out", "p[i, j] * (dp[r, n] - delta[b, h, i0 + i])", "p[i, j] * dp[r, n]"),
    (
        KEYS,
        "dk without the scale",
        "_copy_rows(right, q, b, i0, h, rows, d0, D, scale)",
        "_copy_rows(right, q, b, i0, h, rows, d0, D, one)",
    ),
    (KEYS, "dv of the queries", "_matmul_add(c, p.T, left)", "_matmul_add(c, p, left)"),
    (KEYS, "dk of the queries", "_matmul_add(c, ds.T, right)", "_matmul_add(c, ds, right)"),
    (KEYS, "one head of a group only", "(hk + 1) * (H // Hk)):", "hk * (H // Hk) + 1):"),
    (KEYS, "the first queries are left out", "max(j0 - shift, 0) // TILE * TILE, Tq", "j0, Tq"),
    (KEYS, "it stops a tile too early", "start[b, i0] >= j0 + columns", "start[b, i0] >= j0"),
    ("_reduce", "half of the tree", "half = THREADS // 2", "half = THREADS // 4"),
    ("_reduce", "the largest is a sum", "if not largest", "if True"),
    (CE_FORWARD, "every thread has its own largest", "highest = _reduce(partial, highest, True)", "pass"),
    (
        CE_FORWARD,
        "an ignored row's statistics are not 0",
        "m[i], log_total[i], x_target[i], x_sum[i], x_mean[i] = 0, 0, 0, 0, 0",
        "pass",
    ),
    (
        CE_FORWARD,
        "only -1 is ignored",
        "    if target < 0:\n        if t == 0",
        "    if target == -1:\n        if t == 0",
    ),
    (CE_FORWARD, "p x of -inf is NaN", "e * (x if x > floor else floor)", "e * x"),
    (CE_FORWARD, "x_target without the scale", "(row[target] - highest) * scale", "row[target] - highest"),
    (CE_BACKWARD, "an ignored row's gradient is not 0", "to[j] = 0", "pass"),
    (CE_BACKWARD, "p x of -inf is NaN", "b[i] * (x if x > floor else floor)", "b[i] * x"),
    (CE_BACKWARD, "the one-hot without the scale", "scale * (dz + c[i])", "scale * dz + c[i]"),
]

# The kernels in which a fault in a function has to be noticed, each on its own; attention's forward for the others.
NOTICED_IN = {
    FORWARD: ["attention_forward"],
    QUERIES: ["attention_backward"],
    KEYS: ["attention_backward"],
    "_reduce": ["cross_entropy_forward"],
    CE_FORWARD: ["cross_entropy_forward"],
    CE_BACKWARD: ["cross_entropy_backward", "cross_entropy_backward_inplace"],
}


@pytest.mark.parametrize("function, fault, old, new", FAULTS, ids=[f"{f}: {fault}" for f, fault, *_ in FAULTS])
def test_a_fault_is_caught(simulated, function, fault, old, new):
    for name in NOTICED_IN.get(function, ["attention_forward"]):
        with pytest.raises((AssertionError, IndexError, Diverged)):
            simulated(compare, name, ((old, new),))


def test_a_barrier_that_some_threads_do_not_reach_is_caught(simulated):
    old, new = (
        "cuda.syncthreads()\n        half //= 2",
        "if t < half:\n            cuda.syncthreads()\n        half //= 2",
    )
    with pytest.raises(Diverged, match=r"the threads of block .* are at _reduce, line \d+ and at _reduce, line \d+"):
        simulated(compare, "cross_entropy_forward", ((old, new),))


def test_a_fault_whose_text_is_gone_is_no_fault(simulated):
    with pytest.raises(LookupError, match="0 times in numba_cuda"):
        simulated(compare, "cross_entropy_forward", (("no such text", ""),))


def test_every_barrier_has_its_fault():
    assert SOURCE.count("cuda.syncthreads()\n") == sum("cuda.syncthreads" in fault for _, fault, *_ in FAULTS) > 10


# ------------------------------------------------------------------ without the simulator


def test_a_launch_neither_copies_nor_waits(monkeypatch):
    """As on a GPU: CuPy's arrays by their interface and unsynchronised, and CuPy's current stream."""
    calls = []
    arrays = [types.SimpleNamespace(name="q"), types.SimpleNamespace(name="o")]
    cupy_cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=7))
    fake = types.SimpleNamespace(
        as_cuda_array=lambda x, sync: (x.name, sync), external_stream=lambda pointer: f"stream {pointer}"
    )
    monkeypatch.setattr(numba_cuda, "cuda", fake)
    monkeypatch.setattr(numba_cuda, "cupy_cuda", lambda: cupy_cuda)

    class Kernel:
        def __getitem__(self, configuration):
            return lambda *arguments: calls.append((configuration, arguments))

    numba_cuda._launch(Kernel(), 3, (8, 8), arrays[0], np.float32(0.5), arrays[1])
    assert calls == [((3, (8, 8), "stream 7"), (("q", False), np.float32(0.5), ("o", False)))]


def test_arrays_of_the_host_need_the_simulator(monkeypatch):
    monkeypatch.setattr(numba_cuda.config, "ENABLE_CUDASIM", 0)
    q = np.zeros((1, 2, 1, 4), np.float32)
    with pytest.raises(TypeError, match="need arrays on a GPU, or NUMBA_ENABLE_CUDASIM=1"):
        attention.forward.version("numba_cuda")(q, q, q, np.zeros((1, 2), np.int32), 1.0)


def test_numba_cuda_is_loaded_at_the_first_call_only():
    code = "import sys, minillm.functional; print('numba.cuda' in sys.modules, 'cupy' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False False\n"
