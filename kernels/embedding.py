"""
Rows of a table by id, and the gradient that adds them up again.

Contract
    weight (V, D), ids (N,) int in [0, V).   forward(weight, ids) = weight[ids], (N, D)
    backward(dy, ids, V) = dweight (V, D):   dweight[v] = sum of dy_i over the tokens i with ids_i = v

Derivation
    y = S weight with a one-hot S, so dweight = S^T dy. A token that occurs k times gets k terms: `dweight[ids] += dy`
    would keep only the last of them.

Rungs
    reference   np.add.at, in the order of the tokens
    numba       each task owns some columns of dweight and walks the tokens in order: no two tasks write to the same
                place, and the sums are the same bits for any number of threads
    cuda        positions sorted by id on the device, and added up in equal pieces, whatever the ids: no atomics, token
                order, the same bits in every run (embedding.cu)
"""

import numpy as np

from . import cuda
from .device import empty, upcast, xp_of
from .jit import contiguous, prange, prange_jit
from .kernel import Kernel

# ------------------------------------------------------------------ reference


def reference_forward(weight, ids):
    return weight[ids]


def reference_backward(dy, ids, V):
    xp, wide = xp_of(dy), upcast(dy)
    dweight = xp.zeros((V, dy.shape[1]), wide.dtype)
    xp.add.at(dweight, ids, wide)
    return dweight.astype(dy.dtype)


# ------------------------------------------------------------------ numba

_COLUMNS = 32  # per task: two cache lines of float32


@prange_jit
def _forward(weight, ids, y):
    for i in prange(ids.size):
        row, to = weight[ids[i]], y[i]
        for d in range(row.size):
            to[d] = row[d]


def numba_forward(weight, ids):
    y = empty(weight, (ids.size, weight.shape[1]))
    _forward(contiguous(weight), contiguous(ids), y)
    return y


@prange_jit
def _backward(dy, ids, dweight):
    V, D = dweight.shape
    for task in prange(-(-D // _COLUMNS)):
        first, last = task * _COLUMNS, min((task + 1) * _COLUMNS, D)
        for v in range(V):
            dweight[v, first:last] = 0
        for i in range(ids.size):
            row, to = dy[i], dweight[ids[i]]
            for d in range(first, last):
                to[d] += row[d]


def numba_backward(dy, ids, V):
    dweight = empty(dy, (V, dy.shape[1]))
    _backward(contiguous(dy), contiguous(ids), dweight)
    return dweight


# ------------------------------------------------------------------ cuda

_THREADS, _PIECE, _TILE = 256, 32, 1024  # as in embedding.cu
_DIGIT = 10  # bits that one pass of the sort takes at most: a thread of a block for each digit

_SOURCE = cuda.Source(
    "embedding.cu",
    {
        f"{kernel}<{c_type}, {n}>": registers if n > 1 else min(registers, 48)
        for kernel, registers in (("forward", 32), ("add_pieces", 120), ("add_parts", 40))
        for c_type, widest in cuda.WIDEST.items()
        for n in (widest, 1)
    }
    | {"count_digits": 32, "add_up": 32, "move": 32, "find_first": 16},
)


def _instance(kernel, *arrays):
    """(instance, elements per access)."""
    x = arrays[0]
    n = 16 // x.itemsize if cuda.wide(*arrays) else 1
    return f"{kernel}<{cuda.c_type(x)}, {n}>", n


def cuda_forward(weight, ids):
    weight = weight if weight.strides[-1] == weight.itemsize else cuda.contiguous(weight)
    ids, (V, D) = cuda.contiguous(ids, np.int32), weight.shape
    y = empty(weight, (ids.size, D))
    instance, n = _instance("forward", weight, y)
    tokens = max(1, 4 * _THREADS * n // max(D, 1))
    sizes = (np.int32(size) for size in (tokens, ids.size, V, D))
    arguments = weight, np.int64(weight.strides[0] // weight.itemsize), ids, *sizes, y
    _SOURCE.launch(instance, -(-ids.size // tokens) if D else 0, _THREADS, arguments)
    return y


def _sorted(ids, V):
    """(positions in the order of their ids, equal ids in the order they came in; the ids in that order)."""
    bits = max(1, (V - 1).bit_length())
    passes = -(-bits // _DIGIT)
    digit, tiles = max(5, -(-bits // passes)), -(-ids.size // _TILE)  # 32 threads at least
    counts, order = empty(ids, (tiles << digit,)), None
    sorted_ids = empty(ids, ids.shape)
    for number in range(passes):
        keys = ids, order, np.int32(ids.size), np.int32(V), np.int32(number * digit)
        order = empty(ids, ids.shape)
        _SOURCE.launch("count_digits", tiles, 1 << digit, (*keys, counts))
        _SOURCE.launch("add_up", min(tiles, 1), 1024, (counts, np.int32(counts.size)))
        last = sorted_ids if number == passes - 1 else None
        _SOURCE.launch("move", tiles, 1 << digit, (*keys, counts, order, last))
    return order, sorted_ids


def cuda_backward(dy, ids, V):
    dy, ids, D = cuda.contiguous(dy), cuda.contiguous(ids, np.int32), dy.shape[1]
    order, sorted_ids = _sorted(ids, V)
    dweight, first = empty(dy, (V, D)), empty(ids, (V + 1,))
    pieces, tokens = -(-ids.size // _PIECE), np.int32(ids.size)
    parts = empty(dy, (pieces, 2, D), np.float32)
    _SOURCE.launch("find_first", V // _THREADS + 1, _THREADS, (sorted_ids, tokens, np.int32(V), first))
    instance, n = _instance("add_pieces", dy, dweight, parts)
    arguments = dy, order, sorted_ids, tokens, np.int32(D), dweight, parts
    _SOURCE.launch(instance, -(-pieces * (D // n) // _THREADS), _THREADS, arguments)
    instance, n = _instance("add_parts", dweight, parts)
    arguments = first, parts, np.int32(V), np.int32(D), dweight
    _SOURCE.launch(instance, -(-V * (D // n) // _THREADS), _THREADS, arguments)
    return dweight


# ------------------------------------------------------------------ table


def _example(rng, size):
    if size in ("large", "gpu"):
        N, V, D = (8192, 8192, 512) if size == "large" else (32768, 50304, 768)
    else:
        N, V, D = (int(rng.choice(n)) for n in ([1, 2, 5, 67], [1, 3, 50], [1, 7, 33, 67]))
    return N, V, D, rng.integers(0, V, N)


def _forward_example(rng, size):
    _, V, D, ids = _example(rng, size)
    return (rng.standard_normal((V, D)), ids), {}


def _backward_example(rng, size):
    N, V, D, ids = _example(rng, size)
    return (rng.standard_normal((N, D)), ids, V), {}


forward = Kernel(
    "embedding_forward",
    reference=reference_forward,
    versions={"numba": numba_forward, "cuda": cuda_forward},
    example=_forward_example,
)
backward = Kernel(
    "embedding_backward",
    reference=reference_backward,
    versions={"numba": numba_backward, "cuda": cuda_backward},
    example=_backward_example,
)
