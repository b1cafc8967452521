"""Divide the difference of every head and MLP among its causes: a changed input and the layer's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from lcc_lens.analysis.causes.attention_weights import AttentionWeights, matched
from lcc_lens.analysis.causes.checks import attention_refusal, can_swap_mlp
from lcc_lens.analysis.causes.shapley import COMBINATIONS, shapley_parts
from lcc_lens.analysis.causes.statistics import PartStatistics, RunningParts
from lcc_lens.analysis.causes.swapped import Call, Part, PlainModule, Projections, watched_modules
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import all_heads
from lcc_lens.core.progress import track
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.models.hooked.activations import Positions, TokenPositions, sampled_positions
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

if TYPE_CHECKING:
    import pandas as pd

#: Causes of a head's difference: its layer's input, its queries and keys, its values.
HEAD_CAUSES = ("inherited", "pattern", "value")
#: Causes of an MLP's difference: its input, the weights before the activation, the down projection.
MLP_CAUSES = ("inherited", "gate_up", "down")


@dataclass(frozen=True, repr=False)
class Causes(Shown):
    """The causes of every head's difference, and of every MLP's output where the MLP can be given other weights."""

    heads: PartStatistics
    mlp: PartStatistics | None = None

    def _facts(self) -> dict[str, Any]:
        return {**self.heads._facts(), "MLPs": "not divided" if self.mlp is None else "divided too"}

    def columns(self) -> dict[str, list[float]]:
        """By name, one value per head: the fraction of every cause, its standard error and constant fraction."""
        return _columns(self.heads)

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, and the columns of :meth:`columns`."""
        import pandas as pd

        heads = all_heads(*self.heads.squared_difference.shape)
        places = {"layer": [h.layer for h in heads], "head": [h.head for h in heads]}
        return pd.DataFrame({**places, **self.columns()})

    def layer_table(self) -> pd.DataFrame:
        """Tidy: one row per layer, site (``z`` or ``mlp``) and cause, with the mean fraction over its heads."""
        import pandas as pd

        rows = [
            {"layer": layer, "site": site, "cause": cause, "fraction": float(value[layer].double().nanmean())}
            for site, parts in (("z", self.heads), ("mlp", self.mlp))
            if parts is not None
            for cause, value in parts.by_cause().items()
            for layer in range(len(value))
        ]
        return pd.DataFrame(rows)

    def mlp_table(self) -> pd.DataFrame:
        """One row per layer: the same columns for the MLP's output; empty if MLPs were not divided."""
        import pandas as pd

        columns = {} if self.mlp is None else _columns(self.mlp)
        n_layers = 0 if self.mlp is None else len(self.mlp.fraction)
        return pd.DataFrame({"layer": list(range(n_layers)), **columns})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, such as ``heads.fraction``."""
        sites = {"heads": self.heads, **({} if self.mlp is None else {"mlp": self.mlp})}
        return {f"{site}.{name}": tensor for site, parts in sites.items() for name, tensor in parts.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], n_samples: int) -> Causes | None:
        """The causes that :meth:`tensors` gave; None if there are no tensors."""

        def site(name: str, causes: tuple[str, ...]) -> PartStatistics | None:
            found: dict[str, Any] = {
                key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")
            }
            return PartStatistics(causes, n_samples, **found) if found else None

        heads = site("heads", HEAD_CAUSES)
        return None if heads is None else cls(heads, site("mlp", MLP_CAUSES))


def causes_refusal(pair: Pair) -> str | None:
    """Why the causes of a pair's differences cannot be found; None if they can."""
    if pair.one_at_a_time:
        return "expected both models in memory to find causes, got one at a time; load both"
    for model in (pair.dense, pair.pruned):
        if any(parameter.is_meta for parameter in model.parameters()):  # type: ignore[attr-defined]
            return "expected all weights in memory to find causes, got layers on disk; load without a device map"
        reason = attention_refusal(model)
        if reason is not None:
            return f"expected attention that can be given other weights to find causes, got {reason}"
    try:
        for layer in range(pair.n_layers):
            AttentionWeights(pair, layer)
    except RequestError as error:
        return str(error)
    return None


def find_causes(
    pair: Pair, sequences: Sequence[TokenSequence], *, positions: Positions = "all", batch_tokens: int = 1024
) -> Causes:
    r"""Divide every head's difference $z_{dense} - z_{pruned}$ exactly into three parts, one per cause.

    The attention of a layer runs under all $2^3$ combinations of dense and pruned *input* (the output of the norm
    before it), *queries and keys* (weights, norms and biases) and *values*; the parts are the Shapley values.
    ``inherited`` is what came through the input, ``pattern`` what this layer's own queries and keys lost, ``value``
    its own values. For an MLP: its input, ``gate_up`` (before the activation) and ``down``. A constant that a hook
    adds to head outputs is no cause and is left out.

    Args:
        sequences: what to run; ``positions``: which tokens count, as in a scan.
        batch_tokens: padded tokens per forward pass.

    Raises:
        RequestError: the attention cannot be given other weights, or one model is in memory at a time.
    """
    reason = causes_refusal(pair)
    if reason is not None:
        raise RequestError(reason)
    work = _Division(pair)
    passes = batches(sequences, max_tokens=batch_tokens)
    for batch in track(passes, len(passes), "find causes"):
        work.add(batch, *_places(batch, sequences, positions))
    return Causes(work.heads.finish(), work.mlp.finish() if work.mlp is not None else None)


class _Division:
    """Runs both models batch by batch and sums the parts of every layer."""

    def __init__(self, pair: Pair) -> None:
        self.pair, device = pair, device_of(pair.pruned)
        self.attention = [AttentionWeights(pair, layer) for layer in range(pair.n_layers)]
        self.heads = RunningParts(HEAD_CAUSES, pair.n_layers, pair.n_heads, pair.d_head, device, spectra=True)
        self.mlp, d_model = None, int(pair.pruned.cfg.d_model)
        if _same_mlps(pair):
            self.mlp = RunningParts(MLP_CAUSES, pair.n_layers, 1, d_model, device, spectra=False)

    def add(self, batch: Batch, where: TokenPositions, example: Int[Tensor, " sample"]) -> None:
        """Run both models over a batch and add the parts at some positions."""
        seen: dict[tuple[Part, int], tuple[Tensor, Tensor]] = {}

        def keep(part: Part, layer: int, call: Call, value: Tensor) -> None:
            if part == "attn":
                seen[part, layer] = call.hidden, self.pair.kept_heads(layer, self._heads(call, value, where))
            elif self.mlp is not None:
                seen[part, layer] = _at(call.hidden, where), _at(value, where)

        def divide(part: Part, layer: int, call: Call, value: Tensor) -> None:
            running = self.heads if part == "attn" else self.mlp
            if running is not None:
                dense = tuple(x.to(value.device) for x in seen.pop((part, layer)))
                split = self._head_parts if part == "attn" else self._mlp_parts
                parts = split(layer, call, dense, value, where)
                running.update(layer, parts.to(running.device), example.to(running.device))

        with torch.inference_mode():
            for model, visit in ((self.pair.dense, keep), (self.pair.pruned, divide)):
                with watched_modules(model, visit):
                    run_without_logits(model, batch.tokens.to(device_of(model)), [])
        for running in (self.heads, self.mlp):
            if running is not None:
                running.count(example)

    def _head_parts(
        self, layer: int, call: Call, dense: tuple[Tensor, ...], z: Tensor, where: TokenPositions
    ) -> Float[Tensor, "cause sample head d_head"]:
        weights, (x_dense, z_dense) = self.attention[layer], dense
        outputs = {(False, False, False): self._heads(call, z, where), (True, True, True): z_dense}
        computed = Projections()  # queries and keys do not depend on which values are read, nor values on them
        for x_is_dense, qk_dense, v_dense in COMBINATIONS[1:-1]:
            chosen = weights.chosen(qk_dense=qk_dense, v_dense=v_dense)
            found = weights.plain.before_output(call, x_dense if x_is_dense else call.hidden, chosen, computed)
            outputs[x_is_dense, qk_dense, v_dense] = self._heads(call, found, where)
        return shapley_parts({combination: output.float() for combination, output in outputs.items()})

    def _mlp_parts(
        self, layer: int, call: Call, dense: tuple[Tensor, ...], post: Tensor, where: TokenPositions
    ) -> Float[Tensor, "cause sample 1 d_model"]:
        """The same of an MLP's output, which is linear in the post-activation, so that few products give all parts."""
        plain, other = (PlainModule.of(model, layer, "mlp") for model in (self.pair.pruned, self.pair.dense))
        x, (x_dense, both), neither = _at(call.hidden, where), dense, _at(post, where)
        by_input = plain.before_output(call, x_dense[None])[0]
        by_gate = plain.before_output(call, x[None], matched(other.values(), plain.values(), layer))[0]
        down = plain.output_values()
        dense_down = matched(other.output_values(), down, layer)
        change = {name: dense_down[name] - down[name] for name in down}
        mean = (down["weight"] + dense_down["weight"]) / 2
        # With p = both + neither and q = by_input + by_gate, Shapley's sums come down to four products.
        whole, between = linear(both - neither, mean), linear(by_input - by_gate, mean)
        p, q = linear(both + neither, change["weight"]), linear(by_input + by_gate, change["weight"])
        own = p / 3 + q / 6
        parts = ((whole + between) / 2 + (p - q) / 12, (whole - between) / 2 + (p - q) / 12,
                 own + change["bias"] if "bias" in change else own)  # fmt: skip
        return torch.stack(parts).float()[:, :, None]

    def _heads(self, call: Call, z: Tensor, where: TokenPositions) -> Float[Tensor, "sample head d_head"]:
        """Head outputs at some positions."""
        chosen = _at(z.reshape(*call.hidden.shape[:2], -1), where)
        return chosen.reshape(len(chosen), -1, self.pair.d_head)


def _same_mlps(pair: Pair) -> bool:
    """Whether both models' MLPs can be given each other's weights; not where neurons were sliced off."""
    if not (can_swap_mlp(pair.dense) and can_swap_mlp(pair.pruned)):
        return False
    try:
        for layer in range(pair.n_layers):
            dense, pruned = (PlainModule.of(model, layer, "mlp") for model in (pair.dense, pair.pruned))
            matched(dense.values(), pruned.values(), layer)
            matched(dense.output_values(), pruned.output_values(), layer)
    except RequestError:
        return False
    return True


def _places(
    batch: Batch, sequences: Sequence[TokenSequence], positions: Positions
) -> tuple[TokenPositions, Int[Tensor, " sample"]]:
    """The compared positions of a batch, and the example of each."""
    sampled = [sampled_positions(sequences[i], positions) for i in batch.index]
    example = torch.repeat_interleave(torch.tensor([len(p) for p in sampled]))
    position = torch.tensor([p for places in sampled for p in places], dtype=torch.long)
    return TokenPositions(example, position), example


def _at(values: Tensor, where: TokenPositions) -> Tensor:
    here = where.to(values.device)
    return values[here.sequence, here.position]


def _columns(parts: PartStatistics) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for i, cause in enumerate(parts.causes):
        columns[cause] = parts.fraction[..., i].flatten().tolist()
        columns[f"{cause}_stderr"] = parts.stderr[..., i].flatten().tolist()
        columns[f"{cause}_constant"] = parts.constant_fraction[..., i].flatten().tolist()
    return columns
