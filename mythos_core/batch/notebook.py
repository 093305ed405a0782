"""A notebook before it runs: what it is, and the parameters that it takes."""
import ast
import math
from collections.abc import Collection
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
    """The first cell tagged `parameters`."""
    cells = (c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return _parsed(next(cells, ""))


def _parsed(source: str) -> ast.Module:
    """A cell's code, IPython's magics made calls."""
    from IPython.core.inputtransformer2 import TransformerManager
    return ast.parse(TransformerManager().transform_cell(source))


def check_derived(given: Collection[str], notebook: nbformat.NotebookNode, path: Path):
    """ValueError if the parameters cell computes another name from one that is given: the cell
    runs before the given values are put in place, so that name would keep the default's value."""
    stale = dict.fromkeys(given, "")
    for statement in _parameters_cell(notebook).body:
        stored = _assigned(statement) - set(given)
        if _read(statement) & set(stale):
            stale |= dict.fromkeys(stored, ast.unparse(statement).splitlines()[0])
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            stale = {name: source for name, source in stale.items() if name not in stored}
    if name := next((name for name in stale if name not in given), None):
        raise ValueError(f"--grid {', '.join(given)}: the parameters cell of {path.name} computes "
                         f"{name} from the defaults ({stale[name]}), so it would not follow; "
                         f"compute {name} in a later cell, or give it too")


def _assigned(statement: ast.stmt) -> set[str]:
    """The names that a statement binds, or whose items or attributes it sets."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    parts = list(ast.walk(statement))
    of_comprehensions = {node for part in parts if isinstance(part, ast.comprehension)
                         for node in ast.walk(part.target)}
    targets = [part for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)
               and part not in of_comprehensions]
    return {root.id for root in map(_root, targets) if isinstance(root, ast.Name)}


def _root(target: ast.AST) -> ast.AST:
    """d of d["k"].x, which is what an assignment to that changes."""
    while isinstance(target, (ast.Subscript, ast.Attribute)):
        target = target.value
    return target


def _read(node: ast.AST) -> set[str]:
    """The names that a statement reads as it runs; the body of a function reads later."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return _read(node.args)
    here = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else set()
    return here.union(*map(_read, ast.iter_child_nodes(node)))


def modules_of(notebook: nbformat.NotebookNode, folder: Path) -> list[Path]:
    """The Python files in the notebook's folder that its cells import, and those that they do."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    waiting, found = set().union(*map(_imported, cells)), set()
    while waiting:
        name = waiting.pop()
        for file in {folder / f"{name}.py", *(folder / name).rglob("*.py")} - found:
            if file.is_file():
                found.add(file)
                waiting |= _imported(file.read_text(encoding="utf-8", errors="replace"))
    return sorted(found)


def _imported(source: str) -> set[str]:
    """First parts of the modules that code imports; none of code that is not Python's."""
    with suppress(SyntaxError, ValueError):
        nodes = list(ast.walk(_parsed(source)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import)
                 for alias in node.names]
        names += [node.module for node in nodes
                  if isinstance(node, ast.ImportFrom) and node.module and not node.level]
        return {name.partition(".")[0] for name in names}
    return set()


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
