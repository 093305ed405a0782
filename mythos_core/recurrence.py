"""The looped part: h_{t+1} = A * h_t + B * e + block(norm(h_t + loop_embedding(t) + e)), with LoRA, token shift and ACT."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.attention import GQA, MLA, Context
from mythos_core.config import MythosConfig
from mythos_core.layers import NORM_EPS, RMSNorm, SwiGLU
from mythos_core.moe import MoE


@dataclass(frozen=True)
class LoopRecord:
    """What an observer is told after each loop that ran."""

    loop: int                                                    # t, from 0
    h: Float[Tensor, "batch seq dim"]                            # h_{t+1}
    output: Float[Tensor, "batch seq dim"]                       # what the coda would read if this loop were the last
    expert_ids: Int[Tensor, "batch seq k"]                       # experts chosen
    halt_probability: Float[Tensor, "batch seq"] | None = None   # sigma(halt(h)); None with halting off
    halt_weight: Float[Tensor, "batch seq"] | None = None        # weight of h in the output
    first: int = 0                                               # first position computed; those before it rest, with h and experts as they were


Observer = Callable[[LoopRecord], None]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). The ffn is a MoE in the loop, SwiGLU of width 4/3 dim outside."""

    def __init__(self, config: MythosConfig, moe: bool = False):
        super().__init__()
        self.attn_norm, self.ffn_norm = RMSNorm(config.dim, NORM_EPS), RMSNorm(config.dim, NORM_EPS)
        self.attn = (GQA if config.attn_type == "gqa" else MLA)(config)
        self.ffn = MoE(config) if moe else SwiGLU(config.dim, config.dim * 4 // 3)
        self.dropout = config.dropout

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context, layer: str):
        """The block's output, and the experts chosen if its ffn is a MoE (else None)."""
        x = x + F.dropout(self.attn(self.attn_norm(x), ctx, layer), self.dropout, self.training)
        out, expert_ids = self.ffn(self.ffn_norm(x)) if isinstance(self.ffn, MoE) else (self.ffn(self.ffn_norm(x)), None)
        return x + F.dropout(out, self.dropout, self.training), expert_ids


class LTIInjection(nn.Module):
    """A * h + B * e + out, with A = exp(-exp(log_dt + log_A)) a diagonal in (0, 1): the zero-order hold of a stable
    linear system (Parcae, Prairie et al. 2026)."""

    def __init__(self, dim: int):
        super().__init__()
        self.log_A, self.log_dt = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(1))
        self.B = nn.Parameter(torch.full((dim,), 0.1))

    def get_A(self) -> Float[Tensor, "dim"]:
        """A, strictly in (0, 1) in the parameters' own dtype.

        The formula is in (0, 1) for real numbers only: exp(-exp(5)) is 0 in float32 and exp(-exp(-6)) is 1 in bfloat16. So
        the exponent is held in [-15, 4], where the exact value is between 1.9e-24 and 1 - 3.1e-7, and the result below the
        last number under 1 of the dtype.
        """
        dtype = self.log_A.dtype
        exponent = (self.log_dt.float() + self.log_A.float()).clamp(-15, 4)
        return torch.exp(-torch.exp(exponent)).clamp(torch.finfo(dtype).tiny, 1 - torch.finfo(dtype).eps / 2).to(dtype)

    def forward(self, h: Float[Tensor, "batch seq dim"], e: Float[Tensor, "batch seq dim"], out: Float[Tensor, "batch seq dim"], A: Float[Tensor, "dim"]):
        return torch.addcmul(torch.addcmul(out, self.B, e), A, h)


class LoopLoRA(nn.Module):
    """out + (down(out) * scale[t]) B: a low-rank change shared by all loops, scaled for each loop (Bae et al. 2024).

    Loops past the table use its last row.
    """

    def __init__(self, dim: int, rank: int, max_loops: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.scale = nn.Embedding(max_loops, rank)
        self.B = nn.Parameter(torch.empty(rank, dim))

    def forward(self, out: Float[Tensor, "batch seq dim"], t: int) -> Float[Tensor, "batch seq dim"]:
        scale = self.scale.weight[min(t, self.scale.num_embeddings - 1)]
        return out + (self.down(out) * scale) @ self.B


class ACTHalting(nn.Module):
    """Adaptive computation time (Graves 2016): position by position, loop t weighs h_t by p_t = sigma(halt(h_t)) until the
    sum of p reaches the threshold; the loop that crosses it weighs 1 minus the sum so far, and later ones nothing.

    A position that never crosses keeps weights that sum to less than 1 ("act", as in open-mythos) or gives what is left
    to the last loop ("act_remainder", as in Graves' paper).
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.halt = nn.Linear(config.dim, 1)
        if config.halt_bias is not None:
            nn.init.constant_(self.halt.bias, config.halt_bias)
        self.threshold, self.remainder = config.act_threshold, config.halting == "act_remainder"

    def forward(self, h: Float[Tensor, "batch seq dim"], total: Float[Tensor, "batch seq"], open: Tensor | bool = True):
        """p, the weight of this loop, what a last loop here would get on top of it (None for "act"), and the sum of weights after it;
        each (B, S). `total` is that sum before this loop, 1 where a position has halted; p is 0 where halting is not `open` yet.
        """
        p = torch.sigmoid(self.halt(h)).squeeze(-1).float()
        p = p if open is True else p * open
        weight = torch.where(total + p >= self.threshold, 1 - total, p)   # 0 once halted: total + (1 - total) rounds to 1
        total = total + weight
        return p, weight, 1 - total if self.remainder else None, total


class LearnedHalting(nn.Module):
    """A position stops at the first loop where all positions before it have stopped or stop now and p has reached act_threshold twice
    running, and is read there; one that never does is read after the last loop. p = sigma(W_2 silu(W_1 [h_i, h_{i-1}] + b_1) + b_2)
    says whether the answer at i follows from that at i - 1: if it does, and all answers before are right, it is right.
    `training.halting_loss` says on what p is trained.

    Same call as `ACTHalting`, with `pairs` in place of h: the weight is 1 at the loop of the stop and 0 elsewhere.
    """

    threshold = 1.0

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.stop_at = config.act_threshold
        self.halt = nn.Sequential(nn.Linear(2 * config.dim, config.dim), nn.SiLU(), nn.Linear(config.dim, 1))
        nn.init.constant_(self.halt[-1].bias, -2.0)              # at first nothing stops

    def forward(self, pairs: Float[Tensor, "batch seq twice"], total: Float[Tensor, "batch seq"], open: Tensor | bool = True):
        """p, the weight of this loop, what a last loop here would get on top of it, and the `total` after it: 1 where a position has
        stopped, 1/2 where p has been reached once. `open` (B, 1): whether all positions before these have stopped.
        """
        p = torch.sigmoid(self.halt(pairs)).squeeze(-1).float()
        reached, stopped = p >= self.stop_at, total >= 1
        weight = ((reached & (total > 0) | stopped).cumprod(1) * ~stopped * open).float()
        total = torch.where(stopped, 1.0, torch.maximum(weight, 0.5 * reached))
        return p, weight, (1 - weight) * ~stopped, total


def previous(x: Float[Tensor, "batch seq width"], ctx: Context, layer: str, name: str, distance: int = 1) -> Float[Tensor, "batch seq width"]:
    """x from `distance` positions before, zeros before the first; what the cache remembers of x in `layer` by `name` lies before it."""
    past = ctx.remember(layer, name, x, keep=distance)                                      # (B, up to distance + S, width)
    missing = min(distance + x.shape[1] - past.shape[1], x.shape[1])                        # positions that look before the first
    return F.pad(past, (0, 0, missing, 0))[:, :x.shape[1]]


def pairs(h: Float[Tensor, "batch seq dim"], ctx: Context, t: int = 0) -> Float[Tensor, "batch seq twice"]:
    """[h_i, h_{i-1}], what a halting head with "learned" reads after loop t."""
    return torch.cat([h, previous(h, ctx, f"loop.{t}", "halt")], -1)


def loop_embedding(n_loops: int, dim: int, like: Tensor) -> Float[Tensor, "loops dim"]:
    """For each loop t: sin and cos of t * 10000^(-2i / width) on the first width = dim // 8 channels, 0 on the others."""
    width, kind = dim // 8, dict(device=like.device, dtype=like.dtype)
    angle = torch.arange(n_loops, **kind).unsqueeze(1) / 10000.0 ** (torch.arange(0, width, 2, **kind) / width)
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1)[:, :width], (0, dim - width))


class Rest:
    """Which positions are at rest. One that has stopped runs on for `LOOPS` loops, as its neighbours settle against its
    last moves; then its state stays as it is, and every later loop sees the same of it.

    Without a cache the prefix at rest in all rows is not computed, but for the positions that a loop looks back over.
    """

    LOOPS = 4
    CUT = 32                                                     # the prefix is cut at multiples of this, as each cut needs a new mask

    def __init__(self, config: MythosConfig, ctx: Context, e: Float[Tensor, "batch seq dim"]):
        self.config, self.cache, self.ctx, self.e, self.first = config, ctx.cache, ctx, e, 0
        self.since = e.new_zeros(e.shape[:2], dtype=torch.float32)  # loops since each position stopped
        self.late = torch.zeros_like(self.since[:, -1:])         # loops before the last position stopped

    def open(self, t: int):
        """Whether all positions that the cache holds had stopped at loop t. One entry for all loops holds them as they ended."""
        return self.cache is None or t >= self.cache.stopped

    def step(self, loop, h, e, t, expert_ids):
        """`loop` for the positions from `first` on; those at rest, and the experts last chosen for them, as they were."""
        new, chosen = loop(h[:, self.first:], e[:, self.first:], t, self.ctx)
        if t == 0:
            return new, chosen
        new, chosen = torch.cat([h[:, :self.first], new], 1), torch.cat([expert_ids[:, :self.first], chosen], 1)
        resting = (self.since > self.LOOPS).unsqueeze(-1)
        return torch.where(resting, h, new), torch.where(resting, expert_ids, chosen)

    def after(self, t: int, total: Float[Tensor, "batch seq"], n_loops: int) -> bool:
        """Count loop t. True if all that was computed was at rest: later loops would write the same into the cache, which is told."""
        resting = (self.since > self.LOOPS).all(0)
        self.since = self.since + (total >= 1)
        self.late = self.late + (total[:, -1:] < 1)
        if self.cache is None:
            self._cut(int(resting.long().cumprod(0).sum()))
            return False
        done = bool(resting.all()) and t >= self.cache.settled
        if done:
            self.cache.repeat(f"loop.{t}", [f"loop.{later}" for later in range(t + 1, n_loops)], len(resting))
        if self.cache.loops is None and (done or t == n_loops - 1):
            self.cache.stopped, self.cache.settled = self.late, t if done else n_loops
        return done

    def _cut(self, resting):
        c = self.config
        first = (resting - (c.window - 1) - c.token_shift) // self.CUT * self.CUT if c.window else 0
        if first > self.first:
            self.first, self.ctx = first, Context.of(c, len(self.e), self.e.shape[1] - first, None, like=self.e)


class RecurrentBlock(nn.Module):
    """One transformer block with shared weights, looped."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config = config
        self.norm, self.block = RMSNorm(config.dim, NORM_EPS), TransformerBlock(config, moe=True)
        self.injection = LTIInjection(config.dim)
        self.loop_norm = RMSNorm(config.dim, NORM_EPS) if config.loop_norm else nn.Identity()
        self.lora = LoopLoRA(config.dim, config.lora_rank, config.max_loop_iters) if config.lora_rank else None
        self.act = None if config.halting == "none" else (LearnedHalting if config.halting == "learned" else ACTHalting)(config)

    def fixed(self, n_loops: int, like: Tensor):
        """What the loops of a pass share: A, and the embedding of each of `n_loops`, if there is one."""
        return self.injection.get_A(), loop_embedding(n_loops, self.config.dim, like) if self.config.loop_embedding else None

    def step(self, h: Float[Tensor, "batch seq dim"], e: Float[Tensor, "batch seq dim"], t: int, ctx: Context, fixed=None):
        """One loop: h_t -> (h_{t+1}, experts chosen). A pass over many loops makes what is `fixed` once."""
        A, embedding = fixed or self.fixed(t + 1, h)
        z = self.norm(h + e if embedding is None else h + e + embedding[t])
        if self.config.token_shift:
            here, there = z.chunk(2, -1)
            z = torch.cat([here, previous(there, ctx, f"loop.{t}", "shift", self.config.shift_growth ** t)], -1)
        if self.training and self.config.loop_noise:
            z = z + self.config.loop_noise * torch.randn_like(z)
        out, expert_ids = self.block(z, ctx, f"loop.{t}")
        out = out if self.lora is None else self.lora(out, t)
        return self.loop_norm(self.injection(h, e, out, A) if self.config.carry else out), expert_ids

    def _start(self, e):
        """h_0: the input, or in training, with start_noise, for half of the strings a point thrown far from it."""
        if not (self.training and self.config.start_noise):
            return e
        thrown = torch.rand(len(e), 1, 1, device=e.device) < 0.5
        return e + self.config.start_noise * torch.randn_like(e) * thrown

    def forward(self, e: Float[Tensor, "batch seq dim"], n_loops: int, ctx: Context, observer: Observer | None = None):
        """The halting-weighted sum of h_1 .. h_T, or h_T with halting off, as in training with "learned"; both (B, S, dim).

        Without a cache the loop ends when every position has halted, which changes no output; under `torch.compile` every loop runs
        with ACT, since one graph cannot ask for a value. With a cache too: a later token may loop longer, and then reads what these
        positions left at every loop. With "learned" halting a stopped position comes to rest (`Rest`), and is not computed where nothing
        reads it; loops that only see resting positions would write the same again into a cache, so they are not run but repeated.
        """
        h, weighted, total = self._start(e), torch.zeros_like(e), e.new_zeros(e.shape[:2], dtype=torch.float32)
        act, rest, expert_ids = self.act, None, None
        if isinstance(act, LearnedHalting):
            act, rest = (None, None) if self.training else (act, Rest(self.config, ctx, e))
        step = partial(self.step, fixed=self.fixed(n_loops, e))
        may_end = act is not None and ctx.cache is None and not torch.compiler.is_compiling()
        for t in range(n_loops):
            h, expert_ids = step(h, e, t, ctx) if rest is None else rest.step(step, h, e, t, expert_ids)
            output, p, weight = h, None, None
            if act is not None:
                seen, open = (h, t + 1 >= self.config.min_loops) if rest is None else (pairs(h, ctx, t), rest.open(t))
                p, weight, left, total = act(seen, total, open)
                weighted = torch.addcmul(weighted, weight.unsqueeze(-1).to(h.dtype), h)
                output = weighted if left is None else torch.addcmul(weighted, left.unsqueeze(-1).to(h.dtype), h)
                weight = weight if left is None or t < n_loops - 1 else weight + left
            if observer is not None:
                observer(LoopRecord(t, h, output, expert_ids, p, weight, rest.first if rest else 0))
            if (may_end and bool((total >= act.threshold).all())) or (rest and rest.after(t, total, n_loops)):
                break
        return output
