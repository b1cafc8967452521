"""Files are whole or absent, also when the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import atomic_path, require_space, write_json, write_tensors
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.outputs.folders import MARK, atomic_directory
from lcc_lens.core.reading import read_json


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(LensError, match=r"no space left on the disk of .*a\.json; free some"):
        write_json(tmp_path / "a.json", {"a": 2})
    monkeypatch.undo()
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["a.json"]


def test_full_disk_under_safetensors_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(LensError, match="no space left on the disk"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_full_disk_during_a_scan_keeps_the_earlier_scan(found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcc_lens.analysis.scan.scan import Scan

    found.save(tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(LensError, match="no space left"):
        found.save(tmp_path)
    assert torch.equal(Scan.load(tmp_path).heads.second_moment, found.heads.second_moment)


def test_space_is_checked_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    require_space(tmp_path / "deep" / "down", 999_999)
    with pytest.raises(RequestError, match=r"expected 2 MB of disk for .*, got 1 MB free"):
        require_space(tmp_path / "deep" / "down", 2_000_000)


def test_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out") as part:
        (part / "half").write_text("x")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
    with atomic_directory(tmp_path / "out") as part:
        (part / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "whole").read_text() == "x"
    with pytest.raises(RequestError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    with atomic_directory(tmp_path / "out", overwrite=True) as part:
        (part / "new").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != MARK] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["out"]


def test_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"


def test_nan_never_reaches_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_unreadable_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RequestError, match="expected JSON in"):
        read_json(tmp_path / "a.json")
    with pytest.raises(RequestError, match="got nothing there"):
        read_json(tmp_path / "b.json")


def test_heads_have_one_spelling() -> None:
    assert Head.parse("L12H3") == Head(12, 3)
    assert str(Head(12, 3)) == "L12H3"
    for wrong in ("12.3", "H3L12", "L1H", ""):
        with pytest.raises(RequestError, match="expected a head such as L12H3"):
            Head.parse(wrong)
    assert check_heads([(2, 1), "L0H4"], 3, 5) == [Head(0, 4), Head(2, 1)]
    with pytest.raises(RequestError, match="expected at least one head"):
        check_heads([], 3, 5)
    with pytest.raises(RequestError, match=r"expected a head such as \(12, 3\) or L12H3, got \(1, 2, 3\)"):
        Head.of((1, 2, 3))
    with pytest.raises(RequestError, match="got one twice"):
        check_heads([(0, 1), (0, 1)], 3, 5)


def test_long_names_are_written_or_refused(tmp_path: Path) -> None:
    write_json(tmp_path / ("n" * 250 + ".json"), 1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["1\n"]
    with pytest.raises(RequestError, match="File name too long"):
        write_json(tmp_path / ("n" * 256), 1)
    assert len(list(tmp_path.iterdir())) == 1
