"""Training by a recipe: with progress, interruptible, resumable to the same bits; and until it is
proved, if the recipe says what the model is to be.
"""
import json
import pickle
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from mythos_core.model.model import OpenMythos
from mythos_core.model.weights import whole
from mythos_core.proof.certificate import certify
from mythos_core.provenance import commit
from mythos_core.training.checkpoint import load, save, whole_steps
from mythos_core.training.folder import as_folder, claimed
from mythos_core.training.recipes import RECIPES, Recipe, get_recipe
from mythos_core.training.run import NotProved, Run, finished
from mythos_core.training.schedule import CERTIFY_EVERY, fall
from mythos_core.training.step import held_out, take_step

SAVE_EVERY = 100    # steps between checkpoints
EVAL_EVERY = 50     # steps between looks at held-out strings


def train(recipe: Recipe | str, seed: int = 0, device=None, progress: bool = True, out=None,
          resume: bool = False, overwrite: bool = False,
          observer: Callable[[Run], None] | None = None) -> Run:
    """Train a model by a recipe, or by the name of one.

    All randomness of step i comes from (seed, i), so that a resumed run is the
    uninterrupted one, bit for bit.

    Args:
        out: folder for checkpoint.pt (every 100 steps, at Ctrl-C and SIGTERM, at the end), and at
            the end for the model, as `save_pretrained` writes it, history.json, and of a
            proved model certificate.json. While the training runs, the lock on its training.lock
            keeps others out.
        resume: go on from `out`'s checkpoint, if there is one. It may be of fewer steps, if those
            taken are such as the recipe's more steps can follow.
        overwrite: remove first what another run left in `out`, the files in `folder.FILES`.
        observer: called with the run after each step, to draw it, say.

    Raises:
        FloatingPointError: the loss is not finite; names the step, and
            the last good checkpoint stays.
        KeyboardInterrupt: at Ctrl-C and SIGTERM, after the step that they came in, with the exit
            code: 130 or 143.
        NotProved: the recipe's steps are over before the certificate holds; the checkpoint stays.
        OSError: naming a checkpoint that is damaged, a file that cannot be written, or an `out`
            that cannot be a folder, or that another training writes to.
        ValueError: unknown recipe or device, no steps, no seed, a corpus too short for the
            recipe's windows, an `out` that has a run's files, or a checkpoint of another recipe or
            seed.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    check(recipe, seed, device)
    folder = None if out is None else as_folder(out)
    with claimed([folder] if folder else [], resume, overwrite):
        return train_claimed(recipe, seed, device, progress, folder, resume, observer)


def train_claimed(recipe: Recipe, seed: int, device=None, progress: bool = True,
                  out: Path | None = None, resume: bool = False,
                  observer: Callable[[Run], None] | None = None) -> Run:
    """`train` by a recipe that is checked, into a folder that is `claimed`."""
    checkpoint = out and out / "checkpoint.pt"
    with torch.random.fork_rng():
        run, optimizer = begin(recipe, seed, device, checkpoint, resume)
        with whole_steps(checkpoint) as stopped:
            _loop(run, optimizer, checkpoint, progress, stopped, observer or (lambda run: None))
    end(run, optimizer, checkpoint)
    return run


def begin(recipe: Recipe, seed: int, device, checkpoint: Path | None, resume: bool):
    """A run before its first step, or where its checkpoint is, and its optimiser."""
    torch.manual_seed(seed)
    run = Run(recipe, seed, OpenMythos(recipe.config).to(device))
    if recipe.contraction and recipe.config.dilation > 1:
        # balls have one radius: states of later loops must not shrink beside those of the first
        run.model.recurrent.loop_norm.requires_grad_(False)
    optimizer = torch.optim.AdamW(run.model.parameters(), recipe.lr, recipe.betas,
                                  weight_decay=recipe.weight_decay, fused=True)
    if resume and checkpoint and checkpoint.exists():
        load(checkpoint, run, optimizer)
    return run, optimizer


def end(run: Run, optimizer, checkpoint: Path | None):
    """Conclude a run, and write what it leaves beside its checkpoint."""
    run.model.eval()
    if checkpoint:
        save(checkpoint, run, optimizer)
    if run.recipe.machine is not None:
        _conclude(run)
    if not checkpoint:
        return
    out = checkpoint.parent
    run.model.save_pretrained(out, config={**vars(run.model.config),
                                           "provenance": provenance(run)})
    write(out / "history.json", json.dumps(run.history))
    if run.certificate:
        write(out / "certificate.json", json.dumps(run.certificate.summary()) + "\n")


def write(file: Path, text: str):
    """Write a file of text, as `whole` does."""
    with whole(file) as beside:
        beside.write_text(text, encoding="utf-8")


def check(recipe: Recipe, seed: int, device):
    """ValueError for what no training could begin with, naming it."""
    for name, value in {"steps": recipe.steps, "batch": recipe.batch}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if not 0 <= seed < 2 ** 32:
        raise ValueError(f"seed = {seed}: must be in 0 .. 2^32 - 1")
    if recipe.corpus is not None:
        for split in (recipe.strings, "validation"):
            recipe.corpus.require(split, recipe.lengths[1])
    try:
        meta = torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device = {device!r}: not one that can be used here: {reason}") from error
    if meta:
        raise ValueError(f"device = {device!r}: must be one that holds numbers")


def _conclude(run: Run):
    """The proof of a finished run's model, and in the model's place the one that it is about."""
    run.certificate = certify(run.model, run.recipe.machine, rounded=not run.recipe.contraction)
    if not run.certificate.proved:
        raise NotProved(f"{run.recipe.name}, seed {run.seed}: not proved in "
                        f"{len(run.history)} steps: {run.certificate.reason}", run)
    run.model = run.certificate.model


def train_all(jobs: list[tuple[Recipe | str, int]], progress: bool = True,
              device=None) -> list[Run]:
    """The runs of several (recipe, seed), in the order given: one for each of torch's
    threads at a time, in fresh processes of one thread each, so that the numbers do not
    depend on the machine's cores."""
    workers = min(len(jobs), torch.get_num_threads())
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        runs = pool.map(partial(_train_alone, device=device), *zip(*jobs))
        return [pickle.loads(run) for run in tqdm(runs, total=len(jobs), unit="run",
                                                  disable=not progress)]


def _train_alone(recipe: Recipe | str, seed: int, device) -> bytes:
    """A run pickled: tensors as numbers, not as handles on memory that ends with this process."""
    torch.set_num_threads(1)
    return pickle.dumps(train(recipe, seed, device, progress=False))


def provenance(run: Run) -> dict:
    """Where a model comes from: the commands that train it again, the commit it was
    trained at, and what it reached."""
    given = [row["recipe_steps"] for row in run.history if "recipe_steps" in row]
    return {
        "command": "; ".join(f"{_command(run)} --steps {steps} --out DIR{' --resume' * (i > 0)}"
                             for i, steps in enumerate([*given, run.recipe.steps])),
        "recipe": run.recipe.as_dict() | {"config": "the fields beside this one"},
        "seed": run.seed, "commit": commit(), "torch": torch.__version__,
        "metrics": {"steps": len(run.history)} | {
            name: run.history[-1][name] for name in ("loss", "accuracy", "held_out")}}


def _command(run: Run) -> str:
    """What trains the run's recipe, but for its steps and its folder."""
    recipe, name = run.recipe, shlex.quote(run.recipe.name)
    kind = (("--doubling " if recipe.config.dilation > 1 else "")
            + ("--contracting " if recipe.contraction else ""))
    what = (f"train --recipe {name}" if recipe.name in RECIPES
            else f"language --arm {name} --corpus {shlex.quote(recipe.corpus.name)} "
                 f"--dim {recipe.config.dim}" if recipe.corpus is not None
            else f"train {kind}--machine {shlex.quote(recipe.machine.name)}")
    return f"mythos {what} --seed {run.seed}"


def _loop(run: Run, optimizer, checkpoint, progress, stopped, observer):
    recipe, before = run.recipe, run.history[-1]["seconds"] if run.history else 0.0
    start, shown = time.perf_counter() - before, {}
    with tqdm(total=recipe.steps, initial=len(run.history), desc=f"{recipe.name} seed {run.seed}",
              disable=not progress) as bar:
        while not finished(run):
            step = len(run.history)
            row = {"step": step, **take_step(run, optimizer, step)}
            shown |= note(run, row, start)
            observer(run)
            bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['accuracy']:.2f}", **shown,
                            refresh=False)
            bar.update()
            if checkpoint and (stopped or (step + 1) % SAVE_EVERY == 0):
                save(checkpoint, run, optimizer)
            if stopped:
                raise KeyboardInterrupt(128 + stopped[0])


def note(run: Run, row: dict, start: float) -> dict[str, str]:
    """Append a step's row to the history, with a proof and a look at held-out strings where they
    are due; what a progress bar shows of those. `start`: time.perf_counter() at the first step."""
    run.history.append(row)
    proof = _attempt(run, row)
    shown = {"proof": proof} if proof else {}
    row["seconds"] = time.perf_counter() - start
    if len(run.history) % EVAL_EVERY == 0 or finished(run):
        row |= {"held_out": held_out(run.model, run.recipe),
                "router_bias": run.model.recurrent.block.ffn.router_bias.tolist()}
        shown["whole" if run.recipe.corpus is None else "bits"] = f"{row['held_out']:.2f}"
    return shown


def _attempt(run: Run, row: dict) -> str:
    """Try a proof after a step where that is due; what to show of it. In a fall
    it is due at the end only."""
    done, span = row["step"] + 1, fall(run.history)
    falling = span is not None and done < span[1]
    due = done % CERTIFY_EVERY == 0 and row["accuracy"] > 0.99 and not falling
    if run.recipe.machine is None or not (due or (span and done == span[1])):
        return ""
    # a loop that is to contract begins to where rounding would do
    rounded = not (run.recipe.contraction and span and done == span[1])
    certificate = certify(run.model, run.recipe.machine, rounded=rounded)
    row["proved"] = certificate.proved
    return f"{certificate.contexts} contexts, {certificate.wrong} wrong"
