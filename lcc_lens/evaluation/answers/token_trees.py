"""Trees of tokens: sequences that begin alike, with the tokens that they share once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

#: The share of its tokens that a sequence must have in common with the one before it to be added to its tree. Fewer
#: save less than attention over a longer row costs.
_SHARED = 0.25


@dataclass
class TokenTree:
    """Sequences that begin alike. Each token is a node, and a node's parent is the token before it.

    Attributes:
        tokens: of every node; parents come first.
        positions: of every node in its sequences.
        paths: by sequence, the nodes of its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    _last: list[int] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """Whether all sequences are beginnings of one, so that causal attention is enough."""
        return len(self._last) == len(self.tokens)

    def shared_with(self, sequence: Sequence[int]) -> int:
        """How many of its first tokens a sequence has in common with the sequence that was added last."""
        pairs = enumerate(zip(self._last, sequence, strict=False))
        return next(
            (at for at, (node, token) in pairs if self.tokens[node] != token), min(len(self._last), len(sequence))
        )

    def add(self, index: int, sequence: Sequence[int]) -> None:
        """Add a sequence, as a branch of the one that was added last.

        Args:
            index: its name in ``paths``.
        """
        n_shared, n_nodes = self.shared_with(sequence), len(self.tokens)
        self.tokens += sequence[n_shared:]
        self.positions += range(n_shared, len(sequence))
        self._last = self.paths[index] = self._last[:n_shared] + list(range(n_nodes, len(self.tokens)))

    def is_visible(self) -> Bool[Tensor, "node node"]:
        """Which nodes (second axis) a node attends to: itself and those before it in its sequences."""
        visible = torch.eye(len(self.tokens), dtype=torch.bool)
        for nodes in self.paths.values():
            path = torch.tensor(nodes)
            visible[path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return visible


def token_trees(sequences: Sequence[Sequence[int]], max_nodes: int) -> list[TokenTree]:
    """Group sequences that begin alike.

    Args:
        sequences: tokens; ``TokenTree.paths`` has their positions in this list.
        max_nodes: nodes of a tree with branches at most; with 0 no tree has any, and only repeated sequences and
            beginnings of another one are shared.
    """
    trees: list[TokenTree] = []
    for index in sorted(
        range(len(sequences)), key=lambda i: list(sequences[i])
    ):  # what begins alike stands side by side
        if not trees or not _takes(trees[-1], sequences[index], max_nodes):
            trees.append(TokenTree())
        trees[-1].add(index, sequences[index])
    return trees


def _takes(tree: TokenTree, sequence: Sequence[int], max_nodes: int) -> bool:
    n_shared = tree.shared_with(sequence)
    if tree.is_chain and n_shared == len(tree.tokens):
        return True
    n_nodes = len(tree.tokens) + len(sequence) - n_shared
    return n_nodes <= max_nodes and n_shared >= _SHARED * len(sequence)
