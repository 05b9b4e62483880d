"""
One text, repaired; and what could identify a person taken out of it.

    clean(text)       encoding damage, line ends, control and invisible characters, trailing space, blank lines
    scrub_pii(text)   (text with [EMAIL], [IBAN], [CARD], [IP], [PHONE] in their places, how many of each)

`clean` changes how a text is written, not what it says: quotes stay straight or curly, full-width forms and ligatures
stay, HTML entities stay (a page about HTML means them). Everything here takes time in proportion to the text's length,
also for text that was made to be slow: every repeat in a pattern is bounded, or starts at the first character of a run
only.
"""

import ipaddress
import re
import unicodedata

from ..extras import extra

# ------------------------------------------------------------------ repair

# Every pattern of damage that ftfy (6.3, badness.py) looks for holds one of these: a C1 control character, one of four
# letters, or two neighbours that are not ASCII, one of them Latin, a sign, or Cyrillic Ђ (the second half of a damaged
# quotation mark read as Windows-1251). To look for them is ten times as fast as ftfy's own first test.
_SIGNS = "\x80-\u0385\u0402\u0490\u0491\u2000-\u25ff\uf8ff\ufb01\ufb02\ufffd"
_DAMAGE = re.compile(f"[\x80-\x9fŒœÃÂ]|[{_SIGNS}][^\0-\x7f]|[^\0-\x7f][{_SIGNS}]")

_NEWLINES = "\r\v\f\u2028\u2029"
_TERMINAL = re.compile("\x1b\\[[0-?]*+[ -/]*+[@-~]")  # a terminal's colours: without ESC alone, "[31m" would stay
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f]+")
# Zero-width space, word joiner, BOM, soft hyphen, grapheme joiner, directions, annotations, tags, noncharacters.
# Variation selectors stay, because they choose a form (of an emoji, say).
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\U000e0000-\U000e007f]+"
)
# The zero-width joiners: Persian, Indic scripts and emoji are written with them, behind what is not Latin.
_JOINERS = re.compile("(?<![\u0590-\U0010ffff])[\u200c\u200d]+")


def clean(text):
    """The repaired text. Idempotent: clean(clean(text)) == clean(text).

    - UTF-8 that was decoded as something else is decoded again ("â€œ" -> “), line by line, by ftfy. Its other options
      are off: they change characters that are not damaged. Text without a sign of damage never gets there
    - halves of surrogate pairs are joined, or become U+FFFD; then Unicode's NFC, which keeps the identity of characters
    - CR LF, CR, VT, FF, U+2028 and U+2029 become LF
    - terminal escapes, control characters other than LF and tab, and invisible characters go; U+200C and U+200D stay
      where they shape a script or an emoji
    - lines lose trailing spaces, the text loses the newlines around it, and at most 2 blank lines stay in a row

    ValueError: `text` is not a str.
    """
    if not isinstance(text, str):
        raise ValueError(f"text has to be a str, not {type(text).__name__}")
    if text.isascii():
        return _tidy(text)
    while True:  # what a repair brings to light can itself be damaged, or invisible
        before = text
        text = _tidy(_repaired(text))
        if text == before:
            return text


def _repaired(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if _DAMAGE.search(text):
        fix = extra("ftfy", "data").fix_encoding
        text = "\n".join(fix(line) if _DAMAGE.search(line) else line for line in text.split("\n"))
        # What is left of a damaged ” whose last byte was lost: 0x9D is the one that Windows-1252 has no character for.
        text = text.replace("â€", "”")
    text = _INVISIBLE.sub("", text)
    if "\u200c" in text or "\u200d" in text:
        text = _JOINERS.sub("", text)
    return unicodedata.normalize("NFC", text)


def _tidy(text):
    if any(char in text for char in _NEWLINES):  # to look for one character is many times as fast as for one of several
        text = re.sub(f"\r\n|[{_NEWLINES}]", "\n", text)
    text = _CONTROL.sub("", _TERMINAL.sub("", text))
    text = "\n".join([line.rstrip() for line in text.split("\n")]).strip("\n")
    return re.sub("\n{4,}", "\n\n\n", text) if "\n\n\n\n" in text else text


# ------------------------------------------------------------------ what could identify a person

KINDS = ("email", "iban", "card", "ip", "phone")

_EMAIL = re.compile(  # the part before the @ from its first character on, so that a long run is read once
    r"(?<![\w.+%'-])([\w+%'-][\w.+%'-]*+)@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24})(?![\w@-])"
)
# "logo@2x.png", "main@v2.js" are names of files, and git@ is no person.
_FILE_NAME = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|bmp|ico|css|js|ts|json|html?|pdf|py|md|txt)\Z", re.I)

_IBAN = re.compile(  # looks ahead only, because what is none may overlap with one
    r"(?<![0-9A-Za-z])(?=([A-Za-z]{2}[0-9]{2}(?:[ \xa0-]?[0-9A-Za-z]){11,30}))"
)
# Lengths: SWIFT's IBAN registry.
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

_CARD = re.compile(
    r"(?<![\w.,])(?<![0-9][ -])(?:[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{1,3}(?![0-9]))?"
    r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5}|[0-9]{13,19})(?![0-9]|[.,][0-9]|[A-Za-z_])"
)
# First digits (a range, both ends included) and lengths: ISO/IEC 7812 as the networks publish it.
ISSUERS = (
    ("4", "4", (13, 16, 19)),  # Visa
    ("51", "55", (16,)), ("2221", "2720", (16,)),  # Mastercard
    ("34", "34", (15,)), ("37", "37", (15,)),  # American Express
    ("300", "305", (14, 16, 19)), ("36", "36", (14, 16, 19)), ("38", "39", (14, 16, 19)),  # Diners Club
    ("6011", "6011", (16, 19)), ("644", "659", (16, 19)),  # Discover
    ("3528", "3589", (16, 19)),  # JCB
    ("62", "62", (16, 17, 18, 19)), ("81", "81", (16, 17, 18, 19)),  # UnionPay, RuPay
    ("2200", "2204", (16, 17, 18, 19)),  # Mir
    ("5018", "5018", (13, 16, 19)), ("5020", "5020", (13, 16, 19)), ("5038", "5038", (13, 16, 19)),  # Maestro
    ("5893", "5893", (13, 16, 19)), ("6304", "6304", (13, 16, 19)), ("6759", "6763", (13, 16, 19)),
    ("508", "508", (16,)), ("60", "60", (16,)), ("82", "82", (16,)),  # RuPay
)  # fmt: skip

_IP = re.compile(
    r"(?<![\w.:-])(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.\w)"
    r"|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?:(?<=:)[0-9]{1,3}(?:\.[0-9]{1,3}){3})?(?!\w))"
)
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|vers|versions?|release|rev|revision|build|firmware|sections?|sec|chapter|clause|rule|figure|fig|table|"
    r"step|appendix|part)[.:]?[ \t]?|§[ ]?)\Z",
    re.I,
)

# National numbers, where the form leaves little doubt. _BEFORE and _AFTER keep out the middle of a longer number, sums,
# decimals, and lists of numbers.
_BEFORE = r"(?<![\w.,/+=*^$€£#-])(?<![0-9][ ])(?<![=+*/^][ ])"
_AFTER = r"(?![\w/]|[.,:%][0-9]|-\w|[ ]?[=+*^][ ]?[0-9]|[ ][0-9])"
_PHONE = re.compile(
    rf"""(?x: (?=[+(0-9]) (?<!\w) (?:  # what none can begin with is passed over quickly
    # +1 415 555 2671, +49 (0)30 901820; not +1.234.567
      (?<!\+) \+ (?! [1-9][0-9]{{0,2}} (?:\.[0-9]{{3}})+ (?![0-9.]) )
      (?P<plus> [1-9][0-9]{{0,2}}+ (?: [ \xa0./-]? [(]? [0-9]{{1,12}}+ [)]? ){{1,7}}+ ) (?!\w|[.,][0-9])
    # 0044 20 7946 0958
    | {_BEFORE} 00 (?P<double> [1-9][0-9]{{0,2}} (?: [ ./-] [(]? [0-9]{{1,8}} [)]? ){{2,6}} ) {_AFTER}
    # (415) 555-2671, 415-555-2671, 415.555.2671
    | {_BEFORE} (?: 1[ .-] )? (?: [(] [2-9][0-9]{{2}} [)] [ ]? [2-9][0-9]{{2}} [ .-]
                                | [2-9][0-9]{{2}} (?P<dash> [.-] ) [2-9][0-9]{{2}} (?P=dash) ) [0-9]{{4}} {_AFTER}
    # 020 7946 0958, (030) 901820, 0171/1234567, 01 23 45 67 89
    | {_BEFORE} (?P<trunk> [(]? 0[1-9][0-9]{{0,4}} (?: [)][ -]? | [ /-] ) [0-9]{{2,8}}
                           (?: (?P<gap> [ -] ) [0-9]{{2,8}} (?: (?P=gap) [0-9]{{2,4}} ){{0,3}} )?
                         | 0[1-9] (?: \.[0-9]{{2}} ){{4}} ) {_AFTER}
    # (11) 91234-5678
    | {_BEFORE} [(] [1-9][0-9] [)] [ ]? 9[0-9]{{4}} [ -] [0-9]{{4}} {_AFTER}
    ))"""
)
# Any other form only behind a word that says what it is.
_SAID = re.compile(
    r"(?i:(?=[cdfhmpstw])\b(?P<word>tel|telephone|telefon|téléphone|teléfono|phone|ph|mobile|cell|fax|whatsapp|sms|"
    r"hotline|call|dial|text)"
    r"(?:[ ](?:number|no|nr|us|me|him|her|them))?(?:[ ](?:at|on|is))?[ ]?[.:#]{0,2}[ \xa0]{0,2})"
    r"(?P<number>[(]?[0-9](?:[ \xa0().-]{0,2}[0-9]){6,14})(?!\w|[.,:/-][0-9]|[ ][0-9])"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}([ .\xa0])[0-9]{3}(?:\1[0-9]{3})*\Z")
_YEARS = re.compile(r"(?:1[5-9]|20)[0-9]{2}[ -]+(?:1[5-9]|20)[0-9]{2}\Z")
_DATE = re.compile(
    r"[0-9]{1,2}([ ./-])[0-9]{1,2}\1(?:1[5-9]|20)[0-9]{2}\b"
    r"|(?:1[5-9]|20)[0-9]{2}([ ./-]?)(?:0[1-9]|1[0-2])\2[0-3][0-9]\b"
)

# Nothing but e-mail addresses and IPv6 can be where none of these is: 7 digits close to each other, the begin of an
# IBAN, the dots of an IPv4 address.
_DIGITS = re.compile(
    r"[0-9](?:[ \xa0()./-]{0,3}[0-9]){6}|(?<=[A-Za-z]{2})[0-9]{2}[ \xa0-]?[0-9A-Za-z]{4}"
    r"|[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"
)


def scrub_pii(text, kinds=KINDS):
    """(`text` with tokens in the places of what could identify a person, {kind: how many} of the kinds found).

    email   [EMAIL]: name@domain.tld in any script; not files (logo@2x.png), not git@
    iban    [IBAN]: the country's length (SWIFT's registry) and the check digits (ISO 13616, mod 97) have to be right
    card    [CARD]: 13 to 19 digits, plain or in the printed groups, with an issuer's first digits and length and the
            right check digit (Luhn, ISO/IEC 7812)
    ip      [IP]: public IPv4 and IPv6 addresses (ipaddress's is_global); not versions and section numbers
    phone   [PHONE]: +country numbers, national numbers with the trunk 0 in groups, North American and Brazilian forms;
            any other form only behind a word such as tel. or call. Digits in one run need a + or such a word

    Names, postal addresses, and addresses in words ("ann at example dot org") stay. ValueError: an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"no kind {unknown[0]!r} of personal data: {', '.join(KINDS)}")
    counts = {}

    def replace(kind, pattern, wanted):
        """Replace what `wanted` says of each match of `pattern`: the length of its replaced part, 0 for none."""
        nonlocal text
        if kind not in kinds:
            return
        pieces, end = [], 0
        for match in pattern.finditer(text):
            start, length = wanted(match)
            if length and start >= end:
                pieces += (text[end:start], f"[{kind.upper()}]")
                end = start + length
                counts[kind] = counts.get(kind, 0) + 1
        if pieces:
            text = "".join(pieces) + text[end:]

    if "@" in text:
        replace("email", _EMAIL, _email)
    if _DIGITS.search(text):
        replace("iban", _IBAN, _iban)
        replace("card", _CARD, _card)
        replace("ip", _IP, _ip)
        replace("phone", _PHONE, _phone)
        replace("phone", _SAID, _said)
    elif text.count(":") > 1:
        replace("ip", _IP, _ip)
    return text, counts


# Each takes a match and returns where the part to replace starts, and its length, 0 if it is not what it looks like.


def _email(match):
    name = match[1].lstrip("'-")
    fits = name.lower() not in ("", "git") and not _FILE_NAME.search(match[2])
    return match.end() - len(name) - 1 - len(match[2]), (len(name) + 1 + len(match[2])) * fits


def _iban(match):
    """The match may have run on into the next word: the country says where the number ends."""
    digits, length = "", IBAN_LENGTHS.get(match[1][:2].upper(), 0)
    for n, char in enumerate(match[1]):
        digits += char.upper() if char.isalnum() else ""
        if len(digits) == length:
            following = match.string[match.start() + n + 1 : match.start() + n + 2]
            fits = not following.isalnum() and iban_is_valid(digits)
            return match.start(), (n + 1) * fits
    return match.start(), 0


def iban_is_valid(number):
    """Whether `number` (letters and digits only, upper case) has its country's length and right check digits."""
    turned = number[4:] + number[:4]
    return len(number) == IBAN_LENGTHS.get(number[:2]) and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _card(match):
    shown = match[0]
    for part in (shown, shown[:19]):  # four groups of four, where a fifth group was something else
        if card_is_valid(re.sub("[ -]", "", part)):
            return match.start(), len(part)
    return match.start(), 0


def card_is_valid(number):
    """Whether `number` (digits only) has an issuer's first digits and length, and a right check digit (Luhn)."""
    known = any(low <= number[: len(low)] <= high and len(number) in lengths for low, high, lengths in ISSUERS)
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return known and (sum(map(int, number[-1::-2])) + sum(doubled)) % 10 == 0


def _ip(match):
    shown = match[0]
    if shown.endswith(":") and not shown.endswith("::"):  # "from 2a00::1: no answer"
        shown = shown[:-1]
    try:
        address = ipaddress.ip_address(shown)
    except ValueError:
        return match.start(), 0
    begin, end = match.span()
    named = address.version == 4 and _VERSION_BEFORE.search(match.string[max(0, begin - 12) : begin])
    heads_line = (  # "2.1.3.4 Results"
        re.fullmatch("[0-9][0-9.]{6}", shown)
        and match.string[max(0, begin - 1) : begin] in ("", "\n")
        and re.match(r"\.? [^\W\d]", match.string[end : end + 3])
    )
    return begin, len(shown) * bool(address.is_global and not named and not heads_line)


def _phone(match):
    shown = match[0]
    if shown.count(")") > shown.count("("):  # "(call +1 415 555 2671)"
        shown = shown.removesuffix(")")
    digits = re.sub("[^0-9]", "", shown)
    fits = True
    if match["plus"]:
        fits = (10 if shown[1:].isdigit() else 8) <= len(digits) <= 15
    elif match["double"]:
        fits = 10 <= len(digits) <= 17
    elif match["trunk"]:
        fits = 9 <= len(digits) <= 12 and not set(digits) <= {"0", "1"} and not _DATE.match(shown)
        fits = fits and (len(digits) == 10 or not re.fullmatch("[0-9]{2}(?:.[0-9]{2})+", shown))
    return match.start(), len(shown) * fits


def _said(match):
    number, word = match["number"], match["word"].lower()
    verb = word in ("call", "dial", "text")
    fits = not _YEARS.match(number) and not _DATE.match(number) and not (verb and _THOUSANDS.match(number))
    return match.start("number"), len(number) * fits
