"""The contexts that strings lead a strict model to, walked until no new one turns up, and what it
chooses in each: the set that the theorem of `proof.certificate` asks for."""
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mythos_core.model.model import OpenMythos
from mythos_core.proof.margins import Judged, decode, plain_context, routed
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.tasks.machines import Machine, minimal
from mythos_core.tasks.unbounded import Task

MOST_CONTEXTS = 200_000
PART = 4096             # contexts of one pass

Context = tuple[tuple[int, ...], tuple[int, ...]]  # tokens, codes of the positions before
START: Context = ((), ())                          # what the first position has behind it: nothing


def with_codes(model: OpenMythos, codes: Tensor | None) -> OpenMythos:
    """A copy of the model that rounds its states to these codes."""
    with torch.random.fork_rng(devices=[]):          # weights are drawn, only to be replaced
        copy = OpenMythos(replace(model.config, codes=0 if codes is None else len(codes)))
    copy = copy.to(model.embed.weight)
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
        self.judged = Judged(with_codes(model, model.recurrent.codes).cpu().double(), model)
        self.length, self.wrong, self.closed = 0, 0, False
        self.left_out = isinstance(asked, Machine) and bool((asked.answer == NOT_ASKED).any())
        c = model.config
        self.tokens_kept = (c.window - 1) * (c.prelude_layers + 1) + 1
        self.codes_kept = max(c.window + c.stride - 1, (c.window - 1) * c.coda_layers)
        # positions before its own that an answer reads
        self.read = (c.window - 1) * c.coda_layers
        self.follows: dict[Context, tuple[int, int]] = {}        # context -> code, answer
        # context, state of the machine behind it, and the answer due: one context and state may be
        # come to by moves with different answers
        self.seen: set[tuple[Context, Any, int]] = set()

    @property
    def fault(self) -> str:
        """What is wrong, if something is."""
        return f"a string of length {self.length} is answered wrong"

    @property
    def contexts(self) -> int:
        """Triples that were met."""
        return len(self.seen)

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
            self.judged.measure()
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
                codes = self.judged.choose(_advance, part)["code"].tolist()
                states = [[*before, code][-1 - self.read:]
                          for (_, before), code in zip(part, codes)]
                answers = self.judged.choose(decode, states)["answer"].tolist()
                self.follows |= dict(zip(part, zip(codes, answers)))


def _advance(model: OpenMythos, part: list[Context]) -> dict[str, Tensor]:
    """Scores of codes and experts of the last position of each context."""
    device, loop, window = model.embed.weight.device, model.recurrent, model.config.window
    tokens = torch.tensor([tokens for tokens, _ in part], device=device)
    before = torch.tensor([codes for _, codes in part], dtype=torch.int64, device=device)
    past = loop.codes[before.view(len(part), -1)]                # (n, positions, dim)
    e = model.encode(tokens, plain_context(model, tokens))[:, -window:]
    seen = torch.cat([loop.before_start(e), past], 1)[:, :past.shape[1] + 1]   # the last: s back
    z = loop.norm(seen[:, -e.shape[1]:] + e)
    h, experts = routed(model, lambda: loop.last(z, e[:, -1:]))
    return {"code": loop.code_scores(h)[:, 0], "experts": experts}
