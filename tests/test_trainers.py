"""What the trainers share, and the two that learn to predict the next token."""

import dataclasses
import io
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.chat import jinja_source, load_template, stop_ids
from minillm.data.conversations import Conversation, Preference, encode_conversations
from minillm.data.datasets import Batches, TokenWriter, Windows
from minillm.data.pack import Batch, pack
from minillm.generate import generate
from minillm.hub import load_pretrained
from minillm.model import Config, build
from minillm.optim import AdamW
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers import best_of_n, common, dpo, evaluation, ppo, pretrain, reward, sft
from minillm.trainers import run as run_module
from minillm.trainers.common import Settings

TOKENIZER = Tokenizer.train([], SMALLEST_VOCABULARY)
V = TOKENIZER.vocab_size


def small(head="lm", seed=0, dtype=np.float32, **sizes):
    """A model of a few thousand parameters."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    } | sizes
    return build(Config(vocab_size=V, head=head, **sizes), seed, dtype)


def model_folder(path, template=None, **options):
    common.save_model(path, small(**options), TOKENIZER, template)
    return path


def data_folder(path, sources, tokenizer=TOKENIZER, weights=None):
    """Prepared data: {source: {split: texts}}."""
    path.mkdir(parents=True)
    tokenizer.save(path)
    pieces = {"train": {}, "validation": {}}
    for source, splits in sources.items():
        for split, texts in splits.items():
            with TokenWriter(path / f"{source}.{split}", tokenizer.vocab_size) as writer:
                for text in texts:
                    writer.add([tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id])
            pieces[split][source] = writer.piece
    manifest = {"format": 1, "tokens": pieces, "weights": weights or {}}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def phrases(n, first=0):
    return [f"the cat number {i} sat on the mat." for i in range(first, first + n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(n):
    return [{"prompt": f"{i} + 1?", "response": "It is " + "so " * (i % 4) + f"{i + 1}."} for i in range(n)]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ragged(rng, rows=5, width=12, dtype=np.int32):
    """A Batch of rows with unequal masks, one of them empty."""
    tokens = rng.integers(0, V, (rows, width + 1)).astype(dtype)
    mask = rng.random((rows, width)) < np.linspace(0, 1, rows)[:, None]
    start = np.minimum(np.sort(rng.integers(0, width, (rows, width)), 1), np.arange(width)).astype(np.int32)
    return Batch(tokens, start, mask)


# ------------------------------------------------------------------ settings

NEEDED = {
    pretrain.PretrainConfig: {"data": Path("d")},
    sft.SFTConfig: {"model": Path("m"), "data": (Path("d"),)},
    reward.RewardConfig: {"model": Path("m"), "data": (Path("d"),)},
    dpo.DPOConfig: {"model": Path("m"), "data": (Path("d"),)},
    ppo.PPOConfig: {"model": Path("m"), "reward": Path("r"), "prompts": (Path("p"),)},
}
# Anything will do for these, which are looked at when they are used.
FREE = {"lora_targets"}
WRONG = {
    "seed": -1, "batch_size": 0, "micro_batch_size": -1, "lr": 0.0, "schedule": "step", "warmup": 1.1, "lr_floor": -0.1,
    "weight_decay": -0.1, "beta1": 1.0, "beta2": -0.1, "eps": 0.0, "max_grad_norm": 0.0, "on_nan": "go on",
    "log_every": 0, "eval_every": 0, "samples": -1, "hidden_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0,
    "num_key_value_heads": -1, "intermediate_size": -1, "context": 127, "length": -1, "packing": "tight", "tokens": 0,
    "weights": {"a": 0.0}, "eval_rows": 0, "data": (), "epochs": 0.0, "replay_share": 1.0, "held_out": 1.0,
    "skip_bad": -1, "max_new_tokens": 0, "centring": -0.1, "ranking": "all", "beta": -0.1, "kind": "dpo",
    "label_smoothing": 0.5, "normalize": "max", "prompts": (), "value_init": "sft", "episodes": 0, "ppo_epochs": 0,
    "minibatch_size": -1, "temperature": 0.0, "target_kl": -1.0, "horizon": 0, "max_step_kl": 0.0, "clip": 0.0,
    "clip_value": 0.0, "gamma": 1.1, "lam": -0.1, "entropy_coefficient": -0.1, "missing_eos_penalty": -1.0,
    "reward_clip": 0.0, "reference_samples": -1, "value_lr": 0.0, "value_warmup": -1, "eval_prompts": 0,
    "flight_record": -1, "eval_questions": -1, "lora_rank": -1, "lora_alpha": 0.0,
    "quantize": "int8", "workers": 0, "resume": "yes", "overwrite": 1, "tensorboard": None, "whiten_rewards": 0,
    "keep_best": "no", "device": "gpu", "precision": "half",
    "embedding_lr": -0.1, "cuda_graph": "yes", "pooling": "max",
    "save_every": -1, "save_minutes": -0.1, "keep_last": 0, "out": "o", "model": 5, "reference": True, "reward": "r",
    "replay": 1, "template": Path("t"), "questions": "q",
}  # fmt: skip
FIELDS = [(config, field.name) for config in NEEDED for field in dataclasses.fields(config)]
EVERY_FIELD = pytest.mark.parametrize("config, name", FIELDS, ids=lambda x: getattr(x, "__name__", x))


@EVERY_FIELD
def test_every_field_is_checked(config, name):
    good = {"out": Path("o"), **NEEDED[config]}
    config(**good)
    if name in FREE:
        return
    assert name in WRONG, "a new field: check it in __post_init__, and give it a wrong value here (or list it as FREE)"
    values = [WRONG[name]]
    if next(field.type for field in dataclasses.fields(config) if field.name == name) in (int, float):
        values += [math.nan, math.inf, -math.inf, True, "3", None]
    for value in values:
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} (has to be|needs)") as caught:
            config(**good | {name: value})
        assert "\n" not in str(caught.value)


def test_the_table_of_wrong_values_names_fields_that_exist():
    assert set(WRONG) | FREE == {name for _, name in FIELDS}


def test_sizes_are_not_ignored_in_silence_where_a_model_brings_its_own(tmp_path):
    given = {"out": Path("o"), "data": Path("d"), "model": Path("m")}
    pretrain.PretrainConfig(**given)
    for name in pretrain.SIZES:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} has to be left out with --model"):
            pretrain.PretrainConfig(**given, **{name: 256})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_learning_rate_rises_and_falls_as_told(schedule, warmup):
    settings = Settings(out=Path("o"), lr=0.5, schedule=schedule, warmup=warmup, lr_floor=0.2)
    steps = 40
    rates = np.array([settings.learning_rate(step, steps) for step in range(steps)])
    rise = math.ceil(warmup * steps)
    np.testing.assert_allclose(rates[:rise], 0.5 * np.arange(1, rise + 1) / max(rise, 1))
    assert rates.max() == 0.5 and rates.min() > 0
    fall = rates[rise:]
    done = np.arange(len(fall)) / max(len(fall) - 1, 1)
    by_hand = {
        "cosine": 0.1 + 0.4 * (1 + np.cos(np.pi * done)) / 2,
        "linear": 0.5 - 0.4 * done,
        "constant": 0.5 + 0 * done,
    }
    np.testing.assert_allclose(fall, by_hand[schedule])
    assert Settings(out=Path("o")).learning_rate(0, 1) == 1e-3  # one update is all there is


# ------------------------------------------------------------------ rows


@given(st.integers(1, 9), st.integers(0, 11), st.integers(0, 99))
def test_parts_are_the_batch_in_order(rows, size, seed):
    batch = ragged(np.random.default_rng(seed), rows)
    cut = list(common.parts(batch, size))
    assert all(isinstance(part, Batch) and 1 <= len(part.mask) <= (size or rows) for part in cut)
    for whole, pieces in zip(batch, zip(*cut, strict=True), strict=True):
        assert np.array_equal(np.concatenate(pieces), whole)
    assert size or len(cut) == 1


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99))
def test_padded_rows_hold_each_sequence_and_nothing_sees_padding(lengths, seed):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(1, V, n) for n in lengths]
    masks = [rng.random(n) < 0.5 for n in lengths]
    batch = common.pad(sequences, masks, pad_id=0)
    width = max(lengths)
    assert batch.tokens.shape == (len(lengths), width) and batch.start.shape == batch.mask.shape == (
        len(lengths),
        width - 1,
    )
    for row, (ids, mask) in enumerate(zip(sequences, masks, strict=True)):
        n = len(ids)
        assert batch.tokens[row, :n].tolist() == ids.tolist() and not batch.tokens[row, n:].any()
        assert batch.mask[row, : n - 1].tolist() == mask[1:].tolist() and not batch.mask[row, n - 1 :].any()
        assert not batch.start[row, :n].any()
        assert batch.start[row, n:].tolist() == list(range(n, width - 1))  # padding sees itself alone
    assert (np.diff(batch.start, axis=1) >= 0).all()  # what attention's backward needs
    assert common.pad(sequences, masks, 0, width + 3).tokens.shape[1] == width + 3


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(0, 9))
def test_sequences_stand_side_by_side_and_see_only_themselves(lengths, seed):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(1, 50, n) for n in lengths]
    tokens, start, row, column = common.side_by_side(sequences, pad_id=0)
    width = max(lengths)
    assert tokens.shape == start.shape == (row.max() + 1, width)
    free = np.ones(tokens.shape, bool)
    for ids, r, c in zip(sequences, row, column, strict=True):
        there = slice(c, c + len(ids))
        assert free[r, there].all() and tokens[r, there].tolist() == ids.tolist()
        assert (start[r, there] == c).all()
        free[r, there] = False
    assert not tokens[free].any()
    assert (start[free] == np.nonzero(free)[1]).all()  # padding sees itself alone
    assert (np.diff(start, axis=1) >= 0).all()  # what attention's backward needs
    assert len(tokens) == 1 or sum(lengths) > len(tokens) * width / 2  # no two rows would fit in one


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=8), st.integers(0, 4))
def test_by_length_loses_nothing_and_puts_like_to_like(lengths, size):
    examples = [SimpleNamespace(answers=[(np.zeros(n), None) for n in some], place=i) for i, some in enumerate(lengths)]
    cut = list(common.by_length(examples, size))
    assert sorted(e.place for part in cut for e in part) == list(range(len(examples)))
    assert all(len(part) <= (size or len(examples)) for part in cut)
    longest = [max(len(ids) for ids, _ in e.answers) for part in cut for e in part]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.integers(0, 9), max_size=40), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(0, 5))
def test_what_is_held_out_is_chosen_by_key_and_seed(keys, share, seed):
    items = [SimpleNamespace(where=f"x:{i}", key=key, place=i) for i, key in enumerate(keys)]
    held_out = lambda some: common.hold_out(some, share, seed, key=lambda item: item.key)
    kept, held = held_out(items)
    assert sorted([*kept, *held], key=lambda i: i.place) == items
    assert [i.place for i in kept] == sorted(i.place for i in kept) and [i.place for i in held] == sorted(
        i.place for i in held
    )
    assert not {i.key for i in kept} & {i.key for i in held}
    different = len(set(keys))
    assert len({i.key for i in held}) == min(round(share * different), max(different - 1, 0))
    assert held_out(items) == (kept, held) and (not items or kept)
    assert held_out(items * 3) == (kept * 3, held)  # a file that is given three times


def test_another_seed_holds_out_others():
    items = [SimpleNamespace(where=f"x:{i}") for i in range(100)]
    first, second = (common.hold_out(items, 0.1, seed)[1] for seed in (0, 1))
    assert len(first) == len(second) == 10 and first != second


# ------------------------------------------------------------------ model folders


@pytest.mark.parametrize("tied", [True, False])
def test_another_head_on_the_same_trunk(tied):
    lm = small(seed=3, tie_word_embeddings=tied)
    scalar, again, other = (common.with_head(lm, "scalar", seed) for seed in (0, 0, 1))
    assert scalar.parameters.keys() == (lm.parameters.keys() | {"score.weight"}) - {"lm_head.weight"}
    for name in lm.parameters.keys() & scalar.parameters.keys():
        assert np.array_equal(lm.parameters[name].data, scalar.parameters[name].data)
        assert not np.shares_memory(lm.parameters[name].data, scalar.parameters[name].data)
    heads = [m.parameters["score.weight"].data for m in (scalar, again, other)]
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])
    copy = common.with_head(lm, "lm", seed=9)
    assert np.array_equal(copy.flat, lm.flat) and copy.flat is not lm.flat


def test_only_a_seed_replaces_a_head(tmp_path):
    lm, rm = model_folder(tmp_path / "lm", seed=1), model_folder(tmp_path / "rm", head="scalar", seed=1)
    assert (
        common.load_with_head(lm, "lm").config.head == "lm"
        and common.load_with_head(rm, "scalar", 0).config.head == "scalar"
    )
    with pytest.raises(
        ValueError, match=r"lm is a language model, and a reward model is needed; scripts/reward.py makes"
    ):
        common.load_with_head(lm, "scalar")
    with pytest.raises(ValueError, match="rm is a reward model, and a language model is needed"):
        common.load_with_head(rm, "lm")
    made = common.load_with_head(lm, "scalar", 5)
    assert np.array_equal(made.flat, common.with_head(small(seed=1), "scalar", 5).flat)


JINJA = "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"


@pytest.mark.parametrize("template", [None, "llama3", JINJA])
def test_a_saved_model_comes_back(template, tmp_path):
    model = small(seed=4)
    common.save_model(tmp_path / "m", model, TOKENIZER, template)
    back, tokenizer = load_pretrained(tmp_path / "m"), common.load_tokenizer(tmp_path / "m")
    assert np.array_equal(back.flat, model.flat) and back.config == model.config
    assert common.spellings(tokenizer) == common.spellings(TOKENIZER)
    assert common.template_of(tmp_path / "m") == (template or "chatml")
    assert (tmp_path / "m/chat_template.jinja").exists() == (template is not None)  # for everybody else
    assert template is None or load_template(tmp_path / "m") == jinja_source(template)


def test_the_template_that_is_given_goes_first_then_the_note_then_the_checkpoints_own(tmp_path):
    assert common.template_of(tmp_path) == "chatml"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'config' }}"}), encoding="utf-8")
    assert common.template_of(tmp_path) == "{{ 'config' }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 'jinja' }}", encoding="utf-8")
    assert common.template_of(tmp_path) == "{{ 'jinja' }}"
    (tmp_path / "minillm.json").write_text('{"template": null}', encoding="utf-8")  # pretraining knows none
    assert common.template_of(tmp_path) == "{{ 'jinja' }}"
    (tmp_path / "minillm.json").write_text('{"template": "alpaca"}', encoding="utf-8")
    assert common.template_of(tmp_path) == "alpaca"
    (tmp_path / "mine.jinja").write_text("{{ 'mine' }}", encoding="utf-8")
    assert common.template_of(tmp_path, str(tmp_path / "mine.jinja")) == "{{ 'mine' }}"
    assert common.template_of(tmp_path, "llama2") == "llama2"
    with pytest.raises(ValueError, match=r"--template 'lama2' is none of chatml, .*; perhaps you meant llama2"):
        common.template_of(tmp_path, "lama2")
    for text in ("{", "[]"):
        (tmp_path / "minillm.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"minillm.json "):
            common.template_of(tmp_path)


def test_folders_that_can_not_be_used_are_named(tmp_path):
    cases = {
        "absent": "no such folder",
        "file": "is a file, and has to be a folder",
        "empty": "has no tokenizer.json",
    }
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, reason in cases.items():
        with pytest.raises(ValueError, match=f"{name}.* {reason}"):
            common.load_tokenizer(tmp_path / name)
    Tokenizer.train([], 268, eos=None).save(tmp_path / "empty")
    with pytest.raises(ValueError, match="no end-of-text token"):
        common.load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty/tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty/tokenizer_config\.json is not a readable JSON object"):
        common.load_tokenizer(tmp_path / "empty")
    larger = Tokenizer.train(phrases(50), V + 20)
    common.save_model(tmp_path / "m", small(), TOKENIZER)
    larger.save(tmp_path / "m")
    with pytest.raises(ValueError, match=f"m: the tokenizer has {larger.vocab_size} tokens, and the model knows {V}"):
        common.load_tokenizer(tmp_path / "m")


def test_equal_sizes_are_not_equal_tokenizers(tmp_path):
    one, two = Tokenizer.train(phrases(50), V + 9), Tokenizer.train(["wholly different words are here " * 9], V + 9)
    assert one.vocab_size == two.vocab_size
    for name, tokenizer in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    common.same_tokenizer(tmp_path / "one", one, "model")
    with pytest.raises(ValueError, match="two and model have different tokenizers"):
        common.same_tokenizer(tmp_path / "two", one, "model")


@pytest.mark.parametrize("trainer", [ppo, best_of_n])
def test_a_reward_model_that_reads_otherwise_is_refused(trainer, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)]
    prompts, base = (write(tmp_path / "p.jsonl", rows),), model_folder(tmp_path / "base", "chatml")
    train_it = {
        ppo: lambda told: ppo.train(
            ppo.PPOConfig(episodes=4, batch_size=4, value_warmup=0, reference_samples=0, **told)
        ),
        best_of_n: lambda told: best_of_n.best_of_n(best_of_n.BestOfNConfig(n=2, **told)),
    }[trainer]

    def judged_by(name, tokenizer=TOKENIZER, template=None):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
        model = build(Config(vocab_size=tokenizer.vocab_size, head="scalar", **sizes))
        common.save_model(tmp_path / name, model, tokenizer, template)
        told = {"model": base, "reward": tmp_path / name, "prompts": prompts, "max_new_tokens": 4}
        return train_it({"out": tmp_path / f"out-{name}", **told})

    judged_by("alike", template="chatml")
    judged_by("silent")
    with pytest.raises(
        ValueError, match=r"other was trained on conversations in alpaca, and .*base writes them in chatml"
    ):
        judged_by("other", template="alpaca")
    assert not (tmp_path / "out-other").exists()
    judged_by("source", template=jinja_source("chatml"))  # another text, and the same ids
    larger = Tokenizer.train(phrases(50), V + 9)
    with pytest.raises(ValueError, match="different tokenizers"):
        judged_by("larger", larger)


# ------------------------------------------------------------------ losses over a model


def by_definition(model, batch):
    """(-log p of every masked target, those targets, the likeliest ids) from the logits, in float64."""
    logits = model(batch.x, batch.start).data.astype(np.float64)
    logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    nll = -np.take_along_axis(logp, batch.y[..., None].astype(np.int64), -1)[..., 0]
    return nll[batch.mask], batch.y[batch.mask], logits.argmax(-1)[batch.mask]


def gradient_of(model, loss, *arguments):
    """The gradient of loss(model, *arguments), which may have gone backward by itself, and its value."""
    model.flat_grad[...] = 0
    value = loss(model, *arguments)
    if isinstance(value, Tensor):
        value.backward()
        value = value.item()
    return model.flat_grad.copy(), value


@pytest.mark.parametrize("tied", [True, False])
def test_however_an_update_is_cut_the_gradient_is_the_same(tied):
    model, batch = small(dtype=np.float64, tie_word_embeddings=tied), ragged(np.random.default_rng(0))
    assert len(set(batch.mask.sum(1))) == 5 and not batch.mask[0].any()
    nll, *_ = by_definition(model, batch)
    whole, _ = gradient_of(model, common.next_token_loss, batch, batch.mask.sum())
    for size in (0, 1, 2, 4):
        cut, loss = gradient_of(model, common.next_token_backward, batch, size)
        np.testing.assert_allclose(loss, nll.mean(), rtol=1e-12)
        np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-12 * abs(whole).max())
    # the fault that this is about, a mean of means, is seen
    alone = [gradient_of(model, common.next_token_backward, part, 0)[0] for part in common.parts(batch, 1)]
    assert abs(sum(alone) / 4 - whole).max() > 1e-3 * abs(whole).max()


def test_what_is_not_a_target_has_no_influence_as_one():
    rng = np.random.default_rng(1)
    model, batch = small(dtype=np.float64), ragged(rng)

    def gradient(y):
        view = SimpleNamespace(x=batch.x, y=y, start=batch.start, mask=batch.mask)
        return gradient_of(model, common.next_token_loss, view, 7)[0]

    other = (batch.y + rng.integers(1, V, batch.y.shape, np.int32)) % V  # another dtype is another kernel
    before = gradient(batch.y)
    np.testing.assert_array_equal(gradient(np.where(batch.mask, batch.y, other)), before)  # bit for bit
    one = np.argwhere(batch.mask)[3]
    there = np.zeros_like(batch.mask)
    there[tuple(one)] = True
    assert not np.allclose(gradient(np.where(there, other, batch.y)), before)


def test_a_batch_without_a_target_is_no_division_by_zero():
    model, batch = small(), ragged(np.random.default_rng(2))
    empty = batch._replace(mask=np.zeros_like(batch.mask))
    with np.errstate(all="raise"):
        for size in (0, 1):
            assert common.next_token_backward(model, empty, size) == 0.0
    assert not model.flat_grad.any()
    assert evaluation.evaluate_tokens(model, [empty]) == {} == evaluation.evaluate_tokens(model, [])


def test_an_evaluation_is_the_mean_over_all_targets():
    rng = np.random.default_rng(3)
    model = small(dtype=np.float64)
    batches = [ragged(rng, rows) for rows in (5, 1, 3)]
    nll, targets, likeliest = (
        np.concatenate(some) for some in zip(*(by_definition(model, b) for b in batches), strict=True)
    )
    lengths = evaluation.byte_lengths(TOKENIZER)
    found = evaluation.evaluate_tokens(model, iter(batches), lengths)
    size = sum(len(TOKENIZER.decode([t], skip_special=True).encode("latin-1", "replace")) for t in targets)
    expected = {
        "eval_loss": nll.mean(),
        "eval_perplexity": np.exp(nll.mean()),
        "eval_mean_token_accuracy": (likeliest == targets).mean(),
        "eval_bits_per_byte": nll.sum() / np.log(2) / size,
    }
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), rtol=1e-10)
    assert evaluation.evaluate_tokens(model, batches).keys() == expected.keys() - {"eval_bits_per_byte"}


def test_bits_per_byte_counts_the_bytes_of_the_text():
    tokenizer = Tokenizer.train(phrases(60), V + 60)
    model = build(dataclasses.replace(small().config, vocab_size=tokenizer.vocab_size), 0, np.float64)
    texts = ["the cat sat on the mat. Größe 🙂 </s>", "x", "number 5"]
    documents = [[tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]
    batch = pack(documents, 48)
    nll, *_ = by_definition(model, batch)
    found = evaluation.evaluate_tokens(model, [batch], evaluation.byte_lengths(tokenizer))
    size = sum(len(text.encode()) for text in texts)
    np.testing.assert_allclose(found["eval_bits_per_byte"], nll.sum() / np.log(2) / size, rtol=1e-10)


def test_log_probabilities_and_scores_are_those_of_the_sequences_alone():
    rng = np.random.default_rng(4)
    model, scalar = small(dtype=np.float64), small(head="scalar", dtype=np.float64)
    sequences = [rng.integers(0, V, n) for n in (3, 9, 5)]
    batch = common.pad(sequences, [np.arange(len(ids)) > 1 for ids in sequences], pad_id=int(sequences[0][-1]))
    found, frozen = common.token_logprobs(model, batch, 0.7).data, common.frozen_logprobs(model, batch, 0.7, rows=2)
    np.testing.assert_allclose(frozen, found, rtol=1e-12)
    masks = [np.arange(len(ids)) % 2 == 0 for ids in sequences]  # the first token has no probability: never a target
    answers = list(zip(sequences, masks, strict=True))
    values = common.scores(scalar, answers, pad_id=int(sequences[0][-1])).data  # padding like a real last token
    packed, there = common.trained_logprobs(model, answers, int(sequences[0][-1]), 0.7)
    for row, ids in enumerate(sequences):
        logits = model(ids[None]).data[0] / 0.7
        logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
        alone = [logp[t, ids[t + 1]] for t in range(1, len(ids) - 1)]
        np.testing.assert_allclose(found[row, 1 : len(ids) - 1], alone, rtol=1e-10)
        assert not found[row, 0] and not found[row, len(ids) - 1 :].any()
        np.testing.assert_allclose(values[row], scalar(ids[None]).data[0, -1, 0], rtol=1e-10)
        trained = [logp[t - 1, ids[t]] for t in range(2, len(ids), 2)]
        np.testing.assert_allclose(packed.data[row, there[row]], trained, rtol=1e-10)
        assert there[row].sum() == len(trained) and not packed.data[row, ~there[row]].any()


# ------------------------------------------------------------------ a run


def settings(tmp_path, **options):
    made = Settings(**{"out": tmp_path / "out", "lr": 0.1, "warmup": 0.0, "schedule": "constant"} | options)
    run_module.claim(made)
    return made


def one_weight(value=1.0):
    p = Tensor(np.array([[value, -2.0]]), requires_grad=True)
    p.grad = np.zeros_like(p.data)
    return p, AdamW({"p": p}, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("steps, log_every, eval_every", [(10, 3, 4), (6, 3, 2), (1, 5, 5), (7, 1, 100), (8, 100, 3)])
def test_metrics_have_every_row_once_and_each_is_a_mean(steps, log_every, eval_every, tmp_path, capsys):
    p, optimizer = one_weight()
    losses = np.arange(1.0, steps + 1) ** 2
    with run_module.Run(settings(tmp_path, log_every=log_every, eval_every=eval_every), steps) as run:
        for step in run.steps(lambda: {"eval_loss": 2.5}, lambda: [("Q", f"after {p.data[0, 0]:.3f}")]):
            p.grad[...] = 1.0
            run.update(optimizer, {"loss": losses[step]}, tokens=10)
    rows = rows_of(tmp_path / "out/metrics.jsonl")
    logged, evaluated = ([r for r in rows if name in r] for name in ("loss", "eval_loss"))
    due = lambda every: sorted({*range(every, steps + 1, every), steps})
    assert [r["step"] for r in logged] == due(log_every) and [r["step"] for r in evaluated] == [0, *due(eval_every)]
    assert len(logged) + len(evaluated) == len(rows) and [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    for before, row in zip([0, *due(log_every)], logged, strict=False):
        assert row["loss"] == losses[before : row["step"]].mean()
        assert row["num_tokens"] == 10 * row["step"] and row["tokens_per_second"] > 0
        np.testing.assert_allclose((row["grad_norm"], row["learning_rate"]), (2**0.5, 0.1))
        assert row["skipped_updates"] == 0
    samples = rows_of(tmp_path / "out/samples.jsonl")
    assert [r["step"] for r in samples] == [0, *due(eval_every)] and samples[0]["completion"] == "after 1.000"
    assert samples[0]["prompt"] == "Q" and samples[-1]["completion"] == f"after {p.data[0, 0]:.3f}" != "after 1.000"
    told = capsys.readouterr()
    assert told.err == ""  # no bar where nobody looks
    assert [int(line.split("/")[0][5:]) for line in told.out.splitlines() if line.startswith("step ")] == [
        0,
        *due(eval_every),
    ]


def test_evaluations_are_no_part_of_the_speed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        clock[0] += seconds
        return {"eval_loss": 1.0}

    with run_module.Run(settings(tmp_path, log_every=4, eval_every=3), 4) as run:
        for _ in run.steps(lambda: takes(100.0)):
            takes(0.5)
            run.count(100)
    (row,) = [r for r in rows_of(tmp_path / "out/metrics.jsonl") if "num_tokens" in r]
    assert row["tokens_per_second"] == 200


def test_a_run_outlives_who_reads_it(tmp_path, monkeypatch):
    """`pretrain.py ... | head`: the lines go nowhere, and the run goes on."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    @run_module.in_its_folder
    def train(config):
        run_module.claim(config)
        with run_module.Run(config, 3) as run:
            for _ in run.steps(lambda: {"eval_loss": 1.0}):
                print("a line", flush=True)
                run.add({"loss": 1.5})

    config = Settings(out=tmp_path / "out", lr=0.1, warmup=0.0, schedule="constant", log_every=1)
    monkeypatch.setattr("sys.stdout", Closed())
    train(config)
    assert [r["step"] for r in rows_of(tmp_path / "out/metrics.jsonl") if "loss" in r] == [1, 2, 3]


def test_what_is_not_finite_is_null_in_the_rows(tmp_path):
    with run_module.Run(settings(tmp_path, log_every=1), 1) as run:
        for _ in run.steps(lambda: {"eval_loss": np.float32("nan"), "eval_kl": -math.inf}):
            run.add({"loss": math.inf, "n": np.int64(3)})
    found = (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in found and "Infinity" not in found
    first, row, _ = rows_of(tmp_path / "out/metrics.jsonl")
    assert first == {"step": 0, "eval_loss": None, "eval_kl": None} and row["loss"] is None and row["n"] == 3


def test_an_update_clips_steps_and_zeroes(tmp_path):
    p, optimizer = one_weight()
    alone, reference = one_weight()
    with run_module.Run(settings(tmp_path, max_grad_norm=0.5), 2) as run:
        for _ in run.steps():
            p.grad[...] = [[3.0, 4.0]]
            run.update(optimizer, {})
            assert not p.grad.any()
            alone.grad[...] = [[0.3, 0.4]]  # of norm 0.5
            reference.step(0.1)
            np.testing.assert_allclose(p.data, alone.data, rtol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_a_gradient_that_is_not_finite_stops_the_run(value, tmp_path):
    p, optimizer = one_weight()
    with (
        pytest.raises(
            run_module.NotFinite, match=r"^update 1: the gradient's norm is (nan|inf), loss is 2.0000; take a sm"
        ),
        run_module.Run(settings(tmp_path), 3) as run,
    ):
        for _ in run.steps():
            p.grad[...] = value
            run.update(optimizer, {"loss": 2.0})
    assert p.data.tolist() == [[1.0, -2.0]]


def test_an_update_that_is_left_out_changes_nothing_and_is_counted(tmp_path):
    p, optimizer = one_weight()
    with run_module.Run(settings(tmp_path, on_nan="skip", log_every=4), 4) as run:
        for step in run.steps():
            before = [x.copy() for x in (p.data, optimizer.m, optimizer.v)], optimizer.steps
            p.grad[...] = math.nan if step in (1, 2) else 1.0
            run.update(optimizer, {"loss": math.nan if step in (1, 2) else 4.0}, tokens=5)
            after = [x.copy() for x in (p.data, optimizer.m, optimizer.v)], optimizer.steps
            same = all(np.array_equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1] == after[1]
            assert same == (step in (1, 2)) and not p.grad.any()
    (row,) = rows_of(tmp_path / "out/metrics.jsonl")
    assert row["skipped_updates"] == 2 and row["loss"] == 4.0 and row["num_tokens"] == 20


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with run_module.Run(settings(tmp_path, tensorboard=True, log_every=1), 3) as run:
        for step in run.steps(lambda: {"eval_loss": 0.5, "eval_kl": math.nan}):
            run.add({"loss": step + 0.25})
    (path,) = (tmp_path / "out/tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert [(s, v) for s, tag, v in found if tag == "loss"] == [(1, 0.25), (2, 1.25), (3, 2.25)]
    assert [(s, v) for s, tag, v in found if tag == "eval_loss"] == [(0, 0.5), (3, 0.5)]
    assert not any(tag == "eval_kl" for _, tag, _ in found)


def test_an_output_is_taken_only_if_it_is_free_or_ours(tmp_path):
    out = tmp_path / "a/b"
    run_module.claim(Settings(out=out))
    assert json.loads((out / "settings.json").read_text(encoding="utf-8"))["batch_size"] == 32
    (out / "model.safetensors").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="b is not empty: take another --out, or replace it with --overwrite True"):
        run_module.claim(Settings(out=out))
    run_module.claim(Settings(out=out, overwrite=True, seed=3))
    assert sorted(p.name for p in out.iterdir()) == ["environment.json", "settings.json"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    run_module.claim(Settings(out=foreign))  # it is empty
    (foreign / "settings.json").rename(foreign / "thesis.txt")
    (foreign / "environment.json").unlink()
    with pytest.raises(ValueError, match="foreign is not empty, and was not made by a trainer"):
        run_module.claim(Settings(out=foreign, overwrite=True))
    assert (foreign / "thesis.txt").exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="file is a file, and has to be a folder"):
        run_module.claim(Settings(out=tmp_path / "file", overwrite=True))


def test_a_run_does_not_replace_what_it_starts_from(tmp_path):
    out = tmp_path / "sft"
    run_module.claim(Settings(out=out))
    for model, data in ((out, "x.jsonl"), (tmp_path / "base", out / "rows.jsonl"), (tmp_path / "sft/../sft", "x")):
        config = sft.SFTConfig(out=out, overwrite=True, model=Path(model), data=(Path(data),))
        with pytest.raises(ValueError, match=r"is in --out .*sft, which would be replaced"):
            run_module.claim(config)
    assert (out / "settings.json").exists()


# ------------------------------------------------------------------ what a person sees


def test_numbers_are_short():
    told = [0, 0.0, 3, 12345, 1.2e-3, 0.05, 2.5, -60.9488, 278.41, 12345.6, 3e9, math.nan, np.float32(0.5), np.int64(7)]
    assert [run_module.short_number(x) for x in told] == [
        "0", "0.0000", "3", "12,345", "1.2e-03", "0.0500", "2.5000", "-60.9488", "278.4", "12,345.6", "3.0e+09", "nan",
        "0.5000", "7"]  # fmt: skip


def test_lines_are_narrow_and_aligned():
    metrics = {f"eval_rewards/number_{i}": 10.0 ** (i - 5) for i in range(9)}
    first = run_module.metric_lines("step   0/1,000", metrics)
    second = run_module.metric_lines("step 100/1,000", {name: -x * 3 for name, x in metrics.items()})
    assert run_module.metric_lines("step 1/9", {"learning_rate": 0.02}) == ["step 1/9  learning_rate  2.0e-02"]
    assert len(first) > 2 and max(map(len, first + second)) <= run_module.WIDTH
    assert all(line.startswith("step") if n == 0 else line.startswith(" " * 14) for n, line in enumerate(first))
    begins = lambda lines: [[i for i in range(len(line)) if line.startswith("eval", i)] for line in lines]
    assert begins(first) == begins(second)


def test_samples_are_one_line_each_whatever_is_in_them():
    pairs = [("Hi", "a\nb \x1b[2J\u2028c"), ("long " * 20, "x" * 300), ("", "")]
    lines = list(run_module.sample_table(pairs))
    assert len(lines) == 3 and all(line.isprintable() and len(line) <= run_module.WIDTH for line in lines)
    assert {line.index("|") for line in lines} == {45}
    assert lines[0].startswith("    Hi ") and lines[0].endswith("| a b \N{REPLACEMENT CHARACTER}[2J c")
    assert lines[1].startswith("    …long long") and lines[1].endswith("x…")
    assert list(run_module.sample_table([("", "text")])) == ["    | text"]


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(run_module.tqdm, "monitor_interval", 0)
    with run_module.Run(settings(tmp_path, log_every=1), 3) as run:
        for _ in run.steps():
            time.sleep(0.12)  # the bar is drawn ten times a second
            run.add({"loss": 1.5})
            run.count(1000)
    told = capsys.readouterr().err
    last = told.replace("\n", "\r").split("\r")
    assert any("3/3" in line and "loss=1.5000" in line and "tok/s=" in line and "<" in line for line in last)


def test_a_run_without_a_bar_says_something_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "QUIET", 0.0)
    with run_module.Run(settings(tmp_path, log_every=2), 6) as run:
        for _ in run.steps():
            run.add({"loss": 1.5})
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["0/6", "2/6", "4/6", "6/6"]


# ------------------------------------------------------------------ pretraining


def test_a_run_without_a_bar_tells_each_row_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "QUIET", 0)
    with run_module.Run(settings(tmp_path, log_every=2, eval_every=4, save_minutes=0.0), 9) as run:
        for _ in run.steps(lambda: {"eval_loss": 1.0}):
            run.count(3)
            run.add({"loss": 2.0})
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert told == ["0/9", "2/9", "4/9", "6/9", "8/9", "9/9"]


def pretraining(tmp_path, data, name="out", **options):
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "length": 32,
        "samples": 1,
    } | options
    options = {"batch_size": 8, "tokens": 8 * 32 * 30, "lr": 3e-2, "eval_every": 20} | options
    return pretrain.PretrainConfig(out=tmp_path / name, data=data, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    return data_folder(root / "data", {"cats": {"train": phrases(60), "validation": phrases(9, 100)}})


def test_pretraining_learns_and_twice_gives_the_same_bits(prepared, tmp_path):
    found = []
    for name in ("one", "two"):
        model, tokenizer = pretrain.train(pretraining(tmp_path, prepared, name))
        rows = rows_of(tmp_path / name / "metrics.jsonl")
        found.append([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows])
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert (tmp_path / "one/samples.jsonl").read_bytes() == (tmp_path / "two/samples.jsonl").read_bytes()
    assert found[0] == found[1]
    losses = [row["eval_loss"] for row in found[0] if "eval_loss" in row]
    assert abs(losses[0] / math.log(V) - 1) < 0.02  # it begins knowing nothing
    assert losses[-1] < 2.6 < losses[0] and found[0][-1]["eval_perplexity"] == math.exp(losses[-1])
    assert [row["step"] for row in found[0] if "loss" in row] == [10, 20, 30]
    assert np.array_equal(load_pretrained(tmp_path / "one").flat, model.flat) and tokenizer.vocab_size == V
    other, _ = pretrain.train(pretraining(tmp_path, prepared, "three", seed=1, samples=0, tokens=256))
    assert not np.array_equal(other.flat, model.flat)


def test_pretraining_in_smaller_parts_is_the_same(prepared, tmp_path):
    few = {"tokens": 8 * 32 * 3, "samples": 0}
    one, _ = pretrain.train(pretraining(tmp_path, prepared, "one", **few))
    two, _ = pretrain.train(pretraining(tmp_path, prepared, "two", micro_batch_size=3, **few))
    np.testing.assert_allclose(one.flat, two.flat, atol=2e-4)
    losses = [[r["loss"] for r in rows_of(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_pretraining_goes_on_with_a_model(prepared, tmp_path):
    pretrain.train(pretraining(tmp_path, prepared, "one", tokens=8 * 32 * 5, samples=0))
    config = pretrain.PretrainConfig(  # the same parts of rows: a product of others may round in another way
        out=tmp_path / "two", data=prepared, model=tmp_path / "one", length=32, batch_size=8, tokens=256, samples=0
    )
    pretrain.train(config)
    end, begin = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert begin[0]["eval_loss"] == end[-1]["eval_loss"]
    with pytest.raises(ValueError, match=r"--length has to be at most the context of .*one, 128, and is 200"):
        pretrain.train(dataclasses.replace(config, out=tmp_path / "three", length=200))
    assert not (tmp_path / "three").exists()  # an error at the start leaves nothing behind
    with pytest.raises(ValueError, match="--num-attention-heads = 3 must divide hidden_size 16"):
        pretrain.train(pretraining(tmp_path, prepared, "three", num_attention_heads=3))


def test_sources_are_mixed_by_given_weights_else_the_manifests_else_by_tokens(tmp_path, capsys):
    sources = {"a": {"train": phrases(60)}, "b": {"train": phrases(20)}}
    windows = lambda path: {n: Windows(f, 32) for n, f in pretrain.load_tokens(path, "train").items()}
    plain, weighted = (
        data_folder(tmp_path / "plain", sources),
        data_folder(tmp_path / "w", sources, weights={"a": 1.0, "b": 3.0}),
    )
    config = pretraining(tmp_path, plain)
    tokens = pretrain.weights_of(config, windows(plain))
    assert (
        tokens == {n: int(w.documents.offsets[-1]) for n, w in windows(plain).items()} and tokens["a"] > 2 * tokens["b"]
    )
    config = dataclasses.replace(config, data=weighted)
    assert pretrain.weights_of(config, windows(weighted)) == {"a": 1.0, "b": 3.0}
    config = dataclasses.replace(config, weights={"a": 1.0, "b": 1.0})
    assert pretrain.weights_of(config, windows(weighted)) == {"a": 1.0, "b": 1.0}
    model, _ = pretrain.train(dataclasses.replace(config, tokens=256, samples=0))  # nothing is held out: no evaluation
    assert model.config.hidden_size == 16
    assert not any("eval_loss" in row for row in rows_of(tmp_path / "out/metrics.jsonl"))
    assert capsys.readouterr().out.startswith(
        "no text is held out, and so nothing is evaluated: prepare.py --validation"
    )


def test_an_evaluation_sees_rows_from_all_over_the_held_out_text(tmp_path, monkeypatch):
    """The first rows of a plan hold the longest documents, and would be no fair sample."""
    texts = ["x" * n for n in range(30, 0, -1)]
    data = data_folder(tmp_path / "data", {"a": {"train": texts, "validation": texts}})
    seen = []
    monkeypatch.setattr(pretrain, "evaluate_tokens", lambda model, batches, lengths: seen.append(list(batches)) or {})
    pretrain.train(pretraining(tmp_path, data, eval_rows=4, tokens=256, batch_size=2, samples=0))
    rows = Windows(pretrain.load_tokens(data, "validation")["a"], 32)
    found = np.concatenate([batch.tokens for batch in seen[0]])
    assert len(found) == 4 < len(rows) and [len(batch.tokens) for batch in seen[0]] == [2, 2]
    assert np.array_equal(found[[0, -1]], rows.rows([0, len(rows) - 1]).tokens)
    assert len(seen) == 2 and all(np.array_equal(a.tokens, b.tokens) for a, b in zip(*seen, strict=True))


# ------------------------------------------------------------------ SFT


def test_sft_trains_answers_and_their_ends_alone():
    rng = np.random.default_rng(5)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    rows = encode_conversations([Conversation("x:1", messages, {})], "chatml", TOKENIZER, 127)
    batch = Windows(list(rows), 127).rows([0])
    end = TOKENIZER.special_tokens["<|im_end|>"]
    assert TOKENIZER.decode(batch.y[batch.mask]) == "Me.<|im_end|>So.<|im_end|>"
    assert (batch.y[batch.mask] == end).sum() == 2 < (batch.y == end).sum()  # the user's ends are not trained
    model = small(dtype=np.float64)

    def gradient(y):
        view = SimpleNamespace(x=batch.x, y=y, start=batch.start, mask=batch.mask)
        return gradient_of(model, common.next_token_loss, view, batch.mask.sum())[0]

    other, before = (batch.y + rng.integers(1, V, batch.y.shape, np.int32)) % V, gradient(batch.y)
    assert np.array_equal(gradient(np.where(batch.mask, batch.y, other)), before)
    for place in np.argwhere(batch.mask):  # each trained token counts, the ends too
        y = batch.y.copy()
        y[tuple(place)] = other[tuple(place)]
        assert not np.allclose(gradient(y), before)


def test_packed_conversations_have_the_losses_and_gradients_of_separate_ones():
    model = small(dtype=np.float64)
    make = lambda i: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * (1 + i % 4)}]
    conversations = [Conversation(f"x:{i}", make(i), {}) for i in range(7)]
    rows = list(encode_conversations(conversations, "chatml", TOKENIZER, 127))
    packed, separate = (Windows(rows, 127, method) for method in ("best_fit", "pad"))
    assert len(packed) < len(separate) == 7
    batches = [windows.rows(range(len(windows))) for windows in (packed, separate)]
    (gradient, loss), (gradient_separate, _) = (gradient_of(model, common.next_token_backward, b, 0) for b in batches)
    alone = [by_definition(model, common.pad([ids], [mask], 0))[0] for ids, mask in rows]
    np.testing.assert_allclose(loss, np.concatenate(alone).mean(), rtol=1e-10)
    np.testing.assert_allclose(gradient, gradient_separate, rtol=1e-9, atol=1e-12)


def tuning(tmp_path, rows, name="out", **options):
    if not (tmp_path / "base").exists():
        model_folder(tmp_path / "base")
    options = {"batch_size": 4, "epochs": 2.0, "lr": 5e-3, "length": 64, "max_new_tokens": 8} | options
    data = (write(tmp_path / f"{name}.jsonl", rows),)
    return sft.SFTConfig(out=tmp_path / name, model=tmp_path / "base", data=data, **options)


def test_sft_learns_one_conversation_by_heart_and_stops(tmp_path):
    model_folder(tmp_path / "base", hidden_size=32)
    rows = [{"prompt": "Who?", "response": "Me, Größe 🙂."}]
    config = tuning(tmp_path, rows, epochs=80.0, batch_size=1, lr=1e-2, log_every=20, template="llama3")
    model, tokenizer = sft.train(config)
    assert rows_of(tmp_path / "out/metrics.jsonl")[-1]["loss"] < 0.05
    template = common.template_of(tmp_path / "out")
    assert template == "llama3"  # the folder knows what it was tuned on
    (prompted,) = sft.encode_prompts(
        [Conversation("x", [{"role": "user", "content": "Who?"}], {})], template, tokenizer, 64
    )
    (answer,) = generate(
        model, [prompted[0]], max_new_tokens=40, temperature=0.0, stop_tokens=stop_ids(template, tokenizer)
    )
    assert tokenizer.decode(answer.ids) == "Me, Größe 🙂.<|eot_id|>" and answer.finish == "stop"


def test_sft_evaluates_on_conversations_it_does_not_train(tmp_path, monkeypatch, capsys):
    seen, made = [], sft.encode_conversations
    monkeypatch.setattr(
        sft, "encode_conversations", lambda some, *rest: seen.append([c.where for c in some]) or made(some, *rest)
    )
    rows = [*chat_rows(39), {"prompt": "z" * 90, "response": "b"}]
    sft.train(tuning(tmp_path, rows, held_out=0.25, samples=2, seed=1, eval_every=3))
    kept, held = seen
    assert len(kept) == 30 and len(held) == 10 and not set(kept) & set(held)
    samples = rows_of(tmp_path / "out/samples.jsonl")
    assert {s["prompt"] for s in samples} <= {r["prompt"] for r in rows} and len({s["prompt"] for s in samples}) == 2
    evaluated = [r for r in rows_of(tmp_path / "out/metrics.jsonl") if "eval_loss" in r]
    assert (
        evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
        and abs(evaluated[0]["eval_loss"] / math.log(V) - 1) < 0.02
    )
    assert f"left out: 1 too long for a length of 64 tokens (first: {tmp_path}/out.jsonl:40)" in capsys.readouterr().out


def test_sft_holds_out_questions_and_not_only_rows(tmp_path, monkeypatch):
    seen, made = [], sft.encode_conversations
    monkeypatch.setattr(sft, "encode_conversations", lambda some, *rest: seen.append(some) or made(some, *rest))
    turns = lambda *texts: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    rows = [{"messages": turns(f"{i % 9}?", f"answer {i}", f"and {i}?", "so")} for i in range(36)]
    sft.train(tuning(tmp_path, rows, held_out=0.34))
    kept, held = ({c.messages[0]["content"] for c in some} for some in seen)
    assert len(kept) == 6 and len(held) == 3 and not kept & held and [len(some) for some in seen] == [24, 12]


def test_sft_twice_is_the_same_bits_and_in_parts_the_same_numbers(tmp_path):
    for name, options in (("a", {}), ("b", {}), ("c", {"micro_batch_size": 1}), ("d", {"packing": "pad"})):
        sft.train(tuning(tmp_path, chat_rows(12), name, samples=0, **options))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"]
    assert files[0] == files[1] and files[3] != files[0]
    one, three = (load_pretrained(tmp_path / name).flat for name in "ac")
    np.testing.assert_allclose(one, three, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_sft_replays_the_share_of_rows_that_it_is_told(share, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sft, "Batches", lambda *given: made.append(Batches(*given)) or made[-1])
    data = data_folder(tmp_path / "data", {"a": {"train": phrases(60)}, "b": {"train": phrases(20)}})
    sft.train(tuning(tmp_path, chat_rows(24), replay=data, replay_share=share, epochs=4.0, samples=0))
    taken = made[0].taken
    total, replayed = sum(taken.values()), sum(n for name, n in taken.items() if name.startswith("replay"))
    assert abs(replayed - share * total) <= 2
    rows = len(made[0].mixture.windows["conversations"])
    assert 4 * rows <= taken["conversations"] < 4 * rows + 4  # replay comes on top: the epochs are those asked for
    if share:
        assert abs(taken["replay.a"] / taken["replay.b"] - 3) < 0.5  # in proportion to their tokens


@pytest.mark.parametrize("trainer", [pretrain, sft])
def test_a_batch_without_targets_is_passed_over(trainer, prepared, tmp_path, monkeypatch):
    """No weight decay, no momentum, no division by zero: nothing at all."""

    class Empty(trainer.Batches):
        def __next__(self):
            batch = super().__next__()
            return batch._replace(mask=np.zeros_like(batch.mask))

    monkeypatch.setattr(trainer, "Batches", Empty)
    options = {"samples": 0, "weight_decay": 0.5, "out": tmp_path / "out"}
    if trainer is pretrain:
        config = dataclasses.replace(pretraining(tmp_path, prepared), **options)
        before = pretrain.new_model(config, V).flat
    else:
        config = dataclasses.replace(tuning(tmp_path, chat_rows(12)), **options)
        before = load_pretrained(tmp_path / "base").flat
    with np.errstate(all="raise"):
        model, _ = trainer.train(config)
    assert np.array_equal(model.flat, before)


def test_text_of_another_tokenizer_is_not_replayed(tmp_path):
    other = data_folder(tmp_path / "data", {"a": {"train": phrases(60)}}, Tokenizer.train(phrases(30), V + 10))
    with pytest.raises(ValueError, match=r"data and .*base have different tokenizers"):
        sft.train(tuning(tmp_path, chat_rows(12), replay=other))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"base and .*data have different tokenizers"):
        pretrain.train(pretrain.PretrainConfig(out=tmp_path / "p", data=other, model=tmp_path / "base"))


def test_a_reward_model_reads_answers_as_long_as_the_context(tmp_path):
    """One more token than a language model would: it reads the last, too."""
    rows = [{"prompt": "x" * n, "chosen": "yes", "rejected": "no"} for n in range(60, 110)]
    config = reward.RewardConfig(
        out=tmp_path / "out",
        model=model_folder(tmp_path / "base"),
        data=(write(tmp_path / "p.jsonl", rows),),
        batch_size=10,
    )
    model, _ = reward.train(config)
    assert model.config.head == "scalar"


def test_a_reward_model_tells_its_accuracy_on_each_file(tmp_path):
    """Some preferences are much harder than others, and the mean of two files says nothing about either."""
    good = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    odd = [("yes", "no"), ("no", "yes")]
    odd = [{"prompt": f"{n}x", "chosen": odd[n % 2][0], "rejected": odd[n % 2][1]} for n in range(40)]
    config = reward.RewardConfig(
        **{"out": tmp_path / "out", "model": model_folder(tmp_path / "base"), "held_out": 0.4, "epochs": 20.0},
        data=(write(tmp_path / "clear.jsonl", good), write(tmp_path / "odd.jsonl", odd)),
        batch_size=16,
        lr=3e-3,
    )
    reward.train(config)
    last = rows_of(tmp_path / "out/metrics.jsonl")[-1]
    assert last["eval_accuracy/clear"] == 1.0 and 0.1 < last["eval_accuracy/odd"] < 0.9
    assert last["eval_accuracy/odd"] < last["eval_accuracy"] < 1.0


def first_step(tmp_path, name, **options):
    """{parameter: how far a reward model's first update moves it, at most}, under a learning rate of 1e-3."""
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(10)]
    config = reward.RewardConfig(
        **{"out": tmp_path / name, "model": model_folder(tmp_path / "base"), "weight_decay": 0.0, "batch_size": 9},
        **{"lr": 1e-3, "warmup": 0.0, "max_grad_norm": 1e9, "data": (write(tmp_path / "p.jsonl", rows),), **options},
    )
    trained, _ = reward.train(config)
    before = common.load_with_head(tmp_path / "base", "scalar", config.seed).parameters
    return {name: np.abs(p.data - before[name].data).max() for name, p in trained.parameters.items()}


def test_a_reward_models_embedding_and_head_have_a_rate_of_their_own(tmp_path):
    """Adam's first update moves every weight that has a gradient by its learning rate, whatever the gradient."""
    plain, found = first_step(tmp_path, "plain"), first_step(tmp_path, "own", embedding_lr=0.02)
    faster = {"model.embed_tokens.weight", "score.weight"}
    assert faster < plain.keys()
    for name, size in plain.items():
        assert size == pytest.approx(1e-3, rel=0.01), name
        assert found[name] == pytest.approx(0.02 if name in faster else 1e-3, rel=0.01), name
    adapted = first_step(tmp_path, "adapted", embedding_lr=0.02, lora_rank=2)
    assert adapted["score.weight"] == pytest.approx(0.02, rel=0.01)
    assert adapted["model.embed_tokens.weight"] == 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_a_reward_model_reads_is_in_its_folder_and_all_that_score_read_it(lora_rank, tmp_path, capsys):
    rows = [{"prompt": f"{n}", "chosen": "yes, it is", "rejected": "no"} for n in range(10)]
    pairs, out = write(tmp_path / "p.jsonl", rows), tmp_path / "reward"
    base = model_folder(tmp_path / "base")
    model, _ = reward.train(
        reward.RewardConfig(model=base, data=(pairs,), out=out, pooling="mean", lora_rank=lora_rank)
    )
    assert model.config.pooling == load_pretrained(out).config.pooling == "mean"

    def scored(name):
        told = {"model": base, "reward": out, "prompts": (pairs,), "n": 2, "max_new_tokens": 5}
        best_of_n.best_of_n(best_of_n.BestOfNConfig(out=tmp_path / name, **told))
        return np.array([row["scores"] for row in rows_of(tmp_path / name / "best.jsonl")])

    def scores_of(name):
        capsys.readouterr()
        found = scored(name)
        assert f"written to {tmp_path / name / 'best.jsonl'}, for scripts/sft.py --data" in capsys.readouterr().out
        return found

    pooled, values = scores_of("pooled"), json.loads((out / "config.json").read_text())
    assert values.pop("score_pooling") == "mean"
    (out / "config.json").write_text(json.dumps(values))
    assert (pooled != scored("last")).all()  # of the same answers, none of one token
    (out / "config.json").write_text(json.dumps(values | {"score_pooling": "mean"}))
    for told, found in ({}, "mean"), ({"pooling": "last"}, "last"):
        again, _ = reward.train(reward.RewardConfig(model=out, data=(pairs,), out=tmp_path / f"again-{found}", **told))
        assert again.config.pooling == found


def test_preferences_of_two_files_with_one_name_stay_apart():
    make = lambda where: Preference(where, [], ["a", "b"], 0.0, 1.0)
    some = [make(f"{path}:{n}") for n, path in enumerate(("one/pairs.jsonl", "two/pairs.jsonl", "x.jsonl", "x.jsonl"))]
    found = reward.by_file(some)
    assert found == {"one/pairs.jsonl": some[:1], "two/pairs.jsonl": some[1:2], "x": some[2:]}
