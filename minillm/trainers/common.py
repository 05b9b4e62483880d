"""
What the trainers share: settings, model folders, adapters, rows, and losses over a model.

An update is of `batch_size` rows. They are computed in parts of `micro_batch_size`, and each part's loss is divided by
the count of the *whole* batch, so that the gradient is the same however it is cut (a mean of means would weigh a token
by how few neighbours its part has).
"""

import dataclasses
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np

from .. import autograd as ag
from .. import functional as F
from .. import lora
from ..autograd import no_grad
from ..chat import TEMPLATES, load_template, noted_template
from ..checkpoint import NotFinite, write_json
from ..data.conversations import rendered
from ..data.pack import Batch, best_fit_rows
from ..files import read_object
from ..hub import check_vocabulary, load_pretrained, read_config, save_pretrained
from ..kernels.device import beside, check_device, number, to_host, upcast
from ..losses import masked_mean
from ..model import build
from ..optim import AdamW, cosine_schedule, linear_schedule, one_rate
from ..parallel import in_shares
from ..tokenizer import Tokenizer

IGNORED = -100  # a target that is not in the loss


@dataclass(kw_only=True)
class RunSettings:
    """What every run can be told. Whether it trains a model or samples from it."""

    out: Path
    """the folder to make"""
    overwrite: bool = False
    """replace the folder if it is there"""
    seed: int = 0
    """the random numbers of weights, data order and sampling; they are the same on every device"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: the GPU, by CuPy"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of activations and products; weights, gradients, moments, norms and losses are float32 with either. bfloat16 is
    for GPUs, whose tensor cores it is made for"""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self.of_type(field.name, field.type)
        self.at_least("seed", 0)

    def refuse(self, name, must):
        raise ValueError(f"--{name.replace('_', '-')} has to be {must}, and is {getattr(self, name)}")

    def of_type(self, name, kind):
        """Whole numbers are int, other numbers are finite, a choice is one of those there are, and so on."""
        value = getattr(self, name)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if kind is int and not whole:
            self.refuse(name, "a whole number")
        if kind is float and not (whole or (isinstance(value, float | np.floating) and math.isfinite(value))):
            self.refuse(name, "a finite number")
        if get_origin(kind) is Literal and value not in get_args(kind):
            self.refuse(name, f"one of {', '.join(get_args(kind))}")
        for plain, told in ((bool, "True or False"), (str, "a text"), (Path, "a path")):
            if kind in (plain, plain | None) and not isinstance(value, kind):
                self.refuse(name, told)

    def at_least(self, name, least):
        if not getattr(self, name) >= least:
            self.refuse(name, f"at least {least}")

    def above(self, name, bound):
        if not bound < getattr(self, name):
            self.refuse(name, f"above {bound}")

    def between(self, name, low, high, open_end=False):
        value = getattr(self, name)
        if not (low <= value <= high) or (open_end and value == high):
            self.refuse(name, f"from {low} to {high}" if not open_end else f"at least {low} and below {high}")

    def load(self, folder, head, seed=None):
        """load_with_head, where and as precise as these settings have it."""
        return self.placed(load_with_head(folder, head, seed, self.device))

    def placed(self, model):
        """The model on the device, with activations of the precision."""
        return model.to(self.device, self.precision)


@dataclass(kw_only=True)
class Settings(RunSettings):
    """What every trainer can be told. A trainer's own config adds to it and says why its defaults differ."""

    out: Path
    """the folder to make: the model, metrics.jsonl, samples.jsonl, settings.json"""

    batch_size: int = 32
    """rows in an update"""
    micro_batch_size: int = 0
    """rows computed at once; 0: all of them. Smaller takes less memory and gives the same gradient"""
    workers: int = 1
    """threads that share an update's rows, each on one core; 1: all cores in each kernel, which small models are too
    small for. From 2 on, a number gives the same model whatever the machine's number of cores"""
    lr: float = 1e-3
    """the peak learning rate"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls after the warm-up"""
    warmup: float = 0.02
    """the share of the updates in which the learning rate rises"""
    lr_floor: float = 0.1
    """the last learning rate, as a share of the peak"""
    weight_decay: float = 0.0
    """pulls matrices toward zero"""
    beta1: float = 0.9
    """Adam: memory of the gradient"""
    beta2: float = 0.95
    """Adam: memory of its square; 0.95 forgets a bad batch sooner than 0.999"""
    eps: float = 1e-8
    """Adam: added to the root of the square"""
    max_grad_norm: float = 1.0
    """a gradient that is longer is scaled down to this length"""
    on_nan: Literal["stop", "skip"] = "stop"
    """what to do where a gradient is not finite: stop, or leave that update out and count it"""

    log_every: int = 10
    """updates between rows of metrics.jsonl"""
    eval_every: int = 100
    """updates between evaluations; there is one before the first update and one after the last, too"""
    samples: int = 4
    """completions shown at each evaluation"""
    tensorboard: bool = False
    """write TensorBoard event files, too"""

    resume: bool = False
    """go on with the run in --out behind its newest checkpoint, as if it had not been stopped, on another device, too;
    the options that are not given are then those of that run"""
    save_every: int = 0
    """updates between checkpoints; 0: by time alone"""
    save_minutes: float = 5.0
    """minutes between checkpoints; 0: by updates alone. With either of the two there is one at the end, too"""
    keep_last: int = 2
    """how many checkpoints are kept; older ones are removed"""
    keep_best: bool = False
    """keep the checkpoint of the best evaluation, too, and write its model at the end"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "workers", "log_every", "eval_every", "keep_last"):
            self.at_least(name, 1)
        for name in ("micro_batch_size", "samples", "weight_decay", "save_every", "save_minutes"):
            self.at_least(name, 0)
        for name in ("lr", "eps", "max_grad_norm"):
            self.above(name, 0)
        for name in ("warmup", "lr_floor"):
            self.between(name, 0, 1)
        for name in ("beta1", "beta2"):
            self.between(name, 0, 1, open_end=True)
        if self.workers > 1 and self.device == "cuda":
            self.refuse("workers", "1 with --device cuda: they are for the processor's cores")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with what --overwrite would remove: only one of them can be meant")

    def optimizer(self, parameters, rates=one_rate):
        """An AdamW with these settings; rates: what lr is multiplied by for some parameters."""
        return AdamW(parameters, self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay, rates=rates)

    def learning_rate(self, step, steps):
        """The learning rate of update `step`, counted from 0."""
        warmup = math.ceil(self.warmup * steps)
        if self.schedule == "constant":
            return self.lr * min(1.0, (step + 1) / max(1, warmup))
        schedule = cosine_schedule if self.schedule == "cosine" else linear_schedule
        return schedule(step, steps, self.lr, warmup, self.lr_floor)


@dataclass(kw_only=True)
class PackedSettings(Settings):
    """Rows of one length. What trainers can be told whose updates are all of one shape: pretraining and SFT."""

    cuda_graph: bool = False
    """on a GPU, record an update once and launch it as one: for models so small that Python is slower than the GPU"""

    def __post_init__(self):
        super().__post_init__()
        if self.cuda_graph and self.device != "cuda":
            self.refuse("cuda_graph", "False without --device cuda")


@dataclass(kw_only=True)
class LoraSettings(Settings):
    """Adapters. Train a few numbers beside a frozen model (lora.py)."""

    lora_rank: int = 0
    """train low-rank adapters of this rank, and freeze the model; 0: train the model itself"""
    lora_alpha: float = 16.0
    """what an adapter adds is multiplied by this and divided by the rank"""
    lora_targets: tuple[str, ...] = ()
    """the projections that get one, such as q_proj v_proj; none: all of them, which QLoRA found to matter most"""
    quantize: Literal["none", "nf4"] = "none"
    """hold the frozen model's matrices in four bits (QLoRA)"""

    def __post_init__(self):
        super().__post_init__()
        self.at_least("lora_rank", 0)
        self.above("lora_alpha", 0)
        if self.quantize != "none" and not self.lora_rank:
            self.refuse("quantize", "none without --lora-rank: four bits can not be trained")
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) != getattr(LoraSettings, name) and not self.lora_rank:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} needs --lora-rank: without it the model itself is trained, and no adapter")


@dataclass(kw_only=True)
class ChatSettings(RunSettings):
    """Conversations. What all can be told that reads or writes them."""

    model: Path
    """the model folder to start from: pretrained for SFT, the SFT model for all that follows"""
    template: str = ""
    """chatml, llama2, llama3, alpaca, or a Jinja file; none: the model folder's own, else chatml"""
    skip_bad: int = 0
    """how many malformed lines may be skipped"""

    def __post_init__(self):
        super().__post_init__()
        self.at_least("skip_bad", 0)


@dataclass(kw_only=True)
class TuningSettings(ChatSettings, Settings):
    """Examples. What trainers on files of answers can be told: SFT, reward model, DPO."""

    data: tuple[Path, ...]
    """JSON lines: {"messages": [...]} for SFT; {"prompt", "chosen", "rejected"} or {"prompt", "ranked": [best, ...]}. A
    file that is given several times counts as often in training, and once in the held-out part"""
    length: int = 0
    """tokens of the longest example; 0: the model's context. Longer ones are left out and counted"""
    epochs: float = 1.0
    """passes over the examples"""
    held_out: float = 0.1
    """share of the prompts kept for evaluation; all rows of a prompt stay on one side"""

    def __post_init__(self):
        super().__post_init__()
        self.at_least("length", 0)
        self.above("epochs", 0)
        self.between("held_out", 0, 1, open_end=True)
        if not self.data:
            raise ValueError("--data needs at least one file")

    def load(self, folder, head, seed=None):
        """As that of all runs. ValueError: --length is more than this model reads."""
        model = super().load(folder, head, seed)
        context = model.config.max_position_embeddings
        if self.length > context:
            self.refuse("length", f"at most the context of {folder}, {context}")
        return model


@dataclass(kw_only=True)
class QuestionSettings(ChatSettings, Settings):
    """Questions. What trainers can be told that write models which answer."""

    questions: Path | None = None
    """questions with known answers, answered at each evaluation: dev.jsonl of scripts/atlas.py"""
    eval_questions: int = 256
    """how many of them, spread over the file; 0: all"""

    def __post_init__(self):
        super().__post_init__()
        self.at_least("eval_questions", 0)


# ------------------------------------------------------------------ model folders


def load_tokenizer(folder):
    """The tokenizer of a model folder, or of prepared data. ValueError where a trainer could not use it: there is none,
    it has no end of text, or it has tokens that the model beside it does not know."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file, and has to be a folder" if folder.exists() else f"{folder}: no such folder"
        )
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json: it is neither a model's folder nor prepared data")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: the tokenizer: {error}") from None
    if tokenizer.eos_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-text token, so no answer could end")
    if (folder / "config.json").exists():
        check_vocabulary(tokenizer.vocab_size, read_config(folder).vocab_size, folder)
    return tokenizer


def same_tokenizer(folder, tokenizer, other):
    """ValueError where the tokenizer of `folder` gives ids another meaning than `tokenizer`, that of `other`. Equal
    sizes say little: a model would read another's ids without an error, as noise."""
    theirs = load_tokenizer(folder)
    if (theirs.special_tokens, spellings(theirs)) != (tokenizer.special_tokens, spellings(tokenizer)):
        raise ValueError(f"{folder} and {other} have different tokenizers: an id does not mean the same in both")


def load_judge(config, tokenizer, template, vocab_size):
    """The reward model of --reward for the answers of --model. ValueError where it would read them otherwise than those
    it was trained on: with another tokenizer or chat template, or as ids that it does not have."""
    model = config.load(config.reward, "scalar")
    same_tokenizer(config.reward, tokenizer, config.model)
    if model.config.vocab_size != vocab_size:
        raise ValueError(f"{config.reward} has {model.config.vocab_size} tokens, and {config.model} has {vocab_size}")
    theirs = template_of(config.reward) if has_template(config.reward) else template
    if theirs != template and not _read_alike(theirs, template, tokenizer):
        name = lambda given: given if given in TEMPLATES else "a Jinja template"
        raise ValueError(
            f"{config.reward} was trained on conversations in {name(theirs)}, and {config.model} writes them in "
            f"{name(template)}: its scores would mean nothing; train it with --template as for {config.model}"
        )
    return model


def _read_alike(one, other, tokenizer):
    """Whether two templates make the same ids of a conversation."""
    turns = [("user", "Who?"), ("assistant", "I."), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        found = [rendered(messages, template, tokenizer)[0] for template in (one, other)]
    except ValueError:  # one of them has no place for this, or needs tokens that are not there
        return False
    return np.array_equal(*found)


def spellings(tokenizer):
    """The bytes of each id, in a list; b"" for an id that a vocabulary with gaps does not have."""
    found = []
    for i in range(tokenizer.vocab_size):
        try:
            found.append(tokenizer.token_bytes(i))
        except ValueError:
            found.append(b"")
    return found


def padding_of(tokenizer):
    """The id to fill rows with. Nothing reads it, so any id would do where a tokenizer has none for padding."""
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def template_of(folder, given=""):
    """The chat template to use: the one that is given, else the folder's own (which a trainer noted in minillm.json, or
    the checkpoint's), else chatml. ValueError: a name of no template and no file, a file that can not be read."""
    if given in TEMPLATES:
        return given
    if given and not Path(given).exists():
        near = get_close_matches(given, TEMPLATES, 1)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        raise ValueError(f"--template {given!r} is none of {', '.join(TEMPLATES)}, and no file{hint}")
    if given:
        return _read_template(given)
    if not has_template(folder):
        return "chatml"
    return noted_template(folder) or _read_template(folder)


def has_template(folder):
    """Whether a model folder says how conversations are written for it."""
    theirs = (Path(folder) / "chat_template.jinja").exists() or _tokenizer_config(folder).get("chat_template")
    return bool(noted_template(folder) or theirs)


def _tokenizer_config(folder):
    path = Path(folder) / "tokenizer_config.json"
    return read_object(path) if path.exists() else {}


def _read_template(path):
    try:
        return load_template(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def save_model(folder, model, tokenizer, template=None):
    """Write a folder that every trainer and script here, and transformers, can start from. minillm.json notes the
    template, so that a trainer gets the built-in one back, not the Jinja source that is its equivalent. NotFinite: a
    weight is nan or infinite; then nothing is written."""
    if not all(np.isfinite(to_host(p.data)).all() for p in model.parameters.values()):
        raise NotFinite(f"the model has weights that are not finite: it is not written to {folder}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "minillm.json", {"template": template})  # first: only config.json makes it a model folder
    save_pretrained(model, folder, tokenizer, template, dtype=model.flat.dtype)


def with_head(model, head, seed=0):
    """A copy of `model` with the head "lm" or "scalar". What both have is equal; a new head is drawn from the seed."""
    config = dataclasses.replace(model.config, head=head)
    copy = build(config, seed, model.flat.dtype).to(model.device, model.activations)
    for name, p in copy.parameters.items():
        if name in model.parameters:
            p.data[...] = model.parameters[name].data
    return copy


def load_with_head(folder, head, seed=None, device="cpu", precision="float32"):
    """The model of a folder on a device, its weights in this precision, which has to have this head; with a seed,
    another one is replaced by one drawn from it. Errors of the device as in kernels.device.check_device, before
    anything is read.

    A new head knows nothing: that is how a reward model starts, and an accident everywhere else.
    """
    check_device(device)
    model = load_pretrained(folder, np.dtype(precision)).to(device)
    if model.config.head == head:
        return model
    if seed is None:
        names = {"lm": "a language model", "scalar": "a reward model"}
        hint = "; scripts/reward.py makes one of it" if head == "scalar" else ""
        raise ValueError(f"{folder} is {names[model.config.head]}, and {names[head]} is needed{hint}")
    return with_head(model, head, seed)


# ------------------------------------------------------------------ adapters


def trainable(model, settings):
    """What is trained of a model: with --lora-rank one with an adapter and frozen weights, else the model itself."""
    if not settings.lora_rank:
        return model
    adapted = lora.adapt(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets or lora.ALL_LINEAR,
        quantize=settings.quantize,
        seed=settings.seed,
    )
    frozen = lora.memory(adapted)["frozen"]
    print(f"{adapted.flat.size:,} numbers of adapters are trained, beside {frozen / 1e6:,.1f} MB of frozen weights")
    return adapted


def save_trained(settings, model, tokenizer, template=None):
    """Write the folder of what was trained. An adapter is merged, so that the folder is a model's like any other, and
    is in adapter/, too, in PEFT's files. Returns the model that was written."""
    plain = model if model.adapter is None else lora.merge(model)
    save_model(settings.out, plain, tokenizer, template)
    if model.adapter is not None:
        lora.save_adapter(model, settings.out / "adapter", settings.model)
    print(f"written to {settings.out}")
    return plain


def dress(model, tokenizer, template=None):
    """function(folder) that makes a model folder of a checkpoint (see Run); None for an adapter, which is none."""
    return None if model.adapter is not None else lambda folder: save_model(folder, model, tokenizer, template)


# ------------------------------------------------------------------ rows


def read_files(paths, read, bad=None):
    """Every item of read(path, bad) for several files, in a list. ValueError: a path that is no file."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
    return [item for path in paths for item in read(path, bad)]


def hold_out(items, share, seed, key=lambda item: item.where):
    """(kept, held out): about 1 - share and share of the items, in their old order; one key is on one side. Of few
    items, at least one key's are kept. An item that is there twice, as its file was given twice, is held out once."""
    keys = sorted({key(item) for item in items})
    count = min(round(share * len(keys)), max(len(keys) - 1, 0))
    chosen = np.random.default_rng((seed, 1)).permutation(len(keys))[:count]
    chosen = {keys[i] for i in chosen.tolist()}
    held = {item.where: item for item in items if key(item) in chosen}
    return [item for item in items if key(item) not in chosen], list(held.values())


def longest_first(examples):
    """Rankings in the order of their longest answers."""
    return sorted(examples, key=lambda e: -max(len(ids) for ids, _ in e.answers))


def by_length(examples, size):
    """Rankings in parts of at most `size`, longest first, so that a part's rows need little padding. A part's loss is
    divided by the count of the whole update, so how it is cut does not matter."""
    examples = longest_first(examples)
    size = size or max(1, len(examples))
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


def parts(batch, size):
    """A batch (a NamedTuple of arrays with one row each) in parts of at most `size` rows; size 0 is one part."""
    rows = len(batch[0])
    size = size or rows
    for first in range(0, rows, size):
        yield type(batch)(*(array[first : first + size] for array in batch))


def pad(sequences, masks, pad_id, width=None):
    """Sequences of ids and their masks, each in a row of its own, as a Batch that is as wide as the longest.

    sequences  lists of (n,) int, masks of (n,) bool: which tokens are trained. Padding follows, and is never read.
    """
    width = max(len(ids) for ids in sequences) if width is None else width
    tokens = np.full((len(sequences), width), pad_id, np.int32)
    trained = np.zeros((len(sequences), width), bool)
    start = np.tile(np.arange(width - 1, dtype=np.int32), (len(sequences), 1))
    for row, (ids, mask) in enumerate(zip(sequences, masks, strict=True)):
        tokens[row, : len(ids)], trained[row, 1 : len(ids)] = ids, mask[1:]
        start[row, : len(ids)] = 0
    return Batch(tokens, start, trained[:, 1:])


# ------------------------------------------------------------------ losses and log-probabilities over a model


def next_token_loss(model, batch, count):
    """-sum of log p(target) over the batch's mask, divided by `count`: a scalar Tensor. Pretraining and SFT."""
    return weighted_loss(model, batch.x, batch.start, *targets_and_weights(model, batch, count))


def targets_and_weights(model, batch, count):
    """(targets, weights) (B, T) of next_token_loss: what is ignored costs no logits, all else weighs 1 / count."""
    targets = np.where(batch.mask, batch.y, IGNORED)
    return targets, np.full(targets.shape, 1 / count, upcast(model.flat[:0]).dtype)


def weighted_loss(model, tokens, start, targets, weights):
    """The loss of arrays (B, T) on the host, or all on the GPU, unlooked at: see `Model.hidden`."""
    return F.linear_cross_entropy(model.hidden(tokens, start), model.head, targets, weights=weights)


def next_token_backward(model, batch, size, workers=1):
    """Backward of an update's next_token_loss, shared among `workers`, in parts of `size` rows; the loss, a float, or
    on a GPU an array (). A part without a target adds nothing, and a whole batch without one has loss 0 and
    gradient 0."""
    count = int(batch.mask.sum())

    def backward(model, share):
        total = 0.0
        for part in parts(share, size):
            if part.mask.any():
                loss = next_token_loss(model, part, count)
                loss.backward()
                total += number(loss.data)
        return total

    return sum(in_shares(model, backward, batch, workers))


def token_logprobs(model, batch, temperature=1.0, entropy=False):
    """log p(target) (B, T) as a Tensor, 0 where the mask is 0; with entropy=True (logprobs, entropies)."""
    targets = np.where(batch.mask, batch.y, IGNORED)
    hidden = model.hidden(batch.x, batch.start)
    return F.linear_token_logprobs(hidden, model.head, targets, temperature=temperature, entropy=entropy)


def frozen_logprobs(model, batch, temperature=1.0, rows=64):
    """token_logprobs as an array, without a graph, `rows` at a time."""
    with no_grad():
        return np.concatenate([to_host(token_logprobs(model, part, temperature).data) for part in parts(batch, rows)])


def side_by_side(sequences, pad_id):
    """Sequences next to each other in rows as long as the longest: hardly any padding, whatever their lengths.

    Returns tokens (R, W) and start (R, W), int32, and where each sequence begins: row (B,) and column (B,), int.
    """
    sizes = np.array([len(ids) for ids in sequences])
    width = int(sizes.max())
    row = best_fit_rows(sizes, width)
    tokens = np.full((int(row.max()) + 1, width), pad_id, np.int32)
    start = np.tile(np.arange(width, dtype=np.int32), (len(tokens), 1))
    column, taken = np.zeros(len(sizes), int), np.zeros(len(tokens), int)
    for n, (ids, r) in enumerate(zip(sequences, row, strict=True)):
        column[n] = begin = taken[r]
        tokens[r, begin : begin + len(ids)], start[r, begin : begin + len(ids)] = ids, begin
        taken[r] += len(ids)
    return tokens, start, row, column


def scores(model, answers, pad_id):
    """r (B,), a Tensor, of answers (ids, mask): the scalar head's output at the last token of ids, or with the pooling
    "mean" its mean over the tokens in mask. Lengths and masks say where these are; no id is searched for, so it does
    not matter what padding is or what stands inside a text."""
    sequences, masks = zip(*answers, strict=True)
    tokens, start, row, column = side_by_side(sequences, pad_id)
    hidden = model.hidden(tokens, start)
    if model.config.pooling == "last":
        last = column + np.array([len(ids) - 1 for ids in sequences])
        return scalar_head(model, hidden[row, last]).reshape(len(last))
    index, there = masked_places(column, masks)
    each = scalar_head(model, hidden).reshape(tokens.shape)[row[:, None], index]
    return masked_mean(each, beside(there, each.data), axis=1)


def masked_places(column, masks):
    """Where the tokens in each mask are in the rows of side_by_side: (index, there), int and bool (B, L), the first
    ones first, and index 0 where there is none."""
    places = [begin + np.flatnonzero(mask) for begin, mask in zip(column, masks, strict=True)]
    there = np.arange(max(map(len, places))) < np.array([[len(at)] for at in places])
    index = np.zeros(there.shape, int)
    index[there] = np.concatenate(places)
    return index, there


def scalar_head(model, hidden):
    """The scalar head's output (..., 1) for hidden states (..., D): in float32 at least, because with the 8 bits of a
    bfloat16, scores would tie where answers differ."""
    wide = upcast(hidden.data[:0]).dtype
    return F.linear(hidden if hidden.dtype == wide else ag.cast(hidden, dtype=wide), model.head)


def trained_logprobs(model, answers, pad_id, temperature=1.0):
    """(logp, mask), a Tensor and bools (B, L), of answers (ids, mask): the log-probabilities of each one's tokens in
    its mask, the first ones first and 0 behind them."""
    sequences, masks = zip(*answers, strict=True)
    tokens, start, row, column = side_by_side(sequences, pad_id)
    index, there = masked_places(column, [mask[1:] for mask in masks])  # of the targets' logits
    trained = np.zeros(start[:, 1:].shape, bool)
    trained[np.broadcast_to(row[:, None], there.shape)[there], index[there]] = True
    logp = token_logprobs(model, Batch(tokens, start[:, :-1], trained), temperature)
    return ag.where(logp[row[:, None], index], 0.0, condition=there), there
