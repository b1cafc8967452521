"""Direct preference optimisation of an adapter through the training loop of restorations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import Batch, TokenSequence, batches, pad, token_ids
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.losses import token_nll
from lcc_lens.prompting.likelihoods import token_log_likelihoods
from lcc_lens.prompting.rewriting.preference_files import Preference
from lcc_lens.prompting.rewriting.writing import request_tokens
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.objectives import Objective, Source, run_model
from lcc_lens.restoration.training.validation import hooked_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_NAME = "preference"


@dataclass(frozen=True)
class PreferenceSequence(TokenSequence):
    """The request with the chosen answer; beside it the one with the rejected answer, and the reference's log-ratio.

    ``reference`` is the log-likelihood of the chosen answer less that of the rejected one under the model without its
    adapter, in nats.
    """

    rejected: TokenSequence
    reference: float

    def swapped(self) -> PreferenceSequence:
        """The same with chosen and rejected exchanged."""
        chosen = TokenSequence(self.tokens, self.loss_from)
        return PreferenceSequence(self.rejected.tokens, self.rejected.loss_from, chosen, -self.reference)


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """Rows of chosen answers, followed by as many rows of rejected ones."""

    reference: Float[Tensor, " pair"]


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    r"""The loss of direct preference optimisation, $-\log \sigma(\beta m)$ per pair, in place of other losses.

    The margin is $m = \log\frac{\pi(y_c)}{\pi_{ref}(y_c)} - \log\frac{\pi(y_r)}{\pi_{ref}(y_r)}$ over whole answers.

    Args:
        beta: how far the model may move from the reference; smaller is farther.

    Reference:
        Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), Eq. 7.
    """

    beta: float = 0.01

    @property
    def weights(self) -> dict[str, float]:
        """The one loss."""
        return {_NAME: 1.0}

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, int]:
        """The number of pairs."""
        return {_NAME: len(sequences)}

    def longest(self, sequences: Sequence[TokenSequence]) -> int:
        """The length of the longest answer with its request, chosen or rejected."""
        return max(map(len, _longer(sequences)))

    def batches(
        self, sequences: Sequence[TokenSequence], max_tokens: int, longest: int | None = None
    ) -> Sequence[Batch]:
        """Group pairs so that both answers of a pair are in one batch."""
        pairs = [sequence for sequence in sequences if isinstance(sequence, PreferenceSequence)]
        grouped = batches(_longer(pairs), max_tokens=max(1, max_tokens // 2), longest=longest)
        return [_batch_of([pairs[i] for i in batch.index], batch) for batch in grouped]

    def terms(
        self,
        model: HookedModel | Source,
        batch: Batch,
        hooks: Sequence[Any] = (),
        teacher: HookedModel | Source | None = None,
    ) -> dict[str, Tensor]:
        """The loss summed over a batch's pairs."""
        return {_NAME: -logsigmoid(self.beta * self.margins(hooked_of(model), batch, hooks)).sum()}

    def margins(self, model: HookedModel, batch: Batch, hooks: Sequence[Any] = ()) -> Float[Tensor, " pair"]:
        """By how much the model prefers the chosen answers more than the reference does, nats per answer."""
        assert isinstance(batch, PreferenceBatch)
        logits = run_model(model, batch, batch.is_target(), hooks, with_logits=True, with_z=False).logits
        nll = token_nll(logits, batch.targets().to(logits.device))
        rows = nll.split(batch.is_target().sum(1).tolist())
        chosen, rejected = (-torch.stack([row.sum() for row in rows])).chunk(2)
        return chosen - rejected - batch.reference.to(chosen)


def _longer(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The longer one of every pair of answers."""
    return [max((s, s.rejected), key=len) for s in sequences if isinstance(s, PreferenceSequence)]


def _batch_of(pairs: Sequence[PreferenceSequence], longer: Batch) -> PreferenceBatch:
    """Both answers of pairs, as long as the batch of the longer ones."""
    both = [*pairs, *(pair.rejected for pair in pairs)]
    padded = pad(both, range(len(both)), longer.tokens.shape[1])
    reference = torch.tensor([pair.reference for pair in pairs])
    return PreferenceBatch(padded.tokens, padded.lengths, padded.loss_from, longer.index, reference)


def preference_sequences(
    model: HookedModel, tokenizer: PreTrainedTokenizerBase, preferences: Sequence[Preference], max_length: int
) -> list[PreferenceSequence]:
    """Encode preferences as requests to rewrite with both answers, and measure the reference's log-ratios.

    An answer ends with the tokenizer's end token, if the model has an embedding for it. Pairs beyond ``max_length`` are
    left out.

    Raises:
        RequestError: none is left.
    """
    last = tokenizer.eos_token_id
    end = [int(last)] if last is not None and last < model.cfg.d_vocab else []
    encoded = []
    for preference in preferences:
        request = request_tokens(tokenizer, preference.prompt)
        answers = ([*token_ids(tokenizer, text), *end] for text in (preference.chosen, preference.rejected))
        both = [TokenSequence(torch.tensor([*request, *answer]), len(request)) for answer in answers]
        encoded += [both] if max(map(len, both)) <= max_length else []
    n_long = len(preferences) - len(encoded)
    if not encoded:
        raise RequestError(
            f"expected preferences of up to {max_length} tokens, got none in {n_long}; shorten them, or raise the "
            "length where the context allows it"
        )
    if n_long:
        logger.warning("skipped %d of %d preferences longer than %d tokens", n_long, len(preferences), max_length)
    flat = token_log_likelihoods(model, [sequence for both in encoded for sequence in both], "reference")
    sums = torch.stack([values.double().sum() for values in flat]).view(-1, 2)
    return [
        PreferenceSequence(chosen.tokens, chosen.loss_from, rejected, float(likelihood[0] - likelihood[1]))
        for (chosen, rejected), likelihood in zip(encoded, sums, strict=True)
    ]


def reward_margins(
    model: HookedModel,
    adapter: Injection | None,
    pairs: Sequence[PreferenceSequence],
    objective: PreferenceObjective,
    max_tokens: int = 1024,
) -> Float[Tensor, " pair"]:
    r"""$\beta m$ of every pair, in their order; above 0 where the adapted model prefers the chosen answer more."""
    result = torch.empty(len(pairs))
    with torch.inference_mode(), (adapter or Injection()).attached(model):
        for batch in objective.batches(pairs, max_tokens):
            result[list(batch.index)] = objective.beta * objective.margins(model, batch).cpu().float()
    return result
