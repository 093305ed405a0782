"""One optimiser step, and a look at held-out strings."""
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mythos_core.model.layers import evaluated, evaluating
from mythos_core.model.model import OpenMythos
from mythos_core.proof.choices import plain_context
from mythos_core.tasks.automaton import NOT_ASKED
from mythos_core.training.losses import (
    apart,
    bits,
    center_loss,
    handing_on,
    mean_loss,
    means_by,
    move_weights,
    numbered,
    ponder,
    spread_ratio,
    state_loss,
    steepness,
    ties,
)
from mythos_core.training.recipes import Recipe
from mythos_core.training.run import Run, falling
from mythos_core.training.schedule import draw, fall, learning_rate

STEEP = 256         # states, or strings of them, at which a step's steepness is looked at


def take_step(run: Run, optimizer, step) -> dict:
    """One optimiser step; its loss and token accuracy."""
    model, recipe = run.model.train(), run.recipe
    begin_step(run, optimizer, step)
    length, n_loops = draw(recipe, step)
    # of a scan as many letters at each length
    batch = recipe.batch * recipe.lengths[1] // length if recipe.scans else recipe.batch
    ids, targets = recipe.make_batch(batch, length, strings=recipe.strings,
                                     device=model.embed.weight.device)
    if recipe.scans:
        return _learn(run, optimizer, step, *_scanned(run, ids, n_loops))
    scored = length
    if recipe.reach:
        scored = min(length, int(recipe.reach * n_loops))
    logits, also = _settled(run, ids) if n_loops is None else _looped(run, ids, n_loops)
    logits, targets = logits[:, :scored].flatten(0, 1), targets[:, :scored].flatten()
    weight = move_weights(recipe.machine, ids)[:, :scored].flatten() if recipe.balanced else None
    return _learn(run, optimizer, step, logits, targets, also, weight)


def _learn(run: Run, optimizer, step, logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"],
           also: Tensor | float, weight: Float[Tensor, "n"] | None = None) -> dict:
    """Minimise the loss of these answers and what is added to it."""
    loss = (mean_loss(logits, targets, weight) + also + run.recipe.config.balance_loss
            * run.model.recurrent.block.ffn.imbalance)
    optimizer.zero_grad()
    loss.backward()
    return end_step(run, optimizer, step, loss, logits.argmax(-1) == targets)


def begin_step(run: Run, optimizer, step: int):
    """Seed what a step draws, and set its learning rate."""
    torch.manual_seed((run.seed * 1_000_003 + step + 1) % 2 ** 32)
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(run.recipe, step, fall(run.history))


def end_step(run: Run, optimizer, step: int, loss: Float[Tensor, ""],
             right: Bool[Tensor, "*scored"]) -> dict:
    """Move the parameters by their gradients; the step's loss and token accuracy."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss = {loss.item()} at step {step} of recipe "
                                 f"{run.recipe.name}, seed {run.seed}")
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    optimizer.step()
    run.model.recurrent.block.ffn.balance()
    return {"loss": loss.item(), "accuracy": right.float().mean().item()}


def _looped(run: Run, ids, n_loops):
    """Logits after so many loops, and what is added to their loss."""
    records = []
    logits = run.model(ids, n_loops, observer=records.append)
    if not run.recipe.ponder_cost:
        return logits, 0.0
    return logits, run.recipe.ponder_cost * ponder(
        torch.stack([record.halt_weight for record in records]))


def _scanned(run: Run, ids, n_loops):
    """Of a dilated model the logits after each loop, what a string of the letters that a position
    has read by then is to be answered, and what is added to the loss."""
    model, recipe, ctx = run.model, run.recipe, run.model.context(ids)
    monoid, states, also = recipe.machine.monoid(), [], 0.0
    products = monoid.windows(ids, n_loops, recipe.config.dilation)
    if recipe.contraction and falling(run):
        return _products_contracted(run, ids, products)
    e = h = model.encode(ids, ctx)
    for t, product in enumerate(products):
        h, _ = model.recurrent.step(h, e, t, ctx)
        states.append(h)
        label, labels = numbered(product)
        flat = h.flatten(0, 1), label.flatten(), labels
        if falling(run):
            also = also + recipe.center_loss * spread_ratio(*flat) / n_loops
        means = means_by(*flat).view_as(h)
        common = torch.rand(*ids.shape, 1, device=ids.device) < recipe.handed_on
        h = torch.where(common, means, h)
    logits = model.decode(torch.cat(states, 1), model.context(ids.repeat(1, n_loops)))
    asked = monoid.answer.to(ids.device)[torch.cat(products, 1)]
    return logits.flatten(0, 1), asked.flatten(), also


def _products_contracted(run: Run, ids, products: list[Tensor]):
    """`_scanned` of states that are as they are, with nothing handed on and no noise, and of what
    one more loop makes of them; how steep that loop is, how near its router comes to a tie, how far
    states spread that mean the same, and how near others come."""
    model, recipe, ctx = run.model, run.recipe, run.model.context(ids)
    r, ffn, scores = recipe.config.dilation, model.recurrent.block.ffn, []
    with evaluating(model.modules()):
        states = [model.encode(ids, ctx)]
        for t in range(len(products)):
            states.append(model.recurrent.combine(states[-1], t, ctx)[0])
        drawn, elements = _drawn(run, ids, states, products)
        x = drawn.flatten(1)

        def step(x):                                 # a string of r states: the product of each
            string = x.unflatten(-1, (r, -1))        # beginning of it
            return model.recurrent.combine(string, 0, plain_context(model, string))[0].flatten(1)

        far = 0.02 * torch.linalg.vector_norm(x, dim=-1, keepdim=True).detach()
        also = recipe.contraction * _rising(run) * steepness(step, x, far)
        with ffn.router.register_forward_hook(lambda router, read, found: scores.append(found)):
            more = step(x).view_as(drawn)
    also = also + 5 * ties(scores[0] + ffn.router_bias, ffn.router.weight, ffn.config)
    flat = torch.cat([h.flatten(0, 1) for h in (*states[1:], more)])
    label = torch.cat([each.flatten() for each in (*products, elements)])
    if recipe.center_loss:
        # A logarithm pulls as much however small the spread is, down to a thousandth of the
        # distance: of n balls n^2 products have to be looked at.
        known = flat, *numbered(label)
        ratio = spread_ratio(*known)
        also = also + recipe.center_loss * (
            ratio + 0.1 * torch.log(ratio + 1e-7) + 2 * apart(*known, least=7.0))
    logits = model.decode(flat.unsqueeze(1), plain_context(model, flat.unsqueeze(1)))
    return logits[:, 0], recipe.machine.monoid().answer.to(ids.device)[label], also


def _drawn(run: Run, ids, states: list[Tensor], products: list[Tensor]):
    """`STEEP` strings of r letters, or of r states after the same loop, (STEEP, r, dim), and the
    product of each beginning of them. The proof asks for all of these; a string has few."""
    monoid, r = run.recipe.machine.monoid(), run.recipe.config.dilation
    table, letters = monoid.table.to(ids.device), monoid.letters.to(ids.device)[ids - 1]
    loop = torch.arange(STEEP, device=ids.device).unsqueeze(1) % len(states)
    some = torch.randint(ids.numel(), (STEEP, r), device=ids.device)
    parts = torch.stack([letters, *products]).flatten(1)[loop, some]
    elements = [parts[:, 0]]
    for part in parts[:, 1:].unbind(1):
        elements.append(table[elements[-1], part])
    return torch.stack(states).flatten(1, 2)[loop, some], torch.stack(elements, 1)


def _rising(run: Run) -> float:
    """From 0 to 1 over the first third of a fall."""
    begin, end = fall(run.history)
    return min(1.0, 3 * (len(run.history) - begin) / (end - begin))


def _settled(run: Run, ids):
    """Logits of the settled states, and what is added to their loss."""
    recipe, (label, labels) = run.recipe, numbered(run.recipe.machine.outcomes(ids))
    if recipe.contraction and falling(run):
        return _contracted(run, ids, label, labels)
    h, logits = settled(run.model, ids, label, labels, *disturbance(recipe, ids))
    also = recipe.center_loss * center_loss(h, label, labels) if falling(run) else 0.0
    if recipe.state_loss:
        also = also + recipe.state_loss * state_loss(h, label, labels)
    return logits, also


def _contracted(run: Run, ids, label, labels):
    """The same of states that are as they are, with nothing handed on and no noise: how far they
    spread, how near different ones come, and how steep the loop is at some of them."""
    model, recipe, ctx = run.model, run.recipe, run.model.context(ids)
    loop, e = model.recurrent, model.encode(ids, ctx)
    h = loop.settle(e, noise=torch.zeros_like(e))
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1).flatten(0, 1)
    some = torch.randint(len(before), (STEEP,), device=before.device)
    letters = e.flatten(0, 1)[some].unsqueeze(1)

    def step(x):
        return loop.last(loop.norm(x.unsqueeze(1) + letters), letters)[:, 0]

    flat, rising = (h.flatten(0, 1), label.flatten(), labels), _rising(run)
    also = recipe.contraction * rising * steepness(step, before[some])
    if recipe.center_loss:                       # both by labels
        also = also + recipe.center_loss * (
            rising * spread_ratio(*flat) + 0.1 * apart(*flat, least=4.0))
    return model.decode(h, ctx), also


def disturbance(recipe: Recipe, ids: Int[Tensor, "batch seq"]
                ) -> tuple[Float[Tensor, "batch seq dim"] | None, Bool[Tensor, "batch seq"]]:
    """What is drawn of a pass over a machine's strings: noise on the block's inputs, and where the
    mean of a state is handed on in its place."""
    config, noise, common = recipe.config, [], []
    for some in ids.split(config.stride, 1):
        if config.loop_noise:
            noise.append(torch.randn(*some.shape, config.dim, device=ids.device))
        drawn = torch.rand(len(ids), 1, device=ids.device) < recipe.handed_on
        common.append(drawn.expand_as(some))
    return config.loop_noise * torch.cat(noise, 1) if noise else None, torch.cat(common, 1)


def settled(model: OpenMythos, ids: Int[Tensor, "batch seq"], label: Int[Tensor, "batch seq"],
            labels: int, noise: Float[Tensor, "batch seq dim"] | None,
            common: Bool[Tensor, "batch seq"]
            ) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "batch seq vocab"]]:
    """The settled states under a `disturbance`, and their logits."""
    ctx = model.context(ids)
    h = model.recurrent.settle(model.encode(ids, ctx), handing_on(common, label, labels), noise)
    return h, model.decode(h, ctx)


@evaluated
@torch.no_grad()
def held_out(model: OpenMythos, recipe: Recipe, batch: int = 256) -> float:
    """Whole-string accuracy on fresh uniform strings of the longest trained length,
    at the most trained loops, where nothing is asked nothing being wrong; of a corpus bits per byte
    on validation windows, a quarter as many."""
    device, n_loops = model.embed.weight.device, recipe.loops and recipe.loops[1]
    if recipe.corpus is not None:
        ids, targets = recipe.corpus.windows("validation", recipe.lengths[1], batch // 4, device)
        return bits(model(ids, n_loops), targets).mean().item()
    generator = torch.Generator().manual_seed(2 ** 32 - 1)   # no training step has this seed
    ids, targets = recipe.make_batch(batch, recipe.lengths[1], generator, device)
    right = (model(ids, n_loops).argmax(-1) == targets) | (targets == NOT_ASKED)
    return right.all(1).cpu().float().mean().item()  # on a GPU a mean of ones may be below 1
