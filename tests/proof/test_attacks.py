"""Ways to a false "proved", each of them once open: models built by hand so that what a proof
looked at was not what the model did."""
import json
import warnings
from dataclasses import replace

import pytest
import torch

from mythos_core import KVCache, OpenMythos, certify, machine
from mythos_core.model.config import tutorial_config
from mythos_core.model.weights import digest
from mythos_core.proof import automaton
from mythos_core.proof.choices import with_codes
from mythos_core.tasks import Machine
from mythos_core.tasks.groups import group

pytestmark = pytest.mark.usefixtures("without_shape_checks")
ONE = Machine("always 1", torch.zeros(1, 2, dtype=torch.int64),
              torch.ones(1, 2, dtype=torch.int64))
PARITY = machine("parity")


def bare(**changes) -> OpenMythos:
    """A model with nothing but a loop: one expert, no prelude, no coda."""
    config = tutorial_config("gqa", **{**dict(
        vocab_size=4, dim=64, n_heads=2, n_kv_heads=1, strict=True, halting="settled",
        loop_embedding=False, lora_rank=0, carry=False, rope=False, max_seq_len=None, window=1,
        codes=1, prelude_layers=0, coda_layers=0, n_experts=1, n_experts_per_tok=1,
        n_shared_experts=0, expert_dim=4), **changes})
    torch.manual_seed(0)
    return OpenMythos(config).eval()


@pytest.mark.parametrize("lead", [2.0 ** -17, 2.0 ** -10])
def test_an_alternative_that_is_badly_rounded_is_seen(lead):
    """Token 1's logit is 0 and well rounded; token 3's sums large numbers to just below it."""
    model, generator = bare(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        w = 8 * torch.randn(64, generator=generator)
        w[63] = (-w[:63].double().sum() - lead).float()
        model.embed.weight.zero_()
        model.embed.weight[1], model.embed.weight[3] = lead / 64, w
        model.recurrent.codes.fill_(1.0)
    proof = certify(model, ONE)
    assert not proof.proved and proof.wrong == 0 and "a logit leads by 0." in proof.reason


def test_a_float64_model_is_not_its_own_judge():
    """Its rounding errors are no smaller for being float64's: token 1's exact logit is 0, as all
    others' are, and hangs on the order in which a batch of some shape sums it."""
    model, generator = bare().double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        w = torch.randn(64, generator=generator).double()
        w[63] = -w[:63].sum()
        model.embed.weight.zero_()
        model.embed.weight[1] = w
        model.recurrent.codes.fill_(1.0)
    proof = certify(model, ONE)
    assert proof.arithmetic == "float64" and not proof.proved


def test_a_float64_model_answers_and_is_saved_in_float64(tmp_path):
    """With a token so near to another that float32 cannot tell them apart."""
    model = OpenMythos.from_pretrained("parity-extrapolating").double()
    with torch.no_grad():
        model.embed.weight[0] = model.embed.weight[2] * (1 - 1e-9)
    proof, ids = certify(model, PARITY), torch.tensor([[2]])
    assert proof.proved and proof.arithmetic == "float64"
    assert proof.model.generate(ids, 3, temperature=0.0).tolist() == [[2, 2, 1, 1]]
    proof.model.save_pretrained(tmp_path)
    back = OpenMythos.from_pretrained(tmp_path)
    assert back.embed.weight.dtype == torch.float64 and digest(back) == digest(proof.model)
    assert not certify(model.float(), PARITY).proved


def test_a_cast_and_back_leaves_eps():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    there = model.norm.eps_tensor
    for dtype in (torch.bfloat16, torch.float32):
        model = model.to(dtype)
        assert torch.equal(model.norm.eps_tensor, there)         # float32's in bfloat16 too
    assert model.double().norm.eps_tensor.item() == model.norm.eps == 1e-6


@pytest.mark.parametrize("which", ["head", "embed"])
def test_an_embedding_of_its_own_is_refused(which):
    model = OpenMythos.from_pretrained("parity-extrapolating")
    flipped = torch.nn.Parameter(model.embed.weight.detach().flip(0).clone())
    getattr(model, which).weight = flipped
    with pytest.raises(ValueError, match=r"model.head.weight: must be model.embed.weight"):
        certify(model, PARITY)


def test_a_machine_is_the_one_that_it_is_when_asked():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    asked = Machine("parity again", PARITY.next_state, PARITY.answer)
    proof = certify(model, asked)
    asked.answer[0, 0] = 3
    assert proof.proved and proof.asked == PARITY and not certify(model, asked).proved


def test_nobody_spoils_a_machine_or_a_group_for_others():
    machine("parity").answer[0, 0] = 3
    group("S3").table[0, 0] = 4
    group("S3").generators.clear()
    assert machine("parity").answer[0, 0] == 1 and group("S3").table[0, 0] == 0
    assert group("S3").generators


def test_a_machine_that_asks_nothing_is_refused():
    silent = Machine("silent", torch.zeros(1, 2, dtype=torch.int64),
                     torch.full((1, 2), -1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'silent': must ask for an answer to some first letter"):
        certify(OpenMythos.from_pretrained("parity-extrapolating"), silent)


@pytest.mark.parametrize("letters", [0, 4, 10])
def test_an_automaton_of_letters_that_there_are_not(letters):
    with pytest.raises(ValueError, match=rf"letters = {letters}: must be in 1 .. vocab_size - 1"):
        automaton(OpenMythos.from_pretrained("parity-extrapolating"), letters)


@pytest.mark.parametrize("change", [
    lambda codes: torch.full((1, 64), torch.nan), lambda codes: torch.full((1, 64), torch.inf),
    lambda codes: torch.full((1, 64), 1e19), lambda codes: codes[:1]],
    ids=["not a number", "infinite", "its square overflows", "one twice"])
def test_a_code_more_that_is_none_proves_nothing(change):
    model = OpenMythos.from_pretrained("parity-extrapolating")
    codes = torch.cat([model.recurrent.codes, change(model.recurrent.codes)])
    assert not certify(model, PARITY, codes).proved


def test_a_pass_that_fails_half_way_leaves_the_cache_as_it_was():
    model, cache = OpenMythos.from_pretrained("state-S3"), KVCache()
    asked, calls = machine("S3"), []
    ids, answers = asked.make_batch(1, 40, torch.Generator().manual_seed(1))

    def fails(record):
        calls.append(record.loop)
        if len(calls) == 30:
            raise KeyboardInterrupt

    assert torch.equal(model(ids[:, :10], kv_cache=cache).argmax(-1), answers[:, :10])
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 10:], kv_cache=cache, observer=fails)
    assert cache.length == 10 and len(calls) == 30
    assert torch.equal(model(ids[:, 10:], kv_cache=cache).argmax(-1), answers[:, 10:])


def test_a_certificate_beside_weights_that_it_is_not_of_is_said(tmp_path):
    proof = certify(OpenMythos.from_pretrained("parity-extrapolating"), PARITY)
    proof.model.save_pretrained(tmp_path)
    file = tmp_path / "certificate.json"
    file.write_text(json.dumps(proof.summary()), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = OpenMythos.from_pretrained(tmp_path)
    with torch.no_grad():
        model.embed.weight[1, 0] += 1
    model.save_pretrained(tmp_path)
    for text in (file.read_text(encoding="utf-8"), "{}", "nonsense", "[1]"):
        file.write_text(text, encoding="utf-8")
        with pytest.warns(UserWarning, match=r"certificate.json: is of other weights than those"):
            OpenMythos.from_pretrained(tmp_path)


def test_a_summary_is_json_for_strict_readers():
    model = bare()
    with torch.no_grad():
        model.embed.weight.zero_()
        model.embed.weight[1] = 1.0
        model.recurrent.codes.fill_(1.0)

    def refuse(name):
        raise ValueError(name)

    text = json.dumps(certify(model, ONE).summary())             # one code, one expert
    assert json.loads(text, parse_constant=refuse)["routing_margin"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_dtypes_are_refused_with_their_reason(dtype):
    proof = certify(OpenMythos.from_pretrained("state-S3").to(dtype), machine("S3"))
    assert not proof.proved and f"what {str(dtype)[6:]} may do to it" in proof.reason


def test_tf32_is_asked_for_by_name():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    proof = certify(model, PARITY, arithmetic="tf32")
    assert proof.arithmetic == "tf32" and proof.wrong == 0
    assert min(proof.safety.values()) < min(certify(model, PARITY).safety.values()) / 100


def test_a_proof_restores_the_mode():
    model = OpenMythos.from_pretrained("parity-extrapolating").train()
    assert certify(model, PARITY).proved and model.training
    copy = with_codes(model, None)
    assert replace(copy.config, codes=2) == model.config


def test_what_underflows_before_a_large_weight_is_seen():
    """Of x / rms * weight the first product underflows in float32, and the weight is 1e38."""
    model = bare()
    with torch.no_grad():
        for part in (model.embed.weight, model.norm.weight, model.recurrent.codes):
            part.zero_()
        model.recurrent.codes[0, 0], model.recurrent.codes[0, 1] = 2.0 ** -149, 1e4
        model.norm.weight[0], model.embed.weight[1, 0] = 1e38, 1.0
    assert not certify(model, ONE).proved


@pytest.mark.parametrize("changes, named", [
    (dict(rope_theta=0.5), "rope_theta = 0.5: must be at least 1"),
    (dict(max_seq_len=8), "max_seq_len = 8: must be None")])
def test_what_the_bounds_or_the_words_do_not_cover_is_refused(changes, named):
    with pytest.raises(ValueError, match=f"model.config.{named}"):
        certify(bare(**changes), ONE)


def test_another_eps_is_refused():
    model = OpenMythos.from_pretrained("parity-extrapolating")
    model.norm.eps = 1.0
    with pytest.raises(ValueError, match="an RMSNorm of the model has another eps"):
        certify(model, PARITY)
