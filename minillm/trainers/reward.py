"""
Reward model: minimise  L = -(1 / N) sum over pairs of log sigmoid(r(x, y_w) - r(x, y_l) - m)        (Bradley-Terry)

r(x, y) is a linear head on the last hidden state of the answer's last token, its end-of-turn token, so that training
and scoring read the same place; with the pooling "mean" it is the mean of that head over all the answer's tokens, each
of which then has a gradient of its own, and few preferences teach more. The trunk starts from the SFT weights (the head
is new): a reward model that does not know the language learns lengths and keywords. Rows with more than two answers,
{"prompt", "ranked": [best, ...]}, are ranked in one pass (all their pairs, or Plackett-Luce): four answers teach six
comparisons for the price of two pairs.
Left out: an ensemble, a KL term of any kind, and margins, soft labels and centring for rows with more than two answers.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ..autograd import no_grad
from ..data.conversations import encode_preferences, read_preferences
from ..data.datasets import Batches, Items
from ..data.readers import Bad
from ..kernels.device import beside, number, to_host, xp_of
from ..lora import HEAD
from ..losses import ranking_loss, reward_loss
from ..parallel import in_shares
from .common import (
    LoraSettings,
    TuningSettings,
    by_length,
    dress,
    hold_out,
    load_tokenizer,
    longest_first,
    padding_of,
    read_files,
    save_trained,
    scores,
    template_of,
    trainable,
)
from .evaluation import pair_accuracy
from .run import Run, claim, identity_of, in_its_folder


@dataclass(kw_only=True)
class RewardConfig(TuningSettings, LoraSettings):
    """Reward model."""

    epochs: float = 1.0
    """passes over the preferences: after one, reward models of all sizes begin to learn rows by heart"""
    centring: float = 0.01
    """pulls r_w + r_l towards 0, where differences alone would leave it to drift (Eisenstein et al. 2023)"""
    ranking: Literal["pairs", "plackett_luce", "best_of_k"] = "pairs"
    """what is asked of rows with more than two answers"""

    pooling: Literal["inherit", "last", "mean"] = "inherit"
    """an answer's score: that of its last token, which is what transformers' classifiers read, or the mean over its
    tokens, which learns more from a few hundred preferences; inherit: as --model has it, last if it is no reward model
    yet"""

    lr: float = 5e-4
    """the peak learning rate"""
    embedding_lr: float = 0.0
    """that of the embedding and the new head; 0: lr. Words tell much about an answer, and each one has a gradient in
    few updates; under Adam an embedding takes a higher rate than matrices anyway (Yang et al. 2022)"""
    warmup: float = 0.05
    """the share of the updates in which it rises"""
    weight_decay: float = 0.01
    """pulls matrices toward zero, a little: preferences are few"""

    def __post_init__(self):
        super().__post_init__()
        self.at_least("centring", 0)
        self.at_least("embedding_lr", 0)


def preference_loss(r, examples, config, count):
    """The loss of the scores r (B, K) of one part, best answer first, divided by the `count` of examples in the whole
    update. An example of two answers has the pairs' loss, whatever its neighbours have: the cut must not matter."""
    sizes = np.array([len(e.answers) for e in examples])
    two, more = np.flatnonzero(sizes == 2), np.flatnonzero(sizes > 2)
    losses = []
    if two.size:
        told = (np.array([getattr(examples[i], name) for i in two]) for name in ("margin", "preference"))
        margins, labels = (beside(x, r.data) for x in told)
        losses.append(reward_loss(r[two, 0], r[two, 1], margins, config.centring, labels, count))
    if more.size:
        there = np.arange(r.shape[1]) < sizes[more, None]
        ranks = np.zeros(there.shape, int)
        for row, i in enumerate(more):
            ranks[row, : sizes[i]] = examples[i].places()
        there, ranks = (beside(x, r.data) for x in (there, ranks))
        losses.append(ranking_loss(r[more], there, config.ranking, count, ranks))
    return sum(losses)


def score_answers(model, examples, pad_id):
    """r (B, K), a Tensor: the scores of every example's answers. Where one has fewer than K, its first one's again."""
    sizes = np.array([len(e.answers) for e in examples])
    first, k = np.cumsum(sizes) - sizes, np.arange(sizes.max())
    each = scores(model, [answer for e in examples for answer in e.answers], pad_id)
    return each[first[:, None] + np.where(k < sizes[:, None], k, 0)]


def margins_of(r, examples):
    """r_i - r_j of every two answers that are compared, an array (pairs,), from the scores r (B, K)."""
    at = np.array([(row, i, j) for row, e in enumerate(examples) for i, j in e.compared()], int).reshape(-1, 3)
    row, i, j = (beside(places, r) for places in at.T)
    return r[row, i] - r[row, j]


def backward(model, batch, config, pad_id):
    """Backward of the loss on the rankings of `batch`, in parts; its metrics, over all answers that are compared, on a
    GPU arrays ()."""

    def backward_share(model, share):
        total, margins, found = 0.0, [], []  # scores of answers that are there, not of a shorter row's filling
        for part in by_length(share, config.micro_batch_size):
            r = score_answers(model, part, pad_id)
            loss = preference_loss(r, part, config, len(batch))
            loss.backward()
            total += number(loss.data)
            there = np.arange(r.shape[1]) < np.array([[len(e.answers)] for e in part])
            margins.append(margins_of(r.data, part))
            found.append(r.data.reshape(-1)[beside(np.flatnonzero(there), r.data)])
        return total, xp_of(r.data).concatenate(margins), xp_of(r.data).concatenate(found)

    found = in_shares(model, backward_share, longest_first(batch), config.workers)
    losses, margins, r = zip(*found, strict=True)
    margins, r = (xp_of(some[0]).concatenate(some) for some in (margins, r))
    metrics = {"loss": sum(losses), "accuracy": pair_accuracy(margins), "margin": margins.mean()}
    return metrics | {"min_reward": r.min(), "mean_reward": r.mean(), "max_reward": r.max()}


def measure(model, examples, pad_id):
    """{"eval_accuracy", "eval_margin", "eval_loss"} over all pairs of the examples, ties counted half."""
    return summary(held_margins(model, examples, pad_id))


def held_margins(model, examples, pad_id, rows=16):
    """The margins of all examples, an array."""
    margins = [np.zeros(0)]
    with no_grad():
        for part in by_length(examples, rows):
            margins.append(margins_of(to_host(score_answers(model, part, pad_id).data).astype(np.float64), part))
    return np.concatenate(margins)


def summary(margins):
    """What an evaluation tells of margins, an array."""
    return {
        "eval_accuracy": pair_accuracy(margins),
        "eval_margin": margins.mean(),
        "eval_loss": np.logaddexp(0, -margins).mean(),
    }


def by_file(preferences):
    """{name of a file: its Preferences}: the name without folder and ending, or in full where two are called so."""
    found = {}
    for preference in preferences:
        found.setdefault(Path(preference.where.rpartition(":")[0]), []).append(preference)
    stems = [path.stem for path in found]
    return {path.stem if stems.count(path.stem) == 1 else str(path): some for path, some in found.items()}


@in_its_folder
def train(config):
    """Train, and write the model folder; returns (model, tokenizer)."""
    tokenizer, template = load_tokenizer(config.model), template_of(config.model, config.template)
    model = config.load(config.model, "scalar", config.seed)
    if config.pooling != "inherit":
        model.config = replace(model.config, pooling=config.pooling)
    model = trainable(model, config)
    length = config.length or model.config.max_position_embeddings
    preferences = read_files(config.data, read_preferences, Bad(config.skip_bad))
    kept, held = hold_out(preferences, config.held_out, config.seed, key=lambda p: str(p.prompt))
    # The answer's last token is read, too, where a language model only predicts it.
    examples = encode_preferences(kept, template, tokenizer, length - 1).checked("--data")
    tests = {  # some preferences are much harder than others
        name: encode_preferences(some, template, tokenizer, length - 1, ties=False)
        for name, some in by_file(held).items()
    }
    pad_id = padding_of(tokenizer)
    batches = Batches(Items(examples), config.batch_size, config.seed)
    steps = math.ceil(config.epochs * len(examples) / config.batch_size)
    claim(config)
    if examples.left_out:
        print(f"left out: {examples.summary()}")
    print(f"{len(examples):,} preferences, {sum(map(len, tests.values())):,} held out")
    factor, faster = config.embedding_lr / config.lr or 1.0, (model.embedding_name, HEAD)  # an adapter's have a prefix
    optimizer = config.optimizer(model.parameters, lambda name, _: factor if name.endswith(faster) else 1.0)

    def evaluate():
        margins = {name: held_margins(model, some, pad_id) for name, some in tests.items() if some}
        found = summary(np.concatenate(list(margins.values()))) if margins else {}
        if len(margins) > 1:
            found |= {f"eval_accuracy/{name}": pair_accuracy(some) for name, some in margins.items()}
        return found

    holds = {"model": model, "optimizer": optimizer, "batches": batches}
    identity = identity_of(config, model, config.model, template)
    best = "eval_accuracy", 1
    with Run(config, steps, holds, identity, dress(model, tokenizer, template), best) as run:
        for _ in run.steps(evaluate):
            batch = next(batches)
            metrics = backward(model, batch, config, pad_id)
            run.update(optimizer, metrics, tokens=sum(len(ids) for e in batch for ids, _ in e.answers))
        run.load_best()
    return save_trained(config, model, tokenizer, template), tokenizer
