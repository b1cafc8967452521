"""Rewriters of prompts: an adapter trained on preferences."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_sealed, require_made, write_sealed
from lcc_lens.core.ranges import Count, Seed, ranged
from lcc_lens.core.reading import convert, parse_json
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.rewriting.preferences import Target
from lcc_lens.prompting.rewriting.rewrites import REWRITTEN, VERSION_TOKENS, Rewrites, rewrite_prompt
from lcc_lens.prompting.rewriting.settings import RewriterSettings
from lcc_lens.prompting.rewriting.writing import proposals
from lcc_lens.restoration.injections.adapters import AdapterInjection, adapters

REWRITER = "rewriter.safetensors"
_AGAIN = "fit the rewriter again"
#: Modules that have an adapter, as MePO's.
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class RewriterRecord:
    """What a rewriter was trained on, and its held-out loss (ln 2 before the first step) and accuracy."""

    made_by: ClassVar[str] = "fit_rewriter(pair, preferences), or Rewriter.load(run)"

    model: str
    model_sha256: str
    pruned: str
    target: Target
    pairs: int
    preferences_sha256: str
    settings: RewriterSettings
    steps: int
    first_loss: float
    best_loss: float
    accuracy: float
    version: str


@dataclass(frozen=True, repr=False)
class Rewriter(Shown):
    """A trained adapter that rewrites prompts, for the model it was trained on. Frozen.

    Example:
        >>> rewriter = Rewriter.load("runs/mine/rewriter")  # doctest: +SKIP
        >>> rewriter.rewrite("name rivers", pair).chosen.text  # doctest: +SKIP
    """

    record: RewriterRecord
    tensors: dict[str, Tensor] = field(repr=False)

    @ranged
    def rewrite(
        self,
        prompt: str,
        pair: Pair,
        *,
        n: Count = 6,
        response: str | None = None,
        max_new_tokens: Count = VERSION_TOKENS,
        seed: Seed = 0,
    ) -> Rewrites:
        """Write versions of a prompt and rank them (see :func:`rewrite_prompt`).

        Raises:
            RequestError: an empty prompt, one beyond the context, or a pair without the rewriter's model.
        """
        model = self.model_of(pair)
        with self.adapter(model).attached(model):
            written = proposals(
                model, pair.tokenizer, split_prompt(prompt, pair.tokenizer).core, n, context=pair.context, seed=seed,
                max_new_tokens=max_new_tokens,
            )  # fmt: skip
        return rewrite_prompt(pair, prompt, written, target=self.record.target, response=response, by=REWRITTEN)

    def model_of(self, pair: Pair) -> HookedModel:
        """The pair's model that the rewriter was trained on.

        Raises:
            RequestError: neither model is the one.
        """
        for identity, name in ((pair.dense_id, "dense"), (pair.pruned_id, "pruned")):
            if identity.sha256 == self.record.model_sha256:
                return pair.dense if name == "dense" else pair.pruned
        raise RequestError(
            f"expected the rewriter's model {self.record.model} (SHA-256 {self.record.model_sha256[:12]}…), got "
            f"{pair.dense_id.reference} and {pair.pruned_id.reference}; name the models it was fitted for"
        )

    def adapter(self, model: HookedModel) -> AdapterInjection:
        """The trained adapter, to be attached to its model; it is not trained on, so it drops nothing out."""
        adapter = new_adapter(model, self.record.settings)
        with torch.no_grad():
            for name, parameter in trained_parameters(adapter).items():
                parameter.copy_(self.tensors[name])
        return adapter.requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write ``rewriter.safetensors`` into a folder, atomically, with the record and a hash of everything."""
        write_sealed(Path(folder) / REWRITER, self.tensors, {"record": json.dumps(asdict(self.record))})

    @classmethod
    def load(cls, folder: str | Path) -> Rewriter:
        """Read what :meth:`save` wrote.

        Raises:
            RequestError: the file is missing or changed.
        """
        file = require_made(Path(folder) / REWRITER, "lcc-lens rewrite fit")
        tensors, metadata = read_sealed(file)
        return cls(
            convert(parse_json(metadata["record"], str(file), _AGAIN), RewriterRecord, str(file), _AGAIN), tensors
        )

    def _facts(self) -> dict[str, Any]:
        record = self.record
        return {
            "model": f"{record.model} (SHA-256 {record.model_sha256[:12]}…)",
            "target": f"{record.target}: {record.model if record.target == 'dense' else record.pruned}",
            "trained on": f"{record.pairs} pairs, {record.steps} steps",
            "held-out loss": f"{record.first_loss:.4f} first, {record.best_loss:.4f} best",
            "held-out pairs ranked right": f"{record.accuracy:.0%}",
        }


def new_adapter(model: HookedModel, settings: RewriterSettings) -> AdapterInjection:
    """A fresh adapter, which changes nothing yet."""
    return adapters(
        model, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, targets=TARGETS, seed=settings.seed
    )


def trained_parameters(adapter: AdapterInjection) -> dict[str, Tensor]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
