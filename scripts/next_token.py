"""
Show what a model holds for likely to come next.

    python scripts/next_token.py FOLDER "The capital of France is"
    python scripts/next_token.py FOLDER "What is the capital of France?" --chat --compare OTHER_FOLDER
    python scripts/next_token.py FOLDER "Once upon a time" --steps 4

Text stands in ‹ ›, so that blanks show, and control tokens without. The longest bar fills its column: lengths compare
within a table only. Without a text it is the beginning of a document.
"""

import dataclasses
import math
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.chat import render, stop_ids
from minillm.generate import next_probabilities
from minillm.trainers.common import load_tokenizer, same_tokenizer, template_of
from scripts.chat import never_taught, spelled

EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
LABEL = 26  # columns that a token may take


@dataclasses.dataclass(kw_only=True)
class Options(command_line.Reading):
    """What to show."""

    model: tyro.conf.Positional[Path | None] = None
    """a model folder: config.json, *.safetensors, tokenizer.json"""
    text: tyro.conf.Positional[str] = ""
    """what stands before the token; none: the beginning of a document"""
    top: int | None = None
    """how many tokens, the likeliest (15; with --steps 5)"""
    temperature: float = 1.0
    """rescales the logits: below 1 sharpens the distribution"""
    chat: bool = False
    """the text is a user's question; show how the answer begins"""
    template: str = ""
    """with --chat: chatml, llama2, llama3, alpaca, or a Jinja file; none: the model folder's own"""
    steps: int = 1
    """how many tokens, one after another, each time going on with the likeliest"""
    compare: Path | None = None
    """another model folder with the same tokenizer, to show beside the first"""

    def __post_init__(self):
        if self.model is None:
            raise ValueError("MODEL is missing: the folder of the model to look into")
        self.top = self.top if self.top is not None else 15 if self.steps == 1 else 5
        for name, fits, must in (
            ("top", self.top >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("steps", self.steps >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"--{name} has to be {must}, and is {getattr(self, name)}")
        if self.chat and not self.text:
            raise ValueError("--chat needs a text, what the user says")
        if self.template and not self.chat:
            raise ValueError("--template goes with --chat")


# ------------------------------------------------------------------ numbers


def prompt_of(folder, tokenizer, options):
    """(ids of what stands before the token, ids that end what comes)."""
    if not options.chat:
        ids = tokenizer.encode(options.text).tolist()
        ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
        if not ids:
            raise ValueError(f"{folder}: this tokenizer has no token for the beginning of a document: give a text")
        return ids, {tokenizer.eos_id}
    template = template_of(folder, options.template)
    if not options.template and never_taught(folder, template):
        print(f"{folder} was never taught to chat: chatml is only a guess", file=sys.stderr)
    question = [{"role": "user", "content": options.text}]
    return render(question, template, tokenizer, add_generation_prompt=True)[0].tolist(), stop_ids(template, tokenizer)


def entropy(p):
    """Entropy in bits of a distribution (V,)."""
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum()) + 0.0  # + 0.0: never -0


def divergence(p, q):
    """KL(p || q) in bits of two distributions (V,); inf where q has nothing and p has."""
    p, q = p[p > 0], q[p > 0]
    with np.errstate(divide="ignore"):
        return max(float((p * np.log2(p / q)).sum()), 0.0)


# ------------------------------------------------------------------ a table of bars


def columns(text):
    """How many columns of a terminal `text` takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def padded(text, width):
    return text + " " * (width - columns(text))


def clipped(text, width):
    """`text` without what goes beyond `width` columns."""
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def percent(p):
    return "<0.01%" if 0 < p < 0.00005 else f"{p:.2%}"


def bar(share, width):
    """A bar as long as `share` of `width` columns, to an eighth of a column."""
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + EIGHTHS[eighths]


def tail(ids, tokenizer, width):
    """The last of some tokens, as many as one line of `width` columns holds."""
    shown = ""
    for token in reversed(ids):
        longer = spelled(token, tokenizer) + shown
        if columns(longer) > width - 1:
            return f"…{shown}"
        shown = longer
    return shown


def table(distributions, names, tokenizer, top, width, color=False):
    """Lines: the likeliest tokens of one distribution (V,), or of the mean of two, with a bar in a column for each."""
    size = max(map(len, distributions))
    distributions = [np.pad(p, (0, size - len(p))) for p in distributions]
    order = np.argsort(-sum(distributions), kind="stable")[:top].tolist()
    labels = [clipped(spelled(i, tokenizer), LABEL) for i in order]
    others = f"{size - len(order):,} other{'s' * (size - len(order) != 1)}"
    first = max(map(columns, [*labels, others, "perplexity"]))
    cell = (width - first) // len(distributions) - 2
    longest = max(p[order].max() for p in distributions)
    paint = lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if color and text.strip() else text

    def line(label, cells):
        return f"{label}  {'  '.join(cells)}".rstrip()

    if len(names) > 1:
        yield line(" " * first, [padded(clipped(name, cell), cell) for name in names])
    for i, label in zip(order, labels, strict=True):
        bars = [padded(bar(p[i] / longest, cell - 8), cell - 8) for p in distributions]
        cells = [f"{percent(p[i]):>7} {paint(text, 36)}" for p, text in zip(distributions, bars, strict=True)]
        yield line(padded(label, first) if label.startswith("‹") else paint(padded(label, first), 1), cells)
    if len(order) < size:
        rest = [max(1 - p[order].sum(), 0.0) for p in distributions]
        yield line(padded(others, first), [padded(f"{percent(p):>7}", cell) for p in rest])
    for label, text in (("entropy", lambda bits: f"{bits:.2f} bits"), ("perplexity", lambda bits: f"{2**bits:,.1f}")):
        cells = [padded(f"{text(entropy(p)):>7}", cell) for p in distributions]
        yield line(padded(label, first), cells)
    if len(names) > 1:
        p, q = distributions
        names = [clipped(name, cell) for name in names]
        yield f"KL({names[0]} || {names[1]}) {divergence(p, q):.2f} bits, the other way {divergence(q, p):.2f}"


# ------------------------------------------------------------------ the program


def run(options):
    sys.stdout.reconfigure(encoding="utf-8")
    folders = [options.model, *([options.compare] if options.compare else [])]
    tokenizer = load_tokenizer(options.model)
    if options.compare:
        same_tokenizer(options.compare, tokenizer, options.model)
    models = [options.load(folder, "lm") for folder in folders]
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    prompts, stops = zip(*(prompt_of(folder, tokenizer, options) for folder in folders), strict=True)
    context = min(model.config.max_position_embeddings for model in models)
    longest = max(map(len, prompts))
    if longest >= context:
        raise ValueError(f"the text has {longest:,} tokens, and the model's context is {context:,}")

    width = min(max(shutil.get_terminal_size().columns, 50), 100)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for step in range(options.steps):
        if step:
            print()
        if longest + step == context:
            print("the context is full")
            return
        distributions = [
            next_probabilities(model, ids, temperature=options.temperature)
            for model, ids in zip(models, prompts, strict=True)
        ]
        print(tail(prompts[0], tokenizer, width))
        print("\n".join(table(distributions, names, tokenizer, options.top, width, color)))
        likeliest = int(distributions[0].argmax())
        if likeliest in stops[0]:
            break
        for ids in prompts:
            ids.append(likeliest)


def main():
    arguments = sys.argv[1:]
    for place, following in enumerate([*arguments[1:], ""]):  # a text behind --chat is not its value
        if arguments[place : place + 1] == ["--chat"] and following not in ("True", "False"):
            arguments[place] = "--chat=True"
    command_line.run(run, command_line.parse(Options, "Show what a model holds for likely to come next.", arguments))


if __name__ == "__main__":
    main()
