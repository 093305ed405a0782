"""Tasks that no finite machine does, each against its definition said another way; what a bounded
machine of one is asked; and the closure of a finite machine against a task without end."""
import pickle
import re
from itertools import product

import pytest
import torch

from mythos_core import OpenMythos, study
from mythos_core.proof import closure
from mythos_core.proof.certificate import certify
from mythos_core.proof.choices import Codes
from mythos_core.proof.closure import Closure
from mythos_core.study.proofs import ladder_row
from mythos_core.tasks.automaton import NOT_ASKED, Machine
from mythos_core.tasks.machines import machine
from mythos_core.tasks.unbounded import TASKS, Task, task
from mythos_core.training import NotProved, train
from mythos_core.training.step import held_out

PARITY = "parity-extrapolating"


def a_n_b_n_by_hand(text):
    a, b = text.count("a"), text.count("b")
    if not re.fullmatch("a*b*", text) or b > a:
        return 3
    return 1 + (a == b)


def brackets_by_hand(text):
    """Strike out pairs: a closing bracket that is left has no partner."""
    while any(pair in text for pair in ("()", "[]")):
        text = text.replace("()", "").replace("[]", "")
    return 3 if re.search(r"[\])]", text) else 1 if text else 2


def stack_by_hand(word):
    """Strike out each push with the pop behind it, and pops of nothing."""
    bits = word.replace("+", "0").replace("*", "1")
    while "-" in bits:
        bits = re.sub("[01]-", "", bits).lstrip("-")
    return "".join(reversed(bits))


#: task -> its words, and the answer to one
STRINGS = {
    "reverse-string": ("[01]*", lambda word: "".join(reversed(word))),
    "stack-manipulation": ("[01]*[-+*]*", stack_by_hand),
    "duplicate-string": ("[01]*", lambda word: word * 2),
    "odds-first": ("[01]*", lambda word: "".join(
        [word[place - 1] for rest in (1, 0) for place in range(1, len(word) + 1)
         if place % 2 == rest])),
    "bucket-sort": ("[012]*", lambda word: "".join(digit * word.count(digit) for digit in "012")),
}


def said_by_hand(name, text):
    """What is due behind the whole of a string: None if nothing is asked."""
    if name == "a^n b^n":
        return a_n_b_n_by_hand(text)
    if name.startswith("brackets"):
        broken = any(brackets_by_hand(text[:n]) == 3 for n in range(len(text)))
        return 3 if broken else brackets_by_hand(text)
    words, answer = STRINGS[name]
    word = text.rstrip("_")
    if not re.fullmatch(words, word):
        return None
    if text == word:
        return 1
    due, blanks = answer(word), len(text) - len(word)
    symbols = "012"[:len(set(words) & set("012"))]
    return 2 + (symbols.index(due[blanks - 1]) if blanks <= len(due) else len(symbols))


def strings(of, longest):
    for length in range(1, longest + 1):
        yield from map("".join, product(of.symbols, repeat=length))


def walk(of, text):
    """The answers of a task or of a machine, one after the other."""
    state, said = of.start, []
    for letter in text:
        if NOT_ASKED in said:                     # nothing is said of what comes behind
            return said + [NOT_ASKED] * (len(text) - len(said))
        state, answer = of.following(state)[list(of.symbols).index(letter)]
        said.append(answer)
    return said


@pytest.mark.parametrize("name", TASKS)
def test_a_task_answers_every_short_string_as_it_is_defined(name):
    of = task(name)
    for text in strings(of, {2: 10, 3: 7, 4: 6, 6: 5}[len(of.symbols)]):
        said, due = walk(of, text), said_by_hand(name, text)
        if NOT_ASKED not in said[:-1]:            # else nothing is said of this one either
            assert said[-1] == (NOT_ASKED if due is None else due), text


@pytest.mark.parametrize("name", TASKS)
def test_a_bounded_machine_answers_as_the_task_where_it_asks_and_asks_all_that_can_be_completed(
        name):
    of = task(name)
    bounded = of.bounded(6)
    for text in strings(of, {2: 9, 3: 7, 4: 6, 6: 5}[len(of.symbols)]):
        said, due = walk(bounded, text), walk(of, text)
        assert all(a == b for a, b in zip(said, due) if a != NOT_ASKED), text
        complete = due[-1] == (2 + len(of.symbols[:-1].strip("-+*")) if name in STRINGS else 2)
        if complete and len(text) <= 6 and NOT_ASKED not in due:
            assert said == due, text


@pytest.mark.parametrize("kinds", [1, 2])
def test_bounded_brackets_are_those_of_the_machine_of_that_depth_but_for_what_is_deeper(kinds):
    bounded, deep = task(f"brackets-{kinds}").bounded(6), machine(f"brackets-{kinds}-3")
    for text in strings(bounded, 9 if kinds == 1 else 6):
        said, answers = walk(bounded, text), walk(deep, text)
        at = said.index(NOT_ASKED) if NOT_ASKED in said else len(said)
        assert said[:at] == answers[:at] and set(answers[at:]) <= {3}, text


def test_a_machine_of_depth_4_is_right_on_what_is_no_deeper_and_wrong_from_there_on():
    endless, four = task("brackets-1"), machine("brackets-1-4")
    for text in strings(endless, 12):
        due, said, depth = walk(endless, text), walk(four, text), 0
        for place, bracket in enumerate(text):
            depth += 1 if bracket == "(" else -1
            assert said[:place] == due[:place]
            if depth < 0 or depth > 4:
                assert (due[place] != said[place]) == (depth > 4), text
                break
        else:
            assert said == due


@pytest.mark.parametrize("name", TASKS)
def test_drawn_strings_break_nothing_are_answered_right_and_half_of_them_fill_the_memory(name):
    of = task(name)
    ids, answers = of.draw(40, 15, torch.Generator().manual_seed(0))
    full = 0
    for row, due in zip(ids.tolist(), answers.tolist()):
        text = "".join(of.symbols[token - 1] for token in row)
        assert walk(of, text) == due and NOT_ASKED not in due, text
        state, sizes = of.start, []
        for token in row:
            if state is not None:
                state = of.following(state)[token - 1][0]
                assert state is not None or (name == "a^n b^n" and due[-1] == 3 and 2 in due)
            sizes.append(0 if state is None else of.size(state))
        full += max(sizes) >= 12
    assert full >= 15
    again = of.draw(40, 15, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], ids) and not torch.equal(
        of.draw(40, 15, torch.Generator().manual_seed(1))[0], ids)


@pytest.mark.parametrize("name", TASKS)
def test_tours_of_a_bounded_machine_have_every_move_that_is_asked_and_no_other(name):
    bounded = task(name).bounded(6)
    ids, answers = bounded.make_batch(4000, 8, torch.Generator().manual_seed(0), strings="touring")
    assert (answers != NOT_ASKED).all()
    assert len(bounded.moves(ids).unique()) == int((bounded.answer != NOT_ASKED).sum())


def counting(until):
    """Parity, but for one answer, that to the string of `until` letters: one state for each
    number of letters."""
    def following(state):
        parity, n = state
        odd = n + 1 == until
        return [((after, n + 1), 1 + (after != odd)) for after in (parity, not parity)]

    return Task("counting", "01", (False, 0), following, lambda state: 0)


def test_the_closure_finds_the_shortest_string_that_is_answered_wrong(monkeypatch):
    model = OpenMythos.from_pretrained(PARITY)
    found = Closure(Codes(model, "float32"), 2, counting(7)).run()
    assert found.length == 7 and found.wrong > 0 and not found.closed
    monkeypatch.setattr(closure, "MOST_CONTEXTS", 100)
    endless = Closure(Codes(model, "float32"), 2, counting(0)).run()   # right throughout
    assert endless.wrong == 0 and not endless.closed and len(endless.seen) >= 100


def test_a_proof_says_nothing_of_what_is_not_asked():
    parity, model = machine("parity"), OpenMythos.from_pretrained(PARITY)
    after = torch.cat([parity.next_state, torch.tensor([[2, 2], [3, 3]])])
    after[1, 1] = 2                                      # the second 1 of a string
    said = torch.cat([parity.answer, torch.tensor([[1, 1], [1, 1]])])
    assert certify(model, Machine("one", after, said)).wrong > 0
    said[1, 1] = NOT_ASKED
    proof = certify(model, Machine("one", after, said))
    assert proof.proved and proof.machine is None
    said[0, 0] = 2                                       # asked, and not what it answers
    assert not certify(model, Machine("one", after, said)).proved


def test_what_is_no_task_is_refused_by_name():
    with pytest.raises(ValueError, match=r"task = 'sorting': must be one of \['a\^n b\^n'"):
        task("sorting")


def test_a_ladder_row_counts_what_a_model_gets_right():
    recipe = study.variant("task brackets-1 of 4")
    assert recipe.machine == task("brackets-1").bounded(4) and recipe.steps == 1000
    with pytest.raises(NotProved) as failed:
        train(study.replace(recipe, steps=2), progress=False)

    class Oracle(torch.nn.Module):
        """Right on all that is no deeper than 9, as the machine of that depth is."""

        def forward(self, ids):
            return torch.nn.functional.one_hot(machine("brackets-1-9").answers(ids))

    assert ladder_row(failed.value)["steps"] == 2
    failed.value.run.model = Oracle()
    row = ladder_row(failed.value.run)
    assert row["states"] == 5 and row["moves"] == 7 and row["closure"]["wrong"] > 0
    assert row["lengths"]["16"] == {"strings": 64, "whole": 64, "token": 1.0, "first_wrong": None}
    deep = row["lengths"]["20"]                          # half of the strings open ten
    assert 10 < deep["whole"] < 40 and deep["first_wrong"] == 9
    assert row["lengths"]["64"]["first_wrong"] == 9


def test_held_out_strings_are_not_wrong_where_nothing_is_asked():
    """Uniform strings of 16 brackets often close one that was never opened, or go deeper than 2:
    broken, or not asked about."""
    class Oracle(OpenMythos):
        def forward(self, ids, n_loops=None):
            return torch.nn.functional.one_hot(machine(f"brackets-1-{self.depth}").answers(ids))

    recipe = study.variant("task brackets-1 of 4")
    model = Oracle(recipe.config)
    model.depth = 9                              # more than is asked about
    assert held_out(model, recipe) == 1
    model.depth = 1
    assert 0 < held_out(model, recipe) < 0.8


def test_what_is_not_proved_goes_to_another_process_as_words():
    failed = pickle.loads(pickle.dumps(NotProved("not proved", run=lambda: None)))
    assert isinstance(failed, NotProved) and str(failed) == "not proved" and failed.run is None
