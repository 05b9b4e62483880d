"""
Conversations to token ids and a loss mask.

    ids, loss_mask = render(messages, "chatml", tokenizer)

A template turns messages into segments, (text, is it a control token, is it trained), and the ids and the mask are made
from these: nothing is ever searched in the text, so nothing in a message can pass for the end of a turn. Trained are
the answers and the end of turn behind each, and nothing else.

Neighbouring segments of text that are alike in `trained` are encoded as one text, as everybody's tokenizers see it
("[INST] Hello": the space belongs to the word). At the border of an answer the text is always cut: a prompt has the
same tokens with and without its answer.

A checkpoint's own Jinja template works on plain strings and knows no segments. How it is followed all the same stands
at `jinja_segments`.
"""

import re
from datetime import datetime
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension

from minillm.files import check_keys, json_type, read_object, read_text
from minillm.sandbox import Sandbox, allowance, metered
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer, require_unicode

LONGEST_FILE = 1 << 20  # bytes of a template's file
ROLES = ("system", "user", "assistant", "tool")


class Segment(NamedTuple):
    """A piece of a rendered conversation: text, or the name of one control token."""

    text: str
    control: bool = False
    trained: bool = False


def render(messages, template, tokenizer=None, add_generation_prompt=False, **variables):
    """The token ids of a conversation, and which of them are trained.

    messages               [{"role": ..., "content": ...}, ...]: roles system (only first), user, assistant, tool
    template               "chatml", "llama2", "llama3", "alpaca", or the source of a Jinja template (`load_template`)
    tokenizer              a minillm.tokenizer.Tokenizer that has the template's control tokens; None: one token per
                           byte, and the control tokens of the templates above
    add_generation_prompt  end with what stands before an answer, for the model to go on from there
    variables              for a Jinja template (tools=[...], enable_thinking=False, ...)

    Returns ids (n,) of tokenizer.dtype and loss_mask (n,) bool. Both are about the token itself: where a model predicts
    ids[1:], its targets' mask is loss_mask[1:]. A Jinja template trains what stands in its {% generation %} blocks;
    one without them trains nothing. Content is taken as it is, except where a Jinja template edits it.

    ValueError: messages that are malformed (names index and field) or that the template has no place for.
    """
    tokenizer = tokenizer or bytes_tokenizer()
    return encode_segments(segments(messages, template, tokenizer, add_generation_prompt, **variables), tokenizer)


@lru_cache
def bytes_tokenizer():
    """The tokenizer without any merges: one token per byte."""
    return Tokenizer.train([], SMALLEST_VOCABULARY)


def segments(messages, template, tokenizer, add_generation_prompt=False, **variables):
    """The segments of a conversation, in a list; joined, their texts are the rendered text. Arguments as `render`."""
    check_messages(messages)
    if not isinstance(template, str) or template not in TEMPLATES:
        return jinja_segments(messages, jinja_source(template), tokenizer, add_generation_prompt, variables)
    if variables:
        raise ValueError(f"template {template!r} has no variables, and got {', '.join(variables)}")
    for n, message in enumerate(messages):
        if message["role"] == "system" and n > 0:
            raise ValueError(f"messages[{n}]: role is 'system', which has its place before all other messages")
        if message.get("tool_calls"):
            raise ValueError(f"messages[{n}]: template {template!r} has no place for tool_calls; write them as content")
    turns = [(message["role"], message["content"]) for message in messages]
    pieces = list(TEMPLATES[template](turns, tokenizer, add_generation_prompt))
    for piece in pieces:
        if piece.control and piece.text not in tokenizer.special_tokens:
            name = piece.text or "eos"
            raise ValueError(
                f"template {template!r} needs the control token {name!r}, which this tokenizer does not have"
            )
    return pieces


def encode_segments(pieces, tokenizer):
    """ids (n,) of tokenizer.dtype and loss mask (n,) bool of an iterable of segments."""
    ids, mask = [], []
    for (control, trained), run in groupby(pieces, key=lambda piece: (piece.control, piece.trained)):
        texts = [piece.text for piece in run]
        part = [tokenizer.special_tokens[t] for t in texts] if control else tokenizer.encode("".join(texts)).tolist()
        ids += part
        mask += [trained] * len(part)
    return np.array(ids, tokenizer.dtype), np.array(mask, bool)


def stop_ids(template, tokenizer):
    """The ids that end an answer: the control tokens that `template` trains behind it, and the tokenizer's eos. A Jinja
    template without {% generation %} does not say what is trained: then the first control token behind the answer."""
    answer = "An answer."
    pieces = segments([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], template, tokenizer)
    ends = {piece.text for piece in pieces if piece.control and piece.trained}
    if not any(piece.trained for piece in pieces):
        place = max((n for n, piece in enumerate(pieces) if answer in piece.text), default=len(pieces))
        ends = set([piece.text for piece in pieces[place:] if piece.control][:1])
    return {tokenizer.special_tokens[name] for name in ends} | ({tokenizer.eos_id} - {None})


def check_messages(messages):
    """ValueError, with index and field, where `messages` is not a list of {"role": one of ROLES, "content": text}."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages has to be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty")
    for n, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{n}] has to be an object with role and content, not {type(message).__name__}")
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"messages[{n}]: {field} is missing")
            try:
                require_unicode(message[field])
            except ValueError as error:
                raise ValueError(f"messages[{n}]: {field}: {error}") from None
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{n}]: role is {message['role']!r}, not one of {', '.join(ROLES)}")


# ------------------------------------------------------------------ the templates that come with it
# Each takes turns [(role, content), ...], the tokenizer and whether to end with a prompt, and yields segments.


def begin(tokenizer):
    """The begin of a text, for tokenizers that have one."""
    return [] if tokenizer.bos is None else [Segment(tokenizer.bos, control=True)]


def chatml(turns, tokenizer, prompt):
    r"""<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"""
    yield from begin(tokenizer)
    for role, content in turns + [("assistant", None)] * prompt:
        answer = role == "assistant"
        yield Segment("<|im_start|>", control=True)
        yield Segment(f"{role}\n")
        if content is not None:
            yield Segment(content, trained=answer)
            yield Segment("<|im_end|>", control=True, trained=answer)
            yield Segment("\n")


def llama3(turns, tokenizer, prompt):
    r"""<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>...

    Meta's name for the begin of a text is <|begin_of_text|>, and for the role of tools, ipython.
    """
    yield from begin(tokenizer)
    for role, content in turns + [("assistant", None)] * prompt:
        answer = role == "assistant"
        yield Segment("<|start_header_id|>", control=True)
        yield Segment("ipython" if role == "tool" else role)
        yield Segment("<|end_header_id|>", control=True)
        yield Segment("\n\n")
        if content is not None:
            yield Segment(content, trained=answer)
            yield Segment("<|eot_id|>", control=True, trained=answer)


def llama2(turns, tokenizer, prompt):
    r"""<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi! </s><s>[INST] ...: a begin for every exchange.

    The space before </s> is trained as a part of the end of turn: a model that has not learnt to write it never gets
    to </s>. The marks are control tokens where the tokenizer has them; the original Llama 2 does not, and then what
    a user writes can look like them.
    """
    mark = lambda name: Segment(name, control=name in tokenizer.special_tokens)
    system, exchanges = question_answer_pairs("llama2", turns, prompt)
    for n, (question, answer) in enumerate(exchanges):
        yield from begin(tokenizer)
        yield from (mark("[INST]"), Segment(" "))
        if n == 0 and system is not None:
            yield from (mark("<<SYS>>"), Segment(f"\n{system}\n"), mark("<</SYS>>"), Segment("\n\n"))
        yield from (Segment(f"{question} "), mark("[/INST]"))
        if answer is not None or prompt:
            yield Segment(" ")
        if answer is not None:
            yield Segment(f"{answer} ", trained=True)
            yield Segment(tokenizer.eos, control=True, trained=True)


def alpaca(turns, tokenizer, prompt):
    r"""<s>Below is ...\n\n### Instruction:\nHello\n\n### Response:\nHi!</s>\n\n### Instruction:\n...

    A system message stands in the place of "Below is an instruction ...". The marks are plain text: what a user writes
    can look like them, though it can not be the end of an answer.
    """
    system, exchanges = question_answer_pairs("alpaca", turns, prompt)
    yield from begin(tokenizer)
    yield Segment(ALPACA_PREAMBLE if system is None else system)
    for question, answer in exchanges:
        yield Segment(f"\n\n### Instruction:\n{question}\n\n### Response:\n")
        if answer is not None:
            yield Segment(answer, trained=True)
            yield Segment(tokenizer.eos, control=True, trained=True)


ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
TEMPLATES = {"chatml": chatml, "llama2": llama2, "llama3": llama3, "alpaca": alpaca}

# The same templates for everybody else, who takes Jinja. Through `render` they give the same ids and mask. Elsewhere
# text and template are one string, which is cut into tokens as a whole: there a message can write control tokens, and
# the blank before an answer (llama2) or the second line end (llama3) may go with the answer's first word.
_BOS = "{%- if bos_token %}{{- bos_token }}{%- endif %}"
_TURNS = """
{%- for message in messages %}
{%- if message['role'] == 'system' and not loop.first %}
{{- raise_exception('a system message has its place before all other messages') }}
{%- endif %}
{%- if message['tool_calls'] %}{{- raise_exception('this template has no place for tool_calls') }}{%- endif %}
"""
_PAIRS = """
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- set talk = messages if system is none else messages[1:] %}
{%- if not talk %}{{- raise_exception('this template needs a user message') }}{%- endif %}
{%- if add_generation_prompt and talk | length % 2 == 0 %}
{{- raise_exception('this template can only prompt for an answer behind a user message') }}
{%- endif %}
"""
_PAIRED_TURNS = """
{%- for message in talk %}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
{{- raise_exception('in this template user and assistant take turns') }}
{%- endif %}
{%- if message['tool_calls'] %}{{- raise_exception('this template has no place for tool_calls') }}{%- endif %}
"""
JINJA = {
    "chatml": _BOS
    + _TURNS
    + r"""
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
    "llama2": _PAIRS
    + _PAIRED_TURNS
    + r"""
{%- if message['role'] == 'user' %}"""
    + _BOS
    + r"""
{{- '[INST] ' }}
{%- if loop.first and system is not none %}{{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{%- endif %}
{{- message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' }}
{%- generation %}{{- message['content'] + ' ' + eos_token }}{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' ' }}{%- endif %}
""",
    "llama3": _BOS
    + _TURNS
    + r"""
{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""",
    "alpaca": _BOS
    + _PAIRS
    + f"{{{{- '{ALPACA_PREAMBLE}' if system is none else system }}}}"
    + _PAIRED_TURNS
    + r"""
{%- if message['role'] == 'user' %}
{{- '\n\n### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}
{%- else %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- endif %}
{%- endfor %}
""",
}


def question_answer_pairs(template, turns, prompt):
    """(system text or None, [(question, answer), ...]) for templates that know only these; the last answer may be None.

    ValueError: a tool message, turns that do not alternate, no question, or a prompt where no question is open.
    """
    system = turns[0][1] if turns[0][0] == "system" else None
    offset = system is not None
    talk = turns[offset:]
    for n, (role, _) in enumerate(talk):
        wanted = ("user", "assistant")[n % 2]
        if role == "tool":
            raise ValueError(f"messages[{n + offset}]: template {template!r} has no role 'tool'")
        if role != wanted:
            raise ValueError(
                f"messages[{n + offset}]: role is {role!r} where template {template!r}, in which user and assistant "
                f"take turns, has {wanted!r}"
            )
    if not talk:
        raise ValueError(f"template {template!r} needs a user message, and there is only the system's")
    if prompt and len(talk) % 2 == 0:
        raise ValueError(f"template {template!r} can only prompt for an answer behind a user message")
    contents = [content for _, content in talk] + [None] * (len(talk) % 2)
    return system, list(zip(contents[::2], contents[1::2], strict=True))


# ------------------------------------------------------------------ Jinja templates


def jinja_source(template):
    """The Jinja source of a template: of one of TEMPLATES, its equivalent; a source is its own. ValueError: neither."""
    if not isinstance(template, str):
        raise ValueError(f"a template is a name or a text, and this is {json_type(template)}")
    if template not in JINJA and "{{" not in template and "{%" not in template:
        raise ValueError(f"no template {template!r}: {', '.join(TEMPLATES)}, or the source of a Jinja template")
    return JINJA.get(template, template)


def load_template(path):
    """The Jinja source that a checkpoint brings: `path` is a file, or a folder with chat_template.jinja or, as older
    ones have it, the key "chat_template" in tokenizer_config.json. ValueError: a folder with neither."""
    path = Path(path)
    if not path.is_dir():
        return read_text(path, LONGEST_FILE)
    if (path / "chat_template.jinja").exists():
        return read_text(path / "chat_template.jinja", LONGEST_FILE)
    config = path / "tokenizer_config.json"
    source = read_object(config).get("chat_template") if config.exists() else None
    if isinstance(source, list):  # several, each with a name
        entries = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = entries[0].get("template") if entries else None
    if source is None:
        raise ValueError(f"{path} has no chat template")
    if not isinstance(source, str):
        raise ValueError(f"{config}: chat_template has to be a text, and is {json_type(source)}")
    return source


def noted_template(folder):
    """The template that a trainer noted in a model folder's minillm.json, None where there is none. ValueError: an
    unknown key, or something else than a template."""
    path = Path(folder) / "minillm.json"
    noted = read_object(path) if path.exists() else {}
    check_keys(noted, ("template",), path)
    template = noted.get("template")
    if template is None:
        return None
    try:
        jinja_source(template)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return template


def jinja_segments(messages, source, tokenizer, add_generation_prompt, variables):
    """Segments of a conversation through a Jinja template, which text in the messages can not forge.

    In the string that a template returns, a control token that it wrote and the same characters from a message look the
    same. So the template runs twice. The first run is the plain one, and says what the text is. In the second, the
    template's own string constants (and bos_token, eos_token, pad_token) have each control token's name replaced by one
    character that occurs nowhere else, and {% generation %} writes two more such characters around its body. The
    messages are left as they are, so the template may trim, slice, compare, search and quote them as ever. The result
    is cut at those characters: they can not come from a message. And with the names put back it has to be the text of
    the first run. It is not if the template edits its own control tokens, or finds one in a message that it searches:
    then it can not be followed, and that is a ValueError.

    A name that is still spelt out in the second run came from a message, or the template put it together from pieces
    ('<|' + role + '|>'); `mark_assembled` tells which.
    """
    names = tuple(tokenizer.special_tokens)
    used = set(source).union(*strings_in([messages, variables]))
    unused = (char for char in map(chr, range(0xF0000, 0x110000)) if char not in used)  # private use: they mean nothing
    start, end, blank, *marks = islice(unused, len(names) + 3)
    mark_of = dict(zip(names, marks, strict=True))
    name_of = dict(zip(marks, names, strict=True)) | {start: "", end: ""}
    now = datetime.now()

    def run(messages, variables, mark_of, start, end):
        roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
        context = {role: mark_of.get(name, name) for role, name in roles.items() if name is not None}
        context |= {"tools": None, "documents": None, "strftime_now": now.strftime} | variables
        with allowance(source, [messages, variables]) as limits:
            try:
                template = compile_template(source, tuple(mark_of.items()), start, end)
                text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"the chat template, line {error.lineno}: {_one_line(error.message)}") from None
            except RecursionError:
                raise ValueError("the chat template fails: it is nested, or calls itself, too deeply") from None
            except Exception as error:  # somebody else's program: it may fail in any way, or refuse the messages
                raise ValueError(f"the chat template fails: {_one_line(error) or type(error).__name__}") from None
            if len(text) > limits["text"]:
                told = f"it writes {len(text):,} characters, and for this conversation {limits['text']:,} are the most"
                raise ValueError(f"the chat template fails: {told}")
            return text

    plain = run(messages, variables, {}, "", "")
    marked = run(messages, variables, mark_of, start, end)
    any_mark = re.compile("[" + "".join(name_of) + "]")
    if any_mark.sub(lambda m: name_of[m[0]], marked) != plain:
        raise ValueError(
            "the chat template edits its control tokens, or looks for them in messages: which is its own, and which "
            "is the text of a message, can not be told"
        )
    if names and names_pattern(names).search(marked):
        try:
            blanked = run(blank_out(messages, blank), blank_out(variables, blank), mark_of, start, end)
        except ValueError:
            blanked = ""
        marked = mark_assembled(marked, blanked, blank, mark_of, messages, variables)

    pieces, depth = [], 0
    for piece in re.split(f"({any_mark.pattern})", marked):
        depth += (piece == start) - (piece == end)
        if name := name_of.get(piece, piece):
            pieces.append(Segment(name, control=piece in name_of, trained=depth > 0))
    return pieces


def mark_assembled(marked, blanked, blank, mark_of, messages, variables):
    """`marked` with marks for control tokens, too, that the template put together from pieces.

    `blanked` is the same run with `blank` for the characters of the messages, roles excepted (`blank_out`). If it is as
    `marked` elsewhere, character by character, then the blanks are what came from the messages, and a name with none of
    them is the template's. Otherwise the template treats messages by what is in them. Then a name is text, which is
    the safe side, unless the template assembles it without any message, too: that is a ValueError.
    """
    # Keys are not blanked, because templates look values up by them. Where there may be other keys than these, being
    # the same in both runs proves nothing.
    nested = any(isinstance(value, dict | list | tuple) for value in variables.values())
    aligned = not nested and all(set(message) <= {"role", "content"} for message in messages)
    aligned = aligned and len(blanked) == len(marked)
    aligned = aligned and all(b in (blank, m) for b, m in zip(blanked, marked, strict=True))
    text = "\n".join(strings_in([messages, variables]))

    def judge(match):
        name = match[0]
        if aligned:
            return mark_of[name] if blanked[match.start() : match.end()] == name else name
        if name in blanked or name not in text:
            raise ValueError(
                f"the chat template puts the control token {name!r} together from pieces, and whether it or a message "
                "wrote it can not be told; write the token out in the template"
            )
        return name

    return names_pattern(tuple(mark_of)).sub(judge, marked)


def strings_in(data):
    """Every string in nested lists and dicts, keys too."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from strings_in(key)
            yield from strings_in(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from strings_in(value)


def blank_out(data, blank):
    """`data` with `blank` for every character of its strings, except keys, roles, and what trim and tojson look at."""
    if isinstance(data, str):
        return re.sub(r'[^\s"\\\x00-\x1f]', blank, data)
    if isinstance(data, dict):
        return {key: value if key == "role" else blank_out(value, blank) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [blank_out(value, blank) for value in data]
    return data


@lru_cache(maxsize=64)
def names_pattern(names):
    """Finds control tokens as Hugging Face's tokenizers do: the leftmost, and of those the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _one_line(error):
    """What somebody else's program says, in one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: what is trained, with the environment's two marks around it."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.environment.generation_marks)
        return nodes.Scope([first, *body, last], lineno=line)


def raise_exception(message):
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=64)
def compile_template(source, marks, start, end):
    """A Jinja template that pays for what it does (sandbox.py), with the names in its constants replaced by marks."""
    environment = Sandbox([GenerationTag])
    environment.generation_marks = start, end
    environment.globals["raise_exception"] = raise_exception
    tree = environment.parse(source)
    if other := tree.find((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        told = "it takes another file, and a chat template is one file"
        raise jinja2.TemplateSyntaxError(told, other.lineno)
    if marks:
        mark_of, pattern = dict(marks), names_pattern(tuple(name for name, _ in marks))
        replace = lambda text: pattern.sub(lambda m: mark_of[m[0]], text)
        for node in tree.find_all(nodes.TemplateData):
            node.data = replace(node.data)
        for node in tree.find_all(nodes.Const):
            if isinstance(node.value, str):
                node.value = replace(node.value)
    return environment.from_string(metered(tree))
