"""The runs under other arithmetics: that they are others, and that no failure is lost."""
import json
import re

import arithmetics
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_notebooks import ROOT


@pytest.fixture
def untrained(monkeypatch):
    """Weights as if only ATEN_CPU_CAPABILITY acted."""
    monkeypatch.setattr(arithmetics, "checksum", lambda s: s.get("ATEN_CPU_CAPABILITY", "here"))


def table(capsys):
    out = capsys.readouterr().out
    rows = re.findall(r"^([\w-]+) +\S+ +(?:yes|no)? +(.*?)(?: in \d+ s)?$", out, re.M)
    return {name: result for name, result in rows if name in arithmetics.SETTINGS}


def test_the_settings():
    settings = arithmetics.SETTINGS
    assert next(iter(settings)) == "native" and not settings["native"]
    assert len({json.dumps(setting) for setting in settings.values()}) == len(settings)
    assert all(file.exists() for file in arithmetics.FILES)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (only,) = re.findall(r"test-arithmetics ONLY=(\S+)", script)
    assert settings[only]
    (names,) = re.findall(r"notebooks/\{(.*)\}\.ipynb", script)
    assert set(names.split(",")) < set(arithmetics.NOTEBOOKS)


def test_only_the_setting_s_own_variables_are_set(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")                 # as somebody's shell has it
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = arithmetics.environment({"ATEN_CPU_CAPABILITY": "default"})
    assert "MKL_CBWR" not in found and found["ATEN_CPU_CAPABILITY"] == "default"
    assert found["OMP_NUM_THREADS"] == "1" and "PATH" in found


def test_each_arithmetic_runs_once_and_one_failure_fails_all(untrained, monkeypatch, capsys):
    monkeypatch.setattr(arithmetics, "run", lambda s, *others: "ATEN_CPU_CAPABILITY" not in s)
    assert arithmetics.main([]) == 1
    found = table(capsys)
    assert list(found) == list(arithmetics.SETTINGS) and found["native"] == "passed"
    assert found["aten-default"] == found["aten-avx2"] == "FAILED"
    assert found["all-oldest"] == "skipped: as aten-default"
    assert found["mkl-avx2"] == "skipped: as native"
    assert arithmetics.main(["--only", "mkl-avx2"]) == 0
    assert table(capsys) == {"native": "not asked for", "mkl-avx2": "skipped: as native"}
    assert arithmetics.main(["--only", "native"]) == 0
    assert table(capsys) == {"native": "passed"}


def test_a_notebook_that_fails_under_another_arithmetic(untrained, tmp_path, capsys):
    notebook, seen = tmp_path / "planted.ipynb", tmp_path / "seen"
    tell = f'import os\nopen({str(seen)!r}, "w").write(os.environ["ATEN_CPU_CAPABILITY"])'
    cells = [new_code_cell(tell), new_code_cell("assert False")]
    nbformat.write(new_notebook(cells=cells), notebook)
    assert arithmetics.main(["--only", "aten-default", "--workers", "0", str(notebook)]) == 1
    assert table(capsys)["aten-default"] == "FAILED"
    assert seen.read_text(encoding="utf-8") == "default"


def test_an_unknown_setting_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        arithmetics.main(["--only", "abacus"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--only abacus" in line and "aten-default" in line
