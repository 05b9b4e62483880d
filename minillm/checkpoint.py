"""
Checkpoints: the whole state of a run on disk, such that a kill, a full disk or a flipped bit never costs more than the
updates since the last one.

    OUT/checkpoints/step-00000200/      manifest.json   format, step, state, identity, size and SHA-256 of every file
                                        training.safetensors    moments, and models that are not in a file of their own
                                        config.json, model.safetensors, tokenizer.json, ...: a model folder like OUT
    OUT/checkpoints/step-00000400/
    OUT/checkpoints/latest              the newest one's manifest and its SHA-256: sha256sum -c latest

A checkpoint is written under a temporary name, every file is brought to the disk (fsync), the manifest last; then the
folder gets its name, and the folder around it is brought to the disk, too. So a folder with a name is a whole one
whatever moment the machine stops at, and what `latest` names is always there. The manifest holds the SHA-256 of each
file and of itself: a flipped bit is found before anything is used, and `newest` goes back to the checkpoint before.

safetensors and JSON alone: reading a checkpoint can not run code.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from .kernels.device import to_host

try:
    import fcntl
except ImportError:  # Windows has no such locks: there a second run in one folder goes unnoticed
    fcntl = None

FORMAT = 1
MANIFEST, ARRAYS, WEIGHTS = "manifest.json", "training.safetensors", "model.safetensors"
LATEST, LOCK = "latest", ".lock"
NAME = re.compile(r"step-(\d{8,})")
HIDDEN = (".saving-", ".replaced-", ".removed-")  # beginnings of the names of what a kill may have left behind


class NotFinite(ValueError):
    """A loss, a gradient or a weight is nan or infinite."""


# ------------------------------------------------------------------ files that are whole or not there


def sync(path):
    """Bring a file, or what a folder says about its files, to the disk. Windows can not open a folder, and needs no
    such thing."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path, text):
    """Write a text file; a kill leaves the old one or the new one, and nothing between."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        sync(new)
        new.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise OSError(error.errno, f"{error.strerror}, with {len(text):,} bytes to write", str(path)) from None


def write_json(path, value):
    """Write `value` as JSON, paths in it as strings, in one piece (`replace_text`)."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


# ------------------------------------------------------------------ one checkpoint


def write(folder, step, arrays, state, identity, dress=None):
    """Write the checkpoint `folder`, whose name ends in the step, in place of another one of that name.

    arrays    {"NAME/PART": array}, float32 and the like
    state     what else the run needs to go on, for JSON
    identity  {name: JSON value}: what the state belongs to, architecture, tokenizer, data
    dress     function(folder): writes a model folder there, whose model.safetensors holds the arrays "model/PART" under
              the names PART; without it, they are in training.safetensors like the others

    NotFinite: an array holds nan or inf; then nothing is written. OSError: the disk is full, with the path and the
    bytes; the checkpoints that were there are untouched.
    """
    host = {name: np.ascontiguousarray(to_host(array)) for name, array in arrays.items()}
    for name, array in host.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotFinite(f"{name} is not finite after update {step}: it is not saved, and {folder.parent} is kept")
    new = folder.with_name(HIDDEN[0] + folder.name)
    shutil.rmtree(new, ignore_errors=True)
    try:
        with _room_for(folder, sum(array.nbytes for array in host.values())):
            new.mkdir(parents=True)
            elsewhere = [name for name in host if dress is not None and name.startswith("model/")]
            safetensors.numpy.save_file({name: host[name] for name in host if name not in elsewhere}, new / ARRAYS)
            if dress is not None:
                dress(new)
            files = {}
            for path in sorted(path for path in new.rglob("*") if path.is_file()):
                sync(path)
                files[path.relative_to(new).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            manifest = {"format": FORMAT, "step": step, "state": state, "identity": identity, "files": files}
            (new / MANIFEST).write_text(_sealed(manifest), encoding="utf-8")
            sync(new / MANIFEST)
            for inner in {path.parent for path in new.rglob("*")}:
                sync(inner)
            _take_name(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _room_for(folder, size):
    """OSErrors of writing, safetensors' as well, as one that names the checkpoint and the bytes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, told = getattr(error, "errno", None), getattr(error, "strerror", None)
        if code is None:  # safetensors tells the number of the system's error in its text
            found = re.search(r"os error (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            told = os.strerror(code) if found else str(error)
        with contextlib.suppress(OSError):
            told += f" ({shutil.disk_usage(folder.parent).free:,} bytes are free, and its arrays are {size:,})"
        raise OSError(code, f"{told}; the checkpoints before it are untouched", str(folder)) from None


def _take_name(new, folder):
    """`new` becomes `folder`, in place of one that is there: a checkpoint which was damaged, and is made again."""
    if folder.exists():
        old = folder.with_name(HIDDEN[1] + folder.name)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(folder)
    sync(folder.parent)


def _sealed(manifest):
    """The text of a manifest and of its own SHA-256. There is one way to write it, so that every bit counts."""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest}, indent=1) + "\n"


def read_manifest(folder):
    """The manifest of a checkpoint. ValueError with the file's name: it is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)["manifest"]
        # Written again it has to be the same text, which holds for what is not JSON's meaning, too: a space, a comma.
        whole = isinstance(manifest, dict) and _sealed(manifest) == text
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: this is no whole checkpoint") from None
    except (ValueError, KeyError, TypeError, RecursionError):  # no UTF-8, no JSON, another JSON
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format is {manifest['format']!r}, and this version reads {FORMAT}")
    return manifest


def read(folder):
    """(manifest, arrays) of a checkpoint, all of whose files are as they were written. ValueError with the file's name:
    one is missing, shorter or longer, or damaged."""
    folder, manifest = Path(folder), read_manifest(folder)
    for name, written in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is not whole")
        if (size := path.stat().st_size) != written["bytes"]:
            raise ValueError(f"{path} has {size:,} bytes, and was written with {written['bytes']:,}")
        if sha256(path) != written["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    arrays = safetensors.numpy.load_file(folder / ARRAYS)
    if WEIGHTS in manifest["files"]:
        arrays |= {f"model/{name}": array for name, array in safetensors.numpy.load_file(folder / WEIGHTS).items()}
    return manifest, arrays


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ the checkpoints of a run


class Checkpoints:
    """The checkpoints in a folder: `save`, `newest`, and the rotation between them.

    keep  how many of the newest ones stay; the best one stays besides, where there is a best
    """

    def __init__(self, folder, keep=2):
        self.folder, self.keep = Path(folder), keep

    def path(self, step):
        """The folder of the checkpoint after `step` updates."""
        return self.folder / f"step-{step:08}"

    def steps(self):
        """The steps that there are checkpoints of, in order; damaged ones are among them."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(match[1]) for path in found if (match := NAME.fullmatch(path.name)) and path.is_dir())

    def clean(self):
        """Remove what a save or a removal that was killed has left behind."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith(HIDDEN):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step, arrays, state, identity, dress=None, best=None):
        """Write a checkpoint (see `write`), then `latest`, then remove those that are no more kept; `best` is the step
        of one that stays. Returns its folder."""
        folder = self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        write(folder, step, arrays, state, identity, dress)
        replace_text(self.folder / LATEST, _latest(folder))
        before = [there for there in self.steps() if there <= step]
        # Those of later steps are of a run that went back to an earlier one: what follows is made again.
        for old in self.steps():
            if old not in (*before[-self.keep :], best):
                self.remove(old)
        return folder

    def remove(self, step):
        """Remove a checkpoint; a kill in the middle leaves no half of it under its name."""
        gone = self.path(step).with_name(HIDDEN[2] + self.path(step).name)
        shutil.rmtree(gone, ignore_errors=True)
        self.path(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def newest(self, say=print):
        """(manifest, arrays) of the newest checkpoint that is whole, None where there is none at all. What is wrong
        with newer ones is told. ValueError: there are some, and not one is whole."""
        steps = self.steps()
        if steps:
            self._check_latest(steps, say)
        for step in reversed(steps):
            try:
                return read(self.path(step))
            except ValueError as error:
                wrong = error
                say(f"WARNING: {error}; going back to the checkpoint before it")
        if steps:
            raise ValueError(f"no checkpoint in {self.folder} is whole ({wrong}): begin again, without --resume")
        return None

    def _check_latest(self, steps, say):
        """`latest` may be missing or one checkpoint behind, after a kill between two renames; else it was changed."""
        path = self.folder / LATEST
        lines = [_latest(self.path(step)) for step in steps if (self.path(step) / MANIFEST).is_file()]
        if path.is_file() and path.read_bytes() not in [line.encode() for line in lines]:
            say(f"WARNING: {path} does not fit the checkpoints beside it; taking the newest one that is whole")


def _latest(folder):
    """The text of `latest`, which sha256sum can check."""
    return f"{sha256(folder / MANIFEST)}  {folder.name}/{MANIFEST}\n"


# ------------------------------------------------------------------ one run in a folder


@contextlib.contextmanager
def locked(folder):
    """Make `folder` and hold it for this process alone, until the block ends.

    The lock is the system's (flock), which goes with the process however it ends, so a stale one holds nobody up; the
    file tells who has it. ValueError: another process has it, perhaps on another machine that shares the folder (whose
    lock can not be seen here, only that it was not given back), or `folder` is a file. OSError: it can not be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and has to be a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / LOCK, {"pid": os.getpid(), "host": socket.gethostname()}
    handle = None
    try:
        handle = _open_lock(path)
        there = _holder(handle)
        if there.get("host", me["host"]) != me["host"]:
            raise ValueError(
                f"{folder} is in use by process {there.get('pid')} on {there['host']}: if that has ended, delete {path}"
            )
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is locked: who waits for this file will see that it is no more the folder's
    finally:
        if handle is not None:
            os.close(handle)
        for empty in made:  # an error at the start leaves nothing behind
            with contextlib.suppress(OSError):
                empty.rmdir()


def _open_lock(path):
    """An open file that has the lock. ValueError: somebody else has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except OSError as error:
            there = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            who = f"process {there['pid']} on {there['host']}" if {"pid", "host"} <= there.keys() else "another process"
            raise ValueError(f"{path.parent} is in use by {who}: wait for it, or take another --out") from None
        os.close(handle)  # it was removed by who had it, between our opening and locking it


def _holder(handle):
    """What a lock file says about who has it, {} where it says nothing."""
    try:
        found = json.loads(os.pread(handle, 1000, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
