"""A training's folder is its own while it runs, and without another run's files."""
import subprocess
import sys
from dataclasses import replace

import pytest

from mythos_core.__main__ import main
from mythos_core.training import train, train_together, trainer
from mythos_core.training.folder import FILES, claimed
from mythos_core.training.recipes import get_recipe

SHORT = replace(get_recipe("parity-carrying"), steps=2, batch=8)


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(trainer, "take_step", lambda *args: pytest.fail("a step was taken"))
    monkeypatch.setattr("mythos_core.training.command.pace",
                        lambda *args: pytest.fail("a step was timed"))


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old", encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_another_run_s_file_is_in_the_way_and_stays(tmp_path, no_step, name):
    put(tmp_path, name)
    with pytest.raises(ValueError, match=f"has {name} of another run: must be another folder, or"):
        train(SHORT, progress=False, out=tmp_path)
    if name != "checkpoint.pt":
        with pytest.raises(ValueError, match="and no checkpoint to resume"):
            train(SHORT, progress=False, out=tmp_path, resume=True)
    assert (tmp_path / name).read_text(encoding="utf-8") == "old"
    assert not (tmp_path / "training.lock").exists()


def test_overwriting_removes_what_trainings_write_and_nothing_else(tmp_path):
    put(tmp_path, *FILES, "mine.json", "bfloat16/mine.json", "README.md")
    train(SHORT, progress=False, out=tmp_path, overwrite=True)
    left = {file for file in tmp_path.rglob("*") if file.is_file()
            and file.read_text(encoding="latin-1") == "old"}
    assert left == {tmp_path / "mine.json", tmp_path / "bfloat16" / "mine.json",
                    tmp_path / "README.md"}
    assert not (tmp_path / "certificate.json").exists()
    with pytest.raises(ValueError, match="overwrite = True: must be False where resume is True"):
        train(SHORT, progress=False, out=tmp_path, overwrite=True, resume=True)


def test_one_seed_s_older_run_stops_all_before_any_is_begun(tmp_path):
    put(tmp_path, "seed-1/model.safetensors")
    recipe = replace(get_recipe("parity-extrapolating"), steps=2)
    with pytest.raises(ValueError, match=r"seed-1'?: has model\.safetensors of another run"):
        train_together(recipe, [0, 1], progress=False, out=tmp_path)
    assert not (tmp_path / "seed-0").exists()
    train_together(recipe, [0, 1], progress=False, out=tmp_path, overwrite=True)
    assert (tmp_path / "seed-0" / "checkpoint.pt").exists()
    assert not (tmp_path / "seed-1" / "model.safetensors").exists()          # not proved


@pytest.mark.parametrize("options", [["--seed", "0"], ["--seed", "0:2"]])
def test_the_command_looks_at_its_folder_first(tmp_path, no_step, capsys, options):
    put(tmp_path, "history.json", "seed-0/history.json")
    for out, said in ((str(tmp_path), "has history.json of another run"),
                      ("", "out = '': must be a folder")):
        with pytest.raises(SystemExit) as ended:
            main(["train", "--machine", "parity", "--out", out, *options])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_no_folder_is_refused_and_none_is_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = get_recipe("parity-extrapolating")
    for training in (lambda out: train(SHORT, progress=False, out=out),
                     lambda out: train_together(recipe, [0, 1], progress=False, out=out)):
        with pytest.raises(ValueError, match="out = '': must be a folder"):
            training("")
    train(SHORT, progress=False, out=None)
    assert not list(tmp_path.iterdir())


HOLD = """import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_process_s_until_it_ends_however_it_does(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "training.lock"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"held"
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OSError) as refused:
            train(SHORT, progress=False, out=tmp_path, **how)
        assert f"out = {str(tmp_path)!r}: another training writes to it" in str(refused.value)
    holder.kill()
    holder.communicate()
    train(SHORT, progress=False, out=tmp_path)


def test_a_folder_is_one_training_s_within_a_process_too(tmp_path):
    with claimed([tmp_path], False, False), pytest.raises(OSError, match="another training"):
        train(SHORT, progress=False, out=tmp_path)
    train(SHORT, progress=False, out=tmp_path)
