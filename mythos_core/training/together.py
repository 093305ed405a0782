"""Several seeds of a machine's training at once, their parameters stacked in one graph.

A step of a small model is hundreds of small operations, each of which costs more to begin than to
do. On a stack of models each is begun once for all, and is large enough for a second thread.
"""
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from mythos_core.training import trainer
from mythos_core.training.checkpoint import save, whole_steps
from mythos_core.training.folder import as_folder, claimed
from mythos_core.training.losses import (
    center_loss,
    mean_loss,
    move_weights,
    numbered,
    state_loss,
)
from mythos_core.training.recipes import Recipe, get_recipe
from mythos_core.training.run import NotProved, Run, falling, finished
from mythos_core.training.schedule import draw
from mythos_core.training.step import begin_step, disturbance, end_step, settled

MOST_SEEDS = 256    # at once: their parameters are all in memory


def train_together(recipe: Recipe | str, seeds: Sequence[int], device=None, progress: bool = True,
                   out=None, resume: bool = False, overwrite: bool = False) -> list[Run]:
    """`train` by a machine's recipe with each of the seeds: the same steps to rounding, which adds
    up over a training.

    Each seed draws its own strings and noise, as it does alone; their length is the step's. A seed
    that is finished leaves the stack.

    Args:
        out: folder; what `train` writes of a seed is in its folder "seed-SEED".
        resume: go on from the checkpoints there.
        overwrite: remove first what other runs left in the folders of these seeds.

    Returns:
        The runs, in the order of `seeds`. One that is not proved in the recipe's steps is no error
        here: its certificate says what stands against it.

    Raises:
        ValueError: no seeds, more than `MOST_SEEDS`, one twice, checkpoints of unfinished seeds
            after different steps, a recipe whose loop is not a machine's, settled, without dropout
            and balancing; and as `train`, like FloatingPointError, KeyboardInterrupt and OSError.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    _check(recipe, seeds, device)
    folders = [] if out is None else seed_folders(out, seeds)
    checkpoints = [folder / "checkpoint.pt" for folder in folders] or [None] * len(seeds)
    with claimed(folders, resume, overwrite), torch.random.fork_rng():
        started = [trainer.begin(recipe, seed, device, checkpoint, resume)
                   for seed, checkpoint in zip(seeds, checkpoints)]
        stack = [(*both, checkpoint) for both, checkpoint in zip(started, checkpoints)]
        with whole_steps(checkpoints[0]) as stopped:
            _loop(recipe, stack, progress, stopped)
    return [run for run, _ in started]


def seed_folders(out, seeds: Sequence[int]) -> list[Path]:
    """The folder of each seed; ValueError where `out` is empty."""
    return [as_folder(out) / f"seed-{seed}" for seed in seeds]


def _check(recipe: Recipe, seeds, device):
    if len(seeds) > MOST_SEEDS:
        raise ValueError(f"seeds = {seeds[0]}, {seeds[1]}, ...: are {len(seeds):,}; must be at "
                         f"most {MOST_SEEDS}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {seeds}: must be at least one, each once")
    for seed in seeds:
        trainer.check(recipe, seed, device)
    config = recipe.config
    if recipe.machine is None or recipe.loops is not None or recipe.reach:
        raise ValueError(f"recipe {recipe.name!r}: must have a machine, and loops and reach None")
    if recipe.contraction:
        raise ValueError(f"contraction = {recipe.contraction}: must be 0 where several seeds are "
                         "trained together")
    for name in ("dropout", "balance_rate", "balance_loss"):
        if getattr(config, name):
            raise ValueError(f"config.{name} = {getattr(config, name)}: must be 0 where several "
                             "seeds are trained together")


def _loop(recipe: Recipe, stack: list[tuple], progress: bool, stopped: list):
    """Steps until every run of the stack of (run, optimiser, checkpoint) is finished."""
    stack = _leave(stack)
    steps = {len(run.history) for run, *_ in stack}
    if len(steps) > 1:
        raise ValueError(f"checkpoints after {sorted(steps)} steps: seeds that go on together must "
                         "be equally far; resume each with `train`")
    before = max((run.history[-1]["seconds"] for run, *_ in stack if run.history), default=0.0)
    start, seeds = time.perf_counter() - before, len(stack)
    with tqdm(total=recipe.steps, initial=max(steps, default=0), disable=not progress,
              desc=f"{recipe.name}, {seeds} seeds") as bar:
        while stack:
            runs, optimizers, _ = zip(*stack)
            rows = step_together(runs, optimizers)
            shown = [trainer.note(run, row, start) for run, row in zip(runs, rows)]
            stack = _leave(stack)
            if stopped or rows[0]["step"] % trainer.SAVE_EVERY == trainer.SAVE_EVERY - 1:
                _save(stack)
            if stopped and stack:
                raise KeyboardInterrupt(128 + stopped[0])
            proof = [said["proof"] for said in shown if "proof" in said] or [""]
            bar.set_postfix(loss=f"{max(row['loss'] for row in rows):.4f}", proof=proof[0],
                            finished=seeds - len(stack), refresh=False)
            bar.update()


def _leave(stack):
    """The stack without the runs that are finished, which are concluded and written."""
    for run, optimizer, checkpoint in stack:
        if finished(run):
            with suppress(NotProved):                            # the certificate says it
                trainer.end(run, optimizer, checkpoint)
    return [one for one in stack if not finished(one[0])]


def _save(stack):
    for run, optimizer, checkpoint in stack:
        if checkpoint:
            save(checkpoint, run, optimizer)


def step_together(runs: Sequence[Run], optimizers: Sequence) -> list[dict]:
    """One optimiser step of each run, all after equally many; their losses and token accuracies."""
    step = len(runs[0].history)
    batches = [_drawn(run, optimizer) for run, optimizer in zip(runs, optimizers)]
    labels = max(int(batch["label"].max()) for batch in batches) + 1
    together = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    fallen, apart = any(falling(run) for run in runs), runs[0].recipe.state_loss

    def loss_of(parameters, batch):
        h, logits = functional_call(model, parameters, (
            batch["ids"], batch["label"], batch.get("noise"), batch["common"]))
        weight = batch["weight"].flatten() if "weight" in batch else None
        loss = mean_loss(logits.flatten(0, 1), batch["targets"].flatten(), weight)
        if fallen:
            loss = loss + batch["center"] * center_loss(h, batch["label"], labels)
        if apart:
            loss = loss + apart * state_loss(h, batch["label"], labels)
        return loss, logits.argmax(-1)

    model = _Settled(runs[0].model.eval(), labels)
    named = [dict(run.model.named_parameters(prefix="model")) for run in runs]
    parameters = {name: torch.stack([of[name].detach() for of in named]).requires_grad_()
                  for name in named[0]}
    losses, answers = vmap(loss_of)(parameters, together)
    losses.sum().backward()
    rows = []
    for i, (run, optimizer) in enumerate(zip(runs, optimizers)):
        for name, parameter in named[i].items():
            gradient = parameters[name].grad
            parameter.grad = None if gradient is None else gradient[i]
        right = answers[i] == batches[i]["targets"]
        rows.append({"step": step, **end_step(run, optimizer, step, losses[i], right)})
    return rows


class _Settled(nn.Module):
    """`settled` as the forward pass of a module, as `functional_call` needs it. The model is in
    eval mode, in which torch.func knows all of it; what training adds is given."""

    def __init__(self, model, labels: int):
        super().__init__()
        self.model, self.labels = model, labels

    def forward(self, ids, label, noise, common):
        return settled(self.model, ids, label, self.labels, noise, common)


def _drawn(run: Run, optimizer) -> dict[str, Tensor]:
    """What a run's next step draws and asks, (batch, seq) each but the noise and the factor
    `center` of the center loss; `noise` and `weight` only if the recipe has them."""
    recipe, step = run.recipe, len(run.history)
    begin_step(run, optimizer, step)
    length, _ = draw(recipe, step)
    ids, targets = recipe.make_batch(recipe.batch, length, strings=recipe.strings,
                                     device=run.model.embed.weight.device)
    noise, common = disturbance(recipe, ids)
    batch = {"ids": ids, "targets": targets, "label": numbered(recipe.machine.outcomes(ids))[0],
             "common": common,
             "center": torch.tensor(recipe.center_loss * falling(run), device=ids.device)}
    if noise is not None:
        batch["noise"] = noise
    if recipe.balanced:
        batch["weight"] = move_weights(recipe.machine, ids)
    return batch
