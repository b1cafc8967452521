"""Head scores: means over examples, their errors, and rank correlations as scipy has them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores

N_LAYERS, N_HEADS = 2, 5


def scored(values: Tensor) -> HeadScores:
    return HeadScores("made up", values, torch.zeros_like(values), 1)


@given(st.lists(st.integers(-3, 3), min_size=20, max_size=20).filter(lambda v: len(set(v[:10])) > 1 < len(set(v[10:]))))
@settings(max_examples=60, deadline=None)
def test_rank_correlation_is_spearmans_with_ties(values: list[int]) -> None:
    first, second = torch.tensor(values).float().reshape(2, N_LAYERS, N_HEADS)
    expected = spearmanr(values[:10], values[10:]).statistic
    assert scored(first).rank_correlation(scored(second)) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_sees_order_alone() -> None:
    values = torch.randn(N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(0))
    assert scored(values).rank_correlation(scored(values.exp() * 1e6)) == pytest.approx(1)
    assert scored(values).rank_correlation(scored(-values)) == pytest.approx(-1)
    assert math.isnan(scored(values).rank_correlation(scored(torch.ones(N_LAYERS, N_HEADS))))


def test_examples_give_a_mean_and_its_standard_error() -> None:
    scores = 1000 + torch.randn(7, N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(1))
    found = HeadScores.from_examples("made up", scores, {"rank": 2})
    assert (found.selector, found.n_examples, found.settings) == ("made up", 7, {"rank": 2})
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            column = scores[:, layer, head].tolist()
            mean = sum(column) / 7
            spread = math.sqrt(sum((x - mean) ** 2 for x in column) / 6 / 7)
            assert float(found.value[layer, head]) == pytest.approx(mean)
            assert float(found.stderr[layer, head]) == pytest.approx(spread, rel=1e-5)


def test_one_example_has_no_standard_error() -> None:
    found = HeadScores.from_examples("made up", torch.ones(1, N_LAYERS, N_HEADS))
    assert bool(found.stderr.isnan().all())
    assert bool((found.value == 1).all())
    assert found.settings == {}
