"""What an interrupted training goes on from, to the same bits: written between steps, and checked
before it is believed."""
import json
import os
import signal
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

SAVED = {"recipe", "seed", "history", "model", "optimizer"}   # what a checkpoint has


@contextmanager
def whole_steps(checkpoint: Path | None):
    """Within it Ctrl-C and SIGTERM, with which Slurm ends a job, wait for the end of a step: half
    of one could not be resumed to the same bits. Gives the list of the signals that came; a second
    one does not wait. Without a checkpoint there is nothing to wait for."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    waits = checkpoint is not None and threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if waits else ()
    before = [(number, signal.signal(number, note)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def save(checkpoint: Path, run, optimizer):
    """Write the state of a `training.Run` and its optimiser: beside, then renamed, so that a
    checkpoint is whole or not there."""
    torch.save({"recipe": json.dumps(run.recipe.as_dict()), "seed": run.seed,
                "history": run.history, "model": run.model.state_dict(),
                "optimizer": optimizer.state_dict()}, checkpoint.with_suffix(".tmp"))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def _read(checkpoint: Path) -> dict:
    """What `save` wrote, its checksums compared: torch.load leaves them aside."""
    if not checkpoint.is_file():                     # a pipe would keep its reader waiting
        raise OSError(f"{checkpoint}: not a regular file")
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            torn = archive.testzip()
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:                       # which, depends on where it is torn
        raise OSError(f"{checkpoint}: damaged: {error}") from error
    if torn is not None:
        raise OSError(f"{checkpoint}: damaged: the checksum of {torn} does not fit")
    if not isinstance(saved, dict) or saved.keys() != SAVED:
        raise OSError(f"{checkpoint}: not a checkpoint of a training, which has {sorted(SAVED)}")
    return saved


def load(checkpoint: Path, run, optimizer):
    """Put the run and its optimiser where they were at `save`.

    Raises:
        OSError: naming the file, which is damaged or no checkpoint.
        ValueError: it is that of another recipe or seed.
    """
    saved = _read(checkpoint)
    for name, value in {"recipe": json.dumps(run.recipe.as_dict()), "seed": run.seed}.items():
        if saved[name] != value:
            raise ValueError(f"{checkpoint} is of {name} {saved[name]}, not {value}: "
                             "choose another folder, or do not resume")
    try:
        run.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        _require_shapes(optimizer)
        steps = [row["step"] for row in saved["history"]]
        if steps != list(range(len(steps))):
            raise ValueError("its history has not one row a step")
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"{checkpoint}: not a checkpoint of this recipe: {error!r}") from error
    run.history = saved["history"]


def _require_shapes(optimizer):
    """ValueError unless what the optimiser knows of a parameter has its shape: it does not ask."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, "
                                 f"not {tuple(parameter.shape)}")
