"""Looped models of text: the arms of notebook 10, what is measured of each, and a run of one.

    python -m mythos_core.study.language --arm strict --seed 0 --dim 128 --steps 700 --out DIR

A run trains, writes the model with its weights in bfloat16, measures what it has written, and
leaves the measures in row.json. With --resume it goes on from its checkpoint.
"""
import argparse
import copy
import json
import platform
import shlex
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mythos_core.model.cache import KVCache
from mythos_core.model.config import MythosConfig, tutorial_config
from mythos_core.model.model import OpenMythos
from mythos_core.probes import (
    expert_load,
    halting_map,
    load_entropy,
    logits_after,
    multiply_adds,
)
from mythos_core.provenance import commit
from mythos_core.tasks.corpus import Corpus, load_corpus
from mythos_core.training import Run, train
from mythos_core.training.losses import bits
from mythos_core.training.recipes import Recipe
from mythos_core.training.trainer import EVAL_EVERY, provenance

CONTEXT = 128   # bytes of a window
LOOPS = 8       # that a looped model is trained with, or at most
NEAR = 0.01     # relative distance from its end at which a state counts as near it
AT_ONCE = 64    # windows of a pass, when models are measured

#: Kinds of bytes, and which they are; tabs, control characters and non-ASCII bytes are of none.
KINDS = {"lower case": string.ascii_lowercase, "upper case": string.ascii_uppercase,
         "digits": string.digits, "space": " ", "newline": "\n",
         "punctuation": string.punctuation}

#: What each arm changes: in the recipe, and by "config." in the model. But for the last one all
#: have the same parameters, within 1 %.
ARMS: dict[str, dict[str, Any]] = {
    # as open-mythos does: ACT, a LoRA and an embedding for each loop, always the same loops
    "reference": {"loops": (LOOPS, LOOPS), "config.halting": "act", "config.lora_rank": 8,
                  "config.loop_embedding": True},
    "random-loops": {},
    "strict": {"config.strict": True, "config.carry": False},
    "strict-carry": {"config.strict": True},
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
    with torch.device("meta"):
        once, more, looped = (multiply_adds(OpenMythos(of), loops, (CONTEXT + 1) / 2)
                              for of, loops in ((config, 1), (replace(
                                  config, prelude_layers=config.prelude_layers + 1), 1),
                                  (config, n_loops)))
    return config.prelude_layers + round((looped - once) / (more - once))


@torch.no_grad()
def bits_by_loops(model: OpenMythos, ids: Int[Tensor, "windows seq"],
                  targets: Int[Tensor, "windows seq"], loops: list[int]
                  ) -> Float[Tensor, "loops windows seq"]:
    """-log2 p of each byte after each of these numbers of loops, from one pass of the largest; a
    model that halted before has its last answer."""
    if len(ids) > AT_ONCE:
        return torch.cat([bits_by_loops(model, *part, loops)
                          for part in zip(ids.split(AT_ONCE), targets.split(AT_ONCE))], 1)
    return torch.stack([bits(logits, targets) for logits in logits_after(model, ids, loops)])


@torch.no_grad()
def bits_one_loop(model: OpenMythos, ids: Int[Tensor, "windows seq"],
                  targets: Int[Tensor, "windows seq"]) -> Float[Tensor, "windows seq"]:
    """-log2 p of each byte of a strict model that reads from left to right, one loop for each byte,
    behind a cache of what has settled."""
    return bits(model.eval()(ids, 1, KVCache(ids.shape[1])), targets)


@torch.no_grad()
def settling(model: OpenMythos, ids: Int[Tensor, "windows seq"]
             ) -> tuple[Float[Tensor, "loops windows seq"], Int[Tensor, "windows seq"]]:
    """Of a strict model: ||h_t - h_T|| / ||h_T|| of each position for t = 1 .. T, with T the
    length; and the loops after which a position, and all before it, is as it stays: bit for
    bit, or with the carry to rounding. Without the carry h_T is the fixed point, exactly."""
    states, settled = [], []

    def look(record):
        states.append(record.h)
        settled.append(record.settled)

    model.eval()(ids, ids.shape[1], observer=look)
    end = states[-1]
    distance = torch.stack([(h - end).norm(dim=-1) / end.norm(dim=-1) for h in states])
    return distance, len(settled) - torch.stack(settled).sum(0)


def loops_until(holds: Bool[Tensor, "loops windows seq"]) -> Int[Tensor, "windows seq"]:
    """Loops from which on it holds to the end; one more than there are if it does not then."""
    return len(holds) + 1 - holds.long().flip(0).cumprod(0).sum(0)


def kinds_of(ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The number of each byte's kind in `KINDS`, -1 for a byte of none."""
    kind = torch.full((256,), -1, device=ids.device)
    for number, characters in enumerate(KINDS.values()):
        kind[list(characters.encode())] = number
    return kind[ids]


@torch.no_grad()
def experts_by_kind(model: OpenMythos, ids: Int[Tensor, "windows seq"], n_loops: int
                    ) -> Float[Tensor, "kinds experts"]:
    """Which share of the slots of a kind's bytes each expert has, over all loops that ran; NaN for
    a kind that `ids` lack. With two slots a byte no share is above 1/2."""
    kinds, slots = kinds_of(ids), torch.zeros(len(KINDS), model.config.n_experts)

    def count(record):
        chosen = F.one_hot(record.expert_ids, model.config.n_experts).sum(-2)
        for number in range(len(KINDS)):
            slots[number] += chosen[kinds == number].sum(0).cpu()

    model.eval()(ids, n_loops, observer=count)
    return slots / slots.sum(1, keepdim=True)


def measures(run: Run, model: OpenMythos, most: int | None = None) -> dict:
    """What is measured of a trained model on the test split, or on at most so many windows of it.

    - `loops`, `bits`: bits per byte after each number of loops, 1 to the context's length;
    - `best_loops`, `best`, and `beyond`: what the most loops lose against it;
    - `unrounded`: bits of the weights as trained, in float32, at `trained_loops`;
    - `one_loop` of a strict model: bits with one loop for each byte behind a settled cache, on
      `AT_ONCE` windows spread over the split, as is what follows; `all_loops` on the same ones,
      and the largest difference at any byte;
    - `distance`, `settled_after` of a strict model: `settling`, in the mean over bytes, and over
      windows by position; `near_after`: the same of the loops from which on it is within `NEAR`;
    - `stopped_after` of one with ACT: loops until a position halts, of at most `LOOPS`, its mean by
      position;
    - `expert_entropy`: of the loads, 1 = even; `experts_by_kind`, on the same windows;
    - `text`: a quarter of a window, and how the model goes on.
    """
    corpus, device = run.recipe.corpus, model.embed.weight.device
    ids, targets = corpus.windows("test", CONTEXT, most, device)
    few = corpus.windows("test", CONTEXT, AT_ONCE, device)
    trained, loops = run.recipe.loops[1], [2 ** k for k in range(CONTEXT.bit_length())]
    by_loops = bits_by_loops(model, ids, targets, loops).mean((1, 2)).tolist()
    best = min(range(len(loops)), key=by_loops.__getitem__)
    row: dict[str, Any] = {
        "windows": len(ids), "loops": loops, "bits": by_loops, "trained_loops": trained,
        "best_loops": loops[best], "best": by_loops[best], "beyond": by_loops[-1] - by_loops[best],
        "unrounded": bits_by_loops(run.model, ids, targets, [trained]).mean().item(),
        "expert_entropy": load_entropy(expert_load(model, few[0], trained)),
        "experts_by_kind": {kind: share.tolist() for kind, share in zip(
            KINDS, experts_by_kind(model, few[0], trained)) if share.isfinite().all()},
        "text": continuation(model, few[0][:1, :CONTEXT // 4], trained, CONTEXT - CONTEXT // 4)}
    if model.config.strict:
        row |= _strict_measures(model, *few)
    if model.recurrent.act is not None:
        stopped = halting_map(model, few[0], LOOPS).stopped_at
        row["stopped_after"] = stopped.float().mean(0).tolist()
    return row


def _strict_measures(model, ids, targets) -> dict:
    one, every = bits_one_loop(model, ids, targets), bits_by_loops(model, ids, targets, [CONTEXT])
    distance, settled_after = settling(model, ids)
    return {"one_loop": one.mean().item(), "all_loops": every.mean().item(),
            "largest_difference": (one - every[0]).abs().max().item(),
            "distance": distance.mean((1, 2)).tolist(),
            "near_after": loops_until(distance < NEAR).float().mean(0).tolist(),
            "settled_after": settled_after.float().mean(0).tolist()}


def continuation(model: OpenMythos, prompt: Int[Tensor, "one seq"], n_loops: int,
                 new_bytes: int) -> str:
    """The prompt and so many bytes drawn behind it, seed 0; bytes that are no UTF-8 as U+FFFD."""
    generator = torch.Generator(prompt.device).manual_seed(0)
    out = model.generate(prompt, new_bytes, n_loops, generator=generator)
    return bytes(out[0].tolist()).decode(errors="replace")


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
    return name, json.loads(value)


def main(argv=None):
    """Train one arm, write its model, its row and its checkpoint below --out."""
    parser = argparse.ArgumentParser(prog="python -m mythos_core.study.language",
                                     description="Train and measure one arm on text.")
    parser.add_argument("--arm", required=True, help=f"one of {sorted(ARMS)}")
    parser.add_argument("--corpus", default="topics",
                        help="topics, stdlib, tinystories, or a file or folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--set", type=_change, action="append", default=[], metavar="NAME=JSON",
                        help="a field of the recipe, or config.FIELD of the model")
    parser.add_argument("--windows", type=int, help="of the test split, at most; default all")
    parser.add_argument("--device")
    parser.add_argument("--out", required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    try:
        corpus = load_corpus(args.corpus)
        print(f"Python {platform.python_version()}, corpus {corpus.as_dict()}")
        recipe = language_recipe(args.arm, corpus, args.dim, args.steps, **dict(args.set))
        run = train(recipe, args.seed, args.device, out=args.out, resume=args.resume)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; go on with --resume (checkpoint in {args.out})\n")
    command = f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}"
    row = result(run, write_bfloat16(run, Path(args.out, "bfloat16")), command, args.windows)
    Path(args.out, "row.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    by_loops = ", ".join(f"{n}: {x:.3f}" for n, x in zip(row["loops"], row["bits"]))
    print(f"{args.arm}, seed {args.seed}: {row['parameters']:,} parameters, "
          f"{row['multiply_adds']:,.0f} multiplications a byte, {row['seconds']:.0f} s; "
          f"bits per byte by loops {by_loops}")


if __name__ == "__main__":
    main()
