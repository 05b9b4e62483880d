"""
Train a reward model on preferences.

    python scripts/reward.py --model sft --data preferences.jsonl --out reward
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.trainers.reward import RewardConfig, train

if __name__ == "__main__":
    command_line.run(train, command_line.parse(RewardConfig, "Train a reward model on preferences."))
