import math

import pytest
import torch
from conftest import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mythos_core import KVCache
from mythos_core.model.attention import BLOCK, GQA, MLA, SHORT, Context, attend
from mythos_core.model.layers import rope_table, rotate

X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context(config, x):
    return Context.of(config, *x.shape[:2], None, x)


def make(kind, config):
    layer = kind(config).double()
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return layer


def plain_attention(q, k, v, scale, window=None):
    """float64 softmax attention by the book, one score at a time allowed or not."""
    gap = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    seen = (gap >= 0) & (gap < (window or math.inf))
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf).softmax(-1) @ v


def test_rope_turns_pairs_and_only_the_distance_counts():
    table = rope_table(0, 20, 1, 8, 500.0, X)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = (rotate(q.expand(1, 20, 1, 8), table).squeeze()
              @ rotate(k.expand(1, 20, 1, 8), table).squeeze().T)
    for distance in range(-19, 20):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[:1].expand_as(along))
    assert torch.allclose(rotate(q.expand(1, 20, 1, 8), table).norm(dim=-1),
                          q.norm().expand(1, 20, 1))
    assert torch.equal(rope_table(7, 5, 1, 8, 500.0, X), table[7:12])


def test_gqa_whose_groups_agree_is_multi_head_attention():
    few, all_heads = make(GQA, tiny(n_kv_heads=2)), make(GQA, tiny(n_kv_heads=4))
    q, k, v = few.qkv.weight.unflatten(0, (8, 8)).split([4, 2, 2])
    all_heads.qkv.weight.data = torch.cat([q, k.repeat_interleave(2, 0),
                                           v.repeat_interleave(2, 0)]).flatten(0, 1)
    all_heads.out.weight.data = few.out.weight.data
    assert torch.allclose(few(X, context(few.config, X), "a"),
                          all_heads(X, context(all_heads.config, X), "a"))


def test_gqa_is_attention_by_the_book():
    layer = make(GQA, tiny(n_kv_heads=4, rope=False))
    q, k, v = layer.qkv(X).view(2, 11, 12, 8).transpose(1, 2).split(4, 1)
    book = layer.out(plain_attention(q, k, v, 8 ** -0.5).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(X, context(layer.config, X), "a"), book)


@pytest.mark.parametrize("odd", [{}, dict(qk_nope_head_dim=7, kv_lora_rank=5, q_lora_rank=9)])
def test_mla_absorbed_equals_expanded(odd):
    c = tiny("mla", **odd)
    layer = make(MLA, c)
    ctx = context(c, X)
    q, latent, k_rope = layer.down(X).split([c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim], -1)
    q_nope, q_rope = layer.q_up(layer.q_norm(q)).view(2, 11, 4,
                                                      -1).split([c.qk_nope_head_dim,
                                                          c.qk_rope_head_dim], -1)
    k_nope, v = layer.kv_up(layer.kv_norm(latent)).view(2, 11, 4,
                                                        -1).split([c.qk_nope_head_dim,
                                                            c.v_head_dim], -1)
    k_rope = rotate(k_rope.unsqueeze(2).contiguous(), ctx.rope).expand(2, 11, 4, -1)
    q, k = (torch.cat([q_nope, rotate(q_rope.contiguous(), ctx.rope)], -1),
            torch.cat([k_nope, k_rope], -1))
    out = plain_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                          q.shape[-1] ** -0.5)
    assert torch.allclose(layer(X, ctx, "a"), layer.out(out.transpose(1, 2).flatten(2)))


@settings(deadline=None, max_examples=40)
@given(seq=st.integers(1, 3 * BLOCK + 5), window=st.none() | st.integers(1, 2 * BLOCK),
       past=st.integers(0, 40), mla=st.booleans())
@example(seq=SHORT, window=None, past=0, mla=False).via("the last that is written out")
@example(seq=SHORT + 1, window=None, past=0, mla=False).via("the first that is not")
@example(seq=SHORT + 1, window=None, past=5, mla=True).via("the same behind a past, with one key "
                                                           "head")
@example(seq=BLOCK + 1, window=1, past=3, mla=True).via("dropout keeps the score that is alone")
def test_every_way_of_attending_is_masked_attention(seq, window, past, mla):
    config = tiny("mla" if mla else "gqa", window=window, dropout=0.25)
    q, k, v = (torch.randn(2, heads, past + seq, 4, dtype=torch.float64)
               for heads in (4, config.kv_heads, config.kv_heads))
    book = plain_attention(q, *(x.repeat_interleave(4 // config.kv_heads, 1) for x in (k, v)), 0.5,
                           window)[:, :, past:]
    cache = KVCache()
    cache.length = past
    ctx = Context.of(config, 2, seq, cache, X)
    seen = past + seq if window is None else min(past, window - 1) + seq
    assert torch.allclose(attend(q[:, :, past:], k[:, :, -seen:], v[:, :, -seen:], ctx, window, 0.5,
                                 0.0), book)


def test_with_a_window_of_one_dropout_leaves_values_out_and_makes_up_for_them():
    config, v = tiny(window=1, dropout=0.25), torch.rand(2, 2, 500, 3) + 1
    ctx = Context.of(config, 2, 500, None, v)
    out = attend(torch.rand(2, 4, 500, 3), v, v, ctx, 1, 0.5, config.dropout)
    ratio = (out / v.repeat_interleave(2, 1))[..., :1]
    assert torch.allclose(out, ratio * v.repeat_interleave(2, 1))        # by whole values
    assert ((ratio == 0) | ((ratio - 4 / 3).abs() < 1e-6)).all()
    assert (ratio == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_with_a_window_of_one_attention_is_the_value_that_it_would_be_with_scores(attn):
    layer = make(GQA if attn == "gqa" else MLA, tiny(attn, window=1)).eval()
    alone = layer(X, context(layer.config, X), "a")
    layer.config = tiny(attn, window=1, dropout=0.25)            # so that they are computed
    assert torch.allclose(layer(X, context(layer.config, X), "a"), alone)


@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_a_window_longer_than_the_string_is_full_attention(attn):
    layer = make(GQA if attn == "gqa" else MLA, tiny(attn))
    full = layer(X, context(layer.config, X), "a")
    layer.config = tiny(attn, window=30)
    assert torch.allclose(layer(X, context(layer.config, X), "a"), full)
