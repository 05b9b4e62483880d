"""A kernel is one function with several versions: the readable reference, and a fast one per way of writing it."""

import functools
import importlib
import os

import numpy as np

KERNELS = []  # every Kernel made, so that tests and benchmarks need no list of their own

# The versions for an array's device, the fastest first; those that are taken by name only; and the dtypes that they all
# take. Everything else is the reference's: on the host 16-bit floats, which Numba does not know; on a GPU float64, the
# oracle.
_PREFERENCE = {"cpu": ("numba",), "cuda": ("cuda", "numba_cuda")}
BY_NAME = {"cpu": (), "cuda": ("cuda_atomics", "cuda_wgmma")}
_DTYPES = {"cpu": ("float32", "float64"), "cuda": ("float32", "bfloat16", "float16")}


@functools.cache
def _fastest(device, dtype, wanted):
    """Names of versions to try for arrays of this dtype, the best first: the one that is wanted, if this device has it,
    then the fastest."""
    versions = {device: (*_PREFERENCE[device], *BY_NAME[device]) for device in _PREFERENCE}
    known = ["reference", *versions["cpu"], *versions["cuda"]]
    if wanted and wanted not in known:
        raise ValueError(f"MINILLM_KERNELS is {wanted!r}, and kernels have the versions {', '.join(known)}")
    if wanted == "reference" or dtype.name not in _DTYPES[device]:
        return ()
    first = (wanted,) if wanted in versions[device] else ()
    return *first, *_PREFERENCE[device]


def numba_cuda(name):
    """The function of this name in numba_cuda.py, imported at the first call: numba.cuda takes a second to load."""

    def run(*arguments):
        return getattr(importlib.import_module(".numba_cuda", __package__), name)(*arguments)

    return run


class Kernel:
    """One name, one reference, its named versions, and examples of its arguments.

    name       what benchmarks and tests call it
    reference  plain array code for any device and float dtype: the specification the versions are tested against
    versions   {"numba": function, "cuda": function, ...}, same arguments and results as the reference
    example    example(rng, size) -> (args, kwargs) in float64; size is "ragged" (small, awkward), "extreme" (as small,
               with the largest values the kernel must bear), "large" (for timing) or "gpu" (for timing there; the rng
               may then be CuPy's, which has standard_normal, random, uniform and integers). A name that begins with
               "gpu, " is another such size, where a kernel has one
    saved      for a backward: saved(*args) -> args in which what the forward had saved is the forward's own result
    operations operations(*args) -> multiplications and additions of a call, where these take the time, and not the
               bytes that it moves: then 0

    Calling a Kernel runs the fastest version for the first array's device and dtype, or the reference where there is
    none.
    MINILLM_KERNELS in the environment names another version for all calls: `reference`, or one that is taken wherever a
    kernel has it for the array's device and dtype.
    """

    def __init__(self, name, *, reference, versions, example, saved=lambda *args: args, operations=lambda *args: 0):
        self.name, self.reference, self.versions, self.operations = name, reference, versions, operations
        self._example, self._saved = example, saved
        KERNELS.append(self)

    def example(self, rng, size, dtype=np.float64, place=lambda x: x):
        """(args, kwargs) of one call, with floats of this dtype; `place` brings each array to where it is to be."""
        args, kwargs = self._example(rng, size)
        args = [x.astype(dtype) if hasattr(x, "dtype") and x.ndim and x.dtype.kind == "f" else x for x in args]
        return tuple(self._saved(*(place(x) if hasattr(x, "dtype") and x.ndim else x for x in args))), kwargs

    def __repr__(self):
        return f"Kernel({self.name!r}, versions={['reference', *self.versions]})"

    def __call__(self, *args, **kwargs):
        return self.version(self.choose(args[0]))(*args, **kwargs)

    def choose(self, x):
        """The name of the version a call with first array `x` would run."""
        wanted = os.environ.get("MINILLM_KERNELS")
        for name in _fastest("cpu" if isinstance(x, np.ndarray) else "cuda", x.dtype, wanted):
            if name in self.versions:
                return name
        return "reference"

    def version(self, name):
        """The version called `name`; "reference" is one of them."""
        if name == "reference":
            return self.reference
        if name not in self.versions:
            raise KeyError(f"kernel {self.name} has no version {name!r}, only {['reference', *self.versions]}")
        return self.versions[name]
