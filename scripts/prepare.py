"""
From a pile of text to clean, deduplicated token files.

    python scripts/prepare.py wiki=dumps/ stories.jsonl --out prepared

OUT gets the token files (SOURCE.SPLIT.bin and .idx), tokenizer.json, the kept texts (text/), every dropped document
with the rule that dropped it (dropped.jsonl), what each step took (metrics.jsonl) and manifest.json, the account.
"""

import dataclasses
import json
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.data.prepare import STEPS, Prepare, prepare, table


@dataclasses.dataclass
class Options(Prepare):
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """files or folders (.txt, .jsonl, .parquet, .arrow; the first two also .zst, .gz), each PATH or NAME=PATH"""


def run(settings):
    report = prepare(settings, show_progress=sys.stderr.isatty())
    with open(settings.out / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in STEPS:
            file.write(json.dumps({"step": step, "seconds": round(report.seconds.get(step, 0.0), 4)}) + "\n")
    print("\n".join(table(report)))
    print(f"written to {settings.out}")


if __name__ == "__main__":
    command_line.run(run, command_line.parse(Options, "From a pile of text to clean, deduplicated token files."))
