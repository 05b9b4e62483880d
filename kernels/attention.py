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

Rungs
    reference   the definition, with the T x T matrix
    numba       64 x 64 tiles in the cache; the forward owns (b, h, query tile), the backward (b, key head): no sum is
                shared between threads, so the result is the same bits for any number of them
"""

import math

import numpy as np

from .device import empty, upcast, xp_of
from .jit import LANES, ROWS, contiguous, exp, jit, matmul_add, prange, prange_jit, row_max, strided
from .kernel import Kernel

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
    shift = vp.shape[2] - Tq
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
    kt = np.zeros((B, Hk, _up(Tk, TILE) // TILE, Dp, TILE), q.dtype)
    vp = np.zeros((B, Hk, Tk, Dp), q.dtype)
    if o.size:
        _forward(*strided(q), *strided(k), *strided(v), contiguous(start), q.dtype.type(scale), o, lse, kt, vp)
    return o, lse


@prange_jit
def _backward(do, do_strides, q, q_strides, k, k_strides, v, v_strides, o, lse, start, scale, dq, dk, dv, Dp):
    B, Tq, H, D = o.shape
    Tk, Hk = dk.shape[1], dk.shape[2]
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
                for r in range(rows):
                    to = dq[b, i0 + r, h]
                    for d in range(D):
                        to[d] = scale * dq_sum[r, d]
        for j in range(Tk):
            to_k, to_v = dk[b, j, hk], dv[b, j, hk]
            for d in range(D):
                to_k[d], to_v[d] = dk_sum[j, d], dv_sum[j, d]


def numba_backward(do, q, k, v, o, lse, start, scale):
    dq, dk, dv = empty(q, q.shape), empty(k, k.shape), empty(v, v.shape)
    if dq.size:
        Dp = _up(q.shape[3], LANES)
        flat = (*strided(do), *strided(q), *strided(k), *strided(v))
        _backward(*flat, *map(contiguous, (o, lse, start)), q.dtype.type(scale), dq, dk, dv, Dp)
    else:  # keys that no query sees
        dk[...], dv[...] = 0, 0
    return dq, dk, dv


# ------------------------------------------------------------------ table


def _example(rng, size):
    if size == "large":
        B, Tq, Tk, H, Hk, D = 4, 512, 512, 8, 8, 64
        start = np.zeros((B, Tq), np.int32)
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
    versions={"numba": numba_forward},
    example=lambda rng, size: (_example(rng, size), {}),
)
backward = Kernel(
    "attention_backward",
    reference=reference_backward,
    versions={"numba": numba_backward},
    example=_backward_example,
    saved=_saved,
)
