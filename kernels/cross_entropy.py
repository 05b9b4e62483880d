"""
Softmax cross-entropy and token log-probabilities: one pass of statistics, one pass of gradient.

Contract
    logits (N, V), targets (N,) int; m = max_j logits_j, x = scale (logits - m) <= 0, with scale = 1 / temperature > 0.
    forward returns, each (N,):
        m      log_total = log sum_j e^x_j      x_target      x_sum = sum_j x_j      x_mean = sum_j p_j x_j
    and everything else is arithmetic on N numbers, exact under a shift of the logits:
        log p_target = x_target - log_total                          cross-entropy = -log p_target
        log sum_j e^(scale logits_j) = scale m + log_total (z-loss)  mean_j log p_j = x_sum / V - log_total  (smoothing)
        entropy = log_total - x_mean
    backward takes four numbers a, b, c, d per row and returns dlogits = scale (p (a + b x) + c [j = target] + d).
    A row whose target is negative is ignored: its logits are not read, its statistics and its gradient are 0.
    fused_inplace does both at once where b is 0 and a = a0 + z lse_i (the z-loss's gradient needs the row's own
        lse_i = scale m + log_total):   it takes a0, z, c, d and returns (the gradient in place of the logits, m,
        log_total, x_target, x_sum), so that a row is read once.

Derivation
    With z = scale logits:  p_j = e^(x_j - log_total),  d log sum_k e^z_k / dz_j = p_j,  dz_target / dz_j = [j = target]
    d(log p_target) = [j = target] - p_j
    dH / dz_j = -p_j (log p_j + H) = -p_j (x_j - log_total + H)      (sum_j p_j dlog p_j = sum_j dp_j = 0)
    d(sum_k log p_k) / dz_j = 1 - V p_j
    Each is a multiple of p, of p x, of the one-hot and of 1, which is what a, b, c and d stand for.
    x_j = -inf has p_j = 0 and p_j x_j = 0 (the limit).

Rungs
    reference   the definition, on whole arrays
    numba       a row per task: a max, then one vectorised pass of exp; the gradient is one more pass
    numba_cuda  a row per block of a GPU, in Python (numba_cuda.py)
    cuda        a row per warp or block, the maximum and the sums in one pass; fused, the row waits in shared memory for
                its gradient (cross_entropy.cu)
"""

import functools

import numpy as np

from . import cuda
from .device import empty, upcast, xp_of
from .jit import contiguous, exp, jit, prange, prange_jit, row_max
from .kernel import Kernel, numba_cuda

# ------------------------------------------------------------------ reference


def _shifted(logits, targets, scale):
    """Which rows are used, their maxima and x; an ignored row reads as zeros."""
    xp = xp_of(logits)
    used = (targets >= 0)[:, None]
    wide = xp.where(used, upcast(logits), 0)
    m = wide.max(1, keepdims=True)
    return used[:, 0], m, (wide - m) * scale


def reference_forward(logits, targets, scale):
    xp = xp_of(logits)
    used, m, x = _shifted(logits, targets, scale)
    e = xp.exp(x)
    total = e.sum(1)
    x_target = xp.take_along_axis(x, xp.where(used, targets, 0)[:, None], 1)[:, 0]
    x_mean = (e * xp.where(e == 0, 0, x)).sum(1) / total
    rows = m[:, 0], xp.log(total), x_target, x.sum(1), x_mean
    return tuple(xp.where(used, r, 0).astype(x.dtype) for r in rows)


def reference_backward(logits, targets, m, log_total, a, b, c, d, scale):
    xp = xp_of(logits)
    used, _, x = _shifted(logits, targets, scale)
    e = xp.exp(x)
    p = e / e.sum(1, keepdims=True)
    px = p * xp.where(p == 0, 0, x)
    one_hot = xp.arange(logits.shape[1]) == targets[:, None]
    dz = a[:, None] * p + b[:, None] * px + c[:, None] * one_hot + d[:, None]
    return xp.where(used[:, None], scale * dz, 0).astype(logits.dtype)


def reference_backward_inplace(logits, *rows):
    logits[...] = reference_backward(logits, *rows)
    return logits


def reference_fused_inplace(logits, targets, a, z, c, d, scale):
    m, log_total, x_target, x_sum, _ = reference_forward(logits, targets, scale)
    rows = m, log_total, a + z * (scale * m + log_total), 0 * a, c, d
    return reference_backward_inplace(logits, targets, *rows, scale), m, log_total, x_target, x_sum


# ------------------------------------------------------------------ numba

_FLOOR = -1e30  # stands in for x = -inf in p x, where p is 0


@jit
def _statistics(row, target, scale, floor):
    m = row_max(row)
    total, x_sum, weighted = row.dtype.type(0), row.dtype.type(0), row.dtype.type(0)
    for j in range(row.size):
        x = (row[j] - m) * scale
        e = exp(x)
        total += e
        x_sum += x
        weighted += e * (x if x > floor else floor)
    return m, np.log(total), (row[target] - m) * scale, x_sum, weighted / total


@prange_jit
def _forward(logits, targets, scale, floor, m, log_total, x_target, x_sum, x_mean):
    for i in prange(targets.size):
        if targets[i] < 0:
            m[i], log_total[i], x_target[i], x_sum[i], x_mean[i] = 0, 0, 0, 0, 0
        else:
            m[i], log_total[i], x_target[i], x_sum[i], x_mean[i] = _statistics(logits[i], targets[i], scale, floor)


def numba_forward(logits, targets, scale):
    results = tuple(empty(logits, targets.shape) for _ in range(5))
    dtype = logits.dtype.type
    _forward(contiguous(logits), contiguous(targets), dtype(scale), dtype(_FLOOR), *results)
    return results


@functools.partial(jit, inline="always")  # so that LLVM sees where `to` is `row`, and vectorises that too: 4x
def _gradient_row(row, to, target, m, log_total, a, b, c, d, scale, floor):
    if target < 0:
        to[:] = 0
        return
    for j in range(row.size):
        x = (row[j] - m) * scale
        p = exp(x - log_total)
        to[j] = scale * (p * (a + b * (x if x > floor else floor)) + d)
    to[target] += scale * c


@prange_jit
def _backward(logits, targets, m, log_total, a, b, c, d, scale, floor, out):
    for i in prange(targets.size):
        row, to = logits[i], out[i]
        _gradient_row(row, to, targets[i], m[i], log_total[i], a[i], b[i], c[i], d[i], scale, floor)


@prange_jit
def _backward_inplace(logits, targets, m, log_total, a, b, c, d, scale, floor):
    for i in prange(targets.size):
        row = logits[i]
        _gradient_row(row, row, targets[i], m[i], log_total[i], a[i], b[i], c[i], d[i], scale, floor)


def _row_arguments(logits, targets, *rows, scale):
    dtype = logits.dtype.type
    return contiguous(targets), *(contiguous(x, dtype) for x in rows), dtype(scale), dtype(_FLOOR)


def numba_backward(logits, targets, m, log_total, a, b, c, d, scale):
    out = empty(logits, logits.shape)
    _backward(contiguous(logits), *_row_arguments(logits, targets, m, log_total, a, b, c, d, scale=scale), out)
    return out


def _check_in_place(logits):
    if not (logits.flags.c_contiguous and getattr(logits.flags, "writeable", True)):  # CuPy knows no read-only arrays
        raise ValueError("in place, cross-entropy's gradient goes into C-contiguous logits only")


def numba_backward_inplace(logits, targets, m, log_total, a, b, c, d, scale):
    _check_in_place(logits)
    _backward_inplace(logits, *_row_arguments(logits, targets, m, log_total, a, b, c, d, scale=scale))
    return logits


@prange_jit
def _fused_inplace(logits, targets, a, z, c, d, scale, floor, m, log_total, x_target, x_sum):
    zero = scale * 0
    for i in prange(targets.size):
        row = logits[i]
        a_i = a[i]
        if targets[i] < 0:
            m[i], log_total[i], x_target[i], x_sum[i] = 0, 0, 0, 0
        else:
            m[i], log_total[i], x_target[i], x_sum[i], _ = _statistics(row, targets[i], scale, floor)
            a_i += z[i] * (scale * m[i] + log_total[i])
        _gradient_row(row, row, targets[i], m[i], log_total[i], a_i, zero, c[i], d[i], scale, floor)


def numba_fused_inplace(logits, targets, a, z, c, d, scale):
    _check_in_place(logits)
    results = tuple(empty(logits, targets.shape) for _ in range(4))
    _fused_inplace(logits, *_row_arguments(logits, targets, a, z, c, d, scale=scale), *results)
    return logits, *results


# ------------------------------------------------------------------ cuda

_WARP = 1024  # a row of at most so many logits is a warp's; a longer one a block's
_BLOCKS = {"forward": 256, "backward": 256, "fused": 512}  # threads for such a row: few blocks of `fused` fit at once

_SOURCE = cuda.Source(
    "cross_entropy.cu",
    {
        f"{kernel}<{c_type}, {n}, {threads}>": 64
        for kernel, block in _BLOCKS.items()
        for c_type, widest in cuda.WIDEST.items()
        for n in (widest, 1)
        for threads in (32, block)
    },
)


def _by_rows(logits):
    """The logits if each row of them is contiguous, wherever it begins; else a copy."""
    (_, V), (down, across), size = logits.shape, logits.strides, logits.itemsize
    return logits if across == size and down >= V * size and down % size == 0 else cuda.contiguous(logits)


def _launch(kernel, logits, out, before, after, shared=0):
    """A row per warp or block, of logits and of `out`, which lie alike. `before` and `after` are the arguments on both
    sides of the sizes; `shared` is bytes per row."""
    (N, V), n = logits.shape, 16 // logits.itemsize if cuda.wide_rows(logits, out) else 1
    threads = 32 if V <= _WARP else _BLOCKS[kernel]
    rows_per_block = 4 if threads == 32 else 1
    block, blocks = rows_per_block * threads, -(-N // rows_per_block) if V else 0
    instance = f"{kernel}<{cuda.c_type(logits)}, {n}, {threads}>"
    sizes = (np.int32(size) for size in (N, V, V // n * n, logits.strides[0] // logits.itemsize))
    _SOURCE.launch(instance, blocks, block, (logits, *before, *sizes, *after), shared=shared * rows_per_block)


def _cuda_rows(targets, *rows):
    return cuda.contiguous(targets, np.int32), *(cuda.contiguous(x, np.float32) for x in rows)


def cuda_forward(logits, targets, scale):
    logits, results = _by_rows(logits), tuple(empty(logits, targets.shape, np.float32) for _ in range(5))
    _launch("forward", logits, logits, _cuda_rows(targets), (np.float32(scale), *results))
    return results


def cuda_backward(logits, targets, m, log_total, a, b, c, d, scale):
    logits, out = cuda.contiguous(logits), empty(logits, logits.shape)
    _launch("backward", logits, out, _cuda_rows(targets, m, log_total, a, b, c, d), (np.float32(scale), out))
    return out


def _check_rows_in_place(logits):
    if _by_rows(logits) is not logits:
        raise ValueError("in place, cross-entropy's gradient goes into logits whose rows are contiguous only")


def cuda_backward_inplace(logits, targets, m, log_total, a, b, c, d, scale):
    _check_rows_in_place(logits)
    _launch("backward", logits, logits, _cuda_rows(targets, m, log_total, a, b, c, d), (np.float32(scale), logits))
    return logits


def cuda_fused_inplace(logits, targets, a, z, c, d, scale):
    _check_rows_in_place(logits)
    results = tuple(empty(logits, targets.shape, np.float32) for _ in range(4))
    room = min(cuda.backend.shared_limit(), logits.shape[1] * logits.itemsize) // 16 * 16  # bytes that wait per row
    after = np.int32(room // logits.itemsize), np.float32(scale), *results
    _launch("fused", logits, logits, _cuda_rows(targets, a, z, c, d), after, shared=room)
    return logits, *results


# ------------------------------------------------------------------ table


def _example(rng, size):
    sizes = {"large": (2048, 8192), "gpu": (8192, 50304)}
    N, V = sizes.get(size) or (int(rng.integers(1, 8)), int(rng.choice([1, 2, 5, 16, 31, 67, 130])))
    logits = rng.standard_normal((N, V)) * (rng.choice([30, 1e4]) if size == "extreme" else 1)
    targets = rng.integers(0, V, N)
    if size == "extreme" and rng.random() < 0.5:  # forbidden tokens, and ties for the largest
        logits[rng.random((N, V)) < 0.2] = -np.inf
        logits[:, : V // 2] = logits[:, :1]
        logits[np.arange(N), targets] = logits[:, 0] = 0.5
    targets[rng.random(N) < 0.2] = -100
    return (logits, targets, 1.0 if size in sizes else float(rng.choice([1.0, 0.7]))), {}


def _backward_example(rng, size):
    (logits, targets, scale), _ = _example(rng, size)
    return (logits, targets, None, None, *rng.standard_normal((4, len(targets))), scale), {}


def _fused_example(rng, size):
    (logits, targets, scale), _ = _example(rng, size)
    return (logits, targets, *rng.standard_normal((4, len(targets))), scale), {}


def _saved(logits, targets, m, log_total, *rest):
    return logits, targets, *forward(logits, targets, rest[-1])[:2], *rest


forward = Kernel(
    "cross_entropy_forward",
    reference=reference_forward,
    versions={
        "numba": numba_forward,
        "cuda": cuda_forward,
        "numba_cuda": numba_cuda("cross_entropy_forward"),
    },
    example=_example,
)
backward = Kernel(
    "cross_entropy_backward",
    reference=reference_backward,
    versions={
        "numba": numba_backward,
        "cuda": cuda_backward,
        "numba_cuda": numba_cuda("cross_entropy_backward"),
    },
    example=_backward_example,
    saved=_saved,
)
backward_inplace = Kernel(
    "cross_entropy_backward_inplace",
    reference=reference_backward_inplace,
    versions={
        "numba": numba_backward_inplace,
        "cuda": cuda_backward_inplace,
        "numba_cuda": numba_cuda("cross_entropy_backward_inplace"),
    },
    example=_backward_example,
    saved=_saved,
)
fused_inplace = Kernel(
    "cross_entropy_fused_inplace",
    reference=reference_fused_inplace,
    versions={"numba": numba_fused_inplace, "cuda": cuda_fused_inplace},
    example=_fused_example,
)
