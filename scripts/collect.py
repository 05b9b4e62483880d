"""
Collect human preferences: a model answers each prompt several times, and a person ranks the answers.

    python scripts/collect.py sft prompts.jsonl --out preferences.jsonl
    python scripts/collect.py sft prompts.jsonl --out preferences.jsonl --serve      the same in a browser

Every ranking is on the disk before the next prompt is shown, and the same command goes on where it was left: prompts
are known by what they say, not by their place in a file. scripts/reward.py and scripts/dpo.py read the file as it is.

A row is {"prompt": messages, "ranked": [best, ..., worst]} and, for people, where it comes from. A tie, and answers in
no order, can not be said so: then each two answers that were compared are a row, a tie with "preference": 0.5, and
"pair": [2, 3] marks the second of the prompt's three. Nothing is written about answers in no order: the best alone
makes K - 1 pairs. Skipped prompts stand in OUT.skipped. There is no date in either file: the same decisions give the
same bytes.
"""

import contextlib
import dataclasses
import hashlib
import html
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import textwrap
import threading
import unicodedata
import urllib.parse
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.chat import stop_ids
from minillm.data.conversations import encode_prompts, read_preferences, read_prompts
from minillm.data.readers import Bad, parse_row, read_rows
from minillm.generate import generate
from minillm.trainers.common import load_tokenizer, read_files, template_of

ROUNDS = 5  # how often answers are drawn, until there are enough different ones
LONGEST = 256  # tokens of an answer, where the model's context has room for two of them


@dataclasses.dataclass(kw_only=True)
class Options(command_line.Reading):
    """Sampling and ranking. What a person who collects preferences can choose."""

    model: tyro.conf.Positional[Path | None] = None
    """the folder of the language model that answers"""
    prompts: tyro.conf.Positional[tuple[Path, ...]] = ()
    """files of prompts: JSON lines of {"messages": [...]} or {"prompt": ...}"""
    out: Path
    """the .jsonl file of rankings; if it is there, its prompts are not asked again. One file for each person"""

    answers: int = 3
    """answers to rank for each prompt, 2 to 4"""
    annotator: str = ""
    """who ranks: a name for the rows"""
    seed: int = 0
    """of sampling, and of the order on the screen; each prompt has random numbers of its own"""
    template: str = ""
    """chatml, llama2, llama3, alpaca, or a Jinja file; none: the model folder's own, else chatml"""
    max_new_tokens: int = 0
    """the longest answer; 0: 256 tokens, or half of the model's context if that is less"""
    temperature: float = 1.0
    """of sampling"""
    top_p: float = 1.0
    """sample from the likeliest tokens that add up to this"""
    ahead: int = 8
    """prompts that are answered at once, while you read"""
    skip_bad: int = 0
    """how many malformed lines of the prompts may be skipped"""

    serve: bool = False
    """rank in a browser, on a page that only this machine can open"""
    port: int = 8000
    """of the page; 0: any that is free"""

    def __post_init__(self):
        def refuse(name, must):
            raise ValueError(f"--{name.replace('_', '-')} has to be {must}, and is {getattr(self, name)}")

        if self.model is None or not self.prompts:
            raise ValueError("name the model's folder and at least one file of prompts: MODEL PROMPTS ...")
        if self.out.suffix != ".jsonl":
            refuse("out", "a .jsonl file")
        for name, low, high in (("answers", 2, 4), ("port", 0, 65535)):
            if not low <= getattr(self, name) <= high:
                refuse(name, f"from {low} to {high}")
        for name, least in (("seed", 0), ("max_new_tokens", 0), ("skip_bad", 0), ("ahead", 1)):
            if getattr(self, name) < least:
                refuse(name, f"at least {least}")
        if not 0 < self.temperature < math.inf:
            refuse("temperature", "a finite number above 0")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "above 0 and at most 1")


class Prompt(NamedTuple):
    """A prompt. Its key tells it from others, wherever it stands."""

    key: int
    where: str  # "file:line"
    messages: list
    ids: np.ndarray | None = None


class Answer(NamedTuple):
    """What the model said."""

    text: str
    finish: str  # see generate.Generation


class Question(NamedTuple):
    """A prompt, and its answers in the order of the screen; drawn[i] tells which one answers[i] was as they came."""

    prompt: Prompt
    answers: list
    drawn: list


def key_of(messages):
    """A number that is the same for the same roles and texts."""
    said = json.dumps([[message["role"], message["content"]] for message in messages])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big")


# ------------------------------------------------------------------ rankings


class Mistake(ValueError):
    """What a person asked for can not be done. They are told why, and asked again."""


class Ranking(NamedTuple):
    """An order of answers, by their places from 0."""

    groups: list  # lists of places, the best first; those in one list are equally good
    rest: list  # worse than all of these, in no order

    def __str__(self):
        told = [" = ".join(str(place + 1) for place in group) for group in self.groups]
        rest = " and ".join(str(place + 1) for place in self.rest)
        return " > ".join([*told, f"{rest}, in no order"] if rest else told)


def parse_ranking(text, count):
    """The Ranking of `count` answers that somebody typed: numbers from 1, the best first, with blanks, commas, > or
    nothing between them, and = between equally good ones. Answers that are not named come last. Mistake: what is wrong.
    """
    example = " ".join("2134"[:count])
    text = re.sub(r"\s*([>=,])\s*", r"\1", text.strip())
    if not text:
        raise Mistake(f"type the numbers of the answers, the best first, like {example}; ? for help")
    if "<" in text:
        raise Mistake("the best comes first, with > after it")
    if odd := re.search(r"[^0-9\s>=,]", text):
        raise Mistake(f"{odd[0]!r} has no place in a ranking like {example}; ? for help")
    if not re.fullmatch(r"[0-9](?:(?:[>=,]|\s+)?[0-9])*", text):
        raise Mistake(f"{text!r:.40} is no ranking: between two numbers stands one > or one =, or nothing")
    groups = []
    for sign, digit in re.findall(r"([>=,]?)\s*([0-9])", text):
        place = int(digit) - 1
        if not 0 <= place < count:
            raise Mistake(f"there is no answer {digit}, only 1 to {count}")
        if any(place in group for group in groups):
            raise Mistake(f"{digit} stands there twice")
        if sign == "=":
            groups[-1].append(place)
        else:
            groups.append([place])
    rest = [place for place in range(count) if not any(place in group for group in groups)]
    return Ranking([*groups, rest], []) if len(rest) == 1 else Ranking(groups, rest)


def rows_of(question, ranking, about):
    """The rows that say just what the ranking says, whatever the order on the screen was: one where all answers are in
    order, else one for each pair that was compared."""
    by_draw = lambda places: sorted(places, key=lambda place: question.drawn[place])
    groups = [by_draw(group) for group in ranking.groups]
    if not ranking.rest and all(len(group) == 1 for group in groups):
        found = [([group[0] for group in groups], {})]
    else:
        pairs = []
        for n, group in enumerate(groups):
            pairs += [(pair, {"preference": 0.5}) for pair in itertools.combinations(group, 2)]
            worse = [*groups[n + 1 :], by_draw(ranking.rest)]
            pairs += [((i, j), {}) for i in group for j in itertools.chain.from_iterable(worse)]
        several = len(pairs) > 1
        found = [(p, f | ({"pair": [n, len(pairs)]} if several else {})) for n, (p, f) in enumerate(pairs, 1)]
    for places, fields in found:
        answers = [question.answers[place] for place in places]
        row = {"prompt": question.prompt.messages, "ranked": [answer.text for answer in answers], **fields}
        row |= {"finish": [answer.finish for answer in answers], "source": "human", "where": question.prompt.where}
        yield {name: valid(value) if isinstance(value, str) else value for name, value in {**row, **about}.items()}


def valid(text):
    """`text` as JSON can hold it: the name of a file may be any bytes."""
    return text.encode("utf-8", "replace").decode()


# ------------------------------------------------------------------ files

BEGIN = b'{"prompt": ['  # of every row that is written here


class Ledger:
    """A file of JSON lines that grows at its end and can take its last lines back. What `add` was given is on the disk
    when it returns. Opening it removes what is left of our own rows where a write was cut off (nobody else's: an error
    tells about those); `repaired` is a line about it, or ""."""

    def __init__(self, path):
        self.path = Path(path)
        data = self.path.read_bytes() if self.path.exists() else b""
        self.size = len(data)
        self.repaired = self._repair(data)

    def _repair(self, data):
        lines = data.split(b"\n")
        end = lines.pop()
        if _row(end) is not None:  # an editor's last line, whole but for its end
            self._append(b"\n")
            lines.append(end)
            end = b""
        size = sum(len(line) + 1 for line in lines)
        if not BEGIN.startswith(end.strip(b"\0")[: len(BEGIN)]):  # a machine that lost power leaves zeros
            return ""
        n, count = _pair(_row(lines[-1]) if lines else None)
        torn = lines[-n:] if n < count else []  # some pairs of a prompt are there, and not the others
        size -= sum(len(line) + 1 for line in torn)
        if size >= self.size:
            return ""
        with self._open() as file:
            file.truncate(size)
        return f"{self.path}: its end was cut off while it was written; that prompt is asked again"

    def add(self, rows):
        """Append the rows."""
        self._append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def _append(self, data):
        with self._open() as file:
            file.seek(0, os.SEEK_END)
            file.write(data)

    def take_back(self, count):
        """Remove the last `count` lines that are not empty."""
        kept = self.path.read_bytes().splitlines(keepends=True)
        while count:
            count -= bool(kept.pop().strip())
        with self._open() as file:
            file.truncate(sum(map(len, kept)))

    @contextlib.contextmanager
    def _open(self):
        """The file, to be changed; afterwards it is on the disk."""
        try:
            with open(self.path, "r+b" if self.path.exists() else "x+b") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise ValueError(f"{self.path} was changed by somebody else: start again, it goes on from there")
                yield file
                file.flush()
                os.fsync(file.fileno())
                self.size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}") from None


def _row(line):
    """The object in a line of bytes; None where there is none."""
    try:
        return parse_row(line.decode())
    except ValueError:
        return None


def _pair(row):
    """(n, count): a row is the n-th of the `count` rows that one ranking made."""
    match row:
        case {"source": "human", "pair": [int(n), int(count)]} if 0 < n <= count:
            return n, count
    return 1, 1


# ------------------------------------------------------------------ what is asked, and what was decided


class Decision(NamedTuple):
    """A prompt was ranked, in `lines` lines of the file, or skipped. No person here wrote a row of 0 lines."""

    key: int
    skipped: bool
    lines: int = 1


class Collection:
    """The next question, and all decisions so far. The terminal and the page are two views of it.

    prompts   a list of Prompt, no two with one key
    out       the file of rankings
    draw      draw(prompts) -> for each a list of different Answers. It is called in another thread, `ahead` prompts at
              a time, before they are asked; stop() makes it raise
    about     fields for each row
    tell      is called with a line for what a person should know
    """

    def __init__(self, prompts, out, draw, about=None, *, seed=0, ahead=8, tell=print):
        self.prompts, self.draw, self.seed, self.ahead = {p.key: p for p in prompts}, draw, seed, ahead
        self.about, self.tell = about or {}, tell
        self.rankings, self.skips = Ledger(out), Ledger(f"{out}.skipped")
        for ledger in (self.rankings, self.skips):
            if ledger.repaired:
                tell(ledger.repaired)
        self.decisions = self._decisions()
        self.alike = set()  # keys of prompts whose answers were all the same
        decided = {decision.key for decision in self.decisions}
        self.todo = [key for key in self.prompts if key not in decided]
        self.drawn = {}  # key: (future of a list of answers of several prompts, which of them)
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.draw.stop()
        self.pool.shutdown(cancel_futures=True)

    def _decisions(self):
        """What the files tell, in the order in which it was decided."""
        ranked, skipped = [], []
        if self.rankings.size:
            path = self.rankings.path
            for (_, row), preference in zip(read_rows(path), read_preferences(path), strict=True):
                key = key_of(preference.prompt)
                if _pair(row)[0] > 1 and ranked and ranked[-1].key == key:
                    ranked[-1] = ranked[-1]._replace(lines=ranked[-1].lines + 1)
                else:
                    ranked.append(Decision(key, False, int(row.get("source") == "human")))
        lines = self.skips.path.read_bytes().splitlines() if self.skips.size else []
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_row(line.decode())
                skipped.append((int(row["after"]), Decision(key_of(row["prompt"]), True)))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.skips.path}:{n}: this is no skipped prompt; remove the line") from None
        found = [((n, 1, 0), decision) for n, decision in enumerate(ranked)]
        found += [((after, 0, n), decision) for n, (after, decision) in enumerate(skipped)]
        return [decision for _, decision in sorted(found)]

    def counts(self):
        """{"ranked", "skipped", "alike", "to go", "all"} of these prompts."""
        ranked = {d.key for d in self.decisions if not d.skipped} & self.prompts.keys()
        skipped = ({d.key for d in self.decisions if d.skipped} & self.prompts.keys()) - ranked
        found = {"ranked": len(ranked), "skipped": len(skipped), "alike": len(self.alike)}
        return found | {"to go": len(self.todo), "all": len(self.prompts)}

    def __str__(self):
        n = self.counts()
        told = [f"{n['ranked']:,} of {n['all']:,} ranked"]
        told += [f"{n['skipped']:,} skipped"] if n["skipped"] else []
        told += [f"{n['alike']:,} with one answer only"] if n["alike"] else []
        return ", ".join([*told, f"{n['to go']:,} to go"])

    def waits(self):
        """Whether `question` has to wait for the model."""
        self._draw_ahead()
        return bool(self.todo) and not self.drawn[self.todo[0]][0].done()

    def question(self):
        """The Question that is to be decided, None where all are. It stays until it is decided."""
        while self.todo:
            self._draw_ahead()
            prompt = self.prompts[self.todo[0]]
            future, n = self.drawn[prompt.key]
            answers = future.result()[n]
            if len(answers) > 1:
                order = np.random.default_rng((self.seed, 0, prompt.key)).permutation(len(answers)).tolist()
                return Question(prompt, [answers[i] for i in order], order)
            only = f"the same: {textwrap.shorten(printable(answers[0].text), 40)}" if answers else "nothing"
            self.tell(f"{prompt.where} is left out: the model always says {only}")
            self.alike.add(self.todo.pop(0))
        return None

    def _draw_ahead(self):
        """Have the answers drawn that are needed next: at once, and alone, what somebody waits for."""
        missing = [key for key in self.todo[: 2 * self.ahead] if key not in self.drawn]
        if missing and missing[0] == self.todo[0]:
            self._start([missing.pop(0)])
        while len(missing) >= self.ahead or (missing and len(self.todo) <= 2 * self.ahead):
            self._start(missing[: self.ahead])
            del missing[: self.ahead]

    def _start(self, keys):
        future = self.pool.submit(self.draw, [self.prompts[key] for key in keys])
        self.drawn |= {key: (future, n) for n, key in enumerate(keys)}

    def rank(self, question, ranking):
        """Write the ranking down."""
        rows = list(rows_of(question, ranking, self.about))
        self._decide(question, self.rankings, rows, Decision(question.prompt.key, False, len(rows)))

    def skip(self, question):
        """Leave the prompt out, now and when the same command is given again."""
        after = sum(not decision.skipped for decision in self.decisions)
        row = {"prompt": question.prompt.messages, "after": after}  # of how many rankings: `undo` goes back in order
        self._decide(question, self.skips, [row], Decision(question.prompt.key, True))

    def _decide(self, question, ledger, rows, decision):
        if self.todo[:1] != [decision.key]:
            raise Mistake(f"{question.prompt.where} is not what is asked now")
        ledger.add(rows)
        self.decisions.append(decision)
        self.todo.pop(0)

    def undo(self):
        """Take the last decision back, also one of an earlier day, and ask its prompt next; a line that says so."""
        if not self.decisions:
            raise Mistake("there is nothing to take back")
        last = self.decisions[-1]
        if last.key not in self.prompts or not last.lines:
            raise Mistake(f"the last row of {self.rankings.path} is not about these prompts; it stays")
        (self.skips if last.skipped else self.rankings).take_back(last.lines)
        self.decisions.pop()
        if all(decision.key != last.key for decision in self.decisions):
            self.todo.insert(0, last.key)
        return f"taken back: {Path(self.prompts[last.key].where).name} was {'skipped' if last.skipped else 'ranked'}"


class Sampler:
    """Draws answers that look different from each other: draw(prompts) for a Collection."""

    def __init__(self, model, tokenizer, stop_tokens, options, max_new_tokens):
        self.model, self.tokenizer, self.stop_tokens, self.options = model, tokenizer, stop_tokens, options
        self.max_new_tokens, self.stopped = max_new_tokens, False

    def stop(self):
        self.stopped = True

    def __call__(self, prompts):
        """For each prompt, the first different answers of a sequence that depends on the prompt and the seed alone."""
        wanted, drawn, found = self.options.answers, [0] * len(prompts), [{} for _ in prompts]
        for _ in range(ROUNDS):
            lacking = [wanted - len(answers) for answers in found]
            draws = [(i, drawn[i] + k) for i, count in enumerate(lacking) for k in range(count)]
            if not draws:
                break
            texts = generate(
                self.model,
                [prompts[i].ids for i, _ in draws],
                max_new_tokens=self.max_new_tokens,
                temperature=self.options.temperature,
                top_p=self.options.top_p if self.options.top_p < 1 else None,
                stop_tokens=self.stop_tokens,
                seed=[(self.options.seed, 1 + k, prompts[i].key) for i, k in draws],
                on_token=self._check,
            )
            for (i, k), sampled in zip(draws, texts, strict=True):
                text = self.tokenizer.decode(sampled.ids, skip_special=True)
                if looks := " ".join(printable(text).split()):
                    found[i].setdefault(looks, Answer(text, sampled.finish))
                drawn[i] = k + 1
        return [list(answers.values()) for answers in found]

    def _check(self, row, token):
        if self.stopped:  # the person has left
            raise CancelledError


# ------------------------------------------------------------------ the terminal


def printable(text):
    """`text` without what moves a terminal's cursor or turns the direction of writing: a model writes anything. Lines
    stay lines."""

    def plain(c):
        if c.isprintable() or c in "\n\u200c\u200d":  # these two join letters, in Persian and in emoji
            return c
        return " " if unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"

    return "".join(map(plain, "\n".join(text.expandtabs(4).splitlines())))


def wrapped(text, width, label):
    """`text` as lines with `label` before the first, the others below its text. A wide sign fills two columns."""
    wide = "".join(c + "\0" * (unicodedata.east_asian_width(c) in "WF") for c in printable(text).strip())
    room = max(width - len(label) - 1, 20)
    lines = [part for line in wide.split("\n") for part in textwrap.wrap(line, room) or [""]]
    for n, line in enumerate(lines):
        yield (" " * len(label) if n else label) + line.replace("\0", "")


def screen(question, title, width):
    """The lines that show a question."""
    where = Path(question.prompt.where).name
    yield f"── {printable(where)} {'─' * max(width - len(where) - len(title) - 8, 2)} {title} ──"
    for message in question.prompt.messages:
        yield ""
        yield from wrapped(message["content"], width, f"{message['role']}: ")
    for n, answer in enumerate(question.answers, 1):
        yield ""
        yield from wrapped(answer.text, width, f"  {n}  ")
        if answer.finish == "length":
            yield "     (cut off here)"
    yield ""


def help_lines(count):
    """What a person can type."""
    order, tied = ">".join("2134"[:count]), "2=" + ">".join("134"[: count - 1])
    spaced, joined = order.replace(">", " "), order.replace(">", "")
    yield f"Type the best first: {spaced}, or {order}, or {joined}. {tied}: 2 and 1 are equally good."
    if count > 2:
        yield "What you leave out comes last, in no order: 2 alone only says which is best."
    yield "s skip   u undo   q quit, all is saved   ? this help"


def terminal(collection, ask=input, tell=print):
    """Ask until the person quits."""
    helped = False
    while True:
        if collection.waits():
            tell("the model is writing ...")
        question = collection.question()
        if question is None and not collection.decisions:
            return
        if question is None:
            tell(f"\n{collection}\nAll is done. u takes the last decision back, q ends.")
        else:
            width = min(shutil.get_terminal_size().columns, 100)
            tell("\n".join(["", *screen(question, str(collection), width)]))
            if not helped:
                tell("\n".join(help_lines(len(question.answers))))
            helped = True
        while True:
            try:
                typed = ask("best first> " if question else "> ").strip()
            except EOFError:
                tell("")
                return
            except KeyboardInterrupt:  # as good as q, but what follows in a shell's list is not run
                tell(f"\n{collection}")
                raise
            if typed.lower() in ("q", "quit") or (question is None and not typed):
                return
            try:
                tell(obey(collection, question, typed))
                break
            except Mistake as error:
                tell(str(error))


def obey(collection, question, typed):
    """Do what a person typed about a question; what there is to say. Mistake: nothing was done."""
    command = typed.lower()
    if command in ("u", "undo"):
        return collection.undo()
    if question is None:
        raise Mistake("nothing is left to rank; u takes the last decision back, q ends")
    if command in ("?", "h", "help"):  # nothing was done, and the question stays
        raise Mistake("\n".join(help_lines(len(question.answers))))
    if command in ("s", "skip"):
        collection.skip(question)
        return "skipped"
    ranking = parse_ranking(typed, len(question.answers))
    collection.rank(question, ranking)
    return f"ranked {ranking}"


# ------------------------------------------------------------------ the page

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style nonce="{nonce}">
  :root {{ color-scheme: light dark; --line: #8886; --ink: #2563eb }}
  body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 78rem; margin: auto; padding: 1rem }}
  header {{ display: flex; justify-content: space-between; gap: 1rem; opacity: .7 }}
  .text {{ white-space: pre-wrap; overflow-wrap: anywhere }}
  .turn {{ border-left: 3px solid var(--line); padding-left: .8rem; margin: .8rem 0 }}
  #answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin: 1rem 0 }}
  .answer {{ border: 2px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; cursor: pointer }}
  .answer.chosen {{ border-color: var(--ink) }}
  .rank {{ float: right; color: var(--ink); font-weight: bold }}
  small {{ opacity: .7 }}
  button, input {{ font: inherit; padding: .3rem .8rem }}
  #said {{ min-height: 1.5rem; color: var(--ink) }}
</style>
<header><span>{where}</span><span>{counts}</span></header>
<p id="said" role="status">{said}</p>
{body}
<form method="post" action="/">
  <input type="hidden" name="key" value="{key}">
  {ranking}
  <button name="do" value="undo" id="undo">Undo (u)</button>
</form>
{script}
"""
RANKING = """<input name="typed" id="typed" autocomplete="off" autofocus placeholder="best first, like 2 1 3">
  <button name="do" value="rank" id="rank">Rank (Enter)</button>
  <label id="ties" hidden><input type="checkbox" id="tie"> the next is as good as the last (t)</label>
  <button name="do" value="skip" id="skip">Skip (s)</button>"""
SCRIPT = """<p><small>Click the answers, the best first, or press their numbers; again takes one back. What you
leave out comes last, in no order.</small></p>
<script nonce="{nonce}">
  const cards = [...document.querySelectorAll(".answer")], by = id => document.getElementById(id)
  let groups = []  // [[2], [1, 3]]: the second is best, the others are equally good
  by("typed").type = "hidden"
  by("ties").hidden = false
  function show() {{
    by("typed").value = groups.map(group => group.join("=")).join(">")
    by("rank").disabled = !groups.length
    for (const card of cards) {{
      const rank = groups.findIndex(group => group.includes(+card.dataset.number))
      card.ariaPressed = rank >= 0
      card.classList.toggle("chosen", rank >= 0)
      card.querySelector(".rank").textContent = rank < 0 ? "" : "rank " + (rank + 1)
    }}
  }}
  function choose(number) {{
    const left = groups.map(group => group.filter(n => n != number)).filter(group => group.length)
    if (groups.flat().includes(number)) groups = left
    else if (by("tie").checked && groups.length) groups.at(-1).push(number)
    else groups.push([number])
    by("tie").checked = false
    show()
  }}
  for (const card of cards) card.onclick = () => getSelection().isCollapsed && choose(+card.dataset.number)
  addEventListener("keydown", event => {{
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return
    const on = document.activeElement, free = !on || on == document.body || on.classList.contains("answer")
    if (+event.key >= 1 && +event.key <= cards.length) choose(+event.key)
    else if (event.key == "t" || event.key == "=") by("tie").checked = !by("tie").checked
    else if (event.key == " " && on && on.classList.contains("answer")) choose(+on.dataset.number)
    else if (event.key == "Enter" && free) by("rank").click()
    else if (event.key == "s" || event.key == "u") by(event.key == "s" ? "skip" : "undo").click()
    else return
    event.preventDefault()
  }})
  show()
</script>"""


def page(question, counts, said, nonce):
    """The HTML of a question, or of None where all is done."""
    text = lambda s: html.escape(printable(s))
    fields = {"nonce": nonce, "counts": text(counts), "said": text(said), "title": text(counts)}
    if question is None:
        body = "<p>All is done. Ctrl-C in the terminal ends the program.</p>"
        return PAGE.format(**fields, where="", body=body, key="", ranking="", script="")
    turns = [
        f'<div class="turn"><small>{text(m["role"])}</small><div class="text">{text(m["content"])}</div></div>'
        for m in question.prompt.messages
    ]
    cards = [
        f'<div class="answer" role="button" tabindex="0" data-number="{n}"><span class="rank"></span><b>{n}</b>'
        f'<div class="text" dir="auto">{text(answer.text.strip())}</div>'
        f"{'<small>(cut off here)</small>' if answer.finish == 'length' else ''}</div>"
        for n, answer in enumerate(question.answers, 1)
    ]
    body = "\n".join([*turns, '<div id="answers">', *cards, "</div>"])
    where, script = text(Path(question.prompt.where).name), SCRIPT.format(nonce=nonce)
    return PAGE.format(**fields, where=where, body=body, key=question.prompt.key, ranking=RANKING, script=script)


class Server(ThreadingHTTPServer):
    """The page of a collection, for browsers on this machine."""

    daemon_threads = True

    def __init__(self, collection, port):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            reason = error.strerror.lower()
            raise ValueError(f"--port {port} can not be used ({reason}): take another, or 0 for any free one") from None
        self.collection, self.said = collection, ""
        self.lock = threading.Lock()  # browsers open several connections

    def handle_error(self, request, address):
        if not isinstance(sys.exception(), ConnectionError):  # a browser may leave while it is answered
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    timeout = 60

    def do_GET(self):
        if self._refused():
            return
        if self.path != "/":
            self._send(404, "there is only one page: /", "text/plain")
            return
        with self.server.lock:
            self._page()

    def do_POST(self):
        if self._refused():
            return
        origin, length = self.headers.get("Origin"), self.headers.get("Content-Length", "")
        if origin != f"http://{self.headers['Host']}":  # a form on another site, which the browser here would send
            self._send(403, "only the page itself may send answers", "text/plain")
            return
        if not re.fullmatch("[0-9]{1,4}", length):
            self._send(413, "this is no form of the page", "text/plain")
            return
        form = dict(urllib.parse.parse_qsl(self.rfile.read(int(length)).decode("utf-8", "replace")))
        with self.server.lock:
            self._answer(form)

    def _refused(self):
        """Whether the request came by another name than this machine's: by a foreign site's that now points here."""
        host = self.headers.get("Host", "")
        if re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]+)?", host):
            return False
        self._send(403, "this page is for 127.0.0.1 and localhost", "text/plain")
        return True

    def _answer(self, form):
        """Do what the form says, and send the browser back to the page."""
        server, status = self.server, 303
        try:
            question = server.collection.question()
            if form.get("key", "") != ("" if question is None else str(question.prompt.key)):
                raise Mistake("that was already decided; here is what comes next")
            command = {"undo": "u", "skip": "s"}.get(form.get("do"), form.get("typed", ""))
            server.said = obey(server.collection, question, command)
        except Mistake as error:
            server.said = str(error)
        except ValueError as error:  # nothing could be written
            server.said, status = str(error), 500
        if status == 303:
            self._send(303, "", "text/plain", {"Location": "/"})
        else:
            self._send(500, server.said, "text/plain")

    def _page(self):
        server, nonce = self.server, secrets.token_urlsafe(16)
        try:
            question = server.collection.question()
        except ValueError as error:
            self._send(500, str(error), "text/plain")
            return
        said, server.said = server.said, ""
        policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; form-action 'self'"
        policy += "; base-uri 'none'; frame-ancestors 'none'"
        text = page(question, str(server.collection), said, nonce)
        self._send(200, text, "text/html", {"Content-Security-Policy": policy})

    def _send(self, status, text, kind, headers=None):
        data = text.encode("utf-8", "replace")
        self.send_response(status)
        always = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(data), "Cache-Control": "no-store"}
        for name, value in {**always, "X-Content-Type-Options": "nosniff", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """The terminal is for the person who ranks."""


def serve(collection, port):
    """Show the page until Ctrl-C."""
    with Server(collection, port) as server:
        print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends, all is saved", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        print()


# ------------------------------------------------------------------ the whole


def prepare(options):
    """The Collection that the options ask for."""
    for path in options.prompts:
        if options.out.resolve() == path.resolve():
            raise ValueError(f"--out {options.out} is a file of prompts: take another")
    tokenizer, template = load_tokenizer(options.model), template_of(options.model, options.template)
    found = read_files(options.prompts, read_prompts, Bad(options.skip_bad))
    model = options.load(options.model, "lm")
    context = model.config.max_position_embeddings
    longest = options.max_new_tokens or min(LONGEST, context // 2)
    if longest + 1 >= context:
        room = f"{context - 1}, the model's context of {context} less the end"
        raise ValueError(f"--max-new-tokens has to be below {room}, and is {longest}")
    # A trainer puts the token that ends an answer behind one that was cut off, and has to have room for it.
    examples = encode_prompts(found, template, tokenizer, context - longest - 1).checked("PROMPTS")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    open(options.out, "ab").close()  # what can not be written is found out before anybody has read an answer
    if examples.left_out:
        print(f"left out: {examples.summary()}")
    prompts = {}
    for ids, found in examples:
        prompts.setdefault(key_of(found.messages), Prompt(key_of(found.messages), found.where, found.messages, ids))
    if again := len(examples) - len(prompts):
        print(f"asked once, though the files repeat them: {again:,}")
    about = {"model": options.model.resolve().name, "seed": options.seed, "temperature": options.temperature}
    about |= {"top_p": options.top_p} if options.top_p < 1 else {}
    about |= {"annotator": options.annotator} if options.annotator else {}
    draw = Sampler(model, tokenizer, stop_ids(template, tokenizer), options, longest)
    return Collection(list(prompts.values()), options.out, draw, about, seed=options.seed, ahead=options.ahead)


def main(options):
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every sign
    with prepare(options) as collection:
        if collection.decisions:
            print(f"going on: {collection}")
        if options.serve:
            serve(collection, options.port)
        else:
            terminal(collection)
        print(f"{collection}; written to {options.out}")


if __name__ == "__main__":
    about = "Collect human preferences: a person ranks what a model answers."
    command_line.run(main, command_line.parse(Options, about))
