"""The tokens that every head's components promote and suppress: read once with the model, kept beside the scan."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.lens.tokens import TokenReader
from lcc_lens.analysis.scan.scan import SCAN_TENSORS, Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_json, read_tensors, sha256_file, write_json, write_tensors
from lcc_lens.core.heads import Head
from lcc_lens.core.progress import track
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TABLES_TENSORS = "explorer.safetensors"
TABLES_RECORD = "explorer.json"
#: How many single components are read, and how many tokens on either side.
N_COMPONENTS, N_TOKENS = 4, 8
#: Logits of so many vectors are held at once, each as long as the vocabulary.
_VECTORS_AT_ONCE = 64
#: After the single components: the mean difference, and what training found.
MEAN, LEARNED = "mean", "learned"


@dataclass(frozen=True)
class TokenTables:
    """Tokens of every head's vectors, strongest first: those promoted, then those suppressed.

    ``vectors`` names the vectors (``1``, ``2``, ... for single components, ``mean``, ``learned``); ``tokens`` is -1
    where a head has no such vector or its output projection takes it to zero. ``texts`` gives each token's text.
    """

    vectors: tuple[str, ...]
    tokens: Int[Tensor, "layer head vector side rank"]
    logits: Float[Tensor, "layer head vector side rank"]
    texts: Mapping[int, str]

    def save(self, run: Path) -> None:
        """Write ``explorer.safetensors`` and ``explorer.json`` into a run, with the hashes of what they were read from.

        The record comes last: tables without it do not count.
        """
        write_tensors(run / TABLES_TENSORS, {"tokens": self.tokens.int(), "logits": self.logits})
        record = {
            **_sources(run),
            "tables_sha256": sha256_file(run / TABLES_TENSORS),
            "vectors": list(self.vectors),
            "texts": {str(token): text for token, text in sorted(self.texts.items())},
        }
        write_json(run / TABLES_RECORD, record)

    @classmethod
    def load(cls, run: Path) -> TokenTables | None:
        """The tables of a run; None where they are missing, damaged, or of another scan or restoration."""
        try:
            record = read_json(run / TABLES_RECORD)
            tensors, _ = read_tensors(run / TABLES_TENSORS)
            wanted = {**_sources(run), "tables_sha256": sha256_file(run / TABLES_TENSORS)}
            if any(record.get(name) != value for name, value in wanted.items()):
                return None
            texts = {int(token): str(text) for token, text in record["texts"].items()}
            return cls(tuple(record["vectors"]), tensors["tokens"], tensors["logits"], texts)
        except (RequestError, KeyError, AttributeError, ValueError):
            return None


def read_tokens(
    model: HookedModel, tokenizer: PreTrainedTokenizerBase, scan: Scan, restoration: Restoration | None
) -> TokenTables:
    r"""The tokens that every head's components promote and suppress, each component read alone (Eq. 6).

    Read are the first components $\alpha_i v_i$, the mean difference, and the constant that training found.

    Args:
        model: the pruned model, hooked; the injections act there.
        tokenizer: its tokenizer.
        scan: the scan of the pair.
        restoration: what training found, if anything.

    Raises:
        LensError: the architecture's way to the logits is not known.
    """
    reader = TokenReader.of(model)
    vectors, names = _vectors(scan, restoration)
    n_layers, n_heads = vectors.shape[:2]
    k = min(N_TOKENS, int(model.cfg.d_vocab))
    tokens = torch.full((n_layers, n_heads, len(names), 2, k), -1, dtype=torch.int32)
    logits = torch.zeros(tokens.shape)
    for layer in track(range(n_layers), n_layers, "read components"):
        written = [reader.writer.output(Head(layer, head), vectors[layer, head]) for head in range(n_heads)]
        tokens[layer], logits[layer] = _strongest(reader, torch.stack(written), k)
    ids = sorted(set(tokens.flatten().tolist()) - {-1})
    return TokenTables(names, tokens, logits, {i: str(tokenizer.decode([i])) for i in ids})


def _strongest(
    reader: TokenReader, written: Float[Tensor, "head vector d_model"], k: int
) -> tuple[Int[Tensor, "head vector side rank"], Float[Tensor, "head vector side rank"]]:
    """The k tokens that every vector promotes and suppresses most, and their logits; -1 where a vector is zero."""
    tokens, logits = [], []
    for part in written.flatten(0, 1).split(_VECTORS_AT_ONCE):
        said = reader.logits(part)
        sides = [said.topk(k, largest=largest) for largest in (True, False)]
        found = torch.stack([side.indices for side in sides], dim=1)
        tokens.append(found.masked_fill(~part.any(-1)[:, None, None], -1).int().cpu())
        logits.append(torch.stack([side.values for side in sides], dim=1).cpu())
    shape = (*written.shape[:2], 2, k)
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


def _sources(run: Path) -> dict[str, Any]:
    """The hashes of the files that the tables are read from."""
    restoration = run / RESTORATION_TENSORS
    return {
        "scan_sha256": sha256_file(run / SCAN_TENSORS),
        "restoration_sha256": sha256_file(restoration) if restoration.exists() else None,
    }
