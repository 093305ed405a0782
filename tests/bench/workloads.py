"""The work that is timed. Each function gives a `Pair`: the same work by open-mythos 0.5.0 and by
us, with the same weights; or by a strict model of ours in two ways."""
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import machine
import peer
import torch
import torch.nn.functional as F

from mythos_core import KVCache, OpenMythos, from_open_mythos
from mythos_core.model.config import parity_config, tutorial_config
from mythos_core.tasks.machines import machine as machine_of
from mythos_core.tasks.parity import make_batch
from mythos_core.training.recipes import get_recipe, recipe_for
from mythos_core.training.step import take_step
from mythos_core.training.together import step_together
from mythos_core.training.trainer import begin

FLOAT = 4           # bytes
# a bias of the halting unit at which no position halts within 16 loops; far lower ones make
# gradients so small that they are slow
NEVER = -4.0


@dataclass(frozen=True)
class Pair:
    """Two callables that do the same and return tensors to compare, and the bytes that any
    implementation has to move for it. Where they are not `alike`, they do the same job with other
    weights, and only shapes are compared."""

    theirs: Callable
    ours: Callable
    moved: int
    alike: bool = True


def training_step(device, loops=3, halt_bias=0.0, compiled=False) -> Pair:
    """The article's: 64 strings of 24 bits, AdamW, gradients clipped at norm 1. Ours has the fused
    AdamW, as in `training.train`; returns the loss."""
    theirs, ours = models(parity_config(), device, halt_bias)
    batch = make_batch(64, 24, device=device)
    steps = (stepper(theirs, *batch, loops), stepper(torch.compile(ours) if compiled else ours,
                                                     *batch, loops, fused=True))
    # weights and AdamW's two moments are read and written, gradients written and read
    return finished(*steps, 8 * weights(ours), device)


def forward(device, batch=64, length=24, loops=3, halt_bias=0.0, window=None) -> Pair:
    """Logits without gradient. A `window` is ours alone: the reference has none, so then the two
    are not the same."""
    theirs, ours = models(parity_config(max_seq_len=max(length, 128)), device, halt_bias, window)
    ids, _ = make_batch(batch, length, device=device)
    assert loops_run(theirs, ids, loops) == loops_run(ours, ids, loops)
    return finished(*(torch.no_grad()(lambda model=model: model(ids, loops))
                      for model in (theirs, ours)), weights(ours), device)


def mixture(device, experts, chosen) -> Pair:
    """MoE forward and backward, 1,024 tokens, dim 256, expert width 128; returns the output and the
    router's gradient."""
    theirs, ours = models(tutorial_config("gqa", dim=256, n_experts=experts,
                                          n_experts_per_tok=chosen, expert_dim=128), device)
    x = torch.randn(4, 256, 256, device=device)
    layers = [model.recurrent.block.ffn for model in (theirs, ours)]

    def pass_of(layer, output):
        def forward_and_backward():
            layer.zero_grad()
            out = output(layer(x))
            out.sum().backward()
            return out, layer.router.weight.grad
        return forward_and_backward
    return finished(pass_of(layers[0], lambda out: out), pass_of(layers[1], lambda out: out[0]),
                    2 * weights(layers[1]), device)


def decode(device, attn_type, context) -> Pair:
    """One token behind `context` others: batch 8, 8 loops."""
    theirs, ours = models(tutorial_config(attn_type, max_seq_len=4096), device)
    ids, cache = filled(ours, context, device)
    return finished(their_token(theirs, ids, 8), our_token(ours, ids, 8, cache),
                    cache.nbytes + weights(ours), device)


def strict_token(device, n_loops, context=1536) -> Pair:
    """One token of a strict model behind `context` others that have settled: by `n_loops` loops,
    and by the one that is enough."""
    model = strict_model("gqa", device)
    ids, cache = filled(model, context, device)

    @torch.inference_mode()                                      # as `forward` is behind a cache
    def looped():
        cache.length = context
        ctx = model.context(ids[:, -1:], cache)                  # `forward` would stop after one
        return model.decode(model.recurrent(model.encode(ids[:, -1:], ctx), n_loops, ctx), ctx)
    return finished(looped, our_token(model, ids, 1, cache), cache.nbytes + weights(model), device)


def strict_decode(device, attn_type, context=1536) -> Pair:
    """One token behind `context` others: of the reference at 16 loops, and of a strict model of the
    same size, which needs one."""
    theirs, _ = models(tutorial_config(attn_type, max_seq_len=4096), device)
    model = strict_model(attn_type, device)
    ids, cache = filled(model, context, device)
    pair = finished(their_token(theirs, ids, 16), our_token(model, ids, 1, cache),
                    cache.nbytes + weights(model), device)
    return replace(pair, alike=False)


def several_seeds(device, name, seeds=8) -> Pair:
    """A training step of each of several seeds of a machine: one after the other, and together.
    Returns the losses."""
    recipe = replace(recipe_for(machine_of(name)), curriculum=0.0)
    alone, together = ([begin(recipe, seed, device, None, False) for seed in range(seeds)]
                       for _ in range(2))

    def one_by_one(runs, optimizers):
        return [{"step": len(run.history), **take_step(run, optimizer, len(run.history))}
                for run, optimizer in zip(runs, optimizers)]

    def steps(begun, step):
        runs, optimizers = zip(*begun)

        def take():
            rows = step(runs, optimizers)
            for run, row in zip(runs, rows):
                run.history.append(row)
            return torch.tensor([row["loss"] for row in rows])
        return take
    return finished(steps(alone, one_by_one), steps(together, step_together),
                    8 * seeds * weights(alone[0][0].model), device)


def machine_step(name) -> Callable:
    """A training step by a machine's recipe, at its full length, to be called again and again."""
    return step_of(replace(recipe_for(machine_of(name)), curriculum=0.0, lengths=(16, 16)), 0)


def step_of(recipe, step) -> Callable:
    """A recipe's training step of that number, to be called again and again."""
    run, optimizer = begin(recipe, 0, "cpu", None, False)
    return lambda: take_step(run, optimizer, step)


def settled_step(device, length=16) -> Pair:
    """A training step of a strict model, of parity's recipe without its noise: by as many loops as
    positions, and settled from left to right, with the same gradient. Returns the loss."""
    config = replace(get_recipe("parity-extrapolating").config, loop_noise=0.0, halting="none")
    torch.manual_seed(0)
    looped = OpenMythos(config).to(device).train()
    settled = copy.deepcopy(looped)
    batch = make_batch(64, length, device=device)
    return finished(stepper(looped, *batch, length, fused=True),
                    stepper(settled, *batch, None, fused=True), 8 * weights(settled), device)


def strict_string(device, length=1024, strings=16) -> Pair:
    """Answers to strings from scratch by the proved parity model: as many loops as positions over
    all of them, and from left to right, each position once."""
    model = OpenMythos.from_pretrained("parity-extrapolating", map_location=device)
    model = model.without_halting()
    ids, _ = make_batch(strings, length, device=device)
    looped, settled = (torch.no_grad()(lambda n=n: model(ids, n).argmax(-1))
                       for n in (length, None))
    return finished(looped, settled, weights(model), device)


def strict_model(attn_type, device) -> OpenMythos:
    """Of the tutorial's size, untrained; it runs every loop that it is asked for."""
    torch.manual_seed(0)
    config = tutorial_config(attn_type, max_seq_len=4096, strict=True, carry=False,
                             halting="none", loop_embedding=False, lora_rank=0)
    return OpenMythos(config).to(device).eval()


@torch.no_grad()
def filled(model, context, device):
    """8 strings of one token more than `context`, and the model's cache behind that many."""
    ids, cache = torch.randint(0, 256, (8, context + 1), device=device), KVCache(context + 1)
    model(ids[:, :-1], 8, cache)
    return ids, cache


def our_token(model, ids, n_loops, cache):
    """The last token behind the others. The context does not grow from call to call: the cache goes
    back by the position that was written."""
    def token():
        cache.length = ids.shape[1] - 1
        return model(ids[:, -1:], n_loops, cache)
    return token


def their_token(model, ids, n_loops):
    """As `our_token`, of the reference: it extends a shallow copy of its dictionary, whose tensors
    it replaces."""
    context, cache = ids.shape[1] - 1, {}
    with torch.no_grad():
        model(ids[:, :-1], n_loops, cache, 0)
    return torch.no_grad()(lambda: model(ids[:, -1:], n_loops, dict(cache), context))


class EntryForEachLoop(KVCache):
    """A strict model's cache as an ordinary loop needs it: loop t reads what loop t left of the
    positions before, their state too."""

    def __init__(self, n_loops: int):
        super().__init__()
        self.n_loops, self.calls = n_loops, Counter()

    def begin(self, **made_for):
        super().begin(**made_for)
        self.calls.clear()

    def extend(self, layer, name, x, keep=None):
        if layer == "loop":
            layer = f"loop.{self.calls[name]}"
            self.calls[name] += 1
            if self.calls[name] > self.n_loops:                  # how the last one ended is for one
                return x                                         # that all share
        return super().extend(layer, name, x, keep)


@torch.inference_mode()
def strict_cache(n_loops=16, context=512) -> tuple[int, int]:
    """Bytes of the cache of 8 strings behind a strict model, with an entry for each of `n_loops`
    and with its one for all. Behind the first `n_loops` positions, read one by one, both have given
    the same logits: so far do as many loops settle."""
    model, ids = strict_model("gqa", "cpu"), torch.randint(0, 256, (8, context))
    each, one = EntryForEachLoop(n_loops), KVCache()

    def read(some):
        each.begin(config=model.config, n_loops=n_loops, batch=len(ids))
        ctx = model.context(some, each)
        logits = model.decode(model.recurrent(model.encode(some, ctx), n_loops, ctx), ctx)
        each.advance(some.shape[1])
        return logits

    for token in ids[:, :n_loops].split(1, 1):
        torch.testing.assert_close(read(token), model(token, 1, one), atol=1e-5, rtol=1e-5)
    read(ids[:, n_loops:])
    model(ids[:, n_loops:], n_loops, one)
    assert (len(each), len(one)) == (2 + n_loops, 3)
    return each.nbytes, one.nbytes


def cache_bytes(attn_type, context) -> tuple[int, int]:
    """What the reference's cache and ours hold of 8 strings after 8 loops."""
    theirs, ours = models(tutorial_config(attn_type, max_seq_len=4096), "cpu")
    ids, their_cache, cache = torch.randint(0, 256, (8, context)), {}, KVCache()
    with torch.no_grad():
        theirs(ids, 8, their_cache, 0)
        ours(ids, 8, cache)
    return (sum(tensor.nbytes for layer in their_cache.values() for tensor in layer.values()),
            cache.nbytes)


def training_peak(whose) -> int:
    """Peak bytes of two training steps, of "theirs" or "ours": the second has AdamW's moments from
    the first."""
    step = getattr(training_step("cpu"), whose)
    return machine.peak_bytes(lambda: (step(), step()))


def models(config, device, halt_bias=0.0, window=None):
    """The reference and ours with its weights."""
    torch.manual_seed(0)
    theirs = peer.model(config)
    torch.nn.init.constant_(theirs.recurrent.act.halt.bias, halt_bias)
    return (theirs.to(device), from_open_mythos(theirs.state_dict(),
                                                replace(config, window=window)).to(device))


@torch.no_grad()
def loops_run(model, ids, loops) -> int:
    """How many of `loops` the model runs before every position has halted."""
    ran = []
    hook = model.recurrent.act.register_forward_hook(lambda *_: ran.append(1))
    model(ids, loops)
    hook.remove()
    return len(ran)


def stepper(model, ids, targets, loops, fused=None):
    """A training step, to be called again and again."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=fused)

    def step():
        loss = F.cross_entropy(model(ids, loops).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()
    return step


def weights(module) -> int:
    """Bytes of a module's parameters."""
    return FLOAT * sum(parameter.numel() for parameter in module.parameters())


def finished(theirs, ours, moved, device) -> Pair:
    """A `Pair` whose calls return when the device has done the work."""
    def waiting(work):
        def call():
            out = work()
            torch.cuda.synchronize()
            return out
        return call if device == "cuda" else work
    return Pair(waiting(theirs), waiting(ours), moved)
