"""The whole method in one call leaves three models and their scores."""

from __future__ import annotations

from pathlib import Path

import lcc_lens as lcc
from lcc_lens.models.architecture.zeros import compare_zeros


def test_the_whole_method_in_one_call(dense_dir: Path, text_file: Path, question_file: Path, tmp_path: Path) -> None:
    results = lcc.prune_and_restore(
        dense_dir, tmp_path, [str(text_file)], calibration=str(text_file), n_samples=4, seq_len=32,
        scan_data=str(question_file), train_data=str(question_file), selector="mse", limit=2,
    )  # fmt: skip
    assert list(results["models"]) == ["dense", "pruned", "restored"]
    assert compare_zeros(tmp_path / "pruned", tmp_path / "restored").is_equal
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"scan.json", "restoration.safetensors", "metrics.json"} <= written
