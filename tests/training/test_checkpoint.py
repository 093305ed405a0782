from dataclasses import replace

import pytest
import torch

from mythos_core.training import train
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
