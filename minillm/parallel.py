"""
Data parallelism on the CPU: an update's rows in shares, each computed by one thread on one core, and their gradients
summed.

The kernels of a small model are too short to be cut in two: the threads of a parallel loop or of a matrix product wait
for each other after each of an update's few hundred. Threads that compute different rows meet once in an update. They
are threads and not processes, because kernels and BLAS release Python's lock, and what is left, some 4 ms of
bookkeeping per share, hardly gets in the way: processes were no faster, and would need shared memory, pickled batches,
and care for whoever dies first.

How rows are shared depends on `workers` alone, and inside a share everything runs on one thread. So the same seed and
`workers` give the same bits whatever the machine's number of cores; another `workers` sums in another order.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from threadpoolctl import ThreadpoolController

from .kernels.device import number
from .kernels.jit import one_thread


def in_shares(model, function, batch, workers):
    """[function(model, share) for each share of `batch`], all at the same time; what they add to gradients is in
    model.flat_grad afterwards. With one worker, [function(model, batch)] on all threads, as without this file.

    function  must only read what it shares with others. The model it gets has the same weights, but for all shares but
              the first a gradient memory of its own, which takes workers - 1 times the parameters' memory
    batch     a list, or a NamedTuple of arrays with one row each; share i has the items i, i + workers, ...
    The first error in the order of shares is raised, when all have ended.
    """
    if workers == 1:
        return [function(model, batch)]

    def compute(model, share):
        with one_thread():
            return function(model, share)

    shares = [share for first in range(workers) if rows_of(share := _every(batch, first, workers))]
    models = [model, *(model.twin() for _ in shares[1:])]
    with _blas().limit(limits=1), ThreadPoolExecutor(workers - 1) as pool:
        # in copies of the caller's context, because no_grad is a matter of one
        others = [pool.submit(copy_context().run, compute, *pair) for pair in zip(models[1:], shares[1:], strict=True)]
        found = [compute(model, share) for share in shares[:1]]
        found += [other.result() for other in others]
    for twin in models[1:]:
        model.flat_grad += twin.flat_grad
    return found


def add_up(found):
    """{name: sum} over dicts of numbers with the same names."""
    return {name: sum(some[name] for some in found) for name in found[0]}


def added(sums, found):
    """{name: sum so far + number}, from nothing if `sums` is {}; the numbers of a GPU stay there."""
    return {name: sums.get(name, 0.0) + number(value) for name, value in found.items()}


def rows_of(batch):
    """How many rows a batch has: a list, or a NamedTuple of arrays with one row each."""
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)


def _every(batch, first, step):
    """The rows first, first + step, ... of a batch."""
    part = slice(first, None, step)
    return type(batch)(*(array[part] for array in batch)) if isinstance(batch, tuple) else batch[part]


@functools.cache
def _blas():
    """The BLAS that NumPy has loaded; looking for it takes 1 ms, setting its threads 16 us."""
    return ThreadpoolController().select(user_api="blas")
