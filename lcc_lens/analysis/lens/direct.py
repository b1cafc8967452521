"""The direct effect of constants in head outputs on a task's logit difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.lens.answers import contrasts, difference, streams_at
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.metrics import standard_error
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.datasets import Data
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class DirectEffect(Shown):
    """Direct effect of a constant per head on a task's logit difference, example by example.

    ``pruned`` is the pruned model's logit difference, for comparison.
    """

    heads: tuple[Head, ...]
    effects: Float[Tensor, "example chosen"]
    pruned: Float[Tensor, " example"]

    @property
    def mean(self) -> Float[Tensor, " chosen"]:
        """Each head's mean effect."""
        return self.effects.mean(0)

    @property
    def stderr(self) -> Float[Tensor, " chosen"]:
        """Its standard error over examples; NaN for a single one."""
        return standard_error(self.effects)

    @property
    def total(self) -> tuple[float, float]:
        """Mean and standard error of the sum over heads."""
        total = self.effects.sum(1)
        return float(total.mean()), float(standard_error(total))

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, effect, stderr."""
        import pandas as pd

        layers, heads = zip(*self.heads, strict=True)
        columns = {"layer": layers, "head": heads, "effect": self.mean.tolist(), "stderr": self.stderr.tolist()}
        return pd.DataFrame(columns)


@ranged
def direct_effect(
    pair: Pair,
    data: Data | str | Sequence[str],
    heads: Sequence[Head | tuple[int, int]],
    constants: Float[Tensor, "chosen d_head"],
    *,
    max_length: Length | None = None,
    batch_tokens: Count = 1024,
) -> DirectEffect:
    r"""Direct effect of constants in head outputs on a task's logit difference.

    With $c$ a head's constant, $u = c W_O[h]$ in the residual stream, and the final norm's gain $g$, centring $C$ and
    scale $s_n$ at the pruned model's actual stream of example n:
    $(W_U[right_n] - W_U[wrong_n]) \cdot (g \odot Cu) / s_n$. Later layers do not see the constant and the scale is
    fixed, so effects of heads add up; indirect effects through later layers are not included. In logits before a soft
    cap.

    A constant changes every question's logits in the same direction. If each of two labels is right half the time, the
    effects have both signs and a mean near zero: look at ``effects`` themselves.

    Right and wrong answers are compared at the first token in which they differ; tokens before it belong to the
    context. Pairs that never differ are skipped with a warning.

    Args:
        pair: the hooked models; the pruned one is read.
        data: contrastive examples.
        heads: the pruned model's heads.
        constants: one per head, in the same order: ``scan.components.component(1)[head_indices(heads)]`` or a
            restoration's ``constants`` with its ``heads``.
        max_length: tokens per example at most; 512, or the models' context if shorter.
        batch_tokens: tokens per forward pass at most.

    Raises:
        RequestError: a head is not in the model, shapes differ, or the data have no usable contrast.
    """
    # TransformerLens' direct_logit_attribution needs norms folded into the weights; a pair's weights are unprocessed.
    chosen = tuple(Head(*head) for head in heads)
    check_heads(chosen, pair.n_layers, pair.n_heads)
    if tuple(constants.shape) != (len(chosen), pair.d_head):
        shape = (len(chosen), pair.d_head)
        raise RequestError(
            f"expected constants of shape {shape}, one per head, got {tuple(constants.shape)}; pass one per head"
        )
    contexts, answers = contrasts(pair, as_data(data), max_length)
    unembedding, projections = Unembedding.of(pair.pruned), OutputProjections.of(pair.pruned)
    streams = streams_at(pair.pruned, projections, contexts, batch_tokens)
    outputs = torch.stack([projections.output(head, value) for head, value in zip(chosen, constants, strict=True)])
    answers = answers.to(streams.resid.device)
    logits = unembedding.direct(outputs, streams.resid, answers)
    scale = streams.attention_scale[:, [head.layer for head in chosen]]
    pruned = unembedding.logits_of(streams.resid[:, None], answers)[:, 0]
    return DirectEffect(chosen, (difference(logits) / scale).cpu(), difference(pruned).cpu())
