"""
LayerNorm (Ba, Kiros and Hinton 2016, eq. 4) and its gradient.

Contract
    x (..., D), weight and bias (D,);   u = mean_d x_d,  r = 1 / sqrt(mean_d (x_d - u)^2 + eps)  per row,
    y = weight n + bias   with   n = (x - u) r
    forward returns y, u and r (one number each per row);   backward(dy, x, weight, u, r) returns dx, dweight, dbias.

Derivation, with h = dy weight
    dx = r (h - mean_d(h) - n mean_d(h n))
    (the first mean comes from u, the second from r; n has mean 0 and so the two do not mix)
    dweight = sum over rows of dy n        dbias = sum over rows of dy

Rungs
    reference   the definition
    numba       blocks of 64 rows; dweight and dbias as one partial sum per block, added in order
    cuda        a row in the registers of a warp or a block; dweight and dbias as there (layer_norm.cu)
"""

import numpy as np

from . import cuda
from .device import empty, upcast, xp_of
from .jit import BLOCK, contiguous, prange, prange_jit, rows_of
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def reference_forward(x, weight, bias, eps):
    xp, wide = xp_of(x), upcast(x)
    u = wide.mean(-1, keepdims=True)
    r = 1 / xp.sqrt(((wide - u) ** 2).mean(-1, keepdims=True) + eps)
    return ((wide - u) * r * weight + bias).astype(x.dtype), u.reshape(-1), r.reshape(-1)


def reference_backward(dy, x, weight, u, r):
    wide, dy = upcast(x), upcast(dy)
    u, r = u.reshape(*x.shape[:-1], 1), r.reshape(*x.shape[:-1], 1)
    n, h = (wide - u) * r, dy * weight
    dx = r * (h - h.mean(-1, keepdims=True) - n * (h * n).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dy * n).sum(rows).astype(weight.dtype), dy.sum(rows).astype(weight.dtype)


# ------------------------------------------------------------------ numba


@prange_jit
def _forward(x, weight, bias, eps, y, u, r):
    N, D = x.shape
    one, share = x.dtype.type(1), x.dtype.type(1 / D)  # a division by the integer D would make the arithmetic float64
    for i in prange(N):
        row, to = x[i], y[i]
        total, squares = x.dtype.type(0), x.dtype.type(0)
        for d in range(D):
            total += row[d]
        mean = total * share
        for d in range(D):
            squares += (row[d] - mean) * (row[d] - mean)
        u[i], r[i] = mean, one / np.sqrt(squares * share + eps)
        for d in range(D):
            to[d] = (row[d] - mean) * r[i] * weight[d] + bias[d]


def numba_forward(x, weight, bias, eps):
    y, rows = empty(x, x.shape), rows_of(x)
    u, r = empty(x, (len(rows),)), empty(x, (len(rows),))
    weight, bias = contiguous(weight, x.dtype), contiguous(bias, x.dtype)
    _forward(rows, weight, bias, x.dtype.type(eps), y.reshape(rows.shape), u, r)
    return y, u, r


@prange_jit
def _backward(dy, x, weight, u, r, dx, partial_weight, partial_bias):
    N, D = x.shape
    share = x.dtype.type(1 / D)
    for block in prange(len(partial_weight)):
        dweight, dbias = partial_weight[block], partial_bias[block]
        dweight[:], dbias[:] = 0, 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, N)):
            from_, row, to, u_i, r_i = dy[i], x[i], dx[i], u[i], r[i]
            mean_h, mean_hn = x.dtype.type(0), x.dtype.type(0)
            for d in range(D):
                n, h = (row[d] - u_i) * r_i, from_[d] * weight[d]
                dweight[d] += from_[d] * n
                dbias[d] += from_[d]
                mean_h += h
                mean_hn += h * n
            mean_h, mean_hn = mean_h * share, mean_hn * share
            for d in range(D):
                n, h = (row[d] - u_i) * r_i, from_[d] * weight[d]
                to[d] = r_i * (h - mean_h - n * mean_hn)


def numba_backward(dy, x, weight, u, r):
    rows, dx = rows_of(x), empty(x, x.shape)
    blocks = (-(-len(rows) // BLOCK), x.shape[-1])
    dweight, dbias = empty(x, blocks), empty(x, blocks)
    weight_row = contiguous(weight, x.dtype)
    _backward(rows_of(dy), rows, weight_row, contiguous(u), contiguous(r), dx.reshape(rows.shape), dweight, dbias)
    return dx, dweight.sum(0).astype(weight.dtype), dbias.sum(0).astype(weight.dtype)


# ------------------------------------------------------------------ cuda

_PARTIAL = 264  # blocks of the backward at most: as many as an H200 runs at once; the same on any GPU

_SOURCE = cuda.Source(
    "layer_norm.cu", cuda.norm_instances({"forward": {32: 60, 256: 56}, "backward": {32: 200, 256: 128}})
)


def cuda_forward(x, weight, bias, eps):
    x, weight = cuda.contiguous(x), cuda.norm_weight(x, weight)
    bias = cuda.contiguous(bias, weight.dtype)
    N, D = x.size // x.shape[-1], x.shape[-1]
    y, u, r = empty(x, x.shape), empty(x, (N,), np.float32), empty(x, (N,), np.float32)
    instance, threads, rows = cuda.norm_plan("forward", x, weight, bias, y)
    arguments = x, weight, bias, np.int32(N), np.int32(D), np.float32(eps), y, u, r
    _SOURCE.launch(instance, -(-N // rows), threads, arguments)
    return y, u, r


def cuda_backward(dy, x, weight, u, r):
    x, dy, w = cuda.contiguous(x), cuda.contiguous(dy, x.dtype), cuda.norm_weight(x, weight)
    u, r, dx = cuda.contiguous(u, np.float32), cuda.contiguous(r, np.float32), empty(x, x.shape)
    N, D = r.size, x.shape[-1]
    instance, threads, rows = cuda.norm_plan("backward", x, w, dy, dx)
    blocks = min(-(-N // rows), _PARTIAL)
    partial, gradients = empty(x, (blocks, 2 * D), np.float32), empty(x, (2, D), w.dtype)
    arguments = dy, x, w, u, r, np.int32(N), np.int32(D), dx, partial
    _SOURCE.launch(instance, blocks, threads, arguments, shared=8 * rows * D if rows > 1 else 0)
    arguments = partial, np.int32(blocks), np.int32(D), gradients
    _SOURCE.launch(f"sum_partial<{cuda.c_type(w)}>", -(-2 * D // 32), 1024, arguments)
    return dx, *gradients.astype(weight.dtype, copy=False)


# ------------------------------------------------------------------ table


def _example(rng, size):
    if size in ("large", "gpu"):
        N, D = (8192, 512) if size == "large" else (65536, 768)
    else:
        N, D = int(rng.choice([1, 2, 5, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 1])), int(rng.choice([3, 7, 16, 67]))
    return (rng.standard_normal((N, D)), rng.standard_normal(D), rng.standard_normal(D), 1e-5), {}


def _backward_example(rng, size):
    (x, weight, _, _), _ = _example(rng, size)
    return (rng.standard_normal(x.shape), x, weight, None, None), {}


def _saved(dy, x, weight, u, r):
    return dy, x, weight, *forward(x, weight, weight, 1e-5)[1:]


forward = Kernel(
    "layer_norm_forward",
    reference=reference_forward,
    versions={"numba": numba_forward, "cuda": cuda_forward},
    example=_example,
)
backward = Kernel(
    "layer_norm_backward",
    reference=reference_backward,
    versions={"numba": numba_backward, "cuda": cuda_backward},
    example=_backward_example,
    saved=_saved,
)
