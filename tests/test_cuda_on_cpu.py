"""The CPU that plays the GPU: what it computes is right, and what it is to detect it detects."""

import ml_dtypes
import numpy as np
import pytest

from minillm.kernels import cuda
from tests.cuda_on_cpu import Cpu, on_cpu, prepare

TYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}

KERNELS = """
#include "common.cuh"

__global__ void through(const float* x, bf16* b, fp16* h, float* from_b, float* from_h, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        b[i] = from_float<bf16>(x[i]), h[i] = from_float<fp16>(x[i]);
        from_b[i] = to_float(b[i]), from_h[i] = to_float(h[i]);
    }
}

// c (16 x 8) = a (16 x 16) b (16 x 8), where b lies as it is (transposed into registers) or as its columns
template <typename T, bool TRANSPOSED> __global__ void product(const T* a, const T* b, float* c) {
    DYNAMIC_SHARED(bytes, 128);
    T* a_tile = reinterpret_cast<T*>(bytes);
    T* b_tile = a_tile + 256;
    int l = threadIdx.x;
    cp_async_16(shared_address(a_tile + 8 * l), a + 8 * l, true);
    cp_async_commit();
    if (l < 16) cp_async_16(shared_address(b_tile + 8 * l), b + 8 * l, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    u32 a_part[4], b_part[4];
    ldmatrix_x4(a_part, shared_address(a_tile + l % 16 * 16 + l / 16 * 8));
    if constexpr (TRANSPOSED) {
        ldmatrix_x4_trans(b_part, shared_address(b_tile + l % 16 * 8));
    } else {
        ldmatrix_x4(b_part, shared_address(b_tile + l % 8 * 16 + l / 8 % 2 * 8));
    }
    float sums[4] = {c[0], 0, 0, 0};
    sums[0] = 0;
    mma_16x8x16<T>(sums, a_part, b_part[0], b_part[1]);
    for (int r = 0; r < 4; ++r) c[(l / 4 + 8 * (r / 2)) * 8 + 2 * (l % 4) + r % 2] = sums[r];
}

// y_i = the sum of the block's x, less x_i: every thread reads what the others wrote
__global__ void all_but_own(const float* x, float* y, int n) {
    SHARED(float, partial, 2);
    DYNAMIC_SHARED(bytes, 128);
    float* row = reinterpret_cast<float*>(bytes);
    int i = threadIdx.x;
    row[i] = i < n ? x[i] : 0.f;
    __syncthreads();
    float next = row[(i + 1) % blockDim.x];
    float total = block_sum<64>(next, partial);
    if (i < n) y[i] = total - row[i];
}

// y = x, by way of shared memory, two groups of copies
__global__ void copied(const float* x, float* y, int n) {
    DYNAMIC_SHARED(bytes, 128);
    float* tile = reinterpret_cast<float*>(bytes);
    int i = 4 * threadIdx.x;
    cp_async_16(shared_address(tile + i), x + i, i < n);
    cp_async_commit();
    cp_async_16(shared_address(tile + 128 + i), x + 128 + i, 128 + i < n);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int k = 0; k < 4; ++k) y[i + k] = tile[i + k];
    cp_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < 4; ++k) y[128 + i + k] = tile[128 + i + k];
}

// By four warps: c (64 x 64) = a (64 x 128) b^T, and o (64 x 128) = p v, where p (64 x 64) is c in 16 bits, and b and v
// are (64 x 128). Of all three the columns 64 to 127 lie in a second panel.
template <typename T> __global__ void of_four_warps(const T* a, const T* b, const T* v, float* c, float* o) {
    DYNAMIC_SHARED(bytes, 1024);
    const u32 tile = shared_address(bytes), t = threadIdx.x, PANEL = 64 * 128, TILE = 2 * PANEL;
    for (u32 i = t; i < 3 * 64 * 16; i += 128) {
        u32 n = i / 1024, row = i / 16 % 64, chunk = i % 16;
        const T* from = (n == 0 ? a : n == 1 ? b : v) + row * 128 + chunk * 8;
        u32 at = tile + n * TILE + chunk / 8 * PANEL + row * 128;
        cp_async_16(at + (chunk % 8 ^ row % 8) * 16, from, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    float s[8][4], sums[16][4] = {};
    const u32 of_a = wgmma_operand(tile, PANEL), of_b = wgmma_operand(tile + TILE, PANEL);
    wgmma_fence();
    for (int d = 0; d < 8; ++d) {
        u32 columns = (d / 4 * PANEL + d % 4 * 32) / 16;
        wgmma_rows<T>(s, of_a + columns, of_b + columns, d > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(s);
    const u32 of_v = wgmma_operand(tile + 2 * TILE, PANEL), row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    u32 p[4][4];
    for (int n = 0; n < 8; ++n)
        for (int r = 0; r < 4; ++r) {
            c[(row + r / 2 * 8) * 64 + n * 8 + column + r % 2] = s[n][r];
            if (r % 2) p[n / 2][n % 2 * 2 + r / 2] = pack_two<T>(s[n][r - 1], s[n][r]);
        }
    wgmma_fence(sums, p);
    for (int k = 0; k < 4; ++k) wgmma_sums<T>(sums, p[k], of_v + k * 16 * 128 / 16);
    wgmma_commit();
    wgmma_wait<0>(sums);
    for (int n = 0; n < 16; ++n)
        for (int r = 0; r < 4; ++r) o[(row + r / 2 * 8) * 128 + n * 8 + column + r % 2] = sums[n][r];
}

// lanes that exchange: y = x rotated within each warp, and the votes for x > 0
__global__ void lanes(const float* x, float* y, unsigned* votes) {
    int i = threadIdx.x;
    float down = __shfl_down_sync(FULL_WARP, x[i], 1), first = __shfl_sync(FULL_WARP, x[i], 0);
    y[i] = i % 32 == 31 ? first : down;
    unsigned mine = __ballot_sync(FULL_WARP, x[i] > 0);
    if (i % 32 == 0) votes[i / 32] = mine;
}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "kernels.cu"
    path.write_text(KERNELS)
    products = [f"product<{t}, {b}>" for t in TYPES for b in ("true", "false")]
    products += [f"of_four_warps<{t}>" for t in TYPES]
    source = cuda.Source("kernels.cu", dict.fromkeys(["through", *products, "all_but_own", "copied", "lanes"], 64))
    source.path = path
    prepare(source, source.instances)
    return source


def launch(source, *call, order="forward", edits=(), **options):
    with on_cpu(Cpu(order, {"kernels.cu": edits})):
        source.launch(*call, **options)


orders = pytest.mark.parametrize("order", ["forward", "reversed", 7])


def test_every_sixteen_bit_number_and_the_roundings_between(source):
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        x = np.concatenate([bits.view(t).astype(np.float32) for t in TYPES.values()])
        x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), (x + np.roll(x, 1)) / 2])
        expected = x.astype(ml_dtypes.bfloat16), x.astype(np.float16)
    out = [np.zeros(len(x), t) for t in TYPES.values()] + [np.zeros(len(x), np.float32) for _ in TYPES]
    launch(source, "through", 1, 128, (x, *out, np.int32(len(x))))
    for got, back, want in zip(out[:2], out[2:], expected, strict=True):
        assert np.array_equal(got.astype(np.float64), want.astype(np.float64), equal_nan=True)
        assert np.array_equal(back, want.astype(np.float32), equal_nan=True)


@orders
@pytest.mark.parametrize("transposed", ["true", "false"])
@pytest.mark.parametrize("name", TYPES)
def test_a_product_by_ldmatrix_and_mma(source, name, transposed, order):
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((16, 16)), rng.standard_normal((16, 8)), np.empty((16, 8), np.float32)
    a, b = a.astype(TYPES[name]), b.astype(TYPES[name])
    stored = b if transposed == "true" else np.ascontiguousarray(b.T)
    launch(source, f"product<{name}, {transposed}>", 1, 32, (a, stored, c), order=order, shared=768)
    assert np.abs(c - a.astype(np.float64) @ b.astype(np.float64)).max() < 2e-6


def by_four_warps(source, name, order="forward", edits=()):
    """The arrays of one launch: a, b, v, and what came out."""
    a, b, v = np.random.default_rng(2).standard_normal((3, 64, 128)).astype(TYPES[name])
    arrays = a, b, v, np.empty((64, 64), np.float32), np.empty((64, 128), np.float32)
    launch(source, f"of_four_warps<{name}>", 1, 128, arrays, order=order, edits=edits, shared=3 * 64 * 256)
    return arrays


@orders
@pytest.mark.parametrize("name", TYPES)
def test_products_by_four_warps(source, name, order):
    a, b, v, c, o = by_four_warps(source, name, order)
    assert np.abs(c - a.astype(np.float64) @ b.astype(np.float64).T).max() < 2e-5
    assert np.abs(o - c.astype(TYPES[name]).astype(np.float64) @ v.astype(np.float64)).max() < 2e-4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fence_proxy_async();", "", "no fence_proxy_async has shown to it"),
        ("    wgmma_fence();\n    for (int d", "    for (int d", "wgmma without a wgmma_fence before it"),
        ("    wgmma_fence(sums, p);\n    for (int k", "    for (int k", "wgmma without a wgmma_fence before it"),
        (
            "    wgmma_wait<0>(sums);\n    for (int n = 0; n < 16",
            "    for (int n = 0; n < 16",
            "that is never waited for",
        ),
        (
            "    wgmma_commit();\n    wgmma_wait<0>(sums);\n    for",
            "    wgmma_wait<0>(sums);\n    for",
            "that is never waited for",
        ),
        ("d < 8; ++d", "d < 8 - (t >= 96); ++d", "lanes or warps that ask for different wgmma"),
        ("k < 4; ++k) wgmma", "k < (t < 96 ? 4 : 3); ++k) wgmma", "that not all four warps ask for"),
        ("of_v + k", "of_v + t + k", "lanes or warps that ask for different wgmma"),
        (
            "wgmma_operand(tile + TILE, PANEL)",
            "wgmma_operand(tile + TILE + 128, PANEL)",
            "does not begin with the first",
        ),
        ("2 * TILE, PANEL)", "2 * TILE, 2 * PANEL)", "beyond the block's shared memory"),
    ],
)
def test_what_is_wrong_with_four_warps_is_told(source, old, new, message):
    with pytest.raises(RuntimeError, match=message):
        by_four_warps(source, "bf16", edits=[(old, new)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    wgmma_wait<0>(s);\n    const", "    const"),
        ("(chunk % 8 ^ row % 8)", "chunk % 8"),
        ("wgmma_operand(tile, PANEL)", "wgmma_operand(tile + PANEL, PANEL)"),
        ("2 * TILE, PANEL)", "2 * TILE, 0)"),
    ],
)
def test_what_is_wrong_with_four_warps_shows_in_a_result(source, old, new):
    right, wrong = by_four_warps(source, "bf16"), by_four_warps(source, "bf16", edits=[(old, new)])
    assert not np.array_equal(right[4], wrong[4])


@orders
def test_barriers_shuffles_and_copies(source, order):
    x = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    y, votes = np.empty(60, np.float32), np.zeros(2, np.uint32)
    launch(source, "all_but_own", 1, 64, (x[:60], y, np.int32(60)), order=order, shared=256)
    assert np.allclose(y, x[:60].sum(dtype=np.float64) - x[:60], atol=1e-5)
    y = np.empty(256, np.float32)
    launch(source, "copied", 1, 32, (x, y, np.int32(256)), order=order, shared=1024)
    assert np.array_equal(x, y)
    launch(source, "copied", 1, 32, (x[:64], y, np.int32(64)), order=order, shared=1024)  # the rest: zeros, not read
    assert np.array_equal(y, np.concatenate([x[:64], np.zeros(192)]))
    y = np.empty(64, np.float32)
    launch(source, "lanes", 1, 64, (x[:64], y, votes), order=order)
    assert np.array_equal(y, np.roll(x[:64].reshape(2, 32), -1, 1).reshape(-1))
    assert [bool(votes[i // 32] >> i % 32 & 1) for i in range(64)] == (x[:64] > 0).tolist()


def results_of(source, edits, shared=256):
    """all_but_own's and copied's results for both orders of the threads, with faults."""
    x = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    for order in ("forward", "reversed"):
        y, z = np.empty(64, np.float32), np.empty(256, np.float32)
        launch(source, "all_but_own", 1, 64, (x[:64], y, np.int32(64)), order=order, edits=edits, shared=shared)
        launch(source, "copied", 1, 32, (x, z, np.int32(256)), order=order, edits=edits, shared=4 * shared)
        yield np.allclose(y, x[:64].sum(dtype=np.float64) - x[:64], atol=1e-5) and np.array_equal(z, x)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x[i] : 0.f;\n    __syncthreads();", "x[i] : 0.f;"),
        ("cp_async_wait<1>();\n    __syncthreads();", "__syncthreads();"),
        ("cp_async_wait<0>();\n    __syncthreads();\n    for", "cp_async_wait<1>();\n    __syncthreads();\n    for"),
    ],
)
def test_what_is_missing_shows_in_a_result(source, old, new):
    assert all(results_of(source, ()))
    assert not all(results_of(source, [(old, new)]))


def test_a_missing_barrier_inside_a_shared_function_shows(source):
    x, y = np.ones(64, np.float32), np.empty(64, np.float32)
    fault = ("x;\n    __syncthreads();", "x;")  # of block_sum
    with on_cpu(Cpu(edits={"common.cuh": [fault]})):
        source.launch("all_but_own", 1, 64, (x, y, np.int32(64)), shared=256)
    assert not np.array_equal(y, np.full(64, 63.0))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x[i] : 0.f;\n    __sync", "x[i] : 0.f;\n    if (i < 32) __sync", "divergent barrier: threads wait at"),
        ("float* row", "if (threadIdx.x > 40) return;\n    float* row", "divergent barrier: has returned"),
        ("    row[i] =", "    row[i + 64] =", "memory outside of every array"),
        ("i < n) y[i]", "i <= n) y[i + 1]", "memory outside of every array|written before or behind"),
        ("float total =", "if (i < 16) __syncwarp();\n    float total =", "different instructions"),
        ("float total =", "if (i == 3) return;\n    float total =", "lanes of its warp that never come"),
    ],
)
def test_what_is_wrong_is_told(source, old, new, message):
    x, y = np.ones(64, np.float32), np.empty(64, np.float32)
    call = ("all_but_own", 1, 64, (x, y, np.int32(64)))
    with pytest.raises(RuntimeError, match=message):
        launch(source, *call, edits=[(old, new)], shared=256)


def test_arguments_are_checked(source):
    x, y = np.ones(64, np.float32), np.empty(64, np.float32)
    with pytest.raises(TypeError, match="argument 2 is int64, the kernel's parameter is int32"):
        launch(source, "all_but_own", 1, 64, (x, y, np.int64(64)), shared=256)
    with pytest.raises(TypeError, match=r"argument 0 is float64\*, the kernel's parameter is float32\*"):
        launch(source, "all_but_own", 1, 64, (x.astype(np.float64), y, np.int32(64)), shared=256)
    with pytest.raises(TypeError, match="takes 3 arguments, and got 2"):
        launch(source, "all_but_own", 1, 64, (x, y), shared=256)
    with pytest.raises(TypeError, match="argument 2 is 64; give its type"):
        launch(source, "all_but_own", 1, 64, (x, y, 64), shared=256)
    with pytest.raises(KeyError, match="has no instance 'all'"):
        launch(source, "all", 1, 64, (x, y, np.int32(64)))
    with pytest.raises(RuntimeError, match="whole warps"):
        launch(source, "all_but_own", 1, 65, (x, y, np.int32(64)), shared=256)
    with pytest.raises(ValueError, match="a fault is planted in one place"):
        launch(source, "all_but_own", 1, 64, (x, y, np.int32(64)), edits=[("nowhere", "")])


def test_views_of_one_memory_stay_one(source):
    """Two halves of an array as input and output: what lies between them is neither lost nor doubled."""
    both = np.arange(128, dtype=np.float32).reshape(2, 64)
    launch(source, "all_but_own", 1, 64, (both[0], both[1], np.int32(64)), shared=256)
    assert np.array_equal(both[0], np.arange(64)) and np.array_equal(both[1], 2016 - np.arange(64))
