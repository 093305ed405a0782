"""`mythos`: the commands that there are, and how each of them ends."""
import json
import re
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from mythos_core import __main__ as command_line
from mythos_core.__main__ import COMMANDS, EXITS, Command, main
from mythos_core.model.weights import PRETRAINED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")


def said(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)])
def test_the_help_says_the_exit_codes_that_the_page_has(capsys, words):
    assert EXITS in said(capsys, *words)
    assert re.findall(r"^\| (\d+) \|", PAGE, re.M) == re.findall(r"\d+", EXITS)


def test_the_help_and_the_page_have_every_command(capsys):
    listed = said(capsys)
    for name, command in COMMANDS.items():
        assert f" {name} {command.what} " in listed and f"`mythos {name}`" in PAGE


def test_the_script_is_the_module():
    """What pip installs, and what `python -m mythos_core` runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, where),) = project["scripts"].items()
    assert name == "mythos" and EntryPoint(name, where, "console_scripts").load() is main
    done = subprocess.run([sys.executable, "-m", "mythos_core", "bath"], capture_output=True,
                          text=True)
    assert done.returncode == 2 and "mythos: error: " in done.stderr and "'bath'" in done.stderr


@pytest.mark.parametrize("words", ["--help", "check --help", "batch --help", "check nowhere"])
def test_what_needs_no_torch_does_not_wait_for_it(words):
    code = ("import sys; from mythos_core.__main__ import main; sys.modules['torch'] = None; "
            "main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr


@pytest.fixture
def ending(monkeypatch):
    """Makes a command that does nothing but end so."""
    def make(run):
        module = SimpleNamespace(options=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "a_command", module)
        monkeypatch.setitem(COMMANDS, "end", Command("Ends.", "a_command", "try again"))
    return make


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_how_to_go_on(ending, capsys, number, code):
    ending(lambda args: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    # as in a terminal: what a shell runs in the background ignores it
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["end"])
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert stop.value.code == code and capsys.readouterr().err == "\nstopped; try again\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", command_line.SAID)
def test_an_error_of_the_arguments_is_said_and_one_of_ours_is_not(ending, capsys, error):
    def fail(args):
        raise error("seed = -1: must be 0 or more")

    ending(fail)
    with pytest.raises(SystemExit) as stop:
        main(["end"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "mythos end: seed = -1: must be 0 or more\n"
    ending(lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["end"])


def test_a_command_s_own_code_is_the_exit_code_and_none_is_0(ending):
    for code, ended in ((None, 0), (0, 0), (1, 1), (2, 2)):
        ending(lambda args, code=code: code)
        assert main(["end"]) == ended


@pytest.mark.parametrize("file", sorted(PRETRAINED.glob("*/config.json")),
                         ids=lambda file: file.parent.name)
def test_the_command_of_a_model_that_ships_is_one_that_there_is(file):
    about = json.loads(file.read_text(encoding="utf-8"))["provenance"]
    for command in about["command"].split("; "):
        mythos, name, *words = shlex.split(command)
        parser = ArgumentParser()
        import_module(COMMANDS[name].module).options(parser)
        assert mythos == "mythos" and str(parser.parse_args(words).seed).strip("[]") == str(
            about["seed"])
