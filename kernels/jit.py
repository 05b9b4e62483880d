"""
Numba, set up once: the decorators of every CPU kernel, and the functions that kernels share.

* `exp` vectorises. Inside Numba, `np.exp` is a scalar call to libm (0.4 G/s on one core); the polynomial below becomes
  vector code (3 G/s). float64, which serves as the oracle, goes to libm.
* `matmul_add` multiplies tiles that sit in the cache at about 100 GFLOP/s on one core, twice what LLVM makes of the
  three plain loops, and without a BLAS library whose threads would compete with Numba's.
"""

import contextlib
import contextvars
import functools
import hashlib
import math
import os
import pathlib
import tempfile
import threading

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

__all__ = [
    "BLOCK",
    "LANES",
    "ROWS",
    "cache_root",
    "contiguous",
    "exp",
    "jit",
    "matmul_add",
    "one_thread",
    "prange",
    "prange_jit",
    "row_max",
    "rows_of",
    "strided",
]

# Rows that one task reduces into one partial sum. The partial sums are then added in order, so the result does not
# depend on how many threads there were.
BLOCK = 64

# Tiles are padded to multiples of these: rows of ROWS, columns of LANES.
ROWS, LANES = 4, 16

# 'nnan' and 'ninf' are left out: where a NaN goes in, a NaN has to come out.
_OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}


@functools.cache
def cache_root():
    """The folder for compiled kernels: NUMBA_CACHE_DIR, else one beside this file, else, where the installation belongs
    to somebody else, the user's cache. OSError that says so: it can not be written."""
    given, home = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    roots = [given] if given else [pathlib.Path(__file__).with_name("__pycache__"), pathlib.Path(home, "minillm")]
    for root in map(pathlib.Path, roots):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                return root
        except OSError as error:
            wrong = error
    told = f"{wrong.strerror}: compiled kernels are kept there; set NUMBA_CACHE_DIR to a folder that can be written"
    raise OSError(wrong.errno, told, str(root))


def _cached(function, folder, **options):
    """A kernel; compiled at the first call for each dtype and cached on disk, in a folder of its own for each version
    of this file, whose functions are part of the kernels."""
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:12]
    with _config:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_root() / f"numba-{digest}{folder}")
        try:
            return numba.njit(cache=True, **_OPTIONS, **options)(function)
        finally:
            numba.config.CACHE_DIR = before


_config = threading.Lock()


def jit(function, **options):
    """A function that kernels call. It becomes part of each of them: called, it would be optimised apart from them in
    the process that compiles, and together with them in those that read the cache, and round in two ways."""
    return numba.njit(forceinline=True, **_OPTIONS, **options)(function)


def prange_jit(function):
    """A kernel, whose `prange` loops run on all threads, or inside `one_thread` on the one that calls. Iterations must
    be independent: no sum may cross them."""

    @functools.cache
    def compiled(alone):
        # The options are no part of the cache's key, so what is compiled both ways needs two folders.
        return _cached(function, "") if alone else _cached(function, "-parallel", parallel=True)

    @functools.wraps(function)
    def run(*arguments):
        return compiled(_alone.get())(*arguments)

    run.compiled = compiled
    return run


_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def one_thread():
    """Context manager: kernels run on the thread that calls them, and several such threads do not disturb each other
    (of Numba's threading layers, one aborts the process where two threads enter a parallel loop at once)."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


# ------------------------------------------------------------------ layouts

# Numba compiles a kernel again for each memory layout that it meets, and again for read-only arrays. These three bring
# every array to one of them, with a copy where there is no other way.


def contiguous(x, dtype=None):
    """x C-contiguous, writeable and aligned; x itself if it is that already."""
    return np.require(x, dtype, ["C", "W", "A"])


def rows_of(x):
    """x as contiguous rows: (all leading axes together, last axis)."""
    return contiguous(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def strided(x):
    """(memory, strides): x as one flat array, and its strides in elements but for the last axis, which is contiguous.
    So q, k and v inside one fused projection need no copy."""
    if x.size == 0:
        return np.empty(0, x.dtype), (0,) * (x.ndim - 1)
    if x.strides[-1] != x.itemsize or min(x.strides) < x.itemsize or not (x.flags.writeable and x.flags.aligned):
        x = np.array(x, order="C")
    strides = tuple(s // x.itemsize for s in x.strides)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(x, (span,), (x.itemsize,)), strides[:-1]


# ------------------------------------------------------------------ exp


@intrinsic
def _float32_from_bits(typing_context, bits):
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


_LOW, _HIGH, _INF = np.float32(-87.33655), np.float32(88.37626), np.float32(np.inf)
_LOG2E, _HALF, _ONE, _ZERO = np.float32(1.44269504), np.float32(0.5), np.float32(1), np.float32(0)
_C1, _C2 = np.float32(0.693359375), np.float32(-2.12194440e-4)  # C1 + C2 = ln 2, and n * C1 is exact
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


def exp(x):
    """e^x inside a kernel: to 1.2e-7 in float32, libm's in float64.

    e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2)/2, where a polynomial of degree 7 is enough (Cephes, expf).
    In float32, x < -87.34 (a subnormal result) gives exactly 0, x > 88.38 gives inf, and NaN gives NaN.
    """
    return np.exp(x)


@overload(
    exp, jit_options={"fastmath": {"contract"}, "forceinline": True}
)  # no 'reassoc': it would fold C1 and C2 into one constant
def _exp(x):
    if x != types.float32:
        return lambda x: np.exp(x)

    def expf(x):
        clipped = _LOW if x < _LOW else (_HIGH if x > _HIGH else x)
        n = np.floor(clipped * _LOG2E + _HALF)
        r = clipped - n * _C1 - n * _C2
        p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        p = p * r * r + r + _ONE
        # n is 127 at most (at _HIGH), so the exponent field does not overflow
        y = p * _float32_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
        y = _ZERO if x < _LOW else y
        y = _INF if x > _HIGH else y
        return x if x != x else y

    return expf


# ------------------------------------------------------------------ max of a row


@intrinsic
def _strip_max(typing_context, x, n):
    """max(x[:n]) for n > 0, a multiple of LANES, ignoring NaNs. LLVM leaves the plain loop scalar: a vectorised max
    treats NaNs in another order, so it wants a promise that there are none."""

    def codegen(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        element, integer = context.get_value_type(x.dtype), ir.IntType(64)
        vector = ir.VectorType(element, LANES)
        before, loop, done = builder.block, builder.append_basic_block("max"), builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        t, highest = builder.phi(integer), builder.phi(vector)
        pointer = builder.bitcast(builder.gep(array.data, [t]), vector.as_pointer())
        values = builder.load(pointer, align=context.get_abi_sizeof(element))
        larger = builder.select(builder.fcmp_ordered(">", values, highest), values, highest)
        following = builder.add(t, integer(LANES))
        t.add_incoming(integer(0), before)
        t.add_incoming(following, loop)
        highest.add_incoming(ir.Constant(vector, [element(-np.inf)] * LANES), before)
        highest.add_incoming(larger, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[1]), loop, done)

        builder.position_at_end(done)
        name = f"llvm.vector.reduce.fmax.v{LANES}f{8 * context.get_abi_sizeof(element)}"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(element, [vector]), name)
        return builder.call(reduce, [larger])

    return x.dtype(x, types.intp), codegen


@jit
def row_max(x):
    """The largest element of a contiguous row, ignoring NaNs; -inf if there is none."""
    whole = x.size - x.size % LANES
    highest = _strip_max(x, whole) if whole > 0 else x.dtype.type(-np.inf)
    for j in range(whole, x.size):
        highest = x[j] if x[j] > highest else highest
    return highest


# ------------------------------------------------------------------ tile matmul


@intrinsic
def _multiply_strip(typing_context, c, a, b, i, j, k):
    """c[i:i+4, j:j+w] += a[i:i+4, :k] @ b[:k, j:j+w], with w = 64 bytes' worth of columns, in LLVM's own terms.

    The 4 x w sums live in 8 vector registers of 32 bytes for the whole of k, which plain loops over arrays can not
    express (an array element is memory). `a` may have any strides, so a transposed operand costs nothing; `b` and `c`
    have contiguous rows.
    """

    def codegen(context, builder, signature, arguments):
        itemsize = context.get_abi_sizeof(context.get_value_type(c.dtype))
        lanes = 32 // itemsize
        vector = ir.VectorType(context.get_value_type(c.dtype), lanes)
        integer, zero = ir.IntType(64), ir.Constant(vector, None)
        undefined = ir.Constant(vector, ir.Undefined)
        splat = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)

        def operand(index):
            array = context.make_array(signature.args[index])(context, builder, arguments[index])
            return array.data, [builder.sdiv(s, array.itemsize) for s in cgutils.unpack_tuple(builder, array.strides)]

        def at(pointer, *terms):
            offset = integer(0)
            for index, stride in terms:
                offset = builder.add(offset, builder.mul(index, stride))
            return builder.gep(pointer, [offset])

        def pair(pointer):  # the two vectors that stand at a pointer
            return [builder.bitcast(builder.gep(pointer, [integer(n * lanes)]), vector.as_pointer()) for n in (0, 1)]

        (pc, (c_row, _)), (pa, (a_row, a_column)), (pb, (b_row, _)) = map(operand, range(3))
        i, j, k = arguments[3:]
        before, loop, done = builder.block, builder.append_basic_block("k"), builder.append_basic_block("store")
        builder.cbranch(builder.icmp_signed(">", k, integer(0)), loop, done)

        builder.position_at_end(loop)
        t = builder.phi(integer)
        sums = [[builder.phi(vector) for _ in (0, 1)] for _ in range(ROWS)]
        columns = [builder.load(p, align=itemsize) for p in pair(at(pb, (t, b_row), (j, integer(1))))]
        totals = []
        for row in range(ROWS):
            scalar = builder.load(at(pa, (builder.add(i, integer(row)), a_row), (t, a_column)))
            scalar = builder.insert_element(undefined, scalar, ir.IntType(32)(0))
            scalar = builder.shuffle_vector(scalar, undefined, splat)
            products = [builder.fmul(scalar, column, flags=["contract"]) for column in columns]
            totals.append([builder.fadd(s, p, flags=["contract"]) for s, p in zip(sums[row], products, strict=True)])
        following = builder.add(t, integer(1))
        t.add_incoming(integer(0), before)
        t.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, k), loop, done)

        builder.position_at_end(done)
        results = [[builder.phi(vector) for _ in (0, 1)] for _ in range(ROWS)]
        for row in range(ROWS):
            for n in (0, 1):
                sums[row][n].add_incoming(zero, before)
                sums[row][n].add_incoming(totals[row][n], loop)
                results[row][n].add_incoming(zero, before)
                results[row][n].add_incoming(totals[row][n], loop)
        for row in range(ROWS):
            for n, p in enumerate(pair(at(pc, (builder.add(i, integer(row)), c_row), (j, integer(1))))):
                builder.store(builder.fadd(builder.load(p, align=itemsize), results[row][n]), p, align=itemsize)
        return context.get_dummy_value()

    return types.void(c, a, b, types.intp, types.intp, types.intp), codegen


@jit
def matmul_add(c, a, b, m, k, n):
    """c[:m, :n] += a[:m, :k] @ b[:k, :n] for tiles in the cache: m a multiple of ROWS and n of LANES, k anything."""
    strip = 64 // c.itemsize
    for j in range(0, n, strip):
        for i in range(0, m, ROWS):
            _multiply_strip(c, a, b, i, j, k)
