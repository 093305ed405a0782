"""Recurrent-depth transformers: the model, what it is trained to be, and the proof that it is."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_core.model import KVCache, MythosConfig, OpenMythos, from_open_mythos
    from mythos_core.proof import certify
    from mythos_core.tasks import machine
    from mythos_core.training import train

__all__ = ["KVCache", "MythosConfig", "OpenMythos", "certify", "from_open_mythos", "machine",
           "train"]
__version__ = "0.1.0"

_ROOMS = {"KVCache": "model", "MythosConfig": "model", "OpenMythos": "model",
          "from_open_mythos": "model", "certify": "proof", "machine": "tasks", "train": "training"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: PyTorch takes seconds to import, and
    `mythos_core.batch`, each of whose workers is a process, does not need it."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
