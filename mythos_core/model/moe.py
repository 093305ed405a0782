"""Mixture of experts: softmax router, top-k with renormalised gates, grouped SwiGLU experts, shared
experts, load balance."""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mythos_core.model.config import MythosConfig
from mythos_core.model.layers import SwiGLU, several_processes

# products spent on experts that were not chosen, up to which computing all of them beats sorting
# the tokens, on two threads; on one, at 2 million already they are level
SORTING = 3_000_000


def _count(ids: Tensor, n_experts: int) -> Int[Tensor, "experts"]:
    """How often each expert occurs; as `bincount`, which CUDA does not make deterministic and
    `torch.compile` cannot trace."""
    ids = ids.flatten()
    return ids.new_zeros(n_experts).index_add(0, ids, torch.ones_like(ids))


class MoE(nn.Module):
    """sum_{i in top-k} g_i * expert_i(x) + sum_s shared_s(x)   (DeepSeekMoE, Dai et al. 2024).

    With router logits z: the k experts with the largest z + bias are chosen, and g = softmax(z)
    over all experts, renormalised over the chosen ones. `bias` balances the load without an
    auxiliary loss (Wang et al. 2024, DeepSeek-V3): it shifts the choice only, so it enters neither
    the gates nor the gradient, and `balance`, called once an optimiser step, moves it by
    `balance_rate` against the sign of each expert's load error.

    Attributes:
        router_bias: (n_experts,) the bias, saved with the weights.
        load: (n_experts,) choices counted in training since the last `balance`; not saved.
        imbalance: mean over the loops of the latest pass in training of n_experts * sum_i f_i P_i,
            the auxiliary loss of Fedus et al. 2022, with f_i the share of choices that fall on
            expert i and P_i its mean softmax probability; 1 = even. 0.0 if config.balance_loss
            is 0, after `balance`, and in a copy.

    Bias and load stay float32 in a model of any dtype: bfloat16 cannot count past 256.
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        c = self.config = config
        self.router = nn.Linear(c.dim, c.n_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(2, c.n_experts, c.expert_dim, c.dim))
        self.down = nn.Parameter(torch.empty(c.n_experts, c.expert_dim, c.dim))
        self.shared = nn.ModuleList(SwiGLU(c.dim, c.n_experts_per_tok * c.expert_dim)
                                    for _ in range(c.n_shared_experts))
        self.router_bias: Tensor
        self.load: Tensor
        for name, kept in (("router_bias", True), ("load", False)):
            zeros = torch.zeros(c.n_experts, dtype=torch.float32)
            self.register_buffer(name, zeros, persistent=kept)
        self._imbalances = []                                    # with their graphs

    def _apply(self, fn, recurse=True):
        """As of any module, so that `to` moves the buffers; but it leaves their dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def __getstate__(self):
        """A copy or a pickle is without graphs, which could be neither."""
        return {**self.__dict__, "_imbalances": []}

    def forward(self, x: Float[Tensor, "batch seq dim"]
                ) -> tuple[Float[Tensor, "batch seq dim"], Int[Tensor, "batch seq k"]]:
        """The mixture and the experts chosen, each token's k in falling order of z + bias."""
        c = self.config
        logits = self.router(x)  # (B, S, E)
        ids = (logits + self.router_bias).topk(c.n_experts_per_tok, -1).indices  # (B, S, k)
        # (B, S, E), 0 for those not chosen: softmax over the chosen = over all, renormalised
        gates = (logits + torch.full_like(logits, -torch.inf).scatter(-1, ids, 0.0)).softmax(-1)
        if self.training and c.balance_rate:
            self.load += _count(ids, c.n_experts)
        if self.training and c.balance_loss:
            share = _count(ids, c.n_experts) / ids.numel()
            self._imbalances.append(
                c.n_experts * (share * logits.softmax(-1).mean((0, 1))).sum())
        out = (self._grouped(x.flatten(0, 1), ids, gates).view_as(x) if self._groups(x)
               else self._dense(x, gates))
        for expert in self.shared:
            out = out + expert(x)
        return out, ids

    def _groups(self, x) -> bool:
        """Whether to sort the tokens by expert: where that is cheaper. Not for the answers of a
        model that may settle: a token's place among those of its expert, and with it the rounding,
        hangs on where the other tokens go, and "nothing changed" would never come. Nor while a
        graph is traced, but of bfloat16: of the grouped product torch knows no other dtype's
        shape."""
        c = self.config
        # channels; few cost less than copies of a token do
        idle = (c.n_experts - c.n_experts_per_tok) * c.expert_dim
        cheaper = x.numel() * idle > SORTING and idle > 40 * c.n_experts_per_tok
        known = x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
        known = known and x.dtype != torch.float64 and x.device.type in ("cpu", "cuda")
        return cheaper and known and (self.training or not c.one_map)

    def _dense(self, x, gates):
        """Every expert on every token, the gates of those not chosen being 0: two large
        products."""
        gate, up = F.linear(x, self.gate_up.flatten(0, 2)).chunk(2, -1)  # (B, S, E * expert_dim)
        hidden = (F.silu(gate) * up).unflatten(-1, (self.config.n_experts, -1))
        return (hidden * gates.unsqueeze(-1)).flatten(-2) @ self.down.flatten(0, 1)

    def _grouped(self, x, ids, gates):
        """Token copies sorted by expert, then grouped products: only the chosen experts are
        computed. All gates' and all ups' are one, for which the copies are there twice: that costs
        less than the gradients of two products, which would be put together anew."""
        order, gates = ids.flatten().argsort(stable=True), gates.gather(-1, ids)
        token = order // self.config.n_experts_per_tok
        ends = _count(ids, self.config.n_experts).cumsum(0, dtype=torch.int32)
        # autocast does not know this product
        gate_up, down = self.gate_up.to(x.dtype).flatten(0, 1), self.down.to(x.dtype)
        copies = x.index_select(0, torch.cat([token, token]))  # (2 N k, dim)
        gate, up = F.grouped_mm(copies, gate_up.mT,
                                offs=torch.cat([ends, ends + len(token)])).chunk(2)
        hidden = F.silu(gate) * up * gates.flatten()[order].unsqueeze(-1)  # (N k, expert_dim)
        return torch.zeros_like(x).index_add(0, token,
                                             F.grouped_mm(hidden.to(x.dtype), down, offs=ends))

    @property
    def imbalance(self) -> Tensor | float:
        return torch.stack(self._imbalances).mean() if self._imbalances else 0.0

    def begin(self):
        """A pass of the model begins: let go of the one before it, with its graph."""
        self._imbalances.clear()

    @torch.no_grad()
    def balance(self):
        """bias_i += balance_rate * sign(mean load - load_i), then count anew.

        Where torch.distributed is initialised the load is that of all processes, each of which has
        to call this. Where a step has several passes, DistributedDataParallel needs
        broadcast_buffers = False, or each pass starts from the first process's load.
        """
        if several_processes():
            dist.all_reduce(self.load)
        self.router_bias += self.config.balance_rate * (self.load.mean() - self.load).sign()
        self.load.zero_()
        self._imbalances.clear()
