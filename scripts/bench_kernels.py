"""
Time every version of every kernel on its large example, in one interleaved run.

    python scripts/bench_kernels.py [--only TEXT] [--rounds N] [--dtype float32|float64]
    python scripts/bench_kernels.py --device cuda --dtype bfloat16 --check --json kernels.json

The versions take turns, so that whatever else the machine does meets all of them; a ratio says how much faster than the
reference a version is. A version that does not exist is shown as missing; no version is timed in another's place.

On the CPU a time is the best of the rounds. On a GPU it is their median, by CUDA events around several calls, which are
asked for while the GPU is still busy with a copy, so that they follow each other without a gap; on inputs that take
turns so that they do not stay in the cache. Beside it stands what that is of the bandwidth or of the rate of arithmetic
that this GPU has just shown in a copy and in a product. Where PyTorch is installed, its own kernels and torch.compile's
take their turns, too. --check compares every version with the reference in float64 first, on ragged shapes and on the
timed one, with outputs that are full of NaN before; what is wrong, or stops with an error, is told and not timed.
"""

import contextlib
import importlib
import itertools
import json
import math
import pkgutil
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import minillm.kernels  # before NumPy: it says how long idle BLAS threads may spin
import scripts.command_line as command_line

# isort: split
import ml_dtypes
import numba
import numpy as np

from minillm.kernels import blas, cuda
from minillm.kernels.device import check_device, gpu_name, synchronize, to_device, xp_of
from minillm.kernels.kernel import BY_NAME, KERNELS
from scripts.torch_kernels import counterparts, tensor

ON_GPU = ("cuda", *BY_NAME["cuda"], "numba_cuda")  # those by name are not missing where a kernel has them not
VERSIONS = ["reference", "numba", *ON_GPU]
DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# ||result - exact|| / ||exact||: a few roundings of a result, whose inputs are the same numbers
TOLERANCE = {"float64": 1e-10, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
FLOAT32_ONLY = {"adamw_inplace"}  # the optimizer's state is float32 by contract
MORE_SIZES = {"attention_forward": ["gpu, D = 128"], "attention_backward": ["gpu, D = 128"]}
IN_CACHE = 256 << 20  # bytes that no GPU's cache holds
CALLS = 8  # of a version between two events,
LONG = 0.05  # or 1, where they take so many seconds
BUSY = 1 << 30  # bytes that are copied four times before: some 2 ms, longer than it takes to ask for the calls


# ------------------------------------------------------------------ arguments


def is_array(x):
    return hasattr(x, "dtype") and hasattr(x, "nbytes") and x.ndim > 0


def example(kernel, seed, size, dtype, device):
    """The arguments of a call, its arrays on a device. Large ones for a GPU are drawn there."""
    xp = xp_of(to_device(np.zeros(1), device))
    drawn = xp.random.default_rng(seed) if size.startswith("gpu") else np.random.default_rng(seed)
    dtype = "float32" if kernel.name in FLOAT32_ONLY and dtype != "float64" else dtype
    args, kwargs = kernel.example(drawn, size, DTYPES[dtype], lambda x: to_device(x, device))
    return list(args), kwargs


def fresh(args):
    """Copies of the arrays: an in-place kernel must not meet its own results."""
    return [x.copy() if is_array(x) else x for x in args]


def shapes(args):
    """The size of the first array, if it has one axis, or the shapes of those with more."""
    arrays = [x for x in args if is_array(x)]
    if arrays[0].ndim == 1:
        return str(arrays[0].size)
    return ", ".join(dict.fromkeys("x".join(map(str, x.shape)) for x in arrays if x.ndim > 1))


def results_of(kernel, version, args, kwargs):
    results = kernel.version(version)(*args, **kwargs)
    return results if isinstance(results, tuple) else (results,)


def versions_here(kernel, device):
    """The names of a kernel's fast versions that this machine can run."""
    here = ("numba",) if device == "cpu" else ON_GPU
    if device == "cuda" and cuda.backend.architecture() != cuda.HOPPER:
        here = [name for name in here if name != "cuda_wgmma"]
    return [name for name in here if name in kernel.versions]


# ------------------------------------------------------------------ checking


@contextlib.contextmanager
def poisoned(xp):
    """Context manager: new arrays are full of NaN, so that an element that is never written shows."""
    empty = xp.empty

    def full(shape, dtype=float, **options):
        array = empty(shape, dtype, **options)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    xp.empty = full
    try:
        yield
    finally:
        xp.empty = empty


def distance(results, exact):
    """The largest ||result - exact|| / ||exact|| of some arrays; inf where one has a NaN that the other has not."""
    worst = 0.0
    for r, e in zip(results, exact, strict=True):
        xp, r, e = xp_of(e), r.astype(np.float64).reshape(-1), e.astype(np.float64).reshape(-1)
        finite = xp.isfinite(e)
        strange = xp.where(finite, ~xp.isfinite(r), r != e)
        if strange.astype(np.float64).sum() > 0:  # not any(), for which CuPy compiles a kernel for every size
            return math.inf
        difference, e = xp.where(finite, r - e, 0), xp.where(finite, e, 0)
        worst = max(worst, float(xp.sqrt((difference**2).sum()) / xp.maximum(xp.sqrt((e**2).sum()), 1e-30)))
    return worst


def check(kernel, version, dtype, device, sizes):
    """(a version's largest distance from the reference in float64 over several examples, whether that is too much). As
    large as the tolerance it may be, or three times what the reference itself has in this dtype."""
    worst, wrong = 0.0, False
    for size, seed in sizes:
        args, kwargs = example(kernel, seed, size, dtype, device)
        exact_args = [x.astype(np.float64) if is_array(x) and x.dtype.kind in "fV" else x for x in fresh(args)]
        exact = results_of(kernel, "reference", exact_args, kwargs)
        with poisoned(xp_of(next(x for x in args if is_array(x)))):
            error = distance(results_of(kernel, version, fresh(args), kwargs), exact)
        worst = max(worst, error)
        if not error <= TOLERANCE[dtype]:
            wrong |= not error <= 3 * distance(results_of(kernel, "reference", args, kwargs), exact)
    return worst, wrong


# ------------------------------------------------------------------ timing


def best_on_host(calls, rounds):
    """{name: best seconds} of {name: (function, arguments)}, in turns, each call on copies of its arguments."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first round compiles and touches the memory
        for name, (function, args, kwargs) in calls.items():
            mine = fresh(args)
            begin = time.perf_counter()
            function(*mine, **kwargs)
            times[name].append(time.perf_counter() - begin)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def median_on_gpu(calls, rounds):
    """{name: median seconds} of {name: (function, several sets of arguments, kwargs)}, in turns, by CUDA events."""
    cp = xp_of(to_device(np.zeros(1), "cuda"))
    busy = cp.zeros((2, BUSY), np.uint8)
    times, count = {name: [] for name in calls}, dict.fromkeys(calls, CALLS)
    for _ in range(rounds + 2):  # the first rounds compile, load and warm up
        for name, (function, sets, kwargs) in calls.items():
            turns = itertools.cycle(sets)
            begin, end = cp.cuda.Event(), cp.cuda.Event()
            for _ in range(4):
                cp.copyto(*busy)
            begin.record()
            for _ in range(count[name]):
                function(*next(turns), **kwargs)
            end.record()
            end.synchronize()
            seconds = cp.cuda.get_elapsed_time(begin, end) / 1e3
            times[name].append(seconds / count[name])
            if seconds > LONG:
                count[name] = 1
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def ceilings(rounds):
    """What this GPU does: bytes per second of a copy, read and written, and operations per second of a product."""
    cp = xp_of(to_device(np.zeros(1), "cuda"))
    x, y = cp.random.default_rng(0).random((2, 1 << 28), dtype=np.float32)
    a, b = (
        cp.random.default_rng(s).standard_normal((8192, 8192), np.float32).astype(DTYPES["bfloat16"]) for s in (1, 2)
    )
    calls = {"copy": (cp.copyto, [(y, x)], {}), "product": (blas.multiply, [(a, b)], {})}
    seconds = median_on_gpu(calls, rounds)
    return 2 * x.nbytes / seconds["copy"], 2 * 8192**3 / seconds["product"]


def bytes_moved(kernel, args, results):
    """The fewest bytes a call can move: each array read once, each result written once."""
    if kernel.name == "embedding_forward":  # the rows that are picked, not the table
        return 2 * results[0].nbytes
    return sum(x.nbytes for x in args if is_array(x)) + sum(r.nbytes for r in results)


@contextlib.contextmanager
def told(kernel, name, bad):
    """Context manager: an error of a version is told, noted in `bad`, and goes no further. CuPy, Numba, PyTorch and
    Triton each have their own; the other versions go on."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        tell(kernel, name, f"FAILED: {type(error).__name__}: {lines[0]}", bad)


def tell(kernel, name, what, bad):
    bad[name] = what
    print(f"{kernel.name:<32}{name:<22}{what}", flush=True)


def measure(kernel, size, dtype, device, rounds, bad):
    """(arguments, {version: seconds}, bytes moved, operations) of one kernel on a timed example, less the versions that
    are in `bad`, or come to be."""
    if device == "cpu":
        args, kwargs = example(kernel, 0, size, dtype, device)
        names = ["reference", *(n for n in versions_here(kernel, device) if n not in bad)]
        return args, best_on_host({n: (kernel.version(n), args, kwargs) for n in names}, rounds), 0, 0
    args, kwargs = example(kernel, 0, size, dtype, device)
    results = results_of(kernel, "reference", fresh(args), kwargs)
    moved = bytes_moved(kernel, args, results)
    del results
    sets = [fresh(args) for _ in range(max(1, min(8, IN_CACHE // moved)))]
    # PyTorch's side has its tensors on the same memory, and ids of 64 bits; ours has those of training, of 32.
    theirs, tensors = {}, []
    with told(kernel, "PyTorch", bad):
        theirs = counterparts(kernel.name, args, kwargs)
        tensors = [[tensor(x) for x in one] for one in sets] if theirs else []
    sets = [[x.astype(np.int32) if is_array(x) and x.dtype.kind == "i" else x for x in one] for one in sets]
    versions = {n: kernel.versions[n] for n in versions_here(kernel, device) if n not in bad}
    calls = {n: (function, sets, kwargs) for n, function in versions.items()}
    calls["reference"] = (kernel.version("reference"), sets, kwargs)
    calls |= {n: (function, tensors, {}) for n, function in theirs.items()}
    for name, (function, (first, *_), options) in calls.items():
        with told(kernel, name, bad):
            function(*first, **options)
            synchronize(args[0])
    times = median_on_gpu({name: call for name, call in calls.items() if name not in bad}, rounds)
    return args, times, moved, kernel.operations(*args)


# ------------------------------------------------------------------ tables


def cpu_row(kernel, args, times):
    cells = [f"{1e3 * times[name]:.2f}" if name in times else "missing" for name in VERSIONS[:2]]
    ratio = times["reference"] / min(times.values())
    return f"{kernel.name:<32}" + "".join(f"{c:>14}" for c in cells) + f"{ratio:>11.1f}x  {shapes(args)}"


def gpu_rows(kernel, args, times, size, operations, bandwidth, rate):
    """A line for each version: time, rate, share of the ceiling, and how it compares with this project's."""
    ours = times.get("cuda")
    own = [n for n in ON_GPU if n not in BY_NAME["cuda"] or n in kernel.versions]
    for name in [*own, *(n for n in times if n not in VERSIONS), "reference"]:
        if name not in times:
            yield f"{kernel.name:<32}{name:<22}{'missing':>10}"
            continue
        seconds = times[name]
        done, unit, most = (operations, "TFLOP/s", rate) if operations else (size, "GB/s", bandwidth)
        scale = 1e12 if operations else 1e9
        against = f"{seconds / ours:>8.2f}x" if ours else f"{'':>9}"
        shown = f"{done / seconds / scale:>10.1f} {unit:<8}{done / seconds / most:>7.0%}"
        yield f"{kernel.name:<32}{name:<22}{1e6 * seconds:>10.1f}{shown}{against}  {shapes(args)}"


def parse():
    parser = command_line.Parser(description="Time every version of every kernel against its reference.")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains TEXT")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="float types of 16 bits are for a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--check", action="store_true", help="compare every version with float64 before it is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        check_device(options.device)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    if options.device == "cpu" and options.dtype in ("bfloat16", "float16"):
        parser.error("the CPU's kernels take float32 and float64; 16 bits are for --device cuda")
    for module in pkgutil.iter_modules(minillm.kernels.__path__):
        if Path(minillm.kernels.__file__).with_name(f"{module.name}.py").exists():
            importlib.import_module(f"minillm.kernels.{module.name}")
    options.kernels = [kernel for kernel in KERNELS if options.only in kernel.name]
    if not options.kernels:
        names = ", ".join(k.name for k in KERNELS)
        parser.error(f"no kernel's name contains {options.only!r}; there are {names}")
    return options


def checked(kernel, dtype, device, timed):
    """({version: largest distance}, {version: what is wrong}) of the fast ones, on ragged, extreme and timed sizes."""
    sizes = [("ragged", seed) for seed in range(12)] + [(size, 0) for size in timed]
    if kernel.name != "attention_backward":  # there sum_j ds_j k_j cancels: ds of few digits times keys far from 0
        sizes += [("extreme", seed) for seed in range(4)]
    errors, bad = {}, {}
    for version in versions_here(kernel, device):
        with told(kernel, version, bad):
            errors[version], wrong = check(kernel, version, dtype, device, sizes)
            if wrong:
                tell(kernel, version, f"WRONG: {errors[version]:.1e} from float64", bad)
    return errors, bad


def sources_of(kernels):
    """The .cu files of some kernels: each stands in the module of its reference."""
    modules = {sys.modules[kernel.reference.__module__] for kernel in kernels}
    return [x for module in modules for x in vars(module).values() if isinstance(x, cuda.Source)]


def about(options):
    """What was measured on what."""
    threads = numba.get_num_threads()
    versions = f"NumPy {np.__version__}, Numba {numba.__version__}"
    if options.device == "cpu":
        return f"{platform.machine()}, {threads} threads, {versions}, {options.dtype}"
    cp = xp_of(to_device(np.zeros(1), "cuda"))
    toolkit = cp.cuda.runtime.runtimeGetVersion()
    return f"{gpu_name()}, CuPy {cp.__version__}, CUDA {toolkit}, {versions}, {options.dtype}"


def bench(options):
    noted = {"date": time.strftime("%Y-%m-%d"), "about": about(options), "command": " ".join(sys.argv), "rows": []}
    print(noted["about"])
    bandwidth = rate = 1
    if options.device == "cuda":
        cuda.compile_ahead(sources_of(options.kernels))
        bandwidth, rate = ceilings(options.rounds)
        noted |= {"bytes_per_second": bandwidth, "operations_per_second": rate}
        print(f"ceilings of this run: copy {bandwidth / 1e9:,.0f} GB/s, bf16 product {rate / 1e12:,.0f} TFLOP/s")
        print(f"{'kernel':<32}{'version':<22}{'us':>10}{'rate':>19}{'share':>7}{'/ cuda':>9}  arrays")
    else:
        print(f"{'kernel':<32}" + "".join(f"{name + ' ms':>14}" for name in VERSIONS[:2]) + f"{'ratio':>12}  arrays")
    wrong = set()
    for kernel in options.kernels:
        sizes = ["large"] if options.device == "cpu" else ["gpu", *MORE_SIZES.get(kernel.name, ())]
        errors, found = checked(kernel, options.dtype, options.device, sizes) if options.check else ({}, {})
        for size in sizes:
            bad = dict(found)  # what fails at one size may do at another
            args, times, moved, operations = measure(kernel, size, options.dtype, options.device, options.rounds, bad)
            if options.device == "cpu":
                print(cpu_row(kernel, args, times), flush=True)
            else:
                print(*gpu_rows(kernel, args, times, moved, operations, bandwidth, rate), sep="\n", flush=True)
            row = {"kernel": kernel.name, "arrays": shapes(args), "seconds": times, "errors": errors, "bad": bad}
            noted["rows"].append(row | {"bytes": moved, "operations": operations})
            if options.json:  # after each one: a run that is cut off has told what it knew
                options.json.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
            wrong |= {(kernel.name, version) for version in bad}
    if wrong:
        sys.exit(f"{len(wrong)} versions are wrong or failed, and were not timed")


def main():
    command_line.run(bench, parse())


if __name__ == "__main__":
    main()
