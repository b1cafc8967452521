"""Interactive restoration: choose heads, train a few steps, inspect, undo, continue, export."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.selectors.names import DEFAULT_SELECTOR
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, HeadLike, HeadTuple, check_heads
from lcc_lens.core.ranges import Count, Finite, Natural, Rate, Seed, Share, ranged
from lcc_lens.data.datasets import Data
from lcc_lens.frontends.session.outputs import SessionOutputs
from lcc_lens.frontends.session.saving import load_state
from lcc_lens.frontends.session.state import SessionState, copy_parameters
from lcc_lens.frontends.session.workbench import Workbench
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.checks import refuse_removed
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.settings import RefitRequest
from lcc_lens.restoration.training.config import Step, Steps, TrainConfig
from lcc_lens.restoration.training.objectives import Objective

#: Steps between two measurements on the held-out data: the parameters that stopping keeps are at most this old.
_VALIDATE_EVERY = 5


class RestoreSession(SessionOutputs):
    """Restore a pair step by step; :attr:`history` records every action as a line of code.

    Choosing and undoing run no model; what runs one leaves both models unchanged. Activations
    below the lowest restored layer are cached per example for the whole session (see
    :mod:`lcc_lens.restoration.training.reuse`). Properties and :meth:`stop` may be used from any thread at any time;
    every other call is refused while one is running.

    Args:
        pair: the hooked models.
        scan: their scan, for the heads and directions; None for methods that need no scan.
        data: training examples (role ``train``).
        validation: held-out examples of the same kind; if not given, a tenth of the training examples' groups.
        method: one of :data:`~lcc_lens.restoration.injections.METHODS`, or several joined by ``+``.
        objective: what training minimises; if not given, the method's own: the loss of the response, of ``best`` the KL
            divergence from the dense model plus a third of the language-model loss.
        batch_size: examples per optimiser step.
        max_length: most tokens per example; 256, or the models' context if shorter.
        low_rank: rank of a masked low-rank update; 8 if not given, 16 for ``best``.
        seed: for the order of the examples and for random selectors.
        exportable: refuse a model whose checkpoint cannot hold the result.
        refitting: what ``best`` refits on; see :class:`~lcc_lens.restoration.settings.RefitRequest`.

    Raises:
        RequestError: an unknown method, no scan for a method that restores heads, a scan of other weights, overlapping
            data, a pair that loads one model at a time, or a model that cannot be exported.

    Example:
        >>> session = RestoreSession(pair, scan, load_data("alpaca", n=480, role="train"))  # doctest: +SKIP
        >>> session.choose("mse", share=0.25)  # doctest: +SKIP
        >>> session.train(20)  # doctest: +SKIP
        >>> session.next_tokens("The capital of France is")  # doctest: +SKIP
    """

    made_by: ClassVar[str] = "RestoreSession(pair, scan, data)"

    @ranged
    def __init__(
        self,
        pair: Pair,
        scan: Scan | None,
        data: Data,
        *,
        validation: Data | None = None,
        method: str = "lcc",
        objective: Objective | None = None,
        batch_size: Count = 8,
        max_length: int | None = None,
        low_rank: Count | None = None,
        seed: Seed = 0,
        exportable: bool = True,
        refitting: RefitRequest | None = None,
    ) -> None:
        config = TrainConfig(batch_size=batch_size, validate_every=_VALIDATE_EVERY, seed=seed, reuse=True)
        MethodSpec.parse(method)  # before data are encoded
        length = fitting_length(max_length, pair.context, default=256)
        bench = Workbench.open(
            pair, scan, data, validation, config=config, objective=objective, max_length=length, low_rank=low_rank,
            exportable=exportable, refitting=refitting,
        )  # fmt: skip
        self.scan, self.seed, self._stop = scan, seed, threading.Event()
        super().__init__(pair, bench, _first_state(bench, method, ()))

    @property
    def _spec(self) -> MethodSpec:
        return MethodSpec.parse(self.method)

    @ranged
    def set_method(self, method: str) -> None:
        """Restore by another method, untrained; chosen heads stay where it acts on heads.

        Raises:
            RequestError: see :class:`RestoreSession`.
        """
        with self._alone():
            state = _first_state(self._bench, method, self.heads)
            self._timeline.record(state, f"session.set_method({method!r})")

    @ranged
    def load(self, run: str | Path) -> None:
        """Go on from a state that :meth:`save` wrote, bit for bit; its history is not repeated.

        Raises:
            RequestError: no saved session, or one of other weights or settings.
        """
        with self._alone():
            state = load_state(Path(run), self.pair, self._bench.build)
            self._timeline.record(state, f"session.load({str(run)!r})")

    @ranged
    def choose(self, heads: Sequence[HeadLike] | str = DEFAULT_SELECTOR, *, share: Share = 0.25) -> HeadTuple:
        """Restore these heads, or the share with the highest scores; heads that stay keep their trained parameters.

        Args:
            heads: the heads, or the name of a selector.
            share: fraction of all heads to take, with a selector.

        Raises:
            RequestError: a method that restores no heads, no heads, heads that the model does not have, or a selector
                that the scan has no scores for.
        """
        with self._alone():
            if self.scan is None or not self._spec.on_heads:
                raise RequestError(f"expected a method that restores heads, got {self.method}")
            if isinstance(heads, str):
                line = f"session.choose({heads!r}, share={float(share)!r})"
                chosen = list(self.scan.select(heads, share=share, seed=self.seed))
            else:
                chosen = sorted({Head.of(head) for head in heads})
                line = f"session.choose([{', '.join(f'lcc.Head({head.layer}, {head.head})' for head in chosen)}])"
            if not chosen:
                raise RequestError("expected heads to restore, got none; name heads or a selector")
            check_heads(chosen, self.pair.n_layers, self.pair.n_heads)
            refuse_removed(chosen, self.pair)
            self._rebuild(tuple(chosen), self.rank, line)
            return self.heads

    @ranged
    def set_rank(self, rank: Natural | None) -> None:
        """Set the number of directions per head (all if None); directions that stay keep their magnitudes.

        Raises:
            RequestError: a method without directions, no heads chosen yet, or a rank out of range.
        """
        with self._alone():
            if not self._spec.needs_components:
                raise RequestError(f"expected a method with directions, which a rank limits, got {self.method}")
            self._state.trained()  # refuses a session without heads
            self._rebuild(self.heads, rank, f"session.set_rank({rank!r})")

    @ranged
    def set_scale(self, scale: Finite) -> None:
        """Multiply the constants by a factor, in everything that is read and in the export; 1 is as trained.

        Raises:
            RequestError: a method without constants, or a factor that is not finite.
        """
        with self._alone():
            if not self._spec.needs_components:
                raise RequestError(f"expected a method with constants to scale, got {self.method}")
            self._timeline.record(replace(self._state, scale=float(scale)), f"session.set_scale({float(scale)!r})")

    def refit(self) -> None:
        """Refit the pruned model's remaining weights, as ``best`` starts; :meth:`train` does it where it was not done.

        :meth:`stop` ends it; the next call goes on after the layers that were finished.

        Raises:
            RequestError: a method that starts from no refit, one that has it already, or a model that cannot be
                refitted.
            Stopped: it was stopped.
        """
        with self._alone():
            if not self._needs_refit:
                raise RequestError(f"expected a method that has yet to refit, got {self.method}; go on with train")
            self._stop.clear()
            self._refit()

    @ranged
    def train(
        self,
        n_steps: Count = 20,
        lr: Rate | None = None,
        *,
        stop_after: Count | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Steps:
        """Train further and keep the parameters with the lowest held-out loss, the starting ones included.

        The learning rate falls to zero over the steps; the held-out loss is measured every few steps. :meth:`stop` or
        Ctrl-C ends training after the current step. Training ignores the scale.

        Args:
            n_steps: number of optimiser steps.
            lr: learning rate of the method's first part; if not given, the method's default.
            stop_after: end after this many steps, as if stopped there.
            on_step: called after every step.

        Raises:
            RequestError: no heads are chosen, the method trains nothing, or there are no steps.
        """
        with self._alone():
            self._stop.clear()
            limit = n_steps if stop_after is None else min(n_steps, stop_after)
            injection = self._to_train()
            if self._needs_refit:
                self._refit()
                injection = self._to_train()

            def is_over(step: Step) -> bool:
                if on_step is not None:
                    on_step(step)
                return self._stop.is_set() or step.step >= limit

            result = self._bench.train(injection, self._state, n_steps, lr, is_over)
            if result.steps:
                options = "" if lr is None else f", lr={float(lr)!r}"
                options += f", stop_after={len(result.steps)}" if result.is_cut else ""
                steps = (*self.steps, *result.steps)
                state = replace(self._state, injection=injection, steps=steps, held_out=result.held_out)
                self._timeline.record(state, f"session.train({n_steps}{options})")
            return Steps(result.steps)

    def time_step(self) -> float:
        """Seconds of one optimiser step from here; measured on a copy, once per method and number of heads.

        Raises:
            RequestError: no heads are chosen, or the method trains nothing.
        """
        with self._alone():
            return self._bench.time_step(self._to_train(), self._state)

    def stop(self) -> None:
        """End a running :meth:`train` after its current step, keeping the best so far, or a refit; else do nothing."""
        self._stop.set()

    def undo(self) -> None:
        """Return to the state before the last action, bit for bit.

        Raises:
            RequestError: there is no action.
        """
        with self._alone():
            self._timeline.undo()

    def redo(self) -> None:
        """Repeat the last undone action.

        Raises:
            RequestError: no action was undone since the last new one.
        """
        with self._alone():
            self._timeline.redo()

    def _to_train(self) -> Injection:
        """A copy of the current injection."""
        injection = copy.deepcopy(self._state.trained())
        if not injection.n_trained:
            raise RequestError(f"expected a method that trains, got {self.method}, which has a closed form")
        return injection

    def _refit(self) -> None:
        injection = self._bench.refit.before(self._state.trained(), self._stop)
        self._timeline.record(replace(self._state, injection=injection, held_out=None), "session.refit()")

    def _rebuild(self, heads: tuple[Head, ...], rank: int | None, line: str) -> None:
        injection, state = self._bench.build(self.method, heads, rank), self._state
        if state.injection is not None:
            copy_parameters(state.injection, injection)
        self._timeline.record(replace(state, heads=heads, rank=rank, injection=injection, held_out=None), line)


def _first_state(bench: Workbench, method: str, heads: tuple[Head, ...]) -> SessionState:
    """A method's state before any training; heads are kept where it acts on heads."""
    is_on_heads = bench.spec(method).on_heads
    heads = heads if is_on_heads else ()
    injection = bench.build(method, heads, None) if heads or not is_on_heads else None
    return SessionState(method, heads, injection=injection)
