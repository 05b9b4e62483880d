"""
Draw the curves of one or more training runs.

    python scripts/plot.py base sft --out curves.png
    python scripts/plot.py ppo --metrics objective/scores objective/kl --out ppo.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.report import plot, read_metrics


def parse(arguments):
    parser = command_line.Parser(description="Draw the curves of one or more training runs.")
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="folders with a metrics.jsonl")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="(loss, and what was held out)")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help=".png, .svg or .pdf (curves.png)")
    return parser.parse_args(arguments)


def main(options):
    for run in options.runs:
        drawn = lambda name: name in options.metrics if options.metrics else name == "loss" or name.startswith("eval_")
        if not any(map(drawn, read_metrics(run))):
            what = ", ".join(options.metrics) or "loss and no evaluation"
            raise ValueError(f"{run} has nothing to draw: its metrics.jsonl has no {what}")
    print(plot(options.runs, options.out, options.metrics))


if __name__ == "__main__":
    command_line.run(main, parse(None))
