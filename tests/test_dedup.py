"""minillm.data.dedup: what is alike is found, what is not is left alone, and the formulas hold on measured pairs."""

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import dedup
from minillm.data.dedup import (
    BANDS,
    HASHES,
    ROWS,
    SIGNATURE_BYTES,
    ExactIndex,
    NearIndex,
    NgramIndex,
    collision_probability,
    fingerprint,
    ngram_hashes,
    normalise,
    signature,
    similarity,
    words_of,
)

ROOT = Path(__file__).parents[1]
MIXED = ROOT.parent / "shared/data/messy/mixed_web.jsonl"
needs_rensa = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="needs rensa: pip install .[data]")

spec = importlib.util.spec_from_file_location("minhash_curve", ROOT / "scripts/minhash_curve.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def random_words(rng, count):
    return [f"w{number}" for number in rng.integers(1 << 60, size=count).tolist()]


def binomial(n, k, p):
    """The probability of k successes or fewer in n."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


# ------------------------------------------------------------------ the normalised text


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("", ""),
        ("Hello,\r\n\t WORLD!  ", "hello world"),
        ("don't DON’T snake_case 3.14 -- a/b", "don t don t snake_case 3 14 a b"),
        ("Straße STRASSE", "strasse strasse"),
        ("ﬁne Ａ１ x²", "fine a1 x2"),
        ("cafe\u0301 caf\u00e9", "café café"),
        ("a+b = $3 | ★c", "a b 3 c"),
        ("co\u00adop\u200berate\ufeff e\u200d\u0301", "cooperate é"),
        ("nbsp\u00a0here\u2028there\u3000end\0x\x85y", "nbsp here there end x y"),
        ("हिन्दी में", "हिन्दी में"),  # marks belong to the word
        ("你好，世界 abc", "你 好 世 界 abc"),
        ("ภาษา", "ภ า ษ า"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("!!!  ???\n", "!!! ???"),
        ("★ ★\u3000♥", "★ ★ ♥"),
        ("\u200b \u00ad", "\u200b \u00ad"),
    ],
)
def test_normalise(text, normalised):
    assert normalise(text) == normalised
    assert normalise(normalised) == normalised


characters = st.characters() | st.sampled_from("aBß\u0301\u0345\u200d\u00ad .,!\n你かﾞがｶก_²ﬁİı\u1e9e\U000e0100\ud800")


@given(st.text(characters))
def test_normalise_has_single_spaces_and_folds_case_and_spacing(text):
    folded = normalise(text)
    assert folded == " ".join(folded.split()) and folded == folded.strip()
    assert normalise(folded) == folded
    assert normalise(f"\n {text}\t") == folded


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("The cat sat.", "the  CAT\nsat", True),
        ("The cat sat.", "„The cat“ — sat!", True),
        ("The cat sat.", "The cat sat\u200b\ufe0f.", True),
        ("你好 世界", "你好世界。", True),
        ("The cat sat.", "The cat sats.", False),
        ("The cat sat.", "Thecat sat.", False),
        ("The cat sat.", "cat The sat.", False),
        ("1 2", "12", False),
        ("café", "cafe", False),
        ("की", "क", False),
        ("!", "?", False),
        ("", "!", False),
    ],
)
def test_fingerprints_of_equal_and_different_texts(one, other, equal):
    assert (fingerprint(one) == fingerprint(other)) == equal


def test_a_fingerprint_is_the_same_everywhere_and_always():
    assert fingerprint("Größe, naïve: 生活!") == 15392433679484333243


# ------------------------------------------------------------------ exact duplicates


@given(st.lists(st.integers(1, 40) | st.integers(1, 2**64 - 1) | st.integers(1, 2**53).map(lambda n: n << 10)))
def test_the_exact_index_is_a_set(fingerprints):
    index, seen = ExactIndex(), set()
    for key in fingerprints:
        assert index.add(key) == (key not in seen)
        seen.add(key)
    assert len(index) == len(seen)


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 4))
def test_the_exact_index_is_a_set_while_it_grows(seed, shift):
    rng = np.random.default_rng(seed)
    keys = (rng.integers(1, 3000, 6000).astype(np.uint64) << np.uint64(shift)).tolist()  # long runs of taken slots
    index, seen = ExactIndex(), set()
    assert [index.add(key) for key in keys] == [not (key in seen or seen.add(key)) for key in keys]
    again = pickle.loads(pickle.dumps(index))
    assert not any(map(again.add, keys)) and again.add(2**63 + 1)


def test_the_exact_index_takes_the_bytes_it_says():
    index = ExactIndex()
    for n, key in enumerate(np.random.default_rng(0).integers(1, 2**63, 20000).tolist()):
        index.add(key)
        assert len(index.slots) * 3 / 8 <= len(index) <= len(index.slots) * 3 / 4 or n < 768
    assert index.add(0) and not index.add(0) and not index.add(1)


# ------------------------------------------------------------------ n-gram hashes


@given(st.lists(st.sampled_from(["a", "b", "ab", "你", "\U0001d7d8x"]), max_size=30), st.integers(1, 7))
def test_equal_ngrams_and_only_they_have_equal_hashes(words, n):
    hashes = ngram_hashes(words_of(" ".join(words)), n).tolist()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(zip(hashes, grams, strict=True))) == len(set(hashes)) == len(set(grams))


def test_hashes_of_many_ngrams_differ_and_fill_their_range():
    rng = np.random.default_rng(0)
    words = rng.permutation(100_000).astype(str).tolist()
    for n in (1, 2, 13):
        hashes = ngram_hashes(words_of(" ".join(words)), n)
        assert len(np.unique(hashes)) == len(hashes)
        counts = np.bincount((hashes >> np.uint64(56)).astype(int), minlength=256)
        assert abs(((counts - len(hashes) / 256) ** 2).sum() / (len(hashes) / 256) - 255) < 6 * math.sqrt(2 * 255)


# ------------------------------------------------------------------ signatures


def shared_stretch(rng, grams, shared):
    """Two texts of `grams` word 5-grams each that have `shared` of them in common: s = shared / (2 grams - shared)."""
    common = random_words(rng, shared + 4)
    return [" ".join([*common, *random_words(rng, grams - shared)]) for _ in range(2)]


def minima_of(signed):
    return np.frombuffer(signed, np.uint8, offset=4 * BANDS)


def similarity_of(one, other):
    return float(similarity(minima_of(one), minima_of(other)[None])[0])


PROBE = """
import hashlib, sys
from minillm.data.dedup import NgramIndex, fingerprint, signature
texts = ["Größe, naïve: 生活!", "a b c d e f g h i j k l m n", ""]
print([fingerprint(t) for t in texts], hashlib.sha256(b"".join(map(signature, texts))).hexdigest())
print(NgramIndex({"one": texts[1], "two": texts[1]}, n=6).overlap("x " + texts[1]))
"""


@needs_rensa
def test_other_processes_and_hash_seeds_see_the_same():
    results = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
        results.append(run.stdout)
    assert results[0] == results[1] and "count=9" in results[0] and "item='one'" in results[0]


@needs_rensa
def test_a_signature_depends_on_the_normalised_text_and_its_set_of_shingles():
    rng = np.random.default_rng(0)
    text = " ".join(random_words(rng, 50))
    assert type(signature(text)) is bytes and len(signature(text)) == SIGNATURE_BYTES
    assert signature(text) == signature(text.upper().replace(" ", ", \n"))
    period = " ".join(["one two three four five six"] * 3)
    assert signature(period) == signature(f"{period} {period}")
    short = ["", "one", "two", "one two", "one two three four", "one two three four five"]
    assert len({signature(t) for t in short}) == len(short)
    for text in short[1:]:  # shorter than a shingle: like nothing else
        assert similarity_of(signature(text), signature(f"{text} more")) < 0.75


@needs_rensa
@pytest.mark.parametrize("grams, shared", [(10, 2), (40, 20), (300, 60), (300, 200), (300, 267), (2000, 1300)])
def test_the_estimate_is_unbiased_and_as_precise_as_a_binomial_share(grams, shared):
    rng = np.random.default_rng(grams + shared)
    s, n = shared / (2 * grams - shared), 150 if grams < 1000 else 40
    errors = [similarity_of(*map(signature, shared_stretch(rng, grams, shared))) - s for _ in range(n)]
    sigma = math.sqrt(s * (1 - s) / HASHES) * 256 / 255 + 1 / HASHES
    assert abs(np.mean(errors)) < 4 * sigma / math.sqrt(n)
    assert np.std(errors) < 1.25 * sigma
    assert np.max(np.abs(errors)) < 5 * sigma


def test_the_estimate_allows_for_low_bytes_that_are_equal_by_chance():
    one, others = np.zeros(HASHES, np.uint8), np.ones((4, HASHES), np.uint8)
    for row, equal in enumerate((0, 1, 86, 256)):  # s + (1 - s) / 256 = 86 / 256 where s = 1 / 3
        others[row, :equal] = 0
    assert similarity(one, others) == pytest.approx([0, 0, 1 / 3, 1], abs=1e-12)


def test_a_band_is_its_minima_in_their_order(monkeypatch):
    small = np.arange(HASHES, dtype=np.uint32)  # as those of a very long text are
    swapped = small.copy()
    swapped[[0, 1]] = small[[1, 0]]
    monkeypatch.setattr(dedup, "minhash", {"small": small, "swapped": swapped}.get)
    keys = [np.frombuffer(signature(text), np.uint32, BANDS) for text in ("small", "swapped")]
    assert (keys[0] != keys[1]).tolist() == [True] + [False] * (BANDS - 1)
    assert len(set(keys[0].tolist())) == BANDS


# ------------------------------------------------------------------ bands


def test_collision_probability():
    assert collision_probability(0.8, 14, 8) == pytest.approx(0.924, abs=5e-4)
    assert collision_probability(0.5, 1, 3) == 0.125 and collision_probability(0.5, 2, 1) == 0.75
    assert collision_probability(np.array([0.0, 1.0])).tolist() == [0, 1]


def test_the_choice_of_bands_and_threshold_is_what_the_docstring_says():
    share = lambda s: s + (1 - s) / 256  # of equal low bytes
    least = math.ceil((0.7 * 255 + 1) / 256 * HASHES)  # equal bytes from which the estimate is 0.7
    assert 1 - collision_probability(0.8) < 3e-6
    assert 1 - collision_probability(0.9) < 2e-14
    assert collision_probability(0.5) == pytest.approx(0.484, abs=5e-4)
    assert binomial(HASHES, least - 1, share(0.8)) == pytest.approx(7.2e-5, rel=0.01)
    assert binomial(HASHES, HASHES - least, 1 - share(0.5)) == pytest.approx(5.0e-11, rel=0.01)
    assert binomial(HASHES, HASHES - least, 1 - share(0.6)) == pytest.approx(4.7e-4, rel=0.01)


@pytest.fixture(scope="module")
def measured():
    pytest.importorskip("rensa")
    return script.measure(pairs=2000, threshold=0.7, seed=11)


def test_bands_collide_as_the_formula_says(measured):
    s, collisions, dropped = measured
    assert s.min() < 0.06 and s.max() == 1
    for curve in range(2):
        worst = total = 0
        for _, count, curves, _ in script.rows_of_table(s, collisions, dropped):
            frequency, predicted, two_sigma = curves[curve]
            worst = max(worst, abs(frequency - predicted) / (two_sigma / 2 + 1 / count))
            total += count * (frequency - predicted)
        assert worst < 3
        p = collision_probability(s, *script.BANDINGS[curve])
        assert abs(total) < 3 * math.sqrt((p * (1 - p)).sum())


def test_two_sigma_are_those_of_a_binomial_count():
    hit = np.arange(100) < 45
    assert script.summarise(np.full(100, 0.5), hit, (1, 1)) == pytest.approx((0.45, 0.5, 0.1))


def test_the_script_knows_the_similarity_of_its_pairs():
    assert script.jaccard("a b c d e f", "b c d e f g") == pytest.approx(1 / 3)
    assert script.jaccard("a b c d e a b c d e", "a b c d e a") == 2 / 5
    rng = np.random.default_rng(0)
    for wanted in (0.05, 0.3, 0.77, 1.0):
        assert script.jaccard(*script.random_pair(rng, wanted)) == pytest.approx(wanted, abs=0.01)


def test_the_index_drops_no_pair_up_to_one_half_and_all_from_four_fifths(measured):
    s, _, dropped = measured
    assert (s <= 0.5).sum() > 900 and not dropped[s <= 0.5].any()
    assert (s >= 0.8).sum() > 400 and dropped[s >= 0.8].all()


@needs_rensa
def test_two_thousand_pairs_from_85_hundredths_are_all_found_in_one_index():
    rng = np.random.default_rng(3)
    index = NearIndex()
    for n in range(2000):
        grams = int(rng.integers(20, 120))
        least = math.ceil(2 * grams * 0.85 / 1.85)
        one, other = shared_stretch(rng, grams, int(rng.integers(least, grams + 1)))
        assert index.add(signature(one)) is None
        assert index.add(signature(other))[0] == 2 * n


# ------------------------------------------------------------------ the index of near duplicates


def drawn(rng, like=None, changed=0):
    """A made-up signature: random, or another with `changed` minima and all bands of theirs drawn anew."""
    keys, minima = rng.integers(0, 2**32, BANDS, dtype=np.uint32), rng.integers(0, 256, HASHES, dtype=np.uint8)
    if like is not None:
        new = np.zeros(HASHES, bool)
        new[rng.permutation(HASHES)[:changed]] = True
        minima = np.where(new, minima, minima_of(like))
        keys = np.where(new[: BANDS * ROWS].reshape(BANDS, ROWS).any(1), keys, np.frombuffer(like, np.uint32, BANDS))
    return keys.tobytes() + minima.tobytes()


class PlainIndex:
    """What NearIndex is to do, by comparing with everything that was kept."""

    def __init__(self, threshold):
        self.threshold, self.kept, self.seen = threshold, [], 0

    def add(self, signed):
        self.seen += 1
        keys = np.frombuffer(signed, np.uint32, BANDS)
        best = None
        for number, other in self.kept:
            if (keys == np.frombuffer(other, np.uint32, BANDS)).any():
                s = similarity_of(signed, other)
                if s >= self.threshold and (best is None or s > best[1]):
                    best = number, s
        if best is None:
            self.kept.append((self.seen - 1, signed))
        return best


@pytest.mark.parametrize("threshold", [0.4, 0.7, 1.0])
def test_the_near_index_is_the_plain_one_in_stream_order(threshold):
    rng = np.random.default_rng(7)
    index, plain, stream, results = NearIndex(threshold), PlainIndex(threshold), [], []
    for n in range(400):
        like = stream[rng.integers(len(stream))] if n and rng.random() < 0.6 else None
        stream.append(drawn(rng, like, changed=int(rng.integers(160)) * (rng.random() < 0.8)))
        if n == 200:
            index = pickle.loads(pickle.dumps(index))
        results.append(index.add(stream[-1]))
        assert results[-1] == plain.add(stream[-1])
    assert [number for number, _ in plain.kept] == index.numbers.tolist()
    assert 0.05 < np.mean([r is not None for r in results]) < 0.7 and index.crowded == 0


def test_the_first_is_kept_and_a_dropped_one_is_not_remembered():
    rng = np.random.default_rng(0)
    first = drawn(rng)
    second = drawn(rng, first, changed=60)
    third = drawn(rng, second, changed=60)  # like the second, not like the first
    index = NearIndex()
    assert index.add(first) is None
    assert index.add(first) == (0, 1.0)
    number, s = index.add(second)
    assert number == 0 and s == pytest.approx(1 - 60 / 256, abs=0.01)
    assert index.add(third) is None
    assert index.add(third) == (3, 1.0) and index.add(second)[0] == 0
    assert len(index) == 2 and index.numbers.tolist() == [0, 3] and index.seen == 6


def test_similarity_is_measured_against_the_most_similar_and_then_the_first():
    rng = np.random.default_rng(1)
    centre = drawn(rng)
    near = [drawn(rng, centre, changed) for changed in (50, 20, 70)]
    index = NearIndex(threshold=0.9)
    assert [index.add(s) for s in near] == [None] * 3
    assert index.add(centre) == (1, similarity_of(centre, near[1]))


def test_a_crowded_band_lists_no_more_and_the_other_bands_still_find():
    rng = np.random.default_rng(2)
    key = np.uint32(12345).tobytes()
    crowd = [key + drawn(rng)[4:] for _ in range(100)]
    index = NearIndex()
    assert [index.add(s) for s in crowd] == [None] * 100
    assert index.crowded == 100 - NearIndex.CROWD
    assert [index.add(drawn(rng, s, changed=20))[0] for s in crowd] == list(range(100))
    assert np.sum(np.frombuffer(index.slots, np.uint64) >> np.uint64(32) == 12345) == NearIndex.CROWD


def test_a_band_hash_of_zero_is_one_like_any_other():
    index, zeros = NearIndex(), bytes(SIGNATURE_BYTES)
    assert index.add(zeros) is None and index.add(zeros) == (0, 1.0)


def test_the_near_index_takes_the_bytes_it_says():
    rng = np.random.default_rng(4)
    index, most = NearIndex(), 0
    for n in range(4000):
        index.add(drawn(rng))
        if n > 500:
            size = 8 * len(index.slots) + sys.getsizeof(index.minima) + sys.getsizeof(index.numbers)
            most = max(most, size / len(index))
    assert 900 < most < 1250


def test_the_near_index_refuses_what_it_can_not_use():
    with pytest.raises(ValueError, match="424 bytes, and this one 5"):
        NearIndex().add(b"short")
    for threshold in (0, -1, 1.01, math.nan):
        with pytest.raises(ValueError, match="threshold has to be in"):
            NearIndex(threshold)


# ------------------------------------------------------------------ real pages


@pytest.fixture(scope="module")
def mixed():
    if not MIXED.exists():
        pytest.skip(f"needs {MIXED}")
    return [json.loads(line) for line in MIXED.read_text(encoding="utf-8").split("\n") if line]


def test_real_exact_duplicates_are_all_found(mixed):
    groups, same = defaultdict(set), defaultdict(list)
    for row in mixed:
        groups[row["group"]].add(fingerprint(row["text"]))
        same[fingerprint(row["text"])].append(row)
    for dup, count in (("exact_dup", 47), ("normalised_dup", 24)):
        copies = [row for row in mixed if row["dup"] == dup]
        assert len(copies) == count and all(len(groups[row["group"]]) == 1 for row in copies)
    index = ExactIndex()
    dropped = [row["id"] for row in mixed if not index.add(fingerprint(row["text"]))]
    assert sorted(dropped) == sorted(row["id"] for rows in same.values() for row in rows[1:])
    # 79 are 47 + 24, and pages that only look different, and licences that are the same in several projects.
    assert len(dropped) == 79 and len(index) == len(mixed) - 79
    unlabelled = [rows for rows in same.values() if len(rows) > 1 and len({row["group"] for row in rows}) > 1]
    assert {row["kind"] for rows in unlabelled for row in rows} == {"page_with_boilerplate"}


@needs_rensa
def test_real_near_duplicates_are_found_and_nothing_else(mixed):
    signatures = [signature(row["text"]) for row in mixed]
    shingles = []
    for row in mixed:
        words = normalise(row["text"]).split()
        shingles.append(set(zip(*(words[i:] for i in range(5)), strict=False)) or {tuple(words)})
    index, drops = NearIndex(), {}
    for n, signed in enumerate(signatures):
        if result := index.add(signed):
            drops[n] = result
    for n, (other, estimate) in drops.items():
        s = len(shingles[n] & shingles[other]) / len(shingles[n] | shingles[other])
        assert s > 0.6 and abs(s - estimate) < 4 * math.sqrt(s * (1 - s) / HASHES) + 1e-9, mixed[n]["id"]

    pairs, families = defaultdict(list), defaultdict(list)
    for n, row in enumerate(mixed):
        if "jaccard5" in row:
            pairs[row["group"]].append(n)
        if "family" in row:
            families[row["family"]].append(n)
    table = sorted((mixed[first]["jaccard5"], drops.get(second)) for first, second in pairs.values())
    for s, result in table:
        print(f"jaccard5 {s:.4f}  {'kept' if result is None else f'dropped at an estimate of {result[1]:.3f}'}")
        assert (result is not None) if s >= 0.8 else (result is None or s > 0.6)
    assert len(table) == 17 and sum(s >= 0.8 for s, _ in table) == 7
    for family, members in families.items():
        print(f"{family}: {len(members)} licences, {sum(n in drops for n in members)} dropped")
        assert [n for n in members if n not in drops] == members[:1]
        assert all(drops[n][0] == members[0] for n in members[1:])


# ------------------------------------------------------------------ contamination


def plain_overlap(items, text, n, shortest):
    """(count, example, item) as NgramIndex has to find them, with strings."""
    grams = {}
    for name, item in items:
        words = normalise(item).split()
        length = min(n, len(words))
        if length >= shortest:
            for i in range(len(words) - length + 1):
                grams.setdefault(tuple(words[i : i + length]), name)
    words = normalise(text).split()
    lengths = sorted({len(gram) for gram in grams})
    hits = [(i, m) for m in lengths for i in range(len(words) - m + 1) if tuple(words[i : i + m]) in grams]
    if not hits:
        return None
    i, m = min(hits)
    return len(hits), " ".join(words[i : i + m]), grams[tuple(words[i : i + m])]


few_words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@given(st.lists(few_words, max_size=4), few_words, st.integers(1, 5), st.integers(1, 5))
def test_overlaps_are_those_of_the_strings(items, text, n, shortest):
    items, shortest = list(enumerate(items)), min(n, shortest)
    assert NgramIndex(items, n, shortest).overlap(text) == plain_overlap(items, text, n, shortest)


@pytest.fixture(scope="module")
def evaluation():
    rng = np.random.default_rng(9)
    return {f"item/{i}": " ".join(random_words(rng, 30)) for i in range(50)}


def test_a_planted_ngram_is_found_at_every_position(evaluation):
    rng = np.random.default_rng(10)
    index = NgramIndex(evaluation)
    text = random_words(rng, 40)
    assert len(index) == 50 * 18 and index.overlap(" ".join(text)) is None
    for at in range(len(text) + 1):
        name = f"item/{at}"
        planted = evaluation[name].split()[at % 18 :][:13]
        found = index.overlap(" ".join([*text[:at], *[word.upper() + "," for word in planted], *text[at:]]))
        assert found == (1, " ".join(planted), name)


def test_one_word_changed_in_every_window_hides_it_and_one_window_left_does_not(evaluation):
    index = NgramIndex(evaluation)
    words = evaluation["item/3"].split()
    assert index.overlap(" ".join(words)).count == 18
    broken = [f"{word}x" if i % 13 == 12 else word for i, word in enumerate(words)]
    assert index.overlap(" ".join(broken)) is None
    one_left = [*broken[:11], "x", *words[12:25], *broken[25:]]
    assert index.overlap(" ".join(one_left)) == (1, " ".join(words[12:25]), "item/3")
    assert index.overlap(" ".join(reversed(words))) is None


def test_short_evaluation_texts_count_as_a_whole_and_very_short_ones_are_named():
    items = [
        ("four", "Is it so? Yes!"),
        ("five", "Who wrote this old song?"),
        ("none", "--"),
        ("again", "who WROTE: this old song"),
    ]
    index = NgramIndex(items)
    assert index.too_short == ["four", "none"] and len(index) == 1
    assert index.overlap("is it so yes is it so yes") is None
    assert index.overlap("And who wrote this old song then?") == (1, "who wrote this old song", "five")
    both = "who wrote this old song, and is it so"
    assert NgramIndex([*items, ("six", "song and is it so yes")]).overlap(f"{both} yes") == (
        2,
        *index.overlap(both)[1:],
    )
    assert NgramIndex(items, shortest=4).overlap("is it so yes")[2] == "four"
    assert NgramIndex([]).overlap("who wrote this old song") is None
    for n, shortest in ((13, 14), (13, 0), (0, 0)):
        with pytest.raises(ValueError, match="shortest has to be in"):
            NgramIndex([], n, shortest)


def test_an_index_travels_to_other_processes(evaluation):
    index = NgramIndex(evaluation)
    blob = pickle.dumps(index)
    assert pickle.loads(blob).overlap(evaluation["item/7"]) == index.overlap(evaluation["item/7"])
    assert len(blob) < 28 * len(index) + 3000


# ------------------------------------------------------------------ the script


@needs_rensa
def test_the_script_prints_a_row_for_each_twentieth(capsys, tmp_path):
    script.run(script.parse(["--pairs", "57", "--seed", "3"]))
    lines = capsys.readouterr().out.splitlines()
    assert "14x8: measured predicted 2 sigma" in lines[0] and "42x6: measured" in lines[0]
    assert len(lines) == 22 and sum(int(line.split()[1]) for line in lines[1:20]) == 57
    assert lines[-1].endswith("with s <= 0.5, 0 are dropped")


def test_the_script_refuses_too_few_pairs(capsys):
    with pytest.raises(SystemExit):
        script.parse(["--pairs", "3"])
    assert "--pairs must be at least 19" in capsys.readouterr().err


@needs_rensa
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_script_draws(tmp_path, capsys):
    script.run(script.parse(["--pairs", "19", "--plot", str(tmp_path / "curve.png")]))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
