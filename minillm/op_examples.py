"""
Every op's docstring ends with a line like `Example: linear(randn(B, T, K), randn(N, K), randn(N))`. This file reads it:
the sizes are letters, to be chosen by whoever asks, and the words below draw the arrays. The property tests draw
thousands of calls of every op from that line, and scripts/explain_gradient.py one, so an op can not be without.
"""

import inspect
import re

import numpy as np

POSITIVE = "DFHPQV"  # letters that stand for sizes of at least 1; all others may be 0


def ops_of(*modules):
    """{name: op} of the ops that these modules define, in the order of their source."""
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if getattr(value, "is_op", False) and value.__module__ == module.__name__
    }


def sections(op):
    """The parts of an op's docstring: {"equation", "gradient", "keeps", "example"}; ValueError if one is missing."""
    text = inspect.getdoc(op) or ""
    match = re.fullmatch(
        r"(?P<equation>.*?)\n(?P<gradient>d\w+(?:\[\w+\])? (?:=|\+=|has) .*?)\n"
        r"(?P<keeps>Keeps .*?)\nExample: (?P<example>.*)",
        re.sub(r"\n\n", "\n", text),
        re.DOTALL,
    )
    if match is None:
        raise ValueError(f"{op.__name__}: the docstring needs an equation, `dx = ...`, `Keeps ...` and `Example: ...`")
    return match.groupdict()


def letters(op):
    """The sizes that the op's Example leaves open."""
    return sorted(set(re.findall(r"\b[A-Z]\b", sections(op)["example"])))


def draw(op, rng, sizes):
    """(inputs, constants) of one call of `op`, in float64: `sizes` gives a number for each letter of its Example."""

    grids = [0]  # how many grids of distinct numbers have been drawn: each lies between the others

    def randn(*shape):
        return rng.standard_normal(shape)

    def positive(*shape):
        return rng.uniform(0.5, 2.0, shape)

    def spread(*shape):
        """No two elements of one call, and none and a multiple of 0.05, closer than 0.01: for ops with a kink."""
        n, grids[0] = int(np.prod(shape)), grids[0] + 1
        return (rng.permutation(2 * n)[:n].reshape(shape) - n + 0.3 * grids[0] - 0.1) * 0.05

    def coin(*shape):
        return rng.random(shape) < 0.5

    def ids(n, *shape):
        return rng.integers(0, max(n, 1), shape)

    def starts(B, T, S):
        """Attention's `start` for T queries on T + S keys: documents that begin at a few places, some ahead of the
        query, which then sees nothing."""
        return np.sort(rng.choice(rng.integers(0, T + S + 1, 3), (B, T)), -1).astype(np.int32)

    def capture(*inputs, **constants):
        return list(inputs), constants

    words = (randn, positive, spread, coin, ids, starts)
    names = {word.__name__: word for word in words} | {op.__name__: capture, "slice": slice} | dict(sizes)
    return eval(sections(op)["example"], {"__builtins__": {}}, names)  # our own source, not anybody's input
