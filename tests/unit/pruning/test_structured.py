"""Structured pruning of one matrix: greedy choice against brute force, compensation against least squares."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import inputs_like_text
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.pruning.methods.obs import DAMPING, damped
from lcc_lens.pruning.methods.structured import (
    SCHEDULES,
    cheapest_columns,
    cheapest_groups,
    group_errors,
    layer_ratios,
    refitted,
)


def case(seed: int, width: int = 12, rows: int = 5) -> tuple[Tensor, Tensor]:
    X = inputs_like_text(80, width, seed)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), X


def least_squares(weight: Tensor, X: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """The best weights of the kept columns, by numpy's solver on the stacked inputs; and what they cannot mend.

    Damping is a ridge towards the dense weights: extra inputs, one feature each.
    """
    width = weight.shape[1]
    ridge = math.sqrt(DAMPING * float((X.T @ X).diagonal().mean()))
    stacked = torch.cat([X, ridge * torch.eye(width, dtype=X.dtype)])
    target = stacked @ weight.T
    solution = torch.linalg.lstsq(stacked[:, kept], target).solution
    found = torch.zeros_like(weight)
    found[:, kept] = solution.T
    return found, float((stacked @ found.T - target).square().sum())


def brute_force(weight: Tensor, X: Tensor, groups: Tensor, n_remove: int) -> list[int]:
    """Greedy by trying every group: refit all others, measure, remove the one that costs least."""
    gone: list[int] = []
    for _ in range(n_remove):
        costs = {}
        for candidate in (g for g in range(len(groups)) if g not in gone):
            lost = {int(c) for g in [*gone, candidate] for c in groups[g]}
            costs[candidate] = least_squares(weight, X, [c for c in range(weight.shape[1]) if c not in lost])[1]
        gone.append(min(costs, key=lambda g: costs[g]))
    return gone


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=20, deadline=None)
def test_greedy_choice_of_heads_is_brute_force(seed: int, width: int) -> None:
    weight, X = case(seed)
    groups = torch.arange(12).reshape(-1, width)
    assert cheapest_groups(weight, damped(X.T @ X), groups, 2).order.tolist() == brute_force(weight, X, groups, 2)


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_choice_of_single_columns_is_brute_force(seed: int) -> None:
    weight, X = case(seed)
    found = cheapest_columns(weight, damped(X.T @ X), 4, group_fraction=0.0)
    assert found.order.tolist() == brute_force(weight, X, torch.arange(12)[:, None], 4)


def test_the_predicted_error_is_the_error_after_refitting() -> None:
    weight, X = case(1)
    groups = torch.arange(12).reshape(4, 3)
    predicted = group_errors(weight, damped(X.T @ X).inverse(), groups)
    for group, error in zip(groups, predicted, strict=True):
        kept = [c for c in range(12) if c not in group.tolist()]
        assert float(error) == pytest.approx(least_squares(weight, X, kept)[1], rel=1e-8)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True))
@settings(max_examples=20, deadline=None)
def test_compensation_is_least_squares(seed: int, gone: list[int]) -> None:
    weight, X = case(seed)
    found = refitted(weight, damped(X.T @ X), torch.tensor(gone))
    expected, _ = least_squares(weight, X, [c for c in range(12) if c not in gone])
    assert torch.allclose(found, expected, atol=1e-8)
    assert not found[:, gone].any()


def test_groups_of_columns_shrink_and_none_goes_twice() -> None:
    weight, X = case(2, width=200)
    found = cheapest_columns(weight, damped(X.T @ X), 150)
    assert len(set(found.order.tolist())) == 150
    sizes = [len(step) for step in found.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 5 > sizes[-1]
    assert len(cheapest_columns(weight, damped(X.T @ X), 0).order) == 0
    one_by_one = cheapest_columns(weight, damped(X.T @ X), 150, group_fraction=0.0)
    _, grouped_cost = least_squares(weight, X, [c for c in range(200) if c not in set(found.order.tolist())])
    _, single_cost = least_squares(weight, X, [c for c in range(200) if c not in set(one_by_one.order.tolist())])
    assert grouped_cost <= 1.1 * single_cost  # what the speed costs


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_errors_along_the_way_are_what_least_squares_leaves(seed: int, width: int) -> None:
    weight, X = case(seed)
    groups = torch.arange(12).reshape(-1, width)
    found = cheapest_groups(weight, damped(X.T @ X), groups, 3)
    columns = cheapest_columns(weight, damped(X.T @ X), 7, group_fraction=0.3)
    for removal, members in ((found, groups), (columns, torch.arange(12)[:, None])):
        gone: list[int] = []
        for step, error in zip(removal.steps, removal.errors, strict=True):
            gone += members[step].flatten().tolist()
            _, left = least_squares(weight, X, [c for c in range(12) if c not in gone])
            assert error == pytest.approx(left, rel=1e-6)
            assert removal.error_at(len(gone) // members.shape[1]) == pytest.approx(error)
        assert removal.error_at(0) == 0


def test_a_dead_feature_goes_first() -> None:
    weight, X = case(3)
    X[:, 5] = 0
    weight = weight.sign()
    assert cheapest_columns(weight, damped(X.T @ X), 1).order.tolist() == [5]


@given(st.sampled_from(SCHEDULES), st.floats(0.0, 0.9), st.integers(1, 40))
def test_schedules_keep_their_mean_and_their_bounds(schedule, ratio: float, n_layers: int) -> None:
    ratios = layer_ratios(schedule, ratio, n_layers)
    assert sum(ratios) / n_layers == pytest.approx(ratio)
    assert all(-1e-12 <= r <= 0.95 + 1e-12 for r in ratios)
    assert ratios == sorted(ratios, reverse=schedule == "falling")


def test_schedules_have_their_shapes() -> None:
    log = layer_ratios("log", 0.2, 8)
    assert log[0] == pytest.approx(0.1)
    slope = (log[7] - log[0]) / math.log(8)
    assert log == [pytest.approx(log[0] + slope * math.log(layer + 1)) for layer in range(8)]
    assert layer_ratios("falling", 0.2, 8) == log[::-1]
    assert layer_ratios("uniform", 0.2, 3) == [0.2, 0.2, 0.2]
    assert layer_ratios("linear", 0.2, 3) == [pytest.approx(r) for r in (0.1, 0.2, 0.3)]


def test_a_ratio_that_leaves_nothing() -> None:
    with pytest.raises(RequestError, match=r"expected a sparsity of at most 0\.95 for whole heads, got 0\.97"):
        layer_ratios("log", 0.97, 4)
