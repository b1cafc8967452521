"""The efficiency report: the contract of report.json, fair rounds, and sentences that follow from the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.matrices import edited, sparse_model
from support.tiny import build_model, save_model

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.efficiency.report import report
from lcc_lens.evaluation.efficiency.report_text import findings, size_table, time_table
from lcc_lens.evaluation.efficiency.timing import (
    WARM_UP,
    interleaved,
    median_interval,
    spread_tokens,
    time_decode,
    time_prefill,
)
from lcc_lens.evaluation.evaluate import unique_names
from lcc_lens.frontends.cli.main import run

SHORT = {"repeats": 3, "prompt_tokens": 9, "new_tokens": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    sparse = save_model(sparse_model(), folder / "sparse")
    return {
        "dense": save_model(build_model(head_dim=8), folder / "dense"),
        "sparse": sparse,
        "almost": edited(sparse, folder / "almost", "model.layers.1.mlp.up_proj.weight", lambda w: w[0, :4].fill_(1)),
        "narrow": save_model(build_model(head_dim=8, intermediate_size=36), folder / "narrow"),
    }


@pytest.fixture(scope="module")
def found(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return report(list(checkpoints.values()), **SHORT)


def call(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def test_the_contract(found: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    json.dumps(found, allow_nan=False)
    assert list(found["models"]) == list(checkpoints)
    patterns = [entry["pattern"] for entry in found["models"].values()]
    assert patterns == ["dense", "2:4", "unstructured", "dense"]
    for name, entry in found["models"].items():
        assert entry["path"] == str(checkpoints[name])
        assert entry["bytes"] == (checkpoints[name] / "model.safetensors").stat().st_size > entry["bytes_zstd"] > 0
        assert entry["nonzero_parameters"] < entry["parameters"]
        assert (entry["dtype"], entry["missing_parameters"]) == ("float32", [])
        assert entry["loads_in_transformers"] is True
        matrices = entry["matrices"].values()
        assert entry["sparsity"] == sum(m["zeros"] for m in matrices) / sum(m["bytes"] / 4 for m in matrices)
        for kind, n_tokens in (("prefill", 9), ("decode", 2)):
            times = entry[f"{kind}_ms"]
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert (times["repeats"], times["tokens"]) == (3, n_tokens)
            ratio = found["ratios"][name][kind]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["models"]["sparse"]["sparsity"] == 0.5
    assert found["models"]["narrow"]["parameters"] == found["models"]["dense"]["parameters"] - 3 * 3 * 8 * 40
    assert found["ratios"]["dense"]["decode"] == {"median": 1, "low": 1, "high": 1, "coverage": 0.75}
    assert found["machine"]["dtype"] == "float32"
    assert found["settings"]["repeats"] == 3
    assert found["version"]


def test_sparse_kernels_are_recorded_as_not_run(found: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    sparse, almost = found["models"]["sparse"], found["models"]["almost"]
    assert sparse["prefill_semi_structured_ms"] is almost["prefill_semi_structured_ms"] is None
    assert sparse["semi_structured_note"].startswith("not run: expected a CUDA device for 2:4 kernels, got cpu")
    assert almost["semi_structured_note"] is None


def test_zeros_are_held_against_the_first_pruned_model(found: dict[str, Any]) -> None:
    patterns = found["zero_patterns"]
    assert patterns["reference"] == "sparse"
    assert list(patterns["models"]) == ["dense", "almost", "narrow"]
    almost = patterns["models"]["almost"]
    assert (almost["is_equal"], almost["matrices"], almost["equal_matrices"]) == (False, 21, 20)
    assert (almost["only_first"], almost["only_second"]) == (2, 0)
    assert list(almost["different"]) == ["model.layers.1.mlp.up_proj.weight"]
    assert "no zeros to compare" in patterns["models"]["narrow"]["note"]


def test_a_model_of_another_shape_gets_a_note(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    narrow = save_model(sparse_model(intermediate_size=36), tmp_path / "sliced")
    patterns = report([checkpoints["sparse"], narrow], latency=False)["zero_patterns"]
    assert "of the same shape in both" in patterns["models"]["sliced"]["note"]


def test_without_latency_nothing_is_loaded(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lcc_lens.evaluation.efficiency.timing.load_plain")
    found = report([checkpoints["sparse"], checkpoints["sparse"]], latency=False)
    assert list(found["models"]) == unique_names([str(checkpoints["sparse"])] * 2)
    assert found["ratios"] == {}
    for entry in found["models"].values():
        assert entry["prefill_ms"] is entry["decode_ms"] is entry["loads_in_transformers"] is None
        assert entry["semi_structured_note"] == "not run: times were not requested"
    same = next(iter(found["zero_patterns"]["models"].values()))
    assert (same["is_equal"], same["different"]) == (True, {})
    assert time_table(found)[1] == []
    assert any("same zeros, 21 of 21 matrices" in sentence for sentence in findings(found))


def test_names_are_unique() -> None:
    assert unique_names(["out/x", "smollm2", "smollm2"]) == ["x", "smollm2", "smollm2 (2)"]
    assert unique_names(["a/x", "b/x", "a/x"]) == ["a/x", "b/x", "a/x (2)"]


def test_refusals(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    dense = checkpoints["dense"]
    with pytest.raises(RequestError, match="expected at least one model, got none"):
        report([])
    with pytest.raises(RequestError, match="expected repeats of at least 1, got 0"):
        report([dense], repeats=0)
    with pytest.raises(RequestError, match="expected at most 512 tokens for dense, got 513"):
        report([dense], prompt_tokens=513)
    with pytest.raises(RequestError, match="expected at most 512 tokens for dense, got 516"):
        report([dense], new_tokens=500)


def test_jobs_take_turns() -> None:
    order: list[str] = []

    def job(name: str) -> float:
        order.append(name)
        return float(len(order))

    durations = interleaved({name: lambda name=name: job(name) for name in "abc"}, 4, "test")
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert {name: len(values) for name, values in durations.items()} == {"a": 4, "b": 4, "c": 4}
    assert min(min(values) for values in durations.values()) > WARM_UP * 3
    assert interleaved({}, 2, "test") == {}


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"), [(1, 1, 1, 0), (5, 1, 5, 0.9375), (6, 1, 6, 0.96875), (15, 4, 12, 0.965)]
)
def test_interval_of_the_median(n: int, low: int, high: int, coverage: float) -> None:
    found = median_interval([float(value) for value in reversed(range(1, n + 1))])
    assert (found["low"], found["median"], found["high"]) == (low, (n + 1) / 2, high)
    assert found["coverage"] == pytest.approx(coverage, abs=1e-3)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    samples = torch.randn(2000, 11, generator=torch.Generator().manual_seed(0)).tolist()
    found = [median_interval(sample) for sample in samples]
    assert sum(f["low"] <= 0 <= f["high"] for f in found) / 2000 == pytest.approx(found[0]["coverage"], abs=0.015)


def test_decoding_is_greedy_generation(checkpoints: dict[str, Path]) -> None:
    model = build_model(head_dim=8)
    tokens = spread_tokens(5, 257, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert time_decode(model, tokens, 4) > 0
    assert time_prefill(model, tokens) > 0
    handle.remove()
    assert [tuple(inputs.shape) for inputs in seen] == [(1, 5), (1, 1), (1, 1), (1, 1), (1, 1), (1, 5)]
    generated = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    if 0 not in generated[0, 5:]:  # 0 ends a text for generate, not for the clock
        assert torch.equal(torch.cat(seen[1:5], dim=1), generated[:, 5:])


def told(coverage: float = 0.96, **ratios: tuple[float, float]) -> str:
    """The sentences of a report with made-up ratios of a sparse and a sliced model to a dense one."""

    def entry(pattern: str, parameters: int, packed: int) -> dict[str, Any]:
        return {
            "sparsity": 0.5, "pattern": pattern, "parameters": parameters, "bytes": 2 * parameters,
            "bytes_zstd": packed, "missing_parameters": [], "loads_in_transformers": True, "semi_structured_note": None,
            "prefill_semi_structured_ms": None,
        }  # fmt: skip

    models = {"dense": entry("dense", 100, 180), "sparse": entry("unstructured", 100, 120)}
    models["sliced"] = entry("dense", 80, 144)
    times = {"dense": (1.0, 1.0), **ratios}
    summaries = {
        name: {
            kind: {"median": value, "low": value - 0.02, "high": value + 0.02, "coverage": coverage}
            for kind, value in zip(("prefill", "decode"), pair, strict=True)
        }
        for name, pair in times.items()
    }
    patterns = {"reference": "sparse", "models": {}}
    machine = {"transformers": "5"}
    return "\n".join(findings({"models": models, "ratios": summaries, "zero_patterns": patterns, "machine": machine}))


def test_sentences_follow_from_the_numbers() -> None:
    text = told(sparse=(1.0, 1.01), sliced=(0.8, 0.9))
    assert "Zeros stored in dense tensors bring no speed" in text
    assert "sparse took 1.00 [0.98, 1.02] (prefill) and 1.01 [0.99, 1.03] (decode) times dense's time" in text
    assert "only when compressed: of dense's size, sparse 100% as stored, 67% with zstd" in text
    assert "sliced has 20.0% fewer parameters than dense and 80% of its size on disk" in text
    assert "times its time: faster." in text
    assert "Load in plain transformers 5: dense, sparse, sliced." in text
    assert "faster in prefill only" in told(sparse=(1.0, 1.0), sliced=(0.8, 1.0))
    assert "times its time: no faster." in told(sparse=(1.0, 1.0), sliced=(1.1, 1.0))
    assert "times its time: too few rounds to tell." in told(0.5, sparse=(0.9, 1.0), sliced=(0.8, 0.8))
    surprising = told(sparse=(0.9, 1.0), sliced=(0.8, 0.9))
    assert "bring no speed" not in surprising
    assert "Run again with more --repeats" in surprising


def test_sentences_about_real_models(found: dict[str, Any]) -> None:
    text = "\n".join(findings(found))
    assert "almost against sparse: zeros differ in 1 of 21 matrices (model.layers.1.mlp.up_proj.weight first)" in text
    assert "sparse on 2:4 kernels: not run" in text or torch.cuda.is_available()
    assert "narrow has" in text
    assert "narrow against" not in text
    for columns, rows in (size_table(found), time_table(found)):
        assert [len(row) for row in rows] == 4 * [len(columns)]


def test_command_writes_the_report(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "report.json"
    numbers = ("--repeats", 1, "--prompt-tokens", 4, "--new-tokens", 1, "--quiet")
    assert call("report", checkpoints["dense"], checkpoints["sparse"], "--out", out, *numbers) == 0
    written = json.loads(out.read_text())
    assert list(written["models"]) == ["dense", "sparse"]
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]
    output = capsys.readouterr()
    assert "dense kernels multiply" in output.out  # one round is too few to find anything faster
    assert output.err == ""
    assert call("report", checkpoints["sparse"], "--no-latency", "--quiet") == 0
    assert "2:4" in capsys.readouterr().out


def test_command_refuses_before_it_writes(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "report.json"
    for message, arguments in (
        ("which is not there", (checkpoints["dense"], tmp_path / "gone", "--out", out)),
        ("expected at least one model", ("--out", out)),
        ("got the folder", (checkpoints["dense"], "--out", tmp_path)),
    ):
        assert call("report", *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
    assert not out.parent.exists()


def test_public_name_stays_the_function() -> None:
    import lcc_lens.evaluation.efficiency.report

    assert lcc_lens.report is report
