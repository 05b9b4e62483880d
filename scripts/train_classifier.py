"""
Train a classifier that scores documents for a filter: quality, toxicity, or any other two kinds of text.

    python scripts/train_classifier.py --positive clean.jsonl --negative junk.jsonl --out quality.safetensors

Files are .txt, .jsonl (a field "text") and what else minillm.data.readers reads. A fifth of the texts, chosen by their
hash, is held out and tells how good the classifier is; metrics.jsonl beside the output has the loss of every step and,
in its last line, that evaluation. A long .txt file is cut into documents at blank lines, some 65,000 characters each.
"""

import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.data.classifier import Classifier
from minillm.data.readers import read


def parse(arguments):
    parser = command_line.Parser(description="Train a classifier that scores documents for a filter.")
    parser.add_argument("--positive", nargs="+", required=True, metavar="FILE", help="texts that should score high")
    parser.add_argument("--negative", nargs="+", required=True, metavar="FILE", help="texts that should score low")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="the classifier")
    parser.add_overwrite("replace that file and metrics.jsonl if they are there")
    parser.add_argument("--buckets", type=int, default=1 << 18, metavar="N", help="weights, 4 bytes each (262144)")
    parser.add_argument("--ngrams", type=int, default=2, metavar="N", help="runs of up to N words (2)")
    parser.add_argument("--max-words", type=int, default=1000, metavar="N", help="of each text, the first ones (1000)")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="(10)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="texts per step (32)")
    parser.add_argument("--lr", type=float, default=2.0, metavar="LR", help="the first learning rate (2)")
    parser.add_argument("--min-documents", type=int, default=2, metavar="N", help="leave out rarer n-grams (2)")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="what the evaluation uses (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, and is {options.out}")
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold must be in [0, 1], and is {options.threshold}")
    if options.seed < 0:
        parser.error(f"--seed must not be negative, and is {options.seed}")
    return options


def texts_of(paths):
    """The texts of these files in two lists: to train with, and held out. Equal texts are in one of them."""
    parts = [], []
    for document in read(paths):
        parts[zlib.crc32(document.text.encode()) % 5 == 0].append(document.text)
    return parts


def check_out(options):
    """ValueError where there is a file that is not to be replaced: an error now, not after the training."""
    if (options.out.parent / "settings.json").exists():
        folder = options.out.parent
        raise ValueError(f"{folder} is the folder of a training run, with its own metrics: take another --out")
    for path in (options.out, options.out.with_name("metrics.jsonl")):
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists: take another --out, or replace it with --overwrite True")
    if options.out.exists():
        try:
            Classifier.load(options.out)
        except ValueError as error:
            raise ValueError(f"{error}: take another --out, or remove it yourself") from None


def run(options):
    check_out(options)
    positive, held_positive = texts_of(options.positive)
    negative, held_negative = texts_of(options.negative)
    if both := {*positive, *held_positive} & {*negative, *held_negative}:
        print(f"train_classifier.py: {len(both)} texts are positive and negative", file=sys.stderr)
    rows = []
    classifier = Classifier.train(
        positive,
        negative,
        buckets=options.buckets,
        ngrams=options.ngrams,
        max_words=options.max_words,
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        min_documents=options.min_documents,
        seed=options.seed,
        on_step=lambda step, loss, accuracy: rows.append({"step": step, "loss": loss, "accuracy": accuracy}),
    )
    print(f"trained on {len(positive)} positive and {len(negative)} negative texts in {len(rows)} steps")
    held = held_positive + held_negative
    if held:
        labels = [True] * len(held_positive) + [False] * len(held_negative)
        result = classifier.evaluate(held, labels, options.threshold)
        rows.append({"step": len(rows), **{f"eval/{name}": value for name, value in result.items()}})
        print("held out:")
        for name, value in result.items():
            print(f"  {name:<18} {'-' if value is None else f'{value:.4f}' if isinstance(value, float) else value}")
    else:
        print("held out: no text; with so few of them nothing can be said about how good it is")
    for side, ngrams in zip(("highest", "lowest"), classifier.strongest(positive + negative), strict=True):
        print(f"{side} weights: " + ", ".join(f"{ngram!r} {weight:.1f}" for ngram, weight in ngrams))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    classifier.save(options.out)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    options.out.with_name("metrics.jsonl").write_text(lines, encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    command_line.run(run, parse(None))
