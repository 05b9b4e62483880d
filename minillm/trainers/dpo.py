"""
Direct preference optimization: minimise  L = -(1 / N) sum over pairs of log sigmoid(h),
h = beta [log pi(y_w|x) - log ref(y_w|x) - log pi(y_l|x) + log ref(y_l|x)]                 (Rafailov et al. 2023, eq. 7)

Log-probabilities are sums over the answer's tokens and its end-of-turn token; the prompt is in none of them. The
reference is the model that training starts from, and its log-probabilities are computed once, by the same code, before
the first update: there h = 0 and L = ln 2. With an adapter it is the model with the adapter switched off, unless
--reference names another. Left out: ties, a row's own margin and preference (the reward model uses them), and sampling.
What the policy does on prompts that no pair covers, the loss does not see (Xu et al. 2024), so watch the samples and
rewards/chosen, which may fall while the margin grows.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..autograd import no_grad
from ..chat import stop_ids
from ..data.conversations import encode_preferences, encode_prompts, pairs, prompts_of, read_preferences
from ..data.datasets import Batches, Items
from ..data.readers import Bad
from ..kernels.device import beside, later, number, to_host
from ..lora import switched_off
from ..losses import dpo_loss, dpo_rewards, sequence_logprobs
from ..parallel import add_up, added, in_shares
from .common import (
    LoraSettings,
    QuestionSettings,
    TuningSettings,
    by_length,
    dress,
    hold_out,
    load_tokenizer,
    longest_first,
    padding_of,
    read_files,
    same_tokenizer,
    save_trained,
    template_of,
    trainable,
    trained_logprobs,
)
from .evaluation import complete, examiner
from .run import Run, claim, identity_of, in_its_folder


@dataclass(kw_only=True)
class DPOConfig(QuestionSettings, TuningSettings, LoraSettings):
    """Direct preference optimization."""

    reference: Path | None = None
    """the reference model; none: the one training starts from"""
    epochs: float = 1.0
    """passes over the preferences: more drive the loss to 0 and the text to repetition"""
    beta: float = 0.1
    """how dear it is to leave the reference: large stays near"""
    kind: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """the loss: DPO (with label_smoothing: cDPO), robust DPO, SLiC's hinge, IPO"""
    label_smoothing: float = 0.0
    """the share of labels that are wrong, for sigmoid (cDPO) and robust"""
    normalize: Literal["sum", "mean"] = "sum"
    """log-probabilities as sums, as in the papers, or per-token means (IPO in TRL); they need very different betas"""
    max_new_tokens: int = 64
    """length of the completions that are shown"""

    lr: float = 5e-5
    """a tenth of SFT's: the loss rewards any way of telling the answers apart, and a large step finds a bad one"""
    warmup: float = 0.1
    """the share of the updates in which the learning rate rises"""

    def __post_init__(self):
        super().__post_init__()
        self.above("beta", 0)
        self.at_least("max_new_tokens", 1)
        self.between("label_smoothing", 0, 0.5, open_end=True)
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            self.refuse("label_smoothing", f"0 for --kind {self.kind}")


def pair_logprobs(model, examples, pad_id):
    """(log pi(y_w|x), log pi(y_l|x)), Tensors (B,), and the answers' lengths, arrays (B,). One forward for both."""
    logp, mask = trained_logprobs(model, [e.answers[k] for k in (0, 1) for e in examples], pad_id)
    logp, lengths, B = sequence_logprobs(logp, beside(mask, logp.data)), mask.sum(1), len(examples)
    return logp[:B], logp[B:], (lengths[:B], lengths[B:])


def with_reference(reference, examples, pad_id, rows=16):
    """The examples, each with the reference's two log-probabilities, as `reference` (2,) float."""
    found = {}  # by the identity of an example, which may stand in the list more than once
    with no_grad():
        for part in by_length(examples, rows):
            chosen, rejected, _ = pair_logprobs(reference, part, pad_id)
            for e, w, l in zip(part, to_host(chosen.data), to_host(rejected.data), strict=True):
                found[id(e)] = (w, l)
    return [e._replace(reference=found[id(e)]) for e in examples]


def loss_and_metrics(model, examples, config, pad_id, count):
    """The loss of one part, divided by the `count` of pairs in the whole update, and sums of metrics over the part.
    Where the loss takes means over tokens, so do the rewards; logps are always sums."""
    chosen, rejected, lengths = pair_logprobs(model, examples, pad_id)
    reference = beside(np.array([e.reference for e in examples], chosen.dtype), chosen.data)
    lengths = [beside(n, chosen.data) for n in lengths]
    loss = dpo_loss(
        chosen,
        rejected,
        reference[:, 0],
        reference[:, 1],
        config.beta,
        config.kind,
        config.label_smoothing,
        normalize=config.normalize,
        lengths=lengths if config.normalize == "mean" else None,
        count=count,
    )
    won, lost = dpo_rewards(chosen, rejected, reference[:, 0], reference[:, 1], config.beta)
    if config.normalize == "mean":
        won, lost = won / lengths[0], lost / lengths[1]
    return loss, {
        "rewards/chosen": won.sum(),
        "rewards/rejected": lost.sum(),
        "rewards/margins": (won - lost).sum(),
        "rewards/accuracies": ((won > lost) + 0.5 * (won == lost)).sum(),
        "logps/chosen": chosen.data.sum(),
        "logps/rejected": rejected.data.sum(),
    }


def backward(model, batch, config, pad_id):
    """Backward of the loss on the pairs of `batch`, in parts; {metric: mean over the pairs}, on a GPU arrays ()."""

    def backward_share(model, share):
        sums = {}
        for part in by_length(share, config.micro_batch_size):
            loss, metrics = loss_and_metrics(model, part, config, pad_id, len(batch))
            loss.backward()
            sums = added(sums, {"loss": number(loss.data) * len(batch), **metrics})
        return sums

    sums = add_up(in_shares(model, backward_share, longest_first(batch), config.workers))
    return {name: value / len(batch) for name, value in sums.items()}


def measure(model, examples, config, pad_id, rows=16):
    """The loss and the metrics over all examples, as {"eval_...": mean}."""
    sums = {}
    with no_grad():
        for part in by_length(examples, rows):
            loss, metrics = loss_and_metrics(model, part, config, pad_id, len(examples))
            sums = added(sums, {"loss": number(loss.data) * len(examples), **metrics})
    return {f"eval_{name}": value / len(examples) for name, value in later(sums)().items()}


@in_its_folder
def train(config):
    """Train, and write the model folder; returns (model, tokenizer)."""
    tokenizer, template = load_tokenizer(config.model), template_of(config.model, config.template)
    model = trainable(config.load(config.model, "lm"), config)
    reference = config.load(config.reference, "lm") if config.reference else switched_off(model)
    if config.reference:
        same_tokenizer(config.reference, tokenizer, config.model)
    length = config.length or model.config.max_position_embeddings
    preferences = read_files(config.data, read_preferences, Bad(config.skip_bad))
    kept, held = hold_out(preferences, config.held_out, config.seed, key=lambda p: str(p.prompt))
    examples = encode_preferences(kept, template, tokenizer, length, ties=False).checked("--data")
    tests = encode_preferences(held, template, tokenizer, length, ties=False)
    prompts = encode_prompts(prompts_of(held), template, tokenizer, length - 1)[: config.samples]
    pad_id = padding_of(tokenizer)
    claim(config)
    if examples.left_out:
        print(f"left out: {examples.summary()}")
    print(f"{len(examples):,} preferences, {len(tests):,} held out")
    if graded := sum(e.margin != 0 or e.preference != 1 for e in examples):
        print(f"{graded:,} of them have a margin or a preference, which are not used: each counts as a plain win")
    found = pairs(examples)
    train_pairs, tests = (with_reference(reference, some, pad_id) for some in (found, pairs(tests)))
    batches = Batches(Items(train_pairs, source=found), config.batch_size, config.seed)
    steps = math.ceil(config.epochs * len(train_pairs) / config.batch_size)
    optimizer = config.optimizer(model.parameters)
    examine = examiner(config, template, tokenizer)

    def evaluate():
        return (measure(model, tests, config, pad_id) if tests else {}) | examine(model)

    def sample():
        return complete(model, tokenizer, prompts, config.max_new_tokens, stop_ids(template, tokenizer))

    holds = {"model": model, "optimizer": optimizer, "batches": batches}
    identity = identity_of(config, model, config.model, template)
    best = "eval_rewards/accuracies", 1
    with Run(config, steps, holds, identity, dress(model, tokenizer, template), best) as run:
        for _ in run.steps(evaluate, sample):
            batch = next(batches)
            metrics = backward(model, batch, config, pad_id)
            run.update(optimizer, metrics, tokens=sum(len(ids) for e in batch for ids, _ in e.answers))
        run.load_best()
    return save_trained(config, model, tokenizer, template), tokenizer
