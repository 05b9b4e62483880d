"""
Attention whose T x T matrix is never stored.

Contract
    q (B, Tq, H, D), k and v (B, Tk, Hk, D), Tq <= Tk, H a multiple of Hk; start (B, Tq) int32, not falling in a row.
    Query i stands at position i + Tk - Tq (so a cache of earlier keys needs nothing else) and sees
        start[b, i] <= j <= i + Tk - Tq:
    causal attention, packed documents, left padding and a sliding window, all in one integer per row.
    Head h reads key head h // (H / Hk).
        s_ij = scale q_i . k_j      p_ij = exp(s_ij - lse_i)      lse_i = log sum_j exp s_ij      o_i = sum_j p_ij v_j
    forward returns o (B, Tq, H, D) and lse (B, H, Tq). A row that sees no key has o = 0, lse = -inf and gradient 0.

Forward, a tile of keys at a time (FlashAttention: Dao et al. 2022, algorithm 1)
    m' = max(m, max_j s_j)   c = exp(m - m')   l' = c l + sum_j exp(s_j - m')   acc' = c acc + sum_j exp(s_j - m') v_j
    o = acc / l                lse = m + log l

Backward (Dao et al. 2022, appendix B): p is made again from q, k and lse.
    dv_j = sum_i p_ij do_i          dp_ij = do_i . v_j          ds_ij = p_ij (dp_ij - delta_i)
    delta_i = sum_j p_ij dp_ij = do_i . o_i         (the step that is not obvious: sum_j p_ij v_j is o_i, already there)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i, summed over the heads that share k_j
    Where Tq = Tk, Numba and CUDA write the three side by side, as q, k and v lie in a fused projection, whose gradient
    then needs no copy (device.joined).

Rungs
    reference   the definition, with the T x T matrix
    numba       64 x 64 tiles in the cache; the forward owns (b, h, query tile), the backward (b, key head): no sum is
                shared between threads, so the result is the same bits for any number of them
    numba_cuda  the same tiles for a GPU, in Python (numba_cuda.py)
    cuda        for a GPU in CUDA C++, on tensor cores for 16-bit floats (attention.cu, with rungs of its own);
                cuda_atomics is its backward in one pass, cuda_wgmma both with the instructions of Hopper alone
"""

import itertools
import math

import numpy as np

from . import cuda
from .device import empty, to_host, upcast, xp_of
from .jit import LANES, ROWS, contiguous, exp, jit, matmul_add, prange, prange_jit, row_max, strided
from .kernel import Kernel, numba_cuda

TILE = 64  # queries and keys per tile: two 64 x 64 float32 tiles and their operands fit in 64 KB

# ------------------------------------------------------------------ reference


def _visible(start, Tq, Tk):
    xp = xp_of(start)
    j, last = xp.arange(Tk), xp.arange(Tq) + (Tk - Tq)
    return ((start[:, :, None] <= j) & (j <= last[:, None]))[:, None]  # (B, 1, Tq, Tk)


def _probabilities(q, k, start, scale):
    """p and lse by the definition; k already has one head per query head."""
    xp = xp_of(q)
    s = scale * (q.transpose(0, 2, 1, 3) @ k.transpose(0, 2, 3, 1))  # (B, H, Tq, Tk)
    s = xp.where(_visible(start, q.shape[1], k.shape[1]), s, -xp.inf)
    m = s.max(-1, keepdims=True) if k.shape[1] else xp.full((*s.shape[:-1], 1), -xp.inf, s.dtype)
    sees_none = m == -xp.inf
    e = xp.exp(s - xp.where(sees_none, 0, m))
    total = e.sum(-1, keepdims=True)
    lse = xp.where(sees_none, -xp.inf, m + xp.log(xp.where(sees_none, 1, total)))
    return e / xp.where(sees_none, 1, total), lse[..., 0]


def reference_forward(q, k, v, start, scale):
    group = q.shape[2] // k.shape[2]
    full = [upcast(x) for x in (q, k, v)]
    full[1:] = [x.repeat(group, 2) for x in full[1:]]
    p, lse = _probabilities(full[0], full[1], start, scale)
    return (p @ full[2].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3).astype(q.dtype), lse


def reference_backward(do, q, k, v, o, lse, start, scale):
    B, Tk, Hk, D = k.shape
    group, dtype = q.shape[2] // Hk, q.dtype
    do, q, k, v = (upcast(x) for x in (do, q, k, v))
    k, v = k.repeat(group, 2), v.repeat(group, 2)
    p, _ = _probabilities(q, k, start, scale)
    do = do.transpose(0, 2, 1, 3)
    dp = do @ v.transpose(0, 2, 3, 1)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    dq = (ds @ k.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    dk = (ds.swapaxes(-1, -2) @ q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    dv = (p.swapaxes(-1, -2) @ do).transpose(0, 2, 1, 3)
    dk, dv = (x.reshape(B, Tk, Hk, group, D).sum(3) for x in (dk, dv))
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


def _gradients(q, k, dtype=None):
    """Memory for dq, dk and dv."""
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    if Tq != Tk:
        return empty(q, q.shape, dtype), empty(k, k.shape, dtype), empty(k, k.shape, dtype)
    together = empty(q, (B, Tq, H + 2 * Hk, D), dtype)
    return together[:, :, :H], together[:, :, H : H + Hk], together[:, :, H + Hk :]


# ------------------------------------------------------------------ numba


def _up(n, multiple):
    return -(-n // multiple) * multiple


@jit
def _copy_rows(tile, source, first, stride, rows, D, scale):
    """tile[r, :D] = scale * the row of `source` that starts at first + r stride. What lies beyond stays as it is."""
    for r in range(rows):
        to, at = tile[r], first + r * stride
        row = source[at : at + D]
        for d in range(D):
            to[d] = scale * row[d]


@jit
def _copy_transposed(tiles, source, first, stride, rows, D):
    """tiles[j // TILE, d, j % TILE] = element d of row j."""
    for j in range(rows):
        tile, column, at = tiles[j // TILE], j % TILE, first + j * stride
        row = source[at : at + D]
        for d in range(D):
            tile[d, column] = row[d]


@jit
def _bounds(start, b, i, shift, j0):
    """The columns [a, z) of the tile at key j0 that query i sees; empty if z <= a."""
    return max(start[b, i] - j0, 0), min(i + shift + 1 - j0, TILE)


@jit
def _exponentials(p, highest):
    """p = exp(p - highest) in place; returns the sum."""
    total = p.dtype.type(0)
    for j in range(TILE):
        p[j] = exp(p[j] - highest)
        total += p[j]
    return total


@prange_jit
def _forward(q, q_strides, k, k_strides, v, v_strides, start, scale, o, lse, kt, vp):
    B, Tq, H, D = o.shape
    Hk, Dp, Tk = kt.shape[1], kt.shape[3], vp.shape[2]
    shift = Tk - Tq
    query_tiles, one = -(-Tq // TILE), o.dtype.type(1)  # an integer 1 would make the arithmetic float64

    for task in prange(B * Hk):
        b, h = task // Hk, task % Hk
        _copy_transposed(kt[b, h], k, b * k_strides[0] + h * k_strides[2], k_strides[1], Tk, D)
        _copy_rows(vp[b, h], v, b * v_strides[0] + h * v_strides[2], v_strides[1], Tk, D, one)

    for task in prange(B * H * query_tiles):
        bh, rank = task // query_tiles, task % query_tiles
        b, h = bh // H, bh % H
        # long and short tiles alternate, so that threads that share one head get equal work
        i0 = (rank // 2 if rank % 2 else query_tiles - 1 - rank // 2) * TILE
        rows = min(TILE, Tq - i0)
        m = -(-rows // ROWS) * ROWS
        hk = h // (H // Hk)

        qs = np.zeros((TILE, Dp), o.dtype)
        _copy_rows(qs, q, b * q_strides[0] + i0 * q_strides[1] + h * q_strides[2], q_strides[1], rows, D, scale)
        s = np.empty((TILE, TILE), o.dtype)
        acc = np.zeros((TILE, Dp), o.dtype)
        top = np.full(TILE, -np.inf, o.dtype)
        total = np.zeros(TILE, o.dtype)

        for jt in range(start[b, i0] // TILE, (i0 + rows - 1 + shift) // TILE + 1):
            j0 = jt * TILE
            s[:m] = 0
            matmul_add(s, qs, kt[b, hk, jt], m, Dp, TILE)
            for r in range(rows):
                p, sums = s[r], acc[r]
                a, z = _bounds(start, b, i0 + r, shift, j0)
                if z <= a:
                    p[:] = 0
                    continue
                p[:a], p[z:] = -np.inf, -np.inf
                highest = max(row_max(p), top[r])
                correction = exp(top[r] - highest)
                top[r], total[r] = highest, total[r] * correction + _exponentials(p, highest)
                for d in range(Dp):
                    sums[d] *= correction
            matmul_add(acc, s, vp[b, hk, j0 : j0 + TILE], m, min(TILE, Tk - j0), Dp)

        for r in range(rows):
            inverse = one / total[r] if total[r] != 0 else total[r]
            to, sums = o[b, i0 + r, h], acc[r]
            for d in range(D):
                to[d] = sums[d] * inverse
            lse[b, h, i0 + r] = top[r] + np.log(total[r])


def numba_forward(q, k, v, start, scale):
    B, Tq, H, D = q.shape
    Tk, Hk = k.shape[1:3]
    Dp = _up(D, LANES)
    o, lse = empty(q, q.shape), empty(q, (B, H, Tq))
    kt = np.zeros((B, Hk, -(-Tk // TILE), Dp, TILE), q.dtype)
    vp = np.zeros((B, Hk, Tk, Dp), q.dtype)
    if o.size:
        _forward(*strided(q), *strided(k), *strided(v), contiguous(start), q.dtype.type(scale), o, lse, kt, vp)
    return o, lse


@prange_jit
def _backward(
    do, do_strides, q, q_strides, k, k_strides, v, v_strides, o, lse, start, scale,
    dq, dq_strides, dk, dk_strides, dv, dv_strides, Tk, Hk, Dp,
):  # fmt: skip
    B, Tq, H, D = o.shape
    shift = Tk - Tq
    key_tiles, one = -(-Tk // TILE), o.dtype.type(1)

    for task in prange(B * Hk):
        b, hk = task // Hk, task % Hk
        kt = np.zeros((key_tiles, Dp, TILE), o.dtype)
        vt = np.zeros((key_tiles, Dp, TILE), o.dtype)
        kp = np.zeros((key_tiles * TILE, Dp), o.dtype)
        k_first, v_first = b * k_strides[0] + hk * k_strides[2], b * v_strides[0] + hk * v_strides[2]
        _copy_transposed(kt, k, k_first, k_strides[1], Tk, D)
        _copy_transposed(vt, v, v_first, v_strides[1], Tk, D)
        _copy_rows(kp, k, k_first, k_strides[1], Tk, D, one)
        dk_sum, dv_sum = np.zeros((key_tiles * TILE, Dp), o.dtype), np.zeros((key_tiles * TILE, Dp), o.dtype)
        qs, dos, dq_sum = np.zeros((TILE, Dp), o.dtype), np.zeros((TILE, Dp), o.dtype), np.empty((TILE, Dp), o.dtype)
        p, ds = np.empty((TILE, TILE), o.dtype), np.empty((TILE, TILE), o.dtype)
        delta = np.empty(TILE, o.dtype)

        for h in range(hk * (H // Hk), (hk + 1) * (H // Hk)):
            for i0 in range(0, Tq, TILE):
                rows = min(TILE, Tq - i0)
                m = -(-rows // ROWS) * ROWS
                q_first = b * q_strides[0] + i0 * q_strides[1] + h * q_strides[2]
                do_first = b * do_strides[0] + i0 * do_strides[1] + h * do_strides[2]
                dq_sum[:] = 0
                _copy_rows(qs, q, q_first, q_strides[1], rows, D, scale)
                _copy_rows(dos, do, do_first, do_strides[1], rows, D, one)
                for r in range(rows):
                    of, total = o[b, i0 + r, h], o.dtype.type(0)
                    for d in range(D):
                        total += dos[r, d] * of[d]
                    delta[r] = total

                for jt in range(start[b, i0] // TILE, (i0 + rows - 1 + shift) // TILE + 1):
                    j0 = jt * TILE
                    p[:m], ds[:m] = 0, 0
                    matmul_add(p, qs, kt[jt], m, Dp, TILE)
                    matmul_add(ds, dos, vt[jt], m, Dp, TILE)
                    for r in range(rows):
                        pr, dsr = p[r], ds[r]
                        a, z = _bounds(start, b, i0 + r, shift, j0)
                        z = max(a, z)
                        for j in range(a, z):
                            pr[j] = exp(pr[j] - lse[b, h, i0 + r])
                            dsr[j] = pr[j] * (dsr[j] - delta[r])
                        pr[:a], dsr[:a], pr[z:], dsr[z:] = 0, 0, 0, 0
                    matmul_add(dv_sum[j0 : j0 + TILE], p.T, dos, TILE, rows, Dp)
                    matmul_add(dk_sum[j0 : j0 + TILE], ds.T, qs, TILE, rows, Dp)  # qs carries the scale
                    matmul_add(dq_sum, ds, kp[j0 : j0 + TILE], m, TILE, Dp)
                first = b * dq_strides[0] + i0 * dq_strides[1] + h * dq_strides[2]
                for r in range(rows):
                    at = first + r * dq_strides[1]
                    to = dq[at : at + D]
                    for d in range(D):
                        to[d] = scale * dq_sum[r, d]
        k_first, v_first = b * dk_strides[0] + hk * dk_strides[2], b * dv_strides[0] + hk * dv_strides[2]
        for j in range(Tk):
            k_at, v_at = k_first + j * dk_strides[1], v_first + j * dv_strides[1]
            to_k, to_v = dk[k_at : k_at + D], dv[v_at : v_at + D]
            for d in range(D):
                to_k[d], to_v[d] = dk_sum[j, d], dv_sum[j, d]


def numba_backward(do, q, k, v, o, lse, start, scale):
    dq, dk, dv = _gradients(q, k)
    if dq.size:
        Tk, Hk, D = k.shape[1:]
        flat, kept = (*strided(do), *strided(q), *strided(k), *strided(v)), map(contiguous, (o, lse, start))
        results = *strided(dq), *strided(dk), *strided(dv)
        _backward(*flat, *kept, q.dtype.type(scale), *results, Tk, Hk, _up(D, LANES))
    else:  # keys that no query sees
        dk[...], dv[...] = 0, 0
    return dq, dk, dv


# ------------------------------------------------------------------ cuda

# {kernel: {head size: (rows of the tile a block owns, rows of those it streams, warps, blocks at once, way)}}; a way is
# where a product finds the own rows (attention.cu: Way). Tiles grow until a thread's sums fill its registers, 255 where
# 8 warps are at work, 168 where 12 are, 128 where 16 are; a warp owns 32 rows where these fit, else 16.
TILES = {
    "forward": {
        32: (128, 64, 4, 2, "HELD"),
        64: (128, 64, 4, 2, "HELD"),
        96: (128, 32, 4, 2, "REREAD"),
        128: (128, 32, 4, 2, "REREAD"),
    },
    "queries": {
        32: (128, 64, 4, 2, "HELD"),
        64: (128, 32, 4, 2, "REREAD"),
        96: (64, 64, 4, 2, "REREAD"),
        128: (64, 64, 4, 2, "REREAD"),
    },
    "keys": {
        32: (128, 32, 4, 2, "HELD"),
        64: (128, 32, 4, 2, "REREAD"),
        96: (64, 32, 4, 2, "REREAD"),
        128: (64, 32, 4, 2, "REREAD"),
    },
    "one_pass": {
        32: (128, 32, 4, 2, "HELD"),
        64: (128, 32, 8, 1, "HELD"),
        96: (64, 32, 4, 2, "REREAD"),
        128: (128, 32, 8, 1, "REREAD"),
    },
}
# The same for float, where shared memory is the limit.
FLOAT_TILES = {
    "forward": dict.fromkeys((64, 128), (32, 32, 4, 2, "REREAD")),
    "queries": dict.fromkeys((64, 128), (32, 16, 4, 2, "REREAD")),
    "keys": dict.fromkeys((64, 128), (32, 16, 4, 2, "REREAD")),
}
# And for the instruction of four warps that Hopper has.
WGMMA_TILES = {
    "forward": {64: (128, 96, 8, 2, "WGMMA"), 128: (128, 48, 8, 2, "WGMMA")},
    "queries": {64: (64, 64, 4, 3, "WGMMA"), 128: (64, 64, 4, 2, "WGMMA")},
    "keys": {64: (64, 64, 4, 3, "WGMMA"), 128: (64, 64, 4, 2, "WGMMA")},
}
LOG2E = 1 / math.log(2)  # the kernels' exponents are of 2
PADDED = 128  # lse and delta of the backward are padded to a multiple of it, which tiles of queries have to divide


def _instance(kernel, ctype, Dp, tile):
    name = {"forward": "forward", "queries": "backward_queries"}.get(kernel, "backward_keys")
    numbers = [ctype, Dp, *tile]
    if name == "backward_keys":
        numbers.append(str(kernel == "one_pass").lower())
    return f"{name}<{', '.join(map(str, numbers))}>"


def source_of_tiles():
    """The Source whose instances have the tiles of the three tables."""
    instances = {f"rows_of_backward<{ctype}>": 40 for ctype in cuda.C_TYPES.values()} | {"ends": 40}
    for tables, ctypes in (((FLOAT_TILES,), ("float",)), ((TILES, WGMMA_TILES), ("bf16", "fp16"))):
        for ctype, tiles in itertools.product(ctypes, tables):
            for kernel, sizes in tiles.items():
                for Dp, tile in sizes.items():
                    *_, warps, blocks, _ = tile
                    instances[_instance(kernel, ctype, Dp, tile)] = {8: 255, 12: 168, 16: 128}[warps * blocks]
    return cuda.Source("attention.cu", instances, hopper=[i for i in instances if "WGMMA" in i])


SOURCE = source_of_tiles()


def _fits(q, scale):
    """Whether attention.cu can do it, or the reference has to. Its tiles are for heads of at most 128, and
    it takes the maximum of the scores before it multiplies by the scale, which must be positive for that."""
    cuda.c_type(q)  # TypeError: no float of the CUDA kernels
    return q.shape[3] <= max(TILES["forward"]) and scale > 0


def _working_dtype(q):
    """float32 for 16-bit heads whose size is no multiple of 8: tiles are loaded 16 bytes at a time."""
    return np.dtype(np.float32) if q.shape[3] * q.itemsize % 16 else q.dtype


def _view(x, dtype):
    """x, in this dtype and with rows that can be loaded, and its strides in elements; copied only if it must be."""
    whole = x.shape[-1] * dtype.itemsize % 16 == 0
    if x.dtype != dtype or x.strides[-1] != x.itemsize or (whole and not cuda.wide(x)):
        x = x.astype(dtype, order="C")
    return x, *(np.int64(s // x.itemsize) for s in x.strides[:3])


def _chosen(kernel, ctype, D, wgmma=False):
    """(instance, rows of the tile a block owns, threads, bytes of shared memory) for heads of size D."""
    tiles = (FLOAT_TILES if ctype == "float" else WGMMA_TILES if wgmma else TILES)[kernel]
    Dp = min(size for size in tiles if size >= D)
    own, streamed, warps, *_ = tiles[Dp]
    # as attention.cu lays it out: own tiles, two stages of two streamed tiles, and what a kernel has besides
    row = (Dp + 4) * 4 if ctype == "float" else Dp * 2
    shared = ((1 if kernel == "forward" else 2) * own + 4 * streamed) * row
    shared += 4 * streamed * 4 if kernel in ("keys", "one_pass") else 0
    shared += own * (streamed + 4) * 4 if ctype == "float" else 0
    shared += own * streamed * 2 if kernel == "one_pass" else 0
    return _instance(kernel, ctype, Dp, tiles[Dp]), own, warps * 32, shared


def _launch(kernel, heads, T, arguments, wgmma=False):
    """One of the three kernels, for `heads` heads in all batches and T rows of the side whose tiles blocks own."""
    instance, own, threads, shared = _chosen(kernel, cuda.c_type(arguments[0]), int(arguments[-1]), wgmma)
    SOURCE.launch(instance, (heads, -(-T // own)), threads, arguments, shared)


def cuda_forward(q, k, v, start, scale, wgmma=False):
    """wgmma=True: with the instruction that Hopper alone has, for 16-bit floats; others are not touched by it."""
    if not _fits(q, scale):
        return reference_forward(q, k, v, start, scale)
    (B, Tq, H, D), (Tk, Hk), dtype = q.shape, k.shape[1:3], _working_dtype(q)
    o, lse = empty(q, q.shape, dtype), empty(q, (B, H, Tq), np.float32)
    views = (*_view(q, dtype), *_view(k, dtype), *_view(v, dtype))
    sizes = map(np.int32, (Tq, Tk, H, Hk, D))
    start = cuda.contiguous(start, np.int32)
    _launch("forward", B * H, Tq, (*views, start, np.float32(scale * LOG2E), o, lse, *sizes), wgmma)
    return o.astype(q.dtype, copy=False), lse


def cuda_backward(do, q, k, v, o, lse, start, scale, deterministic=True, wgmma=False):
    """deterministic=False: the kernel that makes dk and dv adds to dq, too, with atomics. That is 5 products instead of
    7, and dq rounds another way each time. On tensor cores, where its tiles fit in shared memory; else nothing changes.
    wgmma=True: as in the forward; there is no such kernel with atomics.
    """
    if not _fits(q, scale):
        return reference_backward(do, q, k, v, o, lse, start, scale)
    (B, Tq, H, D), (Tk, Hk), dtype = q.shape, k.shape[1:3], _working_dtype(q)
    ctype = cuda.C_TYPES[dtype.name]
    one_pass = not deterministic and ctype != "float"
    one_pass = one_pass and _chosen("one_pass", ctype, D)[-1] <= cuda.backend.shared_limit()
    dq, dk, dv = _gradients(q, k, dtype)
    steps = np.int64(dq.strides[1] // dq.itemsize), np.int64(dk.strides[1] // dk.itemsize)  # from token to token
    start, scales = cuda.contiguous(start, np.int32), (np.float32(scale), np.float32(scale * LOG2E))
    do = _view(do, dtype)
    views = (*do, *_view(q, dtype), *_view(k, dtype), *_view(v, dtype))

    Tp = _up(Tq, PADDED)
    lse2, delta, end = (empty(q, s, t) for s, t in (((B, H, Tp), "f4"), ((B, H, Tp), "f4"), ((B, Tk), np.int32)))
    rows = (*do, *_view(o, dtype), cuda.contiguous(lse, np.float32), lse2, delta, *map(np.int32, (B, H, Tq, Tp, D)))
    SOURCE.launch(f"rows_of_backward<{ctype}>", -(-B * H * Tp // 32), 256, rows)
    SOURCE.launch("ends", -(-B * Tk // 256), 256, (start, end, *map(np.int32, (B, Tq, Tk))))

    sizes = tuple(map(np.int32, (Tq, Tp, Tk, H, Hk, D)))
    if one_pass:
        sums = empty(q, q.shape, np.float32)
        sums[...] = 0
        _launch("one_pass", B * Hk, Tk, (*views, lse2, delta, end, *scales, sums, dk, dv, steps[1], *sizes))
        dq[...] = sums
    else:
        _launch("queries", B * H, Tq, (*views, lse2, delta, start, *scales, dq, steps[0], *sizes), wgmma)
        _launch("keys", B * Hk, Tk, (*views, lse2, delta, end, *scales, None, dk, dv, steps[1], *sizes), wgmma)
    return tuple(x.astype(like.dtype, copy=False) for x, like in ((dq, q), (dk, k), (dv, v)))


# ------------------------------------------------------------------ table

# B, T, H and D of the timed examples; on a GPU 16 K tokens of width 2048, as FlashAttention's authors publish theirs.
_TIMED = {"large": (4, 512, 8, 64), "gpu": (16, 1024, 32, 64), "gpu, D = 128": (16, 1024, 16, 128)}


def _operations(q, k, start):
    """Multiplications and additions of the two products of a forward: of pairs that are seen alone."""
    last = np.arange(q.shape[1]) + k.shape[1] - q.shape[1]
    pairs = np.maximum(last + 1 - np.asarray(to_host(start), np.int64), 0).sum()
    return 4 * q.shape[2] * q.shape[3] * int(pairs)


def _example(rng, size):
    if size in _TIMED:
        B, Tq, H, D = _TIMED[size]
        Tk, Hk, start = Tq, H, np.zeros((B, Tq), np.int32)
    else:
        B, Hk, D = rng.integers(1, 3), rng.integers(1, 3), int(rng.choice([1, 2, 5, 16, 24, 33]))
        Tk = int(rng.choice([1, 2, 5, TILE - 1, TILE, TILE + 1, 2 * TILE + 3]))
        Tq, H = int(rng.integers(max(1, Tk - 3), Tk + 1) if rng.random() < 0.5 else rng.integers(1, Tk + 1)), Hk * 2
        # documents: every row starts at one of a few boundaries, some of them ahead of the query (it sees nothing)
        start = np.sort(rng.choice(rng.integers(0, Tk + 1, 3), (B, Tq)), -1).astype(np.int32)
    q, k, v = (rng.standard_normal(s) for s in ((B, Tq, H, D), (B, Tk, Hk, D), (B, Tk, Hk, D)))
    shift = 30 if size == "extreme" else 0  # scores of thousands that differ by little
    return q + shift, k + shift, v, start, 1 / math.sqrt(D)


def _backward_example(rng, size):
    q, k, v, start, scale = _example(rng, size)
    return (rng.standard_normal(q.shape), q, k, v, None, None, start, scale), {}


def _saved(do, q, k, v, o, lse, start, scale):
    return do, q, k, v, *forward(q, k, v, start, scale), start, scale


forward = Kernel(
    "attention_forward",
    reference=reference_forward,
    versions={
        "numba": numba_forward,
        "cuda": cuda_forward,
        "cuda_wgmma": lambda *arguments: cuda_forward(*arguments, wgmma=True),
        "numba_cuda": numba_cuda("attention_forward"),
    },
    example=lambda rng, size: (_example(rng, size), {}),
    operations=lambda q, k, v, start, scale: _operations(q, k, start),
)
backward = Kernel(
    "attention_backward",
    reference=reference_backward,
    versions={
        "numba": numba_backward,
        "cuda": cuda_backward,
        "cuda_atomics": lambda *arguments: cuda_backward(*arguments, deterministic=False),
        "cuda_wgmma": lambda *arguments: cuda_backward(*arguments, wgmma=True),
        "numba_cuda": numba_cuda("attention_backward"),
    },
    example=_backward_example,
    saved=_saved,
    # five products, as FlashAttention counts them, and not the seven of the two-pass version
    operations=lambda do, q, k, v, o, lse, start, scale: 5 * _operations(q, k, start) // 2,
)
