"""
Talk with a model.

    python scripts/chat.py FOLDER
    python scripts/chat.py FOLDER --prompt "What is the capital of France?"
    python scripts/chat.py FOLDER < questions.txt

FOLDER is what scripts/sft.py, dpo.py or ppo.py makes, or any folder in Hugging Face's layout; its own chat template is
used. A model that was only pretrained goes on with what you write. On a terminal, /help shows the commands. From a
pipe, every line is a question of one conversation (or a command), and standard output gets the answers alone.
"""

import contextlib
import dataclasses
import difflib
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.chat import TEMPLATES, Segment, begin, encode_segments, noted_template, render, stop_ids
from minillm.generate import generate
from minillm.hub import stop_tokens
from minillm.trainers.common import load_tokenizer, template_of

HELP = """\
  /retry            another answer to the last question
  /undo             take the last question and its answer back
  /reset, /new      begin a new conversation
  /system TEXT      set the system message; "" removes it; alone, show it
  /set NAME VALUE   change a setting: /set temperature 0.5, or /temperature 0.5;
                    alone, show them all
  /tokens           the conversation as the model reads it: text in ‹ ›, control
                    tokens without
  /save FILE        append the conversation to FILE, for scripts/sft.py --data
  /quit, /exit      leave; so do Ctrl-D, and Ctrl-C where no answer is going on
A \\ at the end of a line: the message goes on in the next. A space before a /:
this is no command."""
COMMANDS = ("/help", "/retry", "/undo", "/reset", "/new", "/system", "/set", "/tokens", "/save", "/quit", "/exit")

# What a terminal would obey is shown as an escape; newlines and tabs do no harm.
ESCAPED = {c: f"\\x{c:02x}" for c in (*range(9), *range(11, 32), *range(127, 160))}


@dataclasses.dataclass(kw_only=True)
class Sampling:
    """How answers are drawn. What /set can change."""

    temperature: float = 0.8
    """below 1 keeps to what is likely; 0 always takes the likeliest"""
    top_p: float = 0.95
    """only the likeliest tokens that add up to this probability; 1: all"""
    top_k: int = 0
    """only so many of the likeliest tokens; 0: all"""
    min_p: float = 0.0
    """only tokens at least this many times as likely as the likeliest; 0: all"""
    repetition_penalty: float = 1.0
    """above 1: repeat less"""
    max_new_tokens: int = 256
    """the longest answer"""
    seed: int = 0
    """the same questions with the same seed get the same answers"""

    def __post_init__(self):
        for name, fits, must in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not fits:
                raise ValueError(f"--{name.replace('_', '-')} has to be {must}, and is {getattr(self, name)}")


SETTINGS = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(kw_only=True)
class Options(Sampling, command_line.Reading):
    """The conversation."""

    model: tyro.conf.Positional[Path | None] = None
    """a model folder: config.json, *.safetensors, tokenizer.json"""
    prompt: str | None = None
    """ask this, print the answer, and leave"""
    system: str = ""
    """a system message, before everything that is said"""
    template: str = ""
    """chatml, llama2, llama3, alpaca, or a Jinja file; none: the model folder's own"""

    def __post_init__(self):
        super().__post_init__()
        if self.model is None:
            raise ValueError("MODEL is missing: the folder of the model to talk with")


# ------------------------------------------------------------------ the conversation


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    attempt: int  # how many answers to this question were given up for it
    unseen: int  # how many turns, the oldest, were left out of what the model read


class Chat:
    """A conversation with a model: `turns`, and before them the text `system`, "" for none."""

    def __init__(self, model, tokenizer, template, system="", sampling=None, stops=()):
        """`template` as for minillm.chat.render; None: the texts alone, for a model that was never taught to chat.
        `stops` are ids that end an answer, besides the template's.
        ValueError: a template that this tokenizer can not write, or that has no place for a system message."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling = sampling or Sampling()
        self.turns, self.system = [], ""
        self.stops = {*stops, *(stop_ids(template, tokenizer) if template else [tokenizer.eos_id])}
        self.set_system(system)

    def set_system(self, text):
        before, self.system = self.system, text
        try:
            self.encode([], "?")
        except ValueError:
            self.system = before
            raise

    def messages(self, turns, question=None):
        """The messages of some turns, with the system's before them, and a question after."""
        said = [("system", self.system)] if self.system else []
        for turn in turns:
            said += [("user", turn.question), ("assistant", turn.answer)]
        said += [("user", question)] if question is not None else []
        return [{"role": role, "content": content} for role, content in said]

    def encode(self, turns, question=None):
        """The ids of some turns; with a question, up to where its answer begins."""
        messages = self.messages(turns, question)
        if self.template:
            return render(messages, self.template, self.tokenizer, add_generation_prompt=question is not None)[0]
        # An answer goes on with its question, and all else begins a line.
        text = "".join("\n" * (m["role"] != "assistant") + m["content"] for m in messages).removeprefix("\n")
        return encode_segments([*begin(self.tokenizer), Segment(text)], self.tokenizer)[0]

    def fit(self, question):
        """(ids of the prompt, how many turns it leaves out): the oldest turns are left out until there is room for an
        answer. ValueError: the question alone is too long."""
        context = self.model.config.max_position_embeddings
        room = context - min(self.sampling.max_new_tokens, context // 2)
        for unseen in range(len(self.turns) + 1):
            ids = self.encode(self.turns[unseen:], question)
            if len(ids) <= room:
                break
        if len(ids) >= context:
            raise ValueError(
                f"too long: the question and what stands around it are {len(ids):,} tokens, and the model's context "
                f"is {context:,}"
            )
        return ids, unseen

    def ask(self, question, attempt=0):
        """Print the answer to a question as it is made, and remember both. On a terminal, Ctrl-C ends the answer."""
        ids, unseen = self.fit(question)
        if unseen > max((turn.unseen for turn in self.turns), default=0):
            turns = "turn" if unseen == 1 else f"{unseen} turns"
            told(f"[the conversation is longer than the model's context: it no longer reads the first {turns}]")
        decoder, sampling = self.tokenizer.decoder(skip_special=True), self.sampling
        if not self.template:  # the answer is the middle of a text, whose first blank counts
            for token in ids:
                decoder.push(token)
        text, times, finish = [], [], "stopped"

        def take(_, token):
            times.append(time.perf_counter())
            text.append(decoder.push(token))
            say(text[-1])

        try:
            (generation,) = generate(
                self.model,
                [ids],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k or None,
                top_p=sampling.top_p if sampling.top_p < 1 else None,
                min_p=sampling.min_p or None,
                repetition_penalty=sampling.repetition_penalty,
                stop_tokens=self.stops,
                seed=[(sampling.seed, len(self.turns), attempt)],  # the same again after /undo
                on_token=take,
            )
            if generation.finish == "length":
                finish = "cut at max-new-tokens" if len(times) == sampling.max_new_tokens else "the context is full"
            else:
                finish = ""
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            if not times:
                raise ValueError("stopped before the first word: the question is not kept") from None
        text.append(decoder.flush())
        say(f"{text[-1]}\n")
        # A template that has a blank before the end of a turn (llama2) puts it there again.
        answer = "".join(text).rstrip() if self.template else "".join(text)
        self.turns.append(Turn(question, answer, attempt, unseen))
        if sys.stderr.isatty():
            seconds = times[-1] - times[0]  # the first token takes longer, the more there is to read
            speed = f", {(len(times) - 1) / seconds:,.0f} tokens/s" if seconds > 0 else ""
            told(f"[{counted(len(times), 'token')}{speed}{finish and '; '}{finish}]")

    def retry(self):
        """Ask the last question again, with other random numbers. ValueError: there is none."""
        last = self.undo()
        try:
            self.ask(last.question, last.attempt + 1)
        except BaseException:
            self.turns.append(last)
            raise
        if self.sampling.temperature == 0 and self.turns[-1].answer == last.answer:
            told("[the same: at temperature 0 there is only one answer]")

    def undo(self):
        """Take the last Turn back. ValueError: there is none."""
        if not self.turns:
            raise ValueError("nothing has been said")
        return self.turns.pop()


def never_taught(folder, template):
    """Whether nothing in the folder says that its model was taught to chat: template_of, which gave `template`, has
    fallen back on chatml. A trainer that teaches chatml writes it down."""
    return template == "chatml" and not noted_template(folder)


def spelled(token, tokenizer):
    """A token for people: text in ‹ ›, so that its blanks show, and a control token's name without."""
    try:
        text = tokenizer.visible(token)
    except ValueError:  # an embedding may have more rows than there are tokens
        return f"(id {token})"
    return text if token in tokenizer.special_tokens.values() else f"‹{text}›"


# ------------------------------------------------------------------ the terminal


def say(text):
    """Print a part of an answer."""
    print(text.translate(ESCAPED) if sys.stdout.isatty() else text, end="", flush=True)


def told(text):
    """Print a remark, which is no part of the conversation; dim on a terminal."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)


def counted(n, what):
    return f"{n:,} {what}{'s' * (n != 1)}"


def shortened(text, width=80):
    """`text` in one line of at most `width` characters."""
    text = " ".join(text.split()).translate(ESCAPED)
    return text if len(text) <= width else text[: width - 1] + "…"


def hear():
    """What is said next: a line, or several where each but the last ends with \\; None at the end of the input."""
    lines = []
    while not lines or lines[-1].endswith("\\"):
        line = hear_line("… " if lines else "> ")
        if line is None:
            break
        lines = [*lines[:-1], *(last.removesuffix("\\") for last in lines[-1:]), line]
    return "\n".join(lines) if lines else None


def hear_line(cue):
    """One line, without its end; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    if not sys.stdout.isatty():  # input() would write the cue into a file
        print(cue, end="", file=sys.stderr, flush=True)
        cue = ""
    try:
        return input(cue)
    except EOFError:
        print(file=sys.stderr)
        return None


def talk(chat):
    """Read and answer until there is no more to read. What can not be done is a remark on a terminal; from a pipe it is
    a ValueError, because nobody would mend it."""
    number = 0
    while (line := hear()) is not None and line.strip() not in ("/quit", "/exit"):
        number += 1 + line.count("\n")
        try:
            if line.startswith("/"):
                command(chat, utf8(line))
            elif line.strip():
                chat.ask(utf8(line.strip()))
        except ValueError as error:
            if not sys.stdin.isatty():
                raise ValueError(f"standard input, line {number}: {error}") from None
            told(f"[{error}]")


def utf8(line):
    """`line`. ValueError: it was read from bytes that are not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise ValueError(f"not UTF-8: byte 0x{byte:02x} at character {error.start + 1}") from None
    return line


# ------------------------------------------------------------------ commands


def command(chat, line):
    """Do what a line that begins with / says. ValueError: it can not be done."""
    name, _, rest = line.partition(" ")
    name, rest = name.strip(), rest.strip()
    if name == "/help":
        print(HELP, file=sys.stderr, flush=True)
    elif name == "/retry":
        chat.retry()
    elif name == "/undo":
        told(f"[taken back: {shortened(chat.undo().question)}]")
    elif name in ("/reset", "/new"):
        chat.turns.clear()
        told("[a new conversation]")
    elif name == "/system":
        if rest:
            chat.set_system("" if rest == '""' else rest)
        told(f"[system message: {shortened(chat.system) or 'none'}]")
    elif name == "/set" and not rest:
        told("\n".join(f"  {flag:<20}{getattr(chat.sampling, field)}" for flag, field in SETTINGS.items()))
    elif name == "/set":
        change(chat, *rest.split(maxsplit=1))
    elif name[1:].replace("_", "-") in SETTINGS:
        change(chat, name[1:], rest)
    elif name == "/tokens":
        show_tokens(chat)
    elif name == "/save":
        save(chat, rest)
    else:
        known = [*COMMANDS, *(f"/{flag}" for flag in SETTINGS)]
        near = [there for there in known if len(name) > 2 and there.startswith(name)]
        near = near or difflib.get_close_matches(name, known, 1)
        raise ValueError(f"no command {name}; " + (f"perhaps you meant {near[0]}" if near else "/help shows them"))


def change(chat, flag, value=""):
    """Set a field of Sampling, or without a value show it."""
    flag = flag.replace("_", "-")
    if flag not in SETTINGS:
        near = difflib.get_close_matches(flag, SETTINGS, 1)
        hint = f"perhaps you meant {near[0]}" if near else f"there are {', '.join(SETTINGS)}"
        raise ValueError(f"no setting {flag}; {hint}")
    kind = type(getattr(chat.sampling, SETTINGS[flag]))
    if value:
        try:
            number = kind(value)
        except ValueError:
            raise ValueError(f"{flag}: {value!r} is no {'whole ' * (kind is int)}number") from None
        try:
            chat.sampling = dataclasses.replace(chat.sampling, **{SETTINGS[flag]: number})
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--")) from None
    told(f"[{flag} {getattr(chat.sampling, SETTINGS[flag])}]")


def show_tokens(chat):
    """Print what the model has read and said, as tokens; a newline among them begins a line."""
    unseen = chat.turns[-1].unseen if chat.turns else 0
    if not chat.messages(chat.turns):
        raise ValueError("nothing has been said")
    ids = chat.encode(chat.turns[unseen:]).tolist()
    lines = [""]
    for token in ids:
        lines[-1] += spelled(token, chat.tokenizer)
        lines += [""] * (b"\n" in chat.tokenizer.token_bytes(token))
    print("\n".join(lines).rstrip("\n"))
    told(f"[{counted(len(ids), 'token')} of a context of {chat.model.config.max_position_embeddings:,}]")


def save(chat, name):
    """Append the conversation to a file of JSON lines."""
    if not name:
        raise ValueError("/save needs the name of a file")
    if not chat.turns:
        raise ValueError("nothing has been said")
    row = json.dumps({"messages": chat.messages(chat.turns)}, ensure_ascii=False)
    try:
        with open(Path(name).expanduser(), "a+b") as file:
            if file.tell():  # an editor may have left the last line without its end
                file.seek(-1, os.SEEK_END)
                row = row if file.read() == b"\n" else f"\n{row}"
            file.write(f"{row}\n".encode())
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    told(f"[{counted(len(chat.turns), 'turn')} written to {name}]")


# ------------------------------------------------------------------ the program


def run(options):
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    tokenizer = load_tokenizer(options.model)
    template = template_of(options.model, options.template)
    model = options.load(options.model, "lm")
    if not options.template and never_taught(options.model, template):
        told(f"{options.model} was never taught to chat: it will continue the text rather than answer")
        template = None
    chat = Chat(model, tokenizer, template, options.system, options, stop_tokens(options.model))
    if options.prompt is not None:
        return chat.ask(options.prompt)
    if not sys.stdin.isatty():
        return talk(chat)
    with contextlib.suppress(ImportError):  # with it, input() edits its line and remembers those before
        importlib.import_module("readline")
    known = template if template in TEMPLATES else "of its own" if template else "none"
    told(
        f"{options.model}: {model.flat.size:,} parameters, context {model.config.max_position_embeddings:,}, template "
        f"{known}; /help shows the commands"
    )
    try:
        talk(chat)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def main():
    command_line.run(run, command_line.parse(Options, "Talk with a model."))


if __name__ == "__main__":
    main()
