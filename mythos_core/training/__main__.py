"""The command line of training: what a training takes is said before it starts.

    python -m mythos_core.training --recipe parity-extrapolating --seed 0 --out build/run
    python -m mythos_core.training --machine 'regex:(ab)*c' --seed 0 --out build/run
    python -m mythos_core.training --machine S3 --seed 0:8 --out build/eight
    python -m mythos_core.training --machine D4 --doubling --seed 0 --out build/doubling
    python -m mythos_core.training --machine S3 --contracting --seed 0 --out build/contracting
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from mythos_core import figures
from mythos_core.model.model import OpenMythos
from mythos_core.tasks.machines import machine
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
from mythos_core.training.together import train_together
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
    first, _, end = text.partition(":")
    numbers = list(range(int(first), int(end))) if end else [int(first)]
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text}: must have a seed")
    return numbers


def report(run: Run, out: Path):
    """Say how a run ended, and draw the automaton of one that is proved."""
    last, proof, left = run.history[-1], "", "weights"
    if run.certificate and run.certificate.proved:
        proof = (f", proved by {run.certificate.contexts} contexts "
                 f"with {len(run.certificate.codes)} "
                 f"{'balls' if run.recipe.contraction else 'codes'}")
        figures.draw_machine(run.certificate.machine).savefig(out / "automaton.png")
    elif run.certificate:
        proof, left = f", not proved: {run.certificate.reason}", "checkpoint"
    print(f"{run.recipe.name}, seed {run.seed}: loss {last['loss']:.5f}, "
          f"whole strings {last['held_out']:.3f}{proof}, "
          f"{last['seconds']:.1f} s; {left} in {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mythos_core.training",
                                     description="Train a recipe from scratch.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help=f"one of {sorted(RECIPES)}")
    what.add_argument("--machine", help="train until it is proved to be this machine, such as S3, "
                                        "even-pairs, divisible-by-7, or 'regex:(ab)*c'")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--doubling", action="store_true",
                      help="train a loop for --machine that doubles its reach with each loop, not "
                           "a strict one")
    loop.add_argument("--contracting", action="store_true",
                      help="train a strict loop for --machine that is proved without rounding")
    parser.add_argument("--seed", type=seeds, default=[0], metavar="SEED",
                        help="a number; or of a machine's recipe FIRST:END, trained together, each "
                             "into its own folder of --out")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--device")
    parser.add_argument("--out", required=True,
                        help="folder for checkpoint, weights, history, certificate and the "
                             "picture of the automaton")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(argv)
    try:
        make = (doubling_recipe if args.doubling else
                contracting_recipe if args.contracting else recipe_for)
        recipe = get_recipe(args.recipe) if args.recipe else make(machine(args.machine))
        recipe = replace(recipe, **({} if args.steps is None else {"steps": args.steps}))
        check(recipe, args.seed[0], args.device)
        seconds = pace(recipe, args.device)
        if recipe.config.dilation > 1:
            elements = len(recipe.machine.monoid())
            print(f"{recipe.name}: {elements:,} elements, {elements ** 2 + elements:,} products")
        print(f"{recipe.name}: at most {recipe.steps:,} steps, which take "
              f"{recipe.steps * seconds / 60:.1f} minutes here for one seed")
        how = dict(device=args.device, out=args.out, resume=args.resume)
        if len(args.seed) == 1:
            report(train(recipe, *args.seed, **how), Path(args.out))
            return
        runs = train_together(recipe, args.seed, **how)
    except (ValueError, OSError, FloatingPointError, NotProved) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; go on with --resume (checkpoint in {args.out})\n")
    for run in runs:
        report(run, Path(args.out, f"seed-{run.seed}"))
    failed = [run.seed for run in runs if not run.certificate.proved]
    if failed:
        parser.exit(2, f"{parser.prog}: not proved: seeds {failed}\n")


if __name__ == "__main__":
    main()
