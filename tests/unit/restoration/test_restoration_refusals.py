"""What a restoration refuses: other weights, heads and directions that are not there, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import refused
from support.conformance import save_family
from support.tiny import D_HEAD, build_model, save_model
from transformers import AutoModelForCausalLM

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.frontends.cli.main import parse
from lcc_lens.frontends.cli.restore_options import check_used, given_options
from lcc_lens.models.loading.hooked import identity_of, load_hooked
from lcc_lens.pruning.refit.checks import require_refittable
from lcc_lens.restoration.in_memory import method_in_memory
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.jobs import check_job
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.settings import HeadRequest
from lcc_lens.restoration.training.objectives import Objective

TOKENS = torch.arange(12)[None]
ON_HEADS = ("lcc", "offset", "mean-shift", "random-basis", "gain", "mean-shift-sequential")


@pytest.fixture(scope="module")
def shifted(pair, found: Scan, question_file: Path) -> Restoration:
    return restore(pair, found, found.select("mse", share=0.5), load_data(str(question_file)), method="mean-shift")


def test_other_weights_are_refused_by_their_hash(pair, shifted: Restoration, pruned_dir: Path, tmp_path: Path) -> None:
    """The same shapes are not enough: a restoration belongs to the weights it was found on."""
    assert identity_of(pair.pruned) == pair.pruned_id
    other = load_hooked(save_model(build_model(seed=1), tmp_path / "other")).model
    for model in (other, pair.dense):
        message = r"expected the pruned model with SHA-256 .*any_weights=True"
        with pytest.raises(RequestError, match=message), shifted.applied_to(model):
            pass
    before = pair.dense(TOKENS)
    with shifted.applied_to(pair.dense, any_weights=True) as model:
        assert float((model(TOKENS) - before).abs().max()) > 1e-3
    assert torch.equal(pair.dense(TOKENS), before)
    shutil.copytree(pruned_dir, tmp_path / "copy")
    copy = load_hooked(tmp_path / "copy").model  # the same weights elsewhere are the same model
    with shifted.applied_to(copy) as model, shifted.applied_to(pair.pruned) as expected:
        assert torch.equal(model(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("method", ON_HEADS)
@pytest.mark.parametrize("head", [Head(3, 0), Head(0, 5)])
def test_heads_outside_the_model_are_refused(
    pair, found: Scan, question_file: Path, tmp_path: Path, method: str, head: Head
) -> None:
    assert MethodSpec.parse(method).on_heads
    data = load_data(str(question_file))
    with pytest.raises(RequestError, match=f"expected heads within 3 layers x 5 heads, got {head}"):
        restore(pair, found, [Head(0, 0), head], data, method=method, run=tmp_path / "run")
    with pytest.raises(RequestError, match="expected every head once, got one twice"):
        restore(pair, found, [Head(0, 0), Head(0, 0)], data, method=method, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lcc", "mean-shift", "random-basis", "lcc+low-rank"])
def test_more_directions_than_a_head_has_are_refused(
    pair, found: Scan, question_file: Path, tmp_path: Path, method: str
) -> None:
    data = load_data(str(question_file))
    with pytest.raises(RequestError, match=rf"expected a rank between 0 \(offset alone\) and d_head = {D_HEAD}, got 7"):
        restore(pair, found, [Head(0, 0)], data, method=method, rank=D_HEAD + 1, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_responses_that_the_length_limit_cuts_off(pair, found: Scan, tmp_path: Path, caplog) -> None:
    """How many, where some are left; refused, where none is."""
    lines = [{"prompt": "x" * (5 + 3 * i), "response": " yes"} for i in range(12)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_data(str(tmp_path / "long.jsonl"))
    assert len(encode(data, pair.tokenizer, max_length=20)) == 5
    assert "skipped 7 examples without a response within 20 tokens" in caplog.text
    with pytest.raises(RequestError, match=r"expected responses that begin within 4 tokens .*: all \d+ are cut off"):
        restore(pair, found, [Head(0, 0)], data, max_length=4, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_no_refit_serves_is_told_what_does(tmp_path: Path) -> None:
    dense = save_family("olmoe", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:, ::2] = 0
    pruned = save_model(model, tmp_path / "pruned")
    message = r"expected decoder layers of plain matrices, got .*experts.*; or restore by the method lcc"
    with pytest.raises(RequestError, match=message):
        check_job(dense, pruned, tmp_path / "run", MethodSpec.parse("best"), HeadRequest())
    with pytest.raises(RequestError, match=r"experts or convolutions$"):
        require_refittable(dense, pruned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method best --rank 3 --start mean", "expected options that best uses, got --rank, --start; leave them out"),
        ("--method best --mlp-rank 2 --rank 2", "expected options that best uses, got --rank, --mlp-rank"),
        ("--mlp-rank 2", "expected options that lcc uses, got --mlp-rank; leave it out"),
        ("--method best --scan-data rte", "expected options that best uses, got --scan-data"),
        ("--method polish --low-rank 4", "expected options that polish uses, got --low-rank"),
        ("--method masked --low-rank 4", "expected options that masked uses, got --low-rank"),
        ("--method mean-shift --tune-lr", "expected options that mean-shift uses, got --tune-lr"),
        ("--method mlp-offset --mlp-rank 2", "expected options that mlp-offset uses, got --mlp-rank"),
        ("--method lcc --tune-lr --lr 1e-5", "expected --lr or --tune-lr, which chooses one, got both"),
        ("--method best --temperature 3 --objective lm", "expected --temperature with an --objective of distillation"),
        ("--method lcc --text python", "expected --text with a --task, got none; name its texts by --panel"),
        ("--panel python --panel-blocks 0", "expected blocks of the texts of --panel, got --panel-blocks 0"),
    ],
)
def test_options_that_nothing_uses_are_refused_before_the_work(
    options: str, message: str, dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, 2, message, "restore", dense_dir, pruned_dir, tmp_path / "run", "--quiet", *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        "lcc --rank 2 --start mean --scan-data rte --heads 0.5 --selector mse --lr 1e-3", "mean-shift --rank 2",
        "best --low-rank 4 --temperature 3", "lcc+low-rank --low-rank 4 --rank 2", "mlp-mean-shift --mlp-rank 2",
        "perp --start mean --scan-data rte", "best --objective distillation --refit-samples 8",
    ],
)  # fmt: skip
def test_options_that_a_method_uses_are_accepted_and_common_ones_are_told(
    options: str, pruned_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check(options: str) -> None:
        request = parse(["restore", "dense", str(pruned_dir), "run", "--method", *options.split()])
        spec = method_in_memory(request.chosen_method, pruned_dir, low_rank=request.training.low_rank)
        objective = Objective.parse(request.training.objective or spec.preset.objective or "response")
        check_used(given_options(request, request.data, request.training, request.memory), spec, objective)

    check(options)
    assert not caplog.records
    check("best --heads 0.5 --selector probe --lr 1e-4 --items 3")
    check("mean-shift --lr 3 --epochs 5 --refit-samples 5")
    assert [record.getMessage() for record in caplog.records] == [
        "best uses no --heads and no --selector", "--items counts those of a --task: nothing here uses it",
        "mean-shift uses no --epochs and no --lr and no --refit-samples",
    ]  # fmt: skip
