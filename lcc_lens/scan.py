"""The scan of a pair: what pruning took from every head, from one streaming pass of each model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.activations import Positions, collect_z, position_mask, visit_z
from lcc_lens.components import LostComponents, components_from_moments
from lcc_lens.config import package_version
from lcc_lens.data import Batch, Data, TokenSequence, batches, encode, encode_pair
from lcc_lens.errors import RequestError
from lcc_lens.files import read_json, read_tensors, sha256_file, write_json, write_tensors
from lcc_lens.heads import Head, all_heads
from lcc_lens.hooks import HookedModel
from lcc_lens.models import Pair, device_of
from lcc_lens.progress import track
from lcc_lens.selectors import SELECTORS, SelectorName
from lcc_lens.selectors.linear_probe import MIN_PAIRS, ProbeFeatures, score_linear_probe
from lcc_lens.selectors.mse import score_mse
from lcc_lens.selectors.random import score_random

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SCAN_TENSORS = "scan.safetensors"
SCAN_RECORD = "scan.json"


@dataclass(frozen=True)
class ScanRecord:
    """Where a scan comes from: weights, data, settings."""

    dense: str
    pruned: str
    dense_sha256: str
    pruned_sha256: str
    data: str
    source: str
    positions: Positions
    n_examples: int
    n_samples: int
    max_length: int
    probe_rank: int | None
    seed: int
    version: str = field(default_factory=package_version)
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    r"""What pruning took from every head of one model, on one data set. Frozen; saved without loss.

    ``mean_difference`` is $\bar\delta$ with $\delta = z_{dense} - z_{pruned}$, ``second_moment`` is
    $\sum_n \delta_n \delta_n^T$, ``squared_dense`` and ``squared_difference`` are $\sum_n |z_{dense}|^2$ and
    $\sum_n |\delta|^2$, ``cosine`` is the cosine between the two models' outputs over all samples, and
    ``probe_accuracy`` the linear probe's held-out accuracy where the data had right and wrong answers.
    """

    record: ScanRecord
    mean_difference: Float[Tensor, "layer head d_head"]
    second_moment: Float[Tensor, "layer head d_head d_head"]
    squared_dense: Float[Tensor, "layer head"]
    squared_difference: Float[Tensor, "layer head"]
    cosine: Float[Tensor, "layer head"]
    components: LostComponents
    probe_accuracy: Float[Tensor, "layer head"] | None = None

    @property
    def relative_loss(self) -> Float[Tensor, "layer head"]:
        r"""Root of $\sum|\delta|^2 / \sum|z_{dense}|^2$: the share of each head's output that pruning changed."""
        tiny = torch.finfo(torch.float32).tiny
        return (self.squared_difference / self.squared_dense.clamp_min(tiny)).sqrt()

    @property
    def constant_share(self) -> Float[Tensor, "layer head"]:
        r"""The constant share of the difference, $N|\bar\delta|^2 / \sum|\delta|^2$: all that a constant can mend."""
        constant = self.record.n_samples * self.mean_difference.square().sum(-1)
        return constant / self.squared_difference.clamp_min(torch.finfo(torch.float32).tiny)

    def scores(self, selector: SelectorName = "probe", *, seed: int | None = None) -> Float[Tensor, "layer head"]:
        """Each head's score under a selector, higher for heads to restore first.

        Raises:
            RequestError: an unknown selector, or ``probe`` on data without wrong answers.
        """
        n_layers, n_heads, d_head = self.mean_difference.shape
        if selector == "probe":
            if self.probe_accuracy is None:
                raise RequestError(
                    f"wanted probe scores, got a scan of {self.record.n_examples} sequences of {self.record.data} "
                    f"without them; scan {MIN_PAIRS} or more questions with right and wrong answers, or select by mse"
                )
            return self.probe_accuracy
        if selector == "mse":
            return score_mse(self.squared_difference, self.record.n_samples, d_head)
        if selector == "random":
            return score_random(n_layers, n_heads, self.record.seed if seed is None else seed)
        raise RequestError(f"wanted one of the selectors {', '.join(SELECTORS)}, got {selector!r}")

    def select(self, selector: SelectorName = "probe", *, share: float = 0.25, seed: int | None = None) -> list[Head]:
        """The heads with the highest scores, as many as ``share`` of all heads (rounded up), in model order.

        Args:
            selector: how heads are scored (see :meth:`scores`); ties go to the larger mean squared difference, since
                a probe's accuracy takes few values, then to the earlier head.
            share: between 0 (exclusive) and 1.
            seed: of the random selector.

        Raises:
            RequestError: the share is not within (0, 1].
        """
        if not 0 < share <= 1:
            raise RequestError(f"wanted a share of heads above 0 and up to 1, got {share}")
        n_layers, n_heads, d_head = self.mean_difference.shape
        scores = self.scores(selector, seed=seed).flatten().tolist()
        loss = score_mse(self.squared_difference, self.record.n_samples, d_head).flatten().tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], -loss[i], i))
        heads = all_heads(n_layers, n_heads)
        return sorted(heads[i] for i in order[: math.ceil(share * len(heads))])

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, and every scalar statistic."""
        import pandas as pd

        heads = all_heads(*self.relative_loss.shape)
        columns: dict[str, list[Any]] = {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "relative_loss": self.relative_loss.flatten().tolist(),
            "cosine": self.cosine.flatten().tolist(),
            "constant_share": self.constant_share.flatten().tolist(),
            "first_direction_share": self.components.explained_share()[..., 0].flatten().tolist(),
            "mse": self.scores("mse").flatten().tolist(),
        }
        if self.probe_accuracy is not None:
            columns["probe_accuracy"] = self.probe_accuracy.flatten().tolist()
        return pd.DataFrame(columns)

    def save(self, run: str | Path) -> None:
        """Write ``scan.safetensors`` and ``scan.json`` into a run directory, each atomically."""
        run = Path(run)
        write_tensors(run / SCAN_TENSORS, self._tensors())
        record = {**asdict(self.record), "scan_sha256": sha256_file(run / SCAN_TENSORS)}
        write_json(run / SCAN_RECORD, record)

    @classmethod
    def load(cls, run: str | Path) -> Scan:
        """Read a scan, bit for bit as it was saved.

        Raises:
            RequestError: a file is missing or damaged, or the tensors are not the ones that were saved.
        """
        run = Path(run)
        fields = read_json(run / SCAN_RECORD)
        expected = fields.pop("scan_sha256", None)
        tensors, _ = read_tensors(run / SCAN_TENSORS)
        if sha256_file(run / SCAN_TENSORS) != expected:
            raise RequestError(f"wanted {run / SCAN_TENSORS} as the scan wrote it, got a changed file; scan again")
        try:
            record = ScanRecord(**{**fields, "groups": tuple(fields["groups"])})
            names = ("directions", "singular_values", "coefficients")
            components = LostComponents(**{name: tensors.pop(name) for name in names}, n_samples=record.n_samples)
            return cls(record=record, components=components, **cast("dict[str, Any]", tensors))
        except (KeyError, TypeError) as error:
            raise RequestError(
                f"wanted a scan of this version in {run}, got another layout ({error}); scan again"
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        names = ("mean_difference", "second_moment", "squared_dense", "squared_difference", "cosine")
        tensors = {name: cast("Tensor", getattr(self, name)) for name in names}
        tensors |= {
            "directions": self.components.directions,
            "singular_values": self.components.singular_values,
            "coefficients": self.components.coefficients,
        }
        if self.probe_accuracy is not None:
            tensors["probe_accuracy"] = self.probe_accuracy
        return tensors


class RunningDifferences:
    """Sums over the differences of all heads; memory does not grow with the number of samples."""

    def __init__(self, n_layers: int, n_heads: int, d_head: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            # Sums over many samples: float64 where the device has it
            dtype = torch.float32 if device.type == "mps" else torch.float64
            return torch.zeros(n_layers, n_heads, *shape, dtype=dtype, device=device)

        self.n_samples = 0
        self.total, self.second_moment = zeros(d_head), zeros(d_head, d_head)
        self.squared_dense, self.squared_pruned, self.dot = zeros(), zeros(), zeros()

    def update(
        self, layer: int, z_dense: Float[Tensor, "sample head d_head"], z_pruned: Float[Tensor, "sample head d_head"]
    ) -> None:
        """Add one layer's outputs on a batch (:attr:`n_samples` is counted by the caller, once per batch)."""
        difference = (z_dense - z_pruned).transpose(0, 1)
        self.total[layer] += difference.sum(1)
        self.second_moment[layer] += difference.transpose(1, 2) @ difference
        self.squared_dense[layer] += z_dense.square().sum((0, 2))
        self.squared_pruned[layer] += z_pruned.square().sum((0, 2))
        self.dot[layer] += (z_dense * z_pruned).sum((0, 2))

    def finish(self, record: ScanRecord) -> Scan:
        """The scan of everything added so far."""
        norms = (self.squared_dense * self.squared_pruned).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        squared_difference = self.second_moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        return Scan(
            record=record,
            mean_difference=(self.total / self.n_samples).float().cpu(),
            second_moment=self.second_moment.float().cpu(),
            squared_dense=self.squared_dense.float().cpu(),
            squared_difference=squared_difference.float().cpu(),
            cosine=(self.dot / norms).float().cpu(),
            components=components_from_moments(self.total.cpu(), self.second_moment.cpu(), self.n_samples),
        )


def scan(
    pair: Pair,
    data: Data,
    *,
    positions: Positions = "all",
    max_length: int = 512,
    limit: int | None = None,
    probe_rank: int = 1,
    batch_tokens: int = 1024,
    seed: int = 0,
) -> Scan:
    """Find what pruning took from every head.

    Both models run once over the data, in batches of similar length; per head only sums are kept. Contrastive and
    instruction data also give the linear probe's scores (one more pass of the dense model over the wrong answers).

    Args:
        pair: the hooked models.
        data: examples; use the role ``probe`` to keep them apart from training.
        positions: where differences are taken: at ``all`` tokens, since an injection acts on all of them and a
            mean over more samples is steadier, or at the ``last`` token of the question as in the paper.
        max_length: tokens per example at most.
        limit: sequences at most (text is cut into many).
        probe_rank: K of the probe's activation editing.
        batch_tokens: tokens per forward pass at most; decides speed and memory.
        seed: of the probe.

    Raises:
        RequestError: no usable example, or fewer than two.
        LensError: an activation is not finite.

    Example:
        >>> result = scan(pair, load_data("boolq", n=256, role="probe"))  # doctest: +SKIP
        >>> result.select("probe", share=0.25)[:2]  # doctest: +SKIP
        [Head(layer=0, head=4), Head(layer=1, head=0)]
    """
    contrast = _contrastive_sequences(data, pair, max_length)
    sequences = contrast[0] if contrast else encode(data, pair.tokenizer, max_length=max_length, limit=limit)
    sums = RunningDifferences(pair.n_layers, pair.n_heads, pair.d_head, device_of(pair.pruned))
    questions, answers = _Rows(len(sequences)), _Rows(len(sequences))
    grouped = batches(sequences, max_tokens=batch_tokens)
    for batch in track(grouped, len(grouped), "scan heads"):
        z_answer, z_question = _add_batch(sums, pair, batch, positions, keep_last=contrast is not None)
        answers.put(batch.index, z_answer)
        questions.put(batch.index, z_question)
    if sums.n_samples < 2:
        raise RequestError(f"wanted at least 2 positions to compare, got {sums.n_samples}; scan more examples")
    record = ScanRecord(
        dense=pair.dense_id.reference,
        pruned=pair.pruned_id.reference,
        dense_sha256=pair.dense_id.sha256,
        pruned_sha256=pair.pruned_id.sha256,
        data=data.name,
        source=data.source,
        positions=positions,
        n_examples=len(sequences),
        n_samples=sums.n_samples,
        max_length=max_length,
        probe_rank=probe_rank if contrast else None,
        seed=seed,
        groups=tuple(sorted(data.groups)),
    )
    result = sums.finish(record)
    if contrast is None:
        return result
    if len(sequences) < MIN_PAIRS:
        logger.warning("no probe scores: wanted at least %d pairs, got %d", MIN_PAIRS, len(sequences))
        return result
    wrong = _last_z(pair.dense, contrast[1], batch_tokens)
    features = ProbeFeatures(questions.stacked(), answers.stacked(), wrong.stacked())
    scores = score_linear_probe(features, result.components, rank=probe_rank, seed=seed)
    return replace(result, probe_accuracy=scores)


class _Rows:
    """Rows ``[layer, head, d_head]`` that arrive in the order of batches and leave in the order of examples."""

    def __init__(self, n_rows: int) -> None:
        self.rows: list[Tensor | None] = [None] * n_rows

    def put(self, index: Sequence[int], z: Float[Tensor, "sample layer head d_head"] | None) -> None:
        for position, row in zip(index, z if z is not None else (), strict=False):
            self.rows[position] = row.cpu()

    def stacked(self) -> Float[Tensor, "sample layer head d_head"]:
        return torch.stack([row for row in self.rows if row is not None])


def _contrastive_sequences(
    data: Data, pair: Pair, max_length: int
) -> tuple[list[TokenSequence], list[TokenSequence]] | None:
    """The right and wrong sequences of every pair that fits; None where the data have no wrong answers."""
    if any(example.wrong is None for example in data.examples):
        return None
    encoded = [
        [
            encode_pair(pair.tokenizer, example.prompt, str(text), max_length)
            for text in (example.response, example.wrong)
        ]
        for example in data.examples
    ]
    fitting = [(right, wrong) for right, wrong in encoded if right is not None and wrong is not None]
    if len(fitting) < len(encoded):
        logger.warning(
            "%d of %d pairs left out: longer than %d tokens", len(encoded) - len(fitting), len(encoded), max_length
        )
    if not fitting:
        raise RequestError(
            f"wanted contrastive pairs of up to {max_length} tokens from {data.source}, got none; raise the limit"
        )
    return [right for right, _ in fitting], [wrong for _, wrong in fitting]


def _add_batch(
    sums: RunningDifferences, pair: Pair, batch: Batch, positions: Positions, *, keep_last: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Add one batch to the sums; also gives z_dense at the sequences' ends and z_pruned at the questions' ends."""
    masks = [position_mask(batch, positions)]
    extra_dense = [position_mask(batch, "end")] if keep_last else []
    extra_pruned = [position_mask(batch, "last")] if keep_last else []
    dense: dict[int, list[Tensor]] = {}
    visit_z(pair.dense, batch.tokens, masks + extra_dense, dense.__setitem__)
    question: list[Tensor] = []

    def compare(layer: int, z: list[Tensor]) -> None:
        sums.update(layer, dense[layer].pop(0).to(z[0].device), z[0])
        question.extend(z[1:])

    visit_z(pair.pruned, batch.tokens, masks + extra_pruned, compare)
    sums.n_samples += int(masks[0].sum())
    if not keep_last:
        return None, None
    answer = [dense[layer][0] for layer in range(pair.n_layers)]
    return torch.stack(answer, dim=1), torch.stack(question, dim=1)


def _last_z(model: HookedModel, sequences: list[TokenSequence], batch_tokens: int) -> _Rows:
    rows = _Rows(len(sequences))
    grouped = batches(sequences, max_tokens=batch_tokens)
    for batch in track(grouped, len(grouped), "scan wrong answers"):
        rows.put(batch.index, collect_z(model, batch.tokens, position_mask(batch, "end")))
    return rows
