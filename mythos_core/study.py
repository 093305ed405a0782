"""The study behind notebook 05: the recipe, every ingredient taken away or put back alone, several seeds, one row a run.

    python -m mythos_core.study --seeds 0:5 --workers 2            # ablations; goes on where it was stopped
    python -m mythos_core.study --reach --seeds 0:10 --workers 2   # the recipe alone, up to 1,024 bits
    python -m mythos_core.study --halting --seeds 0:5 --workers 2  # a model that stops by itself: where, and if it is right there
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
from mythos_core.parity import answers, make_batch, structured
from mythos_core.probes import depth_sweep, halting_map
from mythos_core.training import Recipe, Run, commit, get_recipe, in_processes, train

RESULTS = Path(__file__).parent / "results"
ARTICLE = {"base": "parity-seed", "config.max_seq_len": 4096}    # else it would refuse the long strings
UNLOOPED = {"loops": (1, 1), "reach": None, "config.window": None}   # the shift stays: it is what marks the start of a string

#: From the article's recipe to the working one, one step after the other; each step keeps those before it.
STEPS = {
    "halting, LoRA, loop embedding off": {"config.halting": "none", "config.lora_rank": 0, "config.loop_embedding": False},
    "init, optimiser": {"config.init_std": 64 ** -0.5, "lr": 2e-3, "betas": (0.9, 0.98), "warmup": 50, "decay": 0.8, "batch": 40},
    "lengths and loops drawn, curriculum": {"lengths": (9, 16), "loops": (1, 16), "curriculum": 0.25},
    "loss where the loops reach": {"reach": 1.5},
    "window 4": {"config.window": 4},
    "token shift": {"config.token_shift": True},
    "mixed strings": {"strings": "mixed"},
}
#: What each variant changes in the recipe ("parity-extrapolating", or its "base"); "config." marks the model's own fields.
VARIANTS = {
    "the recipe": {},
    "token shift off": {"config.token_shift": False},
    "window off": {"config.window": None},
    "window 2": {"config.window": 2},
    "window 8": {"config.window": 8},
    "ACT on, as in the reference": {"config.halting": "act"},
    "ACT on, with the remainder": {"config.halting": "act_remainder"},
    "loop embedding on": {"config.loop_embedding": True},
    "LoRA on": {"config.lora_rank": 4},
    "8 loops always": {"loops": (8, 8)},
    "16 loops always": {"loops": (16, 16)},
    "loss on all positions": {"reach": None},
    "no length curriculum": {"curriculum": 0.0},
    "init 0.02": {"config.init_std": 0.02},
    "NoPE": {"config.rope": False},
    "no carry": {"config.carry": False},
    "norm after the loop": {"config.loop_norm": True},
    "uniform strings": {"strings": "uniform"},
    "no noise in the loop": {"config.loop_noise": 0.0},
    "a third of the noise": {"config.loop_noise": 0.1},
    "always started at e": {"config.start_noise": 0.0},
    "loops tied to length": {"spare_loops": 4},
    "asked for 1 position a loop": {"reach": 1.0},
    "asked for 3 positions a loop": {"reach": 3.0},
    "window 8, asked for 5 positions a loop": {"config.window": 8, "reach": 5.0},
    "no prelude, no coda": {"config.prelude_layers": 0, "config.coda_layers": 0},
    "not looped, equal parameters": UNLOOPED,
    "not looped, equal compute": {**UNLOOPED, "config.prelude_layers": 8, "config.coda_layers": 9},
    "the article's recipe": ARTICLE,
    "halting": {"base": "parity-halting"},
    "the scan": {"base": "parity-scan"},
    "the scan, less noise": {"base": "parity-scan", "config.loop_noise": 0.1},
    "the scan, with the carry": {"base": "parity-scan", "config.carry": True},
    "the scan, window 4": {"base": "parity-scan", "config.window": 4},
}
_so_far = ARTICLE
for _step, _changes in STEPS.items():
    VARIANTS[f"+ {_step}"] = _so_far = {**_so_far, **_changes}
LOOPS = {16: 32, 64: 96, 256: 300, 512: 600, 1024: 1100}     # loops given to strings of each length; a scan gets 2 log2(length)
TOKENS = 2048  # of a pass: what they need between two operations stays in the processor's cache


def variant(name: str) -> Recipe:
    """The recipe of a variant; ValueError listing the names there are."""
    if name not in VARIANTS:
        raise ValueError(f"variant = {name!r}: must be one of {sorted(VARIANTS)}")
    changes = dict(VARIANTS[name])
    recipe = get_recipe(changes.pop("base", "parity-extrapolating"))
    inner = {k.removeprefix("config."): v for k, v in changes.items() if k.startswith("config.")}
    outer = {k: v for k, v in changes.items() if not k.startswith("config.")}
    return replace(recipe, **outer, config=replace(recipe.config, **inner))


def span(recipe: Recipe, length: int) -> int:
    """Loops in which the token shift alone brings news from the first to the last of `length` positions."""
    return length if recipe.config.shift_growth == 1 else math.ceil(math.log(length, recipe.config.shift_growth))


def loops_for(recipe: Recipe, length: int) -> int:
    """Loops given to strings of a length: one if the recipe does not loop."""
    if recipe.loops[1] == 1:
        return 1
    return LOOPS[length] if recipe.config.shift_growth == 1 else 2 * span(recipe, length)


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


def pace_row(run: Run) -> dict:
    """Nothing but what every row has: when held-out strings were whole, and how long the training took."""
    return {"threads": torch.get_num_threads()}


MEASURES = {"ablations": accuracy_row, "reach": reach_row, "halting": halting_row, "pace": pace_row}


def run_one(job: tuple[str, int, str]) -> dict:
    """Train one variant with one seed and measure it by one of `MEASURES`."""
    name, seed, measure = job
    run = train(variant(name), seed, progress=False)
    flag = "" if measure == "ablations" else f"--{measure} "
    return {
        "variant": name, "seed": seed, **MEASURES[measure](run), "when_whole": when_whole(run),
        "train_seconds": run.history[-1]["seconds"], "parameters": sum(p.numel() for p in run.model.parameters()),
        "recipe": asdict(run.recipe), "command": f"python -m mythos_core.study {flag}--variant '{name}' --seeds {seed}",
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
    other.add_argument("--reach", dest="measure", action="store_const", const="reach", help="measure how far a variant reaches, to 1,024 bits")
    other.add_argument("--halting", dest="measure", action="store_const", const="halting", help="measure where positions stop")
    other.add_argument("--pace", dest="measure", action="store_const", const="pace", help="measure only how long its training takes")
    parser.set_defaults(measure="ablations")
    parser.add_argument("--out", type=Path, help="file of rows; default is the committed one")
    args = parser.parse_args(argv)
    first, _, end = args.seeds.partition(":")
    defaults = {"ablations": [name for name in VARIANTS if name != "halting"], "halting": ["halting"]}
    names = args.variant or defaults.get(args.measure, ["the recipe"])
    try:
        seeds = range(int(first), int(end or int(first) + 1))
        for name in names:
            variant(name)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    file = args.out or RESULTS / f"{args.measure}.json"
    done = {(row["variant"], row["seed"]) for row in load(file)}
    jobs = [(name, seed, args.measure) for seed in seeds for name in names if (name, seed) not in done]
    for _, row in in_processes(run_one, jobs, args.workers):
        append(file, row)
        tqdm.write(f"{row['variant']} seed {row['seed']}: {row.get('whole', row['when_whole'])}")


if __name__ == "__main__":
    main()
