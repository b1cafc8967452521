"""Configurations that transformers 4 reads as transformers 5 does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import build_model, save_model

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.rewriting import copy_checkpoint
from lcc_lens.core.side_files import with_older_entries

SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}


@pytest.mark.parametrize(
    ("config", "older"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
        ({"rope_parameters": SCALED}, {"rope_theta": 5e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 1e4, "rotary_pct": 0.5},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0}}, {}),
        ({"n_positions": 8}, {}),
    ],
)
def test_older_entries_are_added_and_nothing_is_changed(config: dict, older: dict) -> None:
    assert with_older_entries(config) == {**older, **config}


def test_copies_of_checkpoints_have_them(tmp_path: Path) -> None:
    model = build_model(rope_parameters={"rope_type": "default", "rope_theta": 123456.0})
    source = save_model(model, tmp_path / "source")
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    (tmp_path / "copy").mkdir()
    copy_checkpoint(Checkpoint(source), tmp_path / "copy", replaced={})
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["rope_theta"] == 123456.0
