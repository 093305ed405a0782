import json
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from conftest import tiny

from mythos_core import OpenMythos, study
from mythos_core.model import PRETRAINED, shipped
from mythos_core.parity import answers, make_batch
from mythos_core.probes import depth_sweep
from mythos_core.training import get_recipe


def test_a_variant_changes_what_it_says_and_nothing_else():
    recipe = get_recipe("parity-extrapolating")
    assert study.variant("the recipe") == recipe and study.variant("the scan") == get_recipe("parity-scan")
    article = get_recipe("parity-seed")
    assert study.variant("the article's recipe") == replace(article, config=replace(article.config, max_seq_len=4096))
    last = replace(study.variant("+ mixed strings"), name=recipe.name, spare_loops=recipe.spare_loops)
    last = replace(last, config=replace(last.config, vocab_size=4, loop_noise=0.3, start_noise=4.0))
    assert last == recipe                                      # the steps lead from the article's recipe to ours
    assert study.variant("window 8") == replace(recipe, config=replace(recipe.config, window=8))
    assert study.variant("8 loops always") == replace(recipe, loops=(8, 8))
    for name in study.VARIANTS:
        OpenMythos(study.variant(name).config)
    with pytest.raises(ValueError, match="variant = 'window 3'"):
        study.variant("window 3")


@pytest.mark.parametrize("halting", ["act", "none"])
def test_right_is_what_separate_passes_give(halting, monkeypatch):
    model = OpenMythos(tiny(halting=halting, init_std=0.2, vocab_size=4)).eval()
    ids, targets = make_batch(50, 3)
    loops = [2, 5, 9]
    expected = torch.stack([model(ids, n).argmax(-1) == targets for n in loops])
    assert torch.equal(study.right(model, ids, loops), expected) and expected.any()
    monkeypatch.setattr(study, "TOKENS", 21)
    assert torch.equal(study.right(model, ids, loops), expected)


def test_whole_strings_counts_strings_that_are_right_everywhere():
    class Oracle(OpenMythos):
        """Right but for the last position of the first string."""

        def decode(self, output, ctx):
            wrong = torch.zeros_like(self.ids)
            wrong[0, -1] = 1
            return torch.nn.functional.one_hot(torch.where(wrong == 1, 3 - answers(self.ids), answers(self.ids)), 4).float()

        def forward(self, ids, *args, **kwargs):
            self.ids = ids
            return super().forward(ids, *args, **kwargs)

    assert study.whole_strings(Oracle(get_recipe("parity-extrapolating").config), 20, 5, strings=4) == 3 / 4


def test_rows_are_made_kept_and_not_made_again(tmp_path, monkeypatch, capsys):
    short = lambda name: replace(get_recipe("parity-extrapolating"), steps=2)  # noqa: E731
    monkeypatch.setattr(study, "variant", short)
    monkeypatch.setattr(study, "LOOPS", {length: 2 for length in study.LOOPS})
    file = tmp_path / "rows.json"
    for seed in (1, 0):
        study.append(file, study.run_one(("NoPE", seed, "ablations")))
    study.append(file, study.run_one(("window 2", 0, "ablations")))
    rows = json.loads(file.read_text())
    assert [(row["variant"], row["seed"]) for row in rows] == [("window 2", 0), ("NoPE", 0), ("NoPE", 1)]
    assert all({"whole", "loops", "command", "commit", "versions", "recipe", "parameters"} <= set(row) for row in rows)
    assert rows[1]["command"] == "python -m mythos_core.study --variant 'NoPE' --seeds 0"
    before = file.read_text()
    study.main(["--variant", "NoPE", "--seeds", "0:2", "--out", str(file)])
    assert file.read_text() == before                        # nothing was missing


@pytest.fixture(params=["reach", "ablations", "halting", "pace"])
def committed(request):
    return study.load(study.RESULTS / f"{request.param}.json")


def test_committed_rows_are_of_the_recipes_there_are(committed):
    assert committed
    for row in committed:
        assert row["recipe"] == json.loads(json.dumps(asdict(study.variant(row["variant"])))), row["variant"]
        assert f"--variant '{row['variant']}' --seeds {row['seed']}" in row["command"]
        assert len(row["commit"]) == 40 and {"python", "torch", "numpy"} == set(row["versions"])
    assert len({(row["variant"], row["seed"]) for row in committed}) == len(committed)


@pytest.mark.parametrize("name", ["the recipe", "the scan"])
def test_ten_seeds_reach_1024_bits(name):
    rows = [row for row in study.load(study.RESULTS / "reach.json") if row["variant"] == name]
    assert [row["seed"] for row in rows] == list(range(10))
    for row in rows:
        assert min(row["whole"].values()) >= 0.99 and min(row["whole_4x"].values()) == 1.0
        assert all(all(by_name.values()) for by_name in row["structured"].values())
    assert sum(max(row["needed"]["256"].values()) <= 256 for row in rows) >= 9


def median_seed(rows, value):
    """The seed of the median; of two in the middle, the one with the lower value."""
    return sorted(rows, key=lambda row: (value(row), row["seed"]))[(len(rows) - 1) // 2]["seed"]


def test_the_shipped_models_are_the_median_seeds():
    rows = {"parity-extrapolating": [row for row in study.load(study.RESULTS / "reach.json") if row["variant"] == "the recipe"],
            "parity-seed": [row for row in study.load(study.RESULTS / "ablations.json") if row["variant"] == "the article's recipe"]}
    values = {"parity-extrapolating": lambda row: row["needed"]["256"]["random"], "parity-seed": lambda row: row["executed"]}
    for name in shipped():
        about = json.loads((PRETRAINED / name / "config.json").read_text())["provenance"]
        assert about["seed"] == median_seed(rows[name], values[name])
        assert about["recipe"] | {"config": None} == json.loads(json.dumps(asdict(get_recipe(name)))) | {"config": None}


def test_the_shipped_model_does_what_its_committed_row_says():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    seed = json.loads((PRETRAINED / "parity-extrapolating" / "config.json").read_text())["provenance"]["seed"]
    (row,) = [row for row in study.load(study.RESULTS / "reach.json") if row["variant"] == "the recipe" and row["seed"] == seed]
    for length in (16, 64, 256):
        ids = make_batch(16, length, torch.Generator().manual_seed(length))[0]
        needed = depth_sweep(model, ids, answers(ids), length).loops_needed.amax(1).float().mean().item()
        assert needed == pytest.approx(row["needed"][str(length)]["random"], rel=0.02)


def test_every_variant_was_run_with_five_seeds_and_none_left_out():
    rows = study.load(study.RESULTS / "ablations.json")
    seeds = {name: [row["seed"] for row in rows if row["variant"] == name] for name in study.MEASURED["ablations"]}
    assert all(found == list(range(5)) for found in seeds.values()), seeds
    assert [row["seed"] for row in study.load(study.RESULTS / "halting.json")] == list(range(5))


def test_the_median_training_was_whole_at_16_bits_within_20_seconds_and_done_within_45():
    """In the committed rows, on the machine that made them: nothing is timed here."""
    rows = study.load(study.RESULTS / "pace.json")
    assert [row["seed"] for row in rows] == list(range(10))
    assert statistics.median(row["when_whole"]["first"]["seconds"] for row in rows) <= 20
    assert statistics.median(row["train_seconds"] for row in rows) <= 45


def test_an_unknown_variant_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--variant", "window 3", "--out", str(tmp_path / "rows.json")])
    assert "must be one of" in capsys.readouterr().err and not (tmp_path / "rows.json").exists()
