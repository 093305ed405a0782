"""Colab rehearsed: its packages in an environment of their own, one notebook file, and this
repository in place of the address in the setup cell.

`make test-colab` runs it: it installs torch once more, and needs a package index as Colab does.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
REPOSITORY = re.search(r'Repository = "(.*?)"',
                       (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)
COLAB_HAS = ["torch", "numpy", "matplotlib", "pandas", "psutil", "tqdm", "huggingface_hub",
             "safetensors", "ipykernel", "ipywidgets"]


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A kernel named colab whose Python has COLAB_HAS, pinned as in constraints.txt, and
    google.colab imported; git finds the repository here."""
    home = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *COLAB_HAS, "-c",
                    ROOT / "constraints.txt"], check=True)
    (packages,) = home.glob("venv/lib/python*/site-packages")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    (packages / "google_colab.pth").write_text("import google.colab\n", encoding="utf-8")
    kernel = home / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    # pip clones the address in the setup cell; git is told that it lies in this folder
    environment = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
                   "GIT_CONFIG_VALUE_0": REPOSITORY, "PYTHONPATH": "",
                   "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    (kernel
     / "kernel.json").write_text(json.dumps({"argv": [str(python), "-m", "ipykernel_launcher", "-f",
                                                      "{connection_file}"], "env": environment,
                                             "display_name": "colab", "language": "python"}),
                                 encoding="utf-8")

    def freeze():
        listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True,
                                capture_output=True, env={**os.environ, "PYTHONPATH": ""})
        return {(package["name"].lower().replace("_", "-"), package["version"])
                for package in json.loads(listed.stdout)}

    return SimpleNamespace(home=home, freeze=freeze, before=freeze())


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_the_notebook_passes_on_colab(colab, name, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(colab.home / "jupyter"))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    claimed = claims(notebook)
    NotebookClient(notebook, kernel_name="colab", timeout=300,
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert claims(notebook) == claimed
    after = colab.freeze()
    assert colab.before <= after
    assert {name for name, _ in after - colab.before} == {
        "recurrent-depth-tutorial", "jaxtyping", "wadler-lindig", "automata-lib", "cached-method",
        "frozendict"}


def claims(notebook):
    """What the cells tagged `claims` print, which a kernel may send in several pieces."""
    cells = [cell for cell in notebook.cells if "claims" in cell.metadata.get("tags", [])]
    return "".join(output.text for cell in cells for output in cell.outputs)
