"""The study behind notebook 05: the recipe, every ingredient taken away or put back alone, several seeds, one row a run.

    python -m mythos_core.study --seeds 0:5 --workers 2            # ablations; goes on where it was stopped
    python -m mythos_core.study --reach --seeds 0:10 --workers 2   # the recipe alone, up to 1,024 bits
    python -m mythos_core.study --halting --seeds 0:5 --workers 2  # a model that stops by itself: where, and if it is right there
    python -m mythos_core.study --exits --seeds 0:5 --workers 2    # ways to stop: loops spent against accuracy
    python -m mythos_core.study --experts --seeds 0:5 --workers 2  # ways to balance experts, and numbers of them
    python -m mythos_core.study --generation --seeds 0:5 --workers 2  # continuations, by loops and by what the cache keeps of them
    python -m mythos_core.study --pace --seeds 0:10                # how long the recipe's training takes, one run at a time
"""
import argparse
import json
import math
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from mythos_core.model import OpenMythos
from mythos_core.parity import answers, continuation, make_batch, structured
from mythos_core.probes import depth_sweep, expert_load, halting_map, load_entropy, max_violation
from mythos_core.recurrence import pairs
from mythos_core.training import HALTING_LOSSES, Recipe, Run, commit, get_recipe, in_processes, train

RESULTS = Path(__file__).parent / "results"
_file = json.loads((RESULTS / "variants.json").read_text())
#: From the article's recipe to the working one, one step after the other; each step keeps those before it.
STEPS: dict[str, dict] = _file["steps"]
#: What each variant changes in the recipe ("parity-extrapolating", or its "base"); "config." marks the model's own fields.
VARIANTS: dict[str, dict] = _file["ablations"]
_so_far = VARIANTS["the article's recipe"]
for _step, _changes in STEPS.items():
    VARIANTS[f"+ {_step}"] = _so_far = {**_so_far, **_changes}
#: The variants that each measure is for.
MEASURED: dict[str, list[str]] = {"ablations": list(VARIANTS), **_file["measured"]}
VARIANTS |= _file["others"]
#: Rules to stop by, and the settings tried: loops in a row with one answer, at most this KL divergence from the loop before, at most this
#: relative change of h, at least this p of a halting head twice running, at least this chance to have stopped.
RULES = {"same": (1, 2, 3, 4, 6, 8, 12, 16), "KL": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7), "change": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
         "p": (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999), "chance": (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
LOOPS = {16: 32, 64: 96, 256: 300, 512: 600, 1024: 1100}     # loops given to strings of each length; a scan gets 2 log2(length)
TOKENS = 2048  # of a pass: what they need between two operations stays in the processor's cache


def variant(name: str) -> Recipe:
    """The recipe of a variant; ValueError listing the names there are."""
    if name not in VARIANTS:
        raise ValueError(f"variant = {name!r}: must be one of {sorted(VARIANTS)}")
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in VARIANTS[name].items()}
    recipe = get_recipe(changes.pop("base", "parity-extrapolating"))
    inner = {k.removeprefix("config."): v for k, v in changes.items() if k.startswith("config.")}
    outer = {k: v for k, v in changes.items() if not k.startswith("config.")}
    return replace(recipe, **outer, config=replace(recipe.config, **inner))


def span(recipe: Recipe, length: int) -> int:
    """Loops in which the token shift alone brings news from the first to the last of `length` positions."""
    return length if recipe.config.shift_growth == 1 else math.ceil(math.log(length, recipe.config.shift_growth))


def loops_for(recipe: Recipe, length: int) -> int:
    """Loops given to strings of a length: one if the recipe does not loop."""
    return 1 if recipe.loops[1] == 1 else LOOPS[length] if recipe.config.shift_growth == 1 else 2 * span(recipe, length)


@torch.no_grad()
def right(model: OpenMythos, ids: Int[Tensor, "batch seq"], loops: list[int]) -> Bool[Tensor, "loops batch seq"]:
    """Which answers are right after each of these numbers of loops, from one pass of the largest."""
    if ids.numel() > TOKENS and len(ids) > 1:
        return torch.cat([right(model, part, loops) for part in ids.split(max(1, TOKENS // ids.shape[1]))], 1)
    outputs = {}

    def look(record):
        outputs["last"] = record.output
        if record.loop + 1 in loops:
            outputs[record.loop + 1] = record.output

    model.eval()(ids, max(loops), observer=look)
    ctx = model.context(ids)                                    # a model that halted before has its last answer at all later loops
    return torch.stack([model.decode(outputs.get(n, outputs["last"]), ctx).argmax(-1) == answers(ids) for n in loops])


def fresh_strings(length: int, strings: int = 16) -> Int[Tensor, "strings length"]:
    """The uniform strings on which all runs are tested."""
    return make_batch(strings, length, torch.Generator().manual_seed(2 ** 31 + length))[0]


def whole_strings(model: OpenMythos, length: int, n_loops: int, strings: int = 16) -> float:
    """Share of `fresh_strings` that are right at every position."""
    return right(model, fresh_strings(length, strings), [n_loops]).all(2).float().mean().item()


def when_whole(run: Run) -> dict:
    """Step and seconds at which held-out strings of the longest trained length were `first` all whole, and from which on they `stayed` so."""
    rows = [row for row in run.history if "held_out" in row]
    first = [row for row in rows if row["held_out"] == 1.0]
    stayed = [row for i, row in enumerate(rows) if all(later["held_out"] == 1.0 for later in rows[i:])]
    return {name: {key: found[0][key] for key in ("step", "seconds")} if found else None for name, found in (("first", first), ("stayed", stayed))}


def accuracy_row(run: Run) -> dict:
    """Whole-string accuracy at 16, 64, 256 and 512 bits; token accuracy as trained (longest length, most loops) and the loops executed
    there when max_loop_iters are asked for; loops needed at 64 bits (mean over strings; None if some never are whole)."""
    loops = {length: loops_for(run.recipe, length) for length in (16, 64, 256, 512)}
    trained = depth_sweep(run.model, *make_batch(256, run.recipe.lengths[1], torch.Generator().manual_seed(2 ** 31)), run.recipe.config.max_loop_iters)
    ids = make_batch(16, 64, torch.Generator().manual_seed(64))[0]
    needed = depth_sweep(run.model, ids, answers(ids), loops[64]).loops_needed.amax(1)
    return {"whole": {str(length): whole_strings(run.model, length, n) for length, n in loops.items()}, "loops": {str(k): v for k, v in loops.items()},
            "token": trained.token[run.recipe.loops[1] - 1].item(), "executed": int(trained.executed[-1]),
            "needed": needed.float().mean().item() if needed.max() <= loops[64] else None}


def reach_row(run: Run) -> dict:
    """Random strings to 1,024 bits; structured ones at 2 and 3 times the span of their length; loops needed to 256 bits."""
    model, recipe = run.model, run.recipe
    row = {"whole": {str(length): whole_strings(model, length, loops_for(recipe, length)) for length in (16, 512, 1024)}}
    row |= {"structured": {}, "needed": {}, "whole_4x": {}}
    for length in (16, 64, 256, 512, 1024):
        ids, loops = torch.cat(list(structured(length).values())), span(recipe, length)
        for times, whole in zip((2, 3), right(model, ids, [2 * loops, 3 * loops]).all(2).tolist()):
            row["structured"][f"{length} bits, {times}x"] = dict(zip(structured(length), whole))
    for length in (16, 32, 64, 128, 256):
        strings = {"random": make_batch(16, length, torch.Generator().manual_seed(length))[0], **structured(length)}
        sweeps = {name: depth_sweep(model, ids, answers(ids), 2 * span(recipe, length)) for name, ids in strings.items()}
        row["needed"][str(length)] = {name: sweep.loops_needed.amax(1).float().mean().item() for name, sweep in sweeps.items()}
        row["whole_4x"][str(length)] = whole_strings(model, length, 4 * int(sweeps["random"].loops_needed.max()))
    return row


def halting_row(run: Run) -> dict:
    """With halting on, to 512 bits: whole strings, random and structured; where positions stopped, on average, where they first
    could have (the loop from which the prefix stays right, were no one to stop), and the share that never stopped; and whole
    strings after all those loops with halting off."""
    model, free, row = run.model, run.model.without_halting(), {}
    for length, loops in {n: LOOPS[n] for n in (16, 64, 256, 512)}.items():
        ids = fresh_strings(length)
        stopped_at = halting_map(model, ids, loops).stopped_at
        free_sweep = depth_sweep(free, ids, answers(ids), loops)
        row[str(length)] = {
            "loops": loops, "whole": whole_strings(model, length, loops), "stopped": stopped_at.float().mean().item(),
            "structured": {name: bool(right(model, one, [2 * length]).all()) for name, one in structured(length).items()},
            "needed": free_sweep.loops_needed.float().mean().item(), "never": (stopped_at == loops).float().mean().item(),
            "whole_unhalted": free_sweep.whole[-1].item()}
    return {"halting": row}


def head_on_frozen(model: OpenMythos, linear: bool, steps: int = 400) -> OpenMythos:
    """The model with a halting head that is trained as `halting_loss = "follows"` says, while all else stays as it is."""
    torch.manual_seed(steps)
    copy = OpenMythos(replace(model.config, halting="learned"))
    copy.load_state_dict(model.without_halting().state_dict(), strict=False)
    act = copy.requires_grad_(False).recurrent.act
    act.halt = torch.nn.Linear(2 * model.config.dim, 1) if linear else act.halt.requires_grad_(True)
    optimizer = torch.optim.AdamW(act.parameters(), 2e-3)
    for _ in range(steps):
        ids, targets = make_batch(40, int(torch.randint(9, 17, ())), strings="mixed")
        optimizer.zero_grad()
        HALTING_LOSSES["follows"](copy, ids, targets, 16)[1].backward()
        optimizer.step()
    return copy.eval()


@torch.no_grad()
def signals(model: OpenMythos, ids: Int[Tensor, "batch seq"], n_loops: int) -> dict[str, Tensor]:
    """What each of the `RULES` looks at, and which answers are `right`, after each loop of a run to the end: (T, B, S) by name."""
    ctx, seen, halt = model.context(ids), {name: [] for name in ("right", *RULES)}, getattr(model.recurrent.act, "halt", None)
    before = {"h": torch.zeros(()), "log_q": torch.zeros(()), "answer": -torch.ones(()), "same": torch.zeros(ids.shape), "p": torch.zeros(ids.shape),
              "going": torch.ones(ids.shape)}

    def look(record):
        log_q = model.decode(record.h, ctx).log_softmax(-1)
        answer = log_q.argmax(-1)
        p = torch.sigmoid(halt(pairs(record.h, ctx))).squeeze(-1) if halt else torch.zeros(ids.shape)
        now = {"right": answer == answers(ids), "same": (before["same"] + 1) * (answer == before["answer"]), "p": torch.minimum(p, before["p"]),
               "KL": (log_q.exp() * (log_q - before["log_q"])).sum(-1), "change": (record.h - before["h"]).norm(dim=-1) / record.h.norm(dim=-1),
               "chance": 1 - before["going"] * (1 - p)}
        for name, values in seen.items():
            values.append(now[name])
        before.update(h=record.h, log_q=log_q, answer=answer, same=now["same"], p=p, going=before["going"] * (1 - p))

    (model.without_halting() if halt else model.eval())(ids, n_loops, observer=look)
    return {name: torch.stack(values) for name, values in seen.items()}


def exits(may: Bool[Tensor, "loops batch seq"], prefix: bool) -> Int[Tensor, "batch seq"]:
    """The loop (from 0) at which each position stops: the first at which it may, or with `prefix` at which it and all before it have
    been free to and may; the last loop if it never comes."""
    stopped, at = torch.zeros_like(may[0]), torch.full(may.shape[1:], len(may) - 1)
    for t, now in enumerate(may):
        now = (now | stopped).long().cumprod(1).bool() if prefix else now | stopped
        at[now & ~stopped] = t
        stopped = now
    return at


def exit_points(seen: dict[str, Tensor], rules: tuple) -> list[dict]:
    """Mean loops spent and accuracy by rule, setting and whether prefix-wise; and after a fixed number of loops."""
    correct = seen["right"]
    last = torch.full(correct.shape[1:], len(correct) - 1)
    stops = {("fixed", t + 1, False): torch.full_like(last, t) for t in range(0, len(correct), max(1, len(correct) // 24))}
    for rule in rules:
        for setting in RULES[rule]:
            may = seen[rule] <= setting if rule in ("KL", "change") else seen[rule] >= setting
            stops |= {(rule, setting, prefix): exits(may, prefix) for prefix in (False, True)}
    points = []
    for (rule, setting, prefix), at in stops.items():
        read = correct.gather(0, at[None])[0].float()
        points.append({"rule": rule, "setting": setting, "prefix": prefix, "loops": (at + 1).float().mean().item(),
                       "whole": read.amin(1).mean().item(), "token": read.mean().item()})
    return points


def exits_row(run: Run) -> dict:
    """By length: loops spent and accuracy of every rule that a model allows, read off its states without acting on them; of a model
    that halts by itself, as it runs."""
    model, recipe, points = run.model, run.recipe, {}
    by_itself = recipe.config.halting != "none" and recipe.halting_loss != "PonderNet"
    rules = {"none": ("same", "KL", "change"), "learned": ("p",) if by_itself else ("chance",)}.get(recipe.config.halting)
    heads = {name: head_on_frozen(model, name == "linear") for name in ("linear", "MLP")} if recipe.config.halting == "none" else {}
    for length in (16, 64, 256):
        ids, loops = fresh_strings(length), LOOPS[length]
        found = points[str(length)] = exit_points(signals(model, ids, loops), rules) if rules else []
        for name, head in heads.items():
            found += [{**point, "rule": f"{name} head"} for point in exit_points(signals(head, ids, loops), ("p",)) if point["rule"] == "p"]
        if by_itself:
            correct, spent = right(model, ids, [loops])[0].float(), halting_map(model, ids, loops)
            found.append({"rule": "as it runs", "loops": spent.stopped_at.float().mean().item(), "executed": spent.executed,
                          "whole": correct.amin(1).mean().item(), "token": correct.mean().item()})
    return {"points": points}


def experts_row(run: Run) -> dict:
    """Accuracy; the load on 256 strings as long as trained, with the most loops: max violation, its mean over loops, entropy, share by
    expert; the routing bias along the training."""
    recipe = run.recipe
    ids = make_batch(256, recipe.lengths[1], torch.Generator().manual_seed(2 ** 31))[0]
    load = expert_load(run.model, ids, recipe.loops[1])
    return {**accuracy_row(run), "violation": max_violation(load), "violation_by_loop": sum(map(max_violation, load)) / len(load),
            "entropy": load_entropy(load), "share": (load.sum((0, 1)) / load.sum()).tolist(),
            "bias": {str(row["step"] + 1): row["router_bias"] for row in run.history if "router_bias" in row}}


def continued(model: OpenMythos, ids: Int[Tensor, "batch seq"], n_loops: int, cache_loops: int | None) -> tuple[float, list[float]]:
    """Share of prompts continued by exactly the 8 right tokens; for a model that stops by itself, the loops of each new token, on
    average over prompts."""
    spent = []

    def look(record):
        spent.extend([0.0] * (record.loop == 0))
        spent[-1] += (record.loop + 1) * record.halt_weight[:, -1].mean().item()

    observer = look if model.config.halting == "learned" else None
    new = model.generate(ids, 8, n_loops, 0.0, cache_loops=cache_loops, observer=observer)[:, ids.shape[1]:]
    return (new == continuation(ids, 8)).all(1).float().mean().item(), spent


def generation_row(run: Run) -> dict:
    """Exact continuations of 16 prompts by prompt length, loops and cache entries for the loop (None: one for each)."""
    rows = []
    for length in (8, 16, 32, 64, 128, 256):
        for loops in (length // 4, length // 2, length, 2 * length):
            for kept in (None, *(k for k in (1, 2, 4) if k <= loops)):
                exact, spent = continued(run.model, fresh_strings(length), loops, kept)
                rows.append({"bits": length, "loops": loops, "cache_loops": kept, "exact": exact, "spent": spent})
    return {"generation": rows}


def pace_row(run: Run) -> dict:
    """Nothing but what every row has: when held-out strings were whole, and how long the training took."""
    return {"threads": torch.get_num_threads()}


MEASURES = {"ablations": accuracy_row, "reach": reach_row, "halting": halting_row, "exits": exits_row, "experts": experts_row,
            "generation": generation_row, "pace": pace_row}


def run_one(job: tuple[str, int, str, Path | None]) -> dict:
    """Train one variant with one seed, unless it is found trained in a folder of runs, and measure it by one of `MEASURES`."""
    name, seed, measure, runs = job
    run = train(variant(name), seed, progress=False, out=runs and runs / f"{name}, seed {seed}", resume=True)
    return {
        "variant": name, "seed": seed, **MEASURES[measure](run), "when_whole": when_whole(run),
        "train_seconds": run.history[-1]["seconds"], "parameters": sum(p.numel() for p in run.model.parameters()),
        "recipe": asdict(run.recipe), "command": f"python -m mythos_core.study --{measure} --variant '{name}' --seeds {seed}",
        "commit": commit(), "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}}


def load(file: Path) -> list[dict]:
    """The rows measured so far."""
    return json.loads(file.read_text()) if file.exists() else []


def append(file: Path, row: dict):
    """Add a row; the file is whole at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted([*load(file), row], key=lambda r: (list(VARIANTS).index(r["variant"]), r["seed"]))
    file.with_suffix(".tmp").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    os.replace(file.with_suffix(".tmp"), file)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mythos_core.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="one of the variants; may be given again; default all those that the measure is for")
    parser.add_argument("--seeds", default="0:5", help="FIRST:END or a single seed")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    other = parser.add_mutually_exclusive_group()
    for measure, row in MEASURES.items():
        other.add_argument(f"--{measure}", dest="measure", action="store_const", const=measure, help=row.__doc__)
    parser.set_defaults(measure="ablations")
    parser.add_argument("--runs", type=Path, help="folder to keep trained models in, for the next measure or after an interruption")
    parser.add_argument("--out", type=Path, help="file of rows; default is the committed one")
    args = parser.parse_args(argv)
    first, _, end = args.seeds.partition(":")
    names = args.variant or MEASURED[args.measure]
    try:
        seeds = range(int(first), int(end or int(first) + 1))
        for name in names:
            variant(name)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    file = args.out or RESULTS / f"{args.measure}.json"
    done = {(row["variant"], row["seed"]) for row in load(file)}
    jobs = [(name, seed, args.measure, args.runs) for seed in seeds for name in names if (name, seed) not in done]
    for _, row in in_processes(run_one, jobs, args.workers):
        append(file, row)
        tqdm.write(f"{row['variant']} seed {row['seed']}: {row.get('whole', row['when_whole'])}")


if __name__ == "__main__":
    main()
