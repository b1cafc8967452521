"""Tokens that every head's components promote and suppress, computed once and stored beside the scan."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.lens.tokens import TokenReader
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, sha256_file, write_tensors
from lcc_lens.core.heads import Head
from lcc_lens.core.progress import track
from lcc_lens.core.reading import read_record, reading, write_record
from lcc_lens.frontends.run_contents import RunContents, source_hashes
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.recorded import recorded_model
from lcc_lens.restoration.result import Restoration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TABLES_TENSORS = "explorer.safetensors"
TABLES_RECORD = "explorer.json"
#: Number of single components per head, and of promoted and of suppressed tokens per component.
N_COMPONENTS, N_TOKENS = 4, 8
#: Vectors whose logits are in memory at once, each as long as the vocabulary.
_VECTORS_AT_ONCE = 64
#: Vectors after the single components: the mean difference and the trained constant.
MEAN, LEARNED = "mean", "learned"


@dataclass(frozen=True)
class _Record:
    """What ``explorer.json`` holds."""

    scan_sha256: str
    restoration_sha256: str | None
    tables_sha256: str
    vectors: tuple[str, ...]
    texts: dict[int, str]


@dataclass(frozen=True)
class TokenTables:
    """Tokens of every head's vectors, strongest first: side 0 promoted, side 1 suppressed.

    ``vectors`` names the vectors (``1``, ``2``, ... for single components, ``mean``, ``learned``). ``tokens`` is -1
    where a head has no such vector or its output projection maps it to zero. ``texts`` maps tokens to their texts.
    """

    vectors: tuple[str, ...]
    tokens: Int[Tensor, "layer head vector side rank"]
    logits: Float[Tensor, "layer head vector side rank"]
    texts: Mapping[int, str]

    def save(self, run: Path) -> None:
        """Write ``explorer.safetensors`` and ``explorer.json`` into a run, with the hashes of their sources.

        The record is written last: tables without it are ignored.
        """
        write_tensors(run / TABLES_TENSORS, {"tokens": self.tokens.int(), "logits": self.logits})
        record = {
            **source_hashes(run),
            "tables_sha256": sha256_file(run / TABLES_TENSORS),
            "vectors": list(self.vectors),
            "texts": {str(token): text for token, text in sorted(self.texts.items())},
        }
        write_record(run / TABLES_RECORD, record)

    @classmethod
    def load(cls, run: Path) -> TokenTables | None:
        """The tables of a run; None if they are missing, damaged, or belong to another scan or restoration."""
        try:
            record = read_record(run / TABLES_RECORD, _Record)
            tensors, _ = read_tensors(run / TABLES_TENSORS)
            expected = {**source_hashes(run), "tables_sha256": sha256_file(run / TABLES_TENSORS)}
            if any(getattr(record, name) != value for name, value in expected.items()):
                return None
            with reading(run / TABLES_RECORD):
                tables = cls(record.vectors, tensors["tokens"], tensors["logits"], record.texts)
                known = {*tables.texts, -1} >= {*tables.tokens.flatten().tolist()}
                return tables if known and len(tables.vectors) == tables.tokens.shape[2] else None
        except RequestError:
            return None


def find_tokens(run: RunContents, *, read_model: bool) -> tuple[TokenTables | None, str | None]:
    """The token tables of a run, or a sentence that says why there are none.

    Tables that the run does not hold yet are computed with the pruned model and saved there.

    Args:
        run: the run.
        read_model: whether the model may be loaded.
    """
    if run.scan is None:
        return None, None
    tables = TokenTables.load(run.path)
    if tables is not None:
        return tables, None
    if not read_model:
        return None, "The tokens that components promote were not computed; explore once without --no-tokens."
    try:
        tables = _computed(run)
    except LensError as error:
        logger.warning("the page shows no tokens: %s", error)
        return None, f"The tokens that components promote could not be computed: {error}."
    tables.save(run.path)
    return tables, None


def read_tokens(
    model: HookedModel, tokenizer: PreTrainedTokenizerBase, scan: Scan, restoration: Restoration | None
) -> TokenTables:
    r"""Compute the tokens that every head's components promote and suppress, each component read alone (Eq. 6).

    The vectors are the first components $\alpha_i v_i$, the mean difference, and the trained constant.

    Args:
        model: the hooked pruned model, on which the injections act.
        tokenizer: its tokenizer.
        scan: the scan of the pair.
        restoration: the trained constants, if any.

    Raises:
        LensError: the path from heads to logits is unknown for this architecture.
    """
    reader = TokenReader.of(model)
    vectors, names = _vectors(scan, restoration)
    n_layers, n_heads = vectors.shape[:2]
    k = min(N_TOKENS, int(model.cfg.d_vocab))
    tokens = torch.full((n_layers, n_heads, len(names), 2, k), -1, dtype=torch.int32)
    logits = torch.zeros(tokens.shape)
    for layer in track(range(n_layers), n_layers, "read components"):
        outputs = [reader.projections.output(Head(layer, head), vectors[layer, head]) for head in range(n_heads)]
        tokens[layer], logits[layer] = _strongest(reader, torch.stack(outputs), k)
    ids = sorted(set(tokens.flatten().tolist()) - {-1})
    return TokenTables(names, tokens, logits, {i: str(tokenizer.decode([i])) for i in ids})


def _strongest(
    reader: TokenReader, outputs: Float[Tensor, "head vector d_model"], k: int
) -> tuple[Int[Tensor, "head vector side rank"], Float[Tensor, "head vector side rank"]]:
    """The k most promoted and suppressed tokens of every vector, and their logits; -1 where a vector is zero."""
    tokens, logits = [], []
    for part in outputs.flatten(0, 1).split(_VECTORS_AT_ONCE):
        part_logits = reader.logits(part)
        sides = [part_logits.topk(k, largest=largest) for largest in (True, False)]
        indices = torch.stack([side.indices for side in sides], dim=1)
        tokens.append(indices.masked_fill(~part.any(-1)[:, None, None], -1).int().cpu())
        logits.append(torch.stack([side.values for side in sides], dim=1).cpu())
    shape = (*outputs.shape[:2], 2, k)
    return torch.cat(tokens).reshape(shape), torch.cat(logits).reshape(shape)


def _vectors(
    scan: Scan, restoration: Restoration | None
) -> tuple[Float[Tensor, "layer head vector d_head"], tuple[str, ...]]:
    """Every head's vectors in order, and their names; zero where a head has none."""
    components = scan.components
    n = min(N_COMPONENTS, components.n_determined)
    single = components.coefficients[..., :n, None] * components.directions[..., :n, :]
    parts, names = [single, scan.mean_difference[..., None, :]], [*map(str, range(1, n + 1)), MEAN]
    if restoration is not None and restoration.heads:
        learned = torch.zeros_like(scan.mean_difference)
        for head, constant in zip(restoration.heads, restoration.constants, strict=True):
            learned[head] = constant
        parts, names = [*parts, learned[..., None, :]], [*names, LEARNED]
    return torch.cat(parts, dim=-2), tuple(names)


def _computed(run: RunContents) -> TokenTables:
    """Compute the tables with the pruned model that the scan names.

    Raises:
        LensError: the model is missing, its weights have changed, or its architecture is not supported.
    """
    assert run.scan is not None
    record = run.scan.record
    loaded = load_hooked(recorded_model(record.pruned, record.pruned_sha256, run.path))
    return read_tokens(loaded.model, loaded.tokenizer, run.scan, run.restoration)
