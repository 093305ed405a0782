"""The study behind notebooks 05 to 08: the recipe, every ingredient taken away or put back alone,
several seeds. A run of it is mythos_core/study.ipynb, which trains one variant with one seed and
measures it; `mythos_core.batch` runs the grid of them (see docs/results.md)."""
import json
import math
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mythos_core.machines import machine
from mythos_core.model import OpenMythos
from mythos_core.parity import answers, make_batch
from mythos_core.probes import depth_sweep, logits_after
from mythos_core.recipes import Recipe, get_recipe, recipe_for
from mythos_core.tasks import task
from mythos_core.training import Run

RESULTS = Path(__file__).parent / "results"
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
# loops given to strings of each length; a scan gets 2 log2(length)
LOOPS = {16: 32, 64: 96, 256: 300, 512: 600, 1024: 1100}
# of a ladder's training: where nothing is proved, the learning rate falls all the same
LADDER: dict[str, Any] = dict(steps=1000, decay=0.3)
TOKENS = 2048  # of a pass: what they need between two operations stays in the processor's cache


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


def span(recipe: Recipe, length: int) -> int:
    """Loops in which the token shift alone brings news from the first to the last of `length`
    positions."""
    return (length if recipe.config.shift_growth == 1
            else math.ceil(math.log(length, recipe.config.shift_growth)))


def loops_for(recipe: Recipe, length: int) -> int:
    """Loops given to strings of a length: one if the recipe does not loop."""
    return (1 if recipe.loops[1] == 1 else LOOPS[length] if recipe.config.shift_growth == 1
            else 2 * span(recipe, length))


@torch.no_grad()
def right(model: OpenMythos, ids: Int[Tensor, "batch seq"],
          loops: list[int]) -> Bool[Tensor, "loops batch seq"]:
    """Which answers are right after each of these numbers of loops, from one pass of the
    largest; on the CPU."""
    ids = ids.to(model.embed.weight.device)
    if ids.numel() > TOKENS and len(ids) > 1:
        return torch.cat([right(model, part, loops)
                          for part in ids.split(max(1, TOKENS // ids.shape[1]))], 1)
    read = [logits.argmax(-1) for logits in logits_after(model, ids, loops)]
    return (torch.stack(read) == answers(ids)).cpu()


def fresh_strings(length: int, strings: int = 16) -> Int[Tensor, "strings length"]:
    """The uniform strings on which all runs are tested."""
    return make_batch(strings, length, torch.Generator().manual_seed(2 ** 31 + length))[0]


def whole_strings(model: OpenMythos, length: int, n_loops: int, strings: int = 16) -> float:
    """Share of `fresh_strings` that are right at every position."""
    return right(model, fresh_strings(length, strings), [n_loops]).all(2).float().mean().item()


def accuracy_row(run: Run) -> dict:
    """Whole-string accuracy at 16, 64, 256 and 512 bits; token accuracy as trained (longest length,
    most loops) and the loops executed there when max_loop_iters are asked for; loops needed at 64
    bits (mean over strings; None if some never are whole)."""
    loops = {length: loops_for(run.recipe, length) for length in (16, 64, 256, 512)}
    trained = depth_sweep(run.model, *make_batch(256, run.recipe.lengths[1],
                                                 torch.Generator().manual_seed(2 ** 31)),
                          run.recipe.config.max_loop_iters)
    ids = make_batch(16, 64, torch.Generator().manual_seed(64))[0]
    needed = depth_sweep(run.model, ids, answers(ids), loops[64]).loops_needed.amax(1)
    return {"whole": {str(length): whole_strings(run.model, length, n)
                      for length, n in loops.items()},
            "loops": {str(k): v for k, v in loops.items()},
            "token": trained.token[run.recipe.loops[1] - 1].item(),
            "executed": int(trained.executed[-1]),
            "needed": needed.float().mean().item() if needed.max() <= loops[64] else None}


def load(file: Path) -> list[dict]:
    """The rows of a batch's results.json, in the order of `VARIANTS` and of what is `MEASURED`
    besides, then of seeds."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    order = [*VARIANTS, *chain(*MEASURED.values())]
    return sorted(rows, key=lambda row: (order.index(row["variant"]), row["seed"]))
