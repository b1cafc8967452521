"""Activations of contrastive pairs with all layers in memory, for tests of the probes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.selectors.linear_probe import LayerFeatures


@dataclass(frozen=True)
class ProbeFeatures:
    """Last-token head outputs of contrastive pairs: the question in the pruned model, both answers in the dense one."""

    z_pruned_question: Float[Tensor, "pair layer head d_head"]
    z_dense_right: Float[Tensor, "pair layer head d_head"]
    z_dense_wrong: Float[Tensor, "pair layer head d_head"]
    z_dense_question: Float[Tensor, "pair layer head d_head"] | None = None

    def layers(self) -> Iterator[LayerFeatures]:
        """One layer after the other."""
        question = self.z_dense_question
        for layer in range(self.z_dense_right.shape[1]):
            yield LayerFeatures(
                self.z_pruned_question[:, layer],
                None if question is None else question[:, layer],
                self.z_dense_right[:, layer],
                self.z_dense_wrong[:, layer],
            )
