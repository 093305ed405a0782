"""Prefix parity, the running product in Z2. Token 1 is bit 0, token 2 is bit 1; the target at a
position is the parity of all bits up to it, as a token."""
import torch
from jaxtyping import Int
from torch import Tensor

from mythos_core.tasks.groups import group

make_batch, answers = group("Z2").make_batch, group("Z2").answers


def continuation(ids: Int[Tensor, "batch seq"], n: int) -> Int[Tensor, "batch new"]:
    """The n tokens that a model which answers right generates after `ids`: [p, 1, 1, 1, ...],
    (batch, n).

    p is the prompt's parity. Fed back as the next bit it makes the parity p xor p = 0, and zeros
    keep it there.
    """
    return torch.nn.functional.pad(answers(ids)[:, -1:], (0, n - 1), value=1)


def structured(seq_len: int) -> dict[str, Int[Tensor, "one seq"]]:
    """Strings that random ones are never like, by name; each (1, seq_len) tokens."""
    i = torch.arange(seq_len)[None]
    bits = {"all zeros": i < 0, "all ones": i >= 0, "alternating": i % 2 == 0,
            "one at the start": i == 0, "one at the end": i == seq_len - 1,
            "half and half": i >= seq_len // 2, "every third": i % 3 == 0}
    return {name: b.long() + 1 for name, b in bits.items()}
