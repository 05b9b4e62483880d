import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import functional as F
from minillm.autograd import Tensor
from minillm.model import Config, Llama
from minillm.optim import AdamW, clip_grad_norm, clip_scale, cosine_schedule, global_norm, linear_schedule


def tiny(**options):
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return Llama(Config(**sizes, max_position_embeddings=16, **options), dtype=np.float64)


def test_a_model_is_a_few_runs_that_cover_its_memory_once():
    model = tiny()
    optimizer = AdamW(model.parameters)
    assert sum(run.data.size for run in optimizer.runs) == model.flat.size
    assert all(
        np.shares_memory(r.data, model.flat) and np.shares_memory(r.grad, model.flat_grad) for r in optimizer.runs
    )
    assert len(optimizer.runs) < len(model.parameters)
    decays = [run.decays for run in optimizer.runs]
    assert all(a != b for a, b in pairwise(decays))  # neighbours that agree have been merged
    undecayed = sum(run.data.size for run in optimizer.runs if not run.decays)
    assert undecayed == sum(p.size for p in model.parameters.values() if p.ndim == 1)


def test_merged_runs_equal_one_update_per_parameter():
    one, other = tiny(), tiny()
    rng = np.random.default_rng(0)
    merged, separate = (
        AdamW(one.parameters),
        AdamW({n: Tensor(p.data.copy(), True) for n, p in other.parameters.items()}),
    )
    for step in range(5):
        one.flat_grad[...] = rng.standard_normal(one.flat.size)
        for run, (a, b) in zip(separate.runs, spans(one), strict=True):
            run.grad[...] = one.flat_grad[a:b]
        for optimizer in (merged, separate):
            optimizer.step(lr=0.01 * (step + 1), scale=0.5)
    assert np.array_equal(one.flat, np.concatenate([run.data for run in separate.runs]))
    assert not np.array_equal(one.flat, other.flat)


def test_runs_of_several_memories_equal_one_update_per_parameter():
    rng = np.random.default_rng(1)
    memories, gradients = rng.standard_normal((2, 3, 9)).astype(np.float32)
    shared, alone = {}, {}
    for i, (memory, gradient) in enumerate(zip(map(np.array, memories), map(np.array, gradients), strict=True)):
        for name, part, shape in (("vector", slice(0, 7), (7,)), ("matrix", slice(7, 9), (1, 2))):
            data, grad = memory[part].reshape(shape), gradient[part].reshape(shape)
            shared[f"{i} {name}"], alone[f"{i} {name}"] = Tensor(data, True), Tensor(data.copy(), True)
            shared[f"{i} {name}"].grad, alone[f"{i} {name}"].grad = grad, grad.copy()
    optimizer = AdamW(shared, lr=0.1, weight_decay=0.5)
    assert len(optimizer.runs) == 6 and len(optimizer.stretches) == 3
    optimizer.step()
    for name, p in alone.items():
        AdamW({name: p}, lr=0.1, weight_decay=0.5).step()
        assert np.array_equal(shared[name].data, p.data)


def spans(model):
    ends = np.cumsum([p.size for p in model.parameters.values()])
    return zip([0, *ends[:-1]], ends, strict=True)


def test_the_update_is_the_papers():
    """Algorithm 2, line by line, with moments and corrections as they stand there."""
    rng, p = np.random.default_rng(0), np.array([[1.0, -2.0]])
    x, m, v = Tensor(p.copy(), requires_grad=True), 0, 0
    optimizer = AdamW({"x": x}, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.05)
    for t in (1, 2, 3):
        lr, g = 0.1 / t, rng.standard_normal(p.shape)
        x.grad[...] = g
        optimizer.step(lr)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + 1e-3) + 0.05 * p)
        assert np.allclose(x.data, p, rtol=1e-12)


def test_weight_decay_spares_vectors_and_a_rule_can_change_that():
    w, b = Tensor(np.ones((2, 2)), True), Tensor(np.ones(2), True)
    AdamW({"w": w, "b": b}, lr=0.1, weight_decay=0.5).step()
    assert np.allclose(w.data, 0.95) and np.array_equal(b.data, np.ones(2))
    AdamW({"w": w, "b": b}, lr=0.1, weight_decay=0.5, decays=lambda name, p: name == "b").step()
    assert np.allclose(w.data, 0.95) and np.allclose(b.data, 0.95)


def test_a_rule_gives_some_parameters_another_rate():
    """Each parameter moves, weight decay included, as it does where all have its rate; their memory stays in order."""
    rates = lambda name, p: 10.0 if "embed" in name else 0.5 if name.endswith("q_proj.weight") else 1.0
    start = tiny()
    gradient = np.random.default_rng(0).standard_normal((3, start.flat.size))

    def trained(lr, **options):
        model = tiny()
        optimizer = AdamW(model.parameters, lr=lr, weight_decay=0.3, **options)
        for g in gradient:
            model.flat_grad[...] = g
            optimizer.step(scale=0.7)
        assert optimizer.grad_norm() == pytest.approx(np.linalg.norm(gradient[-1]), rel=1e-12)
        return model.parameters

    found = trained(0.01, rates=rates)
    alone = {rate: trained(0.01 * rate) for rate in (0.5, 1.0, 10.0)}
    for name, p in found.items():
        assert np.array_equal(p.data, alone[rates(name, p)][name].data)
        assert not np.array_equal(p.data, start.parameters[name].data)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_an_update_that_is_left_out_is_none(scale):
    """The one after it has its number, whose corrections of the moments' bias are the largest."""
    found = []
    for scales in ([0.5, 2.0], [scale, 0.5, scale, scale, 2.0]):
        w = Tensor(np.ones((3, 2), np.float32), True)
        optimizer = AdamW({"w": w}, lr=0.1)
        for s in scales:
            w.grad[...] = 0.3 if math.isfinite(s) else 7
            optimizer.step(scale=s)
        assert optimizer.steps == optimizer.state_dict()["steps"] == 2
        found.append([w.data, optimizer.m, optimizer.v])
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


def test_frozen_parameters_stay_and_nothing_to_train_is_an_error():
    a, b = Tensor(np.ones((2, 2)), True), Tensor(np.ones((2, 2)))
    optimizer = AdamW({"a": a, "b": b}, lr=0.1)
    optimizer.step()
    assert np.array_equal(b.data, np.ones((2, 2))) and not np.array_equal(a.data, b.data)
    with pytest.raises(ValueError, match="no parameter to train"):
        AdamW({"b": b})


def test_a_strided_parameter_is_refused():
    with pytest.raises(ValueError, match="contiguous memory, and w is not"):
        AdamW({"w": Tensor(np.ones((4, 4))[:, ::2], True)})


@given(st.lists(st.integers(0, 20000), min_size=1, max_size=4), st.integers(0, 9))
def test_the_global_norm_is_that_of_one_vector(sizes, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(size) for size in sizes]
    assert math.isclose(global_norm(arrays), np.linalg.norm(np.concatenate(arrays)), rel_tol=1e-12)


def test_the_global_norm_of_a_long_float32_vector_keeps_its_digits():
    g = np.full(3_000_001, 1e-3, np.float32)
    assert math.isclose(global_norm([g]), 1e-3 * math.sqrt(g.size), rel_tol=1e-6)


def test_clipping_leaves_short_gradients_and_shortens_long_ones():
    w = Tensor(np.zeros((3, 4)), True)
    w.grad = np.full((3, 4), 0.5)
    assert math.isclose(clip_grad_norm({"w": w}, 10), math.sqrt(3)) and np.all(w.grad == 0.5)
    assert math.isclose(clip_grad_norm({"w": w}, 1), math.sqrt(3)) and math.isclose(global_norm([w.grad]), 1)
    w.grad[0, 0] = np.inf
    rest = w.grad.copy()
    assert clip_grad_norm({"w": w}, 1) == np.inf and np.array_equal(w.grad, rest)
    assert clip_scale(5, None) == 1 and clip_scale(5, 2) == 0.4 and clip_scale(math.nan, 2) == 1


@pytest.mark.parametrize("schedule, floor", [(cosine_schedule, 0.1), (linear_schedule, 0.0), (linear_schedule, 0.5)])
def test_schedules_rise_then_fall_to_the_floor(schedule, floor):
    rates = [schedule(step, 100, lr=2.0, warmup=10, floor=floor) for step in range(100)]
    assert np.allclose(rates[:10], 0.2 * np.arange(1, 11)) and rates[10] == 2
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert math.isclose(rates[-1], 2 * floor, abs_tol=1e-12)
    assert schedule(100, 100, lr=2.0, floor=floor) == pytest.approx(2 * floor)  # and stays there
    assert schedule(0, 1, lr=2.0) == 2 == schedule(9, 10, lr=2.0, warmup=9, floor=floor)  # no step left to fall in


def test_it_minimises():
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((64, 8)), rng.integers(0, 3, 64)
    w = Tensor(np.zeros((3, 8)), True)
    optimizer, losses = AdamW({"w": w}, lr=0.1, weight_decay=0.0), []
    for _ in range(50):
        loss = F.cross_entropy(F.linear(Tensor(features), w), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3)) and losses[-1] < losses[0] - 0.08
