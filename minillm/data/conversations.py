"""
Conversations, preferences and prompts: JSON lines of these shapes become examples of token ids and a loss mask.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}      instruction tuning
    {"prompt": ..., "response": ...}                                                       the same, one turn
    {"prompt": ..., "chosen": ..., "rejected": ...[, "margin": m][, "preference": p]}      preferences
    {"prompt": ..., "ranked": [best, [next, next], ...]}      the same, of several answers; inner lists are in no order
    {"messages": [... up to a user's turn]} or {"prompt": ...}                             prompts

A prompt is a string (one user turn), messages, or a transcript "\\n\\nHuman: ...\\n\\nAssistant: ..."; a chosen or
rejected answer is a string, or messages that end with it. Messages before it are the prompt, which then need not stand
by itself; where it does, they have to have its last turn among them. Other fields are left alone.

Rows that can not be used (too long, nothing to train, chosen equal to rejected, turns that the template has no place
for) are left out and counted in an `Examples`, never cut: an answer without its end teaches a model not to stop.
"""

import itertools
import re
from collections import Counter
from datetime import datetime
from typing import NamedTuple

import numpy as np

from ..chat import TEMPLATES, check_messages, render
from .readers import read_rows

TUNED = '{"messages": [...]} or {"prompt": ..., "response": ...}'
COMPARED = '{"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "ranked": [best, ...]}'
PROMPTS = ("messages", "prompt_messages", "prompt")  # the fields that a prompt may stand in, the first that is there
MISFIT = "that the template has no place for"
TODAY = datetime(2024, 7, 26)  # for templates that write the date: examples are the same on any day. Llama 3.2's own


class Conversation(NamedTuple):
    """Messages, and where they come from."""

    where: str  # "file:line"
    messages: list
    row: dict  # all fields, as they stand in the file


class Preference(NamedTuple):
    """Two or more answers to one prompt, the best first (of two, the one that is more probably the better one)."""

    where: str
    prompt: list  # messages, ending with a user's turn
    answers: list  # of str
    margin: float  # how much better the first is than the second
    preference: float  # the probability that it is; 0.5 for a tie
    ranks: tuple | None = None  # of the answers, never falling, equal ones not compared; None: 0, 1, 2, ...


class Ranking(NamedTuple):
    """A Preference as token ids."""

    answers: list  # of (ids, mask), each with the prompt before it; only the answer is in the mask
    margin: float = 0.0
    preference: float = 1.0
    reference: tuple | None = None  # log-probabilities of the answers under a reference model, for DPO
    ranks: tuple | None = None  # see Preference

    def places(self):
        """The ranks of all answers, a tuple."""
        return tuple(range(len(self.answers))) if self.ranks is None else self.ranks

    def compared(self):
        """(i, j) of each two answers of which answer i is the better one."""
        ranks = self.places()
        return [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]


class Examples(list):
    """The examples that can be used. left_out counts the others by reason, and `first` names one row for each."""

    def __init__(self):
        super().__init__()
        self.left_out, self.first = Counter(), {}

    def leave_out(self, where, reason, detail=""):
        self.left_out[reason] += 1
        self.first.setdefault(reason, f"{where}: {detail}" if detail else where)

    def checked(self, what):
        """self. ValueError where nothing is left of `what` (a file's name, say)."""
        if not self:
            reasons = self.summary() or "it is empty"
            raise ValueError(f"{what}: no row can be used: {reasons}")
        return self

    def summary(self):
        """What was left out, as one line; "" where nothing was."""
        return ", ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.left_out.most_common())


# ------------------------------------------------------------------ rows


def read_conversations(path, bad=None):
    """Each Conversation of a file. A row that is none is a bad line, see readers.Bad."""
    yield from _parsed(path, bad, lambda where, row: Conversation(where, _messages(row, answered=True), row))


def read_prompts(path, bad=None):
    """Each prompt of a file, as a Conversation that ends with a user's turn (a last answer is left out)."""
    yield from _parsed(path, bad, lambda where, row: Conversation(where, _messages(row, answered=False), row))


def read_preferences(path, bad=None):
    """Each Preference of a file."""

    def parse(where, row):
        if "ranked" not in row and not {"chosen", "rejected"} & row.keys():
            raise ValueError(f"chosen is missing: {COMPARED} is needed")
        ranked = row.get("ranked")
        if "ranked" not in row:  # an answer alone, which is checked here, is a list of messages or a string
            ranked = [row[name] for name in ("chosen", "rejected") if _answer(row, name)]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise ValueError("ranked has to be a list of at least two answers, the best first")
        groups = [group if _in_no_order(group) else [group] for group in ranked]
        answers = [_text(answer, f"ranked[{k}]") for k, group in enumerate(groups) for answer in group]
        ranks = tuple(k for k, group in enumerate(groups) for _ in group)
        margin, preference = row.get("margin", 0.0), row.get("preference", 1.0)
        for name, value in (("margin", margin), ("preference", preference)):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name} has to be a number, and is {value!r:.40}")
        if not 0 <= preference <= 1:
            raise ValueError(f"preference is a probability, and is {preference}")
        if preference < 0.5 and ranks == (0, 1):  # then the second is the better one
            answers, preference, margin = answers[::-1], 1 - preference, -margin
        prompt = _prompt_of(row, [answer for group in groups for answer in group])
        return Preference(where, prompt, answers, float(margin), float(preference), ranks)

    yield from _parsed(path, bad, parse)


def _prompt_of(row, answers):
    """The messages that a row's answers follow: those that stand before each of them, or else the row's prompt."""
    before = [answer[:-1] if isinstance(answer, list) else [] for answer in answers]
    prompt = next(filter(None, before), None)
    given = _messages(row, answered=False) if prompt is None or any(name in row for name in PROMPTS) else None
    if prompt is None:
        return given
    if any(other != prompt if other else given != prompt for other in before):  # without messages, it follows the row's
        raise ValueError("the answers do not follow the same messages")
    check_messages(prompt)
    if prompt[-1]["role"] != "user":
        raise ValueError(f"an answer follows a turn of the user, not of {prompt[-1]['role']!r}")
    if given and all(message["content"].strip() != given[-1]["content"].strip() for message in prompt):
        raise ValueError("the messages before the answers do not have the prompt among them")
    return prompt


def _in_no_order(group):
    """Whether this is a list of answers, and not an answer that is a list of messages."""
    return isinstance(group, list) and bool(group) and not isinstance(group[-1], dict)


def prompts_of(preferences):
    """The prompts of preferences, each once, as Conversations."""
    found = {str(p.prompt): Conversation(p.where, p.prompt, {}) for p in reversed(preferences)}
    return list(reversed(found.values()))


def _parsed(path, bad, parse):
    for where, row in read_rows(path, bad=bad):
        try:
            parsed = parse(where, row)
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{where}: {error}") from None
            bad.add(where, error)
        else:
            yield parsed


def _messages(row, answered):
    """The messages of a row: with their last answer, or up to the user's last turn."""
    field = next((name for name in PROMPTS if name in row), None)
    if field is None:
        found = ", ".join(map(repr, row)) or "nothing"
        needed = TUNED if answered else '{"messages": [...]} or {"prompt": ...}'
        raise ValueError(f"neither messages nor a prompt, but {found:.80}: {needed} is needed")
    messages = row[field]
    if field == "prompt" and isinstance(messages, str):
        if not messages.strip():
            raise ValueError("prompt is empty")
        messages = _transcript(messages)
    check_messages(messages)
    if not answered:
        return question_of(messages)
    if field == "messages":
        return messages
    if "response" not in row:
        raise ValueError(f"response is missing: {TUNED} is needed")
    return [*messages, {"role": "assistant", "content": _answer(row, "response")}]


def question_of(messages):
    """The messages up to the user's last turn: without the answer to it. ValueError: there is no such turn."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] == "user" for message in messages[:end]):
        raise ValueError("a prompt needs a turn of the user, and there is none")
    return messages[:end]


def opening_of(messages):
    """The messages before the first answer."""
    return list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))


def _answer(row, field):
    """A response: a string, or the last of messages."""
    if field not in row:
        raise ValueError(f"{field} is missing")
    return _text(row[field], field)


def _text(answer, field):
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        if answer[-1].get("role", "assistant") != "assistant":
            raise ValueError(f"{field} has to end with a turn of the assistant, not {answer[-1]['role']!r:.40}")
        answer = answer[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{field} has to be a text, and is {answer!r:.40}")
    return answer


def _transcript(prompt):
    """The messages that a prompt string spells. A string that does not begin like a transcript is one user's turn."""
    if not re.match(r"\s*Human:", prompt):
        return [{"role": "user", "content": prompt}]
    messages = []
    for speaker, text in re.findall(r"(Human|Assistant):[ ]?(.*?)(?=\n\n(?:Human|Assistant):|\Z)", prompt, re.S):
        messages.append({"role": "user" if speaker == "Human" else "assistant", "content": text.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:  # it ends where the answer has to begin
        messages.pop()
    return messages


# ------------------------------------------------------------------ ids and masks


def rendered(messages, template, tokenizer, **options):
    """chat.render for training: a Jinja template that writes today's date is told one that stays."""
    told = {} if template in TEMPLATES else {"strftime_now": TODAY.strftime}
    return render(messages, template, tokenizer, **options, **told)


def encode_conversations(conversations, template, tokenizer, length):
    """Examples of (ids, mask) pairs of at most length + 1 tokens, for `pack`: what a model is tuned on."""
    examples = Examples()
    for conversation in conversations:
        if any(m["role"] == "assistant" and not m["content"].strip() for m in conversation.messages):
            examples.leave_out(conversation.where, "with an empty answer")
            continue
        try:
            ids, mask = rendered(conversation.messages, template, tokenizer)
        except ValueError as error:
            examples.leave_out(conversation.where, MISFIT, error)
            continue
        if len(ids) > length + 1:
            examples.leave_out(conversation.where, f"too long for a length of {length} tokens")
        elif not mask[1:].any():
            examples.leave_out(conversation.where, "with no token to train", _why_untrained(template))
        else:
            examples.append((ids, mask))
    return examples


def _why_untrained(template):
    """What most checkpoints' own Jinja templates lack; "" where it is not that."""
    marked = template in TEMPLATES or re.search(r"\{%-?\s*generation\b", template)
    return "" if marked else "the Jinja template marks no answer with {% generation %}: take --template chatml"


def encode_answer(prompt, answer, template, tokenizer):
    """(ids, mask) of a prompt's messages and one answer to them, up to the token that ends it; only this answer is
    trained, not earlier ones. What a template writes behind that token is not there when an answer was sampled.

    ValueError: the template writes the prompt differently when an answer follows.
    """
    before, _ = rendered(prompt, template, tokenizer, add_generation_prompt=True)
    ids, mask = rendered([*prompt, {"role": "assistant", "content": answer}], template, tokenizer)
    if not np.array_equal(ids[: len(before)], before):
        raise ValueError(f"template {template!r:.40} writes a prompt differently when its answer follows")
    mask[: len(before)] = False
    trained = np.flatnonzero(mask)
    end = trained[-1] + 1 if trained.size else len(ids)
    return ids[:end], mask[:end]


def encode_preferences(preferences, template, tokenizer, length, ties=True):
    """Examples of Ranking, every answer of at most length + 1 tokens with its prompt. ties=False leaves out those with
    preference 0.5, for a loss that would take the first of two equally good answers for the better one."""
    examples = Examples()
    for preference in preferences:
        if len(set(preference.answers)) < len(preference.answers):
            examples.leave_out(preference.where, "whose chosen and rejected answers are the same")
            continue
        if not ties and preference.preference == 0.5:
            examples.leave_out(preference.where, "that are ties")
            continue
        try:
            answers = [encode_answer(preference.prompt, answer, template, tokenizer) for answer in preference.answers]
        except ValueError as error:
            examples.leave_out(preference.where, MISFIT, error)
            continue
        if max(len(ids) for ids, _ in answers) > length + 1:
            examples.leave_out(preference.where, f"longer than {length + 1} tokens")
        elif not all(mask.any() for _, mask in answers):
            examples.leave_out(preference.where, "with no token to train", _why_untrained(template))
        else:
            examples.append(Ranking(answers, preference.margin, preference.preference, ranks=preference.ranks))
    return examples


def pairs(rankings):
    """Every ranking as its pairs, K (K - 1) / 2 of K answers in order, better answer first, in a list of Rankings."""
    return [r._replace(answers=[r.answers[i], r.answers[j]], ranks=None) for r in rankings for i, j in r.compared()]


def encode_prompts(prompts, template, tokenizer, length):
    """Examples of (ids, Conversation), the ids ending with what stands before the answer to the user's last turn; at
    most `length` tokens."""
    examples = Examples()
    for prompt in prompts:
        try:
            ids, _ = rendered(question_of(prompt.messages), template, tokenizer, add_generation_prompt=True)
        except ValueError as error:
            examples.leave_out(prompt.where, MISFIT, error)
            continue
        if len(ids) > length:
            examples.leave_out(prompt.where, f"longer than {length} tokens")
        else:
            examples.append((ids, prompt))
    return examples
