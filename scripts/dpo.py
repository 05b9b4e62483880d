"""
Train a policy on preferences directly (DPO).

    python scripts/dpo.py --model sft --data preferences.jsonl --out dpo
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.trainers.dpo import DPOConfig, train

if __name__ == "__main__":
    command_line.run(train, command_line.parse(DPOConfig, "Train a policy on preferences directly (DPO)."))
