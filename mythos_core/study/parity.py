"""Measures of trainings on parity: how long a string is right, in how many loops; how experts are
used; what is generated. Each takes a finished training and returns a dict."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.probes import (
    depth_sweep,
    expert_load,
    load_entropy,
    logits_after,
    max_violation,
)
from mythos_core.study import fresh_strings
from mythos_core.tasks.parity import answers, continuation, make_batch, structured
from mythos_core.training import Run
from mythos_core.training.recipes import Recipe

# loops given to strings of each length
LOOPS = {16: 32, 64: 96, 256: 300, 512: 600, 1024: 1100}
TOKENS = 2048  # of a pass: what they need between two operations stays in the processor's cache


def loops_for(recipe: Recipe, length: int) -> int:
    """Loops given to strings of a length: one if the recipe does not loop."""
    return 1 if recipe.loops[1] == 1 else LOOPS[length]


@torch.no_grad()
def right(model: OpenMythos, ids: Int[Tensor, "batch seq"],
          loops: list[int]) -> Bool[Tensor, "loops batch seq"]:
    """Which answers are right after each of these numbers of loops, from one pass of the
    largest; on the CPU."""
    ids = ids.to(model.embed.weight.device)
    if ids.numel() > TOKENS and len(ids) > 1:
        return torch.cat([right(model, part, loops)
                          for part in ids.split(max(1, TOKENS // ids.shape[1]))], 1)
    predicted = [logits.argmax(-1) for logits in logits_after(model, ids, loops)]
    return (torch.stack(predicted) == answers(ids)).cpu()


def whole_strings(model: OpenMythos, length: int, n_loops: int, strings: int = 16) -> float:
    """Share of `fresh_strings` that are right at every position."""
    return right(model, fresh_strings(length, strings), [n_loops]).all(2).float().mean().item()


def accuracy_row(run: Run) -> dict:
    """Whole-string accuracy at 16, 64, 256 and 512 bits; token accuracy as trained (longest length,
    most loops) and the loops executed there when max_loop_iters are asked for; loops needed at 64
    bits (mean over strings; None if some never are whole)."""
    loops = {length: loops_for(run.recipe, length) for length in (16, 64, 256, 512)}
    trained = depth_sweep(run.model, *make_batch(256, run.recipe.lengths[1],
                                                 torch.Generator().manual_seed(2 ** 31)),
                          run.recipe.config.max_loop_iters)
    ids = make_batch(16, 64, torch.Generator().manual_seed(64))[0]
    needed = depth_sweep(run.model, ids, answers(ids), loops[64]).loops_needed.amax(1)
    return {"whole": {str(length): whole_strings(run.model, length, n)
                      for length, n in loops.items()},
            "loops": {str(k): v for k, v in loops.items()},
            "token": trained.token[run.recipe.loops[1] - 1].item(),
            "executed": int(trained.executed[-1]),
            "needed": needed.float().mean().item() if needed.max() <= loops[64] else None}


def reach_row(run: Run) -> dict:
    """Random strings to 1,024 bits; structured ones at 2 and 3 times the span of their length;
    loops needed to 256 bits."""
    model, recipe = run.model, run.recipe
    row: dict[str, dict] = {name: {} for name in ("whole", "structured", "needed", "whole_4x")}
    for length in (16, 512, 1024):
        row["whole"][str(length)] = whole_strings(model, length, loops_for(recipe, length))
    for length in (16, 64, 256, 512, 1024):
        ids, loops = torch.cat(list(structured(length).values())), span(recipe, length)
        for times, whole in zip((2, 3), right(model, ids, [2 * loops, 3 * loops]).all(2).tolist()):
            row["structured"][f"{length} bits, {times}x"] = dict(zip(structured(length), whole))
    for length in (16, 32, 64, 128, 256):
        strings = {"random": make_batch(16, length, torch.Generator().manual_seed(length))[0],
                   **structured(length)}
        sweeps = {name: depth_sweep(model, ids, answers(ids), 2 * span(recipe, length))
                  for name, ids in strings.items()}
        row["needed"][str(length)] = {name: sweep.loops_needed.amax(1).float().mean().item()
                                      for name, sweep in sweeps.items()}
        row["whole_4x"][str(length)] = whole_strings(model, length,
                                                     4 * int(sweeps["random"].loops_needed.max()))
    return row


def experts_row(run: Run) -> dict:
    """Accuracy; the load on 256 strings as long as trained, with the most loops: max violation, its
    mean over loops, entropy, share by expert; the routing bias along the training."""
    recipe = run.recipe
    ids = make_batch(256, recipe.lengths[1], torch.Generator().manual_seed(2 ** 31))[0]
    load = expert_load(run.model, ids, recipe.loops[1])
    return {**accuracy_row(run), "violation": max_violation(load),
            "violation_by_loop": sum(map(max_violation, load)) / len(load),
            "entropy": load_entropy(load), "share": (load.sum((0, 1)) / load.sum()).tolist(),
            "bias": {str(row["step"] + 1): row["router_bias"]
                     for row in run.history if "router_bias" in row}}


def continued(model: OpenMythos, ids: Int[Tensor, "batch seq"], n_loops: int,
              cache_loops: int | None) -> float:
    """Share of prompts continued by exactly the 8 right tokens."""
    new = model.generate(ids, 8, n_loops, 0.0, cache_loops=cache_loops)[:, ids.shape[1]:]
    return (new == continuation(ids, 8)).all(1).float().mean().item()


def generation_row(run: Run) -> dict:
    """Exact continuations of 16 prompts by prompt length, loops and cache entries for the loop
    (None: one for each)."""
    rows = []
    for length in (8, 16, 32, 64, 128, 256):
        for loops in (length // 4, length // 2, length, 2 * length):
            for cache_loops in (None, *(k for k in (1, 2, 4) if k <= loops)):
                exact = continued(run.model, fresh_strings(length), loops, cache_loops)
                rows.append({"bits": length, "loops": loops, "cache_loops": cache_loops,
                             "exact": exact})
    return {"generation": rows}
