"""A GRU of torch.nn on balls, and rows of its proofs: `proof.invariant` asks for a cell, not for a
loop of ours."""
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.proof.balls import FUNCTION, Arithmetic, Ball, Step, length
from mythos_core.proof.invariant import invariant
from mythos_core.study.peers import GRU, budgeted, count, fit
from mythos_core.training.recipes import Recipe

# above max |sigmoid'| = 1/4, |sigmoid''| = 0.0962.., |tanh'| = 1, |tanh''| = 0.7698..
SIGMOID, TANH = (0.25, 0.0963), (1.0, 0.77)


def _sigmoid(value: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the first and second derivative of sigmoid where its value is this, and its
    argument varies by so much; the third is at most 1/8."""
    slope = value * (1 - value)
    return ((slope + SIGMOID[1] * by).clamp(max=SIGMOID[0]),
            (slope * (1 - 2 * value).abs() + by / 8).clamp(max=SIGMOID[1]))


class GRUCell:
    """h' = n + z (h - n), n = tanh(a_n + r q), q = W_n h + b_n, r = sigmoid(a_r + W_r h), z alike,
    where the letter gives a: a cell for `proof.invariant.invariant`, in float64 on the CPU."""

    def __init__(self, model: GRU, arithmetic: str = "float32"):
        self.model: Any = model.double()
        self.maths, self.branched = Arithmetic(arithmetic), 0
        self.start = torch.zeros(1, model.width, dtype=torch.float64)

    def step(self, h: Ball, letters: Int[Tensor, "n"]) -> Ball:
        """The states after these letters. Each channel of h' is a function of its r, z, q and h,
        which vary by so much in the ball; its second derivatives are bounded by those of sigmoid
        and tanh."""
        cell, maths, radius = self.model.cell, self.maths, h.radius
        x, W, b = self.model.embed(letters + 1), cell.weight_hh, cell.bias_hh
        given, held = x @ cell.weight_ih.T + cell.bias_ih, h.x @ W.T + b
        off = (maths.product(x, torch.zeros_like(radius), cell.weight_ih)
               + maths.product(h.x, radius, W) + maths.rounding(
                   maths.gamma(4), given.abs() + held.abs() + cell.bias_ih.abs() + b.abs()))
        r_off, z_off, q_off = off.chunk(3, -1)
        r_by, z_by, q_by = (length(W).T * radius + off).chunk(3, -1)
        (a_r, a_z, a_n), (h_r, h_z, q) = given.chunk(3, -1), held.chunk(3, -1)
        r, z = (a_r + h_r).sigmoid(), (a_z + h_z).sigmoid()
        n = (a_n + r * q).tanh()
        # slopes of h' by what r and z are functions of, by q and by h
        flat = (1 - z) * (1 - n * n)
        by_r, by_z, by_q = flat * q * r * (1 - r), (h.x - n) * z * (1 - z), flat * r
        W_r, W_z, W_n = W.chunk(3)
        J = (by_r.unsqueeze(-1) * W_r + by_z.unsqueeze(-1) * W_z + by_q.unsqueeze(-1) * W_n
             + torch.diag_embed(z))
        # in all of the ball: derivatives of r and z, of n by its argument, and 1 - z
        (r_1, r_2), (z_1, z_2) = _sigmoid(r, r_by), _sigmoid(z, z_by)
        big_q, big = q.abs() + q_by, (h.x - n).abs() + radius + 1
        n_by = r_1 * big_q * r_by + (r + r_1 * r_by) * q_by      # of the argument of n
        n_1 = (1 - n * n + TANH[1] * n_by).clamp(max=TANH[0])
        n_2 = (2 * n.abs() * (1 - n * n) + 2 * n_by).clamp(max=TANH[1])
        rest = 1 - z + z_1 * z_by
        second = 0.5 * (rest * (n_2 * n_by ** 2 + n_1 * (r_2 * big_q * r_by ** 2
                                                         + 2 * r_1 * r_by * q_by))
                        + z_2 * big * z_by ** 2 + 2 * z_1 * z_by * (radius + n_1 * n_by))
        # what rounding has them off by, and their own functions and products
        inner = r_1 * big_q * r_off + q_off + maths.rounding(
            FUNCTION * maths.sums + 3 * maths.store, big_q + a_n.abs())
        rounded = rest * n_1 * inner + z_1 * big * z_off + maths.rounding(
            2 * FUNCTION * maths.sums + 4 * maths.store, n.abs() + h.x.abs() + radius)
        return Step(n + z * (h.x - n), [J], length(second + rounded)).of(h)

    def answers(self, h: Ball) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """The answer in the middle of each ball, and by how many times its bound it leads there."""
        head = self.model.head
        chosen = head(h.x).argmax(-1)
        return chosen, self.maths.leads(h, head.weight, head.bias, chosen)


def balls_row(recipe: Recipe, seed: int, device=None) -> dict:
    """A GRU trained on the recipe's machine, to contract while its learning rate falls, and the
    proof of its weights as trained."""
    recipe = budgeted(recipe)
    model, history = fit(GRU, recipe, seed, device)
    asked = recipe.machine.minimal()
    found = invariant(GRUCell(model), asked)
    balls = found.states
    return {"proved": found.closed and balls.safety["logit"] > 1, "reason": found.fault,
            "balls": len(balls.codes), "radius": balls.radius,
            "same_machine": found.closed and found.machine() == asked,
            "steps": len(history), "accuracy": history[-1]["accuracy"],
            "parameters": count(model), "recipe": recipe.as_dict()}
