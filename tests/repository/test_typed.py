"""The tests check the types and shapes of every call into the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcc_lens.analysis.components import LostComponents, components_along, extract_lost_components
from lcc_lens.models.architecture.sparsity_patterns import Unstructured
from lcc_lens.pruning.methods.settings import PruneConfig


def test_shapes_of_arguments_are_checked_against_each_other() -> None:
    with pytest.raises(TypeError, match="z_pruned"):
        extract_lost_components(torch.ones(4, 3, 5, 6), torch.ones(4, 3, 5, 7))


def test_types_of_plain_arguments_are_checked() -> None:
    shapes: dict[str, Any] = {"directions": torch.ones(3, 5, 2, 6), "singular_values": torch.ones(3, 5, 2)}
    assert isinstance(components_along(**shapes, mean=torch.ones(3, 5, 6), n_samples=4), LostComponents)
    with pytest.raises(TypeError, match="n_samples"):
        components_along(**shapes, mean=torch.ones(3, 5, 6), n_samples="4")  # type: ignore[arg-type]


def test_fields_of_dataclasses_are_checked() -> None:
    with pytest.raises(TypeError, match="sliced"):
        PruneConfig("wanda", Unstructured(0.5), sliced="no")  # type: ignore[arg-type]
