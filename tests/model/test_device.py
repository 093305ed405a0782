"""What has to hold on whatever device there is, in every way that it has to compute. The CPU by
default; `make gpu` runs this on CUDA.

    MYTHOS_DEVICE=cuda python -m pytest tests/model/test_device.py
"""
import json
import os
import signal
from dataclasses import replace
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from small import settles_in_turn, strict_model, strings

from mythos_core import KVCache, OpenMythos, probes, training
from mythos_core.proof.certificate import certify
from mythos_core.tasks.machines import machine
from mythos_core.tasks.parity import continuation, make_batch
from mythos_core.training import train
from mythos_core.training.recipes import get_recipe

DEVICE = torch.device(os.environ.get("MYTHOS_DEVICE", "cpu"))
#: Ways to compute, and how far float32 weights may then lead from float64, of the largest logit.
MODES = {"float32": 1e-5, "TF32": 1e-2, "bfloat16": 0.1, "deterministic": 1e-5}
SHIPPED = {"parity-extrapolating": "parity", "state-Z5": "Z5", "state-S3": "S3", "state-A5": "A5",
           "state-S5": "S5"}


@pytest.fixture(params=MODES)
def mode(request):
    """A way to compute, set while a test runs."""
    torch.set_float32_matmul_precision("high" if request.param == "TF32" else "highest")
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield request.param
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


def moved(model, mode):
    return model.to(DEVICE, torch.bfloat16 if mode == "bfloat16" else torch.float32).eval()


CONFIGS = [("gqa", {}), ("mla", {}), ("gqa", {"window": 4, "halting": "none"}),
           ("mla", {"halting": "act_remainder", "n_experts": 8}),
           ("gqa", {"strict": True, "halting": "settled", "loop_embedding": False,
                    "lora_rank": 0})]


@pytest.mark.parametrize("attn, changes", CONFIGS)
def test_logits_are_those_of_float64_on_the_cpu(attn, changes, mode):
    if mode == "bfloat16" and changes.get("halting") != "none":
        pytest.skip("rounding decides which experts are chosen, and when a position halts")
    model = OpenMythos(tiny(attn, **{**changes, **({"n_experts_per_tok": 4} if mode != "float32"
                                                   else {})})).eval()
    ids = torch.randint(17, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        judge = moved(model, mode).cpu().double()(ids, 4)
        logits = moved(model, mode)(ids.to(DEVICE), 4).cpu().double()
    assert (logits - judge).abs().max() <= MODES[mode] * judge.abs().max()


@pytest.mark.parametrize("attn, changes", CONFIGS)
def test_the_gradient_of_a_training_step_is_the_cpus(attn, changes):
    model = OpenMythos(tiny(attn, **changes)).train()
    ids = torch.randint(17, (3, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad()
        F.cross_entropy(model(ids.to(device), 3).flatten(0, 1), ids.flatten().to(device)).backward()
        gradients.append([p.grad.cpu().clone() for p in model.parameters() if p.grad is not None])
    for cpu, here in zip(*gradients):
        torch.testing.assert_close(here, cpu, rtol=0, atol=1e-4 * max(1e-3, cpu.abs().max()))


@pytest.mark.parametrize("changes", [{}, {"attn_type": "mla", "window": 3}, {"window": 4},
                                     {"window": 3, "stride": 2}, {"n_experts": 64}])
def test_a_strict_position_is_the_same_bits_from_its_own_loop_on(changes, mode):
    model = moved(strict_model(1, **changes), mode)
    assert settles_in_turn(model, strings(1, seq=20).to(DEVICE))


@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_cached_equals_uncached(attn):
    model = moved(OpenMythos(tiny(attn, halting="none")), "float32")
    ids, cache = torch.randint(17, (3, 20)).to(DEVICE), KVCache()
    with torch.no_grad():
        pieces = torch.cat([model(part, 4, cache) for part in ids.split(7, 1)], 1)
        torch.testing.assert_close(pieces, model(ids, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_certificates_hold_here_too(name, mode, record_property):
    """No context is answered wrong in any mode; but TF32 and bfloat16 round so coarsely that their
    bounds are above the leads."""
    model, start = moved(OpenMythos.from_pretrained(name), mode), perf_counter()
    found = certify(model, machine(SHIPPED[name]), arithmetic="tf32" if mode == "TF32" else None)
    record_property("seconds", perf_counter() - start)
    summary = {key: value for key, value in found.summary().items()
               if key not in ("machine", "asked", "table")}
    record_property("certificate", json.dumps(summary))
    assert found.closure.closed and found.wrong == 0
    assert found.proved == (mode not in ("TF32", "bfloat16"))


def test_a_proved_model_writes_on_and_answers_right(mode):
    strict = moved(OpenMythos.from_pretrained("parity-extrapolating"), mode)
    ids, targets = make_batch(4, 64, torch.Generator().manual_seed(0), DEVICE)
    with torch.no_grad():
        assert torch.equal(strict(ids).argmax(-1), targets)
    new = strict.generate(ids, 5, temperature=0.0)[:, 64:]
    assert torch.equal(new, continuation(ids, 5))
    sampled = [strict.generate(ids, 5, generator=torch.Generator().manual_seed(1))
               for _ in range(2)]
    assert torch.equal(*sampled)


elsewhere = pytest.mark.skipif(DEVICE.type == "cpu", reason="test_training.py has it on the CPU")


@elsewhere
def test_training_ends_proved(record_property):
    run = train("parity-extrapolating", 0, DEVICE, progress=False)
    record_property("seconds", run.history[-1]["seconds"])
    record_property("steps", len(run.history))
    assert run.certificate.proved and run.certificate.machine == machine("parity").minimal()
    assert run.model.embed.weight.device.type == DEVICE.type


@elsewhere
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    recipe, rate = replace(get_recipe("parity-seed"), steps=6), training.learning_rate
    torch.use_deterministic_algorithms(True)
    try:
        whole = train(recipe, 3, DEVICE, progress=False).model
        with monkeypatch.context() as at_step_3, pytest.raises(KeyboardInterrupt):
            at_step_3.setattr(training, "learning_rate", lambda recipe, step, span: (
                signal.raise_signal(signal.SIGINT) if step == 3 else None) or rate(recipe, step))
            train(recipe, 3, DEVICE, progress=False, out=tmp_path)
        again = train(recipe, 3, DEVICE, progress=False, out=tmp_path, resume=True).model
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_measurements_come_back_on_the_cpu():
    model = OpenMythos(tiny()).to(DEVICE).eval()
    ids = torch.randint(17, (2, 9)).to(DEVICE)
    sweep, halting = probes.depth_sweep(model, ids, ids, 3), probes.halting_map(model, ids, 3)
    found = [sweep.correct, sweep.loops_needed, halting.probability, halting.stopped_at,
             probes.expert_load(model, ids, 3), probes.state_norms(model, ids, 3)]
    assert {tensor.device.type for tensor in found} == {"cpu"}
    rho, sigma = probes.loop_spectrum(model, ids[:1], 2)
    judged = probes.loop_spectrum(model.cpu().double(), ids[:1].cpu(), 2)
    assert (rho, sigma) == pytest.approx(judged, rel=1e-3)


def test_weights_come_back_on_the_device_that_is_named(tmp_path):
    model = OpenMythos(tiny()).to(DEVICE)
    model.save_pretrained(tmp_path)
    again = OpenMythos.from_pretrained(tmp_path, map_location=DEVICE)
    assert again.embed.weight.device.type == DEVICE.type
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
