"""minillm.tokenizer: any text comes back, no text gives a control token, and files keep what they say."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from minillm import tokenizer as module
from minillm.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer

SHARED = Path(__file__).parents[2] / "shared"
GPT2 = SHARED / "data/tokenizers/gpt2"
FIXTURE = SHARED / "fixtures/hf/chat_tokenizer"

CORPUS = [
    "the cat sat on the mat, and the cats sat there",
    "Größe, naïve, 生活的真谛是",
    "x = {'a': 1}\n\n\tif x:\n",
] * 5
HARD_TEXTS = [
    *[
        "",
        " ",
        "   two   three",
        "\0",
        "a\0b",
        "\u2028\u2029\x85",
        "\r\n\r\n",
        "\tx\t",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
    ],
    *["e\u0301\u0302", "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "שלום", "\ue000\U000f0000", "Ġ Ċ Ā", "▁x", "<unk>", "\x1b[0m", "Å\u212b"],
]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def bytewise():
    return Tokenizer.train([], SMALLEST_VOCABULARY)


@pytest.fixture(scope="module")
def gpt2():
    if not GPT2.exists():
        pytest.skip(f"needs GPT-2's vocabulary in {GPT2}")
    return Tokenizer.from_gpt2(GPT2 / "encoder.json", GPT2 / "vocab.bpe")


def files(folder, vocabulary, merges=()):
    """A vocabulary and merges as GPT-2's two files."""
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder / "encoder.json", folder / "vocab.bpe"


def byte_vocabulary(more=()):
    return {name: n for n, name in enumerate([*module.byte_alphabet(), *more])}


# ------------------------------------------------------------------ text and back

texts = st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|endoftext|>", "<", "|>", " "]) | st.text()).map(
    "".join
)


@given(texts)
def test_any_text_comes_back_and_gives_no_control_token(trained, bytewise, text):
    for tokenizer in (trained, bytewise):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=True) == text
        assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())
    assert len(ids) == len(text.encode())  # without merges, a token is a byte


@pytest.mark.parametrize("text", [*HARD_TEXTS, *SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)])
def test_hard_texts_come_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids.tolist()) & set(trained.special_tokens.values())


def test_a_batch_is_what_its_texts_are_alone(trained):
    for ids, text in zip(trained.encode_batch(HARD_TEXTS), HARD_TEXTS, strict=True):
        assert ids.dtype == np.uint16 and ids.tolist() == trained.encode(text).tolist()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_can_not_be_forged_either(trained, copied):
    again = copied(trained)
    assert again.encode("<|im_end|></s>").tolist() == trained.encode("<|im_end|></s>").tolist()
    assert (again.bos, again.eos, again.pad) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("text, word", [("ab\ud800c", r"character 2 .* U\+D800"), (b"x", "bytes"), (None, "NoneType")])
def test_what_is_not_unicode_text_is_refused(trained, text, word):
    with pytest.raises(ValueError, match=word):
        trained.encode(text)
    with pytest.raises(ValueError, match=word):
        trained.encode_batch(["fine", text])
    with pytest.raises(ValueError, match=word):
        Tokenizer.train(["fine", text], 400)


def test_gpt2_vectors(gpt2):
    cases = json.loads((SHARED / "data/vectors/gpt2_encode.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) >= 15
    for case in cases:
        assert gpt2.encode(case["text"]).tolist() == case["ids"], case["name"]
        assert gpt2.decode(case["ids"]) == case["text"], case["name"]


def test_a_folder_whose_tokenizer_names_no_end_has_the_models(tmp_path):
    """As GPT-2's own: there the names are in the class's code, and the ids in config.json. A null is a word, too."""
    Tokenizer.train(CORPUS, 300, special_tokens=["<end>", "<other>"], bos=None, eos="<end>", pad=None).save(tmp_path)

    def roles(tokenizer_config, **config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = Tokenizer.load(tmp_path)
        return found.bos, found.eos

    ids = {"bos_token_id": 1, "eos_token_id": 0}
    assert roles({"model_max_length": 1024}, **ids) == ("<other>", "<end>")
    assert roles({"bos_token": None}, **ids) == (None, "<end>")
    assert roles({"bos_token": "<end>", "eos_token": "<other>"}, **ids) == ("<end>", "<other>")
    assert roles({"pad_token": "<end>"}, eos_token_id=0) == (None, "<end>")
    assert Tokenizer.load(tmp_path).pad is None  # it pads with its end
    for wrong in (None, [0], 5, 10**9):  # no id, several, a plain token, none at all
        assert roles({}, eos_token_id=wrong) == (None, None)


def test_gpt2_knows_its_one_control_token(gpt2):
    assert (gpt2.vocab_size, gpt2.dtype) == (50257, np.uint16)
    assert gpt2.bos_id == gpt2.eos_id == 50256 and gpt2.pad is gpt2.pad_id is None
    assert 50256 not in gpt2.encode("<|endoftext|>")
    assert gpt2.decode([31373, 50256]) == "hello<|endoftext|>"
    more = Tokenizer.from_gpt2(GPT2 / "encoder.json", GPT2 / "vocab.bpe", special_tokens=["<|im_end|>"], pad="<pad>")
    assert (more.special_tokens["<|im_end|>"], more.eos_id, more.pad_id) == (50257, 50256, 50258)


# ------------------------------------------------------------------ ids to text, at once and one by one


@given(ids=st.lists(st.integers(0, 299) | st.integers(0, len(SPECIAL_TOKENS) - 1)), skip=st.booleans())
def test_tokens_that_arrive_one_by_one_add_up_to_decode(trained, ids, skip):
    decoder = trained.decoder(skip_special=skip)
    for _ in range(2):  # a flushed decoder is as new
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == trained.decode(ids, skip_special=skip)


def test_a_character_is_printed_when_it_is_whole(bytewise):
    decoder = bytewise.decoder()
    assert [decoder.push(i) for i in bytewise.encode("aé🙂b")] == ["a", "", "é", "", "", "", "🙂", "b"]
    assert decoder.flush() == ""
    cut = bytewise.encode("a🙂")[:-1]
    assert [decoder.push(i) for i in cut] == ["a", "", "", ""]
    assert decoder.flush() == "\ufffd"
    assert bytewise.decode(cut) == "a\ufffd"


def test_a_token_is_visible_in_one_line_and_moves_no_terminal(bytewise):
    for text, shown in (("a", "a"), (" ", " "), ("\n", "⏎"), ("\t", "\\t"), ("\r", "\\r"), ("\x1b", "\\x1b")):
        assert list(map(bytewise.visible, bytewise.encode(text))) == [shown]
    assert list(map(bytewise.visible, bytewise.encode("é"))) == ["\\xc3", "\\xa9"]  # parts of a character
    assert bytewise.visible(bytewise.special_tokens["<|im_end|>"]) == "<|im_end|>"
    words = Tokenizer.train(["\u202eé\xa0\n\n"] * 9, SMALLEST_VOCABULARY + 20)
    shown = "".join(map(words.visible, words.encode("\u202eé\xa0\n\n")))
    assert shown == "\\u202eé\\xa0⏎⏎"  # what turns the line around, and a blank that is none
    with pytest.raises(ValueError, match="id 999 is not in the vocabulary"):
        words.visible(999)


def test_control_tokens_are_shown_or_skipped(trained):
    ids = [trained.bos_id, *trained.encode("the cat"), trained.special_tokens["<|im_end|>"], trained.pad_id]
    assert trained.decode(ids) == "<s>the cat<|im_end|><pad>"
    assert trained.decode(np.array(ids), skip_special=True) == "the cat"
    assert trained.decode([]) == ""


@pytest.mark.parametrize("token_id", [400, 65535])
def test_an_id_beyond_the_vocabulary_is_a_replacement_character(trained, token_id):
    """Embeddings are often rounded up, and a model can draw a row that no token has."""
    the = trained.encode("the")
    assert trained.decode([*the, token_id, *the], skip_special=True) == "the\N{REPLACEMENT CHARACTER}the"
    with pytest.raises(ValueError, match=f"id {token_id} is not in the vocabulary of {trained.vocab_size}"):
        trained.token_bytes(token_id)


@pytest.mark.parametrize("token_id", [-1, -100])
def test_an_id_that_is_none_is_refused(trained, token_id):
    with pytest.raises(ValueError, match=f"id {token_id} is not in the vocabulary of {trained.vocab_size}"):
        trained.decode([0, token_id])
    with pytest.raises(ValueError, match=f"id {token_id} "):
        trained.decoder().push(token_id)


# ------------------------------------------------------------------ training


def test_training_is_deterministic_and_learns(trained):
    again = Tokenizer.train(iter(CORPUS), vocab_size=400)
    assert again._backend.to_str() == trained._backend.to_str()
    assert SMALLEST_VOCABULARY < trained.vocab_size <= 400 and len(trained) == trained.vocab_size
    assert len(trained.encode("the cats sat there")) < 10


def test_ids_are_control_tokens_then_bytes_then_merges(trained):
    assert list(trained.special_tokens.items()) == [(name, n) for n, name in enumerate(SPECIAL_TOKENS)]
    own = Tokenizer.train(CORPUS, 300, special_tokens=["<turn>", "<end>"], bos=None, eos="<end>", pad="<pad>")
    assert own.special_tokens == {"<turn>": 0, "<end>": 1, "<pad>": 2}
    assert (own.bos, own.bos_id, own.eos_id, own.pad_id) == (None, None, 1, 2)
    assert sorted(len(own.token_bytes(i)) for i in range(3, 259)) == [1] * 256


def test_text_that_is_full_of_control_tokens_teaches_no_way_to_forge_them():
    tokenizer = Tokenizer.train(["</s><|im_end|><pad>"] * 50, 500)
    assert tokenizer.decode(tokenizer.encode("</s><|im_end|><pad>"), skip_special=True) == "</s><|im_end|><pad>"
    with pytest.raises(ValueError, match="text can forge the control token 'STOP'"):
        Tokenizer.train(["STOP STOP"] * 50, 500, special_tokens=["STOP"])


def test_a_foreign_vocabulary_whose_merges_spell_a_control_token_is_refused(tmp_path):
    vocabulary = byte_vocabulary(["en", "end"])
    paths = files(tmp_path, vocabulary, [("e", "n"), ("en", "d")])
    Tokenizer.from_gpt2(*paths, bos=None, eos=None)
    with pytest.raises(ValueError, match="text can forge the control token 'end'"):
        Tokenizer.from_gpt2(*paths, bos=None, eos="end")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 256 + len(SPECIAL_TOKENS) - 1}, "too small: 256 bytes and 12 control tokens"),
        ({"vocab_size": 0}, "too small"),
        ({"pad": "</s>"}, "pad and eos are both '</s>'"),
        ({"texts": "one string"}, "iterable of strings"),
    ],
)
def test_training_that_can_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(**({"texts": CORPUS, "vocab_size": 400} | arguments))


@pytest.mark.parametrize("size, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_id_type_follows_the_vocabulary(tmp_path, size, dtype):
    vocabulary = byte_vocabulary(f"token{n}" for n in range(size - 257))
    tokenizer = Tokenizer.from_gpt2(*files(tmp_path, vocabulary))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size, size - 1)
    assert tokenizer.dtype == tokenizer.encode("x").dtype == tokenizer.encode_batch(["x"])[0].dtype == dtype


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["", "tokenizer.json", "mine.json"])
def test_saved_and_loaded_is_the_same(trained, tmp_path, name):
    trained.save(tmp_path / name)
    again = Tokenizer.load(tmp_path / name)
    assert again.special_tokens == trained.special_tokens
    assert (again.bos, again.eos, again.pad, again.pad_id) == ("<s>", "</s>", "<pad>", 2)
    for text in [*CORPUS, *HARD_TEXTS]:
        assert again.encode(text).tolist() == trained.encode(text).tolist()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again.save(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {name or "tokenizer.json", f"{Path(name or 'tokenizer.json').stem}_config.json"}


def test_roles_come_from_the_config_and_from_the_call(trained, tmp_path):
    trained.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|im_end|>"}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos, loaded.eos, loaded.pad) == ("<s>", "<|im_end|>", None)
    assert Tokenizer.load(tmp_path, pad="<pad>").pad_id == 2
    assert Tokenizer.load(tmp_path / "tokenizer.json", bos=None).bos is None
    config.write_text(json.dumps({"eos_token": "</s>", "pad_token": "</s>"}))
    assert Tokenizer.load(tmp_path).pad is None  # somebody else's habit
    with pytest.raises(ValueError, match="pad and eos are both '</s>'"):
        Tokenizer.load(tmp_path, pad="</s>")
    with pytest.raises(ValueError, match="bos is '<bos>', which is not in the vocabulary"):
        Tokenizer.load(tmp_path, bos="<bos>")
    config.unlink()
    assert Tokenizer.load(tmp_path).eos is None


def test_a_role_makes_a_token_a_control_token(trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained._backend.to_str())
    backend.add_tokens([tokenizers.AddedToken("<stop>", special=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    plain, stop = Tokenizer.load(tmp_path), Tokenizer.load(tmp_path, eos="<stop>")
    new = plain.vocab_size - 1
    assert plain.encode("a<stop>").tolist()[-1] == new  # an ordinary token, which text may have
    assert stop.eos_id == new and new not in stop.encode("a<stop>") and stop.vocab_size == plain.vocab_size
    assert plain.decode([new]) == stop.decode([new]) == "<stop>"


def test_truncation_and_padding_in_a_file_do_not_act(trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained._backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "x" * 20
    assert Tokenizer.load(tmp_path).encode(text).tolist() == trained.encode(text).tolist()


def test_somebody_elses_tokenizer_loads():
    if not FIXTURE.exists():
        pytest.skip(f"needs a tokenizer.json in {FIXTURE}")
    tokenizer = Tokenizer.load(FIXTURE)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, "<|im_end|>", "<|endoftext|>")
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def lossy_backends():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, "?"))
    few_bytes = module.bare_backend({"a": 0, "b": 1}, [])
    lower, prefix, stripped = (module.bare_backend(byte_vocabulary(), []) for _ in range(3))
    lower.normalizer = tokenizers.normalizers.Lowercase()
    stripped.normalizer = tokenizers.normalizers.Strip()
    prefix.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "words": (words, "not a byte-level vocabulary"),
        "few bytes": (few_bytes, r"no token for 24\d of the bytes"),
        "lower case": (lower, "comes back as"),
        "stripped": (stripped, "comes back as"),
        "prefix": (prefix, "comes back as"),
    }


@pytest.mark.parametrize("name", lossy_backends())
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, name):
    backend, message = lossy_backends()[name]
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_files_that_are_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"messages": []}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    encoder, merges = files(tmp_path, byte_vocabulary())
    merges.write_text("one\n")
    with pytest.raises(ValueError, match="are not a vocabulary and its merges"):
        Tokenizer.from_gpt2(encoder, merges)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_gpt2(encoder, tmp_path / "nothing")
