"""metrics.jsonl of runs as tables of numbers and as plots."""

from pathlib import Path

from .data.readers import Bad, read_rows
from .extras import extra


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


def plot(folders, path, names=()):
    """A picture (.png, .svg, .pdf) with one panel for each metric and one line for each run. A metric and its eval_
    counterpart share a panel. names: the metrics; none takes loss and everything that an evaluation measures.

    ValueError: a name that no run has, nothing to draw.
    """
    pyplot = extra("matplotlib.pyplot", "plot")
    runs = {Path(folder).resolve().name: read_metrics(folder) for folder in folders}
    known = {name for curves in runs.values() for name in curves}
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"no run has {missing[0]!r}; there are {', '.join(sorted(known))}")
    chosen = list(names) or sorted({"loss"} & known | {name for name in known if name.startswith("eval_")})
    panels = list(dict.fromkeys(name.removeprefix("eval_") for name in chosen))
    if not panels:
        raise ValueError("these runs have nothing to draw: give names of metrics")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for run, curves in runs.items():
            for name, style in ((panel, "-"), (f"eval_{panel}", "o-")):
                if name in curves and (name in chosen or not names):
                    label = run if name == panel else f"{run}, held out"
                    axis.plot(*curves[name], style, markersize=3, linewidth=1.2, label=label)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
