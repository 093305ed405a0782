"""The theorems of the strict loop, over random configurations, and the
faults that they have to catch."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import STRICT, loop, settles_in_turn, strict_model, strings
from torch.nn.attention import SDPBackend, sdpa_kernel

from mythos_core import KVCache, OpenMythos
from mythos_core.model.attention import Context
from mythos_core.model.config import tutorial_config
from mythos_core.model.strict import StrictBlock

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.3, torch.float64: 1e-9}


CASES = dict(attn_type=st.sampled_from(["gqa", "mla"]), window=st.sampled_from([None, 1, 2, 4, 7]),
             stride=st.integers(1, 4), rope=st.booleans(), seed=st.integers(0, 99))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=12)
@given(**CASES, seq=st.sampled_from([1, 5, 20, 40]), experts=st.sampled_from([4, 64]))
def test_a_position_is_the_same_from_its_own_loop_on_from_any_start(
        dtype, seed, seq, experts, **changes):
    model = strict_model(seed, dtype, n_experts=experts, expert_dim=64, **changes)
    assert settles_in_turn(model, strings(seed, seq=seq))


@pytest.mark.parametrize("carry", [False, True])
@settings(deadline=None, max_examples=6)
@given(**CASES)
def test_all_diagonal_blocks_of_the_jacobian_are_A_or_zero(carry, seed, **changes):
    model, ids = strict_model(seed, torch.float64, carry=carry, **changes), strings(seed, 1, 5)
    assert rest_of_jacobian(model, ids) == 0


def rest_of_jacobian(model, ids) -> float:
    """Theorem 2: the largest entry of dh_{t+1} / dh_t where a position would read one less than
    `stride` back, less A on the diagonal."""
    ctx, (_, seq), dim = model.context(ids), ids.shape, model.config.dim
    e = model.encode(ids, ctx).detach()
    h = loop(model, ids, 3)[-1]
    with sdpa_kernel(SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(lambda x: model.recurrent.step(x, e, 3, ctx)[0], h)
    blocks = J.view(seq, dim, seq, dim).transpose(1, 2)          # (to, from, dim, dim)
    if model.config.carry:
        blocks = (blocks - torch.eye(seq)[:, :, None, None]
                  * model.recurrent.injection.get_A().diag())
    return max(blocks[i, j].abs().max().item() for i in range(seq)
               for j in range(max(0, i - model.config.stride + 1), seq))


@pytest.mark.parametrize("carry", [False, True])
@settings(deadline=None, max_examples=6)
@given(attn_type=st.sampled_from(["gqa", "mla"]), seed=st.integers(0, 99))
def test_a_loop_is_the_formula_of_notebook_03(carry, seed, attn_type):
    model = strict_model(seed, torch.float64, carry=carry, attn_type=attn_type)
    ids, r = strings(seed), model.recurrent
    ctx = model.context(ids)
    with torch.no_grad():
        e = h = model.encode(ids, ctx)
        for state in loop(model, ids, 4)[1:]:
            z = r.norm(F.pad(h, (0, 0, 1, 0))[:, :-1] + e)
            out = r.block(z, ctx, "loop")[0]
            h = r.injection.get_A() * h + r.injection.B * e + out if carry else out
            torch.testing.assert_close(state, h, rtol=1e-9, atol=1e-9)


def test_the_spectral_radius_with_the_carry_is_max_A_while_a_transient_may_grow():
    model, ids = strict_model(1, torch.float64, carry=True), strings(1, 1, 6)
    ctx, h = model.context(ids), loop(model, ids, 3)[-1]
    e = model.encode(ids, ctx).detach()
    with sdpa_kernel(SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(lambda x: model.recurrent.step(x, e, 3, ctx)[0],
                                               h).view(h.numel(), -1)
    A = model.recurrent.injection.get_A()
    assert torch.linalg.eigvals(J).abs().max().item() == pytest.approx(A.max().item(), rel=1e-3)
    assert torch.linalg.matrix_norm(J, 2) > A.max()


@settings(deadline=None, max_examples=15)
@given(**CASES, seq=st.integers(1, 24))
def test_halting_ends_when_nothing_changes_and_says_where_each_position_settled(
        seed, seq, **changes):
    model, ids, records = strict_model(seed, **changes), strings(seed, seq=seq), []
    with torch.no_grad():
        stopped = model(ids, 3 * seq + 3, observer=records.append)
        assert torch.equal(stopped, model(ids, len(records)))
        on = OpenMythos(replace(model.config, halting="none")).eval()
        on.load_state_dict(model.state_dict())
        assert torch.equal(stopped, on(ids, 3 * seq + 3))
    assert len(records) <= -(-seq // model.config.stride) + 1 and records[-1].settled.all()
    assert not any(record.settled.all() for record in records[:-1])
    states = loop(model, ids, len(records))
    for record in records:
        # before this loop
        final = (states[record.loop] == states[-1]).all(-1).cumprod(1).bool()
        assert torch.equal(record.settled, final)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carry", [False, True])
@settings(deadline=None, max_examples=8)
@given(**CASES, cut=st.integers(1, 11), n_loops=st.sampled_from([1, 2, 5, 40]))
def test_one_cache_entry_and_one_loop_a_token_give_what_looping_to_rest_gives(
        dtype, carry, seed, cut, n_loops, **changes):
    model, ids = strict_model(seed, dtype, carry=carry, **changes), strings(seed, seq=12)
    with torch.no_grad():
        looped = model(ids, 12 * (60 if carry else 1))
        settled = model(ids)
        cache = KVCache()
        cached = torch.cat([model(ids[:, :cut], n_loops, cache),
                            model(ids[:, cut:], kv_cache=cache)], 1)
    scale = looped.abs().max().item()
    if dtype != torch.bfloat16:                                  # experts chosen anew, see below
        torch.testing.assert_close(settled, looped, rtol=0, atol=TOLERANCE[dtype] * scale)
        torch.testing.assert_close(cached, looped, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert len(cache) == 3 and cache.length == 12


def test_behind_a_settled_past_a_token_takes_one_loop_bit_for_bit_as_with_many():
    model, ids = strict_model(window=4), strings(0, seq=30)
    caches, ran = [KVCache(), KVCache()], []
    for n_loops, cache in zip((1, 16), caches):
        model(ids[:, :16], 16, cache)
        ran.append([])
        out = [model(ids[:, i:i + 1], n_loops, cache, lambda r: ran[-1].append(r.loop))
               for i in range(16, 30)]
        ran[-1] = (len(ran[-1]), torch.cat(out, 1))
    assert ran[0][0] == ran[1][0] == 14 and torch.equal(ran[0][1], ran[1][1])
    assert caches[0].nbytes == caches[1].nbytes


def test_a_strict_model_generates_the_same_with_any_number_of_loops_cached_or_not():
    model, ids = strict_model(window=3), strings(3, seq=20)
    tokens = [model.generate(ids, 12, n, temperature=0.0, use_cache=cached)
              for n in (1, 8, 40) for cached in (True, False)]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])


@settings(deadline=None, max_examples=6)
@given(**CASES, carry=st.booleans())
def test_settling_left_to_right_has_the_gradient_of_looping(seed, carry, **changes):
    model, ids = strict_model(seed, torch.float64, carry=carry, **changes), strings(seed, seq=6)
    gradients = []
    for n_loops in (None, 6 * (80 if carry else 1)):
        model.zero_grad()
        F.cross_entropy(model(ids, n_loops).flatten(0, 1), ids.flatten()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                    if p.grad is not None]))
    loose = 100 if carry else 1  # a gradient rests later than the state
    torch.testing.assert_close(*gradients, rtol=loose * 1e-6, atol=loose * 1e-9)


def test_without_positions_there_is_no_longest_string():
    model = strict_model(rope=False, window=2, max_seq_len=None)
    cache, ids = KVCache(), strings(0, seq=300)
    with torch.no_grad():
        out = model(ids, 1, cache)
        torch.testing.assert_close(out[:, -20:], model(ids)[:, -20:], rtol=0, atol=1e-4)
    assert cache.length == 300 and cache.nbytes < 10_000


@pytest.mark.parametrize("changes, name", [
    (dict(loop_embedding=True), "loop_embedding"), (dict(lora_rank=2), "lora_rank"),
    (dict(halting="act"), "halting"),
    (dict(token_shift=True), "token_shift"), (dict(loop_norm=True, carry=True), "loop_norm"),
    (dict(strict=False), "halting"), (dict(max_seq_len=None), "max_seq_len"),
    (dict(stride=3, window=2), "stride"), (dict(stride=0), "stride"),
    (dict(strict=False, halting="none", stride=2), "stride")])
def test_what_would_break_the_theorems_is_refused(changes, name):
    with pytest.raises(ValueError, match=f"MythosConfig.{name} = "):
        tutorial_config("gqa", **{**STRICT, **changes})


def test_a_strict_model_refuses_a_cache_of_several_entries():
    with pytest.raises(ValueError, match=r"kv_cache.loops = 2: must be None for a model "
                                         r"whose strict = True"):
        strict_model()(strings(0), 4, KVCache(loops=2))


class Leaky(StrictBlock):
    """A strict loop in which a position's own state leaks: by one of `LEAKS`."""

    leak: str

    def step(self, h, e, t, ctx, fixed=None):
        if self.leak == "shift":                                 # reads itself
            out, ids = self.block(self.norm(h + e), ctx, "loop")
            return out, ids
        if self.leak == "norm":                                  # statistics over all positions
            before = F.pad(h, (0, 0, 1, 0))[:, :-1]
            out, ids = self.block((before + e) / (h.square().mean((1, 2), keepdim=True) + 1).sqrt(),
                                  ctx, "loop")
            return out, ids
        if self.leak == "attention":                             # sees one position ahead
            z = self.norm(F.pad(h, (0, 0, 1, 0))[:, :-1] + e)
            mixed = z + 0.5 * F.pad(z, (0, 0, 0, 1))[:, 1:]
            return self.block(mixed, ctx, "loop")
        out, ids = super().step(h, e, t, ctx)                    # a carry that nobody asked for
        return out + 0.3 * h, ids


@pytest.mark.parametrize("leak", ["shift", "norm", "attention", "carry"])
def test_an_own_state_that_leaks_is_caught_by_both_theorems(leak):
    model, ids = strict_model(2, torch.float64), strings(2, 1, 6)
    assert settles_in_turn(model, ids) and rest_of_jacobian(model, ids) == 0
    model.recurrent.__class__, model.recurrent.leak = Leaky, leak
    assert not settles_in_turn(model, ids)
    assert rest_of_jacobian(model, ids) > 1e-6


def test_experts_sorted_by_token_would_let_other_positions_change_the_rounding(monkeypatch):
    """Why a strict model computes all experts: the same token, beside
    other tokens, in other bits."""
    model = strict_model(0, n_experts=64, expert_dim=64, window=4)
    moe, x = model.recurrent.block.ffn, torch.randn(2, 2, 300, 16)
    x[1, 0, :7] = x[0, 0, :7]
    assert not moe._groups(x[0])
    dense = [moe(row)[0] for row in x]
    assert torch.equal(dense[0][0, :7], dense[1][0, :7])


def test_context_is_what_a_window_of_settled_positions_needs():
    """`settle` evaluates a position in a context of its window alone: relative
    positions, so the same bias."""
    model, ids = strict_model(window=3, rope=True), strings(5, seq=10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model(ids, 10), rtol=0, atol=1e-4)
    assert Context.of(model.config, 1, 3, None, like=model.embed.weight).bias is not None
