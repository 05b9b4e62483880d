"""The models: who sees whom, bit for bit; packing and caching; first loss; learning; memory layout; accounts."""

import numpy as np
import pytest

from minillm import autograd, scaling
from minillm import functional as F
from minillm.autograd import no_grad, saved_arrays
from minillm.kernels import device
from minillm.kernels.adamw import schedule_for, step_inplace
from minillm.model import GPT2, Config, Llama, build
from tests.gradcheck import gradcheck

TINY = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
VARIANTS = {
    "llama": Config(**TINY, num_key_value_heads=2),
    "untied": Config(**TINY, tie_word_embeddings=False, head_dim=6),
    "qwen2": Config(**TINY, num_key_value_heads=1, attention_bias=True),
    "qwen3": Config(**TINY, num_key_value_heads=2, qk_norm=True, head_dim=8),
    "mistral": Config(**TINY, num_key_value_heads=2, sliding_window=3),
    "window in one layer": Config(**TINY, sliding_window=2, window_layers=(1,)),
    "gpt2": Config(**TINY, architecture="gpt2"),
    "reward": Config(**TINY, head="scalar"),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def loss_of(model, tokens, targets, start=None):
    return F.linear_cross_entropy(model.hidden(tokens, start), model.head, targets)


def randomised(config, dtype=np.float64, seed=0):
    """A model whose every parameter, biases and norms too, is away from its initial value."""
    model = build(config, seed, dtype)
    model.flat += 0.3 * np.random.default_rng(seed + 1).standard_normal(model.flat.size).astype(dtype)
    return model


@every_variant
def test_every_parameter_gets_its_gradient(config):
    """One number: the derivative along a random direction in all parameters at once, and along each parameter alone."""
    rng = np.random.default_rng(0)
    model, tokens = randomised(config), rng.integers(0, 17, (2, 6))
    start = np.array([[0] * 6, [0, 0, 2, 2, 2, 2]], np.int32)
    v = rng.standard_normal(model(tokens, start).shape)
    model(tokens, start).backward(v)
    gradient, at = model.flat_grad.copy(), model.flat.copy()

    def along(direction):
        values = []
        for eps in (1e-5, -1e-5):
            model.flat[...] = at + eps * direction
            values.append((model(tokens, start).data * v).sum())
        model.flat[...] = at
        return (values[0] - values[1]) / 2e-5

    direction = rng.standard_normal(at.size)
    assert np.isclose(gradient @ direction, along(direction), rtol=1e-6)
    for name, p in model.parameters.items():
        p_direction = np.zeros(at.size)
        offset, _ = model._offsets[name]
        part = slice(offset, offset + p.size)
        p_direction[part] = rng.standard_normal(p.size)
        assert np.array_equal(p.grad.reshape(-1), gradient[part]) and p.grad.any(), name
        assert np.isclose(gradient @ p_direction, along(p_direction), rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt2"])
def test_the_gradient_of_a_fused_projection_is_not_put_together_from_copies(name, monkeypatch):
    """dq, dk, dv and dgate, dup are written where they belong."""
    for module in (device, autograd):
        monkeypatch.setattr(module, "concatenate", lambda *_: pytest.fail("a copy"))
    model = randomised(VARIANTS[name], np.float32)
    loss_of(model, np.arange(12).reshape(2, 6), np.arange(12).reshape(2, 6)).backward()
    assert model.flat_grad.any()


@every_variant
def test_causality_bit_for_bit(config):
    rng = np.random.default_rng(1)
    model, tokens = randomised(config, np.float32), rng.integers(0, 17, (2, 9))
    before = model(tokens).data
    for t in range(8):
        changed = tokens.copy()
        changed[:, t + 1 :] = rng.integers(0, 17, (2, 8 - t))
        assert np.array_equal(model(changed).data[:, : t + 1], before[:, : t + 1])
        assert not np.array_equal(model((tokens + 1) % 17).data[:, t], before[:, t])


@every_variant
def test_packed_documents_equal_separate_ones(config):
    rng = np.random.default_rng(2)
    model, lengths = randomised(config), [4, 1, 6]
    documents = [rng.integers(0, 17, (1, n)) for n in lengths]
    starts = np.cumsum([0, *lengths[:-1]])
    packed = model(np.concatenate(documents, 1), np.repeat(starts, lengths)[None].astype(np.int32)).data
    for document, first in zip(documents, starts, strict=True):
        alone = model(document).data
        assert np.allclose(packed[:, first : first + document.shape[1]], alone, rtol=0, atol=1e-11)


@every_variant
def test_junk_under_padding_changes_no_bit_and_padding_none_at_all(config):
    rng = np.random.default_rng(3)
    model, tokens, pads = randomised(config, np.float32), rng.integers(0, 17, (3, 8)), [0, 3, 7]
    start = np.repeat(np.array(pads, np.int32)[:, None], 8, 1)
    before = model(tokens, start).data
    junk = tokens.copy()
    for b, pad in enumerate(pads):
        junk[b, :pad] = rng.integers(0, 17, pad)
    after = model(junk, start).data
    for b, pad in enumerate(pads):
        assert np.array_equal(after[b, pad:], before[b, pad:])
        assert np.allclose(before[b, pad:], model(tokens[b : b + 1, pad:]).data[0], rtol=1e-4, atol=1e-4)


@every_variant
def test_a_cache_gives_the_same_at_every_split_point(config):
    """Rows of unequal length, padded on the left; the tokens come in two pieces, or one at a time."""
    rng = np.random.default_rng(4)
    model, tokens = randomised(config), rng.integers(0, 17, (3, 8))
    start = np.repeat(np.array([[0], [2], [5]], np.int32), 8, 1)
    whole = model(tokens, start).data
    seen = np.arange(8) >= start
    with no_grad():
        for split in range(1, 8):
            cache = model.new_cache(3, 8)
            parts = [model(tokens[:, :split], start[:, :split], cache).data]
            parts.append(model(tokens[:, split:], start[:, split:], cache).data)
            assert np.abs(np.concatenate(parts, 1) - whole)[seen].max() < 1e-11
        cache = model.new_cache(3, 8)
        parts = [model(tokens[:, t : t + 1], start[:, t : t + 1], cache).data for t in range(8)]
        assert np.abs(np.concatenate(parts, 1) - whole)[seen].max() < 1e-11
        with pytest.raises(ValueError, match="the cache holds 8 tokens, and 9 are needed"):
            model(tokens[:, :1], start[:, :1], cache)


@every_variant
def test_checkpointed_blocks_give_the_same_bits_and_keep_less(config):
    rng = np.random.default_rng(5)
    tokens, gradients, kept = rng.integers(0, 17, (2, 12)), [], []
    for checkpointing in (False, True):
        model = randomised(Config(**{**_given(config), "activation_checkpointing": checkpointing}), np.float32)
        y = (model(tokens) * 1.0).sum()
        kept.append(sum(a.nbytes for _, a in saved_arrays(y) if not np.shares_memory(a, model.flat)))
        y.backward()
        gradients.append(model.flat_grad.copy())
    assert np.array_equal(*gradients)
    assert kept[1] < kept[0] / 3


def _given(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_first_loss_is_ln_v(architecture, tie):
    config = Config(vocab_size=1000, hidden_size=128, architecture=architecture, tie_word_embeddings=tie)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 1000, (4, 65))
        loss = loss_of(build(config, seed), tokens[:, :-1], tokens[:, 1:]).item()
        assert abs(loss / np.log(1000) - 1) < 0.02


def test_initial_weights():
    model = Llama(Config(vocab_size=500, hidden_size=256, num_hidden_layers=8, attention_bias=True), seed=3)
    for name, p in model.parameters.items():
        if name.endswith("bias"):
            assert not p.data.any()
        elif p.ndim == 1:
            assert (p.data == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(p.data.std() / expected - 1) < 0.03, name
            assert abs(p.data.mean()) < 0.05 * expected
    again, other = (Llama(model.config, seed=s) for s in (3, 4))
    assert np.array_equal(model.flat, again.flat)
    assert not np.array_equal(model.flat, other.flat)
    score = Llama(Config(**{**TINY, "hidden_size": 1024, "head": "scalar"})).parameters["score.weight"]
    assert abs(score.data.std() * np.sqrt(1025) - 1) < 0.1


@every_variant
def test_parameters_are_views_of_one_memory(config):
    model = build(config)
    assert sum(p.size for p in model.parameters.values()) == model.flat.size
    model.flat[...] = np.arange(model.flat.size)
    model.flat_grad[...] = -model.flat
    assert all(np.array_equal(p.data, -p.grad) for p in model.parameters.values())
    first = np.concatenate([p.data.reshape(-1) for p in model.parameters.values()])
    assert np.array_equal(first, model.flat)


def train(model, steps, next_batch, lr):
    m, v = np.zeros_like(model.flat), np.zeros_like(model.flat)
    constants = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    for step in range(1, steps + 1):
        model.flat_grad[...] = 0
        loss = loss_of(model, *next_batch())
        loss.backward()
        rate = lr * min(1, step / 10) * (1 - 0.95 * step / steps)
        schedule = schedule_for(model.flat, rate, 0.9, 0.95, 0.0, step)
        step_inplace(model.flat, m, v, model.flat_grad, schedule, **constants)
    return loss.item()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_one_batch_is_learnt_by_heart(name):
    rng = np.random.default_rng(6)
    # no token twice in a row: to RoPE without a first token of its own, "a" and "a a" look the same
    tokens = np.stack([np.roll(rng.permutation(17), n) for n in range(4)])
    assert len(set(tokens[:, 0])) == 4
    assert train(build(VARIANTS[name]), 150, lambda: (tokens[:, :-1], tokens[:, 1:]), 0.02) < 0.01


def test_a_markov_chain_is_learnt_and_no_better_than_it_can_be():
    """A chain's own negative log-likelihood on held-out sequences is the floor: within +0.02 above it is learnt, and
    more than 0.005 below would be a leak."""
    rng, V, T = np.random.default_rng(7), 8, 33
    chain = rng.dirichlet(np.full(V, 0.5), V)
    cumulative = chain.cumsum(1)

    def sample(n):
        rows = np.zeros((n, T), np.int64)
        rows[:, 0] = rng.integers(0, V, n)
        for t in range(1, T):
            rows[:, t] = np.minimum((cumulative[rows[:, t - 1]] < rng.random((n, 1))).sum(1), V - 1)
        return rows

    held_out = sample(200)
    x, y = held_out[:, :-1], held_out[:, 1:]
    floor = -np.log(chain[x, y]).mean()
    model = Llama(Config(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))

    def fresh():
        rows = sample(64)
        return rows[:, :-1], rows[:, 1:]

    train(model, 250, fresh, 0.01)
    with no_grad():
        excess = loss_of(model, x, y).item() - floor
    assert -0.005 < excess < 0.02


# ------------------------------------------------------------------ errors and accounts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads = 3 must divide hidden_size 16"),
        ({"head_dim": 5}, "head_dim = 5 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads 4"),
        ({"vocab_size": 0}, "vocab_size = 0 must be a positive whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 must be a positive whole number"),
        ({"sliding_window": -1}, "sliding_window = -1 must be a positive whole number"),
        ({"architecture": "mamba"}, "architecture = 'mamba' must be one of llama, gpt2"),
        ({"head": "classifier"}, "head = 'classifier' must be one of lm, scalar"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0 must be a positive number"),
        ({"norm_eps": "1e-5"}, "norm_eps = '1e-5' must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta = nan must be a positive number"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be a positive whole number"),
        ({"hidden_size": None}, "hidden_size = None must be a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 must be a positive whole number"),
        ({"window_layers": (0, 2)}, r"window_layers = \(0, 2\) must be some of the layers 0 to 1"),
        ({"window_layers": (-1,)}, r"window_layers = \(-1,\) must be some of the layers"),
        ({"window_layers": 1}, "window_layers = 1 must be some of the layers"),
        ({"architecture": "gpt2", "qk_norm": True}, "qk_norm = True is not for gpt2"),
        ({"architecture": "gpt2", "num_key_value_heads": 2}, "must equal num_attention_heads for gpt2"),
        ({"architecture": "gpt2", "head_dim": 8}, "head_dim = 8 times 4 heads must make hidden_size 16 for gpt2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor'"),
    ],
)
def test_an_impossible_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**TINY, **change})


@every_variant
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_of_nothing(config, shape):
    model = build(config)
    y = model(np.zeros(shape, np.int64), np.zeros(shape, np.int32))
    assert y.shape == (*shape, 1 if config.head == "scalar" else 17)
    y.backward(np.zeros(y.shape, np.float32))
    assert not model.flat_grad.any()


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
@pytest.mark.parametrize("dtype", ["u1", "u8", "i8"])
def test_any_whole_numbers_are_a_start(name, dtype):
    model, tokens, start = randomised(VARIANTS[name]), np.arange(10).reshape(2, 5), np.array([[0] * 5, [0, 0, 2, 2, 2]])
    expected = model(tokens, start.astype(np.int32)).data
    assert np.array_equal(model(tokens, start.astype(dtype)).data, expected)
    with pytest.raises(TypeError, match="start must be whole numbers, and is float64"):
        model(tokens, start.astype(float))


def test_a_cache_is_refused_where_it_would_drop_a_gradient():
    model = build(VARIANTS["llama"])
    with pytest.raises(RuntimeError, match="a model with a cache has no gradient"):
        model(np.zeros((1, 2), np.int64), cache=model.new_cache(1, 4))


def test_errors_name_what_is_wrong():
    model = Llama(Config(**TINY, max_position_embeddings=6))
    with pytest.raises(ValueError, match="7 tokens are more than the model's context of 6"):
        model(np.zeros((1, 7), np.int64))
    model(np.zeros((1, 7), np.int64), np.full((1, 7), 1, np.int32))  # six of them count
    with pytest.raises(ValueError, match="id 17 at position"):
        model(np.full((1, 3), 17))
    for kind, other in ((Llama, VARIANTS["gpt2"]), (GPT2, VARIANTS["llama"])):
        with pytest.raises(ValueError, match="takes a Config of architecture"):
            kind(other)
    arrays = {name: p.data.copy() for name, p in model.parameters.items()}
    del arrays["model.norm.weight"]
    arrays["extra"] = np.ones(2)
    arrays["model.embed_tokens.weight"] = np.ones((3, 16))
    before = model.flat.copy()
    with pytest.raises(ValueError, match=r"missing: model.norm.weight; not known: extra; misshapen: .* is \(3, 16\)"):
        model.load_state_dict(arrays)
    assert np.array_equal(before, model.flat)


@every_variant
def test_parameter_count(config):
    count = scaling.parameter_count(config)
    assert count["total"] == build(config).flat.size
    assert count["embedding"] + count["blocks"] + count["head"] == count["total"]


def test_flops_are_counted_from_the_products():
    """Against a count of the multiply-adds of the matrix products one by one."""
    config = Config(vocab_size=100, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    flops = scaling.flops_per_token(config, 64)
    matrices = sum(
        2 * p.size for name, p in Llama(config).parameters.items() if p.ndim == 2
    )  # the tied embedding is the head
    assert flops["matrices"] == matrices
    assert flops["attention"] == 3 * 4 * 32 * 32.5
    assert flops["training"] == 3 * (matrices + flops["attention"])
    windowed = Config(vocab_size=100, hidden_size=32, num_hidden_layers=3, sliding_window=1)
    assert scaling.flops_per_token(windowed, 64)["attention"] == 3 * 4 * 32


@pytest.mark.parametrize("name, qk_norm", [("llama", False), ("llama", True), ("gpt2", False)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocab", [50, 20_000])
def test_memory_is_what_the_graph_keeps(name, qk_norm, checkpointing, vocab):
    sizes = {"vocab_size": vocab, "hidden_size": 64, "architecture": name, "qk_norm": qk_norm}
    config = Config(**sizes, activation_checkpointing=checkpointing)
    model, tokens = build(config), np.zeros((4, 64), np.int64)
    kept = {}
    for _, array in saved_arrays(loss_of(model, tokens, tokens)):
        base = array if array.base is None else array.base
        if not np.shares_memory(array, model.flat):
            kept[id(base)] = base.nbytes
    account = scaling.memory_bytes(config, 4, 64, vocab_chunk_bytes=0)
    measured = sum(kept.values())
    if checkpointing:  # plus one block at a time, which is not in the graph until its turn comes
        plain = [Config(**sizes, num_hidden_layers=n) for n in (1, 2)]
        one, two = (scaling.memory_bytes(c, 4, 64, vocab_chunk_bytes=0)["activations"] for c in plain)
        measured += two - one
    assert abs(account["activations"] / measured - 1) < 0.05
    assert account["weights"] == 4 * model.flat.size


def test_the_gradient_of_a_whole_model_by_the_common_check():
    rng = np.random.default_rng(8)
    model = randomised(VARIANTS["llama"])
    tokens = rng.integers(0, 17, (1, 5))
    weights = [p.data.copy() for p in model.used.values()]

    def f(*values):
        model.used = dict(zip(model.used, values, strict=True))
        return model(tokens)

    gradcheck(f, *weights, rng=rng)
