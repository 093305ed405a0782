"""Peers and reference: the models, their training, and the proof that recurrent ones can have."""
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median

import peer
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch import nn

from mythos_core import OpenMythos, from_open_mythos, study
from mythos_core.probes import DepthSweep
from mythos_core.study import peers, reference
from mythos_core.study.peers import (
    GRU,
    PEERS,
    LinearRecurrence,
    Recurrent,
    accuracy,
    budgeted,
    count,
    fit,
    rows_of,
    transformer,
)
from mythos_core.tasks.automaton import Machine
from mythos_core.tasks.machines import machine
from mythos_core.training import NotProved
from mythos_core.training.losses import mean_loss, move_weights
from mythos_core.training.recipes import get_recipe, recipe_for
from mythos_core.training.schedule import draw

pytestmark = pytest.mark.usefixtures("without_shape_checks")

PARITY = recipe_for(machine("parity"))


def test_the_grids_name_what_can_be_trained():
    trained = {"peers": list(PEERS), "reference": list(reference.TRAINED)}
    assert trained == study.TRAINED


class Exact(Recurrent):
    """A machine itself: h is one-hot in (state, answer just given), or 0 before the first letter.
    What it answers comes from `answer`, the table by which it moves from `move`."""

    def __init__(self, asked, move=None, answer=None):
        nn.Module.__init__(self)
        self.asked, self.vocab = asked, asked.vocab_size
        self.width = len(asked) * self.vocab
        self.move = asked.next_state if move is None else move
        self.said = asked.answer if answer is None else answer

    def step(self, h, ids):
        state = torch.where(h.any(1), h.argmax(1) // self.vocab, self.asked.start)
        after, answer = self.move[state, ids - 1], self.said[state, ids - 1]
        return F.one_hot(after * self.vocab + answer, self.width).float()

    def answer(self, h):
        return F.one_hot(h.argmax(-1) % self.vocab, self.vocab).float()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("asked", ["parity", "brackets-2-3"])
def test_peers_have_the_parameters_of_the_recipe_s_model_or_hardly_fewer(name, asked):
    recipe = recipe_for(machine(asked))
    model, budget = PEERS[name](recipe), count(OpenMythos(recipe.config))
    assert 0.97 < count(model) / budget <= 1
    if isinstance(model, Recurrent):
        c = recipe.config
        wider = model.parts(c.vocab_size, c.dim, model.width + 1)
        assert count(wider) > budget


def test_a_gru_is_torch_s():
    model, ids = GRU(PARITY), torch.randint(1, 3, (3, 9))
    theirs = nn.GRU(PARITY.config.dim, model.width, batch_first=True)
    theirs.load_state_dict({f"{name}_l0": value for name, value in model.cell.state_dict().items()})
    assert torch.allclose(model.states(ids), theirs(model.embed(ids))[0], atol=1e-6)
    assert torch.allclose(model(ids), model.head(theirs(model.embed(ids))[0]), atol=1e-6)


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_a_linear_recurrence_sums_what_the_letters_add_times_the_eigenvalues_behind(least):
    model, ids = LinearRecurrence(PARITY, least).double(), torch.randint(1, 3, (3, 9))
    with torch.no_grad():
        model.a.weight.mul_(20)
    x = model.embed(ids)
    a = {0.0: model.a(x).sigmoid(), -1.0: (model.a(x) / 2).tanh()}[least]
    assert least <= a.min() and a.max() <= 1 and (a < 0).any() == (least < 0)
    wanted = [sum(a[:, j + 1:i + 1].prod(1) * model.b(x)[:, j] for j in range(i + 1))
              for i in range(9)]
    assert torch.allclose(model.states(ids), torch.stack(wanted, 1))


def images(model, codes):
    """Which code the image of each code by letter 2 is nearest to."""
    with torch.no_grad():
        after = model.step(codes, torch.full((len(codes),), 2))
    return torch.cdist(after, codes).argmin(1).tolist()


class Dense(LinearRecurrence):
    """With a whole matrix in place of the diagonal."""

    def step(self, h, ids):
        return h @ torch.randn(self.width, self.width) + self.b(self.embed(ids))


@pytest.mark.parametrize("kind, least, circle", [
    (LinearRecurrence, 0.0, [1, 0]), (LinearRecurrence, 0.0, [1, 2, 0]),
    (LinearRecurrence, -1.0, [1, 2, 0]), (LinearRecurrence, -1.0, [1, 2, 3, 0]),
    (Dense, 0.0, [1, 0]), (Dense, 0.0, [1, 2, 0])])
def test_what_no_linear_recurrence_does_with_one_code_a_state(kind, least, circle):
    """Of two codes none swaps them with eigenvalues above 0, and of three or more none moves them
    in a circle: see `LinearRecurrence`. One that is not diagonal does, by chance."""
    model, found = kind(PARITY, least), []
    for _ in range(300):
        for parameter in (*model.a.parameters(), *model.b.parameters()):
            nn.init.normal_(parameter, std=0.1)
        found.append(images(model, torch.randn(len(circle), model.width)))
    assert (circle in found) == (kind is Dense)
    assert len(set(map(tuple, found))) > 1 or least == 0


def test_eigenvalues_below_0_swap_two_codes():
    model = LinearRecurrence(PARITY, -1.0)
    for parameter in (*model.a.parameters(), *model.b.parameters()):
        nn.init.zeros_(parameter)
    nn.init.constant_(model.a.bias, -9.0)
    assert images(model, torch.tensor([[-1.0], [1.0]]).expand(2, model.width)) == [1, 0]


def test_a_transformer_reads_all_positions_before_once():
    model, ids = transformer(recipe_for(machine("S3"))).eval(), torch.randint(1, 7, (1, 300))
    seen = []
    with torch.no_grad():
        first = model(ids, observer=seen.append)
        assert len(seen) == 1
        ids[0, 0] = ids[0, 0] % 6 + 1
        assert not torch.equal(first[0, -1], model(ids)[0, -1])
        ids[0, -1] = ids[0, -1] % 6 + 1
        assert torch.allclose(model(ids)[0, :-1], model(ids[:, :-1])[0], atol=1e-5)


def rounded_is_right(model, asked, length):
    """Whether the model, each state replaced by the nearest code, answers all strings right."""
    ids = torch.tensor(list(product(range(1, asked.letters + 1), repeat=length)))
    codes, h = peers._codes(model, asked), torch.zeros(len(ids), model.width)
    for letter, due in zip(ids.unbind(1), asked.answers(ids).unbind(1)):
        h = codes[torch.cdist(model.step(h, letter), codes).argmin(1)]
        if not torch.equal(model.answer(h).argmax(-1), due):
            return False
    return True


def changed_by_one(table, values):
    """A table with one entry another number below `values`, for each entry."""
    for at in range(table.numel()):
        other = table.flatten().clone()
        other[at] = (other[at] + 1) % values
        yield other.view_as(table)


@pytest.mark.parametrize("name, rows, length", [
    ("parity", 6, 6), ("S3", 42, 4), ("even-pairs", None, 6), ("regex:(ab)*c", None, 6),
    ("brackets-1-4", None, 9)])
def test_rows_are_closed_if_and_only_if_the_rounded_model_is_right(name, rows, length):
    """Of a machine itself, and with any one move or any one answer wrong. Rounding mends some of
    these: where most moves to a state are right, their mean is nearest to the wrong one's too."""
    asked = machine(name)
    found = rows_of(Exact(asked), asked)
    assert found and found == (rows or found)
    flawed = [Exact(asked, move=move) for move in changed_by_one(asked.next_state, len(asked))]
    flawed += [Exact(asked, answer=answer)
               for answer in changed_by_one(asked.answer, asked.vocab_size)]
    flawed.append(Exact(asked, move=asked.next_state.roll(1, 1)))    # each letter moves as another
    closed = [rows_of(model, asked) is not None for model in flawed]
    assert closed == [rounded_is_right(model, asked, length) for model in flawed]
    assert not all(closed)


def test_a_row_that_no_string_leads_to_may_be_wrong():
    asked = Machine("with an idle state", torch.tensor([[0, 1], [1, 0], [2, 2]]),
                    torch.tensor([[1, 2], [2, 1], [1, 1]]))
    idle = asked.answer.clone()
    idle[2] = 2
    assert rows_of(Exact(asked, answer=idle), asked) == 6


def test_a_budgeted_recipe_has_the_lengths_of_the_machine_s():
    recipe = budgeted(PARITY)
    assert recipe.steps == peers.BUDGET < PARITY.steps

    def lengths(recipe):
        return [draw(recipe, step)[0] for step in range(300)]

    assert lengths(recipe) == lengths(PARITY) and min(lengths(recipe)) == 3


def test_fitting_learns_proves_and_leaves_the_generator_alone():
    recipe = replace(budgeted(PARITY), steps=80)
    before = torch.get_rng_state()
    model, history = fit(GRU, recipe, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [row["step"] for row in history] == list(range(80)) and not model.training
    assert history[-1]["rows"] == rows_of(model, recipe.machine) == 6
    again = fit(GRU, recipe, 0)[0]
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    other = fit(GRU, recipe, 1)[0]
    assert not torch.equal(model.head.weight, other.head.weight)


def test_each_move_counts_the_same_in_the_loss_of_a_balanced_recipe():
    recipe = replace(recipe_for(machine("flip-flop")), handed_on=0.0)
    model = GRU(recipe)
    torch.manual_seed(1)
    loss, right = peers._step(model, recipe, 12, None)
    torch.manual_seed(1)
    ids, targets = recipe.make_batch(recipe.batch, 12, strings=recipe.strings)
    weight = move_weights(recipe.machine, ids).flatten()
    logits = model(ids).flatten(0, 1)
    assert torch.allclose(loss, mean_loss(logits, targets.flatten(), weight))
    assert not torch.allclose(loss, mean_loss(logits, targets.flatten(), None))
    assert right == pytest.approx((logits.argmax(-1) == targets.flatten()).float().mean().item())


def test_half_of_a_recurrent_peer_s_states_are_handed_on_as_means():
    recipe = replace(PARITY, handed_on=1.0)
    model = GRU(recipe)
    torch.manual_seed(1)
    loss, _ = peers._step(model, recipe, 5, None)
    torch.manual_seed(1)
    ids, targets = recipe.make_batch(recipe.batch, 5, strings=recipe.strings)
    h, states = torch.zeros(len(ids), model.width), []
    for letter, state in zip(ids.unbind(1), targets.unbind(1)):  # all that mean the same are one
        h = model.step(h, letter)
        states.append(h)
        h = torch.stack([h[state == own].mean(0) for own in state])
    wanted = F.cross_entropy(model.head(torch.stack(states, 1)).flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, wanted, atol=1e-6)


def test_accuracy_says_where_the_first_string_goes_wrong():
    asked = machine("S3")

    class Slips(Exact):
        """Wrong at position 20, in strings that begin with letter 1."""

        def forward(self, ids):
            logits = super().forward(ids)
            logits[ids[:, 0] == 1, 20:21] = F.one_hot(torch.tensor(0), 7).float()
            return logits

    row = accuracy(Slips(asked), asked)
    share = {n: (asked.make_batch(32, int(n), torch.Generator().manual_seed(
        2 ** 31 + int(n)))[0][:, 0] == 1).float().mean().item() for n in row["whole"]}
    assert all(0 < value < 1 for value in share.values())
    assert row["first_wrong"] == {"16": None, "64": 20, "256": 20}
    assert row["whole"] == pytest.approx({"16": 1, "64": 1 - share["64"], "256": 1 - share["256"]})
    assert row["token"] == pytest.approx({"16": 1, "64": 1 - share["64"] / 64,
                                          "256": 1 - share["256"] / 256})


def test_a_peer_s_row_says_whether_its_rows_are_closed(monkeypatch):
    monkeypatch.setattr(peers, "BUDGET", 60)
    row = peers.peer_row("GRU", PARITY, 0)
    assert row["rows"] == 6 and row["first_closed"] % 10 == 9 and row["steps"] == 60
    monkeypatch.setattr(peers, "BUDGET", 3)
    row = peers.peer_row("linear, eigenvalues in (0, 1)", PARITY, 0)
    assert row["rows"] is None and row["first_closed"] is None
    assert "rows" not in peers.peer_row("transformer", PARITY, 0)
    with pytest.raises(ValueError, match="peer = 'LSTM': must be one of"):
        peers.peer_row("LSTM", PARITY, 0)


def test_the_reference_is_the_article_s_recipe_but_for_task_and_loops():
    asked = machine("digits-mod-10")
    ours = reference.article(asked, 3)
    assert ours == replace(get_recipe("parity-seed"), name=ours.name, machine=asked,
                           strings="covering")
    assert (ours.steps, ours.batch, ours.lr, ours.lengths) == (600, 64, 3e-4, (24, 24))
    strict = reference.strict(asked)
    assert (strict.steps, strict.batch, strict.lengths, strict.strings) == (
        ours.steps, ours.batch, ours.lengths, ours.strings)
    assert strict.config.strict and not ours.config.strict


def test_the_reference_is_trained_as_open_mythos_would_be():
    """The loss, and its gradients, of the package's own model with the same weights."""
    recipe = reference.article(machine("addition"), 3)
    theirs = peer.model(recipe.config)
    ours = from_open_mythos(theirs.state_dict(), theirs.cfg)
    ids, targets = recipe.make_batch(8, 24, torch.Generator().manual_seed(0))
    for model in (theirs, ours):
        logits = model(ids, n_loops=3)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert torch.allclose(ours(ids, 3), theirs(ids, n_loops=3), atol=1e-5)
    assert torch.allclose(ours.embed.weight.grad, theirs.embed.weight.grad, atol=1e-5)
    assert ours.embed.weight.grad.abs().max() > 1e-3


def test_by_loops_is_what_separate_passes_give():
    asked = machine("addition")
    model = OpenMythos(tiny(init_std=0.3, max_seq_len=64)).eval()
    row = reference.by_loops(model, asked, 8)
    for length in (24, 48):
        ids, targets = asked.make_batch(8, length, torch.Generator().manual_seed(2 ** 31 + length),
                                        strings="touring")
        found = row[str(length)]
        for loops in (1, 2, 5, reference.MOST_LOOPS):
            right = model(ids, loops).argmax(-1) == targets
            assert found["token"][loops - 1] == pytest.approx(right.float().mean().item())
            assert found["last"][loops - 1] == pytest.approx(right[:, -1].float().mean().item())
            assert found["whole"][loops - 1] == pytest.approx(right.all(1).float().mean().item())
    assert len(found["token"]) == reference.MOST_LOOPS


def test_the_peak_is_at_the_fewest_loops_with_the_best_share(monkeypatch):
    correct = torch.zeros(24, 2, 3, dtype=torch.bool)
    correct[:, 0, 0], correct[2:5, 1, 1] = True, True
    monkeypatch.setattr(reference, "depth_sweep", lambda *args: DepthSweep(
        correct, torch.arange(1, 25).clamp(max=7)))
    model = OpenMythos(tiny())
    row = reference.by_loops(model, machine("parity"), 2)["24"]
    assert row["peak"] == 3 and row["executed"] == 7 and max(row["token"]) == pytest.approx(2 / 6)


def test_a_reference_row_is_of_one_training_and_says_why_a_strict_one_is_not_proved(monkeypatch):
    def brief(make, recipe, seed, device):
        return make(recipe).eval(), [{"loss": recipe.loops[0] + seed}]

    def unproved(recipe, seed, device, progress):
        raise NotProved(f"{recipe.name}, seed {seed}: not proved")

    monkeypatch.setattr(reference, "fit", brief)
    monkeypatch.setattr(reference, "train", unproved)
    asked = machine("parity")
    row = reference.reference_row("article, 8 loops", asked, 4)
    assert row["loss"] == 8 + 4 and row["by_loops"]["24"]["executed"] <= 24
    assert reference.reference_row("strict", asked, 4) == {
        "recipe": reference.strict(asked).as_dict(), "proved": False,
        "reason": "parity, seed 4: not proved"}
    with pytest.raises(ValueError, match="peer = 'theirs': must be one of"):
        reference.reference_row("theirs", asked, 4)


PAGE = (Path(__file__).parents[2] / "docs" / "peers.md").read_text(encoding="utf-8")


def by_loops_table():
    """What docs/peers.md quotes of the measure `reference`: right tokens of strings as long as
    trained, the mean of the seeds; by seed, the loops after which there were most, and how many
    points were lost by the last loop. Strict models that were not proved have no loops."""
    rows, shown = study.load(study.RESULTS / "reference.json"), (1, 3, 8, 16, reference.MOST_LOOPS)
    lines = [f"| task | recipe | {' | '.join(map(str, shown))} | best after | lost by 24 |",
             "|---" * (len(shown) + 4) + "|"]
    for asked, name in product(study.MEASURED["reference"], reference.TRAINED):
        of = [row for row in rows if (row["variant"], row["peer"]) == (asked, name)]
        swept = [row["by_loops"]["24"] for row in of if "by_loops" in row]
        proved = f", {len(swept)} of {len(of)} proved" if name == "strict" else ""
        cells = [f"`{asked.removeprefix('machine ')}`", name + proved,
                 *(f"{mean(100 * row['token'][n - 1] for row in swept):.0f}" for n in shown),
                 ", ".join(str(row["peak"]) for row in swept),
                 ", ".join(f"{100 * (max(row['token']) - row['token'][-1]):.1f}" for row in swept)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span_of(values):
    """The least and the most, or the one that they all are."""
    values = list(values)
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def peers_table():
    """What docs/peers.md quotes of the measure `peers`: strings whole by length in %, over the
    seeds; on how many the rows were closed at the end, and how many rows those are."""
    rows = study.load(study.RESULTS / "peers.json")
    lines = ["| machine | model | whole, 16 elements | 64 | 256 | proved | by rows |",
             "|---|---|---|---|---|---|---|"]
    for asked, name in product(study.MEASURED["peers"], peers.PEERS):
        of = [row for row in rows if (row["variant"], row["peer"]) == (asked, name)]
        whole = [[round(100 * row["whole"][n]) for row in of] for n in ("16", "64", "256")]
        proved = [row["rows"] for row in of if row.get("rows")]
        cells = [f"`{asked.removeprefix('machine ')}`", name, *map(span_of, whole),
                 f"{len(proved)} of {len(of)}" if "rows" in of[0] else "has no table",
                 span_of(proved) if proved else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def random_table():
    """What docs/peers.md quotes of the 40 machines drawn at random: by states times letters of the
    minimal machine how many there are, steps until the first proof, and until the end."""
    rows = [row for row in study.load(study.RESULTS / "machines.json")
            if row["variant"].startswith("machine random")]
    assert len(rows) == 40 and all(row["certificate"]["proved"] for row in rows)
    moves = [sum(map(len, row["recipe"]["machine"]["next_state"])) for row in rows]
    head = ["states x letters", "machines", "steps to the first proof", "steps in all"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for low, high in ((2, 4), (6, 10), (12, 16), (18, 24), (28, 32)):
        of = [row for row, size in zip(rows, moves) if low <= size <= high]
        first = [row["first_proof"]["step"] + 1 for row in of]
        lines.append(f"| {low} to {high} | {len(of)} | {span_of(first)}, median {median(first):g} "
                     f"| {span_of(row['steps'] for row in of)} |")
    assert sum(2 <= size <= 32 for size in moves) == 40
    return "\n".join(lines)


def ladder_table():
    """What docs/peers.md quotes of the measure `ladder`: of each task within 16 elements the
    machine's states, seeds proved, steps; strings whole by length, of 64; elements of the shortest
    string that is answered wrong."""
    rows = study.load(study.RESULTS / "ladder.json")
    head = ["task", "states", "proved", "steps", "whole of 64: 16 elements", "20", "64",
            "first wrong"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for asked in study.MEASURED["ladder"]:
        of = [row for row in rows if row["variant"] == asked]
        assert all(row["closure"]["wrong"] for row in of)
        cells = [f"`{asked.removeprefix('task ').removesuffix(' of 16')}`", str(of[0]["states"]),
                 f"{sum(row['certificate']['proved'] for row in of)} of {len(of)}",
                 span_of(row["steps"] for row in of),
                 *(span_of(row["lengths"][n]["whole"] for row in of) for n in ("16", "20", "64")),
                 span_of(row["closure"]["elements"] for row in of)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [by_loops_table, peers_table, random_table,
                                   ladder_table])
def test_rows_are_quoted(table):
    if table() not in PAGE:
        pytest.fail(f"paste this into docs/peers.md:\n\n{table()}\n", pytrace=False)


def test_what_the_page_says_of_more_loops_is_true_of_every_seed():
    swept = {}
    for row in study.load(study.RESULTS / "reference.json"):
        if "by_loops" in row:
            key = row["variant"].removeprefix("machine "), row["peer"]
            swept.setdefault(key, []).append(row["by_loops"]["24"]["token"])
    lost = {key: [max(token) - token[-1] for token in of] for key, of in swept.items()}
    peak = {key: mean(token.index(max(token)) for token in of) for key, of in swept.items()}
    for task in ("addition", "brackets-2-3"):
        few, many = ((task, f"article, {n} loops") for n in (3, 8))
        assert min(lost[few]) > 0.02 and max(token.index(max(token)) for token in swept[few]) < 6
        assert min(lost[many]) < 0.001 and peak[many] > peak[few] + 1
        assert max(max(token) for token in swept[few] + swept[many]) < 0.999
    for n in (3, 8):
        assert max(max(token) for token in swept["digits-mod-10", f"article, {n} loops"]) < 0.2
    assert not any(any(of) for key, of in lost.items() if key[1] == "strict")


def test_what_the_page_says_of_peers_and_of_the_ladder_is_true_of_every_seed():
    proved, rows = set(), study.load(study.RESULTS / "peers.json")
    for row in rows:
        if row.get("rows"):
            proved.add((row["peer"], row["variant"].removeprefix("machine ")))
    assert {asked for name, asked in proved if name != "GRU"} == {"parity"}
    assert "linear, eigenvalues in (0, 1)" not in {name for name, _ in proved}
    assert any(row.get("rows") and row["whole"]["256"] < 1 for row in rows if row["peer"] == "GRU")
    ours = [row for row in study.load(study.RESULTS / "machines.json")
            if row["variant"] in study.MEASURED["peers"]]
    assert all(row["certificate"]["proved"] for row in ours)
    long = [row["steps"] for row in ours if row["steps"] > peers.BUDGET]
    assert f"{min(long):,} to {max(long):,} for modular arithmetic" in PAGE
    assert {row["variant"] for row in ours if row["steps"] > peers.BUDGET} == {
        "machine modular-arithmetic"}
    for row in study.load(study.RESULTS / "ladder.json"):
        counts = row["variant"] in ("task a^n b^n of 16", "task brackets-1 of 16")
        assert row["certificate"]["proved"] == counts and row["closure"]["wrong"]
        assert row["closure"]["elements"] >= 16 if counts else row["steps"] == 1000


def as_line(row):
    """A published figure as docs/peers.md has it."""
    figures = "; ".join(f"{model} {value}" for model, value in row["values"].items())
    return (f"| {row['paper']}, [{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']}), "
            f"{row['where']} | `{row['machine']}`: {row['task']} | {row['trained']} → "
            f"{row['tested']} | {figures} | {row['measure']}; {row['runs']} | {row['read']} |")


def test_published_figures_are_those_of_the_page():
    file = study.RESULTS / "published_tasks.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    published = PAGE.partition("| source |")[2].partition("## ")[0]
    table = [line for line in published.splitlines() if line.startswith("| ")]
    assert table == [as_line(row) for row in rows]
    for row in rows:
        assert machine(row["machine"]) and row["values"] and row["read"]
