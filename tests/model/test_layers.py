import pytest
import torch

from mythos_core.model.layers import RMSNorm


def made(dtype=torch.float64):
    """The norm in training, torch's with the same weight, an input and a gradient. 2^-10 is the
    same in every dtype."""
    ours, torchs = RMSNorm(12, 2 ** -10).to(dtype), torch.nn.RMSNorm(12, 2 ** -10).to(dtype)
    ours.weight.data = torchs.weight.data = torch.randn(12, dtype=dtype)
    return ours, torchs, *torch.randn(2, 3, 5, 12, dtype=dtype)


def test_the_norm_is_its_formula_and_its_gradient_that_of_the_formula():
    norm, _, x, _ = made()
    assert torch.allclose(norm(x), norm.weight * x
                          / (x.pow(2).mean(-1, keepdim=True) + 2 ** -10).sqrt())
    for shape in ((3, 5, 12), (7, 12)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert (torch.autograd.gradcheck(norm, x)
                and torch.autograd.gradcheck(lambda w,
                                             x=x: torch.func.functional_call(norm, {"weight": w},
                                                 x), norm.weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_training_and_evaluation_give_the_same_bits(dtype, tolerance):
    ours, torchs, x, gradient = made(dtype)
    assert torch.equal(ours.train()(x), ours.eval()(x)) and ours(x).dtype == dtype
    assert torch.allclose(ours(x), torchs(x), atol=tolerance, rtol=tolerance)
    found = []
    for norm in (ours.train(), torchs):
        leaf = x.clone().requires_grad_()
        norm(leaf).backward(gradient)
        found.append((leaf.grad, norm.weight.grad))
    for one, other in zip(*found):
        assert one.dtype == dtype and torch.allclose(one, other, atol=tolerance, rtol=tolerance)


def test_a_row_s_bits_do_not_depend_on_the_other_rows():
    norm, x = RMSNorm(12, 1e-6).eval(), torch.randn(7, 5, 12)
    for part in (x[3:4], x[:, 2:3], x[1:6]):
        at = (x.unsqueeze(0) == part[0, 0]).all(-1).nonzero()[0, 1:]
        assert torch.equal(norm(part)[0, 0], norm(x)[tuple(at)])


def test_zeros_and_their_gradient_are_finite():
    norm = RMSNorm(12, 1e-6)
    for training in (True, False):
        zeros = torch.zeros(3, 12, requires_grad=True)
        out = norm.train(training)(zeros)
        out.sum().backward()
        assert (out == 0).all() and torch.allclose(zeros.grad, torch.tensor(1e3))


def test_training_keeps_the_input_once():
    norm, _, x, _ = made()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor,
                                                  lambda tensor: tensor):
        norm(x.requires_grad_())
    assert (sum(tensor.numel() for tensor in {tensor.data_ptr(): tensor
                                              for tensor in kept}.values()) == 12 + 3 * 5
            * (12 + 1))


def test_a_second_derivative_in_training_is_refused():
    norm, _, x, _ = made()
    (first,) = torch.autograd.grad(norm(x.requires_grad_()).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)
