"""
Documents from files: .txt, .jsonl, .parquet, .arrow, the first two also compressed (.zst, .gz), and folders of them.

Everything is read as a stream: memory holds a line or a batch of rows, never a file. A line ends at \\n, nowhere else:
U+2028 and its like occur inside strings, and str.splitlines would cut there.

A bad line never passes in silence: `Bad` counts it, with its file, line and reason, and raises one line of text as
soon as there are more than the user allows.
"""

import codecs
import gzip
import io
import zlib
from pathlib import Path
from typing import NamedTuple

from ..extras import extra
from ..files import json_type, parse_json

MAX_LINE = 32 << 20  # bytes; a longer line is a damaged file or a hostile one
TABLE_PIECE = 64 << 20  # bytes of a Parquet column that are decoded together, as far as the file is honest
BOMB = 128 << 20, 100  # a column of so many bytes that is so many times smaller in the file is no text
TEXT_PIECE = 1 << 16  # characters of a .txt file that become one document, up to the next blank line
COMPRESSED = (".zst", ".gz")
SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")


class Document(NamedTuple):
    """One text on its way through the pipeline."""

    text: str
    source: str  # the name that its counts stand under
    where: str  # "file:line", for messages


class Source(NamedTuple):
    """Files whose documents are counted under one name."""

    name: str
    files: tuple
    left_out: tuple  # files of the folder that are not read: other splits, other kinds


class Bad:
    """Counts malformed lines: more than `limit` of them, and `add` raises ValueError with the last one's place."""

    def __init__(self, limit=0):
        self.limit, self.count, self.examples = limit, 0, []

    def add(self, where, reason):
        self.count += 1
        if len(self.examples) < 20:
            self.examples.append(f"{where}: {reason}")
        if self.count > self.limit:
            more = f" (bad line {self.count}, and {self.limit} may be skipped)" if self.limit else ""
            raise ValueError(f"{where}: {reason}{more}")


# ------------------------------------------------------------------ what to read


def find_sources(inputs):
    """The Sources that `inputs` name: "PATH" or "NAME=PATH", where PATH is a file or a folder.

    A folder is read whole, subfolders too, in the order of the names. Where its files name splits in the Hugging Face
    way (train-00000-of-00002.parquet, test.jsonl, data/validation/...), only the train split is taken.
    ValueError: a path that is not there or of no known kind, an empty folder, two sources of one name.
    """
    sources = []
    for given in inputs:
        name, _, path = str(given).rpartition("=")
        path = Path(path)
        if not path.exists() and Path(given).exists():  # a path with = in it
            name, path = "", Path(given)
        if path.is_dir():
            files, left_out = _folder(path)
        elif path.exists():
            _kind(path)
            files, left_out = (path,), ()
        else:
            raise ValueError(f"{path}: no such file or folder")
        name = name or (path.resolve().name if path.is_dir() else path.name.split(".")[0])
        if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"{given}: {name!r} is no name for a source; give one of letters and digits as NAME=PATH")
        if name in [s.name for s in sources]:
            raise ValueError(f"{given}: there is a source {name} already; tell them apart with NAME=PATH")
        sources.append(Source(name, files, left_out))
    return sources


def _kind(path):
    """(.suffix, .compression or "") of a file that can be read."""
    compression = path.suffix if path.suffix in COMPRESSED else ""
    suffix = path.with_suffix("").suffix if compression else path.suffix
    if suffix not in SUFFIXES or (compression and suffix not in (".txt", ".jsonl")):
        hint = "; write JSON lines, one object a line" if suffix == ".json" else ""
        raise ValueError(f"{path}: not a kind of file that can be read (.txt, .jsonl, .parquet, .arrow){hint}")
    return suffix, compression


def _folder(folder):
    found, left_out = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            continue
        try:
            _kind(path)
        except ValueError:
            left_out.append(path)
        else:
            (left_out if path.name.lower() in ("license.txt", "readme.txt") else found).append(path)
    split = {path: _split(path.relative_to(folder)) for path in found}
    if "train" in split.values():
        left_out += [path for path in found if split[path] in ("validation", "test")]
        found = [path for path in found if split[path] not in ("validation", "test")]
    if not found:
        raise ValueError(f"{folder}: holds no .txt, .jsonl, .parquet or .arrow file")
    return tuple(found), tuple(left_out)


def _split(path):
    """train, validation, test or None: what the name of a file, or of a folder it is in, begins with."""
    words = {"train": "train", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
    words["validation"] = words["eval"] = "validation"
    for part in path.parts:
        word = part.lower().replace("_", "-").replace(".", "-").split("-")[0]
        if word in words:
            return words[word]
    return None


# ------------------------------------------------------------------ documents


def read(sources, *, key="text", bad=None, on_bytes=lambda count: None, max_line=MAX_LINE):
    """Every Document of `sources` (a list from find_sources, or paths), in order.

    key       the field (of a JSON object) or column (of a table) that holds the text
    bad       a Bad that counts malformed lines; without one the first of them raises ValueError
    on_bytes  called with the number of bytes of input that have been consumed since its last call
    """
    if any(not isinstance(s, Source) for s in sources):
        sources = find_sources(sources)
    bad = Bad() if bad is None else bad
    for source in sources:
        for path in source.files:
            count = 0
            for where, text in _texts(path, key, bad, on_bytes, max_line):
                yield Document(text, source.name, where)
                count += 1
            if not count:
                bad.add(path, "holds no document")


def _texts(path, key, bad, on_bytes, max_line):
    """(where, text) of each document in one file."""
    kind, _ = _kind(path)
    if kind in (".parquet", ".arrow"):
        yield from _table(path, kind, key, bad, on_bytes, max_line)
    elif kind == ".txt":
        yield from _pieces(path, bad, on_bytes, max_line)
    else:
        for where, row in read_rows(path, bad=bad, on_bytes=on_bytes, max_line=max_line):
            if key not in row:
                bad.add(where, f"no field {key!r}, only {', '.join(map(repr, row)) or 'nothing'}")
            elif not isinstance(row[key], str):
                bad.add(where, f"field {key!r} is {json_type(row[key])}, not a string")
            else:
                yield where, row[key]


def read_rows(path, *, bad=None, on_bytes=lambda count: None, max_line=MAX_LINE):
    """(where, object) of each line of a .jsonl file, compressed or not; empty lines are no lines.

    Strict: a line is one object; NaN, numbers beyond float64, a key that occurs twice, lone surrogates and invalid
    UTF-8 are bad lines.
    """
    bad = Bad() if bad is None else bad
    if _kind(Path(path))[0] not in (".jsonl", ".txt"):
        raise ValueError(f"{path}: is a table, and JSON lines are needed, one object a line")
    for number, line in _lines(Path(path), bad, on_bytes, max_line):
        if line := line.strip(" \t\r\n"):
            where = f"{path}:{number}"
            try:
                yield where, parse_row(line)
            except ValueError as error:
                bad.add(where, error)


def parse_row(line):
    """The object that one line of JSON spells; ValueError with the reason, in columns of the line, where it is none."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f'{json_type(row)}, where an object like {{"text": ...}} is needed')
    return row


def _pieces(path, bad, on_bytes, max_line):
    """A .txt file in pieces of about TEXT_PIECE characters that end at a blank line; a smaller file is one document."""
    first, lines, size = 1, [], 0
    for number, line in _lines(path, bad, on_bytes, max_line):
        if not lines:
            first = number
        lines.append(line)
        size += len(line)
        if size >= TEXT_PIECE and (not line.strip() or size >= 4 * TEXT_PIECE):
            yield f"{path}:{first}", "".join(lines)
            lines, size = [], 0
    if size:
        yield f"{path}:{first}", "".join(lines)


def _table(path, kind, key, bad, on_bytes, max_line):
    """The texts of one column of a Parquet or Arrow file, a batch of rows at a time."""
    pyarrow, size, told = extra("pyarrow", "data"), path.stat().st_size, 0
    try:
        if kind == ".parquet":
            table = extra("pyarrow.parquet", "data").ParquetFile(path)
            schema, rows = table.schema_arrow, table.metadata.num_rows
        else:
            table, rows = _open_arrow(pyarrow, path), None
            schema = table.schema
        if key not in schema.names:
            raise ValueError(f"{path}: no column {key!r}, only {', '.join(map(repr, schema.names)) or 'nothing'}")
        if kind == ".parquet":
            batches = table.iter_batches(_rows_at_once(path, table.metadata, key), columns=[key], use_threads=False)
        else:
            batches = iter(table)
        row = 0
        for batch in batches:
            for text in batch.column(batch.schema.get_field_index(key)).to_pylist():
                row += 1
                if isinstance(text, str) and len(text) > max_line:
                    bad.add(
                        f"{path}:{row}", f"a text of {len(text):,} characters, and the longest allowed is {max_line:,}"
                    )
                elif isinstance(text, str):
                    yield f"{path}:{row}", text
                else:
                    bad.add(f"{path}:{row}", f"column {key!r} is {json_type(text)}, not a string")
            done = int(size * row / rows) if rows else told
            on_bytes(done - told)
            told = done
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, or not {kind[1:]}: {str(error).splitlines()[0]}") from None
    on_bytes(size - told)


def _rows_at_once(path, metadata, key):
    """How many rows of a Parquet file to decode together. Few bytes can stand for many in it: rows may share one long
    text, and compression adds to that. ValueError: a column that is a decompression bomb."""
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size, stored = column.total_uncompressed_size, column.total_compressed_size
            if column.path_in_schema == key:
                largest = max(largest, size)
                if size > BOMB[0] and size > BOMB[1] * stored:
                    told = f"column {key!r} has {stored:,} bytes that become {size:,}"
                    raise ValueError(f"{path}: {told}: no text is like that")
    return max(1, min(256, TABLE_PIECE // largest))


def _open_arrow(pyarrow, path):
    """The batches of an Arrow stream (what `datasets` saves) or of an Arrow file, which begins with a magic word."""
    ipc = extra("pyarrow.ipc", "data")
    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
    if not is_file:
        return ipc.open_stream(pyarrow.memory_map(str(path)))
    reader = ipc.open_file(pyarrow.memory_map(str(path)))
    return pyarrow.RecordBatchReader.from_batches(
        reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    )


# ------------------------------------------------------------------ bytes and lines


def _lines(path, bad, on_bytes, max_line):
    """(number from 1, line with its \\n) of a text file, decoded. Bad lines are counted and left out."""
    with open(path, "rb", buffering=0) as file:
        stream = io.BufferedReader(_Counted(file, on_bytes), 1 << 16)
        compression = _kind(path)[1]
        if compression == ".gz":
            stream = gzip.GzipFile(fileobj=stream)
        elif compression == ".zst":
            stream = io.BufferedReader(_Zstandard(stream), 1 << 16)
        number = 0
        while True:
            number += 1
            try:
                line = stream.readline(max_line + 1)
                length = len(line)
                if length > max_line:
                    line = b""
                    while piece := stream.readline(1 << 20):
                        length += len(piece)
                        if piece.endswith(b"\n"):
                            break
            except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as error:
                raise ValueError(f"{path}:{number}: the compressed data is damaged: {error}") from None
            if not length:
                return
            if length > max_line:
                bad.add(f"{path}:{number}", f"a line of {length:,} bytes, and the longest allowed is {max_line:,}")
                continue
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{path}: is UTF-16; convert it to UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                bad.add(f"{path}:{number}", f"invalid UTF-8: byte 0x{byte:02X} at position {error.start}")


class _Damaged(Exception):
    """Compressed data that can not be read to its end."""


class _Counted(io.RawIOBase):
    """A raw file that tells how many bytes were read from it."""

    def __init__(self, file, on_bytes):
        self.file, self.on_bytes = file, on_bytes

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.on_bytes(count)
        return count


class _Zstandard(io.RawIOBase):
    """Decompresses Zstandard frames, one after another. The library's own stream ends in silence where the file does;
    this one knows whether the last frame was complete. Input is taken in pieces of 1 KiB: a hostile one of them can
    stand for some 30 MB, not more."""

    def __init__(self, stream):
        self.zstandard = extra("zstandard", "data")
        self.stream, self.frame, self.waiting, self.rest = stream, None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.rest:
            piece = self.waiting or self.stream.read(1024)
            self.waiting = b""
            if not piece:
                if self.frame is not None:
                    raise _Damaged("it ends in the middle of a frame")
                return 0
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            try:
                self.rest = memoryview(self.frame.decompress(piece))
            except self.zstandard.ZstdError as error:
                raise _Damaged(str(error)) from None
            if self.frame.eof:
                self.waiting, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count
