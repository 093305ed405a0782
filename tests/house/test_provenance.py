"""The commit that results are said to come from."""
import re
import shutil
import subprocess

import pytest

from mythos_core import provenance


@pytest.fixture
def elsewhere(tmp_path):
    """A repository of somebody else's with this package in its environment, not tracked."""
    package = tmp_path / ".venv" / "mythos_core"
    package.mkdir(parents=True)
    shutil.copy(provenance.__file__, package)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "somebody's")
    return package


def git(folder, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True,
                          encoding="utf-8").stdout.strip()


def test_the_commit_of_a_repository_that_has_this_package_under_its_control(elsewhere):
    git(elsewhere, "add", ".")
    git(elsewhere, "commit", "--quiet", "--message", "with the package")
    assert provenance.commit(elsewhere) == git(elsewhere, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit(elsewhere))


def test_another_repository_s_commit_is_not_ours(elsewhere):
    assert provenance.commit(elsewhere) is None


def test_outside_a_repository_there_is_none(elsewhere):
    shutil.rmtree(elsewhere.parent.parent / ".git")
    assert provenance.commit(elsewhere) is None


def test_without_git_there_is_none(elsewhere, monkeypatch):
    git(elsewhere, "add", ".")
    monkeypatch.setenv("PATH", str(elsewhere))
    assert provenance.commit(elsewhere) is None
