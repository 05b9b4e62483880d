"""
Plant one fault at a time in a copy of the engine, the objectives, the optimizer, the trainers and the data pipeline,
and see whether the tests notice: what a green suite is worth.

    python scripts/mutants.py
    python scripts/mutants.py --only attention --jobs 1
    python scripts/mutants.py --only losses optim trainers/ data/
    python scripts/mutants.py --list

A mutant is killed when a test of its own area fails on it (or crashes, or hangs: "timeout"); see TESTS. It has SURVIVED
when all of them pass, and then a test is missing. Exit status: 0 if all were killed, 1 if one survived, 2 if nothing
can be said: a wrong option, a mutant whose text is gone from its file, tests that fail without any fault.
"""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# The engine's tests, the quick ones first.
ENGINE = [
    "tests/test_autograd.py",
    "tests/test_functional.py",
    "tests/test_cross_entropy.py",
    "tests/test_model_gradient.py",
    "tests/test_attention.py",
    "tests/test_gradients.py",
    "tests/test_kernels.py",
]

# The tests of the other areas. What a file's own tests do not notice is not made good by a trainer that learns less.
TRAINERS = ["tests/test_exact.py", "tests/test_trainers.py"]
DEVICE = "tests/test_device.py"
AREAS = {
    "kernels/device.py": ["tests/test_functional.py", DEVICE],
    "minillm/losses.py": ["tests/test_losses.py"],
    "minillm/optim.py": ["tests/test_optim.py", DEVICE],
    "minillm/lora.py": ["tests/test_lora.py"],
    "minillm/model.py": ["tests/test_model.py", "tests/test_generate.py"],
    "minillm/generate.py": ["tests/test_generate.py"],
    "minillm/batching.py": ["tests/test_serve.py"],
    "minillm/chat.py": ["tests/test_chat.py"],
    "minillm/trainers/common.py": TRAINERS,
    "minillm/checkpoint.py": ["tests/test_checkpoint.py"],
    "minillm/trainers/run.py": ["tests/test_resume.py", "tests/test_trainers.py", DEVICE],
    "kernels/adamw.py": ["tests/test_optim.py", "tests/test_kernels.py", "tests/test_cuda_kernels.py"],
    "kernels/kernel.py": ["tests/test_kernels.py"],
    "kernels/cuda.py": ["tests/test_cuda.py"],
    "kernels/blas.py": ["tests/test_blas.py"],
    "kernels/graph.py": ["tests/test_graph.py"],
    "minillm/trainers/recorded.py": ["tests/test_graph.py"],
    "minillm/trainers/pretrain.py": TRAINERS,
    "minillm/trainers/sft.py": TRAINERS,
    "minillm/trainers/reward.py": TRAINERS,
    "minillm/trainers/dpo.py": TRAINERS,
    "minillm/trainers/ppo.py": TRAINERS,
    "minillm/trainers/evaluation.py": ["tests/test_evaluation.py"],
    "minillm/pipeline.py": ["tests/test_pipeline.py"],
    "minillm/data/pack.py": ["tests/test_pack.py"],
    "minillm/data/datasets.py": ["tests/test_datasets.py"],
    "minillm/files.py": ["tests/test_readers.py", "tests/test_untrusted.py"],
    "minillm/data/readers.py": ["tests/test_readers.py"],
    "minillm/data/clean.py": ["tests/test_clean.py"],
    "minillm/data/filters.py": ["tests/test_filters.py"],
    "minillm/data/dedup.py": ["tests/test_dedup.py"],
    "minillm/data/conversations.py": ["tests/test_conversations.py"],
}

# file: (text that occurs in it once, what a tired author might have written, the fault). A fault begins with a word
# that pytest -k understands: the tests with that word in their names run first, because they are likely to notice.
FAULTS = {
    "minillm/autograd.py": [
        ("unbroadcast(-g, ys)", "unbroadcast(g, ys)", "sub: dy has the sign of dx"),
        ("unbroadcast(-g * z / y, ys)", "unbroadcast(-g * z, ys)", "div: dy is not divided by y"),
        ("(lambda g: g if scale == 1 else scale * g,)", "(lambda g: g,)", "affine: dx without the scale"),
        ("xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.abs(x)))", "-xp.log1p(xp.exp(-x))", "log_sigmoid: e^-x overflows"),
        (
            "first, xs, ys = x >= y, x.shape, y.shape",
            "first, xs, ys = x > y, x.shape, y.shape",
            "maximum: at a tie the second side gets the gradient",
        ),
        (
            "xp.where(condition, g.dtype.type(0), g)",
            "g * ~condition",
            "where: what was not chosen gets 0 times g, which may be infinite",
        ),
        ("(chosen / chosen.sum(axis, keepdims=True, dtype=g.dtype))", "chosen", "max: ties do not share the gradient"),
        ("_expand(g / n, shape,", "_expand(g, shape,", "mean: dx is not divided by n"),
        (
            "m = xp.where(xp.isfinite(m), m, x.dtype.type(0))",
            "m = xp.zeros_like(m)",
            "logsumexp: x is not shifted by its maximum and e^x overflows",
        ),
        ("else xp.zeros(shape, dtype)", "else xp.zeros(shape)", "autograd: an unused result's zeros are float64"),
        ("back = tuple(axes.index(i) for i in range(x.ndim))", "back = axes", "transpose: turned again, not back"),
        ("xp.add.at(dx, index, g)", "dx[index] += g", "getitem: an element picked twice gets one gradient"),
        ("xp.add.at(dx, tuple(at), g)", "dx[tuple(at)] += g", "gather: a place taken twice gets one gradient"),
        (
            "return g.sum(tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1), keepdims=True)",
            "return g",
            "unbroadcast: axes of size 1 are not summed",
        ),
        ("total = total + g", "total = g", "autograd: of a result used twice only the last gradient counts"),
        ("have[index] = g, False", "have[index] = g, True", "autograd: adds in place into an array that others hold"),
        (
            "sorted(pending, key=lambda n: n.born, reverse=True)",
            "list(pending)",
            "autograd: a node runs back before all of its gradient is there",
        ),
        ("leaf.grad += g", "leaf.grad = g", "autograd: a second backward() forgets the first one's gradient"),
        (".array(g, dtype=leaf.dtype)", ".asarray(g, dtype=leaf.dtype)", "autograd: two leaves share one gradient"),
        ("node.parents, node.way_back = (), None", "pass", "autograd: a graph is not freed, and may be used again"),
        ("_recording.reset(token)", '_recording.set("yes")', "no_grad: the end of an inner one ends the outer one"),
        (
            'with _record("inputs only" if _recording.get() != "no" else "no"):',
            'with _record("no"):',
            "checkpoint: a parameter that is not among the inputs loses its gradient without a word",
        ),
        ('with _record("yes"):', "with contextlib.nullcontext():", "checkpoint: under no_grad the replay is lost"),
    ],
    "minillm/functional.py": [
        ("sums = multiply(ones, ", "sums = multiply(ones / rows, ", "linear: dbias is a mean"),
        ("return sums[0] if into is None else into", "return sums[0]", "bias: its gradient is added twice"),
        ("y * (g - (g * y).sum(axis, keepdims=True))", "y * (g - g * y)", "softmax: dx without the sum over the slice"),
        ("a * a.dtype.type(1 / (1 - p))", "a", "dropout: what is kept is not divided by 1 - p"),
        ("sin, heads, -1)", "sin, heads, 1)", "rope: the gradient is turned forwards"),
        (
            "cos, sin = cos[offset : offset + x.shape[1]], sin[offset : offset + x.shape[1]]",
            "cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]",
            "rope: the offset is forgotten",
        ),
        (
            "used.astype(like) / xp_of(targets).maximum(used.sum(), 1).astype(like)",
            "used.astype(like) / xp_of(targets).maximum(used.size, 1).astype(like)",
            "cross_entropy: the mean counts ignored tokens too",
        ),
        ("1 + 2 * z_loss *", "1 + z_loss *", "cross_entropy: the z-loss's gradient without the 2"),
        (
            "label_smoothing - 1, -label_smoothing / V\n",
            "label_smoothing - 1, -label_smoothing\n",
            "cross_entropy: label smoothing without 1 / V",
        ),
        ("wg = w * g", "wg = w", "cross_entropy: the incoming gradient is forgotten"),
        (
            "m, log_total, *coefficients, 1 / temperature)",
            "m, log_total, *coefficients, 1.0)",
            "token_logprobs: the gradient at temperature 1",
        ),
        (
            "(-g - g_H * (H - log_total), -g_H, g, zero)",
            "(-g - g_H * (H - log_total), g_H, g, zero)",
            "token_logprobs: a sign in the entropy's gradient",
        ),
        ("self.dweight, add=True)", "self.dweight)", "linear_cross_entropy: dweight of one chunk"),
        (
            "upcast(weight[:0]).dtype) if needs",
            "weight.dtype) if needs",
            "linear_cross_entropy: dweight adds up in 16 bits",
        ),
        (
            "(label_smoothing - 1) * wc",
            "(label_smoothing - 1) * xp.ones_like(wc)",
            "linear_cross_entropy: the target's term without the token's weight",
        ),
    ],
    "kernels/attention.py": [
        ("min(i + shift + 1 - j0, TILE)", "min(i + shift - j0, TILE)", "attention: a query does not see itself"),
        ("max(start[b, i] - j0, 0)", "max(start[b, i] + 1 - j0, 0)", "attention: the first visible key is hidden"),
        ("hk = h // (H // Hk)", "hk = h % Hk", "attention: a query head reads another group's key head"),
        ("sums[d] *= correction", "sums[d] *= one", "attention: earlier tiles are not rescaled to the new maximum"),
        ("to[d] = scale * dq_sum[r, d]", "to[d] = dq_sum[r, d]", "attention: dq without the scale"),
        (
            "dsr[j] = pr[j] * (dsr[j] - delta[r])",
            "dsr[j] = pr[j] * dsr[j]",
            "attention: ds without the sum over the row",
        ),
        (
            "matmul_add(dk_sum[",
            "if h % (H // Hk) == 0: matmul_add(dk_sum[",
            "attention: dk of the group's first head only",
        ),
    ],
    "kernels/cross_entropy.py": [
        ("to[:] = 0", "pass", "cross_entropy: the gradient of an ignored row is not cleared"),
        ("weighted += e * (x if x > floor else floor)", "weighted += e * x", "cross_entropy: 0 times -inf in p x"),
    ],
    "kernels/rms_norm.py": [
        (
            "np.sqrt(_sum_of_products(row, row) * share + eps)",
            "(np.sqrt(_sum_of_products(row, row) * share) + eps)",
            "rms_norm: eps stands outside the root",
        ),
        ("r_i * (h[d] - row[d] * shared)", "r_i * h[d]", "rms_norm: dx without the term through r"),
        ("partial.sum(0)", "partial[0]", "rms_norm: dweight of the first block of rows only"),
    ],
    "kernels/layer_norm.py": [
        (
            "squares += (row[d] - mean) * (row[d] - mean)",
            "squares += row[d] * row[d] - mean * mean",
            "layer_norm: the variance in one pass, which cancels",
        ),
        ("r_i * (h - mean_h - n * mean_hn)", "r_i * (h - n * mean_hn)", "layer_norm: dx without mean_d(h)"),
    ],
    "kernels/embedding.py": [
        ("to[d] += row[d]", "to[d] = row[d]", "embedding: of a token that occurs twice only the last gradient counts"),
    ],
    "kernels/rope.py": [
        (
            "low, high = x[first : first + half], x[first + half : first + D]",
            "low, high = x[first : first + D : 2], x[first + 1 : first + D : 2]",
            "rope: pairs of neighbours instead of halves",
        ),
        ("for h in range(heads, H):", "for h in range(heads, heads):", "rope: the other heads are left as memory was"),
    ],
    "kernels/swiglu.py": [
        (
            "gs * b[f] * (one + a[f] * (one - s))",
            "gs * b[f] * (one + a[f])",
            "swiglu: silu' without the factor 1 - s",
        ),
        ("to_up[f] = gs * a[f]", "to_up[f] = gs * b[f]", "swiglu: gate and up swapped in dup"),
    ],
    "kernels/gelu.py": [
        ("6 * _ROOT * _CUBE", "2 * _ROOT * _CUBE", "gelu: the derivative of x^3 without its 3"),
        (
            "half * math.erfc(-x[i] * root_half) +",
            "half * (one + math.erf(x[i] * root_half)) +",
            "gelu: 1 + erf loses its digits",
        ),
    ],
    "kernels/adamw.py": [
        ("lr / (1 - beta1**step), 1", "lr, 1", "adamw: the first moment's bias is not corrected"),
        ("(np.sqrt(v_i) * root + eps)", "np.sqrt(v_i * root * root + eps)", "adamw: eps stands inside the root"),
        ("return 1 - lr * weight_decay,", "return 1 - weight_decay,", "adamw: the decay without the learning rate"),
        ("int(steps[0]) + 1", "int(steps[0])", "advance: the number of the update before"),
        (
            "decay in rates.tolist()]\n    steps += np.isfinite(scale)",
            "decay in rates.tolist()]\n    steps += 1",
            "left: an update that is left out is counted",
        ),
        (
            "    steps += xp.isfinite(scale)\n    return schedule",
            "    steps += 1\n    return schedule",
            "counted: on the GPU also what is left out",
        ),
        ('xp.arange(p.size), "right")', 'xp.arange(p.size), "left")', "runs: the first of a run has the last one's"),
        (
            "pairwise([0, *([] if borders is None else borders.tolist()), p.size])",
            "pairwise([0, *([] if borders is None else (borders - 1).tolist()), p.size])",
            "runs: each begins one element early",
        ),
        ("total += float(", "total = float(", "global_norm: of the last array alone"),
        ("n = 4 if _aligned(p, m, v, g) else 1", "n = 4 if _aligned(p) else 1", "memory: only p's place is looked at"),
    ],
    "kernels/jit.py": [
        ("y = _ZERO if x < _LOW else y\n        ", "", "exp: e^-inf is not 0"),
        ("for j in range(whole, x.size):", "for j in range(whole, x.size - 1):", "row_max: the last one is not read"),
        (
            "builder.store(builder.fadd(builder.load(p, align=itemsize), results[row][n]), p, align=itemsize)",
            "builder.store(results[row][n], p, align=itemsize)",
            "matmul_add: the product replaces what was there",
        ),
    ],
    "kernels/device.py": [
        ("ids.max() >= n", "ids.max() > n", "check_ids: the id that is one too large passes"),
        ("            self._event.synchronize()\n", "            pass\n", "asynchronous: read before it has arrived"),
        (
            "flag.order < until.order for *_, flag in _flags",
            "True for _ in _flags",
            "flag: waits for later checks",
        ),
        ("        if not found:\n", "        if False:\n", "device: that there is no GPU is found out in the middle"),
    ],
    "minillm/losses.py": [
        ("ag.log_sigmoid(d) * -p", "ag.log_sigmoid(d) * p", "reward_loss: the worse answer is to win"),
        ("h = (u_w - u_l) * beta - margin", "h = u_w - u_l - margin", "dpo: beta is forgotten"),
        ("(margin + 0.5) / beta", "(margin + 0.5) * beta", "ipo: the target is beta / 2, not 1 / (2 beta)"),
        (
            "better = ranks[..., :, None] < ranks[..., None, :]",
            "better = ranks[..., :, None] <= ranks[..., None, :]",
            "rankings: equal ranks are a pair, each answer and itself included",
        ),
        ("drawn & (ranks == best)", "drawn & (ranks == 0)", "best_of_k: nothing is best where the first is not valid"),
        ("if count is None:", "if True:", "count: a mean of means, over each batch's own tokens"),
        ("mean = masked_mean(x, valid)\n", "mean = x.mean()\n", "whiten: the mean is over padding, too"),
        ("d = wide - _array(", "d = -wide + _array(", "estimators: KL(ref || pi)"),
        ("-beta * kl + xp_of(kl)", "beta * kl + xp_of(kl)", "reward: the KL is praised, not punished"),
        (
            "xp.where(valid, xp.arange(valid.shape[1]), -1).max(1)",
            "valid.sum(1) - 1",
            "last: the score lands as far from the row's begin as the response is long",
        ),
        (
            "for t in reversed(range(valid.shape[1])):",
            "for t in reversed(range(valid.shape[1] - 1)):",
            "gae: off by one",
        ),
        ("delta + gamma * lam * next_advantage", "delta + lam * next_advantage", "gae: advantages decay without gamma"),
        ("xp.where(valid[:, t], values[:, t], next_value)", "values[:, t]", "gae: the next value is read in padding"),
        ("losses = ag.maximum(free, clipped)", "losses = ag.minimum(free, clipped)", "clip: the better of the two"),
        (
            "ag.clip(values, low=old_values - clip, high=old_values + clip)",
            "ag.clip(values, low=returns - clip, high=returns + clip)",
            "clip: values are held near their targets, not near where they were",
        ),
        (
            "float(kl) / self.target - 1",
            "1 - float(kl) / self.target",
            "adaptive: beta falls where the KL is too large",
        ),
    ],
    "minillm/optim.py": [
        ("return parameter.ndim >= 2", "return parameter.ndim >= 1", "decay: pulls at norms and biases, too"),
        ("max_norm / norm if max_norm", "norm / max_norm if max_norm", "clipping: upside down, long gradients grow"),
        (
            "xp.isfinite(norm + loss)",
            "xp.isfinite(norm)",
            "finite: on a GPU an infinite loss is fine",
        ),
        (
            "done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))",
            "done = min(1.0, (step - warmup) / max(1, steps - warmup))",
            "schedules: the last step is not at the floor",
        ),
        ("ends[rows][:-1] - part.start", "ends[rows][:-1]", "runs: borders count from the first memory's begin"),
        ("math.inf if max_norm is None else", "1.0 if max_norm is None else", "finite: no clipping clips at 1"),
        ("self._schedule[rows], borders)", "self._schedule[: len(self.runs)], borders)", "scattered: the first rates"),
        ("self._steps[...] = int(state", "self._steps[...] = 0 * int(state", "neither: steps begin again at resume"),
    ],
    "minillm/lora.py": [
        (
            "codes[::2] << 4 | codes[1::2]",
            "codes[1::2] << 4 | codes[::2]",
            "bits: the two weights of a byte are swapped",
        ),
        ("c = self.offset + self", "c = self", "scale: the offset of double quantisation is not given back"),
        ("u = (scale * multiply(flat, A.T))", "u = multiply(flat, A.T)", "ops: an adapter's output without its scale"),
        ("v = (scale * v)", "v = v", "gradient: dA and dx without the scale"),
        (
            "multiply(v, A, multiply(g, _dense(weight, g.dtype)), add=True)",
            "multiply(g, _dense(weight, g.dtype))",
            "gradient: dx of the frozen weight alone",
        ),
        ("math.sqrt(p.shape[1])", "math.sqrt(p.shape[0])", "kaimings: A's size by its rank, not by its inputs"),
        ("._replace(modules={})", "._replace()", "begins: the reference has the adapter, switched on"),
        (
            "w[...] = w + (update.T if model.transposed else update)",
            "w[...] = update.T if model.transposed else update",
            "merged: the update in place of the weight",
        ),
        ("used[HEAD] = model.parameters[PREFIX + HEAD]", "pass", "gradient: a scalar head is frozen, too"),
    ],
    "minillm/model.py": [
        ("if self.used[name].ndim == 2:", "if True:", "casts: norms are rounded, too, when sampling"),
        ('self.sin, "offset": before}', 'self.sin, "offset": 0}', "cache: the next token stands at position 0"),
        ("dtype=np.int32) - (window - 1)", "dtype=np.int32) - window", "window: one position more"),
        ("arange(before, before + T, dtype", "arange(0, T, dtype", "window: counted from the new tokens"),
        ("before + tokens.shape[1]) - start, 0)", "before + tokens.shape[1]), 0)", "gpt2: padding moves the positions"),
        ("std /= math.sqrt(2 * self.config", "std /= math.sqrt(self.config", "weights: of one projection to a block"),
        ("        if longest > context:", "        if longest > context + 1:", "context: one token more passes"),
        (
            "for x in (self.keys, self.values):",
            "for x in (self.keys,):",
            "cache: values of other rows",
        ),
        (
            'F.rms_norm(k, w["self_attn.k_norm.weight"]',
            'F.rms_norm(k, w["self_attn.q_norm.weight"]',
            "qwen3: the queries' norm for the keys",
        ),
        (
            "        if k.requires_grad:  # the cache",
            "        if False:  # the cache",
            "cache: keys lose their gradient without a word",
        ),
    ],
    "minillm/generate.py": [
        ("-1) <= room)", "-1) < room)", "ties: of equal logits one too few"),
        ("-1) - p < top_p)", "-1) < top_p)", "top_p: without the token that completes it"),
        ("p = _softmax(falling[:, :top_k])", "p = _softmax(falling)", "top_p: of all, not of what top_k has left"),
        ("x /= temperature", "x *= temperature", "temperature: the wrong way round"),
        ("+ np.log(min_p), x", "+ min_p, x", "min_p: a difference of logits"),
        ("logprobs = xp.log(p[", "logprobs = xp.log(_softmax(logits)[", "logprobs: before temperature and filters"),
        ("(cumulative <= beside", "(cumulative < 0.5 * beside", "draw: the unlikely end is never reached"),
        ("row[ids] > 0, row[ids] / penalty", "row[ids] > 0, row[ids] * penalty", "penalty: a reward"),
        ("token in stop_tokens:", "token in list(stop_tokens)[1:]:", "stop: one of them does not end a row"),
        (
            "start = np.repeat(self.pads[:, None], tokens.shape[1], 1)",
            "start = np.zeros(tokens.shape, np.int32)",
            "padding: it is seen",
        ),
        ("self.pads[going_on]", "self.pads[: len(going_on)]", "rows: those left get the padding of others"),
    ],
    "minillm/batching.py": [
        ("self.begins[n] = self.begins[last]", "pass", "rows: one that moves begins where another did"),
        ("if wasted > longest + SLACK:", "if False:", "columns: those before all rows are never given back"),
        ("len(row.prompt) + len(row.ids) == self.context", "False", "context: a full one does not end a row"),
        ("for n in reversed(places):", "for n in places:", "rows: another one is let go of"),
    ],
    "minillm/chat.py": [
        (
            'yield Segment("<|im_end|>", control=True, trained=answer)',
            'yield Segment("<|im_end|>", control=True)',
            "chatml: the end of an answer is not trained",
        ),
        (
            'yield Segment(content, trained=answer)\n            yield Segment("<|eot',
            'yield Segment(content, trained=True)\n            yield Segment("<|eot',
            "llama3: questions are trained, too",
        ),
        (
            "key=lambda piece: (piece.control, piece.trained)",
            "key=lambda piece: piece.control",
            "mask: neighbours of an answer share what its first one has",
        ),
        (
            'Segment(f"{answer} ", trained=True)',
            'Segment(f"{answer}", trained=True)',
            "llama2: no space before the end",
        ),
        (
            "        yield from begin(tokenizer)\n        yield from (mark",
            "        yield from (mark",
            "llama2: no exchange has a begin",
        ),
    ],
    "minillm/trainers/common.py": [
        (
            "    if theirs != template and not",
            "    if False and not",
            "reads: a judge of another chat template is heard",
        ),
        ("schedule(step, steps, self.lr, warmup,", "schedule(step, steps, self.lr, 0,", "rate: no warm-up"),
        (
            "trained[row, 1 : len(ids)] = ids, mask[1:]",
            "trained[row, : len(ids) - 1] = ids, mask[1:]",
            "padded: the mask is one place early",
        ),
        (
            "loss = next_token_loss(model, part, count)",
            "loss = next_token_loss(model, part, int(part.mask.sum()))",
            "cut: each part is divided by its own count, a mean of means",
        ),
        (
            "token_logprobs(model, part, temperature).data",
            "token_logprobs(model, part).data",
            "probabilities: the frozen ones are at temperature 1",
        ),
        (
            "scalar_head(model, hidden[row, last])",
            "scalar_head(model, hidden[row, -1])",
            "scores: read at the end of the row, which may be padding",
        ),
        ("begin + np.flatnonzero(mask) for", "np.flatnonzero(mask) for", "scores: of what stands first in the row"),
        (
            "masked_mean(each, beside(there, each.data), axis=1)",
            "each.mean(axis=1)",
            "scores: a mean that counts where there is no token",
        ),
        (
            "p.data[...] = model.parameters[name].data",
            "p.data = model.parameters[name].data",
            "head: a copy shares the model's memory, and a reference moves with the policy",
        ),
        (
            "tokens[r, begin : begin + len(ids)], start[r, begin : begin + len(ids)] = ids, begin",
            "tokens[r, begin : begin + len(ids)], start[r, begin : begin + len(ids)] = ids, 0",
            "side_by_side: a sequence sees those before it in its row",
        ),
        ("[mask[1:] for mask in masks])", "[mask[:-1] for mask in masks])", "log_probabilities: of the next token"),
    ],
    "minillm/trainers/run.py": [
        ("        optimizer.zero_grad()\n", "", "update: the gradient is not cleared"),
        ("self._read(1 if on_gpu else 0)", "self._read(0)", "waiting: for the update that the GPU was just told"),
        (
            "        self._read(0)\n        arrays,",
            "        arrays,",
            "looked: saves an update not looked at",
        ),
        ("self.skipped += 1", "pass", "left: nobody is told of an update that was left out"),
        ("update.sums is self.rows[0].sums", "False", "rows: written before all of their updates are read"),
        ("learning_rate: update.lr}, update.sums)", "learning_rate: update.lr})", "rows: numbers go to the next one"),
        ("        self._cut(files)\n", "", "resume: rows behind the checkpoint stay, and come twice"),
        ("if self.looked is None:", "if True:", "resume: the evaluation before the first update is made again"),
        ('SAVED = ("sums", ', "SAVED = (", "checkpoint: what is not yet logged is lost"),
        ("for step in range(self.done, self.total):", "for step in range(self.total):", "resume: begins at step 0"),
        ("os.fsync(file.fileno())", "pass", "checkpoint: rows may be younger on the disk than it says"),
        (
            "            raise ValueError(f\"{folder} belongs to another run: {'; '.join(told)}\")\n",
            "",
            "resume: another tokenizer or other weights are taken without a word",
        ),
        (
            "self.best is None or sign * value >= sign * self.best[0]",
            "self.best is None or value >= self.best[0]",
            "best: the largest, also where less is better",
        ),
        (
            'CHANGEABLE = {\n    *("lr",',
            'CHANGEABLE = {\n    *("batch_size", "lr",',
            "resume: with batches of another size",
        ),
    ],
    "minillm/checkpoint.py": [
        (
            "            _take_name(new, folder)\n",
            "            new.rename(folder)\n",
            "save: of a step that exists fails",
        ),
        (
            'if array.dtype.kind in "fc" and not',
            'if array.dtype.kind in "c" and not',
            "save: infinite weights are saved",
        ),
        ('        if found != written["sha256"]:', "        if False:", "read: a flipped bit is not seen"),
        ("if not _inside(path.parent, name):", "if False:", "read: a manifest's names lead out of the folder"),
        ("before[-self.keep :]", "before[: self.keep]", "rotation: keeps the oldest"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "lock: two may have it"),
    ],
    "minillm/trainers/pretrain.py": [
        (
            "np.linspace(0, len(rows) - 1, min(config.eval_rows, len(rows))).astype(int)",
            "np.arange(min(config.eval_rows, len(rows)))",
            "evaluation: of the first rows, which hold the longest documents",
        ),
    ],
    "minillm/trainers/sft.py": [
        (
            "share = config.replay_share / (1 - config.replay_share)",
            "share = config.replay_share",
            "replays: the share of the conversations, not of all rows",
        ),
        ("key=lambda c: str(opening_of(c.messages))", "key=lambda c: c.where", "holds: rows out, not questions"),
    ],
    "minillm/trainers/reward.py": [
        (
            "loss = preference_loss(r, part, config, len(batch))",
            "loss = preference_loss(r, part, config, len(part))",
            "micro: each part is divided by its own count",
        ),
    ],
    "minillm/trainers/dpo.py": [
        (
            "for k in (0, 1) for e in examples",
            "for e in examples for k in (0, 1)",
            "dpos: chosen and rejected answers get mixed up",
        ),
        (
            "loss_and_metrics(model, part, config, pad_id, len(batch))",
            "loss_and_metrics(model, part, config, pad_id, len(part))",
            "micro: each part is divided by its own count",
        ),
    ],
    "minillm/trainers/evaluation.py": [
        ("0.5 * (margins == 0).mean()", "(margins == 0).mean()", "pair_accuracy: a tie is a win"),
        ("np.where(batch.mask, difference, 0).sum(1).mean()", "difference.sum(1).mean() / 2", "divergence: half of it"),
        (
            "_mean(gold.refused for _, gold in asked)",
            "_mean(gold.refused for *_, gold in rows)",
            "gold: refused wrongly where it had to be",
        ),
        (
            "asked = [(q, gold) for q, _, gold in rows if not q.must_refuse]",
            "asked = [(q, gold) for q, _, gold in rows]",
            "gold: what must be refused counts as asked",
        ),
        ("1 - len(set(g)) / len(g)", "len(set(g)) / len(g)", "text: repetition is what is not repeated"),
        (
            "for text in atlas.clozes(fact)]",
            "for text in atlas.clozes(fact)[:1]]",
            "recalled: one statement speaks for all",
        ),
        (
            "np.linspace(0, len(items) - 1, most)",
            "np.linspace(0, len(items) // 2, most)",
            "spread: the first half alone",
        ),
        (
            "seed=[(seed, i) for i in some],",
            "seed=[(seed, i) for i in range(len(some))],",
            "answer: random numbers by the place in the batch",
        ),
    ],
    "minillm/pipeline.py": [
        (
            'return None if self.config.own_data else self.at("data", "dev.jsonl")',
            'return None if self.config.own_data else self.at("data", "heldout.jsonl")',
            "only: stopped on held-out questions",
        ),
        (
            "STAGES[STAGES.index(self.from_) :]",
            "STAGES[STAGES.index(self.from_) + 1 :]",
            "from: the stage itself is not repeated",
        ),
        (
            '        if name in notes["stages"]:',
            '        if name == "data" and name in notes["stages"]:',
            "done: what is done is repeated",
        ),
        ('if changed and config.from_ != "data":', "if changed and not config.from_:", "other: settings mix"),
        ("        for left in (stage.folder,", "        for left in (", "stopped: what was left is not cleared"),
        ('models["sft"], rows)', "models[name], rows)", "page: KL of a model to itself"),
    ],
    "minillm/trainers/ppo.py": [
        ('else with_head(policy, "lm")', "else policy", "reference: is the policy, which moves"),
        (
            "return score - self.missing_eos_penalty * ~ended",
            "return score",
            "punished: an answer without an end is not",
        ),
        (
            "[len(prompt), len(ids)]",
            "[len(prompt) + 1, len(ids) - 1]",
            "lands: an answer's first token is not in the mask",
        ),
        (
            "frozen_logprobs(policy, batch, config.temperature, rows)",
            "frozen_logprobs(policy, batch, 1.0, rows)",
            "ratio: the old log-probabilities are at temperature 1",
        ),
        (
            "token_logprobs(policy, part.batch, config.temperature, entropy=True)",
            "token_logprobs(policy, part.batch, entropy=True)",
            "ratio: the new log-probabilities are at temperature 1",
        ),
        (
            "ppo_policy_loss(logp, there.logp, there.white, there.mask, config.clip, count)",
            "ppo_policy_loss(logp, there.logp, there.white, there.mask, config.clip)",
            "micro: each part is divided by its own count",
        ),
        ("there.logp, there.white,", "there.logp, there.advantage,", "losses: the advantages are not whitened"),
        (
            "            policy_optimizer.zero_grad()\n",
            "",
            "far: the gradient that told to stop is in the next step",
        ),
        (
            "config.clip_value if train_policy else math.inf",
            "config.clip_value",
            "warm_up: the clip holds the values where they are",
        ),
        (
            "step)), step >= config.value_warmup",
            "step)), True",
            "beta: the warm-up is forgotten, the policy moves from the first round on",
        ),
    ],
    "minillm/data/pack.py": [
        ("trained[row, slot] = False", "pass", "target: the first token of a document is one"),
        (
            "np.repeat(slot, size)\n",
            "np.repeat(slot - (slot > 0), size)\n",
            "sees: one token of the row's other document",
        ),
        ("np.minimum(begin + T + 1,", "np.minimum(begin + T,", "target: the one at a cut is lost"),
        (
            "trained = np.zeros((len(rows), width), bool)",
            "trained = np.ones((len(rows), width), bool)",
            "target: padding is one",
        ),
        ("trained[:, 1:]", "trained[:, :-1]", "mask: about the token that is read, not its target"),
    ],
    "minillm/data/datasets.py": [
        ("_checksum(self.source[i]", "_checksum(self.items[i]", "items: computed numbers decide whether a run goes on"),
        (
            "{name: int(taken[name]) for name in self.taken}",
            "{name: int(taken[name]) % len(self.mixture.windows[name]) for name in self.taken}",
            "resumed: in the first epoch again",
        ),
        ("default_rng((self.seed, epoch, ", "default_rng((self.seed, ", "epoch: each has the first one's order"),
        (
            "(taken[name] + 1) * self.weights[best] < (taken[best] + 1) * weight",
            "(weight - self.weights[best]) * n > (taken[name] - taken[best]) * self._total",
            "source: the one with the largest deficit, which puts another a whole row off",
        ),
        (
            "order = np.argsort(np.concatenate(list(places.values())))",
            "order = np.concatenate(list(places.values()))",
            "mixture: a batch's rows are not put back in order",
        ),
    ],
    "kernels/kernel.py": [
        (
            "return *first, *_PREFERENCE[device]",
            "return _PREFERENCE[device]",
            "version: the name that is wanted is lost",
        ),
        ("(*_PREFERENCE[device], *BY_NAME[device])", "_PREFERENCE[device]", "version: those taken by name are not"),
        (" or dtype.name not in _DTYPES[device]:", ":", "version: the oracle is a fast one"),
    ],
    "kernels/cuda.py": [
        ('return HOPPER if name == "sm_90" else name', "return name", "hopper: compiled without its own instructions"),
        ("if architecture == HOPPER or i not in self.hopper", "", "hopper: compiled ahead for what has them not"),
        ("(48 << 10) - OWN_SHARED", "48 << 10", "launch: a kernel's own shared memory does not count"),
        (
            '["MaxSharedMemoryPerBlockOptin"] - OWN_SHARED',
            '["MaxSharedMemoryPerBlockOptin"]',
            "launch: the most shared memory leaves it out, too",
        ),
        ("*x.strides[:-1]) == 16", "16) == 16", "wide: rows that are far apart may begin anywhere"),
        ("if x.flags.c_contiguous and (dtype is None or", "if (dtype is None or", "layout: a view is passed as it is"),
    ],
    "kernels/blas.py": [
        (" or found.state != SUCCESS", "", "cublasLt: an algorithm whose state says that it is none"),
    ],
    "kernels/graph.py": [
        ("calls.take(inputs)", "pass", "graph: a launch reads the inputs of the first call"),
        (
            "self._stream.wait_event(current.record())",
            "pass",
            "graph: it begins before what the current stream was told is done",
        ),
        (
            "current.wait_event(self._stream.record())",
            "pass",
            "graph: what follows does not wait for the first call",
        ),
        (
            "end += -(-x.nbytes // ALIGNMENT) * ALIGNMENT",
            "end += x.nbytes - 1",
            "graph: an input's last byte is the next one's first",
        ),
        ("            self._full = True\n", "", "full: recordings work on in memory that was given back"),
        ("if calls.recorded is not None:", "if True:", "full: a recording that was forgotten at once is launched"),
        ("                self._full = False\n", "", "full: from then on nothing stays recorded"),
        (
            "calls.recorded = calls.outputs = None\n",
            "calls.outputs = None\n",
            "full: what is forgotten are the outputs alone",
        ),
    ],
    "minillm/trainers/recorded.py": [
        ("recorded(batch, run.lr) | numbers", "recorded(batch, run.lr)", "graph: a trainer's own numbers are lost"),
        ("self.optimizer.rates(lr))", "self.optimizer.rates(0.01))", "graph: the first learning rate for good"),
        ("        self.optimizer.zero_grad()\n", "", "graph: gradients of all updates add up"),
        (
            "gpu_clip_scale(norm, self.longest, total)",
            "gpu_clip_scale(norm, self.longest)",
            "graph: a loss of nan trains",
        ),
    ],
    "minillm/files.py": [
        ("object_pairs_hook=_unique, ", "", "bad: a key that occurs twice passes"),
        ("if size > min(LARGEST_HEADER, there - 8):", "if False:", "hostile: a header of any length is read"),
    ],
    "minillm/data/readers.py": [
        (
            "yield number, line.decode()",
            "yield from ((number, part) for part in line.decode().splitlines(keepends=True))",
            "text: U+2028 ends a line",
        ),
        ("if self.count > self.limit:", "if self.count >= self.limit:", "more: one bad line fewer may be skipped"),
    ],
    "minillm/data/clean.py": [
        ("number[-2::-2])", "number[::2])", "card: Luhn doubles from the left"),
        ("turned = number[4:] + number[:4]", "turned = number", "iban: the country is not moved to the end"),
        ('f"\\r\\n|[{_NEWLINES}]"', 'f"[{_NEWLINES}]"', "repair: CR LF becomes two line ends"),
    ],
    "minillm/data/filters.py": [
        (
            "is not None and count < at_least:",
            "is not None and count <= at_least:",
            "limit: the limit itself breaks it",
        ),
        ("if place >= free and gram in seen:", "if gram in seen:", "repetition: overlaps are counted twice"),
    ],
    "minillm/data/dedup.py": [
        ("np.maximum((256 * share - 1) / 255, 0)", "share", "estimate: not corrected for bytes equal by chance"),
        ("if s[best] >= self.threshold:", "if s[best] > self.threshold:", "near: the threshold itself is no duplicate"),
        ("self.numbers.append(self.seen - 1)", "self.numbers.append(len(self.numbers))", "stream: numbered as kept"),
    ],
    "minillm/data/conversations.py": [
        ("1 - preference, -margin", "preference, margin", "second: of two answers the better one, and not preferred"),
        ("mask[: len(before)] = False", "pass", "prompt: the assistant's earlier turns are trained"),
        ("end = trained[-1] + 1 if", "end = trained[-1] if", "prompt: an answer loses its end of turn"),
    ],
}


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    fault: str

    def applied(self, text):
        """The file's text with the fault in it."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.fault!r}: {self.file} should have its text once, and has it {count} times: {self.old}"
            )
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(file, *row) for file, rows in FAULTS.items() for row in rows]
TESTS = {file: AREAS.get(file, ENGINE) for file in FAULTS}  # the tests of which one has to notice, for each file


class Outcome(NamedTuple):
    word: str  # "passed", "killed" or "timeout"
    by: str  # the first test that failed, or what else ended it


async def run_tests(tree, tests, limit, *options):
    """Run pytest in `tree`, for `limit` seconds at most."""
    theirs = ("NUMBA_CACHE_DIR", "MINILLM_KERNELS", "PYTEST_ADDOPTS")  # the caller's settings, which would leak in
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    # The copy comes before an installed package, and .pyc files might be taken for those of the mutated source.
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests),
        cwd=tree,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = (await asyncio.wait_for(process.communicate(), limit))[0].decode(errors="replace")
    except TimeoutError:
        return Outcome("timeout", f"not done after {limit:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):  # after a timeout or Ctrl-C: pytest, and what the tests started
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
    if process.returncode in (0, 5):  # 5: no test has such a name
        return Outcome("passed", "")
    if process.returncode < 0:
        return Outcome("killed", signal.Signals(-process.returncode).name)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if process.returncode > 2 or not failed:
        raise ValueError(f"pytest could not run:\n{output}")
    return Outcome("killed", failed[1])


async def check(source, folder, mutants, tests, jobs, report):
    """Run tests[file] on each mutant of the tree `source`, in `jobs` copies of it; report(mutant, outcome, seconds)."""
    left = {}
    for mutant in mutants:
        left.setdefault(tuple(tests[mutant.file]), []).append(mutant)
    begun = set()

    def next_suite(warm):
        """The tests that a worker goes on with, None for none. Those that no one has begun come before those in which
        it would help another one, and so few mutants that their tests' first run is not worth it are left to that."""
        for suites, least in ((warm, 0), (left.keys() - begun, 0), (left, 8)):
            for suite in left:
                if suite in suites and len(left[suite]) > least:
                    return suite
        return None

    async def worker(home):
        # Always the same path, which Numba's cache has in its keys: so only what was mutated is compiled again.
        tree, green, limits = home / "tree", home / "green", {}
        shutil.copytree(source, green)
        while suite := next_suite(limits):
            if suite not in limits:
                begun.add(suite)
                began = time.monotonic()
                green.rename(tree)
                outcome = await run_tests(tree, suite, None)
                if outcome.word != "passed":
                    raise ValueError(f"without any fault, {outcome.by} fails")
                tree.rename(green)
                limits[suite] = 60 + 3 * (time.monotonic() - began)
                continue  # meanwhile another worker may have done them all
            mutant, began = left[suite].pop(0), time.monotonic()
            shutil.copytree(green, tree)
            file = tree / mutant.file
            file.write_text(mutant.applied(file.read_text(encoding="utf-8")), encoding="utf-8")
            outcome = await run_tests(tree, suite, limits[suite], "-k", mutant.fault.split(":")[0])
            if outcome.word == "passed":
                outcome = await run_tests(tree, suite, limits[suite])
            report(mutant, outcome, time.monotonic() - began)
            shutil.rmtree(tree)

    try:
        async with asyncio.TaskGroup() as workers:
            for n in range(jobs):
                workers.create_task(worker(folder / str(n)))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def copy_checkout(root, to):
    """The files that git knows or would add; where there is no git, all but the hidden ones."""
    command = ["git", "-C", str(root), "ls-files", "-coz", "--exclude-standard"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    if not found:
        shutil.copytree(root, to, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in filter(None, found.split("\0")):
        if (root / name).is_file():  # git goes on knowing a file that was deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def run(root, mutants, tests, jobs):
    """Check all mutants by tests[file], print a line for each as it is done and a table of them all.

    Returns [(mutant, outcome), ...].
    """
    done = []

    def report(mutant, outcome, seconds):
        done.append((mutant, outcome))
        word = "SURVIVED" if outcome.word == "passed" else outcome.word
        line = f"{len(done):>3}/{len(mutants)} {word:<8}{seconds:>6.1f} s  {mutant.file}  {mutant.fault}"
        print(f"{line}  [{outcome.by}]" if outcome.by else line, flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        source = Path(folder, "source")  # one state for all, whatever is edited meanwhile
        copy_checkout(root, source)
        for mutant in mutants:
            mutant.applied((source / mutant.file).read_text(encoding="utf-8"))
        asyncio.run(check(source, Path(folder), mutants, tests, min(jobs, len(mutants)), report))

    print()
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        killed = [outcome.word != "passed" for mutant, outcome in done if mutant.file == file]
        print(f"{file:<31}{sum(killed):>3} of {len(killed)} killed")
    return done


def main(argv=None):
    parser = argparse.ArgumentParser(description="See whether the tests notice one planted fault at a time.")
    parser.add_argument(
        "--only", metavar="TEXT", nargs="+", default=[""], help="only the mutants with one TEXT in their file or fault"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=min(4, os.cpu_count() or 1), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    mutants = [m for m in MUTANTS if any(text.lower() in f"{m.file} {m.fault}".lower() for text in args.only)]
    if not mutants:
        parser.error(f"no mutant has {' or '.join(map(repr, args.only))} in its file or fault; --list prints them")
    if args.list:
        for number, mutant in enumerate(mutants, 1):
            print(f"{number:>3}  {mutant.file:<31}{mutant.fault}")
        return 0
    began = time.monotonic()
    try:
        done = run(ROOT, mutants, TESTS, args.jobs)
    except ValueError as error:
        print(f"mutants.py: {error}", file=sys.stderr)
        return 2
    killed = sum(outcome.word != "passed" for _, outcome in done)
    print(f"{killed} of {len(done)} killed in {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if killed == len(done) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
