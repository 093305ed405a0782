import re
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mythos_core.tasks import parity
from mythos_core.tasks.groups import group

ORDERS = {"Z2": 2, "Z5": 5, "D3": 6, "D4": 8, "S2": 2, "S3": 6, "S4": 24, "S5": 120, "A3": 3,
          "A4": 12, "A5": 60}
ABELIAN = {"Z2", "Z5", "S2", "A3"}


@pytest.mark.parametrize("name", ORDERS)
def test_it_is_the_group_of_that_name(name):
    g = group(name)
    table, elements = g.table, torch.arange(len(g))
    assert (len(g) == len(set(g.elements)) == ORDERS[name] and g.elements[0]
            == tuple(range(len(g.elements[0]))))
    assert torch.equal(table[0], elements) and torch.equal(table[:, 0], elements)  # identity
    # closed, with inverses
    assert all(torch.equal(lines.sort(1).values, elements.expand_as(table))
               for lines in (table, table.T))
    assert torch.equal(table[table], table[elements[:, None, None], table[None]])  # (ab)c = a(bc)
    assert torch.equal(table, table.T) == (name in ABELIAN)
    for a, b in torch.randint(len(g), (50, 2), generator=torch.Generator().manual_seed(0)).tolist():
        # first a, then b
        assert g.elements[table[a, b]] == tuple(g.elements[b][x] for x in g.elements[a])


@pytest.mark.parametrize("name", ORDERS)
def test_generators_give_every_element(name):
    g, reached = group(name), torch.tensor([0])
    for _ in range(len(g)):
        reached = torch.cat([reached, g.table[reached][:, g.generators].flatten()]).unique()
    assert len(reached) == len(g) and len(set(g.generators)) == len(g.generators) <= 2


def test_symmetric_and_alternating_groups_by_their_definitions():
    def is_even(p):
        return sum(p[i] > p[j] for j in range(len(p)) for i in range(j)) % 2 == 0

    for n in (3, 4, 5):
        assert set(group(f"S{n}").elements) == set(permutations(range(n)))
        assert set(group(f"A{n}").elements) == {p for p in permutations(range(n)) if is_even(p)}
    for n in (3, 4, 5):  # D_n: the n turns, and each turned over
        turns = [tuple((x + k) % n for x in range(n)) for k in range(n)]
        assert set(group(f"D{n}").elements) == {*turns, *(t[::-1] for t in turns)}


@given(st.sampled_from(sorted(ORDERS)), st.integers(1, 40), st.integers(0, 99),
       st.sampled_from(["uniform", "mixed"]), st.booleans())
def test_targets_are_the_running_products(name, seq_len, seed, strings, generators):
    g = group(name)
    ids, targets = g.make_batch(4, seq_len, torch.Generator().manual_seed(seed), strings=strings,
                                generators=generators)
    allowed = g.generators if generators else range(len(g))
    assert set((ids[:, 1:] - 1).flatten().tolist()) <= set(allowed)
    for row, target in zip((ids - 1).tolist(), (targets - 1).tolist()):
        state = tuple(range(len(g.elements[0])))
        for letter, product in zip(row, target):
            state = tuple(g.elements[letter][x] for x in state)
            assert g.elements[product] == state


def test_every_letter_occurs_as_often_in_uniform_strings_and_all_occur_in_mixed_ones():
    g = group("S3")
    for strings in ("uniform", "mixed"):
        ids, _ = g.make_batch(4000, 20, torch.Generator().manual_seed(0), strings=strings)
        share = torch.bincount((ids - 1).flatten(), minlength=6) / ids.numel()
        assert ((share - 1 / 6).abs().max() < 0.01 if strings == "uniform"
                else share[1:].min() > 0.1 and share[0] > 0.3)
    repeats = [(ids[:, 1:] == ids[:, :-1]).float().mean(1)
               for ids in (g.make_batch(400, 200, strings=s)[0] for s in ("uniform", "mixed"))]
    assert repeats[0].max() < 0.4 and repeats[1].max() > 0.95


def test_parity_is_the_group_of_two_and_draws_what_it_drew():
    """The committed rows and weights are of these strings."""
    uniform, mixed = (parity.make_batch(2, 12, torch.Generator().manual_seed(7), strings=s)
                      for s in ("uniform", "mixed"))
    assert (["".join(str(int(x)) for x in row) for row in uniform[0]]
            == ["212122221212", "121111211122"])
    assert (["".join(str(int(x)) for x in row) for row in mixed[0]]
            == ["111111111111", "222212121211"])
    assert torch.equal(uniform[1], (uniform[0] - 1).cumsum(1) % 2 + 1)


@pytest.mark.parametrize("name", ["", "S", "Q8", "Z1", "Z0", "D2", "A2", "S7", "A7", "Z100", "D02",
                                  "S-3", "s3", "S3 ", "S3\n"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"group = {name!r}: must be")):
        group(name)
