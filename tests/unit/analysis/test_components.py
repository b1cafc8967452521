"""Lost components: what the paper's Eqs. 3 and 4 promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import lost_component

from lcc_lens.analysis.components import components_from_moments, extract_lost_components
from lcc_lens.core.errors import RequestError

SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.integers(1, 7))


def random_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) + 0.3


def moments(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    difference = dense - pruned
    return difference.sum(0), torch.einsum("nlhd,nlhe->lhde", difference, difference), len(difference)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 999))
def test_full_rank_component_is_the_mean_difference(shape: tuple[int, int, int, int], seed: int) -> None:
    dense, pruned = random_pair(shape, seed)
    lost = components_from_moments(*moments(dense, pruned))
    assert torch.allclose(lost.component(), (dense - pruned).mean(0), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 999))
def test_streamed_moments_give_the_svd_of_the_stack(shape: tuple[int, int, int, int], seed: int) -> None:
    dense, pruned = random_pair(shape, seed)
    streamed = components_from_moments(*moments(dense, pruned))
    rank = min(shape[0], shape[3])
    _, s, _ = torch.linalg.svd((dense - pruned).permute(1, 2, 0, 3), full_matrices=False)
    assert torch.allclose(streamed.singular_values[..., :rank], s, atol=2e-3)
    assert float(streamed.singular_values[..., rank:].abs().sum()) < 0.05 * max(1.0, float(s.max()))
    identity = streamed.directions @ streamed.directions.transpose(-1, -2)
    assert torch.allclose(identity, torch.eye(shape[3]).expand_as(identity), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_component_of_each_rank_equals_the_plain_derivation(rank: int) -> None:
    dense, pruned = random_pair((40, 3, 5, 6))
    streamed = components_from_moments(*moments(dense, pruned))
    stacked = extract_lost_components(dense, pruned)
    for layer, head in ((0, 4), (2, 1)):
        oracle = lost_component((dense - pruned)[:, layer, head], rank).float()
        assert torch.allclose(streamed.component(rank)[layer, head], oracle, atol=1e-4)
        assert torch.allclose(stacked.component(rank)[layer, head], oracle, atol=1e-5)


def test_coefficients_point_along_the_mean_and_energy_adds_up() -> None:
    dense, pruned = random_pair((40, 3, 5, 6))
    lost = extract_lost_components(dense, pruned)
    assert bool((lost.coefficients >= 0).all())
    share = lost.explained_share()
    assert bool((share.diff(dim=-1) >= 0).all())
    assert torch.allclose(share[..., -1], torch.ones(3, 5))
    assert torch.allclose(lost.root_mean_square(), (dense - pruned).square().mean((0, 3)).sqrt(), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_outside_the_head_is_refused(rank: int) -> None:
    lost = extract_lost_components(*random_pair((9, 2, 3, 6)))
    with pytest.raises(RequestError, match="expected a rank between 1 and d_head = 6"):
        lost.component(rank)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 999))
def test_random_basis_keeps_the_mean_and_the_energy(shape: tuple[int, int, int, int], seed: int) -> None:
    dense, pruned = random_pair(shape, seed)
    lost = components_from_moments(*moments(dense, pruned))
    turned = lost.in_random_basis(seed)
    gram = turned.directions @ turned.directions.mT
    assert torch.allclose(gram, torch.eye(shape[-1]).expand_as(gram), atol=1e-5)
    assert torch.allclose(turned.component(), lost.component(), atol=1e-4)
    assert torch.allclose(turned.root_mean_square(), lost.root_mean_square(), rtol=1e-4)
    along = torch.einsum("nlhd,lhrd->nlhr", dense - pruned, turned.directions).square().sum(0).sqrt()
    assert torch.allclose(turned.singular_values, along, rtol=1e-2, atol=1e-3)


def test_random_basis_is_another_one_for_every_head_and_seed() -> None:
    lost = components_from_moments(*moments(*random_pair((40, 2, 3, 6))))
    turned = lost.in_random_basis(0).directions
    assert torch.equal(turned, lost.in_random_basis(0).directions)
    assert not torch.allclose(turned, lost.in_random_basis(1).directions, atol=0.1)
    assert not torch.allclose(turned[0, 0].abs(), turned[0, 1].abs(), atol=0.1)
    assert not torch.allclose(turned.abs(), lost.directions.abs(), atol=0.1)
