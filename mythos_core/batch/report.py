"""What is made of a batch's runs: a report, and published notebooks."""
from pathlib import Path

import nbformat

from mythos_core.batch.plan import CORE, Job
from mythos_core.batch.run import execute


def report(out: Path):
    """Table, summary and index of the runs in a folder, by mythos_core/batch/report.ipynb."""
    about = {"parameters": {"out": str(out)}}
    error, _ = execute(Job(CORE / "batch" / "report.ipynb", out, 0, about), out)
    print((out / "stdout.txt").read_text(encoding="utf-8"), end="")
    print(f"no report: {error}" if error else f"report in {out / 'index.html'}")


def reported(jobs: list[Job], out: Path) -> bool:
    """Whether the report is newer than these runs, which are all up to date."""
    page = out / "index.html"
    newest = max((job.folder / "result.json").stat().st_mtime for job in jobs)
    return page.exists() and newest <= page.stat().st_mtime


def publish(job: Job):
    """Put what the executed notebook's cells gave into its source, without what differs from run to
    run or machine to machine. The prose stays the source's, which may be newer than the run: a run
    is up to date as long as the code is the same."""
    source, ran = (nbformat.read(path, as_version=4)
                   for path in (job.notebook, job.folder / "notebook.ipynb"))
    code, executed = ([cell for cell in notebook.cells if cell.cell_type == "code"]
                      for notebook in (source, ran))
    for cell, done in zip(code, executed, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    source.metadata = ran.metadata
    for part in [source, *source.cells]:
        metadata = {k: v for k, v in part.metadata.items()
                    if k not in ("papermill", "execution", "widgets")}
        part.metadata = nbformat.from_dict(metadata)
    nbformat.write(source, job.notebook)
