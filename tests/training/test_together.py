"""Several seeds in one graph: each is what it is alone, to rounding, whatever the others draw."""
import json
import re
import signal
from dataclasses import replace

import pytest
import torch

from mythos_core import OpenMythos
from mythos_core.__main__ import main
from mythos_core.proof.certificate import certify
from mythos_core.tasks.machines import machine
from mythos_core.training import trainer
from mythos_core.training.command import seeds
from mythos_core.training.recipes import get_recipe, recipe_for
from mythos_core.training.step import take_step
from mythos_core.training.together import step_together, train_together
from mythos_core.training.trainer import begin

pytestmark = pytest.mark.usefixtures("without_shape_checks")

SEEDS = [0, 1, 5]


def started(recipe, dtype=torch.float64):
    """Runs before their first step, in float64. What is drawn stays float32, and the sum of its
    weights is rounded so: 1e-7, which a wrong string or noise is far above."""
    runs = [begin(recipe, seed, None, None, False)[0] for seed in SEEDS]
    for run in runs:
        run.model.to(dtype)
    return runs, [torch.optim.AdamW(run.model.parameters(), recipe.lr, recipe.betas)
                  for run in runs]


def furthest(a, b):
    """The largest difference of two runs' parameters."""
    return max((x - y).abs().max().item()
               for x, y in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.parametrize("recipe", [
    recipe_for(machine("S3")),                                   # covering strings
    recipe_for(machine("A5")),                    # batches meet different numbers of its states
    recipe_for(machine("regex:(ab)*c")),                         # touring ones, moves weighed
    recipe_for(machine("parity"), **{"config.stride": 3, "config.window": 3}),
    recipe_for(machine("parity"), **{"config.loop_noise": 0.0, "config.window": 4}),
], ids=lambda recipe: f"{recipe.name}-{recipe.config.stride}-{recipe.config.loop_noise}")
def test_a_seed_of_several_is_the_seed_alone(recipe):
    recipe = replace(recipe, curriculum=0.0, batch=16)
    (together, optimizers), (alone, own) = started(recipe), started(recipe)
    for step in range(4):
        if step == 2:                                            # the first falls, by its proof
            for run in (together[0], alone[0]):
                run.history[-1]["proved"] = True
        for run, optimizer in zip(alone, own):
            run.history.append({"step": step, **take_step(run, optimizer, step)})
        for run, row in zip(together, step_together(together, optimizers)):
            run.history.append(row)
    for run, other in zip(together, alone):
        assert furthest(run, other) < 1e-6
        assert [row["accuracy"] for row in run.history] == [row["accuracy"] for row in
                                                            other.history]
        assert ([row["loss"] for row in run.history]
                == pytest.approx([row["loss"] for row in other.history], abs=1e-6))
    assert furthest(together[0], together[1]) > 0.1


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return train_together("parity-extrapolating", [0, 3], progress=False, out=out), out


def test_seeds_end_when_each_is_proved(two):
    runs, out = two
    assert [run.seed for run in runs] == [0, 3] and all(run.certificate.proved for run in runs)
    for run in runs:
        folder = out / f"seed-{run.seed}"
        assert certify(OpenMythos.from_pretrained(folder), machine("parity")).proved
        assert json.loads((folder / "history.json").read_text(encoding="utf-8")) == run.history
        assert run.history[-1]["held_out"] == 1.0 and run.history[-1]["proved"]
        proof = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
        assert proof["proved"]


def test_finished_seeds_are_not_trained_again(two):
    runs, out = two
    again = train_together("parity-extrapolating", [0, 3], progress=False, out=out, resume=True)
    assert [run.history for run in again] == [run.history for run in runs]
    assert all(run.certificate.proved for run in again)


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C within a step, once."""
    note, planned = trainer.note, []

    def interrupted(run, row, start):
        if planned and row["step"] == planned[0]:
            planned.clear()
            signal.raise_signal(signal.SIGINT)
        return note(run, row, start)

    monkeypatch.setattr(trainer, "note", interrupted)
    return planned.append


SHORT = replace(get_recipe("parity-extrapolating"), steps=6)


def test_interrupted_seeds_go_on_to_the_same_bits(tmp_path, interrupt):
    whole = train_together(SHORT, [0, 5], progress=False)
    assert [len(run.history) for run in whole] == [6, 6]
    assert not any(run.certificate.proved for run in whole)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        train_together(SHORT, [0, 5], progress=False, out=tmp_path)
    saved = torch.load(tmp_path / "seed-5" / "checkpoint.pt")
    assert len(saved["history"]) == 4
    gone_on = train_together(SHORT, [0, 5], progress=False, out=tmp_path, resume=True)
    assert [furthest(a, b) for a, b in zip(gone_on, whole)] == [0, 0]


def test_seeds_that_are_not_equally_far_do_not_go_on_together(tmp_path, interrupt):
    for seed in (0, 1):
        interrupt(2 + seed)
        with pytest.raises(KeyboardInterrupt):
            train_together(SHORT, [seed], progress=False, out=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints after \[3, 4\] steps"):
        train_together(SHORT, [0, 1], progress=False, out=tmp_path, resume=True)


def test_the_command_trains_several_seeds(tmp_path, capsys):
    assert (seeds("3"), seeds("2:4")) == ([3], [2, 3])
    code = main(["train", "--machine", "parity", "--seed", "2:4", "--steps", "4", "--out",
                 str(tmp_path)])
    said = capsys.readouterr()
    assert code == 2 and "not proved: seeds [2, 3]" in said.err
    for seed in (2, 3):
        assert f"parity, seed {seed}: loss " in said.out and ", not proved: " in said.out
        assert (tmp_path / f"seed-{seed}" / "checkpoint.pt").exists()
    for bad, named in {"4:4": "has 0 seeds: must have 1 .. 256", "a": "'a': must be a number, or",
                       "0:": "'0:': must be a number, or FIRST:END", ":8": "':8': must be a number",
                       "0:2000000000": "has 2,000,000,000 seeds: must have 1 .. 256"}.items():
        with pytest.raises(SystemExit) as ended:
            main(["train", "--machine", "parity", "--seed", bad, "--out", str(tmp_path / "none")])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "--seed" in said and named in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("recipe, given, named", [
    ("parity-extrapolating", [], "seeds = []"), ("parity-extrapolating", [1, 1], "seeds = [1, 1]"),
    ("parity-extrapolating", [0, -1], "seed = -1"),
    ("parity-extrapolating", range(2 * 10 ** 9), "seeds = 0, 1, ...: are 2,000,000,000; must be"),
    ("parity-seed", [0, 1], "recipe 'parity-seed': must have a machine"),
    *((recipe_for(machine("parity"), **{name: 0.1}), [0], f"{name} = 0.1")
      for name in ("config.dropout", "config.balance_rate", "config.balance_loss"))])
def test_what_cannot_be_trained_together_is_refused(recipe, given, named, tmp_path):
    with pytest.raises(ValueError, match="^" + re.escape(named)):
        train_together(recipe, given, out=tmp_path)
    assert not list(tmp_path.iterdir())
