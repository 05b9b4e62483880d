"""
PyTorch's own versions of the kernels, to be timed beside ours where PyTorch is installed (bench_kernels.py).

They share the arrays' memory through DLPack, and compute the same result from the same arguments: its attention (SDPA
with the FlashAttention back end and with cuDNN's), its fused AdamW, and for the rest the plain formula through
torch.compile, which makes Triton kernels of it.
"""

import functools
import importlib

import numpy as np


def counterparts(name, args, kwargs):
    """{what it is: function of the kernel's arguments, as `tensor` makes them} for a kernel; {} where PyTorch is not
    there or has none."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        return {}
    if not torch.cuda.is_available() or name not in MAKERS:
        return {}
    return MAKERS[name](torch, args, kwargs)


def tensor(x):
    """An array as a Tensor on the same memory; what is no array stays as it is. DLPack has no name for CuPy's
    ml_dtypes, so bfloat16 travels as 16 bits."""
    if not hasattr(x, "dtype") or isinstance(x, np.generic) or x.ndim == 0:
        return x
    torch = importlib.import_module("torch")
    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def compiled(torch, formula):
    return {"torch.compile": torch.compile(formula)}


def attention_forward(torch, args, kwargs):
    """SDPA knows causality, not `start`: the timed example has every start at 0."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def through(back_end):
        def forward(q, k, v, start, scale):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with torch.nn.attention.sdpa_kernel(back_end):
                o = sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            return o.transpose(1, 2)

        return forward

    return {what: through(back_end) for what, back_end in _back_ends(torch, args).items()}


def _back_ends(torch, args):
    """Those that take 16-bit floats alone."""
    kinds = torch.nn.attention.SDPBackend
    both = {"torch FlashAttention": kinds.FLASH_ATTENTION, "torch cuDNN": kinds.CUDNN_ATTENTION}
    return both if args[0].dtype.itemsize == 2 else {}


def attention_backward(torch, args, kwargs):
    """The backward alone: the graph of one forward is kept, and walked again at every call."""
    do, q, k, v, _, _, start, scale = (tensor(x) for x in args)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def backward_of(forward):
        kept = functools.cache(lambda: forward(q, k, v, start, scale))
        return lambda *_: torch.autograd.grad(kept(), (q, k, v), do, retain_graph=True)

    return {what: backward_of(forward) for what, forward in attention_forward(torch, args, kwargs).items()}


def cross_entropy_forward(torch, args, kwargs):
    return compiled(
        torch,
        lambda logits, targets, scale: torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"),
    )


def cross_entropy_fused_inplace(torch, args, kwargs):
    """Loss and gradient of the logits: what the fused kernel makes of one reading."""

    @torch.compile
    def both(logits, targets, weights):
        wide = logits.float()
        m = wide.amax(1, keepdim=True)
        e = (wide - m).exp()
        total = e.sum(1, keepdim=True)
        hit = torch.arange(wide.shape[1], device=wide.device) == targets[:, None]
        loss = (total.log() + m - wide.gather(1, targets.clamp(min=0)[:, None]))[:, 0] * weights
        return loss, ((e / total - hit) * weights[:, None]).to(logits.dtype)

    return {"torch.compile": lambda logits, targets, *rest: both(logits, targets, rest[0])}


def rms_norm_forward(torch, args, kwargs):
    norm = torch.nn.functional.rms_norm
    formula = lambda x, weight, eps: norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return {"torch eager": formula, **compiled(torch, formula)}


def rms_norm_backward(torch, args, kwargs):
    def formula(dy, x, weight, r):
        wide, dy = x.float(), dy.float()
        r = r.reshape(-1, 1)
        n, h = wide * r, dy * weight
        return (r * (h - n * (h * n).mean(-1, keepdim=True))).to(x.dtype), (dy * n).sum(0)

    return compiled(torch, formula)


def swiglu_forward(torch, args, kwargs):
    formula = lambda gate, up: torch.nn.functional.silu(gate) * up
    return {"torch eager": formula, **compiled(torch, formula)}


def swiglu_backward(torch, args, kwargs):
    def formula(dy, gate, up):
        wide, s = gate.float(), torch.sigmoid(gate.float())
        dgate = dy.float() * up.float() * s * (1 + wide * (1 - s))
        return dgate.to(gate.dtype), (dy.float() * wide * s).to(up.dtype)

    return compiled(torch, formula)


def rope(torch, args, kwargs):
    def formula(x, cos, sin, heads, way):
        a, b = x[:, :, :heads].float().chunk(2, -1)
        cos, sin = cos[:, None], way * sin[:, None]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
        return torch.cat((turned, x[:, :, heads:]), 2)

    return compiled(torch, formula)


def adamw_inplace(torch, args, kwargs):
    """PyTorch's fused AdamW on the same memory, as one parameter. It counts its own updates, so the learning rate and
    the weight decay are those that the schedule has at a first update."""
    parameter, g = torch.nn.Parameter(tensor(args[0])), tensor(args[3])
    ((keep, rate, _),) = args[4].tolist()
    lr = rate * (1 - kwargs["beta1"])
    options = {"lr": lr, "betas": (kwargs["beta1"], kwargs["beta2"]), "eps": kwargs["eps"]}
    optimizer = torch.optim.AdamW([parameter], weight_decay=(1 - keep) / lr, fused=True, **options)
    parameter.grad = g
    return {"torch fused": lambda *_: optimizer.step()}


def embedding_forward(torch, args, kwargs):
    return {"torch eager": lambda weight, ids: torch.nn.functional.embedding(ids, weight)}


def embedding_backward(torch, args, kwargs):
    """PyTorch's own, which sorts the ids, too."""
    aten = torch.ops.aten.embedding_dense_backward
    return {"torch eager": lambda dy, ids, V: aten(dy, ids, V, -1, False)}


MAKERS = {
    f.__name__: f
    for f in (
        attention_forward,
        attention_backward,
        cross_entropy_forward,
        cross_entropy_fused_inplace,
        rms_norm_forward,
        rms_norm_backward,
        swiglu_forward,
        swiglu_backward,
        rope,
        adamw_inplace,
        embedding_forward,
        embedding_backward,
    )
}
