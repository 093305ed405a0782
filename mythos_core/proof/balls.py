"""Balls that hold all that a model's own arithmetic may make of a vector, by bounds that are
derived, not measured: for sums in any order, products fused or not, batches of any shape.

A `Ball` is a centre, which is computed in float64, and a radius. What is claimed of it: the vector
as computed by any machine that keeps to `ASSUMED` lies within the radius of the centre, in
Euclidean distance. Let f be an operation, x the centre of what it reads, and x' what the machine
has in its place, in the ball. Then

    |f'(x') - f"(x)|  <=  |f(x') - f(x)| + |f'(x') - f(x')| + |f"(x) - f(x)|

with f' as the machine computes it and f" in float64. A Lipschitz constant of f over the ball bounds
the first. The roundings are bounded by the unit roundoff u of the dtype, and by that of float64:
one of both together is counted. For a sum of n products, whatever its order (Higham 2002, 3.1),

    |f'(x') - f(x')|  <=  gamma_n sum_i |a_i b_i|,       gamma_n = n u / (1 - n u)

A radius is a sum of numbers above 0, computed in float64, and so right to 1e-12 or so of itself: it
is taken 1e-9 larger.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.layers import RMSNorm

#: By arithmetic: the unit roundoff of a sum of products and of a function, of a result as it is
#: stored, and of what a product reads. bfloat16 and float16 are summed in float32, as by all
#: libraries of today; TF32 is float32 whose matrix products read 11 bits of each number.
ROUNDOFF = {"float64": (2.0 ** -53, 2.0 ** -53, 0.0), "float32": (2.0 ** -24, 2.0 ** -24, 0.0),
            "tf32": (2.0 ** -24, 2.0 ** -24, 2.0 ** -11),
            "bfloat16": (2.0 ** -24, 2.0 ** -8, 0.0), "float16": (2.0 ** -24, 2.0 ** -11, 0.0)}
#: How many units of roundoff exp, rsqrt, sqrt, silu, cos and sin may be off by, relative. The
#: vendors say 1 to 2 ulps of 2 units each (Sleef and SVML 1; CUDA's Programming Guide, exp 2).
FUNCTION = 8
ASSUMED = ("sums in any order, products fused or not, results rounded to nearest; "
           f"exp, rsqrt, sqrt, silu, cos and sin right to {FUNCTION} units of roundoff")
STEEPEST, CURVED = 1.1, 0.5                      # above max |silu'| = 1.0998.., max |silu''| = 0.5


def length(x: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n 1"]:
    """Euclidean."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def spectral(A: Float[Tensor, "*n rows columns"]) -> Float[Tensor, "*n"]:
    """A bound of the largest singular value, for 64 columns at most 1.14 times it, that takes
    products of matrices alone: |A|^2 = |A^T A| <= |(A^T A)^8|_F^(1/8)."""
    G = A.mT @ A if A.shape[-2] >= A.shape[-1] else A @ A.mT
    size = torch.linalg.matrix_norm(G).clamp(min=1e-200)
    for H in (power := [G / size[..., None, None]]):
        if len(power) < 4:
            power.append(H @ H)
    return (size * torch.linalg.matrix_norm(power[-1]) ** 0.125).sqrt() + 1e-9


@dataclass(frozen=True)
class Ball:
    """x, and how far from it, at most: `error`, and in a sublayer, of which the input is known to
    within `reach`, `slope` times that. The slope then bounds the first derivative of x by the
    input over the ball, the bend the second, and the error is of rounding alone."""

    x: Float[Tensor, "*n dim"]
    error: Float[Tensor, "*n 1"]
    slope: Any = 0.0
    bend: Any = 0.0
    reach: Any = 0.0

    @classmethod
    def exact(cls, x: Float[Tensor, "*n dim"]) -> "Ball":
        return cls(x, torch.zeros_like(x[..., :1]))

    @property
    def radius(self) -> Float[Tensor, "*n 1"]:
        radius = (self.error + self.slope * self.reach) * (1 + 1e-9)
        return radius.nan_to_num(nan=math.inf, posinf=math.inf)  # inf times 0

    @property
    def size(self) -> Float[Tensor, "*n 1"]:
        """The length of any vector in it, at most."""
        return length(self.x) + self.radius

    def __getitem__(self, index: Tensor | list[int]) -> "Ball":
        return Ball(self.x[index], self.error[index])

    def begin(self, reach: Tensor | None = None, slope: float = 1.0) -> "Ball":
        """The same ball as the input of a sublayer, or as one of several of a joint reach; with
        slope 0 as one that does not vary."""
        zero = torch.zeros_like(self.error)
        return Ball(self.x, zero, zero + slope, zero, self.radius if reach is None else reach)

    def then(self, x, slope, bend, error) -> "Ball":
        """What an operation makes of it: x, by the slope and bend of the operation over this ball,
        and its own rounding error."""
        return Ball(x, slope * self.error + error, slope * self.slope,
                    bend * self.slope ** 2 + slope * self.bend, self.reach)


class Arithmetic:
    """Operations on balls, for a model that computes in one of `ROUNDOFF`."""

    def __init__(self, name: str):
        self.sums, self.store, self.read = (u + ROUNDOFF["float64"][0] for u in ROUNDOFF[name])
        limits = torch.finfo(torch.float32 if name == "tf32" else getattr(torch, name))
        # where squares and products may overflow nothing is known; what underflows is added
        self.largest, self.tiny = limits.max ** 0.25, 1e5 * limits.tiny
        self._bounds: dict[int, tuple[Tensor, float]] = {}

    def gamma(self, n: int) -> float:
        """Of a sum of n products, which may be stored before they are summed."""
        return n * self.sums / (1 - n * self.sums) + 2 * self.store

    def bound(self, W: Float[Tensor, "rows columns"]) -> float:
        """`spectral`, once for each matrix."""
        if id(W) not in self._bounds:
            self._bounds[id(W)] = W, spectral(W).item()
        return self._bounds[id(W)][1]

    def rounding(self, relative: float, size: Tensor) -> Tensor:
        """Of a result whose parts add up to `size`; infinite where something may overflow."""
        return (relative * size + self.tiny).where(size < self.largest, math.inf)

    def linear(self, b: Ball, W: Float[Tensor, "out dim"]) -> Ball:
        size = length(b.x.abs() @ W.abs().T) + torch.linalg.matrix_norm(W) * b.radius
        return b.then(b.x @ W.T, self.bound(W), 0.0,
                      self.rounding(self.gamma(W.shape[1]) + 2 * self.read, size))

    def add(self, a: Ball, b: Ball) -> Ball:
        """Of two balls of one sublayer, or of none."""
        x, error = a.x + b.x, a.error + b.error
        return Ball(x, error + self.rounding(self.store, length(x) + a.radius + b.radius),
                    a.slope + b.slope, a.bend + b.bend, a.reach)

    def norm(self, b: Ball, m: RMSNorm) -> Ball:
        """x w / rho, rho^2 = mean(x^2) + eps. With the least rho of the ball |D| <= max w / rho and
        |D^2| <= 1.53 max w / (rho^2 sqrt(dim)): split both arguments of D^2 along x and across; the
        result's part along x is at most 2 / sqrt(3), that across at most 1."""
        d, w = b.x.shape[-1], m.weight
        x = b.x * (length(b.x).square() / d + m.eps).rsqrt() * w
        least = ((length(b.x) - b.radius).clamp(min=0).square() / d + m.eps).sqrt()
        steep = w.abs().max() / least
        size = (length(x) + steep * b.radius).where(b.size < self.largest, math.inf)
        return b.then(x, steep, 1.53 * steep / least / d ** 0.5,
                      self.rounding(self.gamma(d + 2 * FUNCTION), size))

    def glu(self, b: Ball) -> Ball:
        """silu(gate) up, of the two halves of b."""
        (gate, up), r = b.x.chunk(2, -1), b.radius
        x = F.silu(gate) * up
        slope = torch.hypot((silu_slope(gate).abs() + CURVED * r).clamp(max=STEEPEST)
                            * (up.abs() + r), F.silu(gate).abs() + STEEPEST * r)
        slope = slope.amax(-1, keepdim=True)
        bend = CURVED * (up.abs().amax(-1, keepdim=True) + r) + STEEPEST
        return b.then(x, slope, bend, self.rounding(FUNCTION * self.sums + 2 * self.store,
                                                    length(x) + slope * r))

    def softmax(self, z: Float[Tensor, "*n k"], error: Float[Tensor, "*n 1"],
                reach: Float[Tensor, "*n 1"]) -> tuple[Tensor, Tensor]:
        """Weights, and by how much rounding may have them off, all together, where it has the
        scores off by `error`, and they vary by `reach`. Before exp a difference is rounded.

        |D| <= 1/2, by Gershgorin's circles of diag(p) - p p^T. And |D^2| <= 1: with a and b the
        arguments less their means by p, D^2 is p_i (a_i b_i - sum_k p_k a_k b_k), where
        sum p |a b| <= 1/2 since a standard deviation is at most half the range.
        """
        p, r = z.softmax(-1), error + reach
        span = (z.amax(-1, keepdim=True) - z).where(p > 0, 0.0) + 2 * r
        relative = self.store * (span + 1) + self.sums * (2 * FUNCTION + z.shape[-1])
        return p, 0.5 * error + length(relative * (p + r / 2)) + self.tiny

    def leads(self, b: Ball, W: Float[Tensor, "choices dim"], offset: Float[Tensor, "choices"],
              chosen: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """By how many times its bound the score W_c x + offset_c of the `chosen` one leads each
        other, at least; infinity where there is no other."""
        score = b.x @ W.T + offset
        rounding = self.score_rounding(b, W, offset)
        used, row = chosen.unique(return_inverse=True)           # few, of many contexts
        apart = torch.cdist(W[used], W, compute_mode="donot_use_mm_for_euclid_dist")[row]
        chosen = chosen.unsqueeze(-1)
        off = apart * b.radius + rounding + rounding.gather(-1, chosen)
        lead = score.gather(-1, chosen) - score
        return (lead / off).scatter(-1, chosen, torch.inf).amin(-1)

    def score_rounding(self, b: Ball, W: Tensor, offset: Tensor) -> Float[Tensor, "n choices"]:
        size = b.x.abs() @ W.abs().T + length(W).T * b.radius + offset.abs()
        relative = self.gamma(W.shape[1] + 2) + self.store + 2 * self.read
        return self.rounding(relative, size.where(b.size < self.largest, math.inf))


def silu_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 + x * (1 - x.sigmoid()))
