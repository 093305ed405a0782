"""The contexts that strings lead a strict model to, walked until no new one turns up, and what it
chooses in each: the set that the theorem of `proof.certificate` asks for."""
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model import attention
from mythos_core.model.model import OpenMythos
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.tasks.machines import Machine, minimal
from mythos_core.tasks.unbounded import Task

MOST_CONTEXTS = 200_000
PART = 4096             # contexts of one pass

Context = tuple[tuple[int, ...], tuple[int, ...]]  # tokens, codes of the positions before
START: Context = ((), ())                          # what the first position has behind it: nothing


def with_codes(model: OpenMythos, codes: Tensor | None) -> OpenMythos:
    """A copy of the model that rounds its states to these codes."""
    copy = OpenMythos(replace(model.config, codes=0 if codes is None else len(codes))).to(
        model.embed.weight)
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if name != "recurrent.codes"}
    copy.load_state_dict(weights if codes is None else {**weights, "recurrent.codes": codes})
    return copy.eval()


class Closure:
    """The contexts that strings lead to, met letter by letter, each with the state of the
    machine that is `asked` for, or of the task that no machine does."""

    def __init__(self, model: OpenMythos, letters: int, asked: Machine | Task | None = None):
        self.model, self.letters, self.asked = model, letters, asked
        # on the CPU: not every device has float64
        self.judge = with_codes(model, model.recurrent.codes).cpu().double()
        self.length, self.wrong, self.closed = 0, 0, False
        self.left_out = isinstance(asked, Machine) and bool((asked.answer == NOT_ASKED).any())
        c = model.config
        self.tokens_kept = (c.window - 1) * (c.prelude_layers + 1) + 1
        self.codes_kept = max(c.window + c.stride - 1, (c.window - 1) * c.coda_layers)
        # positions before its own that an answer reads
        self.read = (c.window - 1) * c.coda_layers
        # of a closed set: the least margin of each choice, and the model's largest error in it
        self.margins = {"state": 0.0, "logit": 0.0, "routing": 0.0}
        self.errors = {"state": 0.0, "logit": 0.0, "routing": 0.0}
        self.judged: list[tuple] = []     # what the judge read, chose, and the margins it found
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
        if self.closed:
            self._measure()
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
                self.judged.append((read, chosen, exact))
                self.follows |= dict(zip(part, zip(chosen["code"].tolist(),
                                                   chosen["answer"].tolist())))

    def _measure(self):
        """The margins, and how far they are from those that the model finds for the same choices:
        only now, since a training tries many proofs that are not to be had."""
        owns = [_evaluate(self.model, *read, chosen)[1] for read, chosen, _ in self.judged]
        for name in self.margins:
            exact = torch.cat([found[name] for *_, found in self.judged])
            own = torch.cat([found[name] for found in owns])
            apart = torch.where(own == exact, 0.0, (own - exact).abs())
            # torch's, in which what is not a number wins
            self.margins[name], self.errors[name] = exact.min().item(), apart.max().item()


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
