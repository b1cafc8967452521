"""Serving engines: an export whose constants a loader would drop is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import call
from support.conformance import save_family
from support.restorations import mlp_alone, restoration_of, with_mlp

from lcc_lens.core.errors import RequestError
from lcc_lens.exporters.engines import require_served
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.architecture.bias_slots import BiasSlots
from lcc_lens.models.architecture.joint_bias_slots import JointSlots


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_llama_is_exported_for_both(engine: str, pruned_dir: Path, tmp_path: Path) -> None:
    restoration_of(pruned_dir).save(tmp_path / "run")
    assert call("export", tmp_path / "run", tmp_path / "out", "--for", engine, "--quiet") == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_bias_of_the_mlp_is_refused_where_it_is_dropped(pruned_dir: Path, tmp_path: Path) -> None:
    restoration = mlp_alone(with_mlp(restoration_of(pruned_dir), pruned_dir))
    message = "whose bias of the mlp output it drops; serve it by SGLang's --model-impl transformers"
    with pytest.raises(RequestError, match=message):
        export(restoration, pruned_dir, tmp_path / "out", for_engine="sglang")
    assert not (tmp_path / "out").exists()
    export(restoration, pruned_dir, tmp_path / "out", for_engine="vllm")
    assert (tmp_path / "out").exists()


def test_rules_follow_the_place_of_the_constants(tmp_path: Path) -> None:
    pruned = save_family("qwen3", tmp_path / "qwen3")
    with pytest.raises(
        RequestError, match=r"vLLM .* got Qwen3ForCausalLM, whose bias of the attention output it drops"
    ):
        export(restoration_of(pruned), pruned, tmp_path / "out", for_engine="vllm")
    parallel = save_family("gptj", tmp_path / "gptj")  # its constants lie in the parallel MLP's bias
    export(restoration_of(parallel), parallel, tmp_path / "out", for_engine="vllm")
    assert (tmp_path / "out").exists()


def test_what_is_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    slots = JointSlots({"z": BiasSlots(("bias",), {}, {})})
    require_served("vllm", "AnotherForCausalLM", slots)
    assert "not known whether vLLM 0.33.0 keeps the biases of AnotherForCausalLM (attention)" in caplog.text
    require_served("sglang", "CohereForCausalLM", JointSlots({}))  # changed weights alone: any engine serves them
