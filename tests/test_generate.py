"""Sampling: exact filters, true frequencies, rows that do not depend on each other, and ends that are what they say."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import lora
from minillm.autograd import no_grad
from minillm.generate import filter_logits, generate, next_probabilities
from minillm.model import Config, Model, build

TINY = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
CONFIGS = {
    "llama": Config(**TINY, num_key_value_heads=2, max_position_embeddings=40),
    "mistral": Config(**TINY, sliding_window=3, max_position_embeddings=40),
    "gpt2": Config(**TINY, architecture="gpt2", max_position_embeddings=40),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [9, 9, 9]]


def sharp(config, dtype=np.float64):
    """A model whose distributions are far from uniform, so that a wrong one shows."""
    model = build(config, 0, dtype)
    model.flat += 0.4 * np.random.default_rng(1).standard_normal(model.flat.size).astype(dtype)
    return model


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ------------------------------------------------------------------ filters


def test_top_k_and_its_ties():
    logits = np.array([[1.0, 3.0, 2.0, 3.0, 2.0]])
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, range(5))):
        assert np.flatnonzero(np.isfinite(filter_logits(logits, top_k=k)[0])).tolist() == list(kept)


def test_top_p_at_its_boundaries_and_ties():
    logits = np.log(np.array([[0.125, 0.5, 0.25, 0.125]]))  # exact in binary
    for p, kept in (
        (0.01, [1]),
        (0.5, [1]),  # 0.5 is already at least 0.5
        (np.nextafter(0.5, 1), [1, 2]),
        (0.75, [1, 2]),
        (0.8, [0, 1, 2]),  # of the two equal ones the lower id
        (0.875, [0, 1, 2]),
        (0.9, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        assert np.flatnonzero(np.isfinite(filter_logits(logits, top_p=p)[0])).tolist() == kept, p
    equal = np.zeros((1, 4))
    assert np.flatnonzero(np.isfinite(filter_logits(equal, top_p=0.5)[0])).tolist() == [0, 1]


def test_min_p_greedy_and_the_order_of_filters():
    logits = np.log(np.array([[0.4, 0.2, 0.1, 0.3]]))
    assert np.flatnonzero(np.isfinite(filter_logits(logits, min_p=0.5)[0])).tolist() == [0, 1, 3]
    assert np.isfinite(filter_logits(logits, min_p=0.0)).all()
    assert np.flatnonzero(np.isfinite(filter_logits(logits, temperature=0)[0])).tolist() == [0]
    assert np.flatnonzero(np.isfinite(filter_logits(np.zeros((1, 3)), temperature=0)[0])).tolist() == [0]
    # top_p counts within what top_k has left: 0.4 / 0.7 < 0.6 <= 1
    both = filter_logits(logits, top_k=2, top_p=0.6)
    assert np.flatnonzero(np.isfinite(both[0])).tolist() == [0, 3]
    assert np.allclose(filter_logits(logits, temperature=2.0), logits / 2)


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.none() | st.integers(1, 12),
    st.none() | st.floats(0.01, 1.0),
    st.none() | st.floats(0.0, 1.0),
)
def test_filters_are_the_definition_token_by_token(seed, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = rng.choice([-2.0, -1.5, 0.0, 0.25, 3.0, -np.inf], (3, 9))  # many ties
    logits[:, 4] = 1.0
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for row, found in zip(logits, filter_logits(logits, **filters), strict=True):
        x = row / (temperature or 1)
        order = sorted(range(9), key=lambda i: (-x[i], i))[: 1 if temperature == 0 else top_k]
        if top_p is not None:
            p, before = np.exp(x[order]) / np.exp(x[order]).sum(), 0.0
            for n, each in enumerate(p):
                if n and not before < top_p:
                    order = order[:n]
                    break
                before += each
        if min_p:
            order = [i for i in order if np.exp(x[i]) >= min_p * np.exp(x[order].max()) * (1 - 1e-12)]
        expected = np.full(9, -np.inf)
        expected[order] = x[order]
        np.testing.assert_array_equal(found, expected)


def test_the_context_bounds_what_is_asked_for():
    """Room for 10^12 tokens is not there, and nobody needs it."""
    (found,) = generate(sharp(CONFIGS["llama"]), [[1, 2]], max_new_tokens=10**12, temperature=0)
    assert len(found.ids) == 38 and found.finish == "length"


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_told(temperature, bad):
    model = sharp(CONFIGS["llama"])
    model.flat[:] = bad
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[1, 2]], max_new_tokens=2, temperature=temperature)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
def test_top_p_is_the_smallest_set(seed, top_p):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (4, 9)).astype(float)  # many ties
    kept = np.isfinite(filter_logits(logits, top_p=top_p))
    p = softmax(logits)
    for row, keep in zip(p, kept, strict=True):
        assert row[keep].sum() >= top_p - 1e-12
        assert row[keep].sum() - row[keep].min() < top_p + 1e-12
        assert row[keep].min() >= row[~keep].max(initial=0) - 1e-15


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or more, and is -1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be at least 1, and is 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], and is 0.0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], and is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"stop_strings": ["x"]}, "stop_strings need the tokenizer"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(sharp(CONFIGS["llama"]), [[1]], **{"max_new_tokens": 3, **wrong})


# ------------------------------------------------------------------ frequencies


def chi_square(counts, p):
    """(statistic, degrees of freedom) over cells with an expectation of at least 5, the rest in one."""
    n, common = counts.sum(), p * counts.sum() >= 5
    observed, expected = counts[common].astype(float), p[common] * n
    if (~common).any() and p[~common].sum() > 0:
        observed, expected = np.append(observed, counts[~common].sum()), np.append(expected, p[~common].sum() * n)
    return ((observed - expected) ** 2 / expected).sum(), len(observed) - 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("cache", [True, False])
def test_sampled_frequencies(options, cache):
    """Two tokens after one prompt, through the cache or not, against their exact distribution: a chi-square test."""
    model, n = sharp(CONFIGS["llama"]), 1500
    out = generate(model, [[4, 2]] * n, max_new_tokens=2, cache=cache, seed=3, **options)
    first = np.array([o.ids[0] for o in out])
    pairs = np.zeros((17, 17))
    np.add.at(pairs, (first, [o.ids[1] for o in out]), 1)
    p_first = softmax(filter_logits(model(np.array([[4, 2]])).data[:, -1], **options))[0]
    then = model(np.array([[4, 2, t] for t in range(17)])).data[:, -1]
    p = p_first[:, None] * softmax(filter_logits(then, **options))
    assert not pairs[p == 0].any()  # what is left out never comes
    for counts, expected in ((np.bincount(first, minlength=17), p_first), (pairs.reshape(-1), p.reshape(-1))):
        statistic, freedom = chi_square(counts, expected)
        assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5
    exact = np.log(p_first[first])
    assert np.allclose([o.logprobs[0] for o in out], exact, atol=1e-9)


@every_model
def test_next_probabilities_are_those_that_generate_draws_from(config):
    model, options = sharp(config), {"temperature": 0.7, "top_p": 0.9}
    p = next_probabilities(model, [4, 2, 9], **options)
    assert p.shape == (17,) and p.dtype == np.float64 and abs(p.sum() - 1) < 1e-12 and (p == 0).any()
    for seed in range(5):
        (drawn,) = generate(model, [[4, 2, 9]], max_new_tokens=1, seed=seed, **options)
        assert np.allclose(drawn.logprobs, np.log(p[drawn.ids]), atol=1e-9)
    for wrong, message in (([], "prompt 0 is empty"), ([17], "id 17 is outside"), ([1] * 40, "leaves no room")):
        with pytest.raises(ValueError, match=message):
            next_probabilities(model, wrong)


def test_logprobs_are_those_of_what_was_drawn():
    model = sharp(CONFIGS["llama"])
    options = {"temperature": 0.8, "top_k": 6, "top_p": 0.95, "min_p": 0.01}
    (out,) = generate(model, [[1, 2]], max_new_tokens=10, seed=5, **options)
    for t, (token, logprob) in enumerate(zip(out.ids, out.logprobs, strict=True)):
        logits = model(np.array([[1, 2, *out.ids[:t]]])).data[:, -1]
        assert np.isclose(logprob, np.log(softmax(filter_logits(logits, **options))[0, token]), atol=1e-9)
    (greedy,) = generate(model, [[1, 2]], max_new_tokens=4, temperature=0)
    assert np.array_equal(greedy.logprobs, np.zeros(4))


def test_repetition_penalty():
    """Against the rule applied by hand, positive logits and negative ones, prompt and answer."""
    model = sharp(CONFIGS["llama"])
    (out,) = generate(model, [[1, 2]], max_new_tokens=8, temperature=0, repetition_penalty=1.8)
    ids = [1, 2]
    for token in out.ids:
        logits = model(np.array([ids])).data[0, -1].copy()
        for seen in set(ids):
            logits[seen] = logits[seen] / 1.8 if logits[seen] > 0 else logits[seen] * 1.8
        assert token == logits.argmax()
        ids.append(token)


# ------------------------------------------------------------------ rows, batches, caches


@every_model
def test_a_row_does_not_depend_on_its_batch(config):
    model = sharp(config)
    seeds = [11, 12, 13]
    together = generate(model, PROMPTS, max_new_tokens=12, seed=seeds)
    for prompt, seed, row in zip(PROMPTS, seeds, together, strict=True):
        (alone,) = generate(model, [prompt], max_new_tokens=12, seed=[seed])
        assert np.array_equal(alone.ids, row.ids)
        assert np.allclose(alone.logprobs, row.logprobs, atol=1e-10)


@every_model
def test_cached_equals_uncached(config):
    model = sharp(config)
    for options in ({}, {"temperature": 0}, {"stop_tokens": [5]}):
        cached = generate(model, PROMPTS, max_new_tokens=15, seed=2, **options)
        plain = generate(model, PROMPTS, max_new_tokens=15, seed=2, cache=False, **options)
        for a, b in zip(cached, plain, strict=True):
            assert np.array_equal(a.ids, b.ids)
            assert a.finish == b.finish
            assert np.allclose(a.logprobs, b.logprobs, atol=1e-10)


@pytest.mark.parametrize("adapter", ["", "none", "nf4"])
@every_model
def test_weights_are_cast_once_for_all_tokens_and_to_the_same_bits(config, adapter, monkeypatch):
    model = sharp(config, np.float32).to("cpu", ml_dtypes.bfloat16)
    if adapter:
        model = lora.adapt(model, rank=2, quantize=adapter)
        model.flat += np.random.default_rng(2).standard_normal(model.flat.size).astype(np.float32)
    before = dict(model.used)
    once = generate(model, PROMPTS, max_new_tokens=9, seed=3)
    assert model.used == before and all(p.dtype == np.float32 for p in before.values())
    ready = model.without_casts()
    matrices = [p for names in ready._block_names for p in (ready.used[name] for name in names) if p.ndim == 2]
    assert matrices and all(p.dtype == ml_dtypes.bfloat16 for p in matrices)
    monkeypatch.setattr(Model, "without_casts", lambda self: self)
    for a, b in zip(once, generate(model, PROMPTS, max_new_tokens=9, seed=3), strict=True):
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.logprobs, b.logprobs)


def test_a_model_that_casts_nothing_is_itself():
    model = sharp(CONFIGS["llama"])
    assert model.without_casts() is model


@every_model
def test_float32_logits_of_a_row_alone_and_in_a_batch(config):
    model = sharp(config, np.float32)
    pads = np.array([6, 0, 4], np.int32)
    tokens = np.array([np.pad(p, (n, 0)) for p, n in zip(PROMPTS, pads, strict=True)])
    with no_grad():
        batch = model(tokens, np.repeat(pads[:, None], 7, 1)).data
        for prompt, row in zip(PROMPTS, batch, strict=True):
            alone = model(np.array([prompt])).data[0]
            assert np.abs(row[-len(prompt) :] - alone).max() < 1e-5 * max(1, np.abs(alone).max())


def test_seeds():
    model = sharp(CONFIGS["llama"])
    once, again, other = (
        [o.ids.tolist() for o in generate(model, PROMPTS, max_new_tokens=9, seed=s)] for s in (1, 1, 2)
    )
    assert once == again
    assert once != other
    same_prompt = [o.ids.tolist() for o in generate(model, [[1]] * 4, max_new_tokens=9, seed=1)]
    assert len({tuple(ids) for ids in same_prompt}) == 4


# ------------------------------------------------------------------ ends


@every_model
def test_a_stop_token_ends_its_row_only(config):
    model = sharp(config)
    free = generate(model, PROMPTS * 3, max_new_tokens=12, seed=4)
    stopped = generate(model, PROMPTS * 3, max_new_tokens=12, seed=4, stop_tokens=[5, 6])
    assert {o.finish for o in stopped} == {"stop", "length"}
    for a, b in zip(free, stopped, strict=True):
        ends = [i for i, t in enumerate(a.ids) if t in (5, 6)]
        expected = a.ids[: ends[0] + 1] if ends else a.ids
        assert np.array_equal(b.ids, expected)
        assert b.finish == ("stop" if ends else "length")


def test_a_stop_string_may_span_tokens():
    class Letters:
        def decode(self, ids):
            return "".join("abcdefghijklmnopq"[i] for i in ids)

    model = sharp(CONFIGS["llama"])
    (free,) = generate(model, [[1]], max_new_tokens=20, seed=8)
    text = Letters().decode(free.ids)
    stop = text[6:9]
    end = text.index(stop) + 3
    (out,) = generate(model, [[1]], max_new_tokens=20, seed=8, stop_strings=["zzz", stop], tokenizer=Letters())
    assert Letters().decode(out.ids) == text[:end]
    assert out.finish == "stop_string"


@every_model
def test_the_context_ends_a_row_and_a_longer_neighbour_does_not(config):
    """A short prompt beside a long one may still use all of its own context."""
    model = sharp(config)
    long_, short = generate(model, [[1] * 38, [1, 2]], max_new_tokens=60, seed=0)
    assert len(long_.ids) == 2
    assert len(short.ids) == 38
    assert long_.finish == short.finish == "length"
    (alone,) = generate(model, [[1, 2]], max_new_tokens=60, seed=[(0, 1)])
    assert np.array_equal(alone.ids, short.ids)


def test_prompts_that_do_not_fit():
    model = sharp(CONFIGS["llama"])
    with pytest.raises(ValueError, match="prompt 1 has 40 tokens and leaves no room in the context of 40"):
        generate(model, [[1], [2] * 40], max_new_tokens=3)
    prompt = list(np.arange(60) % 17)
    with pytest.warns(UserWarning, match="prompt 0: the first 40 of 60 tokens are cut"):
        (out,) = generate(model, [prompt], max_new_tokens=3, cut_prompts=True)
    assert out.prompt.tolist() == prompt[-20:]
    assert len(out.ids) == 3
    for wrong, message in (([], "prompt 0 is empty"), ([17], r"prompt 0: id 17 is outside \[0, 17\)"), ([-1], "id -1")):
        with pytest.raises(ValueError, match=message):
            generate(model, [wrong], max_new_tokens=3)
    assert generate(model, [], max_new_tokens=3) == []


def test_tokens_are_told_as_they_come():
    told = []
    out = generate(
        sharp(CONFIGS["llama"]), PROMPTS, max_new_tokens=5, on_token=lambda row, id_: told.append((row, id_))
    )
    for i, o in enumerate(out):
        assert [t for row, t in told if row == i] == o.ids.tolist()
    assert [row for row, _ in told[:6]] == [0, 1, 2, 0, 1, 2]
