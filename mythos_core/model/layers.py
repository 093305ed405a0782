"""The small parts: RMSNorm, rotary position embedding and the SwiGLU feed-forward."""
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import wraps

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NORM_EPS = 1e-6


def known(ask: Callable):
    """What `ask()` reads from tensors; None where they have no values to read: while torch.compile
    or torch.export trace, in torch.vmap, and on the meta device."""
    if torch.compiler.is_compiling():
        return None
    try:
        return ask()
    except RuntimeError:
        return None


@contextmanager
def evaluating(modules: Iterable[nn.Module]):
    """Eval mode inside, for each of `modules`; afterwards each is in the mode that it was in."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluated(measure: Callable):
    """A function of a model, its first argument, that runs it in eval mode, and leaves it in the
    mode that it was in."""
    @wraps(measure)
    def restoring(model, *args, **kwargs):
        with evaluating(model.modules()):
            return measure(model, *args, **kwargs)
    return restoring


def several_processes() -> bool:
    """Whether this process is one of those of an initialised torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class RMSNorm(nn.Module):
    """x / rms(x) * weight with rms(x)^2 = mean(x^2) + eps, over the last axis (Zhang & Sennrich
    2019).

    As `torch.rms_norm`, which is one operation on a GPU, but a dozen on a CPU, where a decoded
    token passes dozens of norms; here they are five.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.eps_tensor: Tensor
        self.register_buffer("eps_tensor", torch.tensor(eps), persistent=False)

    def _apply(self, fn, recurse=True):
        """As of any module, but that eps is a constant: a cast to bfloat16 and back leaves it."""
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.eps_tensor = torch.full_like(self.eps_tensor, self.eps, dtype=dtype)
        return self

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        if self.training and torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps_tensor)
        if x.is_cuda:
            return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (x * inverse_rms(x, self.eps_tensor) * self.weight).to(x.dtype)


def inverse_rms(x: Float[Tensor, "*tokens dim"],
                eps: Float[Tensor, ""]) -> Float[Tensor, "*tokens 1"]:
    """1 / sqrt(mean(x^2) + eps) over the last axis, in float32, or float64 of a float64 x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True,
                                    dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt()


class _RMSNorm(torch.autograd.Function):
    """The same with its gradient in closed form, for training: half as many passes over memory as a
    CPU makes of it otherwise, and x is kept, not x and x / rms(x). First derivatives in reverse
    only: those of `torch.func` are of a model in eval mode."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight.to(scale.dtype), scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        # dx = scale (dy - x scale mean(x scale dy)), dy = weight * gradient
        along = gradient.to(scale.dtype) * x
        mean = (along @ weight).unsqueeze(-1).mul_(scale).mul_(scale)
        of_weight = scale.flatten() @ along.flatten(0, -2)
        across = torch.mul(gradient, weight, out=along)  # new memory takes 3 times as long
        across.addcmul_(x, mean, value=-1 / len(weight)).mul_(scale)
        return across, of_weight, None


def rope_table(start: int, length: int, heads: int, dim: int, theta: float,
               like: Tensor) -> Float[Tensor, "seq heads pairs 2"]:
    """cos and sin of m f_j for positions m = start .. start + length - 1 and pairs
    j = 0 .. dim / 2 - 1, f_j = theta^(-2j / dim); for each head, as `rotate` then takes half the
    time that it takes to spread them.

    RoPE (Su et al. 2021), in float32 (float64 for a float64 model): angles near position 1,000
    need more digits than bfloat16 has. Made for each pass rather than kept: it costs microseconds,
    while a buffer would be saved, cast and bounded.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    position = torch.arange(start, start + length, device=like.device, dtype=dtype)
    angle = torch.outer(position, frequency).unsqueeze(1)
    return torch.stack([angle.cos(), angle.sin()], -1).expand(-1, heads, -1, -1).contiguous()


def rotate(x: Float[Tensor, "batch seq heads dim"],
           table: Float[Tensor, "seq most pairs 2"] | None
           ) -> Float[Tensor, "batch seq heads dim"]:
    """Turn the pairs (x_2j, x_2j+1) by the angles of the table, which is for at least as many heads
    as x has; None leaves x as it is (NoPE).

    A pair is read as a complex number where it lies, and turned by one product. So strides must be
    even, but for the last, which is 1. A compiler, which fuses real operations and no complex ones,
    is given those.
    """
    if table is None:
        return x
    pairs, table = x.to(table.dtype).unflatten(-1, (-1, 2)), table[:, :x.shape[2]]
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020. gate and up are one matrix: (dim -> 2 hidden)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
