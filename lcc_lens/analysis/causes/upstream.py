"""Whose fault: trace what a head inherits to the heads and MLPs below that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.analysis.causes.division import causes_refusal
from lcc_lens.analysis.causes.swapped import Call, Part, PlainModule, watched_modules
from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.metrics import standard_error
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, Length, Natural, ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import Batch, batches
from lcc_lens.data.datasets import Data, encode
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.architecture.context import fitting_length
from lcc_lens.models.hooked.direct_path import Norm, OutputProjections
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, readers, resid_pre_name, z_name
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd

Stream = Float[Tensor, "batch pos d_model"]
#: A writer into the residual stream: a head, an MLP (head None), or the embedding (layer -1).
Writer = tuple[int, int | None]


@dataclass(frozen=True, repr=False)
class Upstream(Shown):
    r"""Who wrote what a head inherits.

    With $\delta$ what the pruned head's output lacks because of its input, $z(x_{dense}) - z(x_{pruned})$ with its own
    pruned weights, the effect of a writer is the fraction $\sum_n e_n \cdot \delta_n / \sum_n |\delta_n|^2$ of what
    its own change alone does to the head. Heads and MLPs between them do not react.

    Attributes:
        head: the head that inherits.
        writers: layer and head of every writer; None for an MLP, layer -1 for the embedding.
        direct: the linear effect through the frozen norm and attention, mean of both inputs.
        stderr: its standard error over sequences.
        exact: the effect when the writer's dense output is patched into this path, for the strongest; else NaN.
    """

    made_by: ClassVar[str] = "trace_upstream(pair, head, data)"

    head: Head
    writers: tuple[Writer, ...]
    direct: Float[Tensor, " writer"]
    stderr: Float[Tensor, " writer"]
    exact: Float[Tensor, " writer"]

    def labels(self) -> list[str]:
        """``L3H1``, ``MLP 3`` or ``embedding``."""
        return [label(writer) for writer in self.writers]

    def table(self) -> pd.DataFrame:
        """One row per writer, the strongest first: its name, layer, head, ``direct``, ``stderr`` and ``exact``."""
        import pandas as pd

        layers, heads = zip(*self.writers, strict=True)
        columns = {"writer": self.labels(), "layer": layers, "head": pd.array(heads, dtype="Int64")}
        columns |= {name: getattr(self, name).tolist() for name in ("direct", "stderr", "exact")}
        return pd.DataFrame(columns).iloc[_by_size(self.direct)].reset_index(drop=True)

    def _facts(self) -> dict[str, Any]:
        rows = self.table().head(8).to_dict("records")
        return {"head": self.head, **{row["writer"]: f"{row['direct']:.1%} (exact {row['exact']:.1%})" for row in rows}}


def label(writer: Writer) -> str:
    """A writer's name."""
    layer, head = writer
    if layer < 0:
        return "embedding"
    return f"MLP {layer}" if head is None else str(Head(layer, head))


@ranged
def trace_upstream(
    pair: Pair,
    head: Head | tuple[int, int],
    data: Data | str | Path | Sequence[str],
    *,
    exact: Natural = 10,
    max_length: Length = 256,
    limit: Count = 16,
    batch_tokens: Count | None = None,
) -> Upstream:
    """Trace the part of a head's difference that came through its input to the writers below it.

    An MLP's row is what its layer adds besides its heads, so all writers' changes sum to that of the stream.

    Args:
        pair: the hooked models, both in memory.
        head: the head; one of the first layer inherits from the embedding alone.
        data: texts to run.
        exact: how many of the strongest writers are patched too.
        max_length: tokens per text at most; ``limit``: texts at most; ``batch_tokens``: tokens per forward pass.

    Raises:
        RequestError: the head is not in the model, the attention cannot be run alone, or heads were sliced off.

    Reference:
        Path patching: Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
    """
    (target,) = check_heads([head], pair.n_layers, pair.n_heads)
    reason = causes_refusal(pair)
    if reason is not None:
        raise RequestError(reason)
    if int(pair.dense.cfg.n_heads) != pair.n_heads:
        raise RequestError("expected the same heads in both models to trace, got a sliced one; trace one with zeros")
    sequences = encode(as_data(data), pair.tokenizer, max_length=fitting_length(max_length, pair.context), limit=limit)
    tracer = _Tracer(pair, target)
    passes = batches(sequences, max_tokens=batch_tokens or tokens_per_pass(device_of(pair.pruned)))
    linear = [tracer.effects(batch, None) for batch in track(passes, len(passes), "trace direct paths")]
    along, squared = (torch.cat(values) for values in zip(*linear, strict=True))
    whole = squared.sum().clamp_min(torch.finfo(squared.dtype).tiny)
    ratio = along.sum(0) / whole
    residuals = (along - ratio * squared[:, None]) * len(squared) / whole
    strongest = [tracer.writers[i] for i in _by_size(ratio)[:exact]]
    patched = torch.full_like(ratio, torch.nan)
    if strongest:
        runs = [tracer.effects(batch, strongest)[0] for batch in track(passes, len(passes), "patch paths")]
        for writer, effect in zip(strongest, torch.cat(runs).sum(0) / whole, strict=True):
            patched[tracer.writers.index(writer)] = effect
    tensors = (ratio.float(), standard_error(residuals).float(), patched.float())
    return Upstream(target, tuple(tracer.writers), *tensors)


class _Streams:
    """One model's residual stream before every layer up to the head's, and what heads write, on one batch."""

    def __init__(self, model: HookedModel, projections: OutputProjections, layers: int) -> None:
        self.projections = projections
        self.resid: dict[int, Tensor] = {}
        self.z: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        self.hooks = [
            *_keeping(resid_pre_name, layers + 1, self.resid),
            *_keeping(z_name, layers, self.z),
            *_keeping(projections.hook_name, layers, self.attention),
        ]

    def written(self, layer: int, head: int) -> Stream:
        """What a head adds to the stream."""
        scale = _finite(self.projections.scale(layer, self.attention[layer]))
        return self.projections.output(Head(layer, head), self.z[layer][:, :, head]) / scale


def _keeping(name: Callable[[int], str], n_layers: int, kept: dict[int, Tensor]) -> list[NamedHook]:
    """Hooks that keep the first layers' activations at a hook point, in float32."""

    def keep(layer: int, activation: Tensor) -> None:
        kept[layer] = activation.detach().float()

    return readers(name, range(n_layers), keep)


class _Tracer:
    """Runs both models over a batch, and measures what writers do to one head."""

    def __init__(self, pair: Pair, head: Head) -> None:
        self.pair, self.head = pair, head
        places = [(layer, h) for layer in range(head.layer) for h in (*range(pair.n_heads), None)]
        self.writers: list[Writer] = [(-1, None), *places]
        self.projections = [OutputProjections.of(model) for model in (pair.dense, pair.pruned)]
        norm = cast("Any", pair.pruned).blocks[head.layer]._modules.get("ln1")
        d_model, device = int(pair.pruned.cfg.d_model), device_of(pair.pruned)
        self.norm = None if norm is None else Norm.of(norm.original_component, d_model, device)

    def effects(self, batch: Batch, patched: Sequence[Writer] | None) -> tuple[Tensor, Tensor]:
        """Per sequence, the product of each writer's effect with the inherited part, and that part's square.

        Args:
            patched: the writers to patch; if None the linear effect of all.
        """
        models = (self.pair.dense, self.pair.pruned)
        dense, pruned = (_Streams(m, p, self.head.layer) for m, p in zip(models, self.projections, strict=True))
        found: list[tuple[Tensor, Tensor]] = []
        valid = batch.is_valid().to(device_of(self.pair.pruned))
        inputs: list[Tensor] = []

        def keep(part: Part, layer: int, call: Call, z: Tensor) -> None:
            if part == "attn" and layer == self.head.layer:
                inputs.append(call.hidden)

        def measure(part: Part, layer: int, call: Call, z: Tensor) -> None:
            if part == "attn" and layer == self.head.layer:
                found.append(self._measure(call, inputs[0], (dense, pruned), valid, patched))

        with torch.no_grad():
            for model, visit, streams in ((models[0], keep, dense), (models[1], measure, pruned)):
                with watched_modules(model, visit):
                    run_without_logits(model, batch.tokens.to(device_of(model)), streams.hooks)
        return found[0]

    def _measure(
        self, call: Call, x_dense: Tensor, streams: tuple[_Streams, _Streams], valid: Bool[Tensor, "batch pos"],
        patched: Sequence[Writer] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dense, pruned = streams
        z = self._z(call, call.hidden)
        lost = (self._z(call, x_dense) - z) * valid[..., None]
        squared = lost.double().square().sum((1, 2))
        if patched is None:
            first, second = (self._slope(call, side.resid[self.head.layer], lost) for side in streams)
            slope = (first + second) / 2
            products = [(slope * change).double().sum((1, 2)) for _, change in self._changes(dense, pruned)]
            return torch.stack(products, 1).cpu(), squared.cpu()
        resid, effects = pruned.resid[self.head.layer], {}
        for writer, change in self._changes(dense, pruned):
            if writer in patched:
                x = resid + change if self.norm is None else self.norm(resid + change)
                effects[writer] = ((self._z(call, x.to(call.hidden)) - z) * lost).double().sum((1, 2))
        return torch.stack([effects[writer] for writer in patched], 1).cpu(), squared.cpu()

    def _changes(self, dense: _Streams, pruned: _Streams) -> Iterator[tuple[Writer, Stream]]:
        """Every writer with the difference of what it writes."""
        yield (-1, None), dense.resid[0] - pruned.resid[0]
        for layer in range(self.head.layer):
            rest = (dense.resid[layer + 1] - dense.resid[layer]) - (pruned.resid[layer + 1] - pruned.resid[layer])
            for head in range(self.pair.n_heads):
                change = dense.written(layer, head) - pruned.written(layer, head)
                rest = rest - change
                yield (layer, head), change
            yield (layer, None), rest

    def _slope(self, call: Call, resid: Stream, lost: Tensor) -> Stream:
        """The gradient of the head's output along what it lost, with respect to the stream through the frozen norm."""
        with torch.enable_grad():
            leaf = resid.clone().requires_grad_()
            x = (
                leaf
                if self.norm is None
                else self.norm.linear(leaf) / _finite(self.norm.scale(resid)) + self.norm.shift
            )
            value = (self._z(call, x.to(call.hidden)) * lost).sum()
            (slope,) = torch.autograd.grad(value, leaf)
        return slope

    def _z(self, call: Call, x: Tensor) -> Float[Tensor, "batch pos d_head"]:
        """The head's output for an input of its layer's attention, with the pruned weights."""
        z = PlainModule.of(self.pair.pruned, self.head.layer, "attn").before_output(call, x)
        return z.float().reshape(*x.shape[:2], self.pair.n_heads, self.pair.d_head)[:, :, self.head.head]


def _finite(scale: Tensor) -> Tensor:
    """The scale of a norm, 1 where a vector is zero, as the embedding of padding may be."""
    return scale.nan_to_num(nan=1.0)


def _by_size(values: Float[Tensor, " writer"]) -> list[int]:
    return cast("list[int]", values.abs().argsort(descending=True, stable=True).tolist())
