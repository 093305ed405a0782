"""What a model is asked: strings and their right answers."""
from mythos_core.tasks.automaton import Machine
from mythos_core.tasks.groups import group
from mythos_core.tasks.machines import machine
from mythos_core.tasks.unbounded import task

__all__ = ["Machine", "group", "machine", "task"]
