"""What nbval lets through: cells that were never run, claims that claim nothing, figures without numbers.

nbval (run beside this by `make test`) executes every notebook and compares the cells tagged nbval-check-output.
"""
import ast
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["01_model_sizes", "02_kv_cache", "03_spectral_stability", "04_training", "05_depth_extrapolation", "06_act_halting",
         "07_moe_utilization", "08_generation"]
BENCH = {"bench", "bench_scaling"}      # by `make bench`: test_readme.py has them
REPOSITORY = re.search(r'Repository = "(.*?)"', (ROOT / "pyproject.toml").read_text()).group(1)


@pytest.fixture(params=NAMES)
def notebook(request):
    loaded = nbformat.read(ROOT / "notebooks" / f"{request.param}.ipynb", 4)
    loaded.name = request.param
    return loaded


def code(notebook, tag=None):
    return [c for c in notebook.cells if c.cell_type == "code" and (tag is None or tag in c.metadata.get("tags", []))]


def prose(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def saved_figures(notebook):
    return re.findall(r'figures\.save\(\s*\w+,\s*"(\w+)"', "\n".join(c.source for c in code(notebook)))


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
    for part in ("**Question", "**Answer", "What you will learn", "Run time", "What would falsify this", "What was not run",
                 "Exercises", "<details>", "References"):
        assert part in text, part
    assert text.startswith(f"# {notebook.name[:2]}")
    assert f"{REPOSITORY.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/notebooks/{notebook.name}.ipynb" in text
    assert len(code(notebook, "parameters")) == 1
    (setup,) = code(notebook, "setup")
    assert f"git+{REPOSITORY}" in setup.source and not setup.outputs


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
        assert all(any(isinstance(n, (ast.Name, ast.Attribute)) for n in ast.walk(a.test)) for a in asserts), "an assert on nothing measured"
        passed = "".join(o.get("text", "") for o in cell.outputs).splitlines()
        assert len(passed) >= 1 and all(line.startswith("PASS") for line in passed)


def test_every_figure_has_its_numbers_and_is_shown(notebook):
    names = saved_figures(notebook)
    assert names
    for name in names:
        assert (ROOT / "figures" / f"{name}.png").stat().st_size > 5000
        assert len(json.loads((ROOT / "figures" / f"{name}.json").read_text())) > 1
    assert sum("image/png" in o.get("data", {}) for c in code(notebook) for o in c.outputs) >= len(names)


def test_every_committed_figure_is_made_by_a_notebook_or_the_bench():
    made = [name for n in NAMES for name in saved_figures(nbformat.read(ROOT / "notebooks" / f"{n}.ipynb", 4))]
    assert len(made) == len(set(made))
    assert {path.stem for path in (ROOT / "figures").iterdir()} == set(made) | BENCH
    assert "overview" in made


def test_cells_are_small_and_explained(notebook):
    sizes = [len([line for line in c.source.splitlines() if line.strip()]) for c in code(notebook)]
    assert statistics.median(sizes) <= 8
    assert len(prose(notebook).split()) >= 3 * sum(sizes)


def test_no_machine_in_the_outputs(notebook):
    text = json.dumps(notebook.cells)
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert not any("papermill" in part.metadata for part in [notebook, *notebook.cells])
