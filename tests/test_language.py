"""minillm.data.language: the right language where the model knows it, and a rule that says why a page goes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import language as module
from minillm.data.language import CHARACTERS, LANGUAGES, MACROLANGUAGES, agree, code_of, identify, language_rule

pytest.importorskip("py3langid", reason="needs py3langid")
SHARED = Path(__file__).parents[2] / "shared/data"

SENTENCES = {
    "en": "The old man walked down to the harbour and looked at the boats for a long time.",
    "de": "Der alte Mann ging zum Hafen hinunter und sah sich lange die Boote an.",
    "fr": "Le vieil homme descendit jusqu'au port et regarda longtemps les bateaux.",
    "es": "El viejo bajó hasta el puerto y miró los barcos durante mucho tiempo.",
    "ru": "Старик спустился в гавань и долго смотрел на лодки.",
    "ja": "老人は港まで歩いて行き、長い間船を眺めていた。",
    "zh": "老人走到港口，看了很久的船。",
    "el": "Ο γέρος κατέβηκε στο λιμάνι και κοίταξε τις βάρκες για πολλή ώρα.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_enough(code):
    found = identify(SENTENCES[code])
    assert found[0] == code and 0.65 <= found[1] <= 1
    assert identify(f"\n\n  {SENTENCES[code]}\n") == found == identify(SENTENCES[code])
    assert language_rule(found, (code,)) is None


@pytest.mark.parametrize("text", ["", "  \n", "12 + 30 = 42", "!!! ... ???", "😀😀"])
def test_without_letters_it_is_no_language(text):
    assert identify(text) == ("zxx", 1.0)


@given(st.text(st.characters()))
def test_any_text_gets_an_answer(text):
    code, probability = identify(text)
    assert code in LANGUAGES and 0 <= probability <= 1 and isinstance(probability, float)


def test_only_the_beginning_of_a_long_text_counts():
    english = SENTENCES["en"] * 100
    assert identify(english) == identify(english[:CHARACTERS]) == identify(english[:CHARACTERS] + SENTENCES["ru"] * 900)


def test_the_tables_know_what_the_model_knows():
    assert set(LANGUAGES) == set(module._model().labels)
    names = [name for names in LANGUAGES.values() for name in names]
    assert len(names) == len(set(names)) and all(len(name) == 3 for name in names)
    assert set(code for codes in MACROLANGUAGES.values() for code in codes) <= set(LANGUAGES)


@pytest.mark.parametrize(
    "name, code", [("en", "en"), ("eng", "en"), ("nob", "no"), ("nb", "no"), ("nn", "nn"), ("cmn", "zh"), ("zlm", "ms")]
)
def test_codes_of_either_standard(name, code):
    assert code_of(name) == code


@pytest.mark.parametrize(
    "code, name, right",
    [
        *[("en", "eng", True), ("en", "deu", False), ("zh", "cmn", True), ("sr", "hrv", True), ("no", "nno", True)],
        *[("ms", "ind", True), ("id", "zlm", True), ("fa", "prs", True), ("en", "sco", None), ("de", "hrv", False)],
    ],
)
def test_answers_agree_up_to_macrolanguages(code, name, right):
    assert agree(code, name) is right


def test_the_rule_says_why():
    assert language_rule(("de", 0.99), ("de", "en")) is None
    assert language_rule(("de", 0.99), ("deu",)) is None
    assert language_rule(("de", 0.98), ("en", "fr")) == ("language.other", "de (0.98) is not en or fr")
    assert language_rule(("en", 0.5), ("en",)) == ("language.unsure", "en with 0.50 < 0.65")
    assert language_rule(("en", 0.65), ("en",)) is None
    assert language_rule(("en", 0.5), ("en",), threshold=0.4) is None
    with pytest.raises(ValueError, match="language 'english' is not known; known are ace af "):
        language_rule(("en", 0.99), ("english",))


def test_the_declaration_of_human_rights_in_the_languages_of_the_model():
    path = SHARED / "messy/langid_udhr.jsonl"
    if not path.exists():
        pytest.skip(f"needs the declaration in 150 languages in {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    known = [row for row in rows if agree("en", row["iso6393"]) is not None]
    assert len(known) >= 80
    wrong = [row["name"] for row in known if not agree(identify(row["text"])[0], row["iso6393"])]
    assert len(wrong) <= 0.05 * len(known), wrong
    strict = [row["name"] for row in known if row["iso6393"] not in LANGUAGES[identify(row["text"])[0]]]
    assert len(strict) <= 0.10 * len(known), strict


def test_english_prose_is_english():
    files = [SHARED / f"pretrain/{name}.jsonl" for name in ("tinystories", "wikitext2", "peps")]
    if not files[0].exists():
        pytest.skip(f"needs English texts in {files[0].parent}")
    for path in files:
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n")[:60] if line]
        kept = sum(language_rule(identify(text), ("en",)) is None for text in texts)
        assert kept >= 0.98 * len(texts), path.name
