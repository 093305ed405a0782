from dataclasses import replace

import pytest
import torch

from mythos_core.__main__ import main
from mythos_core.training import NotProved, train, trainer
from mythos_core.training.recipes import get_recipe

SHORT = replace(get_recipe("parity-carrying"), steps=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished training's checkpoint: its bytes, and what is in it."""
    out = tmp_path_factory.mktemp("saved")
    train(SHORT, 1, progress=False, out=out)
    return (out / "checkpoint.pt").read_bytes(), torch.load(out / "checkpoint.pt")


def resume(out):
    return train(SHORT, 1, progress=False, out=out, resume=True)


@pytest.mark.parametrize("change", [
    lambda s: [1, 2],
    lambda s: {},
    lambda s: {name: s[name] for name in s if name != "optimizer"},
    lambda s: s | {"model": s["model"] | {"norm.weight": torch.ones(3)}},
    lambda s: s | {"model": {}},
    lambda s: s | {"model": None},
    lambda s: s | {"optimizer": {"state": {}}},
    lambda s: s | {"optimizer": s["optimizer"] | {"state": {0: {
        "step": torch.tensor(2.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}}},
    lambda s: s | {"recipe": "{}"},
    lambda s: s | {"recipe": "torn"},
    lambda s: s | {"history": 5},
    lambda s: s | {"history": s["history"][1:]},
])
def test_a_checkpoint_that_is_none_is_refused_by_file(tmp_path, saved, change):
    torch.save(change(saved[1]), tmp_path / "checkpoint.pt")
    with pytest.raises(OSError, match=r"checkpoint\.pt: not a checkpoint of"):
        resume(tmp_path)


def test_a_flipped_byte_is_found(tmp_path, saved):
    """Wherever it lies: in what is padding it changes nothing, and elsewhere it is refused."""
    whole, file, refused = resume(tmp_path).model.state_dict(), tmp_path / "checkpoint.pt", 0
    for at in torch.randint(len(saved[0]), (20,)).tolist():
        content = bytearray(saved[0])
        content[at] ^= 1 << (at % 8)
        file.write_bytes(content)
        try:
            again = resume(tmp_path).model.state_dict()
            assert all(torch.equal(again[name], x) for name, x in whole.items())
        except OSError as error:
            assert "checkpoint.pt: damaged: " in str(error)
            refused += 1
    assert refused >= 15


def test_a_checkpoint_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        resume(tmp_path)


def with_checkpoint(out, saved):
    (out / "checkpoint.pt").write_bytes(saved[0])
    return out


def test_of_another_recipe_the_fields_that_differ_are_said_and_no_others(tmp_path, saved):
    other = replace(SHORT, lr=0.5, config=replace(SHORT.config, loop_noise=0.25))
    with pytest.raises(ValueError) as refused:
        train(other, 1, progress=False, out=with_checkpoint(tmp_path, saved), resume=True)
    said = str(refused.value).partition("of another recipe: ")[2]
    assert said.startswith("lr = 0.002, not 0.5; config.loop_noise = 0.3, not 0.25: must be")


def test_of_one_of_another_name_the_name_is_enough(tmp_path, saved):
    with pytest.raises(ValueError, match=r"recipe: name = 'parity-carrying', not 'state-S3': must"):
        train("state-S3", 1, progress=False, out=with_checkpoint(tmp_path, saved), resume=True)


def unproved(recipe, **how):
    with pytest.raises(NotProved) as ended:
        train(recipe, 0, progress=False, **how)
    return ended.value.run


@pytest.mark.parametrize("name, curriculum", [("doubling-parity", 0.0),
                                              ("parity-extrapolating", 0.25)])
def test_a_run_whose_steps_are_over_goes_on_to_more(tmp_path, name, curriculum):
    few = replace(get_recipe(name), steps=3, curriculum=curriculum)
    more = replace(few, steps=6)
    unproved(few, out=tmp_path)
    run = unproved(more, out=tmp_path, resume=True)
    assert [row.get("recipe_steps") for row in run.history] == [None, None, 3, None, None, None]
    first, second = trainer.provenance(run)["command"].split("; ")
    assert first.endswith(" --steps 3 --out DIR") and second.endswith(
        " --steps 6 --out DIR --resume")
    if not curriculum:                       # then as if there had been so many from the start
        whole = unproved(more).model.state_dict()
        assert all(torch.equal(whole[key], x) for key, x in run.model.state_dict().items())


@pytest.mark.parametrize("before, after, said", [
    (dict(steps=2), dict(steps=3), "falls over the last 80% of all: must be 2$"),
    (dict(steps=2, decay=0.0, curriculum=0.5), dict(steps=9), "must be at most 4$"),
    (dict(steps=2), dict(steps=1), "of another recipe: steps = 2, not 1: ")])
def test_a_run_that_more_steps_would_have_changed_does_not_go_on(tmp_path, before, after, said):
    recipe = replace(SHORT, **before)
    train(recipe, 1, progress=False, out=tmp_path)
    with pytest.raises(ValueError, match=said):
        train(replace(recipe, **after), 1, progress=False, out=tmp_path, resume=True)


def test_a_full_disk_is_said_by_file_and_leaves_the_last_checkpoint(tmp_path, saved, full_disk,
                                                                    capsys):
    with_checkpoint(tmp_path, saved)
    with full_disk(50_000), pytest.raises(SystemExit) as ended:
        main(["train", "--recipe", SHORT.name, "--steps", "2", "--seed", "1", "--out",
              str(tmp_path), "--resume"])
    assert ended.value.code == 2
    assert f"{tmp_path / 'checkpoint.pt'}: could not be written: " in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved[0]
    assert {file.name for file in tmp_path.iterdir()} <= {"checkpoint.pt", "training.lock"}
