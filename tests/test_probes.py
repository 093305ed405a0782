import pytest
import torch
from conftest import tiny

from mythos_core import OpenMythos
from mythos_core.model.config import VARIANTS, tutorial_config
from mythos_core.probes import (
    DepthSweep,
    active_parameters,
    cache_bytes,
    depth_sweep,
    expert_load,
    halting_map,
    load_entropy,
    loop_map,
    loop_spectrum,
    max_violation,
    parameters_by_component,
    state_norms,
)
from mythos_core.tasks.parity import make_batch

IDS, TARGETS = make_batch(4, 9, torch.Generator().manual_seed(0))


def test_components_add_up_and_are_what_they_say():
    model = OpenMythos(tutorial_config("gqa"))
    parts = parameters_by_component(model)
    assert sum(parts.values()) == 462_274
    assert (parts["routed experts"] == 4 * 3 * 128 * 64 and parts["embedding = head"] == 256 * 128
            and parts["router"] == 4 * 128)
    assert parts["loop LoRA"] == 8 * 128 * 2 + 8 * 8 and parts["shared experts"] == 3 * 128 * 128
    assert active_parameters(model) == 462_274 - 2 * 3 * 128 * 64


def test_active_parameters_of_a_variant_on_the_meta_device():
    with torch.device("meta"):
        model = OpenMythos(VARIANTS["1B"])
    assert (active_parameters(model) == sum(p.numel() for p in model.parameters()) - 60 * 3 * 2048
            * 2048)


def test_cache_formula_knows_windows_and_token_shift():
    assert cache_bytes(tiny(window=4), 100, 3) == cache_bytes(tiny(), 3, 3)
    assert cache_bytes(tiny(token_shift=True), 10, 3) - cache_bytes(tiny(), 10, 3) == 3 * 16 * 4
    assert cache_bytes(tiny(), 10, 3, itemsize=2, batch=4) == 2 * cache_bytes(tiny(), 10, 3)


@pytest.mark.parametrize("halting", ["act", "act_remainder", "none"])
def test_a_sweep_is_what_separate_passes_give(halting):
    model = OpenMythos(tiny(halting=halting, init_std=0.2)).eval()
    if halting != "none":
        model.recurrent.act.halt.bias.data.fill_(-1.0)
    sweep = depth_sweep(model, IDS, TARGETS, 12)
    for t in range(1, 13):
        right = model(IDS, t).argmax(-1) == TARGETS
        assert torch.equal(sweep.correct[t - 1], right)
    assert sweep.executed.tolist() == [min(t, int(sweep.executed[-1])) for t in range(1, 13)]
    assert sweep.token.shape == sweep.whole.shape == (12,)


def test_loops_needed():
    # (4 loops, 1 string, 3 positions)
    correct = torch.tensor([[[0, 1, 0]], [[1, 0, 1]], [[1, 1, 0]], [[1, 1, 0]]], dtype=torch.bool)
    assert DepthSweep(correct, torch.arange(4)).loops_needed.tolist() == [[2, 3, 5]]


def test_halting_map():
    model = OpenMythos(tiny())
    found = halting_map(model, IDS, 16)
    assert (found.probability.shape == found.weight.shape == (found.executed, 4, 9)
            and found.executed < 16)
    cumulative = found.probability.cumsum(0)
    assert torch.equal(found.stopped_at, 1 + (cumulative < 0.99).sum(0).clamp(max=found.executed
        - 1))
    assert torch.allclose(found.weight.sum(0), torch.ones(4, 9))
    with pytest.raises(ValueError, match="halting = 'none'"):
        halting_map(OpenMythos(tiny(halting="none")), IDS, 4)


def test_expert_load_counts_every_slot():
    load = expert_load(OpenMythos(tiny(halting="none")), IDS, 3)
    assert load.shape == (3, 9, 4) and (load.sum(-1) == 4 * 2).all()


def test_entropy_and_violation():
    assert (load_entropy(torch.full((2, 3, 4), 7)) == pytest.approx(1)
            and max_violation(torch.full((2, 3, 4), 7)) == 0)
    one = torch.tensor([12, 0, 0, 0])
    assert load_entropy(one) == 0 and max_violation(one) == 3


def test_spectrum_is_that_of_the_whole_jacobian():
    model = OpenMythos(tiny(init_std=0.2, halting="none", window=3, token_shift=True)).double()
    step, h = loop_map(model, IDS[:1, :5], 4)
    exact = torch.autograd.functional.jacobian(step, h).reshape(h.numel(), h.numel())
    radius, sigma = loop_spectrum(model, IDS[:1, :5], 4)
    assert radius == pytest.approx(torch.linalg.eigvals(exact).abs().max().item(), rel=1e-9)
    assert sigma == pytest.approx(torch.linalg.matrix_norm(exact, 2).item(), rel=1e-9)


def test_norms():
    model = OpenMythos(tiny(halting="none")).eval()
    ctx = model.context(IDS)
    e = model.encode(IDS, ctx)
    h, _ = model.recurrent.step(e, e, 0, ctx)
    norms = state_norms(model, IDS, 5)
    assert (norms.shape == (5,) and norms[0].item()
            == pytest.approx(h.norm(dim=-1).mean().item(), rel=1e-5))
