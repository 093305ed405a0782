"""From the words of the command line to points of a grid."""
import ast
import json
import re
from contextlib import suppress
from pathlib import Path


def parse_grid(entries: list[str]) -> list[dict]:
    """["seed=0:2", "name=a"] -> [{"seed": 0, "name": "a"}, {"seed": 1, "name": "a"}]; ValueError
    for a malformed entry."""
    points = [{}]
    for entry in entries:
        name, _, text = entry.partition("=")
        if not name.isidentifier() or name in points[0] or not (values := _values(entry, text)):
            raise ValueError(f"--grid {entry!r}: must be NAME=VALUE,VALUE,... or NAME=FIRST:END, "
                             "each name once, and not empty")
        points = [{**point, name: value} for point in points for value in values]
    return points


def _values(entry: str, text: str) -> list:
    """0:3 is a range; @FILE.json:KEY.KEY the list, or the keys of the object, at that place; else
    literals, or words."""
    if match := re.fullmatch(r"(-?\d+):(-?\d+)", text):
        return list(range(int(match[1]), int(match[2])))
    if match := re.fullmatch(r"@(.+?\.json):(.+)", text):
        return _values_in_file(entry, Path(match[1]), match[2].split("."))
    if text.startswith("@"):
        raise ValueError(f"--grid {entry!r}: a list in a file is NAME=@FILE.json:KEY.KEY; "
                         "a value that begins with @ is to be quoted")
    with suppress(ValueError, SyntaxError):
        return list(ast.literal_eval(f"({text},)"))
    if "" in text.split(",") or set("\"'[({") & set(text):
        raise ValueError(f"--grid {entry!r}: must be NAME=VALUE,VALUE,...; if one has a comma, "
                         "a quote or a bracket in it, all are to be quoted")
    return [_literal(word.strip()) for word in text.split(",")]


def _values_in_file(entry: str, file: Path, keys: list[str]) -> list:
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            raise ValueError(f"--grid {entry!r}: {key!r} is not in the file")
        values = values[key]
    return list(values)


def _literal(text: str):
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text
