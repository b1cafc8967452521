"""Text that a model writes itself: seeded, kept with its hash, sampled as the model predicts, never repetitive."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from support.tiny import build_model, tiny_tokenizer

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.data.datasets import load_data
from lcc_lens.models import sampling
from lcc_lens.models.sampling import repetition, sample_texts
from lcc_lens.models.self_written import DenseWriter


def test_the_same_seed_gives_the_same_texts_and_another_seed_others() -> None:
    model, tokenizer = build_model(), tiny_tokenizer()
    first, again, other = (sample_texts(model, tokenizer, 200, length=32, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert not set(first.texts) & set(other.texts)
    assert first.n_tokens >= 200
    assert first.n_tokens == sum(len(tokenizer(text)["input_ids"]) for text in first.texts)


def test_samples_follow_the_models_distribution_through_the_cache() -> None:
    model, starts = build_model(), [[5], [5, 9, 7]]
    rows = sampling._continued(model, starts, 24, 1e-4, 257, torch.Generator().manual_seed(0))
    assert rows[1][:3] == [5, 9, 7]
    for row, start in zip(rows, starts, strict=True):  # almost no temperature: the likeliest token, without a cache
        likeliest = model(torch.tensor([row])).logits[0].argmax(-1).tolist()
        assert row[len(start) :] == likeliest[len(start) - 1 : -1]


def test_the_seed_of_others_is_left_alone() -> None:
    model, tokenizer = build_model(), tiny_tokenizer()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sample_texts(model, tokenizer, 50, length=32)
    assert torch.equal(torch.rand(1), expected)


def test_repetition_is_the_fraction_of_4_grams_met_before() -> None:
    assert repetition(range(20)) == 0
    assert repetition([1, 2] * 20) == 1 - 2 / 37
    assert repetition([1, 2, 3]) == 0


def test_a_model_that_repeats_itself_is_refused() -> None:
    model, tokenizer = build_model(), tiny_tokenizer()
    with pytest.raises(LensError, match=r"got 0 and \d+ texts that repeat themselves; raise the temperature"):
        sample_texts(Constant(model), tokenizer, 100, length=64)


def test_texts_that_repeat_themselves_are_written_again(
    dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(sampling, "repetition", lambda tokens: seen.append(0) or float(len(seen) <= 2))
    with caplog.at_level(logging.WARNING):
        texts, _ = DenseWriter(dense_dir, tmp_path / "own", 6, 32).write("train", 0)
    assert f"2 of {len(texts) + 2} texts that the dense model wrote repeated more than 50 %" in caplog.text
    assert json.loads((tmp_path / "own_train_0.json").read_text())["repeated"] == 2


def test_infinite_logits_are_refused() -> None:
    model = build_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(LensError, match="expected finite logits of the dense model"):
        sample_texts(model, tiny_tokenizer(), 50, length=32)


def test_texts_are_kept_with_their_hash_and_read_again(dense_dir: Path, tmp_path: Path) -> None:
    writer = DenseWriter(dense_dir, tmp_path / "run" / "own", n=4, length=32)
    data = load_data("self", role="train", writer=writer)
    file = tmp_path / "run" / "own_train_0.jsonl"
    before = file.stat().st_mtime_ns
    assert (data.source, data.role, data.kind) == (str(file), "train", "text")
    assert load_data("self", role="train", writer=writer) == data
    assert file.stat().st_mtime_ns == before
    assert load_data(str(file)).examples == data.examples  # the file is data by itself
    file.write_text(file.read_text().replace("a", "b"))  # damaged: written again
    assert load_data("self", role="train", writer=writer) == data
    assert not data.groups & load_data("self", role="held-out", writer=writer).groups


@pytest.mark.parametrize("name", ["own_train_0.jsonl", "own_train_0.json"])
def test_files_of_others_are_not_replaced(name: str, dense_dir: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "mine"}')
    with pytest.raises(RequestError, match=r"expected text that lcc-lens wrote in .*, got another file; move it"):
        DenseWriter(dense_dir, tmp_path / "own", 4, 32).write("train", 0)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"text": "mine"}'


def test_too_short_texts_and_a_temperature_of_zero_are_refused(dense_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected sequences of at least 16 tokens"):
        DenseWriter(dense_dir, tmp_path / "own", 4, 8).write(None, 0)
    with pytest.raises(RequestError, match="expected a temperature above 0, got 0"):
        DenseWriter(dense_dir, tmp_path / "own", 4, temperature=0.0)


class Constant(torch.nn.Module):
    """A model that always says the same token."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: object, **options: object) -> object:
        output = self.model(*arguments, **options)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., 7] = 1e4
        return output
