"""Running differences: sums that stream, in whatever batches, against stacked tensors and plain formulas."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcc_lens.analysis import statistics
from lcc_lens.analysis.components import extract_lost_components
from lcc_lens.analysis.statistics import DifferenceStatistics, RunningDifferences
from lcc_lens.core.errors import RequestError

N_LAYERS, N_PARTS, WIDTH = 2, 3, 4
CPU = torch.device("cpu")


def activations(sizes: list[int], seed: int, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Dense and pruned activations ``[sample, layer, part, width]``, one tensor per example."""
    generator = torch.Generator().manual_seed(seed)
    dense = [scale * torch.randn(n, N_LAYERS, N_PARTS, WIDTH, generator=generator) for n in sizes]
    offset = scale * torch.randn(N_LAYERS, N_PARTS, WIDTH, generator=generator)
    noise = [scale * torch.randn(z.shape, generator=generator) for z in dense]
    return dense, [z + 0.3 * e + offset for z, e in zip(dense, noise, strict=True)]


def added(running: RunningDifferences, dense: list[Tensor], pruned: list[Tensor]) -> RunningDifferences:
    """Add one batch of examples."""
    example = torch.repeat_interleave(torch.tensor([len(z) for z in dense]))
    for layer in range(dense[0].shape[1]):
        running.update(layer, torch.cat(dense)[:, layer], torch.cat(pruned)[:, layer], example)
    running.count(example)
    return running


def fed(
    dense: list[Tensor], pruned: list[Tensor], cuts: list[int] | None = None, **options: bool
) -> RunningDifferences:
    """Everything in batches that begin at the cuts."""
    running = RunningDifferences(*dense[0].shape[1:], CPU, **options)
    edges = sorted({0, len(dense), *(cut % len(dense) for cut in cuts or [])})
    for start, end in pairwise(edges):
        added(running, dense[start:end], pruned[start:end])
    return running


def clustered_error(squared: list[Tensor]) -> float:
    """The standard error of a mean over samples of unequal examples: a ratio estimator, example by example."""
    n_samples, n_examples = sum(map(len, squared)), len(squared)
    mean = sum(float(s.sum()) for s in squared) / n_samples
    residuals = [float(s.sum()) - mean * len(s) for s in squared]
    return math.sqrt(n_examples / (n_examples - 1) * sum(r * r for r in residuals)) / n_samples


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=9),
    st.lists(st.integers(0, 8), max_size=4),
    st.integers(0, 999),
    st.sampled_from([1e-8, 1.0, 1e8]),
)
@settings(max_examples=25, deadline=None)
def test_sums_in_any_batches_equal_stacked_tensors(sizes: list[int], cuts: list[int], seed: int, scale: float) -> None:
    dense, pruned = activations(sizes, seed, scale)
    found = fed(dense, pruned, cuts).finish()
    a, b = torch.cat(dense).double(), torch.cat(pruned).double()
    delta = a - b
    lost = delta.square().sum((0, 3))
    assert found.n_samples == len(delta)
    near = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(found.mean_difference / scale, (delta.mean(0) / scale).float(), **near)
    assert torch.allclose(found.relative_loss, (lost / a.square().sum((0, 3))).sqrt().float(), **near)
    norms = a.square().sum((0, 3)).sqrt() * b.square().sum((0, 3)).sqrt()
    assert torch.allclose(found.cosine, ((a * b).sum((0, 3)) / norms).float(), **near)
    constant = len(delta) * delta.mean(0).square().sum(-1) / lost
    assert torch.allclose(found.constant_share, constant.float(), **near)
    assert torch.allclose(found.constant_share + found.input_share, torch.ones(N_LAYERS, N_PARTS))
    assert torch.allclose(found.mse / scale**2, (delta.square().mean((0, 3)) / scale**2).float(), **near)
    assert float(found.relative_loss.min()) > 0.1


@given(st.lists(st.integers(1, 6), min_size=2, max_size=9), st.lists(st.integers(0, 8), max_size=4), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_error_of_the_mean_square_is_clustered_by_example(sizes: list[int], cuts: list[int], seed: int) -> None:
    dense, pruned = activations(sizes, seed)
    found = fed(dense, pruned, cuts, second_moment=False).finish()
    for layer in range(N_LAYERS):
        for part in range(N_PARTS):
            squared = [(a - b)[:, layer, part].double().square().mean(-1) for a, b in zip(dense, pruned, strict=True)]
            expected = clustered_error(squared)
            assert float(found.mse_stderr[layer, part]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_error_of_equal_examples_is_that_of_their_means() -> None:
    dense, pruned = activations([5] * 11, seed=4)
    found = fed(dense, pruned, [3, 7]).finish()
    means = torch.stack([(a - b).square().mean((0, 3)) for a, b in zip(dense, pruned, strict=True)])
    assert torch.allclose(found.mse_stderr, means.std(0) / math.sqrt(11), rtol=1e-4)
    alone = fed(dense[:1], pruned[:1]).finish()
    assert bool(alone.mse_stderr.isnan().all())  # one example says nothing about another one
    assert torch.allclose(alone.mse, means[0], rtol=1e-4)


@pytest.mark.parametrize("n_samples", [1, 3, 40])
def test_spectrum_is_that_of_the_stacked_differences(n_samples: int) -> None:
    dense, pruned = activations([1] * n_samples, seed=2)
    found = fed(dense, pruned, [1, 2]).finish()
    delta = torch.cat(dense).double() - torch.cat(pruned).double()
    expected = torch.zeros(N_LAYERS, N_PARTS, WIDTH, dtype=torch.float64)
    for layer in range(N_LAYERS):
        for part in range(N_PARTS):
            s = torch.linalg.svd(delta[:, layer, part], full_matrices=False).S
            expected[layer, part, : len(s)] = s
    assert torch.allclose(found.singular_values, expected.float(), rtol=1e-4, atol=1e-3)
    energy = expected.square().cumsum(-1)
    assert torch.allclose(found.explained_share, (energy / energy[..., -1:]).float(), atol=1e-4)
    lost, whole = found.components(), extract_lost_components(torch.cat(dense), torch.cat(pruned))
    assert lost.n_determined == min(n_samples, WIDTH)
    assert torch.allclose(lost.component(), whole.component(), atol=1e-5)
    if n_samples == 1:
        assert torch.allclose(found.effective_rank, torch.ones(N_LAYERS, N_PARTS), atol=1e-4)


def test_effective_rank_counts_directions() -> None:
    n, d = 12, WIDTH
    one = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    alike = torch.eye(d).repeat(3, 1)
    dense = torch.stack([one, alike, torch.zeros(n, d)], dim=1)[:, None]
    found = fed(list(dense.split(1)), list(torch.zeros_like(dense).split(1))).finish()
    assert found.effective_rank[0].tolist() == pytest.approx([1, d, 0], abs=1e-4)
    assert found.explained_share[0, 1].tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found.explained_share[0, 2].tolist() == [0, 0, 0, 0]


def test_zeros_give_the_documented_values() -> None:
    x = torch.randn(7, 1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros_like(x)
    dense = torch.cat([nothing, x, nothing, x], dim=2)  # both zero; pruned away; grown from nothing; unchanged
    pruned = torch.cat([nothing, nothing, x, x], dim=2)
    found = fed(list(dense.split(2)), list(pruned.split(2))).finish()
    assert found.relative_loss[0].tolist() == [0, 1, math.inf, 0]
    assert found.cosine[0].tolist() == pytest.approx([1, 0, 0, 1])
    assert found.is_silent[0].tolist() == [1, 1, 0, 0]
    assert found.mse[0, 0] == found.mse[0, 3] == found.mse_stderr[0, 3] == 0
    for share in (found.constant_share, found.input_share):
        assert share[0, 0] == share[0, 3] == 0
    assert float(found.constant_share[0, 1] + found.input_share[0, 1]) == pytest.approx(1)
    for name in ("effective_rank", "explained_share", "singular_values", "mse_stderr"):
        assert bool(getattr(found, name).isfinite().all()), name
    assert bool(found.components().directions.isfinite().all())


def test_constant_difference_is_all_constant_share() -> None:
    dense = torch.randn(9, 1, N_PARTS, WIDTH, generator=torch.Generator().manual_seed(3))
    found = fed([dense], [dense - torch.tensor([1.0, 2.0, -1.0, 0.5])]).finish()
    assert torch.allclose(found.constant_share, torch.ones(1, N_PARTS), atol=1e-5)
    assert float(found.constant_share.max()) <= 1
    assert torch.allclose(found.effective_rank, torch.ones(1, N_PARTS), atol=1e-3)


def test_state_goes_on_to_the_same_bits() -> None:
    dense, pruned = activations([2, 5, 1, 4], seed=8)
    whole = fed(dense, pruned, [2])
    half = fed(dense[:2], pruned[:2])
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    later = RunningDifferences(N_LAYERS, N_PARTS, WIDTH, CPU)
    later.restore(state)
    added(later, dense[2:], pruned[2:])
    assert (later.n_samples, later.n_examples) == (whole.n_samples, whole.n_examples) == (12, 4)
    expected = whole.finish().tensors()
    assert expected.keys() == {f.name for f in fields(DifferenceStatistics)} - {"n_samples", "directions"}
    for name, tensor in later.finish().tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_wide_parts_keep_their_spectrum_and_first_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = activations([3, 4, 2], seed=5)
    narrow = fed(dense, pruned).finish()
    monkeypatch.setattr(statistics, "_WIDE", WIDTH - 1)
    monkeypatch.setattr(statistics, "_BLOCK", 2)  # several blocks, the last one narrower
    monkeypatch.setattr(statistics, "WIDE_DIRECTIONS", 3)
    wide = fed(dense, pruned).finish()
    assert wide.second_moment is None
    assert torch.allclose(wide.singular_values, narrow.singular_values, rtol=1e-4)
    lost, whole = wide.components(), narrow.components()
    assert lost.directions.shape == (N_LAYERS, N_PARTS, 3, WIDTH)
    assert torch.allclose(lost.directions, whole.directions[:, :, :3], atol=1e-3)
    assert torch.allclose(lost.coefficients, whole.coefficients[..., :3], atol=1e-3)
    assert torch.equal(lost.component(), narrow.mean_difference)  # the whole mean, not what three directions hold
    assert torch.allclose(lost.component(2), whole.component(2), atol=1e-3)
    assert not torch.allclose(lost.component(3), lost.component(), atol=1e-2)
    assert torch.allclose(lost.explained_share(), whole.explained_share()[..., :3], rtol=1e-4)
    assert torch.allclose(lost.root_mean_square(), whole.root_mean_square(), rtol=1e-5)
    with pytest.raises(RequestError, match="expected a rank between 1 and the 3 stored directions, got 4"):
        lost.component(4)
    with pytest.raises(RequestError, match=f"expected all {WIDTH} directions for a random basis, got the first 3;"):
        lost.in_random_basis()
    without = fed(dense, pruned, second_moment=False).finish()
    assert without.components().n_held == 0
    assert torch.equal(without.components().component(), narrow.mean_difference)
    assert without.effective_rank is without.explained_share is without.singular_values is None
    assert torch.equal(without.relative_loss, narrow.relative_loss)


def test_a_part_alone_has_the_sums_it_has_among_others() -> None:
    dense, pruned = activations([3, 4, 2], seed=9)
    several = fed(dense, pruned, [2]).finish().tensors()
    alone = fed([z[:, :, 1:2] for z in dense], [z[:, :, 1:2] for z in pruned], [2]).finish().tensors()
    assert alone.keys() == several.keys()
    for name, tensor in alone.items():
        assert torch.allclose(tensor, several[name][:, 1:2], rtol=1e-4, atol=1e-4), name


def test_batches_may_hold_examples_without_samples() -> None:
    dense, pruned = activations([3, 2], seed=6)
    expected = fed(dense, pruned).finish()
    empty = torch.zeros(0, N_LAYERS, N_PARTS, WIDTH)
    running = added(
        RunningDifferences(N_LAYERS, N_PARTS, WIDTH, CPU), [empty, dense[0], empty], [empty, pruned[0], empty]
    )
    added(running, [empty], [empty])
    found = added(running, [dense[1]], [pruned[1]]).finish()
    assert running.n_examples == 2
    assert torch.allclose(found.mse_stderr, expected.mse_stderr)
    assert torch.allclose(found.second_moment, expected.second_moment)
