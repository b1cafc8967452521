"""The state of a session as JSON for the browser."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from lcc_lens.analysis.lens.prompt import PromptComparison
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.selectors.names import ALWAYS_SCORED, DEFAULT_SELECTOR, SELECTORS
from lcc_lens.frontends.explorer.views import View, removed_heads, views_of_scan
from lcc_lens.frontends.session.session import RestoreSession
from lcc_lens.frontends.session.workbench import session_method
from lcc_lens.prompting.merits import MERITS
from lcc_lens.prompting.rewriting.rewrites import Rewrites
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.training.config import Step

#: Number of the step, training loss, held-out loss or None.
Point = list[int | float | None]
#: Methods to choose from, where the model takes them.
METHODS_OFFERED = ("lcc", "best", "gain", "norms", "low-rank", "lcc+gain", "mean-shift")
#: Most points of a loss curve; longer curves are thinned.
_MOST_POINTS = 400
#: Words that fit above a narrow column.
_MERITS = {"concise_cot": "steps", "preservation": "kept"}
_STYLES = ("base.css", "map.css", "parts.css")
#: Joined into one module; only the last one exports.
_SCRIPTS = (
    "dom.js", "theme.js", "map.js", "picking.js", "method.js", "training.js", "curve.js", "readout.js", "prompt.js",
    "rewrites.js", "ending.js", "main.js",
)  # fmt: skip


def script() -> str:
    """The browser's script, one module that imports nothing."""
    return "".join(_read(name) for name in _SCRIPTS)


def style() -> str:
    """The widget's style, which applies to nothing outside it."""
    return "".join(_read(name) for name in _STYLES)


def fixed_contents(session: RestoreSession) -> dict[str, Any]:
    """What no action changes: the grid of heads and its views, the selectors' rankings, the methods."""
    cfg, scan = session.pair.pruned.cfg, session.scan
    n_layers, n_heads = (0, 0) if scan is None else (int(cfg.n_layers), int(cfg.n_heads))
    return {
        "dense": session.pair.dense_id.reference, "pruned": session.pair.pruned_id.reference,
        "layers": n_layers, "heads": n_heads, "most_rank": int(cfg.d_head),
        "views": [] if scan is None else [_view(view) for view in views_of_scan(scan)],
        "removed": [] if scan is None else removed_heads(scan),
        "rankings": {} if scan is None else _rankings(scan, session.seed),
        "methods": _methods(session),
    }  # fmt: skip


def state_contents(session: RestoreSession) -> dict[str, Any]:
    """The current state; ``key`` changes with every action and returns to its old value after undo."""
    spec = MethodSpec.parse(session.method)
    return {
        "method": session.method, "on_heads": spec.on_heads, "has_scale": spec.needs_components,
        "heads": [str(head) for head in session.heads], "rank": session.rank, "scale": session.scale,
        "n_steps": len(session.steps), "n_trained": session.n_trained, "seconds_per_step": session.seconds_per_step,
        "seconds_to_refit": session.seconds_to_refit,
        "history": list(session.history), "key": state_key(session),
        "can_undo": bool(session.history), "can_redo": bool(session.undone),
    }  # fmt: skip


def prompt_contents(seen: PromptComparison, k: int) -> dict[str, Any]:
    """A prompt in all models: next tokens, and every head's relative change in percent."""
    changes = {
        name: [_short(100 * value) for value in seen.change(name).flatten().tolist()] for name in seen.models[1:]
    }
    return {"models": list(seen.models), "tokens": seen.next_tokens(k).to_dict("records"), "changes": changes}


def rewrite_contents(prompt: str, rewrites: Rewrites) -> dict[str, Any]:
    """Versions of a prompt: source, text, merits with what lowers them, and the margin over the raw prompt."""
    rows = [
        {
            "source": c.source, "text": c.text, "merits": [_short(score) for score in c.merits.scores.values()],
            "lowered": c.merits.reasons, "margin": _short(c.ranked.margin), "chosen": c is rewrites.chosen,
        }
        for c in rewrites.candidates
    ]  # fmt: skip
    names = [_MERITS.get(name, name) for name in MERITS]
    return {"prompt": prompt, "names": names, "rows": rows, "verdict": rewrites.verdict}


def state_key(session: RestoreSession) -> str:
    """Name of the state, from its history alone: the same history gives the same parameters."""
    return hashlib.sha256("\n".join(session.history).encode()).hexdigest()[:12]


def curve_contents(steps: Sequence[Step]) -> list[Point]:
    """The loss curve, thinned to what a screen can show; every held-out loss is kept."""
    every = max(1, math.ceil(len(steps) / _MOST_POINTS))
    numbered = enumerate(steps, start=1)
    return [step_contents(n, step) for n, step in numbered if n % every == 0 or step.validation_loss is not None]


def step_contents(number: int, step: Step) -> Point:
    """One point of the loss curve."""
    return [number, _short(step.loss), None if step.validation_loss is None else _short(step.validation_loss)]


def _methods(session: RestoreSession) -> list[dict[str, Any]]:
    """The methods to choose from, each with what it does and costs."""
    names = dict.fromkeys((session.method, *METHODS_OFFERED))
    return [{"name": name, "does": _described(name)} for name in names if session.can_run(name)]


def _described(method: str) -> str:
    spec = session_method(method)
    place = "biases" if spec.bias_sites else "existing weights"
    does = spec.preset.does or "; ".join(part.does for part in spec.parts)
    return f"{does}. Trains {spec.n_trained or 'nothing'}, folds into {place}"


def _view(view: View) -> dict[str, Any]:
    values = [_short(value) for value in view.value.flatten().tolist()]
    return {"key": view.key, "title": view.title, "unit": view.unit, "meaning": view.meaning, "values": values}


def _rankings(scan: Scan, seed: int) -> dict[str, list[str]]:
    """All heads in the order of every selector that the scan has scores for; the default one comes first."""
    scored = (*scan.selected_by, *ALWAYS_SCORED)
    offered = [name for name in dict.fromkeys((DEFAULT_SELECTOR, *SELECTORS, *scored)) if name in scored]
    return {name: [str(head) for head in scan.ranking(name, seed=seed)] for name in offered}


def _short(value: float) -> float | None:
    """The value with five digits; None for infinities and NaN, which JSON lacks."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _read(name: str) -> str:
    return (files("lcc_lens.frontends.widget") / "assets" / name).read_text(encoding="utf-8")
