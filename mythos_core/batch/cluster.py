"""Who runs the runs: this process, worker processes, or a cluster's."""
import os
import queue
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from mythos_core.batch.plan import Job
from mythos_core.batch.run import THREADS, beside, keep, look, run, stop, sweep

LOOPBACK = "127.0.0.1"      # where no other machine reaches
THREADED = "it must have one thread (dask worker --nthreads 1): papermill is not safe in threads"


def work(todo: list[Job], args, out: Path):
    """Run what is to be run, on the workers asked for."""
    client = connect(args)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if args.dashboard:
            print(f"dashboard: {_dashboard(client, args)}")
        follow(todo, client, args.retries)
    finally:
        finish(client, out)


def connect(args):
    """A dask client with the workers asked for; None: one run after the other in this process,
    which needs no dask. ImportError, with what to install, if something is missing.

    What is started here takes orders by TLS alone, with certificates that nobody else has: dask's
    plain ports would do for every user of the machine what they are told.
    """
    if args.workers == 1 and not (args.scheduler or args.slurm or args.dashboard):
        return None
    try:
        if args.dashboard and not args.scheduler:
            import bokeh  # noqa: F401      # without it dask's page only asks for it
        return _client(args)
    except ImportError as error:
        raise ImportError(f"{error}; to run on more than one worker, or to see a dashboard: pip "
                          "install dask distributed dask-jobqueue cryptography bokeh") from error


def _client(args):
    from distributed import Client
    if args.scheduler or args.slurm:
        cluster = args.scheduler or slurm_cluster(args.slurm, args.out, args.dashboard)
        return Client(cluster, timeout=20)
    # Ctrl-C reaches every process of a terminal; this one alone answers.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    try:
        return Client(n_workers=args.workers, threads_per_worker=1, memory_limit=0,
                      silence_logs=50, security=True, preload=[ignoring],
                      dashboard_address=f"{LOOPBACK}:0" if args.dashboard else None)
    finally:
        signal.signal(signal.SIGINT, handler)


def _dashboard(client, args) -> str:
    """The dashboard's address; dask names the scheduler's host, also where it is on loopback."""
    if args.scheduler:
        return client.dashboard_link
    return f"http://{LOOPBACK}:{client.scheduler_info()['services']['dashboard']}/status"


def slurm_cluster(text: str, out: Path, dashboard: bool = False):
    """A dask_jobqueue.SLURMCluster of "partition=gpu,cores=8,memory=32GB,jobs=20": a job runs one
    notebook at a time on all its cores, or `processes` of them. What it has no name for here, such
    as gres=gpu:1, becomes a line "#SBATCH --gres=gpu:1" of the job. The workers' certificates are
    in `out` while the cluster is there, to be read by this user alone."""
    from dask_jobqueue import SLURMCluster
    options = dict(item.partition("=")[::2] for item in text.split(","))
    out.mkdir(parents=True, exist_ok=True)
    jobs, cores, processes = (int(options.pop(name, 1)) for name in ("jobs", "cores", "processes"))
    return SLURMCluster(
        n_workers=jobs * processes, cores=cores, processes=processes,
        memory=options.pop("memory", None), interface=options.pop("interface", None),
        walltime=options.pop("time", None), worker_extra_args=["--nthreads", "1"],
        job_extra_directives=[f"--{name}={value}" for name, value in options.items()],
        job_script_prologue=[f"export {name}={cores // processes}" for name in THREADS],
        security=True, shared_temp_directory=str(out.resolve()),
        scheduler_options={"dashboard": dashboard, "dashboard_address": f"{LOOPBACK}:0"})


def follow(jobs: list[Job], client, retries: int):
    """Run all jobs, a failure stopping none of the others. OSError: the first workers cannot.

    Dask is given a run when a worker is free, not before: it counts a worker's death against all
    runs that were assigned to it, also those that only wait there; and so its scheduler holds as
    many runs as there are workers, however many are to come.
    """
    waiting, running, done = deque(jobs), {}, queue.SimpleQueue()
    tries, failed, executor = Counter(), 0, ThreadPoolExecutor(1)
    known: dict[str, bool] = {}
    # None: a bar on a terminal, and in a log a line for each run
    with tqdm(total=len(jobs), unit="run", smoothing=0, disable=None) as bar:
        while waiting or running:
            workers = fitting(client, jobs[0], known) if client else [LOOPBACK]
            while waiting and len(running) < len(workers):
                job = waiting.popleft()
                future = _submit(job, client, executor, workers)
                running[future] = job
                future.add_done_callback(done.put)
            bar.set_postfix_str(f"{failed} failed, {len(running)} running")
            with suppress(queue.Empty):
                future = done.get(timeout=1)
                job = running.pop(future)
                failing = outcome(job, future)["status"] == "failed"
                retrying = failing and tries[job.folder] < retries
                tries[job.folder] += 1
                waiting.extend([job] if retrying else [])
                failed += failing and not retrying
                bar.update(not retrying)
                if bar.disable and not retrying:
                    finished = len(jobs) - len(waiting) - len(running)
                    print(f"{finished}/{len(jobs)} runs, {failed} failed: {job.folder.name}",
                          file=sys.stderr, flush=True)
        bar.set_postfix_str(f"{failed} failed")


def fitting(client, job: Job, known: dict[str, bool]) -> list[str]:
    """The workers that can do runs such as this one. Each is looked at once, when it has joined;
    `known` keeps what was found. One that joins later and cannot is named, and gets no runs.

    OSError: one of the first that there are cannot.
    """
    threads, first = client.nthreads(), not any(known.values())
    if new := [address for address in threads if address not in known]:
        looked = client.run(look, job.folder.parent, job.about["fingerprint"]["core"],
                            workers=new, on_error="return")
        for address in new:
            fault = looked.get(address) or (THREADED if threads[address] > 1 else None)
            if fault and first:
                raise OSError(f"worker at {address}: {fault}")
            if fault:
                tqdm.write(f"no runs for the worker at {address}: {fault}", file=sys.stderr)
            known[address] = not fault
    return [address for address in threads if known[address]]


def _submit(job: Job, client, executor: ThreadPoolExecutor, workers: list[str]):
    """A future of the run, on one of the workers or in this process; each try has a key of its
    own. If those workers end, it goes to one that has come in their place."""
    if client:
        return client.submit(run, job, key=f"{job.folder.name}-{time.time_ns()}",
                             workers=workers, allow_other_workers=True)
    return executor.submit(run, job)


def outcome(job: Job, future) -> dict:
    """The run's result, also of one that killed each worker it was tried on. OSError: the batch
    cannot go on."""
    try:
        return future.result()
    except (OSError, ImportError) as error:
        raise OSError(f"{job.folder.parent}: {error}; the runs that finished are kept") from error
    except Exception as error:
        partials = job.folder.parent.glob(f"{job.folder.name}@*.partial")
        partial = max(partials, key=_how_far, default=beside(job.folder))
        partial.mkdir(exist_ok=True)
        return keep(job, partial, error, seconds=None, peak_mb=None)


def _how_far(partial: Path) -> tuple[bool, float]:
    """The latest try that came to a notebook is the one to show."""
    return (partial / "notebook.ipynb").exists(), os.path.getmtime(partial)


def finish(client, out: Path):
    """Whatever ended the batch: no kernel goes on, no partial folder stays, and a cluster that was
    started here is closed."""
    if client:
        with suppress(Exception):       # a scheduler that is gone has nothing to stop
            client.run(stop, out, on_error="ignore")
        client.close()
    stop(out)
    sweep(out)
