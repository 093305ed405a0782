import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mythos_core.tasks.parity import answers, continuation, make_batch, structured


@given(seed=st.integers(0, 999), seq_len=st.integers(1, 40),
       strings=st.sampled_from(["uniform", "mixed"]))
def test_targets_are_prefix_parities(seed, seq_len, strings):
    ids, targets = make_batch(5, seq_len, torch.Generator().manual_seed(seed), strings=strings)
    assert ids.shape == targets.shape == (5, seq_len) and ids.dtype == targets.dtype == torch.int64
    for row, right in zip(ids.tolist(), targets.tolist()):
        parity = 0
        for token, target in zip(row, right):
            assert token in (1, 2)
            parity ^= token - 1
            assert target == parity + 1
    again, _ = make_batch(5, seq_len, torch.Generator().manual_seed(seed), strings=strings)
    assert torch.equal(ids, again)


def test_uniform_bits_are_fair_and_mixed_ones_range():
    uniform, _ = make_batch(2000, 50, torch.Generator().manual_seed(0))
    mixed, _ = make_batch(2000, 50, torch.Generator().manual_seed(0), strings="mixed")
    assert (uniform - 1).float().mean().item() == pytest.approx(0.5, abs=0.01)
    density, runs = (mixed - 1).float().mean(1), (mixed[:, 1:] != mixed[:, :-1]).float().mean(1)
    # of uniform strings, less than 1e-8
    assert ((density < 0.1).float().mean() > 0.03) and ((density > 0.9).float().mean() > 0.03)
    assert (runs > 0.9).float().mean() > 0.03                # nearly alternating strings
    assert ((uniform - 1).float().mean(1) < 0.1).sum() == 0


@given(seed=st.integers(0, 99), n=st.integers(1, 12))
def test_the_continuation_is_the_models_own_parity_fed_back(seed, n):
    ids, _ = make_batch(3, 9, torch.Generator().manual_seed(seed))
    prompt = ids
    for _ in range(n):
        ids = torch.cat([ids, answers(ids)[:, -1:]], 1)
    assert torch.equal(ids[:, 9:], continuation(prompt, n))


def test_structured_strings():
    strings = structured(6)
    assert ({name: "".join(str(t - 1) for t in ids[0].tolist()) for name, ids in strings.items()}
            == {"all zeros": "000000", "all ones": "111111", "alternating": "101010",
                "one at the start": "100000", "one at the end": "000001", "half and half": "000111",
                "every third": "100100"})


@pytest.mark.parametrize("arguments, named", [((0, 5), "batch = 0"), ((5, 0), "seq_len = 0")])
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        make_batch(*arguments)
    with pytest.raises(ValueError, match="strings = 'odd'"):
        make_batch(1, 1, strings="odd")
