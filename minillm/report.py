"""
metrics.jsonl of runs as curves; curves, tables and samples as one HTML file; tables for the terminal.

    panels = [metric_panel("loss", {"base": read_metrics("base")}, "loss")]
    page("report.html", "A run", [Heading("Pretraining"), Figure(draw(panels), "what was learned"), Table(...)])

The file needs nothing but itself: pictures are inlined SVG whose text is text and whose ink is the page's, so that they
turn dark with it. All text may come from a model or from strangers' data: it is escaped, and what has no shape of its
own (control characters, halves of surrogate pairs, marks that turn the direction of writing) is spelt out.
"""

import hashlib
import io
import math
import os
import re
import unicodedata
import warnings
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .data.readers import Bad, read_rows
from .extras import extra

INK = "#24292f"  # of axes and letters; in a page it becomes the page's own
# Okabe and Ito's, told apart by all eyes; the blue a little lighter, for dark pages.
COLOURS = ("#1b7fc4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.5)))  # the colours come again from the seventh label on, as another stroke
MANY = 200  # points from which on a line is drawn as a mean over faint values
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "minillm", "savefig.dpi": 110, "text.parse_math": False,
    "font.family": "sans-serif", "font.sans-serif": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10, "axes.labelsize": 8.5,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.13, "axes.facecolor": "none", "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "axes.formatter.limits": (-4, 6), "lines.linewidth": 1.4, "lines.markersize": 3.2,
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.06,
}  # fmt: skip


# ------------------------------------------------------------------ curves


class Line(NamedTuple):
    """One curve. Lines of one label have one colour, the held-out one has dots. A value that is no finite number (None,
    nan) is a gap."""

    label: str
    steps: list
    values: list
    held_out: bool = False


class Panel(NamedTuple):
    """Lines over one pair of axes. reference: (label, y), a level to compare with."""

    title: str
    lines: list
    xlabel: str = "step"
    ylabel: str = ""
    log: bool = False
    reference: tuple | None = None


def read_metrics(folder):
    """{metric: (steps, values)}, two lists each, of a run's metrics.jsonl. A last line that is cut off, as a killed run
    leaves it, is left out. ValueError: the folder has none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder} has no metrics.jsonl: it is no folder of a training run")
    curves = {}
    for _, row in read_rows(path, bad=Bad(1)):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row.get("step", len(steps)))
                values.append(value)
    return curves


def metric_panel(title, runs, metric, prefixes=("", "eval_"), **options):
    """A Panel of one metric and its eval_ counterpart, a colour for each run of {label: read_metrics(folder)}.
    prefixes: ("",) leaves the counterpart out, ("eval_",) shows it alone. options: more of Panel. ValueError: no run
    has the metric."""
    lines = [
        Line(label, *curves[prefix + metric], held_out=prefix == "eval_")
        for label, curves in runs.items()
        for prefix in prefixes
        if prefix + metric in curves
    ]
    if not lines:
        _known(runs, [metric])
    return Panel(title, lines, **options)


def _known(runs, names):
    """The names of all metrics. ValueError: one of `names` is not among them."""
    known = {name for curves in runs.values() for name in curves}
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"no run has {missing[0]!r}; there are {', '.join(sorted(known)) or 'none'}")
    return known


def plot(folders, path, names=()):
    """A picture (.png, .svg, .pdf) with one panel for each metric and one line for each run. A metric and its eval_
    counterpart share a panel. names: the metrics; none takes loss and everything that an evaluation measures.

    ValueError: a name that no run has, nothing to draw.
    """
    runs = {}
    for folder in folders:
        parts = Path(folder).resolve().parts
        endings = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]  # a/ppo and b/ppo are not both "ppo"
        runs[next((name for name in endings if name not in runs), str(folder))] = read_metrics(folder)
    known = _known(runs, names)
    chosen = list(names) or sorted({"loss"} & known | {name for name in known if name.startswith("eval_")})
    panels = []
    for metric in dict.fromkeys(name.removeprefix("eval_") for name in chosen):
        prefixes = [prefix for prefix in ("", "eval_") if not names or prefix + metric in names]
        panels.append(metric_panel(metric, runs, metric, prefixes))
    if not panels:
        raise ValueError("these runs have nothing to draw: give names of metrics")
    return draw(panels, path)


def draw(panels, path=None, columns=3):
    """Draw panels side by side, `columns` to a row. With a path (.png, .svg, .pdf): one picture; the path comes back.
    Without: Markup for a Figure, an SVG for each panel, which a narrow screen shows below each other.

    The same panels give the same bytes. ValueError: no panels, steps and values of different number.
    """
    if not panels:
        raise ValueError("there are no panels to draw")
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    looks = {
        label: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i, label in enumerate(labels)
    }
    with _style() as new_figure:
        if path is None:
            drawn = Markup("").join(_inline(panel, looks, new_figure) for panel in panels)
            return Markup('<div class="panels" style="--columns:{}">{}</div>').format(columns, drawn)
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        figure = new_figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
        for i, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, i + 1), panel, looks)
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, metadata=dates.get(Path(path).suffix.lower()))
    return path


@contextmanager
def _style():
    """matplotlib's Figure, drawn in STYLE whatever the user's own style is. No pyplot: nothing global is opened."""
    matplotlib = extra("matplotlib", "plot")
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has more letters than the font at hand
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield extra("matplotlib.figure", "plot").Figure


def _inline(panel, looks, new_figure):
    """A panel as <svg>, cut down to what a page needs."""
    width, height = 4.6, 3.2
    figure, file = new_figure(figsize=(width, height), layout="constrained"), io.StringIO()
    _draw_panel(figure.add_subplot(), panel, looks)
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata, facecolor="none", edgecolor="none")
    text = file.getvalue()
    body = re.search(r"<svg[^>]*>(.*)</svg>", text, re.S)[1]
    body = re.sub(r"<style.*?</style>|\n *", "", body, flags=re.S)  # a <style> would be the whole page's
    prefix = "p" + hashlib.sha256(text.encode()).hexdigest()[:8]

    def clean(tag):
        tag = re.sub(r'^<g id="[^"]*"', "<g", tag[0])  # nothing refers to a group
        tag = tag.replace("xlink:href", "href").replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui")
        tag = re.sub(r'( id="|url\(#| href="#)', rf"\g<1>{prefix}", tag)  # ids are the page's, not the picture's
        return re.sub(r"(\.\d\d)\d+", r"\1", tag) if tag.startswith(("<path", "<use")) else tag

    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}" stroke-linejoin="round">{}</svg>\n').format(
        72 * width, 72 * height, one_line(panel.title), Markup(re.sub(r"<[^>]*>", clean, body))
    )


def _draw_panel(axis, panel, looks):
    if all(np.asarray(line.steps).dtype.kind == "i" for line in panel.lines):
        axis.locator_params(axis="x", integer=True)
    found = []
    for line in panel.lines:
        values = np.asarray(line.values, float)
        if len(line.steps) != len(values):
            raise ValueError(f"{panel.title}: {line.label} has {len(line.steps)} steps and {len(values)} values")
        values = np.where(np.isfinite(values) & ((values > 0) | (not panel.log)), values, np.nan)
        found += values[np.isfinite(values)].tolist()
        look, steps = looks[line.label], np.asarray(line.steps)
        if len(values) > MANY:
            axis.plot(*thin(steps, values), color=look["color"], alpha=0.3, linewidth=0.7, zorder=1.5)
            steps, values = running_mean(steps, values)
        count = np.isfinite(values).sum()
        if line.held_out or count == 1:  # one point is no line
            look = look | {"marker": "o", "markevery": max(1, count // 25)}
        label = _entry(line.label) + ", held out" * line.held_out if line.label else "_"
        axis.plot(steps, values, label=label, **look)
    if panel.reference:
        label, level = panel.reference
        axis.axhline(level, color=INK, alpha=0.7, linewidth=1, linestyle=(0, (4, 3)), label=_entry(label))
    if panel.log and found:
        ticker, spread = extra("matplotlib.ticker", "plot"), max(found) / min(found)
        axis.set_yscale("log")  # whose own ticks name powers of ten only, of which a loss may cross none
        rare = ticker.LogLocator(subs=(1, 2, 5) if spread < 1e3 else (1,))
        axis.yaxis.set_major_locator(rare if spread >= 10 else ticker.MaxNLocator(5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    if not found:
        axis.text(0.5, 0.5, "no values", transform=axis.transAxes, ha="center", va="center", alpha=0.7)
        axis.set(xticks=(), yticks=())
    axis.set_title(cut(one_line(panel.title), 52))
    axis.set_xlabel(cut(one_line(panel.xlabel), 60))
    axis.set_ylabel(cut(one_line(panel.ylabel), 36))
    if axis.get_legend_handles_labels()[1]:
        axis.legend()


def _entry(label):
    """A label in a legend, which would leave out one that begins with _."""
    label = cut(one_line(label), 36)
    return " " + label if label.startswith("_") else label


def thin(steps, values, bins=MANY):
    """About 2 bins points of a line that look like all of them: of each piece the lowest and the highest."""
    if len(values) <= 2 * bins:
        return steps, values
    keep = []
    for piece in np.array_split(np.arange(len(values)), bins):
        finite = piece[np.isfinite(values[piece])]
        finite = piece if not len(finite) else finite  # a gap
        keep += sorted({finite[values[finite].argmin()], finite[values[finite].argmax()]})
    return steps[keep], values[keep]


def running_mean(steps, values, points=MANY):
    """The mean around each of `points` places, over a 40th of the line; nan where it has no finite value."""
    places, half = np.linspace(0, len(values) - 1, points).round().astype(int), max(1, len(values) // 80)
    around = [values[max(0, i - half) : i + half + 1] for i in places]
    around = [window[np.isfinite(window)] for window in around]
    return steps[places], np.array([window.mean() if len(window) else np.nan for window in around])


# ------------------------------------------------------------------ text and tables


class Cell(NamedTuple):
    """A cell of a Table or an answer of Samples that may stand out."""

    value: Any
    strong: bool = False


def shown(value):
    """A cell as text. Strings as they are; numbers in some four digits: 12,345, 45.78, 0.4539, 1.2e-05; – for None."""
    if isinstance(value, Cell):
        value = value.value
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if isinstance(value, Integral):
        return f"{value:,}"
    value = float(value)
    size = abs(value)
    if not math.isfinite(value) or (value and not 1e-3 <= size < 1e7):
        return f"{value:.1e}"
    return f"{value:,.{max(0, 4 - len(str(int(size)))) if size >= 1 else 4}f}"


def visible(text):
    """`text` with what has no shape spelt as in Python, \\x1b, \\u2028; white space and what joins letters stay."""
    if text.isprintable():
        return text
    keep = lambda c: c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"
    return "".join(c if keep(c) else c.encode("unicode_escape").decode() for c in text)


def columns_of(text):
    """How many columns of a terminal a text of one line takes: wide letters two, those that join another none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def one_line(text):
    return " ".join(visible(shown(text)).split())


def cut(text, width):
    """A line of at most `width` columns, with an ellipsis where its end is missing."""
    if columns_of(text) <= width:
        return text
    text = text[: width - 1]
    while columns_of(text) > width - 1:
        text = text[:-1]
    return text + "…"


def grid(columns, rows, align=None):
    """(rows of Cells, align) of a table. align: a letter for each column, l or r; none sets columns of numbers to the
    right. ValueError: a row or align is too short or too long."""
    rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} cells, and the table has {len(columns)} columns")
    if align is None:
        kinds = [
            {isinstance(row[i].value, Real) for row in rows if row[i].value is not None} for i in range(len(columns))
        ]
        align = "".join("r" if kind == {True} else "l" for kind in kinds)
    if len(align) != len(columns) or set(align) - set("lr"):
        raise ValueError(f"align has to be {len(columns)} letters l or r, and is {align!r}")
    return rows, align


def table_lines(columns, rows, align=None, width=110):
    """A table as lines of text, none wider than `width`: the widest columns give way, and cut texts end with …."""
    rows, align = grid(columns, rows, align)
    texts = [[one_line(cell) for cell in row] for row in [columns, *rows]]
    sizes = [max(map(columns_of, column)) for column in zip(*texts, strict=True)]
    while sum(sizes) + 2 * len(sizes) - 2 > width and max(sizes) > 1:
        widest = max(range(len(sizes)), key=lambda i: (sizes[i] > 8 and align[i] == "l", sizes[i]))
        sizes[widest] -= 1
    lines = []
    for row in texts:
        cells = [cut(text, size) for text, size in zip(row, sizes, strict=True)]
        gaps = [" " * (size - columns_of(text)) for text, size in zip(cells, sizes, strict=True)]
        cells = [gap + text if side == "r" else text + gap for text, gap, side in zip(cells, gaps, align, strict=True)]
        lines.append(cut("  ".join(cells).rstrip(), width))
    return [lines[0], cut("  ".join("─" * size for size in sizes), width), *lines[1:]]


# ------------------------------------------------------------------ a page


class Heading(NamedTuple):
    """Begins a part; more than three make a table of contents."""

    text: str


class Text(NamedTuple):
    """Paragraphs, with empty lines between them."""

    text: str

    @property
    def paragraphs(self):
        return [part for part in re.split(r"\n\s*\n", self.text) if part.strip()]


class Facts(NamedTuple):
    """A row of key figures: {name: value}."""

    facts: dict


class Table(NamedTuple):
    """Cells are strings, numbers, None or Cells. align as in table_lines; notes: a paragraph below."""

    columns: list
    rows: list
    caption: str = ""
    align: Any = None
    notes: str = ""


class Figure(NamedTuple):
    """A picture as draw returns it, and what it shows."""

    svg: Markup
    caption: str = ""


class Samples(NamedTuple):
    """What several models made of the same prompts, side by side. columns: their names; rows: (prompt, [an answer of
    each], note). An answer may be a Cell; a strong one stands out."""

    columns: list
    rows: list
    caption: str = ""


class Details(NamedTuple):
    """Folded up: blocks, or the {name: value} of settings."""

    summary: str
    blocks: Any


def page(path, title, blocks, subtitle=""):
    """Write blocks as one HTML file that needs nothing else; the path comes back. The same blocks give the same bytes.
    An old file is replaced at the end only: an error leaves it. TypeError: what is no block. ValueError: see grid."""
    parts = [(f"part-{i}", block) for i, block in enumerate(blocks, 1)]
    contents = [(name, block.text) for name, block in parts if isinstance(block, Heading)]
    environment = Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(shown(value)),  # whatever is printed
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"kind_of": _kind_of, "grid": grid, "css": Markup(CSS)}
    html = environment.from_string(PAGE).render(title=title, subtitle=subtitle, parts=parts, contents=contents)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(html, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _kind_of(block):
    if not isinstance(block, Heading | Text | Facts | Table | Figure | Samples | Details):
        raise TypeError(f"a page is made of blocks, and {block!r:.80} is none")
    return type(block).__name__


PAGE = """\
{% macro show(block, name="") %}
{% set kind = kind_of(block) %}
{% if kind == "Heading" %}
<h2{% if name %} id="{{ name }}"{% endif %}>{{ block.text }}</h2>
{% elif kind == "Text" %}
{% for paragraph in block.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% elif kind == "Facts" %}
<dl class="facts">
{% for name, value in block.facts.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% elif kind == "Table" %}
{% set rows, align = grid(block.columns, block.rows, block.align) %}
<div class="table"><table>
{% if block.caption %}
<caption>{{ block.caption }}</caption>
{% endif %}
<thead><tr>
{% for column in block.columns %}
<th class="{{ align[loop.index0] }}">{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for cell in row %}
<td class="{{ align[loop.index0] }}{% if cell.strong %} strong{% endif %}">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% if block.notes %}
<p class="notes">{{ block.notes }}</p>
{% endif %}
{% elif kind == "Figure" %}
<figure>
{{ block.svg }}
{% if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{% endif %}
</figure>
{% elif kind == "Samples" %}
{% set rows, align = grid(block.columns, block.rows | map(attribute=1)) %}
{% if block.caption %}
<p class="caption">{{ block.caption }}</p>
{% endif %}
{% for prompt, _, note in block.rows %}
<section class="sample">
<div class="prompt"><div class="words">{{ prompt }}</div>
{% if note %}
<div class="notes">{{ note }}</div>
{% endif %}
</div>
<div class="answers">
{% for answer in rows[loop.index0] %}
<div{% if answer.strong %} class="strong"{% endif %}><b>{{ block.columns[loop.index0] }}</b>
<div class="words" tabindex="0">{% if answer.value == "" %}<i>(empty)</i>{% else %}{{ answer }}{% endif %}</div></div>
{% endfor %}
</div>
</section>
{% endfor %}
{% elif kind == "Details" %}
<details><summary>{{ block.summary }}</summary>
{% if block.blocks is mapping %}
<dl class="settings">
{% for name, value in block.blocks.items() %}
<dt>{{ name }}</dt><dd>{{ value | string if value is number else value }}</dd>
{% endfor %}
</dl>
{% else %}
{% for inner in block.blocks %}
{{ show(inner) }}
{%- endfor %}
{% endif %}
</details>
{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
<body>
<header><h1>{{ title }}</h1>{% if subtitle %}<p>{{ subtitle }}</p>{% endif %}</header>
{% if contents | length > 3 %}
<nav><ol>
{% for name, text in contents %}
<li><a href="#{{ name }}">{{ text }}</a></li>
{% endfor %}
</ol></nav>
{% endif %}
<main>
{% for name, block in parts %}
{{ show(block, name) }}
{%- endfor %}
</main>
</body>
</html>
"""

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --rule: #d8dee4; --paper: #fff; --raised: #f6f8fa;
  --accent: #0a6b3d; --glow: #dff5e6; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e2e7ec; --soft: #9aa4ae; --rule: #343b43;
  --paper: #14181d; --raised: #1c2229; --accent: #6bd49a; --glow: #173024; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1100px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); font-size: 1.25rem; }
p { max-width: 46rem; margin: .75rem 0; }
header p, caption, .caption, figcaption, .notes, dt, .answers b, i { color: var(--soft); font-size: .875rem; }
header p { margin: .25rem 0 1rem; }
nav ol { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0; padding: 0; list-style: none; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .2em; }
dl, dd { margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 1.25rem 0; }
.facts dd { font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.settings { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .1rem 1.5rem; margin: .75rem 0;
  font-size: .875rem; }
.table { overflow-x: auto; margin: 1rem 0 .5rem; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; text-align: left; }
th, td { padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
.r { padding-right: 1.75rem; text-align: right; white-space: nowrap; }
td.strong { color: var(--accent); font-weight: 650; }
figure { margin: 1rem 0; }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, max(15rem, 100% / var(--columns) - 1rem)), 1fr)); }
svg { display: block; width: 100%; height: auto; }
.sample { margin: 1rem 0; border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; break-inside: avoid; }
.prompt { padding: .6rem .9rem; background: var(--raised); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: 1px;
  background: var(--rule); border-top: 1px solid var(--rule); }
.answers > div { padding: .5rem .9rem; background: var(--paper); }
.answers > .strong { background: var(--glow); }
.answers b { font-weight: 500; }
.words { max-height: 14rem; overflow: auto; font-size: .9rem; white-space: pre-wrap; }
details { margin: .75rem 0; border-left: 2px solid var(--rule); padding-left: .9rem; }
summary { color: var(--soft); cursor: pointer; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .words { max-height: none; } h2, caption { break-after: avoid; } svg, tr { break-inside: avoid; }
  table { font-size: 8pt; } th, td, .r { padding-right: .9rem; } }
"""
