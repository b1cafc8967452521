"""Measure a model in a comparison, with or without an injection: perplexity, KL divergence, loss and accuracies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.objectives import Objective
from lcc_lens.restoration.training.reuse import CachedTeacher
from lcc_lens.restoration.training.validation import validation_loss, validation_terms


@dataclass(frozen=True)
class Measures:
    """Data to measure on.

    Args:
        texts: blocks of text by name; the first one's perplexity is the main figure.
        responses: held-out instructions, for the KL divergence from the dense model and the loss of their responses.
        tasks: zero-shot tasks of lm-eval.
        limit: items of each task at most.
    """

    texts: Mapping[str, Sequence[TokenSequence]]
    responses: Sequence[TokenSequence]
    tasks: Sequence[str] = ()
    limit: int | None = None

    def of(
        self, pair: Pair, model: HookedModel, injection: Injection | None, teacher: CachedTeacher | None = None
    ) -> dict[str, Any]:
        """Measure one of a pair's models.

        Args:
            injection: attached to it while it is measured.
            teacher: the dense model with its cached logits; the pair's own if not given.

        Returns:
            ``perplexity`` and ``log_perplexity`` of the first text, ``kl`` and ``response_loss`` in nats per response
            token, ``texts`` (by name the ``perplexity``, and ``losses`` in nats per token of every block), ``tasks``
            (by name ``acc``, ``stderr``, ``n``, and ``items``: 1 for each right answer, 0 for each wrong one).
        """
        texts: dict[str, dict[str, Any]] = {}
        for name, blocks in self.texts.items():
            # blocks are of equal length: the mean of their losses is the loss per token
            losses = [validation_loss(model, injection, [block]) for block in blocks]
            texts[name] = {"perplexity": math.exp(sum(losses) / len(losses)), "losses": losses}
        main = next(iter(texts.values()))
        terms = validation_terms(
            model, injection, self.responses, None, Objective(1.0, 1.0, prompts=False), teacher or pair.dense
        )  # fmt: skip
        return {
            "perplexity": main["perplexity"],
            "log_perplexity": math.log(main["perplexity"]),
            "kl": terms["distillation"],
            "response_loss": terms["response"],
            "texts": texts,
            "tasks": self.accuracies(pair, model, injection, self.tasks),
        }

    def accuracies(
        self, pair: Pair, model: HookedModel, injection: Injection | None, tasks: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """The ``tasks`` of :meth:`of` alone."""
        from lcc_lens.evaluation.lm_eval_tasks import evaluate_task

        scores: dict[str, dict[str, Any]] = {}
        with (injection or Injection()).applied_to(model), fused_attention(model):
            plain = plain_model(model)
            for task in tasks:
                scores[task] = evaluate_task(plain, pair.tokenizer, task, limit=self.limit, with_items=True)
        return scores
