"""
Draw the curves of one or more training runs.

    python scripts/plot.py base sft --out curves.png
    python scripts/plot.py ppo --metrics objective/scores objective/kl --out ppo.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from minillm.report import plot
from scripts import command_line


def parse(arguments):
    parser = argparse.ArgumentParser(description="Draw the curves of one or more training runs.")
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="folders with a metrics.jsonl")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="(loss, and what was held out)")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help=".png, .svg or .pdf (curves.png)")
    return parser.parse_args(arguments)


def main(options):
    print(plot(options.runs, options.out, options.metrics))


if __name__ == "__main__":
    command_line.run(main, parse(None))
