"""
CUDA graphs: what a function tells the GPU to do, recorded once and from then on launched as one.

    graph = Graph(function)
    loss, norm = graph(tokens, targets)     NumPy arrays in, arrays on the GPU out

An update of a small model is a few hundred kernels of a few microseconds each, and Python is expected to need longer to
ask for them than a GPU to run them (not measured yet). A recorded update costs one copy of its inputs and one launch.

What is recorded is the order of kernels, their addresses and their numbers, not the Python that asked for them. So
    * inputs lie in memory of the graph's own, and each call copies into it;
    * whatever changes from call to call is in an input: a number that Python passes to a kernel stays what it was;
    * all that is allocated meanwhile comes from a memory pool of the graph's own, which nobody else can be given when
      Python has let go of the arrays; and what the function uses besides has to stay where it is;
    * nothing in it may look at the GPU's results or read the host's memory.
Every call computes. The first with inputs of some shapes runs as usual, which compiles and loads what it needs; the
second is recorded and launched; all later ones are launched. Other shapes are other recordings, which share the pool,
as no two run at once. If the GPU's memory is full, the pool frees blocks that recordings work in: all recordings are
then dropped, and made again.
"""

import contextlib

import numpy as np

from .device import already_checked, beside, cuda, to_device

ALIGNMENT = 256  # bytes: of each input in the memory they share, as of an allocation of CuPy's


class Graph:
    """function(*arrays) -> a tuple of arrays, all on the GPU, as a function of NumPy arrays.

    What it returns is overwritten by the next call: copy what is needed longer (`device.later` does). Nothing checks
    ids in here (`check_ids`): check them on the host.
    """

    def __init__(self, function):
        self._function, self._calls, self._full = function, {}, False
        self._stream, self._pool = cuda().Stream(non_blocking=True), cuda().MemoryPool(self._allocate)

    def __call__(self, *inputs):
        key = tuple((x.shape, x.dtype.str) for x in inputs)
        if calls := self._calls.get(key):
            calls.take(inputs)
            if calls.recorded is None:
                with self._own_stream() as stream:
                    calls.record(self._function, stream)
            if calls.recorded is not None:
                calls.recorded.launch()
                return calls.outputs
        calls = calls or _Calls(inputs)  # the first of its shape, or the memory was too full to record it
        with self._own_stream():
            outputs = self._function(*calls.inputs)
        self._calls[key] = calls  # now that all is loaded: a call that fails is a first one again
        return outputs

    def memory(self):
        """Bytes of the GPU that the graph has for itself."""
        return self._pool.total_bytes()

    def _allocate(self, size):
        """Memory from the GPU, for the pool: it asks where it has none of this size, and again when it was refused and
        has given back all of its own that is free. Its size does not tell that: it may be larger afterwards."""
        try:
            return cuda().MemoryPointer(cuda().Memory(size), 0)
        except cuda().runtime.CUDARuntimeError:
            self._full = True
            raise

    @contextlib.contextmanager
    def _own_stream(self):
        """Context manager: work goes to the graph's stream, with its memory, after all that the current stream has been
        asked for and before all that it will be. The current one may be the null stream, which can not be recorded."""
        current = cuda().get_current_stream()
        self._stream.wait_event(current.record())
        try:
            with self._stream, cuda().using_allocator(self._pool.malloc), already_checked():
                yield self._stream
        finally:
            current.wait_event(self._stream.record())
            if self._full:  # also of what was recorded in here, before
                for calls in self._calls.values():
                    calls.recorded = calls.outputs = None
                self._full = False


class _Calls:
    """The calls with inputs of one shape: where the inputs lie, and once it is recorded, the graph and its outputs."""

    def __init__(self, inputs):
        self._places, end = [], 0
        for x in inputs:
            self._places.append(slice(end, end + x.nbytes))
            end += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        self._size = end
        self._memory = to_device(self._packed(inputs), "cuda")
        views = zip(self._places, inputs, strict=True)
        self.inputs = [self._memory[place].view(x.dtype).reshape(x.shape) for place, x in views]
        self.recorded = self.outputs = None

    def take(self, inputs):
        """Other values, in one copy."""
        self._memory[...] = beside(self._packed(inputs), self._memory)

    def record(self, function, stream):
        stream.begin_capture()
        try:
            outputs = function(*self.inputs)
        except BaseException:  # a stream that is left recording could do nothing else any more
            with contextlib.suppress(Exception):  # what went wrong first is what has to be told
                stream.end_capture()
            raise
        self.recorded, self.outputs = stream.end_capture(), outputs

    def _packed(self, inputs):
        packed = np.zeros(self._size, np.uint8)
        for place, x in zip(self._places, inputs, strict=True):
            packed[place] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        return packed
