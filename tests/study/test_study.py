import json
import re
import shlex
import statistics
from ast import literal_eval
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

from mythos_core import OpenMythos, study
from mythos_core.model.config import MythosConfig
from mythos_core.model.model import PRETRAINED
from mythos_core.probes import depth_sweep
from mythos_core.study import exits, measures, parity, states
from mythos_core.study.__main__ import main as pack_rows
from mythos_core.study.peers import PEERS, budgeted
from mythos_core.study.reference import TRAINED
from mythos_core.tasks.groups import group
from mythos_core.tasks.parity import answers, make_batch
from mythos_core.training.recipes import Recipe, get_recipe

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def test_a_variant_changes_what_it_says_and_nothing_else():
    recipe = get_recipe("parity-carrying")
    assert study.variant("the recipe") == recipe
    article = get_recipe("parity-seed")
    assert (study.variant("the article's recipe")
            == replace(article, config=replace(article.config, max_seq_len=4096)))
    last = replace(study.variant("+ mixed strings"), name=recipe.name,
                   spare_loops=recipe.spare_loops)
    last = replace(last, config=replace(last.config, vocab_size=4, loop_noise=0.3, start_noise=4.0))
    assert last == recipe  # the steps lead from the article's recipe to ours
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
    assert torch.equal(parity.right(model, ids, loops), expected) and expected.any()
    monkeypatch.setattr(parity, "TOKENS", 21)
    assert torch.equal(parity.right(model, ids, loops), expected)


def test_whole_strings_counts_strings_that_are_right_everywhere():
    class Oracle(OpenMythos):
        """Right but for the last position of the first string."""

        def decode(self, output, ctx):
            wrong = torch.zeros_like(self.ids)
            wrong[0, -1] = 1
            return torch.nn.functional.one_hot(torch.where(wrong == 1, 3 - answers(self.ids),
                                                           answers(self.ids)), 4).float()

        def forward(self, ids, *args, **kwargs):
            self.ids = ids
            return super().forward(ids, *args, **kwargs)

    oracle = Oracle(get_recipe("parity-carrying").config)
    assert parity.whole_strings(oracle, 20, 5, strings=4) == 3 / 4


@pytest.fixture(params=["proofs", "doubling", "contracting", "gru_balls", "staircase", "machines",
                        "far", "reach", "ablations", "exits", "experts", "generation", "states",
                        "gru", "pace", "reference", "ladder", "peers", "looping"])
def committed(request):
    return study.load(study.RESULTS / f"{request.param}.json")


# a recipe's name says nothing of what it does; the other field had one value in all rows that are
# left
GONE = {"name", "halting_loss"}


def as_kept(recipe, kept):
    """What was `kept` of a recipe, and the recipe as JSON, without fields that are newer than that,
    if they are at their defaults."""
    now, default = (json.loads(json.dumps(r.as_dict()))
                    for r in (recipe, Recipe(recipe.name, MythosConfig())))
    config = now.pop("config")
    kept_config = kept["config"] if isinstance(kept["config"], dict) else config
    assert kept_config.pop("shift_growth", 1) == 1              # a field that there was once
    shorter = {k: v for k, v in now.items() if k not in GONE and (k in kept or v != default[k])}
    shorter["config"] = {k: v for k, v in config.items() if k in kept_config
                         or v != default["config"][k]}
    return {k: v for k, v in kept.items() if k not in GONE}, shorter


def trained(row):
    """The recipe of a row: its variant's, or what a peer makes of that."""
    recipe, peer = study.variant(row["variant"]), row.get("peer")
    if peer in PEERS or row.get("measure") == "gru_balls":
        return budgeted(recipe)
    return TRAINED[peer](recipe.machine) if peer in TRAINED else recipe


def test_committed_rows_are_of_the_recipes_there_are(committed):
    assert committed
    for row in committed:
        kept, now = as_kept(trained(row), row["recipe"])
        assert kept == now, row["variant"]
        if "mythos_core.study" in row["command"]:  # rows of before mythos_core.batch ran the study
            assert f"--variant '{row['variant']}' --seeds {row['seed']}" in row["command"]
        else:
            words = [word for word in shlex.split(row["command"]) if "=" in word]
            asked = {name: literal_eval(value) for name, value in (w.split("=", 1) for w in words)}
            assert (asked["variant"], asked["seed"]) == (row["variant"], row["seed"])
        assert len(row["commit"]) == 40 and {"python", "torch", "numpy"} == set(row["versions"])
    assert (len({(row["variant"], row["seed"], row.get("arithmetic"), row.get("peer"))
                 for row in committed}) == len(committed))


def test_every_proof_that_was_tried_is_kept_and_none_is_contradicted():
    """The trainings of parity and the groups, under each arithmetic: seeds from 0 on without a
    gap."""
    rows, seeds = study.load(study.RESULTS / "proofs.json"), {}
    for row in rows:
        seeds.setdefault((row["variant"], row["arithmetic"]), []).append(row["seed"])
        assert (row["certificate"]["proved"] and row["certificate"]["wrong"] == 0
                and row["same_machine"])
        assert all(of["whole"] == of["strings"] > 0 for of in row["answered"].values())
    assert all(found == list(range(len(found))) for found in seeds.values())
    assert {name for name, _ in seeds} == set(study.MEASURED["proofs"])


def test_all_machines_that_were_tried_are_kept_and_no_proof_is_contradicted():
    """Named ones by seeds from 0 on without a gap, the 40 random ones by one seed each."""
    seeds, proved = {}, {}
    for row in study.load(study.RESULTS / "machines.json"):
        seeds.setdefault(row["variant"], []).append(row["seed"])
        proved.setdefault(row["variant"], []).append(row["certificate"]["proved"])
        if row["certificate"]["proved"]:
            assert row["certificate"]["wrong"] == 0 and row["same_machine"]
            assert all(of["whole"] == of["strings"] > 0 for of in row["answered"].values())
    assert all(found == list(range(len(found))) for found in seeds.values())
    assert seeds.keys() == set(study.MEASURED["machines"])
    drawn = [found for name, found in proved.items() if name.startswith("machine random")]
    assert drawn == 40 * [[True]]


def test_a_string_of_a_million_elements_was_right_from_a_cache_that_does_not_grow():
    (row,) = study.load(study.RESULTS / "far.json")
    assert ({int(length): (of["strings"], of["whole"]) for length, of in row["far"].items()}
            == {65_536: (2, 2), 1_000_000: (1, 1)})
    assert {of["cache_bytes"] // of["strings"] for of in row["far"].values()} == {256}


def test_ten_seeds_reach_1024_bits():
    rows = study.load(study.RESULTS / "reach.json")
    assert [row["seed"] for row in rows] == list(range(10))
    for row in rows:
        assert min(row["whole"].values()) >= 0.99 and min(row["whole_4x"].values()) == 1.0
        assert all(all(by_name.values()) for by_name in row["structured"].values())
    assert sum(max(row["needed"]["256"].values()) <= 256 for row in rows) >= 9


def median_seed(rows, value):
    """The seed of the median; of two in the middle, the one with the lower value."""
    return sorted(rows, key=lambda row: (value(row), row["seed"]))[(len(rows) - 1) // 2]["seed"]


def test_the_shipped_models_are_the_median_seeds():
    rows = {"parity-carrying": [row for row in study.load(study.RESULTS / "reach.json")
                                if row["variant"] == "the recipe"],
            "parity-seed": [row for row in study.load(study.RESULTS / "ablations.json")
                            if row["variant"] == "the article's recipe"]}
    values = {"parity-carrying": lambda row: row["needed"]["256"]["random"],
              "parity-seed": lambda row: row["executed"]}
    for name in rows:
        config = (PRETRAINED / name / "config.json").read_text(encoding="utf-8")
        about = json.loads(config)["provenance"]
        assert about["seed"] == median_seed(rows[name], values[name])
        kept, now = as_kept(get_recipe(name), about["recipe"])
        assert kept | {"config": None} == now | {"config": None}


def test_the_shipped_model_does_what_its_committed_row_says():
    model = OpenMythos.from_pretrained("parity-carrying")
    config = (PRETRAINED / "parity-carrying" / "config.json").read_text(encoding="utf-8")
    seed = json.loads(config)["provenance"]["seed"]
    (row,) = [row for row in study.load(study.RESULTS / "reach.json")
              if row["variant"] == "the recipe" and row["seed"] == seed]
    for length in (16, 64):
        ids = make_batch(16, length, torch.Generator().manual_seed(length))[0]
        needed = depth_sweep(model, ids, answers(ids),
                             length).loops_needed.amax(1).float().mean().item()
        assert needed == pytest.approx(row["needed"][str(length)]["random"], rel=0.02)


@pytest.mark.parametrize("name", ["Z2", "Z5", "S3", "A5", "S5"])
def test_five_seeds_track_each_group_to_256_elements(name):
    rows = [row for row in study.load(study.RESULTS / "states.json") if row["variant"] == name]
    assert [row["seed"] for row in rows] == list(range(5))
    assert sum(row["whole"]["256"] >= 0.99 for row in rows) >= 4


def test_states_row_is_what_a_model_that_looks_at_every_letter_gets_right():
    class Counter(torch.nn.Module):
        """Right but for the moves by element 1 from element 1, after which it stays wrong."""

        def forward(self, ids, n_loops):
            answers = group("S3").answers(ids)
            missed = ((answers[:, :-1] == 2) & (ids[:, 1:] == 2)).cumsum(1) > 0
            answers[:, 1:] = torch.where(missed, 0, answers[:, 1:])
            return torch.nn.functional.one_hot(answers, 7)

    row = states.states_row(SimpleNamespace(model=Counter(), recipe=get_recipe("S3-carrying")))
    assert row["moves"] == 36 and row["moves_wrong"] == 1 and row["needed"] == {}
    for length in ("16", "64", "256"):
        places = [int(length) if at is None else at for at in row["first_wrong"][length]]
        assert (row["token"][length] == pytest.approx(sum(places) / 32 / int(length))
                and row["whole"][length] == places.count(int(length)) / 32)
        assert row["structured"][length]["all zeros"]            # the identity throughout


def test_a_gru_has_the_parameters_of_the_model_it_is_compared_with_and_learns():
    recipe = replace(study.variant("Z2"), steps=150)
    run = states.train_gru(recipe, 0)
    of_gru, of_model = (sum(p.numel() for p in m.parameters())
                        for m in (run.model, OpenMythos(recipe.config)))
    assert 0.97 < of_gru / of_model <= 1
    ids, targets = recipe.make_batch(64, 12, torch.Generator().manual_seed(0))
    assert (run.model(ids).argmax(-1) == targets).float().mean() > 0.9
    short = replace(recipe, steps=10)
    assert torch.equal(*(states.train_gru(short, 0).model.head.weight for _ in range(2)))


@pytest.mark.parametrize("asked, named", [
    (("the recipe", 0, "speed"), "measure = 'speed': must be one of"),
    (("the recipe", 0, "peers"), "variant = 'the recipe': must be of a machine"),
    (("window 3", 0, "pace"), "variant = 'window 3'")])
def test_a_row_of_what_is_not_known_is_refused_before_any_training(asked, named, monkeypatch):
    monkeypatch.setattr(measures, "train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=re.escape(named)):
        measures.row_of(*asked)


def test_a_proof_is_only_measured_under_the_arithmetic_it_is_said_to_be_of(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with pytest.raises(ValueError, match="arithmetic = 'native': the environment has"):
        measures.row_of("proved parity", 0, "proofs")
    with pytest.raises(ValueError, match="arithmetic = 'amd': must be one of"):
        measures.row_of("proved parity", 0, "proofs", arithmetic="amd")


def test_every_measure_that_has_variants_can_be_taken():
    assert set(study.MEASURED) <= {*measures.MEASURES, *measures.ALONE}


def test_the_measures_name_the_variants_there_are():
    assert study.MEASURED["ablations"] == list(study.VARIANTS)[:len(study.MEASURED["ablations"])]
    named = {name for names in study.MEASURED.values() for name in names}
    assert set(study.VARIANTS) <= named
    assert all(study.variant(name).machine for name in named - set(study.VARIANTS))


def test_every_variant_was_run_with_five_seeds_and_none_left_out():
    rows = study.load(study.RESULTS / "ablations.json")
    seeds = {name: [row["seed"] for row in rows if row["variant"] == name]
             for name in study.MEASURED["ablations"]}
    assert all(found == list(range(5)) for found in seeds.values()), seeds


@pytest.mark.parametrize("measure", ["exits", "experts", "generation", "states", "gru"])
def test_every_comparison_has_five_seeds_and_none_left_out(measure):
    rows = study.load(study.RESULTS / f"{measure}.json")
    assert ([(row["variant"], row["seed"]) for row in rows] == [(name, seed)
        for name in sorted(study.MEASURED[measure], key=list(study.VARIANTS).index)
        for seed in range(5)])


@pytest.mark.parametrize("measure", ["reference", "ladder", "peers"])
def test_every_model_was_run_on_every_variant_and_no_seed_left_out(measure):
    """Seeds from 0 on without a gap. And what a row says of itself makes it: the command names the
    model too."""
    rows, seeds = study.load(study.RESULTS / f"{measure}.json"), {}
    for row in rows:
        asked = dict(word.split("=", 1) for word in shlex.split(row["command"]) if "=" in word)
        assert literal_eval(asked.get("peer", "None")) == row.get("peer")
        seeds.setdefault((row["variant"], row.get("peer")), []).append(row["seed"])
    assert seeds.keys() == set(product(study.MEASURED[measure],
                                       study.TRAINED.get(measure, [None])))
    assert all(found == list(range(len(found))) for found in seeds.values())
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{measure}` |")]
    counts = sorted({len(found) for found in seeds.values()})
    assert line.endswith(f"| {' or '.join(f'0:{count}' for count in counts)} |")


def test_the_median_training_was_whole_at_16_bits_within_20_seconds_and_done_within_45():
    """In the committed rows, on the machine that made them: nothing is timed here."""
    rows = study.load(study.RESULTS / "pace.json")
    assert [row["seed"] for row in rows] == list(range(10))
    assert statistics.median(row["when_whole"]["first"]["seconds"] for row in rows) <= 20
    assert statistics.median(row["train_seconds"] for row in rows) <= 45


def test_exits_are_the_first_loops_at_which_a_position_may_stop_alone_or_with_all_before_it():
    may = torch.rand(9, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    plain, prefix = exits.exits(may, False), exits.exits(may, True)
    for b in range(3):
        stopped = 0
        for s in range(7):
            assert plain[b, s] == next((t for t in range(9) if may[t, b, s]), 8)
        for t in range(9):
            while stopped < 7 and may[t, b, stopped]:
                assert prefix[b, stopped] == t
                stopped += 1
        assert (prefix[b, stopped:] == 8).all()
    assert (prefix >= plain).all() and (prefix > plain).any()


def test_signals_and_points_are_what_a_plain_look_gives():
    torch.manual_seed(0)
    config = tiny(halting="none", loop_embedding=False, init_std=0.2, vocab_size=4)
    model, ids = OpenMythos(config).eval(), make_batch(3, 8)[0]
    seen, logits = exits.signals(model, ids, 6), [model(ids, n + 1) for n in range(6)]
    h = []
    model(ids, 6, observer=lambda record: h.append(record.h))
    assert seen["KL"][0].isinf().all()  # nothing to compare with yet: no reason to stop
    for t in range(1, 6):
        answer = [x.argmax(-1) for x in logits[:t + 1]]
        assert torch.equal(seen["right"][t], answer[t] == answers(ids))
        same = torch.tensor(
            [[next((k for k in range(t) if answer[t - k][b, s] != answer[t - k - 1][b, s]), t)
              for s in range(8)] for b in range(3)])
        assert torch.equal(seen["same"][t].long(), same)
        q, before = logits[t].log_softmax(-1), logits[t - 1].log_softmax(-1)
        assert torch.allclose(seen["KL"][t], (q.exp() * (q - before)).sum(-1), atol=1e-5)
        assert torch.allclose(seen["change"][t], (h[t] - h[t - 1]).norm(dim=-1) / h[t].norm(dim=-1),
                              atol=1e-5)
    points = exits.exit_points(seen)
    fixed = [p for p in points if p["rule"] == "fixed"]
    assert [p["loops"] for p in fixed] == [1, 2, 3, 4, 5, 6]
    assert [p["token"] for p in fixed] == pytest.approx(seen["right"].float().mean((1, 2)).tolist())
    (point,) = [p for p in points if p["rule"] == "same" and p["setting"] == 2 and p["prefix"]]
    at = exits.exits(seen["same"] >= 2, True)
    assert point["loops"] == pytest.approx((at + 1).float().mean().item())
    assert (point["token"]
            == pytest.approx(torch.stack([seen["right"][at[b, s], b, s] for b in range(3)
                                          for s in range(8)]).float().mean().item()))


def test_continuations_are_counted_whole():
    model = OpenMythos.from_pretrained("parity-carrying")
    assert parity.continued(model, study.fresh_strings(16), 32, None) == 1.0
    assert parity.continued(model, study.fresh_strings(16), 2, None) < 1


def test_doubling_models_that_ship_are_proved_on_every_seed():
    rows = [row for row in study.load(study.RESULTS / "doubling.json")
            if "machine" not in row["variant"]]
    runs = {}
    for row in rows:
        assert row["certificate"]["proved"] and row["same_machine"]
        assert all(of["whole"] == of["strings"] for of in row["answered"].values())
        runs.setdefault((row["variant"], row["arithmetic"]), []).append(row["seed"])
    assert set(map(tuple, runs.values())) == {tuple(range(10))}
    assert ({variant for variant, arithmetic in runs if arithmetic != "native"}
            == {"doubling parity", "doubling S3"} and len(runs) == 9)


def test_contracting_models_that_ship_are_proved_on_every_seed_and_no_run_is_left_out():
    rows, runs = study.load(study.RESULTS / "contracting.json"), {}
    for row in rows:
        runs.setdefault(row["variant"].removeprefix("contracting machine "), []).append(row)
        if row["certificate"]["proved"]:
            assert row["same_machine"] and row["certificate"]["codes"] > 0
            assert all(of["whole"] == of["strings"] for of in row["answered"].values())
    assert all([row["seed"] for row in of] == list(range(len(of))) for of in runs.values())
    for name in ("parity", "Z5", "S3", "addition"):
        assert [row["certificate"]["proved"] for row in runs[name]] == [True] * 5


def test_the_staircase_is_that_of_the_letters_that_have_been_read():
    """The rows without the model: after T loops the answers are those to the last 2^T letters."""
    rows = study.load(study.RESULTS / "staircase.json")
    assert [row["variant"] for row in rows] == study.MEASURED["staircase"]
    for row in rows:
        asked = study.variant(row["variant"]).machine
        for length, found in row["staircase"].items():
            assert found["right"][-4:] == [int(length)] * 4
            if length == "1048576":                              # answers to it take 20 s
                continue
            ids, targets = asked.make_batch(1, int(length),
                                            torch.Generator().manual_seed(int(length)))
            products = asked.monoid().windows(ids, len(found["right"]))
            assert found["right"] == [int((asked.monoid().answer[x] == targets).sum())
                                      for x in products]


def test_packed_rows_come_back_whole(tmp_path):
    recipe, other = {"steps": 1, "lengths": [2, 3]}, {"steps": 2}
    rows = [{"seed": 0, "recipe": recipe, "versions": {"torch": "1"}, "commit": "a"},
            {"seed": 1, "recipe": other}, {"seed": 2, "recipe": recipe, "versions": {"torch": "1"}}]
    file = tmp_path / "rows.json"
    (tmp_path / "batch.json").write_text(json.dumps(rows), encoding="utf-8")
    pack_rows([str(tmp_path / "batch.json"), str(file)])
    assert study.unpack(file) == rows
    assert file.read_text(encoding="utf-8").count('"steps"') == 2     # each recipe once
