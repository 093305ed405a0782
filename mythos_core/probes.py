"""Measurements on a model: sizes, cache bytes, spectra, depth sweeps, halting maps, expert use.

What happens inside the loop is seen through the observer that `OpenMythos.forward` takes; nothing
is patched. A model and its ids may be on any device; what is measured of them comes back on the
CPU.
"""
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mythos_core.model.config import MythosConfig
from mythos_core.model.layers import evaluated
from mythos_core.model.model import OpenMythos

COMPONENTS = {  # first match wins
    "recurrent.block.ffn.shared": "shared experts", "recurrent.block.ffn.router": "router",
    "recurrent.block.ffn.": "routed experts", "recurrent.block.attn.": "loop attention",
    "recurrent.lora": "loop LoRA", "recurrent": "norms, injection, halting",
    "prelude": "prelude", "coda": "coda", "embed": "embedding = head",
    "norm": "norms, injection, halting"}


def parameters_by_component(model: OpenMythos) -> dict[str, int]:
    """Parameters of each part of the model; the tied embedding and head count once."""
    count = Counter()
    for name, parameter in model.named_parameters():
        count[next(part for prefix, part in COMPONENTS.items()
                   if name.startswith(prefix))] += parameter.numel()
    return dict(count)


def active_parameters(model: OpenMythos) -> int:
    """Parameters that one token meets in a pass of one loop: all, less the routed experts it is not
    sent to.

    Every further loop chooses anew, so over T loops a token may meet up to T times as many experts.
    """
    c = model.config
    routed = parameters_by_component(model)["routed experts"]
    idle = routed * (c.n_experts - c.n_experts_per_tok) // c.n_experts
    return sum(p.numel() for p in model.parameters()) - idle


def effective_depth(config: MythosConfig, n_loops: int) -> int:
    """Transformer blocks that a token passes: prelude + n_loops + coda."""
    return config.prelude_layers + n_loops + config.coda_layers


def multiply_adds(model: OpenMythos, n_loops: int, keys: float) -> float:
    """Multiplications, each with its addition, that one token costs: one for each number of the
    matrices that it meets, those of the loop n_loops times and of the routed experts only those
    chosen, and 2 * keys * dim in each attention for the scores and the sum over `keys` values; a
    dilated loop's attention has as many keys as slots.

    For GQA. Norms, softmax and what else goes by channel are left out.
    """
    c = model.config
    matrices = {name: p.numel() for name, p in model.named_parameters()
                if p.dim() >= 2 and name != "recurrent.lora.scale.weight"}
    looped = sum(n for name, n in matrices.items() if name.startswith("recurrent."))
    idle = (parameters_by_component(model)["routed experts"]
            * (c.n_experts - c.n_experts_per_tok) // c.n_experts)
    read = effective_depth(c, 0) * keys + n_loops * (c.dilation if c.dilation > 1 else keys)
    return sum(matrices.values()) - looped + n_loops * (looped - idle) + 2 * read * c.dim


def cache_bytes(config: MythosConfig, tokens: int, n_loops: int, batch: int = 1,
                itemsize: int = 4, rope_key_per_head: bool = False) -> int:
    """Bytes that a KVCache holds after `tokens` positions, by formula.

    effective_depth * batch * min(tokens, window - 1) * width * itemsize, where width is 2 *
    n_kv_heads * head_dim for GQA and kv_lora_rank + qk_rope_head_dim for MLA; plus, with token
    shift, dim / 2 numbers for each loop. Of a strict model all loops are one entry; plus the states
    of the last `stride` positions, dim numbers each. Of a dilated one loop t keeps the last
    min(tokens, j r^t) positions for each slot j = 1 .. r - 1.

    Args:
        rope_key_per_head: what MLA costs if every head stores its own copy of the shared RoPE key,
            as open-mythos 0.5.0 does.
    """
    c = config
    latent = c.kv_lora_rank + c.qk_rope_head_dim * (c.n_heads if rope_key_per_head else 1)
    width = latent if c.attn_type == "mla" else 2 * c.n_kv_heads * (c.dim // c.n_heads)
    cached = tokens if c.window is None else min(tokens, c.window - 1)
    if c.dilation > 1:
        slots = sum(min(tokens, j * c.dilation ** t)
                    for t in range(n_loops) for j in range(1, c.dilation))
        return batch * itemsize * width * (effective_depth(c, 0) * cached + slots)
    shift = n_loops * c.dim // 2 if c.token_shift else 0
    entries, state = ((effective_depth(c, 1), min(tokens, c.stride) * c.dim) if c.strict
                      else (effective_depth(c, n_loops), 0))
    return batch * itemsize * (entries * cached * width + shift + state)


def trajectory(model: OpenMythos, ids: Tensor, n_loops: int, start: Tensor | None = None):
    """The context, e, and h_0 .. h_T (T + 1, B, S, dim) with h_0 = `start`, or e; every loop run,
    and noise as the model's mode has it."""
    ctx = model.context(ids)
    e = model.encode(ids, ctx)
    states = [e if start is None else start]
    for t in range(n_loops):
        states.append(model.recurrent.step(states[-1], e, t, ctx)[0])
    return ctx, e, torch.stack(states)


@dataclass(frozen=True)
class DepthSweep:
    """Accuracy after 1 .. T loops. If the model stops early, what it answers then stands for all
    later loops."""

    correct: Bool[Tensor, "loops batch seq"]
    executed: Int[Tensor, "loops"]  # loops that really ran when that many were asked for

    @property
    def token(self) -> Float[Tensor, "loops"]:
        """Share of positions answered right."""
        return self.correct.float().mean((1, 2))

    @property
    def whole(self) -> Float[Tensor, "loops"]:
        """Share of strings with every position right."""
        return self.correct.all(2).float().mean(1)

    @property
    def loops_needed(self) -> Int[Tensor, "batch seq"]:
        """Fewest loops from which on the prefix up to a position stays right; T + 1 if it is wrong
        after T."""
        prefix_right = self.correct.long().cumprod(2)
        return 1 + len(self.correct) - prefix_right.flip(0).cumprod(0).sum(0)


@torch.no_grad()
@evaluated
def depth_sweep(model: OpenMythos, ids: Int[Tensor, "batch seq"],
                targets: Int[Tensor, "batch seq"], n_loops: int) -> DepthSweep:
    """Answers after each of 1 .. n_loops loops, from one pass: the coda reads the state after every
    loop."""
    ctx, correct = model.context(ids), []
    model(ids, n_loops, observer=lambda record: correct.append(
        model.decode(record.output, ctx).argmax(-1) == targets))
    executed = len(correct)
    correct += correct[-1:] * (n_loops - executed)
    return DepthSweep(torch.stack(correct).cpu(), torch.arange(1, n_loops + 1).clamp(max=executed))


@torch.no_grad()
@evaluated
def logits_after(model: OpenMythos, ids: Int[Tensor, "batch seq"],
                 loops: list[int]) -> list[Float[Tensor, "batch seq vocab"]]:
    """Logits after each of these numbers of loops, from one pass of the largest, on the model's
    device; a model that halted before has its last ones at all later loops."""
    outputs = {}

    def look(record):
        outputs["last"] = record.output
        if record.loop + 1 in loops:
            outputs[record.loop + 1] = record.output

    model(ids, max(loops), observer=look)
    ctx = model.context(ids)
    return [model.decode(outputs.get(n, outputs["last"]), ctx) for n in loops]


@dataclass(frozen=True)
class HaltingMap:
    """What each loop weighed, over the loops that ran."""

    probability: Float[Tensor, "loops batch seq"]
    weight: Float[Tensor, "loops batch seq"]
    stopped_at: Int[Tensor, "batch seq"]          # loops that a position took part in
    executed: int                                 # loops that ran at all, for any position


@torch.no_grad()
@evaluated
def halting_map(model: OpenMythos, ids: Int[Tensor, "batch seq"], n_loops: int) -> HaltingMap:
    """Halting probabilities and weights of one pass with at most n_loops loops."""
    if model.recurrent.act is None:
        raise ValueError(f"config.halting = {model.config.halting!r}: "
                         "a model without halting has no halting map")
    records = []
    model(ids, n_loops, observer=lambda record: records.append((record.halt_probability,
                                                                record.halt_weight)))
    probability, weight = (torch.stack(x).cpu() for x in zip(*records))
    loop = torch.arange(1, len(records) + 1)[:, None, None]
    return HaltingMap(probability, weight, ((weight > 0) * loop).amax(0), len(records))


@torch.no_grad()
@evaluated
def expert_load(model: OpenMythos, ids: Int[Tensor, "batch seq"],
                n_loops: int) -> Int[Tensor, "loops seq experts"]:
    """How often each expert was chosen, by loop and position, summed over the batch."""
    loads = []
    model(ids, n_loops, observer=lambda record: loads.append(
        torch.nn.functional.one_hot(record.expert_ids, model.config.n_experts).sum((0, 2))))
    return torch.stack(loads).cpu()


def _by_expert(load: Tensor) -> Float[Tensor, "experts"]:
    return load.reshape(-1, load.shape[-1]).sum(0).double()


def load_entropy(load: Tensor) -> float:
    """Entropy of the shares of slots by expert, over its largest value log(n_experts): 1 = even, 0
    = one expert gets all."""
    share = _by_expert(load) / load.sum()
    return float(torch.special.entr(share).sum() / torch.tensor(len(share)).log())


def max_violation(load: Tensor) -> float:
    """max_i load_i / mean load - 1, the MaxVio of Wang et al. 2024: 0 = even."""
    total = _by_expert(load)
    return float(total.max() / total.mean() - 1)


@torch.no_grad()
@evaluated
def state_norms(model: OpenMythos, ids: Int[Tensor, "batch seq"],
                n_loops: int) -> Float[Tensor, "loops"]:
    """Mean over batch and positions of ||h_t||_2 after each loop that ran."""
    norms = []
    model(ids, n_loops,
          observer=lambda record: norms.append(record.h.float().norm(dim=-1).mean()))
    return torch.stack(norms).cpu()


def loop_map(model: OpenMythos, ids: Int[Tensor, "batch seq"], n_loops: int):
    """The map of one loop, h -> h_{n_loops + 1} with the input held, and the point h_{n_loops} that
    the model reaches."""
    with torch.no_grad():
        ctx, e, states = evaluated(trajectory)(model, ids, n_loops)
    step = evaluated(lambda model, state: model.recurrent.step(state, e, n_loops, ctx)[0])
    return partial(step, model), states[-1]


@torch.no_grad()
def loop_spectrum(model: OpenMythos, ids: Int[Tensor, "one seq"], n_loops: int
                  ) -> tuple[float, float]:
    """Spectral radius and largest singular value of the full loop Jacobian J = dh_{t+1}/dh_t at t =
    n_loops, for one string, on the CPU in float64.

    Attention is causal, so J is block lower triangular and its eigenvalues are those of its
    diagonal blocks. The largest singular value is the root of J^T J's largest eigenvalue. J, of
    (seq * dim)^2 numbers, is built by reverse mode, many rows at a time.
    """
    step, h = loop_map(model, ids, n_loops)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated in a vmap
        J = torch.func.jacrev(step, chunk_size=128)(h)[0, :, :, 0]   # (to, dim, from, dim)
    J = J.cpu().double()
    blocks = J.diagonal(dim1=0, dim2=2).movedim(-1, 0)               # (seq, dim, dim)
    matrix = J.flatten(2).flatten(0, 1)                              # (seq * dim, seq * dim)
    return (float(torch.linalg.eigvals(blocks).abs().max()),
            float(torch.linalg.eigvalsh(matrix.T @ matrix)[-1].sqrt()))
