"""AttentionCache: passes from cached inputs give the same bits as whole passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import prune_family, save_family
from support.tiers import mostly_slow
from support.tiny import PARAGRAPHS
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.models.architecture.anatomy import output_projections
from lcc_lens.models.architecture.linear_maps import Matrix, find_matrices
from lcc_lens.pruning.calibration import stream as module
from lcc_lens.pruning.calibration.attention_cache import AttentionCache
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.refit.refit import RefitConfig, refit_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.randint(1, 250, (20, 24), generator=torch.Generator().manual_seed(0))


def outputs(stream: LayerStream) -> list[Tensor]:
    return list(stream.whole_batches([], lambda name, inputs: None))


def reads(stream: LayerStream, matrices: list[Matrix], settled: Matrix | None = None) -> list[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    for _ in stream.batches_observed(matrices, lambda n, x: seen.append((n, x.clone())), settled=settled):
        pass
    return seen


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often attention's kernel runs."""
    runs, kernel = [0], torch.nn.functional.scaled_dot_product_attention

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        runs[0] += 1
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    return runs


def test_attention_is_not_computed_again_before_a_settled_projection(
    dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = find_matrices(Checkpoint(dense_dir))[0]
    attention, mlp = output_projections(matrices)
    gates = [matrix for matrix in matrices if matrix.path.endswith(("gate_proj", "up_proj"))]
    runs = counted(monkeypatch)
    stream, plain = (LayerStream.of(dense_dir, TOKENS, 8, CPU, torch.float32) for _ in range(2))
    reads(stream, [attention], attention)
    runs[0] = 0
    new = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) / 10
    for one in (stream, plain):
        one.replace(attention, new)
    result = reads(stream, gates), reads(stream, [mlp, attention], mlp), outputs(stream)
    assert runs == [0]  # attention was left out all the time, also where only its projection changed
    expected = reads(plain, gates), reads(plain, [mlp, attention]), outputs(plain)
    assert runs == [3 * 3]
    for ours, theirs in zip(result[:2], expected[:2], strict=True):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(result[2], expected[2], strict=True))
    stream.advance()
    plain.advance()
    runs[0] = 0
    assert all(torch.equal(a, b) for a, b in zip(outputs(stream), outputs(plain), strict=True))
    assert runs == [6]  # the next layer runs as a whole


def test_a_change_before_the_projection_makes_attention_run_again(dense_dir: Path) -> None:
    matrices = find_matrices(Checkpoint(dense_dir))[0]
    attention = output_projections(matrices)[0]
    stream, plain = (LayerStream.of(dense_dir, TOKENS, 8, CPU, torch.float32) for _ in range(2))
    reads(stream, [attention], attention)
    value = next(matrix for matrix in matrices if matrix.path.endswith("v_proj"))
    for one in (stream, plain):
        one.replace(value, torch.randn(6, 40, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(a, b) for a, b in zip(outputs(stream), outputs(plain), strict=True))


def test_nothing_is_cached_for_other_projections_or_beyond_the_limit(
    dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = find_matrices(Checkpoint(dense_dir))[0]
    attention = output_projections(matrices)[0]
    runs, enough = counted(monkeypatch), 3 * 8 * 24 * 30 * 4  # three batches of 8 x 24 tokens, 30 numbers of 4 bytes
    for most, settled in ((2**31, matrices[0]), (enough - 1, attention), (enough, attention)):
        monkeypatch.setattr(module, "MOST_BYTES", most)
        stream = LayerStream.of(dense_dir, TOKENS, 8, CPU, torch.float32)
        reads(stream, [settled], settled)
        runs[0] = 0
        outputs(stream)
        assert runs == [0 if most == enough else 3]


class Layer(nn.Module):
    """A module whose output is its projection's, or only looks like it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.part = Part(kind)

    def forward(self, x: Tensor) -> Tensor:
        result = self.part(x)
        return x + (result[0] if isinstance(result, tuple) else result)


class Part(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.map = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        out = self.map(x.tanh())
        if self.kind == "changed in place":
            out += 1
        if self.kind == "twice":
            return self.map(out)
        return {"with weights": (out, x), "with none": (out, None), "scaled": 2 * out}.get(self.kind, out)


@pytest.mark.parametrize(("kind", "spares"), [
    ("alone", True), ("with none", True), ("with weights", False), ("scaled", False), ("changed in place", False),
    ("twice", False),
])  # fmt: skip
def test_only_modules_that_give_exactly_the_projection_are_cached(kind: str, spares: bool) -> None:
    layer, x, cache = Layer(kind), torch.randn(2, 3, 4), AttentionCache(2**20)
    with torch.no_grad(), cache.recording(layer, "part.map", 1) as after:
        expected = layer(x)
        after(0)
    runs = []
    layer.part.map.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), cache.applied(0):
        got = layer(torch.zeros_like(x)) + x  # the cached module ignores its new input
    assert torch.equal(got, expected) == spares
    assert "forward" not in layer.part.__dict__
    assert len(runs) == (2 if kind == "twice" else 1)


@pytest.mark.parametrize(
    "family",
    mostly_slow(["llama", "gemma2", "phi3", "gpt2", "gpt_neox", "falcon", "bloom", "mpt"], "llama", "phi3", "falcon"),
)
def test_refits_have_the_same_bits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(PARAGRAPHS))
    dense, pruned = save_family(family, tmp_path / "dense"), tmp_path / "pruned"
    prune_family(family, dense, pruned, text)
    settings: dict[str, Any] = {
        "tokens": TOKENS, "device": CPU, "dtype": torch.float32, "provenance": {}, "config": RefitConfig(),
    }  # fmt: skip
    refit_checkpoint(dense, pruned, tmp_path / "kept", **settings)
    monkeypatch.setattr(module, "MOST_BYTES", 0)
    refit_checkpoint(dense, pruned, tmp_path / "again", **settings)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "again"))
    assert first == second
