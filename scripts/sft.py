"""
Teach a model to answer: supervised fine-tuning on conversations.

    python scripts/sft.py --model base --data conversations.jsonl --out sft
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.trainers.sft import SFTConfig, train

if __name__ == "__main__":
    command_line.run(train, command_line.parse(SFTConfig, "Teach a model to answer: supervised fine-tuning."))
