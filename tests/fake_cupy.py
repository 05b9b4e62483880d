"""
A stand-in for CuPy without a GPU, stricter than CuPy: its arrays lie in host memory, and refuse what a GPU's would.

    with installed() as cupy:                    sys.modules has it as `cupy`, and what it needs of `cupyx`
        x = cupy.asarray(numpy_array)
        with cupy.allow_synchronize(False):      whatever would wait for the GPU is an AssertionError in here
            ...

* A NumPy array beside one of these is a TypeError: in an operator, as an argument, as an index, as a value to store.
  (An index CuPy would copy to the GPU, and a NumPy function of its arrays would be CuPy's; both are refused here,
  because neither is meant.)
* What waits for the GPU is counted in `synchronized`: float(x), if x, x.item(), x.get(), printing, a boolean index. An
  asynchronous copy arrives when an event recorded behind it has been waited for, and is poison until then.
* Streams are not in order of their own: work on one that has not waited for what others were told is an error.
* A graph that is recorded is a list of what was told, with the numbers of that moment. Nothing is done meanwhile, what
  comes from the host or is waited for is an error, and so is a launch when an array from outside has been let go of, or
  when the graph's pool has given memory back. What was allocated meanwhile is poison again at each launch.
* There are only functions, methods and keywords that CuPy 14.2 has (a test compares them where CuPy is installed), and
  only loops for bfloat16 that it has: `where` and `clip` return float32, matmul above two dimensions is refused, add.at
  too. New memory is poison: NaN, or a large number.

Kernels that take addresses can run on its arrays: x.data.ptr is the host's, and the current stream is the null stream.
"""

import contextlib
import functools
import importlib.machinery
import inspect
import math
import sys
import types
import weakref
from typing import ClassVar

import ml_dtypes
import numpy as np

from tests.cuda_on_cpu import Cpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALARS = (bool, int, float, np.generic)  # what may stand beside an array
POISON = 0x5A5A5A5A

synchronized = []  # where the code was that waited
_allowed = [True]
_stream_order = []  # what is queued and has not arrived: functions
_pools = [None]  # the memory pool that allocates, None for the one that everybody has
_recording = None  # while a graph is recorded, the Graph


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where there is no GPU or no driver."""


class OutOfMemoryError(MemoryError):
    """What CuPy raises where the GPU's memory is full."""


def _synchronize(what):
    _not_recorded(what)
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    synchronized.append(f"{what} at {frame.f_code.co_filename}:{frame.f_lineno}")
    if not _allowed[0]:
        raise AssertionError(f"waits for the GPU: {synchronized[-1]}")
    _arrive(len(_stream_order))


def _arrive(count):
    for arrives in _stream_order[:count]:
        arrives()
    _stream_order[:count] = [lambda: None] * min(count, len(_stream_order))


def _not_recorded(what):
    if _recording is not None:
        raise AssertionError(f"{what} while a graph is recorded")


def told(function, arrays, writes=()):
    """The GPU is told to do function(), which reads `arrays` and writes into those of `writes` that are new: it is done
    now, or noted down where a graph is recorded."""
    stream = Stream.current
    if _recording is not None:
        _recording.note(function, arrays, writes)
        return
    for other in Stream.known:
        if other is not stream and stream.seen.get(other, 0) < other.told:
            raise AssertionError("a stream that has not waited for another one's work")
    stream.told += 1
    function()


@contextlib.contextmanager
def allow_synchronize(allow):
    """As cupyx.allow_synchronize: with False, waiting for the GPU is an error in the block."""
    before, _allowed[0] = _allowed[0], allow
    try:
        yield
    finally:
        _allowed[0] = before


# ------------------------------------------------------------------ arrays


def _host(x, what="an argument"):
    """The NumPy array behind one of ours, or the number that stands beside it."""
    if isinstance(x, ndarray):
        return x._array
    if isinstance(x, SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)} for {what}")


def _ours(x, what="an argument"):
    if not isinstance(x, ndarray):
        raise TypeError(f"Unsupported type {type(x)} for {what}, which has to be a cupy.ndarray")
    return x._array


def _wrap(array, source=None):
    """A NumPy array as one of ours; a view of `source` where it shares its memory."""
    new = object.__new__(ndarray)
    new._array, new._pool = np.asarray(array), _pools[-1]
    shared = source is not None and np.may_share_memory(new._array, source._array)
    new.base = (source if source.base is None else source.base) if shared else None
    if new._pool is not None and not shared:
        new._pool.malloc(new.nbytes)
    return new


def _index(index):
    """An index as NumPy takes it."""
    parts = index if isinstance(index, tuple) else (index,)
    found = []
    for part in parts:
        if isinstance(part, ndarray):
            if part.dtype.kind not in "iub":
                raise IndexError("arrays used as indices must be of integer or boolean type")
            if part.dtype == bool:
                _synchronize("a boolean index")
            found.append(part._array)
        elif part is None or part is Ellipsis or isinstance(part, slice | int | np.integer):
            found.append(part)
        else:
            raise TypeError(f"an index of {type(part)}: move it to the GPU first")
    return tuple(found)


def _wrapped_round(index, shape):
    """CuPy does not check the ids in an index: they wrap round."""
    axis, found = 0, []
    for part in index:
        if part is Ellipsis:
            axis += len(shape) - sum(1 for p in index if p is not None and p is not Ellipsis)
        elif isinstance(part, np.ndarray) and part.dtype.kind in "iu":
            part = part % shape[axis] if shape[axis] else part
            axis += 1
        elif part is not None:
            axis += part.ndim if isinstance(part, np.ndarray) else 1
        found.append(part)
    return tuple(found)


class MemoryPointer:
    def __init__(self, mem, offset):
        self.ptr = mem + offset


class Memory:
    """What a pool asks of the GPU, as an address; the next `refused` times there is none."""

    refused = 0

    def __new__(cls, size):
        if cls.refused:
            cls.refused -= 1
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        return 0


class Flags:
    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, flags.owndata


class ndarray:
    """An array that behaves as CuPy's do. `_array` is the NumPy array behind it and `_pool` what it
    was allocated from, for this file alone."""

    __slots__ = ("__weakref__", "_array", "_pool", "base")
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float):
        self._array, self.base, self._pool = _new(shape, dtype), None, _pools[-1]

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    itemsize = property(lambda self: self._array.itemsize)
    nbytes = property(lambda self: self._array.nbytes)
    strides = property(lambda self: self._array.strides)
    flags = property(lambda self: Flags(self._array.flags))
    data = property(lambda self: MemoryPointer(self._array.ctypes.data, 0))
    device = property(lambda self: Device(0))
    T = property(lambda self: _wrap(self._array.T, self))

    # what waits for the GPU

    def get(self, stream=None, order="C", out=None, blocking=True):
        if not blocking:
            _not_recorded("a copy to the host")
            if not isinstance(out, np.ndarray) or (out.shape, out.dtype) != (self.shape, self.dtype):
                raise TypeError("an asynchronous copy needs out, an array in pinned memory of this shape and dtype")
            now = self._array.copy()
            out[...] = np.nan if out.dtype.kind == "f" else 0
            _stream_order.append(lambda: np.copyto(out, now))
            return out
        _synchronize("get")
        if out is not None:
            out[...] = self._array
            return out
        return self._array.copy(order=order)

    def item(self):
        _synchronize("item")
        return self._array.item()

    def tolist(self):
        _synchronize("tolist")
        return self._array.tolist()

    def __bool__(self):
        _synchronize("bool")
        return bool(self._array)

    def __int__(self):
        _synchronize("int")
        return int(self._array)

    def __float__(self):
        _synchronize("float")
        return float(self._array)

    def __index__(self):
        raise TypeError("only NumPy arrays can be converted to an index")

    def __repr__(self):
        _synchronize("repr")
        return repr(self._array)

    def __str__(self):
        _synchronize("str")
        return str(self._array)

    def __format__(self, spec):
        _synchronize("format")
        return format(self._array[()], spec)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """np.float32(2) * x comes here; anything else with NumPy's functions is refused."""
        mixed = any(isinstance(x, np.generic) for x in inputs)
        if method != "__call__" or kwargs or not mixed or any(isinstance(x, np.ndarray) for x in inputs):
            raise TypeError(f"Unsupported type {np.ndarray}: numpy.{ufunc.__name__} of a cupy.ndarray")
        return _UFUNCS[{"divide": "true_divide"}.get(ufunc.__name__, ufunc.__name__)](*inputs)

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of a cupy.ndarray: use xp_of(x).{function.__name__}")

    # indexing and layout

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return _wrap(self._array[_wrapped_round(_index(index), self.shape)], self)

    def __setitem__(self, index, value):
        self._array[_wrapped_round(_index(index), self.shape)] = _host(value, "a value to store")

    def reshape(self, *shape, order="C", copy=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
        return _wrap(self._array.reshape(shape, order=order), self)

    def transpose(self, *axes):
        return _wrap(self._array.transpose(*axes), self)

    def swapaxes(self, axis1, axis2):
        return _wrap(self._array.swapaxes(axis1, axis2), self)

    def squeeze(self, axis=None):
        return _wrap(self._array.squeeze(axis), self)

    def ravel(self, order="C"):
        return _wrap(self._array.ravel(order), self)

    def flatten(self, order="C"):
        return _wrap(self._array.flatten(order))

    def view(self, dtype=None, type=None):
        return _wrap(self._array.view() if dtype is None else self._array.view(dtype), self)

    def copy(self, order="C"):
        return _wrap(self._array.copy(order))

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        return self if not copy and self.dtype == np.dtype(dtype) else _wrap(self._array.astype(dtype, order))

    def fill(self, value):
        self._array.fill(_host(value))

    def repeat(self, repeats, axis=None):
        if not isinstance(repeats, int | np.integer):
            raise TypeError("repeats: a whole number")
        return _wrap(self._array.repeat(repeats, axis))

    def take(self, indices, axis=None, out=None):
        return _wrap(self._array.take(_host(indices), axis, mode="wrap"))

    # reductions

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduced(np.sum, self, axis, dtype, out, keepdims)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        _no_16_bits("mean", self)
        return _reduced(np.mean, self, axis, dtype, out, keepdims)

    def prod(self, axis=None, dtype=None, out=None, keepdims=None):
        return _reduced(np.prod, self, axis, dtype, out, bool(keepdims))

    def var(self, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        _no_16_bits("var", self)
        return _wrap(self._array.var(axis, dtype, ddof=ddof, keepdims=keepdims))

    def max(self, axis=None, out=None, keepdims=False):
        return _reduced(np.max, self, axis, None, out, keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        return _reduced(np.min, self, axis, None, out, keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        return _reduced(np.any, self, axis, None, out, keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        return _reduced(np.all, self, axis, None, out, keepdims)

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False):
        _no_16_bits("argmax", self)
        return _wrap(self._array.argmax(axis, keepdims=keepdims))

    def cumsum(self, axis=None, dtype=None, out=None):
        return _wrap(self._array.cumsum(axis, dtype))

    def nonzero(self):
        _synchronize("nonzero")
        return tuple(_wrap(x) for x in self._array.nonzero())

    def dot(self, b, out=None):
        return matmul(self, b, out=out)


def _no_16_bits(name, x):
    if x.dtype.kind in "fV" and x.dtype.itemsize < 4:
        raise TypeError(f"{name} of {x.dtype}: upcast it first")


def _reduced(function, x, axis, dtype, out, keepdims):
    array, options = x._array, {} if dtype is None else {"dtype": dtype}
    if array.dtype == BFLOAT16 and function in (np.sum, np.prod):  # sums run in float32 there
        found = function(array.astype(np.float32), axis, keepdims=keepdims, **options)
        found = found.astype(BFLOAT16 if dtype is None else dtype)
    else:
        found = function(array, axis, keepdims=keepdims, **options)
    if out is None:
        return _wrap(found)
    out._array[...] = found
    return out


# ------------------------------------------------------------------ elementwise functions


class ufunc:
    """A function of arrays and numbers, elementwise. Without a loop for bfloat16 it computes in float32."""

    def __init__(self, name, function, bfloat16=True):
        self.__name__, self._function, self._bfloat16 = name, function, bfloat16

    def __call__(self, *args, out=None, dtype=None, casting="same_kind"):
        if len(args) > self._function.nin:  # the last one is out
            *args, out = args
        if not any(isinstance(x, ndarray) for x in args):
            raise TypeError(f"{self.__name__} of no cupy.ndarray: {', '.join(str(type(x)) for x in args)}")
        host = [_host(x, self.__name__) for x in args]
        if not self._bfloat16:
            host = [x.astype(np.float32) if getattr(x, "dtype", None) == BFLOAT16 else x for x in host]
        options = {} if dtype is None else {"dtype": dtype}
        with np.errstate(all="ignore"):  # a GPU does not complain
            if out is None:
                return _wrap(self._function(*host, **options))
            self._function(*host, out=_ours(out, "out"), casting=casting, **options)
        return out

    def at(self, a, slices, value):
        """CuPy's scatter_add, which has atomics for few dtypes."""
        if self.__name__ != "add":
            raise NotImplementedError(f"{self.__name__}.at")
        known = ("int32", "uint32", "uint64", "float16", "float32", "float64")
        if a.dtype.name not in known:
            raise TypeError(f"scatter_add only supports {', '.join(known)}, not {a.dtype}")
        np.add.at(_ours(a), _wrapped_round(_index(slices), a.shape), _host(value))


# All of these have loops for bfloat16, CuPy's and ml_dtypes'.
_NAMES = """
add subtract multiply true_divide floor_divide remainder power negative absolute equal not_equal less less_equal greater
greater_equal maximum minimum invert bitwise_and bitwise_or bitwise_xor left_shift right_shift logical_and logical_or
logical_not exp expm1 log log1p log2 sqrt square tanh sin cos isfinite isinf isnan sign floor rint fmax
"""
_UFUNCS = {name: ufunc(name, getattr(np, name)) for name in _NAMES.split()}
_BINARY = {
    **{"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide"},
    **{"mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"},
    **{"lshift": "left_shift", "rshift": "right_shift"},
}
_COMPARED = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}


def _operators():
    for short, name in _BINARY.items():
        function = _UFUNCS[name]
        setattr(ndarray, f"__{short}__", lambda x, y, f=function: f(x, y))
        setattr(ndarray, f"__r{short}__", lambda x, y, f=function: f(y, x))
        setattr(ndarray, f"__i{short}__", lambda x, y, f=function: f(x, y, out=x))
    for short, name in _COMPARED.items():
        setattr(ndarray, f"__{short}__", lambda x, y, f=_UFUNCS[name]: f(x, y))
    for short, name in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
        setattr(ndarray, f"__{short}__", lambda x, f=_UFUNCS[name]: f(x))
    ndarray.__matmul__ = lambda x, y: matmul(x, y)
    ndarray.__rmatmul__ = lambda x, y: matmul(y, x)


_operators()


def where(condition, x=None, y=None):
    if x is None or y is None:
        _synchronize("where")
        return tuple(_wrap(found) for found in np.nonzero(_ours(condition)))
    x, y = (_host(value, "where") for value in (x, y))  # CuPy has no loop for bfloat16 here
    x, y = (value.astype(np.float32) if getattr(value, "dtype", None) == BFLOAT16 else value for value in (x, y))
    return _wrap(np.where(_ours(condition).astype(bool), x, y))


def clip(a, a_min, a_max, out=None):
    a, bounds = _ours(a), [None if bound is None else _host(bound) for bound in (a_min, a_max)]
    found = np.clip(a.astype(np.float32) if a.dtype == BFLOAT16 else a, *bounds)
    if out is None:
        return _wrap(found)
    out._array[...] = found
    return out


def isneginf(x, out=None):
    return _wrap(np.isneginf(_ours(x).astype(np.float64)))


# ------------------------------------------------------------------ new arrays


def _new(shape, dtype):
    """Memory that nobody has written to."""
    new = np.empty(shape, dtype)
    _poison(new)
    return new


def _poison(array):
    if array.dtype.kind in "iu":
        array[...] = POISON % (1 << (8 * array.itemsize - 1))
    elif array.dtype.kind != "b":
        array[...] = math.nan


def empty(shape, dtype=float, order="C"):
    return _wrap(_new(shape, dtype))


def zeros(shape, dtype=float, order="C"):
    return _wrap(np.zeros(shape, dtype))


def ones(shape, dtype=float, order="C"):
    return _wrap(np.ones(shape, dtype))


def full(shape, fill_value, dtype=None, order="C"):
    return _wrap(np.full(shape, _host(fill_value), dtype))


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return _wrap(_new(prototype.shape if shape is None else shape, dtype or _ours(prototype).dtype))


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return _wrap(np.zeros(a.shape if shape is None else shape, dtype or _ours(a).dtype))


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    return _wrap(np.ones(a.shape if shape is None else shape, dtype or _ours(a).dtype))


def arange(start, stop=None, step=1, dtype=None):
    return _wrap(np.arange(start, stop, step, dtype) if stop is not None else np.arange(0, start, step, dtype))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    """A copy on the GPU, of an array on either side or of numbers."""
    source = obj._array if isinstance(obj, ndarray) else np.asarray(obj)
    if not isinstance(obj, ndarray):
        _not_recorded("a copy from the host")
    if source.dtype.kind not in "biufV" or (source.dtype.kind == "V" and source.dtype != BFLOAT16):
        raise ValueError(f"Unsupported dtype {source.dtype}")
    if isinstance(obj, ndarray) and not copy and dtype in (None, obj.dtype):
        return obj
    return _wrap(np.array(source, dtype, order="C" if order == "K" else order))


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    return array(a, dtype, copy=bool(copy), order=order or "K")


def ascontiguousarray(a, dtype=None):
    if isinstance(a, ndarray) and a.flags.c_contiguous and dtype in (None, a.dtype):
        return a
    return array(a, dtype, order="C")


def copyto(dst, src, casting="same_kind", where=None):
    if where is not None or not (isinstance(src, ndarray) and isinstance(dst, ndarray)):
        raise NotImplementedError("copyto: from array to array")
    np.copyto(dst._array, src._array, casting)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a, order=order)


# ------------------------------------------------------------------ what takes several arrays, or moves things


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    _not_recorded("concatenate, which copies addresses from the host,")
    return _wrap(np.concatenate([_ours(x) for x in tup], axis, dtype=dtype, casting=casting))


def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    _not_recorded("stack, which copies addresses from the host,")
    return _wrap(np.stack([_ours(x) for x in tup], axis, dtype=dtype, casting=casting))


def split(ary, indices_or_sections, axis=0):
    if isinstance(indices_or_sections, ndarray | np.ndarray):
        raise TypeError("split: the places as a list")
    return [_wrap(part, ary) for part in np.split(_ours(ary), indices_or_sections, axis)]


def take(a, indices, axis=None, out=None):
    return a.take(indices, axis)


def take_along_axis(a, indices, axis):
    ids = _ours(indices)
    return _wrap(np.take_along_axis(_ours(a), ids % a.shape[axis] if ids.size else ids, axis))


def broadcast_to(array, shape):
    return _wrap(np.broadcast_to(_ours(array), shape), array)


def expand_dims(a, axis):
    return _wrap(np.expand_dims(_ours(a), axis), a)


def meshgrid(*xi, copy=True, sparse=False, indexing="xy"):
    return [_wrap(x) for x in np.meshgrid(*map(_ours, xi), copy=copy, sparse=sparse, indexing=indexing)]


def repeat(a, repeats, axis=None):
    return a.repeat(repeats, axis)


def flatnonzero(a):
    _synchronize("flatnonzero")
    return _wrap(np.flatnonzero(_ours(a)))


def argmax(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.argmax(axis, keepdims=keepdims)


def cumsum(a, axis=None, dtype=None, out=None):
    return a.cumsum(axis, dtype)


def searchsorted(a, v, side="left", sorter=None):
    return _wrap(np.searchsorted(_ours(a), _ours(v), side))


def sort(a, axis=-1, kind=None):
    _no_16_bits("sort", a)
    return _wrap(np.sort(_ours(a), axis))


def matmul(*args, out=None):
    a, b = map(_ours, args)
    if max(a.ndim, b.ndim) > 2 and min(a.dtype.itemsize, b.dtype.itemsize) < 4:
        raise TypeError(f"matmul of {a.dtype} above two dimensions: CuPy does not use the tensor cores there")
    common = np.result_type(a.dtype, b.dtype)
    wide = np.float32 if common.itemsize < 4 and common.kind in "fV" else common
    with np.errstate(all="ignore"):
        found = np.matmul(a.astype(wide, copy=False), b.astype(wide, copy=False)).astype(common, copy=False)
    if out is None:
        return _wrap(found)
    if not np.can_cast(common, out.dtype, "same_kind"):
        raise TypeError(f"matmul: {common} into {out.dtype}")
    _ours(out)[...] = found
    return out


def einsum(*operands, **kwargs):
    subscripts, *arrays = operands
    for x in arrays:
        _no_16_bits("einsum", x)
    return _wrap(np.einsum(subscripts, *map(_ours, arrays), **kwargs))


# ------------------------------------------------------------------ streams and the GPU


class Stream:
    known: ClassVar[list] = []  # all there are
    current = None

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr, self.told, self.seen = len(Stream.known), 0, {}
        Stream.known.append(self)

    def synchronize(self):
        _synchronize("stream.synchronize")

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        for stream, count in event.told.items():
            self.seen[stream] = max(count, self.seen.get(stream, 0))

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *_):
        Stream.current = self.before

    def begin_capture(self, mode=None):
        global _recording
        if self.ptr == 0 or Stream.current is not self or _pools[-1] is None:
            raise AssertionError("a graph is recorded on a stream and with a memory pool of its own")
        _recording = Graph()

    def end_capture(self):
        global _recording
        found, _recording = _recording, None
        return found


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.behind, self.told = 0, {}

    def record(self, stream=None):
        _not_recorded("an event")
        stream = Stream.current if stream is None else stream
        self.behind, self.told = len(_stream_order), {**stream.seen, stream: stream.told}

    def synchronize(self):
        _arrive(self.behind)


class MemoryPool:
    """Asks its allocator for each array; where there is no memory, gives back what is free and asks again. The arrays
    lie elsewhere."""

    def __init__(self, allocator=None):
        self._allocator, self.given_back = allocator, 0

    def malloc(self, size):
        try:
            return self._allocator(size)
        except CUDARuntimeError:
            self.given_back += 1
            return self._allocator(size)

    def total_bytes(self):
        return 1 << 20


@contextlib.contextmanager
def using_allocator(allocator=None):
    _pools.append(allocator.__self__)
    try:
        yield
    finally:
        _pools.pop()


class Graph:
    """What was told while it was recorded."""

    launched = 0  # of all

    def __init__(self):
        self.notes, self.new, self.outside = [], [], []
        self.pool, self.given_back = _pools[-1], _pools[-1].given_back

    def note(self, function, arrays, writes):
        self.notes.append(function)
        for x in writes:
            self.new.append(x._array)
            _poison(x._array)
        for x in arrays:
            owner = x if x.base is None else x.base
            if owner._pool is not _pools[-1]:
                self.outside.append(weakref.ref(owner))

    def launch(self, stream=None):
        Graph.launched += 1
        told(self._run, ())

    def _run(self):
        if any(owner() is None for owner in self.outside):
            raise AssertionError("a graph is launched, and an array it uses is no more")
        if self.pool.given_back != self.given_back:
            raise AssertionError("a graph is launched, and its memory has been given back")
        for array in self.new:
            _poison(array)
        for function in self.notes:
            function()


# What tells of itself.
_VIEWS = ("get",)
_WRITES = ("__setitem__", "fill", "at")  # into their array


def _arrays(things):
    for thing in things:
        if isinstance(thing, ndarray):
            yield thing
        elif isinstance(thing, tuple | list):
            yield from _arrays(thing)


def _alias(thing):
    """The same memory without the array it belongs to, whose end shall be seen."""
    if isinstance(thing, ndarray):
        return _wrap(thing._array)
    return type(thing)(map(_alias, thing)) if type(thing) in (tuple, list) else thing


def _tells(function, name):
    """`function`, as something that the GPU is told to do."""

    @functools.wraps(function)
    def call(*args, **options):
        if _inside[0]:
            return function(*args, **options)
        out = options.get("out")
        if name == "ufunc" and len(args) - 1 > args[0]._function.nin:
            out = args[-1]
        reads = [*_arrays(args), *_arrays(options.values())]
        _inside[0] = True
        try:
            if out is not None or name in _WRITES:
                aliases = _alias(args), {key: _alias(value) for key, value in options.items()}
                told(_not_nested(lambda: function(*aliases[0], **aliases[1])), reads)
                return out
            found = function(*args, **options)  # in a recording for the shapes alone
            roots = [x if x.base is None else x.base for x in reads]
            new = [x for x in _arrays([found]) if x.base is None and not any(x is root for root in roots)]
            if new and _recording is not None:
                aliases = _alias(args), {key: _alias(value) for key, value in options.items()}
                targets = [x._array for x in _arrays([found])]

                def again():
                    for to, x in zip(targets, _arrays([function(*aliases[0], **aliases[1])]), strict=True):
                        to[...] = x._array

                told(_not_nested(again), reads, new)
            elif new:
                told(lambda: None, reads)
            return found
        finally:
            _inside[0] = False

    return call


_inside = [False]


def _not_nested(function):
    def run():
        before, _inside[0] = _inside[0], True
        try:
            function()
        finally:
            _inside[0] = before

    return run


def _tell_everything():
    """All functions and methods that compute or move something go through `told`."""
    for name in _PUBLIC.split():
        if inspect.isfunction(globals()[name]):
            globals()[name] = _tells(globals()[name], name)
    ufunc.__call__, ufunc.at = _tells(ufunc.__call__, "ufunc"), _tells(ufunc.at, "at")
    for name, method in list(vars(ndarray).items()):
        public = not name.startswith("_") or name in ("__getitem__", "__setitem__")
        if inspect.isfunction(method) and public and name not in _VIEWS:
            setattr(ndarray, name, _tells(method, name))


class Device:
    """The one GPU. `count` is how many there are, None where there is not even a driver."""

    count = 1
    compute_capability = "90"

    def __init__(self, device=None):
        self.id = 0 if device is None else device

    def __eq__(self, other):
        return self.id == other.id

    attributes = types.MappingProxyType({"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 227 << 10})


def device_count():
    if Device.count is None:
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime")
    return Device.count


def _modules():
    """{name: module} of all that is put into sys.modules."""

    def module(name, **contents):
        found = types.ModuleType(name)
        found.__spec__ = importlib.machinery.ModuleSpec(name, None)
        found.__path__ = []
        vars(found).update(contents)
        return found

    Stream.known.clear()
    Stream.current = Stream(null=True)
    runtime = module("cupy.cuda.runtime", getDeviceCount=device_count, CUDARuntimeError=CUDARuntimeError)
    runtime.runtimeGetVersion = lambda: 13000
    runtime.getDeviceProperties = lambda device: {"name": b"a processor that plays a GPU"}
    memory = module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError)
    cuda = module("cupy.cuda", Event=Event, Device=Device, runtime=runtime, memory=memory, Stream=Stream)
    cuda.get_current_stream = lambda device_id=-1: Stream.current
    cuda.get_elapsed_time = lambda begin, end: 1.0  # ms
    cuda.MemoryPool, cuda.using_allocator, cuda.Graph = MemoryPool, using_allocator, Graph
    cuda.Memory, cuda.MemoryPointer, Memory.refused = Memory, MemoryPointer, 0
    cuda.is_available = lambda: bool(Device.count)
    ours = {name: globals()[name] for name in _PUBLIC.split()}
    scalars = {name: getattr(np, name) for name in ("bool_", "float16", "float32", "float64", "int32", "int64")}
    constants = {"inf": np.inf, "nan": np.nan, "pi": np.pi, "newaxis": None}
    cupy = module("cupy", **ours, **_UFUNCS, **scalars, **constants, abs=_UFUNCS["absolute"], cuda=cuda)
    cupy.divide, cupy.result_type, cupy.__version__ = _UFUNCS["true_divide"], np.result_type, "14.2.0"
    cupy.get_default_memory_pool = MemoryPool
    cupy.synchronized, cupy.allow_synchronize = synchronized, allow_synchronize
    for name in ("sum", "mean", "max", "min", "any", "all"):
        setattr(cupy, name, lambda a, *args, _name=name, **options: getattr(a, _name)(*args, **options))
    special = module("cupyx.scipy.special", erfc=ufunc("erfc", np.frompyfunc(math.erfc, 1, 1)))
    special.erfc._function = _float_function(math.erfc)
    scipy = module("cupyx.scipy", special=special)
    cupyx = module("cupyx", scipy=scipy, empty_pinned=lambda shape, dtype=float, order="C": _new(shape, dtype))
    cupyx.allow_synchronize = allow_synchronize
    return {m.__name__: m for m in (cupy, cuda, runtime, memory, cupyx, scipy, special)}


class _float_function:
    """A function of a float as NumPy's ufuncs are, for float32 and float64."""

    nin = 1

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return np.vectorize(self.function, otypes=[x.dtype])(x) if x.size else x.copy()


_PUBLIC = """
ndarray ufunc where clip isneginf empty zeros ones full empty_like zeros_like ones_like arange array asarray
ascontiguousarray asnumpy concatenate stack split take take_along_axis broadcast_to expand_dims meshgrid repeat
flatnonzero argmax cumsum searchsorted sort matmul einsum copyto
"""
_tell_everything()


class OnCpu(Cpu):
    """The CPU that plays the GPU, for these arrays."""

    def launch(self, source, instance, grid, threads, arguments, shared):
        memory = tuple(a._array if isinstance(a, ndarray) else a for a in arguments)
        launch = functools.partial(super().launch, source, instance, grid, threads, memory, shared)
        told(launch, _arrays(arguments))


@contextlib.contextmanager
def installed(count=1):
    """Let `import cupy` find this, on a machine with `count` GPUs (None: without a driver)."""
    from minillm.kernels import device

    modules = _modules()
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    Device.count = count
    device._cupy.cache_clear()
    synchronized.clear()
    _stream_order.clear()
    try:
        yield modules["cupy"]
    finally:
        Device.count = 1
        device._cupy.cache_clear()
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
