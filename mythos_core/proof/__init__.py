"""Proofs that a trained model answers right on every string of every length."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_core.proof.certificate import Certificate, automaton, certify

__all__ = ["Certificate", "automaton", "certify"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: `check` is to run without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module("mythos_core.proof.certificate"), name)
    return value
