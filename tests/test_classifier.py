"""minillm.data.classifier: the gradient, what is learned, the same bits everywhere, damaged files, word lists."""

import importlib.util
import json
import os
import pickle
import runpy
import subprocess
import sys
import unicodedata
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minillm.data import classifier as module
from minillm.data.classifier import (
    MAX_PHRASE,
    Classifier,
    Settings,
    WordList,
    auc,
    classifier_rule,
    features,
    word_list_rule,
    words,
)
from tests.gradcheck import gradcheck

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
SMALL = {"buckets": 1 << 12, "ngrams": 1, "epochs": 6}


def sentences(rng, count, vocabulary, length=12):
    return [" ".join(rng.choice(vocabulary, length)) for _ in range(count)]


def two_kinds(seed, positives, negatives):
    """Texts of common words; in a positive one there is a word of a list of ten, in a negative one of another ten."""
    rng = np.random.default_rng(seed)
    common = [f"common{i}" for i in range(40)]
    told = {label: [f"{label}{i}" for i in range(10)] for label in ("good", "bad")}

    def make(label, count):
        return [f"{text} {rng.choice(told[label])}" for text in sentences(rng, count, common)]

    return make("good", positives), make("bad", negatives)


@pytest.fixture(scope="module")
def toy():
    return Classifier.train(*two_kinds(0, 200, 200), **SMALL)


# ------------------------------------------------------------------ words and features


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \t\n\u2028", []),
        ("The CAT's x1", ["the", "cat", "'", "s", "x1"]),
        ("snake_case", ["snake", "_", "case"]),
        ("Straße ΣΊΣΥΦΟΣ", ["strasse", "σίσυφοσ"]),
        ("cafe\u0301 हिन्दी", ["caf\u00e9", "हिन्दी"]),
        ("我爱abc你", ["我", "爱", "abc", "你"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("a\ud800b", ["a", "\ud800", "b"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(st.text(st.sampled_from("aAé\u0301=\u0338ß 我.ﬁ1_\n") | st.characters(), max_size=300), st.integers(0, 40))
def test_the_first_words_do_not_depend_on_what_comes_later(text, limit):
    assert words(text, limit) == words(text)[:limit]


def test_long_words_at_the_limit_are_whole():
    text = " ".join(f"{'x' * n}{n}" for n in reversed(range(400)))
    for limit in (1, 7, 399, 400, 401):
        assert words(text, limit) == words(text)[:limit]


def test_an_ascii_text_has_the_words_it_has_among_others():
    text = "It's 3.5% of a\x1cb_c (x) [y]"
    assert words(text + " é") == [*words(text), "é"]


def test_features_are_distinct_ascending_and_in_range():
    settings = Settings(100, 3, 50)
    ids = features("a b c a b c " * 20, settings)
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all() and ids.min() >= 0 and ids.max() < 100
    assert features("", settings).size == 0
    assert features("a b", Settings(1 << 20, 3, 50)).size == 3  # a, b, "a b"; no trigram
    assert features("a b c", Settings(1 << 20, 2, 2)).tolist() == features("a b", Settings(1 << 20, 2, 2)).tolist()


GOLDEN = ("The cat, 我爱你 é", [15932, 18715, 35825, 82802, 90569, 130838, 135545, 136266])


def test_hashes_are_the_same_on_every_machine():
    text, expected = GOLDEN
    assert features(text, Settings(1 << 18, 2, 1000))[:8].tolist() == expected  # else FORMAT needs a new number


def test_hashes_do_not_depend_on_the_process():
    code = (
        "from minillm.data.classifier import *; print(features('some words, 我 é', Settings(1 << 18, 2, 9)).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{features('some words, 我 é', Settings(1 << 18, 2, 9)).tolist()}\n"}


def test_buckets_are_used_evenly():
    ids = np.concatenate(module._buckets([f"w{i}" for i in range(20_000)], Settings(64, 2, 10**6)))
    counts = np.bincount(ids, minlength=64)
    assert ((counts - ids.size / 64) ** 2).sum() / (ids.size / 64) < 63 + 5 * np.sqrt(2 * 63)  # chi square, 5 sigma


# ------------------------------------------------------------------ training


def test_gradient_of_the_loss():
    rng = np.random.default_rng(1)
    bags = [rng.integers(0, 30, n) for n in (5, 0, 17, 2)]
    ids, values = module._padded(bags, rng.standard_normal(30).astype(np.float32), [5, 1, 20, 4])
    signs, weights = np.array([1.0, -1, -1, 1]), rng.uniform(0.2, 3, 4)

    def f(u, bias, values):
        return module.loss(module.logits(u, bias, ids, values), signs, weights)

    gradcheck(f, rng.standard_normal((30, 1)), rng.standard_normal(1), values, rng=rng)


def test_padding_has_no_gradient():
    ids, values = module._padded([np.array([3]), np.array([1, 2])], np.ones(5, np.float32), [1, 2])
    u, bias = module.Tensor(np.ones((5, 1)), requires_grad=True), module.Tensor(np.zeros(1), requires_grad=True)
    module.loss(module.logits(u, bias, ids, values), np.array([1.0, -1]), np.ones(2)).backward()
    assert (u.grad[:, 0] != 0).tolist() == [False, True, True, True, False]


def test_two_kinds_are_learned(toy):
    positive, negative = two_kinds(9, 100, 100)
    result = toy.evaluate(positive + negative, [True] * 100 + [False] * 100)
    assert result["accuracy"] == result["auc"] == result["precision"] == result["recall"] == 1
    assert (result["true_positives"], result["true_negatives"]) == (100, 100)
    high, low = toy.strongest(positive + negative, 5)
    assert all(name.startswith("good") and weight > 0 for name, weight in high) and len(high) == 5
    assert all(name.startswith("bad") and weight < 0 for name, weight in low) and len(low) == 5


def test_shuffled_labels_teach_nothing():
    positive, negative = two_kinds(0, 150, 150)
    mixed = np.random.default_rng(5).permutation(positive + negative).tolist()
    other = [*two_kinds(9, 200, 0)[0], *two_kinds(9, 0, 200)[1]]
    labels = np.repeat([True, False], 200)
    assert abs(Classifier.train(mixed[:150], mixed[150:], **SMALL).evaluate(other, labels)["auc"] - 0.5) < 0.15
    assert Classifier.train(positive, negative, **SMALL).evaluate(other, labels)["auc"] > 0.99


def test_one_rare_kind_is_learned():
    positive, negative = two_kinds(3, 50, 1000)
    classifier = Classifier.train(positive, negative, **SMALL)
    p = [classifier.probabilities(texts) for texts in two_kinds(4, 60, 60)]
    assert np.mean(p[0] > 0.5) > 0.9 and np.mean(p[1] < 0.5) > 0.9


def test_both_kinds_count_half():
    """Where the words say nothing, the probability is 0.5, whatever the counts."""
    classifier = Classifier.train(["same words"] * 20, ["same words"] * 300, epochs=30, batch=320, lr=0.1, buckets=64)
    assert classifier.probability("same words") == pytest.approx(0.5, abs=0.01)


def test_words_of_scripts_without_spaces_are_learned():
    rng = np.random.default_rng(2)
    characters = [chr(c) for c in range(0x4E00, 0x4E60)]

    def make(word, count):
        return ["".join([*rng.choice(characters, 15), word, *rng.choice(characters, 15)]) for _ in range(count)]

    # both words are made of the same two characters: only their order tells
    classifier = Classifier.train(make("好坏", 100), make("坏好", 100), **SMALL | {"ngrams": 2})
    assert classifier.evaluate(make("好坏", 50) + make("坏好", 50), [1] * 50 + [0] * 50)["auc"] > 0.95


def test_the_same_bits_from_the_same_seed(tmp_path):
    texts = two_kinds(0, 40, 70)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        Classifier.train(*map(iter, texts), seed=seed, buckets=512, epochs=2).save(tmp_path / name)
    a, b, c = (Classifier.load(tmp_path / name) for name in "abc")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert a.bias == b.bias and not np.array_equal(a.weight, c.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # and no temporary file


def test_what_training_tells():
    steps = []
    Classifier.train(*two_kinds(0, 40, 40), buckets=512, epochs=4, batch=30, on_step=lambda *x: steps.append(x))
    assert [s for s, _, _ in steps] == list(range(1, 13))
    assert steps[0][1] == pytest.approx(np.log(2)) and steps[0][2] == 0  # all logits are 0
    assert steps[-1][1] < 0.3 and steps[-1][2] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_texts": []}, "there is no positive text"),
        ({"negative_texts": iter(())}, "there is no negative text"),
        ({"positive_texts": "one string"}, "positive_texts must be an iterable of strings"),
        ({"negative_texts": ["x", None]}, "negative_texts: item 1 is NoneType"),
        ({"positive_texts": ["a"], "negative_texts": ["b"]}, "no n-gram occurs in 2 texts"),
        ({"buckets": 1}, "buckets must be a whole number from 2"),
        ({"buckets": 2.5}, "buckets must be"),
        ({"ngrams": 0}, "ngrams must be"),
        ({"max_words": 0}, "max_words must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch": 0}, "batch must be"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"min_documents": 0}, "min_documents must be"),
    ],
)
def test_bad_training_options(change, message):
    options = {"positive_texts": ["a b", "a c"], "negative_texts": ["d e", "d"]} | change
    with pytest.raises(ValueError, match=message):
        Classifier.train(**options)


# ------------------------------------------------------------------ scores


def test_the_score_is_what_the_formula_says():
    rng = np.random.default_rng(0)
    classifier = Classifier(rng.standard_normal(512).astype(np.float32), 0.25, Settings(512, 2, 100))
    text = "One two, three two one"
    found = words(text)
    ngrams = {*((w,) for w in found), *pairwise(found)}
    buckets = {int(module._buckets(list(n), Settings(512, len(n), 9))[-1][0]) for n in ngrams}
    logit = 0.25 + sum(float(classifier.weight[j]) for j in buckets) / len(buckets)
    assert classifier.probability(text) == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-12)


def test_scores_of_odd_texts(toy):
    base = 1 / (1 + np.exp(-toy.bias))
    for text in ("", " \n", "\u2028"):
        assert toy.probability(text) == pytest.approx(base, rel=1e-12)
    assert toy.probability("never seen words") == pytest.approx(base, rel=1e-12)
    assert 0 <= toy.probability("\ud800 lone \0 \U0010ffff") <= 1
    assert toy.probability("good1 " * 50_000) == toy.probability("good1 good1")  # each n-gram counts once
    assert toy.probabilities([]).shape == (0,)


def test_scores_do_not_depend_on_company(toy):
    texts = [*two_kinds(1, 5, 5)[0], "", "x"]
    assert toy.probabilities(texts).tolist() == [toy.probability(text) for text in texts]
    assert pickle.loads(pickle.dumps(toy)).probabilities(texts).tolist() == toy.probabilities(texts).tolist()


def test_scores_far_out_do_not_overflow():
    for logit, p in ((1e6, 1.0), (-1e6, 0.0)):
        assert Classifier(np.zeros(2, np.float32), logit, Settings(2, 1, 1)).probability("x") == p


scored = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40)


@given(scored)
def test_auc_is_the_share_of_pairs_in_order(rows):
    high, low = ([s for s, y in rows if y is label] for label in (True, False))
    expected = np.mean([(a > b) + (a == b) / 2 for a in high for b in low]) if high and low else None
    got = auc(np.array([s for s, _ in rows], float), np.array([y for _, y in rows], bool))
    assert got == expected or got == pytest.approx(expected)


def test_evaluation_of_one_kind_only(toy):
    result = toy.evaluate(["good1"], [True])
    assert result["auc"] is None and result["calibration_error"] is None and result["recall"] == 1
    assert toy.evaluate(["bad1"], [False], threshold=1.0)["precision"] is None
    json.dumps(result, allow_nan=False)
    for texts, labels in ((["a"], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="a label for each text"):
            toy.evaluate(texts, labels)


def test_what_is_counted_at_a_threshold():
    """A text without words scores 0.5, one of x 0.2, one of y 0.8."""
    weight = np.zeros(1 << 10, np.float32)
    settings = Settings(weight.size, 1, 9)
    weight[features("x", settings)], weight[features("y", settings)] = -np.log(4), np.log(4)
    classifier = Classifier(weight, 0.0, settings)
    texts, labels = ["x", "", "y", "y", "y", "x"], [True, True, True, True, False, False]
    for threshold, counts in ((0.0, (4, 2, 0, 0)), (0.5, (3, 1, 1, 1)), (0.6, (2, 1, 2, 1)), (1.0, (0, 0, 4, 2))):
        result = classifier.evaluate(texts, labels, threshold)
        names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
        assert tuple(result[name] for name in names) == counts
        assert result["accuracy"] == (counts[0] + counts[3]) / 6 and result["recall"] == counts[0] / 4
        assert result["precision"] == (counts[0] / sum(counts[:2]) if sum(counts[:2]) else None)
        assert (result["texts"], result["positives"], result["threshold"]) == (6, 4, threshold)


def test_calibration_error():
    """All texts score 0.5: right for both kinds weighing half, and wrong by 0.25 if all score 0.75."""
    texts, labels = ["x"] * 30, [True] * 10 + [False] * 20
    for bias, error in ((0.0, 0.0), (np.log(3), 0.25)):
        classifier = Classifier(np.zeros(2, np.float32), bias, Settings(2, 1, 1))
        assert classifier.evaluate(texts, labels)["calibration_error"] == pytest.approx(error, abs=1e-9)


def test_classifier_rule(toy):
    good, bad = "good1 good2", "bad1 bad2"
    assert classifier_rule(good, toy, 0.5) is None
    name, detail = classifier_rule(bad, toy, 0.5)
    assert name == "quality.classifier" and detail == f"score {toy.probability(bad):.4f} < 0.5"
    assert classifier_rule(bad, toy, 0.9, keep="low") is None
    name, detail = classifier_rule(good, toy, 0.9, keep="low")
    assert name == "toxicity.classifier" and detail == f"score {toy.probability(good):.4f} > 0.9"
    assert classifier_rule(bad, toy, 0.5, name="my.rule")[0] == "my.rule"
    assert classifier_rule(bad, toy, toy.probability(bad)) is None  # at the threshold a text stays
    assert classifier_rule(bad, toy, toy.probability(bad), keep="low") is None
    for options in ({"threshold": 1.5}, {"threshold": float("nan")}, {"threshold": 0.5, "keep": "best"}):
        with pytest.raises(ValueError, match=r"threshold must be|keep must be"):
            classifier_rule(good, toy, **options)


# ------------------------------------------------------------------ files


def test_a_file_gives_the_same_bits(toy, tmp_path):
    toy.save(tmp_path / "c.safetensors")
    back = Classifier.load(str(tmp_path / "c.safetensors"))
    assert back.weight.tobytes() == toy.weight.tobytes() and back.bias == toy.bias
    assert back.settings == toy.settings and back.training == toy.training and back.training["positives"] == 200


def test_damaged_files(tmp_path):
    path = tmp_path / "c.safetensors"
    Classifier(np.arange(8, dtype=np.float32), 0.5, Settings(8, 1, 10)).save(path)
    whole, before = path.read_bytes(), Classifier.load(path)
    refused = 0
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"c\.safetensors"):
            Classifier.load(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            back = Classifier.load(path)
        except ValueError as error:
            assert "c.safetensors" in str(error) and "\n" not in str(error)
            refused += 1
        else:  # a bit that says nothing
            assert np.array_equal(back.weight, before.weight) and back.settings == before.settings
    assert refused > 0.95 * len(whole)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        Classifier.load(path)


def write(path, record, **arrays):
    """A file with a right checksum, whatever is in it."""
    record = {"format": module.FORMAT, "buckets": 4, "ngrams": 1, "max_words": 9} | record
    arrays = {"weight": np.zeros(4, np.float32), "bias": np.zeros(1, np.float32)} | arrays
    arrays = {name: a for name, a in arrays.items() if a is not None}
    record = {name: value for name, value in record.items() if value is not None}
    record["sha256"] = module._checksum(record, arrays)
    save_file(arrays, path, metadata={"classifier": json.dumps(record)})


@pytest.mark.parametrize(
    ("record", "arrays", "message"),
    [
        ({"format": "something 7"}, {}, "its format is 'something 7'"),
        ({"buckets": None}, {}, "the setting 'buckets' is missing"),
        ({"ngrams": "2"}, {}, "ngrams must be a whole number from 1 to 5, and is '2'"),
        ({"max_words": True}, {}, "max_words must be"),
        ({"buckets": 5}, {}, r"needs weight \(5,\)"),
        ({}, {"weight": np.zeros((4, 1), np.float32)}, r"needs weight \(4,\)"),
        ({}, {"weight": np.zeros(4)}, "weight float64"),
        ({}, {"bias": None}, r"has weight float32 \(4,\)$"),
        ({}, {"more": np.zeros(1)}, "more float64"),
        ({}, {"weight": np.float32([0, 1, np.nan, 0])}, "not finite"),
    ],
)
def test_wrong_files(tmp_path, record, arrays, message):
    path = tmp_path / "c.safetensors"
    write(path, {})
    Classifier.load(path)
    write(path, record, **arrays)
    with pytest.raises(ValueError, match=rf"c\.safetensors.*{message}"):
        Classifier.load(path)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "c.safetensors"
    for metadata in (None, {"classifier": "[1]"}, {"classifier": "{}"}, {"classifier": "}"}):
        save_file({"weight": np.zeros(4, np.float32)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"c\.safetensors is not a classifier"):
            Classifier.load(path)
    for wrong in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(ValueError, match=wrong.name):
            Classifier.load(wrong)


# ------------------------------------------------------------------ word lists (harmless words stand in)

ENTRIES = ["zonk", "blue cheese", "blue cheese sauce", "Straße", "c++", "坏话", "don't"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("nothing here", []),
        ("zonk", [("zonk", 1)]),
        ("ZONK zonk, (Zonk)! zonk's _zonk_ \u201czonk\u201d", [("zonk", 6)]),
        ("zonks azonk zonk1 zonké zonk\u0301", []),
        ("z onk zo-nk", []),
        ("non-zonk", [("zonk", 1)]),
        ("blue cheese", [("blue cheese", 1)]),
        ("Blue \n\t CHEESE", [("blue cheese", 1)]),
        ("blue, cheese", []),
        ("blue. cheese blue-cheese", []),
        ("blue blue cheese cheese", [("blue cheese", 1)]),
        ("blue cheeses blue", []),
        ("blue cheese sauce", [("blue cheese", 1), ("blue cheese sauce", 1)]),
        ("STRASSE und straße", [("Straße", 2)]),
        ("C++ and c", [("c++", 1)]),
        ("我说坏话了", [("坏话", 1)]),
        ("坏 话坏", [("坏话", 1)]),
        ("I don't, DON\u2019T", [("don't", 1)]),
        ("cheese blue zonk blue cheese zonk", [("zonk", 2), ("blue cheese", 1)]),
    ],
)
def test_word_list(text, expected):
    assert WordList(ENTRIES).found(text) == expected


def test_unicode_forms_of_one_word_are_one():
    composed, decomposed = WordList(["café"]), WordList(["cafe\u0301"])
    for text in ("café", "cafe\u0301", "CAFÉ", "CAFE\u0301"):
        assert composed.found(text) == [("café", 1)] and len(decomposed.found(text)) == 1
    assert not composed.found("cafe")


@pytest.mark.parametrize("text", ["z0nk", "Z\u200bonk", "zo\u00adnk", "zönk", "ｚｏｎｋ", "Z0NK!", "ZONK"])
def test_simple_disguises(text):
    assert WordList(["zonk"], fold_obfuscation=True).found(text) == [("zonk", 1)]
    assert bool(WordList(["zonk"]).found(text)) == (text == "ZONK")


def test_disguises_leave_numbers_alone():
    folded = WordList(["ioo", "ss", "glass"], fold_obfuscation=True)
    assert folded.found("100 55 $5") == [] and folded.found("gla$$ gl@ss") == [("glass", 2)]


words_of = st.lists(st.sampled_from(["a", "b", "c", "."]), min_size=1, max_size=4)


@given(st.lists(words_of, min_size=1, max_size=6), st.lists(st.sampled_from(["a", "b", "c", "d", "."]), max_size=25))
def test_every_occurrence_counts(entries, text):
    entries = [e for e in entries if set(e) != {"."}] or [["a"]]
    entries = list(dict.fromkeys(map(tuple, entries)))
    where = {e: [i for i in range(len(text)) if tuple(text[i : i + len(e)]) == e] for e in entries}
    counts, covered, total = WordList([" ".join(e) for e in entries]).scan(" ".join(text))
    assert counts == {" ".join(e): len(at) for e, at in where.items() if at}
    inside = {i + k for e, at in where.items() for i in at for k in range(len(e))}
    assert covered == sum(text[i] != "." for i in inside) and total == len(text) - text.count(".")


def test_a_word_in_several_matches_is_covered_once():
    assert WordList(["a b c", "b", "c"]).scan("a b c d") == ({"a b c": 1, "b": 1, "c": 1}, 3, 4)


def test_word_list_rule():
    listed = WordList(["zonk", "blue cheese"])
    text = "zonk and blue cheese, zonk!"  # 3 matches; 4 of 5 words
    assert word_list_rule(text, listed, max_count=3) is None
    assert word_list_rule(text, listed, max_count=2) == ("toxicity.words", "3 matches > 2 (zonk 2, blue cheese 1)")
    assert word_list_rule(text, listed, max_share=0.8) is None
    assert word_list_rule(text, listed, max_share=0.7)[1] == "share 0.8000 > 0.7 (zonk 2, blue cheese 1)"
    assert word_list_rule(text, listed, max_share=0.9, max_count=0)[1].startswith("3 matches > 0")
    assert word_list_rule("", listed, max_share=0.0, max_count=0) is None
    assert word_list_rule("clean text", listed, max_share=0.0, max_count=0) is None
    with pytest.raises(ValueError, match="max_share, max_count or both"):
        word_list_rule(text, listed)


def test_a_file_of_words(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# a comment\r\nZonk\r\n\r\n  blue   cheese  \n#x\nzonk\nc#\n".encode())
    for source in (path, str(path)):
        listed = WordList(source)
        assert listed.entries == ["Zonk", "blue   cheese", "c#"]
        assert pickle.loads(pickle.dumps(listed)).found("blue cheese zonk") == [("blue   cheese", 1), ("Zonk", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"list\.txt: has no entry"),
        (b"# only\n\n#comments\n", r"list\.txt: has no entry"),
        (b"zonk\n***\n", r"list\.txt:2: '\*\*\*' has no letter or digit"),
        (b"zonk\n\xff\n", r"list\.txt:2: not UTF-8"),
        (b"a " * (MAX_PHRASE + 1), rf"list\.txt:1: {MAX_PHRASE + 1} words"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        WordList(tmp_path / "list.txt")


def test_bad_words():
    for source, message in (([], "the word list: has no entry"), (["ok", ""], "entry 2"), (["x", 3], "item 1 is int")):
        with pytest.raises(ValueError, match=message):
            WordList(source)
    WordList(["a " * MAX_PHRASE])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        WordList("nowhere.txt")


# ------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_classifier", ROOT / "scripts/train_classifier.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def kinds(tmp_path):
    for name, texts in zip(("good", "bad"), two_kinds(0, 80, 80), strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--positive", str(tmp_path / "good.jsonl"), "--negative", str(tmp_path / "bad.jsonl")]


def test_script(script, kinds, tmp_path, capsys):
    out = tmp_path / "run/quality.safetensors"
    script.run(script.parse([*kinds, "--out", str(out), "--buckets", "4096", "--ngrams", "1"]))
    told = capsys.readouterr().out
    assert "highest weights: 'good" in told and "lowest weights: 'bad" in told
    rows = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"step", "loss", "accuracy"} and rows[-1]["eval/auc"] == 1
    texts = [text for kind in two_kinds(0, 80, 80) for text in kind]
    held = [text for text in texts if zlib.crc32(text.encode()) % 5 == 0]
    assert 20 <= len(held) <= 45 and rows[-1]["eval/texts"] == len(held)
    training = Classifier.load(out).training
    assert training["positives"] + training["negatives"] == len(texts) - len(held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x.bin"], "--out must end in .safetensors"),
        (["--out", "x.safetensors", "--threshold", "2"], "--threshold must be in"),
        (["--out", "x.safetensors", "--seed", "-1"], "--seed must not be negative"),
        (["--out", "x.safetensors", "--sead", "1"], "unrecognized arguments: --sead"),
        ([], "required: --out"),
    ],
)
def test_script_refuses(script, kinds, options, message, capsys):
    with pytest.raises(SystemExit):
        script.parse([*kinds, *options])
    assert message in capsys.readouterr().err


def test_script_errors_have_one_line(kinds, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "x.safetensors")]
    for arguments, message in (
        ([*kinds, *out, "--ngrams", "9"], "ngrams must be"),
        ([*kinds[:2], "--negative", "no.jsonl", *out], "no.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_classifier.py", *arguments])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "scripts/train_classifier.py"), run_name="__main__")
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith("train_classifier.py: ") and message in told
    assert not (tmp_path / "x.safetensors").exists()


# ------------------------------------------------------------------ real text


def read_lines(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def nearest_centroid(train, labels, texts):
    """The difference of the cosines to the two kinds' mean bags of words: the baseline."""
    settings = Settings(1 << 14, 1, 1000)

    def bag(text):
        counts = np.bincount(module._buckets(words(text, 1000), settings)[0], minlength=settings.buckets)
        return counts / max(1e-9, np.sqrt((counts * counts).sum()))

    sides = []
    for label in (True, False):
        mean = sum(bag(text) for text, y in zip(train, labels, strict=True) if y == label)
        sides.append(mean / np.sqrt((mean * mean).sum()))
    return np.array([(bag(text) * (sides[0] - sides[1])).sum() for text in texts])


def test_clean_pages_against_junk():
    """Trained on one half of the sources, judged on the other: better than the baseline both ways."""
    kept = {"clean_wiki", "web_c4"}
    rows = [r for r in read_lines("messy/mixed_web.jsonl") if r["kind"] != "udhr"]
    half = np.array([zlib.crc32(r["group"].encode()) % 2 for r in rows])
    texts, labels = [r["text"] for r in rows], np.array([r["kind"] in kept for r in rows])
    for side, least in ((0, 0.97), (1, 0.95)):
        mine, other = np.flatnonzero(half == side), np.flatnonzero(half != side)
        train = [[texts[i] for i in mine if labels[i] == label] for label in (True, False)]
        held = [texts[i] for i in other]
        got = Classifier.train(*train).evaluate(held, labels[other])
        baseline = nearest_centroid([texts[i] for i in mine], labels[mine], held)
        assert got["auc"] > least and got["auc"] > auc(baseline, labels[other]) + 0.03


def test_articles_against_junk():
    wiki = [r["text"] for r in read_lines("pretrain/wikitext2.jsonl")]
    junk = [r["text"] for r in read_lines("messy/mixed_web.jsonl") if r["kind"].startswith("junk")]
    classifier = Classifier.train(wiki[::2], junk[::2])
    assert classifier.evaluate(wiki[1::2] + junk[1::2], [1] * (len(wiki) // 2) + [0] * (len(junk) // 2))["auc"] > 0.99


def test_inserted_words_are_found():
    """Stand-in for toxicity: one to three of 56 invented words in every second story."""
    stories = [r["text"] for r in read_lines("pretrain/tinystories.jsonl")[:1500]]
    rng, listed = np.random.default_rng(0), [f"zark{a}{b}" for a in "bdfgklmnprstvz" for b in ("o", "ish", "er", "y")]
    kinds = [], []
    for i, story in enumerate(stories):
        found = story.split(" ")
        for _ in range(rng.integers(1, 4) if i % 2 else 0):
            found.insert(int(rng.integers(len(found) + 1)), listed[rng.integers(len(listed))])
        kinds[i % 2].append(" ".join(found))
    clean, marked = kinds
    classifier = Classifier.train(marked[:500], clean[:500], ngrams=1)
    assert classifier.evaluate(marked[500:] + clean[500:], [1] * 250 + [0] * 250)["auc"] > 0.97
    by_list = WordList(listed)
    assert all(by_list.found(text) for text in marked) and not any(by_list.found(text) for text in clean)


def test_other_languages_have_words():
    for row in read_lines("messy/langid_udhr.jsonl"):
        text = unicodedata.normalize("NFC", row["text"].casefold())
        assert "".join(words(row["text"])) == "".join(text.split()), row["name"]
