"""
RMSNorm (Zhang and Sennrich 2019, eq. 4) and its gradient.

Contract
    x (..., D), weight (D,);   r = 1 / sqrt(mean_d x_d^2 + eps)  per row,   y = weight x r
    forward returns y and r (one number per row);   backward(dy, x, weight, r) returns dx and dweight.

Derivation, with n = x r the normalised row and h = dy weight
    Where x moves by a small e, r moves by -r^3 (x . e) / D, and so the loss by  h . (r e - x r^3 (x . e) / D).
    That is dx . e for every e:    dx = r h - x r^3 (h . x) / D = r (h - n mean_d(h n))
    (the step that is not obvious: the mean comes from r, through which every x_d moves every y_d)
    dweight = sum over rows of dy n

Rungs
    reference   the definition
    numba       blocks of 64 rows; dweight as one partial sum per block, added in order
    cuda        a row in the registers of a warp or a block; dweight as there (rms_norm.cu)
"""

import math

import numpy as np

from . import cuda
from .device import empty, upcast, xp_of
from .jit import BLOCK, contiguous, jit, prange, prange_jit, rows_of
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def reference_forward(x, weight, eps):
    xp, wide = xp_of(x), upcast(x)
    r = 1 / xp.sqrt((wide * wide).mean(-1, keepdims=True) + eps)
    return (wide * r * weight).astype(x.dtype), r.reshape(-1)


def reference_backward(dy, x, weight, r):
    wide, dy = upcast(x), upcast(dy)
    r = r.reshape(*x.shape[:-1], 1)
    n, h = wide * r, dy * weight
    dx = r * (h - n * (h * n).mean(-1, keepdims=True))
    dweight = (dy * n).sum(tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


# ------------------------------------------------------------------ numba


@jit
def _sum_of_products(x, y):
    total = x.dtype.type(0)
    for d in range(x.size):
        total += x[d] * y[d]
    return total


@prange_jit
def _forward(x, weight, eps, y, r):
    N, D = x.shape
    one, share = x.dtype.type(1), x.dtype.type(1 / D)  # a division by the integer D would make the arithmetic float64
    for i in prange(N):
        row, to = x[i], y[i]
        r[i] = one / np.sqrt(_sum_of_products(row, row) * share + eps)
        for d in range(D):
            to[d] = row[d] * r[i] * weight[d]


def numba_forward(x, weight, eps):
    y, rows = empty(x, x.shape), rows_of(x)
    r = empty(x, (len(rows),))
    _forward(rows, contiguous(weight, x.dtype), x.dtype.type(eps), y.reshape(rows.shape), r)
    return y, r


@prange_jit
def _backward(dy, x, weight, r, dx, partial):
    N, D = x.shape
    share = x.dtype.type(1 / D)
    for block in prange(len(partial)):
        sums = partial[block]
        sums[:] = 0
        h = np.empty(D, x.dtype)
        for i in range(block * BLOCK, min((block + 1) * BLOCK, N)):
            from_, row, to, r_i = dy[i], x[i], dx[i], r[i]
            for d in range(D):
                sums[d] += from_[d] * row[d] * r_i
                h[d] = from_[d] * weight[d]
            shared = _sum_of_products(h, row) * r_i * r_i * share  # mean(h n) r, since n = row r
            for d in range(D):
                to[d] = r_i * (h[d] - row[d] * shared)


def numba_backward(dy, x, weight, r):
    rows, dx = rows_of(x), empty(x, x.shape)
    partial = empty(x, (-(-len(rows) // BLOCK), x.shape[-1]))
    _backward(rows_of(dy), rows, contiguous(weight, x.dtype), contiguous(r), dx.reshape(rows.shape), partial)
    return dx, partial.sum(0).astype(weight.dtype)


# ------------------------------------------------------------------ cuda

# Blocks of the backward at most, of 4 rows or of 1: as many as an H200 runs at once; the same on any GPU.
_PARTIAL = {4: 396, 1: 264}

_SOURCE = cuda.Source(
    "rms_norm.cu", cuda.norm_instances({"forward": {32: 56, 256: 56}, "backward": {32: 168, 256: 112}})
)


def cuda_forward(x, weight, eps):
    x, weight = cuda.contiguous(x), cuda.norm_weight(x, weight)
    y, D = empty(x, x.shape), x.shape[-1]
    r = empty(x, (math.prod(x.shape[:-1]),), np.float32)
    instance, threads, rows = cuda.norm_plan("forward", x, weight, y)
    arguments = x, weight, np.int32(r.size), np.int32(D), np.float32(eps), y, r
    _SOURCE.launch(instance, -(-r.size // rows), threads, arguments)
    return y, r


def cuda_backward(dy, x, weight, r):
    x, dy, w = cuda.contiguous(x), cuda.contiguous(dy, x.dtype), cuda.norm_weight(x, weight)
    dx, r, D = empty(x, x.shape), cuda.contiguous(r, np.float32), x.shape[-1]
    instance, threads, rows = cuda.norm_plan("backward", x, w, dy, dx)
    blocks = min(-(-r.size // rows), _PARTIAL[rows])
    partial, dweight = empty(x, (blocks, D), np.float32), empty(x, (D,), w.dtype)
    arguments = dy, x, w, r, np.int32(r.size), np.int32(D), dx, partial
    _SOURCE.launch(instance, blocks, threads, arguments, shared=4 * rows * D if rows > 1 else 0)
    arguments = partial, np.int32(blocks), np.int32(D), dweight
    _SOURCE.launch(f"sum_partial<{cuda.c_type(w)}>", -(-D // 32), 1024, arguments)
    return dx, dweight.astype(weight.dtype, copy=False)


# ------------------------------------------------------------------ table


def _example(rng, size):
    if size in ("large", "gpu"):
        N, D = (8192, 512) if size == "large" else (65536, 768)
    else:
        N, D = int(rng.choice([1, 2, 5, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 1])), int(rng.choice([3, 7, 16, 67]))
    return (rng.standard_normal((N, D)), rng.standard_normal(D), 1e-5), {}


def _backward_example(rng, size):
    (x, weight, _), _ = _example(rng, size)
    return (rng.standard_normal(x.shape), x, weight, None), {}


def _saved(dy, x, weight, r):
    return dy, x, weight, forward(x, weight, 1e-5)[1]


forward = Kernel(
    "rms_norm_forward",
    reference=reference_forward,
    versions={"numba": numba_forward, "cuda": cuda_forward},
    example=_example,
)
backward = Kernel(
    "rms_norm_backward",
    reference=reference_backward,
    versions={"numba": numba_backward, "cuda": cuda_backward},
    example=_backward_example,
    saved=_saved,
)
