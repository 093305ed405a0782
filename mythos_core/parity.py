"""The task: prefix parity. Token 1 is bit 0, token 2 is bit 1; the target at a position is the parity of all bits up to it, as a token."""
import torch
from jaxtyping import Int
from torch import Tensor

STRINGS = ("uniform", "mixed")


def make_batch(batch: int, seq_len: int, generator: torch.Generator | None = None, device=None, strings: str = "uniform") -> tuple[Tensor, Tensor]:
    """`batch` random strings and their right answers.

    Args:
        strings: "uniform": every bit is fair. "mixed": half of the rows have bits that are 1 with probability p, drawn for
            each row; half have runs, whose bit flips with probability q, drawn for each row. Uniform strings alone hide
            that a model is slow on long runs.

    Returns:
        ids, targets: (batch, seq_len) int64 in {1, 2}.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if strings not in STRINGS:
        raise ValueError(f"strings = {strings!r}: must be one of {STRINGS}")

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    if strings == "uniform":
        bits = torch.randint(0, 2, (batch, seq_len), generator=generator)
    else:
        dense = rand(batch, seq_len) < rand(batch, 1)
        runs = (rand(batch, seq_len) < rand(batch, 1)).long().cumsum(1) % 2 == 1
        bits = torch.where(rand(batch, 1) < 0.5, dense, runs).long()
    ids = (bits + 1).to(device)
    return ids, answers(ids)


def answers(ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """The parity of each prefix, as tokens in {1, 2}."""
    return (ids - 1).cumsum(1) % 2 + 1


def continuation(ids: Int[Tensor, "batch seq"], n: int) -> Int[Tensor, "batch new"]:
    """The n tokens that a model which answers right generates after `ids`: [p, 1, 1, 1, ...], (batch, n).

    p is the prompt's parity. Fed back as the next bit it makes the parity p xor p = 0, and zeros keep it there.
    """
    new = torch.ones(len(ids), n, dtype=ids.dtype, device=ids.device)
    new[:, 0] = answers(ids)[:, -1]
    return new


def structured(seq_len: int) -> dict[str, Int[Tensor, "one seq"]]:
    """Strings that random ones are never like, by name; each (1, seq_len) tokens."""
    bits = {name: torch.zeros(1, seq_len, dtype=torch.int64) for name in (
        "all zeros", "all ones", "alternating", "one at the start", "one at the end", "half and half", "every third")}
    bits["all ones"][:] = 1
    bits["alternating"][:, ::2] = 1
    bits["one at the start"][:, 0] = 1
    bits["one at the end"][:, -1] = 1
    bits["half and half"][:, seq_len // 2:] = 1
    bits["every third"][:, ::3] = 1
    return {name: b + 1 for name, b in bits.items()}
