"""Grouped-query and multi-head latent attention: one forward for training, prefill and decode."""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mythos_core.cache import KVCache
from mythos_core.config import MythosConfig
from mythos_core.layers import NORM_EPS, rope_table, rotate

BLOCK = 32  # queries of one block of windowed attention: a block reads BLOCK + window - 1 keys


@dataclass(frozen=True)
class Context:
    """What all layers of one pass share, made once: where the tokens are, what they may see, what is remembered."""

    rope: tuple[Tensor, Tensor] | None   # of `rope_table`, each (S, 1, rope_dim)
    mask: Bool[Tensor, "..."] | None     # True = may attend; None = plain causal, or a single query that sees all
    cache: KVCache | None

    @classmethod
    def of(cls, config: MythosConfig, batch: int, seq: int, cache: KVCache | None, like: Tensor) -> "Context":
        """The context of `seq` new tokens behind what `cache` holds; `like` gives device and dtype."""
        start = cache.length if cache is not None else 0
        rope = rope_table(start, seq, config.rope_dim, config.rope_theta, like) if config.rope else None
        if config.window is not None and seq > BLOCK:
            mask = band_mask(start, seq, config.window, like.device)
            mask = mask.expand(batch, *mask.shape).reshape(-1, 1, *mask.shape[1:])          # (B * blocks, 1, block, keys)
        elif config.window is not None:
            mask = band_mask(start, seq, config.window, like.device)[0, :, -(min(start, config.window - 1) + seq):]
        elif start and seq > 1:
            mask = torch.ones(seq, start + seq, dtype=torch.bool, device=like.device).tril(start)
        else:
            mask = None
        return cls(rope, mask, cache)

    def remember(self, layer: str, name: str, x: Tensor, keep: int | None = None) -> Tensor:
        """x with the past that the cache holds before it, if there is a cache."""
        return x if self.cache is None else self.cache.extend(layer, name, x, keep)


def band_mask(start: int, seq: int, window: int, device) -> Bool[Tensor, "blocks block keys"]:
    """For query r of block i and key c of that block's stretch: seen if it lies 0 .. window - 1 back and exists."""
    block = min(seq, BLOCK)
    query, key = torch.arange(block, device=device)[:, None], torch.arange(block + window - 1, device=device) - (window - 1)
    first = start + block * torch.arange(-(-seq // block), device=device)                   # position of each block's first query
    gap = query - key
    return (gap >= 0) & (gap < window) & (first[:, None, None] + key >= 0)


def to_blocks(x: Float[Tensor, "batch heads seq dim"], size: int, step: int, left: int) -> Float[Tensor, "blocks heads size dim"]:
    """Stretches of `size` positions, one every `step`, `left` zeros before the first; block and batch become one axis."""
    blocks = max(1, -(-(x.shape[2] + left - (size - step)) // step))
    x = F.pad(x, (0, 0, left, (blocks - 1) * step + size - left - x.shape[2]))
    return x.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)                     # (B * blocks, H, size, dim)


def attend(q: Float[Tensor, "batch heads seq dk"], k: Float[Tensor, "batch kv_heads keys dk"], v: Float[Tensor, "batch kv_heads keys dv"],
           mask, window: int | None, **sdpa) -> Float[Tensor, "batch heads seq dv"]:
    """softmax(q k^T * scale + mask) v. The queries are the last S of the key positions.

    With a window, long strings are taken in blocks of queries that each read only the keys they can see: cost linear in length.
    """
    if window is None or q.shape[2] <= BLOCK:
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True, **sdpa)
    batch, _, seq, _ = q.shape
    block, missing = BLOCK, window - 1 + seq - k.shape[2]                                    # zeros in place of keys before position 0
    q, k, v = to_blocks(q, block, block, 0), to_blocks(k, block + window - 1, block, missing), to_blocks(v, block + window - 1, block, missing)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **sdpa)  # (B * blocks, H, block, dv)
    return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :seq]


class GQA(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): n_heads queries share n_kv_heads keys and values.

    The cache holds rotated keys and values: 2 * n_kv_heads * head_dim numbers a token and layer-loop.
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config, self.head_dim = config, config.dim // config.n_heads
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context, layer: str) -> Float[Tensor, "batch seq dim"]:
        c = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))                                # (B, S, H + 2 KV, head_dim)
        qk, v = qkv.split([c.n_heads + c.n_kv_heads, c.n_kv_heads], 2)
        q, k = rotate(qk, ctx.rope).split([c.n_heads, c.n_kv_heads], 2)
        keep = c.window and c.window - 1
        k, v = (ctx.remember(layer, name, x.transpose(1, 2), keep) for name, x in (("k", k), ("v", v)))  # (B, KV, past + S, head_dim)
        out = attend(q.transpose(1, 2), k, v, ctx.mask, c.window, dropout_p=c.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))                                     # (B, S, dim)


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024), always in its absorbed form.

    A head's score is q_nope . (U_k c) + q_rope . k_rope = (U_k^T q_nope) . c + q_rope . k_rope, so with U_k moved to the
    query all heads share one key [c, k_rope] and one value c; U_v is applied to the mixed latents. Nothing is ever
    expanded per head, and the cache holds kv_lora_rank + qk_rope_head_dim numbers a token and layer-loop.
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        c = self.config = config
        self.down = nn.Linear(c.dim, c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.q_norm, self.kv_norm = nn.RMSNorm(c.q_lora_rank, NORM_EPS), nn.RMSNorm(c.kv_lora_rank, NORM_EPS)
        self.q_up = nn.Linear(c.q_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), bias=False)
        self.kv_up = nn.Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.out = nn.Linear(c.n_heads * c.v_head_dim, c.dim, bias=False)

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context, layer: str) -> Float[Tensor, "batch seq dim"]:
        c, nope = self.config, self.config.qk_nope_head_dim
        q, latent, k_rope = self.down(x).split([c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim], -1)
        q = self.q_up(self.q_norm(q)).unflatten(-1, (c.n_heads, -1))                        # (B, S, H, nope + rope)
        k_rope = rotate(k_rope.unsqueeze(2), ctx.rope).squeeze(2)                           # (B, S, rope)
        up_k, up_v = self.kv_up.weight.unflatten(0, (c.n_heads, -1)).split([nope, c.v_head_dim], 1)  # (H, nope | v, rank)
        q = torch.cat([torch.einsum("bshn,hnr->bshr", q[..., :nope], up_k), rotate(q[..., nope:], ctx.rope)], -1)
        k = torch.cat([self.kv_norm(latent), k_rope], -1).unsqueeze(1)                      # (B, 1, S, rank + rope)
        k = ctx.remember(layer, "latent", k, c.window and c.window - 1)
        out = attend(q.transpose(1, 2), k, k[..., :c.kv_lora_rank], ctx.mask, c.window, scale=(nope + c.qk_rope_head_dim) ** -0.5,
                     dropout_p=c.dropout if self.training else 0.0)                         # (B, H, S, rank)
        out = torch.einsum("bhsr,hvr->bshv", out, up_v)
        return self.out(out.flatten(2))                                                     # (B, S, dim)
