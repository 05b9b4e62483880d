"""minillm.harness: the numbers that lm-evaluation-harness gets are those of each sequence alone, and the tokens are
those that the model was trained on. What needs lm_eval itself is skipped where it is not installed."""

import importlib.util
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minillm import harness
from minillm.autograd import no_grad
from minillm.chat import TEMPLATES, render, stop_ids
from minillm.data import atlas
from minillm.generate import generate
from minillm.harness import (
    Ask,
    MinillmLM,
    before_any,
    chat_text,
    complete,
    encode,
    encode_pair,
    read_generation_kwargs,
    rolling_windows,
    score,
)
from minillm.model import Config, build
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers.common import save_model

ROOT = Path(__file__).parents[1]
TOKENIZER = Tokenizer.train(["user assistant Hello there, who is it? It is me."] * 9, SMALLEST_VOCABULARY + 30)
V, CONTEXT, PREFIX = TOKENIZER.vocab_size, 24, TOKENIZER.bos_id
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def sharp(dtype=np.float64, seed=1, **options):
    """A model whose distributions are far from uniform."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    model = build(Config(vocab_size=V, **(sizes | options)), dtype=dtype)
    model.flat += 0.5 * np.random.default_rng(seed).standard_normal(model.flat.size)
    return model


MODEL = sharp()


def direct(context, continuation, model=MODEL):
    """(log-probability of each token of the continuation, whether each is the likeliest), from all logits of the one
    sequence and nothing else."""
    ids = [*context, *continuation]
    with no_grad():
        logits = model(np.array([ids[:-1]])).data[0]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    logp, n = logp[-len(continuation) :], np.arange(len(continuation))
    return logp[n, continuation], logp.argmax(-1) == continuation


def some_ids(rng, least, most):
    return rng.integers(V, size=rng.integers(least, most + 1)).tolist()


def ragged_pairs(count=23):
    """Pairs of all sizes that the context has room for; every third continuation is what the model says itself."""
    rng, pairs = np.random.default_rng(3), []
    for n in range(count):
        context = some_ids(rng, 1, 12)
        continuation = some_ids(rng, 1, 12)
        if n % 3 == 0:
            said = generate(MODEL, [context], max_new_tokens=len(continuation), temperature=0.0)
            continuation = said[0].ids.tolist()
        pairs.append((context, continuation))
    return pairs


# ------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("together", [1, 4, 100])
def test_scores_are_those_of_each_sequence_alone(together):
    pairs, done = ragged_pairs(), []
    found = score(MODEL, pairs, TOKENIZER.pad_id, together=together, progress=done.append)
    expected = [direct(*pair) for pair in pairs]
    np.testing.assert_allclose([s.logprob for s in found], [logp.sum() for logp, _ in expected], rtol=1e-10)
    assert [s.greedy for s in found] == [bool(right.all()) for _, right in expected]
    assert {s.greedy for s in found} == {True, False} and sum(done) == len(pairs)
    assert all(type(s.logprob) is float and type(s.greedy) is bool for s in found)


def test_one_other_token_anywhere_is_not_greedy():
    said = generate(MODEL, [[5, 6]], max_new_tokens=4, temperature=0.0)[0].ids.tolist()
    others = [[*said[:n], (said[n] + 1) % V, *said[n + 1 :]] for n in range(4)]
    found = score(MODEL, [([5, 6], ids) for ids in [said, *others, said[:2]]], TOKENIZER.pad_id)
    assert [s.greedy for s in found] == [True, False, False, False, False, True]


@pytest.mark.parametrize("length", [CONTEXT, 9])
def test_a_long_context_loses_its_left_end_and_the_continuation_nothing(length):
    rng = np.random.default_rng(5)
    pairs = [
        (some_ids(rng, size, size), some_ids(rng, n, n)) for size, n in ((40, 3), (40, length), (length, 1), (2, 2))
    ]
    with pytest.warns(UserWarning, match=f"2 of 4 contexts lose their left end to fit into {length} tokens"):
        found = score(MODEL, pairs, TOKENIZER.pad_id, length)
    for (context, continuation), scored in zip(pairs, found, strict=True):
        kept = context[-(length + 1 - len(continuation)) :]
        assert scored.logprob == pytest.approx(direct(kept, continuation)[0].sum(), rel=1e-10)
    longer = direct(pairs[0][0][-(length + 1 - 3) + 1 :], pairs[0][1])[0].sum()
    assert abs(longer - found[0].logprob) > 1e-3  # one token less would show


def test_learned_positions_are_counted_from_each_sequence():
    model = sharp(architecture="gpt2")
    pairs = ragged_pairs(9)
    found = score(model, pairs, TOKENIZER.pad_id, together=9)
    expected = [direct(*pair, model)[0].sum() for pair in pairs]
    np.testing.assert_allclose([s.logprob for s in found], expected, rtol=1e-10)


def test_many_tokens_are_scored_in_parts(monkeypatch):
    whole = score(MODEL, ragged_pairs(), TOKENIZER.pad_id)
    monkeypatch.setattr(harness, "LOGITS", 7)
    parts = score(MODEL, ragged_pairs(), TOKENIZER.pad_id)
    np.testing.assert_allclose([s.logprob for s in parts], [s.logprob for s in whole], rtol=1e-12)
    assert [s.greedy for s in parts] == [s.greedy for s in whole]


@pytest.mark.parametrize(
    "pair, message",
    [
        (([], [1]), "request 0 has no context"),
        (([1], []), "request 0 has no continuation"),
        (([1], [2] * 25), "request 0: a continuation of 25 tokens, and the context is 24"),
    ],
)
def test_what_can_not_be_scored_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        score(MODEL, [pair], TOKENIZER.pad_id)


def test_nothing_has_no_scores():
    assert score(MODEL, [], TOKENIZER.pad_id) == []


# ------------------------------------------------------------------ rolling windows


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 15, 16])
def test_windows_score_every_token_once_and_read_no_more_than_the_context(count, length):
    ids = [100 + n for n in range(count)]
    windows = rolling_windows(ids, 7, length)
    assert list(itertools.chain.from_iterable(continuation for _, continuation in windows)) == ids
    whole = [7, *ids]
    for context, continuation in windows:
        end = whole.index(continuation[0])
        assert context and context == whole[end - len(context) : end]
        assert len(context) + len(continuation) - 1 == min(length, count)  # full, unless the text is shorter


def test_windows_of_a_text_add_up_to_its_log_probability():
    rng = np.random.default_rng(6)
    short, long = some_ids(rng, 20, 20), some_ids(rng, 61, 61)
    found = score(MODEL, rolling_windows(short, PREFIX, CONTEXT), TOKENIZER.pad_id)
    assert sum(s.logprob for s in found) == pytest.approx(direct([PREFIX], short)[0].sum(), rel=1e-10)
    found = score(MODEL, rolling_windows(long, PREFIX, CONTEXT), TOKENIZER.pad_id)
    expected = [
        direct([PREFIX], long[:24])[0].sum(),
        direct([long[23]], long[24:48])[0].sum(),
        direct(long[36:48], long[48:])[0].sum(),
    ]
    np.testing.assert_allclose([s.logprob for s in found], expected, rtol=1e-10)


# ------------------------------------------------------------------ text to ids


@pytest.mark.parametrize(
    "context, continuation, border",
    [
        ("Hello", " there", "Hello"),
        ("Hello ", "there", "Hello"),  # the blank belongs to the word
        ("who is it?\n\n ", "It is", "who is it?"),
        ("Hello there, ", " who", "Hello there,"),
    ],
)
def test_context_and_continuation_are_encoded_as_one_text(context, continuation, border):
    before, after = encode_pair(TOKENIZER, context, continuation, PREFIX)
    assert before == TOKENIZER.encode(border).tolist()
    assert before + after == TOKENIZER.encode(context + continuation).tolist()
    assert TOKENIZER.decode(after) == (context + continuation)[len(border) :]


def test_a_blank_before_a_word_is_not_the_blank_alone():
    before, after = encode_pair(TOKENIZER, "Hello ", "there", PREFIX)
    assert before + after != TOKENIZER.encode("Hello ").tolist() + TOKENIZER.encode("there").tolist()


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_an_empty_context_is_the_prefix(context):
    assert encode_pair(TOKENIZER, context, " there", PREFIX) == (
        [PREFIX],
        TOKENIZER.encode(context + " there").tolist(),
    )


def test_a_token_over_the_border_belongs_to_the_continuation():
    there = TOKENIZER.encode(" there").tolist()
    assert len(there) == 1  # one token, so nothing is left of the context
    assert encode_pair(TOKENIZER, " the", "re", PREFIX) == ([PREFIX], there)
    before, after = encode_pair(TOKENIZER, "Hello the", "re", PREFIX)
    assert after and before + after == TOKENIZER.encode("Hello there").tolist()


def test_the_begin_token_comes_once():
    ids = TOKENIZER.encode("Hello there").tolist()
    assert encode_pair(TOKENIZER, "Hello", " there", PREFIX, (PREFIX,)) == ([PREFIX, *ids[:-1]], ids[-1:])
    assert encode_pair(TOKENIZER, "", " there", PREFIX, (PREFIX,))[0] == [PREFIX]
    chat = chat_text([{"role": "user", "content": "Hello"}], "chatml", TOKENIZER)
    before, _ = encode_pair(TOKENIZER, chat, "Hi", PREFIX, (PREFIX,))
    assert before.count(PREFIX) == 1 and before[0] == PREFIX


def test_a_continuation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a continuation is empty"):
        encode_pair(TOKENIZER, "", "", PREFIX)


CHAT = [
    {"role": "user", "content": "Hello there, </s><|im_end|> who is it? "},
    {"role": "assistant", "content": "It is me."},
    {"role": "user", "content": " who\n"},
]
JINJA = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


@pytest.mark.parametrize("template", [*TEMPLATES, JINJA])
def test_a_chat_has_the_tokens_that_the_model_was_trained_on(template):
    expected = render(CHAT, template, TOKENIZER, add_generation_prompt=True)[0].tolist()
    text = chat_text(CHAT, template, TOKENIZER)
    assert encode(TOKENIZER, text) == expected
    assert encode_pair(TOKENIZER, text, "It is", PREFIX) == (expected, TOKENIZER.encode("It is").tolist())
    begun = chat_text([*CHAT, {"role": "assistant", "content": "It is"}], template, TOKENIZER, False)
    assert encode(TOKENIZER, begun) == expected + TOKENIZER.encode("It is").tolist()


@pytest.mark.parametrize("text", ["</s>", "a <|im_end|> b", "\ufdd0nothing\ufdd1", "\ufdd0"])
def test_text_is_no_control_token(text):
    assert encode(TOKENIZER, text) == TOKENIZER.encode(text).tolist()


# ------------------------------------------------------------------ generation


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, Ask((), 256, {"temperature": 0.0})),
        ({"until": "\n", "max_gen_toks": 3}, Ask(("\n",), 3, {"temperature": 0.0})),
        ({"until": ["a", "", "b"], "do_sample": False, "temperature": 0.7}, Ask(("a", "b"), 256, {"temperature": 0.0})),
        ({"temperature": 0.7, "top_p": 0.9}, Ask((), 256, {"temperature": 0.7, "top_p": 0.9})),
        ({"temperature": 0, "do_sample": None}, Ask((), 256, {"temperature": 0.0})),
        ({"do_sample": True, "top_k": 5}, Ask((), 256, {"top_k": 5})),
        ({"max_new_tokens": 4, "max_tokens": 9, "until": None}, Ask((), 4, {"temperature": 0.0})),
    ],
)
def test_generation_kwargs_are_read(kwargs, expected):
    assert read_generation_kwargs(kwargs) == expected


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_beams": 4}, "unknown 'num_beams': there are until, do_sample, max_gen_toks"),
        ({"max_gen_toks": 0}, "from 1 on, not 0"),
        ({"max_gen_toks": "many"}, "from 1 on, not 'many'"),
        ({"until": [3]}, r"until has to be strings, and is \[3\]"),
    ],
)
def test_generation_kwargs_that_mean_nothing_here_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        read_generation_kwargs(kwargs)


@pytest.mark.parametrize(
    "text, until, expected",
    [("one. two\n", (".", "\n"), "one"), ("one\ntwo.", (".", "\n"), "one"), ("one", (".",), "one"), ("one", (), "one")],
)
def test_a_text_ends_before_the_first_stop_string(text, until, expected):
    assert before_any(text, until) == expected


def complete_all(prompts, ask, together, stop=(TOKENIZER.eos_id,), length=None):
    seeds = [(9, n) for n in range(len(prompts))]
    return complete(MODEL, TOKENIZER, prompts, ask, stop, seeds, length, together)


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_texts_are_those_of_each_prompt_alone(filters):
    rng = np.random.default_rng(8)
    prompts = [some_ids(rng, 1, 14) for _ in range(11)]
    free = complete_all(prompts, Ask((), 10, filters), together=1)
    for text, n in zip(free, range(len(prompts)), strict=True):
        (alone,) = generate(
            MODEL, [prompts[n]], max_new_tokens=10, stop_tokens=[TOKENIZER.eos_id], seed=[(9, n)], **filters
        )
        assert text == TOKENIZER.decode(alone.ids, skip_special=True)
    assert complete_all(prompts, Ask((), 10, filters), together=4) == free
    letters = "".join(free)  # a half character is U+FFFD for a moment, and no stop string
    until = (next(c for c in letters if c.isascii()), next(c for c in reversed(letters) if c.isascii()))
    stopped = complete_all(prompts, Ask(until, 10, filters), together=4)
    assert stopped == [before_any(text, until) for text in free] != free


def test_the_token_that_ends_an_answer_is_not_in_it():
    (said,) = generate(MODEL, [[5, 6]], max_new_tokens=6, temperature=0.0)
    stop = next(int(token) for token in said.ids[1:] if token not in said.ids[:1])
    kept = said.ids[: said.ids.tolist().index(stop)]
    control = {int(i) for i in TOKENIZER.special_tokens.values()}
    (text,) = complete_all([[5, 6]], Ask((), 6, {"temperature": 0.0}), 1, stop=[stop])
    expected = TOKENIZER.decode(kept, skip_special=True)
    assert text == expected + ("" if stop in control else TOKENIZER.decode([stop]))


def test_a_long_prompt_keeps_its_right_end():
    prompt = some_ids(np.random.default_rng(2), 50, 50)
    ask = Ask((), 6, {"temperature": 0.0})
    with pytest.warns(UserWarning, match="1 of 1 contexts lose their left end to fit into 18 tokens"):
        found = complete_all([prompt], ask, 1)
    assert found == complete_all([prompt[-18:]], ask, 1)
    with pytest.raises(ValueError, match="24 new tokens leave no room for a prompt in a context of 24"):
        complete_all([prompt], Ask((), 24, {}), 1)


# ------------------------------------------------------------------ without the harness


class Absent:
    """Finds that lm_eval is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_what_is_missing_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r'it comes with: pip install "minillm-train\[eval\]"'):
        MinillmLM(path="anywhere")
    with pytest.raises(SystemExit, match=r"^minillm.harness: lm_eval is not installed; it comes with"):
        harness.main()


# ------------------------------------------------------------------ tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A function that writes the tasks of scripts/atlas_task.py about some facts, and returns their folder."""
    root = tmp_path_factory.mktemp("tasks")
    questions = atlas.questions(0, "heldout", atlas.facts(most=400))
    atlas.write_lines(root / "heldout.jsonl", (question.row() for question in questions))

    def write(name, *options):
        arguments = ["atlas_task.py", "--questions", root / "heldout.jsonl", "--out", root / name, *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, arguments)))
            runpy.run_path(str(ROOT / "scripts/atlas_task.py"), run_name="__main__")
        return root / name

    return write


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_of_the_tasks_has_one_right_option(tasks):
    found = rows(tasks("all", "--rows", 1000) / "facts.jsonl")
    facts = {fact.answer: fact for fact in atlas.facts()}
    assert len(found) > 20 and len({row["statement"] for row in found}) == len(found)
    for row in found:
        assert row["names"][row["label"]] == row["name"] and len(set(row["names"])) == 4
        assert len({facts[name].relation for name in row["names"]} & {facts[row["name"]].relation}) == 1
        right = [f for f in atlas.facts() if row["statement"] in atlas.clozes(f) and f.answer in row["names"]]
        assert {fact.answer for fact in right} == {row["name"]}
        assert row["answers"][row["label"]].lower() == f"{row['name'].lower()}."
    assert {row["label"] for row in found} == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_tasks(tasks):
    one, two, other = tasks("one"), tasks("two"), tasks("other", "--seed", 1, "--rows", 5)
    for name in ("facts.jsonl", "pages.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes() != (other / name).read_bytes()
    assert len(rows(other / "facts.jsonl")) == len(rows(other / "pages.jsonl")) == 5


# ------------------------------------------------------------------ with the harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_model(root / "sft", sharp(np.float32), TOKENIZER, "llama3")
    save_model(root / "reward", sharp(np.float32, head="scalar"), TOKENIZER, "llama3")
    return root


def asked(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


class Hook:
    """Keeps what it is given."""

    def __init__(self):
        self.kept = []

    def add_partial(self, *entry):
        self.kept.append(entry)


@needs_lm_eval
def test_the_harness_gets_the_numbers_of_the_functions(folder):
    lm, hook = MinillmLM(path=folder / "sft", batch_size="2", dtype="float64"), Hook()
    assert lm.model.flat.dtype == np.float64
    lm.set_cache_hook(hook)
    pairs = [("Hello", " there, who"), ("", "It is"), ("who is it? It", " is me.")]
    found = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    expected = [direct(*encode_pair(TOKENIZER, *pair, PREFIX), lm.model) for pair in pairs]
    assert found == [(pytest.approx(logp.sum(), rel=1e-10), bool(right.all())) for logp, right in expected]
    texts = ["Hello there, who is it? " * 9, "", "me"]
    sums = lm.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)
    windows = [rolling_windows(encode(TOKENIZER, text), PREFIX, CONTEXT) for text in texts]
    assert len(windows[0]) > 1
    assert sums == [pytest.approx(sum(direct(*pair, lm.model)[0].sum() for pair in some)) for some in windows]
    assert hook.kept == [
        *(("loglikelihood", pair, result) for pair, result in zip(pairs, found, strict=True)),
        *(("loglikelihood_rolling", (text,), result) for text, result in zip(texts, sums, strict=True)),
    ]


@needs_lm_eval
def test_the_harness_gets_texts_in_the_order_of_its_requests(folder):
    lm, hook = MinillmLM(path=folder / "sft", batch_size=2, add_bos_token=True), Hook()
    lm.set_cache_hook(hook)
    short, long = {"until": [" "], "max_gen_toks": 3}, {"until": [], "max_gen_toks": 5, "temperature": 1.0}
    requests = [("Hello", short), ("It is", long), ("", short), ("It is", long)]
    found = lm.generate_until(asked(*requests), disable_tqdm=True)
    for n, ((context, kwargs), text) in enumerate(zip(requests, found, strict=True)):
        ids = [PREFIX, *TOKENIZER.encode(context).tolist()]
        ask = read_generation_kwargs(kwargs)
        stop = stop_ids("llama3", TOKENIZER)
        assert [text] == complete(lm.model, TOKENIZER, [ids], ask, stop, [(0, n)])
    assert found[1] != found[3]  # the same prompt, sampled twice
    assert {(name, args[0], text) for name, args, text in hook.kept} == {
        ("generate_until", context, text) for (context, _), text in zip(requests, found, strict=True)
    }


@needs_lm_eval
def test_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count, length in itertools.product(range(1, 20), (1, 2, 5, 8)):
        ids = list(range(100, 100 + count))
        theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 7, length, 1))
        assert rolling_windows(ids, 7, length) == list(theirs)


@needs_lm_eval
def test_borders_are_those_of_the_harness():
    from lm_eval.api.model import TemplateLM

    theirs = SimpleNamespace(backend="causal", tok_encode=lambda text: TOKENIZER.encode(text).tolist())
    for pair in itertools.product(("Hello", "Hello ", "who is it?\n\n"), ("there", " there", "\nIt is me.")):
        assert encode_pair(TOKENIZER, *pair, PREFIX) == TemplateLM._encode_pair(theirs, *pair)


@needs_lm_eval
def test_the_template_is_the_folders(folder):
    lm = MinillmLM(path=folder / "sft")
    expected = render(CHAT, "llama3", TOKENIZER, add_generation_prompt=True)[0].tolist()
    assert encode(TOKENIZER, lm.apply_chat_template(CHAT)) == expected
    assert lm.chat_template(True) == lm.chat_template("llama3") == "llama3"
    with pytest.raises(ValueError, match="give --model_args template=chatml"):
        lm.chat_template("chatml")
    assert MinillmLM(path=folder / "sft", template="alpaca").chat_template(True) == "alpaca"
    assert (lm.rank, lm.world_size, lm.max_length, lm.max_gen_toks) == (0, 1, CONTEXT, CONTEXT // 2)
    assert lm.stop_tokens == stop_ids("llama3", TOKENIZER) > {TOKENIZER.eos_id}
    assert (lm.eot_token_id, lm.prefix_token_id) == (TOKENIZER.eos_id, TOKENIZER.bos_id)
    assert str(folder / "sft").replace("/", "__") == lm.tokenizer_name


@needs_lm_eval
def test_the_models_arguments_win(folder):
    make, path = MinillmLM.create_from_arg_obj, str(folder / "sft")
    given = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # the harness always gives these
    assert make({"path": path}, given).batch_size == 1
    assert make({"path": path, "batch_size": 5}, given).batch_size == 5
    assert make({"path": path}, given | {"batch_size": "auto"}).batch_size == harness.TOGETHER
    assert make({"path": path}, given | {"batch_size": "auto:4", "max_batch_size": 3}).batch_size == 3
    assert MinillmLM.create_from_arg_string(f"path={path},max_length=8", given).max_length == 8


@needs_lm_eval
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "model_args needs path=FOLDER"),
        ({"path": "nowhere"}, "nowhere: no such folder"),
        ({"path": "reward"}, "reward is a reward model, and a language model is needed"),
        ({"path": "sft", "pretrained": "x"}, "unknown 'pretrained': there are path, batch_size, max_length"),
        ({"path": "sft", "max_length": 25}, "max_length has to be a whole number from 1 to 24, and is 25"),
        ({"path": "sft", "batch_size": "many"}, "batch_size has to be a whole number from 1 on, and is many"),
        ({"path": "sft", "dtype": "int8"}, "dtype has to be float32 or float64, and is int8"),
        ({"path": "sft", "add_bos_token": "yes"}, "add_bos_token has to be True or False, and is yes"),
        ({"path": "sft", "template": "chatlm"}, "perhaps you meant chatml"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_told(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        MinillmLM(**arguments)


@needs_lm_eval
def test_the_command_line_of_the_harness_knows_the_model(folder, tasks, tmp_path):
    task = tasks("short", "--rows", 20)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "minillm.harness", "run", "--model", "minillm", "--include_path", task]

    def run(*options):
        return subprocess.run(
            [*map(str, [*command, *options])], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
        )

    done = run("--model_args", f"path={folder / 'sft'}", "--tasks", "atlas_cloze", "--output_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["atlas_cloze"]
    lm, right = MinillmLM(path=folder / "sft", dtype="float64"), 0
    for row in rows(task / "facts.jsonl"):
        pairs = [encode_pair(TOKENIZER, row["statement"], f" {name}", PREFIX) for name in row["names"]]
        right += int(
            np.argmax([direct(c[-(CONTEXT + 1 - len(t)) :], t, lm.model)[0].sum() for c, t in pairs]) == row["label"]
        )
    assert next(value for name, value in found.items() if name.startswith("acc,")) == pytest.approx(right / 20)
    wrong = run("--model_args", "path=nowhere", "--tasks", "atlas_cloze")
    assert wrong.returncode == 1 and wrong.stderr.splitlines()[-1] == "minillm.harness: nowhere: no such folder"
