"""Where finite machines end: tasks whose memory has no bound, and the finite machines that they are
on short strings.

    task("reverse-string").bounded(16)      # the machine of what is complete within 16 elements

A model with codes is a finite machine (`certificate`), so none is right on all strings of such a
task. Its strings of at most N elements, though, are those of a finite machine, which has the more
states the longer they are: N / 2 for a counter, 2^(N / 2) for a stack of two symbols.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.tasks.automaton import NOT_ASKED, Machine, minimal

BROKEN = 3                       # from the first letter on that makes it no string of the language
NOT_YET, FIRST_SYMBOL = 1, 2     # of tasks that answer with a string: while it is read; behind it


@dataclass(frozen=True)
class Task:
    """A machine with infinitely many states, given by its moves.

    Attributes:
        symbols: the letters' names; token j + 1 is letter j.
        following: state -> (next state, answer), letter by letter, answers as a `Machine` has them.
            The state None is the one that nothing leads out of; of tasks that ask nothing there,
            it has no moves.
        size: state -> elements of the shortest complete string that comes through it, or 0 once
            the rest of the string can only become less.
    """

    name: str
    symbols: str
    start: tuple
    following: Callable[[Any], list[tuple]]
    size: Callable[[tuple], int]

    def bounded(self, elements: int) -> Machine:
        """The minimal machine that answers as the task does, and is asked nothing of what cannot be
        completed within so many elements."""
        def moves(state):
            if state == "beyond":
                return [("beyond", NOT_ASKED)] * len(self.symbols)
            return [("beyond", NOT_ASKED) if answer == NOT_ASKED or self._size(after) > elements
                    else (after, answer) for after, answer in self.following(state)]

        return minimal(f"{self.name} of {elements}", self.start, self.symbols, moves)

    def _size(self, state) -> int:
        return 0 if state is None else self.size(state)

    def draw(self, batch: int, seq_len: int, generator: torch.Generator
             ) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Strings that break nothing as long as they can, and their right answers. Half of them
        fill the memory as far as their length allows, and empty it again; each of the others does
        so at a share of its positions that is drawn for it, and takes any letter at the rest."""
        shares = (2 * torch.rand(batch, generator=generator)).clamp(max=1).tolist()
        rows = [self._draw_one(share, seq_len, generator) for share in shares]
        ids, answers = torch.tensor(rows).unbind(2)
        return ids, answers

    def _draw_one(self, share, seq_len, generator):
        state, row = self.start, []
        for position in range(seq_len):
            asked = [(after, answer, letter) for letter, (after, answer)
                     in enumerate(self.following(state)) if answer != NOT_ASKED]
            moves = [move for move in asked if move[0] is not None]
            if moves and torch.rand((), generator=generator) < share:
                moves = self._steered(moves, state, 2 * position < seq_len, seq_len)
            choice = int(torch.randint(len(moves or asked), (), generator=generator))
            state, answer, letter = (moves or asked)[choice]
            row.append((letter + 1, answer))
        return row

    def _steered(self, moves, state, fill, seq_len):
        """Those of the moves that fill the memory, if they may, or else empty it the most."""
        larger = [move for move in moves if self.size(state) < self.size(move[0]) <= seq_len]
        if fill and larger:
            return larger
        least = min(self.size(after) for after, _, _ in moves)
        return [move for move in moves if self.size(move[0]) == least]


def a_n_b_n() -> Task:
    """Whether the string so far is a^n b^n, n > 0 (token 2), begins one (1), or does not (3)."""
    def following(state):
        if state is None:
            return [(None, BROKEN)] * 2
        phase, n = state
        by_a = (("a", n + 1), 1) if phase == "a" else (None, BROKEN)
        return [by_a, (("b", n - 1), 1 + (n == 1)) if n else (None, BROKEN)]

    return Task("a^n b^n", "ab", ("a", 0), following, lambda state: 2 * state[1])


def brackets(kinds: int) -> Task:
    """Nesting of brackets of several kinds, answered as by `machines.brackets`, but however
    deep."""
    def following(stack):
        if stack is None:
            return [(None, BROKEN)] * 2 * kinds
        opened = [((*stack, kind), 1) for kind in range(kinds)]
        return opened + [(stack[:-1], 1 + (len(stack) == 1)) if stack and stack[-1] == kind
                         else (None, BROKEN) for kind in range(kinds)]

    return Task(f"brackets-{kinds}", "([{<"[:kinds] + ")]}>"[:kinds], (), following,
                lambda stack: 2 * len(stack))


def answering(name: str, symbols: str, answer: Callable[[tuple], tuple],
              keep: Callable[[tuple], tuple] = tuple) -> Task:
    """A string, then blanks _, to each of which one more symbol of its answer is due, and behind
    the last of them that it has ended. Nothing is asked of letters behind a blank.

    Args:
        answer: the string, as numbers of `symbols`, -> its answer, likewise.
        keep: what has to be remembered of the string.
    """
    end = FIRST_SYMBOL + len(symbols)

    def following(state):
        phase, word = state
        remaining = answer(word) if phase == "read" else word
        read = [(("read", keep((*word, letter))), NOT_YET) if phase == "read"
                else (None, NOT_ASKED) for letter in range(len(symbols))]
        token = FIRST_SYMBOL + remaining[0] if remaining else end
        return [*read, (("answer", remaining[1:]), token)]

    def size(state):
        phase, word = state
        return len(word) + len(answer(word)) if phase == "read" else 0

    return Task(name, symbols + "_", ("read", ()), following, size)


def stack_manipulation() -> Task:
    """A stack of bits, its lowest first; then - (pop, if there is something), + and * (push 0, push
    1); then blanks _, answered by the stack that is left, its highest first, and by the end."""
    def following(state):
        phase, stack = state
        pushed = [(("stack", (*stack, bit)), NOT_YET) if phase == "stack" else (None, NOT_ASKED)
                  for bit in (0, 1)]
        acted = [(("act", after), NOT_YET) if phase != "answer" else (None, NOT_ASKED)
                 for after in (stack[:-1], (*stack, 0), (*stack, 1))]
        answer = FIRST_SYMBOL + (stack[-1] if stack else 2)
        return [*pushed, *acted, (("answer", stack[:-1]), answer)]

    return Task("stack-manipulation", "01-+*_", ("stack", ()), following,
                lambda state: 2 * len(state[1]) if state[0] != "answer" else 0)


TASKS = {each.name: each for each in (
    a_n_b_n(), brackets(1), brackets(2),
    answering("reverse-string", "01", lambda word: word[::-1]),
    stack_manipulation(),
    answering("duplicate-string", "01", lambda word: word + word),
    answering("odds-first", "01", lambda word: word[::2] + word[1::2]),
    answering("bucket-sort", "012", tuple, lambda word: tuple(sorted(word))),
)}


def task(name: str) -> Task:
    """The task of that name; ValueError listing the names there are."""
    if name not in TASKS:
        raise ValueError(f"task = {name!r}: must be one of {sorted(TASKS)}")
    return TASKS[name]
