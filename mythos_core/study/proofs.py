"""Measures of trainings that end when the model is proved, or say that it is not; and, independent
of the proof, what the model answers."""
import os
import time
from itertools import product

import torch
from torch import Tensor

from mythos_core.model.cache import KVCache
from mythos_core.model.model import OpenMythos
from mythos_core.proof.certificate import certify
from mythos_core.proof.choices import Codes
from mythos_core.proof.closure import Closure
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.tasks.machines import Machine
from mythos_core.tasks.unbounded import task
from mythos_core.training import NotProved, Run
from mythos_core.training.recipes import Recipe
from mythos_core.training.schedule import CERTIFY_EVERY
from mythos_core.training.step import take_step
from mythos_core.training.trainer import begin

#: What a row may be of: the environment's settings that make a processor round in another way.
ARITHMETICS = {"native": {}, "default": {"ATEN_CPU_CAPABILITY": "default"},
               "compatible": {"MKL_CBWR": "COMPATIBLE"}}
PIECE = 8192        # letters of a pass over a long string
SETTINGS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")


def check_arithmetic(name: str):
    """Refuse a run whose environment is not that of the arithmetic it is said to be of."""
    if name not in ARITHMETICS:
        raise ValueError(f"arithmetic = {name!r}: must be one of {sorted(ARITHMETICS)}")
    settings = {setting: os.environ[setting] for setting in SETTINGS if setting in os.environ}
    if settings != ARITHMETICS[name]:
        raise ValueError(f"arithmetic = {name!r}: the environment has {settings}, must have "
                         f"{ARITHMETICS[name]}")


@torch.no_grad()
def answered(model: OpenMythos, asked: Machine, strings: int) -> dict:
    """Strings, and how many of them are right at every position: all of 16 elements over two
    letters, if they are asked for; so many random ones of 16 and of 64 elements, one of 64 for each
    letter that has no other; and 1 / 64 as many of 1,024."""
    generator, row = torch.Generator().manual_seed(2 ** 31), {}
    short, long = ("uniform", "mixed") if asked.reversible else ("touring", "touring")
    runs = torch.arange(1, asked.letters + 1)[:, None].expand(-1, 64)
    groups = {"16": asked.make_batch(strings, 16, generator, strings=short)[0],
              "1024": asked.make_batch(strings // 64, 1024, generator, strings=long)[0],
              "64": torch.cat([asked.make_batch(strings, 64, generator, strings=long)[0], runs])}
    if strings >= 4096 and asked.letters == 2:
        groups["every 16"] = torch.tensor(list(product(range(1, 3), repeat=16)))
    for name, ids in groups.items():
        right = [(model(part).argmax(-1) == asked.answers(part)).all(1) for part in ids.split(1024)]
        row[name] = {"strings": len(ids), "whole": int(torch.cat(right).sum())}
    return row


def proof_row(run: Run | NotProved) -> dict:
    """The certificate, the steps to it, whether the machine read off is the one asked for, and what
    the model answers."""
    if isinstance(run, NotProved):
        return {"certificate": {"proved": False, "reason": str(run)}}
    machine, first = run.recipe.machine, next(row for row in run.history if row.get("proved"))
    return {"certificate": _in_short(run.certificate), "steps": len(run.history),
            "first_proof": {name: first[name] for name in ("step", "seconds")},
            "same_machine": run.certificate.machine == machine.minimal(),
            "answered": answered(run.model, machine, 4096 if len(machine) == 2
                                 and run.seed < 10 else 256)}


def _in_short(certificate) -> dict:
    """A certificate's summary without its tables, and the radius of balls, if it has some."""
    long = ("assumed", "asked", "machine", "table", "weights")
    radius = getattr(certificate.closure.states, "radius", None)
    return {name: value for name, value in certificate.summary().items() if name not in long} | (
        {} if radius is None else {"radius": radius})


def looping_row(recipe: Recipe, seed: int, device: str | None) -> dict:
    """Steps to the first proof, and the seconds that they took. A proof is tried every ten steps,
    whatever share of the batch is right: with few loops most of it cannot be."""
    with torch.random.fork_rng():
        run, optimizer = begin(recipe, seed, device, None, False)
        seconds, proved = 0.0, False
        while not proved and len(run.history) < recipe.steps:
            start, step = time.perf_counter(), len(run.history)
            run.history.append({"step": step, **take_step(run, optimizer, step)})
            seconds += time.perf_counter() - start
            proved = (step + 1) % CERTIFY_EVERY == 0 and certify(run.model, recipe.machine).proved
    return {"proved": proved, "steps": len(run.history), "train_seconds": seconds,
            "recipe": recipe.as_dict()}


@torch.no_grad()
def far_row(run: Run) -> dict:
    """Strings that are right at every position, left to right behind one cache: two of 65,536
    elements, one of 1,000,000."""
    model, machine, row = run.model, run.recipe.machine, {}
    for strings, length in ((2, 65_536), (1, 1_000_000)):
        ids, targets = machine.make_batch(strings, length, torch.Generator().manual_seed(length))
        cache, whole, start = KVCache(), torch.ones(strings, dtype=torch.bool), time.perf_counter()
        for part, target in zip(ids.split(5000, 1), targets.split(5000, 1)):
            whole &= (model(part, kv_cache=cache).argmax(-1) == target).all(1)
        row[str(length)] = {"strings": strings, "whole": int(whole.sum()),
                            "seconds": time.perf_counter() - start, "cache_bytes": cache.nbytes}
    return {"far": row}


@torch.no_grad()
def staircase_row(run: Run) -> dict:
    """Of one string of each length the tokens that are right after each loop, as many loops as it
    takes and three more, in pieces of `PIECE` letters behind one cache."""
    model, machine, row = run.model, run.recipe.machine, {}
    for length in (16, 256, 4096, 65_536, 1_048_576):
        ids, targets = machine.make_batch(1, length, torch.Generator().manual_seed(length))
        loops, start = model.recurrent.loops_for(length) + 3, time.perf_counter()
        cache, right = KVCache(), torch.zeros(loops, dtype=torch.int64)
        for part, target in zip(ids.split(PIECE, 1), targets.split(PIECE, 1)):
            states: list[Tensor] = []
            model(part, loops, cache, observer=lambda record, kept=states: kept.append(record.h))
            ctx = model.context(part)
            right += torch.stack([(model.decode(h, ctx).argmax(-1) == target).sum()
                                  for h in states])
        row[str(length)] = {"right": right.tolist(), "seconds": time.perf_counter() - start,
                            "cache_bytes": cache.nbytes}
    return {"staircase": row}


@torch.no_grad()
def ladder_row(run: Run | NotProved) -> dict:
    """The size of the machine asked for, its moves of which something is asked, and its
    certificate. By length, of 64 strings that break nothing: how many are right at every position,
    the share of right tokens, the first position (from 0) that is wrong in any of them. The closure
    against the task: contexts met, elements of the longest strings, wrong answers to those."""
    run = run.run if isinstance(run, NotProved) else run
    machine, certificate, lengths = run.recipe.machine, run.certificate, {}
    unbounded = task(machine.name.rpartition(" of ")[0])
    for length in (16, 20, 24, 32, 64):
        ids, targets = unbounded.draw(64, length, torch.Generator().manual_seed(2 ** 31 + length))
        right = run.model.eval()(ids).argmax(-1) == targets
        wrong = (~right).any(0).nonzero()
        lengths[str(length)] = {"strings": len(ids), "whole": int(right.all(1).sum()),
                                "token": right.float().mean().item(),
                                "first_wrong": int(wrong[0]) if len(wrong) else None}
    closure = Closure(Codes(certificate.model, certificate.arithmetic), machine.letters,
                      unbounded).run()
    return {"states": len(machine), "moves": int((machine.answer != NOT_ASKED).sum()),
            "certificate": _in_short(certificate), "steps": len(run.history), "lengths": lengths,
            "closure": {"contexts": len(closure.seen), "elements": closure.length,
                        "wrong": closure.wrong}}
