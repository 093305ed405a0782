"""Looped models of text: the arms of notebook 10, and a run of one.

    mythos language --arm strict --seed 0 --dim 128 --steps 700 --out DIR

A run trains, writes the model with its weights in bfloat16, measures what it has written, and
leaves the measures in row.json. With --resume it goes on from its checkpoint.
"""
import argparse
import copy
import json
import platform
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mythos_core.model.config import MythosConfig, tutorial_config
from mythos_core.model.model import OpenMythos
from mythos_core.probes import multiply_adds
from mythos_core.provenance import commit
from mythos_core.study.on_text import CONTEXT, LOOPS, measures
from mythos_core.tasks.corpus import Corpus, load_corpus
from mythos_core.training import Run
from mythos_core.training.folder import add_options, as_folder, claimed, require_free
from mythos_core.training.recipes import Recipe
from mythos_core.training.trainer import EVAL_EVERY, check, provenance, train_claimed, write

#: What each arm changes: in the recipe, and by "config." in the model. But for the last one all
#: have the same parameters, within 1 %.
ARMS: dict[str, dict[str, Any]] = {
    # as open-mythos does: ACT, a LoRA and an embedding for each loop, always the same loops
    "reference": {"loops": (LOOPS, LOOPS), "config.halting": "act", "config.lora_rank": 8,
                  "config.loop_embedding": True},
    "random-loops": {},
    "strict": {"config.strict": True, "config.carry": False},
    "strict-carry": {"config.strict": True},
    # T loops read 2^T bytes: 7 read a window
    "doubling": {"config.dilation": 2, "config.carry": False, "config.loop_norm": True},
    "unlooped": {"loops": (1, 1)},
    "unlooped-deep": {"loops": (1, 1)},      # prelude_layers: as many as make the compute equal
}


def language_config(dim: int = 128, **changes) -> MythosConfig:
    """A model of bytes: one block before the loop, one in it, one after it; heads of 32 channels,
    2 of 4 experts. With dim = 128 about 460,000 parameters."""
    if dim < 64 or dim % 64:
        raise ValueError(f"dim = {dim}: must be a multiple of 64")
    small = dict(dim=dim, n_heads=dim // 32, n_kv_heads=dim // 64, expert_dim=dim // 2,
                 max_seq_len=1024, max_loop_iters=LOOPS, halting="none", lora_rank=0,
                 loop_embedding=False, init_std=dim ** -0.5)
    return tutorial_config("gqa", **{**small, **changes})


def language_recipe(arm: str, corpus: Corpus, dim: int = 128, steps: int = 700,
                    **changes) -> Recipe:
    """How an arm is trained: on windows of 128 bytes, with loops drawn from 1 .. 8.

    Args:
        changes: to the recipe's fields; by "config.NAME" to the model's.

    Raises:
        ValueError: for an arm that there is not, a `dim` that is no multiple of 64.
    """
    if arm not in ARMS:
        raise ValueError(f"arm = {arm!r}: must be one of {sorted(ARMS)}")
    changes = {**ARMS[arm], **changes}
    config = language_config(dim, **{name.removeprefix("config."): value for name, value
                                     in changes.items() if name.startswith("config.")})
    if arm == "unlooped-deep":
        config = replace(config, prelude_layers=equal_compute_layers(config))
    training: dict[str, Any] = dict(
        steps=steps, batch=16, lr=3e-3, betas=(0.9, 0.98), warmup=50, decay=0.8,
        lengths=(CONTEXT, CONTEXT), loops=(1, LOOPS), strings="train")
    return Recipe(arm, config, corpus=corpus, **{
        **training, **{name: tuple(value) if isinstance(value, list) else value
                       for name, value in changes.items() if not name.startswith("config.")}})


def equal_compute_layers(config: MythosConfig, n_loops: int = LOOPS) -> int:
    """Blocks before the loop with which one loop costs nearest to what `n_loops` cost with
    `config`'s own, in multiplications for each byte of a window."""
    deeper = replace(config, prelude_layers=config.prelude_layers + 1)
    with torch.device("meta"):
        once, more, looped = (multiply_adds(OpenMythos(each), loops, (CONTEXT + 1) / 2)
                              for each, loops in ((config, 1), (deeper, 1), (config, n_loops)))
    return config.prelude_layers + round((looped - once) / (more - once))


def write_bfloat16(run: Run, folder: Path) -> OpenMythos:
    """Write the run's model in bfloat16, and give what a reader of it will have: a model in float32
    of the rounded weights, on the device of the run's."""
    rounded = copy.deepcopy(run.model).to(torch.bfloat16)
    rounded.save_pretrained(folder, config={**vars(rounded.config), "provenance": provenance(run)})
    return OpenMythos.from_pretrained(folder, map_location=run.model.embed.weight.device)


def result(run: Run, model: OpenMythos, command: str, most: int | None = None) -> dict:
    """The row of a run: where it comes from, what it cost, how it learned, and its `measures`."""
    trained, device = run.recipe.loops[1], model.embed.weight.device
    return {
        "command": command, "arm": run.recipe.name, "seed": run.seed, "commit": commit(),
        "recipe": run.recipe.as_dict(), "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": multiply_adds(model, trained, (CONTEXT + 1) / 2),
        "seconds": run.history[-1]["seconds"],
        "validation": [[row["step"] + 1, row["held_out"]] for row in run.history
                       if "held_out" in row],
        "loss": [sum(row["loss"] for row in run.history[i:i + EVAL_EVERY]) / EVAL_EVERY
                 for i in range(0, len(run.history) - EVAL_EVERY + 1, EVAL_EVERY)],
        **measures(run, model, most)}


def _change(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON."""
    name, _, value = text.partition("=")
    others = ("name", "config", "machine", "corpus", "steps")    # said by options of their own
    known = [*(field.name for field in fields(Recipe) if field.name not in others),
             *(f"config.{field.name}" for field in fields(MythosConfig))]
    if name not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: {name!r} must be one of {known}")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=JSON, such as batch=8 or "
                                         "config.strict=true") from error


def run(args):
    """Train one arm, and write its model, its row and its checkpoint below --out, which stays its
    own until then."""
    out = as_folder(args.out)
    require_free(out, args.resume, args.overwrite)
    if args.windows is not None and args.windows < 1:
        raise ValueError(f"windows = {args.windows}: must be at least 1")
    corpus = load_corpus(args.corpus)
    print(f"Python {platform.python_version()}, corpus {corpus.as_dict()}")
    recipe = language_recipe(args.arm, corpus, args.dim, args.steps, **dict(args.set))
    check(recipe, args.seed, args.device)
    corpus.require("test", CONTEXT)
    with claimed([out], args.resume, args.overwrite):
        done = train_claimed(recipe, args.seed, args.device, out=out, resume=args.resume)
        row = result(done, write_bfloat16(done, out / "bfloat16"), args.command, args.windows)
        write(out / "row.json", json.dumps(row) + "\n")
    by_loops = ", ".join(f"{n}: {x:.3f}" for n, x in zip(row["loops"], row["bits"]))
    print(f"{args.arm}, seed {args.seed}: {row['parameters']:,} parameters, "
          f"{row['multiply_adds']:,.0f} multiplications a byte, {row['seconds']:.0f} s; "
          f"bits per byte by loops {by_loops}")


def options(parser: argparse.ArgumentParser):
    """What is to be trained on which text, and where."""
    add = parser.add_argument
    add("--arm", required=True, help=f"one of {sorted(ARMS)}")
    add("--corpus", default="topics",
        help="topics, stdlib, tinystories, or a file or folder; default topics")
    add("--seed", type=int, default=0, help="of weights and batches; default 0")
    add("--dim", type=int, default=128, help="channels, a multiple of 64; default 128")
    add("--steps", type=int, default=700, help="of the training; default 700")
    add("--set", type=_change, action="append", default=[], metavar="NAME=JSON",
        help="a field of the recipe, or config.FIELD of the model; may be given again")
    add("--windows", type=int, help="of the test split, at most; default all")
    add("--device", help="to train and measure on, such as cuda; default the CPU")
    add("--out", required=True, help="folder for checkpoint, weights, history, the weights in "
                                     "bfloat16 and row.json")
    add_options(parser)
