"""The weights that survive a mask, refitted: exact where it is stated, and never worse than what they began with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcc_lens.core.errors import LensError
from lcc_lens.pruning.refit import least_squares
from lcc_lens.pruning.refit.least_squares import NormalEquations, masked_least_squares


def problem(seed: int, n: int = 300, d_in: int = 40, d_out: int = 7, share: float = 0.5):
    """Correlated inputs, dense weights and a mask that keeps different columns in every row."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    X = torch.randn(n, d_in, generator=generator) @ mixing
    W = torch.randn(d_out, d_in, generator=generator)
    keep = torch.rand(d_out, d_in, generator=generator) > share
    return X, W, keep


def row_by_row(X: torch.Tensor, Y: torch.Tensor, W: torch.Tensor, keep: torch.Tensor, pull: float) -> torch.Tensor:
    """The oracle: every row's surviving columns alone, by a solver of rectangular systems, the pull as more samples."""
    found = torch.zeros_like(W, dtype=torch.float64)
    for row in range(len(W)):
        columns = keep[row].nonzero()[:, 0]
        eye = torch.eye(len(columns), dtype=torch.float64) * pull**0.5
        samples = torch.cat([X.double()[:, columns], eye])
        wanted = torch.cat([Y.double()[:, row], pull**0.5 * W.double()[row, columns]])
        found[row, columns] = torch.linalg.lstsq(samples, wanted).solution
    return found


@pytest.mark.parametrize("narrow", [128, 0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_least_squares_solution_of_every_row(
    seed: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_NARROW", narrow)
    X, W, keep = problem(seed)
    moment = X.T @ X
    equations = NormalEquations.of(moment, W, ridge=0.01)
    found = masked_least_squares(equations, keep, W * keep, tolerance=1e-6)
    expected = row_by_row(X, X @ W.T, W, keep, 0.01 * float(moment.diagonal().mean()))
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert not torch.allclose(found, W * keep, atol=0.05)
    assert bool((found[~keep] == 0).all())


def test_outputs_wanted_on_other_inputs() -> None:
    """The map sees damaged inputs and has to give what the dense map gave on the whole ones."""
    X, W, keep = problem(0)
    damaged = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    equations = NormalEquations.of(damaged.T @ damaged, W, cross_moment=X.T @ damaged, ridge=1e-6)
    found = masked_least_squares(equations, keep, W * keep)
    expected = row_by_row(damaged, X @ W.T, W, keep, 1e-6 * float((damaged.T @ damaged).diagonal().mean()))
    assert torch.allclose(found.double(), expected, atol=1e-3)
    same_inputs = masked_least_squares(NormalEquations.of(damaged.T @ damaged, W, ridge=1e-6), keep, W * keep)
    errors = [float((damaged @ w.T - X @ W.T).norm()) for w in (found, same_inputs, W * keep)]
    assert errors == sorted(errors)
    assert errors[0] < 0.95 * errors[2]


@given(seed=st.integers(0, 1000), iterations=st.integers(0, 6), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_however_few_steps_no_row_becomes_worse(seed: int, iterations: int, share: float) -> None:
    X, W, keep = problem(seed, share=share)
    equations = NormalEquations.of(X.T @ X, W)
    start = W * keep
    narrow, least_squares._NARROW = least_squares._NARROW, 0
    try:
        found = masked_least_squares(equations, keep, start, max_iterations=iterations)
    finally:
        least_squares._NARROW = narrow
    assert bool((equations.error(found) <= equations.error(start)).all())
    assert bool((found[~keep] == 0).all())


def test_a_mask_that_keeps_everything_gives_the_dense_weights_back() -> None:
    X, W, _ = problem(0)
    keep = torch.ones_like(W, dtype=torch.bool)
    assert torch.allclose(masked_least_squares(NormalEquations.of(X.T @ X, W), keep, 0 * W), W, atol=1e-4)


def test_inputs_that_are_all_zero_leave_the_dense_weights() -> None:
    _, W, keep = problem(0)
    found = masked_least_squares(NormalEquations.of(torch.zeros(40, 40), W), keep, 0 * W)
    assert torch.allclose(found, W * keep, atol=1e-5)


def test_moments_that_are_not_finite_are_refused() -> None:
    _, W, _ = problem(0)
    with pytest.raises(LensError, match="expected finite moments"):
        NormalEquations.of(torch.full((40, 40), torch.nan), W)
