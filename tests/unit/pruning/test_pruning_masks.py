"""Laws of scores, masks and patterns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.sparsity_patterns import (
    NofM,
    Unstructured,
    common_pattern,
    detect_pattern,
    parse_pattern,
    require_fit,
    sparsity,
)
from lcc_lens.pruning.methods.masks import keep_mask
from lcc_lens.pruning.methods.scores import magnitude_score, wanda_score

laws = settings(max_examples=60, deadline=None)
ratios = st.floats(0, 1, exclude_max=True)


@st.composite
def scores(draw: st.DrawFn, step: int = 1) -> Tensor:
    """Scores with many ties and zeros: few distinct values on matrices whose width `step` divides."""
    n_out, n_in = draw(st.integers(1, 5)), step * draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, 4), min_size=n_out * n_in, max_size=n_out * n_in))
    return torch.tensor(values, dtype=torch.float32).reshape(n_out, n_in)


def worst_order(row: Tensor) -> list[int]:
    """Positions from the first to go to the last, in plain Python."""
    return sorted(range(len(row)), key=lambda position: (float(row[position]), position))


@laws
@given(scores(step=7), ratios)
def test_every_row_loses_exactly_its_share_lowest_first(score: Tensor, ratio: float) -> None:
    keep = keep_mask(score, Unstructured(ratio))
    n_zeros = int(score.shape[1] * ratio)
    for row, kept in zip(score, keep, strict=True):
        assert sorted(worst_order(row)[:n_zeros]) == torch.nonzero(~kept).flatten().tolist()


@laws
@given(scores(step=7), ratios)
def test_a_whole_matrix_loses_exactly_its_share_lowest_first(score: Tensor, ratio: float) -> None:
    keep = keep_mask(score, Unstructured(ratio), scope="matrix")
    gone = worst_order(score.flatten())[: int(score.numel() * ratio)]
    assert sorted(gone) == torch.nonzero(~keep.flatten()).flatten().tolist()


@laws
@given(st.data(), st.integers(2, 8))
def test_every_group_keeps_exactly_its_n_highest(data: st.DataObject, m: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    score = data.draw(scores(step=m))
    keep = keep_mask(score, NofM(n, m), scope=data.draw(st.sampled_from(["row", "matrix"])))
    for group, kept in zip(score.reshape(-1, m), keep.reshape(-1, m), strict=True):
        assert sorted(worst_order(group)[m - n :]) == torch.nonzero(kept).flatten().tolist()


def test_scopes_differ_where_rows_do() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert keep_mask(score, Unstructured(0.5)).tolist() == [[False, True], [False, True]]
    assert keep_mask(score, Unstructured(0.5), "matrix").tolist() == [[False, False], [True, True]]


def test_equal_scores_go_from_the_left() -> None:
    assert keep_mask(torch.zeros(2, 5), Unstructured(0.5)).tolist() == [[False, False, True, True, True]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_ties_keep_the_exact_count_in_every_format(dtype: torch.dtype) -> None:
    score = torch.randint(0, 3, (6, 999), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (~keep_mask(score, Unstructured(0.6))).sum(dim=1).tolist() == [599] * 6


def test_wanda_lets_a_large_input_save_a_small_weight() -> None:
    weight, norm = torch.tensor([[-1.0, 2.0, 3.0, -4.0]]), torch.tensor([10.0, 1.0, 1.0, 1.0])
    assert keep_mask(magnitude_score(weight), Unstructured(0.5)).tolist() == [[False, False, True, True]]
    assert keep_mask(wanda_score(weight, norm), Unstructured(0.5)).tolist() == [[True, False, False, True]]


def test_wanda_is_magnitude_for_equal_inputs_and_ignores_their_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, norm = torch.randn(7, 12, generator=generator), torch.rand(12, generator=generator)
    torch.testing.assert_close(wanda_score(weight, torch.ones(12)), magnitude_score(weight))
    masks = [keep_mask(wanda_score(weight, scale * norm), Unstructured(0.5)) for scale in (1.0, 8.0)]
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], keep_mask(magnitude_score(weight), Unstructured(0.5)))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (NofM(2, 4), "2:4"),
        (NofM(1, 4), "2:4"),
        (NofM(4, 8), "4:8"),
        (Unstructured(0.5), "unstructured"),
        (Unstructured(0.02), "unstructured"),
        (Unstructured(0.0), "dense"),
    ],
)
def test_a_pruned_matrix_is_recognised(pattern: NofM | Unstructured, found: str) -> None:
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    pruned = weight * keep_mask(weight.abs(), pattern)
    assert detect_pattern(pruned) == found
    assert sparsity(pruned) == pytest.approx(int(64 * pattern.sparsity) / 64)


def test_one_group_off_is_no_longer_the_pattern() -> None:
    pruned = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(3, 4)
    pruned[2, 4] = 1.0
    assert detect_pattern(pruned) == "unstructured"


def test_a_width_that_does_not_divide_is_no_group_pattern() -> None:
    assert detect_pattern(torch.zeros(3, 6)) == "unstructured"
    assert detect_pattern(torch.zeros(3, 12)) == "2:4"


def test_a_few_zeros_do_not_make_a_matrix_pruned() -> None:
    weight = torch.ones(40, 50)
    weight[3, 4] = weight[7, 8] = 0
    assert detect_pattern(weight) == "dense"
    weight[9, 9] = 0
    assert detect_pattern(weight) == "unstructured"


def test_the_pattern_of_a_model_is_the_one_all_matrices_share() -> None:
    assert common_pattern(["2:4", "2:4"]) == "2:4"
    assert common_pattern(["2:4", "4:8"]) == "4:8"
    assert common_pattern(["2:4", "dense"]) == "unstructured"
    assert common_pattern(["dense"]) == "dense"


@given(st.integers(1, 30), st.integers(1, 30))
@laws
def test_patterns_survive_their_text(n: int, extra: int) -> None:
    pattern = NofM(n, n + extra)
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.sparsity == pytest.approx(extra / (n + extra))


@pytest.mark.parametrize("text", ["", "2", "2:", "2:4:8", "a:b", "-2:4", "0.5", "2/4", f"2:{'9' * 5000}"])
def test_text_that_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected a pattern N:M, got"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4"])
def test_groups_that_keep_all_or_nothing_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=f"0 < N < M, got {text}"):
        parse_pattern(text)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(RequestError, match=r"from 0 to below 1, got"):
        Unstructured(ratio)


def test_groups_that_do_not_fill_the_rows_are_refused() -> None:
    with pytest.raises(RequestError, match="4 divides for pattern 2:4, got 30 in the matrix"):
        keep_mask(torch.rand(3, 30), NofM(2, 4))
    with pytest.raises(RequestError, match=r"got 30 in layers\.0\.o_proj"):
        require_fit(NofM(2, 4), 30, "layers.0.o_proj")
