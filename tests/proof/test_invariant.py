"""Proofs of weights as trained: what the balls of a proof hold, and what is refused."""
import json
import re

import pytest
import torch
from small import strict_model

from mythos_core import OpenMythos, certify, machine
from mythos_core.model.cache import KVCache
from mythos_core.model.model import PRETRAINED
from mythos_core.proof.balls import Ball, length
from mythos_core.proof.choices import with_codes
from mythos_core.proof.closure import Closure
from mythos_core.proof.invariant import Balls, LoopCell, invariant
from mythos_core.proof.scan import Scan
from mythos_core.tasks import Machine

pytestmark = pytest.mark.usefixtures("without_shape_checks")
SHIPPED = ["parity", "addition", "Z5", "S3", "doubling-parity", "doubling-addition"]


STRICT, DOUBLING = ["parity", "addition"], ["doubling-parity", "doubling-addition"]


def asked_of(name):
    return machine(name.removeprefix("doubling-"))


def shipped(name):
    return OpenMythos.from_pretrained(f"contracting-{name}")


def beside(name):
    file = PRETRAINED / f"contracting-{name}" / "certificate.json"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def proofs():
    """Of four, once."""
    return {name: certify(shipped(name), asked_of(name), rounded=False)
            for name in (*STRICT, *DOUBLING)}


@pytest.mark.parametrize("name", [*STRICT, *DOUBLING])
def test_shipped_models_are_proved_again_and_say_so_beside_their_weights(name, proofs):
    proof, asked = proofs[name], asked_of(name)
    assert proof.proved and proof.wrong == 0 and proof.machine in (asked.minimal(), None)
    assert proof.model.config.codes == 0 and proof.safety["state"] > 1.15
    kept = beside(name)
    assert kept["weights"] == proof.summary()["weights"] and kept["proved"]
    assert kept["codes"] == len(kept["table"]["centres"])
    # another processor finds other last digits of the centres, and may need a ball more or less
    assert abs(kept["codes"] - len(proof.codes)) <= 0.2 * kept["codes"]


@pytest.mark.parametrize("name", SHIPPED)
def test_certificates_beside_shipped_weights_are_of_them(name):
    kept = beside(name)
    assert kept["proved"] and kept["asked"] == asked_of(name).minimal().as_dict()
    assert kept["machine"] in (kept["asked"], None) and kept["safety"]["state"] > 1.15
    table = kept["table"]
    assert "products" not in table or kept["contexts"] == len(table["letters"] + table["products"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STRICT)
def test_states_of_any_string_lie_in_the_balls_that_its_letters_lead_to(name, dtype, proofs):
    """Independent of the proof: batches of three shapes, looped and left to right, and long."""
    closure, model, asked = proofs[name].closure, shipped(name).to(dtype), machine(name)
    for batch, seq in ((16, 40), (1, 40), (3, 300)):
        ids, answers = asked.make_batch(batch, seq, torch.Generator().manual_seed(seq + batch))
        with torch.no_grad():
            ctx = model.context(ids)
            e = model.encode(ids, ctx)
            runs = [model.recurrent.settle(e)]
            if seq < 50:
                runs.append(model.recurrent(e, seq, ctx))
        ball = torch.full((batch,), -1)
        for i in range(seq):
            ball = torch.tensor([closure.follows[None if b < 0 else b, letter] for b, letter
                                 in zip(ball.tolist(), (ids[:, i] - 1).tolist())])
            for h in runs:
                far = length(h[:, i].double() - closure.states.codes[ball])
                assert (far <= closure.states.radius).all()
        assert torch.equal(model(ids).argmax(-1), answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DOUBLING)
def test_states_after_each_loop_lie_in_the_balls_of_their_products(name, dtype, proofs):
    """Independent of the proof: two shapes of batch, at once and in pieces behind a cache, three
    loops longer than it takes; each position's ball by the table alone."""
    closure, model, asked = proofs[name].closure, shipped(name).to(dtype), asked_of(name)
    centres, radius = closure.states.codes, closure.states.radius
    for batch, seq in ((16, 40), (1, 300)):
        ids, answers = asked.make_batch(batch, seq, torch.Generator().manual_seed(seq))
        loops = model.recurrent.loops_for(seq) + 3
        whole, parts, cache = [], [], KVCache()
        with torch.no_grad():
            logits = model(ids, loops, observer=lambda record, to=whole: to.append(record.h))
            for part in ids.split(17, 1):
                found = []
                model(part, loops, cache, observer=lambda record, to=found: to.append(record.h))
                parts.append(torch.stack(found))
        kind, held = "letter", (ids - 1).tolist()
        for t, h in enumerate(whole):
            held = [[closure.follows[tuple((kind, row[j]) for j in (i - 2 ** t, i) if j >= 0)]
                     for i in range(seq)] for row in held]
            kind, balls = "code", torch.tensor(held)
            for states in (h, torch.cat([part[t] for part in parts], 1)):
                assert (length(states.double() - centres[balls]) <= radius).all()
        assert torch.equal(logits.argmax(-1), answers)


def test_products_of_any_states_of_two_balls_lie_where_the_cell_says():
    cell, generator = LoopCell(shipped("doubling-parity"), "float32"), torch.Generator()
    x = 2 * torch.randn(6, 32, generator=generator.manual_seed(0)).double()
    alone = [(("code", a),) for a in range(6)]
    pairs = [(*a, *b) for a in alone for b in alone]
    for rows, size in ((pairs, 0.02), (pairs, 0.2), (alone, 0.2)):
        shape = size * torch.eye(32).double().expand(6, -1, -1)
        with torch.no_grad():
            image = cell.multiply(rows, Ball(x, torch.zeros(6, 1).double(), (shape,)))
            for _ in range(20):
                way = torch.randn(6, 32, generator=generator).double()
                found = cell.multiply(rows, Ball.exact(x + size * way / length(way)))
                assert (length(found.x - image.x) <= image.radius).all()


def test_an_image_of_a_ball_lies_where_the_step_says():
    cell, generator = LoopCell(shipped("parity"), "float32"), torch.Generator().manual_seed(0)
    x = 3 * torch.randn(8, 64, generator=generator).double()
    along = (0.05 * torch.eye(64).double().expand(8, -1, -1),)
    with torch.no_grad():
        image = cell.step(Ball(x, torch.zeros(8, 1).double(), along), torch.zeros(8).long())
        for _ in range(20):
            way = torch.randn(8, 64, generator=generator).double()
            moved = Ball.exact(x + 0.05 * way / length(way))
            found = cell.step(moved, torch.zeros(8).long())
            assert (length(found.x - image.x) <= image.radius).all()


@pytest.mark.parametrize("change", [
    lambda model: model.embed.weight[[1, 2]].clone().flip(0),
    lambda model: 2 * model.embed.weight[[1, 2]]], ids=["letters exchanged", "louder"])
def test_other_weights_are_refused(change):
    model = shipped("parity")
    with torch.no_grad():
        model.embed.weight[[1, 2]] = change(model)
    proof = certify(model, machine("parity"), rounded=False)
    assert not proof.proved and proof.reason


@pytest.mark.parametrize("asked", ["Z2-all", "even-pairs", "divisible-by-3", "regex:(ab)*"])
def test_other_machines_are_refused_with_the_shortest_string(asked):
    proof = certify(shipped("parity"), machine(asked), rounded=False)
    right, other = machine("parity"), machine(asked)
    if right.minimal() == other.minimal():
        assert proof.proved
        return
    ids = [torch.cartesian_prod(*[torch.tensor([1, 2])] * n).view(-1, n) for n in range(1, 6)]
    length_of = next(n for n, at in enumerate(ids, 1)
                     if (right.answers(at) != other.answers(at)).any())
    assert proof.reason == f"a string of length {length_of} is answered wrong"


@pytest.mark.parametrize("asked", ["Z2-all", "even-pairs", "regex:(ab)*"])
def test_a_doubling_model_is_no_other_machine(asked):
    other = machine(asked)
    proof = certify(shipped("doubling-parity"), other, rounded=False)
    assert proof.proved == (other.minimal() == machine("parity").minimal())
    assert proof.proved or "are wrong" in proof.reason


def test_what_a_machine_is_read_off_from_is_no_part_of_the_proof():
    """Letter by letter it takes products that no doubling asks for."""
    proof = certify(shipped("doubling-addition"), machine("addition"), rounded=False)
    closure = proof.closure
    before = len(closure.follows), len(closure.states.codes), dict(closure.states.safety)
    assert closure.machine() == machine("addition").minimal()
    assert before == (len(closure.follows), len(closure.states.codes), closure.states.safety)


def test_a_single_wrong_product_of_balls_is_seen(monkeypatch):
    proved = certify(shipped("doubling-parity"), machine("parity"), rounded=False).closure
    row = next(row for row in proved.follows if row[0][0] == "code" and len(row) == 2)
    states = Balls(LoopCell(shipped("doubling-parity"), "float32"), proved.states.radius)
    scan, choose = Scan(states, machine("parity")), states.choose

    def wrong(evaluate, part):
        chosen = choose(evaluate, part)
        if row in part and len(part[0]) == 2:
            other = scan.meaning[chosen[part.index(row)]]
            chosen[part.index(row)] = next(b for b, of in scan.meaning.items() if of != other)
        return chosen

    monkeypatch.setattr(states, "choose", wrong)
    assert not scan.run().closed and scan.wrong


def test_one_answer_that_is_asked_otherwise_is_seen():
    answer = machine("addition").answer.clone()
    answer[1, 3] = 3 - answer[1, 3]
    asked = Machine("almost addition", machine("addition").next_state, answer)
    proof = certify(shipped("addition"), asked, rounded=False)
    assert not proof.proved and "is answered wrong" in proof.reason


@pytest.mark.parametrize("name", ["state-S3", "doubling-S3"])
def test_a_loop_that_does_not_contract_is_refused(name):
    proof = certify(OpenMythos.from_pretrained(name), machine("S3"), rounded=False)
    assert not proof.proved and re.search(
        "the loop does not contract enough|products are more than 1,000", proof.reason)
    assert proof.state_margin == 0


def test_an_untrained_model_is_refused():
    model = strict_model(rope=False, max_seq_len=None, window=1)
    assert not certify(model, machine("parity"), rounded=False).proved


def test_products_that_are_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(Balls, "most_products", 5)
    found = invariant(LoopCell(shipped("doubling-addition"), "float32"), machine("addition"))
    assert not found.closed and found.fault == "16 products are more than 5"


def test_balls_that_are_too_many_are_refused(monkeypatch):
    monkeypatch.setattr("mythos_core.proof.invariant.MOST_BALLS", 5)
    found = Closure(Balls(LoopCell(shipped("parity"), "float32"), 0.01), 2, machine("parity")).run()
    assert not found.closed and "more than 5 balls of radius 0.01 are needed" in found.fault


def test_a_coarser_arithmetic_is_refused():
    proof = certify(shipped("parity").bfloat16(), machine("parity"), rounded=False)
    assert proof.arithmetic == "bfloat16" and not proof.proved


def test_codes_are_refused_by_name():
    model = shipped("parity")
    with pytest.raises(ValueError, match="rounded = False: must be True"):
        certify(model, machine("parity"), torch.zeros(2, 64), rounded=False)


class Quarter:
    """A cell that a reader can check: h' = h / 4 + letter on a line, each step off by 0.001."""

    def __init__(self, steep=0.25):
        self.start, self.steep, self.model = torch.zeros(1, 1).double(), steep, None

    def step(self, h, letters):
        x = self.steep * h.x + letters[:, None].double()
        return Ball(x, 1e-3 + self.steep * h.radius)

    def answers(self, h):
        return 1 + (h.x[:, 0] > 0.7).long(), (h.x[:, 0] - 0.7).abs() / h.radius[:, 0]


def test_a_cell_by_hand():
    """States after letter 0 are 1/3 at most, those after letter 1 at least 1."""
    last = Machine("the last letter", torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
    found = invariant(Quarter(), last)
    assert found.closed and found.states.safety["logit"] > 1 and found.machine() == last.minimal()
    states = found.states.codes.flatten()
    assert ((states < 0.34) | (states > 0.99)).all() and (states < 1.35).all()
    steady = Closure(Balls(Quarter(1.0), 0.05), 2, last).run()    # sums: no end of states
    assert not steady.closed and "does not contract enough" in steady.fault


def test_codes_of_a_model_are_left_out():
    """`rounded=False` is about the weights; a model with codes is proved, or not, without them."""
    model = shipped("parity")
    coded = with_codes(model, torch.randn(2, 64))
    assert certify(coded, machine("parity"), rounded=False).proved
