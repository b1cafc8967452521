"""Relative difference of every head output at every token of a few examples, for display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import TokenSequence, batches
from lcc_lens.models.hooked.activations import Site, TokenPositions, visit_sites
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class TokenLoss(Shown):
    r"""One example's tokens with $|\delta| / |z_{dense}|$ of every head at each of them.

    ``example`` is the example's place in the data, ``pieces`` are its tokens as text, and the response starts at token
    ``loss_from``. A head whose dense output is zero counts 0. ``ids`` are the tokens' numbers; a scan of an earlier
    version has none.
    """

    example: int
    pieces: tuple[str, ...]
    loss_from: int
    loss: Float[Tensor, "token layer head"]
    ids: tuple[int, ...] = ()


def token_losses(pair: Pair, sequences: Sequence[TokenSequence], n: int) -> tuple[TokenLoss, ...]:
    """The relative difference at every token of the first ``n`` sequences.

    The dense model runs over all of them before the pruned one does, so a pair may hold one model at a time.
    """
    chosen = sequences[:n]
    if not chosen:  # avoids loading a model that is not in memory
        return ()
    parts = batches(chosen)
    places: list[dict[Site, TokenPositions]] = [{"z": TokenPositions.all_tokens(batch)} for batch in parts]
    dense: list[list[Tensor]] = [[] for _ in parts]
    losses: dict[int, Tensor] = {}
    for batch, where, z_dense in zip(parts, places, dense, strict=True):
        visit_sites(pair.dense, batch.tokens, where, partial(_keep, pair, z_dense))
    for batch, where, z_dense in zip(parts, places, dense, strict=True):
        loss: list[Tensor] = []
        visit_sites(pair.pruned, batch.tokens, where, partial(_compare, z_dense, loss))
        losses.update(zip(batch.index, torch.stack(loss, dim=1).split(batch.lengths.tolist()), strict=True))
    return tuple(
        TokenLoss(
            i, pieces_of(pair.tokenizer, sequence), sequence.loss_from, losses[i], tuple(sequence.tokens.tolist())
        )
        for i, sequence in enumerate(chosen)
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> tuple[str, ...]:
    """Each token as text."""
    return tuple(str(tokenizer.decode([int(token)])) for token in sequence.tokens)


def _keep(pair: Pair, kept: list[Tensor], site: Site, layer: int, z: Float[Tensor, "token head d_head"]) -> None:
    """Store the dense model's head outputs of a layer."""
    kept.append(pair.kept_heads(layer, z).cpu())


def _compare(dense: list[Tensor], loss: list[Tensor], site: Site, layer: int, z: Tensor) -> None:
    """Compare the pruned model's head outputs of a layer with the dense model's, which are freed."""
    z_dense, dense[layer] = dense[layer].float(), dense[layer].new_empty(0)
    norm = z_dense.norm(dim=-1)
    loss.append(torch.where(norm > 0, (z_dense - z.float().cpu()).norm(dim=-1) / norm, 0.0))
