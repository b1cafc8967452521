"""A real JupyterLab with one notebook, for the tests in a browser."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from support.places import ROOT

#: Seconds until a server that says nothing counts as broken.
_PATIENCE = 90


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    """A notebook of code cells for this Python."""
    import nbformat  # takes seconds to import

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def run_first_cell(page: Any, address: str) -> None:
    """Open a notebook in a browser's page and run its first cell."""
    page.goto(address)
    page.locator(".jp-Cell .cm-content").first.click()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    page.keyboard.press("Control+Enter")


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """Serve a folder; gives the address of JupyterLab with its token as ``address.format(path)``."""
    token, home = secrets.token_hex(8), folder / ".jupyter"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root",
        f"--ServerApp.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    places = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
    )
    settings = {name: str(home / name.lower()) for name in places}
    root = str(ROOT)
    environment = {**os.environ, **settings, "PYTHONPATH": root, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    quiet = Path(settings["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    server = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        base = _address(server)
        yield f"{base}lab/tree/{{}}?reset&token={token}"
    finally:
        server.terminate()
        server.wait()


def _address(server: subprocess.Popen) -> str:
    """Where a server listens, as it says itself; its log is read on, so that it never waits for a reader."""
    found: Queue[str] = Queue()
    log: list[str] = []

    def read() -> None:
        assert server.stderr is not None
        with server.stderr:
            for line in server.stderr:
                log.append(line)
                if match := re.search(r"(http://127\.0\.0\.1:\d+/)lab", line):
                    found.put(match[1])
        found.put("")

    threading.Thread(target=read, daemon=True).start()
    address = found.get(timeout=_PATIENCE)
    if not address:
        pytest.fail("JupyterLab did not start:\n" + "".join(log))
    return address
