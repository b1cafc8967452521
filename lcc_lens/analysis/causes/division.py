"""Divide the difference of every head and MLP among its causes while both models run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from lcc_lens.analysis.causes.attention_weights import AttentionWeights, matched
from lcc_lens.analysis.causes.causes import HEAD_CAUSES, MLP_CAUSES, Causes, RunningCauses
from lcc_lens.analysis.causes.checks import attention_refusal, can_swap_mlp
from lcc_lens.analysis.causes.shapley import COMBINATIONS, shapley_parts
from lcc_lens.analysis.causes.statistics import RunningParts
from lcc_lens.analysis.causes.swapped import Call, Part, PlainModule, Projections, watched_modules
from lcc_lens.core.errors import RequestError
from lcc_lens.core.progress import track
from lcc_lens.core.ranges import Count, ranged
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.models.hooked.activations import Positions, TokenPositions, check_positions, sampled_positions
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair


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


@ranged
def find_causes(
    pair: Pair, sequences: Sequence[TokenSequence], *, positions: Positions = "all", batch_tokens: Count = 1024
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
        RequestError: the attention cannot be given other weights, one model is in memory at a time, or positions that
            are none.
    """
    positions = check_positions(positions)
    reason = causes_refusal(pair)
    if reason is not None:
        raise RequestError(reason)
    division, passes = Division(pair), batches(sequences, max_tokens=batch_tokens)
    sums = division.sums()
    for batch in track(passes, len(passes), "find causes"):
        where, example = _places(batch, sequences, positions)
        with torch.inference_mode():
            with division.of_dense(batch, where):
                run_without_logits(pair.dense, batch.tokens.to(device_of(pair.dense)), [])
            with division.of_pruned(batch, where, example, sums):
                run_without_logits(pair.pruned, batch.tokens.to(device_of(pair.pruned)), [])
        sums.count(example)
    return sums.finish()


class Division:
    """Divides the differences between both models' passes over the same batch; the dense model's comes first."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._attention = [AttentionWeights(pair, layer) for layer in range(pair.n_layers)]
        self._has_mlps = _same_mlps(pair)
        #: By batch, what the dense model's attention and MLPs read and computed.
        self._dense: dict[tuple[int, ...], dict[tuple[Part, int], tuple[Tensor, Tensor]]] = {}

    def sums(self) -> RunningCauses:
        """Empty sums."""
        pair, device = self.pair, device_of(self.pair.pruned)
        heads = RunningParts(HEAD_CAUSES, pair.n_layers, pair.n_heads, pair.d_head, device, spectra=True)
        if not self._has_mlps:
            return RunningCauses(heads, None, pair.head_map)
        d_model = int(pair.pruned.cfg.d_model)
        mlp = RunningParts(MLP_CAUSES, pair.n_layers, 1, d_model, device, spectra=False)
        return RunningCauses(heads, mlp, pair.head_map)

    @contextmanager
    def of_dense(self, batch: Batch, where: TokenPositions) -> Iterator[None]:
        """Keep what the dense model computes inside the block, until :meth:`of_pruned` has read it."""
        seen = self._dense[batch.index] = {}

        def keep(part: Part, layer: int, call: Call, value: Tensor) -> None:
            if part == "attn":
                seen[part, layer] = call.hidden, self.pair.kept_heads(layer, self._heads(call, value, where))
            elif self._has_mlps:
                seen[part, layer] = _at(call.hidden, where), _at(value, where)

        with watched_modules(self.pair.dense, keep):
            yield

    @contextmanager
    def of_pruned(
        self, batch: Batch, where: TokenPositions, example: Int[Tensor, " sample"], sums: RunningCauses
    ) -> Iterator[None]:
        """Add the parts of every layer that the pruned model computes inside the block.

        Args:
            where: the samples in the batch, as for the dense model; ``example``: the example of each, which has no
                samples in other batches.
        """
        seen = self._dense.pop(batch.index)

        def divide(part: Part, layer: int, call: Call, value: Tensor) -> None:
            running = sums.heads if part == "attn" else sums.mlp
            if running is not None:
                dense = tuple(x.to(value.device) for x in seen.pop((part, layer)))
                split = self._head_parts if part == "attn" else self._mlp_parts
                parts = split(layer, call, dense, value, where)
                running.update(layer, parts.to(running.device), example.to(running.device))

        with watched_modules(self.pair.pruned, divide):
            yield

    def _head_parts(
        self, layer: int, call: Call, dense: tuple[Tensor, ...], z: Tensor, where: TokenPositions
    ) -> Float[Tensor, "cause sample head d_head"]:
        weights, (x_dense, z_dense) = self._attention[layer], dense
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
