"""No pass reads past a model's positions: lengths are cut to the context and said, or refused where asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.tiny import build_model, save_model

import lcc_lens as lcc
from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.evaluate import evaluate
from lcc_lens.models.architecture.context import context_of, fitting_length
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.pruning.jobs import prune, refit

BASE = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
#: The context of the models below: shorter than every default.
SHORT = 40


def gpt2(n_positions: int = SHORT) -> torch.nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(**BASE, n_embd=40, n_layer=2, n_head=5, n_positions=n_positions, initializer_range=0.2)
    return hf.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model whose position table ends at :data:`SHORT`, and the same one pruned."""
    root, model = tmp_path_factory.mktemp("short"), gpt2()
    dense = save_model(model, root / "dense")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[::2] = 0
    return dense, save_model(model, root / "pruned")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(max_position_embeddings=128), 128),
        (hf.GPT2Config(n_positions=64), 64),
        (hf.MptConfig(max_seq_len=32), 32),
        (hf.BloomConfig(), None),
        (hf.Phi3Config(max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters={
            "rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
        }), 32),
        (hf.LlamaConfig(max_position_embeddings=64, rope_parameters={
            "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
        }), 64),
        (hf.LlamaConfig(max_position_embeddings=64, rope_parameters={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        }), 64),
    ],
)  # fmt: skip
def test_context_is_what_the_positions_or_their_scaling_allow(config: object, expected: int | None) -> None:
    assert context_of(config) == expected


def test_a_context_of_one_token_is_refused() -> None:
    with pytest.raises(RequestError, match="expected a model of at least 2 positions, got -5"):
        context_of(hf.LlamaConfig(max_position_embeddings=-5))


def test_a_default_is_cut_and_said_and_a_request_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lcc_lens"):
        assert fitting_length(None, 128) == 128
    assert caplog.messages == ["sequences of 128 tokens, the model's context (512 by default)"]
    caplog.clear()
    assert (fitting_length(None, 4096), fitting_length(None, None), fitting_length(64, 128)) == (512, 512, 64)
    assert not caplog.messages
    with pytest.raises(RequestError, match="within the models' context of 128 tokens, got 129; lower --max-length"):
        fitting_length(129, 128)
    assert CompareConfig().fitting(40).max_length == CompareConfig().fitting(40).block_length == 40
    with pytest.raises(RequestError, match="context of 40 tokens, got 300"):
        CompareConfig(max_length=300).fitting(40)


def test_every_job_stays_within_the_positions(short: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    """Of GPT-2 a position past the table is an IndexError; of others the result would be off without a word."""
    dense, pruned = short
    text = str(text_file)
    report = prune(dense, tmp_path / "out", calibration=text, n_samples=2)
    assert report["calibration"]["length"] == SHORT
    assert refit(dense, pruned, tmp_path / "refit", calibration=text, n_samples=2)["calibration"]["length"] == SHORT
    results = evaluate([dense, pruned], [text])
    assert results["settings"]["length"] == SHORT
    pair = lcc.load_pair(dense, pruned)
    data = lcc.load_data(text)
    found = lcc.scan(pair, data, selectors=(), sites=("z",))
    assert found.record.max_length == SHORT
    restoration = lcc.restore(pair, None, (), data, method="norms", run=tmp_path / "run", limit=8)
    assert restoration.record.settings["max_length"] == SHORT
    lcc.exciting_examples(pair, data, lcc.Head(0, 0), torch.ones(8), k=1)


@pytest.mark.parametrize(
    "job",
    [
        lambda dense, pruned, text, out: prune(dense, out, calibration=text, n_samples=2, seq_len=SHORT + 1),
        lambda dense, pruned, text, out: refit(dense, pruned, out, calibration=text, n_samples=2, seq_len=SHORT + 1),
        lambda dense, pruned, text, out: evaluate([dense], [text], length=SHORT + 1),
        lambda dense, pruned, text, out: lcc.restore_best(
            dense, pruned, out, lcc.load_data(text), calibration=[text], n_samples=2, max_length=SHORT + 1
        ),
    ],
)
def test_a_longer_request_is_refused(
    job: Callable[..., object], short: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=f"within the models' context of {SHORT} tokens, got {SHORT + 1}"):
        job(*short, str(text_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checks_of_loading_fit_a_very_short_context(tmp_path: Path) -> None:
    loaded = load_hooked(save_model(gpt2(n_positions=8), tmp_path / "tiny"))
    assert loaded.context == 8


def test_dynamic_scaling_never_sets_in(tmp_path: Path) -> None:
    """Beyond the original context each sequence's result would depend on the longest one in its batch."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = build_model(max_position_embeddings=24, rope_parameters=rope)
    tokens = torch.arange(24)[None] % 257
    longer = torch.arange(48)[None] % 257
    with torch.no_grad():
        alone = model(tokens).logits
        beside = model(torch.cat([torch.cat([tokens, tokens], 1), longer])).logits[:1, :24]
    assert float((alone - beside).abs().max()) > 1e-3, "the scaling acts past the context"
    assert load_hooked(save_model(model, tmp_path / "dynamic")).context == 24
