"""A model's steps on balls (`proof.balls`): what its own arithmetic may make of each context.

A block x + f(x) is as steep as I + Df is, and not as 1 and all the factors of Df are together:
those say thousands where 2 is true. So a sublayer is one `Step`, with its Jacobian at the centre;
within it, roundings and second derivatives are bounded by the norms of what follows them.
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
from mythos_core.proof.balls import FUNCTION, Arithmetic, Ball, Step, length, spectral

PART = 128          # contexts of one pass: a Jacobian each
# above max |silu'| = 1.0998.., |silu''| = 0.5, |silu'''| = 0.3082..
SILU = (1.1, 0.5, 0.31)
Experts = Bool[Tensor, "n experts"]


class Enclosure(Arithmetic):
    """The blocks of a float64 model on balls, for a model that computes in `arithmetic`."""

    def unit(self, y: Ball, gate_up: Tensor, down: Tensor, gates: tuple | None = None,
             experts: int = 1) -> Step:
        """down(silu(gate y) * up y), where `gates` weigh the channels of so many `experts`:
        (weights, what they vary by in all, to the second order, by rounding)."""
        r = y.radius
        gate, up = (y.x @ gate_up.T).chunk(2, -1)
        g_off, u_off = self.product(y.x, r, gate_up).chunk(2, -1)
        g_by, u_by = (length(gate_up).T * r).chunk(2, -1)        # how far each channel varies
        g_by, u_by = g_by + g_off, u_by + u_off
        silu, slope, bend = F.silu(gate), _slope(gate).abs(), _bend(gate).abs()
        h, big_up = silu * up, up.abs() + u_by
        second = (0.5 * (bend + SILU[2] * g_by).clamp(max=SILU[1]) * g_by ** 2 * big_up
                  + slope * g_by * u_by)
        steep = (slope + SILU[1] * g_by).clamp(max=SILU[0]) * big_up
        flat = silu.abs() + SILU[0] * g_by
        by = steep * g_by + flat * u_by
        off = steep * g_off + flat * u_off + self.rounding(
            FUNCTION * self.sums + 2 * self.store, h.abs() + by) + self.tiny * big_up
        by_gate, by_up, more, varies = _slope(gate) * up, silu, 0.0, length(by)
        if gates is not None:
            w, w_by, w_second, w_off = gates
            most = length(h) + length(by)
            more = w_by * length(by) + most * (w_second + w_off) + length(off) * w_by
            h, off, second = w * h, w * off + self.rounding(self.store, h.abs() + by), w * second
            by_gate, by_up, varies = w * by_gate, w * by_up, varies + most * w_by
        each = length(off.unflatten(-1, (experts, -1))).squeeze(-1)  # those not chosen have none
        through = (each * self.bound(down.unflatten(1, (experts, -1)).movedim(1, 0))).sum(-1, True)
        left_out = (through + self.bound(down) * more + length(second @ down.abs().T)
                    + length(self.product(h, varies, down)))
        return Step(h @ down.T, [_gated(down, gate_up, by_gate, by_up)], left_out)

    def beats(self, y: Ball, m: MoE) -> Bool[Tensor, "n experts experts"]:
        """Whether the first expert's score is above the second's in all of the ball."""
        W, r = m.router.weight, y.radius
        score, off = y.x @ W.T + m.router_bias, self.score_rounding(y.x, r, W, m.router_bias)
        apart = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")
        off = apart * r.unsqueeze(-1) + off.unsqueeze(-1) + off.unsqueeze(-2)
        return score.unsqueeze(-1) - score.unsqueeze(-2) > off

    def moe(self, y: Ball, m: Any, chosen: Experts) -> Step:
        """With these experts for each context."""
        c, W = m.config, m.router.weight
        off, by = length(self.product(y.x, y.radius, W)), self.bound(W) * y.radius
        p, p_off, steep, bent = self.softmax((y.x @ W.T).masked_fill(~chosen, -torch.inf), off, by)
        down, gate_up = m.down.flatten(0, 1).T, m.gate_up.flatten(0, 2)
        out = self.unit(y, gate_up, down, (p.repeat_interleave(c.expert_dim, -1), steep * by,
                                           bent * by ** 2 / 2, p_off), c.n_experts)
        if c.n_experts_per_tok > 1:                              # dp_e = p_e (w_e - sum_k p_k w_k)
            gate, up = (y.x @ gate_up.T).chunk(2, -1)
            each = (F.silu(gate) * up).unflatten(-1, (c.n_experts, -1))
            out.J[0] += torch.einsum("eho,neh->noe", m.down, each) @ (
                p.unsqueeze(-1) * (W - (p @ W).unsqueeze(-2)))
        for shared in m.shared:
            more = self.unit(y, shared.gate_up.weight, shared.down.weight)
            x, r = out.x + more.x, length(out.x) + length(more.x) + out.off + more.off + (
                spectral(out.J[0]) + spectral(more.J[0])) * y.radius
            out = Step(x, [out.J[0] + more.J[0]], out.off + more.off + self.rounding(self.store, r))
        return out

    def slots(self, balls: list[Ball], m: GQA) -> Step:
        """Attention of the first ball, of a position's own slot, over all, or with a window of 1
        to itself alone."""
        c, d, n = m.config, m.head_dim, len(balls)
        scale, groups = d ** -0.5, c.n_heads // c.n_kv_heads
        Wq, Wk, Wv = m.qkv.weight.split([h * d for h in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        y = torch.stack([b.x for b in balls], -2)                            # (n, slots, dim)
        r = torch.stack([b.radius for b in balls], -2)                       # (n, slots, 1)
        q, keys, values = y[:, 0] @ Wq.T, y @ Wk.T, y @ Wv.T
        turn = rope_table(0, n, c.n_kv_heads, d, c.rope_theta, q)
        qx = q.unflatten(-1, (c.n_kv_heads, groups, 1, d))                   # (n, KV, G, 1, d)
        kx = rotate(keys.unflatten(-1, (c.n_kv_heads, d)), turn).movedim(-3, -2).unsqueeze(-3)
        vx = values.unflatten(-1, (c.n_kv_heads, d)).movedim(-3, -2).unsqueeze(-3)
        # (n, KV, G, slots): how far each varies, and its rounding
        (q_by, q_off), (k_by, k_off), (v_by, v_off) = (
            [x.unflatten(1, (c.n_kv_heads, -1)) for x in self.heads(y[:, :of], r[:, :of], W, d)]
            for W, of in ((Wq, 1), (Wk, n), (Wv, n)))
        # angles are rounded, and their functions, of which two products are added and stored
        turning = (2 * FUNCTION + (n - 1) * (2 * FUNCTION + 3) + 3) * self.sums + self.store
        k_off = k_off + turning * (length(kx).squeeze(-1) + k_by + k_off)
        q_by, k_by, v_by = q_by + q_off, k_by + k_off, v_by + v_off
        big_q, big_k, big_v = (length(x).squeeze(-1) + by
                               for x, by in ((qx, q_by), (kx, k_by), (vx, v_by)))
        off = length(scale * (big_q * k_off + big_k * q_off)
                     + self.rounding(self.gamma(d + 2) + self.store, scale * big_q * big_k))
        # how far the scores vary: the first slot is the query's too; what all scores have in common
        # makes no difference
        by_query, by_key = _score_slopes(Wq, Wk, turn, qx, kx, scale)    # (n, KV, G, slots, dim)
        by_first, bilinear = by_query - by_query.mean(-2, keepdim=True), length(scale * q_by * k_by)
        by_first[..., 0, :] += by_key[..., 0, :]
        others = length(by_key[..., 1:, :]).squeeze(-1) * r[:, None, None, 1:, 0]
        by = length(length(by_first).squeeze(-1) * r[:, None, None, :1, 0]
                    + F.pad(others, (1, 0))) + bilinear
        p, p_off, steep, bent = self.softmax((qx * kx).sum(-1) * scale, off, by)
        second = steep * bilinear + bent * by ** 2 / 2
        wide, v_off, v_by = (length(x) for x in (big_v, v_off, v_by))
        inner = (_over_heads((p_off + second + self.gamma(n + 1)) * wide + steep * by * v_by)
                 + groups ** 0.5 * _over_heads(v_off))
        varies = _over_heads(steep * by * wide) + groups ** 0.5 * _over_heads(v_by) + inner
        mixed = (p.unsqueeze(-1) * vx).sum(-2)
        # with v = sum_j p_j v_j: dv = sum_j p_j (dv_j + (v_j - v) dz_j), in each head
        W = m.out.weight.unflatten(1, (c.n_kv_heads, groups, d))
        pull = torch.einsum("okgd,...kgjd->...okgj", W,
                            p.unsqueeze(-1) * (vx - mixed.unsqueeze(-2)))
        slopes = [torch.einsum("okgd,...kg,kdi->...oi", W, p[..., j], Wv.unflatten(0, (-1, d)))
                  + torch.einsum("...okg,...kgi->...oi", pull[..., j], by_key[..., j, :])
                  for j in range(n)]
        slopes[0] = slopes[0] + torch.einsum("...okgj,...kgji->...oi", pull, by_query)
        mixed, W = mixed.flatten(-3), m.out.weight
        left_out = self.bound(W) * inner + length(self.product(mixed, varies, W))
        return Step(mixed @ W.T, slopes, left_out)

    def heads(self, y: Tensor, r: Tensor, W: Tensor, d: int) -> tuple[Tensor, Tensor]:
        """Of each head's rows of W, (n, heads, slots): how far they vary in a ball; rounding."""
        rows = W.unflatten(0, (-1, d))
        off = length(self.product(y, r, W).unflatten(-1, (-1, d))).squeeze(-1)
        return (self.bound(rows) * r).mT, off.mT

    def residual(self, f: Step, norms: list[Step], of: Sequence[Ball]) -> Ball:
        """of_0 + f(norms(of))."""
        off = f.off + sum(spectral(J) * norm.off for J, norm in zip(f.J, norms))
        slopes = [J @ norm.J[0] for J, norm in zip(f.J, norms)]
        slopes[0] = slopes[0] + torch.eye(f.x.shape[-1], dtype=f.x.dtype)
        x = of[0].x + f.x
        out = Step(x, slopes, off).of(*of)
        return Ball(x, out.error + self.rounding(self.store, length(x) + out.radius), out.along)

    def attend(self, b: Ball, others: Sequence[Ball | None], m: Any) -> Ball:
        """x + attention(norm(x)): of a position to itself, and to what lies in the other slots of a
        dilated block, None for nothing."""
        there = [b, *(other for other in others if other is not None)]
        norms = [self.norm(each, m.attn_norm) for each in there]
        read = iter([norm.of(each) for norm, each in zip(norms, there)])
        f = self.slots([next(read) if each is not None else Ball.exact(m.attn.start.expand_as(b.x))
                        for each in (b, *others)], m.attn)
        known = [J for J, each in zip(f.J, (b, *others)) if each is not None]
        return self.residual(Step(f.x, known, f.off), norms, there)

    def feed(self, b: Ball, m: Any, chosen: Experts | None = None) -> Ball:
        """x + ffn(norm(x))."""
        norm = self.norm(b, m.ffn_norm)
        y = norm.of(b)
        f = (self.unit(y, m.ffn.gate_up.weight, m.ffn.down.weight) if chosen is None
             else self.moe(y, m.ffn, chosen))
        return self.residual(f, [norm], [b])


class Enclosed:
    """A model of a window of 1, strict or dilated, on balls.

    With codes it says by how many times their bounds the choices lead that it makes in contexts of
    the kinds of `proof.choices`. Where two sets of experts are possible, both are followed
    (`branched` counts such contexts), and the less clear choice counts.
    """

    def __init__(self, judge: OpenMythos, arithmetic: str):
        self.model, self.loop, self.maths = judge, judge.recurrent, Enclosure(arithmetic)
        self.codes, self.branched = self.loop.codes, 0
        x = Ball.exact(judge.embed.weight)
        for block in judge.prelude:
            x = self.maths.feed(self.maths.attend(x, [], block), block)
        self.tokens = x                                          # e, by token

    def advance(self, part: list[tuple[int | None, int]], chosen: Tensor) -> Tensor:
        """Of a strict model the codes chosen behind (the code before or None, letter)."""
        before = torch.cat([self.codes, torch.zeros_like(self.codes[:1])])   # None: -1, the last
        rows = [-1 if code is None else code for code, _ in part]
        letters = self.tokens[[letter + 1 for _, letter in part]]
        x = self.maths.add(Ball.exact(before[rows]), letters)
        return self._lead(self.maths.normed(x, self.loop.norm), [], chosen)

    def combine(self, part: list[tuple[tuple[str, int], ...]], chosen: Tensor) -> Tensor:
        """Of a dilated model the codes chosen for rows of m operands, all letters or all codes."""
        first, *others = self.operands(part, Ball.exact(self.codes))
        return self._lead(first, others, chosen)

    def operands(self, part: list[tuple[tuple[str, int], ...]], states: Ball) -> list[Ball | None]:
        """What a dilated loop reads in each slot, the latest first, where it has rows of operands,
        all letters or all `states` by number; None for nothing."""
        kind, r = part[0][0][0], self.model.config.dilation
        z = self.maths.normed(self.tokens if kind == "letter" else states, self.loop.norm)
        numbers = torch.tensor([[number + (kind == "letter") for _, number in row]
                                for row in part])
        there = [z[column] for column in numbers.flip(1).T]
        return [*there, *[None] * (r - len(there))]

    def decode(self, part: list[int], chosen: Tensor) -> Tensor:
        """The answers chosen behind codes."""
        return self.answers(Ball.exact(self.codes[part]), chosen)

    def answers(self, x: Ball, chosen: Tensor) -> Tensor:
        """By how much the answers chosen behind states lead."""
        for block in self.model.coda:
            x = self.maths.feed(self.maths.attend(x, [], block), block)
        W = self.model.head.weight
        return self.maths.leads(self.maths.normed(x, self.model.norm), W, W.new_zeros(len(W)),
                                chosen)

    def states(self, z: Ball, others: Sequence[Ball | None]) -> Iterator[tuple[Tensor, Ball]]:
        """What the loop makes of z, with what lies in the other slots: the rows of some contexts,
        and their states, by each set of experts that is possible there."""
        block = self.loop.block
        for rows in torch.arange(len(z.x)).split(PART):
            x = self.maths.attend(z[rows], [b and b[rows] for b in others], block).shaped()
            beats = self.maths.beats(self.maths.normed(x, block.ffn_norm), block.ffn)
            sets = [list(_possible(each, block.ffn.config.n_experts_per_tok)) for each in beats]
            self.branched += sum(len(of) > 1 for of in sets)
            for which in range(max(map(len, sets))):
                of = torch.tensor([i for i, found in enumerate(sets) if len(found) > which])
                experts = torch.stack([sets[i][which] for i in of.tolist()])
                h = self.maths.feed(x[of], block, experts)
                if isinstance(self.loop.loop_norm, RMSNorm):
                    h = self.maths.normed(h, self.loop.loop_norm)
                yield rows[of], h

    def image(self, z: Ball, others: Sequence[Ball | None]) -> Ball:
        """The same in one ball each, by whatever experts."""
        x, error = torch.full_like(z.x, torch.nan), torch.zeros_like(z.error)
        for rows, state in self.states(z, others):
            first = x[rows].isnan()
            x[rows] = torch.where(first, state.x, x[rows])
            error[rows] = torch.maximum(error[rows], length(state.x - x[rows]) + state.radius)
        return Ball(x, error)

    def _lead(self, z: Ball, others: Sequence[Ball | None], chosen: Tensor) -> Tensor:
        out = torch.full((len(chosen),), torch.inf, dtype=z.x.dtype)
        offset = -0.5 * self.codes.square().sum(-1)
        for rows, h in self.states(z, others):
            lead = self.maths.leads(h, self.codes, offset, chosen[rows])
            out[rows] = torch.minimum(out[rows], lead)           # what is not a number wins
        return out


def _possible(beats: Bool[Tensor, "experts experts"], k: int) -> Iterator[Bool[Tensor, "experts"]]:
    """The sets of k experts that may be the ones of the highest scores."""
    n = len(beats)
    sure, out = beats.sum(1) >= n - k, beats.sum(0) >= k
    free = (~sure & ~out).nonzero().flatten().tolist()
    for more in combinations(free, k - int(sure.sum())):
        yield sure.scatter(0, torch.tensor(more, dtype=torch.int64), True)


def _slope(x: Tensor) -> Tensor:
    """silu'."""
    return x.sigmoid() * (1 + x * (1 - x.sigmoid()))


def _bend(x: Tensor) -> Tensor:
    """silu''."""
    s = x.sigmoid()
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _gated(down, gate_up, by_gate, by_up) -> Float[Tensor, "n out dim"]:
    """down (by_gate gate + by_up up), by factors of each channel, as one product."""
    gate, up = gate_up.unsqueeze(1).chunk(2)                                 # (channels, 1, dim)
    rows = torch.addcmul(by_gate.T.unsqueeze(-1) * gate, by_up.T.unsqueeze(-1), up)
    return (down @ rows.flatten(1)).view(len(down), len(by_gate), -1).movedim(0, 1)


def _score_slopes(Wq, Wk, turn, qx, kx, scale: float) -> tuple[Tensor, Tensor]:
    """Of the score scale (W_q y_0) . (R_j W_k y_j) of each head and slot: by y_0, and by y_j."""
    kv, groups, d = qx.shape[1], qx.shape[2], qx.shape[-1]
    turned = rotate(Wk.T.contiguous().unflatten(1, (1, kv, d)).expand(-1, len(turn), -1, -1), turn)
    return (torch.einsum("...kjd,kgdi->...kgji", scale * kx.squeeze(-3),
                         Wq.unflatten(0, (kv, groups, d))),
            torch.einsum("...kgd,ijkd->...kgji", scale * qx.squeeze(-2), turned))


def _over_heads(x: Float[Tensor, "n kv groups 1"]) -> Float[Tensor, "n 1"]:
    return length(x.flatten(-3))
