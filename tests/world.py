"""A world that is small enough to train in seconds: inputs and settings of all five trainers, and what they leave."""

import json

from minillm.data.datasets import TokenWriter
from minillm.model import Config, build
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers import common, dpo, ppo, pretrain, reward, sft

TOKENIZER = Tokenizer.train([], SMALLEST_VOCABULARY)
OFTEN = {"save_every": 2, "save_minutes": 0.0, "log_every": 3, "eval_every": 4, "samples": 1}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_world(root):
    """Inputs of all five trainers in the folder `root`, so few that their steps go through several epochs; `root`."""
    data = root / "data"
    data.mkdir()
    TOKENIZER.save(data)
    pieces = {"train": {}, "validation": {}}
    for split, count in (("train", 9), ("validation", 2)):
        for source in ("cats", "dogs"):
            with TokenWriter(data / f"{source}.{split}", TOKENIZER.vocab_size) as writer:
                for i in range(count):
                    text = f"{source} number {i} sat on the mat."
                    writer.add([TOKENIZER.bos_id, *TOKENIZER.encode(text).tolist(), TOKENIZER.eos_id])
            pieces[split][source] = writer.piece
    (data / "manifest.json").write_text(json.dumps({"format": 1, "tokens": pieces}), encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96}
    for name, head in (("base", "lm"), ("reward", "scalar")):
        model = build(Config(vocab_size=TOKENIZER.vocab_size, head=head, **sizes), seed=3)
        common.save_model(root / name, model, TOKENIZER, "chatml")
    asked = [{"role": "user", "content": f"{i}?"} for i in range(10)]
    write_rows(root / "chat.jsonl", [{"messages": [q, {"role": "assistant", "content": "yes"}]} for q in asked])
    pair = lambda q: {"prompt": q["content"], "chosen": "yes", "rejected": f"no {q['content']}"}
    write_rows(root / "pairs.jsonl", [pair(q) for q in asked])
    write_rows(root / "prompts.jsonl", [{"messages": [q]} for q in asked])
    return root


def config(world, name, out, **options):
    """Settings of some 9 updates of a trainer, through more than one epoch, with four micro-batches in each update."""
    start = {"model": world / "base"}
    kinds = {
        "pretrain": (
            pretrain.PretrainConfig,
            {"data": world / "data", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "length": 24, "batch_size": 4, "micro_batch_size": 1, "tokens": 9 * 4 * 24},
        ),
        "sft": (
            sft.SFTConfig,
            {**start, "data": (world / "chat.jsonl",), "batch_size": 4, "micro_batch_size": 1, "epochs": 3.0,
             "packing": "pad", "replay": world / "data", "length": 40, "held_out": 0.2, "max_new_tokens": 4},
        ),
        "reward": (
            reward.RewardConfig,
            {**start, "data": (world / "pairs.jsonl",), "batch_size": 4, "micro_batch_size": 1, "epochs": 4.0,
             "held_out": 0.2},
        ),
        "dpo": (
            dpo.DPOConfig,
            {**start, "data": (world / "pairs.jsonl",), "batch_size": 4, "micro_batch_size": 1, "epochs": 4.0,
             "held_out": 0.2, "max_new_tokens": 4},
        ),
        "ppo": (
            ppo.PPOConfig,
            {**start, "reward": world / "reward", "prompts": (world / "prompts.jsonl",), "episodes": 28,
             "batch_size": 4, "micro_batch_size": 2, "minibatch_size": 2, "ppo_epochs": 2, "value_warmup": 2,
             "max_new_tokens": 4, "reference_samples": 8, "target_kl": 0.1, "flight_record": 3, "held_out": 0.2},
        ),
    }  # fmt: skip
    kind, told = kinds[name]
    return kind(out=out, **OFTEN | told | options)


TRAINERS = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


def left(out):
    """Everything that a run leaves for its user: the files' bytes, and the metrics without what a clock says."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or name in ("settings.json", "environment.json") or name.startswith("checkpoints/"):
            continue
        found[name] = path.read_bytes()
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in found[name].splitlines()]
            found[name] = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return found
