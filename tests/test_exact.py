"""PPO, DPO and the reward model on spaces small enough to write down: the trainers' own functions reach the optimum
that theory names, and change nothing that they should not. Only the toys are the tests' own."""

import dataclasses
import itertools
import json
import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

from minillm.autograd import Tensor, no_grad
from minillm.data.conversations import Preference, Ranking, encode_preferences, pairs
from minillm.generate import generate
from minillm.hub import load_pretrained
from minillm.losses import kl_estimate, last_token
from minillm.model import Config, Llama
from minillm.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer
from minillm.trainers import dpo, ppo, reward
from minillm.trainers.common import frozen_logprobs, pad, save_model, token_logprobs
from minillm.trainers.run import Run

LN2 = math.log(2)
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]

# ------------------------------------------------------------------ toys

V = 3
PROMPTS = [(0, 1), (1, 2, 0)]  # of two lengths; attention would not tell (2,) from (2, 2), so a prompt is of two tokens
ANSWERS = list(itertools.product(range(V), repeat=2))
ROWS = [(x, y) for x in range(len(PROMPTS)) for y in range(len(ANSWERS))]
PREFIXES = [p + a for p in PROMPTS for n in (0, 1, 2) for a in itertools.product(range(V), repeat=n)]


class Tabular:
    """A model with a free number for each output after each prefix: its hidden state says which prefix it has read
    (nothing, for one that is not in PREFIXES), and its head (outputs, prefixes) is the table."""

    def __init__(self, table, pooling="last"):
        self.config = SimpleNamespace(max_position_embeddings=8, vocab_size=V, pooling=pooling)
        self.head = Tensor(np.array(table, np.float64), requires_grad=True)
        self.parameters = {"table": self.head}
        self.one_hot = np.zeros(((V + 1) ** 6, len(PREFIXES)))
        for place, prefix in enumerate(PREFIXES):
            self.one_hot[sum((token + 1) * (V + 1) ** i for i, token in enumerate(reversed(prefix))), place] = 1

    def hidden(self, tokens, start=None, cache=None):
        code, found = np.zeros(len(tokens), np.int64), []
        for t in range(tokens.shape[1]):
            code = np.where(start[:, t] == t, 0, code) * (V + 1) + tokens[:, t] + 1
            found.append(self.one_hot[code])
        return Tensor(np.stack(found, 1))

    def without_casts(self):
        return self


def tabular(seed, outputs=V, **options):
    return Tabular(np.random.default_rng(seed).standard_normal((outputs, len(PREFIXES))), **options)


def llama(seed=0, vocab_size=V, dtype=np.float32, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"max_position_embeddings": 16, "tie_word_embeddings": False, "initializer_range": 0.1} | sizes | options
    return Llama(Config(vocab_size=vocab_size, **options), seed, dtype)


def copy_of(model):
    if isinstance(model, Tabular):
        return Tabular(model.head.data)
    copy = Llama(model.config, dtype=model.flat.dtype)
    copy.flat[...] = model.flat
    return copy


def shaken(model, size, seed=0):
    """The model, every parameter moved by `size` in a random direction."""
    for i, p in enumerate(model.parameters.values()):
        p.data[...] += size * np.random.default_rng((seed, i)).standard_normal(p.shape)
    return model


def gradients(model):
    """All gradients as one vector, and zero from then on."""
    found = np.concatenate([p.grad.reshape(-1) for p in model.parameters.values()])
    for p in model.parameters.values():
        p.grad[...] = 0
    return found


def answer_probabilities(model):
    """pi(y|x) of every answer (prompts, answers)."""
    sequences = [np.array(PROMPTS[x] + ANSWERS[y]) for x, y in ROWS]
    batch = pad(sequences, [np.arange(len(s)) >= len(s) - 2 for s in sequences], 0)
    logp = frozen_logprobs(model, batch).astype(np.float64).sum(1)
    return np.exp(logp).reshape(len(PROMPTS), len(ANSWERS))


def optimum(reference, scores, beta):
    """ref(y|x) exp(r(x, y) / beta) / Z(x)."""
    p = answer_probabilities(reference) * np.exp(scores / beta)
    return p / p.sum(1, keepdims=True)


def distance(p, q):
    """Total variation, of the prompt where it is largest."""
    return 0.5 * np.abs(p - q).sum(1).max()


def settings(cls, folder, **options):
    files = {"data": (folder,)} if cls is not ppo.PPOConfig else {"reward": folder, "prompts": (folder,)}
    quiet = {"samples": 0, "log_every": 10**9, "eval_every": 10**9}
    return cls(out=folder, model=folder, **(files | quiet | options))


def ranking(prompt, *answers, **fields):
    """A Ranking of answers to a prompt, as ids."""
    rows = [np.array([*prompt, *answer]) for answer in answers]
    return Ranking([(ids, np.arange(len(ids)) >= len(prompt)) for ids in rows], **fields)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------ PPO finds the optimum


def ppo_distance(policy, scores, config):
    """Train as ppo.train does, on sampled answers; the distance from the optimum, before and after."""
    reference, value_model = copy_of(policy), Tabular(np.zeros((1, len(PREFIXES))))
    optimizers = config.optimizer(policy.parameters), config.optimizer(value_model.parameters)
    asked = np.arange(config.batch_size) % len(PROMPTS)
    best = optimum(reference, scores, config.beta)
    with Run(config, config.episodes // config.batch_size) as run:
        for step in run.steps():
            prompts, cache = [PROMPTS[x] for x in asked], isinstance(policy, Llama)
            batch, answers, _ = ppo.rollout(policy, prompts, config, (), 0, (config.seed, 2, step), cache)
            score = np.array([scores[x, V * ids[-2] + ids[-1]] for x, (ids, _) in zip(asked, answers, strict=True)])
            e = ppo.experience(policy, reference, value_model, batch, score, config, config.beta)
            rng = np.random.default_rng((config.seed, 3, step))
            ppo.update(policy, value_model, e, optimizers, config, run, rng, step >= config.value_warmup)
    return distance(answer_probabilities(reference), best), distance(answer_probabilities(policy), best)


EXACT = {"max_new_tokens": 2, "value_lr": 0.2, "schedule": "cosine", "warmup": 0.0, "lr_floor": 0.0}


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_with_a_table_finds_the_optimum(seed, tmp_path):
    config = settings(ppo.PPOConfig, tmp_path, seed=seed, beta=0.5, lr=0.1, batch_size=256, episodes=256 * 100, **EXACT)
    scores = np.random.default_rng(seed).standard_normal((len(PROMPTS), len(ANSWERS)))
    before, after = ppo_distance(tabular((seed, 1)), scores, config)
    assert before > 0.2
    assert after < 0.002, after


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_with_a_transformer_finds_the_optimum(seed, tmp_path):
    options = {"batch_size": 64, "episodes": 64 * 150, "ppo_epochs": 2, **EXACT}
    config = settings(ppo.PPOConfig, tmp_path, seed=seed, beta=1.0, lr=0.01, **options)
    policy = llama(seed, dtype=np.float64, initializer_range=0.2, num_attention_heads=4)
    scores = np.random.default_rng(seed).uniform(-1, 1, (len(PROMPTS), len(ANSWERS)))
    before, after = ppo_distance(policy, scores, config)
    assert before > 0.2
    assert after < 0.01, after


# ------------------------------------------------------------------ DPO finds the same one


def bradley_terry_pairs(strength):
    """Every ordered pair of answers, as often as the whole number `strength` (prompts, answers) of its first one: then
    P(y_w beats y_l) = s_w / (s_w + s_l) exactly, which is sigmoid(r_w - r_l) with r = log s."""
    found = []
    for x, prompt in enumerate(PROMPTS):
        for w, l in itertools.permutations(range(len(ANSWERS)), 2):
            found += [ranking(prompt, ANSWERS[w], ANSWERS[l])] * strength[x, w]
    return found


STEPS = 400


def descend(model, backward, config, steps):
    """The trainers' loop over one batch that is everything there is."""
    optimizer = config.optimizer(model.parameters)
    for step in range(steps):
        metrics = backward()
        optimizer.step(config.learning_rate(step, steps))
        optimizer.zero_grad()
    return metrics


def test_dpo_on_all_pairs_finds_the_optimum(tmp_path):
    config = settings(dpo.DPOConfig, tmp_path, beta=0.5, lr=0.05, warmup=0.0, lr_floor=0.0, beta2=0.99)
    strength = np.random.default_rng(0).integers(1, 4, (len(PROMPTS), len(ANSWERS)))
    policy = tabular(5)
    examples = dpo.with_reference(policy, bradley_terry_pairs(strength), pad_id=0, rows=10**9)
    best = optimum(policy, np.log(strength), config.beta)
    assert distance(answer_probabilities(policy), best) > 0.1
    descend(policy, lambda: dpo.backward(policy, examples, config, 0), config, STEPS)
    assert distance(answer_probabilities(policy), best) < 1e-4


def ragged_pairs(rng, vocab_size, count=5, context=10):
    """Rankings of two answers of unequal lengths each, to prompts of unequal lengths."""
    found = []
    for _ in range(count):
        lengths = rng.integers(1, context // 2, 3)
        found.append(ranking(*(rng.integers(0, vocab_size, n) for n in lengths)))
    return found


def log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def full_logprobs(model, ids):
    """log p of every token but the first, (n - 1,) float64, from the logits of this sequence alone."""
    with no_grad():
        logits = model(np.array([ids])).data[0].astype(np.float64)
    return log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


def test_dpos_gradient_is_the_papers(tmp_path):
    """Rafailov et al. 2023, section 4: -beta sigmoid(-h) (grad log pi(y_w) - grad log pi(y_l)), a mean over pairs; here
    the two gradients come from a loss of their own, one sequence at a time."""
    model = llama(1, vocab_size=7, dtype=np.float64)
    config = settings(dpo.DPOConfig, tmp_path, beta=0.7)
    examples = dpo.with_reference(llama(2, 7, np.float64), ragged_pairs(np.random.default_rng(0), 7), pad_id=0)
    expected = 0
    for e in examples:
        logps, grads = [], []
        for ids, mask in e.answers:
            logp = token_logprobs(model, pad([ids], [mask], 0)).sum()
            logp.backward()
            logps.append(logp.item())
            grads.append(gradients(model))
        h = config.beta * (logps[0] - e.reference[0] - logps[1] + e.reference[1])
        expected = expected - config.beta * sigmoid(-h) * (grads[0] - grads[1]) / len(examples)
    dpo.backward(model, examples, config, 0)
    found = gradients(model)
    assert np.abs(found - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_dpo_begins_at_ln_2(dtype, tolerance, tmp_path):
    model, config = llama(1, 7, dtype), settings(dpo.DPOConfig, tmp_path, micro_batch_size=2)
    examples = dpo.with_reference(model, ragged_pairs(np.random.default_rng(1), 7, 9), pad_id=0, rows=4)
    metrics = dpo.backward(model, examples, config, 0)
    assert abs(metrics["loss"] - LN2) < tolerance
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(metrics[name]) < tolerance
    same_cut = dpo.with_reference(model, examples, pad_id=0, rows=2)
    metrics = dpo.backward(model, same_cut, config, 0)
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-7)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([], SMALLEST_VOCABULARY)


def test_dpos_logprobs_are_sums_over_the_answer_and_its_end(tokenizer):
    """A prompt in both sums would cancel in the loss, so the sums themselves are looked at."""
    model = llama(3, tokenizer.vocab_size, np.float64, max_position_embeddings=64)
    question = [[{"role": "user", "content": text}] for text in ("How?", "A longer question")]
    preferences = [
        Preference("a:1", question[0], ["yes", "not at all"], 0.0, 1.0),
        Preference("a:2", question[1], ["so", "perhaps", "no"], 0.0, 1.0),
    ]
    examples = pairs(encode_preferences(preferences, "chatml", tokenizer, 64))
    assert len(examples) == 4
    *found, lengths = dpo.pair_logprobs(model, examples, tokenizer.pad_id)
    end = tokenizer.special_tokens["<|im_end|>"]
    texts = [("yes", "not at all"), ("so", "perhaps"), ("so", "no"), ("perhaps", "no")]
    for k in (0, 1):
        for i, e in enumerate(examples):
            answer = [*tokenizer.encode(texts[i][k]), end]
            ids, _ = e.answers[k]
            assert ids[-len(answer) :].tolist() == answer
            expected = full_logprobs(model, ids)[-len(answer) :].sum()
            assert found[k].data[i] == pytest.approx(expected, rel=1e-12)
            assert lengths[k][i] == len(answer)


def test_the_means_of_dpo_are_over_the_answers_tokens(tmp_path):
    model = llama(1, 7, np.float64)
    config = settings(dpo.DPOConfig, tmp_path, beta=0.7, normalize="mean", kind="ipo")
    examples = dpo.with_reference(llama(2, 7, np.float64), ragged_pairs(np.random.default_rng(0), 7), pad_id=0)
    u = []
    for e in examples:
        n = [mask.sum() for _, mask in e.answers]
        u.append([(full_logprobs(model, e.answers[k][0])[-n[k] :].sum() - e.reference[k]) / n[k] for k in (0, 1)])
    u = np.array(u)
    metrics = dpo.backward(model, examples, config, 0)
    assert metrics["loss"] == pytest.approx(((u[:, 0] - u[:, 1] - 0.5 / 0.7) ** 2).mean())
    assert metrics["rewards/chosen"] == pytest.approx(0.7 * u[:, 0].mean())
    assert metrics["rewards/margins"] == pytest.approx(0.7 * (u[:, 0] - u[:, 1]).mean())


# ------------------------------------------------------------------ the reward model finds the scores


def found_scores(model):
    """r(x, y) of every answer (prompts, answers), less each prompt's mean."""
    score = ppo.model_rewards(model, 0, rows=5)
    r = score([ranking(PROMPTS[x], ANSWERS[y]).answers[0] for x, y in ROWS]).reshape(len(PROMPTS), -1)
    return r - r.mean(1, keepdims=True)


@pytest.mark.parametrize("soft, pooling", [(True, "last"), (False, "last"), (True, "mean")])
def test_the_reward_model_finds_the_scores_behind_the_pairs(soft, pooling, tmp_path):
    config = settings(reward.RewardConfig, tmp_path, lr=0.1, warmup=0.0, lr_floor=0.0, weight_decay=0.0, centring=0.0)
    strength = np.random.default_rng(0).integers(1, 4, (len(PROMPTS), len(ANSWERS)))
    examples = bradley_terry_pairs(strength)
    if soft:
        examples = [
            ranking(prompt, ANSWERS[w], ANSWERS[l], preference=s[w] / (s[w] + s[l]))
            for prompt, s in zip(PROMPTS, strength, strict=True)
            for w, l in itertools.combinations(range(len(ANSWERS)), 2)
        ]
    model = tabular(0, outputs=1, pooling=pooling)
    descend(model, lambda: reward.backward(model, examples, config, 0), config, STEPS)
    expected = np.log(strength)
    assert np.abs(found_scores(model) - (expected - expected.mean(1, keepdims=True))).max() < 1e-4


@pytest.mark.parametrize("kind", ["pairs", "plackett_luce", "best_of_k"])
def test_the_reward_model_finds_the_scores_behind_rankings(kind, tmp_path):
    """Rankings of strengths 1, 2, 3, as often as Plackett-Luce draws them: 60 P = 60 (s_1 / 6) (s_2 / (s_2 + s_3))."""
    options = {"lr": 0.1, "warmup": 0.0, "lr_floor": 0.0, "weight_decay": 0.0, "ranking": kind}
    config = settings(reward.RewardConfig, tmp_path, **options)
    examples = []
    for a, b, c in itertools.permutations((1, 2, 3)):
        times = 60 * a / 6 * b / (b + c)
        assert times == int(times)
        examples += [ranking(PROMPTS[0], *(ANSWERS[s] for s in (a, b, c)))] * int(times)
    model = tabular(0, outputs=1)
    descend(model, lambda: reward.backward(model, examples, config, 0), config, 200)
    r = found_scores(model)[0, 1:4]
    assert np.abs(r - r.mean() - (np.log([1, 2, 3]) - np.log([1, 2, 3]).mean())).max() < 1e-4


def test_answers_of_one_rank_are_not_compared(tmp_path):
    """A > {B, C} > D is five of six pairs: for the reward model, its metrics, and DPO."""
    config = settings(reward.RewardConfig, tmp_path)
    example = ranking(PROMPTS[0], *ANSWERS[:4], ranks=(0, 1, 1, 2))
    assert example.compared() == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    found = pairs([example])
    assert [pair.compared() for pair in found] == [[(0, 1)]] * 5
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(
        same(pair.answers[0], example.answers[i]) and same(pair.answers[1], example.answers[j])
        for pair, (i, j) in zip(found, example.compared(), strict=True)
    )
    model = tabular(0, outputs=1)
    r = reward.score_answers(model, [example], 0).data[0]
    margins = np.array([r[i] - r[j] for i, j in example.compared()])
    assert (margins > 0).mean() != (np.append(margins, r[1] - r[2]) > 0).mean()  # the sixth would be seen
    metrics = reward.backward(model, [example], config, 0)
    assert metrics["loss"] == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-12)
    assert metrics["accuracy"] == reward.measure(model, [example], 0)["eval_accuracy"] == (margins > 0).mean()


@pytest.mark.parametrize("kind", ["pairs", "plackett_luce", "best_of_k"])
def test_the_reward_models_loss_and_metrics_are_their_formulas(kind, tmp_path):
    """Margins, soft labels and centring for pairs; the ranking loss for others, of three answers and of four."""
    config = settings(reward.RewardConfig, tmp_path, centring=0.3, ranking=kind)
    examples = [
        ranking(PROMPTS[0], *ANSWERS[:2], margin=0.5, preference=0.8),
        ranking(PROMPTS[1], *ANSWERS[2:5]),
        ranking(PROMPTS[1], *ANSWERS[5:7]),
        ranking(PROMPTS[0], *ANSWERS[4:8]),
    ]
    model = tabular(0, outputs=1)
    model.head.data[0, PREFIXES.index(PROMPTS[1] + ANSWERS[6])] = r = 0.25  # and so the third pair is a tie
    model.head.data[0, PREFIXES.index(PROMPTS[1] + ANSWERS[5])] = r
    rows = reward.score_answers(model, examples, 0).data
    a, b = rows[0, :2]
    soft = np.logaddexp(0, b - a + 0.5) * 0.8 + np.logaddexp(0, a - b - 0.5) * 0.2 + 0.3 * (a + b) ** 2
    tie = LN2 + 0.3 * (2 * r) ** 2
    ranked = []
    for row in (rows[1, :3], rows[3]):
        terms = [np.logaddexp.reduce(row[i:]) - row[i] for i in range(len(row) - 1)]
        every_pair = np.mean([np.logaddexp(0, row[j] - row[i]) for i, j in itertools.combinations(range(len(row)), 2)])
        ranked.append({"pairs": every_pair, "plackett_luce": sum(terms), "best_of_k": terms[0]}[kind])
    metrics = reward.backward(model, examples, config, 0)
    assert metrics["loss"] == pytest.approx((soft + tie + sum(ranked)) / 4, rel=1e-12)
    every = [
        row[i] - row[j]
        for e, row in zip(examples, rows, strict=True)
        for i, j in itertools.combinations(range(len(e.answers)), 2)
    ]
    assert metrics["accuracy"] == pytest.approx((np.greater(every, 0).sum() + 0.5) / 11)
    assert metrics["margin"] == pytest.approx(np.mean(every))
    there = np.concatenate([row[: len(e.answers)] for e, row in zip(examples, rows, strict=True)])
    for name, value in (("min", there.min()), ("mean", there.mean()), ("max", there.max())):
        assert metrics[f"{name}_reward"] == pytest.approx(value)
    found = reward.measure(model, examples, 0)
    assert np.array_equal(
        np.sort(reward.held_margins(model, examples, 0, rows=3)), np.sort(reward.held_margins(model, examples, 0))
    )
    assert len(every) == 1 + 3 + 1 + 6
    assert found["eval_accuracy"] == pytest.approx((np.greater(every, 0).sum() + 0.5) / 11)
    assert found["eval_margin"] == pytest.approx(np.mean(every))
    assert found["eval_loss"] == pytest.approx(np.logaddexp(0, np.negative(every)).mean())


def random_answers(seed, sizes):
    """Answers (ids, mask) of (prompt's tokens, answer's tokens), from a vocabulary of 7."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 7, m + n), np.arange(m + n) >= m) for m, n in sizes]


def test_scores_are_read_at_each_sequences_own_last_token():
    model = llama(0, 7, np.float64, head="scalar")
    answers = random_answers(0, [(1, 2), (4, 5), (0, 1), (5, 1)])
    alone = [model(ids[None]).data[0, -1, 0] for ids, _ in answers]
    assert np.allclose(ppo.model_rewards(model, 0, rows=3)(answers), alone, rtol=1e-12)


def test_pooled_scores_are_means_over_each_answers_own_tokens():
    """Also of turns in several places of one text."""
    model = llama(0, 7, np.float64, head="scalar", pooling="mean")
    answers = random_answers(0, [(1, 2), (4, 5), (0, 1), (5, 1), (2, 9)])
    answers[-1][1][4:7] = False
    alone = [model(ids[None]).data[0, mask, 0].mean() for ids, mask in answers]
    assert np.allclose(ppo.model_rewards(model, 0, rows=3)(answers), alone, rtol=1e-12)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_reward_models_gradient_is_that_of_its_loss(pooling, tmp_path):
    """Against central differences, through the whole model, for pairs and a ranking of three."""
    model = shaken(llama(0, 7, np.float64, head="scalar", pooling=pooling), 0.3)
    config = settings(reward.RewardConfig, tmp_path, centring=0.1)
    made = random_answers(1, [(2, 3), (2, 6), (4, 2), (4, 1), (4, 4), (1, 8), (1, 2)])
    examples = [Ranking(made[:2], 0.5, 0.8), Ranking(made[2:5]), Ranking(made[5:])]
    reward.backward(model, examples, config, 0)
    found, direction, eps = gradients(model), np.random.default_rng(2).standard_normal(model.flat.size), 1e-5
    model.flat += eps * direction
    above = reward.backward(model, examples, config, 0)["loss"]
    model.flat -= 2 * eps * direction
    below = reward.backward(model, examples, config, 0)["loss"]
    assert found @ direction == pytest.approx((above - below) / (2 * eps), rel=1e-7)


# ------------------------------------------------------------------ a round of PPO

EOS, PAD = 5, 6


def experienced(tmp_path, dtype=np.float64, rows=12, moved=0.0, beta=0.1, **options):
    """(policy, value model, experience, ended, config) of a round, with answers of unequal lengths from a vocabulary of
    7. With `moved`, the policy and the value model have been changed since, so that ratios are not 1."""
    policy, value_model = llama(0, 7, dtype, initializer_range=0.5), llama(1, 7, dtype, head="scalar")
    options = {"max_new_tokens": 5, "temperature": 0.8, "batch_size": rows, "episodes": 100 * rows} | options
    config = settings(ppo.PPOConfig, tmp_path, **options)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 5, n) for n in rng.integers(1, 6, rows)]
    batch, _, ended = ppo.rollout(policy, prompts, config, {EOS}, PAD, (7,))
    score = rng.standard_normal(rows)
    reference = shaken(copy_of(policy), 0.1)
    e = ppo.experience(policy, reference, value_model, batch, score, config, beta)
    if moved:
        shaken(policy, moved, 1)
        shaken(value_model, moved, 2)
    return policy, value_model, e, ended, config


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("micro", [0, 1, 5])
def test_the_first_ratio_is_1(dtype, micro, tmp_path):
    policy, _, e, _, config = experienced(tmp_path, dtype, micro_batch_size=micro)
    found = ppo.policy_backward(policy, e, config)
    assert found["ratio_max"] == 1
    assert found["ratio"] == pytest.approx(1, abs=1e-15)  # a mean of ones, in parts
    assert found["ratio_var"] == found["clipfrac"] == 0
    assert found["approx_kl_k1"] == found["approx_kl_k2"] == found["approx_kl_k3"] == 0
    assert found["loss"] == pytest.approx(0, abs=1e-6)  # whitened advantages have mean 0
    assert np.abs(gradients(policy)).max() > 0


def test_a_policy_equal_to_its_reference_has_a_kl_of_0(tmp_path):
    policy, value_model, e, ended, config = experienced(tmp_path, np.float32)
    again = ppo.experience(policy, copy_of(policy), value_model, e.batch, np.ones(len(e.tokens)), config, beta=0.1)
    assert not again.kl.any()
    metrics = ppo.round_metrics(again, ended, beta=0.1)
    assert metrics["objective/kl"] == metrics["objective/non_score_reward"] == 0
    assert metrics["objective/rlhf_reward"] == metrics["objective/scores"] == 1


def stopping_policy(dtype):
    """A policy over 7 tokens of which EOS is one in five or so, whatever stands before it."""
    policy = llama(0, 7, dtype, initializer_range=0.5)
    policy.parameters["lm_head.weight"].data[EOS] *= 0.3
    return policy


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_the_score_lands_on_the_end_of_answers_of_every_length(dtype, tolerance, tmp_path):
    """And log-probabilities by the training forward are those the sampler drew with."""
    policy, value_model = stopping_policy(dtype), llama(1, 7, dtype, head="scalar")
    config = settings(ppo.PPOConfig, tmp_path, max_new_tokens=4, temperature=0.7, missing_eos_penalty=10.25)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 5, n) for n in rng.integers(1, 8, 150)]
    batch, answers, ended = ppo.rollout(policy, prompts, config, {EOS}, PAD, (3, 4))
    drawn = generate(
        policy, prompts, max_new_tokens=4, temperature=0.7, stop_tokens={EOS}, seed=[(3, 4, i) for i in range(150)]
    )
    # a reward that says how many tokens it was shown, and whether the last one was EOS
    told = lambda given: np.array([len(ids) + 0.5 * (ids[-1] == EOS) for ids, _ in given])
    score = ppo.Scorer(told, missing_eos_penalty=10.25)(answers, ended)
    e = ppo.experience(policy, shaken(copy_of(policy), 0.1), value_model, batch, score, config, beta=0.5)

    seen = Counter()
    for i, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True)):
        n, m = len(answer.ids), len(prompt)
        with_eos = answer.ids[-1] == EOS
        seen[n, bool(with_eos)] += 1
        assert e.tokens[i, : m + n].tolist() == answers[i][0].tolist() == [*prompt, *answer.ids]
        assert np.flatnonzero(answers[i][1]).tolist() == list(range(m, m + n))
        assert (e.tokens[i, m + n :] == PAD).all()
        # entry t of every array belongs to tokens[t + 1], so the answer is at m - 1 and behind
        assert np.flatnonzero(e.mask[i]).tolist() == list(range(m - 1, m - 1 + n))
        assert np.flatnonzero(e.score[i]).tolist() == [m + n - 2]
        assert e.score[i, m + n - 2] == score[i] == m + n + (0.5 if with_eos else -10.25)
        assert ended[i] == with_eos
        at = slice(m - 1, m - 1 + n)
        assert np.abs(e.logp[i, at] - answer.logprobs).max() < tolerance
        expected = e.score[i] - 0.5 * (e.logp[i] - e.reference_logp[i])
        assert np.allclose(e.reward[i, at], expected[at], rtol=1e-6)
        assert not e.reward[i][~e.mask[i]].any()
    assert {(1, True), (2, True), (3, True), (4, True), (4, False)} == set(seen)


def test_experience_is_what_the_papers_say(tmp_path):
    """KL, values, advantages and returns of each row, from full logits and the definition of GAE."""
    temperature, gamma, lam, beta = 0.8, 0.9, 0.7, 0.3
    options = {"temperature": temperature, "gamma": gamma, "lam": lam}
    policy, value_model, e, ended, _ = experienced(tmp_path, beta=beta, **options)
    reference, score = shaken(copy_of(policy), 0.1), e.score.sum(1)
    advantages, kls, entropies = [], [], []
    for i, mask in enumerate(e.mask):
        t = np.flatnonzero(mask)
        ids = e.tokens[i, : t[-1] + 2]
        logits = [model(ids[None, :-1]).data[0, t] / temperature for model in (policy, reference)]
        logp, reference_logp = (log_softmax(x)[range(len(t)), ids[t + 1]] for x in logits)
        value = value_model(ids[None, :-1]).data[0, t, 0]  # before token t + 1 is read
        kl = logp - reference_logp
        r = -beta * kl
        r[-1] += score[i]
        delta = r + gamma * np.append(value[1:], 0) - value
        advantage = [sum((gamma * lam) ** k * d for k, d in enumerate(delta[j:])) for j in range(len(t))]
        for name, expected in (
            ("logp", logp),
            ("reference_logp", reference_logp),
            ("kl", kl),
            ("reward", r),
            ("value", value),
            ("advantage", advantage),
            ("returns", advantage + value),
        ):
            found = getattr(e, name)[i]
            assert np.allclose(found[t], expected, rtol=1e-10, atol=1e-12), name
            assert not np.delete(found, t).any(), name
        advantages += advantage
        kls.append(kl.sum())
        entropies.append(-logp.sum())
    # whitened over the whole round, and nowhere else: as many entries as tokens
    white = e.white[e.mask]
    assert np.allclose(white, (advantages - np.mean(advantages)) / np.std(advantages), atol=1e-6)
    assert np.count_nonzero(e.white) == e.mask.sum()

    metrics = ppo.round_metrics(e, ended, beta)
    expected = {
        "objective/kl": np.mean(kls),
        "objective/entropy": np.mean(entropies),
        "objective/non_score_reward": -beta * np.mean(kls),
        "objective/rlhf_reward": np.mean(score) - beta * np.mean(kls),
        "objective/scores": np.mean(score),
        "objective/kl_coef": beta,
        "val/explained_variance": 1 - np.mean(np.square(advantages)) / np.var(e.returns[e.mask]),
        "val/mean": e.value[e.mask].mean(),
        "val/num_eos_tokens": (e.tokens == EOS).sum(),
        "returns/mean": e.returns[e.mask].mean(),
        "returns/var": e.returns[e.mask].var(),
        "length": e.mask.sum() / len(e.mask),
        "missing_eos": np.mean(~(e.tokens == EOS).any(1)),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-9), name


def test_rewards_can_be_whitened_and_keep_their_mean(tmp_path):
    _, _, plain, _, _ = experienced(tmp_path)
    _, _, e, _, _ = experienced(tmp_path, whiten_rewards=True)
    before, after = plain.reward[plain.mask], e.reward[e.mask]
    assert np.allclose(after, (before - before.mean()) / before.std() + before.mean(), rtol=1e-6)


def test_policy_and_value_losses_are_those_of_their_papers(tmp_path):
    """After the policy has moved: losses and statistics from full logits, an entropy bonus, some ratios clipped."""
    policy, value_model, e, _, config = experienced(tmp_path, moved=0.2, entropy_coefficient=0.1)
    m = e.mask
    logits = policy(e.tokens[:, :-1], e.start).data / config.temperature
    logp = log_softmax(logits)
    entropy = -(np.exp(logp) * logp).sum(-1)
    logp = np.take_along_axis(logp, e.tokens[:, 1:, None].astype(int), -1)[..., 0]
    ratio = np.exp(logp - e.logp)
    surrogate = np.minimum(ratio * e.white, np.clip(ratio, 0.8, 1.2) * e.white)
    found = ppo.policy_backward(policy, e, config)
    assert found["loss"] == pytest.approx(-surrogate[m].mean() - 0.1 * entropy[m].mean(), rel=1e-10)
    assert found["entropy"] == pytest.approx(entropy[m].mean(), rel=1e-10)
    assert found["clipfrac"] == ((e.white * (ratio - np.clip(ratio, 0.8, 1.2)))[m] > 0).mean()
    assert 0.1 < found["clipfrac"] < 0.9
    assert found["ratio_max"] == pytest.approx(ratio[m].max(), rel=1e-10)
    for kind in ("k1", "k2", "k3"):
        assert found[f"approx_kl_{kind}"] == pytest.approx(kl_estimate(e.logp, logp, kind)[m].mean(), rel=1e-10)

    value = value_model(e.tokens[:, :-1], e.start).data[..., 0]
    near = np.clip(value, e.value - 0.2, e.value + 0.2)
    squares = np.maximum((value - e.returns) ** 2, (near - e.returns) ** 2)
    found = ppo.value_backward(value_model, e, config, 0.2)
    assert found["loss"] == pytest.approx(0.5 * squares[m].mean(), rel=1e-10)


# ------------------------------------------------------------------ what must not matter


def same(a, b):
    """Whether two results are the same bits: arrays, numbers, and dicts and tuples of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def ragged_rankings(rng, vocab_size=7):
    """Pairs, and rankings of three and four answers, with margins and soft labels."""
    found = []
    for k in (2, 3, 2, 2, 4, 2, 3):
        prompt, *answers = (rng.integers(0, vocab_size, n) for n in rng.integers(1, 6, 1 + k))
        found.append(ranking(prompt, *answers, margin=rng.random(), preference=rng.random()))
    return found


def test_what_pads_a_row_does_not_matter_to_reward_model_and_dpo(tmp_path):
    rng, seen = np.random.default_rng(0), defaultdict(list)
    rankings, some = ragged_rankings(rng), ragged_pairs(rng, 7)
    for pad_id in (0, 3, 6):
        model, config = llama(0, 7, head="scalar"), settings(reward.RewardConfig, tmp_path, micro_batch_size=3)
        metrics = reward.backward(model, rankings, config, pad_id)
        seen["reward"].append((metrics, gradients(model), reward.held_margins(model, rankings, pad_id, 3)))
        model, config = llama(0, 7), settings(dpo.DPOConfig, tmp_path, micro_batch_size=3)
        examples = dpo.with_reference(llama(1, 7), some, pad_id)
        metrics = dpo.backward(model, examples, config, pad_id)
        seen["dpo"].append(
            ([e.reference for e in examples], metrics, gradients(model), dpo.measure(model, examples, config, pad_id))
        )
    for found in seen.values():
        assert same(found[0], found[1])
        assert same(found[0], found[2])


def test_junk_in_masked_places_does_not_matter_to_ppo(tmp_path):
    policy, value_model, e, ended, config = experienced(tmp_path, np.float32, moved=0.1, entropy_coefficient=0.1)
    rng = np.random.default_rng(0)
    last = last_token(e.mask) + 1  # in tokens, which begin one earlier
    behind = np.arange(e.tokens.shape[1]) > last[:, None]
    tokens = np.where(behind, rng.integers(0, 7, e.tokens.shape), e.tokens).astype(np.int32)
    assert (tokens != e.tokens).any()

    reference, scores = llama(3, 7), rng.standard_normal(len(tokens))
    batch = e.batch._replace(tokens=tokens)
    clean, junk = (ppo.experience(policy, reference, value_model, b, scores, config, 0.1) for b in (e.batch, batch))
    assert same(clean[1:], junk[1:])
    assert same(ppo.round_metrics(clean, ended, 0.1), ppo.round_metrics(junk, ended, 0.1))

    floats = ("logp", "reference_logp", "kl", "score", "reward", "value", "advantage", "white", "returns")
    spoilt = {name: np.where(e.mask, getattr(e, name), np.nan).astype(e.logp.dtype) for name in floats}
    found = []
    for some in (e, e._replace(tokens=tokens, **spoilt)):
        found.append([ppo.policy_backward(policy, some, config), gradients(policy)])
        found[-1] += [ppo.value_backward(value_model, some, config, 0.2), gradients(value_model)]
    assert same(*found)


def close(a, b, tolerance):
    """Dicts of numbers, or vectors, equal up to `tolerance` of the largest entry."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(abs(a[n] - b[n]) <= tolerance * max(abs(a[n]), 1e-3) for n in a)
    return np.abs(a - b).max() <= tolerance * np.abs(a).max()


@pytest.mark.parametrize("what", ["reward", "dpo", "ppo"])
def test_micro_batches_do_not_matter(what, tmp_path):
    """Gradients and metrics of an update over rows of unequal lengths, however it is cut."""
    rng = np.random.default_rng(0)
    policy, value_model, e, _, _ = experienced(tmp_path, moved=0.2, entropy_coefficient=0.1)
    rankings, some = ragged_rankings(rng), ragged_pairs(rng, 7)
    examples = dpo.with_reference(llama(1, 7, np.float64), some, 0)
    found = []
    for micro in (0, 1, 2, 4):
        if what == "reward":
            model, config = llama(0, 7, np.float64, head="scalar"), reward.RewardConfig
            config = settings(config, tmp_path, micro_batch_size=micro)
            found.append([reward.backward(model, rankings, config, 0), gradients(model)])
        elif what == "dpo":
            model, config = llama(0, 7, np.float64), settings(dpo.DPOConfig, tmp_path, micro_batch_size=micro)
            found.append([dpo.backward(model, examples, config, 0), gradients(model)])
            found[-1].append(dpo.measure(model, examples, config, 0, rows=micro or 9))
        else:
            config = settings(ppo.PPOConfig, tmp_path, micro_batch_size=micro, entropy_coefficient=0.1)
            found.append([ppo.policy_backward(policy, e, config), gradients(policy)])
            found[-1] += [ppo.value_backward(value_model, e, config, 0.2), gradients(value_model)]
            found[-1].append(
                {
                    "experience": ppo.experience(
                        policy, policy, value_model, e.batch, e.score.sum(1), config, 0.1
                    ).advantage.sum()
                }
            )
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert close(a, b, 1e-12)


def state(model, optimizer):
    return [p.data.copy() for p in model.parameters.values()], optimizer.m.copy(), optimizer.v.copy(), optimizer.steps


def updated(policy, value_model, e, config, train_policy=True):
    """One round of updates; (policy's optimizer, value model's, the Run)."""
    optimizers = config.optimizer(policy.parameters), config.optimizer(value_model.parameters)
    run = Run(config, 10)
    ppo.update(policy, value_model, e, optimizers, config, run, np.random.default_rng(0), train_policy)
    return *optimizers, run


def test_rows_without_an_answer_change_nothing(tmp_path):
    policy, value_model, e, _, config = experienced(
        tmp_path, minibatch_size=1, ppo_epochs=3, weight_decay=0.5, max_step_kl=1e9, rows=4
    )
    empty = e._replace(mask=np.zeros_like(e.mask))
    before = policy.flat.copy(), value_model.flat.copy()
    *optimizers, run = updated(policy, value_model, empty, config)
    assert same(before, (policy.flat, value_model.flat))
    for optimizer in optimizers:
        assert optimizer.steps == 0
        assert not optimizer.m.any()
        assert not optimizer.v.any()
    assert set(run.sums) == {"policy/stopped_early"}
    half = e._replace(mask=e.mask & (np.arange(4) < 2)[:, None])
    *optimizers, run = updated(policy, value_model, half, config)
    assert [optimizer.steps for optimizer in optimizers] == [6, 6]  # 2 of 4 rows, 3 epochs


def test_minibatches_take_every_row_once_in_each_epoch():
    rng = np.random.default_rng(0)
    found = list(ppo.minibatches(10, 4, 3, rng))
    assert [len(rows) for rows in found] == [4, 4, 2] * 3
    epochs = [np.concatenate(found[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(rows) for rows in ppo.minibatches(10, 0, 2, rng)] == [10, 10]


def test_a_policy_that_has_moved_too_far_waits_for_the_next_round(tmp_path, monkeypatch):
    found, policy_backward = [], ppo.policy_backward
    monkeypatch.setattr(ppo, "policy_backward", lambda *args: found.append(policy_backward(*args)) or found[-1])
    policy, value_model, e, _, config = experienced(tmp_path, ppo_epochs=5, max_step_kl=1e-9, lr=0.01)
    policy_optimizer, value_optimizer, run = updated(policy, value_model, e, config)
    assert policy_optimizer.steps == 1  # the first gradient is taken where the policy stands
    assert len(found) == 2  # the second tells how far it has moved, and there is no third
    assert value_optimizer.steps == 5
    assert run.sums["policy/stopped_early"] == (1, 1)
    assert not policy.flat_grad.any()

    found.clear()
    policy, value_model, e, _, config = experienced(tmp_path, ppo_epochs=5, max_step_kl=1e9, lr=0.01)
    policy_optimizer, _, run = updated(policy, value_model, e, config)
    assert policy_optimizer.steps == len(found) == 5
    assert run.sums["policy/stopped_early"] == (0, 1)
    names = {"loss/policy_avg": "loss", "policy/approxkl_avg": "approx_kl_k2", "policy/approxkl_k3": "approx_kl_k3"}
    names |= {"policy/clipfrac_avg": "clipfrac", "policy/entropy_avg": "entropy", "val/ratio": "ratio"}
    names |= {"val/ratio_var": "ratio_var", "val/ratio_max": "ratio_max"}
    for logged, name in names.items():
        assert run.sums[logged] == (pytest.approx(sum(f[name] for f in found)), 5)


def test_the_warm_up_moves_values_alone_and_as_far_as_they_have_to(tmp_path):
    options = {"ppo_epochs": 60, "value_lr": 1e-3, "clip_value": 0.1, "max_step_kl": 1e-9}
    policy, value_model, e, _, config = experienced(tmp_path, **options)
    e = e._replace(returns=np.where(e.mask, e.returns + 3, 0))
    before, start = policy.flat.copy(), value_model.flat.copy()
    policy_optimizer, value_optimizer, run = updated(policy, value_model, e, config, train_policy=False)
    assert same(before, policy.flat)
    assert (policy_optimizer.steps, value_optimizer.steps) == (0, 60)
    assert not [name for name in run.sums if name.startswith(("policy/", "loss/policy"))]
    assert run.sums["val/clipfrac_avg"] == (0, 60)
    free = (ppo.frozen_values(value_model, e.batch) - e.value)[e.mask].mean()
    assert free > 1

    value_model.flat[...] = start  # after the warm-up the clip holds them, but for the optimizer's momentum
    _, value_optimizer, run = updated(policy, value_model, e, config)
    held = (ppo.frozen_values(value_model, e.batch) - e.value)[e.mask].mean()
    assert held < 0.6 * free
    assert value_optimizer.steps == 60
    assert run.sums["val/clipfrac_avg"][0] > 30


def test_scores_are_normalised_clipped_and_punished():
    raw = {1: 2.0, 2: 8.0, 3: 100.0}
    scorer = ppo.Scorer(lambda rows: np.array([raw[len(s)] for s in rows]), clip=10.0, missing_eos_penalty=0.5)
    scorer = ppo.normalised(scorer, [[0], [0, 0]] * 5)
    assert scorer([[0], [0, 0], [0] * 3, [0]], np.array([True, True, True, False])).tolist() == [-1, 1, 10, -1.5]
    # a reward model that says the same of everything has nothing to stretch but rounding
    constant = ppo.normalised(
        dataclasses.replace(scorer, function=lambda rows: 3 + 1e-8 * np.arange(len(rows))), [[0]] * 5
    )
    assert constant.gain == 1
    assert constant.mean == pytest.approx(3)


# ------------------------------------------------------------------ whole runs


def talkative(model, ids):
    """The model, made to say only these ids: their logits differ by what it has read, the others' are far below."""
    embedding, head = (model.parameters[name].data for name in ("model.embed_tokens.weight", "lm_head.weight"))
    embedding[:, 0] = 0.5  # the same for every token, so that the head's first column is a bias
    head *= 5
    head[:, 0] = -4
    head[ids, 0] = 0
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A folder with an SFT model, a reward model, prompts and preferences."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 48}
    end, letters = tokenizer.special_tokens["<|im_end|>"], tokenizer.encode("abcde").tolist()
    sft = llama(1, tokenizer.vocab_size, **sizes)
    talkative(sft, [end, *letters])
    for name, model in (("sft", sft), ("reward", llama(2, tokenizer.vocab_size, head="scalar", **sizes))):
        (folder / name).mkdir()
        save_model(folder / name, model, tokenizer, "chatml")
    words = ["a", "bc", "def", "g", "hi", "jkl", "m", "no", "pqr", "stuv"]
    write_rows(folder / "prompts.jsonl", [{"prompt": word} for word in words])
    write_rows(
        folder / "preferences.jsonl",
        [{"prompt": w, "chosen": w + w, "rejected": "ab"[: 1 + i % 2]} for i, w in enumerate(words)],
    )
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ppo_settings(folders, out, **options):
    few = {"episodes": 36, "batch_size": 9, "ppo_epochs": 3, "minibatch_size": 4, "max_new_tokens": 6, "eval_every": 2}
    few |= {"value_warmup": 2, "reference_samples": 16, "lr": 0.01, "warmup": 0.0, "max_step_kl": 1e9, "beta": 0.3}
    paths = {"model": folders / "sft", "reward": folders / "reward", "prompts": (folders / "prompts.jsonl",)}
    return ppo.PPOConfig(out=out, **(paths | few | {"samples": 1} | options))


@pytest.fixture(scope="module")
def ppo_run(folders, tmp_path_factory):
    """A run of ppo.train that writes every token: its folder, and how the four models changed from round to round."""
    seen, out = [], tmp_path_factory.mktemp("ppo") / "out"
    patch = pytest.MonkeyPatch()
    experience, model_rewards, update, models = ppo.experience, ppo.model_rewards, ppo.update, {}

    def watched_rewards(model, *rest):
        models["reward"] = model
        return model_rewards(model, *rest)

    def watched_experience(policy, reference, value_model, *rest):
        models.update(policy=policy, reference=reference, value=value_model)
        return experience(policy, reference, value_model, *rest)

    def watched_update(*args):
        seen.append({name: model.flat.copy() for name, model in models.items()})
        update(*args)
        seen.append({name: model.flat.copy() for name, model in models.items()})

    patch.setattr(ppo, "model_rewards", watched_rewards)
    patch.setattr(ppo, "experience", watched_experience)
    patch.setattr(ppo, "update", watched_update)
    ppo.train(ppo_settings(folders, out, flight_record=1))
    patch.undo()
    return out, seen


def test_policy_and_values_learn_and_reference_and_reward_model_do_not(ppo_run, folders):
    out, seen = ppo_run
    sft, judge = (load_pretrained(folders / name) for name in ("sft", "reward"))
    assert same(seen[0]["policy"], sft.flat)
    for models in seen:
        assert same(models["reference"], sft.flat)
        assert same(models["reward"], judge.flat)
    changed = [[not same(a[name], b[name]) for name in ("policy", "value")] for a, b in itertools.pairwise(seen)]
    # two rounds of warm-up, two that train both; nothing changes between rounds
    assert changed == [[False, True], [False, False]] * 2 + [[True, True], [False, False], [True, True]]
    assert same(load_pretrained(out).flat, seen[-1]["policy"])
    values = load_pretrained(folders / "reward").parameters["score.weight"].data
    assert not same(seen[-1]["value"][-values.size :], seen[0]["value"][-values.size :])


def test_every_parameter_of_policy_and_value_model_learns(ppo_run, folders):
    _, seen = ppo_run
    for name, folder in (("policy", "sft"), ("value", "reward")):
        model = load_pretrained(folders / folder)
        for parameter, (offset, shape) in model._offsets.items():
            part = slice(offset, offset + math.prod(shape))
            assert not same(seen[0][name][part], seen[-1][name][part]), (name, parameter)


def recomputed(rows, gamma, lam, clip):
    """What a round's record has to say, from its log-probabilities, scores and values alone: nothing of minillm."""
    answers = defaultdict(list)
    for row in rows:
        answers[row["answer"]].append(row)
    for answer in answers.values():
        assert {b["position"] - a["position"] for a, b in itertools.pairwise(answer)} <= {1}
        assert not any(row["score"] for row in answer[:-1])
        next_value = next_advantage = 0.0
        for row in reversed(answer):
            row["kl"] = row["logp"] - row["reference_logp"]
            row["reward"] = row["score"] - row["beta"] * row["kl"]
            row["delta"] = row["reward"] + gamma * next_value - row["value"]
            row["advantage"] = row["delta"] + gamma * lam * next_advantage
            row["returns"] = row["advantage"] + row["value"]
            next_value, next_advantage = row["value"], row["advantage"]
    advantages = np.array([row["advantage"] for row in rows])
    white = (advantages - advantages.mean()) / np.sqrt(advantages.var() + 1e-8)
    for row, w in zip(rows, white, strict=True):
        row["white"], row["ratio"] = w, np.exp(row["new_logp"] - row["logp"])
        row["clipped"] = bool(w * (row["ratio"] - np.clip(row["ratio"], 1 - clip, 1 + clip)) > 0)
    return rows


def test_the_flight_record_can_be_recomputed_by_hand(ppo_run, folders, tokenizer):
    out, _ = ppo_run
    rows = read_rows(out / "flight.jsonl")
    assert {row["round"] for row in rows} == {0, 1, 2, 3}
    derived = ("kl", "reward", "delta", "advantage", "returns", "white", "ratio")
    for step in range(4):
        stored = [row for row in rows if row["round"] == step]
        inputs = [{name: value for name, value in row.items() if name not in (*derived, "clipped")} for row in stored]
        for row, mine in zip(stored, recomputed(inputs, gamma=1.0, lam=0.95, clip=0.2), strict=True):
            assert mine.keys() == row.keys()
            for name in derived:
                assert mine[name] == pytest.approx(row[name], rel=1e-6, abs=1e-6), name
            assert mine["clipped"] == row["clipped"]
            assert row["text"] == tokenizer.decode([row["token"]])
        moved = step >= 2
        assert moved or not any(row["clipped"] for row in stored)
        assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in stored) != moved
        if not moved:  # the policy is the reference still
            assert max(abs(row["kl"]) for row in stored) < 1e-5
    assert any(row["clipped"] for row in rows)
    ends = Counter(row["text"] == "<|im_end|>" for row in rows if row["score"])
    assert ends[True] > 3
    assert ends[False] > 3


def test_metrics_follow_from_the_flight_record(ppo_run):
    out, _ = ppo_run
    logged = [row for row in read_rows(out / "metrics.jsonl") if "objective/kl" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    flight = read_rows(out / "flight.jsonl")
    for step, row in enumerate(logged):
        tokens = [f for f in flight if f["round"] == step]
        answers = len({f["answer"] for f in tokens})
        assert answers == 9
        total = {name: sum(f[name] for f in tokens) / answers for name in ("kl", "score", "logp", "reward")}
        assert row["objective/kl"] == pytest.approx(total["kl"], abs=1e-5)
        assert row["objective/scores"] == pytest.approx(total["score"], abs=1e-5)
        assert row["objective/entropy"] == pytest.approx(-total["logp"], rel=1e-5)
        assert row["objective/rlhf_reward"] == pytest.approx(total["reward"], abs=1e-5)
        assert row["length"] == pytest.approx(len(tokens) / answers)
        assert row["episode"] == 9 * (step + 1)
        assert row["value/learning_rate"] == pytest.approx(1e-3 * (1 - 0.9 * step / 3))
        assert ("learning_rate" in row) == ("loss/policy_avg" in row) == (step >= 2)
        if step >= 2:
            assert row["learning_rate"] == pytest.approx(0.01 * (1 - 0.9 * step / 3))
    assert [row["step"] for row in read_rows(out / "metrics.jsonl") if "eval_kl" in row] == [0, 2, 4]


def comparable(out):
    """The weights' bytes, and metrics without what a clock wrote."""
    rows = read_rows(out / "metrics.jsonl")
    for row in rows:
        row.pop("tokens_per_second", None)
    return (out / "model.safetensors").read_bytes(), rows, (out / "samples.jsonl").read_text()


def test_two_runs_are_the_same_bits(ppo_run, folders, tmp_path):
    first = comparable(ppo_run[0])
    ppo.train(ppo_settings(folders, tmp_path / "again", flight_record=0))
    assert comparable(tmp_path / "again") == first
    ppo.train(ppo_settings(folders, tmp_path / "other", seed=1))
    assert comparable(tmp_path / "other")[0] != first[0]


def test_beta_is_not_steered_while_the_policy_stands_still(folders, tmp_path):
    ppo.train(ppo_settings(folders, tmp_path / "out", target_kl=0.001, horizon=20, value_warmup=2, held_out=0.0))
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    coefficients = [row["objective/kl_coef"] for row in rows]
    assert coefficients[:3] == [0.3] * 3
    assert coefficients[3] != 0.3
    assert not any("eval_kl" in row for row in rows)  # nothing was held out


def test_dpo_trains_the_policy_and_leaves_the_reference(folders, tmp_path, monkeypatch):
    seen, with_reference = [], dpo.with_reference

    def watched(reference, *rest):
        found = with_reference(reference, *rest)
        seen.append((reference, reference.flat.copy(), [e.reference for e in found]))
        return found

    monkeypatch.setattr(dpo, "with_reference", watched)
    common = {"model": folders / "sft", "data": (folders / "preferences.jsonl",), "batch_size": 4, "log_every": 1}
    for name, reference in (("same", None), ("other", tmp_path / "same")):
        config = dpo.DPOConfig(out=tmp_path / name, reference=reference, **common, epochs=2, lr=1e-3, samples=1)
        model, _ = dpo.train(config)
        assert same(load_pretrained(tmp_path / name).flat, model.flat)
        for parameter, p in load_pretrained(folders / "sft").parameters.items():
            assert not same(model.parameters[parameter].data, p.data), parameter
    given = load_pretrained(folders / "sft").flat
    assert same(seen[0][1], given)  # before the first update
    frozen, before, _ = seen[2]
    assert same(frozen.flat, before)
    assert same(before, load_pretrained(tmp_path / "same").flat)
    rows = [row for row in read_rows(tmp_path / "same" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > 0
    other = [row for row in read_rows(tmp_path / "other" / "metrics.jsonl") if "loss" in row]
    assert abs(other[0]["loss"] - LN2) > 1e-4


def test_what_can_not_be_trained_is_said_in_one_line(folders, tmp_path, tokenizer):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            ppo.train(ppo_settings(folders, tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    refused("--max-new-tokens has to be below the models' context of 48, and is 48", max_new_tokens=48)
    refused("--value-warmup has to be less than the 4 rounds of --episodes", value_warmup=4)
    refused("--prompts: no row can be used: 10 longer than 5 tokens", max_new_tokens=43, held_out=0.0)
    other = Tokenizer.train([], SMALLEST_VOCABULARY, special_tokens=SPECIAL_TOKENS[::-1])
    (tmp_path / "reward").mkdir()
    model = llama(2, other.vocab_size, head="scalar", max_position_embeddings=48)
    save_model(tmp_path / "reward", model, other, "chatml")
    refused("different tokenizers", reward=tmp_path / "reward")


def test_one_prompt_is_enough(folders, tmp_path, capsys):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b" * 60}])
    options = {"reference_samples": 3, "episodes": 8, "batch_size": 4, "value_warmup": 1, "held_out": 0.1}
    options |= {"flight_record": 1}
    ppo.train(ppo_settings(folders, tmp_path / "out", prompts=(tmp_path / "prompts.jsonl",), **options))
    told = capsys.readouterr().out
    assert "left out: 1 longer than 42 tokens" in told
    assert "1 prompts, 0 held out" in told
    # the same policy and the same prompt in both rounds, and other random numbers
    flight = read_rows(tmp_path / "out" / "flight.jsonl")
    first, second = ([row["token"] for row in flight if row["round"] == step] for step in (0, 1))
    assert first != second
