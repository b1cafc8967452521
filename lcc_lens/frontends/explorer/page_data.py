"""The page's content as JSON: numbers, sentences and texts, none of it markup."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.scan.token_differences import TokenLoss
from lcc_lens.core.heads import all_heads
from lcc_lens.frontends.explorer.texts import TextReading, TextReadings
from lcc_lens.frontends.explorer.token_tables import TokenTables
from lcc_lens.frontends.explorer.verdict import verdict
from lcc_lens.frontends.explorer.views import View, removed_heads, views
from lcc_lens.frontends.run_contents import RunContents

#: Bytes of token losses on a page; further examples are left out. Base64 adds a third.
EXAMPLE_BYTES = 3_000_000
#: Components in the spectrum of a head.
SPECTRUM_COMPONENTS = 24
#: Points of a training curve.
_CURVE_POINTS = 800
ArrayType = Literal["float32", "uint8", "int32"]
_FORMATS = {"float32": "<f4", "uint8": "|u1", "int32": "<i4"}
_SITES = {"z": "attention heads", "mlp": "MLP", "resid": "residual stream"}


def page_data(
    run: RunContents,
    tokens: TokenTables | None,
    missing: str | Sequence[str] | None,
    *,
    texts: TextReadings | None = None,
    example_bytes: int = EXAMPLE_BYTES,
) -> dict[str, Any]:
    """Everything the page shows of one run.

    Args:
        run: the run.
        tokens: the tokens that its components promote.
        missing: why something is missing.
        texts: texts in all models, with their attention patterns.
        example_bytes: most bytes for the losses at the tokens of examples.
    """
    scan = run.scan
    examples = [] if scan is None else _examples(scan, example_bytes)
    notes = [missing] if isinstance(missing, str) else list(missing or ())
    read = () if texts is None else texts.texts
    if scan is None:
        notes.append("This run holds no scan, so there is no head map; run lcc-lens scan DENSE PRUNED RUN.")
    elif not scan.tokens:
        notes.append("The scan recorded no token-by-token examples.")
    elif len(examples) < len(scan.tokens):
        notes.append(f"{len(examples)} of {len(scan.tokens)} examples are shown, to limit the size of the page.")
    return {
        "name": run.path.resolve().name,
        "verdict": asdict(verdict(run)),
        "notes": notes,
        "path": str(run.path),
        "views": [_view(view) for view in views(run, read)],
        "heads": None if scan is None else _heads(scan),
        "layers": None if scan is None else _layers(scan),
        "examples": [_example(example) for example in examples],
        "texts": [_text(text) for text in read],
        "tokens": None if tokens is None else _tokens(tokens),
        "restored": _restored(run),
        "training": _training(run),
        "source": _source(run),
    }


def _view(view: View) -> dict[str, Any]:
    return {
        "key": view.key, "title": view.title, "unit": view.unit, "meaning": view.meaning, "value": packed(view.value),
        "stderr": None if view.stderr is None else packed(view.stderr), "examples": view.n_examples, "code": view.code,
        "prompt": view.prompt,
    }  # fmt: skip


def _heads(scan: Scan) -> dict[str, Any]:
    """Shapes, spectra and the head map."""
    n_layers, n_heads = scan.relative_loss.shape
    components, dense_heads = scan.components, scan.head_map.dense_heads
    n = min(SPECTRUM_COMPONENTS, components.n_determined)
    energy = components.singular_values.square()
    share = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    before = {head: dense_heads[head.layer][head.head] for head in all_heads(n_layers, n_heads)}
    return {
        "layers": n_layers,
        "heads": n_heads,
        "width": components.d_head,
        "share": packed(share[..., :n]),
        "coefficient": packed(components.coefficients[..., :n]),
        "removed": removed_heads(scan),
        "moved": {str(head): f"L{head.layer}H{old}" for head, old in before.items() if old != head.head},
    }


def _layers(scan: Scan) -> list[dict[str, Any]]:
    """Relative change of every site by layer, in percent."""
    sites = []
    for site, statistics in {"z": scan.heads, **scan.others}.items():
        difference, dense = (x.double().sum(1) for x in (statistics.squared_difference, statistics.squared_dense))
        value = 100 * (difference / dense.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        sites.append({"title": _SITES[site], "value": packed(value.float())})
    return sites


def _examples(scan: Scan, most_bytes: int) -> list[TokenLoss]:
    """The first examples that fit into so many bytes, at least one."""
    kept: list[TokenLoss] = []
    size = 0
    for example in scan.tokens:
        size += example.loss.numel()
        if kept and size > most_bytes:
            break
        kept.append(example)
    return kept


def _example(example: TokenLoss) -> dict[str, Any]:
    """Pieces of text, and every head's relative change at each of them in whole percent, at most 255."""
    percent = (100 * example.loss).nan_to_num(posinf=255.0).clamp(0, 255).round()
    return {"pieces": list(example.pieces), "response": example.loss_from, "loss": packed(percent, "uint8")}


def _text(text: TextReading) -> dict[str, Any]:
    """A text: the length of every head's output and its distance from the dense one's, in 255ths of the largest."""
    most = text.norm.amax((0, 1)).maximum(text.difference.amax((0, 1))).clamp_min(torch.finfo(torch.float32).tiny)
    sizes = {name: 255 * getattr(text, name) / most for name in ("norm", "difference")}
    return {
        "title": text.title, "kind": text.kind, "pieces": list(text.pieces), "models": list(text.models),
        "next": list(text.next_tokens), "most": packed(most),
        **{name: packed(value.round(), "uint8") for name, value in sizes.items()},
        "patterns": None if text.patterns is None else packed(text.patterns, "uint8"),
    }  # fmt: skip


def _tokens(tables: TokenTables) -> dict[str, Any]:
    """Token tables as indices into a list of texts, which many heads share."""
    ids = sorted(tables.texts)
    place = torch.full((max(ids, default=0) + 2,), -1, dtype=torch.int32)  # the last entry stands for no token
    place[ids] = torch.arange(len(ids), dtype=torch.int32)
    return {
        "vectors": list(tables.vectors),
        "texts": [tables.texts[i] for i in ids],
        "index": packed(place[tables.tokens.long()], "int32"),
        "logits": packed(tables.logits),
    }


def _restored(run: RunContents) -> dict[str, Any] | None:
    """The restored heads with their trained magnitudes."""
    restoration = run.restoration
    if restoration is None:
        return None
    means, heads = [], restoration.heads
    if run.scan is not None:
        means = [run.scan.mean_difference[head].norm() for head in heads]
    return {
        "method": restoration.record.method_shown,
        "heads": [str(head) for head in heads],
        "magnitudes": packed(restoration.magnitudes[:, :SPECTRUM_COMPONENTS]),
        "offset": packed(restoration.offset.norm(dim=-1) if heads else torch.zeros(0)),
        "norm": packed(restoration.constants.norm(dim=-1) if heads else torch.zeros(0)),
        "mean": packed(torch.stack(means) if means else torch.zeros(0)),
        "changes": len(restoration.changes),
        "losses": dict(run.losses),
    }


def _training(run: RunContents) -> dict[str, Any] | None:
    """The training curve, thinned to what a screen can show; every validation is kept."""
    if not run.steps:
        return None
    stride = -(-len(run.steps) // _CURVE_POINTS)
    kept = [step for i, step in enumerate(run.steps) if i % stride == 0 or step.validation_loss is not None]
    fields = {"step": "step", "loss": "loss", "validation": "validation_loss"}
    return {name: [getattr(step, field) for step in kept] for name, field in fields.items()}


def _source(run: RunContents) -> dict[str, Any]:
    """Provenance of the numbers: rows of a name and a text."""
    rows: dict[str, str] = {}
    scanned = run.scan.record if run.scan else None
    restored = run.restoration.record if run.restoration else None
    record = scanned or restored
    assert record is not None
    rows |= {"dense": record.dense, "pruned": record.pruned}
    if scanned is not None:
        if scanned.sparsity is not None:
            rows["zeros"] = f"{100 * scanned.sparsity:.1f} %, {scanned.pattern or 'no pattern'}"
        positions = scanned.positions if isinstance(scanned.positions, str) else ", ".join(map(str, scanned.positions))
        rows["scan"] = (
            f"{Path(scanned.data).name}: {scanned.n_examples} sequences, {scanned.n_samples:,} positions "
            f"({positions}), seed {scanned.seed}"
        )
    if restored is not None:
        rows["training"] = (
            f"{Path(restored.data).name}: {restored.n_examples} examples, seed {restored.seed}, {restored.method_shown}"
        )
        if restored.refit_shown is not None:
            rows |= {"pruned": restored.pruned_shown, "refit": restored.refit_shown}
    hashes = {"pruned": record.pruned_sha256} if restored is None else restored.pruned_hashes
    weights = {"dense": record.dense_sha256, **hashes}
    rows |= {f"{name} weights": sha256[:16] for name, sha256 in weights.items()} | {"lcc_lens": record.version}
    return {"rows": rows, "dense_name": Path(record.dense).name, "pruned_name": Path(rows["pruned"]).name}


def packed(tensor: Tensor, dtype: ArrayType = "float32") -> dict[str, Any]:
    """A tensor as JSON: its shape, and its little-endian bytes in base64, which the page reads as a typed array.

    Example:
        >>> import torch
        >>> packed(torch.tensor([1.0, 2.0]))["data"]
        'AACAPwAAAEA='
    """
    values = np.ascontiguousarray(tensor.detach().cpu().numpy().astype(_FORMATS[dtype]))
    return {"dtype": dtype, "shape": list(values.shape), "data": base64.b64encode(values.tobytes()).decode("ascii")}
