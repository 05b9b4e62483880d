"""
Supervised fine-tuning: minimise  L = -(1 / N) sum over conversations and tokens of m_t log p(x_{t+1} | x_1..x_t)

The mask m is 1 on what the assistant writes and on the token that ends its turn, and 0 on everything else: system,
user, role marks, padding. N counts the mask of the whole update. Masks come from the template's segments, never from
searching the text. Optionally a share of the rows is pretraining text, so that knowledge which no conversation asks for
is not forgotten.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..chat import stop_ids
from ..data.conversations import encode_conversations, encode_prompts, opening_of, read_conversations
from ..data.datasets import Batches, Mixture, Windows, load_tokens
from ..data.readers import Bad
from .common import (
    LoraSettings,
    PackedSettings,
    QuestionSettings,
    TuningSettings,
    dress,
    hold_out,
    load_tokenizer,
    parts,
    read_files,
    same_tokenizer,
    save_trained,
    template_of,
    trainable,
)
from .evaluation import complete, evaluate_tokens, examiner
from .recorded import updates_of
from .run import Run, claim, identity_of, in_its_folder


@dataclass(kw_only=True)
class SFTConfig(QuestionSettings, TuningSettings, LoraSettings, PackedSettings):
    """Supervised fine-tuning."""

    packing: Literal["best_fit", "pad"] = "best_fit"
    """best_fit packs conversations into rows, blind to each other; pad gives each a row"""
    epochs: float = 3.0
    """passes over the conversations; InstructGPT took 16 and found most of it by the first few"""
    replay: Path | None = None
    """a folder of scripts/prepare.py whose text is mixed in, against forgetting"""
    replay_share: float = 0.25
    """share of the rows that are such text"""
    keep_best: bool = True
    """with --questions, write the model of the evaluation that got most of them right, the latest of equals: knowledge
    that no conversation asks for comes first and goes again. Its checkpoint is kept"""
    held_out: float = 0.05
    """share of the conversations kept for evaluation"""
    max_new_tokens: int = 64
    """length of the completions that are shown"""

    lr: float = 5e-4
    """a tenth of pretraining's peak: enough to learn the form, little enough to keep the knowledge"""
    warmup: float = 0.03
    """the share of the updates in which the learning rate rises"""

    def __post_init__(self):
        super().__post_init__()
        self.at_least("max_new_tokens", 1)
        self.between("replay_share", 0, 1, open_end=True)


@in_its_folder
def train(config):
    """Train, and write the model folder; returns (model, tokenizer)."""
    tokenizer, template = load_tokenizer(config.model), template_of(config.model, config.template)
    model = trainable(config.load(config.model, "lm"), config)
    if config.replay:
        same_tokenizer(config.replay, tokenizer, config.model)
    length = config.length or model.config.max_position_embeddings
    conversations = read_files(config.data, read_conversations, Bad(config.skip_bad))
    kept, held = hold_out(conversations, config.held_out, config.seed, key=lambda c: str(opening_of(c.messages)))
    examples = encode_conversations(kept, template, tokenizer, length).checked("--data")
    tests = encode_conversations(held, template, tokenizer, length)
    prompts = encode_prompts(held[: config.samples], template, tokenizer, length - 1)
    rows = Windows(list(examples), length, config.packing)
    held_rows = Windows(list(tests), length)
    steps = math.ceil(config.epochs * len(rows) / config.batch_size)
    mixture, weights = {"conversations": rows}, {"conversations": 1.0}
    if config.replay and config.replay_share:
        # Whatever the sources of the replayed text, together they are this share of all rows.
        files = {name: Windows(file, length) for name, file in load_tokens(config.replay, "train").items()}
        tokens = {name: int(file.documents.offsets[-1]) for name, file in files.items()}
        share = config.replay_share / (1 - config.replay_share)
        weights |= {f"replay.{name}": share * n / sum(tokens.values()) for name, n in tokens.items()}
        mixture |= {f"replay.{name}": file for name, file in files.items()}
        steps = math.ceil(steps / (1 - config.replay_share))
    batches = Batches(Mixture(mixture, weights), config.batch_size, config.seed)
    claim(config)
    if examples.left_out:
        print(f"left out: {examples.summary()}")
    print(f"{len(examples):,} conversations in {len(rows):,} rows of {length}, {len(tests):,} held out")
    print(f"{steps:,} updates of {config.batch_size} rows")
    optimizer = config.optimizer(model.parameters)
    update, examine = updates_of(config, model, optimizer), examiner(config, template, tokenizer)

    def evaluate():
        found = evaluate_tokens(model, parts(held_rows.rows(range(len(held_rows))), 32)) if len(held_rows) else {}
        return found | examine(model)

    def sample():
        return complete(model, tokenizer, prompts, config.max_new_tokens, stop_ids(template, tokenizer))

    holds = {"model": model, "optimizer": optimizer, "batches": batches}
    identity = identity_of(config, model, config.model, template)
    best = ("eval_right", 1) if config.questions else None
    with Run(config, steps, holds, identity, dress(model, tokenizer, template), best) as run:
        for _ in run.steps(evaluate, sample):
            batch = next(batches)
            if not batch.mask.any():
                continue  # nothing to learn from: an update would only apply the weight decay
            update(run, batch, trained_tokens=batch.mask.sum())
        run.load_best()
    return save_trained(config, model, tokenizer, template), tokenizer
