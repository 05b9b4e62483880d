"""
CUDA C++ kernels: one .cu file compiled at run time for the GPU at hand, cached on disk, launched on arrays.

    source = Source("rms_norm.cu", {"forward<float>": 40})
    source.launch("forward<float>", blocks, threads, (x, y, np.int32(N), np.float32(eps)))

NVRTC is called directly, not through CuPy: the same call compiles on a machine without a GPU, which is how the tests
count the registers of every kernel, and it takes architectures that CuPy refuses (sm_90a). CuPy loads and launches.

A Source lists the instances of its templates that may be launched, with the registers each may use; so there is nothing
that a launch could ask for and the tests have not compiled. What launches is `backend`, and may be replaced: the tests
put a CPU that plays the GPU there, and so every launcher in these files runs without one.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib
import math
import os
import pathlib
import re
import tempfile
from typing import NamedTuple

import numpy as np

from .device import address, cuda, xp_of
from .jit import cache_root

FOLDER = pathlib.Path(__file__).parent
OWN_SHARED = 1 << 10  # bytes of shared memory that a kernel may have of its own where its launch brings more
GIVEN_SHARED = (48 << 10) - OWN_SHARED  # bytes that a launch may bring as it is: the limit is for both together

# The float types of the kernels, as NumPy and as CUDA C++ name them.
C_TYPES = {"float32": "float", "bfloat16": "bf16", "float16": "fp16"}
WIDEST = {"float": 4, "bf16": 8, "fp16": 8}  # elements in a 16-byte access

# With all that GPUs of this generation have, and later ones have not: the instructions for four warps at once.
HOPPER = "sm_90a"

_WITHOUT_SIZE = {int, float, bool}  # Python's numbers, which a launch refuses
_NULL = np.uintp(0)


def c_type(x):
    """The C++ name of an array's dtype. TypeError: the CUDA kernels do not take it."""
    return _c_type(x.dtype)


@functools.cache  # NumPy makes a dtype's name anew each time: 1 us, and the rest of a launch is 3
def _c_type(dtype):
    name = C_TYPES.get(dtype.name)
    if name is None:
        raise TypeError(f"the CUDA kernels take {', '.join(C_TYPES)}, and this array is {dtype}")
    return name


def contiguous(x, dtype=None):
    """x C-contiguous, in this dtype; x itself if it is that already."""
    if x.flags.c_contiguous and (dtype is None or x.dtype == dtype):
        return x
    return xp_of(x).ascontiguousarray(x, dtype)


def wide(*arrays):
    """Whether 16-byte accesses fit all these arrays: they begin at a multiple of 16 bytes, and so do the rows."""
    return all(math.gcd(16, address(x), x.shape[-1] * x.itemsize, *x.strides[:-1]) == 16 for x in arrays)


def wide_rows(*arrays):
    """Whether 16-byte accesses fit the beginning of every row of these matrices, which may end anywhere."""
    return all(math.gcd(16, address(x), x.strides[0]) == 16 for x in arrays)


class Source:
    """A .cu file of this folder, and the instances of its kernels.

    name       the file's name
    instances  {"kernel<float, 64>": registers}: the C++ name of every instance that may be launched, and the most
               registers a thread of it may use (for the tests: more would cost occupancy, or spill)
    hopper     those of them that only HOPPER has the instructions for
    """

    def __init__(self, name, instances, hopper=()):
        self.name, self.instances, self.path, self.hopper = name, instances, FOLDER / name, frozenset(hopper)

    def instances_of(self, architecture):
        """The names of those that this architecture can run."""
        return [i for i in self.instances if architecture == HOPPER or i not in self.hopper]

    def launch(self, instance, blocks, threads, arguments, shared=0):
        """Run an instance on the current stream.

        blocks     an int or a tuple of up to three: the grid
        threads    an int: the threads of a block
        arguments  arrays, whose address is passed, None for a null pointer, and NumPy scalars of the kernel's types. A
                   Python number is refused: it would be passed as 8 bytes, whatever the kernel reads
        shared     bytes of dynamic shared memory
        """
        if instance not in self.instances:
            raise KeyError(f"{self.name} has no instance {instance!r}, only {', '.join(self.instances)}")
        if instance in self.hopper and (found := backend.architecture()) != HOPPER:
            raise ValueError(f"{self.name}, {instance} needs a GPU of {HOPPER} (H100, H200); this one is {found}")
        kinds = [*map(type, arguments)]
        if not _WITHOUT_SIZE.isdisjoint(kinds):
            i = next(i for i, kind in enumerate(kinds) if kind in _WITHOUT_SIZE)
            told = f"argument {i} is {arguments[i]!r}; give its type, as np.int32(...)"
            raise TypeError(f"{self.name}, {instance}: {told}")
        grid = (*blocks, 1, 1)[:3] if isinstance(blocks, tuple) else (blocks, 1, 1)
        if 0 not in grid:
            backend.launch(self, instance, grid, threads, arguments, shared)

    def text(self):
        """The file with what it includes of this folder: what a compiled instance depends on."""
        return self.path.read_text(encoding="utf-8") + (FOLDER / "common.cuh").read_text(encoding="utf-8")


# ------------------------------------------------------------------ the two norms

# A row of at most so many elements is a warp's, in a block of 4, and a longer one a block's; so is one that 16-byte
# accesses do not fit.
_WARP = 1024


def norm_instances(registers):
    """The instances of rms_norm.cu and layer_norm.cu, of {kernel: {threads of a row: registers}}."""
    return {
        f"{kernel}<{c_type}, {weight}, {n}, {threads}>": most[threads]
        for kernel, most in registers.items()
        for c_type, widest in WIDEST.items()
        for weight in sorted({c_type, "float"})
        for n, threads in ((widest, 32), (widest, 256), (1, 256))
    } | {f"sum_partial<{c_type}>": 32 for c_type in WIDEST}


def norm_plan(kernel, x, weight, *others):
    """(instance, threads of a block, rows of a block) for rows of x, and of others that are read or written with it."""
    n = 16 // x.itemsize if wide(x, weight, *others) else 1
    threads, rows = (32, 4) if n > 1 and x.shape[-1] <= _WARP else (256, 1)
    return f"{kernel}<{c_type(x)}, {c_type(weight)}, {n}, {threads}>", rows * threads, rows


def norm_weight(x, weight):
    """The weight in x's dtype or in float32, which these kernels take beside it."""
    return contiguous(weight, None if weight.dtype == x.dtype else np.float32)


# ------------------------------------------------------------------ compiling


class Compiled(NamedTuple):
    """What NVRTC made of an instance, and what its assembler said of it."""

    code: bytes
    """the machine code, a cubin"""
    symbol: str
    """the instance's name in it"""
    registers: int
    """per thread"""
    spilled: int
    """bytes that did not fit in registers and go to memory, stores and loads"""
    stack: int
    """bytes of each thread's stack frame: arrays that are not in registers"""
    shared: int
    """bytes of static shared memory"""
    lost: str
    """what the assembler says is slower than it was written, such as products that are to overlap and can not"""


@functools.cache
def _nvrtc():
    """NVRTC's library and the folder with CUDA's headers. ImportError: they are not installed."""
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
        library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
        headers = pathfinder.find_nvidia_header_directory("cudart")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"CUDA kernels need NVRTC: pip install 'minillm-train[cuda13]' (or [cuda12]): {error}"
        ) from None
    if headers is None:
        raise ImportError("CUDA kernels need CUDA's headers: pip install 'minillm-train[cuda13]' (or [cuda12])")
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library, headers


def nvrtc_version():
    """(major, minor) of the NVRTC that compiles."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc()[0].nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def options(architecture):
    """NVRTC's options for "sm_90a" or another architecture. No fast math for a whole file: what may be approximate is
    called by name in the kernels."""
    _, headers = _nvrtc()
    return ["--std=c++17", f"--gpu-architecture={architecture}", f"-I{FOLDER}", f"-I{headers}", "--ptxas-options=-v"]


def compile_instances(source, instances, architecture):
    """{instance: Compiled} of some instances of a Source, in one program. RuntimeError: NVRTC's complaints."""
    library, _ = _nvrtc()
    program = ctypes.c_void_p()

    def check(status):
        if status:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            name = library.nvrtcGetErrorString(status).decode()
            raise RuntimeError(f"{source.name} for {architecture}: {name}\n{log.value.decode(errors='replace')}")

    def read(size_of, get):
        size = ctypes.c_size_t()
        check(size_of(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(get(program, buffer))
        return buffer.raw

    text, flags = source.path.read_bytes(), [o.encode() for o in options(architecture)]
    check(library.nvrtcCreateProgram(ctypes.byref(program), text, str(source.path).encode(), 0, None, None))
    try:
        for instance in instances:
            check(library.nvrtcAddNameExpression(program, instance.encode()))
        check(library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags)))
        log = read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog).decode(errors="replace")
        code = read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
        found = {}
        for instance in instances:
            symbol = ctypes.c_char_p()
            check(library.nvrtcGetLoweredName(program, instance.encode(), ctypes.byref(symbol)))
            symbol = symbol.value.decode()
            found[instance] = Compiled(code, symbol, **_resources(log, symbol))
        return found
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _resources(log, symbol):
    """What ptxas -v says of one function."""
    part = log.split(f"Compiling entry function '{symbol}'")[1].split("Compiling entry function")[0]

    def number(pattern):
        return sum(map(int, re.findall(pattern, part)))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill"),
        "stack": number(r"(\d+) bytes stack frame"),
        "shared": number(r"(\d+) bytes smem"),
        "lost": "; ".join(line for line in log.splitlines() if "Performance Loss" in line and f"'{symbol}'" in line),
    }


# ------------------------------------------------------------------ launching


class Gpu:
    """The GPU that CuPy's current device is."""

    def __init__(self):
        self._shared = {}  # bytes of dynamic shared memory that a function (by its address) has been allowed

    def launch(self, source, instance, grid, threads, arguments, shared):
        function = _function(source, instance, self._device())
        if shared > GIVEN_SHARED and shared > self._shared.get(function.ptr, 0):
            driver = cuda().driver
            driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            self._shared[function.ptr] = shared
        arguments = tuple([_NULL if a is None else a for a in arguments])
        function(grid, (threads, 1, 1), arguments, shared)

    def shared_limit(self):
        """Bytes of shared memory that a launch may ask for."""
        return self._attributes(self._device())["MaxSharedMemoryPerBlockOptin"] - OWN_SHARED

    def architecture(self):
        """What to compile for."""
        return _architecture(self._device())

    @staticmethod
    def _device():
        return cuda().runtime.getDevice()

    @staticmethod
    @functools.cache
    def _attributes(device):
        return cuda().Device(device).attributes


backend = Gpu()


@functools.cache
def _architecture(device):
    name = f"sm_{cuda().Device(device).compute_capability}"
    return HOPPER if name == "sm_90" else name


@functools.cache
def _function(source, instance, device):
    """An instance loaded on a device."""
    symbol, code = _compiled(source, instance, _architecture(device))
    module = cuda().function.Module()
    module.load(code)
    return module.get_function(symbol.decode())


def _compiled(source, instance, architecture):
    """(symbol, machine code) of an instance: from the disk, or made and put there."""
    key = repr((source.text(), instance, options(architecture), nvrtc_version()))
    path = cache_root() / f"cuda-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    try:
        symbol, code = path.read_bytes().split(b"\n", 1)
    except OSError:
        compiled = compile_instances(source, [instance], architecture)[instance]
        symbol, code = compiled.symbol.encode(), compiled.code
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(symbol + b"\n" + code)
        os.replace(file.name, path)  # whole or not there, whoever else compiles the same
    return symbol, code


def compile_ahead(sources):
    """Compile all instances of some Sources for the GPU at hand, on all cores, so that no launch waits for one. In
    threads: NVRTC does not hold Python's lock."""
    architecture = backend.architecture()
    _nvrtc()  # once, before the threads want it
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = [(source, instance) for source in sources for instance in source.instances_of(architecture)]
        list(pool.map(lambda which: _compiled(*which, architecture), wanted))
