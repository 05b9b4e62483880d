"""Collecting preferences: what is typed, what is written down, and that no kill, undo or other day loses any of it."""

import importlib.util
import itertools
import json
import re
import runpy
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm.data.conversations import read_preferences
from minillm.data.readers import read_rows
from minillm.model import Config, build
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers import dpo, reward
from minillm.trainers.common import save_model

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("collect", ROOT / "scripts/collect.py")
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)

user = lambda text: [{"role": "user", "content": text}]


def prompt(n, text=None):
    messages = user(text or f"question {n}?")
    return collect.Prompt(collect.key_of(messages), f"prompts.jsonl:{n}", messages)


class Written:
    """A model whose answers are written down: n of them to each prompt, "a", "b", ... as drawn."""

    def __init__(self, n=3, texts="abcd"):
        self.texts, self.asked, self.stopped = texts[:n], [], False

    def __call__(self, prompts):
        self.asked.append([p.where for p in prompts])
        return [[collect.Answer(text, "stop") for text in self.texts] for _ in prompts]

    def stop(self):
        self.stopped = True


def collection(out, count=4, draw=None, prompts=None, **options):
    prompts = [prompt(n) for n in range(1, count + 1)] if prompts is None else prompts
    return collect.Collection(prompts, out, draw or Written(), {"model": "m"}, **options)


def session(out, *typed, **options):
    """A whole session at the terminal, in which this was typed; what was told, as lines."""
    told, typed = [], iter(typed)

    def ask(text):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    with collection(out, tell=told.append, **options) as asked:
        collect.terminal(asked, ask, told.append)
    assert next(typed, None) is None, "not everything was asked for"
    return "\n".join(told).split("\n")


def title(told):
    """The first one."""
    return next(line for line in told if line.startswith("──"))


def rows_in(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line]


def typed_for(question, *wanted):
    """What to type for these answers, best first; (a tuple of) texts that are equally good."""
    number = {answer.text: str(n) for n, answer in enumerate(question.answers, 1)}
    return ">".join("=".join(number[text] for text in texts) for texts in wanted)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "preferences.jsonl"


# ------------------------------------------------------------------ rankings

FORMS = {  # what is typed for how many answers: the ranking
    ("2 1 3", 3): "2 > 1 > 3", ("2>1>3", 3): "2 > 1 > 3", ("213", 3): "2 > 1 > 3", ("2,1,3", 3): "2 > 1 > 3",
    (" 2 > 1,3 ", 3): "2 > 1 > 3", ("2  1\t3", 3): "2 > 1 > 3", ("2 13", 3): "2 > 1 > 3", ("4321", 4): "4 > 3 > 2 > 1",
    ("2=1>3", 3): "2 = 1 > 3", ("2=1 3", 3): "2 = 1 > 3", ("2 = 1 3", 3): "2 = 1 > 3", ("2=13", 3): "2 = 1 > 3",
    ("3>1=2", 3): "3 > 1 = 2", ("1=2=3", 3): "1 = 2 = 3", ("1=2", 2): "1 = 2", ("1=4>2=3", 4): "1 = 4 > 2 = 3",
    ("2", 2): "2 > 1", ("2>1", 3): "2 > 1 > 3", ("1=2", 3): "1 = 2 > 3", ("12", 2): "1 > 2",
    ("2", 3): "2 > 1 and 3, in no order", ("2=3", 4): "2 = 3 > 1 and 4, in no order",
    ("41", 4): "4 > 1 > 2 and 3, in no order", ("1", 4): "1 > 2 and 3 and 4, in no order",
}  # fmt: skip
MISTAKES = {
    ("", 3): "type the numbers of the answers, the best first, like 2 1 3; ? for help",
    (" ", 2): "type the numbers of the answers, the best first, like 2 1; ? for help",
    ("4", 3): "there is no answer 4, only 1 to 3", ("10", 3): "there is no answer 0, only 1 to 3",
    ("2 1 2", 3): "2 stands there twice", ("1=1", 2): "1 stands there twice", ("3<1", 3): "the best comes first",
    ("a", 3): "'a' has no place in a ranking like 2 1 3", ("2;1", 2): "';' has no place in a ranking like 2 1",
    ("\x1b[A", 3): r"'\x1b' has no place", ("²", 3): "'²' has no place", ("٢", 3): "'٢' has no place",
    ("-1", 3): "'-' has no place", ("2>>1", 3): "'2>>1' is no ranking", ("2==1", 3): "'2==1' is no ranking",
    ("=2", 3): "'=2' is no ranking", ("2>", 3): "'2>' is no ranking", (">", 3): "'>' is no ranking",
    ("1,,2", 3): "'1,,2' is no ranking", ("2>=1", 3): "'2>=1' is no ranking",
}  # fmt: skip


@pytest.mark.parametrize("typed, count", FORMS, ids=repr)
def test_a_ranking_is_understood(typed, count):
    ranking = collect.parse_ranking(typed, count)
    assert str(ranking) == FORMS[typed, count]
    assert sorted([*itertools.chain(*ranking.groups), *ranking.rest]) == list(range(count))


@pytest.mark.parametrize("typed, count", MISTAKES, ids=repr)
def test_a_mistake_is_one_line_that_says_what_is_wrong(typed, count):
    with pytest.raises(collect.Mistake, match=re.escape(MISTAKES[typed, count])) as caught:
        collect.parse_ranking(typed, count)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 110


ROWS = {  # the ranking of answers that were drawn as a, b, c, d: the rows, a tie with =
    "a>b": ["a>b"], "b>a": ["b>a"], "a=b": ["a=b"],
    "b>a>c": ["b>a>c"], "d>b>a>c": ["d>b>a>c"],
    "b=a>c": ["a=b", "a>c", "b>c"], "c>b=a": ["c>a", "c>b", "a=b"], "c=b=a": ["a=b", "a=c", "b=c"],
    "b>ac": ["b>a", "b>c"], "c=b>ad": ["b=c", "b>a", "b>d", "c>a", "c>d"],
    "c>a>bd": ["c>a", "c>b", "c>d", "a>b", "a>d"],
}  # fmt: skip


@pytest.mark.parametrize("said", ROWS)
def test_the_rows_say_what_was_said_and_no_more_whatever_the_order_on_the_screen(said):
    texts = sorted(re.sub("[>=]", "", said))
    for order in itertools.permutations(range(len(texts))):
        answers = [collect.Answer(texts[i], "stop") for i in order]
        question = collect.Question(prompt(1), answers, list(order))
        rest = said.split(">")[-1] if re.search(r"[a-d]{2}$", said) else ""
        for reversed_ties in (False, True):
            groups = [group.split("=") for group in said.removesuffix(f">{rest}" if rest else "").split(">")]
            typed = typed_for(question, *(group[:: -1 if reversed_ties else 1] for group in groups))
            rows = list(collect.rows_of(question, collect.parse_ranking(typed, len(texts)), {"model": "m"}))
            assert [("=" if "preference" in row else ">").join(row["ranked"]) for row in rows] == ROWS[said]
            assert all(row.get("preference", 0.5) == 0.5 for row in rows)
            pairs = [row.get("pair") for row in rows]
            assert pairs == ([[n, len(rows)] for n in range(1, len(rows) + 1)] if len(rows) > 1 else [None])


def test_a_row_tells_where_it_comes_from(out):
    first = collect.Prompt(1, "a\udcff.jsonl:7", [{"role": "user", "content": "é?", "name": "x"}])  # any bytes
    answers = [collect.Answer(" good", "stop"), collect.Answer("bad", "length")]
    about = {"model": "m", "seed": 3, "annotator": "b\udcff"}
    (row,) = collect.rows_of(collect.Question(first, answers, [1, 0]), collect.parse_ranking("2", 2), about)
    assert row == {
        "prompt": first.messages, "ranked": ["bad", " good"], "finish": ["length", "stop"],
        "source": "human", "where": "a?.jsonl:7", "model": "m", "seed": 3, "annotator": "b?",
    }  # fmt: skip
    collect.Ledger(out).add([row])
    assert out.read_bytes().startswith(collect.BEGIN) and rows_in(out) == [row]


# ------------------------------------------------------------------ a session


def test_rank_tie_skip_undo_quit(out):
    told = session(out, "2 1 3", "2=1>3", "s", "u", "u", "1", "S", "Undo", "?", "nonsense", "3>2>1", "q")
    assert [line for line in told if re.match("ranked|skipped|taken", line)] == [
        "ranked 2 > 1 > 3",
        "ranked 2 = 1 > 3",
        "skipped",
        "taken back: prompts.jsonl:3 was skipped",
        "taken back: prompts.jsonl:2 was ranked",
        "ranked 1 > 2 and 3, in no order",
        "skipped",
        "taken back: prompts.jsonl:3 was skipped",
        "ranked 3 > 2 > 1",
    ]
    titles = [re.search(r"(\S+) ─+ (.*) ──$", line).groups() for line in told if line.startswith("──")]
    assert titles[:3] == [
        ("prompts.jsonl:1", "0 of 4 ranked, 4 to go"),
        ("prompts.jsonl:2", "1 of 4 ranked, 3 to go"),
        ("prompts.jsonl:3", "2 of 4 ranked, 2 to go"),
    ]
    assert titles[3] == ("prompts.jsonl:4", "2 of 4 ranked, 1 skipped, 1 to go")
    assert [where for where, _ in titles] == [f"prompts.jsonl:{n}" for n in (1, 2, 3, 4, 3, 2, 3, 4, 3, 4)]
    assert len(titles) == 10 and any(line.startswith("'n' has no place") for line in told)
    assert told.count("s skip   u undo   q quit, all is saved   ? this help") == 2  # at the beginning, and when asked
    rows = rows_in(out)
    assert [row["prompt"] for row in rows] == [user(f"question {n}?") for n in (1, 2, 2, 3)]
    assert [len(row["ranked"]) for row in rows] == [3, 2, 2, 3] and rows_in(Path(f"{out}.skipped")) == []
    assert [len(p.answers) for p in read_preferences(out)] == [3, 2, 2, 3]


def test_what_was_decided_is_not_asked_again_wherever_it_stands(out):
    session(out, "213", "s", "1=2", "q")
    before = out.read_bytes()
    moved = [prompt(9, text) for text in ("question 4?", "question 3?", "new?", "question 2?", "question 1?")]
    told = session(out, "q", prompts=moved)
    assert title(told).endswith(" 2 of 5 ranked, 1 skipped, 2 to go ──")
    assert "user: question 4?" in told and out.read_bytes() == before
    told = session(out, "1", "2", prompts=moved)
    assert "user: new?" in told and "4 of 5 ranked, 1 skipped, 0 to go" in told
    assert "All is done. u takes the last decision back, q ends." in told
    assert not any(line.startswith("user:") for line in session(out, "", prompts=moved))  # Enter ends


def test_undo_goes_back_over_days_in_the_order_of_the_decisions(out):
    for typed in ("213", "s", "1=2", "s"):
        session(out, typed)
    told = session(out, "x", "u", "u", "u", "u", "u", "q")
    wheres = re.findall(r"taken back: prompts.jsonl:(\d) was (\w+)", "\n".join(told))
    assert wheres == [("4", "skipped"), ("3", "ranked"), ("2", "skipped"), ("1", "ranked")]
    assert "nothing is left to rank; u takes the last decision back, q ends" in told  # to x
    assert told[-1] == "there is nothing to take back"
    assert out.read_bytes() == b"" == Path(f"{out}.skipped").read_bytes()


def test_an_undone_prompt_comes_next_with_the_answers_it_had(out):
    draw = Written(4)
    with collection(out, draw=draw) as asked:
        first = asked.question()
        asked.rank(first, collect.parse_ranking("1234", 4))
        second = asked.question()
        asked.skip(second)
        asked.undo()
        assert asked.question() == second
        with pytest.raises(collect.Mistake, match=r"prompts.jsonl:1 is not what is asked now"):
            asked.rank(first, collect.parse_ranking("1", 4))
        asked.undo()
        assert asked.question() == first
    assert sum(map(len, draw.asked)) == 4 and draw.stopped  # each prompt is answered once
    with collection(out, prompts=[prompt(1)], draw=draw) as asked:
        assert asked.question() == first


def test_rows_of_somebody_else_are_kept_and_never_taken_back(out):
    theirs = [{"prompt": "question 2?", "chosen": "x", "rejected": "y", "pair": [1, 3]}]
    theirs += [{"prompt": "elsewhere?", "ranked": ["x", "y", "z"]}, {"prompt": "question 3?", "ranked": ["x", "y"]}]
    text = "".join(json.dumps(row) + "\n" for row in theirs)
    out.write_text(text + "\n", encoding="utf-8")
    told = session(out, "u", "213", "u", "u", "q")
    assert title(told).endswith(" 2 of 4 ranked, 2 to go ──")
    assert told.count(f"the last row of {out} is not about these prompts; it stays") == 2
    assert out.read_text(encoding="utf-8") == text + "\n"
    session(out, "213", "2", prompts=[prompt(1), prompt(7)])
    told = session(out, "u", "q")  # the last ranking is of another file of prompts
    assert f"the last row of {out} is not about these prompts; it stays" in told and len(rows_in(out)) == 3 + 1 + 2


def test_prompts_whose_answers_are_all_the_same_are_left_out_in_one_line(out):
    class Odd(Written):
        def __call__(self, prompts):
            return [given[: {"question 2?": 1, "question 3?": 0}.get(p.messages[0]["content"], 3)] for p, given in
                    zip(prompts, super().__call__(prompts), strict=True)]  # fmt: skip

    told = session(out, "213", "213", "", draw=Odd(texts=["one\n" + 50 * "long ", "b", "c"]))
    assert (
        "prompts.jsonl:2 is left out: the model always says the same: one long long long long long long [...]" in told
    )
    assert "prompts.jsonl:3 is left out: the model always says nothing" in told
    assert "2 of 4 ranked, 2 with one answer only, 0 to go" in told and len(rows_in(out)) == 2
    told = session(out.with_name("other.jsonl"), draw=Odd(), prompts=[prompt(2)])  # nothing to rank, nothing to ask
    assert told[-1] == "prompts.jsonl:2 is left out: the model always says the same: a" and "──" not in "".join(told)


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_answers_are_drawn_ahead_and_once(ahead, out):
    draw = Written()
    with collection(out, 20, draw=draw, ahead=ahead) as asked:
        for n in range(1, 21):
            question = asked.question()
            assert not asked.waits()
            assert question.prompt.where == f"prompts.jsonl:{n}"
            assert len(asked.drawn) <= n + 2 * ahead  # and not all of a long file
            if n == 1:  # the first does not wait for others
                assert draw.asked[0] == ["prompts.jsonl:1"]
            asked.rank(question, collect.parse_ranking("1", 3))
        assert asked.question() is None and not asked.waits()
    assert list(itertools.chain(*draw.asked)) == [f"prompts.jsonl:{n}" for n in range(1, 21)]
    assert max(map(len, draw.asked)) == ahead


def test_the_order_on_the_screen_is_drawn_for_each_prompt_and_seed(out):
    def orders(seed):
        with collection(out, 40, draw=Written(3), seed=seed) as asked:
            for _ in range(40):
                question = asked.question()
                asked.skip(question)
                yield "".join(answer.text for answer in question.answers)
        Path(f"{out}.skipped").unlink()

    once = list(orders(0))
    assert once == list(orders(0)) != list(orders(1))
    assert set(once) == {"".join(order) for order in itertools.permutations("abc")}


# ------------------------------------------------------------------ files


def test_a_kill_while_writing_loses_nothing_but_that_ranking(out):
    session(out, "213", "q")
    one = out.read_bytes()
    session(out, "2=1>3", "q")
    two = out.read_bytes()
    cuts = [len(one) + 1, len(one) + 15, *(i + k for i in range(len(one), len(two)) if two[i] == 10 for k in (0, 1, 2))]
    for cut in sorted(set(cuts) - {len(two), len(two) + 1, len(two) - 1}):
        for zeros in (b"", b"\0" * 9):
            out.write_bytes(two[:cut] + zeros)
            told = session(out, "q")
            assert told[0] == f"{out}: its end was cut off while it was written; that prompt is asked again"
            assert "user: question 2?" in told and out.read_bytes() == one
    out.write_bytes(two[:-1])  # an editor that ends no line, and all is there
    told = session(out, "q")
    assert "user: question 3?" in told and "cut off" not in told[0] and out.read_bytes() == two
    session(out, "s", "q")
    skipped = Path(f"{out}.skipped")
    skipped.write_bytes(skipped.read_bytes() + b'{"prompt": [{"ro')
    told = session(out, "q")
    assert told[0] == f"{skipped}: its end was cut off while it was written; that prompt is asked again"
    assert "user: question 4?" in told


def test_each_decision_is_on_the_disk_before_the_next_question(out, monkeypatch):
    done = []
    monkeypatch.setattr(collect.os, "fsync", lambda descriptor: done.append(out.stat().st_size))
    with collection(out) as asked:
        for n, typed in enumerate(("1", "2=1", "213"), 1):
            asked.rank(asked.question(), collect.parse_ranking(typed, 3))
            assert len(done) == n and done[-1] == out.stat().st_size and out.read_bytes().endswith(b"\n")
            assert {row["prompt"][0]["content"] for row in rows_in(out)} == {f"question {k}?" for k in range(1, n + 1)}


def test_a_file_that_somebody_else_changes_is_not_written_over(out):
    with collection(out) as asked:
        asked.rank(asked.question(), collect.parse_ranking("1", 3))
        session(out, "213", "q")  # in another window
        before = out.read_bytes()
        for act in (lambda: asked.rank(asked.question(), collect.parse_ranking("2", 3)), asked.undo):
            with pytest.raises(
                ValueError, match=f"{re.escape(str(out))} was changed by somebody else: start again"
            ) as e:
                act()
            assert not isinstance(e.value, collect.Mistake)  # to ask again would not help
        assert out.read_bytes() == before and len(asked.decisions) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "response": "b"}\n', "preferences.jsonl:1: chosen is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho', "preferences.jsonl:2: not JSON: "),
        ("my notes", "preferences.jsonl:1: not JSON: "),
    ],
)
def test_a_file_of_another_kind_is_refused_and_not_repaired(text, message, out):
    out.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        collection(out)
    assert out.read_text(encoding="utf-8") == text
    assert not Path(f"{out}.skipped").exists()


@pytest.mark.parametrize("line", ["[]", '{"prompt": "a", "after": 0}', '{"prompt": [], "after": "x"}', '{"after": 0}'])
def test_a_strange_line_among_the_skipped_is_named(line, out):
    Path(f"{out}.skipped").write_text(f'\n{{"prompt": [], "after": 0}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"preferences.jsonl.skipped:3: this is no skipped prompt; remove the line"):
        collection(out)


# ------------------------------------------------------------------ the screen


def test_a_model_can_not_move_the_cursor():
    assert collect.printable("a\x1b[2Jb\r\nc\td\x00\u202ee\u00a0f\u200dg\u2028h") == "a�[2Jb\nc   d��e f\u200dg\nh"
    lines = list(collect.wrapped(" one\n\n  two three" + " four" * 9 + "\n", 40, "  1  "))
    assert lines == ["  1  one", "     ", "       two three four four four four", "     four four four four four"]
    wide = list(collect.wrapped("昔々" * 30, 40, "  1  "))
    assert "".join(line[5:] for line in wide) == "昔々" * 30 and all(len(line) - 5 <= 17 for line in wide)


def test_the_screen_shows_every_turn_and_what_was_cut_off():
    messages = [{"role": "system", "content": "Be brief."}, *user("a"), {"role": "assistant", "content": "b\nc"}]
    asked = collect.Prompt(1, "some/where/p.jsonl:3", [*messages, *user("word " * 30)])
    answers = [collect.Answer("yes", "stop"), collect.Answer("no " * 40, "length")]
    lines = list(collect.screen(collect.Question(asked, answers, [0, 1]), "0 of 1 ranked, 1 to go", 60))
    assert lines[0].startswith("── p.jsonl:3 ──") and lines[0].endswith("── 0 of 1 ranked, 1 to go ──")
    assert len(lines[0]) == 60 == max(map(len, lines))
    for line in ("system: Be brief.", "user: a", "assistant: b", "           c", "  1  yes", "     (cut off here)"):
        assert line in lines
    assert lines.count("     (cut off here)") == 1


# ------------------------------------------------------------------ the page


@pytest.fixture
def page(out):
    """A function that starts the page of a collection; what it returns asks the page."""
    servers = []

    def start(**options):
        asked = collection(out, **options)
        server = collect.Server(asked, 0)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        servers.append((server, thread, asked))
        here = f"http://127.0.0.1:{server.server_port}"

        def ask(form=None, path="/", **headers):
            data = None if form is None else urllib.parse.urlencode(form).encode()
            if form is not None:
                headers = {"Origin": here} | headers
            headers = {name.replace("_", "-"): value for name, value in headers.items() if value}
            try:
                with urllib.request.urlopen(urllib.request.Request(here + path, data, headers)) as answer:
                    return answer.status, answer.read().decode(), answer.headers
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode(), error.headers

        ask.port = server.server_port
        return ask

    yield start
    for server, thread, asked in servers:
        server.shutdown()
        thread.join()
        server.server_close()
        asked.__exit__()


def key_in(text):
    return re.search(r'name="key" value="(\d*)"', text)[1]


def test_the_page_writes_what_the_terminal_writes(page, out, tmp_path):
    ask = page(seed=5)
    status, text, _ = ask()
    assert status == 200 and "question 1?" in text and "0 of 4 ranked, 4 to go" in text
    for typed in ("2>1>3", "2=1>3"):
        text = ask({"key": key_in(text), "do": "rank", "typed": typed})[1]  # it leads back to the page
    assert "ranked 2 = 1 &gt; 3" in text and "question 3?" in text
    text = ask({"key": key_in(text), "do": "skip"})[1]
    assert "skipped" in text and "2 of 4 ranked, 1 skipped, 1 to go" in text
    text = ask({"key": key_in(text), "do": "undo"})[1]
    assert "taken back: prompts.jsonl:3 was skipped" in text and "question 3?" in text
    text = ask({"key": key_in(text), "do": "rank", "typed": "1>2>4"})[1]
    assert "there is no answer 4, only 1 to 3" in text and "question 3?" in text
    assert "there is no" not in ask()[1]  # told once
    text = ask({"key": key_in(text), "do": "rank", "typed": "3"})[1]
    text = ask({"key": key_in(text), "do": "skip", "typed": ""})[1]
    assert "All is done" in text and "3 of 4 ranked, 1 skipped, 0 to go" in text
    other = tmp_path / "other.jsonl"
    session(other, "213", "2=1>3", "3", "s", seed=5)
    assert out.read_bytes() == other.read_bytes()
    assert Path(f"{out}.skipped").read_bytes() == Path(f"{other}.skipped").read_bytes()
    text = ask({"key": "", "do": "undo"})[1]
    assert "question 4?" in text


def test_a_form_that_is_sent_twice_decides_once(page, out):
    ask = page()
    form = {"key": key_in(ask()[1]), "do": "rank", "typed": "213"}
    ask(form)
    text = ask(form)[1]
    assert "that was already decided; here is what comes next" in text and "question 2?" in text
    for form in ({}, {"key": "x", "do": "undo"}, {"do": "skip"}):
        ask(form)
    assert len(rows_in(out)) == 1 and not Path(f"{out}.skipped").exists()


def test_no_text_becomes_html(page):
    nasty = "<script>alert(1)</script>\"'&amp;</div>\x1b[2J\u202e"
    ask = page(draw=Written(2, [nasty, "{0} {nonce} %s"]), prompts=[prompt(1, f"why {nasty}?")])
    _, text, headers = ask()
    assert text.count("<script") == 1 and 'alert(1)</script>' not in text  # ours  # fmt: skip
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;amp;&lt;/div&gt;") == 2
    assert "\x1b" not in text and "\u202e" not in text and "{0} {nonce} %s" in text
    policy = headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert f'<script nonce="{nonce}">' in text and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert nonce not in ask()[2]["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert ask({"key": "<b>", "do": "<b>", "typed": "<b>"})[1].count("<b>") == ask()[1].count("<b>")


def test_other_sites_can_neither_read_nor_write(page, out):
    ask = page()
    form, port = {"key": key_in(ask()[1]), "do": "rank", "typed": "213"}, ask.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil", "127.0.0.1:x"):
        assert ask(Host=host)[:2] == (403, "this page is for 127.0.0.1 and localhost"), host
        assert ask(form, Host=host, Origin=f"http://{host}")[0] == 403, host
    other = (f"https://127.0.0.1:{port}", "http://127.0.0.1:1", f"http://localhost:{port}")
    for origin in ("http://evil.example", "null", "", *other):
        assert ask(form, Origin=origin)[:2] == (403, "only the page itself may send answers"), origin
    assert ask(form | {"typed": "1" * 10_000})[0] == 413
    assert ask(path="/etc/passwd")[0] == 404 and not rows_in(out)
    here = f"localhost:{port}"
    assert ask(form, Host=here, Origin=f"http://{here}")[0] == 200 and len(rows_in(out)) == 1


def test_what_can_not_be_written_is_said_on_the_page(page, out):
    ask = page()
    form = {"key": key_in(ask()[1]), "do": "rank", "typed": "213"}
    out.write_text("\n", encoding="utf-8")
    status, text, _ = ask(form)
    assert status == 500 and text.endswith("was changed by somebody else: start again, it goes on from there")


def test_a_port_that_is_taken_is_named(page, out):
    port = page().port
    with pytest.raises(ValueError, match=rf"^--port {port} can not be used \(.+\): take another, or 0 for any free"):
        collect.Server(None, port)


# ------------------------------------------------------------------ the script, with a model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small model, a reward model and prompts."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train([], SMALLEST_VOCABULARY)
    for name, head in (("base", "lm"), ("rm", "scalar")):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
        save_model(folder / name, build(Config(vocab_size=tokenizer.vocab_size, head=head, **sizes)), tokenizer)
    rows = [{"prompt": f"{n}?"} for n in range(6)]
    rows.insert(3, {"messages": [*user("1?"), {"role": "assistant", "content": "left out"}]})  # again
    rows.append({"prompt": "too long " * 9})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "broken.jsonl").write_text('{"prompt": \n', encoding="utf-8")
    return folder


def script(arguments, monkeypatch, typed=()):
    """Run scripts/collect.py in this process with what a person types; its exit code."""
    typed = iter(typed)

    def ask(text):
        print(text, end="")
        for answer in typed:
            if answer is KeyboardInterrupt:
                raise answer
            print(answer)
            return answer
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "argv", ["collect.py", *arguments.split()])
    try:
        runpy.run_path(str(ROOT / "scripts/collect.py"), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


GOOD = "base prompts.jsonl --out {out} --max-new-tokens 12 --seed 3"


def test_a_session_becomes_a_reward_model_and_a_dpo_model(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    out, whole = tmp_path / "new/folder/p.jsonl", tmp_path / "whole.jsonl"
    good = GOOD.format(out=out)
    assert script(f"{good} --annotator ada", monkeypatch, ["213", "bad", "2=1", "q"]) == 0
    told = capsys.readouterr()
    assert "left out: 1 longer than 51 tokens (first: prompts.jsonl:8)" in told.out
    assert "asked once, though the files repeat them: 1" in told.out
    assert told.out.endswith(f"\n2 of 6 ranked, 4 to go; written to {out}\n") and told.err == ""
    assert script(f"{good} --annotator ada --ahead 1", monkeypatch, ["s", KeyboardInterrupt]) == 130
    told = capsys.readouterr()
    assert "going on: 2 of 6 ranked, 4 to go" in told.out and told.err == ""
    assert told.out.endswith("\n2 of 6 ranked, 1 skipped, 3 to go\n")
    assert script(f"{good} --annotator ada", monkeypatch, ["u", "3", "1=2=3", "132", "321"]) == 0  # and Ctrl-D
    assert capsys.readouterr().out.endswith(f"\n6 of 6 ranked, 0 to go; written to {out}\n")
    typed = ["213", "2=1", "3", "1=2=3", "132", "321", "q"]
    assert script(f"{GOOD.format(out=whole)} --annotator ada", monkeypatch, typed) == 0
    assert out.read_bytes() == whole.read_bytes()  # a prompt's answers do not depend on when it is asked, or with which

    found = [row for _, row in read_rows(out)]
    assert [len(row["ranked"]) for row in found] == [3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert [row["pair"][0] for row in found[1:9]] == [1, 2, 3, 1, 2, 1, 2, 3]
    capsys.readouterr()
    about = {"source": "human", "model": "base", "seed": 3, "temperature": 1.0, "annotator": "ada"}
    assert all(row.items() >= about.items() for row in found) and found[0]["where"] == "prompts.jsonl:1"
    preferences = list(read_preferences(out))
    assert [p.preference for p in preferences].count(0.5) == 1 + 3
    common = {"model": world / "base", "data": (out,), "batch_size": 16, "held_out": 0.0, "log_every": 1}
    for name, trainer, config, used in (
        ("rm", reward, reward.RewardConfig, 11),
        ("dpo", dpo, dpo.DPOConfig, 7),  # without the ties
    ):
        trainer.train(config(out=tmp_path / name, **common))
        told = capsys.readouterr().out
        assert (
            f"{used} preferences, 0 held out" in told and "longer than" not in told
        )  # cut answers have room for their end
        assert (tmp_path / name / "model.safetensors").exists()


def sampler(world, temperature=1.0, answers=3, seed=0):
    options = collect.Options(
        model=world / "base", prompts=(world / "prompts.jsonl",), out=world / "never.jsonl",
        temperature=temperature, answers=answers, seed=seed, max_new_tokens=6,
    )  # fmt: skip
    tokenizer = collect.load_tokenizer(options.model)
    model = options.load(options.model, "lm")
    draw = collect.Sampler(model, tokenizer, {tokenizer.eos_id}, options, 6)
    return draw, [prompt(n)._replace(ids=tokenizer.encode(f"{n}?" * n)) for n in range(1, 7)]


def test_a_prompts_answers_depend_on_it_and_the_seed_alone(world):
    draw, prompts = sampler(world)
    together = draw(prompts)
    assert [draw([p])[0] for p in prompts] == together == draw(prompts[::-1])[::-1]
    assert all(len({" ".join(a.text.split()) for a in answers}) == 3 == len(answers) for answers in together)
    assert sampler(world, answers=2)[0](prompts) == [answers[:2] for answers in together]
    assert all(a != b for a, b in zip(together, sampler(world, seed=1)[0](prompts), strict=True))
    draw, prompts = sampler(world, temperature=1e-6)
    assert [len(answers) for answers in draw(prompts)] == [1] * 6  # drawn again, and always the same
    draw.stop()
    with pytest.raises(collect.CancelledError):
        draw(prompts)


def test_answers_that_look_alike_are_drawn_again(world, monkeypatch):
    says, rounds = {1: ["a", " a\n", "", "b", "a", "c", "d"], 2: ["x", "y", "z"], 3: ["e"] * 99, 4: ["f", "g"] * 50}, []
    draw, prompts = sampler(world)
    prompts = [p._replace(key=n) for n, p in enumerate(prompts[:4], 1)]
    monkeypatch.setattr(draw.tokenizer, "decode", lambda ids, **_: ids)

    def generate(model, ids, *, seed, **_):
        rounds.append([(key, k - 1) for _, k, key in seed])
        return [SimpleNamespace(ids=says[key][k], finish="stop") for key, k in rounds[-1]]

    monkeypatch.setattr(collect, "generate", generate)
    found = [[answer.text for answer in answers] for answers in draw(prompts)]
    assert found == [["a", "b", "c"], ["x", "y", "z"], ["e"], ["f", "g"]]
    assert [k for drawn in rounds for key, k in drawn if key == 1] == [0, 1, 2, 3, 4, 5]
    assert len(rounds) == collect.ROUNDS and len({draw for drawn in rounds for draw in drawn}) == sum(map(len, rounds))


WRONG = [  # what is added to the good command line, or all of it; code; message
    ("--answers 1", 2, "--answers has to be from 2 to 4, and is 1"),
    ("--answers 5", 2, "--answers has to be from 2 to 4, and is 5"),
    ("--answers two", 2, "--answers: 'two' is no whole number"),
    ("--temperature 0", 2, "--temperature has to be a finite number above 0, and is 0.0"),
    ("--temperature nan", 2, "--temperature has to be a finite number above 0, and is nan"),
    ("--top-p 1.1", 2, "--top-p has to be above 0 and at most 1, and is 1.1"),
    ("--top-p nan", 2, "--top-p has to be above 0 and at most 1, and is nan"),
    ("--seed -1", 2, "--seed has to be at least 0, and is -1"),
    ("--ahead 0", 2, "--ahead has to be at least 1, and is 0"),
    ("--skip-bad -1", 2, "--skip-bad has to be at least 0, and is -1"),
    ("--port 65536", 2, "--port has to be from 0 to 65535, and is 65536"),
    ("--max-new-tokens -1", 2, "--max-new-tokens has to be at least 0, and is -1"),
    (
        "--max-new-tokens 63",
        1,
        "--max-new-tokens has to be below 63, the model's context of 64 less the end, and is 63",
    ),
    ("--out {out}.json", 2, "--out has to be a .jsonl file, and is "),
    ("--out prompts.jsonl", 1, "--out prompts.jsonl is a file of prompts: take another"),
    ("--out file/p.jsonl", 1, "file: File exists"),
    ("--temp 1", 2, "Unrecognized options: --temp; perhaps you meant --"),
    ("--template lama2", 1, "--template 'lama2' is none of chatml, llama2, llama3, alpaca, and no file"),
    ("base prompts.jsonl", 2, "missing: --out PATH"),
    ("base --out {out}", 2, "name the model's folder and at least one file of prompts: MODEL PROMPTS ..."),
    ("--out {out}", 2, "name the model's folder and at least one file of prompts: MODEL PROMPTS ..."),
    ("prompts.jsonl base --out {out}", 1, "prompts.jsonl is a file, and has to be a folder"),
    ("rm prompts.jsonl --out {out}", 1, "rm is a reward model, and a language model is needed"),
    ("absent prompts.jsonl --out {out}", 1, "absent: no such folder"),
    ("base absent.jsonl --out {out}", 1, "absent.jsonl: no such file"),
    ("base broken.jsonl --out {out}", 1, "broken.jsonl:1: not JSON: "),
    ("base file --out {out}", 1, "file: not a kind of file that can be read"),
    ("base broken.jsonl --out {out} --skip-bad 1", 1, "PROMPTS: no row can be used: it is empty"),
]


@pytest.mark.parametrize("added, code, message", WRONG, ids=[added for added, *_ in WRONG])
def test_a_mistake_on_the_command_line_is_one_line(added, code, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    Path("file").touch()
    out = tmp_path / "p.jsonl"
    arguments = added.format(out=out)
    if added.startswith("--") and added != "--out {out}":
        good = GOOD.format(out=out)
        arguments = re.sub(rf"{added.split()[0]} \S+", "", good) + " " + arguments
    assert script(arguments, monkeypatch) == code
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("collect.py: ") and message in line and told.out == "" and not any(tmp_path.iterdir())
    for inside in ("Errno", "Error:", "Traceback", "tyro", "<class", "object at", "PosixPath"):
        assert inside not in line


@pytest.mark.parametrize("columns", [80, 300])
def test_help_is_narrow_and_names_every_option(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert script("--help", monkeypatch) == 0
    told = capsys.readouterr()
    assert told.err == "" and max(map(len, told.out.splitlines())) <= max(80, min(columns, 110))
    assert "MODEL" in told.out and "PROMPTS" in told.out and "None" not in told.out
    for option in ("out", "answers", "annotator", "seed", "template", "max-new-tokens", "temperature", "serve", "port"):
        assert f"  --{option} " in told.out
