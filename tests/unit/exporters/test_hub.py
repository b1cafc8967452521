"""The hub: what is sent is a whole directory, under the user's login, and a refusal is one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.exporters.hub import push_to_hub


def test_directory_is_sent_whole(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, object]]] = []

    def create(repository: str, **settings: object) -> None:
        calls.append((repository, settings))

    def upload(**settings: object) -> SimpleNamespace:
        calls.append(("upload", settings))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert push_to_hub(dense_dir, "me/restored") == "https://hub/commit"
    assert calls[0] == ("me/restored", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == dense_dir
    assert calls[1][1]["repo_id"] == "me/restored"
    assert not any("token" in settings for _, settings in calls)


def test_refusals_are_one_line(dense_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a repository owner/name to upload to, got 'restored'"):
        push_to_hub(dense_dir, "restored")
    with pytest.raises(RequestError, match=r"got no config\.json there"):
        push_to_hub(tmp_path, "me/restored")
    with pytest.raises(LensError, match=r"got a refusal .*; log in with hf auth login"):  # the tests are offline
        push_to_hub(dense_dir, "me/restored")
