"""Soft prompts: trained embeddings before the prompt, as the upper bound of what a prompt can recover."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Rate, Seed, ranged
from lcc_lens.data.batches import TokenSequence, special_prefix
from lcc_lens.data.datasets import Data
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.variants import require_prompts
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.config import TrainConfig
from lcc_lens.restoration.training.loop import train
from lcc_lens.restoration.training_data import training_sequences

_EMBEDDING = "hook_embed"


class SoftPrompt(Injection):
    """Embeddings that replace those of placeholder tokens at the beginning of every sequence.

    They do not fold into a checkpoint. Sequences come from :meth:`behind`.

    Args:
        embeddings: initial values.
        start: where they begin: after the tokenizer's special tokens.

    Reference:
        Xu et al., "Compress, Then Prompt" (arXiv 2305.11186).
    """

    default_lr = 1e-2

    def __init__(self, embeddings: Float[Tensor, "soft d_model"], start: int) -> None:
        super().__init__()
        self.embeddings, self.start = nn.Parameter(embeddings.float()), start

    def __len__(self) -> int:
        return len(self.embeddings)

    def behind(self, sequence: TokenSequence) -> TokenSequence:
        """The sequence with placeholders for the soft prompt before it."""
        tokens, space = sequence.tokens, torch.zeros(len(self), dtype=torch.long)
        return TokenSequence(
            torch.cat([tokens[: self.start], space, tokens[self.start :]]), sequence.loss_from + len(self)
        )

    def hooks(self) -> list[NamedHook]:
        """The hook that puts the embeddings in place."""

        def put(embedded: Tensor, hook: Any) -> Tensor:
            soft = self.embeddings.to(embedded).expand(len(embedded), -1, -1)
            return torch.cat([embedded[:, : self.start], soft, embedded[:, self.start + len(self) :]], dim=1)

        return [(_EMBEDDING, put)]


@ranged
def fit_soft_prompt(
    pair: Pair,
    data: Data,
    *,
    n_tokens: Count = 8,
    epochs: Count = 1,
    lr: Rate | None = None,
    max_length: int | None = None,
    seed: Seed = 0,
    run: Path | None = None,
    resume: bool = False,
) -> SoftPrompt:
    """Train a soft prompt on the pruned model's response loss, through the training loop of restorations.

    Args:
        data: instructions or questions; every tenth group validates.
        n_tokens: embeddings of the soft prompt.
        max_length: tokens of a sequence and the soft prompt at most.

    Raises:
        RequestError: data without responses, or a model without a hook point at its embedding.

    Example:
        >>> soft = fit_soft_prompt(pair, load_data("alpaca", n=240, role="train"))  # doctest: +SKIP
    """
    require_prompts(data)
    model = pair.pruned
    if _EMBEDDING not in model.hook_dict:
        raise RequestError(f"expected the hook point {_EMBEDDING} for a soft prompt, got none; leave soft out")
    room = max(fitting_length(max_length, pair.context) - n_tokens, 1)
    training, validation = training_sequences(pair, None, data, None, room, None, None)
    soft = SoftPrompt(_drawn(model, training, n_tokens, seed), len(special_prefix(pair.tokenizer)))
    config = TrainConfig(epochs=epochs, lr=lr, seed=seed)
    identity = f"soft prompt of {n_tokens}, {pair.pruned_id.sha256}"
    for _ in train(
        model, soft, [soft.behind(s) for s in training], [soft.behind(s) for s in validation], config,
        run=run, resume=resume, identity=identity,
    ):  # fmt: skip
        pass
    return soft.cpu()


def _drawn(model: HookedModel, sequences: Sequence[TokenSequence], n: int, seed: int) -> Float[Tensor, "soft d_model"]:
    """Embeddings of tokens that are drawn from the data."""
    pool = torch.cat([sequence.tokens for sequence in sequences])
    tokens = pool[torch.randint(len(pool), (n,), generator=torch.Generator().manual_seed(seed))]
    kept: list[Tensor] = []
    with torch.inference_mode():
        model.run_with_hooks(
            tokens[None].to(device_of(model)), fwd_hooks=[(_EMBEDDING, lambda x, hook: kept.append(x[0].clone()))]
        )
    return kept[0].float().cpu().clone()
