"""
Train a language model from nothing, or go on with one.

    python scripts/prepare.py texts/ --out prepared
    python scripts/pretrain.py --data prepared --out base
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.trainers.pretrain import PretrainConfig, train

if __name__ == "__main__":
    command_line.run(
        train, command_line.parse(PretrainConfig, "Train a language model from nothing, or go on with one.")
    )
