"""minillm.checkpoint: a folder under its name is always whole, whatever is killed, full, damaged or forged."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minillm import checkpoint
from minillm.checkpoint import ARRAYS, LATEST, LOCK, MANIFEST, Checkpoints, NotFinite, locked, read, read_manifest
from minillm.hub import save_pretrained
from minillm.lora import adapt, save_adapter
from minillm.model import Config, build
from minillm.trainers.run import Run
from tests import saver
from tests.saver import arrays_of, check, save, state_of

ROOT = Path(__file__).parents[1]
FILES = ("config.json", MANIFEST, "model.safetensors", "tokenizer.json", ARRAYS)


def silent(line):
    pass


def start(*arguments, **options):
    """A process of tests/saver.py."""
    command = [sys.executable, "-m", "tests.saver", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **{"stdout": subprocess.PIPE} | options)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def sha256sum_accepts(folder):
    """Whether `latest` is what `sha256sum -c latest` accepts: a hash, two spaces, a path beside it."""
    match = re.fullmatch(rb"([0-9a-f]{64})  (step-\d{8,}/manifest\.json)\n", (folder / LATEST).read_bytes())
    return match[1].decode() == hashlib.sha256((folder / match[2].decode()).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, to be copied, not changed."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    for step in (1, 2):
        save(Checkpoints(folder), step)
    return folder


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """For speed: what is asked for is a test of its own, and the processes of saver.py do it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def copy(two, tmp_path):
    """Checkpoints in a copy of `two`."""
    return Checkpoints(shutil.copytree(two, tmp_path / "checkpoints"))


# ------------------------------------------------------------------ killed


def kill_and_look(folder, kills):
    """Processes save one after the other in a folder, each is killed at a random moment, and nothing is ever lost."""
    rng, last = random.Random(0), None
    for kill in range(kills):
        keep = 1 + kill % 2
        process = start("save", folder, kill, keep)
        told = [process.stdout.readline()]
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
        assert process.wait() == -signal.SIGKILL and told[0].startswith("begin")
        told = [line.split() for line in told if line.endswith("\n")]
        begun, done = ([(int(s), int(v)) for word, s, v in told if word == which] for which in ("begin", "done"))
        checkpoints = Checkpoints(folder, keep)
        found = checkpoints.newest(silent)
        # What was reported as saved is there, or what came after it.
        allowed = {done[-1] if done else last, *begun[-1:]}
        last = check(found) if found else None
        assert last in allowed
        checkpoints.clean()
        assert all(re.fullmatch(r"step-\d{8}|latest", name) for name in names(folder))
        for step in checkpoints.steps():
            assert check(read(checkpoints.path(step)))[0] == step
        assert not (folder / LATEST).exists() or sha256sum_accepts(folder)
    assert last is not None


def test_killed_at_random_moments(tmp_path):
    kill_and_look(tmp_path / "checkpoints", 4)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    kill_and_look(tmp_path / "checkpoints", 50)


def test_latest_is_accepted_by_sha256sum(two):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    subprocess.run(["sha256sum", "--strict", "-c", LATEST], cwd=two, check=True, capture_output=True)


class Crash(BaseException):
    """The machine stops: nothing catches it, and no operation after it has an effect."""


@contextlib.contextmanager
def interrupted(monkeypatch, at, stop):
    """The operations on files are counted, and stop(number, at) raises at or after one of them. A file that is being
    written has its first half on the disk then. Yields the list of what was done."""
    done = []

    def before(name, path=None):
        done.append(name)
        stop(len(done), at, path)

    def counted(owner, name):
        original = getattr(owner, name)

        def operation(*arguments, **options):
            before(name, arguments[0])
            return original(*arguments, **options)

        patch.setattr(owner, name, operation)

    def torn(owner, name, which):
        original = getattr(owner, name)

        def operation(*arguments, **options):
            path = arguments[which]
            before(f"{name} {path.name}")
            result = original(*arguments, **options)
            try:
                before(f"{name} {path.name}, the second half")
            except BaseException:
                truncate(path, path.stat().st_size // 2)
                raise
            return result

        patch.setattr(owner, name, operation)

    truncate = os.truncate
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate"):
            counted(os, name)
        torn(safetensors.numpy, "save_file", 1)
        torn(Path, "write_text", 0)
        torn(Path, "write_bytes", 0)
        yield done


# What is saved while the machine stops, over the checkpoints of steps 1 and 2: (step, version, keep, best).
SAVES = {
    "the next": (3, 0, 2, None),
    "the next, keep 1": (3, 0, 1, None),
    "the next, with a best": (3, 0, 1, 1),
    "the same step again": (2, 1, 2, None),
    "the same step again, alone": (2, 1, 1, None),
    "an earlier step again": (1, 1, 2, None),
}


def look_after(checkpoints, allowed):
    """After a crash or an error: newest() is one of the allowed, and everything goes on."""
    assert check(checkpoints.newest(silent)) in allowed
    checkpoints.clean()
    assert all(re.fullmatch(r"step-\d{8}|latest", name) for name in names(checkpoints.folder))
    assert not (checkpoints.folder / LATEST).exists() or sha256sum_accepts(checkpoints.folder)
    assert {check(read(checkpoints.path(step))) for step in checkpoints.steps()} & allowed
    save(checkpoints, 4)
    assert check(checkpoints.newest(pytest.fail)) == (4, 0) and sha256sum_accepts(checkpoints.folder)


@pytest.mark.parametrize("which", SAVES)
def test_a_crash_at_every_operation_leaves_the_old_or_the_new_one(two, tmp_path, monkeypatch, which):
    step, version, keep, best = SAVES[which]

    def stop(number, at, path):
        if number >= at:
            raise Crash

    for at in itertools.count(1):
        checkpoints = Checkpoints(shutil.copytree(two, tmp_path / str(at)), keep)
        with contextlib.suppress(Crash), interrupted(monkeypatch, at, stop) as done:
            save(checkpoints, step, version, best)
        look_after(checkpoints, {(2, 0), (step, version)})
        shutil.rmtree(tmp_path / str(at))
        if len(done) < at:
            break
    assert at > 30  # the whole save was taken apart


@pytest.mark.parametrize("which", ["the next, keep 1", "the same step again", "an earlier step again"])
def test_an_error_at_every_operation_leaves_the_old_or_the_new_one(two, tmp_path, monkeypatch, which):
    step, version, keep, best = SAVES[which]

    def stop(number, at, path):
        if number == at:
            raise OSError(errno.EIO, "Input/output error", *([path] if isinstance(path, str | Path) else []))

    for at in itertools.count(1):
        checkpoints, failed = Checkpoints(shutil.copytree(two, tmp_path / str(at)), keep), False
        with interrupted(monkeypatch, at, stop) as done:
            try:
                save(checkpoints, step, version, best)
            except OSError as error:
                assert str(tmp_path) in str(error.filename) and "\n" not in str(error)
                failed = True
        look_after(checkpoints, {(2, 0), (step, version)} if failed else {(step, version)})
        shutil.rmtree(tmp_path / str(at))
        if len(done) < at:
            break


def test_everything_is_on_the_disk_before_a_name_is_given_or_taken(copy, monkeypatch):
    """A power failure keeps what was synchronized, and the rest in any order: every file and folder is, before the
    rename that shows it; the folder around it is, before anything that it replaces is deleted."""
    log, originals = [], {name: getattr(os, name) for name in ("fsync", "rename", "unlink")}

    def fsync(handle):
        log.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        originals["fsync"](handle)

    def rename(old, new):
        inside = [str(path) for path in (Path(old), *Path(old).rglob("*"))]
        originals["rename"](old, new)
        log.append(("rename", str(old), str(new), inside))

    def unlink(path, **options):
        originals["unlink"](path, **options)
        log.append(("unlink", str(path)))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("without /proc the names of open files are not known")
    for name, spy in {"fsync": fsync, "rename": rename, "unlink": unlink}.items():
        monkeypatch.setattr(os, name, spy)
    save(copy, 2, 1)  # replaced
    save(copy, 3)  # step 1 goes
    around, seen = str(copy.folder), set()
    shown = [event for event in log if event[0] == "rename" and Path(event[2]).name.startswith("step-")]
    assert len(shown) == 2
    for event in log:
        if event[0] == "fsync":
            seen.add(event[1])
        elif event[0] == "rename":
            if event in shown:
                assert seen >= set(event[3])
            seen.discard(around)
        elif Path(event[1]).name != LATEST:
            assert around in seen, f"{event[1]} is deleted before the disk knows the names"
    assert log[-1][0] == "unlink" or around in seen


# ------------------------------------------------------------------ a full disk


@contextlib.contextmanager
def room(size):
    """No file can grow beyond `size` bytes: the system refuses the write, in Python as in safetensors' Rust."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def boundaries(path):
    """The places in a file where a write can end: {name: bytes that still fit}."""
    size = path.stat().st_size
    places = {"first byte": 0, "second byte": 1, "middle": size // 2, "last byte": size - 1}
    if path.suffix == ".safetensors":
        header = int.from_bytes(path.read_bytes()[:8], "little")
        places |= {"header's length": 4, "header": 8 + header // 2, "header's end": 7 + header, "data": 8 + header}
        for name, (begin, end) in regions(path).items():
            places |= {f"middle of {name}": (begin + end) // 2} if end > begin else {}
    return places


def regions(path):
    """{array: (first byte, byte behind the last)} of a safetensors file."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    return {name: tuple(begin + at for at in told["data_offsets"]) for name, told in header.items()}


@pytest.mark.parametrize("name", [*FILES, LATEST])
def test_a_full_disk_at_every_boundary_of_every_file(copy, monkeypatch, capsys, name):
    run = runpy.run_path(str(ROOT / "scripts" / "command_line.py"))["run"]
    measured = copy.folder / LATEST if name == LATEST else copy.path(2) / name
    step = 2
    for place, size in boundaries(measured).items():

        def limited(original, which, size=size):
            def writes(*arguments, **options):
                # Temporary names have the file's own in them.
                with room(size) if name in arguments[which].name else contextlib.nullcontext():
                    return original(*arguments, **options)

            return writes

        before = {path: path.read_bytes() for path in copy.path(step).iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.numpy, "save_file", limited(safetensors.numpy.save_file, 1))
            patch.setattr(Path, "write_text", limited(Path.write_text, 0))
            patch.setattr(Path, "write_bytes", limited(Path.write_bytes, 0))
            with pytest.raises(SystemExit) as ended:
                run(lambda options, step=step: save(copy, step + 1), None)
        error = capsys.readouterr().err
        assert ended.value.code == 1, place
        assert re.search(r": /\S+: File too large.* bytes", error) and error.count("\n") == 1, (place, error)
        assert str(copy.folder) in error, place
        assert {path: path.read_bytes() for path in copy.path(step).iterdir()} == before, place
        found = check(copy.newest(silent))
        # Where `latest` alone had no room, the new one is whole already.
        assert found == (step + (name == LATEST), 0), place
        assert not [there for there in names(copy.folder) if not re.fullmatch(r"step-\d{8}|latest", there)], place
        step += 1
        save(copy, step)
        assert check(copy.newest(pytest.fail)) == (step, 0), place


def test_a_full_disk_at_the_last_save(tmp_path):
    """The model folder at the end of a run, and an adapter's: the same error as a checkpoint's."""
    model = build(Config(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    adapted = adapt(model, rank=2)
    writers = {
        "model.safetensors": lambda: save_pretrained(model, tmp_path / "model"),
        "adapter_model.safetensors": lambda: save_adapter(adapted, tmp_path / "adapter"),
    }
    for name, write in writers.items():
        with room(3000), pytest.raises(OSError, match=r"File too large, with [\d,]+ bytes to write") as error:
            write()
        assert Path(error.value.filename).name == name and str(tmp_path) in error.value.filename


def test_a_full_disk_is_a_full_one(tmp_path):
    """A tmpfs of some pages, filled in turn up to each of them; then the same one, read-only."""
    own = ["unshare", "-rm", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=256k tmpfs "$0"'
    if shutil.which("unshare") is None or subprocess.run([*own, mount, tmp_path], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (unshare -rm); the limit on file sizes is the proof")
    both = '"$@" full "$0" && mount -o remount,ro "$0" && "$@" readonly "$0"'
    command = [*own, f"{mount} && {both}", tmp_path, sys.executable, "-m", "tests.saver"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "full" in ended.stdout and "readonly" in ended.stdout, ended.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("saved", [None, 1200])
def test_metrics_on_a_full_disk(tmp_path, saved):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run = Run(SimpleNamespace(out=tmp_path, keep_last=2), 10)
    run.saved = saved
    with pytest.raises(OSError, match=r"with 30 bytes to write") as error:
        run.append("metrics.jsonl", [{"step": 3, "text": "Fü狐"}])  # 27 signs
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "metrics.jsonl")
    assert ("can be resumed after update 1,200" in error.value.strerror) == (saved is not None)
    run.__exit__(OSError, error.value, None)  # and what is left in its buffer is not told a second time


def test_metrics_that_were_cut_in_the_middle(tmp_path):
    """What fitted on the disk ends in the middle of a line: resuming cuts it off at the checkpoint's length."""
    run = Run(SimpleNamespace(out=tmp_path, keep_last=2), 10)
    run.append("metrics.jsonl", [{"step": 1}])
    length = (tmp_path / "metrics.jsonl").stat().st_size
    with room(length + 5), pytest.raises(OSError, match="13 bytes to write"):
        run.append("metrics.jsonl", [{"step": 22}])
    run.__exit__(OSError, OSError(), None)
    assert (tmp_path / "metrics.jsonl").read_bytes()[length:].startswith(b'{"ste')
    again = Run(SimpleNamespace(out=tmp_path, keep_last=2), 10)
    again._cut({"metrics.jsonl": length})
    again.append("metrics.jsonl", [{"step": 2}])
    again.__exit__(None, None, None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}]


# ------------------------------------------------------------------ damaged


def refused(folder, name):
    """That reading the checkpoint is a ValueError which begins with the file's path."""
    try:
        read(folder)
    except ValueError as error:
        return str(error).startswith(str(folder / name)) and "\n" not in str(error)
    return False


def goes_back(checkpoints, name):
    """That `newest` tells which file is wrong, and finds the checkpoint before."""
    told = []
    found = check(checkpoints.newest(told.append))
    return found == (1, 0) and any(str(checkpoints.path(2) / name) in line and "WARNING" in line for line in told)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(copy, name):
    path = copy.path(2) / name
    data = path.read_bytes()
    places = set(range(len(data))) if name == MANIFEST else set(range(0, len(data), 5)) | {len(data) - 1}
    if path.suffix == ".safetensors":
        header = int.from_bytes(data[:8], "little")
        places |= set(range(8)) | {8, 7 + header}
        places |= {at for a, b in regions(path).values() if b > a for at in (a, (a + b) // 2, b - 1)}
    flips = [(at, bit) for at in sorted(places) for bit in ((0, 5, 7) if name == MANIFEST else (at % 8,))]
    handle = os.open(path, os.O_RDWR)
    for at, bit in flips:
        os.pwrite(handle, bytes([data[at] ^ 1 << bit]), at)
        assert refused(copy.path(2), name), (at, bit)
        if at % 97 == 0:
            assert goes_back(copy, name), (at, bit)
        os.pwrite(handle, data[at : at + 1], at)
    os.close(handle)
    assert check(read(copy.path(2))) == (2, 0)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_longer_rewritten_or_gone_is_found(copy, name):
    path = copy.path(2) / name
    data = path.read_bytes()
    others = [data[:-1], data[: len(data) // 2], b"", data + b"\n", data + b"\0", b"\xef\xbb\xbf" + data, data * 2]
    if name == MANIFEST:  # the same JSON in other words is not what was written
        value = json.loads(data)
        others += [json.dumps(value).encode(), data.replace(b"\n", b"\r\n"), data.rstrip(b"\n") + b"\r"]
        others += [data.replace(b'"format": 1', b'"format": 1, "format": 1'), b"[]", b"{}", b'{"manifest": 3}']
        others += [json.dumps(dict(reversed(value.items())), indent=1).encode()]
    for other in others:
        path.write_bytes(other)
        assert other == data or (refused(copy.path(2), name) and goes_back(copy, name)), other[-50:]
    path.unlink()
    assert refused(copy.path(2), name) and goes_back(copy, name)
    path.mkdir()
    assert refused(copy.path(2), name) and goes_back(copy, name)


def test_latest_that_was_changed_is_told(copy):
    path = copy.folder / LATEST
    data = path.read_bytes()
    flipped = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(len(data))]
    for other in [*flipped, data[:-1], data[: len(data) // 2], b"", data + b"\n", data.replace(b"\n", b"\r\n"), None]:
        path.unlink()
        if other is not None:
            path.write_bytes(other)
        else:
            path.mkdir()
        told = []
        assert check(copy.newest(told.append)) == (2, 0)  # the checkpoints themselves are whole
        assert len(told) == 1 and told[0].startswith(f"WARNING: {path}"), other
    path.rmdir()
    told = []
    assert check(copy.newest(told.append)) == (2, 0) and len(told) == 1 and str(path) in told[0]


def test_where_none_is_whole_there_is_an_error(copy):
    for step in (1, 2):
        os.truncate(copy.path(step) / ARRAYS, 100)
    told = []
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*training\.safetensors.*without --resume"):
        copy.newest(told.append)
    assert len(told) == 2
    shutil.rmtree(copy.folder)
    assert copy.newest(pytest.fail) is None and copy.steps() == []
    copy.clean()


def test_a_checkpoint_under_another_name_is_found(copy):
    """The hashes fit, but it is not the step that it is called."""
    copy.path(1).rename(copy.path(7))
    told = []
    assert check(copy.newest(told.append)) == (2, 0)
    assert any("step-00000007" in line and "update 1" in line for line in told)


def test_a_file_that_can_not_be_read_is_damaged(copy, monkeypatch):
    """File systems with checksums of their own answer a flipped bit with an input/output error."""
    original = checkpoint.sha256

    def sha256(path):
        if path == copy.path(2) / "model.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(checkpoint, "sha256", sha256)
    assert refused(copy.path(2), "model.safetensors") and goes_back(copy, "model.safetensors")


@pytest.mark.parametrize("when", ["before the hash", "after it"])
def test_a_reader_meets_a_removal(copy, monkeypatch, when):
    """Rotation takes a checkpoint away from somebody who is reading it: one that is not whole, and no other error."""
    original, gone = checkpoint.sha256, []

    def sha256(path):
        found = original(path) if when == "after it" else None
        if path.name == ARRAYS and not gone:
            gone.append(copy.remove(2))
        return found or original(path)

    monkeypatch.setattr(checkpoint, "sha256", sha256)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # the look before each reading comes too early to help
    assert refused(copy.path(2), ARRAYS)


def test_a_reader_meets_a_replacement(copy, monkeypatch):
    """The files were looked at, then another checkpoint takes the name: not the one's state with the other's arrays."""
    original, replaced = checkpoint.sha256, []

    def sha256(path):
        found = original(path)
        if path.name == ARRAYS and not replaced:
            replaced.append(path)  # first, because saving comes by here, too
            save(copy, 2, version=1)
        return found

    monkeypatch.setattr(checkpoint, "sha256", sha256)
    with pytest.raises(ValueError, match="step-00000002 was replaced while it was read"):
        read(copy.path(2))
    assert check(read(copy.path(2))) == (2, 1)


def read_beside(folder, reads):
    """Another process saves, rotates and replaces, and this one reads: what is read is whole, or a ValueError."""
    process, checkpoints, whole = start("save", folder, 0, 1, stdout=subprocess.DEVNULL), Checkpoints(folder), 0
    while whole < reads:
        for step in checkpoints.steps():
            with contextlib.suppress(ValueError):
                assert check(read(checkpoints.path(step)))[0] == step
                whole += 1
    process.kill()
    process.wait()


def test_reading_beside_a_process_that_saves(tmp_path):
    read_beside(tmp_path / "checkpoints", 20)


@pytest.mark.slow
def test_reading_beside_a_process_that_saves_for_long(tmp_path):
    read_beside(tmp_path / "checkpoints", 3000)


# ------------------------------------------------------------------ the lock


def held_by(folder):
    """A process that has the lock of a folder."""
    process = start("hold", folder, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "out"
    process = held_by(folder)
    before = names(folder), (folder / LOCK).read_bytes()
    who = re.escape(f"{folder} is in use by process {process.pid} on {socket.gethostname()}")
    for _ in range(2):
        with pytest.raises(ValueError, match=who), locked(folder):
            pytest.fail("two have it")
    assert before == (names(folder), (folder / LOCK).read_bytes()) == ([LOCK], before[1])
    process.kill()
    process.wait()
    assert (folder / LOCK).exists()  # a stale one
    with locked(folder):
        assert json.loads((folder / LOCK).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(folder):
            pytest.fail("this process has it twice")
    assert names(folder) == []


def test_a_lock_is_given_back_after_the_end_and_after_an_error(tmp_path):
    folder = tmp_path / "a" / "b"
    for error in (None, ValueError, KeyboardInterrupt):
        with contextlib.suppress(ValueError, KeyboardInterrupt), locked(folder):
            assert names(folder) == [LOCK]
            if error:
                raise error
        assert not (tmp_path / "a").exists()  # nothing was written, so nothing is left
    with locked(folder):
        (folder / "metrics.jsonl").write_text("")
    assert names(folder) == ["metrics.jsonl"]


def test_a_lock_of_another_machine(tmp_path):
    theirs = json.dumps({"pid": 12, "host": "another.example"})
    (tmp_path / LOCK).write_text(theirs)
    with pytest.raises(
        ValueError, match=r"in use by process 12 on another.example: if that has ended, delete .*\.lock"
    ):
        locked(tmp_path).__enter__()
    assert (tmp_path / LOCK).read_text() == theirs and names(tmp_path) == [LOCK]
    (tmp_path / LOCK).unlink()
    with locked(tmp_path):
        pass


GARBAGE = [
    b"",
    b"\0" * 300,
    b"\xff\xfe",
    b"[" * 1000,
    b'{"pid": 3',
    b'{"pid": "x"}',
    b"3",
    b"null",
    b'"host"',
    b"9" * 999,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_the_lock_file_holds_nobody_up(tmp_path, garbage):
    (tmp_path / LOCK).write_bytes(garbage)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_lock_where_it_can_not_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, and has to be a folder"):
        locked(tmp_path / "file").__enter__()
    for folder in (
        tmp_path / "file" / "below",
        Path("/proc/minillm/out"),
        Path("/proc/self"),
        tmp_path / "new" / ("x" * 300),
    ):
        with pytest.raises(OSError) as error:
            locked(folder).__enter__()
        assert error.value.filename is not None
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_lock_on_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    with room(0), pytest.raises(OSError, match=r"File too large, with .* bytes") as error, locked(tmp_path / "out"):
        pytest.fail("it was written")
    assert error.value.filename == str(tmp_path / "out" / LOCK) and names(tmp_path) == []


def test_a_lock_where_the_system_has_none(tmp_path, monkeypatch):
    """On Windows, where these are missing, nobody is refused but by the name of another machine."""
    monkeypatch.setattr(checkpoint, "fcntl", None)
    for name in ("pread", "pwrite", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    me = {"pid": os.getpid(), "host": socket.gethostname()}
    for before in ("", json.dumps({"pid": 12, "host": me["host"], "more": "x" * 99})):
        (tmp_path / LOCK).write_text(before)
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text()) == me
            with locked(tmp_path):
                assert json.loads((tmp_path / LOCK).read_text()) == me
        assert names(tmp_path) == []
    (tmp_path / LOCK).write_text(json.dumps({"pid": 12, "host": "another.example"}))
    with pytest.raises(ValueError, match=r"in use by process 12 on another\.example"):
        locked(tmp_path).__enter__()


def test_a_lock_does_not_write_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError) as error:
        locked(tmp_path / "out").__enter__()
    assert error.value.filename == str(tmp_path / "out" / LOCK) and (tmp_path / "precious").read_text() == "mine"


def race(tmp_path, processes, times):
    """Exactly one has the lock at any time, and each one gets it; the first lock is a stale one."""
    folder, log = tmp_path / "out", tmp_path / "log"
    stale = held_by(folder)
    stale.kill()
    stale.wait()
    racing = [start("race", folder, log, times, stdin=subprocess.PIPE) for _ in range(processes)]
    for process in racing:
        process.stdin.close()
    assert [process.wait() for process in racing] == [0] * processes
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [word for word, _ in lines] == ["enter", "leave"] * (processes * times)
    assert [pid for _, pid in lines[::2]] == [pid for _, pid in lines[1::2]]
    assert names(folder) == []


def test_eight_race_for_a_stale_lock(tmp_path):
    race(tmp_path, 8, 3)


@pytest.mark.slow
def test_eight_race_for_a_stale_lock_for_long(tmp_path):
    race(tmp_path, 8, 300)


def test_a_lock_that_vanishes_while_it_is_taken(tmp_path, monkeypatch):
    """Between our opening it and our look, its owner gave it back, and another one came and went: we try again."""
    original, times = os.fstat, []

    def fstat(handle):
        if not times:
            (tmp_path / LOCK).unlink()
        times.append(handle)
        return original(handle)

    monkeypatch.setattr(os, "fstat", fstat)
    with locked(tmp_path):
        assert names(tmp_path) == [LOCK]
    assert len(times) >= 2


# ------------------------------------------------------------------ rotation


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    def kept(keep, saves):
        checkpoints = Checkpoints(tmp_path / str(len(names(tmp_path))), keep)
        for step, best in saves:
            assert save(checkpoints, step, best=best) == checkpoints.path(step)
            assert check(checkpoints.newest(pytest.fail)) == (step, 0) and sha256sum_accepts(checkpoints.folder)
        return checkpoints.steps()

    assert kept(1, [(1, None), (2, None), (3, None)]) == [3]
    assert kept(2, [(1, None), (2, None), (3, None)]) == [2, 3]
    assert kept(1, [(1, 1), (2, 1), (3, 1)]) == [1, 3]
    assert kept(1, [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4)]) == [4, 5]  # the best one changes
    assert kept(2, [(1, 1), (2, 1), (3, 1), (4, 1)]) == [1, 3, 4]
    assert kept(2, [(1, None), (2, None), (2, None)]) == [1, 2]  # replaced
    assert kept(1, [(1, None), (1, None)]) == [1]
    assert kept(9, [(s, None) for s in (5, 10, 15, 20, 12)]) == [5, 10, 12]  # went back: what is above goes
    assert kept(1, [(5, 5), (10, 5), (5, 5)]) == [5]
    assert kept(2, [(99_999_999, None), (100_000_000, None), (10**12, None)]) == [10**8, 10**12]  # more digits


def test_no_checkpoint_at_all_can_not_be_kept(tmp_path):
    for keep in (0, -1):
        with pytest.raises(ValueError, match=f"^at least 1 checkpoint has to be kept, and keep is {keep}$"):
            Checkpoints(tmp_path, keep)


def test_rotation_with_a_damaged_one_among_them(copy):
    """Step 2 is damaged, so the run goes back to 1 and makes 2 again: it is replaced by a whole one."""
    os.truncate(copy.path(2) / ARRAYS, 100)
    assert check(copy.newest(silent)) == (1, 0)
    save(copy, 2, version=1)
    assert check(copy.newest(pytest.fail)) == (2, 1) and copy.steps() == [1, 2]


def test_newest_goes_by_the_step_and_not_by_the_clock(copy):
    for path in copy.path(1).iterdir():
        os.utime(path, (2**32, 2**32))
    for path in copy.path(2).iterdir():
        os.utime(path, (0, 0))
    assert check(copy.newest(pytest.fail)) == (2, 0)


def test_cleaning_keeps_the_only_copy(copy):
    """A kill between the two renames of a replacement, and nobody has asked for the newest one yet."""
    copy.path(2).rename(copy.folder / ".replaced-step-00000002")
    copy.clean()
    assert copy.steps() == [1, 2] and check(copy.newest(pytest.fail)) == (2, 0)


def test_what_else_stands_in_the_folder_is_left_alone(copy):
    """Other names, and names that only look like a checkpoint's."""
    others = ["notes.txt", "step-1", "step-000000003", "step-٠٠٠٠٠٠٠٥", "step-00000009.bak", "my-step-00000009"]
    for name in others:
        (copy.folder / name).mkdir()
    (copy.folder / "step-00000008").write_text("a file")
    assert copy.steps() == [1, 2]
    save(copy, 3)
    copy.clean()
    assert check(copy.newest(pytest.fail)) == (3, 0)
    assert names(copy.folder) == sorted([*others, "step-00000008", "step-00000002", "step-00000003", LATEST])


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing"])
def test_something_else_has_the_name_of_the_next_one(copy, tmp_path, kind):
    """It gives way; what a link leads to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("mine")
    for step, name in ((3, "step-00000003"), (4, ".saving-step-00000004"), (5, ".replaced-step-00000005")):
        path = copy.folder / name
        if kind == "file":
            path.write_text("a file")
        else:
            path.symlink_to(tmp_path / "elsewhere" if kind == "link to a folder" else tmp_path / "nothing")
        save(copy, step)
        assert check(copy.newest(pytest.fail)) == (step, 0)
    copy.clean()
    assert names(copy.folder) == [LATEST, "step-00000004", "step-00000005"]
    assert names(tmp_path / "elsewhere") == ["precious"]


def test_checkpoints_on_another_disk_behind_a_link(two, tmp_path):
    shutil.copytree(two, tmp_path / "elsewhere")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert check(checkpoints.newest(pytest.fail)) == (2, 0)
    save(checkpoints, 3)
    shutil.move(checkpoints.path(2), tmp_path / "far")  # and one of them alone
    checkpoints.path(2).symlink_to(tmp_path / "far")
    assert check(read(checkpoints.path(2))) == (2, 0)
    save(checkpoints, 4)
    checkpoints.clean()
    assert names(tmp_path / "elsewhere") == [LATEST, "step-00000003", "step-00000004"]


# ------------------------------------------------------------------ what is saved

DTYPES = ["f2", "f4", "f8", ">f4", ">f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", "?", "c8"]
ELEMENTS = {"allow_nan": False, "allow_infinity": False}


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    elements = ELEMENTS if dtype.kind in "fc" else None
    array = draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **(elements or {}))))
    order = draw(st.sampled_from(["C", "F", "reversed", "every other", "read-only"]))
    if order == "F":
        array = np.asarray(array, order="F")
    elif order == "reversed":
        array = array[(slice(None, None, -1),) * array.ndim]
    elif order == "every other" and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif order == "read-only":
        array = array.copy()
        array.flags.writeable = False
    return array


@settings(max_examples=50)
@given(st.dictionaries(st.text("abc/_.狐", min_size=1, max_size=6).map("model/{}".format), arrays(), max_size=4))
def test_arrays_come_back_bit_for_bit(tmp_path_factory, given):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("arrays"))
    before = {name: (array.tobytes(), array.shape) for name, array in given.items()}
    checkpoints.save(1, given, {}, {})
    _, found = checkpoints.newest(pytest.fail)
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert (array.tobytes(), array.shape) == before[name]
        native = array.astype(array.dtype.newbyteorder("="))
        assert saver.same(found[name], native), (name, array.dtype, array.shape)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "c8", ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_saved(copy, dtype, value):
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    for name, step in itertools.product(arrays_of(2), (2, 3)):
        given = arrays_of(2)
        if given[name].size and given[name].dtype.kind == "f":
            given[name] = given[name].astype(dtype)
            given[name].flat[-1] = value
            with pytest.raises(NotFinite, match=f"{name} is not finite after update {step}"):
                copy.save(step, given, {}, {})
    assert before == {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}


STATES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def exact(value):
    """A value to compare exactly: 1, 1.0 and True are three, nan is nan, and 0.0 is not -0.0."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list) else (type(value), repr(value))


@settings(max_examples=50)
@given(STATES)
def test_states_come_back_as_they_were(tmp_path_factory, state):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("states"))
    checkpoints.save(1, {}, {"run": state}, {"狐": state})
    manifest, _ = checkpoints.newest(pytest.fail)
    assert exact(manifest["state"]["run"]) == exact(state) == exact(manifest["identity"]["狐"])


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ROUND = []
ROUND.append(ROUND)
NOT_JSON = {
    "a set": {1, 2},
    "bytes": b"x",
    "a path": Path("x"),
    "an array": np.zeros(3),
    "a NumPy integer": np.int64(3),
    "keys that are numbers": {2: "b", 10: "a"},
    "one key that is a number": {1: "a"},
    "a key that is None": {None: 1},
    "keys of two kinds": {"1": 1, 1: 2},
    "deeper than Python goes": nested(100_000),
    "as deep as Python just goes": nested(900),
    "a list in itself": ROUND,
    "a number of 5,000 digits": 10**5000,
}


@pytest.mark.parametrize("what", NOT_JSON)
@pytest.mark.parametrize("where", ["state", "identity"])
def test_a_state_that_json_can_not_hold_is_an_error_before_anything_is_written(copy, what, where):
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    given = {"state": {}, "identity": {}} | {where: {"run": {"last": [NOT_JSON[what]]}}}
    for step in (2, 3):
        with pytest.raises(ValueError, match=f"{where}.*JSON") as error:
            copy.save(step, arrays_of(step), **given)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert before == {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()]), np.array(["2020-01-01"], "M8[D]")])
def test_an_array_that_safetensors_can_not_hold(copy, array):
    with pytest.raises(ValueError, match="step-00000003"):
        copy.save(3, arrays_of(3) | {"model/odd": array}, {}, {})
    assert check(copy.newest(pytest.fail)) == (2, 0) and len(names(copy.folder)) == 3


# ------------------------------------------------------------------ forged


def forge(folder, change):
    """Change a manifest and seal it again, as somebody could who wants it to be believed."""
    manifest = read_manifest(folder)
    change(manifest)
    (folder / MANIFEST).write_bytes(checkpoint._sealed(manifest))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "../step-00000001/config.json",
        "/etc/passwd",
        "a/../../x",
        ".",
        "",
        "config.json/",
        "link",
        "dir/x",
        "a\0b",
        "\ud800",
        "x" * 300,
    ],
)
def test_a_file_outside_the_folder_is_refused(copy, tmp_path, name):
    (copy.folder / "x").write_text("outside")
    (copy.path(2) / "link").symlink_to(copy.folder / "x")
    (copy.path(2) / "dir").symlink_to(copy.folder)
    told = {"bytes": 1, "sha256": ""}
    with contextlib.suppress(OSError, ValueError):  # one that is there fits
        told = {"bytes": os.path.getsize(copy.path(2) / name), "sha256": checkpoint.sha256(copy.path(2) / name)}
    forge(copy.path(2), lambda manifest: manifest["files"].update({name: told}))
    with pytest.raises(ValueError, match=r"manifest\.json names|x is missing"):
        read(copy.path(2))
    assert goes_back(copy, "")


FORGED = {
    "no files": lambda m: m.pop("files"),
    "a list of files": lambda m: m.update(files=[1]),
    "files that are text": lambda m: m.update(files={ARRAYS: "x"}),
    "a file without a hash": lambda m: m["files"][ARRAYS].pop("sha256"),
    "the arrays are not among the files": lambda m: m["files"].pop(ARRAYS),
    "no step": lambda m: m.pop("step"),
    "a step that is text": lambda m: m.update(step="2"),
    "another step": lambda m: m.update(step=3),
    "no format": lambda m: m.pop("format"),
    "a later format": lambda m: m.update(format=2),
    "a state that is a list": lambda m: m.update(state=[]),
    "no identity": lambda m: m.pop("identity"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_is_refused(copy, what):
    forge(copy.path(2), FORGED[what])
    assert goes_back(copy, MANIFEST) or goes_back(copy, "")


@pytest.mark.parametrize("state", [{}, {"files": {}}, {"run": {"settings": 1}, "files": {}}, {"run": [], "files": {}}])
def test_a_state_of_something_else_is_not_resumed(tmp_path, state):
    """A whole checkpoint with a state that is none of a run's: no attribute is set that it may name."""
    Checkpoints(tmp_path / "checkpoints").save(1, {}, state, {})
    run = Run(SimpleNamespace(out=tmp_path, keep_last=2, resume=True), 10)
    before = dict(vars(run))
    with pytest.raises(ValueError, match="step-00000001 is no run's checkpoint"):
        run._resume()
    assert vars(run) == before


def safetensors_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HOSTILE = {
    "a huge header": b"\xff" * 8 + b"{}",
    "a header of 2^63 - 1": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "a header just over the end": (1000).to_bytes(8, "little") + b"{}",
    "brackets": safetensors_of(b"[" * 100_000),
    "an empty file": b"",
    "offsets behind the end": safetensors_of({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "offsets that overlap": safetensors_of(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)
    ),
    "a dtype that NumPy has not": safetensors_of(
        {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"0"
    ),
    "an unknown dtype": safetensors_of({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}}, b"0"),
    "a pickle": pickle.dumps({"model/weight": [1.0]}),
    "a pickle with code": b"cos\nabort\n(tR.",
}


@pytest.mark.parametrize("name", [ARRAYS, "model.safetensors"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_of_arrays_is_refused(copy, name, what):
    """With hashes that fit: whoever forges a file can forge those, too."""
    data, path = HOSTILE[what], copy.path(2) / name
    path.write_bytes(data)
    told = {"bytes": len(data), "sha256": checkpoint.sha256(path)}
    forge(copy.path(2), lambda manifest: manifest["files"].update({name: told}))
    assert refused(copy.path(2), name) and goes_back(copy, name)


def test_a_manifest_of_100_mb_of_brackets(copy):
    path = copy.path(2) / MANIFEST
    for begin in (b"", b'{"manifest": {"a": '):
        path.write_bytes(begin + b"[" * 10**8)
        assert refused(copy.path(2), MANIFEST)


@pytest.mark.parametrize("name", [MANIFEST, ARRAYS])
def test_a_pipe_or_an_endless_device_is_not_waited_for(copy, name):
    path = copy.path(2) / name
    path.unlink()
    os.mkfifo(path)
    assert refused(copy.path(2), name)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert refused(copy.path(2), MANIFEST)  # which names a link, where it is not one itself


def test_reading_never_unpickles(copy, monkeypatch):
    def unpickled(*arguments, **options):
        pytest.fail("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, unpickled)
    monkeypatch.setattr(np, "load", unpickled)
    assert check(copy.newest(pytest.fail)) == (2, 0)
    assert state_of(2) == read_manifest(copy.path(2))["state"]
