"""What SECURITY.md promises of every command: no network when all is local, and no file outside the named folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import ROOT

#: Runs commands under an audit hook, which says what is connected to, and what is written outside the named folders.
WATCHED = """
import os, sys, tempfile
from pathlib import Path
sys.path.insert(0, {root!r})
kept = tuple(os.path.realpath(path) for path in ({allowed!r}, tempfile.gettempdir(), "/dev", "/proc"))
caches = ("__pycache__", "torchinductor", ".triton", ".cache/torch")
found = set()
def watch(event, values):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        found.add(f"{{event}} {{values[1:] if event == 'socket.connect' else values[:2]}}")
    elif event == "open" and isinstance(values[0], (str, bytes)) and isinstance(values[2], int):
        if values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            note(event, values[0])
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        inside = event in ("os.remove", "os.rmdir") and values[1] not in (-1, None)  # of an open folder
        note(event, os.path.join(os.readlink(f"/proc/self/fd/{{values[1]}}"), values[0]) if inside else values[0])
def note(event, path):
    real = os.path.realpath(os.fsdecode(path))
    if not real.startswith(kept) and not any(cache in real for cache in caches):
        found.add(f"{{event}} {{real}}")
from lcc_lens.frontends.cli.main import run
sys.addaudithook(watch)
for command in {commands!r}:
    assert run([*command, "--quiet"]) == 0, command
print("\\n".join(sorted(found)) or "nothing")
"""


@pytest.mark.slow
def test_commands_stay_offline_and_in_their_folders(
    dense_dir: Path, text_file: Path, question_file: Path, tmp_path: Path
) -> None:
    names = {"dense": dense_dir, "text": text_file, "questions": question_file}
    pruned, run, out = (str(tmp_path / "named" / name) for name in ("pruned", "run", "out"))
    dense, text, questions = map(str, names.values())
    commands = [
        ["prune", dense, pruned, "--calibration", text, "--n-samples", "4", "--seq-len", "40"],
        ["scan", dense, pruned, run, "--data", questions, "--examples", "8"],
        ["restore", dense, pruned, run, "--data", questions, "--selector", "mse", "--batch-size", "16"],
        ["export", run, out],
        ["explore", run],
        ["eval", dense, out, "--tasks", text, "--length", "40", "--limit", "4", "--out", f"{out}.json"],
    ]
    code = WATCHED.format(root=str(ROOT), allowed=str(tmp_path / "named"), commands=commands)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    # no file of the test lies in the temporary folder that commands may use
    environment |= {
        "TMPDIR": str(tmp_path / "named"),
        "LCC_LENS_CACHE": str(tmp_path / "named"),
        "HOME": "/nonexistent",
    }
    (tmp_path / "named").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True, env=environment,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "nothing", done.stdout[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["named"]
