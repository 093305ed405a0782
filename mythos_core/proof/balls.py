"""Balls that hold all that a model's own arithmetic may make of a vector, by bounds that are
derived, not measured: for sums in any order, products fused or not, batches of any shape.

A `Ball` is a centre, which is computed in float64, and a radius. What is claimed of it: the vector
as computed by any machine that keeps to `ASSUMED` lies within the radius of the centre, in
Euclidean distance. Let f be an operation, x the centre of what it reads, and x' what the machine
has in its place, in the ball. Then

    |f'(x') - f"(x)|  <=  |f(x') - f(x)| + |f'(x') - f(x')| + |f"(x) - f(x)|

with f' as the machine computes it and f" in float64. The first is that of real numbers: with J the
Jacobian of f at the centre, it is at most |J| times the radius, and what second derivatives make of
the ball. The roundings are bounded by the unit roundoff u of the dtype, and by that of float64: one
of both together is counted. For a sum of n products, whatever its order (Higham 2002, 3.1),

    |f'(x') - f(x')|  <=  gamma_n sum_i |a_i b_i|,       gamma_n = n u / (1 - n u)

A radius is a sum of numbers above 0, computed in float64, and so right to 1e-12 or so of itself: it
is taken 1e-9 larger.
"""
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.layers import RMSNorm

#: By arithmetic: the unit roundoff of a sum of products and of a function, of a result as it is
#: stored, and of what a product reads. bfloat16 and float16 are summed in float32, as libraries do
#: that are not allowed less; TF32 is float32 whose matrix products read 11 bits of each number.
ROUNDOFF = {"float64": (2.0 ** -53, 2.0 ** -53, 0.0), "float32": (2.0 ** -24, 2.0 ** -24, 0.0),
            "tf32": (2.0 ** -24, 2.0 ** -24, 2.0 ** -11),
            "bfloat16": (2.0 ** -24, 2.0 ** -8, 0.0), "float16": (2.0 ** -24, 2.0 ** -11, 0.0)}
#: How many units of roundoff exp, rsqrt, sqrt, silu, cos and sin may be off by, relative. The
#: vendors say 1 to 2 ulps of 2 units each (Sleef and SVML 1; CUDA's Programming Guide, exp 2).
FUNCTION = 8
ASSUMED = ("sums in any order, products fused or not, results rounded to nearest; of bfloat16 and "
           f"float16 sums in float32; exp, pow, rsqrt, sqrt, silu, cos and sin right to "
           f"{FUNCTION} units of roundoff, or to 1e-36")


def length(x: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n 1"]:
    """Euclidean."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def spectral(A: Float[Tensor, "*n rows columns"]) -> Float[Tensor, "*n 1"]:
    """A bound of the largest singular value, for 64 columns at most 1.14 times it, that takes
    products of matrices alone: |A|^2 = |A^T A| <= |(A^T A)^8|_F^(1/8)."""
    G = A.mT @ A if A.shape[-2] >= A.shape[-1] else A @ A.mT
    size = torch.linalg.matrix_norm(G).clamp(min=1e-200)
    H = G / size[..., None, None]
    for _ in range(3):
        H = H @ H
    return ((size * torch.linalg.matrix_norm(H) ** 0.125).sqrt() + 1e-9).unsqueeze(-1)


def joined(shapes: tuple[Float[Tensor, "*n dim _"], ...]) -> Float[Tensor, "*n dim z"]:
    """One shape that holds A_1 z_1 + A_2 z_2 + .. for all |z_i| <= 1: A_i / sqrt(w_i) side by side,
    which takes sqrt(w_i) z_i, where w_i is |A_i| over the sum of all. Its norm is at most
    sum |A_i|."""
    if len(shapes) == 1:
        return shapes[0]
    sizes = torch.stack([spectral(A) for A in shapes])
    shares = (sizes / sizes.sum(0)).sqrt()
    return torch.cat([A / share.unsqueeze(-1) for A, share in zip(shapes, shares)], -1)


@dataclass(frozen=True)
class Ball:
    """x, and how far from it: by `error` in any way, and by A z with |z| <= 1 for each shape A of
    `along`."""

    x: Float[Tensor, "*n dim"]
    error: Float[Tensor, "*n 1"]
    along: tuple[Float[Tensor, "*n dim _"], ...] = ()

    @classmethod
    def exact(cls, x: Float[Tensor, "*n dim"]) -> "Ball":
        return cls(x, torch.zeros_like(x[..., :1]))

    @cached_property
    def radius(self) -> Float[Tensor, "*n 1"]:
        radius = self.error * (1 + 1e-9)
        radius = radius + spectral(joined(self.along)) if self.along else radius
        return radius.nan_to_num(nan=math.inf, posinf=math.inf)  # inf times 0

    def shaped(self) -> "Ball":
        """The same, all of it `along`: a shape follows the Jacobians of what comes, an error only
        the product of their norms."""
        eye = torch.eye(self.x.shape[-1], dtype=self.x.dtype, device=self.x.device)
        return Ball(self.x, torch.zeros_like(self.error),
                    (*self.along, (self.error * (1 + 1e-9)).unsqueeze(-1) * eye))

    def __getitem__(self, index: Tensor | list[int]) -> "Ball":
        return Ball(self.x[index], self.error[index], tuple(A[index] for A in self.along))


@dataclass(frozen=True)
class Step:
    """A differentiable operation on one ball or several: its value x at their centres, its Jacobian
    by each, and `off`, all that is left out by these over the balls: second order, and rounding."""

    x: Float[Tensor, "*n out"]
    J: list[Float[Tensor, "*n out dim"]]
    off: Float[Tensor, "*n 1"]

    def of(self, *balls: Ball) -> Ball:
        """What it makes of the balls that it was made for."""
        error = self.off + sum(spectral(J) * b.error for J, b in zip(self.J, balls)
                               if b.error.any())
        return Ball(self.x, error, tuple(J @ A for J, b in zip(self.J, balls) for A in b.along))


class Arithmetic:
    """The roundings of a model that computes in one of `ROUNDOFF`, and the norm."""

    def __init__(self, name: str):
        self.sums, self.store, self.read = (u + ROUNDOFF["float64"][0] for u in ROUNDOFF[name])
        limits = torch.finfo(torch.float32 if name == "tf32" else getattr(torch, name))
        # where squares and products may overflow nothing is known; what underflows is added
        self.largest, self.tiny = limits.max ** 0.25, 1e5 * limits.tiny
        self._bounds: dict[tuple, tuple[Tensor, Tensor]] = {}

    def gamma(self, n: int) -> float:
        """Of a sum of n products, which may be stored before they are summed."""
        return n * self.sums / (1 - n * self.sums) + 2 * self.store

    def bound(self, W: Float[Tensor, "*n rows columns"]) -> Float[Tensor, "*n"]:
        """`spectral`, once for each weight."""
        known = W.data_ptr(), W.shape, W.stride()
        if known not in self._bounds:
            self._bounds[known] = W, spectral(W).squeeze(-1)     # W: so that it keeps its place
        return self._bounds[known][1]

    def rounding(self, relative: float, size: Tensor) -> Tensor:
        """Of a result whose parts add up to `size`; infinite where something may overflow."""
        return (relative * size + self.tiny).where(size < self.largest, math.inf)

    def product(self, x: Tensor, r: Tensor, W: Float[Tensor, "out dim"]) -> Float[Tensor, "*n out"]:
        """The rounding of each sum of W x, for all x within r."""
        return self.rounding(self.gamma(W.shape[1]) + 2 * self.read,
                             x.abs() @ W.abs().T + length(W).T * r)

    def norm(self, b: Ball, m: RMSNorm) -> Step:
        """x w / rho, rho^2 = mean(x^2) + eps; D = diag(w) (I - u u^T / dim) / rho with u = x / rho.
        With the least rho of the ball |D^2| <= 1.53 max w / (rho^2 sqrt(dim)): split both arguments
        along x and across it; the result's part along x is at most 2 / sqrt(3), across at most
        1."""
        d, w, r = b.x.shape[-1], m.weight, b.radius
        rho = (length(b.x).square() / d + m.eps).sqrt()
        least = ((length(b.x) - r).clamp(min=0).square() / d + m.eps).sqrt()
        steep, u = w.abs().max() / least, b.x / rho
        D = (w / rho).unsqueeze(-1) * (torch.eye(d, dtype=w.dtype)
                                       - u.unsqueeze(-1) * u.unsqueeze(-2) / d)
        size = length(u * w) + steep * r
        size = size.where(length(b.x) + r < self.largest, math.inf)
        second = 1.53 / 2 * steep / least / d ** 0.5 * r ** 2
        # what underflows before the weight is multiplied by it
        rounding = self.rounding(self.gamma(d + 2 * FUNCTION), size) + self.tiny * w.abs().max()
        return Step(u * w, [D], second + rounding)

    def normed(self, b: Ball, m: RMSNorm) -> Ball:
        return self.norm(b, m).of(b)

    def add(self, a: Ball, b: Ball) -> Ball:
        x, error = a.x + b.x, a.error + b.error
        return Ball(x, error + self.rounding(self.store, length(x) + a.radius + b.radius),
                    a.along + b.along)

    def softmax(self, z: Float[Tensor, "*n k"], off: Float[Tensor, "*n 1"],
                r: Float[Tensor, "*n 1"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights; by how much rounding may have them off, all together, where it has the scores
        off by `off`, and they vary by r; and bounds of |D| and |D^2|. Before exp a difference is
        rounded.

        D = diag(p) - p p^T, and |D| <= 2 max p_i (1 - p_i) =: s by Gershgorin's circles; where each
        score varies by r, p / (1 - p) does by a factor of exp(2 r) at most, and p (1 - p) too. With
        a and b the arguments less their means by p, D^2 is p_i (a_i b_i - sum_k p_k a_k b_k), and
        sum p |a b| <= s, so |D^2| <= 2 s. Of two it is sqrt(2) s |1 - 2 p|, at most 0.2723.
        """
        p, all_off = z.softmax(-1), off + r
        span = (z.amax(-1, keepdim=True) - z).where(p > 0, 0.0) + 2 * all_off
        shared = (p * span).sum(-1, keepdim=True)                # of the sum that divides all
        relative = (self.store * (span + shared + 1)
                    + self.sums * (2 * FUNCTION + z.shape[-1]))
        steep = (2 * (p * (1 - p)).amax(-1, keepdim=True) * (2 * all_off).exp()).clamp(max=0.5)
        two = (z > -torch.inf).sum(-1, keepdim=True) < 3
        bent = (2 ** 0.5 * steep).clamp(max=0.2723).where(two, 2 * steep)
        return p, steep * off + length(relative * (p + all_off / 2)) + self.tiny, steep, bent

    def leads(self, b: Ball, W: Float[Tensor, "choices dim"], offset: Float[Tensor, "choices"],
              chosen: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """By how many times its bound the score W_c x + offset_c of the `chosen` one leads each
        other, at least; infinity where there is no other."""
        score, r = b.x @ W.T + offset, b.radius
        rounding = self.score_rounding(b.x, r, W, offset)
        used, row = chosen.unique(return_inverse=True)           # few, of many contexts
        apart = torch.cdist(W[used], W, compute_mode="donot_use_mm_for_euclid_dist")[row]
        chosen = chosen.unsqueeze(-1)
        off = apart * r + rounding + rounding.gather(-1, chosen)
        lead = score.gather(-1, chosen) - score
        return (lead / off).scatter(-1, chosen, torch.inf).amin(-1)

    def score_rounding(self, x: Tensor, r: Tensor, W: Tensor, offset: Tensor) -> Tensor:
        """Of each of W x + offset, for all x within r."""
        return (self.product(x, r, W) + self.rounding(2 * self.store, x.abs() @ W.abs().T
                                                      + length(W).T * r)
                + self.rounding(self.gamma(W.shape[1] + 2) + self.store, offset.abs()))
