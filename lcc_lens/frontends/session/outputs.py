"""What a session's models say: losses, next tokens, generations, prompts, and files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.analysis.lens.prompt import Applicable, PromptComparison, compare_tokens, prompt_tokens
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.exporters.huggingface import ExportReport, export
from lcc_lens.frontends.session.refitting import is_refitted
from lcc_lens.frontends.session.saving import save_state
from lcc_lens.frontends.session.side_by_side import generate
from lcc_lens.frontends.session.state import SessionState, Timeline
from lcc_lens.frontends.session.view import SessionView
from lcc_lens.frontends.session.workbench import Workbench
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.rewriting.rewrites import DENSE, Rewrites, rewrite_prompt, written_by
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.result import Restoration

if TYPE_CHECKING:
    import pandas as pd

#: Prompts for which the outputs of the models that no step changes are cached.
_CACHED_PROMPTS = 8


class SessionOutputs(SessionView):
    """The calls of a session that run its models; all of them leave the models unchanged.

    Args:
        pair: the hooked models.
        bench: what builds and measures injections.
        state: the first state.
    """

    def __init__(self, pair: Pair, bench: Workbench, state: SessionState) -> None:
        super().__init__(Timeline(state))
        self.pair, self._bench = pair, bench
        self._pinned: Applicable | None = None
        self._pinned_loss: float | None = None
        self._forget_outputs()

    @property
    def n_trained(self) -> int | None:
        """Trained parameters of the current injection; None before heads are chosen."""
        return None if self._state.injection is None else self._state.injection.n_trained

    @property
    def seconds_per_step(self) -> float | None:
        """Measured seconds of an optimiser step with this method and number of heads; None before it was measured."""
        return self._bench.seconds_per_step.get((self.method, len(self.heads)))

    @property
    def seconds_to_refit(self) -> float | None:
        """Seconds until the refit that the method starts from is there; 0 if it needs none, None if not measured."""
        return self._bench.refit.seconds if self._needs_refit else 0.0

    def time_refit(self) -> float:
        """Estimate :attr:`seconds_to_refit` from a short measurement on random tokens, made once."""
        with self._alone():
            return self._bench.refit.measure() if self._needs_refit else 0.0

    @property
    def _needs_refit(self) -> bool:
        """Whether the method starts from a refit that the current injection does not have."""
        return MethodSpec.parse(self.method).preset.on_refit and not is_refitted(self._state.injection)

    def can_run(self, method: str) -> bool:
        """Whether :meth:`set_method` takes a method."""
        try:
            self._bench.spec(method)
        except RequestError:
            return False
        return True

    @ranged
    def pin(self, run: str | Path | None = None) -> None:
        """Keep a restoration beside the one at work: what is read then has a model ``pinned`` too.

        Args:
            run: a run folder with a restoration of this pruned model; the current state if not given.

        Raises:
            RequestError: no heads are chosen yet, no restoration in the folder, or one of other weights.
        """
        with self._alone():
            pinned: Applicable = (
                (self._state.scaled() or self._state.trained()) if run is None else Restoration.load(run)
            )
            with pinned.applied_to(self.pair.pruned):  # refuses another model's
                pass
            self._pinned, self._pinned_loss = pinned, None
            self._forget_outputs()

    def unpin(self) -> None:
        """Read the models without the pinned restoration again."""
        with self._alone():
            self._pinned = None
            self._forget_outputs()

    def loss(self) -> dict[str, float]:
        """Held-out loss of ``dense``, ``pruned``, ``restored`` and what is pinned, in nats per response token."""
        with self._alone():
            losses = self._bench.losses(self._state.acting())
            if self._pinned is None:
                return losses
            if self._pinned_loss is None:
                with self._pinned.applied_to(self.pair.pruned) as pinned:
                    self._pinned_loss = self._bench.loss_of(pinned)
            return {**losses, "pinned": self._pinned_loss}

    def levels(self) -> dict[str, float]:
        """What training minimises, of ``dense`` and ``pruned`` on the held-out data: reference lines of its curve."""
        with self._alone():
            return self._bench.levels(self.method)

    @ranged
    def compare_prompt(self, prompt: str) -> PromptComparison:
        """A prompt in all models, head by head (see :func:`~lcc_lens.analysis.lens.prompt.compare_prompt`)."""
        with self._alone():
            return self._compared(prompt)

    def next_tokens(self, prompt: str, k: int = 10) -> pd.DataFrame:
        """The likeliest next tokens, sorted by the dense model; see :meth:`PromptComparison.next_tokens`."""
        return self.compare_prompt(prompt).next_tokens(k)

    def generate(self, prompt: str, max_new_tokens: int = 40) -> dict[str, str]:
        """See :func:`lcc_lens.frontends.session.side_by_side.generate`."""
        with self._alone():
            cache = self._cache_of("generate", prompt, max_new_tokens)
            return generate(self.pair, self._restorations(), prompt, max_new_tokens, cache=cache)

    def rewrites(self, prompt: str, n: int = 3) -> Rewrites:
        """Versions of a prompt, by rule and by the dense model, ranked by the dense model's answer in the pruned one.

        See :func:`~lcc_lens.prompting.rewriting.rewrites.rewrite_prompt`; ``n`` are the dense model's.
        """
        with self._alone():
            written = written_by(self.pair, prompt, n)
            return rewrite_prompt(self.pair, prompt, written, by=DENSE)

    @contextmanager
    def applied(self) -> Iterator[HookedModel]:
        """The pruned model with the restoration applied inside the block; unchanged after it."""
        with self._alone(), (self._state.scaled() or Injection()).applied_to(self.pair.pruned) as restored:
            yield restored

    def restoration(self) -> Restoration:
        """The restoration so far, frozen, with its losses.

        Raises:
            RequestError: no heads are chosen.
        """
        with self._alone():
            injection = self._state.scaled() or self._state.trained()
            return Restoration.of(injection, self._bench.record(self._state, self.history))

    @ranged
    def export(self, out: str | Path, *, overwrite: bool = False) -> ExportReport:
        """Write and verify the restored model (see :func:`~lcc_lens.exporters.huggingface.export`)."""
        return export(self.restoration(), self.pair.pruned_id.path, out, overwrite=overwrite)

    @ranged
    def save(self, run: str | Path) -> None:
        """Write the restoration into a run folder, and the state that :meth:`RestoreSession.load` goes on from."""
        self.restoration().save(run)
        save_state(self._state, self.pair, Path(run))

    def _compared(self, prompt: str) -> PromptComparison:
        cache = self._cache_of("compare_prompt", prompt)
        return compare_tokens(self.pair, prompt_tokens(self.pair, prompt), prompt, self._restorations(), cache=cache)

    def _restorations(self) -> dict[str, Applicable | None]:
        found: dict[str, Applicable | None] = {"restored": self._state.acting()}
        return found if self._pinned is None else {**found, "pinned": self._pinned}

    def _forget_outputs(self) -> None:
        self._cache_of = lru_cache(_CACHED_PROMPTS)(_empty_cache)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a call while another one runs: both would use the same models."""
        if not self._lock.acquire(blocking=False):
            raise RequestError(
                "expected an idle session, got one that is running a call; wait until it ends, or stop it"
            )
        try:
            yield
        finally:
            self._lock.release()


def _empty_cache(*call: str | int) -> dict[str, Any]:
    """Outputs of the dense and the pruned model in one call of the session, filled when it runs."""
    return {}
