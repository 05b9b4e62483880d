"""
Time whole training steps: this engine against PyTorch, the same model, the same weights, the same rows, in turns.

    python scripts/bench_training.py --rounds 20

A step is forward, loss, backward, gradient norm, clipping and AdamW. Both sides start from the same weights; the losses
of the first steps stand beside each other, so that it is the same job. Where PyTorch is not installed, this engine is
timed alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from minillm.data.pack import Batch
from minillm.model import Config, build
from minillm.optim import AdamW, clip_scale
from minillm.trainers.common import next_token_backward

import numpy as np  # isort: skip  (minillm first: it sets up the threads that NumPy's BLAS will have)


def parse(arguments):
    parser = argparse.ArgumentParser(description="Time whole training steps: this engine against PyTorch, in turns.")
    sizes = {
        "vocab": 2048,
        "width": 128,
        "layers": 4,
        "heads": 4,
        "length": 128,
        "batch": 32,
        "rounds": 20,
        "workers": 1,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"({value})")
    parser.add_argument("--compile", action="store_true", help="PyTorch's side through torch.compile")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    options = parser.parse_args(arguments)
    if min(getattr(options, name) for name in sizes) < 1:
        parser.error("sizes have to be at least 1")
    return options


def minillm_step(config, seed, workers):
    """A function that makes one step on a Batch and returns the loss."""
    model = build(config, seed)
    optimizer = AdamW(model.parameters, lr=1e-3)

    def step(batch):
        loss = next_token_backward(model, batch, 0, workers)
        optimizer.step(scale=clip_scale(optimizer.grad_norm(), 1.0))
        optimizer.zero_grad()
        return loss

    return step, model


def torch_step(config, model, compiled):
    """The same in PyTorch, eager or compiled, starting from the weights that `model` has now."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

    D, H, V = config.head_dim, config.num_attention_heads, config.vocab_size
    width = config.hidden_size

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.RMSNorm(width, eps=config.norm_eps) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
            self.down = nn.Linear(config.intermediate_size, width, bias=False)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)

            def turn(y):
                a, b = y.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            y = scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, width))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
            return x + self.down(silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(V, width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_hidden_layers))
            self.norm = nn.RMSNorm(width, eps=config.norm_eps)

        def forward(self, tokens, targets):
            angle = torch.arange(tokens.shape[1])[:, None] / config.rope_theta ** (torch.arange(0, D, 2) / D)
            cos, sin = angle.cos(), angle.sin()
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = self.norm(x) @ self.embedding.weight.T
            return cross_entropy(logits.view(-1, V), targets.reshape(-1))

    theirs = Llama()
    arrays = {name: torch.from_numpy(p.data.copy()) for name, p in model.parameters.items()}

    def layer(i, name):
        return arrays[f"model.layers.{i}.{name}.weight"]

    with torch.no_grad():
        theirs.embedding.weight.copy_(arrays["model.embed_tokens.weight"])
        theirs.norm.weight.copy_(arrays["model.norm.weight"])
        for i, block in enumerate(theirs.blocks):
            block.norm1.weight.copy_(layer(i, "input_layernorm"))
            block.norm2.weight.copy_(layer(i, "post_attention_layernorm"))
            block.qkv.weight.copy_(torch.cat([layer(i, f"self_attn.{n}_proj") for n in "qkv"]))
            block.out.weight.copy_(layer(i, "self_attn.o_proj"))
            block.gate_up.weight.copy_(torch.cat([layer(i, f"mlp.{n}_proj") for n in ("gate", "up")]))
            block.down.weight.copy_(layer(i, "mlp.down_proj"))
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    run = torch.compile(theirs) if compiled else theirs

    def step(batch):
        loss = run(torch.from_numpy(batch.x.astype(np.int64)), torch.from_numpy(batch.y.astype(np.int64)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main():
    o = parse(None)
    config = Config(
        o.vocab,
        hidden_size=o.width,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        max_position_embeddings=o.length,
    )
    rng = np.random.default_rng(o.seed)
    start, mask = np.zeros((o.batch, o.length), np.int32), np.ones((o.batch, o.length), bool)
    shape = (o.batch, o.length + 1)
    batches = [Batch(rng.integers(0, o.vocab, shape).astype(np.int32), start, mask) for _ in range(o.rounds + 3)]
    ours, model = minillm_step(config, o.seed, o.workers)
    sides = {"minillm": ours}
    try:
        import torch

        name = f"PyTorch {torch.__version__}, {'compiled' if o.compile else 'eager'}, {torch.get_num_threads()} threads"
        sides[name] = torch_step(config, model, o.compile)
    except ModuleNotFoundError:
        print("PyTorch is not installed: this engine alone")
    parameters = sum(p.size for p in model.parameters.values())
    print(f"{parameters:,} parameters, {o.batch} rows of {o.length} tokens, float32")
    times, losses = {name: [] for name in sides}, {name: [] for name in sides}
    for n, batch in enumerate(batches):
        for name, step in sides.items():
            begin = time.perf_counter()
            losses[name].append(step(batch))
            if n >= 3:  # the first ones compile and warm up
                times[name].append(time.perf_counter() - begin)
    print(f"{'':<40}{'best ms':>9}{'median ms':>11}{'tokens/s':>10}   losses of the first steps")
    for name in sides:
        best, median = min(times[name]), statistics.median(times[name])
        shown = " ".join(f"{loss:.5f}" for loss in losses[name][:4])
        print(f"{name:<40}{best * 1e3:>9.1f}{median * 1e3:>11.1f}{o.batch * o.length / median:>10,.0f}   {shown}")
    if len(sides) == 2:
        first, second = times.values()
        ratios = sorted(b / a for a, b in zip(first, second, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        median = statistics.median(ratios)
        spread = f"median of {len(ratios)} pairs of steps; middle half {low:.2f} to {high:.2f}"
        print(f"speed against PyTorch: {median:.2f}x ({spread})")


if __name__ == "__main__":
    main()
