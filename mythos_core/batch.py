"""Notebooks by papermill: many, over a grid of parameters, several at a time.

    python -m mythos_core.batch notebooks/05_depth_extrapolation.ipynb --grid seed=0,1,2 --workers 2 --out build/sweep
"""
import argparse
import ast
import itertools
import multiprocessing
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import papermill
from tqdm.auto import tqdm


@dataclass
class Job:
    """One notebook with one set of parameters, and how it went."""

    notebook: Path
    output: Path
    parameters: dict = field(default_factory=dict)
    threads: int = 1
    seconds: float = 0.0
    peak_mb: float = 0.0
    claims: int = 0
    error: str = ""


def parse_grid(entries: list[str]) -> list[dict]:
    """["seed=0,1", "name=a"] -> [{"seed": 0, "name": "a"}, {"seed": 1, "name": "a"}]; ValueError for a malformed entry."""
    axes = {}
    for entry in entries:
        name, _, values = entry.partition("=")
        if not name.isidentifier() or not values or "" in values.split(","):
            raise ValueError(f"--grid {entry!r}: must be NAME=VALUE,VALUE,...")
        axes[name] = [_literal(value) for value in values.split(",")]
    return [dict(zip(axes, point)) for point in itertools.product(*axes.values())]


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def plan(notebooks: list[Path], grid: list[dict], out: Path, threads: int) -> list[Job]:
    """The jobs, after checking that the notebooks exist and know the parameters (papermill itself only warns)."""
    for notebook in notebooks:
        if not notebook.is_file():
            raise ValueError(f"notebook {notebook}: no such file")
        known = papermill.inspect_notebook(str(notebook))
        for name in grid[0]:
            if name not in known:
                raise ValueError(f"--grid {name}: not a parameter of {notebook.name}, which has {sorted(known)}")
    return [Job(notebook, out / ("-".join([notebook.stem, *(f"{k}={v}" for k, v in point.items())]) + ".ipynb"), point, threads)
            for notebook in notebooks for point in grid]


def run(job: Job) -> Job:
    """Execute one job, in a process of its own: then the peak memory of its children is that of this kernel.

    What kernel and papermill write to stderr goes to a .log beside the executed notebook.
    """
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    with open(job.output.with_suffix(".log"), "wb") as log:
        os.dup2(log.fileno(), 2)
    start = time.perf_counter()
    try:
        papermill.execute_notebook(str(job.notebook), str(job.output), job.parameters, cwd=str(job.notebook.parent),
                                   kernel_name="python3", progress_bar=False)
    except Exception as error:                               # whatever a notebook raises is a result of this job, not the end of the others
        job.error = str(error).strip().splitlines()[-1]
    job.seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    job.peak_mb = peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    job.claims = count_claims(job.output) if job.output.exists() else 0
    return job


def count_claims(notebook: Path) -> int:
    """Lines that begin with PASS in what the cells tagged `claims` printed."""
    cells = nbformat.read(notebook, as_version=4).cells
    printed = (o.get("text", "") for c in cells if "claims" in c.metadata.get("tags", []) for o in c.get("outputs", []))
    return sum(line.startswith("PASS") for text in printed for line in text.splitlines())


def table(jobs: list[Job]) -> str:
    """A line for each job: name, seconds, peak memory, claims, and the error of a failed one."""
    width = max(len(job.output.stem) for job in jobs)
    lines = [f"{'notebook':{width}}  seconds  peak MB  claims"]
    for job in jobs:
        lines.append(f"{job.output.stem:{width}}  {job.seconds:7.1f}  {job.peak_mb:7.0f}  {job.claims:6d}" + (f"  FAILED: {job.error}" if job.error else ""))
    return "\n".join(lines)


def run_all(jobs: list[Job], workers: int) -> list[Job]:
    """All jobs, `workers` at a time, a failure stopping none of the others; in the order given."""
    done = {}
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool, tqdm(total=len(jobs), desc="notebooks", unit="notebook") as bar:
        for job in pool.imap_unordered(run, jobs):
            done[job.output] = job
            bar.set_postfix_str(job.output.stem + (" FAILED" if job.error else ""))
            bar.update()
    return [done[job.output] for job in jobs]


def publish(job: Job):
    """Put the executed notebook in the place of its source, without what differs from run to run or machine to machine."""
    notebook = nbformat.read(job.output, as_version=4)
    for part in [notebook, *notebook.cells]:
        for name in ("papermill", "execution", "widgets"):
            part.metadata.pop(name, None)
    nbformat.write(notebook, job.notebook)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mythos_core.batch", description="Run notebooks over a grid of parameters.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=A,B,...", help="values of a notebook parameter; may be given again")
    parser.add_argument("--workers", type=int, default=1, help="notebooks at a time; each gets OMP_NUM_THREADS threads, or its share of the cores")
    parser.add_argument("--out", type=Path, default=Path("build/batch"), help="folder for the executed notebooks")
    parser.add_argument("--publish", action="store_true", help="if all pass, replace the notebooks by their executed copies")
    args = parser.parse_args(argv)
    try:
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers}: must be at least 1")
        if args.publish and args.grid:
            raise ValueError("--publish takes no --grid: a notebook is published as it stands")
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.workers))
        jobs = plan([n.resolve() for n in args.notebooks], parse_grid(args.grid), args.out.resolve(), threads)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    jobs = run_all(jobs, args.workers)
    print(table(jobs))
    failed = sum(bool(job.error) for job in jobs)
    if args.publish and not failed:
        for job in jobs:
            publish(job)
    print(f"{len(jobs) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
