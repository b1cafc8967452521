"""DenseStream: cached inputs and outputs of a layer equal those of further passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.models.architecture.linear_maps import find_matrices
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.refit import dense_stream as module
from lcc_lens.pruning.refit import refit as refit_module
from lcc_lens.pruning.refit.dense_stream import DenseStream
from lcc_lens.pruning.refit.refit import RefitConfig, refit_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.randint(1, 257, (20, 24), generator=torch.Generator().manual_seed(0))


def shown(stream: DenseStream, matrices: list[Any]) -> list[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    for _ in stream.batches_observed(matrices, lambda name, inputs: seen.append((name, inputs.clone()))):
        pass
    return seen


@pytest.mark.parametrize(("max_bytes", "passes"), [(2**30, 1), (0, 3), (1, 3)])
def test_answers_do_not_depend_on_what_is_kept(
    max_bytes: int, passes: int, dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = find_matrices(Checkpoint(dense_dir))
    streams = [LayerStream.of(dense_dir, TOKENS, 8, CPU, torch.float32) for _ in range(2)]
    cached, plain = DenseStream(streams[0], max_bytes=max_bytes), streams[1]
    runs, output = [0], LayerStream._output

    def counting(self: LayerStream, start: int) -> Tensor:
        runs[0] += self is streams[0]
        return output(self, start)

    monkeypatch.setattr(LayerStream, "_output", counting)
    for matrices in plan[:2]:
        cached.enter(matrices)
        for requested in (matrices[:3], matrices[3:]):
            expected: list[tuple[str, Tensor]] = []
            for _ in plain.batches_observed(
                requested, lambda name, inputs, to=expected: to.append((name, inputs.clone()))
            ):
                pass
            result = shown(cached, requested)
            assert [name for name, _ in result] == [name for name, _ in expected]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(result, expected, strict=True))
        cached.advance()
        plain.advance()
        assert all(torch.equal(a, b) for a, b in zip(cached.hidden_batches(), plain.hidden_batches(), strict=True))
    tried = 1 if max_bytes == 1 else 0  # one batch tells that it is too much
    assert runs[0] == 2 * 3 * passes + tried


def test_a_refit_has_the_same_bits_where_nothing_can_be_kept(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "tokens": TOKENS, "device": CPU, "dtype": torch.bfloat16, "provenance": {}, "config": RefitConfig(),
    }  # fmt: skip
    refit_checkpoint(dense_dir, pruned_dir, tmp_path / "kept", **settings)
    monkeypatch.setattr(refit_module, "DenseStream", partial(module.DenseStream, max_bytes=0))
    refit_checkpoint(dense_dir, pruned_dir, tmp_path / "again", **settings)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "again"))
    assert first == second
