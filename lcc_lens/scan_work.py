"""The passes of a scan in the order in which they are run: shard by shard, alone or divided among processes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lcc_lens.core.memory import trim_heap
from lcc_lens.core.processes import is_first_process, own_part
from lcc_lens.models.hooked.activations import Site
from lcc_lens.models.pair import Pair
from lcc_lens.passes import ScanPlan, dense_pass, pruned_pass, running_sums
from lcc_lens.scan_state import ScanState
from lcc_lens.selectors.linear_probe import LayerFeatures
from lcc_lens.statistics import RunningDifferences

Sums = dict[Site, RunningDifferences]


@dataclass
class ScanWork:
    """The passes still to come, batch by batch; everything finished lies in the state.

    Args:
        pair: the models.
        plan: what is read where.
        spectra: the sites whose singular values are wanted.
        state: what is finished.
        is_divided: whether processes that were launched together share the work. Each takes every n-th shard and keeps
            its sums on disk; the first process adds them in the order of the shards, as one process does.
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
        every = range(len(self.shards))
        own = own_part(every) if self.is_divided else every
        self.to_come = [i for i in own if i >= self.state.n_done and not (self.is_divided and self.state.has_part(i))]
        self.sums: Sums = {}

    def n_batches(self) -> int:
        """How many batches are to come in this process."""
        dense = sum(len(self.plan.dense_batches(self.shards[i])) for i in self._dense_to_come())
        return dense + sum(len(self.plan.pruned_batches(self.shards[i])) for i in self.to_come)

    def batches(self) -> Iterator[None]:
        """Do the work; yields after every batch. One model at a time runs over everything before the other."""
        if self.pair.one_at_a_time:
            for number in self._dense_to_come():
                self.state.keep_dense(number, (yield from dense_pass(self.pair, self.plan, self.shards[number])))
        if self.is_divided:
            yield from self._own_shards()
        else:
            yield from self._all_shards()

    def whole_sums(self) -> Sums:
        """The sums over all shards, once all are finished."""
        if self.is_divided:
            self.state.merge_parts()
            self.state.require_done(len(self.shards))
            self.sums = self._empty()
            self.state.restore(self.sums)
        return self.sums

    def layers(self) -> Iterator[LayerFeatures]:
        """The probes' features, in the order of the examples."""
        return self.state.layers([i for shard in self.shards for i in shard], self.pair.n_layers)

    def _all_shards(self) -> Generator[None, None, None]:
        """Add one shard after the other."""
        self.sums = self._empty()
        self.state.restore(self.sums)
        for number in self.to_come:
            self.state.finish(self.sums, (yield from self._shard(number, self.sums)))
            trim_heap()

    def _own_shards(self) -> Generator[None, None, None]:
        """Keep the sums of each of this process's shards by themselves."""
        for number in self.to_come:
            sums = self._empty()
            self.state.keep_part(number, sums, (yield from self._shard(number, sums)))
            del sums
            trim_heap()
            if is_first_process():
                self.state.merge_parts()

    def _shard(self, number: int, sums: Sums) -> Generator[None, None, Mapping[str, Sequence[Tensor]] | None]:
        """Both models over a shard; gives the probes' features where there are wrong answers."""
        shard = self.shards[number]
        dense: dict[str, list[Tensor]]
        if self.pair.one_at_a_time:
            dense = self.state.dense(number)
        else:
            dense = yield from dense_pass(self.pair, self.plan, shard)
        question = yield from pruned_pass(self.pair, self.plan, shard, dense, sums)
        if question is None:
            return None
        return {"pruned_question": question, **{name: dense[name] for name in ("question", "right", "wrong")}}

    def _empty(self) -> Sums:
        return running_sums(self.pair.pruned, self.plan.sites, self.spectra)

    def _dense_to_come(self) -> list[int]:
        return [i for i in self.to_come if not (self.pair.one_at_a_time and self.state.has_dense(i))]
