"""
Attention and softmax cross-entropy for a GPU, in Python: the readable rung between the Numba kernels and CUDA C++.

    o, lse = attention.forward.version("numba_cuda")(q, k, v, start, scale)  # CuPy arrays; the first call compiles

Contracts and derivations stand in attention.py and cross_entropy.py; names and tiles here are those of the Numba
kernels there, so that the two can be read side by side. What changes is who does what:

    attention forward       a block per (b, h, query tile)
    attention backward      two passes, and no sum is shared between blocks, so that the bits are the same every time:
                            one block per (b, h, query tile) for dq, one per (b, key head, key tile) for dk and dv
    cross-entropy           a block per row

How a block computes a tile
    A tile is TILE x TILE, whatever the head size D: long rows are walked through TILE columns at a time, and what grows
    with D (the sums o, dq, dk, dv) lives in the result itself, in memory. A block is SIDE x SIDE threads. Thread (y, x)
    owns the elements (y + SIDE r, x + SIDE n) of every tile that is computed, r and n < EACH, and keeps them in
    registers (`c`); what is loaded lies in shared memory, because all threads of the block read it: four tiles at most,
    17 KB in float32 and 34 KB in float64 of the 48 KB that a block gets on any GPU.
    A thread may read what another wrote only after a `cuda.syncthreads()` that both have passed, and may overwrite what
    another reads only after one, too. Every one of them is needed: the tests drop each in turn, and see the results
    change.

Only shared memory and `cuda.syncthreads` are used, no warp instructions, so NUMBA_ENABLE_CUDASIM=1 in the environment
runs these kernels in Numba's simulator, on NumPy arrays: slowly, but with print and a debugger in every thread. On a
GPU they need the package numba-cuda. No tensor cores and no cp.async, so a small part of the speed of the CUDA C++
kernels is expected; they have not been timed on a GPU yet. Compiled for sm_90 by numba-cuda 0.30.4 in float32, a thread
takes 126 registers in the forward, 244 (dq) and 254 (dk, dv) in the backward, and nothing is spilled.

float32 and float64 run as they are. 16-bit floats are converted to float32 arrays and the results back, because
numba.cuda has no bfloat16 arithmetic that its simulator knows too; the CUDA C++ kernels read them as they are.
"""

import functools
import math

import numpy as np
from numba import config, cuda

from .cuda import contiguous
from .device import cuda as cupy_cuda
from .device import empty, upcast

TILE = 32  # queries and keys per tile
SIDE = 8  # a block of attention is SIDE x SIDE threads
EACH = TILE // SIDE  # rows and columns of a tile that one thread computes
PADDED = TILE + 1  # a row in shared memory: without the + 1, the elements of a column would lie in one memory bank
THREADS = 128  # a block of cross-entropy; a power of two

# ------------------------------------------------------------------ launching


def _launch(kernel, blocks, threads, *arguments):
    """Run a kernel on arrays and NumPy scalars, on CuPy's current stream and without waiting for it."""
    if isinstance(arguments[0], np.ndarray):
        if not config.ENABLE_CUDASIM:
            raise TypeError("numba_cuda kernels need arrays on a GPU, or NUMBA_ENABLE_CUDASIM=1 set for NumPy's")
        stream, wrap = 0, cuda.devicearray.FakeCUDAArray
    else:
        # The kernel follows on the stream that the arrays are computed on: no `sync` with it.
        stream = cuda.external_stream(cupy_cuda().get_current_stream().ptr)
        wrap = functools.partial(cuda.as_cuda_array, sync=False)
    kernel[blocks, threads, stream](*(x if isinstance(x, np.generic) else wrap(x) for x in arguments))


def _rows(x):
    """x in the dtype that it is computed in, its last axis contiguous: q, k and v inside one fused projection need no
    copy, and rows of logits that lie apart none either."""
    x = upcast(x)
    return x if x.strides[-1] == x.itemsize and min(x.strides) >= 0 else contiguous(x)


# ------------------------------------------------------------------ tiles


@cuda.jit(device=True)
def _rank():
    """This thread's number in a block of attention."""
    return cuda.threadIdx.y * SIDE + cuda.threadIdx.x


@cuda.jit(device=True)
def _copy_rows(tile, source, b, first, h, rows, d0, D, scale):
    """tile[r, d] = scale * source[b, first + r, h, d0 + d], and 0 beyond the rows and the head. By the whole block."""
    for e in range(_rank(), TILE * TILE, SIDE * SIDE):
        r, d = e // TILE, e % TILE
        tile[r, d] = 0
        if r < rows and d0 + d < D:
            tile[r, d] = scale * source[b, first + r, h, d0 + d]


@cuda.jit(device=True)
def _matmul_add(c, a, b):
    """c += this thread's elements of a @ b, for two tiles in shared memory."""
    y, x = cuda.threadIdx.y, cuda.threadIdx.x
    for t in range(TILE):
        for r in range(EACH):
            for n in range(EACH):
                c[r, n] += a[y + SIDE * r, t] * b[t, x + SIDE * n]


@cuda.jit(device=True)
def _clear(c):
    for r in range(EACH):
        for n in range(EACH):
            c[r, n] = 0


@cuda.jit(device=True)
def _products(c, left, right, q, i0, h, rows, k, j0, hk, columns, b, D, scale):
    """c = this thread's elements of scale q_i . k_j for the rows q[b, i0:, h] and k[b, j0:, hk], through two tiles."""
    _clear(c)
    for d0 in range(0, D, TILE):
        _copy_rows(left, q, b, i0, h, rows, d0, D, scale)
        _copy_rows(right, k, b, j0, hk, columns, d0, D, left.dtype.type(1))
        cuda.syncthreads()
        _matmul_add(c, left, right.T)
        cuda.syncthreads()


@cuda.jit(device=True)
def _zero_rows(out, b, first, h, rows, D):
    """out[b, first : first + rows, h] = 0, each element by the thread that will add to it."""
    for r in range(cuda.threadIdx.y, rows, SIDE):
        for d in range(cuda.threadIdx.x, D, SIDE):
            out[b, first + r, h, d] = 0


@cuda.jit(device=True)
def _add_rows(out, b, first, h, rows, d0, D, c):
    """out[b, first + r, h, d0 + d] += c, inside the rows and the head."""
    y, x = cuda.threadIdx.y, cuda.threadIdx.x
    for r in range(EACH):
        for n in range(EACH):
            i, d = y + SIDE * r, d0 + x + SIDE * n
            if i < rows and d < D:
                out[b, first + i, h, d] += c[r, n]


@cuda.jit(device=True)
def _bounds(start, b, i, shift, j0):
    """The columns [a, z) of the tile at key j0 that query i sees; empty if z <= a."""
    return max(start[b, i] - j0, 0), min(i + shift + 1 - j0, TILE)


# ------------------------------------------------------------------ attention


@cuda.jit
def _attention_forward(q, k, v, start, scale, o, lse):
    _, Tq, H, D = o.shape
    Tk, Hk = k.shape[1], k.shape[2]
    shift = Tk - Tq
    query_tiles = -(-Tq // TILE)
    zero, one, nothing = o.dtype.type(0), o.dtype.type(1), o.dtype.type(-math.inf)  # a Python number would be float64
    bh, rank = cuda.blockIdx.x // query_tiles, cuda.blockIdx.x % query_tiles
    b, h = bh // H, bh % H
    i0 = (query_tiles - 1 - rank) * TILE  # the longest first, so that none is left alone at the end
    rows = min(TILE, Tq - i0)
    hk = h // (H // Hk)
    y, x, t = cuda.threadIdx.y, cuda.threadIdx.x, _rank()

    qs = cuda.shared.array((TILE, PADDED), o.dtype)
    ks = cuda.shared.array((TILE, PADDED), o.dtype)
    vs = cuda.shared.array((TILE, PADDED), o.dtype)
    s = cuda.shared.array((TILE, PADDED), o.dtype)
    top = cuda.shared.array(TILE, o.dtype)
    total = cuda.shared.array(TILE, o.dtype)
    correction = cuda.shared.array(TILE, o.dtype)
    c = cuda.local.array((EACH, EACH), o.dtype)
    for r in range(t, TILE, SIDE * SIDE):
        top[r], total[r] = nothing, 0
    _zero_rows(o, b, i0, h, rows, D)  # acc is o itself

    for jt in range(start[b, i0] // TILE, (i0 + rows - 1 + shift) // TILE + 1):
        j0 = jt * TILE
        columns = min(TILE, Tk - j0)
        _products(c, qs, ks, q, i0, h, rows, k, j0, hk, columns, b, D, scale)
        for r in range(EACH):
            i = y + SIDE * r
            a, z = _bounds(start, b, i0 + i, shift, j0) if i < rows else (0, 0)
            for n in range(EACH):
                j = x + SIDE * n
                s[i, j] = c[r, n] if a <= j < z else nothing
        cuda.syncthreads()

        for r in range(t, TILE, SIDE * SIDE):
            highest = top[r]
            for j in range(TILE):
                highest = s[r, j] if s[r, j] > highest else highest
            correction[r] = math.exp(top[r] - highest) if highest != nothing else one
            top[r] = highest
        cuda.syncthreads()

        for r in range(EACH):
            i = y + SIDE * r
            for n in range(EACH):
                j = x + SIDE * n
                s[i, j] = math.exp(s[i, j] - top[i]) if s[i, j] != nothing else zero
        for d0 in range(0, D, TILE):
            _copy_rows(vs, v, b, j0, hk, columns, d0, D, one)
            cuda.syncthreads()
            _clear(c)
            _matmul_add(c, s, vs)
            for r in range(EACH):
                for n in range(EACH):
                    i, d = y + SIDE * r, d0 + x + SIDE * n
                    if i < rows and d < D:
                        o[b, i0 + i, h, d] = o[b, i0 + i, h, d] * correction[i] + c[r, n]
            cuda.syncthreads()
        for r in range(t, TILE, SIDE * SIDE):
            total[r] *= correction[r]
            for j in range(TILE):
                total[r] += s[r, j]

    cuda.syncthreads()
    for r in range(y, rows, SIDE):
        inverse = one / total[r] if total[r] != 0 else total[r]
        for d in range(x, D, SIDE):
            o[b, i0 + r, h, d] *= inverse
    for r in range(t, rows, SIDE * SIDE):
        lse[b, h, i0 + r] = top[r] + math.log(total[r]) if total[r] != 0 else nothing


def attention_forward(q, k, v, start, scale):
    dtype = q.dtype
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, Tq, H, _ = q.shape
    o, lse = empty(q, q.shape), empty(q, (B, H, Tq))
    if o.size:
        blocks = B * H * -(-Tq // TILE)
        _launch(_attention_forward, blocks, (SIDE, SIDE), q, k, v, contiguous(start), q.dtype.type(scale), o, lse)
    return o.astype(dtype, copy=False), lse


@cuda.jit
def _attention_backward_queries(do, q, k, v, o, lse, start, scale, dq, delta):
    """dq, and delta for the other pass."""
    _, Tq, H, D = o.shape
    Tk, Hk = k.shape[1], k.shape[2]
    shift = Tk - Tq
    query_tiles, zero, one = -(-Tq // TILE), o.dtype.type(0), o.dtype.type(1)
    bh, rank = cuda.blockIdx.x // query_tiles, cuda.blockIdx.x % query_tiles
    b, h = bh // H, bh % H
    i0 = (query_tiles - 1 - rank) * TILE
    rows = min(TILE, Tq - i0)
    hk = h // (H // Hk)
    y, x = cuda.threadIdx.y, cuda.threadIdx.x

    left = cuda.shared.array((TILE, PADDED), o.dtype)
    right = cuda.shared.array((TILE, PADDED), o.dtype)
    ds = cuda.shared.array((TILE, PADDED), o.dtype)
    p = cuda.local.array((EACH, EACH), o.dtype)
    c = cuda.local.array((EACH, EACH), o.dtype)
    for r in range(_rank(), rows, SIDE * SIDE):
        total = zero
        for d in range(D):
            total += do[b, i0 + r, h, d] * o[b, i0 + r, h, d]
        delta[b, h, i0 + r] = total
    _zero_rows(dq, b, i0, h, rows, D)

    for jt in range(start[b, i0] // TILE, (i0 + rows - 1 + shift) // TILE + 1):
        j0 = jt * TILE
        columns = min(TILE, Tk - j0)
        _products(p, left, right, q, i0, h, rows, k, j0, hk, columns, b, D, scale)
        _products(c, left, right, do, i0, h, rows, v, j0, hk, columns, b, D, one)
        for r in range(EACH):
            i = y + SIDE * r
            a, z = _bounds(start, b, i0 + i, shift, j0) if i < rows else (0, 0)
            for n in range(EACH):
                j = x + SIDE * n
                ds[i, j] = 0
                if a <= j < z:
                    ds[i, j] = math.exp(p[r, n] - lse[b, h, i0 + i]) * (c[r, n] - delta[b, h, i0 + i])
        for d0 in range(0, D, TILE):
            _copy_rows(right, k, b, j0, hk, columns, d0, D, scale)
            cuda.syncthreads()
            _clear(c)
            _matmul_add(c, ds, right)
            _add_rows(dq, b, i0, h, rows, d0, D, c)
            cuda.syncthreads()


@cuda.jit
def _attention_backward_keys(do, q, k, v, lse, delta, start, scale, dk, dv):
    """dk and dv, summed over the heads that share them."""
    _, Tq, H, D = q.shape
    Tk, Hk = k.shape[1], k.shape[2]
    shift = Tk - Tq
    key_tiles, one = -(-Tk // TILE), q.dtype.type(1)
    task, jt = cuda.blockIdx.x // key_tiles, cuda.blockIdx.x % key_tiles
    b, hk = task // Hk, task % Hk
    j0 = jt * TILE
    columns = min(TILE, Tk - j0)
    y, x = cuda.threadIdx.y, cuda.threadIdx.x

    left = cuda.shared.array((TILE, PADDED), q.dtype)
    right = cuda.shared.array((TILE, PADDED), q.dtype)
    p = cuda.shared.array((TILE, PADDED), q.dtype)
    ds = cuda.shared.array((TILE, PADDED), q.dtype)
    c = cuda.local.array((EACH, EACH), q.dtype)
    dp = cuda.local.array((EACH, EACH), q.dtype)
    _zero_rows(dk, b, j0, hk, columns, D)
    _zero_rows(dv, b, j0, hk, columns, D)

    for h in range(hk * (H // Hk), (hk + 1) * (H // Hk)):
        for i0 in range(max(j0 - shift, 0) // TILE * TILE, Tq, TILE):
            if start[b, i0] >= j0 + columns:  # and so it is for every later query
                break
            rows = min(TILE, Tq - i0)
            _products(c, left, right, q, i0, h, rows, k, j0, hk, columns, b, D, scale)
            _products(dp, left, right, do, i0, h, rows, v, j0, hk, columns, b, D, one)
            for r in range(EACH):
                i = y + SIDE * r
                a, z = _bounds(start, b, i0 + i, shift, j0) if i < rows else (0, 0)
                for n in range(EACH):
                    j = x + SIDE * n
                    p[i, j], ds[i, j] = 0, 0
                    if a <= j < z:
                        p[i, j] = math.exp(c[r, n] - lse[b, h, i0 + i])
                        ds[i, j] = p[i, j] * (dp[r, n] - delta[b, h, i0 + i])
            for d0 in range(0, D, TILE):
                _copy_rows(left, do, b, i0, h, rows, d0, D, one)
                _copy_rows(right, q, b, i0, h, rows, d0, D, scale)
                cuda.syncthreads()
                _clear(c)
                _matmul_add(c, p.T, left)
                _add_rows(dv, b, j0, hk, columns, d0, D, c)
                _clear(c)
                _matmul_add(c, ds.T, right)
                _add_rows(dk, b, j0, hk, columns, d0, D, c)
                cuda.syncthreads()


def attention_backward(do, q, k, v, o, lse, start, scale):
    dtype = q.dtype
    do, q, k, v, o = (_rows(x) for x in (do, q, k, v, o))
    (B, Tq, H, _), (Tk, Hk) = q.shape, k.shape[1:3]
    dq, dk, dv = empty(q, q.shape), empty(k, k.shape), empty(v, v.shape)
    if dq.size:
        scale, lse, start, delta = q.dtype.type(scale), contiguous(lse), contiguous(start), empty(q, lse.shape)
        queries, keys = B * H * -(-Tq // TILE), B * Hk * -(-Tk // TILE)
        arguments = do, q, k, v, o, lse, start, scale, dq, delta
        _launch(_attention_backward_queries, queries, (SIDE, SIDE), *arguments)
        _launch(_attention_backward_keys, keys, (SIDE, SIDE), do, q, k, v, lse, delta, start, scale, dk, dv)
    else:  # keys that no query sees
        dk[...], dv[...] = 0, 0
    return tuple(x.astype(dtype, copy=False) for x in (dq, dk, dv))


# ------------------------------------------------------------------ cross-entropy


@cuda.jit(device=True)
def _reduce(partial, value, largest):
    """The sum of all threads' values, or the largest of them, for every thread. In a tree: the same bits every time."""
    t = cuda.threadIdx.x
    partial[t] = value
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half:
            other = partial[t + half]
            if not largest:
                partial[t] += other
            elif other > partial[t]:
                partial[t] = other
        cuda.syncthreads()
        half //= 2
    result = partial[0]
    cuda.syncthreads()
    return result


@cuda.jit
def _cross_entropy_forward(logits, targets, scale, floor, m, log_total, x_target, x_sum, x_mean):
    i, t, target = cuda.blockIdx.x, cuda.threadIdx.x, targets[cuda.blockIdx.x]
    partial = cuda.shared.array(THREADS, m.dtype)
    if target < 0:
        if t == 0:
            m[i], log_total[i], x_target[i], x_sum[i], x_mean[i] = 0, 0, 0, 0, 0
        return
    row = logits[i]
    highest = m.dtype.type(-math.inf)
    for j in range(t, row.size, THREADS):
        highest = row[j] if row[j] > highest else highest
    highest = _reduce(partial, highest, True)
    total, all_x, weighted = m.dtype.type(0), m.dtype.type(0), m.dtype.type(0)
    for j in range(t, row.size, THREADS):
        x = (row[j] - highest) * scale
        e = math.exp(x)
        total += e
        all_x += x
        weighted += e * (x if x > floor else floor)
    total = _reduce(partial, total, False)
    all_x = _reduce(partial, all_x, False)
    weighted = _reduce(partial, weighted, False)
    if t == 0:
        m[i], log_total[i], x_target[i] = highest, math.log(total), (row[target] - highest) * scale
        x_sum[i], x_mean[i] = all_x, weighted / total


@cuda.jit
def _cross_entropy_backward(logits, targets, m, log_total, a, b, c, d, scale, floor, out):
    """Element by element, so `out` may be `logits`."""
    i, target = cuda.blockIdx.x, targets[cuda.blockIdx.x]
    row, to = logits[i], out[i]
    for j in range(cuda.threadIdx.x, row.size, THREADS):
        if target < 0:
            to[j] = 0
        else:
            x = (row[j] - m[i]) * scale
            p = math.exp(x - log_total[i])
            dz = p * (a[i] + b[i] * (x if x > floor else floor)) + d[i]
            to[j] = scale * (dz + c[i]) if j == target else scale * dz


_FLOOR = -1e30  # stands in for x = -inf in p x, where p is 0


def cross_entropy_forward(logits, targets, scale):
    logits = _rows(logits)
    results = tuple(empty(logits, targets.shape) for _ in range(5))
    if targets.size:
        scale, floor = logits.dtype.type(scale), logits.dtype.type(_FLOOR)
        arguments = logits, contiguous(targets), scale, floor, *results
        _launch(_cross_entropy_forward, targets.size, THREADS, *arguments)
    return results


def _gradient(logits, targets, rows, scale, out):
    """out = dlogits, both of the dtype that is computed in."""
    if out.size:
        rows = (contiguous(x, out.dtype) for x in rows)
        arguments = logits, contiguous(targets), *rows, out.dtype.type(scale), out.dtype.type(_FLOOR), out
        _launch(_cross_entropy_backward, targets.size, THREADS, *arguments)


def cross_entropy_backward(logits, targets, m, log_total, a, b, c, d, scale):
    wide = _rows(logits)
    out = empty(wide, wide.shape)
    _gradient(wide, targets, (m, log_total, a, b, c, d), scale, out)
    return out.astype(logits.dtype, copy=False)


def cross_entropy_backward_inplace(logits, targets, m, log_total, a, b, c, d, scale):
    wide = upcast(logits)
    _gradient(wide, targets, (m, log_total, a, b, c, d), scale, wide)
    if wide is not logits:
        logits[...] = wide
    return logits
