"""Preferences between prompts: a version under which the response is surely likelier, beside another one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.core.fingerprint import fingerprint
from lcc_lens.core.ranges import Count, Length, Seed, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.rewriting.finished import computed
from lcc_lens.prompting.rewriting.preference_files import Preference, read_preferences, write_preferences
from lcc_lens.prompting.rewriting.ranking import SURE, Ranked, rank_prompts
from lcc_lens.prompting.variants import require_prompts
from lcc_lens.prompting.wording import n_words, overlap

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Target = Literal["dense", "pruned"]
#: The file of a run that keeps what ranking gave, by example.
RANKINGS = "rankings.jsonl"


@dataclass(frozen=True, repr=False)
class Preferences(Shown):
    """Preferences between versions of prompts, without their templates.

    Args:
        pairs: prompt, chosen and rejected version, and the margin in nats per response token.
        n_examples: how many examples they come from.
        n_unsure: examples whose best and worst version differ by no more than two standard errors.
        n_copies: candidates that were dropped since they give more of the response away than the raw prompt.
        n_long: examples or candidates that were dropped since they do not fit within the length limit.
    """

    made_by: ClassVar[str] = "preference_pairs(pair, data, versions), or Preferences.load(file)"

    pairs: tuple[Preference, ...]
    n_examples: int = 0
    n_unsure: int = 0
    n_copies: int = 0
    n_long: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def table(self) -> pd.DataFrame:
        """One row per pair: prompt, chosen, rejected, margin."""
        import pandas as pd

        return pd.DataFrame([vars(pair) for pair in self.pairs], columns=["prompt", "chosen", "rejected", "margin"])

    @ranged
    def shuffled(self, seed: Seed = 0) -> Preferences:
        """Exchange chosen and rejected in a random half of the pairs, as a control that teaches no preference."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        half = set(order[: len(order) // 2])
        return replace(self, pairs=tuple(p.swapped() if i in half else p for i, p in enumerate(self.pairs)))

    def save(self, path: str | Path) -> None:
        """Write the pairs as a JSON list that :meth:`load` reads."""
        write_preferences(path, self.pairs)

    @classmethod
    def load(cls, path: str | Path) -> Preferences:
        """Read preferences, MePO's or those of :meth:`save` (see :func:`read_preferences`)."""
        pairs = read_preferences(path)
        return cls(tuple(pairs), len(pairs))

    def _facts(self) -> dict[str, Any]:
        margins = [pair.margin for pair in self.pairs if pair.margin is not None]
        raw_best = sum(pair.chosen == pair.prompt for pair in self.pairs)
        return {
            "pairs": f"{len(self)} of {self.n_examples} examples",
            "raw prompt chosen": raw_best,
            "mean margin": f"{sum(margins) / len(margins):.3f} nats per token" if margins else "not measured",
            "left out": f"{self.n_unsure} unsure, {self.n_copies} copies of the response, {self.n_long} too long",
        }


@dataclass(frozen=True)
class _Outcome:
    """What ranking an example's versions gave: a preference if they surely differ, and how many were left out."""

    preference: Preference | None
    n_copies: int
    n_long: int
    is_ranked: bool = True


@ranged
def preference_pairs(
    pair: Pair,
    data: Data,
    candidates: Sequence[Sequence[str]],
    *,
    target: Target = "pruned",
    max_length: Length | None = None,
    response_tokens: Count = 128,
    run: str | Path | None = None,
) -> Preferences:
    """Rank versions of every prompt by the likelihood of its response, and keep pairs that surely differ.

    The likeliest version is chosen; the raw prompt is rejected, or, where it is the likeliest itself, the least likely
    version. A pair is kept if its margin exceeds two standard errors over the response's tokens. A candidate that
    contains more of the response's word sequences than the raw prompt is dropped and counted.

    Args:
        data: training examples, with responses.
        candidates: for every example, versions of what the user wrote, without the template around it.
        target: the model whose likelihoods decide.
        max_length: tokens of prompt and response at most.
        response_tokens: the first tokens of a response that count.
        run: a folder that keeps what every finished example gave; the same call goes on after them.

    Raises:
        RequestError: held-out data, no candidates for an example, an empty one, or no pair that surely differs.
        InterruptedRun: Ctrl-C; finished examples are kept in ``run``.

    Example:
        >>> data = load_data("alpaca", n=200, role="train")  # doctest: +SKIP
        >>> preference_pairs(pair, data, candidate_prompts(pair, data, 6))  # doctest: +SKIP

    Reference:
        MePO (arXiv 2505.09930) lets a model judge; likelihoods decide here, as in PMPO (arXiv 2505.16307).
    """
    model, identity = (pair.dense, pair.dense_id) if is_dense(target) else (pair.pruned, pair.pruned_id)
    check_examples(data)
    _check_candidates(data, candidates)
    tokenizer, length = pair.tokenizer, fitting_length(max_length, pair.context)
    rank = partial(rank_prompts, model, tokenizer, max_length=length, response_tokens=response_tokens)
    outcomes = computed(
        list(zip(data.examples, candidates, strict=True)), lambda _, item: _outcome(*item, tokenizer, rank),
        "rank candidates", _Outcome, file=None if run is None else Path(run) / RANKINGS,
        request=fingerprint(identity.sha256, str(pair.dtype), data.examples, candidates, length, response_tokens),
    )  # fmt: skip
    found = tuple(outcome.preference for outcome in outcomes if outcome.preference is not None)
    n_unsure = sum(outcome.is_ranked and outcome.preference is None for outcome in outcomes)
    n_copies, n_long = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("n_copies", "n_long"))
    if not found:
        raise RequestError(
            f"expected candidates that surely change a response's likelihood, got none in {len(data)} examples "
            f"({n_unsure} unsure, {n_copies} copies, {n_long} too long); add examples or candidates"
        )
    return Preferences(found, len(data), n_unsure, n_copies, n_long)


def _outcome(
    example: Example, versions: Sequence[str], tokenizer: PreTrainedTokenizerBase, rank: Callable[..., list[Ranked]]
) -> _Outcome:
    """Rank the versions of one example."""
    framed = split_prompt(example.prompt, tokenizer)
    kept = without_copies(example.response, framed.core, versions)
    cores = {framed.having(version): version for version in kept} | {example.prompt: framed.core}
    n_copies = len(versions) - len(kept)
    try:
        ranking = rank(example.prompt, list(cores), example.response)
    except RequestError:
        return _Outcome(None, n_copies, 1, is_ranked=False)
    return _Outcome(_surely(ranking, cores, example.prompt), n_copies, len(cores) - len(ranking))


def is_dense(target: str) -> bool:
    """Whether the target is the dense model.

    Raises:
        RequestError: neither the dense nor the pruned one.
    """
    if target not in get_args(Target):
        raise RequestError(f"expected the target dense or pruned, got {target!r}; choose one")
    return target == "dense"


def check_examples(data: Data) -> None:
    """Refuse data that no preferences can be measured on.

    Raises:
        RequestError: running text, held-out data, or an example without a prompt or a response.
    """
    require_prompts(data)
    if data.role == "held-out":
        raise RequestError("expected training examples for preferences, got held-out ones; load them with role='train'")
    for number, example in enumerate(data.examples):
        if not (example.prompt.strip() and example.response.strip()):
            raise RequestError(f"expected a prompt and a response in example {number} of {data.name}, got an empty one")


def _check_candidates(data: Data, candidates: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(data):
        raise RequestError(f"expected candidates for {len(data)} examples, got {len(candidates)} lists; add the others")
    for number, versions in enumerate(candidates):
        if not versions:
            raise RequestError(f"expected candidates for example {number} of {data.name}, got an empty list; add some")
        if not all(map(n_words, versions)):
            raise RequestError(f"expected candidates with text for example {number}, got an empty rewrite; drop it")


def without_copies(response: str, raw: str, versions: Sequence[str]) -> list[str]:
    """The versions that give no more of the response away than the raw prompt."""
    given_away = overlap(raw, response)
    return [version for version in versions if overlap(version, response) <= given_away]


def _surely(ranking: Sequence[Ranked], cores: Mapping[str, str], raw: str) -> Preference | None:
    """The pair of a ranking, without its template, if it surely differs."""
    best, worst = ranking[0], ranking[-1]
    if best.prompt == raw and worst.margin < -SURE * worst.stderr:
        return Preference(cores[raw], cores[raw], cores[worst.prompt], -worst.margin)
    if best.is_better:
        return Preference(cores[raw], cores[best.prompt], cores[raw], best.margin)
    return None
