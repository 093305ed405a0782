"""Proofs that a strict model answers as a machine does, on every string of every length.

The theorem. Let a model be strict with stride s, without the carry, without positions (RoPE off)
and with a window W, and let its states be rounded to codes c_1 .. c_n (`StrictBlock.rounded`).
Call what decides position i its *context*: the codes of the W + s - 1 positions before it, and the
last (W - 1)(P + 1) + 1 tokens, where P is the number of prelude layers; fewer near the start of the
string. Let a set of triples (context, state of the machine, answer due) hold that of each
one-letter string, and with each triple, for each letter, the one that follows it; letters apart of
which nothing is asked there. If the model's answer is the one due in every triple, then it is the
machine's at every position of every string, after as many loops as there are positions.

Proof. By the strict loop (theorem 1 of `StrictBlock`) the settled state of position i is a
function of its context, and so is the code it is rounded to, hence the context that follows by
a letter; its answer is a function of the codes of the (W - 1) C positions before it, C the
number of coda layers, and of its own. So, by induction over the positions, each position of
each string has a triple in the set.

What is assumed of arithmetic. A context is evaluated in float64, which makes three choices: the
code, the answer and the experts. How far each is from being another one is its *margin*. The
model's own arithmetic evaluates the context too, and how much smaller or larger the margins of the
same choices are there, at most, is the *error*. The proof holds on every machine whose error is at
most `SPARE` times the one measured; where a margin is smaller than that, nothing is proved.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.proof.closure import Closure, with_codes
from mythos_core.proof.scan import Scan, codes_by_element
from mythos_core.tasks.machines import Machine

SPARE = 100             # how many times the measured error another machine may have
TRIED = 20_000          # codes times letters, at most, of codes that are chosen by moves
SEEN = 16               # elements of the strings whose states the codes are chosen from



@dataclass(frozen=True, eq=False)
class Certificate:
    """What was proved of a model, or what stands against it.

    Attributes:
        proved: whether the answers are right on all strings: `reason` is ""
            then, and else says why not.
        contexts: triples of a context, a state of the machine and the answer due that were met.
        wrong: those in which the model answers otherwise, among the ones that the shortest strings
            with a wrong answer lead to; the search ends there.
        codes: (n, dim) what states are rounded to.
        state_margin: the least distance of a state from the border of its code's cell. Beside it in
            `errors` how far the model's arithmetic and float64 are apart in it, at most. Both are
            measured of a closed set alone, and else 0.
        logit_margin: the least lead of an answer's logit; routing_margin: of a chosen expert's,
            infinite where there is no other expert.
        model: the model with its states rounded to the codes: the one that the proof is about.
    """

    proved: bool
    reason: str
    contexts: int
    wrong: int
    codes: Float[Tensor, "codes dim"]
    state_margin: float
    logit_margin: float
    routing_margin: float
    errors: dict[str, float]
    model: OpenMythos
    closure: Closure | Scan

    @cached_property
    def machine(self) -> Machine | None:
        """The minimal machine that the contexts make up, as read off the model's own answers, right
        or wrong; None if they were not closed, or not all strings are asked about."""
        closure = self.closure
        return closure.machine() if closure.closed and not closure.left_out else None

    def summary(self) -> dict:
        """What a file beside the weights says of it; the margin of a choice without an alternative
        is None."""
        margins = {name: getattr(self, name) if math.isfinite(getattr(self, name)) else None
                   for name in ("state_margin", "logit_margin", "routing_margin")}
        return {"proved": self.proved, "reason": self.reason, "contexts": self.contexts,
                "wrong": self.wrong, "codes": len(self.codes), **margins, "errors": self.errors,
                "machine": self.machine and self.machine.as_dict()}


def certify(model: OpenMythos, machine: Machine,
            codes: Float[Tensor, "codes dim"] | None = None) -> Certificate:
    """Prove that `model`, its states rounded to codes, answers as `machine` does on every string.

    Args:
        codes: to round to. Default: the model's own, if it has some; else means of the settled
            states of strings of at most 16 elements, taken by the machine's state, its answer and
            its last k moves, with the least k from 0 to 3 that gives a proof; where that makes too
            many codes (`TRIED`), a smaller k is the last. That labels choose the codes takes
            nothing from the proof, which checks what they do.

    Raises:
        ValueError: if the model is not of the kind that the theorem is about, or
            has no room for the machine.
    """
    _check(model, machine)
    if codes is None and model.recurrent.codes is not None:
        codes = model.recurrent.codes
    bare = with_codes(model, None)
    if codes is not None:
        return _certify(bare, machine, codes)
    for chosen in candidate_codes(bare, machine):
        certificate = _certify(bare, machine, chosen)
        if certificate.proved:
            break
    return certificate


def automaton(model: OpenMythos, letters: int) -> Machine | None:
    """The minimal machine that a model with codes is, right or wrong, as read off its own answers;
    None if its contexts, over `letters` letters, are too many to close. ValueError as `certify`."""
    _check(model)
    if model.config.dilation > 1:
        raise ValueError(f"model.config.dilation = {model.config.dilation}: must be 1, "
                         "since no letter is read behind a state; `certify` reads a machine off")
    if model.recurrent.codes is None:
        raise ValueError("model.config.codes = 0: must be above 0; `certify` finds some")
    closure = Closure(with_codes(model, model.recurrent.codes), letters).run()
    return closure.machine() if closure.closed else None


def _check(model, machine=None):
    c = model.config
    wanted = {"strict": True} if c.dilation == 1 else {"window": 1}
    for name, value in {**wanted, "carry": False, "rope": False}.items():
        if getattr(c, name) != value:
            raise ValueError(f"model.config.{name} = {getattr(c, name)}: "
                             f"must be {value} for a certificate")
    if model.head.weight is not model.embed.weight:
        raise ValueError("model.head.weight: must be model.embed.weight for a certificate")
    if c.window is None:
        raise ValueError("model.config.window = None: must be a number for a certificate")
    if machine is not None and machine.vocab_size > c.vocab_size:
        raise ValueError(f"machine {machine.name!r} has tokens up to {machine.vocab_size - 1}: "
                         f"must be below model.config.vocab_size = {c.vocab_size}")


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


def _certify(bare: OpenMythos, machine: Machine, codes: Tensor) -> Certificate:
    model = with_codes(bare, codes)
    closure = (Scan(model, machine) if model.config.dilation > 1
               else Closure(model, machine.letters, machine)).run()
    margins, errors = closure.judged.margins, closure.judged.errors
    thin = [name for name in margins if not margins[name] > SPARE * errors[name]]
    reason = ""
    if closure.wrong:
        reason = closure.fault
    elif not closure.closed:
        reason = f"not closed after {closure.contexts} contexts"
    elif thin:
        reason = "; ".join(f"{name} margin {margins[name]:.3g} is not above {SPARE} times "
                           f"the error {errors[name]:.3g}" for name in thin)
    return Certificate(not reason, reason, closure.contexts, closure.wrong, codes,
                       margins["state"], margins["logit"], margins["routing"], errors, model,
                       closure)
