"""
Turn a llama2.c checkpoint (version 0: MODEL.bin, and its tokenizer TOK.bin) into a model folder.

    python scripts/convert_llama2c.py MODEL.bin TOK.bin --out FOLDER

The folder holds config.json, model.safetensors and tokenizer.json, for scripts/generate.py or any other reader of
Hugging Face folders. llama2.c turns neighbouring pairs of a head in RoPE, we turn d and d + D/2, so the rows of q and k
are put in another order; nothing else changes.
"""

import dataclasses
import json
import struct
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import numpy as np

import scripts.command_line as command_line
from minillm.hub import save_pretrained
from minillm.model import Config, Llama
from minillm.trainers.run import check_out, claim


@dataclasses.dataclass(kw_only=True)
class Options:
    """The checkpoint."""

    tensorboard, resume, device = False, False, "cpu"  # no options: what `claim` wants to know of a trainer

    model: tyro.conf.Positional[Path | None] = None
    """MODEL.bin"""
    tokenizer: tyro.conf.Positional[Path | None] = None
    """its TOK.bin"""
    out: Path
    """the model folder to make"""
    overwrite: bool = False
    """replace the folder if it is there"""

    def __post_init__(self):
        if self.model is None or self.tokenizer is None:
            raise ValueError("two files are needed, before all options: MODEL.bin TOK.bin")


def read_model(path):
    """The Llama of a version-0 file: seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, context; a negative
    vocabulary means an untied head), then float32 weights, each kind for all layers together."""
    data = Path(path).read_bytes()
    if len(data) < 28:
        raise ValueError(f"{path} is no llama2.c checkpoint: it has {len(data)} bytes, fewer than its header")
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), context) < 1 or dim % heads:
        raise ValueError(f"{path} is no llama2.c checkpoint: its header is {struct.unpack('<7i', data[:28])}")
    config = Config(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=vocab > 0,
    )
    head, kv = dim // heads, kv_heads * (dim // heads)
    parts = [("embed_tokens", 1, (abs(vocab), dim)), ("input_layernorm", layers, (dim,))]
    attention = {"q": (dim, dim), "k": (kv, dim), "v": (kv, dim), "o": (dim, dim)}
    parts += [(f"self_attn.{n}_proj", layers, shape) for n, shape in attention.items()]
    parts += [("post_attention_layernorm", layers, (dim,)), ("mlp.gate_proj", layers, (hidden, dim))]
    parts += [("mlp.down_proj", layers, (dim, hidden)), ("mlp.up_proj", layers, (hidden, dim)), ("norm", 1, (dim,))]
    parts += [("rope tables, not used", 1, (context, head))]
    parts += [("lm_head", 1, (abs(vocab), dim))] if vocab < 0 else []
    floats, at, arrays = np.frombuffer(data[28 : len(data) - len(data) % 4], "<f4"), 0, {}
    for name, copies, shape in parts:
        size = copies * int(np.prod(shape))
        if at + size > len(floats):
            raise ValueError(f"{path} ends in the middle of {name}: {len(data)} bytes are too few for its header")
        for i, one in enumerate(floats[at : at + size].reshape(copies, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                one = halves_first(one, head)
            whole = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
            arrays[f"{whole.get(name, f'model.layers.{i}.{name}')}.weight"] = one
        at += size
    model = Llama(config)
    model.load_state_dict({name: a for name, a in arrays.items() if name in model.parameters})
    return model


def halves_first(weight, head):
    """Rows (0, 1), (2, 3), ... of each head as (0, 2, ...), (1, 3, ...)."""
    rows, width = weight.shape
    return weight.reshape(rows // head, head // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_tokenizer(path, vocab_size):
    """The tokenizer.json dict of a TOK.bin: an int32, then for each id a float32 score, an int32 length and the bytes.

    It is a SentencePiece BPE: characters are merged by score, unknown ones fall back to bytes, and a text begins with a
    blank. Ids 0, 1, 2 are <unk>, <s>, </s>; 3 to 258 the bytes.
    """
    data, at, pieces, scores = Path(path).read_bytes(), 4, [], []
    for i in range(vocab_size):
        if at + 8 > len(data):
            raise ValueError(f"{path} ends before id {i} of {vocab_size}")
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode("utf-8"))
        scores.append(score)
        at += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # the file says "\\n<s>\\n"
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merged = sorted((i for i in range(259, vocab_size) if len(pieces[i]) > 1), key=lambda i: -scores[i])
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in (pieces[i] for i in merged)
        for cut in sorted(range(1, len(piece)), key=lambda c: (vocab.get(piece[:c], 0), vocab.get(piece[c:], 0)))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    bpe = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **special} for i in range(3)],
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {**bpe, "vocab": vocab, "merges": merges},
    }


def convert(options):
    check_out(options)
    model = read_model(options.model)
    tokenizer = read_tokenizer(options.tokenizer, model.config.vocab_size)
    claim(options)
    folder = save_pretrained(model, options.out)
    text = json.dumps(tokenizer, ensure_ascii=False, indent=1)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    specials = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {model.flat.size:,} parameters, {model.config.vocab_size} tokens")


if __name__ == "__main__":
    command_line.run(convert, command_line.parse(Options, "Turn a llama2.c checkpoint into a model folder."))
