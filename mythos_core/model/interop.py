"""Weights from the open-mythos package."""
import re
from dataclasses import asdict

import torch
from torch import Tensor

from mythos_core.model.config import MythosConfig
from mythos_core.model.model import OpenMythos

WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")


def from_open_mythos(state_dict: dict[str, Tensor], config) -> OpenMythos:
    """The model of this package that computes what an open-mythos 0.5.0 model with these weights
    computes.

    `config` has that model's hyper-parameters: a MythosConfig, or that model's own `cfg`.
    Projections are fused and experts stacked; the RoPE tables are dropped. With the switches at
    their defaults logits agree to 1e-5 in float32. Names may begin as DistributedDataParallel
    and torch.compile save them.

    Raises:
        ValueError: if names or shapes do not fit `config`, naming them.
    """
    config = config if isinstance(config, MythosConfig) else MythosConfig(**asdict(config))
    model = OpenMythos(config)
    source = {WRAPPED.sub("", name): tensor for name, tensor in state_dict.items()}
    source = {name: tensor for name, tensor in source.items() if not name.startswith("freqs_cis")}
    blocks = ([f"prelude.{i}" for i in range(config.prelude_layers)]
              + [f"coda.{i}" for i in range(config.coda_layers)] + ["recurrent.block"])
    try:
        for block in blocks:
            if config.attn_type == "gqa":
                _fuse(source, f"{block}.attn.qkv.weight",
                      *(f"{block}.attn.w{part}.weight" for part in "qkv"))
            else:
                _take_mla(source, f"{block}.attn", config)
            _fuse(source, f"{block}.attn.out.weight", f"{block}.attn.wo.weight")
            if block != "recurrent.block":
                _fuse(source, f"{block}.ffn.gate_up.weight",
                      f"{block}.ffn.gate.weight", f"{block}.ffn.up.weight")
        _take_moe(source, "recurrent.block.ffn", config)
        model.load_state_dict(source)
    except KeyError as error:
        raise ValueError(f"state_dict has no tensor {error}, which config "
                         f"(attn_type = {config.attn_type!r}) asks for") from error
    except RuntimeError as error:
        raise ValueError(f"state_dict does not fit config: {error}") from error
    return model


def _fuse(source, new, *olds):
    source[new] = torch.cat([source.pop(old) for old in olds])


def _take_mla(source, attn, config):
    up = [source.pop(f"{attn}.q_up_{part}.weight").unflatten(0, (config.n_heads, -1))
          for part in ("nope", "rope")]
    source[f"{attn}.q_up.weight"] = torch.cat(up, 1).flatten(0, 1)
    _fuse(source, f"{attn}.down.weight", f"{attn}.q_down.weight", f"{attn}.kv_down.weight")


def _take_moe(source, ffn, config):
    expert = {part: [source.pop(f"{ffn}.routed_experts.{i}.{part}.weight")
                     for i in range(config.n_experts)] for part in ("gate", "up", "down")}
    source[f"{ffn}.gate_up"] = torch.stack([torch.stack(expert["gate"]), torch.stack(expert["up"])])
    source[f"{ffn}.down"] = torch.stack(expert["down"]).transpose(1, 2)
    for i in range(config.n_shared_experts):
        old, new = f"{ffn}.shared_experts.{i}", f"{ffn}.shared.{i}"
        _fuse(source, f"{new}.gate_up.weight", f"{old}.gate.weight", f"{old}.up.weight")
        _fuse(source, f"{new}.down.weight", f"{old}.down.weight")
