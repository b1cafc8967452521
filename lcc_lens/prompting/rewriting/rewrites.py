"""Versions of one prompt, ranked by how likely they make a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Seed, ranged
from lcc_lens.core.registry import nearest
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import special_prefix, token_ids
from lcc_lens.models.loading.hooked import LoadedModel
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.frames import Framed, split_prompt
from lcc_lens.prompting.merits import Merits, merits
from lcc_lens.prompting.rewriting.preferences import Target, is_dense, without_copies
from lcc_lens.prompting.rewriting.ranking import Ranked, rank_prompts
from lcc_lens.prompting.rewriting.writing import (
    BASE_MODEL_TURN,
    WRITTEN,
    answers,
    chat_text,
    checked_request,
    proposals,
)
from lcc_lens.prompting.variants import RAW, SOFT, VARIANTS
from lcc_lens.prompting.wording import n_words

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

#: Who wrote a version: the user, a trained rewriter or another model, or the dense model without an adapter.
USER, REWRITTEN, DENSE = "user", "rewriter", "dense"
#: Tokens of the dense model's answer that versions are ranked by, and of a version.
RESPONSE_TOKENS, VERSION_TOKENS = 32, 48


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


@ranged
def rewrite_prompt(
    pair: Pair,
    prompt: str,
    written: Sequence[str],
    *,
    target: Target = "pruned",
    response: str | None = None,
    rules: Sequence[str] = WRITTEN,
    response_tokens: Count = RESPONSE_TOKENS,
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
        response_tokens: tokens of the dense model's answer; the first ones of a response that count.
        by: who wrote ``written``, as the table says it.

    Raises:
        RequestError: a prompt that is empty or too long, an unknown target or rule, or a dense model that answers
            nothing.
    """
    model = pair.dense if is_dense(target) else pair.pruned
    _check_rules(rules)
    framed, tokenizer = split_prompt(prompt, pair.tokenizer), pair.tokenizer
    empty = next((text for text in (framed.core, *written) if not n_words(text)), None)
    if empty is not None:
        raise RequestError(f"expected prompts with at least one word, got {empty!r}; leave it out")
    raw_prompt = _whole(tokenizer, framed, framed.core)
    if response is None:
        tokens = _answered(pair, raw_prompt, response_tokens)
        (response,) = answers(pair.dense, tokenizer, tokens, max_new_tokens=response_tokens)
    if not response.strip():
        raise RequestError("expected a response to rank prompts by, got none from the dense model; pass response")
    versions = {framed.core: RAW, **{VARIANTS[name](framed.core, prompt): name for name in rules}}
    given = [text for text in dict.fromkeys(written) if text not in versions]
    kept = without_copies(response, framed.core, given)
    versions.update(dict.fromkeys(kept, by))
    prompts = {text: _whole(tokenizer, framed, text) for text in versions}
    ranked = rank_prompts(
        model, tokenizer, raw_prompt, [*prompts.values()], response, max_length=pair.context,
        response_tokens=response_tokens,
    )  # fmt: skip
    by_prompt = {prompts[text]: (source, text) for text, source in reversed(versions.items())}
    candidates = []
    for found in ranked:
        source, text = by_prompt[found.prompt]
        candidates.append(Candidate(source, text, merits(text, framed.core), found))
    raw = next(candidate for candidate in candidates if candidate.source == RAW)
    first = candidates[0]
    chosen = first if first.ranked.is_better else raw
    return Rewrites(tuple(candidates), response, target, chosen, len(given) - len(kept))


def _check_rules(rules: Sequence[str]) -> None:
    known = [name for name in VARIANTS if name not in (RAW, SOFT)]
    unknown = next((name for name in rules if name not in known), None)
    if unknown is not None:
        raise RequestError(
            f"expected rules among the variants ({', '.join(known)}), got {unknown!r}; {nearest(unknown, known)}"
        )


def _whole(tokenizer: PreTrainedTokenizerBase, framed: Framed, core: str) -> str:
    """A version within its template; a bare one gets the chat template."""
    is_bare = not framed.before.strip() and not framed.after.strip()
    return chat_text(tokenizer, core, BASE_MODEL_TURN) if is_bare else framed.having(core)


def _answered(pair: Pair, whole: str, n_tokens: int, where: str = "") -> list[int]:
    """The tokens of a whole prompt, if the dense model can answer it."""
    tokens = special_prefix(pair.tokenizer) + token_ids(pair.tokenizer, whole)
    if len(tokens) + n_tokens > pair.context:
        raise RequestError(
            f"expected a prompt of at most {pair.context - n_tokens} tokens{where}, got {len(tokens)}; shorten it"
        )
    return tokens


def check_prompts(
    pair: Pair,
    prompts: Sequence[str],
    source: str,
    *,
    writer: Pair | LoadedModel | None = None,
    max_new_tokens: int = VERSION_TOKENS,
) -> None:
    """Refuse, before the first of several prompts is rewritten, those that are empty or too long.

    Args:
        source: what the prompts are read from.
        writer: who writes the versions, where it is not one of the pair.

    Raises:
        RequestError: names the prompt by its number.
    """
    writer = writer or pair
    for number, prompt in enumerate(prompts, 1):
        where = f" in prompt {number} of {source}" if len(prompts) > 1 else ""
        framed = split_prompt(prompt, pair.tokenizer)
        checked_request(writer.tokenizer, framed.core, writer.context, max_new_tokens, where)
        _answered(pair, _whole(pair.tokenizer, framed, framed.core), RESPONSE_TOKENS, where)


@ranged
def written_by(
    writer: Pair | LoadedModel, prompt: str, n: Count = 6, *, max_new_tokens: Count = 64, seed: Seed = 0
) -> list[str]:
    """Versions of a prompt by a model without an adapter: a pair's dense one, or another such as MePO's optimiser."""
    model = writer.dense if isinstance(writer, Pair) else writer.model
    core = split_prompt(prompt, writer.tokenizer).core
    return proposals(model, writer.tokenizer, core, n, context=writer.context, seed=seed, max_new_tokens=max_new_tokens)
