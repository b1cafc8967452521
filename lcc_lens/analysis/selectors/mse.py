"""MSE selector: heads whose output pruning changed most."""

from __future__ import annotations

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.statistics import DifferenceStatistics


def score_mse(heads: DifferenceStatistics, n_examples: int) -> HeadScores:
    r"""The mean squared difference per head, $\frac{1}{N d_{head}} \sum_n |z_{dense} - z_{pruned}|^2$.

    The standard error is that of a mean over examples, whose positions are not independent.

    Reference: the "heads by MSE" ablation of RestoreLCC (arXiv 2510.21834).
    """
    return HeadScores("mse", heads.mse, heads.mse_stderr, n_examples)
