"""Texts to split and to train on."""
import torch


def prose(seed: int, n: int = 600) -> bytes:
    """Words that no other seed has."""
    letters = torch.randint(97, 123, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return b"\n\n".join(bytes(letters[i:i + 100]) for i in range(0, n, 100))


FILES = {f"file {i}": prose(i) for i in range(40)}
