"""minillm.data.clean: repair changes the writing and not the text; personal data goes and plain numbers stay."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.data import clean as module
from minillm.data.clean import IBAN_LENGTHS, ISSUERS, KINDS, card_is_valid, clean, iban_is_valid, scrub_pii

SHARED = Path(__file__).parents[2] / "shared/data"

# What breaks cleaners: halves of repairs, invisible characters between them, and every kind of space and line end.
PIECES = st.sampled_from(
    [
        *["â€", "œ", "â€œ", "Ã", "³", "Ã³", "Â", " ", "\xa0", "\x9d", "\x80", "\u200b", "\u200d", "\ufeff", "\r", "\n"],
        *["\n\n\n", "\x1b[31m", "\x1b", "[0m", "\0", "\x85", "\u2028", "\ud83d", "\ude00", "e", "\u0301", "a"],
        *["می\u200cخواهم", "👩\u200d🚀"],
    ]
)
TEXTS = st.text(st.characters()) | st.lists(PIECES).map("".join)


# ------------------------------------------------------------------ repair


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("she said â€œwowâ€\x9d and leftâ€¦", "she said “wow” and left…"),
        ("“quick! quick!â€. it was", "“quick! quick!”. it was"),  # a lost byte
        ("cafÃ© naÃ¯ve", "café naïve"),
        ("a fine line\n‚Äúwow‚Äù\nand a fine one", "a fine line\n“wow”\nand a fine one"),
        ("Ã\u200b©", "é"),  # what is invisible hides the damage
        ("“curly” 'straight' ‘single’", None),
        ("ＦＵＬＬ　width ｶﾅ ﬁ ² ½ …", None),
        ("&amp; &lt;b&gt; &quot;", None),
        ("Œuvre, Ârno, ¿Qué?, «Привет», naïve café, 10 € – 20 £", None),
        ("日本語のテキスト。", None),
        ("a\r\nb\rc\x0bd\x0ce\u2028f\u2029g", "a\nb\nc\nd\ne\nf\ng"),
        ("x\0y\x07z\x7f \x9b31m", "xyz ›31m"),  # U+009B is › in the encoding that it comes from
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\ufeffto\u200bge\u00adther\u2060 \u202eforth\u202c", "together forth"),
        ("می\u200cخواهم 👩\u200d🚀 ক\u200d্ষ 🏳\ufe0f", None),
        ("La\u200dtin\u200c", "Latin"),
        ("\ud83d\ude00 and \ud83d", "😀 and \ufffd"),
        ("e\u0301", "é"),
        ("  code\t\n\ttab  \n", "  code\n\ttab"),
        ("a\n\n\n\n\n\nb\n\n\nc", "a\n\n\nb\n\n\nc"),
        ("\n \n\t\u00a0\n", ""),
        ("", None),
    ],
)
def test_repair(text, wanted):
    assert clean(text) == (text if wanted is None else wanted)


@given(TEXTS)
@example("Ã\u200b\u200b³")
@example("a\u200d\u200b\u200d")
def test_clean_is_idempotent_and_leaves_nothing_behind(text):
    result = clean(text)
    assert clean(result) == result
    result.encode()  # no halves of surrogate pairs
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff\u2028\u2029]|[ \t]\n|\n{4}|[ \t\n]\\Z|\\A\n", result)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_letters_and_their_order_stay(text):
    visible = re.sub("[^!-~]", "", re.sub("\x1b\\[[0-?]*[ -/]*[@-~]", "", text))
    assert re.sub("\\s", "", clean(text)) == visible


def test_text_without_damage_never_gets_to_the_library(monkeypatch):
    monkeypatch.setattr(module, "extra", lambda *names: pytest.fail("asked for ftfy"))
    for text in ("plain", "café, “quoted” – 10 €", "Привет, мир", "日本語のテキスト。", "नमस्ते दुनिया", "x\r\ny \u200b"):
        clean(text)


def test_the_quick_look_for_damage_never_misses_what_the_library_would_see():
    """Each pattern of ftfy's is one to five characters of its table; all pairs of them, with and without neighbours."""
    badness = pytest.importorskip("ftfy.badness")
    alphabet = sorted({char for group in badness.MOJIBAKE_CATEGORIES.values() for char in expand(group)})
    assert len(alphabet) > 350
    for first in alphabet:
        for second in [*alphabet[::7], "a", " ", "ВГРС"[ord(first) % 4]]:
            text = f"a{first}{second} b"
            if badness.is_bad(text):
                assert module._DAMAGE.search(text), text
    for text in ("ГўВЂВ a", "вЂ", "Ã a", "a Â “", "βeta β€™", "√±", "× ²", "ØŸØŸ"):
        assert module._DAMAGE.search(text) or not badness.is_bad(text), text


def expand(group):
    """The characters of a piece of a regular expression's class: "a-c!" gives abc!."""
    return re.sub("(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), group, flags=re.S)


@pytest.mark.parametrize("text", [None, b"bytes", 3])
def test_only_text_is_cleaned(text):
    with pytest.raises(ValueError, match="text has to be a str"):
        clean(text)


def test_damaged_stories_come_out_whole():
    path = SHARED / "messy/mixed_web.jsonl"
    if not path.exists():
        pytest.skip(f"needs labelled pages in {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    damaged = [row["text"] for row in rows if row["kind"] == "mojibake"]
    assert len(damaged) >= 20
    assert all("â€" in text or "Ã" in text or "Â" in text for text in damaged)
    assert not any(re.search("â€|Ã.|Â", clean(text)) for text in damaged)
    prose = [row["text"] for row in rows if row["kind"] in ("web_c4", "clean_wiki", "udhr")]
    letters = lambda text: re.sub(r"[\W_]", "", unicodedata.normalize("NFC", text))
    changed = [text for text in prose if letters(clean(text)) != letters(text)]
    assert len(changed) <= 0.01 * len(prose)


# ------------------------------------------------------------------ personal data

POSITIVE = {
    "email": [
        "Write to john.doe+tag@example.co.uk.",
        "'ann@example.org'",
        "<a.b@c.de>",
        "müller@straße.de",
        "mailto:o'neil@mail.example.com?subject=x",
        "x_y@sub.domain.museum, thanks",
    ],
    "ip": [
        "from 8.8.8.8 port 80",
        "Host 93.184.216.34.",
        "2001:4860:4860::8888",
        "from 2a00:1450:4009::1: no answer",
        "66.249.66.1 - - [10/Oct/2000:13:55:36]",
        "[2606:4700::6810:84e5]",
    ],
    "phone": [
        "+1 (415) 555-2671",
        "+44 20 7946 0958",
        "+49 (0)30 901820",
        "+33 1 23 45 67 89",
        "+14155552671",
        "+91 98765 43210",
        "(+1.415.555.2671)",
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "1-800-555-0199",
        "0044 20 7946 0958",
        "020 7946 0958",
        "(030) 901820",
        "0171/1234567",
        "01 23 45 67 89",
        "01.23.45.67.89",
        "03-1234-5678",
        "07885 577 899,",
        "(11) 91234-5678",
        "Tel: 912 345 678",
        "call 555-1234 now",
        "Phone 9876543210",
        "Call us at 650 636 4884!",
        "Fax. 030 90 18 20",
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "pay with 5500005555555559.",
        "3782 822463 10005",
        "378282246310005",
        "6011111111111117",
        "30569309025904",
        "3530111333300000",
        "4111 1111 1111 1111 12/27",
        "2223003122003222",
    ],
    "iban": [
        "GB82 WEST 1234 5698 7654 32",
        "DE89370400440532013000",
        "ES91 2100 0418 4502 0005 1332 CODE",
        "fr14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947.",
        "(BE68 5390 0754 7034)",
    ],
}
NEGATIVE = [
    *["2021-03-04", "04.03.2021 12:30", "01/02/2003", "01-02-2003 10:30", "1999-2003", "20230415123000", "12:30:45"],
    *["ISBN 978-0-306-40615-7", "ISBN 0-306-40615-2", "ISBN 9780306406157", "RFC 2616", "pages 200-215"],
    *[
        "version 1.2.3.4",
        "v10.2.3.4",
        "release 2.4.1.0",
        "see section 5.8.1.2",
        "1.2.3.4.5",
        "1.2.3.4-beta",
    ],
    *["192.168.1.1", "127.0.0.1", "10.0.0.1", "fe80::1", "::1", "2001:db8::1", "std::vector", "999.8.8.8"],
    *[
        "1234567890",
        "3.14159265358979",
        "1 000 000 000",
        "1,234,567,890",
        "1.234.567.890",
        "+1.234.567",
        "+1 234 567",
        "+12345678",
        "+1 234 567 890 123 4567",
        "04 03 2021 1230",
        "0.123456789",
    ],
    *["100-200-300", "555-1234", "300 400 5000", "$200-300", "2 + 2 = 4", "415-555-2671 = 3", "200 + 300-400-5000"],
    *[
        "01 02 03 04 05 06",
        "0101 0110 0011",
        "2007 2008 2009",
        "call 10 000 000 people",
        "call 2007-2008",
        "8675309 people",
    ],
    *["12 + 34567890123", "+5 points", "+1415555267199999x", "11:22:33:44:55:66", "lat 40.7128-74.0060"],
    *["(1999) 123-145", "12 (3) 1034-1050", "Matthew 5:3-12", "1024x768", "4 8 15 16 23 42"],
    *["4111 1111 1111 1112", "1234 5678 9012 3456", "9999999999999995", "0000000000000000", "4111.1111.1111.1111"],
    *[
        "DE89370400440532013001",
        "DE8937040044053201300",
        "ZZ89370400440532013000",
        "AB12 CDEF",
        "DE89370400440532013000AB",
    ],
    *[
        "@mention",
        "logo@2x.png",
        "git@github.com:foo/bar",
        "user@localhost",
        "react@18.2.0",
        "a @ b.com",
        "@decorator.name",
    ],
]


def test_the_tables_are_large_enough():
    assert sum(map(len, POSITIVE.values())) + len(NEGATIVE) >= 100
    assert set(POSITIVE) == set(KINDS)


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, texts in POSITIVE.items() for text in texts])
def test_personal_data_is_found_once_and_as_what_it_is(kind, text):
    for around in (text, f"She wrote: {text}", f"({text})\nnext line", f"one\n{text} and more"):
        scrubbed, counts = scrub_pii(around)
        assert counts == {kind: 1} and scrubbed.count(f"[{kind.upper()}]") == 1
        assert not re.search("[0-9]{4}|@", scrubbed.replace("2000:13:55:36", ""))
        assert scrub_pii(around, [k for k in KINDS if k != kind])[0].count(f"[{kind.upper()}]") == 0
        assert scrub_pii(around, [kind]) == (scrubbed, counts)


@pytest.mark.parametrize("text", NEGATIVE)
def test_plain_numbers_and_names_stay(text):
    for around in (text, f"see {text} here", f"one\n{text}\ntwo"):
        assert scrub_pii(around) == (around, {})


def test_the_number_of_a_section_is_no_address():
    heading = "one\n2.1.3.4 Results\ntwo"
    assert scrub_pii(heading) == (heading, {})
    assert scrub_pii("asked 8.8.4.4 first") == ("asked [IP] first", {"ip": 1})


def test_many_in_one_text():
    text = "Ann (ann@x.org, +1 415-555-2671) and Bob (bob@y.org) paid with 4111 1111 1111 1111 on 2021-03-04."
    assert scrub_pii(text) == (
        "Ann ([EMAIL], [PHONE]) and Bob ([EMAIL]) paid with [CARD] on 2021-03-04.",
        {"email": 2, "phone": 1, "card": 1},
    )
    with pytest.raises(ValueError, match="no kind 'name' of personal data: email, iban, card, ip, phone"):
        scrub_pii(text, ["email", "name"])


@given(st.text(st.characters()) | st.lists(st.sampled_from([*"0123456789+-./() @:,a\n", "41", "555"])).map("".join))
def test_scrubbing_never_fails_and_only_replaces(text):
    scrubbed, counts = scrub_pii(text)
    assert set(counts) <= set(KINDS) and all(counts.values())
    assert (scrubbed == text) == (not counts)
    kept = re.split("|".join(rf"\[{kind.upper()}\]" for kind in KINDS), scrubbed)
    if "[" not in text:
        assert len(kept) == sum(counts.values()) + 1
        position = 0
        for piece in kept:  # in order, and nothing else was changed
            position = text.index(piece, position) + len(piece)


def with_check_digit(digits):
    """`digits` and the last digit that Luhn's formula asks for."""
    total = sum(sum(map(int, str(2 * int(d)))) for d in digits[::-2]) + sum(int(d) for d in digits[-2::-2])
    return digits + str(-total % 10)


@given(st.sampled_from(ISSUERS), st.data())
def test_a_card_number_is_found_and_with_one_wrong_digit_it_is_not(issuer, data):
    low, high, lengths = issuer
    prefix = str(data.draw(st.integers(int(low), int(high))))
    length = data.draw(st.sampled_from(lengths))
    body = data.draw(st.text("0123456789", min_size=length - 1 - len(prefix), max_size=length - 1 - len(prefix)))
    number = with_check_digit(prefix + body)
    assert card_is_valid(number) and scrub_pii(f"card {number}.") == ("card [CARD].", {"card": 1})
    if length == 16:
        groups = [number[i : i + 4] for i in range(0, 16, 4)]
        assert scrub_pii("-".join(groups))[0] == scrub_pii(" ".join(groups))[0] == "[CARD]"
    place, step = data.draw(st.integers(0, length - 1)), data.draw(st.integers(1, 9))
    wrong = number[:place] + str((int(number[place]) + step) % 10) + number[place + 1 :]
    assert not card_is_valid(wrong) and "card" not in scrub_pii(wrong)[1]


@given(st.sampled_from(sorted(IBAN_LENGTHS)), st.data())
def test_an_iban_is_found_and_with_one_wrong_character_it_is_not(country, data):
    length = IBAN_LENGTHS[country]
    body = data.draw(st.text("0123456789", min_size=length - 4, max_size=length - 4))
    body = body[:4] + data.draw(st.sampled_from(["ABCD", "0000", "7Z7Z"])) + body[8:]
    number = next(n for n in (f"{country}{check:02}{body}" for check in range(2, 99)) if iban_is_valid(n))
    assert scrub_pii(f"to {number}, now") == ("to [IBAN], now", {"iban": 1})
    shown = " ".join(number[i : i + 4] for i in range(0, length, 4))
    assert scrub_pii(f"{shown} PAID", ["iban"]) == ("[IBAN] PAID", {"iban": 1})
    place, step = data.draw(st.integers(4, length - 1)), data.draw(st.integers(1, 9))
    other = str((int(number[place], 36) + step) % 10)
    wrong = number[:place] + other + number[place + 1 :]
    if other != number[place]:
        assert not iban_is_valid(wrong) and "iban" not in scrub_pii(wrong)[1]


SLOW = [
    *["a", "a@", "a.", "a@a.", "@", "1", "1 ", "1-", "1.", "+1", "+1 ", "0", "01 ", "(", "(0", "()", "4111 ", "DE89"],
    *["ab12 ", "2001:", ":", "tel", "tel 1", "call 1 ", "\x1b[", "\n ", " ", "Ã", "â€", "Ã©", "a\u200d", "é\u0301"],
    *["1.1.1.", "-", "+1 (", "é", "\u200d", "\r", "+" + "1" * 80 + "x "],
]


@pytest.mark.parametrize("unit", SLOW)
def test_what_was_made_to_be_slow_takes_linear_time(unit):
    """In quadratic time one of these takes many minutes, and the suite's timeout ends it."""
    text = unit * (250_000 // len(unit))
    scrub_pii(text + "@" + "0" * 7 + "x")
    clean(text + "x é")
