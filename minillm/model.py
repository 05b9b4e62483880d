"""
Two decoder-only transformers: Llama (with what Mistral, Qwen2 and Qwen3 add to it) and GPT-2.

    hidden = model.hidden(tokens, start)            (B, T) ids -> (B, T, D), the input of the head
    logits = model(tokens, start)                   (B, T, V), or (B, T, 1) with a scalar head

Losses take `hidden` and `model.head` (kernels that never make the logits), so no loss is in here. `start` is
attention's: (B, T) int32, the first position each token may see, for packed documents and left padding.

Tokens and `start` are arrays on the host, wherever the model is: they are checked there, and moved once.

Parameters live in a flat dict under their Hugging Face names and shapes. Underneath they are views into one flat array,
and their gradients into another, so that an optimizer, clipping and zeroing are one pass; and because q, k, v lie side
by side there, and gate, up too, their fused weights, which the computation uses, are views as well.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np

from minillm import functional as F
from minillm.autograd import Tensor, add, cast, checkpoint, split, transpose
from minillm.kernels.device import beside, device_of, empty, to_device, upcast, xp_of

# ------------------------------------------------------------------ config


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of a model, under the names of Hugging Face's config.json. Impossible values are ValueErrors.

    architecture  "llama" (RMSNorm, RoPE, SwiGLU; also Mistral, Qwen2, Qwen3) or "gpt2" (LayerNorm, learned positions,
                  GELU, biases everywhere)
    head          "lm" for logits, "scalar" for one number per token: reward and value models
    pooling       a scalar head's score of an answer: its number at the "last" token, or the "mean" of all its tokens'
    """

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int | None = None  # None: 8/3 hidden_size up to a multiple of 32 (llama), 4 hidden_size (gpt2)
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: one per attention head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 1024
    architecture: str = "llama"
    head: str = "lm"
    pooling: str = "last"
    tie_word_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # see functional.rope_table
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # RMSNorm on each head of q and k, before RoPE (Qwen3)
    sliding_window: int | None = None  # a token sees this many positions, its own included (Mistral)
    window_layers: tuple[int, ...] | None = None  # the layers that have the window; None: all of them
    initializer_range: float = 0.02
    activation_checkpointing: bool = False  # keep only each block's input, and run it again on the way back

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.type is int or (field.type == int | None and value is not None)
            if whole and (not _is_int(value) or value < 1):
                self._refuse(field.name, "must be a positive whole number")
        fill = self._fill
        fill("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            self._refuse("num_attention_heads", f"must divide hidden_size {self.hidden_size}")
        fill("head_dim", self.hidden_size // self.num_attention_heads)
        if self.architecture == "gpt2":
            fill("intermediate_size", 4 * self.hidden_size)
        fill("intermediate_size", -(-8 * self.hidden_size // 96) * 32)  # 8/3 of it, to a multiple of 32 (Touvron 2023)
        choices = {"architecture": ("llama", "gpt2"), "head": ("lm", "scalar"), "pooling": ("last", "mean")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                self._refuse(name, f"must be one of {', '.join(known)}")
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse("num_key_value_heads", f"must divide num_attention_heads {self.num_attention_heads}")
        if self.architecture == "llama" and self.head_dim % 2:
            self._refuse("head_dim", "must be even: RoPE turns pairs")
        for name in ("norm_eps", "rope_theta", "initializer_range"):
            if not F.is_positive(getattr(self, name)):
                self._refuse(name, "must be a positive number")
        layers = self.window_layers
        if layers is not None:
            known = isinstance(layers, tuple | list) and all(_is_int(i) and i >= 0 for i in layers)
            if not known or max(layers, default=0) >= self.num_hidden_layers:
                self._refuse("window_layers", f"must be some of the layers 0 to {self.num_hidden_layers - 1}")
        if self.architecture == "gpt2":
            for name in ("attention_bias", "qk_norm", "sliding_window", "rope_scaling"):
                if getattr(self, name):
                    self._refuse(name, "is not for gpt2")
            if self.num_key_value_heads != self.num_attention_heads:
                self._refuse("num_key_value_heads", "must equal num_attention_heads for gpt2")
            if self.head_dim * self.num_attention_heads != self.hidden_size:
                told = f"{self.num_attention_heads} heads must make hidden_size {self.hidden_size} for gpt2"
                self._refuse("head_dim", f"times {told}")
        F.rope_table(1, self.head_dim + self.head_dim % 2, scaling=self.rope_scaling)  # a wrong scaling is an error now

    def _fill(self, name, value):
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _refuse(self, name, why):
        raise ValueError(f"Config.{name} = {getattr(self, name)!r} {why}")

    def window_of(self, layer):
        """The sliding window of a layer, or None."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None


def _is_int(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# ------------------------------------------------------------------ key-value cache


class Cache:
    """Keys and values of the tokens so far, per layer: two (B, capacity, Hk, D) arrays. `length` tokens are in."""

    def __init__(self, config, rows, capacity, like, dtype):
        shape = (config.num_hidden_layers, rows, capacity, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = empty(like, shape, dtype), empty(like, shape, dtype)
        self.length, self.capacity = 0, capacity

    def extend(self, layer, k, v):
        """Append (B, T, Hk, D) keys and values of one layer; returns all of that layer's so far."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, and {end} are needed: new_cache(rows, {end})")
        self.keys[layer, :, self.length : end], self.values[layer, :, self.length : end] = k, v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def keep(self, rows):
        """Drop all rows but these (an index array on the host, rising). Those behind a gap move up."""
        moved = rows != np.arange(len(rows))
        first = int(moved.argmax()) if moved.any() else len(rows)
        rows, places = beside(rows[first:], self.keys), slice(first, len(rows))
        for x in (self.keys, self.values):
            x[:, places, : self.length] = x[:, rows, : self.length]
        self.keys, self.values = self.keys[:, : places.stop], self.values[:, : places.stop]


# ------------------------------------------------------------------ parameters


class Model:
    """What both architectures share: parameters in one flat memory, the walk through the blocks, and the head.

    parameters  {Hugging Face name: Tensor}; .data and .grad are views into `flat` and `flat_grad`
    flat        every parameter, one after another, in the order of `parameters`
    flat_grad   the gradients, likewise; zero it after each optimizer step: model.flat_grad[...] = 0
    used        {name: Tensor}: what the computation uses, some of it fused
    activations the dtype of what flows between the parameters, from the embedding on
    adapter     None, or the low-rank adapter that `parameters` are (lora.py)
    """

    transposed = False  # whether the blocks' matrices are stored (in, out)

    def __init__(self, config, seed=0, dtype=np.float32):
        """Fresh weights from the seed; seed None leaves zeros, for weights that come from elsewhere."""
        self.config, self.adapter, self._instead, self.activations = config, None, {}, np.dtype(dtype)
        self._place(self.shapes(config), dtype, np)
        self._use = Model._fused
        self.used = self._use(self)
        self._list_blocks()
        if seed is not None:
            rng = np.random.default_rng(seed)
            for name, p in self.parameters.items():
                self._initialise(name, p.data, rng)

    def _place(self, shapes, dtype, xp):
        """Allocate flat memory for {name: shape}, and make the Tensors that are views into it."""
        size = sum(math.prod(shape) for shape in shapes.values())
        self.flat, self.flat_grad = xp.zeros(size, dtype), xp.zeros(size, dtype)
        self._offsets, offset = {}, 0
        for name, shape in shapes.items():
            self._offsets[name] = offset, shape
            offset += math.prod(shape)
        self.parameters = {name: self.view(name) for name in shapes}

    def _fused(self):
        """The parameters, with projections that stand side by side as one Tensor each, in place of their parts."""
        used = dict(self.parameters)
        for fused, parts in self.projections(self.config).items():
            if len(parts) > 1:
                first, width = next(iter(parts)), sum(parts.values())
                shape = width, self.parameters[f"{first}.weight"].shape[1]
                for kind, wide in (("weight", shape), ("bias", (width,))):
                    if f"{first}.{kind}" in used:
                        used[f"{fused}.{kind}"] = self.view(f"{first}.{kind}", wide)
                        for part in parts:
                            del used[f"{part}.{kind}"]
        return used

    def _list_blocks(self):
        prefixes = [self.block_prefix.format(layer) for layer in range(self.config.num_hidden_layers)]
        self._block_names = [[name for name in self.used if name.startswith(prefix)] for prefix in prefixes]

    def variant(self, shapes, use, instead):
        """A model that computes with other parameters. It has a flat memory of its own for them; everything else is
        shared and not copied, and this model stays as it is.

        shapes   {name: shape} of its parameters; all 0
        use      function(variant) -> {name: Tensor}, its `used`
        instead  {name: function(x, weights) -> y}: what stands in place of blocks' projections (`projections`), called
                 with the block's part of `used`
        """
        new = copy.copy(self)
        new._place(shapes, self.flat.dtype, xp_of(self.flat))
        new._use, new.used, new._instead = use, use(new), instead
        new._list_blocks()
        return new

    def twin(self):
        """This model with a gradient memory of its own, all 0, so that two threads can run backward at once. The
        weights are not copied: what changes here changes there."""
        return self._with(self.flat)

    def to(self, device, activations=None):
        """This model on the "cpu" or the "cuda" device, with activations of another dtype if one is given: itself where
        nothing changes, otherwise a model whose memory is its own if it was moved, and whose gradients are 0. A model
        is moved before it gets an adapter; ValueError: this one has one."""
        activations = self.activations if activations is None else np.dtype(activations)
        if device == self.device and activations == self.activations:
            return self
        if self.adapter is not None:
            raise ValueError("a model is moved before it gets an adapter")
        new = self._with(to_device(self.flat, device))
        new.activations = activations
        return new

    def without_casts(self):
        """This model for many calls without a gradient: with a copy of the blocks' matrices in the dtype of the
        activations, to which every call would cast them, to the same bits. Itself where there is nothing to cast."""
        if self.activations == self.flat.dtype:
            return self
        new = copy.copy(self)
        new.used = dict(self.used)
        for name in itertools.chain(*self._block_names):
            if self.used[name].ndim == 2:
                new.used[name] = Tensor(self.used[name].data.astype(self.activations))
        return new

    @property
    def device(self):
        """Where the model is, "cpu" or "cuda"."""
        return device_of(self.flat)

    def _with(self, flat):
        """This model with these parameters, in the order of `flat`, and gradients that are 0."""
        new = copy.copy(self)
        new.flat, new.flat_grad = flat, xp_of(flat).zeros_like(flat)
        new.parameters = {name: new.view(name) for name in self.parameters}
        new.used = self._use(new)
        return new

    def view(self, first, shape=None):
        """The Tensor that starts where the parameter `first` does; with a shape, it spans its neighbours too."""
        offset, own = self._offsets[first]
        shape = own if shape is None else shape
        part = slice(offset, offset + math.prod(shape))
        tensor = Tensor(self.flat[part].reshape(shape), requires_grad=True)
        tensor.grad = self.flat_grad[part].reshape(shape)
        return tensor

    def _initialise(self, name, data, rng):
        """N(0, initializer_range) for matrices, with residual projections scaled by 1 / sqrt(2 layers) (Radford et al.
        2019); 1 for norms, 0 for biases; 1 / sqrt(hidden_size + 1) for a scalar head (Stiennon et al. 2020)."""
        if name.endswith("bias"):
            data[...] = 0
        elif data.ndim == 1:
            data[...] = 1
        else:
            std = self.config.initializer_range
            if name.endswith(self.residual_projections):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            if name == "score.weight":
                std = 1 / math.sqrt(self.config.hidden_size + 1)
            data[...] = std * rng.standard_normal(data.shape)

    def state_dict(self):
        """{name: array} of the parameters, views of the flat memory."""
        return {name: p.data for name, p in self.parameters.items()}

    def load_state_dict(self, arrays):
        """Copy {name: array} into the parameters. Every name and shape must fit; an error names those that do not, and
        then nothing has been copied."""
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        check_shapes({name: p.shape for name, p in self.parameters.items()}, shapes)
        for name, p in self.parameters.items():
            p.data[...] = beside(arrays[name], p.data)

    @property
    def head(self):
        """The head's weight: (V, D) for logits (the embedding where it is tied), (1, D) for a scalar."""
        (name,) = _head_shapes(self.config) or (self.embedding_name,)
        return self.used[name]

    # -------------------------------------------------------------- forward

    def hidden(self, tokens, start=None, cache=None):
        """The last layer's output for each token after the norm, (B, T, D), as a Tensor.

        tokens  (B, T) int, and start (B, T) int32 or None, on the host; or both on the model's GPU, where nobody looks
                at them: what is refused below has to be refused before
        cache   a Cache that holds the tokens before these and takes these
        ValueError where a token would stand further from its row's (or document's) start than the context is long.
        """
        before = 0 if cache is None else cache.length
        (B, T), layers = tokens.shape, range(self.config.num_hidden_layers)
        start = np.zeros((B, T), np.int32) if start is None else F.checked_start(start, B, T, start)
        context = self.config.max_position_embeddings
        longest = (
            int((np.arange(before, before + T) - start).max(initial=-1)) + 1
            if device_of(start) == "cpu"
            else before + T
        )
        if longest > context:
            raise ValueError(f"{longest} tokens are more than the model's context of {context}")
        x = self._embed(tokens, start, before)
        if x.dtype != self.activations:
            x = cast(x, dtype=self.activations)
        seen = {window: self._seen(start, before, window) for window in map(self.config.window_of, layers)}
        for layer in layers:
            x = self._run_block(layer, x, seen[self.config.window_of(layer)], before, cache)
        if cache is not None:
            cache.length += T
        return self._final_norm(x)

    def _seen(self, start, before, window):
        """`start` within a layer's window, where the model is."""
        B, T = start.shape
        if window is not None:
            xp = xp_of(start)
            start = xp.maximum(start, xp.arange(before, before + T, dtype=np.int32) - (window - 1))
        return F.checked_start(start, B, T, self.flat)

    def _run_block(self, layer, x, start, before, cache):
        names, prefix = self._block_names[layer], self.block_prefix.format(layer)

        def block(x, *weights):
            short = {name.removeprefix(prefix): weight for name, weight in zip(names, weights, strict=True)}
            return self._block(x, short, layer, start, before, cache)

        weights = [self.used[name] for name in names]
        run = checkpoint if self.config.activation_checkpointing and cache is None else _call
        return run(block, x, *weights)

    def _linear(self, x, w, layer, name):
        """x through one of a block's projections, or through what `variant` has put in its place."""
        instead = self._instead.get(self.block_prefix.format(layer) + name)
        if instead is not None:
            return instead(x, w)
        weight = w[f"{name}.weight"]
        return F.linear(x, transpose(weight) if self.transposed else weight, w.get(f"{name}.bias"))

    def __call__(self, tokens, start=None, cache=None):
        """logits (B, T, V), or (B, T, 1) with a scalar head. Arguments as for `hidden`."""
        return F.linear(self.hidden(tokens, start, cache), self.head)

    def new_cache(self, rows, capacity):
        """An empty Cache for `rows` sequences of up to `capacity` tokens."""
        return Cache(self.config, rows, capacity, self.flat, self.activations)


def check_shapes(expected, found):
    """ValueError that names the tensors that are missing, not known or misshapen. Both are {name: shape}."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"{n} is {found[n]}, not {s}" for n, s in expected.items() if n in found and found[n] != s]
    complaints = (("missing", missing), ("not known", extra), ("misshapen", wrong))
    told = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in complaints
        if names
    ]
    if told:
        raise ValueError("; ".join(told))


def _head_shapes(config):
    """{name: shape} of the head's own weight; a tied head has none."""
    if config.head == "scalar":
        return {"score.weight": (1, config.hidden_size)}
    return {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, config.hidden_size)}


def _call(f, *inputs):
    return f(*inputs)


def _attend(q, k, v, layer, start, cache):
    """Attention over these tokens and, if there is a cache, the ones before."""
    if cache is not None:
        if k.requires_grad:  # the cache holds arrays, so k and v would lose their gradient without a word
            raise RuntimeError("a model with a cache has no gradient: run it inside no_grad()")
        k, v = cache.extend(layer, k.data, v.data)
    return F.attention(q, k, v, start=start)


# ------------------------------------------------------------------ Llama


class Llama(Model):
    """x = x + o(attention(norm(x))), x = x + down(swiglu(norm(x))), per block (Touvron et al. 2023)."""

    residual_projections = ("o_proj.weight", "down_proj.weight")
    embedding_name = "model.embed_tokens.weight"
    block_prefix = "model.layers.{}."

    def __init__(self, config, seed=0, dtype=np.float32):
        if config.architecture != "llama":
            raise ValueError(f"Llama takes a Config of architecture 'llama', not {config.architecture!r}")
        super().__init__(config, seed, dtype)
        self._grow_table(config.max_position_embeddings)

    def _grow_table(self, length):
        """cos and sin for positions below `length`. Padding on the left can shift a row beyond the context it fills."""
        c, dtype = self.config, upcast(self.flat[:0]).dtype
        table = F.rope_table(length, c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling, dtype=dtype)
        self.cos, self.sin = (beside(angles, self.flat) for angles in table)

    @staticmethod
    def shapes(config):
        """{name: shape} of every parameter, in the order of flat memory: what is fused stands side by side."""
        c, d = config, config.hidden_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes = {"model.embed_tokens.weight": (c.vocab_size, d)}
        for i in range(c.num_hidden_layers):
            layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
            shapes |= {layer + "input_layernorm.weight": (d,)}
            shapes |= {f"{attention}{n}_proj.weight": (size, d) for n, size in (("q", q), ("k", kv), ("v", kv))}
            if c.attention_bias:
                shapes |= {f"{attention}{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
            if c.qk_norm:
                shapes |= {f"{attention}{n}_norm.weight": (c.head_dim,) for n in "qk"}
            shapes |= {attention + "o_proj.weight": (d, q)}
            shapes |= {layer + "post_attention_layernorm.weight": (d,)}
            shapes |= {f"{layer}mlp.{n}_proj.weight": (c.intermediate_size, d) for n in ("gate", "up")}
            shapes |= {layer + "mlp.down_proj.weight": (d, c.intermediate_size)}
        return shapes | {"model.norm.weight": (d,)} | _head_shapes(c)

    @staticmethod
    def projections(config):
        """{projection: {the modules that lie side by side in it: their widths}} of every block."""
        c, found = config, {}
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        for i in range(c.num_hidden_layers):
            attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            found[attention + "qkv"] = {f"{attention}{n}_proj": size for n, size in (("q", q), ("k", kv), ("v", kv))}
            found[attention + "o_proj"] = {attention + "o_proj": c.hidden_size}
            found[mlp + "gate_up"] = {f"{mlp}{n}_proj": c.intermediate_size for n in ("gate", "up")}
            found[mlp + "down_proj"] = {mlp + "down_proj": c.hidden_size}
        return found

    def _embed(self, tokens, start, before):
        if before + tokens.shape[1] > len(self.cos) or device_of(self.cos) != self.device:
            self._grow_table(max(len(self.cos), 2 * (before + tokens.shape[1])))
        return F.embedding(tokens, self.used[self.embedding_name])

    def _final_norm(self, x):
        return F.rms_norm(x, self.used["model.norm.weight"], eps=self.config.norm_eps)

    def _block(self, x, w, layer, start, before, cache):
        c, (B, T, _) = self.config, x.shape

        h = F.rms_norm(x, w["input_layernorm.weight"], eps=c.norm_eps)
        heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        h = self._linear(h, w, layer, "self_attn.qkv").reshape(B, T, sum(heads), c.head_dim)
        angles = {"cos": self.cos, "sin": self.sin, "offset": before}
        if c.qk_norm:
            q, k, v = split(h, sizes=heads, axis=2)
            q = F.rope(F.rms_norm(q, w["self_attn.q_norm.weight"], eps=c.norm_eps), **angles)
            k = F.rope(F.rms_norm(k, w["self_attn.k_norm.weight"], eps=c.norm_eps), **angles)
        else:
            q, k, v = split(F.rope(h, **angles, heads=heads[0] + heads[1]), sizes=heads, axis=2)
        mixed = _attend(q, k, v, layer, start, cache)
        x = add(x, self._linear(mixed.reshape(B, T, heads[0] * c.head_dim), w, layer, "self_attn.o_proj"))

        h = F.rms_norm(x, w["post_attention_layernorm.weight"], eps=c.norm_eps)
        gate, up = split(self._linear(h, w, layer, "mlp.gate_up"), sizes=(c.intermediate_size, c.intermediate_size))
        return add(x, self._linear(F.swiglu(gate, up), w, layer, "mlp.down_proj"))


# ------------------------------------------------------------------ GPT-2


class GPT2(Model):
    """x = x + proj(attention(norm(x))), x = x + proj(gelu(fc(norm(x)))), per block (Radford et al. 2019). Its matrices
    are stored (in, out), as in its checkpoints, and used transposed."""

    residual_projections = ("c_proj.weight",)
    embedding_name = "transformer.wte.weight"
    block_prefix = "transformer.h.{}."
    transposed = True

    def __init__(self, config, seed=0, dtype=np.float32):
        if config.architecture != "gpt2":
            raise ValueError(f"GPT2 takes a Config of architecture 'gpt2', not {config.architecture!r}")
        super().__init__(config, seed, dtype)

    @staticmethod
    def shapes(config):
        """{name: shape} of every parameter, in the order of flat memory."""
        c, d = config, config.hidden_size
        shapes = {"transformer.wte.weight": (c.vocab_size, d)}
        shapes |= {"transformer.wpe.weight": (c.max_position_embeddings, d)}

        def norm(name):
            return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

        def dense(name, rows, columns):
            return {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}

        for i in range(c.num_hidden_layers):
            h, wide = f"transformer.h.{i}.", c.intermediate_size
            shapes |= norm(h + "ln_1") | dense(h + "attn.c_attn", d, 3 * d) | dense(h + "attn.c_proj", d, d)
            shapes |= norm(h + "ln_2") | dense(h + "mlp.c_fc", d, wide) | dense(h + "mlp.c_proj", wide, d)
        return shapes | norm("transformer.ln_f") | _head_shapes(c)

    @staticmethod
    def projections(config):
        """{projection: {the modules that lie side by side in it: their widths}} of every block: one module in each."""
        d, widths = config.hidden_size, {}
        for i in range(config.num_hidden_layers):
            h = f"transformer.h.{i}."
            widths |= {h + "attn.c_attn": 3 * d, h + "attn.c_proj": d}
            widths |= {h + "mlp.c_fc": config.intermediate_size, h + "mlp.c_proj": d}
        return {name: {name: width} for name, width in widths.items()}

    def _embed(self, tokens, start, before):
        """Learned positions count from each row's first token: padding on the left moves nobody's position."""
        xp = xp_of(start)
        positions = xp.maximum(xp.arange(before, before + tokens.shape[1]) - start, 0)
        return F.embedding(tokens, self.used["transformer.wte.weight"]) + F.embedding(
            positions, self.used["transformer.wpe.weight"]
        )

    def _final_norm(self, x):
        weight, bias = self.used["transformer.ln_f.weight"], self.used["transformer.ln_f.bias"]
        return F.layer_norm(x, weight, bias, eps=self.config.norm_eps)

    def _block(self, x, w, layer, start, before, cache):
        c, (B, T, D) = self.config, x.shape

        def norm(x, name):
            return F.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps=c.norm_eps)

        def linear(x, name):
            return self._linear(x, w, layer, name)

        qkv = split(linear(norm(x, "ln_1"), "attn.c_attn"), sizes=(D, D, D))
        q, k, v = (p.reshape(B, T, c.num_attention_heads, c.head_dim) for p in qkv)
        mixed = _attend(q, k, v, layer, start, cache)
        x = add(x, linear(mixed.reshape(B, T, D), "attn.c_proj"))
        return add(x, linear(F.gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate="tanh"), "mlp.c_proj"))


ARCHITECTURES = {"llama": Llama, "gpt2": GPT2}


def build(config, seed=0, dtype=np.float32):
    """The model of config.architecture, with fresh weights; seed None leaves zeros."""
    return ARCHITECTURES[config.architecture](config, seed, dtype)
