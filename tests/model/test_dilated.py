"""The loop whose reach grows by a factor with each loop, for any weights; and its cache."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import DILATED, dilated_model, strings

from mythos_core import KVCache, MythosConfig, OpenMythos
from mythos_core.model import attention
from mythos_core.model.dilated import SlotAttention
from mythos_core.model.layers import rope_table, rotate
from mythos_core.proof.choices import with_codes


def changed_by(model, ids, position, n_loops):
    """The positions whose logits change with the letter at one position."""
    other = ids.clone()
    other[:, position] = (other[:, position] + 1) % model.config.vocab_size
    with torch.no_grad():
        apart = (model(ids, n_loops) - model(other, n_loops)).abs().amax((0, 2))
    return apart.nonzero().flatten().tolist()


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("n_loops", [1, 2, 3])
def test_so_many_loops_read_r_to_their_power_positions_each_of_them_and_no_other(r, n_loops):
    model, ids = dilated_model(dilation=r), strings(1, 2, 30)
    reach = r ** n_loops
    assert changed_by(model, ids, 0, n_loops) == list(range(min(reach, 30)))
    assert changed_by(model, ids, 4, n_loops) == list(range(4, min(4 + reach, 30)))


@pytest.mark.parametrize("r", [2, 3, 5])
def test_the_loops_that_a_length_takes(r):
    loops_for = dilated_model(dilation=r).recurrent.loops_for
    for t in range(1, 12):                                       # where a logarithm would round
        assert [loops_for(r ** t + off) for off in (-1, 0, 1)] == [max(1, t), t, t + 1]
    assert loops_for(1) == 1


def by_hand(attn: SlotAttention, x, distance, masked=False):
    """The formula of `SlotAttention`, position by position, head by head; or with what lies before
    the start left out of the softmax."""
    c, d = attn.config, attn.head_dim
    q, k, v = attn.qkv.weight.split([c.n_heads * d, c.n_kv_heads * d, c.n_kv_heads * d])
    turn = rope_table(0, c.dilation, 1, d, c.rope_theta, x)
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        gaps = [j * distance for j in range(c.dilation) if not masked or i >= j * distance]
        seen = torch.stack([x[:, i - gap] if i >= gap else attn.start.expand(len(x), -1)
                            for gap in gaps], 1)
        heads = []
        for head in range(c.n_heads):
            own, group = slice(head * d, (head + 1) * d), head // (c.n_heads // c.n_kv_heads)
            shared = slice(group * d, (group + 1) * d)
            keys = rotate(F.linear(seen, k[shared]).unsqueeze(2), turn[:len(gaps)]).squeeze(2)
            query = F.linear(x[:, i], q[own]).unsqueeze(1)
            weights = ((keys * query).sum(-1) * d ** -0.5).softmax(-1).unsqueeze(-1)
            heads.append((weights * F.linear(seen, v[shared])).sum(1))
        out[:, i] = F.linear(torch.cat(heads, -1), attn.out.weight)
    return out


@pytest.mark.parametrize(("r", "distance"), [(2, 1), (2, 4), (3, 1), (3, 3), (2, 64)])
def test_attention_over_slots_is_its_formula(r, distance):
    model = dilated_model(dilation=r, dtype=torch.float64)
    x = torch.randn(2, 11, model.config.dim, dtype=torch.float64)
    ctx = attention.Context(None, None, None, None)
    with torch.no_grad():
        attn = model.recurrent.block.attn
        assert torch.allclose(attn(x, ctx, "loop.0", distance), by_hand(attn, x, distance))


def test_without_something_before_the_start_a_letter_twice_is_the_letter():
    """Why there is a learned vector before the start: weights that sum to 1 make of a value beside
    an equal value what they make of it alone, so that a mask could not tell a a from a."""
    attn = dilated_model(dtype=torch.float64).recurrent.block.attn
    x = torch.randn(1, 1, attn.config.dim, dtype=torch.float64).expand(-1, 2, -1)
    with torch.no_grad():
        alone, twice = by_hand(attn, x, 1, masked=True)[0]
        assert torch.allclose(alone, twice)
        alone, twice = by_hand(attn, x, 1)[0]
        assert not torch.allclose(alone, twice)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), r=st.sampled_from([2, 3]),
       cuts=st.lists(st.integers(1, 20), min_size=1, max_size=8), n_loops=st.integers(1, 6))
def test_cached_is_uncached_over_any_pieces(seed, r, cuts, n_loops):
    model, ids = dilated_model(seed, dilation=r), strings(seed, 2, sum(cuts))
    cache = KVCache()
    with torch.no_grad():
        logits = torch.cat([model(piece, n_loops, cache) for piece in ids.split(cuts, 1)], 1)
        assert torch.allclose(logits, model(ids, n_loops), atol=1e-4)


def test_with_codes_cached_is_uncached_bit_for_bit():
    bare = dilated_model(3)
    model = with_codes(bare, torch.randn(5, bare.config.dim, generator=torch.Generator()
                                         .manual_seed(0)))
    ids, cache = strings(3, 2, 41), KVCache()
    with torch.no_grad():
        pieces = [model(piece, 6, cache) for piece in ids.split([1, 7, 20, 1, 12], 1)]
        answers, whole = torch.cat(pieces, 1), model(ids, 6)
    assert torch.allclose(answers, whole, atol=1e-5)
    assert torch.equal(answers.argmax(-1), whole.argmax(-1))


def test_an_entry_keeps_what_its_loop_can_still_read():
    """Loop t reads 2^t back: over T loops 2^T - 1 positions in all, however long the string."""
    model, cache = dilated_model(), KVCache()
    c, n_loops = model.config, 4
    per_position = 2 * c.n_kv_heads * c.dim // c.n_heads * 4
    for length in (40, 80):
        model(strings(0, 1, 40), n_loops, cache)
        own = sum(strip.nbytes(cache.length) for (layer, _), strip in cache._strips.items()
                  if layer.startswith("loop."))
        assert own == (2 ** n_loops - 1) * per_position
        assert cache.length == length
    assert len(cache) == c.prelude_layers + n_loops + c.coda_layers


def test_loops_past_the_length_are_one_map_of_each_state_by_itself():
    model, ids = dilated_model(), strings(5, 2, 6)
    ctx = model.context(ids)
    h = torch.randn(2, 6, model.config.dim)
    with torch.no_grad():
        late = [model.recurrent.combine(h, t, ctx)[0] for t in (3, 4, 99)]
        alone = torch.cat([model.recurrent.combine(h[:, i:i + 1], 0, ctx)[0] for i in range(6)], 1)
    assert torch.equal(late[0], late[1]) and torch.equal(late[0], late[2])
    assert torch.allclose(late[0], alone, atol=1e-5)


def loops_run(model, length, n_loops=None):
    ran = []
    model(strings(0, 1, length), n_loops, observer=lambda record: ran.append(record.loop))
    return len(ran)


def test_it_stops_when_nothing_is_left_to_read_and_nothing_changes():
    bare = dilated_model(1)
    one = with_codes(bare, torch.randn(1, bare.config.dim))       # all is at rest from loop 1 on
    for length, loops in ((1, 2), (2, 2), (3, 3), (4, 3), (17, 6)):
        assert loops_run(one, length) == loops == one.recurrent.loops_for(length) + 1
    assert loops_run(bare, 5, 9) == 9                            # without codes it goes on
    free = OpenMythos(replace(one.config, halting="none"))
    assert loops_run(free, 17) == 5                              # no loop to see that nothing does


def test_generate_takes_the_loops_that_the_end_takes_and_the_cache_changes_nothing():
    model = with_codes(dilated_model(2), torch.randn(4, DILATED["dim"]))
    ids = strings(1, 2, 5)
    ran = []
    cached = model.generate(ids, 12, temperature=0.0,
                            observer=lambda record: ran.append(record.loop))
    assert max(ran) + 1 == 5                                     # 17 positions
    assert torch.equal(cached, model.generate(ids, 12, temperature=0.0, use_cache=False))


def test_a_cache_without_a_number_of_loops_says_where_they_end():
    model, cache = dilated_model(max_loop_iters=3), KVCache()
    model(strings(0, 1, 8), kv_cache=cache)
    with pytest.raises(ValueError, match=r"sequence length = 9: must be at most .* = 8"):
        model(strings(0, 1, 1), kv_cache=cache)
    assert cache.length == 8


def test_a_cache_of_fewer_entries_than_loops_is_refused():
    with pytest.raises(ValueError, match=r"kv_cache.loops = 2: must be None .* dilation = 2"):
        dilated_model()(strings(0), 3, KVCache(loops=2))


@pytest.mark.parametrize(("field", "value"), [
    ("strict", True), ("attn_type", "mla"), ("carry", True), ("halting", "act"),
    ("loop_embedding", True), ("lora_rank", 2), ("token_shift", True), ("dilation", 0),
    ("dim", 14)])
def test_what_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"MythosConfig\.{field} = "):
        replace(dilated_model(max_seq_len=64).config, **{field: value})


def test_gradients_reach_every_part():
    model = dilated_model().train()
    model(strings(0), 3).sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {f"recurrent.injection.{name}" for name in ("log_A", "log_dt", "B")}


def test_a_dilated_model_is_written_and_read_again(tmp_path):
    model = with_codes(dilated_model(), torch.randn(3, DILATED["dim"]))
    model.save_pretrained(tmp_path)
    again = OpenMythos.from_pretrained(tmp_path)
    assert again.config == model.config and isinstance(again.config, MythosConfig)
    assert torch.equal(again(strings(0)), model(strings(0)))
