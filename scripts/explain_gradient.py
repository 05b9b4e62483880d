"""
Explain one op on one page: the equation, the gradient and its derivation, what is kept in memory, and the gradient
beside finite differences.

    python scripts/explain_gradient.py attention
    python scripts/explain_gradient.py --list
    python scripts/explain_gradient.py --all --out gradients.md

Nothing is said twice: the words are the docstrings of the op and of its kernel file, the numbers come from one call.
"""

import ast
import difflib
import inspect
import itertools
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # explain this checkout, whatever else is installed

import scripts.command_line as command_line
from minillm import autograd, functional, lora, op_examples
from minillm.autograd import Tensor, saved_arrays

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 116
STEP = 1e-5
RTOL, ATOL = 1e-5, 1e-7  # as in tests/gradcheck.py
SHOWN = 4  # elements of each input that the page shows; all of them are checked

OPS = op_examples.ops_of(autograd, functional, lora)


class Page(NamedTuple):
    """What there is to say about an op, for `as_text` or `as_markdown` to set."""

    name: str
    signature: str
    source: str
    parts: list  # [(title, text), ...]
    verdict: str
    ok: bool


def explain(op, seed=0):
    """The page of an op."""
    words = op_examples.sections(op)
    rng = np.random.default_rng(seed)
    sizes = {letter: n for n, letter in enumerate(op_examples.letters(op), 2)}  # all different: a shape tells its axes
    values, constants = op_examples.draw(op, rng, sizes)
    inputs = dict(zip(names_of_inputs(op, len(values)), values, strict=True))

    def run(*xs):
        return as_tuple(op(*xs, **constants))

    leaves = {name: Tensor(x, requires_grad=is_float(x)) for name, x in inputs.items()}
    results = run(*leaves.values())
    arrays = [("input", *pair) for pair in inputs.items()]
    arrays += [("constant", *pair) for name, value in constants.items() for pair in arrays_in(name, value)]
    outputs = tuple(y.data for y in results)
    arrays += [("result", *pair) for pair in arrays_in("result", outputs if len(outputs) > 1 else outputs[0])]
    kept = kept_table(results, arrays)  # now: backward frees what it has used
    checks = check(run, inputs, leaves, results, rng)

    parts = [("Equation", words["equation"])]
    parts.append(("Gradient (g is dL/dresult and dx is dL/dx, for any loss L)", words["gradient"]))
    for path in dict.fromkeys(re.findall(r"\((kernels/\w+\.py)\)", op.__doc__)):
        parts.append((f"Derivation, from {path} (where g is called dy or do)", derivation(path)))
    call = textwrap.fill(words["example"], WIDTH, subsequent_indent=4 * " ")
    chosen = ", ".join(f"{letter} = {n}" for letter, n in sizes.items())
    parts.append(("Example", f"{call}\nwith {chosen}\n\n{array_table(arrays)}"))
    parts.append(("Kept in memory until the way back", f"{words['keeps']}\n\n{kept}"))
    parts.append(("Check of the example, in float64", check_table(checks)))
    return Page(op.__name__, signature(op), source(op), parts, *verdict(op, checks))


# ------------------------------------------------------------------ the words


def headline(op):
    """The op's equation without the shapes, references and remarks that follow it."""
    equation = " ".join(op_examples.sections(op)["equation"].split()).replace("`", "")
    return re.split(r": |(?<![ .])(?<!al)\. ", equation)[0].rstrip(".")  # not at "q . k", "y_1, ..." and "et al. 2022"


def signature(op):
    """name(parameters) as a caller sees it: `needs` comes from the engine."""
    whole = inspect.signature(op)
    seen = whole.replace(parameters=[p for name, p in whole.parameters.items() if name != "needs"])
    return f"{op.__name__}{seen}"


def source(op):
    """file:line, from the root of the repository."""
    path = Path(os.path.relpath(inspect.getsourcefile(inspect.unwrap(op)), ROOT))
    return f"{path.as_posix()}:{inspect.getsourcelines(op)[1]}"


def chapter(op):
    """The op's file, and the heading above it there."""
    path, line = source(op).split(":")
    above = (ROOT / path).read_text(encoding="utf-8").splitlines()[: int(line)]
    return f"{path}: {[text for text in above if text.startswith('# -----')][-1].strip('# -')}"


def derivation(path):
    """A kernel file's docstring up to its rungs, which are about speed."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return re.sub(r"^    ", "  ", text.partition("\n\nRungs")[0], flags=re.MULTILINE)


# ------------------------------------------------------------------ the example and its arrays


def is_float(x):
    return x.dtype.kind == "f"


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def names_of_inputs(op, count):
    """The positional parameters' names; those of *inputs are inputs[0], inputs[1], ..."""
    names = []
    for name, parameter in inspect.signature(op).parameters.items():
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}[{i}]" for i in range(count)] if several else [name]
    return names[:count]


def arrays_in(name, value):
    """[(name, array)] for an array, [(name[0], array), ...] for those in a tuple, [] for anything else."""
    parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)] if isinstance(value, tuple) else [(name, value)]
    return [(name, part) for name, part in parts if isinstance(part, np.ndarray)]


def block(array):
    """The memory that an array keeps alive: that of the array which it is a view of, if it is one."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def array_table(arrays):
    rows = [("array", "", "shape", "dtype", "bytes")]
    for role, name, a in arrays:
        note = ", no gradient" if role == "input" and not is_float(a) else ""
        rows.append((name, role + note, str(a.shape), str(a.dtype), f"{a.nbytes:,}"))
    return table(rows, "<<<<>")


def kept_table(results, arrays):
    """The arrays that the way back holds, under the names they have in it, and whose memory that is."""
    kept = [array for _, array in saved_arrays(*results)]
    backs = filter(inspect.isfunction, as_tuple(results[0].node.way_back))
    variables = [variable for back in backs for variable in inspect.getclosurevars(back).nonlocals.items()]
    names = {id(a): name for variable in variables for name, a in arrays_in(*variable)}
    owners = {id(block(a)): name for _, name, a in arrays}
    rows = [("variable", "shared with", "shape", "dtype", "bytes")]
    for a in kept:
        owner = owners.get(id(block(a)), "")
        name = names.get(id(a), owner or "?")  # a function inside of the way back may have it under another name
        rows.append((name, owner, str(a.shape), str(a.dtype), f"{a.nbytes:,}"))
    sizes = {id(block(a)): block(a).nbytes for a in kept}  # each block once, however many views it has
    own = sum(size for i, size in sizes.items() if i not in owners)
    inputs = sum(a.nbytes for role, _, a in arrays if role == "input")
    if not kept:
        return f"Measured: no array. The inputs have {inputs:,} bytes."
    total = f"Views counted once: {sum(sizes.values()):,} bytes, {own:,} of them held by the way back alone."
    return f"{table(rows, '<<<<>')}\n\n{total} The inputs have {inputs:,}."


# ------------------------------------------------------------------ the check


class Check:
    """The gradient for one input, from the way back and from finite differences."""

    def __init__(self, name, analytic, numeric):
        self.name, self.analytic, self.numeric = name, analytic, numeric
        # error <= RTOL is |difference| <= RTOL |dL/dx| + ATOL: relative, but not for what is next to 0
        self.error = np.abs(analytic - numeric) / (np.maximum(np.abs(analytic), np.abs(numeric)) + ATOL / RTOL)

    @property
    def ok(self):
        return bool((self.error <= RTOL).all())  # a NaN is not

    def rows(self):
        moving = np.flatnonzero((self.analytic != 0) | (np.abs(self.numeric) > ATOL))  # 0 beside 0 shows little
        if not len(moving):
            moving = np.arange(self.error.size)
        spaced = np.unique(np.linspace(0, len(moving) - 1, SHOWN).astype(int))
        return [
            *(self.row("", i) for i in moving[spaced]),
            self.row(f"worst of {self.error.size}: ", self.error.argmax()),
        ]

    def row(self, label, i):
        at = ", ".join(map(str, np.unravel_index(i, self.error.shape)))
        analytic, numeric, error = (a.flat[i] for a in (self.analytic, self.numeric, self.error))
        return f"{label}{self.name}[{at}]", f"{analytic:.9f}", f"{numeric:.9f}", f"{error:.1e}"


def check(run, inputs, leaves, results, rng):
    """A Check for each input that has a gradient."""
    v = [rng.standard_normal(y.shape) for y in results]  # ones would hide an op that reads the wrong row of g

    def loss(results):
        return sum((y * weights).sum() for y, weights in zip(results, v, strict=True))

    loss(results).backward()
    checks = []
    for name, x in inputs.items():
        if is_float(x):
            numeric = central_differences(lambda: loss(run(*inputs.values())).item(), x)
            checks.append(Check(name, leaves[name].grad, numeric))
    return checks


def central_differences(loss, x):
    """dloss/dx, one element after another. `loss` takes nothing and reads x, which is moved in place."""
    h = STEP * max(1.0, np.abs(x).max())
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        here = x[i]
        x[i] = here + h
        above = loss()
        x[i] = here - h
        below = loss()
        x[i] = here
        gradient[i] = (above - below) / (2 * h)
    return gradient


def check_table(checks):
    note = (
        "L = sum of v y over every result y, v random. differences = (L(x + h) - L(x - h)) / 2h, one element x at a\n"
        f"time, h = {STEP:.0e} max(1, max |x|). error = |dL/dx - differences| / (|dL/dx| + {ATOL / RTOL:.2f})."
    )
    rows = [("x", "dL/dx", "differences", "error")]
    rows += [row for check in checks for row in check.rows()]
    return f"{note}\n\n{table(rows, '<>>>')}"


def verdict(op, checks):
    """(the last line of the page, whether the gradient is right)."""
    wrong = [check.name for check in checks if not check.ok]
    worst = f"error at most {np.max([check.error.max() for check in checks]):.1e} (limit {RTOL:.0e})"
    if wrong:
        return f"WRONG: {op.__name__}'s gradient for {', '.join(wrong)} is not what differences give, {worst}", False
    count = sum(check.error.size for check in checks)
    return f"OK: {op.__name__} agrees with finite differences at all {count} elements, {worst}", True


# ------------------------------------------------------------------ pages


def table(rows, align):
    """Rows of strings as aligned columns; `align` has a < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{c:{side}{width}}" for c, side, width in zip(row, align, widths, strict=True)] for row in rows]
    return "\n".join("   ".join(row).rstrip() for row in cells)


def as_text(page):
    head = textwrap.fill(page.signature, WIDTH, subsequent_indent=4 * " ")
    parts = [f"{title}\n{textwrap.indent(text, 2 * ' ')}" for title, text in page.parts]
    return "\n\n".join([f"{head}\n{page.source}", *parts, page.verdict])


def as_markdown(page):
    """The same in Markdown. The text stays in fixed width: in formulas, * and _ mean what they say."""
    parts = [f"**{title}**\n\n```text\n{text}\n```" for title, text in page.parts]
    return "\n\n".join([f"### {page.name}", f"`{page.signature}`\\\n{page.source}", *parts, f"**{page.verdict}**"])


def book(pages):
    """(all pages in Markdown after a table of contents, one line about the checks)."""
    wrong = [page.name for page in pages if not page.ok]
    summary = f"{len(pages)} ops, checked: " + (f"WRONG are {', '.join(wrong)}" if wrong else "all gradients are right")
    contents, body = [], []
    for title, group in itertools.groupby(pages, lambda page: chapter(OPS[page.name])):
        group = list(group)
        contents += [f"**{title}**", "\n".join(f"- [{p.name}](#{p.name}): `{headline(OPS[p.name])}`" for p in group)]
        body += [f"## {title}", *map(as_markdown, group)]
    head = ["# Every op and its gradient", f"Written by `python scripts/explain_gradient.py --all`. {summary}."]
    return "\n\n".join([*head, *contents, *body]), summary


def main(argv=None):
    parser = command_line.Parser(description="Explain the gradient of one op, and check it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("op", metavar="OP", nargs="?", help="the op's name")
    what.add_argument("--list", action="store_true", help="print the names of all ops, with their equations")
    what.add_argument("--all", action="store_true", help="write one Markdown page of all ops")
    parser.add_argument("--out", metavar="FILE", type=Path, help="with --all: write to FILE, not to standard output")
    parser.add_argument("--seed", type=int, default=0, help="draws the example's numbers (default: 0)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if args.out and not args.all:
        parser.error("--out goes with --all")

    if args.list:
        width = max(map(len, OPS)) + 2
        for name, op in OPS.items():
            print(textwrap.fill(f"{name:<{width}}{headline(op)}", WIDTH, subsequent_indent=width * " "))
        return 0
    if args.all:
        pages = [explain(op, args.seed) for op in OPS.values()]
        text, summary = book(pages)
        if args.out:
            try:
                args.out.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                parser.error(f"--out {args.out}: {error.strerror}")
        print(f"{args.out}: {summary}" if args.out else text)
        return 0 if all(page.ok for page in pages) else 1
    if args.op not in OPS:
        near = difflib.get_close_matches(args.op, OPS)
        hint = f"did you mean {' or '.join(near)}?" if near else "--list prints the names"
        print(f"explain_gradient.py: there is no op {args.op!r}; {hint}", file=sys.stderr)
        return 2
    page = explain(OPS[args.op], args.seed)
    print(as_text(page))
    return 0 if page.ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the pager was closed; _exit, because the flush at exit would complain once more
        os._exit(0)
