"""Proofs of dilated models: what they accept is right at any length; planted faults are seen."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_core import OpenMythos, certify, machine
from mythos_core.proof import automaton
from mythos_core.proof.choices import Codes
from mythos_core.proof.scan import Scan
from mythos_core.tasks import Machine
from mythos_core.tasks.monoid import monoid_of

pytestmark = pytest.mark.usefixtures("without_shape_checks")

SHIPPED = ["parity", "Z5", "S3", "addition", "A5-all"]


def shipped(name):
    return OpenMythos.from_pretrained(f"doubling-{name.removesuffix('-all')}")


@pytest.mark.parametrize("name", SHIPPED[:-1])    # A5's takes seconds: test_certificate has it
def test_the_shipped_models_are_proved(name):
    asked = machine(name)
    proof, n = certify(shipped(name), asked), len(asked.monoid())
    assert proof.proved and proof.wrong == 0 and proof.machine == asked.minimal()
    assert len(proof.codes) == n
    assert proof.contexts == n + n * n + asked.letters + asked.letters ** 2


def states_of(model, ids, n_loops):
    states = []
    with torch.no_grad():
        model(ids, n_loops, observer=lambda record: states.append(record.h))
    return torch.stack(states)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_are_right_on_long_strings_and_more_loops_change_nothing(name):
    asked, model = machine(name), shipped(name)
    for length in (1, 2, 3, 17, 64, 1000):
        ids, answers = asked.make_batch(4, length, torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert (model(ids).argmax(-1) == answers).all()
            assert (model(ids, 14).argmax(-1) == answers).all()
        states = states_of(model, ids, 14)                       # (loops that ran, B, S, dim)
        rest = [min(t for t in range(1, 15) if 2 ** t >= i + 1) for i in range(length)]
        for i, loop in enumerate(rest):
            after = states[loop - 1:, :, i]
            assert torch.equal(after, after[-1:].expand_as(after))


def test_every_string_of_sixteen_bits():
    ids = torch.cartesian_prod(*[torch.tensor([1, 2])] * 16)
    model = shipped("parity")
    with torch.no_grad():
        answers = torch.cat([model(part, 4).argmax(-1) for part in ids.split(1024)])
    assert torch.equal(answers, machine("parity").answers(ids))


def test_too_few_loops_answer_the_last_letters_alone():
    """The reason of the staircase: after T loops an answer is that of the last 2^T letters."""
    asked, model = machine("S3"), shipped("S3")
    ids, _ = asked.make_batch(4, 70, torch.Generator().manual_seed(0))
    for n_loops, product in enumerate(asked.monoid().windows(ids, 7), 1):
        with torch.no_grad():
            read = model(ids, n_loops).argmax(-1)
        assert torch.equal(read, asked.monoid().answer[product])


# Faults, each of them planted in a model that is proved

def planted(name, change):
    model = shipped(name)
    with torch.no_grad():
        change(model)
    return certify(model, machine(name))


def test_two_codes_that_are_exchanged():
    def exchange(model):
        model.recurrent.codes[[0, 1]] = model.recurrent.codes[[1, 0]]

    # names of codes mean nothing: it is the same set, and as good
    assert planted("S3", exchange).proved


def test_one_code_in_another_s_place():
    def move(model):
        model.recurrent.codes[1] = model.recurrent.codes[0] + 1e-3

    proof = planted("S3", move)
    assert not proof.proved and proof.wrong > 0
    assert "products or their answers are wrong" in proof.reason


def test_a_letter_that_means_another():
    def exchange(model):
        model.embed.weight[[1, 2]] = model.embed.weight[[2, 1]]

    assert not planted("S3", exchange).proved


def test_a_start_that_is_not_the_identity():
    def turn(model):
        model.recurrent.block.attn.start.neg_().mul_(3)

    assert not planted("S3", turn).proved


def test_a_single_wrong_product_is_seen(monkeypatch):
    """Right to 16 letters and wrong at 17, say: one entry of the table is enough."""
    model, asked = shipped("S3"), machine("S3")
    proved = Scan(Codes(model, "float32"), asked).run()
    assert proved.closed
    for row in [(("code", 2), ("code", 3)), (("code", 4),), (("letter", 1), ("letter", 5))]:
        scan, right = Scan(Codes(model, "float32"), asked), proved.follows[row]
        choose = scan.states.choose

        def wrong(evaluate, part, row=row, right=right, choose=choose):
            chosen = choose(evaluate, part)
            if row in part:
                chosen[part.index(row)] = (right + 1) % 6
            return chosen

        monkeypatch.setattr(scan.states, "choose", wrong)
        scan.run()
        assert not scan.closed and scan.wrong


def test_a_wrong_answer_is_seen():
    asked = machine("S3")
    answer = asked.answer.clone()
    answer[2, 0] = answer[2, 0] % 6 + 1
    assert not certify(shipped("S3"), Machine("other", asked.next_state, answer)).proved


def test_another_machine_of_the_same_size_is_refused():
    assert not certify(shipped("S3"), machine("D3")).proved


def test_a_code_near_a_border_proves_nothing():
    model = shipped("parity")
    codes = model.recurrent.codes
    tie = torch.cat([codes, codes[:1] + 1e-5 * torch.randn(1, codes.shape[1])])
    proof = certify(model, machine("parity"), tie)
    assert not proof.proved


@pytest.mark.parametrize("window", [None, 2])
def test_a_model_whose_prelude_reads_other_positions_is_refused(window):
    config = replace(shipped("parity").config, codes=0, window=window)
    with pytest.raises(ValueError, match=f"window = {window}: must be 1 for a certificate"):
        certify(OpenMythos(config), machine("parity"))


def scan_of_a_model_that_multiplies(asked, r=2):
    """The scan of a model of whose codes number k stands for element k, right everywhere."""
    monoid = asked.monoid()
    config = replace(shipped("parity").config, codes=len(monoid), dilation=r,
                     vocab_size=max(4, asked.vocab_size))
    scan = Scan(Codes(OpenMythos(config), "float32"), asked)

    def choose(evaluate, part):
        if evaluate.__name__ == "decode":
            return monoid.answer[part].tolist()
        return [scan._element(row) for row in part]

    scan.states.choose, scan.states.measure = choose, lambda: None
    for code in range(len(monoid)):
        scan.meaning[code] = code
    return scan.run()


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("name", ["S3", "divisible-by-3", "regex:(ab)*c", "regex:a*", "addition"])
def test_the_products_asked_for_are_those_that_strings_have(name, r):
    """All of them, by reading random strings; and in (ab)*c, say, no others: a stretch of two
    letters never stands where only one of one can."""
    asked = machine(name)
    scan, monoid = scan_of_a_model_that_multiplies(asked, r), asked.monoid()
    assert scan.closed and not scan.wrong
    strings = torch.randint(1, asked.letters + 1, (3000, r ** 4))
    held, met = [monoid.letters[strings - 1], *monoid.windows(strings, 4, r)], set()
    for t in range(4):
        kind = "code" if t else "letter"
        source = held[t] if t else strings - 1
        for i in range(r ** 4):
            rows = source[:, [i - j * r ** t for j in reversed(range(r)) if i >= j * r ** t]]
            met |= {tuple((kind, x) for x in row) for row in rows.unique(dim=0).tolist()}
    assert met <= scan.follows.keys()
    if r == 2:                              # of three random strings miss some
        assert met == scan.follows.keys()


def test_a_proof_leaves_the_model_and_the_generator_as_they_were():
    model = shipped("parity").train()
    before = torch.get_rng_state()
    assert certify(model, machine("parity")).proved
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_a_head_of_its_own_is_refused():
    """A copy ties it, and would be another model."""
    model = shipped("parity")
    model.embed = torch.nn.Embedding(4, 64)
    with pytest.raises(ValueError, match=r"model.head.weight: must be model.embed.weight"):
        certify(model, machine("parity"))


def test_a_table_that_changes_afterwards_is_not_the_machine_s():
    table = torch.tensor([[0, 1], [1, 0]])
    asked = Machine.from_table(table)
    table[1] = 1
    assert asked.monoid().table.tolist() == [[0, 1], [1, 0]]
    assert certify(shipped("parity"), asked).proved


def test_an_automaton_is_not_read_off_letter_by_letter():
    with pytest.raises(ValueError, match="dilation = 2: must be 1"):
        automaton(shipped("parity"), 2)


def test_generate_compares_logits_in_the_model_s_own_dtype():
    """Two tokens whose logits differ by less than float32 can tell."""
    model = shipped("parity").double()
    with torch.no_grad():
        model.embed.weight[3] = model.embed.weight[2] * (1 + 1e-12)
        ids = torch.tensor([[2]])
        best = model(ids)[0, -1].argmax().item()
        assert model(ids)[0, -1, 2:].diff().abs() < 1e-6
        assert model.generate(ids, 1, temperature=0.0)[0, -1] == best == 3


# Monoids

@pytest.mark.parametrize(("name", "elements"), [
    ("parity", 2), ("even-pairs", 4), ("addition", 7), ("S3", 6), ("Z5", 5), ("A5", 60),
    ("S5", 120), ("divisible-by-3", 6), ("cycle-navigation", 5), ("flip-flop", 15)])
def test_the_size_of_a_monoid(name, elements):
    assert len(machine(name).monoid()) == elements


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10 ** 6), states=st.integers(1, 4), letters=st.integers(1, 3),
       length=st.integers(1, 40), growth=st.integers(2, 4))
def test_a_scan_of_the_monoid_is_the_machine_run_from_left_to_right(seed, states, letters, length,
                                                                    growth):
    asked = machine(f"random-{states}-{letters}-{seed}")
    ids, answers = asked.make_batch(3, length, torch.Generator().manual_seed(seed))
    monoid, loops = asked.monoid(), 1
    while growth ** loops < length:
        loops += 1
    assert torch.equal(monoid.answer[monoid.windows(ids, loops, growth)[-1]], answers)
    x, y, z = torch.randint(len(monoid), (3, 50))
    assert torch.equal(monoid.table[monoid.table[x, y], z], monoid.table[x, monoid.table[y, z]])


def test_a_monoid_that_is_too_large_is_refused_with_the_number_so_far():
    asked = machine("S5")
    with pytest.raises(ValueError, match=r"at most 100 elements .* has 101 or more"):
        monoid_of("S5", asked.next_state, asked.answer, 0, most=100)


def test_a_machine_that_does_not_ask_everywhere_is_refused():
    answer = torch.tensor([[1, -1], [2, 1]])
    silent = Machine("silent", torch.tensor([[0, 1], [1, 0]]), answer)
    with pytest.raises(ValueError, match="'silent': must ask for an answer at each position"):
        silent.monoid()
