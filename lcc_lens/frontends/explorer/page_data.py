"""Everything that the page shows of a run, as JSON: numbers, words and texts, none of it markup."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.scan.token_differences import TokenLoss
from lcc_lens.core.heads import all_heads
from lcc_lens.frontends.explorer.arrays import packed
from lcc_lens.frontends.explorer.run_contents import RunContents
from lcc_lens.frontends.explorer.token_tables import TokenTables
from lcc_lens.frontends.explorer.verdict import verdict
from lcc_lens.frontends.explorer.views import views

#: Bytes of token losses that a page holds; examples beyond are left out. Base64 takes a third more.
EXAMPLE_BYTES = 3_000_000
#: Components whose spectrum a page draws per head.
SPECTRUM_COMPONENTS = 24
#: Points of a training curve.
_CURVE_POINTS = 800


def page_data(
    run: RunContents, tokens: TokenTables | None, missing: str | None, *, example_bytes: int = EXAMPLE_BYTES
) -> dict[str, Any]:
    """What the page shows of one run.

    Args:
        run: the run.
        tokens: the tokens of its components.
        missing: why there are none.
        example_bytes: what the losses at the tokens of examples may take.
    """
    examples = [] if run.scan is None else _examples(run.scan, example_bytes)
    notes = [missing] if missing else []
    if run.scan is None:
        notes.append("This run holds no scan, so there is no map of heads: lcc-lens scan DENSE PRUNED RUN.")
    elif not run.scan.tokens:
        notes.append("The scan kept no examples token by token.")
    elif len(examples) < len(run.scan.tokens):
        notes.append(
            f"{len(examples)} of {len(run.scan.tokens)} examples are shown; all would make the page too large."
        )
    return {
        "name": run.path.resolve().name,
        "verdict": asdict(verdict(run)),
        "notes": notes,
        "views": [view.to_json() for view in views(run)],
        "heads": None if run.scan is None else _heads(run.scan),
        "layers": None if run.scan is None else _layers(run.scan),
        "examples": [_example(example) for example in examples],
        "tokens": None if tokens is None else _tokens(tokens),
        "restored": _restored(run),
        "training": _training(run),
        "source": _source(run),
    }


def _heads(scan: Scan) -> dict[str, Any]:
    """Shapes, spectra and the head map."""
    n_layers, n_heads = scan.relative_loss.shape
    components = scan.components
    n = min(SPECTRUM_COMPONENTS, components.n_determined)
    energy = components.singular_values.square()
    share = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    mapping = scan.head_map
    moved = {
        str(head): f"L{head.layer}H{mapping.dense_heads[head.layer][head.head]}"
        for head in all_heads(n_layers, n_heads)
        if mapping.dense_heads[head.layer][head.head] != head.head
    }
    return {
        "layers": n_layers,
        "heads": n_heads,
        "width": components.d_head,
        "share": packed(share[..., :n]),
        "coefficient": packed(components.coefficients[..., :n]),
        "removed": [f"L{layer}H{head}" for layer, heads in enumerate(mapping.removed) for head in heads],
        "moved": moved,
    }


def _layers(scan: Scan) -> list[dict[str, Any]]:
    """The change of every site, layer by layer, in percent."""
    titles = {"z": "attention heads", "mlp": "MLP", "resid": "residual stream"}
    pooled = {"z": scan.heads, **scan.others}
    sites = []
    for site, found in pooled.items():
        energy, dense = found.squared_difference.double().sum(1), found.squared_dense.double().sum(1)
        value = 100 * (energy / dense.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        sites.append({"title": titles[site], "value": packed(value.float())})
    return sites


def _examples(scan: Scan, most_bytes: int) -> list[TokenLoss]:
    """The examples that fit, at least one."""
    kept: list[TokenLoss] = []
    size = 0
    for example in scan.tokens:
        size += example.loss.numel()
        if kept and size > most_bytes:
            break
        kept.append(example)
    return kept


def _example(example: TokenLoss) -> dict[str, Any]:
    """Pieces of text and, in whole percent up to 255, how much every head's output changed at each of them."""
    percent = (100 * example.loss).nan_to_num(posinf=255.0).clamp(0, 255).round()
    return {"pieces": list(example.pieces), "response": example.loss_from, "loss": packed(percent, "uint8")}


def _tokens(tables: TokenTables) -> dict[str, Any]:
    """Token tables with places in a list of texts for tokens, which many heads share."""
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
    """The heads that were restored, with what training made of their magnitudes."""
    found = run.restoration
    if found is None:
        return None
    norms = found.constants.norm(dim=-1) if found.heads else torch.zeros(0)
    return {
        "method": found.record.method,
        "heads": [str(head) for head in found.heads],
        "magnitudes": packed(found.magnitudes[:, :SPECTRUM_COMPONENTS]),
        "offset": packed(found.offset.norm(dim=-1) if found.heads else torch.zeros(0)),
        "norm": packed(norms),
        "mean": packed(_mean_norms(run)),
        "changes": len(found.changes),
        "losses": dict(run.losses),
    }


def _mean_norms(run: RunContents) -> torch.Tensor:
    """The length of every restored head's mean difference."""
    if run.scan is None or run.restoration is None or not run.restoration.heads:
        return torch.zeros(0)
    return torch.stack([run.scan.mean_difference[head].norm() for head in run.restoration.heads])


def _training(run: RunContents) -> dict[str, Any] | None:
    """The training curve, thinned to what a screen can show; validations are all kept."""
    if not run.steps:
        return None
    stride = -(-len(run.steps) // _CURVE_POINTS)
    kept = [step for i, step in enumerate(run.steps) if i % stride == 0 or step["validation_loss"] is not None]
    return {
        "step": [step["step"] for step in kept],
        "loss": [step["loss"] for step in kept],
        "validation": [step["validation_loss"] for step in kept],
    }


def _source(run: RunContents) -> dict[str, Any]:
    """Where the numbers come from: a name and a text each."""
    rows: dict[str, str] = {}
    record = run.scan.record if run.scan else None
    of = record or (run.restoration.record if run.restoration else None)
    assert of is not None
    rows |= {"dense": of.dense, "pruned": of.pruned}
    if record is not None:
        if record.sparsity is not None:
            rows["zeros"] = f"{100 * record.sparsity:.1f} %, {record.pattern or 'no pattern'}"
        positions = record.positions if isinstance(record.positions, str) else ", ".join(map(str, record.positions))
        rows["scan"] = (
            f"{Path(record.data).name}: {record.n_examples} sequences, {record.n_samples:,} positions ({positions}), "
            f"seed {record.seed}"
        )
    if run.restoration is not None:
        made = run.restoration.record
        rows["training"] = f"{Path(made.data).name}: {made.n_examples} examples, seed {made.seed}, {made.method}"
    rows |= {"dense weights": of.dense_sha256[:16], "pruned weights": of.pruned_sha256[:16], "lcc_lens": of.version}
    return {"rows": rows, "dense_name": Path(of.dense).name, "pruned_name": Path(of.pruned).name}
