r"""Regular expressions as machines: machine("regex:(ab)*c").

The syntax is a part of Python's `re`, and means what it means there for a whole string: signs,
\ before a sign of the syntax, \d \w \s (of ASCII), classes such as [a-c], groups, |, and the greedy
repeats * + ? {m} {m,} {,n} {m,n}. Two operators of automata-lib come to it, in the rank of |, from
the left: & for both, and ^ for the shuffle, which mixes two strings, each in its own order.
"""
import operator
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, count
from time import thread_time

import networkx as nx
from automata.fa.nfa import NFA

from mythos_core.tasks.automaton import Machine, minimal

# of an expression's automaton, deterministic or not: its states, and its states times its letters
MOST_STATES, MOST_MOVES = 500, 20_000

# brackets in one another: `re` backtracks for minutes on one letter if ten repeats are
MOST_DEPTH = 8

# strings on which a machine is compared with `re`; a longer one than a slow one may take for ever
MOST_CHECKED, SLOW_SECONDS = 2000, 0.001

NO_LETTER = "\U0010ffff"                       # Unicode promises never to make a sign of it

ESCAPE = r"\\(?:[dswDSWnrtfv]|[^0-9A-Za-z])"
TOKEN = re.compile(rf"""
    (?P<open>     \((?:\?:)? )
  | (?P<close>    \) )
  | (?P<operator> [|&^] )
  | (?P<repeat>   [*+?] | \{{(?:\d+(?:,\d*)?|,\d+)\}} )
  | (?P<signs>    \[(?!\^\])\^?(?:{ESCAPE}|[^][\\])+\] | {ESCAPE} | [^][\\(){{}}|&^*+?$] )
""", re.VERBOSE | re.DOTALL | re.ASCII)

#: What Python's `re` knows and a machine does not.
UNSUPPORTED = {
    r"(?:[*+?]|\{[0-9,]+\})\?": "a repeat that is not greedy",
    r"(?:[*+?]|\{[0-9,]+\})\+": "a possessive repeat",
    r"\$|\\[AbBZz]": "an anchor",
    r"\(\?<?[=!]": "a look ahead or behind",
    r"\\[1-9]|\(\?P=": "a reference to a group",
    r"\(\?[^:]": "an extension of groups",
    rf"(?:\[(?:{ESCAPE}|[^]\\])*)?\\(?![dswDSWnrtfv])[0-9A-Za-z]": "an escape",
}

EMPTY = NFA(states={0}, input_symbols=set(), transitions={0: {}}, initial_state=0, final_states={0})

#: How two automata are joined, and a bound of the states that come of it.
JOIN = {"": (NFA.concatenate, operator.add), "|": (NFA.union, operator.add),
        "&": (NFA.intersection, operator.mul), "^": (NFA.shuffle_product, operator.mul)}


def regular(pattern: str) -> Machine:
    r"""Whether the string so far is in the language of a regular expression: token 2, or 1 if not.

    Letters are the signs of the strings in the language, sorted by code point. What names no sign,
    as . and [^a] and \D do, stands for those that the rest of the expression names.

    Before a machine is returned it is compared with Python's `re` on the shortest strings: 2,000,
    or as many as `re` matches in 1 ms each. With & or ^ it is not, as `re` has neither.

    Raises:
        ValueError: for what is no regular expression; for what Python's `re` has besides, by its
            name (anchors, references, repeats that are not greedy, escapes such as \x41); for a
            language without a letter; for more than 500 states (`MOST_STATES`), 20,000 moves
            (`MOST_MOVES`) or 8 brackets in one another (`MOST_DEPTH`); where `re` differs.
    """
    try:
        return _machine_of(pattern)
    except (ValueError, re.error, OverflowError) as error:
        raise ValueError(f"regex = {pattern!r}: {error}") from error


def _machine_of(pattern: str) -> Machine:
    tokens = list(_tokens(pattern))
    _check_sides(tokens)
    as_python = re.compile("".join("|" if kind == "operator" else text for kind, text in tokens),
                           re.ASCII)           # of the same structure
    nfa = _automaton(iter(tokens), _named(tokens)).eliminate_lambda()
    machine = _deterministic(f"regex:{pattern}", nfa, _letters(nfa))
    if not {("operator", "&"), ("operator", "^")} & set(tokens):
        _compare(machine, as_python)
    return machine


def _tokens(pattern: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each; ValueError for what is not supported."""
    place = depth = 0
    while place < len(pattern):
        for unsupported, construct in UNSUPPORTED.items():
            if found := re.compile(unsupported, re.DOTALL).match(pattern, place):
                raise ValueError(f"must be without {construct}, such as {found[0]!r} at {place}")
        if not (token := TOKEN.match(pattern, place)):
            raise ValueError(f"must have a backslash before {pattern[place]!r} at {place} if that "
                             "is a letter; else it must be part of a class or a repeat")
        depth += (token.lastgroup == "open") - (token.lastgroup == "close")
        if depth > MOST_DEPTH:
            raise ValueError(f"must have at most {MOST_DEPTH} brackets in one another")
        yield token.lastgroup, token[0]
        place = token.end()


def _check_sides(tokens: list[tuple[str, str]]):
    """With nothing before it ^ would be Python's anchor."""
    before = ["open", *(kind for kind, _ in tokens)]
    after = [*(kind for kind, _ in tokens[1:]), "close"]
    for left, (_, text), right in zip(before, tokens, after):
        if text in ("&", "^") and (left in ("open", "operator") or right in ("close", "operator")):
            raise ValueError(f"must have an expression on both sides of {text!r}, which is "
                             "no letter and no anchor")


def _named(tokens: Iterable[tuple[str, str]]) -> str:
    """The signs that an expression names, sorted: its classes are read by Python's `re`."""
    texts = {text for kind, text in tokens if kind == "signs"}
    last = max(127, *(ord(sign) for text in texts for sign in text), 0)
    unicode = "".join(map(chr, range(last + 1)))
    return "".join(sorted(set(chain.from_iterable(
        _signs(text, unicode) for text in texts if not _signs(text, NO_LETTER)))))


def _signs(text: str, among: str) -> set[str]:
    return set(re.findall(text, among, re.ASCII))


def _limit(states: int, letters: int):
    if states > MOST_STATES or states * letters > MOST_MOVES:
        raise ValueError(f"must have at most {MOST_STATES} states, and {MOST_MOVES:,} states x "
                         f"letters: has at least {states:,} x {letters:,}")


def _automaton(tokens: Iterator[tuple[str, str]], named: str) -> NFA:
    """Of the tokens up to the bracket that closes, or to the end."""
    whole, how, branch = EMPTY, "", []
    for kind, text in tokens:
        if kind == "close":
            break
        if kind == "operator":
            whole, how, branch = _joined(how, whole, _string(branch)), text, []
        elif kind == "repeat":
            branch.append(_repeated(branch.pop(), text))
        else:
            branch.append(_automaton(tokens, named) if kind == "open" else
                          _one_of(_signs(text, named)))
    return _joined(how, whole, _string(branch))


def _joined(how: str, one: NFA, other: NFA) -> NFA:
    join, states = JOIN[how]
    _limit(states(len(one.states), len(other.states)), len(one.input_symbols | other.input_symbols))
    return join(one, other)


def _string(parts: list[NFA]) -> NFA:
    """One after another, joined by halves: each join copies."""
    if len(parts) < 2:
        return parts[0] if parts else EMPTY
    half = len(parts) // 2
    return _joined("", _string(parts[:half]), _string(parts[half:]))


def _one_of(signs: set[str]) -> NFA:
    _limit(2, len(signs))
    return NFA(states={0, 1}, input_symbols=signs,
               transitions={0: {sign: {1} for sign in signs}}, initial_state=0, final_states={1})


def _repeated(part: NFA, repeat: str) -> NFA:
    low, comma, high = {"*": "0,", "+": "1,", "?": "0,1"}.get(repeat, repeat[1:-1]).partition(",")
    least, most = int(low or 0), int(high or (0 if comma else low))
    _limit(len(part.states) * max(least, most), len(part.input_symbols))
    rest = part.kleene_star() if comma and not high else EMPTY
    for _ in range(most - least):              # from within: a(a(a)?)? has fewer moves than a?a?a?
        rest = part.concatenate(rest).option()
    return _string([part] * least + [rest])


def _letters(nfa: NFA) -> list[str]:
    """Those of the strings that it accepts; it has no moves without a letter, and its states are
    reached."""
    graph = nx.DiGraph([(before, after) for before, after, _ in nfa.iter_transitions()])
    graph.add_edges_from((state, "accepted") for state in nfa.final_states)
    graph.add_node("accepted")
    accepting = nx.ancestors(graph, "accepted")
    letters = {letter for _, after, letter in nfa.iter_transitions() if after in accepting}
    if not letters:
        raise ValueError("must have a letter")
    return sorted(letters)


def _deterministic(name: str, nfa: NFA, letters: list[str]) -> Machine:
    """Its states are sets of the automaton's (Rabin and Scott 1959)."""
    found = count(1)

    def after(subset, letter):
        return frozenset().union(*(nfa.transitions.get(state, {}).get(letter, ())
                                   for state in subset))

    def moves(subset):
        _limit(next(found), len(letters))
        return [(new, 1 + (not new.isdisjoint(nfa.final_states)))
                for new in (after(subset, letter) for letter in letters)]

    return minimal(name, frozenset([nfa.initial_state]), letters, moves)


def _compare(machine: Machine, expression: re.Pattern):
    """ValueError where they differ on a short string."""
    todo = deque([("", machine.start)])
    for _ in range(MOST_CHECKED // machine.letters):
        read, state = todo.popleft()
        for letter, (after, answer) in zip(machine.symbols, machine.following(state)):
            text, begun = read + letter, thread_time()
            if (answer == 2) != bool(expression.fullmatch(text)):
                raise ValueError("must mean the same to automata-lib as to Python's re, but "
                                 f"{text!r} is in one language only")
            if thread_time() - begun > SLOW_SECONDS:
                return
            todo.append((text, after))
