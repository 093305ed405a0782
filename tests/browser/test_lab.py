"""JupyterLab for real: the first notebook, run from the menu as a reader would; and a slider,
moved."""
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

expect = pytest.importorskip("playwright.sync_api").expect
ROOT = Path(__file__).parents[2]
SETTINGS = {  # cells off the screen are in the page too, and no other machine is asked for news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}


def claims(notebook):
    """The lines that the cells tagged `claims` print."""
    cells = [cell for cell in notebook.cells if "claims" in cell.metadata.get("tags", [])]
    return "".join(output.text for cell in cells for output in cell.outputs).splitlines()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A function that puts a notebook, its outputs taken out, in the folder of a server on
    loopback, and gives its address there."""
    folder = tmp_path_factory.mktemp("lab")
    for name, settings in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
               f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=known",
               "--allow-root", f"--ServerApp.root_dir={folder}",
               f"--LabApp.user_settings_dir={folder / 'settings'}"]
    folders = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower())
               for kind in ("CONFIG", "DATA", "RUNTIME")}
    with open(folder / "lab.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **folders}, stdout=log,
                                  stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"

    def put(notebook, name):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / f"{name}.ipynb")
        return f"{address}/lab/workspaces/{name}/tree/{name}.ipynb?token=known"

    try:
        wait_for(f"{address}/api?token=known", server, folder / "lab.log")
        yield put
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url, server, log):
    for _ in range(120):
        assert server.poll() is None, log.read_text(encoding="utf-8")
        try:
            return urlopen(url, timeout=5)
        except URLError:
            time.sleep(0.5)
    pytest.fail(log.read_text(encoding="utf-8"))


def load(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


def run_all(browser, address, awaited):
    """The page after Run All Cells, when something with that selector is there and no cell has
    failed or complained."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    failed = page.locator("[data-mime-type='application/vnd.jupyter.error'], "
                          "[data-mime-type='application/vnd.jupyter.stderr']")
    page.locator(awaited).or_(failed).first.wait_for(timeout=180_000)
    assert failed.all_inner_texts() == []
    page.locator(awaited).first.scroll_into_view_if_needed()
    return page


def test_the_first_notebook_runs_from_the_menu(browser, lab):
    notebook = load("01_model_sizes")
    expected = claims(notebook)
    assert expected and all(line.startswith("PASS") for line in expected)
    page = run_all(browser, lab(notebook, "01"),
                   f".jp-OutputArea-output:has-text({json.dumps(expected[-1])})")
    page.screenshot(path=ROOT / "build" / "screenshots" / "lab.png")
    outputs = page.locator(".jp-OutputArea-output").all_inner_texts()
    assert ([line for text in outputs for line in text.splitlines() if line.startswith("PASS")]
            == expected)
    page.close()


def test_the_slider_changes_the_picture(browser, lab):
    """Of 05 the cells that the slider needs."""
    notebook = load("05_depth_extrapolation")
    needed = ("import matplotlib", "def read_by", "def looped", "figures.explore")
    notebook.cells = [cell for cell in notebook.cells if cell.source.startswith(needed)]
    assert len(notebook.cells) == len(needed)
    page = run_all(browser, lab(notebook, "05"), ".widget-interact img")
    picture, handle = (page.locator(".widget-interact img"),
                       page.locator(".widget-interact [role=slider]"))
    for key in ("End", "Home"):
        before, position = (picture.get_attribute("src"), 1 if key == "Home"
                            else int(float(handle.get_attribute("aria-valuemax"))))
        handle.press(key)
        expect(picture).not_to_have_attribute("src", before, timeout=30_000)
        expect(page.locator(".widget-interact .widget-readout")).to_have_text(str(position))
    page.screenshot(path=ROOT / "build" / "screenshots" / "slider.png")
    page.close()
