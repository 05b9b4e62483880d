"""
CUDA kernels without a GPU: `with on_cpu(): kernel.version("cuda")(*arrays)` runs a launcher and its .cu file on NumPy
arrays. g++ compiles each instance that is asked for, with cuda_on_cpu.h before it, which says what is checked.

Around a launch, the memory of every argument is moved to where a page follows that can not be touched, and moved back
afterwards; new arrays (np.empty) are full of NaN; and the arguments' types are compared with the kernel's parameters.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from minillm.kernels import cuda
from minillm.kernels.jit import cache_root

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
COMPILER = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
ALIGNMENT = 128  # as an allocation of the GPU has, and more than any access needs


class Cpu:
    """What plays the GPU. Give it to `on_cpu`.

    order  "forward", "reversed" or a seed: how the threads of a block take turns; blocks, too, run from the last one on
           where it is "reversed"
    edits  {file name: [(old, new), ...]}: faults to plant in the sources; each old text must stand there exactly once
    """

    def __init__(self, order="forward", edits=None, shared_limit=226 << 10):
        self.order, self.edits = order, edits or {}
        self._shared_limit = shared_limit
        self.launched = []  # (file name, instance) of every launch

    def shared_limit(self):
        return self._shared_limit

    def architecture(self):
        return cuda.HOPPER

    def texts(self, source):
        """The source and common.cuh, with their faults."""
        return self._text(source.path), self._text(cuda.FOLDER / "common.cuh")

    def _text(self, path):
        text = path.read_text(encoding="utf-8")
        for old, new in self.edits.get(path.name, ()):
            if text.count(old) != 1:
                raise ValueError(f"{path.name} has {old!r} {text.count(old)} times; a fault is planted in one place")
            text = text.replace(old, new)
        return text

    def launch(self, source, instance, grid, threads, arguments, shared):
        if shared > self._shared_limit:
            raise ValueError(
                f"{source.name}, {instance}: {shared} bytes of shared memory; {self._shared_limit} there are"
            )
        self.launched.append((source.name, instance))
        run, signature = _load(*self.texts(source), instance)
        check_arguments(source, instance, signature, arguments)
        with _fenced([a for a in arguments if isinstance(a, np.ndarray)]) as address_of:
            values = [_value(a, address_of) for a in arguments]
            pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
            order = np.arange(threads, dtype=np.uint32)
            if self.order == "reversed":
                order = order[::-1].copy()
            elif self.order != "forward":
                np.random.default_rng(self.order).shuffle(order)
            grid = (ctypes.c_uint * 3)(*map(int, grid))
            reversed_blocks = self.order == "reversed"
            told = run(grid, threads, shared, order.ctypes.data, reversed_blocks, pointers)
        if told:
            raise RuntimeError(f"{source.name}, {instance}: {told.decode()}")


@contextlib.contextmanager
def on_cpu(backend=None):
    """Context manager: CUDA launchers run on the CPU, on NumPy arrays. Gives the backend."""
    backend, before, empty = backend or Cpu(), cuda.backend, np.empty
    cuda.backend, np.empty = backend, _poisoned
    try:
        yield backend
    finally:
        cuda.backend, np.empty = before, empty


def _poisoned(shape, dtype=float, **options):
    array = np.ndarray(shape, dtype, **options)
    array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN in every float type
    return array


def check_arguments(source, instance, signature, arguments):
    """TypeError where a launcher's arguments are not of the kernel's types."""
    if len(signature) != len(arguments):
        raise TypeError(f"{source.name}, {instance} takes {len(signature)} arguments, and got {len(arguments)}")
    for i, (wanted, argument) in enumerate(zip(signature, arguments, strict=True)):
        if argument is None and wanted.endswith("*"):
            continue
        got = argument.dtype.name + ("*" if isinstance(argument, np.ndarray) else "")
        if got != wanted:
            raise TypeError(f"{source.name}, {instance}: argument {i} is {got}, the kernel's parameter is {wanted}")


# ------------------------------------------------------------------ compiling


def prepare(source, instances, backend=None):
    """Compile several instances at once, on all cores, before they are needed."""
    texts = (backend or Cpu()).texts(source)
    _folder()  # once, before the threads want it
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda instance: _library(*texts, instance), instances))


@functools.cache
def _load(text, common, instance):
    library = ctypes.CDLL(str(_library(text, common, instance)))
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_bool,
        ctypes.c_void_p,
    ]
    library.signature.restype = ctypes.c_char_p
    return library.run, library.signature().decode().split()


@functools.cache
def _folder():
    """Where compiled instances are kept, with the header compiled beforehand: most of what an instance would cost."""
    header = HEADER.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([*COMPILER, header]).encode()).hexdigest()[:16]
    folder = cache_root() / f"on-cpu-{key}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_root()) as made:
            Path(made, HEADER.name).write_text(header, encoding="utf-8")
            _compile(["-x", "c++-header", HEADER.name, "-o", f"{HEADER.name}.gch"], made, HEADER.name)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(made, folder)
                Path(made).mkdir()
    return folder


def _compile(arguments, folder, what):
    run = subprocess.run([*COMPILER, *arguments], capture_output=True, text=True, check=False, cwd=folder)
    if run.returncode:
        raise RuntimeError(f"g++ does not compile {what}:\n{run.stderr[:4000]}")


def _library(text, common, instance):
    """The shared library of one instance, from the disk where it was compiled before."""
    wrapper = f"""
static void start(void* arguments) {{ on_cpu::call({instance}, static_cast<void**>(arguments)); }}
extern "C" const char* signature() {{ return on_cpu::signature({instance}); }}
extern "C" const char* run(const unsigned* grid, unsigned threads, size_t shared, const unsigned* order, bool reversed,
                           void* arguments) {{
    return on_cpu::launch(grid, threads, shared, order, reversed, start, arguments);
}}
"""
    parts = {"common.cuh": common, "kernel.cu": text.replace('#include "common.cuh"', ""), "wrapper": wrapper}
    path = _folder() / f"{hashlib.sha256(chr(0).join(parts.values()).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        name = f"{path.stem}-{os.getpid()}"
        source = path.with_name(f"{name}.cpp")
        source.write_text("".join(f'#line 1 "{k}"\n{v}' for k, v in parts.items()), encoding="utf-8")
        try:
            _compile(["-include", HEADER.name, source.name, "-o", f"{name}.so"], path.parent, instance)
        finally:
            source.unlink()
        os.replace(path.with_name(f"{name}.so"), path)
    return path


# ------------------------------------------------------------------ memory with fences


def _value(argument, address_of):
    """One value of a kernel's parameter, in memory of its own."""
    if argument is None:
        return np.zeros(1, np.uintp)
    if isinstance(argument, np.ndarray):
        return np.array([address_of(argument)], np.uintp)
    return np.array([argument])


@contextlib.contextmanager
def _fenced(arrays):
    """Move the arrays' memory between fences, and back at the end; gives address_of(array). Arrays that share memory
    share it there, too."""
    ranges = []
    for low, high in sorted(np.lib.array_utils.byte_bounds(x) for x in arrays if x.size):
        if ranges and low < ranges[-1][1]:
            ranges[-1][1] = max(high, ranges[-1][1])
        else:
            ranges.append([low, high])
    moved = [(low, high, _Fence(low, high - low)) for low, high in ranges]

    def address_of(array):
        at = array.ctypes.data
        return next((at - low + fence.address for low, high, fence in moved if low <= at < high), at)

    try:
        yield address_of
        for low, high, fence in moved:
            if not fence.whole():
                raise RuntimeError("a kernel has written before or behind an array")
            ctypes.memmove(low, fence.address, high - low)
    finally:
        for _, _, fence in moved:
            fence.close()


class _Fence:
    """A copy of `size` bytes whose end is the end of a page, with one behind it that can not be touched. Its address
    has the remainder by 16 that the original's has, on which the choice of a kernel depends; what that leaves free
    before and behind it is full of NaN."""

    def __init__(self, low, size):
        self.mapped = -(-(size + 15) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.base = _libc().mmap(None, self.mapped + mmap.PAGESIZE, 3, 0x22, -1, 0)  # read, write; private, anonymous
        if self.base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("no memory to fence an array in")
        _libc().mprotect(self.base + self.mapped, mmap.PAGESIZE, 0)
        end = self.base + self.mapped
        self.address = end - size - (end - size - low) % 16
        ctypes.memset(self.base, 0xFF, self.mapped)
        ctypes.memmove(self.address, low, size)
        self.around = ((self.base, self.address - self.base), (self.address + size, end - self.address - size))

    def whole(self):
        return all(set(ctypes.string_at(at, size)) <= {0xFF} for at, size in self.around)

    def close(self):
        _libc().munmap(self.base, self.mapped + mmap.PAGESIZE)


@functools.cache
def _libc():
    libc = ctypes.CDLL(None)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = pointer, [pointer, size, number, number, number, ctypes.c_long]
    libc.mprotect.argtypes, libc.munmap.argtypes = [pointer, size, number], [pointer, size]
    return libc
