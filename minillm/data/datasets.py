"""
Token files, rows over them, sources mixed by weight, and batches in an order that can be taken up again.

    with TokenWriter("tokens/train.stories", vocab_size) as writer:      text to disk, once
        for document in documents:
            writer.add(tokenizer.encode(document))
    stories = Windows(TokenFile("tokens/train.stories"), length=256)     rows, packed by their lengths alone
    source = Mixture({"stories": stories, "code": code}, {"stories": 0.7, "code": 0.3})
    batches = Batches(source, batch_size=16, seed=0)
    for batch in batches: ...
    batches.load_state_dict(state)                                       goes on where batches.state_dict() was taken

NAME.bin is the ids of all documents one behind the other, little-endian uint16, or uint32 where the vocabulary needs
it. NAME.idx is the offsets in it, in tokens, as little-endian uint64: document i is ids[offsets[i] : offsets[i + 1]].
Both are memory-mapped: a training run holds the offsets, the plan of its rows and one permutation of them, and pages of
the ids come and go.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import zlib
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint import sync
from ..files import check_keys, json_type, read_object
from .pack import LARGEST, Batch, fill, join, plan, whole

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MANIFEST, FORMAT = "manifest.json", 1
MANIFEST_KEYS = ("format", "minillm", "settings", "sources", "bad_lines", "near_duplicates", "evaluation", "tokenizer",
                 "weights", "tokens")  # fmt: skip

# ------------------------------------------------------------------ token files


class TokenWriter:
    """Writes documents to NAME.bin and NAME.idx, for `path` = folder/NAME, in memory that does not grow.

    While it is open, the files end in .tmp. `close`, or the end of a `with` block, brings them to the disk and renames
    them; a block that ends with an error removes them. After that `piece` is what a manifest says about them:
    {"file": NAME, "dtype", "documents", "tokens", "sha256": {"bin", "idx"}}, and until then None.
    """

    def __init__(self, path, vocab_size):
        whole("vocab_size", vocab_size, 1)
        if vocab_size > LARGEST + 1:
            raise ValueError(f"vocab_size = {vocab_size} is more than the {LARGEST + 1} of int32 tokens")
        self.path, self.vocab_size = Path(path), vocab_size
        self.documents = self.tokens = 0
        self.piece = None
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._parts = [_Part(path) for path in _paths(self.path)]
        self._parts[1].write(bytes(8))

    def add(self, ids):
        """Append one document, a sequence of ids.

        ValueError: it is empty, or no sequence of whole numbers from 0 to vocab_size - 1; then nothing is written.
        """
        if self._parts is None:
            raise ValueError(f"{self.path}: the writer is closed")
        ids = np.asarray(ids)
        if ids.size == 0:
            raise ValueError(f"{self.path}: document {self.documents} is empty")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: document {self.documents} has to be one sequence of whole numbers, not {ids.dtype} "
                f"{ids.shape}"
            )
        if ids.max() >= self.vocab_size or ids.min() < 0:
            wrong = next(i for i in ids.tolist() if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"{self.path}: document {self.documents} has the id {wrong}, and the vocabulary is 0 to "
                f"{self.vocab_size - 1}"
            )
        self.documents, self.tokens = self.documents + 1, self.tokens + ids.size
        self._parts[0].write(ids.astype(DTYPES[self._dtype]).tobytes())
        self._parts[1].write(self.tokens.to_bytes(8, "little"))

    def close(self):
        """Bring both files to the disk under their names; returns `piece`. Nothing happens the second time."""
        if self._parts is None:
            return self.piece
        try:
            for part in self._parts:
                part.sync()
            # Whatever moment the machine stops at, there are never ids and offsets of two different runs.
            self._parts[1].path.unlink(missing_ok=True)
            for part in self._parts:
                os.replace(part.temporary, part.path)
            sync(self.path.parent)
        except BaseException:
            self.abort()
            raise
        self.piece = {
            "file": self.path.name,
            "dtype": self._dtype,
            "documents": self.documents,
            "tokens": self.tokens,
            "sha256": {kind: part.hash.hexdigest() for kind, part in zip(("bin", "idx"), self._parts, strict=True)},
        }
        self._parts = None
        return self.piece

    def abort(self):
        """Remove what has been written. Files of an earlier run under the same name stay."""
        for part in self._parts or []:
            with contextlib.suppress(OSError):  # a full disk refuses what is still to be flushed, once more
                part.file.close()
            part.temporary.unlink(missing_ok=True)
        self._parts = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        else:
            self.abort()


class _Part:
    """One of the two files while it is written, and the hash of what is in it."""

    def __init__(self, path):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.file = io.BufferedWriter(io.FileIO(self.temporary, "wb"), 1 << 20)
        self.hash = hashlib.sha256()

    def write(self, data):
        self.file.write(data)
        self.hash.update(data)

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _paths(path):
    """NAME.bin and NAME.idx; a NAME may have dots in it."""
    return path.with_name(path.name + ".bin"), path.with_name(path.name + ".idx")


class TokenFile:
    """The documents that a TokenWriter wrote to `path`, memory-mapped: len, [i], and the arrays that `pack.fill` takes.

    ids      (N,) uint16 or uint32, read-only
    offsets  (n + 1,) int64, read-only
    mask     None: every token is trained

    piece    what the manifest says about it, and then the file has to be so; None: the width of an id is what the sizes
             of the two files say
    verify   also compare the SHA-256 of both files with the piece's, which reads all of both

    ValueError, in one line with the file's name: it is missing, of another size than its offsets or its piece say, its
    offsets do not increase, its dtype is unknown, its hash is another, or the piece is not complete.
    """

    mask = None

    def __init__(self, path, piece=None, verify=False):
        self.path = Path(path)
        data, index = _paths(self.path)
        for file in (data, index):
            if not file.is_file():
                raise ValueError(f"{file} is missing")
        if verify and piece is None:
            raise ValueError(f"{data}: there is no piece of a manifest to verify it with")
        if piece is not None:
            _check_piece(data, piece)

        if index.stat().st_size % 8 or not index.stat().st_size:
            raise ValueError(f"{index} has {index.stat().st_size} bytes, which are no whole number of 8-byte offsets")
        self.offsets = _mapped(index, np.dtype("<i8"))
        if self.offsets[0] != 0:
            raise ValueError(f"{index}: the first offset is {self.offsets[0]}, not 0")
        falls = np.flatnonzero(self.lengths <= 0)
        if falls.size:
            at, (before, after) = falls[0], self.offsets[falls[0] : falls[0] + 2]
            raise ValueError(f"{index}: offset {at + 1} is {after}, which is not more than {before} before it")
        if piece is not None and len(self) != piece["documents"]:
            raise ValueError(f"{index} has {len(self)} documents, and the manifest says {piece['documents']}")

        tokens, size = int(self.offsets[-1]), data.stat().st_size
        if piece is not None and tokens != piece["tokens"]:
            raise ValueError(f"{index} has {tokens} tokens, and the manifest says {piece['tokens']}")
        dtypes = DTYPES if piece is None else {piece["dtype"]: DTYPES[piece["dtype"]]}
        fitting = [dtype for dtype in dtypes.values() if tokens * dtype.itemsize == size]
        if not fitting:
            wanted = " or ".join(str(tokens * dtype.itemsize) for dtype in dtypes.values())
            raise ValueError(f"{data} has {size} bytes, and its {tokens} tokens are {wanted}")
        self.ids = _mapped(data, fitting[0])
        if verify:
            for file, expected in zip((data, index), (piece["sha256"]["bin"], piece["sha256"]["idx"]), strict=True):
                with open(file, "rb") as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()
                if found != expected:
                    raise ValueError(f"{file} has the SHA-256 {found}, and the manifest says {expected}")

    def __len__(self):
        return len(self.offsets) - 1

    @property
    def lengths(self):
        """Tokens per document, (n,) int64."""
        return np.diff(self.offsets)

    def __getitem__(self, i):
        """The ids of document i, a view. IndexError: there is none."""
        i = range(len(self))[i]
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def _check_piece(data, piece):
    """ValueError where a manifest's piece lacks a field, or has one of another kind."""
    kinds = {"file": str, "dtype": str, "documents": int, "tokens": int, "sha256": dict}
    for field, kind in kinds.items():
        if not isinstance(piece.get(field), kind):
            raise ValueError(f"{data}: its piece of the manifest has {field} = {piece.get(field)!r}")
    if piece["dtype"] not in DTYPES:
        raise ValueError(f"{data}: dtype {piece['dtype']!r} is unknown: {', '.join(DTYPES)}")
    if not piece["sha256"].keys() >= {"bin", "idx"}:
        raise ValueError(f"{data}: its piece of the manifest has sha256 = {piece['sha256']!r}")


def _mapped(path, dtype):
    """The file as a read-only array; a file without bytes can not be mapped."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def open_splits(folder, verify=False):
    """{split: {source: TokenFile}} of a folder that holds a manifest.json and the files it names. Errors as below."""
    return {split: load_tokens(folder, split, verify) for split in _pieces(folder)}


def load_tokens(folder, split, verify=False):
    """{source: TokenFile} of one split, for `verify` see TokenFile.

    manifest.json is {"format": 1, "tokens": {split: {source: piece}}, ...} with each piece from a TokenWriter.
    ValueError: no such manifest, format or split, or a file that is not as its piece says.
    """
    pieces = _pieces(folder)
    if split not in pieces:
        raise ValueError(f"{Path(folder) / MANIFEST} has no split {split!r}: {', '.join(pieces)}")
    files = {}
    for source, piece in pieces[split].items():
        if not isinstance(piece, dict) or not isinstance(piece.get("file"), str):
            raise ValueError(f"{Path(folder) / MANIFEST}: tokens.{split}.{source} names no file")
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", piece["file"]):  # no path: it must not lead out of the folder
            told = f"{piece['file']!r:.60} is not the plain name of a file beside it"
            raise ValueError(f"{Path(folder) / MANIFEST}: tokens.{split}.{source}: {told}")
        files[source] = TokenFile(Path(folder) / piece["file"], piece, verify)
    return files


def _pieces(folder):
    """{split: {source: piece}} of a folder's manifest."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ValueError(f"{path} is missing: this is no folder of prepared data")
    manifest = read_object(path)
    found = manifest.get("format")
    if found != FORMAT:
        raise ValueError(f"{path}: format is {found!r}, and this version reads {FORMAT}")
    check_keys(manifest, MANIFEST_KEYS, path, foreign=True)
    if not isinstance(manifest.get("weights"), dict | None):
        raise ValueError(f"{path}: weights has to be {{source: number}}, and is {json_type(manifest['weights'])}")
    pieces = manifest.get("tokens")
    if not isinstance(pieces, dict) or not all(isinstance(sources, dict) for sources in pieces.values()):
        raise ValueError(f"{path}: tokens has to be {{split: {{source: piece}}}}")
    return pieces


# ------------------------------------------------------------------ rows


class Windows:
    """Rows of `length` + 1 tokens over documents: len, and `rows(indices)` for a Batch.

    documents  a TokenFile, or documents as `pack.pack` takes them, which are copied
    method     "best_fit", "greedy" or "pad", see `pack.plan`

    The plan depends on the lengths alone. It holds 12 bytes per piece of a document (most documents are one piece) and
    8 per row, and takes about 70 bytes per piece while it is made. Errors as `pack.pack`.
    """

    def __init__(self, documents, length, method="best_fit", pad_id=0):
        whole("length", length, 1)
        whole("pad_id", pad_id, 0)
        if isinstance(documents, TokenFile):
            documents = _Documents(documents.ids, documents.offsets, documents.mask)
        else:
            documents = _Documents(*join(documents))
        self.documents, self.length, self.method, self.pad_id = documents, int(length), method, int(pad_id)
        self.plan = plan(np.diff(documents.offsets), self.length, method)

    def __len__(self):
        return self.plan.rows

    def rows(self, indices):
        """The Batch of these rows, (B,) int from 0 to len - 1. IndexError: there is no such row."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows are 0 to {len(self) - 1}, not {indices.min()} to {indices.max()}")
        ids, offsets, mask = self.documents
        return fill(self.plan, indices, ids, offsets, mask, self.pad_id)

    def identity(self):
        """What these rows are made of, a small dict for `Batches.state_dict`: other data or settings give another one.

        `checksum` is the CRC-32 of all offsets, of 1,024 of the ids, evenly spread, and of the mask at the same places.
        """
        ids, offsets, mask = self.documents
        sample = np.linspace(0, max(len(ids) - 1, 0), min(1024, len(ids))).astype(np.int64)
        checksum = zlib.crc32(offsets.astype("<i8", copy=False))
        checksum = zlib.crc32(ids[sample].astype("<u4"), checksum)
        if mask is not None:
            checksum = zlib.crc32(mask[sample].tobytes(), checksum)
        return {
            "documents": len(offsets) - 1,
            "tokens": len(ids),
            "rows": len(self),
            "length": self.length,
            "method": self.method,
            "pad_id": self.pad_id,
            "checksum": checksum,
        }


class _Documents(NamedTuple):
    """As `pack.join` returns them."""

    ids: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray | None


class Items:
    """Arrays, strings, numbers, and tuples or lists of them, in place of rows, for `Batches`: a batch is then a list of
    such items. They are not for a Mixture of several sources.

    source  what the items were made of, as many: it has to be the same again where a run goes on, though what was
            computed from it may differ in the last bits. None: the items themselves
    """

    length = 0  # rows have one, items do not

    def __init__(self, items, source=None):
        self.items = list(items)
        self.source = self.items if source is None else list(source)

    def __len__(self):
        return len(self.items)

    def rows(self, indices):
        """These items, in a list."""
        return [self.items[i] for i in indices]

    def identity(self):
        """See Windows.identity. The source of up to 1,024 items, evenly spread, is looked at."""
        sample = np.linspace(0, len(self) - 1, min(1024, len(self))).astype(np.int64)
        checksum = 0
        for i in sample:
            checksum = _checksum(self.source[i], checksum)
        return {"rows": len(self), "checksum": checksum}


def _checksum(item, before):
    """The CRC-32 of what went before and of an item, looking into tuples and lists."""
    if isinstance(item, tuple | list):
        for part in item:
            before = _checksum(part, before)
        return before
    return zlib.crc32(item.tobytes() if isinstance(item, np.ndarray) else repr(item).encode(), before)


class Mixture:
    """Sources in parts by weight: of the first n rows, each source has its weight's part up to less than one row.

    windows  {name: Windows}, all of one length
    weights  {name: number}, positive; only their ratio counts. 0.7 is 7/10 here, exactly.

    ValueError: no source, a source without rows or without a weight, a weight without a source or not positive, rows of
    different lengths.
    """

    def __init__(self, windows, weights):
        if not windows:
            raise ValueError("a mixture needs at least one source")
        for name in windows.keys() - weights.keys():
            raise ValueError(f"source {name!r} has no weight")
        for name in weights.keys() - windows.keys():
            raise ValueError(f"there is no source {name!r} for its weight: {', '.join(sorted(windows))}")
        for name, weight in weights.items():
            number = isinstance(weight, Real) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise ValueError(f"the weight of source {name!r} is {weight!r}, and has to be a positive number")
            if not len(windows[name]):
                raise ValueError(f"source {name!r} has no rows")
        lengths = {name: source.length for name, source in windows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"sources have rows of different lengths: {lengths}")
        self.windows = {name: windows[name] for name in sorted(windows)}
        exact = {name: Fraction(str(weights[name])) for name in self.windows}
        denominator = math.lcm(*(weight.denominator for weight in exact.values()))
        whole_weights = {name: int(weight * denominator) for name, weight in exact.items()}
        divisor = math.gcd(*whole_weights.values())
        self.weights = {name: weight // divisor for name, weight in whole_weights.items()}
        self._total = sum(self.weights.values())

    def next(self, taken):
        """The name of the source of the next row, after taken[name] rows of each.

        The quota method (Balinski and Young 1975): among the sources for which one more is not above their part of the
        n rows rounded up, the one with the smallest (taken + 1) / weight. Parts then are never off by a whole row. In
        whole numbers, so that no rounding error grows with n.
        """
        n = sum(taken.values()) + 1
        best = None
        for name, weight in self.weights.items():
            if taken[name] * self._total < weight * n and (
                best is None or (taken[name] + 1) * self.weights[best] < (taken[best] + 1) * weight
            ):
                best = name
        return best


# ------------------------------------------------------------------ batches


class Batches:
    """An iterator of Batches over Windows or a Mixture, which can be stopped and taken up again at any batch.

    source      each source is walked through again and again, in another order each time: the permutation of
                np.random.default_rng((seed, epoch, CRC-32 of the source's name)), which takes 8 bytes per row
    shuffle     False: rows in their own order
    epochs      end after so many walks through the rows of a Windows; None: never. A batch may hold the end of one walk
                and the beginning of the next.
    drop_last   leave out the last batch where it is not full; else it is shorter

    ValueError: a number out of range, a Windows without rows, `epochs` of a Mixture, whose sources end at different
    times.
    """

    def __init__(self, source, batch_size, seed=0, shuffle=True, epochs=None, drop_last=False):
        whole("batch_size", batch_size, 1)
        whole("seed", seed, 0)
        if epochs is not None:
            whole("epochs", epochs, 1)
            if isinstance(source, Mixture):
                raise ValueError("epochs are those of one source, and a mixture has several: leave it None")
        self.mixture = source if isinstance(source, Mixture) else Mixture({"rows": source}, {"rows": 1})
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.limit = None if epochs is None else epochs * len(source)
        self.taken = dict.fromkeys(self.mixture.windows, 0)  # rows that have gone out, of each source
        self.last = {}  # the rows of the batch that went out last: {source: [row, ...]}
        self._orders = {}  # the permutation of the epoch that a source is in: {name: (epoch, permutation)}
        self._data = {"seed": int(seed), "shuffle": bool(shuffle)}  # what the rows and their order depend on
        for name, windows in self.mixture.windows.items():
            self._data[f"{name}.weight"] = self.mixture.weights[name]
            self._data |= {f"{name}.{field}": value for field, value in windows.identity().items()}

    def __iter__(self):
        return self

    def __next__(self):
        count = self.batch_size
        if self.limit is not None:
            count = min(count, self.limit - self.taken["rows"])
            if count < 1 or (count < self.batch_size and self.drop_last):
                raise StopIteration
        taken, places = dict(self.taken), {}
        for place in range(count):
            name = self.mixture.next(taken)
            places.setdefault(name, []).append(place)
            taken[name] += 1
        parts, self.last = [], {}
        for name in places:
            self.last[name] = rows = [int(self._row(name, n)) for n in range(self.taken[name], taken[name])]
            parts.append(self.mixture.windows[name].rows(rows))
        self.taken = taken
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate(list(places.values())))
        return Batch(*(np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))

    def _row(self, name, n):
        """The row that is the n-th of a source to go out, counted through all epochs."""
        rows = len(self.mixture.windows[name])
        epoch, position = divmod(n, rows)
        if not self.shuffle:
            return position
        if name not in self._orders or self._orders[name][0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, zlib.crc32(name.encode())))
            self._orders[name] = epoch, rng.permutation(rows)
        return self._orders[name][1][position]

    def state_dict(self):
        """Where this is: {"taken": {source: rows}, "data": what that depends on}, for JSON.

        The batch size is not in it: rows come in the same order in batches of another size.
        """
        return {"taken": dict(self.taken), "data": dict(self._data)}

    def load_state_dict(self, state):
        """Go on behind the last batch before `state` was taken.

        ValueError: the state is of other data, another seed or other weights, with the names of the fields; or it is
        no state. Then nothing has changed.
        """
        taken, theirs = (state.get(key) if isinstance(state, dict) else None for key in ("taken", "data"))
        if not isinstance(taken, dict) or not isinstance(theirs, dict):
            raise ValueError(f"this is no state of Batches: {state!r:.80}")
        ours = self._data
        fields = [field for field in (ours | theirs) if ours.get(field) != theirs.get(field)]
        if fields:
            found = (f"{field} was {theirs.get(field)!r} and is {ours.get(field)!r}" for field in fields)
            raise ValueError(f"the state is of other batches: {'; '.join(found)}")
        if taken.keys() != self.taken.keys():
            raise ValueError(f"the state's taken has the sources {sorted(taken)}, not {sorted(self.taken)}")
        for name, rows in taken.items():
            whole(f"the state's taken[{name!r}]", rows, 0)
        self.taken = {name: int(taken[name]) for name in self.taken}
