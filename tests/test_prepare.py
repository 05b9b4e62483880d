import json
import re
import runpy
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minillm.data import prepare as prepare_module
from minillm.data.classifier import Classifier
from minillm.data.datasets import Batches, Windows, open_splits
from minillm.data.prepare import STEPS, Prepare, is_held_out, prepare, table
from minillm.data.readers import read_rows
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer

ROOT = Path(__file__).parents[1]
ANIMALS = ["otter", "heron", "badger", "lynx", "falcon", "marmot", "beaver", "salmon", "viper", "raven"]
PLACES = ["river", "meadow", "forest", "island", "valley", "marsh", "harbor", "orchard", "canyon", "glacier"]


def story(n):
    """A page of plain sentences, unlike those of other n."""
    rng = np.random.default_rng(n)
    picks = rng.integers(0, 10, (8, 4))
    return " ".join(
        f"The {ANIMALS[a]} number {n + 7 * i} walked from the {PLACES[b]} to the {PLACES[c]} and met a {ANIMALS[d]}."
        for i, (a, b, c, d) in enumerate(picks)
    )


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def rows(path):
    return [row for _, row in read_rows(path)]


@pytest.fixture
def inputs(tmp_path):
    """Two sources: 60 pages with known trouble among them, and 20 more."""
    pages = [story(n) for n in range(60)]
    pages[10] = pages[3].upper().replace(" ", "  ")  # a normalised duplicate
    pages[11] = pages[4].replace("number", "no.", 1)  # a near duplicate
    pages[12] = "Too short."
    pages[13] += " Write to the keeper at keeper@example.com or call +1 (415) 555-2671."
    pages[14] = pages[14].replace("walked", "walked\u200b").replace(" and", " â€œandâ€\x9d")  # damaged
    pages[15] = "var a=function(b){return b.c(d)};" * 60
    return write(tmp_path / "one.jsonl", pages), write(tmp_path / "two.jsonl", [story(n) for n in range(100, 120)])


def settings(inputs, out, **options):
    options = {"vocab_size": 512, "workers": 1, "validation": 0.1} | options
    return Prepare(inputs=tuple(inputs), out=out, **options)


def test_every_document_is_kept_or_counted_under_its_rule(inputs, tmp_path):
    report = prepare(settings(inputs, tmp_path / "out"))
    sources = report.manifest["sources"]
    for source in sources.values():
        assert source["documents"] == source["kept"] + sum(source["dropped"].values())
    one = sources["one"]
    assert one["dropped"]["duplicate.exact"] == 1 and one["dropped"]["duplicate.near"] == 1
    assert one["documents"] == 60 and one["kept"] == 56 and sum(one["dropped"].values()) == 4
    assert one["changes"]["email"] == 1 and one["changes"]["phone"] == 1 and one["changes"]["repaired"] >= 1
    assert sources["two"]["kept"] == 20 and not sources["two"]["dropped"]
    dropped = rows(tmp_path / "out/dropped.jsonl")
    assert sorted(row["where"].rpartition(":")[2] for row in dropped) == ["11", "12", "13", "16"]
    near = next(row for row in dropped if row["rule"] == "duplicate.near")
    assert near["detail"].endswith(f"to {inputs[0]}:5")  # the original, by file and line
    kept = [row for path in sorted((tmp_path / "out/text").iterdir()) for row in rows(path)]
    assert len(kept) == 76 and not any("@" in row["text"] or "â€" in row["text"] for row in kept)


def test_token_files_hold_the_kept_texts(inputs, tmp_path):
    manifest = prepare(settings(inputs, tmp_path / "out")).manifest
    tokenizer = Tokenizer.load(tmp_path / "out")
    splits = open_splits(tmp_path / "out", verify=True)
    for split, files in splits.items():
        for source, file in files.items():
            texts = [row["text"] for row in rows(tmp_path / f"out/text/{source}.{split}.jsonl")]
            assert len(file) == len(texts) == manifest["tokens"][split][source]["documents"]
            for ids, text in zip(file, texts, strict=True):
                assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
                assert tokenizer.decode(ids[1:-1].tolist()) == text
    batch = next(Batches(Windows(splits["train"]["one"], 64), 4))
    assert batch.tokens.shape == (4, 65)


def files_of(folder):
    """Every file that has to be the same for two runs: all but the times."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_runs_are_the_same_bytes_for_any_number_of_workers(inputs, tmp_path):
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        prepare(settings(inputs, tmp_path / name, workers=workers))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_the_seed_chooses_what_is_held_out_and_more_data_moves_nothing(inputs, tmp_path):
    held = {}
    for name, given, seed in (("a", inputs, 0), ("b", inputs[:1], 0), ("c", inputs, 1)):
        prepare(settings(given, tmp_path / name, seed=seed))
        path = tmp_path / name / "text/one.validation.jsonl"
        held[name] = path.read_text(encoding="utf-8") if path.exists() else ""
    assert held["a"] == held["b"] != held["c"]
    share = np.mean([is_held_out(n * 0x9E3779B97F4A7C15 % 2**64, 0.1, 0) for n in range(20_000)])
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


def test_steps_that_are_asked_for_drop_what_they_should(inputs, tmp_path):
    plain = tmp_path / "toxic.txt"
    plain.write_text("# words nobody should read\nglacier\n", encoding="utf-8")
    evaluation = write(tmp_path / "eval.jsonl", [story(102)])
    german = (
        "Der Fluss ist lang und das Wasser ist kalt, aber die Kinder gehen jeden Tag gern dorthin und spielen. " * 2
    )
    extra = write(tmp_path / "three.jsonl", [german])
    good, bad = [story(n) for n in range(200, 230)], ["buy cheap pills now click here " * 9 for _ in range(30)]
    Classifier.train(good, bad).save(tmp_path / "quality.safetensors")
    spam = write(tmp_path / "four.jsonl", ["buy cheap pills now click here " * 8])
    options = {"preset": "none", "vocab_size": 512, "validation": 0.0}
    manifest = prepare(
        settings(
            [*inputs, extra, spam],
            tmp_path / "out",
            **options,
            languages=("en",),
            toxic_words=plain,
            toxic_share=0.04,
            eval_sets=(Path(evaluation),),
            quality_model=tmp_path / "quality.safetensors",
        )
    ).manifest
    dropped = {name: source["dropped"] for name, source in manifest["sources"].items()}
    assert dropped["three"] == {"language.other": 1}
    assert dropped["four"] == {"quality.classifier": 1}
    assert dropped["two"]["contamination"] == 1 and dropped["one"]["toxicity.words"] >= 1
    assert manifest["evaluation"]["texts"] == 1 and manifest["evaluation"]["too_short"] == 0
    assert manifest["sources"]["three"]["languages"] == {"de": 1}
    assert "validation" not in manifest["tokens"] or not manifest["tokens"]["validation"]


def test_a_given_tokenizer_is_used_as_it_is(inputs, tmp_path):
    tokenizer = Tokenizer.train([story(1)], SMALLEST_VOCABULARY + 20)
    tokenizer.save(tmp_path)
    manifest = prepare(settings(inputs, tmp_path / "out", tokenizer=tmp_path)).manifest
    assert manifest["tokenizer"]["vocab_size"] == len(tokenizer)
    assert Tokenizer.load(tmp_path / "out").encode(story(2)).tolist() == tokenizer.encode(story(2)).tolist()


def test_bad_lines_stop_it_or_are_counted_and_no_half_output_stays(inputs, tmp_path):
    path = Path(inputs[1])
    path.write_text(path.read_text(encoding="utf-8") + '{"text": NaN}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"two.jsonl:21: NaN is not JSON"):
        prepare(settings(inputs, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]
    report = prepare(settings(inputs, tmp_path / "out", skip_bad=1))
    assert report.manifest["bad_lines"] == {"count": 1, "examples": [f"{path}:21: NaN is not JSON"]}
    assert any("malformed lines" in line for line in table(report))


def test_an_output_that_is_there_is_replaced_only_when_told(inputs, tmp_path):
    first = prepare(settings(inputs, tmp_path / "out")).manifest
    with pytest.raises(ValueError, match="out is not empty: take another --out, or replace it with --overwrite True"):
        prepare(settings(inputs, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no document is left: default\.word_count dropped 1 \(first: .*x\.jsonl:1: "):
        prepare(settings([write(tmp_path / "x.jsonl", ["short"])], tmp_path / "out", overwrite=True))
    assert json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8")) == first
    prepare(settings(inputs[:1], tmp_path / "out", overwrite=True))
    assert list(json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))["sources"]) == ["one"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine is not empty, and was not made by prepare\.py"):
        prepare(settings(inputs, tmp_path / "mine", overwrite=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "one.jsonl", "out", "two.jsonl", "x.jsonl"]


def test_of_two_runs_into_one_folder_the_second_is_refused(inputs, tmp_path, monkeypatch):
    """And a third, after the first was killed, takes what it left away."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    select, refused = prepare_module._select, []

    def slow(*args):
        if not refused:
            with pytest.raises(ValueError, match=r"out\.partial is in use by process \d+ on .*: wait for it") as told:
                prepare(settings(inputs, out))
            refused.append(told)
        return select(*args)

    monkeypatch.setattr(prepare_module, "_select", slow)
    partial.mkdir()
    (partial / "text").write_text("of a run that was killed")
    (partial / ".lock").write_text('{"pid": 1, "host": "' + socket.gethostname() + '"}')
    prepare(settings(inputs, out))
    assert refused and open_splits(out, verify=True)
    assert not partial.exists() and not (out / ".lock").exists()


def test_what_prepare_has_written_itself_is_no_input(inputs, tmp_path):
    """OUT in the folder that is read, a second time and beside another output; but text/ by its name is an input."""
    other = tmp_path / "other"
    first = prepare(settings([tmp_path], tmp_path / "out")).manifest["sources"][tmp_path.name]
    prepare(settings([tmp_path], other))
    (tmp_path / "out.partial").mkdir()  # after a kill
    (tmp_path / "out.partial/dropped.jsonl").write_text("{}\n")
    again = prepare(settings([tmp_path], tmp_path / "out", overwrite=True)).manifest["sources"][tmp_path.name]
    assert [Path(file["path"]).name for file in again["files"]] == ["one.jsonl", "two.jsonl"]
    assert again["documents"] == first["documents"] == 80
    assert again["left_out"] and all(Path(path).is_relative_to(other) for path in again["left_out"])
    with pytest.raises(ValueError, match="other holds nothing but prepared data: name its folder text/"):
        prepare(settings([other], tmp_path / "new"))
    kept = prepare(settings([other / "text"], tmp_path / "new")).manifest["sources"]["text"]
    assert kept["documents"] == first["kept"]
    with pytest.raises(ValueError, match=r"text is in --out .*other, which would be replaced: take another --out"):
        prepare(settings([other / "text"], other, overwrite=True))


def test_the_table_names_every_rule_and_source(inputs, tmp_path):
    report = prepare(settings(inputs, tmp_path / "out"))
    lines = list(table(report))
    assert max(map(len, lines)) <= 120
    for name in ("one", "two", "duplicate.exact", "duplicate.near", "default.word_count"):
        assert any(line.startswith(name) for line in lines), name
    assert set(report.seconds) <= set(STEPS)
    assert "tokenizer: 512 tokens, trained on the kept text" in lines
    few = prepare(settings(inputs, tmp_path / "few", vocab_size=100_000))
    told = r"tokenizer: [\d,]+ tokens, trained on the kept text, which gives no more \(--vocab-size 100,000\)"
    assert any(re.fullmatch(told, line) for line in table(few))
    given = prepare(settings(inputs, tmp_path / "given", tokenizer=tmp_path / "out"))
    assert f"tokenizer: 512 tokens, from {tmp_path / 'out'}" in table(given)
    assert list(table(replace_report(report, documents=0)))  # an empty source divides by nothing


def replace_report(report, documents):
    manifest = json.loads(json.dumps(report.manifest))
    manifest["sources"]["two"]["documents"] = documents
    return report._replace(manifest=manifest)


WRONG = {
    "no input": ([], "name at least one file or folder to read"),
    "absent": (["absent.jsonl"], "absent.jsonl: no such file or folder"),
    "unknown option": (["x.jsonl", "--langauges", "en"], "Unrecognized options: --langauges"),
    "bad number": (["x.jsonl", "--workers", "two"], "Error parsing --workers"),
    "out of range": (["x.jsonl", "--validation", "1"], "--validation has to be at least 0 and below 1, and is 1.0"),
    "preset": (["x.jsonl", "--preset", "gopher"], "--preset has to be one of gopher_quality, "),
    "language": (["x.jsonl", "--languages", "xx"], "language 'xx' is not known; known are "),
    "vocabulary": (["x.jsonl", "--vocab-size", "10"], "--vocab-size has to be at least 268"),
    "weights": (["x.jsonl", "--weights", "y", "2"], "--weights names the source 'y', and there is none of that name"),
    "weight 0": (["x.jsonl", "--weights", "x", "0"], "--weights has to be above 0"),
    "tokenizer": (["x.jsonl", "--tokenizer", "absent"], "absent"),
    "classifier": (["x.jsonl", "--quality-model", "absent"], "absent"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_one_line(name, tmp_path, monkeypatch, capsys):
    write(tmp_path / "x.jsonl", [story(1)])
    arguments, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", "--out", "out", *(["--workers", "1"] * ("--workers" not in arguments)), *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/prepare.py"), run_name="__main__")
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert ended.value.code in (1, 2) and told.out == "" and line.startswith("prepare.py: ") and message in line


def test_settings_are_checked_before_anything_is_read(tmp_path):
    good = Prepare(inputs=("x",), out=tmp_path)
    for change in (
        {"near_threshold": 1.5},
        {"skip_bad": -1},
        {"inputs": ()},
        {"weights": {"x": -1.0}},
        {"preset": "x"},
    ):
        with pytest.raises(ValueError):
            replace(good, **change)
