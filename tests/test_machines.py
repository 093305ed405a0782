import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_core.groups import group
from mythos_core.machines import Machine, machine, minimal

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
    assert torch.equal(targets, step_by_step(of, ids)) and int(ids.min()) >= 1 and int(ids.max()) <= 3
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
    twins = torch.cat([of.next_state, of.next_state])            # each state twice, and moves to either
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
    found = minimal("count", (0, "any"), 1,
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
    (lambda: Machine("x", PARITY.next_state, PARITY.answer - 2),
     "answer = -1: must be tokens, 0 or more"),
    (lambda: machine("M11"), "group = 'M11'"),
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
    assert [(way >= 0).sum().item() for way in far.shortest_ways] == list(range(12))

    def met(strings):
        ids, _ = far.make_batch(400, 14, torch.Generator().manual_seed(0), strings=strings)
        states = torch.nn.functional.pad(far.run(ids), (1, 0))[:, :-1]
        return len((states * 4 + ids - 1).unique())

    assert met("covering") == 48 and met("uniform") < 40
    one = Machine.from_table([[0, 0]])
    assert one.make_batch(5, 3, strings="covering")[0].shape == (5, 3)
