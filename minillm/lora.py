"""
Low-rank adapters on a frozen model (LoRA, Hu et al. 2021), and the model in four bits (QLoRA, Dettmers et al. 2023).

    y = x W^T + s (x A^T) B^T,    s = alpha / rank    (alpha / sqrt(rank) with rslora, Kalajdzievski 2023)

    model = adapt(model, rank=8, alpha=16, targets=("q_proj", "v_proj"), quantize="nf4")
    reference = switched_off(model)                what it was before: the same arrays, no second copy
    save_adapter(model, folder)                    Hugging Face PEFT's files
    plain = merge(model)                           a model without adapters that computes the same

An adapted model is a Model whose `parameters`, `flat` and `flat_grad` are its adapter's, under PEFT's names:
optimizers, clipping and zeroing see nothing else, and the frozen weights have neither gradient nor moments. B starts at
0, so it begins as the model that it was made from, bit for bit. With a scalar head, the head is trained, too, in full.

q|k|v and gate|up are one product each (minillm.model), and so are the A of their adapters, which lie side by side in
memory: one (rows, width) x (width, modules rank) product, and one small product per B, added to its own columns.
GPT-2's c_attn is one module, as in PEFT, and has one A and one B for all three.

Left out: dropout, biases, adapters on embeddings and heads, DoRA, ranks that differ between modules.
"""

import difflib
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .autograd import Tensor, op
from .checkpoint import save_arrays
from .files import DTYPES, read_header, read_object
from .kernels.blas import multiply
from .kernels.device import beside, concatenate, to_host, upcast, xp_of
from .model import build

PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"  # what PEFT puts around a module's name
ALL_LINEAR = "all-linear"  # PEFT's word for every projection of every block
HEAD = "score.weight"  # of reward and value models: trained in full, beside the adapter

# ------------------------------------------------------------------ four bits: NF4

# Quantiles of N(0, 1), of which 0 is one, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
CODE_BOOK = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
BLOCK, GROUP = 64, 256  # weights that share a scale, and scales that share a step
_MIDDLES = (CODE_BOOK[1:] + CODE_BOOK[:-1]) / 2
# What the two codes in a byte stand for, the first in its upper half; as one number of 8 bytes, so that one look-up
# finds both.
_PAIRS = np.stack([np.repeat(CODE_BOOK, 16), np.tile(CODE_BOOK, 16)], 1).view(np.uint64).reshape(256)


@functools.cache
def _pairs(xp):
    return xp.asarray(_PAIRS)  # once: every product would copy it to the GPU


class NF4(NamedTuple):
    """A matrix in 4.127 bits per weight, frozen. w = c CODE_BOOK[code], and the scale c = offset + step scale. The
    arrays are where the model is."""

    codes: np.ndarray  # uint8, two weights a byte
    scales: np.ndarray  # uint8, one per block of 64 weights
    steps: np.ndarray  # float32, one per group of 256 scales
    offset: np.ndarray  # float32 (1,), the smallest scale
    shape: tuple

    @property
    def nbytes(self):
        return sum(array.nbytes for array in self[:4])

    def dense(self, dtype=np.float32):
        """The matrix as an array, newly made."""
        xp = xp_of(self.codes)
        c = self.offset + self.steps.repeat(GROUP)[: len(self.scales)] * self.scales
        w = xp.take(_pairs(xp), self.codes).view(np.float32).reshape(-1, BLOCK)
        w *= c[:, None]
        return w.reshape(-1)[: math.prod(self.shape)].reshape(self.shape).astype(dtype, copy=False)


def quantised(matrix):
    """A matrix as NF4. Weights run along its rows, in blocks of 64, each divided by its largest magnitude c and rounded
    to the nearest of 16 values; the c are rounded to 8 bits in groups of 256 (double quantisation, section 3).

    The paper takes the mean from the scales and rounds the rest to 8-bit floats; here their minimum is taken and the
    rest rounded to 255 equal steps: a scale stays within [smallest, largest], so it never changes its sign, and of
    normal weights it is off by 0.12 % (root mean square), where E4M3 floats about the mean would be by 0.43 %.
    """
    like, matrix = matrix, to_host(matrix)
    if not np.isfinite(matrix).all():
        raise ValueError(f"a matrix {matrix.shape} with numbers that are not finite can not be quantised")
    blocks = -(-matrix.size // BLOCK)
    w = np.zeros(blocks * BLOCK, np.float32)
    w[: matrix.size] = matrix.reshape(-1)
    w = w.reshape(blocks, BLOCK)
    c = np.abs(w).max(1)
    w /= np.where(c > 0, c, 1)[:, None]
    codes = np.searchsorted(_MIDDLES, w.reshape(-1)).astype(np.uint8)
    offset = c.min()
    above = np.zeros(-(-blocks // GROUP) * GROUP, np.float32)
    above[:blocks] = c - offset
    steps = above.reshape(-1, GROUP).max(1) / np.float32(255)
    scales = np.rint(above / np.where(steps > 0, steps, 1).repeat(GROUP))[:blocks].astype(np.uint8)
    arrays = codes[::2] << 4 | codes[1::2], scales, steps, np.array([offset])
    return NF4(*(beside(array, like) for array in arrays), matrix.shape)


# ------------------------------------------------------------------ the op


def _dense(weight, dtype):
    return weight.dense(dtype) if isinstance(weight, NF4) else weight.astype(dtype, copy=False)


@op
def adapted_linear(x, A=None, *B, needs, weight, bias=None, columns=(), scale=1.0):
    """y = x W^T + bias, and y[:, columns_p] += s u_p B_p^T with u = x A^T for each of P modules: x (..., K), A
    (P r, K), B_p (N_p, r), y (..., N). W (N, K), an array or NF4, and bias (N,) are frozen. Without A, y has the first
    line alone.

    dx = g W + v A with v_p = s g_p B_p, dA = v^T x, dB_p = s g_p^T u_p: B's module sees the columns g_p of g alone.
    dA and dB_p have at least 32 bits (`functional.linear`).
    Keeps x, s u, A, B and W as it is stored: NF4 becomes an array again, for dx, and is dropped again.
    Example: adapted_linear(randn(B, K), randn(P, K), randn(M, P), weight=randn(M + N, K), columns=[slice(M)], scale=2)
    """
    (N, K), lead, rows = weight.shape, x.shape[:-1], math.prod(x.shape[:-1])
    flat = x.reshape(rows, K)
    y, wide = multiply(flat, _dense(weight, x.dtype).T), upcast(x[:0]).dtype
    if bias is not None:
        y += bias.astype(x.dtype, copy=False)
    if A is None:
        dx = lambda g: multiply(g.reshape(rows, N), _dense(weight, g.dtype)).reshape(*lead, K)
        return y.reshape(*lead, N), (dx, None)
    A, B, r = A.astype(x.dtype, copy=False), [b.astype(x.dtype, copy=False) for b in B], B[0].shape[1]
    part = [slice(p * r, (p + 1) * r) for p in range(len(B))]
    u = (scale * multiply(flat, A.T)).astype(x.dtype, copy=False)
    for b, own, at in zip(B, columns, part, strict=True):
        multiply(u[:, at], b.T, y[:, own], add=True)

    def back(g):
        g = g.reshape(rows, N)
        v = concatenate([multiply(g[:, own], b) for b, own in zip(B, columns, strict=True)], 1)
        v = (scale * v).astype(x.dtype, copy=False)
        dB = [multiply(g[:, own].T, u[:, at], dtype=wide) for own, at in zip(columns, part, strict=True)]
        dx = None
        if needs[0]:
            dx = multiply(v, A, multiply(g, _dense(weight, g.dtype)), add=True).reshape(*lead, K)
        return dx, multiply(v.T, flat, dtype=wide), *dB

    return y.reshape(*lead, N), back


class Projection(NamedTuple):
    """What stands in place of a block's projection. Names are as within the block."""

    name: str
    weight: object  # NF4; None: the model's own matrix
    transposed: bool  # whether that is stored (in, out)
    modules: tuple  # (name, its columns of y) of those with an adapter
    scale: float

    def __call__(self, x, w):
        weight, bias = self.weight, w.get(f"{self.name}.bias")
        if weight is None:
            weight = w[f"{self.name}.weight"].data
            weight = weight.T if self.transposed else weight
        factors = [f"{self.name}.lora_A", *(f"{name}.lora_B" for name, _ in self.modules)] if self.modules else []
        return adapted_linear(
            x,
            *(w[factor] for factor in factors),
            weight=weight,
            bias=None if bias is None else bias.data,
            columns=[columns for _, columns in self.modules],
            scale=self.scale,
        )


# ------------------------------------------------------------------ a model with an adapter


class Adapter(NamedTuple):
    """How a model was adapted: its `adapter`."""

    rank: int
    alpha: float
    targets: tuple  # names, of which each of `modules` has one or ends with it
    rslora: bool
    modules: dict  # {module: (its projection, its columns)} of those with an adapter, in the order of memory
    frozen: dict  # {name: Tensor}: what the model used before, but for what is quantised
    quantised: dict  # {projection: NF4}

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapt(model, *, rank=8, alpha=16.0, targets=ALL_LINEAR, rslora=False, quantize="none", seed=0):
    """A model with an adapter beside each projection that `targets` names, and no other parameters to train.

    targets   "all-linear", or names as PEFT takes them: q_proj is every module whose name is that or ends with .q_proj
    quantize  "nf4" holds the blocks' matrices in four bits; embeddings, norms, biases and the head stay as they are
    seed      of A, which is uniform in +-1 / sqrt(inputs) as in PEFT; B is 0

    `model` stays as it is, and the frozen arrays are its own: drop it, and its gradients' memory goes. (Beside
    quantised matrices the rest is copied, and then all of it goes.) ValueError: a model with an adapter, a target that
    there is not, a rank or alpha that is not positive.
    """
    if model.adapter is not None:
        raise ValueError("the model has an adapter: merge it before it gets another one")
    if rank < 1 or int(rank) != rank:
        raise ValueError(f"a LoRA rank has to be a whole number of at least 1, and is {rank}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA's alpha has to be above 0, and is {alpha}")
    if quantize not in ("none", "nf4"):
        raise ValueError(f"quantize has to be none or nf4, and is {quantize!r}")
    projections = model.projections(model.config)
    targets = _matched(targets, [module for parts in projections.values() for module in parts])
    chosen = {
        module: (projection, columns)
        for projection, parts in projections.items()
        for module, columns in _columns(parts).items()
        if any(module == target or module.endswith(f".{target}") for target in targets)
    }
    stored = lambda matrix: matrix.T if model.transposed else matrix
    four_bits = {}
    if quantize == "nf4":
        four_bits = {name: quantised(stored(model.used[f"{name}.weight"].data)) for name in projections}
    frozen = {
        name: Tensor(tensor.data.copy() if four_bits else tensor.data)
        for name, tensor in model.used.items()
        if name.removesuffix(".weight") not in four_bits
    }
    adapter = Adapter(int(rank), float(alpha), targets, rslora, chosen, frozen, four_bits)

    inputs = {name: stored(model.used[f"{name}.weight"].data).shape[1] for name in projections}
    shapes = _shapes(adapter, inputs, model)
    adapted = model.variant(shapes, lambda new: _used(adapter, inputs, new), _instead(adapter, model))
    adapted.adapter = adapter
    rng = np.random.default_rng((seed, 5))
    for name, p in adapted.parameters.items():
        if name.endswith(_A):
            bound = 1 / math.sqrt(p.shape[1])
            p.data[...] = beside(rng.uniform(-bound, bound, p.shape), p.data)
    if HEAD in model.used:
        adapted.parameters[PREFIX + HEAD].data[...] = model.used[HEAD].data
    return adapted


def _matched(targets, modules):
    """The targets as a tuple of names, each of which is the end of a module's name. ValueError for one that is not."""
    ends = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    if targets in (ALL_LINEAR, (ALL_LINEAR,), [ALL_LINEAR]):
        return tuple(ends)
    if isinstance(targets, str) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"LoRA's targets have to be {ALL_LINEAR!r} or a list of names, and are {targets!r}")
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            near = difflib.get_close_matches(target, ends, 1)
            hint = f"; perhaps you meant {near[0]}" if near else ""
            raise ValueError(f"LoRA target {target!r} is no projection of this model: {', '.join(ends)}{hint}")
    return tuple(targets)


def _columns(parts):
    """{module: the columns of its projection's output that are its own}."""
    ends = np.cumsum(list(parts.values())).tolist()
    return {module: slice(end - width, end) for (module, width), end in zip(parts.items(), ends, strict=True)}


def _by_projection(adapter):
    """{projection: its adapted modules}."""
    found = {}
    for module, (projection, _) in adapter.modules.items():
        found.setdefault(projection, []).append(module)
    return found


def _shapes(adapter, inputs, model):
    """{PEFT's name: shape} of all that is trained. The A of one projection stand side by side."""
    shapes, r = {}, adapter.rank
    for projection, modules in _by_projection(adapter).items():
        shapes |= {PREFIX + module + _A: (r, inputs[projection]) for module in modules}
        for module in modules:
            columns = adapter.modules[module][1]
            shapes[PREFIX + module + _B] = (columns.stop - columns.start, r)
    return shapes | ({PREFIX + HEAD: model.used[HEAD].shape} if HEAD in model.used else {})


def _used(adapter, inputs, model):
    """What an adapted model computes with: the frozen Tensors, each projection's A as one, each module's B."""
    used = dict(adapter.frozen)
    for projection, modules in _by_projection(adapter).items():
        shape = len(modules) * adapter.rank, inputs[projection]
        used[f"{projection}.lora_A"] = model.view(PREFIX + modules[0] + _A, shape)
        used |= {f"{module}.lora_B": model.parameters[PREFIX + module + _B] for module in modules}
    if HEAD in used:
        used[HEAD] = model.parameters[PREFIX + HEAD]
    return used


def _instead(adapter, model):
    """{projection: Projection} for those that are adapted or quantised."""
    found, modules, depth = {}, _by_projection(adapter), model.block_prefix.count(".")
    within = lambda name: name.split(".", depth)[-1]
    for name in model.projections(model.config):
        if name in modules or name in adapter.quantised:
            own = tuple((within(module), adapter.modules[module][1]) for module in modules.get(name, ()))
            weight = adapter.quantised.get(name)
            found[name] = Projection(within(name), weight, model.transposed, own, adapter.scale)
    return found


def switched_off(model):
    """The model without its adapter, as a Model that shares every array with it: the reference of DPO and PPO. It has
    no parameters; a model without an adapter is returned itself. A value and not a mode: nothing has to be switched
    back."""
    if model.adapter is None:
        return model
    bare = model.adapter._replace(modules={})
    plain = model.variant({}, lambda _: dict(bare.frozen), _instead(bare, model))
    plain.adapter = None
    return plain


def merge(model):
    """A plain model that computes the same, to rounding: W + s B A, and the trained head. Of a quantised matrix, W is
    what its four bits say, because that is what the adapter was trained with."""
    adapter = model.adapter
    if adapter is None:
        raise ValueError("the model has no adapter")
    plain = build(model.config, None, model.flat.dtype).to(model.device, model.activations)
    for name, tensor in adapter.frozen.items():
        plain.used[name].data[...] = tensor.data
    for name, matrix in adapter.quantised.items():
        dense = matrix.dense()
        plain.used[f"{name}.weight"].data[...] = dense.T if model.transposed else dense
    for module in adapter.modules:
        A, B = (model.parameters[PREFIX + module + kind].data.astype(np.float64) for kind in (_A, _B))
        update, w = adapter.scale * (B @ A), plain.parameters[f"{module}.weight"].data
        w[...] = w + (update.T if model.transposed else update)
    if HEAD in model.used:
        plain.parameters[HEAD].data[...] = model.used[HEAD].data
    return plain


def memory(model, optimizer=None):
    """Bytes that training holds beside activations: {"frozen", "trained", "gradients", "moments", "total"}."""
    found = {"frozen": 0, "trained": model.flat.nbytes, "gradients": model.flat_grad.nbytes, "moments": 0}
    if model.adapter is not None:
        arrays = [tensor.data for tensor in model.adapter.frozen.values()]
        found["frozen"] = sum(array.nbytes for array in [*arrays, *model.adapter.quantised.values()])
    if optimizer is not None:
        found["moments"] = optimizer.m.nbytes + optimizer.v.nbytes
    return found | {"total": sum(found.values())}


# ------------------------------------------------------------------ PEFT's files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What would make the same numbers mean something else, and what has to stand there for them to mean what they do here.
MEANINGS = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, "gaussian", None),
}


def save_adapter(model, folder, base=""):
    """Write the adapter as PEFT does: adapter_config.json and adapter_model.safetensors. Returns the folder.

    base: the folder of the model that it belongs to, for whoever loads it.
    """
    adapter, scalar = model.adapter, HEAD in model.used
    if adapter is None:
        raise ValueError("the model has no adapter to save")
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "target_modules": list(adapter.targets),
        "fan_in_fan_out": model.transposed,
        "bias": "none",
        "modules_to_save": [HEAD.removesuffix(".weight")] if scalar else None,
        "init_lora_weights": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    arrays = {name: np.ascontiguousarray(to_host(p.data)) for name, p in model.parameters.items()}
    save_arrays(arrays, folder / WEIGHTS, {"format": "pt"})
    return folder


def load_adapter(model, folder, quantize="none"):
    """A plain model with the adapter of a folder that PEFT or save_adapter wrote. ValueError names what does not fit: a
    tensor's name or shape, or a kind of adapter that this file does not know."""
    folder = Path(folder)
    values, path = _read_config(folder / CONFIG), folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{folder} has no {WEIGHTS} (pickled weights are not read: they can run code)")
    stored = read_header(path)
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {tensor.dtype}, and only {', '.join(DTYPES)} are read")
    try:
        adapted = adapt(
            model,
            rank=values["r"],
            alpha=values["lora_alpha"],
            targets=values["target_modules"],
            rslora=bool(values.get("use_rslora")),
            quantize=quantize,
        )
        adapted.load_state_dict({name: tensor.map() for name, tensor in stored.items()})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return adapted


def _read_config(path):
    """The dict of an adapter_config.json whose adapter means what it does in this file."""
    if not path.exists():
        raise ValueError(f"{path.parent} is no adapter's folder: it has no {CONFIG}")
    values = read_object(path)
    for name, kind in (("peft_type", str), ("r", int), ("lora_alpha", int | float), ("target_modules", list | str)):
        if not isinstance(values.get(name), kind):
            raise ValueError(f"{path}: {name} is {values.get(name)!r}, and no adapter can be made of that")
    for name, known in MEANINGS.items():
        if name in values and values[name] not in known:
            raise ValueError(f"{path}: {name} {values[name]!r} is not supported")
    return values
