"""lm-eval's model interface: contexts that answers share are read once, and logits are computed at answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, batches, known_ids
from lcc_lens.evaluation.answers.token_trees import TokenTree, token_trees
from lcc_lens.evaluation.answers.tree_passes import can_share, tree_logits
from lcc_lens.models.architecture.context import attention_window
from lcc_lens.models.hooked.losses import log_normaliser

#: A request of lm-eval: its texts (None in a window of a rolling request), and the tokens of context and answer.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class AnswerScorer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model class for transformers, made faster, and more exact in 16-bit formats.

    lm-eval runs every request by itself, and computes logits at all its positions, in the model's format. Here tokens
    that requests begin with are computed once (:class:`~lcc_lens.evaluation.answers.token_trees.TokenTree`), logits at
    the answers' positions only, and log-likelihoods are float32. Prompts, tokens, truncation and scoring are lm-eval's
    own.

    Where sharing gives other results (:func:`~lcc_lens.evaluation.answers.tree_passes.can_share`, tried once), or a
    request is longer than the model's window of attention, only requests that read the same tokens share a pass.

    Args:
        model: a causal model, whose hooks stay active.
        tokenizer: its tokenizer.
        max_length: maximum of tokens per request; longer ones are cut from the left.
        max_tokens: padded tokens per forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, max_tokens: int = 1024) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
        self._max_tokens = max_tokens

    def tok_encode(self, string: str, *arguments: Any, **settings: Any) -> list[int]:
        """The tokens of a text, as lm-eval encodes it; see :func:`~lcc_lens.data.batches.known_ids`."""
        encode = partial(super().tok_encode, string, *arguments, **settings)
        return known_ids(self.tokenizer, encode)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every request's answer in nats, and whether greedy decoding would give the answer."""
        answers = [answer for _, _, answer in requests]
        longest = max(map(len, answers), default=0)
        if longest > self.max_length:
            raise RequestError(
                f"expected answers of at most {self.max_length} tokens, got one of {longest}; leave the task out"
            )
        reads = [(context + answer)[-(self.max_length + 1) : -1] for _, context, answer in requests]
        trees = token_trees(reads, self._max_nodes)
        if not (all(tree.is_chain for tree in trees) or self._shares):
            trees = token_trees(reads, 0)
        scores: dict[int, tuple[float, bool]] = {}
        bar = huggingface.tqdm(total=len(requests), disable=disable_tqdm)
        for is_chain in (True, False):  # apart, since causal attention needs no mask and has no limit
            alike = [tree for tree in trees if tree.is_chain == is_chain]
            rows = [TokenSequence(torch.tensor(tree.tokens), 1) for tree in alike]
            for batch in batches(rows, max_tokens=self._max_tokens):
                scored = self._scores([alike[i] for i in batch.index], answers)
                bar.update(len(scored))
                scores |= scored
        bar.close()
        for index, (text, _, _) in enumerate(requests):
            if text is not None:  # as it is in the windows of a rolling request
                self.cache_hook.add_partial("loglikelihood", text, scores[index])
        return [scores[index] for index in range(len(requests))]

    @property
    def _max_nodes(self) -> int:
        """Nodes of a tree with branches at most: a window of attention counts a row's tokens in some models."""
        return int(min(self._max_tokens, self.max_length, attention_window(self.config)))

    @cached_property
    def _shares(self) -> bool:
        return can_share(self.model, self._max_nodes)

    def _scores(self, trees: Sequence[TokenTree], answers: Sequence[list[int]]) -> dict[int, tuple[float, bool]]:
        """The scores of all requests in some trees, by their number; logits are computed at answers alone."""
        width = max(len(tree.tokens) for tree in trees)
        predicting = {
            i: [row * width + node for node in path[-len(answers[i]) :]]
            for row, tree in enumerate(trees)
            for i, path in tree.paths.items()
        }
        targets = torch.tensor([token for i in predicting for token in answers[i]])
        # answers that begin alike are predicted by the same nodes
        nodes, place = torch.tensor([*chain.from_iterable(predicting.values())]).unique(return_inverse=True)
        mask = torch.zeros(len(trees) * width, dtype=torch.bool)
        mask[nodes] = True
        with torch.inference_mode():
            logits = tree_logits(self.model, trees, mask.view(len(trees), width))
            likeliest, normaliser = logits.argmax(-1).cpu()[place], log_normaliser(logits).cpu()[place]
            values = logits[place.to(logits.device), targets.to(logits.device)].cpu().to(normaliser) - normaliser
        lengths = [len(answers[i]) for i in predicting]
        parts = zip(predicting, values.split(lengths), (likeliest == targets).split(lengths), strict=True)
        return {i: (float(value.sum()), bool(is_likeliest.all())) for i, value, is_likeliest in parts}
