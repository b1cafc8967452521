"""Measure how models react to variants of prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.data.batches import TokenSequence
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.likelihoods import encode_response, token_log_likelihoods
from lcc_lens.prompting.reactions import head_reactions, require_relative_positions
from lcc_lens.prompting.restored import Restored, check_restored, restored_model
from lcc_lens.prompting.soft_prompt import SoftPrompt
from lcc_lens.prompting.study import PromptStudy, StudyRecord, example_key
from lcc_lens.prompting.variants import RAW, SOFT
from lcc_lens.prompting.wording import n_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Encoded:
    """The examples that fit in every variant, with their right and, if there are any, wrong answers."""

    kept: tuple[int, ...]
    right: dict[str, list[TokenSequence]]
    wrong: dict[str, list[TokenSequence]] | None


@ranged
def prompt_study(
    pair: Pair,
    variants: Mapping[str, Data],
    restored: Restored | None = None,
    *,
    soft_prompt: SoftPrompt | None = None,
    heads: Sequence[str] = (),
    head_examples: Count | None = None,
    max_length: Length | None = None,
    response_tokens: Count = 128,
) -> PromptStudy:
    """Measure the responses' log-likelihood after every variant in the dense, the pruned and the restored model.

    Every response counts the same tokens after every variant; an example that does not fit with one of them is left out
    of all. Data with wrong answers also give accuracies (the right answer is likelier than the wrong one).

    Args:
        pair: the models.
        variants: the same examples by variant (see :func:`~lcc_lens.prompting.variants.prompt_variants`), with ``raw``.
        restored: a restoration or an injection of the pruned model, its run, or a model's reference.
        soft_prompt: of the variant ``soft`` (see :func:`~lcc_lens.prompting.soft_prompt.fit_soft_prompt`).
        heads: variants for which the reaction of every head is measured (see :meth:`PromptStudy.heads`);
            it takes a partial forward pass per head and example.
        head_examples: the first examples that heads are measured on; all if not given.
        max_length: tokens of prompt and response at most (512, or the models' context where that is shorter).
        response_tokens: the first tokens of a response that count.

    Raises:
        RequestError: no ``raw``, variants of other examples, prompts beyond ``max_length``, a soft prompt missing, or
            heads of a model with learned absolute positions.

    Example:
        >>> data = load_data("alpaca", n=96, role="held-out")  # doctest: +SKIP
        >>> study = prompt_study(pair, prompt_variants(data, ["raw", "clear", "filler"]))  # doctest: +SKIP
        >>> study.table()[["variant", "gain_pruned", "pruned_minus_dense"]]  # doctest: +SKIP

    Reference:
        PMPO (arXiv 2505.16307) ranks prompts by the likelihood of responses; MePO (arXiv 2505.09930) names the merits.
    """
    _check_variants(variants, heads, soft_prompt)
    if heads:
        require_relative_positions(pair.pruned)
    check_restored(restored, pair.pruned_id.path)
    length = fitting_length(max_length, pair.context)
    encoded = _encode(variants, pair.tokenizer, length, response_tokens, soft_prompt)
    models = ("dense", "pruned") if restored is None else ("dense", "pruned", "restored")
    likelihoods, rights = [], []
    for name in models:
        with _model_of(pair, name, restored) as model:
            measured = [_measured(model, encoded, variant, soft_prompt) for variant in variants]
        likelihoods.append(torch.stack([likelihood for likelihood, _ in measured]))
        rights.append(torch.stack([right for _, right in measured]))
    reactions, part = {}, slice(head_examples)
    for name in heads:
        reactions[name] = head_reactions(pair.pruned, encoded.right[name][part], encoded.right[RAW][part])
    record = _record(pair, variants, restored, models, encoded, response_tokens)
    words = [[n_words(data.examples[i].prompt) for i in encoded.kept] for data in variants.values()]
    is_right = None if encoded.wrong is None else torch.stack(rights)
    return PromptStudy(record, torch.stack(likelihoods), torch.tensor(words), is_right, reactions)


def _record(
    pair: Pair,
    variants: Mapping[str, Data],
    restored: Restored | None,
    models: tuple[str, ...],
    encoded: _Encoded,
    response_tokens: int,
) -> StudyRecord:
    raw = variants[RAW]
    named = str(restored) if isinstance(restored, str | Path) else restored and type(restored).__name__
    return StudyRecord(
        dense=pair.dense_id.reference, pruned=pair.pruned_id.reference, dense_sha256=pair.dense_id.sha256,
        pruned_sha256=pair.pruned_id.sha256, restored=named or None, data=raw.name, source=raw.source, models=models,
        variants=tuple(variants), groups=tuple(example_key(raw.examples[i]) for i in encoded.kept),
        response_tokens=response_tokens, version=package_version(),
    )  # fmt: skip


def _check_variants(variants: Mapping[str, Data], heads: Sequence[str], soft_prompt: SoftPrompt | None) -> None:
    if RAW not in variants:
        raise RequestError(f"expected the variant {RAW!r} to compare with, got {', '.join(variants) or 'none'}; add it")
    known = [(e.group, e.response, e.wrong) for e in variants[RAW].examples]
    for name, data in variants.items():
        if [(e.group, e.response, e.wrong) for e in data.examples] != known:
            raise RequestError(f"expected the same examples in every variant, got others in {name!r}; make them again")
        empty = next((i for i, e in enumerate(data.examples) if not e.prompt.strip()), None)
        if empty is not None:
            raise RequestError(
                f"expected prompts with text, got an empty one in {name!r} (example {empty}); leave it out"
            )
    unknown = next((name for name in heads if name not in variants or name == SOFT), None)
    if unknown is not None:
        raise RequestError(f"expected heads for written variants of the study, got {unknown!r}; leave it out")
    if SOFT in variants and soft_prompt is None:
        raise RequestError("expected a trained soft prompt for the variant 'soft', got none; pass fit_soft_prompt's")


def _encode(
    variants: Mapping[str, Data],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    response_tokens: int,
    soft_prompt: SoftPrompt | None,
) -> _Encoded:
    """The token sequences of the examples that fit in every variant."""
    has_wrong = all(example.wrong is not None for example in variants[RAW].examples)

    def sequence(name: str, example: Example, response: str) -> TokenSequence | None:
        room = max_length - (len(soft_prompt) if soft_prompt is not None and name == SOFT else 0)
        found = encode_response(tokenizer, example.prompt, response, room, response_tokens)
        return soft_prompt.behind(found) if found is not None and soft_prompt is not None and name == SOFT else found

    right = {name: [sequence(name, e, e.response) for e in data.examples] for name, data in variants.items()}
    wrong = {name: [sequence(name, e, e.wrong or "") for e in d.examples] for name, d in variants.items() if has_wrong}
    columns = zip(*right.values(), *wrong.values(), strict=True)
    kept = tuple(i for i, column in enumerate(columns) if all(s is not None for s in column))
    n, n_empty = len(variants[RAW]), sum(not e.response or e.wrong == "" for e in variants[RAW].examples)
    if n_empty == n:
        raise RequestError(f"expected responses in {variants[RAW].source}, got {n} empty ones; fill them in")
    if not kept:
        raise RequestError(
            f"expected prompts with their responses of up to {max_length} tokens, got none in {n} examples; raise the "
            "length or name fewer variants"
        )
    n_long = n - n_empty - len(kept)
    if n_empty:
        logger.warning("skipped %d of %d examples without a response", n_empty, n)
    if n_long:
        logger.warning("skipped %d of %d examples longer than %d tokens in a variant", n_long, n, max_length)

    def chosen(table: Mapping[str, list[TokenSequence | None]]) -> dict[str, list[TokenSequence]]:
        return {name: [s for i in kept if (s := row[i]) is not None] for name, row in table.items()}

    return _Encoded(kept, chosen(right), chosen(wrong) if has_wrong else None)


def _measured(
    model: HookedModel, encoded: _Encoded, variant: str, soft_prompt: SoftPrompt | None
) -> tuple[Tensor, Tensor]:
    """Mean log-likelihoods of the right responses, and whether they are likelier than the wrong ones."""
    soft = soft_prompt.applied_to(model) if soft_prompt is not None and variant == SOFT else nullcontext(model)
    with soft as prompted:
        right = token_log_likelihoods(prompted, encoded.right[variant], variant)
        wrong = [] if encoded.wrong is None else token_log_likelihoods(prompted, encoded.wrong[variant], variant)
    mean = torch.stack([values.double().mean().float() for values in right])
    is_right = [float(r.double().sum()) > float(w.double().sum()) for r, w in zip(right, wrong, strict=bool(wrong))]
    return mean, torch.tensor(is_right)


def _model_of(pair: Pair, name: str, restored: Restored | None) -> AbstractContextManager[HookedModel]:
    """One of the models; the restored one as the run, reference or object says."""
    if name != "restored" or restored is None:
        return nullcontext(pair.dense if name == "dense" else pair.pruned)
    return restored_model(restored, pair.pruned)
