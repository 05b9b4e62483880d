"""
What a model is worth, in numbers. The same functions serve the trainers' evaluations, the pipeline's table and
scripts/evaluate.py.

    text      evaluate_tokens: loss, perplexity, bits per byte
    memory    recalled, held_facts: which facts of the atlas a model holds, asked as documents state them
    answers   answer; gold_metrics over atlas questions; text_metrics: length, repetition, distinct n-grams
    policies  divergence: KL to a reference on sampled answers; answer_logprobs: how probable a given answer is
    pairs     pair_accuracy
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from .. import functional as F
from ..autograd import no_grad
from ..chat import stop_ids
from ..data import atlas
from ..data.conversations import question_of, rendered
from ..data.readers import read_rows
from ..generate import generate
from ..kernels.device import beside, number, to_host, upcast
from .common import frozen_logprobs, pad, spellings, trained_logprobs

ROWS = 128  # answered at once


class Answer(NamedTuple):
    """What a model said."""

    text: str
    ids: np.ndarray  # with the token that ended it
    ended: bool  # by itself; else it came to the length limit


# ------------------------------------------------------------------ text


def evaluate_tokens(model, batches, byte_lengths=None):
    """{"eval_loss", "eval_perplexity", "eval_mean_token_accuracy"} over every masked target of `batches`, and with
    byte_lengths, (V,) how many bytes each token stands for, "eval_bits_per_byte". {} where there is no target."""
    nll = right = count = size = 0.0
    with no_grad():
        for batch in batches:
            hidden = model.hidden(batch.x, batch.start)
            used = beside(np.flatnonzero(batch.mask), hidden.data)
            h, y = hidden.data.reshape(-1, hidden.shape[-1])[used], batch.y[batch.mask]
            for first in range(0, len(y), 4096):
                logits = F.linear(h[first : first + 4096], model.head.data).data
                targets = y[first : first + 4096]
                nll -= float(to_host(F.token_logprobs(logits, targets).data).sum(dtype=np.float64))
                right += int((to_host(upcast(logits).argmax(-1)) == targets).sum())
            count += len(y)
            size += 0 if byte_lengths is None else int(byte_lengths[y].sum())
    if not count:
        return {}
    found = {"eval_loss": nll / count, "eval_perplexity": math.exp(min(nll / count, 700))}
    found["eval_mean_token_accuracy"] = right / count
    if size:
        found["eval_bits_per_byte"] = nll / math.log(2) / size
    return found


def byte_lengths(tokenizer):
    """(V,) int: the bytes that each token stands for; control tokens stand for none."""
    control = set(tokenizer.special_tokens.values())
    return np.array([0 if i in control else len(spelt) for i, spelt in enumerate(spellings(tokenizer))])


def document_ids(tokenizer, text):
    """`text` as the beginning of a document."""
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [begin, *tokenizer.encode(text)]


def recalled(model, tokenizer, facts, max_new_tokens=None):
    """{fact: the share of its statements that the model completes with the fact's answer, taking the likeliest token}.

    A statement, or a heading, is cut before the answer (atlas.clozes), so this asks for what the documents taught and
    not for any skill in answering. The answer has to end there, as it does in the documents: "Guinea-Bissau" is not
    Guinea. `max_new_tokens` None is enough for the longest answer and its full stop.
    """
    asked = [(fact, text) for fact in facts for text in atlas.clozes(fact)]
    prompts = [document_ids(tokenizer, text) for _, text in asked]
    if max_new_tokens is None:
        max_new_tokens = max((len(tokenizer.encode(f" {fact.answer}.")) for fact, _ in asked), default=0)
    right, total = Counter(), Counter()
    answers = answer(model, tokenizer, prompts, stops(None, tokenizer), max_new_tokens)
    for (fact, _), said in zip(asked, answers, strict=True):
        name, text = fact.answer.removesuffix("."), said.text + "\n" * said.ended
        names = f"{re.escape(name)}|{re.escape(atlas.capital(name))}"  # it may begin a line
        right[fact] += bool(re.match(rf"\s*({names})[.,;:!?\n]", text))
        total[fact] += 1
    return {fact: right[fact] / total[fact] for fact in total}


def held_facts(model, tokenizer, facts):
    """The set of those facts that the model holds: it completes most of their statements, more than half."""
    return {fact for fact, share in recalled(model, tokenizer, dict.fromkeys(facts)).items() if share > 0.5}


# ------------------------------------------------------------------ answers


def read_questions(path, most=0):
    """The atlas Questions of a JSON Lines file (dev.jsonl, heldout.jsonl); with `most`, so many spread over all of it.
    ValueError: a row is no such question, the file has none."""
    found = []
    for where, row in read_rows(path):
        try:
            found.append(atlas.Question.from_row(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for name in ("id", "text", "kind", "relation", "subject", "answer"):
            if not isinstance(value := getattr(found[-1], name), str):
                raise ValueError(f"{where}: {name} has to be a text, and is {value!r:.40}")
    if not found:
        raise ValueError(f"{path} has no questions")
    return spread(found, most)


def spread(items, most):
    """At most `most` of the items, from first to last at equal distances; 0 takes all."""
    if not most or most >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


def question_prompts(questions, template, tokenizer):
    """The ids that stand before the answer to each Question. template None: the question as the beginning of a
    document, for a model that was never taught to answer."""
    if template is None:
        return [document_ids(tokenizer, q.text) for q in questions]
    messages = [[{"role": "user", "content": q.text}] for q in questions]
    return [rendered(m, template, tokenizer, add_generation_prompt=True)[0] for m in messages]


def stops(template, tokenizer):
    """The ids that end an answer; template None: those that end a document."""
    return [tokenizer.eos_id] if template is None else stop_ids(template, tokenizer)


def answer(model, tokenizer, prompts, stop_tokens, max_new_tokens=32, temperature=0.0, seed=0):
    """An Answer to each of `prompts`, sequences of ids: the likeliest, or with a temperature a sampled one. Its text
    does not depend on the other prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of about one length need little padding
    found = [None] * len(prompts)
    for first in range(0, len(order), ROWS):
        some = order[first : first + ROWS]
        texts = generate(
            model,
            [prompts[i] for i in some],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_tokens=stop_tokens,
            seed=[(seed, i) for i in some],
        )
        for i, text in zip(some, texts, strict=True):
            found[i] = Answer(tokenizer.decode(text.ids, skip_special=True), text.ids, text.finish == "stop")
    return found


def examiner(config, template, tokenizer):
    """examine(model) -> {"eval_gold", ...}: gold_metrics of the likeliest answers to the questions that a trainer's
    `config` (QuestionSettings) names; {} where it names none."""
    if config.questions is None:
        return lambda model: {}
    questions = read_questions(config.questions, config.eval_questions)
    prompts, stop = question_prompts(questions, template, tokenizer), stops(template, tokenizer)

    def examine(model):
        texts = [a.text for a in answer(model, tokenizer, prompts, stop)]
        return {f"eval_{name}": value for name, value in gold_metrics(questions, texts).items()}

    return examine


def complete(model, tokenizer, prompts, max_new_tokens, stop_tokens):
    """[(the user's last turn, the likeliest answer)] for Examples of prompts (see encode_prompts)."""
    answers = answer(model, tokenizer, [ids for ids, _ in prompts], stop_tokens, max_new_tokens)
    questions = [question_of(prompt.messages)[-1]["content"] for _, prompt in prompts]
    return [(q, a.text) for q, a in zip(questions, answers, strict=True)]


def gold_metrics(questions, texts):
    """What the atlas knows about the answers `texts` to its `questions`: means of gold_reward and its parts.

    gold              the gold reward, over all questions
    right             right (what must be refused: refused), over all
    facts             right, over questions about facts
    answered          anything that could be an answer, over questions that may be answered
    brief             1 is no word too many; over right answers, refusals apart
    polite            over all
    refused_rightly   over what must be refused; refused_wrongly over the rest
    words             over all
    """
    rows = [(q, text, atlas.gold_reward(q, text)) for q, text in zip(questions, texts, strict=True)]
    asked = [(q, gold) for q, _, gold in rows if not q.must_refuse]
    return {
        "gold": _mean(gold.total for *_, gold in rows),
        "right": _mean(gold.right for *_, gold in rows),
        "facts": _mean(gold.right for q, gold in asked if q.kind == "fact"),
        "answered": _mean(gold.answered for _, gold in asked),
        "brief": _mean(gold.brief for _, gold in asked if gold.right),
        "polite": _mean(gold.polite for *_, gold in rows),
        "refused_rightly": _mean(gold.refused for q, _, gold in rows if q.must_refuse),
        "refused_wrongly": _mean(gold.refused for _, gold in asked),
        "words": _mean(len(text.split()) for _, text, _ in rows),
    }


def right_by(questions, texts, field):
    """{value of a Question's field, "kind" or "relation": (the share of right answers, how many questions)}."""
    found = {}
    for q, text in zip(questions, texts, strict=True):
        found.setdefault(getattr(q, field), []).append(atlas.gold_reward(q, text).right)
    return {name: (_mean(some), len(some)) for name, some in found.items()}


def text_metrics(answers):
    """How the Answers read, whatever they say.

    length        tokens, the one that ends it included
    missing_eos   the share that came to the length limit
    repetition    the share of word trigrams that occurred before in the same answer
    distinct_1, distinct_2   different words (pairs of words) among all of all answers (Li et al. 2016, section 5)
    """
    texts = [a.text.split() for a in answers]
    grams = lambda n: [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in texts]
    repeats = [1 - len(set(g)) / len(g) for g in grams(3) if g]
    distinct = {}
    for n in (1, 2):
        every = [gram for g in grams(n) for gram in g]
        distinct[f"distinct_{n}"] = len(set(every)) / len(every) if every else 0.0
    return {
        "length": _mean(len(a.ids) for a in answers),
        "missing_eos": _mean(not a.ended for a in answers),
        "repetition": _mean(repeats) if repeats else 0.0,
        **distinct,
    }


def _mean(values):
    """The mean as a float; nan of nothing."""
    values = [float(v) for v in values]
    return math.fsum(values) / len(values) if values else math.nan


# ------------------------------------------------------------------ policies and pairs


def answered_rows(prompts, answers, pad_id):
    """A Batch of prompts with their Answers, the answers in its mask."""
    sequences = [np.concatenate([ids, a.ids]) for ids, a in zip(prompts, answers, strict=True)]
    masks = [np.arange(len(s)) >= len(ids) for ids, s in zip(prompts, sequences, strict=True)]
    return pad(sequences, masks, pad_id)


def divergence(policy, reference, batch, temperature=1.0):
    """KL(policy || reference) in nats per answer, estimated on rows that the policy sampled at this temperature: the
    mean over rows of the sum over the mask of log policy - log reference. The estimate of one batch may be negative."""
    difference = frozen_logprobs(policy, batch, temperature) - frozen_logprobs(reference, batch, temperature)
    return float(np.where(batch.mask, difference, 0).sum(1).mean())


def answer_logprobs(model, encoded, pad_id, temperature=1.0):
    """(B,) log p of answers, each (ids, mask) as encode_answer makes them: the sum over the mask, the end included."""
    found = []
    for first in range(0, len(encoded), ROWS):
        with no_grad():
            logp, _ = trained_logprobs(model, encoded[first : first + ROWS], pad_id, temperature)
        found.append(to_host(logp.data).sum(1, dtype=np.float64))
    return np.concatenate(found)


def pair_accuracy(margins):
    """The share of pairs whose better answer has the higher score, ties counted half; on a GPU an array ()."""
    margins = np.asarray(margins) if isinstance(margins, list) else margins
    return number((margins > 0).mean() + 0.5 * (margins == 0).mean())
