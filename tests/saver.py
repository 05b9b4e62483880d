"""
Processes for test_checkpoint.py to kill, starve and race, and what a checkpoint of theirs holds. It imports little,
because each of them pays for that.

    python -m tests.saver save FOLDER SEED KEEP     saves one checkpoint after the other until it is killed
    python -m tests.saver full FOLDER               FOLDER is on a disk of 256 KB, which gets full at each page in turn
    python -m tests.saver readonly FOLDER           FOLDER has been filled, and nothing can be written any more
    python -m tests.saver hold FOLDER               holds the lock until its stdin ends
    python -m tests.saver race FOLDER LOG TIMES     takes the lock that often, once its stdin ends
"""

import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

from minillm.checkpoint import Checkpoints, locked, save_arrays

IDENTITY = {"model.dim": 8, "tokenizer": "Füchse, 狐"}


def arrays_of(step, version=0):
    """The arrays of a checkpoint, random but for the step; another version of them has other numbers."""
    rng = np.random.default_rng([step, version])
    normal = lambda *shape: rng.normal(size=shape)
    return {
        "model/weight": normal(23, 7).astype(np.float32),
        "model/bias": normal(5),
        "moments/first": normal(23, 7).astype(np.float32),
        "moments/empty": normal(0, 3),
        "moments/count": np.array(step),
        "moments/mask": rng.integers(0, 2, 13).astype(bool),
    }


def state_of(step, version=0):
    return {"run": {"tokens": step << 70, "last": [["loss", 1 / (step + 1)], version]}, "none": None}


def dress_of(arrays):
    """A model folder in small: weights and two files of text."""

    def dress(folder):
        weights = {name.removeprefix("model/"): array for name, array in arrays.items() if name.startswith("model/")}
        save_arrays(weights, folder / "model.safetensors")
        (folder / "config.json").write_text('{"dim": 8}\n', encoding="utf-8")
        (folder / "tokenizer.json").write_text('{"vocab": ["Füchse"]}\n', encoding="utf-8")

    return dress


def save(checkpoints, step, version=0, best=None):
    arrays = arrays_of(step, version)
    return checkpoints.save(step, arrays, state_of(step, version), IDENTITY, dress_of(arrays), best)


def same(a, b):
    """Whether two arrays have the same bytes, shape and dtype."""
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def check(found):
    """(step, version) of what `newest` found, after a look at every number in it."""
    manifest, arrays = found
    step, version = manifest["step"], manifest["state"]["run"]["last"][1]
    expected = arrays_of(step, version)
    assert arrays.keys() == expected.keys() and all(same(arrays[name], expected[name]) for name in expected)
    assert manifest["state"] == state_of(step, version) and manifest["identity"] == IDENTITY
    return step, version


def save_forever(folder, seed, keep):
    """Tells "begin STEP" and "done STEP" around each save, so that it is known what a kill may have cost."""
    rng, checkpoints = random.Random(int(seed)), Checkpoints(folder, int(keep))
    found = checkpoints.newest(say=lambda line: None)
    checkpoints.clean()
    step = check(found)[0] if found else 0
    for version in itertools.count(1):
        # Mostly the next one; sometimes the same again, sometimes as a run that went back.
        step = max(1, step + rng.choice([1, 1, 1, 0, -1]))
        best = rng.choice([None, *(there for there in checkpoints.steps() if there <= step)])
        print("begin", step, version, flush=True)
        save(checkpoints, step, version, best)
        print("done", step, version, flush=True)


def fill_up(folder):
    """Leave a file without room at each page in turn: one OSError, and the checkpoint before stays the newest."""
    checkpoints, filler = Checkpoints(folder / "checkpoints", keep=1), folder / "filler"
    size = 20_000
    arrays = lambda step: {"model/a": np.full(size, step, np.uint8), "other/b": np.full(size, step, np.uint8)}
    put = lambda step: checkpoints.save(step, arrays(step), {}, {}, lambda at: dress_of(arrays(step))(at))
    put(1)
    step, failed = 1, 0
    while True:
        filler.write_bytes(b"")
        with open(filler, "r+b", buffering=0) as file:  # all the room there is, and then some pages less
            file.write(bytes(10_000_000))
            file.truncate(max(0, filler.stat().st_size - 4096 * failed))
        try:
            put(step + 1)
            break
        except OSError as error:
            failed += 1
            assert error.errno == 28 and "\n" not in str(error), error
            assert "bytes" in error.strerror and Path(error.filename).is_relative_to(checkpoints.folder), error
        found = checkpoints.newest()
        step = found[0]["step"]  # the next one, where it was whole and only `latest` had no room
        assert all((found[1][name] == step).all() for name in found[1])
        names = {path.name for path in checkpoints.folder.iterdir()}
        assert names <= {f"step-{step:08}", f"step-{step - 1:08}", "latest"}, names
        filler.unlink()
        step += 1
        put(step)
    assert failed >= 10, failed
    print("full", failed)


def write_nothing(folder):
    """On a disk that can only be read: one OSError, and what is there can be read."""
    checkpoints = Checkpoints(folder / "checkpoints")
    step = checkpoints.newest()[0]["step"]
    for action in (lambda: save(checkpoints, step + 1), lambda: locked(folder).__enter__()):
        try:
            action()
        except OSError as error:
            assert error.errno == 30 and Path(error.filename).is_relative_to(folder), error
        else:
            raise AssertionError("it was written")
    checkpoints.clean()
    assert checkpoints.newest()[0]["step"] == step
    print("readonly")


def hold(folder):
    with locked(folder):
        print("held", flush=True)
        sys.stdin.read()


def race(folder, log, times):
    sys.stdin.read()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    note = lambda word: os.write(handle, f"{word} {os.getpid()}\n".encode())
    for _ in range(int(times)):
        held = False
        while not held:
            try:
                with locked(folder):
                    held = True
                    note("enter")
                    assert json.loads((folder / ".lock").read_bytes())["pid"] == os.getpid()
                    note("leave")
            except ValueError as error:
                assert "is in use by" in str(error), error
                time.sleep(0.001)


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    actions = {"save": save_forever, "full": fill_up, "readonly": write_nothing, "hold": hold, "race": race}
    actions[what](Path(folder), *rest)
