"""Outputs: only what this program wrote is replaced, one command writes at a time, a kill loses no copy."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lcc_lens.core import files
from lcc_lens.core.errors import DiskFullError, RequestError
from lcc_lens.core.files import atomic_path, remove_leftovers, temporary, write_json, write_text
from lcc_lens.core.outputs import folders, locks, places
from lcc_lens.core.outputs.folders import (
    MARK,
    atomic_directory,
    note_written,
    recover,
    require_free,
    reserved,
    unfinished_work,
)
from lcc_lens.core.outputs.places import RESUMED, refuse_model, require_file, writing_run
from lcc_lens.models.loading.references import resolve


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.0)


def write(out: Path, text: str = "new", *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as part:
        (part / "weights").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


# what may be replaced


def test_a_written_folder_is_replaced_and_names_its_files(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    assert json.loads((tmp_path / "out" / MARK).read_text())["files"] == ["weights"]
    with pytest.raises(RequestError, match="exists already"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("mine", ["notes.md", "models/a.safetensors"])
def test_what_others_wrote_is_not_replaced(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / mine).parent.mkdir(parents=True)
    (out / mine).write_text("mine")
    with pytest.raises(RequestError, match=r"expected a folder that lcc-lens wrote, got .* without its mark"):
        write(out, overwrite=True)
    shutil.rmtree(out)
    write(out)
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    with pytest.raises(RequestError, match=f"expected only what lcc-lens wrote in .*, got {mine}; move it"):
        write(out, overwrite=True)
    assert (out / mine).read_text() == "mine"
    note_written(out / mine)
    assert "notes.md" not in mine or write(out, overwrite=True) is None


@pytest.mark.parametrize("mark", ["[]", '{"files": 3}', "{}"])
def test_a_mark_of_another_layout_protects(mark: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / MARK).write_text(mark)
    with pytest.raises(RequestError, match="without its mark"):
        write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("record", ["pruning.json", "refit.json", "converted.json", "README.md"])
def test_outputs_of_the_first_version_are_recognised_by_their_records(record: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    text = "---\nlibrary_name: transformers\ntags: [pruned, restorelcc, lcc-lens]\n---\n" if "md" in record else "{}"
    (out / record).write_text(text)
    (out / "model.safetensors").write_text("weights")
    (out / "mine.py").write_text("print()")
    with pytest.raises(RequestError, match=r"got mine\.py; move it"):
        write(out, overwrite=True)
    (out / "mine.py").unlink()
    write(out, overwrite=True)
    assert names(out) == [MARK, "weights"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["input", "parent", "link", "current", "home", "root"])
def test_no_input_no_parent_and_no_home_is_replaced(
    place: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models" / "dense"
    write(model, "dense")
    (tmp_path / "models" / MARK).write_text('{"files": ["dense/weights", "dense/.lcc_lens"]}')
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path / "models" / "dense")
    out = {
        "input": model, "parent": model.parent, "link": tmp_path / "link", "current": Path(), "root": Path("/"),
        "home": tmp_path / "empty",
    }[place]  # fmt: skip
    with pytest.raises(RequestError, match=r"does not hold the (input|current folder|home folder)"):
        write(out, overwrite=overwrite, inputs=(model,) if place != "current" else ())
    assert (model / "weights").read_text() == "dense"


def test_files_and_broken_links_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("file", "got the file"), ("broken", "the link .* to nothing"), ("loop", "cannot write to"),
        ("file/below", "cannot write to"), ("n" * 300, "File name too long"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message), reserved(tmp_path / name, overwrite=True):
            raise AssertionError
    for name, message in (
        ("folder", "got the folder"), ("broken", "the link .* to nothing"), ("loop", "cannot write to"),
        ("file/below", "cannot write to"), ("n" * 300, "File name too long"), ("file", "an earlier output"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            require_file(tmp_path / name, begins=(b"{",))
    assert names(tmp_path) == ["broken", "file", "folder", "loop"]


def test_a_device_or_a_pipe_stays_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (Path("/dev/null"), "device"), (Path("/dev/full"), "device")):
        with pytest.raises(RequestError, match=f"got the {kind} {path}"):
            require_file(path, begins=(b"",))
        with pytest.raises(RequestError, match=f"got the {kind} {path}"):
            write_text(path, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_file_is_replaced_only_by_its_own_kind_and_never_an_input(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    require_file(results, begins=(b"{",))
    write_json(results, {"models": {}})
    require_file(results, begins=(b'{\n  "models"',))
    with pytest.raises(RequestError, match="an earlier output of this command"):
        require_file(results, begins=(b"<!doctype",))
    with pytest.raises(RequestError, match="an earlier output of this command"):
        require_file(results, begins=(b"{",), inputs=[results])
    assert names(tmp_path) == ["results.json"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError, match="no space left"), reserved(tmp_path / "deep" / "out", overwrite=False):
        raise AssertionError
    with pytest.raises(DiskFullError, match="no space left"), writing_run(tmp_path / "run"):
        raise AssertionError
    resumed = pytest.raises(DiskFullError, match=r"run; free some and go on with --resume$")
    with resumed, writing_run(tmp_path / "run", again=RESUMED):
        raise AssertionError
    with pytest.raises(DiskFullError, match="no space left"):
        require_file(tmp_path / "results.json", begins=(b"",))
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_file_system_that_takes_no_files_is_noticed_before_the_work() -> None:
    with pytest.raises(RequestError, match=r"cannot write to /proc/results\.json"):
        require_file(Path("/proc/results.json"), begins=(b"",))
    with pytest.raises(RequestError, match="cannot write to /proc/run"), writing_run(Path("/proc/run")):
        raise AssertionError


def test_a_model_s_folder_is_no_place_for_results(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(RequestError, match="expected a run directory, got the model in"):
        refuse_model(tmp_path)
    refuse_model(tmp_path / "run")


# links and permissions


def test_links_are_followed(tmp_path: Path) -> None:
    for folder in ("real", "files"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "new"
    (tmp_path / "files" / "a.json").write_text("old")
    (tmp_path / "a.json").symlink_to(tmp_path / "files" / "a.json")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "files" / "a.json").read_text() == "new"


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_new_files_follow_the_umask_and_old_ones_keep_their_mode(
    mask: int, file_mode: int, folder_mode: int, tmp_path: Path
) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new", "x")
        write_text(tmp_path / "old", "x")
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old", "out", "out/weights")] == [
        file_mode, 0o640, folder_mode, file_mode,
    ]  # fmt: skip
    (tmp_path / "out").chmod(0o750)
    write(tmp_path / "out", overwrite=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_a_read_only_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(RequestError, match="got the read-only"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


# locks


def in_another_process(code: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)


HELD = "import sys; from filelock import FileLock; FileLock(sys.argv[1]).acquire(timeout=0)"


def test_two_writers_of_one_folder_are_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    errors: list[str] = []

    def second() -> None:
        for block in (reserved(tmp_path / "out", overwrite=True), writing_run(tmp_path / "run")):
            with pytest.raises(RequestError) as raised, block:
                raise AssertionError
            errors.append(str(raised.value))

    with reserved(tmp_path / "out", overwrite=True), writing_run(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        locks = [*tmp_path.glob(".out.*lock"), *(tmp_path / "run").glob(".*lock")]
        assert len(locks) == 2
        for lock in locks:
            with pytest.raises(subprocess.CalledProcessError):
                in_another_process(HELD, lock)
        write(tmp_path / "out")  # the holder itself may
    assert len(errors) == 2
    assert all(f"got process {os.getpid()} on " in error for error in errors)
    assert names(tmp_path) == ["out"]  # no lock, and no empty run


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    (tmp_path / ".out.lcc-lens-lock").write_text("process 1 on moon")
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_the_root_and_a_link_to_itself_have_nothing_to_recover(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    recover(Path("/"))
    recover(tmp_path / "loop")
    with pytest.raises(RequestError, match="which is not there"):
        resolve(tmp_path / "loop")


def test_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(RequestError, match="expected a run directory, got the model"), writing_run(tmp_path):
        raise AssertionError
    with pytest.raises(RequestError, match="got the model"), writing_run(tmp_path / "x", inputs=[tmp_path / "x"]):
        raise AssertionError
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("name", places._SIGNS)
def test_files_of_others_are_not_replaced_by_those_of_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with writing_run(tmp_path):
        pass
    (tmp_path / name).write_text("mine")
    with pytest.raises(RequestError, match=f"with a {name} that lcc-lens did not write"), writing_run(tmp_path):
        raise AssertionError
    (tmp_path / "scan.json").write_text('{"dense_sha256": 1}')
    with writing_run(tmp_path):  # a run of ours, whatever else it holds
        pass


# kills


def killed_at(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Stop as a kill does, without any clean-up, before the given rename or deletion."""
    left = iter(range(100))

    def counted(function):
        def call(*arguments, **options):
            if next(left) >= place:
                raise SystemExit
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(folders.os, "replace", counted(os.replace))
    monkeypatch.setattr(folders.shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(folders, "_restore_copy", lambda target: None)


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize(("place", "left"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_kill_within_a_replacement_loses_no_copy(
    place: int, left: str, reading: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        killed_at(patch, place)
        with pytest.raises(SystemExit):
            write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").exists() == (place != 2)
    if reading:
        recover(tmp_path / "out")
    with pytest.raises(RequestError, match="exists already"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == left
    remove_leftovers(tmp_path)
    assert [name for name in names(tmp_path) if "lcc-lens-old" in name] == []


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = temporary(tmp_path / "alive")
    ended = subprocess.Popen(["true"])
    ended.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        dead = [temporary(tmp_path / "dead"), temporary(tmp_path / ("long" * 60))]
        patch.setattr(files, "_host", lambda: "moon")
        far, old = temporary(tmp_path / "far"), temporary(tmp_path / "old")
    for path in (alive, far, old, *dead):
        path.mkdir()
        (path / "half").write_text("x")
    os.utime(old, (0, 0))
    (tmp_path / ".lcc-lens-notes").write_text("mine")
    with atomic_path(tmp_path / "a") as part:
        part.write_text("x")
    assert set(names(tmp_path)) == {"a", ".lcc-lens-notes", alive.name, far.name}


def test_work_that_is_older_than_its_output_is_removed(tmp_path: Path) -> None:
    write(tmp_path / "out")
    work = unfinished_work(tmp_path / "out")
    work.mkdir()
    (work / "layer_0000.safetensors").write_text("x")
    with pytest.raises(RequestError, match="exists already"):
        require_free(tmp_path / "out", overwrite=False)
    recover(tmp_path / "out")
    assert work.exists()  # newer: an overwrite that goes on
    os.utime(work / "layer_0000.safetensors", (0, 0))
    recover(tmp_path / "out")
    assert names(tmp_path) == ["out"]
