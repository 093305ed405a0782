"""The study behind notebooks 05 to 09: the recipe, every ingredient taken away or put back alone,
several seeds. Here are its variants, its rows and its strings; the other modules say what is
measured of each. A run of it is mythos_core/study.ipynb, which trains one variant with one seed and
measures it; `mythos_core.batch` runs the grid of them (see docs/results.md)."""
import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.machines import machine
from mythos_core.parity import make_batch
from mythos_core.recipes import Recipe, get_recipe, recipe_for
from mythos_core.tasks import task

RESULTS = Path(__file__).parent.parent / "results"
_file = json.loads((RESULTS / "variants.json").read_text(encoding="utf-8"))
#: From the article's recipe to the working one, one step after the other; each step keeps those
#: before it.
STEPS: dict[str, dict] = _file["steps"]
#: What each variant changes in the recipe ("parity-carrying", or its "base"); "config." marks the
#: model's own fields.
VARIANTS: dict[str, dict] = _file["ablations"]
_so_far = VARIANTS["the article's recipe"]
for _step, _changes in STEPS.items():
    VARIANTS[f"+ {_step}"] = _so_far = {**_so_far, **_changes}
VARIANTS |= _file["others"]
#: The variants that each measure is for.
MEASURED: dict[str, list[str]] = _file["measured"]
#: What is trained on each of them, by measures of more than one model.
TRAINED: dict[str, list[str]] = _file["trained"]
# of a ladder's training: where nothing is proved, the learning rate falls all the same
LADDER: dict[str, Any] = dict(steps=1000, decay=0.3)


def variant(name: str) -> Recipe:
    """The recipe of a variant, or "machine NAME" for that of a machine of `machines.machine`, or
    "task NAME of N" for that of a task of `tasks.task` on what is complete within N elements;
    ValueError listing the names there are."""
    if name.startswith("machine "):
        return recipe_for(machine(name.removeprefix("machine ")))
    if found := re.fullmatch(r"task (.+) of (\d+)", name):
        return recipe_for(task(found[1]).bounded(int(found[2])), **LADDER)
    if name not in VARIANTS:
        raise ValueError(f"variant = {name!r}: must be one of {sorted(VARIANTS)}")
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                               for k, v in VARIANTS[name].items()}
    recipe = get_recipe(changes.pop("base", "parity-carrying"))
    inner = {k.removeprefix("config."): v for k, v in changes.items() if k.startswith("config.")}
    outer = {k: v for k, v in changes.items() if not k.startswith("config.")}
    return replace(recipe, **outer, config=replace(recipe.config, **inner))


def load(file: Path) -> list[dict]:
    """The rows of a batch's results.json, in the order of `VARIANTS` and of what is `MEASURED`
    besides, then of seeds."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    order = [*VARIANTS, *chain(*MEASURED.values())]
    return sorted(rows, key=lambda row: (order.index(row["variant"]), row["seed"]))


def fresh_strings(length: int, strings: int = 16) -> Int[Tensor, "strings length"]:
    """The uniform strings on which all runs are tested."""
    return make_batch(strings, length, torch.Generator().manual_seed(2 ** 31 + length))[0]
