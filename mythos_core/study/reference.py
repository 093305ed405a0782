"""The peer that we are measured against, trained by its public tutorial's own recipe on tasks of
its users: what do more loops do to it?

open-mythos 0.5.0 itself is not needed: with its switches off our model computes the same logits, to
1e-5 (tests/model/test_model.py), and the recipe is the first tutorial's ("parity-seed").
"""
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from mythos_core.model.model import OpenMythos
from mythos_core.probes import depth_sweep
from mythos_core.study.peers import fit, kind
from mythos_core.tasks.automaton import Machine
from mythos_core.training import NotProved, train
from mythos_core.training.recipes import Recipe, get_recipe, recipe_for

MOST_LOOPS = 24


def article(asked: Machine, loops: int) -> Recipe:
    """The recipe of the first public tutorial, on a machine's strings: 600 steps, strings of 24
    elements, always so many loops."""
    return replace(get_recipe("parity-seed"), name=f"article, {asked.name}", machine=asked,
                   loops=(loops, loops), strings=recipe_for(asked).strings)


def strict(asked: Machine) -> Recipe:
    """Our recipe with the article's budget: as many steps on as many strings of 24 elements."""
    recipe, theirs = recipe_for(asked), article(asked, 1)
    return replace(recipe, steps=theirs.steps, batch=theirs.batch, lengths=theirs.lengths,
                   curriculum=recipe.curriculum * recipe.steps / theirs.steps)


#: What is trained, by name: the article's recipe with its own number of loops and with another, to
#: see whether the peak moves with it; and ours.
TRAINED: dict[str, Callable[[Machine], Recipe]] = {
    "article, 3 loops": partial(article, loops=3), "article, 8 loops": partial(article, loops=8),
    "strict": strict}


def reference_row(name: str, asked: Machine, seed: int, device=None) -> dict:
    """What more loops do to one of `TRAINED`; of a strict model only if it could be proved, else
    why not."""
    if name not in TRAINED:
        raise ValueError(f"peer = {name!r}: must be one of {sorted(TRAINED)}")
    recipe = TRAINED[name](asked)
    row = {"recipe": recipe.as_dict()}
    if not recipe.config.strict:
        model, history = fit(lambda recipe: OpenMythos(recipe.config), recipe, seed, device)
        return row | {"loss": history[-1]["loss"], "by_loops": by_loops(model, asked)}
    try:
        run = train(recipe, seed, device, progress=False)
    except NotProved as failed:
        return row | {"proved": False, "reason": str(failed)}
    return row | {"proved": True, "steps": len(run.history),
                  "by_loops": by_loops(run.model.cpu(), asked)}


@torch.no_grad()
def by_loops(model: OpenMythos, asked: Machine, strings: int = 256) -> dict:
    """By length, as trained and twice that: after 1 .. `MOST_LOOPS` loops the share of tokens, of
    last tokens and of whole strings that are right; how many loops ran; and the fewest that had
    the best share of tokens."""
    row = {}
    for length in (24, 48):
        ids, targets = asked.make_batch(strings, length, torch.Generator().manual_seed(
            2 ** 31 + length), strings=kind(asked))
        sweep = depth_sweep(model, ids, targets, MOST_LOOPS)
        row[str(length)] = {"token": sweep.token.tolist(), "whole": sweep.whole.tolist(),
                            "last": sweep.correct[..., -1].float().mean(1).tolist(),
                            "executed": int(sweep.executed[-1]),
                            "peak": 1 + int(sweep.token.argmax())}
    return row
