import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest
from conftest import tiny

from mythos_core import MythosConfig


def test_fields_and_defaults_of_the_reference_come_first(reference):
    theirs = [(f.name, f.default) for f in fields(reference.MythosConfig)]
    assert [(f.name, f.default) for f in fields(MythosConfig)][: len(theirs)] == theirs


@pytest.mark.parametrize("attn, changes, named",
                         [("gqa", {"dim": 30}, "dim = 30"), ("gqa", {"dim": 20}, "RoPE"),
                          ("gqa", {"n_kv_heads": 3}, "n_kv_heads = 3"),
                          ("mla", {"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3"),
                          ("gqa", {"n_experts_per_tok": 5}, "n_experts = 4"),
                          ("MLA", {}, "attn_type = 'MLA'"),
                          ("gqa", {"halting": "ponder"}, "halting = 'ponder'"),
                          ("gqa", {"act_threshold": 0.0}, "act_threshold = 0.0"),
                          ("gqa", {"codes": 2}, "codes = 2"),
                          ("gqa", {"n_heads": True}, "n_heads = True"),
                          ("gqa", {"act_threshold": 1.5}, "(0, 1]"),
                          ("gqa", {"lora_rank": -1}, "lora_rank = -1"),
                          ("gqa", {"vocab_size": 0}, "vocab_size = 0"),
                          ("gqa", {"window": 0}, "window = 0"),
                          ("gqa", {"dropout": 1.0}, "dropout = 1.0"),
                          ("gqa", {"init_std": 0.0}, "init_std = 0.0"),
                          ("gqa", {"halt_bias": math.nan}, "halt_bias = nan: must be finite"),
                          ("gqa", {"rope_theta": math.inf}, "rope_theta = inf: must be finite"),
                          ("gqa", {"loop_noise": math.inf}, "loop_noise = inf: must be finite"),])
def test_values_that_cannot_work_are_refused_by_name(attn, changes, named):
    with pytest.raises(ValueError, match="MythosConfig") as error:
        tiny(attn, **changes)
    assert named in str(error.value)


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        tiny().dim = 64


@pytest.mark.parametrize("field, value", [("dim", "64.0"), ("token_shift", "1"), ("window", "2.5"),
                                          ("attn_type", "None")])
def test_values_of_the_wrong_type_are_refused_by_name(field, value):
    """In a process of its own, without the run-time type checks of this suite."""
    code = f"from mythos_core import MythosConfig; MythosConfig({field}={value})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ValueError: MythosConfig.{field} = {value}" in run.stderr
