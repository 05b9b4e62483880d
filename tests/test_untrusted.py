"""Files, templates and texts from strangers: nothing is unpickled or run, no size is believed, no path leads away."""

import ast
import json
import re
import resource
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import lora
from minillm.chat import TEMPLATES, jinja_source, render
from minillm.data.classifier import Classifier
from minillm.data.conversations import (
    Conversation,
    Preference,
    encode_answer,
    encode_conversations,
    encode_preferences,
    encode_prompts,
)
from minillm.data.datasets import load_tokens
from minillm.data.readers import parse_row, read
from minillm.extras import extra
from minillm.files import LARGEST_HEADER, read_header, read_object
from minillm.hub import stored_tensors
from minillm.model import Config, build
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------ no pickle

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def unpickling(source):
    """What in a source could unpickle a file: modules that do, and np.load, whatever it is told."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.arg
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.load", "numpy.load"):
            yield ast.unparse(node)


def test_no_file_is_ever_unpickled():
    found = {
        str(path): list(unpickling(path.read_text(encoding="utf-8")))
        for folder in ("minillm", "kernels", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(found) > 50 and not [path for path, names in found.items() if names]
    assert list(unpickling("import pickle")) and list(unpickling("import numpy as np\nnp.load('a')"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=f"only {re.escape(name)}: pickled weights are not read, because they can run"):
        stored_tensors(tmp_path)


# ------------------------------------------------------------------ safetensors


def weights(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "empty": (b"", "it ends before its header does, after 0 bytes"),
    "an endless header": (b"\xff" * 8 + b"{}", "it ends before its header does, after 10 bytes"),
    "a header that is cut": ((99).to_bytes(8, "little") + b"{}", "it ends before its header does, after 10 bytes"),
    "a huge header": (
        weights(b" " * (LARGEST_HEADER + 1)),
        "a header of 16,777,217 bytes, and 16,777,216 are the most",
    ),
    "a nested header": (weights(b'{"a":' * 100_000), "is not a readable safetensors file"),
    "a list": (weights(b"[]"), "is not a readable safetensors file"),
    "overlapping": (weights({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)), "invalid offset"),
    "a gap": (weights({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)), "invalid offset"),
    "out of range": (weights({"a": tensor([1 << 30], 0, 4 << 30)}, bytes(4)), "not fully covered"),
    "backwards": (weights({"a": tensor([1], 8, 4)}, bytes(8)), "is not a readable safetensors file"),
    "negative": (weights({"a": tensor([-1], 0, 4)}, bytes(4)), "is not a readable safetensors file"),
    "an overflow": (weights({"a": tensor([1 << 40, 1 << 40], 0, 4)}, bytes(4)), "is not a readable safetensors file"),
    "a lying dtype": (weights({"a": tensor([1], 0, 4, "F64")}, bytes(4)), "is not a readable safetensors file"),
    "no dtype": (weights({"a": tensor([1], 0, 4, "object")}, bytes(4)), "is not a readable safetensors file"),
    "a name twice": (
        weights(b'{"a":%s,"a":%s}' % ((json.dumps(tensor([1], 0, 4)).encode(),) * 2), bytes(4)),
        "the key 'a' occurs twice",
    ),
    "a name that is a path": (weights({"../a": tensor([1], 0, 4)}, bytes(4)), "'../a' is no name of a tensor"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_header_is_one_line_and_takes_no_memory(name, tmp_path):
    data, message = SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    model = build(Config(vocab_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    readers = (
        lambda: read_header(path),
        lambda: stored_tensors(tmp_path),
        lambda: lora.load_adapter(model, tmp_path),
        lambda: Classifier.load(path),
    )
    for reader in readers:
        tracemalloc.start()
        with pytest.raises(ValueError) as error:
            reader()
        assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()


# ------------------------------------------------------------------ templates

MANY = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
MANY += "{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
GROW = "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested filtered": "{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}",
    "select": "{% for i in range(99999) %}{{ range(99999)|select('eq', -1)|list }}{% endfor %}",
    "mul": "{{ 'a' * 10**9 }}",
    "mul list": "{% set x = [1] * 10**9 %}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "double +": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "double ~": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "double block": GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "join": "{{ (['a' * 1000000] * 99999)|join }}",
    "join method": "{{ ('a' * 100000).join(['b'] * 99999) }}",
    "join map": "{{ ''.join((['a' * 1000000] * 99999)|map('default')) }}",
    "center": "{{ 'x'|center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "replace": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "replace method": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "indent": "{{ ('\n' * 99999)|indent(99999) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format(1, '1000000000') }}",
    "str.format many": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "percent many": "{{ ('%(a)s' * 99999) % {'a': 'a' * 99999} }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format('') }}",
    "attr escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{% set c = cycler('a' * 99999, 'b') %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
    "joiner": "{% set j = joiner('a' * 99999) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    "macro forever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loop tree": (
        "{% for i in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}"
    ),
    "block": (
        "{% block a %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endblock %}{% for i in range(99999) %}"
        "{% for j in range(9999) %}{{ self.a() }}{% endfor %}{% endfor %}"
    ),
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "from": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "slices": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "in": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "range count": "{% set x = range(99999) %}{% for i in range(99999) %}{% if x.count('a') %}{% endif %}{% endfor %}",
    "split": "{{ ('ab ' * 9999999).split() }}",
    "splitlist": "{{ ('中' * 9999999)|list }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "round": "{{ 1.5|round(10**10, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "int": "{{ ('f' * 9999999)|int(0, 16) }}",
    "sum": "{{ ([[1] * 999] * 9999)|sum(start=[]) }}",
    "tojson indent": "{{ ([1] * 99999)|tojson(indent=99999) }}",
    "tojson separators": "{{ ([1] * 99999)|tojson(separators=('a' * 99999, 'b')) }}",
    "tojson deep": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}"
    ),
    "lipsum": "{{ lipsum(n=10**6) }}",
    "urlize": "{{ 'x'|urlize }}",
    "parens": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "ifs": "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
    "big number": "{{ 0x" + "f" * 50_000 + " * 3 }}",
    "digits": "{{ " + "9" * 50_000 + " }}",
    "text": "{{ 'x' * 15000000 }}",
    "raise": "{{ raise_exception('a\n' * 99999) }}",
    "loopcontrols": "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "string loop": "{% set x = 'a' * 10000000 %}{% for c in x %}{% endfor %}",
    "call": (
        "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call f() %}{% for j in range(9999) %}x{% endfor %}{% endcall %}"
    ),
    "dict copy": "{% set d = {}.fromkeys(range(99999)) %}{% for i in range(99999) %}{% set x = d.copy() %}{% endfor %}",
    "lazy": (
        "{% set ns = namespace(x=range(9999)) %}{% for i in range(5000) %}"
        "{% set ns.x = ns.x|map('abs') %}{% endfor %}{{ ns.x|list }}"
    ),
    "namespace loop": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "many": "{{a}}" * 12_000,
    "too long": "x" * 100_000 + "{{ 1 }}",
    "many printed": MANY + "{{ ns.x }}",
    "many as JSON": MANY + "{{ ns.x|tojson }}",
    "many compared": MANY + "{{ ns.x == ns.y }}",
    "many searched": MANY + "{{ ns.x in [ns.y] }}",
    "many tested": MANY + "{{ ns.x is eq(ns.y) }}",
    "many formatted": MANY + "{{ '%s' % (ns.x,) }}",
    "many of a namespace": MANY + "{{ ns }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_asks_for_too_much_is_stopped(name):
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError) as error:
        render([{"role": "user", "content": "hi"}], BOMBS[name])
    told, after = str(error.value), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert told.startswith("the chat template") and "\n" not in told and len(told) < 400
    assert after - before < 300_000 and time.process_time() - begin < 5  # KB; a second or two where nothing else runs


def test_a_long_conversation_is_no_fault():
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 40} for n in range(400)]
    source = jinja_source("llama3").replace("message['content'] +", "(message['content'] | trim | replace('a', 'b')) +")
    assert len(render(messages, source)[0]) > 400 * 200


# ------------------------------------------------------------------ special tokens in what users write

PIECES = Tokenizer.train([], SMALLEST_VOCABULARY)
CONTROL = set(PIECES.special_tokens.values())
spliced = st.lists(st.sampled_from([*PIECES.special_tokens, "a", " ", "\n", "<", "|>", "[", "é"]), min_size=1).map(
    "".join
)


def controls(ids):
    return [int(i) for i in ids if int(i) in CONTROL]


@settings(max_examples=25)
@given(spliced, spliced)
def test_no_trainer_takes_a_text_for_a_control_token(said, answered):
    said, answered = said + "x", answered + "y"  # none is blank
    assert not controls(PIECES.encode(said)) and not controls(PIECES.encode_batch([said])[0])  # pretraining, generate
    for template in (*TEMPLATES, *map(jinja_source, TEMPLATES)):

        def encoded(question, answer, template=template):
            asked = [{"role": "user", "content": question}]
            talk = [*asked, {"role": "assistant", "content": answer}]
            ((ids, _),) = encode_conversations([Conversation("", talk, {})], template, PIECES, 9999)
            (ranking,) = encode_preferences([Preference("", asked, [answer, "z"], 0.0, 1.0)], template, PIECES, 9999)
            ((prompt, _),) = encode_prompts([Conversation("", asked, {})], template, PIECES, 9999)
            return [controls(part) for part in (ids, prompt, *(i for i, _ in ranking.answers))] + [
                controls(encode_answer(asked, answer, template, PIECES)[0])
            ]

        assert encoded(said, answered) == encoded("q", "a")


# ------------------------------------------------------------------ bombs


@pytest.mark.parametrize(
    "line, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 10**6 + "}", "a whole number of 1,000,000 digits is too large"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ("\0" * 100, "not JSON: expecting value at column 1"),
        ('{"a": NaN}', "NaN is not JSON"),
    ],
)
def test_a_json_bomb_is_one_line(line, message, tmp_path):
    (tmp_path / "config.json").write_text(line)
    for reader in (lambda: parse_row(line), lambda: read_object(tmp_path / "config.json")):
        with pytest.raises(ValueError, match=message):
            reader()


def test_rows_of_a_table_that_share_one_long_text_take_little_memory(tmp_path):
    pyarrow, parquet = extra("pyarrow", "data"), extra("pyarrow.parquet", "data")
    text = "a" * (8 << 20)
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(40, np.int32), [text])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    most = 0
    for document in read([tmp_path / "a.parquet"]):
        assert document.text == text
        most = max(most, pyarrow.total_allocated_bytes())
    assert most < 160 << 20  # and not 40 texts of 8 MB
    with pytest.raises(
        ValueError, match=r"a\.parquet:1: a text of 8,388,608 characters, and the longest allowed is 1,000"
    ):
        list(read([tmp_path / "a.parquet"], max_line=1000))


def test_a_column_of_a_table_that_is_a_bomb_is_refused(tmp_path, monkeypatch):
    pyarrow, parquet = extra("pyarrow", "data"), extra("pyarrow.parquet", "data")
    monkeypatch.setattr("minillm.data.readers.BOMB", (1 << 20, 100))
    parquet.write_table(pyarrow.table({"text": ["a" * (2 << 20)]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"column 'text' has .* bytes that become .*: no text is like that$"):
        list(read([tmp_path / "a.parquet"]))


# ------------------------------------------------------------------ paths


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0", "a\n"])
def test_a_name_in_a_file_never_leads_out_of_its_folder(name, tmp_path):
    index = {"weight_map": {"a": f"{name}.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not the plain name of a"):
        stored_tensors(tmp_path)
    manifest = {"format": 1, "tokens": {"train": {"a": {"file": name}}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not the plain name of a"):
        load_tokens(tmp_path, "train")
