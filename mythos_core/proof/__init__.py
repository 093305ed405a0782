"""Proofs that a trained model answers right on every string of every length."""
from mythos_core.proof.certificate import Certificate, automaton, certify

__all__ = ["Certificate", "automaton", "certify"]
