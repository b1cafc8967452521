"""Settings from the environment."""

from __future__ import annotations

import pytest
import torch

from lcc_lens.core.config import default_device
from lcc_lens.core.errors import RequestError

ABSENT = ["meta", "mps", "cpu:x", "gpu", "privateuseone", "cuda:99"]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_DEVICE", name)
    with pytest.raises(RequestError, match=f"expected LCC_LENS_DEVICE to be a device of this machine, got '{name}'"):
        default_device()


def test_the_cpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCC_LENS_DEVICE", "cpu")
    assert default_device() == torch.device("cpu")
