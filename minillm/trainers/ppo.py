"""
PPO: maximise  J = E_{y ~ pi}[ r(x, y) - beta KL ],  KL = sum over the answer's tokens of log pi(y_t) - log ref(y_t)

by clipped steps (Schulman et al. 2017, eq. 7) on sampled answers. The optimum is known,
pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x), and the tests reach it where all answers can be written down.

Four models: the policy, the frozen reference it started from, the frozen reward model, and the value model. One round:

    rollout      sample an answer to each prompt, to its end-of-turn token or to max_new_tokens
    experience   score it; log-probabilities of policy and reference and values by the same forward
                 that training uses (not the sampler's: the ratio has to begin at 1); per-token rewards
                 -beta kl_t, with the score on the last token; advantages (GAE), whitened over valid tokens
    update       some epochs over the answers in minibatches; a policy step and a value step each

With adapters (--lora-rank) the policy's is beside the model's weights, and the reference is the policy with the adapter
switched off. The value model is an adapter and a whole head of its own beside the reward model's weights, the same
arrays: values and scores need the same understanding, and neither can spoil the other's. So two models' weights are
held for four. With --quantize nf4 the value model has four bits of its own: what scores is never rounded.

Every array of a round is (B, T) over target positions: entry t belongs to tokens[t + 1], and `mask` is 1 on the answer.
Left out: sharing a trunk between policy and value, and reward models that score unfinished text.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..autograd import no_grad
from ..chat import stop_ids
from ..data.atlas import Question, gold_reward
from ..data.conversations import Conversation, encode_prompts, question_of, read_prompts
from ..data.datasets import Batches, Items
from ..data.pack import Batch
from ..data.readers import Bad
from ..generate import generate
from ..kernels.device import beside, later, number, to_host, xp_of
from ..lora import switched_off
from ..losses import (
    AdaptiveKL,
    gae,
    kl_rewards,
    last_token,
    masked_mean,
    masked_var,
    ppo_policy_loss,
    ppo_value_loss,
    whiten,
)
from ..parallel import add_up, added, in_shares
from .common import (
    LoraSettings,
    QuestionSettings,
    dress,
    frozen_logprobs,
    hold_out,
    load_judge,
    load_tokenizer,
    pad,
    padding_of,
    parts,
    read_files,
    save_trained,
    scalar_head,
    scores,
    template_of,
    token_logprobs,
    trainable,
    with_head,
)
from .evaluation import divergence, gold_metrics, pair_accuracy, read_questions, spread
from .run import Run, claim, identity_of, in_its_folder


@dataclass(kw_only=True)
class PPOConfig(QuestionSettings, LoraSettings):
    """PPO against a reward model."""

    reward: Path
    """the reward model's folder"""
    prompts: tuple[Path, ...]
    """prompts: JSON lines of {"messages": [...]} or {"prompt": ...}"""
    value_init: Literal["reward", "model"] = "reward"
    """what the value model starts from: the reward model already knows what a good beginning is (InstructGPT)"""
    episodes: int = 10_000
    """answers to sample in all"""
    batch_size: int = 64
    """answers in a round"""
    ppo_epochs: int = 4
    """passes over a round's answers"""
    minibatch_size: int = 0
    """answers in an update; 0: all of the round"""
    max_new_tokens: int = 48
    """the longest answer"""
    temperature: float = 1.0
    """of sampling, and of all log-probabilities: another one there would make every ratio wrong"""

    beta: float = 0.05
    """the price of one nat of KL, in the reward's standard deviations"""
    target_kl: float = 0.0
    """steer beta towards this KL per answer (Ziegler et al. 2019); 0: beta is fixed"""
    horizon: int = 10_000
    """answers over which beta is steered"""
    max_step_kl: float = 0.1
    """end a round's updates of the policy where it has moved by this KL per token from where it sampled"""
    clip: float = 0.2
    """how far a probability ratio may leave 1"""
    clip_value: float = 0.2
    """how far a value may move in a round, in the reward's standard deviations; in the warm-up, as far as it likes"""
    gamma: float = 1.0
    """discount: an answer is short, and only its end is scored"""
    lam: float = 0.95
    """GAE: 1 trusts sampled rewards alone, 0 the value model alone"""
    entropy_coefficient: float = 0.0
    """reward for the policy's entropy; the KL term already keeps it up"""
    whiten_rewards: bool = False
    """scale each round's rewards to spread 1; off, so that beta keeps its meaning"""
    missing_eos_penalty: float = 1.0
    """taken from the score of an answer that does not end by itself"""
    reward_clip: float = 10.0
    """scores are held within this many standard deviations"""
    reference_samples: int = 128
    """answers of the reference over which the score gets mean 0 and standard deviation 1; 0: raw scores, and then
    beta, reward_clip and clip_value are in the reward model's own units"""
    value_lr: float = 1e-3
    """the value model's learning rate; it has to follow the policy, so it is faster"""
    value_warmup: int = 4
    """rounds at the beginning in which only the value model learns"""
    held_out: float = 0.1
    """share of the prompts kept for evaluation"""
    eval_prompts: int = 64
    """how many of them are answered in an evaluation"""
    flight_record: int = 0
    """write every token of each N-th round to flight.jsonl, so that it can be computed again by hand; 0: none"""

    lr: float = 1e-4
    """the policy's peak learning rate"""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """how it falls"""
    eps: float = 1e-5
    """larger than Adam's usual 1e-8: the first steps of a policy, with tiny second moments, would be too long"""
    log_every: int = 1
    """rounds between rows of metrics.jsonl"""
    eval_every: int = 20
    """rounds between evaluations"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("episodes", "ppo_epochs", "max_new_tokens", "horizon", "eval_prompts"):
            self.at_least(name, 1)
        zero = ("minibatch_size", "beta", "target_kl", "reference_samples", "value_warmup", "flight_record")
        for name in (*zero, "entropy_coefficient", "missing_eos_penalty"):
            self.at_least(name, 0)
        for name in ("temperature", "max_step_kl", "clip", "clip_value", "reward_clip", "value_lr"):
            self.above(name, 0)
        for name in ("gamma", "lam"):
            self.between(name, 0, 1)
        self.between("held_out", 0, 1, open_end=True)
        rounds = math.ceil(self.episodes / self.batch_size)
        if self.value_warmup >= rounds:
            self.refuse("value_warmup", f"less than the {rounds} rounds of --episodes, or no policy is trained")
        if self.target_kl and 0.2 * self.batch_size >= self.horizon:
            self.refuse("horizon", "more than a fifth of --batch-size")
        if not self.prompts:
            raise ValueError("--prompts needs at least one file")


class Experience(NamedTuple):
    """One round's answers, one in each row, and what is known about their tokens. Arrays; all but tokens (B, T)."""

    tokens: np.ndarray  # (B, T + 1) int32
    start: np.ndarray
    mask: np.ndarray  # 1 on the answer's tokens
    score: np.ndarray  # the score on its last token, 0 elsewhere
    logp: np.ndarray  # log pi of the policy that sampled
    reference_logp: np.ndarray
    kl: np.ndarray  # their difference
    reward: np.ndarray  # score - beta kl (whitened with whiten_rewards)
    value: np.ndarray
    advantage: np.ndarray  # before whitening
    white: np.ndarray  # after it
    returns: np.ndarray

    @property
    def batch(self):
        """The rows as a Batch."""
        return Batch(self.tokens, self.start, self.mask)

    def beside(self, x):
        """With what the losses read where the array x is."""
        read = ("mask", "logp", "white", "value", "returns")
        return self._replace(**{name: beside(getattr(self, name), x) for name in read})


@dataclass
class Scorer:
    """Turns answers into numbers: gain (r - mean), clipped, less the penalty where an answer did not end (subtracted as
    in TRL; Stiennon et al. 2020's code puts a fixed score in its place)."""

    function: object  # function(answers) -> (B,) array of raw rewards
    mean: float = 0.0
    gain: float = 1.0
    clip: float = math.inf
    missing_eos_penalty: float = 0.0

    def state_dict(self):
        """What a checkpoint keeps: {"mean", "gain"}; the rest is configuration."""
        return {"mean": self.mean, "gain": self.gain}

    def load_state_dict(self, state):
        """Go on from `state_dict()`."""
        self.mean, self.gain = state["mean"], state["gain"]

    def __call__(self, answers, ended):
        score = np.clip((self.function(answers) - self.mean) * self.gain, -self.clip, self.clip)
        return score - self.missing_eos_penalty * ~ended


def model_rewards(model, pad_id, rows=64):
    """function(answers) -> (B,) float64: a reward model's scores of answers (ids, mask), without a graph."""

    def score(answers):
        with no_grad():
            found = [scores(model, answers[i : i + rows], pad_id) for i in range(0, len(answers), rows)]
        return np.concatenate([to_host(part.data).astype(np.float64) for part in found])

    return score


def normalised(scorer, answers):
    """The scorer with mean and gain such that these answers, the reference's, get mean 0 and standard deviation 1
    (Ziegler et al. 2019, section 2.1): beta then weighs the same whatever scale the reward model came out with. The
    penalty for a missing end is not part of it. Where all of them score the same there is only rounding to blow up,
    and the gain stays 1."""
    raw = scorer.function(answers)
    mean, spread = float(raw.mean()), float(raw.std())
    return replace(scorer, mean=mean, gain=1.0 / spread if spread > 1e-6 * max(1.0, abs(mean)) else 1.0)


# ------------------------------------------------------------------ rollout


def rollout(policy, prompts, config, stop_tokens, pad_id, seed, cache=True):
    """Sample an answer to each prompt: (batch, answers, ended). The batch's mask covers the answers, and each of
    `answers` is (ids, mask), its prompt's included; `ended` (B,) says which of them came to a stop token."""
    room = policy.config.max_position_embeddings
    new = min(config.max_new_tokens, room - max(len(p) for p in prompts))
    made = generate(
        policy,
        prompts,
        max_new_tokens=new,
        temperature=config.temperature,
        stop_tokens=stop_tokens,
        seed=[(*seed, i) for i in range(len(prompts))],
        cache=cache,
    )
    answers = [as_answer(answer.prompt, answer.ids) for answer in made]
    return pad(*zip(*answers, strict=True), pad_id), answers, np.array([answer.finish == "stop" for answer in made])


def as_answer(prompt, ids):
    """(ids, mask) of a prompt and the ids that a model has added to it, as encode_answer makes them of a text."""
    return np.concatenate([prompt, ids]), np.repeat([False, True], [len(prompt), len(ids)])


# ------------------------------------------------------------------ experience


def values_of(value_model, batch):
    """V_t, a Tensor (B, T): what the value model expects before token t + 1 is chosen."""
    return scalar_head(value_model, value_model.hidden(batch.x, batch.start)).reshape(batch.mask.shape)


def frozen_values(value_model, batch, rows=64):
    """values_of as an array, without a graph."""
    with no_grad():
        return np.concatenate([to_host(values_of(value_model, part).data) for part in parts(batch, rows)])


def experience(policy, reference, value_model, batch, score, config, beta):
    """Everything a round's updates need, from sampled rows and the score (B,) of each."""
    rows = config.micro_batch_size or config.minibatch_size  # as many at once as in the updates: the ratio begins at 1
    logp = frozen_logprobs(policy, batch, config.temperature, rows)
    reference_logp = frozen_logprobs(reference, batch, config.temperature, rows)
    value = np.where(batch.mask, frozen_values(value_model, batch, rows), 0)
    reward, kl = kl_rewards(score, logp, reference_logp, batch.mask, beta)
    if config.whiten_rewards:
        reward = whiten(reward, batch.mask, shift_mean=False)
    advantage, returns = gae(reward, value, batch.mask, config.gamma, config.lam)
    on_last = np.arange(batch.mask.shape[1]) == last_token(batch.mask)[:, None]
    return Experience(
        *batch,
        score=np.where(on_last, score[:, None], 0.0),
        logp=logp,
        reference_logp=reference_logp,
        kl=kl,
        reward=reward,
        value=value,
        advantage=advantage,
        white=whiten(advantage, batch.mask),
        returns=returns,
    )


# ------------------------------------------------------------------ update


def minibatches(rows, size, epochs, rng):
    """Index arrays of at most `size` rows: each epoch in a new order, every row once."""
    for _ in range(epochs):
        order = rng.permutation(rows)
        for first in range(0, rows, size or rows):
            yield order[first : first + (size or rows)]


def policy_backward(policy, e, config):
    """Backward of the policy's loss on the rows of `e`, in parts; its statistics, on a GPU arrays ()."""
    count = e.mask.sum()

    def backward_share(policy, share):
        sums, largest = {}, 0.0
        for part in parts(share, config.micro_batch_size):
            logp, entropy = token_logprobs(policy, part.batch, config.temperature, entropy=True)
            there = part.beside(logp.data)
            loss, found = ppo_policy_loss(logp, there.logp, there.white, there.mask, config.clip, count)
            if config.entropy_coefficient:
                loss = loss - masked_mean(entropy, there.mask, count) * config.entropy_coefficient
            loss.backward()
            ratio_max = found.pop("ratio_max")
            largest = number(xp_of(ratio_max).fmax(ratio_max, largest))
            found |= {"loss": loss.data, "entropy": masked_mean(entropy.data, there.mask, count)}
            sums = added(sums, found)
        return sums | {"ratio_max": largest}

    found = in_shares(policy, backward_share, e, config.workers)
    largest = found[0]["ratio_max"] if len(found) == 1 else max(some["ratio_max"] for some in found)
    return add_up(found) | {"ratio_max": largest}


def value_backward(value_model, e, config, clip):
    """Backward of the value model's loss on the rows of `e`, in parts; its statistics, on a GPU arrays ()."""
    count = e.mask.sum()

    def backward_share(value_model, share):
        sums = {}
        for part in parts(share, config.micro_batch_size):
            values = values_of(value_model, part.batch)
            there = part.beside(values.data)
            loss, found = ppo_value_loss(values, there.value, there.returns, there.mask, clip, count)
            loss.backward()
            found |= {"loss": loss.data}
            sums = added(sums, found)
        return sums

    return add_up(in_shares(value_model, backward_share, e, config.workers))


def update(policy, value_model, e, optimizers, config, run, rng, train_policy=True):
    """A round's updates. Where the policy has moved too far, it takes no further step in this round, and the gradient
    that told so is thrown away; the value model goes on, its targets are as good as before (as in Spinning Up).

    train_policy=False is the warm-up: only the value model learns, and without a clip, which would hold it near the
    scale that the reward model came with, where the scores have been normalised."""
    policy_optimizer, value_optimizer = optimizers
    value_lr = config.value_lr * run.lr / config.lr
    clip_value, stopped = config.clip_value if train_policy else math.inf, False
    for rows in minibatches(len(e.tokens), config.minibatch_size, config.ppo_epochs, rng):
        part = Experience(*(array[rows] for array in e))
        if not part.mask.any():
            continue  # nothing was sampled in these rows, so there is nothing to learn from
        found = value_backward(value_model, part, config, clip_value)
        metrics = {"loss/value_avg": found["loss"], "val/clipfrac_avg": found["clipfrac"]}
        run.update(value_optimizer, metrics, lr=value_lr, prefix="value/")
        if stopped or not train_policy:
            continue
        found = later(policy_backward(policy, part, config))()  # whether the policy goes on is decided here
        if found["approx_kl_k3"] > config.max_step_kl:
            policy_optimizer.zero_grad()
            stopped = True
            continue
        metrics = {
            "loss/policy_avg": found["loss"],
            "policy/approxkl_avg": found["approx_kl_k2"],
            "policy/approxkl_k3": found["approx_kl_k3"],
            "policy/clipfrac_avg": found["clipfrac"],
            "policy/entropy_avg": found["entropy"],
            "val/ratio": found["ratio"],
            "val/ratio_var": found["ratio_var"],
            "val/ratio_max": found["ratio_max"],
        }
        run.update(policy_optimizer, metrics)
    if train_policy:
        run.add({"policy/stopped_early": stopped})


# ------------------------------------------------------------------ what is logged


def round_metrics(e, ended, beta):
    """A round's own numbers, under TRL's names. KL, rewards and entropy are sums over an answer, averaged over them."""
    lengths, kl = e.mask.sum(1), e.kl.sum(1)
    score = e.score.sum(1)
    residual, variance = masked_mean((e.returns - e.value) ** 2, e.mask), masked_var(e.returns, e.mask)
    return {
        "objective/kl": kl.mean(),
        "objective/entropy": -np.where(e.mask, e.logp, 0.0).sum(1).mean(),
        "objective/non_score_reward": -beta * kl.mean(),
        "objective/rlhf_reward": score.mean() - beta * kl.mean(),
        "objective/scores": score.mean(),
        "objective/kl_coef": beta,
        "val/explained_variance": 1 - residual / variance if variance > 0 else 0.0,
        "val/mean": masked_mean(e.value, e.mask),
        "val/num_eos_tokens": ended.sum(),
        "returns/mean": masked_mean(e.returns, e.mask),
        "returns/var": variance,
        "length": lengths.mean(),
        "missing_eos": 1 - ended.mean(),
    }


def flight_rows(e, new_logp, tokenizer, step, beta, config):
    """One dict for each token of a round. From token log-probabilities, scores and values everything else can be
    recomputed; `new_logp` (B, T) is the policy's after the round's updates, and tells ratio and clipped."""
    delta = e.reward + config.gamma * _next(e.value) - e.value
    ratio = np.exp(new_logp - e.logp)
    clipped = ((e.white > 0) & (ratio > 1 + config.clip)) | ((e.white < 0) & (ratio < 1 - config.clip))
    for row, t in zip(*np.nonzero(e.mask), strict=True):
        token = int(e.tokens[row, t + 1])
        names = ("logp", "reference_logp", "kl", "score", "reward", "value", "advantage", "white", "returns")
        yield {
            "round": step,
            "answer": int(row),
            "position": int(t + 1),
            "token": token,
            "text": tokenizer.decode([token]),
            "beta": beta,
            **{name: float(getattr(e, name)[row, t]) for name in names},
            "new_logp": float(new_logp[row, t]),
            "delta": float(delta[row, t]),
            "ratio": float(ratio[row, t]),
            "clipped": bool(clipped[row, t]),
        }


def _next(values):
    """V of the next token of each row: answers are one stretch, and values are 0 behind it, where the episode ends."""
    return np.concatenate([values[:, 1:], np.zeros_like(values[:, :1])], 1)


def against_gold(asked, answers, score, tokenizer):
    """gold_metrics of answers (ids, mask) to atlas questions, two in a row to each, and "eval_reward_accuracy": how
    often the score ranks such a pair as the gold reward does, where that differs."""
    questions = [Question.from_row(prompt.row) for _, prompt in asked]
    texts = [tokenizer.decode(ids[mask], skip_special=True) for ids, mask in answers]
    gold = np.array([gold_reward(q, text).total for q, text in zip(questions, texts, strict=True)]).reshape(-1, 2)
    better, score = gold[:, 0] - gold[:, 1], score.reshape(-1, 2)
    margins = ((score[:, 0] - score[:, 1]) * np.sign(better))[better != 0]
    found = {f"eval_{name}": value for name, value in gold_metrics(questions, texts).items()}
    return found | {"eval_reward_accuracy": pair_accuracy(margins) if len(margins) else math.nan}


# ------------------------------------------------------------------ the loop


@in_its_folder
def train(config):
    """Train, and write the policy's folder; returns (policy, tokenizer)."""
    tokenizer, template = load_tokenizer(config.model), template_of(config.model, config.template)
    model = config.load(config.model, "lm")
    policy = trainable(model, config)
    reference = switched_off(policy) if config.lora_rank else with_head(policy, "lm")
    reward_model = load_judge(config, tokenizer, template, policy.config.vocab_size)
    begin = reward_model if config.value_init == "reward" else model
    if not (config.lora_rank and begin is reward_model):  # an adapter leaves it as it is, so nothing has to be copied
        begin = with_head(begin, "scalar", config.seed)
    value_model = trainable(begin, config)
    del model, begin  # beside four bits, their arrays are needed no more
    context = min(policy.config.max_position_embeddings, reward_model.config.max_position_embeddings)
    if config.max_new_tokens >= context:
        config.refuse("max_new_tokens", f"below the models' context of {context}")
    prompts = read_files(config.prompts, read_prompts, Bad(config.skip_bad))
    if config.questions:
        rows = {q.id: q.row() for q in read_questions(config.questions)}
        kept, held = prompts, [Conversation(where, row["messages"], row) for where, row in rows.items()]
    else:
        kept, held = hold_out(prompts, config.held_out, config.seed, key=lambda p: str(question_of(p.messages)))
    examples = encode_prompts(kept, template, tokenizer, context - config.max_new_tokens).checked("--prompts")
    tests = encode_prompts(held, template, tokenizer, context - config.max_new_tokens)
    tests = spread(tests, config.eval_questions if config.questions else config.eval_prompts)
    pad_id = padding_of(tokenizer)
    stop = stop_ids(template, tokenizer)
    claim(config)
    if examples.left_out:
        print(f"left out: {examples.summary()}")
    print(f"{len(examples):,} prompts, {len(tests):,} held out")

    batches = Batches(Items([ids for ids, _ in examples]), config.batch_size, config.seed)
    scorer = Scorer(model_rewards(reward_model, pad_id), 0.0, 1.0, config.reward_clip, config.missing_eos_penalty)
    if config.reference_samples:
        order = np.random.default_rng((config.seed, 4)).permutation(len(examples))
        some = [examples[i][0] for i in np.resize(order, config.reference_samples)]  # again and again if they are few
        _, answers, _ = rollout(reference, some, config, stop, pad_id, (config.seed, 0))
        scorer = normalised(scorer, answers)
    controller = AdaptiveKL(config.beta, config.target_kl or None, config.horizon)
    optimizers = config.optimizer(policy.parameters), config.optimizer(value_model.parameters)
    steps = math.ceil(config.episodes / config.batch_size)

    def evaluate():
        """Score, KL, length of sampled answers to the held-out prompts, the same random numbers every time; of
        questions with known answers, two answers each, the gold reward and how well the reward model tells them."""
        if not tests:
            return {}
        asked = [test for test in tests for _ in range(2 if config.questions else 1)]
        batch, answers, ended = rollout(policy, [ids for ids, _ in asked], config, stop, pad_id, (config.seed, 1))
        score = scorer(answers, ended)
        found = {
            "eval_scores": score.mean(),
            "eval_kl": divergence(policy, reference, batch, config.temperature),
            "eval_length": batch.mask.sum(1).mean(),
            "eval_missing_eos": 1 - ended.mean(),
        }
        return found | (against_gold(asked, answers, score, tokenizer) if config.questions else {})

    def sample():
        some = tests[: config.samples]
        if not some:
            return []
        _, answers, _ = rollout(policy, [ids for ids, _ in some], config, stop, pad_id, (config.seed, 1))
        return [
            (question_of(prompt.messages)[-1]["content"], tokenizer.decode(ids[mask], skip_special=True))
            for (_, prompt), (ids, mask) in zip(some, answers, strict=True)
        ]

    holds = {"model": policy, "optimizer": optimizers[0], "value_model": value_model, "value_optimizer": optimizers[1]}
    holds |= {"batches": batches, "controller": controller, "scorer": scorer}
    identity = identity_of(config, policy, config.model, template)
    best = "eval_gold" if config.questions else "eval_scores", 1
    with Run(config, steps, holds, identity, dress(policy, tokenizer, template), best) as run:
        for step in run.steps(evaluate, sample):
            batch, answers, ended = rollout(policy, next(batches), config, stop, pad_id, (config.seed, 2, step))
            beta = controller.coefficient
            e = experience(policy, reference, value_model, batch, scorer(answers, ended), config, beta)
            rng, train_policy = np.random.default_rng((config.seed, 3, step)), step >= config.value_warmup
            update(policy, value_model, e, optimizers, config, run, rng, train_policy)
            run.add({**round_metrics(e, ended, beta), "episode": (step + 1) * config.batch_size})
            run.count(batch.mask.sum())
            if train_policy:  # before that the KL is 0, and says nothing about beta
                controller.update(float(e.kl.sum(1).mean()), config.batch_size)
            if config.flight_record and step % config.flight_record == 0:
                new_logp = frozen_logprobs(policy, batch, config.temperature)
                run.append("flight.jsonl", flight_rows(e, new_logp, tokenizer, step, beta, config))
        run.load_best()
    return save_trained(config, policy, tokenizer, template), tokenizer
