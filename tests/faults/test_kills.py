"""Long commands that are killed, crowded, or short of disk go on, and end with the bytes of an unbroken run.

A moment is a change of a file (a write that begins, a rename, a deletion), counted in an unbroken run, or the number of
bytes at which a write is cut off. All commands run in processes forked from this one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.faults import Ended, contents, flip_byte, hidden, killed_at, moments, run, start, wait
from support.small_sets import write_sets
from support.tiny import PARAGRAPHS, QUESTIONS, build_model, save_model

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]
N_MOMENTS = 20
#: Bytes at which a write of a tiny model's files is cut off.
CUTS = (5_000, 60_000)


@dataclass(frozen=True)
class Case:
    """A command, the file or folder that it makes, and the cases whose results it needs."""

    arguments: tuple[object, ...]
    made: str
    needs: tuple[str, ...] = ()


_TEXT = ("--calibration", "text.txt", "--n-samples", 4, "--seq-len", 40)
_COMPARED = (
    "--methods", "lcc", "mean-shift", "--seeds", 1, "--examples", 16, "--texts", "wikitext", "--blocks", 2,
    "--responses", 8, "--speed-rounds", 0, "--max-length", 256,
)  # fmt: skip
_TRAINED = ("--data", "questions.jsonl", "--selector", "mse", "--heads", 1, "--batch-size", 16, "--checkpoint-every", 1)
CASES = {
    "prune": Case(("prune", "dense", "pruned", *_TEXT), "pruned"),
    "refit": Case(("refit", "dense", "pruned", "refitted", *_TEXT), "refitted", ("prune",)),
    "reconstruct": Case(
        ("reconstruct", "dense", "pruned", "rebuilt", *_TEXT, "--window", 2, "--epochs", 1), "rebuilt", ("prune",)
    ),
    "scan": Case(
        ("scan", "dense", "pruned", "run", "--data", "questions.jsonl", "--examples", 40, "--selectors", "mse"), "run",
        ("prune",),
    ),
    "restore": Case(("restore", "dense", "pruned", "run", *_TRAINED), "run", ("prune", "scan")),
    "export": Case(("export", "run", "out"), "out", ("prune", "scan", "restore")),
    "replace": Case(("export", "run", "out", "--overwrite"), "out", ("prune", "scan", "restore", "export")),
    "compare": Case(("compare", "dense", "pruned", "compared", *_COMPARED), "compared", ("prune",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Prepared]:
    """By case, a folder with all that a command needs, made by the commands before it, and its result beside it."""
    root = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCC_LENS_CACHE", str(root / "cache"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        write_sets(root / "data")
        yield _Prepared(root)


@pytest.fixture(autouse=True)
def own_data(unbroken: _Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_DATA", str(unbroken.root / "data"))


class _Prepared(dict):
    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        case = CASES[name]
        save_model(build_model(), folder / "dense")
        (folder / "text.txt").write_text("\n\n".join(PARAGRAPHS))
        (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        for need in case.needs:
            made = CASES[need].made
            shutil.copytree(self[need].with_name(f"{need}-whole") / made, folder / made, dirs_exist_ok=True)
        whole = shutil.copytree(folder, folder.with_name(f"{name}-whole"))
        ended = run(case.arguments, whole)
        assert ended.code == 0, ended.errors
        self[name] = folder
        return folder


def finished(case: Case, folder: Path) -> Ended:
    """Run the command again, as its messages say, until it ends well."""
    resume = ("--resume",) if case.made == "run" and (folder / "run" / "checkpoint.safetensors").exists() else ()
    ended = run((*case.arguments, *resume), folder)
    if ended.code == 2 and ("exists already" in ended.errors or "holds a" in ended.errors):
        return Ended(0, "", 0)  # it had been whole
    return ended


def assert_as_unbroken(case: Case, folder: Path, whole: Path, what: str) -> None:
    assert contents(folder / case.made) == contents(whole / case.made), what
    assert hidden(folder) == [], what


@pytest.mark.parametrize("name", CASES)
def test_a_killed_command_goes_on_to_the_same_bytes(name: str, unbroken: _Prepared, tmp_path: Path) -> None:
    case, start_folder = CASES[name], unbroken[name]
    whole = start_folder.with_name(f"{name}-whole")
    counted = shutil.copytree(start_folder, tmp_path / "counted")
    n_changes = run(case.arguments, counted).changes
    kills = [(f"change {n} of {n_changes}", killed_at(n), 0) for n in moments(n_changes, N_MOMENTS - len(CUTS), 30)]
    kills += [(f"byte {cut}", lambda number: None, cut) for cut in CUTS]
    for what, at, limit in kills:
        folder = shutil.copytree(start_folder, tmp_path / "broken")
        killed = run(case.arguments, folder, at, limit=limit)
        assert killed.code in (-signal.SIGKILL, -signal.SIGXFSZ) or (limit and killed.code == 0), (what, killed)
        if (folder / case.made).exists() and case.made != "run" and case.made != "compared":
            assert (folder / case.made / "model.safetensors").exists(), what
        ended = finished(case, folder)
        assert ended.code == 0, (what, ended)
        assert_as_unbroken(case, folder, whole, what)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["prune", "scan", "restore", "export"])
def test_a_second_command_on_the_same_output_is_refused(name: str, unbroken: _Prepared, tmp_path: Path) -> None:
    case, folder = CASES[name], shutil.copytree(unbroken[name], tmp_path / "shared")
    waits, goes = os.pipe()
    reached, tells = os.pipe()

    def paused(number: int) -> None:
        if number == 8:
            os.write(tells, b"x")
            os.read(waits, 1)

    first = start(case.arguments, folder, paused)
    os.read(reached, 1)
    second_folder = tmp_path / "shared"
    second = run(case.arguments, second_folder)
    assert second.code == 2, second
    assert f"got process {first} on " in second.errors
    assert len(second.errors.splitlines()) == 1
    os.write(goes, b"x")
    ended = wait(first, folder)
    assert ended.code == 0, ended
    assert_as_unbroken(case, folder, unbroken[name].with_name(f"{name}-whole"), name)


@pytest.mark.parametrize("name", ["prune", "refit", "reconstruct", "scan", "restore"])
def test_a_flipped_byte_of_unfinished_work_is_noticed(name: str, unbroken: _Prepared, tmp_path: Path) -> None:
    case, start_folder = CASES[name], unbroken[name]
    whole = start_folder.with_name(f"{name}-whole")
    n_changes = run(case.arguments, shutil.copytree(start_folder, tmp_path / "counted")).changes
    folder = shutil.copytree(start_folder, tmp_path / "broken")
    run(case.arguments, folder, killed_at(2 * n_changes // 3))
    state = [path for path in folder.rglob("*.safetensors") if "unfinished" in str(path) or path.name[:5] == "check"]
    assert state, sorted(folder.rglob("*"))
    for file in state:
        flip_byte(file)
    ended = finished(case, folder)
    if name == "restore":  # resuming is what was asked for
        assert ended.code == 2
        assert "got a changed file; delete it, or start without --resume" in ended.errors
        ended = run(case.arguments, folder)
    assert ended.code == 0, ended
    assert_as_unbroken(case, folder, whole, name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of which little is free; skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("name", ["prune", "scan", "restore", "export", "compare"])
def test_a_full_disk_is_one_line_and_loses_nothing(name: str, unbroken: _Prepared, small_disk: Path) -> None:
    case = CASES[name]
    folder = shutil.copytree(unbroken[name], small_disk, dirs_exist_ok=True)
    ballast = small_disk / "ballast"
    for free in (0, 1 << 12, 1 << 16, 1 << 17, 3 << 16):
        _fill(ballast, small_disk, free)
        ended = run(case.arguments, folder)
        assert ended.code in (0, 1, 2), ended
        if ended.code == 0 or "holds a" in ended.errors:  # whole, though perhaps without its picture
            break
        assert "no space left" in ended.errors or "of disk for" in ended.errors, (free, ended)
        assert len(ended.errors.splitlines()) == 1
        ballast.unlink()
    ballast.unlink(missing_ok=True)
    ended = finished(case, folder)
    assert ended.code == 0, ended
    assert_as_unbroken(case, folder, unbroken[name].with_name(f"{name}-whole"), name)


def _fill(ballast: Path, disk: Path, free: int) -> None:
    """Leave so many bytes free on a disk."""
    ballast.write_bytes(b"")
    left = shutil.disk_usage(disk).free - free
    with ballast.open("wb") as file:
        for _ in range(left // 4096):
            file.write(bytes(4096))
