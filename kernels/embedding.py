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
"""

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


# ------------------------------------------------------------------ table


def _example(rng, size):
    if size == "large":
        N, V, D = 8192, 8192, 512
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
    versions={"numba": numba_forward},
    example=_forward_example,
)
backward = Kernel(
    "embedding_backward",
    reference=reference_backward,
    versions={"numba": numba_backward},
    example=_backward_example,
)
