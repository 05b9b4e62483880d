"""
What is there twice: exact duplicates, near duplicates, and evaluation texts in training text.

    ExactIndex().add(fingerprint(text))              False where the same normalised text came before
    NearIndex().add(signature(text))                 None, or (the earlier document, their estimated similarity)
    NgramIndex({"gsm8k/17": question}).overlap(text)   None, or what of which evaluation text is in it

All three look at `normalise(text)`. The texts are hashed in worker processes (`fingerprint`, `signature`, `overlap`
depend on nothing but the text); the two indexes of documents live in one process, which asks them in stream order: the
first of several alike is kept. 64-bit hashes stand for the texts everywhere, and no text is kept.

Near duplicates are found by MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3). The similarity s of two documents is the Jaccard index of their sets of word 5-grams, and each of
HASHES minima is the same in both with probability s. Documents are compared if they share a band, which is ROWS minima
in a row, and that happens with probability 1 - (1 - s^ROWS)^BANDS. Then all the minima are compared: their share of
equal ones estimates s with a standard error of at most sqrt(s (1 - s) / HASHES), and from `threshold` on the later
document is a duplicate. With 42 bands of 6 rows, 256 minima and the threshold 0.7:

    s                         0.3      0.5      0.6      0.7      0.8      0.9
    share a band              0.030    0.484    0.866    0.995    1-3e-6   1-1e-14
    estimate of 0.7 or more   1e-39    5e-11    5e-4     0.50     1-7e-5   1-4e-19

(The library's minima are not quite independent: two of them have a correlation of about -0.002. Measured, bands collide
as the formula says to about 5 %, and estimates spread 0.75 to 1 times as much. scripts/minhash_curve.py measures it.)
"""

import re
import unicodedata
from array import array
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from ..extras import extra

SHINGLE = 5  # words
HASHES, BANDS, ROWS = 256, 42, 6  # the last HASHES - BANDS * ROWS minima are in no band, only in the estimate
SEED = 1  # of the library's permutations
SIGNATURE_BYTES = 4 * BANDS + HASHES

# ------------------------------------------------------------------ the normalised text and its word n-grams

# Unicode's Default_Ignorable_Code_Point: soft hyphen, zero-width characters, directions, variation selectors.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Thai, Lao; Myanmar; Khmer; kana; Han.
NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class Fold(dict):
    """A table for str.translate that fills itself: what a character, by its code, is in a normalised text."""

    def __missing__(self, code):
        char = chr(code)
        category = unicodedata.category(char)
        if INVISIBLE.match(char):
            self[code] = ""
        elif char != "_" and (category[0] in "PSZ" or category in ("Cc", "Cs")):
            self[code] = " "
        else:
            self[code] = f" {char} " if NO_SPACES.match(char) else char.lower()
        return self[code]


FOLD = Fold()


def normalise(text):
    """The words of `text`, joined by single spaces: equal for texts that differ only in case, spacing, punctuation,
    symbols (so 7 + 2 and 7 - 2 are alike), compatibility forms (ﬁ, Ａ, ²) or invisible characters.

    A word is a run of letters, marks, digits and "_", and in scripts that write no spaces between words (Han, kana,
    Thai, Lao, Khmer, Myanmar) it is one character. Where nothing of a text is left, it stays as it is but for its
    spacing: two texts of nothing but symbols are different texts.
    """
    if text.isascii():
        folded = text.translate(FOLD)
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = unicodedata.normalize("NFKC", text.translate(FOLD))  # again: what was invisible stood between
    return " ".join(folded.split()) or " ".join(text.split())


class Words(NamedTuple):
    """Where the words of a normalised text are, and what the hash of any stretch of it follows from."""

    text: str
    starts: np.ndarray  # (words,)
    ends: np.ndarray  # (words,)
    sums: np.ndarray  # (characters + 1,) uint64: sum over i < k of code_i B^i, modulo 2^64
    inverse: np.ndarray  # (characters + 1,) uint64: B^-k


BASE = 0x9E3779B97F4A7C15  # any odd number with no pattern in its bits
INVERSE = pow(BASE, -1, 2**64)


def words_of(text):
    """The Words of a text that `normalise` returned."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    spaces = np.flatnonzero(codes == ord(" "))
    starts = np.concatenate([[0], spaces + 1]) if text else np.zeros(0, int)
    ends = np.concatenate([spaces, [len(text)]]) if text else np.zeros(0, int)
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(codes * powers(BASE, len(text)), out=sums[1:])
    return Words(text, starts, ends, sums, powers(INVERSE, len(text) + 1))


def powers(base, count):
    """base^0 ... base^(count - 1) modulo 2^64: (count,) uint64."""
    table = np.full(count, base, np.uint64)
    table[:1] = 1
    return np.multiply.accumulate(table, out=table)


def ngram_hashes(words, n):
    """The hashes of all stretches of n >= 1 words, in order: (max(words - n + 1, 0),) uint64.

    The hash is one of the characters: sum of code_i B^(i - start), mixed. Every stretch costs two lookups, whatever n.
    """
    starts, ends = words.starts[: max(len(words.starts) - n + 1, 0)], words.ends[n - 1 :]
    return mix((words.sums[ends] - words.sums[starts]) * words.inverse[starts])


def mix(x):
    """A bijection of uint64 in which every bit of x moves every bit of the result: the finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ------------------------------------------------------------------ exact duplicates


def fingerprint(text):
    """64 bits of the normalised text, as an int; the same in every process and on every machine.

    Among N different texts there are two of the same fingerprint with probability N^2 / 2^65: 3e-8 for a million
    documents, 0.03 for a thousand million.
    """
    return int.from_bytes(blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class ExactIndex:
    """A set of fingerprints in 11 to 21 bytes each (a Python set takes 80 to 90): open addressing, at most 3/4 full."""

    def __init__(self):
        self.slots = array("Q", bytes(8 * 1024))  # 0: free
        self.count = 0

    def __len__(self):
        return self.count

    def add(self, fingerprint):
        """True if `fingerprint`, 0 <= it < 2^64, is new. (0 counts as 1, because 0 means a free slot.)"""
        key = fingerprint or 1
        slots, mask = self.slots, len(self.slots) - 1
        at = key & mask
        while slots[at]:
            if slots[at] == key:
                return False
            at = (at + 1) & mask
        slots[at] = key
        self.count += 1
        if 4 * self.count > 3 * len(slots):
            self.slots = doubled(slots)
        return True


def doubled(slots, shift=0):
    """A table of twice as many slots with the same entries: each in the first free slot from entry >> shift on."""
    entries = np.frombuffer(slots, np.uint64)
    table = array("Q", bytes(16 * len(slots)))
    new, mask = np.frombuffer(table, np.uint64), np.int64(2 * len(slots) - 1)
    for i in range(0, len(slots), 1 << 16):  # in parts, to need little memory beside the two tables
        part = entries[i : i + (1 << 16)]
        part = part[part != 0]
        at = (part >> np.uint64(shift)).astype(np.int64) & mask
        while len(part):
            free = new[at] == 0
            new[at[free]] = part[free]
            left = new[at] != part  # the slot was taken, or two wanted it
            at, part = (at[left] + 1) & mask, part[left]
    return table


# ------------------------------------------------------------------ near duplicates


def collision_probability(s, bands=BANDS, rows=ROWS):
    """How likely two documents of Jaccard index s (a number or an array) share a band: 1 - (1 - s^rows)^bands."""
    return 1 - (1 - s**rows) ** bands


def minhash(text):
    """The minima over the word 5-grams of `text`: (HASHES,) uint32. A text of fewer words is one shingle, so that it
    is like nothing but itself.

    Words serve short texts, too: with characters instead, a text just above the border would never be like one below.
    """
    words = words_of(normalise(text))
    hashes = ngram_hashes(words, min(SHINGLE, max(len(words.starts), 1)))
    ends = np.array([0, len(hashes)], np.uint64)
    library = extra("rensa", "data")
    matrix = library.RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, HASHES, SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def signature(text):
    """What NearIndex wants to know of a text: SIGNATURE_BYTES = 424 bytes.

    BANDS native uint32, the hashes of the bands; then the low byte of each of the HASHES minima (b-bit MinHash:
    Li, König 2010, with b = 8).
    """
    minima = minhash(text)
    rows = minima[: BANDS * ROWS].reshape(BANDS, ROWS)
    keys = mix((rows * powers(BASE, ROWS)).sum(1, dtype=np.uint64)) >> np.uint64(32)
    return keys.astype(np.uint32).tobytes() + minima.astype(np.uint8).tobytes()


def similarity(one, others):
    """Estimates of the Jaccard index from the low bytes of minima: one (HASHES,) and others (N, HASHES) -> (N,).

    Different minima have the same low byte once in 256 times, so the share of equal bytes is s + (1 - s) / 256.
    """
    share = (one == others).mean(1)
    return np.maximum((256 * share - 1) / 255, 0)


class NearIndex:
    """Finds, in stream order, the documents that are near duplicates of one before that was kept.

    threshold   the estimated Jaccard index from which on a document is a duplicate. At 0.7, pairs of s >= 0.8 are
                found and pairs of s <= 0.5 are left alone, each but for about one in ten thousand or fewer (above)

    A document that is dropped is not remembered, so a long chain of small changes is not one family: what is measured
    is the distance to a text that was kept.

    Memory of each document that is kept: 256 bytes of minima, 8 of its number, and BANDS slots of 8 bytes in a table
    that is 3/8 to 3/4 full: 0.7 to 1.2 KB. A slot holds 32 bits of a band's hash and the document's number in 32 bits.
    """

    # Documents that are listed under one hash of a band: the next one is found by its other bands. Where thousands of
    # pages share a template but not 0.7 of their text, this bounds the work.
    CROWD = 64

    def __init__(self, threshold=0.7):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold has to be in (0, 1], and is {threshold}")
        self.threshold = threshold
        self.minima = bytearray()  # HASHES of each kept document
        self.numbers = array("Q")  # (kept,): their place in the stream
        self.seen = 0
        self.slots = array("Q", bytes(8 * 1024))  # band hash << 32 | kept document + 1; 0: free
        self.used = 0
        self.crowded = 0  # how often CROWD was reached

    def __len__(self):
        """How many documents were kept."""
        return len(self.numbers)

    def add(self, signature):
        """None, and the document is remembered; or, where it is a duplicate, (number, similarity) of the kept document
        that is most like it (of equals, the first). The n-th call's document has the number n - 1."""
        if len(signature) != SIGNATURE_BYTES:
            raise ValueError(f"a signature has {SIGNATURE_BYTES} bytes, and this one {len(signature)}")
        self.seen += 1
        slots, mask = self.slots, len(self.slots) - 1
        found, places = set(), []
        for key in memoryview(signature)[: 4 * BANDS].cast("I"):
            at, listed = key & mask, 0
            while entry := slots[at]:
                if entry >> 32 == key:
                    found.add((entry & 0xFFFFFFFF) - 1)
                    listed += 1
                at = (at + 1) & mask
            if listed < self.CROWD:
                places.append((at, key))
        minima = signature[4 * BANDS :]
        if found:
            documents = sorted(found)
            known = np.frombuffer(self.minima, np.uint8).reshape(-1, HASHES)[documents]
            s = similarity(np.frombuffer(minima, np.uint8), known)
            best = s.argmax()
            if s[best] >= self.threshold:
                return self.numbers[documents[best]], float(s[best])
        self.minima += minima
        self.numbers.append(self.seen - 1)
        for at, key in places:
            while slots[at]:  # by another of these
                at = (at + 1) & mask
            slots[at] = key << 32 | len(self.numbers)
        self.used += len(places)
        self.crowded += BANDS - len(places)
        if 4 * self.used > 3 * len(slots):
            self.slots = doubled(slots, shift=32)
        return None


# ------------------------------------------------------------------ evaluation texts in training text


class Overlap(NamedTuple):
    """What a text and the evaluation texts have in common."""

    count: int  # of the text's n-grams that occur in an evaluation text
    example: str  # the first of them, normalised
    item: str  # the name of the evaluation text that it is from


class NgramIndex:
    """The word n-grams of evaluation texts, to be looked for in training texts.

    items     {name: text} or pairs (name, text)
    n         words; 13 as in Brown et al. 2020 (GPT-3), appendix C
    shortest  An evaluation text of fewer than n words counts as one n-gram if it has `shortest` words or more. Those
              that have fewer would be found everywhere: they are left out, and `too_short` names them.

    An n-gram in several evaluation texts is under the first one's name. In scripts without spaces the words are
    characters (see `normalise`), so that 13 are much less text: take a larger n. Memory: 20 to 28 bytes per n-gram.
    A wrong match has the probability (n-grams here) (n-grams looked up) / 2^64.
    """

    def __init__(self, items, n=13, shortest=5):
        if not 1 <= shortest <= n:
            raise ValueError(f"shortest has to be in 1..n = {n}, and is {shortest}")
        self.names, self.too_short, lengths, hashes = [], [], set(), []
        for name, text in items.items() if hasattr(items, "items") else items:
            words = words_of(normalise(text))
            length = min(n, len(words.starts))
            if length < shortest:
                self.too_short.append(name)
                continue
            self.names.append(name)
            lengths.add(length)
            hashes.append(ngram_hashes(words, length))
        self.lengths = sorted(lengths)
        owners = np.repeat(np.arange(len(hashes), dtype=np.uint32), [len(h) for h in hashes])
        self.hashes, first = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]), return_index=True)
        self.owners = owners[first]
        # Nearly all lookups end here: maybe[h >> shift] is False where no hash of the index begins with these bits.
        bits = max(8 * len(self.hashes), 2).bit_length()
        self.shift = np.uint64(64 - bits)
        self.maybe = np.zeros(1 << bits, bool)
        self.maybe[self.hashes >> self.shift] = True

    def __len__(self):
        """How many different n-grams there are."""
        return len(self.hashes)

    def overlap(self, text):
        """The Overlap of `text` with the evaluation texts, or None."""
        words = words_of(normalise(text))
        count, first = 0, None
        for n in self.lengths:
            hashes = ngram_hashes(words, n)
            starts = np.flatnonzero(self.maybe[hashes >> self.shift])
            rank = np.searchsorted(self.hashes, hashes[starts])
            hit = self.hashes[np.minimum(rank, len(self) - 1)] == hashes[starts]
            if hit.any():
                count += int(hit.sum())
                start = int(starts[hit][0])
                if first is None or start < first[0]:
                    first = start, n, self.owners[rank[hit][0]]
        if first is None:
            return None
        start, n, owner = first
        return Overlap(count, words.text[words.starts[start] : words.ends[start + n - 1]], self.names[owner])
