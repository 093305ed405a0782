"""Real notebooks, executed by papermill in real kernels."""
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mythos_core.batch import count_claims, main, parse_grid


def write(path, *cells):
    made = [new_markdown_cell("# a notebook")]
    for source, *tags in cells:
        made.append(new_code_cell(source, metadata={"tags": list(tags)}))
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), path)
    return str(path)


@pytest.fixture
def good(tmp_path):
    claims = "assert seed < 2\nprint('PASS  seed', seed)\nprint('PASS  name', name)"
    return write(tmp_path / "good.ipynb", ("seed = 0\nname = 'a'", "parameters"), (claims, "claims"))


def test_parse_grid():
    assert parse_grid([]) == [{}]
    assert parse_grid(["seed=0,1", "name=a,None", "x=0.5"]) == [
        {"seed": s, "name": n, "x": 0.5} for s in (0, 1) for n in ("a", None)]
    for bad in ("seed", "seed=", "=1", "seed=1,,2", "a b=1"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            parse_grid([bad])


def test_a_grid_runs_and_one_failure_stops_none_of_the_others(tmp_path, good, capsys):
    assert main([good, "--grid", "seed=0,1,2", "--workers", "2", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "2 passed, 1 failed" in printed and "FAILED: AssertionError" in printed
    for seed, claims in ((0, 2), (1, 2), (2, 0)):
        copy = tmp_path / "out" / f"good-seed={seed}.ipynb"
        assert count_claims(copy) == claims
        assert f"seed = {seed}" in "".join(cell.source for cell in nbformat.read(copy, 4).cells)
    error = nbformat.read(tmp_path / "out" / "good-seed=2.ipynb", 4).cells[-1].outputs[-1]
    assert error.output_type == "error" and error.ename == "AssertionError"


@pytest.mark.parametrize("arguments, named", [
    (["--grid", "sed=1"], "--grid sed: not a parameter of good.ipynb, which has ['name', 'seed']"), (["--workers", "0"], "--workers 0"),
    (["--publish", "--grid", "seed=1"], "--publish takes no --grid"), (["missing.ipynb"], "missing.ipynb: no such file")])
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, good, capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main([good, *arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_publish_puts_the_executed_notebook_in_place(tmp_path, good):
    assert main([good, "--publish", "--out", str(tmp_path / "out")]) == 0
    notebook = nbformat.read(good, 4)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2]
    assert notebook.cells[-1].outputs[0].text == "PASS  seed 0\nPASS  name a\n"
    assert not any("papermill" in part.metadata for part in [notebook, *notebook.cells])


def test_publish_leaves_notebooks_alone_when_one_fails(tmp_path, good):
    bad = write(tmp_path / "bad.ipynb", ("1 / 0",))
    before = Path(good).read_text()
    assert main([good, bad, "--publish", "--out", str(tmp_path / "out")]) == 1
    assert Path(good).read_text() == before
