"""
Rotary position embedding (Su et al. 2021, eq. 34), in the half-split pairing of Hugging Face checkpoints.

Contract
    x (B, T, H, D) with D even; cos and sin (T, D/2), row t holding the angles of x[:, t]; way 1 or -1.
    Element d < D/2 and its partner d + D/2 are turned together by the angle of (t, d), of the first `heads` heads:
        y_d = x_d cos - x_(d+D/2) sin        y_(d+D/2) = x_(d+D/2) cos + x_d sin        (sin times `way`)
    The other heads are copied: so q|k|v is turned as it comes from its projection, v being left as it is.

Derivation
    A rotation's transpose is the rotation by the opposite angle, so the gradient is the same kernel the other way.

Rungs
    reference   the definition
    numba       one task per (b, t): its angles are read once for all heads
    cuda        the same in 16-byte accesses, x being read where it lies (rope.cu)
"""

import numpy as np

from . import cuda
from .device import concatenate, empty, upcast
from .jit import contiguous, prange, prange_jit, strided
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def reference_rope(x, cos, sin, heads, way):
    half = x.shape[-1] // 2
    cos, sin, wide = cos[:, None], way * sin[:, None], upcast(x[:, :, :heads])
    a, b = wide[..., :half], wide[..., half:]
    turned = concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return concatenate([turned, x[:, :, heads:]], 2)


# ------------------------------------------------------------------ numba


@prange_jit
def _rope(x, x_strides, cos, sin, heads, y):
    B, T, H, D = y.shape
    half = D // 2
    for task in prange(B * T):
        b, t = task // T, task % T
        c, s = cos[t], sin[t]
        for h in range(heads):
            first = b * x_strides[0] + t * x_strides[1] + h * x_strides[2]
            low, high = x[first : first + half], x[first + half : first + D]
            to_low, to_high = y[b, t, h, :half], y[b, t, h, half:]
            for d in range(half):
                to_low[d] = low[d] * c[d] - high[d] * s[d]
                to_high[d] = high[d] * c[d] + low[d] * s[d]
        for h in range(heads, H):
            first = b * x_strides[0] + t * x_strides[1] + h * x_strides[2]
            row, to = x[first : first + D], y[b, t, h]
            for d in range(D):
                to[d] = row[d]


def numba_rope(x, cos, sin, heads, way):
    y = empty(x, x.shape)
    _rope(*strided(x), contiguous(cos, x.dtype), contiguous(sin if way == 1 else -sin, x.dtype), heads, y)
    return y


# ------------------------------------------------------------------ cuda

_ACCESSES = 512  # to each half of its heads by one block: 2 by each of its 256 threads

_SOURCE = cuda.Source(
    "rope.cu",
    {f"rotate<{c_type}, {n}>": 32 if n == 1 else 64 for c_type, widest in cuda.WIDEST.items() for n in (widest, 1)},
)


def cuda_rope(x, cos, sin, heads, way):
    B, T, H, D = x.shape
    if x.strides[-1] != x.itemsize:
        x = cuda.contiguous(x)
    y, half = empty(x, x.shape), D // 2
    cos, sin = cuda.contiguous(cos, np.float32), cuda.contiguous(sin, np.float32)
    n = 16 // x.itemsize if half * x.itemsize % 16 == 0 and cuda.wide(x, y, cos, sin) else 1
    tokens = max(1, _ACCESSES * n // max(H * half, 1))
    strides = (np.int64(s // x.itemsize) for s in x.strides[:-1])
    sizes = (np.int32(size) for size in (tokens, B * T, T, H, heads, half))
    arguments = x, *strides, cos, sin, np.float32(way), *sizes, y
    _SOURCE.launch(f"rotate<{cuda.c_type(x)}, {n}>", -(-B * T // tokens), 256, arguments)
    return y


# ------------------------------------------------------------------ table


def _example(rng, size):
    if size in ("large", "gpu"):
        B, T, H, D = (8, 512, 8, 64) if size == "large" else (32, 1024, 36, 64)
        heads, way = H if size == "large" else 24, 1
    else:
        B, T, H, D = (int(rng.choice(n)) for n in ([1, 2, 3], [1, 2, 5, 67], [1, 3], [2, 6, 16, 34]))
        heads, way = int(rng.integers(0, H + 1)), int(rng.choice([1, -1]))
    angles = rng.uniform(0, 100, (T, D // 2))
    return (rng.standard_normal((B, T, H, D)), np.cos(angles), np.sin(angles), heads, way), {}


rotate = Kernel(
    "rope",
    reference=reference_rope,
    versions={"numba": numba_rope, "cuda": cuda_rope},
    example=_example,
)
