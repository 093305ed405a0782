"""A notebook before it runs: what it is, and the parameters that it takes."""
import ast
import math
from contextlib import suppress
from pathlib import Path

import nbformat

UNKNOWN = object()      # the default of a parameter, where it is not a literal


def open_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook in a file; ValueError, with the path, for anything else and for a notebook of
    another language. One that names no kernel is taken for Python's."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        notebook = nbformat.read(path, as_version=4)
        spec, info = (notebook.metadata.get(name, {}) for name in ("kernelspec", "language_info"))
        language = spec.get("language") or info.get("name") or "python"
        foreign = "python" not in language.lower()
        for cell in notebook.cells:
            cell.cell_type, cell.source.encode(), list(cell.metadata.get("tags", []))
    except Exception as error:      # there are as many kinds as ways to be wrong
        raise ValueError(f"{path}: not a notebook: {error!r:.200}") from error
    if foreign:
        raise ValueError(f"{path}: a notebook of {language}; must be one of Python")
    return notebook


def parameters_of(notebook: nbformat.NotebookNode) -> dict[str, tuple]:
    """Name -> (default, its source) of all that the parameters cell assigns. The default is
    UNKNOWN where it is not a literal, or where an annotation may allow more types than its own.
    SyntaxError if the cell is not Python."""
    parameters = {}
    for statement in _parameters_cell(notebook).body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        annotation, value = getattr(statement, "annotation", None), statement.value
        plain = annotation is None or isinstance(annotation, ast.Name)
        for target in ([statement.target] if isinstance(statement, ast.AnnAssign)
                       else statement.targets):
            known = plain and isinstance(target, ast.Name)
            default = (_literal(value) if known else UNKNOWN, value and ast.unparse(value))
            parameters |= dict.fromkeys(_names(target), default)
    return parameters


def _parameters_cell(notebook: nbformat.NotebookNode) -> ast.Module:
    """The first cell tagged `parameters`, IPython's magics made calls."""
    from IPython.core.inputtransformer2 import TransformerManager
    cells = (c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return ast.parse(TransformerManager().transform_cell(next(cells, "")))


def _names(target: ast.expr) -> list[str]:
    """The names that an assignment to this target binds."""
    return [node.id for node in ast.walk(target)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _literal(node: ast.expr | None):
    with suppress(ValueError, TypeError):
        return ast.literal_eval(node)
    return UNKNOWN


def typed(name: str, value, known: dict[str, tuple], notebook: str):
    """The value as the parameters cell has it; ValueError for a name that is not there, for
    another type than the default's, and for what would not be the same value in the notebook or
    in result.json."""
    if name not in known:
        raise ValueError(f"--grid {name}: not a parameter of {notebook}, which has {sorted(known)}")
    if not _plain(value):
        raise ValueError(f"--grid {name}={value!r}: must be None, True, False, a finite number, a "
                         "string, or a list, tuple or dict (with strings for keys) of these")
    default, source = known[name]
    if default is UNKNOWN or default is None or type(value) is type(default):
        return value
    types = (type(value), type(default))
    if set(types) == {list, tuple} or (types == (int, float) and float(value) == value):
        return type(default)(value)
    raise ValueError(f"--grid {name}={value!r}: must be {type(default).__name__}, "
                     f"as {name} = {source} in {notebook}")


def _plain(value) -> bool:
    """Whether repr writes the value in full, and JSON too, but for tuples."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and _plain(list(value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))
