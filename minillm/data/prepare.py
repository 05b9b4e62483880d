"""
From a pile of text to clean, deduplicated token files, with an account of every document that was dropped.

    documents -> clean -> language -> quality -> classifier -> toxicity -> PII -> contamination    (worker processes)
              -> exact duplicates -> near duplicates -> text/SOURCE.SPLIT.jsonl, dropped.jsonl   (one process, in order)
              -> tokenizer -> tokens/SOURCE.SPLIT.bin, manifest.json

A document stops at the first rule that it breaks and is counted there. Everything streams: what grows with the input is
the memory of the two duplicate indexes, some bytes for each document that was kept.

The manifest holds no time and no machine: the same input, settings and seed give the same bytes, for any number of
workers.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import textwrap
import time
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .. import __version__
from ..checkpoint import sha256
from ..files import read_object
from ..tokenizer import SMALLEST_VOCABULARY, Tokenizer
from .classifier import Classifier, WordList, classifier_rule, word_list_rule
from .clean import clean, scrub_pii
from .datasets import FORMAT, MANIFEST, TokenWriter
from .dedup import ExactIndex, NearIndex, NgramIndex, fingerprint, signature
from .filters import PRESETS, judge
from .language import code_of, identify, language_rule
from .output import aside, aside_of, check_out
from .readers import Bad, find_sources, read, read_rows

STEPS = ("read", "clean", "language", "quality", "classifier", "toxicity", "pii", "contamination", "hash", "exact",
         "near", "write", "tokenizer", "tokenise")  # fmt: skip
BATCH = 1 << 18  # characters that travel to a worker at once


@dataclass
class Prepare:
    """What goes in, which rules it has to pass, and where it goes. Every field is an option of scripts/prepare.py."""

    inputs: tuple[str, ...] = ()
    """files or folders (.txt, .jsonl, .parquet, .arrow; .zst, .gz), each PATH or NAME=PATH"""
    out: Path = Path("prepared")
    """the folder to make"""
    key: str = "text"
    """the field or column that holds the text"""
    skip_bad: int = 0
    """how many malformed lines may be skipped"""
    overwrite: bool = False
    """replace OUT if it is there"""

    preset: str = "default"
    """quality rules: default, code, gopher_quality, gopher_repetition, c4, fineweb, or none"""
    languages: tuple[str, ...] = ()
    """codes (en, de, ...) of the languages to keep; none given keeps all"""
    language_threshold: float = 0.65
    """the least probability of the language (FineWeb's)"""
    quality_model: Path | None = None
    """a classifier of scripts/train_classifier.py"""
    quality_threshold: float = 0.5
    """the least probability of good quality"""
    toxic_words: Path | None = None
    """a file of words and phrases, one a line"""
    toxic_share: float = 0.01
    """the largest share of a document's words that may be on that list"""
    toxicity_model: Path | None = None
    """a classifier of toxic text"""
    toxicity_threshold: float = 0.9
    """the largest probability of toxicity"""
    pii: bool = True
    """replace e-mail addresses, public IP addresses, phone, card and account numbers"""
    near_duplicates: bool = True
    """drop documents whose word 5-grams mostly stand in an earlier one"""
    near_threshold: float = 0.7
    """the estimated Jaccard similarity from which a document is a near duplicate: finds all of 0.8 (dedup.py)"""
    eval_sets: tuple[Path, ...] = ()
    """evaluation files (.jsonl, .txt): documents that share an n-gram with them are dropped"""
    eval_ngram: int = 13
    """words in that n-gram (GPT-3's)"""

    tokenizer: Path | None = None
    """a tokenizer folder or file; without one, one is trained on the kept text"""
    vocab_size: int = 8192
    """tokens of the tokenizer to train"""
    tokenizer_characters: int = 50_000_000
    """how much kept text it is trained on"""
    validation: float = 0.01
    """the share of documents that is held out, chosen by a hash of the text"""
    weights: dict[str, float] = field(default_factory=dict)
    """share of each source in training, for the manifest: NAME NUMBER ... (in proportion to its tokens)"""
    seed: int = 0
    """chooses the documents that are held out"""
    workers: int = 0
    """processes; 0 takes one for each core, 1 works without any"""

    def __post_init__(self):
        def refuse(name, must):
            raise ValueError(f"--{name.replace('_', '-')} has to be {must}, and is {getattr(self, name)}")

        if not self.inputs:
            raise ValueError("name at least one file or folder to read")
        if self.preset != "none" and self.preset not in PRESETS:
            refuse("preset", f"one of {', '.join([*PRESETS, 'none'])}")
        for name in ("language_threshold", "quality_threshold", "toxicity_threshold", "toxic_share", "near_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "from 0 to 1")
        if not 0 <= self.validation < 1:
            refuse("validation", "at least 0 and below 1")
        for name, least in (("skip_bad", 0), ("workers", 0), ("eval_ngram", 5), ("tokenizer_characters", 1)):
            if getattr(self, name) < least:
                refuse(name, f"at least {least}")
        if not SMALLEST_VOCABULARY <= self.vocab_size < 1 << 32:
            refuse("vocab_size", f"at least {SMALLEST_VOCABULARY}")
        for code in self.languages:
            code_of(code)  # a ValueError where it is not known
        if any(not weight > 0 for weight in self.weights.values()):
            refuse("weights", "above 0")


class Result(NamedTuple):
    """What a worker found out about one document."""

    document: object  # a Document with the text as it will be kept
    rule: str | None  # the rule that drops it
    detail: str
    fingerprint: int
    signature: object
    language: str
    changes: dict  # how often it was changed: {"repaired": 1, "email": 3}


class Worker:
    """The steps that look at one document alone. `seconds` sums the time of each."""

    def __init__(self, settings):
        self.settings, self.seconds = settings, Counter()
        self.quality = settings.quality_model and Classifier.load(settings.quality_model)
        self.toxicity = settings.toxicity_model and Classifier.load(settings.toxicity_model)
        self.toxic_words = settings.toxic_words and WordList(settings.toxic_words)
        self.evaluation = settings.eval_sets and NgramIndex(_evaluation_texts(settings), settings.eval_ngram)

    def __call__(self, documents):
        """[Result] for these documents, and the seconds that each step took."""
        self.seconds.clear()
        return [self.judge(document) for document in documents], dict(self.seconds)

    def timed(self, step, function, *arguments, **options):
        begin = time.perf_counter()
        result = function(*arguments, **options)
        self.seconds[step] += time.perf_counter() - begin
        return result

    def judge(self, document):
        """The Result for one document, up to the first rule that drops it."""
        settings, changes = self.settings, {}
        text = self.timed("clean", clean, document.text)
        if text != document.text:
            changes["repaired"] = 1
        language, broken = "", None if text else ("empty", "no text is left after cleaning")
        if not broken:
            language, _ = found = self.timed("language", identify, text)
            if settings.languages:
                broken = language_rule(found, settings.languages, settings.language_threshold)
        if not broken and settings.preset != "none":
            verdict = self.timed("quality", judge, text, settings.preset)
            text, broken = verdict.text, verdict.rule and (verdict.rule, verdict.detail)
        if not broken and self.quality:
            broken = self.timed("classifier", classifier_rule, text, self.quality, settings.quality_threshold,
                                name="quality.classifier")  # fmt: skip
        if not broken and self.toxic_words:
            broken = self.timed("toxicity", word_list_rule, text, self.toxic_words, max_share=settings.toxic_share)
        if not broken and self.toxicity:
            broken = self.timed("toxicity", classifier_rule, text, self.toxicity, settings.toxicity_threshold,
                                keep="low", name="toxicity.classifier")  # fmt: skip
        if not broken and settings.pii:
            text, found = self.timed("pii", scrub_pii, text)
            changes |= found
        if not broken and self.evaluation:
            overlap = self.timed("contamination", self.evaluation.overlap, text)
            broken = overlap and ("contamination", "shares {!r} with {}".format(*overlap[1:]))
        if broken:
            return Result(document._replace(text=text), *broken, 0, None, language, changes)
        marks = self.timed("hash", self.hashes, text)
        return Result(document._replace(text=text), None, "", *marks, language, changes)

    def hashes(self, text):
        return fingerprint(text), signature(text) if self.settings.near_duplicates else None


def _evaluation_texts(settings):
    """("file:line", text) of every string in the evaluation files, whatever field it stands in."""
    for path in settings.eval_sets:
        if path.suffix == ".txt":
            yield from ((document.where, document.text) for document in read([path]))
        else:
            for where, row in read_rows(path):
                yield from ((where, text) for text in _strings(row))


def _evaluation(settings):
    """What the manifest says about the evaluation texts: those that are too short to look for are counted."""
    index = NgramIndex(_evaluation_texts(settings), settings.eval_ngram)
    return {"texts": len(index.names), "ngrams": len(index), "too_short": len(index.too_short)}


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


# ------------------------------------------------------------------ processes

_worker = None  # of a worker process


def _start(settings):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    _worker = Worker(settings)


def _work(documents):
    return _worker(documents)


def judged(settings, batches, workers):
    """Worker's results for each of `batches`, in their order. At most a few batches are under way, so memory does not
    depend on how many there are."""
    worker = Worker(settings)  # here too, so that a bad file is one clear error before any process starts
    if workers == 1:
        yield from map(worker, batches)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit locks of threads it does not have
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(settings,)) as pool:
        under_way = deque()
        try:
            for batch in batches:
                under_way.append(pool.submit(_work, batch))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise ValueError("a worker process died, of too little memory perhaps: try --workers 1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def batched(documents, characters=BATCH):
    """Lists of documents of at least so many characters together."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------ the account


class Account:
    """What happened to the documents of one source."""

    def __init__(self):
        self.documents = self.characters = self.kept = self.kept_characters = 0
        self.dropped, self.languages, self.changes = Counter(), Counter(), Counter()

    def as_dict(self):
        counters = {name: dict(sorted(getattr(self, name).items())) for name in ("dropped", "languages", "changes")}
        numbers = ("documents", "characters", "kept", "kept_characters")
        return {name: getattr(self, name) for name in numbers} | counters


class Report(NamedTuple):
    """What `prepare` did, for the table that a person reads."""

    manifest: dict
    examples: dict  # {rule: ["file:line: detail: beginning of the text"]}
    seconds: dict  # {step: seconds, summed over processes}
    elapsed: float  # seconds


class Texts:
    """The kept documents as JSON lines, one file for each source and split, and the dropped ones in dropped.jsonl."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "text").mkdir(parents=True)
        self.files, self.lines, self.opened = {}, Counter(), ExitStack()
        self.dropped = self.open(folder / "dropped.jsonl")

    def open(self, path):
        return self.opened.enter_context(open(path, "w", encoding="utf-8", newline="\n"))

    def keep(self, source, split, text, where):
        """Write a document; the name of its place, "SOURCE.SPLIT:line"."""
        name = f"{source}.{split}"
        if name not in self.files:
            self.files[name] = self.open(self.path(name))
        self.files[name].write(json.dumps({"text": text, "where": where}, ensure_ascii=False) + "\n")
        self.lines[name] += 1
        return f"{name}:{self.lines[name]}"

    def path(self, name):
        return self.folder / "text" / f"{name}.jsonl"

    def drop(self, document, rule, detail):
        row = {"where": document.where, "source": document.source, "rule": rule, "detail": detail}
        self.dropped.write(json.dumps(row | {"text": document.text[:300]}, ensure_ascii=False) + "\n")

    def close(self):
        self.opened.close()


def is_held_out(fingerprint, share, seed):
    """Whether a document is for validation: by its text and the seed alone, so that more data moves no document."""
    digest = hashlib.sha256(f"{seed}:{fingerprint}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


# ------------------------------------------------------------------ all of it


def prepare(settings, show_progress=False):
    """Run the whole; returns a Report. OUT appears when everything in it is complete, and not before.

    ValueError: an input or setting that can not be used, too many bad lines, nothing left. Then OUT is as it was.
    """
    begin = time.perf_counter()
    out = Path(settings.out)
    sources = _without_prepared(settings.inputs, out)
    if unknown := settings.weights.keys() - {source.name for source in sources}:
        raise ValueError(f"--weights names the source {sorted(unknown)[0]!r}, and there is none of that name")
    check_out(out, settings.overwrite, MANIFEST, "prepare.py", ["text"])
    tokenizer = settings.tokenizer and Tokenizer.load(settings.tokenizer)
    with aside(out) as partial:
        report = _prepare(settings, sources, tokenizer, partial, show_progress)
    return report._replace(elapsed=time.perf_counter() - begin)


def _without_prepared(inputs, out):
    """The Sources of `inputs`, without what an earlier run has made of them: OUT, and other folders of prepared data
    that lie in a folder to read. ValueError: nothing else is there; an input lies in OUT, which would be replaced."""
    mine = [folder.resolve() for folder in (out, aside_of(out))]
    is_mine = lambda file: any(file.resolve().is_relative_to(folder) for folder in mine)
    holds_prepared, sources = functools.cache(_holds_prepared), []
    for given, source in zip(inputs, find_sources(inputs), strict=True):
        named = {Path(given), Path(str(given).rpartition("=")[2])}
        if any(is_mine(path) for path in named if path.exists()):
            raise ValueError(f"{given} is in --out {out}, which would be replaced: take another --out")
        files = [file for file in source.files if not is_mine(file)]
        left_out = [file for file in source.left_out if not is_mine(file)]
        prepared = {file for file in files if any(map(holds_prepared, _folders(file, named)))}
        if not (kept := tuple(file for file in files if file not in prepared)):
            raise ValueError(f"{given} holds nothing but prepared data: name its folder text/ to read that again")
        sources.append(source._replace(files=kept, left_out=tuple(sorted([*left_out, *prepared]))))
    return sources


def _folders(file, named):
    """The folders that a file stands in, up to the one that was `named` to be read; none where the file itself was."""
    above = [file, *file.parents]
    return above[1 : next(i for i, path in enumerate(above) if path in named) + 1]


def _holds_prepared(folder):
    """Whether this is a folder that `prepare` has made."""
    try:
        return {"format", "sources", "tokens"} <= read_object(folder / MANIFEST).keys()
    except (FileNotFoundError, ValueError):  # there is none, or it is another program's
        return False


def _prepare(settings, sources, tokenizer, folder, show_progress):
    seconds, bad, texts = Counter(), Bad(settings.skip_bad), Texts(folder)
    accounts = {source.name: Account() for source in sources}
    total = sum(path.stat().st_size for source in sources for path in source.files)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="documents", disable=not show_progress) as bar:
            documents = _timed(read(sources, key=settings.key, bad=bad, on_bytes=bar.update), seconds)
            examples, families = _select(settings, documents, accounts, texts, seconds)
    finally:
        texts.close()
    if not any(account.kept for account in accounts.values()):
        raise ValueError(f"no document is left: {_why_none(accounts, examples, bad)}")
    if tokenizer is None:
        begin = time.perf_counter()
        tokenizer = Tokenizer.train(_sample(texts, settings.tokenizer_characters), settings.vocab_size)
        seconds["tokenizer"] = time.perf_counter() - begin
    tokenizer.save(folder)
    begin = time.perf_counter()
    pieces = _tokenise(texts, accounts, tokenizer, folder, show_progress)
    seconds["tokenise"] = time.perf_counter() - begin
    manifest = {
        "format": FORMAT,
        "minillm": __version__,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("out", "workers", "overwrite")},
        "sources": {
            source.name: {
                "files": [_file(path) for path in source.files],
                "left_out": [str(path) for path in source.left_out],
                **accounts[source.name].as_dict(),
            }
            for source in sources
        },
        "bad_lines": {"count": bad.count, "examples": bad.examples},
        "near_duplicates": families,
        "evaluation": _evaluation(settings),
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": sha256(folder / "tokenizer.json")},
        "weights": settings.weights,
        "tokens": pieces,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, default=str)  # paths as strings
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Report(json.loads(text), examples, dict(seconds), 0.0)


def _why_none(accounts, examples, bad):
    """Which rules have dropped everything, with an example of each."""
    rules = sum((account.dropped for account in accounts.values()), Counter())
    told = [f"{rule} dropped {n:,} (first: {examples[rule][0]:.150})" for rule, n in rules.most_common(3)]
    if bad.count:
        told.append(f"{bad.count:,} malformed lines were skipped (first: {bad.examples[0]:.150})")
    hint = "; --preset none takes the rules of quality away" if any(r.startswith(tuple(PRESETS)) for r in rules) else ""
    return ", ".join(told) + hint


def _timed(documents, seconds):
    """The same documents; the time to get them is counted under "read"."""
    while True:
        begin = time.perf_counter()
        document = next(documents, None)
        seconds["read"] += time.perf_counter() - begin
        if document is None:
            return
        yield document


def _select(settings, documents, accounts, texts, seconds):
    """Judge every document, write it down as kept or dropped; ({rule: examples}, the families of near duplicates)."""
    exact, near = ExactIndex(), NearIndex(settings.near_threshold) if settings.near_duplicates else None
    places, families, examples = Places(), Counter(), {}
    workers = settings.workers or len(os.sched_getaffinity(0))
    for results, times in judged(settings, batched(_counted(documents, accounts)), workers):
        seconds.update(times)
        for result in results:
            document, rule, detail = result.document, result.rule, result.detail
            account = accounts[document.source]
            account.changes.update(result.changes)
            account.languages[result.language or "none"] += 1
            begin = time.perf_counter()
            if not rule and not exact.add(result.fingerprint):
                rule, detail = "duplicate.exact", "the same words as a text before it; case, spaces and signs apart"
            begin = _lap(seconds, "exact", begin)
            if not rule and near is not None:
                places.add(document.where)
                if found := near.add(result.signature):
                    number, similarity = found
                    families[number] += 1
                    rule, detail = "duplicate.near", f"similarity {similarity:.2f} to {places[number]}"
                begin = _lap(seconds, "near", begin)
            if rule:
                account.dropped[rule] += 1
                texts.drop(document, rule, detail)
                if len(examples.setdefault(rule, [])) < 3:
                    examples[rule].append(f"{document.where}: {detail}: {' '.join(document.text[:200].split())}")
            else:
                split = "validation" if is_held_out(result.fingerprint, settings.validation, settings.seed) else "train"
                texts.keep(document.source, split, document.text, document.where)
                account.kept += 1
                account.kept_characters += len(document.text)
            _lap(seconds, "write", begin)
    largest = [{"first": places[number], "documents": count + 1} for number, count in families.most_common(10)]
    return examples, {"families": len(families), "dropped": families.total(), "largest": largest}


def _lap(seconds, step, begin):
    """Count the time since `begin` under `step`; the time now."""
    now = time.perf_counter()
    seconds[step] += now - begin
    return now


def _counted(documents, accounts):
    for document in documents:
        accounts[document.source].documents += 1
        accounts[document.source].characters += len(document.text)
        yield document


class Places:
    """A list of "file:line" in 8 bytes each."""

    def __init__(self):
        self.files, self.numbers = {}, array("Q")

    def add(self, where):
        file, _, line = where.rpartition(":")
        self.numbers.append(self.files.setdefault(file, len(self.files)) << 40 | int(line))

    def __getitem__(self, number):
        place = self.numbers[number]
        return f"{list(self.files)[place >> 40]}:{place & (1 << 40) - 1}"


def _sample(texts, characters):
    """Kept training texts of about so many characters, from every source in proportion, spread over all of it."""
    names = [name for name in texts.lines if name.endswith(".train")] or list(texts.lines)
    total = sum(texts.path(name).stat().st_size for name in names)
    every = max(1, total // characters)
    for name in names:
        rows = read_rows(texts.path(name), max_line=1 << 40)
        yield from (row["text"] for _, row in itertools.islice(rows, 0, None, every))


def _tokenise(texts, accounts, tokenizer, folder, show_progress):
    """Write NAME.bin and NAME.idx for every text file; {split: {source: the piece of the manifest}}."""
    before, after = ([i] if i is not None else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
    pieces = {"train": {}, "validation": {}}
    total = sum(account.kept for account in accounts.values())
    with tqdm(total=total, unit=" documents", desc="tokens", disable=not show_progress) as bar:
        for source, split in itertools.product(accounts, pieces):
            if not texts.lines[f"{source}.{split}"]:
                continue
            name = f"{source}.{split}"
            with TokenWriter(folder / name, tokenizer.vocab_size) as writer:
                rows = (row["text"] for _, row in read_rows(texts.path(name), max_line=1 << 40))
                for batch in _batches_of(rows, 256):
                    for ids in tokenizer.encode_batch(batch):
                        writer.add([*before, *ids.tolist(), *after])
                    bar.update(len(batch))
            pieces[split][source] = writer.piece
    return pieces


def _batches_of(items, count):
    items = iter(items)
    while batch := list(itertools.islice(items, count)):
        yield batch


def _file(path):
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}


# ------------------------------------------------------------------ the table


def table(report):
    """What was dropped by which rule, what was changed, and how long each step took, as lines of text."""
    sources = report.manifest["sources"]
    total, characters = (sum(s[key] for s in sources.values()) for key in ("documents", "characters"))
    dropped, changes = Counter(), Counter()
    for source in sources.values():
        dropped.update(source["dropped"])
        changes.update(source["changes"])
    yield f"{'source':<24}{'documents':>11}{'kept':>11}{'':>7}{'characters':>15}{'kept':>15}{'tokens':>13}"
    for name, source in sources.items():
        tokens = sum(split[name]["tokens"] for split in report.manifest["tokens"].values() if name in split)
        share = f"{source['kept'] / max(1, source['documents']):.0%}"
        yield (
            f"{name:<24}{source['documents']:>11,}{source['kept']:>11,}{share:>7}"
            f"{source['characters']:>15,}{source['kept_characters']:>15,}{tokens:>13,}"
        )
    yield ""
    yield f"{'dropped by':<34}{'documents':>11}{'':>7}  for example"
    for rule, count in dropped.most_common():
        example = report.examples[rule][0]
        yield f"{rule:<34}{count:>11,}{count / max(1, total):>7.1%}  {_short(example, 66)}"
    if not dropped:
        yield "nothing"
    if bad := report.manifest["bad_lines"]["count"]:
        yield f"{'malformed lines':<34}{bad:>11,}{'':>7}  {_short(report.manifest['bad_lines']['examples'][0], 66)}"
    yield ""
    if changes:
        yield "changed: " + ", ".join(f"{kind} {count:,}" for kind, count in sorted(changes.items()))
    families = report.manifest["near_duplicates"]
    if families["families"]:
        largest = families["largest"][0]
        yield (
            f"near duplicates: {families['dropped']:,} in {families['families']:,} families, the largest of "
            f"{largest['documents']} around {Path(largest['first']).name}"
        )
    size, told = report.manifest["tokenizer"]["vocab_size"], report.manifest["settings"]
    origin = f"from {told['tokenizer']}" if told["tokenizer"] else "trained on the kept text"
    if not told["tokenizer"] and size < told["vocab_size"]:
        origin += f", which gives no more (--vocab-size {told['vocab_size']:,})"
    yield f"tokenizer: {size:,} tokens, {origin}"
    megabytes = characters / 1e6
    speeds = [f"{step} {megabytes / report.seconds[step]:.1f}" for step in STEPS if report.seconds.get(step, 0) > 0]
    yield from textwrap.wrap(f"MB/s of one core: {', '.join(speeds)}", 118)
    yield f"{megabytes:.1f} MB in {report.elapsed:.1f} s, {megabytes / max(report.elapsed, 1e-9):.1f} MB/s in all"


def _short(text, width):
    """`text` in one line of at most `width` signs; the file's folder goes first."""
    text = "".join(c if c.isprintable() else " " for c in text)
    place, _, rest = text.partition(": ")
    text = f"{Path(place).name}: {rest}"
    return text if len(text) <= width else text[: width - 1] + "…"
