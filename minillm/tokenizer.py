"""
Byte-level BPE: text to token ids and back, on the `tokenizers` library.

Text is split into words (GPT-2's rule), a word into its UTF-8 bytes, and pairs of tokens are merged in the order in
which training found them. All 256 bytes are tokens, so every text has ids and `decode(encode(text)) == text`.

Beside these stand the control tokens: the begin and end of a text, padding, the marks of chat turns. Their ids come
from their names alone, `special_tokens[name]`, and **never from text**: `encode("<|im_end|>")` spells the ten
characters. So what a user types can not end a turn, whoever builds the prompt (minillm.chat puts the two together).

Padding is never the end of a text: one id for both would take the stop token out of every loss that masks padding.
"""

import codecs
import json
from itertools import count
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from minillm.files import read_object, read_text

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Every mark that the templates of minillm.chat write, so that a tokenizer trained with the defaults speaks them all.
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA2 = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *CHATML, *LLAMA2, *LLAMA3)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # no merges: one token for one byte

UNUSED_BYTES = {0xC0, 0xC1, *range(0xF5, 0x100)}  # they do not occur in UTF-8, and a vocabulary may lack them

# Every tokenizer that comes in has to give these back: case, line ends, an escape, wide characters, spaces at the ends.
PROBES = ("A  b\r\n\t\0\x1b é🙂.\n", "  ")


def byte_alphabet():
    """256 characters, of which the one at index b stands for byte b in tokenizer files (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = count(256)
    return [chr(b if b in printable else next(spare)) for b in range(256)]


def require_unicode(text):
    """ValueError where `text` is not a string that UTF-8 can spell."""
    if not isinstance(text, str):
        raise ValueError(f"text has to be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"character {error.start} is the lone surrogate U+{code:04X}: not Unicode text") from None
    return text


class Tokenizer:
    """A byte-level BPE vocabulary with its control tokens; or SentencePiece's BPE, which falls back on bytes (Llama 2).

    Made by `train`, `load` or `from_gpt2`; pickles, and never changes.

    special_tokens   {name: id} of the control tokens
    bos, eos, pad    names of the three with a role, None where there is none; bos_id, eos_id, pad_id are their ids
    vocab_size       the largest id + 1, so also the rows that an embedding needs
    dtype            the id type: uint16 up to 65,536 ids, else uint32
    """

    def __init__(self, backend, bos=None, eos=None, pad=None):
        """Wraps a `tokenizers.Tokenizer`, which belongs to this object from then on.

        ValueError: a role that is no token, pad == eos, a vocabulary that is not byte-level or loses text.
        """
        if pad is not None and pad == eos:
            raise ValueError(f"pad and eos are both {pad!r}: padding has to be a token of its own")
        for role, name in (("bos", bos), ("eos", eos), ("pad", pad)):
            if name is not None and backend.token_to_id(name) is None:
                raise ValueError(f"{role} is {name!r}, which is not in the vocabulary")
        # A token with a role is a control token, even if its file does not say so; the ids stay as they are.
        backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in (bos, eos, pad) if n])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as text; a copy of the backend forgets this, hence __reduce__
        self._backend = backend
        self.bos, self.eos, self.pad = bos, eos, pad

        vocabulary = backend.get_vocab()
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.bos_id, self.eos_id, self.pad_id = (None if n is None else vocabulary[n] for n in (bos, eos, pad))

        falls_back = json.loads(backend.to_str())["model"].get("byte_fallback", False)
        alphabet = [f"<0x{b:02X}>" for b in range(256)] if falls_back else byte_alphabet()
        if missing := [b for b, name in enumerate(alphabet) if name not in vocabulary and b not in UNUSED_BYTES]:
            raise ValueError(f"not a byte-level vocabulary: it has no token for {len(missing)} of the bytes of UTF-8")
        byte = {name: b for b, name in enumerate(alphabet)}
        self._bytes = {}
        for name, i in vocabulary.items():
            if falls_back:  # SentencePiece: characters, a mark for the blank, and bytes where no character will do
                self._bytes[i] = bytes([byte[name]]) if name in byte else name.replace("\u2581", " ").encode()
            else:
                spelt = i not in added and all(char in byte for char in name)
                self._bytes[i] = bytes(byte[char] for char in name) if spelt else name.encode()
        self._control_ids = frozenset(self.special_tokens.values())
        # SentencePiece puts a blank before every text, which decoding takes away again
        self._adds_blank = b"".join(map(self.token_bytes, self.encode("A"))) == b" A"

        for text in PROBES:
            if (back := self.decode(self.encode(text))) != text:
                raise ValueError(f"not a lossless byte-level tokenizer: {text!r} comes back as {back!r}")
        for name in self.special_tokens:
            self.encode(name)

    def __reduce__(self):
        return Tokenizer, (self._backend, self.bos, self.eos, self.pad)

    def __len__(self):
        return self.vocab_size

    # ------------------------------------------------------------------ where tokenizers come from

    @classmethod
    def train(cls, texts, vocab_size, *, special_tokens=SPECIAL_TOKENS, bos=BOS, eos=EOS, pad=PAD):
        """Learns merges from an iterable of strings, read once. The same texts give the same tokenizer.

        The control tokens come first (ids 0, 1, ...; bos, eos and pad are added to `special_tokens` if they are not in
        it), then the bytes, then the merges, most frequent first. Little text may give fewer than `vocab_size` tokens;
        none at all gives the bytes. ValueError: a vocabulary too small for the control tokens and the 256 bytes, pad ==
        eos, a text that is not Unicode.
        """
        if isinstance(texts, str):
            raise ValueError("train takes an iterable of strings, not one string")
        names = list(dict.fromkeys(name for name in (*special_tokens, bos, eos, pad) if name is not None))
        if vocab_size < 256 + len(names):
            raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(names)} control tokens")
        backend = bare_backend({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
            initial_alphabet=byte_alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(map(require_unicode, texts), trainer)
        return cls(backend, bos, eos, pad)

    @classmethod
    def from_gpt2(cls, encoder, merges, *, special_tokens=(), bos="<|endoftext|>", eos="<|endoftext|>", pad=None):
        """From GPT-2's two files: `encoder.json` ({token: id}) and `vocab.bpe` (two tokens to merge in each line).

        Names in `special_tokens`, bos, eos and pad that the vocabulary does not have get the next free ids. ValueError:
        as the class, and files that are something else.
        """
        try:
            vocabulary = json.loads(Path(encoder).read_text(encoding="utf-8"))
            lines = Path(merges).read_text(encoding="utf-8").split("\n")
            pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            backend = bare_backend(vocabulary, pairs)
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{encoder} and {merges} are not a vocabulary and its merges: {error}") from error
        names = dict.fromkeys(name for name in (*special_tokens, bos, eos, pad) if name is not None)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return cls(backend, bos, eos, pad)

    @classmethod
    def load(cls, path, **roles):
        """Reads a tokenizer.json, or the one in the folder `path`; anybody's, if it is byte-level.

        The names of bos, eos and pad come from the tokenizer_config.json beside it (Hugging Face's name for it) and
        from `roles`, which go first: `load(path, pad="<unused0>")`. Where neither speaks of bos or eos, as GPT-2's do,
        a model's config.json in the folder may have its id. A file whose config pads with its eos has no pad.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        text = read_text(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        config = read_object(config_of(path)) if config_of(path).exists() else {}
        names = {}
        for role in ("bos", "eos", "pad"):
            name = config.get(f"{role}_token")
            names[role] = name.get("content") if isinstance(name, dict) else name
            if not isinstance(name, str | dict | None) or not isinstance(names[role], str | None):
                raise ValueError(f"{config_of(path)}: {role}_token has to be the name of a token, and is {name!r:.60}")
        silent = [role for role in ("bos", "eos") if f"{role}_token" not in config]
        if silent and (model := path.with_name("config.json")).exists():
            values, added = read_object(model), backend.get_added_tokens_decoder()
            for role in silent:
                token = added.get(place) if isinstance(place := values.get(f"{role}_token_id"), int) else None
                names[role] = token.content if token and token.special else None
        if names["pad"] == names["eos"]:
            names["pad"] = None
        return cls(backend, **(names | roles))

    def save(self, path):
        """Writes tokenizer.json to `path`, or into the folder `path`, and tokenizer_config.json beside it.

        tokenizer.json has no place for the roles of control tokens, so it takes both files to keep them. For another
        name X.json the second file is X_config.json. Both are what Hugging Face's transformers reads.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        roles = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # older readers would delete spaces before punctuation
            "model_input_names": ["input_ids", "attention_mask"],  # by default a third, which these models refuse
            "unk_token": None,  # nothing is unknown to bytes; some readers would add a token of their own
            **{key: name for key, name in roles.items() if name is not None},
        }
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        config_of(path).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    # ------------------------------------------------------------------ text to ids and back

    def encode(self, text):
        """The ids of a string, (n,) of `dtype`; no control token among them, and none added before or after.

        ValueError: not a string, or a lone surrogate in it, which no UTF-8 can spell.
        """
        return self._checked(self._backend.encode(require_unicode(text), add_special_tokens=False).ids)

    def encode_batch(self, texts):
        """`encode` of each of a list of strings, on all cores."""
        encodings = self._backend.encode_batch([require_unicode(t) for t in texts], add_special_tokens=False)
        return [self._checked(encoding.ids) for encoding in encodings]

    def _checked(self, ids):
        """`ids` as an array. Somebody's merges may spell a control token: then better no ids than these."""
        if not self._control_ids.isdisjoint(ids):
            name = next(name for name, i in self.special_tokens.items() if i in ids)
            raise ValueError(f"text can forge the control token {name!r}: the vocabulary's own merges spell it")
        return np.array(ids, self.dtype)

    def token_bytes(self, token_id):
        """The bytes of one token; of a control token, its name. ValueError: no such id."""
        try:
            return self._bytes[int(token_id)]
        except KeyError:
            raise ValueError(f"id {token_id} is not in the vocabulary of {self.vocab_size}") from None

    def visible(self, token_id):
        """One token in one line, for people: a newline is ⏎, and what a terminal would obey, or not show, is an escape;
        so is a part of a character. ValueError: no such id."""
        text = self.token_bytes(token_id).decode("utf-8", "backslashreplace")
        escape = lambda char: char.encode("unicode_escape").decode()
        return "".join("⏎" if c == "\n" else c if c.isprintable() else escape(c) for c in text)

    def decode(self, ids, skip_special=False):
        """The text of a sequence of ids. Control tokens give their names, or nothing with `skip_special`.

        Bytes that are no UTF-8 (a sequence may be cut inside a character) become U+FFFD, and so do ids beyond the
        vocabulary (see Decoder.push). ValueError: a negative id.
        """
        decoder = self.decoder(skip_special)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def decoder(self, skip_special=False):
        """A `Decoder`, to print tokens as they are made: what its calls return adds up to `decode` of all the ids."""
        return Decoder(self, skip_special)


class Decoder:
    """Ids to text one at a time: a token may end inside a character, whose first bytes then wait here for the rest."""

    def __init__(self, tokenizer, skip_special=False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer._control_ids if skip_special else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._adds_blank = tokenizer._adds_blank

    def push(self, token_id):
        """The text that this token completes, which may be empty. A model may have more rows than its tokenizer has
        tokens (a size that is rounded up): one of those is U+FFFD. ValueError: a negative id."""
        if token_id >= 0 and int(token_id) not in self._tokenizer._bytes:
            return self._utf8.decode(b"\xff")
        spelt = self._tokenizer.token_bytes(token_id)
        if self._adds_blank and token_id not in self._tokenizer._control_ids:
            spelt, self._adds_blank = spelt.removeprefix(b" "), False
        return "" if token_id in self._skipped else self._utf8.decode(spelt)

    def flush(self):
        """What an unfinished character leaves: U+FFFD, or nothing where there is none. Ready for a new text."""
        self._adds_blank = self._tokenizer._adds_blank
        return self._utf8.decode(b"", final=True)


def bare_backend(vocabulary, merges):
    """The library's tokenizer as GPT-2 sets it up: its splitting rule, bytes as characters, nothing else."""
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def config_of(path):
    """Where the names of bos, eos and pad stand: tokenizer_config.json for tokenizer.json."""
    return path.with_name(f"{path.stem}_config.json")
