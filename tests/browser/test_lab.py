"""JupyterLab for real: the first notebook, run from the menu as a reader would."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},     # cells off the screen are in the page too
            "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false"}}   # asks no other machine


def claims(notebook):
    """The lines that the cells tagged `claims` print."""
    cells = [cell for cell in notebook.cells if "claims" in cell.metadata.get("tags", [])]
    return "".join(output.text for cell in cells for output in cell.outputs).splitlines()


@pytest.fixture
def lab(tmp_path):
    """The address of a server on loopback whose folder has 01 alone, with its outputs taken out, and the lines that 01 should print."""
    shutil.copy(ROOT / "notebooks" / "01_model_sizes.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "01_model_sizes.ipynb", 4)
    expected = claims(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / "01_model_sizes.ipynb")
    for name, settings in SETTINGS.items():
        (tmp_path / "settings" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "settings" / name).write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=known", "--allow-root", f"--ServerApp.root_dir={tmp_path}", f"--LabApp.user_settings_dir={tmp_path / 'settings'}"]
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **folders}, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api?token=known", server, tmp_path / "lab.log")
        yield f"{address}/lab/tree/01_model_sizes.ipynb?token=known", expected
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url, server, log):
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            return urlopen(url, timeout=5)
        except URLError:
            time.sleep(0.5)
    pytest.fail(log.read_text())


def test_the_first_notebook_runs_from_the_menu(browser, lab):
    address, expected = lab
    assert expected and all(line.startswith("PASS") for line in expected)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    outputs = page.locator(".jp-OutputArea-output")
    failed = page.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']")
    last = outputs.filter(has_text=expected[-1])
    last.or_(failed).first.wait_for(timeout=180_000)
    assert failed.all_inner_texts() == []
    last.scroll_into_view_if_needed()
    page.screenshot(path=ROOT / "build" / "screenshots" / "lab.png")
    assert [line for text in outputs.all_inner_texts() for line in text.splitlines() if line.startswith("PASS")] == expected
    page.close()
