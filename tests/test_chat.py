"""minillm.chat: the text is the template's, the mask is the answers', and no message can write a control token."""

import importlib.util
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.chat import TEMPLATES, bytes_tokenizer, load_template, render, segments, stop_ids
from minillm.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
SCRIPT = ROOT / "scripts/render.py"

BYTEWISE = Tokenizer.train([], SMALLEST_VOCABULARY)
MERGED = Tokenizer.train(["user\nHello there\n\nassistant\nHi! ### Response:\n [/INST] Hi there"] * 9, 400)
END = {"chatml": "<|im_end|>", "llama2": " </s>", "llama3": "<|eot_id|>", "alpaca": "</s>"}  # of an answer

# Jinja templates in the manners that checkpoints have; the first is the pattern of most of them.
JINJA = {
    "trim": """{{ bos_token }}{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content.strip() }}<|im_end|>{% endif %}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "slice": """{% set system = messages[0].content if messages[0].role == 'system' else 'none' %}
{% macro turn(m) %}[INST] {{ m.content[:40] ~ (m.content[40:]) }}[/INST]{% endmacro %}{{ bos_token }}<<SYS>>{{ system }}
{%- for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ turn(m) }}{% endif %}{% endfor %}""",
    "pieces": "{% for m in messages %}{{ '<|' ~ m.role + '|>' + m.content + '<|end|>' }}{% endfor %}",
    "quoted pieces": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim | tojson }}{% endfor %}",
    "quotes": """{% for m in messages %}{% if m.content == 'stop' %}{% break %}{% endif %}
<|im_start|>{{ {'role': m.role, 'text': m.content} | tojson }}<|im_end|>{% endfor %}""",
}
PIECES = Tokenizer.train(
    [], 400, special_tokens=[*SPECIAL_TOKENS, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
)

markers = [
    *PIECES.special_tokens,
    *"<|/>[]",
    "im_end",
    "### Response:\n",
    "<<",
    "\U000f0000",
    "\U000f0001",
    "\n",
    " ",
    "s",
]
contents = st.text(max_size=20) | st.lists(st.sampled_from(markers) | st.text(max_size=3), max_size=8).map("".join)


def talk(*contents, system=None):
    """A conversation in which user and assistant take turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def trained_spans(pieces):
    """[(begin, end), ...] of what is trained, in characters of the text."""
    spans, position = [], 0
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        begin, position = position, position + len(text_of(run))
        spans += [[begin, position]] * trained
    return spans


def controls(ids, tokenizer):
    return [i for i in ids.tolist() if i in tokenizer.special_tokens.values()]


# ------------------------------------------------------------------ known answers


def test_five_tokens():
    ids, mask = render(
        talk("a", "b"), "{{ bos_token }}a{% generation %}b{{ eos_token }}{% endgeneration %}\n", BYTEWISE
    )
    assert BYTEWISE.decode(ids) == "<s>ab</s>" and ids.dtype == np.uint16 and mask.dtype == bool
    assert mask.tolist() == [False, False, True, True]  # Jinja drops the newline at the end
    ids, mask = render(talk("a", "b"), "chatml", BYTEWISE)
    assert (
        "".join(".#"[m] for m in mask.tolist())
        == ".." + "." * len("user\na") + "..." + "." * len("assistant\n") + "##."
    )


TEXTS = {
    "chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST] ",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "R<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n### Instruction:\nR\n\n### Response:\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_of_the_templates(template):
    ids, mask = render(talk("Q", "A", "R", system="S"), template, MERGED, add_generation_prompt=True)
    assert MERGED.decode(ids) == TEXTS[template]
    assert MERGED.decode(ids[mask]) == "A" + END[template]


def test_tools_have_their_place_in_chatml_and_llama3():
    messages = [*talk("Q"), {"role": "tool", "content": "T"}, {"role": "assistant", "content": "A"}]
    for template, turn in [
        ("chatml", "<|im_start|>tool\nT<|im_end|>\n"),
        ("llama3", "<|start_header_id|>ipython<|end_header_id|>\n\nT<|eot_id|>"),
    ]:
        ids, mask = render(messages, template, MERGED)
        assert turn in MERGED.decode(ids) and MERGED.decode(ids[mask]) == "A" + END[template]


def test_alpaca_without_a_system_message_has_its_own():
    assert text_of(segments(talk("Q"), "alpaca", BYTEWISE)) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nQ\n\n### Response:\n"
    )


def vectors():
    path = SHARED / "data/vectors/chat_templates.json"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return {case["name"]: case for case in json.loads(path.read_text(encoding="utf-8"))["cases"]}


MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ ' ' }}{% endif %}{% endfor %}"""
QWEN = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}
{%- endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' + role + '\n' }}
{%- if loop.last %}{% generation %}{{ m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    "name, template, roles",
    [
        ("llama2-default-system", "llama2", {}),
        ("llama3", "llama3", {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}),
        ("mistral-v1", MISTRAL, {}),
        ("qwen3-chatml-no-thinking-flag", QWEN, {"bos": None, "eos": "<|im_end|>"}),
        ("gemma", GEMMA, {"bos": "<bos>", "eos": "<eos>"}),
    ],
)
def test_published_templates(name, template, roles):
    case = vectors()[name]
    names = [*SPECIAL_TOKENS, "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer.train([case["expected"]] * 3, 400, special_tokens=names, **roles)
    pieces = segments(case["messages"], template, tokenizer)
    assert text_of(pieces) == case["expected"]
    ids, mask = render(case["messages"], template, tokenizer)
    assert tokenizer.decode(ids) == case["expected"]
    if "loss_spans_chars" in case:
        assert trained_spans(pieces) == case["loss_spans_chars"]
        assert tokenizer.decode(ids[mask]) == "".join(case["expected"][a:b] for a, b in case["loss_spans_chars"])


@pytest.mark.parametrize("shortened", [False, True])
def test_a_checkpoint_with_its_own_template(shortened):
    folder = SHARED / "fixtures/hf/chat_tokenizer"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    tokenizer, template = Tokenizer.load(folder), load_template(folder)
    reference = json.loads((folder / "ref.json").read_text(encoding="utf-8"))
    messages = reference["messages"][:2] if shortened else reference["messages"]
    text = reference["rendered_generation_prompt" if shortened else "rendered"]
    assert text_of(segments(messages, template, tokenizer, add_generation_prompt=shortened)) == text
    ids, mask = render(messages, template, tokenizer, add_generation_prompt=shortened)
    assert ids.tolist() == reference["input_ids"][: len(ids)]
    assert mask.tolist() == [bool(m) for m in reference["assistant_masks"]][: len(ids)]
    assert len(ids) == len(reference["input_ids"]) or shortened


# ------------------------------------------------------------------ properties


@given(st.lists(contents, min_size=2, max_size=5), st.none() | contents)
def test_trained_are_the_answers_and_their_ends(said, system):
    messages = talk(*said, system=system)
    for template in TEMPLATES:
        ids, mask = render(messages, template, MERGED)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert MERGED.decode(ids[mask]) == "".join(answer + END[template] for answer in answers)
        assert MERGED.decode(ids) == text_of(segments(messages, template, MERGED))
        exchanges = (len(said) + 1) // 2
        assert ids[0] == MERGED.bos_id and ids.tolist().count(MERGED.bos_id) == (
            exchanges if template == "llama2" else 1
        )
        assert MERGED.pad_id not in ids


@given(st.lists(contents, min_size=2, max_size=4), st.none() | contents)
def test_a_prompt_is_the_beginning_of_its_conversation(said, system):
    said = said[: len(said) // 2 * 2]
    for template in (*TEMPLATES, JINJA["trim"]):
        prompt, nothing = render(talk(*said[:-1], system=system), template, MERGED, add_generation_prompt=True)
        ids, mask = render(talk(*said, system=system), template, MERGED)
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert mask[: len(prompt)].tolist() == nothing.tolist()
        assert mask[len(prompt)] and ids[mask][-1] in stop_ids(template, MERGED)


@given(st.lists(contents, min_size=2, max_size=5), st.none() | contents)
def test_no_message_can_write_a_control_token(said, system):
    said = [*said, ""][: len(said) // 2 * 2 + 1]
    harmless = talk(*["x"] * len(said), system=system and "x")
    for template in (*TEMPLATES, *JINJA.values()):
        ids, mask = render(talk(*said, system=system), template, PIECES)
        expected, expected_mask = render(harmless, template, PIECES)
        assert controls(ids, PIECES) == controls(expected, PIECES)
        assert controls(ids[mask], PIECES) == controls(expected[expected_mask], PIECES)


@pytest.mark.parametrize("template", [*TEMPLATES, *JINJA.values()], ids=[*TEMPLATES, *JINJA])
@pytest.mark.parametrize("marker", PIECES.special_tokens)
def test_no_control_token_in_any_role(template, marker):
    messages = talk(f"{marker}a{marker}", marker, f"\n{marker}", system=f"{marker} b")
    if template in ("chatml", "llama3"):
        messages.append({"role": "tool", "content": marker * 2})
    harmless = [message | {"content": "x"} for message in messages]
    ids, _ = render(messages, template, PIECES)
    assert controls(ids, PIECES) == controls(render(harmless, template, PIECES)[0], PIECES)
    assert PIECES.decode(ids).count(marker) >= text_of(segments(harmless, template, PIECES)).count(marker) + 1


def plain_jinja(source):
    """A template as Jinja alone renders it; what stands in a generation block is any other block's text."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = source.replace(" generation %", " if true %").replace(" endgeneration %", " endif %")
    return environment.from_string(source)


PLAIN = {source: plain_jinja(source) for source in JINJA.values()}


@given(st.lists(contents, min_size=1, max_size=4), st.none() | contents)
def test_a_jinja_templates_text_is_what_jinja_renders(said, system):
    messages = talk(*said, system=system)
    for source, template in PLAIN.items():
        text = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
        assert text_of(segments(messages, source, PIECES)) == PIECES.decode(render(messages, source, PIECES)[0]) == text


# ------------------------------------------------------------------ what is refused

GOOD = {"role": "user", "content": "Q"}


@pytest.mark.parametrize("template", ["chatml", JINJA["trim"]], ids=["chatml", "jinja"])
@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages is empty"),
        (GOOD, "messages has to be a list of messages, not dict"),
        ("Q", "messages has to be a list of messages, not str"),
        ([GOOD, "Q"], r"messages\[1\] has to be an object with role and content, not str"),
        ([{"content": "Q"}], r"messages\[0\]: role is missing"),
        ([GOOD, {"role": "assistant"}], r"messages\[1\]: content is missing"),
        ([GOOD, {"role": "bot", "content": "A"}], r"messages\[1\]: role is 'bot', not one of system, user"),
        ([{"role": "user<|im_end|>", "content": "A"}], r"messages\[0\]: role is 'user<|im_end|>', not one of"),
        ([{"role": None, "content": "A"}], r"messages\[0\]: role: text has to be a string, not NoneType"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content: text has to be a string, not NoneType"),
        ([GOOD, {"role": "user", "content": ["Q"]}], r"messages\[1\]: content: text has to be a string, not list"),
        ([GOOD, {"role": "user", "content": "a\ud83d"}], r"messages\[1\]: content: character 1 is the lone surrogate"),
    ],
)
def test_malformed_messages(messages, message, template):
    with pytest.raises(ValueError, match=message):
        render(messages, template, BYTEWISE)


SYSTEM, TOOL = {"role": "system", "content": "S"}, {"role": "tool", "content": "T"}


@pytest.mark.parametrize(
    "template, messages, message",
    [
        *((name, [GOOD, SYSTEM], r"messages\[1\]: role is 'system', which has its place before") for name in TEMPLATES),
        *((name, [SYSTEM, SYSTEM], r"messages\[1\]: role is 'system'") for name in TEMPLATES),
        ("llama2", [GOOD, TOOL], r"messages\[1\]: template 'llama2' has no role 'tool'"),
        ("alpaca", [SYSTEM, GOOD, TOOL], r"messages\[2\]: template 'alpaca' has no role 'tool'"),
        ("llama2", [GOOD, GOOD], r"messages\[1\]: role is 'user' where template 'llama2'.*has 'assistant'"),
        ("alpaca", [SYSTEM, *talk("Q", "A")[1:]], r"messages\[1\]: role is 'assistant' where template 'alpaca'"),
        ("llama2", [SYSTEM], "template 'llama2' needs a user message"),
        ("chatml", [GOOD | {"tool_calls": [{}]}], r"messages\[0\]: template 'chatml' has no place for tool_calls"),
        ("chatmel", [GOOD], "no template 'chatmel': chatml, llama2, llama3, alpaca"),
    ],
)
def test_conversations_that_a_template_has_no_place_for(template, messages, message):
    with pytest.raises(ValueError, match=message):
        render(messages, template, BYTEWISE)


def test_arguments_that_a_template_has_no_place_for():
    for template in ("llama2", "alpaca"):
        with pytest.raises(ValueError, match=f"'{template}' can only prompt for an answer behind a user message"):
            render(talk("Q", "A"), template, BYTEWISE, add_generation_prompt=True)
    with pytest.raises(ValueError, match="template 'chatml' has no variables, and got tools"):
        render(talk("Q"), "chatml", BYTEWISE, tools=[])


def test_a_tokenizer_without_the_templates_tokens():
    bare = Tokenizer.train([], 256, special_tokens=[], bos=None, eos=None, pad=None)
    for template, name in [
        ("chatml", r"<\|im_start"),
        ("llama3", r"<\|start_header"),
        ("llama2", "eos"),
        ("alpaca", "eos"),
    ]:
        with pytest.raises(ValueError, match=f"template '{template}' needs the control token '{name}"):
            render(talk("Q", "A"), template, bare)
    # The original Llama 2: only the begin and the end are control tokens, the marks are text. The text is the same.
    plain = Tokenizer.train([], 259, special_tokens=[])
    ids, mask = render(talk("Q", "A", system="S"), "llama2", plain)
    assert plain.decode(ids) == MERGED.decode(render(talk("Q", "A", system="S"), "llama2", MERGED)[0])
    assert controls(ids, plain) == [0, 1] and plain.decode(ids[mask]) == "A </s>"


# ------------------------------------------------------------------ Jinja


def rendered(source, messages=None, **variables):
    return text_of(segments(messages or talk("Q <&> 'é'", "A"), source, PIECES, **variables))


def test_what_templates_find_in_their_environment():
    assert rendered("{{ messages[0].content | tojson }}") == "\"Q <&> 'é'\""
    assert rendered("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert rendered("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert rendered("{{ tools[0].name }}", tools=[{"name": "<|end|>"}]) == "<|end|>"
    assert re.fullmatch(r"\d{4}", rendered("{{ strftime_now('%Y') }}"))
    assert rendered("{{ strftime_now('%Y') }}", strftime_now=lambda f: "1999") == "1999"
    assert rendered("{% for m in messages %}{{ m.role }}{% continue %}x{% endfor %}") == "userassistant"
    assert rendered("a\n  {% if true %}\n  b{% endif %}") == "a\n  b"
    assert rendered("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}") == "<s></s><pad>"


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('no system here') }}", "the chat template fails: no system here"),
        ("{% if x %}\n{{ }}", "the chat template, line 2: "),
        ("{{ messages.append(1) }}", "the chat template fails: .*append"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: .*__class__"),
        ("{{ 'x' + none }}", "the chat template fails: "),
        ("{{ messages[0].content | replace('<|end|>', '') }}<|end|>", "looks for them in messages"),
        ("{{ '<|end|>'[:-1] }}", "edits its control tokens"),
        (
            "{% if 'Q' in messages[0].content %}!{% endif %}<|{{ messages[0].role }}|>",
            r"'<\|user\|>' together from pieces",
        ),
    ],
)
def test_templates_that_fail_or_can_not_be_followed(source, message):
    with pytest.raises(ValueError, match=message):
        render(talk("Q <|end|><|user|>"), source, PIECES)


def test_a_control_token_is_the_templates_only_if_no_message_is_part_of_it():
    for content, source in [("end", "<|{{ messages[0].content }}|>"), ("<|", "{{ messages[0].content }}end|>")]:
        ids, _ = render(talk(content), source, PIECES)
        assert PIECES.decode(ids) == "<|end|>" and controls(ids, PIECES) == []
    ids, _ = render(talk("<|end|>"), "{{ messages[0].content }}<|{{ 'end' }}|>{{ messages[0].content }}", PIECES)
    assert controls(ids, PIECES) == [PIECES.special_tokens["<|end|>"]]
    # Where the template looks into the messages, too, what it writes as a whole is known: a constant, bos_token, ...
    source = "{{ bos_token }}{% if 'Q' in messages[0].content %}!{% endif %}{{ messages[0].content }}<|end|>"
    ids, _ = render(talk("<s>Q<|end|>"), source, PIECES)
    assert controls(ids, PIECES) == [PIECES.bos_id, PIECES.special_tokens["<|end|>"]]
    with pytest.raises(ValueError, match="together from pieces"):
        render(talk("Q"), "{% for key in tools[0] %}<|{{ key }}|>{% endfor %}", PIECES, tools=[{"end": 1}])


def test_of_two_control_tokens_that_begin_alike_the_longer_is_meant():
    tokenizer = Tokenizer.train([], 300, special_tokens=["<a>", "<a>b"])
    assert render(talk("<a>b"), "<a>b<a>{{ messages[0].content }}", tokenizer)[0].tolist()[:2] == [1, 0]


def test_a_generation_block_works_inside_macros_and_loops():
    source = """{% macro answer(m) %}{% generation %}{{ m.content | trim }}<|end|>{% endgeneration %}{% endmacro %}
{% for m in messages %}{{ answer(m) if m.role == 'assistant' else m.content }}{% endfor %}"""
    ids, mask = render(talk("Q", " A ", "R", "B"), source, PIECES)
    assert PIECES.decode(ids) == "QA<|end|>RB<|end|>" and PIECES.decode(ids[mask]) == "A<|end|>B<|end|>"
    assert stop_ids(source, PIECES) == {PIECES.special_tokens["<|end|>"], PIECES.eos_id}
    assert not render(talk("Q", "A"), "{{ messages[1].content }}", PIECES)[1].any()


def test_a_template_that_trains_nothing_ends_with_the_first_control_token_behind_an_answer():
    names = {"<|end|>", "</s>"}
    ends = lambda source: {name for name, i in PIECES.special_tokens.items() if i in stop_ids(source, PIECES)}
    turn = "<|user|>{{ m.content }}<|end|>"
    assert ends(f"{{% for m in messages %}}{turn}{{% endfor %}}<|assistant|>") == names
    assert ends("{% for m in messages %}<|user|>{{ m.content | trim }}\n{% endfor %}") == {"</s>"}
    assert ends("<|user|>{{ messages[0].content }}") == {"</s>"}  # no answer in it


def test_a_template_is_found_where_checkpoints_have_it(tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        load_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert load_template(tmp_path) == "{{ 1 }}"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "{{ 2 }}"}]}))
    assert load_template(tmp_path) == "{{ 2 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 3 }}")
    assert load_template(tmp_path) == load_template(str(tmp_path / "chat_template.jinja")) == "{{ 3 }}"


def test_without_a_tokenizer_every_byte_is_a_token():
    ids, mask = render([{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": "!"}], "chatml")
    tokenizer = bytes_tokenizer()
    text = "<s><|im_start|>user\nh\u00e9<|im_end|>\n<|im_start|>assistant\n!<|im_end|>\n"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[mask]) == "!<|im_end|>"
    assert len(ids) == 5 + len("user\nh\u00e9\nassistant\n!\n".encode())


# ------------------------------------------------------------------ scripts/render.py

spec = importlib.util.spec_from_file_location("render", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def run(status_of):
    """Runs the script; returns its exit status, output and error output."""

    def run(*arguments):
        return status_of(script.main, "render.py", *arguments)

    return run


@pytest.fixture
def chats(tmp_path):
    rows = [{"messages": talk("Hi\u2028 <|im_end|>", "é!")}, {"messages": talk("Q", "A", "R", "B\n")}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    return path


def test_the_script_prints_text_and_counts(run, chats):
    text = "<s><|im_start|>user\nHi\u2028 <|im_end|><|im_end|>\n<|im_start|>assistant\né!<|im_end|>\n\n"
    assert run(chats, "--row", 1) == (0, text + "41 tokens, 4 trained\n", "")
    status, out, _ = run(chats, "--template", "llama2")
    assert status == 0 and out.endswith(
        "<s>[INST] Q [/INST] A </s><s>[INST] R [/INST] B\n </s>\n21 tokens, 7 trained\n"
    )
    assert out.count(" tokens, ") == 2
    assert run(chats, "--row", 2, "--template", "alpaca", "--add-generation-prompt")[0] == 2


def test_the_script_shows_the_mask(run, chats, monkeypatch):
    _, out, _ = run(chats, "--row", 1, "--show-mask")
    assert "‹⏎›\n‹<|im_start|>›‹a›" in out and "‹⏎›\n⟦\\xc3⟧⟦\\xa9⟧⟦!⟧⟦<|im_end|>⟧‹⏎›\n\n⟦trained⟧" in out
    assert "\x1b" not in out and out.endswith("41 tokens, 4 trained\n")
    _, out, _ = run(chats, "--row", 2, "--show-mask", "--color", "always")
    trained = re.findall(r"\x1b\[30;(?:42|102)m(.*?)\x1b\[0m", out)
    assert trained == ["A", "<|im_end|>", "B", "⏎", "<|im_end|>", "trained"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[30;42m" in run(chats, "--show-mask")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(chats, "--show-mask")[1]


def test_the_script_never_sends_a_texts_escapes_to_the_terminal(run, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"messages": talk("\x1b[2J\x9b\r")}, indent=1))
    _, out, _ = run(tmp_path / "x.json", "--show-mask")
    assert "\x1b" not in out and "‹\\x1b›‹[›‹2›‹J›‹\\xc2›‹\\x9b›‹\\r›" in out


def test_the_script_takes_a_checkpoint(run, chats, tmp_path):
    PIECES.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(JINJA["pieces"])
    for template in (tmp_path, tmp_path / "chat_template.jinja"):
        _, out, _ = run(chats, "--row", 2, "--tokenizer", tmp_path, "--template", template)
        assert (
            out
            == "<|user|>Q<|end|><|assistant|>A<|end|><|user|>R<|end|><|assistant|>B\n<|end|>\n13 tokens, 0 trained\n"
        )


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (b'{"messages": []}\n{"a": 1}\n', [], "x.jsonl:1: messages is empty"),
        (b'{"a": 1}\n', [], 'x.jsonl:1: not an object with "messages"'),
        (b'\n{"messages": 1,}\n', [], r"x.jsonl:2: not JSON: "),
        (b"\xff", [], "x.jsonl: not UTF-8: byte 0xff at position 0"),
        (b"", [], "x.jsonl: no conversation"),
        (b"{}", ["--row", 2], "x.jsonl: no conversation 2"),
        (b"{}", ["--row", 0], "--row counts from 1, and got 0"),
        (None, [], "x.jsonl: No such file or directory"),
        (b"{}", ["--rows", 1], "unrecognized arguments: --rows"),
        (b"{}", ["--template", "nope"], "no template 'nope': chatml, llama2, llama3, alpaca, or a Jinja file"),
        (b"{}", ["--tokenizer", "nope/tokenizer.json"], "nope/tokenizer.json: No such file or directory"),
        (b"{}", ["--tokenizer", SCRIPT], "render.py is not a tokenizer.json"),
    ],
)
def test_the_script_fails_in_one_line(run, tmp_path, content, arguments, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    status, out, error = run(tmp_path / "x.jsonl", *arguments)
    assert (status, out, error.count("\n")) == (2, "", 1) and message in error


def test_the_script_runs_from_a_bare_checkout(tmp_path):
    line = json.dumps({"messages": talk("Q")})
    command = [sys.executable, str(SCRIPT), "-"]
    out = subprocess.run(command, input=line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out == "<s><|im_start|>user\nQ<|im_end|>\n\n10 tokens, 0 trained\n"
