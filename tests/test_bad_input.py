"""Bad input and bad command lines: for each what the program says, word for word, with which status, and no traceback.

One line that names the file, line, field or value; status 2 for a wrong command line, 1 for the rest; no output folder
that was not there before, and every file as it was.
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_command_line import ROOT, make_world, script, wrong_command


def config(**changes):
    """A change of a model folder's config.json: null takes a key away."""

    def spoil(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return spoil


def file(name, data):
    """Another content of one of a folder's files; None: a folder in its place."""

    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)

    return spoil


def header(change):
    """A change of the header of a model's weights."""

    def spoil(folder):
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = change(json.loads(data[8 : 8 + size]))
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return spoil


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def index(weight_map):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def manifest(change):
    def spoil(folder):
        values = json.loads((folder / "manifest.json").read_text())
        change(values)
        (folder / "manifest.json").write_text(json.dumps(values))

    return spoil


FOLDERS = {  # name: (the good folder that it is made of, what is wrong with it)
    "no_json": ("base", file("config.json", b"\x00\xff\x00")),
    "list_config": ("base", file("config.json", b"[1]")),
    "empty_config": ("base", file("config.json", b"")),
    "folder_config": ("base", file("config.json", None)),
    "utf16_config": ("base", file("config.json", '{"a": 1}'.encode("utf-16"))),
    "twice_config": ("base", file("config.json", b'{"vocab_size": 1, "vocab_size": 2}')),
    "nan_config": ("base", file("config.json", b'{"rms_norm_eps": NaN}')),
    "deep_config": ("base", file("config.json", b'{"a":' + b"[" * 100_000)),
    "huge_number": ("base", file("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}")),
    "unknown_architecture": ("base", config(architectures=["MambaForCausalLM"])),
    "no_vocab": ("base", config(vocab_size=None)),
    "text_size": ("base", config(hidden_size="16")),
    "negative": ("base", config(num_hidden_layers=-1)),
    "no_context": ("base", config(max_position_embeddings=0)),
    "long_context": ("base", config(max_position_embeddings=10**9)),
    "other_width": ("base", config(hidden_size=32)),
    "more_layers": ("base", config(num_hidden_layers=2)),
    "many_layers": ("base", config(num_hidden_layers=10**6)),
    "float_size": ("base", config(hidden_size=16.0)),
    "heads": ("base", config(num_attention_heads=3)),
    "huge_eps": ("base", config(rms_norm_eps=1e300)),
    "quantised": ("base", config(quantization_config={"bits": 4})),
    "cut_weights": ("base", cut),
    "empty_weights": ("base", file("model.safetensors", b"")),
    "long_header": ("base", file("model.safetensors", b"\xff" * 8 + b"{}")),
    "folder_weights": ("base", file("model.safetensors", None)),
    "two_names": ("base", header(lambda h: json.dumps(h)[:-1].encode() + b', "lm_head.weight": 1}')),
    "lying_dtype": ("base", header(lambda h: h | {"model.norm.weight": h["model.norm.weight"] | {"dtype": "F16"}})),
    "out_of_range": (
        "base",
        header(lambda h: h | {"model.norm.weight": h["model.norm.weight"] | {"data_offsets": [0, 1 << 40]}}),
    ),
    "pickled": ("base", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
    "index_out": ("base", index({"lm_head.weight": "../base/model.safetensors"})),
    "index_list": ("base", index([1])),
    "list_tokenizer": ("base", file("tokenizer.json", b"[]")),
    "cut_tokenizer": ("base", file("tokenizer.json", b'{"version": "1.0", "mod')),
    "role_tokenizer": ("base", file("tokenizer_config.json", b'{"eos_token": 3}')),
    "list_tokenizer_config": ("base", file("tokenizer_config.json", b"[]")),
    "unknown_role": ("base", file("tokenizer_config.json", b'{"eos_token": "<end>"}')),
    "list_stop": ("base", file("generation_config.json", b'{"eos_token_id": ["</s>"]}')),
    "list_generation": ("base", file("generation_config.json", b"[]")),
    "list_note": ("base", file("minillm.json", b'{"template": ["chatml"]}')),
    "unknown_note": ("base", file("minillm.json", b'{"tempalte": "chatml"}')),
    "bad_template": ("base", file("minillm.json", b'{"template": "lama2"}')),
    "list_manifest": ("data", file("manifest.json", b"[]")),
    "old_manifest": ("data", manifest(lambda m: m.update(format=0))),
    "manifest_out": ("data", manifest(lambda m: m["tokens"]["train"]["a"].update(file="../data/a.train"))),
    "manifest_dtype": ("data", manifest(lambda m: m["tokens"]["train"]["a"].update(dtype="int8"))),
    "manifest_weight": ("data", manifest(lambda m: m.update(weights={"a": "much"}))),
    "manifest_weights": ("data", manifest(lambda m: m.update(weights=[1]))),
    "manifest_key": ("data", manifest(lambda m: m.update(token={}))),
    "manifest_tokens": ("data", manifest(lambda m: m["tokens"].update(train=[]))),
}
FILES = {
    "half.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp',
    "utf16.jsonl": '{"prompt": "a"}'.encode("utf-16"),
    "nul.jsonl": b"\x00" * 40,
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b'{"prompt": 3, "response": "b", "chosen": "c", "rejected": "d"}\n',
    "huge.jsonl": b'{"prompt": "a", "margin": 1e999}\n',
    "digits.jsonl": b'{"prompt": "a", "margin": ' + b"9" * 5000 + b"}\n",
    "nan.jsonl": b'{"prompt": "a", "response": NaN}\n',
    "nested.jsonl": b'{"prompt":' + b"[" * 100_000 + b"\n",
    "twice.jsonl": b'{"prompt": "a", "prompt": "b"}\n',
    "surrogate.jsonl": b'{"prompt": "\\ud800", "response": "b"}\n',
    "role.jsonl": b'{"messages": [{"role": "king", "content": "b"}]}\n',
    "nomessages.jsonl": b'{"messages": []}\n',
    "content.jsonl": b'{"messages": [{"role": "user"}]}\n',
    "probability.jsonl": b'{"prompt": "a", "chosen": "c", "rejected": "d", "preference": 2}\n',
    "one.jsonl": b'{"prompt": "a", "ranked": ["b"]}\n',
    "crlf.jsonl": b'{"prompt": "a", "response": "b"}\r\n{"prompt": "a"}\r\n',
    "bom.jsonl": b'\xef\xbb\xbf{"prompt": "a"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 99)[:-20],
    "plain.jsonl.gz": b"no gzip",
    "junk.parquet": b"PAR1 junk",
    "binary.txt": b"\xff\xfe\x00\x01" * 9,
    "syntax.jinja": b"{% for m in messages %}",
    "refuses.jinja": b"{{ raise_exception('no\nway') }}",
    "bomb.jinja": b"{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "include.jinja": b"{% include '/etc/passwd' %}",
    "text.jinja": b"hello",
    "empty.jinja": b"",
    "utf16.jinja": "{{ messages }}".encode("utf-16"),
    "settings.json": b"{",
    "chats.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
    "short.jsonl": b'{"text": "Too short."}\n',
    "turns.jsonl": b'{"messages": [], "id": "", "kind": "", "relation": "", "subject": "", "answer": "", '
    b'"aliases": [], "options": [], "must_refuse": false}\n',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root, before = tmp_path_factory.mktemp("bad"), Path.cwd()
    os.chdir(root)
    try:
        make_world()
        for name, (good, spoil) in FOLDERS.items():
            shutil.copytree(good, name)
            spoil(Path(name))
        for name, data in FILES.items():
            Path(name).write_bytes(data)
        Path("data_text/texts").mkdir(parents=True)
        Path("data_text/texts/a.jsonl").write_bytes(FILES["short.jsonl"])
        Path("text").mkdir()
        Path("text/metrics.jsonl").write_text('{"step": "read", "seconds": 1}\n')
        Path("pretrained").mkdir()
        Path("pretrained/settings.json").write_text('{"out": "pretrained", "hidden_size": 8, "num_hidden_layers": 1}')
        Path("pretrained/metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
        for folder, note in (("begun", b"{"), ("begun_list", b"[]"), ("begun_empty", b"{}")):
            Path(folder).mkdir()
            (Path(folder) / "pipeline.json").write_bytes(note)
    finally:
        os.chdir(before)
    return root


# A script, its arguments and what it has to say. Arguments that begin with ! are all there are; others replace or
# follow those of the good command line in test_command_line.py. "…": a library's own words follow.
CASES = [
    ("sft", "--model no_json", 1, "no_json/config.json is not UTF-8 text: byte 0xFF at position 1"),
    ("sft", "--model list_config", 1, "list_config/config.json is not a readable JSON object: it is a list"),
    ("generate", "!empty_config hi", 1,
     "empty_config/config.json is not a readable JSON object: not JSON: expecting value at column 1"),
    ("sft", "--model folder_config", 1, "folder_config/config.json can not be read: is a directory"),
    ("chat", "!utf16_config --prompt x", 1, "utf16_config/config.json is UTF-16; convert it to UTF-8"),
    ("evaluate", "!twice_config --data data --out out", 1,
     "twice_config/config.json is not a readable JSON object: the key 'vocab_size' occurs twice"),
    ("serve", "!nan_config", 1, "nan_config/config.json is not a readable JSON object: NaN is not JSON"),
    ("generate", "!deep_config hi", 1,
     "deep_config/config.json is not a readable JSON object: not usable JSON: it is nested too deeply"),
    ("sft", "--model huge_number", 1,
     "huge_number/config.json is not a readable JSON object: a whole number of 5,000 digits is too large"),
    ("generate", "!unknown_architecture", 1,
     "unknown_architecture/config.json: architecture 'MambaForCausalLM' is not supported; there are "
     "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, GPT2LMHeadModel and "
     "*ForSequenceClassification"),
    ("chat", "!no_vocab --prompt x", 1, "no_vocab/config.json: the key 'vocab_size' is missing"),
    ("sft", "--model text_size", 1,
     'text_size/config.json: hidden_size is "16", and has to be a positive whole number'),
    ("sft", "--model negative", 1,
     "negative/config.json: num_hidden_layers is -1, and has to be a positive whole number"),
    ("generate", "!no_context", 1,
     "no_context/config.json: max_position_embeddings is 0, and has to be a positive whole number"),
    ("generate", "!long_context", 1, "long_context/config.json: 1000000000 positions are more than 4194304"),
    ("sft", "--model other_width", 1,
     "other_width: the weights do not fit config.json: misshapen: model.embed_tokens.weight is (268, 16), "
     "not (268, 32), model.layers.0.input_layernorm.weight is (16,), not (32,), "
     "model.layers.0.self_attn.q_proj.weight is (16, 16), not (16, 32), "
     "model.layers.0.self_attn.k_proj.weight is (16, 16), not (16, 32), "
     "model.layers.0.self_attn.v_proj.weight is (16, 16), not (16, 32) and 6 more"),
    ("dpo", "--model more_layers", 1,
     "more_layers: the weights do not fit config.json: missing: model.layers.1.input_layernorm.weight, "
     "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, "
     "model.layers.1.mlp.up_proj.weight, model.layers.1.post_attention_layernorm.weight and 4 more"),
    ("generate", "!many_layers", 1, "many_layers: config.json has 1000000 layers, and the weights 11 tensors"),
    ("generate", "!float_size", 1,
     "float_size/config.json: hidden_size is 16.0, and has to be a positive whole number"),
    ("generate", "!heads", 1, "heads/config.json: num_key_value_heads = 2 must divide num_attention_heads 3"),
    ("generate", "!huge_eps", 1,
     "huge_eps/config.json: rms_norm_eps is 1e+300, and has to be a positive number of at most 1e38"),
    ("generate", "!quantised", 1, "quantised/config.json: quantization_config: quantised weights are not supported"),
    ("sft", "--model cut_weights", 1,
     "cut_weights/model.safetensors is not a readable safetensors file: Error while deserializing "
     "header:…"),
    ("generate", "!empty_weights", 1,
     "empty_weights/model.safetensors is not a readable safetensors file: it ends before its header does, "
     "after 0 bytes; fetch or save it again"),
    ("generate", "!long_header", 1,
     "long_header/model.safetensors is not a readable safetensors file: it ends before its header does, "
     "after 10 bytes; fetch or save it again"),
    ("generate", "!folder_weights", 1, "folder_weights/model.safetensors can not be read: is a directory"),
    ("generate", "!two_names", 1,
     "two_names/model.safetensors is not a readable safetensors file: Error while deserializing header:…"),
    ("generate", "!lying_dtype", 1,
     "lying_dtype/model.safetensors is not a readable safetensors file: Error while deserializing "
     "header:…"),
    ("generate", "!out_of_range", 1,
     "out_of_range/model.safetensors is not a readable safetensors file: Error while deserializing "
     "header:…"),
    ("generate", "!pickled", 1,
     "pickled has no *.safetensors, only pytorch_model.bin: pickled weights are not read, because they "
     "can run code; save the model as model.safetensors"),
    ("generate", "!index_out", 1,
     "index_out/model.safetensors.index.json: '../base/model.safetensors' is not the plain name of a "
     "*.safetensors file"),
    ("generate", "!index_list", 1,
     "index_list/model.safetensors.index.json: weight_map has to say for every tensor which file it is in"),
    ("generate", "!list_tokenizer", 1, "list_tokenizer/tokenizer.json is not a tokenizer.json:…"),
    ("sft", "--model cut_tokenizer", 1, "cut_tokenizer/tokenizer.json is not a tokenizer.json:…"),
    ("generate", "!role_tokenizer", 1,
     "role_tokenizer/tokenizer_config.json: eos_token has to be the name of a token, and is 3"),
    ("generate", "!list_tokenizer_config", 1,
     "list_tokenizer_config/tokenizer_config.json is not a readable JSON object: it is a list"),
    ("sft", "--model list_tokenizer_config", 1,
     "list_tokenizer_config/tokenizer_config.json is not a readable JSON object: it is a list"),
    ("sft", "--model unknown_role", 1, "unknown_role: the tokenizer: eos is '<end>', which is not in the vocabulary"),
    ("generate", "!list_stop", 1,
     'list_stop/generation_config.json: eos_token_id is ["</s>"], and has to be an id or a list of ids'),
    ("generate", "!list_generation", 1,
     "list_generation/generation_config.json is not a readable JSON object: it is a list"),
    ("pretrain", "--data list_manifest", 1, "list_manifest/manifest.json is not a readable JSON object: it is a list"),
    ("pretrain", "--data old_manifest", 1, "old_manifest/manifest.json: format is 0, and this version reads 1"),
    ("pretrain", "--data manifest_out", 1,
     "manifest_out/manifest.json: tokens.train.a: '../data/a.train' is not the plain name of a file "
     "beside it"),
    ("pretrain", "--data manifest_dtype", 1, "manifest_dtype/a.train.bin: dtype 'int8' is unknown: uint16, uint32"),
    ("pretrain", "--data manifest_weight", 1, "the weight of source 'a' is 'much', and has to be a positive number"),
    ("pretrain", "--data manifest_weights", 1,
     "manifest_weights/manifest.json: weights has to be {source: number}, and is a list"),
    ("pretrain", "--data manifest_tokens", 1,
     "manifest_tokens/manifest.json: tokens has to be {split: {source: piece}}"),
    ("sft", "--data half.jsonl", 1, "half.jsonl:2: not JSON: unterminated string starting at column 17"),
    ("sft", "--data utf16.jsonl", 1, "utf16.jsonl: is UTF-16; convert it to UTF-8"),
    ("sft", "--data list.jsonl", 1, 'list.jsonl:1: a list, where an object like {"text": ...} is needed'),
    ("sft", "--data number.jsonl", 1, "number.jsonl:1: messages has to be a list of messages, not int"),
    ("dpo", "--data huge.jsonl", 1, "huge.jsonl:1: the number 1e999 is too large"),
    ("dpo", "--data digits.jsonl", 1, "digits.jsonl:1: a whole number of 5,000 digits is too large"),
    ("sft", "--data nan.jsonl", 1, "nan.jsonl:1: NaN is not JSON"),
    ("ppo", "--prompts nested.jsonl", 1, "nested.jsonl:1: not usable JSON: it is nested too deeply"),
    ("ppo", "--prompts twice.jsonl", 1, "twice.jsonl:1: the key 'prompt' occurs twice"),
    ("sft", "--data surrogate.jsonl", 1, "surrogate.jsonl:1: lone surrogate U+D800 at character 0 of a string"),
    ("sft", "--data role.jsonl", 1,
     "role.jsonl:1: messages[0]: role is 'king', not one of system, user, assistant, tool"),
    ("sft", "--data nomessages.jsonl", 1, "nomessages.jsonl:1: messages is empty"),
    ("sft", "--data content.jsonl", 1, "content.jsonl:1: messages[0]: content is missing"),
    ("dpo", "--data probability.jsonl", 1, "probability.jsonl:1: preference is a probability, and is 2"),
    ("reward", "--data one.jsonl", 1, "one.jsonl:1: ranked has to be a list of at least two answers, the best first"),
    ("sft", "--data crlf.jsonl", 1,
     'crlf.jsonl:2: response is missing: {"messages": [...]} or {"prompt": ..., "response": ...} is needed'),
    ("sft", "--data bom.jsonl", 1,
     'bom.jsonl:1: response is missing: {"messages": [...]} or {"prompt": ..., "response": ...} is needed'),
    ("dpo", "--data sft.jsonl", 1,
     'sft.jsonl:1: chosen is missing: {"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., '
     '"ranked": [best, ...]} is needed'),
    ("sft", "--data cut.jsonl.gz", 1, "cut.jsonl.gz:9: the compressed data is damaged:…"),
    ("sft", "--data plain.jsonl.gz", 1, "plain.jsonl.gz:1: the compressed data is damaged:…"),
    ("sft", "--data junk.parquet", 1, "junk.parquet: is a table, and JSON lines are needed, one object a line"),
    ("prepare", "!junk.parquet --out out", 1, "junk.parquet: damaged, or not parquet:…"),
    ("prepare", "!binary.txt --out out", 1, "binary.txt: is UTF-16; convert it to UTF-8"),
    ("prepare", "!absent --out out", 1, "absent: no such file or folder"),
    ("prepare", "!empty.jsonl --out out", 1, "empty.jsonl: holds no document"),
    ("prepare", "!half.jsonl --key prompt --out out", 1,
     "half.jsonl:2: not JSON: unterminated string starting at column 17"),
    ("prepare", "!sft.jsonl --key prompt --out out --tokenizer absent", 1, "absent: No such file or directory"),
    ("prepare", "!sft.jsonl --key prompt --out out --tokenizer list_tokenizer", 1,
     "list_tokenizer/tokenizer.json is not a tokenizer.json:…"),
    ("prepare", "!sft.jsonl --key prompt --out out --tokenizer data/a.train.bin", 1,
     "data/a.train.bin is not UTF-8 text: byte 0xE8 at position 10"),
    ("prepare", "!sft.jsonl --key prompt --out file/out", 1, "file/out.partial: Not a directory"),
    ("prepare", "!sft.jsonl --key prompt --out file", 1, "file is a file, and has to be a folder"),
    ("prepare", "!data_text/texts --out data_text", 1,
     "data_text/texts is in --out data_text, which would be replaced: take another --out"),
    ("prepare", "!short.jsonl --out out", 1,
     "no document is left: default.word_count dropped 1 (first: short.jsonl:1: 2 words < 10: Too short.); "
     "--preset none takes the rules of quality away"),
    ("prepare", "!sft.jsonl --key prompt --out /proc/none/out", 1, "/proc/none: No such file or directory"),
    ("prepare", "!sft.jsonl --key prompt --out out --quality-model base/model.safetensors", 1,
     "base/model.safetensors is not a classifier: its metadata has no classifier's settings"),
    ("prepare", "!sft.jsonl --key prompt --out out --quality-model pref.jsonl", 1,
     "pref.jsonl is not a readable safetensors file: it ends before its header does, after 468 bytes; "
     "fetch or save it again"),
    ("prepare", "!sft.jsonl --key prompt --out out --weights b 1", 1,
     "--weights names the source 'b', and there is none of that name"),
    ("prepare", "!--out out", 2, "name at least one file or folder to read"),
    ("sft", "--template syntax.jinja", 1,
     "--data: no row can be used: 9 that the template has no place for (first: sft.jsonl:1: the chat "
     "template, line 1: Unexpected end of template.…"),
    ("sft", "--template refuses.jinja", 1,
     "--data: no row can be used: 9 that the template has no place for (first: sft.jsonl:1: the chat "
     "template fails: no way)"),
    ("sft", "--template bomb.jinja", 1,
     "--data: no row can be used: 9 that the template has no place for (first: sft.jsonl:1: the chat "
     "template fails: it takes far more work or text than its conversation needs)"),
    ("sft", "--template include.jinja", 1,
     "--data: no row can be used: 9 that the template has no place for (first: sft.jsonl:1: the chat "
     "template, line 1: it takes another file, and a chat template is one file)"),
    ("sft", "--template text.jinja", 1,
     "--data: no row can be used: 9 that the template has no place for (first: sft.jsonl:1: no template "
     "'hello': chatml, llama2, llama3, alpaca, or the source of a Jinja template)"),
    ("sft", "--template empty.jinja", 1,
     "--data: no row can be used: 9 that the template has no place for (first: sft.jsonl:1: no template "
     "'': chatml, llama2, llama3, alpaca, or the source of a Jinja template)"),
    ("sft", "--template utf16.jinja", 1, "utf16.jinja is UTF-16; convert it to UTF-8"),
    ("sft", "--template base", 1, "base has no chat template"),
    ("generate", "!absent", 1, "absent: no such folder"),
    ("generate", "!file", 1, "file is a file, and has to be a folder"),
    ("generate", "!base hi --temperature -1", 2, "--temperature has to be at least 0, and is -1.0"),
    ("generate", "!base hi --temperature nan", 2, "--temperature has to be at least 0, and is nan"),
    ("generate", "!base hi --top-p 2", 2, "--top-p has to be above 0 and at most 1, and is 2.0"),
    ("generate", "!base hi --top-k -1", 2, "--top-k has to be at least 0, and is -1"),
    ("generate", "!base hi --stop=", 2, "--stop has to be a text, and is empty: that occurs everywhere"),
    ("generate", "!base hi --max-new-tokens 0", 2, "--max-new-tokens has to be at least 1, and is 0"),
    ("generate", "!base hi --max-new-tokens x", 2, "argument --max-new-tokens: invalid int value: 'x'"),
    ("generate", "!base hi --samples 0", 2, "--samples has to be at least 1, and is 0"),
    ("generate", "!base hi --seed -1", 2, "--seed has to be at least 0, and is -1"),
    ("generate", "!base hi --tempertaure 1", 2,
     "unrecognized arguments: --tempertaure 1; perhaps you meant --temperature"),
    ("generate", "!base hi --stop", 2, "argument --stop: expected one argument"),
    ("generate", "!rm hi", 1, "rm is a reward model, and a language model is needed"),
    ("generate", "!no_tokenizer hi", 1,
     "no_tokenizer has no tokenizer.json: it is neither a model's folder nor prepared data"),
    ("generate", "!too_many_tokens", 1,
     "too_many_tokens: the tokenizer has 273 tokens, and the model knows 268: is it another's?"),
    ("generate", "!base hi --repetition-penalty 0", 2, "--repetition-penalty has to be above 0, and is 0.0"),
    ("generate", "!", 2, "the following arguments are required: FOLDER"),
    ("chat", "!", 2, "MODEL is missing: the folder of the model to talk with"),
    ("chat", "!absent --prompt x", 1, "absent: no such folder"),
    ("chat", "!rm --prompt x", 1, "rm is a reward model, and a language model is needed"),
    ("chat", "!base --prompt x --temperature -1", 2, "--temperature has to be at least 0, and is -1.0"),
    ("chat", "!base --prompt x --template lama2", 1,
     "--template 'lama2' is none of chatml, llama2, llama3, alpaca, and no file; perhaps you meant llama2"),
    ("chat", "!base --prompt x --template bomb.jinja", 1,
     "the chat template fails: it takes far more work or text than its conversation needs"),
    ("chat", "!base --promt x", 2, "Unrecognized options: --promt; perhaps you meant --prompt"),
    ("evaluate", "!absent --data data --out out", 1, "absent: no such folder"),
    ("serve", "!absent", 1, "absent: no such folder"),
    ("serve", "!base --port 99999", 2, "--port has to be from 0 to 65535, and is 99999"),
    ("serve", "!base --host 0.0.0.0", 2,
     "--host 0.0.0.0 lets other machines in: give them an --api-key, or leave it out"),
    ("serve", "!rm", 1, "rm is a reward model, and a language model is needed"),
    ("serve", "!base --api-key @absent", 1, "absent: No such file or directory"),
    ("serve", "!base --template syntax.jinja", 1, "the chat template, line 1: Unexpected end of template.…"),
    ("serve", "!base --template bomb.jinja", 1,
     "the chat template fails: it takes far more work or text than its conversation needs"),
    ("pipeline", "!--out file", 1, "file is a file, and has to be a folder"),
    ("pipeline", "!--out full", 1, "full is not empty, and was not made by the pipeline: take another --out"),
    ("pipeline", "!--out out --sft-data sft.jsonl", 2,
     "with data of your own, --pretrain-data and --preference-data and --prompts are needed, too"),
    ("pipeline", "!--out file/below", 1, "file/below: Not a directory"),
    ("pipeline", "!--out /proc/none", 1, "/proc/none: No such file or directory"),
    ("next_token", "!absent hi", 1, "absent: no such folder"),
    ("sft", "--out base/model.safetensors/x", 1, "base/model.safetensors/x: Not a directory"),
    ("sft", "--out base", 1, "base is not empty: take another --out, or replace it with --overwrite True"),
    ("sft", "--model base --out .", 1, ". is not empty: take another --out, or replace it with --overwrite True"),
    ("sft", "--lora-targets q --lora-rank 2", 1,
     "LoRA target 'q' is no projection of this model: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
     "down_proj"),
    ("sft", "--quantize nf4", 2,
     "--quantize has to be none without --lora-rank: four bits can not be trained, and is nf4"),
    ("sft", "--data absent.jsonl --out out", 1, "absent.jsonl: no such file"),
    ("ppo", "--max-new-tokens 0", 2, "--max-new-tokens has to be at least 1, and is 0"),
    ("ppo", "--reward absent", 1, "absent is no model folder: it has no config.json"),
    ("reward", "--held-out 1", 2, "--held-out has to be at least 0 and below 1, and is 1.0"),
    ("dpo", "--beta 0", 2, "--beta has to be above 0, and is 0.0"),
    ("dpo", "--beta x", 2, "Error parsing --beta: 'x' is no number"),
    ("pretrain", "--tokens 0", 2, "--tokens has to be at least 1, and is 0"),
    ("pretrain", "--tokens 1e6", 2, "Error parsing --tokens: '1e6' is no whole number"),
    ("pretrain", "--length 0", 2, "--length has to be at least 2, and is 0"),
    ("pretrain", "--data manifest_key --tokens 64 --length 32 --samples 1", 1,
     "manifest_key/manifest.json: no key 'token'; perhaps you meant tokens"),
    ("evaluate", "!base --data data --out full", 1,
     "data holds out no text; --validation of scripts/prepare.py says how much"),
    ("evaluate", "!base --out out", 2,
     "nothing to measure: give --questions, --data, --conversations, --preferences or --prompts"),
    ("collect", "!absent.jsonl --out out.jsonl", 2,
     "name the model's folder and at least one file of prompts: MODEL PROMPTS ..."),
    ("collect", "!", 2, "missing: --out PATH"),
    ("next_token", "!base hi --top 0", 2, "--top has to be at least 1, and is 0"),
    ("pretrain", "--weights a", 2, "Error parsing --weights: it takes NAME NUMBER ..."),
    ("pretrain", "--lora 3", 2, "Unrecognized options: --lora; perhaps you meant --lr"),
    ("sft", "--epochs -1", 2, "--epochs has to be above 0, and is -1.0"),
    ("dpo", "--schedule cos", 2, "--schedule has to be one of cosine, linear, constant, and is 'cos'"),
    ("sft", "--lora-alpha 8", 2,
     "--lora-alpha needs --lora-rank: without it the model itself is trained, and no adapter"),
    ("ppo", "--lora-targets q_proj", 2,
     "--lora-targets needs --lora-rank: without it the model itself is trained, and no adapter"),
    *[(name, "--length 65", 1, "--length has to be at most the context of base, 64, and is 65")
      for name in ("sft", "reward", "dpo")],
    ("sft", "--data long.jsonl --length 5", 1,
     "--data: no row can be used: 1 too long for a length of 5 tokens (first: long.jsonl:1)"),
    ("pretrain", "!--out nosuchrun --resume", 2,
     "nosuchrun has no settings.json: there is no run to resume, and to begin one: missing: --data PATH"),
    ("sft", "!--out pretrained --resume", 2,
     "pretrained is another trainer's run: its settings.json has hidden_size, num_hidden_layers; take another --out"),
    ("best_of_n", "!--model base --reward rm --prompts sft.jsonl --out full", 1,
     "full is not empty: take another --out, or replace it with --overwrite True"),
    ("best_of_n", "!--model base --reward rm --prompts sft.jsonl --out out --lr 1", 2, "Unrecognized options: --lr"),
    ("pipeline", "!--out out --from nosuch", 2,
     "--from has to be one of data, tokenizer, pretrain, sft, reward, ppo, dpo, report, and is 'nosuch'"),
    *[("pipeline", f"!--out out --pretrain-data {text} --sft-data {chats} --preference-data {pairs} --prompts {asked}",
       1, message) for text, chats, pairs, asked, message in (
        ("empty.jsonl", "sft.jsonl", "pref.jsonl", "sft.jsonl", "empty.jsonl: holds no document"),
        ("text.jsonl", "empty.jsonl", "pref.jsonl", "sft.jsonl", "--sft-data: no row can be used: it is empty"),
        ("text.jsonl", "sft.jsonl", "one.jsonl", "sft.jsonl",
         "one.jsonl:1: ranked has to be a list of at least two answers, the best first"),
        ("text.jsonl", "sft.jsonl", "pref.jsonl", "half.jsonl",
         "half.jsonl:2: not JSON: unterminated string starting at column 17"),
    )],
    ("compare_seeds", "!--seeds a", 2, "Error parsing --seeds: it takes N ..."),
    ("reward_hacking", "!base --episodes 5", 2,
     "--episodes has to be at least 257, as the first 256 teach the value model alone, and is 5"),
    ("bench_training", "!--width 33", 2, "--heads = 4 must divide --width 33"),
    ("bench_training", "!--rounds 0", 2, "--rounds has to be at least 1, and is 0"),
    ("bench_kernels", "!--only nothing --rounds 0", 2, "--rounds must be at least 1"),
    ("tune_attention", "!--rounds 0", 2, "--rounds must be at least 1"),
    ("atlas", "!--out full --size 50KB", 1,
     "full is not empty: take another --out, or replace it with --overwrite True"),
    ("atlas", "!--out full --size 50KB --overwrite True", 1,
     "full is not empty, and was not made by atlas.py: take another --out, or remove it yourself"),
    ("atlas", "!--out out --size 1KB", 2, "--size must be from 50KB to 1000MB, and is 1000 bytes"),
    ("atlas_task", "!--questions pref.jsonl --out out", 1,
     "pref.jsonl:1: not a question of the atlas, as in dev.jsonl or heldout.jsonl: no messages, id, kind, relation, "
     "subject, answer, aliases, options, must_refuse"),
    ("evaluate", "!base --questions turns.jsonl", 1,
     "turns.jsonl:1: not a question of the atlas, as in dev.jsonl or heldout.jsonl: messages has to be "
     '[{"role": "user", "content": ...}], and aliases and options lists'),
    ("convert_llama2c", "!half.jsonl half.jsonl --out base", 1,
     "base is not empty: take another --out, or replace it with --overwrite True"),
    ("convert_llama2c", "!half.jsonl --out out", 2, "two files are needed, before all options: MODEL.bin TOK.bin"),
    ("train_classifier", "!--positive text.jsonl --negative text.jsonl --out base/model.safetensors", 1,
     "base/model.safetensors exists: take another --out, or replace it with --overwrite True"),
    ("train_classifier", "!--positive text.jsonl --negative text.jsonl --out base/model.safetensors --overwrite", 1,
     "base/model.safetensors is not a classifier: its metadata has no classifier's settings: take another "
     "--out, or remove it yourself"),
    ("train_classifier", "!--positive text.jsonl --negative text.jsonl --out pretrained/new.safetensors", 1,
     "pretrained is the folder of a training run, with its own metrics: take another --out"),
    ("plot", "!pretrained full", 1, "full has no metrics.jsonl: it is no folder of a training run"),
    ("plot", "!pretrained text", 1, "text has nothing to draw: its metrics.jsonl has no loss and no evaluation"),
    ("plot", "!pretrained --metrics kl", 1, "pretrained has nothing to draw: its metrics.jsonl has no kl"),
    ("evaluate", "!base --conversations half.jsonl --out out", 1,
     "half.jsonl:2: not JSON: unterminated string starting at column 17"),
    ("chat", "!unknown_note --prompt x", 1,
     "unknown_note/minillm.json: no key 'tempalte'; perhaps you meant template"),
]  # fmt: skip


def snapshot(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(folder).rglob("*"))}


@pytest.mark.parametrize("name, given, code, message", CASES, ids=[f"{name} {given}" for name, given, *_ in CASES])
def test_it_is_told_in_one_line_and_nothing_is_left_behind(name, given, code, message, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    before = snapshot(".")
    arguments = given[1:].split() if given.startswith("!") else wrong_command(name, given).split()
    assert script(name, arguments, monkeypatch) == code
    told = capsys.readouterr()
    begin, cut, _ = f"{name}.py: {message}".partition("…")
    assert told.err.startswith(begin) and told.err.count("\n") == 1 and told.err.endswith("\n")
    assert cut or told.err == f"{begin}\n"
    assert told.out == "" and snapshot(".") == before


@pytest.mark.parametrize("name", ["sft", "generate", "prepare"])
def test_the_same_in_a_process_of_its_own(name, world):
    given, code, message = next(case[1:] for case in CASES if case[0] == name and "…" not in case[3])
    arguments = given[1:].split() if given.startswith("!") else wrong_command(name, given).split()
    ended = subprocess.run(
        [sys.executable, ROOT / f"scripts/{name}.py", *arguments], cwd=world, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", f"{name}.py: {message}\n")
