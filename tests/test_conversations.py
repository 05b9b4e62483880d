"""Rows of JSON to conversations, preferences and prompts, and these to ids and masks that train answers alone."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.chat import TEMPLATES, bytes_tokenizer, render, stop_ids
from minillm.data import conversations as C
from minillm.data.readers import Bad

DATA = Path(__file__).parents[2] / "shared/data"
TOKENIZER = bytes_tokenizer()
USER, ASSISTANT, SYSTEM = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system")
)
EVERY_TEMPLATE = pytest.mark.parametrize("template", TEMPLATES)


@pytest.fixture
def file(tmp_path):
    """A function that writes rows (objects, or lines as they are) and returns the path."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
        return path

    return write


def talk(*texts):
    """Messages of user and assistant in turns."""
    return [(USER, ASSISTANT)[n % 2](text) for n, text in enumerate(texts)]


# ------------------------------------------------------------------ rows

TRANSCRIPTS = {
    "\n\nHuman: Hi.\n\nAssistant:": talk("Hi."),
    "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: Go on\n\nplease.\n\nAssistant:": talk(
        "Hi.", "Yes?", "Go on\n\nplease."
    ),
    "Human: Hi.": talk("Hi."),
    "  \n Human:Hi.\n\nAssistant: ": talk("Hi."),
    "\n\nHuman: Who is Human: or Assistant: here?\n\nAssistant:": talk("Who is Human: or Assistant: here?"),
    "\n\nHuman: a\nAssistant: b\n\nAssistant:": talk("a\nAssistant: b"),  # one line end is no new turn
    "\n\nHuman: one\u2028two\x85three\n\nAssistant:": talk("one\u2028two\x85three"),
    "Is a Human: first?": talk("Is a Human: first?"),  # does not begin like a transcript
    "\\n\\nHuman: Hi.": talk("\\n\\nHuman: Hi."),
    " as it stands\n": talk(" as it stands\n"),
}


@pytest.mark.parametrize("prompt", TRANSCRIPTS, ids=repr)
def test_a_transcript_becomes_messages(prompt, file):
    (found,) = C.read_prompts(file({"prompt": prompt}))
    assert found.messages == TRANSCRIPTS[prompt]
    (found,) = C.read_conversations(file({"prompt": prompt, "response": "Fine."}))
    assert found.messages == [*TRANSCRIPTS[prompt], ASSISTANT("Fine.")]


texts = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
)


@given(st.lists(texts, min_size=1, max_size=5))
def test_what_is_written_as_a_transcript_is_read_back(contents):
    speakers = ("Human", "Assistant")
    prompt = "".join(f"\n\n{speakers[n % 2]}: {text}" for n, text in enumerate(contents))
    assert C._transcript(prompt + "\n\nAssistant:" * (len(contents) % 2)) == talk(*contents)


def test_conversations_and_prompts_in_every_shape(file):
    three = [SYSTEM("Be brief."), *talk("a", "b", "c", "d")]
    path = file(
        {"messages": three, "source": "x"},
        {"prompt": "a", "response": "b"},
        {"prompt": talk("a"), "response": talk("a", "b")},  # messages, of which the last counts
        {"prompt_messages": talk("a", "b", "c"), "response": "d"},
    )
    found = list(C.read_conversations(path))
    assert [c.messages for c in found] == [three, talk("a", "b"), talk("a", "b"), talk("a", "b", "c", "d")]
    assert [c.where for c in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)] and found[0].row["source"] == "x"
    found = [c.messages for c in C.read_prompts(path)]  # up to the user's last turn
    assert found == [three[:-1], talk("a"), talk("a"), talk("a", "b", "c")]


def test_the_second_of_two_answers_may_be_the_better_one(file):
    one = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [
        one | {"preference": 0.25, "margin": 1.5},
        one | {"preference": 0.5},
        {"prompt": "a", "ranked": [["b", "c"], "d"]},
    ]
    found = [(p.answers, p.preference, p.margin) for p in C.read_preferences(file(*rows))]
    assert found == [(["c", "b"], 0.75, -1.5), (["b", "c"], 0.5, 0.0), (["b", "c", "d"], 1.0, 0.0)]


def test_examples_are_the_same_on_any_day(monkeypatch):
    """A template that writes today's date would make other examples tomorrow, and no run could go on."""
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    tokenizer, found = bytes_tokenizer(), []
    for day in (1, 2):
        monkeypatch.setattr("minillm.chat.datetime", SimpleNamespace(now=lambda day=day: datetime(2026, 3, day)))
        found.append([f(talk("a", "b"), source, tokenizer)[0].tobytes() for f in (C.rendered, render)])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]  # whoever talks with it is told today's


def test_preferences_in_every_shape(file):
    path = file(
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {
            "prompt": talk("a"),
            "chosen": talk("a", "good"),
            "rejected": [{"content": "bad"}],
            "margin": 2,
            "preference": 0.9,
        },
        {"prompt": "\n\nHuman: a\n\nAssistant:", "ranked": ["good", "so so", "bad"]},
        {"messages": talk("a", "an answer to leave out"), "chosen": "good", "rejected": "bad", "preference": 0.5},
        {"prompt": "a", "ranked": [[talk("a", "good")], ["so so", [{"content": "as well"}]], talk("a", "bad")]},
    )
    found = list(C.read_preferences(path))
    assert all(p.prompt == talk("a") for p in found)
    pair, three, four = ["good", "bad"], ["good", "so so", "bad"], ["good", "so so", "as well", "bad"]
    assert [p.answers for p in found] == [pair, pair, three, pair, four]
    assert [p.ranks for p in found] == [(0, 1), (0, 1), (0, 1, 2), (0, 1), (0, 1, 1, 2)]
    assert [(p.margin, p.preference) for p in found][:4] == [(0.0, 1.0), (2.0, 0.9), (0.0, 1.0), (0.0, 0.5)]
    assert [p.where for p in C.prompts_of(found)] == [f"{path}:1"]  # one prompt, where it came first


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
MALFORMED = {  # reader, row, reason
    "no prompt": (C.read_prompts, {"text": "a"}, "neither messages nor a prompt"),
    "empty prompt": (C.read_prompts, {"prompt": " \n"}, "prompt is empty"),
    "prompt null": (C.read_prompts, {"prompt": None}, "messages has to be a list of messages, not NoneType"),
    "messages a string": (C.read_conversations, {"messages": "Hi"}, "messages has to be a list of messages, not str"),
    "messages empty": (C.read_conversations, {"messages": []}, "messages is empty"),
    "message a string": (C.read_conversations, {"messages": ["Hi"]}, r"messages\[0\] has to be an object"),
    "no role": (C.read_conversations, {"messages": [{"content": "a"}]}, r"messages\[0\]: role is missing"),
    "odd role": (C.read_conversations, {"messages": [{"role": "human", "content": "a"}]}, r"messages\[0\]: role is 'h"),
    "content null": (C.read_conversations, {"messages": [USER("a"), ASSISTANT(None)]}, r"messages\[1\]: content: "),
    "no response": (C.read_conversations, {"prompt": "a"}, "response is missing"),
    "empty response": (C.read_conversations, {"prompt": "a", "response": " "}, "response has to be a text, and is ' '"),
    "no question": (C.read_prompts, {"messages": [SYSTEM("a")]}, "a prompt needs a turn of the user, and there"),
    "only answers": (C.read_prompts, {"messages": talk("a", "b")[1:]}, "a prompt needs a turn of the user"),
    "no chosen": (C.read_preferences, {"prompt": "a", "rejected": "c"}, "chosen is missing"),
    "no rejected": (C.read_preferences, {"prompt": "a", "chosen": "c"}, "rejected is missing"),
    "rejected a number": (C.read_preferences, GOOD | {"rejected": 3}, "rejected has to be a text, and is 3"),
    "chosen the user's": (C.read_preferences, GOOD | {"chosen": talk("a")}, "chosen has to end with a turn of the as"),
    "chosen no messages": (C.read_preferences, GOOD | {"chosen": []}, r"chosen has to be a text, and is \[\]"),
    "ranked one": (C.read_preferences, {"prompt": "a", "ranked": ["b"]}, "ranked has to be a list of at least two"),
    "ranked a string": (C.read_preferences, {"prompt": "a", "ranked": "bc"}, "ranked has to be a list of at least two"),
    "ranked empty group": (C.read_preferences, {"prompt": "a", "ranked": ["b", []]}, r"ranked\[1\] has to be a text"),
    "ranked group of none": (C.read_preferences, {"prompt": "a", "ranked": [["b", ""], "c"]}, r"ranked\[0\] has to be"),
    "ranked empty text": (C.read_preferences, {"prompt": "a", "ranked": ["b", ""]}, r"ranked\[1\] has to be a text"),
    "margin a string": (C.read_preferences, GOOD | {"margin": "1"}, "margin has to be a number, and is '1'"),
    "margin true": (C.read_preferences, GOOD | {"margin": True}, "margin has to be a number, and is True"),
    "preference 2": (C.read_preferences, GOOD | {"preference": 2}, "preference is a probability, and is 2"),
    "not JSON": (C.read_preferences, '{"prompt": "a"', "not JSON: "),
    "a list": (C.read_conversations, "[1]", "a list, where an object like"),
    "twice": (C.read_prompts, '{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(name, file):
    read, row, reason = MALFORMED[name]
    good = GOOD | {"messages": talk("a", "b")}
    path = file(good, row, "", good)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {reason}"):
        list(read(path))
    bad = Bad(1)
    assert [item.where for item in read(path, bad)] == [f"{path}:1", f"{path}:4"]
    assert bad.count == 1 and bad.examples[0].startswith(f"{path}:2: ")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {reason}"):
        list(read(path, Bad(0)))


# ------------------------------------------------------------------ ids and masks

DIALOGUES = [
    talk("Hi", "Hello there."),
    talk("Hi", " Hello ", "and?", "x"),
    [SYSTEM("Be brief."), *talk("<|im_end|></s>[/INST]", "one\u2028two", "\n", "an <|im_start|> end</s>")],
]


@EVERY_TEMPLATE
@pytest.mark.parametrize("messages", DIALOGUES, ids=range(len(DIALOGUES)))
def test_a_prompt_begins_what_is_trained_and_only_the_last_answer_is(template, messages):
    *prompt, answer = messages
    before, none = render(prompt, template, TOKENIZER, add_generation_prompt=True)
    ids, mask = C.encode_answer(prompt, answer["content"], template, TOKENIZER)
    assert not none[len(before) :].any()
    assert np.array_equal(ids[: len(before)], before)  # sampling starts from just these
    assert np.array_equal(mask, np.arange(len(ids)) >= len(before))
    ends = stop_ids(template, TOKENIZER)
    assert ids[-1] in ends and mask[-1]  # the end is trained, and nothing stands behind it
    assert not ends & set(ids[len(before) : -1].tolist())
    assert TOKENIZER.decode(ids[len(before) : -1]).rstrip(" ") == answer["content"].rstrip(" ")
    (prompted,) = C.encode_prompts([C.Conversation("x:1", messages, {})], template, TOKENIZER, 10_000)
    assert np.array_equal(prompted[0], before)


@EVERY_TEMPLATE
def test_every_answer_of_a_conversation_is_trained_with_its_end(template):
    for messages in DIALOGUES:
        ((ids, mask),) = C.encode_conversations([C.Conversation("x:1", messages, {})], template, TOKENIZER, 10_000)
        stretches = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask.astype(int))) + 1)
        trained = [s for s in stretches if mask[s[0]]]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [TOKENIZER.decode(ids[s[:-1]]).rstrip(" ") for s in trained] == [a.rstrip(" ") for a in answers]
        assert all(ids[s[-1]] in stop_ids(template, TOKENIZER) for s in trained)


def test_what_can_not_be_used_is_left_out_and_counted():
    make = lambda n, *messages: C.Conversation(f"x:{n}", list(messages), {})
    long = talk("Hi", "z" * 100)
    room = len(render(long, "llama3", TOKENIZER)[0]) - 1
    given = [make(1, *long), make(2, USER("a")), make(3, *talk("a", "z" * 200)), make(4, *talk("a", "z" * 300))]
    found = C.encode_conversations(given, "llama3", TOKENIZER, room)
    assert len(found) == 1 and len(found[0][0]) == room + 1  # it just fits: T + 1 tokens make a row of T
    assert found.left_out == {"with no token to train": 1, f"too long for a length of {room} tokens": 2}
    assert (
        found.summary()
        == f"2 too long for a length of {room} tokens (first: x:3), 1 with no token to train (first: x:2)"
    )
    assert found.checked("--data") is found
    assert not C.encode_conversations(given[:1], "llama3", TOKENIZER, room - 1)
    with pytest.raises(ValueError, match=r"--data: no row can be used: 1 with no token to train \(first: x:2\)"):
        C.encode_conversations(given[1:2], "llama3", TOKENIZER, room).checked("--data")
    first = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"  # nothing predicts it
    )
    assert not C.encode_conversations([make(5, ASSISTANT("a"))], first, TOKENIZER, room)
    with pytest.raises(ValueError, match="--data: no row can be used: it is empty"):
        C.encode_conversations([], "llama3", TOKENIZER, room).checked("--data")


def test_turns_that_a_template_has_no_place_for_are_counted_with_the_reason():
    odd = [C.Conversation("x:7", [USER("a"), USER("b"), ASSISTANT("c")], {})]
    reason = r"1 that the template has no place for \(first: x:7: messages\[1\]: role is 'user' where template 'llama2'"
    for encode in (C.encode_conversations, C.encode_prompts):
        with pytest.raises(ValueError, match=reason):
            encode(odd, "llama2", TOKENIZER, 500).checked("--data")
        assert len(encode(odd, "chatml", TOKENIZER, 500)) == 1
    preference = C.Preference("x:7", [USER("a"), USER("b")], ["c", "d"], 0.0, 1.0)
    with pytest.raises(ValueError, match=reason):
        C.encode_preferences([preference], "llama2", TOKENIZER, 500).checked("--data")
    no_question = [C.Conversation("x:8", [ASSISTANT("c")], {})]
    assert C.encode_prompts(no_question, "chatml", TOKENIZER, 500).left_out.total() == 1


def test_a_template_that_marks_no_answers_is_named_as_the_reason():
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    marked = "{% for m in messages %}{{ m.role }}{%- generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    given = [C.Conversation("x:1", talk("a", "b"), {})]
    reason = r"1 with no token to train \(first: x:1: the Jinja template marks no .*: take --template chatml\)"
    with pytest.raises(ValueError, match=reason):
        C.encode_conversations(given, plain, TOKENIZER, 200).checked("--data")
    with pytest.raises(ValueError, match=reason):
        preference = C.Preference("x:1", talk("a"), ["b", "c"], 0.0, 1.0)
        C.encode_preferences([preference], plain, TOKENIZER, 200).checked("--data")
    assert C.encode_conversations(given, marked, TOKENIZER, 200)


def test_preferences_as_rankings():
    make = lambda n, *answers: C.Preference(f"x:{n}", talk("a"), list(answers), 0.5, 0.75)
    given = [
        make(1, "yes", "no"),
        make(2, "same", "same"),
        make(3, "a", "b", "a"),
        make(4, "x" * 300, "b"),
        make(5, *"cba"),
    ]
    found = C.encode_preferences(given, "chatml", TOKENIZER, 200)
    assert found.left_out == {"whose chosen and rejected answers are the same": 2, "longer than 201 tokens": 1}
    assert [len(r.answers) for r in found] == [2, 3] and (found[0].margin, found[0].preference) == (0.5, 0.75)
    told = lambda r: [TOKENIZER.decode(ids[mask], skip_special=True) for ids, mask in r.answers]
    assert told(found[0]) == ["yes", "no"]
    assert [told(r) for r in C.pairs(found)] == [["yes", "no"], ["c", "b"], ["c", "a"], ["b", "a"]]


def test_ties_can_be_left_out():
    given = [C.Preference(f"x:{n}", talk("a"), ["b", "c"], 0.0, p) for n, p in enumerate((1.0, 0.5, 0.0))]
    assert len(C.encode_preferences(given, "chatml", TOKENIZER, 200)) == 3
    found = C.encode_preferences(given, "chatml", TOKENIZER, 200, ties=False)
    assert [r.preference for r in found] == [1.0, 0.0] and found.summary() == "1 that are ties (first: x:1)"


def test_prompts_are_at_most_so_long():
    given = [C.Conversation("x:1", talk("a" * n), {}) for n in (3, 4)]
    room = len(render(talk("aaa"), "chatml", TOKENIZER, add_generation_prompt=True)[0])
    found = C.encode_prompts(given, "chatml", TOKENIZER, room)
    assert [len(ids) for ids, _ in found] == [room] and found.left_out == {f"longer than {room} tokens": 1}


# ------------------------------------------------------------------ real files

REAL = {  # reader, rows, rows with more than one question
    "sft/permissive.jsonl": (C.read_conversations, 4189, 0),
    "sft/gsm8k.jsonl": (C.read_conversations, 2400, 0),
    "sft/multiturn_hh.jsonl": (C.read_conversations, 900, 900),
    "preferences/synthetic.jsonl": (C.read_preferences, 1116, 39),
    "preferences/human_judged.jsonl": (C.read_preferences, 1357, 0),
    "preferences/hh_helpful.jsonl": (C.read_preferences, 4343, 4343 - 1407),
    "prompts/prompts.jsonl": (C.read_prompts, 872, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_parse_to_the_last_row(name):
    if not (DATA / name).exists():
        pytest.skip("needs the real data in ../shared/data")
    read, rows, several = REAL[name]
    found = list(read(DATA / name))
    asked = [getattr(item, "messages", None) or item.prompt for item in found]
    assert len(found) == rows
    assert sum(sum(m["role"] == "user" for m in messages) > 1 for messages in asked) == several
    if name.endswith("hh_helpful.jsonl"):  # transcripts: not one turn is left inside another
        assert not any("\n\nAssistant:" in m["content"] or "\n\nHuman:" in m["content"] for ms in asked for m in ms)


@EVERY_TEMPLATE
@pytest.mark.parametrize("name", ["sft/multiturn_hh.jsonl", "preferences/hh_helpful.jsonl"])
def test_every_template_takes_real_dialogues(name, template):
    if not (DATA / name).exists():
        pytest.skip("needs the real data in ../shared/data")
    read, encode = (C.read_conversations, C.encode_conversations), (C.read_preferences, C.encode_preferences)
    read, encode = read if name.startswith("sft") else encode
    rows = list(read(DATA / name))[::60]
    found = encode(rows, template, TOKENIZER, 100_000)
    assert len(found) == len(rows) and not found.left_out


# ------------------------------------------------------------------ answers that bring their turns along

TALK = [SYSTEM("Be brief."), *talk("Hello there", "Yes?", "What is the capital of Kenya?")]


def after(turns, *answers):
    return [[*turns, ASSISTANT(text)] for text in answers]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Hello there"}, {"prompt": TALK}])
def test_turns_before_the_answers_are_their_prompt(prompt, file):
    chosen, rejected = after(TALK, "Nairobi.", "Lima.")
    (found,) = C.read_preferences(file(prompt | {"chosen": chosen, "rejected": rejected}))
    assert found.prompt == TALK and found.answers == ["Nairobi.", "Lima."]
    (found,) = C.read_preferences(file(prompt | {"ranked": [rejected, chosen]}))
    assert found.prompt == TALK and found.answers == ["Lima.", "Nairobi."]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "message"),
    [
        ({"prompt": "Hello there"}, after(TALK, "a")[0], "b", "do not follow the same messages"),
        ({}, after(TALK, "a")[0], after(TALK[1:], "b")[0], "do not follow the same messages"),
        ({"prompt": "Other"}, after(TALK, "a")[0], after(TALK, "b")[0], "do not have the prompt among them"),
        ({}, after(TALK[:3], "a")[0], after(TALK[:3], "b")[0], "follows a turn of the user, not of 'assistant'"),
    ],
)
def test_turns_that_do_not_belong_together_are_refused(prompt, chosen, rejected, message, file):
    with pytest.raises(ValueError, match=message):
        list(C.read_preferences(file(prompt | {"chosen": chosen, "rejected": rejected})))


def test_an_empty_answer_is_left_out_and_counted():
    found = C.encode_conversations([C.Conversation("x:1", talk("Hi", " "), {})], "chatml", TOKENIZER, 100)
    assert not found and found.summary() == "1 with an empty answer (first: x:1)"
