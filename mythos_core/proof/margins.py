"""What a model chooses, how clearly, and how far its own arithmetic is from the exact choice."""
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mythos_core.model.attention import Context
from mythos_core.model.model import OpenMythos

#: The choices that are made, and the names of their margins.
MARGINS = {"code": "state", "answer": "logit", "experts": "routing"}
Evaluate = Callable[..., dict[str, Tensor]]     # (model, *read) -> scores (n, choices) by choice


class Judged:
    """The choices that a `judge`, the model in float64, made; and once they are measured the least
    margin of each kind, and the model's largest error in it.

    A margin is how far a choice is from being another one: of a state its distance from the border
    of its code's cell, of an answer its logit's lead, of the experts the lead of their router
    logits over the best one left out.
    """

    def __init__(self, judge: OpenMythos, model: OpenMythos):
        self.judge, self.model = judge, model
        self.margins = dict.fromkeys(MARGINS.values(), 0.0)
        self.errors = dict.fromkeys(MARGINS.values(), 0.0)
        self._made: list[tuple] = []

    def choose(self, evaluate: Evaluate, *read) -> dict[str, Tensor]:
        """What the judge chooses by the scores of evaluate(judge, *read), on the CPU."""
        scores = evaluate(self.judge, *read)
        k = self.judge.config.n_experts_per_tok
        chosen = {name: score.topk(k, -1).indices if name == "experts" else score.argmax(-1)
                  for name, score in scores.items()}
        self._made.append((evaluate, read, chosen, margins(self.judge, scores, chosen)))
        return chosen

    def measure(self):
        """The margins, and how far they are from those that the model finds for the same choices:
        only of a closed set, since a training tries many proofs that are not to be had."""
        exact, own = ({name: [] for name in self.margins} for _ in range(2))
        for evaluate, read, chosen, found in self._made:
            again = margins(self.model, evaluate(self.model, *read), chosen)
            for name in found:
                exact[name].append(found[name])
                own[name].append(again[name])
        for name in exact:
            a, b = torch.cat(exact[name]), torch.cat(own[name])
            apart = torch.where(a == b, 0.0, (a - b).abs())
            # torch's, in which what is not a number wins
            self.margins[name], self.errors[name] = a.min().item(), apart.max().item()


def margins(model: OpenMythos, scores: dict[str, Tensor], chosen: dict[str, Tensor]
            ) -> dict[str, Float[Tensor, "n"]]:
    """The margin of each choice, on the CPU; of what was `chosen` elsewhere it may be below 0."""
    chosen = {name: choice.to(model.embed.weight.device) for name, choice in chosen.items()}
    lead = {name: _lead(scores[name], chosen[name]) for name in scores}
    if "code" in lead:
        used, row = chosen["code"].unique(return_inverse=True)   # few, of many contexts
        codes = model.recurrent.codes
        codes = codes.to(torch.promote_types(codes.dtype, torch.float32))  # bfloat16 has no cdist
        apart = torch.cdist(codes[used], codes,
                            compute_mode="donot_use_mm_for_euclid_dist")[row]   # (n, codes)
        # scores differ by the distance from the border times `apart`
        lead["code"] = lead["code"] / apart.where(apart > 0, 1)
    return {MARGINS[name]: values.amin(-1).cpu() for name, values in lead.items()}


def _lead(scores: Float[Tensor, "n choices"], chosen: Tensor) -> Float[Tensor, "n choices"]:
    """By how much the lowest of the chosen scores, one or several in a row, is above each
    other; infinity at the chosen."""
    chosen = chosen.view(len(scores), -1)
    return (scores.gather(1, chosen).amin(1, keepdim=True) - scores).scatter(1, chosen, torch.inf)


def routed(model: OpenMythos, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
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


def decode(model: OpenMythos, codes: list[list[int]]) -> dict[str, Tensor]:
    """The logits of the last of each row of codes."""
    states = model.recurrent.codes[torch.tensor(codes, device=model.embed.weight.device)]
    return {"answer": model.decode(states, plain_context(model, states))[:, -1]}
