"""
The pipeline on the atlas with several seeds: what came out every time, and what was luck.

    python scripts/compare_seeds.py --out seeds                     # seeds 0, 1 and 2: 40 to 65 minutes on two cores
    python scripts/compare_seeds.py --out seeds --seeds 0 1 2 3 4

A seed is a world of its own (other facts are held out, all texts are new), a tokenizer, and all that is trained. Every
run is a folder of scripts/pipeline.py, and what is done is not repeated.
"""

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.checkpoint import write_json
from minillm.pipeline import JUDGED, MODELS, PipelineConfig, run
from minillm.report import table_lines


@dataclass(kw_only=True)
class Options:
    """Several seeds."""

    out: Path = Path("seeds")
    """the folder of the runs: seed-0, seed-1, ..."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """the seeds"""
    size: Literal["tiny", "default", "small", "medium"] = "default"
    """as for scripts/pipeline.py"""
    device: Literal["cpu", "cuda"] = "cpu"
    """as for scripts/pipeline.py"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """as for scripts/pipeline.py"""

    def __post_init__(self):
        if len(set(self.seeds)) < 2 or min(self.seeds) < 0:
            raise ValueError(f"--seeds has to be at least two different numbers from 0 on, and is {self.seeds}")


def spread(values, write):
    """The mean and the standard deviation of a few numbers, as text; None where there is none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return None
    return f"{write(statistics.mean(values))} ± {write(statistics.stdev(values) if len(values) > 1 else 0.0)}"


def tables(reports):
    """(columns, rows) of the means over seeds, and of what each seed's reward model and pretraining reached."""
    rows = []
    for line, metric, write in JUDGED:
        cells = [spread([r["models"][name].get(metric) for r in reports.values()], write) for name in MODELS]
        rows.append((line, *cells))
    yield (f"mean ± sd of {len(reports)} seeds", *MODELS), rows
    percent = lambda share: f"{100 * share:.1f} %"
    rows = [
        (
            f"seed {seed}",
            percent(r["known"] / r["asked"]),
            *[percent(r["models"][name]["known_facts"]) for name in ("sft", "ppo", "dpo")],
            *[f"{r['models'][name]['gold']:.3f}" for name in ("sft", "ppo", "dpo")],
            percent(r["clean_pairs"]),
            percent(r["heldout_pairs"]),
        )
        for seed, r in reports.items()
    ]
    columns = ("", "facts held", "right: sft", "ppo", "dpo", "gold: sft", "ppo", "dpo", "clean pairs", "held out")
    yield columns, rows


def compare(options):
    reports = {}
    for seed in options.seeds:
        out = options.out / f"seed-{seed}"
        notes = run(
            PipelineConfig(out=out, size=options.size, seed=seed, device=options.device, precision=options.precision)
        )
        reports[seed] = notes["stages"]["report"]
    lines = [line for columns, rows in tables(reports) for line in (*table_lines(columns, rows), "")]
    print("\n" + "\n".join(lines))
    (options.out / "table.txt").write_text("\n".join(lines), encoding="utf-8")
    write_json(options.out / "settings.json", vars(options))
    with open(options.out / "metrics.jsonl", "w", encoding="utf-8") as file:
        for seed, found in reports.items():
            for name, metrics in found["models"].items():
                file.write(json.dumps({"seed": seed, "model": name, **metrics}) + "\n")


if __name__ == "__main__":
    command_line.run(compare, command_line.parse(Options, "The pipeline on the atlas with several seeds."))
