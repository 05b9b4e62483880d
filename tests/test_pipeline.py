"""The pipeline: all stages in a row on a very small world, once; then what a user may do to it."""

import contextlib
import functools
import html.parser
import importlib.util
import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from minillm import pipeline
from minillm.data import atlas
from minillm.pipeline import STAGES, PipelineConfig, run
from minillm.trainers.evaluation import read_questions
from minillm.trainers.run import Run


def script(name):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


compare_seeds, reward_hacking = script("compare_seeds"), script("reward_hacking")

MICRO = {
    "data": {"size_bytes": 60_000, "most_facts": 100, "conversations": 60},
    "tokenizer": {"vocab_size": 512, "validation": 0.1},
    "pretrain": {"hidden_size": 16, "num_hidden_layers": 1, "tokens": 8_000, "batch_size": 8, "length": 64},
    "sft": {"epochs": 0.5, "batch_size": 8, "length": 128, "eval_questions": 8, "samples": 1},
    "reward": {"epochs": 0.5, "batch_size": 8, "samples": 1},
    "ppo": {"episodes": 32, "batch_size": 8, "value_warmup": 1, "eval_questions": 8, "reference_samples": 8,
            "max_new_tokens": 8, "samples": 1},
    "dpo": {"epochs": 0.5, "batch_size": 4, "eval_questions": 8, "max_new_tokens": 8, "samples": 1},
}  # fmt: skip
FILES = ("pretrain/model.safetensors", "sft/model.safetensors", "reward/model.safetensors", "ppo/model.safetensors",
         "dpo/model.safetensors", "tokenizer/pretrain.train.bin", "data/heldout.jsonl")  # fmt: skip


some_questions = functools.partial(read_questions, most=64)  # spread over the held-out ones, for the report


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """Stages that take a second each."""
    monkeypatch.setitem(pipeline.SIZES, "tiny", MICRO)
    monkeypatch.setattr(pipeline, "read_questions", some_questions)
    monkeypatch.setattr(pipeline, "OWN", {"pretrain": {"length": 64}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, notes, what was printed) of one whole run."""
    told, out = io.StringIO(), tmp_path_factory.mktemp("pipeline") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setitem(pipeline.SIZES, "tiny", MICRO)
        patch.setattr(pipeline, "read_questions", some_questions)
        notes = run(PipelineConfig(out=out, size="tiny"))
    return out, notes, told.getvalue()


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to do something to."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_every_stage_leaves_its_folder_and_is_noted(finished):
    out, notes, _ = finished
    assert list(notes["stages"]) == list(STAGES)
    assert json.loads((out / pipeline.NOTES).read_text()) == json.loads(json.dumps(notes))
    for name in STAGES[:-1]:
        assert any((out / name).iterdir())
        assert notes["stages"][name]["seconds"] > 0 and notes["stages"][name]["peak_memory"] > 2**20
    for name in pipeline.MEASURED:
        assert notes["stages"][name]["before"] is not None and notes["stages"][name]["after"] is not None
    assert 0 < notes["stages"]["ppo"]["brief_probability"] < 1


def test_the_table_has_every_model_and_every_stage_and_fits_a_terminal(finished):
    out, notes, told = finished
    lines = told[told.index("stage ") :].split("\n")
    assert all(len(line) <= 110 for line in lines)
    assert [line.split()[0] for line in lines[2:10]] == list(STAGES)
    header = next(line for line in lines if line.startswith("answers to held-out questions"))
    assert header.split()[-4:] == ["base", "sft", "ppo", "dpo"]
    gold = next(line for line in lines if line.startswith("gold reward")).split()[-4:]
    models = notes["stages"]["report"]["models"]
    assert gold == [f"{models[name]['gold']:.2f}" for name in pipeline.MODELS]
    assert str(out / "report.html") in told


class Reader(html.parser.HTMLParser):
    """What a browser would fetch, and the text."""

    def __init__(self):
        super().__init__()
        self.fetched, self.words = [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone_and_shows_curves_samples_and_settings(finished):
    out, notes, _ = finished
    text = (out / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.fetched == []
    words = " ".join(" ".join(reader.words).split())
    for question, _, _ in notes["stages"]["report"]["samples"]:
        assert " ".join(question.split()) in words
    assert text.count("<svg") == len(pipeline.panels(PipelineConfig(out=out, size="tiny"))) >= 10
    for name in ("episodes", "replay_share", "hidden_size"):
        assert name in words
    models = notes["stages"]["report"]["models"]
    assert {name for name, found in models.items() if found["kl"]} == {"ppo", "dpo"}  # to itself it would be 0


def test_only_the_report_reads_the_held_out_questions(finished, monkeypatch, tmp_path):
    """Trainers stop and choose by the development questions: were they to see the others, the table would mean less."""
    out = finished[0]
    for name in ("sft", "ppo", "dpo"):
        settings = json.loads((out / name / "settings.json").read_text())
        assert settings["questions"].endswith("dev.jsonl") and "heldout" not in json.dumps(settings)
    dev, held = (atlas.questions(0, side, atlas.facts(60_000, 100)) for side in ("dev", "heldout"))
    assert not {(q.relation, q.subject) for q in dev if q.kind == "fact"} & {(q.relation, q.subject) for q in held}


def test_what_is_done_is_not_repeated(copy, monkeypatch, capsys):
    def never(stage):
        raise AssertionError(f"{stage.name} was repeated")

    for name in STAGES:
        monkeypatch.setitem(pipeline.MAKE, name, never)
    run(PipelineConfig(out=copy, size="tiny"))
    assert capsys.readouterr().out.count("done before") == len(STAGES)


def test_from_repeats_a_stage_and_what_follows(copy, monkeypatch):
    made = []
    for name in STAGES:
        monkeypatch.setitem(pipeline.MAKE, name, lambda stage: made.append(stage.name) or {"before": 1.0, "after": 2.0})
    monkeypatch.setattr(pipeline, "write_page", lambda config, notes: None)
    monkeypatch.setattr(pipeline, "summary", lambda config, notes: [])
    run(PipelineConfig(out=copy, size="tiny", from_="ppo"))
    assert made == ["ppo", "dpo", "report"]


def test_a_run_that_is_stopped_in_every_stage_ends_as_one_that_never_was(finished, tmp_path, monkeypatch):
    """Each stage is interrupted when its folder is there and nothing is noted, and each training in the middle, too:
    the same command goes on, and the models are the same bits as those of the run that went through."""
    make, stopped, update, resumed = dict(pipeline.MAKE), set(), Run.update, []

    def stage_with_a_fault(name):
        def interrupted(stage):
            if name not in stopped:
                if name != "report":
                    make[name](stage)
                stopped.add(name)
                for path in list(stage.folder.glob("*.safetensors")):
                    path.write_bytes(path.read_bytes()[:100])  # as a kill in the middle of writing would leave it
                raise KeyboardInterrupt
            return make[name](stage)

        return interrupted

    def sometimes(self, *args, **options):
        update(self, *args, **options)
        name = self.settings.out.name
        if (name, "middle") not in stopped and self.step == 0:
            stopped.add((name, "middle"))
            signal.raise_signal(signal.SIGTERM)
        elif self.step > 0 and name not in resumed:
            resumed.append(name)

    for name in STAGES:
        monkeypatch.setitem(pipeline.MAKE, name, stage_with_a_fault(name))
    monkeypatch.setattr(Run, "update", sometimes)
    config = PipelineConfig(out=tmp_path / "run", size="tiny")
    trained = ["pretrain", "sft", "reward", "ppo", "dpo"]
    for _ in [*STAGES, *trained]:
        with pytest.raises(KeyboardInterrupt):
            run(config)
    notes = run(config)
    assert resumed == trained  # each went on, and none began again after it was done
    for name in FILES:
        assert (config.out / name).read_bytes() == (finished[0] / name).read_bytes(), name
    measured = lambda notes: json.dumps(notes["stages"]["report"] | {"seconds": 0, "peak_memory": 0})
    assert measured(notes) == measured(finished[1])


def test_other_settings_are_refused_and_from_data_begins_again(copy, monkeypatch):
    with pytest.raises(ValueError, match=r"was made with --seed 0: take another --out, or .* --from data"):
        run(PipelineConfig(out=copy, size="tiny", seed=1))
    with pytest.raises(ValueError, match="--size tiny"):
        run(PipelineConfig(out=copy, size="small", from_="sft"))
    begun = []
    monkeypatch.setitem(pipeline.MAKE, "data", lambda stage: begun.append(stage.config.seed) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(PipelineConfig(out=copy, size="tiny", seed=1, from_="data"))
    assert begun == [1]
    assert json.loads((copy / pipeline.NOTES).read_text())["stages"] == {}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty, and was not made by the pipeline"):
        run(PipelineConfig(out=tmp_path, size="tiny"))
    with pytest.raises(ValueError, match="is a file"):
        run(PipelineConfig(out=tmp_path / "thesis.txt", size="tiny"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "options, told",
    [
        ({"seed": -1}, "--seed has to be a whole number from 0 on, and is -1"),
        ({"seed": 1.5}, "--seed has to be a whole number"),
        ({"skip_bad": -1}, "--skip-bad has to be"),
        ({"sft_data": (Path("a"),)}, "--pretrain-data and --preference-data and --prompts are needed, too"),
    ],
)
def test_wrong_settings_are_told(options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        PipelineConfig(**options)


def test_data_of_ones_own(finished, tmp_path, capsys):
    """The files of the atlas as a user's: no gold reward, but every stage's own measure, and answers side by side."""
    data = finished[0] / "data"
    options = {
        "pretrain_data": (str(data / "pretrain.jsonl"),),
        "sft_data": (data / "sft.jsonl",),
        "preference_data": (data / "preferences.jsonl",),
        "prompts": (data / "prompts.jsonl",),
    }
    notes = run(PipelineConfig(out=tmp_path / "own", size="tiny", **options))
    report = notes["stages"]["report"]
    assert "gold" not in report["models"]["ppo"] and report["models"]["ppo"]["kl"] is not None
    assert len(report["samples"]) == report["questions"] > 0
    assert "gold reward" not in capsys.readouterr().out
    assert "gold" not in (tmp_path / "own" / "report.html").read_text().lower()


def test_a_mistake_in_ones_own_last_file_is_told_before_anything_is_trained(finished, tmp_path):
    data = finished[0] / "data"
    wrong = tmp_path / "prompts.jsonl"
    wrong.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    options = {
        "pretrain_data": (str(data / "pretrain.jsonl"),),
        "sft_data": (data / "sft.jsonl",),
        "preference_data": (data / "preferences.jsonl",),
        "prompts": (wrong,),
    }
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: neither messages nor a prompt"):
        run(PipelineConfig(out=tmp_path / "own", size="tiny", **options))
    for name in options:
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        told = "holds no document" if name == "pretrain_data" else f"--{name.replace('_', '-')}: .* it is empty"
        good = options | {"prompts": (data / "prompts.jsonl",)}
        with pytest.raises(ValueError, match=told):
            run(PipelineConfig(out=tmp_path / "own", size="tiny", **good | {name: (empty,)}))
    assert not (tmp_path / "own").exists()


def test_the_time_of_a_stage_that_was_stopped_is_kept(copy, monkeypatch, capsys):
    """Where the stage goes on; where it begins again, what it had taken is gone with what it had made."""
    clock, stops = [0.0], [True]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: clock[0])

    def make(stage):
        (stage.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        clock[0] += 100
        if stops.pop():
            raise KeyboardInterrupt
        return {"before": 1.0, "after": 2.0}

    monkeypatch.setitem(pipeline.MAKE, "dpo", make)
    monkeypatch.setitem(pipeline.MAKE, "report", lambda stage: json.loads(report))
    monkeypatch.setattr(pipeline, "write_page", lambda config, notes: None)
    report = json.dumps(json.loads((copy / pipeline.NOTES).read_text())["stages"]["report"])
    with pytest.raises(KeyboardInterrupt):
        run(PipelineConfig(out=copy, size="tiny", from_="dpo"))
    stops.append(False)
    notes = run(PipelineConfig(out=copy, size="tiny"))
    assert notes["stages"]["dpo"]["seconds"] == 200 and "[7/8] dpo: 3 min 20 s" in capsys.readouterr().out
    assert "spent" not in json.loads((copy / pipeline.NOTES).read_text())
    stops += [False, True]
    with pytest.raises(KeyboardInterrupt):
        run(PipelineConfig(out=copy, size="tiny", from_="dpo"))
    assert run(PipelineConfig(out=copy, size="tiny", resume=False))["stages"]["dpo"]["seconds"] == 100


def test_durations_and_memory_read_well():
    assert [pipeline.duration(s) for s in (0.4, 59.6, 200, 3900)] == ["0 s", "1 min 0 s", "3 min 20 s", "1 h 5 min"]
    pipeline.reset_peak_memory()
    before = pipeline.peak_memory()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert pipeline.peak_memory() >= before + (60 << 20)


def test_every_size_is_a_recipe_that_the_stages_accept(tmp_path):
    for size in ("tiny", "default", "small", "medium"):
        for own in ({}, {name: ("x",) if name == "pretrain_data" else (Path("x"),) for name in pipeline.OWN_DATA}):
            config = PipelineConfig(out=tmp_path, size=size, **own)
            stage = lambda name, config=config: pipeline.Stage(config, name)
            pipeline.Prepare(inputs=("x",), **stage("tokenizer").told)
            pipeline.pretrain.PretrainConfig(data=tmp_path, **stage("pretrain").shared)
            pipeline.sft.SFTConfig(model=tmp_path, data=(tmp_path,), **stage("sft").chat)
            pipeline.reward.RewardConfig(model=tmp_path, data=(tmp_path,), **stage("reward").chat)
            pipeline.ppo.PPOConfig(model=tmp_path, reward=tmp_path, prompts=(tmp_path,), **stage("ppo").chat)
            pipeline.dpo.DPOConfig(model=tmp_path, data=(tmp_path,), **stage("dpo").chat)


# ------------------------------------------------------------------ the commands around it


def report_of(gold, known=0.9):
    models = {name: {"gold": gold + i / 10, "known_facts": known, "kl": None} for i, name in enumerate(pipeline.MODELS)}
    return {"models": models, "known": 9, "asked": 10, "clean_pairs": 0.9, "heldout_pairs": 0.7}


def test_seeds_are_told_by_mean_and_spread_and_one_by_one():
    (columns, rows), (_, each) = compare_seeds.tables({0: report_of(0.5), 1: report_of(0.7)})
    table = {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
    assert table["gold reward"]["base"] == "0.60 ± 0.14" and table["gold reward"]["dpo"] == "0.90 ± 0.14"
    assert table["facts right that base holds"]["sft"] == "90.0 % ± 0.0 %" and table["KL to sft"]["sft"] is None
    assert each[1] == ("seed 1", *["90.0 %"] * 4, "0.800", "0.900", "1.000", "90.0 %", "70.0 %")


@pytest.mark.parametrize("seeds", [(1,), (0, 0), (0, -1), ()])
def test_seeds_have_to_be_several(seeds):
    with pytest.raises(ValueError, match="--seeds has to be at least two different numbers from 0 on"):
        compare_seeds.Options(seeds=seeds)


def test_reward_hacking_differs_in_beta_alone_and_draws_what_came_out(finished, tmp_path, monkeypatch, capsys):
    configs = []

    def train(config):
        configs.append(config)
        config.out.mkdir(parents=True)
        rows = [
            {"step": step, **{f"eval_{m}": step + config.beta for _, m in reward_hacking.CURVES}} for step in (0, 5, 3)
        ]
        (config.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(reward_hacking.ppo, "train", train)
    reward_hacking.compare(reward_hacking.Options(pipeline=finished[0], out=tmp_path / "hacking"))
    free, paid = (vars(config) for config in configs)
    assert {name for name in free if free[name] != paid[name]} == {"beta", "out"}
    assert free["beta"] == 0 and paid["beta"] > 0 and free["questions"].name == "dev.jsonl"
    assert (tmp_path / "hacking" / "hacking.png").stat().st_size > 10_000
    lines = (tmp_path / "hacking" / "table.txt").read_text().splitlines()
    assert list(map(float, lines[2].split()[-3:])) == [0, 5, 3]
    assert capsys.readouterr().out.count("gold reward") == 2


def test_reward_hacking_needs_a_pipeline_on_the_atlas(tmp_path):
    with pytest.raises(ValueError, match=r"has no data/dev\.jsonl"):
        reward_hacking.Options(pipeline=tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="--betas has to be at least two different numbers from 0 on"):
        reward_hacking.Options(pipeline=tmp_path, betas=(0.1,))
