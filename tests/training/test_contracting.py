"""Losses of a loop that is to contract, and its training to a proof of the weights as trained."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mythos_core import OpenMythos, machine, train
from mythos_core.model.config import parity_config
from mythos_core.proof.choices import plain_context
from mythos_core.training import train_together
from mythos_core.training.losses import apart, steepness, ties
from mythos_core.training.recipes import contracting_recipe, doubling_recipe
from mythos_core.training.run import Run
from mythos_core.training.step import STEEP, _drawn

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def test_steepness_of_a_linear_map_is_about_its_largest_singular_value_squared():
    A = torch.diag(torch.tensor([3.0, 1.0, 0.1]))
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    found = steepness(lambda x: x @ A, x)
    # one power iteration weighs directions by their square: near 9, never above
    assert 8.0 < found <= 9.0001
    assert steepness(lambda x: 0 * x, x) == 0


def test_steepness_has_a_gradient_for_the_map_alone():
    A, x = torch.nn.Parameter(torch.eye(3)), torch.randn(5, 3, requires_grad=True)
    steepness(lambda x: x @ A, x).backward()
    assert A.grad.abs().sum() > 0 and x.grad is None


def test_apart_is_what_is_missing_to_the_least_distance():
    h = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
    label = torch.tensor([0, 0, 1, 2])                           # means (1, 0), (0, 1), (9, 0)
    near = 2 ** 0.5
    assert apart(h, label, 3, 4.0).item() == pytest.approx(2 * (4 - near) / 3)
    assert apart(10 * h, label, 3, 4.0) == 0


def test_ties_are_measured_as_distances_of_what_the_router_reads():
    torch.manual_seed(0)
    config = parity_config(n_experts=3, n_experts_per_tok=2)
    W, x, first = torch.randn(3, 64), torch.randn(5, 64), torch.tensor([1e3, 0, 0])
    normal = F.normalize(W[1] - W[2], dim=-1)
    tied = x - (x @ normal).unsqueeze(-1) * normal                   # expert 0 leads; 1 and 2 tie
    for far in (0.0, 0.1, -0.1, 0.3, 0.5):
        found = ties((tied + far * normal) @ W.T + first, W, config).item()
        assert found == pytest.approx(max(0.3 - abs(far), 0), abs=1e-4)
    assert ties(x @ W.T, W, replace(config, n_experts_per_tok=3)) == 0


def test_strings_that_are_drawn_have_the_products_of_their_beginnings():
    """Read off a model that rounds: its codes are the elements, in an order of their own."""
    model, asked = OpenMythos.from_pretrained("doubling-S3"), machine("S3")
    run = Run(doubling_recipe(asked), 0, model)
    ids, _ = asked.make_batch(32, 8, torch.Generator().manual_seed(0))
    products = list(asked.monoid().windows(ids, 3))
    with torch.no_grad():
        states = [model.encode(ids, model.context(ids))]
        for t in range(3):
            states.append(model.recurrent.step(states[-1], states[0], t, model.context(ids))[0])
        drawn, elements = _drawn(run, ids, states, products)
        found, _ = model.recurrent.step(drawn, None, 0, plain_context(model, drawn))

    def codes(h):
        return torch.cdist(h.flatten(0, 1), model.recurrent.codes).argmin(-1)
    element = torch.full((6,), -1).scatter(0, codes(states[3]), products[2].flatten())
    assert sorted(element.tolist()) == list(range(6))
    assert drawn.shape == (STEEP, 2, model.config.dim)
    assert torch.equal(element[codes(found)], elements.flatten())


@pytest.mark.parametrize("recipe", ["contracting-parity", "contracting-doubling-parity"])
def test_a_training_ends_with_the_proof_of_its_weights_and_nothing_rounded(recipe):
    run = train(recipe, seed=0, progress=False)
    assert run.certificate.proved and run.model.config.codes == 0
    assert run.certificate.machine == machine("parity").minimal()
    if run.model.config.dilation > 1:                            # states keep one size
        assert (run.model.recurrent.loop_norm.weight == 1).all()
    ids, answers = machine("parity").make_batch(4, 500, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(run.model(ids).argmax(-1), answers)


def test_several_seeds_are_not_trained_together():
    with pytest.raises(ValueError, match=r"contraction = 0.3: must be 0 where several seeds"):
        train_together(contracting_recipe(machine("parity")), [0, 1], progress=False)
