import json
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mythos_core import OpenMythos
from mythos_core.__main__ import main
from mythos_core.model.config import parity_config
from mythos_core.model.model import PRETRAINED, shipped
from mythos_core.proof.certificate import certify
from mythos_core.tasks.machines import Machine, machine
from mythos_core.tasks.parity import make_batch
from mythos_core.training import NotProved, Run, step, train, train_all, trainer
from mythos_core.training.losses import (
    center_loss,
    mean_loss,
    means_by,
    move_weights,
    numbered,
    ponder,
    spread_ratio,
    state_loss,
)
from mythos_core.training.recipes import (
    RECIPES,
    Recipe,
    contracting_recipe,
    doubling_recipe,
    get_recipe,
    recipe_for,
)
from mythos_core.training.run import finished
from mythos_core.training.schedule import draw, fall, learning_rate
from mythos_core.training.step import held_out

pytestmark = pytest.mark.usefixtures("without_shape_checks")

SHORT = replace(get_recipe("parity-carrying"), steps=12, batch=8)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(),
                                                 b.model.state_dict().values()))


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 5)


@pytest.fixture
def at_step(monkeypatch):
    """Have something happen in the place of a step's learning rate."""
    original = step.learning_rate

    def plan(number, act):
        def rate(recipe, s, span):
            return (act() if s == number else None) or original(recipe, s, span)
        monkeypatch.setattr(step, "learning_rate", rate)
    return plan


def test_same_seed_same_bits_and_torch_s_own_generator_untouched():
    before = torch.get_rng_state()
    a, b, c = (train(SHORT, 3, progress=False), train(SHORT, 3, progress=False),
               train(SHORT, 4, progress=False))
    assert same(a, b) and not same(a, c)
    assert [row["loss"] for row in a.history] == [row["loss"] for row in b.history]
    assert torch.equal(before, torch.get_rng_state())


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, at_step, often, number):
    whole, before = train(SHORT, 1, progress=False), signal.getsignal(number)
    at_step(7, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, 1, progress=False, out=tmp_path)
    assert signal.getsignal(number) is before
    assert len(torch.load(tmp_path / "checkpoint.pt")["history"]) == 8      # the step is finished
    at_step(None, None)
    resumed = train(SHORT, 1, progress=False, out=tmp_path, resume=True)
    assert same(whole, resumed)
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]
    assert torch.equal(OpenMythos.from_pretrained(tmp_path)(torch.ones(1, 3, dtype=torch.int64)),
                       resumed.model(torch.ones(1, 3, dtype=torch.int64)))


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good_checkpoint(
        tmp_path, at_step, often):
    at_step(7, lambda: float("inf"))  # which makes the weights of step 8 infinite
    with pytest.raises(FloatingPointError, match="step 8 of recipe parity-carrying"):
        train(SHORT, 0, progress=False, out=tmp_path)
    at_step(None, None)
    assert same(train(SHORT, 0, progress=False, out=tmp_path, resume=True),
                train(SHORT, 0, progress=False))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(SHORT, 1, progress=False, out=tmp_path)
    with pytest.raises(ValueError, match="seed 1"):
        train(SHORT, 2, progress=False, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="recipe"):
        train(replace(SHORT, lr=1e-3), 1, progress=False, out=tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(OSError, match=r"checkpoint.pt: damaged"):
        train(SHORT, 1, progress=False, out=tmp_path, resume=True)


def test_a_second_signal_does_not_wait_and_saves_no_half_of_a_step(tmp_path, at_step, often):
    def insist():
        interrupt()
        interrupt()
    at_step(7, insist)
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, 1, progress=False, out=tmp_path)
    assert len(torch.load(tmp_path / "checkpoint.pt")["history"]) == 5


@pytest.mark.parametrize("changes, arguments, named", [
    (dict(steps=0), {}, "steps = 0: must be at least 1"),
    (dict(steps=-5), {}, "steps = -5: must be at least 1"), (dict(batch=0), {}, "batch = 0"),
    ({}, dict(seed=-1), "seed = -1: must be in 0"), ({}, dict(seed=2 ** 70), "seed = 11805"),
    ({}, dict(device="gpu"), "device = 'gpu'"), ({}, dict(device="cpu:x"), "device = 'cpu:x'"),
    ({}, dict(device="meta"), "device = 'meta': must be one that holds numbers")])
def test_what_no_training_could_begin_with_is_refused_by_name(tmp_path, changes, arguments, named):
    with pytest.raises(ValueError, match=named):
        train(replace(SHORT, **changes), progress=False, out=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_an_out_that_cannot_be_a_folder_is_refused_before_the_first_step(tmp_path, at_step):
    at_step(0, lambda: pytest.fail("a step ran"))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        train(SHORT, progress=False, out=tmp_path / "file")


def test_runs_in_processes_are_the_runs_alone():
    jobs = [(replace(SHORT, steps=3), 0), (replace(SHORT, steps=2), 1),
            (replace(SHORT, steps=2), 1)]
    runs = train_all(jobs, progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for (recipe, seed), run in zip(jobs, runs):
        assert ((run.recipe, run.seed) == (recipe, seed)
                and same(run, train(recipe, seed, progress=False)))
    torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="recipe = 'parity'"):
        train_all([("parity", 0)], progress=False)


def test_an_observer_sees_every_step():
    seen = []
    run = train(replace(SHORT, steps=3), progress=False,
                observer=lambda run: seen.append((run.history[-1]["step"], len(run.history))))
    assert seen == [(0, 1), (1, 2), (2, 3)] and len(run.history) == 3


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'parity-carrying', 'parity-extrapolating', "
                       r"'parity-seed', 'state-A5', "):
        train("parity", progress=False)


def test_schedule_and_draws():
    recipe = get_recipe("parity-carrying")
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert (rates[0] == pytest.approx(recipe.lr / 50) and rates[119] == recipe.lr
            and rates[-1] < 0.02 * recipe.lr)
    for done in (0, 60, 120, 149, 150, 599):
        cap = min(16, max(3, int(3 + done / 150 * 16)))
        lengths, loops = zip(*(draw(recipe, done) for _ in range(600)))
        assert ((min(lengths), max(lengths)) == (min(9, cap), cap)
                and (min(loops), max(loops)) == (1, 16))
    tied = [draw(replace(recipe, spare_loops=4, lengths=(2, 16)), 599) for _ in range(600)]
    assert all(t <= min(16, length + 4) for length, t in tied) and (2, 6) in tied
    assert {draw(get_recipe("parity-seed"), 0) for _ in range(9)} == {(24, 3)}


def test_a_machine_s_lengths_take_turns_and_draw_nothing():
    recipe, before = get_recipe("state-S3"), torch.get_rng_state()
    lengths, loops = zip(*(draw(recipe, step) for step in range(recipe.steps)))
    assert torch.equal(torch.get_rng_state(), before) and set(loops) == {None}
    grown = int(recipe.curriculum * recipe.steps)
    assert all(sorted(lengths[step:step + 8]) == list(range(9, 17))
               for step in range(grown, recipe.steps - 8))
    assert (lengths[0], max(lengths[:grown // 2])) == (3, 10)
    assert {draw(replace(recipe, lengths=(24, 24), curriculum=0.0), step)[0]
            for step in range(9)} == {24}


@pytest.mark.parametrize("reach, loops, scored", [(1.0, 3, 3), (1.5, 3, 4), (None, 3, 10),
                                                  (1.5, 9, 10)])
def test_the_loss_sees_only_what_the_loops_reach(reach, loops, scored, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, targets: seen.append(len(logits))
                        or (logits * 0).sum())
    train(replace(SHORT, steps=1, batch=2, lengths=(10, 10), curriculum=0.0, loops=(loops, loops),
                  reach=reach), progress=False)
    assert seen == [2 * scored]


def test_the_articles_recipe_is_the_articles():
    recipe = get_recipe("parity-seed")
    assert (recipe == Recipe("parity-seed", parity_config(), steps=600, batch=64, lr=3e-4,
                             lengths=(24, 24), loops=(3, 3)))


def test_balance_is_part_of_a_step():
    run = train(replace(SHORT, config=replace(SHORT.config, balance_rate=0.01)), progress=False)
    bias = run.model.recurrent.block.ffn.router_bias
    assert bias.any() and bias.abs().max() <= 12 * 0.01 + 1e-6


@pytest.mark.parametrize("length, n_loops", [(16, 16), (64, 64)])
def test_the_shipped_model_extrapolates(length, n_loops):
    ids, targets = make_batch(64, length, torch.Generator().manual_seed(length))
    with torch.no_grad():
        right = OpenMythos.from_pretrained("parity-carrying")(ids, n_loops).argmax(-1) == targets
    assert right.all()


@pytest.mark.parametrize("name", sorted(set(shipped()) & set(RECIPES)))
def test_the_shipped_models_reach_what_their_provenance_says(name):
    config = (PRETRAINED / name / "config.json").read_text(encoding="utf-8")
    metrics = json.loads(config)["provenance"]["metrics"]
    assert (held_out(OpenMythos.from_pretrained(name), get_recipe(name))
            == pytest.approx(metrics["held_out"], abs=0.01))


def test_command_line(tmp_path, capsys):
    main(["train", "--recipe", "parity-carrying", "--seed", "5", "--steps", "3", "--out",
          str(tmp_path)])
    assert "seed 5: loss" in capsys.readouterr().out
    assert (json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["provenance"]["seed"]
            == 5)
    assert len(json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))) == 3
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "none", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, named", [
    (["--steps", "0"], "steps = 0"), (["--steps", "-5"], "steps = -5"),
    (["--seed", "-1"], "seed = -1"), (["--device", "gpu"], "device = 'gpu'"),
    (["--device", "meta"], "device = 'meta': must be one that holds numbers")])
def test_the_command_refuses_bad_arguments_by_name(tmp_path, capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "parity-carrying", "--out", str(tmp_path), *arguments])
    assert stop.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_saves_when_it_is_told_to_stop(tmp_path, capsys, at_step, number, code):
    at_step(3, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "parity-carrying", "--out", str(tmp_path)])
    assert stop.value.code == code and "go on with --resume" in capsys.readouterr().err
    assert len(torch.load(tmp_path / "checkpoint.pt")["history"]) == 4


@pytest.mark.parametrize("recipe, options", [
    (recipe_for(machine("even-pairs")), ""),
    (doubling_recipe(machine("even-pairs")), "--doubling "),
    (contracting_recipe(machine("even-pairs")), "--contracting ")])
def test_a_model_says_the_command_that_trains_it_again(recipe, options):
    row = {"loss": 0.0, "accuracy": 1.0, "held_out": 1.0}
    said = trainer.provenance(Run(replace(recipe, steps=7), 3, None, [row]))["command"]
    assert said == (f"mythos train {options}--machine even-pairs --seed 3 "
                    "--steps 7 --out DIR")


def test_the_ponder_cost_is_the_loops_taken_and_the_weight_of_the_last():
    # (T, 1, S): stop after 2, 1, 3
    weight = torch.tensor([[0.2, 1.0, 0.5], [0.8, 0.0, 0.25], [0.0, 0.0, 0.25]])[:,
        None].requires_grad_()
    cost = ponder(weight)
    assert cost.item() == pytest.approx((2.8 + 2.0 + 3.25) / 3)
    cost.backward()
    assert torch.equal(weight.grad[:, 0] > 0,
                       torch.tensor([[False, True, False], [True, False, False],
                                     [False, False, True]]))


@pytest.mark.parametrize("changes", [dict(ponder_cost=0.01), dict(balance_loss=0.01)])
def test_every_loss_trains(changes):
    recipe = get_recipe("parity-carrying")
    inner = ({"halting": "act_remainder", "halt_bias": -3.0, "min_loops": 3}
             if "ponder_cost" in changes else {})
    inner |= {k: v for k, v in changes.items() if k == "balance_loss"}
    recipe = replace(recipe, steps=6, config=replace(recipe.config, **inner),
                     **{k: v for k, v in changes.items() if k != "balance_loss"})
    plain = replace(recipe, ponder_cost=0.0, config=replace(recipe.config, balance_loss=0.0))
    a, b = (train(r, 3, progress=False) for r in (recipe, plain))
    assert not torch.equal(a.model.embed.weight, b.model.embed.weight)


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    """Parity from nothing to a proof, and the folder that it leaves."""
    out = tmp_path_factory.mktemp("proved")
    return train("parity-extrapolating", 11, progress=False, out=out), out


def test_a_machines_training_ends_when_it_is_proved_for_real(proved):
    run, out = proved
    assert run.certificate.proved and run.certificate.machine == machine("parity").minimal()
    assert (run.certificate.model is run.model and len(run.model.recurrent.codes)
            == len(run.certificate.codes))
    begin, end = fall(run.history)
    assert (len(run.history) == end < run.recipe.steps and run.history[begin - 1]["proved"]
            and run.history[-1]["proved"])
    # nothing is tried while the rate falls
    assert all("proved" not in row for row in run.history[begin:-1])
    again = OpenMythos.from_pretrained(out)
    assert certify(again, machine("parity")).proved
    assert (json.loads((out / "certificate.json").read_text(encoding="utf-8"))
            == run.certificate.summary())
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert (about["metrics"]["steps"] == end and Machine.from_table([[0, 1], [1, 0]])
            == machine("parity"))


def test_a_proved_training_that_was_interrupted_goes_on_to_the_same_bits(
        proved, tmp_path, at_step, often):
    run, _ = proved
    at_step(fall(run.history)[0] + 7, interrupt)                            # within the fall
    with pytest.raises(KeyboardInterrupt):
        train("parity-extrapolating", 11, progress=False, out=tmp_path)
    at_step(None, None)
    resumed = train("parity-extrapolating", 11, progress=False, out=tmp_path, resume=True)
    assert same(run, resumed) and len(resumed.history) == len(run.history)


def test_a_training_that_ends_unproved_is_an_error_that_says_what_failed(tmp_path, capsys):
    recipe = replace(get_recipe("parity-extrapolating"), steps=3)
    with pytest.raises(NotProved, match=r"parity-extrapolating, seed 0: not proved in 3 steps: a "
                       r"string of length \d+ is answered wrong"):
        train(recipe, 0, progress=False, out=tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "checkpoint.pt").exists()
    assert main(["train", "--machine", "Z3", "--steps", "2", "--out", str(tmp_path / "cli")]) == 2
    assert "Z3, seed 0: not proved in 2 steps" in capsys.readouterr().err


def rows(*proofs, steps=40):
    """A history in which proofs were tried after the steps named, with their outcome."""
    tried = dict(proofs)
    return [{"step": i} | ({"proved": tried[i + 1]} if i + 1 in tried else {})
            for i in range(steps)]


def test_the_rate_falls_from_a_proof_for_as_many_steps_and_again_if_the_proof_is_lost(monkeypatch):
    monkeypatch.setattr("mythos_core.training.schedule.LEAST_FALL", 5)
    assert fall(rows((10, False))) is None
    assert fall(rows((10, False), (20, True))) == (20, 40) and fall(rows((2, True))) == (2, 7)
    assert fall(rows((10, True), (20, False), (25, True))) == (25, 50)
    refused = [(step, False) for step in range(1, 21)]
    assert fall(rows(*refused[:-1])) is None and fall(rows(*refused)) == (20, 40)
    again = [(step, False) for step in range(40, 61)]            # the first of them ends the fall
    assert fall(rows(*refused, *again[:-1], steps=99)) == (20, 40)
    assert fall(rows(*refused, *again, steps=99)) == (60, 120)
    recipe = replace(get_recipe("parity-extrapolating"), steps=99)
    assert ([learning_rate(recipe, step, (40, 60)) / recipe.lr for step in (39, 40, 50, 59, 60)]
            == pytest.approx([1, 1, 0.525, 0.0975, 1]))
    model = OpenMythos(recipe.config)
    done, lost = (Run(recipe, 0, model, rows((10, True), (20, last), steps=20))
                  for last in (True, False))
    assert (finished(done) and not finished(lost)
            and not finished(Run(recipe, 0, model, rows((10, True), steps=19))))


def test_the_center_loss_is_the_spread_of_states_that_mean_the_same():
    h, states = (torch.randn(3, 4, 5, dtype=torch.float64),
                 torch.tensor([[0, 1, 0, 7], [1, 1, 7, 0], [0, 0, 1, 7]]))
    label, labels = numbered(states)
    assert (labels, label.unique().tolist()) == (3, [0, 1, 2])
    spread = sum((h[states == s] - h[states == s].mean(0)).square().sum() for s in (0, 1, 7))
    assert center_loss(h, label, labels).item() == pytest.approx((spread / h.square().sum()).item())
    means = means_by(h.flatten(0, 1), label.flatten(), labels).view_as(h)
    assert center_loss(means, label, labels).item() == pytest.approx(0, abs=1e-12)


def test_the_state_loss_tells_which_mean_is_nearest_and_each_label_counts_the_same():
    h = torch.randn(2, 6, 5, dtype=torch.float64)
    label = torch.tensor([6 * [0], [3, 3, 0, 0, 1, 0]])
    means = [h[label == s].mean(0) for s in (0, 1, 3)]
    far = torch.stack([(h - mean).square().sum(-1) for mean in means], -1)
    log = F.log_softmax(-10 * far / h.square().sum(-1).mean(), -1)
    by_hand = -sum(log[label == s][:, i].mean() for i, s in enumerate((0, 1, 3))) / 3
    # a label that none has changes nothing: of several seeds one batch may lack it
    assert state_loss(h, label, 5).item() == pytest.approx(by_hand.item())
    assert state_loss(h, *numbered(label)).item() == pytest.approx(by_hand.item())
    apart = 9 * F.one_hot(label, 5).double()
    assert state_loss(apart, label, 5) < 1e-6 < state_loss(torch.ones_like(h), label, 5)


def test_a_plain_word_is_learned_from_which_one_string_in_many_differs():
    """The answers alone do not do: 1,500 steps left "AGG" behind what no word begins with right."""
    of = machine("regex:CCAGG")
    assert recipe_for(of).state_loss and not recipe_for(machine("S3")).state_loss
    run = train(recipe_for(of, steps=600), progress=False)
    assert run.certificate.proved and run.certificate.machine == of.minimal()


def test_a_regular_expression_becomes_a_proved_model_at_the_command_line(tmp_path, capsys):
    of = machine("regex:(ab)*")
    main(["train", "--machine", of.name, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "regex:(ab)*: at most 4,000 steps, which take " in said and ", proved by " in said
    model = OpenMythos.from_pretrained(tmp_path)
    assert certify(model, of).proved
    text = of.encode("ababb")
    assert model(text).argmax(-1).tolist() == [[1, 2, 1, 2, 1]]
    kept = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    assert kept["proved"] and kept["machine"]["next_state"] == of.next_state.tolist()
    assert (tmp_path / "automaton.png").stat().st_size > 5000
    command = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert "--machine 'regex:(ab)*' --seed 0" in command["command"]


def test_a_machine_too_large_to_be_trained_is_refused():
    large = Machine.from_table(torch.zeros(201, 100, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"machine 'table' has 201 states x 100 letters: must be"):
        recipe_for(large)


def test_rare_moves_weigh_as_much_as_common_ones():
    of = machine("regex:(ab)*c")
    ids = of.encode("abccccccc").repeat(3, 1)
    weight, moves = move_weights(of, ids), of.moves(ids)
    for move in moves.unique():
        assert weight[moves == move].sum() == pytest.approx(1.0)
    logits, targets = torch.randn(27, 4), of.answers(ids).flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    found = mean_loss(logits, targets, weight.flatten())
    by_hand = torch.stack([losses[moves.flatten() == move].mean() for move in moves.unique()])
    torch.testing.assert_close(found, by_hand.mean())
    torch.testing.assert_close(mean_loss(logits, targets, None), losses.mean())


def test_any_machine_has_a_recipe():
    of = Machine.from_table([[1, 2, 0], [0, 2, 2], [2, 1, 0]], name="mine")
    recipe = recipe_for(of, steps=7, **{"config.window": 2})
    assert ((recipe.name, recipe.machine, recipe.steps, recipe.config.window,
             recipe.config.vocab_size) == ("mine", of, 7, 2, 4))
    assert (recipe.lengths[1] <= 16
            and json.loads(json.dumps(recipe.as_dict()))["machine"]["next_state"]
            == [[1, 2, 0], [0, 2, 2], [2, 1, 0]])


# Dilated models

def test_a_dilated_model_takes_its_loops_in_turn_and_strings_as_long_as_they_read():
    recipe, before = get_recipe("doubling-S3"), torch.get_rng_state()
    drawn = [draw(recipe, step) for step in range(6)]
    assert drawn == [(2, 1), (4, 2), (8, 3)] * 2
    assert torch.equal(before, torch.get_rng_state())
    assert (recipe.lengths[1], recipe.loops[1]) == (8, 3)       # what the pages say of it


def test_every_loop_is_asked_for_what_it_has_read():
    """The machine's answers to the last 2^t letters, as if the string began with them."""
    asked, recipe = machine("S3"), get_recipe("doubling-S3")
    run = train_steps(recipe, 3)
    ids, _ = asked.make_batch(4, 8, torch.Generator().manual_seed(0))
    logits, targets, also = step._scanned(run, ids, 3)
    windows = torch.cat(asked.monoid().windows(ids, 3), 1)
    assert torch.equal(targets, asked.monoid().answer[windows].flatten())
    assert logits.shape == (3 * 4 * 8, recipe.config.vocab_size) and also == 0.0


def train_steps(recipe, steps):
    run, optimizer = trainer.begin(recipe, 0, None, None, False)
    for i in range(steps):
        run.history.append({"step": i, **step.take_step(run, optimizer, i)})
    return run


@pytest.mark.parametrize("seed", [11, 12])
def test_a_dilated_model_is_trained_until_it_is_proved(seed, tmp_path):
    run = train("doubling-parity", seed, progress=False, out=tmp_path)
    assert run.certificate.proved and run.model.config.codes == 2
    again = OpenMythos.from_pretrained(tmp_path)
    assert certify(again, machine("parity")).proved
    kept = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    assert kept["proved"] and kept["routing_margin"] is None    # as JSON has no infinity


def test_spread_over_distance_is_small_where_labels_are_apart_and_not_where_all_is_one():
    label = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]])
    assert spread_ratio(apart, label, 2) == pytest.approx(0.25 / 100)
    assert spread_ratio(apart / 1000, label, 2) == pytest.approx(0.25 / 100)   # of no scale
    assert spread_ratio(apart[[0, 2, 1, 3]], label, 2) > 1
    states = apart.clone().requires_grad_()
    spread_ratio(states, label, 2).backward()
    assert states.grad.isfinite().all()
