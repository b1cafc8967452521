"""Texts in the dense, the pruned and the restored model, read once and stored beside the scan.

A text is the beginning of one of the scan's display examples, or a prompt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lcc_lens.analysis.lens.prompt import PromptComparison, compare_tokens, next_token_rows, prompt_tokens
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, sha256_file, write_tensors
from lcc_lens.core.progress import track
from lcc_lens.core.reading import read_record, write_record
from lcc_lens.frontends.run_contents import RunContents, source_hashes
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.scans import check_scan

logger = logging.getLogger(__name__)
TEXTS_TENSORS, TEXTS_RECORD = "explorer_texts.safetensors", "explorer_texts.json"
Kind = Literal["example", "prompt"]
#: Display examples that are read; bytes of all attention patterns (one per pair of tokens); tokens of an example.
N_EXAMPLES, PATTERN_BYTES, N_TOKENS = 2, 2_000_000, (12, 64)
#: Likeliest next tokens of each model that are kept.
_NEXT_TOKENS = 6
_ARRAYS = ("norm", "difference", "patterns")


@dataclass(frozen=True)
class TextReading:
    """One text in the models of a run, as the page shows it.

    ``next_tokens`` has a row per token: its text, and its probability in every model. ``patterns`` holds attention in
    units of 1/255, each pattern as the rows of its lower triangle, one after the other; None where a model has no hook
    point for them.
    """

    title: str
    kind: Kind
    pieces: tuple[str, ...]
    models: tuple[str, ...]
    next_tokens: tuple[dict[str, str | float], ...]
    norm: Float[Tensor, "model pos layer head"]
    difference: Float[Tensor, "model pos layer head"]
    patterns: UInt8[Tensor, "model layer head entry"] | None

    @classmethod
    def of(cls, title: str, kind: Kind, seen: PromptComparison) -> TextReading:
        """Keep what the page shows of a comparison."""
        rows = next_token_rows(dict(zip(seen.models, seen.probabilities, strict=True)), seen.tokenizer, _NEXT_TOKENS)
        kept = None if seen.patterns is None else lower_triangles(seen.patterns)
        return cls(title, kind, seen.pieces, seen.models, tuple(rows), seen.norm, seen.difference, kept)

    def change(self, model: str) -> Float[Tensor, "layer head"]:
        """Relative change of every head's output over the text, as :meth:`PromptComparison.change` gives it."""
        difference, dense = (x.square().sum(0) for x in (self.difference[self.models.index(model)], self.norm[0]))
        return (difference / dense.clamp_min(torch.finfo(dense.dtype).tiny)).sqrt()


@dataclass(frozen=True)
class _Row:
    """A text's entry in the record."""

    title: str
    kind: Kind
    pieces: tuple[str, ...]
    models: tuple[str, ...]
    next_tokens: tuple[dict[str, str | float], ...]


@dataclass(frozen=True)
class _Record:
    """The record beside the tensors."""

    scan_sha256: str
    restoration_sha256: str | None
    texts_sha256: str
    prompts: tuple[str, ...]
    texts: tuple[_Row, ...]


@dataclass(frozen=True)
class TextReadings:
    """The texts of a run; ``prompts`` are the ones that were asked for, in order."""

    texts: tuple[TextReading, ...]
    prompts: tuple[str, ...]

    def save(self, run: Path) -> None:
        """Write ``explorer_texts.safetensors`` and ``.json`` into a run; the record, which holds hashes, comes last."""
        arrays = {f"{i}.{name}": getattr(text, name) for i, text in enumerate(self.texts) for name in _ARRAYS}
        write_tensors(run / TEXTS_TENSORS, {n: a.contiguous() for n, a in arrays.items() if a is not None})
        rows = [{n: v for n, v in vars(text).items() if n not in _ARRAYS} for text in self.texts]
        tensors_sha256 = sha256_file(run / TEXTS_TENSORS)
        record = {**source_hashes(run), "texts_sha256": tensors_sha256, "prompts": self.prompts, "texts": rows}
        write_record(run / TEXTS_RECORD, record)

    @classmethod
    def load(cls, run: Path) -> TextReadings | None:
        """The texts of a run; None if they are missing, damaged, or belong to another scan or restoration."""
        try:
            record = read_record(run / TEXTS_RECORD, _Record)
            tensors, _ = read_tensors(run / TEXTS_TENSORS)
            expected = {**source_hashes(run), "texts_sha256": sha256_file(run / TEXTS_TENSORS)}
            if any(getattr(record, name) != value for name, value in expected.items()):
                return None
            texts = [
                TextReading(
                    row.title, row.kind, row.pieces, row.models, row.next_tokens, tensors[f"{i}.norm"],
                    tensors[f"{i}.difference"], tensors.get(f"{i}.patterns"),
                )
                for i, row in enumerate(record.texts)
            ]  # fmt: skip
            return cls(tuple(texts), record.prompts)
        except (RequestError, KeyError):
            return None


def find_texts(
    run: RunContents, prompts: Sequence[str] = (), *, read_model: bool
) -> tuple[TextReadings | None, str | None]:
    """The texts of a run, or a sentence that says why there are none.

    Texts that the run does not hold yet are read with both models and saved there.

    Args:
        run: the run.
        prompts: texts to show beside the scan's examples; those of an earlier call are kept where none are given.
        read_model: whether the models may be loaded.

    Raises:
        RequestError: prompts that the run does not hold, and no scan or no models to read them with.
    """
    if run.scan is None:
        if prompts:
            raise RequestError(f"expected a scan in {run.path} to read prompts with, got none; run lcc-lens scan first")
        return None, None
    kept = TextReadings.load(run.path)
    if kept is not None and (not prompts or kept.prompts == tuple(prompts)):
        return kept, None
    if not read_model:
        if prompts:
            raise RequestError(
                f"expected prompts that were read before in {run.path}, got others; explore them once without "
                "--no-tokens, which loads the models"
            )
        return kept, None if kept else "Attention patterns were not read; explore once without --no-tokens."
    try:
        readings = read_texts(_loaded(run), run.scan, run.restoration, prompts)
    except LensError as error:
        if prompts:
            raise  # they were asked for
        logger.warning("the page shows no attention patterns: %s", error)
        return None, f"Attention patterns could not be read: {str(error).rstrip('.')}."
    readings.save(run.path)
    return readings, None


def read_texts(pair: Pair, scan: Scan, restoration: Restoration | None, prompts: Sequence[str] = ()) -> TextReadings:
    """Read prompts, and the beginnings of the scan's first display examples, in all models.

    Args:
        pair: the hooked models.
        scan: their scan.
        restoration: what the restored model adds, if there is one.
        prompts: texts to read beside the examples.

    Raises:
        RequestError: an empty prompt, one longer than the model's context, or a restoration of other weights.
    """
    chosen: list[tuple[str, Kind, Int[Tensor, " pos"]]] = []
    chosen += [(prompt, "prompt", prompt_tokens(pair, prompt)) for prompt in prompts]
    examples = [example for example in scan.tokens if example.ids][:N_EXAMPLES]
    n_models = 2 + (restoration is not None)
    spent = sum(n_models * pair.n_layers * pair.n_heads * _n_entries(len(tokens)) for _, _, tokens in chosen)
    n_tokens = affordable_tokens(
        (PATTERN_BYTES - spent) / max(1, len(examples) * n_models * pair.n_layers * pair.n_heads)
    )
    for place, example in enumerate(examples, start=1):
        chosen.append((f"Example {place}", "example", torch.tensor(example.ids[:n_tokens])))
    restorations = {} if restoration is None else {"restored": restoration}
    texts = []
    for title, kind, tokens in track(chosen, len(chosen), "read texts"):
        texts.append(TextReading.of(title, kind, compare_tokens(pair, tokens, title, restorations)))
    return TextReadings(tuple(texts), tuple(prompts))


def lower_triangles(patterns: Float[Tensor, "*head query key"]) -> UInt8[Tensor, "*head entry"]:
    """Attention patterns in units of 1/255, row by row, without the keys that come after the query."""
    queries, keys = torch.tril_indices(patterns.shape[-2], patterns.shape[-1])
    return (255 * patterns[..., queries, keys]).clamp(0, 255).round().to(torch.uint8)


def _n_entries(n_tokens: int) -> int:
    return n_tokens * (n_tokens + 1) // 2


def affordable_tokens(entries: float) -> int:
    """Tokens of a text whose patterns have at most so many entries per head, within :data:`N_TOKENS`."""
    least, most = N_TOKENS
    return min(most, max(least, math.floor(math.sqrt(2 * max(0.0, entries)))))


def _loaded(run: RunContents) -> Pair:
    """The pair of models that the scan names.

    Raises:
        LensError: a model is missing, its weights have changed, or its architecture is not supported.
    """
    assert run.scan is not None
    pair = load_pair(run.scan.record.dense, run.scan.record.pruned)
    check_scan(run.scan, pair)
    return pair
