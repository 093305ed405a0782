import copy
import pickle
import subprocess
import sys

import pytest
import several
import torch
import torch.nn.functional as F
from conftest import tiny

from mythos_core import OpenMythos
from mythos_core.model.moe import MoE


def make(**changes):
    moe = MoE(tiny(**changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def loop_over_experts(moe, x):
    """The definition, a token and an expert at a time."""
    tokens, out = x.flatten(0, 1), []
    for token in tokens:
        z = moe.router(token)
        chosen = (z + moe.router_bias).topk(moe.config.n_experts_per_tok).indices
        gates = z.softmax(-1)[chosen]
        y = sum(shared(token) for shared in moe.shared)
        for gate, i in zip(gates / gates.sum(), chosen):
            a, b = moe.gate_up[:, i] @ token
            y = y + gate * ((F.silu(a) * b) @ moe.down[i])
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("n_experts, k, n_shared",
                         [(4, 2, 1), (9, 1, 2), (16, 2, 1), (20, 4, 2), (3, 3, 1)])
def test_both_ways_of_computing_equal_a_plain_loop(n_experts, k, n_shared):
    moe = make(n_experts=n_experts, n_experts_per_tok=k, n_shared_experts=n_shared)
    moe.router_bias.uniform_(-1, 1)
    x = torch.randn(2, 7, 32)
    out, ids = moe(x)
    assert ids.shape == (2, 7, k)
    assert torch.allclose(out, loop_over_experts(moe, x), atol=1e-5)
    assert torch.allclose(moe.double()(x.double())[0].float(), out, atol=1e-5)
    moe.float()
    tokens, ids = x.flatten(0, 1), ids.flatten(0, 1)
    gates = moe.router(tokens).softmax(-1) * F.one_hot(ids, n_experts).sum(1)
    gates = gates / gates.sum(-1, keepdim=True)
    assert torch.allclose(moe._dense(tokens, gates), moe._grouped(tokens, ids, gates), atol=1e-5)


def test_grouped_experts_have_the_gradients_of_dense_ones():
    moe = make(n_experts=8, n_experts_per_tok=2)
    x = torch.randn(10, 32, requires_grad=True)
    gates = moe.router(x).softmax(-1)
    ids = gates.topk(2).indices
    gates = gates * F.one_hot(ids, 8).sum(1)
    wanted = [torch.autograd.grad(out.square().sum(),
                                  [x, moe.gate_up, moe.down, moe.router.weight], retain_graph=True)
              for out in (moe._dense(x, gates), moe._grouped(x, ids, gates))]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*wanted))


@pytest.mark.parametrize("n_experts, tokens, way",
                         [(16, 400, "_grouped"), (16, 4, "_dense"), (4, 4000, "_dense")])
def test_tokens_are_sorted_where_many_experts_would_be_computed_for_nothing(
        monkeypatch, n_experts, tokens, way):
    monkeypatch.setattr("mythos_core.model.moe.SORTING", 100_000)
    moe, taken = make(n_experts=n_experts, n_experts_per_tok=2), []
    for name in ("_dense", "_grouped"):
        monkeypatch.setattr(moe, name, lambda x, *_, name=name: taken.append(name) or x)
    moe(torch.randn(1, tokens, 32))
    assert taken == [way]


def test_an_idle_expert_is_fine():
    moe = make(n_experts=16, n_experts_per_tok=2, n_shared_experts=0)
    moe.router_bias[3] = -1e9
    out, ids = moe(torch.randn(1, 5, 32))
    assert 3 not in ids and out.isfinite().all()


def test_the_bias_shifts_the_choice_but_neither_gates_nor_gradient():
    moe, x = make(), torch.randn(2, 30, 32)
    out, ids = moe(x)
    moe.router_bias += 5.0                                   # the same for all: the same choice
    assert torch.allclose(moe(x)[0], out, atol=1e-6)
    moe.router_bias[:2] += 100.0                             # choice forced to experts 0 and 1 ...
    out, ids = moe(x)
    assert set(ids.unique().tolist()) == {0, 1}
    gates = moe.router(x).softmax(-1)[..., :2]
    gates = gates / gates.sum(-1, keepdim=True)              # ... whose gates know nothing of it
    token = x[0, 0]
    expected = sum(shared(token) for shared in moe.shared)
    for i in range(2):
        a, b = moe.gate_up[:, i] @ token
        expected = expected + gates[0, 0, i] * ((F.silu(a) * b) @ moe.down[i])
    assert torch.allclose(out[0, 0], expected, atol=1e-5)
    assert not moe.router_bias.requires_grad


def test_balance_moves_the_bias_against_the_load_and_evens_it():
    moe = make(balance_rate=0.05)
    moe.router.weight.data[0] += 0.5  # expert 0 would get more than its share on positive tokens
    x = torch.rand(4, 64, 32)
    share = lambda: F.one_hot(moe(x)[1], 4).double().mean((0, 1, 2))  # noqa: E731
    uneven = share()
    moe.train()
    moe(x)
    load = moe.load.clone()
    moe.balance()
    assert torch.equal(moe.router_bias.sign(),
                       (load.mean() - load).sign().to(moe.router_bias.dtype))
    assert moe.load.sum() == 0
    for _ in range(300):
        moe(x)
        moe.balance()
    assert uneven.max() > 0.4 and share().max() < 0.3


def test_without_a_rate_nothing_is_counted():
    moe = make()
    moe.train()(torch.randn(1, 5, 32))
    moe.balance()
    assert not moe.router_bias.any() and not moe.load.any()


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half().cpu(),
                                  lambda m: m.double()])
def test_load_and_bias_are_counted_in_float32_whatever_the_models_dtype(cast):
    moe = make(balance_rate=1e-3)
    moe.router_bias.fill_(1 + 1e-6)                          # which bfloat16 does not have
    moe = cast(moe)
    dtype = moe.router.weight.dtype
    assert moe.router_bias.dtype == moe.load.dtype == torch.float32
    assert (moe.router_bias == 1 + torch.tensor(1e-6)).all()
    for _ in range(400):
        assert moe(torch.ones(1, 5, 32, dtype=dtype))[0].dtype == dtype
    assert moe.load.sum() == 400 * 5 * 2
    before = moe.router_bias.clone()
    moe.balance()
    assert ((moe.router_bias - before).abs() > 0.9e-3).all()


def test_counts_are_float32_where_another_dtype_is_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        moe = MoE(tiny())
    finally:
        torch.set_default_dtype(torch.float32)
    assert moe.router_bias.dtype == moe.load.dtype == torch.float32


def test_graphs_of_the_auxiliary_loss_neither_pile_up_nor_stop_a_copy():
    model, ids = OpenMythos(tiny(balance_loss=0.01)), torch.randint(17, (2, 6))
    for _ in range(3):                                       # without a call of balance
        logits = model(ids, 2)
        (logits.logsumexp(-1).mean() + 0.01 * model.recurrent.block.ffn.imbalance).backward()
    assert len(model.recurrent.block.ffn._imbalances) == 2
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(ids, 2), model.eval()(ids, 2))
    assert twin.recurrent.block.ffn.imbalance == 0.0
    assert pickle.loads(pickle.dumps(model)).config == model.config


def test_two_processes_run_the_same_loops_and_move_the_same_bias(tmp_path):
    subprocess.run([sys.executable, several.__file__, tmp_path], check=True)
    (loops, load, bias), (loops_1, load_1, bias_1) = (torch.load(tmp_path / f"{rank}.pt")
                                                      for rank in (0, 1))
    both = load + load_1
    assert loops == loops_1 == [0, 1, 2, 3]
    assert not torch.equal(load, load_1) and load.sum() == load_1.sum() == 2 * 6 * 2 * 4
    assert torch.equal(bias, bias_1) and torch.equal(bias, 0.01 * (both.mean() - both).sign())


def test_the_auxiliary_loss_is_its_definition():
    moe, passes = (make(n_experts=5, n_experts_per_tok=2, balance_loss=0.01),
                   [torch.randn(2, 7, 32), torch.randn(1, 3, 32)])
    assert moe.imbalance == 0.0
    expected = 0.0
    for x in passes:
        _, ids = moe(x)
        probability = moe.router(x.flatten(0, 1)).softmax(-1).mean(0)
        expected += sum((ids == i).sum() / ids.numel() * probability[i] for i in range(5)) * 5 / 2
    assert moe.imbalance.item() == pytest.approx(expected.item()) and moe.imbalance.requires_grad
    moe.balance()
    assert moe.imbalance == 0.0
    assert moe.eval()(passes[0]) and moe.imbalance == 0.0          # counted in training only
