"""The memory-bound CUDA C++ kernels on a CPU that plays the GPU, against their references: at sizes around the borders
of warps, blocks and 16-byte accesses, in two orders of the threads, and with faults that the same checks catch."""

import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from minillm.kernels import adamw, cross_entropy, embedding, gelu, layer_norm, rms_norm, rope, swiglu
from minillm.kernels.kernel import KERNELS, Kernel
from tests.cuda_on_cpu import Cpu, on_cpu
from tests.test_kernels import call, largest_error

BF16 = ml_dtypes.bfloat16
TYPES = {"float32": np.float32, "bfloat16": BF16, "float16": np.float16}
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}  # ||error|| / ||result||: its rounding alone is 1.7e-3 and 2.1e-4

# ------------------------------------------------------------------ arguments of a size


class Draw:
    """Random arguments: x(...) in the activations' dtype, w(...) in the weights', f(...) in float32."""

    def __init__(self, dtype, weights=None, seed=0):
        self.rng, self.dtype, self.weights = np.random.default_rng(seed), dtype, weights or dtype

    def x(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtype)

    def w(self, *shape):
        return self.rng.standard_normal(shape).astype(self.weights)

    def f(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)


def logits_and_targets(draw, N, V):
    """With what a row may hold: forbidden tokens, ties, logits far apart; an ignored row may hold anything."""
    logits, targets = draw.x(N, V), draw.rng.integers(0, V, N)
    logits[:1] *= draw.dtype(100)
    if N > 5:
        logits[1, draw.rng.random(V) < 0.5] = -np.inf
        logits[2, : V // 2] = ml_dtypes.finfo(draw.dtype).min  # a mask that is not infinite
        logits[2, V // 2 :] = draw.dtype(3)
        targets[4] = -1
        logits[4] = np.nan
    logits[np.arange(N)[targets >= 0], targets[targets >= 0]] += draw.dtype(1)
    return logits, targets


def saved(kernel, *arguments):
    """What the forward keeps, in float32."""
    with np.errstate(all="ignore"):
        return [x.astype(np.float32) for x in kernel.reference(*arguments)]


def cross_entropy_forward(draw, N, V):
    return cross_entropy.forward, (*logits_and_targets(draw, N, V), 0.7)


def cross_entropy_backward(draw, N, V):
    logits, targets = logits_and_targets(draw, N, V)
    statistics = saved(cross_entropy.forward, logits, targets, 0.7)[:2]
    return cross_entropy.backward, (logits, targets, *statistics, *draw.f(4, N), 0.7)


def cross_entropy_inplace(draw, N, V):
    return cross_entropy.backward_inplace, cross_entropy_backward(draw, N, V)[1]


def cross_entropy_fused(draw, N, V):
    return cross_entropy.fused_inplace, (*logits_and_targets(draw, N, V), *draw.f(4, N), 0.7)


def rows(draw, N, D):
    """Rows whose mean is not 0 and whose variance is not 1."""
    return draw.x(N, D) * draw.dtype(3) + draw.dtype(1)


def rms_norm_forward(draw, N, D):
    return rms_norm.forward, (rows(draw, N, D), draw.w(D), 1e-5)


def rms_norm_backward(draw, N, D):
    x, weight = rows(draw, N, D), draw.w(D)
    return rms_norm.backward, (draw.x(N, D), x, weight, saved(rms_norm.forward, x, weight, 1e-5)[1])


def layer_norm_forward(draw, N, D):
    return layer_norm.forward, (rows(draw, N, D), draw.w(D), draw.w(D), 1e-5)


def layer_norm_backward(draw, N, D):
    x, weight = rows(draw, N, D), draw.w(D)
    statistics = saved(layer_norm.forward, x, weight, weight, 1e-5)[1:]
    return layer_norm.backward, (draw.x(N, D), x, weight, *statistics)


def halves(draw, *shape):
    """gate and up, halves of one projection, with some large numbers."""
    both = draw.x(*shape[:-1], 2 * shape[-1])
    both[..., ::3] *= draw.dtype(20)
    return both[..., : shape[-1]], both[..., shape[-1] :]


def swiglu_forward(draw, *shape):
    return swiglu.forward, halves(draw, *shape)


def swiglu_backward(draw, *shape):
    return swiglu.backward, (draw.x(*shape), *halves(draw, *shape))


def silu_forward(draw, *shape):
    return swiglu.silu_forward, halves(draw, *shape)[:1]


def silu_backward(draw, *shape):
    return swiglu.silu_backward, (draw.x(*shape), halves(draw, *shape)[1])


def rope_rotate(draw, B, T, H, D):
    angles = draw.rng.uniform(0, 100, (T + 3, D // 2))
    cos, sin = (f(angles).astype(draw.weights)[2 : T + 2] for f in (np.cos, np.sin))
    return rope.rotate, (draw.x(B, T, 3 * H, D)[:, :, H : 2 * H], cos, sin, max(1, H - 1), (-1) ** T)


def embedding_forward(draw, N, V, D):
    return embedding.forward, (draw.x(V, 2 * D)[:, D:], draw.rng.integers(0, V, N))


def embedding_backward(draw, N, V, D):
    """Half of all tokens are one id."""
    ids = np.where(draw.rng.random(N) < 0.5, V // 2, draw.rng.integers(0, V, N))
    return embedding.backward, (draw.x(N, D), ids, V)


def adamw_step(draw, n):
    p, m, v, g = (draw.f(n) for _ in range(4))  # each begins at a multiple of 16 bytes
    return adamw.step_inplace, (p, m, v * v, g, adamw.schedule_for(p, 3e-3, 0.9, 0.95, 0.1, 3)), ADAMW


def adamw_runs(draw, n, *borders):
    """Runs with schedules that have nothing to do with each other."""
    schedule = draw.rng.uniform(0.5, 2, (len(borders) + 1, 3)).astype(np.float32)
    kernel, (*arrays, _), constants = adamw_step(draw, n)
    return kernel, (*arrays, schedule, np.array(borders, np.int64)), constants


def adamw_advance(draw, runs):
    rates, steps = draw.rng.uniform(0, 0.1, (runs, 2)), draw.rng.integers(0, 100, 1).astype(np.int32)
    arguments = np.zeros((runs, 3), draw.dtype), rates, steps, np.ones(1, np.float32)
    return adamw.advance_inplace, arguments, {"beta1": 0.9, "beta2": 0.95}


def sum_of_squares(draw, n):
    return adamw.sum_of_squares, (draw.x(n),)


def gelu_of(approximate):
    def forward(draw, *shape):
        return gelu.forward, (draw.x(*shape) * draw.dtype(4), approximate)

    def backward(draw, *shape):
        return gelu.backward, (draw.x(*shape), draw.x(*shape) * draw.dtype(4), approximate)

    name = "tanh" if approximate == "tanh" else "exact"
    forward.__name__, backward.__name__ = f"gelu_{name}_forward", f"gelu_{name}_backward"
    return forward, backward


gelu_tanh, gelu_tanh_backward = gelu_of("tanh")
gelu_exact, gelu_exact_backward = gelu_of("none")
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "scale": 0.5}

# Sizes by how rows are read: 16 bytes at a time or element by element, by warps or by blocks; "apart": 16 bytes at a
# time, of rows that end anywhere.
ROWS = {"wide": [(6, 64), (9, 1024), (1, 8)], "single": [(6, 67), (5, 1), (0, 7), (4, 1023)]}
ROWS |= {"wide, blocks": [(6, 1032), (3, 8200), (2, 4096)], "single, blocks": [(6, 1025), (3, 5003)]}
APART = {"apart": [(6, 67), (1, 1), (9, 1023), (2, 5)], "apart, blocks": [(6, 1025), (3, 5003), (2, 8194)]}
LONG = {"wide, long": [(6, 2056), (1, 8200)], "single, long": [(6, 1025), (1, 5003)]}  # as with 4 KB of shared memory
LONG |= {"apart, long": [(6, 2051), (1, 8205)]}
ELEMENTS = {"wide": [(5, 64), (3, 2, 176), (2, 9000), (0, 8), (33, 8)], "single": [(6, 67), (7, 1), (3, 0), (1, 5003)]}
SIZES = {
    cross_entropy_backward: ROWS,
    **dict.fromkeys((cross_entropy_forward, cross_entropy_inplace), ROWS | APART),
    cross_entropy_fused: ROWS | APART | LONG,
    **dict.fromkeys((rms_norm_forward, rms_norm_backward, layer_norm_forward, layer_norm_backward), ROWS),
    **dict.fromkeys((swiglu_forward, swiglu_backward, silu_forward, silu_backward), ELEMENTS),
    **dict.fromkeys((gelu_tanh, gelu_tanh_backward, gelu_exact, gelu_exact_backward), ELEMENTS),
    rope_rotate: {
        "wide": [(2, 5, 3, 64), (3, 7, 2, 16), (1, 2, 40, 128), (0, 2, 1, 16), (1, 300, 1, 16)],
        "single": [(2, 3, 1, 6), (1, 67, 5, 34), (1, 1, 1, 2)],
    },
    embedding_forward: {"wide": [(67, 50, 8), (1, 1, 64), (3, 7, 9000), (0, 3, 8)], "single": [(67, 50, 7), (5, 3, 1)]},
    embedding_backward: {
        "wide": [(67, 50, 8), (1, 1, 8), (0, 5, 8), (2100, 1500, 8), (64, 2, 16), (1025, 33, 64)],
        "single": [(67, 50, 7), (1024, 3, 1), (33, 1100, 5)],
    },
    adamw_step: {"": [(0,), (1,), (3,), (4,), (2047,), (2048,), (4099,)]},
    adamw_runs: {"": [(7, 3), (9, 8), (2048, 0, 1020, 1021, 1022, 1027), (5000, 2048, 2050, 2050, 4098, 4999)]},
    adamw_advance: {"": [(0,), (1,), (32,), (70,)]},
    sum_of_squares: {"": [(0,), (1,), (7,), (4096,), (4099,), (70001,)]},
}


# ------------------------------------------------------------------ the checks


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Two blocks have all rows of a norm's backward, so that each has several."""
    monkeypatch.setattr(rms_norm, "_PARTIAL", {4: 2, 1: 2})
    monkeypatch.setattr(layer_norm, "_PARTIAL", 2)


def wide(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind != "i" else x


def cuda_results(kernel, args, kwargs, backend=None, apart=False):
    """With `apart`, rows of the first argument begin 16 bytes apart, and nothing may be written between them."""
    with on_cpu(backend), np.errstate(all="ignore"):
        if not apart:
            return call(kernel, "cuda", args, kwargs)
        memory, rows = rows_apart(args[0])
        results = kernel.version("cuda")(rows, *args[1:], **kwargs)
        results = results if isinstance(results, tuple) else (results,)
        assert np.shares_memory(results[0], rows) == kernel.name.endswith("_inplace")
        between = memory[:, rows.shape[1] :]
        assert np.array_equal(between.view(np.uint8), np.full_like(between.view(np.uint8), 0xFF))
        return results


def rows_apart(x):
    """(memory, x in it): each row begins at the first multiple of 16 bytes behind the one before (empty_rows)."""
    n = 16 // x.itemsize
    memory = np.full((len(x), -(-x.shape[1] // n) * 16), 0xFF, np.uint8).view(x.dtype)
    memory[:, : x.shape[1]] = x
    return memory, memory[:, : x.shape[1]]


def check(kernel, args, kwargs, results):
    """The reference's shapes and dtypes, and its numbers in float64 for these very inputs, as far as the dtype holds
    them."""
    with np.errstate(all="ignore"):
        exact = call(kernel, "reference", tuple(map(wide, args)), kwargs)
        naive = call(kernel, "reference", args, kwargs)
    assert [r.dtype for r in results] == [n.dtype for n in naive]
    for result, of_naive, e in zip(results, naive, exact, strict=True):
        name = result.dtype.name
        with np.errstate(all="ignore"):
            e = np.where(np.isfinite(of_naive), e, of_naive.astype(np.float64))  # beyond the dtype's range
        if name == "float32":
            allowed = max(3 * largest_error([of_naive], [e]), 4 * np.finfo(np.float32).eps)
            assert largest_error([result], [e]) <= allowed, (kernel.name, largest_error([result], [e]), allowed)
        else:
            finite = np.isfinite(e)
            result, of_naive = result.astype(np.float64), of_naive.astype(np.float64)
            assert np.array_equal(result[~finite], e[~finite], equal_nan=True)
            wrong, least = (np.linalg.norm(x[finite] - e[finite]) for x in (result, of_naive))
            size = np.linalg.norm(e[finite])
            allowed = max(TOLERANCE[name] * max(size, 1e-3), 1.1 * least)  # few numbers may round alike
            assert wrong <= allowed, (kernel.name, wrong, allowed)


def check_sizes(make, dtype, path, weights=np.float32, edits=None):
    """Every size against the definition, and the same bits from both orders of the threads."""
    shared_limit, apart = (4 if path.endswith("long") else 226) << 10, path.startswith("apart")
    for seed, size in enumerate(SIZES[make][path]):
        kernel, args, *kwargs = make(Draw(TYPES[dtype], weights, seed), *size)
        kwargs = dict(*kwargs)
        results = cuda_results(kernel, args, kwargs, Cpu("forward", edits, shared_limit=shared_limit), apart)
        check(kernel, args, kwargs, results)
        others = cuda_results(kernel, args, kwargs, Cpu("reversed", edits, shared_limit=shared_limit), apart)
        for r, other in zip(results, others, strict=True):
            assert np.array_equal(r.view(np.uint8), other.view(np.uint8)), "the order of the threads shows"


# Compiling an instance takes most of a second, so by default one or two of each kernel are tried, of the paths that
# differ; all of them under the slow marker.
DEFAULT = {
    (cross_entropy_forward, "bfloat16", "wide, blocks"),
    (cross_entropy_inplace, "float32", "single"),
    (cross_entropy_fused, "bfloat16", "wide"),
    (cross_entropy_fused, "bfloat16", "apart"),
    (cross_entropy_fused, "float32", "wide, long"),
    (rms_norm_forward, "bfloat16", "wide"),
    (rms_norm_backward, "bfloat16", "wide"),
    (layer_norm_backward, "float32", "wide, blocks"),
    (swiglu_forward, "bfloat16", "wide"),
    (swiglu_backward, "float32", "wide"),
    (rope_rotate, "bfloat16", "wide"),
    (embedding_forward, "float32", "single"),
    (embedding_backward, "bfloat16", "wide"),
    (adamw_step, "float32", ""),
    (adamw_runs, "float32", ""),
    (adamw_advance, "float32", ""),
    (sum_of_squares, "float32", ""),
    (gelu_tanh, "bfloat16", "wide"),
}
CASES = [
    pytest.param(
        *(make, dtype, path),
        marks=[pytest.mark.slow] * ((make, dtype, path) not in DEFAULT),
        id=f"{make.__name__}-{dtype}-{path.replace(', ', '-')}",
    )
    for make, paths in SIZES.items()
    for dtype in TYPES
    if not (make in (adamw_step, adamw_runs) and dtype != "float32")
    for path in paths
]


@pytest.mark.parametrize(("make", "dtype", "path"), CASES)
def test_it_is_the_definition_and_the_order_of_threads_does_not_matter(make, dtype, path):
    norm = make.__name__.startswith(("rms_norm", "layer_norm", "rope"))  # float32 weights beside 16-bit activations
    for weights in {TYPES[dtype], np.float32} if norm and (make, dtype, path) not in DEFAULT else [np.float32]:
        check_sizes(make, dtype, path, weights)


def test_every_kernel_is_tried():
    tried = {make(Draw(np.float32), *next(iter(paths.values()))[0])[0].name for make, paths in SIZES.items()}
    ours = {k.name for k in KERNELS if "cuda" in k.versions and not k.name.startswith("attention")}
    assert tried == ours and {make for make, _, _ in DEFAULT} <= set(SIZES)


# ------------------------------------------------------------------ faults

# What stands in a file, what a fault puts there, and the case that must not pass then.
FAULTS = {
    (cross_entropy_forward, "bfloat16", "wide, blocks"): [
        ("cross_entropy.cu", "total *= factor;", ""),  # the sums not brought down to a larger maximum
        ("common.cuh", "__syncthreads();\n    x = 0;", "x = 0;"),
        ("common.cuh", "__syncthreads();\n#pragma unroll\n        for (int w", "for (int w"),
    ],
    (cross_entropy_forward, "float32", "wide"): [
        ("cross_entropy.cu", "factor == 0 ? 0 : factor *", "factor *"),  # 0 times infinity
        ("cross_entropy.cu", "raise(row_max<THREADS>(m, partial), s);", ""),  # each part relative to its own maximum
        ("cross_entropy.cu", "fmaxf(d, FLOOR)", "d"),  # p x of a forbidden token
    ],
    (cross_entropy_inplace, "float32", "wide, blocks"): [
        ("cross_entropy.cu", "if (j0 + u * STEP < end) use", "if (j0 + u * STEP <= end) use"),
        ("cross_entropy.cu", "target - j < N)", "target - j < N - 1)"),
        ("cross_entropy.cu", "fmaxf(x, FLOOR)", "x"),
    ],
    (cross_entropy_fused, "float32", "wide, long"): [
        ("cross_entropy.cu", "(0, staged, [&]", "(0, V, [&]"),
        ("cross_entropy.cu", "(staged, whole, [&]", "(staged + N, whole, [&]"),
        ("cross_entropy.cu", "if (j < staged) store_pack", "if (j <= staged) store_pack"),
        ("cross_entropy.cu", "fmaf(z[i], lse, a[i])", "a[i]"),
    ],
    (cross_entropy_fused, "bfloat16", "apart"): [
        ("cross_entropy.cu", "j < V) of_row.add<false>", "j + 1 < V) of_row.add<false>"),
        ("cross_entropy.cu", "j < V) store_pack(row + j,", "j + 1 < V) store_pack(row + j,"),
        ("cross_entropy.cu", "j < V) row[j] = from_float", "j <= V) row[j] = from_float"),
        ("cross_entropy.cu", "T* row = logits + i * stride;\n    T* stage", "T* row = logits + i * V;\n    T* stage"),
    ],
    (rms_norm_forward, "bfloat16", "wide"): [("common.cuh", "kept[u] = j < D ?", "kept[u] = j <= D ?")],
    (rms_norm_backward, "bfloat16", "wide"): [
        ("rms_norm.cu", "// the block's warps, in order\n        __syncthreads();", ""),
        ("rms_norm.cu", "* r_i * r_i / D", "* r_i / D"),
        ("common.cuh", "for (int i = warp; i < rows; i += 32)", "for (int i = warp + 1; i < rows; i += 32)"),
        ("common.cuh", "sums[lane * 33 + warp] = sum;\n    __syncthreads();", "sums[lane * 33 + warp] = sum;"),
    ],
    (rms_norm_backward, "float32", "single, blocks"): [
        ("rms_norm.cu", "block_dweight[j + k]) +=", "block_dweight[j + k]) =")  # of what is not kept of a long row
    ],
    (layer_norm_backward, "float32", "wide"): [
        ("layer_norm.cu", "- mean_h - n * mean_hn", "- n * mean_hn"),
        ("layer_norm.cu", "of_warp[D + j + k] = dbias", "of_warp[D + j + k] = dweight"),
    ],
    (swiglu_forward, "bfloat16", "wide"): [
        (
            "common.cuh",
            "min(static_cast<long long>(rows_per_block), rows - first) * per_row",
            "rows_per_block * per_row",
        )
    ],
    (swiglu_backward, "float32", "wide"): [("swiglu.cu", "ups[u].v[k]) * (1 + a", "ups[u].v[k]) * (1 - a")],
    (rope_rotate, "bfloat16", "wide"): [
        ("rope.cu", "b * c.v[k] + a * sine", "b * c.v[k] - a * sine"),
        ("rope.cu", "pair / half < heads", "pair / half < H"),
        ("rope.cu", "sine = way * s.v[k]", "sine = s.v[k]"),
        ("rope.cu", "(i % length) * half", "(i % tokens) * half"),
    ],
    (embedding_backward, "bfloat16", "wide"): [
        ("embedding.cu", "from_before = false;", ""),
        ("embedding.cu", "__syncthreads();\n    return count;", "return count;"),
        ("embedding.cu", "if (lane >= lanes) before += below;", "before += below;"),
        ("embedding.cu", "p <= last", "p < last"),
        ("embedding.cu", "2 * piece + !from_before", "2 * piece + from_before"),
    ],
    (adamw_step, "float32", ""): [
        (
            "adamw.cu",
            "threadIdx.x < rest) {\n        const long long j",
            "threadIdx.x + 1 < rest) {\n        const long long j",
        ),
        ("adamw.cu", "beta2 * v + rest2 * g * g", "beta2 * v + rest2 * g"),
    ],
    (adamw_runs, "float32", ""): [
        ("adamw.cu", "borders[middle] <= j", "borders[middle] < j"),
        ("adamw.cu", "while (j >= end)", "if (j >= end)"),
        ("adamw.cu", "run.follow(j + k)", "run.follow(j)"),
        ("adamw.cu", "        run.find(j);\n", ""),
        ("adamw.cu", "end = run < last ? borders[run] : n", "end = borders[run]"),
    ],
    (adamw_advance, "float32", ""): [("adamw.cu", "__syncwarp();", ""), ("adamw.cu", "run += 32", "run += 64")],
    (sum_of_squares, "float32", ""): [("adamw.cu", "j0 += LOADS * stride", "j0 += stride")],
    (gelu_tanh, "bfloat16", "wide"): [("gelu.cu", "  s = u2 >= 0", "  s = u2 < 0")],
    (gelu_tanh_backward, "float32", "wide"): [("gelu.cu", "rest = u2 >= 0", "rest = u2 < 0")],
    (gelu_exact_backward, "float32", "wide"): [("gelu.cu", "__expf(-0.5f * x * x)", "__expf(0.5f * x * x)")],
}
# By default only faults in files whose case compiles one instance.
CAUGHT_BY_DEFAULT = [
    "total *= factor;",
    "__syncthreads();\n    x = 0;",
    "ups[u].v[k]) * (1 + a",
    "b * c.v[k] + a * s.v[k]",
]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        pytest.param(case, fault, marks=[pytest.mark.slow] * (fault[1] not in CAUGHT_BY_DEFAULT), id=f"{fault[0]}-{i}")
        for case, faults in FAULTS.items()
        for i, fault in enumerate(faults)
    ],
)
def test_a_planted_fault_is_caught(case, fault):
    file, old, new = fault
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_sizes(*case, edits={file: [(old, new)]})
    assert "does not compile" not in str(caught.value)


# ------------------------------------------------------------------ properties of single kernels


def test_a_nan_stays_in_its_row():
    kernel, args = cross_entropy_fused(Draw(BF16), 3, 64)
    args[0][1, 5], args[1][:] = np.nan, [0, 1, 2]
    spoiled = cuda_results(kernel, args, {})
    assert np.isnan(spoiled[2][1]) and np.isnan(spoiled[0][1].astype(np.float32)).all()
    args[0][1, 5] = 0
    for x, y in zip(spoiled, cuda_results(kernel, args, {}), strict=True):
        assert np.array_equal(x[[0, 2]], y[[0, 2]])


class Noting(Cpu):
    """Keeps what was launched with what."""

    def launch(self, source, instance, grid, threads, arguments, shared):
        self.arguments = arguments
        super().launch(source, instance, grid, threads, arguments, shared)


@pytest.mark.parametrize("make", [swiglu_forward, rope_rotate])
def test_views_into_a_projection_are_read_where_they_lie(make):
    kernel, args = make(Draw(BF16, np.float32), *SIZES[make]["wide"][1])
    backend = Noting()
    cuda_results(kernel, args, {}, backend)
    arrays = [a for a in backend.arguments if isinstance(a, np.ndarray)]
    inputs = [x for x in args if isinstance(x, np.ndarray)]
    assert all(any(np.shares_memory(a, x) for a in arrays) for x in inputs)


def test_ids_outside_of_a_table_read_and_write_nothing_else():
    """They are an error, which check_ids raises later; until then nothing may be touched that is not the kernel's."""
    ids = np.array([-7, 2, 3, 900])
    weight = np.arange(28, dtype=np.float32).reshape(4, 7)
    (y,) = cuda_results(embedding.forward, (weight, ids), {})
    assert np.array_equal(y[1:3], weight[2:])
    (dweight,) = cuda_results(embedding.backward, (np.ones((4, 8), BF16), ids, 4), {})
    assert np.array_equal(dweight[1:3].astype(float), np.repeat([[0], [1]], 8, 1))
    kernel, args = cross_entropy_fused(Draw(BF16), 2, 64)
    args[1][:] = 64, 10**6
    cuda_results(kernel, args, {})


def test_the_embedding_gradient_counts_every_token_once():
    """With whole numbers the sums are exact: a token lost or added twice shows, whatever the tolerance."""
    rng = np.random.default_rng(0)
    N, V = 2500, 1300  # more than a tile of the sort, and two passes of it
    ids = np.where(rng.random(N) < 0.5, 700, rng.integers(0, V, N))
    dy = rng.integers(-1, 2, (N, 8)).astype(BF16)
    (dweight,) = cuda_results(embedding.backward, (dy, ids, V), {})
    exact = embedding.reference_backward(dy.astype(np.float64), ids, V)
    assert np.abs(exact).max() <= 256 and np.array_equal(dweight.astype(np.float64), exact)


VERSIONS = pytest.mark.parametrize("version", ["reference", "numba", "cuda"])


@VERSIONS
def test_adamw_takes_a_scale_on_the_device(version):
    def run(scale):
        _, arrays, constants = adamw_step(Draw(np.float32), 67)
        with on_cpu():
            adamw.step_inplace.version(version)(*arrays, **constants | {"scale": scale})
        return arrays[:3]

    expected, before = run(0.25), adamw_step(Draw(np.float32), 67)[1][:3]
    for x, y in zip(expected, run(np.array([0.25], np.float32)), strict=True):
        assert np.array_equal(x, y)
    assert not np.array_equal(expected[0], before[0])
    for broken in (np.inf, np.nan):
        for scale in (float(broken), np.array([broken], np.float32)):
            for x, y in zip(before, run(scale), strict=True):
                assert np.array_equal(x, y)


@VERSIONS
def test_updates_are_counted_where_they_are_made(version):
    """The schedule is that of `schedule_of`, to the last bit, and an update that is left out has the next one's."""
    rng, steps, wanted = np.random.default_rng(0), np.zeros(1, np.int32), 0
    schedule, rates = np.full((40, 3), np.nan, np.float32), rng.uniform(0, 0.1, (40, 2))
    for scale in (1.0, math.nan, 0.5, math.inf, 1e-30, -math.inf, *[1.0] * 100):
        with on_cpu():
            advance = adamw.advance_inplace.version(version)
            advance(schedule, rates, steps, np.full(1, scale, np.float32), beta1=0.9, beta2=0.999)
        rows = [adamw.schedule_of(lr, 0.9, 0.999, decay, wanted + 1) for lr, decay in rates.tolist()]
        assert np.array_equal(schedule, np.array(rows, np.float32))
        wanted += math.isfinite(scale)
        assert steps.tolist() == [wanted]


@VERSIONS
def test_adamw_updates_runs_as_if_each_were_alone(version):
    """The same bits, wherever the borders are: a pack of 16 bytes may have any number of them."""
    rng = np.random.default_rng(0)
    for n, count in [(1, 1), (4, 9), (67, 3), (1030, 200), (4099, 5), (5000, 40)]:
        for near in (0, n // 2):  # all over the array, or within a few elements
            borders = np.sort(rng.integers(near, min(near + 12, n) if near else n, count)).tolist()
            _, (*arrays, schedule, borders), constants = adamw_runs(Draw(np.float32, seed=n), n, *borders)
            alone = [x.copy() for x in arrays]
            with on_cpu():
                update = adamw.step_inplace.version(version)
                update(*arrays, schedule, borders, **constants)
                for begin, end, row in zip([0, *borders], [*borders, n], schedule, strict=True):
                    update(*(x[begin:end] for x in alone), row[None], **constants)
            assert all(np.array_equal(x, y) for x, y in zip(arrays, alone, strict=True))


@pytest.mark.parametrize("which", range(4))
def test_adamw_on_memory_that_16_byte_accesses_do_not_fit(which):
    _, aligned, constants = adamw_runs(Draw(np.float32), 4099, 1, 700, 701, 4097)
    shifted = [x.copy() for x in aligned]
    shifted[which] = np.concatenate([shifted[which][:1], shifted[which]])[1:]
    backend = Cpu()
    with on_cpu(backend):
        adamw.cuda_inplace(*aligned, **constants)
        adamw.cuda_inplace(*shifted, **constants)
    assert [instance for _, instance in backend.launched] == ["step<4>", "step<1>"]
    assert all(np.array_equal(x, y) for x, y in zip(aligned, shifted, strict=True))


@pytest.mark.parametrize("make", [m for m in SIZES if m not in (adamw_step, adamw_runs)], ids=lambda f: f.__name__)
def test_float64_is_refused(make):
    kernel, args, *kwargs = make(Draw(np.float64), *next(iter(SIZES[make].values()))[0])
    with pytest.raises(TypeError, match="the CUDA kernels take float32, bfloat16, float16"):
        cuda_results(kernel, args or (np.zeros(3),), dict(*kwargs))


def test_adamw_refuses_what_is_not_float32():
    with pytest.raises(TypeError, match="float32 on a GPU"):
        adamw.cuda_inplace(*np.zeros((4, 8)), np.zeros((1, 3)), **ADAMW)


def test_a_gpu_array_gets_the_cuda_version_if_it_takes_the_dtype():
    """Anything that is no NumPy array counts as on a GPU."""

    def chosen(dtype, *versions):
        kernel = Kernel("only_here", reference=None, versions=dict.fromkeys(versions), example=None)
        KERNELS.remove(kernel)
        return kernel.choose(SimpleNamespace(dtype=np.dtype(dtype)))

    for dtype in (np.float32, np.float16, BF16):
        assert chosen(dtype, "numba", "numba_cuda", "cuda") == "cuda"
        assert chosen(dtype, "numba", "numba_cuda") == "numba_cuda"
        assert chosen(dtype, "numba") == "reference"
    assert chosen(np.float64, "numba", "numba_cuda", "cuda") == "reference"
