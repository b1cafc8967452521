"""A hub that does not answer is asked once, not five times for every data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lcc_lens.core import hub
from lcc_lens.core.errors import RequestError
from lcc_lens.data.sources import available_splits
from lcc_lens.models.loading.references import resolve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a hub that nobody reaches was asked for."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    requests: list[str] = []

    class Session:
        def head(self, url: str, **_: Any) -> None:
            requests.append(url)
            raise ConnectionError("Name or service not known")

    for place in (constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.delenv("LCC_LENS_DATA", raising=False)
    hub.reach.cache_clear()
    yield requests
    hub.reach.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(asked: list[str]) -> None:
    for name in ("alpaca", "c4", "alpaca"):
        with pytest.raises(RequestError, match="or let the hub be reached"):
            available_splits(name)
    with pytest.raises(RequestError, match="nothing from the hub"):
        resolve("nobody/nothing")
    assert len(asked) == 1


def test_the_client_works_offline_from_then_on(asked: list[str]) -> None:
    from huggingface_hub import constants

    assert not hub.reach()
    assert constants.HF_HUB_OFFLINE
