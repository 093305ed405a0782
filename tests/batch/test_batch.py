"""Real notebooks, executed by papermill in real kernels, by real dask workers in processes of their
own."""
import csv
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from urllib.request import urlopen

import dask
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mythos_core import study
from mythos_core.__main__ import main as mythos
from mythos_core.batch import cluster as workers
from mythos_core.batch import command as command_line
from mythos_core.batch import plan as planning
from mythos_core.batch import read, record
from mythos_core.batch import run as running
from mythos_core.batch.grid import parse_grid

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "mythos_core", "batch"]
posix = pytest.mark.skipif(os.name != "posix",
                           reason="signals and process groups as POSIX has them")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def main(words):
    return mythos(["batch", *words])


def write(path, *cells):
    made = [new_markdown_cell("# a notebook")]
    for source, *tags in cells:
        made.append(new_code_cell(source, metadata={"tags": list(tags)}))
    nbformat.write(new_notebook(cells=made,
                                metadata={"kernelspec": {"name": "python3",
                                                         "display_name": "Python 3",
                                                         "language": "python"}}), path)
    return str(path)


# results() as notebooks call it, without the seconds that importing the package takes
DECLARE = ("from IPython.display import display\ndef results(**values):\n"
           f"    display({{'{record.MIME}': values}}, raw=True)")


@pytest.fixture
def good(tmp_path):
    claims = "assert seed < 11, 'too large'\nprint('PASS  seed', seed)\nprint('PASS  name', name)"
    return write(tmp_path / "good.ipynb", ("seed = 0\nname = 'a'\nrate = 0.5\nnone = None\nparts "
                                           "= [1]", "parameters"), (DECLARE,),
                 ("import os\nresults(score=seed / 2, threads=os.environ['OMP_NUM_THREADS'], "
                  "trims='MALLOC_TRIM_THRESHOLD_' in os.environ)\nos.write(2, b'of the kernel')",
                  ), (claims, "claims"), ("results(whole={'16': 1.0, '64': seed / 10})",))


@pytest.fixture
def no_report(monkeypatch):
    """For tests that do not look at it."""
    monkeypatch.setattr(command_line, "report", lambda out: None)


def folders(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.1)


def alive(process):
    return process.is_running() and process.status() != "zombie"


def kernels(process):
    return [child for child in process.children(recursive=True)
            if "ipykernel_launcher" in " ".join(child.cmdline())]


# The grid

def test_parse_grid(tmp_path):
    assert parse_grid([]) == [{}]
    assert (parse_grid(["seed=0,1", "name=a,None", "x=0.5"])
            == [{"seed": s, "name": n, "x": 0.5} for s in (0, 1) for n in ("a", None)])
    assert parse_grid(["seed=-1:2"]) == [{"seed": s} for s in (-1, 0, 1)]
    assert (parse_grid(["name='a, b','c'", "flag=True", "list=[1, 2],[]"])
            == [{"name": n, "flag": True, "list": x} for n in ("a, b", "c") for x in ([1, 2], [])])
    file = tmp_path / "names.json"
    file.write_text('{"here": {"list": ["x, y", "z"], "object": {"k": 1, "l": 2}}}',
                    encoding="utf-8")
    assert (parse_grid([f"a=@{file}:here.list", f"b=@{file}:here.object"])
            == [{"a": a, "b": b} for a in ("x, y", "z") for b in "kl"])
    for bad in ("seed", "seed=", "=1", "seed=1,,2", "a b=1", "seed=3:3", "name='a, b',c",
                f"a=@{file}:here.nothing", f"a=@{file}:here.list.x", f"a=@{file}",
                f"a=@{file}:here.object.k", f"@{file}", f"@{file}:here.list", f"@{file}:",
                f"@{tmp_path}", "a=0:100000000", "a=0:" + 30 * "9"):
        with pytest.raises(ValueError, match=re.escape(f"--grid {bad!r}")):
            parse_grid([bad])
    with pytest.raises(ValueError, match="each name once"):
        parse_grid(["seed=1", "seed=2"])
    large = [f"{name}=0:100" for name in "abcd"]
    with pytest.raises(ValueError, match="'c=0:100': makes 1,000,000 runs; must be at most 100,0"):
        parse_grid(large)


def test_sets_of_parameters_in_place_of_all_combinations(tmp_path, good, no_report, capsys):
    file, command = tmp_path / "sets.json", [good, "--out", str(tmp_path / "out")]
    sets = [{"seed": 1, "rate": 2}, {"name": "b"}]
    file.write_text(json.dumps({"mine": {"small": sets}, "words": ["a"], "none": []}),
                    encoding="utf-8")
    place = f"@{file}:mine.small"
    assert parse_grid([place]) == sets
    assert (parse_grid(["none=0:2", place])
            == [{"none": n, **one} for n in (0, 1) for one in sets])
    for bad, named in ((f"@{file}:words", "must be a list of objects"),
                       (f"@{file}:none", "not empty"),
                       (f"@{file}:mine.large", "'large' is not in")):
        with pytest.raises(ValueError, match=re.escape(f"--grid {bad!r}: ") + f".*{named}"):
            parse_grid([bad])
    with pytest.raises(ValueError, match=r"has \['rate'\] again; each name once"):
        parse_grid([place, "rate=1"])
    file.write_text(json.dumps(sets), encoding="utf-8")
    assert main([*command, "--grid", f"@{file}"]) == 0
    runs = [read(tmp_path / "out" / name)["parameters"] for name in folders(tmp_path / "out")]
    assert sorted(runs, key=str) == [{"name": "b"}, {"seed": 1, "rate": 2.0}]
    file.write_text(json.dumps([*sets, {"sed": 1}]), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*command, "--grid", f"@{file}"])
    assert "--grid sed: not a parameter of good.ipynb" in capsys.readouterr().err


def test_a_command_is_read_as_it_is_written(tmp_path, good):
    given = {"seed": 3, "name": "it's, \"so\"", "rate": 1, "none": "x", "parts": [1, "b"]}
    (job,) = planning.plan([Path(good)], [given], tmp_path, 1)
    assert ((parameters := job.about["parameters"]) == {**given, "rate": 1.0}
            and isinstance(parameters["rate"], float))
    options = [word for word in shlex.split(job.about["command"])[2:] if word != "--grid"]
    assert Path(options[0]).resolve() == Path(good) and parse_grid(options[1:]) == [parameters]


@pytest.mark.parametrize("arguments, named",
                         [(["--grid", "sed=1"], "--grid sed: not a parameter "
                           "of good.ipynb, which has ['name', 'none', 'parts', 'rate', 'seed']"),
                          (["--grid", "seed=a"],
                           "--grid seed='a': must be int, as seed = 0 in good.ipynb"),
                          (["--grid", "seed=True"], "--grid seed=True: must be int"),
                          (["--grid", "name=1"], "--grid name=1: must be str"),
                          (["--grid", "rate=x"], "--grid rate='x': must be float"),
                          (["--grid", "seed=2:2"], "not empty"),
                          (["--grid", "seed=1,1"], "is there twice"),
                          (["--workers", "0"], "--workers 0"), (["--timeout", "0"], "--timeout 0"),
                          (["--retries", "-1"], "--retries -1: must be at least 0"),
                          (["missing.ipynb"], "missing.ipynb"),
                          (["--publish", "--grid", "seed=1"], "--publish takes no --grid"),
                          (["--slurm", "cores=1,memory=1GB"], "no sbatch"),
                          (["--grid", "name=@nothing.json:a"], "nothing.json")])
def test_what_cannot_work_is_refused_before_anything_is_written(
        tmp_path, good, capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main([good, *arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "2,1", "1.5", " "])
def test_a_number_of_threads_that_is_none_is_refused_by_name(tmp_path, good, capsys, monkeypatch,
                                                            threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(SystemExit) as stop:
        main([good, "--out", str(tmp_path / "out")])
    said = f"OMP_NUM_THREADS = {threads!r}: must be a number, at least 1, or not set"
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_workers_need_dask_and_one_does_not(tmp_path, good, no_report, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SystemExit) as stop:
        main([good, "--workers", "2", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "pip install dask distributed" in capsys.readouterr().err
    assert main([good, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("missing, options", [("cryptography", ["--workers", "2"]),
                                              ("bokeh", ["--dashboard"])])
def test_what_dask_needs_besides_is_asked_for(
        tmp_path, good, capsys, monkeypatch, missing, options):
    monkeypatch.setitem(sys.modules, missing, None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main([good, *options, "--out", str(tmp_path / "out")])
    assert (stop.value.code == 2 and missing in (error := capsys.readouterr().err)
            and "pip install dask distributed dask-jobqueue cryptography bokeh" in error)
    assert signal.getsignal(signal.SIGINT) == before


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_folder_with_other_files_in_it_is_left_as_it_is(
        tmp_path, good, no_report, capsys, monkeypatch):
    mine, file = tmp_path / "mine", tmp_path / "file"
    (mine / "deeper").mkdir(parents=True)
    file.touch()
    notebook = write(mine / "notebook.ipynb", ("1 + 1",))
    (mine / "index.html").write_text("my page", encoding="utf-8")
    before = contents(mine)
    monkeypatch.chdir(mine)
    for command in ([notebook, "--out", "."], [good, "--out", "."], [good, "--out", str(file)],
                    [good, "--out", ".", "--dry-run"], ["report", "."], ["report", "deeper"],
                    ["report", "nowhere"], ["report"], ["report", ".", "."]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert re.search("--out .*: must be a|report .*: there are no runs|report takes one",
                         capsys.readouterr().err)
    assert contents(mine) == before
    (mine / "index.html").unlink()
    assert main([good, "--out", str(mine / "deeper")]) == 0     # it is empty
    with pytest.raises(SystemExit):                             # a batch's, and above a notebook
        main([str(next((mine / "deeper").glob("*/notebook.ipynb"))), "--out",
              str(mine / "deeper")])
    assert "must not have the notebook" in capsys.readouterr().err


# Notebooks as they come

def save(path, source, **metadata):
    """A notebook of a parameters cell and one that shows what the parameters are."""
    shown = "print({k: v for k, v in globals().items() if k in asked})"
    cells = [new_code_cell(source, metadata={"tags": ["parameters"]}), new_code_cell(shown)]
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


VALUES = [(3, 4), [1, (2, [None])], {"a": {"b": 1.5}, "c": ()}, "it's \"{x}\" \\ \n é", True, None,
          -0.0, 10 ** 20, 1e-300, (5,), ""]


def test_what_arrives_in_the_notebook_is_what_was_asked_for(tmp_path):
    asked = dict(zip("abcdefghijk", VALUES))
    source = "\n".join(f"{name} = None" for name in asked) + f"\nasked = {list(asked)}"
    notebook = save(tmp_path / "types.ipynb", source)
    (job,) = planning.plan([notebook], [asked], tmp_path / "out", 1)
    (tmp_path / "out").mkdir()
    assert running.run(job)["error"] is None
    assert (job.folder / "stdout.txt").read_text(encoding="utf-8") == f"{asked}\n"
    assert read(job.folder)["parameters"] == json.loads(json.dumps(asked))
    words = shlex.split(job.about["command"])[3:]
    assert parse_grid([word for word in words if word != "--grid"]) == [asked]


@pytest.mark.parametrize("value", [b"a", {1, 2}, 1e999, {1: 2}, [float("nan")], 1j, (b"a",)])
def test_a_value_that_would_change_on_its_way_is_refused(tmp_path, value):
    notebook = save(tmp_path / "n.ipynb", "r = None")
    with pytest.raises(ValueError, match=re.escape(f"--grid r={value!r}: must be")):
        planning.plan([notebook], [{"r": value}], tmp_path, 1)


@pytest.mark.parametrize("default, value, arrives", [
    ("(1, 2)", (3, 4), (3, 4)), ("(1, 2)", [3, 4], (3, 4)), ("[1]", (3, 4), [3, 4]),
    ("0.5", 3, 3.0), ("0.5", 2 ** 53 + 1, ValueError), ("1", True, ValueError)])
def test_a_value_has_the_type_of_the_default(tmp_path, default, value, arrives):
    notebook = save(tmp_path / "n.ipynb", f"r = {default}")
    if arrives is ValueError:
        with pytest.raises(ValueError, match=re.escape(f"--grid r={value!r}: must be ")):
            planning.plan([notebook], [{"r": value}], tmp_path, 1)
    else:
        (job,) = planning.plan([notebook], [{"r": value}], tmp_path, 1)
        assert repr(job.about["parameters"]["r"]) == repr(arrives)


@pytest.mark.parametrize("cell, given", [
    ("path = 'a=b'", {"path": "c=d"}), ("seed: int | None = 0", {"seed": None}),
    ("seed: int | None = 0", {"seed": 3}), ("a, (b, *c) = 1, (2, 3)", {"b": 5, "c": [6]}),
    ("a = b = 0", {"b": 1}), ("device = 'cuda' if 0 else 'cpu'", {"device": "mps"}),
    ("%matplotlib inline\nsize = 2 ** 4", {"size": 8}), ("late: int", {"late": 1}),
    ("text = '''x = 1\ny = 2'''", {"text": "z"}), ("d = {}\nd['k'] = 1", {"d": {"a": 1}})])
def test_legal_assignments_are_parameters(tmp_path, cell, given):
    (job,) = planning.plan([save(tmp_path / "n.ipynb", cell)], [given], tmp_path, 1)
    assert job.about["parameters"] == given


@pytest.mark.parametrize("cell, given, named", [
    ("path = 'a=b'", {"path": 1}, "--grid path=1: must be str, as path = 'a=b' in n.ipynb"),
    ("seed: int = 0", {"seed": None}, "--grid seed=None: must be int"),
    ("d = {}\nd['k'] = f = 1", {"k": 1},
     "--grid k: not a parameter of n.ipynb, which has ['d', 'f']"),
    ("def f():\n    x = 1", {"x": 1}, "which has []"),
    ("text = '''x = 1\ny = 2'''", {"y": 1}, "which has ['text']")])
def test_what_is_no_parameter_or_no_such_type_is_refused(tmp_path, cell, given, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        planning.plan([save(tmp_path / "n.ipynb", cell)], [given], tmp_path, 1)


@pytest.mark.parametrize("cell, given, named", [
    ("nx = 41; dx = 2 / (nx - 1)", ["nx"], "dx from the defaults (dx = 2 / (nx - 1))"),
    ("nx = 41\ndx = 2 / nx\ndt = dx ** 2", ["nx", "dx"], "dt from the defaults"),
    ("nx = 41\nm = nx\ndt: float = m", ["nx"], "m from the defaults"),
    ("n = 1\nif n > 1:\n    k = 3", ["n"], "k from the defaults (if n > 1:)"),
    ("n = 1\nd = {}\nd['k'] = n", ["n"], "d from the defaults"),
    ("n = 1\nk = [i * n for i in (1, 2)]", ["n"], "k from the defaults"),
    ("n = 1\nk = 2\nk += n", ["n"], "k from the defaults")])
def test_what_is_computed_from_a_given_parameter_is_refused(tmp_path, cell, given, named):
    notebook, point = save(tmp_path / "n.ipynb", cell), dict.fromkeys(given, 81)
    with pytest.raises(ValueError, match=re.escape(f"n.ipynb computes {named}")):
        planning.plan([notebook], [{}, point], tmp_path, 1)


@pytest.mark.parametrize("cell, given", [
    ("nx = 41; dx = 2 / (nx - 1)", {"nx": 81, "dx": 0.1}), ("nx = 41; dx = 2 / nx", {"dx": 0.1}),
    ("n = 1\nk = n\nk = 5", {"n": 2}), ("n = 1\nf = lambda: n", {"n": 2}),
    ("n = 1\ndef f():\n    return n", {"n": 2}), ("k = [n for n in (1, 2)]", {"k": []}),
    ("n = 1\nn = 2 * n", {"n": 3})])
def test_what_follows_a_given_parameter_or_is_given_too_is_run(tmp_path, cell, given):
    (job,) = planning.plan([save(tmp_path / "n.ipynb", cell)], [given], tmp_path, 1)
    assert job.about["parameters"] == given


def test_a_run_is_stale_when_a_module_beside_its_notebook_changes(tmp_path):
    notebook = Path(write(tmp_path / "n.ipynb", ("%pwd\nif True:\n    import helper as h",),
                          ("from package.part import one\nimport json, missing",),
                          ("not python",)))
    (tmp_path / "package").mkdir()
    files = {name: tmp_path / name for name in ("helper.py", "deeper.py", "package/part.py",
                                                "package/other.py", "unused.py", "json.txt")}
    for name, file in files.items():
        file.write_text("from deeper import x" if name == "helper.py" else "x = 1",
                        encoding="utf-8")

    def fingerprint():
        (job,) = planning.plan([notebook], [{}], tmp_path / "out", 1)
        return job.about["fingerprint"]
    before = fingerprint()
    for name, file in files.items():
        file.write_text(file.read_text(encoding="utf-8") + "\ny = 2\n", encoding="utf-8")
        now = fingerprint()
        assert [part for part in now if now[part] != before[part]] == (
            [] if name in ("unused.py", "json.txt") else ["modules"]), name
        before = now


@posix
def test_a_kernel_is_of_this_python_whatever_is_registered(tmp_path, monkeypatch, no_report):
    """A `python3` that some other environment has put where Jupyter looks first."""
    registered = tmp_path / "jupyter" / "kernels" / "python3"
    registered.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "3", "language": "python"}
    (registered / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = write(tmp_path / "n.ipynb", ("import sys\nprint(sys.executable)",))
    assert main([notebook, "--out", str(tmp_path / "out")]) == 0
    printed = next((tmp_path / "out").glob("*/stdout.txt")).read_text(encoding="utf-8")
    assert printed == f"{sys.executable}\n"


def test_one_code_with_other_data_beside_it_is_another_run(tmp_path, no_report, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text(name, encoding="utf-8")
        write(tmp_path / name / "same.ipynb", ("seed = 0", "parameters"),
              ("print(open('data.txt').read())",))
    a, b = (str(tmp_path / name / "same.ipynb") for name in "ab")
    options = ["--grid", "seed=1", "--out", str(tmp_path / "out")]
    assert main([a, *options]) == 0 and main([b, *options]) == 0
    assert "up to date" not in capsys.readouterr().out
    files = sorted((tmp_path / "out").glob("*/stdout.txt"))
    assert sorted(file.read_text(encoding="utf-8") for file in files) == ["a\n", "b\n"]
    assert main([a, b, *options]) == 0 and "2 up to date" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["{x}", "{", "100%s {0} [a-z]*"])
def test_a_path_is_a_path(tmp_path, folder, no_report):
    (tmp_path / folder).mkdir()
    notebook = save(tmp_path / folder / "{seed}.ipynb", "seed = 0\nasked = ['seed']")
    assert main([str(notebook), "--grid", "seed=1", "--out", str(tmp_path / folder / "out")]) == 0
    (name,) = folders(tmp_path / folder / "out")
    printed = tmp_path / folder / "out" / name / "stdout.txt"
    assert printed.read_text(encoding="utf-8") == "{'seed': 1}\n"


def of_json(cells="[]", metadata="{}", version=4):
    return (f'{{"cells": {cells}, "metadata": {metadata}, "nbformat": {version}, '
            '"nbformat_minor": 4}').encode()


NOT_NOTEBOOKS = {
    "text": b"seed = 0", "bytes": b"\xff\xfe\x00", "empty": b"", "list": b"[]", "object": b"{}",
    "number": b"1", "cell": of_json("[{}]"), "metadata": of_json(metadata="null"),
    "version": of_json(version=99), "R": of_json(metadata='{"kernelspec": {"language": "R"}}'),
    "syntax": of_json('[{"cell_type": "code", "metadata": {"tags": ["parameters"]}, '
                      '"source": "seed =", "outputs": []}]')}


@pytest.mark.parametrize("kind", [*NOT_NOTEBOOKS, "folder", "fifo", "missing"])
def test_what_cannot_be_run_is_refused_by_name(tmp_path, good, kind, capsys):
    path = tmp_path / f"{kind}.ipynb"
    if kind in NOT_NOTEBOOKS:
        path.write_bytes(NOT_NOTEBOOKS[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no FIFOs")
        os.mkfifo(path)
    with pytest.raises(SystemExit) as stop:
        main([good, str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# A batch on this machine

def test_12_runs_on_two_workers_and_again(tmp_path, good, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out = tmp_path / "out"
    command = [good, "--grid", "seed=6:12", "--grid", "name=a,b", "--workers", "2", "--out",
               str(out)]
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(": missing") == 12 and not out.exists()
    assert main(command) == 1
    printed = capsys.readouterr()
    assert ("10 passed, 2 failed" in printed.out and printed.out.count("AssertionError: too large")
            == 2)
    assert ("12/12" in printed.err and "2 failed" in printed.err and "Traceback" not in printed.err
            and "distributed" not in printed.err)
    runs = [read(out / name) for name in folders(out)]
    assert (len(runs) == 12 and len({(run["parameters"]["seed"], run["parameters"]["name"])
                                     for run in runs}) == 12)
    for run in runs:
        seed, folder = run["parameters"]["seed"], out / run["run"]
        cells = nbformat.read(folder / "notebook.ipynb", 4).cells
        assert f"seed = {seed}\n" in "".join(cell.source for cell in cells)
        assert ("of the kernel" in (folder / "log.txt").read_text(encoding="utf-8")
                and 10 < run["peak_mb"] < 2000 and 0 < run["seconds"] < 100)
        assert (set(run["versions"]) == {"python", "torch", "numpy"} and len(run["commit"]) == 40
                and set(run["fingerprint"]) == {"notebook", "modules", "core"})
        if seed < 11:
            assert (run["status"], run["error"], run["claims"]) == ("passed", None, 2)
            assert (run["results"] == {"score": seed / 2, "threads": "3", "trims": False,
                                       "whole": {"16": 1.0, "64": seed / 10}})
            assert ((folder / "stdout.txt").read_text(encoding="utf-8").splitlines()
                    == [f"PASS  seed {seed}", f"PASS  name {run['parameters']['name']}"])
        else:
            assert ((run["status"], run["error"], run["claims"])
                    == ("failed", "AssertionError: too large", 0))
            (error,) = [o for cell in cells for o in cell.get("outputs", [])
                        if o.output_type == "error"]
            assert "too large" in "".join(error.traceback)
    the_report(out, runs)
    monkeypatch.setattr(command_line, "report", lambda out: None)
    written = {name: (out / name / "result.json").stat().st_mtime_ns for name in folders(out)}
    # in this process now: what failed is run again, nothing else
    assert main([*command[:-4], "--out", str(out)]) == 1
    assert "10 up to date; 2 failed" in capsys.readouterr().out
    again = [name for name in folders(out) if (out / name / "result.json").stat().st_mtime_ns
             != written[name]]
    assert [name.startswith("good-seed=11") for name in again] == [True, True]
    core = planning.core_hash()
    with monkeypatch.context() as other:
        other.setattr(planning, "core_hash", lambda: "another")
        main([*command, "--dry-run"])
    assert "12 stale, core changed" in capsys.readouterr().out and core == planning.core_hash()
    source = Path(good).read_text(encoding="utf-8")
    Path(good).write_text(source.replace("too large", "no"), encoding="utf-8")
    main([*command, "--dry-run"])
    assert "12 stale, notebook changed" in capsys.readouterr().out
    Path(good).write_text(source.replace("# a notebook", "# its prose"), encoding="utf-8")
    main([*command, "--dry-run"])
    assert "10 up to date; 2 failed" in capsys.readouterr().out


def the_report(out, runs):
    with open(out / "table.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert ([(int(row["seed"]), row["name"]) for row in table]
            == [(seed, name) for seed in range(6, 12) for name in "ab"])
    assert ([float(row["whole.64"]) for row in table if row["status"] == "passed"]
            == [seed / 10 for seed in range(6, 11) for _ in "ab"])
    pyarrow = pytest.importorskip("pyarrow.parquet")
    assert (pyarrow.read_table(out / "table.parquet").column("seed").to_pylist()
            == [seed for seed in range(6, 12) for _ in "ab"])
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (len(rows) == 10 and {"seed", "name", "score", "whole", "command", "commit", "versions"}
            <= set(rows[0]) and rows[4]["score"] == 4.0)
    assert (out / "summary.png").stat().st_size > 5000
    page = (out / "index.html").read_text(encoding="utf-8")
    assert ("10 passed, 2 failed" in page and all((out / link).exists()
                                                  for link in re.findall(
                                                      '(?:href|src)=["\'](.*?)["\']', page)))
    assert page.count("notebook.ipynb</a>") == 12 and "AssertionError: too large" in page


@posix
def test_a_killed_worker_s_run_is_made_elsewhere_and_one_that_kills_them_all_fails_alone(
        tmp_path, no_report, capsys):
    kill = """
import os, time, pathlib
mark = pathlib.Path(name)
if name == 'always' or name == 'once' and not mark.exists():
    mark.touch()
    os.kill(os.getppid(), 9)
    time.sleep(60)
time.sleep(1)"""
    notebook = write(tmp_path / "kill.ipynb", ("name = ''", "parameters"), (kill,))
    # so few that a run must not be charged with another's kills
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        assert (main([notebook, "--grid", "name=once,never,always,calm", "--workers", "2", "--out",
                      str(tmp_path / "out")]) == 1)
    printed = capsys.readouterr().out
    assert "3 passed, 1 failed" in printed and "KilledWorker: Attempted to run task" in printed
    runs = {run["parameters"]["name"]: run for run in (read(tmp_path / "out" / name)
                                                       for name in folders(tmp_path / "out"))}
    assert ({name: run["status"] for name, run in runs.items()}
            == {"once": "passed", "never": "passed", "always": "failed", "calm": "passed"})
    cells = nbformat.read(tmp_path / "out" / runs["always"]["run"] / "notebook.ipynb", 4).cells
    assert cells[-1].metadata.papermill.status == "running"     # where it was killed


def test_of_tries_that_were_killed_the_last_that_came_to_a_notebook_is_shown(tmp_path):
    tries = [tmp_path / name for name in ("first", "second", "barely")]
    for at, folder in enumerate(tries):
        folder.mkdir()
        if folder.name != "barely":
            (folder / "notebook.ipynb").touch()
        os.utime(folder, (at, at))
    assert max(tries, key=workers._how_far).name == "second"


def test_a_failing_notebook_is_tried_again(tmp_path, no_report, capsys):
    source = """
import pathlib
mark = pathlib.Path(f'{seed}')
mark.write_text(mark.read_text() + 'x' if mark.exists() else 'x')
assert len(mark.read_text()) > 1 + seed"""
    notebook = write(tmp_path / "flaky.ipynb", ("seed = 0", "parameters"), (source,))
    assert (main([notebook, "--grid", "seed=0,1", "--retries", "1", "--out", str(tmp_path / "out")])
            == 1)
    assert "1 passed, 1 failed" in capsys.readouterr().out
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in "01"] == ["xx", "xx"]


def test_a_kernel_that_dies_is_a_failure_of_its_run_alone(tmp_path, no_report, capsys):
    notebook = write(tmp_path / "dies.ipynb", ("seed = 0", "parameters"),
                     ("import os\nif seed == 0:\n    os._exit(3)",))
    assert main([notebook, "--grid", "seed=0,1", "--out", str(tmp_path / "out")]) == 1
    assert ("1 passed, 1 failed" in (printed := capsys.readouterr().out)
            and "DeadKernelError: Kernel died" in printed)


# How a run ends

@pytest.mark.parametrize("source", ["import sys\nsys.exit(0)", "raise SystemExit"])
def test_a_cell_that_ends_the_notebook_early_fails_the_run(tmp_path, source, no_report, capsys):
    notebook = write(tmp_path / "early.ipynb", (source,), ("print('later')",))
    for _ in range(2):                                           # not up to date at the second try
        assert main([notebook, "--out", str(tmp_path / "out")]) == 1
        printed = capsys.readouterr().out
        assert "SystemExit: a cell ended the run; those after it did not run" in printed
    assert read(next((tmp_path / "out").iterdir()))["status"] == "failed"


def test_a_run_ends_at_its_time_limit_alone(tmp_path, no_report, capsys):
    """The limit is of all cells together; the second hangs where no interrupt reaches it. The
    start of a kernel counts too, which on a busy machine may take seconds."""
    hang = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    notebook = write(tmp_path / "hang.ipynb", ("seed = 0", "parameters"),
                     ("import time\ntime.sleep(1)",), (f"{hang}while seed:\n    pass",))
    start = time.monotonic()
    limited = [notebook, "--grid", "seed=0,1", "--timeout", "8"]
    assert main([*limited, "--out", str(tmp_path / "out")]) == 1
    assert "1 passed, 1 failed" in (printed := capsys.readouterr().out)
    assert "TimeoutError: not finished after 8 s" in printed
    assert time.monotonic() - start < 40 and not kernels(psutil.Process())
    runs = {run["parameters"]["seed"]: run for run in
            (read(tmp_path / "out" / name) for name in folders(tmp_path / "out"))}
    assert {seed: run["status"] for seed, run in runs.items()} == {0: "passed", 1: "failed"}
    assert runs[1]["seconds"] > 8


@posix
@pytest.mark.parametrize("then, options, error", [
    ("while True:\n    pass", ["--timeout", "6"], "TimeoutError: not finished after 6 s"),
    ("1 / 0", [], "ZeroDivisionError: division by zero"), ("", [], None)])
def test_what_a_run_started_ends_with_it_also_in_a_session_of_its_own(
        tmp_path, no_report, then, options, error):
    """A child, and a child of that; neither is of the kernel's process group."""
    sleep = "import time; time.sleep(300)"
    own = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {}], " \
          "start_new_session=True)"
    begin = f"{own.format(repr(f'{own.format(repr(sleep))}; {sleep}'))}\n"
    wait = ("import os, psutil, time\nwhile len(found := psutil.Process().children(recursive=True))"
            " < 2:\n    time.sleep(0.1)\nprint(*(child.pid for child in found))\n")
    notebook = write(tmp_path / "starts.ipynb", (begin + wait,), (then or "0",))
    assert main([notebook, *options, "--out", str(tmp_path / "out")]) == bool(error)
    (name,) = folders(tmp_path / "out")
    assert read(tmp_path / "out" / name)["error"] == error
    started = (tmp_path / "out" / name / "stdout.txt").read_text(encoding="utf-8").split()
    assert len(started) == 2
    until(lambda: not any(psutil.pid_exists(int(pid)) and alive(psutil.Process(int(pid)))
                          for pid in started), 10)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_kernel_that_died_as_it_started_is_started_once_more(tmp_path, monkeypatch, failures):
    notebook = Path(write(tmp_path / "starts.ipynb", ("seed = 0", "parameters"), ("seed + 1",)))
    (tmp_path / "out").mkdir()
    (job,) = planning.plan([notebook], [{"seed": 1}], tmp_path / "out", 1)
    original, tried = running.papermill.execute_notebook, []

    def execute(*arguments, **options):
        tried.append(1)
        if len(tried) <= failures:
            raise RuntimeError(running.NO_START)
        return original(*arguments, **options)

    monkeypatch.setattr(running.papermill, "execute_notebook", execute)
    error = running.run(job)["error"]
    assert len(tried) == 2
    assert error is None if failures == 1 else running.NO_START in error


def test_what_a_system_without_proc_and_process_groups_can_do(tmp_path, monkeypatch):
    """As macOS and Windows: the memory of a process, and an end to it and to what it started."""
    def no_proc(path, encoding):
        raise FileNotFoundError(path)

    sleep = "import time; time.sleep(20)"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    with subprocess.Popen([sys.executable, "-c", start]) as process:
        until(lambda: psutil.Process(process.pid).children())
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        with monkeypatch.context() as other:
            other.delattr(os, "killpg", raising=False)
            other.setattr(Path, "read_text", no_proc)
            assert 1 < running.peak_mb(process.pid) < 1000
            other.setitem(running.KERNELS, tmp_path / "run", process.pid)
            other.setitem(running.KERNELS, tmp_path / "starting", None)
            running.stop(tmp_path)
            assert not [folder for folder in running.KERNELS if folder.parent == tmp_path]
        until(lambda: not any(map(alive, family)), 10)


def test_a_log_has_a_line_for_each_run_and_no_more(tmp_path, no_report, capsys):
    notebook = write(tmp_path / "n.ipynb", ("seed = 0", "parameters"),
                     ("import time\ntime.sleep(2.5)\nassert seed",))
    assert main([notebook, "--grid", "seed=0,1", "--out", str(tmp_path / "out")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("1/2 runs, 1 failed: n-seed=0-")
    assert second.startswith("2/2 runs, 1 failed: n-seed=1-")


def test_what_is_up_to_date_is_run_again_if_that_is_asked_for(tmp_path, good, no_report, capsys):
    command = [good, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    result = next((tmp_path / "out").glob("*/result.json"))
    before = result.stat().st_mtime_ns
    assert main(command) == 0 and result.stat().st_mtime_ns == before
    assert main([*command, "--force"]) == 0 and result.stat().st_mtime_ns > before
    assert "1 asked for\n" in capsys.readouterr().out


# Stopped and gone on with

def test_when_nothing_is_to_be_done_neither_workers_nor_a_report_are_started(
        tmp_path, good, capsys, monkeypatch):
    command, reports = [good, "--out", str(tmp_path / "out")], []
    monkeypatch.setattr(command_line, "report", lambda out: reports.append(page.touch()))
    page = tmp_path / "out" / "index.html"
    assert main(command) == 0 and len(reports) == 1
    monkeypatch.setattr(workers, "connect", lambda args: pytest.fail("workers were started"))
    assert main([*command, "--workers", "2"]) == 0 and len(reports) == 1
    assert ("1 up to date\n" in (printed := capsys.readouterr().out)
            and "1 passed, 0 failed" in printed)
    os.utime(page, (0, 0))  # stopped between a run and its report
    assert main(command) == 0 and len(reports) == 2
    page.unlink()
    assert main(command) == 0 and len(reports) == 3


@pytest.fixture
def slow(tmp_path):
    return write(tmp_path / "slow.ipynb", ("seed = 0", "parameters"),
                 ("import time\ntime.sleep(1 if seed < 2 else 30)",))


def start(notebook, out, *options):
    """A batch as a process, when two of its runs are whole and its workers are at the next."""
    workers = int(options[-1])
    command = [*PYTHON, notebook, "--grid", "seed=0:4", *options, "--out", str(out)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", start_new_session=True,
        # it may be ignored here, as in a background job
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    until(lambda: out.exists() and len(list(out.glob("*/result.json"))) == 2
          and len(list(out.glob("*.partial/notebook.ipynb"))) == workers)
    until(lambda: len(kernels(psutil.Process(process.pid))) == workers)
    return process


def test_a_run_that_is_stopped_while_its_kernel_starts_leaves_nothing(
        tmp_path, slow, monkeypatch):
    (job,) = planning.plan([Path(slow)], [{"seed": 3}], tmp_path / "out", 1)
    job.folder.parent.mkdir()
    before = psutil.Process().children()
    original = running.AsyncKernelManager.start_kernel

    async def stopped_meanwhile(manager, **options):
        running.stop(job.folder.parent)
        await original(manager, **options)

    monkeypatch.setattr(running.AsyncKernelManager, "start_kernel", stopped_meanwhile)
    with pytest.raises(InterruptedError, match="stopped"):
        running.run(job)
    assert not folders(job.folder.parent) and set(psutil.Process().children()) <= set(before)


@posix
def test_a_killed_batch_goes_on_where_it_was(tmp_path, slow, no_report, capsys):
    out = tmp_path / "out"
    process = start(slow, out, "--workers", "2")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, children)))
    assert len(list(out.glob("*.partial"))) == 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("*[0-9a-f]/result.json")}
    assert len(before) == 2
    assert main([slow, "--grid", "seed=0:2", "--out", str(out)]) == 0
    assert "2 up to date" in capsys.readouterr().out and not list(out.glob("*.partial"))
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


@posix
@pytest.mark.parametrize("number, workers, whom", [
    (signal.SIGINT, "2", "all"), (signal.SIGTERM, "1", "the batch")])
def test_a_batch_told_to_stop_leaves_no_kernel_no_worker_and_no_partial_folder(
        tmp_path, slow, number, workers, whom):
    """By Ctrl-C, which a terminal sends to every process, or SIGTERM, as Slurm and systemd do."""
    out = tmp_path / "out"
    process = start(slow, out, "--workers", workers)
    children = psutil.Process(process.pid).children(recursive=True)
    running = kernels(psutil.Process(process.pid))
    (os.killpg if whom == "all" else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command goes on" in errors
    assert "Traceback" not in errors
    assert len(running) == int(workers) and not any(alive(kernel) for kernel in running)
    until(lambda: not any(map(alive, children)), 10)
    assert len(folders(out)) == 2
    assert all(read(out / name)["status"] == "passed" for name in folders(out))


# Other users of this machine

def test_workers_take_orders_by_tls_alone_and_nothing_listens_beyond_this_machine():
    from distributed import Client
    client = workers.connect(Namespace(workers=2, scheduler=None, slurm=None, dashboard=True))
    try:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        with pytest.raises(OSError):
            Client(address.replace("tls://", "tcp://"), timeout=3)
        host, port = address.removeprefix("tls://").split(":")
        stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
        with (socket.create_connection((host, int(port)), timeout=10) as plain,
              pytest.raises((ssl.SSLError, ConnectionError)),
              stranger.wrap_socket(plain) as encrypted):
            encrypted.recv(1)       # with TLS 1.3 a missing certificate is told only here
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {connection.laddr.ip for process in family
                     for connection in process.net_connections() if connection.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        page = workers._dashboard(client, Namespace(scheduler=None))
        with urlopen(page, timeout=20) as answer:
            assert "Dask" in answer.read().decode()
    finally:
        client.close()


# Other machines

def address(file):
    """Of the scheduler that writes this file; None until it is written to its end."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["address"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def test_a_file_that_is_being_written_has_no_address_yet(tmp_path):
    file = tmp_path / "scheduler.json"
    assert address(file) is None
    for written in ("", '{"workers": {}'):
        file.write_text(written, encoding="utf-8")
        assert address(file) is None
    file.write_text('{"address": "tcp://127.0.0.1:1"}', encoding="utf-8")
    assert address(file) == "tcp://127.0.0.1:1"


@pytest.fixture
def dask_process(tmp_path):
    """Starts a scheduler or a worker, which imports from a folder first."""
    started = []

    def make(*what, path=ROOT):
        command = [sys.executable, "-m", "dask", *what, "--scheduler-file",
                   str(tmp_path / "scheduler.json")]
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(path)},
                                        cwd=tmp_path, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL))
    try:
        yield make
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)


@pytest.fixture
def cluster(tmp_path, dask_process):
    """A scheduler and two workers, as processes; its address."""
    dask_process("scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
    for _ in range(2):
        dask_process("worker", "--nthreads", "1")
    until(lambda: address(tmp_path / "scheduler.json"))
    return address(tmp_path / "scheduler.json")


def test_a_scheduler_and_workers_of_their_own(tmp_path, good, cluster, no_report, capsys,
                                              monkeypatch):
    command = [good, "--grid", "seed=0:4", "--scheduler", cluster, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as other, pytest.raises(SystemExit) as stop:
        other.setattr(planning, "core_hash", lambda: "another")
        main(command)
    assert stop.value.code == 2 and "has another mythos_core" in capsys.readouterr().err
    assert folders(tmp_path / "out") == []
    assert main(command) == 0 and "4 passed, 0 failed" in capsys.readouterr().out
    assert all(read(tmp_path / "out" / name)["results"]["score"] >= 0
               for name in folders(tmp_path / "out"))
    assert main([*command[:2], "seed=4,5", *command[3:]]) == 0   # the cluster is still there


def test_a_worker_that_joins_later_is_looked_at_as_the_first_ones_are(
        tmp_path, good, cluster, dask_process, no_report, capsys, monkeypatch):
    other, none = tmp_path / "other", tmp_path / "none"
    shutil.copytree(ROOT / "mythos_core", other / "mythos_core",
                    ignore=shutil.ignore_patterns("pretrained", "results", "__pycache__"))
    with open(other / "mythos_core" / "figures.py", "a", encoding="utf-8") as file:
        file.write("# another\n")
    none.mkdir()
    (none / "mythos_core.py").write_text("raise ImportError('there is none')", encoding="utf-8")
    original = workers.fitting

    def joined(client, job, known):
        """When the first ones were looked at, four others join, of which one can."""
        found = original(client, job, known)
        if len(client.nthreads()) == 2:
            for path, threads in ((other, 1), (none, 1), (ROOT, 2), (ROOT, 1)):
                dask_process("worker", "--nthreads", str(threads), path=path)
            until(lambda: len(client.nthreads()) == 6)
        return found

    monkeypatch.setattr(workers, "fitting", joined)
    assert main([good, "--grid", "seed=0:9", "--scheduler", cluster, "--out",
                 str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    refused = [line for line in said.err.splitlines() if line.startswith("no runs for the worker")]
    assert "9 passed, 0 failed" in said.out and len(refused) == 3
    for fault in ("has another mythos_core", "there is none", "must have one thread"):
        assert sum(fault in line for line in refused) == 1


def test_workers_of_many_threads_are_refused(tmp_path, good, capsys):
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False,
                      dashboard_address=None) as made, pytest.raises(SystemExit) as stop:
        main([good, "--scheduler", made.scheduler_address, "--out", str(tmp_path / "out")])
    assert (stop.value.code == 2 and "--nthreads 1" in capsys.readouterr().err
            and folders(tmp_path / "out") == [])


def test_no_scheduler_there(tmp_path, good, capsys, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", lambda address,
                        timeout: (_ for _ in ()).throw(OSError("Timed out trying to connect to "
                            f"{address}")))
    with pytest.raises(SystemExit) as stop:
        main([good, "--scheduler", "tcp://127.0.0.1:1", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "tcp://127.0.0.1:1" in capsys.readouterr().err


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(OSError, match="share the file system"):
        running.look(tmp_path / "elsewhere", planning.core_hash())


def test_the_job_script_of_slurm(tmp_path):
    asked = "partition=gpu,cores=8,memory=32GB,jobs=0,gres=gpu:1,time=01:00:00"
    with workers.slurm_cluster(asked, tmp_path / "out") as made:
        script = made.job_script()
        for line in ("#SBATCH --partition=gpu", "#SBATCH --cpus-per-task=8", "#SBATCH --mem=30G",
                     "#SBATCH --gres=gpu:1", "#SBATCH -t 01:00:00", "export OMP_NUM_THREADS=8"):
            assert line in script.splitlines(), script
        assert f"{sys.executable} -m distributed.cli.dask_worker tls://" in script
        assert " --nthreads 1 " in script
        key, = re.findall(r"--tls-key (\S+)", script)      # of workers, and of this user alone
        assert Path(key).parent == tmp_path / "out" and Path(key).stat().st_mode & 0o77 == 0
        assert made.scheduler.http_server.address == "127.0.0.1"
    with workers.slurm_cluster("cores=8,memory=32GB,processes=4,jobs=0", tmp_path) as made:
        assert ("export OMP_NUM_THREADS=2" in made.job_script()
                and "--nworkers 4" in made.job_script())


# Folders

@pytest.fixture
def mounted(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if not sys.platform.startswith("linux"):
        pytest.skip("mounts a file system as Linux does")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)],
                      capture_output=True, check=False).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_batch_and_what_finished_is_kept(tmp_path, mounted, no_report, capsys):
    notebook = write(tmp_path / "large.ipynb", ("seed = 0", "parameters"),
                     ("print('x' * 1000_000 * seed)",))
    with pytest.raises(SystemExit) as stop:
        main([notebook, "--grid", "seed=0:3", "--out", str(mounted / "out")])
    error = capsys.readouterr().err
    assert (stop.value.code == 2 and f"{mounted / 'out'}: [Errno 28] No space left" in error
            and "are kept" in error and "Traceback" not in error)
    (name,) = folders(mounted / "out")
    assert read(mounted / "out" / name)["parameters"] == {"seed": 0}


def test_a_folder_that_cannot_be_written_is_named(good, mounted, capsys):
    (mounted / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(SystemExit) as stop:
        main([good, "--out", str(mounted / "out")])
    assert (stop.value.code == 2 and str(mounted / "out") in (error := capsys.readouterr().err)
            and "Read-only file system" in error)


def test_a_stale_result_stays_until_the_new_one_is_whole(tmp_path, good, no_report, monkeypatch):
    out = tmp_path / "out"
    assert main([good, "--out", str(out)]) == 0
    (name,) = folders(out)
    Path(good).write_text(Path(good).read_text(encoding="utf-8").replace("too large", "no"),
                          encoding="utf-8")
    with monkeypatch.context() as other, pytest.raises(SystemExit):
        full = OSError(28, "No space left")
        other.setattr(running, "keep", lambda *a, **k: (_ for _ in ()).throw(full))
        main([good, "--out", str(out)])
    assert folders(out) == [name] and read(out / name)["status"] == "passed"
    old = read(out / name)["fingerprint"]
    assert (main([good, "--out", str(out)]) == 0 and folders(out) == [name]
            and read(out / name)["fingerprint"] != old)


def test_a_damaged_result_is_named_and_the_rest_reported(tmp_path, good, capsys):
    out = tmp_path / "out"
    assert main([good, "--grid", "seed=0:4", "--out", str(out)]) == 0
    first, second, third, fourth = folders(out)
    (out / fourth / "result.json").write_text('{"status": "passed"}', encoding="utf-8")
    (out / first / "result.json").write_text('{"status": "pas', encoding="utf-8")
    (out / second / "result.json").unlink()
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (all(f"{name}: no whole result.json" in printed for name in (first, second, fourth))
            and third not in printed)
    assert ([row["seed"] for row in json.loads((out / "results.json").read_text(encoding="utf-8"))]
            == [2])
    assert first in (out / "index.html").read_text(encoding="utf-8")
    assert main([good, "--grid", "seed=0:4", "--out", str(out), "--dry-run"]) == 0
    assert "3 missing; 1 up to date" in capsys.readouterr().out


# What notebooks call

def test_results_are_declared_as_json(capsys, monkeypatch):
    import torch
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    record.results(a=torch.tensor([1.0, 2.0]), b=float("nan"), c={"x": torch.tensor(3)}, d="text")
    assert shown[0][record.MIME] == {"a": [1.0, 2.0], "b": None, "c": {"x": 3}, "d": "text"}
    assert "d = text" in shown[0]["text/plain"]
    monkeypatch.undo()
    record.results(accuracy=0.9)                                  # outside a notebook it prints
    assert "accuracy" in capsys.readouterr().out


def test_results_of_many_kinds_are_converted_and_others_refused_by_name(monkeypatch):
    import numpy
    import pandas
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    frame = pandas.DataFrame({"n": [1, 2], "day": pandas.to_datetime(["2026-01-02"] * 2)})
    record.results(frame=frame, column=frame["n"], path=Path("a") / "b", chosen={3, 1},
                   day=datetime.date(2026, 1, 2), deep=[{"at": {Path("c")}}], one=numpy.int64(1))
    assert shown[0][record.MIME] == {
        "frame": {"n": [1, 2], "day": 2 * ["2026-01-02T00:00:00"]}, "column": [1, 2],
        "path": os.path.join("a", "b"), "chosen": [1, 3], "day": "2026-01-02",
        "deep": [{"at": ["c"]}], "one": 1}
    loop = []
    loop.append(loop)
    for value, named in ((object, "type <class 'object'>"), (1j, "complex 1j"), ({1, "a"}, "<"),
                         ({(1, 2): 3}, "keys must be"), (loop, "Circular"), (b"a", "bytes b'a'"),
                         (numpy.array([1j]), "complex 1j")):
        with pytest.raises(TypeError, match=r"results\(score=\.\.\.\) cannot be recorded: "
                           f".*{re.escape(named)}.*; must be a number"):
            record.results(fine=1, score=value)
    assert len(shown) == 1


@pytest.mark.parametrize("raised, line", [
    ("ValueError('\\n\\n  first\\nsecond')", "ValueError: first"),
    ("ValueError('')", "ValueError:"), ("KeyError('a')", "KeyError: 'a'")])
def test_the_first_line_of_an_error_has_something_in_it(tmp_path, no_report, raised, line):
    notebook = write(tmp_path / "n.ipynb", (f"raise {raised}",))
    assert main([notebook, "--out", str(tmp_path / "out")]) == 1
    (name,) = folders(tmp_path / "out")
    assert read(tmp_path / "out" / name)["error"] == line


def test_a_run_of_the_study_makes_a_row(tmp_path, no_report):
    grid = ["--grid", "variant='NoPE'", "--grid", "seed=1", "--grid", "measure=pace", "--grid",
            "steps=2"]
    notebook = str(ROOT / "mythos_core" / "study" / "study.ipynb")
    assert main([notebook, *grid, "--out", str(tmp_path)]) == 0
    (run,) = [read(tmp_path / name) for name in folders(tmp_path)]
    committed = study.load(study.RESULTS / "pace.json")[0]
    assert set(committed) <= {*run["parameters"], *run["results"], "command", "commit", "versions"}
    assert (run["results"]["recipe"]["steps"] == 2 and run["results"]["parameters"]
            == committed["parameters"] and run["results"]["threads"] == 1)


# Publishing

def test_publish_puts_the_executed_notebook_in_place(tmp_path, good, no_report):
    assert main([good, "--publish", "--out", str(tmp_path / "out")]) == 0
    notebook = nbformat.read(good, 4)
    assert ([cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
            == [1, 2, 3, 4, 5])
    assert notebook.cells[4].outputs[0].text == "PASS  seed 0\nPASS  name a\n"
    assert not any("papermill" in part.metadata for part in [notebook, *notebook.cells])


def test_publish_keeps_prose_that_is_newer_than_the_run(tmp_path, good, no_report):
    assert main([good, "--publish", "--out", str(tmp_path / "out")]) == 0
    notebook = nbformat.read(good, 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("written after the run"))
    nbformat.write(notebook, good)
    assert main([good, "--publish", "--out", str(tmp_path / "out")]) == 0
    again = nbformat.read(good, 4)
    assert again.cells[0].source == "written after the run"
    assert again.cells[5].outputs[0].text == "PASS  seed 0\nPASS  name a\n"


def test_publish_leaves_notebooks_alone_when_one_fails(tmp_path, good, no_report):
    bad = write(tmp_path / "bad.ipynb", ("1 / 0",))
    before = Path(good).read_text(encoding="utf-8")
    assert main([good, bad, "--publish", "--out", str(tmp_path / "out")]) == 1
    assert Path(good).read_text(encoding="utf-8") == before
