"""
The product of two matrices: NumPy's on the host, NVIDIA's cublasLt on a GPU, called without anything in between.

CuPy's own matmul can not be captured into a CUDA graph, rounds a product of 16-bit matrices to 16 bits where a gradient
wants all 32, and can not add into what is there. It is what runs where cublasLt can not be loaded.

Rows and columns
    cuBLAS stores a matrix column by column: element (i, j) lies at i + j ld. Ours lie row by row, at i ld + j, and so
    the memory of our (R, C) array is, to cuBLAS, a (C, R) matrix with the same ld: the transpose.
    For z = x y it is therefore asked for z^T = y^T x^T: y's memory comes first, x's second, m = N and n = M, and no op
    is needed. An array that is the transpose of one of ours is read as it is, which takes op T.

Numbers
    16-bit and float32 inputs: products and sums in float32, rounded once, at the end, to the result's dtype. Partial
    sums over parts of K meet in float32 too (only CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE is allowed). float32 inputs
    are not shortened to TF32: that would be another compute type. float64 inputs: everything in float64.
    A shape (and alignment) gets one algorithm, and no sum depends on which thread came first: the same bits every time.

Cost of a call whose shapes have been seen: one call of cublasLtMatmul, with descriptors and an algorithm that are kept.
Nothing is allocated (given `out`) and nothing waits, so it can be captured once it has run on that stream.

Names, numbers and layouts are those of the headers cublasLt.h, cublas_api.h and library_types.h of CUDA 12 and 13.
"""

import ctypes
import functools
import importlib
import warnings

import numpy as np

from .device import empty, upcast, xp_of

WORKSPACE = 32 << 20  # bytes of scratch memory per stream: what NVIDIA recommends for Hopper


def multiply(x, y, out=None, dtype=None, add=False):
    """z = x y of matrices: x (M, K) and y (K, N) of one dtype, z (M, N). x, y or both may be transposed views.

    out    an (M, N) array that z is written into, of any dtype at least as wide, and apart from x and y
    dtype  of z where out is None: x's if None, or a wider one
    add    z is added to what is in out: out += x y, in one pass
    A sum over K is made in float32 or wider, and rounded once. ValueError where shapes or dtypes do not go together.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[0] or x.dtype != y.dtype:
        raise ValueError(f"multiply: {x.dtype} {x.shape} does not go with {y.dtype} {y.shape}")
    shape = x.shape[0], y.shape[1]
    if (add and out is None) or (out is not None and out.shape != shape):
        raise ValueError(f"multiply: the result is {shape}, and out is {None if out is None else out.shape}")
    dtype = np.dtype(dtype or x.dtype) if out is None else out.dtype
    xp = xp_of(x)
    if xp is not np and x.size and y.size:
        target = empty(x, shape, dtype) if out is None else out
        if _cublas_multiply(xp, x, y, target, add):
            return target
    if xp is np or add or dtype != x.dtype:  # else cuBLAS under CuPy's matmul sums 16 bits in 32, and rounds once
        x, y = upcast(x), upcast(y)
    if out is None:
        return (x @ y).astype(dtype, copy=False)
    if add:
        out += x @ y
    elif dtype == x.dtype:
        xp.matmul(x, y, out=out)
    else:
        out[...] = x @ y
    return out


# ------------------------------------------------------------------ what cublasLt is called with

SUCCESS, NOT_SUPPORTED = 0, 15  # cublasStatus_t, cublas_api.h
OP_N, OP_T = 0, 1  # cublasOperation_t, cublas_api.h
COMPUTE_32F, COMPUTE_64F = 68, 70  # cublasComputeType_t, cublas_api.h
DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType_t: CUDA_R_..., library_types.h
RESULTS = {  # the dtypes that cublasLt has a result in, by the dtype of the inputs
    "float32": ("float32",),
    "float64": ("float64",),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
}
DESC_TRANSA, DESC_TRANSB = 3, 4  # cublasLtMatmulDescAttributes_t, int32_t each
PREF_MAX_WORKSPACE_BYTES, PREF_REDUCTION_SCHEME_MASK = 1, 3  # cublasLtMatmulPreferenceAttributes_t: uint64_t, uint32_t
PREF_MIN_ALIGNMENT_BYTES = 5, 6, 7, 8  # of A, B, C and D, uint32_t each
REDUCTION_SCHEME_COMPUTE_TYPE = 2  # cublasLtReductionScheme_t

# The opaque structs, in 8-byte words. Older libraries of CUDA 12 have shorter ones, and are content with these.
MatmulDesc = ctypes.c_uint64 * 32  # cublasLtMatmulDescOpaque_t
MatrixLayout = ctypes.c_uint64 * 14  # cublasLtMatrixLayoutOpaque_t
MatmulPreference = ctypes.c_uint64 * 12  # cublasLtMatmulPreferenceOpaque_t


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t. A pointer to it is one to `algo`, a cublasLtMatmulAlgo_t, which stands first."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspaceSize", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("wavesCount", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


_pointer, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
# Without its types ctypes would cut a pointer to 32 bits. Those with _internal are what the header's inline functions
# cublasLtMatmulDescInit, cublasLtMatrixLayoutInit and cublasLtMatmulPreferenceInit call: they fill memory of ours.
SIGNATURES = {
    "cublasLtCreate": (_pointer,),
    "cublasLtGetStatusName": (_int,),
    "cublasLtMatmulDescInit_internal": (_pointer, _size, _int, _int),
    "cublasLtMatmulDescSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatrixLayoutInit_internal": (_pointer, _size, _int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatmulPreferenceInit_internal": (_pointer, _size),
    "cublasLtMatmulPreferenceSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatmulAlgoGetHeuristic": (*(_pointer,) * 7, _int, _pointer, _pointer),
    # handle, operation, alpha, A and its layout, B's, beta, C's, D's, algorithm, workspace, its size, stream
    "cublasLtMatmul": (*(_pointer,) * 14, _size, _pointer),
}


@functools.cache
def load():
    """The library cublasLt, through cuda.pathfinder, which CuPy 14 brings along. ImportError, OSError or RuntimeError
    where there is none."""
    path = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cublasLt").abs_path
    library = ctypes.CDLL(path)
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
    library.cublasLtGetStatusName.restype = ctypes.c_char_p
    return library


def _failure(library, function, status, about=""):
    return RuntimeError(f"{function}: {library.cublasLtGetStatusName(status).decode()}{about}")


def _call(library, function, *arguments):
    status = getattr(library, function)(*arguments)
    if status != SUCCESS:
        raise _failure(library, function, status)


@functools.cache
def _open(device):
    """(the library, a handle of ours for this device), or None, after one warning, where it can not be used."""
    handle = _pointer()
    try:
        library = load()
        _call(library, "cublasLtCreate", ctypes.byref(handle))
    except (ImportError, OSError, RuntimeError) as error:
        lost = "they can not be captured into a CUDA graph, and are slow where 16-bit matrices have a 32-bit product"
        warnings.warn(f"no cublasLt ({error}): products go through CuPy's matmul; {lost}", RuntimeWarning, stacklevel=4)
        return None
    return library, handle


@functools.cache
def _workspace(xp, device, stream):
    return xp.empty(WORKSPACE, np.uint8)


# ------------------------------------------------------------------ descriptors, once per shape


def _layout(array):
    """(op, rows, columns, ld) of the column-major matrix in the array's memory, with the op that makes it the array's
    transpose; None where neither axis of the array is contiguous."""
    (rows, columns), (down, across), size = array.shape, array.strides, array.dtype.itemsize
    if (across == size or columns == 1) and (rows == 1 or (down >= columns * size and down % size == 0)):
        return OP_N, columns, rows, down // size if rows > 1 else columns
    if (down == size or rows == 1) and (columns == 1 or (across >= rows * size and across % size == 0)):
        return OP_T, rows, columns, across // size if columns > 1 else rows
    return None


def describe(library, kind, out_kind, layouts):
    """[operation, layout of A, of B, of D] for cublasLt: the layouts as `_layout` gives them, and the dtypes' names."""
    exact = kind == "float64"
    operation = MatmulDesc()
    types = (COMPUTE_64F, DATA_TYPES["float64"]) if exact else (COMPUTE_32F, DATA_TYPES["float32"])  # of alpha and beta
    _call(library, "cublasLtMatmulDescInit_internal", operation, ctypes.sizeof(operation), *types)
    for attribute, (op, *_) in zip((DESC_TRANSA, DESC_TRANSB), layouts, strict=False):
        value = ctypes.c_int32(op)
        _call(library, "cublasLtMatmulDescSetAttribute", operation, attribute, ctypes.byref(value), 4)
    described = [operation]
    for of, (_, *sizes) in zip((kind, kind, out_kind), layouts, strict=True):
        layout = MatrixLayout()
        size = ctypes.sizeof(layout)
        _call(library, "cublasLtMatrixLayoutInit_internal", layout, size, DATA_TYPES[of], *sizes)
        described.append(layout)
    return described


def preference(library, alignments):
    """What an algorithm may need: WORKSPACE bytes, no more than these alignments (bytes) of A, B and D, and no sum in
    16 bits."""
    made = MatmulPreference()
    _call(library, "cublasLtMatmulPreferenceInit_internal", made, ctypes.sizeof(made))
    a, b, d = alignments
    values = [(PREF_MAX_WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE))]
    values += [(PREF_REDUCTION_SCHEME_MASK, ctypes.c_uint32(REDUCTION_SCHEME_COMPUTE_TYPE))]
    values += [(which, ctypes.c_uint32(n)) for which, n in zip(PREF_MIN_ALIGNMENT_BYTES, (a, b, d, d), strict=True)]
    for attribute, value in values:
        size = ctypes.sizeof(value)
        _call(library, "cublasLtMatmulPreferenceSetAttribute", made, attribute, ctypes.byref(value), size)
    return made


@functools.lru_cache(maxsize=1 << 14)  # generation meets many lengths
def _plan(device, kind, out_kind, layouts, alignments):
    """[operation, layouts of A, B and D, algorithm], all that depends on shapes alone; None: cublasLt can not do this.
    Whether the product is added is not in here: beta is a number that each call gives."""
    library, handle = _open(device)
    operation, a, b, d = describe(library, kind, out_kind, layouts)
    found, count = HeuristicResult(), _int()
    status = library.cublasLtMatmulAlgoGetHeuristic(
        handle, operation, a, b, d, d, preference(library, alignments), 1, ctypes.byref(found), ctypes.byref(count)
    )
    if status == NOT_SUPPORTED or (status == SUCCESS and (count.value == 0 or found.state != SUCCESS)):
        return None
    if status != SUCCESS:
        about = f" for {kind} -> {out_kind}, (op, rows, columns, ld) = {layouts}"
        raise _failure(library, "cublasLtMatmulAlgoGetHeuristic", status, about)
    return operation, a, b, d, ctypes.byref(found)


# ------------------------------------------------------------------ the product


def _readable(xp, array):
    """The array and its layout; a copy of it where cuBLAS can not read it as it lies."""
    layout = _layout(array)
    return (array, layout) if layout else _readable(xp, xp.ascontiguousarray(array))


def _alignment(address):
    """The power of two that the address is a multiple of, at most 256: views into flat memory start anywhere."""
    return min(address & -address, 256)


ZERO, ONE = ({True: ctypes.byref(ctypes.c_double(n)), False: ctypes.byref(ctypes.c_float(n))} for n in (0, 1))


def _cublas_multiply(xp, x, y, out, add):
    """out = x y, or out += x y. False where cublasLt can not do it, or is not there: then nothing has happened."""
    kind, out_kind, to, device = x.dtype.name, out.dtype.name, _layout(out), out.device.id
    if out_kind not in RESULTS.get(kind, ()) or to is None or to[0] != OP_N or (opened := _open(device)) is None:
        return False
    (x, x_layout), (y, y_layout) = _readable(xp, x), _readable(xp, y)
    a, b, d = y.data.ptr, x.data.ptr, out.data.ptr  # z^T = y^T x^T
    plan = _plan(device, kind, out_kind, (y_layout, x_layout, to), (_alignment(a), _alignment(b), _alignment(d)))
    if plan is None:
        return False
    (library, handle), (operation, of_a, of_b, of_d, algorithm), exact = opened, plan, kind == "float64"
    stream = xp.cuda.get_current_stream().ptr
    inputs = ONE[exact], a, of_a, b, of_b, (ONE if add else ZERO)[exact], d, of_d
    scratch = _workspace(xp, device, stream).data.ptr, WORKSPACE
    status = library.cublasLtMatmul(handle, operation, *inputs, d, of_d, algorithm, *scratch, stream)
    if status != SUCCESS:
        about = f" for {kind} {x.shape} times {y.shape} -> {out_kind}"
        raise _failure(library, "cublasLtMatmul", status, about)
    return True
