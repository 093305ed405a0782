"""What an interrupted training goes on from, to the same bits: written between steps, and checked
before it is believed."""
import io
import json
import reprlib
import signal
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from mythos_core.model.weights import whole

SAVED = {"recipe", "seed", "history", "model", "optimizer"}   # what a checkpoint has
ABSENT = "absent"   # a field that a recipe had not yet, or has no more
ELSE = "must be the same to go on; else take another folder, or overwrite"


@contextmanager
def whole_steps(checkpoint: Path | None):
    """Within it Ctrl-C and SIGTERM, with which Slurm ends a job, wait for the end of a step: half
    of one could not be resumed to the same bits. Gives the list of the signals that came; a second
    one does not wait, and raises KeyboardInterrupt with the exit code of its signal. Without a
    checkpoint there is nothing to wait for."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt(128 + number)
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
    """Write the state of a `training.Run` and its optimiser.

    Raises:
        OSError: naming the file that could not be written; the last checkpoint stays.
    """
    content = io.BytesIO()                           # torch does not say why it could not write
    torch.save({"recipe": json.dumps(run.recipe.as_dict()), "seed": run.seed,
                "history": run.history, "model": run.model.state_dict(),
                "optimizer": optimizer.state_dict()}, content)
    with whole(checkpoint) as beside:
        beside.write_bytes(content.getbuffer())


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
    """Put the run and its optimiser where they were at `save`, of a recipe that may have had fewer
    steps: the row of its last one then has "recipe_steps", as many as that were.

    Raises:
        OSError: naming the file, which is damaged or no checkpoint.
        ValueError: it is that of another seed or recipe, naming the fields that differ; or of fewer
            steps, and more would have changed those that were taken.
    """
    saved = _read(checkpoint)
    if saved["seed"] != run.seed:
        raise ValueError(f"{checkpoint} is of seed {saved['seed']}, not {run.seed}: {ELSE}")
    given = _compare(checkpoint, saved["recipe"], run.recipe)
    try:
        run.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        _require_shapes(optimizer)
        steps = [row["step"] for row in saved["history"]]
        if steps != list(range(len(steps))):
            raise ValueError("its history has not one row a step")
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"{checkpoint}: not a checkpoint of this recipe: {error!r}") from error
    if given < run.recipe.steps:
        _require_same_start(checkpoint, run.recipe, given, len(saved["history"]))
        for row in saved["history"][-1:]:
            row["recipe_steps"] = given
    run.history = saved["history"]


def _compare(checkpoint: Path, saved: str, recipe) -> int:
    """The steps of the saved recipe, which must otherwise be this one, and have no more of them."""
    try:
        old, new = _fields(json.loads(saved)), _fields(json.loads(json.dumps(recipe.as_dict())))
        steps, fewer = old["steps"], old["steps"] < new["steps"]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise OSError(f"{checkpoint}: not a checkpoint of a recipe: {error!r}") from error
    differ = [name for name in {**old, **new} if old.get(name, ABSENT) != new.get(name, ABSENT)]
    if differ and not (differ == ["steps"] and fewer):
        said = [", not ".join(reprlib.repr(fields.get(name, ABSENT)) for fields in (old, new))
                for name in (differ if old.get("name") == new["name"] else ["name"])]
        raise ValueError(f"{checkpoint} is of another recipe: "
                         f"{'; '.join(map(' = '.join, zip(differ, said)))}: {ELSE}")
    return steps


def _fields(recipe: dict) -> dict:
    """Its fields; those of its config, machine and corpus by "config.NAME" and so on."""
    flat = {}
    for name, value in recipe.items():
        flat |= ({f"{name}.{inner}": x for inner, x in value.items()} if isinstance(value, dict)
                 else {name: value})
    return flat


def _require_same_start(checkpoint: Path, recipe, steps: int, done: int):
    """ValueError if the steps done, of a recipe that had so many, are not such as this one's more
    steps can follow."""
    begun = f"steps = {recipe.steps:,}: {checkpoint} was begun with {steps:,}, and "
    if recipe.decay:
        raise ValueError(f"{begun}its learning rate falls over the last {recipe.decay:.0%} of all: "
                         f"must be {steps:,}")
    if done < recipe.curriculum * recipe.steps:          # behind it strings are of all lengths
        raise ValueError(f"{begun}after {done:,} of them strings would still have to grow: must be "
                         f"at most {max(steps, int(done / recipe.curriculum)):,}")


def _require_shapes(optimizer):
    """ValueError unless what the optimiser knows of a parameter has its shape: it does not ask."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, "
                                 f"not {tuple(parameter.shape)}")
