"""The table of a run of the bench."""
import json
import statistics
from dataclasses import asdict, dataclass

import machine

from mythos_core import figures, provenance


@dataclass(frozen=True)
class Row:
    """One line. `ratio` is the reference over ours: the median over pairs of runs, between their
    quartiles `low` and `high`."""

    work: str
    device: str
    threads: int
    unit: str                       # of `reference`, `ours` and `floor`
    reference: float | None         # median; None: the reference cannot do it
    ours: float                     # median
    ratio: float | None
    low: float | None
    high: float | None
    # the least that `ratio` is to be, or, without a reference, the most that `ours` is to be; None:
    # nothing is asked
    bar: float | None
    floor: float | None             # below which `ours` cannot be on this machine; None: not a time
    warm_up: float | None = None    # seconds of the first two calls of ours, if it compiles

    @classmethod
    def of(cls, work, device, threads, unit, theirs: list, ours: list, bar, floor=None,
           warm_up=None):
        """From what each run gave; `theirs` and `ours` pair by pair, or `theirs` empty."""
        ratios = [their / our for their, our in zip(theirs, ours)]
        low, ratio, high = (statistics.quantiles(ratios, n=4) if len(ratios) > 1
                            else (ratios or [None]) * 3)
        return cls(work, device, threads, unit, statistics.median(theirs) if theirs else None,
                   statistics.median(ours), ratio, low, high, bar, floor, warm_up)

    @property
    def reached(self) -> bool:
        return (self.bar is None or (self.ours <= self.bar if self.ratio is None
                                     else self.ratio >= self.bar))


def write(rows: list[Row], device: str, name: str):
    """NAME.json, numbers to 4 digits. The first table is this run's; those of other processors
    come after it."""
    def plain(row):
        return {key: float(f"{value:.4g}") if isinstance(value, float) else value
                for key, value in row.items()}
    made = {"machine": machine.description(device), "commit": provenance.commit(),
            "rows": [{**plain(asdict(row)), "reached": row.reached} for row in rows]}
    figures.folder().mkdir(parents=True, exist_ok=True)
    path = figures.folder() / f"{name}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [table for table in kept if table["machine"]["cpu"] != made["machine"]["cpu"]]
    path.write_text(json.dumps([made, *kept], indent=1) + "\n", encoding="utf-8")
