"""Own-loss selector: heads that lost by their own weights, not by what they read."""

from __future__ import annotations

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.evidence import Evidence
from lcc_lens.core.errors import RequestError


def score_own(evidence: Evidence) -> HeadScores:
    r"""The mean squared own part per head, $\frac{1}{N d_{head}} \sum_n |\delta_n^{pattern} + \delta_n^{value}|^2$.

    The difference without what the head inherits from a changed input; see
    :func:`~lcc_lens.analysis.causes.division.find_causes`.

    Raises:
        RequestError: the causes of differences were not found.
    """
    if evidence.causes is None:
        raise RequestError("expected the causes of every head's difference, got none; scan with causes")
    heads = evidence.causes.heads
    return HeadScores("own", heads.own.clone(), heads.own_stderr.clone(), len(evidence.sequences))
