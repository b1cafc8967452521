"""Trees of tokens hold every sequence, and what sequences begin with once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lcc_lens.evaluation.answers.token_trees import TokenTree, token_trees

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12)


@given(SEQUENCES, st.integers(0, 14))
def test_every_sequence_is_a_path_of_one_tree(sequences: list[list[int]], max_nodes: int) -> None:
    trees = token_trees(sequences, max_nodes)
    assert sorted(index for tree in trees for index in tree.paths) == list(range(len(sequences)))
    for tree in trees:
        assert tree.is_chain or len(tree.tokens) <= max_nodes
        visible = tree.is_visible()
        for index, path in tree.paths.items():
            assert [tree.tokens[node] for node in path] == sequences[index]
            assert [tree.positions[node] for node in path] == list(range(len(path)))
            for at, node in enumerate(path):
                assert visible[node].nonzero().flatten().tolist() == path[: at + 1]


@given(SEQUENCES)
def test_what_sequences_begin_with_is_held_once(sequences: list[list[int]]) -> None:
    for tree in token_trees(sequences, 1000):
        beginnings = {
            tuple(tree.tokens[node] for node in path[: at + 1])
            for path in tree.paths.values()
            for at in range(len(path))
        }
        assert len(tree.tokens) == len(beginnings)


@given(SEQUENCES)
def test_without_branches_only_beginnings_are_shared(sequences: list[list[int]]) -> None:
    trees = token_trees(sequences, 0)
    assert all(tree.is_chain for tree in trees)
    ordered = sorted(sequences)
    assert len(trees) == len(ordered[:1]) + sum(after[: len(before)] != before for before, after in pairwise(ordered))


def test_sequences_that_share_little_stand_apart() -> None:
    """One token of eight saves less than attention over both costs."""
    assert len(token_trees([[1, *[2] * 7], [1, *[3] * 7]], 100)) == 2
    assert len(token_trees([[1, 1, *[2] * 6], [1, 1, *[3] * 6]], 100)) == 1


def test_a_tree_branches_where_sequences_part() -> None:
    tree = TokenTree()
    for index, sequence in enumerate(([5, 6, 7], [5, 6, 8, 9], [5, 6, 8, 9])):
        tree.add(index, sequence)
    assert (tree.tokens, tree.positions) == ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3])
    assert tree.paths == {0: [0, 1, 2], 1: [0, 1, 3, 4], 2: [0, 1, 3, 4]}
    assert not tree.is_chain
