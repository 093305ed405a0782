"""Measures of when to stop looping: all rules are read off one run to the end, without acting on
them."""
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mythos_core.model.layers import evaluated
from mythos_core.model.model import OpenMythos
from mythos_core.probes import halting_map
from mythos_core.study import fresh_strings
from mythos_core.study.parity import LOOPS, right
from mythos_core.tasks.parity import answers
from mythos_core.training import Run

#: Rules to stop by, and the settings tried: loops in a row with one answer, at most this KL
#: divergence from the loop before, at most this relative change of h.
RULES: dict[str, tuple[float, ...]] = {
    "same": (1, 2, 3, 4, 6, 8, 12, 16),
    "KL": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
    "change": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)}


@torch.no_grad()
@evaluated
def signals(model: OpenMythos, ids: Int[Tensor, "batch seq"], n_loops: int) -> dict[str, Tensor]:
    """What each of the `RULES` looks at, and which answers are `right`, after each loop of a run to
    the end: (T, B, S) by name."""
    ctx, seen = model.context(ids), {name: [] for name in ("right", *RULES)}
    previous = {"h": torch.zeros(()), "log_q": torch.tensor(-torch.inf),
                "answer": -torch.ones(()), "same": torch.zeros(ids.shape)}

    def look(record):
        log_q = model.decode(record.h, ctx).log_softmax(-1)
        answer = log_q.argmax(-1)
        current = {"right": answer == answers(ids),
                   "same": (previous["same"] + 1) * (answer == previous["answer"]),
                   "KL": (log_q.exp() * (log_q - previous["log_q"])).sum(-1),
                   "change": (record.h - previous["h"]).norm(dim=-1) / record.h.norm(dim=-1)}
        for name, values in seen.items():
            values.append(current[name])
        previous.update(h=record.h, log_q=log_q, answer=answer, same=current["same"])

    model(ids, n_loops, observer=look)
    return {name: torch.stack(values) for name, values in seen.items()}


def exits(may: Bool[Tensor, "loops batch seq"], prefix: bool) -> Int[Tensor, "batch seq"]:
    """The loop (from 0) at which each position stops: the first at which it may, or with `prefix`
    at which it and all before it have been free to and may; the last loop if it never comes."""
    stopped, exit_loop = torch.zeros_like(may[0]), torch.full(may.shape[1:], len(may) - 1)
    for t, free in enumerate(may):
        stops = (free | stopped).long().cumprod(1).bool() if prefix else free | stopped
        exit_loop[stops & ~stopped] = t
        stopped = stops
    return exit_loop


def exit_points(seen: dict[str, Tensor]) -> list[dict]:
    """Mean loops spent and accuracy by rule, setting and whether prefix-wise; and after a fixed
    number of loops."""
    correct = seen["right"]
    last = torch.full(correct.shape[1:], len(correct) - 1)
    exit_loops: dict[tuple[str, float, bool], Tensor] = {
        ("fixed", t + 1, False): torch.full_like(last, t)
        for t in range(0, len(correct), max(1, len(correct) // 24))}
    for rule, settings in RULES.items():
        for setting in settings:
            may = seen[rule] <= setting if rule in ("KL", "change") else seen[rule] >= setting
            exit_loops |= {(rule, setting, prefix): exits(may, prefix)
                           for prefix in (False, True)}
    points = []
    for (rule, setting, prefix), exit_loop in exit_loops.items():
        correct_then = correct.gather(0, exit_loop[None])[0].float()
        points.append({"rule": rule, "setting": setting, "prefix": prefix,
                       "loops": (exit_loop + 1).float().mean().item(),
                       "whole": correct_then.amin(1).mean().item(),
                       "token": correct_then.mean().item()})
    return points


def exits_row(run: Run) -> dict:
    """By length: loops spent and accuracy, of a model without halting by every rule, read off its
    states without acting on them; of one that halts by ACT, as it runs."""
    model, points = run.model, {}
    for length in (16, 64, 256):
        ids, loops = fresh_strings(length), LOOPS[length]
        if run.recipe.config.halting == "none":
            points[str(length)] = exit_points(signals(model, ids, loops))
            continue
        correct, halting = right(model, ids, [loops])[0].float(), halting_map(model, ids, loops)
        points[str(length)] = [{"rule": "as it runs",
                                "loops": halting.stopped_at.float().mean().item(),
                                "executed": halting.executed,
                                "whole": correct.amin(1).mean().item(),
                                "token": correct.mean().item()}]
    return {"points": points}
