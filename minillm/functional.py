"""
The transformer's ops, each beside its gradient. Where a kernel does the work, the derivation stands in its file.

Shapes: B batch, T tokens, H heads, D width (of a head, or of the model), F feed-forward width, V vocabulary, N rows.
Every op takes Tensors or arrays and keeps what its way back names; see the head of autograd.py.
"""

import math
import numbers
import operator

import numpy as np

from minillm.autograd import op
from minillm.kernels import attention as attention_kernels
from minillm.kernels import cross_entropy as cross_entropy_kernels
from minillm.kernels import embedding as embedding_kernels
from minillm.kernels import gelu as gelu_kernels
from minillm.kernels import layer_norm as layer_norm_kernels
from minillm.kernels import rms_norm as rms_norm_kernels
from minillm.kernels import rope as rope_kernels
from minillm.kernels import swiglu as swiglu_kernels
from minillm.kernels.blas import multiply
from minillm.kernels.device import beside, check_ids, device_of, empty, upcast, xp_of

# ------------------------------------------------------------------ embedding and linear


@op
def embedding(ids, weight):
    """y_i = weight[ids_i]: ids (...) int, weight (V, D), y (..., D). A ValueError names an id outside [0, V).

    dweight[v] = the sum of g_i over the tokens i with ids_i = v (kernels/embedding.py).
    Keeps ids.
    Example: embedding(ids(V, B, T), randn(V, D))
    """
    check_ids("embedding", ids, weight.shape[0])
    flat, (V, D) = beside(ids.reshape(-1), weight), weight.shape
    y = embedding_kernels.forward(weight, flat).reshape(*ids.shape, D)
    return y, (None, lambda g: embedding_kernels.backward(g.reshape(-1, D), flat, V))


@op
def linear(x, weight, bias=None):
    """y = x weight^T + bias: x (..., K), weight (N, K) as checkpoints store it, bias (N,) or None, y (..., N).

    dx = g weight, dweight = g^T x, dbias = sum of g over the rows: y_in = sum_k x_ik w_nk, so w_nk meets g_in through
    x_ik for every row i. The weight is used in x's dtype; its gradient, a sum over many rows, has at least 32 bits,
    and the product itself adds it to what is in weight.grad (kernels/blas.py); so does that of dbias, 1^T g.
    Keeps weight for dx and x for dweight.
    Example: linear(randn(B, T, K), randn(N, K), randn(N))
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x {x.shape} has width {x.shape[-1]}, weight {weight.shape} takes {weight.shape[1]}")
    rows, (N, K), lead = math.prod(x.shape[:-1]), weight.shape, x.shape[:-1]
    flat, w = x.reshape(rows, K), weight.astype(x.dtype, copy=False)  # one large product instead of many small ones
    y, wide = multiply(flat, w.T), upcast(flat[:0]).dtype
    if bias is not None:
        y += bias.astype(x.dtype, copy=False)

    def dx(g):
        return multiply(g.reshape(rows, N), w).reshape(*lead, K)

    def dweight(g, *, into=None):
        return multiply(g.reshape(rows, N).T, flat, into, wide, add=into is not None)

    def dbias(g, *, into=None):  # as a product with ones: BLAS adds up columns in parallel, and to more digits
        ones = xp_of(g).ones((1, rows), np.float32).astype(g.dtype)
        sums = multiply(ones, g.reshape(rows, N), None if into is None else into[None], wide, add=into is not None)
        return sums[0] if into is None else into

    return y.reshape(*lead, N), (dx, dweight, dbias)


# ------------------------------------------------------------------ norms


def _check_width(name, x, **vectors):
    for which, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {which} {vector.shape} does not go with x {x.shape}")


@op
def rms_norm(x, weight, *, eps=1e-5):
    """y = weight x r, r = 1 / sqrt(mean_d x_d^2 + eps) per row: x (..., D), weight (D,) (Zhang, Sennrich 2019, eq. 4).

    dx = r (h - n mean_d(h n)) with h = g weight and n = x r; dweight = sum over rows of g n (kernels/rms_norm.py).
    Keeps x, weight and one r per row.
    Example: rms_norm(randn(B, T, D), randn(D))
    """
    _check_width("rms_norm", x, weight=weight)
    y, r = rms_norm_kernels.forward(x, weight, eps)
    return y, lambda g: rms_norm_kernels.backward(g, x, weight, r)


@op
def layer_norm(x, weight, bias, *, eps=1e-5):
    """y = weight n + bias, n = (x - mean) r, r = 1 / sqrt(var + eps) per row: x (..., D) (Ba et al. 2016, eq. 4).

    dx = r (h - mean_d(h) - n mean_d(h n)) with h = g weight; dweight = sum over rows of g n, dbias = of g
    (kernels/layer_norm.py).
    Keeps x, weight and two numbers per row.
    Example: layer_norm(randn(B, T, 1 + D), randn(1 + D), randn(1 + D))
    """
    _check_width("layer_norm", x, weight=weight, bias=bias)
    y, u, r = layer_norm_kernels.forward(x, weight, bias, eps)
    return y, lambda g: layer_norm_kernels.backward(g, x, weight, u, r)


# ------------------------------------------------------------------ activations


def _check_dtypes(name, **arrays):
    """TypeError unless all have one dtype: a kernel is compiled for one."""
    if len({x.dtype for x in arrays.values()}) > 1:
        told = ", ".join(f"{which} is {x.dtype}" for which, x in arrays.items())
        raise TypeError(f"{name}: the inputs must have one dtype, and {told}")


@op
def silu(x):
    """y = x s(x), s the logistic function (Elfwing et al. 2017).

    dx = g s (1 + x (1 - s)) (kernels/swiglu.py).
    Keeps x.
    Example: silu(randn(B, D))
    """
    return swiglu_kernels.silu_forward(x), (lambda g: swiglu_kernels.silu_backward(g, x),)


@op
def swiglu(gate, up):
    """y = silu(gate) up, elementwise: gate and up (..., F), possibly halves of one projection (Shazeer 2020, eq. 6).

    dgate = g up silu'(gate), dup = g silu(gate) (kernels/swiglu.py).
    Keeps gate and up; the logistic function is computed again.
    Example: swiglu(randn(B, T, F), randn(B, T, F))
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape")
    _check_dtypes("swiglu", gate=gate, up=up)
    return swiglu_kernels.forward(gate, up), lambda g: swiglu_kernels.backward(g, gate, up)


@op
def gelu(x, *, approximate="none"):
    """y = x Phi(x), or with approximate="tanh" GPT-2's y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2.

    dx = g (Phi + x phi), and the tanh form's own derivative (kernels/gelu.py) (Hendrycks and Gimpel 2016).
    Keeps x.
    Example: gelu(randn(B, D), approximate="tanh")
    """
    return gelu_kernels.forward(x, approximate), (lambda g: gelu_kernels.backward(g, x, approximate),)


@op
def softmax(x, *, axis=-1):
    """y_j = e^x_j / sum_k e^x_k along an axis, shifted by the maximum.

    dx_j = y_j (g_j - sum_k g_k y_k): dy_k / dx_j = y_k ([j = k] - y_j). A slice of -inf only has y = 0 and dx = 0.
    Keeps y.
    Example: softmax(randn(B, P, D), axis=1)
    """
    xp, wide = xp_of(x), upcast(x)
    m = wide.max(axis, keepdims=True)
    e = xp.exp(wide - xp.where(xp.isneginf(m), 0, m))
    total = e.sum(axis, keepdims=True)
    y = (e / xp.where(total == 0, 1, total)).astype(x.dtype)

    def back(g):
        g = upcast(g)
        return (y * (g - (g * y).sum(axis, keepdims=True))).astype(y.dtype, copy=False)

    return y, (back,)


_GOLDEN = 0x9E3779B97F4A7C15


def _uniform24(seed, shape, xp):
    """Integers in [0, 2^24), a function of (seed, position) only: SplitMix64 (Steele et al. 2014) as a counter-based
    generator. The same on any device, whatever came before."""
    mask = (1 << 64) - 1
    first = (seed * 0xBF58476D1CE4E5B9 + _GOLDEN) & mask
    first = ((first ^ (first >> 29)) * 0x94D049BB133111EB) & mask
    z = xp.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(first)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).reshape(shape)


@op
def dropout(x, *, p, seed):
    """y = x k / (1 - p) with k = 0 or 1, and 0 with probability p (Srivastava et al. 2014). `seed` decides k for good.

    dx = g k / (1 - p). The bits are made again from the seed, so a replay inside checkpoint is the same.
    Keeps nothing.
    Example: dropout(randn(B, T, D), p=0.3, seed=7)
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be in [0, 1), and is {p}")

    def apply(a):
        xp = xp_of(a)
        keep = _uniform24(operator.index(seed), a.shape, xp) >= round(p * (1 << 24))
        return xp.where(keep, a * a.dtype.type(1 / (1 - p)), a.dtype.type(0))

    return apply(x), (apply,)


# ------------------------------------------------------------------ attention

ROPE_SCALINGS = {  # {rope type: the numbers it needs}
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def is_positive(value):
    """Whether it is a finite number above 0."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < math.inf


def _checked_scaling(scaling):
    """rope_table's `scaling` as {"rope_type": kind, ...}. ValueError: there is no such kind, or a number of it is
    missing or impossible."""
    if not isinstance(scaling, dict | None):
        raise ValueError(f"rope scaling must be a dict or None, not {scaling!r}")
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(f"rope type {kind!r} is not supported; there are 'default', 'linear' and 'llama3'")
    for name in ROPE_SCALINGS[kind]:
        if name not in scaling:
            raise ValueError(f"rope type {kind!r} needs {name!r}")
        if not is_positive(scaling[name]):
            raise ValueError(f"rope type {kind!r}: {name} = {scaling[name]!r} must be a positive number")
    if kind == "llama3":
        low, high, before = (scaling[name] for name in ROPE_SCALINGS[kind][1:])
        if low >= high:
            raise ValueError(f"rope type 'llama3': low_freq_factor {low} must be below high_freq_factor {high}")
        if before < 1:
            raise ValueError(f"rope type 'llama3': original_max_position_embeddings = {before} must be at least 1")
    return scaling | {"rope_type": kind}


def rope_table(length, head_size, *, theta=10000.0, scaling=None, dtype=np.float32):
    """(cos, sin), each (length, head_size / 2): the angles t theta^(-2d / head_size), built in float64.

    scaling  None, or the dict of a Hugging Face config's rope_scaling / rope_parameters:
             {"rope_type": "linear", "factor": f} divides every frequency by f (Chen et al. 2023);
             {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings"} divides the long wavelengths by the factor, keeps the short ones, and
             blends in between (Llama 3.1)
    ValueError: an odd head size, another kind of scaling, or numbers that make none.
    """
    if head_size % 2:
        raise ValueError(f"rope needs an even head size, and got {head_size}")
    frequency = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    scaling = _checked_scaling(scaling)
    kind = scaling["rope_type"]
    if kind == "linear":
        frequency /= scaling["factor"]
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the old context
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angle = np.outer(np.arange(length, dtype=np.float64), frequency)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


@op
def rope(x, *, cos, sin, offset=0, heads=None):
    """Turn the pairs (x_d, x_(d + D/2)) of token t by the angles of row offset + t: x (B, T, H, D), cos and sin from
    rope_table (Su et al. 2021, eq. 34, in the half-split pairing of Hugging Face checkpoints).

    heads  the first so many heads are turned and the others copied (all if None): q and k of a fused q|k|v
    dx = g turned back by the same angles: a rotation's transpose is its inverse (kernels/rope.py).
    Keeps cos and sin (views of the tables).
    Example: rope(randn(B, T, H + 1, 2 * D), cos=randn(T + 2, D), sin=randn(T + 2, D), offset=2, heads=1)
    """
    if x.shape[-1] != 2 * cos.shape[1]:
        raise ValueError(f"rope: head size {x.shape[-1]} does not go with a table of width {cos.shape[1]}")
    if offset + x.shape[1] > len(cos):
        raise ValueError(f"rope: positions up to {offset + x.shape[1]} need a longer table than {len(cos)} rows")
    cos, sin = cos[offset : offset + x.shape[1]], sin[offset : offset + x.shape[1]]
    heads = x.shape[2] if heads is None else heads
    return rope_kernels.rotate(x, cos, sin, heads, 1), (lambda g: rope_kernels.rotate(g, cos, sin, heads, -1),)


@op
def attention(q, k, v, *, start=None, scale=None):
    """o_i = sum_j p_ij v_j, p_ij = softmax_j(scale q_i . k_j) over start_i <= j <= i + Tk - Tq, the T x T matrix never
    stored (Dao et al. 2022): q and o (B, Tq, H, D), k and v (B, Tk, Hk, D), Tq <= Tk, H a multiple of Hk.

    start  (B, Tq) int, never decreasing in a row: the first key each query may see (0 if None), which is causal
           attention, packed documents, left padding and a sliding window in one. A query that sees no key gives 0.
    scale  1 / sqrt(D) if None
    dv_j = sum_i p_ij g_i, dq_i = scale sum_j ds_ij k_j, dk_j = scale sum_i ds_ij q_i,
    with ds_ij = p_ij (g_i . v_j - g_i . o_i) (kernels/attention.py).
    Keeps q, k, v, o, start, and one number per head and query.
    Example: attention(randn(B, T, 2 * H, D), randn(B, T + S, H, D), randn(B, T + S, H, D), start=starts(B, T, S))
    """
    (B, Tq, H, D), (_, Tk, Hk, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or Hk == 0 or H % Hk:
        raise ValueError(f"attention: q {q.shape} does not go with k {k.shape} and v {v.shape}")
    if Tq > Tk:
        raise ValueError(f"attention: {Tq} queries but only {Tk} keys; the last query stands at the last key")
    _check_dtypes("attention", q=q, k=k, v=v)
    start = checked_start(start, B, Tq, q)
    scale = 1 / math.sqrt(D) if scale is None else scale
    o, lse = attention_kernels.forward(q, k, v, start, scale)
    return o, lambda g: attention_kernels.backward(g, q, k, v, o, lse, start, scale)


def checked_start(start, B, Tq, like):
    """attention's `start`, (B, Tq) int32 where `like` is. The numbers of one that is on a GPU are not looked at."""
    xp = xp_of(like)
    if start is None:
        return xp.zeros((B, Tq), np.int32)
    if start.shape != (B, Tq):
        raise ValueError(f"attention: start has shape {start.shape}, the queries ({B}, {Tq})")
    if start.dtype.kind not in "iu":
        raise TypeError(f"attention: start must be whole numbers, and is {start.dtype}")
    if isinstance(start, np.ndarray) and start.size:  # on a GPU this would stall
        falls, why = start[:, 1:] < start[:, :-1], None  # a difference of unsigned numbers would not be negative
        if falls.any():
            row, i = np.argwhere(falls)[0]
            why = f"row {row} falls from {start[row, i]} to {start[row, i + 1]} at query {i + 1}"
        elif start[:, 0].min() < 0:
            row = np.argmin(start[:, 0])
            why = f"row {row} begins at {start[row, 0]}"
        if why:
            raise ValueError(f"attention: start must be >= 0 and never decrease, and {why}")
    if not np.can_cast(start.dtype, np.int32):  # no key stands where this ends: beyond it, nothing is seen either way
        start = xp_of(start).minimum(start, np.iinfo(np.int32).max)
    return xp.ascontiguousarray(beside(start, like), dtype=np.int32)


# ------------------------------------------------------------------ cross-entropy and log-probabilities


def _checked_targets(name, lead, targets, V, ignore_index, weights=None):
    """targets (N,) with -1 for what is ignored, by its id or by a weight of 0. ValueError where the shape is not
    `lead`, and for any other id outside [0, V), which it names."""
    xp = xp_of(targets)
    for what, array in (("targets", targets), ("weights", weights)):
        if array is not None and array.shape != lead:
            raise ValueError(f"{name}: {what} {array.shape} must have one entry per token, and there are {lead}")
    ignored = targets == ignore_index
    check_ids(f"{name} targets", xp.where(ignored, 0, targets), V)
    if weights is not None:
        ignored |= weights == 0
    return xp.where(ignored, -1, targets).reshape(-1)


def _mean_weights(targets, weights, like):
    """The weight of each row: as given, or 1 / (number of rows that are not ignored)."""
    if weights is not None:
        return weights.reshape(-1).astype(like)
    used = targets >= 0
    return used.astype(like) / xp_of(targets).maximum(used.sum(), 1).astype(like)


def _loss_rows(V, m, log_total, x_target, x_sum, label_smoothing, z_loss):
    """Each row's loss, of the kernel's statistics of its V logits."""
    lse = m + log_total
    loss = (1 - label_smoothing) * (log_total - x_target) + z_loss * lse * lse
    return loss + label_smoothing * (log_total - x_sum / V) if label_smoothing else loss


@op
def cross_entropy(logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0):
    """L = sum_i w_i [(1 - s) (-log p_i,target) + s mean_j (-log p_ij) + z lse_i^2], a scalar: logits (..., V), targets
    (...) int; s label smoothing (Szegedy et al. 2016, section 7), z the z-loss (Chowdhery et al. 2022, section 5).

    weights  (...) one per token, summed as they are; None means 1 / (number of tokens that are not ignored): the mean
    A token whose target is ignore_index or whose weight is 0 is not read: its logits may be anything.
    dlogits_ij = g w_i [p_ij (1 + 2 z lse_i) - (1 - s) [j = target] - s / V] (kernels/cross_entropy.py).
    Keeps logits, targets and a few numbers per row.
    Example: cross_entropy(randn(B, T, V), ids(V, B, T), weights=positive(B, T), label_smoothing=0.1, z_loss=0.01)
    """
    shape, V = logits.shape, logits.shape[-1]
    rows = logits.reshape(math.prod(shape[:-1]), V)
    flat = _checked_targets("cross_entropy", shape[:-1], targets, V, ignore_index, weights)
    w = beside(_mean_weights(flat, weights, upcast(rows[:0]).dtype), rows)
    flat = beside(flat, rows)
    m, log_total, x_target, x_sum, _ = cross_entropy_kernels.forward(rows, flat, 1.0)
    loss = _loss_rows(V, m, log_total, x_target, x_sum, label_smoothing, z_loss)
    a, c, d = 1 + 2 * z_loss * (m + log_total), label_smoothing - 1, -label_smoothing / V

    def back(g):
        wg = w * g
        dlogits = cross_entropy_kernels.backward(rows, flat, m, log_total, wg * a, 0 * wg, c * wg, d * wg, 1.0)
        return dlogits.reshape(shape)

    return (loss * w).sum(), (back, None)


@op
def token_logprobs(logits, targets, *, temperature=1.0, entropy=False, ignore_index=-100):
    """log softmax(logits / temperature) at each target: logits (..., V), targets (...) int, result (...).

    With entropy=True returns (logprobs, H), H = -sum_j p_j log p_j. An ignored target has 0 for both and gradient 0.
    dlogits_j = (g ([j = target] - p_j) - g_H p_j (log p_j + H)) / temperature (kernels/cross_entropy.py).
    Keeps logits, targets and a few numbers per row.
    Example: token_logprobs(randn(B, T, V), ids(V, B, T), temperature=0.7, entropy=True)
    """
    shape, lead = logits.shape, targets.shape
    rows = logits.reshape(math.prod(shape[:-1]), shape[-1])
    flat = beside(_checked_targets("token_logprobs", shape[:-1], targets, shape[-1], ignore_index), rows)
    m, log_total, x_target, _, x_mean = cross_entropy_kernels.forward(rows, flat, 1 / temperature)
    H = log_total - x_mean

    def back(g, g_H=None):
        coefficients = _logprob_coefficients(g.reshape(-1), None if g_H is None else g_H.reshape(-1), H, log_total)
        dlogits = cross_entropy_kernels.backward(rows, flat, m, log_total, *coefficients, 1 / temperature)
        return dlogits.reshape(shape)

    logp = (x_target - log_total).reshape(lead)
    return (logp, H.reshape(lead)) if entropy else logp, (back, None)


def _logprob_coefficients(g, g_H, H, log_total):
    """a, b, c, d of the gradient kernel for g log p_target + g_H H."""
    zero = 0 * g
    return (-g, zero, g, zero) if g_H is None else (-g - g_H * (H - log_total), -g_H, g, zero)


ROWS = 256  # on a GPU, the number of rows of logits is a multiple of this, or all


def _row_chunks(hidden, V, rows_per_chunk):
    """Slices of rows whose logits fill about 16 MB, a processor's cache, at least 128 rows; on a GPU, which needs more
    rows to be busy, at most 1 GB or 4096 rows, and equally many in each: dweight is read and written for every slice.
    """
    on_host = device_of(hidden) == "cpu"
    least, memory = (128, 16 << 20) if on_host else (4096, 1 << 30)
    size, N = rows_per_chunk or max(least, memory // (V * hidden.itemsize)), len(hidden)
    if not on_host and not rows_per_chunk and size < N:
        size = min(size, -(-N // (-(-N // size) * ROWS)) * ROWS)
    return [slice(i, min(i + size, N)) for i in range(0, N, size)]


def _compressed(hidden, targets):
    """(rows, hidden, targets), all where hidden is, without the ignored rows, which then cost nothing. rows is None
    where none is ignored, or where the targets are on a GPU, because counting would wait for it."""
    flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    if not isinstance(targets, np.ndarray) or (targets >= 0).all():
        return None, flat, beside(targets, flat)
    rows = np.flatnonzero(targets >= 0)
    if device_of(flat) == "cuda":  # some ignored rows stay: sizes that products are fast with, and only a few of them
        rows = np.concatenate([rows, np.flatnonzero(targets < 0)[: -len(rows) % ROWS]])
    at = beside(rows, flat)
    return at, flat[at], beside(targets[rows], flat)


def _spread(x, rows, lead):
    """Undo `_compressed`, for what has a row (or a number) for each of the used ones: (*lead, ...), 0 where a row was
    ignored."""
    if rows is not None:
        used, x = x, xp_of(x).zeros((math.prod(lead), *x.shape[1:]), x.dtype)
        x[rows] = used
    return x.reshape(*lead, *x.shape[1:])


def _head_of(weight, dtype):
    """The weight (V, D) in this dtype; on a GPU with rows of zeros behind it, up to a multiple of 8. Where V is none
    (GPT-2's 50,257), rows of logits would begin anywhere, and neither the tensor cores (cuBLAS 13, section 2.1.11) nor
    cross-entropy could take them 16 bytes at a time. The logits behind V are 0; kernels get none of them, and so they
    are the zeros that the gradient needs there."""
    V, D = weight.shape
    rows = V if device_of(weight) == "cpu" else -(-V // 8) * 8
    if rows == V:
        return weight.astype(dtype, copy=False)
    padded = empty(weight, (rows, D), dtype)
    padded[:V], padded[V:] = weight, 0
    return padded


class _HeadGradient:
    """dhidden and dweight of logits = hidden weight^T, added up over chunks of dlogits; weight is _head_of's."""

    def __init__(self, hidden, weight, needs):
        self.dhidden = empty(hidden, hidden.shape) if needs[0] else None
        self.dweight = xp_of(weight).zeros(weight.shape, upcast(weight[:0]).dtype) if needs[1] else None
        self.hidden, self.weight = hidden, weight

    def add(self, chunk, dlogits):
        if self.dhidden is not None:
            multiply(dlogits, self.weight, self.dhidden[chunk])
        if self.dweight is not None:
            multiply(dlogits.T, self.hidden[chunk], self.dweight, add=True)


@op
def linear_cross_entropy(
    hidden,
    weight,
    targets,
    *,
    needs,
    weights=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    rows_per_chunk=None,
):
    """cross_entropy(linear(hidden, weight), targets, ...) in chunks of rows, so that the N x V logits never exist:
    hidden (..., D), weight (V, D), targets (...) int; the options are cross_entropy's.

    dhidden = g dlogits weight, dweight = g dlogits^T hidden, with cross_entropy's dlogits (kernels/cross_entropy.py).
    The result is a scalar whose token weights are known beforehand, so a chunk's dlogits are made, in place, with the
    statistics of its logits, which are read once, and then the two products with them; on the way back they are only
    multiplied by g. Without a gradient to make (no_grad), none is. Rows that are ignored cost nothing.
    Keeps dhidden and dweight.
    Example: linear_cross_entropy(randn(B, T, D), randn(V, D), ids(V, B, T), weights=positive(B, T), rows_per_chunk=3)
    """
    xp, V = xp_of(hidden), weight.shape[0]
    flat_targets = _checked_targets("linear_cross_entropy", hidden.shape[:-1], targets, V, ignore_index, weights)
    rows, h, t = _compressed(hidden, flat_targets)
    w = beside(_mean_weights(flat_targets, weights, upcast(hidden[:0]).dtype), h)
    w = w if rows is None else w[rows]
    head = _head_of(weight, h.dtype)
    gradient = _HeadGradient(h, head, needs)
    total = xp.zeros((), w.dtype)
    for chunk in _row_chunks(h, V, rows_per_chunk):
        logits = multiply(h[chunk], head.T)
        wc = w[chunk]
        if any(needs):
            rows_of_gradient = wc, 2 * z_loss * wc, (label_smoothing - 1) * wc, -label_smoothing / V * wc
            _, *found = cross_entropy_kernels.fused_inplace(logits[:, :V], t[chunk], *rows_of_gradient, 1.0)
            gradient.add(chunk, logits)
        else:
            *found, _ = cross_entropy_kernels.forward(logits[:, :V], t[chunk], 1.0)
        total = total + (_loss_rows(V, *found, label_smoothing, z_loss) * wc).sum()
    dhidden, dweight, lead = gradient.dhidden, gradient.dweight, targets.shape
    return total, (
        lambda g: _spread(dhidden * g.astype(dhidden.dtype), rows, lead),
        lambda g: dweight[:V] * g,
        None,
    )


@op
def linear_token_logprobs(
    hidden, weight, targets, *, needs, temperature=1.0, entropy=False, ignore_index=-100, rows_per_chunk=None
):
    """token_logprobs(linear(hidden, weight), targets, ...) in chunks of rows, so that the N x V logits never exist:
    hidden (..., D), weight (V, D), targets (...) int; the options and results are token_logprobs'.

    dhidden = dlogits weight, dweight = dlogits^T hidden, with token_logprobs' dlogits (kernels/cross_entropy.py).
    What g will be is not known yet (PPO, DPO), so the logits of a chunk are made again on the way back and turned into
    their gradient in place.
    Keeps hidden, weight, targets and a few numbers per row.
    Example: linear_token_logprobs(randn(B, T, D), randn(V, D), ids(V, B, T), entropy=True, rows_per_chunk=3)
    """
    xp, V = xp_of(hidden), weight.shape[0]
    flat_targets = _checked_targets("linear_token_logprobs", hidden.shape[:-1], targets, V, ignore_index)
    rows, h, t = _compressed(hidden, flat_targets)
    head = _head_of(weight, h.dtype)
    chunks = _row_chunks(h, V, rows_per_chunk)
    dtype = upcast(hidden[:0]).dtype
    m, log_total, logp, H = (xp.zeros(len(h), dtype) for _ in range(4))
    for chunk in chunks:
        logits = multiply(h[chunk], head.T)
        found = cross_entropy_kernels.forward(logits[:, :V], t[chunk], 1 / temperature)
        m[chunk], log_total[chunk], x_target, _, x_mean = found
        logp[chunk], H[chunk] = x_target - log_total[chunk], log_total[chunk] - x_mean
    lead = targets.shape

    def back(g, g_H=None):
        g, g_H = (None if x is None else x.reshape(-1) if rows is None else x.reshape(-1)[rows] for x in (g, g_H))
        coefficients = _logprob_coefficients(g, g_H, H, log_total)
        gradient = _HeadGradient(h, head, needs)
        for chunk in chunks:
            logits = multiply(h[chunk], head.T)
            row_values = (m[chunk], log_total[chunk], *(x[chunk] for x in coefficients))
            cross_entropy_kernels.backward_inplace(logits[:, :V], t[chunk], *row_values, 1 / temperature)
            gradient.add(chunk, logits)
        dweight = gradient.dweight[:V] if needs[1] else None
        return _spread(gradient.dhidden, rows, lead) if needs[0] else None, dweight, None

    results = tuple(_spread(x, rows, lead) for x in (logp, H))
    return results if entropy else results[0], back
