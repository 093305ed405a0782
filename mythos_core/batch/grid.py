"""From the words of the command line to points of a grid."""
import ast
import json
import re
from contextlib import suppress
from pathlib import Path

MOST = 100_000      # runs of one notebook: each leaves a folder


def parse_grid(entries: list[str]) -> list[dict]:
    """["seed=0:2", "name=a"] -> [{"seed": 0, "name": "a"}, {"seed": 1, "name": "a"}];
    "@FILE.json" gives sets of parameters in place of one parameter's values. ValueError for a
    malformed entry, and for more than MOST points."""
    points, known = [{}], set()
    for entry in entries:
        name, _, text = entry.partition("=")
        if entry.startswith("@"):
            choices = _sets(entry)
        elif name.isidentifier() and (values := _values(entry, text)):
            choices = [{name: value} for value in values]
        else:
            raise ValueError(f"--grid {entry!r}: must be NAME=VALUE,VALUE,... or NAME=FIRST:END or "
                             "@FILE.json, and not empty")
        if twice := known & (names := set().union(*choices)):
            raise ValueError(f"--grid {entry!r}: has {sorted(twice)} again; each name once")
        _check_size(entry, len(points) * len(choices))
        points = [{**point, **choice} for point in points for choice in choices]
        known |= names
    return points


def _check_size(entry: str, size: int):
    if size > MOST:
        raise ValueError(f"--grid {entry!r}: makes {size:,} runs; must be at most {MOST:,}")


def _sets(entry: str) -> list[dict]:
    """The sets of parameters in a file; @FILE.json:KEY.KEY has them at that place."""
    match = re.fullmatch(r"@(.+?\.json)(?::(.+))?", entry)
    if not match:
        raise ValueError(f"--grid {entry!r}: sets of parameters are @FILE.json or "
                         "@FILE.json:KEY.KEY")
    sets = _values_in_file(entry, Path(match[1]), match[2].split(".") if match[2] else [])
    if not sets or not all(isinstance(one, dict) for one in sets):
        raise ValueError(f"--grid {entry!r}: must be a list of objects, a set of parameters each, "
                         "and not empty")
    return sets


def _values(entry: str, text: str) -> list:
    """0:3 is a range; @FILE.json:KEY.KEY the list, or the keys of the object, at that place; else
    literals, or words."""
    if match := re.fullmatch(r"(-?\d+):(-?\d+)", text):
        first, end = int(match[1]), int(match[2])
        _check_size(entry, end - first)
        return list(range(first, end))
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
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--grid {entry!r}: {file} is not JSON: {error}") from error
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            raise ValueError(f"--grid {entry!r}: {key!r} is not in the file")
        values = values[key]
    if not isinstance(values, (list, dict)):
        raise ValueError(f"--grid {entry!r}: must name a list or an object, not {values!r:.80}")
    return list(values)


def _literal(text: str):
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text
