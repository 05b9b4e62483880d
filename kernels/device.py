"""
Where an array lives, and the few things that depend on it. The only file that imports CuPy, once a GPU is asked for.

Everything else is written against `xp = xp_of(array)`, the array's own module: NumPy on the host, CuPy on a GPU.
"""

import collections
import functools
import importlib
import math

import numpy as np


def xp_of(x):
    """The module that made `x`: numpy, or cupy for an array on the GPU."""
    return np if _on_host(x) else _cupy()


@functools.cache
def _cupy():
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError("a GPU array needs CuPy: pip install 'minillm-train[cuda13]' (or [cuda12])") from error


def cuda():
    """CuPy's `cupy.cuda`: devices, streams, events and modules."""
    return _cupy().cuda


def to_device(x, device):
    """`x` as an array on `device`, "cpu" or "cuda". No copy where it is there already."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    return to_host(x) if device == "cpu" else _cupy().asarray(x)


def to_host(x):
    """`x` as a NumPy array. Waits for the GPU where it comes from one, and raises what `check_ids` found there."""
    if _on_host(x):
        return np.asarray(x)
    array = _cupy().asnumpy(x)
    raise_flags()
    return array


def synchronize(x):
    """Wait until the work that makes `x` is done: a no-op on the host, for timing on a GPU."""
    if not _on_host(x):
        _cupy().cuda.get_current_stream().synchronize()
        raise_flags()


def _on_host(x):
    return isinstance(x, np.ndarray | np.generic)


# ------------------------------------------------------------------ ids

_flags = collections.deque()  # (name, ids, n, flag) of checks that run on a GPU


def check_ids(name, ids, n):
    """ValueError that names the first id outside [0, n); TypeError if they are no whole numbers.

    Ids on the host are checked at once. On a GPU the answer is a flag that is computed with the rest and read one step
    late, when something is read from there anyway (`to_host`, `synchronize`), so that nothing waits for it.
    """
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: ids must be whole numbers, and these are {ids.dtype}")
    if _on_host(ids):
        if ids.size and (ids.min() < 0 or ids.max() >= n):
            raise _outside(name, ids, n)
    else:
        if len(_flags) >= 256:  # nothing has been read for a long time
            raise_flags()
        _flags.append((name, ids, n, ((ids < 0) | (ids >= n)).any()))


def raise_flags():
    """Raise the error of the first failed `check_ids` on a GPU, if there is one."""
    while _flags:
        name, ids, n, flag = _flags.popleft()
        if flag:
            _flags.clear()
            raise _outside(name, np.asarray(ids.get() if hasattr(ids, "get") else ids), n)


def _outside(name, ids, n):
    at = np.unravel_index(np.argmax((ids < 0) | (ids >= n)), ids.shape)
    return ValueError(f"{name}: id {ids[at]} at position ({', '.join(map(str, at))}) is outside [0, {n})")


# ------------------------------------------------------------------ arrays


def empty(like, shape, dtype=None):
    """An uninitialised C-contiguous array beside `like`. Every kernel and op allocates its large outputs here."""
    return xp_of(like).empty(shape, dtype or like.dtype)


def upcast(x):
    """`x` in the dtype that reductions run in: float32 for 16-bit floats, unchanged for float32 and float64."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def erfc(x):
    """The complementary error function, elementwise: 1 - erf(x) without its cancellation."""
    if _on_host(x):
        return np.vectorize(math.erfc, otypes=[x.dtype])(x) if x.size else x.copy()
    return importlib.import_module("cupyx.scipy.special").erfc(x)
