"""The small parts: rotary position embedding and the SwiGLU feed-forward. Norms are `torch.nn.RMSNorm`."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NORM_EPS = 1e-6


def rope_table(start: int, length: int, dim: int, theta: float, like: Tensor) -> tuple[Float[Tensor, "seq 1 dim"], Float[Tensor, "seq 1 dim"]]:
    """cos(m f_i) twice over, and -sin(m f_i), sin(m f_i), for positions m = start .. start + length - 1, f_i = theta^(-2i / dim).

    RoPE (Su et al. 2021) as two real tables, in float32 (float64 for a float64 model): angles near position 1,000 need more
    digits than bfloat16 has. Made for each pass rather than kept: it costs microseconds, while a buffer would be saved, cast
    and bounded.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    angle = torch.outer(torch.arange(start, start + length, device=like.device, dtype=dtype), frequency).unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Float[Tensor, "batch seq heads dim"], table) -> Float[Tensor, "batch seq heads dim"]:
    """Turn the pairs (x_i, x_{i + dim/2}) by the table's angles; `table` None leaves x as it is (NoPE).

    With pairs half a head apart the partner of every channel is one roll away; `from_open_mythos` reorders weights that
    were trained with neighbouring pairs.
    """
    if table is None:
        return x
    cos, sin = table
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020. gate and up are one matrix: (dim -> 2 * hidden)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
