"""What `generate` and `stream` must give whatever the loop is, from what their parts give alone."""
from itertools import combinations

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small import DILATED, STRICT, dilated_model, strict_model

from mythos_core import KVCache, OpenMythos
from mythos_core.model.sampling import nucleus, sample

#: Every kind of loop. In float64, so that two ways to one number agree on what is most likely.
KINDS = {
    "act": lambda: OpenMythos(tiny()),
    "mla": lambda: OpenMythos(tiny("mla", halting="act_remainder")),
    "window and shift": lambda: OpenMythos(tiny(window=4, token_shift=True, n_experts=16)),
    "no carry": lambda: OpenMythos(tiny("mla", window=3, carry=False, halting="none", rope=False)),
    "strict": lambda: strict_model(attn_type="mla"),
    "strict, in strides": lambda: strict_model(stride=3, window=5),
    "strict, with the carry": lambda: strict_model(carry=True, window=2),
    "dilated": lambda: dilated_model(),
    "dilated by 3": lambda: dilated_model(dilation=3, window=None, max_loop_iters=4),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [4, 9, 6]


def of(kind) -> OpenMythos:
    return KINDS[kind]().double().eval()


def prompts(seq=9, seed=0):
    """Letters that all models have, but no 0."""
    return torch.randint(1, 6, (3, seq), generator=torch.Generator().manual_seed(seed))


def drawn(model, ids, new, seed=1, **how):
    """Sampled: other logits than expected show before one of them becomes the largest."""
    return model.generate(ids, new, 3, generator=torch.Generator().manual_seed(seed), **how)


@every_kind
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_calls_with_one_cache_are_one_on_all_of_it(kind, temperature):
    model, cache = of(kind), KVCache()
    first = drawn(model, prompts(), 4, temperature=temperature, kv_cache=cache)
    assert cache.length == first.shape[1] - 1 == 12
    ids = torch.cat([first, prompts(5, seed=2)], 1)
    second = drawn(model, ids[:, 12:], 6, 2, temperature=temperature, kv_cache=cache)
    whole = drawn(model, ids, 6, 2, temperature=temperature, kv_cache=KVCache())
    assert torch.equal(torch.cat([ids[:, :12], second], 1), whole) and cache.length == 23
    if not kind.startswith("dilated"):                           # whose loops grow with the end
        assert torch.equal(whole, drawn(model, ids, 6, 2, temperature=temperature))


@every_kind
@pytest.mark.parametrize("how", [{}, dict(use_cache=False), dict(stop=[2, 3])])
def test_each_row_of_unequal_lengths_is_what_it_gives_alone(kind, how):
    model, ids, how = of(kind), prompts(), {"temperature": 0.0, "n_loops": 3, **how}
    out = model.generate(ids, 7, lengths=LENGTHS, **how)
    assert "stop" in how or out.shape == (3, 16)
    for row, prompt, length in zip(out, ids, LENGTHS):
        alone = model.generate(prompt[None, :length], 16 - length, **how)[0]
        assert torch.equal(row[:len(alone)], alone)
        assert (row[len(alone):] == alone[-1]).all()             # until the last row has ended
    other = ids.clone()
    other[0, 4:], other[2, 6:] = 5, 1
    again = model.generate(other, 7, lengths=torch.tensor(LENGTHS), **how)
    assert torch.equal(again, out)                               # whatever the padding is


@every_kind
def test_lengths_go_on_from_a_cache_that_then_holds_rows_without_gaps(kind):
    model, ids, cache = of(kind), prompts(), KVCache()
    how = dict(temperature=0.0, n_loops=3)
    past = model.generate(prompts(5, 3), 1, kv_cache=cache, **how)
    out = model.generate(torch.cat([past[:, 5:], ids], 1), 4, kv_cache=cache,
                         lengths=[1 + n for n in LENGTHS], **how)
    out = torch.cat([past[:, :5], out], 1)
    for row, before, prompt, length in zip(out, past, ids, LENGTHS):
        alone = torch.cat([before, prompt[:length]])[None]
        assert torch.equal(row, model.generate(alone, 13 - length, kv_cache=KVCache(), **how)[0])
    more = model.generate(out[:, -1:], 2, kv_cache=cache, **how)
    assert torch.equal(more, model.generate(out, 2, kv_cache=KVCache(), **how)[:, 18:])


LOOPS = st.sampled_from([
    {}, dict(token_shift=True), dict(halting="act_remainder"), dict(halting="none", carry=False),
    dict(halting="none", loop_norm=True), dict(n_experts=16), {**STRICT, "init_std": 0.1},
    {**STRICT, "carry": True, "init_std": 0.1}, {**STRICT, "token_shift": False, "stride": 3},
    DILATED])


@settings(deadline=None, max_examples=60)
@given(changes=LOOPS, attn=st.sampled_from(["gqa", "mla"]), seed=st.integers(0, 99),
       window=st.sampled_from([None, 4, 20]), rope=st.booleans(), seq=st.sampled_from([9, 40]),
       n_loops=st.sampled_from([None, 1, 2, 5]))
def test_padding_on_the_right_changes_no_logits_before_it(changes, attn, seed, window, rope, seq,
                                                          n_loops):
    torch.manual_seed(seed)
    if "dilation" in changes:                                    # by itself it counts the padding
        attn, n_loops = "gqa", n_loops or 4
    model = OpenMythos(tiny(attn, **{"window": window, "rope": rope, **changes})).double().eval()
    ids = torch.randint(0, 6, (3, seq))
    with torch.no_grad():
        padded = model(ids, n_loops)
        for row, prompt, length in zip(padded, ids, LENGTHS):
            alone = model(prompt[None, :length], n_loops)[0]
            assert torch.allclose(row[:length], alone, rtol=0, atol=1e-9 * alone.abs().max())


@settings(deadline=None, max_examples=60)
@given(logits=st.lists(st.integers(-20, 20), min_size=1, max_size=7, unique=True),
       top_p=st.floats(0.01, 1))
def test_the_nucleus_is_the_least_set_that_holds_p(logits, top_p):
    share = torch.tensor(sorted(logits, reverse=True)).double().div(8).softmax(-1)
    kept = nucleus(share, top_p) > 0
    size = next(size for size in range(1, len(share) + 1)
                if max(map(sum, combinations(share.tolist(), size))) >= top_p - 1e-12)
    assert kept.tolist() == [True] * size + [False] * (len(share) - size)
    assert torch.equal(nucleus(share, top_p)[kept], share[kept])


def test_a_share_of_exactly_p_is_enough():
    share = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert [(nucleus(share, p) > 0).sum().item() for p in (0.5, 0.51, 0.75, 0.875, 0.9, 1.0)] == [
        1, 2, 2, 3, 4, 4]


def test_sampling_follows_the_distribution_in_the_nucleus_of_the_top_k():
    """Of the shares 1/10 to 4/10 the top 3 are 2/9, 3/9, 4/9, and the least set with 0.75 of these
    is the last two of them; of all four shares it would be three."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(20_000, 4)
    share = (sample(logits, 1.0, 3, torch.Generator().manual_seed(0), 0.75)
             .flatten().bincount(minlength=4) / 20_000)
    assert share[:2].sum() == 0 and share[3].item() == pytest.approx(4 / 7, abs=0.02)


def test_a_small_nucleus_is_the_most_likely_token_alone():
    model = of("act")
    assert torch.equal(drawn(model, prompts(), 8, top_p=1e-9),
                       drawn(model, prompts(), 8, temperature=0.0))


@pytest.mark.parametrize("stop", [2, [2], (2, 3, 5)])
def test_a_row_is_what_it_is_without_stop_up_to_its_first_one_and_that_one_from_there(stop):
    model, stops = of("strict"), [stop] if isinstance(stop, int) else stop
    ids = torch.tensor([[4, 2], [1, 2], [5, 3]])                 # those of a prompt end nothing
    # draws of a row do not hang on the other rows' tokens
    free, out = (drawn(model, ids, 40, temperature=2.0, **how) for how in ({}, dict(stop=stop)))
    ends = []
    for row, expected in zip(out, free):
        ends.append(next(i for i in range(2, 42) if expected[i] in stops) + 1)
        assert torch.equal(row[:ends[-1]], expected[:ends[-1]])
        assert (row[ends[-1]:] == expected[ends[-1] - 1]).all()
    # it ends when the last row does
    assert out.shape == (3, max(ends)) and len(set(ends)) > 1 and max(ends) < 42


def test_a_stream_gives_each_column_when_it_is_drawn_and_only_then():
    model, cache = of("mla"), KVCache()
    columns = model.stream(prompts(), 5, 3, temperature=0.0, kv_cache=cache)
    assert cache.length == 0
    found = []
    for column in columns:
        found.append(column)
        assert column.shape == (3, 1) and cache.length == 8 + len(found)
    whole = model.generate(prompts(), 5, 3, temperature=0.0)
    assert torch.equal(torch.cat([prompts(), *found], 1), whole)
    unequal = torch.cat([*model.stream(prompts(), 5, 3, temperature=0.0, lengths=LENGTHS)], 1)
    assert unequal.shape == (3, 10) and torch.equal(unequal[1, :5], prompts()[1, 4:])


def test_streams_at_one_time_are_in_eval_mode_and_leave_the_model_as_it_is():
    model = of("window and shift")
    expected = [drawn(model, prompts(seed=i), 6 + i) for i in (0, 1)]
    training = OpenMythos(tiny(window=4, token_shift=True, n_experts=16, dropout=0.5,
                               balance_rate=0.1)).double().train()
    training.load_state_dict(model.state_dict())
    training.coda.eval()
    modes = [module.training for module in training.modules()]
    streams = [training.stream(prompts(seed=i), 6 + i, 3,
                               generator=torch.Generator().manual_seed(1)) for i in (0, 1)]
    found = [[], []]
    for _ in range(7):
        for columns, stream in zip(found, streams):
            columns.extend([column] if (column := next(stream, None)) is not None else [])
            assert [module.training for module in training.modules()] == modes
    assert all(torch.equal(torch.cat(columns, 1), out[:, 9:])
               for columns, out in zip(found, expected))
    assert not training.recurrent.block.ffn.load.any()


@pytest.mark.parametrize("changes, named", [
    (dict(top_p=0.0), r"top_p = 0.0: must be in \(0, 1\]"), (dict(top_p=1.5), "top_p = 1.5"),
    (dict(top_p=torch.nan), "top_p = nan"), (dict(temperature=torch.nan), "temperature = nan"),
    (dict(stop=17), "stop = 17: must be tokens, in 0 .. vocab_size - 1 = 16"),
    (dict(stop=[3, -1]), r"stop = \[3, -1\]"),
    (dict(lengths=[4, 9]), r"lengths = \[4, 9\]: must be a number in 1 .. 9 for each of 3 rows"),
    (dict(lengths=[0, 9, 9]), r"lengths = \[0, 9, 9\]"), (dict(lengths=[4, 9, 10]), "lengths"),
    (dict(lengths=torch.tensor([4.0, 9.0, 9.0])), r"lengths = \[4.0, 9.0, 9.0\]"),
    (dict(kv_cache=KVCache(), use_cache=False), "use_cache = False: must be True with a kv_cache"),
    (dict(kv_cache=KVCache(), cache_loops=2), "cache_loops = 2: must be None"),
    (dict(max_new_tokens=50), r"kv_cache.length \+ ids.shape\[1\] \+ max_new_tokens = 65"),
    (dict(n_loops=4), "kv_cache was filled with n_loops = 3, this pass has n_loops = 4")])
def test_bad_arguments_are_refused_by_name_before_any_pass(changes, named):
    model, cache = of("act"), KVCache()
    model(prompts(6), 3, cache)
    arguments = {"max_new_tokens": 5, "n_loops": 3, "kv_cache": cache, **changes}
    with pytest.raises(ValueError, match=named):
        model.stream(prompts(), **arguments)                     # when called, not when read
    assert cache.length == 6


def test_a_dilated_model_with_a_cache_says_where_its_loops_end():
    model = dilated_model(max_loop_iters=4)
    with pytest.raises(ValueError, match=r"sequence length = 17: must be at most .* = 16"):
        model.generate(prompts(), 8, kv_cache=KVCache())
    assert model.generate(prompts(), 8).shape == (3, 17)
