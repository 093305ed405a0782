"""Losses of a loop that is to contract, and its training to a proof of the weights as trained."""
import pytest
import torch

from mythos_core import machine, train
from mythos_core.training import train_together
from mythos_core.training.losses import apart, steepness
from mythos_core.training.recipes import contracting_recipe

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
    assert apart(h, label, 3).item() == pytest.approx(2 * (4 - near) / 3)
    assert apart(10 * h, label, 3) == 0


@pytest.mark.parametrize("recipe", ["contracting-parity", "contracting-doubling-parity"])
def test_a_training_ends_with_the_proof_of_its_weights_and_nothing_rounded(recipe):
    run = train(recipe, seed=0, progress=False)
    assert run.certificate.proved and run.model.config.codes == 0
    assert run.certificate.machine == machine("parity").minimal()
    ids, answers = machine("parity").make_batch(4, 500, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(run.model(ids).argmax(-1), answers)


def test_several_seeds_are_not_trained_together():
    with pytest.raises(ValueError, match=r"contraction = 0.3: must be 0 where several seeds"):
        train_together(contracting_recipe(machine("parity")), [0, 1], progress=False)
