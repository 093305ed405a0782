"""Finite-state machines: what a strict model is trained to be, and what is read off it.

Token j + 1 is letter j. A machine answers at every position, with a token: in a Mealy machine's
way, by the state that it is in and the letter that it reads (Mealy 1955).
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from automata.fa.dfa import DFA
from jaxtyping import Int
from torch import Tensor

from mythos_core.groups import draw_letters, group

# elements of a group that are all letters of its machine; of a larger one, its generators are
MOST_LETTERS = 12


@dataclass(frozen=True, eq=False)
class Machine:
    """A finite-state machine that is total: each state has a move for each letter.

    Attributes:
        next_state: the state after letter b in state a is next_state[a, b].
        answer: the token answered then, from 1 on.
        start: the state before the first letter.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    name: str
    next_state: Tensor                       # (states, letters) int64
    answer: Tensor                           # (states, letters) int64
    start: int = 0

    def __post_init__(self):
        table, states = self.next_state, len(self.next_state)
        if table.dim() != 2 or not table.numel() or table.shape != self.answer.shape:
            raise ValueError(f"next_state, answer: of shapes {tuple(table.shape)}, "
                             f"{tuple(self.answer.shape)}: "
                             "must both be (states, letters), neither of them 0")
        if table.min() < 0 or table.max() >= states:
            raise ValueError(f"next_state = {table.min()} .. {table.max()}: "
                             f"must be in 0 .. states - 1 = {states - 1}")
        if self.answer.min() < 0:
            raise ValueError(f"answer = {self.answer.min()}: must be tokens, 0 or more")
        if not 0 <= self.start < states:
            raise ValueError(f"start = {self.start}: must be in 0 .. states - 1 = {states - 1}")

    @classmethod
    def from_table(cls, next_state, start: int = 0, name: str = "table") -> "Machine":
        """The machine of a table (states, letters) of next states that answers the state it comes
        to, state s as token s + 1."""
        table = torch.as_tensor(next_state, dtype=torch.int64)
        return cls(name, table, table + 1, start)

    def __len__(self) -> int:
        """States."""
        return len(self.next_state)

    def __eq__(self, other) -> bool:
        """The same tables and start: for minimal machines, whether they
        answer all strings alike."""
        if not isinstance(other, Machine):
            return NotImplemented
        pairs = (self.next_state, other.next_state), (self.answer, other.answer)
        return self.start == other.start and all(torch.equal(*pair) for pair in pairs)

    @property
    def letters(self) -> int:
        return self.next_state.shape[1]

    @property
    def vocab_size(self) -> int:
        """What a model needs: a token for each letter and each answer, and
        token 0, which is neither."""
        return max(self.letters, int(self.answer.max())) + 1

    def as_dict(self) -> dict:
        """Every field as JSON has it."""
        return {"name": self.name, "next_state": self.next_state.tolist(),
                "answer": self.answer.tolist(), "start": self.start}

    def make_batch(self, batch: int, seq_len: int, generator: torch.Generator | None = None,
                   device=None, strings: str = "uniform") -> tuple[Tensor, Tensor]:
        """`batch` random strings and their right answers: ids, targets, (batch, seq_len) int64.

        Args:
            strings: of `groups.draw_letters`, or "covering": a third uniform, a third mixed, and a
                third that begin with a shortest way to a state drawn at random and are uniform from
                there, so that moves from states that random strings hardly come to are met.
        """
        if strings != "covering":
            ids = (draw_letters(self.letters, batch, seq_len, generator, strings) + 1).to(device)
            return ids, self.answers(ids)
        uniform, mixed = (draw_letters(self.letters, batch, seq_len, generator, kind)
                          for kind in ("uniform", "mixed"))
        way = self.shortest_ways[torch.randint(len(self.shortest_ways), (batch,),
                                               generator=generator), :seq_len]
        way = F.pad(way, (0, seq_len - way.shape[1]), value=-1)
        kind = torch.randint(3, (batch, 1), generator=generator)
        letters = torch.where(kind == 0, mixed, torch.where((kind == 1) & (way >= 0), way, uniform))
        ids = (letters + 1).to(device)
        return ids, self.answers(ids)

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

    def run(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The state after each letter."""
        table, state, states = (self.next_state.to(ids.device),
                                torch.full_like(ids[:, 0], self.start), [])
        for letter in (ids - 1).unbind(1):
            state = table[state, letter]
            states.append(state)
        return torch.stack(states, 1)

    def answers(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The right answer at each position."""
        before = torch.cat([torch.full_like(ids[:, :1], self.start), self.run(ids)[:, :-1]], 1)
        return self.answer.to(ids.device)[before, ids - 1]

    def minimal(self) -> "Machine":
        """The smallest machine with the same answers to all strings, its states numbered
        in the order in which a search meets them, letter by letter: two machines answer
        alike if these are equal."""
        moves, answers = self.next_state.tolist(), self.answer.tolist()
        return minimal(self.name, self.start, self.letters,
                       lambda state: list(zip(moves[state], answers[state])))


def minimal(name: str, start, letters: int, moves: Callable) -> Machine:
    """The minimal machine of one that is given by its moves:
    moves(state) = [(next state, answer), ...], one for each letter. States may be anything that
    can be hashed; those that the start does not reach are not asked.

    A Mealy machine is a deterministic automaton that accepts strings of (letter, answer) pairs, so
    automata-lib's minimal automaton (Hopcroft 1971) gives its minimal form.
    """
    table, todo = {}, [start]
    while todo:
        state = todo.pop()
        if state not in table:
            table[state] = moves(state)
            todo += [after for after, _ in table[state]]
    pairs = {state: {(letter, answer): after for letter, (after, answer) in enumerate(found)}
             for state, found in table.items()}
    smallest = DFA(states=set(pairs),
                   input_symbols={pair for row in pairs.values() for pair in row},
                   transitions=pairs, initial_state=start, final_states=set(pairs),
                   allow_partial=True).minify()
    number, rows = {smallest.initial_state: 0}, []
    for state in (order := [smallest.initial_state]):
        row = sorted((letter, answer, after)
                     for (letter, answer), after in smallest.transitions[state].items())
        for _, _, after in row:
            if after not in number:
                number[after] = len(number)
                order.append(after)
        rows.append([(number[after], answer) for _, answer, after in row])
    both = torch.tensor(rows)                                    # (states, letters, 2)
    return Machine(name, both[..., 0], both[..., 1])


@lru_cache
def machine(name: str) -> Machine:
    """A machine by name: "parity", or a group of `groups.group`, whose state is the product
    so far and whose answer is that state. Letter j is element j where the group has at most
    12 elements, else generator j.

    ValueError for another name.
    """
    tracked = group("Z2" if name == "parity" else name)
    letters = list(range(len(tracked))) if len(tracked) <= MOST_LETTERS else tracked.generators
    return Machine.from_table(tracked.table[:, letters], name=name)
