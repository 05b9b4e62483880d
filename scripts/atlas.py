"""
Write a small world of real facts to train on: documents, instructions, preferences, prompts and questions with answers.

    python scripts/atlas.py --out world --size 2MB

What the files are is told in minillm/data/atlas.py. The same seed and size give the same bytes. With --show nothing is
written: pages and questions of each kind are printed instead.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.data import atlas
from minillm.data.output import aside, check_out

UNITS = {"": 1, "KB": 10**3, "MB": 10**6}


def size(text):
    """Bytes of a size such as 2MB, 300KB or 500000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(KB|MB|)", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 2MB or 300KB")
    return round(float(match[1]) * UNITS[match[2]])


def parse(arguments):
    parser = command_line.Parser(description="Write a small world of real facts to train on.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--size", type=size, default=2 * 10**6, help="bytes of documents, from 50KB to 1000MB (2MB)")
    parser.add_argument("--facts", type=int, metavar="N", help="at most so many, from 100 on (as the size has room)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--dirty", type=float, default=0.1, metavar="P", help="share of pages to take out (0.1)")
    parser.add_argument("--noise", type=float, default=0.1, metavar="P", help="share of flipped preferences (0.1)")
    parser.add_overwrite("replace the folder if it is there")
    parser.add_argument("--show", action="store_true", help="print examples and write nothing")
    options = parser.parse_args(arguments)
    if not options.show and options.out is None:
        parser.error("--out is missing: the folder to write (or --show, to look at examples)")
    if not atlas.SMALLEST_SIZE <= options.size <= 10**9:
        parser.error(f"--size must be from 50KB to 1000MB, and is {options.size} bytes")
    if options.facts is not None and options.facts < 100:
        parser.error(f"--facts must be at least 100, and is {options.facts}")
    for name in ("dirty", "noise"):
        if not 0 <= getattr(options, name) <= 0.5:
            parser.error(f"--{name} must be from 0 to 0.5, and is {getattr(options, name)}")
    return options


def show(options):
    shown, world = {}, atlas.facts(options.size, options.facts)
    for page in atlas.corpus(options.seed, options.size, options.dirty, world):
        shown.setdefault(page["kind"], [])
        if len(shown[page["kind"]]) < 3:
            shown[page["kind"]].append(page["text"])
    for kind in (*atlas.CLEAN_KINDS, *atlas.DIRTY_KINDS):
        for text in shown.get(kind, ()):
            print(f"--- {kind}\n{text}\n")
    first = {}
    for question in atlas.questions(options.seed, "heldout", world):
        first.setdefault(question.kind, question)
    for kind, question in first.items():
        print(f"--- question: {kind}\n{question.text}\n[{atlas.brief(question)}]\n")


def run(options):
    if options.show:
        return show(options)
    check_out(options.out, options.overwrite, "atlas.json", "atlas.py")
    with aside(options.out) as folder:
        record = atlas.write(folder, options.seed, options.size, options.dirty, options.noise, most_facts=options.facts)
    print(f"{'file':<28}{'rows':>9}{'bytes':>12}")
    for name, file in record["files"].items():
        print(f"{name:<28}{file['rows']:>9,}{file['bytes']:>12,}")
    print(f"\n{'kind of page':<22}{'pages':>7}{'bytes':>12}")
    for kind in (*atlas.CLEAN_KINDS, *atlas.DIRTY_KINDS):
        if kind in record["kinds"]:
            print(f"{kind:<22}{record['kinds'][kind]['pages']:>7,}{record['kinds'][kind]['bytes']:>12,}")
    sides, stated = record["sides"], record["statements"]
    print(
        f"\n{sum(sides.values()):,} facts ({', '.join(f'{side} {sides.get(side, 0):,}' for side in atlas.SIDES)}), "
        f"each stated at least {stated['least']} times, half of them {stated['median']:g} times or more"
    )


if __name__ == "__main__":
    command_line.run(run, parse(None))
