"""Recurrent-depth transformers: the model, what it is trained to be, and the proof that it is."""
from mythos_core.cache import KVCache
from mythos_core.config import MythosConfig
from mythos_core.interop import from_open_mythos
from mythos_core.model import OpenMythos

__all__ = ["KVCache", "MythosConfig", "OpenMythos", "from_open_mythos"]
__version__ = "0.1.0"
