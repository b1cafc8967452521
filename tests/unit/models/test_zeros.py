"""The zeros of checkpoints: exact counts, patterns and positions, whoever wrote the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.matrices import edited, linears, sparse_model, two_of_four
from support.tiny import D_MODEL, build_model, save_model

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.efficiency.compression import compressed_size, matrix_sizes, tensor_chunks, zstd_bytes
from lcc_lens.evaluation.efficiency.semi_structured import require_kernels, to_semi_structured
from lcc_lens.models.architecture.zeros import compare_zeros, zero_pattern

MATRICES_PER_LAYER = 7


@pytest.fixture(scope="module")
def sparse_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(sparse_model(), tmp_path_factory.mktemp("zeros") / "sparse")


def test_counts_are_those_of_a_plain_count(tmp_path: Path) -> None:
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.3] = 0
        model.model.layers[1].mlp.up_proj.weight[[3, 5]] = 0
        model.model.layers[1].mlp.up_proj.weight[:, 7] = 0
        model.model.embed_tokens.weight[2] = 0  # counts as zero parameters, not towards the sparsity
    path = save_model(model, tmp_path / "model")
    found = zero_pattern(path)

    weights = {name: layer.weight for name, layer in linears(model).items()}
    assert {m.name: (m.shape, m.zeros) for m in found.matrices} == {
        name: (tuple(weight.shape), int((weight == 0).sum())) for name, weight in weights.items()
    }
    n_zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert found.sparsity == n_zeros / sum(weight.numel() for weight in weights.values())
    assert 0.25 < found.sparsity < 0.4
    assert found.parameters == model.num_parameters()
    assert found.nonzero_parameters == sum(int((p != 0).sum()) for p in model.parameters())
    assert (found.pattern, found.dtype, found.missing) == ("unstructured", "float32", ())
    assert found.bytes == (path / "model.safetensors").stat().st_size
    one = next(m for m in found.matrices if m.name == "model.layers.1.mlp.up_proj.weight")
    assert (one.zero_rows, one.zero_columns) == (2, 1)
    assert one.sparsity == one.zeros / (44 * 40)


def test_one_violation_ends_a_pattern(sparse_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"

    def violate(weight: torch.Tensor) -> None:
        place = (weight[0, :4] == 0).nonzero()[0]
        weight[0, place] = 1.0

    almost = zero_pattern(edited(sparse_dir, tmp_path / "almost", name, violate))
    exact = zero_pattern(sparse_dir)
    assert (exact.pattern, exact.sparsity) == ("2:4", 0.5)
    assert almost.pattern == "unstructured"
    assert sum(m.zeros for m in exact.matrices) == sum(m.zeros for m in almost.matrices) + 1
    assert [m.name for m in almost.matrices if m.pattern != "2:4"] == [name]


def test_a_dense_model_is_dense(dense_dir: Path) -> None:
    found = zero_pattern(dense_dir)
    assert (found.pattern, found.sparsity) == ("dense", 0)
    assert found.nonzero_parameters == found.parameters - D_MODEL  # the padding token's embedding
    assert len(found.matrices) == 3 * MATRICES_PER_LAYER


def test_sharded_bfloat16_with_tied_embeddings(tmp_path: Path) -> None:
    model = sparse_model(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    whole, shards = zero_pattern(save_model(model, tmp_path / "whole")), zero_pattern(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert shards.matrices == whole.matrices
    assert (shards.pattern, shards.dtype) == ("2:4", "bfloat16")
    assert shards.parameters == whole.parameters == model.num_parameters()
    assert model.num_parameters() < build_model(head_dim=8).num_parameters()
    assert shards.bytes == sum(file.stat().st_size for file in (tmp_path / "shards").glob("*.safetensors"))
    assert compare_zeros(tmp_path / "whole", tmp_path / "shards").is_equal


def test_tied_embeddings_stored_twice_count_once(tmp_path: Path) -> None:
    model = build_model(tie_word_embeddings=True)
    path = save_model(model, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.mask"] = torch.zeros(9, 9)  # a buffer of another version is no parameter
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = zero_pattern(path)
    assert found.parameters == found.nonzero_parameters + D_MODEL == model.num_parameters()


def test_a_lacking_tensor_is_named(dense_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_dir, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert zero_pattern(tmp_path / "model").missing == ("model.norm.weight",)


def test_zeros_of_the_other_layout(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 20, "n_layer": 2, "n_head": 5, "n_inner": 28}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[4] = 0  # stored [in, out]: input 4 reaches no output
    found = zero_pattern(save_model(model, tmp_path / "gpt2"))
    one = next(m for m in found.matrices if m.name.endswith("h.1.mlp.c_fc.weight"))
    assert (one.shape, one.zeros, one.zero_rows, one.zero_columns) == ((28, 20), 28, 0, 1)
    assert found.parameters == model.num_parameters()


def test_positions_are_compared_bit_for_bit(sparse_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def move(weight: torch.Tensor) -> None:
        weight[0, :4] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        weight[1, :4] = torch.tensor([0.0, 0.0, 0.0, 1.0])

    before = load_file(sparse_dir / "model.safetensors")[name]
    other = edited(sparse_dir, tmp_path / "moved", name, move)
    after = load_file(other / "model.safetensors")[name]
    same, different = compare_zeros(sparse_dir, sparse_dir), compare_zeros(sparse_dir, other)
    assert same.is_equal
    assert same.equal_matrices == 3 * MATRICES_PER_LAYER
    assert sum(m.both for m in same.matrices) == sum(m.zeros for m in zero_pattern(sparse_dir).matrices)
    assert not different.is_equal
    assert different.equal_matrices == 3 * MATRICES_PER_LAYER - 1
    one = next(m for m in different.matrices if not m.is_equal)
    assert one.name == name
    assert one.only_first == int(((before == 0) & (after != 0)).sum())
    assert one.only_second == int(((before != 0) & (after == 0)).sum()) > one.only_first


def test_values_do_not_matter_for_positions(sparse_dir: Path, tmp_path: Path) -> None:
    other = edited(sparse_dir, tmp_path / "scaled", "model.layers.0.mlp.up_proj.weight", lambda w: w.mul_(-3))
    assert compare_zeros(sparse_dir, other).is_equal


def test_models_of_other_shapes_are_not_compared(sparse_dir: Path, tmp_path: Path) -> None:
    narrow = save_model(sparse_model(intermediate_size=36), tmp_path / "narrow")
    with pytest.raises(RequestError, match=r"of the same shape in both, got \(44, 40\) and \(36, 40\); compare models"):
        compare_zeros(sparse_dir, narrow)
    short = save_model(sparse_model(num_hidden_layers=2), tmp_path / "short")
    with pytest.raises(RequestError, match=r"matrices of the same names .* got model\.layers\.2\..* in only one"):
        compare_zeros(sparse_dir, short)


def test_unreadable_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"got no config\.json"):
        zero_pattern(tmp_path)


def test_compressed_sizes(sparse_dir: Path, tmp_path: Path) -> None:
    import zstandard

    file = sparse_dir / "model.safetensors"
    size = compressed_size(sparse_dir)
    assert size == pytest.approx(len(zstandard.ZstdCompressor(level=3).compress(file.read_bytes())), rel=0.02)
    assert size < 0.8 * file.stat().st_size
    assert size < 0.8 * compressed_size(save_model(build_model(head_dim=8), tmp_path / "dense"))
    sizes = matrix_sizes(sparse_dir)
    assert list(sizes) == [m.name for m in zero_pattern(sparse_dir).matrices]
    assert sizes["model.layers.0.mlp.down_proj.weight"][0] == 40 * 44 * 4
    assert all(packed < stored for stored, packed in sizes.values())


def test_chunks_hold_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.evaluation.efficiency.compression.CHUNK", 7)
    tensor = torch.arange(15, dtype=torch.bfloat16).reshape(3, 5).T
    whole = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert b"".join(bytes(chunk) for chunk in tensor_chunks(tensor)) == whole
    assert zstd_bytes([]) < 20


def test_sparse_kernels_are_refused_off_the_gpu(dense_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected a CUDA device for 2:4 kernels, got cpu; run on"):
        to_semi_structured(sparse_model())
    with pytest.raises(RequestError, match="expected a CUDA device"):
        require_kernels(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(RequestError, match="expected linear layers"):
        to_semi_structured(_without_linears())


def _without_linears():
    model = build_model(num_hidden_layers=1)
    model.model.layers[0] = torch.nn.Identity()
    return model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_sparse_kernels_compute_the_same() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 2}
    model = two_of_four(build_model(**sizes)).to("cuda", torch.bfloat16)
    tokens = torch.arange(1, 40, device="cuda")[None]
    with torch.inference_mode():
        expected = model(tokens).logits.float()
        assert to_semi_structured(model) == 3 * MATRICES_PER_LAYER
        got = model(tokens).logits.float()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(RequestError, match="expected every linear weight exactly 2:4"):
        to_semi_structured(build_model(**sizes).to("cuda", torch.bfloat16))
    with pytest.raises(RequestError, match="expected float16 or bfloat16"):
        require_kernels(torch.device("cuda"), torch.float32)
