"""A model's steps on balls (`proof.balls`): what its own arithmetic may make of each context.

A block x + f(x) is as steep as I + Df is, and not as 1 and all the factors of Df are together:
those say thousands where 2 is true. So Df is computed at the centre; with a bound of the second
derivative over the ball, Taylor's formula bounds what that leaves out:

    |x' + f(x') - x - f(x)|  <=  |I + Df(x)| r + 1/2 sup |D^2 f| r^2        for |x' - x| <= r
"""
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mythos_core.model.attention import GQA
from mythos_core.model.layers import RMSNorm, rope_table, rotate
from mythos_core.model.model import OpenMythos
from mythos_core.model.moe import MoE
from mythos_core.proof.balls import FUNCTION, Arithmetic, Ball, length, silu_slope, spectral

PART = 128          # contexts of one pass: a Jacobian each
Experts = Bool[Tensor, "n experts"]


class Enclosure(Arithmetic):
    """The blocks of a float64 model on balls, for a model that computes in `arithmetic`."""

    def swiglu(self, b: Ball, m: Any) -> tuple[Ball, Tensor]:
        """Its ball, and its Jacobian at the centre."""
        inner = self.linear(b, m.gate_up.weight)
        gate, up = inner.x.chunk(2, -1)
        return (self.linear(self.glu(inner), m.down.weight),
                _gated(m.down.weight, m.gate_up.weight, silu_slope(gate) * up, F.silu(gate)))

    def beats(self, b: Ball, m: MoE) -> Bool[Tensor, "n experts experts"]:
        """Whether the first expert's score is above the second's in all of the ball."""
        W = m.router.weight
        score, off = b.x @ W.T + m.router_bias, self.score_rounding(b, W, m.router_bias)
        off = torch.cdist(W, W) * b.radius.unsqueeze(-1) + off.unsqueeze(-1) + off.unsqueeze(-2)
        return score.unsqueeze(-1) - score.unsqueeze(-2) > off

    def moe(self, b: Ball, m: MoE, chosen: Experts) -> tuple[Ball, Tensor]:
        """Its ball and its Jacobian at the centre, with these experts for each context."""
        c, W = m.config, m.router.weight
        steep = self.bound(W) * (c.n_experts_per_tok > 1)        # of one weight, which is 1
        z = (b.x @ W.T).masked_fill(~chosen, -torch.inf)
        off = length(self.score_rounding(b, W, torch.zeros_like(m.router_bias)))
        gates, gate_error = self.softmax(z, steep * b.error + off, steep * b.slope * b.reach)
        inner = self.linear(b, m.gate_up.flatten(0, 2))
        gate, up = inner.x.chunk(2, -1)
        h = self.glu(inner)
        each = h.x.unflatten(-1, (c.n_experts, c.expert_dim))    # (n, experts, channels)
        wide = gates.repeat_interleave(c.expert_dim, -1)
        most = length(each).amax(-2) + h.radius
        top = gates.amax(-1, keepdim=True) + gate_error + steep * b.slope * b.reach / 2
        g_slope = steep * b.slope / 2
        g_bend = steep ** 2 * b.slope ** 2 + steep * b.bend / 2
        mixed = Ball(h.x * wide, top * h.error + most * gate_error
                     + self.rounding(self.store, top * h.size), top * h.slope + most * g_slope,
                     top * h.bend + 2 * g_slope * h.slope + most * g_bend, b.reach)
        down = m.down.flatten(0, 1).T
        out = self.linear(mixed, down)
        J = _gated(down, m.gate_up.flatten(0, 2), wide * silu_slope(gate) * up,
                   wide * F.silu(gate))
        # and by the gates: dg_e = g_e (w_e - sum_k g_k w_k)
        by_gate = torch.einsum("eho,neh->noe", m.down, each)
        J = J + by_gate @ (gates.unsqueeze(-1) * (W - (gates @ W).unsqueeze(-2)))
        for shared in m.shared:
            more, by = self.swiglu(b, shared)
            out, J = self.add(out, more), J + by
        return out, J

    def slots(self, balls: list[Ball], m: GQA) -> tuple[Ball, list[Tensor]]:
        """Attention of the first ball, of a position's own slot, over all, or with a window of 1
        to itself alone: its ball, and its Jacobian at the centre by each. They have one reach, the
        joint one."""
        c, d = m.config, m.head_dim
        scale, groups = d ** -0.5, c.n_heads // c.n_kv_heads
        Wq, Wk, Wv = m.qkv.weight.split([n * d for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        q = self.linear(balls[0], Wq)
        keys, values = (_stacked([self.linear(b, W) for b in balls]) for W in (Wk, Wv))
        turn = rope_table(0, len(balls), c.n_kv_heads, d, c.rope_theta, q.x)
        qx = q.x.unflatten(-1, (c.n_kv_heads, groups, 1, d))                 # (n, KV, G, 1, d)
        kx = rotate(keys.x.unflatten(-1, (c.n_kv_heads, d)), turn).movedim(-3, -2).unsqueeze(-3)
        vx = values.x.unflatten(-1, (c.n_kv_heads, d)).movedim(-3, -2).unsqueeze(-3)
        # angles are rounded, and their functions, of which two products are added and stored
        turned = (2 * (FUNCTION + len(balls)) * self.sums + self.store) * keys.size
        big_q, big_k, big_v = (length(x).squeeze(-1) + _by_head(b.radius)    # (n, KV, G, slots)
                               for x, b in ((qx, q), (kx, keys), (vx, values)))
        q_slope, q_bend, q_error = (_by_head(x) for x in (q.slope, q.bend, q.error))
        k_slope, k_bend, k_error = (_by_head(x) for x in (keys.slope, keys.bend,
                                                          keys.error + turned))
        # scores: products of two things, each of which varies
        slope = length(scale * (big_q * k_slope + big_k * q_slope))
        bend = length(scale * (2 * q_slope * k_slope + big_q * k_bend + big_k * q_bend))
        off = length(scale * (big_q * k_error + big_k * q_error)
                     + self.rounding(self.gamma(d + 2), scale * big_q * big_k))
        p, p_error = self.softmax((qx * kx).sum(-1) * scale, off, slope * _by_head(q.reach))
        if len(balls) == 1:                      # the one weight is 1, whatever its score
            p_error, slope, bend = 0 * p_error, 0 * slope, 0 * bend
        wide, spread = length(big_v), groups ** 0.5                          # (n, KV, G, 1)
        # each value varies by its own slot alone, but heads weigh the slots' errors differently
        v_slope, v_bend, v_error = (spread * values.slope.amax(-2), spread * values.bend.amax(-2),
                                    spread * length(values.error.squeeze(-1)))
        mixed = Ball((p.unsqueeze(-1) * vx).sum(-2).flatten(-3),
                     _over_heads((p_error + self.gamma(len(balls) + 1)) * wide) + v_error,
                     _over_heads(slope / 2 * wide) + v_slope,
                     _over_heads((slope ** 2 + bend / 2) * wide
                                 + slope * _by_head(values.slope.amax(-2))) + v_bend,
                     q.reach)
        return self.linear(mixed, m.out.weight), _slot_slopes(m, turn, qx, kx, vx, p)

    def attend(self, b: Ball, others: Sequence[Ball | None], m: Any) -> Ball:
        """x + attention(norm(x)): of a position to itself, and to what lies in the other slots of a
        dilated block, None for nothing."""
        there = [b, *(other for other in others if other is not None)]
        reach = torch.stack([each.radius for each in there]).square().sum(0).sqrt()
        normed = iter([self.norm(each.begin(reach), m.attn_norm) for each in there])
        out, slopes = self.slots(
            [next(normed) if each is not None else
             Ball.exact(m.attn.start.expand_as(b.x)).begin(reach, 0.0) for each in (b, *others)],
            m.attn)
        known = [J for J, each in zip(slopes, (b, *others)) if each is not None]
        return self.residual(out, known, there, m.attn_norm)

    def feed(self, b: Ball, m: Any, chosen: Experts | None = None) -> Ball:
        """x + ffn(norm(x))."""
        inner = self.norm(b.begin(), m.ffn_norm)
        out, J = self.swiglu(inner, m.ffn) if chosen is None else self.moe(inner, m.ffn, chosen)
        return self.residual(out, [J], [b], m.ffn_norm)

    def residual(self, f: Ball, J: list[Tensor], of: list[Ball], m: RMSNorm) -> Ball:
        """of_0 + f(of), by the Jacobians of f by each of `of`, behind the norm m."""
        d, error = f.x.shape[-1], f.bend * f.reach ** 2 / 2 + f.error
        for i, (slope, b) in enumerate(zip(J, of)):
            rms = (length(b.x).square() / d + m.eps).sqrt()
            A, x = slope * (m.weight / rms).unsqueeze(-2), b.x / rms
            A = A - (A @ (x / d).unsqueeze(-1)) @ x.unsqueeze(-2)            # J Dnorm
            A = A + torch.eye(d, dtype=x.dtype) if i == 0 else A
            error = error + spectral(A).unsqueeze(-1) * b.radius
        x = of[0].x + f.x
        return Ball(x, error + self.rounding(self.store, length(x) + error))


class Enclosed:
    """A model with codes, of a window of 1 or dilated, on balls: by how many times their bounds the
    choices lead that it makes in contexts of the kinds of `proof.closure` and `proof.scan`.

    Where two sets of experts are possible, both are followed (`branched` counts such contexts), and
    the less clear choice counts.
    """

    def __init__(self, judge: OpenMythos, arithmetic: str):
        self.model, self.loop, self.maths = judge, judge.recurrent, Enclosure(arithmetic)
        self.codes, self.branched = self.loop.codes, 0
        self.offset = -0.5 * self.codes.square().sum(-1)
        x = Ball.exact(judge.embed.weight)
        for block in judge.prelude:
            x = self.maths.feed(self.maths.attend(x, [], block), block)
        self.tokens = x                                          # e, by token

    def advance(self, part: list[tuple[int | None, int]], chosen: Tensor) -> Tensor:
        """Of a strict model the codes chosen behind (the code before or None, letter)."""
        before = torch.cat([self.codes, torch.zeros_like(self.codes[:1])])   # None: -1, the last
        rows = [-1 if code is None else code for code, _ in part]
        x = self.maths.add(Ball.exact(before[rows]), self.tokens[_letters(part)])
        return self._loop(self.maths.norm(x, self.loop.norm), [], chosen)

    def combine(self, part: list[tuple[tuple[str, int], ...]], chosen: Tensor) -> Tensor:
        """Of a dilated model the codes chosen for rows of m operands, all letters or all codes."""
        kind, r = part[0][0][0], self.model.config.dilation
        of = self.tokens if kind == "letter" else Ball.exact(self.codes)
        z = self.maths.norm(of, self.loop.norm)
        numbers = torch.tensor([[number + (kind == "letter") for _, number in row]
                                for row in part])
        there = [z[column] for column in numbers.flip(1).T]      # the latest first
        return self._loop(there[0], [*there[1:], *[None] * (r - len(there))], chosen)

    def decode(self, part: list[int], chosen: Tensor) -> Tensor:
        """The answers chosen behind codes."""
        x = Ball.exact(self.codes[part])
        for block in self.model.coda:
            x = self.maths.feed(self.maths.attend(x, [], block), block)
        W = self.model.head.weight
        return self.maths.leads(self.maths.norm(x, self.model.norm), W, W.new_zeros(len(W)), chosen)

    def _loop(self, z: Ball, others: Sequence[Ball | None], chosen: Tensor) -> Tensor:
        block, out = self.loop.block, torch.full((len(chosen),), torch.inf, dtype=z.x.dtype)
        for rows in torch.arange(len(chosen)).split(PART):
            x = self.maths.attend(z[rows], [b and b[rows] for b in others], block)
            beats = self.maths.beats(self.maths.norm(x, block.ffn_norm), block.ffn)
            sets = [list(_possible(each, block.ffn.config.n_experts_per_tok)) for each in beats]
            self.branched += sum(len(of) > 1 for of in sets)
            for which in range(max(map(len, sets))):
                of = torch.tensor([i for i, found in enumerate(sets) if len(found) > which])
                experts = torch.stack([sets[i][which] for i in of.tolist()])
                h = self.maths.feed(x[of], block, experts)
                if isinstance(self.loop.loop_norm, RMSNorm):
                    h = self.maths.norm(h, self.loop.loop_norm)
                lead = self.maths.leads(h, self.codes, self.offset, chosen[rows][of])
                out[rows[of]] = torch.minimum(out[rows[of]], lead)   # what is not a number wins
        return out


def _letters(part) -> list[int]:
    return [letter + 1 for _, letter in part]


def _possible(beats: Bool[Tensor, "experts experts"], k: int) -> Iterator[Bool[Tensor, "experts"]]:
    """The sets of k experts that may be the ones of the highest scores."""
    n = len(beats)
    sure, out = beats.sum(1) >= n - k, beats.sum(0) >= k
    free = (~sure & ~out).nonzero().flatten().tolist()
    for more in combinations(free, k - int(sure.sum())):
        yield sure.scatter(0, torch.tensor(more, dtype=torch.int64), True)


def _gated(down, gate_up, by_gate, by_up) -> Float[Tensor, "n out dim"]:
    """down (by_gate gate + by_up up), by factors of each channel, as one product."""
    gate, up = gate_up.unsqueeze(1).chunk(2)                                 # (channels, 1, dim)
    rows = torch.addcmul(by_gate.T.unsqueeze(-1) * gate, by_up.T.unsqueeze(-1), up)
    return (down @ rows.flatten(1)).view(len(down), len(by_gate), -1).movedim(0, 1)


def _slot_slopes(m: GQA, turn, qx, kx, vx, p) -> list[Float[Tensor, "n out dim"]]:
    """With v = sum_j p_j v_j: Out_h sum_j p_j (v_j - v) (scale k_j)^T W_q by the query's input, and
    Out_h p_j [W_v + (v_j - v) (scale q)^T R_j W_k] by that of slot j; the first slot is both."""
    c, d = m.config, m.head_dim
    Wq, Wk, Wv = (W.unflatten(0, (-1, d)) for W in m.qkv.weight.split(
        [n * d for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]))
    out = m.out.weight.unflatten(1, (c.n_kv_heads, -1, d))                   # (dim, KV, G, d)
    v = (p.unsqueeze(-1) * vx).sum(-2, keepdim=True)
    pull = torch.einsum("okgd,...kgjd->...kgjo", out, p.unsqueeze(-1) * (vx - v) * d ** -0.5)
    slopes = []
    for j in range(p.shape[-1]):
        R = rotate(Wk.permute(2, 0, 1).unsqueeze(1).contiguous(),
                   turn[j:j + 1]).squeeze(1).permute(1, 2, 0)                # (KV, d, dim)
        by_value = torch.einsum("okgd,...kg,kdi->...oi", out, p[..., j], Wv)
        by_key = torch.einsum("...kgo,...kgd,kdi->...oi", pull[..., j, :], qx.squeeze(-2), R)
        slopes.append(by_value + by_key)
    slopes[0] = slopes[0] + torch.einsum("...kgjo,...kjd,kgdi->...oi", pull, kx.squeeze(-3),
                                         Wq.unflatten(0, (c.n_kv_heads, -1)))
    return slopes


def _stacked(balls: list[Ball]) -> Ball:
    """As one, with an axis of slots before the last."""
    return Ball(*(torch.stack([getattr(b, name) for b in balls], -2)
                  for name in ("x", "error", "slope", "bend", "reach")))


def _by_head(x: Tensor) -> Float[Tensor, "n 1 1 slots"]:
    """One number a context, (n, 1), or a slot, (n, slots, 1), for all heads."""
    return x.flatten(1)[:, None, None]


def _over_heads(x: Float[Tensor, "n kv groups 1"]) -> Float[Tensor, "n 1"]:
    return length(x.flatten(-3))
