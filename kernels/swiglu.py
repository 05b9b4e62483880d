"""
SiLU, and SwiGLU's product of a gate and a value (Shazeer 2020, eq. 6), with their gradients.

Contract
    silu(x) = x s(x),  s(x) = 1 / (1 + e^-x);      swiglu(gate, up) = silu(gate) up;      shapes (..., F), elementwise
    silu_backward(dy, x) = dx;      backward(dy, gate, up) = (dgate, dup)

Derivation
    s' = s (1 - s)        silu' = s + x s (1 - s) = s (1 + x (1 - s))
    dgate = dy up silu'(gate)        dup = dy silu(gate)        (s is made again: cheaper than keeping it)
    The fast versions write the two side by side, as gate and up lie in a fused projection, whose gradient then needs no
    copy (device.joined).

Rungs
    reference   the definition, with e^-|x| so that nothing overflows
    numba       one pass per row with the vectorised exp; rows may be halves of a fused gate|up projection
    cuda        the same in 16-byte accesses (swiglu.cu)
"""

import math

import numpy as np

from . import cuda
from .device import empty, upcast, xp_of
from .jit import exp, jit, prange, prange_jit, strided
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def _sigmoid(x):
    xp = xp_of(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1, e) / (1 + e)


def reference_silu_forward(x):
    wide = upcast(x)
    return (wide * _sigmoid(wide)).astype(x.dtype)


def reference_silu_backward(dy, x):
    wide = upcast(x)
    s = _sigmoid(wide)
    return (upcast(dy) * (s + wide * s * (1 - s))).astype(x.dtype)


def reference_forward(gate, up):
    return (upcast(reference_silu_forward(upcast(gate))) * upcast(up)).astype(gate.dtype)


def reference_backward(dy, gate, up):
    wide = upcast(dy)
    dgate = reference_silu_backward(wide * upcast(up), upcast(gate))
    return dgate.astype(gate.dtype), (wide * reference_silu_forward(upcast(gate))).astype(up.dtype)


# ------------------------------------------------------------------ numba


@jit
def _s(x):
    one = type(x)(1)
    return one / (one + exp(-x))


@prange_jit
def _silu_forward(x, stride, y):
    N, F = y.shape
    for i in prange(N):
        row, to = x[i * stride : i * stride + F], y[i]
        for f in range(F):
            to[f] = row[f] * _s(row[f])


@prange_jit
def _silu_backward(dy, dy_stride, x, stride, dx):
    N, F = dx.shape
    one = dx.dtype.type(1)
    for i in prange(N):
        g, row, to = dy[i * dy_stride : i * dy_stride + F], x[i * stride : i * stride + F], dx[i]
        for f in range(F):
            s = _s(row[f])
            to[f] = g[f] * s * (one + row[f] * (one - s))


@prange_jit
def _forward(gate, gate_stride, up, up_stride, y):
    N, F = y.shape
    for i in prange(N):
        a, b, to = gate[i * gate_stride : i * gate_stride + F], up[i * up_stride : i * up_stride + F], y[i]
        for f in range(F):
            to[f] = a[f] * _s(a[f]) * b[f]


@prange_jit
def _backward(dy, dy_stride, gate, gate_stride, up, up_stride, both, N, F):
    one = both.dtype.type(1)
    for i in prange(N):
        g, first = dy[i * dy_stride : i * dy_stride + F], i * 2 * F
        to_gate, to_up = both[first : first + F], both[first + F : first + 2 * F]
        a, b = gate[i * gate_stride : i * gate_stride + F], up[i * up_stride : i * up_stride + F]
        for f in range(F):
            s = _s(a[f])
            gs = g[f] * s
            to_gate[f] = gs * b[f] * (one + a[f] * (one - s))
            to_up[f] = gs * a[f]


def _as_rows(x):
    """x as (rows, last axis), one number as one row. It is copied only where it has no such view."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)


def _rows(x):
    """(memory, row stride) of x seen as (rows, last axis)."""
    memory, (stride,) = strided(_as_rows(x))
    return memory, stride


def _new(x):
    """An output like x, and the same memory as (rows, last axis)."""
    y = empty(x, x.shape)
    return y, _as_rows(y)


def _new_pair(x):
    """Two outputs like x, side by side in an array (rows, 2 F), and that array."""
    F = x.shape[-1] if x.ndim else 1
    both = empty(x, (math.prod(x.shape[:-1]), 2 * F))
    return both[:, :F].reshape(x.shape), both[:, F:].reshape(x.shape), both


def numba_silu_forward(x):
    y, rows = _new(x)
    _silu_forward(*_rows(x), rows)
    return y


def numba_silu_backward(dy, x):
    dx, rows = _new(x)
    _silu_backward(*_rows(dy), *_rows(x), rows)
    return dx


def numba_forward(gate, up):
    y, rows = _new(gate)
    _forward(*_rows(gate), *_rows(up), rows)
    return y


def numba_backward(dy, gate, up):
    dgate, dup, both = _new_pair(gate)
    _backward(*_rows(dy), *_rows(gate), *_rows(up), both.reshape(-1), len(both), both.shape[1] // 2)
    return dgate, dup


# ------------------------------------------------------------------ cuda

_ACCESSES = 1024  # of each array by one block: 4 by each of its 256 threads

_SOURCE = cuda.Source(
    "swiglu.cu",
    {
        f"{kernel}<{c_type}, {n}>": 32 if n == 1 else 64
        for kernel in ("silu_forward", "silu_backward", "forward", "backward")
        for c_type, widest in cuda.WIDEST.items()
        for n in (widest, 1)
    },
)


def _cuda_rows(x, dtype):
    """x as (rows, last axis) in this dtype; a view, if the last axis is contiguous and the others are one stride."""
    rows = _as_rows(x)
    inside = rows.dtype == dtype and (rows.shape[1] <= 1 or rows.strides[1] == rows.itemsize)
    return rows if inside else cuda.contiguous(rows, dtype)


def _launch(kernel, inputs, *outputs):
    """inputs in any layout, outputs as (rows, last axis)."""
    rows = outputs[0]
    inputs = [_cuda_rows(x, rows.dtype) for x in inputs]
    (N, F), n = rows.shape, 16 // rows.itemsize if cuda.wide(*inputs, *outputs) else 1
    per_block = max(1, _ACCESSES * n // max(F, 1))
    strided = [a for x in inputs for a in (x, np.int64(x.strides[0] // x.itemsize))]
    arguments = *strided, np.int32(per_block), np.int32(N), np.int32(F), *outputs
    blocks = -(-N // per_block) if F else 0
    _SOURCE.launch(f"{kernel}<{cuda.c_type(rows)}, {n}>", blocks, 256, arguments)


def cuda_silu_forward(x):
    y, rows = _new(x)
    _launch("silu_forward", [x], rows)
    return y


def cuda_silu_backward(dy, x):
    dx, rows = _new(x)
    _launch("silu_backward", [dy, x], rows)
    return dx


def cuda_forward(gate, up):
    y, rows = _new(gate)
    _launch("forward", [gate, up], rows)
    return y


def cuda_backward(dy, gate, up):
    dgate, dup, both = _new_pair(gate)
    F = both.shape[1] // 2
    _launch("backward", [dy, gate, up], both[:, :F], both[:, F:])
    return dgate, dup


# ------------------------------------------------------------------ table


def _example(arrays):
    def example(rng, size):
        sizes = {"large": (4096, 1408), "gpu": (32768, 2048)}
        shape = sizes.get(size) or (int(rng.choice([1, 2, 5, 67])), int(rng.choice([1, 7, 16, 33])))
        spread = 30 if size == "extreme" else 1
        return tuple(spread * rng.standard_normal(shape) for _ in range(arrays)), {}

    return example


silu_forward = Kernel(
    "silu_forward",
    reference=reference_silu_forward,
    versions={"numba": numba_silu_forward, "cuda": cuda_silu_forward},
    example=_example(1),
)
silu_backward = Kernel(
    "silu_backward",
    reference=reference_silu_backward,
    versions={"numba": numba_silu_backward, "cuda": cuda_silu_backward},
    example=_example(2),
)
forward = Kernel(
    "swiglu_forward",
    reference=reference_forward,
    versions={"numba": numba_forward, "cuda": cuda_forward},
    example=_example(2),
)
backward = Kernel(
    "swiglu_backward",
    reference=reference_backward,
    versions={"numba": numba_backward, "cuda": cuda_backward},
    example=_example(3),
)
