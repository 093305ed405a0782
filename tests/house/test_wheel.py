"""The wheel as a user has it: built, installed apart from the source, used from an empty folder.

`make test-wheel` runs it.
"""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

import mythos_core

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parents[2]
NOTEBOOK = """from mythos_core import OpenMythos
from mythos_core.batch import results
model = OpenMythos.from_pretrained("state-S3")
results(parameters=sum(weight.numel() for weight in model.parameters()), seed=seed)"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, by way of the source distribution; a warning of the build's is a failure."""
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})    # warned of if set
    assert built.returncode == 0 and "warning" not in built.stdout.lower(), built.stdout
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def use(wheel, tmp_path_factory):
    """A function that runs Python in an empty folder, where mythos_core is the wheel's."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                    "--target", site, wheel], check=True)

    def use(*arguments, code=0):
        done = subprocess.run([sys.executable, *arguments], cwd=folder, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "PYTHONPATH": str(site)})
        assert done.returncode == code, done.stdout
        return done.stdout

    assert use("-c", "import mythos_core; print(mythos_core.__file__)").startswith(str(site))
    use.folder = folder
    return use


def test_everything_of_the_package_is_in_it_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for path in (ROOT / "mythos_core").rglob("*") if path.is_file()
             and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]
    assert {name for name in names if name.startswith("mythos_core/")} == {
        path.relative_to(ROOT).as_posix() for path in files}
    info = f"recurrent_depth_tutorial-{mythos_core.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"mythos_core", info}


def test_a_model_that_ships(use):
    code = ("from mythos_core import OpenMythos; "
            "print(OpenMythos.from_pretrained('state-Z5').config.codes)")
    assert use("-c", code).strip() == "5"


def test_a_training(use):
    use("-m", "mythos_core", "train", "--recipe", "parity-carrying", "--steps", "2", "--out",
        "carrying")
    assert json.loads((use.folder / "carrying" / "config.json").read_text(encoding="utf-8"))


def test_a_machine_that_two_steps_do_not_prove(use):
    assert "proved" in use("-m", "mythos_core", "train", "--machine", "S3", "--steps", "2",
                           "--out", "machine", code=2)


def test_a_batch_and_its_report(use):
    cells = [nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(NOTEBOOK)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), use.folder / "one.ipynb")
    said = use("-m", "mythos_core", "batch", "one.ipynb", "--grid", "seed=3", "--out", "out")
    assert "1 passed, 0 failed" in said
    (row,) = json.loads((use.folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert row["seed"] == 3 and row["parameters"] > 10_000
    (use.folder / "out" / "index.html").unlink()
    use("-m", "mythos_core", "batch", "report", "out")
    assert (use.folder / "out" / "index.html").is_file()
