"""
What a model is worth, in numbers: any model folder, measured by the functions that the trainers use.

    python scripts/evaluate.py ppo --questions atlas/heldout.jsonl --recall --by relation --reference sft --samples 5
    python scripts/evaluate.py base --data prepared
    python scripts/evaluate.py sft --conversations held_out.jsonl --preferences pairs.jsonl
    python scripts/evaluate.py reward --preferences pairs.jsonl
    python scripts/evaluate.py ppo --prompts prompts.jsonl --reward reward --reference sft

All of them go together. A model that was never taught to chat is asked as documents are: what it writes behind the
question is its answer.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.chat import TEMPLATES
from minillm.data import atlas
from minillm.data.conversations import (
    Examples,
    encode_conversations,
    encode_preferences,
    encode_prompts,
    pairs,
    question_of,
    read_conversations,
    read_preferences,
    read_prompts,
)
from minillm.data.datasets import Windows, load_tokens
from minillm.data.readers import Bad
from minillm.hub import load_pretrained
from minillm.kernels.device import check_device
from minillm.pipeline import JUDGED, number, percent
from minillm.report import shown, table_lines
from minillm.trainers import reward
from minillm.trainers.common import (
    by_length,
    load_tokenizer,
    padding_of,
    read_files,
    same_tokenizer,
    template_of,
)
from minillm.trainers.evaluation import (
    answer,
    answer_logprobs,
    answered_rows,
    byte_lengths,
    divergence,
    document_ids,
    evaluate_tokens,
    gold_metrics,
    held_facts,
    pair_accuracy,
    question_prompts,
    read_questions,
    right_by,
    spread,
    stops,
    text_metrics,
)
from minillm.trainers.ppo import as_answer, model_rewards
from minillm.trainers.pretrain import PretrainConfig
from minillm.trainers.run import claim
from scripts.chat import never_taught

MEASURED = ("questions", "data", "conversations", "preferences", "prompts")
ASKED = ("questions", "prompts")
# Each option, and what it says nothing about unless one of these is given, too.
GOES_WITH = {
    "recall": ("questions",),
    "by": ("questions",),
    "reward": ASKED,
    "reference": (*ASKED, "preferences"),
    "temperature": ASKED,
    "max_new_tokens": ASKED,
    "samples": ASKED,
    "template": (*ASKED, "conversations", "preferences"),
    "length": ("data",),
}
NEW_TOKENS = {"questions": 32, "prompts": 48}  # as in the trainers' evaluations
TOKENS_AT_ONCE = 4096  # in a part of a batch


@dataclasses.dataclass(kw_only=True)
class Options(command_line.Reading):
    """What to measure."""

    tensorboard = resume = False  # no options: what `claim` wants to know of a trainer

    model: tyro.conf.Positional[Path | None] = None
    """a model folder: config.json, *.safetensors, tokenizer.json"""

    questions: Path | None = None
    """questions with known answers: heldout.jsonl or dev.jsonl of scripts/atlas.py"""
    data: Path | None = None
    """a folder of scripts/prepare.py: how well its held-out text is predicted"""
    conversations: tuple[Path, ...] | None = None
    """JSON lines of {"messages": [...]}: how well the answers in them are predicted"""
    preferences: tuple[Path, ...] | None = None
    """JSON lines of {"prompt", "chosen", "rejected"}: which answer a model holds for better"""
    prompts: tuple[Path, ...] | None = None
    """JSON lines of {"messages": [...]} or {"prompt": ...}: how the answers to them read"""

    recall: bool = False
    """which facts the model holds, asked as documents state them, and what it answers right of these"""
    by: Literal["kind", "relation"] = "kind"
    """relation: right answers by relation, too"""
    reference: Path | None = None
    """a model: the KL to it on sampled answers; pairs are ranked by the gain over it (DPO's implicit reward)"""
    reward: Path | None = None
    """a reward model, to score the answers"""
    template: str = ""
    """chatml, llama2, llama3, alpaca, or a Jinja file; none: the model folder's own"""

    temperature: float = 0.0
    """of the answers; 0: always the likeliest token. The KL is always of answers sampled at 1"""
    max_new_tokens: int | None = None
    """the longest answer (32 to questions, 48 to prompts)"""
    length: int | None = None
    """tokens in a row of --data, as many as in pretraining (128, or the context where that is shorter)"""
    limit: int = 0
    """at most so many questions, prompts, conversations, rows of preferences (a row of more than two answers is several
    pairs), and rows of each source, spread over all; 0: all"""
    skip_bad: int = 0
    """how many malformed lines may be skipped"""
    seed: int = 0
    """the random numbers of sampling"""

    samples: int = 0
    """how many answers to show"""
    out: Path | None = None
    """a folder to make: metrics.jsonl, samples.jsonl with every answer, settings.json"""
    overwrite: bool = False
    """replace the folder if it is there"""

    def __post_init__(self):
        flag = lambda name: f"--{name.replace('_', '-')}"
        if self.model is None:
            raise ValueError("MODEL is missing: the folder of the model to measure, before all options")
        for name in MEASURED:
            if getattr(self, name) == ():
                raise ValueError(f"{flag(name)} needs at least one file")
        if not any(getattr(self, name) for name in MEASURED):
            raise ValueError(f"nothing to measure: give {listed(map(flag, MEASURED))}")
        for field in dataclasses.fields(self):
            needed = GOES_WITH.get(field.name, ())
            if needed and getattr(self, field.name) != field.default and not any(getattr(self, n) for n in needed):
                raise ValueError(f"{flag(field.name)} needs {listed(map(flag, needed))}")
        for name, least in (("max_new_tokens", 1), ("length", 2), ("limit", 0), ("skip_bad", 0), ("samples", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{flag(name)} has to be at least {least}, and is {value}")
        if self.seed < 0:
            raise ValueError(f"--seed has to be at least 0, and is {self.seed}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature has to be at least 0, and is {self.temperature}")
        if self.overwrite and self.out is None:
            raise ValueError("--overwrite needs --out")


def listed(words):
    """a, b or c."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


# ------------------------------------------------------------------ the models


class Subject(NamedTuple):
    """The model that is measured, and those that it is measured with."""

    model: Any
    tokenizer: Any
    template: str
    taught: bool  # to chat; if not, it is asked as documents are
    reference: Any
    reward: Any

    @property
    def asked(self):
        """The template of what is asked; None for documents."""
        return self.template if self.taught else None

    @property
    def pad_id(self):
        return padding_of(self.tokenizer)

    @property
    def context(self):
        """Tokens that every one of the models can read."""
        models = [model for model in (self.model, self.reference, self.reward) if model is not None]
        return min(model.config.max_position_embeddings for model in models)


def load(options):
    """The Subject. ValueError: models that do not go together, or with what is to be measured."""
    folder = options.model
    check_device(options.device)
    tokenizer, template = load_tokenizer(folder), template_of(folder, options.template)
    model = load_pretrained(folder, np.dtype(options.precision)).to(options.device)
    if model.config.head == "scalar":
        wrong = [f"--{name}" for name in (*MEASURED, "reference") if name != "preferences" and getattr(options, name)]
        if wrong:
            raise ValueError(
                f"{folder} is a reward model, and {wrong[0]} needs a language model; --preferences measures it"
            )
    taught = bool(options.template) or not never_taught(folder, template)
    others = {"reference": "lm", "reward": "scalar"}
    others = {name: companion(options, name, head, model, tokenizer) for name, head in others.items()}
    if options.reward:
        if not taught:
            raise ValueError(f"--reward reads chats, and {folder} was never taught to chat: give it a --template")
        if not options.template and template_of(options.reward) != template:
            raise ValueError(f"{options.reward} and {folder} have different chat templates: choose one by --template")
    return Subject(model, tokenizer, template, taught, **others)


def companion(options, name, head, model, tokenizer):
    """The model of an option, that reads what `model` writes; None where the option is not given."""
    folder = getattr(options, name)
    if folder is None:
        return None
    same_tokenizer(folder, tokenizer, options.model)
    found = options.load(folder, head)
    sizes = found.config.vocab_size, model.config.vocab_size
    if sizes[0] < sizes[1]:  # it would be asked about ids that it does not have
        raise ValueError(f"{folder} has {sizes[0]} tokens, and {options.model} has {sizes[1]}")
    return found


# ------------------------------------------------------------------ what is found


@dataclasses.dataclass
class Found:
    """What was found."""

    metrics: dict = dataclasses.field(default_factory=dict)  # {"questions/gold": number}, for metrics.jsonl
    rows: list = dataclasses.field(default_factory=list)  # of the table: (option, files, what, number as text, of)
    answers: list = dataclasses.field(default_factory=list)  # dicts, for samples.jsonl
    notes: list = dataclasses.field(default_factory=list)  # lines below the table

    def add(self, option, files, metrics, lines, of=""):
        """Numbers by name. Those in `lines`, {name: (what, write)}, are rows of the table; the first says of how many
        it is."""
        self.metrics |= {f"{option}/{name}": float(value) for name, value in metrics.items()}
        for name, (what, write) in lines.items():
            if name in metrics:
                self.rows.append((option, ", ".join(map(name_of, files)), what, write(metrics[name]), of))
                of = ""

    def table(self):
        """Lines of text."""
        options = [None, *(row[0] for row in self.rows)]
        rows = [
            (files if option != before else "", what, value, of)
            for before, (option, files, what, value, of) in zip(options, self.rows, strict=False)
        ]
        return table_lines(("on", "measured", "value", "of"), rows, "llrl")

    def samples(self, count):
        """`count` answers of each option, from all over it: a table each, in lines of text."""
        for option in ASKED if count else ():
            some = spread([row for row in self.answers if row["option"] == option], count)
            columns = [name for name in ("prompt", "completion", "answer", "score") if some and name in some[0]]
            if some:
                yield table_lines(columns, [[row[name] for name in columns] for row in some])


def name_of(path):
    """A file or folder as the table calls it."""
    return path.absolute().name


LABELS = {metric: (what, write) for what, metric, write in JUDGED}  # a number has one name in all tables
GOLD = ("gold", "right", "answered", "brief", "polite", "refused_wrongly", "words")  # the others are kinds of question
TEXT = {name: LABELS[name] for name in ("length", "missing_eos", "repetition")}
TEXT |= {"distinct_1": ("distinct words", percent), "distinct_2": LABELS["distinct_2"]}
four = lambda value: number(value, 4)
PREDICTED = {
    "loss": ("loss, nats per token", four),
    "perplexity": ("perplexity", shown),
    "bits_per_byte": ("bits per byte", four),
    "mean_token_accuracy": ("tokens predicted right", percent),
}

# Each measure_... reads what it is to measure, so that a mistake in any file is told before the work begins, and
# returns the function that does the work.

# ------------------------------------------------------------------ text


def measure_data(options, subject, found):
    same_tokenizer(options.data, subject.tokenizer, options.model)
    context = subject.model.config.max_position_embeddings
    length = options.length or min(PretrainConfig.length, context)
    if length > context:
        raise ValueError(f"--length has to be at most the context of {options.model}, {context}, and is {length}")
    sources = {name: Windows(file, length) for name, file in load_tokens(options.data, "validation").items()}
    rows = {name: (w, spread(range(len(w)), options.limit)) for name, w in sources.items() if len(w)}
    if not rows:
        raise ValueError(f"{options.data} holds out no text; --validation of scripts/prepare.py says how much")

    def measure():
        sizes, count = byte_lengths(subject.tokenizer), sum(len(some) for _, some in rows.values())
        metrics = prediction(subject.model, rows.values(), sizes)
        found.add("data", [options.data], metrics, PREDICTED, f"{count:,} rows of {length} tokens")
        for name, part in rows.items() if len(rows) > 1 else ():
            metrics = {f"bits_per_byte/{name}": prediction(subject.model, [part], sizes).get("bits_per_byte", math.nan)}
            lines = {f"bits_per_byte/{name}": (f"bits per byte: {name}", four)}
            found.add("data", [options.data], metrics, lines, f"{len(part[1]):,} rows")

    return measure


def measure_conversations(options, subject, found):
    context = subject.model.config.max_position_embeddings
    given = spread(read_files(options.conversations, read_conversations, Bad(options.skip_bad)), options.limit)
    examples = encode_conversations(given, subject.template, subject.tokenizer, context).checked("--conversations")
    left_out("conversations", examples, found)

    def measure():
        rows = Windows(list(examples), context)
        metrics = prediction(subject.model, [(rows, range(len(rows)))])
        found.add("conversations", options.conversations, metrics, PREDICTED, f"{len(examples):,} conversations")

    return measure


def prediction(model, rows, byte_lengths=None):
    """evaluate_tokens over rows, pairs of (Windows, which of them); names without eval_."""
    found = evaluate_tokens(model, (batch for some in rows for batch in batches(*some)), byte_lengths)
    return {name.removeprefix("eval_"): value for name, value in found.items()}


def batches(windows, rows):
    size = max(1, TOKENS_AT_ONCE // windows.length)
    for first in range(0, len(rows), size):
        yield windows.rows(rows[first : first + size])


def left_out(option, examples, found):
    if examples.left_out:
        found.notes.append(f"--{option}: left out {examples.summary()}")


# ------------------------------------------------------------------ pairs


def measure_preferences(options, subject, found):
    given = spread(read_files(options.preferences, read_preferences, Bad(options.skip_bad)), options.limit)
    scalar = subject.model.config.head == "scalar"
    length = subject.context - scalar  # a reward model reads the last token of an answer, too
    examples = encode_preferences(given, subject.template, subject.tokenizer, length).checked("--preferences")
    left_out("preferences", examples, found)

    def measure():
        if scalar:
            by, metrics = "score", reward.measure(subject.model, examples, subject.pad_id)
            metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        else:
            by, margins = "log p", log_margins(subject.model, examples, subject.pad_id)
            if subject.reference:
                by = f"log p less that of {name_of(options.reference)}"
                margins = margins - log_margins(subject.reference, examples, subject.pad_id)
            metrics = {"accuracy": pair_accuracy(margins), "margin": margins.mean()}
        lines = {
            "accuracy": (f"ranked right by {by}", percent),
            "margin": (f"margin of {by}", shown),
            "loss": ("loss", four),
        }
        found.add("preferences", options.preferences, metrics, lines, f"{len(pairs(examples)):,} pairs")

    return measure


def log_margins(model, examples, pad_id, rows=16):
    """log p of the better answer less log p of the worse, (pairs,) float64, for any model in the same order."""
    margins = []
    for part in by_length(pairs(examples), rows):
        logp = answer_logprobs(model, [encoded for e in part for encoded in e.answers], pad_id).reshape(-1, 2)
        margins.append(logp[:, 0] - logp[:, 1])
    return np.concatenate(margins)


# ------------------------------------------------------------------ answers


def measure_questions(options, subject, found):
    new, room = room_for("questions", options, subject)
    questions, files = read_questions(options.questions, options.limit), [options.questions]
    prompts = question_prompts(questions, subject.asked, subject.tokenizer)
    longest, question = max(zip(map(len, prompts), questions, strict=True), key=lambda pair: pair[0])
    if longest > room:
        raise ValueError(
            f"{options.questions}: the question {question.text!r:.60} is {longest} tokens long, and a context of "
            f"{subject.context} leaves {room} for it beside --max-new-tokens {new}"
        )
    facts = facts_of(questions, options.questions) if options.recall else {}

    def measure():
        answers, each, metrics, lines = answered(options, subject, prompts, new)
        texts = [a.text for a in answers]
        gold = gold_metrics(questions, texts)
        found.add("questions", files, gold, {name: LABELS[name] for name in GOLD}, f"{len(questions):,} questions")
        for name, (share, count) in shares(questions, texts, options.by == "relation").items():
            line = {f"right/{name}": (f"right: {name.replace('/', ', ')}", percent)}
            found.add("questions", files, {f"right/{name}": share}, line, f"{count:,}")
        if facts:
            recall(subject, facts, dict(zip(questions, texts, strict=True)), files, found)
        found.add("questions", files, metrics, lines)
        for q, row in zip(questions, each, strict=True):
            gold = atlas.gold_reward(q, row["completion"])
            row = {"option": "questions", "id": q.id, "prompt": q.text} | row | {"answer": q.answer}
            found.answers.append(row | {"right": gold.right, "gold": gold.total})

    return measure


def shares(questions, texts, by_relation):
    """{"fact": (the share of right answers, how many questions), ...} of every kind; by relation also of each relation,
    {"fact/capital": ...}, of kinds that have more than one."""
    found = {}
    for kind, part in right_by(questions, texts, "kind").items():
        some = [(q, text) for q, text in zip(questions, texts, strict=True) if q.kind == kind]
        of_relation = right_by(*zip(*some, strict=True), "relation") if by_relation else {}
        found[kind] = part
        if len(of_relation) > 1:
            found |= {f"{kind}/{name}": part for name, part in sorted(of_relation.items())}
    return found


def facts_of(questions, path):
    """{question: its Fact} of those about facts. ValueError: there is none, or the atlas does not know one."""
    world = {(fact.relation, fact.subject): fact for fact in atlas.facts()}
    found = {q: world.get((q.relation, q.subject)) for q in questions if q.kind == "fact"}
    if not found:
        raise ValueError(f"--recall needs questions about facts, and {path} has none")
    for q, fact in found.items():
        if fact is None:
            raise ValueError(f"{path}: {q.id}: --recall: the atlas knows no {q.relation!r} of {q.subject!r}")
    return found


def recall(subject, facts, said, files, found):
    """Which `facts`, {question: Fact}, the model holds, and what of these it `said` right, {question: text}."""
    held, every = held_facts(subject.model, subject.tokenizer, facts.values()), set(facts.values())
    known = [q for q, fact in facts.items() if fact in held]
    lines = {"facts_held": ("facts that it holds", percent)}
    found.add("questions", files, {"facts_held": len(held) / len(every)}, lines, f"{len(every):,} facts")
    right = gold_metrics(known, [said[q] for q in known])["facts"]
    lines = {"right_of_held": ("right: fact that it holds", percent)}
    found.add("questions", files, {"right_of_held": right}, lines, f"{len(known):,}")


def measure_prompts(options, subject, found):
    new, room = room_for("prompts", options, subject)
    given = spread(read_files(options.prompts, read_prompts, Bad(options.skip_bad)), options.limit)
    encode = encode_prompts if subject.taught else encode_documents
    examples = encode(given, subject.template, subject.tokenizer, room).checked("--prompts")
    left_out("prompts", examples, found)

    def measure():
        _, each, metrics, lines = answered(options, subject, [ids for ids, _ in examples], new)
        found.add("prompts", options.prompts, metrics, lines, f"{len(examples):,} prompts")
        for (_, prompt), row in zip(examples, each, strict=True):
            found.answers.append({"option": "prompts", "where": prompt.where, "prompt": last_turn(prompt)} | row)

    return measure


def last_turn(prompt):
    return question_of(prompt.messages)[-1]["content"]


def encode_documents(prompts, template, tokenizer, length):
    """encode_prompts for a model that knows no template: the last turn alone, as the beginning of a document."""
    examples = Examples()
    for prompt in prompts:
        ids = document_ids(tokenizer, last_turn(prompt))
        if len(ids) > length:
            examples.leave_out(prompt.where, f"longer than {length} tokens")
        else:
            examples.append((ids, prompt))
    return examples


def room_for(option, options, subject):
    """(tokens of the longest answer, tokens that this leaves for a prompt)."""
    new = options.max_new_tokens or NEW_TOKENS[option]
    if new >= subject.context:
        raise ValueError(f"--max-new-tokens has to be below the context of {subject.context} tokens, and is {new}")
    return new, subject.context - new


def answered(options, subject, prompts, new):
    """What the model says to prompts (ids): (Answers, a dict of each, metrics, their lines of the table)."""
    stop = stops(subject.asked, subject.tokenizer)
    say = lambda t: answer(subject.model, subject.tokenizer, prompts, stop, new, t, options.seed)
    answers, lines = say(options.temperature), dict(TEXT)
    each, metrics = [{"completion": a.text, "ended": a.ended} for a in answers], text_metrics(answers)
    if subject.reward:
        given = [as_answer(ids, a.ids) for ids, a in zip(prompts, answers, strict=True)]
        scores = model_rewards(subject.reward, subject.pad_id)(given)
        each = [row | {"score": score} for row, score in zip(each, scores.tolist(), strict=True)]
        metrics["score"], lines["score"] = scores.mean(), (f"score by {name_of(options.reward)}", shown)
    if subject.reference:
        sampled = answers if options.temperature == 1 else say(1.0)
        metrics["kl"] = divergence(subject.model, subject.reference, answered_rows(prompts, sampled, subject.pad_id))
        lines["kl"] = f"KL to {name_of(options.reference)}, nats per answer", number
    return answers, each, metrics, lines


# ------------------------------------------------------------------ the program

MEASURE = {
    "questions": measure_questions,
    "data": measure_data,
    "conversations": measure_conversations,
    "preferences": measure_preferences,
    "prompts": measure_prompts,
}


def evaluate(options):
    """Print what was found, and write it down; the Found."""
    subject, found = load(options), Found()
    work = [measure(options, subject, found) for name, measure in MEASURE.items() if getattr(options, name)]
    if options.out:
        claim(options)
    template = subject.template if subject.template in TEMPLATES else "of its own"
    print(f"{options.model}: {subject.model.flat.size:,} parameters, template {template if subject.taught else 'none'}")
    sys.stdout.flush()  # the rest takes its time
    for measure in work:
        measure()
    for lines in (found.table(), [*manner(options, subject), *found.notes], *found.samples(options.samples)):
        if lines:
            print("\n".join(["", *lines]))
    if options.out:
        metrics = {name: value if math.isfinite(value) else None for name, value in found.metrics.items()}
        write_rows(options.out / "metrics.jsonl", [{"step": 0, **metrics}])
        write_rows(options.out / "samples.jsonl", found.answers)
        print(f"written to {options.out}")
    return found


def manner(options, subject):
    """How it was asked, where that needs a word."""
    if options.temperature and any(getattr(options, name) for name in ASKED):
        yield f"answers are sampled at temperature {options.temperature:g}"
    if not subject.taught:
        if any(getattr(options, name) for name in ASKED):
            yield f"{options.model} was never taught to chat: what it is asked is the beginning of a document"
        if options.conversations or options.preferences:
            yield f"{options.model} was never taught to chat: the template of what it reads is {subject.template}"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main():
    command_line.run(evaluate, command_line.parse(Options, "What a model is worth, in numbers."))


if __name__ == "__main__":
    main()
