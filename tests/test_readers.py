import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from minillm.data.readers import MAX_LINE, TEXT_PIECE, Bad, find_sources, parse_row, read, read_rows

TEXTS = ["one\u2028line", "two\nlines \x85 and\x0b more", "drei 🙂 é", ""]


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts_of(*paths, **options):
    return [document.text for document in read(paths, **options)]


# ------------------------------------------------------------------ what can be read


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    plain = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    frames = zstandard.compress(jsonl(TEXTS[:1])) + zstandard.compress(jsonl(TEXTS[1:]))
    several = write(tmp_path / "c.jsonl.zst", frames)
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), tmp_path / "d.parquet")
    with pa.ipc.new_stream(str(tmp_path / "e.arrow"), pa.schema([("text", pa.string())])) as stream:
        stream.write_table(pa.table({"text": TEXTS}))
    with pa.ipc.new_file(str(tmp_path / "f.arrow"), pa.schema([("text", pa.string())])) as file:
        file.write_table(pa.table({"text": TEXTS}))
    for path in (plain, packed, several, *(tmp_path / name for name in ("d.parquet", "e.arrow", "f.arrow"))):
        assert texts_of(path) == TEXTS, path


@given(st.lists(st.text(), max_size=8))
def test_any_text_comes_back(tmp_path_factory, texts):
    path = write(tmp_path_factory.mktemp("any") / "x.jsonl", jsonl(["", *texts]))
    assert texts_of(path) == ["", *texts]


def test_a_document_knows_its_source_file_and_line(tmp_path):
    path = write(tmp_path / "news.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b"}')
    assert [(d.source, d.where, d.text) for d in read([path])] == [
        ("news", f"{path}:1", "a"),
        ("news", f"{path}:4", "b"),
    ]
    assert [d.source for d in read([f"web={path}"])] == ["web", "web"]


def test_the_text_may_stand_under_another_key(tmp_path):
    assert texts_of(write(tmp_path / "x.jsonl", jsonl(["a"], "content")), key="content") == ["a"]


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraph = "word " * 400 + "\n\n"
    text = paragraph * 200
    pieces = list(read([write(tmp_path / "book.txt", text)]))
    assert "".join(d.text for d in pieces) == text
    assert all(TEXT_PIECE <= len(d.text) < TEXT_PIECE + len(paragraph) for d in pieces[:-1])
    assert all(d.text.endswith("\n\n") for d in pieces)
    assert pieces[1].where == f"{tmp_path}/book.txt:{pieces[0].text.count(chr(10)) + 1}"
    assert texts_of(write(tmp_path / "small.txt", "a\n\nb")) == ["a\n\nb"]
    endless = "x" * 1000 + "\n"  # no blank line anywhere
    assert max(len(d.text) for d in read([write(tmp_path / "log.txt", endless * 1000)])) <= 4 * TEXT_PIECE + 1001


def test_a_folder_is_read_in_order_without_what_is_not_data(tmp_path):
    for name in ("b/x.jsonl", "a.jsonl", "README.md", "LICENSE.txt", ".cache/y.jsonl", "a.jsonl.tmp"):
        write(tmp_path / "corpus" / name, jsonl([name]) if "jsonl" in name else "text")
    (source,) = find_sources([tmp_path / "corpus"])
    assert source.name == "corpus"
    assert [p.relative_to(tmp_path / "corpus").as_posix() for p in source.files] == ["a.jsonl", "b/x.jsonl"]
    assert [p.name for p in source.left_out] == ["LICENSE.txt", "README.md", "a.jsonl.tmp"]


def test_of_a_dataset_with_splits_only_the_train_split_is_read(tmp_path):
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"]
    for name in [*names, "validation/x.jsonl", "more.jsonl"]:
        write(tmp_path / "set" / name, jsonl([name]))
    (source,) = find_sources([tmp_path / "set"])
    assert texts_of(tmp_path / "set") == [*names[:2], "more.jsonl"]
    assert len(source.left_out) == 2
    for name in names:
        (tmp_path / "set" / name).unlink()
    assert len(find_sources([tmp_path / "set"])[0].files) == 2  # no train split: all of it


def test_on_bytes_counts_the_input(tmp_path):
    files = [
        write(tmp_path / "a.jsonl", jsonl(TEXTS * 50)),
        write(tmp_path / "b.jsonl.zst", zstandard.compress(jsonl(TEXTS * 50))),
        write(tmp_path / "c.txt", "text\n" * 99),
    ]
    pq.write_table(pa.table({"text": TEXTS * 500}), tmp_path / "d.parquet", row_group_size=100)
    counts = []
    list(read([*files, tmp_path / "d.parquet"], on_bytes=counts.append))
    assert sum(counts) == sum(p.stat().st_size for p in tmp_path.iterdir()) and min(counts) >= 0


def test_a_long_line_takes_no_memory_and_costs_one_bad_line(tmp_path):
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(jsonl(["before"]))
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')
        file.write(jsonl(["after"]))
    with pytest.raises(
        ValueError, match=f"long.jsonl:2: a line of 104,857,613 bytes, and the longest allowed is {MAX_LINE:,}"
    ):
        texts_of(path)
    assert texts_of(path, bad=Bad(1)) == ["before", "after"]


def test_a_decompression_bomb_is_a_long_line(tmp_path):
    bomb = zstandard.compress(b"0" * (200 << 20))
    assert len(bomb) < 30_000
    with pytest.raises(ValueError, match=r"bomb.jsonl.zst:1: a line of 209,715,200 bytes"):
        texts_of(write(tmp_path / "bomb.jsonl.zst", bomb))


# ------------------------------------------------------------------ bad input: one clear line each

GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "cut off": (b'{"text": "a', "not JSON: unterminated string starting at column 10"),
    "no quotes": (b"{text: 1}", "not JSON: expecting property name enclosed in double quotes at column 2"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON: extra data at column 15"),
    "control character": (b'{"text": "a\tb"}', "not JSON: invalid control character at column 12"),
    "plain text": (b"hello", "not JSON: expecting value at column 1"),
    "a list": (b'["text"]', 'a list, where an object like {"text": ...} is needed'),
    "a string": (b'"text"', 'a string, where an object like {"text": ...} is needed'),
    "null": (b"null", 'null, where an object like {"text": ...} is needed'),
    "no text": (b'{"body": "a", "id": 3}', "no field 'text', only 'body', 'id'"),
    "empty object": (b"{}", "no field 'text', only nothing"),
    "text is null": (b'{"text": null}', "field 'text' is null, not a string"),
    "text is a number": (b'{"text": 3}', "field 'text' is a number, not a string"),
    "text is a list": (b'{"text": ["a"]}', "field 'text' is a list, not a string"),
    "NaN": (b'{"text": "a", "score": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "-Infinity is not JSON"),
    "a huge number": (b'{"text": "a", "score": 1e999}', "the number 1e999 is too large"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
    "nested duplicate": (b'{"text": "a", "meta": {"x": 1, "x": 2}}', "the key 'x' occurs twice"),
    "lone surrogate": (b'{"text": "ab\\ud800"}', "lone surrogate U+D800 at character 2 of a string"),
    "lone surrogate elsewhere": (
        b'{"text": "a", "m": [{"\\uDC00": 1}]}',
        "lone surrogate U+DC00 at character 0 of a string",
    ),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "invalid UTF-8: byte 0xE9 at position 13"),
    "half a character": (b'{"text": "\xf0\x9f\x99"}', "invalid UTF-8: byte 0xF0 at position 10"),
    "an encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8: byte 0xED at position 10"),
    "deep nesting": (b'{"text": ' + b"[" * 200_000, "not usable JSON: it is nested too deeply"),
    "an endless integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a whole number of 5,000 digits is too large"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_reason_and_can_be_skipped(name, tmp_path):
    line, reason = BAD_LINES[name]
    path = write(tmp_path / "x.jsonl", GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError) as caught:
        texts_of(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}") and "\n" not in str(caught.value)
    bad = Bad(limit=1)
    assert texts_of(path, bad=bad) == ["fine", "fine"]
    assert bad.count == 1 and bad.examples[0].startswith(f"{path}:2: {reason}")


def test_more_bad_lines_than_allowed_stop_the_reading(tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD + b"1\n2\n3\n" + GOOD)
    with pytest.raises(ValueError, match=r"x.jsonl:4: a number, where .* \(bad line 3, and 2 may be skipped\)"):
        texts_of(path, bad=Bad(2))
    assert texts_of(path, bad=Bad(3)) == ["fine", "fine"]


def damaged_parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"] * 1000}), sink)
    return sink.getvalue().to_pybytes()[:-20]


DAMAGED = "the compressed data is damaged: "
KINDS = "not a kind of file that can be read (.txt, .jsonl, .parquet, .arrow)"
BAD_FILES = {
    "empty": ("x.jsonl", b"", "{path}: holds no document"),
    "only blank lines": ("x.jsonl", b"\n \n", "{path}: holds no document"),
    "empty text": ("x.txt", b"", "{path}: holds no document"),
    "empty zst": ("x.jsonl.zst", b"", "{path}: holds no document"),
    "UTF-16": ("x.txt", "hello".encode("utf-16"), "{path}: is UTF-16; convert it to UTF-8"),
    "Latin-1": ("x.txt", b"caf\xe9\n", "{path}:1: invalid UTF-8: byte 0xE9 at position 3"),
    "not gzip": ("x.jsonl.gz", b"hello", "{path}:1: " + DAMAGED + "Not a gzipped file"),
    "short gzip": ("x.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "{path}:10: " + DAMAGED + "Compressed file ended"),
    "flipped gzip": ("x.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), "{path}:2: " + DAMAGED + "CRC check failed"),
    "not zst": ("x.jsonl.zst", b"hello", "{path}:1: " + DAMAGED),
    "short zst": ("x.jsonl.zst", zstandard.compress(GOOD * 9)[:-3], "{path}:1: " + DAMAGED + "it ends in the middle"),
    "not parquet": ("x.parquet", b"hello", "{path}: damaged, or not parquet: "),
    "short parquet": ("x.parquet", damaged_parquet(), "{path}: damaged, or not parquet: "),
    "not arrow": ("x.arrow", b"hello", "{path}: damaged, or not arrow: "),
    "a pickle": ("x.pkl", b"", "{path}: " + KINDS),
    "a JSON list": ("x.json", b"[]", "{path}: " + KINDS + "; write JSON lines"),
    "zipped parquet": ("x.parquet.gz", b"", "{path}: " + KINDS),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_reason(name, tmp_path):
    file, content, message = BAD_FILES[name]
    path = write(tmp_path / file, content)
    with pytest.raises(ValueError) as caught:
        texts_of(path)
    assert str(caught.value).startswith(message.format(path=path)) and "\n" not in str(caught.value)


def test_a_table_names_its_missing_column_and_its_empty_cells(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"x.parquet: no column 'text', only 'body', 'n'"):
        texts_of(path)
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    with pytest.raises(ValueError, match=r"x.parquet:2: column 'text' is null, not a string"):
        texts_of(path)
    assert texts_of(path, bad=Bad(1)) == ["a", "b"]


def test_bad_paths_are_errors_before_anything_is_read(tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD)
    (tmp_path / "nothing").mkdir()
    for inputs, message in (
        ([tmp_path / "absent.jsonl"], "absent.jsonl: no such file or folder"),
        ([tmp_path / "nothing"], "nothing: holds no .txt, .jsonl, .parquet or .arrow file"),
        ([path, path], "there is a source x already; tell them apart with NAME=PATH"),
        ([f"a/b={path}"], "'a/b' is no name for a source"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sources(inputs)


def test_rows_are_strict_objects(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"a": 1, "b": [1.5, {"c": null}]}\n')
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1, "b": [1.5, {"c": None}]})]
    assert parse_row('{"text": "\\ud83d\\ude42 \\\\ud800"}') == {"text": "🙂 \\ud800"}  # a pair; a spelled-out escape
