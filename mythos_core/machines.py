"""Finite-state machines: what a strict model is trained to be, and what is read off it.

Token j + 1 is letter j. A machine answers at every position, with a token: in a Mealy machine's
way, by the state that it is in and the letter that it reads (Mealy 1955).

    machine("parity")  machine("S5")  machine("divisible-by-7")  machine("regex:(ab)*c")
    Machine.from_table([[0, 1], [1, 0]])
"""
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from automata.base.exceptions import AutomatonException, RegexException
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA
from jaxtyping import Bool, Int
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
        number = {symbol: token for token, symbol in enumerate(self.symbols, 1)}
        letters = list(letters)
        if unknown := [letter for letter in letters if letter not in number]:
            raise ValueError(f"letter = {unknown[0]!r}: must be one of {list(self.symbols)}")
        return torch.tensor([[number[letter] for letter in letters]])

    def make_batch(self, batch: int, seq_len: int, generator: torch.Generator | None = None,
                   device=None, strings: str = "uniform") -> tuple[Tensor, Tensor]:
        """`batch` random strings and their right answers: ids, targets, (batch, seq_len) int64.

        Args:
            strings: of `groups.draw_letters`, or "covering": a third uniform, a third mixed, and a
                third that begin with a shortest way to a state drawn at random and are uniform from
                there, so that moves from states that random strings hardly come to are met. Or
                "touring": `tours`, for machines whose random strings end in a trap.
        """
        if strings == "touring":
            ids = (self.tours(batch, seq_len, generator) + 1).to(device)
            return ids, self.answers(ids)
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

    @property
    def reversible(self) -> bool:
        """Whether each letter permutes the states, as in a group. Then random strings come to all
        states alike; else they may end in a trap, or leave a state out."""
        return all(len(column.unique()) == len(self) for column in self.next_state.T)

    @cached_property
    def open_letters(self) -> Bool[Tensor, "states letters"]:
        """The letters that keep out of traps: those that leave the largest set of states that lead
        to each other within reach, and do not leave such a set if they can."""
        near = self.distance(torch.ones_like(self.next_state, dtype=torch.bool)) < len(self)
        mutual = near & near.T
        size = mutual.sum(1)                                     # of the set that a state is in
        best = torch.where(near, size, 0).amax(1)                # of the largest within reach
        stays = mutual.gather(1, self.next_state) & (size == best).unsqueeze(1)
        rank = 2 * best[self.next_state] + stays
        return rank == rank.amax(1, keepdim=True)

    def distance(self, allowed: Bool[Tensor, "states letters"]) -> Int[Tensor, "states states"]:
        """Letters of a shortest string of `allowed` ones from a state to a state; as many as there
        are states where there is none."""
        n = len(self)
        far = torch.full((n, n), n).fill_diagonal_(0)
        for _ in range(n):
            onward = (far[self.next_state] + 1).masked_fill(~allowed[:, :, None], n)
            nearer = torch.minimum(far, onward.amin(1))
            if torch.equal(nearer, far):
                break
            far = nearer
        return far

    @cached_property
    def _way(self) -> tuple[Tensor, Tensor]:
        """The first open letter of a shortest way from a state to a state (states, states); and
        which states are within reach (states, states), as weights."""
        far = self.distance(self.open_letters)
        onward = far[self.next_state].masked_fill(~self.open_letters[:, :, None], len(self))
        return onward.argmin(1), (far < len(self)).float()

    def tours(self, batch: int, seq_len: int, generator=None) -> Int[Tensor, "batch seq"]:
        """Strings that keep to the open letters up to a position drawn for each, and are uniform
        from there. In half of them the first part goes a shortest way to a move drawn at random,
        takes it, and goes on to another, so that all moves are as common as can be; in the others
        each open letter is as likely."""
        (way, near), weights = self._way, self.open_letters.float()
        touring = torch.rand(batch, generator=generator) < 0.5
        cut = torch.randint(seq_len + 1, (batch,), generator=generator)
        state, letters = torch.full((batch,), self.start), []
        target = torch.multinomial(near[state], 1, generator=generator)[:, 0]
        for position in range(seq_len):
            step = torch.multinomial(weights[state], 1, generator=generator)[:, 0]
            there = state == target
            step = torch.where(touring & ~there, way[state, target], step)
            any_letter = torch.randint(self.letters, (batch,), generator=generator)
            letters.append(torch.where(position < cut, step, any_letter))
            state = self.next_state[state, letters[-1]]
            fresh = torch.multinomial(near[state], 1, generator=generator)[:, 0]
            target = torch.where(there, fresh, target)
        return torch.stack(letters, 1)

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

    def minimal(self) -> "Machine":
        """The smallest machine with the same answers to all strings, its states numbered
        in the order in which a search meets them, letter by letter: two machines answer
        alike if these are equal."""
        moves, answers = self.next_state.tolist(), self.answer.tolist()
        return minimal(self.name, self.start, self.symbols,
                       lambda state: list(zip(moves[state], answers[state])))


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
    pairs = {index[state]: {(letter, answer): index[after]
                            for letter, (after, answer) in enumerate(found)}
             for state, found in table.items()}
    smallest = DFA(states=set(pairs),
                   input_symbols={pair for row in pairs.values() for pair in row},
                   transitions=pairs, initial_state=index[start], final_states=set(pairs),
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
    return Machine(name, both[..., 0], both[..., 1], symbols=tuple(symbols))


def tracking(name: str) -> Machine:
    """The running product in a group of `groups.group`; its answer is the state. Letter j is
    element j where the group has at most 12 elements, else generator j."""
    tracked = group("Z2" if name == "parity" else name)
    letters = list(range(len(tracked))) if len(tracked) <= MOST_LETTERS else tracked.generators
    return Machine.from_table(tracked.table[:, letters], name=name)


def regular(pattern: str) -> Machine:
    """Whether the string so far is in the language of a regular expression: token 2, or 1 if not.
    Letters are those of the pattern, in their order. Syntax: automata-lib's, with | * + ? & ^ {}
    and brackets."""
    try:
        found = DFA.from_nfa(NFA.from_regex(pattern)).to_complete()
    except (AutomatonException, RegexException) as error:
        raise ValueError(f"regex = {pattern!r}: {error}") from error
    symbols = sorted(found.input_symbols)
    if not symbols:
        raise ValueError(f"regex = {pattern!r}: must have a letter")

    def moves(state):
        following = [found.transitions[state][letter] for letter in symbols]
        return [(after, 1 + (after in found.final_states)) for after in following]

    return minimal(f"regex:{pattern}", found.initial_state, symbols, moves)


def even_pairs() -> Machine:
    """Whether a string of two letters has an even number of ab and ba together (token 2), which is
    whether its first letter is its last (Deletang et al. 2023)."""
    return minimal("even-pairs", None, "ab", lambda first: [
        (letter if first is None else first, 1 + (first in (None, letter))) for letter in range(2)])


def modular_arithmetic() -> Machine:
    """The value modulo 5 of an expression such as 1+2*3-4 without brackets, products first
    (Deletang et al. 2023), after each of its numbers; token 6 after an operator, 7 from the first
    letter on that makes it no expression."""
    def moves(state):
        if state is None:
            return [(None, 7)] * 8
        kind, total, term = state                # the sum of what is finished, and what is not yet
        if kind == "number due":                 # a digit multiplies what stands before it
            terms = [term * digit % 5 for digit in range(5)]
            return [(("operator due", total, new), (total + new) % 5 + 1) for new in terms] + [
                (None, 7)] * 3
        value = (total + term) % 5
        return [(None, 7)] * 5 + [(("number due", *new), 6)
                                  for new in ((value, 1), (value, 4), (total, term))]

    return minimal("modular-arithmetic", ("number due", 0, 1), "01234+-*", moves)


def cycle_navigation() -> Machine:
    """Where on a cycle of five places a walk of steps 0, +1 and -1 has come (Deletang et al.
    2023)."""
    return minimal("cycle-navigation", 0, "0+-", lambda place: [
        ((place + step) % 5, (place + step) % 5 + 1) for step in (0, 1, -1)])


def flip_flop() -> Machine:
    """After each r the bit that followed the last w (tokens 1 and 2; Liu et al. 2023): strings such
    as w1i0r1 of instructions write, ignore and read, each with a bit. Token 3 where nothing is to
    be said: after all else, and before the first w."""
    def moves(state):
        bit, writes = state
        after_bit = [((new if writes else bit, False), 3) for new in (0, 1)]
        return [((bit, True), 3), ((bit, False), 3),
                ((bit, False), 3 if bit is None else 1 + bit), *after_bit]

    return minimal("flip-flop", (None, False), "wir01", moves)


def divisible(n: int) -> Machine:
    """Whether the binary number so far, most significant bit first, is divisible by n: token 2."""
    return minimal(f"divisible-by-{n}", 0, "01", lambda rest: [
        ((2 * rest + bit) % n, 1 + ((2 * rest + bit) % n == 0)) for bit in (0, 1)])


def addition(base: int, name: str) -> Machine:
    """The sum of two numbers, least significant digits first: a letter is a pair of digits, the
    answer their sum's digit d as token d + 1."""
    pairs = list(product(range(base), repeat=2))
    return minimal(name, 0, [f"{a}+{b}" for a, b in pairs], lambda carry: [
        ((a + b + carry) // base, (a + b + carry) % base + 1) for a, b in pairs])


def digit_sum(m: int) -> Machine:
    """The sum of the decimal digits so far, modulo m."""
    return minimal(f"digits-mod-{m}", 0, "0123456789", lambda total: [
        ((total + digit) % m, (total + digit) % m + 1) for digit in range(10)])


def brackets(kinds: int, depth: int) -> Machine:
    """Nesting of brackets of several kinds, at most so deep: token 2 where all are closed, 1 where
    some are open, 3 from the first bracket on that breaks the structure."""
    def step(stack, letter):
        kind, closes = letter % kinds, letter >= kinds
        fits = stack and stack[-1] == kind if closes else len(stack) < depth
        if not fits:
            return None, 3
        stack = stack[:-1] if closes else (*stack, kind)
        return stack, 1 if stack else 2

    symbols = "([{<"[:kinds] + ")]}>"[:kinds]
    return minimal(f"brackets-{kinds}-{depth}", (), symbols, lambda stack: [
        (None, 3) if stack is None else step(stack, letter) for letter in range(2 * kinds)])


def random_machine(states: int, letters: int, seed: int) -> Machine:
    """Moves drawn uniformly, and for each state an answer, token 1 or 2; in minimal form."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, states, (states, letters), generator=generator)
    said = torch.randint(1, 3, (states,), generator=generator)
    return Machine(f"random-{states}-{letters}-{seed}", table, said[table]).minimal()


#: Names, as regular expressions, and the machines that they make of their groups.
NAMES: dict[str, Callable[..., Machine]] = {
    r"(parity|[ZDSA]\d+)": tracking,
    r"prefix-sums": lambda: tracking("parity"),
    r"regex:(.*)": regular,
    r"even-pairs": even_pairs,
    r"modular-arithmetic": modular_arithmetic,
    r"cycle-navigation": cycle_navigation,
    r"flip-flop": flip_flop,
    r"divisible-by-([1-9]\d{0,2})": lambda n: divisible(int(n)),
    r"addition": lambda: addition(2, "addition"),
    r"decimal-addition": lambda: addition(10, "decimal-addition"),
    r"digits-mod-([1-9]\d?)": lambda m: digit_sum(int(m)),
    r"brackets-([2-4])-([1-4])": lambda kinds, depth: brackets(int(kinds), int(depth)),
    r"brackets-1-([1-9]\d?)": lambda depth: brackets(1, int(depth)),
    r"random-([1-9]\d?)-([1-9]\d?)-(\d+)": lambda *sizes: random_machine(*map(int, sizes)),
}


@lru_cache
def machine(name: str) -> Machine:
    """A machine by name: one of the `NAMES`, such as "parity", "S5", "regex:(ab)*c", "even-pairs",
    "divisible-by-7", "brackets-2-3" (kinds, depth) or "random-6-3-0" (states, letters, seed).

    ValueError for another name.
    """
    for pattern, make in NAMES.items():
        if found := re.fullmatch(pattern, name, re.DOTALL):
            return make(*found.groups())
    raise ValueError(f"machine = {name!r}: must be one of {', '.join(NAMES)}")
