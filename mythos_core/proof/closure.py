"""The contexts that strings lead a strict model to, walked until no new one turns up, each with the
state that follows: the set that the theorems of `proof.certificate` and `proof.invariant` ask for.
"""
from typing import Any

import torch

from mythos_core.proof.choices import advance, decode
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.tasks.machines import Machine, minimal
from mythos_core.tasks.unbounded import Task

MOST_CONTEXTS = 200_000
PART = 4096             # contexts of one pass

Context = tuple[int | None, int]    # the state before, None at the start of a string; the letter


class Closure:
    """The contexts that strings lead to, met letter by letter, each with the state of the
    machine that is `asked` for, or of the task that no machine does.

    Attributes:
        states: of the model: `choices.Codes` or `invariant.Balls`, by number.
        closed: whether no string leads elsewhere, and none is answered wrong.
        length: of the strings that were followed; wrong: answers to the longest.
    """

    def __init__(self, states: Any, letters: int, asked: Machine | Task | None = None):
        self.states, self.letters, self.asked = states, letters, asked
        self.length, self.wrong, self.closed = 0, 0, False
        self.left_out = isinstance(asked, Machine) and bool((asked.answer == NOT_ASKED).any())
        self.follows: dict[Context, int] = {}                    # context -> state
        self.answers: dict[int, int] = {}                        # state -> token
        # contexts, each with the state of the machine there
        self.seen: set[tuple[Context, Any]] = set()

    @property
    def fault(self) -> str:
        """What is wrong, if something is."""
        return (f"a string of length {self.length} is answered wrong" if self.wrong
                else self.states.fault)

    @property
    def contexts(self) -> int:
        """Pairs of a context and a state of the machine that were met."""
        return len(self.seen)

    @torch.no_grad()
    def run(self) -> "Closure":
        """Close the set, one letter longer at a time, unless an answer is wrong or there are too
        many. Where nothing is asked of a move, no string with it is followed."""
        asked = self.asked or Machine.from_table([[0] * self.letters])
        met: set[tuple[int | None, Any]] = set()
        frontier: set[tuple[int | None, Any]] = {(None, asked.start)}
        while frontier and not self.fault and len(self.seen) < MOST_CONTEXTS:
            met |= frontier
            new = [((code, letter), state, *move) for code, state in frontier
                   for letter, move in enumerate(asked.following(state)) if move[1] != NOT_ASKED]
            self._evaluate({context for context, *_ in new})
            if self.states.fault:
                return self
            if self.asked is not None:
                self.wrong = sum(self.answers[self.follows[context]] != answer
                                 for context, _, _, answer in new)
            self.seen |= {(context, state) for context, state, _, _ in new}
            frontier = {(self.follows[context], after) for context, _, after, _ in new} - met
            self.length += bool(new)
        self.closed = not frontier and not self.wrong
        if self.closed:
            self.states.measure()
        return self

    def machine(self) -> Machine:
        """The minimal machine of the contexts, by the model's answers to them."""
        def moves(code):
            after = [self.follows[code, letter] for letter in range(self.letters)]
            return [(state, self.answers[state]) for state in after]

        symbols = self.asked.symbols if self.asked else map(str, range(self.letters))
        return minimal(self.asked.name if self.asked else "read off", None, symbols, moves)

    def table(self) -> dict:
        """What was met, as JSON has it: rows of (the model's state before, or None; that of the
        machine; by letter the state that follows, None where nothing is asked)."""
        codes: dict[tuple[int | None, Any], list[int | None]] = {}
        for (code, letter), state in self.seen:
            row = codes.setdefault((code, state), [None] * self.letters)
            row[letter] = self.follows[code, letter]
        rows = sorted(codes.items(), key=lambda item: (item[0][0] is not None, item[0]))
        return {"rows": [[*pair, after] for pair, after in rows],
                "answers": [[code, answer] for code, answer in sorted(self.answers.items())],
                **self.states.places}

    def _evaluate(self, contexts: set[Context]):
        new = sorted(contexts - self.follows.keys(), key=lambda of: (of[0] is not None, of))
        for part in (new[i:i + PART] for i in range(0, len(new), PART)):
            self.follows |= zip(part, self.states.choose(advance, part))
        codes = sorted({self.follows[of] for of in new if of in self.follows} - self.answers.keys())
        if codes:
            self.answers |= zip(codes, self.states.choose(decode, codes))
