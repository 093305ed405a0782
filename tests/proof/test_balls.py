"""Balls hold what any arithmetic makes of their contents; slopes and bends bound derivatives."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import dilated_model, strict_model

from mythos_core import OpenMythos
from mythos_core.model.attention import Context
from mythos_core.model.layers import RMSNorm, SwiGLU
from mythos_core.proof.balls import FUNCTION, ROUNDOFF, Arithmetic, Ball, length, spectral
from mythos_core.proof.choices import advance, with_codes
from mythos_core.proof.enclosures import Enclosed, Enclosure, _possible

pytestmark = pytest.mark.usefixtures("without_shape_checks")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def within(ball: Ball, x: torch.Tensor) -> bool:
    return bool((length(x.double() - ball.x) <= ball.radius).all())


def around(b: Ball, generator) -> torch.Tensor:
    """A point on the ball's surface."""
    way = torch.randn(b.x.shape, generator=generator, dtype=b.x.dtype)
    return b.x + way / length(way) * b.radius


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10 ** 6), rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_spectral_is_above_the_largest_singular_value_and_near_it(seed, rows, columns):
    A = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    true = torch.linalg.matrix_norm(A, 2).unsqueeze(-1)
    assert (spectral(A) >= true).all() and (spectral(A) <= 1.21 * true + 1e-6).all()
    assert spectral(0 * A).max() < 1e-6


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10 ** 6), radius=st.sampled_from([0.0, 1e-6, 1e-2, 0.5]),
       name=st.sampled_from(sorted(DTYPES)))
def test_each_operation_holds_its_points_as_the_arithmetic_rounds_them(seed, radius, name):
    """A product, a norm, a gated unit and a sum, read at the ball's own surface in the model's
    dtype; sums forwards and backwards."""
    generator, dtype = torch.Generator().manual_seed(seed), DTYPES[name]
    maths, norm, unit = Enclosure(name), RMSNorm(16, 1e-6), SwiGLU(16, 24)
    with torch.no_grad():
        for parameter in (*norm.parameters(), *unit.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        # what a model of this dtype can hold
        norm, unit = norm.to(dtype).double(), unit.to(dtype).double()
        b = Ball(torch.randn(5, 16, generator=generator).to(dtype).double(),
                 torch.full((5, 1), radius).double())
        # the surface, or as near to it as the dtype has a number
        point = around(b, generator).to(dtype)
        b = replace(b, error=torch.maximum(b.error, length(point.double() - b.x)))
        W, bound = unit.gate_up.weight, maths.product(b.x, b.radius, unit.gate_up.weight)
        for order in (slice(None), list(range(15, -1, -1))):
            found = (point[:, order] @ W.to(dtype).T[order]).double() - point.double() @ W.T
            assert (found.abs() <= bound).all()
        assert within(maths.normed(b, norm), norm.to(dtype)(point))
        norm, unit = norm.double(), unit.double()
        assert within(maths.unit(b, unit.gate_up.weight, unit.down.weight).of(b),
                      unit.to(dtype)(point))
        assert within(maths.add(b, b), point + point)


def test_functions_are_as_exact_as_is_assumed():
    """Vendors say 1 to 2 ulps; a unit of roundoff is half of one. Batches of several shapes, as
    vector and scalar code differ."""
    u, x = ROUNDOFF["float32"][0], torch.linspace(-60, 60, 400_001)
    for f, at in ((torch.nn.functional.silu, x), (torch.exp, x), (torch.rsqrt, x.abs() + 1e-6),
                  (torch.cos, x[x.abs() < 1.5]), (torch.sigmoid, x)):
        for part in (at, at[::997], at[:3], at[5:6]):
            right = f(part.double())
            off = ((f(part).double() - right) / right).abs()[right.abs() > 1e-30]
            assert not len(off) or off.max() <= FUNCTION * u


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_what_may_overflow_is_unknown(name):
    maths, norm = Arithmetic(name), RMSNorm(4, 1e-6).double()
    huge, W = Ball.exact(torch.full((1, 4), 1e12).double()), torch.eye(4).double()
    with torch.no_grad():
        assert maths.product(huge.x, huge.radius, W).isinf().all()
        assert maths.normed(huge, norm).radius.isinf().all()
        assert not maths.leads(huge, W, W.new_zeros(4), torch.tensor([0])).item() > 0


def jacobian(f, x):
    """(n, out, dim) of a map of each row by itself."""
    return torch.autograd.functional.jacobian(lambda x: f(x).sum(0), x).movedim(1, 0)


@pytest.mark.parametrize("r", [2, 3])
def test_slopes_of_attention_over_slots_are_the_jacobian(r):
    block = dilated_model(0, torch.float64, dilation=r).recurrent.block
    xs = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)).double()
          for i in range(r)]

    def attend(*xs):
        h = torch.stack(xs[::-1], 1)                             # the last position's own is x_0
        ctx = Context(None, None, None, None)
        return block.attn(h, ctx, "loop", distance=1)[:, -1]

    with torch.no_grad():
        out = Enclosure("float32").slots([Ball.exact(x) for x in xs], block.attn)
        torch.testing.assert_close(out.x, attend(*xs))
    for j, slope in enumerate(out.J):
        found = jacobian(lambda x, j=j: attend(*xs[:j], x, *xs[j + 1:]), xs[j])
        torch.testing.assert_close(slope, found)


@pytest.mark.parametrize("experts", [(1, 1), (4, 1), (4, 2), (5, 3)])
def test_slopes_of_the_mixture_and_of_a_position_alone_are_the_jacobian(experts):
    n, k = experts
    model = strict_model(1, torch.float64, rope=False, max_seq_len=None, window=1, n_experts=n,
                         n_experts_per_tok=k)
    block, x = model.recurrent.block, torch.randn(6, 16).double()
    maths, b = Enclosure("float32"), Ball.exact(x)
    with torch.no_grad():
        chosen = torch.zeros(6, n, dtype=torch.bool).scatter(
            -1, block.ffn.router(x).topk(k, -1).indices, True)
        out, alone = maths.moe(b, block.ffn, chosen), maths.slots([b], block.attn)
    ctx = Context(None, None, None, None)
    for step, f in ((out, lambda x: block.ffn(x[:, None])[0][:, 0]),
                    (alone, lambda x: block.attn(x[:, None], ctx, "loop")[:, 0])):
        torch.testing.assert_close(step.x, f(x).detach())
        torch.testing.assert_close(step.J[0], jacobian(f, x))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10 ** 6), reach=st.sampled_from([1e-3, 0.03, 0.3]),
       dilated=st.booleans())
def test_a_block_of_a_ball_holds_the_blocks_of_its_points(seed, reach, dilated):
    """Of float64, where rounding is nothing: it is the slopes and bends that are looked at. The
    points are on the surface, in the steepest directions too."""
    make = dilated_model if dilated else strict_model
    model = make(seed % 50, torch.float64, rope=False, max_seq_len=None, window=1, n_experts=1,
                 n_experts_per_tok=1)
    block, maths = model.recurrent.block, Enclosure("float64")
    generator = torch.Generator().manual_seed(seed)
    balls = [Ball(torch.randn(3, 16, generator=generator).double(),
                  torch.full((3, 1), reach).double()) for _ in range(1 + dilated)]

    def run(xs):
        return block(torch.stack(xs[::-1], 1), Context(None, None, None, None), "loop",
                     **({"distance": 1} if dilated else {}))[0][:, -1]

    with torch.no_grad():
        x = maths.attend(balls[0], balls[1:], block)
        out = maths.feed(x, block, torch.ones(3, 1, dtype=torch.bool))
        assert within(out, run([b.x for b in balls]))
        for _ in range(20):
            assert within(out, run([around(b, generator) for b in balls]))
    xs = [b.x for b in balls]
    for at in range(len(balls)):
        J = jacobian(lambda x, at=at: run([*xs[:at], x, *xs[at + 1:]]), xs[at]).detach()
        way = torch.linalg.svd(J)[2][:, 0]                       # the steepest
        for sign in (-1, 1):
            points = [*xs[:at], xs[at] + sign * reach * way, *xs[at + 1:]]
            with torch.no_grad():
                assert within(out, run(points))


def test_sets_of_experts_that_may_be_the_best():
    score = torch.tensor([3.0, 2.0, 1.99, -5.0])
    beats = score[:, None] - score > 0.1
    assert {tuple(found.tolist()) for found in _possible(beats, 2)} == {
        (True, True, False, False), (True, False, True, False)}
    assert len(list(_possible(beats, 1))) == 1 and len(list(_possible(beats, 4))) == 1
    assert len(list(_possible(beats & False, 2))) == 6


def test_a_tie_between_experts_is_followed_both_ways():
    """Of parity's model the second and the third expert are level everywhere, and alike: the code
    is the same by either. Where the third is spoiled, it is not."""
    model = OpenMythos.from_pretrained("parity-extrapolating")
    ffn, part = model.recurrent.block.ffn, [(code, letter) for code in (None, 0, 1)
                                            for letter in (0, 1)]
    with torch.no_grad():
        ffn.router_bias.copy_(torch.tensor([9.0, 0.0, -1e-7, -9.0]))
        ffn.router.weight[2] = ffn.router.weight[1]
        ffn.gate_up[:, 2], ffn.down[2] = ffn.gate_up[:, 1], ffn.down[1]
        judge = with_codes(model, model.recurrent.codes).double()
        chosen = advance(judge, part)["code"].argmax(-1)
        for factor in (1, -100):
            judge.recurrent.block.ffn.down[2] *= factor
            enclosed = Enclosed(judge, "float32")
            assert (enclosed.advance(part, chosen).min() > 1) == (factor == 1)
            assert enclosed.branched == len(part)


@pytest.mark.parametrize("name", ["state-S3", "doubling-S3"])
def test_a_shipped_model_s_own_float32_lies_in_its_balls(name):
    """What its prelude makes of the letters, in batches of two shapes."""
    model = OpenMythos.from_pretrained(name)
    enclosed = Enclosed(with_codes(model, model.recurrent.codes).double(), "float32")
    ball, letters = enclosed.tokens[list(range(1, 7))], torch.arange(1, 7)[:, None]
    with torch.no_grad():
        for parts in (letters.split(6), letters.split(1)):
            e = torch.cat([model.encode(part, model.context(part)) for part in parts])[:, 0]
            assert within(ball, e) and (length(e.double() - ball.x) > 0).all()
