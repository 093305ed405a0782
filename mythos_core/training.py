"""Recipes, and training by them: with progress, interruptible, resumable to the same bits.

    python -m mythos_core.training --recipe parity-extrapolating --seed 0 --out build/run
"""
import argparse
import json
import os
import pickle
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from mythos_core.config import MythosConfig, parity_config
from mythos_core.groups import group
from mythos_core.model import OpenMythos
from mythos_core.recurrence import pairs

SAVE_EVERY = 100  # steps between checkpoints
EVAL_EVERY = 50   # steps between looks at held-out strings
HALT_FROM = 0.4   # share of the steps after which a halting head is trained too: there is something to halt on
LONGEST_WAIT = 128  # most loops of a `late_start`; their logarithm is drawn uniformly
HEAD = 4          # positions at the start that run alone at first: as far as a loop sees, with the recipes' window of 4 and the shift


@dataclass(frozen=True)
class Recipe:
    """How a model is trained to track a group's state: AdamW, one batch of one length and one number of loops a step."""

    name: str
    config: MythosConfig
    steps: int = 600
    batch: int = 64
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0                       # largest gradient norm
    warmup: int = 0                         # steps over which the learning rate rises to lr
    decay: float = 0.0                      # last fraction of the steps, over which it falls to 0.01 lr
    lengths: tuple[int, int] = (24, 24)     # shortest and longest string; a length is drawn uniformly for each step
    curriculum: float = 0.0                 # first fraction of the steps, over which the longest length grows from 3; the shortest is at most that
    loops: tuple[int, int] = (3, 3)         # fewest and most loops, drawn uniformly ...
    spare_loops: int | None = None          # ... but at most the length and this many; None = however many
    group: str = "Z2"                       # of `groups.group`; Z2 is prefix parity
    generators: bool = False                # of `Group.make_batch`, as
    strings: str = "uniform"
    reach: float | None = None              # score only as far as T loops reach: `reach` times the way the token shift goes in them,
    #                                         1 + g + ... + g^(T - 1) with g = shift_growth; None = all positions. This sets the speed
    #                                         that is learned: what is scored must be answered in time
    halting_loss: str = "ready"             # for halting = "learned": one of `HALTING_LOSSES`
    ponder_cost: float = 0.0                # for halting = "act_remainder": weight of Graves' N + R

    @property
    def make_batch(self):
        """`Group.make_batch` of the recipe's group, with its alphabet."""
        return partial(group(self.group).make_batch, generators=self.generators)


#: What the recipes share that make a model extrapolate: the model, and its training.
_MODEL = dict(vocab_size=4, max_seq_len=4096, halting="none", loop_embedding=False, lora_rank=0, token_shift=True, init_std=64 ** -0.5)
_TRAINING = dict(batch=40, lr=2e-3, betas=(0.9, 0.98), warmup=50, decay=0.8, lengths=(9, 16), curriculum=0.25, loops=(1, 16), strings="mixed", reach=1.5)
RECIPES = {recipe.name: recipe for recipe in (
    Recipe("parity-seed", parity_config()),
    Recipe("parity-extrapolating", parity_config(**_MODEL, window=4, loop_noise=0.3, start_noise=4.0), **_TRAINING),
    Recipe("parity-scan", parity_config(**_MODEL, window=1, shift_growth=2, loop_noise=0.4, carry=False),
           steps=900, **{**_TRAINING, "batch": 32, "decay": 0.4, "lengths": (2, 16), "loops": (1, 5), "reach": 1.0}),
    Recipe("parity-halting", parity_config(**{**_MODEL, "halting": "learned"}, window=4, loop_noise=0.3, start_noise=4.0, act_threshold=0.9),
           steps=1000, **{**_TRAINING, "curriculum": 0.15}, halting_loss="follows"),
    *(Recipe(f"state-{name}", parity_config(**{**_MODEL, "vocab_size": len(group(name)) + 1}, expert_dim=128, window=2, loop_noise=0.1, start_noise=1.0),
             steps=steps, **{**_TRAINING, "decay": 0.7, "curriculum": 0.3, "reach": 1.0}, group=name, generators=len(group(name)) > 50)
      for name, steps in {"Z2": 600, "Z5": 1500, "S3": 1500, "A5": 2200, "S5": 3200}.items()),
)}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError listing the names there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe = {name!r}: must be one of {sorted(RECIPES)}")
    return RECIPES[name]


@dataclass
class Run:
    """A training run: the model, and one row a step: step, loss, accuracy (token, on scored positions of the batch), seconds
    since the start, and at every 50th step and the last `router_bias` and `held_out`: whole-string accuracy on 256 fresh
    uniform strings of the longest length at the most loops."""

    recipe: Recipe
    seed: int
    model: OpenMythos
    history: list[dict] = field(default_factory=list)


def train(recipe: Recipe | str, seed: int = 0, device=None, progress: bool = True, out=None, resume: bool = False) -> Run:
    """Train a model by a recipe, or by the name of one.

    All randomness of step i comes from (seed, i), so that a resumed run is the uninterrupted one, bit for bit.

    Args:
        out: folder for checkpoint.pt (every 100 steps, at Ctrl-C, at the end), and at the end for
            the model, as `save_pretrained` writes it, and history.json.
        resume: go on from `out`'s checkpoint, if there is one.

    Raises:
        FloatingPointError: the loss is not finite; names the step, and the last good checkpoint stays.
        ValueError: unknown recipe, or a checkpoint of another recipe or seed.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    checkpoint = Path(out) / "checkpoint.pt" if out else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        run = Run(recipe, seed, OpenMythos(recipe.config).to(device))
        optimizer = torch.optim.AdamW(run.model.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay, fused=True)
        if resume and checkpoint and checkpoint.exists():
            _load(checkpoint, run, optimizer)
        try:
            _loop(run, optimizer, checkpoint, progress)
        except KeyboardInterrupt:
            if checkpoint:
                _save(checkpoint, run, optimizer)
            raise
    if out:
        _save(checkpoint, run, optimizer)
        run.model.save_pretrained(out, config={**asdict(recipe.config), "provenance": provenance(run)})
        Path(out, "history.json").write_text(json.dumps(run.history))
    return run


def train_all(jobs: list[tuple[Recipe | str, int]], progress: bool = True) -> list[Run]:
    """The runs of several (recipe, seed), in the order given: one for each of torch's threads at a time, in fresh processes of one thread
    each, so that the numbers do not depend on the machine's cores."""
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn")) as pool:
        return [pickle.loads(run) for run in tqdm(pool.map(_train_alone, *zip(*jobs)), total=len(jobs), unit="run", disable=not progress)]


def _train_alone(recipe: Recipe | str, seed: int) -> bytes:
    """A run pickled: tensors as numbers, not as handles on memory that ends with this process."""
    torch.set_num_threads(1)
    return pickle.dumps(train(recipe, seed, progress=False))


def commit() -> str | None:
    """The commit of the code that runs, if it runs from a repository."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return git.stdout.strip() if git.returncode == 0 else None


def provenance(run: Run) -> dict:
    """Where a model comes from: the command that trains it again, the commit it was trained at, and what it reached."""
    return {
        "command": f"python -m mythos_core.training --recipe {run.recipe.name} --seed {run.seed} --out DIR",
        "recipe": asdict(run.recipe) | {"config": "the fields beside this one"}, "seed": run.seed, "commit": commit(), "torch": torch.__version__,
        "metrics": {name: run.history[-1][name] for name in ("loss", "accuracy", "held_out")}}


def _loop(run: Run, optimizer, checkpoint, progress):
    recipe, before = run.recipe, run.history[-1]["seconds"] if run.history else 0.0
    start, shown = time.perf_counter() - before, {}
    with tqdm(total=recipe.steps, initial=len(run.history), desc=f"{recipe.name} seed {run.seed}", disable=not progress) as bar:
        for step in range(len(run.history), recipe.steps):
            torch.manual_seed((run.seed * 1_000_003 + step + 1) % 2 ** 32)
            row = {"step": step, **_step(run.model, optimizer, recipe, step)}
            if (step + 1) % EVAL_EVERY == 0 or step + 1 == recipe.steps:
                row |= {"held_out": held_out(run.model, recipe), "router_bias": run.model.recurrent.block.ffn.router_bias.tolist()}
                shown["whole"] = f"{row['held_out']:.2f}"
            run.history.append({**row, "seconds": time.perf_counter() - start})
            bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['accuracy']:.2f}", **shown, refresh=False)
            bar.update()
            if checkpoint and (step + 1) % SAVE_EVERY == 0:
                _save(checkpoint, run, optimizer)
    run.model.eval()


def _step(model, optimizer, recipe, step) -> dict:
    """One optimiser step; its loss and token accuracy."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(recipe, step)
    length, n_loops = draw(recipe, step)
    ids, targets = recipe.make_batch(recipe.batch, length, strings=recipe.strings, device=model.embed.weight.device)
    way = sum(recipe.config.shift_growth ** t for t in range(n_loops))
    scored = min(length, int(recipe.reach * way)) if recipe.reach else length
    if teaches_halting(recipe, step):
        logits, also = HALTING_LOSSES[recipe.halting_loss](model, ids, targets, n_loops)
    else:
        weights = []
        logits = model.train()(ids, n_loops, observer=lambda record: weights.append(record.halt_weight))
        also = recipe.ponder_cost * ponder(torch.stack(weights)) if recipe.ponder_cost else 0.0
    logits, targets = logits[:, :scored].flatten(0, 1), targets[:, :scored].flatten()
    loss = F.cross_entropy(logits, targets) + also + recipe.config.balance_loss * model.recurrent.block.ffn.imbalance
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss = {loss.item()} at step {step} of recipe {recipe.name}")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    model.recurrent.block.ffn.balance()
    return {"loss": loss.item(), "accuracy": (logits.argmax(-1) == targets).float().mean().item()}


def teaches_halting(recipe: Recipe, step: int) -> bool:
    """Whether this step is one that teaches the halting head: after a while two of three are. The third is as without halting."""
    return recipe.config.halting == "learned" and step >= HALT_FROM * recipe.steps and step % 3 > 0


@torch.no_grad()
def late_start(model: OpenMythos, ids: Tensor, n_loops: int) -> Float[Tensor, "batch seq dim"]:
    """The state after `n_loops` loops in which the first `HEAD` positions are not seen to change by the others. These settle on answers
    that cannot be right yet, as they do far from the start of a long string."""
    ctx, head_ctx = model.eval().context(ids), model.context(ids[:, :HEAD])
    h = e = model.encode(ids, ctx)
    head = start = e[:, :HEAD]
    for t in range(n_loops):
        head, _ = model.recurrent.step(head, start, t, head_ctx)
        h = torch.cat([start, model.recurrent.step(h, e, t, ctx)[0][:, HEAD:]], 1)
    return torch.cat([head, h[:, HEAD:]], 1)


def trajectory(model: OpenMythos, ids: Tensor, n_loops: int, start: Tensor | None = None):
    """The context, e, and h_0 .. h_T (T + 1, B, S, dim) with h_0 = `start`, or e; every loop run, and noise as the model's mode has it."""
    ctx = model.context(ids)
    e = model.encode(ids, ctx)
    states = [e if start is None else start]
    for t in range(n_loops):
        states.append(model.recurrent.step(states[-1], e, t, ctx)[0])
    return ctx, e, torch.stack(states)


def halting_loss(model: OpenMythos, ids: Tensor, targets: Tensor, n_loops: int, label):
    """Logits after all loops, and half of: the cross-entropy of the halting head's p with a `label` of `LABELS`, on states with noise and
    without, as a mean, and of the worst string of the batch, 6 times for cells that must not stop; and that of the answers where
    positions stop.

    The worst string counts since one p that is wrong lets a whole tail stop, and patterns that are slow are rare. Answers count where
    they are read since the coda reads each position at another loop.
    """
    start = late_start(model, ids, int(LONGEST_WAIT ** torch.rand(())))
    with torch.no_grad():
        ctx, _, clean = trajectory(model.eval(), ids, n_loops, start)
    _, _, states = trajectory(model.train(), ids, n_loops, start)
    both = torch.stack([states[1:], clean[1:]])                                                            # (2, T, B, S, dim)
    with torch.no_grad():
        right = torch.stack([model.decode(h, ctx).argmax(-1) == targets for h in both.flatten(0, 1)]).view(both.shape[:-1])
    seen, may = pairs(both.flatten(0, 2), ctx).view(*right.shape, -1), label(right)
    cells = F.binary_cross_entropy_with_logits(model.recurrent.act.halt(seen).squeeze(-1), may.float(), reduction="none")
    loss = (cells * may).mean() + (cells * may).amax(2).mean() + 6.0 * (cells * ~may).amax(2).mean()
    total, stops = torch.zeros_like(ids, dtype=torch.float32), []
    for h in seen[0]:
        _, weight, _, total = model.recurrent.act(h, total)
        stops.append(weight)
    stops = torch.stack(stops) * right[0]                        # 1 where a position stops, if its answer is right there
    stopped = stops.sum(0) > 0                                   # (B, S)
    if stopped.any():
        read = (stops.unsqueeze(-1) * states[1:]).sum(0)
        loss = loss + F.cross_entropy(model.decode(read, ctx)[stopped], targets[stopped])
    return model.decode(states[-1], ctx), 0.5 * loss


def ready(right: Bool[Tensor, "*passes loops batch seq"]) -> Bool[Tensor, "*passes loops batch seq"]:
    """Whether the prefix up to a position is right at a loop and at every later one."""
    return right.long().cumprod(-1).flip(-3).cumprod(-3).flip(-3).bool()


#: What a halting head may be taught, from which answers are right (..., T, B, S): that an answer and the one before are both right or
#: both wrong; that a prefix is `ready`, in its own string, where half of the guesses ahead of the front are lucky, or in every one of the batch.
LABELS = {"follows": lambda right: right == F.pad(right, (1, 0), value=True)[..., :-1], "ready by row": ready,
          "ready": lambda right: ready(right).all(-2, keepdim=True).expand_as(right)}


#: What trains a halting head, by name: (model, ids, targets, n_loops) -> logits, loss.
HALTING_LOSSES = {name: partial(halting_loss, label=label) for name, label in LABELS.items()}


def ponder(weight: Float[Tensor, "loops batch seq"]) -> Float[Tensor, ""]:
    """Graves' ponder cost N + R: the loops until a position halts, and the weight of the last of them, which has the gradient."""
    loops = torch.arange(1, len(weight) + 1, device=weight.device)[:, None, None]
    stopped_at = ((weight > 0) * loops).amax(0)
    return (stopped_at + weight.gather(0, (stopped_at - 1).clamp(min=0)[None])[0]).float().mean()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, linear decay."""
    rise = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    fall = min(1.0, (1 - step / recipe.steps) / recipe.decay + 0.01) if recipe.decay else 1.0
    return recipe.lr * rise * fall


def draw(recipe: Recipe, step: int) -> tuple[int, int]:
    """String length and loops of a step, from torch's default generator."""
    (shortest, longest), (fewest, most) = recipe.lengths, recipe.loops
    if recipe.curriculum:
        longest = max(3, min(longest, int(3 + step / recipe.steps / recipe.curriculum * longest)))
    length = int(torch.randint(min(shortest, longest), longest + 1, ()))
    most = most if recipe.spare_loops is None else max(fewest, min(most, length + recipe.spare_loops))
    return length, most if teaches_halting(recipe, step) else int(torch.randint(fewest, most + 1, ()))   # a front needs most to pass


@torch.no_grad()
def held_out(model: OpenMythos, recipe: Recipe, batch: int = 256) -> float:
    """Whole-string accuracy on fresh uniform strings of the longest trained length, at the most trained loops."""
    generator = torch.Generator().manual_seed(2 ** 32 - 1)   # no training step has this seed
    ids, targets = recipe.make_batch(batch, recipe.lengths[1], generator, model.embed.weight.device)
    return (model.eval()(ids, recipe.loops[1]).argmax(-1) == targets).all(1).float().mean().item()


def _save(checkpoint: Path, run: Run, optimizer):
    """Written beside, then renamed: a checkpoint is whole or not there."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"recipe": json.dumps(asdict(run.recipe)), "seed": run.seed, "history": run.history, "model": run.model.state_dict(),
                "optimizer": optimizer.state_dict()}, checkpoint.with_suffix(".tmp"))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def _load(checkpoint: Path, run: Run, optimizer):
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:                                   # which, depends on where it is torn
        raise OSError(f"{checkpoint}: damaged: {error}") from error
    for name, value in {"recipe": json.dumps(asdict(run.recipe)), "seed": run.seed}.items():
        if saved[name] != value:
            raise ValueError(f"{checkpoint} is of {name} {saved[name]}, not {value}: choose another folder, or do not resume")
    run.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run.history = saved["history"]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mythos_core.training", description="Train a recipe from scratch.")
    parser.add_argument("--recipe", required=True, help=f"one of {sorted(RECIPES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--device")
    parser.add_argument("--out", required=True, help="folder for checkpoint, weights and history")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(argv)
    try:
        recipe = replace(get_recipe(args.recipe), **({"steps": args.steps} if args.steps else {}))
        run = train(recipe, args.seed, args.device, out=args.out, resume=args.resume)
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; go on with --resume (checkpoint in {args.out})\n")
    last = run.history[-1]
    print(f"{recipe.name}, seed {args.seed}: loss {last['loss']:.5f}, whole strings {last['held_out']:.3f}, {last['seconds']:.1f} s; weights in {args.out}")


if __name__ == "__main__":
    main()
