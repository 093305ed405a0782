"""The gate has teeth: each check of test_notebooks.py and of gate.py is shown a fault in a copy,
and has to find it."""
import json
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import partial

import matplotlib.pyplot as plt
import nbformat
import pytest
import test_notebooks as checks
from gate import arithmetic, differences, stale
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_notebooks import NAMES, ROOT, code, load

RUN = checks.test_every_code_cell_was_run_in_order_without_error
FORM = checks.test_form
LITERALS = checks.test_parameters_are_literals
CLAIMS = checks.test_claims_are_asserted_and_passed
FIGURES = checks.test_every_figure_has_its_numbers_and_is_shown
MADE = checks.test_every_committed_figure_is_made_by_a_notebook_the_script_beside_it_or_the_bench
MACHINE = checks.test_no_machine_in_the_outputs
EXERCISES = checks.test_exercises_have_minutes_difficulty_a_test_and_a_folded_solution
FOLDED = checks.test_what_draws_or_tests_is_folded
TRIED = checks.test_a_reader_tries_something_and_commits_to_an_answer_first
PLACE = checks.test_exercises_can_be_done_where_they_stand


def first(notebook, tag):
    return code(notebook, tag)[0]


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def swap_counts(notebook):
    a, b = code(notebook)[2:4]
    a.execution_count, b.execution_count = b.execution_count, a.execution_count


def add_an_empty_cell(notebook):
    notebook.cells.append(new_code_cell(" ", execution_count=len(code(notebook)) + 1))


def change(tag, **parts):
    """A plant: of the first cell with a tag, other parts."""
    return lambda notebook: first(notebook, tag).update(parts)


change_claims = partial(change, "claims")


def add_output(output):
    """A plant: a cell that makes no claim has one more output."""
    return lambda notebook: code(notebook)[3].outputs.append(output)


def compare_no_claim(notebook):
    first(notebook, "claims").metadata.update(tags=["claims"])


def reword(old, new):
    """A plant: other words in the prose."""
    def plant(notebook):
        cell = next(c for c in notebook.cells if c.cell_type == "markdown" and old in c.source)
        cell.source = cell.source.replace(old, new)
    return plant


def rewrite(old, new):
    """A plant: of the first exercise's stub, other words."""
    return lambda notebook: first(notebook, "exercise").update(
        source=first(notebook, "exercise").source.replace(old, new))


def move_up(tag):
    """A plant: the first cell with a tag stands with the one before it at the notebook's head."""
    def plant(notebook):
        at = notebook.cells.index(first(notebook, tag))
        notebook.cells[:] = (notebook.cells[at - 1:at + 1] + notebook.cells[:at - 1]
                             + notebook.cells[at + 1:])
    return plant


def rename_a_figure(notebook):
    cell = next(c for c in code(notebook) if "figures.save(" in c.source)
    cell.source = re.sub(r'(figures\.save\(\w+, )"\w+"', r'\1"of_no_file"', cell.source)


def clear_pictures(notebook):
    for cell in code(notebook):
        cell.outputs = [o for o in cell.outputs if "image/png" not in o.get("data", {})]


CALL, FOLD = "\ntest_mla_parameters(mla_parameters)\n", "<details><summary>Solution</summary>"
CALLED = "# test_mla_parameters(mla_parameters)"
ERROR = new_output("error", ename="ValueError", evalue="", traceback=[])
#: What is wrong with a notebook: the check that has to find it, and a function that plants it.
FAULTS = {
    "a cell was not executed": (RUN, lambda n: code(n)[3].update(execution_count=None, outputs=[])),
    "two cells ran in another order": (RUN, swap_counts),
    "a cell was executed twice": (RUN, lambda n: code(n)[-1].update(execution_count=99)),
    "an empty cell": (RUN, add_an_empty_cell),
    "an error among the outputs": (RUN, add_output(ERROR)),
    "a warning among the outputs": (RUN, add_output(stream("UserWarning", "stderr"))),
    "no parameters cell": (FORM, lambda n: n.cells.remove(first(n, "parameters"))),
    "two parameters cells": (FORM, lambda n: n.cells.append(first(n, "parameters"))),
    "no word of what would falsify it": (FORM, reword("What would falsify this", "Outlook")),
    "a computed parameter": (LITERALS, change("parameters", source="loops = list(range(4))")),
    "no claims": (CLAIMS, lambda n: [c.metadata.update(tags=[]) for c in code(n, "claims")]),
    "a claim without an assert": (CLAIMS, change_claims(source='print("PASS  all is well")')),
    "an assert on nothing measured": (CLAIMS, change_claims(source='assert 1 < 2\nprint("PASS")')),
    "a claim that did not hold": (CLAIMS, change_claims(outputs=[stream("FAIL  all is lost\n")])),
    "a claim that said nothing": (CLAIMS, change_claims(outputs=[])),
    "a claim that nbval does not compare": (CLAIMS, compare_no_claim),
    "a claim outside of the claims": (CLAIMS, add_output(stream("PASS  by the way\n"))),
    "a figure without files": (FIGURES, rename_a_figure),
    "figures that are not shown": (FIGURES, clear_pictures),
    "claims that are not folded": (FOLDED, change_claims(metadata={"tags": ["claims"]})),
    "nothing to try": (TRIED, lambda n: [c.update(source=c.source.replace("figures.explore(", "("))
                                         for c in code(n)]),
    "no answer to commit to": (TRIED, reword("**Commit first.**", "Guess.")),
    "a path of somebody's machine": (MACHINE, add_output(stream("/home/me/x"))),
    "an exercise without minutes": (EXERCISES, reword("about 10 minutes", "soon done")),
    "an exercise without a stub": (EXERCISES, lambda n: n.cells.remove(first(n, "exercise"))),
    "an exercise without a test": (EXERCISES, rewrite("assert mla_parameters", "mla_parameters")),
    "no call to uncomment": (EXERCISES, rewrite(CALLED, "")),
    "a test that nobody calls": (EXERCISES, reword(CALL, "\n")),
    "a solution that is not folded": (EXERCISES, reword(FOLD, "Solution")),
    "an exercise before what it needs": (PLACE, move_up("exercise")),
    "an exercise with a name that is taken": (PLACE, rewrite("mla_parameters", "count")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    check, plant = FAULTS[fault]
    sound = load(NAMES[0])
    planted = deepcopy(sound)
    check(sound)
    plant(planted)
    with pytest.raises((AssertionError, ValueError, FileNotFoundError)):
        check(planted)


def no_json(folder):
    (folder / "variants.json").unlink()


def no_picture(folder):
    (folder / "variants.png").unlink()


def of_no_notebook(folder):
    (folder / "old.png").write_bytes(b"")


@pytest.mark.parametrize(("check", "plant"), [(lambda: FIGURES(load(NAMES[0])), no_json),
                                              (lambda: FIGURES(load(NAMES[0])), no_picture),
                                              (MADE, of_no_notebook)])
def test_a_figure_that_lacks_something_is_found(check, plant, tmp_path, monkeypatch):
    for folder in ("notebooks", "figures"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    check()
    plant(tmp_path / "figures")
    with pytest.raises((AssertionError, FileNotFoundError)):
        check()


A = {"alt": "two runs, 64 bits", "loops": 7, "accuracy": 0.5, "curve": [0.1, 0.2, 0.9],
     "by name": {"a": [[1, 2], [3, 4]]}, "label": ["x", None], "train_seconds": [40.0]}


@pytest.mark.parametrize(("change", "same"), [({}, True), ({"accuracy": 0.505}, True),
                                              ({"curve": [0.1, 0.201, 0.9]}, True),
                                              ({"train_seconds": [99.0]}, True),
                                              ({"accuracy": 0.52}, False), ({"loops": 8}, False),
                                              ({"loops": 7.0}, False),
                                              ({"curve": [0.1, 0.2, 0.8]}, False),
                                              ({"curve": [0.1, 0.2]}, False),
                                              ({"curve": [0.9, 0.2, 0.1]}, False),
                                              ({"curve": [0.1, 0.2, float("nan")]}, False),
                                              ({"by name": {"a": [[1, 2], [3, 5]]}}, False),
                                              ({"by name": {"b": [[1, 2], [3, 4]]}}, False),
                                              ({"label": ["y", None]}, False),
                                              ({"alt": "lines"}, False), ({"more": 1}, False)])
def test_numbers_of_two_runs_are_compared_as_numbers(change, same):
    assert (differences(A, {**A, **change}) == []) is same


@pytest.mark.parametrize(("change", "same"), [({"accuracy": 0.9}, True), ({"accuracy": None}, True),
                                              ({"curve": [0.9, 0.2, 0.1]}, True),
                                              ({"loops": 8}, True),
                                              ({"alt": "two runs, 1,024 bits"}, True),
                                              ({"curve": [0.1, 0.2]}, False),
                                              ({"curve": [0.1, 0.2, "z"]}, False),
                                              ({"label": ["y", None]}, False),
                                              ({"accuracy": [0.9]}, False),
                                              ({"alt": "three runs, 64 bits"}, False),
                                              ({"another": 1}, False)])
def test_elsewhere_numbers_may_differ_but_not_names_shapes_and_words(change, same):
    assert (differences(A, {**A, **change}, here=False) == []) is same


def test_a_stale_picture_is_found(tmp_path):
    def draw(folder, colour="black", points=(1, 2, 3)):
        (tmp_path / folder).mkdir()
        fig, ax = plt.subplots()
        ax.plot(points, color=colour)
        fig.savefig(tmp_path / folder / "x.png")
        content = json.dumps({"alt": "", "points": [1, 2, 3]})
        (tmp_path / folder / "x.json").write_text(content, encoding="utf-8")
        plt.close(fig)
        return tmp_path / folder
    committed = draw("committed")
    assert stale("x", committed, draw("again")) == []
    assert "x.png" in stale("x", committed, draw("another curve", points=(3, 1, 2)))[0]
    assert "x.png" in stale("x", committed, draw("another colour", colour="dimgrey"))[0]
    assert "x.png" in stale("x", committed, draw("wider", points=range(9)))[0]
    assert stale("x", committed, tmp_path / "wider", here=False) == []
    assert stale("y", committed, committed) == ["y: not made"]


SAVE = """import json, os
import matplotlib.pyplot as plt
class figures:
    def save(fig, name, points):
        fig.savefig(f"{os.environ['MYTHOS_FIGURES']}/{name}.png")
        json.dump({"points": points}, open(f"{os.environ['MYTHOS_FIGURES']}/{name}.json", "w"))"""
DRAW = """fig = plt.figure()
fig.add_subplot().plot([1, 2, {n}])
figures.save(fig, "{name}", [1, 2, {n}])
plt.close(fig)"""
TASK = """### Exercise {n} · {task}

<details><summary>Solution</summary>

```python
def {name}(x):
    return {answer}

test_{name}({name})
```
</details>
"""
STUB = "def test_{name}({name}):\n    assert {name}(2) == 4"


@pytest.mark.parametrize("here", [True, False])
def test_a_run_that_differs_from_what_was_committed_fails_the_gate(tmp_path, here):
    """nbval, the exercises and the figures over a notebook of which some is as it was, some not."""
    claims = [new_code_cell(f'assert offset < 9\nprint("PASS ", {n} + offset)',
                            metadata={"tags": ["claims", "nbval-check-output"]}, execution_count=1,
                            outputs=[new_output("stream", name="stdout", text=f"PASS  {n}\n")])
              for n in (1, 2)]
    tasks = [part for n, (task, name, answer) in enumerate(
                [("Double.", "double", "2 * x"), ("Add.", "add", "x + 1"),
                 ("About a minute is training.", "train", "x + 2")], 1)
             for part in (new_markdown_cell(TASK.format(n=n, task=task, name=name, answer=answer)),
                          new_code_cell(STUB.format(name=name), execution_count=1,
                                        metadata={"tags": ["exercise"]}))]
    as_it_was = DRAW.format(name="as_it_was", n=3)
    cells = [SAVE, "offset = 0", as_it_was, DRAW.format(name="changed", n=9),
             claims[0], "offset = 1", *tasks, claims[1]]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "figures").mkdir()
    of = arithmetic() if here else "another processor"
    (tmp_path / "figures" / "arithmetic.txt").write_text(of, encoding="utf-8")
    cells = [cell if isinstance(cell, dict) else new_code_cell(cell, execution_count=1)
             for cell in cells]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "x.ipynb")
    before = "\n".join([SAVE, as_it_was, DRAW.format(name="changed", n=3)])
    committed = subprocess.run([sys.executable, "-c", before],
                               env={**os.environ, "MYTHOS_FIGURES": str(tmp_path / "figures"),
                                    "MPLBACKEND": "agg"}, check=False)
    assert committed.returncode == 0
    said = subprocess.run([sys.executable, "-m", "pytest", "notebooks", "-rA", "--nbval-lax",
                           "--nbval-current-env", "-p", "gate", "-p", "no:cacheprovider", "-m",
                           "not training"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
                          capture_output=True, text=True).stdout
    outcomes = dict(reversed(line.split(" - ")[0].split(" ", 1))
                    for line in re.findall(r"^((?:PASSED|FAILED) .*)$", said, re.M))
    outcomes = {name.partition("::")[2]: outcome for name, outcome in outcomes.items()}
    assert outcomes == {**{f"Cell {n}": "PASSED" for n in range(9)}, "Cell 9": "FAILED",
                        "exercise 1": "PASSED", "exercise 2": "FAILED",
                        "figures as committed": "FAILED" if here else "PASSED"}, said
    assert (("changed/points: off by" in said) is ("changed.png" in said) is here
            and ("numbers are not compared" in said) is not here)
    assert "as_it_was" not in said and "1 deselected" in said
