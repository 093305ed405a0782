"""What a training is made of as it goes: its recipe, seed, model, and a row for each step."""
from dataclasses import dataclass, field

from mythos_core.model.model import OpenMythos
from mythos_core.proof.certificate import Certificate
from mythos_core.training.recipes import Recipe
from mythos_core.training.schedule import fall


class NotProved(RuntimeError):
    """A recipe's steps are over, and the model is not proved; says what stands against it. `run` is
    the training: its model as it was left, and the certificate that does not hold."""

    def __init__(self, words: str, run: "Run | None" = None):
        super().__init__(words)
        self.run = run

    def __reduce__(self):                # to another process the words alone: it may be a large run
        return NotProved, self.args


@dataclass
class Run:
    """A training run: the model, and one row a step: step, loss, accuracy (token, on scored
    positions of the batch), seconds since the start, and at every 50th step and the last
    `router_bias` and `held_out`: whole-string accuracy on 256 fresh uniform strings of the longest
    length at the most loops, or of a recipe with a corpus bits per byte on 64 of its validation
    windows; at attempts at a proof `proved`; where a resumed run was given more steps, in the last
    row before, `recipe_steps`: as many as there were to be until then.

    Of a recipe with a machine, `certificate` is the proof, and `model` the one that it is about,
    its states rounded to codes.
    """

    recipe: Recipe
    seed: int
    model: OpenMythos
    history: list[dict] = field(default_factory=list)
    certificate: Certificate | None = None


def finished(run: Run) -> bool:
    """Whether the run's steps are over, or its proof holds at the end of a fall."""
    if len(run.history) >= run.recipe.steps:
        return True
    span = fall(run.history)
    return span is not None and len(run.history) == span[1] and run.history[-1].get("proved", False)


def falling(run: Run) -> bool:
    """Whether the next step is one of a fall of the learning rate."""
    span = fall(run.history)
    return span is not None and span[0] <= len(run.history) < span[1]
