"""
AdamW (Loshchilov and Hutter 2019, alg. 2) in one pass over flat memory, in place.

Contract
    p, m, v, g (n,) float32 or float64; step counts from 1; weight_decay 0 switches the decay off.
    g' = scale g                                  (scale: one over the loss scale, times the clipping factor)
    m  = beta1 m + (1 - beta1) g'                 v = beta2 v + (1 - beta2) g'^2
    p  = p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    Returns (p, m, v), which are the arrays that came in. eps stands outside the root, as in PyTorch.
    On a GPU step and scale may be arrays () in float64, whose values nobody has waited for; where scale is NaN, p, m
    and v stay as they are.

Rungs
    reference   the definition
    numba       one pass: 16 bytes read and 12 written per float32 parameter
"""

import math

import numpy as np

from .device import xp_of
from .jit import prange, prange_jit
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def reference_inplace(p, m, v, g, *, lr, beta1, beta2, eps, weight_decay, step, scale=1.0):
    xp, rest1, rest2 = xp_of(p), 1 - beta1**step, 1 - beta2**step
    if not isinstance(scale, int | float):
        left_out, before = xp.isnan(scale), [x.copy() for x in (p, m, v)]
        # in the parameters' dtype, as a Python number would be
        rest1, rest2, scale = (xp.asarray(x).astype(p.dtype) for x in (rest1, rest2, scale))
    g = g * scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / rest1, v / rest2
    p[...] = p - lr * weight_decay * p - lr * m_hat / (xp.sqrt(v_hat) + eps)
    if not isinstance(scale, int | float):
        for x, old in zip((p, m, v), before, strict=True):
            x[...] = xp.where(left_out, old, x)
    return p, m, v


# ------------------------------------------------------------------ numba

_PIECE = 16384  # elements per task


@prange_jit
def _step(p, m, v, g, keep, rate, beta1, rest1, beta2, rest2, eps, root, scale):
    for piece in prange(-(-p.size // _PIECE)):
        for i in range(piece * _PIECE, min((piece + 1) * _PIECE, p.size)):
            g_i = g[i] * scale
            m_i = beta1 * m[i] + rest1 * g_i
            v_i = beta2 * v[i] + rest2 * g_i * g_i
            m[i], v[i] = m_i, v_i
            p[i] = keep * p[i] - rate * m_i / (np.sqrt(v_i) * root + eps)


def numba_inplace(p, m, v, g, *, lr, beta1, beta2, eps, weight_decay, step, scale=1.0):
    if not all(x.flags.c_contiguous and x.shape == p.shape and x.dtype == p.dtype for x in (p, m, v, g)):
        raise ValueError("adamw_inplace needs p, m, v and g contiguous, of one shape and one dtype")
    constants = (1 - lr * weight_decay, lr / (1 - beta1**step), beta1, 1 - beta1, beta2, 1 - beta2, eps)
    constants = [p.dtype.type(c) for c in (*constants, 1 / math.sqrt(1 - beta2**step), scale)]
    _step(*(x.reshape(-1) for x in (p, m, v, g)), *constants)
    return p, m, v


# ------------------------------------------------------------------ table


def _example(rng, size):
    n = 10_000_000 if size == "large" else int(rng.choice([1, 5, 67, _PIECE + 1]))
    p, m, v, g = rng.standard_normal((4, n))
    constants = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.5}
    return (p, m, v * v, g), {**constants, "step": int(rng.integers(1, 100))}


step_inplace = Kernel(
    "adamw_inplace",
    reference=reference_inplace,
    versions={"numba": numba_inplace},
    example=_example,
)
