"""Text is UTF-8 whatever the locale: ruff's rule sees only what it can tell to be a path."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for folder in ("mythos_core", "tests", "figures")
               for file in (ROOT / folder).rglob("*.py"))


def without_encoding(call) -> bool:
    """Whether a node of the syntax tree opens text and leaves its encoding to the locale."""
    if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    modes = [mode.value for mode in call.args[1:] if isinstance(mode, ast.Constant)]
    return getattr(call.func, "id", "") == "open" and not any("b" in mode for mode in modes)


@pytest.mark.parametrize("source, found", [
    ("path.read_text()", True), ("open(path)", True), ("open(path, 'w')", True),
    ("path.write_text('', encoding='utf-8')", False), ("open(path, 'rb')", False)])
def test_such_a_call_is_recognised(source, found):
    assert without_encoding(ast.parse(source, mode="eval").body) is found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_text_is_left_to_the_locale(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if without_encoding(node)]
