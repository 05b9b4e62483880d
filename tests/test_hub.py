"""minillm.hub: folders of every kind come back as they were, compute what others compute from them, and a wrong one is
one line that names what is wrong, before anything is loaded."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import functional as F
from minillm import hub
from minillm.chat import TEMPLATES, load_template, render
from minillm.generate import generate
from minillm.hub import config_of, load_pretrained, read_config, save_pretrained, stop_tokens
from minillm.model import Config, build
from minillm.tokenizer import LLAMA2, SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer
from minillm.trainers.common import save_model, template_of

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures" / "hf"
SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32)
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {
    "Llama": {"num_key_value_heads": 2},
    "Llama linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 6},
    "Llama llama3": {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "rope_theta": 5000.0},
    "Mistral": {"sliding_window": 5, "num_key_value_heads": 2},
    "Qwen2": {"attention_bias": True, "num_key_value_heads": 1},
    "Qwen2 window": {"attention_bias": True, "sliding_window": 3, "window_layers": (2,)},
    "Qwen3": {"qk_norm": True, "head_dim": 12, "num_key_value_heads": 2},
    "Qwen3 window": {"qk_norm": True, "sliding_window": 3},
    "Qwen3 pattern": {"qk_norm": True, "sliding_window": 3, "window_layers": (0, 2)},
    "GPT2": {"architecture": "gpt2"},
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BYTEWISE = Tokenizer.train([], SMALLEST_VOCABULARY)
MERGED = Tokenizer.train(["user\nHello there\n\nassistant\nHi! ### Response:\n [/INST] Hi there"] * 9, 400)


def model_of(kind, seed=1, dtype=np.float32, **options):
    """A model whose parameters are all at work: norms are not 1, and biases not 0."""
    model = build(Config(**SIZES | KINDS[kind] | options), dtype=dtype)
    model.flat[...] += 0.2 * np.random.default_rng(seed).standard_normal(model.flat.size)
    return model


def edit(path, change):
    """Rewrite a JSON file; `change` is a dict to merge in, in which ... takes a key away, or a function."""
    values = json.loads(path.read_text())
    if callable(change):
        change(values)
    else:
        values = {key: value for key, value in (values | change).items() if value is not ...}
    path.write_text(json.dumps(values))


def read_raw(path):
    """{name: (dtype, array)} of a safetensors file, by nothing but the format's description."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body, found = json.loads(data[8 : 8 + size]), data[8 + size :], {}
    assert header.pop("__metadata__", None) == {"format": "pt"}
    for name, tensor in header.items():
        part = body[slice(*tensor["data_offsets"])]
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            array = (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(part, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor["dtype"]])
        found[name] = tensor["dtype"], array.reshape(tensor["shape"])
    return found


def write_raw(path, tensors):
    """A safetensors file of {name: array} or {name: (dtype's name, array)}."""
    header, parts, offset = {}, [], 0
    for name, tensor in tensors.items():
        dtype, array = tensor if isinstance(tensor, tuple) else ("F32", np.asarray(tensor, np.float32))
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        parts, offset = [*parts, array.tobytes()], end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


# ------------------------------------------------------------------ Hugging Face checkpoints with float64 answers

with_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="the checkpoints are not beside this checkout")
every_fixture = pytest.mark.parametrize("name", ["llama_gqa_tied", "llama_rope_scaling", "qwen2_bias", "gpt2"])


@with_fixtures
@every_fixture
def test_logits(name):
    stored = np.load(FIXTURES / name / "ref.npz")
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        logits = load_pretrained(FIXTURES / name, dtype)(stored["input_ids"]).data
        assert logits.dtype == dtype
        assert np.abs(logits - stored["logits_f64"]).max() < tolerance


@with_fixtures
@every_fixture
def test_loss_and_every_gradient(name):
    """Within 1e-8, and one rounding more, because the answers are stored in float32."""
    stored = np.load(FIXTURES / name / "ref.npz")
    model, ids = load_pretrained(FIXTURES / name, np.float64), stored["input_ids"]
    loss = F.linear_cross_entropy(model.hidden(ids[:, :-1]), model.head, ids[:, 1:])
    loss.backward()
    assert abs(loss.item() - stored["loss_f64"]) < 1e-10
    gradients = {key.removeprefix("grad::"): stored[key] for key in stored.files if key.startswith("grad::")}
    assert gradients.keys() == model.parameters.keys()
    for parameter, expected in gradients.items():
        rounding = np.abs(expected) * np.finfo(np.float32).eps / 2
        assert (np.abs(model.parameters[parameter].grad - expected) <= 1e-8 + rounding).all(), parameter


@with_fixtures
@every_fixture
def test_greedy_ids_and_a_left_padded_batch(name):
    stored = np.load(FIXTURES / name / "ref.npz")
    model = load_pretrained(FIXTURES / name)
    expected, ids = stored["greedy_ids"][0], stored["input_ids"][0]
    n = int(np.argmin(expected == ids[: len(expected)]))  # the prompt is where they agree
    assert n >= 1
    (out,) = generate(model, [ids[:n]], max_new_tokens=len(expected) - n, temperature=0)
    assert np.array_equal(out.ids, expected[n:])
    mask = stored["padded_mask"]
    start = np.repeat((mask == 0).sum(1)[:, None], mask.shape[1], 1).astype(np.int32)
    padded = model(stored["padded_ids"], start).data
    assert np.abs(padded - stored["padded_logits_hf_f32"])[mask == 1].max() < 2e-5


@with_fixtures
@every_fixture
def test_a_checkpoint_saved_and_loaded_again(name, tmp_path):
    model = load_pretrained(FIXTURES / name)
    again = load_pretrained(save_pretrained(model, tmp_path / "saved"))
    assert again.config == model.config
    assert np.array_equal(again.flat, model.flat)
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", FIXTURES / name)
    )
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # without a tokenizer they are not known
    for key in theirs.keys() & ours.keys() - {*ids, "max_window_layers", "n_inner"}:
        assert ours[key] == theirs[key], key


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_from_its_folder(kind, head, dtype, tmp_path):
    for tied in (True, False):
        model = model_of(kind, head=head, tie_word_embeddings=tied)
        again = load_pretrained(save_pretrained(model, tmp_path, dtype=dtype))
        assert again.config == model.config and again.flat.dtype == np.float32
        assert np.array_equal(again.flat, model.flat.astype(DTYPES[dtype]).astype(np.float32))
        stored = read_raw(tmp_path / "model.safetensors")
        assert {kind for kind, _ in stored.values()} == {
            {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        }
        assert ("lm_head.weight" in stored) == (head == "lm" and not tied)
        values = json.loads((tmp_path / "config.json").read_text())
        assert values["dtype"] == values["torch_dtype"] == dtype
        (name,) = values["architectures"]
        assert name.startswith(kind.split()[0]) and name.endswith("ForSequenceClassification") == (head == "scalar")
        assert "score_pooling" not in values  # only where transformers would have to read it


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_what_a_reward_model_reads_is_in_its_config(kind, tmp_path):
    model = model_of(kind, head="scalar", pooling="mean")
    assert load_pretrained(save_pretrained(model, tmp_path)).config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["score_pooling"] == "mean"


def test_float64_stays_float64_where_it_is_asked_for(tmp_path):
    model = model_of("Qwen3", dtype=np.float64)
    assert np.array_equal(
        load_pretrained(save_pretrained(model, tmp_path, dtype="float64"), np.float64).flat, model.flat
    )
    rounded = load_pretrained(save_pretrained(model, tmp_path), np.float64)
    assert np.array_equal(rounded.flat, model.flat.astype(np.float32)) and not np.array_equal(rounded.flat, model.flat)


def test_several_files_are_one_model(tmp_path):
    model = model_of("Llama", tie_word_embeddings=False)
    save_pretrained(model, tmp_path, dtype="bfloat16", max_shard_size=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    stored = {file: read_raw(tmp_path / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in stored[file]}
    assert index["metadata"]["total_size"] == 2 * model.flat.size
    for tensors in stored.values():  # no more than is allowed, but for a single tensor that is larger
        assert len(tensors) == 1 or sum(2 * array.size for _, array in tensors.values()) <= 2000
    assert np.array_equal(load_pretrained(tmp_path).flat, model.flat.astype(DTYPES["bfloat16"]).astype(np.float32))

    write_raw(tmp_path / "consolidated.safetensors", {"stray": np.zeros(3)})  # in no index: nobody's business
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert np.array_equal(load_pretrained(tmp_path).flat, model.flat.astype(DTYPES["bfloat16"]).astype(np.float32))
    save_pretrained(model, tmp_path)  # one file again: the old ones would be another model's
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    assert np.array_equal(load_pretrained(tmp_path).flat, model.flat)


def test_the_single_file_goes_before_an_index(tmp_path):
    model = model_of("Llama")
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    assert np.array_equal(load_pretrained(tmp_path).flat, model.flat)


MEMORY = """
import re, sys
from pathlib import Path
from minillm.hub import load_pretrained

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_pretrained(sys.argv[1])
before = peak()
model = load_pretrained(sys.argv[2])
print((peak() - before) / model.flat.nbytes, model.flat.sum(dtype="f8"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_one_model(dtype, tmp_path):
    """Not of a second one, nor of the gradients, which are not written yet: the largest tensor is 1/8 of the model."""
    sizes = {"vocab_size": 2048, "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16}
    model = build(Config(**sizes, num_key_value_heads=2, intermediate_size=2048), seed=None)
    model.flat[...] = 0.25
    save_pretrained(model_of("Llama"), tmp_path / "warm-up")
    save_pretrained(model, tmp_path / "model", dtype=dtype)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "warm-up"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ)
    models, total = map(float, done.stdout.split())
    assert total == model.flat.sum(dtype=np.float64)
    assert 0.9 < models < 1.3


# ------------------------------------------------------------------ what others compute from such a folder


def naive_logits(folder, ids):
    """float64 logits (T, V) of ids (T,), one head and one token at a time, as transformers' Llama, Mistral, Qwen2 and
    Qwen3 understand config.json and the tensors' names; nothing of minillm is in here."""
    c = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    w = {name: array.astype(np.float64) for file in files for name, (_, array) in read_raw(file).items()}
    heads, kv, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    rope = c["rope_parameters"]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean() + c["rms_norm_eps"]) * weight

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    def turned(x, t):
        out = np.empty(size)
        for i in range(size // 2):
            frequency = rope["rope_theta"] ** (-2 * i / size)
            if rope["rope_type"] == "linear":
                frequency /= rope["factor"]
            if rope["rope_type"] == "llama3":
                length = rope["original_max_position_embeddings"]
                wave, slow = 2 * np.pi / frequency, frequency / rope["factor"]
                low, high = rope["low_freq_factor"], rope["high_freq_factor"]
                blend = (length / wave - low) / (high - low)
                middle = (1 - blend) * slow + blend * frequency
                frequency = slow if wave > length / low else frequency if wave < length / high else middle
            cos, sin, j = np.cos(t * frequency), np.sin(t * frequency), i + size // 2
            out[i], out[j] = x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin
        return out

    x = w["model.embed_tokens.weight"][ids]
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        window = c["sliding_window"]
        if "layer_types" in c and c["layer_types"][n] == "full_attention":
            window = None
        q, k, v = [], [], []
        for t, row in enumerate(x):
            h = norm(row, w[layer + "input_layernorm.weight"])
            parts = {name: linear(h, layer + f"self_attn.{name}_proj").reshape(-1, size) for name in "qkv"}
            for name in "qk":
                if layer + f"self_attn.{name}_norm.weight" in w:
                    parts[name] = [norm(p, w[layer + f"self_attn.{name}_norm.weight"]) for p in parts[name]]
                parts[name] = [turned(p, t) for p in parts[name]]
            q, k, v = [*q, parts["q"]], [*k, parts["k"]], [*v, parts["v"]]
        for t in range(len(x)):
            mixed = []
            for head in range(heads):
                g = head // (heads // kv)
                seen = [s for s in range(t + 1) if window is None or s > t - window]
                scores = np.array([q[t][head] @ k[s][g] for s in seen]) / np.sqrt(size)
                p = np.exp(scores - scores.max())
                mixed.append(sum(a * v[s][g] for a, s in zip(p / p.sum(), seen, strict=True)))
            x[t] = x[t] + linear(np.concatenate(mixed), layer + "self_attn.o_proj")
            h = norm(x[t], w[layer + "post_attention_layernorm.weight"])
            gate = linear(h, layer + "mlp.gate_proj")
            x[t] = x[t] + linear(gate / (1 + np.exp(-gate)) * linear(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return np.array([head @ norm(row, w["model.norm.weight"]) for row in x])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "GPT2"])
def test_an_independent_reader_computes_the_same(kind, tmp_path):
    tied, ids = kind != "Llama", np.random.default_rng(3).integers(0, SIZES["vocab_size"], 9)
    model = model_of(kind, tie_word_embeddings=tied)
    for dtype, shard in (("float32", None), ("bfloat16", 3000)):
        folder = save_pretrained(model, tmp_path / dtype, dtype=dtype, max_shard_size=shard)
        expected = naive_logits(folder, ids)
        for precision, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5 * np.abs(expected).max())):
            assert np.abs(load_pretrained(folder, precision)(ids[None]).data[0] - expected).max() < tolerance
    edit(folder / "config.json", {"rms_norm_eps": 0.3})
    assert np.abs(load_pretrained(folder, np.float64)(ids[None]).data[0] - expected).max() > 1e-3
    assert np.abs(load_pretrained(folder, np.float64)(ids[None]).data[0] - naive_logits(folder, ids)).max() < 1e-10


# ------------------------------------------------------------------ config.json


def values_of(kind, **change):
    """The config.json's dict of a model of this kind, changed; ... takes a key away."""
    values = hub.config_values(Config(**SIZES | KINDS[kind])) | change
    return {key: value for key, value in values.items() if value is not ...}


@pytest.mark.parametrize("kind", ["Llama", "Llama linear", "Llama llama3"])
def test_either_spelling_of_the_rope_keys_is_enough(kind):
    expected, values = Config(**SIZES | KINDS[kind]), values_of(kind)
    assert values["rope_parameters"]["rope_theta"] == values["rope_theta"] == expected.rope_theta
    scaling = values["rope_scaling"]
    assert config_of(values_of(kind, rope_theta=..., rope_scaling=...)) == expected
    assert config_of(values_of(kind, rope_parameters=...)) == expected
    if scaling:
        older = {"type": scaling["rope_type"]} | {k: v for k, v in scaling.items() if k != "rope_type"}
        assert config_of(values_of(kind, rope_parameters=..., rope_scaling=older)) == expected


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ...}


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("Llama", {"hidden_act": "swish"}, {}),
        ("Llama", {"eos_token_id": [1, 2], "torch_dtype": "bfloat16", "use_cache": True, "unheard_of": {}}, {}),
        ("Llama", {"attention_bias": None, "mlp_bias": ..., "rope_theta": 10_000}, {}),
        ("Llama", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ("Llama", {"head_dim": ..., "rms_norm_eps": ...}, {"norm_eps": 1e-6}),
        ("Llama", {"head_dim": 10}, {"head_dim": 10}),
        ("Llama", {"tie_word_embeddings": ...}, {"tie_word_embeddings": False}),
        ("Mistral", {"sliding_window": None}, {"sliding_window": None}),
        ("Mistral", {"sliding_window": ...}, {"sliding_window": 4096}),
        ("Mistral", {"head_dim": 10}, {"head_dim": 10}),
        ("Qwen2", {"sliding_window": 7, "use_sliding_window": False}, {"sliding_window": None}),
        ("Qwen2", {"sliding_window": 7, "use_sliding_window": ...}, {"sliding_window": None}),
        ("Qwen2", QWEN_WINDOW | {"max_window_layers": 1}, {"sliding_window": 7, "window_layers": (1, 2)}),
        ("Qwen2", QWEN_WINDOW | {"max_window_layers": 0}, {"sliding_window": 7, "window_layers": None}),
        ("Qwen2", QWEN_WINDOW | {"max_window_layers": ...}, {"sliding_window": None}),
        (
            "Qwen3",
            QWEN_WINDOW | {"layer_types": ["sliding_attention", *["full_attention"] * 2]},
            {"window_layers": (0,)},
        ),
        ("GPT2", {"n_inner": 20}, {"intermediate_size": 20}),
        ("GPT2", {"tie_word_embeddings": ..., "activation_function": "gelu_pytorch_tanh"}, {}),
    ],
)
def test_what_a_config_may_say(kind, change, expected):
    config, plain = config_of(values_of(kind, **change)), config_of(values_of(kind))
    for name, value in expected.items():
        assert getattr(config, name) == value
    if not expected:
        assert config == plain


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Llama", {"hidden_size": "16"}, 'hidden_size is "16", and has to be a positive whole number'),
        ("Llama", {"hidden_size": -16}, "hidden_size is -16, and has to be"),
        ("Llama", {"hidden_size": True}, "hidden_size is true, and has to be"),
        ("Llama", {"hidden_size": 16.0}, "hidden_size is 16.0, and has to be"),
        ("Llama", {"hidden_size": 10**30}, "hidden_size is 1000"),
        ("Llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, and has to be"),
        ("Llama", {"vocab_size": None}, "the key 'vocab_size' is missing"),
        ("Llama", {"intermediate_size": ...}, "the key 'intermediate_size' is missing"),
        ("Llama", {"num_key_value_heads": [2]}, "num_key_value_heads is [2], and has to be"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide"),
        ("Llama", {"num_attention_heads": 3, "head_dim": ...}, "num_attention_heads = 3 must divide hidden_size 16"),
        ("Llama", {"head_dim": 5}, "head_dim = 5 must be even"),
        ("Llama", {"max_position_embeddings": 10**9}, "1000000000 positions are more than"),
        ("Llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, and has to be a positive number"),
        ("Llama", {"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5"'),
        ("Llama", {"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", and has to be true or false'),
        ("Llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu", and only "silu" or "swish" is supported'),
        ("Llama", {"attention_bias": True}, "attention_bias is true, and only false or null is supported"),
        ("Llama", {"mlp_bias": True}, "mlp_bias is true, and only"),
        ("Llama", {"sliding_window": 8}, "sliding_window is 8, and only null is supported"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0"),
        ("Llama", {"rope_theta": -1.0, "rope_parameters": ...}, "rope_theta is -1.0, and has to be a positive number"),
        ("Llama", {"rope_parameters": "default"}, 'rope_parameters is "default", and has to be an object'),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope type 'yarn' is not supported; there",
        ),
        ("Llama", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("Llama", {"rope_parameters": ..., "rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ("Llama", {"rope_parameters": {"rope_type": ["linear"]}}, "rope type ['linear'] is not supported"),
        ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "an entry for each kind of layer"),
        (
            "Llama linear",
            {"rope_parameters": {"rope_type": "default"}},
            "is of type 'default', and rope_scaling of type",
        ),
        ("Llama linear", {"rope_parameters": {"rope_type": "linear"}}, "the key 'rope_parameters.factor' is missing"),
        (
            "Llama llama3",
            {"rope_parameters": {"rope_type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}},
            "rope_parameters.high_freq_factor is 1.0, and has to be above low_freq_factor",
        ),
        ("Mistral", {"sliding_window": -5}, "sliding_window is -5, and has to be"),
        ("Qwen3", QWEN_WINDOW | {"layer_types": ["full_attention"]}, "layer_types is"),
        ("Qwen3", QWEN_WINDOW | {"layer_types": ["chunked_attention"] * 3}, "and has to be 3 times full_attention or"),
        ("GPT2", {"n_embd": "16"}, 'n_embd is "16", and has to be'),
        ("GPT2", {"n_positions": ...}, "the key 'n_positions' is missing"),
        ("GPT2", {"activation_function": "relu"}, 'activation_function is "relu", and only "gelu_new"'),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ("Llama", {"architectures": None}, "architecture None is not supported; there are LlamaForCausalLM, Mistral"),
        ("Llama", {"architectures": ["BertForMaskedLM"]}, "architecture 'BertForMaskedLM' is not supported"),
        ("Llama", {"architectures": [["x"]]}, "architecture ['x'] is not supported"),
        (
            "Llama",
            {"architectures": ["BertForSequenceClassification"]},
            "'BertForSequenceClassification' is not supported",
        ),
        (
            "Llama",
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
            "a reward model has one label, and this has 3",
        ),
        (
            "GPT2",
            {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            "a reward model has one label, and this has 2",
        ),
        ("GPT2", {"architectures": ["GPT2ForSequenceClassification"]}, "one label, and this has 2"),
        ("Llama", {"score_pooling": "max"}, 'score_pooling is "max", and only "last" or "mean" is supported'),
        ("GPT2", {"score_pooling": ["mean"]}, 'score_pooling is ["mean"], and only'),
    ],
)
def test_what_a_config_may_not_say(kind, change, message):
    with pytest.raises(ValueError) as error:
        config_of(values_of(kind, **change), "folder/config.json")
    told = str(error.value)
    assert told.startswith("folder/config.json: ") and message in told and "\n" not in told and len(told) < 300


def test_a_mix_that_no_architecture_has_is_not_saved(tmp_path):
    for options in ({"attention_bias": True, "qk_norm": True}, {"sliding_window": 4, "window_layers": (1,)}):
        with pytest.raises(ValueError, match="no known architecture has this mix"):
            save_pretrained(build(Config(**SIZES, **options)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ folders with something wrong


def spoil_tensors(change, kind="Llama", **options):
    """A spoiler that rewrites model.safetensors after change(tensors, model)."""

    def spoil(folder):
        model = model_of(kind, **options)
        save_pretrained(model, folder)
        tensors = {name: p.data for name, p in model.parameters.items()}
        change(tensors)
        write_raw(folder / "model.safetensors", tensors)

    return spoil


def spoil_file(change):
    """A spoiler that rewrites the bytes of model.safetensors."""

    def spoil(folder):
        path = save_pretrained(model_of("Llama"), folder) / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def spoil_header(change):
    """A spoiler that rewrites the text of the header."""

    def rewrite(data):
        (size,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + size].decode()).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return spoil_file(rewrite)


def spoil_index(change):
    """A spoiler of the index of several files; `change` may also touch the folder."""

    def spoil(folder):
        save_pretrained(model_of("Llama"), folder, max_shard_size=4000)
        edit(folder / "model.safetensors.index.json", lambda values: change(values["weight_map"], folder))

    return spoil


def spoil_text(name, text):
    def spoil(folder):
        save_pretrained(model_of("Llama"), folder)
        (folder / name).write_bytes(text)

    return spoil


def only(*names):
    """A spoiler that leaves no weights but empty files of these names."""

    def spoil(folder):
        (save_pretrained(model_of("Llama"), folder) / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"\x80\x02.")

    return spoil


def larger_tokenizer(folder):
    save_pretrained(model_of("Llama"), folder)
    BYTEWISE.save(folder)


def moved(weight_map, folder):
    """One tensor's entry names another file."""
    first, *_, last = weight_map
    weight_map[first] = weight_map[last]


def renamed(name):
    """All entries of the first file name another one."""

    def change(weight_map, folder):
        first = next(iter(weight_map.values()))
        for tensor in [t for t, file in weight_map.items() if file == first]:
            weight_map[tensor] = name

    return change


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
LATER = "model.layers.1.self_attn.q_proj.weight"  # the second in its file
SPOILERS = {
    "missing": (spoil_tensors(lambda t: t.pop(NORM)), f"do not fit config.json: missing: {NORM}"),
    "extra": (spoil_tensors(lambda t: t.update({"model.norm.bias": np.zeros(16)})), "not known: model.norm.bias"),
    "misshapen": (
        spoil_tensors(lambda t: t.update({DOWN: t[DOWN].T})),
        f"misshapen: {DOWN} is (64, 16), not (16, 64)",
    ),
    "all three": (
        spoil_tensors(lambda t: t.update({"x": t.pop(NORM), DOWN: np.zeros(3)})),
        f"missing: {NORM}; not known: x; misshapen: {DOWN} is (3,), not (16, 64)",
    ),
    "a scalar": (spoil_tensors(lambda t: t.update({NORM: np.zeros(())})), f"misshapen: {NORM} is (), not (16,)"),
    "many missing": (
        spoil_tensors(lambda t: [t.pop(name) for name in list(t) if "mlp" in name]),
        "model.layers.1.mlp.gate_proj.weight and 4 more",
    ),
    "no head": (
        spoil_tensors(lambda t: t.pop("lm_head.weight"), tie_word_embeddings=False),
        "missing: lm_head.weight",
    ),
    "another layer's buffer": (
        spoil_tensors(lambda t: t.update({"model.layers.0.mlp.inv_freq": np.zeros(2)})),
        "not known: model.layers.0.mlp.inv_freq",
    ),
    "an untied copy": (
        spoil_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "lm_head.weight is not the embedding, and config.json says so: set tie_word_embeddings false",
    ),
    "a copy of another shape": (
        spoil_tensors(lambda t: t.update({"lm_head.weight": np.zeros((41, 16))})),
        "lm_head.weight is not the embedding",
    ),
    "twice": (
        spoil_tensors(lambda t: t.update({"wte.weight": t["transformer.wte.weight"]}), kind="GPT2"),
        "transformer.wte.weight is there twice, with and without its prefix",
    ),
    "integers": (
        spoil_tensors(lambda t: t.update({NORM: ("I32", np.ones(16, np.int32))})),
        f"{NORM} is stored as I32, and only F64, F32, F16, BF16 are read",
    ),
    "8 bits": (
        spoil_tensors(lambda t: t.update({NORM: ("F8_E4M3", np.ones(16, np.uint8))})),
        f"{NORM} is stored as F8_E4M3, and only",
    ),
    "more layers than tensors": (
        lambda folder: edit(save_pretrained(model_of("Llama"), folder) / "config.json", {"num_hidden_layers": 10**9}),
        "has 1000000000 layers, and the weights 29 tensors",
    ),
    "other sizes": (
        lambda folder: edit(save_pretrained(model_of("Llama"), folder) / "config.json", {"vocab_size": 2**30}),
        "misshapen: model.embed_tokens.weight is (40, 16), not (1073741824, 16)",
    ),
    "another head": (
        lambda folder: edit(
            save_pretrained(model_of("Llama"), folder) / "config.json",
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
        ),
        "missing: score.weight",
    ),
    "header bomb": (spoil_file(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), "not a readable safetensors file"),
    "header past the end": (
        spoil_file(lambda data: struct.pack("<Q", len(data)) + data[8:]),
        "not a readable safetensors file",
    ),
    "truncated": (spoil_file(lambda data: data[:-4]), "not a readable safetensors file"),
    "too long": (spoil_file(lambda data: data + b"\0\0\0\0"), "not a readable safetensors file"),
    "cut in the header": (spoil_file(lambda data: data[:99]), "not a readable safetensors file"),
    "empty file": (spoil_file(lambda data: b""), "not a readable safetensors file"),
    "a pickle in disguise": (spoil_file(lambda data: b"\x80\x02}q\0." * 20), "not a readable safetensors file"),
    "header is no JSON": (spoil_header(lambda text: "{" + text), "not a readable safetensors file"),
    "deep header": (spoil_header(lambda text: '{"a":' * 90_000), "not a readable safetensors file"),
    "a name twice": (
        spoil_header(lambda text: text.rstrip()[:-1] + "," + json.dumps({NORM: json.loads(text)[NORM]})[1:]),
        f"the key '{NORM}' occurs twice",
    ),
    "count bomb": (
        spoil_header(lambda text: text.replace('"shape":[40,16]', '"shape":[4294967296,4294967296,16]')),
        "not a readable safetensors file",
    ),
    "a name of two lines": (
        spoil_tensors(lambda t: t.update({"a\n\x1b[2J": np.zeros(1)})),
        r"'a\n\x1b[2J' is no name of a tensor",
    ),
    "index is no JSON": (
        lambda folder: (
            save_pretrained(model_of("Llama"), folder, max_shard_size=4000) / "model.safetensors.index.json"
        ).write_text("{"),
        "index.json is not a readable JSON object",
    ),
    "index without a map": (spoil_index(lambda m, folder: m.clear()), "index.json: weight_map has to say"),
    "index of numbers": (spoil_index(lambda m, folder: m.update({NORM: 3})), "index.json: weight_map has to say"),
    "path upwards": (spoil_index(renamed("../model.safetensors")), "'../model.safetensors' is not the plain name"),
    "absolute path": (spoil_index(renamed("/etc/model.safetensors")), "'/etc/model.safetensors' is not the plain"),
    "path downwards": (spoil_index(renamed("a/b.safetensors")), "'a/b.safetensors' is not the plain name"),
    "other system's path": (spoil_index(renamed("a\\b.safetensors")), r"'a\\b.safetensors' is not the plain name"),
    "hidden file": (spoil_index(renamed("..safetensors")), "'..safetensors' is not the plain name"),
    "pickled shard": (spoil_index(renamed("pytorch_model.bin")), "'pytorch_model.bin' is not the plain name"),
    "absent shard": (
        spoil_index(lambda m, folder: (folder / m[NORM]).unlink()),
        ".safetensors is not there; fetch it, too",
    ),
    "listed but absent": (spoil_index(lambda m, folder: m.update({"more": m[NORM]})), "lacks 'more' (tensors: 1)"),
    "in a file but not listed": (spoil_index(lambda m, folder: m.pop(LATER)), f"also has '{LATER}' (tensors: 1)"),
    "in another file": (spoil_index(moved), "also has 'model.embed_tokens.weight'"),
    "shards without an index": (
        lambda folder: (
            save_pretrained(model_of("Llama"), folder, max_shard_size=4000) / "model.safetensors.index.json"
        ).unlink(),
        "has model-00001-of-00014.safetensors, but neither model.safetensors nor",
    ),
    "no weights": (only(), "has no *.safetensors; save the model as model.safetensors"),
    "pickled (.bin)": (only("pytorch_model.bin"), "only pytorch_model.bin: pickled weights are not read, because they"),
    "pickled (.pt)": (only("model.pt", "notes.txt"), "only model.pt: pickled weights are not read"),
    "pickled (.pth)": (only("consolidated.00.pth"), "only consolidated.00.pth: pickled weights are not read"),
    "pickled (.ckpt)": (only("last.ckpt"), "only last.ckpt: pickled weights are not read"),
    "pickled (.pkl)": (only("model.pkl"), "only model.pkl: pickled weights are not read"),
    "no config": (
        lambda folder: (save_pretrained(model_of("Llama"), folder) / "config.json").unlink(),
        "is no model folder: it has no config.json",
    ),
    "config is no JSON": (spoil_text("config.json", b"{"), "config.json is not a readable JSON object"),
    "config is a list": (spoil_text("config.json", b"[]"), "config.json is not a readable JSON object"),
    "config is not UTF-8": (spoil_text("config.json", b'{"a": "\xff"}'), "config.json is not UTF-8 text: byte 0xFF at"),
    "config is deep": (spoil_text("config.json", b'{"a":' * 90_000), "config.json is not a readable JSON object"),
    "a key twice": (spoil_text("config.json", b'{"a": 1, "a": 2}'), "the key 'a' occurs twice"),
    "another's tokenizer": (
        larger_tokenizer,
        f"the tokenizer has {SMALLEST_VOCABULARY} tokens, and the model knows 40",
    ),
    "no tokenizer.json": (spoil_text("tokenizer.json", b'{"model": []}'), "tokenizer.json is not a tokenizer.json"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_folder_with_something_wrong_is_one_line_and_nothing_is_loaded(name, tmp_path, monkeypatch):
    spoil, message = SPOILERS[name]
    spoil(tmp_path / "model")
    monkeypatch.setattr(hub, "build", lambda *_, **__: pytest.fail("a model is made"))
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "model")
    told = str(error.value)
    assert message in told and str(tmp_path / "model") in told
    assert told.count("\n") == 0 and told.isprintable() and len(told) < 400 + len(str(tmp_path))


def test_weights_that_the_dtype_can_not_hold_are_named(tmp_path):
    spoil_tensors(lambda t: t.update({NORM: ("F64", np.full(16, 1e300))}))(tmp_path)
    with pytest.raises(ValueError, match=f"model.safetensors: {NORM} has values too large for float32"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, np.float64).parameters[NORM].data.max() == 1e300


def test_tensors_that_say_nothing_new_are_left_out(tmp_path):
    def buffers(tensors):
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(2)
        tensors["model.rotary_emb.inv_freq"] = np.zeros(2)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    def masks(tensors):
        for layer in range(3):
            tensors[f"transformer.h.{layer}.attn.bias"] = "U8", np.tri(32, dtype=np.uint8)[None, None]
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4)
        for name in list(tensors):  # as on the hub
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    for kind, change in (("Llama", buffers), ("GPT2", masks)):
        for head in ("lm", "scalar"):
            spoil_tensors(change, kind, head=head)(tmp_path / kind)
            assert np.array_equal(load_pretrained(tmp_path / kind).flat, model_of(kind, head=head).flat)


def test_more_rows_than_tokens_are_normal(tmp_path):
    model = model_of("Llama", vocab_size=SMALLEST_VOCABULARY + 20)
    assert np.array_equal(load_pretrained(save_pretrained(model, tmp_path, BYTEWISE)).flat, model.flat)


# ------------------------------------------------------------------ what is written


WIDE = {"vocab_size": SMALLEST_VOCABULARY}


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_everything_that_belongs_to_a_model(kind, tmp_path):
    model = model_of(kind, **WIDE)
    save_pretrained(model, tmp_path, BYTEWISE, "chatml", "bfloat16", {"temperature": 0.7, "pad_token_id": 5})
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"chat_template.jinja"}
    config, tokens, generation = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "generation_config")
    )
    ends = [BYTEWISE.eos_id, BYTEWISE.special_tokens["<|im_end|>"]]
    assert generation == {"bos_token_id": 0, "eos_token_id": ends, "pad_token_id": 5, "temperature": 0.7}
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [0, ends, 2]
    assert [tokens[f"{role}_token"] for role in ("bos", "eos", "pad")] == ["<s>", "</s>", "<pad>"]
    assert tokens["model_input_names"] == ["input_ids", "attention_mask"]
    assert stop_tokens(tmp_path) == set(ends)
    assert Tokenizer.load(tmp_path).special_tokens == BYTEWISE.special_tokens


def test_only_what_is_known_is_written(tmp_path):
    model = model_of("Llama", **WIDE)
    save_pretrained(model, tmp_path / "bare")
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}
    values = json.loads((tmp_path / "bare/config.json").read_text())
    assert all(values[f"{role}_token_id"] is None for role in ("bos", "eos", "pad"))  # not Llama's own 1 and 2
    assert stop_tokens(tmp_path / "bare") == set()
    save_pretrained(model, tmp_path / "base", BYTEWISE)
    assert not (tmp_path / "base/chat_template.jinja").exists()
    assert stop_tokens(tmp_path / "base") == {BYTEWISE.eos_id}
    reward = model_of("Llama", head="scalar", **WIDE)
    save_pretrained(reward, tmp_path / "reward", BYTEWISE, "llama3")  # it writes nothing, but reads conversations
    assert not (tmp_path / "reward/generation_config.json").exists()
    assert (
        load_template(tmp_path / "reward")
        and json.loads((tmp_path / "reward/config.json").read_text())["pad_token_id"] == 2
    )


@pytest.mark.parametrize("template", [*TEMPLATES, "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"])
def test_a_saved_model_ends_and_chats_as_the_trainer_meant_it(template, tmp_path):
    save_model(tmp_path, model_of("Qwen3", **WIDE), BYTEWISE, template)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>", "alpaca": "</s>"}
    assert stop_tokens(tmp_path) == {
        BYTEWISE.special_tokens[name] for name in ("</s>", ends.get(template, "<|im_end|>"))
    }
    assert template_of(tmp_path) == template
    (tmp_path / "minillm.json").unlink()  # as others leave the folder behind
    messages = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": " You!"}]
    for ours, theirs in zip(*(render(messages, t, BYTEWISE) for t in (template, template_of(tmp_path))), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_template_that_refuses_our_two_messages_is_saved_all_the_same(tmp_path):
    source = "{% if messages|length < 9 %}{{ raise_exception('too short') }}{% endif %}"
    save_pretrained(model_of("Llama", **WIDE), tmp_path, BYTEWISE, source)
    assert stop_tokens(tmp_path) == {BYTEWISE.eos_id} and load_template(tmp_path) == source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is none of float64, float32, float16, bfloat16"),
        (
            {"tokenizer": MERGED},
            f"the tokenizer has {MERGED.vocab_size} tokens, and the model knows {WIDE['vocab_size']}",
        ),
        ({"template": "chatml"}, "a chat template needs its tokenizer"),
        ({"tokenizer": BYTEWISE, "template": "chatlm"}, "no template 'chatlm'"),
        (
            {"tokenizer": Tokenizer.train([], 260, special_tokens=()), "template": "chatml"},
            r"needs the control token '<\|im_start\|>'",
        ),
        ({"dtype": "float16"}, r"model.norm.weight has values too large for float16; save it in a wider one"),
    ],
)
def test_what_can_not_be_saved_leaves_the_folder_as_it_is(options, message, tmp_path):
    model = model_of("Llama", **WIDE)
    save_pretrained(model, tmp_path, BYTEWISE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.parameters[NORM].data[3] = 7e4
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_a_whole_model_is_saved(tmp_path):
    model = model_of("Llama")
    model.parameters["model.layers.0.lora_A"] = model.parameters.pop(NORM)  # as where an adapter is trained
    with pytest.raises(ValueError, match=rf"merge an adapter first: missing: {NORM}; not known: .*lora_A"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_kept_as_they_are(tmp_path):
    model = model_of("Llama")
    model.parameters[NORM].data[:3] = np.nan, np.inf, 3e38
    back = load_pretrained(save_pretrained(model, tmp_path, dtype="bfloat16")).parameters[NORM].data
    assert np.isnan(back[0]) and np.isinf(back[1]) and np.isfinite(back[2])


@pytest.mark.parametrize("moves", range(5))
def test_a_save_that_is_killed_leaves_the_old_folder_or_none(moves, tmp_path, monkeypatch):
    old, new = model_of("Llama", **WIDE), model_of("Qwen3", seed=2, **WIDE)
    save_pretrained(old, tmp_path, BYTEWISE)
    replace, left = Path.replace, iter(range(moves))

    def killed(self, target):
        next(left)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(StopIteration):
            save_pretrained(new, tmp_path, BYTEWISE)
    with pytest.raises(ValueError, match=r"is no model folder: it has no config.json"):
        load_pretrained(tmp_path)
    with monkeypatch.context() as patch:  # and a save after one that could not even clean up
        patch.setattr(hub.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(hub, "_move_in", lambda *_: None)
        save_pretrained(new, tmp_path)
    assert np.array_equal(load_pretrained(save_pretrained(new, tmp_path, BYTEWISE)).flat, new.flat)
    assert not (tmp_path / ".saving").exists()


def test_the_ids_that_end_a_text_may_be_one_or_several(tmp_path):
    for config, generation, expected in (
        ({"eos_token_id": 3}, None, {3}),
        ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {4, 5}),
        ({"eos_token_id": [3, 4]}, {"temperature": 1}, {3, 4}),
        ({}, {}, set()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        assert stop_tokens(tmp_path) == expected
    for wrong in ("</s>", [1, True], -1, 2.0):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"config.json: eos_token_id is .*, and has to be an id or a list of ids"):
            stop_tokens(tmp_path)


# ------------------------------------------------------------------ the built-in templates, in Jinja

NO_MARKS = Tokenizer.train([], 300, special_tokens=[name for name in SPECIAL_TOKENS if name not in LLAMA2])
TOKENIZERS = [BYTEWISE, MERGED, NO_MARKS, Tokenizer.train([], 300, bos=None)]
pieces = st.sampled_from(
    [*SPECIAL_TOKENS, " ", "\n", "Hi", "there", "### Response:\n", "{{ x }}", "{% y %}", "🙂", "'"]
)
contents = st.lists(pieces | st.text(max_size=4), max_size=4).map("".join)
turns = st.lists(contents, min_size=1, max_size=5).map(
    lambda said: list(zip(["user", "assistant"] * 3, said, strict=False))
)
any_roles = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), contents), min_size=1, max_size=4
)
conversations = st.tuples(st.lists(contents.map(lambda text: ("system", text)), max_size=1), turns | any_roles)


@pytest.mark.parametrize("template", TEMPLATES)
@given(conversations, st.sampled_from(TOKENIZERS), st.booleans())
def test_a_built_in_template_and_its_jinja_source_are_one(template, conversation, tokenizer, prompt):
    """The same ids and mask, and the same conversations that they have no place for."""
    messages = [{"role": role, "content": content} for part in conversation for role, content in part]
    source = hub.jinja_source(template)
    try:
        ids, mask = render(messages, template, tokenizer, prompt)
    except ValueError:
        with pytest.raises(ValueError, match="the chat template fails"):
            render(messages, source, tokenizer, prompt)
        return
    again, again_mask = render(messages, source, tokenizer, prompt)
    assert ids.tolist() == again.tolist() and mask.tolist() == again_mask.tolist()


def test_tool_calls_have_no_place_in_either():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]
    for template in TEMPLATES:
        for source in (template, hub.jinja_source(template)):
            with pytest.raises(ValueError, match="has no place for tool_calls"):
                render(messages, source, BYTEWISE)


def test_a_config_alone_can_be_read(tmp_path):
    model = model_of("Mistral")
    (save_pretrained(model, tmp_path) / "model.safetensors").unlink()
    assert read_config(tmp_path) == model.config
