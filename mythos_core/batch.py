"""Notebooks over a grid of parameters: papermill executes, dask.distributed schedules, on this machine or on a cluster.

    python -m mythos_core.batch NOTEBOOK --grid seed=0:10 --grid name=a,b --workers 2 --out build/sweep
    python -m mythos_core.batch report build/sweep

A run is one notebook with one set of parameters. Its folder in OUT appears whole or not at all: notebook.ipynb as executed, stdout.txt of
its cells, log.txt of its kernel, result.json. A run that passed, with the same notebook and the same core, is not run again.
"""
import argparse
import ast
import hashlib
import json
import logging
import math
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
import psutil
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError
from papermill.translators import PythonTranslator, papermill_translators
from tqdm.auto import tqdm

from mythos_core.provenance import commit

CORE = Path(__file__).parent
MIME = "application/vnd.mythos-core.results+json"
FIELDS = ("status", "error", "results", "claims", "seconds", "peak_mb", "notebook", "parameters", "fingerprint", "command", "commit", "versions")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KERNELS: dict[Path, int | None] = {}         # runs under way in this process: folder, kernel's process id. One that is taken out was stopped


def results(**values):
    """Called in a notebook, declares values as its results, for result.json and the table; a later call adds to an earlier one.

    Numbers, strings, lists, dicts, arrays and tensors; NaN and infinities become null, as JSON has none.
    """
    from IPython.display import display
    plain = json.loads(json.dumps(values, default=lambda value: value.tolist()), parse_constant=lambda name: None)
    display({MIME: plain, "text/plain": "\n".join(f"{name} = {value}" for name, value in plain.items())}, raw=True)


class Job(NamedTuple):
    """One run: a notebook, its folder, its kernel's threads (0: as the worker has them), what result.json
    says of it however it ends, and the most seconds that all its cells may take (None: no limit)."""

    notebook: Path
    folder: Path
    threads: int
    about: dict
    timeout: int | None = None


def parse_grid(entries: list[str]) -> list[dict]:
    """["seed=0:2", "name=a"] -> [{"seed": 0, "name": "a"}, {"seed": 1, "name": "a"}]; ValueError for a malformed entry."""
    points = [{}]
    for entry in entries:
        name, _, text = entry.partition("=")
        if not name.isidentifier() or name in points[0] or not (values := _values(entry, text)):
            raise ValueError(f"--grid {entry!r}: must be NAME=VALUE,VALUE,... or NAME=FIRST:END, each name once, and not empty")
        points = [{**point, name: value} for point in points for value in values]
    return points


def _values(entry: str, text: str) -> list:
    """0:3 is a range; @FILE.json:KEY.KEY the list, or the keys of the object, at that place; else literals, or words."""
    if numbers := re.fullmatch(r"(-?\d+):(-?\d+)", text):
        return list(range(int(numbers[1]), int(numbers[2])))
    if file := re.fullmatch(r"@(.+?\.json):(.+)", text):
        values = json.loads(Path(file[1]).read_text(encoding="utf-8"))
        for key in file[2].split("."):
            if not isinstance(values, dict) or key not in values:
                raise ValueError(f"--grid {entry!r}: {key!r} is not in the file")
            values = values[key]
        return list(values)
    with suppress(ValueError, SyntaxError):
        return list(ast.literal_eval(f"({text},)"))
    if "" in text.split(",") or set("\"'[({") & set(text):
        raise ValueError(f"--grid {entry!r}: must be NAME=VALUE,VALUE,...; if one has a comma, a quote or a bracket in it, all are to be quoted")
    return [_literal(word.strip()) for word in text.split(",")]


def _literal(text: str):
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


UNKNOWN = object()                           # of a default that is not a literal


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
    except Exception as error:                                   # as many kinds as there are ways to be wrong
        raise ValueError(f"{path}: not a notebook: {error!r:.200}") from error
    if foreign:
        raise ValueError(f"{path}: a notebook of {language}; must be one of Python")
    return notebook


def parameters_of(notebook: nbformat.NotebookNode) -> dict[str, tuple]:
    """Name -> (default, its source) of all that the parameters cell assigns. The default is UNKNOWN
    where it is not a literal, or where an annotation may allow more types than its own."""
    found = {}
    for statement in _parameters_cell(notebook).body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        annotation, value = getattr(statement, "annotation", None), statement.value
        for target in getattr(statement, "targets", None) or [statement.target]:
            whole = isinstance(target, ast.Name) and isinstance(annotation, (ast.Name, type(None)))
            for name in ast.walk(target):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    found[name.id] = (_literal_of(value) if whole else UNKNOWN, value and ast.unparse(value))
    return found


def _parameters_cell(notebook: nbformat.NotebookNode) -> ast.Module:
    """The first cell tagged `parameters`, IPython's magics made calls."""
    from IPython.core.inputtransformer2 import TransformerManager
    cells = (c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return ast.parse(TransformerManager().transform_cell(next(cells, "")))


def _literal_of(node: ast.expr | None):
    with suppress(ValueError, TypeError):
        return ast.literal_eval(node)
    return UNKNOWN


def _typed(name: str, value, known: dict, notebook: Path):
    """The value as the parameters cell has it; ValueError for a name that is not there, for another
    type than the default's, and for what would not be the same in the notebook or in result.json."""
    if name not in known:
        raise ValueError(f"--grid {name}: not a parameter of {notebook.name}, which has {sorted(known)}")
    if not _plain(value):
        raise ValueError(f"--grid {name}={value!r}: must be None, True, False, a finite number, a string, or a list, tuple or dict "
                         "(with strings for keys) of these")
    default, source = known[name]
    if default is UNKNOWN or default is None or type(value) is type(default):
        return value
    if {type(value), type(default)} == {list, tuple} or (type(default) is float and type(value) is int and float(value) == value):
        return type(default)(value)
    raise ValueError(f"--grid {name}={value!r}: must be {type(default).__name__}, as {name} = {source} in {notebook.name}")


def _plain(value) -> bool:
    """Whether the source that repr makes of a value, and JSON but for tuples, give the same value again."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and _plain(list(value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def core_hash() -> str:
    """Of the code of this package, the published configurations and the study's variants."""
    return _hash(*(file.read_bytes() for file in [*sorted(CORE.glob("*.py")), CORE / "published.json", CORE / "results" / "variants.json"]))


def plan(notebooks: list[Path], grid: list[dict], out: Path, threads: int, timeout: int | None = None) -> list[Job]:
    """All runs, checked before any starts (papermill itself only warns of an unknown parameter)."""
    jobs, here, core = {}, commit(), core_hash()
    for notebook in notebooks:
        opened = open_notebook(notebook)
        try:
            known = parameters_of(opened)
        except SyntaxError as error:
            raise ValueError(f"{notebook}: its parameters cell is not Python: {error}") from error
        code = _hash(*(cell.source.encode() for cell in opened.cells if cell.cell_type == "code"))
        for point in grid:
            parameters = {name: _typed(name, value, known, notebook) for name, value in point.items()}
            label = re.sub(r"[^\w.=+,-]+", "_", "-".join([notebook.stem, *(f"{k}={v}" for k, v in parameters.items())]), flags=re.ASCII)[:80]
            folder = out / f"{label}-{_hash(_seen_from(out, notebook).encode(), repr(sorted(parameters.items())).encode())}"
            if folder in jobs:
                raise ValueError(f"the run {label} is there twice")
            options = ["--grid " + shlex.quote(f"{k}={v!r}") for k, v in parameters.items()]
            jobs[folder] = Job(notebook, folder, threads, {
                "command": " ".join(["python -m mythos_core.batch", shlex.quote(_seen_from(Path.cwd(), notebook)), *options]), "commit": here,
                "notebook": notebook.name, "parameters": parameters, "fingerprint": {"notebook": code, "core": core}}, timeout)
    return list(jobs.values())


def _seen_from(folder: Path, file: Path) -> str:
    """The way from a folder to a file; the file's full path if there is none, as between two drives."""
    with suppress(ValueError):
        return os.path.relpath(file, folder)
    return str(file)


def run(job: Job) -> dict:
    """Execute a run, with its kernel beside this process, and put its folder in place; whatever the notebook raises is its result.

    OSError: not on this worker, or not in this folder.
    """
    look(job.folder.parent, job.about["fingerprint"]["core"])
    partial, start = beside(job.folder), time.perf_counter()
    try:
        partial.mkdir()
        error, peak = _execute(job, partial)
        return keep(job, partial, error, seconds=time.perf_counter() - start, peak_mb=peak)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def look(out: Path, core: str):
    """Fails where a worker cannot write the folder, or is of another core than the runs are planned with."""
    wrong = f"does not see {out}: share the file system" if not out.is_dir() else f"has another mythos_core: {CORE}" if core_hash() != core else ""
    if wrong:
        raise OSError(f"worker on {platform.node()} {wrong}")
    beside(out / "probe").mkdir(exist_ok=True)
    sweep(out)


def beside(folder: Path) -> Path:
    """Where a run is until it is whole: named by the machine and the process at work on it."""
    return folder.with_name(f"{folder.name}@{platform.node()}@{os.getpid()}.partial")


class Literals(PythonTranslator):
    """Papermill's parameters as Python writes them; its own way makes a string of a tuple."""

    @classmethod
    def translate(cls, value) -> str:
        return repr(value)


papermill_translators.register("python3", Literals)
logging.getLogger("papermill").setLevel(logging.ERROR)           # it warns of parameters that it does not understand; they are checked here


def verbatim(path: Path) -> str:
    """The path as papermill takes it, which fills what is in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _execute(job: Job, folder: Path) -> tuple[BaseException | None, float | None]:
    """What went wrong in the notebook, and its kernel's peak memory. OSError: the folder cannot be written, or the run was stopped."""
    class Kernel(AsyncKernelManager):
        peak = None

        async def start_kernel(self, **options):
            # Dask starts its workers with a setting of glibc's that gives memory back at once. It made kernels take twice as long.
            env = {k: v for k, v in os.environ.items() if k != "MALLOC_TRIM_THRESHOLD_"} | (dict.fromkeys(THREADS, str(job.threads)) if job.threads else {})
            await super().start_kernel(stdout=log, stderr=log, env=env, **options)
            if job.folder not in KERNELS:
                await self.shutdown_kernel(now=True)
                raise InterruptedError("stopped")                # while it started
            KERNELS[job.folder] = self.provisioner.pid

        async def shutdown_kernel(self, *args, **options):
            with suppress(psutil.Error, OSError):
                Kernel.peak = peak_mb(self.provisioner.pid)
            await super().shutdown_kernel(*args, **options)

    KERNELS[job.folder] = None
    until = time.monotonic() + job.timeout if job.timeout else None
    try:
        with open(folder / "stdout.txt", "w", encoding="utf-8") as stdout, open(folder / "log.txt", "wb") as log:
            done = papermill.execute_notebook(
                verbatim(job.notebook), verbatim(folder / "notebook.ipynb"), job.about["parameters"], cwd=str(job.notebook.parent),
                stdout_file=stdout, kernel_name="python3", language="python", kernel_manager_class=Kernel, progress_bar=False,
                timeout_func=until and (lambda cell: max(until - time.monotonic(), 0.01)))
        if any(cell.metadata.papermill.get("exception") for cell in done.cells):     # papermill takes sys.exit(0) for a good end
            return SystemExit("a cell ended the run; those after it did not run"), Kernel.peak
    except CellTimeoutError:
        return TimeoutError(f"not finished after {job.timeout} s"), Kernel.peak
    except Exception as error:                                   # what a cell raised, or a kernel that died
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise
        return error, Kernel.peak
    finally:
        if KERNELS.pop(job.folder, -1) == -1:
            raise InterruptedError("stopped")
    return None, Kernel.peak


def peak_mb(pid: int) -> float:
    """Most memory that a process has held, in MB; where the system does not say, what it holds now."""
    with suppress(OSError):                                      # Linux says it here; psutil knows only Windows' peak
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(peak[1]) / 2 ** 10
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 2 ** 20


def keep(job: Job, partial: Path, error: BaseException | None, **measured) -> dict:
    """Write result.json, with which the folder is whole, and give it its name."""
    notebook = partial / "notebook.ipynb"
    said = error and f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}".strip().splitlines()[0]
    cells = nbformat.read(notebook, 4).cells if notebook.exists() else []
    declared = {k: v for cell in cells for output in cell.get("outputs", []) for k, v in output.get("data", {}).get(MIME, {}).items()}
    result = {"status": "failed" if error else "passed", "error": said, "results": declared, "claims": count_claims(cells), **measured, **job.about,
              "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")}}
    (partial / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(job.folder, ignore_errors=True)
    os.replace(partial, job.folder)
    return result


def count_claims(cells: list) -> int:
    """Lines that begin with PASS in what the cells tagged `claims` printed."""
    printed = (o.get("text", "") for c in cells if "claims" in c.metadata.get("tags", []) for o in c.get("outputs", []))
    return sum(line.startswith("PASS") for text in printed for line in text.splitlines())


def stop(out: Path):
    """Kill the kernels that run for `out` in this process, and what they started; their runs leave
    nothing, also one whose kernel is only about to start."""
    for folder in [folder for folder in KERNELS if folder.parent == out]:
        if pid := KERNELS.pop(folder, None):
            with suppress(psutil.NoSuchProcess):
                kernel = psutil.Process(pid)
                for process in [*kernel.children(recursive=True), kernel]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()


def sweep(out: Path):
    """Remove what dead processes of this machine left."""
    for partial in out.glob("*@*@*.partial"):
        name, host, pid = partial.name.removesuffix(".partial").split("@")
        alive = psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != "zombie" and (int(pid) != os.getpid() or out / name in KERNELS)
        if host == platform.node() and not alive:
            shutil.rmtree(partial, ignore_errors=True)


def read(folder: Path) -> dict:
    """A run's result; of status "unreadable" if there is none, or not a whole one."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {"run": folder.name, **{name: result[name] for name in FIELDS}}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {"run": folder.name, "status": "unreadable", "error": f"no whole result.json: {error!r}", "fingerprint": {}}


def state(job: Job) -> str:
    """What there is of a run: missing, failed, stale and why, or up to date."""
    result = read(job.folder)
    changed = [part for part, value in job.about["fingerprint"].items() if result["fingerprint"].get(part, value) != value]
    return f"stale, {' and '.join(changed)} changed" if changed else {"passed": "up to date", "failed": "failed"}.get(result["status"], "missing")


def connect(args):
    """A dask client with the workers asked for; None: one run after the other in this process, which needs no dask."""
    if args.workers == 1 and not (args.scheduler or args.slurm or args.dashboard):
        return None
    try:
        from distributed import Client
        if args.scheduler or args.slurm:
            return Client(args.scheduler or slurm_cluster(args.slurm, args.dashboard), timeout=20)
    except ImportError as error:
        raise ImportError(f"{error}; to run on more than one worker: pip install distributed dask-jobqueue") from error
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C reaches every process of a terminal; this one alone answers
    client = Client(n_workers=args.workers, threads_per_worker=1, memory_limit=0, dashboard_address=":0" if args.dashboard else None,
                    silence_logs=50, preload=["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"])
    signal.signal(signal.SIGINT, ours)
    return client


def slurm_cluster(text: str, dashboard: bool = False):
    """A dask_jobqueue.SLURMCluster of "partition=gpu,cores=8,memory=32GB,jobs=20": a job runs one notebook at a time on all its cores, or
    `processes` of them. What it has no name for here, such as gres=gpu:1, becomes a line "#SBATCH --gres=gpu:1" of the job."""
    from dask_jobqueue import SLURMCluster
    options = dict(item.partition("=")[::2] for item in text.split(","))
    jobs, cores, processes = (int(options.pop(name, 1)) for name in ("jobs", "cores", "processes"))
    return SLURMCluster(
        n_workers=jobs * processes, cores=cores, processes=processes,
        memory=options.pop("memory", None), interface=options.pop("interface", None), walltime=options.pop("time", None),
        job_extra_directives=[f"--{name}={value}" for name, value in options.items()], worker_extra_args=["--nthreads", "1"],
        job_script_prologue=[f"export {name}={cores // processes}" for name in THREADS], scheduler_options={"dashboard_address": ":0" if dashboard else None})


def outcome(job: Job, future) -> dict:
    """The run's result, also of one that killed each worker it was tried on. OSError: the batch cannot go on."""
    try:
        return future.result()
    except (OSError, ImportError) as error:
        raise OSError(f"{job.folder.parent}: {error}; the runs that finished are kept") from error
    except Exception as error:
        partial = max(job.folder.parent.glob(f"{job.folder.name}@*.partial"), key=os.path.getmtime, default=beside(job.folder))
        partial.mkdir(exist_ok=True)
        return keep(job, partial, error, seconds=None, peak_mb=None)


def follow(jobs: list[Job], client, retries: int):
    """Run all jobs, a failure stopping none of the others.

    Dask is given a run when a worker is free, not before: it counts a worker's death against all runs that were assigned to it, also
    those that only wait there; and so its scheduler holds as many runs as there are workers, however many are to come.
    """
    waiting, flying, done, tries, failed, here = deque(jobs), {}, queue.SimpleQueue(), Counter(), 0, ThreadPoolExecutor(1)
    with tqdm(total=len(jobs), unit="run", smoothing=0) as bar:
        while waiting or flying:
            for job in [waiting.popleft() for _ in range(min((len(client.nthreads()) if client else 1) - len(flying), len(waiting)))]:
                future = client.submit(run, job, key=f"{job.folder.name}-{time.time_ns()}") if client else here.submit(run, job)
                flying[future] = job
                future.add_done_callback(done.put)
            bar.set_postfix_str(f"{failed} failed, {len(flying)} running")
            with suppress(queue.Empty):
                future = done.get(timeout=1)
                job = flying.pop(future)
                failing = outcome(job, future)["status"] == "failed"
                again = failing and tries[job.folder] < retries
                tries[job.folder] += 1
                waiting.extend([job] if again else [])
                failed += failing and not again
                bar.update(not again)
        bar.set_postfix_str(f"{failed} failed")


def finish(client, out: Path):
    """Whatever ended the batch: no kernel goes on, no partial folder stays, and a cluster that was started here is closed."""
    if client:
        with suppress(Exception):                                # a scheduler that is gone has nothing to stop
            client.run(stop, out, on_error="ignore")
        client.close()
    stop(out)
    sweep(out)


def report(out: Path):
    """Table, summary and index of the runs in a folder, by the notebook beside this module."""
    error, _ = _execute(Job(CORE / "report.ipynb", out, 0, {"parameters": {"out": str(out)}}), out)
    print((out / "stdout.txt").read_text(encoding="utf-8") + (f"no report: {error}" if error else f"report in {out / 'index.html'}"))


def reported(jobs: list[Job], out: Path) -> bool:
    """Whether the report is newer than these runs, which are all up to date."""
    page = out / "index.html"
    return page.exists() and max(job.folder.joinpath("result.json").stat().st_mtime for job in jobs) <= page.stat().st_mtime


def publish(job: Job):
    """Put the executed notebook in the place of its source, without what differs from run to run or machine to machine."""
    notebook = nbformat.read(job.folder / "notebook.ipynb", as_version=4)
    for part in [notebook, *notebook.cells]:
        part.metadata = nbformat.from_dict({k: v for k, v in part.metadata.items() if k not in ("papermill", "execution", "widgets")})
    nbformat.write(notebook, job.notebook)


def work(todo: list[Job], args, out: Path):
    """Run what is to be run, on the workers asked for."""
    client = connect(args)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if client:
            client.run(look, out, core_hash())
            if set(client.nthreads().values()) - {1}:
                raise ValueError("workers must have one thread each (dask worker --nthreads 1): papermill is not safe in threads")
            print(f"dashboard: {client.dashboard_link}\n" if args.dashboard else "", end="")
        follow(todo, client, args.retries)
    finally:
        finish(client, out)


def _check(args):
    """ValueError for options that cannot be had, or not together."""
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: must be at least 1")
    if args.timeout is not None and args.timeout < 1:
        raise ValueError(f"--timeout {args.timeout}: must be at least 1 second")
    if args.publish and args.grid:
        raise ValueError("--publish takes no --grid")
    if args.slurm and not shutil.which("sbatch"):
        raise ValueError("--slurm: there is no sbatch here")


def batch(args) -> int:
    """What the command line asks for; the exit code."""
    _check(args)
    out, share = args.out.resolve(), None if args.scheduler or args.slurm else max(1, (os.cpu_count() or 1) // args.workers)
    threads = int(os.environ.get("OMP_NUM_THREADS") or share or 0)
    jobs = plan([notebook.resolve() for notebook in args.notebooks], parse_grid(args.grid), out, threads, args.timeout)
    states = {job.folder.name: state(job) for job in jobs}
    print("; ".join(f"{number} {what}" for what, number in Counter(states.values()).items()))
    if args.dry_run:
        print("\n".join(f"{name}: {what}" for name, what in states.items()))
        return 0
    sweep(out)
    if todo := [job for job in jobs if states[job.folder.name] != "up to date"]:
        work(todo, args, out)
    if todo or not reported(jobs, out):
        report(out)
    runs = [read(job.folder) for job in jobs]
    for result in runs[:50]:
        print(f"{result['seconds'] or 0:8.1f} s {result['peak_mb'] or 0:6.0f} MB {result['claims']:3d} claims  {result['run']}")
    failed = [f"{result['run']}: {result['error']}" for result in runs if result["status"] != "passed"]
    for job in jobs if args.publish and not failed else ():
        publish(job)
    print("\n".join([f"{len(runs) - len(failed)} passed, {len(failed)} failed", *failed]))
    return 1 if failed else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mythos_core.batch", description="Run notebooks over a grid of parameters. `report OUT`: only the report.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=VALUES", help="A,B,... or FIRST:END or @FILE.json:KEY.KEY; may be given again")
    parser.add_argument("--out", type=Path, default=Path("build/batch"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; each gets OMP_NUM_THREADS threads, or its share of the cores")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a dask cluster to use instead, such as tcp://host:8786")
    parser.add_argument("--slurm", metavar="OPTIONS", help="Slurm jobs to use instead, such as partition=gpu,cores=8,memory=32GB,jobs=20")
    parser.add_argument("--timeout", type=int, metavar="SECONDS", help="limit for the cells of a run together; one that is not finished then has failed")
    parser.add_argument("--retries", type=int, default=0, help="times that a failing notebook is tried again")
    parser.add_argument("--dashboard", action="store_true", help="print the address of dask's dashboard")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what there is of them")
    parser.add_argument("--publish", action="store_true", help="if all pass, replace the notebooks by their executed copies")
    args = parser.parse_args(argv)
    try:
        return batch(args) if str(args.notebooks[0]) != "report" else report(args.notebooks[-1].resolve()) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt as stopped:
        parser.exit(stopped.args[0] if stopped.args else 130, "\nstopped; the same command goes on\n")


def _terminate(number: int, frame):
    """SIGTERM ends a batch as Ctrl-C does, with an exit code of its own."""
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    from mythos_core import batch as imported  # what is in __main__ would be sent to workers by value
    sys.exit(imported.main())
