"""A finite-state machine as a table: strings for it, their right answers, and its minimal form.

Token j + 1 is letter j. A machine answers at every position, with a token: in a Mealy machine's
way, by the state that it is in and the letter that it reads (Mealy 1955).
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from automata.fa.dfa import DFA
from jaxtyping import Int
from torch import Tensor

from mythos_core.tasks.monoid import Monoid, monoid_of
from mythos_core.tasks.strings import NOT_ASKED, Strings


@dataclass(frozen=True, eq=False)
class Machine:
    """A finite-state machine that is total: each state has a move for each letter.

    Attributes:
        next_state: the state after letter b in state a is next_state[a, b].
        answer: the token answered then; -1 (`NOT_ASKED`) where nothing is asked: tours have no
            such move, and a proof says nothing of strings that have one.
        start: the state before the first letter.
        symbols: the letters' names, for `encode` and for pictures; default their numbers.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    name: str
    next_state: Tensor                       # (states, letters) int64
    answer: Tensor                           # (states, letters) int64
    start: int = 0
    symbols: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("next_state", "answer"):        # a caller's table may change
            table = getattr(self, name)
            if table.dtype != torch.int64:
                raise ValueError(f"{name}.dtype = {table.dtype}: must be torch.int64")
            object.__setattr__(self, name, table.clone())
        table, states = self.next_state, len(self.next_state)
        if table.dim() != 2 or not table.numel() or table.shape != self.answer.shape:
            raise ValueError(f"next_state, answer: of shapes {tuple(table.shape)}, "
                             f"{tuple(self.answer.shape)}: "
                             "must both be (states, letters), neither of them 0")
        if table.min() < 0 or table.max() >= states:
            raise ValueError(f"next_state = {table.min()} .. {table.max()}: "
                             f"must be in 0 .. states - 1 = {states - 1}")
        if self.answer.min() < NOT_ASKED:
            raise ValueError(f"answer = {self.answer.min()}: must be tokens, 0 or more, or "
                             f"{NOT_ASKED} where nothing is asked")
        if not 0 <= self.start < states:
            raise ValueError(f"start = {self.start}: must be in 0 .. states - 1 = {states - 1}")
        if not self.symbols:
            object.__setattr__(self, "symbols", tuple(map(str, range(self.letters))))
        if len(set(self.symbols)) != self.letters:
            raise ValueError(f"symbols = {self.symbols}: must be {self.letters} different names, "
                             "one for each letter")

    @classmethod
    def from_table(cls, next_state, start: int = 0, name: str = "table") -> "Machine":
        """The machine of a table (states, letters) of next states that answers the state it comes
        to, state s as token s + 1."""
        try:
            table = torch.as_tensor(next_state, dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"next_state = {next_state}: must be a whole table of numbers, "
                             f"a row for each state, a column for each letter: {error}") from error
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

    def encode(self, letters: Iterable[str]) -> Int[Tensor, "one seq"]:
        """The tokens of a string, which is given by its letters' names: of one sign each, as text.
        ValueError for a letter that the machine has not."""
        token_of = {symbol: token for token, symbol in enumerate(self.symbols, 1)}
        letters = list(letters)
        if unknown := [letter for letter in letters if letter not in token_of]:
            raise ValueError(f"letter = {unknown[0]!r}: must be one of {list(self.symbols)}")
        return torch.tensor([[token_of[letter] for letter in letters]])

    def make_batch(self, batch: int, seq_len: int, generator: torch.Generator | None = None,
                   device=None, strings: str = "uniform") -> tuple[Tensor, Tensor]:
        """`batch` random strings, of a kind of `strings.Strings.draw`, and their right answers:
        ids, targets, (batch, seq_len) int64."""
        ids = (self.strings.draw(batch, seq_len, generator, strings) + 1).to(device)
        return ids, self.answers(ids)

    @cached_property
    def strings(self) -> Strings:
        """Random strings for this machine."""
        return Strings(self.next_state, self.answer, self.start)

    @property
    def reversible(self) -> bool:
        """Whether each letter permutes the states, as in a group. Then random strings come to all
        states alike; else they may end in a trap, or leave a state out."""
        return all(len(column.unique()) == len(self) for column in self.next_state.T)

    def run(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The state after each letter; ValueError for tokens that are no letters."""
        low, high = (int(token) for token in ids.aminmax())
        if low < 1 or high > self.letters:
            raise ValueError(f"ids = {low} .. {high}: must be letters, 1 .. {self.letters}")
        table, state, states = (self.next_state.to(ids.device),
                                torch.full_like(ids[:, 0], self.start), [])
        for letter in (ids - 1).unbind(1):
            state = table[state, letter]
            states.append(state)
        return torch.stack(states, 1)

    @cached_property
    def _rows(self) -> list[list[tuple[int, int]]]:
        return [list(zip(*row)) for row in zip(self.next_state.tolist(), self.answer.tolist())]

    def following(self, state) -> list[tuple]:
        """Next state and answer, letter by letter."""
        return self._rows[state]

    def moves(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The move at each position, the state before it and its letter, as one number:
        state * letters + letter."""
        before = torch.cat([torch.full_like(ids[:, :1], self.start), self.run(ids)[:, :-1]], 1)
        return before * self.letters + ids - 1

    def answers(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The right answer at each position."""
        return self.answer.to(ids.device).flatten()[self.moves(ids)]

    def outcomes(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """What a model has to have in mind behind each position, as one number: the state to go on
        from, and the answer to give."""
        return self.run(ids) * self.vocab_size + self.answers(ids)

    def monoid(self) -> Monoid:
        """What strings do to the minimal machine; ValueError if that is more different things than
        `monoid.MOST_ELEMENTS`, or if the machine does not ask at each position."""
        return self._monoid

    @cached_property
    def _monoid(self) -> Monoid:
        small = self.minimal()
        return monoid_of(self.name, small.next_state, small.answer, small.start)

    def minimal(self) -> "Machine":
        """The smallest machine with the same answers to all strings, its states numbered
        in the order in which a search meets them, letter by letter: two machines answer
        alike if these are equal."""
        return minimal(self.name, self.start, self.symbols, self.following)


def minimal(name: str, start, symbols: Iterable[str], moves: Callable) -> Machine:
    """The minimal machine of one that is given by its moves:
    moves(state) = [(next state, answer), ...], one for each of `symbols`. States may be anything
    that can be hashed; those that the start does not reach are not asked.

    A Mealy machine is a deterministic automaton that accepts strings of (letter, answer) pairs, so
    automata-lib's minimal automaton (Hopcroft 1971) gives its minimal form.
    """
    table, todo = {}, [start]
    while todo:
        state = todo.pop()
        if state not in table:
            table[state] = moves(state)
            todo += [after for after, _ in table[state]]
    index = {state: i for i, state in enumerate(table)}          # automata-lib takes no None
    transitions = {index[state]: {(letter, answer): index[after]
                                  for letter, (after, answer) in enumerate(row)}
                   for state, row in table.items()}
    dfa = DFA(states=set(transitions),
              input_symbols={pair for row in transitions.values() for pair in row},
              transitions=transitions, initial_state=index[start], final_states=set(transitions),
              allow_partial=True).minify()
    number, rows = {dfa.initial_state: 0}, []
    for state in (order := [dfa.initial_state]):
        row = sorted((letter, answer, after)
                     for (letter, answer), after in dfa.transitions[state].items())
        for _, _, after in row:
            if after not in number:
                number[after] = len(number)
                order.append(after)
        rows.append([(number[after], answer) for _, answer, after in row])
    next_state, answer = torch.tensor(rows).unbind(-1)           # (states, letters) each
    return Machine(name, next_state, answer, symbols=tuple(symbols))
