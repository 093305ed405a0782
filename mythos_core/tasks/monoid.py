"""What strings do to a machine: the products that a scan computes in place of states."""
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.tasks.strings import NOT_ASKED

MOST_ELEMENTS = 1000


@dataclass(frozen=True, eq=False)
class Monoid:
    """The transition monoid of a machine, without the empty string. An element is what a string
    does: to which state it leads from each state, and what is answered at its end.

    Attributes:
        table: (n, n): table[x, y] is the product x y, first x, then y.
        letters: the element of each letter.
        answer: what is answered at the end of a string that does x, from the machine's start.
        elements: of each, by state of the minimal machine, (the state it leads to, the answer).
    """

    table: Int[Tensor, "n n"]
    letters: Int[Tensor, "letters"]
    answer: Int[Tensor, "n"]
    elements: tuple[tuple[tuple[int, int], ...], ...]

    def __len__(self) -> int:
        return len(self.table)

    def windows(self, ids: Int[Tensor, "batch seq"], loops: int, growth: int = 2
                ) -> list[Int[Tensor, "batch seq"]]:
        """After t = 1 .. `loops` loops of a scan the product of the last growth^t letters up to
        each position, or of as many as there are (Hillis & Steele 1986)."""
        table, product, found = self.table.to(ids.device), self.letters.to(ids.device)[ids - 1], []
        for t in range(loops):
            distance, longer = growth ** t, product
            for slot in range(1, growth):
                gap = slot * distance
                if gap < ids.shape[1]:
                    longer = torch.cat([longer[:, :gap],
                                        table[product[:, :-gap], longer[:, gap:]]], 1)
            product = longer
            found.append(product)
        return found


def monoid_of(name: str, next_state: Int[Tensor, "states letters"],
              answer: Int[Tensor, "states letters"], start: int,
              most: int = MOST_ELEMENTS) -> Monoid:
    """The monoid of a machine's table.

    ValueError for a machine that does not ask at each position, and for one with more than `most`
    elements, with how many had been met by then.
    """
    if bool((answer == NOT_ASKED).any()):
        raise ValueError(f"machine {name!r}: must ask for an answer at each position")
    # by letter: what it does, a tuple of (next state, answer) over the states
    acts = [tuple(zip(states, answers)) for states, answers in
            zip(next_state.T.tolist(), answer.T.tolist())]
    elements = {act: number for number, act in enumerate(dict.fromkeys(acts))}
    for element in (order := list(elements)):
        for act in acts:
            product = _then(element, act)
            if product not in elements:
                elements[product] = len(elements)
                order.append(product)
                if len(elements) > most:
                    raise ValueError(f"machine {name!r}: must have at most {most:,} elements in "
                                     f"its monoid, and has {len(elements):,} or more")
    table = [[elements[_then(x, y)] for y in order] for x in order]
    return Monoid(torch.tensor(table), torch.tensor([elements[act] for act in acts]),
                  torch.tensor([element[start][1] for element in order]), tuple(order))


def _then(first, second):
    """What two strings do one after the other."""
    return tuple(second[state] for state, _ in first)
