"""Output folders: what is there is not replaced without a word, and a new one is there when it is whole."""

import contextlib

from ..checkpoint import HIDDEN, LOCK, delete, locked

KINDS = {".json", ".jsonl", ".jinja", ".safetensors", ".bin", ".idx", ".html", ".png"}  # of files that scripts write


def check_out(out, overwrite, mark, maker, folders=(), hint=""):
    """ValueError where the folder `out` can not be taken. Changes nothing.

    mark     the file by which a folder is known to be of the same `maker`, a script's name: only such a one is replaced
    folders  what else such a folder has beside files of KINDS; anything else is somebody's own, and not removed
    hint     what else can be done where it is not empty
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, and has to be a folder")
    if not out.exists() or all(path.name == LOCK for path in out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty: take another --out{hint}, or replace it with --overwrite True")
    if not (out / mark).exists():
        raise ValueError(f"{out} is not empty, and was not made by {maker}: take another --out, or remove it yourself")
    for path in sorted(out.iterdir()):
        ours = path.name in folders or path.name.startswith(HIDDEN) or (path.is_file() and path.suffix in KINDS)
        if not ours and path.name != LOCK:
            raise ValueError(f"{path} would be removed, and {maker} did not make it: take another --out, or move it")


@contextlib.contextmanager
def aside(out):
    """Context manager: the empty folder OUT.partial, for this process alone. Where the block ends well, it becomes
    `out` in place of what is there; where it does not, it goes. ValueError and OSError as minillm.checkpoint.locked."""
    partial = aside_of(out)
    with locked(partial):
        _empty(partial)
        try:
            yield partial
            delete(out)
            partial.rename(out)
            (out / LOCK).unlink()
        finally:
            _empty(partial)
    with contextlib.suppress(OSError):  # it was there before, after a kill
        partial.rmdir()


def aside_of(out):
    """The folder in which `aside` makes `out`."""
    return out.with_name(out.name + ".partial")


def _empty(folder):
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != LOCK:
            delete(path)
