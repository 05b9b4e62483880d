"""The losses against their definitions, closed forms on spaces small enough to enumerate, extremes, and junk."""

import inspect
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import autograd as ag
from minillm import functional as F
from minillm import losses as L
from minillm.autograd import Tensor, backward
from minillm.op_examples import sections
from tests.gradcheck import gradcheck, tensors_of, vjp

LN2 = math.log(2)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def overflow_and_nan_are_errors():
    """Nothing here may overflow or make a NaN on the way, and e^-800 is 0."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        yield


def value_and_gradients(f, *arrays):
    """f's scalar (the loss, where it returns statistics too) as a float, and its gradient in each array."""
    leaves = [Tensor(np.array(x), requires_grad=True) for x in arrays]
    result = f(*leaves)
    loss = result[0] if isinstance(result, tuple) else result
    assert loss.shape == ()
    loss.backward()
    return loss.item(), *(x.grad for x in leaves)


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return np.exp(-softplus(-np.asarray(x, float)))


def logit(p):
    return math.log(p / (1 - p))


def softmax(x):
    return np.exp(x - np.logaddexp.reduce(x))


def log_softmax(theta):
    """As a Tensor, of a Tensor of logits (n,)."""
    return theta - ag.logsumexp(theta, keepdims=True)


# ------------------------------------------------------------------ every function: gradients, masks, shapes, types

# Functions with a mask: their Tensors, their arrays, and a call, all of the mask's shape. A name may be followed by an
# option. Numbers of the wrong size would hide what a mask does, so everything is drawn anew.
KINDS = ("pairs", "plackett_luce", "best_of_k")
MASKED = {
    "masked_mean": ("x", "", lambda mask, x: L.masked_mean(x, mask)),
    "masked_mean rows": ("x", "", lambda mask, x: L.masked_mean(x, mask, axis=-1)),
    "masked_var": ("", "x", lambda mask, x: L.masked_var(x, mask)),
    "masked_var sample": ("", "x", lambda mask, x: L.masked_var(x, mask, sample=True)),
    "whiten": ("", "x", lambda mask, x: L.whiten(x, mask)),
    "whiten keep": ("", "x", lambda mask, x: L.whiten(x, mask, shift_mean=False)),
    "sequence_logprobs": ("logp", "", lambda mask, logp: L.sequence_logprobs(logp, mask)),
    "sequence_logprobs mean": ("logp", "", lambda mask, logp: L.sequence_logprobs(logp, mask, "mean")),
    **{
        f"ranking_loss {kind}": ("scores", "", lambda mask, scores, kind=kind: L.ranking_loss(scores, mask, kind))
        for kind in KINDS
    },
    **{
        f"kl_estimate {kind}": ("logp", "ref", lambda mask, logp, ref, kind=kind: L.kl_estimate(logp, ref, kind, mask))
        for kind in ("k1", "k2", "k3")
    },
    "kl_rewards": ("", "logp ref", lambda mask, logp, ref: L.kl_rewards(np.ones(len(mask)), logp, ref, mask, 0.3)),
    "gae": ("", "rewards values", lambda mask, rewards, values: L.gae(rewards, values, mask, 0.9, 0.8)),
    "ppo_policy_loss": ("logp", "old adv", lambda mask, logp, old, adv: L.ppo_policy_loss(logp, old, adv, mask, 0.3)),
    "ppo_value_loss": ("values", "old returns", lambda mask, v, old, ret: L.ppo_value_loss(v, old, ret, mask, 0.5)),
}
UNMASKED = ["reward_loss", "dpo_loss", "dpo_rewards", "token_weights", "last_token", "AdaptiveKL"]
every_masked = pytest.mark.parametrize("entry", MASKED)

PUBLIC = {
    name: thing
    for name, thing in vars(L).items()
    if callable(thing) and getattr(thing, "__module__", "") == L.__name__ and not name.startswith("_")
}


def names_in(entry):
    tensors, arrays, call = MASKED[entry]
    return tensors.split(), arrays.split(), call


def some_mask(rng, shape=(4, 6)):
    """Any pattern: prompts, padding and gaps, with one row empty and one full."""
    mask = rng.random(shape) < 0.6
    mask[0], mask[1] = True, False
    return mask


def outputs_of(result):
    """The arrays in what a function returned: Tensors' data, and statistics by name."""
    parts = []
    for part in tensors_of(result):
        parts += list(part.values()) if isinstance(part, dict) else [part]
    return [np.asarray(p.data if isinstance(p, Tensor) else p) for p in parts]


def run(entry, mask, inputs, seed=0):
    """Outputs and gradients; each Tensor among the results gets a random cotangent."""
    tensors, _, call = names_in(entry)
    leaves = [Tensor(x.copy(), requires_grad=i < len(tensors)) for i, x in enumerate(inputs)]
    result = call(mask, *leaves[: len(tensors)], *(x.data for x in leaves[len(tensors) :]))
    recorded = [t for t in tensors_of(result) if isinstance(t, Tensor)]
    assert bool(recorded) == bool(tensors)
    if recorded:
        rng = np.random.default_rng(seed)
        backward(recorded, [np.asarray(rng.standard_normal(t.shape), t.dtype) for t in recorded])
    return outputs_of(result), [x.grad for x in leaves[: len(tensors)]]


def same_bits(ours, theirs):
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))


def test_every_function_has_an_entry():
    assert {entry.split()[0] for entry in MASKED} | set(UNMASKED) == set(PUBLIC)
    for name in UNMASKED:  # nothing that a mask could leave out
        parameters = set(inspect.signature(PUBLIC[name]).parameters)
        assert "mask" not in parameters or parameters <= {"mask", "count"}
    assert set(sections(L._k3)) == {"equation", "gradient", "keeps", "example"}


@every_masked
@DTYPES
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30, -1e300])
def test_junk_under_the_mask_changes_no_bit(entry, dtype, junk):
    if dtype == np.float32 and abs(junk) == 1e300:
        junk = -3e38
    rng = np.random.default_rng(1)
    mask = some_mask(rng)
    tensors, arrays, _ = names_in(entry)
    clean = [rng.standard_normal(mask.shape).astype(dtype) for _ in [*tensors, *arrays]]
    expected, gradients = run(entry, mask, clean)
    assert all(np.isfinite(x).all() for x in [*expected, *gradients])
    for which in [*([i] for i in range(len(clean))), range(len(clean))]:
        dirty = [np.where(mask, x, dtype(junk)) if i in which else x for i, x in enumerate(clean)]
        found, found_gradients = run(entry, mask, dirty)
        assert same_bits(found, expected)
        assert same_bits(found_gradients, gradients)
    for g in gradients:
        assert not g[~mask].any()
    for out in expected:
        assert out.shape != mask.shape or not out[~mask].any()


@every_masked
def test_what_the_mask_keeps_counts(entry):
    """The other side of the test above: a valid entry that changes changes the result."""
    rng = np.random.default_rng(2)
    mask = some_mask(rng)
    tensors, arrays, _ = names_in(entry)
    inputs = [rng.standard_normal(mask.shape) for _ in [*tensors, *arrays]]
    before, _ = run(entry, mask, inputs)
    for i in range(len(inputs)):
        moved = [x + 0.05 * rng.standard_normal(x.shape) if j == i else x for j, x in enumerate(inputs)]
        assert not same_bits(run(entry, mask, moved)[0], before)


@every_masked
@pytest.mark.parametrize("junk", [1.0, np.nan])
def test_an_empty_mask_gives_zero(entry, junk):
    tensors, arrays, _ = names_in(entry)
    mask = np.zeros((3, 4), bool)
    outputs, gradients = run(entry, mask, [np.full((3, 4), junk) for _ in [*tensors, *arrays]])
    assert not any(x.any() for x in [*outputs, *gradients])


@every_masked
def test_gradients_of_functions_with_a_mask(entry):
    tensors, arrays, call = names_in(entry)
    for seed in range(4 if tensors else 0):
        rng = np.random.default_rng(seed)
        mask = some_mask(rng)
        inputs = [rng.standard_normal(mask.shape) for _ in [*tensors, *arrays]]
        constants = inputs[len(tensors) :]

        def f(*leaves, mask=mask, constants=constants):
            result = call(mask, *leaves, *constants)
            return result[0] if isinstance(result, tuple) else result

        gradcheck(f, *inputs[: len(tensors)], rng=rng)


@every_masked
def test_a_mask_may_be_of_bools_or_numbers_but_no_weights(entry):
    rng = np.random.default_rng(3)
    mask = some_mask(rng)
    tensors, arrays, call = names_in(entry)
    inputs = [rng.standard_normal(mask.shape) for _ in [*tensors, *arrays]]
    expected, _ = run(entry, mask, inputs)
    for dtype in (np.int64, np.uint8, np.float32):
        assert same_bits(run(entry, mask.astype(dtype), inputs)[0], expected)
    for bad in (0.5, 2, -1, np.nan):
        with pytest.raises(ValueError, match="a mask holds nothing but 0 and 1"):
            call(np.where(mask, 1.0, bad), *inputs)


@every_masked
def test_one_shape_and_no_tensor_where_an_array_belongs(entry):
    tensors, arrays, call = names_in(entry)
    names, mask = [*tensors, *arrays], np.ones((2, 3), bool)
    inputs = [np.zeros((2, 3)) for _ in names]
    for i, name in enumerate(names):
        for shape in ((2, 1), (3,), (2, 4)):
            with pytest.raises(ValueError, match="does not go with"):
                call(mask, *(np.zeros(shape) if j == i else x for j, x in enumerate(inputs)))
        if name in arrays:
            with pytest.raises(TypeError, match="carries no gradient and must be an array"):
                call(mask, *(Tensor(x) if j == i else x for j, x in enumerate(inputs)))


@every_masked
def test_the_tensors_dtype_is_the_losses_and_16_bits_are_computed_in_32(entry):
    rng = np.random.default_rng(4)
    mask = some_mask(rng)
    tensors, arrays, _ = names_in(entry)
    if not tensors:
        return
    for dtype, wide in ((np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)):
        inputs = [rng.standard_normal(mask.shape).astype(dtype) for _ in tensors]
        inputs += [rng.standard_normal(mask.shape) for _ in arrays]  # float64, and 1e300 under the mask
        inputs[len(tensors) :] = [np.where(mask, x, 1e300) for x in inputs[len(tensors) :]]
        outputs, gradients = run(entry, mask, inputs)
        assert outputs[0].dtype == wide
        assert all(g.dtype == dtype for g in gradients)


# Losses of pairs (B,), as functions of two or four log-probabilities or scores.
LENGTHS = (np.array([3, 1, 4, 1, 5]), np.array([9, 2, 6, 5, 3]))
PAIRS = {
    "reward": lambda w, l: L.reward_loss(w, l),
    "reward margin": lambda w, l: L.reward_loss(w, l, margin=np.array([0.5, 0, 1, 2, 0.1]), centring=0.01),
    "reward soft": lambda w, l: L.reward_loss(w, l, margin=0.3, preference=np.array([1, 0.5, 0, 0.9, 0.2])),
    "sigmoid": lambda w, l: L.dpo_loss(w, l, REFERENCE[0], REFERENCE[1], 0.7),
    "cdpo": lambda w, l: L.dpo_loss(w, l, REFERENCE[0], REFERENCE[1], 0.7, label_smoothing=0.1),
    "robust": lambda w, l: L.dpo_loss(w, l, REFERENCE[0], REFERENCE[1], 0.7, "robust", label_smoothing=0.2),
    "hinge": lambda w, l: L.dpo_loss(w, l, REFERENCE[0], REFERENCE[1], 0.7, "hinge"),
    "ipo": lambda w, l: L.dpo_loss(w, l, REFERENCE[0], REFERENCE[1], 0.7, "ipo"),
    "ipo mean": lambda w, l: L.dpo_loss(
        w, l, REFERENCE[0], REFERENCE[1], 0.7, "ipo", margin=0.2, normalize="mean", lengths=LENGTHS
    ),
    "simpo": lambda w, l: L.dpo_loss(w, l, None, None, 2.0, margin=0.5, normalize="mean", lengths=LENGTHS),
}
REFERENCE = np.random.default_rng(5).standard_normal((2, 5))
every_pair_loss = pytest.mark.parametrize("name", PAIRS)


@every_pair_loss
def test_gradients_of_pair_losses(name):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        gradcheck(PAIRS[name], *(2 * rng.standard_normal((2, 5))), rng=rng)


# ------------------------------------------------------------------ counts

# Each: how many items (tokens, prompts, pairs) rows of this batch hold, and the loss of these rows for a count.
BATCH = np.random.default_rng(6)
MASK = some_mask(BATCH, (8, 5))
X, OLD, ADV = BATCH.standard_normal((3, 8, 5))
Y = BATCH.standard_normal(8)
IDS = BATCH.integers(0, 5, 8)
ROWS = {
    "masked_mean": (MASK.sum(1), lambda x, s, n: L.masked_mean(x, MASK[s], n)),
    "policy": (MASK.sum(1), lambda x, s, n: L.ppo_policy_loss(x, OLD[s], ADV[s], MASK[s], 0.2, n)),
    "value": (MASK.sum(1), lambda x, s, n: L.ppo_value_loss(x, OLD[s], ADV[s], MASK[s], 0.2, n)),
    **{
        kind: (MASK.sum(1) > 1, lambda x, s, n, kind=kind: L.ranking_loss(x, MASK[s], kind, n))
        for kind in ("pairs", "plackett_luce", "best_of_k")
    },
    "reward": (np.ones(8), lambda x, s, n: L.reward_loss(x.sum(1), Y[s], centring=0.1, count=n)),
    "ipo": (np.ones(8), lambda x, s, n: L.dpo_loss(x.sum(1), Y[s], Y[s], -Y[s], 0.5, "ipo", count=n)),
    "dpo": (np.ones(8), lambda x, s, n: L.dpo_loss(x.sum(1), Y[s], Y[s], -Y[s], 0.5, label_smoothing=0.1, count=n)),
    "hinge": (np.ones(8), lambda x, s, n: L.dpo_loss(x.sum(1), Y[s], Y[s], -Y[s], 0.5, "hinge", count=n)),
    "cross_entropy": (MASK[:, 0], lambda x, s, n: F.cross_entropy(x, IDS[s], weights=L.token_weights(MASK[s, 0], n))),
}


@pytest.mark.parametrize("name", ROWS)
def test_batches_with_the_count_of_the_step_add_up_to_one_large_batch(name):
    items, f = ROWS[name]
    n = items.sum()
    assert items[:3].sum() / n != 3 / 8 or items.all()  # or a mean of means would pass
    x = Tensor(X.copy(), requires_grad=True)
    whole = f(x, slice(None), None)
    value, *statistics = outputs_of(whole)
    tensors_of(whole)[0].backward()
    for given_count in (int(n), np.int64(n), np.array(n)):
        parts, y = [], Tensor(X.copy(), requires_grad=True)
        for rows in (slice(0, 3), slice(3, 8)):
            part = f(y[rows], rows, given_count)
            parts.append(outputs_of(part))
            tensors_of(part)[0].backward()
        assert abs(sum(p[0] for p in parts) - value) < 1e-12
        assert np.allclose(y.grad, x.grad, rtol=1e-12, atol=1e-14)
        for i, statistic in enumerate(statistics, 1):
            together = max if name == "policy" and i == len(statistics) else sum
            assert np.allclose(together(p[i] for p in parts), statistic, rtol=1e-12)


def test_a_count_is_more_than_zero_unless_there_is_nothing_to_count():
    x, none = np.ones((2, 2)), np.zeros((2, 2), bool)
    assert L.masked_mean(x, none, 0) == 0
    assert L.masked_mean(x, none, 7) == 0
    assert not L.token_weights(none, 0).any()
    for count in (0, -1, np.nan):
        with pytest.raises(ValueError, match="masked_mean: count must be more than 0"):
            L.masked_mean(x, ~none, count)
        with pytest.raises(ValueError, match="token_weights: count must be more than 0"):
            L.token_weights(~none, count)


# ------------------------------------------------------------------ masked statistics


def test_masked_statistics_are_those_of_the_valid_entries():
    rng = np.random.default_rng(7)
    x, mask = 3 + 2 * rng.standard_normal((5, 7)), some_mask(rng, (5, 7))
    kept = x[mask]
    assert np.isclose(L.masked_mean(x, mask), kept.mean(), rtol=1e-14)
    assert np.isclose(L.masked_mean(Tensor(x), mask).item(), kept.mean(), rtol=1e-14)
    assert np.isclose(L.masked_mean(x > 3, mask), (kept > 3).mean(), rtol=1e-6)
    rows = [row[m].mean() if m.any() else 0 for row, m in zip(x, mask, strict=True)]
    assert np.allclose(L.masked_mean(x, mask, axis=1), rows, rtol=1e-14)
    assert np.isclose(L.masked_var(x, mask), kept.var(), rtol=1e-13)
    assert np.isclose(L.masked_var(x, mask, sample=True), kept.var(ddof=1), rtol=1e-13)
    one = np.arange(35).reshape(5, 7) == 4
    assert L.masked_var(x, one) == L.masked_var(x, one, sample=True) == 0


def test_whitening():
    """shift_mean=True leaves mean 0; False puts the mean back, so only the spread becomes 1."""
    rng = np.random.default_rng(8)
    x, mask = 3 + 2 * rng.standard_normal((5, 7)), some_mask(rng, (5, 7))
    kept = x[mask]
    shifted, kept_mean = L.whiten(x, mask), L.whiten(x, mask, shift_mean=False)
    assert np.allclose(shifted[mask], (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8), rtol=1e-12)
    assert abs(shifted[mask].mean()) < 1e-14
    assert abs(shifted[mask].std() - 1) < 1e-8
    assert np.allclose(kept_mean[mask], shifted[mask] + kept.mean(), rtol=1e-13)
    assert abs(L.whiten(x, mask, sample=True)[mask].std(ddof=1) - 1) < 1e-8
    assert not shifted[~mask].any() and not kept_mean[~mask].any()
    constant = np.full((2, 3), 5.0)
    assert not L.whiten(constant, constant > 0).any()
    assert np.array_equal(L.whiten(constant, constant > 0, shift_mean=False), constant)


def test_sequence_logprobs_are_sums_over_the_response():
    logp = np.array([[-9.0, -1, -2, -9], [-9, -4, -9, -9], [-9, -9, -9, -9]])
    mask = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert np.array_equal(L.sequence_logprobs(logp, mask), [-3, -4, 0])
    assert np.array_equal(L.sequence_logprobs(logp, mask, "mean"), [-1.5, -4, 0])
    assert isinstance(L.sequence_logprobs(Tensor(logp), mask), Tensor)


@pytest.mark.parametrize("length", range(1, 7))
def test_the_score_lands_on_the_last_valid_token(length):
    mask = np.zeros((2, 8), bool)
    mask[0, 1 : 1 + length], mask[1, 2 : 2 + length] = True, True  # prompts of 1 and 2 tokens
    assert L.last_token(mask).tolist() == [length, length + 1]
    rng = np.random.default_rng(length)
    logp, reference, scores = rng.standard_normal((2, 8)), rng.standard_normal((2, 8)), np.array([10.0, -20.0])
    rewards, kl = L.kl_rewards(scores, logp, reference, mask, 0.1)
    assert np.array_equal(kl, np.where(mask, logp - reference, 0))
    expected = np.where(mask, -0.1 * (logp - reference), 0)
    expected[0, length] += 10
    expected[1, length + 1] -= 20
    assert np.allclose(rewards, expected, rtol=1e-15)
    assert np.allclose(rewards.sum(1), scores - 0.1 * kl.sum(1), rtol=1e-13)  # Ziegler et al. 2019, eq. 2


def test_rows_without_a_response_have_no_last_token_and_no_reward():
    mask = np.array([[0, 1, 0], [0, 0, 0]])
    assert L.last_token(mask).tolist() == [1, -1]
    zero = np.zeros((2, 3), np.float32)
    for junk in (np.nan, 1e300):
        rewards, _ = L.kl_rewards(np.array([1.0, junk]), zero, zero, mask, 0.1)
        assert np.array_equal(rewards, [[0, 1, 0], [0, 0, 0]])


# ------------------------------------------------------------------ the reward model


@DTYPES
def test_bradley_terry_at_its_extremes(dtype):
    for d, loss, slope in ((800, 0, 0), (-800, 800, -1), (0, LN2, -0.5)):
        w, l = np.array([d / 2], dtype), np.array([-d / 2], dtype)
        value, dw, dl = value_and_gradients(L.reward_loss, w, l)
        assert value == dtype(loss)
        assert dw[0] == slope == -dl[0]
        assert L.reward_loss(w, l, preference=0.0).item() == L.reward_loss(l, w).item()
        if d:
            assert L.reward_loss(w, l, preference=0.5).item() == 400
        for kind in KINDS:
            assert L.ranking_loss(np.stack([w, l], -1), kind=kind).item() == dtype(loss)
    # far out the loss is e^-d, not 0
    assert np.isclose(L.reward_loss(np.array([40.0]), np.zeros(1)).item(), math.exp(-40), rtol=1e-12, atol=0)


@given(SEEDS, st.floats(0, 1), st.floats(-2, 2), st.floats(0, 1))
def test_the_reward_loss_is_its_formula(seed, p, margin, centring):
    w, l = 3 * np.random.default_rng(seed).standard_normal((2, 6))
    d = w - l - margin
    expected = (p * softplus(-d) + (1 - p) * softplus(d)).mean() + centring * ((w + l) ** 2).mean()
    for m, q in ((margin, p), (np.full(6, margin), np.full(6, p))):
        assert np.isclose(L.reward_loss(w, l, m, centring, q).item(), expected, rtol=1e-12)


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 40))
def test_two_responses_are_bradley_terry_bit_for_bit(seed, B):
    for dtype in (np.float32, np.float64):
        scores = (5 * np.random.default_rng(seed).standard_normal((B, 2))).astype(dtype)
        value, dw, dl = value_and_gradients(L.reward_loss, scores[:, 0], scores[:, 1])
        for kind in KINDS:
            loss, gradient = value_and_gradients(lambda r, kind=kind: L.ranking_loss(r, kind=kind), scores)
            assert loss == value
            assert np.array_equal(gradient, np.stack([dw, dl], -1))


def test_all_pairs_in_one_pass_are_the_mean_over_pairs():
    scores = np.random.default_rng(9).standard_normal((3, 5))
    pairs = [L.reward_loss(scores[:, i], scores[:, j]).item() for i, j in itertools.combinations(range(5), 2)]
    assert np.isclose(L.ranking_loss(scores).item(), np.mean(pairs), rtol=1e-14)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_rankings_are_a_probability_distribution(K):
    """e^-loss is the probability of a ranking (of a best response): over all of them it adds up to 1."""
    scores = 2 * np.random.default_rng(K).standard_normal(K)
    orders = np.array(list(itertools.permutations(range(K))))
    p = [math.exp(-L.ranking_loss(scores[list(order)], kind="plackett_luce").item()) for order in orders]
    assert np.isclose(sum(p), 1, rtol=1e-12)
    best = [math.exp(-L.ranking_loss(np.roll(scores, -k), kind="best_of_k").item()) for k in range(K)]
    assert np.allclose(best, softmax(scores), rtol=1e-12)
    first = [sum(q for q, order in zip(p, orders, strict=True) if order[0] == k) for k in range(K)]
    assert np.allclose(first, best, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_responses_of_one_rank_are_not_compared(kind):
    """Two bests, then one, then two: what each of the three losses sums over, written out."""
    r, ranks = np.random.default_rng(4).standard_normal(5), np.array([0, 0, 1, 2, 2])
    pairs = [(i, j) for i in range(5) for j in range(5) if ranks[i] < ranks[j]]
    term = lambda i: np.logaddexp.reduce([r[i], *r[ranks > ranks[i]]]) - r[i]  # drawn before all that are worse
    expected = {
        "pairs": np.mean([np.logaddexp(0, r[j] - r[i]) for i, j in pairs]),
        "plackett_luce": sum(term(i) for i in range(3)),
        "best_of_k": term(0) + term(1),
    }[kind]
    assert len(pairs) == 8
    loss, gradient = value_and_gradients(lambda x: L.ranking_loss(x, kind=kind, ranks=ranks), r)
    assert np.isclose(loss, expected, rtol=1e-13)
    assert abs(gradient.sum()) < 1e-14  # differences alone
    swapped, other = value_and_gradients(lambda x: L.ranking_loss(x, kind=kind, ranks=ranks), r[[1, 0, 2, 4, 3]])
    assert np.isclose(swapped, loss, rtol=1e-13)
    assert np.allclose(other, gradient[[1, 0, 2, 4, 3]], rtol=1e-12)
    # An invalid best one leaves the others' ranks as they are.
    mask = np.array([False, False, True, True, True])
    alone = L.ranking_loss(r[2:], kind=kind, ranks=ranks[2:]).item()
    assert np.isclose(L.ranking_loss(r, mask, kind, ranks=ranks).item(), alone, rtol=1e-13)
    assert L.ranking_loss(r, kind=kind, ranks=np.zeros(5, int)).item() == 0  # nothing is compared


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@settings(max_examples=20)
def test_ragged_rankings_are_the_valid_ones_and_prompts_weigh_the_same(kind, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 5)) < 0.6
    scores = rng.standard_normal((6, 5))
    alone = [L.ranking_loss(r[m][None], kind=kind).item() for r, m in zip(scores, mask, strict=True) if m.sum() > 1]
    assert np.isclose(L.ranking_loss(scores, mask, kind).item(), np.mean(alone) if alone else 0, rtol=1e-12)
    shifted = scores + 100 * rng.standard_normal((6, 1))  # r(x, y) + c(x)
    assert np.isclose(L.ranking_loss(shifted, mask, kind).item(), L.ranking_loss(scores, mask, kind).item(), rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@DTYPES
def test_rankings_at_their_extremes(kind, dtype):
    right, wrong = np.array([800, 0, -800], dtype), np.array([-800, 0, 800], dtype)
    assert value_and_gradients(lambda r: L.ranking_loss(r, kind=kind), right)[0] == 0
    loss, gradient = value_and_gradients(lambda r: L.ranking_loss(r, kind=kind), wrong)
    expected, slopes = {
        "pairs": ((800 + 800 + 1600) / 3, [-2 / 3, 0, 2 / 3]),
        "plackett_luce": (1600 + 800, [-1, -1, 2]),
        "best_of_k": (1600, [-1, 0, 1]),
    }[kind]
    assert np.isclose(loss, expected, rtol=1e-6)
    assert np.allclose(gradient, slopes, rtol=1e-6)


def test_the_reward_model_finds_the_scores_behind_the_preferences():
    truth = np.array([0.0, 0.7, -1.1, 1.9])
    i, j = np.array(list(itertools.combinations(range(4), 2))).T
    p = sigmoid(truth[i] - truth[j])
    scores = Tensor(np.full(4, 5.0), requires_grad=True)
    for _ in range(400):
        scores.grad = None
        L.reward_loss(scores[i], scores[j], preference=p).backward()
        scores.data -= 4 * scores.grad
    assert np.allclose(scores.data - scores.data[0], truth, atol=1e-8)
    assert np.isclose(scores.data.mean(), 5, rtol=1e-12)  # which differences say nothing about


def test_centring_moves_the_mean_and_leaves_the_difference():
    """At the minimum for one pair, d = logit(p) + m and r_w + r_l = 0."""
    d = logit(0.8) + 0.3
    for w, moved in ((d / 2, 0), (d / 2 + 1, 2)):
        _, dw, dl = value_and_gradients(lambda w, l: L.reward_loss(w, l, 0.3, 0.1, 0.8), [w], [w - d])
        assert np.allclose([dw, dl], 2 * 0.1 * moved, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------ DPO


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@DTYPES
def test_dpo_starts_at_ln_2(kind, smoothing, dtype):
    logp = (-50 * np.random.default_rng(10).random((2, 7))).astype(dtype)
    loss = L.dpo_loss(*logp, *logp, 0.1, kind, label_smoothing=smoothing).item()
    assert abs(loss - LN2) < 1e-6 if dtype == np.float32 else abs(loss - LN2) < 1e-15
    assert not np.any(L.dpo_rewards(*logp, *logp, 0.1))


def test_dpo_gradient_is_the_papers():
    """-beta sigmoid(-h) (grad log pi_w - grad log pi_l), through a policy of 5 outcomes."""
    rng = np.random.default_rng(11)
    theta, reference, beta = rng.standard_normal(5), np.log(softmax(rng.standard_normal(5))), 0.6
    w, l = np.array([0, 1, 4]), np.array([2, 0, 3])

    def loss(theta):
        logp = log_softmax(theta)
        return L.dpo_loss(logp[w], logp[l], reference[w], reference[l], beta)

    value, gradient = value_and_gradients(loss, theta)
    logp, eye = np.log(softmax(theta)), np.eye(5)
    h = beta * ((logp - reference)[w] - (logp - reference)[l])
    assert np.isclose(value, softplus(-h).mean(), rtol=1e-13)
    score = eye - softmax(theta)  # grad log pi(y) = e_y - pi
    expected = (-beta * sigmoid(-h)[:, None] * (score[w] - score[l])).mean(0)
    assert np.allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    chosen, rejected = L.dpo_rewards(Tensor(logp[w]), Tensor(logp[l]), reference[w], reference[l], beta)
    assert np.allclose(chosen - rejected, h, rtol=1e-13)
    assert np.allclose(chosen, beta * (logp - reference)[w], rtol=1e-13)


def test_dpo_is_minimal_at_the_optimum_of_the_kl_regularised_reward():
    """pi* = ref e^(r / beta) / Z, for labels that follow sigmoid(r_i - r_j); and nowhere else nearby."""
    rng = np.random.default_rng(12)
    r, reference, beta = rng.standard_normal(4), np.log(softmax(rng.standard_normal(4))), 0.4
    i, j = np.array(list(itertools.permutations(range(4), 2))).T
    p = sigmoid(r[i] - r[j])

    def population(theta):
        logp = log_softmax(theta)
        losses = [
            L.dpo_loss(logp[i[k : k + 1]], logp[j[k : k + 1]], reference[i[k : k + 1]], reference[j[k : k + 1]], beta)
            * p[k]
            for k in range(len(i))
        ]
        return sum(losses[1:], losses[0])

    best, gradient = value_and_gradients(population, reference + r / beta)
    assert np.abs(gradient).max() < 1e-14
    assert value_and_gradients(population, reference + r / beta + 0.1 * rng.standard_normal(4))[0] > best
    assert np.abs(value_and_gradients(population, reference + 2 * r / beta)[1]).max() > 1e-3


def slope(kind, delta, beta, p, **options):
    """d/d(u_w - u_l) of the loss under labels that are right with probability p, at u_w - u_l = delta."""
    zero = np.zeros(1)

    def loss(w):
        kept = L.dpo_loss(w, zero, zero, zero, beta, kind, **options)
        return kept * p + L.dpo_loss(zero, w, zero, zero, beta, kind, **options) * (1 - p)

    return value_and_gradients(loss, np.array([float(delta)]))[1][0]


@pytest.mark.parametrize("p", [0.6, 0.9, 1.0])
@pytest.mark.parametrize("e", [0.1, 0.3])
def test_conservative_dpo_has_a_finite_optimum(p, e):
    beta = 0.5
    optimum = logit(p * (1 - e) + (1 - p) * e) / beta
    assert abs(slope("sigmoid", optimum, beta, p, label_smoothing=e)) < 1e-15
    assert slope("sigmoid", optimum - 1e-3, beta, p, label_smoothing=e) < -1e-6
    assert slope("sigmoid", optimum + 1e-3, beta, p, label_smoothing=e) > 1e-6
    if p == 1:  # where plain DPO's and robust DPO's margin grows for ever
        for delta in (1, 10, 60):
            assert slope("sigmoid", delta, beta, 1) < 0
            assert slope("robust", delta, beta, 1, label_smoothing=e) < 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 1.0])
def test_ipo_has_a_finite_optimum_without_smoothing(p):
    tau = 0.3
    assert abs(slope("ipo", (p - 0.5) / tau, tau, p)) < 1e-14
    assert slope("ipo", (p - 0.5) / tau + 0.01, tau, p) > 0.01


@given(st.floats(-30, 30), st.floats(0, 0.45), st.floats(0.05, 2))
def test_robust_dpo_is_dpo_without_flips_on_average(delta, e, beta):
    w, zero = np.array([delta]), np.zeros(1)
    kept = L.dpo_loss(w, zero, zero, zero, beta, "robust", label_smoothing=e).item()
    flipped = L.dpo_loss(zero, w, zero, zero, beta, "robust", label_smoothing=e).item()
    clean = L.dpo_loss(w, zero, zero, zero, beta).item()
    assert abs((1 - e) * kept + e * flipped - clean) < 1e-12 * max(1, abs(kept), abs(flipped))
    assert np.isclose(
        kept, ((1 - e) * softplus(-beta * delta) - e * softplus(beta * delta)) / (1 - 2 * e), rtol=1e-10, atol=1e-12
    )


def test_dpos_kinds_are_their_formulas():
    rng = np.random.default_rng(13)
    w, l = 3 * rng.standard_normal((2, 5))
    u = (w - REFERENCE[0]) - (l - REFERENCE[1])
    e, n = 0.1, [x.astype(float) for x in LENGTHS]
    means = (w - REFERENCE[0]) / n[0] - (l - REFERENCE[1]) / n[1]
    expected = {
        "sigmoid": softplus(-0.7 * u),
        "cdpo": (1 - e) * softplus(-0.7 * u) + e * softplus(0.7 * u),
        "robust": (0.8 * softplus(-0.7 * u) - 0.2 * softplus(0.7 * u)) / 0.6,
        "hinge": np.maximum(0, 1 - 0.7 * u),
        "ipo": (u - 1 / (2 * 0.7)) ** 2,
        "ipo mean": (means - 0.2 / 0.7 - 1 / (2 * 0.7)) ** 2,
        "simpo": softplus(-(2.0 * (w / n[0] - l / n[1]) - 0.5)),
    }
    for name, value in expected.items():
        assert np.isclose(PAIRS[name](w, l).item(), value.mean(), rtol=1e-12), name


def test_ipo_means_and_sums_differ_and_agree_on_length_one():
    w, l = np.random.default_rng(14).standard_normal((2, 5))
    ones = np.ones(5, int)

    def ipo(**options):
        return value_and_gradients(lambda w, l: L.dpo_loss(w, l, *REFERENCE, 0.2, "ipo", **options), w, l)

    for a, b in zip(ipo(), ipo(normalize="mean", lengths=(ones, ones)), strict=True):
        assert np.array_equal(a, b)
    value, dw, _ = ipo(normalize="mean", lengths=(5 * ones, 5 * ones))
    assert np.isclose(value, ((((w - REFERENCE[0]) - (l - REFERENCE[1])) / 5 - 2.5) ** 2).mean(), rtol=1e-12)
    assert not np.allclose(dw, ipo()[1], rtol=0.5)
    none = L.dpo_loss(np.zeros(5), l, np.zeros(5), REFERENCE[1], 0.2, normalize="mean", lengths=(0 * ones, ones))
    assert math.isfinite(none.item())


@DTYPES
def test_dpo_at_its_extremes(dtype):
    zero = np.zeros(1, dtype)

    def at(h, kind, **options):
        w = np.array([2 * h], dtype)
        value, dw, dl = value_and_gradients(lambda w, l: L.dpo_loss(w, l, zero, zero, 0.5, kind, **options), w, zero)
        assert dw.dtype == dtype and np.isclose(dw[0], -dl[0], rtol=1e-6)
        return value, dw[0]

    assert at(800, "sigmoid") == (0, 0)
    assert at(-800, "sigmoid") == (800, -0.5)
    assert np.allclose(at(800, "sigmoid", label_smoothing=0.25), (200, 0.125), rtol=1e-6)
    assert np.allclose(at(-800, "sigmoid", label_smoothing=0.25), (600, -0.375), rtol=1e-6)
    assert np.allclose(at(800, "robust", label_smoothing=0.25), (-400, -0.25), rtol=1e-6)
    assert np.allclose(at(-800, "robust", label_smoothing=0.25), (1200, -0.75), rtol=1e-6)
    assert at(800, "hinge") == (0, 0)
    assert at(-800, "hinge") == (801, -0.5)
    assert at(800, "ipo") == (1599**2, 2 * 1599)
    assert at(-800, "ipo") == (1601**2, -2 * 1601)


def test_options_out_of_range_are_named():
    x, y = np.zeros(3), np.ones((3, 1))
    mask = np.ones((3, 1), bool)
    calls = [
        (lambda: L.dpo_loss(x, x, x, x, 0.0), "beta must be more than 0, and is 0"),
        (lambda: L.dpo_loss(x, x, x, x, 0.1, "sigmod"), "'robust', 'hinge', 'ipo', and is 'sigmod'"),
        (lambda: L.dpo_loss(x, x, x, x, 0.1, label_smoothing=0.5), r"in \[0, 0.5\), and is 0.5"),
        (lambda: L.dpo_loss(x, x, x, x, 0.1, "ipo", label_smoothing=0.1), "no label_smoothing for kind 'ipo'"),
        (lambda: L.dpo_loss(x, x, x, x, 0.1, "ipo", normalize="mean"), "goes with lengths"),
        (lambda: L.dpo_loss(x, x, x, x, 0.1, "ipo", lengths=(x, x)), "'sum' with none"),
        (lambda: L.dpo_loss(x, x, x, x, 0.1, normalize="token"), "'sum', 'mean', and is 'token'"),
        (lambda: L.dpo_loss(x, x, x, None, 0.1), "both reference"),
        (lambda: L.dpo_loss(x, x[:1], x, x, 0.1), r"policy_rejected \(1,\) does not go with policy_chosen \(3,\)"),
        (lambda: L.dpo_loss(x, x, x[:1], x, 0.1), r"reference_chosen \(1,\) does not go with the batch \(3,\)"),
        (lambda: L.dpo_rewards(x, x, x, y, 0.1), r"reference \(3, 1\) does not go with policy \(3,\)"),
        (lambda: L.reward_loss(x, y), r"rejected \(3, 1\) does not go with chosen \(3,\)"),
        (lambda: L.reward_loss(x, x, margin=y), r"margin \(3, 1\) does not go with the batch \(3,\)"),
        (lambda: L.reward_loss(x, x, preference=1.1), r"outside \[0, 1\]"),
        (lambda: L.reward_loss(x, x, preference=np.array([0.5, np.nan, 1])), r"outside \[0, 1\]"),
        (lambda: L.ranking_loss(y, kind="listwise"), "kind must be one of 'pairs'"),
        (lambda: L.sequence_logprobs(y, mask, "total"), "normalize must be one of"),
        (lambda: L.kl_estimate(x, x, "k4"), "kind must be one of 'k1', 'k2', 'k3', and is 'k4'"),
        (lambda: L.kl_rewards(y, y, y, mask, 0.1), r"scores \(3, 1\) must have one entry per row of mask \(3, 1\)"),
        (lambda: L.gae(y, y, mask, gamma=1.1), r"gamma must be in \[0, 1\]"),
        (lambda: L.gae(y, y, mask, lam=-0.1), r"lam must be in \[0, 1\]"),
        (lambda: L.ppo_policy_loss(y, y, y, mask, 0), "ppo_policy_loss: clip must be more than 0"),
        (lambda: L.ppo_value_loss(y, y, y, mask, -1), "ppo_value_loss: clip must be more than 0"),
        (lambda: L.AdaptiveKL(-1), "coefficient must be at least 0"),
        (lambda: L.AdaptiveKL(1, 0.0), "target and horizon more than 0"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda t: L.dpo_loss(x, x, t, x, 0.1),
        lambda t: L.dpo_rewards(x, x, x, t, 0.1),
        lambda t: L.reward_loss(x, x, margin=t),
        lambda t: L.kl_rewards(t, y, y, mask, 0.1),
    ):
        with pytest.raises(TypeError, match=r"carries no gradient and must be an array; use tensor\.data"):
            call(Tensor(x))


# ------------------------------------------------------------------ estimates of the KL divergence

REF = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
THETA = np.array([-0.3, 0.8, 0.1, -1.2])


def expected_gradient(kind):
    """E_pi[grad_theta k(x)], exactly, with x held fixed as a sample is."""
    theta = Tensor(THETA.copy(), requires_grad=True)
    k = L.kl_estimate(log_softmax(theta), REF, kind)
    k.backward(softmax(THETA))
    return theta.grad


def kl_and_gradient(forward):
    """KL(ref || pi) if forward, else KL(pi || ref), and its gradient in theta."""
    pi, ref = softmax(THETA), np.exp(REF)
    if forward:
        return (ref * (REF - np.log(pi))).sum(), pi - ref
    kl = (pi * (np.log(pi) - REF)).sum()
    return kl, pi * (np.log(pi) - REF - kl)


def test_the_estimators_values():
    pi = softmax(THETA)
    logp = np.log(pi)
    k1, k2, k3 = (L.kl_estimate(logp, REF, kind) for kind in ("k1", "k2", "k3"))
    ratio = np.exp(REF) / pi
    assert np.allclose(k1, -np.log(ratio), rtol=1e-13)
    assert np.allclose(k2, np.log(ratio) ** 2 / 2, rtol=1e-13)
    assert np.allclose(k3, ratio - 1 - np.log(ratio), rtol=1e-12)
    kl, _ = kl_and_gradient(forward=False)
    assert np.isclose(pi @ k1, kl, rtol=1e-13)  # unbiased, and k2 is not
    assert np.isclose(pi @ k3, kl, rtol=1e-13)
    assert abs(pi @ k2 - kl) > 0.01 * kl
    assert (k1 < 0).any() and (k3 >= 0).all()
    assert pi @ (k3 - kl) ** 2 < pi @ (k1 - kl) ** 2


def test_the_estimators_gradients():
    """As a loss, k1 has gradient 0, k2 that of KL(pi || ref), k3 that of the other direction, KL(ref || pi)."""
    _, reverse = kl_and_gradient(forward=False)
    _, forward = kl_and_gradient(forward=True)
    assert np.abs(expected_gradient("k1")).max() < 1e-15
    assert np.allclose(expected_gradient("k2"), reverse, rtol=1e-12, atol=1e-15)
    assert np.allclose(expected_gradient("k3"), forward, rtol=1e-12, atol=1e-15)
    assert not np.allclose(forward, reverse, rtol=0.2)


def policy_gradient(theta, reward):
    """grad of E_pi[reward(x)], reward held fixed: E_pi[reward grad log pi]."""
    pi = softmax(theta)
    return pi * (reward - pi @ reward)


def penalised(theta, scores, beta, kind):
    """The reward of each outcome as a response of one token."""
    logp, ones = np.log(softmax(theta))[:, None], np.ones((len(theta), 1), bool)
    if kind == "k1":
        return L.kl_rewards(scores, logp, REF[:, None], ones, beta)[0][:, 0]
    return scores - beta * L.kl_estimate(logp, REF[:, None], kind)[:, 0]


def climbed(theta, scores, beta, kind, steps=3000):
    for _ in range(steps):
        theta = theta + policy_gradient(theta, penalised(theta, scores, beta, kind))
    return softmax(theta)


def test_k1_in_the_reward_finds_the_regularised_optimum_and_k3_does_not():
    scores, beta = np.array([0.2, -0.5, 0.4, 0.1]), 0.5
    best = REF + scores / beta  # pi* = ref e^(r / beta) / Z
    target = softmax(best)
    assert np.allclose(climbed(THETA, scores, beta, "k1"), target, atol=1e-8)
    assert np.abs(policy_gradient(best, penalised(best, scores, beta, "k1"))).max() < 1e-15
    assert np.abs(policy_gradient(best, penalised(best, scores, beta, "k3"))).max() > 1e-3
    assert np.abs(climbed(THETA, scores, beta, "k3", steps=300) - target).max() > 0.05


def test_k1_in_the_reward_restores_the_reference_and_k3_does_not():
    """Without a score, E[k3 grad log pi] = grad KL(pi || ref) - grad KL(ref || pi): zero to first order about ref."""
    nothing, beta = np.zeros(4), 0.5
    _, reverse = kl_and_gradient(forward=False)
    _, forward = kl_and_gradient(forward=True)
    assert np.allclose(policy_gradient(THETA, penalised(THETA, nothing, 1, "k1")), -reverse, atol=1e-15)
    assert np.allclose(policy_gradient(THETA, penalised(THETA, nothing, 1, "k3")), forward - reverse, atol=1e-14)
    near = REF + 1e-3 * THETA
    pull = [np.abs(policy_gradient(near, penalised(near, nothing, beta, kind))).max() for kind in ("k1", "k3")]
    assert pull[1] < 1e-2 * pull[0]
    start = np.abs(softmax(THETA) - np.exp(REF)).max()
    assert np.abs(climbed(THETA, nothing, beta, "k1") - np.exp(REF)).max() < 1e-8
    assert np.abs(climbed(THETA, nothing, beta, "k3") - np.exp(REF)).max() > 0.5 * start


@DTYPES
def test_the_estimators_at_their_extremes(dtype):
    d = np.array([-800, -30, -1e-3, 0, 1e-3, 30, 800], dtype)
    zero = np.zeros_like(d)
    for kind in ("k1", "k2", "k3"):
        leaf = Tensor(d.copy(), requires_grad=True)
        k = L.kl_estimate(leaf, zero, kind)
        k.backward(np.ones_like(d))
        assert np.isfinite(k.data).all() and np.isfinite(leaf.grad).all()
        if kind != "k1":
            assert (k.data >= 0).all()
            assert np.array_equal(np.sign(leaf.grad), np.sign(d))  # downhill is towards d = 0
    assert k.data[-1] == 799
    # where k3 is about d^2 / 2 and e^-d - 1 + d would have no digit left in float32
    exact = np.float64(d[[2, 4]]) ** 2 / 2 - np.float64(d[[2, 4]]) ** 3 / 6
    assert np.allclose(k.data[[2, 4]], exact, rtol=2e-4)
    edge = np.array([-20.0, np.nextafter(-20, -21)])  # the tangent begins where the exponential ends
    assert np.isclose(*L.kl_estimate(edge, np.zeros(2), "k3"), rtol=1e-12)
    beyond = L.kl_estimate(np.array([-20.0, -21.0]), np.zeros(2), "k3")
    assert np.isclose(beyond[1] - beyond[0], math.exp(20) - 1, rtol=1e-12)


# ------------------------------------------------------------------ generalised advantages


def gae_by_definition(rewards, values, mask, gamma, lam):
    advantages = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        at = np.flatnonzero(row)
        v = [*values[b, at], 0.0]
        delta = [rewards[b, t] + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
    return advantages


@given(SEEDS, st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_is_its_definition(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 9)) < rng.choice([0.3, 0.7, 1.0])
    rewards, values = rng.standard_normal((2, 4, 9))
    advantages, returns = L.gae(rewards, values, mask, gamma, lam)
    assert np.allclose(advantages, gae_by_definition(rewards, values, mask, gamma, lam), rtol=1e-10, atol=1e-12)
    assert np.allclose(returns, np.where(mask, advantages + values, 0), rtol=1e-14)


def test_gae_at_both_ends_of_lambda():
    rng = np.random.default_rng(15)
    rewards, values = rng.standard_normal((2, 1, 6))
    mask = np.array([[0, 0, 1, 1, 1, 0]], bool)  # two tokens of prompt, one of padding
    r, v = rewards[0, 2:5], values[0, 2:5]
    temporal, _ = L.gae(rewards, values, mask, 0.9, 0.0)
    assert np.allclose(temporal[0, 2:5], [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]], rtol=1e-13)
    _, monte_carlo = L.gae(rewards, values, mask, 0.9, 1.0)
    assert np.allclose(monte_carlo[0, 2:5], [r[0] + 0.9 * r[1] + 0.81 * r[2], r[1] + 0.9 * r[2], r[2]], rtol=1e-13)
    assert L.gae(rewards.astype(np.float32), values.astype(np.float32), mask)[0].dtype == np.float32
    whole = L.gae(np.array([[0, 0, 1]]), np.array([[1, 2, 3]]), np.ones((1, 3)), 1.0, 1.0)  # whole numbers
    assert np.array_equal(whole, [[[0, -1, -2]], [[1, 1, 1]]])


# ------------------------------------------------------------------ PPO


@pytest.mark.parametrize(
    "advantage, ratio, objective, slope",
    [  # clip 0.2; slope: of the loss in log pi
        (+2, 1.5, -2 * 1.2, 0),  # already more likely: nothing to gain
        (+2, 1.1, -2 * 1.1, -2 * 1.1),
        (+2, 1.0, -2 * 1.0, -2 * 1.0),
        (+2, 0.5, -2 * 0.5, -2 * 0.5),  # a good token has become less likely: bring it back
        (-2, 1.5, +2 * 1.5, +2 * 1.5),  # a bad one more likely: take it back
        (-2, 0.9, +2 * 0.9, +2 * 0.9),
        (-2, 0.5, +2 * 0.8, 0),  # already less likely
        (0, 1.5, 0, 0),
    ],
)
def test_the_policys_clip(advantage, ratio, objective, slope):
    old, mask = np.array([[-1.5]]), np.ones((1, 1), bool)
    a = np.array([[float(advantage)]])
    value, gradient = value_and_gradients(lambda x: L.ppo_policy_loss(x, old, a, mask, 0.2), old + math.log(ratio))
    assert np.isclose(value, objective, rtol=1e-14)
    assert np.isclose(gradient[0, 0], slope, rtol=1e-13)
    _, statistics = L.ppo_policy_loss(old + math.log(ratio), old, a, mask, 0.2)
    assert statistics["clipfrac"] == (slope == 0 and advantage != 0)


@pytest.mark.parametrize(
    "value, target, clipped, slope",
    [  # V_old = 1, clip 0.2
        (1.5, 3.0, 1.2, 0),  # moved too far, towards the target
        (1.5, 0.0, 1.5, 1.5),  # too far, away from it
        (0.5, -3.0, 0.8, 0),
        (0.5, 2.0, 0.5, -1.5),
        (1.1, 3.0, 1.1, -1.9),  # inside
        (0.9, 0.0, 0.9, 0.9),
        (1.0, 3.0, 1.0, -2.0),
        (2.0, 1.7, 1.2, 0),  # beyond the target, but nearer than at the clip
        (2.0, 1.3, 2.0, 0.7),  # beyond, and further than at the clip
    ],
)
def test_the_values_clip(value, target, clipped, slope):
    old, mask, target = np.ones((1, 1)), np.ones((1, 1), bool), np.array([[target]])
    v = np.array([[value]])
    loss, gradient = value_and_gradients(lambda x: L.ppo_value_loss(x, old, target, mask, 0.2), v)
    assert np.isclose(loss, 0.5 * (clipped - target[0, 0]) ** 2, rtol=1e-14)
    assert np.isclose(gradient[0, 0], slope, rtol=1e-13)
    assert L.ppo_value_loss(v, old, target, mask, 0.2)[1]["clipfrac"] == (slope == 0)
    free, gradient = value_and_gradients(lambda x: L.ppo_value_loss(x, old, target, mask, math.inf), v)
    assert np.isclose(free, 0.5 * (value - target[0, 0]) ** 2, rtol=1e-14)
    assert np.isclose(gradient[0, 0], value - target[0, 0], rtol=1e-13)


def test_the_first_update_is_the_policy_gradient():
    """Where pi = pi_old: the ratio is 1, nothing is clipped, and the gradient is -mean A grad log pi."""
    rng = np.random.default_rng(16)
    logp, a = rng.standard_normal((2, 4, 6)).astype(np.float32)
    mask = some_mask(rng)
    loss, gradient = value_and_gradients(lambda x: L.ppo_policy_loss(x, logp, a, mask), logp)
    assert np.isclose(loss, -a[mask].mean(), rtol=1e-6)
    assert np.allclose(gradient, np.where(mask, -a / mask.sum(), 0), rtol=1e-6)
    _, statistics = L.ppo_policy_loss(logp, logp, a, mask)
    ones = ("ratio", "ratio_max")
    assert statistics == {name: float(name in ones) for name in statistics}


def test_the_policys_statistics():
    rng = np.random.default_rng(17)
    logp, old, a = rng.standard_normal((3, 5, 7))
    mask = some_mask(rng, (5, 7))
    _, statistics = L.ppo_policy_loss(logp, old, a, mask, 0.2)
    d, a = (logp - old)[mask], a[mask]
    r = np.exp(d)
    expected = {
        "clipfrac": (((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))).mean(),
        "ratio": r.mean(),
        "ratio_var": ((r - 1) ** 2).mean(),
        "approx_kl_k1": -d.mean(),
        "approx_kl_k2": (d**2).mean() / 2,
        "approx_kl_k3": (r - 1 - d).mean(),
        "ratio_max": r.max(),
    }
    assert statistics.keys() == expected.keys()
    for name, value in expected.items():
        assert np.isclose(statistics[name], value, rtol=1e-12), name


@DTYPES
@pytest.mark.parametrize("advantage, d", [(1, 800), (1, -800), (-1, 800), (-1, -800)])
def test_the_policy_loss_at_its_extremes(dtype, advantage, d):
    old, mask = np.full((1, 2), -900, dtype), np.ones((1, 2), bool)
    logp, a = old + dtype(d), np.full((1, 2), advantage, dtype)
    value, gradient = value_and_gradients(lambda x: L.ppo_policy_loss(x, old, a, mask), logp)
    expected = {(1, 800): -1.2, (1, -800): -math.exp(-20), (-1, 800): math.exp(20), (-1, -800): 0.8}
    assert np.isclose(value, expected[advantage, d], rtol=1e-6)
    assert not gradient.any()  # clipped, or beyond the clamp of the log-ratio
    _, statistics = L.ppo_policy_loss(logp, old, a, mask)
    assert all(np.isfinite(s) for s in statistics.values())


# ------------------------------------------------------------------ the KL coefficient


@pytest.mark.parametrize(
    "kl, steps, factor",
    [
        (6.0, 100, 1.0),
        (6.6, 100, 1 + 0.1 * 100 / 10_000),
        (5.4, 100, 1 - 0.1 * 100 / 10_000),
        (60.0, 100, 1 + 0.2 * 100 / 10_000),  # the error is clipped at 0.2
        (0.0, 100, 1 - 0.2 * 100 / 10_000),
        (-1.0, 256, 1 - 0.2 * 256 / 10_000),  # an estimate may be negative
        (math.inf, 256, 1 + 0.2 * 256 / 10_000),
    ],
)
def test_the_adaptive_coefficient(kl, steps, factor):
    controller, fixed = L.AdaptiveKL(0.15, 6.0, 10_000), L.AdaptiveKL(0.15)
    assert np.isclose(controller.update(np.float32(kl), steps), 0.15 * factor, rtol=1e-7)
    assert controller.coefficient == controller.update(6.0, steps)
    assert fixed.update(kl, steps) == fixed.coefficient == 0.15
    again = L.AdaptiveKL(1.0, 6.0)
    again.load_state_dict(controller.state_dict())
    assert again.update(7.0, 10) == controller.update(7.0, 10)


def test_the_adaptive_coefficient_refuses_what_would_spoil_it():
    controller = L.AdaptiveKL(0.15, 6.0, 1000)
    with pytest.raises(ValueError, match="the KL is NaN"):
        controller.update(math.nan, 10)
    with pytest.raises(ValueError, match="5000 responses at once are too many for a horizon of 1000"):
        controller.update(1.0, 5000)
    assert controller.coefficient == 0.15


def test_the_adaptive_coefficient_settles_at_its_target():
    """On a policy whose KL falls as beta rises, as 1 / beta^2."""
    controller = L.AdaptiveKL(0.01, 6.0, 1000)
    for _ in range(2000):
        controller.update(0.06 / controller.coefficient**2, 100)
    assert np.isclose(controller.coefficient, 0.1, rtol=1e-6)


def test_gradients_reach_the_logits_through_everything():
    """The whole of a PPO loss: log-probabilities, entropy bonus and values of one linear head."""
    rng = np.random.default_rng(18)
    hidden, weight, head = rng.standard_normal((2, 5, 3)), rng.standard_normal((7, 3)), rng.standard_normal((1, 3))
    ids, mask = rng.integers(0, 7, (2, 5)), some_mask(rng, (2, 5))
    mask[1, 2:4] = True
    old, a, old_v, returns = rng.standard_normal((4, 2, 5))
    targets = np.where(mask, ids, -100)

    def loss(hidden, weight, head):
        logp, entropy = F.linear_token_logprobs(hidden, weight, targets, entropy=True)
        values = F.linear(hidden, head).reshape(2, 5)
        policy, _ = L.ppo_policy_loss(logp, old - 2, a, mask, 0.2, 11)
        value, _ = L.ppo_value_loss(values, old_v, returns, mask, 0.2, 11)
        return policy + value * 0.1 - L.masked_mean(entropy, mask, 11) * 0.01

    gradcheck(loss, hidden, weight, head, rng=rng)
    _, (dhidden, *_) = vjp(loss, [hidden, weight, head], [np.array(1.0)])
    assert dhidden[mask].all() and not dhidden[~mask].any()
