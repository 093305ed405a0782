"""Finite-state machines by name: what a strict model is trained to be, and what is read off it.

    machine("parity")  machine("S5")  machine("divisible-by-7")  machine("regex:(ab)*c")
    Machine.from_table([[0, 1], [1, 0]])
"""
import re
from collections.abc import Callable
from itertools import product

import torch

from mythos_core.tasks.automaton import Machine, minimal
from mythos_core.tasks.expressions import regular
from mythos_core.tasks.groups import group

# elements of a group that are all letters of its machine; of a larger one, its generators are
MOST_LETTERS = 12


def tracking(name: str) -> Machine:
    """The running product in a group of `groups.group`; its answer is the state. Letter j is
    element j where the group has at most 12 elements, else generator j; "-all" behind the name of a
    group makes every element a letter."""
    tracked = group("Z2" if name == "parity" else name)
    letters = list(range(len(tracked))) if len(tracked) <= MOST_LETTERS else tracked.generators
    return Machine.from_table(tracked.table[:, letters], name=name)


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
    return minimal(f"divisible-by-{n}", 0, "01", lambda remainder: [
        ((2 * remainder + bit) % n, 1 + ((2 * remainder + bit) % n == 0)) for bit in (0, 1)])


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
    answer = torch.randint(1, 3, (states,), generator=generator)
    return Machine(f"random-{states}-{letters}-{seed}", table, answer[table]).minimal()


#: Names, as regular expressions, and the machines that they make of their groups.
NAMES: dict[str, Callable[..., Machine]] = {
    r"(parity|[ZDSA]\d+)": tracking,
    r"([ZDSA]\d+)-all": lambda name: Machine.from_table(group(name).table, name=f"{name}-all"),
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


def machine(name: str) -> Machine:
    """A machine by name: one of the `NAMES`, such as "parity", "S5", "regex:(ab)*c", "even-pairs",
    "divisible-by-7", "brackets-2-3" (kinds, depth) or "random-6-3-0" (states, letters, seed).

    ValueError for another name.
    """
    for pattern, make in NAMES.items():
        if match := re.fullmatch(pattern, name, re.DOTALL):
            return make(*match.groups())
    raise ValueError(f"machine = {name!r}: must be one of {', '.join(NAMES)}")
