"""State tracking: the running product in a finite group. Token g + 1 is element g; the target at a
position is the product, in order, of all elements up to it. Parity is the group Z2, and S5 the
smallest symmetric group whose word problem is complete for NC1 (Barrington 1989; Merrill et al.
2024, "The Illusion of State in State-Space Models")."""
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.tasks.strings import draw_letters

NAMES = r"Z([2-9]|[1-9][0-9])|D([3-9]|[1-9][0-9])|S[2-6]|A[3-6]"  # up to 720 elements


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of permutations; element 0 is the identity.

    Attributes:
        elements: element g as a permutation: g moves point x to elements[g][x].
        table: (order, order) the Cayley table: table[a, b] is the product ab, first a, then b.
        generators: elements that give all others by products.
    """

    name: str
    elements: list[tuple[int, ...]]
    table: Int[Tensor, "order order"]
    generators: list[int]

    def __len__(self) -> int:
        return len(self.elements)

    def make_batch(self, batch: int, seq_len: int, generator: torch.Generator | None = None,
                   device=None, strings: str = "uniform",
                   generators: bool = False) -> tuple[Tensor, Tensor]:
        """`batch` random strings and their right answers.

        Args:
            strings: of `draw_letters`.
            generators: whether the alphabet is the generators, but for the first element, which is
                any; or all elements everywhere.

        Returns:
            ids, targets: (batch, seq_len) int64 in 1 .. order; for parity, bit + 1.
        """
        alphabet = torch.tensor(self.generators) if generators else torch.arange(len(self))
        letters = draw_letters(len(alphabet), batch, seq_len, generator, strings)
        elements = alphabet[letters]
        if generators:
            elements[:, 0] = torch.randint(0, len(self), (batch,), generator=generator)
        ids = (elements + 1).to(device)
        return ids, self.answers(ids)

    def answers(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The product of each prefix, as tokens, by Hillis and Steele's scan: log2(seq) rounds that
        double how far a product reaches."""
        product, table, reach = ids - 1, self.table.to(ids.device), 1
        while reach < ids.shape[1]:
            product = torch.cat([product[:, :reach],
                                 table[product[:, :-reach], product[:, reach:]]], 1)
            reach *= 2
        return product + 1


def group(name: str) -> Group:
    """Z_n (cyclic), D_n (dihedral, 2n elements), S_n (symmetric) or A_n (alternating), by name:
    "Z2", "D4", "S5", "A5". A copy: whoever changes it spoils no other's.

    ValueError for another name.
    """
    found = _group(name)
    return Group(name, [*found.elements], found.table.clone(), [*found.generators])


@lru_cache
def _group(name: str) -> Group:
    if not re.fullmatch(NAMES, name):
        raise ValueError(f"group = {name!r}: must be Z2 to Z99, D3 to D99, S2 to S6, or A3 to A6")
    n = int(name[1:])
    cycle, rest = (*range(1, n), 0), tuple(range(3, n))
    generators = {"Z": [cycle], "D": [cycle, tuple(reversed(range(n)))],
                  "S": [(1, 0, *range(2, n)), cycle],
                  "A": [(1, 2, 0, *rest), cycle if n % 2 else (0, *range(2, n), 1)]}[name[0]]
    generators = list(dict.fromkeys(generators))                 # two of S2's, and of A3's, are one
    # origin: of all but the first, an earlier element times a generator; products: all of these
    index, origin, products = {tuple(range(n)): 0}, [(0, 0)], []
    for a in (elements := list(index)):
        for s, generator in enumerate(generators):
            product = tuple(generator[x] for x in a)
            if product not in index:
                index[product] = len(elements)
                elements.append(product)
                origin.append((index[a], s))
            products.append(index[product])
    times = torch.tensor(products).view(-1, len(generators))
    table = torch.arange(len(elements)).expand(len(elements), -1).T.contiguous()
    for b, (before, s) in enumerate(origin[1:], 1):
        table[:, b] = times[table[:, before], s]                 # x (a s) = (x a) s
    return Group(name, elements, table, [index[generator] for generator in generators])
