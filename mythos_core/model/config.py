"""MythosConfig: everything that decides what a model computes, checked when it is made."""
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

ATTENTION = ("gqa", "mla")
HALTING = ("act", "act_remainder", "settled", "none")

#: What a field must be whatever the others are: whether a value is allowed, and the rule in words.
RULES = {
    **dict.fromkeys(
        ["vocab_size", "dim", "n_heads", "n_kv_heads", "max_loop_iters", "kv_lora_rank",
         "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_experts",
         "n_experts_per_tok", "expert_dim", "max_output_tokens", "min_loops",
         "stride", "dilation"],
        (lambda x: x >= 1, "at least 1")),
    **dict.fromkeys(
        ["prelude_layers", "coda_layers", "n_shared_experts", "lora_rank", "codes",
         "loop_noise", "start_noise", "balance_loss", "balance_rate"],
        (lambda x: x >= 0, "0 or more")),
    **dict.fromkeys(["max_seq_len", "window"],
                    (lambda x: x is None or x >= 1, "None or at least 1")),
    **dict.fromkeys(["rope_theta", "init_std"], (lambda x: x > 0, "above 0")),
    "embed_std": (lambda x: x is None or x > 0, "None or above 0"),
    "attn_type": (lambda x: x in ATTENTION, f"one of {ATTENTION}"),
    "halting": (lambda x: x in HALTING, f"one of {HALTING}"),
    "act_threshold": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "dropout": (lambda x: 0 <= x < 1, "in [0, 1)"),
}


@dataclass(frozen=True)
class MythosConfig:
    """Hyper-parameters of a recurrent-depth transformer.

    The first part has the field names and defaults of open-mythos 0.5.0. The second part holds this
    project's switches: at their defaults the model computes what that package computes.

    Raises:
        ValueError: at construction, naming the field, its value and the rule it breaks.
    """

    vocab_size: int = 32000
    dim: int = 2048                  # width of the residual stream
    n_heads: int = 16                # query heads
    # GQA: key/value heads, each shared by n_heads / n_kv_heads query heads
    n_kv_heads: int = 4
    # positions a pass may reach; longer input is refused. None = no limit, with rope = False
    max_seq_len: int | None = 4096
    # loops when `n_loops` is not given; rows of the per-loop LoRA scale
    max_loop_iters: int = 16
    prelude_layers: int = 2          # blocks run once before the loop
    coda_layers: int = 2             # blocks run once after it
    attn_type: str = "mla"           # "gqa" | "mla"
    kv_lora_rank: int = 512          # MLA: width of the cached latent
    q_lora_rank: int = 1536          # MLA: width of the query latent
    # MLA: channels of a head that RoPE rotates; their key is shared by all heads
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128      # MLA: channels of a head without position
    v_head_dim: int = 128            # MLA: value channels of a head
    n_experts: int = 64              # routed experts of the looped block
    # experts every token passes through, each n_experts_per_tok * expert_dim wide
    n_shared_experts: int = 2
    n_experts_per_tok: int = 4       # routed experts a token passes through
    expert_dim: int = 512            # hidden width of a routed expert
    act_threshold: float = 0.99      # sum of ACT's halting probabilities at which a position stops
    rope_theta: float = 500000.0     # RoPE base
    lora_rank: int = 16              # rank of the per-loop adapter (Bae et al. 2024); 0 = none
    max_output_tokens: int = 4096    # most tokens one call of `generate` may add
    dropout: float = 0.0             # on attention weights and on each residual branch, in training

    # in the loop a position reads the states before it, never its own: see strict.StrictBlock
    strict: bool = False
    # of a strict model: how far back a position reads. News travels so many positions per loop,
    # and a string of n positions settles in n / stride loops
    stride: int = 1
    # r > 1: in loop t a position reads those i, i - r^t, .., i - (r - 1) r^t, so that T loops read
    # r^T positions: see dilated.DilatedBlock
    dilation: int = 1
    # of a strict or dilated model without the carry: states are rounded to the nearest of so many;
    # 0 = they are not
    codes: int = 0
    # "act": weights may sum to < 1 | "act_remainder": the last loop gets the rest (Graves 2016) |
    # "settled": the loop ends when nothing changes, for strict and dilated models | "none"
    halting: str = "act"
    # sinusoidal loop index on the first dim // 8 channels (theta 10,000)
    loop_embedding: bool = True
    # causal window: a query sees itself and window - 1 before it (Beltagy et al. 2020); None = all
    window: int | None = None
    # in the loop, half of the channels come from the previous position (RWKV, Peng et al. 2023)
    token_shift: bool = False
    rope: bool = True                # False: no position signal, "NoPE" (Kazemnejad et al. 2023)
    # weights ~ N(0, init_std^2); the working recipe needs dim ** -0.5
    init_std: float = 0.02
    embed_std: float | None = None           # of the embedding; None = init_std
    # False: h_{t+1} is the block's output alone, without A * h_t + B * e
    carry: bool = True
    loop_norm: bool = False          # RMSNorm on h after every loop (Geiping et al. 2025)
    # std of Gaussian noise on the loop's normalised input, in training
    loop_noise: float = 0.0
    # std of Gaussian noise on h_0 of half of the strings, in training: the answer should not
    # depend on where the loop starts (path independence, Anil et al. 2022; random h_0, Geiping et
    # al. 2025)
    start_noise: float = 0.0
    # of ACT's halting unit at init; well below 0: many loops at first (Graves 2016); None = as
    # nn.Linear has it
    halt_bias: float | None = None
    min_loops: int = 1               # ACT: no position halts before this many loops
    # weight of the auxiliary load-balancing loss (Switch, Fedus et al. 2022: 0.01)
    balance_loss: float = 0.0
    # step of the routing bias towards equal load (DeepSeek-V3: 0.001); 0 = bias fixed
    balance_rate: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            self._check_type(field.name, field.type)
        for name, (holds, rule) in RULES.items():
            self._require(name, holds(getattr(self, name)), rule)
        self._require("n_experts_per_tok", self.n_experts_per_tok <= self.n_experts,
                      f"at most n_experts = {self.n_experts}")
        self._require("max_seq_len", self.max_seq_len is not None or not self.rope,
                      "a number unless rope = False")
        self._require("dim", not self.token_shift or self.dim % 2 == 0,
                      "even when token_shift is on")
        self._check_codes()
        self._check_strict()
        self._check_dilated()
        self._check_heads()

    def _check_heads(self):
        if self.attn_type == "mla":
            self._require("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0,
                          "even, so that RoPE has pairs")
            return
        self._require("dim", self.dim % self.n_heads == 0,
                      f"a multiple of n_heads = {self.n_heads}")
        self._require("n_heads", self.n_heads % self.n_kv_heads == 0,
                      f"a multiple of n_kv_heads = {self.n_kv_heads}")
        turned = self.rope or self.dilation > 1                  # slots are told apart by RoPE too
        self._require("dim", not turned or self.rope_dim % 2 == 0,
                      f"an even number times n_heads = {self.n_heads}, so that RoPE has pairs")

    def _check_strict(self):
        """What a strict loop promises holds if every loop is the same map, and reads
        states only as the loop does."""
        self._require("stride", self.strict or self.stride == 1, "1 unless strict = True")
        if not self.strict:
            return
        self._require("stride", self.window is None or self.stride <= self.window,
                      f"at most window = {self.window}: letters between would be lost")
        self._require_one_map("strict is on")
        self._require("token_shift", not self.token_shift,
                      "False when strict is on, which shifts the whole state")
        self._require("loop_norm", not (self.loop_norm and self.carry),
                      "False when strict and carry are on: the carry's factor would not be A")

    def _check_dilated(self):
        """A dilated loop is one map of the states of its slots, which are told apart by a vector of
        their own."""
        if self.dilation == 1:
            return
        for name, wanted in (("strict", False), ("attn_type", "gqa"), ("carry", False),
                             ("token_shift", False)):
            self._require(name, getattr(self, name) == wanted,
                          f"{wanted!r} when dilation = {self.dilation}")
        self._require_one_map(f"dilation = {self.dilation}")

    def _check_codes(self):
        self._require("codes", not self.codes or (self.one_map and not self.carry),
                      "0 unless strict = True or dilation > 1, and carry = False")
        self._require("halting", self.one_map or self.halting != "settled",
                      "another than 'settled' unless strict = True or dilation > 1")

    def _require_one_map(self, when):
        self._require("halting", self.halting in ("settled", "none"),
                      f"'settled' or 'none' when {when}: ACT weighs states that have not settled")
        self._require("loop_embedding", not self.loop_embedding,
                      f"False when {when}: every loop has to be the same map")
        self._require("lora_rank", self.lora_rank == 0,
                      f"0 when {when}: every loop has to be the same map")

    @property
    def one_map(self) -> bool:
        """Whether every loop is the same map of the states that it reads, and so may settle."""
        return self.strict or self.dilation > 1

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return self.dim // self.n_heads if self.attn_type == "gqa" else self.qk_rope_head_dim

    @property
    def kv_heads(self) -> int:
        """Key heads that the query heads share: MLA's latent is one."""
        return self.n_kv_heads if self.attn_type == "gqa" else 1

    def _require(self, name, holds, rule):
        if not holds:
            raise ValueError(f"MythosConfig.{name} = {getattr(self, name)!r}: must be {rule}")

    def _check_type(self, name, kind):
        value, allowed = getattr(self, name), int | float if kind is float else kind
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed):
            raise ValueError(f"MythosConfig.{name} = {value!r}: "
                             f"must be {getattr(kind, '__name__', kind)}")
        self._require(name, not isinstance(value, float) or math.isfinite(value), "finite")


def tutorial_config(attn_type: str, **changes) -> MythosConfig:
    """The small model of the size and cache notebooks: 462,274 parameters with
    "gqa", 419,554 with "mla"."""
    small = dict(
        vocab_size=256, dim=128, n_heads=4, n_kv_heads=2, max_seq_len=128, max_loop_iters=8,
        prelude_layers=1, coda_layers=1, attn_type=attn_type, kv_lora_rank=32, q_lora_rank=64,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64, lora_rank=8)
    return MythosConfig(**{**small, **changes})


def parity_config(**changes) -> MythosConfig:
    """The article's parity model: GQA, dim 64, up to 16 loops, 112,002 parameters."""
    return tutorial_config("gqa", **{"vocab_size": 64, "dim": 64, "max_loop_iters": 16,
                                     "expert_dim": 32, "lora_rank": 4, **changes})


#: The variants that open-mythos 0.5.0 publishes, by name, from published.json, which has what
#: differs from the defaults. For counting: nobody has released weights for them.
VARIANTS = {name: MythosConfig(**values) for name, values in json.loads(
    (Path(__file__).parent / "published.json").read_text(encoding="utf-8")).items()}
