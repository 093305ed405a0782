"""What is measured of a looped model of text: bits by loops, settling, experts, a continuation."""
import string
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mythos_core.model.cache import KVCache
from mythos_core.model.layers import evaluated
from mythos_core.model.model import OpenMythos
from mythos_core.probes import expert_load, halting_map, load_entropy, logits_after
from mythos_core.training import Run
from mythos_core.training.losses import bits

CONTEXT = 128   # bytes of a window
LOOPS = 8       # that a looped model is trained with, or at most
NEAR = 0.01     # relative distance from its end at which a state counts as near it
AT_ONCE = 64    # windows of a pass, when models are measured

#: Kinds of bytes, and which they are; tabs, control characters and non-ASCII bytes are of none.
KINDS = {"lower case": string.ascii_lowercase, "upper case": string.ascii_uppercase,
         "digits": string.digits, "space": " ", "newline": "\n",
         "punctuation": string.punctuation}


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
@evaluated
def bits_one_loop(model: OpenMythos, ids: Int[Tensor, "windows seq"],
                  targets: Int[Tensor, "windows seq"]) -> Float[Tensor, "windows seq"]:
    """-log2 p of each byte of a strict model that reads from left to right, one loop for each byte,
    behind a cache of what has settled."""
    return bits(model(ids, 1, KVCache(ids.shape[1])), targets)


@torch.no_grad()
@evaluated
def settling(model: OpenMythos, ids: Int[Tensor, "windows seq"]
             ) -> tuple[Float[Tensor, "loops windows seq"], Int[Tensor, "windows seq"]]:
    """Of a strict model: ||h_t - h_T|| / ||h_T|| of each position for t = 1 .. T, with T the
    length; and the loops after which a position, and all before it, is as it stays: bit for
    bit, or with the carry to rounding. Without the carry h_T is the fixed point, exactly."""
    states, settled = [], []

    def look(record):
        states.append(record.h)
        settled.append(record.settled)

    model(ids, ids.shape[1], observer=look)
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
@evaluated
def experts_by_kind(model: OpenMythos, ids: Int[Tensor, "windows seq"], n_loops: int
                    ) -> Float[Tensor, "kinds experts"]:
    """Which share of the slots of a kind's bytes each expert has, over all loops that ran; NaN for
    a kind that `ids` lack. With two slots a byte no share is above 1/2."""
    kinds, slots = kinds_of(ids), torch.zeros(len(KINDS), model.config.n_experts)

    def count(record):
        chosen = F.one_hot(record.expert_ids, model.config.n_experts).sum(-2)
        for number in range(len(KINDS)):
            slots[number] += chosen[kinds == number].sum(0).cpu()

    model(ids, n_loops, observer=count)
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
    sample = corpus.windows("test", CONTEXT, AT_ONCE, device)
    trained, loops = run.recipe.loops[1], [2 ** k for k in range(CONTEXT.bit_length())]
    by_loops = bits_by_loops(model, ids, targets, loops).mean((1, 2)).tolist()
    best = min(range(len(loops)), key=by_loops.__getitem__)
    row: dict[str, Any] = {
        "windows": len(ids), "loops": loops, "bits": by_loops, "trained_loops": trained,
        "best_loops": loops[best], "best": by_loops[best], "beyond": by_loops[-1] - by_loops[best],
        "unrounded": bits_by_loops(run.model, ids, targets, [trained]).mean().item(),
        "expert_entropy": load_entropy(expert_load(model, sample[0], trained)),
        "experts_by_kind": {kind: share.tolist() for kind, share in zip(
            KINDS, experts_by_kind(model, sample[0], trained)) if share.isfinite().all()},
        "text": continuation(model, sample[0][:1, :CONTEXT // 4], trained, CONTEXT - CONTEXT // 4)}
    if model.config.strict:
        row |= _strict_measures(model, *sample)
    if model.recurrent.act is not None:
        stopped = halting_map(model, sample[0], LOOPS).stopped_at
        row["stopped_after"] = stopped.float().mean(0).tolist()
    return row


def _strict_measures(model, ids, targets) -> dict:
    one_loop = bits_one_loop(model, ids, targets)
    all_loops = bits_by_loops(model, ids, targets, [CONTEXT])[0]
    distance, settled_after = settling(model, ids)
    return {"one_loop": one_loop.mean().item(), "all_loops": all_loops.mean().item(),
            "largest_difference": (one_loop - all_loops).abs().max().item(),
            "distance": distance.mean((1, 2)).tolist(),
            "near_after": loops_until(distance < NEAR).float().mean(0).tolist(),
            "settled_after": settled_after.float().mean(0).tolist()}


def continuation(model: OpenMythos, prompt: Int[Tensor, "one seq"], n_loops: int,
                 new_bytes: int) -> str:
    """The prompt and so many bytes drawn behind it, seed 0; bytes that are no UTF-8 as U+FFFD."""
    generator = torch.Generator(prompt.device).manual_seed(0)
    out = model.generate(prompt, new_bytes, n_loops, generator=generator)
    return bytes(out[0].tolist()).decode(errors="replace")
