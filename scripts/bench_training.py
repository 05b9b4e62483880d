"""
Time whole training steps: this engine against PyTorch, the same model, the same weights, the same rows, in turns.

    python scripts/bench_training.py --rounds 20
    python scripts/bench_training.py --device cuda --precision bfloat16 --compile --vocab 50304 --width 768 \\
        --layers 12 --heads 12 --length 1024 --batch 32

A step is forward, loss, backward, gradient norm, clipping and AdamW. Both sides start from the same weights; the losses
of the first steps stand beside each other, so that it is the same job. With --graph an update of ours is recorded as a
CUDA graph and launched as one, as pretrain.py --cuda-graph does it. Where PyTorch is not installed, this engine is
timed alone. On a GPU a turn is --steps steps, after which the GPU is waited for, and not one: neither side waits for it
within them. With bfloat16, PyTorch's side runs under autocast; weights, gradients and moments are float32 on both.
"""

import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.data.pack import Batch
from minillm.kernels.device import check_device, to_host, xp_of
from minillm.model import Config, build
from minillm.optim import AdamW, clip_scale, gpu_clip_scale
from minillm.scaling import flops_per_token
from minillm.trainers.common import next_token_backward
from minillm.trainers.recorded import RecordedUpdate

import numpy as np  # isort: skip  (minillm first: it sets up the threads that NumPy's BLAS will have)


def parse(arguments):
    parser = command_line.Parser(description="Time whole training steps: this engine against PyTorch, in turns.")
    sizes = {
        "vocab": 2048,
        "width": 128,
        "layers": 4,
        "heads": 4,
        "length": 128,
        "batch": 32,
        "rounds": 20,
        "workers": 1,
        "steps": 0,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"({value})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--compile", action="store_true", help="PyTorch's side through torch.compile")
    parser.add_argument("--graph", action="store_true", help="this engine's side as a CUDA graph")
    parser.add_argument("--kernels", metavar="NAME", help="take this version of the kernels that have it: cuda_wgmma")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (1 if options.device == "cpu" else 10)
    for name in sizes:
        if (size := getattr(options, name)) < 1:
            parser.error(f"--{name} has to be at least 1, and is {size}")
    if options.device == "cuda" and options.workers > 1:
        parser.error("--workers are for the processor's cores")
    if options.device == "cpu" and options.graph:
        parser.error("--graph is for --device cuda")
    try:
        options.config = config_of(options)
        check_device(options.device)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return options


def config_of(o):
    """The Config of these sizes. ValueError: they do not go together, in the options' names."""
    try:
        return Config(
            o.vocab,
            hidden_size=o.width,
            num_hidden_layers=o.layers,
            num_attention_heads=o.heads,
            max_position_embeddings=o.length,
        )
    except ValueError as error:
        names = {"num_attention_heads": "--heads", "hidden_size": "--width"}
        told = re.sub("Config\\.", "", str(error))
        raise ValueError(re.sub("|".join(names), lambda match: names[match[0]], told)) from None


def minillm_step(config, o):
    """(step, model, memory): step(batch) makes one step and returns the loss, which on a GPU nobody has waited for, and
    memory() says how many bytes of the GPU it has taken."""
    model = build(config, o.seed).to(o.device, o.precision)
    optimizer = AdamW(model.parameters, lr=1e-3)
    scale_of = gpu_clip_scale if o.device == "cuda" else clip_scale
    recorded = RecordedUpdate(model, optimizer, 0, 1.0) if o.graph else None

    def step_as_graph(batch):
        return recorded(batch, optimizer.lr)["loss"].copy()  # the next call overwrites it

    def step(batch):
        loss = next_token_backward(model, batch, 0, o.workers)
        optimizer.step(scale=scale_of(optimizer.grad_norm(), 1.0))
        optimizer.zero_grad()
        return loss

    def memory():
        pool = xp_of(model.flat).get_default_memory_pool()
        return pool.total_bytes() + (recorded.graph.memory() if o.graph else 0)

    return step_as_graph if o.graph else step, model, memory


def torch_step(config, model, o):
    """The same in PyTorch, eager or compiled, starting from the weights that `model` has now."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention, silu

    D, H, V = config.head_dim, config.num_attention_heads, config.vocab_size
    width = config.hidden_size

    def normed(norm, x):  # of one dtype with its weight, else PyTorch's fused version is not taken
        return rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.RMSNorm(width, eps=config.norm_eps) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
            self.down = nn.Linear(config.intermediate_size, width, bias=False)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            q, k, v = self.qkv(normed(self.norm1, x)).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)

            def turn(y):
                a, b = y.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            y = scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, width))
            gate, up = self.gate_up(normed(self.norm2, x)).chunk(2, -1)
            return x + self.down(silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(V, width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_hidden_layers))
            self.norm = nn.RMSNorm(width, eps=config.norm_eps)

        def forward(self, tokens, targets):
            position, pair = (torch.arange(*n, device=tokens.device) for n in ((tokens.shape[1],), (0, D, 2)))
            angle = position[:, None] / config.rope_theta ** (pair / D)
            x = self.embedding(tokens)
            cos, sin = angle.cos().to(kind), angle.sin().to(kind)
            x = x.to(kind)
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = normed(self.norm, x) @ self.embedding.weight.T
            return cross_entropy(logits.view(-1, V), targets.reshape(-1))

    kind = getattr(torch, o.precision)
    theirs = Llama().to(o.device)
    arrays = {name: torch.from_numpy(to_host(p.data).copy()) for name, p in model.parameters.items()}

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
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=o.device == "cuda" or None)
    run = torch.compile(theirs) if o.compile else theirs

    def step(batch):
        x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in (batch.x, batch.y))
        if o.device == "cuda":  # from memory that is not pinned, the copy would wait for the GPU
            x, y = (ids.pin_memory().to(o.device, non_blocking=True) for ids in (x, y))
        with torch.autocast(o.device, kind, enabled=o.precision != "float32"):
            loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() if o.device == "cpu" else loss.detach()

    return step


def bench(o):
    config = o.config
    rng = np.random.default_rng(o.seed)
    start, mask = np.zeros((o.batch, o.length), np.int32), np.ones((o.batch, o.length), bool)
    shape, turns = (o.batch, o.length + 1), o.rounds + 3
    batches = [Batch(rng.integers(0, o.vocab, shape).astype(np.int32), start, mask) for _ in range(turns * o.steps)]
    if o.kernels:
        os.environ["MINILLM_KERNELS"] = o.kernels
    ours, model, memory = minillm_step(config, o)
    sides, memories = {"minillm": ours}, {"minillm": memory}
    try:
        import torch

        where = f"{torch.get_num_threads()} threads" if o.device == "cpu" else torch.cuda.get_device_name()
        name = f"PyTorch {torch.__version__}, {'compiled' if o.compile else 'eager'}, {where}"
        sides[name], memories[name] = torch_step(config, model, o), torch.cuda.max_memory_reserved
    except ModuleNotFoundError:
        print("PyTorch is not installed: this engine alone")
    parameters = sum(p.size for p in model.parameters.values())
    print(f"{parameters:,} parameters, {o.batch} rows of {o.length} tokens, {o.precision}, {o.device}")
    times, losses = {name: [] for name in sides}, {name: [] for name in sides}
    for turn in range(turns):
        for name, step in sides.items():
            begin = time.perf_counter()
            found = [step(batch) for batch in batches[turn * o.steps : (turn + 1) * o.steps]]
            losses[name] += map(float, found)  # waits for the GPU
            if turn >= 3:  # the first ones compile and warm up
                times[name].append((time.perf_counter() - begin) / o.steps)
    print(f"{'':<48}{'best ms':>9}{'median ms':>11}{'tokens/s':>12}   losses of the first steps")
    tokens, noted = o.batch * o.length, {"command": " ".join(sys.argv), "parameters": parameters}
    for name in sides:
        best, median = min(times[name]), statistics.median(times[name])
        shown = " ".join(f"{loss:.5f}" for loss in losses[name][:4])
        print(f"{name:<48}{best * 1e3:>9.1f}{median * 1e3:>11.1f}{tokens / median:>12,.0f}   {shown}")
        noted[name] = {"median": median, "best": best, "tokens_per_second": tokens / median, "losses": losses[name]}
    if o.device == "cuda":
        operations = tokens * flops_per_token(config, o.length)["training"]
        for name in sides:
            memory, rate = memories[name](), operations / noted[name]["median"]
            noted[name] |= {"memory": memory, "operations_per_second": rate}
            print(f"{name:<48}{rate / 1e12:>9.1f} TFLOP/s of the model, {memory / 2**30:.1f} GiB")
    if len(sides) == 2:
        first, second = times.values()
        ratios = sorted(b / a for a, b in zip(first, second, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        median = noted["ratio"] = statistics.median(ratios)
        spread = f"median of {len(ratios)} pairs of turns; middle half {low:.2f} to {high:.2f}"
        print(f"speed against PyTorch: {median:.2f}x ({spread})")
    if o.json:
        o.json.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command_line.run(bench, parse(None))
