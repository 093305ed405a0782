"""All runs of a batch, and what there is of each."""
import hashlib
import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mythos_core.batch.notebook import (
    check_derived,
    modules_of,
    open_notebook,
    parameters_of,
    typed,
)
from mythos_core.batch.record import read
from mythos_core.provenance import commit

CORE = Path(__file__).parent.parent


class Job(NamedTuple):
    """One run: a notebook, its folder, its kernel's threads (0: as the worker has them), what
    result.json says of it however it ends, and the most seconds that all its cells may take
    together (None: no limit)."""

    notebook: Path
    folder: Path
    threads: int
    about: dict
    timeout: int | None = None


def core_hash() -> str:
    """Of the code of this package, the published configurations and the study's variants."""
    files = [*sorted(CORE.rglob("*.py")), CORE / "model" / "published.json",
             CORE / "study" / "variants.json"]
    return _hash(*(file.read_bytes() for file in files))


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def is_ours(out: Path) -> bool:
    """Whether a folder has a batch's runs in it, whole or under way, or its workers' keys."""
    return any(next(out.glob(pattern), None) for pattern in
               ("*-" + 8 * "[0-9a-f]" + "/result.json", "*@*@*.partial", ".dask-jobqueue.*"))


def check_out(out: Path, notebooks: list[Path]):
    """ValueError for a folder where a batch would replace what is not its own."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: must be a folder")
    if out.exists() and any(out.iterdir()) and not is_ours(out):
        raise ValueError(f"--out {out}: must be a new or empty folder, or one of a batch's runs; "
                         "this one has other files in it")
    for notebook in notebooks:
        if out in notebook.parents:
            raise ValueError(f"--out {out}: must not have the notebook {notebook} in it, since a "
                             "batch replaces files there")


def plan(notebooks: list[Path], grid: list[dict], out: Path, threads: int,
         timeout: int | None = None) -> list[Job]:
    """All runs, checked before any starts. ValueError for a notebook that cannot be run, and for
    a parameter or a value that it does not take."""
    jobs, revision, core = {}, commit(), core_hash()
    for notebook in notebooks:
        known, fingerprint = _look_into(notebook, {frozenset(point) for point in grid})
        for point in grid:
            parameters = {name: typed(name, value, known, notebook.name)
                          for name, value in point.items()}
            folder = _folder(out, notebook, parameters)
            if folder in jobs:
                raise ValueError(f"the run {folder.name} is there twice")
            jobs[folder] = Job(notebook, folder, threads, {
                "command": _command(notebook, parameters), "commit": revision,
                "notebook": notebook.name, "parameters": parameters,
                "fingerprint": {**fingerprint, "core": core}}, timeout)
    return list(jobs.values())


def _look_into(path: Path, given: set[frozenset]) -> tuple[dict[str, tuple], dict[str, str]]:
    """A notebook's parameters, of which these are given together, and the hashes of its code and
    of the modules beside it."""
    notebook = open_notebook(path)
    code = (cell.source.encode() for cell in notebook.cells if cell.cell_type == "code")
    modules = (file.read_bytes() for file in modules_of(notebook, path.parent))
    try:
        parameters = parameters_of(notebook)
    except SyntaxError as error:
        raise ValueError(f"{path}: its parameters cell is not Python: {error}") from error
    for names in given:
        check_derived(sorted(names & set(parameters)), notebook, path)
    return parameters, {"notebook": _hash(*code), "modules": _hash(*modules)}


def _folder(out: Path, notebook: Path, parameters: dict) -> Path:
    """The folder of a run. Notebooks of one name have other data beside them in other places, so
    where they lie is in the hash."""
    label = "-".join([notebook.stem, *(f"{k}={v}" for k, v in parameters.items())])
    label = re.sub(r"[^\w.=+,-]+", "_", label, flags=re.ASCII)[:80]
    values = repr(sorted(parameters.items()))
    return out / f"{label}-{_hash(_seen_from(out, notebook).encode(), values.encode())}"


def _command(notebook: Path, parameters: dict) -> str:
    """What makes this run alone, from the folder where the batch was started."""
    path = shlex.quote(_seen_from(Path.cwd(), notebook))
    options = ["--grid " + shlex.quote(f"{name}={value!r}") for name, value in parameters.items()]
    return " ".join(["mythos batch", path, *options])


def _seen_from(folder: Path, file: Path) -> str:
    """The way from a folder to a file; the file's full path if there is none, as between two
    drives."""
    with suppress(ValueError):
        return os.path.relpath(file, folder)
    return str(file)


def state(job: Job) -> str:
    """What there is of a run: missing, failed, stale and why, or up to date."""
    result = read(job.folder)
    recorded = result["fingerprint"]
    changed = [part for part, value in job.about["fingerprint"].items()
               if recorded.get(part, value) != value]
    if changed:
        return f"stale, {' and '.join(changed)} changed"
    return {"passed": "up to date", "failed": "failed"}.get(result["status"], "missing")
