"""The product of two matrices, on the host, on a GPU where there is one, and on a cublasLt of our own on the CPU.

That one is a library of C functions with the header's prototypes, made here. It reads what it is given as NVIDIA's
documentation defines it: matrices column by column, with a leading dimension, ops N and T, alpha, beta, a compute type.
"""

import ctypes
import itertools
import types
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minillm import functional as F
from minillm.autograd import Tensor, checkpoint, op
from minillm.kernels import blas, device

BF16 = np.dtype(ml_dtypes.bfloat16)
POISON = 12345.0

# ------------------------------------------------------------------ arrays that play those on a GPU


class OnDevice(np.ndarray):
    """A host array with the attributes by which blas.py finds the memory of CuPy's."""

    data = property(lambda self: types.SimpleNamespace(ptr=self.__array_interface__["data"][0]))
    device = types.SimpleNamespace(id=0)


class FakeCuPy:
    """NumPy, whose new arrays are OnDevice ones. Counts them, and fills what is not initialised with NaN."""

    def __init__(self):
        self.memory, self.used = np.empty(96 << 20, np.uint8), 0
        self.made, self.products, self.stream = 0, 0, 7 << 40  # a pointer that 32 bits do not hold
        self.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=self.stream))

    def __getattr__(self, name):
        def function(*args, **kwargs):
            return self.put(getattr(np, name)(*args, **kwargs))

        return function

    def empty(self, shape, dtype):
        array = self.put(np.empty(shape, dtype))
        if array.dtype.itemsize > 1:  # not the workspace
            array.fill(np.nan)
        return array

    def put(self, array):
        """A copy at an address that is a multiple of 512, as CuPy's are."""
        self.made += 1
        first = self.used - (self.memory.ctypes.data + self.used) % -512
        self.used = first + array.nbytes
        assert self.used <= self.memory.nbytes
        copy = self.memory[first : self.used].view(array.dtype).reshape(array.shape).view(OnDevice)
        copy[...] = array
        return copy

    def matmul(self, x, y, out=None):
        self.products += 1
        return np.matmul(x, y, out=out)


# ------------------------------------------------------------------ cublasLt on the CPU

P, I, S, U64, I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_int64
PROTOTYPES = {  # as in cublasLt.h, all returning a cublasStatus_t
    "cublasLtCreate": (P,),
    "cublasLtMatmulDescInit_internal": (P, S, I, I),
    "cublasLtMatmulDescSetAttribute": (P, I, P, S),
    "cublasLtMatrixLayoutInit_internal": (P, S, I, U64, U64, I64),
    "cublasLtMatmulPreferenceInit_internal": (P, S),
    "cublasLtMatmulPreferenceSetAttribute": (P, I, P, S),
    "cublasLtMatmulAlgoGetHeuristic": (P, P, P, P, P, P, P, I, P, P),
    "cublasLtMatmul": (P, P, P, P, P, P, P, P, P, P, P, P, P, P, S, P),
}
STATUS = {0: "SUCCESS", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 13: "EXECUTION_FAILED", 15: "NOT_SUPPORTED"}
TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16), 14: BF16}  # CUDA_R_...
# (compute type, scale type, type of A and B) -> types of C and D: the documentation's table for cublasLtMatmul
SUPPORTED = {(68, 0, 0): (0,), (68, 0, 2): (0, 2), (68, 0, 14): (0, 14), (70, 1, 1): (1,)}
DESC, LAYOUT, PREFERENCE, ALGORITHM, HANDLE = 0xD, 0x1A, 0x9F, 0xA1, 0x7E57 << 32


class Refused(Exception):
    """A status that is not success."""


def words(address, n=32):
    return (ctypes.c_uint64 * n).from_address(address)


def require(condition, status=7):
    if not condition:
        raise Refused(status)


class FakeCublasLt:
    """The functions above. While `guarded` they touch nothing outside `memory`; `fails` {function: its status}."""

    def __init__(self, memory):
        self.guarded = True
        self.memory, self.calls, self.fails, self.workspaces, self.streams = memory, [], {}, set(), set()
        self.found, self.state = 1, 0  # algorithms of the heuristic, and the state of the first
        for name, argtypes in PROTOTYPES.items():
            setattr(self, name, ctypes.CFUNCTYPE(I, *argtypes)(self._with_status(name)))

    def _with_status(self, name):
        def function(*arguments):
            self.calls.append(name)
            try:
                require(name not in self.fails, self.fails.get(name))
                getattr(self, name.removeprefix("cublasLt").removesuffix("_internal"))(*arguments)
            except Refused as error:
                return error.args[0]
            return 0

        return function

    def cublasLtGetStatusName(self, status):
        return f"CUBLAS_STATUS_{STATUS[status]}".encode()

    def Create(self, handle):
        words(handle, 1)[0] = HANDLE

    def MatmulDescInit(self, at, size, compute, scale):
        require(size >= 32 * 8, 3)
        words(at)[:5] = DESC, compute, scale, 0, 0

    def MatmulDescSetAttribute(self, at, attribute, value, size):
        require(words(at)[0] == DESC and attribute in (3, 4) and size == 4)
        words(at)[attribute] = ctypes.c_int32.from_address(value).value

    def MatrixLayoutInit(self, at, size, kind, rows, columns, ld):
        require(size >= 14 * 8, 3)
        require(kind in TYPES and rows > 0 and columns > 0 and ld >= rows)
        words(at)[:5] = LAYOUT, kind, rows, columns, ld

    def MatmulPreferenceInit(self, at, size):
        require(size >= 12 * 8, 3)
        words(at)[:9] = PREFERENCE, 0, 0, 7, 0, 256, 256, 256, 256

    def MatmulPreferenceSetAttribute(self, at, attribute, value, size):
        require(words(at)[0] == PREFERENCE and attribute in (1, 3, 5, 6, 7, 8) and size == (8 if attribute == 1 else 4))
        words(at)[attribute] = (U64 if attribute == 1 else ctypes.c_uint32).from_address(value).value

    def _problem(self, handle, desc, *layouts):
        """([compute, scale, op A, op B], [type, rows, columns, ld] of A, B, C, D), if they go together."""
        desc, layouts = words(desc)[:5], [words(layout)[:5] for layout in layouts]
        require(handle == HANDLE and desc[0] == DESC and all(layout[0] == LAYOUT for layout in layouts))
        (_, compute, scale, op_a, op_b), (a, b, c, d) = desc, ([*layout[1:]] for layout in layouts)
        require(c == d and {op_a, op_b} <= {0, 1})
        (m, k), (k2, n) = (x[1:3] if op == 0 else x[2:0:-1] for op, x in ((op_a, a), (op_b, b)))
        require(k == k2 and d[1:3] == [m, n])
        require(a[0] == b[0] and d[0] in SUPPORTED.get((compute, scale, a[0]), ()), 15)
        return (compute, scale, op_a, op_b), (a, b, c, d)

    def MatmulAlgoGetHeuristic(self, handle, desc, a, b, c, d, preference, wanted, results, count):
        problem = self._problem(handle, desc, a, b, c, d)
        require(words(preference)[0] == PREFERENCE and wanted == 1)
        words(results, 9)[:] = [
            ALGORITHM,
            *words(preference)[5:9],
            words(preference)[3],
            hash(str(problem)) % 2**63,
            0,
            64,
        ]
        ctypes.c_int.from_address(results + 72).value = self.state
        ctypes.c_int.from_address(count).value = self.found

    def Matmul(self, handle, desc, alpha, a, of_a, b, of_b, beta, c, of_c, d, of_d, algorithm, workspace, size, stream):
        problem = self._problem(handle, desc, of_a, of_b, of_c, of_d)
        (compute, scale, *ops), layouts = problem
        algorithm = words(algorithm, 8)[:]
        require(algorithm[0] == ALGORITHM and algorithm[6] == hash(str(problem)) % 2**63)
        require(not any(p % n for p, n in zip((a, b, c, d, workspace), (*algorithm[1:5], 16), strict=True)))
        require(size >= 64)
        (ctypes.c_char * size).from_address(workspace)[:64] = b"x" * 64
        self.workspaces.add((workspace, size))
        self.streams.add(stream)
        alpha, beta = (TYPES[scale].type(np.ctypeslib.as_array((ctypes.c_uint8 * TYPES[scale].itemsize).from_address(p))
                       .view(TYPES[scale])[0]) for p in (alpha, beta))  # fmt: skip
        a, b, c, d = (self._columns(p, *layout) for p, layout in zip((a, b, c, d), layouts, strict=True))
        a, b = (x.T if op else x for x, op in zip((a, b), ops, strict=True))
        a, b = (x.astype(np.float64 if compute == 70 else np.float32) for x in (a, b))
        product = alpha * (a @ b)
        if (
            algorithm[5] & 5 and d.dtype.itemsize < 4
        ):  # INPLACE or OUTPUT_TYPE allowed: parts of the sum meet in 16 bits
            half = a.shape[1] // 2
            product = sum((alpha * (a[:, part] @ b[part])).astype(d.dtype) for part in (slice(half), slice(half, None)))
        d[...] = (product if beta == 0 else product + beta * c).astype(d.dtype)  # for beta = 0 C is not read

    def _columns(self, address, kind, rows, columns, ld):
        """The column-major matrix that lies there."""
        dtype, first = TYPES[kind], self.memory.ctypes.data
        size = (ld * (columns - 1) + rows) * dtype.itemsize
        require(not self.guarded or first <= address <= first + self.memory.nbytes - size)
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8).view(dtype)
        return np.lib.stride_tricks.as_strided(memory, (rows, columns), (dtype.itemsize, ld * dtype.itemsize))


def use(module, library):
    """`module`, blas.py or a faulty twin of it, on a library that is given or on none, without memories."""
    for cached in (module.load, module._open, module._workspace, module._plan):
        getattr(cached, "cache_clear", lambda: None)()
    module.load = library if callable(library) else lambda: library
    return module


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy and a cublasLt that compute on the CPU."""
    cupy = FakeCuPy()
    cupy.library = FakeCublasLt(cupy.memory)
    monkeypatch.setattr(device, "_on_host", lambda x: not isinstance(x, OnDevice))
    monkeypatch.setattr(device, "_cupy", lambda: cupy)
    load = blas.load
    use(blas, cupy.library)
    yield cupy
    blas.load = load
    use(blas, load)


# ------------------------------------------------------------------ every case against float64

SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 4), (5, 3, 1), (6, 7, 5), (16, 24, 8), (0, 3, 2), (2, 0, 3), (2, 3, 0)]
KINDS = [
    (np.float32, None),
    (np.float64, None),
    (np.float16, None),
    (BF16, None),
    (np.float16, np.float32),
    (BF16, np.float32),
]
KINDS += [(np.float32, np.float64)]  # which cublasLt does not have
INPUTS = ["rows", "transposed", "columns of a wider one", "transposed rows of a wider one", "every other column"]
OUTPUTS = ["new", "rows", "columns of a wider one", "at an odd place", "transposed"]


def arranged(values, how):
    """(an array of these values, the memory around it, which holds POISON)."""
    rows, columns = values.shape
    shapes = {
        "rows": ((rows, columns), lambda m: m),
        "transposed": ((columns, rows), lambda m: m.T),
        "columns of a wider one": ((rows, columns + 5), lambda m: m[:, 2 : 2 + columns]),
        "transposed rows of a wider one": ((columns, rows + 3), lambda m: m[:, :rows].T),
        "every other column": ((rows, 2 * columns), lambda m: m[:, ::2]),
        "at an odd place": ((rows * columns + 1,), lambda m: m[1:].reshape(rows, columns)),
    }
    shape, view = shapes[how]
    memory = np.full(shape, POISON, values.dtype)
    view(memory)[...] = values
    return view, memory


def check(multiply, place, fetch, kind, wide, sizes, x_how, y_how, out_how, add, seed=0):
    """One product, computed where `place` puts an array, against float64: rounded once, and nothing else touched."""
    (M, K, N), rng = sizes, np.random.default_rng(seed)
    x, y = rng.standard_normal((M, K)).astype(kind), rng.standard_normal((K, N)).astype(kind)
    exact, size = x.astype(np.float64) @ y.astype(np.float64), np.abs(x.astype(float)) @ np.abs(y.astype(float))
    dtype = np.dtype(wide or kind)
    (x_of, x_memory), (y_of, y_memory) = arranged(x, x_how), arranged(y, y_how)
    x_place, y_place = place(x_memory), place(y_memory)
    if out_how == "new":
        z = fetch(multiply(x_of(x_place), y_of(y_place), dtype=wide))
    else:
        before = (rng.standard_normal if add else lambda shape: np.full(shape, np.nan))((M, N)).astype(dtype)
        out_of, memory = arranged(before, out_how)
        memory_place = place(memory)
        out = out_of(memory_place)
        assert multiply(x_of(x_place), y_of(y_place), out, add=add) is out
        memory_after = fetch(memory_place)
        z = out_of(memory_after).copy()
        out_of(memory)[...], out_of(memory_after)[...] = 0, 0
        assert np.array_equal(memory, memory_after), "something beside out was written"
        if add:
            exact, size = exact + before.astype(np.float64), size + np.abs(before.astype(np.float64))
    assert z.shape == (M, N) and z.dtype == dtype
    assert np.array_equal(fetch(x_place), x_memory) and np.array_equal(fetch(y_place), y_memory)
    once = ml_dtypes.finfo(dtype).eps / 2 * np.abs(exact)
    rounding = (1e-15 if kind == np.float64 else 1e-7) * (K + 2) * size + 1e-7 * (dtype.itemsize < 4)
    assert (np.abs(z.astype(np.float64) - exact) <= 1.01 * once + rounding).all()


def grid(sizes=SIZES, kinds=KINDS):
    outputs = [("new", False), *itertools.product(OUTPUTS[1:], (False, True))]
    ways = list(itertools.product(INPUTS, INPUTS, outputs))
    for i, (shape, (kind, wide)) in enumerate(itertools.product(sizes, kinds)):
        for x_how, y_how, (out_how, add) in ways[i % 15 :: 15]:  # each way with several shapes and dtypes
            yield kind, wide, shape, x_how, y_how, out_how, add


def test_every_case_on_the_host():
    for case in grid():
        check(blas.multiply, lambda m: m.copy(), lambda m: m.copy(), *case)


def from_device(array):
    return np.array(array).view(np.ndarray)


def check_on_device(cupy, multiply, cases):
    """Each case, and that it was cublasLt that computed it wherever it can."""
    for case in cases:
        before = cupy.library.calls.count("cublasLtMatmul")
        check(multiply, cupy.put, from_device, *case)
        _, wide, (M, K, N), *_, out_how, _ = case
        theirs = M * K * N > 0 and wide != np.float64 and (out_how != "transposed" or 1 in (M, N))
        assert cupy.library.calls.count("cublasLtMatmul") - before == theirs


def test_every_case_through_cublaslt(cupy):
    check_on_device(cupy, blas.multiply, grid())
    assert cupy.library.streams == {cupy.stream}


def test_every_case_on_a_gpu():
    try:
        xp = device._cupy()
        available = xp.cuda.is_available()
    except ImportError:
        available = False
    if not available:
        pytest.skip("no GPU")
    for case in grid():
        check(blas.multiply, xp.asarray, device.to_host, *case)


FAULTS = [
    ("a, b, d = y.data.ptr, x.data.ptr, out.data.ptr", "a, b, d = x.data.ptr, y.data.ptr, out.data.ptr", "x first"),
    ("(y_layout, x_layout, to), (_al", "(x_layout, y_layout, to), (_al", "m and n swapped"),
    ("return OP_N, columns, rows,", "return OP_N, rows, columns,", "rows and columns swapped"),
    ("columns, rows, down // size if rows > 1 else columns", "columns, rows, columns", "ld is the width"),
    ("rows, columns, across // size if columns > 1 else rows", "rows, columns, rows", "ld of a transposed view"),
    ("down // size if rows > 1", "down if rows > 1", "ld in bytes"),
    ("return OP_T, rows, columns,", "return OP_N, rows, columns,", "wrong op of a transposed view"),
    ("return OP_N, columns, rows,", "return OP_T, columns, rows,", "wrong op of rows"),
    ("DESC_TRANSA, DESC_TRANSB = 3, 4", "DESC_TRANSA, DESC_TRANSB = 4, 3", "the ops of A and B swapped"),
    ("(ONE if add else ZERO)[exact]", "ZERO[exact]", "beta forgotten"),
    ("(ONE if add else ZERO)[exact]", "ONE[exact]", "added where it should not be"),
    ("inputs = ONE[exact], a", "inputs = ONE[False], a", "alpha of the wrong type"),
    ("min(address & -address, 256)", "256", "alignment taken for granted"),
    ('"float16": 2, "bfloat16": 14}', '"float16": 2, "bfloat16": 2}', "bfloat16 read as float16"),
    ("REDUCTION_SCHEME_COMPUTE_TYPE = 2", "REDUCTION_SCHEME_COMPUTE_TYPE = 7", "parts of a sum meet in 16 bits"),
    ("zip((kind, kind, out_kind), layouts", "zip((kind, kind, kind), layouts", "a float32 result in 16-bit memory"),
    ("to is None or to[0] != OP_N", "to is None", "a transposed out written by rows"),
    ("if xp is np or add or dtype != x.dtype:", "if xp is np or add:", "a wide result of a narrow product"),
    ("if xp is np or add or dtype != x.dtype:", "if xp is np or dtype != x.dtype:", "rounded before it is added"),
]


@pytest.mark.parametrize(("old", "new", "fault"), FAULTS, ids=[f[2] for f in FAULTS])
def test_a_planted_fault_is_caught(cupy, old, new, fault):
    source = Path(blas.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    faulty = types.ModuleType("minillm.kernels.faulty")
    faulty.__package__ = "minillm.kernels"
    exec(compile(source.replace(old, new), "faulty", "exec"), faulty.__dict__)
    use(faulty, cupy.library)
    with pytest.raises((AssertionError, RuntimeError)):
        check_on_device(cupy, faulty.multiply, grid([(6, 7, 5), (3, 40, 4)]))


# ------------------------------------------------------------------ what a call costs, and what goes wrong


def arrays(cupy, *shapes, dtype=np.float32):
    rng = np.random.default_rng(1)
    return [cupy.put(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def test_a_call_that_was_seen_before_allocates_nothing_and_is_one_call(cupy):
    x, y, out = arrays(cupy, (6, 7), (7, 5), (6, 5))
    blas.multiply(x, y, out)
    cupy.library.calls.clear()
    made = cupy.made
    for add in (False, True):  # beta is not part of what is kept
        blas.multiply(x, y, out, add=add)
    assert cupy.library.calls == ["cublasLtMatmul"] * 2
    assert cupy.made == made
    assert np.allclose(out, 2 * (np.array(x) @ np.array(y)), rtol=1e-5)


def test_each_stream_has_its_workspace_and_each_device_one_handle(cupy):
    x, y = arrays(cupy, (6, 7), (7, 5))
    for stream in (0, 5, 0, 5):
        cupy.stream = stream
        blas.multiply(x, y)
        blas.multiply(y.T, x.T)
    assert cupy.library.streams == {None, 5}  # NULL is the default stream
    assert len(cupy.library.workspaces) == 2
    assert {size for _, size in cupy.library.workspaces} == {32 << 20}
    assert cupy.library.calls.count("cublasLtCreate") == 1


def test_without_the_library_it_is_cupys_matmul_and_one_warning(cupy):
    def load():
        raise ImportError("No module named 'cuda'")

    use(blas, load)
    with pytest.warns(
        RuntimeWarning, match=r"no cublasLt \(No module named 'cuda'\): products go through CuPy's"
    ) as seen:
        for case in grid([(6, 7, 5)]):
            check(blas.multiply, cupy.put, from_device, *case)
    assert len(seen) == 1
    assert cupy.library.calls == []
    assert cupy.products > 0


@pytest.mark.parametrize("function", ["cublasLtCreate", "cublasLtMatmulAlgoGetHeuristic"])
def test_what_the_library_can_not_do_is_cupys_matmul(cupy, function):
    cupy.library.fails[function] = 15
    x, y, out = arrays(cupy, (6, 7), (7, 5), (6, 5))
    if function == "cublasLtCreate":
        with pytest.warns(RuntimeWarning, match="cublasLtCreate: CUBLAS_STATUS_NOT_SUPPORTED"):
            blas.multiply(x, y, out)
    else:
        blas.multiply(x, y, out)
    assert cupy.products == 1
    assert np.allclose(out, np.array(x) @ np.array(y), rtol=1e-5)


@pytest.mark.parametrize(("found", "state"), [(0, 0), (1, 15)])  # none found, or one whose state says that it is none
def test_no_algorithm_is_cupys_matmul(cupy, found, state):
    cupy.library.found, cupy.library.state = found, state
    x, y, out = arrays(cupy, (6, 7), (7, 5), (6, 5))
    blas.multiply(x, y, out)
    assert cupy.products == 1 and "cublasLtMatmul" not in cupy.library.calls
    assert np.allclose(out, np.array(x) @ np.array(y), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cublasLtMatmulDescSetAttribute", "cublasLtMatmulDescSetAttribute: CUBLAS_STATUS_EXECUTION_FAILED"),
        (
            "cublasLtMatmulAlgoGetHeuristic",
            "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_EXECUTION_FAILED for float32 -> float32, "
            "(op, rows, columns, ld) = ((0, 5, 7, 5), (1, 6, 7, 6), (0, 5, 6, 5))",
        ),
        (
            "cublasLtMatmul",
            "cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED for float32 (6, 7) times (7, 5) -> float32",
        ),
    ],
)
def test_an_error_is_one_line_with_the_status_and_the_shapes(cupy, function, message):
    cupy.library.fails[function] = 13
    x, y = arrays(cupy, (7, 6), (7, 5))
    with pytest.raises(RuntimeError) as error:
        blas.multiply(x.T, y)
    assert str(error.value) == message


def test_arguments_that_do_not_go_together_are_refused():
    x, y = np.ones((2, 3)), np.ones((3, 4))
    for arguments, keywords, message in (
        ((x, y.T), {}, r"float64 \(2, 3\) does not go with float64 \(4, 3\)"),
        ((x, y.astype(np.float32)), {}, r"float64 \(2, 3\) does not go with float32 \(3, 4\)"),
        ((x[0], y), {}, r"float64 \(3,\) does not go with"),
        ((x, y), {"out": np.ones((4, 2))}, r"the result is \(2, 4\), and out is \(4, 2\)"),
        ((x, y), {"add": True}, r"the result is \(2, 4\), and out is None"),
    ):
        with pytest.raises(ValueError, match="multiply: " + message):
            blas.multiply(*arguments, **keywords)


# ------------------------------------------------------------------ NVIDIA's own library, where it is installed


def read_back(library, what, descriptor, attribute, kind):
    value, written = kind(), ctypes.c_size_t()
    function = getattr(library, f"cublasLt{what}GetAttribute")
    function.argtypes = P, I, P, S, P
    size = ctypes.sizeof(value)
    status = function(descriptor, attribute, ctypes.byref(value), size, ctypes.byref(written))
    assert (status, written.value) == (0, size)
    return value.value


def test_the_prototypes_are_the_headers():
    assert blas.SIGNATURES == PROTOTYPES | {"cublasLtGetStatusName": (I,)}


def test_the_real_library_takes_our_descriptors():
    """These calls need no GPU. Each attribute has a size of its own, which the library checks."""
    try:
        library = blas.load()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"no cublasLt: {error}")
    for kind, results in blas.RESULTS.items():
        for result in results:
            layouts = (1, 70, 50, 80), (0, 70, 60, 90), (0, 50, 60, 64)
            operation, *matrices = blas.describe(library, kind, result, layouts)
            numbers = [read_back(library, "MatmulDesc", operation, i, ctypes.c_int32) for i in (0, 1, 3, 4)]
            assert numbers == [70 if kind == "float64" else 68, int(kind == "float64"), 1, 0]  # compute, scale, ops
            for matrix, of, (_, rows, columns, ld) in zip(matrices, (kind, kind, result), layouts, strict=True):
                attributes = (0, ctypes.c_uint32), (1, ctypes.c_int32), (2, U64), (3, U64), (4, I64)
                values = [read_back(library, "MatrixLayout", matrix, *attribute) for attribute in attributes]
                assert values == [blas.DATA_TYPES[of], 0, rows, columns, ld]  # order 0: by columns
    made = blas.preference(library, (16, 32, 64))
    values = [read_back(library, "MatmulPreference", made, i, ctypes.c_uint32) for i in (3, 5, 6, 7, 8)]
    assert values == [2, 16, 32, 64, 64]
    assert read_back(library, "MatmulPreference", made, 1, U64) == blas.WORKSPACE
    assert {status: library.cublasLtGetStatusName(status) for status in STATUS} == {
        status: f"CUBLAS_STATUS_{name}".encode() for status, name in STATUS.items()
    }
    wrong = ctypes.c_int64(0)
    assert library.cublasLtMatmulDescSetAttribute(operation, 3, ctypes.byref(wrong), 8) == 7  # the size is checked


# ------------------------------------------------------------------ linear, and gradients added where they lie


def flat_leaf(put, values):
    """(a leaf whose gradient is a slice of a flat buffer, the buffer, 1 everywhere)."""
    flat = put(np.ones(values.size + 3, values.dtype))
    leaf = Tensor(put(values), requires_grad=True)
    leaf.grad = flat[3:].reshape(values.shape)
    return leaf, flat


@pytest.mark.parametrize("kind", [np.float32, BF16], ids=str)
def test_linear_on_a_device_is_three_products_and_no_sum(cupy, kind):
    rng = np.random.default_rng(2)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 9, 6), (5, 6), (2, 9, 5)))
    cupy.library.guarded = False  # astype makes arrays elsewhere
    weight, flat = flat_leaf(cupy.put, w)
    x, g = x.astype(kind), g.astype(kind)
    leaf = Tensor(cupy.put(x), requires_grad=True)
    y = F.linear(leaf, weight)
    y.backward(cupy.put(g))
    assert cupy.library.calls.count("cublasLtMatmul") == 3
    assert cupy.products == 0
    exact = [a.astype(np.float64) for a in (x.reshape(18, 6), w.astype(kind), g.reshape(18, 5))]
    eps = ml_dtypes.finfo(kind).eps
    for ours, wanted in ((y.data, exact[0] @ exact[1].T), (leaf.grad, exact[2] @ exact[1])):
        assert ours.dtype == kind and np.allclose(ours.reshape(wanted.shape).astype(float), wanted, rtol=eps, atol=1e-5)
    assert weight.grad.dtype == np.float32
    assert np.allclose(weight.grad, 1 + exact[2].T @ exact[0], rtol=1e-6, atol=1e-5)  # 32 bits, from 16-bit inputs
    assert np.array_equal(from_device(flat)[:3], np.ones(3))


@pytest.mark.parametrize("kind", [np.float32, BF16], ids=str)
def test_the_heads_on_a_device(cupy, kind, monkeypatch):
    """Chunk by chunk through cublasLt, and the same as on the host."""
    monkeypatch.setenv("MINILLM_KERNELS", "reference")  # Numba would take the arrays for NumPy's
    cupy.library.guarded = False  # astype makes arrays elsewhere
    rng = np.random.default_rng(3)
    hidden, w = rng.standard_normal((7, 6)).astype(kind), rng.standard_normal((11, 6)).astype(np.float32)
    targets = rng.integers(0, 11, 7)
    for head in (
        lambda h, w, t: F.linear_cross_entropy(h, w, t, rows_per_chunk=3),
        lambda h, w, t: F.linear_token_logprobs(h, w, t, rows_per_chunk=3).sum(),
    ):
        results = []
        for put in (cupy.put, lambda a: a):
            h, weight = Tensor(put(hidden), requires_grad=True), Tensor(put(w), requires_grad=True)
            cupy.library.calls.clear()
            value = head(h, weight, targets)
            value.backward()
            results.append([value.data, h.grad, weight.grad])
            assert (cupy.library.calls.count("cublasLtMatmul") >= 9) == (put == cupy.put)
        for ours, wanted in zip(*results, strict=True):
            assert ours.dtype == wanted.dtype
            rtol = ml_dtypes.finfo(ours.dtype).eps
            assert np.allclose(np.array(ours, float), np.array(wanted, float), rtol=4 * rtol, atol=1e-6)


def test_a_chunk_of_the_head_is_larger_on_a_device(cupy):
    hidden = np.zeros((9000, 2), BF16)
    ends = [[part.stop for part in F._row_chunks(h, 100_000, None)] for h in (hidden, cupy.put(hidden))]
    assert ends[0][:2] == [128, 256] and ends[1] == [4608, 9000]


def test_a_bias_of_16_bit_rows_is_summed_in_32(cupy):
    g = np.full((3000, 2), 1.0, BF16)  # in bfloat16, 256 + 1 is 256
    for put in (cupy.put, lambda a: a):
        bias = Tensor(put(np.zeros(2, np.float32)), requires_grad=True)
        cupy.library.guarded = False
        F.linear(put(np.ones((3000, 3), BF16)), put(np.ones((2, 3), np.float32)), bias).backward(put(g))
        assert np.array_equal(bias.grad, [3000, 3000])


def test_a_gradient_is_added_and_freed_as_soon_as_it_is_whole():
    alive, counts = [], []

    @op
    def scaled(x, w):
        def dw(g):
            counts.append(sum(r() is not None for r in alive))
            dw = g * x
            alive.append(weakref.ref(dw))
            return dw

        return x * w, (lambda g: g * w, dw)

    y = np.full(3, 2.0)
    leaves = [Tensor(np.full(3, 2.0), requires_grad=True) for _ in range(4)]
    for leaf in leaves:
        y = scaled(y, leaf)
    y.sum().backward()
    assert max(counts) <= 1  # the last one, which backward still has a name for
    assert all(np.array_equal(leaf.grad, np.full(3, 16.0)) for leaf in leaves)


def sums(f, *values, flat):
    """The gradients of f's sum, with leaves that have one already; `flat`: in a buffer, which is added to in place."""
    leaves = [flat_leaf(lambda a: a.copy(), v)[0] for v in values]
    buffers = [leaf.grad for leaf in leaves]
    if not flat:
        for leaf in leaves:
            leaf.grad = None
    f(*leaves).sum().backward()
    assert not flat or all(leaf.grad is buffer for leaf, buffer in zip(leaves, buffers, strict=True))
    return [leaf.grad for leaf in leaves]


USES = {
    "one": (lambda x, w: F.linear(x, w), True),
    "two of one weight": (lambda x, w: F.linear(F.linear(x, w), w), False),
    "tied to an embedding": (lambda x, w: F.linear(F.embedding(np.arange(4) % 3, w) + x, w), False),
    "transposed": (lambda x, w: F.linear(x, w.transpose()), False),
    "in a checkpoint": (lambda x, w: checkpoint(F.linear, x, w), True),
    "two in a checkpoint": (lambda x, w: checkpoint(lambda x, w: F.linear(F.linear(x, w), w), x, w), False),
    "in and out of a checkpoint": (lambda x, w: F.linear(checkpoint(F.linear, x, w), w), False),
    "in a checkpoint in a checkpoint": (
        lambda x, w: checkpoint(lambda x, w: checkpoint(F.linear, x, w), x, w),
        True,
    ),
}


@pytest.mark.parametrize(("f", "alone"), USES.values(), ids=USES)
def test_a_weights_gradient_is_added_where_it_lies(f, alone, monkeypatch):
    """By the product itself where it is the only one, else as before; the same bits as adding it afterwards."""
    added = []
    monkeypatch.setattr(F, "multiply", lambda *a, add=False: added.append(add) or blas.multiply(*a, add=add))
    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((4, 5)).astype(np.float32), rng.standard_normal((5, 5)).astype(np.float32)
    fresh = sums(f, x, w, flat=False)
    assert not any(added)
    collected = sums(f, x, w, flat=True)
    assert sum(added) == alone
    for new, old in zip(collected, fresh, strict=True):
        assert np.array_equal(new, 1 + old)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_bias_gradient_is_a_product_and_added_where_it_lies(dtype, monkeypatch):
    """A sum over many rows, of 16 bits in 32: no further from the exact one than NumPy's own."""
    added = []
    monkeypatch.setattr(F, "multiply", lambda *a, add=False: added.append(add) or blas.multiply(*a, add=add))
    rng = np.random.default_rng(5)
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((3, 700, 5), (4, 5), (4,)))
    g = rng.standard_normal((3, 700, 4)).astype(dtype)
    exact = g.astype(np.float64).sum((0, 1))
    limit = np.abs(g.astype(np.float32).reshape(-1, 4).sum(0) - exact).max()
    for start in (None, 1.0):
        leaf = Tensor(b.astype(np.float32), requires_grad=True)
        leaf.grad = kept = None if start is None else np.full(4, start, np.float32)
        F.linear(Tensor(x), w, leaf).backward(g)
        assert leaf.grad.dtype == np.float32 and (start is None or leaf.grad is kept)
        assert np.abs(leaf.grad - exact - (start or 0)).max() <= max(limit, 1e-5)
    assert added == [False] * 3 + [True]
