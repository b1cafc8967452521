"""The reader of models on disk, and copies of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lcc_lens.core.checkpoint import WEIGHTS, WEIGHTS_INDEX, Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import sha256_file, write_json
from lcc_lens.core.reading import read_json
from lcc_lens.core.rewriting import copy_checkpoint, rewrite_weights
from lcc_lens.core.side_files import with_older_entries

NORM = "model.norm.weight"


@pytest.fixture
def sharded(dense_dir: Path, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(dense_dir).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards"


def test_headers_say_what_the_tensors_are(dense_dir: Path) -> None:
    checkpoint = Checkpoint(dense_dir)
    stored = load_file(dense_dir / "model.safetensors")
    assert checkpoint.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert checkpoint.tensors[name] == (dense_dir / "model.safetensors", tuple(tensor.shape), "F32")
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.config == read_json(dense_dir / "config.json")
    assert checkpoint.sha256 == sha256_file(dense_dir / "model.safetensors")
    assert checkpoint.n_bytes == (dense_dir / "model.safetensors").stat().st_size
    with pytest.raises(RequestError, match=r"expected the tensor nonsense in .*, got none of that name"):
        checkpoint.read("nonsense")


def test_shards_hold_the_same_tensors(dense_dir: Path, sharded: Path) -> None:
    whole, shards = Checkpoint(dense_dir), Checkpoint(sharded)
    assert len(shards.weight_files) > 1
    assert shards.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(shards.read(name), whole.read(name)) for name in whole.tensors)
    assert shards.sha256 != whole.sha256
    shards.weight_files[-1].unlink()
    with pytest.raises(RequestError, match=r"expected every shard of .*; fetch the checkpoint again"):
        Checkpoint(sharded).require_whole()


def test_a_new_object_sees_new_weights(dense_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(dense_dir, tmp_path / "model")
    before = Checkpoint(path).sha256
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "extra": torch.ones(2)}, path / "model.safetensors")
    assert Checkpoint(path).sha256 != before
    assert "extra" in Checkpoint(path).tensors


def test_names_may_lack_the_base_models_prefix(dense_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(dense_dir, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, path / "model.safetensors")
    assert Checkpoint(dense_dir).stored_name(NORM) == NORM
    assert Checkpoint(path).stored_name(NORM) == "norm.weight"
    assert Checkpoint(path).stored_name("model.absent") == "model.absent"


def test_what_is_no_checkpoint_is_refused(dense_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"got no config\.json there"):
        Checkpoint(tmp_path).require_whole()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"expected model\.safetensors in .*, got none"):
        Checkpoint(tmp_path).require_whole()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(RequestError, match=r"got the pickle pytorch_model\.bin; convert it"):
        Checkpoint(tmp_path).require_whole()
    (tmp_path / "model.safetensors").write_bytes((dense_dir / "model.safetensors").read_bytes()[:100])
    with pytest.raises(RequestError, match="got a damaged one"):
        _ = Checkpoint(tmp_path).tensors


def test_copying_refuses_unknown_and_misshapen_tensors(dense_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected the tensor nonsense"):
        copy_checkpoint(Checkpoint(dense_dir), tmp_path, replaced={"nonsense": torch.zeros(2)})
    with pytest.raises(RequestError, match=r"expected model\.norm\.weight of shape \(40,\), got \(2,\)"):
        copy_checkpoint(Checkpoint(dense_dir), tmp_path, replaced={NORM: torch.zeros(2)})


def test_a_copy_of_shards_lists_added_tensors(sharded: Path, tmp_path: Path) -> None:
    (sharded / "README.md").touch()
    (sharded / "pruning.json").write_text("{}")
    target = tmp_path / "copy"
    target.mkdir()
    copy_checkpoint(
        Checkpoint(sharded), target, replaced={NORM: torch.ones(40)}, added={"new": torch.ones(3)}, config={"a": 1}
    )
    before, after = Checkpoint(sharded), Checkpoint(target)
    assert after.tensors.keys() - before.tensors.keys() == {"new"}
    assert read_json(target / WEIGHTS_INDEX)["weight_map"]["new"] == after.weight_files[0].name
    assert after.config == with_older_entries({**before.config, "a": 1})
    assert {file.name for file in sharded.iterdir()} - {file.name for file in target.iterdir()} == {
        "README.md", "pruning.json",
    }  # fmt: skip
    untouched = before.tensors.keys() - {NORM}
    assert all(torch.equal(before.read(name), after.read(name)) for name in untouched)


def test_a_copy_of_a_single_shard_keeps_its_index_and_loads(dense_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(dense_dir, tmp_path / "model")
    name = "model-00001-of-00001.safetensors"
    (path / WEIGHTS).rename(path / name)
    weight_map = dict.fromkeys(Checkpoint(dense_dir).tensors, name)
    write_json(path / WEIGHTS_INDEX, {"metadata": {}, "weight_map": weight_map})
    target = tmp_path / "copy"
    target.mkdir()
    copy_checkpoint(Checkpoint(path), target, replaced={NORM: torch.full((40,), 2.0)})
    assert bool((AutoModelForCausalLM.from_pretrained(target).model.norm.weight == 2).all())


def test_rewriting_splits_tensors_and_packs_shards(dense_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(dense_dir, tmp_path / "model")
    before = Checkpoint(dense_dir)
    rewrite_weights(path, splits={NORM: [("first", 15), ("second", 25)]}, max_shard_size="20KB")
    after = Checkpoint(path)
    assert torch.equal(torch.cat([after.read("first"), after.read("second")]), before.read(NORM))
    assert len(after.weight_files) > 1
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors.keys() - {NORM})
