"""Injections at the MLP's post-activation: the same laws as at head outputs, in every family that can carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES
from support.tiers import mostly_slow
from support.tiny import D_MODEL, N_LAYERS, build_model, save_model

from lcc_lens.analysis import statistics
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.comparison.costs import merging_costs
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.architecture.bias_slots import find_slots
from lcc_lens.models.hooked.hooks import NamedHook, mlp_name, readers
from lcc_lens.models.hooked.sites import mlp_width, projection_names
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.injections.constants import LccInjection, MeanShift, OffsetInjection
from lcc_lens.restoration.injections.footprint import Footprint
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import METHODS
from lcc_lens.restoration.injections.spec import MethodSpec, describe_methods
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.config import TrainConfig

TOKENS = torch.arange(12)[None]
D_MLP = 44
TRAINED = ("mlp-lcc", "mlp-offset", "mlp-gain")
#: Families whose down projection has a bias, by itself, by a switch, or under another architecture's name.
CARRY = {"llama": True, "gpt2": True, "gpt_neox": True, "opt": True, "phi": True, "gemma2": False, "mistral": True}


@pytest.fixture(scope="module")
def wide(pair, question_file: Path):
    """A scan whose MLPs count as wide: the first directions alone are held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_WIDE", D_MLP - 1)
        patch.setattr(statistics, "WIDE_DIRECTIONS", 7)
        return scan(pair, load_data(str(question_file)), spectra=("z", "mlp"), display=0)


def given(pair, found: Scan | None) -> Ingredients:
    heads = [] if found is None else found.select("mse", share=0.5)
    components, mlp = (None, None) if found is None else (found.components, found.others["mlp"])
    return Ingredients(pair.pruned, components, heads, pair.output_projections, mlp=mlp)


def disturbed(injection, size: float = 0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in injection.parameters():
            number += size * torch.randn(number.shape, generator=generator)
    return injection


@torch.no_grad()
def mlp_of(model, tokens: torch.Tensor, layers: list[int], hooks: Sequence[NamedHook] = ()) -> list[torch.Tensor]:
    """The MLP's post-activation of some layers."""
    seen: list[torch.Tensor] = []
    look = readers(mlp_name, layers, lambda _, activation: seen.append(activation))
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, *look])
    return seen


def test_a_wide_scan_is_kept_bit_for_bit(wide: Scan, tmp_path: Path) -> None:
    wide.save(tmp_path)
    kept, mlp = Scan.load(tmp_path).others["mlp"], wide.others["mlp"]
    assert mlp.directions.shape == (N_LAYERS, 1, 7, D_MLP)
    assert torch.equal(kept.directions, mlp.directions)
    assert torch.equal(kept.components().coefficients, mlp.components().coefficients)
    gram = mlp.directions[:, 0] @ mlp.directions[:, 0].mT
    assert torch.allclose(gram, torch.eye(7).expand(N_LAYERS, 7, 7), atol=1e-4)


def test_directions_are_the_differences_own(pair, found: Scan, question_file: Path) -> None:
    """They span what the singular value decomposition of stacked differences gives."""
    small = scan(pair, load_data(str(question_file), n=9), spectra=("z", "mlp"), display=0)
    lost = small.others["mlp"].components()
    sequences = encode(load_data(str(question_file), n=9), pair.tokenizer)
    dense, pruned = (
        torch.cat([mlp_of(model, s.tokens[None], [1])[0][0] for s in sequences]).double()
        for model in (pair.dense, pair.pruned)
    )
    _, values, directions = torch.linalg.svd(dense - pruned, full_matrices=False)
    assert torch.allclose(lost.singular_values[1, 0].double(), values, rtol=1e-3, atol=1e-2)
    assert abs(float(lost.directions[1, 0, 0].double() @ directions[0])) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", TRAINED)
def test_nothing_changes_at_first_and_all_comes_back(pair, wide: Scan, method: str) -> None:
    injection, before = MethodSpec.parse(method).build(given(pair, wide)), pair.pruned(TOKENS)
    with injection.applied_to(pair.pruned) as model:
        assert torch.equal(model(TOKENS), before)
    with torch.no_grad(), disturbed(injection).applied_to(pair.pruned) as model:
        assert float((model(TOKENS) - before).abs().max()) > 1e-2
    assert torch.equal(pair.pruned(TOKENS), before)


def test_mean_shift_is_the_whole_mean_and_lcc_begins_with_its_directions(wide: Scan) -> None:
    mlp, parts = wide.others["mlp"], [Head(layer, 0) for layer in range(N_LAYERS)]
    lost, mean = mlp.components(), mlp.mean_difference[:, 0]
    assert float(mean.abs().max()) > 0.01
    for injection in (MeanShift(lost, parts, site="mlp"), OffsetInjection(lost, parts, start="mean", site="mlp")):
        assert torch.allclose(injection.constants(), mean, atol=1e-6)
    projected = LccInjection(lost, parts, start="mean", site="mlp").constants()
    V = mlp.directions[:, 0]
    assert torch.allclose(projected, torch.einsum("lkd,lke,le->ld", V, V, mean), atol=1e-5)
    assert not torch.allclose(projected, mean, atol=1e-4)
    assert torch.equal(MeanShift(lost, parts, rank=7, site="mlp").constants(), projected)
    assert LccInjection(lost, parts, site="mlp").magnitudes.shape == (N_LAYERS, 7)
    with pytest.raises(RequestError, match=r"expected a rank between 0 \(offset alone\) and the 7 directions"):
        LccInjection(lost, parts, rank=8, site="mlp")


def test_constant_reaches_exactly_its_mlp(pair, wide: Scan) -> None:
    injection = LccInjection(wide.others["mlp"].components(), [Head(1, 0)], site="mlp")
    with torch.no_grad():
        injection.offset += 1.0
    before = mlp_of(pair.pruned, TOKENS, [0, 1])
    after = mlp_of(pair.pruned, TOKENS, [0, 1], injection.hooks())
    moved = injection.constants()[0].detach()
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1], before[1] + moved, atol=1e-6)
    assert float(moved.abs().max()) > 0.01


def test_gain_scales_the_activation(pair) -> None:
    injection = disturbed(MethodSpec.parse("mlp-gain").build(given(pair, None)))
    assert injection.n_trained == N_LAYERS * D_MLP
    gains = [number.detach() for number in injection.parameters()]
    hooks = [(mlp_name(i), lambda post, hook, gain=gain: post * (1 + gain)) for i, gain in enumerate(gains)]
    expected = pair.pruned.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with torch.no_grad(), injection.applied_to(pair.pruned) as model:
        assert torch.allclose(model(TOKENS), expected, atol=1e-4)
        assert not torch.allclose(pair.pruned(TOKENS), pair.dense(TOKENS), atol=1e-2)


@pytest.mark.parametrize(
    "method",
    mostly_slow([*TRAINED, "mlp-mean-shift", "lcc+mlp-lcc", "mlp-offset+mlp-gain+low-rank"], "mlp-gain", "lcc+mlp-lcc"),
)
def test_restore_save_export(
    pair, wide: Scan, question_file: Path, pruned_dir: Path, tmp_path: Path, method: str
) -> None:
    """The whole way: the plain reload computes what the hooked model did, and every zero stays, bit for bit."""
    data, heads = load_data(str(question_file)), wide.select("mse", share=0.5)
    config = TrainConfig(batch_size=4, validate_every=2)
    restoration = restore(pair, wide, heads, data, method=method, config=config, run=tmp_path / "run")
    if MethodSpec.parse(method).n_trained is not None:
        assert restoration.record.losses["restored"] < restoration.record.losses["pruned"]
    again, before = Restoration.load(tmp_path / "run"), pair.pruned(TOKENS)
    with restoration.applied_to(pair.pruned) as model:
        expected = model(TOKENS)
    with again.applied_to(pair.pruned) as model:
        assert torch.equal(model(TOKENS), expected)
    assert float((expected - before).abs().max()) > 1e-3
    report = export(again, pruned_dir, tmp_path / "out")
    assert report.logit_effect > 1e-4
    plain = load_plain(tmp_path / "out", dtype=torch.float32, attention="eager")
    assert torch.allclose(plain(TOKENS).logits, expected, atol=1e-4)
    old, new = load_file(pruned_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(new[name] == 0, tensor == 0) for name, tensor in old.items() if tensor.ndim > 1)
    added = {name.split(".")[-2] for name in report.added}
    wanted = set() if method == "mlp-gain" else {"gate_proj", "up_proj", "down_proj"}
    assert added == wanted | (
        {"q_proj", "k_proj", "v_proj", "o_proj"} if "z" in MethodSpec.parse(method).bias_sites else set()
    )
    assert all(
        not bool(new[name].any()) for name in report.added if not name.endswith(("down_proj.bias", "o_proj.bias"))
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("MLP folded into the biases of the down projections" in card) == bool(wanted)
    assert merging_costs(MethodSpec.parse(method).build(given(pair, wide)), pair, pair.pruned)["n_added"] == sum(
        new[name].numel() for name in report.added
    )


@pytest.mark.parametrize("family", mostly_slow(CARRY, "gemma2"))
def test_families_fold_or_refuse_before_training(family: str, question_file: Path, text_file: Path, tmp_path) -> None:
    dense = save_model(FAMILIES[family](), tmp_path / "dense")
    prune(dense, tmp_path / "pruned", method="magnitude")
    pair = load_pair(dense, tmp_path / "pruned", dtype=torch.float32)
    width = 160 if family == "gpt2" else D_MLP
    assert mlp_width(pair.pruned) == width  # whatever TransformerLens' configuration says
    data, steps = load_data(str(question_file)), []
    config = TrainConfig(batch_size=8, validate_every=2)
    found = scan(pair, data, sites=("mlp",), spectra=("z", "mlp"), display=0)
    if not CARRY[family]:
        with pytest.raises(RequestError, match="expected an architecture that can hold a constant per MLP in a bias"):
            restore(pair, found, (), data, method="mlp-lcc", config=config, on_step=steps.append, run=tmp_path / "run")
        assert steps == []
        assert not (tmp_path / "run").exists()
    for method in ("mlp-lcc", "mlp-gain"):
        if method == "mlp-lcc" and not CARRY[family]:
            restoration = restore(pair, found, (), data, method=method, config=config, exportable=False)
            with restoration.applied_to(pair.pruned) as model:
                assert float((model(TOKENS) - pair.dense(TOKENS)).abs().max()) > 0
            continue
        restoration = restore(pair, found, (), data, method=method, config=config)
        report = export(restoration, tmp_path / "pruned", tmp_path / method)
        assert report.logit_effect > 1e-3
        assert report.logit_difference < 1e-4
        names = {
            f"{name}.{'weight' if method == 'mlp-gain' else 'bias'}" for name in projection_names(pair.pruned, "mlp")
        }
        assert names <= set(report.changed) | set(report.added)


def test_scans_that_lack_the_mlp_are_refused(pair, found: Scan, question_file: Path) -> None:
    with pytest.raises(RequestError, match=r"expected the MLP's lost directions, got .*; scan again .*--spectra z mlp"):
        MethodSpec.parse("mlp-lcc").build(given(pair, found))
    assert MethodSpec.parse("mlp-offset").build(given(pair, found)).n_trained == N_LAYERS * D_MLP
    heads_alone = scan(pair, load_data(str(question_file), n=4), sites=("z",), selectors=(), display=0)
    missing = Ingredients(pair.pruned, heads_alone.components, [], pair.output_projections)
    for method in ("mlp-lcc", "mlp-offset", "mlp-mean-shift"):
        with pytest.raises(RequestError, match="expected a scan with the MLP's post-activation"):
            MethodSpec.parse(method).build(missing)
    assert not heads_alone.has_mlp()
    assert found.has_mlp()
    assert not found.has_mlp(directions=True)


def test_one_constant_per_site(pair) -> None:
    joined = MethodSpec.parse("lcc+mlp-lcc+mlp-gain")
    assert joined.parts == tuple(METHODS[name] for name in ("lcc", "mlp-lcc", "mlp-gain"))
    for method in ("mlp-lcc+mlp-offset", "lcc+mean-shift-sequential-mlp", "mlp-gain+mlp-gain"):
        with pytest.raises(RequestError, match="one constant per head and per MLP"):
            MethodSpec.parse(method)
    assert MethodSpec.parse("mlp-offset+lcc+gain").bias_sites == ("z", "mlp")
    for method, sites, spectra in (
        ("lcc", ("z",), ("z",)), ("offset+mlp-offset", ("z", "mlp"), ("z",)), ("mlp-lcc", ("z", "mlp"), ("z", "mlp")),
    ):  # fmt: skip
        spec = MethodSpec.parse(method)
        assert (spec.scan_sites, spec.spectra) == (sites, spectra)


def test_every_method_declares_what_it_does(pair, wide: Scan, question_file: Path) -> None:
    """The declared footprint is what training and export find."""
    sequences = encode(load_data(str(question_file), n=8), pair.tokenizer)
    ingredients = replace(given(pair, wide), pair=pair, sequences=sequences)
    for name in METHODS:
        spec = MethodSpec.parse(name)
        injection = spec.build(ingredients)
        footprint = injection.footprint
        assert footprint.biases == spec.bias_sites
        assert footprint.n_trained == sum(number.numel() for number in injection.parameters() if number.requires_grad)
        assert (footprint.n_trained == 0) == (spec.n_trained is None)
        assert footprint.folds == (not spec.compare_only or name == "flap")
        if spec.compare_only:
            continue
        assert bool(footprint.weights) == (not footprint.biases or name == "perp")
        restoration = Restoration.of(injection, RestorationRecord("d", "p", "", "", name, "none", 0, 0))
        assert restoration.footprint.biases == footprint.biases
        assert set(restoration.footprint.weights) == set(footprint.weights)
    rows = {row["method"]: row for row in describe_methods(ingredients)}
    assert rows["mlp-lcc"]["trains"] == str(N_LAYERS * (7 + D_MLP))
    assert rows["lcc"]["folds into"] == "biases of output projections"
    formulas = {row["method"]: row for row in describe_methods()}
    assert formulas.keys() == METHODS.keys()
    assert formulas["mlp-lcc"]["trains"] == "(K + d_mlp) per layer"
    assert formulas["lcc"]["refused"] == rows["lcc"]["refused"] == ""
    without = {row["method"]: row for row in describe_methods(given(pair, None))}
    assert without["lcc"]["refused"].startswith("expected a scan of the pair")
    assert (without["norms"]["refused"], without["norms"]["trains"]) == ("", str((2 * N_LAYERS + 1) * D_MODEL))
    both = Footprint.joined([Footprint(("mlp",), ("a",), 2), Footprint(("z",), ("a", "b"), 3, 4)])
    assert both == Footprint(("z", "mlp"), ("a", "b"), 5, 4)
    assert not both.folds


def test_another_width_is_refused(pair, wide: Scan, tmp_path: Path) -> None:
    injection = MethodSpec.parse("mlp-mean-shift").build(given(pair, wide))
    restoration = Restoration.of(injection, RestorationRecord("d", "p", "", "", "mlp-mean-shift", "none", 0, 0))
    other = load_hooked(save_model(build_model(intermediate_size=24), tmp_path / "other")).model
    message = "expected a model with d_mlp 44, got 24; name the model"
    with pytest.raises(RequestError, match=message), restoration.applied_to(other):
        pass


def test_slots_of_the_down_projection(pruned_dir: Path, pair) -> None:
    slots = find_slots(Checkpoint(pruned_dir), projection_names(pair.pruned, "mlp"), "mlp")
    assert slots.config == {"mlp_bias": True}
    assert slots.biases == tuple(f"model.layers.{i}.mlp.down_proj.bias" for i in range(N_LAYERS))
    assert {name.split(".")[-2]: shape for name, shape in slots.zero_biases.items()} == {
        "gate_proj": (D_MLP,), "up_proj": (D_MLP,),
    }  # fmt: skip
    assert D_MODEL != D_MLP
