"""
PPO with and without the KL penalty: the reward model's score rises in both, the gold reward does not.

    python scripts/reward_hacking.py pipeline --out hacking

Takes the SFT model and the reward model of a folder of scripts/pipeline.py (on the atlas, where the gold reward is
known), trains PPO once with each beta on the same prompts and random numbers, and draws what the reward model thinks of
the answers to the development questions, what they are worth, and how far the policy has gone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.report import Line, Panel, draw, read_metrics, table_lines
from minillm.trainers import ppo


@dataclass(kw_only=True)
class Options:
    """Reward hacking."""

    pipeline: tyro.conf.Positional[Path]
    """a folder of scripts/pipeline.py"""
    out: Path = Path("hacking")
    """the folder of the runs, of hacking.png and table.txt"""
    betas: tuple[float, ...] = (0.0, 0.05)
    """the prices of KL to compare"""
    episodes: int = 6400
    """answers to sample in each run"""
    lr: float = 3e-4
    """the policy's learning rate: higher than the pipeline's, to see in minutes where it leads"""
    seed: int = 0
    """the random numbers, the same for each beta"""
    overwrite: bool = False
    """replace runs that are there"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: the GPU, by CuPy"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of activations and products; bfloat16 is for GPUs"""

    def __post_init__(self):
        if len(set(self.betas)) < 2 or min(self.betas) < 0:
            raise ValueError(f"--betas has to be at least two different numbers from 0 on, and is {self.betas}")
        least = ppo.PPOConfig.value_warmup * ppo.PPOConfig.batch_size + 1
        if self.episodes < least:
            warmup = f"as the first {least - 1} teach the value model alone"
            raise ValueError(f"--episodes has to be at least {least}, {warmup}, and is {self.episodes}")
        if not (self.pipeline / "data" / "dev.jsonl").exists():
            raise ValueError(f"{self.pipeline} has no data/dev.jsonl: it is no folder of the pipeline on the atlas")


CURVES = (
    ("score by the reward model, in its sd", "scores"),
    ("gold reward", "gold"),
    ("right", "right"),
    ("KL to the SFT model, nats per answer", "kl"),
    ("the reward model's accuracy on the answers", "reward_accuracy"),
    ("tokens of an answer", "length"),
)


def compare(options):
    runs = {}
    for beta in options.betas:
        out = options.out / f"beta-{beta:g}"
        folder = options.pipeline
        ppo.train(
            ppo.PPOConfig(
                out=out,
                overwrite=options.overwrite,
                model=folder / "sft",
                reward=folder / "reward",
                prompts=(folder / "data" / "prompts.jsonl",),
                questions=folder / "data" / "dev.jsonl",
                episodes=options.episodes,
                beta=beta,
                lr=options.lr,
                schedule="constant",
                seed=options.seed,
                device=options.device,
                precision=options.precision,
                eval_every=5,
                samples=4,
            )
        )
        runs[f"beta {beta:g}"] = read_metrics(out)
    panels = [
        Panel(title, [Line(label, *curves[f"eval_{metric}"]) for label, curves in runs.items()], xlabel="round")
        for title, metric in CURVES
    ]
    draw(panels, options.out / "hacking.png")
    rows = []
    for label, curves in runs.items():
        for title, metric in CURVES[:4]:
            _, values = curves[f"eval_{metric}"]
            rows.append((label, title, values[0], max(values), values[-1]))
    lines = table_lines(("", "of answers to development questions", "before", "highest", "at the end"), rows)
    (options.out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines) + f"\n{options.out / 'hacking.png'}")


if __name__ == "__main__":
    command_line.run(compare, command_line.parse(Options, "PPO with and without the KL penalty."))
