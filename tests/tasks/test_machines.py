import re
from itertools import pairwise, product

import pytest
import torch
from automata.fa.nfa import NFA
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_core.tasks.groups import group
from mythos_core.tasks.machines import Machine, machine, minimal

PARITY = Machine.from_table([[0, 1], [1, 0]])


def random_machine(seed, states=6, letters=3, answers=3):
    generator = torch.Generator().manual_seed(seed)
    return Machine("random", torch.randint(0, states, (states, letters), generator=generator),
                   torch.randint(1, answers + 1, (states, letters), generator=generator),
                   seed % states)


def step_by_step(of, ids):
    """Its answers, by the table alone."""
    rows = []
    for row in (ids - 1).tolist():
        state, said = of.start, []
        for letter in row:
            said.append(int(of.answer[state, letter]))
            state = int(of.next_state[state, letter])
        rows.append(said)
    return torch.tensor(rows)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_a_machine_answers_by_its_table_and_its_minimal_form_answers_alike(seed):
    of = random_machine(seed)
    ids, targets = of.make_batch(40, 12, torch.Generator().manual_seed(seed), strings="mixed")
    assert (torch.equal(targets, step_by_step(of, ids)) and int(ids.min()) >= 1
            and int(ids.max()) <= 3)
    least = of.minimal()
    assert len(least) <= len(of) and torch.equal(least.answers(ids), targets)
    assert least.minimal() == least and least.start == 0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_renaming_splitting_and_adding_unreached_states_changes_no_minimal_form(seed, data):
    of = random_machine(seed)
    order = torch.tensor(data.draw(st.permutations(range(6))))
    renamed = Machine("renamed", order.argsort()[of.next_state[order]], of.answer[order],
                      int(order.argsort()[of.start]))
    twins = torch.cat([of.next_state, of.next_state])  # each state twice, and moves to either
    twins = twins + 6 * torch.randint(0, 2, twins.shape)
    twice = Machine("twice", twins, torch.cat([of.answer, of.answer]), of.start)
    more = Machine("more", torch.cat([of.next_state, torch.zeros(1, 3, dtype=torch.int64)]),
                   torch.cat([of.answer, torch.ones(1, 3, dtype=torch.int64)]), of.start)
    assert of.minimal() == renamed.minimal() == twice.minimal() == more.minimal()


def test_machines_that_answer_differently_somewhere_differ_in_minimal_form():
    other = Machine("other", PARITY.next_state, torch.tensor([[1, 2], [2, 2]]))
    assert PARITY.minimal() != other.minimal() and len(other.minimal()) == 2
    assert PARITY.minimal() == machine("parity").minimal()


def test_the_minimal_form_may_be_asked_of_anything_that_moves():
    """Counting modulo 6, asked modulo 3 only: three states do."""
    found = minimal("count", (0, "any"), "1",
                    lambda state: [(((state[0] + 1) % 6, "any"), (state[0] + 1) % 3 + 1)])
    assert found.next_state.tolist() == [[1], [2], [0]] and found.answer.tolist() == [[2], [3], [1]]


@pytest.mark.parametrize("name, states, letters", [
    ("parity", 2, 2), ("Z5", 5, 5), ("S3", 6, 6), ("A5", 60, 2), ("S5", 120, 2)])
def test_a_groups_machine_answers_with_the_product(name, states, letters):
    of, tracked = machine(name), group("Z2" if name == "parity" else name)
    assert ((len(of), of.letters, of.vocab_size) == (states, letters, states + 1)
            and len(of.minimal()) == states)
    ids, targets = of.make_batch(20, 30)
    elements = ids if letters == states else torch.tensor(tracked.generators)[ids - 1] + 1
    assert torch.equal(tracked.answers(elements), targets)


@pytest.mark.parametrize("make, named", [
    (lambda: Machine.from_table([[0, 2], [1, 0]]),
     "next_state = 0 .. 2: must be in 0 .. states - 1 = 1"),
    (lambda: Machine.from_table([[0, -1], [1, 0]]), "next_state = -1 .. 1"),
    (lambda: Machine.from_table([[0, 1], [1, 0]], start=2),
     "start = 2: must be in 0 .. states - 1 = 1"),
    (lambda: Machine.from_table([[], []]), "next_state, answer: of shapes (2, 0), (2, 0)"),
    (lambda: Machine.from_table([[0, 1], [1]]), "must be a whole table of numbers"),
    (lambda: Machine.from_table([[0, None], [1, 0]]), "must be a whole table of numbers"),
    (lambda: Machine("x", PARITY.next_state, PARITY.answer, symbols=("a", "a")),
     "symbols = ('a', 'a'): must be 2 different names"),
    (lambda: PARITY.encode("012"), "letter = '2': must be one of ['0', '1']"),
    (lambda: PARITY.answers(torch.tensor([[1, 3]])), "ids = 1 .. 3: must be letters, 1 .. 2"),
    (lambda: PARITY.answers(torch.tensor([[0, 1]])), "ids = 0 .. 1"),
    (lambda: machine("regex:(ab"), "regex = '(ab': "),
    (lambda: machine("regex:"), "regex = '': must have a letter"),
    (lambda: machine("regex:a&b"), "regex = 'a&b': must have a letter"),
    (lambda: machine("regex:(ab)*c$"), "regex = '(ab)*c$': must be without an anchor, such as '$'"),
    (lambda: machine(r"regex:a\b"), r"must be without an anchor, such as '\\b' at 1"),
    (lambda: machine("regex:^a"), "must have an expression on both sides of '^'"),
    (lambda: machine("regex:(a&)b"), "must have an expression on both sides of '&'"),
    (lambda: machine(r"regex:(a|b)\1"), r"must be without a reference to a group, such as '\\1'"),
    (lambda: machine(r"regex:\x41"), r"must be without an escape, such as '\\x' at 0"),
    (lambda: machine(r"regex:[a\x41]"), r"must be without an escape, such as '[a\\x' at 0"),
    (lambda: machine("regex:a*?b"), "must be without a repeat that is not greedy, such as '*?'"),
    (lambda: machine("regex:a{2}+b"), "must be without a possessive repeat, such as '{2}+'"),
    (lambda: machine("regex:(?!a)b"), "must be without a look ahead or behind, such as '(?!'"),
    (lambda: machine("regex:(?i)a"), "must be without an extension of groups, such as '(?i'"),
    (lambda: machine("regex:a{2"), "must have a backslash before '{' at 1"),
    (lambda: machine("regex:[^]a]"), "must have a backslash before '[' at 0"),
    (lambda: machine("regex:a**"), "regex = 'a**': multiple repeat"),
    (lambda: machine("regex:a{1000}"), "must have at most 500 states"),
    (lambda: machine("regex:(a{30}){30}"), "must have at most 500 states"),
    (lambda: machine("regex:(a|b)*a(a|b){17}"), "must have at most 500 states"),
    (lambda: machine("regex:a{30}^b{30}"), "must have at most 500 states"),
    (lambda: machine("regex:[!-\uffff]"), "20,000 states x letters: has at least 2 x 65,503"),
    (lambda: machine("regex:" + "(" * 9 + "a*" + ")*" * 9), "must have at most 8 brackets"),
    (lambda: machine("divisible-by-0"), "machine = 'divisible-by-0': must be one of "),
    (lambda: Machine("x", PARITY.next_state, PARITY.answer - 3),
     "answer = -2: must be tokens, 0 or more, or -1 where nothing is asked"),
    (lambda: machine("M11"), "machine = 'M11': must be one of "),
    (lambda: machine("S9"), "group = 'S9'"),
    (lambda: PARITY.make_batch(0, 3), "batch = 0"),
    (lambda: PARITY.make_batch(1, 3, strings="odd"), "strings = 'odd'")])
def test_what_is_no_machine_is_refused_by_name(make, named):
    with pytest.raises(ValueError) as error:
        make()
    assert named in str(error.value)


def test_covering_strings_meet_every_move_that_there_is():
    """A counter that falls back at any letter but one: uniform strings
    of 12 hardly ever come far."""
    far = Machine.from_table([[min(s + 1, 11), 0, 0, 0] for s in range(12)])
    assert [(way >= 0).sum().item() for way in far.strings.shortest_ways] == list(range(12))

    def met(strings):
        ids, _ = far.make_batch(400, 14, torch.Generator().manual_seed(0), strings=strings)
        states = torch.nn.functional.pad(far.run(ids), (1, 0))[:, :-1]
        return len((states * 4 + ids - 1).unique())

    assert met("covering") == 48 and met("uniform") < 40
    one = Machine.from_table([[0, 0]])
    assert one.make_batch(5, 3, strings="covering")[0].shape == (5, 3)


def brackets_by_hand(kinds, depth):
    """3 from the first bracket on that breaks the structure, else 1 while some are open, else 2."""
    def after(text):
        stack = []
        for sign in text:
            if sign in "([{<":
                stack.append(")]}>"["([{<".index(sign)])
            elif not stack or stack.pop() != sign:
                return 3
            if len(stack) > depth:
                return 3
        return 1 if stack else 2
    return after


def value(text):
    """Of an expression modulo 5, in Python's own arithmetic; its token, as the machine says it."""
    if not re.fullmatch(r"\d([-+*]\d)*[-+*]?", text):
        return 7
    return eval(text) % 5 + 1 if text[-1].isdigit() else 6


def flip_flop_by_hand(text):
    if len(text) < 1 or text[-1] != "r" or "w" not in text:
        return 3
    writes = [b for a, b in pairwise(text) if a == "w" and b in "01"]
    return 1 + int(writes[-1]) if writes else 3


#: Each named task by another way: what is to be answered after a prefix.
BY_HAND = {
    "even-pairs": lambda text: 1 + ((text.count("ab") + text.count("ba")) % 2 == 0),
    "modular-arithmetic": value,
    "cycle-navigation": lambda text: (text.count("+") - text.count("-")) % 5 + 1,
    "flip-flop": flip_flop_by_hand,
    "divisible-by-7": lambda text: 1 + (int(text, 2) % 7 == 0),
    "divisible-by-12": lambda text: 1 + (int(text, 2) % 12 == 0),
    "digits-mod-7": lambda text: sum(map(int, text)) % 7 + 1,
    "prefix-sums": lambda text: text.count("1") % 2 + 1,
    "brackets-2-3": brackets_by_hand(2, 3),
    "brackets-4-1": brackets_by_hand(4, 1),
    "regex:(ab)*c": lambda text: 1 + bool(re.fullmatch("(ab)*c", text)),
    "regex:(a|b)*abb": lambda text: 1 + bool(re.fullmatch("(a|b)*abb", text)),
    "regex:a{2,3}(b|c)?": lambda text: 1 + bool(re.fullmatch("a{2,3}(b|c)?", text)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_named_machine_answers_as_its_task_is_defined(name):
    of = machine(name)
    for strings in ("uniform", "touring"):
        ids, answers = of.make_batch(100, 12, torch.Generator().manual_seed(1), strings=strings)
        for row, said in zip(ids.tolist(), answers.tolist()):
            text = "".join(of.symbols[token - 1] for token in row)
            assert torch.equal(of.encode(text), torch.tensor([row]))
            assert said == [BY_HAND[name](text[:n]) for n in range(1, 13)], text
    assert of.minimal() == of


@pytest.mark.parametrize("pattern, letters", [
    ("(ab)*c", "abc"), ("a{2,3}b", "ab"), ("[a-c]+", "abc"), (r"\d\d", "0123456789"),
    (r"a\.b", ".ab"), (r"[\]\\x]", r"\]x"), ("a b", " ab"), ("ba{0}c", "bc"), ("(ab){0,0}c", "c"),
    ("(a|b)*&(b|c)*", "b"), ("(?:ab)*c", "abc"), ("[^a]b", "b"), ("([^a]|a)b", "ab"),
    (r"(a|b)\D.", "ab"), ("éc", "cé")])
def test_the_letters_of_a_regular_expression_are_those_of_its_language_in_order(pattern, letters):
    assert machine(f"regex:{pattern}").symbols == tuple(letters)


def language(of, longest):
    """Of the strings of one letter or more, all that it answers with 2."""
    return {"".join(string) for n in range(1, longest + 1)
            for string in product(of.symbols, repeat=n)
            if of.answers(of.encode(string))[0, -1] == 2}


SIGNS = st.sampled_from(["a", "b", "[ab]", "()", "a{0}", "."])
REPEATS = st.sampled_from(["*", "+", "?", "{0}", "{2}", "{,2}", "{1,}", "{0,0}", "{2,3}"])
EXPRESSIONS = st.recursive(SIGNS, lambda part: st.one_of(
    st.tuples(part, part).map("".join), st.tuples(part, part).map("({0[0]}|{0[1]})".format),
    st.tuples(part, REPEATS).map("({0[0]}){0[1]}".format)), max_leaves=6)


@settings(deadline=None, max_examples=60)
@given(pattern=EXPRESSIONS)
def test_a_regular_expression_means_what_it_does_in_python(pattern):
    """With a and b besides, each of them a whole string."""
    of = machine(f"regex:({pattern})|a|b")
    assert language(of, 6) == {
        text for n in range(1, 7) for text in map("".join, product("ab", repeat=n))
        if re.fullmatch(f"({pattern})|a|b", text)}


def test_both_and_the_shuffle_of_two_expressions():
    assert language(machine("regex:(a|bb)*&(aa|b)*"), 4) == {
        "aa", "bb", "aaaa", "aabb", "bbaa", "bbbb"}
    assert language(machine("regex:ab^c"), 4) == {"abc", "acb", "cab"}
    from_the_left = language(machine("regex:ab|c^d"), 4)
    assert from_the_left == {"abd", "adb", "dab", "cd", "dc"}


def test_a_library_of_another_mind_than_python_is_found_out(monkeypatch):
    monkeypatch.setattr(NFA, "kleene_star", NFA.option)
    with pytest.raises(ValueError, match=r"must mean the same .* 'aaa' is in one language"):
        machine("regex:a*b|aa*")


def test_python_is_not_asked_for_long():
    """On five letters it would backtrack for hours."""
    assert len(machine("regex:((((((a*)*)*)*)*)*)*b")) == 2


def test_regular_expressions_that_models_were_trained_for_keep_their_machines():
    for pattern, moves, answers in [
            ("(ab)*c", [[1, 2, 2], [2, 0, 2], [2, 2, 2]], [[1, 1, 2], [1, 1, 1], [1, 1, 1]]),
            ("(ab)*", [[1, 2], [2, 0], [2, 2]], [[1, 1], [1, 2], [1, 1]]),
            ("(a|b)*abb", [[1, 0], [1, 2], [1, 0]], [[1, 1], [1, 1], [1, 2]]),
            ("a*", [[0]], [[2]])]:
        of = machine(f"regex:{pattern}")
        assert (of.next_state.tolist(), of.answer.tolist(), of.start) == (moves, answers, 0)


@pytest.mark.parametrize("name, base", [("addition", 2), ("decimal-addition", 10)])
def test_addition_adds(name, base):
    of = machine(name)
    ids, answers = of.make_batch(50, 12, torch.Generator().manual_seed(1))
    for row, said in zip(ids.tolist(), answers.tolist()):
        numbers = [of.symbols[token - 1].split("+") for token in row]
        a, b = (sum(int(pair[i]) * base ** k for k, pair in enumerate(numbers)) for i in (0, 1))
        found = sum((digit - 1) * base ** k for k, digit in enumerate(said))
        assert found == (a + b) % base ** 12


def test_random_machines_are_drawn_by_their_seed():
    of = machine("random-6-3-1")
    assert of == machine.__wrapped__("random-6-3-1") and of != machine("random-6-3-2")
    assert of.letters == 3 and 1 <= len(of) <= 6 and set(of.answer.flatten().tolist()) <= {1, 2}


def test_touring_strings_meet_moves_that_uniform_ones_do_not():
    """In an expression half of the letters end it: uniform strings see little of arithmetic."""
    of = machine("modular-arithmetic")

    def met(strings):
        generator = torch.Generator().manual_seed(0)
        return sum(len(of.moves(of.make_batch(64, 16, generator, strings=strings)[0]).unique())
                   for _ in range(3))

    assert met("touring") > 2 * met("uniform")
    ids, _ = of.make_batch(200, 16, torch.Generator().manual_seed(0), strings="touring")
    breaks = (of.answers(ids) != 7).sum(1).bincount(minlength=17)
    assert (breaks > 0).all()                                    # at each position, and nowhere


def test_distances_are_those_of_shortest_strings():
    of = random_machine(5)
    far = of.strings.distance(torch.ones(6, 3, dtype=torch.bool))
    for start in range(len(of)):
        ways = Machine("from here", of.next_state, of.answer, start).strings.shortest_ways
        assert far[start, start] == 0
        assert sorted(far[start][far[start] < len(of)].tolist()) == sorted(
            (ways >= 0).sum(1).tolist())
    trap = Machine.from_table([[0, 1], [1, 1]])
    assert trap.strings.distance(trap.next_state >= 0).tolist() == [[0, 1], [2, 0]]
    assert trap.strings.distance(trap.next_state == 0).tolist() == [[0, 2], [2, 0]]
    assert trap.strings.open_letters.tolist() == [[True, False], [True, True]]
    once = Machine.from_table([[0, 1], [2, 1], [1, 2]])          # a start that is left for good
    assert once.strings.open_letters.all()
    assert not machine("flip-flop").strings.has_traps
    assert machine("brackets-2-3").strings.has_traps
