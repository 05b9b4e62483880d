"""
What a Config costs: parameters, floating-point operations per token, and memory.

The counts follow the model's matrices one by one; a product of an (n, k) matrix with a vector is 2 n k operations, and
the way back costs twice the way there (Kaplan et al. 2020, section 2.1 with table 1).
"""

import math

from minillm.model import ARCHITECTURES


def parameter_count(config):
    """Numbers in the model, by kind: {"embedding", "blocks", "head", "total", "without_embedding"}.

    A tied head has none of its own. "without_embedding" is Kaplan's N: neither embeddings nor positions nor the head.
    """
    shapes = ARCHITECTURES[config.architecture].shapes(config)
    count = {"embedding": 0, "blocks": 0, "head": 0}
    for name, shape in shapes.items():
        kind = "embedding" if any(part in name for part in ("embed", "wte", "wpe")) else "blocks"
        kind = "head" if name in ("lm_head.weight", "score.weight") else kind
        count[kind] += math.prod(shape)
    count["total"] = sum(count.values())
    count["without_embedding"] = count["blocks"]
    return count


def flops_per_token(config, context):
    """Operations per token of documents of `context` tokens, by kind: {"matrices", "attention", "forward", "training"}.

    "matrices" are all products with weights, the head's included; "attention" is q . k and p v, averaged over a
    document's tokens (a token sees half of the context on average, or its window). "training" is three times "forward".
    """
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    mlp = (3 if c.architecture == "llama" else 2) * c.hidden_size * c.intermediate_size
    block = c.hidden_size * (q + 2 * kv) + q * c.hidden_size + mlp
    head = c.hidden_size * (c.vocab_size if c.head == "lm" else 1)
    attention = 0.0
    for layer in range(c.num_hidden_layers):
        window = c.window_of(layer)
        attention += 4 * q * _mean_seen(context, context if window is None else min(window, context))
    matrices = 2 * (c.num_hidden_layers * block + head)
    forward = matrices + attention
    return {"matrices": matrices, "attention": attention, "forward": forward, "training": 3 * forward}


def _mean_seen(context, window):
    """How many tokens one sees on average, itself included: position i sees min(i + 1, window)."""
    return (window * (window + 1) / 2 + (context - window) * window) / context


def memory_bytes(config, rows, context, *, itemsize=4, vocab_chunk_bytes=16 << 20):
    """Bytes of training with AdamW, by kind: {"weights", "gradients", "optimizer", "activations", "total"}.

    rows x context tokens a step. "activations" is what the graph keeps until the way back (see autograd.saved_report),
    with float32 weights, gradients and moments, activations of `itemsize` bytes, and a fused head that never has all
    logits at once, and keeps the gradients dhidden and dweight. With activation checkpointing it is the peak on the way
    back: each block's input, and what one block keeps while it is run again.
    """
    c, tokens = config, rows * context
    total = parameter_count(config)["total"]
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    if c.architecture == "llama":
        # norm 1's input and output, q|k|v (with qk_norm, q and k before and after), attention's output, norm 2's input
        # and output, gate|up, their product
        per_token = 4 * c.hidden_size + (q + 2 * kv) + (q + kv) * c.qk_norm + q + 3 * c.intermediate_size
    else:
        per_token = 4 * c.hidden_size + 3 * q + q + 2 * c.intermediate_size
    if c.activation_checkpointing:
        activations = c.num_hidden_layers * c.hidden_size * tokens + per_token * tokens
    else:
        activations = c.num_hidden_layers * per_token * tokens
    activations = (activations + 2 * c.hidden_size * tokens) * itemsize + vocab_chunk_bytes
    activations += 4 * c.vocab_size * c.hidden_size if c.head == "lm" else 0  # dweight (linear_cross_entropy)
    kinds = {"weights": 4 * total, "gradients": 4 * total, "optimizer": 8 * total, "activations": activations}
    return {**kinds, "total": sum(kinds.values())}
