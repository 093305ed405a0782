"""The folder that a training writes to: its own while it runs, and without another run's files."""
import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

#: What the trainings of this package write, but for the README.md of `save_pretrained`, which is
#: the user's where there was one.
FILES = ("checkpoint.pt", "model.safetensors", "config.json", "history.json", "certificate.json",
         "automaton.png", "row.json", "bfloat16/model.safetensors", "bfloat16/config.json")


def add_options(parser: argparse.ArgumentParser):
    """What a command line may say of an older run in its --out."""
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true",
                     help="go on from the checkpoint in --out, if there is one; with more --steps "
                          "too, where how many there are has not changed those that were taken")
    old.add_argument("--overwrite", action="store_true",
                     help="remove first what another run left in --out")


def as_folder(out) -> Path:
    """ValueError for the empty path, which would be the current folder to some and none to
    others."""
    if not os.fspath(out):
        raise ValueError(f"out = {out!r}: must be a folder")
    return Path(out)


def require_free(folder: Path, resume: bool, overwrite: bool):
    """ValueError for a folder that has a run's files, unless there is a checkpoint to resume or
    they may be overwritten."""
    if resume and overwrite:
        raise ValueError("overwrite = True: must be False where resume is True")
    there = [name for name in FILES if (folder / name).exists()]
    if not there or overwrite or (resume and "checkpoint.pt" in there):
        return
    which = "and no checkpoint to resume" if resume else "of another run"
    how = "resume or overwrite" if "checkpoint.pt" in there else "overwrite"
    raise ValueError(f"out = {str(folder)!r}: has {', '.join(there)} {which}: must be another "
                     f"folder, or given with {how}")


@contextmanager
def claimed(folders: Sequence[Path], resume: bool, overwrite: bool) -> Iterator[None]:
    """Within it the folders are there, and no other training's. The system lets go of the lock of a
    process that ended, however it did; its file stays.

    Raises:
        OSError: one that cannot be a folder, or that another training writes to.
        ValueError: as `require_free`, before anything is made or removed.
    """
    for folder in folders:
        require_free(folder, resume, overwrite)
    with ExitStack() as locks:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_lock(folder))
        for folder in folders:
            require_free(folder, resume, overwrite)      # another may have ended since
        for folder in folders if overwrite else ():
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "training.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"out = {str(folder)!r}: another training writes to it: must be another "
                      "folder") from error
    try:
        yield
    finally:
        lock.release()
