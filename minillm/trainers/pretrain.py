"""
Pretraining: minimise  L = -(1 / N) sum over rows and tokens of m_t log p(x_{t+1} | x_start..x_t)

N is the number of targets of the whole update. A token sees its own document alone; the first token of a document is no
target, for nothing announces it. No other token is masked, and no document is repeated on purpose.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..data.datasets import MANIFEST, Batches, Mixture, Windows, load_tokens
from ..files import read_object
from ..generate import generate
from ..model import Config, build
from .common import (
    PackedSettings,
    dress,
    load_tokenizer,
    parts,
    same_tokenizer,
    save_trained,
)
from .evaluation import byte_lengths, evaluate_tokens
from .recorded import updates_of
from .run import Run, claim, identity_of, in_its_folder

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "context")  # fmt: skip


@dataclass(kw_only=True)
class PretrainConfig(PackedSettings):
    """Pretraining. The defaults suit a model of about a million parameters and some million tokens."""

    data: Path
    """a folder made by scripts/prepare.py"""
    model: Path | None = None
    """a model folder to go on from; none: a new model of the sizes below"""
    hidden_size: int = 128
    """width of a new model"""
    num_hidden_layers: int = 4
    """blocks of a new model"""
    num_attention_heads: int = 4
    """heads of a new model"""
    num_key_value_heads: int = 0
    """key-value heads, shared among the heads; 0: one for each"""
    intermediate_size: int = 0
    """width of the feed-forward; 0: 8/3 of hidden_size, up to a multiple of 32"""
    context: int = 0
    """the longest text of a new model, in tokens; 0: four times the rows' length"""
    length: int = 128
    """tokens in a row"""
    packing: Literal["best_fit", "greedy"] = "best_fit"
    """best_fit keeps documents whole and pads rows; greedy cuts documents and pads nothing"""
    tokens: int = 4_500_000
    """how much to train on: the number of updates is this by batch_size times length, padding included"""
    weights: dict[str, float] | None = None
    """share of each source: NAME NUMBER ...; none: the manifest's, else in proportion to its tokens"""

    lr: float = 4e-3
    """the peak learning rate: small models take large ones, and 1e-3 suits 10M parameters"""
    weight_decay: float = 0.1
    """pulls matrices toward zero; the usual value of pretraining"""
    eval_rows: int = 256
    """rows of held-out text in an evaluation, of each source"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "tokens", "eval_rows"):
            self.at_least(name, 1)
        self.at_least("length", 2)
        for name in ("num_key_value_heads", "intermediate_size", "context"):
            self.at_least(name, 0)
        if self.context and self.context < self.length:
            self.refuse("context", f"at least the rows' length {self.length}")
        if self.weights is not None and not (self.weights and all(w > 0 for w in self.weights.values())):
            self.refuse("weights", "above 0")
        new = {field.name: field.default for field in dataclasses.fields(self)}
        for name in SIZES if self.model else ():
            if getattr(self, name) != new[name]:
                self.refuse(name, "left out with --model, which brings its own sizes")


def new_model(config, vocab_size):
    """A model of the sizes in `config`, its weights drawn from the seed. ValueError: sizes that do not go together."""
    try:
        sizes = Config(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size or None,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads or None,
            max_position_embeddings=config.context or 4 * config.length,
        )
    except ValueError as error:  # the Config's fields have the options' names
        option = lambda match: f"--{match[1].replace('_', '-')}"
        raise ValueError(re.sub(r"Config\.(\w+)", option, str(error))) from None
    return build(sizes, config.seed)


def weights_of(config, windows):
    """{source: its share of the rows}: those that are given, else the manifest's, else in proportion to tokens."""
    noted = read_object(config.data / MANIFEST).get("weights") or {}
    noted = {name: weight for name, weight in noted.items() if name in windows}  # all of a source may be held out
    if config.weights and config.weights.keys() != windows.keys():
        raise ValueError(f"--weights is for {', '.join(config.weights)}, and the sources are {', '.join(windows)}")
    return config.weights or noted or {name: int(w.documents.offsets[-1]) for name, w in windows.items()}


@in_its_folder
def train(config):
    """Train, and write the model folder; returns (model, tokenizer)."""
    tokenizer = load_tokenizer(config.data)
    if config.model:
        same_tokenizer(config.model, tokenizer, config.data)
    model = config.load(config.model, "lm") if config.model else config.placed(new_model(config, tokenizer.vocab_size))
    if config.length > model.config.max_position_embeddings:
        config.refuse("length", f"at most the context of {config.model}, {model.config.max_position_embeddings}")
    files = load_tokens(config.data, "train")
    if not files:
        raise ValueError(f"{config.data} has no text to train on: all of it is held out")
    windows = {name: Windows(file, config.length, config.packing) for name, file in files.items()}
    batches = Batches(Mixture(windows, weights_of(config, windows)), config.batch_size, config.seed)
    tests = [Windows(file, config.length) for file in load_tokens(config.data, "validation").values()]
    # Spread over all rows: the first ones hold the longest documents.
    spread = [np.linspace(0, len(rows) - 1, min(config.eval_rows, len(rows))).astype(int) for rows in tests]
    held_out = [rows.rows(some) for rows, some in zip(tests, spread, strict=True)]
    claim(config)
    if not held_out:
        print("no text is held out, and so nothing is evaluated: prepare.py --validation says how much is")
    optimizer = config.optimizer(model.parameters)
    update = updates_of(config, model, optimizer)
    steps = math.ceil(config.tokens / (config.batch_size * config.length))
    lengths = byte_lengths(tokenizer)

    def evaluate():
        return evaluate_tokens(model, (part for rows in held_out for part in parts(rows, config.batch_size)), lengths)

    def sample():
        begin = [[tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id]] * config.samples
        room = min(64, model.config.max_position_embeddings - 1)
        stop = [tokenizer.eos_id]
        texts = generate(model, begin, max_new_tokens=room, temperature=0.8, stop_tokens=stop, seed=config.seed)
        return [("", tokenizer.decode(text.ids, skip_special=True)) for text in texts]

    holds = {"model": model, "optimizer": optimizer, "batches": batches}
    identity = identity_of(config, model, config.data)
    with Run(config, steps, holds, identity, dress(model, tokenizer), ("eval_bits_per_byte", -1)) as run:
        for _ in run.steps(evaluate, sample):
            batch = next(batches)
            if not batch.mask.any():
                continue  # nothing to learn from: an update would only apply the weight decay
            update(run, batch)
        run.load_best()
    return save_trained(config, model, tokenizer), tokenizer
