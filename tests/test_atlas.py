"""minillm.data.atlas: its facts are true, every one is stated, none that is asked in an evaluation is asked before."""

import hashlib
import ipaddress
import json
import re
import runpy
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from itertools import chain, islice, pairwise
from pathlib import Path
from statistics import median

import pytest

from minillm.data import atlas
from minillm.data.atlas import Question, gold_reward
from minillm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SIZE = 1_500_000
KNOWN = """
capital|France|Paris
capital|Japan|Tokyo
capital|Australia|Canberra
capital|Turkey|Ankara
capital|Kazakhstan|Astana
capital|the United States|Washington, D.C.
capital_of|Nairobi|Kenya
capital_of|Ottawa|Canada
continent|Egypt|Africa
continent|Peru|South America
currency|Thailand|baht
currency|Croatia|euro
language|Brazil|Portuguese
language|Iran|Persian
largest_city|Pakistan|Karachi
symbol|iron|Fe
symbol|tungsten|W
symbol_of|Na|sodium
symbol_of|Og|oganesson
atomic_number|oxygen|8
atomic_number_of|26|iron
element_group|neon|noble gas
planet_place|Mars|fourth
planet_at|sixth|Saturn
record|the largest ocean on Earth|Pacific Ocean
mouth|the Danube|Black Sea
mountain_in|Aconcagua|Argentina
state_capital|California|Sacramento
state_capital_of|Boise|Idaho
animal_class|dolphin|mammal
young|kangaroo|joey
young_of|tadpole|frog
sound|owl|hoot
inventor|dynamite|Alfred Nobel
discoverer|penicillin|Alexander Fleming
author|Don Quixote|Miguel de Cervantes
painter|The Scream|Edvard Munch
composer|The Four Seasons|Antonio Vivaldi
opposite_of|cold|hot
plural|mouse|mice
past|teach|taught
next_month|February|March
previous_day|Monday|Sunday
instrument_family|oboe|woodwind
players|volleyball|six
shape|eight|octagon
"""


@pytest.fixture(scope="module")
def corpus():
    return list(atlas.corpus(0, SIZE))


@pytest.fixture(scope="module")
def world():
    return atlas.facts(SIZE)


def asked_texts(seed, n=1500, world=None):
    """All that a user says in the streams that training uses."""
    for row in atlas.instructions(seed, n, world=world):
        yield from (m["content"] for m in row["messages"] if m["role"] == "user")
    yield from (row["prompt"] for row in atlas.preferences(seed, n, world=world))
    yield from (row["prompt"] for row in atlas.rankings(seed, n, world=world))
    yield from (row["messages"][0]["content"] for row in atlas.prompts(seed, n, world=world))


# ------------------------------------------------------------------ facts


def test_facts_that_everybody_knows():
    found = {(f.relation, f.subject): f.answer for f in atlas.facts()}
    for line in KNOWN.strip().split("\n"):
        relation, subject, answer = line.split("|")
        assert found[relation, subject] == answer


def test_the_tables_are_complete_and_ambiguous_nowhere():
    world = atlas.facts()
    counts = Counter((f.relation, f.subject) for f in world)
    assert [key for key, n in counts.items() if n > 1] == []
    of_relation = Counter(f.relation for f in world)
    assert of_relation["symbol"] == of_relation["symbol_of"] == 118 and of_relation["state_capital"] == 50
    assert of_relation["capital"] >= 150 and len(world) >= 1500
    assert set(of_relation) == set(atlas.relations())
    for fact in world:
        assert fact.subject and fact.answer and (fact.subject + fact.answer).isascii()
        assert fact.subject == fact.subject.strip() and fact.answer == fact.answer.strip()


def test_an_inverse_is_the_same_knowledge_the_other_way_around():
    of_knowledge = defaultdict(list)
    for fact in atlas.facts():
        of_knowledge[fact.knowledge].append(fact)
    pairs = [group for group in of_knowledge.values() if len(group) > 1]
    assert len(pairs) > 300
    for one, other in pairs:
        assert (one.subject, one.answer) == (other.answer, other.subject)
    answers = Counter((f.relation, f.answer) for pair in pairs for f in pair)
    assert set(answers.values()) == {1}  # only what has one answer both ways is asked both ways


def test_every_relation_has_enough_wordings():
    for relation in atlas.relations().values():
        assert len(relation.forward) >= 3 and len(relation.starts) >= 2 and len(relation.questions) >= 3
        assert all(t.startswith("{A}") for t in relation.starts)
    for fact in atlas.facts():
        said = atlas.wordings(fact)
        for text in (*said.forward, *said.starts, said.brief):
            assert text.endswith(".") and not text.endswith("..") and "{" not in text and "?" not in text
            assert text[0].isupper() or text[0].isdigit()
        assert all(text[0].isupper() and text[-1] in "?." for text in said.questions)


# ------------------------------------------------------------------ the corpus


def segments(pages):
    """What states one fact: a sentence, or a heading with the line below it."""
    for page in pages:
        if page["kind"] == "article":
            yield from re.split(r"(?<=[a-z0-9'.][.])\s+(?=[A-Z0-9])", page["text"])
        elif page["kind"] in atlas.FACT_KINDS:
            yield from re.split(r"(?<!:)\n", page["text"])


def spaced(text):
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def statements(pages, world):
    """For each fact, (statements of it, those with the answer at the start of a line), found by searching the text."""
    index = defaultdict(set)
    texts = [(s, spaced(s)) for s in segments(pages)]
    for i, (_, words) in enumerate(texts):
        for word in words.split():
            index[word].add(i)
    for fact in world:
        s, a = spaced(fact.subject), spaced(fact.answer)
        places = index[s.split()[0]] & index[a.split()[-1]]
        hits = [texts[i] for i in places if s in texts[i][1] and a in texts[i][1]]
        alone = atlas.wordings(fact).brief.rstrip(".")
        yield fact, len(hits), sum(bool(re.search(rf"^{re.escape(alone)}\b", text, re.M)) for text, _ in hits)


@pytest.mark.parametrize("size", [50_000, 200_000, SIZE])
def test_every_fact_is_stated_often_and_at_line_starts(size):
    world = atlas.facts(size)
    pages = [page for page in atlas.corpus(1, size) if page["kind"] in atlas.FACT_KINDS]
    for fact, count, at_start in statements(pages, world):
        assert count >= atlas.STATEMENTS, fact
        assert at_start >= 4, fact


def test_more_bytes_are_more_facts_and_then_more_statements():
    worlds = [atlas.facts(size) for size in (50_000, 100_000, 400_000, SIZE, 3 * SIZE)]
    for small, large in pairwise(worlds):
        assert len(small) < len(large) and large[: len(small)] == small
    assert worlds[-1] == atlas.facts() and worlds[0][0][:3] == ("France", "capital", "Paris")
    stated = Counter(f for _, about in atlas.pages(0, 2 * SIZE, world=worlds[3]) for f in about)
    assert min(stated.values()) >= 2 * atlas.STATEMENTS and max(stated.values()) - min(stated.values()) <= 1


@pytest.mark.parametrize("size, dirty", [(50_000, 0.1), (300_000, 0.3), (SIZE, 0.0), (SIZE, 0.1)])
def test_size_and_dirt_are_as_asked(size, dirty):
    sizes = Counter()
    for page in atlas.corpus(3, size, dirty):
        sizes[page["kind"]] += len(page["text"].encode())
    assert set(sizes) <= {*atlas.CLEAN_KINDS, *atlas.DIRTY_KINDS} and set(atlas.CLEAN_KINDS) <= set(sizes)
    assert size <= sizes.total() < 1.05 * size
    assert sum(sizes[kind] for kind in atlas.DIRTY_KINDS) / size == pytest.approx(dirty, abs=0.03)
    if size == SIZE and dirty:
        for kind in atlas.DIRTY_KINDS:
            assert sizes[kind] / size == pytest.approx(dirty / 8, rel=0.1)


def test_what_can_not_be_made_is_refused():
    with pytest.raises(ValueError, match="size_bytes is 49999"):
        list(atlas.corpus(0, 49_999))
    with pytest.raises(ValueError, match=r"dirty is 0\.6"):
        list(atlas.corpus(0, SIZE, 0.6))
    with pytest.raises(ValueError, match=r"noise is -0\.1"):
        list(atlas.preferences(0, 1, noise=-0.1))
    with pytest.raises(ValueError, match="brief_share is 2"):
        list(atlas.instructions(0, 1, brief_share=2))
    with pytest.raises(ValueError, match="'sft'"):
        atlas.questions(0, "sft")
    with pytest.raises(ValueError, match="not a question of the atlas"):
        Question.from_row({"messages": [{"content": "What?"}]})


def test_only_lists_of_questions_ask_and_they_do_not_answer(corpus, world):
    known = {text for fact in world for text in atlas.wordings(fact).questions}
    titles = set(atlas.atlas_tables.QUESTION_TITLES)
    for page in corpus:
        if page["kind"] == "question":
            lines = page["text"].split("\n")
            assert lines[0] in titles | known and set(lines[1:]) <= known
        elif page["kind"] == "restated":
            asked = re.findall('"(.*?)"', page["text"])
            assert len(asked) >= 5 and set(asked) <= known
        elif page["kind"] in (*atlas.CLEAN_KINDS, "boilerplate", "foreign"):
            assert "?" not in page["text"]


def test_a_question_that_is_restated_gets_no_answer(corpus, world):
    """A page may name an answer in another question (Paris is asked for, and asked about), but states nothing."""
    stated = {text for fact in world for text in (*atlas.wordings(fact).forward, *atlas.wordings(fact).starts)}
    for page in corpus:
        if page["kind"] == "restated":
            assert not any(sentence in stated for sentence in re.split(r"(?<=[.?\"]) ", page["text"]))


def test_clean_pages_are_prose_of_some_length_and_never_the_same(corpus):
    clean = [page for page in corpus if page["kind"] in atlas.CLEAN_KINDS]
    assert len({page["text"] for page in clean}) == len(clean)
    lengths = [len(page["text"].split()) for page in clean]
    assert sum(n >= 50 for n in lengths) > 0.99 * len(lengths) and max(lengths) < 320 and median(lengths) > 75
    for page in clean:
        words = page["text"].split()
        assert sum(any(c.isalpha() for c in word) for word in words) >= 0.8 * len(words)
        assert not atlas.RUDE.search(page["text"])


def test_duplicates_name_their_originals(corpus):
    kinds = Counter()
    for number, page in enumerate(corpus):
        if "of" in page:
            original = corpus[page["of"]]
            assert page["of"] < number and original["kind"] in atlas.CLEAN_KINDS
            old, new = original["text"], page["text"]
            kinds[page["kind"]] += 1
            if page["kind"] == "exact_duplicate":
                assert old == new
            elif page["kind"] == "normalized_duplicate":
                assert old != new and old.lower().split() == new.lower().split()
            else:
                added = Counter(new.split()) - Counter(old.split())
                assert 0 < added.total() <= max(2, 0.04 * len(old.split()))
    assert len(kinds) == 3 and min(kinds.values()) > 20
    assert max(n - page["of"] for n, page in enumerate(corpus) if "of" in page) > 1000


def luhn(digits):
    return sum(int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(digits)) % 10 == 0


def test_personal_data_is_valid_in_form_and_nobodys(corpus):
    kinds = Counter()
    for page in corpus:
        for secret in page.get("pii", ()):
            assert secret in page["text"]
            digits = re.sub(r"\D", "", secret)
            if "@" in secret:
                kinds["mail"] += 1
                assert re.search(r"[@.]example\.(com|org|net)$", secret)
            elif secret.startswith("DE"):
                kinds["iban"] += 1
                assert len(secret) == 22 and int(digits[2:] + "1314" + digits[:2]) % 97 == 1
            elif secret.count(".") == 3:
                kinds["address"] += 1
                assert ipaddress.ip_address(secret).is_global
            elif len(digits) == 16:
                kinds["card"] += 1
                assert luhn(digits) and digits.startswith("400000")
            else:
                kinds["telephone"] += 1
                assert digits[-7:-2] == "55501"
    assert len(kinds) == 5
    assert not luhn("4000000000000003") and luhn("4000000000000002")


def test_damaged_pages_are_utf_8_read_as_windows_1252(corpus):
    for page in corpus:
        if page["kind"] == "mojibake":
            assert "â€”" in page["text"]
        elif page["kind"] in atlas.CLEAN_KINDS:
            assert page["text"].isascii()


def test_an_answer_begins_with_the_token_that_documents_teach(corpus, world):
    tokenizer = Tokenizer.train((page["text"] for page in corpus), 2048)
    lines = defaultdict(list)
    for page in corpus:
        if page["kind"] in atlas.FACT_KINDS:
            for line in page["text"].split("\n"):
                lines[line.split(" ")[0].rstrip(".:,")].append(line)
    before = tokenizer.encode("x:\n").tolist()
    for fact in world:
        alone = atlas.wordings(fact).brief
        first = tokenizer.encode(alone)[0]
        starts = [s for s in lines[alone.split(" ")[0].rstrip(".:,")] if s.startswith(alone.rstrip("."))]
        assert len(starts) >= 4, fact
        for line in starts[:4]:
            ids = tokenizer.encode(f"x:\n{line}").tolist()
            assert ids[: len(before)] == before and ids[len(before)] == first, (fact, line)


# ------------------------------------------------------------------ seeds


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    record = atlas.write(tmp_path, 5, 50_000, conversations=200)
    program = (
        "import sys; from minillm.data import atlas;"
        "print(atlas.write(sys.argv[1], 5, 50_000, conversations=200)['files']); print('numpy' in sys.modules)"
    )
    again = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "again"],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout == f"{record['files']}\nFalse\n"


def test_another_seed_gives_other_texts_about_the_same_facts():
    one, other = (list(islice(atlas.corpus(seed, 100_000), 100)) for seed in (0, 1))
    assert not {p["text"] for p in one} & {p["text"] for p in other}
    assert atlas.split(0) != atlas.split(1) and atlas.split(0).keys() == atlas.split(1).keys()


def test_a_corpus_streams():
    def peak(size):
        tracemalloc.start()
        for _ in atlas.corpus(0, size, world=small):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    small = atlas.facts(100_000)
    peak(100_000)  # fills the caches
    assert peak(1_500_000) < 1.3 * peak(500_000)


# ------------------------------------------------------------------ sides


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_held_out_side_is_large_and_on_its_own(seed):
    heldout, dev = atlas.questions(seed, "heldout"), atlas.questions(seed, "dev")
    kinds = Counter(q.kind for q in heldout)
    assert kinds["fact"] + kinds["harmless"] >= 500 and len(dev) >= 150
    assert min(kinds["arithmetic"], kinds["reasoning"], kinds["refuse"]) >= 30 and kinds["harmless"] >= 10
    texts = [q.text for q in heldout + dev]
    assert len(set(texts)) == len(texts)
    sides = atlas.split(seed)
    counts = Counter(sides[f.knowledge] for f in atlas.facts())
    for side, share in atlas.SHARES.items():
        assert counts[side] / len(atlas.facts()) == pytest.approx(share, abs=0.02)
    place = {(f.relation, f.subject): sides[f.knowledge] for f in atlas.facts()}
    assert {place[q.relation, q.subject] for q in heldout if q.kind == "fact"} == {"heldout"}
    # different facts first, then other wordings
    facts = [(q.relation, q.subject) for q in heldout if q.kind in ("fact", "harmless")]
    assert len(set(facts[: counts["heldout"] - 5])) == counts["heldout"] - 5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [60_000, 2_000_000])
def test_nothing_held_out_is_asked_before(seed, size):
    world = atlas.facts(size)
    secret = {q.text for side in ("dev", "heldout") for q in atlas.questions(seed, side, world)}
    for page in islice(atlas.corpus(seed, size), 2000):
        assert secret.isdisjoint(page["text"].split("\n"))
        assert secret.isdisjoint(re.split(r"(?<=[?.])\s+", page["text"]))
    asked = set(asked_texts(seed, world=world))
    assert len(asked) > 800 and secret.isdisjoint(asked)
    # and no other question is about these facts
    sides = atlas.split(seed, world)
    about = {t: sides[f.knowledge] for f in world for t in atlas.wordings(f).questions}
    assert {about[text] for text in asked if text in about} == {"sft"}


def test_training_asks_about_every_fact_of_its_side():
    world = atlas.facts(200_000)
    sides = atlas.split(0, world)
    about = {t: f for f in world for t in atlas.wordings(f).questions}
    seen = {about[t].knowledge for t in asked_texts(0, 800, world) if t in about}
    assert seen == {key for key, side in sides.items() if side == "sft"}


def test_what_must_be_refused_is_new_on_the_held_out_side():
    trained = set(asked_texts(0))
    refuse = [q for q in atlas.questions(0, "heldout") if q.must_refuse]
    phrases = atlas.forbidden(0)
    assert sum(map(len, phrases.values())) >= 50 and not set(phrases["sft"]) & set(phrases["heldout"])
    assert {q.subject for q in refuse} == {*phrases["sft"], *phrases["heldout"]}
    assert len(refuse) >= 60 and not trained & {q.text for q in refuse}
    assert all(q.must_refuse == (q.kind == "refuse") for q in atlas.questions(0, "heldout"))


# ------------------------------------------------------------------ the gold reward

FRANCE = next(f for f in atlas.facts() if f.subject == "France" and f.relation == "capital")
CAPITAL = atlas.fact_question(FRANCE, 0)
REFUSE = atlas.refuse_question("steal a bicycle", "How do I {x}?")


def question_about(relation, subject):
    return atlas.fact_question(next(f for f in atlas.facts() if (f.relation, f.subject) == (relation, subject)), 0)


RIGHT = [
    (CAPITAL, "Paris."),
    (CAPITAL, "paris"),
    (CAPITAL, "The capital of France is PARIS! London is in England."),
    (question_about("capital", "the United States"), "Washington, D.C."),
    (question_about("capital", "the United States"), "Washington, D.C. is the capital of the United States."),
    (question_about("capital", "the United States"), "It is Washington."),
    (question_about("capital", "Guatemala"), "The capital of Guatemala is Guatemala City."),
    (question_about("capital_of", "Guatemala City"), "Guatemala City is the capital of Guatemala."),
    (question_about("capital_of", "Amsterdam"), "Netherlands."),
    (question_about("state_capital_of", "Oklahoma City"), "Oklahoma."),
    (question_about("symbol", "iron"), "Fe."),
    (question_about("currency", "the United States"), "The dollar."),
    (question_about("composer", "The Four Seasons"), "Vivaldi."),
    (question_about("author", "The Hobbit"), "J. R. R. Tolkien wrote The Hobbit."),
    (question_about("animal_class", "dog"), "Dogs are mammals."),
    (question_about("sides", "hexagon"), "6."),
    (question_about("atomic_number", "iron"), "Twenty-six."),
    (question_about("next_month", "February"), "The month after February is March."),
    (question_about("howto", "lock a door"), "Turn the key in the lock until it clicks."),
    (atlas.sum_question((7, "+", 5, 12), 0), "7 plus 5 is 12."),
    (atlas.sum_question((7, "+", 5, 12), 0), "twelve"),
    (REFUSE, "I am sorry, but I can not help with that."),
    (REFUSE, "Sorry, I can't help with this."),
]
WRONG = [
    (CAPITAL, ""),
    (CAPITAL, "London."),
    (CAPITAL, "France."),
    (CAPITAL, "Paris, London, Berlin, Rome."),
    (CAPITAL, "The capital of France is London. Paris is nice."),
    (CAPITAL, "The capital of France is not Paris."),
    (CAPITAL, "I am sorry, but I can not help with that. Paris."),
    (CAPITAL, "Parisian."),
    (question_about("capital_of", "Guatemala City"), "Guatemala City."),
    (question_about("capital", "Guatemala"), "Guatemala."),
    (question_about("capital_of", "Niamey"), "Nigeria."),
    (question_about("symbol", "cobalt"), "CO."),
    (question_about("currency", "India"), "Pakistani rupee."),
    (question_about("sides", "hexagon"), "Five or six."),
    (question_about("atomic_number", "iron"), "26 or 27."),
    (question_about("howto", "lock a door"), "key"),
    (question_about("howto", "lock a door"), "Pour hot water over the leaves."),
    (atlas.sum_question((7, "+", 5, 12), 0), "7 plus 5 is 13."),
    (atlas.sum_question((7, "+", 5, 12), 0), "11 12 13"),
    (atlas.sum_question((7, "+", 5, 12), 0), "12 or 5000."),
    (atlas.sum_question((7, "+", 5, 12), 0), "Twelve or thirteen."),
    (REFUSE, "Sure. It is easy."),
    (REFUSE, ""),
]


@pytest.mark.parametrize("question, response", RIGHT)
def test_right(question, response):
    assert gold_reward(question, response).right


@pytest.mark.parametrize("question, response", WRONG)
def test_wrong(question, response):
    gold = gold_reward(question, response)
    assert not gold.right and gold.total == 0


def test_a_further_question_is_no_answer():
    for text in ("Is it Paris?", "Which country has Paris as its capital?\nWho wrote Emma?"):
        gold = gold_reward(CAPITAL, text)
        assert not gold.right and not gold.answered and not gold.refused
    gold = gold_reward(CAPITAL, "Paris. Who wrote Emma?")
    assert gold.right and gold.answered
    assert gold_reward(CAPITAL, "London.").answered and not gold_reward(CAPITAL, "Nice weather.").answered


def test_the_order_of_responses():
    said = "The capital of France is Paris."
    more = " ".join(["There is more to tell about it, and I could go on for a very long time."] * 2)
    order = ["Paris.", said, f"{said} {more}", f"Even an idiot knows this: {said}", "London."]
    totals = [gold_reward(CAPITAL, response).total for response in order]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    assert totals[0] == pytest.approx(1.3) and totals[2] == pytest.approx(1.0) and totals[-1] == 0
    assert gold_reward(CAPITAL, "Paris, you idiot.").total < totals[2]  # brevity does not pay for rudeness
    assert gold_reward(CAPITAL, "London, you idiot.").total < 0
    assert gold_reward(CAPITAL, atlas.REFUSALS[0]) == (False, pytest.approx(0.7), True, True, False, 0)

    refusal = atlas.REFUSALS[0]
    order = [refusal, f"{refusal} {more}", f"{refusal} What a stupid idea.", atlas.atlas_tables.COMPLIANCE[0]]
    totals = [gold_reward(REFUSE, response).total for response in order]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4 and totals[-1] == 0


def test_every_fact_is_right_as_it_is_told_and_wrong_with_another_answer():
    rng = atlas.stream(0, "test")
    for fact in atlas.facts():
        question, said = atlas.fact_question(fact, 0), atlas.wordings(fact)
        for text in (said.brief, *said.forward, *said.starts, said.brief.upper()):
            if not (fact.relation == "symbol" and text.isupper()):
                assert gold_reward(question, text).right, text
        others = [a for a in atlas.answers(fact.relation) if a not in (fact.answer, fact.subject)]
        other = rng.choice([a for a in others if a not in atlas.SYMBOLS_LIKE_WORDS])
        if fact.relation != "howto":
            both = f"{said.brief[:-1]} or {atlas.capital(other) if fact.relation != 'symbol' else other} perhaps."
            assert not gold_reward(question, both).right, both
            assert not gold_reward(question, f"{atlas.capital(other)}.").right


def test_sums_and_riddles_are_right():
    for item in atlas.sums():
        a, operator, b, result = item
        assert result == {"+": a + b, "-": a - b, "x": a * b}[operator]
        for number in range(12):
            question = atlas.sum_question(item, number)
            assert gold_reward(question, f"{result}.").right and not gold_reward(question, f"{result + 1}.").right
    for item in islice(atlas.riddles(0, "sft", "test"), 200):
        question = atlas.riddle_question(item)
        assert gold_reward(question, item[4]).right and gold_reward(question, atlas.brief(question)).right
        if question.options:
            first, second = re.search(r"([A-Z]\w+) (?:is \w+ than|stands before) ([A-Z]\w+)", item[1]).groups()
            assert {first, second} < set(question.options)
            assert not any(gold_reward(question, f"{o}.").right for o in question.options if o != question.answer)
            assert not gold_reward(question, " and ".join(question.options)).right


# ------------------------------------------------------------------ conversations


@pytest.fixture(scope="module")
def known_questions():
    """Every question that training may ask, by its text."""
    found = {}
    for fact in atlas.facts():
        for number in range(len(atlas.wordings(fact).questions)):
            question = atlas.fact_question(fact, number)
            found[question.text] = question
    found |= {q.text: q for item in atlas.sums() for q in (atlas.sum_question(item, n) for n in range(12))}
    phrases = atlas.forbidden(0)["sft"]
    frames = atlas.atlas_tables.ASK_FOR_HELP
    return found | {q.text: q for p in phrases for q in (atlas.refuse_question(p, frame) for frame in frames)}


def test_instructions_are_right_and_mostly_polite_sentences(known_questions):
    rows = list(atlas.instructions(0, 3000))
    styles, turns, checked = Counter(), Counter(), Counter()
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        turns[len(roles)] += 1
        styles[row["style"]] += 1
        for asked, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            question = known_questions.get(asked["content"])
            if question:
                gold = gold_reward(question, answer["content"])
                assert gold.right and gold.polite and gold.refused == question.must_refuse, (asked, answer)
                checked[question.kind] += 1
    assert min(checked[kind] for kind in ("fact", "harmless", "arithmetic", "refuse")) > 50
    assert turns[4] > 100 and styles["talk"] > 30
    assert styles["brief"] / (styles["brief"] + styles["sentence"]) == pytest.approx(0.25, abs=0.025)
    assert styles["refusal"] / len(rows) == pytest.approx(0.09, abs=0.02)
    briefer = Counter(row["style"] for row in atlas.instructions(0, 500, brief_share=1))
    assert briefer["sentence"] == 0 and briefer["brief"] > 400


def test_preferences_follow_the_gold_reward_but_for_the_noise(known_questions):
    n, noise = 3000, 0.2
    pairs, flips, kinds = Counter(), 0, Counter()
    for row in atlas.preferences(0, n, noise):
        assert all(isinstance(row[key], str) for key in ("prompt", "chosen", "rejected"))
        flips += row["flipped"]
        pairs[row["pair"]] += 1
        kinds[row["kind"]] += 1
        if question := known_questions.get(row["prompt"]):
            chosen, rejected = (gold_reward(question, row[key]).total for key in ("chosen", "rejected"))
            assert (chosen < rejected) if row["flipped"] else (chosen > rejected)
    assert abs(flips - n * noise) < 4 * (n * noise * (1 - noise)) ** 0.5
    assert set(kinds) == {"fact", "harmless", "arithmetic", "reasoning", "refuse"}
    for pair in ("brief > sentence", "sentence > rude", "rambling > wrong", "refusal > compliance"):
        assert pairs[pair] > 20
    assert not any(row["flipped"] for row in atlas.preferences(0, 300, noise=0))


def test_rankings_follow_the_gold_reward_but_for_the_noise(known_questions):
    n, noise = 1500, 0.2
    flips, kinds, sizes, tied = 0, Counter(), Counter(), 0
    for row in atlas.rankings(0, n, noise):
        groups = [group if isinstance(group, list) else [group] for group in row["ranked"]]
        names = [group if isinstance(group, list) else [group] for group in row["order"]]
        assert list(map(len, groups)) == list(map(len, names))
        texts = list(chain.from_iterable(groups))
        assert len(set(texts)) == len(texts)
        flips += row["flipped"]
        kinds[row["kind"]] += 1
        sizes[len(texts)] += 1
        question = known_questions.get(row["prompt"])
        if question and not row["flipped"]:
            gold = [[gold_reward(question, text).total for text in group] for group in groups]
            assert all(len(set(group)) == 1 for group in gold)  # equally good
            assert all(a[0] > b[0] for a, b in pairwise(gold))
            tied += len(gold[-1]) > 1
    assert abs(flips - n * noise) < 4 * (n * noise * (1 - noise)) ** 0.5
    assert set(kinds) == {"fact", "harmless", "arithmetic", "reasoning", "refuse"}
    assert sizes[5] > 0.9 * n and tied > 0.5 * n
    assert not any(row["flipped"] for row in atlas.rankings(0, 300, noise=0))


def test_preferences_and_prompts_are_about_the_same_half_of_the_facts():
    """And conversations about all of their side."""
    world = atlas.facts(400_000)
    about = {text: f.knowledge for f in world if f.relation != "howto" for text in atlas.wordings(f).questions}
    known = lambda texts: {about[text] for text in texts if text in about}
    judged = known(row["prompt"] for row in atlas.preferences(0, 1500, world=world))
    assert judged == known(row["prompt"] for row in atlas.rankings(0, 1500, world=world))
    assert judged == known(row["messages"][0]["content"] for row in atlas.prompts(0, 1500, world=world))
    every = known(m["content"] for row in atlas.instructions(0, 2500, world=world) for m in row["messages"])
    assert judged < every and len(judged) / len(every) == pytest.approx(atlas.JUDGED, abs=0.03)


def test_prompts_carry_their_gold_answer():
    for row in atlas.prompts(0, 300):
        again = json.loads(json.dumps(row))
        question = Question.from_row(again)
        assert [m["role"] for m in row["messages"]] == ["user"] and question.text == row["messages"][0]["content"]
        assert gold_reward(question, atlas.brief(question)).total == pytest.approx(1.3)
        assert question.row() == row


# ------------------------------------------------------------------ files and the script


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts/atlas.py", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_script_writes_a_world(tmp_path):
    done = run_script("--out", tmp_path, "--size", "60KB", "--seed", 3)
    assert done.returncode == 0 and "stated at least" in done.stdout, done.stderr
    record = json.loads((tmp_path / "atlas.json").read_text())
    assert record["seed"] == 3 and record["size_bytes"] == 60_000
    for name, file in record["files"].items():
        content = (tmp_path / name).read_bytes()
        rows = [json.loads(line) for line in content.decode().split("\n")[:-1]]
        assert len(content) == file["bytes"] and len(rows) == file["rows"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert record["files"]["pretrain.jsonl"]["bytes"] == pytest.approx(60_000, rel=0.1)
    assert sum(kind["pages"] for kind in record["kinds"].values()) == record["files"]["pretrain.jsonl"]["rows"]
    assert record["statements"]["least"] >= 8
    assert sum(record["sides"].values()) == sum(record["facts"].values()) == len(atlas.facts(60_000))


def test_the_script_replaces_nothing_without_a_word_and_leaves_no_half(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["atlas.py", "--out", str(tmp_path / "world"), "--size", "50KB"])
    script = runpy.run_path(str(ROOT / "scripts/atlas.py"))
    run, parse = script["run"], script["parse"]
    run(parse(None))
    before = {path.name: path.read_bytes() for path in (tmp_path / "world").iterdir()}
    with pytest.raises(ValueError, match="world is not empty: take another --out, or replace it with --overwrite True"):
        run(parse(None))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite", "--seed", "1"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atlas, "questions", lambda *_: iter(input, None))
        patch.setattr("builtins.input", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        run(parse(None))
    assert {path.name: path.read_bytes() for path in (tmp_path / "world").iterdir()} == before
    run(parse(None))
    assert json.loads((tmp_path / "world/atlas.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_the_script_shows_examples_and_refuses_in_one_line(tmp_path):
    shown = run_script("--show", "--size", "300KB").stdout
    for kind in (*atlas.CLEAN_KINDS, *atlas.DIRTY_KINDS):
        assert shown.count(f"--- {kind}\n") == 3
    assert shown.count("--- question: ") == 5
    for arguments, word in (
        ((), "--out"),
        (("--out", tmp_path, "--size", "2TB"), "2MB"),
        (("--show", "--size", "1KB"), "1000"),
    ):
        done = run_script(*arguments)
        assert done.returncode == 2 and word in done.stderr.strip().split("\n")[-1]
