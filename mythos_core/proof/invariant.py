"""Proofs of the weights as they were trained, without codes: balls of states that every letter maps
into one another.

The theorem. Let a cell be a map from a state and a letter to the next state, with a start, and an
answer to each state: a strict model's loop with a window of 1, or a recurrent network. Let B_1 ..
B_n be balls, and `goes` say of the start and of each ball, for each letter, to which ball it goes.
Suppose that

1. whatever state of a ball a machine has, what it computes of it and a letter lies in the ball that
   `goes` says; and what it computes of the start and a letter, too;
2. in each ball all states have one answer, as the machine computes it;
3. the answers are those of the machine `asked` for: there is a set of pairs of a ball, or the
   start, and a state of `asked`, with the start and its start, and with each pair and letter that
   something is asked of the pair that follows it, where the ball's answer is the one due.

Then every answer to every string is right, on each machine for which (1) and (2) hold, whatever it
makes of a sum, and however its roundings differ from one position to the next.

Proof. By induction over the positions, by (1) the state behind each lies in the ball that the
letters lead to, and by (3) in a pair with the state of `asked`; its answer is the right one by (2)
and (3). QED.

No meaning is looked for in a state, and no label used: balls are put around the states that the
model itself comes to, in float64, until no new one is needed. They can be, where the loop
contracts: its Jacobian is small at all states that occur, so that an error, of rounding too, is
forgotten within a few letters.
"""
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.proof.balls import Ball, length
from mythos_core.proof.choices import plain_context, with_codes
from mythos_core.proof.enclosures import Enclosed
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.tasks.machines import Machine, minimal

MOST_BALLS = 4000
DIGITS = 5          # of centres, behind the point
SLACK = 0.8         # of a ball's radius an image may reach: for whoever checks it by other bounds
#: The radii tried, in units of how far rounding alone may take a state from the start.
RADII = (32, 16, 8, 5.6, 4, 2.8)


class LoopCell:
    """A strict model's loop as a cell, in float64 on the CPU."""

    def __init__(self, model: OpenMythos, arithmetic: str):
        self.model = with_codes(model, None).cpu().double()
        self.enclosed = Enclosed(self.model, arithmetic)
        self.start = torch.zeros(1, model.config.dim, dtype=torch.float64)

    @property
    def branched(self) -> int:
        return self.enclosed.branched

    def step(self, h: Ball, letters: Int[Tensor, "n"]) -> Ball:
        """The states after these letters, of each what is possible with any experts."""
        maths, loop = self.enclosed.maths, self.model.recurrent
        z = maths.normed(maths.add(h, self.enclosed.tokens[letters + 1]), loop.norm)
        x, error = torch.full_like(z.x, torch.nan), torch.zeros_like(z.error)
        for rows, state in self.enclosed.states(z, []):
            first = x[rows].isnan()
            x[rows] = torch.where(first, state.x, x[rows])
            error[rows] = torch.maximum(error[rows], length(state.x - x[rows]) + state.radius)
        return Ball(x, error)

    def answers(self, h: Ball) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """The answer in the middle of each ball, and by how many times its bound it leads there."""
        states = h.x.unsqueeze(1)
        chosen = self.model.decode(states, plain_context(self.model, states))[:, 0].argmax(-1)
        return chosen, self.enclosed.answers(h, chosen)


class Invariant:
    """Balls of one radius around the states of a cell, closed under letters.

    Attributes:
        codes: (balls, dim) their centres, in float64; radius: of all.
        goes: by (ball, or None for the start; letter) the ball.
        answer: of each ball; wrong: pairs of a ball and a state of `asked` answered otherwise.
        safety: "state": the least of the radius over how far an image reaches from the centre of
            its ball; "logit": as of a model with codes.
    """

    def __init__(self, cell: Any, asked: Machine, radius: float):
        self.cell, self.asked, self.radius = cell, asked, radius
        self.left_out = bool((asked.answer == NOT_ASKED).any())
        self.codes = cell.start[:0]
        self.goes: dict[tuple[int | None, int], int] = {}
        self.answer: list[int] = []
        self.length, self.wrong, self.closed, self.fault = 0, 0, False, ""
        self.safety = {"state": torch.inf, "logit": torch.inf}
        self.seen: set[tuple[int | None, int]] = set()           # ball, state of the machine

    @property
    def margins(self) -> dict[str, float]:
        """The least that an image is within the border of its ball; of answers and experts none
        is kept."""
        within = self.radius * (1 - 1 / self.safety["state"]) if self.closed else 0.0
        return {"state": within, "logit": torch.inf, "routing": torch.inf}

    @property
    def branched(self) -> int:
        return self.cell.branched

    @property
    def contexts(self) -> int:
        """Images of balls that were looked at."""
        return len(self.goes)

    @torch.no_grad()
    def run(self) -> "Invariant":
        """Close the set, one letter longer at a time, unless an answer is wrong, an image is larger
        than a ball, or there are too many."""
        new: set[tuple[int | None, int]] = {(None, self.asked.start)}
        while new and not self.wrong:
            self.seen |= new
            self.length += 1
            moves = [(ball, letter, after, answer) for ball, state in new
                     for letter, (after, answer) in enumerate(self.asked.following(state))
                     if answer != NOT_ASKED]
            if not self._map(sorted({(ball, letter) for ball, letter, *_ in moves
                                     if (ball, letter) not in self.goes},
                                    key=lambda image: (image[0] is not None, image))):
                return self
            following = [(self.goes[ball, letter], after, answer)
                         for ball, letter, after, answer in moves]
            self.wrong = sum(self.answer[ball] != answer for ball, _, answer in following)
            new = {(ball, after) for ball, after, _ in following} - self.seen
        self.closed = not self.wrong
        self.fault = f"a string of length {self.length} is answered wrong" if self.wrong else ""
        return self

    def machine(self) -> Machine:
        """The minimal machine that balls and their answers make up."""
        def moves(ball):
            after = [self.goes[ball, letter] for letter in range(self.asked.letters)]
            return [(goes, self.answer[goes]) for goes in after]

        return minimal(self.asked.name, None, self.asked.symbols, moves)

    def table(self) -> dict:
        """As JSON has it: as `Closure.table`, a ball in place of a code; and the balls."""
        rows: dict[tuple[int | None, int], list[int | None]] = {
            (ball, state): [self.goes.get((ball, letter)) for letter in range(self.asked.letters)]
            for ball, state in self.seen}
        order = sorted(rows, key=lambda pair: (pair[0] is not None, pair))
        return {"rows": [[*pair, rows[pair]] for pair in order],
                "answers": [[ball, token] for ball, token in enumerate(self.answer)],
                "radius": self.radius, "centres": self.codes.tolist()}

    def _map(self, images: list[tuple[int | None, int]]) -> bool:
        """Find a ball for each image of a ball by a letter, or make one around it; whether there
        was, or could be, one for each."""
        known = torch.cat([self.codes, self.cell.start])       # None: -1, the last
        rows = torch.tensor([-1 if ball is None else ball for ball, _ in images])
        letters = torch.tensor([letter for _, letter in images])
        width = known.shape[1]
        along = torch.eye(width, dtype=known.dtype) * self.radius * (rows >= 0)[:, None, None]
        found = self.cell.step(Ball(known[rows], known.new_zeros(len(rows), 1), along), letters)
        reach = found.radius.squeeze(-1)
        within = SLACK * self.radius
        if not bool((reach < within).all()):
            self.fault = (f"a ball of radius {self.radius:.2g} goes to one of "
                          f"{reach.max().item():.2g}, which must be below {within:.2g}: the loop "
                          "does not contract enough")
            return False
        count = len(self.codes)
        for image, x, r in zip(images, found.x, reach):
            far = length(self.codes - x).squeeze(-1) + r
            if not len(far) or far.min() >= within:
                new = x.round(decimals=DIGITS)[None]             # short in a file
                self.codes = torch.cat([self.codes, new])
                far = torch.cat([far, length(new - x).flatten() + r])
            self.goes[image] = int(far.argmin())
            if not bool(far.min() < self.radius):                # nor if it is not a number
                self.fault = f"an image reaches the border of its ball, of radius {self.radius:.2g}"
                return False
            self.safety["state"] = min(self.safety["state"], (self.radius / far.min()).item())
        if len(self.codes) > MOST_BALLS:
            self.fault = f"more than {MOST_BALLS} balls of radius {self.radius:.2g} are needed"
            return False
        if len(self.codes) > count:
            new = self.codes[count:]
            chosen, leads = self.cell.answers(Ball(new, torch.full_like(new[:, :1], self.radius)))
            self.answer += chosen.tolist()
            least = leads.min().item()                           # not a number is the least
            self.safety["logit"] = min(least, self.safety["logit"]) if least == least else least
        return True


def invariant(cell: Any, asked: Machine) -> Invariant:
    """The closed set of the largest balls of `RADII` times the rounding of a first step; or what
    stands against the smallest."""
    letters = torch.arange(asked.letters)
    with torch.no_grad():
        first = cell.step(Ball.exact(cell.start.expand(len(letters), -1)), letters)
    for radius in RADII:
        found = Invariant(cell, asked, radius * first.radius.max().item()).run()
        if (found.closed and found.safety["logit"] > 1) or found.wrong:
            break
    return found
