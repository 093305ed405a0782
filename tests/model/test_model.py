import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import several
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_core import KVCache, OpenMythos
from mythos_core.model.config import VARIANTS, parity_config, tutorial_config
from mythos_core.model.model import shipped
from mythos_core.model.sampling import sample

IDS = torch.randint(0, 17, (2, 10), generator=torch.Generator().manual_seed(3))


TRACED = pytest.mark.parametrize("attn, changes", [
    ("gqa", {}), ("mla", dict(halting="none")), ("gqa", dict(n_experts=64, window=4)),
    ("gqa", dict(strict=True, halting="settled", loop_embedding=False, lora_rank=0, window=2))])


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in OpenMythos(config).parameters())


def test_parameters_of_the_tutorial_models():
    assert ([parameters(tutorial_config("gqa")), parameters(tutorial_config("mla")),
             parameters(parity_config())] == [462_274, 419_554, 112_002])


def test_the_variants_are_those_of_the_reference(reference, monkeypatch):
    # a million positions of it
    monkeypatch.setattr(reference, "precompute_rope_freqs", lambda *args: torch.zeros(1))
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            theirs = reference.OpenMythos(reference.MythosConfig(**{k: getattr(config, k)
                for k in reference.MythosConfig.__dataclass_fields__}))
        assert parameters(config) == sum(p.numel() for p in theirs.parameters()), name


def test_head_and_embedding_are_one():
    model = OpenMythos(tiny())
    assert model.head.weight is model.embed.weight


def test_nothing_but_weights_and_the_bias_is_saved():
    names = (set(OpenMythos(tiny("mla")).state_dict()) - {name
                                                          for name, _ in OpenMythos(
                                                              tiny("mla")).named_parameters()})
    assert names == {"head.weight", "recurrent.block.ffn.router_bias"}


@pytest.mark.parametrize("attn", ["gqa", "mla"])
@pytest.mark.parametrize("changes",
                         [{}, dict(window=4, token_shift=True, halting="none", n_experts=16)])
def test_bfloat16_and_autocast_and_float64_agree(attn, changes):
    model = OpenMythos(tiny(attn, **changes)).eval()
    exact = model.double()(IDS, 3).float()
    single = model.float()(IDS, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(IDS, 3)
        mixed.float().sum().backward()
    half = model.to(torch.bfloat16)(IDS, 3)
    assert (single - exact).abs().max() < 1e-5
    assert (half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.25
            and (mixed - exact).abs().max() < 0.25)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.generate(IDS, 3, top_k=5).shape == (2, 13)


@pytest.mark.parametrize("attn", ["gqa", "mla"])
@pytest.mark.parametrize("changes", [{}, dict(window=4, token_shift=True, loop_noise=0.1)])
def test_every_tensor_is_made_on_the_device_of_the_weights(attn, changes):
    """On the meta device, where mixing with a CPU tensor is an error."""
    with torch.device("meta"):
        model = OpenMythos(tiny(attn, halting="none", balance_rate=0.1, **changes))
    ids = torch.zeros(2, 10, dtype=torch.int64, device="meta")
    ctx = model.context(ids)
    assert model.decode(model.recurrent(model.encode(ids, ctx), 3, ctx), ctx).device.type == "meta"


@pytest.mark.parametrize("ids, n_loops, named",
                         [(IDS, 0, "n_loops = 0"), (IDS, -1, "n_loops = -1"),
                          (IDS + 17, 1, "ids = tokens 18"), (IDS - 17, 1, "vocab_size - 1 = 16"),
                          (IDS[:, :0], 1, r"ids.shape = \(2, 0\)"), (IDS[0], 1, "ids.shape"),
                          (IDS.float(), 1, "ids.dtype"), (IDS.repeat(1, 7), 1, "max_seq_len = 64")])
def test_bad_input_is_refused_by_name(ids, n_loops, named):
    with pytest.raises(ValueError, match=named):
        OpenMythos(tiny())(ids, n_loops)


@pytest.mark.parametrize("changes, named", [(dict(temperature=-1.0), "temperature = -1.0"),
                                            (dict(top_k=-1), "top_k = -1"),
                                            (dict(max_new_tokens=0), "max_new_tokens = 0"),
                                            (dict(max_new_tokens=60), "max_seq_len = 64"),
                                            (dict(n_loops=0), "n_loops = 0"),
                                            (dict(use_cache=False, cache_loops=1),
                                             "cache_loops = 1"),
                                            (dict(cache_loops=9), "n_loops = 8")])
def test_generate_refuses_bad_arguments_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        OpenMythos(tiny()).generate(IDS, **{"max_new_tokens": 5, **changes})


@TRACED
def test_a_model_can_be_exported(attn, changes):
    model = OpenMythos(tiny(attn, **changes)).eval()
    exported = torch.export.export(model, (IDS, 3)).module()
    assert torch.allclose(exported(IDS, 3), model(IDS, 3), atol=1e-5)
    assert torch.allclose(exported(IDS.flip(1), 3), model(IDS.flip(1), 3), atol=1e-5)


def test_a_model_is_one_graph_to_the_compiler():
    subprocess.run([sys.executable, several.__file__], check=True)


@TRACED
def test_gradients_of_each_string_alone_by_vmap(attn, changes):
    model = OpenMythos(tiny(attn, **changes)).eval()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, ids):
        return torch.func.functional_call(model, weights, (ids[None], 3)).square().sum()
    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, IDS)
    for i, ids in enumerate(IDS):
        alone = torch.func.grad(loss)(weights, ids)
        assert all(torch.allclose(each[name][i], alone[name], rtol=1e-3, atol=1e-3)
                   for name in weights)


def test_on_the_meta_device_a_model_gives_shapes():
    with torch.device("meta"):
        model, ids = OpenMythos(tiny()).eval(), torch.zeros(2, 10, dtype=torch.int64)
    assert model(ids, 3).shape == (2, 10, 17)


@settings(deadline=None, max_examples=15)
@given(attn=st.sampled_from(["gqa", "mla"]), temperature=st.sampled_from([0.0, 0.7, 1.5]),
       top_k=st.sampled_from([0, 1, 5, 99]), seed=st.integers(0, 9))
def test_generation_with_and_without_a_cache_is_the_same(attn, temperature, top_k, seed):
    model = OpenMythos(tiny(attn)).eval()
    a, b = (model.generate(IDS, 12, 3, temperature, top_k, torch.Generator().manual_seed(seed),
                           use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(a, b) and torch.equal(a[:, :10], IDS) and a.shape == (2, 22)


def test_greedy_generation_takes_the_most_likely_token():
    model = OpenMythos(tiny()).eval()
    out = model.generate(IDS, 5, 2, temperature=0.0)
    assert torch.equal(out[:, 10:], model(out, 2).argmax(-1)[:, 9:-1])


def test_an_observer_sees_every_pass_and_shared_entries_are_those_of_the_cache():
    model, passes = OpenMythos(tiny(halting="none", token_shift=True, window=4)).eval(), []
    out = model.generate(IDS, 4, 3, temperature=0.0, cache_loops=2,
                         observer=lambda record: passes.append((record.loop, record.h.shape[1])))
    assert passes == [(t, seq) for seq in (10, 1, 1, 1) for t in range(3)]
    cache = KVCache(loops=2)
    logits = torch.cat([model(part, 3, cache) for part in out[:, :13].split([10, 1, 1, 1], 1)], 1)
    assert torch.equal(out[:, 10:], logits[:, 9:].argmax(-1)) and len(cache) == 4


def test_sampling_follows_the_distribution_among_the_top_k():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(20_000, 4)
    share = (sample(logits, 0.5, 2,
                     torch.Generator().manual_seed(0)).flatten().bincount(minlength=4) / 20_000)
    assert (share[:2].sum() == 0 and share[3].item()
            == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02))


def test_a_copy_without_halting_runs_every_loop():
    model = OpenMythos(tiny()).double()
    free, loops = model.without_halting(), []
    logits = free(IDS, 7, observer=lambda record: loops.append(record.output))
    assert len(loops) == 7 and free.config.halting == "none" and logits.dtype == torch.float64
    ctx = model.context(IDS)
    e = h = model.encode(IDS, ctx)
    for t in range(7):
        h, _ = model.recurrent.step(h, e, t, ctx)
    assert torch.equal(h, loops[-1])


def test_a_config_is_fixed_when_the_model_is_made(tmp_path):
    """So the one that is saved is the one that the model computes by."""
    model = OpenMythos(tiny(halting="none"))
    before = model.config
    with pytest.raises(AttributeError, match="config: is fixed when the model is made; must be"):
        model.config = replace(before, halting="act")
    model.save_pretrained(tmp_path)
    assert OpenMythos.from_pretrained(tmp_path).config == model.config == before
    again = copy.deepcopy(model)
    assert again.config == before and OpenMythos(again.config).config is again.config


def test_weights_come_back_as_saved(tmp_path):
    model = OpenMythos(tiny("mla", window=5)).eval()
    model.recurrent.block.ffn.router_bias.uniform_()
    model.save_pretrained(tmp_path)
    again = OpenMythos.from_pretrained(tmp_path)
    assert (again.config == model.config and torch.equal(again(IDS, 2), model(IDS, 2))
            and not again.training)
    assert again.head.weight is again.embed.weight
    assert not [file for file in tmp_path.iterdir() if file.suffix
                in (".bin", ".pt", ".pkl", ".pth")]


def test_an_unknown_name_lists_what_ships():
    with pytest.raises(ValueError,
                       match="'parity-carrying', 'parity-extrapolating', 'parity-seed'"):
        OpenMythos.from_pretrained("parity-extrapolatin")


def test_shipped_models_say_where_they_come_from(tmp_path):
    from mythos_core.model.model import PRETRAINED
    assert {"parity-extrapolating", "parity-seed"} <= set(shipped())
    for name in shipped():
        config = (PRETRAINED / name / "config.json").read_text(encoding="utf-8")
        provenance = json.loads(config)["provenance"]
        assert {"command", "commit", "seed", "metrics", "recipe"} <= set(provenance)
        assert name.removeprefix("text-") in provenance["command"]
        assert sum(file.stat().st_size for file in (PRETRAINED / name).iterdir()) < 1.5e6
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*")) < 14e6
    shutil.copytree(PRETRAINED / "parity-seed", tmp_path / "copy")
    assert OpenMythos.from_pretrained(tmp_path / "copy").config == parity_config()
