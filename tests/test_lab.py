"""Notebooks by hand: in JupyterLab, in a real browser, and with their cells in any order."""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
import websocket

from weightsum_lib import run

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--window-size=1200,3000"]
TINY = "width, train_images, test_images, calibration_images, epoch_images, batch_size = 1 / 16, 120, 40, 32, 96, 32"
RUN_ALL = """(async () => {
  await jupyterapp.restored;
  const panel = await jupyterapp.commands.execute("docmanager:open", {path: "%s"});
  await panel.context.ready; await panel.sessionContext.ready;
  await jupyterapp.commands.execute("notebook:run-all-cells");
  return JSON.stringify(panel.content.model.toJSON().cells);
})()"""
FIGURES = "document.querySelectorAll('.jp-RenderedImage img').length"


@contextlib.contextmanager
def process(command, **options):
    """A program, until it is no longer wanted."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        yield running
    finally:
        running.terminate()
        running.wait(30)


def port_of(running, folder, pattern, read, seconds=60):
    """The port that a program has chosen, which it writes to a file, as soon as it answers there."""
    for _ in range(10 * seconds):
        assert running.poll() is None, f"{running.args} has ended"
        with contextlib.suppress(OSError, ValueError):
            (written,) = folder.glob(pattern)
            port = int(read(written.read_text(encoding="utf-8")))
            with socket.create_connection(("127.0.0.1", port), timeout=10):
                return port
        time.sleep(0.1)
    raise TimeoutError(pattern)


class Page:
    """A browser's tab, driven by the DevTools protocol."""

    def __init__(self, port):
        (tab,) = [t for t in json.loads(answer_of(port)) if t["type"] == "page"]
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=400, suppress_origin=True)
        self.sent = 0

    def does(self, method, **params):
        """The result of a method of the protocol; what happens meanwhile is passed over."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (said := json.loads(self.socket.recv())).get("id") != self.sent:
            pass
        return said["result"]

    def evaluate(self, program):
        said = self.does("Runtime.evaluate", expression=program, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def wait_for(self, program, seconds=60):
        for _ in range(5 * seconds):
            if found := self.evaluate(program):
                return found
            time.sleep(0.2)
        raise TimeoutError(program)


def answer_of(port):
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10).read()


def tiny_notebook(name, folder):
    """A notebook whose studies are tiny and kept in a folder."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    for knobs in [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]:
        knobs.source += f"\nresults_dir = {str(folder)!r}\n{TINY}\ndevice = 'cpu'"
    return notebook


def outputs(cells):
    """What cells show; a table's random id and address are left out."""
    shown = [output.get("data", output) for cell in cells for output in cell.outputs if output.output_type != "stream"]
    return [re.sub(r"T_[0-9a-f]{5}| at 0x[0-9a-f]+", "", json.dumps(each, sort_keys=True)) for each in shown]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.mark.hard
@pytest.mark.parametrize("name", run.notebook_names())
def test_cells_that_ran_in_any_order_and_again_show_the_same_in_order(name, results):
    notebook = tiny_notebook(name, results)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    for order in (code, random.Random(name).sample(code, len(code)) + code + code):
        notebook.cells = [nbformat.v4.new_code_cell(cell.source) for cell in order]
        options = {"timeout": 1200, "kernel_name": "python3", "allow_errors": True}
        nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, **options).execute()
        found.append(notebook.cells)
    (once, again), n = found, len(code)
    assert not [output for cell in once for output in cell.outputs if output.output_type == "error"]
    assert outputs(once) == outputs(again[n : 2 * n]) == outputs(again[2 * n :])
    wrong = [output for cell in again[:n] for output in cell.outputs if output.output_type == "error"]
    # what its cell above would have made is named: a name, or the profile
    assert {output.ename for output in wrong} <= {"NameError", "ParamsError"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_notebook_runs_in_jupyterlab_in_a_browser(tmp_path):
    name = "01_mnist_cifar10"
    jupytext.write(tiny_notebook(name, tmp_path / "results"), tmp_path / f"{name}.ipynb")
    lab = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    lab += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}"]
    places = {key: str(tmp_path / key) for key in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
    environment.pop("PYTEST_CURRENT_TEST")  # with it a kernel's own standard error stays out of its cells
    browser = [CHROMIUM, *QUIET, "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}"]
    with process(lab, env=environment, cwd=ROOT) as server, process([*browser, "about:blank"]) as chromium:
        port = port_of(
            server, tmp_path, "JUPYTER_DATA_DIR/runtime/jpserver-*.json", lambda said: json.loads(said)["port"]
        )
        devtools = port_of(chromium, tmp_path, "profile/DevToolsActivePort", lambda said: said.split()[0])
        page = Page(devtools)
        page.does("Page.navigate", url=f"http://127.0.0.1:{port}/lab")
        page.wait_for("Boolean(window.jupyterapp)")
        cells = json.loads(page.evaluate(RUN_ALL % f"{name}.ipynb"))
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert len(code) > 10 and all(cell["execution_count"] for cell in code)
        outputs = [output for cell in code for output in cell["outputs"]]
        assert [output for output in outputs if output["output_type"] == "error"] == []
        said = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
        assert said and all(line.startswith(("run ", "measured ")) for line in said.splitlines())  # no warning
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
        page.evaluate("document.querySelector('.jp-RenderedImage')?.scrollIntoView()")
        assert page.wait_for(FIGURES) >= 1
