"""The looped part: h_{t+1} = A * h_t + B * e + block(norm(h_t + loop_embedding(t) + e)), with LoRA,
token shift and ACT."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mythos_core.model.attention import GQA, MLA, Context
from mythos_core.model.config import MythosConfig
from mythos_core.model.halting import ACTHalting
from mythos_core.model.layers import NORM_EPS, RMSNorm, SwiGLU, known, several_processes
from mythos_core.model.moe import MoE


@dataclass(frozen=True)
class LoopRecord:
    """What an observer is told after each loop that ran."""

    loop: int                                                    # t, from 0
    h: Float[Tensor, "batch seq dim"]                            # h_{t+1}
    # what the coda would read if this loop were the last
    output: Float[Tensor, "batch seq dim"]
    expert_ids: Int[Tensor, "batch seq k"]                       # experts chosen
    halt_probability: Float[Tensor, "batch seq"] | None = None   # ACT: sigma(halt(h))
    halt_weight: Float[Tensor, "batch seq"] | None = None        # ACT: weight of h in the output
    # strict: this loop changed nothing up to here; dilated: nothing here
    settled: Bool[Tensor, "batch seq"] | None = None


Observer = Callable[[LoopRecord], None]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). The ffn is a MoE in the loop, SwiGLU of width
    4/3 dim outside."""

    def __init__(self, config: MythosConfig, moe: bool = False):
        super().__init__()
        self.attn_norm, self.ffn_norm = RMSNorm(config.dim, NORM_EPS), RMSNorm(config.dim, NORM_EPS)
        self.attn = (GQA if config.attn_type == "gqa" else MLA)(config)
        self.ffn: Any = MoE(config) if moe else SwiGLU(config.dim, config.dim * 4 // 3)
        self.dropout = config.dropout

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context, layer: str, **how):
        """The block's output, and the experts chosen if its ffn is a MoE (else None); `how` is for
        the attention."""
        mixed = self.attn(self.attn_norm(x), ctx, layer, **how)
        x = x + torch.dropout(mixed, self.dropout, self.training)
        out, expert_ids = self.ffn(self.ffn_norm(x)), None
        if isinstance(self.ffn, MoE):
            out, expert_ids = out
        return x + torch.dropout(out, self.dropout, self.training), expert_ids


class LTIInjection(nn.Module):
    """A * h + B * e + out, with A = exp(-exp(log_dt + log_A)) a diagonal in (0, 1): the zero-order
    hold of a stable linear system (Parcae, Prairie et al. 2026)."""

    def __init__(self, dim: int):
        super().__init__()
        self.log_A, self.log_dt = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(1))
        self.B = nn.Parameter(torch.full((dim,), 0.1))

    def get_A(self) -> Float[Tensor, "dim"]:
        """A, strictly in (0, 1) in the parameters' own dtype.

        The formula is in (0, 1) for real numbers only: exp(-exp(5)) is 0 in float32 and
        exp(-exp(-6)) is 1 in bfloat16. So the exponent is held in [-15, 4], where the
        exact value is between 1.9e-24 and 1 - 3.1e-7, and the result below the last
        number under 1 of the dtype.
        """
        dtype, limits = self.log_A.dtype, torch.finfo(self.log_A.dtype)
        exponent = (self.log_dt.float() + self.log_A.float()).clamp(-15, 4)
        return torch.exp(-torch.exp(exponent)).clamp(limits.tiny, 1 - limits.eps / 2).to(dtype)

    def forward(self, h: Float[Tensor, "batch seq dim"], e: Float[Tensor, "batch seq dim"],
                out: Float[Tensor, "batch seq dim"], A: Float[Tensor, "dim"]):
        return torch.addcmul(out, self.B, e).addcmul_(A, h)

    def rest(self, e: Float[Tensor, "batch seq dim"], out: Float[Tensor, "batch seq dim"]):
        """The h that `forward` leaves as it is, (B * e + out) / (1 - A): where a strict loop's
        position ends once the positions before it have, since there `out` does not depend on h."""
        return torch.addcmul(out, self.B, e) / (1 - self.get_A())


class LoopLoRA(nn.Module):
    """out + (down(out) * scale[t]) B: a low-rank change shared by all loops, scaled for each loop
    (Bae et al. 2024).

    Loops past the table use its last row.
    """

    def __init__(self, dim: int, rank: int, max_loops: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.scale = nn.Embedding(max_loops, rank)
        self.B = nn.Parameter(torch.empty(rank, dim))

    def forward(self, out: Float[Tensor, "batch seq dim"],
                t: int) -> Float[Tensor, "batch seq dim"]:
        scale = self.scale.weight[min(t, self.scale.num_embeddings - 1)]
        return out + (self.down(out) * scale) @ self.B


def previous(x: Float[Tensor, "batch seq width"], ctx: Context, layer: str, name: str,
             distance: int = 1, start: Float[Tensor, "rows width"] | None = None
             ) -> Float[Tensor, "batch seq width"]:
    """x from `distance` positions before, and before the first `start`, of `distance` rows or of
    one for all, or zeros; what the cache remembers of x in `layer` by `name` lies before it."""
    past = ctx.remember(layer, name, x, keep=distance)           # (B, up to distance + S, width)
    missing = min(distance + x.shape[1] - past.shape[1], x.shape[1])   # that look before the first
    if start is None or missing <= 0:
        return F.pad(past, (0, 0, missing, 0))[:, :x.shape[1]]
    read = past.shape[1] - x.shape[1]                            # positions, all before this pass
    first = start.expand(missing, -1) if len(start) == 1 else start[read:read + missing]
    first = first.expand(len(x), -1, -1)
    return torch.cat([first, past], 1)[:, :x.shape[1]]


def loop_embedding(n_loops: int, dim: int, like: Tensor) -> Float[Tensor, "loops dim"]:
    """For each loop t: sin and cos of t * 10000^(-2i / width) on the first width = dim // 8
    channels, 0 on the others."""
    width = dim // 8
    kind: dict[str, Any] = dict(device=like.device, dtype=like.dtype)
    frequency = 10000.0 ** (torch.arange(0, width, 2, **kind) / width)
    angle = torch.arange(n_loops, **kind).unsqueeze(1) / frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1)[:, :width], (0, dim - width))


class RecurrentBlock(nn.Module):
    """One transformer block with shared weights, looped. `strict.StrictBlock` is the one that must
    settle, `dilated.DilatedBlock` the one whose reach grows by a factor with each loop."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config = config
        self.norm, self.block = RMSNorm(config.dim, NORM_EPS), TransformerBlock(config, moe=True)
        self.injection = LTIInjection(config.dim)
        self.loop_norm = RMSNorm(config.dim, NORM_EPS) if config.loop_norm else nn.Identity()
        rank = config.lora_rank
        self.lora = LoopLoRA(config.dim, rank, config.max_loop_iters) if rank else None
        self.act = ACTHalting(config) if config.halting in ("act", "act_remainder") else None
        self.codes: Tensor | None
        self.register_buffer("codes",
                             torch.zeros(config.codes, config.dim) if config.codes else None)

    def fixed(self, n_loops: int, like: Tensor):
        """What the loops of a pass share: A, if there is a carry, and the embedding of each of
        `n_loops`, if there is one."""
        embedded = self.config.loop_embedding
        embedding = loop_embedding(n_loops, self.config.dim, like) if embedded else None
        return self.injection.get_A() if self.config.carry else None, embedding

    def step(self, h: Float[Tensor, "batch seq dim"], e: Float[Tensor, "batch seq dim"], t: int,
             ctx: Context, fixed=None):
        """One loop: h_t -> (h_{t+1}, experts chosen). A pass over many loops
        makes what is `fixed` once."""
        A, embedding = fixed or self.fixed(t + 1, h)
        layer = f"loop.{t}"
        z = self.norm(h + e if embedding is None else (h + e).add_(embedding[t]))
        if self.config.token_shift:
            here, there = z.chunk(2, -1)
            z = torch.cat([here, previous(there, ctx, layer, "shift")], -1)
        out, expert_ids = self.block(self.noisy(z), ctx, layer)
        out = out if self.lora is None else self.lora(out, t)
        out = out if not self.config.carry else self.injection(h, e, out, A)
        return self.loop_norm(out), expert_ids

    def noisy(self, z):
        noise = self.config.loop_noise if self.training else 0.0
        return z + noise * torch.randn_like(z) if noise else z

    def rounded(self, h: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Each state replaced by the nearest of the codes, if there are any.

        With codes no error of rounding is handed on: as long as a state lies nearer to its code
        than to any other, every machine, every schedule of the loops and every shape of the batch
        hands on the same numbers. `proof.certify` proves that it does.
        """
        if self.codes is None:
            return h
        return F.embedding(self.code_scores(h).argmax(-1), self.codes)

    def code_scores(self, h: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq codes"]:
        """h . c - |c|^2 / 2 for each code c: the larger, the nearer."""
        return h @ self.codes.T - 0.5 * self.codes.square().sum(-1)

    def start_of(self, e):
        """h_0: the input, or in training, with start_noise, for half of the strings a
        point thrown far from it."""
        if not (self.training and self.config.start_noise):
            return e
        thrown = torch.rand(len(e), 1, 1, device=e.device) < 0.5
        return e + self.config.start_noise * torch.randn_like(e) * thrown

    def forward(self, e: Float[Tensor, "batch seq dim"], n_loops: int, ctx: Context,
                observer: Observer | None = None):
        """h_T, or with ACT the halting-weighted sum of h_1 .. h_T; (B, S, dim).

        Without a cache ACT's loop ends when every position has halted, which changes no output;
        where values are not `known`, as under `torch.compile`, every loop runs. In one of several
        processes too: sharded layers wait for each other, and would for ever if one process ended
        earlier. And with a cache: a later token may loop longer, and then reads what these
        positions left at every loop.
        """
        h, weighted = self.start_of(e), torch.zeros_like(e)
        total, act = e.new_zeros(e.shape[:2], dtype=torch.float32), self.act
        step = partial(self.step, fixed=self.fixed(n_loops, e))
        may_end = act is not None and ctx.cache is None and not several_processes()
        for t in range(n_loops):
            h, expert_ids = step(h, e, t, ctx)
            output, p, weight = h, None, None
            if act is not None:
                p, weight, left, total = act(h, total, t + 1 >= self.config.min_loops)
                output = weighted = torch.addcmul(weighted, weight.unsqueeze(-1).to(h.dtype), h)
                if left is not None:
                    output = torch.addcmul(weighted, left.unsqueeze(-1).to(h.dtype), h)
                    weight = weight + left if t == n_loops - 1 else weight
            if observer is not None:
                observer(LoopRecord(t, h, output, expert_ids, p, weight))
            if may_end and known((total >= act.threshold).all().item):
                break
        return output
