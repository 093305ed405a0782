import pytest
import torch
from conftest import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mythos_core import OpenMythos
from mythos_core.model.halting import ACTHalting
from mythos_core.model.loop import LoopLoRA, LTIInjection, loop_embedding, previous

IDS = torch.randint(0, 17, (3, 12), generator=torch.Generator().manual_seed(2))


def run(model, ids, n_loops):
    records = []
    logits = model.eval()(ids, n_loops, observer=records.append)
    return logits, records


@settings(deadline=None)
@given(log_dt=st.floats(-1e30, 1e30), log_A=st.floats(-1e30, 1e30))
@example(0.0, -1e30)
@example(0.0, 1e30)
@example(0.0, -6.0)     # rounds to 1 in bfloat16
@example(0.0, 5.0)      # underflows in float32
def test_A_stays_strictly_inside_0_1(log_dt, log_A):
    injection = LTIInjection(3)
    injection.log_dt.data.fill_(log_dt)
    injection.log_A.data.fill_(log_A)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        A = (injection.to(dtype).get_A() if abs(log_dt) + abs(log_A) < 1e4
             else injection.float().get_A())
        assert (A > 0).all() and (A < 1).all()


def test_A_is_the_formula_where_the_formula_is_inside():
    injection = LTIInjection(5)
    assert torch.allclose(injection.get_A(), torch.full((5,), 0.36788), atol=1e-5)
    injection.log_A.data = torch.tensor([-10.0, -2.0, 0.5, 2.0, 3.9])
    assert torch.allclose(injection.get_A(), torch.exp(-torch.exp(injection.log_A)))
    injection.get_A().sum().backward()
    assert injection.log_A.grad.isfinite().all()


def test_the_injection_is_a_zero_order_hold():
    """A leaky channel, dh/dt = -a h + e, fed the same e for a time dt, in many small steps."""
    rate, interval = 0.7, 0.5
    e, h = torch.tensor([0.0, 1.0, -1.0, 2.0]).double(), torch.full((4,), 3.0).double()
    injection = LTIInjection(4).double()
    injection.log_A.data.fill_(rate).log_()
    injection.log_dt.data.fill_(interval).log_()
    injection.B.data = (1 - injection.get_A().detach()) / rate
    held = injection(h.view(1, 1, 4), e.view(1, 1, 4), torch.zeros(1, 1, 4).double(),
                     injection.get_A()).flatten()
    for _ in range(20_000):
        h = h + interval / 20_000 * (e - rate * h)
    assert torch.allclose(held, h, atol=1e-4)


def test_gradient_of_A_is_finite_whatever_the_parameters():
    injection = LTIInjection(4)
    injection.log_A.data = torch.tensor([-1e30, -50.0, 50.0, 1e30])
    injection.get_A().sum().backward()
    assert injection.log_A.grad.isfinite().all()


def test_T_loops_then_T_more_are_2T_loops():
    model = OpenMythos(tiny(halting="none")).eval()
    ctx = model.context(IDS)
    e = h = model.encode(IDS, ctx)
    for t in range(6):
        h, _ = model.recurrent.step(h, e, t, ctx)
        assert torch.equal(model.decode(h, ctx), model(IDS, t + 1))


@pytest.mark.parametrize("halting", ["act", "act_remainder", "none"])
def test_the_record_of_a_loop_says_what_stopping_there_would_give(halting):
    model = OpenMythos(tiny(halting=halting))
    if halting.startswith("act"):
        model.recurrent.act.halt.bias.data.fill_(-1.5)
    _, records = run(model, IDS, 5)
    for record in records:
        logits = model.decode(record.output, model.context(IDS))
        assert torch.allclose(logits, model(IDS, record.loop + 1), atol=1e-6)


def test_act_weights_follow_graves():
    model = OpenMythos(tiny(act_threshold=0.9))
    model.recurrent.act.halt.bias.data.fill_(-1.0)
    _, records = run(model, IDS, 20)
    p, w = (torch.stack([getattr(r, name) for r in records])
            for name in ("halt_probability", "halt_weight"))
    for b in range(3):
        for s in range(12):
            total, done = 0.0, False
            for t in range(len(records)):
                q = p[t, b, s].item()
                expected = 0.0 if done else (1 - total if total + q >= 0.9 else q)
                assert w[t, b, s].item() == pytest.approx(expected, abs=1e-6)
                done, total = done or total + q >= 0.9, total + q
    assert len(records) < 20                                 # all have halted: the loop ended
    assert torch.allclose(w.sum(0), torch.ones(3, 12))
    assert torch.allclose(records[-1].output, sum(r.halt_weight[..., None] * r.h for r in records),
                          atol=1e-6)


def test_what_remains_is_dropped_by_act_and_given_to_the_last_loop_by_act_remainder():
    for halting, total in (("act", 0.1), ("act_remainder", 1.0)):
        model = OpenMythos(tiny(halting=halting))
        model.recurrent.act.halt.bias.data.fill_(-6.0)
        _, records = run(model, IDS, 3)
        weights = torch.stack([r.halt_weight for r in records]).sum(0)
        assert (len(records) == 3 and (weights.max() < total if halting == "act"
                                       else torch.allclose(weights, torch.ones_like(weights))))


def test_early_exit_changes_no_logit():
    model = OpenMythos(tiny()).eval()
    logits, records = run(model, IDS, 50)
    assert len(records) < 50
    assert torch.equal(logits, model(IDS, len(records)))


def test_halted_positions_take_no_more_weight():
    act = ACTHalting(tiny())
    _, weight, left, total = act(torch.randn(1, 4, 32), torch.tensor([[0.0, 0.5, 0.98, 1.0]]))
    assert (weight[0, :3] > 0).all() and not weight[0, 3:].any() and left is None
    assert (total[0, :3] < 1 + 1e-6).all() and total[0, 3] == 1


def test_the_weights_of_a_position_that_halts_sum_to_1_in_the_last_bit():
    total = torch.rand(100_000) * 2.0 ** torch.randint(-30, 1, (100_000,))
    assert (total + (1 - total) == 1).all()


def test_lora_reuses_its_last_row_and_rank_0_leaves_it_out():
    lora = LoopLoRA(8, 2, 3)
    torch.nn.init.normal_(lora.B)
    x = torch.randn(1, 2, 8)
    assert torch.equal(lora(x, 2), lora(x, 9)) and not torch.equal(lora(x, 1), lora(x, 2))
    assert torch.allclose(lora(x, 1), x + (x @ lora.down.weight.T * lora.scale.weight[1]) @ lora.B)
    assert OpenMythos(tiny(lora_rank=0)).recurrent.lora is None


def test_under_autocast_states_stay_float32():
    """Products are bfloat16 there; what is added to them in place would become so."""
    x, injection = torch.randn(2, 5, 8), LTIInjection(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert LoopLoRA(8, 2, 3)(x, 1).dtype == torch.float32
        assert injection(x, x, x.bfloat16(), injection.get_A()).dtype == torch.float32


def test_loop_embedding_is_on_an_eighth_of_the_channels():
    emb = loop_embedding(4, 64, torch.zeros(1))
    angle = 3 / 10000 ** (torch.arange(4) / 4)
    assert (torch.allclose(emb[3, :8], torch.cat([angle.sin(), angle.cos()]))
            and not emb[:, 8:].any())


@pytest.mark.parametrize("distance", [1, 2, 8, 2 ** 40])
def test_previous_takes_a_position_before(distance):
    ctx = OpenMythos(tiny(token_shift=True)).context(IDS)
    x = torch.randn(2, 5, 32)
    shifted = previous(x, ctx, "loop.0", "shift", distance)
    assert torch.equal(shifted[:, distance:], x[:, :-distance]) and not shifted[:, :distance].any()


def test_a_random_start_is_for_half_of_the_strings_in_training_only():
    model = OpenMythos(tiny(start_noise=4.0))
    e = torch.zeros(2000, 3, 32)
    start = model.train().recurrent.start_of(e)
    thrown = start.abs().amax((1, 2)) > 0
    assert (0.45 < thrown.float().mean() < 0.55 and start[thrown].std().item()
            == pytest.approx(4.0, rel=0.02))
    assert torch.equal(model.eval().recurrent.start_of(e), e)


def test_without_carry_the_state_is_the_blocks_output():
    model = OpenMythos(tiny(carry=False, lora_rank=0, halting="none", loop_embedding=False)).eval()
    ctx = model.context(IDS)
    e, h = model.encode(IDS, ctx), torch.randn(3, 12, 32)
    expected, _ = model.recurrent.block(model.recurrent.norm(h + e), ctx, "loop.0")
    assert torch.equal(model.recurrent.step(h, e, 0, ctx)[0], expected)


def test_a_norm_after_the_loop_keeps_the_state_at_unit_scale():
    _, records = run(OpenMythos(tiny(loop_norm=True, halting="none", init_std=0.5)), IDS, 8)
    assert all(torch.allclose(r.h.square().mean(-1), torch.ones(3, 12), atol=1e-3) for r in records)


def test_noise_is_on_in_training_only():
    model = OpenMythos(tiny(loop_noise=0.5))
    assert torch.equal(model.eval()(IDS, 2), model(IDS, 2))
    assert not torch.equal(model.train()(IDS, 2), model(IDS, 2))


@settings(deadline=None, max_examples=25)
@given(position=st.integers(0, 11), attn=st.sampled_from(["gqa", "mla"]),
       window=st.sampled_from([None, 3]), shift=st.booleans())
def test_no_position_sees_a_later_one(position, attn, window, shift):
    model = OpenMythos(tiny(attn, window=window, token_shift=shift)).eval()
    changed = IDS.clone()
    changed[:, position] = (changed[:, position] + 1) % 17
    before, after = model(IDS, 3), model(changed, 3)
    assert (torch.equal(before[:, :position], after[:, :position])
            and not torch.equal(before[:, position], after[:, position]))


def test_one_loop_reaches_no_further_than_its_window():
    """Prelude, T loops and coda of window w each carry news w - 1 positions, a token shift one
    more."""
    ids = torch.randint(0, 17, (1, 40))
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 17
    for shift in (False, True):
        model = OpenMythos(tiny(window=3, token_shift=shift, halting="none", init_std=0.3)).eval()
        differs = (model(ids, 4) != model(changed, 4)).any(-1)[0].nonzero().max()
        assert differs == 2 * (1 + 4 + 1) + 4 * shift
