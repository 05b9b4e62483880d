"""Attention in CUDA C++ on a CPU that plays the GPU: the tiles that a GPU gets, against the definition in float64 at
lengths around their borders; and faults planted in the kernels, which the same checks catch."""

import functools

import ml_dtypes
import numpy as np
import pytest

from minillm.kernels import attention, cuda
from tests.cuda_on_cpu import Cpu, on_cpu, prepare
from tests.test_kernels import largest_error

TYPES = {"float": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}

# Largest error allowed, over the norm of all numbers and over the largest number. The outputs' own rounding is 1.7e-3
# and 2.1e-4 of the norm; p and ds are rounded before they are multiplied, too.
TOLERANCE = {"bf16": 8e-3, "fp16": 1e-3}

# (Tq, Tk, H, Hk, who sees whom): around the borders of tiles of 16, 32, 64 and 128 rows
LENGTHS = [
    (1, 1, 2, 1, "causal"),
    (1, 67, 4, 2, "causal"),
    (31, 33, 2, 1, "anything"),
    (63, 64, 1, 1, "window"),
    (129, 129, 1, 1, "causal"),
    (97, 161, 4, 2, "documents"),
    (130, 130, 1, 1, "padding"),
    (64, 257, 1, 1, "anything"),
]


def draw(rng, ctype, D, Tq, Tk, H, Hk, mask, B=2):
    """(q, k, v, start, scale), and do"""
    q, k, v, do = (
        rng.standard_normal(s).astype(TYPES[ctype])
        for s in ((B, Tq, H, D), (B, Tk, Hk, D), (B, Tk, Hk, D), (B, Tq, H, D))
    )
    position = np.arange(Tq) + Tk - Tq
    if mask == "causal":
        start = np.zeros((B, Tq))
    elif mask == "documents":
        border = np.sort(rng.integers(0, Tk + 1, (B, 3)), 1)
        start = np.where(border[:, None] <= position[:, None], border[:, None], 0).max(-1)
    elif mask == "window":
        start = np.maximum(position - 20, 0) + np.zeros((B, 1))
    elif mask == "padding":  # the queries there see nothing
        start = rng.integers(Tk // 4, Tk // 2, (B, 1)) + np.zeros(Tq)
        start[0] = Tk
    else:
        start = np.sort(rng.integers(0, Tk + 1, (B, Tq)), 1)
    return (q, k, v, start.astype(np.int32), 1 / np.sqrt(D)), do


def run(ctype, arguments, do, backend=None, backward=True, version="cuda"):
    """[o, lse, dq, dk, dv] of a CUDA version"""
    forth = attention.forward.version("cuda" if version == "cuda_atomics" else version)
    back = attention.backward.version(version)
    with on_cpu(backend or Cpu()):
        o, lse = forth(*arguments)
        gradients = back(do, *arguments[:3], o, lse, *arguments[3:]) if backward else ()
    assert o.dtype == TYPES[ctype] and lse.dtype == np.float32
    assert [g.dtype for g in gradients] == [o.dtype] * len(gradients)
    return [o, lse, *gradients]


def reference(arguments, do, dtype):
    q, k, v, do = (x.astype(dtype) for x in (*arguments[:3], do))
    o, lse = attention.reference_forward(q, k, v, *arguments[3:])
    return [o, lse, *attention.reference_backward(do, q, k, v, o, lse, *arguments[3:])]


def error(x, exact):
    """The larger of ||x - exact|| / ||exact|| and max |x - exact| / max |exact|; infinities must be the same ones.

    Where a gradient is nearly 0, as that of a query that sees one key, the terms that cancel have rounded at their own
    scale: exact counts as at least that large."""
    assert x.shape == exact.shape
    x, finite = x.astype(np.float64), np.isfinite(exact)
    assert np.array_equal(np.isfinite(x), finite) and np.array_equal(x[~finite], exact[~finite])
    wrong, size = np.abs(x[finite] - exact[finite]), np.abs(exact[finite])
    of_all = np.linalg.norm(wrong) / max(np.linalg.norm(size), 0.1 * np.sqrt(size.size), 1e-9)
    return max(of_all, wrong.max(initial=0) / size.max(initial=0.5))


def check(ctype, results, arguments, do):
    """The results are what the definition gives for these very numbers, to within the type's roundings."""
    exact = reference(arguments, do, np.float64)
    if ctype == "float":
        limits = [max(3 * error(x, e), 4e-6) for x, e in zip(reference(arguments, do, np.float32), exact, strict=True)]
    else:
        limits = [TOLERANCE[ctype]] * 5
        limits[1] = 1e-5  # lse is float32
    for name, x, e, limit in zip(("o", "lse", "dq", "dk", "dv"), results, exact, limits, strict=False):
        assert error(x, e) <= limit, (name, error(x, e), limit)
    sees_nothing = (exact[1] == -np.inf).transpose(0, 2, 1)
    assert not results[0][sees_nothing].any()
    assert len(results) < 3 or not results[2][sees_nothing].any()


def equal_bits(results, others):
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(results, others, strict=True))


def check_all(ctype, D, lengths, backends, **options):
    """The definition, and the same bits from every backend: all orders of the threads give one result."""
    rng = np.random.default_rng(D)
    for case in lengths:
        arguments, do = draw(rng, ctype, D, *case)
        first, *others = (run(ctype, arguments, do, backend, **options) for backend in backends)
        check(ctype, first, arguments, do)
        assert all(equal_bits(first, other) for other in others), "the order of the threads shows in the result"


def instances(ctype, D, tiles=attention.TILES):
    """What a head of this size launches, one pass aside."""
    tiles = attention.FLOAT_TILES if ctype == "float" else tiles
    Dp = min(size for size in tiles["forward"] if size >= D)
    kernels = [
        attention._instance(kernel, ctype, Dp, sizes[Dp]) for kernel, sizes in tiles.items() if kernel != "one_pass"
    ]
    return [*kernels, f"rows_of_backward<{ctype}>", "ends"]


# Heads that need every pair of a type and a padded size; the first of each type by default, as each costs seconds of
# compiling: where D is the padded size, and where zeros fill it up.
SIZES = {"float": [(33, 64), (68, 127)], "bf16": [(40, 64), (16, 32), (72, 96), (128,)]}
SIZES["fp16"] = [(104,), (32,), (64,), (128, 88)]
ORDERS = ["forward", "reversed"]


@pytest.mark.parametrize(
    ("ctype", "sizes"),
    [pytest.param(c, s, marks=[pytest.mark.slow] * (i > 0)) for c in SIZES for i, s in enumerate(SIZES[c])],
)
def test_it_is_the_definition_and_the_order_of_threads_does_not_matter(ctype, sizes):
    prepare(attention.SOURCE, instances(ctype, sizes[0]))
    check_all(ctype, sizes[0], LENGTHS, [Cpu(order) for order in ORDERS])
    for D in sizes[1:]:
        check_all(ctype, D, LENGTHS[5:6], [Cpu()])


@pytest.mark.parametrize(("ctype", "sizes"), [("bf16", (40, 64)), ("fp16", (104, 128))])
def test_four_warps_at_once_are_the_definition_too(ctype, sizes):
    """With Hopper's instruction; heads of up to 64 and of up to 128 numbers, which lie in one panel and in two."""
    prepare(attention.SOURCE, instances(ctype, sizes[0], attention.WGMMA_TILES))
    backend = Cpu()
    check_all(ctype, sizes[0], LENGTHS, [backend, Cpu("reversed")], version="cuda_wgmma")
    check_all(ctype, sizes[1], LENGTHS[5:6], [Cpu()], version="cuda_wgmma")
    launched = {instance.split("<")[0] for _, instance in backend.launched if "WGMMA" in instance}
    assert launched == {"forward", "backward_queries", "backward_keys"}


@pytest.mark.slow
@pytest.mark.parametrize(("ctype", "D"), [("bf16", 8), ("bf16", 72), ("bf16", 128), ("fp16", 24), ("fp16", 64)])
def test_four_warps_at_once_and_more_sizes(ctype, D):
    check_all(ctype, D, LENGTHS, [Cpu(order) for order in ("forward", "reversed", 1)], version="cuda_wgmma")


def test_four_warps_at_once_are_for_hopper_and_for_sixteen_bits():
    class Other(Cpu):
        architecture = lambda self: "sm_100"

    arguments, do = draw(np.random.default_rng(0), "bf16", 64, *LENGTHS[2])
    told = "^attention.cu, forward<.*WGMMA> needs a GPU of sm_90a .* this one is sm_100$"
    with pytest.raises(ValueError, match=told):
        run("bf16", arguments, do, Other(), version="cuda_wgmma")
    assert equal_bits(run("bf16", arguments, do), run("bf16", arguments, do, Other()))
    arguments, do = draw(np.random.default_rng(0), "float", 33, *LENGTHS[2])
    assert equal_bits(run("float", arguments, do), run("float", arguments, do, Other(), version="cuda_wgmma"))


@pytest.mark.slow
@pytest.mark.parametrize(("ctype", "D"), [("float", 64), ("bf16", 64), ("fp16", 128)])
def test_other_orders_of_threads(ctype, D):
    check_all(ctype, D, LENGTHS, [Cpu(order) for order in ("forward", 1, 2, 3)])


@pytest.mark.parametrize(
    ("ctype", "sizes"),
    [pytest.param(c, s, marks=[pytest.mark.slow] * (s != (40, 64))) for c in ("bf16", "fp16") for s in SIZES[c]],
)
def test_one_pass_gives_the_same_dk_and_dv_and_dq_but_for_rounding(ctype, sizes):
    rng = np.random.default_rng(8)
    for D in sizes:
        for case in LENGTHS[1:6]:
            arguments, do = draw(rng, ctype, D, *case)
            backend = Cpu()
            one = run(ctype, arguments, do, backend, version="cuda_atomics")
            assert not any("queries" in instance for _, instance in backend.launched)
            check(ctype, one, arguments, do)
            assert equal_bits(one[3:], run(ctype, arguments, do)[3:])


def test_one_pass_needs_the_room():
    arguments, do = draw(np.random.default_rng(0), "fp16", 104, *LENGTHS[2])
    small = Cpu(shared_limit=98 << 10)  # as GPUs of consumers have it
    assert equal_bits(run("fp16", arguments, do), run("fp16", arguments, do, small, version="cuda_atomics"))


def test_float_has_one_way_only():
    arguments, do = draw(np.random.default_rng(0), "float", 33, *LENGTHS[2])
    assert equal_bits(run("float", arguments, do), run("float", arguments, do, version="cuda_atomics"))


@pytest.mark.parametrize("ctype", ["bf16", "fp16"])
def test_heads_of_odd_sizes_are_worked_on_in_float32(ctype):
    rng = np.random.default_rng(1)
    for D in (1, 5, 36):
        arguments, do = draw(rng, ctype, D, *LENGTHS[2])
        backend = Cpu()
        results = run(ctype, arguments, do, backend, version="cuda_atomics")
        assert all("float" in instance or instance == "ends" for _, instance in backend.launched)
        check(ctype, results, arguments, do)


def test_float32_is_as_exact_as_naive_float32():
    """As test_kernels.py asks it of the Numba versions; the backward gets what this forward has saved."""
    for size in ("ragged", "extreme"):
        ours, naive = [], []
        for seed in range(12):
            arguments, _ = attention.forward.example(np.random.default_rng(seed), size, np.float32)
            do = np.random.default_rng(seed).standard_normal(arguments[0].shape).astype(np.float32)
            exact = reference(arguments, do, np.float64)
            ours.append(largest_error(run("float", arguments, do), exact))
            naive.append(largest_error(reference(arguments, do, np.float32), exact))
        assert max(ours) <= max(3 * max(naive), 4 * np.finfo(np.float32).eps)


def fused(rng, ctype, D, Tq, Tk, H, Hk, shift=0):
    """q, k and v inside one projection, whose rows begin `shift` elements late."""
    x = rng.standard_normal((2, Tk, shift + (H + 2 * Hk) * D)).astype(TYPES[ctype])[..., shift:]
    heads = (
        x.reshape(2, Tk, H + 2 * Hk, D)
        if shift == 0
        else np.lib.stride_tricks.as_strided(x, (2, Tk, H + 2 * Hk, D), (*x.strides[:2], D * x.itemsize, x.itemsize))
    )
    return heads[:, Tk - Tq :, :H], heads[:, :, H : H + Hk], heads[:, :, H + Hk :]


every_tile = pytest.mark.parametrize(
    ("ctype", "D", "version"),
    [
        ("bf16", 64, "cuda"),
        ("float", 33, "cuda"),
        ("fp16", 104, "cuda"),
        ("bf16", 64, "cuda_wgmma"),
        ("fp16", 104, "cuda_wgmma"),
    ],
)


@every_tile
def test_a_fused_projection_is_read_in_place(ctype, D, version):
    made = functools.partial(run, version=version)
    rng = np.random.default_rng(3)
    q, k, v = fused(rng, ctype, D, 40, 50, 4, 2)
    _, do = draw(rng, ctype, D, 40, 50, 4, 2, "causal")
    do = do.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)  # as it may come back
    assert all(attention._view(x, x.dtype)[0] is x for x in (q, k, v, do))
    rest = (np.sort(rng.integers(0, 50, (2, 40)), 1), 0.2)  # int64, as start may be
    results = made(ctype, (q, k, v, *rest), do)
    check(ctype, results, (q, k, v, *rest), do)
    assert equal_bits(results, made(ctype, tuple(map(np.ascontiguousarray, (q, k, v))) + rest, do.copy()))
    # where rows do not begin at multiples of 16 bytes or do not lie in one piece, they are copied
    shifted = fused(rng, ctype, D, 40, 50, 4, 2, shift=1)
    results = made(ctype, (*shifted, *rest), do)
    assert equal_bits(results, made(ctype, tuple(map(np.ascontiguousarray, shifted)) + rest, do))
    backwards = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in shifted]
    assert equal_bits(results, made(ctype, (*backwards, *rest), do))


@every_tile
def test_what_is_not_seen_changes_no_bit(ctype, D, version):
    made = functools.partial(run, version=version)
    rng = np.random.default_rng(4)
    (q, k, v, start, scale), do = draw(rng, ctype, D, 150, 150, 2, 1, "padding")
    before = made(ctype, (q, k, v, start, scale), do)
    pad, later = start[1, 0], 140
    junk = [x.copy() for x in (q, k, v)]
    for x in junk:
        x[1, :pad] = 1e4 * rng.standard_normal(x[1, :pad].shape)
    assert equal_bits(before, made(ctype, (*junk, start, scale), do))
    for x in junk:
        x[1, later:] = 30 * rng.standard_normal(x[1, later:].shape)  # scores whose maximum has to be followed
    do[1, later:] = 0
    after = made(ctype, (*junk, start, scale), do)
    assert equal_bits([before[0][:, :later], before[2][:, :later]], [after[0][:, :later], after[2][:, :later]])
    assert not after[3][1, later:].any() and not after[4][1, later:].any()


@pytest.mark.parametrize("ctype", TYPES)
def test_extreme_scores(ctype):
    """1e4 apart, equal to the last bit, and all of them huge: the largest takes all, or they share."""
    D, T = 104 if ctype == "fp16" else 64, 5
    q, k = np.full((1, T, 1, D), 100, TYPES[ctype]), np.zeros((1, T, 1, D), TYPES[ctype])
    v = (np.arange(T, dtype=TYPES[ctype]).reshape(1, T, 1, 1) * np.ones((1, T, 1, D), TYPES[ctype])).astype(q.dtype)
    k[0, 2] = 50
    arguments, do = (q, k, v, np.zeros((1, T), np.int32), 2 / D), np.ones_like(q)
    results = run(ctype, arguments, do)
    assert np.allclose(results[0][0, :, 0, 0].astype(float), [0, 0.5, 2, 2, 2], atol=1e-6)
    assert all(np.isfinite(x.astype(float)).all() for x in results)
    k[...] = 50
    assert np.allclose(run(ctype, arguments, do)[0][0, :, 0, 0].astype(float), np.arange(T) / 2, rtol=4e-3)


@every_tile
def test_scores_that_rise_from_tile_to_tile(ctype, D, version):
    """By less and by more than the maximum may be left behind, in some rows of a warp and not in others."""
    (q, k, v, start, scale), do = draw(np.random.default_rng(9), ctype, D, 150, 150, 1, 1, "causal")
    for step in (0.03, 0.3):
        k[..., :1] = (step * np.arange(150)[:, None, None]).astype(k.dtype)
        q[..., :1] = 1 / scale
        q[:, 5::3, :, 0] *= 0.1
        arguments = (q, k, v, start, scale)
        check(ctype, run(ctype, arguments, do, backward=False, version=version), arguments, do)


def test_a_nan_comes_out_where_it_went_in_and_only_there():
    for ctype, D in (("bf16", 64), ("float", 33)):
        arguments, do = draw(np.random.default_rng(5), ctype, D, 40, 40, 2, 2, "causal")
        arguments[0][0, 3, 1] = np.nan
        o, _, dq, _, _ = run(ctype, arguments, do)
        for x in (o, dq):
            assert np.isnan(x[0, 3, 1]).all() and np.isnan(x).sum() == D


def test_no_queries_no_batch_and_no_keys():
    for B, Tq, Tk in ((0, 3, 3), (2, 0, 3), (2, 0, 0)):
        arguments, do = draw(np.random.default_rng(6), "bf16", 64, Tq, Tk, 2, 1, "causal", B)
        o, lse, dq, dk, dv = run("bf16", arguments, do)
        assert o.shape == dq.shape == (B, Tq, 2, 64) and lse.shape == (B, 2, Tq)
        assert dk.shape == dv.shape == (B, Tk, 1, 64) and not dk.any() and not dv.any()


def test_what_the_tiles_can_not_do_the_reference_does():
    for D, scale in ((130, 0.1), (64, 0.0), (64, -0.2)):
        arguments, do = draw(np.random.default_rng(7), "bf16", D, 9, 9, 2, 1, "causal")
        arguments = (*arguments[:4], scale)
        backend = Cpu()
        results = run("bf16", arguments, do, backend)
        assert not backend.launched
        check("bf16", results, arguments, do)
    with pytest.raises(TypeError, match="this array is float64"):
        attention.cuda_forward(do.astype(float), *arguments[1:])


BANKS = """
// The addresses of a tile's chunks, one row after the other.
template <int Dp> __device__ void addresses_of(int* out) {
    for (int c = 0; c < Dp / 8; ++c)
        out[threadIdx.x * (Dp / 8) + c] = Tiles<bf16, Dp, 32, 32, 1, REREAD>::at(threadIdx.x, c);
}
__global__ void addresses(int* of_32, int* of_64, int* of_96, int* of_128) {
    addresses_of<32>(of_32), addresses_of<64>(of_64), addresses_of<96>(of_96), addresses_of<128>(of_128);
}
"""


def test_the_same_chunk_of_eight_rows_comes_from_all_banks(tmp_path):
    source = cuda.Source("attention.cu", {"addresses": 32})
    source.path = tmp_path / "attention.cu"
    source.path.write_text(attention.SOURCE.path.read_text(encoding="utf-8") + BANKS, encoding="utf-8")
    tables = [np.zeros((32, Dp // 8), np.int32) for Dp in attention.TILES["forward"]]
    with on_cpu():
        source.launch("addresses", 1, 32, tables)
    for at in tables:
        assert np.array_equal(np.sort(at, None), 16 * np.arange(at.size))  # each chunk has a place of its own
        banks = at.reshape(4, 8, -1) // 16 % 8
        assert (np.sort(banks, 1) == np.arange(8)[:, None]).all()


# ------------------------------------------------------------------ faults


class Faulty(Cpu):
    """A fault in one kernel; the others are as they are, and need not be compiled again."""

    def __init__(self, kernel, fault, order="forward"):
        super().__init__(order)
        self.kernel, self.fault = kernel, fault

    def launch(self, source, instance, *rest):
        self.edits = {"attention.cu": [self.fault]} if instance.split("<")[0] == self.kernel else {}
        super().launch(source, instance, *rest)


WAIT = "cp_async_wait<0>();"
BARRIER = """fence_proxy_async();
    __syncthreads();"""
FORWARD_END = """arrive<E>();
    }

#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const int i = i0 + E::row(r);
        const float l"""
QUERIES_END = """arrive<E>();
    }

#pragma unroll
    for (int r = 0; r < E::R; ++r) {
        const int i = i0 + E::row(r);
        if (i < Tq) E::store(dq"""
KEYS_END = """arrive<E>();
        h = next_h"""
# of the tiles for four warps
PRODUCTS = """wgmma_commit();
        wgmma_wait<0>(s.v);
    }

    static __device__ __forceinline__ void accumulate"""
ADDED = """wgmma_fence(acc.v, a);
#pragma unroll
        for (int k"""
GROUP = """*scratch = vs + 2 * BK * E::ROW;
    const int b = blockIdx.x / H, h = blockIdx.x % H, hk = h / (H / Hk)"""
NEXT = """fetch(j0 + BK, stage ^ 1);
        if (own.any(j0, BK)) {
            typename E::Scores s;"""


def without(text, part):
    return text, text.replace(part, "")


# (kernel, type, (old, new)); "one_pass" is backward_keys with that option, "wgmma" the forward of four warps at once
FAULTS = {
    "a key more is seen": ("forward", "bf16", ("j >= columns.end", "j > columns.end")),
    "acc is not rescaled": ("forward", "bf16", ("acc(r, c) *= correction", "acc(r, c) *= 1")),
    "no wait for a tile": ("forward", "bf16", without(WAIT, WAIT)),
    "no barrier behind a tile": ("forward", "bf16", without(BARRIER, "__syncthreads();")),
    "the head of another group": ("forward", "bf16", (GROUP, GROUP.replace("h / (H / Hk)", "h % Hk"))),
    "another swizzle where it is read": ("forward", "bf16", ("address ^ chunks", "address + chunks")),
    "no zeros behind the last row": ("forward", "bf16", ("first + row + i < total && chunk", "chunk")),
    "ds is read before it is there": (
        "one_pass",
        "bf16",
        ("    __syncthreads();\n    const int queries", "    const int queries"),
    ),
    "a tile is not shown to wgmma": ("wgmma", "fp16", without(BARRIER, "fence_proxy_async()")),
    "no wait for products": ("wgmma", "fp16", without(PRODUCTS, "wgmma_wait<0>(s.v);")),
    "p is multiplied before it is there": ("wgmma", "fp16", without(ADDED, "wgmma_fence(acc.v, a);")),
    "another swizzle than Hopper's": ("wgmma", "fp16", ("(chunk % 8 ^ row % 8)", "chunk % 8")),
}
MORE_FAULTS = {
    "a warp of four leaves a tile out": ("wgmma", "fp16", ("int TEAM = 4,", "int TEAM = 1,")),
    "products that are not committed": ("wgmma", "fp16", without(PRODUCTS, "wgmma_commit();")),
    "the panels of another tile": ("wgmma", "fp16", ("rows + columns<COLUMNS>(d)", "rows + columns<ROWS>(d)")),
    "the rows of another team": ("wgmma", "fp16", ("warp() / TEAM * TEAM * 16 *", "warp() / TEAM * TEAM * 0 *")),
    "the first columns again": ("wgmma", "fp16", ("d % 4 * 32) / 16", "0) / 16")),
    "the same keys again": ("wgmma", "fp16", ("rows + k * 16 * PANEL_ROW / 16", "rows")),
    "sums of the tile before": ("wgmma", "fp16", ("columns<COLUMNS>(d), d > 0)", "columns<COLUMNS>(d), true)")),
    "a key less is seen": ("forward", "bf16", ("i + shift + 1}", "i + shift}")),
    "start is not read": ("forward", "bf16", ("j < columns.first || ", "")),
    "whole where one row sees it so": ("forward", "bf16", ("{bottom.first, top.end}", "{top.first, top.end}")),
    "a warp leaves out its last tile": ("forward", "bf16", ("column < some.end", "column + columns <= some.end")),
    "total is not rescaled": ("forward", "bf16", ("total[r] *= correction", "total[r] *= 1")),
    "rows that see nothing yet": ("forward", "bf16", ("at = top[r] == -INF ? 0 : top[r]", "at = top[r]")),
    "nothing seen before and now": ("forward", "bf16", ("highest[r] == -INF ? 0 : highest[r]", "highest[r]")),
    "each lane has its own total": ("forward", "bf16", ("warp_sum<E::WIDTH>(total[r])", "total[r]")),
    "the next tile into this one's place": ("forward", "bf16", (NEXT, NEXT.replace("stage ^ 1", "stage"))),
    "no zeros behind the head": ("forward", "bf16", ("total && chunk * 8 < D", "total")),
    "registers of p change places": ("forward", "bf16", ("c = 4 * k + e / 2 * 2", "c = 4 * k + e % 2 * 2")),
    "p is read before it is there": ("forward", "float", ("= p(r, c);\n        __syncwarp();", "= p(r, c);")),
    "p is overwritten before it is read": ("backward_keys", "float", ("__syncwarp();  // what", "// what")),
    "no zeros behind the row": (
        "forward",
        "float",
        ("to[row * STRIDE + d] = valid ?", "to[row * STRIDE + d] = true ?"),
    ),
    "an end one query early": ("ends", "bf16", ("row[middle] <= j", "row[middle] < j")),
    "the lse of nothing": ("rows_of_backward", "bf16", ("l == -INF ? INF : ", "")),
    "a part of delta": ("rows_of_backward", "bf16", ("warp_sum<8>(total)", "warp_sum<4>(total)")),
    "delta is left out": ("backward_queries", "bf16", (" - delta_i[r])", ")")),
    "dq without the scale": ("backward_queries", "bf16", ("dq_sum, r, scale, D", "dq_sum, r, 1, D")),
    "no wait for the next tile": ("forward", "bf16", without(FORWARD_END, "arrive<E>();")),
    "no barrier in the queries' kernel": ("backward_queries", "bf16", without(BARRIER, "__syncthreads();")),
    "no barrier in the keys' kernel": ("backward_keys", "bf16", without(BARRIER, "__syncthreads();")),
    "no barrier for four warps": ("wgmma", "fp16", without(BARRIER, "__syncthreads();")),
    "no wait in the queries' kernel": ("backward_queries", "bf16", without(QUERIES_END, "arrive<E>();")),
    "one head of the group": ("backward_keys", "bf16", ("++next_h, next_i0 = first", "next_h = Hk * group")),
    "no wait in the keys' kernel": ("backward_keys", "bf16", without(KEYS_END, "arrive<E>();")),
    "queries before the key": ("backward_keys", "bf16", ("max(j - shift, 0)", "max(j - shift - 1, 0)")),
    "a tile of queries is left out": (
        "backward_keys",
        "bf16",
        ("next_i0 >= block.some.end", "next_i0 + BQ > block.some.end"),
    ),
    "the statistics of another query": ("backward_keys", "bf16", ("stats_of[E::column(c)]", "stats_of[0]")),
    "queries that are not there": ("one_pass", "bf16", ("if (i < Tq && d < D) atomic", "if (d < D) atomic")),
    "the keys of another warp": ("one_pass", "bf16", ("shared_address(ks) + k * 16 * E::ROW", "shared_address(ks)")),
    "dq of the first head": (
        "one_pass",
        "bf16",
        ("b * Tq * H + h) * D;\n            add", "b * Tq * H + hk * group) * D;\n            add"),
    ),
}


@pytest.mark.parametrize("name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAULTS)])
def test_a_planted_fault_is_caught(name):
    kernel, ctype, fault = (FAULTS | MORE_FAULTS)[name]
    version = {"one_pass": "cuda_atomics", "wgmma": "cuda_wgmma"}.get(kernel, "cuda")
    kernel = {"one_pass": "backward_keys", "wgmma": "forward"}.get(kernel, kernel)
    # atomics add in any order, so that another order of the threads may round in another way
    orders = ORDERS[:1] if version == "cuda_atomics" else ORDERS
    backends = [Faulty(kernel, fault, order) for order in orders]
    D = {"float": 33, "bf16": 40, "fp16": 104}[ctype]
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_all(ctype, D, LENGTHS[5:], backends, version=version, backward=kernel != "forward")
    assert "g++" not in str(caught.value)
