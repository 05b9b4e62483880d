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

from .kernels.device import to_host, upcast

try:
    import fcntl
except ImportError:  # Windows has no such locks: there a second run in one folder goes unnoticed
    fcntl = None

FORMAT = 1
MANIFEST, ARRAYS, WEIGHTS = "manifest.json", "training.safetensors", "model.safetensors"
LATEST, LOCK = "latest", ".lock"
NAME = re.compile(r"step-(\d{8,})")
HIDDEN = (".saving-", ".replaced-", ".removed-")  # beginnings of the names of what a kill may have left behind
DEEPEST = 100  # of lists and objects in each other, in a state: far below what reading it would need of Python's stack
LARGEST = 10_000  # bits of a whole number in a state: Python reads no more than 4,300 digits, some 14,000 bits


class NotFinite(ValueError):
    """A loss, a gradient or a weight is nan or infinite."""


# ------------------------------------------------------------------ files that are whole or not there


def sync(path):
    """Bring a file, or what a folder says about its files, to the disk. Windows can not open a folder, and needs no
    such thing."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows syncs what may be written
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def replace_text(path, text):
    """Write a text file; a kill leaves the old one or the new one, and nothing between."""
    new, data = path.with_name(HIDDEN[0] + path.name), text.encode()
    try:
        new.write_bytes(data)
        sync(new)
        new.replace(path)
        sync(path.parent)
    except OSError as error:
        delete(new)
        raise OSError(error.errno, f"{error.strerror}, with {len(data):,} bytes to write", str(path)) from None


def write_json(path, value):
    """Write `value` as JSON, paths in it as strings, in one piece (`replace_text`)."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def save_arrays(arrays, path, metadata=None):
    """Write {name: array}, contiguous ones, as safetensors. OSError: the disk is full, with the path and the bytes, as
    for every other file. ValueError: a dtype that safetensors has not."""
    try:
        safetensors.numpy.save_file(arrays, path, metadata)
    except SafetensorError as error:  # it tells the number of the system's error in its text alone
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise ValueError(f"{path} can not be written: {error}") from None
        size = sum(array.nbytes for array in arrays.values())
        told = f"{os.strerror(int(found[1]))}, with {size:,} bytes to write"
        raise OSError(int(found[1]), told, str(path)) from None


def delete(path):
    """Remove a file, a link or a folder and all in it, as far as that can be done; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# ------------------------------------------------------------------ one checkpoint


def write(folder, step, arrays, state, identity, dress=None):
    """Write the checkpoint `folder`, whose name ends in the step, in place of another one of that name.

    arrays    {"NAME/PART": array}, float32 and the like
    state     what else the run needs to go on, for JSON
    identity  {name: JSON value}: what the state belongs to, architecture, tokenizer, data
    dress     function(folder): writes a model folder there, whose model.safetensors holds the arrays "model/PART" under
              the names PART; without it, they are in training.safetensors like the others

    NotFinite: an array holds nan or inf; ValueError: JSON would give back another state; in both cases nothing is
    written. ValueError: safetensors has no such dtype. OSError: the disk is full, with the path and the bytes. The
    checkpoints that were there are untouched.
    """
    for name, value in {"state": state, "identity": identity}.items():
        _check_json(f"{folder}: {name}", value)
    host = {name: np.asarray(to_host(array), order="C") for name, array in arrays.items()}
    for name, array in ((name, upcast(array)) for name, array in host.items()):  # bfloat16's kind is no float's
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            raise NotFinite(f"{name} is not finite after update {step}: it is not saved, and {folder.parent} is kept")
    new = folder.with_name(HIDDEN[0] + folder.name)
    delete(new)
    try:
        with _room_for(folder, sum(array.nbytes for array in host.values())):
            new.mkdir(parents=True)
            elsewhere = [name for name in host if dress is not None and name.startswith("model/")]
            save_arrays({name: host[name] for name in host if name not in elsewhere}, new / ARRAYS)
            if dress is not None:
                dress(new)
            files = {}
            for path in sorted(path for path in new.rglob("*") if path.is_file()):
                sync(path)
                files[path.relative_to(new).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            manifest = {"format": FORMAT, "step": step, "state": state, "identity": identity, "files": files}
            (new / MANIFEST).write_bytes(_sealed(manifest))
            sync(new / MANIFEST)
            for inner in {path.parent for path in new.rglob("*")}:
                sync(inner)
            _take_name(new, folder)
    finally:
        delete(new)


def _check_json(place, value, depth=DEEPEST):
    """ValueError with the place: JSON has no such value, or would make another one of it. A tuple may become a list."""
    wrong = None
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            wrong = f"has the key {odd[0]!r}"
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    else:
        inside = ()
        if not isinstance(value, str | int | float | None):  # bool is an int, and NumPy's float64 a float
            wrong = f"is of {type(value)}"
        elif isinstance(value, int) and value.bit_length() > LARGEST:
            wrong = f"is a number of {value.bit_length():,} bits"
    if depth == 0:
        wrong = f"is more than {DEEPEST} lists or objects deep"
    if wrong:
        raise ValueError(f"{place:.300} {wrong}, which JSON can not hold: nothing is saved")
    for name, item in inside:
        _check_json(f"{place}/{name}", item, depth - 1)


@contextlib.contextmanager
def _room_for(folder, size):
    """OSErrors of writing as one that names the checkpoint and the bytes."""
    try:
        yield
    except OSError as error:
        told = error.strerror or str(error)
        with contextlib.suppress(OSError):
            told += f" ({shutil.disk_usage(folder.parent).free:,} bytes are free, and its arrays are {size:,})"
        told += "; the checkpoints before it are untouched"
        raise OSError(error.errno or errno.EIO, told, str(folder)) from None


def _take_name(new, folder):
    """`new` becomes `folder`, in place of one that is there: a checkpoint which was damaged, and is made again."""
    if not os.path.lexists(folder):
        new.rename(folder)
        return sync(folder.parent)
    old = folder.with_name(HIDDEN[1] + folder.name)
    delete(old)
    (folder.parent / LATEST).unlink(missing_ok=True)  # it may name the one that goes now
    folder.rename(old)
    new.rename(folder)  # after a kill between these two, Checkpoints.put_back takes the old one
    sync(folder.parent)
    delete(old)


def _sealed(manifest):
    """The bytes of a manifest and of its own SHA-256. There is one way to write it, so that every bit counts."""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest}
    return (json.dumps(sealed, indent=1) + "\n").encode()


def read_manifest(folder):
    """The manifest of a checkpoint. ValueError with the file's name: it is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    with _reading(path):
        data = path.read_bytes()
    try:
        manifest = json.loads(data)["manifest"]
        # Written again it has to be the same bytes, which holds for what has no meaning in JSON, too: a space, a comma.
        whole = isinstance(manifest, dict) and _sealed(manifest) == data
    except (ValueError, KeyError, TypeError, RecursionError):  # no UTF-8, no JSON, another JSON
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {manifest.get('format')!r}, and this version reads {FORMAT}")
    # A hash that fits says that nothing was changed by chance, and not who wrote it.
    files = manifest.get("files")
    right = isinstance(manifest.get("step"), int) and isinstance(files, dict) and ARRAYS in files
    right = right and all(isinstance(manifest.get(name), dict) for name in ("state", "identity"))
    if not right or not all(isinstance(told, dict) and told.keys() == {"bytes", "sha256"} for told in files.values()):
        raise ValueError(f"{path} is not the manifest of a checkpoint")
    for name in files:
        if not _inside(path.parent, name):
            raise ValueError(f"{path} names {name!r}, which is no file in its folder")
    return manifest


def _inside(folder, name):
    """Whether a manifest's name is that of a file in the folder itself: no way up, no root, no link."""
    try:
        return os.path.realpath(folder / name) == os.path.join(os.path.realpath(folder), *name.split("/"))
    except ValueError:  # no file can have such a name
        return False


def read(folder):
    """(manifest, arrays) of a checkpoint, all of whose files are as they were written. ValueError with the file's name:
    one is missing, shorter or longer, or damaged."""
    folder, manifest = Path(folder), read_manifest(folder)
    for name, written in manifest["files"].items():
        path = folder / name
        with _reading(path):
            size, found = path.stat().st_size, sha256(path)
        if size != written["bytes"]:
            raise ValueError(f"{path} has {size:,} bytes, and was written with {written['bytes']:,}")
        if found != written["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    arrays = _arrays(folder / ARRAYS)
    if WEIGHTS in manifest["files"]:
        arrays |= {f"model/{name}": array for name, array in _arrays(folder / WEIGHTS).items()}
    if _sealed(read_manifest(folder)) != _sealed(manifest):  # as text, because nan is not equal to nan
        raise ValueError(f"{folder} was replaced while it was read")
    return manifest, arrays


@contextlib.contextmanager
def _reading(path):
    """ValueError where a file is missing, even since a moment ago, or where the disk can not read it. Other OSErrors,
    of permissions and the like, say nothing about the checkpoint, and stay what they are."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        yield
    except OSError as error:
        # The number alone would not do: safetensors' error has none.
        if isinstance(error, FileNotFoundError) or error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise ValueError(f"{path} is missing: the checkpoint is not whole") from None
        if error.errno == errno.EIO:
            raise ValueError(f"{path} can not be read: {error.strerror}") from None
        raise


def _arrays(path):
    """{name: array} of a safetensors file. ValueError with its name: it is none, or NumPy has no such dtype."""
    try:
        with _reading(path):
            return safetensors.numpy.load_file(path)
    except (SafetensorError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} can not be read as arrays: {error}") from None


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ the checkpoints of a run


class Checkpoints:
    """The checkpoints in a folder: `save`, `newest`, and the rotation between them.

    keep  how many of the newest ones stay, at least 1; the best one stays besides, where there is a best
    """

    def __init__(self, folder, keep=2):
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint has to be kept, and keep is {keep}")
        self.folder, self.keep = Path(folder), keep

    def path(self, step):
        """The folder of the checkpoint after `step` updates."""
        return self.folder / f"step-{step:08}"

    def steps(self):
        """The steps that there are checkpoints of, in order; damaged ones are among them."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        steps = {int(match[1]): path for path in found if (match := NAME.fullmatch(path.name)) and path.is_dir()}
        return sorted(step for step, path in steps.items() if path == self.path(step))  # not step-000000003

    def put_back(self):
        """Give back its name to a checkpoint that was being replaced, where a kill came before the new one had it."""
        for path in self.folder.glob(HIDDEN[1] + "*"):
            folder = path.with_name(path.name.removeprefix(HIDDEN[1]))
            if not os.path.lexists(folder):
                path.rename(folder)
                sync(self.folder)

    def clean(self):
        """Remove what a save or a removal that was killed has left behind."""
        self.put_back()
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith(HIDDEN):
                delete(path)

    def save(self, step, arrays, state, identity, dress=None, best=None):
        """Write a checkpoint (see `write`), then `latest`, then remove those that are no more kept; `best` is the step
        of one that stays. Returns its folder."""
        folder = self.path(step)
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
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
        delete(gone)
        self.path(step).rename(gone)
        sync(self.folder)  # a power failure must not undo this after the files below are gone
        delete(gone)

    def newest(self, say=print):
        """(manifest, arrays) of the newest checkpoint that is whole, None where there is none at all; for the process
        that has the lock. What is wrong with newer ones is told. ValueError: there are some, and not one is whole."""
        self.put_back()
        steps = self.steps()
        if steps:
            self._check_latest(steps, say)
        for step in reversed(steps):
            try:
                manifest, arrays = read(self.path(step))
                if manifest["step"] != step:
                    raise ValueError(f"{self.path(step) / MANIFEST} is that of update {manifest['step']:,}")
                return manifest, arrays
            except ValueError as error:
                wrong = error
                say(f"WARNING: {error}; going back to the checkpoint before it")
        if steps:
            raise ValueError(f"no checkpoint in {self.folder} is whole ({wrong}): begin again, without --resume")
        return None

    def _check_latest(self, steps, say):
        """`latest` may be missing or one checkpoint behind, after a kill between two renames; else it was changed."""
        path, fitting = self.folder / LATEST, []
        for step in steps:
            with contextlib.suppress(OSError):  # `read` will tell what is the matter with it
                fitting.append(_latest(self.path(step)).encode())
        if not path.is_file():
            say(f"WARNING: {path} is missing; taking the newest checkpoint that is whole")
        elif path.read_bytes() not in fitting:
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
    path, me = folder / LOCK, {"pid": os.getpid(), "host": socket.gethostname()}
    handle, mine = None, False
    try:
        handle = _open_lock(path)
        there = _holder(handle)
        if there.get("host", me["host"]) != me["host"]:
            raise ValueError(
                f"{folder} is in use by process {there.get('pid')} on {there['host']}: if that has ended, delete {path}"
            )
        mine, data = True, json.dumps(me).encode()
        try:
            os.truncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, data)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, with {len(data)} bytes to write", str(path)) from None
        yield
    finally:
        if mine:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is locked: who waits for this file will see that it is no more the folder's
        if handle is not None:
            os.close(handle)
        for empty in made:  # an error at the start leaves nothing behind
            with contextlib.suppress(OSError):
                empty.rmdir()


def _open_lock(path):
    """An open file that has the lock, in a folder that is made for it. ValueError: somebody else has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # not through a link: what that leads to would be overwritten
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:
            if path.parent.is_dir():  # /proc has folders in which no file can be
                raise
            continue  # whoever had it before has removed the empty folder
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except OSError as error:
            there = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(error.errno, f"it can not be locked: {error.strerror}", str(path)) from None
            who = f"process {there['pid']} on {there['host']}" if {"pid", "host"} <= there.keys() else "another process"
            raise ValueError(f"{path.parent} is in use by {who}: wait for it, or take another --out") from None
        os.close(handle)  # it was removed by who had it, between our opening and locking it


def _holder(handle):
    """What a lock file says about who has it, {} where it says nothing."""
    os.lseek(handle, 0, os.SEEK_SET)  # os.pread and os.pwrite are not on Windows
    try:
        found = json.loads(os.read(handle, 1000))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
