"""
Judge the quality rules and the language identification by labelled texts.

    python scripts/judge_filters.py LABELLED.jsonl --langid LANGUAGES.jsonl

LABELLED.jsonl has {"text", "kind", "group"} on each line; LANGUAGES.jsonl has {"text", "iso6393"} and may have "name".
The groups fall into two halves by a hash of their names: choose limits by looking at half A, and believe half B.
"""

import sys
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.data.clean import clean
from minillm.data.filters import PRESETS, Page, broken, judge
from minillm.data.language import agree, identify
from minillm.data.readers import read_rows

SHORT = 50  # words: a clean page below is counted apart


def parse(arguments):
    parser = command_line.Parser(description="Judge the quality rules and the language identification.")
    parser.add_argument("labelled", metavar="LABELLED.jsonl", help="lines of {text, kind, group}")
    parser.add_argument("--langid", metavar="FILE", help="lines of {text, iso6393[, name]}")
    parser.add_argument("--junk", default="junk_", metavar="PREFIX", help="the kinds that begin so should go (junk_)")
    parser.add_argument("--clean", default="clean_wiki,web_c4", metavar="KINDS", help="should stay (clean_wiki,web_c4)")
    parser.add_argument("--preset", choices=PRESETS, help="only this one")
    return parser.parse_args(arguments)


def half_of(group):
    """A or B, the same on every machine."""
    return "AB"[zlib.crc32(group.encode()) % 2]


def rows_with(path, *fields):
    """The objects of a .jsonl file. ValueError: a field that is missing or no text."""
    for where, row in read_rows(path):
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ValueError(f"{where}: {field} has to be a text, and is {row.get(field, 'missing')!r}")
        yield row


def percent(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "none"


def preset_table(name, pages, is_junk, is_clean):
    """Print the pages kept and dropped of each kind, for each half, and how many of A + B each rule dropped."""
    fate = Counter((kind, half, judge(text, name).rule) for kind, half, text in pages)
    kinds = sorted({kind for kind, _, _ in fate}, key=lambda kind: (not is_junk(kind), not is_clean(kind), kind))
    rules = [rule.name for rule in PRESETS[name].rules]
    print(f"\n{name:<26}{'half A':>14}{'half B':>14}")
    print(f"{'kind':<26}{'kept':>7}{'drop':>7}{'kept':>7}{'drop':>7}   dropped by (A+B)")
    for kind in kinds:
        count = lambda half, rule, kind=kind: fate[kind, half, rule]
        numbers = [n for half in "AB" for n in (count(half, None), sum(count(half, rule) for rule in rules))]
        why = [(count("A", rule), count("B", rule), rule.partition(".")[2]) for rule in rules]
        why = [f"{rule} {a}+{b}" for a, b, rule in sorted(why, key=lambda w: -w[0] - w[1]) if a + b]
        lines = wrapped(why, 120 - 57)
        print(f"{kind:<26}" + "".join(f"{n:>7}" for n in numbers) + f"   {lines[0]}".rstrip())
        for line in lines[1:]:
            print(" " * 57 + line)
    return fate


def wrapped(words, width):
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return lines


def judge_rules(options):
    pages, is_junk = [], lambda kind: kind.startswith(options.junk)
    is_clean = set(options.clean.split(",")).__contains__
    for row in rows_with(options.labelled, "text", "kind", "group"):
        text, kind = clean(row["text"]), row["kind"]
        if is_clean(kind) and len(Page(text).words) < SHORT:
            kind += f" <{SHORT} words"
        pages.append((kind, half_of(row["group"]), text))
    if not pages:
        raise ValueError(f"{options.labelled} has no lines")
    names = [options.preset] if options.preset else list(PRESETS)
    fates = {name: preset_table(name, pages, is_junk, is_clean) for name in names}

    print(f"\n{'the whole':<26}{'junk dropped':>21}{'clean lost':>21}   the rule that most clean pages break (A+B)")
    print(f"{'preset':<26}{'A':>11}{'B':>10}{'A':>11}{'B':>10}")
    clean_texts = [text for kind, _, text in pages if is_clean(kind)]
    for name, fate in fates.items():
        cells = []
        for wanted in (is_junk, is_clean):
            for half in "AB":
                of_half = Counter()
                for (kind, h, rule), n in fate.items():
                    if h == half and wanted(kind):
                        of_half[rule is None] += n
                cells.append(percent(of_half[False], of_half.total()))
        worst = Counter(rule for text in clean_texts for rule, _ in broken(text, name)).most_common(1)
        why = f"{worst[0][0].partition('.')[2]}, {worst[0][1]} of {len(clean_texts)}" if worst else "-"
        print(f"{name:<26}{cells[0]:>11}{cells[1]:>10}{cells[2]:>11}{cells[3]:>10}   {why}")


def judge_languages(path):
    known, right, wrong, sure, others = 0, 0, [], 0, 0
    for row in rows_with(path, "text", "iso6393"):
        code, probability = identify(clean(row["text"]))
        verdict = agree(code, row["iso6393"])
        if verdict is None:
            others += 1
            sure += probability >= 0.65 and code != "zxx"
            continue
        known, right = known + 1, right + verdict
        if not verdict:
            wrong.append(f"{row.get('name', row['iso6393'])} is called {code} ({probability:.2f})")
    print(f"\nlanguages: {right} of {known} right, {percent(right, known)} (up to macrolanguages)")
    for line in wrapped(wrong, 110):
        print(f"  {line}")
    print(f"  {others} texts in languages that it does not know; {sure} of them are called another with 0.65 or more")


def main(options):
    judge_rules(options)
    if options.langid:
        judge_languages(options.langid)


if __name__ == "__main__":
    command_line.run(main, parse(None))
