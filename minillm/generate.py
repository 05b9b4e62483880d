"""
Sampling from a model, in batches, with a key-value cache.

Rows of unequal length are padded on the left and masked by attention's `start`. Each row draws from a random stream of
its own, one number per token, so that its text does not depend on the rows beside it (up to the rounding of its
logits). The log-probability of each token is the one it was really drawn with, after temperature and filters.
"""

import dataclasses
import warnings

import numpy as np

from minillm import functional as F
from minillm.autograd import no_grad
from minillm.kernels.device import beside, to_host, xp_of


@dataclasses.dataclass
class Generation:
    """What `generate` made of one prompt.

    ids       (n,) int: the new tokens, n >= 1, the stop token included where it ended with one
    logprobs  (n,) float64: log-probability of each under the distribution it was drawn from (0 where greedy)
    finish    "stop" (a stop token), "stop_string", or "length" (max_new_tokens, or the context is full)
    prompt    (m,) int: the prompt as the model saw it, after cutting if it was cut
    """

    ids: np.ndarray
    logprobs: np.ndarray
    finish: str
    prompt: np.ndarray


def filter_logits(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The logits (N, V) of the distribution that is sampled, in float64, where they were (host or GPU): logits /
    temperature, and -inf for what is left out.

    temperature  0 leaves only the largest logit (the lowest id where several tie)
    top_k        the k largest; of equal ones the lower ids, so that exactly k remain
    top_p        the smallest set, taken from the likeliest downwards (equal ones by id), whose probabilities add up to
                 at least top_p: a token stays if those before it add up to less (Holtzman et al. 2020)
    min_p        tokens at least min_p times as likely as the likeliest
    They apply in this order, each to what the ones before have left. ValueError names a value out of range.
    """
    _check(temperature, top_k, top_p, min_p)
    xp, x = xp_of(logits), logits.astype(np.float64)
    rows, (_, V) = xp.arange(len(x)), x.shape
    if temperature == 0:
        best, only = x.argmax(-1), xp.full(x.shape, -np.inf)
        only[rows, best] = x[rows, best]
        return only
    x /= temperature
    if top_k is not None or top_p is not None:
        falling = xp.sort(x, -1)[:, ::-1]
        count = xp.full(len(x), V if top_k is None else min(top_k, V))
        if top_p is not None:
            p = _softmax(falling[:, :top_k])
            count = xp.maximum((xp.cumsum(p, -1) - p < top_p).sum(-1), 1)
        least = falling[rows, count - 1][:, None]  # the smallest that stays; of those equal to it some of the first
        more, equal = x > least, x == least
        room = (count - more.sum(-1))[:, None]
        x = xp.where(more | (equal & (xp.cumsum(equal, -1) <= room)), x, -np.inf)
    if min_p is not None and min_p > 0:
        x = xp.where(x >= x.max(-1, keepdims=True) + np.log(min_p), x, -np.inf)
    return x


def _check(temperature, top_k, top_p, min_p):
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 or more, and is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, and is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], and is {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], and is {min_p}")


def _softmax(x):
    xp = xp_of(x)
    e = xp.exp(x - x.max(-1, keepdims=True))
    e /= e.sum(-1, keepdims=True)
    return e


def penalise(logits, seen, penalty):
    """Make what has occurred less likely: divide its positive logits by the penalty and multiply its negative ones
    (Keskar et al. 2019, section 4.1)."""
    xp = xp_of(logits)
    for row, ids in zip(logits, seen, strict=True):
        ids = beside(np.unique(ids), logits)
        row[ids] = xp.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)


def draw(logits, streams, **filters):
    """One token per row of logits (N, V), and its log-probability: two arrays (N,) on the host, by inverting the
    cumulative distribution of filter_logits(logits, **filters). Waits for a GPU once. ValueError where logits are not
    finite.
    """
    xp, numbers = xp_of(logits), np.array([stream.random() for stream in streams])
    if filters.get("temperature") == 0:
        picks = logits.argmax(-1)
        logprobs = 0 * logits.max(-1)  # NaN where the logits are not finite, which is told below
    else:
        p = _softmax(filter_logits(logits, **filters))
        cumulative = xp.cumsum(p, -1)
        picks = (cumulative <= beside(numbers, p)[:, None] * cumulative[:, -1:]).sum(-1)
        # the last token that has a probability, should rounding leave the sum below the number drawn
        picks = xp.minimum(picks, p.shape[-1] - 1 - (p[:, ::-1] > 0).argmax(-1))
        logprobs = xp.log(p[xp.arange(len(p)), picks])
    picks, logprobs = to_host(xp.stack([picks.astype(np.float64), logprobs]))
    if np.isnan(logprobs).any():
        raise ValueError("the model's logits are not finite: its weights are damaged, or training has gone astray")
    return picks.astype(np.int64), logprobs


def next_probabilities(model, prompt, **filters):
    """(V,) float64: the distribution from which `generate` draws the token behind `prompt`, a sequence of ids.

    filters: as for filter_logits. ValueError: an empty prompt, one that fills the context, an id that there is not.
    """
    context = model.config.max_position_embeddings
    row = _Row(0, _checked_prompt(0, prompt, model.config.vocab_size, context, cut=False), None)
    with no_grad():
        return to_host(_softmax(filter_logits(_Batch(model, [row], 0, cached=False).next_logits(), **filters))[0])


def generate(
    model,
    prompts,
    *,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    stop_tokens=(),
    stop_strings=(),
    tokenizer=None,
    seed=0,
    cache=True,
    cut_prompts=False,
    on_token=None,
):
    """Continue each prompt; returns a list of Generation, one per prompt, in their order.

    prompts       sequences of token ids, of any lengths from 1 on
    temperature, top_k, top_p, min_p    see filter_logits; the penalty applies before them
    stop_tokens   ids that end a row; stop_strings: texts that do, once they occur in its decoded answer (these need the
                  tokenizer)
    seed          an int, from which each row's stream is derived by its place; or one int per row, so that a row gives
                  the same text in another batch
    cache         False computes every token from all tokens before it: slow, and the same up to rounding
    cut_prompts   a prompt that leaves no room in the context is an error; with True its left end is cut off, with a
                  warning
    on_token      called as on_token(row, id) for each token as it comes
    """
    context = model.config.max_position_embeddings
    prompts = [_checked_prompt(i, p, model.config.vocab_size, context, cut_prompts) for i, p in enumerate(prompts)]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, and is {max_new_tokens}")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be positive, and is {repetition_penalty}")
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer")
    _check(temperature, top_k, top_p, min_p)
    seeds = [(seed, i) for i in range(len(prompts))] if np.ndim(seed) == 0 else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    rows = [_Row(i, p, np.random.default_rng(s)) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))]
    batch = _Batch(model, rows, max_new_tokens, cache)
    with no_grad():
        while batch.rows:
            logits = batch.next_logits()
            if repetition_penalty != 1:
                penalise(logits, [row.all_ids() for row in batch.rows], repetition_penalty)
            streams = [row.stream for row in batch.rows]
            picks, logprobs = draw(logits, streams, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            for row, token, logprob in zip(batch.rows, picks.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
                if on_token is not None:
                    on_token(row.place, token)
                if token in stop_tokens:
                    row.finish = "stop"
                elif stop_strings and _contains(tokenizer.decode(row.ids), stop_strings):
                    row.finish = "stop_string"
                elif len(row.ids) == max_new_tokens or len(row.prompt) + len(row.ids) == context:
                    row.finish = "length"
            batch.drop_finished()
    return [Generation(np.array(r.ids), np.array(r.logprobs), r.finish, r.prompt) for r in rows]


def _contains(text, strings):
    return any(s in text for s in strings)


def _checked_prompt(i, prompt, vocab_size, context, cut):
    prompt = np.asarray(prompt, np.int64)
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"prompt {i} is empty: give at least one token, the one that begins a text")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"prompt {i}: id {prompt[(prompt < 0) | (prompt >= vocab_size)][0]} is outside [0, {vocab_size})"
        )
    if len(prompt) >= context:
        if not cut:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens and leaves no room in the context of {context}")
        # half of the context is left for the answer
        warnings.warn(
            f"prompt {i}: the first {len(prompt) - context // 2} of {len(prompt)} tokens are cut", stacklevel=3
        )
        prompt = prompt[-max(context // 2, 1) :]
    return prompt


class _Row:
    """One sequence that is being continued."""

    def __init__(self, place, prompt, stream):
        self.place, self.prompt, self.stream = place, prompt, stream
        self.ids, self.logprobs, self.finish = [], [], None

    def all_ids(self):
        return np.concatenate([self.prompt, self.ids]).astype(np.int64)


class _Batch:
    """The rows that are not finished, padded on the left to one length, and their cache."""

    def __init__(self, model, rows, max_new_tokens, cached):
        self.model, self.head, self.rows = model.without_casts(), model.head.data, list(rows)
        longest = max((len(row.prompt) for row in rows), default=0)
        self.pads = np.array([longest - len(row.prompt) for row in rows], np.int32)
        room = longest + min(max_new_tokens, model.config.max_position_embeddings)
        self.cache = model.new_cache(len(rows), room) if cached and rows else None

    def next_logits(self):
        """(rows, V) float64 for the token that comes next in each row, where the model is."""
        if self.cache is not None and self.cache.length:
            tokens = np.array([row.ids[-1:] for row in self.rows])
        else:
            tokens = np.array([np.pad(row.all_ids(), (p, 0)) for row, p in zip(self.rows, self.pads, strict=True)])
        start = np.repeat(self.pads[:, None], tokens.shape[1], 1)
        hidden = self.model.hidden(tokens, start, self.cache)
        self.head = self.head.astype(hidden.dtype, copy=False)  # once, for all tokens
        return F.linear(hidden.data[:, -1], self.head).data.astype(np.float64)

    def drop_finished(self):
        going_on = np.flatnonzero([row.finish is None for row in self.rows])
        if len(going_on) < len(self.rows):
            self.rows, self.pads = [self.rows[i] for i in going_on], self.pads[going_on]
            if self.cache is not None:
                self.cache.keep(going_on)
