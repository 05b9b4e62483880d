"""Cross-entropy and log-probabilities: against their definition, fused against unfused, and the memory they promise."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import autograd as ag
from minillm import functional as F
from minillm.autograd import Tensor, no_grad, saved_arrays
from minillm.kernels import cross_entropy as kernels
from tests.gradcheck import gradcheck

rng = np.random.default_rng(0)
IGNORE = -100


def problem(seed, N=7, V=11, D=5, dtype=np.float64):
    draw = np.random.default_rng(seed)
    hidden, weight = draw.standard_normal((N, D)).astype(dtype), draw.standard_normal((V, D)).astype(dtype)
    targets, weights = draw.integers(0, V, N), draw.uniform(0, 1, N)
    targets[draw.random(N) < 0.3] = IGNORE
    weights[draw.random(N) < 0.3] = 0
    return hidden, weight, targets, weights


def log_softmax(z):
    return z - ag.logsumexp(z, keepdims=True)


def by_the_definition(logits, targets, weights, label_smoothing, z_loss):
    """The same loss from array ops: a check of values and, through the engine, of gradients."""
    used = targets != IGNORE
    w = weights * used if weights is not None else used / max(used.sum(), 1)
    logp = log_softmax(logits)
    at_target = ag.gather(logp, ids=np.where(used, targets, 0)[:, None]).reshape(len(targets))
    lse = ag.logsumexp(logits)
    rows = at_target * -(1 - label_smoothing) - logp.mean(-1) * label_smoothing + lse * lse * z_loss
    return (rows * w).sum()


options = st.fixed_dictionaries(
    {"label_smoothing": st.sampled_from([0.0, 0.1]), "z_loss": st.sampled_from([0.0, 1e-2])}
)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans(), options)
def test_values_and_gradients_are_the_definitions(seed, weighted, kwargs):
    hidden, weight, targets, weights = problem(seed)
    logits = hidden @ weight.T
    weights = weights if weighted else None
    ours, theirs = Tensor(logits, requires_grad=True), Tensor(logits, requires_grad=True)
    loss = F.cross_entropy(ours, targets, weights=weights, **kwargs)
    expected = by_the_definition(theirs, targets, weights, **kwargs)
    loss.backward()
    expected.backward()
    assert np.allclose(loss.data, expected.data, rtol=1e-12)
    assert np.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans(), options, st.sampled_from([None, 1, 3, 7]))
def test_the_fused_head_equals_linear_then_cross_entropy(seed, weighted, kwargs, rows_per_chunk):
    hidden, weight, targets, weights = problem(seed)
    kwargs["weights"] = weights if weighted else None
    results = []
    for fused in (True, False):
        h, w = Tensor(hidden, requires_grad=True), Tensor(weight, requires_grad=True)
        if fused:
            loss = F.linear_cross_entropy(h, w, targets, rows_per_chunk=rows_per_chunk, **kwargs)
        else:
            loss = F.cross_entropy(F.linear(h, w), targets, **kwargs)
        (loss * 2.5).backward()
        results.append((loss.data, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert np.allclose(a, b, rtol=1e-10, atol=1e-13)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.7, 2.0]), st.sampled_from([None, 1, 3]))
def test_log_probabilities_and_entropy(seed, temperature, rows_per_chunk):
    hidden, weight, targets, _ = problem(seed)
    draw = np.random.default_rng(seed)
    g, g_H = draw.standard_normal((2, len(targets)))
    used = targets != IGNORE
    results = []
    for way in ("definition", "unfused", "fused"):
        h, w = Tensor(hidden, requires_grad=True), Tensor(weight, requires_grad=True)
        if way == "definition":
            logp = log_softmax(F.linear(h, w) * (1 / temperature))
            at_target = ag.gather(logp, ids=np.where(used, targets, 0)[:, None]).reshape(len(targets)) * (used * 1.0)
            H = (ag.exp(logp) * logp).sum(-1) * (used * -1.0)
        elif way == "unfused":
            at_target, H = F.token_logprobs(F.linear(h, w), targets, temperature=temperature, entropy=True)
        else:
            at_target, H = F.linear_token_logprobs(
                h, w, targets, temperature=temperature, entropy=True, rows_per_chunk=rows_per_chunk
            )
        (at_target * g + H * g_H).sum().backward()
        results.append((at_target.data, H.data, h.grad, w.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_without_entropy_there_is_one_result():
    hidden, weight, targets, _ = problem(1)
    both = F.linear_token_logprobs(hidden, weight, targets, entropy=True)
    assert np.array_equal(F.linear_token_logprobs(hidden, weight, targets).data, both[0].data)
    gradcheck(lambda h, w: F.linear_token_logprobs(h, w, targets, rows_per_chunk=2), hidden, weight, rng=rng)
    gradcheck(lambda z: F.token_logprobs(z, targets, temperature=0.5), hidden @ weight.T, rng=rng)


def test_what_is_ignored_is_not_read():
    """Junk, even NaN, in ignored rows changes no bit of the loss or of any other gradient."""
    hidden, weight, targets, weights = problem(3)
    ignored = (targets == IGNORE) | (weights == 0)
    assert 0 < ignored.sum() < len(targets)
    kept = np.where(ignored, IGNORE, targets)
    for f, x in (
        (lambda h, w: F.linear_cross_entropy(h, w, targets, weights=weights), hidden),
        (lambda h, w: F.linear_token_logprobs(h, w, kept, rows_per_chunk=2).sum(), hidden),
        (lambda z, w: F.cross_entropy(z, targets, weights=weights) + w.sum(), hidden @ weight.T),
        (lambda z, w: F.token_logprobs(z, kept, entropy=True)[1].sum() + w.sum(), hidden @ weight.T),
    ):
        results = []
        spoiled = x.copy()
        spoiled[ignored] = np.nan
        for first in (x, spoiled):
            a, w = Tensor(first, requires_grad=True), Tensor(weight, requires_grad=True)
            loss = f(a, w)
            loss.backward()
            assert not a.grad[ignored].any()
            results.append((loss.data, a.grad[~ignored], w.grad))
        for plain, junk in zip(*results, strict=True):
            assert np.array_equal(plain, junk)


@pytest.mark.parametrize("weights", [None, "zero"])
def test_a_batch_with_nothing_to_learn_gives_zero(weights):
    hidden, weight, targets, _ = problem(4)
    targets = np.full_like(targets, IGNORE) if weights is None else np.abs(targets) % 11
    weights = None if weights is None else np.zeros(len(targets))
    h, w = Tensor(hidden, requires_grad=True), Tensor(weight, requires_grad=True)
    for loss in (
        F.linear_cross_entropy(h, w, targets, weights=weights),
        F.cross_entropy(F.linear(h, w), targets, weights=weights),
    ):
        loss.backward()
        assert loss.item() == 0
        assert not h.grad.any()
        assert not w.grad.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits(dtype):
    inf = np.inf
    logits = np.array([[1e4, 0, -1e4], [1e4, 1e4, 1e4], [0, -inf, 0], [-inf, 3, -inf], [-1e4, -1e4, 1e4]], dtype)
    targets = np.array([0, 1, 0, 1, 0])
    t = Tensor(logits, requires_grad=True)
    logp, H = F.token_logprobs(t, targets, entropy=True)
    assert np.allclose(logp.data, [0, -np.log(3), -np.log(2), 0, -2e4], rtol=1e-6)
    assert np.allclose(H.data, [0, np.log(3), np.log(2), 0, 0], rtol=1e-6, atol=1e-7)
    ag.backward([logp, H], [np.ones(5, dtype), np.ones(5, dtype)])
    assert np.isfinite(t.grad).all()
    t.grad = None
    F.cross_entropy(t, targets, weights=np.ones(5)).backward()
    expected = [[0, 0, 0], [1 / 3, -2 / 3, 1 / 3], [-0.5, 0, 0.5], [0, 0, 0], [-1, 0, 1]]
    assert np.allclose(t.grad, expected, atol=1e-6)


def test_the_logits_of_the_fused_head_never_exist():
    """Peak memory of forward and backward stays far below one N x V array."""
    N, V, D = 4096, 4096, 16
    hidden, weight, targets, _ = problem(5, N, V, D, np.float32)
    whole = N * V * 4
    for f in (
        lambda h, w: F.linear_cross_entropy(h, w, targets, rows_per_chunk=256),
        lambda h, w: F.linear_token_logprobs(h, w, targets, rows_per_chunk=256).sum(),
    ):
        h, w = Tensor(hidden, requires_grad=True), Tensor(weight, requires_grad=True)
        f(h, w).backward()  # compiled
        tracemalloc.start()
        loss = f(h, w)
        kept = sum(array.nbytes for _, array in saved_arrays(loss))
        loss.backward()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < whole / 4
        assert kept < whole / 16


def test_no_gradient_is_made_under_no_grad_or_for_what_needs_none(monkeypatch):
    hidden, weight, targets, _ = problem(6)
    made = []
    original = kernels.fused_inplace
    monkeypatch.setattr(kernels, "fused_inplace", lambda *a: made.append(1) or original(*a))
    with no_grad():
        value = F.linear_cross_entropy(Tensor(hidden, True), Tensor(weight, True), targets)
    assert made == []
    frozen_head = F.linear_cross_entropy(Tensor(hidden, True), weight, targets)
    assert made == [1]
    assert len(saved_arrays(frozen_head)) == 2 - (targets != IGNORE).all()  # dhidden and its rows: no dweight
    assert np.array_equal(value.data, frozen_head.data)


def test_the_head_gradient_of_16_bits_adds_up_in_32():
    N, D, V = 4096, 2, 3
    hidden, targets = rng.uniform(0.1, 0.15, (N, D)).astype(np.float16), np.zeros(N, int)
    grads = []
    for dtype in (np.float16, np.float64):
        weight = Tensor(np.zeros((V, D), dtype), requires_grad=True)
        # one row a chunk: 4096 small terms, which a 16-bit sum stops noticing
        F.linear_cross_entropy(hidden.astype(dtype), weight, targets, weights=np.ones(N), rows_per_chunk=1).backward()
        grads.append(weight.grad)
    assert np.allclose(grads[0], grads[1], rtol=2e-3)


def test_shapes_of_batches_go_through():
    hidden, weight = rng.standard_normal((2, 3, 5)), rng.standard_normal((11, 5))
    targets = rng.integers(0, 11, (2, 3))
    logits = F.linear(hidden, weight)
    assert F.token_logprobs(logits, targets).shape == F.linear_token_logprobs(hidden, weight, targets).shape == (2, 3)
    assert F.cross_entropy(logits, targets).shape == F.linear_cross_entropy(hidden, weight, targets).shape == ()
    mean = -F.token_logprobs(logits, targets).data.mean()
    assert np.isclose(F.cross_entropy(logits, targets).item(), mean, rtol=1e-13)


def test_uniform_logits_cost_ln_v():
    assert np.isclose(F.cross_entropy(np.zeros((3, 50)), np.array([0, 7, 49])).item(), np.log(50), rtol=1e-14)


def test_logits_that_are_a_view_are_kept_once():
    """rows of a view are a copy; the way back needs that copy and only the shape of the view."""
    logits, targets = Tensor(rng.standard_normal((2, 4, 11)), requires_grad=True), rng.integers(0, 11, (2, 3))
    for loss in (F.cross_entropy(logits[:, :-1], targets), F.token_logprobs(logits[:, :-1], targets)):
        assert sum(array.size == 2 * 3 * 11 for _, array in saved_arrays(loss)) == 1
