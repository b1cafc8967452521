"""Restoring interactively: choose heads, train a few steps, look, undo, go on, export."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.selectors.names import SelectorName
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.data.datasets import Data
from lcc_lens.exporters.huggingface import ExportReport, export
from lcc_lens.frontends.session.side_by_side import generate, next_tokens
from lcc_lens.frontends.session.state import SessionState, Timeline, keep_learned
from lcc_lens.frontends.session.workbench import open_workbench
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.checks import refuse_removed
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.methods import uses_components, uses_heads
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.loop import Step, TrainConfig
from lcc_lens.restoration.training.objectives import Objective

if TYPE_CHECKING:
    import pandas as pd

#: Steps between two looks at the held-out data: what stopping keeps is at most so old.
_VALIDATE_EVERY = 5
#: Questions whose answers by the dense and the pruned model are kept, since no step changes them.
_KEPT_ANSWERS = 8


class RestoreSession:
    """A restoration in the making; every action is noted as a line of code in :attr:`history`.

    Models run in :meth:`train`, :meth:`loss`, :meth:`next_tokens`, :meth:`generate`, :meth:`export` and :meth:`save`
    alone, and are as they were between all calls. What no step changes is computed once per example for the whole
    session (see :mod:`lcc_lens.restoration.training.reuse`). Properties and :meth:`stop` may be used from any thread
    at any time; everything else is refused while another call is at work.

    Args:
        pair: the hooked models.
        scan: their scan, for the heads and directions; None for methods that need none.
        data: training examples (role ``train``).
        validation: held-out examples of the same kind; a tenth of the training examples' groups if not given.
        method: of :data:`~lcc_lens.restoration.injections.METHODS`, or several joined by ``+``.
        objective: what training minimises; the response's loss if not given.
        batch_size: examples per optimiser step.
        max_length: tokens per example at most.
        low_rank: the rank of a masked low rank.
        seed: of the order of the examples and of random selectors.
        exportable: refuse a model whose checkpoint cannot hold the result.

    Raises:
        RequestError: an unknown method, no scan for one of heads, a scan of other weights, data that overlap, a pair
            with one model in memory, or a model that the export cannot serve.

    Example:
        >>> session = RestoreSession(pair, scan, load_data("alpaca", n=480, role="train"))  # doctest: +SKIP
        >>> session.choose("mse", share=0.25)  # doctest: +SKIP
        >>> session.train(20)  # doctest: +SKIP
        >>> session.next_tokens("The capital of France is")  # doctest: +SKIP
    """

    def __init__(
        self,
        pair: Pair,
        scan: Scan | None,
        data: Data,
        *,
        validation: Data | None = None,
        method: str = "lcc",
        objective: Objective | None = None,
        batch_size: int = 8,
        max_length: int = 256,
        low_rank: int = 8,
        seed: int = 0,
        exportable: bool = True,
    ) -> None:
        config = TrainConfig(
            batch_size=batch_size, validate_every=_VALIDATE_EVERY, seed=seed, objective=objective or Objective(),
            reuse=True,
        )  # fmt: skip
        self.pair, self.scan, self.method, self.seed = pair, scan, method, seed
        self._bench = open_workbench(
            pair, scan, data, validation, method=method, config=config, max_length=max_length, low_rank=low_rank,
            exportable=exportable,
        )  # fmt: skip
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._answers: dict[tuple[str | int, ...], dict[str, Any]] = {}
        injection = None if uses_heads(method) else self._bench.build((), None)
        self._timeline = Timeline(SessionState(injection=injection))

    @property
    def _state(self) -> SessionState:
        return self._timeline.state

    @property
    def heads(self) -> tuple[Head, ...]:
        """The chosen heads."""
        return self._state.heads

    @property
    def rank(self) -> int | None:
        """Directions per head; all if None."""
        return self._state.rank

    @property
    def scale(self) -> float:
        """What constants are multiplied by in all read-outs and in the export."""
        return self._state.scale

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every optimiser step that led here, numbered within its call of :meth:`train`."""
        return self._state.steps

    @property
    def magnitudes(self) -> Float[Tensor, "chosen component"]:
        """Scaled magnitudes of the chosen heads' directions, in units of activations; empty without constants."""
        return self._state.magnitudes()

    @property
    def constants(self) -> Float[Tensor, "chosen d_head"]:
        """What is added to the chosen heads' outputs; empty without constants."""
        return self._state.constants()

    @property
    def history(self) -> tuple[str, ...]:
        """The actions that led here, each as the line of code that repeats it on a new session of the same settings."""
        return self._timeline.actions

    @property
    def undone(self) -> tuple[str, ...]:
        """The actions that :meth:`redo` would do again, the next one first."""
        return self._timeline.undone

    @property
    def is_at_work(self) -> bool:
        """Whether a call is running."""
        return self._lock.locked()

    def choose(self, heads: Sequence[Head] | SelectorName, *, share: float = 0.25) -> tuple[Head, ...]:
        """Restore these heads, or the share with the highest scores; heads that stay keep what they have learned.

        Args:
            heads: the heads, or the name of a selector.
            share: of all heads, with a selector.

        Raises:
            RequestError: a method without heads, none, heads that are not there, or a selector that was not scanned.
        """
        with self._alone():
            if self.scan is None or not uses_heads(self.method):
                raise RequestError(f"expected a method of heads to choose them for, got {self.method}")
            if isinstance(heads, str):
                line = f"session.choose({heads!r}, share={float(share)!r})"
                heads = self.scan.select(heads, share=share, seed=self.seed)
            else:
                heads = sorted(set(heads))
                line = f"session.choose([{', '.join(f'lcc.Head({head.layer}, {head.head})' for head in heads)}])"
            if not heads:
                raise RequestError("expected heads to restore, got none; name some or a selector")
            check_heads(heads, int(self.pair.pruned.cfg.n_layers), int(self.pair.pruned.cfg.n_heads))
            refuse_removed(heads, self.pair)
            self._rebuild(tuple(heads), self.rank, line)
            return self.heads

    def set_rank(self, rank: int | None) -> None:
        """Use so many directions per head (all if None); the magnitudes of those that stay are kept.

        Raises:
            RequestError: a method without directions, no heads yet, or a rank out of range.
        """
        with self._alone():
            if not uses_components(self.method):
                raise RequestError(f"expected a method with directions to set a rank for, got {self.method}")
            self._state.chosen()
            self._rebuild(self.heads, rank, f"session.set_rank({rank!r})")

    def set_scale(self, scale: float) -> None:
        """Multiply constants by a number in all read-outs and in the export; 1 is what was trained.

        Raises:
            RequestError: a method without constants, or no finite number.
        """
        with self._alone():
            if not uses_components(self.method):
                raise RequestError(f"expected a method of constants to scale, got {self.method}")
            if not abs(scale) < float("inf"):
                raise RequestError(f"expected a finite number to scale by, got {scale}")
            self._timeline.note(replace(self._state, scale=float(scale)), f"session.set_scale({float(scale)!r})")

    def train(
        self,
        n_steps: int = 20,
        lr: float | None = None,
        *,
        stop_after: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> tuple[Step, ...]:
        """Train so many optimiser steps on from here, the learning rate falling to zero over them, and keep the best.

        The best is that of the held-out data, looked at every few steps, the start included. A call of :meth:`stop` or
        Ctrl-C ends it after the step under way. The scale stays out of training.

        Args:
            n_steps: how many.
            lr: learning rate of the method's first part; its own if not given.
            stop_after: end after so many of them, as if stopped there.
            on_step: called after every step.

        Raises:
            RequestError: no heads are chosen, a method that trains nothing, or no steps.
        """
        with self._alone():
            self._stop.clear()
            injection = copy.deepcopy(self._state.chosen())
            if not injection.n_trained:
                raise RequestError(f"expected a method that trains, got {self.method}, which is closed form")
            limit = n_steps if stop_after is None else min(n_steps, stop_after)
            if limit < 1:
                raise RequestError(f"expected at least 1 step, got {limit}")

            def is_over(step: Step) -> bool:
                if on_step is not None:
                    on_step(step)
                return self._stop.is_set() or step.step >= limit

            done = self._bench.train(injection, self._state, n_steps, lr, is_over)
            if done.steps:
                options = "" if lr is None else f", lr={float(lr)!r}"
                options += f", stop_after={len(done.steps)}" if done.is_cut else ""
                steps = (*self.steps, *done.steps)
                state = replace(self._state, injection=injection, steps=steps, held_out=done.held_out)
                self._timeline.note(state, f"session.train({n_steps}{options})")
            return done.steps

    def stop(self) -> None:
        """End a running :meth:`train` after the step under way, with the best so far; without one nothing happens."""
        self._stop.set()

    def undo(self) -> None:
        """Go back to before the last action, with the same bits.

        Raises:
            RequestError: there is none.
        """
        with self._alone():
            self._timeline.undo()

    def redo(self) -> None:
        """Do again what was undone last.

        Raises:
            RequestError: nothing was, or something else was done since.
        """
        with self._alone():
            self._timeline.redo()

    def loss(self) -> dict[str, float]:
        """The held-out responses' loss in nats per token: ``dense``, ``pruned`` and ``restored``."""
        with self._alone():
            return self._bench.losses(self._state.scaled())

    def next_tokens(self, prompt: str, k: int = 10) -> pd.DataFrame:
        """See :func:`lcc_lens.frontends.session.side_by_side.next_tokens`."""
        with self._alone():
            bare = self._kept("next_tokens", prompt)
            return next_tokens(self.pair, self._state.scaled(), prompt, k, bare=bare)

    def generate(self, prompt: str, max_new_tokens: int = 40) -> dict[str, str]:
        """See :func:`lcc_lens.frontends.session.side_by_side.generate`."""
        with self._alone():
            bare = self._kept("generate", prompt, max_new_tokens)
            return generate(self.pair, self._state.scaled(), prompt, max_new_tokens, bare=bare)

    @contextmanager
    def applied(self) -> Iterator[HookedModel]:
        """Let the hooked pruned model compute restored inside the block; it leaves the block unchanged."""
        with self._alone(), (self._state.scaled() or Injection()).applied_to(self.pair.pruned) as restored:
            yield restored

    def restoration(self) -> Restoration:
        """What was found so far, frozen, with its losses.

        Raises:
            RequestError: no heads are chosen.
        """
        with self._alone():
            injection = self._state.scaled() or self._state.chosen()
            return Restoration.of(injection, self._bench.record(self._state, self.history))

    def export(self, out: str | Path, *, overwrite: bool = False) -> ExportReport:
        """Write and verify the restored model (see :func:`~lcc_lens.exporters.huggingface.export`)."""
        return export(self.restoration(), self.pair.pruned_id.path, out, overwrite=overwrite)

    def save(self, run: str | Path) -> None:
        """Write the restoration into a run directory."""
        self.restoration().save(run)

    def _kept(self, *question: str | int) -> dict[str, Any]:
        """What the dense and the pruned model said to a question, to be filled if new; the last few are kept."""
        if question not in self._answers and len(self._answers) >= _KEPT_ANSWERS:
            del self._answers[next(iter(self._answers))]
        return self._answers.setdefault(question, {})

    def _rebuild(self, heads: tuple[Head, ...], rank: int | None, line: str) -> None:
        injection, state = self._bench.build(heads, rank), self._state
        if state.injection is not None:
            keep_learned(state.injection, injection)
        self._timeline.note(replace(state, heads=heads, rank=rank, injection=injection, held_out=None), line)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a call while another one runs: both would use the same models."""
        if not self._lock.acquire(blocking=False):
            raise RequestError("expected a session at rest, got one at work; wait until it is done, or stop it")
        try:
            yield
        finally:
            self._lock.release()
