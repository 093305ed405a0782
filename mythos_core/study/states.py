"""Measures of state tracking: the running product in a group instead of parity; and a recurrent
network, trained as the recipe says, to compare with."""
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.probes import depth_sweep
from mythos_core.study.parity import loops_for
from mythos_core.study.peers import GRU, fit
from mythos_core.tasks.groups import group
from mythos_core.tasks.parity import structured
from mythos_core.training import Run
from mythos_core.training.recipes import Recipe


def patterns(recipe: Recipe, length: int) -> dict[str, Int[Tensor, "one seq"]]:
    """Parity's structured strings, with the identity, or the first of the letters, for 0 and the
    last generator for 1."""
    generators = group(recipe.group).generators
    zero, one = generators[0] if recipe.generators else 0, generators[-1]
    return {name: torch.where(ids == 2, one + 1, zero + 1)
            for name, ids in structured(length).items()}


@torch.no_grad()
def states_row(run: Run | SimpleNamespace) -> dict:
    """By length: whole strings and tokens of 32 uniform strings, where each string is first wrong
    (None: nowhere), and structured strings; loops needed (mean of 8 strings; None if some never are
    whole). Of the steps from a state by a letter in the strings of 256: how many different ones
    there are, and how many were taken wrongly at least once, the state before being right."""
    model, recipe, tracked = run.model.eval(), run.recipe, group(run.recipe.group)
    row: dict[str, Any] = {
        name: {} for name in ("whole", "token", "first_wrong", "structured", "needed")}

    def is_right(ids):
        return (torch.cat([model(part, loops_for(recipe, ids.shape[1])).argmax(-1)
                           for part in ids.split(8)]) == tracked.answers(ids))

    for length in (16, 64, 256):
        ids, targets = recipe.make_batch(32, length,
                                         torch.Generator().manual_seed(2 ** 31 + length))
        correct, name = is_right(ids), str(length)
        row["whole"][name] = correct.all(1).float().mean().item()
        row["token"][name] = correct.float().mean().item()
        row["first_wrong"][name] = [None if string.all() else int(string.long().argmin())
                                    for string in correct]
        row["structured"][name] = {pattern: bool(is_right(string).all())
                                   for pattern, string in patterns(recipe, length).items()}
    moves = targets[:, :-1] * (len(tracked) + 1) + ids[:, 1:]
    missed = correct[:, :-1] & ~correct[:, 1:]
    row |= {"moves": len(moves.unique()), "moves_wrong": len(moves[missed].unique())}
    looped = isinstance(model, OpenMythos) and recipe.loops[1] > 1
    for length in (16, 32, 64, 128, 256) if looped else ():
        ids, targets = recipe.make_batch(8, length, torch.Generator().manual_seed(length))
        needed = depth_sweep(model, ids, targets, 2 * length).loops_needed.amax(1).float()
        row["needed"][str(length)] = needed.mean().item() if needed.max() <= 2 * length else None
    return row


def train_gru(recipe: Recipe, seed: int, device=None) -> SimpleNamespace:
    """A run as `train` gives it, of a GRU."""
    model, history = fit(GRU, recipe, seed, device)
    return SimpleNamespace(recipe=recipe, model=model, history=history)
