"""The states of a proof: codes, and which of them a model chooses in a context, by float64 and with
certainty. `proof.invariant` has balls in their place."""
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mythos_core.model.attention import Context
from mythos_core.model.model import OpenMythos
from mythos_core.proof.enclosures import Enclosed

#: The choices that are made, and the names of their margins.
MARGINS = {"code": "state", "answer": "logit", "experts": "routing"}
Scores = dict[str, Float[Tensor, "n choices"]]


def with_codes(model: OpenMythos, codes: Tensor | None) -> OpenMythos:
    """A copy of the model, in eval mode, that rounds its states to these codes."""
    with torch.random.fork_rng(devices=[]):          # weights are drawn, only to be replaced
        copy = OpenMythos(replace(model.config, codes=0 if codes is None else len(codes)))
    copy = copy.to(model.embed.weight)
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if name != "recurrent.codes"}
    copy.load_state_dict(weights if codes is None else {**weights, "recurrent.codes": codes})
    return copy.eval()


class Codes:
    """The codes of a model, which of them it chooses, by its weights in float64; and, once that is
    measured, how clear the choices are.

    Attributes:
        codes: (n, dim).
        margins: by kind, the least by which a choice is clear, in float64: of a state its distance
            from the border of its code's cell, of an answer its logit's lead, of the experts the
            lead of their scores over the best one left out.
        safety: for a state and an answer the least number of times that the choice's lead exceeds
            the bound of what arithmetic may do to it; above 1 no arithmetic of the kind can choose
            otherwise. Two sets of experts that are within their bound are both followed.
        branched: how often that was so.
    """

    exact = True                # a code that stays is the same bits
    most_products = 2_000_000
    fault = ""

    def __init__(self, model: OpenMythos, arithmetic: str):
        self.model, self.codes = model, model.recurrent.codes
        # on the CPU: not every device has float64
        self.judge = with_codes(model, model.recurrent.codes).cpu().double()
        self.arithmetic = arithmetic
        self.margins = dict.fromkeys(MARGINS.values(), 0.0)
        self.safety, self.branched = {"state": 0.0, "logit": 0.0}, 0
        self._made: list[tuple[Callable, list, Tensor]] = []

    @property
    def places(self) -> dict:
        """What a table says of where the states are: the codes are among the weights."""
        return {}

    def choose(self, evaluate: Callable[[OpenMythos, list], Scores], part: list) -> list[int]:
        """What the judge chooses by `evaluate`, one of the functions below, in each context of the
        part."""
        scores = evaluate(self.judge, part)
        chosen = scores["answer" if evaluate is decode else "code"].argmax(-1)
        self._made.append((evaluate, part, chosen))
        return chosen.tolist()

    @torch.no_grad()
    def measure(self) -> None:
        """How clear the choices are: only of a closed set, since a training tries many proofs that
        are not to be had."""
        enclosed = Enclosed(self.judge, self.arithmetic)
        least: dict[str, list[float]] = {name: [math.inf] for name in self.margins}
        safety: dict[str, list[float]] = {name: [math.inf] for name in self.safety}
        for evaluate, part, chosen in self._made:
            for name, found in margins(self.judge, evaluate(self.judge, part)).items():
                least[name].append(found.min().item())
            times = getattr(enclosed, evaluate.__name__)(part, chosen)
            safety["logit" if evaluate is decode else "state"].append(times.min().item())
        # what is not a number is the least
        self.margins = {name: torch.tensor(found).min().item() for name, found in least.items()}
        self.safety = {name: torch.tensor(found).min().item() for name, found in safety.items()}
        self.branched = enclosed.branched


def margins(judge: OpenMythos, scores: Scores) -> dict[str, Float[Tensor, "n"]]:
    """The margin of each choice, in float64."""
    found = {}
    for name, score in scores.items():
        k = judge.config.n_experts_per_tok if name == "experts" else 1
        best = F.pad(score, (0, 1), value=-math.inf).topk(k + 1, -1).values
        found[MARGINS[name]] = best[:, -2] - best[:, -1]
    if "code" in scores:                 # scores differ by the distance from the border times apart
        codes, score = judge.recurrent.codes, scores["code"]
        chosen = score.argmax(-1, keepdim=True)
        apart = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
        apart = apart[chosen.squeeze(-1)]
        lead = (score.gather(-1, chosen) - score) / apart.where(apart > 0, 1)
        found["state"] = lead.scatter(-1, chosen, torch.inf).amin(-1)
    return found


def advance(model: OpenMythos, part: list[tuple[int | None, int]]) -> Scores:
    """Of a strict model's positions behind (the code before or None, letter)."""
    device, loop = model.embed.weight.device, model.recurrent
    tokens = torch.tensor([[letter + 1] for _, letter in part], device=device)
    e = model.encode(tokens, plain_context(model, tokens))
    before = loop.before_start(e).clone()
    behind = [row for row, (code, _) in enumerate(part) if code is not None]
    before[behind, 0] = loop.codes[[part[row][0] for row in behind]]
    h, experts = _routed(model, lambda: loop.last(loop.norm(before + e), e))
    return {"code": loop.code_scores(h)[:, 0], "experts": experts}


def combine(model: OpenMythos, part: list[tuple[tuple[str, int], ...]]) -> Scores:
    """Of a dilated model's last operand of each row, with the others, all letters or all codes,
    before it: one loop over strings as long as the row, at distance 1."""
    numbers = torch.tensor([[number for _, number in row] for row in part],
                           device=model.embed.weight.device)
    loop = model.recurrent
    h = (model.encode(numbers + 1, plain_context(model, numbers))
         if part[0][0][0] == "letter" else loop.codes[numbers])
    out, experts = _routed(model, lambda: loop.combine(h, 0, plain_context(model, numbers))[0])
    return {"code": loop.code_scores(out[:, -1:])[:, 0], "experts": experts}


def decode(model: OpenMythos, part: list[int]) -> Scores:
    """The logits behind codes."""
    states = model.recurrent.codes[part].unsqueeze(1)
    return {"answer": model.decode(states, plain_context(model, states))[:, 0]}


def _routed(model: OpenMythos, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `run` gives, and the looped block's scores of the experts for the last position of each
    string, (n, experts)."""
    ffn, seen = model.recurrent.block.ffn, []
    hook = ffn.router.register_forward_hook(lambda module, args, out: seen.append(out))
    out = run()
    hook.remove()
    return out, seen[0].view(len(out), -1, seen[0].shape[-1])[:, -1] + ffn.router_bias


def plain_context(model: OpenMythos, x: Tensor) -> Context:
    """What the layers of a pass over all positions of x, ids or states, share."""
    return Context.of(model.config, len(x), x.shape[1], None, like=model.embed.weight)
