"""Small strict and dilated models, and whether a strict one settles as it must."""
import torch

from mythos_core import OpenMythos
from mythos_core.model.config import tutorial_config

STRICT = dict(vocab_size=6, dim=16, n_heads=2, n_kv_heads=1, strict=True, halting="settled",
              loop_embedding=False, lora_rank=0, carry=False, kv_lora_rank=8, q_lora_rank=8,
              qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, expert_dim=8, init_std=0.3)


DILATED = {**STRICT, "strict": False, "dilation": 2, "rope": False, "max_seq_len": None,
           "window": 1, "loop_norm": True, "max_loop_iters": 8}


def strict_model(seed=0, dtype=torch.float32, **changes) -> OpenMythos:
    """A small strict model with weights large enough that loops matter."""
    torch.manual_seed(seed)
    changes["stride"] = min(changes.pop("stride", 1), changes.get("window") or 99)
    return _disturbed(tutorial_config(changes.pop("attn_type", "gqa"), **{**STRICT, **changes}),
                      dtype)


def dilated_model(seed=0, dtype=torch.float32, **changes) -> OpenMythos:
    """A small dilated model with weights large enough that loops matter."""
    torch.manual_seed(seed)
    return _disturbed(tutorial_config("gqa", **{**DILATED, **changes}), dtype)


def _disturbed(config, dtype) -> OpenMythos:
    model = OpenMythos(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def strings(seed, batch=2, seq=9):
    return torch.randint(0, 6, (batch, seq), generator=torch.Generator().manual_seed(seed))


def loop(model, ids, n_loops, start=None):
    """h_0 .. h_T, every loop run."""
    ctx = model.context(ids)
    with torch.no_grad():
        e = model.encode(ids, ctx)
        states = [e if start is None else start]
        for t in range(n_loops):
            states.append(model.recurrent.step(states[-1], e, t, ctx)[0])
    return torch.stack(states)


def settles_in_turn(model, ids) -> bool:
    """Theorem 1: position i is the same bit for bit from loop i // stride + 1 on, from any
    start."""
    n, stride = ids.shape[1], model.config.stride
    started = [loop(model, ids, n + 3, start) for start in
               (None, 50 * torch.randn(*ids.shape, model.config.dim).to(model.embed.weight))]
    return all(torch.equal(states[i // stride + 1:, :, i],
                           started[0][-1, :, i].expand_as(states[i // stride + 1:, :, i]))
               for states in started for i in range(n))
