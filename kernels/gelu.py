"""
GELU (Hendrycks and Gimpel 2016), exact and in its tanh form, with its gradient.

Contract
    x of any shape, elementwise; approximate is "none" or "tanh".
    "none"   y = x Phi(x),  Phi(x) = erfc(-x / sqrt 2) / 2      (where Phi is small, 1 + erf would lose its digits)
    "tanh"   y = x (1 + tanh u) / 2 = x s(2u),  u = sqrt(2 / pi) (x + 0.044715 x^3),  s the logistic function
    forward(x, approximate) = y;   backward(dy, x, approximate) = dx

Derivation
    "none"   y' = Phi + x phi,  phi(x) = e^(-x^2 / 2) / sqrt(2 pi)
    "tanh"   y' = s + x s (1 - s) 2u',  u' = sqrt(2 / pi) (1 + 3 0.044715 x^2)
    (1 + tanh u = 2 s(2u) has no cancellation for large negative u and needs one exp; 1 - s is computed as s(-2u))

Rungs
    reference   the definition
    numba       blocks of the flat array on all threads; "none" calls libm's erfc for each element
    cuda        one pass in 16-byte accesses (gelu.cu)
"""

import math

import numpy as np

from . import cuda
from .device import empty, erfc, upcast, xp_of
from .jit import contiguous, exp, jit, prange, prange_jit
from .kernel import Kernel

_ROOT, _CUBE = math.sqrt(2 / math.pi), 0.044715

# ------------------------------------------------------------------ reference


def _check(approximate):
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")


def reference_forward(x, approximate):
    _check(approximate)
    xp, wide = xp_of(x), upcast(x)
    if approximate == "none":
        y = wide * erfc(-wide / math.sqrt(2)) / 2
    else:
        y = wide * (1 + xp.tanh(_ROOT * (wide + _CUBE * wide**3))) / 2
    return y.astype(x.dtype)


def reference_backward(dy, x, approximate):
    _check(approximate)
    xp, wide = xp_of(x), upcast(x)
    if approximate == "none":
        slope = erfc(-wide / math.sqrt(2)) / 2 + wide * xp.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    else:
        t = xp.tanh(_ROOT * (wide + _CUBE * wide**3))
        slope = (1 + t) / 2 + wide * (1 - t * t) / 2 * _ROOT * (1 + 3 * _CUBE * wide * wide)
    return (upcast(dy) * slope).astype(x.dtype)


# ------------------------------------------------------------------ numba

_PIECE = 4096  # elements per task


@jit
def _logistic(x):
    """s(2u) and s(-2u)."""
    T = type(x)
    u2 = T(2 * _ROOT) * x * (T(1) + T(_CUBE) * x * x)
    e = exp(-abs(u2))
    large, small = T(1) / (T(1) + e), e / (T(1) + e)
    return (large, small) if u2 >= 0 else (small, large)


@prange_jit
def _forward(x, tanh, y):
    half, root_half = x.dtype.type(0.5), x.dtype.type(math.sqrt(0.5))
    for piece in prange(-(-x.size // _PIECE)):
        for i in range(piece * _PIECE, min((piece + 1) * _PIECE, x.size)):
            if tanh:
                y[i] = x[i] * _logistic(x[i])[0]
            else:
                y[i] = x[i] * half * math.erfc(-x[i] * root_half)


@prange_jit
def _backward(dy, x, tanh, dx):
    one, half, root_half = x.dtype.type(1), x.dtype.type(0.5), x.dtype.type(math.sqrt(0.5))
    density = x.dtype.type(1 / math.sqrt(2 * math.pi))
    slope0, slope2 = x.dtype.type(2 * _ROOT), x.dtype.type(6 * _ROOT * _CUBE)  # 2u' = slope0 + slope2 x^2
    for piece in prange(-(-x.size // _PIECE)):
        for i in range(piece * _PIECE, min((piece + 1) * _PIECE, x.size)):
            if tanh:
                s, rest = _logistic(x[i])
                dx[i] = dy[i] * s * (one + x[i] * rest * (slope0 + slope2 * x[i] * x[i]))
            else:
                phi = exp(-half * x[i] * x[i]) * density
                dx[i] = dy[i] * (half * math.erfc(-x[i] * root_half) + x[i] * phi)


def numba_forward(x, approximate):
    _check(approximate)
    y = empty(x, x.shape)
    _forward(contiguous(x).reshape(-1), approximate == "tanh", y.reshape(-1))
    return y


def numba_backward(dy, x, approximate):
    _check(approximate)
    dx = empty(x, x.shape)
    flat = contiguous(dy).reshape(-1), contiguous(x).reshape(-1)
    _backward(*flat, approximate == "tanh", dx.reshape(-1))
    return dx


# ------------------------------------------------------------------ cuda

_THREADS, _LOADS = 256, {"forward": 4, "backward": 3}  # as in gelu.cu

_SOURCE = cuda.Source(
    "gelu.cu",
    {
        f"{kernel}<{c_type}, {n}, {tanh}>": 24 if n == 1 else 60
        for kernel in _LOADS
        for c_type, widest in cuda.WIDEST.items()
        for n in (widest, 1)
        for tanh in ("true", "false")
    },
)


def _launch(kernel, approximate, *inputs):
    _check(approximate)
    inputs = [cuda.contiguous(x, inputs[-1].dtype) for x in inputs]
    out = empty(inputs[-1], inputs[-1].shape)
    flat = [x.reshape(-1) for x in (*inputs, out)]
    n = 16 // out.itemsize if cuda.wide(*flat) else 1
    instance = f"{kernel}<{cuda.c_type(out)}, {n}, {'true' if approximate == 'tanh' else 'false'}>"
    blocks = -(-out.size // (_THREADS * _LOADS[kernel] * n))
    _SOURCE.launch(instance, blocks, _THREADS, (*flat[:-1], np.int64(out.size), flat[-1]))
    return out


def cuda_forward(x, approximate):
    return _launch("forward", approximate, x)


def cuda_backward(dy, x, approximate):
    return _launch("backward", approximate, dy, x)


# ------------------------------------------------------------------ table


def _example(arrays):
    def example(rng, size):
        sizes = {"large": (4096, 1408), "gpu": (32768, 3072)}
        shape = sizes.get(size) or (int(rng.choice([1, 2, 5, 67])), int(rng.choice([1, 7, 16, 67])))
        spread = 8 if size == "extreme" else 1
        arguments = [rng.standard_normal(shape) * spread for _ in range(arrays)]
        return (*arguments, "tanh" if size in sizes else str(rng.choice(["none", "tanh"]))), {}

    return example


forward = Kernel(
    "gelu_forward",
    reference=reference_forward,
    versions={"numba": numba_forward, "cuda": cuda_forward},
    example=_example(1),
)
backward = Kernel(
    "gelu_backward",
    reference=reference_backward,
    versions={"numba": numba_backward, "cuda": cuda_backward},
    example=_example(2),
)
