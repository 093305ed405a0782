"""The loop that must settle: a position reads the states before it, and never its own."""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from mythos_core.model.attention import Context
from mythos_core.model.config import MythosConfig
from mythos_core.model.halting import settled
from mythos_core.model.layers import known, several_processes
from mythos_core.model.loop import LoopRecord, Observer, RecurrentBlock, previous


class StrictBlock(RecurrentBlock):
    """The looped block with `config.strict`. Position i reads the states of the positions before
    it; the latest is s = `config.stride` positions back, 1 by default:

        z_i = norm(h_{i-s} + e_i),
        h'_i = block(z_{i-window+1} .. z_i)  (+ A * h_i + B * e_i)

    What is read before the first position, h_{-1}, is 0; with s > 1, h_{-s} .. h_{-1} are learned.
    Were they all 0, a letter and the same letter twice would be one to attention, whose mean over
    equal values does not say how many they are.

    Then four things hold, for any weights (tests/model/test_strict.py):

    1. Without the carry, position i (from 0) is the same from loop i // s + 1 on, bit for bit,
       whatever h_0 was: the first s positions are computed from e alone, and position i from
       positions that have settled.
    2. dh_{t+1} / dh_t is block lower triangular, with diag(A) on the diagonal, or 0 without the
       carry, so its spectral radius is max A, or 0.
    3. A loop that changes nothing is the last that matters.
    4. Behind a settled past one loop settles s new positions, so a cache
       needs one entry for all loops.
    """

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.start = (nn.Parameter(config.init_std * torch.randn(config.stride, config.dim))
                      if config.stride > 1 else None)

    def step(self, h: Float[Tensor, "batch seq dim"], e: Float[Tensor, "batch seq dim"], t: int,
             ctx: Context, fixed=None):
        """One loop, which is the same at each t: h_t -> (h_{t+1}, experts chosen)."""
        A, _ = fixed or self.fixed(0, h)
        seen = previous(h, ctx, "loop", "state", self.config.stride, self.start)
        out, expert_ids = self.block(self.noisy(self.norm(seen + e)), ctx, "loop")
        if not self.config.carry:
            return self.rounded(self.loop_norm(out)), expert_ids
        if ctx.cache is not None:                    # what the past reads must have settled
            return self.injection.rest(e, out), expert_ids
        return self.injection(h, e, out, A), expert_ids

    def last(self, z: Float[Tensor, "batch seen dim"],
             e: Float[Tensor, "batch new dim"]) -> Float[Tensor, "batch new dim"]:
        """The states, not rounded yet, of a strict loop's last positions, with e their own, where z
        are the inputs of those and of the window - 1 before them."""
        ctx = Context.of(self.config, len(z), z.shape[1], None, like=z)
        out = self.block(z, ctx, "loop")[0][:, -e.shape[1]:]
        return self.injection.rest(e, out) if self.config.carry else self.loop_norm(out)

    def settle(self, e: Float[Tensor, "batch seq dim"], hand_on: Callable | None = None,
               noise: Float[Tensor, "batch seq dim"] | None = None
               ) -> Float[Tensor, "batch seq dim"]:
        """The settled states of a strict loop, left to right, `stride` positions at a time: each
        is evaluated once, behind states that are final. The same as at least S / stride loops, and
        so is the gradient, for one loop's work.

        Args:
            hand_on: (states (B, up to stride, dim), the first one's position) -> what
                the positions behind read in their place, in training.
            noise: added to the block's inputs; None: in training noise is drawn here.
        """
        stride, window, states = self.config.stride, self.config.window or e.shape[1], []
        before, z = self.before_start(e), e[:, :0]
        for part in e.split(stride, 1):                           # (B, up to stride, dim)
            new, position = self.norm(before[:, :part.shape[1]] + part), stride * len(states)
            end = position + part.shape[1]
            new = self.noisy(new) if noise is None else new + noise[:, position:end]
            z = new if window == 1 else torch.cat([z, new], 1)[:, -(window - 1 + part.shape[1]):]
            states.append(self.rounded(self.last(z, part)))
            before = states[-1]
            if hand_on is not None:
                before = hand_on(before, position)
        return torch.cat(states, 1)

    def before_start(self, like: Float[Tensor, "batch seq dim"]
                     ) -> Float[Tensor, "batch stride dim"]:
        """What the first `stride` positions read of a strict loop, in place of states."""
        if self.start is None:
            return torch.zeros_like(like[:, :1])
        return self.start.expand(len(like), -1, -1)

    def forward(self, e: Float[Tensor, "batch seq dim"], n_loops: int, ctx: Context,
                observer: Observer | None = None):
        """h_T, (B, S, dim). With halting = "settled" the loop ends after the first one that changes
        nothing, but not where values are not `known` or in one of several processes, as
        `RecurrentBlock.forward` says."""
        h, step = self.start_of(e), partial(self.step, fixed=self.fixed(0, e))
        halts = self.config.halting == "settled" and not several_processes()
        for t in range(n_loops):
            old, (h, expert_ids) = h, step(h, e, t, ctx)
            still = settled(h, old, self.config.carry) if halts or observer is not None else None
            if observer is not None:
                observer(LoopRecord(t, h, h, expert_ids, settled=still))
            if halts and known(still[:, -1].all().item):
                break
        # later positions read the states as they ended
        ctx.remember("loop", "state", h, keep=self.config.stride)
        return h
