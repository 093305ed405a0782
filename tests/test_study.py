import json
import math
import shlex
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import tiny

from mythos_core import OpenMythos, study
from mythos_core.config import MythosConfig
from mythos_core.groups import group
from mythos_core.model import PRETRAINED, shipped
from mythos_core.parity import answers, make_batch, structured
from mythos_core.probes import depth_sweep, halting_map
from mythos_core.recurrence import pairs
from mythos_core.training import Recipe, get_recipe, train, trajectory


def defined(notebook):
    """What a notebook imports and defines, none of it run."""
    space = {}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code" and cell.source.startswith(("from", "def", "class", "@", "RULES")):
            exec(cell.source, space)
    return SimpleNamespace(**space)


measures = defined(Path(__file__).parent.parent / "mythos_core" / "study.ipynb")


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


def test_ponder_net_loss_is_its_definition():
    torch.manual_seed(2)
    model, ids, T = OpenMythos(tiny(halting="learned", loop_embedding=False)).double(), torch.randint(1, 3, (2, 4)), 5
    targets, (ctx, _, states) = ids.flip(1), trajectory(model, ids, T)               # no noise in this config
    expected = 0.0
    for b in range(2):
        for s in range(4):
            going, prior = 1.0, 1.0
            for t in range(T):
                before = states[t + 1, b, s - 1] if s else torch.zeros_like(states[t + 1, b, s])
                p = torch.sigmoid(model.recurrent.act.halt(torch.cat([states[t + 1, b, s], before]))).item() if t < T - 1 else 1.0
                q, wanted = going * p, prior * (0.1 if t < T - 1 else 1.0)
                answer = -model.decode(states[t + 1], ctx)[b, s].log_softmax(-1)[targets[b, s]].item()
                expected += q * (answer + 0.01 * math.log(q / wanted)) / 8
                going, prior = going * (1 - p), prior * 0.9
    logits, loss = measures.ponder_net_loss(model, ids, targets, T)
    assert loss.item() == pytest.approx(expected, rel=1e-9) and torch.equal(logits, model.decode(states[-1], ctx))
    recipe = replace(study.variant("PonderNet"), steps=6)
    models = [train(r, 3, progress=False).model for r in (recipe, replace(recipe, halting_loss="ready"))]
    assert not torch.equal(*(model.embed.weight for model in models))


@pytest.fixture(params=["reach", "ablations", "halting", "exits", "experts", "generation", "states", "gru", "pace"])
def committed(request):
    return study.load(study.RESULTS / f"{request.param}.json")


def as_kept(recipe, kept):
    """The recipe as JSON, without fields that are newer than what was `kept` of it, if they are at their defaults."""
    now, default = (json.loads(json.dumps(asdict(r))) for r in (recipe, Recipe(recipe.name, MythosConfig())))
    config = now.pop("config")
    kept_config = kept["config"] if isinstance(kept["config"], dict) else config
    shorter = {k: v for k, v in now.items() if k in kept or v != default[k]}
    return {**shorter, "config": {k: v for k, v in config.items() if k in kept_config or v != default["config"][k]}}


def test_committed_rows_are_of_the_recipes_there_are(committed):
    assert committed
    for row in committed:
        assert row["recipe"] == as_kept(study.variant(row["variant"]), row["recipe"]), row["variant"]
        if "mythos_core.study" in row["command"]:                # rows of before mythos_core.batch ran the study
            assert f"--variant '{row['variant']}' --seeds {row['seed']}" in row["command"]
        else:
            assert {f'variant="{row["variant"]}"', f"seed={row['seed']}"} <= set(shlex.split(row["command"]))
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
            "parity-seed": [row for row in study.load(study.RESULTS / "ablations.json") if row["variant"] == "the article's recipe"],
            "parity-halting": study.load(study.RESULTS / "halting.json")}
    values = {"parity-extrapolating": lambda row: row["needed"]["256"]["random"], "parity-seed": lambda row: row["executed"],
              "parity-halting": lambda row: row["halting"]["256"]["stopped"] - row["halting"]["256"]["needed"]}
    assert set(shipped()) == set(rows) | {f"state-{name}" for name in ("Z5", "S3", "A5", "S5")}
    for name in rows:
        about = json.loads((PRETRAINED / name / "config.json").read_text())["provenance"]
        assert about["seed"] == median_seed(rows[name], values[name])
        assert about["recipe"] | {"config": None} == as_kept(get_recipe(name), about["recipe"]) | {"config": None}


def test_the_shipped_model_does_what_its_committed_row_says():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    seed = json.loads((PRETRAINED / "parity-extrapolating" / "config.json").read_text())["provenance"]["seed"]
    (row,) = [row for row in study.load(study.RESULTS / "reach.json") if row["variant"] == "the recipe" and row["seed"] == seed]
    for length in (16, 64, 256):
        ids = make_batch(16, length, torch.Generator().manual_seed(length))[0]
        needed = depth_sweep(model, ids, answers(ids), length).loops_needed.amax(1).float().mean().item()
        assert needed == pytest.approx(row["needed"][str(length)]["random"], rel=0.02)


@pytest.mark.parametrize("name", ["Z5", "S3", "A5", "S5"])
def test_the_best_seed_of_each_group_ships_and_is_right(name):
    about = json.loads((PRETRAINED / f"state-{name}" / "config.json").read_text())["provenance"]
    rows = [row for row in study.load(study.RESULTS / "states.json") if row["variant"] == name]
    most_right = max(rows, key=lambda row: (row["whole"]["256"], sum(row["structured"]["256"].values()), -row["seed"]))
    assert about["seed"] == most_right["seed"] and about["command"].startswith(f"python -m mythos_core.training --recipe state-{name} --seed")
    model, recipe = OpenMythos.from_pretrained(f"state-{name}"), get_recipe(f"state-{name}")
    ids, targets = recipe.make_batch(16, 64, torch.Generator().manual_seed(2 ** 20))
    assert (model(ids, 96).argmax(-1) == targets).all()


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

    row = measures.states_row(SimpleNamespace(model=Counter(), recipe=get_recipe("state-S3")))
    assert row["moves"] == 36 and row["moves_wrong"] == 1 and row["needed"] == {}
    for length in ("16", "64", "256"):
        places = [int(length) if at is None else at for at in row["first_wrong"][length]]
        assert row["token"][length] == pytest.approx(sum(places) / 32 / int(length)) and row["whole"][length] == places.count(int(length)) / 32
        assert row["structured"][length]["all zeros"]            # the identity throughout


def test_a_gru_has_the_parameters_of_the_model_it_is_compared_with_and_learns():
    recipe = replace(study.variant("Z2"), steps=150)
    run = measures.train_gru(recipe, 0)
    of_gru, of_model = (sum(p.numel() for p in m.parameters()) for m in (run.model, OpenMythos(recipe.config)))
    assert 0.97 < of_gru / of_model <= 1
    ids, targets = recipe.make_batch(64, 12, torch.Generator().manual_seed(0))
    assert (run.model(ids).argmax(-1) == targets).float().mean() > 0.9
    assert torch.equal(run.model.head.weight, measures.train_gru(recipe, 0).model.head.weight)


def test_positions_stop_by_themselves_on_five_seeds():
    rows = study.load(study.RESULTS / "halting.json")
    assert [row["seed"] for row in rows] == list(range(5))
    for row in rows:
        for by_length in row["halting"].values():
            assert by_length["whole"] == 1.0 and all(by_length["structured"].values()) and by_length["never"] < 0.01
    late = {n: sorted(row["halting"][n]["stopped"] - row["halting"][n]["needed"] for row in rows)[2] for n in ("64", "256")}
    assert late["64"] < 2 and late["256"] < 4


def test_the_shipped_halting_model_does_what_its_committed_row_says():
    model = OpenMythos.from_pretrained("parity-halting")
    seed = json.loads((PRETRAINED / "parity-halting" / "config.json").read_text())["provenance"]["seed"]
    (row,) = [row["halting"] for row in study.load(study.RESULTS / "halting.json") if row["seed"] == seed]
    for length in (16, 64):
        ids = torch.cat([study.fresh_strings(length), *structured(length).values()])
        assert (model(ids, 2 * length).argmax(-1) == answers(ids)).all()
        stopped = halting_map(model, ids[:16], row[str(length)]["loops"]).stopped_at.float().mean().item()
        assert stopped == pytest.approx(row[str(length)]["stopped"], rel=0.02)


def test_the_measures_name_the_variants_there_are():
    assert study.MEASURED["ablations"] == list(study.VARIANTS)[:len(study.MEASURED["ablations"])]
    assert set(study.VARIANTS) == {name for names in study.MEASURED.values() for name in names}


def test_every_variant_was_run_with_five_seeds_and_none_left_out():
    rows = study.load(study.RESULTS / "ablations.json")
    seeds = {name: [row["seed"] for row in rows if row["variant"] == name] for name in study.MEASURED["ablations"]}
    assert all(found == list(range(5)) for found in seeds.values()), seeds


@pytest.mark.parametrize("measure", ["halting", "exits", "experts", "generation", "states", "gru"])
def test_every_comparison_has_five_seeds_and_none_left_out(measure):
    rows = study.load(study.RESULTS / f"{measure}.json")
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for name in sorted(study.MEASURED[measure], key=list(study.VARIANTS).index)
                                                              for seed in range(5)]


def test_the_median_training_was_whole_at_16_bits_within_20_seconds_and_done_within_45():
    """In the committed rows, on the machine that made them: nothing is timed here."""
    rows = study.load(study.RESULTS / "pace.json")
    assert [row["seed"] for row in rows] == list(range(10))
    assert statistics.median(row["when_whole"]["first"]["seconds"] for row in rows) <= 20
    assert statistics.median(row["train_seconds"] for row in rows) <= 45


def test_exits_are_the_first_loops_at_which_a_position_may_stop_alone_or_with_all_before_it():
    may = torch.rand(9, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    plain, prefix = measures.exits(may, False), measures.exits(may, True)
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
    config = tiny(halting="learned", loop_embedding=False, init_std=0.2, vocab_size=4)
    model, ids = OpenMythos(config).eval(), make_batch(3, 8)[0]
    seen, logits = measures.signals(model, ids, 6), [model.without_halting()(ids, n + 1) for n in range(6)]
    h = []
    model.without_halting()(ids, 6, observer=lambda record: h.append(record.h))
    going = torch.ones(3, 8)
    assert seen["KL"][0].isinf().all()                           # nothing to compare with yet: no reason to stop
    for t in range(1, 6):
        answer = [x.argmax(-1) for x in logits[:t + 1]]
        assert torch.equal(seen["right"][t], answer[t] == answers(ids))
        same = torch.tensor([[next((k for k in range(t) if answer[t - k][b, s] != answer[t - k - 1][b, s]), t) for s in range(8)] for b in range(3)])
        assert torch.equal(seen["same"][t].long(), same)
        q, before = logits[t].log_softmax(-1), logits[t - 1].log_softmax(-1)
        assert torch.allclose(seen["KL"][t], (q.exp() * (q - before)).sum(-1), atol=1e-5)
        assert torch.allclose(seen["change"][t], (h[t] - h[t - 1]).norm(dim=-1) / h[t].norm(dim=-1), atol=1e-5)
    p = [torch.sigmoid(model.recurrent.act.halt(pairs(state, model.context(ids)))).squeeze(-1) for state in h]
    for t in range(6):
        assert torch.allclose(seen["p"][t], torch.minimum(p[t], p[t - 1]) if t else torch.zeros(3, 8), atol=1e-5)
        going = going * (1 - p[t])
        assert torch.allclose(seen["chance"][t], 1 - going, atol=1e-5)
    points = measures.exit_points(seen, ("same", "KL"))
    fixed = [p for p in points if p["rule"] == "fixed"]
    assert [p["loops"] for p in fixed] == [1, 2, 3, 4, 5, 6]
    assert [p["token"] for p in fixed] == pytest.approx(seen["right"].float().mean((1, 2)).tolist())
    (point,) = [p for p in points if p["rule"] == "same" and p["setting"] == 2 and p["prefix"]]
    at = measures.exits(seen["same"] >= 2, True)
    assert point["loops"] == pytest.approx((at + 1).float().mean().item())
    assert point["token"] == pytest.approx(torch.stack([seen["right"][at[b, s], b, s] for b in range(3) for s in range(8)]).float().mean().item())


def test_a_head_on_a_frozen_model_changes_nothing_but_itself():
    model = OpenMythos(get_recipe("parity-extrapolating").config).eval()
    head = measures.head_on_frozen(model, linear=True, steps=2)
    frozen = head.without_halting().state_dict()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.state_dict().items())
    assert head.recurrent.act.halt.weight.shape == (1, 128) and not head.training


def test_continuations_are_counted_whole():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    assert measures.continued(model, study.fresh_strings(16), 32, None) == (1.0, [])
    assert measures.continued(model, study.fresh_strings(16), 2, None)[0] < 1
    exact, spent = measures.continued(OpenMythos.from_pretrained("parity-halting"), study.fresh_strings(16), 32, 1)
    assert exact == 1.0 and len(spent) == 8 and all(2 <= median <= most <= 32 for median, most in spent) and spent[0][1] > spent[-1][1]
