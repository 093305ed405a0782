"""How a generation draws tokens, and makes its columns of what is given and drawn."""
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor


def require(holds, name: str, value, rule: str):
    """ValueError, with the rule, for an argument of that name and value, unless it `holds`."""
    if not holds:
        raise ValueError(f"{name} = {value}: must be {rule}")


def check_sampling(temperature: float, top_k: int, top_p: float):
    """ValueError for what `sample` cannot draw by."""
    require(temperature >= 0, "temperature", temperature, "0 or more")
    require(top_k >= 0, "top_k", top_k, "0 or more")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")


def lengths_of(lengths, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch 1"]:
    """Of each row's prompt, by default all of it; ValueError for what cannot be its length."""
    batch, most = ids.shape
    found = torch.as_tensor([most] * batch if lengths is None else lengths, device=ids.device)
    require(found.shape == (batch,) and not found.is_floating_point()
            and found.min() >= 1 and found.max() <= most,
            "lengths", found.tolist(), f"a number in 1 .. {most} for each of {batch} rows")
    return found.unsqueeze(1)


def columns(prompt: Int[Tensor, "batch seq"], lengths: Int[Tensor, "batch 1"], length: int,
            draw: Callable, stops: Int[Tensor, "stops"]) -> Iterator[Int[Tensor, "batch 1"]]:
    """The columns behind the shortest prompt, up to `length`: of a longer prompt its own tokens
    first, then those that `draw` makes of all before, and from one of `stops` on that one."""
    ids = prompt[:, :lengths.min()]
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    for position in range(ids.shape[1], length):
        new, given = draw(ids), lengths > position
        new = torch.where(ended, ids[:, -1:], new)
        if position < prompt.shape[1]:
            new = torch.where(given, prompt[:, position:position + 1], new)
        ids, ended = torch.cat([ids, new], 1), ended | (torch.isin(new, stops) & ~given)
        yield new
        if ended.all():
            return


def sample(logits: Float[Tensor, "batch vocab"], temperature: float, top_k: int,
           generator: torch.Generator | None, top_p: float = 1.0) -> Int[Tensor, "batch 1"]:
    """One token a row, of the top_k, and of these of the `nucleus` of top_p."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    top_k = min(top_k, logits.shape[-1]) or logits.shape[-1]
    top, tokens = (logits / temperature).topk(top_k, -1)
    share = top.softmax(-1, dtype=torch.promote_types(top.dtype, torch.float32))
    share = nucleus(share, top_p) if top_p < 1 else share
    if generator is not None:                                    # which draws on its own device
        share = share.to(generator.device)
    chosen = torch.multinomial(share, 1, generator=generator)
    return tokens.gather(-1, chosen.to(tokens.device))


def nucleus(share: Float[Tensor, "*batch k"], top_p: float) -> Float[Tensor, "*batch k"]:
    """Shares in falling order, 0 behind the first few that make up top_p."""
    return share.masked_fill(share.cumsum(-1) - share >= top_p, 0)
