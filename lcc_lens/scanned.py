"""The scan artefact: what pruning took from every head, frozen, with the weights and data it belongs to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.activations import Positions
from lcc_lens.components import LostComponents
from lcc_lens.config import package_version
from lcc_lens.errors import RequestError
from lcc_lens.files import read_json, read_tensors, sha256_file, write_json, write_tensors
from lcc_lens.headmap import HeadMap
from lcc_lens.heads import Head, all_heads
from lcc_lens.selectors import SELECTORS, SelectorName
from lcc_lens.selectors.linear_probe import MIN_PAIRS
from lcc_lens.selectors.mse import score_mse
from lcc_lens.selectors.random import score_random

if TYPE_CHECKING:
    import pandas as pd

SCAN_TENSORS = "scan.safetensors"
SCAN_RECORD = "scan.json"


@dataclass(frozen=True)
class ScanRecord:
    """Where a scan comes from: weights, data, settings.

    ``pattern`` and ``sparsity`` describe the pruned model's zeros. ``dense_heads`` and ``removed_heads`` are the pair's
    head map where whole heads were removed; empty where every head is where it was.
    """

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
    pattern: str = ""
    sparsity: float | None = None
    dense_heads: tuple[tuple[int, ...], ...] = ()
    removed_heads: tuple[tuple[int, ...], ...] = ()


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

    @property
    def head_map(self) -> HeadMap:
        """Which head of the dense model every head is, and which are there in shape only."""
        n_layers, n_heads = self.relative_loss.shape
        if not self.record.dense_heads:
            return HeadMap.identity(n_layers, n_heads)
        return HeadMap(self.record.dense_heads, self.record.removed_heads)

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

        Heads that pruning removed whole cannot be restored (their output goes nowhere): they neither count nor come up.

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
        removed = self.head_map.removed
        alive = [heads[i] for i in order if heads[i].head not in removed[heads[i].layer]]
        return sorted(alive[: math.ceil(share * len(alive))])

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, and every scalar statistic."""
        import pandas as pd

        heads = all_heads(*self.relative_loss.shape)
        mapping = self.head_map
        columns: dict[str, list[Any]] = {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "dense_head": [mapping.dense_heads[head.layer][head.head] for head in heads],
            "is_removed": [head.head in mapping.removed[head.layer] for head in heads],
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
            record = ScanRecord(**{name: _tuples(value) for name, value in fields.items()})
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


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, however nested."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
