"""
Best of n (rejection sampling): sample n answers to each prompt and keep the one the reward model likes best.

The kept answers are conversations for scripts/sft.py, the baseline that PPO and DPO have to beat. Drawing the best of n
moves the policy by at most log n - (n - 1) / n nats (Beirami et al. 2024: a bound, with equality only where no two
answers score the same), so n plays the part of 1 / beta.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..chat import stop_ids
from ..data.conversations import encode_prompts, question_of, read_prompts
from ..data.readers import Bad
from ..generate import generate
from .common import ChatSettings, load_judge, load_tokenizer, padding_of, read_files, template_of
from .ppo import as_answer, model_rewards
from .run import claim, in_its_folder


@dataclass(kw_only=True)
class BestOfNConfig(ChatSettings):
    """Best of n against a reward model. It samples and trains nothing."""

    tensorboard = resume = False  # no options: what `claim` wants to know of a trainer

    out: Path
    """the folder to make: best.jsonl with the kept conversations, settings.json"""
    model: Path
    """the model that answers"""
    reward: Path
    """the reward model's folder"""
    prompts: tuple[Path, ...]
    """prompts: JSON lines of {"messages": [...]} or {"prompt": ...}"""
    n: int = 8
    """answers to each prompt"""
    batch_size: int = 32
    """prompts at once"""
    max_new_tokens: int = 48
    """the longest answer"""
    temperature: float = 1.0
    """of sampling"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("n", "batch_size", "max_new_tokens"):
            self.at_least(name, 1)
        self.above("temperature", 0)
        if not self.prompts:
            raise ValueError("--prompts needs at least one file")


@in_its_folder
def best_of_n(config):
    """Write best.jsonl to the output folder, one conversation for each prompt with its score and the scores of all its
    answers; returns the means {"first": ..., "best": ...}. Answers that do not end are kept only if none does."""
    tokenizer, template = load_tokenizer(config.model), template_of(config.model, config.template)
    model = config.load(config.model, "lm")
    reward_model = load_judge(config, tokenizer, template, model.config.vocab_size)
    context = min(model.config.max_position_embeddings, reward_model.config.max_position_embeddings)
    if config.max_new_tokens >= context:
        config.refuse("max_new_tokens", f"below the models' context of {context} tokens")
    prompts = read_files(config.prompts, read_prompts, Bad(config.skip_bad))
    examples = encode_prompts(prompts, template, tokenizer, context - config.max_new_tokens).checked("--prompts")
    score = model_rewards(reward_model, padding_of(tokenizer))
    stop = stop_ids(template, tokenizer)
    claim(config)
    first, best = [], []
    with open(config.out / "best.jsonl", "w", encoding="utf-8") as file:
        for begin in tqdm(range(0, len(examples), config.batch_size), unit="batch", disable=None):  # where nobody looks
            part = examples[begin : begin + config.batch_size]
            answers = generate(
                model,
                [ids for ids, _ in part for _ in range(config.n)],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                stop_tokens=stop,
                seed=[(config.seed, begin + i, k) for i in range(len(part)) for k in range(config.n)],
            )
            found = score([as_answer(a.prompt, a.ids) for a in answers]).reshape(len(part), config.n)
            ended = np.array([a.finish == "stop" for a in answers]).reshape(found.shape)
            choice = np.where(ended | ~ended.any(1, keepdims=True), found, -np.inf).argmax(1)
            for i, (_, prompt) in enumerate(part):
                text = tokenizer.decode(answers[i * config.n + choice[i]].ids, skip_special=True)
                messages = [*question_of(prompt.messages), {"role": "assistant", "content": text}]
                row = {"messages": messages, "score": found[i, choice[i]], "scores": found[i].tolist()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            first += found[:, 0].tolist()
            best += found[np.arange(len(part)), choice].tolist()
    means = {"first": float(np.mean(first)), "best": float(np.mean(best))}
    told = f"mean score {means['first']:.3f} of one answer, {means['best']:.3f} of the best of {config.n}"
    print(f"{len(examples):,} prompts: {told}")
    print(f"written to {config.out / 'best.jsonl'}, for scripts/sft.py --data")
    return means
