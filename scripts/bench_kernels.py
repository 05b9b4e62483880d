"""
Time every version of every kernel on its large example, in one interleaved run.

    python scripts/bench_kernels.py [--only TEXT] [--rounds N] [--dtype float32|float64]

The versions take turns, so that whatever else the machine does meets all of them; each time is the best of the rounds,
and a ratio says how much faster than the reference a version is. A version that does not exist is shown as missing.
"""

import argparse
import importlib
import pkgutil
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import minillm.kernels  # before NumPy: it says how long idle BLAS threads may spin

# isort: split
import numba
import numpy as np

from minillm.kernels.kernel import KERNELS

VERSIONS = ["reference", "numba", "cuda", "numba_cuda"]


def fresh(args):
    """Copies of the arrays: an in-place kernel must not meet its own results."""
    return [x.copy() if isinstance(x, np.ndarray) else x for x in args]


def measure(kernel, rounds, dtype):
    """{version: best seconds} of one kernel; versions that are missing are left out."""
    args, kwargs = kernel.example(np.random.default_rng(0), "large", dtype)
    best = {}
    for _ in range(rounds + 1):  # the first round compiles and touches the memory
        for name in VERSIONS:
            if name == "reference" or name in kernel.versions:
                mine = fresh(args)
                begin = time.perf_counter()
                kernel.version(name)(*mine, **kwargs)
                best.setdefault(name, []).append(time.perf_counter() - begin)
    return {name: min(times[1:]) for name, times in best.items()}, args


def shapes(args):
    """The sizes of the arrays with more than one axis, or of the first."""
    arrays = [x for x in args if isinstance(x, np.ndarray)]
    sizes = ["x".join(map(str, x.shape)) for x in arrays if x.ndim > 1] or [str(arrays[0].size)]
    return ", ".join(dict.fromkeys(sizes))


def main():
    parser = argparse.ArgumentParser(description="Time every version of every kernel against its reference.")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains TEXT")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, of which the best counts (5)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    for module in pkgutil.iter_modules(minillm.kernels.__path__):
        if Path(minillm.kernels.__file__).with_name(f"{module.name}.py").exists():
            importlib.import_module(f"minillm.kernels.{module.name}")
    chosen = [kernel for kernel in KERNELS if options.only in kernel.name]
    if not chosen:
        parser.error(f"no kernel's name contains {options.only!r}; there are {', '.join(k.name for k in KERNELS)}")

    threads = numba.get_num_threads()
    print(
        f"{platform.machine()}, {threads} threads, NumPy {np.__version__}, Numba {numba.__version__}, {options.dtype}"
    )
    print(f"{'kernel':<32}" + "".join(f"{name + ' ms':>14}" for name in VERSIONS) + f"{'best ratio':>12}  arrays")
    for kernel in chosen:
        times, args = measure(kernel, options.rounds, options.dtype)
        cells = [f"{1e3 * times[name]:.2f}" if name in times else "missing" for name in VERSIONS]
        ratio = times["reference"] / min(times.values())
        print(
            f"{kernel.name:<32}" + "".join(f"{c:>14}" for c in cells) + f"{ratio:>11.1f}x  {shapes(args)}", flush=True
        )


if __name__ == "__main__":
    main()
