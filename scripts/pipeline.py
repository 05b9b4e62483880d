"""
From raw text to an aligned model: data, tokenizer, pretraining, SFT, reward model, PPO, DPO and a report.

    python scripts/pipeline.py                        # a world whose answers can be checked: 12 to 24 minutes
    python scripts/pipeline.py --size tiny --out tiny # the same in a minute, to try it
    python scripts/pipeline.py --pretrain-data texts/ --sft-data sft.jsonl --preference-data pairs.jsonl \\
        --prompts prompts.jsonl --out mine

Started again with the same options it goes on where it was stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.pipeline import PipelineConfig, run

if __name__ == "__main__":
    command_line.run(run, command_line.parse(PipelineConfig, "From raw text to an aligned model, in one command."))
