"""Adapters, four bits, PEFT's files, and the trainers with --lora-rank."""

import gc
import json
import math
import weakref
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minillm import lora, op_examples
from minillm.autograd import Tensor, saved_arrays
from minillm.data.conversations import encode_preferences, read_preferences
from minillm.generate import generate
from minillm.hub import load_pretrained
from minillm.lora import CODE_BOOK, NF4, adapt, adapted_linear, merge, quantised, switched_off
from minillm.model import Config, build
from minillm.optim import AdamW
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers import dpo, ppo, reward, sft
from minillm.trainers.common import frozen_logprobs, load_with_head, next_token_backward, pad, save_model
from tests.gradcheck import gradcheck

TOKENIZER = Tokenizer.train([], SMALLEST_VOCABULARY)
V = TOKENIZER.vocab_size
KINDS = {
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "activation_checkpointing": True},
    "gpt2": {"architecture": "gpt2"},
    "llama scalar": {"head": "scalar"},
    "gpt2 scalar": {"architecture": "gpt2", "head": "scalar"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_bases = pytest.mark.parametrize("quantize", ["none", "nf4"])


def small(kind="llama", seed=1, dtype=np.float32, **sizes):
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2} | sizes
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 32} | sizes
    return shaken(build(Config(**sizes, **KINDS[kind]), seed, dtype), seed)


def shaken(model, seed=0, size=0.3):
    """The model with an adapter (or weights) that does something."""
    model.flat += size * np.random.default_rng(seed).standard_normal(model.flat.size).astype(model.flat.dtype)
    return model


def tokens_of(model, rows=2, length=7, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, length))


def loss_of(model, tokens):
    """A scalar that every logit is in."""
    logits = model(tokens)
    weights = np.random.default_rng(9).standard_normal(logits.shape)
    return (logits * weights).sum()


# ------------------------------------------------------------------ four bits


def test_the_code_book_is_the_normal_distributions_quantiles():
    """Appendix E: 8 quantiles above 0 and 7 below, evenly spaced in probability up to the mean of 1 - 1/30 and
    1 - 1/32, 0 itself, and all divided by the largest."""
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    book = np.sort([*above, 0.0, *below]) / max(above)
    assert CODE_BOOK.dtype == np.float32
    np.testing.assert_allclose(CODE_BOOK, book, atol=2e-7)


def slow_round_trip(matrix):
    """What NF4 makes of a matrix, number by number, from the formulas."""
    numbers = [float(x) for x in matrix.reshape(-1)]
    blocks = [numbers[i : i + 64] for i in range(0, len(numbers), 64)]
    largest = [max(abs(x) for x in block) for block in blocks]
    lowest, out = min(largest), []
    for first in range(0, len(blocks), 256):
        step = (max(largest[first : first + 256]) - lowest) / 255
        for block, c in zip(blocks[first : first + 256], largest[first : first + 256], strict=True):
            restored = lowest + (round((c - lowest) / step) * step if step else 0.0)
            for x in block:
                out.append(min(CODE_BOOK.tolist(), key=lambda q, x=x, c=c: abs(q - (x / c if c else 0.0))) * restored)
    return np.array(out).reshape(matrix.shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (8, 8), (5, 13), (7, 64), (300, 60)])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_four_bits_are_what_the_formulas_say(shape, scale):
    rng = np.random.default_rng(shape[0])
    matrix = (scale * rng.standard_normal(shape) * rng.lognormal(size=(shape[0], 1))).astype(np.float32)
    found = quantised(matrix)
    dense = found.dense()
    assert dense.dtype == np.float32 and dense.shape == found.shape == shape
    np.testing.assert_allclose(dense, slow_round_trip(matrix), rtol=1e-5, atol=1e-6 * np.abs(matrix).max())
    np.testing.assert_array_equal(found.dense(np.float64), dense.astype(np.float64))


@given(st.integers(0, 999), st.integers(1, 40), st.sampled_from([64, 128]))
@settings(max_examples=20)
def test_an_error_is_at_most_half_a_gap_of_the_code_book(seed, rows, width):
    matrix = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    c = np.abs(matrix.reshape(-1, 64)).max(1)
    rounded = (c.max() - c.min()) / 510  # half a step of the scales
    error = np.abs(quantised(matrix).dense() - matrix).reshape(-1, 64)
    bound = np.diff(CODE_BOOK).max() / 2 * c[:, None] + rounded + 1e-6
    assert (error <= bound).all() and error.max() > bound.max() / 4


def test_bits_of_a_weight():
    found = quantised(np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32))
    assert 8 * found.nbytes / 512**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-4)  # 4.127
    assert found.codes.size == 512**2 / 2 and found.scales.size == 512**2 / 64 and found.steps.size == 512**2 / 64 / 256


def test_a_scale_beside_a_huge_one_keeps_its_sign_and_zeros_stay():
    matrix = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    matrix[3, 5], matrix[7] = 1e4, 0
    dense = quantised(matrix).dense()
    assert (dense * matrix >= 0).all() and not dense[7].any() and dense[3, 5] == pytest.approx(1e4)
    with pytest.raises(ValueError, match=r"a matrix \(40, 64\) with numbers that are not finite"):
        quantised(np.where(matrix == 0, np.nan, matrix))


def test_what_is_quantised_again_stays():
    matrix = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    once = quantised(matrix).dense()
    np.testing.assert_allclose(quantised(once).dense(), once, rtol=1e-5)


# ------------------------------------------------------------------ the op


@st.composite
def calls(draw):
    """x, A and some B, the frozen weight and bias, and the columns of each module."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank, K, rows = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8])), draw(st.integers(0, 4))
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    adapted = draw(st.lists(st.sampled_from(range(len(widths))), unique=True))
    ends = np.cumsum(widths).tolist()
    columns = [slice(ends[i] - widths[i], ends[i]) for i in sorted(adapted)]
    factors = [rng.standard_normal((len(columns) * rank, K))] if columns else []
    factors += [rng.standard_normal((own.stop - own.start, rank)) for own in columns]
    weight = rng.standard_normal((sum(widths), K))
    weight = quantised(weight.astype(np.float32)) if draw(st.booleans()) else weight
    constants = {"weight": weight, "columns": columns, "scale": draw(st.sampled_from([0.25, 1.0, 2.0]))}
    if draw(st.booleans()):
        constants["bias"] = rng.standard_normal(sum(widths))
    return [rng.standard_normal((2, rows, K)), *factors], constants, rng


@given(calls())
@settings(max_examples=60)
def test_the_ops_value_and_gradient(call):
    (x, *factors), constants, rng = call
    f = lambda *inputs: adapted_linear(*inputs, **constants)
    dense = constants["weight"]
    dense = dense.dense(np.float64) if isinstance(dense, NF4) else dense.copy()
    if factors:
        A, *B = factors
        rank = B[0].shape[1]
        for p, (b, own) in enumerate(zip(B, constants["columns"], strict=True)):
            dense[own] += constants["scale"] * b @ A[p * rank : (p + 1) * rank]
    expected = x @ dense.T + constants.get("bias", 0.0)
    np.testing.assert_allclose(f(x, *factors).data, expected, rtol=1e-10, atol=1e-10)
    gradcheck(f, x, *factors, rng=rng)


def test_the_op_exemplifies_itself():
    rng, sizes = np.random.default_rng(1), op_examples.letters(adapted_linear)
    assert set(op_examples.sections(adapted_linear)) == {"equation", "gradient", "keeps", "example"}
    for n in (1, 3):
        inputs, constants = op_examples.draw(adapted_linear, rng, dict.fromkeys(sizes, n))
        gradcheck(lambda *x, constants=constants: adapted_linear(*x, **constants), *inputs, rng=rng)


def test_what_needs_no_gradient_keeps_and_costs_nothing():
    rng = np.random.default_rng(0)
    x, A, B, weight = (rng.standard_normal(shape) for shape in ((5, 4), (2, 4), (3, 2), (3, 4)))
    constants = {"weight": weight, "columns": [slice(0, 3)]}
    y = adapted_linear(x, Tensor(A, True), Tensor(B, True), **constants)
    y.backward(np.ones((5, 3)))  # the model's first projection: the frozen embedding needs no dx
    frozen = adapted_linear(Tensor(x, True), weight=quantised(weight.astype(np.float32)))
    kept = saved_arrays(frozen)
    assert {array.dtype for _, array in kept} == {np.dtype(np.uint8), np.dtype(np.float32)}
    assert sum(array.size for _, array in kept if array.dtype == np.float32) == 2  # a step and the offset: no W, no x


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_activations(dtype):
    rng = np.random.default_rng(0)
    x, A, B, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (2, 8), (3, 2), (3, 8)))
    constants = {"weight": weight, "columns": [slice(0, 3)], "bias": np.ones(3, np.float32)}
    g = rng.standard_normal((5, 3))
    results = []
    for activations in (np.float32, dtype):
        leaves = [Tensor(x.astype(activations), True), Tensor(A, True), Tensor(B, True)]
        y = adapted_linear(*leaves, **constants)
        y.backward(g.astype(activations))
        assert [leaf.grad.dtype for leaf in leaves] == [activations, np.float32, np.float32] and y.dtype == activations
        results.append([y.data, *(leaf.grad for leaf in leaves)])
    for exact, rough in zip(*results, strict=True):
        assert np.linalg.norm(exact - rough.astype(np.float32)) < 0.03 * np.linalg.norm(exact)


# ------------------------------------------------------------------ an adapted model


@every_kind
@both_bases
def test_it_begins_as_the_model_it_was_made_from(kind, quantize):
    model = small(kind)
    before, tokens = model.flat.copy(), tokens_of(model)
    adapted = adapt(model, rank=3, quantize=quantize)
    on, off, plain = (m(tokens).data for m in (adapted, switched_off(adapted), model))
    assert np.array_equal(on, off)
    assert np.array_equal(on, plain) == (quantize == "none")  # four bits are another model
    for name, p in merge(adapted).parameters.items():
        error = np.linalg.norm(p.data - model.parameters[name].data) / np.linalg.norm(p.data)
        rounded = quantize == "nf4" and p.ndim == 2 and name.startswith(model.block_prefix.partition("{")[0])
        assert 0.05 < error < 0.12 if rounded else error == 0, name
    shaken(adapted)
    assert np.array_equal(switched_off(adapted)(tokens).data, off)
    assert np.abs(adapted(tokens).data - on).max() > 1e-2
    assert np.array_equal(model.flat, before) and model.parameters.keys() == build(model.config).parameters.keys()
    assert switched_off(model) is model


@pytest.mark.parametrize("kind, targets", [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("mlp.c_proj",))])
def test_the_names_that_are_told_are_adapted_and_no_others(kind, targets):
    names = [name.removesuffix(".lora_A.weight") for name in adapt(small(kind), targets=targets).parameters]
    names = {name.removeprefix("base_model.model.") for name in names if "lora_B" not in name}
    every = [name.removesuffix(".weight") for name, p in small(kind).parameters.items() if p.ndim == 2]
    assert names == {name for name in every if name.endswith(tuple(f".{target}" for target in targets))}
    assert len(names) == 2 * len(targets)
    in_full = adapt(small(kind), targets=sorted(names)[:1])
    assert len(in_full.parameters) == 2


def test_all_of_them_are_the_default_and_a_is_kaimings():
    adapted = adapt(small("llama", hidden_size=64), rank=5)
    assert adapted.adapter.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(adapted.parameters) == 2 * 7 * 2
    for name, p in adapted.parameters.items():
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(p.shape[1])
            assert 0.9 * bound < np.abs(p.data).max() <= bound and abs(p.data.mean()) < 0.2 * bound
        else:
            assert not p.data.any()
    again, other = adapt(small("llama", hidden_size=64), rank=5), adapt(small("llama", hidden_size=64), rank=5, seed=1)
    assert np.array_equal(adapted.flat, again.flat) and not np.array_equal(adapted.flat, other.flat)


@pytest.mark.parametrize(
    "message, options",
    [
        ("LoRA target 'q_prj' is no projection of this model: q_proj, .*you meant q_proj$", {"targets": ["q_prj"]}),
        ("LoRA target 'embed_tokens' is no projection of this model", {"targets": ("q_proj", "embed_tokens")}),
        ("LoRA target 'proj' is no projection", {"targets": ("proj",)}),
        ("LoRA's targets have to be 'all-linear' or a list of names, and are ()", {"targets": ()}),
        ("LoRA's targets have to be 'all-linear' or a list of names, and are 'q_proj'", {"targets": "q_proj"}),
        ("a LoRA rank has to be a whole number of at least 1, and is 0", {"rank": 0}),
        ("a LoRA rank has to be a whole number of at least 1, and is 1.5", {"rank": 1.5}),
        ("LoRA's alpha has to be above 0, and is -1", {"alpha": -1}),
        ("LoRA's alpha has to be above 0, and is nan", {"alpha": math.nan}),
        ("quantize has to be none or nf4, and is 'int8'", {"quantize": "int8"}),
    ],
)  # fmt: skip
def test_what_can_not_be_adapted_is_said_in_one_line(message, options):
    with pytest.raises(ValueError, match=message.replace("()", r"\(\)")) as caught:
        adapt(small(), **options)
    assert "\n" not in str(caught.value)


def test_one_adapter_at_a_time():
    adapted = adapt(small())
    with pytest.raises(ValueError, match="the model has an adapter: merge it"):
        adapt(adapted)
    for function in (merge, lambda model: lora.save_adapter(model, "nowhere")):
        with pytest.raises(ValueError, match="the model has no adapter"):
            function(small())


@every_kind
@both_bases
def test_gradients_are_finite_differences(kind, quantize):
    adapted = shaken(adapt(small(kind, dtype=np.float64), rank=2, quantize=quantize))
    tokens, direction = tokens_of(adapted), np.random.default_rng(3).standard_normal(adapted.flat.size)
    loss_of(adapted, tokens).backward()
    at, eps = adapted.flat.copy(), 2e-5

    def along(step):
        adapted.flat[...] = at + step * direction
        return loss_of(adapted, tokens).item()

    coarse, fine = ((along(h) - along(-h)) / (2 * h) for h in (eps, eps / 2))
    assert np.isclose(adapted.flat_grad @ direction, (4 * fine - coarse) / 3, rtol=1e-6)
    for name, p in adapted.parameters.items():
        assert p.grad.any(), name


@every_kind
def test_gradients_are_the_chain_rule_of_the_merged_weights(kind):
    """W + s B A: dA = s B^T dW, dB = s dW A^T."""
    adapted = shaken(adapt(small(kind, dtype=np.float64), rank=2, alpha=3.0, rslora=True))
    plain, tokens = merge(adapted), tokens_of(adapted)
    for model in (adapted, plain):
        loss_of(model, tokens).backward()
    scale, checked = 3.0 / math.sqrt(2), 0
    for name, p in adapted.parameters.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0] or "score"
        dW = plain.parameters[f"{module}.weight"].grad
        if module == "score":
            expected = dW
        else:
            dW = dW.T if kind.startswith("gpt2") else dW
            A, B = (adapted.parameters[f"base_model.model.{module}.lora_{x}.weight"].data for x in "AB")
            expected = scale * B.T @ dW if "lora_A" in name else scale * dW @ A.T
        np.testing.assert_allclose(p.grad, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())
        checked += 1
    assert checked == len(adapted.parameters) > 10


@every_kind
@both_bases
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 5e-5)])
def test_a_merged_model_computes_the_same(kind, quantize, dtype, tolerance):
    model = small(kind, dtype=dtype)
    adapted = shaken(adapt(model, rank=3, quantize=quantize))
    tokens, plain = tokens_of(model), merge(adapted)
    expected = adapted(tokens).data
    assert plain.adapter is None and plain.parameters.keys() == model.parameters.keys()
    assert np.abs(plain(tokens).data - expected).max() <= tolerance * np.abs(expected).max()
    assert not any(np.shares_memory(plain.flat, p.data) for p in adapted.adapter.frozen.values())


def test_answers_with_a_cache_are_the_merged_models():
    adapted = shaken(adapt(small("qwen2"), rank=2), size=1.0)
    prompts = [[1, 2, 3], [4]]
    told = [
        [answer.ids.tolist() for answer in generate(model, prompts, max_new_tokens=9, temperature=0)]
        for model in (adapted, merge(adapted), switched_off(adapted))
    ]
    assert told[0] == told[1] != told[2]


# ------------------------------------------------------------------ memory and training


@both_bases
def test_nothing_but_the_adapter_has_gradients_and_moments(quantize):
    model = small(hidden_size=64, intermediate_size=128)
    arrays = [weakref.ref(model.flat), weakref.ref(model.flat_grad)]
    weights = model.flat.nbytes
    adapted = adapt(model, rank=2, quantize=quantize)
    matrices = sum(p.size for name, p in model.parameters.items() if "proj" in name)
    del model
    gc.collect()
    assert arrays[1]() is None and (arrays[0]() is None) == (quantize == "nf4")
    optimizer = AdamW(adapted.parameters)
    assert len(optimizer.runs) == 1 and optimizer.runs[0].data.size == adapted.flat.size
    before = {name: tensor.data.copy() for name, tensor in adapted.adapter.frozen.items()}
    loss_of(adapted, tokens_of(adapted)).backward()
    optimizer.step()
    for name, tensor in adapted.used.items():
        assert ("lora_" in name) == tensor.requires_grad == (tensor.grad is not None), name
    for name, array in before.items():
        assert np.array_equal(adapted.adapter.frozen[name].data, array), name
    found = lora.memory(adapted, optimizer)
    four_bits = sum(matrix.nbytes for matrix in adapted.adapter.quantised.values())
    assert found["frozen"] == weights - (4 * matrices - four_bits if quantize == "nf4" else 0)
    assert quantize == "none" or 4.125 < 8 * four_bits / matrices < 4.14
    assert found["trained"] == found["gradients"] == found["moments"] / 2 == adapted.flat.nbytes
    assert found["total"] == found["frozen"] + 4 * adapted.flat.nbytes


def trained(model, batch, steps=4, size=0, **options):
    """An adapter after some steps on one batch."""
    adapted = adapt(model, rank=2, **options)
    optimizer = AdamW(adapted.parameters, 0.05)
    losses = []
    for _ in range(steps):
        losses.append(next_token_backward(adapted, batch, size))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return adapted


def ragged(seed=0, rows=5):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 11, n) for n in rng.integers(3, 12, rows)]
    return pad(sequences, [np.ones(len(ids), bool) for ids in sequences], 0)


@both_bases
def test_training_leaves_the_base_and_two_runs_are_the_same_bits(quantize):
    model, batch = small(num_hidden_layers=1), ragged()
    before = model.flat.copy()
    reference = frozen_logprobs(switched_off(adapt(model, quantize=quantize)), batch)
    adapted = trained(model, batch, quantize=quantize)
    assert np.array_equal(adapted.flat, trained(model, batch, quantize=quantize).flat)
    assert not np.array_equal(adapted.flat, trained(model, batch, quantize=quantize, seed=1).flat)
    assert np.array_equal(model.flat, before)
    assert np.array_equal(frozen_logprobs(switched_off(adapted), batch), reference)
    assert not np.array_equal(frozen_logprobs(adapted, batch), reference)


@both_bases
def test_micro_batches_do_not_matter(quantize):
    found = []
    for size in (0, 1, 2):
        adapted = shaken(adapt(small(dtype=np.float64), rank=2, quantize=quantize))
        next_token_backward(adapted, ragged(), size)
        found.append(adapted.flat_grad.copy())
    for gradient in found[1:]:
        np.testing.assert_allclose(gradient, found[0], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ PEFT's files


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama scalar"])
def test_the_files_are_pefts(kind, tmp_path):
    targets = ("c_attn", "c_fc") if kind == "gpt2" else ("q_proj", "v_proj", "up_proj")
    adapted = shaken(adapt(small(kind, num_hidden_layers=1), rank=3, alpha=5.0, targets=targets))
    arrays = load_file(lora.save_adapter(adapted, tmp_path / "a", "the/base") / "adapter_model.safetensors")
    llama = "base_model.model.model.layers.0."
    kv = 16 if kind == "llama scalar" else 8
    expected = {
        "llama": {
            f"{llama}self_attn.q_proj.lora_A.weight": (3, 16),
            f"{llama}self_attn.q_proj.lora_B.weight": (16, 3),
            f"{llama}self_attn.v_proj.lora_A.weight": (3, 16),
            f"{llama}self_attn.v_proj.lora_B.weight": (kv, 3),
            f"{llama}mlp.up_proj.lora_A.weight": (3, 16),
            f"{llama}mlp.up_proj.lora_B.weight": (24, 3),
        },
        "gpt2": {
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (3, 16),
            "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (48, 3),
            "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight": (3, 16),
            "base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight": (24, 3),
        },
    }
    expected["llama scalar"] = expected["llama"] | {"base_model.model.score.weight": (1, 16)}
    assert {name: array.shape for name, array in arrays.items()} == expected[kind]
    values = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert values == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if kind == "llama scalar" else "CAUSAL_LM",
        "base_model_name_or_path": "the/base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": list(targets),
        "fan_in_fan_out": kind == "gpt2",
        "bias": "none",
        "modules_to_save": ["score"] if kind == "llama scalar" else None,
        "init_lora_weights": True,
    }


@every_kind
def test_an_adapter_comes_back(kind, tmp_path):
    model = small(kind)
    adapted, tokens = shaken(adapt(model, rank=3, alpha=5.0, rslora=True)), tokens_of(model)
    again = lora.load_adapter(model, lora.save_adapter(adapted, tmp_path))
    assert np.array_equal(again.flat, adapted.flat) and again.adapter.scale == adapted.adapter.scale == 5 / math.sqrt(3)
    assert np.array_equal(again(tokens).data, adapted(tokens).data)
    four_bits = lora.load_adapter(model, tmp_path, "nf4")
    assert np.array_equal(four_bits.flat, adapted.flat) and len(four_bits.adapter.quantised) == 8


@pytest.fixture
def saved(tmp_path):
    return lora.save_adapter(shaken(adapt(small(), targets=("q_proj",))), tmp_path / "a")


def test_a_16_bit_adapter_is_read(saved):
    path = saved / "adapter_model.safetensors"
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(path).items()}
    save_file(arrays, path)
    for name, p in lora.load_adapter(small(), saved).parameters.items():
        assert p.dtype == np.float32 and np.array_equal(p.data, arrays[name].astype(np.float32))


def test_a_configuration_of_pefts_own_writing_is_understood(saved):
    """All that PEFT 0.21 writes and save_adapter does not, and full names, as it writes them for all-linear."""
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    nothing = ["alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config", "kasa_config"]
    nothing += ["exclude_modules", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config"]
    nothing += ["megatron_config", "revision", "target_parameters", "trainable_token_indices", "use_bdlora"]
    theirs = dict.fromkeys(nothing) | {"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "lora_bias": False}
    theirs |= {"megatron_core": "megatron.core", "peft_version": "0.21.2", "qalora_group_size": 16, "use_dora": False}
    theirs |= {"ensure_weight_tying": False, "use_qalora": False, "lora_alpha": 7, "lora_dropout": 0.05}
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 0)]
    path.write_text(json.dumps(values | theirs | {"target_modules": names}))
    found = lora.load_adapter(small(), saved)
    assert found.adapter.scale == 7 / 8 and set(found.adapter.modules) == set(names)
    for name, array in load_file(saved / "adapter_model.safetensors").items():
        assert np.array_equal(found.parameters[name].data, array)


def test_what_does_not_fit_is_named(saved):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    path, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    arrays, values = load_file(path), json.loads(config.read_text())

    def refused(message, model=None):
        with pytest.raises(ValueError, match=message) as caught:
            lora.load_adapter(model or small(), saved)
        assert "\n" not in str(caught.value)

    refused(rf"a: misshapen: .*{name} is \(8, 16\), not \(8, 24\)", small(hidden_size=24))
    refused("a: not known: base_model.model.model.layers.1", small(num_hidden_layers=1))
    refused("a: missing: base_model.model.score.weight", small("llama scalar"))
    refused("a: LoRA target 'q_proj' is no projection of this model: c_attn", small("gpt2"))
    for change, message in [
        ({name: None}, f"a: missing: {name}$"),
        (
            {"base_model.model.x.lora_magnitude_vector": np.ones(2)},
            "not known: base_model.model.x.lora_magnitude_vector",
        ),
        ({name: arrays[name].astype(np.int8)}, f"{name} is stored as I8, and only F64, F32"),
    ]:
        save_file({key: array for key, array in (arrays | change).items() if array is not None}, path)
        refused(message)
    path.write_bytes(b"not this")
    refused("adapter_model.safetensors is not a readable safetensors file")
    path.rename(saved / "adapter_model.bin")
    refused(r"a has no adapter_model.safetensors \(pickled weights are not read")
    for change, message in [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern {'q_proj': 2} is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"r": "8"}, "r is '8', and no adapter can be made of that"),
        ({"target_modules": None}, "target_modules is None"),
    ]:
        config.write_text(json.dumps(values | change))
        refused(f"adapter_config.json: {message}")
    config.write_text("[]")
    refused("adapter_config.json is not a readable JSON object")
    config.unlink()
    refused("a is no adapter's folder: it has no adapter_config.json")


# ------------------------------------------------------------------ trainers

PAIRS = [{"prompt": word, "chosen": word + "!", "rejected": "ab"[: 1 + i % 2]} for i, word in enumerate("acegikmoq")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An SFT model, a reward model, and rows for every trainer."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind, seed in (("sft", "llama", 1), ("reward", "llama scalar", 2)):
        model = small(kind, seed, vocab_size=V, max_position_embeddings=48)
        save_model(folder / name, model, TOKENIZER, "chatml")
    rows = {
        "chats": [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS],
        "pairs": PAIRS,
        "prompts": [{"prompt": row["prompt"]} for row in PAIRS],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


FEW = {"lora_rank": 2, "lora_alpha": 8.0, "batch_size": 4, "log_every": 1, "eval_every": 3, "samples": 1, "lr": 0.01}


def settings_of(trainer, folders, out, **options):
    data = {sft: "chats", reward: "pairs", dpo: "pairs"}
    kinds = {sft: sft.SFTConfig, reward: reward.RewardConfig, dpo: dpo.DPOConfig, ppo: ppo.PPOConfig}
    given = {"out": out, "model": folders / "sft"} | FEW
    if trainer is ppo:
        given |= {"reward": folders / "reward", "prompts": (folders / "prompts.jsonl",), "episodes": 12}
        given |= {"value_warmup": 1, "max_new_tokens": 4, "reference_samples": 4, "max_step_kl": 1e9}
    else:
        given["data"] = (folders / f"{data[trainer]}.jsonl",)
    return kinds[trainer](**given | options)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("trainer", [sft, reward, dpo, ppo], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_trainers_folder_is_a_whole_model_and_an_adapter(trainer, quantize, folders, tmp_path, capsys):
    out = tmp_path / "out"
    targets = ("q_proj", "v_proj", "down_proj")
    model, _ = trainer.train(settings_of(trainer, folders, out, quantize=quantize, lora_targets=targets))
    assert "numbers of adapters are trained, beside" in capsys.readouterr().out
    written, head = load_pretrained(out), "scalar" if trainer is reward else "lm"
    assert np.array_equal(written.flat, model.flat) and model.adapter is None
    base = load_with_head(folders / "sft", head, seed=0)
    for name, p in base.parameters.items():
        changed = not np.array_equal(written.parameters[name].data, p.data)
        trained_here = any(target in name for target in (*targets, "score"))
        assert changed == (trained_here or (quantize == "nf4" and "proj" in name)), name
    values = json.loads((out / "adapter/adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(folders / "sft") and values["target_modules"] == list(targets)
    again = lora.load_adapter(base, out / "adapter", quantize)
    tokens = tokens_of(written)
    np.testing.assert_allclose(again(tokens).data, written(tokens).data, atol=1e-5)


@both_bases
def test_dpo_begins_at_ln_2_with_margins_of_0_and_its_reference_stays(quantize, folders, tmp_path):
    config = settings_of(dpo, folders, tmp_path)
    rows = list(read_preferences(folders / "pairs.jsonl", None))
    examples = dpo.pairs(encode_preferences(rows, "chatml", TOKENIZER, 47, ties=False))
    model = adapt(load_pretrained(folders / "sft"), rank=2, quantize=quantize)
    reference = switched_off(model)
    examples = dpo.with_reference(reference, examples, 0)
    optimizer = AdamW(model.parameters, 0.01)
    first = dpo.backward(model, examples, config, 0)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0  # exactly: the same numbers, subtracted
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-7)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        last = dpo.backward(model, examples, config, 0)
    assert last["rewards/margins"] > 0 and last["loss"] < first["loss"]
    assert [e.reference for e in dpo.with_reference(reference, examples, 0)] == [e.reference for e in examples]


def test_dpo_takes_the_reference_that_is_given(folders, tmp_path):
    dpo.train(settings_of(dpo, folders, tmp_path / "one"))
    dpo.train(settings_of(dpo, folders, tmp_path / "two", reference=tmp_path / "one"))
    first = [next(row for row in metrics(tmp_path / name) if "loss" in row) for name in ("one", "two")]
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first[1]["loss"] - math.log(2)) > 1e-4


@both_bases
def test_ppo_begins_with_a_kl_of_0_and_holds_two_models_for_four(quantize, folders, tmp_path, monkeypatch):
    seen, models = [], {}
    experience, model_rewards = ppo.experience, ppo.model_rewards

    def watched_rewards(model, *rest):
        models["reward"] = model
        return model_rewards(model, *rest)

    def watched_experience(policy, reference, value, *rest):
        models.update(policy=policy, reference=reference, value=value)
        e = experience(policy, reference, value, *rest)
        seen.append(
            (e, frozen_logprobs(reference, seen[0][0].batch if seen else e.batch), models["reward"].flat.copy())
        )
        return e

    monkeypatch.setattr(ppo, "experience", watched_experience)
    monkeypatch.setattr(ppo, "model_rewards", watched_rewards)
    ppo.train(settings_of(ppo, folders, tmp_path / "out", quantize=quantize, value_warmup=2))
    kls = [np.abs(e.kl).max() for e, *_ in seen]
    assert kls[0] == kls[1] == 0 == seen[0][0].logp[~seen[0][0].mask].max()  # the warm-up trains values alone
    assert seen[1][0].mask.any() and np.array_equal(seen[0][0].logp, seen[0][0].reference_logp)
    last = frozen_logprobs(models["policy"], seen[-1][0].batch)
    assert np.abs(last - seen[-1][0].reference_logp).max() > 0  # then the policy moves
    for _, reference_logp, scores in seen:
        assert np.array_equal(reference_logp, seen[0][1]) and np.array_equal(scores, seen[0][2])
    memories = {
        name: {id(t.data.base) for t in model.used.values() if not t.requires_grad} for name, model in models.items()
    }
    shared = models["policy"].adapter.quantised if quantize == "nf4" else memories["policy"]
    assert memories["policy"] == memories["reference"] and shared
    own = models["reward"].flat
    assert any(np.shares_memory(own, t.data) for t in models["value"].used.values()) == (quantize == "none")
    assert not np.shares_memory(own, models["value"].head.data) and models["value"].head.requires_grad
    assert not np.array_equal(models["value"].head.data, models["reward"].head.data)


def test_a_value_model_can_begin_as_the_policys_model(folders, tmp_path):
    policy, _ = ppo.train(settings_of(ppo, folders, tmp_path / "out", value_init="model"))
    assert not np.array_equal(policy.flat, load_pretrained(folders / "sft").flat)


def test_two_runs_are_the_same_bits(folders, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model, _ = sft.train(settings_of(sft, folders, tmp_path / name, quantize="nf4", seed=seed))
        found.append((model.flat, (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] != found[2][1]


def test_settings_that_make_no_sense_are_told_before_anything_is_made(folders, tmp_path):
    with pytest.raises(ValueError, match=r"^--quantize has to be none without --lora-rank: .*, and is nf4$"):
        settings_of(sft, folders, tmp_path / "out", lora_rank=0, quantize="nf4")
    for trainer in (sft, reward, dpo, ppo):
        with pytest.raises(ValueError, match="LoRA target 'q_prj' is no projection of this model: q_proj"):
            trainer.train(settings_of(trainer, folders, tmp_path / "out", lora_targets=("q_prj",)))
        assert not (tmp_path / "out").exists()
