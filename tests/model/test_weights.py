import json
import os
import stat
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import tiny

from mythos_core import OpenMythos
from mythos_core.model.weights import PRETRAINED, read_config, shipped

IDS = torch.randint(0, 17, (2, 10), generator=torch.Generator().manual_seed(3))


def change(folder: Path, *without: str, **fields):
    """Other values in a config.json, and some fields taken out."""
    file = folder / "config.json"
    values = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    kept = {name: value for name, value in values.items() if name not in without}
    file.write_text(json.dumps(kept), encoding="utf-8")


def rewrite(folder: Path, act):
    """The weights as `act` leaves them."""
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    act(weights)
    safetensors.torch.save_file(weights, file)


def with_number(folder: Path, number: float):
    rewrite(folder, lambda weights: weights["norm.weight"].__setitem__(3, number))


def replaced(folder: Path, name: str, make):
    (folder / name).unlink()
    make(folder / name)


@pytest.fixture
def folder(tmp_path) -> Path:
    OpenMythos(tiny()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*defaults were taken")
@pytest.mark.parametrize("damage, named", [
    (lambda d: change(d, vocab_size=10 ** 7), "embed.weight has the shape (17, 32), not (10000000"),
    (lambda d: change(d, vocab_size=10 ** 30), "model.safetensors"),
    (lambda d: change(d, prelude_layers=10 ** 6), "prelude_layers = 1, not 1000000"),
    (lambda d: change(d, n_shared_experts=10 ** 6), "n_shared_experts = 1, not 1000000"),
    (lambda d: change(d, coda_layers=0), "coda_layers = 1, not 0"),
    (lambda d: change(d, loop_norm=True), "lacks ['recurrent.loop_norm.weight']"),
    (lambda d: change(d, halting="none"), "has unknown ['recurrent.act.halt.bias'"),
    (lambda d: (d / "config.json").write_bytes(b"{}"), "prelude_layers = 1, not 2"),
    (lambda d: (d / "config.json").write_bytes(b"[1, 2]"), "config.json"),
    (lambda d: (d / "config.json").write_bytes(b"[" * 10 ** 5), "config.json"),
    (lambda d: (d / "config.json").write_bytes(b'{"dim": "\xff"}'), "config.json"),
    (lambda d: replaced(d, "config.json", os.mkdir), "config.json: not a regular file"),
    (lambda d: with_number(d, torch.nan), "norm.weight has numbers that are not finite"),
    (lambda d: with_number(d, -torch.inf), "norm.weight has numbers that are not finite"),
    (lambda d: rewrite(d, lambda w: w.update({k: x.long() for k, x in w.items()})),
     "is of dtype I64"),
    (lambda d: rewrite(d, dict.clear), "prelude_layers = 0"),
    (lambda d: (d / "config.json").write_bytes(b"{"), "config.json: not a model configuration"),
    (lambda d: change(d, dim=-1), "MythosConfig.dim = -1"),
    (lambda d: change(d, dim=64), "not the weights of its config"),
    (lambda d: (d / "model.safetensors").write_bytes(b"not weights"), "model.safetensors: damaged"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
     "model.safetensors: damaged"),
])
def test_a_folder_that_is_no_models_is_refused_at_once_by_file(folder, damage, named):
    with torch.device("meta"):
        OpenMythos(tiny())               # torch's own first use of this device takes seconds
    damage(folder)
    begun = time.perf_counter()
    with pytest.raises(OSError) as refusal:
        OpenMythos.from_pretrained(folder)
    assert named in str(refusal.value) and str(folder) in str(refusal.value)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing"):
        OpenMythos.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which Windows has not")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(folder, name):
    replaced(folder, name, os.mkfifo)
    with pytest.raises(OSError, match=f"{name}: not a regular file"):
        OpenMythos.from_pretrained(folder)


def test_fields_that_are_missing_are_named_with_what_was_taken_for_them(folder):
    change(folder, "window", "min_loops")
    with pytest.warns(UserWarning, match="defaults were taken for window = None, min_loops = 1$"):
        OpenMythos.from_pretrained(folder)


@pytest.mark.parametrize("name", shipped())
def test_the_shipped_configurations_are_whole(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(PRETRAINED / name / "config.json")


@pytest.mark.parametrize("option", ["dtype", "torch_dtype", "revision", "strict", "config"])
def test_an_option_that_has_no_meaning_is_refused_by_name(folder, option):
    for where in ("parity-seed", folder, str(folder)):
        with pytest.raises(TypeError, match=f"no option '{option}'"):
            OpenMythos.from_pretrained(where, **{option: None})


@pytest.mark.parametrize("option", ["dtype", "torch_dtype", "strict"])
def test_so_it_is_for_a_hub_id_before_anything_is_fetched(option, monkeypatch):
    monkeypatch.setattr("mythos_core.model.model.snapshot_download", None)
    with pytest.raises(TypeError, match=f"no option '{option}'"):
        OpenMythos.from_pretrained("someone/some-model", **{option: None})


def test_a_hub_ids_options_reach_the_download(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("mythos_core.model.model.snapshot_download",
                        lambda name, **options: asked.append((name, options)) or str(folder))
    model = OpenMythos.from_pretrained("someone/some-model", revision="v2")
    assert model.config == tiny() and not model.training
    assert asked == [("someone/some-model", {"revision": "v2", "allow_patterns":
                                             ["config.json", "model.safetensors"]})]


def test_pickled_weights_are_not_read(folder):
    """As SECURITY.md says: where there are no others, there are none."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: missing"):
        OpenMythos.from_pretrained(folder)


def test_a_path_is_a_path_whatever_ships(folder, monkeypatch):
    folder.rename(folder.parent / "parity-seed")
    monkeypatch.chdir(folder.parent)
    for mine in (Path("parity-seed"), Path("./parity-seed"), "./parity-seed"):
        assert OpenMythos.from_pretrained(mine).config == tiny()
    assert OpenMythos.from_pretrained("parity-seed").config != tiny()
    with pytest.raises(ValueError, match="'parity-carrying': must be a directory"):
        OpenMythos.from_pretrained(Path("parity-carrying"))


@pytest.mark.skipif(os.name == "nt", reason="its files have no such modes")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_weights_are_for_whom_the_umask_lets_read_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        OpenMythos(tiny()).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


def test_weights_that_do_not_fit_on_the_disk_leave_those_there_were(folder, full_disk):
    before = (folder / "model.safetensors").read_bytes()
    with full_disk(20_000), pytest.raises(OSError, match=r"model\.safetensors: could not be writ"):
        OpenMythos(tiny()).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_weights_of_a_lower_precision_are_read(folder):
    half = OpenMythos.from_pretrained(folder).to(torch.bfloat16)
    half.save_pretrained(folder)
    again = OpenMythos.from_pretrained(folder)
    assert again.embed.weight.dtype == torch.float32
    assert torch.equal(again.to(torch.bfloat16)(IDS, 2), half(IDS, 2))
