"""
Where an array lives, and the few things that depend on it. The only file that imports CuPy, once a GPU is asked for.

Everything else is written against `xp = xp_of(array)`, the array's own module: NumPy on the host, CuPy on a GPU.
"""

import collections
import contextlib
import contextvars
import functools
import importlib
import itertools
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
        told = "a GPU array needs CuPy: pip install 'minillm-train[cuda13]' (or [cuda12])"
        raise ModuleNotFoundError(told, name="cupy") from error


def cuda():
    """CuPy's `cupy.cuda`: devices, streams, events and modules."""
    return _cupy().cuda


_HOST = np.ndarray, np.generic, int, float


def _on_host(x):
    if isinstance(x, _HOST):
        return True
    if not hasattr(type(x), "device"):  # as CuPy's arrays have
        raise TypeError(f"an array has to be NumPy's or CuPy's, and this is a {type(x).__name__}")
    return False


# ------------------------------------------------------------------ where an array is


def check_device(device):
    """ValueError unless there is such a device, "cpu" or "cuda". ModuleNotFoundError: no CuPy. Nothing ever falls back
    to the CPU: a run that should take minutes must not take days without a word."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    if device == "cuda":
        try:
            found, why = cuda().runtime.getDeviceCount(), "there is none"
        except cuda().runtime.CUDARuntimeError as error:
            found, why = 0, error
        if not found:
            raise ValueError(f"CuPy finds no GPU ({why}): take --device cpu, or mend the driver")


def gpu_name():
    """The GPU's product name."""
    name = cuda().runtime.getDeviceProperties(cuda().Device().id)["name"]
    return name.decode() if isinstance(name, bytes) else name


def device_of(x):
    """Where the array is: "cpu" or "cuda"."""
    return "cpu" if _on_host(x) else "cuda"


def to_device(x, device):
    """`x` as an array on `device`, "cpu" or "cuda". No copy where it is there already."""
    check_device(device)
    return to_host(x) if device == "cpu" else _cupy().asarray(x)


def beside(x, like):
    """`x` as an array where `like` is: itself, or a copy on the GPU. So an op moves ids, masks and the like, which are
    made on the host. TypeError: the other way, which would wait for the GPU."""
    if _on_host(like):
        if not _on_host(x):
            raise TypeError("an array on the GPU beside one on the host: bring it there with to_host")
        return x
    return _cupy().asarray(x) if _on_host(x) else x


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


# ------------------------------------------------------------------ numbers, without waiting for them


def number(x):
    """The one number in `x`, to add up with others: a float on the host, on the GPU an array () of float64, not yet
    waited for."""
    return float(x) if _on_host(x) else x.astype(np.float64)


class Later:
    """An array on its way to the host: `get()` waits for it, but not for what the GPU was told to do since."""

    def __init__(self, x):
        if _on_host(x):
            self._array, self._event, self.order = x, None, -1
        else:
            self.order = next(_clock)
            self._array = importlib.import_module("cupyx").empty_pinned(x.shape, x.dtype)
            x.get(out=self._array, blocking=False)
            self._event = cuda().Event(disable_timing=True)
            self._event.record()

    def wait(self):
        """The array, a NumPy one."""
        if self._event is not None:
            self._event.synchronize()
        return self._array

    def get(self):
        """The same, or the error of a `check_ids` before it."""
        self.wait()
        raise_flags(self)
        return self._array


_clock = itertools.count()


def later(numbers):
    """{name: number} of Python numbers and of arrays () on the GPU, as function() -> {name: float}, which waits for
    these numbers alone."""
    waiting = {name: x for name, x in numbers.items() if not _on_host(x)}
    if not waiting:
        return lambda: numbers
    found = Later(_cupy().stack([number(x) for x in waiting.values()]))
    return lambda: numbers | dict(zip(waiting, found.get().tolist(), strict=True))


# ------------------------------------------------------------------ ids

_flags = collections.deque()  # (name, ids, n, flag) of checks that run on a GPU
_checked = contextvars.ContextVar("checked", default=False)


@contextlib.contextmanager
def already_checked():
    """Context manager: ids on the GPU are not checked in here, because whoever moved them there has checked them."""
    before = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(before)


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
    elif not _checked.get():
        if len(_flags) >= 256:  # nothing has been read for a long time
            raise_flags()
        _flags.append((name, ids, n, Later(((ids < 0) | (ids >= n)).any())))


def raise_flags(until=None):
    """Raise the error of the first failed `check_ids` on a GPU, if there is one; with `until`, a Later, only of those
    that were told before it, and are known when it is."""
    count = len(_flags) if until is None else sum(flag.order < until.order for *_, flag in _flags)
    for _ in range(count):
        name, ids, n, flag = _flags.popleft()
        if flag.wait():
            _flags.clear()
            raise _outside(name, _cupy().asnumpy(ids), n)


def _outside(name, ids, n):
    at = np.unravel_index(np.argmax((ids < 0) | (ids >= n)), ids.shape)
    return ValueError(f"{name}: id {ids[at]} at position ({', '.join(map(str, at))}) is outside [0, {n})")


# ------------------------------------------------------------------ arrays


def empty(like, shape, dtype=None):
    """An uninitialised C-contiguous array beside `like`. Every kernel and op allocates its large outputs here."""
    return xp_of(like).empty(shape, dtype or like.dtype)


def concatenate(arrays, axis):
    """As NumPy's. CuPy's own moves addresses from the host to the GPU, which a CUDA graph would not do again."""
    first = arrays[0]
    if _on_host(first):
        return np.concatenate(arrays, axis)
    axis %= first.ndim
    sizes = [x.shape[axis] for x in arrays]
    shape = *first.shape[:axis], sum(sizes), *first.shape[axis + 1 :]
    joined = empty(first, shape, np.result_type(*(x.dtype for x in arrays)))
    before, end = (slice(None),) * axis, 0
    for x, size in zip(arrays, sizes, strict=True):
        joined[(*before, slice(end, end + size))] = x
        end += size
    return joined


def joined(arrays, axis):
    """As `concatenate`, but where the arrays are all the parts of one, in their order, that one, not a copy: for what
    nobody changes in place."""
    first, whole = arrays[0], arrays[0].base
    axis %= first.ndim
    shape = *first.shape[:axis], sum(x.shape[axis] for x in arrays), *first.shape[axis + 1 :]
    if whole is None or whole.size != math.prod(shape) or not whole.flags.c_contiguous or whole.dtype != first.dtype:
        return concatenate(arrays, axis)
    whole, before, end = whole.reshape(shape), (slice(None),) * axis, 0
    for x in arrays:
        part = whole[(*before, slice(end, end + x.shape[axis]))]
        if x.base is not first.base or (address(x), x.shape, x.strides) != (address(part), part.shape, part.strides):
            return concatenate(arrays, axis)
        end += x.shape[axis]
    return whole


def address(x):
    """The address of an array's first element, in its device's memory."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def upcast(x):
    """`x` in the dtype that reductions run in: float32 for 16-bit floats, unchanged for float32 and float64."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 and x.dtype.kind in "fV" else x  # V: bfloat16


def erfc(x):
    """The complementary error function, elementwise: 1 - erf(x) without its cancellation."""
    if _on_host(x):
        return np.vectorize(math.erfc, otypes=[x.dtype])(x) if x.size else x.copy()
    return importlib.import_module("cupyx.scipy.special").erfc(x)
