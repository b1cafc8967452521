"""Memory and time by model size, into docs/scale.md: python benchmarks/memory_table.py

What was measured comes from benchmarks/seven_billion.json; the rest is computed from shapes by the functions here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import between

from lcc_lens.core.files import write_text
from lcc_lens.pruning.reconstruct.reconstruct import BYTES_PER_PARAMETER
from lcc_lens.restoration.in_memory import BYTES_PER_WEIGHT

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scale.md"
BEGIN, END = "<!-- tables: benchmarks/memory_table.py -->", "<!-- end of tables -->"

TOKENS_PER_BATCH = 1024
#: A scan's 256 examples of 150 tokens.
SCAN_TOKENS = 256 * 150
#: What of a card's peak a forward pass gets, and how fast layers come from a local SSD.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 0.4 * 989e12, 2e9
LOW_RANK, SHARE_OF_HEADS = 16, 0.25
#: A float32 number, its gradient and AdamW's two moments.
BYTES_PER_TRAINED = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_key_value_heads: int
    d_vocab: int
    is_tied: bool = False

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's linear maps."""
        d, kv, f = self.d_model, self.n_key_value_heads * self.d_head, self.d_mlp
        return ((d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d))

    @property
    def layer(self) -> int:
        """Weights of a layer, its two norms included."""
        return sum(n_in * n_out for n_in, n_out in self.maps) + 2 * self.d_model

    @property
    def around(self) -> int:
        """Weights around the layers: embedding, final norm, unembedding."""
        return self.d_vocab * self.d_model * (1 if self.is_tied else 2) + self.d_model

    @property
    def parameters(self) -> int:
        return self.n_layers * self.layer + self.around


MODELS = {
    "SmolLM2 135M": Shape(30, 576, 1536, 9, 3, 49152, is_tied=True),
    "Llama 3.2 1B": Shape(16, 2048, 8192, 32, 8, 128256, is_tied=True),
    "Llama 7B": Shape(32, 4096, 11008, 32, 32, 32000),
    "Llama 3.1 8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama 2 13B": Shape(40, 5120, 13824, 40, 40, 32000),
    "Llama 3.1 70B": Shape(80, 8192, 28672, 64, 8, 128256),
    "Llama 3.1 405B": Shape(126, 16384, 53248, 128, 8, 128256),
}


def weight_bytes(shape: Shape) -> int:
    """A model in bfloat16."""
    return 2 * shape.parameters


def streamed_bytes(shape: Shape) -> int:
    """What is in memory of a model with its layers on disk, in bfloat16: what is around them, and one layer."""
    return 2 * (shape.around + shape.layer)


def statistics_bytes(shape: Shape) -> int:
    """A scan's sums, float64: d_head x d_head second moments and totals per head, totals of MLP and residual stream,
    and six numbers per part."""
    per_layer = shape.n_heads * (shape.d_head**2 + shape.d_head + 6) + shape.d_mlp + shape.d_model + 12
    return 8 * shape.n_layers * per_layer


def wide_spectrum_bytes(shape: Shape, width: int) -> int:
    """The second moments of one wide site, float32, in blocks on and below the diagonal."""
    from lcc_lens.analysis.statistics import Triangle

    return 4 * shape.n_layers * Triangle.of(width).numel


def dense_side_bytes(shape: Shape, n_tokens: int) -> int:
    """What the dense model leaves for the pruned one, on disk, of so many positions at all three sites in bfloat16."""
    return 2 * shape.n_layers * n_tokens * (shape.d_model + shape.d_mlp + shape.d_model)


def trained_by_lcc(shape: Shape) -> int:
    """Magnitudes and offsets of a share of the heads."""
    return round(SHARE_OF_HEADS * shape.n_layers * shape.n_heads) * 2 * shape.d_head


def trained_by_best(shape: Shape) -> int:
    """Every linear map and norm of the layers."""
    return shape.n_layers * shape.layer


def trained_by_low_rank(shape: Shape) -> int:
    """A low rank on every linear map."""
    return shape.n_layers * LOW_RANK * sum(n_in + n_out for n_in, n_out in shape.maps)


def activation_bytes(shape: Shape, n_tokens: int = TOKENS_PER_BATCH, *, recomputed: bool = False) -> int:
    """What a backward pass keeps: 34 bytes per token, layer and d_model in 16 bit with fused attention, or only what
    enters each layer and one layer whole (Korthikanti et al. 2022, arXiv 2205.05198)."""
    layers = shape.n_layers * 2 + 34 if recomputed else shape.n_layers * 34
    return layers * n_tokens * shape.d_model


def scan_seconds(shape: Shape) -> float:
    """Both models' forward passes over a scan's tokens on one card."""
    return 2 * 2 * shape.parameters * SCAN_TOKENS / FLOPS_PER_SECOND


def streaming_seconds(shape: Shape) -> float:
    """Reading both models' layers from disk once per batch of a scan."""
    return 2 * (SCAN_TOKENS / TOKENS_PER_BATCH) * weight_bytes(shape) / BYTES_PER_SECOND


def size(n_bytes: float) -> str:
    """Two or three digits and a unit: 0.27 GB, 13.5 GB, 812 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= 0.995 * scale:
            value = n_bytes / scale
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * scale:
            return f"{seconds / scale:.2g} {unit}"
    return f"{seconds:.2g} s"


def rows(columns: dict[str, Any]) -> str:
    """A table with a row per model; every cell is computed."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, shape in MODELS.items():
        lines.append(f"| {name} | " + " | ".join(cell(shape) for cell in columns.values()) + " |")
    return "\n".join(lines)


def computed_tables() -> list[str]:
    """Memory of scanning, memory of restoring, time."""
    scanning = {
        "a model": lambda s: size(weight_bytes(s)),
        "layers on disk": lambda s: size(streamed_bytes(s)),
        "sums": lambda s: size(statistics_bytes(s)),
        "MLP spectrum": lambda s: size(wide_spectrum_bytes(s, s.d_mlp)),
        "dense side of 1,024 positions": lambda s: size(dense_side_bytes(s, TOKENS_PER_BATCH)),
    }
    restoring = {
        "lcc trains": lambda s: f"{trained_by_lcc(s):,}",
        "with AdamW": lambda s: size(BYTES_PER_TRAINED * trained_by_lcc(s)),
        "low rank trains": lambda s: f"{trained_by_low_rank(s):,}",
        "with AdamW ": lambda s: size(BYTES_PER_TRAINED * trained_by_low_rank(s)),
        "best takes": lambda s: size(BYTES_PER_WEIGHT * trained_by_best(s)),
        "reconstruct, one layer": lambda s: size(BYTES_PER_PARAMETER * s.layer),
        "activations of 1,024 tokens": lambda s: size(activation_bytes(s)),
        "recomputed": lambda s: size(activation_bytes(s, recomputed=True)),
    }
    time = {
        "scan on one card": lambda s: duration(scan_seconds(s)),
        "reading layers from disk": lambda s: duration(streaming_seconds(s)),
    }
    return [rows(scanning), rows(restoring), rows(time)]


def measured_table(study: dict[str, Any]) -> str:
    """Peak memory and time of every step, by size; every cell is measured."""
    steps = ("prune", "scan", "restore", "reconstruct", "export")
    lines = [
        "| weights | a model | threads | " + " | ".join(steps) + " |", "|---:|---:|---:|" + "---:|" * len(steps),
    ]  # fmt: skip
    for run in sorted(study["runs"].values(), key=lambda run: run["found"]["parameters"]):
        costs = [run["steps"].get(step) for step in steps]
        cells = [
            f"{c['peak_gib']:.1f} GiB ({c['peak_anonymous_gib']:.1f}), {duration(c['seconds'])}" if c else "not run"
            for c in costs
        ]
        found, threads = run["found"], run["machine"]["threads"]
        cells = [f"{found['parameters'] / 1e9:.2f}B", f"{found['dense_gb']:.2f} GB", str(threads), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> str:
    """What stands in the page."""
    study = json.loads((HERE / "seven_billion.json").read_text())
    scanning, restoring, time = computed_tables()
    return "\n\n".join([
        "**Measured**: peak resident memory of each step's process, of it anonymous, and time, on a CPU with "
        f"`--device-map disk` (`{study['command']}`).", measured_table(study),
        "**Computed**, memory of a scan, in bfloat16.", scanning,
        "**Computed**, memory of a training beside the models.", restoring,
        f"**Computed**, time of a scan of {SCAN_TOKENS:,} tokens: both models on an H100 at 40 % of its peak, or what "
        "reading their layers at 2 GB/s adds.", time,
    ])  # fmt: skip


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, between(page, f"{BEGIN}\n\n", f"\n\n{END}", tables()))


if __name__ == "__main__":
    main()
