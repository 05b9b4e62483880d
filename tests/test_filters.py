"""minillm.data.filters: each rule at its limit, from both sides; repetition as plainly as can be; real pages."""

import json
import pickle
import re
import runpy
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import filters as module
from minillm.data.clean import clean
from minillm.data.filters import PRESETS, Page, Preset, Rule, broken, judge

SHARED = Path(__file__).parents[2] / "shared/data"
SCRIPT = Path(__file__).parents[1] / "scripts/judge_filters.py"

PROSE = (
    "The mill stood by the river, and nobody in the village could remember who had built it. In spring the water was "
    "so high that the wheel turned day and night, with a sound like an old man who talks in his sleep. My father kept "
    "the books. He wrote down every sack of grain, the name of its owner, and what the weather was like.\n"
    '"That is how you find out what people are worth," he used to say! When I was nine I asked him what he meant by '
    "that. He laughed, closed the book, and gave me the key to the granary."
)
JAPANESE = (
    "むかしむかし、あるところに、おじいさんとおばあさんが住んでいました。おじいさんは山へしばかりに、"
    "おばあさんは川へせんたくに行きました。おばあさんが川でせんたくをしていると、大きな桃が流れてきました。"
)


def share_of(text, count, long=False):
    """100 lines: `count` of them are `text`, the others differ from each other."""
    others = [
        f"{chr(97 + n % 26)}{chr(97 + n // 26)} another{' and another' * 2 * long} line." for n in range(100 - count)
    ]
    return "\n".join([text] * count + others)


WORDS = " ".join(
    f"wo{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(100)
)  # 100 different words of 4 letters: no repetition, no punctuation

# rule: (a page at its limit that stays, a page just beyond that goes, what the detail says)
EDGES = {
    "gopher_quality.word_count": ("word " * 50, "word " * 49, "49 words < 50"),
    "gopher_quality.mean_word_length": ("abc " * 99, "abc " * 98 + "ab", "mean word length 2.990 < 3"),
    "gopher_quality.hashes": (WORDS + " #" * 10, WORDS + " #" * 11, "# per word 0.110 > 0.1"),
    "gopher_quality.ellipses": (WORDS + " ..." * 5 + "…" * 5, WORDS + "... " * 11, "ellipses per word 0.110 > 0.1"),
    "gopher_quality.bullet_lines": ("• one\n" * 9 + "two", " - one\n" * 10 + "two", "bullet lines 0.909 > 0.9"),
    "gopher_quality.ellipsis_lines": ("more...\n" * 3 + "all\n" * 7, "more… \n" * 4 + "all\n" * 6, "0.400 > 0.3"),
    "gopher_quality.alphabetic_words": ("w0rd " * 8 + "1 2", "word " * 7 + "1, 2 3.5", "a letter 0.700 < 0.8"),
    "gopher_quality.stop_words": ("a mill of the village", "A mill Of the village", "1 stop words < 2"),
    "gopher_repetition.repeated_lines": (share_of("a", 31), share_of("a", 32), "share of repeated lines 0.310 > 0.3"),
    "gopher_repetition.repeated_line_characters": (
        "x" * 20 + "\n" + "x" * 20 + "\n" + "y" * 58,
        "x" * 20 + "\n" + "x" * 20 + "\n" + "y" * 57,
        "share in repeated lines 0.202 > 0.2",
    ),
    "gopher_repetition.repeated_paragraphs": ("a\n\na\n\nb\n\nc", "a\n\na\n\na\n\nb\n\nc", "0.400 > 0.3"),
    "gopher_repetition.repeated_paragraph_characters": (
        PROSE,
        f"{PROSE}\n\n{PROSE}",
        "repeated paragraphs 0.499 > 0.2",
    ),
    "gopher_repetition.top_2_gram": ("ab cd " * 8 + WORDS[:152], "ab cd " * 8 + WORDS[:150], "2-gram 0.202 > 0.2"),
    "gopher_repetition.top_3_gram": (WORDS, WORDS[:200] + " ab cd ef" * 6, "share of the top 3-gram 0.189 > 0.18"),
    "gopher_repetition.top_4_gram": (WORDS, WORDS[:200] + " ab cd ef gh" * 4, "share of the top 4-gram 0.177 > 0.16"),
    **{
        # 100 words, and then the first n of them again and again
        f"gopher_repetition.repeated_{n}_grams": (
            WORDS + " " + " ".join(WORDS.split()[:n] * fits),
            WORDS + " " + " ".join(WORDS.split()[:n] * (fits + 1)),
            f"share in repeated {n}-grams",
        )
        for n, fits in {5: 4, 6: 3, 7: 2, 8: 2, 9: 1, 10: 1}.items()
    },
    "c4.lorem_ipsum": (PROSE + "\nlorem ipsum", PROSE + "\nA line of Lorem Ipsum.", "1 times lorem ipsum > 0"),
    "c4.curly_brackets": (PROSE + "\nif (x) {", PROSE + "\nThis is { not closed.", "1 curly brackets > 0"),
    "c4.sentence_count": (
        "One of it. Two of it. Three of it? Four of it!\nAnd five of it.",
        "Four. " * 4,
        "4 sentences < 5",
    ),
    "fineweb.terminal_lines": (share_of("a", 88), share_of("a", 89), "ending in punctuation 0.110 < 0.12"),
    "fineweb.short_lines": (share_of("a" * 30, 67, long=True), share_of("a" * 30, 68, long=True), "0.680 > 0.67"),
    "fineweb.repeated_line_characters": (PROSE, PROSE + "\nThe end.\nThe end.", "share in repeated lines 0.015 > 0.01"),
    "fineweb.newlines_per_word": (WORDS + "\n" * 30, WORDS + "\n" * 31, "newlines per word 0.310 > 0.3"),
    "default.word_count": ("word " * 10, "word " * 9, "9 words < 10"),
    "default.mean_word_length": ("w" * 15, "w" * 16, "mean word length 16.000 > 15"),
    "default.alphabetic_words": ("word " * 7 + "1 2 3", "word " * 6 + "1 2 3", "with a letter 0.667 < 0.7"),
    "default.long_words": ("word " * 42 + "w" * 72, "word " * 41 + "w" * 72, "over 40 characters 0.305 > 0.3"),
    "default.machine_words": ("word " * 3 + "a_bc (ab)c a-b it's", "word " * 2 + "a=bc", "sign inside 0.333 > 0.25"),
    "default.signs": ("abc" * 17 + "=" * 9, "abc" * 17 + "{" * 10, "share of signs 0.164 > 0.15"),
    "default.digits": ("abc" * 7 + "1" * 9, "abc" * 7 + "1" * 10, "share of digits 0.323 > 0.3"),
    "default.menu_lines": ("Home\n" * 7 + "Word,\n" * 3, "Home\n" * 4 + "Word.", "punctuation 0.800 > 0.7"),
    "default.repeated_line_characters": (share_of("a" * 16, 32), share_of("a" * 16, 33), "lines 0.301 > 0.3"),
    "default.repeated_grams": (PROSE, PROSE + "\n" + PROSE, "share in repeated 10-grams"),
    "code.longest_line": ("x" * 1000, "x" * 1001, "longest line 1001 > 1000"),
    "code.mean_line_length": ("x" * 80 + "\n\n" + "x" * 120, "x" * 80 + "\n\n" + "x" * 121, "length 100.500 > 100"),
    "code.alphanumeric": ("ab1{}[]();=!", "ab{}[]();=!", "share of letters and digits 0.182 < 0.25"),
}


def rules():
    return {rule.name: rule for preset in PRESETS.values() for rule in preset.rules}


def test_every_rule_has_its_pages():
    names = [rule.name for preset in PRESETS.values() for rule in preset.rules]
    assert len(names) == len(set(names)) and set(names) == set(EDGES)
    assert all(rule.name.startswith(f"{name}.") for name, preset in PRESETS.items() for rule in preset.rules)


@pytest.mark.parametrize("name", EDGES)
def test_a_page_at_the_limit_stays_and_one_beyond_it_goes(name):
    stays, goes, detail = EDGES[name]
    preset = PRESETS[name.partition(".")[0]]
    edit = preset.edit or (lambda text: text)
    test = rules()[name].test
    assert test(Page(edit(stays))) is None
    assert detail in test(Page(edit(goes)))
    assert name in dict(broken(goes, preset)) and name not in dict(broken(stays, preset))


@pytest.mark.parametrize("name", PRESETS)
def test_a_page_of_prose_passes(name):
    text = PROSE if name != "code" else PROSE.replace(". ", ".\n")
    assert judge(text, name) == (text, None, "") and broken(text, name) == []


@pytest.mark.parametrize("name", PRESETS)
@given(
    st.text(st.characters()) | st.lists(st.sampled_from(["ab", "a_b=c", " ", "\n", "1", ".", "語", "…"])).map("".join)
)
def test_any_text_gets_a_verdict_that_agrees_with_the_report(name, text):
    verdict, report = judge(text, name), broken(text, name)
    assert (verdict.rule, verdict.detail) == (report[0] if report else (None, ""))
    assert name == "c4" or verdict.text == text


def test_limits_can_be_changed_and_everything_travels_to_other_processes():
    mine = Preset((Rule("mine.word_count", partial(module.word_count, at_least=2, at_most=3)),))
    assert [judge(text, mine).detail for text in ("a", "a b", "a b c d")] == ["1 words < 2", "", "4 words > 3"]
    assert judge("a " * 30, pickle.loads(pickle.dumps(mine))).rule == "mine.word_count"
    again = pickle.loads(pickle.dumps(PRESETS))
    assert [judge(PROSE, again[name]) for name in PRESETS] == [judge(PROSE, name) for name in PRESETS]
    with pytest.raises(ValueError, match="no preset 'gopher': gopher_quality, gopher_repetition, c4, "):
        judge(PROSE, "gopher")


# ------------------------------------------------------------------ what a page counts


def test_words_lines_paragraphs_sentences():
    page = Page('“Well,” he said – "no"!\r\n \n\nIt cost 3.50, e.g. in U+2028\u2028text...\n')
    assert page.words == ["Well", "he", "said", "no", "It", "cost", "3.50", "e.g", "in", "U+2028", "text"]
    assert page.lines == ['“Well,” he said – "no"!\r', "It cost 3.50, e.g. in U+2028\u2028text..."]
    assert page.paragraphs == ['“Well,” he said – "no"!\r\n ', "It cost 3.50, e.g. in U+2028\u2028text..."]
    assert Page("One. Two! Three?\nFour... Five").sentences == 5
    assert Page("你好。再见！走吧？\nकैसे हो। ठीक हूँ।").sentences == 5


def test_scripts_without_spaces_have_words_too():
    assert Page("私は本です。abc").words == ["私は", "本で", "す", "abc"]
    assert Page("สวัสดีครับ").words == ["สวัส", "ดีคร", "ับ"]
    assert 40 <= len(Page(JAPANESE).words) <= 70
    assert judge(JAPANESE, "default").rule is None
    assert judge(JAPANESE * 2, "gopher_quality").rule == "gopher_quality.stop_words"
    assert judge("ฉันชอบอ่านหนังสือในห้องสมุดทุกวันหลังเลิกเรียนเพราะว่ามันเงียบสงบดี", "default").rule is None


def test_c4_edits_the_page():
    lines = [
        ("A line that is kept.", "A line that is kept."),
        ("  Spaces around it go!  ", "Spaces around it go!"),
        ("A citation[12] goes[citation needed].", "A citation goes."),
        ("No end", None),
        ("It goes on ...", None),
        ("Two words.", None),
        ("Please enable JavaScript here.", None),
        ("This site uses cookies for that.", None),
        ("Read our Privacy Policy, please.", None),
        (f"A word is {'x' * 1001} here.", None),
        (f"A word is {'x' * 1000} here.", f"A word is {'x' * 1000} here."),
        ('He said "so it is"', 'He said "so it is"'),
    ]
    kept = "\n".join(edited for _, edited in lines if edited)
    verdict = judge("\n".join(line for line, _ in lines), "c4")
    assert verdict == (kept, None, "")
    assert judge("No end\n" * 9, "c4") == ("", "c4.sentence_count", "0 sentences < 5")
    assert judge("", "c4").rule == "c4.sentence_count"


def plain_repetition(words, n):
    """Table A1 of the Gopher paper, as plainly as can be: (top n-gram's characters, repeated n-grams' characters)."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = {gram: grams.count(gram) for gram in grams}
    top = max(counts, key=counts.get, default=())
    seen, i, repeated = set(), 0, 0
    while i < len(grams):
        if grams[i] in seen:
            repeated += len("".join(grams[i]))
            i += n
        else:
            seen.add(grams[i])
            i += 1
    return len(" ".join(top)) * counts[top] if counts and counts[top] > 1 else 0, repeated


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=80), st.integers(2, 10))
def test_repetition_is_what_the_paper_counts(words, n):
    text = " ".join(words) or "."
    top, repeated = plain_repetition(words, n)
    assert Page(text).top_gram_share(n) == pytest.approx(top / len(text))
    assert Page(text).repeated_gram_share(n) == pytest.approx(repeated / len(text))


@pytest.mark.parametrize("unit", ["a ", "ab", ". ", "\n", "a\n", "\n\n", "a_", '"', '."', "語", "…", "[", ' "', "a("])
def test_what_was_made_to_be_slow_takes_linear_time(unit):
    """In quadratic time one of these takes many minutes, and the suite's timeout ends it."""
    text = "x" + unit * (200_000 // len(unit)) + "x"
    module.c4_lines(text)
    page = Page(text)
    for name, rule in rules().items():
        if "gram" not in name:
            rule.test(page)
    Page(text[:40_000]).top_gram_share(10)


# ------------------------------------------------------------------ real pages


def rows(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs real texts in {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("half", [0, 1])
def test_junk_goes_and_clean_pages_stay(half):
    """The limits of `default` were chosen on half 0 of the groups (by crc32 of the name)."""
    junk, good = [], []
    for row in rows("messy/mixed_web.jsonl"):
        text = clean(row["text"])
        if zlib.crc32(row["group"].encode()) % 2 == half:
            if row["kind"].startswith("junk_"):
                junk.append(judge(text, "default").rule)
            elif row["kind"] in ("clean_wiki", "web_c4") and len(Page(text).words) >= 50:
                good.append(judge(text, "default").rule)
    assert len(junk) >= 14 and len(good) >= 150
    assert sum(rule is not None for rule in junk) >= 0.9 * len(junk)
    assert sum(rule is not None for rule in good) <= 0.02 * len(good), {rule for rule in good if rule}


@pytest.mark.parametrize("name", ["tinystories", "wikitext2", "novels", "peps"])
def test_prose_of_every_kind_stays(name):
    texts = [row["text"] for row in rows(f"pretrain/{name}.jsonl")][:600]
    texts = [text for text in texts if len(text.split()) >= 20]  # some rows of the novels are no more than a heading
    assert sum(judge(text, "default").rule is None for text in texts) >= 0.98 * len(texts)


def test_verse_and_dialogue_stay():
    path = SHARED / "pretrain/shakespeare.txt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    text = path.read_text(encoding="utf-8")
    speeches = text.split("\n\n")
    pages = ["\n\n".join(speeches[i : i + 20]) for i in range(0, len(speeches), 80)]
    assert sum(judge(page, "default").rule is None for page in pages) >= 0.98 * len(pages)


def test_every_language_passes_and_programs_have_their_own_preset():
    declarations = [row for row in rows("messy/mixed_web.jsonl") if row["kind"] == "udhr"]
    dropped = {row["lang"] for row in declarations if judge(clean(row["text"]), "default").rule}
    assert len(declarations) > 150 and dropped <= {"sat"}  # of which there are two words
    programs = [row["text"] for row in rows("pretrain/code.jsonl")]
    assert sum(judge(text, "default").rule is not None for text in programs) >= 0.8 * len(programs)
    assert sum(judge(text, "code").rule is None for text in programs) >= 0.95 * len(programs)


# ------------------------------------------------------------------ the script


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["judge_filters.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_prints_both_halves(tmp_path, monkeypatch, capsys):
    pytest.importorskip("py3langid")
    labelled, languages = tmp_path / "labelled.jsonl", tmp_path / "languages.jsonl"
    pages = [("junk_x", "a=b;" * 300), ("web_c4", PROSE), ("web_c4", "Too short to be judged."), ("other", JAPANESE)]
    lines = [{"kind": kind, "text": text, "group": f"g{i}"} for i in range(6) for kind, text in pages]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    languages.write_text(
        json.dumps({"text": PROSE, "iso6393": "eng"}) + "\n" + json.dumps({"text": PROSE, "iso6393": "deu"})
    )
    run_script(monkeypatch, labelled, "--langid", languages)
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= 120
    half_a = sum(zlib.crc32(f"g{i}".encode()) % 2 == 0 for i in range(6))
    assert 0 < half_a < 6
    default = out.partition("\ndefault ")[2]
    row = f"junk_x {0:>26}{half_a:>7}{0:>7}{6 - half_a:>7}   word_count {half_a}+{6 - half_a}"
    assert re.sub(" +", " ", row) in re.sub(" +", " ", default)
    assert f"web_c4 <50 words {half_a * 0} {half_a} 0 {6 - half_a} word_count" in re.sub(" +", " ", default)
    assert "languages: 1 of 2 right, 50.0 %" in out and "deu is called en (1.00)" in out


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a", "kind": "b"}', r"judge_filters\.py: .*:1: group has to be a text, and is 'missing'"),
        ('{"text": 3, "kind": "b", "group": "c"}', "text has to be a text, and is 3"),
        ("", "has no lines"),
        ("{", ":1: not JSON"),
    ],
)
def test_the_scripts_errors_are_one_line(tmp_path, monkeypatch, capsys, line, message):
    path = tmp_path / "labelled.jsonl"
    path.write_text(line)
    for file, wanted in ((path, message), (tmp_path / "nothing.jsonl", "nothing.jsonl: No such file")):
        with pytest.raises(SystemExit) as ended:
            run_script(monkeypatch, file)
        (told,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1 and told.startswith("judge_filters.py: ") and re.search(wanted, told)
