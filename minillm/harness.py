"""
A model in EleutherAI's lm-evaluation-harness (`lm_eval`), in process.

    python -m minillm.harness run --model minillm --model_args path=FOLDER --tasks TASK --batch_size auto
    lm_eval.simple_evaluate(model=MinillmLM(path=FOLDER), tasks=[TASK])

The harness knows only the models in its own table, so its command line is opened from here: the same program, with one
more name in the table. It asks three things, each answered by plain functions over a model and token ids, which need no
harness:

    loglikelihood           log p(continuation | context), and whether greedy decoding would say the continuation
    loglikelihood_rolling   log p(text), in windows of the context length that score every token once
    generate_until          a continuation up to a stop string

Its conventions are kept, so that a number here is the number that the harness finds over HTTP, or with transformers:
context and continuation are encoded together, contexts lose their left end where they are too long, and no begin token
is put before a context, unless add_bos_token=True asks for it or the chat template writes it.
"""

import json
import re
import sys
import traceback
import warnings
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import functional as F
from .autograd import no_grad
from .chat import segments, stop_ids
from .extras import extra
from .generate import generate
from .hub import load_pretrained
from .kernels.device import check_device, to_host, upcast
from .trainers.common import load_tokenizer, padding_of, side_by_side, template_of

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError:  # the functions do without it, and the class says what is missing when it is used
    LM = object

TOGETHER = 64  # requests that are computed at once, where the harness is told "auto"
LOGITS = 1024  # tokens whose logits stand in memory at once
NEW_TOKENS = 256  # of a generation that names no limit

# ------------------------------------------------------------------ text to ids

# A context is a string, and our tokenizer takes no control token from a string. So a chat is written with each control
# token's name between two characters that Unicode keeps for the inside of programs, and a third one where chat.render
# cuts the text (at an answer's borders).
OPEN, CLOSE, CUT = "\ufdd0", "\ufdd1", "\ufdd2"


def marked(pieces):
    """chat.Segments as one string, from which `encode` makes the ids that chat.encode_segments does."""
    text = ""
    for (control, _), run in groupby(pieces, key=lambda piece: (piece.control, piece.trained)):
        names = [piece.text for piece in run]
        text += "".join(f"{OPEN}{name}{CLOSE}" for name in names) if control else "".join(names) + CUT
    return text


def encode(tokenizer, text):
    """The ids of a string, in a list; control tokens only where `marked` wrote them."""
    ids = []
    for part in re.split(f"({OPEN}[^{CLOSE}]*{CLOSE}|{CUT})", text):
        name = part[1:-1] if part.startswith(OPEN) else None
        if name in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[name])
        elif part not in ("", CUT):
            ids += tokenizer.encode(part).tolist()
    return ids


def chat_text(messages, template, tokenizer, add_generation_prompt=True):
    """Messages in a chat template, as `marked` text that ends where an answer begins; without add_generation_prompt
    the last message is the beginning of that answer."""
    begun = ""
    if not add_generation_prompt and messages and messages[-1].get("role") == "assistant":
        *messages, last = messages
        begun = last["content"]
    return marked(segments(messages, template, tokenizer, add_generation_prompt=True)) + begun


def encode_pair(tokenizer, context, continuation, prefix, begin=()):
    """(ids of the context, ids of the continuation), both at least one.

    They are encoded as one text and cut where the context alone would end, the blanks at its end being part of the
    continuation; a token that spans the cut belongs to the continuation. `begin`, ids, comes first where the context
    does not begin with it; an empty context is `prefix`, one id. ValueError: a continuation without tokens.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    whole, alone = encode(tokenizer, context + continuation), encode(tokenizer, context)
    cut = min(len(alone), len(whole) - 1)
    if cut < 0:
        raise ValueError("a continuation is empty: there is nothing to score")
    return with_begin(whole[:cut], begin) or [prefix], whole[cut:]


def with_begin(ids, begin):
    """`ids` behind the ids `begin`, once."""
    begin = list(begin)
    return ids if ids[: len(begin)] == begin else begin + ids


def rolling_windows(ids, prefix, length):
    """[(context, continuation)] that together score each of `ids` once, given what stands before it in its window; the
    first one follows the id `prefix`. A window is of `length` inputs; the last one reaches back until it is full."""
    whole, found = [prefix, *ids], []
    for first in range(0, len(ids), length):
        end = min(first + length, len(ids))
        found.append((whole[max(0, end - length) : first + 1], whole[first + 1 : end + 1]))
    return found


# ------------------------------------------------------------------ ids to numbers


class Score(NamedTuple):
    """What the harness wants to know of a continuation."""

    logprob: float  # nats, the sum over its tokens
    greedy: bool  # each of its tokens is the likeliest one (the lowest id where several tie)


def score(model, pairs, pad_id, length=None, together=TOGETHER, progress=lambda count: None):
    """A Score for each (context, continuation) of `pairs`, two lists of ids.

    length     inputs that the model reads (its context); a longer context loses its left end, with a warning
    together   pairs computed at once, of about one length and side by side in rows: hardly any padding
    progress   called with the number of pairs that were done

    ValueError: a context or continuation without a token, a continuation longer than `length`.
    """
    length = length or model.config.max_position_embeddings
    for n, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"request {n} has no {'continuation' if context else 'context'}")
        if len(continuation) > length:
            raise ValueError(f"request {n}: a continuation of {len(continuation)} tokens, and the context is {length}")
    size = lambda n: len(pairs[n][0]) + len(pairs[n][1])
    _told_of_cuts(sum(size(n) > length + 1 for n in range(len(pairs))), len(pairs), length)
    order, found = sorted(range(len(pairs)), key=size, reverse=True), [None] * len(pairs)
    for first in range(0, len(order), together):
        some = order[first : first + together]
        sequences = [(pairs[n][0] + pairs[n][1])[-length - 1 :] for n in some]
        for n, scored in zip(some, _score(model, sequences, [len(pairs[n][1]) for n in some], pad_id), strict=True):
            found[n] = scored
        progress(len(some))
    return found


def _score(model, sequences, counts, pad_id):
    """Scores of the last `counts` ids of each sequence, computed at once."""
    tokens, start, row, column = side_by_side(sequences, pad_id)
    ends = column + np.array([len(ids) for ids in sequences])
    rows = np.repeat(row, counts)
    targets = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    expected, logp, right = tokens[rows, targets], [], []
    with no_grad():
        hidden = model.hidden(tokens[:, :-1], start[:, :-1])[rows, targets - 1].data
        for first in range(0, len(rows), LOGITS):
            some = expected[first : first + LOGITS]
            logits = F.linear(hidden[first : first + LOGITS], model.head.data).data
            logp.append(to_host(F.token_logprobs(logits, some).data).astype(np.float64))
            right.append(to_host(upcast(logits).argmax(-1)) == some)
    borders = np.cumsum(counts)[:-1]
    parts = zip(np.split(np.concatenate(logp), borders), np.split(np.concatenate(right), borders), strict=True)
    return [Score(float(p.sum()), bool(r.all())) for p, r in parts]


def _told_of_cuts(cut, count, room):
    if cut:
        warnings.warn(f"{cut} of {count} contexts lose their left end to fit into {room} tokens", stacklevel=3)


# ------------------------------------------------------------------ ids to text


class Ask(NamedTuple):
    """How a task wants its texts generated."""

    until: tuple  # strings, of which none is in the answer
    max_new_tokens: int
    filters: dict  # for minillm.generate: temperature, top_k, top_p, min_p, repetition_penalty


LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one that is given
FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_kwargs(kwargs, default_tokens=NEW_TOKENS):
    """The Ask in a task's generation_kwargs: until, do_sample, a limit (LIMITS) and FILTERS. Greedy where do_sample is
    False, or missing with no temperature above 0. ValueError: something else."""
    known = ("until", "do_sample", *LIMITS, *FILTERS)
    if unknown := [name for name in kwargs if name not in known]:
        raise ValueError(f"generation_kwargs has an unknown {unknown[0]!r}: there are {', '.join(known)}")
    given = {name: value for name, value in kwargs.items() if value is not None}
    until = given.get("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(text, str) for text in until):
        raise ValueError(f"generation_kwargs: until has to be strings, and is {list(until)}")
    limit = next((given[name] for name in LIMITS if name in given), default_tokens)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"generation_kwargs: the limit of new tokens has to be a whole number from 1 on, not {limit!r}"
        )
    filters = {name: given[name] for name in FILTERS if name in given}
    if not given.get("do_sample", filters.get("temperature", 0) > 0):
        filters["temperature"] = 0.0
    return Ask(tuple(filter(None, until)), limit, filters)


def complete(
    model, tokenizer, prompts, ask, stop_tokens, seeds, length=None, together=TOGETHER, progress=lambda n: None
):
    """The text that follows each of `prompts`, lists of ids, as the Ask wants it; seeds: one for each.

    A prompt that leaves no room for the new tokens in `length` (the model's context) loses its left end, with a
    warning. ValueError: no room for any prompt, a filter out of range.
    """
    length = length or model.config.max_position_embeddings
    room = length - ask.max_new_tokens
    if room < 1:
        raise ValueError(f"{ask.max_new_tokens} new tokens leave no room for a prompt in a context of {length}")
    _told_of_cuts(sum(len(prompt) > room for prompt in prompts), len(prompts), room)
    order, found = sorted(range(len(prompts)), key=lambda n: len(prompts[n]), reverse=True), [None] * len(prompts)
    for first in range(0, len(order), together):
        some = order[first : first + together]
        texts = generate(
            model,
            [prompts[n][-room:] for n in some],
            max_new_tokens=ask.max_new_tokens,
            stop_tokens=stop_tokens,
            stop_strings=ask.until,
            tokenizer=tokenizer,
            seed=[seeds[n] for n in some],
            **ask.filters,
        )
        for n, text in zip(some, texts, strict=True):
            found[n] = before_any(tokenizer.decode(text.ids, skip_special=True), ask.until)
        progress(len(some))
    return found


def before_any(text, until):
    """`text` up to the first of the strings that occurs in it."""
    return text[: min((at for string in until if (at := text.find(string)) >= 0), default=len(text))]


# ------------------------------------------------------------------ the harness


class MinillmLM(LM):
    """A model folder, for lm_eval. The arguments are those of --model_args.

    path            the folder: config.json, *.safetensors, tokenizer.json
    batch_size      requests computed at once, or "auto"; the texts and numbers do not depend on it (up to rounding)
    max_length      tokens that the model reads at once; none: its context
    dtype           float32 or float64
    template        chatml, llama2, llama3, alpaca, or a Jinja file, for --apply_chat_template; none: the folder's own
    add_bos_token   True puts the begin token before a context, as the documents of pretraining have it
    seed            of sampled texts; one for each request is derived from it

    device          cuda: the GPU, by CuPy. Anything else is the processor, cuda:0, too, which is what the harness
                    gives where nobody has said anything
    max_batch_size  bounds "auto"; the harness always gives it

    ValueError: a folder that is no language model, an argument that there is not, one out of range. Errors of the
    device as in kernels.device.check_device.
    """

    def __init__(
        self,
        path=None,
        batch_size=1,
        max_length=None,
        dtype="float32",
        template="",
        add_bos_token=False,
        seed=0,
        max_batch_size=None,
        device=None,
        **unknown,
    ):
        extra("lm_eval", "eval")
        super().__init__()
        if unknown:
            known = "path, batch_size, max_length, dtype, device, template, add_bos_token, seed"
            raise ValueError(f"model_args has an unknown {next(iter(unknown))!r}: there are {known}")
        if path is None:
            raise ValueError("model_args needs path=FOLDER, the folder of a language model")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"model_args: dtype has to be float32 or float64, and is {dtype}")
        if not isinstance(add_bos_token, bool):
            raise ValueError(f"model_args: add_bos_token has to be True or False, and is {add_bos_token}")
        device = "cuda" if device == "cuda" else "cpu"
        check_device(device)
        self.path = Path(str(path))
        self.tokenizer = load_tokenizer(self.path)
        self.template = template_of(self.path, str(template))
        self.model = load_pretrained(self.path, np.dtype(dtype)).to(device)
        if self.model.config.head != "lm":
            raise ValueError(f"{self.path} is a reward model, and a language model is needed")
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else _whole("max_length", max_length, most=context)
        self.batch_size = TOGETHER if str(batch_size).startswith("auto") else _whole("batch_size", batch_size)
        if str(batch_size).startswith("auto") and max_batch_size is not None:
            self.batch_size = min(self.batch_size, _whole("max_batch_size", max_batch_size))
        self.seed = _whole("seed", seed, least=0)
        self.begin = (self.prefix_token_id,) if add_bos_token else ()
        self.stop_tokens = {self.eot_token_id}
        with suppress(ValueError):  # the tokenizer lacks the template's control tokens: no answer ends with them
            self.stop_tokens |= stop_ids(self.template, self.tokenizer)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """From --model_args, which win over what the command line gives to every model."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | arg_dict))

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self):
        """What stands before a text: the begin token, or where there is none, the end of the text before."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_gen_toks(self):
        """New tokens of a task that names no limit; a small context keeps half of it for the prompt."""
        return max(1, min(NEW_TOKENS, self.max_length // 2))

    @property
    def tokenizer_name(self):
        return str(self.path.resolve()).replace("/", "__")

    def chat_template(self, chat_template=False):
        """The template's name, or its Jinja source, for the harness's records. ValueError: another one is wanted."""
        if isinstance(chat_template, str) and chat_template != self.template:
            raise ValueError(f"--apply_chat_template takes no name here: give --model_args template={chat_template}")
        return self.template

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return chat_text(chat_history, self.template, self.tokenizer, add_generation_prompt)

    def loglikelihood(self, requests, disable_tqdm=False):
        asked = [request.args for request in requests]
        pairs = [encode_pair(self.tokenizer, *pair, self.prefix_token_id, self.begin) for pair in asked]
        with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            scores = score(self.model, pairs, self.pad_id, self.max_length, self.batch_size, bar.update)
        found = [tuple(scored) for scored in scores]
        for pair, result in zip(asked, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        texts = [request.args[0] for request in requests]
        windows = [
            rolling_windows(encode(self.tokenizer, text), self.prefix_token_id, self.max_length) for text in texts
        ]
        pairs = [pair for some in windows for pair in some]
        with tqdm(total=len(pairs), desc="Running loglikelihood_rolling windows", disable=disable_tqdm) as bar:
            scores = iter(score(self.model, pairs, self.pad_id, self.max_length, self.batch_size, bar.update))
        found = [sum(next(scores).logprob for _ in some) for some in windows]
        for text, result in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return found

    def generate_until(self, requests, disable_tqdm=False):
        asked = [request.args for request in requests]
        found = [None] * len(asked)
        alike = {}
        for n, (_, kwargs) in enumerate(asked):
            alike.setdefault(json.dumps(kwargs, sort_keys=True), []).append(n)
        with tqdm(total=len(asked), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for some in alike.values():
                ask = read_generation_kwargs(asked[some[0]][1], self.max_gen_toks)
                prompts = [with_begin(encode(self.tokenizer, asked[n][0]), self.begin) for n in some]
                texts = complete(
                    self.model,
                    self.tokenizer,
                    [prompt or [self.prefix_token_id] for prompt in prompts],
                    ask,
                    self.stop_tokens,
                    [(self.seed, n) for n in some],
                    self.max_length,
                    self.batch_size,
                    bar.update,
                )
                for n, text in zip(some, texts, strict=True):
                    found[n] = text
                    self.cache_hook.add_partial("generate_until", asked[n], text)
        return found

    @property
    def pad_id(self):
        return padding_of(self.tokenizer)


def _whole(name, value, least=1, most=None):
    """A whole number in its range; the harness gives some as text."""
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"from {least}" + (" on" if most is None else f" to {most}")
        raise ValueError(f"model_args: {name} has to be a whole number {bounds}, and is {value}")
    return number


def main():
    """lm_eval's own command line, which knows the model `minillm` beside its own ones. What is wrong with the model's
    arguments, or with a task's generation_kwargs, is told in one line."""
    try:
        command_line = extra("lm_eval.__main__", "eval")
        extra("lm_eval.models", "eval")  # the table of all others, which is made only while it is empty
        extra("lm_eval.api.registry", "eval").register_model("minillm")(MinillmLM)
        command_line.cli_evaluate()
    except (ValueError, ModuleNotFoundError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(__file__).parent):
            raise
        sys.exit(f"minillm.harness: {error}")


if __name__ == "__main__":
    main()
