"""minillm.data.datasets: files that come back or say what is wrong, mixtures that keep their weights, and batches that
go on as if they had never stopped."""

import hashlib
import json
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.data.datasets import Batches, Items, Mixture, TokenFile, TokenWriter, Windows, load_tokens, open_splits
from minillm.data.pack import METHODS, pack

DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15], [16, 17, 18]]


def write(path, documents, vocab_size=100):
    with TokenWriter(path, vocab_size) as writer:
        for ids in documents:
            writer.add(ids)
    return writer.piece


def sequence(rows, offset=0, length=3):
    """Windows of `rows` rows, each of one document of its own numbers."""
    return Windows([np.arange(length + 1) + offset + 10 * n for n in range(rows)], length, "pad")


def same(one, other):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ token files


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32"), (1 << 31, "uint32")])
@given(data=st.data())
def test_token_files_come_back(vocab_size, dtype, data):
    ids = st.integers(0, vocab_size - 1) | st.just(vocab_size - 1)
    documents = data.draw(st.lists(st.lists(ids, min_size=1, max_size=8), max_size=8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.web"  # a dot in the name is no ending
        piece = write(path, documents, vocab_size)
        tokens = sum(map(len, documents))
        assert sorted(os.listdir(folder)) == ["train.web.bin", "train.web.idx"]
        files = {kind: path.with_name(f"train.web.{kind}").read_bytes() for kind in ("bin", "idx")}
        assert files["bin"] == b"".join(i.to_bytes(int(dtype[4:]) // 8, "little") for ids in documents for i in ids)
        assert len(files["idx"]) == 8 * (len(documents) + 1)
        hashes = {kind: hashlib.sha256(content).hexdigest() for kind, content in files.items()}
        counts = {"file": "train.web", "dtype": dtype, "documents": len(documents), "tokens": tokens}
        assert json.loads(json.dumps(piece)) == counts | {"sha256": hashes}
        opened = [TokenFile(path, piece, verify=True), *([TokenFile(path)] if tokens else [])]
        for file in opened:
            assert [ids.tolist() for ids in file] == documents
            assert (len(file), file.ids.dtype, file.lengths.tolist()) == (len(documents), dtype, [*map(len, documents)])
            assert not (tokens and file.ids.flags.writeable)


def test_a_document_is_a_view(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    file = TokenFile(tmp_path / "a")
    assert np.shares_memory(file[2], file.ids) and file[-1].tolist() == [16, 17, 18]
    for i in (5, -6):
        with pytest.raises(IndexError):
            file[i]


def test_windows_read_the_file_where_it_is(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    file = TokenFile(tmp_path / "a")
    windows = Windows(file, 4)
    assert np.shares_memory(windows.documents.ids, file.ids)
    (tmp_path / "a.bin").write_bytes(np.arange(50, 64).astype("<u2").tobytes())  # the same file, with other ids in it
    assert windows.rows([0]).tokens.max() >= 50


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "is empty"),
        ([3, 100], "has the id 100, and the vocabulary is 0 to 99"),
        ([-1], "has the id -1, and the vocabulary is 0 to 99"),
        (np.array([7, 2**64 - 1], np.uint64), f"has the id {2**64 - 1}, and"),
        ([1.0], r"has to be one sequence of whole numbers, not float64 \(1,\)"),
        ([[1, 2]], r"has to be one sequence of whole numbers, not int64 \(1, 2\)"),
    ],
)
def test_a_refused_document_leaves_no_trace(tmp_path, ids, message):
    with TokenWriter(tmp_path / "a", 100) as writer:
        writer.add([1, 2])
        with pytest.raises(ValueError, match=rf"^{tmp_path}/a: document 1 {message}"):
            writer.add(ids)
        writer.add([3])
    assert [ids.tolist() for ids in TokenFile(tmp_path / "a", writer.piece, verify=True)] == [[1, 2], [3]]


def test_an_error_leaves_no_half_file_and_the_old_one(tmp_path, monkeypatch):
    def broken(error):
        with pytest.raises(error), TokenWriter(tmp_path / "a", 100) as writer:
            writer.add([1, 2, 3])
            if error is not OSError:
                raise error
        assert writer.piece is None

    broken(KeyboardInterrupt)
    assert os.listdir(tmp_path) == []
    piece = write(tmp_path / "a", DOCUMENTS)
    broken(RuntimeError)
    monkeypatch.setattr(os, "fsync", lambda handle: os.stat("/there is no such file"))
    broken(OSError)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    TokenFile(tmp_path / "a", piece, verify=True)


def test_files_have_their_names_only_when_they_are_on_the_disk(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("rename") or replace(*paths))
    writer = TokenWriter(tmp_path / "a", 100)
    writer.add([1])
    assert sorted(os.listdir(tmp_path)) == ["a.bin.tmp", "a.idx.tmp"]
    assert writer.close() == writer.close() == writer.piece
    assert steps == ["sync", "sync", "rename", "rename", "sync"]
    with pytest.raises(ValueError, match=r"a: the writer is closed$"):
        writer.add([1])


def test_ids_of_one_run_never_meet_the_offsets_of_another(tmp_path, monkeypatch):
    write(tmp_path / "a", DOCUMENTS)
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: replace(old, os.stat(new) and new)
    )  # fails where new is not there
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "a", [ids[::-1] for ids in DOCUMENTS])
    with pytest.raises(ValueError, match=r"a\.idx is missing$"):
        TokenFile(tmp_path / "a")


@pytest.mark.parametrize("vocab_size", [0, -5, 1.5, None, (1 << 31) + 1])
def test_a_bad_vocabulary_is_refused(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=r"^vocab_size = "):
        TokenWriter(tmp_path / "a", vocab_size)
    assert os.listdir(tmp_path) == []


def offsets(*values):
    return lambda content: np.array(values, "<i8").tobytes()


# what is damaged -> (the file, what becomes of its bytes or None, the piece's field and value, the error)
DAMAGE = {
    "no ids": ("bin", None, {}, r"a\.bin is missing"),
    "no offsets": ("idx", None, {}, r"a\.idx is missing"),
    "ids cut off": ("bin", lambda b: b[:-1], {}, r"a\.bin has 27 bytes, and its 14 tokens are 28"),
    "no ids in it": ("bin", lambda b: b"", {}, r"a\.bin has 0 bytes, and its 14 tokens are 28"),
    "too many ids": ("bin", lambda b: b + b"\0\0", {}, r"a\.bin has 30 bytes, and its 14 tokens are 28"),
    "offsets cut off": (
        "idx",
        lambda b: b[:-3],
        {},
        r"a\.idx has 45 bytes, which are no whole number of 8-byte offsets",
    ),
    "nothing in it": ("idx", lambda b: b"", {}, r"a\.idx has 0 bytes, which are no whole number of 8-byte offsets"),
    "one offset less": ("idx", lambda b: b[:-8], {}, r"a\.idx has 4 documents, and the manifest says 5"),
    "first offset": ("idx", offsets(1, 3, 5, 9, 11, 14), {}, r"a\.idx: the first offset is 1, not 0"),
    "falling": ("idx", offsets(0, 3, 2, 9, 11, 14), {}, r"a\.idx: offset 2 is 2, which is not more than 3 before it"),
    "empty": ("idx", offsets(0, 3, 5, 5, 11, 14), {}, r"a\.idx: offset 3 is 5, which is not more than 5 before it"),
    "huge": ("idx", offsets(0, 3, 5, -5, 11, 14), {}, r"a\.idx: offset 3 is -5, which is not more than 5 before it"),
    "other tokens": ("idx", offsets(0, 3, 5, 9, 11, 15), {}, r"a\.idx has 15 tokens, and the manifest says 14"),
    "an id": ("bin", lambda b: b[:-1] + b"\1", {}, r"a\.bin has the SHA-256 \w{64}, and the manifest says \w{64}"),
    "an offset": (
        "idx",
        offsets(0, 3, 6, 9, 11, 14),
        {},
        r"a\.idx has the SHA-256 \w{64}, and the manifest says \w{64}",
    ),
    "dtype": ("bin", bytes, {"dtype": "int16"}, r"a\.bin: dtype 'int16' is unknown: uint16, uint32"),
    "wide": ("bin", bytes, {"dtype": "uint32"}, r"a\.bin has 28 bytes, and its 14 tokens are 56"),
    "no tokens": ("bin", bytes, {"tokens": None}, r"a\.bin: its piece of the manifest has tokens = None"),
    "no hash": ("bin", bytes, {"sha256": {}}, r"a\.bin: its piece of the manifest has sha256 = {}"),
}


@pytest.mark.parametrize("kind, damage, fields, message", DAMAGE.values(), ids=DAMAGE)
def test_every_damage_is_one_line_with_the_name_of_the_file(tmp_path, kind, damage, fields, message):
    piece = write(tmp_path / "a", DOCUMENTS) | fields
    file = tmp_path / f"a.{kind}"
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{message}$"):
        TokenFile(tmp_path / "a", piece, verify=True)


def test_damage_without_a_manifest(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match=r"a\.bin: there is no piece of a manifest to verify it with$"):
        TokenFile(tmp_path / "a", verify=True)
    (tmp_path / "a.bin").write_bytes(bytes(30))
    with pytest.raises(ValueError, match=r"a\.bin has 30 bytes, and its 14 tokens are 28 or 56$"):
        TokenFile(tmp_path / "a")


# ------------------------------------------------------------------ the folder


def folder_of(path, change=lambda manifest: None):
    tokens = {"train": {"a": write(path / "train.a", DOCUMENTS), "b": write(path / "train.b", DOCUMENTS[:2])}}
    tokens["validation"] = {"a": write(path / "validation.a", DOCUMENTS[3:])}
    manifest = {"format": 1, "tokens": tokens, "more": "of other people's"}
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_folder_opens_by_its_manifest(tmp_path):
    folder_of(tmp_path)
    splits = open_splits(tmp_path, verify=True)
    counts = {split: {source: len(file) for source, file in files.items()} for split, files in splits.items()}
    assert counts == {"train": {"a": 5, "b": 2}, "validation": {"a": 2}}
    assert load_tokens(str(tmp_path), "validation")["a"][1].tolist() == DOCUMENTS[4]
    (tmp_path / "train.b.bin").write_bytes(np.array([5, 6, 7, 8, 10], "<u2").tobytes())
    assert open_splits(tmp_path)["train"]["b"][1].tolist() == [8, 10]
    with pytest.raises(ValueError, match=r"train\.b\.bin has the SHA-256"):
        open_splits(tmp_path, verify=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=2), r"manifest\.json: format is 2, and this version reads 1"),
        (lambda m: m.clear(), r"manifest\.json: format is None, and this version reads 1"),
        (lambda m: m.pop("tokens"), r"manifest\.json: tokens has to be {split: {source: piece}}"),
        (lambda m: m["tokens"].update(train=[]), r"manifest\.json: tokens has to be {split: {source: piece}}"),
        (lambda m: m["tokens"]["train"].update(a={}), r"manifest\.json: tokens\.train\.a names no file"),
        (
            lambda m: m["tokens"]["train"]["b"].pop("dtype"),
            r"train\.b\.bin: its piece of the manifest has dtype = None",
        ),
        (lambda m: m["tokens"]["train"]["b"].update(file="c"), r"c\.bin is missing"),
    ],
)
def test_a_bad_manifest_is_one_line_with_its_name(tmp_path, change, message):
    folder_of(tmp_path, change)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{message}$"):
        open_splits(tmp_path)


def test_no_manifest_at_all(tmp_path):
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/manifest\.json is missing: this is no folder of prepared data$"
    ):
        open_splits(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/manifest\.json is not a readable JSON object: "):
        open_splits(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "tokens": {"train": {}}}')
    with pytest.raises(ValueError, match=rf"^{tmp_path}/manifest\.json has no split 'test': train$"):
        load_tokens(tmp_path, "test")


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize("method", METHODS)
def test_windows_are_packs_rows_from_a_file_or_from_memory(tmp_path, method):
    write(tmp_path / "a", DOCUMENTS)
    expected = pack(DOCUMENTS, 4, method, pad_id=3)
    for source in (TokenFile(tmp_path / "a"), DOCUMENTS):
        windows = Windows(source, 4, method, pad_id=3)
        assert same(windows.rows(np.arange(len(windows))), expected)
        assert same(windows.rows([1, 0, 1]), (array[[1, 0, 1]] for array in expected))


def test_windows_keep_the_masks_of_answers():
    documents = [([1, 2, 3], [0, 0, 1]), ([4, 5], [0, 1])]
    assert same(Windows(documents, 6).rows([0]), pack(documents, 6))


def test_windows_refuse_rows_that_are_not_there():
    windows = sequence(3)
    for indices in ([3], [-1], [0, 5]):
        with pytest.raises(IndexError, match=r"^rows are 0 to 2, not "):
            windows.rows(indices)
    assert windows.rows([]).tokens.shape == (0, 4)
    for arguments in ({"length": 0}, {"length": 4, "pad_id": -1}, {"length": 4, "method": "best"}):
        with pytest.raises(ValueError, match=r"length|pad_id|method"):
            Windows(DOCUMENTS, **arguments)


# ------------------------------------------------------------------ mixtures

weights_of_sources = st.lists(
    st.integers(1, 50) | st.floats(0.001, 100) | st.sampled_from([0.1, 1e-7, 1000]), min_size=1, max_size=7
)


@given(weights_of_sources)
@example([36, 1, 8, 36])  # where the largest deficit first, which is the obvious way, is a row off at the 27th
def test_no_source_is_ever_a_whole_row_off_its_part(weights):
    names = [f"s{n}" for n in range(len(weights))]
    mixture = Mixture(dict.fromkeys(names, sequence(2)), dict(zip(names, weights, strict=True)))
    taken, total = dict.fromkeys(names, 0), sum(Fraction(str(w)) for w in weights)
    for n in range(1, 151):
        taken[mixture.next(taken)] += 1
        for name, weight in zip(names, weights, strict=True):
            assert abs(taken[name] - n * Fraction(str(weight)) / total) < 1


def test_parts_are_exact_and_do_not_depend_on_the_order_of_names():
    sources = {"a": sequence(2), "b": sequence(2), "c": sequence(2)}
    one = Mixture(sources, {"a": 0.7, "b": 0.2, "c": 0.1})
    other = Mixture(dict(reversed(sources.items())), {"c": 1, "a": 7, "b": 2})
    assert one.weights == other.weights == {"a": 7, "b": 2, "c": 1}
    taken, names = dict.fromkeys(sources, 0), []
    for _ in range(20):
        names.append(one.next(taken))
        assert other.next(taken) == names[-1]
        taken[names[-1]] += 1
    assert names[:10] == names[10:] and taken == {"a": 14, "b": 4, "c": 2}


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": 1}, "source 'b' has no weight"),
        ({"a": 1, "b": 1, "c": 1}, "there is no source 'c' for its weight: a, b"),
        ({"a": 1, "b": 0}, "the weight of source 'b' is 0, and has to be a positive number"),
        ({"a": 1, "b": -0.5}, "the weight of source 'b' is -0.5, and"),
        ({"a": 1, "b": float("nan")}, "the weight of source 'b' is nan, and"),
        ({"a": 1, "b": float("inf")}, "the weight of source 'b' is inf, and"),
        ({"a": 1, "b": "0.5"}, "the weight of source 'b' is '0.5', and"),
        ({"a": True, "b": 1}, "the weight of source 'a' is True, and"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Mixture({"a": sequence(2), "b": sequence(3)}, weights)


def test_bad_sources_are_refused():
    with pytest.raises(ValueError, match=r"^a mixture needs at least one source$"):
        Mixture({}, {})
    with pytest.raises(ValueError, match=r"^source 'b' has no rows$"):
        Mixture({"a": sequence(2), "b": sequence(0)}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"^sources have rows of different lengths: {'a': 3, 'b': 5}$"):
        Mixture({"a": sequence(2), "b": sequence(2, length=5)}, {"a": 1, "b": 1})


# ------------------------------------------------------------------ batches


def mixed():
    return Mixture({"a": sequence(4), "b": sequence(3, 1000), "c": sequence(7, 2000)}, {"a": 5, "b": 3, "c": 0.5})


def firsts(batches, count):
    """The first tokens, which name the rows, of the next batches, one after the other."""
    return np.concatenate([next(batches).tokens[:, 0] for _ in range(count)]).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("source", [sequence(7), mixed()], ids=["one source", "mixture"])
def test_resumed_is_straight_at_every_position(source, shuffle):
    make = lambda: Batches(source, 3, seed=5, shuffle=shuffle)
    straight, states = make(), []
    expected = []
    for _ in range(24):
        states.append(json.dumps(straight.state_dict()))
        expected.append(next(straight))
    for n in range(0, 24):
        resumed = make()
        for stop in range(n, 24, 5):  # and resumed again, after five more
            resumed.load_state_dict(json.loads(states[stop]))
            again = make()
            again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
            for one in expected[stop : stop + 5]:
                assert same(next(again), one)
    back = make()
    firsts(back, 9)
    back.load_state_dict(json.loads(states[2]))  # back into an epoch that is over
    assert same(next(back), expected[2])


def test_batches_of_another_size_hold_the_same_rows():
    straight, resumed = Batches(mixed(), 4, seed=2), Batches(mixed(), 6, seed=2)
    expected = firsts(straight, 12)
    begun = Batches(mixed(), 4, seed=2)
    assert firsts(begun, 3) == expected[:12]
    resumed.load_state_dict(begun.state_dict())
    assert firsts(resumed, 6) == expected[12:]


def test_every_epoch_has_every_row_once_in_its_own_order():
    batches = Batches(sequence(10), 4, seed=1)
    walks = np.reshape(firsts(batches, 10), (4, 10)).tolist()
    assert all(sorted(walk) == list(range(0, 100, 10)) for walk in walks)
    assert len({tuple(walk) for walk in [*walks, sorted(walks[0])]}) == 5
    assert firsts(Batches(sequence(10), 5, shuffle=False), 4) == 2 * list(range(0, 100, 10))


def test_a_batch_may_hold_more_than_all_rows():
    rows = firsts(Batches(sequence(3), 7, seed=1), 1)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 10, 20]


def test_every_source_of_a_mixture_walks_its_own_epochs():
    rows = firsts(Batches(mixed(), 5, seed=3), 34)
    for offset, count in ((0, 4), (1000, 3), (2000, 7)):
        own = [row for row in rows if offset <= row < offset + 1000]
        for n in range(0, len(own) - count + 1, count):
            assert sorted(own[n : n + count]) == [offset + 10 * i for i in range(count)]
    assert {name: sum(o <= row < o + 1000 for row in rows) for name, o in (("a", 0), ("b", 1000), ("c", 2000))} == {
        "a": 100,
        "b": 60,
        "c": 10,
    }


def test_the_seed_and_the_source_give_the_order():
    orders = {tuple(firsts(Batches(sequence(30), 30, seed=seed), 1)) for seed in range(8)}
    assert len(orders) == 8
    assert firsts(Batches(sequence(30), 30, seed=3), 2) == firsts(Batches(sequence(30), 30, seed=3), 2)
    twins = Mixture({"a": sequence(30), "b": sequence(30)}, {"a": 1, "b": 1})
    rows = firsts(Batches(twins, 60, seed=0), 1)
    assert rows[::2] != rows[1::2] and sorted(rows[::2]) == sorted(rows[1::2])


def test_a_batch_of_a_mixture_has_its_rows_in_order():
    """Whole rows: tokens, start and mask of one row stay together."""
    sources = {"a": Windows([[1, 2, 3], [4, 5]], 5), "b": Windows([[6, 7, 8, 9]], 5)}
    batch = next(Batches(Mixture(sources, {"a": 1, "b": 1}), 4, shuffle=False))
    each = [sources[name].rows([0]) for name in "abab"]
    assert same(batch, (np.concatenate(arrays) for arrays in zip(*each, strict=True)))


@pytest.mark.parametrize("drop_last, sizes", [(False, [4, 4, 4, 4, 4]), (True, [4, 4, 4, 4, 4])])
def test_epochs_that_fill_the_last_batch(drop_last, sizes):
    batches = Batches(sequence(10), 4, epochs=2, drop_last=drop_last)
    assert [len(batch.tokens) for batch in batches] == sizes
    assert next(batches, None) is None


@pytest.mark.parametrize("drop_last, sizes", [(False, [4, 4, 4, 4, 4, 1]), (True, [4, 4, 4, 4, 4])])
def test_epochs_end_with_a_shorter_batch_or_without_it(drop_last, sizes):
    batches = Batches(sequence(7), 4, epochs=3, drop_last=drop_last)
    rows = [batch.tokens[:, 0].tolist() for batch in batches]
    assert [len(row) for row in rows] == sizes
    ended = Batches(sequence(7), 4, epochs=3, drop_last=drop_last)
    ended.load_state_dict(batches.state_dict())
    assert next(ended, None) is next(batches, None) is None
    if not drop_last:
        assert sorted(row for batch in rows for row in batch) == sorted(3 * list(range(0, 70, 10)))


def test_bad_arguments_are_refused():
    for arguments in ({"batch_size": 0}, {"batch_size": 2.0}, {"seed": -1}, {"epochs": 0}):
        (name,) = arguments
        with pytest.raises(ValueError, match=rf"^{name} = .* must be a whole number from \d on$"):
            Batches(sequence(3), **({"batch_size": 2} | arguments))
    with pytest.raises(ValueError, match=r"^source 'rows' has no rows$"):
        Batches(sequence(0), 2)
    with pytest.raises(ValueError, match=r"^epochs are those of one source, and a mixture has several"):
        Batches(mixed(), 2, epochs=1)


OTHERS = {
    "seed": (Batches(sequence(3), 2, seed=4), "seed was 4 and is 0"),
    "shuffle": (Batches(sequence(3), 2, shuffle=False), "shuffle was False and is True"),
    "checksum": (Batches(sequence(3, offset=1), 2), r"rows\.checksum was \d+ and is \d+"),
    "rows": (
        Batches(sequence(4), 2),
        r"rows\.documents was 4 and is 3; rows\.tokens was 16 and is 12; rows\.rows was 4 and is 3; "
        r"rows\.checksum was \d+ and is \d+",
    ),
    "pad_id": (
        Batches(Windows([np.arange(4) + 10 * n for n in range(3)], 3, "pad", pad_id=2), 2),
        r"rows\.pad_id was 2 and is 0",
    ),
    "method": (
        Batches(Windows([np.arange(4) + 10 * n for n in range(3)], 3), 2),
        r"rows\.method was 'best_fit' and is 'pad'",
    ),
    "length": (
        Batches(Windows([np.arange(4) + 10 * n for n in range(3)], 5, "pad"), 2),
        r"rows\.length was 5 and is 3",
    ),
}


@pytest.mark.parametrize("other, message", OTHERS.values(), ids=OTHERS)
def test_a_state_of_other_batches_is_refused_by_the_names_of_the_fields(other, message):
    batches = Batches(sequence(3), 2)
    next(batches)
    before = batches.state_dict()
    with pytest.raises(ValueError, match=f"^the state is of other batches: {message}$"):
        batches.load_state_dict(other.state_dict())
    assert batches.state_dict() == before


def test_a_state_of_another_mixture_is_refused():
    sources = {"a": sequence(4), "b": sequence(3)}
    batches = Batches(Mixture(sources, {"a": 2, "b": 1}), 2)
    with pytest.raises(ValueError, match=r"batches: a\.weight was 1 and is 2; b\.weight was 3 and is 1$"):
        batches.load_state_dict(Batches(Mixture(sources, {"a": 1, "b": 3}), 2).state_dict())
    with pytest.raises(
        ValueError, match=r"batches: a\.weight was 1 and is 2; b\.weight was None and is 1; b\.documents"
    ):
        batches.load_state_dict(Batches(Mixture({"a": sequence(4)}, {"a": 2}), 2).state_dict())


def test_masks_are_a_part_of_the_data():
    documents = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])]
    other = [([1, 2, 3], [0, 0, 1]), ([4, 5], [0, 1])]
    with pytest.raises(ValueError, match=r"batches: rows\.checksum was \d+ and is \d+$"):
        Batches(Windows(documents, 4), 2).load_state_dict(Batches(Windows(other, 4), 2).state_dict())


def test_where_documents_end_is_a_part_of_the_data():
    one, other = (Batches(Windows(documents, 5), 2) for documents in ([[1, 2, 3], [4, 5]], [[1, 2], [3, 4, 5]]))
    with pytest.raises(ValueError, match=r"batches: rows\.checksum was \d+ and is \d+$"):
        one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("state", [None, [], {}, {"taken": 3, "data": {}}, {"taken": {}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"^this is no state of Batches: "):
        Batches(sequence(3), 2).load_state_dict(state)


@pytest.mark.parametrize("taken", [{}, {"other": 1}, {"rows": -1}, {"rows": 1.5}, {"rows": None}])
def test_a_state_with_a_bad_position_is_refused(taken):
    batches = Batches(sequence(3), 2)
    with pytest.raises(ValueError, match=r"^the state's taken"):
        batches.load_state_dict(batches.state_dict() | {"taken": taken})
    assert batches.taken == {"rows": 0}


def test_a_state_and_its_batches_do_not_change_each_other():
    batches = Batches(sequence(5), 2)
    state = batches.state_dict()
    expected = firsts(batches, 4)
    batches.load_state_dict(state)
    assert firsts(batches, 4) == expected
    assert state == Batches(sequence(5), 2).state_dict()
    batches.load_state_dict(state)
    before = dict(batches.taken)
    state["taken"]["rows"] += 1
    batches.state_dict()["taken"]["rows"] += 1
    assert batches.taken == before


def test_items_in_place_of_rows():
    items = [("a", n) for n in range(7)]
    straight = Batches(Items(items), 3, seed=1)
    drawn = [next(straight) for _ in range(3)]
    assert sorted([item for batch in drawn for item in batch][:7]) == items
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = Batches(Items(items), 3, seed=1)
    resumed.load_state_dict(state)
    assert [next(resumed) for _ in range(5)] == [next(straight) for _ in range(5)]
    with pytest.raises(ValueError, match=r"batches: rows\.checksum was \d+ and is \d+$"):
        Batches(Items([*items[:6], ("b", 6)]), 3, seed=1).load_state_dict(state)


def test_items_are_known_by_what_they_were_made_of():
    """What was computed differs in its last bits with other threads, and a run goes on all the same."""
    source = [("a", 1), ("b", 2)]
    made = [Items([("a", x), ("b", 0.2)], source).identity() for x in (0.1, 0.1 + 2**-50)]
    assert made[0] == made[1] == Items(source).identity() != Items([("a", 0.1), ("b", 0.2)]).identity()
    assert Items(["x", "y"], source).rows([1]) == ["y"]
