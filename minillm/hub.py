"""
Read and write Hugging Face model folders: config.json and *.safetensors, nothing pickled.

Both spellings of the RoPE keys are understood (rope_parameters of transformers 5; rope_theta and rope_scaling before).
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (safetensors reads bfloat16 only where NumPy knows it)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .kernels.device import to_host
from .model import Config, build

LLAMA_LIKE = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
CLASSIFIER = "ForSequenceClassification"  # how a scalar head is called there; one label makes it a reward model


def config_of(values, where="config.json"):
    """The Config that a config.json's dict describes. ValueError names what is not supported."""
    name = (values.get("architectures") or [None])[0]
    head = "lm"
    if name is not None and name.endswith(CLASSIFIER):
        name, head = name.removesuffix(CLASSIFIER), "scalar"
        name += "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        labels = values.get("num_labels", len(values.get("id2label", (0, 1))))  # two are the default
        if labels != 1:
            raise ValueError(f"{where}: a reward model has one label, and this has {labels}")
    if name == "GPT2LMHeadModel":
        return _gpt2_config(values, where, head)
    if name not in LLAMA_LIKE:
        known = ", ".join([*LLAMA_LIKE, "GPT2LMHeadModel"])
        given = (values.get("architectures") or [None])[0]
        raise ValueError(f"{where}: architecture {given!r} is not supported; there are {known} and *{CLASSIFIER}")
    if values.get("hidden_act", "silu") != "silu" or values.get("mlp_bias"):
        raise ValueError(f"{where}: only SwiGLU without biases (hidden_act 'silu', mlp_bias false) is supported")
    if values.get("attention_bias"):  # on q, k, v and o; Qwen2's, on q, k and v alone, has no key
        raise ValueError(f"{where}: attention_bias true, which puts a bias on o_proj too, is not supported")
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    window, layers = values.get("sliding_window"), None
    if values.get("use_sliding_window") is False:
        window = None
    if window is not None and values.get("layer_types"):
        layers = tuple(i for i, kind_ in enumerate(values["layer_types"]) if kind_ == "sliding_attention")
    return Config(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values.get("num_key_value_heads"),
        head_dim=values.get("head_dim"),
        max_position_embeddings=values["max_position_embeddings"],
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=None if kind == "default" else rope,
        sliding_window=window,
        window_layers=layers,
        initializer_range=values.get("initializer_range", 0.02),
        head=head,
        **LLAMA_LIKE[name],
    )


def _gpt2_config(values, where, head):
    if values.get("activation_function", "gelu_new") != "gelu_new":
        raise ValueError(f"{where}: GPT-2's activation_function must be 'gelu_new'")
    return Config(
        architecture="gpt2",
        head=head,
        vocab_size=values["vocab_size"],
        hidden_size=values["n_embd"],
        intermediate_size=values.get("n_inner"),
        num_hidden_layers=values["n_layer"],
        num_attention_heads=values["n_head"],
        max_position_embeddings=values["n_positions"],
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        initializer_range=values.get("initializer_range", 0.02),
    )


def read_config(folder):
    """The Config of a model folder."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no model folder: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        return config_of(values, path)
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None


def load_pretrained(folder, dtype=np.float32):
    """The model of a Hugging Face folder, its weights converted to `dtype`. ValueError names what does not fit."""
    folder = Path(folder)
    config = read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors (pickled weights are not read: they can run code)")
    arrays = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as stored:
                arrays |= {name: stored.get_tensor(name).astype(dtype) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if config.architecture == "gpt2":  # files on the hub lack the prefix
        arrays = {
            n if n.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{n}": a
            for n, a in arrays.items()
        }
    if config.tie_word_embeddings:
        arrays.pop("lm_head.weight", None)
    model = build(config, dtype=dtype)
    try:
        model.load(arrays)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model


def save_pretrained(model, folder):
    """Write config.json and model.safetensors, which transformers and `load_pretrained` read. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_values(model.config, str(model.flat.dtype)), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    # safetensors writes the memory as it lies there, so every array must be contiguous
    arrays = {name: np.ascontiguousarray(to_host(p.data)) for name, p in model.parameters.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_values(config, dtype="float32"):
    """The config.json of a Config, with the RoPE keys in both spellings. ValueError if no architecture is like it."""
    scalar = config.head == "scalar"
    shared = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if scalar:
        shared |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if config.architecture == "gpt2":
        return shared | {
            "architectures": ["GPT2" + (CLASSIFIER if scalar else "LMHeadModel")],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_embd": config.hidden_size,
            "n_inner": config.intermediate_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_positions": config.max_position_embeddings,
            "layer_norm_epsilon": config.norm_eps,
        }
    features = (config.attention_bias, config.qk_norm, config.sliding_window is not None)
    names = {
        (False, False, False): "Llama",
        (False, False, True): "Mistral",
        (True, False, False): "Qwen2",
        (False, True, False): "Qwen3",
    }
    if features not in names or config.window_layers is not None:
        raise ValueError("no known architecture has this mix of attention_bias, qk_norm and sliding_window")
    name = names[features]
    scaling = config.rope_scaling or {"rope_type": "default"}
    return shared | {
        "architectures": [name + (CLASSIFIER if scalar else "ForCausalLM")],
        "model_type": name.lower(),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "sliding_window": config.sliding_window,
    }
