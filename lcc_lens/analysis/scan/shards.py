"""Run the forward passes of a scan shard by shard, in one process or several."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lcc_lens.analysis.causes.division import Division
from lcc_lens.analysis.scan.passes import ScanPlan, dense_pass, pruned_pass
from lcc_lens.analysis.scan.state import ScanState
from lcc_lens.analysis.scan.sums import ScanSums, running_sums
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures
from lcc_lens.core.machine.memory import trim_heap
from lcc_lens.core.machine.processes import is_first_process, own_part
from lcc_lens.models.hooked.activations import Site
from lcc_lens.models.pair import Pair


@dataclass
class ScanWork:
    """The forward passes that a scan still has to run; finished shards are kept in the state.

    Args:
        pair: the models.
        plan: the sequences, and the token positions and sites at which activations are read.
        spectra: the sites whose singular values are computed.
        state: the finished shards.
        is_divided: whether several processes share the work. Each runs every n-th shard and keeps its sums on disk;
            the first process adds them in the order of the shards, so the result equals that of one process.
    """

    pair: Pair
    plan: ScanPlan
    spectra: Sequence[Site]
    state: ScanState
    is_divided: bool = False

    def __post_init__(self) -> None:
        if not self.is_divided or is_first_process():
            self.state.merge_parts()
        self.shards = self.plan.shards()
        numbers = range(len(self.shards))
        assigned = own_part(numbers) if self.is_divided else numbers
        self.remaining = [
            i for i in assigned if i >= self.state.n_done and not (self.is_divided and self.state.has_part(i))
        ]
        self.division = Division(self.pair) if self.plan.causes else None
        self.sums = ScanSums({})

    def n_batches(self) -> int:
        """The number of batches left in this process."""
        dense = sum(len(self.plan.dense_batches(self.shards[i])) for i in self._dense_remaining())
        return dense + sum(len(self.plan.pruned_batches(self.shards[i])) for i in self.remaining)

    def batches(self) -> Iterator[None]:
        """Run the passes; yields after every batch. With one model in memory, the dense model runs first."""
        if self.pair.one_at_a_time:
            for number in self._dense_remaining():
                self.state.keep_dense(number, (yield from dense_pass(self.pair, self.plan, self.shards[number])))
        if self.is_divided:
            yield from self._own_shards()
        else:
            yield from self._all_shards()

    def whole_sums(self) -> ScanSums:
        """The sums over all shards.

        Raises:
            LensError: shards of other processes are missing.
        """
        if self.is_divided:
            self.state.merge_parts()
            self.state.require_done(len(self.shards))
            self.sums = self._empty()
            self.state.restore(self.sums)
        return self.sums

    def layers(self) -> Iterator[LayerFeatures]:
        """The probes' activations layer by layer, in the order of the examples."""
        return self.state.layers([i for shard in self.shards for i in shard], self.pair.n_layers)

    def _all_shards(self) -> Generator[None, None, None]:
        """Run the remaining shards and save the sums after each."""
        self.sums = self._empty()
        self.state.restore(self.sums)
        for number in self.remaining:
            self.state.finish(self.sums, (yield from self._shard(number, self.sums)))
            trim_heap()

    def _own_shards(self) -> Generator[None, None, None]:
        """Run this process's shards and save the sums of each shard separately."""
        for number in self.remaining:
            sums = self._empty()
            self.state.keep_part(number, sums, (yield from self._shard(number, sums)))
            del sums
            trim_heap()
            if is_first_process():
                self.state.merge_parts()

    def _shard(self, number: int, sums: ScanSums) -> Generator[None, None, Mapping[str, Sequence[Tensor]] | None]:
        """Run both models over a shard; returns the probes' activations if there are wrong answers, else None."""
        shard = self.shards[number]
        dense: dict[str, list[Tensor]]
        if self.pair.one_at_a_time:
            dense = self.state.dense(number)
        else:
            dense = yield from dense_pass(self.pair, self.plan, shard, self.division)
        question = yield from pruned_pass(self.pair, self.plan, shard, dense, sums, self.division)
        if question is None:
            return None
        return {"pruned_question": question, **{name: dense[name] for name in ("question", "right", "wrong")}}

    def _empty(self) -> ScanSums:
        causes = None if self.division is None else self.division.sums()
        return ScanSums(running_sums(self.pair.pruned, self.plan.sites, self.spectra), causes)

    def _dense_remaining(self) -> list[int]:
        return [i for i in self.remaining if not (self.pair.one_at_a_time and self.state.has_dense(i))]
