"""Proofs that a model answers as a machine does, on every string of every length.

The theorem for strict models; that for dilated ones is in `proof.scan`. Let a model be strict, with
a window of 1, without the carry and without positions (RoPE off), and let its states be rounded to
codes c_1 .. c_n (`StrictBlock.rounded`). Call the code of the position before, or the start of the
string, and a position's own letter its *context*. Let a set of pairs (context, state of the machine
before the letter) hold those of all one-letter strings; and with each pair, for each letter, the
one that follows it; letters apart of which nothing is asked there. If in every pair the model's
answer is the machine's, then it is so at every position of every string, after as many loops as
there are positions, or left to right.

Proof. With a window of 1 the prelude makes of a position what its own token alone says, and so does
the coda of its own state. By the strict loop (theorem 1 of `StrictBlock`) the settled state of a
position is then a function of its context, and so are the code it is rounded to, which with the
next letter is the context that follows, and its answer. By induction over the positions, each
position of each string has a pair in the set. QED.

What is assumed of arithmetic. A context is evaluated in float64, which chooses the next code and
the answer. `proof.balls` bounds, from the weights and before anything is run, how far any machine
may come out from that which computes in the model's dtype and keeps to `balls.ASSUMED`. A choice
holds where its lead is larger than its bound. Where the experts are not certain, each set that is
possible is followed, and the choice of code has to be the same with all. So the proof holds for
every such machine, every batch, every schedule of the loops: what is handed on is a code, the same
bits for all.
"""
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mythos_core.model.layers import NORM_EPS, RMSNorm
from mythos_core.model.model import OpenMythos
from mythos_core.model.weights import digest
from mythos_core.proof.balls import ASSUMED
from mythos_core.proof.choices import Codes, with_codes
from mythos_core.proof.closure import Closure
from mythos_core.proof.invariant import LoopCell, invariant
from mythos_core.proof.scan import Scan, codes_by_element
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.tasks.machines import Machine

TRIED = 20_000          # codes times letters, at most, of codes that are chosen by moves
SEEN = 16               # elements of the strings whose states the codes are chosen from



@dataclass(frozen=True, eq=False)
class Certificate:
    """What was proved of a model, or what stands against it.

    Attributes:
        proved: whether the answers are right on all strings: `reason` is ""
            then, and else says why not.
        arithmetic: in what the model computes, of `balls.ROUNDOFF`; the proof is for that.
        contexts: of a strict model pairs of a context and a state of the machine that were met, of
            a dilated one products.
        wrong: those in which the model answers otherwise, among the ones that the shortest strings
            with a wrong answer lead to; the search ends there.
        codes: (n, dim) what states are rounded to; of a model that is not rounded, the centres of
            its balls.
        state_margin: the least distance of a state from the border of its code's cell, or of an
            image of a ball from the border of the ball that holds it. This and what follows is
            measured of a closed set alone, and else 0.
        logit_margin: the least lead of an answer's logit; routing_margin: of a chosen expert's,
            infinite where there is no other expert; both of a model with codes.
        safety: the least number of times that the lead of a "state" and of a "logit" exceeds the
            bound of what arithmetic may do to it; a proof has both above 1. Of a model that is not
            rounded, of a "state": a ball's radius over how far an image reaches from its centre.
        branched: contexts in which arithmetic may choose other experts, and both were followed.
        model: the one that the proof is about, its states rounded to the codes, if it is of such.
        asked: the machine, in its minimal form.
    """

    proved: bool
    reason: str
    arithmetic: str
    model: OpenMythos
    asked: Machine
    closure: Closure | Scan

    @property
    def codes(self) -> Float[Tensor, "codes dim"]:
        return self.closure.states.codes

    @property
    def contexts(self) -> int:
        return self.closure.contexts

    @property
    def wrong(self) -> int:
        return self.closure.wrong

    @property
    def state_margin(self) -> float:
        return self._margin("state")

    @property
    def logit_margin(self) -> float:
        return self._margin("logit")

    @property
    def routing_margin(self) -> float:
        return self._margin("routing")

    def _margin(self, of: str) -> float:
        return self.closure.states.margins[of] if self.closure.closed else 0.0

    @property
    def safety(self) -> dict[str, float]:
        return self.closure.states.safety

    @property
    def branched(self) -> int:
        return self.closure.states.branched

    @cached_property
    def machine(self) -> Machine | None:
        """The minimal machine that the contexts make up, as read off the model's own answers, right
        or wrong; None if they were not closed, or not all strings are asked about."""
        closure = self.closure
        return closure.machine() if closure.closed and not closure.left_out else None

    def summary(self) -> dict:
        """What a file beside the weights says of it, as docs/certificate.md has it, and
        `proof.check` reads; a number that is infinite is None."""
        margins = {name: _finite(getattr(self, name))
                   for name in ("state_margin", "logit_margin", "routing_margin")}
        return {"proved": self.proved, "reason": self.reason, "weights": digest(self.model),
                "config": asdict(self.model.config),
                "arithmetic": self.arithmetic, "assumed": ASSUMED, "contexts": self.contexts,
                "wrong": self.wrong, "codes": len(self.codes), **margins,
                "safety": {name: _finite(times) for name, times in self.safety.items()},
                "branched": self.branched, "asked": self.asked.as_dict(),
                "machine": self.machine and self.machine.as_dict(),
                "table": self.closure.table() if self.proved else None}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def certify(model: OpenMythos, machine: Machine,
            codes: Float[Tensor, "codes dim"] | None = None,
            arithmetic: str | None = None, rounded: bool = True) -> Certificate:
    """Prove that `model`, its states rounded to codes, answers as `machine` does on every string.

    Args:
        codes: to round to. Default: the model's own, if it has some; else means of the settled
            states of strings of at most 16 elements, taken by the machine's state, its answer and
            its last k moves, with the least k from 0 to 3 that gives a proof; where that makes too
            many codes (`TRIED`), a smaller k is the last. That labels choose the codes takes
            nothing from the proof, which checks what they do.
        arithmetic: that of the model's dtype, which is the default; or "tf32" of a float32 model,
            for a GPU where it is allowed.
        rounded: False: prove the model without codes, as it was trained (`proof.invariant`).

    Raises:
        ValueError: if the model is not of the kind that the theorem is about, or
            has no room for the machine.
    """
    _check(model, machine)
    machine = replace(machine).minimal()  # of the tables as they are: a caller may change them
    own = str(model.embed.weight.dtype).removeprefix("torch.")
    arithmetic, possible = arithmetic or own, [own, *["tf32"] * (own == "float32")]
    if arithmetic not in possible:
        raise ValueError(f"arithmetic = {arithmetic!r}: must be one of {possible} for a model of "
                         f"{own}")
    if not rounded:
        return _as_trained(model, machine, codes, arithmetic)
    if codes is None and model.recurrent.codes is not None:
        codes = model.recurrent.codes
    bare = with_codes(model, None)
    if codes is not None:
        return _certify(bare, machine, codes, arithmetic)
    for chosen in candidate_codes(bare, machine):
        certificate = _certify(bare, machine, chosen, arithmetic)
        if certificate.proved:
            break
    return certificate


def automaton(model: OpenMythos, letters: int) -> Machine | None:
    """The minimal machine that a model with codes is, right or wrong, as read off its own answers;
    None if its contexts, over `letters` letters, are too many to close, or if arithmetic may choose
    otherwise in one of them. ValueError as `certify`."""
    _check(model)
    if model.config.dilation > 1:
        raise ValueError(f"model.config.dilation = {model.config.dilation}: must be 1, "
                         "since no letter is read behind a state; `certify` reads a machine off")
    if model.recurrent.codes is None:
        raise ValueError("model.config.codes = 0: must be above 0; `certify` finds some")
    vocab = model.config.vocab_size
    if not 1 <= letters < vocab:
        raise ValueError(f"letters = {letters}: must be in 1 .. vocab_size - 1 = {vocab - 1}")
    arithmetic = str(model.embed.weight.dtype).removeprefix("torch.")
    closure = Closure(Codes(with_codes(model, model.recurrent.codes), arithmetic), letters).run()
    safe = closure.closed and all(times > 1 for times in closure.states.safety.values())
    return closure.machine() if safe else None


def _check(model, machine=None):
    c = model.config
    if c is not model.recurrent.config:
        raise ValueError("model.recurrent.config: was changed after the model was made; must be "
                         "model.config")
    wanted = {"strict": True} if c.dilation == 1 else {}
    for name, value in {**wanted, "window": 1, "stride": 1, "carry": False, "rope": False,
                        "attn_type": "gqa", "max_seq_len": None}.items():
        if getattr(c, name) != value:
            raise ValueError(f"model.config.{name} = {getattr(c, name)}: "
                             f"must be {value} for a certificate")
    if c.rope_theta < 1:                             # angles of slots, from 0 to dilation - 1
        raise ValueError(f"model.config.rope_theta = {c.rope_theta}: must be at least 1 for a "
                         "certificate")
    if any(part.eps != NORM_EPS for part in model.modules() if isinstance(part, RMSNorm)):
        raise ValueError(f"an RMSNorm of the model has another eps than {NORM_EPS}: a copy, of "
                         "which the certificate would be, has not")
    if model.head.weight is not model.embed.weight:
        raise ValueError("model.head.weight: must be model.embed.weight for a certificate")
    if machine is not None and machine.vocab_size > c.vocab_size:
        raise ValueError(f"machine {machine.name!r} has tokens up to {machine.vocab_size - 1}: "
                         f"must be below model.config.vocab_size = {c.vocab_size}")
    if machine is not None and bool((machine.answer[machine.start] == NOT_ASKED).all()):
        raise ValueError(f"machine {machine.name!r}: must ask for an answer to some first letter")


@torch.no_grad()
def candidate_codes(model: OpenMythos, machine: Machine) -> Iterator[Float[Tensor, "codes dim"]]:
    """Means of settled states by the machine's state and answer and its last k moves, for
    k = 0, 1, 2, 3; of a dilated model, means by what they should mean."""
    if model.config.dilation > 1:
        yield codes_by_element(model, machine)
        return
    generator = torch.Generator().manual_seed(0)
    ids, _ = machine.make_batch(max(256, 16 * len(machine)), SEEN, generator,
                                model.embed.weight.device,
                                "uniform" if machine.reversible else "touring")
    h = model.recurrent.settle(model.encode(ids, model.context(ids))).flatten(0, 1)
    label, moves = machine.outcomes(ids), machine.moves(ids) + 1
    for k in range(4):
        _, label = label.unique(return_inverse=True)
        group = label.flatten()
        n = int(group.max()) + 1
        if k and n * machine.letters > TRIED:
            return
        sums = torch.zeros(n, h.shape[1], dtype=h.dtype, device=h.device).index_add(0, group, h)
        yield sums / group.bincount(minlength=n).unsqueeze(1)
        # the move k before, 0 before the first
        label = label * (moves.max() + 1) + F.pad(moves, (k, 0))[:, :ids.shape[1]]


def _certify(bare: OpenMythos, machine: Machine, codes: Tensor, arithmetic: str) -> Certificate:
    model = with_codes(bare, codes)
    states = Codes(model, arithmetic)
    closure = (Scan(states, machine) if model.config.dilation > 1
               else Closure(states, machine.letters, machine)).run()
    return _certificate(closure, model, machine, arithmetic)


def _as_trained(model: OpenMythos, machine: Machine, codes, arithmetic: str) -> Certificate:
    if codes is not None:
        raise ValueError("rounded = False: must be True with codes")
    model = with_codes(model, None)
    return _certificate(invariant(LoopCell(model, arithmetic), machine), model, machine, arithmetic)


def _certificate(closure, model: OpenMythos, machine: Machine, arithmetic: str) -> Certificate:
    """The verdict on a closure."""
    reason = closure.fault
    if not reason and not closure.closed:
        reason = f"not closed after {closure.contexts} contexts"
    elif not reason:
        reason = "; ".join(f"a {name} leads by {times:.3g} times what {arithmetic} may do to it: "
                           "must be above 1" for name, times in closure.states.safety.items()
                           if not times > 1)
    return Certificate(not reason, reason, arithmetic, model, machine, closure)
