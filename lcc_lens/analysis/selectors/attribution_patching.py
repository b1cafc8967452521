"""Attribution patching: first-order estimate of activation patching, for all heads from one backward pass."""

from __future__ import annotations

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.backward import ResponseGradients


def score_attribution_patching(gradients: ResponseGradients) -> HeadScores:
    r"""The first-order estimate of activation patching, $\sum_t \nabla_{z_t} m \cdot (z_{dense,t} - z_{pruned,t})$.

    To first order in the difference, this is the increase of the mean response log-likelihood (nats per token) when one
    head of the pruned model gets the dense model's output at every position. All heads take one backward pass, where
    patching takes a forward pass each. It is inexact for large differences; see
    :func:`~lcc_lens.analysis.selectors.activation_patching.score_activation_patching` for the exact effect.

    Args:
        gradients: from :func:`~lcc_lens.analysis.selectors.backward.response_gradients`.
    Reference: Nanda, "Attribution Patching: Activation Patching At Industrial Scale", 2023,
    https://www.neelnanda.io/mechanistic-interpretability/attribution-patching
    """
    return HeadScores.from_examples("attribution", gradients.attribution)
