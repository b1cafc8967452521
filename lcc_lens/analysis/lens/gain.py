"""The logit gain of a head's lost components, read from the head's output alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.lens.answers import at_last, contrasts, difference
from lcc_lens.analysis.lens.checks import check_components
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.metrics import standard_error
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.datasets import Data
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.hooked.hooks import z_name
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class LogitGain(Shown):
    """The logit gain of a head's components, example by example (Eq. 6); cumulative gains are of the first K."""

    made_by: ClassVar[str] = "logit_gain(pair, data, head, components)"

    head: Head
    gains: Float[Tensor, "example component"]
    pruned: Float[Tensor, " example"]
    is_cumulative: bool

    @property
    def mean(self) -> Float[Tensor, " component"]:
        """Each component's mean gain."""
        return self.gains.mean(0)

    @property
    def stderr(self) -> Float[Tensor, " component"]:
        """Its standard error over examples; NaN for a single one."""
        return standard_error(self.gains)

    def table(self) -> pd.DataFrame:
        """One row per component (from 1) or rank K: gain, stderr."""
        import pandas as pd

        number = range(1, self.gains.shape[1] + 1)
        name = "rank" if self.is_cumulative else "component"
        return pd.DataFrame({name: number, "gain": self.mean.tolist(), "stderr": self.stderr.tolist()})


@ranged
def logit_gain(
    pair: Pair,
    data: Data | str | Sequence[str],
    head: Head | tuple[int, int],
    components: LostComponents,
    *,
    cumulative: bool = False,
    max_length: Length | None = None,
    batch_tokens: Count = 1024,
) -> LogitGain:
    r"""The logit gain of each lost component of a head, read from the head's output alone.

    $p_i = f(\mathrm{norm}((z_{pruned}^q + \alpha_i v_i) W_O[h]))$; the gain is $p_i[right] - p_i[wrong]$ minus the same
    without $\alpha_i v_i$. The rest of the residual stream is left out, so this ranks the components of one head; for
    the size of an effect on the model see :func:`direct_effect`. Answers are compared where they first differ.

    Args:
        pair: the hooked models; the pruned one is read.
        data: contrastive examples.
        head: the pruned model's head.
        components: of a scan of this pair.
        cumulative: the gain of the first K components together (Eqs. 4 and 6), for every K, instead.
        max_length: tokens per example at most; 512, or the models' context if shorter.
        batch_tokens: tokens per forward pass at most.

    Raises:
        RequestError: the head is not in the model, the components are another model's, or no usable contrast.

    Reference: RestoreLCC (arXiv 2510.21834), Eqs. 4, 6 and 7.
    """
    (head,) = check_heads([head], pair.n_layers, pair.n_heads)
    check_components(pair.pruned, components)
    contexts, answers = contrasts(pair, as_data(data), max_length)
    unembedding, projections = Unembedding.of(pair.pruned), OutputProjections.of(pair.pruned)
    z = at_last(pair.pruned, contexts, [z_name(head.layer)], batch_tokens)[z_name(head.layer)][:, head.head]
    edits = components.coefficients[head][:, None] * components.directions[head]
    edits = edits.cumsum(0) if cumulative else edits
    edits = torch.cat([torch.zeros_like(edits[:1]), edits])  # the first row is the unchanged pruned model
    outputs = projections.output(head, z)[:, None] + projections.output(head, edits.to(z.device))
    differences = difference(unembedding.logits_of(outputs, answers.to(z.device))).cpu()
    return LogitGain(head, differences[:, 1:] - differences[:, :1], differences[:, 0], cumulative)
