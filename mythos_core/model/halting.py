"""How a position or a pass ends its loops: by ACT's weights, or because
nothing changes any more."""
import torch
import torch.nn as nn
from jaxtyping import Bool, Float
from torch import Tensor

from mythos_core.model.config import MythosConfig

# units in the last place that a state with the carry may move and yet count as unchanged
ROUNDING = 8


class ACTHalting(nn.Module):
    """Adaptive computation time (Graves 2016): position by position, loop t weighs h_t by
    p_t = sigma(halt(h_t)) until the sum of p reaches the threshold; the loop that crosses it weighs
    1 minus the sum so far, and later ones nothing.

    A position that never crosses keeps weights that sum to less than 1 ("act", as in open-mythos)
    or gives what is left to the last loop ("act_remainder", as in Graves' paper).
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.halt = nn.Linear(config.dim, 1)
        if config.halt_bias is not None:
            nn.init.constant_(self.halt.bias, config.halt_bias)
        self.threshold, self.remainder = config.act_threshold, config.halting == "act_remainder"

    def forward(self, h: Float[Tensor, "batch seq dim"], total: Float[Tensor, "batch seq"],
                open: bool = True):
        """p, the weight of this loop, what a last loop here would get on top of it (None for
        "act"), and the sum of weights after it; each (B, S). `total` is that sum before this loop,
        1 where a position has halted; p is 0 where halting is not `open` yet.
        """
        p = torch.sigmoid(self.halt(h)).squeeze(-1).float()
        p = p if open is True else p * open
        weight = torch.where(total + p >= self.threshold, 1 - total, p)   # 0 once halted, exactly
        total = total + weight
        return p, weight, 1 - total if self.remainder else None, total


def settled(new: Float[Tensor, "batch seq dim"], old: Float[Tensor, "batch seq dim"],
            carry: bool) -> Bool[Tensor, "batch seq"]:
    """Whether neither a position nor any before it changed in a strict loop: its state is final
    then, since later loops compute it from the same numbers.

    Unchanged is bit for bit. With the carry a state only comes nearer and nearer to
    its end; there it means that no channel moved by more than `ROUNDING` units in the
    last place of the largest one.
    """
    if carry:
        unit = torch.finfo(new.dtype).eps * new.abs().amax(-1, keepdim=True)
        same = (new - old).abs() <= ROUNDING * unit
    else:
        same = new == old
    return same.all(-1).cumprod(1).bool()
