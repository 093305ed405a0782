"""Recurrent-depth transformers: the model, what it is trained to be, and the proof that it is."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_core.cache import KVCache
    from mythos_core.config import MythosConfig
    from mythos_core.interop import from_open_mythos
    from mythos_core.model import OpenMythos

__all__ = ["KVCache", "MythosConfig", "OpenMythos", "from_open_mythos"]
__version__ = "0.1.0"

_HOME = {"KVCache": "cache", "MythosConfig": "config", "OpenMythos": "model",
         "from_open_mythos": "interop"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: PyTorch takes seconds to import, and
    `mythos_core.batch`, each of whose workers is a process, does not need it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return found
