"""Training by a recipe: with progress, interruptible, resumable to the same bits; and until it is
proved, if the recipe says what the model is to be.
"""
import json
import pickle
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from mythos_core.automaton import NOT_ASKED
from mythos_core.certificate import Certificate, certify
from mythos_core.checkpoint import load, save, whole_steps
from mythos_core.losses import bits, center_loss, handing_on, mean_loss, move_weights, ponder
from mythos_core.model import OpenMythos
from mythos_core.provenance import commit
from mythos_core.recipes import RECIPES, Recipe, get_recipe
from mythos_core.training.schedule import CERTIFY_EVERY, draw, fall, learning_rate

SAVE_EVERY = 100    # steps between checkpoints
EVAL_EVERY = 50     # steps between looks at held-out strings


class NotProved(RuntimeError):
    """A recipe's steps are over, and the model is not proved; says what stands against it. `run` is
    the training: its model as it was left, and the certificate that does not hold."""

    def __init__(self, words: str, run: "Run | None" = None):
        super().__init__(words)
        self.run = run

    def __reduce__(self):                # to another process the words alone: it may be a large run
        return NotProved, self.args


@dataclass
class Run:
    """A training run: the model, and one row a step: step, loss, accuracy (token, on scored
    positions of the batch), seconds since the start, and at every 50th step and the last
    `router_bias` and `held_out`: whole-string accuracy on 256 fresh uniform strings of the longest
    length at the most loops, or of a recipe with a corpus bits per byte on 64 of its validation
    windows; at attempts at a proof `proved`.

    Of a recipe with a machine, `certificate` is the proof, and `model` the one that it is about,
    its states rounded to codes.
    """

    recipe: Recipe
    seed: int
    model: OpenMythos
    history: list[dict] = field(default_factory=list)
    certificate: Certificate | None = None


def train(recipe: Recipe | str, seed: int = 0, device=None, progress: bool = True, out=None,
          resume: bool = False) -> Run:
    """Train a model by a recipe, or by the name of one.

    All randomness of step i comes from (seed, i), so that a resumed run is the
    uninterrupted one, bit for bit.

    Args:
        out: folder for checkpoint.pt (every 100 steps, at Ctrl-C and SIGTERM, at the end), and at
            the end for the model, as `save_pretrained` writes it, history.json, and of a
            proved model certificate.json.
        resume: go on from `out`'s checkpoint, if there is one.

    Raises:
        FloatingPointError: the loss is not finite; names the step, and
            the last good checkpoint stays.
        KeyboardInterrupt: at Ctrl-C and SIGTERM, after the step that they came in.
        NotProved: the recipe's steps are over before the certificate holds; the checkpoint stays.
        OSError: naming a checkpoint that is damaged, or an `out` that cannot be a folder.
        ValueError: unknown recipe or device, no steps, no seed, or a checkpoint of another
            recipe or seed.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    check(recipe, seed, device)
    checkpoint = Path(out) / "checkpoint.pt" if out else None
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        run = Run(recipe, seed, OpenMythos(recipe.config).to(device))
        optimizer = torch.optim.AdamW(run.model.parameters(), recipe.lr, recipe.betas,
                                      weight_decay=recipe.weight_decay, fused=True)
        if resume and checkpoint and checkpoint.exists():
            load(checkpoint, run, optimizer)
        with whole_steps(checkpoint) as stopped:
            _loop(run, optimizer, checkpoint, progress, stopped)
    if out:
        save(checkpoint, run, optimizer)
    if recipe.machine is not None:
        _conclude(run)
    if out:
        run.model.save_pretrained(out, config={**vars(run.model.config),
                                               "provenance": provenance(run)})
        Path(out, "history.json").write_text(json.dumps(run.history), encoding="utf-8")
        if run.certificate:
            Path(out, "certificate.json").write_text(
                json.dumps(run.certificate.summary(), indent=1) + "\n", encoding="utf-8")
    return run


def check(recipe: Recipe, seed: int, device):
    """ValueError for what no training could begin with, naming it."""
    for name, value in {"steps": recipe.steps, "batch": recipe.batch}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if not 0 <= seed < 2 ** 32:
        raise ValueError(f"seed = {seed}: must be in 0 .. 2^32 - 1")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device = {device!r}: not one that can be used here: {reason}") from error


def _conclude(run: Run):
    """The proof of a finished run's model, and in the model's place the one that it is about."""
    run.certificate = certify(run.model, run.recipe.machine)
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
    """Where a model comes from: the command that trains it again, the commit it was
    trained at, and what it reached."""
    recipe, name = run.recipe, shlex.quote(run.recipe.name)
    what = (f"training --recipe {name}" if recipe.name in RECIPES
            else f"training --machine {name}" if recipe.corpus is None
            else f"language --arm {name} --corpus {shlex.quote(recipe.corpus.name)} "
                 f"--dim {recipe.config.dim} --steps {recipe.steps}")
    return {
        "command": f"python -m mythos_core.{what} --seed {run.seed} --out DIR",
        "recipe": run.recipe.as_dict() | {"config": "the fields beside this one"},
        "seed": run.seed, "commit": commit(), "torch": torch.__version__,
        "metrics": {"steps": len(run.history)} | {
            name: run.history[-1][name] for name in ("loss", "accuracy", "held_out")}}


def _loop(run: Run, optimizer, checkpoint, progress, stopped):
    recipe, before = run.recipe, run.history[-1]["seconds"] if run.history else 0.0
    start, shown = time.perf_counter() - before, {}
    with tqdm(total=recipe.steps, initial=len(run.history), desc=f"{recipe.name} seed {run.seed}",
              disable=not progress) as bar:
        while not finished(run):
            step = len(run.history)
            torch.manual_seed((run.seed * 1_000_003 + step + 1) % 2 ** 32)
            row = {"step": step, **take_step(run, optimizer, step)}
            run.history.append(row)
            shown["proof"] = _attempt(run, row) or shown.get("proof", "")
            row["seconds"] = time.perf_counter() - start
            if (step + 1) % EVAL_EVERY == 0 or finished(run):
                row |= {"held_out": held_out(run.model, recipe),
                        "router_bias": run.model.recurrent.block.ffn.router_bias.tolist()}
                shown["whole" if recipe.corpus is None else "bits"] = f"{row['held_out']:.2f}"
            said = {name: text for name, text in shown.items() if text}
            bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['accuracy']:.2f}", **said,
                            refresh=False)
            bar.update()
            if checkpoint and (stopped or (step + 1) % SAVE_EVERY == 0):
                save(checkpoint, run, optimizer)
            if stopped:
                raise KeyboardInterrupt
    run.model.eval()


def finished(run: Run) -> bool:
    """Whether the run's steps are over, or its proof holds at the end of a fall."""
    if len(run.history) >= run.recipe.steps:
        return True
    span = fall(run.history)
    return span is not None and len(run.history) == span[1] and run.history[-1].get("proved", False)


def _attempt(run: Run, row: dict) -> str:
    """Try a proof after a step where that is due; what to show of it. In a fall
    it is due at the end only."""
    done, span = row["step"] + 1, fall(run.history)
    falling = span is not None and done < span[1]
    due = done % CERTIFY_EVERY == 0 and row["accuracy"] > 0.99 and not falling
    if run.recipe.machine is None or not (due or (span and done == span[1])):
        return ""
    certificate = certify(run.model, run.recipe.machine)
    row["proved"] = certificate.proved
    return f"{certificate.contexts} contexts, {certificate.wrong} wrong"


def take_step(run: Run, optimizer, step) -> dict:
    """One optimiser step; its loss and token accuracy."""
    model, recipe = run.model, run.recipe
    model.train()
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(recipe, step, fall(run.history))
    length, n_loops = draw(recipe, step)
    ids, targets = recipe.make_batch(recipe.batch, length, strings=recipe.strings,
                                     device=model.embed.weight.device)
    scored = length
    if recipe.reach:
        scored = min(length, int(recipe.reach * sum(recipe.config.shift_growth ** t
                                                    for t in range(n_loops))))
    logits, also = _settled(run, ids) if n_loops is None else _looped(run, ids, n_loops)
    logits, targets = logits[:, :scored].flatten(0, 1), targets[:, :scored].flatten()
    weight = move_weights(recipe.machine, ids)[:, :scored].flatten() if recipe.balanced else None
    loss = (mean_loss(logits, targets, weight) + also
            + recipe.config.balance_loss * model.recurrent.block.ffn.imbalance)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss = {loss.item()} at step {step} of recipe {recipe.name}")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    model.recurrent.block.ffn.balance()
    return {"loss": loss.item(), "accuracy": (logits.argmax(-1) == targets).float().mean().item()}


def _looped(run: Run, ids, n_loops):
    """Logits after so many loops, and what is added to their loss."""
    records = []
    logits = run.model(ids, n_loops, observer=records.append)
    if not run.recipe.ponder_cost:
        return logits, 0.0
    return logits, run.recipe.ponder_cost * ponder(
        torch.stack([record.halt_weight for record in records]))


def _settled(run: Run, ids):
    """Logits of the settled states, and what is added to their loss."""
    model, recipe, span = run.model, run.recipe, fall(run.history)
    ctx, states = model.context(ids), recipe.machine.outcomes(ids)
    h = model.recurrent.settle(model.encode(ids, ctx), handing_on(recipe.handed_on, states))
    falling = span is not None and span[0] <= len(run.history) < span[1]
    return model.decode(h, ctx), recipe.center_loss * center_loss(h, states) if falling else 0.0


@torch.no_grad()
def held_out(model: OpenMythos, recipe: Recipe, batch: int = 256) -> float:
    """Whole-string accuracy on fresh uniform strings of the longest trained length,
    at the most trained loops, where nothing is asked nothing being wrong; of a corpus bits per byte
    on validation windows, a quarter as many."""
    device, n_loops = model.embed.weight.device, recipe.loops and recipe.loops[1]
    if recipe.corpus is not None:
        ids, targets = recipe.corpus.windows("validation", recipe.lengths[1], batch // 4, device)
        return bits(model.eval()(ids, n_loops), targets).mean().item()
    generator = torch.Generator().manual_seed(2 ** 32 - 1)   # no training step has this seed
    ids, targets = recipe.make_batch(batch, recipe.lengths[1], generator, device)
    right = (model.eval()(ids, n_loops).argmax(-1) == targets) | (targets == NOT_ASKED)
    return right.all(1).cpu().float().mean().item()  # on a GPU a mean of ones may be below 1
