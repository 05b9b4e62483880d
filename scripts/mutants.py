"""
Plant one fault at a time in a copy of the engine, and see whether the tests notice: what a green suite is worth.

    python scripts/mutants.py
    python scripts/mutants.py --only attention --jobs 1
    python scripts/mutants.py --list

A mutant is killed when a test fails on it (or crashes, or hangs: "timeout"). It has SURVIVED when the whole of TESTS
passes, and then a test is missing. Exit status: 0 if all were killed, 1 if one survived, 2 if nothing can be said: a
wrong option, a mutant whose text is gone from its file, tests that fail without any fault.
"""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# The engine's tests, the quick ones first.
TESTS = [
    "tests/test_autograd.py",
    "tests/test_functional.py",
    "tests/test_cross_entropy.py",
    "tests/test_model_gradient.py",
    "tests/test_attention.py",
    "tests/test_gradients.py",
    "tests/test_kernels.py",
]

# file: (text that occurs in it once, what a tired author might have written, the fault). A fault begins with a word
# that pytest -k understands: the tests with that word in their names run first, because they are likely to notice.
FAULTS = {
    "minillm/autograd.py": [
        ("unbroadcast(-g, ys)", "unbroadcast(g, ys)", "sub: dy has the sign of dx"),
        ("unbroadcast(-g * z / y, ys)", "unbroadcast(-g * z, ys)", "div: dy is not divided by y"),
        ("(lambda g: g if scale == 1 else scale * g,)", "(lambda g: g,)", "affine: dx without the scale"),
        ("xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.abs(x)))", "-xp.log1p(xp.exp(-x))", "log_sigmoid: e^-x overflows"),
        (
            "maximum(x, y), (lambda g: unbroadcast(g * first, xs), lambda g: unbroadcast(g * ~first, ys))",
            "maximum(x, y), (lambda g: unbroadcast(g * first, xs), lambda g: unbroadcast(g * (y >= x), ys))",
            "maximum: at a tie both sides get the whole gradient",
        ),
        (
            "xp.where(condition, g.dtype.type(0), g)",
            "g * ~condition",
            "where: what was not chosen gets 0 times g, which may be infinite",
        ),
        ("(chosen / chosen.sum(axis, keepdims=True, dtype=g.dtype))", "chosen", "max: ties do not share the gradient"),
        ("_expand(g / n, shape,", "_expand(g, shape,", "mean: dx is not divided by n"),
        (
            "m = xp.where(xp.isfinite(m), m, x.dtype.type(0))",
            "m = xp.zeros_like(m)",
            "logsumexp: x is not shifted by its maximum and e^x overflows",
        ),
        ("else xp.zeros(shape, dtype)", "else xp.zeros(shape)", "autograd: an unused result's zeros are float64"),
        ("back = tuple(axes.index(i) for i in range(x.ndim))", "back = axes", "transpose: turned again, not back"),
        ("xp.add.at(dx, index, g)", "dx[index] += g", "getitem: an element picked twice gets one gradient"),
        ("xp.add.at(dx, tuple(at), g)", "dx[tuple(at)] += g", "gather: a place taken twice gets one gradient"),
        (
            "return g.sum(tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1), keepdims=True)",
            "return g",
            "unbroadcast: axes of size 1 are not summed",
        ),
        ("total = total + g", "total = g", "autograd: of a result used twice only the last gradient counts"),
        ("have[index] = g, False", "have[index] = g, True", "autograd: adds in place into an array that others hold"),
        (
            "sorted(pending, key=lambda n: n.born, reverse=True)",
            "list(pending)",
            "autograd: a node runs back before all of its gradient is there",
        ),
        ("leaf.grad += g", "leaf.grad = g", "autograd: a second backward() forgets the first one's gradient"),
        (".array(g, dtype=leaf.dtype)", ".asarray(g, dtype=leaf.dtype)", "autograd: two leaves share one gradient"),
        ("node.parents, node.way_back = (), None", "pass", "autograd: a graph is not freed, and may be used again"),
        ("_recording.reset(token)", '_recording.set("yes")', "no_grad: the end of an inner one ends the outer one"),
        (
            'with _record("inputs only" if _recording.get() != "no" else "no"):',
            'with _record("no"):',
            "checkpoint: a parameter that is not among the inputs loses its gradient without a word",
        ),
        ('with _record("yes"):', "with contextlib.nullcontext():", "checkpoint: under no_grad the replay is lost"),
    ],
    "minillm/functional.py": [
        ("lambda g: g.reshape(rows, N).sum(0)", "lambda g: g.reshape(rows, N).mean(0)", "linear: dbias is a mean"),
        ("y * (g - (g * y).sum(axis, keepdims=True))", "y * (g - g * y)", "softmax: dx without the sum over the slice"),
        ("a * a.dtype.type(1 / (1 - p))", "a", "dropout: what is kept is not divided by 1 - p"),
        ("rotate(g, cos, -sin)", "rotate(g, cos, sin)", "rope: the gradient is turned forwards"),
        (
            "cos, sin = cos[offset : offset + x.shape[1]], sin[offset : offset + x.shape[1]]",
            "cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]",
            "rope: the offset is forgotten",
        ),
        (
            "used.astype(like) / xp_of(targets).maximum(used.sum(), 1).astype(like)",
            "used.astype(like) / xp_of(targets).maximum(used.size, 1).astype(like)",
            "cross_entropy: the mean counts ignored tokens too",
        ),
        ("one + 2 * z_loss * lse", "one + z_loss * lse", "cross_entropy: the z-loss's gradient without the 2"),
        ("-label_smoothing / V * one", "-label_smoothing * one", "cross_entropy: label smoothing without 1 / V"),
        ("wg = w * g", "wg = w", "cross_entropy: the incoming gradient is forgotten"),
        (
            "m, log_total, *coefficients, 1 / temperature)",
            "m, log_total, *coefficients, 1.0)",
            "token_logprobs: the gradient at temperature 1",
        ),
        (
            "(-g - g_H * (H - log_total), -g_H, g, zero)",
            "(-g - g_H * (H - log_total), g_H, g, zero)",
            "token_logprobs: a sign in the entropy's gradient",
        ),
        ("self.dweight += dlogits.T", "self.dweight = dlogits.T", "linear_cross_entropy: dweight of one chunk"),
        (
            "upcast(weight[:0]).dtype) if needs",
            "weight.dtype) if needs",
            "linear_cross_entropy: dweight adds up in 16 bits",
        ),
        (
            "(m, log_total, wc * a, 0 * wc, wc * c, wc * d)",
            "(m, log_total, wc * a, 0 * wc, c, wc * d)",
            "linear_cross_entropy: the target's term without the token's weight",
        ),
    ],
    "kernels/attention.py": [
        ("min(i + shift + 1 - j0, TILE)", "min(i + shift - j0, TILE)", "attention: a query does not see itself"),
        ("max(start[b, i] - j0, 0)", "max(start[b, i] + 1 - j0, 0)", "attention: the first visible key is hidden"),
        ("hk = h // (H // Hk)", "hk = h % Hk", "attention: a query head reads another group's key head"),
        ("sums[d] *= correction", "sums[d] *= one", "attention: earlier tiles are not rescaled to the new maximum"),
        ("to[d] = scale * dq_sum[r, d]", "to[d] = dq_sum[r, d]", "attention: dq without the scale"),
        (
            "dsr[j] = pr[j] * (dsr[j] - delta[r])",
            "dsr[j] = pr[j] * dsr[j]",
            "attention: ds without the sum over the row",
        ),
        (
            "matmul_add(dk_sum[",
            "if h % (H // Hk) == 0: matmul_add(dk_sum[",
            "attention: dk of the group's first head only",
        ),
    ],
    "kernels/cross_entropy.py": [
        ("to[:] = 0", "pass", "cross_entropy: the gradient of an ignored row is not cleared"),
        ("weighted += e * (x if x > floor else floor)", "weighted += e * x", "cross_entropy: 0 times -inf in p x"),
    ],
    "kernels/rms_norm.py": [
        (
            "np.sqrt(_sum_of_products(row, row) * share + eps)",
            "(np.sqrt(_sum_of_products(row, row) * share) + eps)",
            "rms_norm: eps stands outside the root",
        ),
        ("r_i * (h[d] - row[d] * shared)", "r_i * h[d]", "rms_norm: dx without the term through r"),
        ("partial.sum(0)", "partial[0]", "rms_norm: dweight of the first block of rows only"),
    ],
    "kernels/layer_norm.py": [
        (
            "squares += (row[d] - mean) * (row[d] - mean)",
            "squares += row[d] * row[d] - mean * mean",
            "layer_norm: the variance in one pass, which cancels",
        ),
        ("r_i * (h - mean_h - n * mean_hn)", "r_i * (h - n * mean_hn)", "layer_norm: dx without mean_d(h)"),
    ],
    "kernels/embedding.py": [
        ("to[d] += row[d]", "to[d] = row[d]", "embedding: of a token that occurs twice only the last gradient counts"),
    ],
    "kernels/rope.py": [
        (
            "low, high = x[first : first + half], x[first + half : first + D]",
            "low, high = x[first : first + D : 2], x[first + 1 : first + D : 2]",
            "rope: pairs of neighbours instead of halves",
        ),
    ],
    "kernels/swiglu.py": [
        (
            "g[f] * b[f] * s * (one + a[f] * (one - s))",
            "g[f] * b[f] * s * (one + a[f])",
            "swiglu: silu' without the factor 1 - s",
        ),
        ("to_up[f] = g[f] * a[f] * s", "to_up[f] = g[f] * b[f] * s", "swiglu: gate and up swapped in dup"),
    ],
    "kernels/gelu.py": [
        ("6 * _ROOT * _CUBE", "2 * _ROOT * _CUBE", "gelu: the derivative of x^3 without its 3"),
        (
            "half * math.erfc(-x[i] * root_half) +",
            "half * (one + math.erf(x[i] * root_half)) +",
            "gelu: 1 + erf loses its digits",
        ),
    ],
    "kernels/adamw.py": [
        ("lr / (1 - beta1**step)", "lr", "adamw: the first moment's bias is not corrected"),
        ("(np.sqrt(v_i) * root + eps)", "np.sqrt(v_i * root * root + eps)", "adamw: eps stands inside the root"),
        ("(1 - lr * weight_decay,", "(1 - weight_decay,", "adamw: the decay without the learning rate"),
    ],
    "kernels/jit.py": [
        ("y = _ZERO if x < _LOW else y\n        ", "", "exp: e^-inf is not 0"),
        ("for j in range(whole, x.size):", "for j in range(whole, x.size - 1):", "row_max: the last one is not read"),
        (
            "builder.store(builder.fadd(builder.load(p, align=itemsize), results[row][n]), p, align=itemsize)",
            "builder.store(results[row][n], p, align=itemsize)",
            "matmul_add: the product replaces what was there",
        ),
    ],
    "kernels/device.py": [
        ("ids.max() >= n", "ids.max() > n", "check_ids: the id that is one too large passes"),
    ],
}


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    fault: str

    def applied(self, text):
        """The file's text with the fault in it."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.fault!r}: {self.file} should have its text once, and has it {count} times: {self.old}"
            )
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(file, *row) for file, rows in FAULTS.items() for row in rows]


class Outcome(NamedTuple):
    word: str  # "passed", "killed" or "timeout"
    by: str  # the first test that failed, or what else ended it


async def run_tests(tree, tests, limit, *options):
    """Run pytest in `tree`, for `limit` seconds at most."""
    theirs = ("NUMBA_CACHE_DIR", "MINILLM_KERNELS", "PYTEST_ADDOPTS")  # the caller's settings, which would leak in
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    # The copy comes before an installed package, and .pyc files might be taken for those of the mutated source.
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests),
        cwd=tree,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = (await asyncio.wait_for(process.communicate(), limit))[0].decode(errors="replace")
    except TimeoutError:
        return Outcome("timeout", f"not done after {limit:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):  # after a timeout or Ctrl-C: pytest, and what the tests started
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
    if process.returncode in (0, 5):  # 5: no test has such a name
        return Outcome("passed", "")
    if process.returncode < 0:
        return Outcome("killed", signal.Signals(-process.returncode).name)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if process.returncode > 2 or not failed:
        raise ValueError(f"pytest could not run:\n{output}")
    return Outcome("killed", failed[1])


async def check(source, folder, mutants, tests, jobs, report):
    """Run `tests` on every mutant of the tree `source`, in `jobs` copies of it; report(mutant, outcome, seconds)."""
    queue = iter(mutants)

    async def worker(home):
        tree, green = home / "tree", home / "green"
        shutil.copytree(source, tree)
        began = time.monotonic()
        outcome = await run_tests(tree, tests, None)
        if outcome.word != "passed":
            raise ValueError(f"without any fault, {outcome.by} fails")
        limit = 60 + 3 * (time.monotonic() - began)
        tree.rename(green)
        for mutant in queue:
            began = time.monotonic()
            # Always the same path, which Numba's cache has in its keys: so only what was mutated is compiled again.
            shutil.copytree(green, tree)
            file = tree / mutant.file
            file.write_text(mutant.applied(file.read_text(encoding="utf-8")), encoding="utf-8")
            outcome = await run_tests(tree, tests, limit, "-k", mutant.fault.split(":")[0])
            if outcome.word == "passed":
                outcome = await run_tests(tree, tests, limit)
            report(mutant, outcome, time.monotonic() - began)
            shutil.rmtree(tree)

    try:
        async with asyncio.TaskGroup() as workers:
            for n in range(jobs):
                workers.create_task(worker(folder / str(n)))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def copy_checkout(root, to):
    """The files that git knows or would add; where there is no git, all but the hidden ones."""
    command = ["git", "-C", str(root), "ls-files", "-coz", "--exclude-standard"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    if not found:
        shutil.copytree(root, to, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in filter(None, found.split("\0")):
        if (root / name).is_file():  # git goes on knowing a file that was deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def run(root, mutants, tests, jobs):
    """Check all mutants, print a line for each as it is done and a table of them all; [(mutant, outcome), ...]."""
    done = []

    def report(mutant, outcome, seconds):
        done.append((mutant, outcome))
        word = "SURVIVED" if outcome.word == "passed" else outcome.word
        line = f"{len(done):>3}/{len(mutants)} {word:<8}{seconds:>6.1f} s  {mutant.file}  {mutant.fault}"
        print(f"{line}  [{outcome.by}]" if outcome.by else line, flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        source = Path(folder, "source")  # one state for all, whatever is edited meanwhile
        copy_checkout(root, source)
        for mutant in mutants:
            mutant.applied((source / mutant.file).read_text(encoding="utf-8"))
        asyncio.run(check(source, Path(folder), mutants, tests, min(jobs, len(mutants)), report))

    print()
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        killed = [outcome.word != "passed" for mutant, outcome in done if mutant.file == file]
        print(f"{file:<28}{sum(killed):>3} of {len(killed)} killed")
    return done


def main(argv=None):
    parser = argparse.ArgumentParser(description="See whether the tests notice one planted fault at a time.")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the mutants with TEXT in their file or fault")
    parser.add_argument("--jobs", metavar="N", type=int, default=min(4, os.cpu_count() or 1), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    mutants = [m for m in MUTANTS if args.only.lower() in f"{m.file} {m.fault}".lower()]
    if not mutants:
        parser.error(f"no mutant has {args.only!r} in its file or fault; --list prints them")
    if args.list:
        for number, mutant in enumerate(mutants, 1):
            print(f"{number:>3}  {mutant.file:<26}{mutant.fault}")
        return 0
    began = time.monotonic()
    try:
        done = run(ROOT, mutants, TESTS, args.jobs)
    except ValueError as error:
        print(f"mutants.py: {error}", file=sys.stderr)
        return 2
    killed = sum(outcome.word != "passed" for _, outcome in done)
    print(f"{killed} of {len(done)} killed in {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if killed == len(done) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
