"""What is recorded of a run: declared by its notebook, and read again from its folder."""
import datetime
import json
import os
from pathlib import Path

MIME = "application/vnd.mythos-core.results+json"
FIELDS = ("status", "error", "results", "claims", "seconds", "peak_mb", "notebook", "parameters",
          "fingerprint", "command", "commit", "versions")


def results(**values):
    """Called in a notebook, declares values as its results, for result.json and the table; a later
    call adds to an earlier one.

    Numbers, strings, lists, dicts, arrays and tensors; a data frame as a dict of its columns, a
    set as a sorted list, a path and a date as strings. NaN and infinities become null, as JSON has
    none. TypeError, with the name, for a value of another kind.
    """
    from IPython.display import display
    plain = {name: _as_json(name, value) for name, value in values.items()}
    lines = "\n".join(f"{name} = {value}" for name, value in plain.items())
    display({MIME: plain, "text/plain": lines}, raw=True)


def _as_json(name: str, value):
    try:
        return json.loads(json.dumps(value, default=_plain), parse_constant=lambda word: None)
    except (TypeError, ValueError) as error:
        raise TypeError(f"results({name}=...) cannot be recorded: {error}; must be a number, a "
                        "string, a list or dict, an array, tensor or data frame, a set, a path or "
                        "a date") from error


def _plain(value):
    """What JSON has no word for as something that it has."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict("list")
    raise TypeError(f"{type(value).__name__} {value!r:.80}")


def declared(cells: list) -> dict:
    """What the cells of an executed notebook declared by `results`."""
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    return {k: v for output in outputs for k, v in output.get("data", {}).get(MIME, {}).items()}


def count_claims(cells: list) -> int:
    """Lines that begin with PASS in what the cells tagged `claims` printed."""
    claims = (cell for cell in cells if "claims" in cell.metadata.get("tags", []))
    printed = (output.get("text", "") for cell in claims for output in cell.get("outputs", []))
    return sum(line.startswith("PASS") for text in printed for line in text.splitlines())


def read(folder: Path) -> dict:
    """A run's result; of status "unreadable" if there is none, or not a whole one."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {"run": folder.name, **{name: result[name] for name in FIELDS}}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {"run": folder.name, "status": "unreadable",
                "error": f"no whole result.json: {error!r}", "fingerprint": {}}
