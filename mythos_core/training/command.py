"""The command `mythos train`: what a training takes is said before it starts.

    mythos train --recipe parity-extrapolating --seed 0 --out build/run
    mythos train --machine 'regex:(ab)*c' --seed 0 --out build/run
    mythos train --machine S3 --seed 0:8 --out build/eight
    mythos train --machine D4 --doubling --seed 0 --out build/doubling
    mythos train --machine S3 --contracting --seed 0 --out build/contracting
"""
import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mythos_core import figures
from mythos_core.model.model import OpenMythos
from mythos_core.model.weights import whole
from mythos_core.tasks.machines import machine
from mythos_core.training.folder import add_options, as_folder, require_free
from mythos_core.training.recipes import (
    RECIPES,
    Recipe,
    contracting_recipe,
    doubling_recipe,
    get_recipe,
    recipe_for,
)
from mythos_core.training.run import NotProved, Run
from mythos_core.training.step import take_step
from mythos_core.training.together import MOST_SEEDS, seed_folders, train_together
from mythos_core.training.trainer import check, train


def pace(recipe: Recipe, device=None) -> float:
    """Seconds that a step takes here, of a model that is thrown away."""
    with torch.random.fork_rng():
        run = Run(recipe, 0, OpenMythos(recipe.config).to(device))
        optimizer = torch.optim.AdamW(run.model.parameters(), recipe.lr)
        for _ in range(2):                                       # the first one warms up
            start = time.perf_counter()
            take_step(run, optimizer, recipe.steps - 1)
    return time.perf_counter() - start


def seeds(text: str) -> list[int]:
    """"3" is [3], and "0:8" is 0 to 7."""
    first, colon, end = text.partition(":")
    try:
        begin = int(first)
        behind = int(end) if colon else begin + 1
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a number, or FIRST:END such as 0:8") from error
    if not 1 <= behind - begin <= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r}: has {max(0, behind - begin):,} seeds: must "
                                         f"have 1 .. {MOST_SEEDS}")
    return list(range(begin, behind))


def report(run: Run, out: Path):
    """Say how a run ended, and draw the automaton of one that is proved."""
    last, proof, left = run.history[-1], "", "weights"
    if run.certificate and run.certificate.proved:
        proof = (f", proved by {run.certificate.contexts} contexts "
                 f"with {len(run.certificate.codes)} "
                 f"{'balls' if run.recipe.contraction else 'codes'}")
        with whole(out / "automaton.png") as beside:
            figures.draw_machine(run.certificate.machine).savefig(beside, format="png")
    elif run.certificate:
        proof, left = f", not proved: {run.certificate.reason}", "checkpoint"
    print(f"{run.recipe.name}, seed {run.seed}: loss {last['loss']:.5f}, "
          f"whole strings {last['held_out']:.3f}{proof}, "
          f"{last['seconds']:.1f} s; {left} in {out}")


def run(args) -> int:
    """Train what is asked for; 2 if it is not proved."""
    try:
        runs = _train(args)
    except NotProved as error:
        print(error, file=sys.stderr)
        return 2
    failed = [run.seed for run in runs if run.certificate and not run.certificate.proved]
    if failed:
        print(f"not proved: seeds {failed}", file=sys.stderr)
    return 2 if failed else 0


def _train(args) -> list[Run]:
    """The runs that are asked for, each reported."""
    recipe, one = _recipe(args), len(args.seed) == 1
    check(recipe, args.seed[0], args.device)
    folders = [as_folder(args.out)] if one else seed_folders(args.out, args.seed)
    for folder in folders:
        require_free(folder, args.resume, args.overwrite)
    seconds = pace(recipe, args.device)
    if recipe.config.dilation > 1:
        elements = len(recipe.machine.monoid())
        print(f"{recipe.name}: {elements:,} elements, {elements ** 2 + elements:,} products")
    print(f"{recipe.name}: at most {recipe.steps:,} steps, which take "
          f"{recipe.steps * seconds / 60:.1f} minutes here for one seed")
    how = dict(device=args.device, out=args.out, resume=args.resume, overwrite=args.overwrite)
    runs = [train(recipe, *args.seed, **how)] if one else train_together(recipe, args.seed, **how)
    for run, folder in zip(runs, folders):
        report(run, folder)
    return runs


def _recipe(args) -> Recipe:
    """The recipe that is asked for."""
    make = (partial(contracting_recipe, doubling=args.doubling) if args.contracting else
            doubling_recipe if args.doubling else recipe_for)
    recipe = get_recipe(args.recipe) if args.recipe else make(machine(args.machine))
    return recipe if args.steps is None else replace(recipe, steps=args.steps)


def options(parser: argparse.ArgumentParser):
    """What is to be trained, and where."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help=f"one of {sorted(RECIPES)}")
    what.add_argument("--machine", help="train until it is proved to be this machine, such as S3, "
                                        "even-pairs, divisible-by-7, or 'regex:(ab)*c'")
    parser.add_argument("--doubling", action="store_true",
                        help="train a loop for --machine that doubles its reach with each loop, "
                             "not a strict one")
    parser.add_argument("--contracting", action="store_true",
                        help="train a loop for --machine that is proved without rounding")
    parser.add_argument("--seed", type=seeds, default=[0], metavar="SEED",
                        help="a number; or of a machine's recipe FIRST:END, trained together, each "
                             f"into its own folder of --out, at most {MOST_SEEDS}")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--device", help="to train on, such as cuda; default the CPU")
    parser.add_argument("--out", required=True,
                        help="folder for checkpoint, weights, history, certificate and the "
                             "picture of the automaton")
    add_options(parser)
