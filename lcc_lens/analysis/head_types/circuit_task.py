"""A task with a known circuit in the dense, the pruned and the restored model: logit difference and head effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.head_types.circuit_prompts import CircuitPrompt, circuit_prompts
from lcc_lens.analysis.head_types.patterns import NamedModel, compared_models
from lcc_lens.analysis.lens.prompt import Applicable
from lcc_lens.core.heads import all_heads
from lcc_lens.core.metrics import standard_error
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Seed, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import Batch, TokenSequence, pad
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import NamedHook, logits_at, readers, resid_pre_name, z_name
from lcc_lens.models.hooked.layer_walk import can_start_at_layers, run_from_layer
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class CircuitTask(Shown):
    r"""How well each model does a task, and which heads it does it with.

    ``difference`` is $\ln \sum_{right} e^{logit} - \ln \sum_{wrong} e^{logit}$ at the end of each prompt. ``effect`` is
    how much of it a head is responsible for: by how much its mean falls when the head outputs what it does on a prompt
    with another answer. ``effect`` is None if it was not asked for.
    """

    task: str
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    difference: Float[Tensor, "model prompt"]
    effect: Float[Tensor, "model layer head"] | None

    def _facts(self) -> dict[str, Any]:
        each = zip(
            self.models, self.difference.mean(1).tolist(), standard_error(self.difference.T).tolist(), strict=True
        )
        return {"task": self.task, "prompts": len(self.prompts), **{m: f"{d:.2f} ± {e:.2f}" for m, d, e in each}}

    def table(self) -> pd.DataFrame:
        """One row per head, the dense model's strongest first: layer, head, and its effect in every model.

        One row per model if effects were not asked for: its mean logit difference and standard error.
        """
        import pandas as pd

        if self.effect is None:
            columns = {"difference": self.difference.mean(1), "stderr": standard_error(self.difference.T)}
            return pd.DataFrame({"model": self.models, **{name: x.tolist() for name, x in columns.items()}})
        heads = all_heads(*self.effect.shape[1:])
        places = {"layer": [h.layer for h in heads], "head": [h.head for h in heads]}
        effects = {name: x.flatten().tolist() for name, x in zip(self.models, self.effect, strict=True)}
        table = pd.DataFrame({**places, **effects})
        order = table["dense"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)


@ranged
def circuit_task(
    pair: Pair,
    task: str = "indirect-object",
    restoration: Applicable | None = None,
    *,
    n: Count = 16,
    effects: bool = True,
    seed: Seed = 0,
) -> CircuitTask:
    """Measure a task with a known circuit in the dense, the pruned and the restored model.

    Args:
        pair: the hooked models, both in memory.
        task: see :func:`~lcc_lens.analysis.head_types.circuit_prompts.circuit_prompts`.
        restoration: a restoration or an injection of the pruned model; without one, two models are compared.
        n: prompts; ``seed``: of their draw.
        effects: patch every head too, one pass per head and model.

    Raises:
        RequestError: the tokenizer splits the task's names or numbers, or one model is in memory at a time.

    Example:
        >>> circuit_task(pair, "indirect-object", restoration).table().head(10)  # doctest: +SKIP
    """
    models = compared_models(pair, restoration)
    prompts = circuit_prompts(task, pair.tokenizer, n, seed)
    differences, found = [], []
    for each in models:
        with torch.inference_mode(), each.applied():
            runs = _Runs(each, prompts)
            differences.append(runs.clean)
            if effects:
                found.append(runs.effects())
    if effects:  # in the order of the pruned model's heads
        kept = pair.head_map.dense_heads
        found[0] = torch.stack([row[list(heads)] for row, heads in zip(found[0], kept, strict=True)])
    return CircuitTask(
        task, tuple(each.name for each in models), tuple(prompt.text for prompt in prompts),
        torch.stack(differences), torch.stack(found) if effects else None,
    )  # fmt: skip


class _Runs:
    """One model on all prompts, plain and with a head's output patched in from the corrupted prompts."""

    def __init__(self, named: NamedModel, prompts: Sequence[CircuitPrompt]) -> None:
        self.named, self.model, self.prompts = named, named.model, prompts
        self.n_layers, self.n_heads = int(self.model.cfg.n_layers), int(self.model.cfg.n_heads)
        self.batch = _batch([prompt.tokens for prompt in prompts])
        corrupted = _batch([prompt.corrupted for prompt in prompts])
        self.z: dict[int, Tensor] = {}
        self.resid: dict[int, Tensor] = {}
        layers = range(self.n_layers)
        self._run(corrupted, readers(z_name, layers, lambda at, z: self.z.update({at: z.clone()})))
        keep = readers(resid_pre_name, layers, lambda at, x: self.resid.update({at: x.clone()}))
        self.clean = self._difference(self._run(self.batch, keep))

    def effects(self) -> Float[Tensor, "layer head"]:
        """By how much the mean logit difference falls when a head's output is that on the corrupted prompts."""
        found = torch.zeros(self.n_layers, self.n_heads)
        places = all_heads(self.n_layers, self.n_heads)
        for place in track(places, len(places), f"patch heads, {self.named.name}"):
            patch = (z_name(place.layer), self._patch(place.layer, place.head))
            found[place] = self.clean.mean() - self._difference(self._run(self.batch, [patch], place.layer)).mean()
        return found

    def _run(self, batch: Batch, hooks: list[NamedHook], start: int = 0) -> Float[Tensor, "prompt d_vocab"]:
        device = device_of(self.model)
        at_end = torch.arange(batch.tokens.shape[1]) == batch.lengths[:, None] - 1
        hooks, tokens = [*hooks, *logits_at(self.model, at_end.to(device))], batch.tokens.to(device)
        if start > 0 and can_start_at_layers(self.model):
            logits: Tensor = run_from_layer(self.model, start, self.resid[start], tokens, hooks)
        else:
            logits = forward(self.model, tokens, hooks)
        return logits[0].float().cpu()

    def _patch(self, layer: int, head: int) -> Any:
        def patch(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head] = self.z[layer][:, :, head]
            return z

        return patch

    def _difference(self, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
        sides = [
            torch.stack([row[list(tokens)].logsumexp(0) for row, tokens in zip(logits, chosen, strict=True)])
            for chosen in ([p.right for p in self.prompts], [p.wrong for p in self.prompts])
        ]
        return sides[0] - sides[1]


def _batch(tokens: Sequence[Tensor]) -> Batch:
    return pad([TokenSequence(each, 1) for each in tokens], range(len(tokens)))
