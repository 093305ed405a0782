"""Peers of the strict loop: what else learns a machine's strings, trained by the machine's own
recipe for a fixed number of steps, and the proof that a recurrent one among them can have.

    model, history = fit(GRU, budgeted(recipe_for(machine("S3"))), seed=0)
    rows_of(model, machine("S3"))
"""
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_core.model.model import OpenMythos
from mythos_core.tasks.automaton import Machine
from mythos_core.training.losses import (
    handing_on,
    mean_loss,
    move_weights,
    numbered,
    spread_ratio,
    steepness,
)
from mythos_core.training.recipes import Recipe
from mythos_core.training.schedule import CERTIFY_EVERY, draw, learning_rate

BUDGET = 1000  # optimiser steps of a peer; proofs of the strict loop mostly take fewer
Model = TypeVar("Model", bound=nn.Module)


class Recurrent(nn.Module):
    """h_i = step(h_{i-1}, letter i) from h_0 = 0, and the answer to it: what a settled strict loop
    with a window of 1 is too. As wide as the parameters of the recipe's model allow."""

    head: nn.Module

    def __init__(self, recipe: Recipe):
        super().__init__()
        c = recipe.config
        with torch.device("meta"):
            budget = count(OpenMythos(c))
            self.width = bisect_right(range(1, 9 * c.dim), budget,
                                      key=lambda width: count(self.parts(c.vocab_size, c.dim,
                                                                         width)))
        for name, part in self.parts(c.vocab_size, c.dim, self.width).items():
            self.add_module(name, part)

    @staticmethod
    def parts(vocab: int, dim: int, width: int) -> nn.ModuleDict:
        """The modules of one of this width."""
        raise NotImplementedError

    def step(self, h: Float[Tensor, "batch width"],
             ids: Int[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
        raise NotImplementedError

    def answer(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocab"]:
        """Logits, from the state alone."""
        return self.head(h)

    def states(self, ids: Int[Tensor, "batch seq"],
               hand_on: Callable | None = None) -> Float[Tensor, "batch seq width"]:
        """All states; `hand_on` as in `StrictBlock.settle`."""
        h, states = torch.zeros(len(ids), self.width, device=ids.device), []
        for position, letter in enumerate(ids.unbind(1)):
            states.append(h := self.step(h, letter))
            if hand_on is not None:
                h = hand_on(h.unsqueeze(1), position).squeeze(1)
        return torch.stack(states, 1)

    def forward(self, ids, n_loops=None):
        return self.answer(self.states(ids))


class GRU(Recurrent):
    """One layer (Cho et al. 2014, arXiv:1406.1078)."""

    @staticmethod
    def parts(vocab, dim, width):
        return nn.ModuleDict({"embed": nn.Embedding(vocab, dim), "cell": nn.GRUCell(dim, width),
                              "head": nn.Linear(width, vocab)})

    def step(self, h, ids):
        return self.cell(self.embed(ids), h)


class LinearRecurrence(Recurrent):
    """h_i = a(x_i) * h_{i-1} + b(x_i), with a diagonal transition that depends on the letter, as in
    Mamba, and two layers that read an answer off h.

    Rounding the states to one code a state of the machine does not free it of its limits. Say that
    a letter, f(h) = a * h + b, moves n >= 2 codes c_i in a circle. Then f(c_i) is nearer to c_(i+1)
    than to c_(i-1), or for n = 2 than to c_i itself. For n >= 3 the sum over i of
    2 f(c_i) . (c_(i+1) - c_(i-1)) - |c_(i+1)|^2 + |c_(i-1)|^2, each above 0, is 0, since a is real
    and diagonal. For n = 2 it says -2 (c_1 - c_0) . a * (c_1 - c_0) > 0: some a is below 0.

    Args:
        least: the eigenvalues a are in (least, 1). At 0 parity cannot be told in finite precision,
            at -1 it can (Grazzi et al. 2024, arXiv:2411.12537).
    """

    def __init__(self, recipe: Recipe, least: float):
        super().__init__(recipe)
        self.least = least

    @staticmethod
    def parts(vocab, dim, width):
        head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, vocab))
        return nn.ModuleDict({"embed": nn.Embedding(vocab, dim), "a": nn.Linear(dim, width),
                              "b": nn.Linear(dim, width), "head": head})

    def step(self, h, ids):
        x = self.embed(ids)
        return (self.least + (1 - self.least) * self.a(x).sigmoid()) * h + self.b(x)


def transformer(recipe: Recipe) -> OpenMythos:
    """The recipe's model with every ingredient of the strict loop taken away: its block runs once,
    and reads all positions, by RoPE. It has as many parameters."""
    return OpenMythos(replace(recipe.config, strict=False, halting="none", max_loop_iters=1,
                              window=None, rope=True, max_seq_len=4096, loop_noise=0.0))


#: What is trained beside the strict loop, by name.
PEERS: dict[str, Callable[[Recipe], nn.Module]] = {
    "transformer": transformer, "GRU": GRU,
    "linear, eigenvalues in (0, 1)": partial(LinearRecurrence, least=0.0),
    "linear, eigenvalues in (-1, 1)": partial(LinearRecurrence, least=-1.0)}


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def budgeted(recipe: Recipe) -> Recipe:
    """The recipe of a machine for a model that is not trained until it is proved: `BUDGET` steps
    with the same curriculum, over the last half of which the learning rate falls, and told no state
    by a loss."""
    return replace(recipe, steps=BUDGET, curriculum=recipe.curriculum * recipe.steps / BUDGET,
                   decay=0.5, state_loss=0.0)


def fit(make: Callable[[Recipe], Model], recipe: Recipe, seed: int,
        device=None) -> tuple[Model, list[dict]]:
    """Train a model of any kind for the recipe's steps: its optimiser, batches and loss, with every
    position scored; nothing is proved on the way.

    Returns:
        The model, on the CPU, and one row a step: step, loss, token accuracy; of a recurrent one,
        every tenth step whose batch is answered right, `rows`: how many its proof has, None if
        there is none.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, history = make(recipe).to(device), []
        optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, recipe.betas,
                                      weight_decay=recipe.weight_decay, fused=True)
        for step in range(recipe.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            falls = bool(recipe.decay) and step >= (1 - recipe.decay) * recipe.steps
            loss, accuracy = _step(model.train(), recipe, *draw(recipe, step), device, falls)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            history.append({"step": step, "loss": loss.item(), "accuracy": accuracy})
            certifying = (step + 1) % CERTIFY_EVERY == 0 and accuracy > 0.99
            if certifying and recipe.machine is not None and isinstance(model, Recurrent):
                history[-1]["rows"] = rows_of(model, recipe.machine)
    return model.cpu().eval(), history


def _step(model, recipe: Recipe, length: int, n_loops: int | None,
          device=None, falls: bool = False) -> tuple[Tensor, float]:
    """Loss and token accuracy of one batch. Of a recurrent model half of the states are handed on
    as means, if the recipe says so, as `training.train` does with those of a strict loop; and one
    that is to contract is asked for that while the learning rate falls."""
    ids, targets = recipe.make_batch(recipe.batch, length, strings=recipe.strings, device=device)
    also: Tensor | float = 0.0
    if recipe.contraction and falls:
        states = model.states(ids)
        logits, before = model.answer(states), torch.cat([0 * states[:, :1], states[:, :-1]], 1)
        label, labels = numbered(recipe.machine.outcomes(ids))
        also = (recipe.contraction * steepness(lambda h: model.step(h, ids.flatten()),
                                               before.flatten(0, 1))
                + recipe.center_loss * spread_ratio(states.flatten(0, 1), label.flatten(), labels))
    elif recipe.handed_on and isinstance(model, Recurrent):
        drawn = torch.rand(length, len(ids), device=device).T
        hand_on = handing_on(drawn < recipe.handed_on, *numbered(recipe.machine.outcomes(ids)))
        logits = model.answer(model.states(ids, hand_on))
    else:
        logits = model(ids, n_loops)
    weight = move_weights(recipe.machine, ids).flatten() if recipe.balanced else None
    loss = mean_loss(logits.flatten(0, 1), targets.flatten(), weight)
    return loss + also, (logits.argmax(-1) == targets).float().mean().item()


@torch.no_grad()
def rows_of(model: Recurrent, asked: Machine) -> int | None:
    """How many rows prove that the model, its states rounded to codes, answers as a machine does on
    every string; None if one of them is wrong.

    A row is a code, or the start, with the machine's state there and a letter; those that strings
    lead to are closed, as in `certificate.certify`. Codes are means of states by what the machine
    has in mind. Other than there, margins and float64 are left out: the rows are right as this
    processor rounds.
    """
    codes = _codes(model, asked)
    h = torch.cat([torch.zeros_like(codes[:1]), codes])          # the start, and each code
    answers = model.answer(codes).argmax(-1)
    letters = torch.arange(1, asked.letters + 1, device=codes.device)
    code = torch.stack([                                         # (1 + codes, letters), from 0
        torch.cdist(model.step(h, letter.expand(len(h))), codes).argmin(1)
        for letter in letters], 1).cpu()
    right = answers.cpu()[code][:, None] == asked.answer         # (1 + codes, states, letters)
    seen, todo = {(0, asked.start)}, [(0, asked.start)]
    for origin, state in todo:
        if not right[origin, state].all():
            return None
        following = zip((code[origin] + 1).tolist(), asked.next_state[state].tolist())
        new = dict.fromkeys(pair for pair in following if pair not in seen)
        seen.update(new)
        todo.extend(new)
    return len(seen) * asked.letters


def _codes(model: Recurrent, asked: Machine) -> Float[Tensor, "codes width"]:
    """Mean states of strings of 16 elements, by the state to go on from and the answer to give."""
    device = next(model.parameters(), torch.empty(0)).device
    ids = asked.make_batch(max(256, 16 * len(asked)), 16, torch.Generator().manual_seed(0), device,
                           strings=kind(asked))[0]
    h, (values, label) = model.states(ids).flatten(0, 1), asked.outcomes(ids).unique(
        return_inverse=True)
    sums = h.new_zeros(len(values), h.shape[1]).index_add(0, label.flatten(), h)
    return sums / label.flatten().bincount().unsqueeze(1)


def kind(asked: Machine) -> str:
    """The strings on which a machine is tested: random ones, or such as keep out of its traps."""
    return "uniform" if asked.reversible else "touring"


@torch.no_grad()
def accuracy(model: nn.Module, asked: Machine, strings: int = 32) -> dict:
    """By length: share of strings whole, share of tokens right, and the first position (from 0) at
    which any string is wrong, None if none is."""
    row: dict[str, dict] = {name: {} for name in ("whole", "token", "first_wrong")}
    for length in (16, 64, 256):
        ids, targets = asked.make_batch(strings, length, torch.Generator().manual_seed(
            2 ** 31 + length), strings=kind(asked))
        right = torch.cat([model(part).argmax(-1) for part in ids.split(8)]) == targets
        all_right = right.all(0)
        row["whole"][str(length)] = right.all(1).float().mean().item()
        row["token"][str(length)] = right.float().mean().item()
        row["first_wrong"][str(length)] = (None if all_right.all()
                                           else int(all_right.long().argmin()))
    return row


def peer_row(name: str, recipe: Recipe, seed: int, device=None) -> dict:
    """One of the `PEERS`, trained on a machine's strings: its accuracy, its states not rounded; and
    of a recurrent one, the step at which its rows were first closed, and how many there are at the
    end of training (None: not closed)."""
    if name not in PEERS:
        raise ValueError(f"peer = {name!r}: must be one of {sorted(PEERS)}")
    recipe = budgeted(recipe)
    model, history = fit(PEERS[name], recipe, seed, device)
    row = {"steps": len(history), "loss": history[-1]["loss"], "parameters": count(model),
           "recipe": recipe.as_dict(), **accuracy(model, recipe.machine)}
    if not isinstance(model, Recurrent):
        return row
    closed = [row["step"] for row in history if row.get("rows")]
    return row | {"first_closed": closed[0] if closed else None,
                  "rows": rows_of(model, recipe.machine)}
