"""What nbval lets through: cells that were never run, claims that claim nothing, figures without
numbers.

nbval (run beside this by `make test`) executes every notebook and compares the cells tagged
nbval-check-output; gate.py adds the exercises' solutions and the figures of that run. test_gate.py
shows each check a fault.
"""
import ast
import builtins
import json
import re
import statistics
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from gate import exercises, figures_of, names_saved
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

ROOT = Path(__file__).parents[2]
NAMES = ["01_model_sizes", "02_kv_cache", "03_spectral_stability", "04_training",
         "05_depth_extrapolation", "06_act_halting", "07_moe_utilization", "08_generation",
         "09_state_tracking", "10_text"]
# by `make bench`, `make gpu`: test_readme.py has them
BENCH = {"bench", "bench_doubling", "bench_peers", "bench_scaling", "bench_schedules",
         "bench_states", "gpu"}
REPOSITORY = re.search(r'Repository = "(.*?)"',
                       (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)


def load(name):
    loaded = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    loaded.name = name
    return loaded


@pytest.fixture(params=NAMES)
def notebook(request):
    return load(request.param)


def code(notebook, tag=None):
    return [c for c in notebook.cells if c.cell_type == "code"
            and (tag is None or tag in c.metadata.get("tags", []))]


def prose(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def test_the_sequence_is_whole():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


def test_every_code_cell_was_run_in_order_without_error(notebook):
    cells = code(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert all(c.source.strip() for c in cells)
    kinds = {(o.output_type, o.get("name")) for c in cells for o in c.outputs}
    assert not any(kind == "error" or name == "stderr" for kind, name in kinds)


def test_form(notebook):
    text = prose(notebook)
    for part in ("**Question", "**Answer", "What you will learn", "Run time",
                 "What would falsify this", "What was not run", "References"):
        assert part in text, part
    assert text.startswith(f"# {notebook.name[:2]}")
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"{colab}/blob/main/notebooks/{notebook.name}.ipynb" in text
    assert len(code(notebook, "parameters")) == 1
    (setup,) = code(notebook, "setup")
    assert f"git+{REPOSITORY}" in setup.source and not setup.outputs


def test_a_notebook_alone_says_what_to_install(notebook, monkeypatch):
    """In a folder without the package, before its first import from it; and nothing where it is."""
    (setup,) = code(notebook, "setup")
    plain = TransformerManager().transform_cell(setup.source)
    exec(plain, {})
    monkeypatch.setitem(sys.modules, "mythos_core", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"pip install git+{REPOSITORY}")):
        exec(plain, {})
    assert setup.source == code(load(NAMES[0]), "setup")[0].source


def test_no_cell_of_prose_is_long(notebook):
    words = {cell.id: len(cell.source.split()) for cell in notebook.cells
             if cell.cell_type == "markdown"}
    assert {name: n for name, n in words.items() if n > 200} == {}


def test_parameters_are_literals(notebook):
    for node in ast.parse(code(notebook, "parameters")[0].source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)


def test_claims_are_asserted_and_passed(notebook):
    cells = code(notebook, "claims")
    assert cells
    for cell in cells:
        tree = ast.parse(cell.source)
        asserts = [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]
        assert asserts and "nbval-check-output" in cell.metadata.tags
        assert all(any(isinstance(n, (ast.Name, ast.Attribute)) for n in ast.walk(a.test))
                   for a in asserts), "an assert on nothing measured"
        passed = "".join(o.get("text", "") for o in cell.outputs).splitlines()
        assert len(passed) >= 1 and all(line.startswith("PASS") for line in passed)
    assert not any("PASS" in o.get("text", "") for c in code(notebook) if c not in cells
                   for o in c.outputs), "a claim that nothing compares"


def test_exercises_have_minutes_difficulty_a_test_and_a_folded_solution(notebook):
    whole = exercises(notebook)
    headings = re.findall(r"^### Exercise (\d+) · ", prose(notebook), re.M)
    assert headings == [str(n) for n in range(1, len(whole) + 1)] and len(whole) >= 2
    assert len(code(notebook, "exercise")) == len(whole)
    for exercise in whole:
        assert (re.search(r"\d+ minutes", exercise.task)
                and re.search(r"\*(Easy|Medium|Hard)", exercise.task))
        test, stub = ast.parse(exercise.stub).body
        assert test.name == f"test_{stub.name}"
        assert any(isinstance(node, ast.Assert) for node in ast.walk(test))
        assert f"\n# {test.name}({stub.name})" in exercise.stub, "no call to uncomment"
        assert exercise.solution.endswith(f"\n{test.name}({stub.name})"), "a test nobody calls"


def names(source, kind):
    """Names that code binds anywhere, of functions, classes, arguments and imports too; or those
    that it reads."""
    nodes = list(ast.walk(ast.parse(re.sub(r"^(\s*)%.*", r"\1pass", source, flags=re.M))))
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
    if kind is ast.Store:
        found |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        found |= {(node.asname or node.name).partition(".")[0] for node in nodes
                  if isinstance(node, ast.alias)}
    return found


def test_exercises_can_be_done_where_they_stand(notebook):
    """They need what is above them alone, and nothing else has a name of theirs."""
    cells = code(notebook)
    whole = {exercise.stub: exercise for exercise in exercises(notebook)}
    for at, cell in enumerate(cells):
        if cell.source in whole:
            needed = f"{cell.source}\n{whole[cell.source].solution}"
            known = {*dir(builtins), *names(needed, ast.Store)}.union(
                *(names(c.source, ast.Store) for c in cells[:at]))
            own = {node.name for node in ast.parse(cell.source).body}
            assert names(needed, ast.Load) <= known
            assert not own & set().union(*(names(c.source, ast.Store) for c in cells
                                           if c is not cell))


@pytest.mark.parametrize("number", range(1, len(NAMES) + 1))
def test_the_strip_says_where_we_are(number):
    strip = load(NAMES[number - 1]).cells[0].source.split("\n\n")[1]
    assert strip.startswith(f"**Where we are.** {number} of {len(NAMES)} · ")
    neighbours = {"before": number - 2 if number > 1 else None,
                  "next": number if number < len(NAMES) else None}
    assert (dict(re.findall(r"(before|next): \[.*?\]\((\w+)\.ipynb\)", strip))
            == {k: NAMES[i] for k, i in neighbours.items() if i is not None})


def test_every_figure_has_its_numbers_and_is_shown(notebook):
    names = figures_of(notebook)
    assert names
    for name in names:
        assert (ROOT / "figures" / f"{name}.png").stat().st_size > 5000
        assert len(json.loads((ROOT / "figures" / f"{name}.json").read_text(encoding="utf-8"))) > 1
    assert (sum("image/png" in o.get("data", {}) for c in code(notebook) for o in c.outputs)
            >= len(names))


def test_every_committed_figure_is_made_by_a_notebook_the_script_beside_it_or_the_bench():
    made = [name for n in NAMES for name in figures_of(load(n))]
    made += [name for script in (ROOT / "figures").glob("*.py")
             for name in names_saved(script.read_text(encoding="utf-8"))]
    assert len(made) == len(set(made))
    assert ({path.stem for path in (ROOT / "figures").iterdir() if path.is_file()
             and path.name != "arithmetic.txt"} == set(made) | BENCH)
    assert "overview" in made


def test_the_film_is_small_and_ends_as_the_figure_does():
    folder = ROOT / "figures"
    right = np.array(json.loads((folder / "travelling_answer.json").read_text(encoding="utf-8"))[
        "right"])
    assert (folder / "travelling_answer.gif").stat().st_size < 2 ** 20
    with Image.open(folder / "travelling_answer.gif") as film, Image.open(folder
        / "travelling_answer.png") as last:
        assert film.n_frames == len(right)
        film.seek(film.n_frames - 1)
        pictures = [np.asarray(picture.convert("L").resize((150, 90))).astype(float)
                    for picture in (film, last)]
    assert np.abs(np.subtract(*pictures)).mean() < 8


def test_what_draws_or_tests_is_folded(notebook):
    """A reader first sees what a cell shows; the site folds the tag, JupyterLab the other."""
    for cell in code(notebook):
        folded = "hide-input" in cell.metadata.get("tags", [])
        assert folded == cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert folded or not ("figures.save(" in cell.source or cell in code(notebook, "claims")
                              or cell in code(notebook, "setup"))


def test_a_reader_tries_something_and_commits_to_an_answer_first(notebook):
    assert sum("figures.explore(" in cell.source for cell in code(notebook)) == 1
    asked = re.findall(r"^\*\*Commit first\.\*\* .*\?.*\n\n<details><summary>Answer</summary>\n\n"
                       r"[^<]+\n\n</details>$", prose(notebook), re.M)
    assert len(asked) == 1


def test_cells_are_small_and_explained(notebook):
    sizes = [len([line for line in c.source.splitlines() if line.strip()]) for c in code(notebook)
             if "exercise" not in c.metadata.get("tags", [])]
    assert statistics.median(sizes) <= 8
    assert len(prose(notebook).split()) >= 3 * sum(sizes)


def test_no_machine_in_the_outputs(notebook):
    text = json.dumps(notebook.cells)
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert not any("papermill" in part.metadata for part in [notebook, *notebook.cells])
