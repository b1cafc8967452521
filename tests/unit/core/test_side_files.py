"""What is copied beside the weights: everything that belongs to the model, nothing of anybody else, no code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lcc_lens.core.checkpoint import WEIGHTS_INDEX, Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.core.rewriting import copy_checkpoint, rewrite_weights
from lcc_lens.core.side_files import UNTRUSTED_ENTRIES, side_files, with_older_entries


@pytest.fixture
def model(dense_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_dir, tmp_path / "model")


def copied(model: Path) -> Path:
    target = model.parent / "copy"
    target.mkdir()
    copy_checkpoint(Checkpoint(model), target, replaced={}, config={"a": 1})
    return target


def test_tokenizer_templates_and_licence_go_along_and_nothing_else(model: Path) -> None:
    belong = (
        "LICENSE", "LICENCE.md", "NOTICE", "USE_POLICY.md", "qwen.tiktoken", "vocab.bpe", "spiece.model",
        "additional_chat_templates/tool.jinja", "chat_template.jinja",
    )  # fmt: skip
    stay = ("model.py", "notes.csv", "training_args.bin", "README.md", "pytorch_model.bin.index.json", "optimizer.pt")
    (model / "additional_chat_templates").mkdir()
    for name in (*belong, *stay):
        (model / name).write_text("{}")
    target = copied(model)
    written = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    assert written == {*belong, *(file.name for file in model.iterdir() if file.is_file())} - {*stay}
    assert (target / "LICENSE").read_text() == "{}"


def test_no_setting_that_chooses_code_is_handed_on(model: Path) -> None:
    entries = dict.fromkeys(UNTRUSTED_ENTRIES, "kernels-community/flash-attn")
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, **entries, "text_config": entries})
    tokenizer = read_json(model / "tokenizer_config.json")
    write_json(model / "tokenizer_config.json", {**tokenizer, "auto_map": {"AutoTokenizer": ["own.T", None]}})
    target = copied(model)
    assert read_json(target / "config.json") == with_older_entries({**config, "text_config": {}, "a": 1})
    assert read_json(target / "tokenizer_config.json") == tokenizer


def test_a_link_to_elsewhere_is_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(RequestError, match=r"expected files of its own in .*, got the link notes\.txt to"):
        side_files(model)
    (model / "notes.txt").unlink()
    (model / "notes.txt").symlink_to(model / "generation_config.json")
    assert model / "notes.txt" in side_files(model)


def test_links_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert {file.name for file in side_files(snapshot)} == {file.name for file in side_files(model)}


def test_the_umask_counts(model: Path) -> None:
    before = os.umask(0o077)
    try:
        target = copied(model)
        rewrite_weights(target, max_shard_size="20KB")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in target.glob("*.safetensors")} == {0o600}


def test_the_index_counts_what_is_there(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = read_json(tmp_path / "shards" / WEIGHTS_INDEX)
    write_json(tmp_path / "shards" / WEIGHTS_INDEX, {**index, "metadata": {"total_parameters": 1, "total_size": 2}})
    target = tmp_path / "copy"
    target.mkdir()
    copy_checkpoint(Checkpoint(tmp_path / "shards"), target, replaced={})
    assert read_json(target / WEIGHTS_INDEX) == index
