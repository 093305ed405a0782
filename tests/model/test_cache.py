from dataclasses import replace

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small import DILATED, STRICT

from mythos_core import KVCache, OpenMythos
from mythos_core.model.config import VARIANTS, tutorial_config
from mythos_core.probes import cache_bytes

shifts = st.sampled_from([{}, {"token_shift": True}])
configs = st.builds(lambda shift, attn, **more: tiny(attn, **shift, **more), shifts,
                    st.sampled_from(["gqa", "mla"]), window=st.sampled_from([None, 1, 2, 5, 40]),
                    halting=st.sampled_from(["act", "act_remainder", "none"]),
                    loop_embedding=st.booleans(), rope=st.booleans(), init_std=st.just(0.05))


def cuts(total):
    return st.lists(st.integers(1, total), max_size=6).map(lambda xs: sorted({*xs, total}))


@settings(deadline=None, max_examples=60)
@given(config=configs, ends=cuts(40), n_loops=st.integers(1, 6),
       capacity=st.sampled_from([0, 7, 64]))
def test_any_chunking_gives_the_logits_of_one_pass(config, ends, n_loops, capacity):
    model = OpenMythos(config).eval()
    ids, cache = torch.randint(0, 17, (2, 40)), KVCache(capacity)
    with torch.no_grad():
        whole = model(ids, n_loops)
        parts = [model(ids[:, a:b], n_loops, cache) for a, b in zip([0, *ends], ends)]
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5
    assert len(cache) == config.prelude_layers + n_loops + config.coda_layers
    assert cache.nbytes == cache_bytes(config, 40, n_loops, batch=2)
    assert cache.length == 40


@pytest.mark.parametrize("halting", ["none", "act"])
@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_shared_entries_hold_each_position_as_its_last_loops_left_it(attn, halting):
    torch.manual_seed(0)
    config = tiny(attn, halting=halting, token_shift=True, window=4, loop_embedding=False,
                  lora_rank=0, init_std=0.05)
    model, ids, cache, own = (OpenMythos(config).double().eval(), torch.randint(0, 17, (2, 12)),
                              KVCache(loops=2), KVCache())
    with torch.no_grad():
        # nothing is read yet from another pass
        assert torch.equal(model(ids, 5, cache), model(ids, 5, own))
        past = {t: own._strips[f"loop.{t}", "shift"].newest(0, 12)[:, -1] for t in range(5)}
        assert torch.equal(cache._strips["loop.0", "shift"].newest(0, 12)[:, -1], past[4])
        assert torch.equal(cache._strips["loop.1", "shift"].newest(0, 12)[:, -1], past[3])
        model(ids[:, :1], 9, cache)  # another number of loops
    assert len(cache) == 4 and cache.nbytes == cache_bytes(config, 13, 2, batch=2, itemsize=8)


def test_one_entry_for_all_loops_is_a_plain_transformers_cache_where_states_do_not_move():
    config = tiny(halting="none", loop_embedding=False, lora_rank=0)
    model, ids, cache = (OpenMythos(config).double().eval(), torch.randint(0, 17, (2, 12)),
                         KVCache(loops=1))
    # h stays what it is: every loop keeps the same of a position
    model.recurrent.injection.B.data.zero_()
    model.recurrent.injection.log_A.data.fill_(-99)
    for weight in (model.recurrent.block.attn.out.weight, model.recurrent.block.ffn.down,
                   model.recurrent.block.ffn.shared[0].down.weight):
        weight.data.zero_()
    with torch.no_grad():
        parts = [model(part, 4, cache) for part in ids.split(3, 1)]
    assert torch.allclose(torch.cat(parts, 1), model(ids, 4), atol=1e-5)


@pytest.mark.parametrize("config, loops, n_loops, named",
                         [(dict(), 0, 3, "loops = 0"), (dict(), 4, 3, "n_loops = 3"),
                          (STRICT, 1, 3, "strict"), (DILATED, 1, 3, "dilation")])
def test_sharing_refuses_what_it_cannot_do(config, loops, n_loops, named):
    with pytest.raises(ValueError, match=named):
        OpenMythos(tiny(**config)).eval()(torch.ones(1, 4, dtype=torch.int64), n_loops,
                                          KVCache(loops=loops))


@pytest.mark.parametrize("attn, kilobytes", [("gqa", 192), ("mla", 72)])
def test_bytes_of_the_tutorial_models(attn, kilobytes):
    model, cache = OpenMythos(tutorial_config(attn)), KVCache()
    model(torch.randint(0, 256, (1, 64)), 4, cache)
    assert (len(cache), cache.nbytes) == (6, kilobytes * 1024)
    assert cache_bytes(tutorial_config("mla"), 64, 4, rope_key_per_head=True) == 144 * 1024


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_the_tutorial_models_in_pieces_where_the_past_matters(attn, window):
    """In float64, where no decision is so near a tie that rounding tips it, and with weights so
    large that a wrong past would show."""
    torch.manual_seed(0)
    model = OpenMythos(tutorial_config(attn, window=window, init_std=128 ** -0.5)).double().eval()
    ids = torch.randint(0, 256, (2, 64))
    other = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], 1)
    with torch.no_grad():
        whole = model(ids, 4)
        assert (model(other, 4) - whole)[:, -1].abs().max() > 0.2
        for size in (1, 7, 16, 64):
            cache = KVCache()
            parts = [model(part, 4, cache) for part in ids.split(size, 1)]
            assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_the_formula_holds_after_each_token(attn, window):
    config = tiny(attn, window=window)
    model, cache = OpenMythos(config), KVCache()
    for length in range(1, 65):
        model(torch.zeros(1, 1, dtype=torch.int64), 4, cache)
        assert cache.nbytes == cache_bytes(config, length, 4)


def test_the_formula_holds_for_a_variants_attention_in_bfloat16():
    config = VARIANTS["1B"]
    slim = replace(config, vocab_size=256, n_experts=4, n_experts_per_tok=1, n_shared_experts=0,
                   expert_dim=16)
    model, cache = OpenMythos(slim).bfloat16().eval(), KVCache()
    model(torch.ones(1, 16, dtype=torch.int64), slim.max_loop_iters, cache)
    assert cache.nbytes == cache_bytes(config, 16, slim.max_loop_iters, itemsize=2)


def test_buffers_double_and_a_window_bounds_them():
    cache, sizes = KVCache(), []
    for length in range(200):
        cache.begin(config=tiny(), n_loops=1)
        cache.extend("all", "k", torch.ones(1, 1, 1))
        seen = cache.extend("window", "k", torch.full((1, 1, 1), float(length)), keep=3)
        assert seen.flatten().tolist() == list(range(max(0, length - 3), length + 1))
        cache.advance(1)
        sizes.append([strip.buffer.shape[-2] for strip in cache._strips.values()])
    grown, bounded = zip(*sizes)
    assert len(set(grown)) <= 5 and grown[-1] <= 400         # 16, 32 ... 256
    assert max(bounded) <= 16                                # room is made in steps of 16


def test_gradients_do_not_pass_a_cache():
    assert not OpenMythos(tiny())(torch.ones(1, 3, dtype=torch.int64), 2, KVCache()).requires_grad


@pytest.mark.parametrize("then, named", [(dict(n_loops=3), "n_loops"), (dict(batch=1), "batch"),
                                         (dict(config=dict(window=5)), "config"),
                                         (dict(token=17), "ids"), (dict(seq=60), "max_seq_len")])
def test_a_pass_that_does_not_fit_is_refused_and_changes_nothing(then, named):
    model, cache, ids = OpenMythos(tiny()).eval(), KVCache(), torch.randint(0, 17, (2, 9))
    model(ids[:, :8], 2, cache)
    before = cache.nbytes, cache.length, len(cache)
    other = OpenMythos(tiny(**then["config"])) if "config" in then else model
    bad = torch.full((then.get("batch", 2), then.get("seq", 1)), then.get("token", 3))
    with pytest.raises(ValueError, match=named):
        other(bad, then.get("n_loops", 2), cache)
    assert (cache.nbytes, cache.length, len(cache)) == before
    assert torch.allclose(model(ids[:, 8:], 2, cache), model(ids, 2)[:, 8:], atol=1e-5)


@pytest.mark.parametrize("config", [tiny("mla"), tiny(window=4, token_shift=True)])
def test_a_pass_that_fails_half_way_can_be_made_again(config):
    model, cache, ids = OpenMythos(config).eval(), KVCache(), torch.randint(0, 17, (2, 20))

    def fail(record):
        if record.loop == 1:
            raise KeyboardInterrupt

    for a, b in ((0, 12), (12, 20)):
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, a:b], 3, cache, observer=fail)
        part = model(ids[:, a:b], 3, cache)
        assert torch.allclose(part, model(ids, 3)[:, a:b], atol=1e-5)


def test_a_cache_that_never_finished_a_pass_is_free_for_another_batch():
    model, cache = OpenMythos(tiny()).eval(), KVCache()
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(3, 4, dtype=torch.int64), 2, cache, observer=lambda record: 1 / 0)
    assert model(torch.ones(2, 4, dtype=torch.int64), 2, cache).shape == (2, 4, 17)


def test_capacity_is_checked():
    with pytest.raises(ValueError, match="capacity = -1"):
        KVCache(-1)
