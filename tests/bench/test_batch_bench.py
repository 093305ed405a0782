"""What a batch adds to a run, and what a second worker gains. By `make bench`, on a machine that
does nothing else."""
import statistics
import time
from argparse import Namespace

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mythos_core.batch.cluster import connect, follow
from mythos_core.batch.plan import core_hash, plan
from mythos_core.batch.run import look


@pytest.fixture
def jobs(tmp_path):
    """Makes that many runs of a notebook with this code."""
    def make(code, number):
        cells = [new_code_cell("seed = 0", metadata={"tags": ["parameters"]}), new_code_cell(code)]
        notebook = new_notebook(cells=cells,
                                metadata={"kernelspec": {"name": "python3",
                                                         "display_name": "Python 3",
                                                         "language": "python"}})
        nbformat.write(notebook, tmp_path / "bench.ipynb")
        points = [{"seed": seed} for seed in range(number)]
        return plan([tmp_path / "bench.ipynb"], points, tmp_path / "out", 1)
    (tmp_path / "out").mkdir()
    return make


@pytest.fixture
def two_workers(tmp_path):
    client = connect(Namespace(workers=2, scheduler=None, slurm=None, dashboard=False))
    client.run(look, tmp_path / "out", core_hash())  # the workers have imported the package
    yield client
    client.close()


def test_a_run_costs_at_most_300_ms_beyond_its_kernel(
        benchmark, jobs, two_workers, tmp_path, capfd):
    waiting, bare = jobs("seed + 1", 16), []

    def alone():
        start = time.perf_counter()
        papermill.execute_notebook(str(tmp_path / "bench.ipynb"), str(tmp_path / "alone.ipynb"),
                                   {"seed": 1}, kernel_name="python3", progress_bar=False)
        bare.append(time.perf_counter() - start)
        return ([waiting.pop()], two_workers, 0), {}

    benchmark.pedantic(follow, setup=alone, rounds=15, warmup_rounds=1)
    overhead = benchmark.stats["median"] - statistics.median(bare[1:])
    with capfd.disabled():
        print(f"\na run by papermill alone {statistics.median(bare[1:]):.3f} s, in a batch "
              f"{benchmark.stats['median']:.3f} s: {overhead:.3f} s more")
    assert overhead <= 0.3


def test_two_workers_are_1_7_times_one(benchmark, jobs, two_workers, capfd):
    waiting, one = jobs("total = 0\nfor i in range(40_000_000):\n    total += i", 24), []

    def by_one():
        start = time.perf_counter()
        follow([waiting.pop() for _ in range(6)], None, 0)
        one.append(time.perf_counter() - start)
        return ([waiting.pop() for _ in range(6)], two_workers, 0), {}

    benchmark.pedantic(follow, setup=by_one, rounds=2)
    gain = statistics.median(one) / benchmark.stats["median"]
    with capfd.disabled():
        print(f"\nsix runs on one worker {statistics.median(one):.1f} s, on two "
              f"{benchmark.stats['median']:.1f} s: {gain:.2f} times")
    assert gain >= 1.7
