"""A GRU on balls: points and roundings lie within, the Jacobian is its own, and a planted fault is
seen."""
import pytest
import torch

from mythos_core import machine, study
from mythos_core.proof.balls import Ball, length
from mythos_core.proof.closure import Closure
from mythos_core.proof.invariant import Balls
from mythos_core.study.gru import GRUCell
from mythos_core.study.peers import GRU, budgeted
from mythos_core.training.recipes import contracting_recipe

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def gru(seed, scale=1.0):
    torch.manual_seed(seed)
    model = GRU(budgeted(contracting_recipe(machine("parity")))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.05])
def test_points_of_a_ball_are_mapped_into_its_image(scale, radius):
    model, generator = gru(0, scale), torch.Generator().manual_seed(1)
    h = 2 * torch.rand(6, model.width, generator=generator) - 1
    letters = torch.tensor([0, 1] * 3)
    own = []
    for i in range(10):
        way = torch.randn(h.shape, generator=generator)
        point = h + (0.99 * radius * way / length(way) if i else 0)
        with torch.no_grad():                                    # as float32 rounds, in two shapes
            own += [(point, model.step(point, letters + 1)),
                    (point, torch.cat([model.step(point[j:j + 1], letters[j:j + 1] + 1)
                                       for j in range(6)]))]
    cell = GRUCell(model)
    along = (radius * torch.eye(model.width).double().expand(6, -1, -1),)
    with torch.no_grad():
        image = cell.step(Ball(h.double(), torch.zeros(6, 1).double(), along), letters)
        for _, found in own:
            assert (length(found.double() - image.x) <= image.radius).all()
    assert radius or image.radius.max() < 1e-2 * max(1, scale ** 3)


def test_its_slope_is_the_jacobian():
    model = gru(2)
    cell, h = GRUCell(model), (2 * torch.rand(3, model.width) - 1).double()
    letters, unit = torch.tensor([0, 1, 0]), torch.eye(model.width).double().expand(3, -1, -1)
    with torch.no_grad():
        image = cell.step(Ball(h, torch.zeros(3, 1).double(), (1e-9 * unit,)), letters)
    found = torch.autograd.functional.jacobian(
        lambda h: model.step(h, letters + 1).sum(0), h).movedim(1, 0)
    torch.testing.assert_close(image.along[0] / 1e-9, found, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(image.x, model.step(h, letters + 1).detach())


def test_an_untrained_gru_is_refused():
    found = Closure(Balls(GRUCell(gru(3)), 1e-3), 2, machine("parity")).run()
    assert not found.closed and found.fault


def test_kept_rows_of_grus():
    """Every training that was run is kept, with what its proof says."""
    rows = study.load(study.RESULTS / "gru_balls.json")
    assert ([(row["variant"], row["seed"]) for row in rows]
            == [(variant, seed) for variant in study.MEASURED["gru_balls"] for seed in range(5)])
    assert all(row["same_machine"] and not row["reason"] for row in rows if row["proved"])
    assert any(row["proved"] for row in rows)
