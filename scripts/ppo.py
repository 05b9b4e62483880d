"""
Train a policy against a reward model with PPO.

    python scripts/ppo.py --model sft --reward reward --prompts prompts.jsonl --out ppo
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.trainers.ppo import PPOConfig, train

if __name__ == "__main__":
    command_line.run(train, command_line.parse(PPOConfig, "Train a policy against a reward model with PPO."))
