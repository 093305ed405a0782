"""Proofs of the weights as they were trained, without codes: balls of states that every letter, or
every product, maps into one another.

The theorem. Let a cell be a map from a state and a letter to the next state, with a start, and an
answer to each state: a strict model's loop with a window of 1, or a recurrent network. Let B_1 ..
B_n be balls, and `follows` say of the start and of each ball, for each letter, to which ball it
goes. Suppose that

1. whatever state of a ball a machine has, what it computes of it and a letter lies in the ball that
   `follows` says; and what it computes of the start and a letter, too;
2. in each ball all states have one answer, as the machine computes it;
3. the answers are those of the machine `asked` for: there is a set of pairs of a ball, or the
   start, and a state of `asked`, with the start and its start, and with each pair and letter that
   something is asked of the pair that follows it, where the ball's answer is the one due.

Then every answer to every string is right, on each machine for which (1) and (2) hold, whatever it
makes of a sum, and however its roundings differ from one position to the next.

Proof. By induction over the positions, by (1) the state behind each lies in the ball that the
letters lead to, and by (3) in a pair with the state of `asked`; its answer is the right one by (2)
and (3). QED.

That of a dilated loop, whose cell multiplies states, is the theorem of `proof.scan`, with a ball in
place of a code: where a loop reads any states of some balls, what it makes of them lies in the ball
that has their product.

No meaning is looked for in a state to find the balls, and no label used: they are put around the
states that the model itself comes to, in float64, until no new one is needed. They can be, where
the loop contracts: its Jacobian is small at all states that occur, so that an error, of rounding
too, is forgotten within a few letters, or loops.
"""
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.proof.balls import Ball, length
from mythos_core.proof.choices import combine, decode, plain_context, with_codes
from mythos_core.proof.closure import Closure
from mythos_core.proof.enclosures import Enclosed
from mythos_core.proof.scan import Operand, Scan
from mythos_core.tasks.machines import Machine

MOST_BALLS = 4000
DIGITS = 5          # of centres, behind the point
SLACK = 0.8         # of a ball's radius an image may reach: for whoever checks it by other bounds
#: The radii tried, in units of how far rounding alone may take one of the first states.
RADII = (32, 16, 8, 5.6, 4, 2.8)


class LoopCell:
    """A model's loop as a cell, in float64 on the CPU: `step` of a strict one, `multiply` of a
    dilated one."""

    def __init__(self, model: OpenMythos, arithmetic: str):
        self.model = with_codes(model, None).cpu().double()
        self.enclosed = Enclosed(self.model, arithmetic)
        self.start = torch.zeros(1, model.config.dim, dtype=torch.float64)
        self.scans = model.config.dilation > 1

    @property
    def branched(self) -> int:
        return self.enclosed.branched

    def step(self, h: Ball, letters: Int[Tensor, "n"]) -> Ball:
        """The states after these letters."""
        maths, loop = self.enclosed.maths, self.model.recurrent
        e = self.enclosed.tokens[letters + 1]
        return self.enclosed.image(maths.normed(maths.add(h, e), loop.norm), [])

    def multiply(self, part: list[tuple[Operand, ...]], h: Ball) -> Ball:
        """The states that one loop makes of rows of letters, or of states, by their number in h."""
        first, *others = self.enclosed.operands(part, h)
        return self.enclosed.image(first, others)

    def answers(self, h: Ball) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """The answer in the middle of each ball, and by how many times its bound it leads there."""
        states = h.x.unsqueeze(1)
        chosen = self.model.decode(states, plain_context(self.model, states))[:, 0].argmax(-1)
        return chosen, self.enclosed.answers(h, chosen)


class Balls:
    """Balls of one radius around the states that a cell comes to, made as they are needed: the
    states of a proof, as `choices.Codes` are.

    Attributes:
        codes: (balls, dim) their centres, in float64; radius: of all.
        answer: of each ball.
        safety: "state": the least of the radius over how far an image reaches from the centre of
            its ball; "logit": as of a model with codes.
        fault: why an image has no ball, if one has none.
    """

    exact = False
    most_products = 1000        # a checker needs a tenth of a second for each

    def __init__(self, cell: Any, radius: float):
        self.cell, self.model, self.radius = cell, cell.model, radius
        self.codes, self.fault = cell.start[:0], ""
        self.answer: list[int] = []
        self.safety = {"state": torch.inf, "logit": torch.inf}

    @property
    def margins(self) -> dict[str, float]:
        """The least that an image is within the border of its ball; of answers and experts none
        is kept."""
        return {"state": self.radius * (1 - 1 / self.safety["state"]),
                "logit": torch.inf, "routing": torch.inf}

    @property
    def branched(self) -> int:
        return self.cell.branched

    @property
    def places(self) -> dict:
        """What a table says of where the balls are."""
        return {"radius": self.radius, "centres": self.codes.tolist()}

    def choose(self, evaluate: Callable, part: list) -> list[int]:
        """The balls that hold what follows in each context of the part, of those that
        `choices.advance` and `choices.combine` have; or of balls by number their answers."""
        if evaluate is decode:
            return [self.answer[ball] for ball in part]
        return self._place(self._images(evaluate, part))

    def _images(self, evaluate: Callable, part: list) -> Ball:
        """All that may follow in each context."""
        known = torch.cat([self.codes, self.cell.start])         # None: -1, the last
        sizes = self.radius * (torch.arange(len(known)) < len(self.codes)).to(known)
        shapes = sizes[:, None, None] * torch.eye(known.shape[1], dtype=known.dtype)
        h = Ball(known, torch.zeros_like(known[:, :1]), (shapes,))
        if evaluate is combine:
            return self.cell.multiply(part, h)
        rows, letters = torch.tensor([[-1 if of is None else of, letter] for of, letter in part]).T
        return self.cell.step(h[rows], letters)

    def measure(self) -> None:
        """Nothing is left to measure: how clear a choice is shows where a ball is made."""

    def _place(self, found: Ball) -> list[int]:
        """A ball for each image, one that is there or one around it; fewer, and a `fault`, where
        there can be none."""
        reach, count, places = found.radius.squeeze(-1), len(self.codes), []
        within = SLACK * self.radius
        if not bool((reach < within).all()):
            self.fault = (f"a ball of radius {self.radius:.2g} goes to one of "
                          f"{reach.max().item():.2g}, which must be below {within:.2g}: the loop "
                          "does not contract enough")
            return []
        for x, r in zip(found.x, reach):
            far = length(self.codes - x).squeeze(-1) + r
            if not len(far) or far.min() >= within:
                new = x.round(decimals=DIGITS)[None]             # short in a file
                self.codes = torch.cat([self.codes, new])
                far = torch.cat([far, length(new - x).flatten() + r])
            places.append(int(far.argmin()))
            if not bool(far.min() < self.radius):                # nor if it is not a number
                self.fault = f"an image reaches the border of its ball, of radius {self.radius:.2g}"
                return []
            self.safety["state"] = min(self.safety["state"], (self.radius / far.min()).item())
        if len(self.codes) > MOST_BALLS:
            self.fault = f"more than {MOST_BALLS} balls of radius {self.radius:.2g} are needed"
            return []
        if len(self.codes) > count:
            new = self.codes[count:]
            chosen, leads = self.cell.answers(Ball(new, torch.full_like(new[:, :1], self.radius)))
            self.answer += chosen.tolist()
            least = leads.min().item()                           # not a number is the least
            self.safety["logit"] = min(least, self.safety["logit"]) if least == least else least
        return places


@torch.no_grad()
def invariant(cell: Any, asked: Machine) -> Closure | Scan:
    """The closed set of the largest balls of `RADII`; or what stands against the smallest. A cell
    that `scans` multiplies states, another reads letters."""
    scans, unit = getattr(cell, "scans", False), _rounding(cell, asked.letters)
    for radius in RADII:
        states = Balls(cell, radius * unit)
        found = (Scan(states, asked) if scans else Closure(states, asked.letters, asked)).run()
        if (found.closed and states.safety["logit"] > 1) or found.wrong:
            break
    return found


def _rounding(cell: Any, letters: int) -> float:
    """How far it alone may take the states after first letters, or products of such."""
    if not getattr(cell, "scans", False):
        start = Ball.exact(cell.start.expand(letters, -1))
        return cell.step(start, torch.arange(letters)).radius.max().item()
    first = Ball.exact(cell.start)
    first = Ball.exact(cell.multiply([(("letter", a),) for a in range(letters)], first).x)
    pairs = [(("code", a), ("code", b)) for a, b in product(range(letters), repeat=2)]
    return cell.multiply(pairs, first).radius.max().item()
