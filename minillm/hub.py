"""
Read and write Hugging Face model folders: config.json, *.safetensors and what stands beside them. Nothing is pickled.

    model = load_pretrained(folder)                 Llama, Mistral, Qwen2, Qwen3 and GPT-2, each also as a reward model
    save_pretrained(model, folder, tokenizer, "chatml", dtype="bfloat16")

Before a weight is read, every name, shape and dtype is checked, in the files' headers; then the tensors are mapped and
copied one at a time, so loading takes the memory of one model and one tensor. Left out on purpose are tensors that say
nothing new: RoPE's inv_freq and GPT-2's causal masks, which follow from the config, and a tied head's copy of the
embedding, which has to be equal to it. Any other tensor that the model does not have is an error.

Both spellings of the RoPE keys are read and written (rope_parameters of transformers 5; rope_theta and rope_scaling
before), and so are both of the dtype.
"""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np

from .chat import TEMPLATES, jinja_source, stop_ids
from .checkpoint import save_arrays
from .files import DTYPES, read_header, read_object
from .functional import ROPE_SCALINGS
from .kernels.device import to_host
from .model import ARCHITECTURES, Config, build, check_shapes

LLAMA_LIKE = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
CLASSIFIER = "ForSequenceClassification"  # how a scalar head is called there; one label makes it a reward model
POOLING = "score_pooling"  # a key of ours: classifiers there read the last token
LONGEST_CONTEXT = 1 << 22  # a table of angles has a row for each position: more are a typing error
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
NEEDLESS = {
    "llama": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    "gpt2": re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
}


# ------------------------------------------------------------------ the values of a config.json


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_size(value):
    return _is_whole(value) and value > 0


def _is_positive(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e38


def _is_flag(value):
    return isinstance(value, bool)


def _is_object(value):
    return isinstance(value, dict)


KINDS = {
    _is_whole: "a whole number",
    _is_size: "a positive whole number",
    _is_positive: "a positive number of at most 1e38",
    _is_flag: "true or false",
    _is_object: "an object",
}


class Keys:
    """The values of a config.json's keys, with their types checked; null is as good as absent."""

    def __init__(self, values, where, prefix=""):
        self.values, self.where, self.prefix = values, where, prefix

    def get(self, key, kind, default=None):
        """The value, or the default. ValueError where `kind`, one of KINDS, says that it is not one of those."""
        value = self.values.get(key)
        if value is None:
            return default
        if not kind(value):
            self.refuse(key, f"and has to be {KINDS[kind]}")
        return value

    def need(self, key, kind):
        """The value. ValueError where there is none, too."""
        if self.values.get(key) is None:
            raise ValueError(f"{self.where}: the key {self.prefix + key!r} is missing")
        return self.get(key, kind)

    def only(self, key, *allowed):
        """ValueError where there is a value that is none of these, of which the first is the default."""
        if self.values.get(key, allowed[0]) not in allowed:
            self.refuse(key, f"and only {' or '.join(map(json.dumps, allowed))} is supported")

    def refuse(self, key, why):
        value = self.values[key]
        shown = json.dumps(value) if len(json.dumps(value)) < 60 else f"of type {type(value).__name__}"
        raise ValueError(f"{self.where}: {self.prefix}{key} is {shown}, {why}")


# ------------------------------------------------------------------ config.json -> Config


def config_of(values, where="config.json"):
    """The Config that a config.json's dict describes. ValueError names the key that is wrong or not supported."""
    keys = Keys(values, where)
    name, head = _architecture(keys)
    if "quantization_config" in values:
        raise ValueError(f"{where}: quantization_config: quantised weights are not supported")
    found = _gpt2_config(keys) if name == "GPT2LMHeadModel" else _llama_config(keys, name)
    found["vocab_size"] = keys.need("vocab_size", _is_size)
    found["initializer_range"] = keys.get("initializer_range", _is_positive, 0.02)
    if found["max_position_embeddings"] > LONGEST_CONTEXT:
        raise ValueError(f"{where}: {found['max_position_embeddings']} positions are more than {LONGEST_CONTEXT}")
    keys.only(POOLING, "last", "mean")
    try:
        return Config(**found, head=head, pooling=values.get(POOLING, "last"))
    except ValueError as error:  # values that do not go together
        raise ValueError(f"{where}: {str(error).replace('Config.', '')}") from None


def _architecture(keys):
    """(name of the language model's class, head)."""
    given = keys.values.get("architectures")
    given = given[0] if isinstance(given, list) and given else given
    name, head = given if isinstance(given, str) else "", "lm"
    if name.endswith(CLASSIFIER):
        name, head = name.removesuffix(CLASSIFIER), "scalar"
        name += "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    if name not in (*LLAMA_LIKE, "GPT2LMHeadModel"):
        known = ", ".join([*LLAMA_LIKE, "GPT2LMHeadModel"])
        raise ValueError(f"{keys.where}: architecture {given!r} is not supported; there are {known} and *{CLASSIFIER}")
    if head == "scalar":
        labels = keys.get("num_labels", _is_size) or len(keys.get("id2label", _is_object, (0, 1)))  # two by default
        if labels != 1:
            raise ValueError(f"{keys.where}: a reward model has one label, and this has {labels}")
    return name, head


def _llama_config(keys, name):
    keys.only("hidden_act", "silu", "swish")  # two names of one function
    keys.only("mlp_bias", False, None)
    keys.only("attention_bias", False, None)  # on q, k, v and o; Qwen2's, on q, k and v alone, has no key
    layers = keys.need("num_hidden_layers", _is_size)
    theta, scaling = _rope(keys)
    window, window_layers = _window(keys, name, layers)
    return LLAMA_LIKE[name] | {
        "hidden_size": keys.need("hidden_size", _is_size),
        "intermediate_size": keys.need("intermediate_size", _is_size),
        "num_hidden_layers": layers,
        "num_attention_heads": keys.need("num_attention_heads", _is_size),
        "num_key_value_heads": keys.get("num_key_value_heads", _is_size),
        "head_dim": keys.get("head_dim", _is_size),
        "max_position_embeddings": keys.need("max_position_embeddings", _is_size),
        "tie_word_embeddings": keys.get("tie_word_embeddings", _is_flag, False),
        "norm_eps": keys.get("rms_norm_eps", _is_positive, 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window,
        "window_layers": window_layers,
    }


def _rope(keys):
    """(theta, scaling or None) from rope_parameters, or from rope_theta and rope_scaling."""
    keys.only("partial_rotary_factor", 1.0, None)
    key = "rope_parameters" if keys.values.get("rope_parameters") else "rope_scaling"
    given = Keys(keys.get(key, _is_object, {}), keys.where, f"{key}.")
    given.only("partial_rotary_factor", 1.0, None)
    if any(isinstance(value, dict) for value in given.values.values()):
        raise ValueError(f"{keys.where}: {key} has an entry for each kind of layer, which is not supported")
    kind, other = (_rope_type(part) for part in (given.values, keys.get("rope_scaling", _is_object) or given.values))
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        there_are = ", ".join(ROPE_SCALINGS)
        raise ValueError(f"{keys.where}: {key}: rope type {kind!r} is not supported; there are {there_are}")
    if kind != other:
        raise ValueError(f"{keys.where}: rope_parameters is of type {kind!r}, and rope_scaling of type {other!r}")
    scaling = {"rope_type": kind} | {name: given.need(name, _is_positive) for name in ROPE_SCALINGS[kind]}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        given.refuse("high_freq_factor", "and has to be above low_freq_factor")
    theta = given.get("rope_theta", _is_positive, keys.get("rope_theta", _is_positive, 10000.0))
    return theta, None if kind == "default" else scaling


def _rope_type(scaling):
    return scaling.get("rope_type", scaling.get("type", "default"))


def _window(keys, name, layers):
    """(window, layers that have it) with None for no window and for all layers."""
    if name == "LlamaForCausalLM":
        keys.only("sliding_window", None)
        return None, None
    if name == "MistralForCausalLM":
        default = None if "sliding_window" in keys.values else 4096  # of Mistral's first release
        return keys.get("sliding_window", _is_size, default), None
    if not keys.get("use_sliding_window", _is_flag, False):
        return None, None
    window, first = keys.get("sliding_window", _is_size, 4096), keys.get("max_window_layers", _is_whole, 28)
    kinds = ("full_attention", "sliding_attention")
    given = keys.values.get("layer_types") or [kinds[i >= first] for i in range(layers)]
    if not isinstance(given, list) or len(given) != layers or any(kind not in kinds for kind in given):
        keys.refuse("layer_types", f"and has to be {layers} times {' or '.join(kinds)}")
    windowed = tuple(i for i, kind in enumerate(given) if kind == kinds[1])
    return window if windowed else None, None if len(windowed) in (0, layers) else windowed


def _gpt2_config(keys):
    keys.only("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
    keys.only("scale_attn_weights", True, None)
    keys.only("scale_attn_by_inverse_layer_idx", False, None)
    keys.only("add_cross_attention", False, None)
    return {
        "architecture": "gpt2",
        "hidden_size": keys.need("n_embd", _is_size),
        "intermediate_size": keys.get("n_inner", _is_size),
        "num_hidden_layers": keys.need("n_layer", _is_size),
        "num_attention_heads": keys.need("n_head", _is_size),
        "max_position_embeddings": keys.need("n_positions", _is_size),
        "tie_word_embeddings": keys.get("tie_word_embeddings", _is_flag, True),
        "norm_eps": keys.get("layer_norm_epsilon", _is_positive, 1e-5),
    }


def read_config(folder):
    """The Config of a model folder."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    return config_of(read_object(path), path)


# ------------------------------------------------------------------ *.safetensors -> weights


def stored_tensors(folder):
    """{name: Stored} of a folder: those of model.safetensors or, without it, those in the index's files. ValueError:
    neither is there, or the index and its files do not agree."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _indexed_tensors(folder / INDEX)
    parts, pickled = (
        sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
        for suffixes in ((".safetensors",), PICKLED)
    )
    if parts:
        raise ValueError(f"{folder} has {parts[0]}, but neither {SINGLE} nor {INDEX}, which says what belongs together")
    why = f", only {pickled[0]}: pickled weights are not read, because they can run code" if pickled else ""
    raise ValueError(f"{folder} has no *.safetensors{why}; save the model as {SINGLE}")


def _indexed_tensors(index):
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{index}: weight_map has to say for every tensor which file it is in")
    found = {}
    for file in sorted(set(listed.values())):
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise ValueError(f"{index}: {file!r} is not the plain name of a *.safetensors file")
        if not (index.parent / file).exists():
            raise ValueError(f"{index}: {file} is not there; fetch it, too")
        there, expected = read_header(index.parent / file), {name for name in listed if listed[name] == file}
        for names, what in ((expected - there.keys(), "lacks"), (there.keys() - expected, "also has")):
            if names:
                raise ValueError(f"{index}: {file} {what} {min(names)!r} (tensors: {len(names)}); fetch both again")
        found |= there
    return found


def _fitting_tensors(config, stored):
    """`stored` under the names of the model's parameters, and nothing else. ValueError where it does not fit."""
    found = {}
    for name, tensor in stored.items():
        if config.architecture == "gpt2" and not name.startswith(("transformer.", "lm_head.", "score.")):
            name = f"transformer.{name}"  # files on the hub lack the prefix
        if name in found:
            raise ValueError(f"{name} is there twice, with and without its prefix")
        if not NEEDLESS[config.architecture].fullmatch(name):
            found[name] = tensor
    if config.num_hidden_layers > len(found):
        raise ValueError(f"config.json has {config.num_hidden_layers} layers, and the weights {len(found)} tensors")
    architecture = ARCHITECTURES[config.architecture]
    copy = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    try:
        check_shapes(architecture.shapes(config), {name: tensor.shape for name, tensor in found.items()})
    except ValueError as error:
        raise ValueError(f"the weights do not fit config.json: {error}") from None
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is stored as {tensor.dtype}, and only {', '.join(DTYPES)} are read")
    if copy is not None and not _equal(copy, found[architecture.embedding_name]):
        raise ValueError("lm_head.weight is not the embedding, and config.json says so: set tie_word_embeddings false")
    return found


def _equal(a, b):
    return a.shape == b.shape and a.dtype in DTYPES and np.array_equal(a.map(), b.map())


def check_vocabulary(tokens, known, where):
    """ValueError where a tokenizer has more tokens than the model's embedding rows. Fewer are normal: rows that fill
    up to a round number."""
    if tokens > known:
        raise ValueError(f"{where}: the tokenizer has {tokens} tokens, and the model knows {known}: is it another's?")


def _vocabulary_size(path):
    """The largest id + 1 in a tokenizer.json, whatever its kind."""
    values = read_object(path)
    try:
        vocabulary = values["model"].get("vocab", ())
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return max(ids + [token["id"] for token in values.get("added_tokens") or ()], default=-1) + 1
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is not a tokenizer.json") from None


def load_pretrained(folder, dtype=np.float32):
    """The model of a Hugging Face folder, its weights converted to `dtype`.

    ValueError: one line that names the file, key or tensor that is missing, too many, misshapen or not supported, or
    both sizes where the folder's tokenizer has more tokens than the model. Then nothing has been loaded.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        stored = _fitting_tensors(config, stored_tensors(folder))
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    if (folder / "tokenizer.json").exists():
        check_vocabulary(_vocabulary_size(folder / "tokenizer.json"), config.vocab_size, folder)
    model = build(config, seed=None, dtype=dtype)
    for name, p in model.parameters.items():
        try:
            with np.errstate(over="raise"):
                p.data[...] = stored[name].map()
        except FloatingPointError:
            raise ValueError(f"{stored[name].path}: {name} has values too large for {p.dtype}") from None
    return model


def stop_tokens(folder):
    """The ids with which a model folder says that its texts end: eos_token_id, a number or a list, of
    generation_config.json or, without it, config.json. ValueError: something else."""
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        found = read_object(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(map(_is_whole, ids)):
                raise ValueError(f"{path}: eos_token_id is {json.dumps(found)}, and has to be an id or a list of ids")
            return set(ids)
    return set()


# ------------------------------------------------------------------ model -> folder


def save_pretrained(
    model, folder, tokenizer=None, template=None, dtype="float32", generation=None, max_shard_size=None
):
    """Write a model folder, which transformers, vLLM and `load_pretrained` read. Returns the folder.

    tokenizer       a minillm.tokenizer.Tokenizer: tokenizer.json, tokenizer_config.json and, for language models,
                    generation_config.json, by which others begin, pad and, most of all, stop
    template        a name in minillm.chat.TEMPLATES or a Jinja source: chat_template.jinja, and its end of turn ends
                    a text, too
    dtype           float32, float16, bfloat16 or float64
    generation      {key: value} of generation_config.json besides: {"temperature": 0.7, "max_new_tokens": 256}
    max_shard_size  bytes of weights in a file, from which on there are several, with an index; None: one file

    For a Qwen2 whose tokenizer is not Qwen's, load it there with PreTrainedTokenizerFast.from_pretrained(folder): the
    AutoTokenizer of transformers 5 cuts every Qwen2's text by Qwen's rule, whatever tokenizer.json says.

    A kill leaves what was there before, or a folder without config.json, which nobody reads, or the new one.
    ValueError, and nothing is written: a tokenizer with more tokens than the model, a template whose tokens it lacks, a
    weight too large for dtype, an adapter's model, whose parameters are not all there are.
    """
    folder = Path(folder)
    shapes = {name: p.shape for name, p in model.parameters.items()}
    try:
        check_shapes(ARCHITECTURES[model.config.architecture].shapes(model.config), shapes)
    except ValueError as error:
        raise ValueError(f"only a whole model is saved, so merge an adapter first: {error}") from None
    if template and tokenizer is None:
        raise ValueError("a chat template needs its tokenizer, to know which ids end an answer")
    if tokenizer is not None:
        check_vocabulary(tokenizer.vocab_size, model.config.vocab_size, folder)
    dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if dtype not in (known := [np.dtype(there).name for there in DTYPES.values()]):
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(known)}")
    ids = _control_ids(tokenizer, template)
    objects = {"config.json": config_values(model.config, dtype) | ids}
    if generation or (tokenizer is not None and model.config.head == "lm"):
        objects["generation_config.json"] = {k: i for k, i in ids.items() if i is not None} | (generation or {})
    texts = {name: json.dumps(values, indent=2, sort_keys=True) + "\n" for name, values in objects.items()}
    if template:
        texts["chat_template.jinja"] = jinja_source(template)

    new = folder / ".saving"
    shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
    new.mkdir(parents=True)
    try:
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(new)
        _write_weights(new, {name: p.data for name, p in model.parameters.items()}, dtype, max_shard_size)
        _move_in(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _control_ids(tokenizer, template):
    """The ids of begin, end and padding, under their names in config.json; null where there is none, because the
    defaults there are somebody else's."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    ends = {tokenizer.eos_id} - {None}
    if template:
        try:
            ends = stop_ids(template, tokenizer)
        except ValueError:
            if template in TEMPLATES:
                raise
            jinja_source(template)  # a source may refuse the two messages that stop_ids tries, but has to be one
    ends = sorted(ends)
    eos = ends if len(ends) > 1 else (ends or [None])[0]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}


def _write_weights(folder, arrays, dtype, max_shard_size):
    """model.safetensors, or several files and their index."""
    size = lambda name: math.prod(arrays[name].shape) * np.dtype(dtype).itemsize
    limit = math.inf if max_shard_size is None else max_shard_size
    shards, room = [[]], limit
    for name in arrays:
        if shards[-1] and size(name) > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size(name)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        # safetensors writes the memory as it lies there, so every array must be contiguous
        part = {name: _converted(name, np.ascontiguousarray(to_host(arrays[name])), dtype) for name in names}
        save_arrays(part, folder / file, {"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(map(size, arrays))}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _converted(name, array, dtype):
    """`array` in dtype, itself where it is. ValueError where a finite value would become infinite."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not np.array_equal(np.isfinite(converted), np.isfinite(array)):
        raise ValueError(f"{name} has values too large for {dtype}; save it in a wider one")
    return converted


def _move_in(new, folder):
    """Move every file of `new` into `folder`, config.json last, in place of what is there and of other weights."""
    (folder / "config.json").unlink(missing_ok=True)
    for old in folder.iterdir():
        if WEIGHTS.fullmatch(old.name):
            old.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)


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
        shared |= {POOLING: config.pooling} if config.pooling != "last" else {}
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
            "attn_pdrop": 0.0,  # there is no dropout here, and one of 0.1 by default
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    name = {(False, False): "Llama", (True, False): "Qwen2", (False, True): "Qwen3"}.get(
        (config.attention_bias, config.qk_norm)
    )
    window = config.sliding_window
    if name == "Llama" and window is not None:
        name = "Mistral"
    if name is None or (name == "Mistral" and config.window_layers is not None):
        raise ValueError("no known architecture has this mix of attention_bias, qk_norm and sliding_window")
    scaling = config.rope_scaling or {"rope_type": "default"}
    values = shared | {
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
        "sliding_window": window,
    }
    if name.startswith("Qwen"):
        layers = range(config.num_hidden_layers)
        windowed = [config.window_of(layer) is not None for layer in layers]
        values |= {
            "use_sliding_window": window is not None,
            "max_window_layers": windowed.index(True) if any(windowed) else config.num_hidden_layers,
            "layer_types": ["sliding_attention" if there else "full_attention" for there in windowed],
        }
    return values
