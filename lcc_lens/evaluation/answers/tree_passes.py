"""Run a plain model over trees of tokens: what sequences share is computed once, what follows apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.evaluation.answers.token_trees import TokenTree
from lcc_lens.models.hooked.losses import logits_where
from lcc_lens.models.hooked.self_checks import FAILURES, OTHER_OPERATIONS, is_close

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens that a model is checked with. Many, so that a model which takes rows for sequences is far off.
_CHECKED = 32


def tree_logits(
    model: PreTrainedModel, trees: Sequence[TokenTree], mask: Bool[Tensor, "batch node"]
) -> Float[Tensor, "target vocab"]:
    """A model's logits at the masked nodes of trees, in row-major order; no others are computed.

    Trees that branch need a model that shares (:func:`can_share`): every node has the position that it has in its
    sequences, and attends to the nodes before it there.

    Args:
        mask: one row per tree, as long as the longest of them.
    """
    tokens, positions = (_padded(rows, mask) for rows in ([t.tokens for t in trees], [t.positions for t in trees]))
    if all(tree.is_chain for tree in trees):
        return logits_where(model, tokens, mask.to(model.device))
    visible = torch.eye(mask.shape[1], dtype=torch.bool).repeat(len(trees), 1, 1, 1)
    for row, tree in zip(visible, trees, strict=True):
        row[0, : len(tree.tokens), : len(tree.tokens)] = tree.is_visible()
    hidden = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
    return logits_where(
        model, tokens, mask.to(model.device), attention_mask=hidden.to(model.device), position_ids=positions
    )


def can_share(model: PreTrainedModel, max_nodes: int) -> bool:
    """Whether a model gives the same logits over a tree as over its sequences; tried on a few tokens.

    Not with positions that count the keys (ALiBi), recurrent layers, or kernels that take no mask.

    Args:
        max_nodes: nodes of a tree at most.
    """
    n_shared = min(_CHECKED, max_nodes) // 4
    n_known = model.get_input_embeddings().weight.shape[0]
    tokens = [number * 7919 % n_known for number in range(1, 4 * n_shared + 1)]
    sequences = [tokens[: 3 * n_shared], tokens[:n_shared] + tokens[3 * n_shared :]]
    tree = TokenTree()
    for index, sequence in enumerate(sequences):
        tree.add(index, sequence)
    if tree.is_chain:
        return False
    try:
        with torch.inference_mode():
            shared = tree_logits(model, [tree], torch.ones(1, len(tree.tokens), dtype=torch.bool))
            apart = [model(torch.tensor([sequence], device=model.device)).logits[0] for sequence in sequences]
    except FAILURES:
        return False
    return all(
        is_close(shared[tree.paths[index]], logits, OTHER_OPERATIONS, model.dtype) for index, logits in enumerate(apart)
    )


def _padded(rows: Sequence[Sequence[int]], mask: Bool[Tensor, "batch node"]) -> Int[Tensor, "batch node"]:
    padded = torch.zeros(mask.shape, dtype=torch.long)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = torch.tensor(row)
    return padded.to(mask.device)
