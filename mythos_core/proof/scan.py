"""Proofs that a dilated model multiplies, and so answers as a machine does on every string.

The theorem. Let a model be dilated with r slots (`DilatedBlock`), its prelude and coda read a
position's own token alone (a window of 1), and its states be rounded to codes. (Without that, read
*ball* for code, *lies in a ball* for is rounded to a code, and *all that lie in* for the codes of:
`proof.invariant`.) Let M be the transition monoid of a machine, without the empty string, and let
`meaning` give codes elements of M. Suppose

1. letters: for 1 <= m <= r letters a_m .. a_1, in this order in a string, the state that one loop
   makes of the position of a_1, with the others in its slots and nothing in the r - m that are
   left, is rounded to a code that means a_m .. a_1. Let F_1 have the codes of all r letters, and
   P_1 those of all m <= r;
2. products: for T = 1, 2, .. and codes c_r .. c_1 of F_T the same gives a code that means
   meaning(c_r) .. meaning(c_1), and F_(T+1) has these codes; for m <= r, c_m of P_T and the others
   of F_T it does so too, and P_(T+1) has these codes and those of P_T. So of a single code, m = 1,
   it gives one of the same meaning: nothing acts as the identity. The pair of sets of codes comes
   again at some T, and with it all that follows;
3. answers: the model answers for each code of any P_T as the machine does at the end of a string
   that does what the code means.

Then of every string, of every length L, every answer is right after T >= log_r(L) loops, at least
one. With codes the single code of (2) is asked to be the same again: after max(1, log_r(i + 1))
loops no further loop changes position i, from 0.

Proof. After T loops position i holds a code that means the product of its last min(r^T, i + 1)
letters. If i + 1 >= r^T it is one of F_T, and if i + 1 <= r^T, so that these letters are all that
there are up to i, one of P_T. For T = 1 that is (1): loop 0 reads the positions i, i - 1, ..
i - m + 1 that there are. If it holds for T, loop T reads those of the positions i - j d, j < r,
d = r^T, that there are, say m: stretches of d letters, each of which ends where the next begins. If
the earliest is of d letters and m = r, all are of F_T. Else it begins at the start of the string
and is of P_T, and the others are of F_T. So (2) gives the code of the product of the last
min(r^(T+1), i + 1) letters, with m = 1 where i + 1 <= r^T and only the position itself is there.
(3) makes its answer right. QED.

Arithmetic is treated as in `proof.certificate`.
"""
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.proof.choices import combine, decode, plain_context
from mythos_core.tasks.automaton import Machine, minimal

PART = 8192             # products of one pass
SEEN_LOOPS = 4          # loops of the strings whose states the codes are means of

Operand = tuple[str, int]       # a letter or a code, ("letter", 0)


class Scan:
    """What a dilated model makes of letters and of codes, closed under the products of up to r of
    them, and whether that is what the monoid of the machine `asked` for says. `states` are
    `choices.Codes` or `invariant.Balls`, by number."""

    def __init__(self, states: Any, asked: Machine):
        self.states, self.asked, self.monoid = states, asked, asked.monoid()
        self.length, self.wrong, self.closed, self.left_out = 0, 0, False, False
        self.asked_for = 0                                       # products, at the last look
        self.meaning: dict[int, int] = {}                        # code -> element
        self.follows: dict[tuple[Operand, ...], int] = {}        # operands, the latest last -> code
        self.answers: dict[int, int] = {}                        # code -> token

    @property
    def fault(self) -> str:
        """What is wrong, if something is."""
        most = self.states.most_products
        return (f"{self.wrong} of {self.contexts} products or their answers are wrong"
                if self.wrong else f"{self.asked_for:,} products are more than {most:,}"
                if self.asked_for > most else self.states.fault)

    @property
    def contexts(self) -> int:
        """Products that were checked."""
        return len(self.follows)

    @torch.no_grad()
    def run(self) -> "Scan":
        """Close the set, unless a product or an answer is wrong or there are too many."""
        r, letters = self.states.model.config.dilation, range(self.asked.letters)
        self.asked_for = len(letters) ** r
        if self.fault:
            return self
        rows = [tuple(("letter", a) for a in row) for m in range(1, r + 1)
                for row in product(letters, repeat=m)]
        if not self._multiply(rows):
            return self
        prefixes = {self.follows[row] for row in rows}           # P_T, and F_T
        full, met = {self.follows[row] for row in rows if len(row) == r}, set()
        while not self.wrong and (frozenset(full), frozenset(prefixes)) not in met:
            met.add((frozenset(full), frozenset(prefixes)))
            self.asked_for = len(full | prefixes) * len(full) ** (r - 1)
            if self.fault:
                return self
            of_full = _rows([full] * r)
            begun = [row for m in range(1, r + 1) for row in _rows([prefixes] + [full] * (m - 1))]
            if not self._multiply([*of_full, *begun]):
                return self
            full = {self.follows[row] for row in of_full}
            prefixes |= {self.follows[row] for row in begun}
        if not self.wrong:
            self._answer(sorted(prefixes))
        self.closed = not self.wrong
        if self.closed:
            self.states.measure()
        return self

    @torch.no_grad()
    def machine(self) -> Machine | None:
        """The minimal machine that the model's own products and answers make up, letter by letter:
        a code with a letter leads to the product of the two. None if that is a code which no string
        leads to: doubling need not multiply so."""
        beyond = deepcopy(self)                  # products that the proof has not, nor needs
        alone = [beyond.follows[("letter", letter),] for letter in range(self.asked.letters)]
        rows = _rows([self.answers, alone])
        known = beyond._multiply(rows)
        if not known or not {beyond.follows[row] for row in rows} <= self.answers.keys():
            return None

        def moves(code):
            after = alone if code is None else [
                beyond.follows[("code", code), ("code", letter)] for letter in alone]
            return [(state, self.answers[state]) for state in after]

        return minimal(self.asked.name, None, self.asked.symbols, moves)

    def table(self) -> dict:
        """What was met, as JSON has it: what each code means, by state of the minimal machine the
        state that it leads to and the answer then; and all products, the operands earliest first,
        with the code that they go to."""
        rows = {kind: sorted([[number for _, number in row], code]
                             for row, code in self.follows.items() if row[0][0] == kind)
                for kind in ("letter", "code")}
        return {"meaning": [[code, [list(move) for move in self.monoid.elements[element]]]
                            for code, element in sorted(self.meaning.items())],
                "letters": rows["letter"], "products": rows["code"],
                "answers": [[code, answer] for code, answer in sorted(self.answers.items())],
                **self.states.places}

    def _multiply(self, rows: list[tuple[Operand, ...]]) -> bool:
        """Know these products too; whether each has a state."""
        for size in sorted({len(row) for row in rows}):
            new = [row for row in dict.fromkeys(rows)
                   if len(row) == size and row not in self.follows]
            for part in (new[i:i + PART] for i in range(0, len(new), PART)):
                for row, code in zip(part, self.states.choose(combine, part)):
                    self.follows[row] = code
                    self._means(code, self._element(row))
                    self.wrong += (self.states.exact and row[0][0] == "code" and size == 1
                                   and row[0][1] != code)
        return not self.states.fault

    def _element(self, row: tuple[Operand, ...]) -> int:
        elements = [self.meaning[number] if kind == "code" else int(self.monoid.letters[number])
                    for kind, number in row]
        result = elements[0]
        for element in elements[1:]:
            result = int(self.monoid.table[result, element])
        return result

    def _means(self, code: int, element: int):
        self.wrong += self.meaning.setdefault(code, element) != element

    def _answer(self, codes: list[int]):
        self.answers = dict(zip(codes, self.states.choose(decode, codes)))
        self.wrong += sum(answer != int(self.monoid.answer[self.meaning[code]])
                          for code, answer in self.answers.items())


def _rows(operands: Sequence[Iterable[int]]) -> list[tuple[Operand, ...]]:
    """Every choice of a code from each of the sets, in their order."""
    return [tuple(("code", code) for code in row) for row in product(*map(sorted, operands))]


@torch.no_grad()
def codes_by_element(model: OpenMythos, machine: Machine) -> Float[Tensor, "codes dim"]:
    """For each element that random strings come to the mean of the states that mean it, over all
    loops; each loop reads such means in place of states, as it will read codes."""
    generator, device = torch.Generator().manual_seed(0), model.embed.weight.device
    monoid, r = machine.monoid(), model.config.dilation
    ids, _ = machine.make_batch(max(64, 4 * len(monoid)), r ** SEEN_LOOPS, generator, device,
                                "touring" if machine.strings.has_traps else "uniform")
    ctx, states = plain_context(model, ids), []
    h, products = model.encode(ids, ctx), monoid.windows(ids, SEEN_LOOPS, r)
    for t, element in enumerate(products):
        states.append(model.recurrent.combine(h, t, ctx)[0])
        element = element.flatten()
        h = _means(states[-1].flatten(0, 1), element, len(monoid))[element].view_as(h)
    element = torch.stack(products).flatten()
    means = _means(torch.stack(states).flatten(0, 2), element, len(monoid))
    return means[element.unique()]


def _means(h: Float[Tensor, "n dim"], label: Int[Tensor, "n"],
           labels: int) -> Float[Tensor, "labels dim"]:
    sums = h.new_zeros(labels, h.shape[1]).index_add(0, label, h)
    return sums / label.bincount(minlength=labels).clamp(min=1).unsqueeze(1)
