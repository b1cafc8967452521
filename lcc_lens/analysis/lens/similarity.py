"""Cosine similarity of different heads' lost components, in the residual stream and as z vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.lens.checks import check_components
from lcc_lens.core.heads import Head, all_heads
from lcc_lens.core.ranges import ranged
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.direct_path import OutputProjections
from lcc_lens.models.hooked.hooks import HookedModel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class ComponentSimilarity(Shown):
    """Cosines between the lost components of all heads.

    ``resid`` compares their outputs in the residual stream; ``raw`` compares them as z vectors, within one layer only
    (NaN elsewhere), which means little, since every head has its own W_O. A head that lost nothing, or whose output is
    not used, has NaN.
    """

    heads: tuple[Head, ...]
    resid: Float[Tensor, "head head"]
    raw: Float[Tensor, "head head"]

    def table(self) -> pd.DataFrame:
        """The matrix of cosines in the residual stream, labelled by head."""
        import pandas as pd

        labels = [str(head) for head in self.heads]
        return pd.DataFrame(self.resid.numpy(), index=labels, columns=labels)


@ranged
def component_similarity(model: HookedModel, components: LostComponents, *, rank: int = 1) -> ComponentSimilarity:
    r"""Cosines between all heads' lost components in the residual stream, $c_h W_O[h]$.

    Args:
        model: the hooked pruned model, with W_O.
        components: of a scan of the pair.
        rank: K of the components; 1 compares the first directions.

    Raises:
        RequestError: the components are another model's, or the rank is out of range.
    """
    check_components(model, components)
    projections, constants = OutputProjections.of(model), components.component(rank)
    n_layers, n_heads, d_head = constants.shape
    heads = all_heads(n_layers, n_heads)
    outputs = torch.stack([projections.output(head, constants[head]).cpu() for head in heads])
    layer = torch.arange(n_layers).repeat_interleave(n_heads)
    raw = _cosines(constants.reshape(-1, d_head)).masked_fill(layer[:, None] != layer, math.nan)
    return ComponentSimilarity(tuple(heads), _cosines(outputs), raw)


def _cosines(vectors: Float[Tensor, "vector coordinate"]) -> Float[Tensor, "vector vector"]:
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)  # a zero vector gives NaN
    cosines: Tensor = unit @ unit.T
    return cosines.float()
