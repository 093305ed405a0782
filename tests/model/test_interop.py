"""Converted weights of open-mythos 0.5.0, against that package, in one process."""
from dataclasses import replace

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_core import KVCache, from_open_mythos

configs = st.builds(tiny, st.sampled_from(["gqa", "mla"]), n_experts=st.sampled_from([2, 4, 7, 20]),
                    n_experts_per_tok=st.sampled_from([1, 2]), n_shared_experts=st.integers(0, 2),
                    n_kv_heads=st.sampled_from([1, 2, 4]), prelude_layers=st.integers(0, 2),
                    coda_layers=st.integers(0, 2), max_loop_iters=st.integers(1, 5),
                    dim=st.sampled_from([32, 40, 64]), lora_rank=st.integers(1, 3),
                    act_threshold=st.sampled_from([0.5, 0.99, 1.0]))


def difference(a, b):
    return (a - b).abs().max()


@settings(deadline=None, max_examples=60)
@given(config=configs, n_loops=st.integers(1, 9), seed=st.integers(0, 99))
def test_logits_are_those_of_the_reference(reference_model, config, n_loops, seed):
    torch.manual_seed(seed)
    theirs = reference_model(config, std=0.05).eval()
    ours = from_open_mythos(theirs.state_dict(), theirs.cfg).eval()
    ids = torch.randint(0, 17, (2, 19))
    with torch.no_grad():
        assert difference(ours(ids, n_loops), theirs(ids, n_loops)) <= 1e-5
        cache, their_cache = KVCache(), {}
        # the reference decodes one token at a time
        for start, end in ((0, 16), (16, 17), (17, 18), (18, 19)):
            part, expected = (ours(ids[:, start:end], n_loops, cache),
                              theirs(ids[:, start:end], n_loops, their_cache, start))
            assert difference(part, expected) <= 1e-5


def test_default_loops_are_the_same(reference_model):
    theirs = reference_model(tiny(max_loop_iters=3)).eval()
    ids = torch.randint(0, 17, (2, 5))
    assert (difference(from_open_mythos(theirs.state_dict(), tiny(max_loop_iters=3)).eval()(ids),
                       theirs(ids)) <= 1e-5)


@pytest.mark.parametrize("attn", ["gqa", "mla"])
@pytest.mark.parametrize("n_experts", [4, 16])
def test_gradients_of_a_training_step_are_those_of_the_reference(reference_model, attn, n_experts):
    config = tiny(attn, n_experts=n_experts)
    theirs = reference_model(config, std=0.1)
    ours = from_open_mythos(theirs.state_dict(), config)
    ids, targets = torch.randint(0, 17, (2, 4, 12))
    for model in (theirs.train(), ours.train()):
        torch.nn.functional.cross_entropy(model(ids, 3).flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p)
                 for name, p in theirs.named_parameters()}
    buffers = {name: torch.zeros_like(b) for name, b in theirs.named_buffers()
               if not b.is_complex()}
    expected = dict(from_open_mythos({**gradients, **buffers,
                                      "head.weight": gradients["embed.weight"]},
                                     config).named_parameters())
    for name, parameter in ours.named_parameters():
        assert difference(parameter.grad, expected[name].data) <= 1e-4, name


def test_weights_that_do_not_fit_are_refused(reference_model):
    state = reference_model(tiny()).state_dict()
    with pytest.raises(ValueError, match="attn_type = 'mla'"):
        from_open_mythos(state, tiny("mla"))
    with pytest.raises(ValueError, match=r"embed\.weight"):
        from_open_mythos(state, tiny(vocab_size=5))
    with pytest.raises(ValueError, match="lora"):
        from_open_mythos(state, replace(tiny(), lora_rank=0))
    with pytest.raises(ValueError, match=r"routed_experts\.4"):
        from_open_mythos(state, tiny(n_experts=5))
    # the caller's dictionary is not changed
    assert set(state) == set(reference_model(tiny()).state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_saved_from_a_wrapped_model_are_read_as_those_of_the_model(reference_model, prefix):
    state, ids = reference_model(tiny()).state_dict(), torch.randint(0, 17, (2, 5))
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    assert torch.equal(from_open_mythos(wrapped, tiny())(ids), from_open_mythos(state, tiny())(ids))
