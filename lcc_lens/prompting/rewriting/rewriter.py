"""Rewriters of prompts: an adapter trained on preferences, and the ranking of what it writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_sealed, write_sealed
from lcc_lens.core.ranges import Count, Natural, Seed, ranged
from lcc_lens.core.reading import convert, parse_json
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import special_prefix, token_ids
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.merits import Merits, merits
from lcc_lens.prompting.rewriting.preferences import Target, without_copies
from lcc_lens.prompting.rewriting.ranking import Ranked, rank_prompts
from lcc_lens.prompting.rewriting.settings import RewriterSettings
from lcc_lens.prompting.rewriting.writing import BASE_MODEL_TURN, WRITTEN, answers, chat_text, proposals
from lcc_lens.prompting.variants import RAW, VARIANTS
from lcc_lens.prompting.wording import n_words
from lcc_lens.restoration.injections.adapters import AdapterInjection, adapters

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
REWRITER = "rewriter.safetensors"
#: Who wrote a version: the user, a trained rewriter or another model, or the dense model without an adapter.
USER, REWRITTEN, DENSE = "user", "rewriter", "dense"
_AGAIN = "fit the rewriter again"
#: Modules that have an adapter, as MePO's.
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class RewriterRecord:
    """What a rewriter was trained on, and its held-out loss (ln 2 before the first step) and accuracy."""

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


@dataclass(frozen=True)
class Candidate:
    """A version of a prompt: what wrote it, its merits, its likelihood and its margin over the raw prompt."""

    source: str
    text: str
    merits: Merits
    ranked: Ranked


@dataclass(frozen=True, repr=False)
class Rewrites(Shown):
    """Versions of one prompt, the raw one among them, the one under which the response is likeliest first.

    Args:
        candidates: the versions.
        response: the response that was scored; the dense model's answer to the raw prompt unless one was given.
        chosen: the first version, if it is surely better than the raw prompt; else the raw prompt.
        n_copies: versions that were dropped since they give more of the response away than the raw prompt.
    """

    candidates: tuple[Candidate, ...]
    response: str
    target: Target
    chosen: Candidate
    n_copies: int = 0

    @property
    def verdict(self) -> str:
        """The choice, in one sentence."""
        copies = f"; {self.n_copies} dropped that give the response away" if self.n_copies else ""
        if self.chosen.source == RAW:
            unsure = "" if self.candidates[0] is self.chosen else ": no version is better by two standard errors"
            return f"the raw prompt is already the best{unsure}{copies}"
        margin, stderr = self.chosen.ranked.margin, self.chosen.ranked.stderr
        return f"chosen: {self.chosen.text}  ({margin:+.3f} ± {stderr:.3f} nats per token over the raw prompt){copies}"

    def table(self) -> pd.DataFrame:
        """One row per version: source, prompt, four merits, log-likelihood, margin, stderr, whether it is chosen."""
        import pandas as pd

        rows = [
            {
                "source": c.source, "prompt": c.text, **c.merits.scores, "log_likelihood": c.ranked.log_likelihood,
                "margin": c.ranked.margin, "stderr": c.ranked.stderr, "chosen": c is self.chosen,
            }
            for c in self.candidates
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {f"{c.source}  {c.ranked.margin:+.3f}": c.text for c in self.candidates}
        return {**facts, "": self.verdict}


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
        max_new_tokens: Count = 48,
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
        """The trained adapter, to be attached to its model."""
        adapter = new_adapter(model, self.record.settings)
        with torch.no_grad():
            for name, parameter in trained_parameters(adapter).items():
                parameter.copy_(self.tensors[name])
        return adapter

    def save(self, folder: str | Path) -> None:
        """Write ``rewriter.safetensors`` into a folder, atomically, with the record and a hash of everything."""
        write_sealed(Path(folder) / REWRITER, self.tensors, {"record": json.dumps(asdict(self.record))})

    @classmethod
    def load(cls, folder: str | Path) -> Rewriter:
        """Read what :meth:`save` wrote.

        Raises:
            RequestError: the file is missing or changed.
        """
        file = Path(folder) / REWRITER
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


def rewrite_prompt(
    pair: Pair,
    prompt: str,
    written: Sequence[str],
    *,
    target: Target = "pruned",
    response: str | None = None,
    rules: Sequence[str] = WRITTEN,
    response_tokens: Natural = 32,
    by: str = USER,
) -> Rewrites:
    """Rank versions of a prompt by the likelihood that a model gives to a response.

    Without a response it is the dense model's greedy answer to the raw prompt, so a version is better if it brings the
    target model closer to what the dense model says; the raw prompt has an advantage then.

    Args:
        prompt: with or without a template, which stays.
        written: versions of what the user wrote, without the template.
        target: the model whose likelihoods decide.
        rules: variants (see :func:`~lcc_lens.prompting.variants.prompt_variants`) that compete too.
        response_tokens: tokens of the dense model's answer.
        by: who wrote ``written``, as the table says it.

    Raises:
        RequestError: a prompt that is empty or too long, or a dense model that answers nothing.
    """
    framed, tokenizer = split_prompt(prompt, pair.tokenizer), pair.tokenizer
    empty = next((text for text in (framed.core, *written) if not n_words(text)), None)
    if empty is not None:
        raise RequestError(f"expected prompts with at least one word, got {empty!r}; leave it out")
    is_bare = not framed.before.strip() and not framed.after.strip()

    def whole(core: str) -> str:
        return chat_text(tokenizer, core, BASE_MODEL_TURN) if is_bare else framed.having(core)

    if response is None:
        response = _answer(pair, whole(framed.core), response_tokens)
    if not response.strip():
        raise RequestError("expected a response to rank prompts by, got none from the dense model; pass response")
    versions = {framed.core: RAW, **{VARIANTS[name](framed.core, prompt): name for name in rules}}
    given = [text for text in dict.fromkeys(written) if text not in versions]
    kept = without_copies(response, framed.core, given)
    versions.update(dict.fromkeys(kept, by))
    model = pair.dense if target == "dense" else pair.pruned
    ranked = rank_prompts(
        model, tokenizer, whole(framed.core), [whole(text) for text in versions], response, max_length=pair.context,
        response_tokens=max(response_tokens, 1),
    )  # fmt: skip
    by_prompt = {whole(text): (source, text) for text, source in reversed(versions.items())}
    candidates = []
    for found in ranked:
        source, text = by_prompt[found.prompt]
        candidates.append(Candidate(source, text, merits(text, framed.core), found))
    raw = next(candidate for candidate in candidates if candidate.source == RAW)
    first = candidates[0]
    chosen = first if first.ranked.is_better else raw
    return Rewrites(tuple(candidates), response, target, chosen, len(given) - len(kept))


def _answer(pair: Pair, prompt: str, n_tokens: int) -> str:
    """The dense model's greedy answer to a whole prompt."""
    tokens = special_prefix(pair.tokenizer) + token_ids(pair.tokenizer, prompt)
    if len(tokens) + n_tokens > pair.context:
        raise RequestError(
            f"expected a prompt of at most {pair.context - n_tokens} tokens, got {len(tokens)}; shorten it"
        )
    (answer,) = answers(pair.dense, pair.tokenizer, tokens, max_new_tokens=n_tokens)
    return answer


def written_by(
    model: HookedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    prompt: str,
    n: int = 6,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[str]:
    """Versions of a prompt by a model without an adapter, such as the dense model or MePO's published optimiser."""
    core = split_prompt(prompt, tokenizer).core
    return proposals(model, tokenizer, core, n, context=context, seed=seed, max_new_tokens=max_new_tokens)


def new_adapter(model: HookedModel, settings: RewriterSettings) -> AdapterInjection:
    """A fresh adapter, which changes nothing yet."""
    return adapters(
        model, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, targets=TARGETS, seed=settings.seed
    )


def trained_parameters(adapter: AdapterInjection) -> dict[str, Tensor]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
