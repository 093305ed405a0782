"""Proofs that a strict model answers as a machine does, on every string of every length.

The theorem. Let a model be strict with stride s, without the carry, without positions (RoPE off)
and with a window W, and let its states be rounded to codes c_1 .. c_n (`RecurrentBlock.rounded`).
Call what decides position i its *context*: the codes of the W + s - 1 positions before it, and the
last (W - 1)(P + 1) + 1 tokens, where P is the number of prelude layers; fewer near the start of the
string. Let a set of triples (context, state of the machine, answer due) hold that of each
one-letter string, and with each triple, for each letter, the one that follows it; letters apart of
which nothing is asked there. If the model's answer is the one due in every triple, then it is the
machine's at every position of every string, after as many loops as there are positions.

Proof. By the strict loop (theorem 1 of `RecurrentBlock`) the settled state of position i is a
function of its context, and so is the code it is rounded to, hence the context that follows by
a letter; its answer is a function of the codes of the (W - 1) C positions before it, C the
number of coda layers, and of its own. So, by induction over the positions, each position of
each string has a triple in the set.

What is assumed of arithmetic. A context is evaluated in float64, which makes three choices: the
code, the answer and the experts. How far each is from being another one is its *margin*. The
model's own arithmetic evaluates the context too, and how much smaller or larger the margins of the
same choices are there, at most, is the *error*. The proof holds on every machine whose error is at
most `SPARE` times the one measured; where a margin is smaller than that, nothing is proved.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core import attention
from mythos_core.automaton import NOT_ASKED
from mythos_core.machines import Machine, minimal
from mythos_core.model import OpenMythos
from mythos_core.tasks import Task

SPARE = 100             # how many times the measured error another machine may have
MOST_CONTEXTS = 200_000
PART = 4096             # contexts of one pass
TRIED = 20_000          # codes times letters, at most, of codes that are chosen by moves
SEEN = 16               # elements of the strings whose states the codes are chosen from

Context = tuple[tuple[int, ...], tuple[int, ...]]  # tokens, codes of the positions before
START: Context = ((), ())                          # what the first position has behind it: nothing


@dataclass(frozen=True, eq=False)
class Certificate:
    """What was proved of a model, or what stands against it.

    Attributes:
        proved: whether the answers are right on all strings: `reason` is ""
            then, and else says why not.
        contexts: triples of a context, a state of the machine and the answer due that were met.
        wrong: those in which the model answers otherwise, among the ones that the shortest strings
            with a wrong answer lead to; the search ends there.
        codes: (n, dim) what states are rounded to.
        state_margin: the least distance of a state from the border of its code's cell. Beside it in
            `errors` how far the model's arithmetic and float64 are apart in it, at most.
        logit_margin: the least lead of an answer's logit; routing_margin: of a chosen expert's.
        model: the model with its states rounded to the codes: the one that the proof is about.
    """

    proved: bool
    reason: str
    contexts: int
    wrong: int
    codes: Float[Tensor, "codes dim"]
    state_margin: float
    logit_margin: float
    routing_margin: float
    errors: dict[str, float]
    model: OpenMythos
    closure: "Closure"

    @cached_property
    def machine(self) -> Machine | None:
        """The minimal machine that the contexts make up, as read off the model's own answers, right
        or wrong; None if they were not closed, or not all strings are asked about."""
        closure = self.closure
        return closure.machine() if closure.closed and not closure.left_out else None

    def summary(self) -> dict:
        """What a file beside the weights says of it."""
        margins = {name: getattr(self, name)
                   for name in ("state_margin", "logit_margin", "routing_margin")}
        return {"proved": self.proved, "reason": self.reason, "contexts": self.contexts,
                "wrong": self.wrong, "codes": len(self.codes), **margins, "errors": self.errors,
                "machine": self.machine and self.machine.as_dict()}


def certify(model: OpenMythos, machine: Machine,
            codes: Float[Tensor, "codes dim"] | None = None) -> Certificate:
    """Prove that `model`, its states rounded to codes, answers as `machine` does on every string.

    Args:
        codes: to round to. Default: the model's own, if it has some; else means of the settled
            states of strings of at most 16 elements, taken by the machine's state, its answer and
            its last k moves, with the least k from 0 to 3 that gives a proof; where that makes too
            many codes (`TRIED`), a smaller k is the last. That labels choose the codes takes
            nothing from the proof, which checks what they do.

    Raises:
        ValueError: if the model is not of the kind that the theorem is about, or
            has no room for the machine.
    """
    _check(model, machine)
    model = model.eval()
    if codes is None and model.recurrent.codes is not None:
        codes = model.recurrent.codes
    bare = _with_codes(model, None)
    if codes is not None:
        return _certify(bare, machine, codes)
    for chosen in candidate_codes(bare, machine):
        certificate = _certify(bare, machine, chosen)
        if certificate.proved:
            break
    return certificate


def automaton(model: OpenMythos, letters: int) -> Machine | None:
    """The minimal machine that a model with codes is, right or wrong, as read off its own answers;
    None if its contexts, over `letters` letters, are too many to close. ValueError as `certify`."""
    _check(model)
    if model.recurrent.codes is None:
        raise ValueError("model.config.codes = 0: must be above 0; `certify` finds some")
    closure = Closure(model.eval(), letters).run()
    return closure.machine() if closure.closed else None


def _check(model, machine=None):
    c = model.config
    for name, wanted in (("strict", True), ("carry", False), ("rope", False)):
        if getattr(c, name) != wanted:
            raise ValueError(f"model.config.{name} = {getattr(c, name)}: "
                             f"must be {wanted} for a certificate")
    if c.window is None:
        raise ValueError("model.config.window = None: must be a number for a certificate")
    if machine is not None and machine.vocab_size > c.vocab_size:
        raise ValueError(f"machine {machine.name!r} has tokens up to {machine.vocab_size - 1}: "
                         f"must be below model.config.vocab_size = {c.vocab_size}")


def _with_codes(model: OpenMythos, codes: Tensor | None) -> OpenMythos:
    """A copy of the model that rounds its states to these codes."""
    copy = OpenMythos(replace(model.config, codes=0 if codes is None else len(codes))).to(
        model.embed.weight)
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if name != "recurrent.codes"}
    copy.load_state_dict(weights if codes is None else {**weights, "recurrent.codes": codes})
    return copy.eval()


@torch.no_grad()
def candidate_codes(model: OpenMythos, machine: Machine) -> Iterator[Float[Tensor, "codes dim"]]:
    """Means of settled states by the machine's state and answer and its last k moves, for
    k = 0, 1, 2, 3."""
    generator = torch.Generator().manual_seed(0)
    ids, _ = machine.make_batch(max(256, 16 * len(machine)), SEEN, generator,
                                model.embed.weight.device,
                                "uniform" if machine.reversible else "touring")
    h = model.recurrent.settle(model.encode(ids, model.context(ids))).flatten(0, 1)
    label, moves = machine.outcomes(ids), machine.moves(ids) + 1
    for k in range(4):
        _, label = label.unique(return_inverse=True)
        group = label.flatten()
        n = int(group.max()) + 1
        if k and n * machine.letters > TRIED:
            return
        sums = torch.zeros(n, h.shape[1], dtype=h.dtype, device=h.device).index_add(0, group, h)
        yield sums / group.bincount(minlength=n).unsqueeze(1)
        # the move k before, 0 before the first
        label = label * (moves.max() + 1) + F.pad(moves, (k, 0))[:, :ids.shape[1]]


def _certify(bare: OpenMythos, machine: Machine, codes: Tensor) -> Certificate:
    model = _with_codes(bare, codes)
    closure = Closure(model, machine.letters, machine).run()
    margins = {name: min(found) if found else 0.0 for name, found in closure.margins.items()}
    errors = {name: max(found) if found else 0.0 for name, found in closure.errors.items()}
    thin = [name for name in margins if not margins[name] > SPARE * errors[name]]
    reason = ""
    if closure.wrong:
        reason = f"a string of {closure.length} elements is answered wrong"
    elif not closure.closed:
        reason = f"not closed after {len(closure.seen)} contexts"
    elif thin:
        reason = "; ".join(f"{name} margin {margins[name]:.3g} is not above {SPARE} times "
                           f"the error {errors[name]:.3g}" for name in thin)
    return Certificate(not reason, reason, len(closure.seen), closure.wrong, codes,
                       margins["state"], margins["logit"], margins["routing"], errors, model,
                       closure)


class Closure:
    """The contexts that strings lead to, met letter by letter, each with the state of the
    machine that is `asked` for, or of the task that no machine does."""

    def __init__(self, model: OpenMythos, letters: int, asked: Machine | Task | None = None):
        self.model, self.letters, self.asked = model, letters, asked
        # on the CPU: not every device has float64
        self.judge = _with_codes(model, model.recurrent.codes).cpu().double()
        self.length, self.wrong, self.closed = 0, 0, False
        self.left_out = isinstance(asked, Machine) and bool((asked.answer == NOT_ASKED).any())
        c = model.config
        self.tokens_kept = (c.window - 1) * (c.prelude_layers + 1) + 1
        self.codes_kept = max(c.window + c.stride - 1, (c.window - 1) * c.coda_layers)
        # positions before its own that an answer reads
        self.read = (c.window - 1) * c.coda_layers
        self.margins = {"state": [], "logit": [], "routing": []}
        self.errors = {"state": [], "logit": [], "routing": []}
        self.follows: dict[Context, tuple[int, int]] = {}        # context -> code, answer
        # context, state of the machine behind it, and the answer due: one context and state may be
        # come to by moves with different answers
        self.seen: set[tuple[Context, Any, int]] = set()

    @torch.no_grad()
    def run(self) -> "Closure":
        """Close the set, one letter longer at a time, unless an answer is wrong or there are too
        many. Where nothing is asked of a move, no string with it is followed."""
        asked = self.asked or Machine.from_table([[0] * self.letters])
        frontier: set[tuple[Context, Any]] = {(START, asked.start)}
        while frontier and not self.wrong and len(self.seen) < MOST_CONTEXTS:
            new = {(self.context(past, b), after, answer) for past, state in frontier
                   for b, (after, answer) in enumerate(asked.following(state))
                   if answer != NOT_ASKED}
            new -= self.seen
            self._evaluate({context for context, _, _ in new} - self.follows.keys())
            if self.asked is not None:
                self.wrong = sum(self.follows[context][1] != answer for context, _, answer in new)
            self.seen |= new
            # with many letters few of these are different
            frontier = {(self.past(context), state) for context, state, _ in new}
            self.length += bool(frontier)
        self.closed = not frontier and not self.wrong
        return self

    def context(self, past: Context, letter: int) -> Context:
        """The context of a position that reads this letter behind this past."""
        tokens, codes = past
        return (*tokens, letter + 1), codes

    def past(self, context: Context) -> Context:
        """What the position behind one of this context has for its own, but for its letter."""
        tokens, codes = context
        tokens = tokens[max(0, len(tokens) + 1 - self.tokens_kept):]
        return tokens, (*codes, self.follows[context][0])[-self.codes_kept:]

    def machine(self) -> Machine:
        """The minimal machine of the contexts, by the model's answers to them."""
        def moves(past):
            following = [self.context(past, b) for b in range(self.letters)]
            return [(self.past(context), self.follows[context][1]) for context in following]

        symbols = self.asked.symbols if self.asked else map(str, range(self.letters))
        return minimal(self.asked.name if self.asked else "read off", START, symbols, moves)

    def _evaluate(self, contexts):
        sizes = sorted(contexts, key=lambda context: (len(context[0]), len(context[1])))
        for _, same in groupby(sizes, key=lambda context: (len(context[0]), len(context[1]))):
            same = list(same)
            for part in (same[i:i + PART] for i in range(0, len(same), PART)):
                tokens = torch.tensor([context[0] for context in part])
                before = torch.tensor([context[1] for context in part], dtype=torch.int64)
                read = (tokens, before.view(len(part), -1), self.read)
                chosen, exact = _evaluate(self.judge, *read)
                _, own = _evaluate(self.model, *read, chosen)
                for name in self.margins:
                    apart = torch.where(own[name] == exact[name], 0.0,
                                        (own[name] - exact[name]).abs())
                    self.margins[name].append(exact[name].min().item())
                    self.errors[name].append(apart.max().item())
                self.follows |= dict(zip(part, zip(chosen["code"].tolist(),
                                                   chosen["answer"].tolist())))


def _evaluate(model, tokens: Int[Tensor, "n tokens"], before: Int[Tensor, "n positions"],
              read: int, chosen: dict[str, Tensor] | None = None
              ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the last position of each context chooses, its code, answer and experts, and the margin
    of each choice: how far the state is inside its code's cell, the answer's logit ahead of the
    next, and the experts' router logits ahead of the best one left out. Given what was `chosen`
    elsewhere, the margins are of that, and may be below 0. The model works on its device; what is
    given and returned is on the CPU.
    """
    device = model.embed.weight.device
    tokens, before = tokens.to(device), before.to(device)
    loop, window, k = model.recurrent, model.config.window, model.config.n_experts_per_tok
    past = loop.codes[before]                                    # (n, positions, dim)
    e = model.encode(tokens, _plain(model, tokens))[:, -window:]
    seen = torch.cat([loop.before_start(e), past], 1)[:, :past.shape[1] + 1]   # the last: s back
    z = loop.norm(seen[:, -e.shape[1]:] + e)
    routed = []
    hook = loop.block.ffn.router.register_forward_hook(
        lambda module, args, out: routed.append(out[:, -1]))
    h = loop.last(z, e[:, -1:])
    hook.remove()
    scores = {"code": loop.code_scores(h)[:, 0], "experts": routed[0] + loop.block.ffn.router_bias}
    if chosen is None:
        chosen = {"code": scores["code"].argmax(-1),
                  "experts": scores["experts"].topk(k, -1).indices}
    chosen = {name: choice.to(device) for name, choice in chosen.items()}
    own = loop.codes[chosen["code"]].unsqueeze(1)                # (n, 1, dim)
    states = torch.cat([past, own], 1)[:, -1 - read:]
    scores["answer"] = model.decode(states, _plain(model, states))[:, -1]
    chosen = {"answer": scores["answer"].argmax(-1), **chosen}
    used, row = chosen["code"].unique(return_inverse=True)       # few, of many contexts
    codes = loop.codes.to(torch.promote_types(h.dtype, torch.float32))  # bfloat16 has no cdist
    apart = torch.cdist(codes[used], codes,
                        compute_mode="donot_use_mm_for_euclid_dist")[row]   # (n, codes)
    lead = {name: _lead(scores[name], chosen[name]) for name in scores}
    # scores differ by the distance from the border times `apart`
    state = (lead["code"] / apart.where(apart > 0, 1)).amin(-1)
    margins = {"state": state, "logit": lead["answer"].amin(-1),
               "routing": lead["experts"].amin(-1)}
    return _on_cpu(chosen), _on_cpu(margins)


def _on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in found.items()}


def _plain(model, x: Tensor) -> attention.Context:
    """What the layers of a pass over all positions of x, ids or states, share."""
    return attention.Context.of(model.config, len(x), x.shape[1], None, like=model.embed.weight)


def _lead(scores: Float[Tensor, "n choices"], chosen: Tensor) -> Float[Tensor, "n choices"]:
    """By how much the lowest of the chosen scores, one or several in a row, is above each
    other; infinity at the chosen."""
    chosen = chosen.view(len(scores), -1)
    return (scores.gather(1, chosen).amin(1, keepdim=True) - scores).scatter(1, chosen, torch.inf)
