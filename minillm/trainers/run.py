"""
A run: one training in one folder, from the first update to the last, however often it is stopped in between.

    @in_its_folder                                       checks --out and locks it, before anything is loaded
    def train(config):
        ...
        claim(config)                                    empties and marks the folder; errors up to here change nothing
        with Run(config, steps, holds, identity) as run:
            for step in run.steps(evaluate, sample):     goes on behind the newest checkpoint with --resume
                ...                                      batch, loss, backward
                run.update(optimizer, {"loss": loss}, tokens)

A checkpoint stands between two updates: gradients are zero there, no micro-batch and no rollout is half done, and no
random generator is alive, because each one is made of the seed and the step. So the state is small: parameters,
moments, the position in the data, what is not yet logged, and how long the files of rows were.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..checkpoint import LOCK, Checkpoints, NotFinite, delete, locked, read, sha256, write_json
from ..data import output
from ..data.datasets import MANIFEST
from ..extras import extra
from ..files import check_keys, read_object
from ..kernels.device import check_device, device_of, gpu_name, later
from ..optim import clip_scale, gpu_clip_scale

WIDTH = 110  # of a line that is printed
QUIET = 10.0  # seconds without a line, after which a run without a progress bar prints one
LIBRARIES = ("numpy", "numba", "safetensors", "tokenizers", "cupy-cuda12x", "cupy-cuda13x")
SETTINGS, ENVIRONMENT = "settings.json", "environment.json"
SAVED = ("sums", "tokens", "skipped", "last", "looked", "best")  # of a Run's own fields, those that a checkpoint holds

# What may be another at --resume: how much and how fast is trained, what is told and kept, where it goes on, and what
# has to be smaller where memory was short (device, workers and micro_batch_size change the last bits, precision more).
# Paths, too: their contents are compared. Everything else would make another run of it.
CHANGEABLE = {
    *("lr", "schedule", "warmup", "lr_floor", "value_lr"),
    *("epochs", "tokens", "episodes"),
    *("log_every", "eval_every", "samples", "tensorboard", "eval_rows", "eval_questions", "eval_prompts"),
    *("save_every", "save_minutes", "keep_last", "keep_best"),
    *("micro_batch_size", "on_nan", "skip_bad", "overwrite", "resume", "flight_record"),
    *("device", "precision", "workers", "cuda_graph"),
}


class Stopped(KeyboardInterrupt):
    """A signal ended the run between two updates; everything is saved. `code` is the exit status that tells so."""

    def __init__(self, number, message):
        super().__init__(message)
        self.code = 128 + number


# ------------------------------------------------------------------ the folder


class Unheard:
    """A stream to which writing goes on when its reader has gone, as `| head` does: a run is not lost for that."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()


def in_its_folder(train):
    """train(config) with config.device and config.out checked first, and the folder locked until it ends."""

    @functools.wraps(train)
    def alone(config):
        check_device(config.device)
        check_out(config)
        with locked(config.out), contextlib.redirect_stdout(Unheard(sys.stdout)):
            return train(config)

    return alone


def check_out(settings):
    """ValueError where the output folder can not be taken: an error now, not after an hour. Changes nothing."""
    out = settings.out
    if settings.resume and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        if not (out / SETTINGS).exists():
            raise ValueError(f"{out} has no {SETTINGS}: there is no run to resume")
        return
    hint = ", go on with it (--resume)" if (out / "checkpoints").exists() else ""
    folders = ["checkpoints", "adapter", "tensorboard"]
    output.check_out(out, settings.overwrite, SETTINGS, "a trainer", folders, hint)
    for name, path in _paths(settings) if out.exists() else ():
        if name != "out" and path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--{name} {path} is in --out {out}, which would be replaced: take another --out")


def claim(settings):
    """Make the output folder this run's: empty but for the settings and what they ran on; with --resume, as it was,
    where the settings are those of the run that is there. Errors as `check_out`, and a field that may not change."""
    out = settings.out
    if settings.tensorboard:
        extra("tensorboardX", "log")
    check_out(settings)
    out.mkdir(parents=True, exist_ok=True)
    if settings.resume and (out / SETTINGS).exists():
        _changed(settings)
        return  # what is another now is written down when the checkpoint has been found to fit
    if settings.resume:
        print(f"there is no run in {out} yet: it begins now")
    for path in out.iterdir():
        if path.name != LOCK:
            delete(path)
    _write_down(settings, {})


def _write_down(settings, changed):
    """settings.json, and in environment.json what the run runs on and what `changed` since it began."""
    write_json(settings.out / SETTINGS, dataclasses.asdict(settings))
    _note_environment(settings.out / ENVIRONMENT, changed, settings.device)


def _changed(settings):
    """{field: [was, is]} of what is another than in the run that is resumed. ValueError: a field that may not be."""
    was = vars(read_settings(type(settings), settings.out / SETTINGS))
    paths = {name for name, _ in _paths(settings)}
    plain = lambda value: json.loads(json.dumps(value, default=str))
    changed = {name: [plain(was[name]), plain(now)] for name, now in vars(settings).items() if was[name] != now}
    told = {name: f"--{name.replace('_', '-')} was {a} and is {b}" for name, (a, b) in changed.items()}
    if wrong := [line for name, line in told.items() if name not in CHANGEABLE | paths]:
        raise ValueError(f"{settings.out} can not be resumed with other settings: {'; '.join(wrong)}")
    return {name: pair for name, pair in changed.items() if name not in ("resume", "overwrite")}


def read_settings(kind, path):
    """The settings of a run, an instance of the dataclass `kind`, from its settings.json. ValueError with the file's
    name: it is no JSON object, a field is missing, unknown (the nearest is named), or of another kind or range."""
    told = read_object(path)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    check_keys(told, fields, path)
    try:
        return kind(**{name: _typed(value, fields[name].type) for name, value in told.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None


def _typed(value, kind):
    """A value of JSON as the field's type: a Path, a tuple of them, or what it was."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(item, get_args(kind)[0]) for item in value)
    wants_path = kind is Path or Path in get_args(kind)
    return Path(value) if wants_path and isinstance(value, str) and get_origin(kind) is not Literal else value


def _paths(settings):
    """(option, Path) of every path in the settings."""
    for name, value in vars(settings).items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                yield name, path


def _note_environment(path, changed, device):
    """environment.json: the command, versions and machine; of a run that was resumed, the first ones and what changed
    each time."""
    now = {
        "command": sys.argv,
        "versions": {"minillm": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()}
        | ({"gpu": gpu_name()} if device == "cuda" else {}),
    }
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        noted.setdefault("resumed", []).append(now | {"changed": changed})
    except (OSError, ValueError, AttributeError):  # the first time; or it was damaged, and nothing depends on it
        noted = now
    write_json(path, noted)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit():
    """The commit of this checkout, with "+" where files differ from it; None where it is none, or there is no git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode
        return commit.stdout.strip() + "+" * bool(dirty)
    return None


def _processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def identity_of(settings, model, tokenizer_folder, template=None):
    """What a run's checkpoints belong to, {name: JSON value}: the architecture, the tokenizer, the template, and the
    contents of all files and folders that the settings name, wherever they are."""
    found = {f"model.{name}": value for name, value in dataclasses.asdict(model.config).items()}
    found = json.loads(json.dumps(found, default=str))
    found |= {"tokenizer": sha256(Path(tokenizer_folder) / "tokenizer.json"), "template": template}
    for option, path in _paths(settings):
        if option != "out":
            found.setdefault(f"contents of --{option.replace('_', '-')}", []).append(_contents(path))
    return found


def _contents(path):
    """One SHA-256 for a file; for a folder that of its weights, or of its manifest, which has its token files' own."""
    files = [path]
    if path.is_dir():
        files = [path / MANIFEST] if (path / MANIFEST).exists() else sorted(path.glob("*.safetensors"))
    return " ".join(sha256(file) for file in files)


# ------------------------------------------------------------------ the run


class Update(NamedTuple):
    """An update whose numbers are not read yet."""

    step: int
    numbers: object  # function() -> {metric: float}, with the gradient's norm under `norm`
    norm: str
    lr: float
    rows: str  # which rows it was made of
    sums: dict  # where its numbers belong


class Row(NamedTuple):
    """A row of metrics.jsonl that waits for updates."""

    step: int
    sums: dict
    tokens: int  # in all
    speed: int  # tokens per second since the row before


class Run:
    """The rhythm around a trainer's loop: what is logged, evaluated, shown, saved and written down, and when.

    holds     {name: thing with state_dict() and load_state_dict()}: what the training changes. "model" is the one that
              is written at the end, and without it nothing is saved
    identity  what a checkpoint belongs to (identity_of); with --resume it has to be the same
    dress     function(folder) that writes what makes a model folder of the checkpoint beside the weights; None for
              adapters, whose weights alone are no model
    best      (metric, 1 or -1): the evaluation that --keep-best looks at, and whether more or less is better

    evaluate()  -> {metric: number}, before the first update, after every eval_every-th and after the last
    sample()    -> [(prompt, completion)], shown and written to samples.jsonl at the same moments

    metrics.jsonl gets a row of means every log_every updates, and a row for each evaluation.

    Nothing in here waits for a GPU during an update: its numbers are read when the next one has been told to the GPU,
    and rows that they belong to are written then. Before an evaluation or a checkpoint, everything is waited for.
    """

    def __init__(self, settings, steps, holds=None, identity=None, dress=None, best=None):
        self.settings, self.total, self.step, self.done = settings, steps, 0, 0
        self.holds, self.identity, self.dress, self.best_metric = holds or {}, identity or {}, dress, best
        self.checkpoints = Checkpoints(settings.out / "checkpoints", settings.keep_last)
        self.sums, self.tokens, self.skipped, self.last = {}, 0, 0, {}
        self.updates, self.rows = [], []  # Updates that are not read, Rows that are not written
        self.looked = self.saved = self.best = None  # the steps of the last evaluation and checkpoint; (value, step)
        self.files, self.board, self.bar, self.stack = {}, None, None, contextlib.ExitStack()
        self.clock = self.clock_tokens = self.told = 0
        self.save_clock, self.signal, self.handlers = time.monotonic(), None, {}

    @property
    def saves(self):
        """Whether there are checkpoints at all."""
        return "model" in self.holds and bool(self.settings.save_every or self.settings.save_minutes)

    # -------------------------------------------------------------- begin and end

    def __enter__(self):
        if self.settings.resume:
            self._resume()
        self.checkpoints.clean()
        self._file("metrics.jsonl")
        if self.settings.tensorboard:
            # Rows of steps after the checkpoint are there already, and will come again: purge_step hides the old ones.
            folder, purge = str(self.settings.out / "tensorboard"), self.done + 1 if self.done else None
            self.board = extra("tensorboardX", "log").SummaryWriter(folder, purge_step=purge)
        self.bar = tqdm(
            total=self.total, initial=self.done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        if threading.current_thread() is threading.main_thread():  # elsewhere signals can not be heard
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells' background jobs have it
                    self.handlers[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for thing in (self.bar, self.board, self.stack):
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                if thing is not None:
                    thing.close()
        if isinstance(error, MemoryError):
            raise MemoryError(self._memory(error)) from None
        if kind is None and self.signal is not None:  # it came after the last update
            raise Stopped(self.signal, f"{signal.Signals(self.signal).name}: stopped; go on with --resume")

    def _memory(self, error):
        """What took the memory, and what to lower."""
        s, model = self.settings, self.holds.get("model")
        rows = s.micro_batch_size or getattr(s, "minibatch_size", 0) or s.batch_size
        length = getattr(s, "length", 0) or (model and model.config.max_position_embeddings)
        told = f"{error or 'none is left'}; {rows} rows"
        if model is not None:
            told += f" of up to {length:,} tokens were computed at once by a model of {model.flat.size:,} parameters"
            told += f" ({4 * model.flat.nbytes / 1e6:,.0f} MB with gradients and moments)"
        return f"{told}: take a smaller --micro-batch-size (now {rows}) or shorter rows"

    def _hear(self, number, frame):
        """The first signal ends the run after this update, the second one at once."""
        name = signal.Signals(number).name
        if self.signal is not None:
            raise Stopped(number, f"{name}: left at once")
        self.signal = number
        told = f"{name}: stopping after this update; press Ctrl-C once more to leave at once, without saving"
        print(told, file=sys.stderr, flush=True)

    # -------------------------------------------------------------- checkpoints

    def save(self):
        """A checkpoint of now. NotFinite: there is nan or inf in it; then the ones before stay as they are."""
        self._read(0)
        arrays, state = {}, {}
        for name, thing in self.holds.items():
            for key, value in thing.state_dict().items():
                if not isinstance(value, bool | int | float | str | dict | list | None):
                    arrays[f"{name}/{key}"] = value
                else:
                    state.setdefault(name, {})[key] = value
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        best = None if self.best is None else self.best[1]
        state["run"] = {name: getattr(self, name) for name in SAVED}
        state["files"] = {path.name: path.stat().st_size for path in self._rows()}
        # Random generators are made of seed and step, and an update is never saved in the middle of its micro-batches.
        state["position"] = {"seed": self.settings.seed, "step": self.done, "micro_batch": 0}
        state["settings"] = json.loads(json.dumps(dataclasses.asdict(self.settings), default=str))
        folder = self.checkpoints.save(self.done, arrays, state, self.identity, self.dress, best)
        self.saved, self.save_clock = self.done, time.monotonic()
        return folder

    def _resume(self):
        """Take up the newest checkpoint that is whole. ValueError: it belongs to something else, with the names."""
        found = self.checkpoints.newest(_loud)
        if found is None:
            print("there is no checkpoint yet: the run begins at its first update")
            self._cut({})
        else:
            self._restore(*found)
        changed = _changed(self.settings)
        for name, (was, now) in changed.items():
            print(f"another setting than before: --{name.replace('_', '-')} was {was} and is {now}")
        _write_down(self.settings, changed)

    def _restore(self, manifest, arrays):
        folder = self.checkpoints.path(manifest["step"])
        if manifest["step"] > self.total:
            told = f"{manifest['step']:,} updates, and these settings make {self.total:,}"
            raise ValueError(f"{folder} has seen {told}: go on with a larger --tokens, --epochs or --episodes")
        theirs = manifest["identity"]
        other = [name for name in self.identity | theirs if self.identity.get(name) != theirs.get(name)]
        if other:
            short = lambda value: f"{value:.12}…" if isinstance(value, str) and len(value) > 40 else value
            told = [
                f"the {name} are others"
                if name.startswith("contents")
                else f"{name} was {short(theirs.get(name))} and is {short(self.identity.get(name))}"
                for name in other
            ]
            raise ValueError(f"{folder} belongs to another run: {'; '.join(told)}")
        state = manifest["state"]
        run, files = state.get("run"), state.get("files")
        if not (isinstance(run, dict) and run.keys() == set(SAVED) and isinstance(files, dict)):
            raise ValueError(f"{folder} is no run's checkpoint: remove it to go on from the one before")
        for name, thing in self.holds.items():
            try:
                thing.load_state_dict(state.get(name, {}) | _part(arrays, name))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{folder} does not fit this run: {name}: {error}") from None
        for name in SAVED:
            setattr(self, name, run[name])
        self.done = self.saved = manifest["step"]
        self._cut(files)
        print(f"resumed after update {self.done:,} of {self.total:,}, from {folder}")

    def _cut(self, lengths):
        """Files of rows as they were at the checkpoint: what came later will come again, and a line that a kill has cut
        in two is not left in the middle."""
        for path in self._rows():
            size, length = path.stat().st_size, lengths.get(path.name, 0)
            if size < length:  # somebody else has been at it
                _loud(f"WARNING: {path} has {size:,} bytes, and had {length:,} at the checkpoint: rows are missing")
                length = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, length)

    def _stop_or_save(self):
        """After an update: a checkpoint where one is due, and the end where a signal asked for it."""
        s = self.settings
        by_steps = s.save_every and self.done and self.done % s.save_every == 0
        by_time = s.save_minutes and time.monotonic() - self.save_clock >= 60 * s.save_minutes
        if self.saves and self.saved != self.done and (by_steps or by_time or self.signal or self.done == self.total):
            self.save()
        if self.signal is not None:
            told = f"saved in {self.checkpoints.folder}: go on with --resume" if self.saves else "nothing is saved"
            name = signal.Signals(self.signal).name
            raise Stopped(self.signal, f"{name}: stopped after update {self.done:,} of {self.total:,}; {told}")

    def load_best(self):
        """With --keep-best: the weights of the best evaluation into the model; otherwise nothing."""
        if not self.settings.keep_best or self.best is None or self.best[1] == self.done:
            return
        value, step = self.best
        try:
            _, arrays = read(self.checkpoints.path(step))
        except ValueError as error:
            return _loud(f"WARNING: {error}; the model is the last one, not the best")
        self.holds["model"].load_state_dict(_part(arrays, "model"))
        told = f"{self.best_metric[0]} {short_number(value)}"
        print(f"kept: the model after update {step:,} of {self.total:,}, with {told}")

    # -------------------------------------------------------------- the loop

    def steps(self, evaluate=None, sample=None):
        """The steps from the first (with --resume, the one behind the checkpoint) to steps - 1; with what is due
        between them."""
        if self.looked is None:
            self._look(evaluate, sample)
        self._stop_or_save()
        self.clock = time.perf_counter()
        for step in range(self.done, self.total):
            self.step = step
            yield step
            self.done = step + 1
            if self.done % self.settings.log_every == 0 or self.done == self.total:
                self._close_row()
            self.bar.update()
            looks = self.done % self.settings.eval_every == 0 or self.done == self.total
            if looks or self.signal is not None:
                self._read(0)
            begin = time.perf_counter()
            if looks:
                self._look(evaluate, sample)
            self._stop_or_save()
            self.clock += time.perf_counter() - begin  # neither is part of the training speed

    @property
    def lr(self):
        """This step's learning rate."""
        return self.settings.learning_rate(self.step, self.total)

    def update(self, optimizer, metrics, tokens=0, lr=None, prefix=""):
        """Clip, update, zero the gradients, and remember the metrics for the next row; `prefix` goes before grad_norm
        and learning_rate. Where loss or gradient is not finite: NotFinite, or with on_nan="skip" no update. On a GPU
        the metrics may be arrays (), and it is told one update later, though such an update is never made."""
        norm, lr, longest = optimizer.grad_norm(), self.lr if lr is None else lr, self.settings.max_grad_norm
        loss = metrics.get("loss", 0.0)
        if device_of(norm) == "cuda":
            optimizer.step(lr, gpu_clip_scale(norm, longest, loss))
        elif _finite(norm, loss):
            optimizer.step(lr, clip_scale(norm, longest))
        optimizer.zero_grad()
        self.updated({**metrics, f"{prefix}grad_norm": norm}, tokens, lr, prefix)

    def updated(self, metrics, tokens=0, lr=None, prefix=""):
        """`update` where the update has been made: the rest of it. `metrics` has grad_norm, with its prefix."""
        self.count(tokens)
        name, numbers = f"{prefix}grad_norm", later(metrics)
        on_gpu = device_of(metrics[name]) == "cuda"
        lr = self.lr if lr is None else lr
        self.updates.append(Update(self.step, numbers, name, lr, self._batch(), self.sums))
        self._read(1 if on_gpu else 0)

    def _read(self, left):
        """The numbers of all updates but the last `left`, and the rows that waited for them."""
        while len(self.updates) > left:
            update = self.updates.pop(0)
            metrics = update.numbers()
            if _finite(metrics[update.norm], metrics.get("loss", 0)):
                learning_rate = update.norm.replace("grad_norm", "learning_rate")
                self.add({**metrics, learning_rate: update.lr}, update.sums)
            elif self.settings.on_nan == "skip":
                self.skipped += 1
            else:
                norm = metrics.pop(update.norm)
                told = "".join(f", {name} is {short_number(value)}" for name, value in metrics.items())
                raise NotFinite(
                    f"update {update.step + 1}{update.rows}: the gradient's norm is {norm}{told}; take a smaller --lr "
                    f"(now {update.lr:.1e}), or leave such updates out with --on-nan skip"
                )
        while self.rows and not any(update.sums is self.rows[0].sums for update in self.updates):
            self._log(self.rows.pop(0))

    def _batch(self):
        """Which rows the update was made of, for a person who wants to look at them."""
        last = self.holds["batches"].last if "batches" in self.holds else {}
        told = [f"{name} {', '.join(map(str, rows[:8]))}{', ...' * (len(rows) > 8)}" for name, rows in last.items()]
        return f" ({'; '.join(told)})" if told else ""

    def count(self, tokens):
        """Tokens that were computed, for the speed and the total."""
        self.tokens += int(tokens)
        self.clock_tokens += int(tokens)

    def add(self, metrics, sums=None):
        """Numbers for the next row, which gets the mean of each."""
        sums = self.sums if sums is None else sums
        for name, value in metrics.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + float(value), count + 1

    def _close_row(self):
        """What comes from now on belongs to the next row."""
        elapsed = time.perf_counter() - self.clock
        speed = round(self.clock_tokens / elapsed) if elapsed > 0 else 0
        self.rows.append(Row(self.step + 1, self.sums, self.tokens, speed))
        self.sums, self.clock, self.clock_tokens = {}, time.perf_counter(), 0
        self._read(len(self.updates))

    def _log(self, due):
        row = {name: total / count for name, (total, count) in due.sums.items()}
        row |= {"num_tokens": due.tokens, "skipped_updates": self.skipped, "tokens_per_second": due.speed}
        self.write(row, due.step)
        shown = {"loss": f"{row['loss']:.4f}"} if "loss" in row else {}
        self.bar.set_postfix({**shown, "tok/s": f"{row['tokens_per_second']:,}"}, refresh=False)
        self.last = {name: row[name] for name in ("loss", "learning_rate", "tokens_per_second") if name in row}
        looks = due.step % self.settings.eval_every == 0 or due.step == self.total  # tells these numbers, and more
        if self.bar.disable and not looks and time.perf_counter() - self.told > QUIET:
            self._tell(due.step, self.last)

    def _tell(self, step, metrics):
        total = f"{self.total:,}"
        tqdm.write("\n".join(metric_lines(f"step {step:>{len(total)},}/{total}", metrics)), file=sys.stdout)
        self.told = time.perf_counter()

    def _look(self, evaluate, sample):
        """Evaluate, write and print; keep what is best."""
        found = evaluate() if evaluate else {}
        if found:
            self.write(found, self.done)
        self._tell(self.done, self.last | found)
        pairs = sample() if sample and self.settings.samples else []
        if pairs:
            self.append(
                "samples.jsonl",
                [{"step": self.done, "prompt": prompt, "completion": completion} for prompt, completion in pairs],
            )
            tqdm.write("\n".join(sample_table(pairs)), file=sys.stdout)
        sys.stdout.flush()
        self.looked = self.done
        metric, sign = self.best_metric or (None, 1)
        value = found.get(metric)
        known = self.settings.keep_best and value is not None and math.isfinite(value)
        if known and (self.best is None or sign * value >= sign * self.best[0]):  # the latest of equals
            self.best = [float(value), self.done]
            self.save()

    def write(self, metrics, step):
        """A row of metrics.jsonl (and of TensorBoard)."""
        row = {"step": step, **{name: _number(value) for name, value in metrics.items()}}
        self.append("metrics.jsonl", [row])
        if self.board:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, step)

    def append(self, name, rows):
        """JSON rows to a file in the run's folder. OSError: the disk is full, with the path and the bytes."""
        file, text = self._file(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            told = f"{error.strerror}, with {len(text):,} bytes to write"
            if self.saved is not None:
                told += f"; the run can be resumed after update {self.saved:,}"
            raise OSError(error.errno, told, str(file.name)) from None

    def _rows(self):
        """The files of rows in the run's folder, whoever of the runs that were one has written them."""
        return sorted(self.settings.out.glob("*.jsonl"))

    def _file(self, name):
        if name not in self.files:
            self.files[name] = self.stack.enter_context(io.BufferedWriter(io.FileIO(self.settings.out / name, "ab")))
        return self.files[name]


# ------------------------------------------------------------------ what a person reads


def _part(arrays, name):
    """Those of the arrays "NAME/PART", as {PART: array}."""
    return {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}


def _finite(*numbers):
    return all(map(math.isfinite, numbers))


def _loud(line):
    """A line that is not overlooked."""
    print(line, file=sys.stderr, flush=True)


def _number(value):
    """A number for JSON, which has no nan and no inf: null."""
    if isinstance(value, int | np.integer):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def short_number(value):
    """A number as a person wants to read it, in some eight signs: 12,345, 0.1234, 1.2e-05."""
    value = _number(value)
    if value is None or isinstance(value, int):
        return "nan" if value is None else f"{value:,}"
    size = abs(value)
    if value and (size < 1e-2 or size >= 1e7):
        return f"{value:.1e}"
    return f"{value:.4f}" if size < 100 else f"{value:,.1f}"


def metric_lines(begin, metrics, width=WIDTH):
    """`begin` and all numbers with their names, in lines of at most `width` signs. Names keep their columns from one
    evaluation to the next, because numbers are as wide as the widest."""
    scientific = lambda name: name.endswith("learning_rate")
    told = [f"{k} {f'{x:.1e}' if scientific(k) else short_number(x):>8}" for k, x in metrics.items()]
    lines = [begin]
    for part in told:
        if len(lines[-1]) + 2 + len(part) > width:
            lines.append(" " * len(begin))
        lines[-1] += "  " + part
    return lines


def sample_table(pairs, width=WIDTH):
    """(prompt, completion) pairs as lines of text, one each; a prompt shows its end, a completion its beginning."""
    pairs = [[_printable(text) for text in pair] for pair in pairs]
    left = min(40, max(len(prompt) for prompt, _ in pairs))
    for prompt, completion in pairs:
        prompt = prompt if len(prompt) <= left else "…" + prompt[len(prompt) - left + 1 :]
        line = f"    {prompt:<{left}}{' ' * bool(left)}| {completion}"
        yield line if len(line) <= width else line[: width - 1] + "…"


def _printable(text):
    """`text` in one line, without what could move a terminal's cursor: a young model writes any bytes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
