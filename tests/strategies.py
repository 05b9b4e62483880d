"""What hypothesis draws for the tests: sizes, memory layouts, and calls of an op from its docstring's Example line."""

import numpy as np
from hypothesis import strategies as st

from minillm import autograd, functional, lora
from minillm.kernels import attention, jit
from minillm.op_examples import POSITIVE, draw, letters, ops_of

OPS = ops_of(autograd, functional, lora)

SIZES = [1, 2, 3, 5, 13]  # two letters' product passes the kernels' block of 64 rows
LONG = [1, 2, 5, attention.TILE - 1, attention.TILE + 1]
assert SIZES[-1] ** 2 > jit.BLOCK


def sizes_of(op):
    """A number for each letter of the op's Example: 0 and 1 among them, primes, and tile borders for attention."""

    def choices(letter):
        if op.__name__ == "attention":
            return LONG if letter in "TS" else SIZES[:3]
        return SIZES if letter in POSITIVE else [0, *SIZES]

    return st.fixed_dictionaries({letter: st.sampled_from(choices(letter)) for letter in letters(op)})


@st.composite
def calls(draw_from, op):
    """(inputs, constants, rng) of one call of `op` in float64."""
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    inputs, constants = draw(op, rng, draw_from(sizes_of(op)))
    return inputs, constants, rng


def transposed(x):
    return np.ascontiguousarray(x.T).T


def reversed_(x):
    return np.ascontiguousarray(x[::-1])[::-1]


def every_other(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def inside(x):
    """A window of a larger array, as q, k and v are of one fused projection."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def read_only(x):
    return np.broadcast_to(x, x.shape)


def repeated(x):
    """The first row of x, broadcast over the others: stride 0, and other values than x."""
    return np.broadcast_to(x[:1], x.shape)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "transposed": transposed,
    "reversed": reversed_,
    "every other": every_other,
    "inside": inside,
    "read-only": read_only,
    "repeated": repeated,
}


def in_layout(x, name):
    """x in the memory layout of this name; arrays without axes or rows, and ids, stay as they are."""
    return LAYOUTS[name](x) if x.ndim and len(x) and x.dtype.kind == "f" else x
