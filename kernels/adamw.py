"""
AdamW (Loshchilov and Hutter 2019, alg. 2) in one pass over flat memory, in place, and the sum of squares that clipping
needs.

Contract
    p, m, v, g (n,) float32 or float64; step counts from 1; weight_decay 0 switches the decay off.
    g' = scale g                                  (scale: one over the loss scale, times the clipping factor)
    m  = beta1 m + (1 - beta1) g'                 v = beta2 v + (1 - beta2) g'^2
    p  = p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    scale is a number or an array of one element (which may be on the device, where nothing waits for it). If it is not
    finite, nothing is changed.
    schedule (3,) float32, beside p: what lr, weight_decay and step come to, as `schedule_of` makes it, instead of these
    three. So a CUDA graph, in which a number stays what it was when it was recorded, takes another one at every step.
    copy (n,) bfloat16, if there is one, becomes the new p, rounded.
    Returns (p, m, v), which are the arrays that came in. eps stands outside the root, as in PyTorch.
    sum_of_squares(x) returns the sum of x_i^2 as an array (1,), float64 for float64 and float32 for everything else:
    the squares in that dtype, and what is added up from many of them more exactly.

Rungs
    reference   the definition
    numba       one pass: 16 bytes read and 12 written per float32 parameter; squares in rows of 512
    cuda        the same pass, the copy within it; squares in two stages, in one order on any GPU (adamw.cu)
"""

import math

import numpy as np

from . import cuda
from .device import empty, upcast, xp_of
from .jit import contiguous, prange, prange_jit
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def schedule_of(lr, beta1, beta2, weight_decay, step):
    """(1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)), floats."""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)


def reference_inplace(
    p, m, v, g, *, beta1, beta2, eps, lr=None, weight_decay=None, step=None, scale=1.0, copy=None, schedule=None
):
    xp = xp_of(p)
    keep, rate, root = schedule_of(lr, beta1, beta2, weight_decay, step) if schedule is None else schedule
    scale = xp.asarray(scale, p.dtype).reshape(())
    finite = xp.isfinite(scale)
    g = g * xp.where(finite, scale, 0)
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    new_p = keep * p - rate * new_m / (xp.sqrt(new_v) * root + eps)
    for x, new in ((p, new_p), (m, new_m), (v, new_v)):
        x[...] = xp.where(finite, new, x)
    if copy is not None:
        copy[...] = xp.where(finite, p.astype(copy.dtype), copy)
    return p, m, v


def reference_sum_of_squares(x):
    wide = upcast(x)
    return (wide * wide).sum(dtype=np.float64).reshape(1).astype(wide.dtype)


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


def _check_flat(p, m, v, g, copy):
    if not all(x.flags.c_contiguous and x.shape == p.shape and x.dtype == p.dtype for x in (p, m, v, g)):
        raise ValueError("adamw_inplace needs p, m, v and g contiguous, of one shape and one dtype")
    if copy is not None and not (copy.flags.c_contiguous and copy.shape == p.shape and copy.dtype.name == "bfloat16"):
        raise ValueError("adamw_inplace needs a contiguous copy in bfloat16, of p's shape")


def numba_inplace(
    p, m, v, g, *, beta1, beta2, eps, lr=None, weight_decay=None, step=None, scale=1.0, copy=None, schedule=None
):
    _check_flat(p, m, v, g, copy)
    scale = np.asarray(scale, p.dtype).reshape(())
    if np.isfinite(scale):
        keep, rate, root = schedule_of(lr, beta1, beta2, weight_decay, step) if schedule is None else schedule
        constants = keep, rate, beta1, 1 - beta1, beta2, 1 - beta2, eps, root, scale
        _step(*(x.reshape(-1) for x in (p, m, v, g)), *map(p.dtype.type, constants))
        if copy is not None:
            copy[...] = p
    return p, m, v


_ROW = 512  # squares that are added up in x's dtype


@prange_jit
def _squares(x, sums):
    for row in prange(sums.size):
        total = x.dtype.type(0)
        for i in range(row * _ROW, min((row + 1) * _ROW, x.size)):
            total += x[i] * x[i]
        sums[row] = total


def numba_sum_of_squares(x):
    sums = empty(x, (-(-x.size // _ROW),))
    _squares(contiguous(x).reshape(-1), sums)
    return sums.sum(dtype=np.float64).reshape(1).astype(x.dtype)


# ------------------------------------------------------------------ cuda

_THREADS, _PACKS, _PARTS = 256, 2, 1024  # adamw.cu's THREADS and PACKS; parts of a sum of squares at most

_SOURCE = cuda.Source(
    "adamw.cu",
    {"step<4>": 64, "step<1>": 40, "add_parts": 24}
    | {f"squares<{t}, {n}>": 40 for t, widest in (("float", 4), ("bf16", 8), ("fp16", 8)) for n in (widest, 1)},
)


def _aligned(*arrays):
    """Whether 16-byte accesses fit flat arrays, and their share of them an array of smaller elements beside them."""
    widest = max(x.itemsize for x in arrays)
    return all(cuda.address(x) % (16 * x.itemsize // widest) == 0 for x in arrays)


def cuda_inplace(
    p, m, v, g, *, beta1, beta2, eps, lr=None, weight_decay=None, step=None, scale=1.0, copy=None, schedule=None
):
    _check_flat(p, m, v, g, copy)
    if p.dtype != np.float32:
        raise TypeError(f"adamw_inplace updates float32 on a GPU, and these parameters are {p.dtype}")
    on_device = None if isinstance(scale, int | float | np.generic) else cuda.contiguous(scale, np.float32)
    keep, rate, root = schedule_of(lr, beta1, beta2, weight_decay, step) if schedule is None else (0, 0, 0)
    constants = map(np.float32, (keep, rate, beta1, 1 - beta1, beta2, 1 - beta2, eps, root))
    number = np.float32(scale if on_device is None else 1)
    n = 4 if _aligned(p, m, v, g, *([] if copy is None else [copy])) else 1
    arguments = p, m, v, g, np.int64(p.size), *constants, number, on_device, schedule, copy
    _SOURCE.launch(f"step<{n}>", -(-p.size // (_THREADS * _PACKS * n)), _THREADS, arguments)
    return p, m, v


def cuda_sum_of_squares(x):
    x = cuda.contiguous(x)
    n = 16 // x.itemsize if _aligned(x) else 1
    parts = max(1, min(_PARTS, -(-x.size // (_THREADS * n * 4))))
    partial, total = empty(x, (parts,), np.float32), empty(x, (1,), np.float32)
    _SOURCE.launch(f"squares<{cuda.c_type(x)}, {n}>", parts, _THREADS, (x, np.int64(x.size), partial))
    _SOURCE.launch("add_parts", 1, 1024, (partial, np.int32(parts), total))
    return total


# ------------------------------------------------------------------ table


def _example(rng, size):
    sizes = {"large": 10_000_000, "gpu": 124_000_000}
    n = sizes[size] if size in sizes else int(rng.choice([1, 5, 67, _PIECE + 1]))
    p, m, v, g = rng.standard_normal((4, n))
    constants = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.5}
    return (p, m, v * v, g), {**constants, "step": int(rng.integers(1, 100))}


step_inplace = Kernel(
    "adamw_inplace",
    reference=reference_inplace,
    versions={"numba": numba_inplace, "cuda": cuda_inplace},
    example=_example,
)
sum_of_squares = Kernel(
    "sum_of_squares",
    reference=reference_sum_of_squares,
    versions={"numba": numba_sum_of_squares, "cuda": cuda_sum_of_squares},
    example=lambda rng, size: (_example(rng, size)[0][:1], {}),
)
