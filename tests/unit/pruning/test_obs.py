"""SparseGPT against its definition, column by column, and the laws of second-order pruning."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import inputs_like_text
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, Unstructured
from lcc_lens.pruning.methods.moments import InputMoments
from lcc_lens.pruning.methods.obs import DAMPING, damped, output_error, sparsegpt
from lcc_lens.pruning.methods.pruners import LayerTask
from lcc_lens.pruning.methods.sparsegpt import SparseGPTPruner


def oracle(weight: Tensor, H: Tensor, pattern: Pattern, block_size: int) -> Tensor:
    """Remove one column's share after another; all columns to the right are updated at once, nothing is deferred.

    After column j the inverse of the remaining features' second moment is what elimination of j leaves of it.
    """
    W, n_rows, n_columns = weight.clone(), *weight.shape
    H = H + DAMPING * H.diagonal().mean() * torch.eye(n_columns, dtype=H.dtype)
    inverse = torch.linalg.inv(H)
    diagonals, steps = [], []
    for j in range(n_columns):
        diagonals.append(float(inverse[j, j]))
        steps.append(inverse[j] / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    goes = torch.zeros_like(W, dtype=torch.bool)
    for j in range(n_columns):
        if isinstance(pattern, NofM) and j % pattern.m == 0:
            for row in range(n_rows):
                cost = {c: float(W[row, c]) ** 2 / diagonals[c] for c in range(j, j + pattern.m)}
                for c in sorted(cost, key=lambda c: cost[c])[: pattern.m - pattern.n]:
                    goes[row, c] = True
        if isinstance(pattern, Unstructured) and j % block_size == 0:
            stop = min(j + block_size, n_columns)
            cost = {(r, c): float(W[r, c]) ** 2 / diagonals[c] for r in range(n_rows) for c in range(j, stop)}
            n = int(pattern.sparsity * n_rows * stop + 1e-9) - int(pattern.sparsity * n_rows * j + 1e-9)
            for place in sorted(cost, key=lambda place: cost[place])[:n]:
                goes[place] = True
        for row in range(n_rows):
            if goes[row, j]:
                W[row, j:] -= W[row, j].clone() * steps[j][j:]
                W[row, j] = 0
    return W


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.3), Unstructured(0.0), NofM(2, 4), NofM(1, 3), NofM(4, 8)], ids=str
)
@pytest.mark.parametrize("block_size", [8, 9, 128])
def test_the_sweep_is_its_definition(pattern: Pattern, block_size: int) -> None:
    width = 24
    X = inputs_like_text(200, width, seed=1)
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = sparsegpt(weight, damped(X.T @ X), pattern, block_size)
    expected = oracle(weight, X.T @ X, pattern, block_size)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, atol=1e-9)
    assert int((found == 0).sum()) == int(pattern.sparsity * weight.numel() + 1e-9)


@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.8, "2:4"]), st.sampled_from(["text", "independent", "few"]))
@settings(max_examples=40, deadline=None)
def test_the_error_is_never_above_wandas(seed: int, share: float | str, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    X = inputs_like_text(96, 16, seed).float()
    if kind == "independent":  # nothing to compensate with: only the choice of weights matters
        X = torch.eye(16).repeat(6, 1) * torch.rand(16, generator=generator)
    if kind == "few":
        X = X[:3]
    pattern = NofM(2, 4) if share == "2:4" else Unstructured(float(share))
    weight = torch.randn(5, 16, generator=generator)
    pruner = SparseGPTPruner(LayerTask(pattern))
    pruner.observe("w", X)
    ((_, found),) = pruner.pruned({"w": weight})
    size = X.norm(dim=0)
    lowest = (weight.abs() * size).reshape(-1, 4) if share == "2:4" else weight.abs() * size
    n = 2 if share == "2:4" else int(float(share) * 16)
    mask = torch.zeros_like(lowest).scatter_(1, lowest.argsort(dim=1, stable=True)[:, :n], 1).reshape(5, 16).bool()
    wanda = weight.masked_fill(mask, 0)
    error, bound = (((candidate - weight) @ X.T).square().sum() for candidate in (found, wanda))
    assert error <= bound * (1 + 1e-4) + 1e-9
    assert (found == 0).sum() >= mask.sum()  # at least the same budget


def test_compensation_pays_where_features_correlate() -> None:
    X = inputs_like_text(400, 32, seed=3)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = sparsegpt(weight, damped(X.T @ X), Unstructured(0.5))
    only_masked = torch.where(found == 0, 0, weight)
    moment = X.T @ X
    assert output_error(found - weight, moment) < 0.8 * output_error(only_masked - weight, moment)


def test_dead_features_lose_their_weights_and_break_nothing() -> None:
    X = inputs_like_text(100, 12, seed=5)
    X[:, [2, 7]] = 0
    weight = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    inputs = damped(X.T @ X)
    assert inputs.dead.nonzero().flatten().tolist() == [2, 7]
    found = sparsegpt(weight, inputs, Unstructured(0.25))
    assert bool((found[:, [2, 7]] == 0).all())
    assert bool(torch.isfinite(found).all())
    assert int((found == 0).sum()) == 18


def test_damping_grows_until_the_matrix_inverts() -> None:
    assert damped(torch.eye(3)).damping == DAMPING
    needed = damped(torch.diag(torch.tensor([1.0, 1.0, -0.04])))  # the mean is 0.65: a hundredth of it is too little
    assert needed.damping == pytest.approx(10 * DAMPING)
    assert torch.allclose(needed.inverse() @ needed.moment, torch.eye(3, dtype=torch.float64), atol=1e-9)


def test_raised_damping_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pruner = SparseGPTPruner(LayerTask(Unstructured(0.5)))
    pruner.observe("layer.w", torch.ones(4, 4))
    pruner._moments._sums["layer.w"] -= 3 * torch.eye(4)
    with caplog.at_level(logging.WARNING, logger="lcc_lens"):
        list(pruner.pruned({"layer.w": torch.rand(3, 4)}))
    assert "layer.w: damping raised to" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite(value: float) -> None:
    with pytest.raises(LensError, match="expected a finite second moment"):
        damped(torch.full((2, 2), value))


def test_a_moment_that_no_damping_mends() -> None:
    with pytest.raises(LensError, match="that no damping corrects"):
        damped(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))


def test_groups_that_do_not_fill_a_row() -> None:
    with pytest.raises(RequestError, match="expected an input width that 4 divides"):
        sparsegpt(torch.ones(2, 6), damped(torch.eye(6)), NofM(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_exact_sums_of_products(dtype: torch.dtype) -> None:
    X = inputs_like_text(300, 400, seed=8).to(dtype)  # wider than one block
    moments = InputMoments()
    for start in range(0, 300, 77):
        moments.add("w", X[start : start + 77])
    exact = X.double().T @ X.double()
    assert torch.allclose(moments["w"].double(), exact, rtol=1e-4, atol=1e-4 * float(exact.diagonal().mean()))
    assert torch.equal(moments["w"], moments["w"].T)


def test_matrices_that_read_the_same_inputs_share_a_moment() -> None:
    moments = InputMoments()
    for _ in range(2):
        X, Z = torch.randn(5, 4), torch.randn(5, 4)
        for name, value in (("q", X), ("k", X.reshape(-1, 4)), ("o", Z)):
            moments.add(name, value)
    assert (moments.same_input("k"), moments.same_input("o")) == ("q", "o")
    assert torch.equal(moments["q"], moments["k"])
    assert not torch.equal(moments["q"], moments["o"])
    assert len(moments._sums) == 2


def test_moments_of_inputs_that_never_came_or_broke() -> None:
    moments = InputMoments()
    with pytest.raises(LensError, match="expected calibration inputs of w, got none"):
        moments["w"]
    moments.add("w", torch.full((2, 2), float("nan")))
    with pytest.raises(LensError, match="expected finite inputs of w, got NaN or infinity"):
        moments["w"]
