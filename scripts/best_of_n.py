"""
Sample n answers to each prompt and keep the best by a reward model, as conversations for scripts/sft.py.

    python scripts/best_of_n.py --model sft --reward reward --prompts prompts.jsonl --n 8 --out best
    python scripts/sft.py --model sft --data best/best.jsonl --out best_sft
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.trainers.best_of_n import BestOfNConfig, best_of_n

if __name__ == "__main__":
    command_line.run(best_of_n, command_line.parse(BestOfNConfig, "Keep the best of n sampled answers to each prompt."))
