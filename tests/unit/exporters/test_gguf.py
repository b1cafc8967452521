"""GGUF: every number of the export is in the file, or there is no file."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import call, refused
from support.conformance import HEADS
from support.gguf_writing import Tensors, write_gguf
from support.places import TESTS
from support.restorations import restoration_of
from support.tiers import mostly_slow
from support.tiny import build_model, save_model

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.exporters import gguf as gguf_export
from lcc_lens.exporters.gguf import FOLDER_VARIABLE, _grouped, _transposed, compare_gguf, export_gguf
from lcc_lens.exporters.huggingface import export


@pytest.fixture(autouse=True)
def no_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with zeros in its matrices and with biases of its own, the queries' and keys' among them."""
    model = build_model(attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 2:
                parameter[parameter.abs() < 0.1] = 0.0
    return save_model(model, tmp_path_factory.mktemp("gguf") / "pruned")


@pytest.fixture(scope="module")
def exported(pruned: Path) -> Path:
    assert export(restoration_of(pruned, HEADS), pruned, pruned.parent / "out").logit_effect > 0.1
    return pruned.parent / "out"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with a converter that is not llama.cpp's."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    stand_in = TESTS / "support" / "gguf_writing.py"
    (folder / "convert_hf_to_gguf.py").write_text(
        f"import runpy\nrunpy.run_path({str(stand_in)!r}, run_name='__main__')\n"
    )
    return folder


@pytest.mark.parametrize(
    ("dtype", "number_format"),
    mostly_slow([(None, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")], (torch.bfloat16, "bf16")),
)
def test_a_file_holds_every_number(
    pruned: Path, clone: Path, tmp_path: Path, dtype: torch.dtype | None, number_format: str
) -> None:
    out = tmp_path / "out"
    export(restoration_of(pruned, HEADS), pruned, out, dtype=dtype)
    report = export_gguf(out, tmp_path / "new" / "restored.gguf", llama_cpp=clone)
    stored = load_file(out / "model.safetensors")
    assert dataclasses.astuple(report) == (tmp_path / "new" / "restored.gguf", "llama", number_format, len(stored))
    assert [path.name for path in report.path.parent.iterdir()] == ["restored.gguf"]
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(report.path).tensors}
    down, bias = written["blk.1.ffn_down.weight"], written["blk.1.attn_output.bias"]
    assert down.tensor_type.name.lower() == number_format
    values = torch.from_numpy(np.array(gguf.dequantize(down.data, down.tensor_type)))
    assert torch.equal(values, stored["model.layers.1.mlp.down_proj.weight"].float())
    assert int((values == 0).sum()) > 100
    before = load_file(pruned / "model.safetensors")["model.layers.1.self_attn.o_proj.bias"]
    assert float((torch.from_numpy(np.array(bias.data)) - before).abs().max()) > 0.1  # the restoration is in it


def test_a_converter_has_no_endless_time(
    exported: Path, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clone / "convert_hf_to_gguf.py").write_text("while True: pass\n")
    monkeypatch.setattr(gguf_export, "_TIME_LIMIT", 0.05)
    with pytest.raises(LensError, match=r"to convert .* within 0\.05 seconds, got no end; no GGUF was kept"):
        export_gguf(exported, tmp_path / "a.gguf", llama_cpp=clone)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "modeling_new.py"])
def test_a_converter_that_alters_the_export_is_not_believed(
    exported: Path, clone: Path, tmp_path: Path, name: str
) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    converter = clone / "convert_hf_to_gguf.py"
    before = "import os, sys, pathlib\nfile = pathlib.Path(sys.argv[1]) / " + repr(name) + "\n"
    touch = "state = file.stat() if file.exists() else None\n"
    alter = "file.write_bytes((file.read_bytes() if state else b'')[:-1] + b'!')\n"
    hide = "state and os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))\n"
    converter.write_text(before + touch + alter + hide + converter.read_text())
    with pytest.raises(LensError, match=r"expected .* as it was verified, got files that .* altered"):
        export_gguf(out, tmp_path / "a.gguf", llama_cpp=clone)
    assert not (tmp_path / "a.gguf").exists()


def add_to(name: str, where: tuple[int, ...], value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].__setitem__(where, tensors[name][where] + value)


def fill_a_zero(tensors: Tensors) -> None:
    weight = tensors["blk.2.attn_v.weight"]
    weight[tuple((weight == 0).nonzero()[0])] = 1e-30


def turn_back(name: str) -> Callable[[Tensors], object]:
    """Give a tensor in Hugging Face's order, the halves of a head one after the other."""

    def edit(tensors: Tensors) -> None:
        plain = tensors[name].unflatten(0, (-1, 3, 2)).transpose(1, 2).flatten(0, 2)
        assert not torch.equal(plain, tensors[name])
        tensors[name] = plain

    return edit


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no output bias": (
        {"edit": lambda tensors: tensors.pop("blk.1.attn_output.bias")},
        r"expected model\.layers\.1\.self_attn\.o_proj\.bias in the GGUF, got no blk\.1\.attn_output\.bias",
    ),
    "no query bias": ({"edit": lambda tensors: tensors.pop("blk.0.attn_q.bias")}, r"got no blk\.0\.attn_q\.bias"),
    "another bias": (
        {"edit": add_to("blk.2.attn_output.bias", (7,), 1e-6)},
        r"expected blk\.2\.attn_output\.bias .* got",
    ),
    "another weight": ({"edit": add_to("blk.0.ffn_down.weight", (3, 5), 1e-6)}, r"equal to .*mlp\.down_proj\.weight"),
    "a zero filled": ({"edit": fill_a_zero}, r"expected blk\.2\.attn_v\.weight in the GGUF equal"),
    "queries not turned": ({"edit": turn_back("blk.0.attn_q.weight")}, r"expected blk\.0\.attn_q\.weight"),
    "key bias not turned": ({"edit": turn_back("blk.0.attn_k.bias")}, r"expected blk\.0\.attn_k\.bias"),
    "one more tensor": (
        {"edit": lambda tensors: tensors.update({"blk.0.ffn_down.bias": torch.ones(40)})},
        r"only the directory's tensors in the GGUF, got blk\.0\.ffn_down\.bias as well",
    ),
    "a rounded format": ({"number_format": "f16"}, "in the GGUF equal to"),
    "another number of heads": ({"sizes": {"attention.head_count": 4}}, "expected attention.head_count 5 .*, got 4"),
    "another width": ({"sizes": {"feed_forward_length": 160}}, "expected feed_forward_length 44 in the GGUF, got 160"),
    "biases that are not read": (
        {"architecture": "smollm3"},
        r"got smollm3: llama.cpp would refuse blk\.0\.attn_output",
    ),
    "a layout that is not known": ({"architecture": "gemma3"}, r"can be compared \(llama, .*\), got gemma3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_lost_something_is_not_kept(
    fault: str, exported: Path, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, message = FAULTS[fault]

    def convert(converter: Path, directory: Path, file: Path, number_format: str) -> None:
        write_gguf(directory, file, **{"number_format": number_format, **settings})

    monkeypatch.setattr(gguf_export, "_convert", convert)
    with pytest.raises(LensError, match=f"{message}.*; no GGUF was kept$"):
        export_gguf(exported, tmp_path / "files" / "x.gguf", llama_cpp=clone)
    assert list((tmp_path / "files").iterdir()) == []
    write_gguf(exported, tmp_path / "good.gguf")
    assert compare_gguf(tmp_path / "good.gguf", Checkpoint(exported)) == ("llama", 3 * 13 + 3)


def test_a_damaged_file_is_refused(exported: Path, tmp_path: Path) -> None:
    write_gguf(exported, tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for part in (b"", b"no GGUF at all", whole[:4000], whole[:-4000]):
        (tmp_path / "x.gguf").write_bytes(part)
        with pytest.raises(LensError, match="expected a whole GGUF file, got a damaged one"):
            compare_gguf(tmp_path / "x.gguf", Checkpoint(exported))


def test_tied_embeddings_may_be_stored_twice_on_either_side(tmp_path: Path) -> None:
    tied = save_model(build_model(tie_word_embeddings=True), tmp_path / "tied")
    write_gguf(tied, tmp_path / "x.gguf", edit=lambda t: t.update({"output.weight": t["token_embd.weight"].clone()}))
    assert compare_gguf(tmp_path / "x.gguf", Checkpoint(tied)) == ("llama", 3 * 9 + 3)
    twice = load_file(tied / "model.safetensors")
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, tied / "model.safetensors", metadata={"format": "pt"})
    write_gguf(tied, tmp_path / "x.gguf", edit=lambda t: t.pop("output.weight"))
    assert compare_gguf(tmp_path / "x.gguf", Checkpoint(tied)) == ("llama", 3 * 9 + 3)
    twice["lm_head.weight"] += 1
    save_file(twice, tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LensError, match=r"expected output\.weight in the GGUF equal to lm_head\.weight"):
        compare_gguf(tmp_path / "x.gguf", Checkpoint(tied))


def test_without_output_biases_more_architectures_go(dense_dir: Path, tmp_path: Path) -> None:
    write_gguf(dense_dir, tmp_path / "x.gguf", architecture="smollm3")
    assert compare_gguf(tmp_path / "x.gguf", Checkpoint(dense_dir)) == ("smollm3", 3 * 9 + 3)


def test_tables_that_every_reader_computes_are_not_asked_for(dense_dir: Path, tmp_path: Path) -> None:
    write_gguf(dense_dir, tmp_path / "x.gguf", edit=lambda t: t.update({"rope_freqs.weight": torch.ones(3)}))
    old = shutil.copytree(dense_dir, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    assert compare_gguf(tmp_path / "x.gguf", Checkpoint(old)) == ("llama", 3 * 9 + 3)
    tensors["model.layers.0.self_attn.o_proj.scale"] = torch.ones(3)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LensError, match=r"expected a name of its own for .*o_proj\.scale in the GGUF of llama, got None"
    ):
        compare_gguf(tmp_path / "x.gguf", Checkpoint(old))


def test_other_layouts_keep_every_number() -> None:
    fused = np.arange(2 * 3 * 4 * 5).reshape(24, 5)  # two heads, each its query, key and value of width 4
    grouped = _grouped("blk.0.attn_qkv.weight", fused, 2, 2)
    assert np.array_equal(grouped[:4], fused[:4])
    assert np.array_equal(grouped[4:8], fused[12:16])  # the second head's queries follow the first head's
    assert np.array_equal(grouped[8:12], fused[4:8])
    assert _grouped("blk.0.ffn_up.weight", fused, 2, 2) is fused
    assert np.array_equal(_transposed("blk.0.attn_qkv.weight", fused, 2, 2), fused.T)
    assert _transposed("token_embd.weight", fused, 2, 2) is fused


def test_a_converter_that_fails_is_one_line(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys\nprint('loading', file=sys.stderr)\nsys.exit('ERROR: Model X is not supported')\n"
    )
    with pytest.raises(LensError, match=r"got exit code 1 \(ERROR: Model X is not supported\); no GGUF was kept"):
        export_gguf(exported, tmp_path / "files" / "x.gguf", llama_cpp=tmp_path)
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.slow
def test_refusals_come_before_anything_is_written(
    exported: Path, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.gguf"
    with pytest.raises(RequestError, match=r"got none; git clone .*llama\.cpp .* --llama-cpp or LCC_LENS_LLAMA"):
        export_gguf(exported, file)
    with pytest.raises(
        RequestError, match=r"expected a clone of llama\.cpp with convert_hf_to_gguf\.py, got .*nowhere"
    ):
        export_gguf(exported, file, llama_cpp=tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"got no config\.json there"):
        export_gguf(tmp_path, file, llama_cpp=clone)
    with pytest.raises(RequestError, match="got the folder"):
        export_gguf(exported, tmp_path, llama_cpp=clone)
    assert not file.exists()
    file.write_text("mine")
    with pytest.raises(RequestError, match=r"expected a new file or an earlier output of this command, got .*x\.gguf"):
        export_gguf(exported, file, llama_cpp=clone, overwrite=True)
    assert file.read_text() == "mine"
    file.write_text("GGUF mine")
    with pytest.raises(RequestError, match=r"x\.gguf exists already; name another file or pass --overwrite"):
        export_gguf(exported, file, llama_cpp=clone)
    assert file.read_text() == "GGUF mine"
    monkeypatch.setenv(FOLDER_VARIABLE, str(clone))
    assert export_gguf(exported, file, overwrite=True).n_tensors == 42


@pytest.mark.slow
def test_export_writes_both(pruned: Path, clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out, file = tmp_path / "run", tmp_path / "out", tmp_path / "restored.gguf"
    restoration_of(pruned, HEADS).save(work)
    refused(capsys, 2, "expected a clone of llama.cpp", "export", work, out, "--gguf", file)
    refused(capsys, 2, "name it by --gguf FILE", "export", work, out, "--llama-cpp", clone)
    assert not out.exists()
    assert call("export", work, out, "--dtype", "float16", "--gguf", file, "--llama-cpp", clone, "--quiet") == 0
    shown = capsys.readouterr().out
    assert "llama" in shown
    assert "f16" in shown
    assert compare_gguf(file, Checkpoint(out)) == ("llama", 42)
    refused(capsys, 2, "exists already", "export", work, tmp_path / "2", "--gguf", file, "--llama-cpp", clone)
