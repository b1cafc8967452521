"""What pruning refuses, each time with one line and nothing left behind."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pruning import prune_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, ViTConfig, ViTModel

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import DiskFullError, LensError, RequestError
from lcc_lens.models.architecture.layers import decoder_layers
from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, Unstructured
from lcc_lens.pruning.calibration.stream import LayerStream
from lcc_lens.pruning.methods.pruners import LayerTask, MagnitudePruner, WandaPruner
from lcc_lens.pruning.methods.registry import PRUNERS
from lcc_lens.pruning.methods.settings import PruneConfig

SIZES = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "vocab_size": 60}
HEADS = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6}
CONFIG = LlamaConfig(**SIZES, **HEADS, max_position_embeddings=16, tie_word_embeddings=True, initializer_range=0.4)
TOKENS = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def assert_refused(dense: Path) -> Callable[..., None]:
    """Check that pruning fails with a one-line error and leaves nothing behind."""

    def check(match: str, kind: type[LensError] = RequestError, *, source: Path = dense, **options: Any) -> None:
        there = sorted(path.name for path in dense.parent.iterdir())
        with pytest.raises(kind, match=match) as caught:
            run(source, dense.parent / "out", **options)
        assert "\n" not in str(caught.value)
        assert type(caught.value) is kind
        assert sorted(path.name for path in dense.parent.iterdir()) == there

    return check


def run(source: Path, out: Path, *, method: Any = "wanda", pattern: Pattern | None = None, **options: Any) -> Any:
    return prune_tokens(source, out, method, pattern or Unstructured(0.5), **{"calibration": TOKENS, **options})


def edit(dense: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change one tensor of a checkpoint, or drop it."""
    tensors = load_file(dense / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, dense / "model.safetensors", {"format": "pt"})


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_pattern_that_does_not_divide_a_matrix(method: str, assert_refused: Callable[..., None]) -> None:
    match = r"expected an input width that 4 divides for pattern 2:4, got 30 in model\.layers\.0\.self_attn\.o_proj"
    assert_refused(match, method=method, pattern=NofM(2, 4))


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (None, "expected calibration sequences for wanda, got none"),
        (TOKENS[:0], "expected calibration sequences for wanda, got none"),
        (TOKENS + 55, "expected calibration tokens from 0 to 59, got"),
        (TOKENS - 70, "expected calibration tokens from 0 to 59, got -"),
        (TOKENS.repeat(1, 3), "expected sequences of at most 16 tokens, got 21"),
    ],
)
def test_calibration_that_the_model_cannot_read(
    tokens: Tensor | None, match: str, assert_refused: Callable[..., None]
) -> None:
    assert_refused(match, calibration=tokens)


def test_a_scope_that_wanda_does_not_have(assert_refused: Callable[..., None]) -> None:
    assert_refused("expected the scope row for wanda, got matrix", scope="matrix")


def test_an_empty_batch(assert_refused: Callable[..., None]) -> None:
    assert_refused("batch_size of at least 1, got 0", batch_size=0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"method": "guess"}, r"expected a pruner \(magnitude, wanda, sparsegpt, slimgpt\), got 'guess'"),
        ({"scope": "column"}, "got 'column'"),
    ],
)
def test_words_that_only_a_type_checker_would_catch(wrong: dict[str, str], match: str) -> None:
    config = PruneConfig("magnitude", Unstructured(0.5))
    for field, value in wrong.items():
        object.__setattr__(config, field, value)  # around the type checks that run in tests, as a notebook would
    with pytest.raises(RequestError, match=match):
        config.__post_init__()


def test_an_output_that_is_there_or_holds_the_model(dense: Path, assert_refused: Callable[..., None]) -> None:
    (dense.parent / "out").mkdir()
    (dense.parent / "out" / "notes.txt").write_text("mine")
    assert_refused("exists already")
    assert (dense.parent / "out" / "notes.txt").read_text() == "mine"
    for out in (dense, dense.parent):
        with pytest.raises(RequestError, match="expected an output folder that does not hold the input"):
            run(dense, out, overwrite=True)
    assert (dense / "model.safetensors").exists()


def test_a_folder_without_a_model(tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    assert_refused(r"got no config\.json there", source=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert_refused("expected a causal language model in", source=tmp_path)


def test_a_model_that_writes_no_text(tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    assert_refused("expected a causal language model in", source=tmp_path / "vit")


def test_experts_are_not_passed_over(tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    assert_refused("expected decoder layers of plain matrices, got .*experts", source=tmp_path / "experts")


def test_a_quantised_or_incomplete_checkpoint(dense: Path, assert_refused: Callable[..., None]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(dense, name, lambda tensor: tensor.to(torch.int8))
    assert_refused(f"expected weights in float32, bfloat16 or float16, got I8 in {name}")
    edit(dense, name, lambda _: None)
    assert_refused(rf"got none named {name} \(1 are missing\)")


def test_decoder_layers_have_to_be_unmistakable() -> None:
    def model(*lengths: int) -> nn.Module:
        return nn.ModuleDict(
            {f"part{i}": nn.ModuleList(nn.Identity() for _ in range(n)) for i, n in enumerate(lengths)}
        )

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))
    assert decoder_layers(model(2, 3), config)[0] == "part1"
    for lengths, n_found in (((3, 3), 2), ((2, 4), 0)):
        with pytest.raises(RequestError, match=f"expected one list of 3 decoder layers, got {n_found} in ModuleDict"):
            decoder_layers(model(*lengths), config)


def test_a_list_within_a_layer_is_not_mistaken_for_the_layers() -> None:
    inner = [nn.ModuleDict({"branches": nn.ModuleList([nn.Identity(), nn.Identity()])}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(inner)})
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    assert decoder_layers(model, config)[0] == "layers"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value: float, dense: Path, assert_refused: Callable[..., None]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(dense, name, filled(value))
    for method in ("magnitude", "wanda"):
        assert_refused(f"expected finite weights, got NaN or infinity in {name}", method=method)


def test_broken_activations_are_named(dense: Path, assert_refused: Callable[..., None]) -> None:
    edit(dense, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.sign() * 3e38)
    assert_refused("expected finite activations, got NaN or infinity from layer 1;", LensError)


def test_a_pruner_that_breaks_a_weight_is_caught(
    monkeypatch: pytest.MonkeyPatch, assert_refused: Callable[..., None]
) -> None:
    class Breaking(MagnitudePruner):
        uses_inputs: ClassVar[bool] = True

        def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights.items():
                yield name, weight / 0

    monkeypatch.setitem(PRUNERS._entries, "magnitude", Breaking)
    assert_refused(
        r"expected finite pruned weights, got NaN or infinity in model\.layers\.0", LensError, method="magnitude"
    )


def test_a_matrix_that_never_saw_an_input_is_named() -> None:
    with pytest.raises(LensError, match=r"expected calibration inputs of mlp\.gate, got none"):
        WandaPruner(LayerTask(Unstructured(0.5))).score("mlp.gate", torch.ones(2, 3))


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, assert_refused: Callable[..., None]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    assert_refused("MB of disk for .*out, got 0 MB free")


def test_a_disk_that_fills_up(monkeypatch: pytest.MonkeyPatch, assert_refused: Callable[..., None]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert_refused("no space left on the disk of .*out", DiskFullError)


class Toy(nn.Module):
    """Two layers; on request they also get the embeddings, as some architectures pass them to every layer."""

    def __init__(self, *, passes_embeddings: bool = False, runs_layers: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 4), nn.Linear(4, 60)
        self.layers = nn.ModuleList(ToyLayer() for _ in range(2))
        self.passes_embeddings, self.runs_layers = passes_embeddings, runs_layers
        self.head_runs = 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        embedded = hidden = self.embed(input_ids)
        for layer in self.layers if self.runs_layers else ():
            hidden = layer(hidden, embedded if self.passes_embeddings else None)
        self.head_runs += 1
        return self.head(hidden)


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, hidden: Tensor, extra: Tensor | None) -> tuple[Tensor, None]:
        self.runs += 1
        return hidden.add_(self.linear(hidden)), None


def test_layers_that_see_the_tokens_another_way() -> None:
    model = Toy(passes_embeddings=True)
    with pytest.raises(RequestError, match="expected layers that see the tokens through hidden states alone"):
        LayerStream(model, model.layers, TOKENS, batch_size=1)
    with pytest.raises(RequestError, match="expected Toy to run all its decoder layers, got 0"):
        LayerStream(Toy(runs_layers=False), model.layers, TOKENS, batch_size=1)


def test_two_passes_through_every_layer_and_none_through_the_head() -> None:
    model = Toy()
    stream = LayerStream(model, model.layers, TOKENS, batch_size=1)
    assert [layer.runs for layer in model.layers] == [1, 0]
    for _ in model.layers:
        stream.observe([], MagnitudePruner(LayerTask(Unstructured(0.5))))
        stream.advance()
    assert [layer.runs for layer in model.layers] == [7, 3]
    assert model.head_runs == 0


class TwoMaps(ToyLayer):
    """Two maps, the second of which runs once or twice in a pass."""

    def __init__(self, n_runs: int) -> None:
        super().__init__()
        self.second, self.n_runs = nn.Linear(4, 4), n_runs
        self.is_through = 0

    def forward(self, hidden: Tensor, extra: Tensor | None) -> tuple[Tensor, None]:
        hidden = hidden + self.linear(hidden)
        for _ in range(self.n_runs):
            hidden = hidden + self.second(hidden)
        self.is_through += 1
        return hidden, None


@pytest.mark.parametrize(("paths", "n_runs", "passes"), [
    (("linear",), 1, 1), (("linear", "second"), 1, 1), (("linear", "second"), 2, 3),
])  # fmt: skip
def test_a_batch_goes_no_further_than_to_the_last_observed_map(
    paths: tuple[str, ...], n_runs: int, passes: int
) -> None:
    """Everything that an observed map reads is seen; what comes after the last of them does not run."""
    torch.manual_seed(0)
    model = Toy()
    model.layers = nn.ModuleList([TwoMaps(n_runs)])
    stream, seen = LayerStream(model, model.layers, TOKENS, batch_size=1), dict.fromkeys(paths, torch.empty(0, 4))

    def note(name: str, inputs: Tensor) -> None:
        seen[name] = torch.cat([seen[name], inputs])

    matrices = [Matrix(path, path, 4, 4, False, Checkpoint(Path("none")), torch.float32) for path in paths]
    for _ in stream.batches_observed(matrices, note):
        pass
    assert model.layers[0].is_through == passes
    assert torch.equal(seen["linear"], model.embed(TOKENS).flatten(0, 1))
    if "second" in paths:
        assert len(seen["second"]) == n_runs * TOKENS.numel()
