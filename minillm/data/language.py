"""
Which language a text is in, by py3langid: naive Bayes on byte n-grams, 140 languages, offline.

    found = identify(text)                   ("en", 0.9998)
    language_rule(found, ("en", "de"))       None, or (rule, detail)

The probability is the model's, normalised over its languages; it is calibrated for whole paragraphs and not for words.
"zxx" is its class for what is in no language (programs, lists of numbers).
"""

from functools import lru_cache

from ..extras import extra

BEGINNING, SURE = 300, 0.99  # on 4,342 real pages this differs once from looking at 2000, at a third of the time
CHARACTERS = 2000
"""How much of a text is looked at, in about 1 ms. Prose gives the same answers from 500 characters on; in a program or
under a long header, what is English shows by 2000."""

# What the model calls a language (ISO 639-1 where there is one), and what ISO 639-3 calls it: the macrolanguage first,
# then the individual language that stands for it in most corpora, then others the label is right for.
LANGUAGES = {
    "ace": ("ace",), "af": ("afr",), "am": ("amh",), "an": ("arg",), "ar": ("ara", "arb"), "ary": ("ary",),
    "arz": ("arz",), "as": ("asm",), "az": ("aze", "azj"), "ba": ("bak",), "bcl": ("bcl",), "be": ("bel",),
    "bg": ("bul",), "bn": ("ben",), "br": ("bre",), "bs": ("bos",), "ca": ("cat",), "crh": ("crh",), "cs": ("ces",),
    "cy": ("cym",), "da": ("dan",), "de": ("deu",), "dz": ("dzo",), "el": ("ell",), "en": ("eng",), "eo": ("epo",),
    "es": ("spa",), "et": ("est", "ekk"), "eu": ("eus",), "ext": ("ext",), "fa": ("fas", "pes", "prs"), "fi": ("fin",),
    "fo": ("fao",), "fr": ("fra",), "fuv": ("fuv",), "fy": ("fry",), "ga": ("gle",), "gcf": ("gcf",), "gcr": ("gcr",),
    "gd": ("gla",), "gl": ("glg",), "gom": ("gom",), "grc": ("grc",), "gu": ("guj",), "gug": ("grn", "gug"),
    "guw": ("guw",), "ha": ("hau",), "hbo": ("hbo",), "he": ("heb",), "hi": ("hin",), "hr": ("hrv",), "ht": ("hat",),
    "hu": ("hun",), "hy": ("hye",), "id": ("ind",), "ig": ("ibo",), "is": ("isl",), "it": ("ita",), "ja": ("jpn",),
    "jv": ("jav",), "ka": ("kat",), "kab": ("kab",), "kik": ("kik",), "kk": ("kaz",), "km": ("khm",), "kn": ("kan",),
    "ko": ("kor",), "ku": ("kur", "kmr", "ckb"), "ky": ("kir",), "la": ("lat",), "lb": ("ltz",), "lg": ("lug",),
    "lij": ("lij",), "ln": ("lin",), "lo": ("lao",), "lt": ("lit",), "ltg": ("ltg",), "lv": ("lav", "lvs"),
    "mg": ("mlg", "plt"), "mk": ("mkd",), "ml": ("mal",), "mn": ("mon", "khk"), "mr": ("mar",),
    "ms": ("msa", "zsm", "zlm"),
    "mt": ("mlt",), "my": ("mya",), "ne": ("nep", "npi"), "nl": ("nld",), "nn": ("nno",), "no": ("nor", "nob"),
    "nso": ("nso",), "oc": ("oci",), "om": ("orm", "gaz"), "or": ("ori", "ory"), "pa": ("pan",), "pcm": ("pcm",),
    "pl": ("pol",), "ps": ("pus", "pbt", "pbu", "pst"), "pt": ("por",), "qu": ("que", "quz", "qug"), "ro": ("ron",),
    "ru": ("rus",), "rw": ("kin",), "sa": ("san",), "sdh": ("sdh",), "se": ("sme",), "si": ("sin",), "sk": ("slk",),
    "sl": ("slv",), "sn": ("sna",), "so": ("som",), "sq": ("sqi", "als"), "sr": ("srp",), "st": ("sot",),
    "sv": ("swe",),
    "sw": ("swa", "swh"), "ta": ("tam",), "te": ("tel",), "tg": ("tgk",), "th": ("tha",), "tk": ("tuk",),
    "tl": ("tgl", "fil"),
    "tr": ("tur",), "tt": ("tat",), "ug": ("uig",), "uk": ("ukr",), "ur": ("urd",), "uz": ("uzb", "uzn"),
    "uzs": ("uzs",),
    "vec": ("vec",), "vi": ("vie",), "vo": ("vol",), "wa": ("wln",), "wuu": ("wuu",), "xh": ("xho",), "yo": ("yor",),
    "yue": ("yue",), "zh": ("zho", "cmn"), "zu": ("zul",), "zxx": ("zxx",),
}  # fmt: skip

# Labels that `agree` takes for one, by the macrolanguage of ISO 639-3 that they belong to.
MACROLANGUAGES = {
    "ara": ("ar", "ary", "arz"),  # Arabic: standard, Moroccan, Egyptian
    "hbs": ("bs", "hr", "sr"),  # Serbo-Croatian: the written standards differ in a few words per page
    "kur": ("ku", "sdh"),  # Kurdish
    "lav": ("lv", "ltg"),  # Latvian and Latgalian
    "msa": ("id", "ms"),  # Malay, of which Indonesian is one
    "nor": ("nn", "no"),  # Norwegian: the model's "no" is Bokmål
    "uzb": ("uz", "uzs"),  # Uzbek
    "zho": ("wuu", "yue", "zh"),  # Chinese
}
_MACRO = {code: macro for macro, codes in MACROLANGUAGES.items() for code in codes}
_CODE = {name: code for code, names in LANGUAGES.items() for name in (*names, code)}


def identify(text):
    """(language: a key of LANGUAGES, its probability) of a text, from its first BEGINNING characters, or the first
    CHARACTERS where those leave a doubt.

    Deterministic. Without a letter in it a text is ("zxx", 1.0).
    """
    text = text.strip()[:CHARACTERS]
    if not any(map(str.isalpha, text)):
        return "zxx", 1.0
    code, probability = _model().classify(text[:BEGINNING])
    if probability < SURE and len(text) > BEGINNING:
        code, probability = _model().classify(text)
    return code, float(probability)


@lru_cache(1)
def _model():
    langid = extra("py3langid.langid", "data")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language_rule(found, allowed, threshold=0.65):
    """None to keep a text of which identify() says `found`, or (rule, detail): not one of the `allowed` languages (any
    codes that `code_of` knows), or with a probability below `threshold` (FineWeb's 0.65). Between standards as close as
    Croatian and Bosnian the probability is shared, and stays below: allow all of them, with a lower threshold.

    ValueError: an allowed language that is not known.
    """
    code, probability = found
    if code not in map(code_of, allowed):
        return "language.other", f"{code} ({probability:.2f}) is not {' or '.join(allowed)}"
    return None if probability >= threshold else ("language.unsure", f"{code} with {probability:.2f} < {threshold}")


def code_of(name):
    """The key of LANGUAGES for an ISO 639-1 or 639-3 code: "eng" is "en", "nob" and "nb" are "no". ValueError: none."""
    code = "no" if name == "nb" else _CODE.get(name)
    if code is None:
        raise ValueError(f"language {name!r} is not known; known are {' '.join(LANGUAGES)}")
    return code


def agree(code, name):
    """Whether the answer `code` is right for a text labelled `name` (ISO 639-3), up to macrolanguages.

    None: no language of the model is that one.
    """
    wanted = _CODE.get(name)
    return None if wanted is None else _MACRO.get(code, code) == _MACRO.get(wanted, wanted)
