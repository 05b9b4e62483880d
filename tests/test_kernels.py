"""Every kernel in the table, each version against its reference. A new kernel is in here by being in the table."""

import contextlib
import copy
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm.kernels
from minillm.kernels import jit as vector
from minillm.kernels.device import joined
from minillm.kernels.kernel import KERNELS, Kernel
from tests.cuda_on_cpu import on_cpu
from tests.gradcheck import note_error
from tests.strategies import LAYOUTS, in_layout

for module in pkgutil.iter_modules(minillm.kernels.__path__):
    if (Path(minillm.kernels.__file__).parent / f"{module.name}.py").exists():
        importlib.import_module(f"minillm.kernels.{module.name}")

ROOT = Path(__file__).parents[1]
VERSIONS = [(kernel, version) for kernel in KERNELS for version in kernel.versions if version == "numba"]
every_version = pytest.mark.parametrize(("kernel", "version"), VERSIONS, ids=lambda x: getattr(x, "name", x))
every_size = pytest.mark.parametrize("size", ["ragged", "extreme"])
seeds = st.integers(0, 2**32 - 1)


def example(kernel, seed, dtype=np.float64, size="ragged"):
    return kernel.example(np.random.default_rng(seed), size, dtype)


def call(kernel, version, args, kwargs):
    """The results as a tuple; an in-place kernel works on copies."""
    args = copy.deepcopy(args) if kernel.name.endswith("_inplace") else args
    result = kernel.version(version)(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def largest_error(results, expected):
    """max |result - expected| over max(1, max |expected|), examples being drawn at unit scale; inf must match inf."""
    worst = 0.0
    for r, e in zip(results, expected, strict=True):
        assert r.shape == e.shape
        finite = np.isfinite(e)
        scale = np.abs(e[finite]).max(initial=1)
        assert np.array_equal(np.isfinite(r), finite), "a NaN or an infinity on one side only"
        assert np.array_equal(r[~finite], e[~finite], equal_nan=True)
        worst = max(worst, np.abs(r[finite].astype(np.float64) - e[finite]).max(initial=0) / scale)
    return worst


def test_the_table_is_complete():
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS) >= 19
    assert all("numba" in kernel.versions for kernel in KERNELS)


@every_size
@every_version
def test_float64_equals_the_reference(kernel, version, size):
    @settings(max_examples=60 if size == "ragged" else 30)
    @given(seeds)
    def check(seed):
        args, kwargs = example(kernel, seed, size=size)
        results, expected = call(kernel, version, args, kwargs), call(kernel, "reference", args, kwargs)
        assert [r.dtype for r in results] == [e.dtype for e in expected]
        error = largest_error(results, expected)
        note_error(f"kernel {kernel.name}: {version} float64, {size}", error)
        assert error <= 1e-10

    check()


@every_size
@every_version
def test_float32_is_as_exact_as_naive_float32(kernel, version, size):
    """Over a run of examples, at most three times the reference's own float32 error against float64, or 4 roundings."""
    ours, naive = [], []
    for seed in range(80):
        args, kwargs = example(kernel, seed, np.float32, size)
        wide = tuple(x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x for x in args)
        exact = call(kernel, "reference", wide, kwargs)
        results = call(kernel, version, args, kwargs)
        assert all(r.dtype == np.float32 for r in results)
        ours.append(largest_error(results, exact))
        note_error(f"kernel {kernel.name}: {version} float32, {size}", ours[-1])
        naive.append(largest_error(call(kernel, "reference", args, kwargs), exact))
        note_error(f"kernel {kernel.name}: naive float32, {size}", naive[-1])
    assert max(ours) <= max(3 * max(naive), 4 * np.finfo(np.float32).eps)


@every_version
def test_the_comparison_rejects_a_mutant(kernel, version):
    args, kwargs = example(kernel, 3)
    expected = call(kernel, "reference", args, kwargs)
    results = call(kernel, version, args, kwargs)
    for i, result in enumerate(results):
        spoiled = result.copy()
        at = np.unravel_index(np.argmax(np.isfinite(spoiled)), spoiled.shape)
        spoiled[at] += 1e-6 * np.abs(expected[i][np.isfinite(expected[i])]).max(initial=1)
        assert largest_error([*results[:i], spoiled, *results[i + 1 :]], expected) > 1e-10


@every_version
def test_any_layout_and_no_input_touched(kernel, version):
    @settings(max_examples=20)
    @given(seeds, st.lists(st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3))
    def check(seed, layouts):
        args, kwargs = example(kernel, seed)
        if kernel.name.endswith("_inplace"):  # writes into what it is given: odd layouts are refused, not copied
            odd = [in_layout(x, "every other") if isinstance(x, np.ndarray) else x for x in args]
            if args[0].size > 1:
                with pytest.raises(ValueError, match="contiguous"):
                    kernel.version(version)(*odd, **kwargs)
            return
        arranged = [in_layout(x, layouts[i % 3]) if isinstance(x, np.ndarray) else x for i, x in enumerate(args)]
        plain = [np.array(x, order="C") if isinstance(x, np.ndarray) else x for x in arranged]
        results = call(kernel, version, arranged, kwargs)
        expected = call(kernel, version, plain, kwargs)
        for r, e in zip(results, expected, strict=True):
            assert np.array_equal(r, e, equal_nan=True)
        for a, p in zip(arranged, plain, strict=True):
            assert not isinstance(a, np.ndarray) or np.array_equal(a, p)

    check()


@pytest.mark.parametrize("version", ["numba", "cuda"])
@pytest.mark.parametrize("name", ["silu_forward", "silu_backward", "swiglu_forward", "swiglu_backward"])
def test_silu_and_swiglu_take_one_number_without_an_axis(name, version):
    kernel = next(k for k in KERNELS if k.name == name)
    args, kwargs = example(kernel, 2, np.float32)
    args = [x[:1, :1].reshape(()) for x in args]
    expected = call(kernel, "reference", args, kwargs)
    with on_cpu() if version == "cuda" else contextlib.nullcontext():
        results = call(kernel, version, args, kwargs)
    assert all(r.shape == () and np.isclose(r, e, rtol=1e-5) for r, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("version", ["numba", "cuda"])
def test_rms_norm_of_rows_without_numbers(version):
    forward, backward = (next(k for k in KERNELS if k.name == f"rms_norm_{way}") for way in ("forward", "backward"))
    x, weight = np.zeros((3, 0), np.float32), np.zeros(0, np.float32)
    with on_cpu() if version == "cuda" else contextlib.nullcontext():
        y, r = forward.version(version)(x, weight, 1e-5)
        dx, dweight = backward.version(version)(x, x, weight, r)
    assert y.shape == dx.shape == (3, 0) and r.shape == (3,) and dweight.shape == (0,)


@every_version
def test_fifty_repeats_are_bit_equal(kernel, version):
    args, kwargs = example(kernel, 11, np.float32)
    first = call(kernel, version, args, kwargs)
    for _ in range(49):
        for a, b in zip(first, call(kernel, version, args, kwargs), strict=True):
            assert np.array_equal(a, b, equal_nan=True)


HASHES = """
import hashlib, sys
import numba
from tests.test_kernels import VERSIONS, call, example
import numpy as np
for threads in (1, 2, 16):
    numba.set_num_threads(threads)
    digest = hashlib.sha256()
    for kernel, version in VERSIONS:
        for seed in range(12):
            for result in call(kernel, version, *example(kernel, seed, np.float32)):
                digest.update(result.tobytes())
    print(threads, digest.hexdigest())
"""


def test_1_2_and_16_threads_are_bit_equal():
    """In a process of its own, because Numba fixes the largest number of threads when it starts."""
    run = subprocess.run(
        [sys.executable, "-c", HASHES],
        env=os.environ | {"NUMBA_NUM_THREADS": "16", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [threads for threads, _ in lines] == ["1", "2", "16"]
    assert len({digest for _, digest in lines}) == 1


# ------------------------------------------------------------------ the table itself


def test_choosing_a_version(monkeypatch):
    kernel = next(k for k in KERNELS if k.name == "rope")
    x = np.zeros((1, 1, 1, 2))
    assert kernel.choose(x) == "numba"
    assert kernel.choose(x.astype(np.float16)) == "reference"  # Numba has no 16-bit floats
    monkeypatch.setenv("MINILLM_KERNELS", "reference")
    assert kernel.choose(x) == "reference"
    with pytest.raises(KeyError, match="rope has no version 'cudnn'"):
        kernel.version("cudnn")


def test_a_version_that_is_asked_for_by_name(monkeypatch):
    """Where a kernel has it for the device; elsewhere, what it would take anyway."""

    kernel_of = lambda name: next(k for k in KERNELS if k.name == name)
    gpu = SimpleNamespace(dtype=np.dtype(np.float32))
    assert kernel_of("attention_backward").choose(gpu) == "cuda"
    for name, attention, rope, host in (
        ("cuda_wgmma", "cuda_wgmma", "cuda", "numba"),
        ("cuda_atomics", "cuda_atomics", "cuda", "numba"),
        ("numba_cuda", "numba_cuda", "cuda", "numba"),
        ("numba", "cuda", "cuda", "numba"),
        ("reference", "reference", "reference", "reference"),
        ("", "cuda", "cuda", "numba"),
    ):
        monkeypatch.setenv("MINILLM_KERNELS", name)
        assert kernel_of("attention_backward").choose(gpu) == attention
        assert kernel_of("rope").choose(gpu) == rope
        assert kernel_of("rope").choose(np.zeros(1)) == host
        assert kernel_of("rope").choose(SimpleNamespace(dtype=np.dtype(np.float64))) == "reference"  # the oracle
    monkeypatch.setenv("MINILLM_KERNELS", "cuda_wgma")
    with pytest.raises(
        ValueError, match="MINILLM_KERNELS is 'cuda_wgma', and kernels have the versions reference, numba"
    ):
        kernel_of("rope").choose(np.zeros(1))


def test_a_kernel_without_a_fast_version_runs_its_reference():
    kernel = Kernel("only_here", reference=lambda x: x + 1, versions={}, example=None)
    KERNELS.remove(kernel)
    assert kernel(np.zeros(1)) == 1


FLOAT32_ONLY = {"adamw_inplace"}  # the optimizer's state is float32 by contract


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.name not in FLOAT32_ONLY], ids=lambda k: k.name)
def test_sixteen_bit_floats_go_through(kernel, dtype):
    args, kwargs = example(kernel, 5, dtype)
    exact = call(kernel, "reference", *example(kernel, 5))
    results = call(kernel, kernel.choose(args[0]), args, kwargs)
    assert largest_error([r.astype(np.float64) for r in results], exact) <= (0.01 if dtype == np.float16 else 0.06)


# ------------------------------------------------------------------ what the kernels share


@vector.jit
def _exp_of(x, y):
    for i in range(x.size):
        y[i] = vector.exp(x[i])


def exp_of(x):
    y = np.empty_like(x)
    _exp_of(x, y)
    return y


def test_exp_in_float32():
    x = np.linspace(-87.3, 88.37, 400_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(exp_of(x) / exact - 1).max() < 1.2e-7
    special = np.array([-np.inf, -1e30, -88, np.inf, 88.5, 1e30, 0, -0.0], np.float32)
    assert np.array_equal(exp_of(special), np.array([0, 0, 0, np.inf, np.inf, np.inf, 1, 1], np.float32))
    assert np.isnan(exp_of(np.array([np.nan], np.float32)))[0]
    assert np.all(np.diff(exp_of(np.linspace(-90, 88.3, 100_001).astype(np.float32))) >= 0)


def test_exp_in_float64_is_libms():
    x = np.linspace(-745, 709, 10_001)
    assert np.abs(exp_of(x) - np.exp(x)).max() <= np.abs(np.spacing(np.exp(x))).max()
    assert np.allclose(exp_of(x), np.exp(x), rtol=1e-15, atol=0)


@given(st.integers(0, 70), seeds)
def test_row_max(n, seed):
    rng = np.random.default_rng(seed)
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal(n).astype(dtype)
        x[rng.random(n) < 0.3] = -np.inf
        assert vector.row_max(x) == x.max(initial=-np.inf)
        spoiled = x.copy()
        spoiled[rng.random(n) < 0.3] = np.nan
        assert vector.row_max(spoiled) == np.nanmax(spoiled, initial=-np.inf) if n else True


@given(st.sampled_from([0, 4, 8, 64]), st.sampled_from([0, 1, 2, 7, 64]), st.sampled_from([0, 16, 48]), seeds)
def test_matmul_add(m, k, n, seed):
    rng = np.random.default_rng(seed)
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
        a, b, c = (rng.standard_normal(s).astype(dtype) for s in ((m, k), (k, n), (m, n)))
        for operand in (a, np.ascontiguousarray(a.T).T):
            out = c.copy()
            vector.matmul_add(out, operand, b, m, k, n)
            assert np.abs(out - (c + a.astype(np.float64) @ b)).max(initial=0) <= tolerance * max(k, 1)


def test_an_edited_helper_is_seen_by_a_warm_cache(tmp_path):
    """Numba keys its cache by the file that defines a function, and would not see an edit of a helper in jit.py."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "jit.py").write_text(Path(vector.__file__).read_text() + "\n\n@jit\ndef helper(x):\n    return x + 1\n")
    (package / "user.py").write_text(
        "from .jit import helper, jit\n\n@jit\ndef use(x):\n    return helper(x)\n\nprint(use(1))\n"
    )

    def run():
        command = [sys.executable, "-c", "import package.user"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert run() == "2"
    source = (package / "jit.py").read_text()
    (package / "jit.py").write_text(source.replace("return x + 1\n", "return x + 41\n"))
    assert run() == "42"


PRINT_HASHES = """
import hashlib, sys
import numpy as np
import minillm.functional, minillm.optim
from minillm.kernels.jit import one_thread
from minillm.kernels.kernel import KERNELS

def flat(x):
    return b"".join(map(flat, x)) if isinstance(x, tuple | list) else np.asarray(x).tobytes()

for kernel in KERNELS:
    if kernel.name in sys.argv[1:] or not sys.argv[1:]:
        for size in ("ragged", "large"):
            def call():
                args, kwargs = kernel.example(np.random.default_rng(0), size, np.float32)  # some change their inputs
                return hashlib.sha256(flat(kernel.version("numba")(*args, **kwargs))).hexdigest()
            with one_thread():
                alone = call()
            print(kernel.name, size, alone, call())
"""


@pytest.mark.parametrize(
    "names",
    [("cross_entropy_forward", "swiglu_backward"), pytest.param((), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_what_was_just_compiled_rounds_as_what_is_read_from_the_cache(names, tmp_path):
    """Else a run would have other bits in the process that compiles its kernels than in one that resumes it. The same
    for kernels on one thread and on all."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRINT_HASHES, *names]
    fresh, cached = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert fresh.returncode == cached.returncode == 0, fresh.stderr + cached.stderr
    assert fresh.stdout == cached.stdout and fresh.stdout.count("\n") >= 2 * len(names)
    for line in cached.stdout.splitlines():
        alone, together = line.split()[2:]
        assert alone == together, line


@given(st.integers(0, 2**32 - 1))
def test_joined_is_concatenate_and_no_copy_where_the_parts_are_all_of_one(seed):
    rng = np.random.default_rng(seed)
    axis, whole = int(rng.integers(0, 3)), rng.standard_normal(rng.integers(1, 5, 3))
    parts = np.split(whole, np.sort(rng.integers(0, whole.shape[axis] + 1, 2)), axis)
    others = [parts[::-1], parts[1:], [parts[0], *parts], [parts[0].copy(), *parts[1:]], [p[::-1] for p in parts]]
    for some in (parts, *others):
        np.testing.assert_array_equal(joined(some, axis), np.concatenate(some, axis))
    assert np.shares_memory(joined(parts, axis), whole)
