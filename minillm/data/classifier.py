"""
Text classifiers that score documents for filters, and word lists.

    quality = Classifier.train(clean_texts, junk_texts)          # or positive = toxic texts, the very same way
    quality.evaluate(other_texts, labels)["auc"]
    quality.save("quality.safetensors")
    classifier_rule(text, quality, threshold=0.5)                # None, or ("quality.classifier", "score 0.1203 < 0.5")
    word_list_rule(text, WordList("words.txt"), max_count=2)     # None, or ("toxicity.words", "3 matches > 2 (...)")

The classifier is logistic regression over hashed n-grams of words (Joulin et al. 2017 without the hidden layer). With F
the distinct buckets that the n-grams of a text fall into, each of them once, however often it occurs,

    logit = bias + (1 / |F|) sum_{j in F} w_j          probability = sigmoid(logit)

It is trained by our own engine and AdamW as w_j = r_j u_j, u from zero, where r_j = ln (p_j + 1) / (P + 2) - ln (q_j +
1) / (Q + 2) for p_j of the P positive and q_j of the Q negative texts with feature j (the log-count ratio of Wang and
Manning 2012, section 2): r lets a few telling words outweigh the many that happen to occur in one text only.

Measured on texts held out: the mean over distinct n-grams is better than over all of them (AUC on web pages 0.967
against 0.927) and than the sum over the square root (0.932). With r, one to three invented words in a story are found
at AUC 0.98, without at 0.81. Bigrams tell shuffled words from text (1.00; unigrams: chance) and are what scripts
without spaces need; where words alone tell and examples are few, ngrams=1 is better (0.98 against 0.89).

Scripts without spaces (Thai, Lao, Burmese, Khmer, Chinese, Japanese) have one word per character, so their word
bigrams are character bigrams.
"""

import json
import math
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from ..autograd import Tensor, log_sigmoid
from ..files import DTYPES, open_safetensors, parse_json
from ..functional import embedding
from ..optim import AdamW, linear_schedule
from .dedup import INVISIBLE, NO_SPACES

FORMAT = "minillm classifier 1"  # the number stands for `words` and `_buckets` too: weights fit only their own features

# ------------------------------------------------------------------ words

_UNSPACED = NO_SPACES.pattern.strip("[]+")
_ASCII_WORD = re.compile(r"[^\W_]+|\S")


@cache
def _unicode_word():
    """As _ASCII_WORD, with the combining marks of a word inside it (re's \\w has none) and unspaced scripts cut up."""
    marks, codes = [], range(0x300, 0x1F000)
    for code in (c for c in codes if unicodedata.category(chr(c))[0] == "M"):
        if marks and marks[-1][1] == code - 1:
            marks[-1][1] = code
        else:
            marks.append([code, code])
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in marks)
    return re.compile(rf"[^\W_{_UNSPACED}](?:[^\W_{_UNSPACED}]|[{marks}])*|\S")


def words(text, limit=None):
    """The first `limit` words of a text (all of them if None), case-folded and in NFC: runs of letters and digits with
    their marks, every other character but white space alone, and so the characters of scripts without spaces."""
    size = len(text) if limit is None else 8 * limit + 64
    while True:
        piece = text[:size].casefold()
        if piece.isascii():
            found = _ASCII_WORD.findall(piece)
        else:
            found = _unicode_word().findall(unicodedata.normalize("NFC", piece))
        if size >= len(text) or len(found) > limit:  # the last word of a piece may be cut, and is not taken
            return found[:limit]
        size *= 2


# ------------------------------------------------------------------ hashed n-grams

_ROLL = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_S27, _S30, _S31 = (np.uint64(n) for n in (27, 30, 31))


class Settings(NamedTuple):
    """What turns a text into features."""

    buckets: int  # weights, of 4 bytes each; n-grams that share one can not be told apart
    ngrams: int  # runs of 1, ..., ngrams words
    max_words: int  # what comes after these first words of a text is not looked at

    def check(self):
        """self. ValueError names a field that is out of range."""
        for name, value, low, high in zip(self._fields, self, (2, 1, 1), (1 << 28, 5, 1 << 24), strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high:,}, and is {value!r}")
        return self


def _buckets(found, settings):
    """The bucket of every n-gram of a list of words: arrays int64, one for each n, in the order of the text.

    A word's hash is its CRC-32, an n-gram's a polynomial in its words', its bits mixed with SplitMix64's multipliers
    (Steele et al. 2014; not its exact steps): a function of the text alone, in any process and on any machine.
    """
    h = np.array([zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in found], np.uint64)
    g, out = h, []
    for n in range(settings.ngrams):
        if n:
            g = g[:-1] * _ROLL + h[n:]
        z = (g + _ROLL) ^ (g >> _S30)
        z = z * _MIX[0]
        z = (z ^ (z >> _S27)) * _MIX[1]
        out.append(((z ^ (z >> _S31)) % np.uint64(settings.buckets)).astype(np.int64))
    return out


def features(text, settings):
    """The distinct buckets of a text's n-grams, ascending, (n,) int64; none for an empty text."""
    return np.unique(np.concatenate(_buckets(words(text, settings.max_words), settings)))


# ------------------------------------------------------------------ the model


def logits(u, bias, ids, values):
    """bias + sum_j values_ij u[ids_ij], a Tensor (B,): u (V, 1), bias (1,), ids (B, L) int, values (B, L), 0 for
    padding."""
    return (embedding(ids, u).reshape(ids.shape) * values).sum(axis=1) + bias


def loss(z, signs, weights):
    """L = -sum_i weights_i ln sigmoid(signs_i z_i): z (B,) logits, signs (B,) of +1 and -1. A scalar Tensor."""
    return -(log_sigmoid(z * signs) * weights).sum()


def _padded(bags, ratios, sizes):
    """ids and values (B, L) of a batch: r_j / |F_i| for what is there, 0 for padding."""
    ids = np.zeros((len(bags), max(1, *map(len, bags))), np.int64)
    values = np.zeros(ids.shape, np.float32)
    for i, (bag, size) in enumerate(zip(bags, sizes, strict=True)):
        ids[i, : len(bag)] = bag
        values[i, : len(bag)] = ratios[bag] / size
    return ids, values


class Classifier:
    """The probability that a text is of the positive kind. Made by `train` or `load`; pickles, and never changes.

    weight    (buckets,) float32         bias      float
    settings  how texts become features
    training  {name: value} of how it was trained, for the record
    """

    def __init__(self, weight, bias, settings, training=None):
        self.weight, self.bias, self.settings, self.training = weight, float(bias), settings, training or {}

    @classmethod
    def train(
        cls,
        positive_texts,
        negative_texts,
        *,
        buckets=1 << 18,
        ngrams=2,
        max_words=1000,
        epochs=10,
        batch=32,
        lr=2.0,
        weight_decay=0.0,
        min_documents=2,
        seed=0,
        on_step=None,
    ):
        """Learns from two iterables of strings, each read once. The same texts and seed give the same bits.

        Both kinds count half, however many texts each has, so a probability of 0.5 means: as likely as before looking,
        if both kinds were equally frequent. Where a kind has few texts, new ones of it score too low: choose the
        threshold of a rule by `evaluate` on others.

        batch          texts per step; the learning rate falls from lr to 0 on a straight line
        weight_decay   AdamW's, on the weights, not on the bias
        min_documents  n-grams in fewer texts get no weight
        seed           decides the order of the texts
        on_step        called as on_step(step, loss, accuracy) after each step, step from 1, both of the step's batch

        Memory: 4 bytes per distinct n-gram of a text, at most 4 ngrams max_words a text.
        ValueError: an option out of range, no text of a kind, something that is no string, no n-gram in min_documents.
        """
        settings = Settings(buckets, ngrams, max_words).check()
        for name, value, low in (("epochs", epochs, 1), ("batch", batch, 1), ("min_documents", min_documents, 1)):
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, and is {value!r}")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be positive, and is {lr!r}")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must not be negative, and is {weight_decay!r}")
        bags, counts, found = [], [], []
        for name, texts in (("positive", positive_texts), ("negative", negative_texts)):
            before, count = len(bags), np.zeros(buckets, np.int64)
            for text in _strings(texts, f"{name}_texts"):
                bags.append(features(text, settings).astype(np.int32))
                count[bags[-1]] += 1
            counts.append(len(bags) - before)
            found.append(count)
            if not counts[-1]:
                raise ValueError(f"there is no {name} text to learn from")
        kept = np.flatnonzero(found[0] + found[1] >= min_documents)
        if not kept.size:
            raise ValueError(f"no n-gram occurs in {min_documents} texts (min_documents): nothing can be learned")
        ratios = [np.log((f[kept] + 1) / (n + 2)) for f, n in zip(found, counts, strict=True)]
        ratios = (ratios[0] - ratios[1]).astype(np.float32)
        # only what is kept is trained, as rows 0, 1, ...
        row = np.full(buckets, -1, np.int32)
        row[kept] = np.arange(kept.size, dtype=np.int32)
        sizes = [max(1, len(bag)) for bag in bags]
        bags = [rows[rows >= 0] for rows in (row[bag] for bag in bags)]
        signs = np.repeat(np.float32([1, -1]), counts)
        halves = np.repeat(np.float32([len(bags) / 2 / n for n in counts]), counts)  # of mean 1

        u = Tensor(np.zeros((kept.size, 1), np.float32), requires_grad=True)
        bias = Tensor(np.zeros(1, np.float32), requires_grad=True)
        optimizer = AdamW({"u": u, "bias": bias}, lr=lr, weight_decay=weight_decay)
        rng, step, steps = np.random.default_rng(seed), 0, epochs * -(-len(bags) // batch)
        for _ in range(epochs):
            order = rng.permutation(len(bags))
            for first in range(0, len(order), batch):
                chosen = order[first : first + batch]
                z = logits(u, bias, *_padded([bags[i] for i in chosen], ratios, [sizes[i] for i in chosen]))
                value = loss(z, signs[chosen], halves[chosen] / np.float32(len(chosen)))
                optimizer.zero_grad()
                value.backward()
                optimizer.step(lr=linear_schedule(step, steps, lr))
                step += 1
                if on_step is not None:
                    on_step(step, value.item(), float(np.mean(z.data * signs[chosen] > 0)))
        weight = np.zeros(buckets, np.float32)
        weight[kept] = ratios * u.data[:, 0]
        training = {"positives": counts[0], "negatives": counts[1], "epochs": epochs, "batch": batch, "lr": lr}
        training |= {"weight_decay": weight_decay, "min_documents": min_documents, "seed": seed}
        return cls(weight, bias.data[0], settings, training)

    # ------------------------------------------------------------------ scores

    def probability(self, text):
        """The probability that `text` is positive, a float. A text without words has that of the bias alone."""
        ids = features(text, self.settings)
        logit = self.bias + self.weight[ids].sum(dtype=np.float64) / max(1, ids.size)
        e = math.exp(-abs(logit))
        return float((1 if logit >= 0 else e) / (1 + e))

    def probabilities(self, texts):
        """`probability` of each of an iterable of strings, (n,) float64."""
        return np.array([self.probability(text) for text in _strings(texts, "texts")], np.float64)

    def evaluate(self, texts, labels, threshold=0.5):
        """How well `texts` are told apart: a dict of numbers that JSON can write. labels: true where positive.

        accuracy, precision, recall   where a probability of at least `threshold` counts as positive
        true_positives, false_positives, false_negatives, true_negatives
        auc                           the probability that a positive text scores higher than a negative one, ties half
        calibration_error             mean over the texts of |share of positives - mean probability| in their tenth of
                                      [0, 1] (Guo et al. 2017, eq. 3), both kinds weighing half as in training
        What is undefined (no positive text, say) is None. ValueError: no text, texts and labels of two lengths.
        """
        p, y = self.probabilities(texts), np.asarray(labels, bool)
        if p.shape != y.shape or not p.size:
            raise ValueError(f"evaluate needs a label for each text, and got {p.size} texts and {y.size} labels")
        said, n, positives = p >= threshold, y.size, int(y.sum())
        tp, fp, fn = (int(x.sum()) for x in (said & y, said & ~y, ~said & y))
        result = {"texts": n, "positives": positives, "threshold": threshold, "accuracy": float(np.mean(said == y))}
        result |= {"auc": auc(p, y), "precision": tp / (tp + fp) if tp + fp else None}
        result |= {"recall": tp / positives if positives else None, "true_positives": tp, "false_positives": fp}
        result |= {"false_negatives": fn, "true_negatives": n - tp - fp - fn, "calibration_error": None}
        if 0 < positives < n:
            weight = np.where(y, 0.5 / positives, 0.5 / (n - positives))
            gap = np.bincount(np.minimum(10 * p, 9).astype(int), weight * (y - p), 10)
            result["calibration_error"] = float(np.abs(gap).sum())
        return result

    def strongest(self, texts, count=10):
        """([(n-gram, weight), ...] of the `count` highest weights, the same of the lowest), each weight with the n-gram
        of `texts` that is most frequent in its bucket; a bucket that none of them falls into is left out."""
        order = np.argsort(self.weight, kind="stable")
        low, high = order[:count][self.weight[order[:count]] < 0], order[::-1][:count]
        high = high[self.weight[high] > 0]
        wanted, names = np.zeros(self.weight.size, bool), defaultdict(Counter)
        wanted[low] = wanted[high] = True
        for text in _strings(texts, "texts"):
            found = words(text, self.settings.max_words)
            for n, ids in enumerate(_buckets(found, self.settings), 1):
                for i in np.flatnonzero(wanted[ids]):
                    names[int(ids[i])][" ".join(found[i : i + n])] += 1
        return tuple(
            [(names[j].most_common(1)[0][0], float(self.weight[j])) for j in side.tolist() if j in names]
            for side in (high, low)
        )

    # ------------------------------------------------------------------ files

    def save(self, path):
        """Writes one safetensors file: weight, bias, and in its metadata the settings and a checksum."""
        arrays = {"weight": np.ascontiguousarray(self.weight), "bias": np.array([self.bias], np.float32)}
        record = {"format": FORMAT, **self.settings._asdict(), "training": self.training}
        record["sha256"] = _checksum(record, arrays)
        # one key, because the library writes several in no fixed order
        data = save(arrays, metadata={"classifier": json.dumps(record, sort_keys=True)})
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_bytes(data)
        os.replace(part, path)

    @classmethod
    def load(cls, path):
        """What `save` wrote. ValueError names the file and what is wrong with it."""
        stored, metadata = open_safetensors(path)
        try:
            record = parse_json(metadata["classifier"])
            told = record.pop("sha256")
        except (KeyError, ValueError, AttributeError, TypeError):
            raise ValueError(f"{path} is not a classifier: its metadata has no classifier's settings") from None
        if record.get("format") != FORMAT:
            raise ValueError(f"{path}: its format is {record.get('format')!r}, and this version reads {FORMAT!r}")
        arrays = {name: np.array(tensor.map()) for name, tensor in stored.items() if tensor.dtype in DTYPES}
        if told != _checksum(record, arrays):
            raise ValueError(f"{path} is damaged: its contents do not have the checksum that is written in it")
        try:
            settings = Settings(*(record[name] for name in Settings._fields)).check()
        except KeyError as error:
            raise ValueError(f"{path}: the setting {error} is missing") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
        if shapes != {"weight": ((settings.buckets,), np.float32), "bias": ((1,), np.float32)}:
            found = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in sorted(arrays.items())) or "nothing"
            raise ValueError(f"{path}: needs weight ({settings.buckets},) and bias (1,) of float32, and has {found}")
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise ValueError(f"{path}: has weights that are not finite")
        return cls(arrays["weight"], arrays["bias"][0], settings, record.get("training"))


def _checksum(record, arrays):
    digest = sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _strings(texts, name):
    """The items of `texts`. ValueError for one string instead of several, and for an item that is no string."""
    if isinstance(texts, str):
        raise ValueError(f"{name} must be an iterable of strings, not one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}: item {i} is {type(text).__name__}, not a string")
        yield text


def auc(scores, labels):
    """The area under the ROC curve as the Mann-Whitney statistic, ties half; None where a kind is missing.

    scores (n,), labels (n,) bool."""
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return None
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]  # from 1, the mean over equal scores
    return float((rank[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def classifier_rule(text, classifier, threshold, keep="high", name=None):
    """None for a text to keep, or (rule name, detail).

    keep   "high" drops probabilities below the threshold (name "quality.classifier"), "low" those above it
           ("toxicity.classifier")
    """
    if keep not in ("high", "low"):
        raise ValueError(f"keep must be 'high' or 'low', not {keep!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], and is {threshold!r}")
    score = classifier.probability(text)
    if keep == "high":
        return (name or "quality.classifier", f"score {score:.4f} < {threshold:g}") if score < threshold else None
    return (name or "toxicity.classifier", f"score {score:.4f} > {threshold:g}") if score > threshold else None


# ------------------------------------------------------------------ word lists

MAX_PHRASE = 10  # words, so that a scan takes time in proportion to the text
_LOOKALIKES = str.maketrans("0134578@$", "oieastbas")
_DISGUISED = re.compile(r"(?<=[^\W\d_])[0134578@$]+|[0134578@$]+(?=[^\W\d_])")
_ACCENTS = re.compile("[\u0300-\u036f]")


def unmask(text):
    """`text` without the simple disguises: invisible characters, letter forms such as full width (NFKD), accents, and
    0 1 3 4 5 7 8 @ $ beside a letter for o i e a s t b a s. Harmless words can become listed ones by it."""
    text = unicodedata.normalize("NFKD", INVISIBLE.sub("", text))
    return _DISGUISED.sub(lambda run: run[0].translate(_LOOKALIKES), _ACCENTS.sub("", text))


class WordList:
    """Words and phrases to look for. Pickles, and never changes.

    source            a path of a UTF-8 file with one word or phrase a line, # before a comment line; or an iterable of
                      words and phrases (a string is always a path)
    fold_obfuscation  compare texts and entries after `unmask`

    A match has the same `words` in the same order: whole words, whatever their case and the white space between
    them. Punctuation is a word here, so "a-b" is not "a b"; a character of a script without spaces is one too, so
    entries in these match inside longer runs. An entry that only differs in case is there once, as it came first.

    ValueError: no entry at all; FILE:LINE of one that has no letter or digit, has more than MAX_PHRASE words, or is not
    UTF-8.
    """

    def __init__(self, source, fold_obfuscation=False):
        self.fold_obfuscation, self.entries, self._first = fold_obfuscation, [], {}
        for where, entry in _entries(source):
            found = self._words(entry)
            if not any(map(str.isalnum, entry)):
                raise ValueError(f"{where}: {entry!r} has no letter or digit, and would match punctuation")
            if len(found) > MAX_PHRASE:
                raise ValueError(f"{where}: {len(found)} words, and a phrase may have {MAX_PHRASE}")
            # a tree: {word: (number of the entry that ends here or None, {next word: ...})}
            level = self._first
            for word in found[:-1]:
                level = level.setdefault(word, [None, {}])[1]
            end = level.setdefault(found[-1], [None, {}])
            if end[0] is None:
                end[0] = len(self.entries)
                self.entries.append(entry)
        if not self.entries:
            raise ValueError(f"{source if isinstance(source, str | Path) else 'the word list'}: has no entry")

    def _words(self, text):
        return words(unmask(text) if self.fold_obfuscation else text)

    def scan(self, text):
        """({entry: how often it occurs}, words that belong to a match, words of the text without punctuation).

        Every occurrence of every entry counts, also inside another's, so that more entries never make fewer matches.
        """
        found, counts, covered, end = self._words(text), Counter(), 0, 0
        total = sum(word[0].isalnum() for word in found)
        if self._first.keys().isdisjoint(found):
            return {}, 0, total
        for i, word in enumerate(found):
            if word not in self._first:
                continue
            level, at, reach = self._first, i, i
            while (node := level.get(word)) is not None:
                at += 1
                if node[0] is not None:
                    counts[self.entries[node[0]]] += 1
                    reach = at
                if at == len(found):
                    break
                level, word = node[1], found[at]
            covered += sum(w[0].isalnum() for w in found[max(i, end) : reach])
            end = max(end, reach)
        return dict(counts), covered, total

    def found(self, text):
        """[(entry, how often it occurs), ...] in the order of their first occurrence."""
        return list(self.scan(text)[0].items())


def _entries(source):
    """(where, entry) of a file's lines or an iterable's items."""
    if not isinstance(source, str | Path):
        for i, entry in enumerate(_strings(source, "the word list")):
            yield f"entry {i + 1} of the word list", entry.strip()
        return
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}:{number}: not UTF-8: {error.reason} at byte {error.start}") from None
            if entry and not entry.startswith("#"):
                yield f"{source}:{number}", entry


def word_list_rule(text, words, max_share=None, max_count=None, name="toxicity.words"):
    """None for a text to keep, or (name, detail), which says the three most frequent entries.

    words      a WordList
    max_share  the largest share of the text's words (punctuation left out) that may belong to matches
    max_count  the largest number of matches
    """
    if max_share is None and max_count is None:
        raise ValueError("word_list_rule needs max_share, max_count or both")
    counts, covered, total = words.scan(text)
    matches, share = sum(counts.values()), covered / max(1, total)
    most = ", ".join(f"{entry} {n}" for entry, n in islice(Counter(counts).most_common(), 3))
    if max_count is not None and matches > max_count:
        return name, f"{matches} matches > {max_count} ({most})"
    if max_share is not None and share > max_share:
        return name, f"share {share:.4f} > {max_share:g} ({most})"
    return None
