"""The command `mythos batch`."""
import argparse
import os
import re
import shutil
from collections import Counter
from pathlib import Path

from mythos_core.batch.cluster import work
from mythos_core.batch.grid import parse_grid
from mythos_core.batch.plan import Job, check_out, is_ours, plan, state
from mythos_core.batch.record import read
from mythos_core.batch.report import publish, report, reported
from mythos_core.batch.run import sweep


def run(args) -> int:
    """What the command line asks for; 1 if runs have failed."""
    if str(args.notebooks[0]) == "report":
        return _report(args.notebooks[1:])
    _check(args)
    out, notebooks = args.out.resolve(), [notebook.resolve() for notebook in args.notebooks]
    check_out(out, notebooks)
    jobs = plan(notebooks, parse_grid(args.grid), out, _threads(args), args.timeout)
    states = {job.folder.name: "asked for" if args.force else state(job) for job in jobs}
    print("; ".join(f"{count} {status}" for status, count in Counter(states.values()).items()))
    if args.dry_run:
        print("\n".join(f"{name}: {status}" for name, status in states.items()))
        return 0
    sweep(out)
    if todo := [job for job in jobs if states[job.folder.name] != "up to date"]:
        work(todo, args, out)
    if todo or not reported(jobs, out):
        report(out)
    return _conclude(jobs, args.publish)


def _check(args):
    """ValueError for options that cannot be had, or not together."""
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: must be at least 1")
    if args.retries < 0:
        raise ValueError(f"--retries {args.retries}: must be at least 0")
    if args.timeout is not None and args.timeout < 1:
        raise ValueError(f"--timeout {args.timeout}: must be at least 1 second")
    if args.publish and args.grid:
        raise ValueError("--publish takes no --grid")
    if args.slurm and not shutil.which("sbatch"):
        raise ValueError("--slurm: there is no sbatch here")


def _report(folders: list[Path]) -> int:
    """The report of the folder that is named; ValueError if it is none of a batch's runs."""
    if len(folders) != 1:
        raise ValueError(f"report takes one folder, not {len(folders)}")
    out = folders[0].resolve()
    if not is_ours(out):
        raise ValueError(f"report {out}: there are no runs in this folder")
    return report(out) or 0


def _threads(args) -> int:
    """Of a kernel: as the environment has it, or its share of this machine's cores; 0 on a
    cluster, whose workers know theirs. ValueError if the environment has no number of threads."""
    if not (given := os.environ.get("OMP_NUM_THREADS")):
        share = max(1, (os.cpu_count() or 1) // args.workers)
        return 0 if args.scheduler or args.slurm else share
    if not re.fullmatch("[0-9]{1,9}", given) or not int(given):
        raise ValueError(f"OMP_NUM_THREADS = {given!r}: must be a number, at least 1, or not set")
    return int(given)


def _conclude(jobs: list[Job], publishing: bool) -> int:
    """Print what became of the runs, and publish them if that is asked for and all passed."""
    runs = [read(job.folder) for job in jobs]
    for result in runs[:50]:
        print(f"{result['seconds'] or 0:8.1f} s {result['peak_mb'] or 0:6.0f} MB "
              f"{result['claims']:3d} claims  {result['run']}")
    failed = [f"{result['run']}: {result['error']}" for result in runs
              if result["status"] != "passed"]
    for job in jobs if publishing and not failed else ():
        publish(job)
    print("\n".join([f"{len(runs) - len(failed)} passed, {len(failed)} failed", *failed]))
    return 1 if failed else 0


def options(parser: argparse.ArgumentParser):
    """What is to be run, where, and how often."""
    add = parser.add_argument
    add("notebooks", nargs="+", type=Path,
        help="to be run; or `report OUT`, only the report on the runs in OUT")
    add("--grid", action="append", default=[], metavar="NAME=VALUES",
        help="A,B,... or FIRST:END or @FILE.json:KEY.KEY, or @FILE.json in place of NAME=VALUES: a "
             "list of sets of parameters; may be given again")
    add("--out", type=Path, default=Path("build/batch"),
        help="folder of the runs: new, empty, or of a batch before")
    add("--workers", type=int, default=1,
        help="runs at a time; each gets OMP_NUM_THREADS threads, or its share of the cores")
    add("--scheduler", metavar="ADDRESS",
        help="of a dask cluster to use instead, such as tcp://host:8786")
    add("--slurm", metavar="OPTIONS",
        help="Slurm jobs to use instead, such as partition=gpu,cores=8,memory=32GB,jobs=20")
    add("--timeout", type=int, metavar="SECONDS",
        help="for all cells of a run together; one that is not finished then has failed")
    add("--retries", type=int, default=0, help="times that a failing notebook is tried again")
    add("--force", action="store_true", help="run again also what is up to date")
    add("--dashboard", action="store_true", help="print the address of dask's dashboard")
    add("--dry-run", action="store_true", help="list the runs and what there is of them")
    add("--publish", action="store_true",
        help="if all pass, replace the notebooks by their executed copies")
