"""
AdamW (Loshchilov and Hutter 2019, alg. 2) in one pass over flat memory, in place, and the sum of squares that clipping
needs.

Contract
    p, m, v, g (n,) float32 or float64; step counts from 1; weight_decay 0 switches the decay off. The paper's alpha is
    1 here and its eta_t is lr: the decay is lr weight_decay, as in PyTorch. eps stands outside the root, as there.
    g' = scale g                                  (scale: one over the loss scale, times the clipping factor)
    m  = beta1 m + (1 - beta1) g'                 v = beta2 v + (1 - beta2) g'^2
    p  = p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    scale is a number or an array of one element (which may be on the device, where nothing waits for it). If it is not
    finite, nothing is changed.
    Returns (p, m, v), which are the arrays that came in.

    schedule (runs, 3), in p's dtype: keep = 1 - lr weight_decay, rate = lr / (1 - beta1^step) and
    root = 1 / sqrt(1 - beta2^step) of each run of neighbouring parameters (schedule_for: of one run). borders
    (runs - 1,) int64: where each run but the first begins; None where there is one run.
    advance_inplace(schedule, rates, steps, scale) writes the schedule of the next update, number steps + 1, and counts
    it where the scale is finite: rates (runs, 2) float64, lr and weight_decay of each run; steps (1,) int32; scale
    (1,). All that changes between updates is in memory, which a CUDA graph needs (a recorded Python number stays
    fixed), and an update that is left out is not counted, however late anybody learns of it.

    sum_of_squares(x) returns the sum of x_i^2 as an array (1,), float64 for float64 and float32 for everything else:
    the squares in that dtype, and what is added up from many of them more exactly.

Rungs
    reference   the definition
    numba       one pass: 16 bytes read and 12 written per float32 parameter; squares in rows of 512, by NumPy, which is
                faster at them; the schedule's few numbers in plain Python
    cuda        the same pass, one launch for all runs; squares in two stages, in one order on any GPU (adamw.cu)
"""

import math
from itertools import pairwise

import numpy as np

from . import cuda
from .device import address, empty, upcast, xp_of
from .jit import contiguous, prange, prange_jit
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def schedule_of(lr, beta1, beta2, weight_decay, step):
    """(1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)), floats."""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)


def reference_advance_inplace(schedule, rates, steps, scale, *, beta1, beta2):
    xp, step = xp_of(schedule), steps + 1
    lr, weight_decay = rates.astype(np.float64).T
    schedule[:, 0] = 1 - lr * weight_decay
    schedule[:, 1] = lr / (1 - beta1**step)
    schedule[:, 2] = 1 / xp.sqrt(1 - beta2**step)
    steps += xp.isfinite(scale)
    return schedule


def schedule_for(p, lr, beta1, beta2, weight_decay, step):
    """`schedule_of` as the schedule (1, 3) of p as one run, beside it and in its dtype."""
    return xp_of(p).asarray(np.array([schedule_of(lr, beta1, beta2, weight_decay, step)], p.dtype))


def reference_inplace(p, m, v, g, schedule, borders=None, *, beta1, beta2, eps, scale=1.0):
    xp = xp_of(p)
    of_each = schedule if borders is None else schedule[xp.searchsorted(borders, xp.arange(p.size), "right")]
    keep, rate, root = of_each.T
    scale = xp.asarray(scale, p.dtype).reshape(())
    finite = xp.isfinite(scale)
    g = g * xp.where(finite, scale, 0)
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    new_p = keep * p - rate * new_m / (xp.sqrt(new_v) * root + eps)
    for x, new in ((p, new_p), (m, new_m), (v, new_v)):
        x[...] = xp.where(finite, new, x)
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


def _check_flat(p, m, v, g):
    if not all(x.flags.c_contiguous and x.shape == p.shape and x.dtype == p.dtype for x in (p, m, v, g)):
        raise ValueError("adamw_inplace needs p, m, v and g contiguous, of one shape and one dtype")


def numba_inplace(p, m, v, g, schedule, borders=None, *, beta1, beta2, eps, scale=1.0):
    _check_flat(p, m, v, g)
    scale = np.asarray(scale, p.dtype).reshape(())
    if np.isfinite(scale):
        *betas, eps = map(p.dtype.type, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
        ends = pairwise([0, *([] if borders is None else borders.tolist()), p.size])
        for (keep, rate, root), (begin, end) in zip(contiguous(schedule, p.dtype), ends, strict=True):
            arrays = (x.reshape(-1)[begin:end] for x in (p, m, v, g))
            _step(*arrays, keep, rate, *betas, eps, root, scale[()])
    return p, m, v


def _check_schedule(schedule, steps):
    if not (schedule.flags.c_contiguous and steps.flags.c_contiguous and steps.dtype == np.int32):
        raise ValueError("adamw_advance_inplace needs a contiguous schedule, and steps (1,) in int32")


def numba_advance_inplace(schedule, rates, steps, scale, *, beta1, beta2):
    _check_schedule(schedule, steps)
    step = int(steps[0]) + 1
    schedule[...] = [schedule_of(lr, beta1, beta2, decay, step) for lr, decay in rates.tolist()]
    steps += np.isfinite(scale)
    return schedule


_ROW = 512  # squares that are added up in x's dtype


def host_sum_of_squares(arrays):
    """The sum of squares over all these arrays on the host, a float. Rows of 512 are summed in the arrays' dtype, and
    the row sums in float64: the same bits for any number of threads, which a BLAS dot product does not promise."""
    total = 0.0
    for x in arrays:
        x = x.reshape(-1)
        whole = x.size // _ROW * _ROW
        for rows in (x[:whole].reshape(-1, _ROW), x[whole:].reshape(1, -1)):
            total += float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
    return total


def numba_sum_of_squares(x):  # without Numba: one thread of NumPy is faster than a kernel on all of them
    return np.array([host_sum_of_squares([contiguous(x)])], x.dtype)


# ------------------------------------------------------------------ cuda

_THREADS, _PACKS, _PARTS = 256, 2, 1024  # adamw.cu's THREADS and PACKS; parts of a sum of squares at most

_SOURCE = cuda.Source(
    "adamw.cu",
    {"step<4>": 64, "step<1>": 40, "add_parts": 24}
    | {f"advance<{t}>": 48 for t in cuda.C_TYPES.values()}
    | {f"squares<{t}, {n}>": 40 for t, widest in cuda.WIDEST.items() for n in (widest, 1)},
)


def _aligned(*arrays):
    """Whether 16-byte accesses fit flat arrays."""
    return all(address(x) % 16 == 0 for x in arrays)


def _on_device(scale, like):
    """A number or an array of one element as one in float32 beside `like`."""
    is_number = isinstance(scale, int | float | np.generic)
    return xp_of(like).full(1, scale, np.float32) if is_number else cuda.contiguous(scale, np.float32)


def cuda_inplace(p, m, v, g, schedule, borders=None, *, beta1, beta2, eps, scale=1.0):
    _check_flat(p, m, v, g)
    if p.dtype != np.float32:
        raise TypeError(f"adamw_inplace updates float32 on a GPU, and these parameters are {p.dtype}")
    schedule = cuda.contiguous(schedule, np.float32)
    borders = None if borders is None else cuda.contiguous(borders, np.int64)
    constants = map(np.float32, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
    n = 4 if _aligned(p, m, v, g) else 1
    arguments = p, m, v, g, np.int64(p.size), *constants, _on_device(scale, p), schedule, borders
    blocks = -(-p.size // (_THREADS * _PACKS * n))
    _SOURCE.launch(f"step<{n}>", blocks, _THREADS, (*arguments, np.int32(len(schedule))))
    return p, m, v


def cuda_advance_inplace(schedule, rates, steps, scale, *, beta1, beta2):
    _check_schedule(schedule, steps)
    rates, betas = cuda.contiguous(rates, np.float64), (np.float64(beta1), np.float64(beta2))
    arguments = rates, np.int32(len(rates)), *betas, _on_device(scale, schedule), steps, schedule
    _SOURCE.launch(f"advance<{cuda.c_type(schedule)}>", 1, 32, arguments)
    return schedule


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
    schedule = schedule_for(p, 3e-3, 0.9, 0.95, 0.1, int(rng.integers(1, 100)))
    return (p, m, v * v, g, schedule), {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "scale": 0.5}


def _advance_example(rng, size):
    runs = 50 if size in ("large", "gpu") else int(rng.integers(1, 70))
    rates, steps = rng.uniform(0, 0.1, (runs, 2)), np.array([int(rng.integers(0, 100))], np.int32)
    return (np.zeros((runs, 3)), rates, steps, np.ones(1)), {"beta1": 0.9, "beta2": 0.95}


step_inplace = Kernel(
    "adamw_inplace",
    reference=reference_inplace,
    versions={"numba": numba_inplace, "cuda": cuda_inplace},
    example=_example,
)
advance_inplace = Kernel(
    "adamw_advance_inplace",
    reference=reference_advance_inplace,
    versions={"numba": numba_advance_inplace, "cuda": cuda_advance_inplace},
    example=_advance_example,
)
sum_of_squares = Kernel(
    "sum_of_squares",
    reference=reference_sum_of_squares,
    versions={"numba": numba_sum_of_squares, "cuda": cuda_sum_of_squares},
    example=lambda rng, size: (_example(rng, size)[0][:1], {}),
)
