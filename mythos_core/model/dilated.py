"""The loop whose reach grows by a factor with each loop: attention over positions r^t apart."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mythos_core.model.attention import GQA, Context
from mythos_core.model.config import MythosConfig
from mythos_core.model.layers import known, rope_table, rotate, several_processes
from mythos_core.model.loop import LoopRecord, Observer, RecurrentBlock, previous


class SlotAttention(GQA):
    """Grouped-query attention of each position over r positions that lie d apart, its *slots*:

        out_i = W_o sum_j softmax_j(q_i . R_j k_ij) v_ij        over j = 0 .. r - 1
        q_i = W_q x_i,   k_ij, v_ij = W_k, W_v x_{i - j d}, or W_k, W_v x_start where i < j d

    R_j is RoPE's rotation by j, so slots are told apart by their number, however far they lie.
    Before the first position lies a learned x_start. Were it left out of the softmax instead, a
    letter beside an equal letter would be one with the letter alone: weights that sum to 1 make of
    equal values that value. A product a a could not be told from a.
    """

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.start = nn.Parameter(torch.empty(1, config.dim))

    def forward(self, x: Float[Tensor, "batch seq dim"], ctx: Context, layer: str,
                distance: int = 1) -> Float[Tensor, "batch seq dim"]:
        c, d = self.config, self.head_dim
        q, kv = self.qkv(x).split_with_sizes([c.n_heads * d, 2 * c.n_kv_heads * d], -1)
        before = F.linear(self.start, self.qkv.weight[c.n_heads * d:])       # (1, 2 KV d)
        slots = [kv] + [previous(kv, ctx, layer, f"slot {j}", j * distance, before)
                        for j in range(1, c.dilation)]
        # (B, S, r, KV, d)
        k, v = torch.stack(slots, 2).unflatten(-1, (2, c.n_kv_heads, d)).unbind(3)
        turn = rope_table(0, c.dilation, c.n_kv_heads, d, c.rope_theta, x)
        k = rotate(k.flatten(0, 1), turn).view_as(k)
        q = q.unflatten(-1, (1, c.n_kv_heads, -1, d))                        # (B, S, 1, KV, G, d)
        scores = (q * k.unsqueeze(4)).sum(-1, keepdim=True) * d ** -0.5
        out = (scores.softmax(2) * v.unsqueeze(4)).sum(2)                    # (B, S, KV, G, d)
        return self.out(out.flatten(2))


class DilatedBlock(RecurrentBlock):
    """The looped block with `config.dilation` = r > 1, a scan in r^t steps (Hillis & Steele 1986):

        h_0 = e,    h_{t+1}[i] = block(norm(h_t[i]), norm(h_t[i - d]), .., norm(h_t[i - (r - 1) d]))

    with d = r^t, as the dilated convolutions of WaveNet have it (van den Oord et al. 2016).

    Two things hold, for any weights (tests/model/test_dilated.py):

    1. After loop t = 0, 1, .. position i depends on the last r^(t+1) positions up to i, and on no
       other: T loops read r^T positions.
    2. From loop t >= log_r(length) on all slots but a position's own lie before the start. Every
       loop is then the same map of each state by itself, and one that changes nothing is the last
       that matters.

    What more a trained one does, `proof.scan` proves.
    """

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.block.attn = SlotAttention(config)

    def loops_for(self, length: int) -> int:
        """The loops that read `length` positions: the least T >= 1 with r^T >= length."""
        loops = 1
        while self.config.dilation ** loops < length:            # no logarithm: it rounds
            loops += 1
        return loops

    def step(self, h: Float[Tensor, "batch seq dim"], e: Float[Tensor, "batch seq dim"], t: int,
             ctx: Context, fixed=None):
        """One loop, at distance r^t: h_t -> (h_{t+1}, experts chosen). The letters e are read at
        the start alone: a state carries all that is known of its positions."""
        out, expert_ids = self.combine(h, t, ctx)
        return self.rounded(out), expert_ids

    def combine(self, h: Float[Tensor, "batch seq dim"], t: int, ctx: Context):
        """`step` before states are rounded."""
        x = self.noisy(self.norm(h))
        out, expert_ids = self.block(x, ctx, f"loop.{t}", distance=self.config.dilation ** t)
        return self.loop_norm(out), expert_ids

    def forward(self, e: Float[Tensor, "batch seq dim"], n_loops: int, ctx: Context,
                observer: Observer | None = None):
        """h_T, (B, S, dim). With halting = "settled" and without a cache the loop ends after the
        first one that reads no other position and changes nothing."""
        h = self.start_of(e)
        halts = (self.config.halting == "settled" and ctx.cache is None
                 and not several_processes())
        for t in range(n_loops):
            old, (h, expert_ids) = h, self.step(h, e, t, ctx)
            still = (h == old).all(-1) if halts or observer is not None else None
            if observer is not None:
                observer(LoopRecord(t, h, h, expert_ids, settled=still))
            alone = self.config.dilation ** t >= e.shape[1]
            if halts and alone and known(still.all().item):
                break
        return h
