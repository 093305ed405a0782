"""Notebooks over a grid of parameters: papermill executes, dask.distributed schedules, on this
machine or on a cluster.

    mythos batch NOTEBOOK --grid seed=0:10 --grid name=a,b --workers 2 --out DIR
    mythos batch report DIR

A run is one notebook with one set of parameters. Its folder in DIR appears whole or not at all:
notebook.ipynb as executed, stdout.txt of its cells, log.txt of its kernel, result.json. A run that
passed, with the same notebook, modules beside it and core, is not run again.
"""
from mythos_core.batch.record import read, results

__all__ = ["read", "results"]
