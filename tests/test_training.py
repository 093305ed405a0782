import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from mythos_core import OpenMythos, training
from mythos_core.config import parity_config
from mythos_core.model import PRETRAINED, shipped
from mythos_core.parity import make_batch
from mythos_core.training import (
    HALTING_LOSSES,
    LABELS,
    Recipe,
    draw,
    get_recipe,
    held_out,
    late_start,
    learning_rate,
    main,
    ponder,
    train,
    train_all,
    trajectory,
)

SHORT = replace(get_recipe("parity-extrapolating"), steps=12)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 5)


@pytest.fixture
def at_step(monkeypatch):
    """Have something happen in the place of a step's learning rate."""
    original = training.learning_rate

    def plan(step, act):
        monkeypatch.setattr(training, "learning_rate", lambda recipe, s: act() if s == step else original(recipe, s))
    return plan


def test_same_seed_same_bits_and_torch_s_own_generator_untouched():
    before = torch.get_rng_state()
    a, b, c = train(SHORT, 3, progress=False), train(SHORT, 3, progress=False), train(SHORT, 4, progress=False)
    assert same(a, b) and not same(a, c)
    assert [row["loss"] for row in a.history] == [row["loss"] for row in b.history]
    assert torch.equal(before, torch.get_rng_state())


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, at_step, often):
    whole = train(SHORT, 1, progress=False)
    at_step(7, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, 1, progress=False, out=tmp_path)
    at_step(None, None)
    resumed = train(SHORT, 1, progress=False, out=tmp_path, resume=True)
    assert same(whole, resumed)
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]
    assert torch.equal(OpenMythos.from_pretrained(tmp_path)(torch.ones(1, 3, dtype=torch.int64)), resumed.model(torch.ones(1, 3, dtype=torch.int64)))


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good_checkpoint(tmp_path, at_step, often):
    at_step(7, lambda: float("inf"))                         # which makes the weights of step 8 infinite
    with pytest.raises(FloatingPointError, match="step 8 of recipe parity-extrapolating"):
        train(SHORT, 0, progress=False, out=tmp_path)
    at_step(None, None)
    assert same(train(SHORT, 0, progress=False, out=tmp_path, resume=True), train(SHORT, 0, progress=False))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(SHORT, 1, progress=False, out=tmp_path)
    with pytest.raises(ValueError, match="seed 1"):
        train(SHORT, 2, progress=False, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="recipe"):
        train(replace(SHORT, lr=1e-3), 1, progress=False, out=tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(OSError, match=r"checkpoint.pt: damaged"):
        train(SHORT, 1, progress=False, out=tmp_path, resume=True)


def test_runs_in_processes_are_the_runs_alone():
    jobs = [(replace(SHORT, steps=3), 0), (replace(SHORT, steps=2), 1), (replace(SHORT, steps=2), 1)]
    runs = train_all(jobs, progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for (recipe, seed), run in zip(jobs, runs):
        assert (run.recipe, run.seed) == (recipe, seed) and same(run, train(recipe, seed, progress=False))
    torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="recipe = 'parity'"):
        train_all([("parity", 0)], progress=False)


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'parity-extrapolating', 'parity-halting', 'parity-scan', 'parity-seed', 'state-A5', "):
        train("parity", progress=False)


def test_schedule_and_draws():
    recipe = get_recipe("parity-extrapolating")
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(recipe.lr / 50) and rates[119] == recipe.lr and rates[-1] < 0.02 * recipe.lr
    for step in (0, 60, 120, 149, 150, 599):
        cap = min(16, max(3, int(3 + step / 150 * 16)))
        lengths, loops = zip(*(draw(recipe, step) for _ in range(600)))
        assert (min(lengths), max(lengths)) == (min(9, cap), cap) and (min(loops), max(loops)) == (1, 16)
    tied = [draw(replace(recipe, spare_loops=4, lengths=(2, 16)), 599) for _ in range(600)]
    assert all(t <= min(16, length + 4) for length, t in tied) and (2, 6) in tied
    assert {draw(get_recipe("parity-seed"), 0) for _ in range(9)} == {(24, 3)}


@pytest.mark.parametrize("growth, reach, loops, scored", [(1, 1.0, 3, 3), (1, 1.5, 3, 4), (2, 1.0, 3, 7), (1, None, 3, 10), (2, 1.0, 9, 10)])
def test_the_loss_sees_only_what_the_loops_reach(growth, reach, loops, scored, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, targets: seen.append(len(logits)) or (logits * 0).sum())
    config = replace(SHORT.config, shift_growth=growth)
    train(replace(SHORT, steps=1, batch=2, lengths=(10, 10), curriculum=0.0, loops=(loops, loops), reach=reach, config=config), progress=False)
    assert seen == [2 * scored]


def test_the_articles_recipe_is_the_articles():
    recipe = get_recipe("parity-seed")
    assert recipe == Recipe("parity-seed", parity_config(), steps=600, batch=64, lr=3e-4, lengths=(24, 24), loops=(3, 3))


def test_balance_is_part_of_a_step():
    run = train(replace(SHORT, config=replace(SHORT.config, balance_rate=0.01)), progress=False)
    bias = run.model.recurrent.block.ffn.router_bias
    assert bias.any() and bias.abs().max() <= 12 * 0.01 + 1e-6


def test_the_recipe_learns_16_bits_for_real():
    """Half of the recipe's steps, trained from scratch: every held-out 16-bit string whole."""
    run = train(replace(get_recipe("parity-extrapolating"), steps=300), seed=0, progress=False)
    assert held_out(run.model, run.recipe) == 1.0
    assert run.history[-1]["held_out"] == 1.0 and run.history[0]["loss"] > 0.5


@pytest.mark.parametrize("length, n_loops", [(16, 16), (64, 64), (128, 128)])
def test_the_shipped_model_extrapolates(length, n_loops):
    ids, targets = make_batch(64, length, torch.Generator().manual_seed(length))
    with torch.no_grad():
        right = OpenMythos.from_pretrained("parity-extrapolating")(ids, n_loops).argmax(-1) == targets
    assert right.all()


@pytest.mark.parametrize("name", shipped())
def test_the_shipped_models_reach_what_their_provenance_says(name):
    metrics = json.loads((PRETRAINED / name / "config.json").read_text())["provenance"]["metrics"]
    assert held_out(OpenMythos.from_pretrained(name), get_recipe(name)) == pytest.approx(metrics["held_out"], abs=0.01)


def test_command_line(tmp_path, capsys):
    main(["--recipe", "parity-extrapolating", "--seed", "5", "--steps", "3", "--out", str(tmp_path)])
    assert "seed 5: loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["provenance"]["seed"] == 5
    assert len(json.loads((tmp_path / "history.json").read_text())) == 3
    with pytest.raises(SystemExit) as stop:
        main(["--recipe", "none", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("name", LABELS)
def test_halting_is_taught_by_its_label(name, monkeypatch):
    """A state here holds its answer's logits in channels 0 to 2 and its halting logit in channel 3."""
    torch.manual_seed(1)
    T, B, S = 7, 3, 6
    targets, ids = torch.randint(1, 3, (B, S)), torch.ones(B, S, dtype=torch.int64)
    answers = torch.where(torch.rand(T, B, S) < 0.15, 3 - targets, targets)
    answers[3:, :, 2] = targets[:, 2]
    answers[2:, :, :2] = targets[:, :2]
    own = torch.tensor([[[all(bool((answers[later, b, : i + 1] == targets[b, : i + 1]).all()) for later in range(t, T))
                          for i in range(S)] for b in range(B)] for t in range(T)])
    follows = torch.tensor([[[(answers[t, b, i] == targets[b, i]).item() == (i == 0 or (answers[t, b, i - 1] == targets[b, i - 1]).item())
                              for i in range(S)] for b in range(B)] for t in range(T)])
    labels = {"follows": follows, "ready by row": own, "ready": own.all(1, keepdim=True).expand(T, B, S)}
    may = labels[name]
    assert 0 < may.sum() < may.numel() - S and all(not torch.equal(may, other) for key, other in labels.items() if key != name)

    class Channel(torch.nn.Module):
        def forward(self, seen):
            return seen[..., 3:4]

    model = OpenMythos(tiny(halting="learned", loop_embedding=False, act_threshold=0.5))
    ctx = model.context(ids)
    model.decode, model.recurrent.act.halt = lambda h, ctx: h[..., :3], Channel()

    def loss(halt):
        states = torch.cat([20.0 * F.one_hot(answers, 3), 20.0 * halt[..., None]], -1)
        monkeypatch.setattr(training, "trajectory", lambda *args, **kwargs: (ctx, None, torch.cat([states[:1], states])))
        logits, also = HALTING_LOSSES[name](model, ids, targets, T)
        assert torch.equal(logits, states[-1, ..., :3])
        return also.item()

    halt = 2.0 * may - 1
    assert loss(halt) < 1e-6                                     # no error
    for t, i in ((0, 0), (5, 1), (T - 1, S - 1)):
        flipped = halt.clone()
        flipped[t, 1, i] *= -1
        weight = 1.0 + B if may[t, 1, i] else 6.0 * B            # the worst string stands for all; for cells that may stop the mean counts too
        assert loss(flipped) == pytest.approx(0.5 * weight * 20 / halt.numel(), rel=1e-4)


def test_a_trajectory_starts_where_the_others_did_not_see_the_first_positions():
    config = tiny(halting="learned", loop_embedding=False, lora_rank=0, token_shift=True, window=4, loop_noise=1.0, start_noise=4.0)
    model, ids, states = OpenMythos(config).double(), torch.randint(0, 17, (2, 9)), []
    model.eval().without_halting()(ids, 5, observer=lambda record: states.append(record.h))
    _, _, plain = trajectory(model, ids, 5)
    assert torch.equal(plain[1:], torch.stack(states)) and plain.requires_grad
    ctx = model.context(ids)
    h = e = model.encode(ids, ctx)
    for _ in range(3):
        h, _ = model.recurrent.step(h, e, 0, ctx)
        h = torch.cat([e[:, :training.HEAD], h[:, training.HEAD:]], 1)
    h = torch.cat([states[2][:, :training.HEAD], h[:, training.HEAD:]], 1)          # what they see at last: three loops on
    late = late_start(model, ids, 3)
    assert torch.allclose(late, h) and not torch.allclose(late, states[2])
    assert torch.allclose(trajectory(model, ids, 5, late)[2][1], model.recurrent.step(h, e, 0, ctx)[0])


def test_the_ponder_cost_is_the_loops_taken_and_the_weight_of_the_last():
    weight = torch.tensor([[0.2, 1.0, 0.5], [0.8, 0.0, 0.25], [0.0, 0.0, 0.25]])[:, None].requires_grad_()   # (T, 1, S): stop after 2, 1, 3
    cost = ponder(weight)
    assert cost.item() == pytest.approx((2.8 + 2.0 + 3.25) / 3)
    cost.backward()
    assert torch.equal(weight.grad[:, 0] > 0, torch.tensor([[False, True, False], [True, False, False], [False, False, True]]))


@pytest.mark.parametrize("changes", [dict(halting_loss="ready by row"), dict(halting_loss="follows"),
                                     dict(ponder_cost=0.01), dict(balance_loss=0.01)])
def test_every_loss_trains(changes):
    recipe = get_recipe("parity-halting" if "halting_loss" in changes else "parity-extrapolating")
    inner = {"halting": "act_remainder", "halt_bias": -3.0, "min_loops": 3} if "ponder_cost" in changes else {}
    inner |= {k: v for k, v in changes.items() if k == "balance_loss"}
    recipe = replace(recipe, steps=6, config=replace(recipe.config, **inner), **{k: v for k, v in changes.items() if k != "balance_loss"})
    plain = replace(recipe, halting_loss="ready", ponder_cost=0.0, config=replace(recipe.config, balance_loss=0.0))
    a, b = (train(r, 3, progress=False) for r in (recipe, plain))
    assert not torch.equal(a.model.embed.weight, b.model.embed.weight)
