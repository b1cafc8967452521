"""The scan of a pair, against plain models run one example at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import head_outputs, layer_outputs, probe_accuracy
from support.tiny import D_HEAD, D_MODEL, N_HEADS, N_LAYERS
from torch import Tensor

from lcc_lens.analysis.probes.published import fit_linear_probes, split_pairs
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures, linear_probe_scores
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import encode, load_data

CHOSEN = (3, -2, 29, -30, 400)  # questions have 29 or 30 tokens; nothing counts twice


def positions_of(sequence: TokenSequence, positions: Any) -> list[int]:
    """Where a sequence counts, spelt out."""
    n, border = len(sequence), sequence.loss_from
    if isinstance(positions, tuple):
        return sorted({p % n for p in positions if -n <= p < n})
    return {"all": list(range(n)), "last": [border - 1], "end": [n - 1], "response": list(range(border - 1, n - 1))}[
        positions
    ]


def plain_samples(directory: Path, sequences: list[TokenSequence], positions: Any) -> dict[str, Tensor]:
    """By site ``[sample, layer, part, width]`` from a plain model, one example at a time."""
    tokens = [s.tokens for s in sequences]
    mlp, resid = layer_outputs(directory, tokens)
    by_site = {"z": head_outputs(directory, tokens, N_HEADS), "mlp": mlp, "resid": resid}
    at = [positions_of(s, positions) for s in sequences]
    return {site: torch.cat([x[i] for x, i in zip(xs, at, strict=True)]) for site, xs in by_site.items()}


@pytest.mark.parametrize("positions", ["all", "last", "end", "response", CHOSEN])
def test_scan_equals_plain_models_one_example_at_a_time(
    pair, dense_dir: Path, pruned_dir: Path, question_file: Path, positions: Any
) -> None:
    data = load_data(str(question_file), n=9)
    found = scan(pair, data, positions=positions, batch_tokens=100, spectra=("resid", "z", "mlp"), display=0)
    sequences = encode(data, pair.tokenizer)
    assert {len(s) for s in sequences} == {29, 30}
    plain = [plain_samples(directory, sequences, positions) for directory in (dense_dir, pruned_dir)]
    assert found.record.positions == positions
    assert found.mean_difference.shape == (N_LAYERS, N_HEADS, D_HEAD)
    assert found.others["mlp"].mean_difference.shape == (N_LAYERS, 1, 44)
    assert found.others["resid"].mean_difference.shape == (N_LAYERS, 1, D_MODEL)
    for site, statistics in {"z": found.heads, **found.others}.items():
        dense, pruned = (samples[site] for samples in plain)
        delta = dense - pruned
        moment = torch.einsum("nlpd,nlpe->lpde", delta, delta)
        assert found.record.n_samples == statistics.n_samples == len(delta)
        assert torch.allclose(statistics.mean_difference, delta.mean(0), atol=1e-4)
        assert torch.allclose(statistics.second_moment, moment, rtol=1e-3, atol=1e-3)
        assert torch.allclose(statistics.squared_dense, dense.square().sum((0, 3)), rtol=1e-4)
        assert torch.allclose(statistics.squared_pruned, pruned.square().sum((0, 3)), rtol=1e-4)
        assert torch.allclose(statistics.dot, (dense * pruned).sum((0, 3)), rtol=1e-3, atol=1e-2)
        values = torch.linalg.svdvals(delta.permute(1, 2, 0, 3).double())
        n = values.shape[-1]
        assert torch.allclose(statistics.singular_values[..., :n], values.float(), rtol=1e-3, atol=1e-2)
        assert float(statistics.singular_values[..., n:].sum()) < 0.1
        assert float(delta.abs().max()) > 0.1


def test_heads_have_directions_whatever_other_spectra_are_asked_for(pair, question_file: Path, tmp_path: Path) -> None:
    data = load_data(str(question_file), n=4)
    found = scan(pair, data, spectra=("mlp",), selectors=("mse",), display=0, run=tmp_path)
    assert found.components.directions.shape == (N_LAYERS, N_HEADS, D_HEAD, D_HEAD)
    assert found.others["mlp"].singular_values is not None


def test_layer_table_pools_heads_beside_the_other_sites(
    pair, dense_dir: Path, pruned_dir: Path, question_file: Path
) -> None:
    data = load_data(str(question_file), n=5)
    table = scan(pair, data, display=0).layer_table()
    sequences = encode(data, pair.tokenizer)
    dense, pruned = (plain_samples(directory, sequences, "all") for directory in (dense_dir, pruned_dir))
    assert table[["site", "layer"]].values.tolist() == [[s, i] for s in ("z", "mlp", "resid") for i in range(3)]
    for row in table.itertuples():
        a, b = (samples[row.site][:, row.layer].flatten(1).double() for samples in (dense, pruned))
        lost = (a - b).square().sum()
        assert row.relative_loss == pytest.approx(float((lost / a.square().sum()).sqrt()), rel=1e-4)
        assert row.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-4)
        constant = float(len(a) * (a - b).mean(0).square().sum() / lost)
        assert row.constant_share == pytest.approx(constant, rel=1e-3)
        assert row.input_share == pytest.approx(1 - constant, rel=1e-3)


def test_token_losses_equal_plain_models_and_pieces_join_to_the_text(
    pair, dense_dir: Path, pruned_dir: Path, question_file: Path
) -> None:
    data = load_data(str(question_file), n=5)
    found = scan(pair, data, display=2, positions="last")
    sequences = encode(data, pair.tokenizer)
    tokens = [s.tokens for s in sequences]
    dense, pruned = (head_outputs(directory, tokens, N_HEADS) for directory in (dense_dir, pruned_dir))
    assert [token.example for token in found.tokens] == [0, 1]
    for i, token in enumerate(found.tokens):
        assert "".join(token.pieces) == data.examples[i].prompt + data.examples[i].response
        assert token.loss_from == sequences[i].loss_from
        assert token.loss.shape == (len(tokens[i]), N_LAYERS, N_HEADS)
        assert torch.allclose(token.loss, (dense[i] - pruned[i]).norm(dim=-1) / dense[i].norm(dim=-1), rtol=1e-3)
    assert not scan(pair, data, display=0).tokens
    assert len(scan(pair, data, display=9).tokens) == 5


def test_text_is_scanned_without_probe_scores(pair, text_file: Path) -> None:
    found = scan(pair, load_data(str(text_file)), max_length=64, limit=5)
    assert found.record.n_examples == 5
    assert found.record.n_samples == 5 * 64
    assert list(found.selected_by) == ["attribution"]
    with pytest.raises(RequestError, match="expected probe scores, got a scan of 5 sequences"):
        found.select("probe")


def test_probe_scores_equal_a_loop_over_heads(pair, dense_dir: Path, pruned_dir: Path, question_file: Path) -> None:
    data = load_data(str(question_file), n=20)
    found = scan(pair, data, probe_solver="published")
    right = encode(data, pair.tokenizer)
    flipped = tuple(dataclasses.replace(e, response=e.wrong) for e in data.examples)
    wrong = encode(dataclasses.replace(data, examples=flipped), pair.tokenizer)
    z_right = torch.stack([z[-1] for z in head_outputs(dense_dir, [s.tokens for s in right], N_HEADS)])
    z_wrong = torch.stack([z[-1] for z in head_outputs(dense_dir, [s.tokens for s in wrong], N_HEADS)])
    questions = [s.tokens[: s.loss_from] for s in right]
    z_question = torch.stack([z[-1] for z in head_outputs(pruned_dir, questions, N_HEADS)])
    by_layer = (z.unbind(1) for z in (z_question, z_right, z_wrong))
    layers = [LayerFeatures(question, None, *answers) for question, *answers in zip(*by_layer, strict=True)]
    scores = linear_probe_scores(layers, found.components, solver="published").value
    accuracy = found.scores("probe").value
    assert torch.allclose(accuracy, scores, atol=0.09)  # one answer of twelve may sit on the border
    assert float((accuracy - scores).abs().mean()) < 0.02


def test_all_heads_at_once_learn_what_one_head_learns_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 30, 12, generator=generator)
    labels = torch.arange(30) < 15
    features[2, :15] += 0.8
    start = fit_linear_probes(features, labels, epochs=0, seed=3)
    probe = fit_linear_probes(features, labels, epochs=50, seed=3)
    for head in range(4):
        data = (features[head], labels)
        accuracy, weight = probe_accuracy(data, data, start.weight[head], start.bias[head], epochs=50)
        logits = features[head] @ probe.weight[head] + probe.bias[head]
        assert float(((logits >= 0) == labels).float().mean()) == pytest.approx(accuracy)
        assert torch.allclose(probe.weight[head], weight, atol=1e-5)
    assert not torch.allclose(probe.weight, start.weight, atol=0.1)


def test_pairs_stay_together_and_both_sides_get_some() -> None:
    for n_pairs in (2, 7, 100):
        train, test = split_pairs(n_pairs, 0.3, seed=5)
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(n_pairs))
        assert len(test) >= 1
        assert len(train) >= 1


def test_scan_survives_save_and_load_bit_for_bit(found: Scan, tmp_path: Path) -> None:
    found.save(tmp_path)
    again = Scan.load(tmp_path)
    assert again.record == found.record
    for name, tensor in found._tensors().items():
        assert torch.equal(again._tensors()[name], tensor), name
    assert again.selected_by.keys() == found.selected_by.keys() == {"attribution", "probe", "interaction"}
    assert again.scores("interaction").settings == found.scores("interaction").settings
    assert [token.pieces for token in again.tokens] == [token.pieces for token in found.tokens]
    assert again.others.keys() == {"mlp", "resid"}
    assert again.select("mse", share=0.4) == found.select("mse", share=0.4)


def test_changed_scan_is_refused(found: Scan, tmp_path: Path) -> None:
    found.save(tmp_path)
    file = tmp_path / "scan.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(RequestError, match="got a changed file; scan again"):
        Scan.load(tmp_path)
    file.write_bytes(bytes(content[:50]))
    with pytest.raises(RequestError, match="damaged"):
        Scan.load(tmp_path)


def test_selection_takes_the_highest_scores(found: Scan) -> None:
    for selector in ("probe", "mse", "random"):
        scores = found.scores(selector).value
        assert scores.shape == (N_LAYERS, N_HEADS)
        chosen = found.select(selector, share=0.3)
        assert len(chosen) == 5  # 0.3 x 15 rounded up
        assert chosen == sorted(set(chosen))
        left_out = [scores[h] for h in (Head(x, y) for x in range(3) for y in range(5)) if h not in chosen]
        assert min(float(scores[h]) for h in chosen) >= max(float(s) for s in left_out)
    assert len(found.select("mse", share=1.0)) == 15
    assert found.select("random", share=0.3, seed=1) == found.select("random", share=0.3, seed=1)
    assert any(found.select("random", share=0.3, seed=s) != found.select("random", share=0.3) for s in (1, 2, 3))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01])
def test_share_outside_zero_to_one_is_refused(found: Scan, share: float) -> None:
    with pytest.raises(RequestError, match="expected a share of heads above 0"):
        found.select("mse", share=share)


@pytest.mark.parametrize("selector", ["attribution", "mse"])
def test_the_ranking_is_best_first_and_the_selection_in_the_order_of_the_model(found: Scan, selector: str) -> None:
    scores, ranking = found.scores(selector).value, found.ranking(selector)
    assert [float(scores[head]) for head in ranking] == sorted(scores.flatten().tolist(), reverse=True)
    assert found.select(selector, share=0.4) == sorted(ranking[:6]) != ranking[:6]


def test_table_has_a_row_per_head_in_order(found: Scan) -> None:
    table = found.table()
    assert len(table) == 15
    row = table[(table.layer == 2) & (table["head"] == 4)].iloc[0]
    assert row.relative_loss == pytest.approx(float(found.relative_loss[2, 4]))
    assert row.mse == pytest.approx(float(found.scores("mse").value[2, 4]))
    names = "layer head dense_head is_removed relative_loss cosine constant_share input_share effective_rank"
    scored = [f"{name}{end}" for name in ("attribution", "probe", "interaction", "mse") for end in ("", "_stderr")]
    assert table.columns.tolist() == [*names.split(), "first_direction_share", *scored]
    assert row.dense_head == 4
    assert not table.is_removed.any()
    assert row.constant_share + row.input_share == pytest.approx(1)
    assert row.first_direction_share == pytest.approx(float(found.heads.explained_share[2, 4, 0]), rel=1e-4)
    assert row.effective_rank == pytest.approx(float(found.heads.effective_rank[2, 4]), rel=1e-3)
