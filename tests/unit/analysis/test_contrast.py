"""Wrong answers that go on from the right ones' cache give what whole forwards give, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, FORGETFUL, TOO_SHORT_A_WINDOW, family
from support.reference import head_outputs
from support.tiers import mostly_slow
from support.tiny import N_HEADS, save_model, tiny_tokenizer
from torch import Tensor

from lcc_lens.analysis.scan import passes
from lcc_lens.analysis.scan.contrastive import shared_length, visit_pairs
from lcc_lens.analysis.scan.scan import scan
from lcc_lens.data.batches import TokenSequence, encode_pair, pad, rounded_length
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.models.hooked import kv_cache
from lcc_lens.models.hooked.activations import TokenPositions, sampled_positions, visit_sites
from lcc_lens.models.hooked.kv_cache import PrefixCache, can_reuse_cache
from lcc_lens.models.pair import load_pair

EXAMPLES = tuple(
    Example(prompt, response, prompt, wrong)
    for prompt, response, wrong in [
        ("one and a good deal more of it:", " yes, because of that", " yes, but"),  # share their first tokens
        ("two:", " abcde", " ab"),  # the wrong one is a prefix of the right one
        ("three, at length:", " ab", " abcdefghijk"),  # and the other way round
        ("four", " x", " y"),
        ("", "nothing before it", "and nothing shared"),
        ("five, of medium length", " no", " maybe, who knows"),
    ]
)


PREAMBLE = "Below is a question. Answer it! "


def made_up(preamble: str = "") -> Data:
    """The examples, each with the same words before it."""
    examples = (Example(preamble + e.prompt, e.response, preamble + e.prompt, e.wrong) for e in EXAMPLES)
    return Data("made up", "contrastive", tuple(examples), "this file")


def encoded(tokenizer: Any, preamble: str = "") -> tuple[list[TokenSequence], list[TokenSequence]]:
    sides = [
        [encode_pair(tokenizer, preamble + e.prompt, str(t), 128) for t in (e.response, e.wrong)] for e in EXAMPLES
    ]
    return [right for right, _ in sides], [wrong for _, wrong in sides]


def alone(model: Any, sequences: list[TokenSequence]) -> list[Tensor]:
    """Every layer's head outputs at the end of each sequence, run by itself."""
    layers: list[list[Tensor]] = [[] for _ in range(model.cfg.n_layers)]
    for sequence in sequences:
        end = TokenPositions(torch.tensor([0]), torch.tensor([len(sequence) - 1]))
        visit_sites(model, sequence.tokens[None], {"z": end}, lambda site, layer, z: layers[layer].append(z.clone()))
    return [torch.cat(layer) for layer in layers]


def paired(model: Any, right: list[TokenSequence], wrong: list[TokenSequence]) -> tuple[list[Tensor], list[Tensor]]:
    batch = pad(right, range(len(right)))
    ends = TokenPositions(torch.arange(len(right)), batch.lengths - 1)
    found: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    readers = [lambda site, layer, z, into=into: into.__setitem__(layer, z.clone()) for into in found]
    visit_pairs(PrefixCache(model), batch, right, wrong, {"z": ends}, *readers)
    return tuple([layers[i] for i in range(model.cfg.n_layers)] for layers in found)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Count the padded tokens of every forward pass of a model."""

    def watch(model: Any) -> list[int]:
        read: list[int] = []
        run = model.run_with_hooks

        def counting(tokens: Tensor, **options: Any) -> Any:
            read.append(tokens.numel())
            return run(tokens, **options)

        monkeypatch.setattr(model, "run_with_hooks", counting, raising=False)
        return read

    return watch


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, "llama", "gpt2", "mistral, 4"))
def test_both_answers_equal_whole_forwards(name: str, tmp_path: Path, tokenizer: Any) -> None:
    model = family(name, tmp_path)
    right, wrong = encoded(tokenizer)
    assert can_reuse_cache(model) == (name not in TOO_SHORT_A_WINDOW | FORGETFUL)
    for found, sequences in zip(paired(model, right, wrong), (right, wrong), strict=True):
        for layer, expected in zip(found, alone(model, sequences), strict=True):
            assert torch.allclose(layer, expected, rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(a, b) for a, b in zip(*paired(model, right, wrong), strict=True))


def test_wrong_answers_are_read_from_where_they_part(tmp_path: Path, tokenizer: Any, n_read: Any) -> None:
    model = family("llama", tmp_path)
    right, wrong = encoded(tokenizer)
    assert can_reuse_cache(model)
    read = n_read(model)
    paired(model, right, wrong)
    longest_rest = max(len(w) - shared_length(r, w) for r, w in zip(right, wrong, strict=True))
    assert read[0] == 6 * max(map(len, right))
    assert sum(read[1:]) <= 6 * rounded_length(longest_rest)
    assert longest_rest < max(map(len, wrong)) / 2


def test_gaps_in_the_cache_count_as_distance_in_a_window(tmp_path: Path, n_read: Any) -> None:
    """Every sequence fits into the window of 24; row two parts so early that its rest would lie beyond it."""
    model = family("mistral", tmp_path)
    ids = torch.randint(1, 257, (80,), generator=torch.Generator().manual_seed(0))
    right = [TokenSequence(ids[:20], 18), TokenSequence(ids[20:28], 6)]
    near = [TokenSequence(torch.cat([ids[:18], ids[60:62]]), 18), TokenSequence(torch.cat([ids[20:27], ids[62:64]]), 6)]
    far = [near[0], TokenSequence(torch.cat([ids[20:26], ids[60:76]]), 6)]
    assert can_reuse_cache(model)
    read = n_read(model)
    for wrong, reused in ((near, True), (far, False)):
        read.clear()
        _, found = paired(model, right, wrong)
        assert (sum(read[1:]) == 2 * 2) == reused
        for layer, expected in zip(found, alone(model, wrong), strict=True):
            assert torch.allclose(layer, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fault", ["no mask", "no cache"])
def test_model_that_cannot_go_on_from_a_cache_reads_whole_answers(
    fault: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family("llama", tmp_path)
    run = model.run_with_hooks

    def faulty(tokens: Tensor, **options: Any) -> Any:
        if fault == "no cache" and "past_key_values" in options:
            raise TypeError("unexpected keyword argument past_key_values")
        options.pop("attention_mask", None)
        return run(tokens, **options)

    monkeypatch.setattr(model, "run_with_hooks", faulty, raising=False)
    right, wrong = encoded(tokenizer)
    assert not can_reuse_cache(model)
    for layer, expected in zip(paired(model, right, wrong)[1], alone(model, wrong), strict=True):
        assert torch.allclose(layer, expected, rtol=1e-4, atol=1e-5)


def test_answers_without_a_question_share_nothing(pair, tmp_path: Path) -> None:
    ids = torch.randint(1, 257, (20,), generator=torch.Generator().manual_seed(0))
    right, wrong = ([TokenSequence(part, 1) for part in ids[i : i + 10].split([3, 7])] for i in (0, 10))
    for layer, expected in zip(paired(pair.dense, right, wrong)[1], alone(pair.dense, wrong), strict=True):
        assert torch.allclose(layer, expected, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_shared_tokens_are_shared_and_leave_one(right: list[int], wrong: list[int]) -> None:
    n = shared_length(TokenSequence(torch.tensor(right), 1), TokenSequence(torch.tensor(wrong), 1))
    assert right[:n] == wrong[:n]
    assert n < len(wrong)
    assert n == len(right) or n == len(wrong) - 1 or right[n] != wrong[n]


@pytest.mark.parametrize(
    ("positions", "shard", "preamble"),
    [("all", 128, ""), ("last", 2, ""), ("end", 3, ""), ("last", 2, PREAMBLE), ("response", 128, PREAMBLE)],
)
def test_probes_read_what_plain_models_give(
    pair,
    dense_dir: Path,
    pruned_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    positions: str,
    shard: int,
    preamble: str,
) -> None:
    """Four places of every pair; those at the question's end come from the pass over the question and its answer."""
    features: list[Any] = []
    scan_module = import_module("lcc_lens.analysis.scan.scan")  # lcc_lens.analysis.scan.scan is the function
    score = scan_module.score

    def keeping(names: list[str], evidence: Any) -> Any:
        features[:] = evidence.layers()
        return score(names, evidence)

    monkeypatch.setattr(passes, "SHARD", shard)
    monkeypatch.setattr(scan_module, "score", keeping)
    found_scan = scan(pair, made_up(preamble), positions=positions, batch_tokens=200, display=0)
    right, wrong = encoded(pair.tokenizer, preamble)
    question = [s.tokens[: s.loss_from] for s in right]
    expected = {
        "z_pruned_question": head_outputs(pruned_dir, question, N_HEADS),
        "z_dense_question": head_outputs(dense_dir, question, N_HEADS),
        "z_dense_right": head_outputs(dense_dir, [s.tokens for s in right], N_HEADS),
        "z_dense_wrong": head_outputs(dense_dir, [s.tokens for s in wrong], N_HEADS),
    }
    assert len(features) == pair.n_layers
    for name, z in expected.items():
        found = torch.stack([getattr(layer, name) for layer in features], dim=1)
        assert torch.allclose(found, torch.stack([one[-1] for one in z]), rtol=1e-4, atol=1e-5), name
    whole = [head_outputs(path, [s.tokens for s in right], N_HEADS) for path in (dense_dir, pruned_dir)]
    counted = [sampled_positions(sequence, positions) for sequence in right]
    dense, pruned = (torch.cat([z[where] for z, where in zip(side, counted, strict=True)]) for side in whole)
    assert torch.allclose(found_scan.mean_difference, (dense - pruned).mean(0), atol=1e-5)


def test_what_all_examples_begin_with_is_read_once(pair, n_read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(pair, made_up(), positions="last", display=0)  # what is tried once is tried
    monkeypatch.setattr("lcc_lens.data.batches.rounded_length", lambda n: n)
    read = [n_read(model) for model in (pair.dense, pair.pruned)]
    tokens = []
    for least in (16, 1000):
        monkeypatch.setattr(passes, "LEAST_PREFIX", least)
        scan(pair, made_up(PREAMBLE), positions="last", display=0, batch_tokens=10_000)
        tokens.append([sum(one) for one in read])
        for one in read:
            one.clear()
    for once, every_time in zip(*tokens, strict=True):
        assert every_time - once == (len(EXAMPLES) - 1) * (len(PREAMBLE) - 2)


@pytest.mark.parametrize("preamble", ["", PREAMBLE])
def test_scan_of_a_model_without_reuse_equals_plain_models(tmp_path: Path, preamble: str) -> None:
    folders = [tmp_path / "dense", tmp_path / "pruned"]
    for seed, path in enumerate(folders):
        torch.manual_seed(seed)
        save_model(FAMILIES["mistral, 4"]().eval(), path)
    windowed = load_pair(*folders)
    found = scan(windowed, made_up(preamble), batch_tokens=60, positions="response")
    right, _ = encoded(windowed.tokenizer, preamble)
    dense, pruned = (
        torch.cat([
            z[sampled_positions(sequence, "response")]
            for z, sequence in zip(head_outputs(path, [s.tokens for s in right], 4), right, strict=True)
        ])
        for path in folders
    )  # fmt: skip
    assert torch.allclose(found.mean_difference, (dense - pruned).mean(0), atol=1e-5)
    assert found.selected_by.keys() == {"probe", "interaction", "attribution"}
    assert not kv_cache.can_reuse_cache(windowed.dense)
