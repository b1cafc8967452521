"""The masked refit of a whole checkpoint: zeros stay, the model comes nearer to the dense one, and runs go on."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import build_model, save_model
from transformers import AutoModelForCausalLM

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors
from lcc_lens.core.reading import read_json
from lcc_lens.data.datasets import load_data
from lcc_lens.frontends.cli.pruning import LeastSquares, Refit, RefitCalibration
from lcc_lens.models.architecture.zeros import compare_zeros
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning import jobs as pruning_jobs
from lcc_lens.pruning.calibration.texts import calibration_tokens
from lcc_lens.pruning.refit import refit as module
from lcc_lens.pruning.refit.refit import REFIT_RECORD, RefitConfig, refit_checkpoint
from lcc_lens.restoration import restore as recipe
from lcc_lens.restoration.training_data import training_sequences

CPU = torch.device("cpu")
TOKENS = torch.randint(1, 257, (24, 40), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(1, 257, (16, 40), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"tokens": TOKENS, "device": CPU, "dtype": torch.float32, "provenance": {"data": "random"}}


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(HELD_OUT).logits.log_softmax(-1)


def divergence(path: Path, dense: Path) -> float:
    expected = logits(dense)
    return float((expected.exp() * (expected - logits(path))).sum(-1).mean())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path / "model.safetensors")[0]


@pytest.mark.parametrize("follow", [0.0, 0.5, 1.0])
def test_zeros_stay_and_the_model_comes_nearer(
    follow: float, dense_dir: Path, pruned_dir: Path, tmp_path: Path
) -> None:
    report = refit_checkpoint(
        dense_dir, pruned_dir, tmp_path / "refit", config=RefitConfig(follow, mend=0.0), **SETTINGS
    )
    assert compare_zeros(pruned_dir, tmp_path / "refit").is_equal
    assert divergence(tmp_path / "refit", dense_dir) < 0.9 * divergence(pruned_dir, dense_dir)
    assert report == read_json(tmp_path / "refit" / REFIT_RECORD)
    assert len(report["error_left"]) == 3 * 7
    if follow == 0:
        assert max(report["error_left"].values()) < 1
    before, after = weights(pruned_dir), weights(tmp_path / "refit")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report["error_left"])


def test_first_map_equals_least_squares_on_its_own_inputs(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    """The first layer's query projection reads normalised embeddings, which no pruning touches."""
    refit_checkpoint(dense_dir, pruned_dir, tmp_path / "refit", config=RefitConfig(0.0, ridge=1e-3), **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(pruned_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        X = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS)).flatten(0, 1).double()
    name = "model.layers.0.self_attn.q_proj.weight"
    dense, pruned, found = (weights(path)[name].double() for path in (dense_dir, pruned_dir, tmp_path / "refit"))
    pull = 1e-3 * float((X * X).sum(0).mean())
    for row in range(len(dense)):
        columns = pruned[row].nonzero()[:, 0]
        samples = torch.cat([X[:, columns], pull**0.5 * torch.eye(len(columns), dtype=torch.float64)])
        wanted = torch.cat([X @ dense[row], pull**0.5 * dense[row, columns]])
        assert torch.allclose(found[row, columns], torch.linalg.lstsq(samples, wanted).solution, atol=1e-4)


def test_output_maps_make_up_for_what_the_stream_lacks(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    """The last layer's output maps equal weighted least squares to the dense outputs plus half of the stream's gap."""
    config = RefitConfig(mend=0.5, ridge=1e-3)
    refit_checkpoint(dense_dir, pruned_dir, tmp_path / "refit", config=config, **SETTINGS)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense_dir, tmp_path / "refit")]
    for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        path = f"model.layers.2.{part}.{name}"
        (r_dense, x_dense), (r, x) = (reads(model, path, part) for model in models)
        dense, pruned, found = (
            weights(p)[f"{path}.weight"].double() for p in (dense_dir, pruned_dir, tmp_path / "refit")
        )
        size = r_dense if part == "self_attn" else reads(models[0], path, "self_attn")[0]
        weight = size.square().mean(-1, keepdim=True).rsqrt()
        weight = weight.clamp(max=10 * float(weight.median()))
        wanted = weight * (x_dense @ dense.T + 0.5 * (r_dense - r))
        X = weight * x
        pull = 1e-3 * float((X * X).sum(0).mean())
        for row in range(len(dense)):
            columns = pruned[row].nonzero()[:, 0]
            samples = torch.cat([X[:, columns], pull**0.5 * torch.eye(len(columns), dtype=torch.float64)])
            target = torch.cat([wanted[:, row], pull**0.5 * dense[row, columns]])
            assert torch.allclose(found[row, columns], torch.linalg.lstsq(samples, target).solution, atol=1e-3)


@pytest.mark.parametrize("follow", [0.5, 1.0])
def test_reading_maps_follow_the_dense_model(follow: float, dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    """The last layer's gate projection equals least squares to what dense weights give on inputs in between."""
    refit_checkpoint(dense_dir, pruned_dir, tmp_path / "refit", config=RefitConfig(follow, ridge=1e-3), **SETTINGS)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense_dir, tmp_path / "refit")]
    path = "model.layers.2.mlp.gate_proj"
    x_dense, x = (reads(model, path, "mlp")[1] for model in models)
    dense, pruned, found = (weights(p)[f"{path}.weight"].double() for p in (dense_dir, pruned_dir, tmp_path / "refit"))
    wanted = torch.lerp(x, x_dense, follow) @ dense.T
    pull = 1e-3 * float((x * x).sum(0).mean())
    for row in range(len(dense)):
        columns = pruned[row].nonzero()[:, 0]
        samples = torch.cat([x[:, columns], pull**0.5 * torch.eye(len(columns), dtype=torch.float64)])
        target = torch.cat([wanted[:, row], pull**0.5 * dense[row, columns]])
        assert torch.allclose(found[row, columns], torch.linalg.lstsq(samples, target).solution, atol=1e-3)


@torch.no_grad()
def reads(model: Any, path: str, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the residual stream holds before a part of the last layer, and the inputs of a linear layer there."""
    kept: dict[str, torch.Tensor] = {}
    norm = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}[part]
    places = {"stream": model.model.layers[2].get_submodule(norm), "inputs": model.get_submodule(path)}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: kept.__setitem__(name, args[0].flatten(0, 1).double())
        )
        for name, module in places.items()
    ]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    return kept["stream"], kept["inputs"]


def test_maps_of_a_layer_see_what_was_refitted_before_them(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    found = module._groups
    monkeypatch.setattr(
        module, "_groups", lambda *args: groups.append([[m.path for m in g] for g in found(*args)]) or found(*args)
    )
    refit_checkpoint(dense_dir, pruned_dir, tmp_path / "refit", **SETTINGS)
    attention = [[f"self_attn.{name}_proj" for name in part] for part in ("qkv", "o")]
    assert groups == 3 * [[*attention, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]]


@pytest.mark.parametrize("follow", [0.0, 0.5, 1.0])
def test_a_refit_that_was_stopped_goes_on_to_the_same_bits(
    follow: float, dense_dir: Path, pruned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RefitConfig(follow, mend=0.0 if follow == 1 else 0.5)
    whole = refit_checkpoint(dense_dir, pruned_dir, tmp_path / "whole", config=config, **SETTINGS)
    run, layers = module._LayerRefit.run, []

    def stopping(self: Any, *args: Any) -> Any:
        layers.append(1)
        if len(layers) == 3:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(module._LayerRefit, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        refit_checkpoint(dense_dir, pruned_dir, tmp_path / "broken", config=config, **SETTINGS)
    assert not (tmp_path / "broken").exists()
    report = refit_checkpoint(dense_dir, pruned_dir, tmp_path / "broken", config=config, **SETTINGS)
    assert len(layers) == 4
    assert report == whole
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


def test_other_models_are_refused(dense_dir: Path, pruned_dir: Path, tmp_path: Path) -> None:
    wider = save_model(build_model(intermediate_size=48), tmp_path / "wider")
    with pytest.raises(RequestError, match="expected a dense model and the same model with zeros"):
        refit_checkpoint(wider, pruned_dir, tmp_path / "refit", **SETTINGS)
    other_heads = save_model(build_model(num_key_value_heads=5), tmp_path / "heads")  # maps read as many as before
    with pytest.raises(RequestError, match="expected a dense model and the same model with zeros"):
        refit_checkpoint(other_heads, pruned_dir, tmp_path / "refit", **SETTINGS)
    with pytest.raises(RequestError, match="already"):
        refit_checkpoint(dense_dir, pruned_dir, shutil.copytree(pruned_dir, tmp_path / "there"), **SETTINGS)
    assert not (tmp_path / "refit").exists()


def test_calibration_is_split_evenly_and_named(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.txt").write_text("\n\n".join(f"{i} xylophones: " + "x" * 80 for i in range(60)))
    texts = [load_data(name, role="calibration") for name in (str(text_file), str(tmp_path / "other.txt"))]
    passed: dict[str, Any] = {}
    monkeypatch.setattr(pruning_jobs, "refit_checkpoint", lambda *_, **settings: passed.update(settings) or {})
    pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / "refit", calibration=texts, n_samples=5, seq_len=16)
    parts = [calibration_tokens(text, pruned_dir, n, 16, 0) for text, n in zip(texts, (3, 2), strict=True)]
    assert torch.equal(passed["tokens"], torch.cat(parts)[[0, 3, 1, 4, 2]])  # in turn
    assert not torch.equal(parts[0][:2], parts[1])
    told = passed["provenance"]
    assert told["data"] == "+".join(text.name for text in texts)
    assert told["source"] == [text.source for text in texts]
    assert told["groups"] == sorted(texts[0].groups | texts[1].groups)
    assert passed["config"] == RefitConfig()


def test_the_command_s_defaults_are_the_function_s() -> None:
    named = {name: one.default for name, one in inspect.signature(pruning_jobs.refit).parameters.items()}
    for name in ("calibration", "n_samples", "seq_len", "follow", "ridge", "mend", "seed"):
        options = next(options for options in (Refit, RefitCalibration, LeastSquares) if hasattr(options, name))
        assert getattr(options, name) == named[name]


def test_one_data_set_needs_no_list(dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path) -> None:
    named, loaded, listed = str(text_file), load_data(str(text_file), role="calibration"), [text_file]
    reports = [
        pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / str(i), calibration=calibration, n_samples=2, seq_len=16)
        for i, calibration in enumerate((named, loaded, listed))
    ]
    assert reports[0]["calibration"]["sequences"] == 2
    assert reports[0] == reports[1] == reports[2]


def test_pruning_and_refit_take_the_same_data(dense_dir: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().replace("Paragraph", "Section"))
    few: dict[str, Any] = {"n_samples": 2, "seq_len": 16}
    lists = ([text_file, other], [str(text_file), str(other)], f"{text_file}+{other}")
    reports = [pruning_jobs.prune(dense_dir, tmp_path / str(i), calibration=one, **few) for i, one in enumerate(lists)]
    assert reports[0]["calibration"]["groups"] == reports[1]["calibration"]["groups"]
    assert {report["calibration"]["sequences"] for report in reports} == {2}
    for number, one in enumerate(lists):
        with pytest.raises(RequestError, match="at least one calibration sequence of each data set, got 1 for 2"):
            pruning_jobs.prune(dense_dir, tmp_path / f"few{number}", calibration=one, n_samples=1, seq_len=16)
    with pytest.raises(RequestError, match="expected data to calibrate on, got none"):
        pruning_jobs.prune(dense_dir, tmp_path / "none", calibration=[])


def test_a_second_refit_remembers_the_first_one_s_data(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"n_samples": 2, "seq_len": 16}
    first, second = (load_data(str(text_file), role=role) for role in ("calibration", "train"))
    assert not first.groups & second.groups
    pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / "once", calibration=first, **few)
    record = pruning_jobs.refit(dense_dir, tmp_path / "once", tmp_path / "twice", calibration=second, **few)
    assert set(record["calibration"]["groups"]) == first.groups | second.groups
    with pytest.raises(RequestError, match="expected data to calibrate on, got none"):
        pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / "none", calibration=[])


def test_training_may_not_use_what_the_refit_read(
    pair: Any, dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The pruning read other groups, so that the refit's record alone decides."""
    data = load_data(str(text_file), role="train")
    pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / "refit", calibration=data, n_samples=2, seq_len=16)
    assert training_sequences(pair, None, data, None, 32, None, None)[0]
    with pytest.raises(
        RequestError, match="expected training data and the pruning's calibration data without a shared"
    ):
        recipe.restore(load_pair(dense_dir, tmp_path / "refit"), None, [], data, method="norms", max_length=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "ridge above 0"),
        ({"ridge": float("inf")}, "ridge above 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"follow": 1.5}, "follow of at least 0 and at most 1, got 1.5"),
        ({"mend": -0.1}, "mend of at least 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RefitConfig(**settings)


@pytest.mark.parametrize("names", ["self", "self+{text}", ("{text}", "self")])
def test_text_of_the_dense_model_is_kept_beside_the_output(
    dense_dir: Path, pruned_dir: Path, text_file: Path, tmp_path: Path, names: str | tuple[str, ...]
) -> None:
    chosen = names.format(text=text_file) if isinstance(names, str) else tuple(n.format(text=text_file) for n in names)
    n_parts = 1 if names == "self" else 2
    report = pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / "out", calibration=chosen, n_samples=4, seq_len=32)
    file = tmp_path / "out_self_written_calibration_0.jsonl"
    sources, lines = report["calibration"]["source"], file.read_text().splitlines()
    assert str(file) in sources
    assert len(sources) == n_parts
    assert sum(len(json.loads(line)["text"]) for line in lines) >= 4 // n_parts * 32  # a byte is a token
    pruned = pruning_jobs.prune(dense_dir, tmp_path / "pruned", calibration=chosen, n_samples=4, seq_len=32)
    assert pruned["calibration"]["sequences"] == 4


def test_nothing_is_written_by_the_model_where_the_output_exists(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "own").touch()
    with pytest.raises(RequestError, match="exists already"):
        pruning_jobs.refit(dense_dir, pruned_dir, tmp_path / "out", calibration="self", n_samples=4, seq_len=32)
    assert not list(tmp_path.glob("*self_written*"))
