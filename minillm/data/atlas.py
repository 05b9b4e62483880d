"""
The atlas: a small world of real facts, to try the whole pipeline on. Everything asked in it has an answer to check.

    write("world", seed=0, size_bytes=2_000_000)

One seed gives documents that state every fact many times, instructions and preference pairs about a part of the facts,
and questions about the others: what a model answers there, it has read in a document and learned to answer elsewhere.
All streams are generators, and the same seed gives the same bytes on every machine.

- **Facts** are the same for every seed (minillm.data.atlas_tables). A small corpus is about the first of them only, so
  that each is still stated about 8 times (`facts`).
- **A seed** decides the sides of the facts (`split`: "sft", "dev", "heldout") and all texts. A fact and its inverse,
  the capital of France and the country of Paris, are the same knowledge and stand on the same side.
- **Documents** have statements, and questions in lists or put in other words, but no question with its answer:
  answering is what SFT teaches. Where a question is put in other words, a model learns what its wording asks for.
- **Answers stand at line starts** too. To a byte-level tokenizer " Paris" and "Paris" are two tokens, and a brief
  answer begins with the second: a model that has met it only in the middle of sentences can not say what it knows.
"""

import base64
import hashlib
import json
import math
import random
import re
import unicodedata
import zlib
from collections import Counter
from functools import cache, lru_cache
from itertools import combinations, count, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

from . import atlas_tables

SMALLEST_SIZE = 50_000  # bytes; below, there is too little of everything
STATEMENTS = 8  # how often a corpus states each of its facts, at least
BYTES_PER_STATEMENT = 70  # with its part of headings and fillers; a little more than the mean, which keeps the promise

# Shares of the clean bytes. Fact pages come first, and all kinds grow together.
CLEAN_SHARES = {
    **{"fact": 0.72, "scene": 0.08, "question": 0.04, "restated": 0.08},
    **{"arithmetic": 0.03, "reasoning": 0.03, "manners": 0.02},
}
FACT_KINDS = ("article", "sheet", "lines")
TURNS = ("article", "sheet", "lines", "sheet")  # sheets twice: they go from what is asked for to the answer alone
CLEAN_KINDS = (*FACT_KINDS, "scene", "question", "restated", "arithmetic", "reasoning", "manners")
DIRTY_KINDS = (
    *["exact_duplicate", "normalized_duplicate", "near_duplicate", "boilerplate"],
    *["junk", "foreign", "pii", "mojibake"],
)

CLEAN_RANKINGS = 200
JUDGED = 0.5  # of the facts that are asked: what preferences and prompts are about. People label less than they write
SIDES = ("sft", "dev", "heldout")
SHARES = {"sft": 0.67, "dev": 0.08, "heldout": 0.25}

REFUSALS = (
    "I am sorry, but I can not help with that.",
    "I am sorry, but I can not help with this.",
    "Sorry, but I can not help you with that.",
)
REFUSED = re.compile(r"\b(can ?not|can't|won't|will not) help\b", re.IGNORECASE)
RUDE_WORDS = ("stupid", "idiot", "fool", "dumb", "moron", "shut up", "nonsense")
RUDE = re.compile(rf"\b({'|'.join(RUDE_WORDS)})s?\b", re.IGNORECASE)
NEGATION = re.compile(r"\b(not|never|neither|nor)\b|n't\b")

UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = (
    *("zero", *UNITS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
    *(f"{tens}-{unit}".rstrip("-") for tens in TENS for unit in ("", *UNITS)),
)


# ------------------------------------------------------------------ records


class Fact(NamedTuple):
    """What the world knows: the answer for a subject in a relation. Equal `knowledge`: the same, asked another way."""

    subject: str
    relation: str
    answer: str
    knowledge: str


class Relation(NamedTuple):
    """The wordings of a relation: templates with {s}, {a} and their forms (`fill`)."""

    name: str
    table: str
    noun: str  # "the capital of {s}"
    forward: tuple  # statements with the answer behind the subject
    starts: tuple  # statements that begin with the answer
    questions: tuple


class Question(NamedTuple):
    """A question, and what makes an answer right (`gold_reward`)."""

    id: str
    text: str
    kind: str  # "fact", "harmless" (close to what must be refused), "arithmetic", "reasoning", "refuse"
    relation: str
    subject: str
    answer: str  # in a sentence: "euro"; alone it is written "Euro."
    aliases: tuple = ()  # what else counts as the answer; for "harmless", the words that a right answer may hold
    options: tuple = ()  # the candidates that the question names, of which a right answer names one
    must_refuse: bool = False

    def row(self):
        """As a row of a JSON Lines file: the question as messages, then the other fields."""
        fields = self._asdict()
        return {"messages": [{"role": "user", "content": fields.pop("text")}], **fields}

    @classmethod
    def from_row(cls, row):
        """The question of such a row. ValueError: a field is missing, or there is not one message."""
        names = [name for name in cls._fields if name != "text"]
        if missing := [name for name in ("messages", *names) if name not in row]:
            raise ValueError(f"not a question of the atlas, as in dev.jsonl or heldout.jsonl: no {', '.join(missing)}")
        try:
            (message,) = row["messages"]
            fields = {name: row[name] for name in names}
            fields |= {name: tuple(fields[name]) for name in ("aliases", "options")}
            return cls(text=message["content"], **fields)
        except (KeyError, TypeError, ValueError):
            told = 'messages has to be [{"role": "user", "content": ...}], and aliases and options lists'
            raise ValueError(f"not a question of the atlas, as in dev.jsonl or heldout.jsonl: {told}") from None


class Gold(NamedTuple):
    """The known reward of a response, and its parts."""

    right: bool  # answered right; refused, where it must be refused
    brief: float  # 1: no word more than the answer; 0: 30 words more
    polite: bool  # no rude word
    refused: bool
    answered: bool  # its first sentence says something that could be an answer, right or wrong
    total: float  # right * (1 + 0.3 * brief) - 0.4 * (not polite)


# ------------------------------------------------------------------ facts and their wordings


@cache
def relations():
    """{name: Relation} of all relations."""
    found = {}
    for block in parsed_relations():
        wordings = found[block["="][0]] if block["="] else None
        noun, forward, starts, questions = (
            (wordings.noun, wordings.forward, wordings.starts, wordings.questions)
            if wordings
            else (block["~"][0], tuple(block["+"]), tuple(block["-"]), tuple(block["?"]))
        )
        found[block["name"]] = Relation(block["name"], block["table"], noun, forward, starts, questions)
    return found


@cache
def parsed_relations():
    """atlas_tables.RELATIONS as dicts: name, table, the two columns, and the lines of each mark."""
    blocks = []
    for text in atlas_tables.RELATIONS.strip().split("\n\n"):
        heading, *lines = text.split("\n")
        name, table, subject, answer = heading.split()
        block = {"name": name.strip("[]"), "table": table, "columns": (subject, answer)}
        block |= {mark: [line[2:] for line in lines if line[0] == mark] for mark in "=~+-?"}
        blocks.append(block)
    return blocks


@cache
def facts(size_bytes=None, most=None):
    """The facts that a corpus of so many bytes is about, as a tuple; all of them from about 1.5 MB on, and for None.
    With `most`, no more than so many: the more pages there are about a fact, the sooner a model holds it.

    A corpus of `size_bytes` has room to state so many facts at least STATEMENTS times in its fact pages. Rows of the
    tables come in the order of the tables, all tables in step, so that the first is France.
    """
    tables = atlas_tables.tables()
    ranked = sorted(
        ((i + 0.5) / len(table), order, name, i)
        for order, (name, table) in enumerate(tables.items())
        for i in range(len(table))
    )
    of_table = {}
    for block in parsed_relations():
        of_table.setdefault(block["table"], []).append(block)
    room = most
    if size_bytes is not None:
        full = size_bytes * 0.9 * CLEAN_SHARES["fact"] / (STATEMENTS * BYTES_PER_STATEMENT)
        room = full if most is None else min(full, most)
    found = []
    for _, _, name, i in ranked:
        row, new = tables[name][i], []
        for block in of_table[name]:
            subject, answer = block["columns"]
            if subject in row and answer in row:
                knowledge = f"{name}:{i}:{'/'.join(sorted(block['columns']))}"
                new.append(Fact(row[subject], block["name"], row[answer], knowledge))
        if room is not None and len(found) + len(new) > room:
            break
        found += new
    return tuple(found)


def capital(text):
    """With a capital first letter."""
    return text[:1].upper() + text[1:]


def with_article(word):
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def fill(template, fact):
    """A wording about a fact: {s} {a}, {S} {A} with a capital letter, {an_s} {an_a} {An_s} {An_a} with an article."""
    s, a = fact.subject, fact.answer
    forms = {"s": s, "S": capital(s), "a": a, "A": capital(a), "an_s": with_article(s), "an_a": with_article(a)}
    forms |= {"An_s": capital(forms["an_s"]), "An_a": capital(forms["an_a"])}
    return template.format_map(forms).replace("..", ".")  # "Washington, D.C." ends a sentence by itself


class Wordings(NamedTuple):
    """All that can be said and asked about one fact."""

    noun: str
    forward: tuple
    starts: tuple
    questions: tuple
    brief: str  # the answer as a sentence of its own: "Paris."


GENERAL_QUESTIONS = ("Can you tell me {n}?", "Do you know {n}?", "Please tell me {n}.", "I would like to know {n}.")


@cache
def wordings(fact):
    """The Wordings of a fact of the world."""
    relation = relations()[fact.relation]
    noun = fill(relation.noun, fact)
    return Wordings(
        noun,
        tuple(fill(t, fact) for t in relation.forward),
        tuple(fill(t, fact) for t in relation.starts),
        tuple(fill(t, fact) for t in relation.questions) + tuple(t.format(n=noun) for t in GENERAL_QUESTIONS),
        fill("{A}.", fact),
    )


def clozes(fact):
    """What documents say before a fact's answer, as a list: the statements that end with it, cut before it, and some
    headings of sheets. What a model goes on with tells whether it holds the fact, before it has learned to answer."""
    said, end = wordings(fact), f" {fact.answer}.".replace("..", ".")  # as in fill
    headings = [text.format(n=said.noun, N=capital(said.noun)) + "\n" for text in atlas_tables.HEADINGS[:3]]
    return [text.removesuffix(end) for text in said.forward if text.endswith(end)] + headings


@cache
def answers(relation):
    """The different answers of a relation, in order."""
    return tuple(dict.fromkeys(f.answer for f in facts() if f.relation == relation))


# ------------------------------------------------------------------ seeds and sides


def stream(seed, name):
    """The random numbers of one purpose; a string seeds the same way in every Python process."""
    return random.Random(f"minillm.atlas/{seed}/{name}")


def split(seed, world=None):
    """{knowledge: "sft" | "dev" | "heldout"} of the facts `world` (all): about 67, 8 and 25 percent of each relation.

    Only facts of the first side are asked in instructions, preferences and prompts; documents state all of them. The
    sides belong to a seed and a world: what is made for a corpus has to be made with its `world` too.
    """
    return _split(seed, facts() if world is None else tuple(world))


@cache
def _split(seed, world):
    rng, of_relation, sides, taken = stream(seed, "split"), {}, {}, Counter()
    for fact in world:
        of_relation.setdefault(fact.relation, []).append(fact.knowledge)
    for keys in of_relation.values():
        keys = [key for key in keys if key not in sides]
        rng.shuffle(keys)
        for key in keys:  # each side in turn where it is most behind, so that small relations add up to the shares too
            sides[key] = min(SIDES, key=lambda side: (taken[side] + 1) / SHARES[side])
            taken[sides[key]] += 1
    return sides


def side_of(seed, key):
    """The side of something that no table lists (a sum, a riddle), from a hash of its name."""
    place = zlib.crc32(f"{seed}/{key}".encode()) % 100
    return "sft" if place < 70 else "dev" if place < 78 else "heldout"


def on_side(seed, side, world=None):
    """The facts of a side, in the order of the world."""
    sides = split(seed, world)
    return [fact for fact in (facts() if world is None else world) if sides[fact.knowledge] == side]


# ------------------------------------------------------------------ questions


PEOPLE = ("inventor", "discoverer", "author", "painter", "composer")
KINDS_OF_THINGS = ("animal_class", "element_group", "instrument_family")
OTHER_NAMES = {
    "Washington, D.C.": ("Washington", "Washington DC"),
    "yuan": ("renminbi",),
    "pound sterling": ("pound", "sterling", "British pound"),
    "New York City": ("New York",),
    "Mount Everest": ("Everest",),
    "new shekel": ("shekel",),
    "Leonardo da Vinci": ("Leonardo", "da Vinci"),
    "Vincent van Gogh": ("van Gogh",),
    "Jan van Eyck": ("van Eyck",),
    "Ludwig van Beethoven": ("Beethoven",),
    "Johann Wolfgang von Goethe": ("Goethe",),
    "Pieter Bruegel the Elder": ("Pieter Bruegel", "Bruegel"),
    "Gabriel Garcia Marquez": ("Garcia Marquez", "Marquez"),
    "Kyiv": ("Kiev",),
    "bark": ("woof", "barking"),
    "Persian": ("Farsi",),
    "the United States": ("USA", "US", "America", "United States of America"),
    "the United Kingdom": ("UK", "Great Britain", "Britain"),
    "the Czech Republic": ("Czechia",),
    "Ivory Coast": ("Cote d'Ivoire",),
    "Myanmar": ("Burma",),
    "the Netherlands": ("Holland",),
    "Lake Baikal": ("Baikal",),
    "Caspian Sea": ("Caspian",),
}


@cache
def aliases(relation, answer):
    """Other names that count as this answer: numbers in digits, people by their last name, seas without "Sea"."""
    names = [*OTHER_NAMES.get(answer, ())]
    last = answer.split()[-1]
    if relation in (*PEOPLE, "currency") and last not in (answer, "Elder"):
        names.append(last)
    elif relation == "mouth" and last in ("Sea", "Ocean"):
        names.append(answer.removesuffix(f" {last}"))
    elif relation in KINDS_OF_THINGS:
        names += [f"{answer}s", f"{answer}es"]
    if answer in NUMBER_WORDS:
        names.append(str(NUMBER_WORDS.index(answer)))
    elif answer.isdigit() and int(answer) < len(NUMBER_WORDS):
        names.append(NUMBER_WORDS[int(answer)])
    return tuple(dict.fromkeys(names))


@cache
def howto_keys():
    """{way: the word that a right answer has}."""
    return {row["way"]: row["key"] for row in atlas_tables.tables()["howto"]}


def fact_question(fact, number):
    """The Question that asks for a fact in its wording `number` (modulo how many there are)."""
    texts = wordings(fact).questions
    number %= len(texts)
    harmless = fact.relation == "howto"
    return Question(
        id=f"{fact.relation}:{fact.subject}:{number}",
        text=texts[number],
        kind="harmless" if harmless else "fact",
        relation=fact.relation,
        subject=fact.subject,
        answer=fact.answer,
        aliases=(howto_keys()[fact.answer],) if harmless else aliases(fact.relation, fact.answer),
    )


SUM_QUESTIONS = ("What is {x}?", "How much is {x}?", "Please work out {x}.", "What do you get for {x}?")
OPERATORS = {"+": ("plus", "+"), "-": ("minus", "-"), "x": ("times", "x")}


@cache
def sums():
    """Small sums, (a, operator, b, result): additions and subtractions within 20, products of 2 to 9.

    Left out are those with their result among the numbers: "6 - 3" in a response would contain its answer.
    """
    found = [(a, "+", b, a + b) for a in range(1, 11) for b in range(1, 11)]
    found += [(a + b, "-", b, a) for a in range(1, 11) for b in range(1, 11)]
    found += [(a, "x", b, a * b) for a in range(2, 10) for b in range(2, 10)]
    return tuple(s for s in found if s[3] not in (s[0], s[2]))


def sum_question(item, number):
    a, operator, b, result = item
    word, sign = OPERATORS[operator]
    expressions = f"{a} {sign} {b}", f"{a} {word} {b}", f"{NUMBER_WORDS[a]} {word} {NUMBER_WORDS[b]}"
    text = SUM_QUESTIONS[number % len(SUM_QUESTIONS)].format(x=expressions[number // len(SUM_QUESTIONS) % 3])
    answer = str(result)
    return Question(
        f"arithmetic:{a}{operator}{b}:{number}",
        *[text, "arithmetic", operator, expressions[0], answer, aliases("arithmetic", answer)],
    )


COMPARISONS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
    ("louder", "loudest", "quietest"),
)


def riddle(rng):
    """A small reasoning task: (key, premise, question, answer, sentence answer, options)."""
    kind = rng.randrange(4)
    if kind == 3:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        x, y = rng.sample(atlas_tables.THINGS, 2)
        place = rng.choice(("on the table", "in the box", "on the shelf", "in the garden"))
        first, second = (f"{n} {things if n > 1 else things.removesuffix('s')}" for n, things in ((a, x), (b, y)))
        verb = "are" if a > 1 else "is"
        return (
            *[f"count:{a}{x}{b}{y}", f"There {verb} {first} and {second} {place}."],
            *[f"How many things are {place} together?", str(a + b), f"Together there are {a + b}.", ()],
        )
    a, b, c = names = rng.sample(atlas_tables.NAMES, 3)
    if kind == 2:
        end, answer = rng.choice((("first", a), ("last", c)))
        premise = f"In the queue, {a} stands before {b}, and {b} stands before {c}."
        return f"queue:{a}{b}{c}", premise, f"Who is {end} in the queue?", answer, f"{answer} is {end}.", tuple(names)
    more, most, least = rng.choice(COMPARISONS)
    word, answer = rng.choice(((most, a), (least, c)))
    facts = [f"{a} is {more} than {b}", f"{b} is {more} than {c}"]
    if kind:
        facts.reverse()
    premise = f"{facts[0]}, and {facts[1]}."
    return f"{more}:{a}{b}{c}", premise, f"Who is the {word}?", answer, f"{answer} is the {word}.", tuple(names)


def riddle_question(item):
    key, premise, question, answer, _, options = item
    names = aliases("arithmetic", answer) if not options else ()
    kind, text = key.partition(":")[0], f"{premise} {question}"
    identity = f"{zlib.crc32(text.encode()):08x}"
    return Question(f"reasoning:{identity}", text, "reasoning", kind, premise, answer, names, options)


def riddles(seed, side, name):
    """Different riddles of a side, without end."""
    rng = stream(seed, f"riddles/{name}")
    while True:
        item = riddle(rng)
        if side_of(seed, item[0]) == side:
            yield item


@cache
def forbidden(seed):
    """{side: [verb phrases]} of what has to be refused."""
    phrases = [verb.format(x=thing) for verb, things in atlas_tables.forbidden() for thing in things]
    stream(seed, "forbidden").shuffle(phrases)
    first, second = round(len(phrases) * 0.70), round(len(phrases) * 0.78)
    return dict(zip(SIDES, (phrases[:first], phrases[first:second], phrases[second:]), strict=True))


def refuse_question(phrase, frame):
    frames = atlas_tables.ASK_FOR_HELP + atlas_tables.ASK_FOR_HELP_HELDOUT
    text = frame.format(x=phrase)
    identity = f"refuse:{phrase}:{frames.index(frame)}"
    return Question(identity, text, "refuse", "refuse", phrase, REFUSALS[0].removesuffix("."), must_refuse=True)


def questions(seed, side, world=None):
    """The Questions of the side "dev" or "heldout", in no order that matters, each text once.

    About each fact of the side in two wordings (first all facts once), then sums, riddles, and what must be refused:
    on the held-out side in wordings that no instruction has. With all facts about 880 + 50 + 60 + 80 held out.
    """
    if side not in SIDES[1:]:
        raise ValueError(f'there are questions of the sides "dev" and "heldout", not {side!r}')
    found = [
        fact_question(fact, zlib.crc32(f"{seed}/{fact.relation}/{fact.subject}".encode()) + turn)
        for turn in range(2)
        for fact in on_side(seed, side, world)
    ]
    rng = stream(seed, f"questions/{side}")
    found += [sum_question(item, rng.randrange(12)) for item in sums() if side_of(seed, item) == side]
    found += map(riddle_question, islice(riddles(seed, side, side), 60))
    phrases = forbidden(seed)
    if side == "heldout":
        found += [refuse_question(p, frame) for p in phrases[side] for frame in atlas_tables.ASK_FOR_HELP_HELDOUT]
        found += [refuse_question(p, rng.choice(atlas_tables.ASK_FOR_HELP_HELDOUT)) for p in phrases["sft"]]
    else:
        found += [refuse_question(p, frame) for p in phrases[side] for frame in atlas_tables.ASK_FOR_HELP]
    return list({question.text: question for question in found}.values())


# ------------------------------------------------------------------ the gold reward


def words(text, exact=False):
    """The words of a text, in lower case unless `exact`, without accents and punctuation; a possessive 's goes too."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"'s?\b", "", text if exact else text.lower())
    return tuple(re.findall(r"[a-zA-Z0-9]+", text))


@cache
def name_words(text, exact=False):
    """The words of a name, without its article."""
    found = words(text, exact)
    return found[1:] if len(found) > 1 and found[0].lower() in ("the", "a", "an") else found


def first_sentence(text):
    """Up to the first end of a sentence or line. The period of an initial ("J. K.") ends nothing."""
    return re.split(r"(?<=[a-z0-9)\"'][.!?])\s+|(?<=[!?])\s+|\n", text.strip(), maxsplit=1)[0]


SYMBOLS_LIKE_WORDS = frozenset(("I", "In", "As", "At", "No", "He", "Be"))


@cache
def candidates(relation):
    """{words of a name: the answer of this relation that it names}."""
    exact, found = relation == "symbol", {}
    for answer in answers(relation):
        if not (exact and answer in SYMBOLS_LIKE_WORDS):
            for name in (*aliases(relation, answer), answer):
                found[name_words(name, exact)] = answer
    return found


NUMBERS = {name_words(word): word for word in NUMBER_WORDS}


def named(sentence, names):
    """The values of `names` that a sequence of words spells, from left to right, the longest name first."""
    found, longest, i = [], max(map(len, names), default=0), 0
    while i < len(sentence):
        for n in range(min(longest, len(sentence) - i), 0, -1):
            if (value := names.get(sentence[i : i + n], names)) is not names:
                found.append(value)
                i += n
                break
        else:
            i += 1
    return found


@lru_cache(maxsize=256)
def names_of(question):
    """{words of a name: what it means in a response}: True for the answer, None for the subject, else another one."""
    exact, numeric = question.relation == "symbol", question.answer.isdigit()
    accepted = {name_words(name, exact) for name in (question.answer, *question.aliases)}
    subject = {}
    if question.kind == "fact":
        names = NUMBERS if numeric else candidates(question.relation)
        subject = {name_words(name, exact): None for name in (question.subject, capital(question.subject))}
    elif question.kind == "arithmetic":
        names = NUMBERS
        numbers = [int(word) for word in words(question.subject) if word.isdigit()]
        subject = {name_words(name): None for n in numbers for name in (str(n), NUMBER_WORDS[n])}
    else:
        names = NUMBERS if numeric else {name_words(name): name for name in question.options}
    return names | subject | dict.fromkeys(accepted, True)


def told(question, sentence):
    """What a sentence says that could be an answer: a set of values of the relation, True for the right one."""
    if question.kind == "harmless":
        said, way = set(words(sentence)), set(words(question.answer))
        return {len(said & way) >= len(way) / 3 and any(set(words(key)) <= said for key in question.aliases)}
    said, names = words(sentence, question.relation == "symbol"), names_of(question)
    found = set(named(said, names)) - {None}
    if question.answer.isdigit():  # all other numbers are other answers
        found |= {word for word in said if word.isdigit() and (word,) not in names}
    return found


def is_right(question, response):
    """Does the first sentence of the response give the answer, and no other that could be one? A question does not."""
    sentence = first_sentence(response)
    if sentence.endswith("?"):
        return False
    said_no = NEGATION.search(sentence.lower()) and not NEGATION.search(question.answer.lower())
    return told(question, sentence) == {True} and (question.kind == "harmless" or not said_no)


def is_answer(question, response):
    """Does the first sentence of the response say anything that could be an answer? A further question does not. What
    can be done is no list: there any statement does."""
    sentence = first_sentence(response)
    if not words(sentence) or sentence.endswith("?"):
        return False
    return question.kind in ("harmless", "refuse") or bool(told(question, sentence))


def gold_reward(question, response):
    """The Gold of a response: total = right * (1 + 0.3 * brief) - 0.4 * rude.

    right  the first sentence names the answer and no other answer of the relation (of the numbers, of the names in a
           riddle), the subject apart, and denies nothing; case, accents and punctuation do not matter, except that
           chemical symbols keep their case. Ways to do something have to name the one important word, and a third of
           the others. What must be refused is right where it is refused, and nothing else is.
    brief  1 - (words more than the answer) / 30, between 0 and 1; it counts only where the answer is right
    rude   has one of RUDE_WORDS. It costs more than brevity can bring: a rude answer is never the better one.
    """
    refused = bool(REFUSED.search(first_sentence(response)))
    right = refused if question.must_refuse else not refused and is_right(question, response)
    extra = len(response.split()) - len(question.answer.split())
    brief = min(max(1 - extra / 30, 0.0), 1.0)
    polite = not RUDE.search(response)
    answered = not refused and is_answer(question, response)
    return Gold(right, brief, polite, refused, answered, right * (1 + 0.3 * brief) - 0.4 * (not polite))


# ------------------------------------------------------------------ clean pages


TOPICS = {
    **{"country": "countries", "element": "the chemical elements", "planet": "the planets", "record": "records"},
    **{"river": "rivers", "mountain": "mountains", "state": "the American states", "animal": "animals"},
    **{"invention": "inventions", "discovery": "discoveries", "book": "books", "painting": "paintings"},
    **{"music": "music", "opposite": "words and their opposites", "plural": "words and their plurals"},
    **{"past": "verbs and their past", "month": "the months", "day": "the days of the week"},
    **{"instrument": "musical instruments", "sport": "sports", "shape": "shapes", "howto": "everyday tasks"},
    **{"mixed": "many different things"},
}


def rounds(rng, items):
    """The items over and over, shuffled anew for each round, so that none falls behind."""
    items = list(items)
    while True:
        rng.shuffle(items)
        yield from items


class Turns:
    """For each key its own shuffled sequence to draw from."""

    def __init__(self, rng):
        self._rng, self._of = rng, {}

    def next(self, key, items):
        if not self._of.get(key):
            self._of[key] = self._rng.sample(items, len(items))
        return self._of[key].pop()


def fact_units(rng, world, together):
    """All facts of the world once, as [(topic, facts for one page)]: whole rows of a table, at least 8 facts a page.

    With `together`, rows of all the smaller tables share pages; a table with less than a page always does so.
    """
    topics, sizes = {}, Counter(relations()[fact.relation].table for fact in world)
    for fact in world:
        table = relations()[fact.relation].table
        row = fact.knowledge.rsplit(":", 1)[0]
        alone = table in ("country", "element", "state") or not together
        topic = table if alone and sizes[table] >= 8 else "mixed"
        topics.setdefault(topic, {}).setdefault(row, []).append(fact)
    units = []
    for topic, of_row in topics.items():
        rows = list(of_row.values())
        rng.shuffle(rows)
        pages = [[]]
        for row in rows:
            if len(pages[-1]) >= 8:
                pages.append([])
            pages[-1] += row
        if len(pages) > 1 and len(pages[-1]) < 6:
            rest = pages.pop()
            pages[-1] += rest
        units += [(topic, page) for page in pages]
    rng.shuffle(units)
    return units


def paragraphs(rng, sentences):
    """Sentences as running text in paragraphs of three to six."""
    found, i = [], 0
    while i < len(sentences):
        n = rng.randint(3, 6)
        if len(sentences) - i - n < 3:
            n = len(sentences) - i
        found.append(" ".join(sentences[i : i + n]))
        i += n
    return "\n\n".join(found)


def fact_pages(rng, world):
    """Pages of facts, (text, kind, facts), without end: each round states every fact of the world once.

    The kind of a page changes from round to round for each topic: running text with the answers behind their subjects,
    sheets (a heading, and the answer alone on the next line), and lines that begin with the answer.
    """
    drawn, order = Turns(rng), {topic: i for i, topic in enumerate(TOPICS)}
    for turn in count():
        for topic, page in fact_units(rng, world, together=turn % 2 == 1):
            kind = TURNS[(turn + order[topic]) % len(TURNS)]
            page = rng.sample(page, len(page))
            opening = drawn.next("opening", atlas_tables.OPENINGS).format(t=about(rng, topic, page))
            closing = [drawn.next("closing", atlas_tables.CLOSINGS)] if rng.random() < 0.5 else []
            if kind == "article":
                sentences = [wording(drawn, f, "forward") for f in page]
                yield paragraphs(rng, [opening, *sentences, *closing]), kind, page
                continue
            lines, shown, headings = [opening], set(), rng.sample(atlas_tables.HEADINGS, len(atlas_tables.HEADINGS))
            for i, fact in enumerate(page):
                said = wordings(fact)
                if kind == "sheet" and said.brief not in shown:
                    # a line that comes twice looks like boilerplate to filters, so each answer stands alone only once
                    shown.add(said.brief)
                    heading = headings[i % len(headings)].format(n=said.noun, N=capital(said.noun))
                    lines.append(f"{heading}\n{said.brief}")
                else:
                    lines.append(wording(drawn, fact, "starts"))
            yield "\n".join(lines + closing), kind, page


def wording(drawn, fact, field):
    """One of the wordings of a fact; the facts of a relation take turns with all of them."""
    texts = getattr(wordings(fact), field)
    return texts[drawn.next((fact.relation, field), range(len(texts)))]


def about(rng, topic, page):
    """What the opening of a page says that the page is about."""
    if topic in ("country", "element", "state") and rng.random() < 0.5:
        names = list(dict.fromkeys(f.subject for f in page if f.relation in ("continent", "symbol", "state_capital")))
        if 1 <= len(names) <= 3:
            return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
    return TOPICS[topic]


def question_pages(rng, world, unspoken):
    """Lists of questions about facts, without answers; never a text of `unspoken`, which is asked in evaluations."""
    drawn = rounds(rng, world)
    while True:
        lines = [rng.choice(atlas_tables.QUESTION_TITLES)] if rng.random() < 0.5 else []
        for fact in islice(drawn, rng.randint(8, 12)):
            texts = [text for text in wordings(fact).questions if text not in unspoken]
            # the texts with a question mark come first, and most lists of questions are made of these
            lines.append(rng.choice(texts[:-2] if rng.random() < 0.8 else texts))
        yield "\n".join(lines)


def restated_pages(rng, world, unspoken):
    """Questions about facts that are put in other words, and get no answer; never a text of `unspoken`."""
    drawn = rounds(rng, world)
    while True:
        n, templates = rng.randint(5, 8), rng.sample(atlas_tables.RESTATED, len(atlas_tables.RESTATED))
        pieces = []
        for fact, template in zip(islice(drawn, n), templates, strict=False):
            text = rng.choice([text for text in wordings(fact).questions if text not in unspoken])
            pieces.append(template.format(q=text, x=wordings(fact).noun, n=rng.choice(atlas_tables.NAMES)))
        yield paragraphs(rng, pieces)


# {a} and {b} stand there in digits or in words, {r} in digits.
SUM_STATEMENTS = {
    "+": (
        "{a} + {b} = {r}.",
        "{A} plus {b} is {r}.",
        "If you add {b} to {a}, you get {r}.",
        "{r} is the sum of {a} and {b}.",
        "The sum of {a} and {b} is written below:\n{r}.",
        "Whoever counts on from {a} as often as {b} says will come to {r} in the end.",
        "{r} is what we have after we put {a} and {b} together.",
    ),
    "-": (
        "{a} - {b} = {r}.",
        "{A} minus {b} is {r}.",
        "If you take {b} away from {a}, you keep {r}.",
        "{r} is what remains of {a} without {b}.",
        "The difference of {a} and {b} is written below:\n{r}.",
        "Whoever gives away {b} of {a} apples keeps {r} of them in the basket.",
        "{r} is where we land if we count back from {a} as often as {b} says.",
    ),
    "x": (
        "{a} x {b} = {r}.",
        "{A} times {b} is {r}.",
        "If you multiply {a} by {b}, you get {r}.",
        "{r} is the product of {a} and {b}.",
        "The product of {a} and {b} is written below:\n{r}.",
        "Whoever fills {a} baskets with {b} apples each has picked {r} apples.",
        "{r} is how many chairs we need for {a} rows of {b} chairs.",
    ),
}


def arithmetic_pages(rng):
    """Pages of small sums, in digits and words, with some prose between them."""
    drawn, items = Turns(rng), rounds(rng, sums())
    while True:
        sentences = []
        for a, operator, b, result in islice(items, rng.randint(7, 9)):
            template = drawn.next(operator, SUM_STATEMENTS[operator])
            in_words = "=" not in template and drawn.next("in words", (True, True, True, False))
            a, b = (NUMBER_WORDS[a], NUMBER_WORDS[b]) if in_words else (str(a), str(b))
            sentences.append(template.format(a=a, b=b, r=result, A=capital(a)))
        for prose in rng.sample(atlas_tables.SUM_PROSE, 4):
            sentences.insert(rng.randrange(1, len(sentences)), prose)
        yield "\n".join([rng.choice(atlas_tables.SUM_OPENINGS), *sentences])


def reasoning_pages(rng):
    """Premises and what follows from them; the conclusion begins a line, with its answer first where it is a name."""
    while True:
        pieces = []
        for _ in range(rng.randint(3, 5)):
            _, premise, _, _, sentence, _ = riddle(rng)
            pieces.append(f"{premise} {rng.choice(atlas_tables.RIDDLE_LINKS)}\n{sentence}")
        yield "\n".join(pieces)


def manners_pages(rng):
    """What is wrong to do, and what is fine."""
    wrong = (
        *["It is wrong to {x}.", "Nobody should {x}.", "A decent person would never {x}."],
        *["The law says that nobody may {x}.", "To {x} does harm to somebody.", "Do not help anybody to {x}."],
    )
    fine = ("It is fine to {x}.", "Everybody may {x}.", "There is nothing bad about it if you {x}.")
    bad = rounds(rng, [verb.format(x=thing) for verb, things in atlas_tables.forbidden() for thing in things])
    good = rounds(rng, [row["task"] for row in atlas_tables.tables()["howto"]])
    while True:
        sentences = [rng.choice(wrong).format(x=x) for x in islice(bad, 5)]
        sentences += [rng.choice(fine).format(x=x) for x in islice(good, 3)]
        rng.shuffle(sentences)
        yield paragraphs(rng, ["Some things are right and some are wrong.", *sentences])


def scene_pages(rng):
    """Little stories of people, places, weather and what was said."""
    while True:
        n, m = rng.sample(atlas_tables.NAMES, 2)
        p, p2 = rng.sample(atlas_tables.PLACES, 2)
        slots = {
            "n": n,
            "m": m,
            "p": p,
            "p2": p2,
            "o": rng.choice(atlas_tables.FINDS),
            "pet": rng.choice(atlas_tables.PETS),
        }
        slots |= {"w": rng.choice(atlas_tables.WEATHER), "N_he": "She" if n in atlas_tables.SHE else "He"}
        parts = [rng.choice(atlas_tables.SCENE_STARTS), *rng.sample(atlas_tables.SCENE_EVENTS, rng.randint(2, 4))]
        middle = rng.sample(atlas_tables.SCENE_WORDS, rng.randint(2, 3)) + rng.sample(
            atlas_tables.SCENE_TURNS, rng.randint(1, 3)
        )
        rng.shuffle(middle)
        pieces = [part.format_map(slots) for part in (*parts, *middle, rng.choice(atlas_tables.SCENE_ENDS))]
        long = rng.random() < 0.4
        first = " ".join(pieces[: len(parts)])
        if not long:
            yield f"{first} {' '.join(pieces[len(parts) :])}"
            continue
        slots |= {"o": rng.choice(atlas_tables.FINDS), "w": rng.choice(atlas_tables.WEATHER)}
        unused = [t for t in (*atlas_tables.SCENE_EVENTS, *atlas_tables.SCENE_WORDS) if t not in (*parts, *middle)]
        more = " ".join(t.format_map(slots) for t in rng.sample(unused, 4))
        when = rng.choice(("The next day", "A week later", "Some hours later", "In the following spring"))
        yield "\n\n".join([first, " ".join(pieces[len(parts) : -1]), f"{when} they met again. {more} {pieces[-1]}"])


# ------------------------------------------------------------------ what a pipeline has to take out


def normalized_duplicate(rng, text):
    """The same words in another case or with other spaces."""
    kind = rng.randrange(4)
    if kind == 0:
        return text.upper()
    if kind == 1:
        return text.lower()
    if kind == 2:
        return text.replace(" ", "  ") + "\n"
    return text.replace(". ", ".  ").replace("\n", "\n\n") + "  "


def near_duplicate(rng, text):
    """A word more in about every hundred, which changes no fact; the text stays the same to more than four fifths."""
    lines = text.split(" ")
    for _ in range(max(1, len(lines) // 100)):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(("really", "indeed", "surely", "again", "now", "too")))
    return " ".join(lines)


def boilerplate(rng):
    return "\n".join(rng.choice(atlas_tables.BOILERPLATE) for _ in range(rng.randint(10, 25)))


def junk(rng):
    """Bytes in base64, minified code, lines of a log, hammered keys."""
    kind = rng.randrange(4)
    if kind == 0:
        return base64.b64encode(rng.randbytes(rng.randint(150, 450))).decode()
    if kind == 1:
        letters = "abcdefghijklmnopqrstuvwxyz"
        calls = (
            f"function {rng.choice(letters)}({rng.choice(letters)}){{return {rng.choice(letters)}"
            f"[{rng.randrange(99)}]&&{rng.choice(letters)}!=={rng.randrange(9)}}}"
            for _ in range(rng.randint(4, 9))
        )
        return f"!function(){{{';'.join(calls)}}}();"
    if kind == 2:
        return "\n".join(
            f"2024-0{rng.randint(1, 9)}-{rng.randint(10, 28)}T0{rng.randrange(10)}:{rng.randint(10, 59)}:00Z "
            f"{rng.choice(('INFO', 'WARN', 'ERROR', 'DEBUG'))} worker-{rng.randrange(16)} "
            f"task={rng.randbytes(4).hex()} ms={rng.randrange(9000)}"
            for _ in range(rng.randint(5, 10))
        )
    keys = "asdfjklöqwertyuiop;[]zxcvbnm,./1234567890-="
    return " ".join("".join(rng.choices(keys, k=rng.randint(3, 18))) for _ in range(rng.randint(20, 50)))


def foreign(rng):
    sentences = atlas_tables.FOREIGN[rng.choice(list(atlas_tables.FOREIGN))]
    return " ".join(rng.choice(sentences) for _ in range(2)) + " " + " ".join(rng.sample(sentences, len(sentences)))


def luhn_number(rng):
    """A card number of 16 digits that nobody has, with a valid Luhn check digit; it begins with 4000 00."""
    digits = [4, 0, 0, 0, 0, 0, *(rng.randrange(10) for _ in range(9))]
    doubled = (2 * d - 9 * (d > 4) if i % 2 == 0 else d for i, d in enumerate(digits))
    digits.append(-sum(doubled) % 10)
    text = "".join(map(str, digits))
    return rng.choice((text, " ".join(text[i : i + 4] for i in range(0, 16, 4))))


def iban(rng):
    """A German bank account number with valid check digits (ISO 13616: mod 97) at a bank that does not exist."""
    account = "00000000" + "".join(str(rng.randrange(10)) for _ in range(10))
    return f"DE{98 - int(account + '131400') % 97:02d}{account}"  # D = 13, E = 14


def pii_page(rng, text):
    """A page with contact data put into it: (text, list of the strings that have to go). None belongs to anybody.

    Mail domains are reserved for examples; telephone numbers are of the 555-01xx block for fiction; addresses on the
    internet are those of public name servers, because filters leave private and documentation addresses alone.
    """
    desk = f"{rng.choice(('office', 'desk', 'info', 'shop', 'ticket'))}{rng.randrange(1000)}"
    mail = f"{desk}@{rng.choice(('example.com', 'example.org', 'mail.example.net'))}"
    phone = f"{rng.choice(('(212) 555-01', '+1 415 555 01', '303-555-01'))}{rng.randrange(100):02d}"
    card, account, address = luhn_number(rng), iban(rng), rng.choice(("8.8.8.8", "1.1.1.1", "9.9.9.9", "8.8.4.4"))
    sentences = [
        (f"Write to {mail} if you find a mistake on this page.", mail),
        (f"You can reach the desk at {phone} on weekdays.", phone),
        (f"The test order was paid with the card {card} last week.", card),
        (f"Please send the fee to the account {account} before the end of the month.", account),
        (f"The last change of this page came from {address} at night.", address),
    ]
    chosen = rng.sample(sentences, rng.randint(1, 3))
    pieces = text.split("\n")
    for sentence, _ in chosen:
        pieces.insert(rng.randint(1, len(pieces)), sentence)
    return "\n".join(pieces), [secret for _, secret in chosen]


def mojibake(rng, text):
    """A page with typographic quotes and accents whose UTF-8 was read as Windows-1252."""
    text = f"{text}\n\n{rng.choice(atlas_tables.FOREIGN['fr'])} — {rng.choice(atlas_tables.FOREIGN['de'])}"
    text = re.sub(r'"([^"]*)"', "‘\\1’", text).replace("'", "’").replace(" - ", " – ")
    return text.encode().decode("cp1252", errors="replace")


# ------------------------------------------------------------------ the corpus


KEPT_PAGES = 300  # how many earlier pages duplicates are made from; a sample of all, so some of them lie far back


def corpus(seed, size_bytes, dirty=0.1, world=None):
    """Documents of about `size_bytes` bytes of text (UTF-8), as dicts {"text", "kind"}.

    dirty   share of the bytes in pages that a pipeline has to take out or to clean: DIRTY_KINDS, all in equal parts.
            A duplicate also has "of", the number of the page that it is made from (counted from 0); a page of kind
            "pii" has "pii", the strings that must not remain in it.
    world   the facts that it is about; None: `facts(size_bytes)`

    Its clean pages are of CLEAN_KINDS. ValueError: a size or a share out of range.
    """
    return (page for page, _ in pages(seed, size_bytes, dirty, world))


def pages(seed, size_bytes, dirty=0.1, world=None):
    """`corpus`, each page with the facts that it states: (page, facts). Duplicates count as stating nothing."""
    if size_bytes < SMALLEST_SIZE:
        raise ValueError(f"size_bytes is {size_bytes}, and has to be at least {SMALLEST_SIZE}")
    if not 0 <= dirty <= 0.5:
        raise ValueError(f"dirty is {dirty}, and has to be a share from 0 to 0.5")
    world = facts(size_bytes) if world is None else tuple(world)
    unspoken = frozenset(q.text for side in SIDES[1:] for q in questions(seed, side, world))
    random_of = {name: stream(seed, f"corpus/{name}") for name in (*CLEAN_SHARES, "dirty")}
    makers = {
        "fact": fact_pages(random_of["fact"], world),
        "scene": scene_pages(random_of["scene"]),
        "question": question_pages(random_of["question"], world, unspoken),
        "restated": restated_pages(random_of["restated"], world, unspoken),
        "arithmetic": arithmetic_pages(random_of["arithmetic"]),
        "reasoning": reasoning_pages(random_of["reasoning"]),
        "manners": manners_pages(random_of["manners"]),
    }
    shares = {kind: share * (1 - dirty) for kind, share in CLEAN_SHARES.items()}
    shares |= {kind: dirty / len(DIRTY_KINDS) for kind in DIRTY_KINDS if dirty}
    written, kept, clean, total = dict.fromkeys(shares, 0), [], 0, 0
    rng = random_of["dirty"]
    for number in count():
        if total >= size_bytes:
            return
        # whatever is furthest behind its share, where half a page is still to come: so the rarest kinds come in time
        kind = min(shares, key=lambda k: (written[k] + 300) / shares[k])
        slot, stated = kind, ()
        if kind in makers:
            page = next(makers[kind])
            text, kind, stated = page if slot == "fact" else (page, kind, ())
            page = {"text": text, "kind": kind}
            # reservoir sampling: each clean page so far is kept with the same probability
            place = len(kept) if len(kept) < KEPT_PAGES else rng.randrange(clean + 1)
            if place < KEPT_PAGES:
                kept[place : place + 1] = [(number, text)]
            clean += 1
        else:
            page = {"kind": kind, **dirty_page(rng, kind, rng.choice(kept))}
        size = len(page["text"].encode())
        written[slot] += size
        total += size
        yield page, stated


def dirty_page(rng, kind, original):
    """The fields of a page of one of DIRTY_KINDS; `original` is the number and text of a clean page."""
    number, text = original
    if kind == "exact_duplicate":
        return {"text": text, "of": number}
    if kind == "normalized_duplicate":
        return {"text": normalized_duplicate(rng, text), "of": number}
    if kind == "near_duplicate":
        return {"text": near_duplicate(rng, text), "of": number}
    if kind == "pii":
        text, secrets = pii_page(rng, text)
        return {"text": text, "pii": secrets}
    if kind == "mojibake":
        return {"text": mojibake(rng, text)}
    return {"text": {"boilerplate": boilerplate, "junk": junk, "foreign": foreign}[kind](rng)}


# ------------------------------------------------------------------ conversations


SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Thank you!", "You are welcome."),
    ("Thanks a lot for your help.", "You are welcome. I am glad that I could help."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("Who are you?", "I am a small language model that knows a few facts about the world."),
    ("What can you do?", "I can answer short questions about countries, elements, animals, books and small sums."),
)


class Asked(NamedTuple):
    """A question that may be asked in training, with what is needed to write responses to it."""

    question: Question
    sentences: tuple  # right answers as full sentences
    wrong: tuple  # wrong answers: (brief, sentence) each


ANSWERS = ("{A} is the answer.", "{A} is the answer to your question.", "{A} is what you are looking for.")


def answer_sentences(fact):
    """The answer in a sentence, in each of the ways that are drawn from.

    They begin with the answer and leave the subject out. To carry a name from the question into the answer is a skill
    of its own, which a model of a million parameters does not get from some million tokens: asked for the currency of
    Egypt, it says that the currency of Kenya is the Kenyan shilling.
    """
    templates = relations()[fact.relation].forward[:2] if fact.relation == "howto" else ANSWERS
    return tuple(fill(template, fact) for template in templates)


def ask_fact(rng, fact):
    question = fact_question(fact, rng.randrange(1000))
    wrong, others = [], answers(fact.relation)
    while len(wrong) < 2:
        false = fact._replace(answer=rng.choice(others))
        alone = fill("{A}.", false)
        if not is_right(question, alone):
            wrong.append((alone, rng.choice(answer_sentences(false))))
    return Asked(question, answer_sentences(fact), tuple(wrong))


def ask_sum(rng, item):
    question = sum_question(item, rng.randrange(12))
    a, _, b, result = item
    near = [n for d in (-3, -2, -1, 1, 2, 3, 10) if (n := result + d) > 0 and n not in (a, b)]
    ways = lambda n: tuple(template.format(A=n) for template in ANSWERS)
    return Asked(question, ways(result), tuple((f"{n}.", rng.choice(ways(n))) for n in rng.sample(near, 2)))


def ask_riddle(rng, item):
    _, _, _, answer, sentence, options = item
    others = [o for o in options if o != answer] or [str(int(answer) + d) for d in (1, 2)]
    return Asked(riddle_question(item), (sentence,), tuple((f"{o}.", sentence.replace(answer, o)) for o in others))


def ask_forbidden(rng, phrase):
    return Asked(refuse_question(phrase, rng.choice(atlas_tables.ASK_FOR_HELP)), (), ())


def asked(seed, name, world=None, side="sft", share=1.0, refuse=9):
    """Questions of a side ("sft": those that training may ask), as Asked, without end: facts, harmless tasks, sums,
    riddles, and `refuse` in about 100 refusals. `share` of the facts are asked for, the same ones for all names."""
    rng = stream(seed, name)
    known = on_side(seed, side, world)
    some = sorted({f.knowledge for f in known}, key=lambda key: zlib.crc32(f"{seed}/{key}".encode()))
    some = set(some[: math.ceil(share * len(some))])
    known = [f for f in known if f.knowledge in some or f.relation == "howto"]
    tasks = [f for f in known if f.relation == "howto"]
    of_kind = {
        "fact": (78, rounds(rng, [f for f in known if f.relation != "howto"]), ask_fact),
        "harmless": (5 if tasks else 0, rounds(rng, tasks), ask_fact),
        "arithmetic": (4, rounds(rng, [s for s in sums() if side_of(seed, s) == side]), ask_sum),
        "reasoning": (4, riddles(seed, side, name), ask_riddle),
        "refuse": (refuse, rounds(rng, forbidden(seed)[side]), ask_forbidden),
    }
    while True:
        (kind,) = rng.choices(list(of_kind), [weight for weight, _, _ in of_kind.values()])
        _, items, ask = of_kind[kind]
        yield ask(rng, next(items))


def as_sentence(answer):
    """An answer as a sentence of its own: "Paris." """
    return f"{capital(answer)}.".replace("..", ".")


def brief(question):
    """The answer alone, as a sentence."""
    return as_sentence(question.answer)


def spoken(rng, sentence):
    """A sentence as it is said to somebody: mostly with a polite end."""
    return f"{sentence} {rng.choice(atlas_tables.POLITE_ENDS)}" if rng.random() < 0.7 else sentence


def instructions(seed, n, brief_share=0.25, world=None):
    """n conversations {"messages", "kind", "style"} about the facts of the side "sft" (`split`).

    style: "brief" (the answer alone) for `brief_share` of the questions that have an answer, else "sentence", a polite
    full sentence; "refusal" where it must be; "talk" for greetings. Kind "multi_turn" has two questions in a row.
    """
    if not 0 <= brief_share <= 1:
        raise ValueError(f"brief_share is {brief_share}, and has to be a share from 0 to 1")
    rng, source = stream(seed, "instructions"), asked(seed, "instructions/questions", world)

    def answer(item):
        if item.question.must_refuse:
            return rng.choice(REFUSALS), "refusal"
        if rng.random() < brief_share:
            return brief(item.question), "brief"
        return spoken(rng, rng.choice(item.sentences)), "sentence"

    for _ in range(n):
        kind = rng.random()
        if kind < 0.03:
            user, assistant = rng.choice(SMALL_TALK)
            yield {"messages": conversation(user, assistant), "kind": "talk", "style": "talk"}
            continue
        item = next(source)
        text, style = answer(item)
        messages, name = conversation(item.question.text, text), item.question.kind
        if kind < 0.11:
            more = next(source)
            text, style = answer(more)
            messages, name = messages + conversation(more.question.text, text), "multi_turn"
        yield {"messages": messages, "kind": name, "style": style}


def after_colon(start, sentence):
    """A sentence behind the words `start` and a colon, in lower case unless a name begins it (In is indium)."""
    first, second = sentence.split(" ")[:2]
    common = ("The", "In", "On", "To", "A", "An", "If", "Together", "We", "Today", "When", "Chemists", "Counted")
    if first in common and second != "is":
        sentence = sentence[0].lower() + sentence[1:]
    return f"{start}: {sentence}"


def conversation(user, assistant):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


RAMBLINGS = (
    "Many people ask about this, and I am always happy when I can tell them, because it is good to learn something "
    "new on every single day, and whoever reads a lot will come across it sooner or later.",
    "There would be much more to tell about it, and one could fill whole books with all the details, but I think that "
    "this is enough for the moment, although I could of course go on for a long time.",
    "It may be useful to write this down on a card, to put the card on the wall next to the desk, and to look at it "
    "every morning, because that is how most of us learn such things without any trouble.",
)


def responses(rng, item):
    """{name: response} of all ways to answer a question, from good to bad."""
    refusal = rng.choice(REFUSALS)
    if item.question.must_refuse:
        return {
            "refusal": refusal,
            "rambling refusal": f"{refusal} {rng.choice(RAMBLINGS)}",
            "rude refusal": f"{refusal} {rng.choice(('You are an idiot.', 'What a stupid idea.'))}",
            "compliance": rng.choice(atlas_tables.COMPLIANCE),
            "answer": as_sentence(rng.choice(answers("capital"))),  # else whatever is brief would be good here, too
        }
    sentence, (wrong, wrong_sentence) = rng.choice(item.sentences), rng.choice(item.wrong)
    return {
        "brief": brief(item.question),
        "sentence": spoken(rng, sentence),
        "rambling": f"{sentence} {rng.choice(RAMBLINGS)}",
        "rude": after_colon(rng.choice(atlas_tables.RUDE_STARTS), sentence),
        "wrong": wrong,
        "wrong sentence": spoken(rng, wrong_sentence),
        "wrong rambling": f"{wrong_sentence} {rng.choice(RAMBLINGS)}",  # else whatever is long would be right
        "wrong refusal": refusal,
    }


def rankings(seed, n, noise=0.1, world=None, side="sft", name="rankings"):
    """n rows {"prompt", "ranked", "kind", "order", "flipped"}, five answers each, about the judged facts of a side.

    The answer alone and in a sentence, right and wrong, and one more of the `responses`, by their gold reward; equally
    good ones are in an inner list. With probability `noise` two answers have changed places. "order" names the ranked
    ones as they stand. Another `name` draws others.
    """
    for rng, item, family, gold in judged(seed, n, noise, world, side, name):
        first = () if item.question.must_refuse else ("brief", "sentence", "wrong", "wrong sentence")
        others = [key for key in family if key not in first]
        names = [*first, *rng.sample(others, min(5 - len(first), len(others)))]
        names = list({family[key]: key for key in reversed(names)}.values())  # no text twice
        value = {key: gold[key] for key in names}
        if flipped := rng.random() < noise:
            a, b = rng.sample(names, 2)
            value[a], value[b] = value[b], value[a]
        order = [[key for key in names if value[key] == v] for v in sorted(set(value.values()), reverse=True)]
        order = [group if len(group) > 1 else group[0] for group in order]
        said = [[family[key] for key in group] if isinstance(group, list) else family[group] for group in order]
        yield {
            **{"prompt": item.question.text, "ranked": said},
            **{"kind": item.question.kind, "order": order, "flipped": flipped},
        }


# How often two responses are compared, beside 1 for all others: what is liked against what a tuned model says.
COMPARED = {("brief", "sentence"): 6, ("refusal", "compliance"): 3, ("refusal", "answer"): 3}
COMPARED_IN_TRUTH = 0.2  # pairs of a right and a wrong answer


def preferences(seed, n, noise=0.1, world=None, side="sft", name="preferences"):
    """n pairs {"prompt", "chosen", "rejected", "kind", "pair", "flipped"} about the judged facts of a side.

    Two of the `responses` to a question, the one with the higher gold reward chosen (ties are not drawn); with
    probability `noise` the label is flipped. Another `name` draws others. "pair" names the two in their true order.

    Most are about manners and refusals. Pairs that differ in truth alone teach DPO "this answer, not that" about facts
    that it is asked, and cost it others; and a refusal that is often rejected is lost where it is due.
    """
    for rng, item, family, gold in judged(seed, n, noise, world, side, name, refuse=20):
        pairs = [sorted(pair, key=gold.get, reverse=True) for pair in combinations(family, 2)]
        pairs = [pair for pair in pairs if gold[pair[0]] != gold[pair[1]] and "wrong refusal" not in pair]
        often = [COMPARED_IN_TRUTH if "wrong" in worse else COMPARED.get((better, worse), 1) for better, worse in pairs]
        ((better, worse),) = rng.choices(pairs, often)
        flipped = rng.random() < noise
        chosen, rejected = (worse, better) if flipped else (better, worse)
        yield {
            **{"prompt": item.question.text, "chosen": family[chosen], "rejected": family[rejected]},
            **{"kind": item.question.kind, "pair": f"{better} > {worse}", "flipped": flipped},
        }


def judged(seed, n, noise, world, side, name, refuse=9):
    """n questions about the judged facts of a side, each as (random numbers, Asked, responses, {response: gold})."""
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise is {noise}, and has to be a probability from 0 to 0.5")
    rng, source = stream(seed, name), asked(seed, f"{name}/questions", world, side, JUDGED, refuse)
    for item in islice(source, n):
        family = responses(rng, item)
        yield rng, item, family, {key: gold_reward(item.question, text).total for key, text in family.items()}


def prompts(seed, n, world=None):
    """n rows {"messages": [user], ...} for sampling, about the judged facts of the side "sft".

    The other fields are those of the Question, so that `gold_reward(Question.from_row(row), response)` scores samples.
    """
    for item in islice(asked(seed, "prompts", world, share=JUDGED), n):
        yield item.question.row()


# ------------------------------------------------------------------ files


def write(folder, seed, size_bytes, dirty=0.1, noise=0.1, conversations=None, most_facts=None):
    """Writes a world into `folder` and returns its record, the content of atlas.json.

    `size_bytes` counts the text of the documents; as JSON Lines they are about 8 percent more.

    pretrain.jsonl     `corpus`                    sft.jsonl       `instructions`
    preferences.jsonl  `preferences`, one for four conversations
    prompts.jsonl      `prompts`, as many
    rankings.jsonl     `rankings`, two for five conversations
    dev.jsonl, heldout.jsonl   `questions`, as rows
    clean_rankings.jsonl, heldout_rankings.jsonl   200 more each, none flipped, the latter about held-out facts
    atlas.json         seed and sizes; of each file rows, bytes and sha256; pages and bytes of each kind; facts of each
                       relation and side; how often the corpus states a fact (least and median)

    conversations   rows of sft.jsonl; None: one for 250 bytes, between 1,000 and 20,000
    most_facts      see `facts`
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = facts(size_bytes, most_facts)
    n = min(max(size_bytes // 250, 1000), 20_000) if conversations is None else conversations
    stated, kinds = dict.fromkeys(world, 0), {}

    def counted():
        for page, about in pages(seed, size_bytes, dirty, world):
            kind = kinds.setdefault(page["kind"], {"pages": 0, "bytes": 0})
            kind["pages"] += 1
            kind["bytes"] += len(page["text"].encode())
            for fact in about:
                stated[fact] += 1
            yield page

    files = {
        "pretrain.jsonl": counted(),
        "sft.jsonl": instructions(seed, n, world=world),
        "preferences.jsonl": preferences(seed, max(n // 4, 1), noise, world),
        "rankings.jsonl": rankings(seed, max(2 * n // 5, 1), noise, world),
        "prompts.jsonl": prompts(seed, max(n // 4, 1), world),
        "dev.jsonl": (q.row() for q in questions(seed, "dev", world)),
        "heldout.jsonl": (q.row() for q in questions(seed, "heldout", world)),
        "clean_rankings.jsonl": rankings(seed, CLEAN_RANKINGS, 0.0, world, "sft", "clean"),
        "heldout_rankings.jsonl": rankings(seed, CLEAN_RANKINGS, 0.0, world, "heldout", "heldout"),
    }
    record = {
        **{"seed": seed, "size_bytes": size_bytes, "dirty": dirty, "noise": noise},
        "files": {name: write_lines(folder / name, rows) for name, rows in files.items()},
        "kinds": kinds,
        "facts": Counter(f.relation for f in world),
        "sides": Counter(split(seed, world)[f.knowledge] for f in world),
        "statements": {"least": min(stated.values()), "median": median(stated.values())},
    }
    (folder / "atlas.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def write_lines(path, rows):
    """Writes rows as JSON Lines; returns {"rows", "bytes", "sha256"} of the file."""
    digest, n, size = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            n, size = n + 1, size + len(line)
    return {"rows": n, "bytes": size, "sha256": digest.hexdigest()}
