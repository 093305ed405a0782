"""The model. Read it in this order: config, layers, cache, attention, moe, halting, loop, strict,
dilated, weights, model, interop."""
from mythos_core.model.cache import KVCache
from mythos_core.model.config import MythosConfig, parity_config, tutorial_config
from mythos_core.model.interop import from_open_mythos
from mythos_core.model.loop import LTIInjection
from mythos_core.model.model import OpenMythos

__all__ = ["KVCache", "LTIInjection", "MythosConfig", "OpenMythos", "from_open_mythos",
           "parity_config", "tutorial_config"]
