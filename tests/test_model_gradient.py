"""A whole two-layer Llama, built from the ops: one gradient check, and fused against unfused."""

import ml_dtypes
import numpy as np
import pytest

from minillm import autograd as ag
from minillm import functional as F
from minillm.autograd import Tensor, checkpoint
from minillm.kernels.adamw import schedule_for, step_inplace
from tests.gradcheck import gradcheck, vjp

V, D, H, HK, L, FF = 13, 12, 4, 2, 2, 10
HEAD = D // H


def parameters(rng, dtype=np.float64):
    shapes = {"embed": (V, D), "norm": (D,)}
    for i in range(L):
        shapes |= {f"{i}.norm1": (D,), f"{i}.qkv": ((H + 2 * HK) * HEAD, D), f"{i}.o": (D, D)}
        shapes |= {f"{i}.norm2": (D,), f"{i}.gate_up": (2 * FF, D), f"{i}.down": (D, FF)}
    shapes["head"] = (V, D)
    return {name: (0.5 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def unfused_attention(q, k, v, start):
    T = q.shape[1]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    k, v = (ag.getitem(x, index=(slice(None), np.repeat(np.arange(HK), H // HK))) for x in (k, v))
    visible = (start[:, :, None] <= np.arange(T)) & np.tri(T, dtype=bool)
    s = ag.where((q @ k.transpose(0, 1, 3, 2)) * HEAD**-0.5, -np.inf, condition=visible[:, None])
    return (F.softmax(s) @ v).transpose(0, 2, 1, 3)


def unfused_rms_norm(x, w):
    return x * ((x * x).mean(-1, keepdims=True) + 1e-5) ** -0.5 * w


def unfused_swiglu(gate, up):
    return gate * ag.sigmoid(gate) * up


def block(x, norm1, qkv, o, norm2, gate_up, down, *, start, fused):
    cos, sin = (t.astype(x.dtype) for t in F.rope_table(x.shape[1], HEAD - HEAD % 2, dtype=np.float64))
    norm = F.rms_norm if fused else unfused_rms_norm
    h = F.linear(norm(x, norm1), qkv)
    q, k, v = ag.split(h, sizes=(H * HEAD, HK * HEAD, HK * HEAD))
    q, k, v = (t.reshape(*x.shape[:2], -1, HEAD) for t in (q, k, v))
    q, k = (rotate(t, cos, sin) for t in (q, k))
    mixed = F.attention(q, k, v, start=start) if fused else unfused_attention(q, k, v, start)
    x = x + F.linear(mixed.reshape(*x.shape), o)
    gate, up = ag.split(F.linear(norm(x, norm2), gate_up), sizes=(FF, FF))
    return x + F.linear((F.swiglu if fused else unfused_swiglu)(gate, up), down)


def rotate(t, cos, sin):
    """RoPE on the even part of an odd head size."""
    even = HEAD - HEAD % 2
    return ag.concat(F.rope(t[..., :even], cos=cos, sin=sin), t[..., even:])


def loss(tokens, start, targets, names, *values, fused=True, checkpointed=False, activations=None):
    p = dict(zip(names, values, strict=True))
    x = F.embedding(tokens, p["embed"])
    x = x if activations is None else ag.cast(x, dtype=activations)
    for i in range(L):

        def layer(*inputs):
            return block(*inputs, start=start, fused=fused)

        weights = [p[f"{i}.{name}"] for name in ("norm1", "qkv", "o", "norm2", "gate_up", "down")]
        x = checkpoint(layer, x, *weights) if checkpointed else layer(x, *weights)
    x = (F.rms_norm if fused else unfused_rms_norm)(x, p["norm"])
    if fused:
        return F.linear_cross_entropy(x, p["head"], targets, rows_per_chunk=4)
    return F.cross_entropy(F.linear(x, p["head"]), targets)


def batch(rng, T=7):
    tokens, targets = rng.integers(0, V, (2, T)), rng.integers(0, V, (2, T))
    targets[0, 2] = -100
    start = np.array([[0] * T, [0, 0, 2, 2, 2, 5, 5][:T]], np.int32)  # row 1 holds three packed documents
    return tokens, start, targets


def test_the_whole_model_passes_a_gradient_check():
    rng = np.random.default_rng(0)
    p = parameters(rng)
    tokens, start, targets = batch(rng)
    gradcheck(lambda *values: loss(tokens, start, targets, list(p), *values), *p.values(), rng=rng)


def test_fused_equals_unfused():
    rng = np.random.default_rng(1)
    p = parameters(rng)
    tokens, start, targets = batch(rng)
    (fused,), ours = vjp(lambda *v: loss(tokens, start, targets, list(p), *v), list(p.values()), [np.ones(())])
    (plain,), theirs = vjp(
        lambda *v: loss(tokens, start, targets, list(p), *v, fused=False), list(p.values()), [np.ones(())]
    )
    assert np.isclose(fused, plain, rtol=1e-12)
    for name, a, b in zip(p, ours, theirs, strict=True):
        assert np.abs(a - b).max() <= 1e-10 * max(1, np.abs(b).max()), name


def test_checkpointed_blocks_give_the_same_bits():
    rng = np.random.default_rng(2)
    p = parameters(rng, np.float32)
    tokens, start, targets = batch(rng)
    results = [
        vjp(
            lambda *v, c=c: loss(tokens, start, targets, list(p), *v, checkpointed=c),
            list(p.values()),
            [np.ones((), np.float32)],
        )
        for c in (False, True)
    ]
    assert np.array_equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("activations", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_activations_with_float32_weights(activations):
    """The dtype is chosen once, after the embedding; every weight keeps float32 and gets a float32 gradient."""
    rng = np.random.default_rng(4)
    p = parameters(rng, np.float32)
    tokens, start, targets = batch(rng)
    results = [
        vjp(
            lambda *v, a=a: loss(tokens, start, targets, list(p), *v, activations=a),
            list(p.values()),
            [np.ones((), np.float32)],
        )
        for a in (None, activations)
    ]
    assert results[1][0][0].dtype == np.float32  # a loss is a sum over many, and is not rounded to 16 bits
    for name, exact, ours in zip(p, results[0][1], results[1][1], strict=True):
        assert ours.dtype == np.float32
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert error < (0.01 if activations == np.float16 else 0.06), (name, error)


def test_one_batch_is_learnt_by_heart():
    """The whole thing trains: AdamW's kernel on these gradients takes one batch to almost no loss."""
    rng = np.random.default_rng(3)
    p = {name: Tensor(x, requires_grad=True) for name, x in parameters(rng, np.float32).items()}
    tokens, start, targets = batch(rng)
    tokens[:] = rng.permutation(V)[:7]
    tokens[1, 0] = (tokens[0, 0] + 1) % V  # so that no two prefixes ask for different answers
    state = {name: (np.zeros_like(x.data), np.zeros_like(x.data)) for name, x in p.items()}
    constants = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    for step in range(1, 101):
        value = loss(tokens, 0 * start, targets, list(p), *p.values())
        value.backward()
        for name, x in p.items():
            schedule = schedule_for(x.data, 0.02, 0.9, 0.95, 0.0, step)
            step_inplace(x.data, *state[name], x.grad, schedule, **constants)
            x.grad[...] = 0
    assert value.item() < 0.01
