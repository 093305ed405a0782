"""What holds a notebook to its own run, beside nbval's cells: its exercises are solved in its
kernel, its figures compared with the committed ones.

A pytest plugin. nbval makes an item of each code cell; behind the last one of a notebook come an
item for each exercise, and one for its figures.

Rounding alone makes another model of a training within some hundred steps. So numbers are compared
where they were made: `make publish` leaves in figures/arithmetic.txt what this module prints, and
where that differs, figures have to agree in names, shapes and words only.
"""
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections import defaultdict
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import cpuinfo
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.testing.compare import compare_images
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell, IPyNbFile

#: What stands before an exercise's stub: the task, and behind a fold the code that solves it.
EXERCISE = re.compile(r"### Exercise (\d+ · .*?)<details><summary>Solution</summary>\s*"
                      r"```python\n(.*?)```.*</details>", re.S)
TOLERANCE = 0.02  # of a number, or of the mean size of a list's numbers
PICTURE = 2  # root mean square over pixels, of 255


class Exercise(NamedTuple):
    """One of a notebook's exercises: what it asks, the cell with its test and a stub to fill, and
    the folded solution, which calls the test."""

    task: str
    stub: str
    solution: str

    @property
    def trains(self) -> bool:
        return "training" in self.task


def exercises(notebook) -> list[Exercise]:
    """Those that are whole: a task with a folded solution, and behind it a stub."""
    return [Exercise(match[1].strip(), stub.source, match[2].strip())
            for cell, stub in pairwise(notebook.cells)
            if "exercise" in stub.metadata.get("tags", [])
            and (match := EXERCISE.fullmatch(cell.source.strip()))]


def names_saved(source: str) -> list[str]:
    """Figures that some code saves."""
    return re.findall(r'figures\.save\(\s*\w+,\s*"(\w+)"', source)


@cache
def arithmetic() -> str:
    """What decides how sums are rounded and pictures drawn. Of the processor a hash, since only its
    being the same matters; several share a name."""
    found = cpuinfo.get_cpu_info()
    kind = str([found.get(key) for key in ("brand_raw", "family", "model", "stepping")])
    processor = hashlib.sha256(kind.encode()).hexdigest()[:8]
    versions = [f"{package.__name__} {package.__version__}"
                for package in (torch, np, matplotlib)]
    told = [f"{name} {os.environ[name]}"
            for name in ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
            if name in os.environ]
    return ", ".join([*versions, torch.backends.cpu.get_cpu_capability(),
                      f"processor {processor}", f"threads {torch.get_num_threads()}", *told])


def differences(committed, fresh, where="", here=True) -> list[str]:
    """Places where two figures' JSON differ. Names that end in `seconds` are times, which no two
    runs share. Numbers, those in words too, are compared if the two were made `here`, by the same
    arithmetic: by another, a training may take more steps or, which None says, not get there."""
    if where.endswith("seconds"):
        return []
    if isinstance(committed, dict) and isinstance(fresh, dict) and committed.keys() == fresh.keys():
        return [line for key in committed for line in differences(committed[key], fresh[key],
            f"{where}/{key}", here)]
    if isinstance(committed, list) and isinstance(fresh, list) and len(committed) == len(fresh):
        if not here or not all(isinstance(value, (int, float)) for value in [*committed, *fresh]):
            return [line for i, pair in enumerate(zip(committed, fresh))
                    for line in differences(*pair, f"{where}/{i}", here)]
        off, size = (np.abs(x).sum() for x in (np.subtract(committed, fresh, dtype=float),
                                               committed))
        return ([] if off <= TOLERANCE * size
                else [f"{where}: off by {off / len(committed):.3g} in the mean"])
    if not here:
        committed, fresh = ("a number" if isinstance(x, (int, float, type(None)))
                            else re.sub(r"\d[\d.,]*", "#", str(x)) for x in (committed, fresh))
    if isinstance(committed, float) and isinstance(fresh, (int, float)) and abs(committed
        - fresh) <= TOLERANCE * abs(committed):
        return []
    return ([] if committed == fresh and type(committed) is type(fresh)
            else [f"{where}: {str(committed)[:60]} committed, {str(fresh)[:60]} in a fresh run"])


def stale(name: str, committed: Path, fresh: Path, here=True) -> list[str]:
    """What of a committed figure a fresh run does not bear out: its numbers, its picture."""
    if not (fresh / f"{name}.json").exists():
        return [f"{name}: not made"]
    pair = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for folder in (committed, fresh))
    lines = differences(*pair, name, here)
    picture = (compare_images(str(committed / f"{name}.png"), str(fresh / f"{name}.png"),
                              tol=PICTURE) if here else None)
    return lines + ([f"{name}.png: {picture}"] if picture else [])


def figures_of(notebook) -> list[str]:
    return names_saved("\n".join(cell.source for cell in notebook.cells
                                 if cell.cell_type == "code"))


class FiguresAsCommitted(pytest.Item):
    """The figures that a notebook made in this session, against those in the folder `figures`
    beside the notebooks' own."""

    def runtest(self):
        committed, fresh = self.path.parent.parent / "figures", Path(os.environ["MYTHOS_FIGURES"])
        made, now = (committed / "arithmetic.txt").read_text(encoding="utf-8").strip(), arithmetic()
        if made != now:
            warnings.warn(f"figures were made with {made}; here is {now}: their numbers are not "
                          "compared", stacklevel=1)
        lines = [line for name in figures_of(self.parent.nb)
                 for line in stale(name, committed, fresh, made == now)]
        assert not lines, "\n".join(lines)

    def repr_failure(self, excinfo):
        return str(excinfo.value)

    def reportinfo(self):
        return self.path, None, f"{self.path.name}: figures as committed"


def behind(file: IPyNbFile, cells: list):
    """What comes after a notebook's cells, in the same kernel."""
    for number, exercise in enumerate(exercises(file.nb), 1):
        cell, options = new_code_cell(exercise.solution), defaultdict(bool)
        item = IPyNbCell.from_parent(file, name=f"exercise {number}",
                                     cell_num=cells[-1].cell_num + number, cell=cell,
                                     options=options)
        if exercise.trains:
            item.add_marker("training")
        yield item
    yield FiguresAsCommitted.from_parent(file, name="figures as committed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    parents = [(file, list(group)) for file, group in groupby(items, key=lambda item: item.parent)]
    if any(isinstance(file, IPyNbFile) for file, _ in parents):
        folder = tempfile.TemporaryDirectory(prefix="figures-")
        config.add_cleanup(folder.cleanup)
        os.environ["MYTHOS_FIGURES"] = folder.name
    items[:] = [item for file, group in parents
                for item in [*group, *(behind(file, group) if isinstance(file, IPyNbFile) else ())]]


if __name__ == "__main__":
    print(arithmetic())
