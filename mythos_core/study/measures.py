"""One run of the study: a variant trained with a seed, and what is measured of it."""
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch

from mythos_core import study
from mythos_core.study.exits import exits_row
from mythos_core.study.gru import balls_row
from mythos_core.study.parity import accuracy_row, experts_row, generation_row, reach_row
from mythos_core.study.peers import peer_row
from mythos_core.study.proofs import (
    check_arithmetic,
    far_row,
    ladder_row,
    looping_row,
    proof_row,
    staircase_row,
)
from mythos_core.study.reference import reference_row
from mythos_core.study.states import states_row, train_gru
from mythos_core.training import NotProved, Run, train

#: What is measured of a finished training, by name. "pace" is in every row: how long it took.
MEASURES: dict[str, Callable[..., dict]] = {
    "ablations": accuracy_row, "reach": reach_row, "exits": exits_row, "experts": experts_row,
    "generation": generation_row, "proofs": proof_row, "machines": proof_row, "ladder": ladder_row,
    "doubling": proof_row, "contracting": proof_row, "staircase": staircase_row, "far": far_row,
    "states": states_row, "gru": states_row,
    "pace": lambda run: {"threads": torch.get_num_threads()}}
#: What trains for itself, by (peer, recipe, seed, device): not ours, or not by its own recipe.
ALONE: dict[str, Callable[..., dict]] = {
    "peers": peer_row, "looping": lambda peer, *rest: looping_row(*rest),
    "gru_balls": lambda peer, *rest: balls_row(*rest),
    "reference": lambda peer, recipe, *rest: reference_row(peer, recipe.machine, *rest)}


def row_of(variant: str, seed: int, measure: str, *, steps: int | None = None,
           runs: str | None = None, arithmetic: str = "native", peer: str = "GRU",
           device: str | None = None) -> dict:
    """Train one variant with one seed and measure it, on the CPU; a row of the study.

    Args:
        variant: see `study.variant`.
        measure: one of `MEASURES` or of `ALONE`.
        steps: instead of the recipe's own number.
        runs: folder to keep trained models in: another measure then finds them trained.
        arithmetic: of "proofs", "doubling" and "contracting": one of `proofs.ARITHMETICS`, which
            the environment must have.
        peer: of "peers": one of `peers.PEERS`; of "reference": of `reference.TRAINED`.
        device: to train on; None: the CPU.

    Raises:
        ValueError: naming what is not known here, before any training.
    """
    if measure not in {**MEASURES, **ALONE}:
        raise ValueError(f"measure = {measure!r}: must be one of {sorted({**MEASURES, **ALONE})}")
    if measure in ("proofs", "doubling", "contracting"):
        check_arithmetic(arithmetic)
    recipe = study.variant(variant)
    recipe = replace(recipe, steps=steps) if steps else recipe
    if measure in ALONE:
        if recipe.machine is None:
            raise ValueError(f"variant = {variant!r}: must be of a machine for "
                             f"measure = {measure!r}")
        return ALONE[measure](peer, recipe, seed, device)
    run: Run | NotProved | SimpleNamespace
    try:
        folder = f"{runs}/{variant}, seed {seed}" if runs else None
        run = (train_gru(recipe, seed, device) if measure == "gru"
               else train(recipe, seed, device, progress=False, out=folder, resume=True))
    except NotProved as failed:
        run = failed
    for model in models_of(run):
        model.cpu()
    row = MEASURES[measure](run)
    if not isinstance(run, NotProved):
        row |= {"when_whole": when_whole(run), "train_seconds": run.history[-1].get("seconds"),
                "parameters": sum(p.numel() for p in run.model.parameters())}
    return row | {"recipe": recipe.as_dict()}


def models_of(run: Run | NotProved | SimpleNamespace) -> list[torch.nn.Module]:
    """The trained model, and the rounded one that its certificate is about."""
    run = run.run if isinstance(run, NotProved) else run
    return [owner.model for owner in (run, getattr(run, "certificate", None)) if owner is not None]


def when_whole(run: Run | SimpleNamespace) -> dict:
    """Step and seconds at which held-out strings of the longest trained length were `first` all
    whole, and from which on they `stayed` so."""
    rows = [row for row in run.history if "held_out" in row]
    first = [row for row in rows if row["held_out"] == 1.0]
    stayed = [row for i, row in enumerate(rows)
              if all(later["held_out"] == 1.0 for later in rows[i:])]
    return {name: {key: whole[0][key] for key in ("step", "seconds")} if whole else None
            for name, whole in (("first", first), ("stayed", stayed))}
