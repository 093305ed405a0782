"""The shapes that signatures name hold in what other files do without the checks, a little of each;
and the checks find a shape that is not the one named."""
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

from mythos_core import OpenMythos
from mythos_core.model.layers import rotate
from mythos_core.proof.certificate import automaton, certify
from mythos_core.study.peers import PEERS, accuracy, fit, rows_of
from mythos_core.tasks.machines import machine
from mythos_core.training.recipes import RECIPES, get_recipe, recipe_for
from mythos_core.training.step import held_out, take_step
from mythos_core.training.together import step_together
from mythos_core.training.trainer import begin

S3 = replace(recipe_for(machine("S3")), batch=8)


@pytest.mark.parametrize("recipe", [
    *(replace(get_recipe(name), batch=8) for name in RECIPES), S3,
    replace(recipe_for(machine("parity"), **{"config.stride": 3, "config.window": 3}), batch=8),
], ids=lambda recipe: f"{recipe.name}-{recipe.config.stride}")
def test_of_a_training_step(recipe):
    run, optimizer = begin(recipe, 0, None, None, False)
    for step in range(2):
        run.history.append({"step": step, **take_step(run, optimizer, step)})
        run.history[-1]["proved"] = recipe.machine is not None   # so that the second falls
    held_out(run.model, recipe, batch=8)


def test_of_a_step_of_several_seeds():
    runs, optimizers = zip(*(begin(S3, seed, None, None, False) for seed in range(2)))
    for _ in range(2):
        for run, row in zip(runs, step_together(runs, optimizers)):
            run.history.append({**row, "proved": True})


def test_of_a_certificate():
    model, asked = OpenMythos.from_pretrained("parity-extrapolating"), machine("parity")
    assert certify(model, asked).proved
    assert automaton(model, asked.letters) is not None


@pytest.mark.parametrize("name", PEERS)
def test_of_a_peer(name):
    model, _ = fit(PEERS[name], replace(S3, steps=2), 0, None)
    accuracy(model, S3.machine, strings=2)
    if hasattr(model, "states"):
        rows_of(model, S3.machine)


def test_a_shape_that_is_not_the_one_named_is_found():
    with pytest.raises(TypeCheckError):
        rotate(torch.ones(2, 3), None)


def test_but_not_without_the_checks(without_shape_checks):
    assert rotate(torch.ones(2, 3), None).shape == (2, 3)
