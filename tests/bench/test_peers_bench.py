"""Beside other looped transformers that a user might build, of the same width, heads, blocks run
and number of parameters, but with dense feed-forward layers: torch's own encoder layer, looped, and
x-transformers' decoder, whose middle block is executed again and again. Without bars: where are we
slower? By `make bench`, into figures/bench_peers.json, which docs/bench.md quotes."""
from collections.abc import Callable
from functools import partial

import machine
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from table import Row, write
from test_model_bench import compare
from workloads import Pair, filled, our_token, stepper

from mythos_core import OpenMythos
from mythos_core.model.config import MythosConfig, parity_config, tutorial_config
from mythos_core.tasks.parity import make_batch

x_transformers = pytest.importorskip("x_transformers")
CONTEXT = 512


class TorchLooped(nn.Module):
    """Prelude, looped block and coda of torch.nn.TransformerEncoderLayer, which has no cache."""

    def __init__(self, config: MythosConfig, width: int):
        super().__init__()
        make = partial(nn.TransformerEncoderLayer, config.dim, config.n_heads, width, 0.0,
                       F.silu, batch_first=True, norm_first=True, bias=False)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.prelude, self.block, self.coda = make(), make(), make()
        self.norm = nn.RMSNorm(config.dim)

    def forward(self, ids, n_loops):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], ids.device)
        e = h = self.prelude(self.embed(ids), mask, is_causal=True)
        for _ in range(n_loops):
            h = self.block(h + e, mask, is_causal=True)
        return self.norm(self.coda(h, mask, is_causal=True)) @ self.embed.weight.T


class XLooped(nn.Module):
    """x-transformers' decoder of three blocks, the middle one executed `n_loops` times."""

    def __init__(self, config: MythosConfig, width: int, n_loops: int):
        super().__init__()
        order = (0, 1, *(2, 3) * n_loops, 4, 5)                  # attention and feed-forward each
        layers = x_transformers.Decoder(
            dim=config.dim, depth=3, heads=config.n_heads,
            attn_dim_head=config.dim // config.n_heads, attn_kv_heads=config.n_kv_heads,
            ff_mult=width / config.dim, ff_glu=True, ff_swish=True, ff_no_bias=True,
            use_rmsnorm=True, rotary_pos_emb=True, layers_execute_order=order)
        self.wrapped = x_transformers.TransformerWrapper(
            num_tokens=config.vocab_size, max_seq_len=4096, use_abs_pos_emb=False,
            tie_embedding=True, attn_layers=layers)

    def forward(self, ids, n_loops):
        return self.wrapped(ids)

    def token(self, ids) -> Callable:
        """The last token after the others, from their cache, which stays as it is."""
        with torch.no_grad():
            _, before = self.wrapped(ids[:, :-1], return_intermediates=True)
        return torch.no_grad()(lambda: self.wrapped(ids, cache=before)[:, -1:])


def alike(make: Callable, config: MythosConfig) -> nn.Module:
    """The peer with the feed-forward width, in steps of 8, at which it is as large as ours."""
    def size(model):
        return sum(parameter.numel() for parameter in model.parameters())
    torch.manual_seed(0)
    asked, width = size(OpenMythos(config)), 8
    while size(make(config, width + 8)) <= asked:
        width += 8
    model = make(config, width)
    assert 0.95 * asked < size(model) <= asked
    return model


def training(make: Callable) -> Pair:
    """A step of 64 strings of 24 bits, AdamW, three loops, which all run in both."""
    config = parity_config(halting="none")
    theirs, ours = alike(make, config), OpenMythos(config)
    batch = make_batch(64, 24)
    return Pair(stepper(theirs, *batch, 3, fused=True), stepper(ours, *batch, 3, fused=True), 0,
                alike=False)


def decoding(make: Callable, cached: bool) -> Pair:
    """One token after `CONTEXT` others, batch 8, 8 loops; without a cache, all of them anew."""
    config = tutorial_config("gqa", max_seq_len=4096, halting="none")
    theirs, ours = alike(make, config).eval(), OpenMythos(config).eval()
    ids, cache = filled(ours, CONTEXT, "cpu")
    anew = torch.no_grad()(lambda: theirs(ids, 8)[:, -1:])
    return Pair(theirs.token(ids) if cached else anew, our_token(ours, ids, 8, cache), 0,
                alike=False)


WORK = {"training step, torch's encoder layer, looped": (partial(training, TorchLooped), None),
        "training step, x-transformers, looped": (
            partial(training, partial(XLooped, n_loops=3)), None),
        f"a token after {CONTEXT} others, torch's encoder layer, which has no cache": (
            partial(decoding, TorchLooped, False), 1),
        f"a token after {CONTEXT} others, x-transformers, cached": (
            partial(decoding, partial(XLooped, n_loops=8), True), 1)}


@pytest.fixture(scope="module")
def rows():
    made = []
    yield made
    if len(made) == len(WORK):
        write(made, "cpu", "bench_peers")


@pytest.mark.parametrize("work", WORK)
def test_time_beside_other_looped_transformers(benchmark, rows, work):
    make, number = WORK[work]
    with machine.threads(number) as threads:
        pair = make()
        assert pair.ours().shape == pair.theirs().shape
        rows.append(Row.of(work, "cpu", threads, "ms", *compare(benchmark, pair), None))


def test_the_cached_token_of_the_peer_is_its_uncached_one():
    model = alike(partial(XLooped, n_loops=8), tutorial_config("gqa", halting="none")).eval()
    ids = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model.token(ids)(), model(ids, 8)[:, -1:], atol=1e-4, rtol=1e-4)
