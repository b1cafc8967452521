"""Forward passes of a scan: run both models on one shard of examples and read the same token positions."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.analysis.causes.division import Division
from lcc_lens.analysis.scan.contrastive import visit_pairs
from lcc_lens.analysis.scan.rows import DenseReader, PrunedReader, Rows
from lcc_lens.analysis.scan.sums import ScanSums
from lcc_lens.data.batches import Batch, TokenSequence, batches, shared_prefix
from lcc_lens.models.hooked.activations import Positions, Site, TokenPositions, sampled_positions
from lcc_lens.models.hooked.kv_cache import PrefixCache
from lcc_lens.models.pair import Pair

#: Examples per shard at most if only some positions are compared: enough to sort by length again for the pruned model.
SHARD = 128
#: Last tokens of contrastive pairs at which head outputs are read besides the sampled positions.
ENDS = ("question", "right", "wrong")
#: Minimum length of a shared prefix, and minimum number of examples with it, for reusing its KV cache.
LEAST_PREFIX, LEAST_MEMBERS = 16, 6


@dataclass(frozen=True)
class ScanPlan:
    """Sequences of a scan, the wrong answers if any, and the positions and sites at which activations are read."""

    sequences: tuple[TokenSequence, ...]
    wrong: tuple[TokenSequence, ...] | None
    positions: Positions
    sites: tuple[Site, ...]
    batch_tokens: int
    causes: bool = False
    """Also divide differences by cause: both models read whole sequences in the same batches, each batch a shard."""

    @cached_property
    def prefixes(self) -> tuple[Int[Tensor, " prefix"], ...]:
        """First tokens that groups of examples share before any read position; number 0 is empty."""
        return self._grouped[0]

    @cached_property
    def prefix_of(self) -> tuple[int, ...]:
        """The number of every example's prefix."""
        return self._grouped[1]

    @cached_property
    def _grouped(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        groups: dict[bytes, list[int]] = {}
        for i in range(0 if self.causes else len(self.sequences)):
            if self._before_reading(i) >= LEAST_PREFIX:
                groups.setdefault(self.sequences[i].tokens[:LEAST_PREFIX].numpy().tobytes(), []).append(i)
        prefixes, number = [torch.zeros(0, dtype=torch.long)], [0] * len(self.sequences)
        for members in groups.values():
            if len(members) >= LEAST_MEMBERS:
                for i in members:
                    number[i] = len(prefixes)
                prefixes.append(self._common(members))
        return tuple(prefixes), tuple(number)

    def _common(self, members: Sequence[int]) -> Int[Tensor, " prefix"]:
        """The first tokens that some examples share before any read position."""
        common = self.sequences[members[0]].tokens[: min(map(self._before_reading, members))]
        for i in members:
            common = common[: shared_prefix(common, self.sequences[i].tokens)]
        return common

    def _before_reading(self, example: int) -> int:
        """The number of tokens before an example's first read position."""
        ends = [self.question_end(example)] if self.wrong is not None else []
        return min([len(self.sequences[example]) - 1, *self.sampled(example), *ends])

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(map(len, (*self.sequences, *(self.wrong or ()))))

    def shards(self) -> list[tuple[int, ...]]:
        """The examples in shards, longest first: a batch each, or as many that are read at few positions."""
        if self.positions == "all" or self.causes:
            return [batch.index for batch in batches(self.sequences, max_tokens=self.batch_tokens)]
        shards: list[list[int]] = []
        n_read = 0
        for i in sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i])):
            n_read += len(self.sampled(i))
            if not shards or len(shards[-1]) == SHARD or n_read > self.batch_tokens:
                shards.append([])
                n_read = len(self.sampled(i))
            shards[-1].append(i)
        return [tuple(shard) for shard in shards]

    def dense_batches(self, shard: Sequence[int]) -> list[tuple[int, Batch]]:
        """A shard's batches for the dense model, each with its prefix's number and without that prefix.

        ``Batch.index`` counts within the shard.
        """
        return self._batches(shard, [len(self.sequences[i]) for i in shard])

    def pruned_batches(self, shard: Sequence[int]) -> list[tuple[int, Batch]]:
        """A shard's batches for the pruned model, cut after the last read position."""
        return self._batches(shard, [self._needed(i) for i in shard])

    def sampled(self, example: int) -> list[int]:
        """The compared positions of one example."""
        return sampled_positions(self.sequences[example], self.positions)

    def question_end(self, example: int) -> int:
        """The question's last token."""
        return self.sequences[example].loss_from - 1

    def _needed(self, example: int) -> int:
        """The number of an example's tokens up to its last read position; all where causes are found."""
        if self.causes:
            return len(self.sequences[example])
        ends = [self.question_end(example)] if self.wrong is not None else []
        return 1 + max([self.n_prefix(example), *self.sampled(example), *ends])

    def n_prefix(self, example: int) -> int:
        """The number of tokens of an example's prefix."""
        return len(self.prefixes[self.prefix_of[example]])

    def _batches(self, shard: Sequence[int], ends: Sequence[int]) -> list[tuple[int, Batch]]:
        """Batches of the tokens between each example's prefix and its end, with the prefix's number."""
        grouped: list[tuple[int, Batch]] = []
        for number in sorted({self.prefix_of[i] for i in shard}):
            members = [k for k, i in enumerate(shard) if self.prefix_of[i] == number]
            parts = [self._part(shard[k], ends[k]) for k in members]
            longest = self.longest - len(self.prefixes[number])
            for batch in batches(parts, max_tokens=self.batch_tokens, longest=longest):
                grouped.append((number, replace(batch, index=tuple(members[k] for k in batch.index))))
        return grouped

    def _part(self, example: int, end: int) -> TokenSequence:
        """An example from its prefix to a position."""
        sequence, n = self.sequences[example], self.n_prefix(example)
        return TokenSequence(sequence.tokens[n:end], max(1, min(sequence.loss_from, end) - n))


def dense_pass(
    pair: Pair, plan: ScanPlan, shard: Sequence[int], division: Division | None = None
) -> Generator[None, None, dict[str, list[Tensor]]]:
    """Run the dense model over a shard; returns by name a ``[row, part, width]`` tensor per layer; yields each batch.

    Names are the plan's sites, at the sampled positions; for contrastive pairs also the head outputs at the ends of the
    ``question`` and of the ``right`` and ``wrong`` answers. Heads stand in the pruned model's order.
    """
    counts = [len(plan.sampled(i)) for i in shard]
    rows = {site: Rows(counts) for site in plan.sites}
    ends = {name: Rows([1] * len(shard)) for name in (ENDS if plan.wrong is not None else ())}
    prefixes = [PrefixCache(pair.dense, tokens) for tokens in plan.prefixes]
    for number, batch in plan.dense_batches(shard):
        members = [shard[i] for i in batch.index]
        where = _sampled_places(plan, members)
        reader = DenseReader(pair, rows, ends, batch.index, len(where))
        places = dict.fromkeys(plan.sites, where)
        watched = nullcontext() if division is None else division.of_dense(batch, where)
        if plan.wrong is None:
            with watched:
                prefixes[number].visit(batch.tokens, places, reader.visit)
        else:
            places["z"] = _joined(where, _question_ends(plan, members), batch)
            right, wrong = ([sequences[i] for i in members] for sequences in (plan.sequences, plan.wrong))
            visit_pairs(
                prefixes[number], batch, right, wrong, places, reader.visit, reader.visit_wrong, plan.longest, watched
            )
        yield
    return {**{str(site): r.by_layer() for site, r in rows.items()}, **{name: r.by_layer() for name, r in ends.items()}}


def pruned_pass(
    pair: Pair,
    plan: ScanPlan,
    shard: Sequence[int],
    dense: Mapping[str, Sequence[Tensor]],
    sums: ScanSums,
    division: Division | None = None,
) -> Generator[None, None, list[Tensor] | None]:
    """Run the pruned model over a shard and add the differences to the sums; yields after every batch.

    Returns:
        Head outputs at the ends of the questions, ``[pair, head, d_head]`` per layer; None without wrong answers.
    """
    counts = [len(plan.sampled(i)) for i in shard]
    rows, question = {site: Rows(counts) for site in plan.sites}, Rows([1] * len(shard))
    example = torch.repeat_interleave(torch.tensor(counts))

    def compare(site: Site, layer: int) -> None:
        device = sums.sites[site].device  # with a model on several devices, that of its first layer
        values = rows[site].layers.pop(layer).to(device)
        sums.sites[site].update(layer, dense[site][layer].to(device), values, example.to(device))

    prefixes = [PrefixCache(pair.pruned, tokens) for tokens in plan.prefixes]
    for number, batch in plan.pruned_batches(shard):
        within = [shard[i] for i in batch.index]
        where = _sampled_places(plan, within)
        places = dict.fromkeys(plan.sites, where)
        if plan.wrong is not None:
            ends = _question_ends(plan, within)
            places["z"] = TokenPositions(
                torch.cat([where.sequence, torch.arange(len(ends))]), torch.cat([where.position, ends])
            )
        reader = PrunedReader(rows, question, batch.index, compare)
        watched: AbstractContextManager[None] = nullcontext()
        if division is not None and sums.causes is not None:
            watched = division.of_pruned(batch, where, torch.tensor(batch.index)[where.sequence], sums.causes)
        with watched:
            prefixes[number].visit(batch.tokens, places, reader.visit)
        yield
    sums.count(example)
    for site in sums.sites:
        for layer in sorted(rows[site].layers):
            compare(site, layer)
    return question.by_layer() if plan.wrong is not None else None


def _sampled_places(plan: ScanPlan, examples: Sequence[int]) -> TokenPositions:
    """The compared positions of one batch, example by example, counted from the prefix's end."""
    positions = [[p - plan.n_prefix(i) for p in plan.sampled(i)] for i in examples]
    sequence = torch.repeat_interleave(torch.tensor([len(p) for p in positions]))
    position = torch.tensor([p for example in positions for p in example], dtype=torch.long)
    return TokenPositions(sequence, position)


def _question_ends(plan: ScanPlan, examples: Sequence[int]) -> Int[Tensor, " example"]:
    """The last question token of each example in a batch, counted from the prefix's end."""
    return torch.tensor([plan.question_end(i) - plan.n_prefix(i) for i in examples])


def _joined(where: TokenPositions, question: Int[Tensor, " sequence"], batch: Batch) -> TokenPositions:
    """The sampled positions, then the questions' last tokens, then the sequences' last tokens."""
    rows = torch.arange(len(question))
    return TokenPositions(
        torch.cat([where.sequence, rows, rows]), torch.cat([where.position, question, batch.lengths - 1])
    )
