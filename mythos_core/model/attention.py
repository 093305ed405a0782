"""Grouped-query and multi-head latent attention: one forward for training, prefill and decode."""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mythos_core.model.cache import KVCache
from mythos_core.model.config import MythosConfig
from mythos_core.model.layers import NORM_EPS, RMSNorm, rope_table, rotate

BLOCK = 16  # queries of one block of windowed attention: a block reads BLOCK + window - 1 keys
# queries up to which `few` is taken: on CPU twice as fast as `scaled_dot_product_attention` at 12
# to 24, at 32 no longer
SHORT = 32


@dataclass(frozen=True)
class Context:
    """What all layers of one pass share, made once: where the tokens are, what they may see, what
    is remembered."""

    rope: Float[Tensor, "seq heads pairs 2"] | None  # of `rope_table`, for all heads that turn
    # for `few`: 0 where a query may attend, -inf where not; None = one query, or too many
    bias: Float[Tensor, "rows keys queries"] | None
    mask: Bool[Tensor, "1 seq keys"] | None  # for too many: True = may attend; None = plain causal
    cache: KVCache | None

    @classmethod
    def of(cls, config: MythosConfig, batch: int, seq: int, cache: KVCache | None,
           like: Tensor) -> "Context":
        """The context of `seq` new tokens behind what `cache` holds; `like` gives device and
        dtype."""
        start = cache.length if cache is not None else 0
        rope = (rope_table(start, seq, config.n_heads + config.kv_heads, config.rope_dim,
                           config.rope_theta, like) if config.rope else None)
        if seq == 1 or sees_itself_alone(config) or (config.window is None and seq > SHORT
                                                     and not start):
            return cls(rope, None, None, cache)
        window, block = ((start + seq, seq) if config.window is None
                         else (config.window, min(seq, BLOCK)))
        mask = band_mask(start, seq, window, block, like.device)
        # of a single block, the keys there are
        mask = mask[..., -(min(start, window - 1) + seq):] if len(mask) == 1 else mask
        if config.window is None and seq > SHORT:
            return cls(rope, None, mask, cache)
        bias = (torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
                .masked_fill(~mask, -torch.inf).mT)
        # (blocks, keys, G * block)
        bias = torch.cat([bias] * (config.n_heads // config.kv_heads), -1)
        if len(bias) > 1:
            # (B * blocks * KV, keys, G * block)
            bias = bias.repeat(batch, 1, 1).repeat_interleave(config.kv_heads, 0)
        return cls(rope, bias, None, cache)

    def remember(self, layer: str, name: str, x: Tensor, keep: int | None = None) -> Tensor:
        """x with the past that the cache holds before it, if there is a cache."""
        return x if self.cache is None else self.cache.extend(layer, name, x, keep)


def sees_itself_alone(config: MythosConfig) -> bool:
    """With a window of 1 the softmax is of a single score, and so 1: attention gives the position's
    own value, and no query or key is needed. With dropout they are kept, as it may drop that 1."""
    return config.window == 1 and not config.dropout


def band_mask(start: int, seq: int, window: int, block: int,
              device) -> Bool[Tensor, "blocks block keys"]:
    """For query r of block i and key c of that block's stretch: seen if it lies 0 .. window - 1
    back and exists."""
    query, key = (torch.arange(block, device=device)[:, None],
                  torch.arange(block + window - 1, device=device) - (window - 1))
    # position of each block's first query
    first = start + block * torch.arange(-(-seq // block), device=device)
    gap = query - key
    return (gap >= 0) & (gap < window) & (first[:, None, None] + key >= 0)


def to_blocks(x: Float[Tensor, "batch heads seq dim"], size: int, step: int,
              left: int) -> Float[Tensor, "blocks heads size dim"]:
    """Stretches of `size` positions, one every `step`, `left` zeros before the first; block and
    batch become one axis."""
    blocks = max(1, -(-(x.shape[2] + left - (size - step)) // step))
    x = F.pad(x, (0, 0, left, (blocks - 1) * step + size - left - x.shape[2]))
    # (B * blocks, H, size, dim)
    return x.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def few(q: Float[Tensor, "batch heads seq dk"], k: Float[Tensor, "batch kv_heads keys dk"],
        v: Float[Tensor, "batch kv_heads keys dv"], bias, scale: float,
        dropout_p: float) -> Float[Tensor, "batch heads seq dv"]:
    """softmax(scale * q k^T + bias) v written out. The heads of a group are so many more queries of
    the key head that they share.

    Scores lie keys by queries, so that softmax runs over many queries at once; those of a single
    position, which sees all, queries by keys.
    """
    batch, heads, seq, _ = q.shape
    # (B * KV, G * S or keys, d)
    q, k, v = (x.reshape(batch * k.shape[1], -1, x.shape[-1]) for x in (q, k, v))
    weights = (torch.bmm(q * scale, k.mT).softmax(2) if seq == 1
               else torch.baddbmm(bias, k, q.mT, alpha=scale).softmax(1).mT)
    # weights: (B * KV, G * S, keys)
    return torch.bmm(torch.dropout(weights, dropout_p, True), v).view(batch, heads, seq, -1)


def attend(q: Float[Tensor, "batch heads seq dk"], k: Float[Tensor, "batch kv_heads keys dk"],
           v: Float[Tensor, "batch kv_heads keys dv"], ctx: Context, window: int | None,
           scale: float, dropout_p: float) -> Float[Tensor, "batch heads seq dv"]:
    """softmax(scale * q k^T, what ctx lets be seen) v. The queries are the last S of the key
    positions.

    With a window, long strings are taken in blocks of queries that each read only the keys they can
    see: cost linear in length.
    """
    if ctx.bias is None and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, ctx.mask, dropout_p,
                                              is_causal=ctx.mask is None, scale=scale,
                                              enable_gqa=True)
    if window is None or q.shape[2] <= BLOCK:
        return few(q, k, v, ctx.bias, scale, dropout_p)
    batch, _, seq, _ = q.shape
    # zeros in place of keys before position 0
    size, missing = BLOCK + window - 1, window - 1 + seq - k.shape[2]
    q, k, v = (to_blocks(q, BLOCK, BLOCK, 0), to_blocks(k, size, BLOCK, missing),
               to_blocks(v, size, BLOCK, missing))
    out = few(q, k, v, ctx.bias, scale, dropout_p)  # (B * blocks, H, BLOCK, dv)
    return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :seq]


def per_head(x: Float[Tensor, "batch seq heads n"], weight: Float[Tensor, "heads n m"]
             ) -> Float[Tensor, "batch seq heads m"]:
    """Each head's own matrix applied to it. As `torch.einsum`, which takes twice as long to find
    out that this is one `bmm`."""
    out = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight)  # (H, B * S, m)
    return out.transpose(0, 1).unflatten(0, x.shape[:2])


class GQA(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): n_heads queries share n_kv_heads keys and
    values.

    The cache holds rotated keys and values: 2 * n_kv_heads * head_dim numbers a token and
    layer-loop.
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config, self.head_dim = config, config.dim // config.n_heads
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * self.head_dim,
                             bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context,
                layer: str) -> Float[Tensor, "batch seq dim"]:
        c = self.config
        if sees_itself_alone(c):
            v = F.linear(x, self.qkv.weight[-c.n_kv_heads * self.head_dim:])
            v = ctx.remember(layer, "v", v, keep=0).unflatten(-1, (c.n_kv_heads, 1, -1))
            # (B, S, KV, heads of a group, head_dim)
            return self.out(v.expand(-1, -1, -1, c.n_heads // c.n_kv_heads, -1).flatten(2))
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, S, H + 2 KV, head_dim)
        qk, v = qkv.split_with_sizes([c.n_heads + c.n_kv_heads, c.n_kv_heads], 2)
        q, k = rotate(qk, ctx.rope).split_with_sizes([c.n_heads, c.n_kv_heads], 2)
        # (B, KV, keys, d)
        k, v = (ctx.remember(layer, name, x.transpose(1, 2), c.window and c.window - 1)
                for name, x in (("k", k), ("v", v)))
        out = attend(q.transpose(1, 2), k, v, ctx, c.window, self.head_dim ** -0.5,
                     c.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, S, dim)


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024), always in its absorbed form.

    A head's score is q_nope . (U_k c) + q_rope . k_rope = (U_k^T q_nope) . c + q_rope . k_rope, so
    with U_k moved to the query all heads share one key [c, k_rope] and one value c; U_v is applied
    to the mixed latents. Nothing is ever expanded per head, and the cache holds kv_lora_rank +
    qk_rope_head_dim numbers a token and layer-loop.
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        c = self.config = config
        self.down = nn.Linear(c.dim, c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim,
                              bias=False)
        self.q_norm, self.kv_norm = (RMSNorm(c.q_lora_rank, NORM_EPS),
                                     RMSNorm(c.kv_lora_rank, NORM_EPS))
        self.q_up = nn.Linear(c.q_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim),
                              bias=False)
        self.kv_up = nn.Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim),
                               bias=False)
        self.out = nn.Linear(c.n_heads * c.v_head_dim, c.dim, bias=False)

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context,
                layer: str) -> Float[Tensor, "batch seq dim"]:
        c, nope = self.config, self.config.qk_nope_head_dim
        # (H, nope | v, rank)
        up_k, up_v = self.kv_up.weight.unflatten(0, (c.n_heads, -1)).split_with_sizes(
            [nope, c.v_head_dim], 1)
        parts = [c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim]
        if sees_itself_alone(c):
            latent = self.kv_norm(F.linear(x, self.down.weight.split(parts)[1]))
            latent = ctx.remember(layer, "latent", latent, keep=0)
            return self.out(F.linear(latent, up_v.flatten(0, 1)))
        q, latent, k_rope = self.down(x).split_with_sizes(parts, -1)
        # (B, S, H, nope), (B, S, H, rope)
        q, q_rope = (self.q_up(self.q_norm(q)).unflatten(-1, (c.n_heads, -1))
                     .split_with_sizes([nope, c.qk_rope_head_dim], -1))
        turned = rotate(torch.cat([q_rope, k_rope.unsqueeze(2)], 2), ctx.rope)
        q_rope, k_rope = turned.split_with_sizes([c.n_heads, 1], 2)
        q = torch.cat([per_head(q, up_k), q_rope], -1)
        # (B, 1, S, rank + rope)
        k = torch.cat([self.kv_norm(latent), k_rope.squeeze(2)], -1).unsqueeze(1)
        k = ctx.remember(layer, "latent", k, c.window and c.window - 1)
        # (B, H, S, rank)
        out = attend(q.transpose(1, 2), k, k[..., :c.kv_lora_rank], ctx, c.window,
                     (nope + c.qk_rope_head_dim) ** -0.5, c.dropout if self.training else 0.0)
        return self.out(per_head(out.transpose(1, 2), up_v.mT).flatten(2))  # (B, S, dim)
