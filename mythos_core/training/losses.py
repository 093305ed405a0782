"""What a training minimises, and the means that states are handed on as."""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mythos_core.model.config import MythosConfig
from mythos_core.tasks.automaton import Machine


def mean_loss(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"],
              weight: Float[Tensor, "n"] | None) -> Float[Tensor, ""]:
    """Mean cross-entropy, or with weights the weighted mean."""
    if weight is None:
        return F.cross_entropy(logits, targets)
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()


def bits(logits: Float[Tensor, "*positions vocab"],
         targets: Int[Tensor, "*positions"]) -> Float[Tensor, "*positions"]:
    """-log2 softmax(logits)[target], for each position."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(),
                           reduction="none").view(targets.shape) / math.log(2)


def move_weights(machine: Machine, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """1 over how often the batch has a position's move, its state before and its letter: so weighed
    each move that is met counts the same, however rare."""
    move = machine.moves(ids)
    return 1.0 / move.flatten().bincount()[move]


def numbered(label: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], int]:
    """The labels that there are numbered from 0 on, and how many they are."""
    values, number = label.unique(return_inverse=True)
    return number, len(values)


def means_of(h: Float[Tensor, "n dim"], label: Int[Tensor, "n"],
             labels: int) -> Float[Tensor, "labels dim"]:
    """The mean of the rows of each label, of 0 .. `labels` - 1."""
    sums = h.new_zeros(labels, h.shape[1]).index_add(0, label, h)
    count = h.new_zeros(labels).index_add(0, label, torch.ones_like(h[:, 0]))
    return sums / count.clamp(min=1).unsqueeze(1)


def means_by(h: Float[Tensor, "n dim"], label: Int[Tensor, "n"],
             labels: int) -> Float[Tensor, "n dim"]:
    """In each row the mean of the rows with its label."""
    return means_of(h, label, labels)[label]


def handing_on(common: Bool[Tensor, "batch seq"], label: Int[Tensor, "batch seq"],
               labels: int) -> Callable:
    """What positions read in place of the states before them, as `StrictBlock.settle` asks for
    it: where `common`, the mean of a position's states with their label. So it will be once states
    are rounded."""
    def hand_on(h: Tensor, position: int) -> Tensor:                 # (batch, some, dim)
        here = slice(position, position + h.shape[1])
        means = means_by(h.flatten(0, 1), label[:, here].flatten(), labels).view_as(h)
        return torch.where(common[:, here].unsqueeze(-1), means, h)

    return hand_on


def center_loss(h: Float[Tensor, "batch seq dim"], label: Int[Tensor, "batch seq"], labels: int
                ) -> Float[Tensor, ""]:
    """Mean squared distance of h from the batch's mean of its label, the machine's state, in units
    of the mean square of h (after the center loss of Wen et al. 2016): states that mean the same
    come to be the same, which a code can then be."""
    h = h.flatten(0, 1)
    spread = (h - means_by(h, label.flatten(), labels)).square().sum(-1)
    return spread.mean() / h.detach().square().sum(-1).mean()


def state_loss(h: Float[Tensor, "batch seq dim"], label: Int[Tensor, "batch seq"], labels: int
               ) -> Float[Tensor, ""]:
    """Cross-entropy of which label's mean is nearest to h, which is what rounding to codes will
    ask; each label counts the same. Two states of a machine may get the same answers but for one
    word, however rare: of them the answers alone say next to nothing."""
    h, label = h.flatten(0, 1), label.flatten()
    means, scale = means_of(h, label, labels), h.detach().square().sum(-1).mean()
    count = h.new_zeros(labels).index_add(0, label, torch.ones_like(h[:, 0]))
    # 10 |h - m|^2 / scale, but for what all labels share
    near = 10 * (2 * h @ means.T - means.square().sum(-1)) / scale
    near = near.masked_fill(count == 0, -torch.inf)
    return mean_loss(near, label, 1 / count[label])


def spread_ratio(h: Float[Tensor, "n dim"], label: Int[Tensor, "n"], labels: int
                 ) -> Float[Tensor, ""]:
    """Mean of |h - m|^2 / |m - m'|^2, with m the batch's mean of h's label and m' the mean nearest
    to m. A distance to the mean alone is least where all states are one; this ratio is not."""
    means = means_of(h, label, labels)
    apart = (means.unsqueeze(1) - means).square().sum(-1)        # cdist has no gradient at 0
    apart = apart + torch.diag(torch.full_like(apart[0], torch.inf))
    nearest = apart.amin(1)[label].clamp(min=1e-6)
    return ((h - means[label]).square().sum(-1) / nearest).mean()


def apart(h: Float[Tensor, "n dim"], label: Int[Tensor, "n"], labels: int, least: float
          ) -> Float[Tensor, ""]:
    """How far the means of different labels are, on average, from being `least` apart: what
    contracts would else contract them too."""
    means = means_of(h, label, labels)
    distance = (means.unsqueeze(1) - means).square().sum(-1)
    distance = distance + torch.diag(torch.full_like(distance[0], torch.inf))
    return F.relu(least - distance.amin(1).clamp(min=1e-6).sqrt()).mean()


def steepness(step: Callable, x: Float[Tensor, "n dim"], far: float | Tensor = 0.1
              ) -> Float[Tensor, ""]:
    """Mean of |step(x + far d) - step(x)|^2 / far^2 with d the direction of 1 in which the step
    grows most, by one power iteration d = J^T J d' from a random d': below 1 it contracts."""
    x = x.detach().requires_grad_()
    start, near = F.normalize(torch.randn_like(x), dim=-1), far / 2
    here = step(x)
    growth = (step(x + near * start) - here).detach() / near
    way = F.normalize(torch.autograd.grad(here, x, growth)[0], dim=-1)
    x = x.detach()
    return ((step(x + far * way) - step(x)) / far).square().sum(-1).mean()


def ponder(weight: Float[Tensor, "loops batch seq"]) -> Float[Tensor, ""]:
    """Graves' ponder cost N + R: the loops until a position halts, and the weight of the last of
    them, which has the gradient."""
    loops = torch.arange(1, len(weight) + 1, device=weight.device)[:, None, None]
    stopped_at = ((weight > 0) * loops).amax(0)
    return (stopped_at + weight.gather(0, (stopped_at - 1).clamp(min=0)[None])[0]).float().mean()


def ties(scores: Float[Tensor, "*n experts"], weight: Float[Tensor, "experts dim"],
         config: MythosConfig) -> Float[Tensor, ""]:
    """How far, on average, what a router reads is from being 0.3 away from a tie of the last expert
    chosen and the next: there the two scores z_i and z_j differ by 0.3 |w_i - w_j|. A ball in which
    either may be chosen goes to where both lead. 0 where all are chosen."""
    k = config.n_experts_per_tok
    if config.n_experts == k:
        return scores.new_zeros(())
    best, expert = scores.topk(k + 1, -1)
    apart = torch.linalg.vector_norm(weight[expert[..., k - 1]] - weight[expert[..., k]], dim=-1)
    return F.relu(0.3 - (best[..., k - 1] - best[..., k]) / apart).mean()
