"""How long a step's strings are and how often it loops, and at what rate it learns."""
import torch

from mythos_core.training.recipes import Recipe

CERTIFY_EVERY = 10  # steps between attempts at a proof, once the batches are answered right
LEAST_FALL = 50     # steps over which the learning rate falls behind a proof, at least
PATIENCE = 20       # attempts refused behind which it falls without one


def draw(recipe: Recipe, step: int) -> tuple[int, int | None]:
    """String length and loops of a step; loops None: until settled.

    A recipe with a machine takes its lengths in turn, shortest first, so that at any step all seeds
    have strings of one length: several can be trained in one graph, without padding. That of a
    dilated model takes its loops in turn, with strings as long as they read. Other lengths, and
    loops, are drawn from torch's default generator.
    """
    shortest, longest = recipe.lengths
    if recipe.curriculum:
        longest = max(3, min(longest, int(3 + step / recipe.steps / recipe.curriculum * longest)))
    shortest = min(shortest, longest)
    length = (shortest + step % (longest + 1 - shortest) if recipe.machine is not None
              else int(torch.randint(shortest, longest + 1, ())))
    if recipe.loops is None:
        return length, None
    fewest, most = recipe.loops
    if recipe.scans:
        n_loops = fewest + step % (most + 1 - fewest)
        return recipe.config.dilation ** n_loops, n_loops
    most = most if recipe.spare_loops is None else max(
        fewest, min(most, length + recipe.spare_loops))
    return length, int(torch.randint(fewest, most + 1, ()))


def learning_rate(recipe: Recipe, step: int, span: tuple[int, int] | None = None) -> float:
    """Linear warm-up, constant, linear decay: over the last part of the recipe's steps, or of a
    recipe with a machine over the `span` of a `fall`."""
    rise = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    decline = min(1.0, (1 - step / recipe.steps) / recipe.decay + 0.01) if recipe.decay else 1.0
    if span and span[0] <= step < span[1]:
        decline = 1.0 - 0.95 * (step - span[0]) / (span[1] - span[0])
    return recipe.lr * rise * decline


def fall(history: list[dict]) -> tuple[int, int] | None:
    """The first step of the latest fall of the learning rate, and the one after its last;
    None before the first.

    A fall begins at a proof, and takes as many steps again as led there. Where the proof does not
    hold at its end, the rate is what it was, and the next proof begins another. It begins without a
    proof too, at the last of `PATIENCE` attempts that were refused: where many moves lead to one
    state, what they leave may lie too far apart to be rounded to one code, and it is the center
    loss of a fall that brings it together.
    """
    span, refused = None, 0
    for row in history:
        done = row["step"] + 1
        if "proved" in row and (span is None or done > span[1]):
            refused += 1
            if row["proved"] or refused == PATIENCE:
                span, refused = (done, done + max(LEAST_FALL, done)), 0
    return span
