"""A run that was stopped ends as one that never was: the same bits of the model, the same rows of the files. Each
trainer is stopped by signals between updates and killed in the middle of them, at every kind of moment that it has."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minillm.checkpoint import Checkpoints, NotFinite, locked
from minillm.model import Config, build
from minillm.trainers import common, dpo, ppo, pretrain, recorded, reward, run, sft
from tests.world import TOKENIZER, TRAINERS, config, left, make_world

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Here and in the processes started from here, also where the tests run in the background of a shell, which has its
    jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Killed(BaseException):
    """As good as SIGKILL: nobody catches it, and nobody tidies up."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


ADAPTERS = {"lora_rank": 2}
VARIANTS = [(name, {}) for name in TRAINERS] + [("sft", ADAPTERS), ("ppo", ADAPTERS), ("pretrain", {"keep_best": True})]
VARIANT = pytest.mark.parametrize("name, options", VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(x))


straight_runs = {}


def straight(world, tmp_path_factory, name, options):
    """What is left of a run that nobody stopped."""
    key = name, *sorted(options)
    if key not in straight_runs:
        out = tmp_path_factory.mktemp("straight") / "out"
        TRAINERS[name].train(config(world, name, out, **options))
        straight_runs[key] = left(out)
    return straight_runs[key]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


# ------------------------------------------------------------------ stopped by a signal


@VARIANT
def test_a_run_stopped_by_signals_ends_the_same(name, options, world, tmp_path, tmp_path_factory, monkeypatch):
    """Twice: the second time after a single update, so that a checkpoint of a resumed run is resumed, too. The signal
    comes in the middle of an update, which is finished and saved."""
    update, at = run.Run.update, [3, 4]
    stops = list(at)

    def stopping(self, *args, **kwargs):
        if stops and self.step == stops[0]:
            stops.pop(0)
            signal.raise_signal(signal.SIGINT if stops else signal.SIGTERM)
        update(self, *args, **kwargs)

    monkeypatch.setattr(run.Run, "update", stopping)
    here = config(world, name, tmp_path / "out", **options)
    for number, step in zip((2, 15), at, strict=True):
        with pytest.raises(run.Stopped) as stopped:
            TRAINERS[name].train(here)
        assert stopped.value.code == 128 + number and f"after update {step + 1} of" in str(stopped.value)
        here = dataclasses.replace(here, resume=True)
    TRAINERS[name].train(here)
    same(left(here.out), straight(world, tmp_path_factory, name, options))


def test_the_second_signal_leaves_at_once(world, tmp_path, monkeypatch):
    done = []

    def twice(self, *args, **kwargs):
        done.append(self.step)
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")

    monkeypatch.setattr(run.Run, "update", twice)
    with pytest.raises(run.Stopped, match="SIGINT: left at once") as stopped:
        pretrain.train(config(world, "pretrain", tmp_path / "out"))
    assert stopped.value.code == 130 and done == [0, 1, 2, 3, 4]
    assert Checkpoints(tmp_path / "out/checkpoints").steps() == [2, 4]  # nothing was saved for it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so(world, tmp_path, monkeypatch):
    """A run under nohup, or in a shell's background, is not ended by a Ctrl-C that was meant for something else."""
    update = run.Run.update
    monkeypatch.setattr(
        run.Run, "update", lambda *args, **kw: (signal.raise_signal(signal.SIGINT), update(*args, **kw))
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pretrain.train(config(world, "pretrain", tmp_path / "out"))
    assert Checkpoints(tmp_path / "out/checkpoints").steps()[-1] == 9


# ------------------------------------------------------------------ killed in the middle


def in_the_middle(name, monkeypatch, moment):
    """Kill the training of `name` when `moment` comes for the n-th time: {what: n}."""
    what, n = moment
    owner, function = {
        "micro-batch": {  # one of the four of an update: the gradient is half there
            "pretrain": (common, "next_token_loss"),
            "sft": (common, "next_token_loss"),
            "reward": (reward, "score_answers"),
            "dpo": (dpo, "loss_and_metrics"),
            "ppo": (ppo, "values_of"),
        },
        "rollout": {"ppo": (ppo, "generate")},
        "experience": {"ppo": (ppo, "frozen_values")},
        "save": dict.fromkeys(TRAINERS, (run.Checkpoints, "save")),
        "evaluation": dict.fromkeys(TRAINERS, (run.Run, "_look")),
        "row": dict.fromkeys(TRAINERS, (run.Run, "write")),
    }[what][name]
    original, count = getattr(owner, function), iter(range(10_000))

    def killing(*args, **kwargs):
        if next(count) == n:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, killing)


MOMENTS = [(name, ("micro-batch", n)) for name in TRAINERS for n in (14, 23)]
MOMENTS += [("ppo", ("rollout", 6)), ("ppo", ("experience", 4)), ("sft", ("save", 2)), ("dpo", ("evaluation", 1))]
MOMENTS += [("reward", ("row", 4)), ("pretrain", ("row", 0))]


@pytest.mark.parametrize("name, moment", MOMENTS, ids=lambda x: x if isinstance(x, str) else f"{x[0]}-{x[1]}")
def test_a_run_killed_in_the_middle_ends_the_same(name, moment, world, tmp_path, tmp_path_factory, monkeypatch):
    here = config(world, name, tmp_path / "out")
    with monkeypatch.context() as patch:
        in_the_middle(name, patch, moment)
        with pytest.raises(Killed):
            TRAINERS[name].train(here)
    with open(here.out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')  # what a kill in the middle of a line leaves
    TRAINERS[name].train(dataclasses.replace(here, resume=True))
    same(left(here.out), straight(world, tmp_path_factory, name, {}))


def test_a_run_killed_after_its_last_update_writes_its_model(world, tmp_path, tmp_path_factory, monkeypatch):
    here = config(world, "sft", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_trained", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            sft.train(here)
    sft.train(dataclasses.replace(here, resume=True))
    same(left(here.out), straight(world, tmp_path_factory, "sft", {}))


def stopped_after(step, trainer, here, monkeypatch):
    """Train until a signal comes in an update."""
    update = run.Run.update
    with monkeypatch.context() as patch:
        told = lambda self, *args, **kw: (
            self.step == step and signal.raise_signal(signal.SIGINT),
            update(self, *args, **kw),
        )
        patch.setattr(run.Run, "update", told)
        with pytest.raises(run.Stopped):
            trainer.train(here)


def test_a_dpo_run_goes_on_though_the_references_last_bits_are_others(world, tmp_path, monkeypatch):
    """As they are with another number of threads, precision or device, all of which may change."""
    here, made = config(world, "dpo", tmp_path / "out"), dpo.with_reference
    stopped_after(3, dpo, here, monkeypatch)

    def other_bits(*args):
        found = made(*args)
        return [e._replace(reference=tuple(np.nextafter(x, np.float32(0)) for x in e.reference)) for e in found]

    monkeypatch.setattr(dpo, "with_reference", other_bits)
    dpo.train(dataclasses.replace(here, resume=True))


def test_a_run_goes_on_with_its_files_in_another_place(world, tmp_path, tmp_path_factory, monkeypatch):
    """Their contents are compared, not their paths."""
    for name in TRAINERS:
        here = config(world, name, tmp_path / name)
        stopped_after(3, TRAINERS[name], here, monkeypatch)
        moved = tmp_path / "moved"
        shutil.copytree(world, moved, dirs_exist_ok=True)
        TRAINERS[name].train(dataclasses.replace(config(moved, name, tmp_path / name), resume=True))
        same(left(here.out), straight(world, tmp_path_factory, name, {}))


def test_a_damaged_checkpoint_is_passed_over_with_a_loud_line(world, tmp_path, tmp_path_factory, capfd):
    here = config(world, "reward", tmp_path / "out")
    reward.train(here)
    newest = here.out / "checkpoints" / f"step-{max(Checkpoints(here.out / 'checkpoints').steps()):08}"
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 4
    (newest / "model.safetensors").write_bytes(data)
    (here.out / "model.safetensors").unlink()
    capfd.readouterr()
    reward.train(dataclasses.replace(here, resume=True))
    told = capfd.readouterr()
    assert (
        "WARNING: " in told.err and "model.safetensors is damaged" in told.err and "the checkpoint before" in told.err
    )
    assert "resumed after update" in told.out
    same(left(here.out), straight(world, tmp_path_factory, "reward", {}))


# ------------------------------------------------------------------ what may change, and what may not


def stopped_run(world, out, name="pretrain"):
    """The settings of a run that was stopped in the middle."""
    here = config(world, name, out)
    patch = pytest.MonkeyPatch()
    with patch.context() as inner:
        in_the_middle(name, inner, ("micro-batch", 23))
        with pytest.raises(Killed):
            TRAINERS[name].train(here)
    return dataclasses.replace(here, resume=True)


def test_learning_rate_and_length_of_a_run_may_change_and_are_told(world, tmp_path, capsys):
    here = stopped_run(world, tmp_path / "out")
    pretrain.train(dataclasses.replace(here, lr=1e-4, tokens=12 * 4 * 24))
    told = capsys.readouterr().out
    assert "another setting than before: --lr was 0.004 and is 0.0001\n" in told
    assert "another setting than before: --tokens was 864 and is 1152\n" in told
    noted = json.loads((here.out / "environment.json").read_text(encoding="utf-8"))
    assert noted["resumed"][0]["changed"] == {"lr": [0.004, 0.0001], "tokens": [864, 1152]}
    rows = left(here.out)["metrics.jsonl"]
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    "field, value", [("hidden_size", 32), ("num_hidden_layers", 2), ("length", 12), ("batch_size", 8), ("seed", 1),
                     ("weight_decay", 0.5), ("packing", "greedy"), ("weights", {"cats": 1.0, "dogs": 2.0})]
)  # fmt: skip
def test_a_resumed_run_is_no_other_run(field, value, world, tmp_path):
    here = stopped_run(world, tmp_path / "out")
    before = left(here.out)
    with pytest.raises(ValueError, match=f"can not be resumed with other settings: --{field.replace('_', '-')} was"):
        pretrain.train(dataclasses.replace(here, **{field: value}))
    assert left(here.out) == before


def test_other_data_and_another_tokenizer_are_refused_by_name(world, tmp_path):
    other = tmp_path / "data"
    other.mkdir()
    for path in (world / "data").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    here = dataclasses.replace(
        stopped_run(world, tmp_path / "out"), data=other
    )  # the same in another place is the same
    ids = np.fromfile(other / "dogs.train.bin", "<u2")
    ids[3] += 1
    ids.tofile(other / "dogs.train.bin")
    with pytest.raises(
        ValueError, match=r"step-00000004 does not fit this run: batches: .*dogs\.checksum was \d+ and is"
    ):
        pretrain.train(here)
    manifest = (other / "manifest.json").read_text(encoding="utf-8")
    (other / "manifest.json").write_text(manifest.replace('"format": 1', '"format":  1'), encoding="utf-8")
    with pytest.raises(ValueError, match="step-00000004 belongs to another run: the contents of --data are others"):
        pretrain.train(here)
    (other / "manifest.json").write_text(manifest, encoding="utf-8")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text + " ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"step-00000004 belongs to another run: tokenizer was [0-9a-f]{12}… and is"):
        pretrain.train(here)
    noted = json.loads((here.out / "settings.json").read_text(encoding="utf-8"))
    assert noted["data"] == str(world / "data")  # what was refused is not written down


def test_other_weights_to_start_from_are_refused(world, tmp_path):
    here = stopped_run(world, tmp_path / "out", "dpo")
    model = build(Config(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=96), seed=4)  # fmt: skip
    common.save_model(tmp_path / "base", model, TOKENIZER, "chatml")
    with pytest.raises(ValueError, match="belongs to another run: the contents of --model are others"):
        dpo.train(dataclasses.replace(here, model=tmp_path / "base"))


def test_other_rows_are_refused_also_where_few_are_looked_at(world, tmp_path, monkeypatch):
    """The order of the rows is checked by a sample of them, the files by every byte."""
    (tmp_path / "pairs.jsonl").write_bytes((world / "pairs.jsonl").read_bytes())
    monkeypatch.setattr(reward.Items, "identity", lambda self: {"rows": len(self)})
    here = dataclasses.replace(stopped_run(world, tmp_path / "out", "reward"), data=(tmp_path / "pairs.jsonl",))
    text = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text(text.replace('"yes"', '"yet"', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="belongs to another run: the contents of --data are others"):
        reward.train(here)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    reward.train(here)


def test_what_can_not_be_resumed(world, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"foreign has no settings\.json: there is no run to resume"):
        pretrain.train(config(world, "pretrain", tmp_path / "foreign", resume=True))
    with pytest.raises(ValueError, match="--resume goes on with what --overwrite would remove"):
        config(world, "pretrain", tmp_path / "out", resume=True, overwrite=True)
    with pytest.raises(ValueError, match=r"out is not empty: take another --out, go on with it \(--resume\), or"):
        stopped_run(world, tmp_path / "out")
        pretrain.train(config(world, "pretrain", tmp_path / "out"))
    pretrain.train(config(world, "pretrain", tmp_path / "new", resume=True))  # as a script in a loop would do
    assert "there is no run in " in capsys.readouterr().out


def test_settings_are_read_with_the_nearest_name_for_a_wrong_one(world, tmp_path):
    here = stopped_run(world, tmp_path / "out")
    path = here.out / "settings.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    assert dataclasses.replace(run.read_settings(pretrain.PretrainConfig, path), resume=True) == here
    for wrong, message in (
        ({**good, "batchsize": 3}, "no key 'batchsize'; perhaps you meant batch_size"),
        ({**good, "lr": "fast"}, "--lr has to be a finite number, and is fast"),
        ({**good, "lr": -1.0}, "--lr has to be above 0, and is -1.0"),
        ({k: v for k, v in good.items() if k != "data"}, "missing 1 required keyword-only argument: 'data'"),
        ([1], "is not a readable JSON object: it is a list"),
    ):
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"settings\.json:? {message}"):
            pretrain.train(here)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"settings\.json is not a readable JSON object"):
        pretrain.train(here)


# ------------------------------------------------------------------ what is kept


def test_the_best_checkpoint_is_kept_and_its_model_is_written(world, tmp_path, monkeypatch, capsys):
    told = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(pretrain, "evaluate_tokens", lambda *_: {"eval_bits_per_byte": next(told)})
    here = config(world, "pretrain", tmp_path / "out", keep_best=True, keep_last=1, eval_every=3)
    model, _ = pretrain.train(here)
    assert Checkpoints(here.out / "checkpoints").steps() == [3, 9]
    assert "kept: the model after update 3 of 9, with eval_bits_per_byte 1.0000" in capsys.readouterr().out
    weights = lambda path: (path / "model.safetensors").read_bytes()
    assert (
        weights(here.out)
        == weights(here.out / "checkpoints/step-00000003")
        != weights(here.out / "checkpoints/step-00000009")
    )
    assert np.array_equal(model.flat, common.load_with_head(here.out / "checkpoints/step-00000003", "lm").flat)


def test_who_no_longer_wants_the_best_gets_the_last(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "evaluate_tokens", lambda *_: {"eval_bits_per_byte": 1.0 + here.out.stat().st_mtime})
    here = config(world, "pretrain", tmp_path / "out", keep_best=True)
    stopped_after(5, pretrain, here, monkeypatch)
    pretrain.train(dataclasses.replace(here, resume=True, keep_best=False))
    assert "kept: " not in capsys.readouterr().out
    newest = here.out / "checkpoints/step-00000009/model.safetensors"
    assert (here.out / "model.safetensors").read_bytes() == newest.read_bytes()


def test_a_run_that_is_longer_than_it_may_be_is_not_cut(world, tmp_path, monkeypatch):
    here = config(world, "pretrain", tmp_path / "out")
    stopped_after(5, pretrain, here, monkeypatch)
    before = left(here.out)
    with pytest.raises(ValueError, match="has seen 6 updates, and these settings make 4: go on with a larger --tokens"):
        pretrain.train(dataclasses.replace(here, resume=True, tokens=4 * 4 * 24))
    same(left(here.out), before)


def test_checkpoints_by_the_clock(world, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    saved = []
    monkeypatch.setattr(run.Checkpoints, "save", lambda self, step, *rest: saved.append(step))
    pretrain.train(config(world, "pretrain", tmp_path / "out", save_every=0, save_minutes=1.0))
    assert saved[-1] == 9 and len(saved) > 2 and all(b - a > 1 for a, b in itertools.pairwise(saved[:-1]))
    pretrain.train(config(world, "pretrain", tmp_path / "none", save_every=0, save_minutes=0.0))
    assert saved[-1] == 9 and not (tmp_path / "none/checkpoints").exists()


def test_a_model_that_is_not_finite_is_never_saved_over_a_good_one(world, tmp_path, monkeypatch):
    here, update = config(world, "pretrain", tmp_path / "out"), run.Run.update

    def poisoned(self, *args, **kwargs):
        update(self, *args, **kwargs)
        if self.step == 5:
            self.holds["model"].flat[7] = np.inf

    monkeypatch.setattr(run.Run, "update", poisoned)
    with pytest.raises(
        NotFinite, match=r"model/model.embed_tokens.weight is not finite after update 6: it is not saved"
    ):
        pretrain.train(here)
    manifest, _ = Checkpoints(here.out / "checkpoints").newest()
    assert manifest["step"] == 4 and not (here.out / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_names_its_rows(world, tmp_path, monkeypatch):
    original, count = recorded.next_token_backward, iter(range(100))
    spoilt = lambda *args: original(*args) if next(count) != 2 else float("nan")
    monkeypatch.setattr(recorded, "next_token_backward", spoilt)
    with pytest.raises(
        NotFinite, match=r"^update 3 \((cats|dogs) [\d, ]+; (cats|dogs) [\d, ]+\): the gradient's norm is"
    ):
        pretrain.train(config(world, "pretrain", tmp_path / "out"))
    count = iter(range(100))
    pretrain.train(config(world, "pretrain", tmp_path / "skip", on_nan="skip"))
    assert left(tmp_path / "skip")["metrics.jsonl"][-2]["skipped_updates"] == 1


def test_too_little_memory_says_what_took_it_and_what_to_lower(world, tmp_path, monkeypatch):
    def too_much(*_):
        raise MemoryError("Unable to allocate 12.0 GiB")

    monkeypatch.setattr(recorded, "next_token_backward", too_much)
    with pytest.raises(MemoryError) as caught:
        pretrain.train(config(world, "pretrain", tmp_path / "out", micro_batch_size=2))
    parameters = common.load_with_head(world / "base", "lm").flat.size
    assert str(caught.value) == (
        f"Unable to allocate 12.0 GiB; 2 rows of up to 24 tokens were computed at once by a model of {parameters:,} "
        "parameters (0 MB with gradients and moments): take a smaller --micro-batch-size (now 2) or shorter rows"
    )


def test_what_a_run_was_made_with_stands_beside_it(world, tmp_path):
    here = config(world, "reward", tmp_path / "out")
    reward.train(here)
    noted = json.loads((here.out / "environment.json").read_text(encoding="utf-8"))
    assert noted["versions"]["numpy"] == np.__version__ and noted["machine"]["cores"] == os.cpu_count()
    assert noted["command"] == sys.argv and "resumed" not in noted
    settings = json.loads((here.out / "settings.json").read_text(encoding="utf-8"))
    assert settings.keys() == vars(here).keys() and settings["seed"] == 0  # what was left to its default, too


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(world, tmp_path, monkeypatch):
    """After a power failure a checkpoint must not know of rows that the disk has not."""
    synced, fsync, save = [], os.fsync, run.Checkpoints.save
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))

    def saving(self, step, arrays, state, *rest):
        written = {path.stat().st_ino: path.name for path in (tmp_path / "out").glob("*.jsonl")}
        assert set(written) <= set(synced) and set(written.values()) == state["files"].keys()
        synced.clear()
        return save(self, step, arrays, state, *rest)

    monkeypatch.setattr(run.Checkpoints, "save", saving)
    pretrain.train(config(world, "pretrain", tmp_path / "out"))


def test_a_checkpoint_is_a_model_folder(world, tmp_path):
    here = config(world, "sft", tmp_path / "out")
    model, _ = sft.train(here)
    newest = here.out / "checkpoints" / f"step-{max(Checkpoints(here.out / 'checkpoints').steps()):08}"
    assert np.array_equal(common.load_with_head(newest, "lm").flat, model.flat)
    assert common.load_tokenizer(newest).vocab_size == TOKENIZER.vocab_size and common.template_of(newest) == "chatml"


def test_files_that_somebody_has_shortened_are_told(world, tmp_path, capfd):
    here = stopped_run(world, tmp_path / "out")
    path = here.out / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:100])
    pretrain.train(here)
    assert "WARNING: " in capfd.readouterr().err
    assert all(isinstance(json.loads(line), dict) for line in path.read_text(encoding="utf-8").splitlines())


# ------------------------------------------------------------------ the scripts, from outside


def script(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


LINES = {signal.SIGINT: (130, "SIGINT"), signal.SIGTERM: (143, "SIGTERM")}


def often(world, out, updates):
    """Settings of a run that saves after every update."""
    return config(world, "pretrain", out, tokens=updates * 4 * 24, save_every=1, eval_every=25, log_every=1)


def stopped_again_and_again(here, rng, times, kinds):
    """Start scripts/pretrain.py, send it one of `kinds` at a random moment of an update or a save, resume, and again,
    `times` in all; then let it end."""
    told = {name: value for name, value in vars(here).items() if value not in (None, "", False)}
    options = [word for name, value in told.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command, latest = [ROOT / "scripts/pretrain.py", *options], here.out / "checkpoints/latest"
    for n in range(times):
        before = latest.read_bytes() if latest.exists() else b""
        process = script(*command, *(["--resume"] if n else []))
        while process.poll() is None and (not latest.exists() or latest.read_bytes() == before):
            time.sleep(0.001)  # until it has saved for the first time
        kind = kinds[n % len(kinds)]
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        if kind in LINES:
            code, name = LINES[kind]
            assert process.returncode == code and f"pretrain.py: {name}: stopped after update" in err, err
        else:
            assert process.returncode == -kind, err
        assert Checkpoints(here.out / "checkpoints").newest() is not None
    process = script(*command, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


KILLS, ASKS = [signal.SIGKILL], [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(
    "kinds, times, updates",
    [
        (KILLS + ASKS, 3, 20),
        pytest.param(KILLS, 50, 500, marks=pytest.mark.slow),
        pytest.param(ASKS, 20, 300, marks=pytest.mark.slow),
    ],
    ids=["three-times", "killed-50-times", "asked-20-times"],
)
def test_a_script_that_is_stopped_again_and_again_ends_the_same(kinds, times, updates, world, tmp_path):
    pretrain.train(often(world, tmp_path / "straight", updates))
    here = often(world, tmp_path / "out", updates)
    stopped_again_and_again(here, np.random.default_rng(times), times, kinds)
    same(left(here.out), left(tmp_path / "straight"))


def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path):
    here = config(world, "pretrain", tmp_path / "out")
    with (
        locked(here.out),
        pytest.raises(ValueError, match=rf"out is in use by process {os.getpid()} on .*: wait for it"),
    ):
        pretrain.train(here)


def test_resume_alone_takes_the_options_of_the_run(world, tmp_path, status_of, capsys):
    spec = importlib.util.spec_from_file_location("command_line", ROOT / "scripts/command_line.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = stopped_run(world, tmp_path / "out")
    parsed = module.parse(pretrain.PretrainConfig, "", ["--out", str(here.out), "--resume"])
    assert parsed == here
    parsed = module.parse(pretrain.PretrainConfig, "", [f"--out={here.out}", "--resume", "True", "--lr", "0.5"])
    assert parsed == dataclasses.replace(here, lr=0.5)


def only_checkpoint(change):
    """Leaves one checkpoint, and changes one of its files: change(the folder)."""

    def spoil(out):
        *others, last = Checkpoints(out / "checkpoints").steps()
        for step in others:
            shutil.rmtree(out / f"checkpoints/step-{step:08}")
        change(out / f"checkpoints/step-{last:08}")

    return spoil


def edited(name, old, new):
    def change(folder):
        text = (folder / name).read_bytes()
        assert text.count(old) == 1
        (folder / name).write_bytes(text.replace(old, new))

    return change


BEGIN_AGAIN = "begin again, without --resume"
FOUND = "its SHA-256 is not the one that it was written with"
DAMAGED = [  # (what happened to the run's folder, more options, exit code, the last line)
    (edited("settings.json", b'"lr"', b'"lrr"'), [], 2, "OUT/settings.json: no key 'lrr'; perhaps you meant lr"),
    (edited("settings.json", b'"seed": 0', b'"seed": "x"'), [], 2,
     "OUT/settings.json: --seed has to be a whole number, and is x"),
    (lambda out: (out / "settings.json").write_text("[]"), [], 2,
     "OUT/settings.json is not a readable JSON object: it is a list"),
    (lambda out: (out / "settings.json").unlink(), ["--data", "data"], 1,
     "OUT has no settings.json: there is no run to resume"),
    (lambda out: None, ["--overwrite", "True"], 2,
     "--resume goes on with what --overwrite would remove: only one of them can be meant"),
    (lambda out: None, ["--hidden-size", "32"], 1,
     "OUT can not be resumed with other settings: --hidden-size was 16 and is 32"),
    (lambda out: None, ["--batch-size", "2", "--seed", "5"], 1,
     "OUT can not be resumed with other settings: --seed was 0 and is 5; --batch-size was 4 and is 2"),
    (lambda out: (out / ".lock").write_text('{"pid": 7, "host": "elsewhere"}'), [], 1,
     "OUT is in use by process 7 on elsewhere: if that has ended, delete OUT/.lock"),
    (only_checkpoint(edited("manifest.json", b'"format": 1,', b'"format": 3,')), [], 1,
     f"no checkpoint in OUT/checkpoints is whole (STEP/manifest.json is damaged: {FOUND}): {BEGIN_AGAIN}"),
    (only_checkpoint(lambda folder: (folder / "model.safetensors").unlink()), [], 1,
     "no checkpoint in OUT/checkpoints is whole (STEP/model.safetensors is missing: the checkpoint is not whole): "
     + BEGIN_AGAIN),
    (only_checkpoint(edited("config.json", b'"vocab_size"', b'"vocab_sise"')), [], 1,
     f"no checkpoint in OUT/checkpoints is whole (STEP/config.json is damaged: {FOUND}): {BEGIN_AGAIN}"),
    (only_checkpoint(lambda folder: (folder / "training.safetensors").write_bytes(b"")), [], 1,
     "no checkpoint in OUT/checkpoints is whole (STEP/training.safetensors has 0 bytes, and was written with SIZE): "
     + BEGIN_AGAIN),
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    return stopped_run(world, tmp_path_factory.mktemp("stopped") / "out").out


@pytest.mark.parametrize("happened, options, code, line", DAMAGED, ids=lambda x: x[:60] if isinstance(x, str) else "")
def test_a_run_that_can_not_be_resumed_is_one_line(happened, options, code, line, stopped, tmp_path, status_of):
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    happened(out)
    main = lambda: runpy.run_path(str(ROOT / "scripts/pretrain.py"), run_name="__main__")
    status, _, err = status_of(main, "pretrain.py", "--out", out, "--resume", *options)
    told = re.sub(r"with [\d,]+\)", "with SIZE)", err.replace(f"{out}/checkpoints/step-00000004", "STEP"))
    *warnings, last = told.replace(str(out), "OUT").splitlines()
    assert (status, last) == (code, f"pretrain.py: {line}")
    assert all(warning.startswith("WARNING: ") for warning in warnings) and "Traceback" not in err


@pytest.mark.parametrize("cache", ["/dev/null/cache", "file"])
def test_kernels_that_can_not_be_kept_are_told_before_anything_is_trained(cache, world, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    here = tmp_path / cache
    options = ["--data", world / "data", "--out", tmp_path / "out", "--tokens", "100", "--length", "24"]
    process = script(ROOT / "scripts/pretrain.py", *options, env=os.environ | {"NUMBA_CACHE_DIR": str(here)})
    _, err = process.communicate(timeout=60)
    told = "compiled kernels are kept there; set NUMBA_CACHE_DIR to a folder that can be written"
    assert process.returncode == 1 and err.startswith(f"pretrain.py: {here}: ") and err.endswith(f": {told}\n"), err
    assert err.count("\n") == 1
