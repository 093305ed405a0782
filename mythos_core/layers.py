"""The small parts: rotary position embedding and the SwiGLU feed-forward. Norms are `torch.nn.RMSNorm`."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

NORM_EPS = 1e-6


def rope_table(start: int, length: int, dim: int, theta: float, like: Tensor) -> Complex[Tensor, "seq 1 pairs"]:
    """exp(i m f_j) for positions m = start .. start + length - 1 and pairs j = 0 .. dim / 2 - 1, f_j = theta^(-2j / dim).

    RoPE (Su et al. 2021), in complex64 (complex128 for a float64 model): angles near position 1,000 need more digits than
    bfloat16 has. Made for each pass rather than kept: it costs microseconds, while a buffer would be saved, cast and bounded.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    angle = torch.outer(torch.arange(start, start + length, device=like.device, dtype=dtype), frequency).unsqueeze(1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Float[Tensor, "batch seq heads dim"], table) -> Float[Tensor, "batch seq heads dim"]:
    """Turn the pairs (x_2j, x_2j+1) by the table's angles, as one product of complex numbers; `table` None leaves x as it is (NoPE).

    A pair is read as a complex number where it lies, so strides must be even, but for the last, which is 1.
    """
    if table is None:
        return x
    pairs = torch.view_as_complex(x.to(table.dtype.to_real()).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020. gate and up are one matrix: (dim -> 2 * hidden)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
