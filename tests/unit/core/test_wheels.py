"""Where the embedded model and data are not installed, everything that needs them names the one command."""

from __future__ import annotations

from pathlib import Path

import pytest

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine import wheels
from lcc_lens.core.machine.wheels import INSTALL_WHEELS, package_folder
from lcc_lens.data import sources
from lcc_lens.data.registry import DATASETS
from lcc_lens.models.loading import gguf
from lcc_lens.models.loading.references import resolve

EMBEDDED = [name for name, dataset in DATASETS.items() if dataset.embedded]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the wheels."""
    for module in (gguf, sources):
        monkeypatch.setattr(module, "package_folder", lambda name: None)


def test_folder_of_a_package_that_is_not_imported() -> None:
    assert package_folder("lcc_lens") == Path(lcc.__file__).parent
    assert package_folder("no_such_package") is None
    assert package_folder("this") is None, "a module is no folder"


def test_the_model_names_the_command(bare: None) -> None:
    with pytest.raises(RequestError, match="expected the wheel of the model smollm2, got none") as refusal:
        resolve("smollm2")
    assert str(refusal.value).endswith(INSTALL_WHEELS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_data_set_names_the_command(bare: None, name: str) -> None:
    with pytest.raises(RequestError, match=f"expected the data set {name}, got no source for it") as refusal:
        lcc.load_data(name, n=4, role="probe")
    assert INSTALL_WHEELS in str(refusal.value)
    assert all(wheel in INSTALL_WHEELS for wheel in (wheels.MODEL_WHEEL, wheels.DATA_WHEEL))


def test_a_set_made_of_others_names_the_command(bare: None) -> None:
    with pytest.raises(RequestError) as refusal:
        lcc.load_data("questions", n=4, role="probe")
    assert INSTALL_WHEELS in str(refusal.value)
