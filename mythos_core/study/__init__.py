"""The study behind notebooks 05 to 09: the recipe, every ingredient taken away or put back alone,
several seeds. Here are its variants, its rows and its strings; the other modules say what is
measured of each. A run of it is study.ipynb beside this file, which trains one variant with one
seed and measures it; `mythos_core.batch` runs the grid of them (see docs/results.md)."""
import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.tasks.machines import machine
from mythos_core.tasks.parity import make_batch
from mythos_core.tasks.unbounded import task
from mythos_core.training.recipes import (
    Recipe,
    contracting_recipe,
    doubling_recipe,
    get_recipe,
    recipe_for,
)

RESULTS = Path(__file__).parent / "results"
SHARED = {"recipe", "versions"}   # fields of a row that many rows of a file have in common
_file = json.loads(Path(__file__).with_name("variants.json").read_text(encoding="utf-8"))
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
LADDER: dict[str, Any] = dict(steps=1000, decay=0.3, state_loss=0.0)


def variant(name: str) -> Recipe:
    """The recipe of a variant; or "told machine NAME" for that of a machine of `machines.machine`,
    "machine NAME" for the same without the state loss, and "doubling machine NAME", "contracting
    machine NAME" or "contracting doubling machine NAME" for those of its other models; or "task
    NAME of N" for that of a task of `tasks.task` on what is complete within N elements, without the
    state loss. ValueError listing the names there are.
    """
    if name.startswith("told machine "):
        return recipe_for(machine(name.removeprefix("told machine ")))
    if name.startswith("machine "):
        return recipe_for(machine(name.removeprefix("machine ")), state_loss=0.0)
    if name.startswith("doubling machine "):
        return doubling_recipe(machine(name.removeprefix("doubling machine ")))
    if match := re.fullmatch(r"contracting (doubling )?machine (.+)", name):
        return contracting_recipe(machine(match[2]), doubling=bool(match[1]))
    if match := re.fullmatch(r"task (.+) of (\d+)", name):
        return recipe_for(task(match[1]).bounded(int(match[2])), **LADDER)
    if name not in VARIANTS:
        raise ValueError(f"variant = {name!r}: must be one of {sorted(VARIANTS)}")
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                               for k, v in VARIANTS[name].items()}
    recipe = get_recipe(changes.pop("base", "parity-carrying"))
    in_config = {k.removeprefix("config."): v for k, v in changes.items()
                 if k.startswith("config.")}
    in_recipe = {k: v for k, v in changes.items() if not k.startswith("config.")}
    return replace(recipe, **in_recipe, config=replace(recipe.config, **in_config))


def pack(rows: list[dict]) -> str:
    """Rows as `results` has them, one a line: what many of them share stands once in the file, and
    a row has its number there."""
    shared: dict[str, list] = {name: [] for name in sorted(SHARED)}
    lines = []
    for row in rows:
        for name in sorted(SHARED & row.keys()):
            if row[name] not in shared[name]:
                shared[name].append(row[name])
        lines.append(json.dumps({name: shared[name].index(value) if name in SHARED else value
                                 for name, value in row.items()}))
    heads = [f'"{name}": [\n' + ",\n".join(map(json.dumps, values)) + "\n],"
             for name, values in shared.items()]
    return "\n".join(["{", *heads, '"rows": [\n' + ",\n".join(lines) + "\n]}", ""])


def unpack(file: Path) -> list[dict]:
    """The rows of a file that `pack` wrote, each whole again, in the file's order."""
    packed = json.loads(file.read_text(encoding="utf-8"))
    return [{name: packed[name][value] if name in SHARED else value for name, value in row.items()}
            for row in packed["rows"]]


def load(file: Path) -> list[dict]:
    """`unpack`'s rows in the order of `VARIANTS` and of what is `MEASURED` besides, then of
    seeds."""
    order = [*VARIANTS, *chain(*MEASURED.values())]
    return sorted(unpack(file), key=lambda row: (order.index(row["variant"]), row["seed"]))


def fresh_strings(length: int, strings: int = 16) -> Int[Tensor, "strings length"]:
    """The uniform strings on which all runs are tested."""
    return make_batch(strings, length, torch.Generator().manual_seed(2 ** 31 + length))[0]
