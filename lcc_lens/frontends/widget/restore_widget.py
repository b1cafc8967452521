"""The widget: traits that the browser shows, and the handling of its messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import anywidget
import traitlets

from lcc_lens.core.errors import RequestError
from lcc_lens.core.metrics import learned_warning
from lcc_lens.core.progress import tracked_by
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.session.session import RestoreSession
from lcc_lens.frontends.session.stopping import stoppable
from lcc_lens.frontends.widget.actions import ACTIONS, Message
from lcc_lens.frontends.widget.contents import (
    Point,
    curve_contents,
    fixed_contents,
    prompt_contents,
    rewrite_contents,
    script,
    state_contents,
    state_key,
    step_contents,
    style,
)
from lcc_lens.frontends.widget.worker import Job, Worker, error_line
from lcc_lens.restoration.training.config import Step

#: Likeliest next tokens shown per model, and number of tokens that each model generates.
_NEXT_TOKENS, _GENERATED = 4, 32


class RestoreWidget(anywidget.AnyWidget):
    """Restore by clicks: a view of a session in JupyterLab, VS Code or Colab that fetches nothing.

    Every click is a call of the session and adds its line of code to the history at the bottom. Choosing heads runs no
    model. Models run in a thread of their own, so other cells can run meanwhile; the session refuses them until it is
    idle. After calling the session from a cell, call :meth:`refresh`.

    Args:
        session: the session that the clicks act on.
        prompt: the prompt for the three models.
        reads_at_once: measure losses and run the prompt after every action; if False, after training and on request.

    Attributes:
        busy: the running job; empty when idle. ``progress``: how far a long one is.
        error: the last error, as one line.
        readout: the last losses, next tokens, changed heads and generations, with the ``key`` of their state. They are
            kept per state, so undo and redo show theirs at once.
        rewrites: the last versions of the prompt, with merits and likelihoods.
        exported: the last verified export.

    Example:
        >>> lcc.RestoreWidget(lcc.RestoreSession(pair, scan, data))  # doctest: +SKIP
    """

    _esm = script()
    _css = style()
    fixed = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    curve: traitlets.List[Point] = traitlets.List().tag(sync=True)
    live: traitlets.List[Point] = traitlets.List().tag(sync=True)
    readout = traitlets.Dict().tag(sync=True)
    rewrites = traitlets.Dict().tag(sync=True)
    exported = traitlets.Dict().tag(sync=True)
    busy = traitlets.Unicode().tag(sync=True)
    progress = traitlets.Unicode().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    prompt = traitlets.Unicode().tag(sync=True)
    reads_at_once = traitlets.Bool(True).tag(sync=True)

    @ranged
    def __init__(
        self, session: RestoreSession, *, prompt: str = "The capital of France is", reads_at_once: bool = True
    ) -> None:
        self.session, self._stopped, self._skipped = session, threading.Event(), threading.Event()
        self._readouts: dict[tuple[str, str], dict[str, Any]] = {}
        super().__init__(fixed=fixed_contents(session), prompt=prompt, reads_at_once=reads_at_once)
        self._worker = Worker(self._show_job, self._fail)
        self.on_msg(self._receive)
        self.refresh()

    def refresh(self) -> None:
        """Show the current state of the session."""
        self.curve = curve_contents(self.session.steps)
        self.state = state_contents(self.session)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all jobs have ended, at most so many seconds; returns whether they have."""
        return self._worker.wait(timeout)

    def close(self) -> None:
        """End a running training with its best so far, and remove the widget."""
        if hasattr(self, "session"):  # else it was refused before it began
            self._stop()
        super().close()

    def _receive(self, widget: object, message: Message, buffers: object) -> None:
        """Handle a message; the browser is always told that it was handled."""
        self.error = ""
        try:
            self._do(message)
        except Exception as error:
            self._fail(error_line(error))
        self.refresh()
        self.send({"done": message.get("do")})

    def _do(self, message: Message) -> None:
        action = message.get("do")
        jobs = {
            "train": self._train, "read": self._read, "export": self._export, "save": self._save, "pin": self._pin,
            "unpin": self._unpin, "rewrite": self._rewrite,
        }  # fmt: skip
        if self.busy == "reading" and action in {*ACTIONS, *jobs}:
            # The browser did not know of this reading yet; the action makes it outdated, so it gives way.
            self._skipped.set()
            self._worker.wait()
        if action == "stop":
            self._stop()
        elif action == "skip":  # an action is waiting for an outdated reading to end
            self._skipped.set()
        elif action in ACTIONS:
            ACTIONS[action](self.session, message)
            self.refresh()
            kept = self._readouts.get(self._readout_key())
            if kept is not None:  # as it was read in this state: undo and redo wait for nothing
                self.readout = kept
            elif self.reads_at_once:
                self._begin(self._reading)
        elif action in jobs:
            jobs[action](message)
        else:
            raise RequestError(
                f"expected an action of the widget ({', '.join([*ACTIONS, *jobs])}, stop, skip), got {action!r}"
            )

    def _train(self, message: Message) -> None:
        n_steps, lr = int(message["steps"]), None if message.get("lr") is None else float(message["lr"])
        n_before = len(self.session.steps)

        def show(step: Step) -> None:
            self.live = [*self.live, step_contents(n_before + step.step, step)]
            if self._stopped.is_set():
                self.session.stop()

        def train() -> None:
            self.session.train(n_steps, lr, on_step=show)
            self.live = []
            self.refresh()

        def refit() -> None:
            with tracked_by(self._track):
                self.session.refit()
            self.refresh()

        self._stopped.clear()
        first = [("refitting", refit)] if self.session.seconds_to_refit != 0.0 else []
        self._begin(*first, ("training", train), self._reading)

    def _track(self, items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        for n, item in enumerate(items, start=1):
            self.progress = f"{description} {n}/{total}"
            yield item
        self.progress = ""

    def _read(self, message: Message) -> None:
        self.prompt = str(message.get("prompt", self.prompt))
        self._begin(self._reading)

    def _export(self, message: Message) -> None:
        out, overwrite = str(message["out"]), bool(message.get("overwrite", False))
        if not out.strip():
            raise RequestError("expected the name of a folder to export to, got none; enter one")

        def export() -> None:
            report = self.session.export(out, overwrite=overwrite)
            self.exported = {
                "path": str(report.path), "difference": report.logit_difference, "effect": report.logit_effect,
                "line": f"session.export({out!r}{', overwrite=True' if overwrite else ''})",
            }  # fmt: skip

        self._begin(("exporting", export))

    def _save(self, message: Message) -> None:
        run = str(message["run"])
        self._begin(("saving", lambda: self.session.save(run)))

    def _pin(self, message: Message) -> None:
        """Keep the current restoration, or a run's, beside the one at work."""
        run = str(message["run"]) if message.get("run") else None

        def pin() -> None:
            self.session.pin(run)
            self._readouts.clear()

        self._begin(("pinning", pin), self._reading)

    def _unpin(self, message: Message) -> None:
        self.session.unpin()
        self._readouts.clear()
        self._begin(self._reading)

    def _rewrite(self, message: Message) -> None:
        self.prompt = prompt = str(message.get("prompt", self.prompt))

        def rewrite() -> None:
            self.rewrites = rewrite_contents(prompt, self.session.rewrites(prompt))

        self._begin(("rewriting", rewrite))

    def _readout_key(self) -> tuple[str, str]:
        return state_key(self.session), self.prompt

    def _begin(self, *jobs: Job) -> None:
        """Start jobs; all but a training, which ends after a step, can be stopped at any module of a model."""

        def until_stopped(run: Callable[[], None]) -> Callable[[], None]:
            def stopped_early() -> None:
                with stoppable(self._skipped):
                    run()

            return stopped_early

        self._skipped.clear()
        self._worker.begin([(name, run if name == "training" else until_stopped(run)) for name, run in jobs])

    @property
    def _reading(self) -> Job:
        return "reading", self._read_now

    def _read_now(self) -> None:
        """Show each part once it is computed, the slowest last, until the rest is skipped."""
        session, prompt = self.session, self.prompt
        parts: dict[str, Callable[[], Any]] = {"losses": session.loss, "levels": session.levels}
        if session.steps:
            parts["warning"] = lambda: learned_warning(readout["losses"]) or ""
        if prompt:
            parts["seen"] = lambda: prompt_contents(session.compare_prompt(prompt), _NEXT_TOKENS)
            parts["texts"] = lambda: session.generate(prompt, _GENERATED)
        if session.n_trained:
            parts |= {"seconds": session.time_step, "to_refit": session.time_refit}
        readout: dict[str, Any] = {"key": state_key(session), "method": session.method, "prompt": prompt}
        for name, read in parts.items():
            if self._skipped.is_set():
                return
            readout = {**readout, name: read()}
            self.readout = readout
        self._readouts[self._readout_key()] = readout

    def _stop(self) -> None:
        self._stopped.set()
        if self.busy != "training":  # what follows a training is read all the same
            self._skipped.set()
        self.session.stop()

    def _show_job(self, name: str) -> None:
        try:
            if not name:
                self.live, self.progress = [], ""
                self.refresh()
        finally:
            self.busy = name

    def _fail(self, line: str) -> None:
        self.error = line
