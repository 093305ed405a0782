"""The command line: `mythos COMMAND ...`, or `python -m mythos_core COMMAND ...`.

A command is a module's, which has `options(parser)`, its arguments, and `run(args)`, its work, with
an exit code other than 0 if there is one. Only the module of the command that is given is imported:
some need PyTorch, which takes seconds.
"""
import argparse
import shlex
import signal
import sys
from importlib import import_module
from typing import NamedTuple, NoReturn

EXITS = ("Exit codes: 0 done; 1 done, but runs of a batch have failed; 2 refused, not proved, or "
         "stopped by an error that is said; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.")
#: Errors that say which argument, file or package is at fault. Others are ours, and have a
#: traceback.
SAID = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


class Command(NamedTuple):
    """What a command does, the module that does it, and how to go on after it was stopped."""

    what: str
    module: str
    go_on: str


COMMANDS = {
    "train": Command("Train a model by a recipe, or until it is proved to be a machine.",
                     "mythos_core.training.command", "go on with --resume"),
    "batch": Command("Run notebooks over a grid of parameters.",
                     "mythos_core.batch.command", "the same command goes on"),
    "check": Command("Prove again what a certificate says, by none of the code that made it.",
                     "mythos_core.proof.check", "nothing is proved"),
    "language": Command("Train and measure a looped model of text.",
                        "mythos_core.study.language", "go on with --resume")}


def main(argv: list[str] | None = None) -> int:
    """Do what a command line says; the exit code, or a SystemExit with it, is as `EXITS` says."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("mythos", epilog=EXITS,
                                     description="Looped models, trained, proved and compared. "
                                                 "`mythos COMMAND --help` has the options.")
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    parsers = {name: add(name, help=command.what, description=command.what, epilog=EXITS)
               for name, command in COMMANDS.items()}
    name = parser.parse_args(words[:1]).command
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(COMMANDS[name], parsers[name], words)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Command, parser: argparse.ArgumentParser, words: list[str]) -> int:
    given = argparse.Namespace(command=shlex.join(["mythos", *words]))       # some results keep it
    try:
        module = import_module(command.module)
        module.options(parser)
        return module.run(parser.parse_args(words[1:], given)) or 0
    except SAID as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt as stopped:
        code = stopped.args[0] if stopped.args else 128 + signal.SIGINT
        parser.exit(code, f"\nstopped; {command.go_on}\n")


def _terminate(number: int, frame) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does, with an exit code of its own."""
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
