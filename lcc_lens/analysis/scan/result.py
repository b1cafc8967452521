"""The result of a scan: differences and scores of every head, how to select heads by them, and its files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.causes.causes import Causes
from lcc_lens.analysis.causes.recovered import Recovered
from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.overview import COLUMNS, pooled, scan_facts
from lcc_lens.analysis.scan.record import ScanParts, ScanRecord, require_own_models
from lcc_lens.analysis.scan.token_differences import TokenLoss
from lcc_lens.analysis.selectors.mse import score_mse
from lcc_lens.analysis.selectors.names import ALWAYS_SCORED, DEFAULT_SELECTOR
from lcc_lens.analysis.selectors.random import score_random
from lcc_lens.analysis.selectors.registry import check_selectors
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors, require_made, sha256_file, write_tensors
from lcc_lens.core.heads import Head, HeadList, HeadMap, all_heads, check_heads, head_indices, n_of_share
from lcc_lens.core.outputs.places import refuse_model
from lcc_lens.core.reading import convert, read_record, reading, write_record
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.activations import Site

if TYPE_CHECKING:
    import pandas as pd

SCAN_TENSORS = "scan.safetensors"
SCAN_RECORD = "scan.json"
_AGAIN = "scan again"


@dataclass(frozen=True, repr=False)
class Scan(Shown):
    r"""How pruning changed the output of every head of one model on one data set. Saved without loss.

    ``heads`` are the statistics of the head outputs (site ``z``), ``others`` those of the MLP's post-activation
    (``mlp``) and the residual stream (``resid``), one part per layer; ``components`` the lost components;
    ``selected_by`` the selectors' scores; ``tokens`` the relative difference at every token of the first examples;
    ``causes``, if asked for, why every head and MLP lost.
    """

    made_by: ClassVar[str] = "scan(pair, data), or Scan.load(run)"
    record: ScanRecord
    heads: DifferenceStatistics
    components: LostComponents
    others: Mapping[Site, DifferenceStatistics] = field(default_factory=dict)
    selected_by: Mapping[str, HeadScores] = field(default_factory=dict)
    tokens: tuple[TokenLoss, ...] = ()
    causes: Causes | None = None

    def _facts(self) -> dict[str, Any]:
        facts = scan_facts(self.record, self.relative_loss, self.ranking("mse"), self.mendable_share())
        return facts | {"also at": tuple(self.others), "scores": (*self.selected_by, *ALWAYS_SCORED)}

    @property
    def mean_difference(self) -> Float[Tensor, "layer head d_head"]:
        r"""$\bar\delta$ with $\delta = z_{dense} - z_{pruned}$."""
        return self.heads.mean_difference

    @property
    def relative_loss(self) -> Float[Tensor, "layer head"]:
        r"""Root of $\sum|\delta|^2 / \sum|z_{dense}|^2$: the relative change of each head's output."""
        return self.heads.relative_loss

    @property
    def cosine(self) -> Float[Tensor, "layer head"]:
        """The cosine between the two models' head outputs over all samples."""
        return self.heads.cosine

    @property
    def constant_share(self) -> Float[Tensor, "layer head"]:
        r"""The constant share of the difference, $N|\bar\delta|^2 / \sum|\delta|^2$: what a constant can correct."""
        return self.heads.constant_share

    def has_mlp(self, *, directions: bool = False) -> bool:
        """Whether the MLP's post-activation was compared; with ``directions``, also its spectrum."""
        mlp = self.others.get("mlp")
        return mlp is not None and (not directions or mlp.singular_values is not None)

    def mendable_share(self, site: Site = "z", heads: Iterable[Head] | None = None) -> float:
        r"""The fraction of a site's squared difference that is constant: the most that a mean shift can correct there.

        $\sum_i N|\bar\delta_i|^2 / \sum_j \sum_n|\delta_{n,j}|^2$ with the corrected heads $i$ and all heads $j$ (or
        layers). The mean leaves the least squared difference of all constants. This does not bound the recovered
        loss, and constants at several layers affect each other.

        Args:
            site: ``z``, or another site that was compared.
            heads: the heads to correct, all if not given.

        Raises:
            RequestError: the site was not compared.
        """
        statistics = self.heads if site == "z" else self.others.get(site)
        if statistics is None:
            raise RequestError(f"expected a scan with the site {site}, got one without; scan again")
        energy = statistics.squared_difference.double()
        constant = statistics.constant_share.double() * energy
        if heads is not None:
            constant = constant[head_indices(check_heads(heads, *energy.shape))]
        total = float(energy.sum())
        return float(constant.sum()) / total if total > 0 else 0.0

    def against(self, restored: Scan) -> Recovered:
        """What is left of each head's squared difference in a restored model, by cause.

        Args:
            restored: the same scan with the restored model second: an exported one, or, for a restoration under hooks,
                ``with restoration.applied_to(pair.pruned): restored = scan(pair, data, causes=True)``, which is not
                kept in a run.

        Raises:
            RequestError: the scans are not of the same dense model, heads, tokens and positions.
        """
        self.record.require_alike(restored.record)
        if not self.heads.has_same_dense(restored.heads):
            raise RequestError(f"expected two scans of the same tokens of {self.record.data}, got others; scan alike")
        return Recovered.of(self.heads, restored.heads, (self.causes, restored.causes), self.head_map)

    @property
    def head_map(self) -> HeadMap:
        """The dense model's head for every head, and the heads that pruning removed whole."""
        n_layers, n_heads = self.relative_loss.shape
        if not self.record.dense_heads:
            return HeadMap.identity(n_layers, n_heads)
        return HeadMap(self.record.dense_heads, self.record.removed_heads)

    def scores(self, selector: str = DEFAULT_SELECTOR, *, seed: int | None = None) -> HeadScores:
        """Each head's score under a selector with its standard error; heads with high scores are restored first.

        Raises:
            RequestError: an unknown selector, or one that this scan did not compute.
        """
        if selector == "mse":
            return score_mse(self.heads, self.record.n_examples)
        if selector == "random":
            n_layers, n_heads = self.relative_loss.shape
            return score_random(n_layers, n_heads, self.record.seed if seed is None else seed)
        if selector not in self.selected_by:
            check_selectors([selector])
            available = ", ".join([*self.selected_by, *ALWAYS_SCORED])
            raise RequestError(
                f"expected {selector} scores, got a scan of {self.record.n_examples} sequences of {self.record.data} "
                f"with {available}; name {selector} as a selector when scanning, or select by another"
            )
        return self.selected_by[selector]

    def with_scores(self, scores: Iterable[HeadScores]) -> Scan:
        """The same scan with the scores of more selectors."""
        return replace(self, selected_by={**self.selected_by, **{s.selector: s for s in scores}})

    def select(self, selector: str = DEFAULT_SELECTOR, *, share: float = 0.25, seed: int | None = None) -> HeadList:
        """The heads with the highest scores, as many as ``share`` of all heads (rounded up), in the order of the model.

        The order is that of layers and heads, not of scores: :meth:`ranking` gives the heads best first. Heads that
        pruning removed whole are neither counted nor selected, since their output is not used.

        Args:
            selector: how heads are scored (see :meth:`scores`); ties go to the larger mean squared difference, since
                a probe's accuracy takes few values, then to the earlier head.
            share: between 0 (exclusive) and 1.
            seed: of the random selector.

        Raises:
            RequestError: the share is not within (0, 1].
        """
        if not 0 < share <= 1:
            raise RequestError(f"expected a share of heads above 0 and up to 1, got {share}")
        alive = self.ranking(selector, seed=seed)
        return HeadList(sorted(alive[: n_of_share(share, len(alive))]))

    def ranking(self, selector: str = DEFAULT_SELECTOR, *, seed: int | None = None) -> HeadList:
        """All heads that pruning did not remove, best first: the highest score leads.

        Args:
            selector: see :meth:`select`, for ties too.
            seed: of the random selector.

        Raises:
            RequestError: an unknown selector, or one that this scan did not compute.
        """
        scores = self.scores(selector, seed=seed).value.nan_to_num(nan=-math.inf).flatten().tolist()
        loss = self.heads.mse.flatten().tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], -loss[i], i))
        heads = all_heads(*self.relative_loss.shape)
        removed = self.head_map.removed
        return HeadList(heads[i] for i in order if heads[i].head not in removed[heads[i].layer])

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
            **{name: getattr(self.heads, name).flatten().tolist() for name in COLUMNS},
            "effective_rank": self.components.effective_rank.flatten().tolist(),
            "first_direction_share": self.components.explained_share()[..., 0].flatten().tolist(),
        }
        for name, scores in {**self.selected_by, "mse": self.scores("mse")}.items():
            columns[name] = scores.value.flatten().tolist()
            columns[f"{name}_stderr"] = scores.stderr.flatten().tolist()
        if self.causes is not None:
            columns |= self.causes.columns()
        return pd.DataFrame(columns)

    def layer_table(self) -> pd.DataFrame:
        """One row per layer and site (head outputs, MLP, residual stream)."""
        import pandas as pd

        rows = []
        for site, statistics in {"z": self.heads, **self.others}.items():
            for layer in range(self.relative_loss.shape[0]):
                rows.append({"layer": layer, "site": site, **pooled(statistics, layer)})
        return pd.DataFrame(rows)

    def save(self, run: str | Path) -> None:
        """Write ``scan.safetensors`` and ``scan.json`` into a run directory, each atomically.

        Raises:
            RequestError: hooks or changed weights acted on a model, so the scan is not theirs; a model's folder.
        """
        require_own_models(self.record.is_changed)
        refuse_model(run := Path(run))
        write_tensors(run / SCAN_TENSORS, self._tensors())
        parts = {
            "selected_by": {
                name: {"selector": scores.selector, "n_examples": scores.n_examples, "settings": scores.settings}
                for name, scores in self.selected_by.items()
            },
            "tokens": [{**vars(token), "loss": None} for token in self.tokens],
            "scan_sha256": sha256_file(run / SCAN_TENSORS),
        }
        write_record(run / SCAN_RECORD, {**asdict(self.record), **parts})

    @classmethod
    def load(cls, run: str | Path) -> Scan:
        """Read a scan that :meth:`save` wrote.

        Raises:
            RequestError: a file is missing or damaged, or the tensors are not the ones that were saved.
        """
        run = require_made(Path(run) / SCAN_RECORD, "lcc-lens scan").parent
        fields = read_record(run / SCAN_RECORD, dict[str, Any], _AGAIN)
        record = convert(fields, ScanRecord, str(run / SCAN_RECORD), _AGAIN)
        parts = convert(fields, ScanParts, str(run / SCAN_RECORD), _AGAIN)
        tensors, _ = read_tensors(run / SCAN_TENSORS)
        if sha256_file(run / SCAN_TENSORS) != parts.scan_sha256:
            raise RequestError(f"expected {run / SCAN_TENSORS} as the scan wrote it, got a changed file; scan again")
        with reading(run / SCAN_RECORD, _AGAIN):
            sites = {name.split(".")[0] for name in tensors} & {"mlp", "resid"}
            scan = cls(
                record=record,
                heads=_statistics(tensors, "z", record.n_samples),
                components=LostComponents(**_below(tensors, "components"), n_samples=record.n_samples),
                others={cast("Site", site): _statistics(tensors, site, record.n_samples) for site in sorted(sites)},
                selected_by={
                    name: HeadScores(**vars(scores), **_below(tensors, f"scores.{name}"))
                    for name, scores in parts.selected_by.items()
                },
                tokens=tuple(
                    TokenLoss(**vars(token), loss=tensors[f"tokens.{i}"]) for i, token in enumerate(parts.tokens)
                ),
                causes=Causes.from_tensors(_below(tensors, "causes"), record.n_samples),
            )
        if not scan.head_map.fits(*scan.relative_loss.shape):
            raise RequestError(f"expected a head map of the scanned model in {run}, got another's; {_AGAIN}")
        return scan

    def _tensors(self) -> dict[str, Tensor]:
        components = {name: t for name, t in vars(self.components).items() if isinstance(t, Tensor)}
        groups = {"z": self.heads.tensors(), "components": components}
        groups |= {site: statistics.tensors() for site, statistics in self.others.items()}
        groups |= {f"scores.{n}": {"value": s.value, "stderr": s.stderr} for n, s in self.selected_by.items()}
        groups["causes"] = {} if self.causes is None else self.causes.tensors()
        groups["tokens"] = {str(i): token.loss for i, token in enumerate(self.tokens)}
        return {f"{group}.{name}": t.contiguous() for group, tensors in groups.items() for name, t in tensors.items()}


def _statistics(tensors: Mapping[str, Tensor], site: str, n_samples: int) -> DifferenceStatistics:
    return DifferenceStatistics(n_samples=n_samples, **_below(tensors, site))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
