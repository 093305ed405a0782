"""The workflows run what is run here: make targets, and commands that CONTRIBUTING.md has."""
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def documented(command):
    """A make target that is there, with variables or without; or a line of CONTRIBUTING.md."""
    if made := re.fullmatch(r"make ([\w-]+)(?: [A-Z]+=\S+)*", command):
        return bool(re.search(rf"^{made[1]}:", MAKEFILE, re.M))
    return command in COMMANDS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_a_make_target_or_a_documented_command(path):
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    assert [step["run"] for step in steps if "run" in step and not documented(step["run"])] == []


def test_a_step_that_is_neither_is_seen():
    assert documented("make test")
    for command in ("make tests", "make test; rm -rf .", "pip install torch"):
        assert not documented(command)


def test_the_matrix_is_every_system_and_every_python():
    matrix = jobs(ROOT / ".github" / "workflows" / "tests.yml")["newest"]["strategy"]["matrix"]
    assert matrix == {"os": ["ubuntu-latest", "macos-latest", "windows-latest"],
                      "python": ["3.10", "3.11", "3.12", "3.13", "3.14"]}


def test_the_gate_runs_what_the_pinned_job_runs():
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for step in jobs(ROOT / ".github" / "workflows" / "tests.yml")["exact"]["steps"]:
        assert step.get("run", "make test") in gate
    assert "make tutorial" in gate
