"""Does training block by block add to a refit? Decoder blocks learn the dense model's hidden states under the mask.

    python benchmarks/reconstruct.py [--folder runs/domains] [--parts refit-1-1e-4 ...]

SmolLM2-135M, Wanda 50 %; the refit, training blocks and held-out text of ``domains.py mix_51k_batch2``, whose runs are
in the folder. A window of neighbouring decoder blocks at a time: Adam trains their surviving weights and norm gains,
three epochs of steps of two sequences, towards the dense model's hidden states behind the window; the inputs are the
hidden states that the blocks trained before it give. A token's squared error counts relative to the squared norm of its
target. Finished parts are kept in ``benchmarks/reconstruct.json``. After Shin et al. (arXiv 2406.15524) and Free Lunch
(arXiv 2510.14444).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from domains import STUDIES, shared_settings
from run import describe, rounded
from torch import Tensor, nn

from lcc_lens.core.files import write_json
from lcc_lens.core.progress import shown, track
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.comparison.data import ComparisonData
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.panel import panel_losses, panel_recovery
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve

OUT = Path(__file__).parent / "reconstruct.json"
STUDY = "mix_51k_batch2"
#: What is trained from, blocks in a window, learning rate.
PARTS = ("refit-1-1e-4", "refit-1-3e-4", "refit-5-1e-4", "refit-5-3e-4", "pruned-1-3e-4", "pruned-5-3e-4")
EPOCHS = 3
BATCH = 2


def reconstructed(model: Any, dense: Any, tokens: Tensor, window: int, lr: float) -> None:
    """Train a model's decoder blocks in place, window by window."""
    inputs, targets = (embedded(some, tokens) for some in (model, dense))
    layers = list(zip(model.model.layers, dense.model.layers, strict=True))
    windows = [layers[start : start + window] for start in range(0, len(layers), window)]
    for some in track(windows, len(windows), "reconstructing"):
        ours, theirs = ([pair[side] for pair in some] for side in (0, 1))
        with torch.no_grad():
            targets = through(dense, theirs, targets)
        train(model, nn.ModuleList(ours), inputs, targets, lr)
        with torch.no_grad():
            inputs = through(model, ours, inputs)


def train(model: Any, blocks: nn.ModuleList, inputs: Tensor, targets: Tensor, lr: float) -> None:
    """Minimise the relative squared error behind some blocks; weights that are zero stay zero."""
    kept = [(parameter, parameter != 0) for parameter in blocks.requires_grad_(True).parameters()]
    optimiser = torch.optim.Adam([parameter for parameter, _ in kept], lr=lr)
    n_steps = EPOCHS * len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=n_steps)
    with torch.enable_grad():
        for chosen in shuffled(len(inputs)):
            error = (run(model, blocks, inputs[chosen]) - targets[chosen]).square().sum(-1)
            loss = (error / targets[chosen].square().sum(-1)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for parameter, mask in kept:
                    parameter.mul_(mask)
    blocks.requires_grad_(False)


def shuffled(n: int) -> Iterator[Tensor]:
    """Indices of every step's sequences."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        yield from torch.randperm(n, generator=generator).split(BATCH)


def embedded(model: Any, tokens: Tensor) -> Tensor:
    """The hidden states before the first block, in float32."""
    with torch.no_grad():
        hidden: Tensor = model.model.embed_tokens(tokens)
    return hidden.float()


def through(model: Any, layers: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """The hidden states behind some layers."""
    return torch.cat([run(model, layers, some) for some in hidden.split(8)])


def run(model: Any, layers: Any, hidden: Tensor) -> Tensor:
    """One batch through some layers, multiplied in bfloat16, summed in float32."""
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return hidden


def main() -> None:
    """Train the parts one after the other; measure each on the panel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/domains"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    study = STUDIES[STUDY]
    run_folder = asked.folder / STUDY
    data = ComparisonData(shared_settings(study), "smollm2", run_folder)
    tokenizer = load_tokenizer(resolve("smollm2"))
    sequences = data.training(Entry.parse("all-weights"), tokenizer, seed=0)
    texts = data.measures(tokenizer).texts
    folders = {"dense": resolve("smollm2"), "pruned": asked.folder / study.pruned, "refit": run_folder / "refit"}
    losses = {name: panel_losses(load_plain(folder), texts) for name, folder in folders.items()}
    results: dict[str, Any] = read_json(OUT) if OUT.exists() else {"parts": {}}
    results["parts"]["refit"] = recovered(losses, losses["refit"])
    dense = load_plain(folders["dense"], dtype=torch.float32)
    for part in asked.parts:
        if part in results["parts"]:
            continue
        start, window, lr = part.split("-", 2)
        model = load_plain(folders[start], dtype=torch.float32)
        begun = time.perf_counter()
        with shown():
            reconstructed(model, dense, torch.stack([some.tokens for some in sequences]), int(window), float(lr))
        seconds = time.perf_counter() - begun
        measured = recovered(losses, panel_losses(model.to(torch.bfloat16), texts))
        results["parts"][part] = {"seconds": round(seconds, 1), **measured}
        write_json(OUT, {"command": "python benchmarks/reconstruct.py", "machine": describe(), **results})
        print(part, results["parts"][part], flush=True)


def recovered(losses: dict[str, dict[str, float]], model: dict[str, float]) -> dict[str, Any]:
    """The fractions recovered, by kind of text, their mean and the worst."""
    found: dict[str, Any] = rounded(panel_recovery(losses["dense"], losses["pruned"], model))
    return {name: found[name] for name in ("mean", "worst", "domains")}


if __name__ == "__main__":
    main()
