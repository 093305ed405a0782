"""One run: its kernel, and its folder."""
import json
import logging
import os
import platform
import re
import shutil
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError
from papermill.translators import PythonTranslator, papermill_translators

from mythos_core.batch.plan import CORE, Job, core_hash
from mythos_core.batch.record import count_claims, declared

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Runs under way in this process: folder, kernel's process id. One that is taken out was stopped.
KERNELS: dict[Path, int | None] = {}


class Literals(PythonTranslator):
    """Parameters as Python writes them; papermill's own way makes a string of a tuple."""

    @classmethod
    def translate(cls, value) -> str:
        return repr(value)


papermill_translators.register("python3", Literals)

# nbclient's words for a kernel that ends as it starts. Ports are chosen before they are taken, so
# of many kernels that start together one may find its own taken.
NO_START = "Kernel died before replying to kernel_info"
# It warns of parameters that it cannot find in the cell; `plan` has looked for them.
logging.getLogger("papermill").setLevel(logging.ERROR)


def run(job: Job) -> dict:
    """Execute a run, with its kernel beside this process, and put its folder in place; whatever
    the notebook raises is its result.

    OSError: not on this worker, or not in this folder.
    """
    look(job.folder.parent, job.about["fingerprint"]["core"])
    partial, start = beside(job.folder), time.perf_counter()
    try:
        partial.mkdir()
        error, peak = execute(job, partial)
        return keep(job, partial, error, seconds=time.perf_counter() - start, peak_mb=peak)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def look(out: Path, core: str):
    """OSError where a worker cannot write the folder, or is of another core than the runs are
    planned with."""
    if not out.is_dir():
        raise OSError(f"worker on {platform.node()} does not see {out}: share the file system")
    if core_hash() != core:
        raise OSError(f"worker on {platform.node()} has another mythos_core: {CORE}")
    beside(out / "probe").mkdir(exist_ok=True)
    sweep(out)


def beside(folder: Path) -> Path:
    """Where a run is until it is whole: named by the machine and the process at work on it."""
    return folder.with_name(f"{folder.name}@{platform.node()}@{os.getpid()}.partial")


def execute(job: Job, folder: Path) -> tuple[BaseException | None, float | None]:
    """What went wrong in the notebook, and its kernel's peak memory in MB.

    OSError: the folder cannot be written, or the run was stopped.
    """
    KERNELS[job.folder] = None
    try:
        with open(folder / "stdout.txt", "w", encoding="utf-8") as stdout, \
                open(folder / "log.txt", "wb") as log:
            manager = _kernel_manager(job, log)
            error = _papermill(job, folder / "notebook.ipynb", stdout, manager)
            if str(error).startswith(NO_START):                  # no cell ran: once more
                error = _papermill(job, folder / "notebook.ipynb", stdout, manager)
        return error, manager.peak
    finally:
        if KERNELS.pop(job.folder, -1) == -1:
            raise InterruptedError("stopped")


def _kernel_manager(job: Job, log) -> Any:
    """Starts the run's kernel, with its log and its threads, and looks at its memory at the end."""
    # Dask sets a switch of glibc's that gives memory back at once: kernels took twice as long.
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_TRIM_THRESHOLD_"}
    environment |= dict.fromkeys(THREADS, str(job.threads)) if job.threads else {}

    class Manager(AsyncKernelManager):
        peak = None
        # of this Python, whose versions are recorded, whatever "python3" is registered elsewhere
        kernel_spec = KernelSpec(**get_kernel_dict())

        async def start_kernel(self, **options):
            await super().start_kernel(stdout=log, stderr=log, env=environment, **options)
            if job.folder not in KERNELS:
                await self.shutdown_kernel(now=True)
                raise InterruptedError("stopped while it started")
            KERNELS[job.folder] = self.provisioner.pid

        async def shutdown_kernel(self, *args, **options):
            started = []
            with suppress(psutil.Error, OSError):
                if pid := KERNELS.get(job.folder):
                    started = psutil.Process(pid).children(recursive=True)
                    Manager.peak = peak_mb(pid)
            await super().shutdown_kernel(*args, **options)
            _kill(started)      # in sessions of their own they outlive their kernel

    return Manager


def _papermill(job: Job, executed: Path, stdout, manager) -> BaseException | None:
    """Execute a notebook; what a cell raised, or that its kernel died, or that it took too long."""
    deadline = time.monotonic() + job.timeout if job.timeout else None
    try:
        notebook = papermill.execute_notebook(
            verbatim(job.notebook), verbatim(executed), job.about["parameters"],
            cwd=str(job.notebook.parent), stdout_file=stdout, kernel_name="python3",
            language="python", kernel_manager_class=manager, progress_bar=False,
            timeout_func=deadline and (lambda cell: max(deadline - time.monotonic(), 0.01)))
    except CellTimeoutError:
        return TimeoutError(f"not finished after {job.timeout} s")
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise
        return error
    # Papermill takes sys.exit(0) for a good end.
    if any(cell.metadata.papermill.get("exception") for cell in notebook.cells):
        return SystemExit("a cell ended the run; those after it did not run")
    return None


def verbatim(path: Path) -> str:
    """The path as papermill takes it, which fills what is in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def peak_mb(pid: int) -> float:
    """Most memory that a process has held, in MB; where the system does not say, what it holds
    now."""
    with suppress(OSError):     # Linux says it here; psutil knows only Windows' peak
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        if match := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(match[1]) / 2 ** 10
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 2 ** 20


def keep(job: Job, partial: Path, error: BaseException | None, **measured) -> dict:
    """Write result.json, with which the folder is whole, and give it its name."""
    notebook = partial / "notebook.ipynb"
    cells = nbformat.read(notebook, 4).cells if notebook.exists() else []
    result = {"status": "failed" if error else "passed", "error": error and _error_line(error),
              "results": declared(cells), "claims": count_claims(cells), **measured, **job.about,
              "versions": {"python": platform.python_version(), "torch": version("torch"),
                           "numpy": version("numpy")}}
    (partial / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(job.folder, ignore_errors=True)
    os.replace(partial, job.folder)
    return result


def _error_line(error: BaseException) -> str:
    """The first line with something in it of what was raised, in a cell or outside."""
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    return f"{kind}: {str(text).strip()}".splitlines()[0].strip()


def stop(out: Path):
    """Kill the kernels that run for `out` in this process, and what they started; their runs leave
    nothing, also one whose kernel is only about to start."""
    for folder in [folder for folder in KERNELS if folder.parent == out]:
        if pid := KERNELS.pop(folder, None):
            with suppress(psutil.NoSuchProcess):
                kernel = psutil.Process(pid)
                _kill([*kernel.children(recursive=True), kernel])


def _kill(processes: list[psutil.Process]):
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def sweep(out: Path):
    """Remove what dead processes of this machine left."""
    for partial in out.glob("*@*@*.partial"):
        name, host, pid = partial.name.removesuffix(".partial").split("@")
        if host == platform.node() and not _at_work(int(pid), out / name):
            shutil.rmtree(partial, ignore_errors=True)


def _at_work(pid: int, folder: Path) -> bool:
    """Whether a process may still be executing the run of a folder."""
    if pid == os.getpid():
        return folder in KERNELS
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
