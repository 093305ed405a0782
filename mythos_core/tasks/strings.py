"""Random strings: of letters alone, and such that a machine's training meets all of its moves."""
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

STRINGS = ("uniform", "mixed")
NOT_ASKED = -1      # in place of an answer


def draw_letters(n_letters: int, batch: int, seq_len: int, generator: torch.Generator | None = None,
                 strings: str = "uniform") -> Int[Tensor, "batch seq"]:
    """Random strings of letters 0 .. n_letters - 1.

    Args:
        strings: "uniform": every letter is as likely. "mixed": in half of the rows a letter is not
            the first of the alphabet with probability p, drawn for each row; half have runs, whose
            letter changes with probability q, drawn for each row. Uniform strings alone hide that a
            model is slow on long runs.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if strings not in STRINGS:
        raise ValueError(f"strings = {strings!r}: must be one of {STRINGS}")
    if strings == "uniform":
        return torch.randint(0, n_letters, (batch, seq_len), generator=generator)

    def rare():
        """In each row, with a probability drawn for it, one of the letters 1, 2, ... at random,
        else 0."""
        u = torch.rand(batch, seq_len, generator=generator)
        p = torch.rand(batch, 1, generator=generator)
        other = 1 + u / p * (n_letters - 1)                      # u / p is uniform where u < p
        return torch.where(u < p, other, 0).long().clamp(max=n_letters - 1)

    dense, runs = rare(), rare().cumsum(1) % n_letters
    return torch.where(torch.rand(batch, 1, generator=generator) < 0.5, dense, runs)


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings for a machine, given by its table as `automaton.Machine` has it."""

    next_state: Int[Tensor, "states letters"]
    answer: Int[Tensor, "states letters"]
    start: int

    def draw(self, batch: int, seq_len: int, generator: torch.Generator | None = None,
             kind: str = "uniform") -> Int[Tensor, "batch seq"]:
        """Random strings of letters, from 0.

        Args:
            kind: of `draw_letters`, or "covering": a third uniform, a third mixed, and a third that
                begin with a shortest way to a state drawn at random and are uniform from there, so
                that moves from states that random strings hardly come to are met. Or "touring":
                `tours`, for machines whose random strings end in a trap.
        """
        letters = self.next_state.shape[1]
        if kind == "touring":
            return self.tours(batch, seq_len, generator)
        if kind != "covering":
            return draw_letters(letters, batch, seq_len, generator, kind)
        uniform, mixed = (draw_letters(letters, batch, seq_len, generator, plain)
                          for plain in STRINGS)
        way = self.shortest_ways[torch.randint(len(self.shortest_ways), (batch,),
                                               generator=generator), :seq_len]
        way = F.pad(way, (0, seq_len - way.shape[1]), value=-1)
        third = torch.randint(3, (batch, 1), generator=generator)
        return torch.where(third == 0, mixed, torch.where((third == 1) & (way >= 0), way, uniform))

    @cached_property
    def shortest_ways(self) -> Int[Tensor, "reached longest"]:
        """For each state that the start reaches a shortest string to it, as
        letters, -1 behind its end."""
        ways, order = {self.start: []}, [self.start]
        for state in order:
            for letter, after in enumerate(self.next_state[state].tolist()):
                if after not in ways:
                    ways[after] = [*ways[state], letter]
                    order.append(after)
        longest = max(map(len, ways.values()))
        rows = [way + [-1] * (longest - len(way)) for way in ways.values()]
        return torch.tensor(rows, dtype=torch.int64)

    @cached_property
    def open_letters(self) -> Bool[Tensor, "states letters"]:
        """The letters that keep out of traps: those that leave the largest set of states that lead
        to each other within reach, and do not leave such a set if they can."""
        all_letters = torch.ones_like(self.next_state, dtype=torch.bool)
        reachable = self.distance(all_letters) < len(self.next_state)
        mutual = reachable & reachable.T
        size = mutual.sum(1)                                     # of the set that a state is in
        best = torch.where(reachable, size, 0).amax(1)           # of the largest within reach
        stays = mutual.gather(1, self.next_state) & (size == best).unsqueeze(1)
        rank = (2 * best[self.next_state] + stays).masked_fill(self.answer == NOT_ASKED, -1)
        return rank == rank.amax(1, keepdim=True)

    @property
    def has_traps(self) -> bool:
        """Whether some letters lead into a trap, where random strings then end."""
        return not bool(self.open_letters.all())

    def distance(self, allowed: Bool[Tensor, "states letters"]) -> Int[Tensor, "states states"]:
        """Letters of a shortest string of `allowed` ones from a state to a state; as many as there
        are states where there is none."""
        n = len(self.next_state)
        distance = torch.full((n, n), n).fill_diagonal_(0)
        for _ in range(n):
            onward = (distance[self.next_state] + 1).masked_fill(~allowed[:, :, None], n)
            shorter = torch.minimum(distance, onward.amin(1))
            if torch.equal(shorter, distance):
                break
            distance = shorter
        return distance

    @cached_property
    def _routes(self) -> tuple[Tensor, Tensor]:
        """The first open letter of a shortest way from a state to a state (states, states); and
        which states are within reach (states, states), as weights."""
        distance, states = self.distance(self.open_letters), len(self.next_state)
        onward = distance[self.next_state].masked_fill(~self.open_letters[:, :, None], states)
        return onward.argmin(1), (distance < states).float()

    def tours(self, batch: int, seq_len: int, generator=None) -> Int[Tensor, "batch seq"]:
        """Strings that keep to the open letters up to a position drawn for each, and from there on
        are uniform, but for moves of which nothing is asked. In half of them the first part goes a
        shortest way to a move drawn at random, takes it, and goes on to another, so that all moves
        are as common as can be; in the others each open letter is as likely."""
        (first_letter, reachable), weights = self._routes, self.open_letters.float()
        touring = torch.rand(batch, generator=generator) < 0.5
        cut = torch.randint(seq_len + 1, (batch,), generator=generator)
        state, letters = torch.full((batch,), self.start), []
        target = torch.multinomial(reachable[state], 1, generator=generator)[:, 0]
        for position in range(seq_len):
            open_letter = torch.multinomial(weights[state], 1, generator=generator)[:, 0]
            arrived = state == target
            step = torch.where(touring & ~arrived, first_letter[state, target], open_letter)
            any_letter = torch.randint(weights.shape[1], (batch,), generator=generator)
            asked = self.answer[state, any_letter] != NOT_ASKED
            letters.append(torch.where(position < cut, step,
                                       torch.where(asked, any_letter, open_letter)))
            state = self.next_state[state, letters[-1]]
            new_target = torch.multinomial(reachable[state], 1, generator=generator)[:, 0]
            target = torch.where(arrived, new_target, target)
        return torch.stack(letters, 1)
