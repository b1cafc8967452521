"""Which files are the model: what is not exactly one whole model is refused before anything runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import build_model, save_model

from lcc_lens.core.checkpoint import WEIGHTS, WEIGHTS_INDEX, Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json
from lcc_lens.core.rewriting import copy_checkpoint
from lcc_lens.evaluation.doctor import examine
from lcc_lens.frontends.cli.main import run as main_of
from lcc_lens.models.architecture.layers import read_config
from lcc_lens.models.architecture.whole_weights import require_complete
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.provenance import check_provenance
from lcc_lens.models.loading.references import resolve
from lcc_lens.pruning.jobs import prune
from lcc_lens.pruning.output import writing

Tensors = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(dense_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_dir, tmp_path / "model")


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / WEIGHTS)


def write(folder: Path, tensors: Tensors, name: str = WEIGHTS) -> None:
    save_file(tensors, folder / name, metadata={"format": "pt"})


def configure(folder: Path, **entries: object) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **entries})


def index(folder: Path, weight_map: dict[str, str], metadata: object = ()) -> None:
    write_json(folder / WEIGHTS_INDEX, {"metadata": {} if metadata == () else metadata, "weight_map": weight_map})


def shard(folder: Path, *, keep: bool = False) -> dict[str, str]:
    """Divide the weights into two shards with an index."""
    tensors = tensors_of(folder)
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        write(folder, {name: tensors[name] for name in names if weight_map[name] == file}, file)
    index(folder, weight_map)
    if not keep:
        (folder / WEIGHTS).unlink()
    return weight_map


def test_weights_of_another_name_beside_the_model_are_not_read(model: Path) -> None:
    other = save_model(build_model(seed=1), model.parent / "other")
    for name in ("model_old.safetensors", "model.fp16.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(other / WEIGHTS, model / name)
    index(model, dict.fromkeys(tensors_of(model), "model-00001-of-00002.safetensors"))  # left by save_pretrained
    assert Checkpoint(resolve(model)).weight_files == (model / WEIGHTS,)
    assert main_of(["prune", str(model), str(model.parent / "out"), "--method", "magnitude", "--quiet"]) == 0
    written = {file.name for file in (model.parent / "out").iterdir()}
    assert {name for name in written if "safetensors" in name} == {WEIGHTS}
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tensors_of(model.parent / "out")[embedding], tensors_of(model)[embedding])


def test_shards_in_one_folder_load(model: Path) -> None:
    whole = tensors_of(model)
    shard(model)
    assert Checkpoint(resolve(model)).tensors.keys() == whole.keys()
    (model / "model-00009-of-00009.safetensors").write_bytes(b"not read")
    assert len(Checkpoint(resolve(model)).weight_files) == 2


def in_a_subfolder(folder: Path) -> None:
    weight_map = shard(folder)
    (folder / "part").mkdir()
    first = min(weight_map.values())
    (folder / first).rename(folder / "part" / first)
    index(folder, {name: f"part/{file}" if file == first else file for name, file in weight_map.items()})


def outside(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    index(folder, dict.fromkeys(load_file(folder.parent / "elsewhere.safetensors"), "../elsewhere.safetensors"))


def absolute(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    file = folder.parent / "elsewhere.safetensors"
    index(folder, dict.fromkeys(load_file(file), str(file)))


def pickled(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    index(folder, dict.fromkeys(tensors_of(folder), "pytorch_model.bin"))
    (folder / WEIGHTS).unlink()


def half_listed(folder: Path) -> None:
    weight_map = shard(folder)
    index(folder, {name: file for name, file in weight_map.items() if name != Q})


def listed_elsewhere(folder: Path) -> None:
    weight_map = shard(folder)
    other = ({*weight_map.values()} - {weight_map[Q]}).pop()
    index(folder, {**weight_map, Q: other})


def twice(folder: Path) -> None:
    weight_map = shard(folder)
    for file in set(weight_map.values()):
        write(folder, {**load_file(folder / file), Q: torch.zeros(30, 40)}, file)


def renamed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")


def index_of_nothing(folder: Path) -> None:
    renamed(folder)
    (folder / WEIGHTS_INDEX).write_text("[]")


def edited(edit: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda folder: write(folder, edit(tensors_of(folder)))


def without(name: str) -> Callable[[Path], None]:
    return edited(lambda tensors: {n: t for n, t in tensors.items() if n != name})


def configured(**entries: object) -> Callable[[Path], None]:
    return lambda folder: configure(folder, **entries)


def with_file(name: str, content: str = "{}") -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / name).write_text(content)

    return add


def not_finite(name: str, value: float) -> Callable[[Path], None]:
    def edit(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[3] = value
        return tensors

    return edited(edit)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "two models": (lambda folder: shard(folder, keep=True) and None, "an index with shards of its own"),
    "a path to a subfolder": (in_a_subfolder, "names of safetensors files beside"),
    "a path out of the folder": (outside, "names of safetensors files beside"),
    "an absolute path": (absolute, "names of safetensors files beside"),
    "a pickle in the index": (pickled, "names of safetensors files beside .* got 'pytorch_model.bin'"),
    "another name in the configuration": (configured(transformers_weights="b.safetensors"), "got transformers_weights"),
    "an index that is a list": (index_of_nothing, "another layout"),
    "a name that the index lacks": (half_listed, "unknown to the index"),
    "a name in the wrong shard": (listed_elsewhere, "the tensors that .* lists"),
    "a name in two shards": (twice, "every tensor once"),
    "no index": (renamed, r"got model\.fp16\.safetensors and no index"),
    "a part of a divided model": (
        lambda f: shutil.copy(f / WEIGHTS, f / "shard-00000-model-00001-of-00001.safetensors") and None,
        "the parts of a divided one",
    ),
    "an adapter beside": (with_file("adapter_config.json"), "got a PEFT adapter"),
    "no embedding": (without("model.embed_tokens.weight"), r"got none named model\.embed_tokens\.weight"),
    "no norm": (without("model.norm.weight"), r"got none named model\.norm\.weight"),
    "no unembedding": (without("lm_head.weight"), r"got none named lm_head\.weight"),
    "a layer's tensor missing": (without(Q), "got none named"),
    "a bias that the config denies": (
        edited(lambda t: {**t, Q.replace("weight", "bias"): torch.ones(30)}), "which it ignores",
    ),
    "fewer layers in the config": (configured(num_hidden_layers=2), "which it ignores"),
    "more layers in the config": (configured(num_hidden_layers=4), "got none named"),
    "far more layers": (configured(num_hidden_layers=10**7), "expected weights of 10000000 layers"),
    "another width": (configured(intermediate_size=50), r"of shape \(40, 50\)"),
    "infinity in the final norm": (not_finite("model.norm.weight", float("inf")), "got NaN or infinity in model.norm"),
    "NaN in a matrix": (not_finite(Q, float("nan")), "got NaN or infinity in .*q_proj"),
    "int8": (edited(lambda t: {**t, Q: t[Q].to(torch.int8)}), "got I8 in .*, as quantised checkpoints have"),
    "float64": (edited(lambda t: {n: v.double() for n, v in t.items()}), "got float64 in"),
    "a pruning mask": (edited(lambda t: {**t, f"{Q}_mask": torch.ones(30, 40)}), "which it ignores"),
    "a mask in place of a weight": (
        edited(lambda t: {**{n: v for n, v in t.items() if n != Q}, f"{Q}_orig": t[Q]}), "got none named",
    ),
    "compressed tensors": (
        configured(compression_config={"quant_method": "compressed-tensors"}), "got compressed-tensors quantisation",
    ),
    "a quantised part": (configured(text_config={"quantization_config": {"quant_method": "awq"}}), "got awq quantis"),
    "an index without metadata": (
        lambda f: index(f, shard(f), None), "the object 'metadata' in",
    ),
    "settings that are no JSON": (with_file("generation_config.json", "{"), "expected JSON in .*generation_config"),
    "settings in a list": (with_file("tokenizer_config.json", "[]"), "another layout .expected object, got list"),
    "generation that cannot be": (
        with_file("generation_config.json", '{"max_new_tokens": -3}'), "settings that transformers takes in",
    ),
    "an infinity among the settings": (with_file("processor_config.json", '{"a": NaN}'), "expected finite numbers"),
    "a quantiser's file": (with_file("quantize_config.json"), r"got quantize_config\.json quantisation"),
    "a configuration of null": (with_file("config.json", "null"), "expected an object"),
    "heads of no size": (configured(head_dim=0), "expected a causal language model"),
    "an unknown activation": (configured(hidden_act="nonsense"), "expected a causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_one_whole_model_is_refused_and_doctor_says_the_same(kind: str, model: Path) -> None:
    damage, message = KINDS[kind]
    damage(model)
    with pytest.raises(RequestError, match=message) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)
    files = examine(model).model
    assert [finding.name for finding in files] == ["files"]
    assert f"{files[0].found}; {files[0].advice}".startswith(str(caught.value).rstrip("; ")[:60])


def test_every_command_refuses_and_writes_nothing(model: Path, pruned_dir: Path, text_file: Path) -> None:
    KINDS["no norm"][0](model)
    out, run, file = (str(model.parent / name) for name in ("out", "run", "file.json"))
    calls = [
        ["prune", str(model), out, "--method", "magnitude"],
        ["refit", str(model), str(pruned_dir), out, "--calibration", str(text_file)],
        ["refit", str(pruned_dir), str(model), out, "--calibration", str(text_file)],
        ["scan", str(model), str(pruned_dir), run],
        ["scan", str(pruned_dir), str(model), run],
        ["restore", str(model), str(pruned_dir), run],
        ["eval", str(model), "--tasks", str(text_file), "--out", file],
        ["compare", str(model), str(pruned_dir), run, "--methods", "lcc"],
        ["report", str(model), "--no-latency", "--out", file],
        ["prompts", str(model), str(pruned_dir), run],
        ["rewrite", "fit", str(pruned_dir), str(model), run],
    ]
    for call in calls:
        assert main_of([*call, "--quiet"]) == 2, call
    assert {entry.name for entry in model.parent.iterdir()} <= {"model", "cache"}
    assert main_of(["doctor", str(model)]) != 0


def test_masks_and_tables_of_old_checkpoints_are_no_weights(model: Path) -> None:
    tensors = tensors_of(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["model.layers.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    tensors["model.layers.0.attn.masked_bias"] = torch.tensor(-float("inf"))
    write(model, tensors)
    assert require_complete(Checkpoint(model)).path == model
    load_plain(model)


def test_code_and_kernels_that_a_configuration_names_are_not_obeyed(model: Path) -> None:
    kernel = "kernels-community/flash-attn"
    configure(model, attn_implementation=kernel, _attn_implementation=kernel, auto_map={"AutoModel": "own.M"})
    config = read_config(model)
    assert config._attn_implementation is None
    assert not hasattr(config, "auto_map")
    assert load_plain(model).config._attn_implementation in ("sdpa", "eager")


def test_replaced_weights_are_noticed_whatever_their_size_and_time(model: Path) -> None:
    checkpoint = Checkpoint(model)
    before, stat = checkpoint.sha256, (model / WEIGHTS).stat()
    checkpoint.require_unchanged(before)
    other = save_model(build_model(seed=1), model.parent / "other")
    shutil.copy(other / WEIGHTS, model / WEIGHTS)

    os.utime(model / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Checkpoint(model).sha256 == Checkpoint(other).sha256
    with pytest.raises(LensError, match="they were replaced meanwhile"):
        checkpoint.require_unchanged(before)


def test_a_pair_that_its_records_deny_is_refused(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    made, other = Checkpoint(pruned_dir), save_model(build_model(seed=1), tmp_path / "other")
    check_provenance(Checkpoint(dense_dir), made)
    with pytest.raises(RequestError, match=r"expected the dense model first, got .*swap the two"):
        check_provenance(made, Checkpoint(dense_dir))
    with pytest.raises(RequestError, match=r"expected the dense model that .* was made from .*as its record says"):
        check_provenance(Checkpoint(other), made)
    prune(pruned_dir, tmp_path / "again", method="magnitude", sparsity=0.7)
    again = Checkpoint(tmp_path / "again")
    check_provenance(made, again)
    check_provenance(Checkpoint(dense_dir), again)  # an ancestor
    (tmp_path / "again" / "pruning.json").write_text('{"dense_sha256": 3}')
    with pytest.raises(RequestError, match="another layout"):
        check_provenance(made, again)


def test_weights_replaced_while_a_job_reads_them_leave_no_model(
    dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = shutil.copytree(dense_dir, tmp_path / "model"), save_model(build_model(seed=1), tmp_path / "other")

    def replace_weights(*args: Any, **settings: Any) -> Any:
        shutil.copy(other / WEIGHTS, model / WEIGHTS)
        return copy_checkpoint(*args, **settings)

    monkeypatch.setattr(writing, "copy_checkpoint", replace_weights)
    with pytest.raises(LensError, match="they were replaced meanwhile"):
        prune(model, tmp_path / "out", method="magnitude")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LensError, match="to stay while they are read"), Checkpoint(model).read_at_once():
        shutil.copy(dense_dir / WEIGHTS, model / WEIGHTS)
