"""An interrupted pruning run goes on where it stopped and ends with the same bits."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import flip_byte
from support.places import TESTS
from support.pruning import prune_tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from lcc_lens.core.errors import LensError
from lcc_lens.models.architecture.sparsity_patterns import Unstructured
from lcc_lens.pruning.calibration.finished_layers import FinishedLayers
from lcc_lens.pruning.calibration.stream import LayerStream

SHAPE = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 4, "vocab_size": 60}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "initializer_range": 0.4}
TOKENS = torch.randint(0, 60, (12, 9), generator=torch.Generator().manual_seed(3))
METHODS = ["wanda", "sparsegpt", "slimgpt", "magnitude"]
UNFINISHED = ".out.unfinished"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("dense") / "model"
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, **HEADS)).save_pretrained(path)
    return path


def run(source: Path, out: Path, method: Any, share: float = 0.3, **options: Any) -> dict[str, Any]:
    return prune_tokens(source, out, method, Unstructured(share), **{"calibration": TOKENS, "batch_size": 5, **options})


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Press Ctrl-C once so many layers are on disk."""
    add = FinishedLayers.add

    def prepare(n_layers: int) -> None:
        def adding(self: FinishedLayers, *args: Any) -> None:
            add(self, *args)
            if self.n_layers == n_layers:
                monkeypatch.setattr(FinishedLayers, "add", add)
                raise KeyboardInterrupt

        monkeypatch.setattr(FinishedLayers, "add", adding)

    return prepare


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_layers", [1, 3, 4])
def test_the_result_is_that_of_an_unbroken_run(
    method: str, n_layers: int, dense: Path, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    run(dense, tmp_path / "whole", method)
    stop_after(n_layers)
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / UNFINISHED).glob("layer_*.safetensors"))) == n_layers
    run(dense, tmp_path / "out", method)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_finished_layers_are_not_pruned_again(
    dense: Path, tmp_path: Path, stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "out", "wanda")
    observed: list[int] = []
    observe = LayerStream.observe

    def noting(self: LayerStream, *args: Any) -> None:
        observed.append(self._index)
        observe(self, *args)

    monkeypatch.setattr(LayerStream, "observe", noting)
    run(dense, tmp_path / "out", "wanda")
    assert observed == [3]


@pytest.mark.parametrize("change", [{"share": 0.4}, {"calibration": TOKENS + 0 * TOKENS.flip(0)[:1] - TOKENS % 2}])
def test_another_request_starts_anew(
    change: dict[str, Any], dense: Path, tmp_path: Path, stop_after: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "out", "wanda")
    run(dense, tmp_path / "out", "wanda", **change)
    assert "are of another request" in caplog.text
    run(dense, tmp_path / "whole", "wanda", **change)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [flip_byte, lambda layer: layer.write_bytes(layer.read_bytes()[:100])])
def test_a_damaged_layer_is_made_again(
    damage: Callable[[Path], Any], dense: Path, tmp_path: Path, stop_after: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run(dense, tmp_path / "whole", "sparsegpt")
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "out", "sparsegpt")
    damage(tmp_path / UNFINISHED / "layer_0001.safetensors")
    run(dense, tmp_path / "out", "sparsegpt")
    assert "layer 1 and the later ones are computed again" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_late_loses_no_finished_layer(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcc_lens.pruning.output import writing

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "copy_checkpoint", full)
        with pytest.raises(LensError, match="no space left on the disk"):
            run(dense, tmp_path / "out", "wanda")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / UNFINISHED).glob("layer_*"))) == 4
    run(dense, tmp_path / "out", "wanda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_pruning_resume as t
add = t.FinishedLayers.add
def adding(self, *args):
    add(self, *args)
    if self.n_layers == 2:
        os.kill(os.getpid(), signal.SIGKILL)
t.FinishedLayers.add = adding
t.run(Path({dense!r}), Path({out!r}), "sparsegpt")
"""


@pytest.mark.slow
def test_a_killed_process_loses_one_layer_at_most(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "whole", "sparsegpt")
    code = KILLED.format(paths=[str(Path(__file__).parent), str(TESTS)], dense=str(dense), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run(dense, tmp_path / "out", "sparsegpt")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
