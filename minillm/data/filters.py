"""
Rules that tell prose from what is not, by counting: lengths, symbols, repetition.

    judge(text, "default")       Verdict(text, rule, detail): rule is None for a text that stays
    broken(text, "c4")           every rule of the preset that the text breaks, for reports

A rule is a function of a Page and its limits, which are keyword arguments with the published numbers as defaults. It
returns None, or a detail that names the number and the limit: "mean word length 12.310 > 10". Other limits:

    PRESETS["mine"] = Preset((Rule("mine.word_count", partial(word_count, at_least=10)),))

Four presets are published sets, with the constants of the datatrove library (which FineWeb was made with):

    gopher_quality, gopher_repetition   Rae et al. 2021 (arXiv 2112.11446), section A1.1 and table A1
    c4                                  Raffel et al. 2020 (JMLR 21, 140), section 2.2; it also edits the page: lines go
    fineweb                             Penedo et al. 2024 (arXiv 2406.17557), section 3.6

    default                             ours, for prose in any language: at least 10 words, most of them words, no text
                                        by machines for machines, not one thing said over and over. No word lists.
    code                                for programs, which `default` drops: Chen et al. 2021 (arXiv 2107.03374), 3.1

Where these differ from datatrove: a word is what stands between spaces, without the punctuation around it, where
datatrove has a tokenizer for each language; and an n-gram counts as the most frequent one only if it occurs twice.

Scripts without spaces (Han, kana, Yi, Thai, Lao, Khmer, Myanmar, Tibetan): two characters of Han, kana and Yi, or four
of the others, count as one word, which is near their real mean; it is no segmentation. The mean length of words is not
judged on a page that is mostly written so. The stop words and full stops of the published sets are about English:
other languages break gopher_quality.stop_words and lose their lines in c4.

All lines are split at \\n and nowhere else.
"""

import re
import string
from collections import Counter
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

_PUNCTUATION = string.punctuation + "“”„‘’‚«»‹›…–—•·¡¿、。，．！？：；「」『』（）।॥؟،؛۔"
_TWO = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ua000-\ua4cf\U00020000-\U0003ffff"
)
_FOUR = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f"
_UNSPACED = re.compile(f"[{_TWO}{_FOUR}]")
_UNSPACED_WORD = re.compile(f"[{_TWO}]{{1,2}}|[{_FOUR}]{{1,4}}")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*+(?=\s)|[。！？।۔።][\"'”’»)」』]*+(?=.)")


class Page:
    """A text and what the rules count in it, each counted once, when first asked for."""

    def __init__(self, text):
        self.text = text

    @cached_property
    def lines(self):
        """The lines that have more than spaces in them."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self):
        """What stands between blank lines."""
        return [part for part in re.split("\n\n+", self.text.strip()) if part]

    @cached_property
    def words(self):
        """What stands between spaces, without punctuation around it; for scripts without spaces see the top."""
        text = _UNSPACED_WORD.sub(r" \g<0> ", self.text) if self.unspaced else self.text
        return [word for word in [piece.strip(_PUNCTUATION) for piece in text.split()] if word]

    @cached_property
    def letters(self):
        """How many characters are in words."""
        return sum(map(len, self.words))

    @cached_property
    def visible(self):
        """How many characters are not spaces."""
        return sum(map(len, self.text.split()))

    @cached_property
    def unspaced(self):
        """The share of the visible characters that are of scripts without spaces between words."""
        return 0.0 if self.text.isascii() else _share(len(_UNSPACED.findall(self.text)), self.visible)

    @cached_property
    def sentences(self):
        """How many sentences there are: ends of sentence inside the lines, and one for each line."""
        return sum(len(_SENTENCE_END.findall(line.strip())) + 1 for line in self.lines)

    @cached_property
    def _repetition(self):
        """{n: (characters of the most frequent n-gram, characters of repeated n-grams)} for n from 2 to 10.

        An n-gram is the number of its first n - 1 words and its last word, and only looked for where its first n - 1
        words stand more than once: elsewhere it can not repeat.
        """
        words = self.words
        ends = [0, *accumulate(map(len, words))]
        places, grams, result = range(len(words)), words, dict.fromkeys(range(2, 11), (0, 0))
        for n in range(2, 11):
            # the last place falls out where its n-gram would reach beyond the text
            pairs = list(
                zip(grams, [words[place + n - 1] for place in places if place + n <= len(words)], strict=False)
            )
            counts = Counter(pairs)
            repeated = [pair for pair, count in counts.items() if count > 1]
            if not repeated:
                break
            top = max(repeated, key=counts.get)  # the first, of several
            place = places[pairs.index(top)]
            number = {pair: i for i, pair in enumerate(repeated)}
            found = [(place, number[pair]) for place, pair in zip(places, pairs, strict=False) if pair in number]
            places, grams = zip(*found, strict=True)
            result[n] = counts[top] * (ends[place + n] - ends[place] + n - 1), _repeated_characters(found, ends, n)
        return result

    def top_gram_share(self, n):
        """Characters of the most frequent n-gram (with its spaces, times how often it is there), per character.

        Its occurrences may overlap, as in "no no no no", and then this can be above 1. 0 if no n-gram is there twice.
        n is 2 to 10.
        """
        return _share(self._repetition[n][0], len(self.text))

    def repeated_gram_share(self, n):
        """Characters of the words in n-grams that were there before, none twice, per character. n is 2 to 10."""
        return _share(self._repetition[n][1], len(self.text))


def _repeated_characters(found, ends, n):
    """The characters in later occurrences of n-grams, read from the left: one that is counted is passed over whole."""
    seen, free, characters = set(), 0, 0
    for place, gram in found:
        if place >= free and gram in seen:
            characters += ends[place + n] - ends[place]
            free = place + n
        elif place >= free:
            seen.add(gram)
    return characters


def _share(part, whole):
    return part / whole if whole else 0.0


def _repeats(pieces):
    """(how many of `pieces` were there before, their characters)."""
    characters, seen = 0, set()
    for piece in pieces:
        if piece in seen:
            characters += len(piece)
        seen.add(piece)
    return len(pieces) - len(seen), characters


def _limit(what, value, at_least=None, at_most=None):
    """The detail of a broken limit, or None."""
    if at_least is not None and value < at_least:
        return f"{what} {value:.3f} < {at_least}"
    if at_most is not None and value > at_most:
        return f"{what} {value:.3f} > {at_most}"
    return None


# ------------------------------------------------------------------ Gopher: quality


def word_count(page, at_least=50, at_most=100_000):
    """How many words there are. None for a limit is no limit."""
    count = len(page.words)
    if at_least is not None and count < at_least:
        return f"{count} words < {at_least}"
    return f"{count} words > {at_most}" if at_most is not None and count > at_most else None


def mean_word_length(page, at_least=3, at_most=10):
    """Characters per word. Not for pages mostly of scripts without spaces."""
    if page.unspaced > 0.5 or not page.words:
        return None
    return _limit("mean word length", page.letters / len(page.words), at_least, at_most)


def hashes(page, at_most=0.1):
    """# per word."""
    return _limit("# per word", _share(page.text.count("#"), len(page.words)), at_most=at_most)


def ellipses(page, at_most=0.1):
    """... and … per word."""
    count = page.text.count("...") + page.text.count("…")
    return _limit("ellipses per word", _share(count, len(page.words)), at_most=at_most)


def bullet_lines(page, at_most=0.9):
    """The share of lines that begin with • or -."""
    count = sum(line.lstrip().startswith(("•", "-")) for line in page.lines)
    return _limit("share of bullet lines", _share(count, len(page.lines)), at_most=at_most)


def ellipsis_lines(page, at_most=0.3):
    """The share of lines that end with ... or …."""
    count = sum(line.rstrip().endswith(("...", "…")) for line in page.lines)
    return _limit("share of lines ending in an ellipsis", _share(count, len(page.lines)), at_most=at_most)


def alphabetic_words(page, at_least=0.8):
    """The share of words with a letter in them."""
    count = sum(word.isalpha() or any(map(str.isalpha, word)) for word in page.words)
    return _limit("share of words with a letter", _share(count, len(page.words)), at_least) if page.words else None


STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])


def stop_words(page, at_least=2, of=STOP_WORDS):
    """How many words are one of eight English ones, lower case."""
    count = sum(word in of for word in page.words)
    return f"{count} stop words < {at_least}" if count < at_least else None


# ------------------------------------------------------------------ Gopher: repetition


def repeated_lines(page, at_most=0.3):
    """The share of lines that were there before."""
    return _limit("share of repeated lines", _share(_repeats(page.lines)[0], len(page.lines)), at_most=at_most)


def repeated_line_characters(page, at_most=0.2):
    """The share of characters in lines that were there before."""
    return _limit("share in repeated lines", _share(_repeats(page.lines)[1], len(page.text)), at_most=at_most)


def repeated_paragraphs(page, at_most=0.3):
    """The share of paragraphs that were there before."""
    count = _share(_repeats(page.paragraphs)[0], len(page.paragraphs))
    return _limit("share of repeated paragraphs", count, at_most=at_most)


def repeated_paragraph_characters(page, at_most=0.2):
    """The share of characters in paragraphs that were there before."""
    return _limit("share in repeated paragraphs", _share(_repeats(page.paragraphs)[1], len(page.text)), at_most=at_most)


def top_gram(page, n, at_most):
    """The share of characters in the most frequent n-gram of words."""
    return _limit(f"share of the top {n}-gram", page.top_gram_share(n), at_most=at_most)


def repeated_grams(page, n, at_most):
    """The share of characters in n-grams of words that were there before."""
    return _limit(f"share in repeated {n}-grams", page.repeated_gram_share(n), at_most=at_most)


TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

# ------------------------------------------------------------------ C4

_CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def c4_lines(text, ends=(".", "?", "!", '"', "'"), at_least=3, longest_word=1000, policies=POLICIES):
    """The text with C4's good lines only: they end in terminal punctuation (`ends`, but not "..."), have `at_least`
    words, none of them over `longest_word` characters, and speak neither of javascript nor of `policies`. Wikipedia's
    citation marks go."""
    kept = []
    for line in text.split("\n"):
        words = line.split()
        line = _CITATION.sub("", line.strip())
        lower = line.lower()
        if (
            len(words) >= at_least
            and line.endswith(ends)
            and not line.endswith("...")
            and "javascript" not in lower
            and not any(policy in lower for policy in policies)
            and max(map(len, words)) <= longest_word
        ):
            kept.append(line)
    return "\n".join(kept)


def sentence_count(page, at_least=5):
    """How many sentences there are."""
    return f"{page.sentences} sentences < {at_least}" if page.sentences < at_least else None


def lorem_ipsum(page, at_most=0):
    """How often the printers' dummy text begins."""
    count = page.text.lower().count("lorem ipsum")
    return f"{count} times lorem ipsum > {at_most}" if count > at_most else None


def curly_brackets(page, at_most=0):
    """How many { there are."""
    count = page.text.count("{")
    return f"{count} curly brackets > {at_most}" if count > at_most else None


# ------------------------------------------------------------------ FineWeb

_TERMINAL = tuple(".!?\"'”’»…。！？」』।॥؟۔\u1362\u104b\u17d4")  # at the end: Ethiopic, Myanmar and Khmer full stops


def terminal_lines(page, at_least=0.12, ends=_TERMINAL):
    """The share of lines that end in terminal punctuation, of any script."""
    count = sum(line.endswith(ends) for line in page.lines)
    return _limit("share of lines ending in punctuation", _share(count, len(page.lines)), at_least)


def short_lines(page, at_most=0.67, length=30):
    """The share of lines of at most `length` characters."""
    count = sum(len(line) <= length for line in page.lines)
    return _limit(f"share of lines up to {length} characters", _share(count, len(page.lines)), at_most=at_most)


def newlines_per_word(page, at_most=0.3):
    """Line ends per word: lists have many."""
    return _limit("newlines per word", _share(page.text.count("\n"), len(page.words)), at_most=at_most)


# ------------------------------------------------------------------ ours, against what machines write for machines

# Brackets and quotes alone are no sign: lists in prose stick together, "Cats (1998)Dogs (1999)".
_MACHINE_SIGNS = re.compile(r"\w[()\"]*+[_={}\[\]<>;:@\\|$^~*+%&#][_={}\[\]<>;:@\\|$^~*+%&#()\"]*+\w")
_NOT_SIGNS = {ord(char): None for char in string.ascii_letters + string.digits + string.whitespace + ".,;:!?'\"-()"}
_NOT_DIGITS = {code: None for code in range(128) if chr(code) not in string.digits}


def machine_words(page, at_most=0.25):
    """The share of the words' characters in words with a sign inside that programs use: NAME=y, a[i], axe@npm:4."""
    characters = sum(len(word) for word in page.words if not word.isalpha() and _MACHINE_SIGNS.search(word))
    return _limit("share in words with a sign inside", _share(characters, page.letters), at_most=at_most)


def long_words(page, at_most=0.3, length=40):
    """The share of the words' characters in words of more than `length` characters: base64, hashes, minified programs.

    Addresses in prose stay far below.
    """
    characters = sum(len(word) for word in page.words if len(word) > length)
    return _limit(f"share in words over {length} characters", _share(characters, page.letters), at_most=at_most)


def digits(page, at_most=0.3):
    """The share of the visible characters that are digits."""
    count = len(page.text.encode("ascii", "ignore").decode().translate(_NOT_DIGITS))
    return _limit("share of digits", _share(count, page.visible), at_most=at_most)


def signs(page, at_most=0.15):
    """The share of the visible characters that are ASCII signs other than the punctuation of prose."""
    count = len(page.text.encode("ascii", "ignore").decode().translate(_NOT_SIGNS))
    return _limit("share of signs", _share(count, page.visible), at_most=at_most)


_PUNCTUATED = (*_TERMINAL, ",", ";", ":", "、", "，", "；", "：", "-", "–", "—", ")", "]")


def menu_lines(page, at_most=0.7, length=60, at_least=5):
    """The share of lines up to `length` characters that end without any punctuation, where there are `at_least` lines:
    what is around a page, not in it. Verse has up to 0.6; poems without punctuation go too.
    """
    if len(page.lines) < at_least:
        return None
    count = sum(len(line) <= length and not line.rstrip().endswith(_PUNCTUATED) for line in page.lines)
    return _limit("share of short lines without punctuation", count / len(page.lines), at_most=at_most)


# ------------------------------------------------------------------ programs


def longest_line(page, at_most=1000):
    """Characters of the longest line."""
    longest = max(map(len, page.lines), default=0)
    return f"longest line {longest} > {at_most}" if longest > at_most else None


def mean_line_length(page, at_most=100):
    """Characters per line."""
    return _limit("mean line length", _share(sum(map(len, page.lines)), len(page.lines)), at_most=at_most)


def alphanumeric(page, at_least=0.25):
    """The share of all characters that are letters or digits."""
    count = sum(map(str.isalnum, page.text))
    return _limit("share of letters and digits", _share(count, len(page.text)), at_least)


# ------------------------------------------------------------------ presets


class Rule(NamedTuple):
    """test(page) is None, or the detail of what is wrong with the page."""

    name: str
    test: object


class Preset(NamedTuple):
    """Rules in their order, for a page that was edited first: edit(text) is a text."""

    rules: tuple
    edit: object = None


class Verdict(NamedTuple):
    """What a preset says: the text (edited, where the preset edits), and the first rule it breaks, or None."""

    text: str
    rule: str | None
    detail: str


def _named(preset, **tests):
    return tuple(Rule(f"{preset}.{name}", test) for name, test in tests.items())


PRESETS = {
    "gopher_quality": Preset(
        _named(
            "gopher_quality",
            word_count=word_count,
            mean_word_length=mean_word_length,
            hashes=hashes,
            ellipses=ellipses,
            bullet_lines=bullet_lines,
            ellipsis_lines=ellipsis_lines,
            alphabetic_words=alphabetic_words,
            stop_words=stop_words,
        )
    ),
    "gopher_repetition": Preset(
        _named(
            "gopher_repetition",
            repeated_paragraphs=repeated_paragraphs,
            repeated_paragraph_characters=repeated_paragraph_characters,
            repeated_lines=repeated_lines,
            repeated_line_characters=repeated_line_characters,
            **{f"top_{n}_gram": partial(top_gram, n=n, at_most=share) for n, share in TOP_GRAMS.items()},
            **{f"repeated_{n}_grams": partial(repeated_grams, n=n, at_most=s) for n, s in REPEATED_GRAMS.items()},
        )
    ),
    "c4": Preset(
        _named("c4", lorem_ipsum=lorem_ipsum, curly_brackets=curly_brackets, sentence_count=sentence_count), c4_lines
    ),
    "fineweb": Preset(
        _named(
            "fineweb",
            terminal_lines=terminal_lines,
            short_lines=short_lines,
            repeated_line_characters=partial(repeated_line_characters, at_most=0.01),
            newlines_per_word=newlines_per_word,
        )
    ),
    "default": Preset(
        _named(
            "default",
            word_count=partial(word_count, at_least=10, at_most=None),
            mean_word_length=partial(mean_word_length, at_least=2.5, at_most=15),
            alphabetic_words=partial(alphabetic_words, at_least=0.7),
            long_words=long_words,
            machine_words=machine_words,
            signs=signs,
            digits=digits,
            menu_lines=menu_lines,
            repeated_line_characters=partial(repeated_line_characters, at_most=0.3),
            repeated_grams=partial(repeated_grams, n=10, at_most=0.3),
        )
    ),
    "code": Preset(
        _named("code", longest_line=longest_line, mean_line_length=mean_line_length, alphanumeric=alphanumeric)
    ),
}


def _read(text, preset):
    """(rules, page) of a preset, by its name or itself."""
    if not isinstance(preset, Preset):
        if preset not in PRESETS:
            raise ValueError(f"no preset {preset!r}: {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    return preset.rules, Page(preset.edit(text) if preset.edit else text)


def judge(text, preset):
    """The Verdict of a preset (its name in PRESETS, or a Preset) on a text. ValueError: an unknown name."""
    rules, page = _read(text, preset)
    for rule in rules:
        if detail := rule.test(page):
            return Verdict(page.text, rule.name, detail)
    return Verdict(page.text, None, "")


def broken(text, preset):
    """[(rule name, detail)] of every rule of the preset that the text breaks. Arguments as `judge`."""
    rules, page = _read(text, preset)
    return [(rule.name, detail) for rule in rules if (detail := rule.test(page))]
