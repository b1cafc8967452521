"""Preferences between prompts: a version under which the response is surely likelier, beside another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Length, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.datasets import Data
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.rewriting.preference_files import Preference, read_preferences, write_preferences
from lcc_lens.prompting.rewriting.ranking import SURE, Ranked, rank_prompts
from lcc_lens.prompting.wording import n_words, overlap

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
Target = Literal["dense", "pruned"]


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

    def shuffled(self, seed: int = 0) -> Preferences:
        """Exchange chosen and rejected in a random half of the pairs, as a control that teaches no preference."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        half = set(order[: len(order) // 2])
        return replace(self, pairs=tuple(p.swapped() if i in half else p for i, p in enumerate(self.pairs)))

    def save(self, path: str | Path) -> None:
        """Write the pairs as the JSON list that MePO trains on."""
        write_preferences(path, self.pairs)

    @classmethod
    def load(cls, path: str | Path) -> Preferences:
        """Read a JSON list of preferences, MePO's or one of :meth:`save`."""
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


@ranged
def preference_pairs(
    pair: Pair,
    data: Data,
    candidates: Sequence[Sequence[str]],
    *,
    target: Target = "pruned",
    max_length: Length | None = None,
    response_tokens: Count = 128,
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

    Raises:
        RequestError: held-out data, no candidates for an example, an empty one, or no pair that surely differs.

    Example:
        >>> data = load_data("alpaca", n=200, role="train")  # doctest: +SKIP
        >>> preference_pairs(pair, data, candidate_prompts(pair, data, 6))  # doctest: +SKIP

    Reference:
        MePO (arXiv 2505.09930) lets a model judge; likelihoods decide here, as in PMPO (arXiv 2505.16307).
    """
    _check(data, candidates, target)
    model = pair.dense if target == "dense" else pair.pruned
    length = fitting_length(max_length, pair.context)
    found, n_unsure, n_copies, n_long = [], 0, 0, 0
    for example, versions in track(zip(data.examples, candidates, strict=True), len(data), "rank candidates"):
        framed = split_prompt(example.prompt, pair.tokenizer)
        kept = without_copies(example.response, framed.core, versions)
        n_copies += len(versions) - len(kept)
        try:
            ranked = rank_prompts(
                model, pair.tokenizer, example.prompt, [framed.having(v) for v in kept], example.response,
                max_length=length, response_tokens=response_tokens,
            )  # fmt: skip
        except RequestError:
            n_long += 1
            continue
        cores = {**{framed.having(version): version for version in kept}, example.prompt: framed.core}
        n_long += len(cores) - len(ranked)
        preference = _surely(ranked, example.prompt, cores)
        n_unsure += preference is None
        found += [] if preference is None else [preference]
    if not found:
        raise RequestError(
            f"expected candidates that surely change a response's likelihood, got none in {len(data)} examples "
            f"({n_unsure} unsure, {n_copies} copies, {n_long} too long); add examples or candidates"
        )
    return Preferences(tuple(found), len(data), n_unsure, n_copies, n_long)


def _check(data: Data, candidates: Sequence[Sequence[str]], target: str) -> None:
    if target not in ("dense", "pruned"):
        raise RequestError(f"expected the target dense or pruned, got {target!r}; choose one")
    if data.role == "held-out":
        raise RequestError("expected training examples for preferences, got held-out ones; load them with role='train'")
    if len(candidates) != len(data):
        raise RequestError(f"expected candidates for {len(data)} examples, got {len(candidates)} lists; add the others")
    for number, (example, versions) in enumerate(zip(data.examples, candidates, strict=True)):
        if not versions:
            raise RequestError(f"expected candidates for example {number} of {data.name}, got an empty list; add some")
        if not all(map(n_words, versions)):
            raise RequestError(f"expected candidates with text for example {number}, got an empty rewrite; drop it")
        if not (example.prompt.strip() and example.response.strip()):
            raise RequestError(f"expected a prompt and a response in example {number} of {data.name}, got an empty one")


def without_copies(response: str, raw: str, versions: Sequence[str]) -> list[str]:
    """The versions that give no more of the response away than the raw prompt."""
    given_away = overlap(raw, response)
    return [version for version in versions if overlap(version, response) <= given_away]


def _surely(ranked: Sequence[Ranked], raw: str, cores: Mapping[str, str]) -> Preference | None:
    """The pair of a ranking, without templates, if it surely differs."""
    best, worst = ranked[0], ranked[-1]
    if best.prompt == raw:
        if worst.margin < -SURE * worst.stderr:
            return Preference(cores[raw], cores[raw], cores[worst.prompt], -worst.margin)
        return None
    return Preference(cores[raw], cores[best.prompt], cores[raw], best.margin) if best.is_better else None
