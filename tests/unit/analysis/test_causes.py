"""Why a head lost: the exact division of every head's difference by cause."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.commands import call
from support.pairs import FAMILIES, encoded
from support.tiers import NEEDS_TL4
from support.tiny import D_HEAD, D_MODEL, N_HEADS, N_LAYERS, build_model, save_model
from torch import Tensor
from torch.nn.functional import linear

from lcc_lens.analysis.causes.attention_weights import AttentionWeights
from lcc_lens.analysis.causes.causes import HEAD_CAUSES, MLP_CAUSES
from lcc_lens.analysis.causes.division import causes_refusal, find_causes
from lcc_lens.analysis.causes.shapley import COMBINATIONS, shapley_parts
from lcc_lens.analysis.causes.swapped import Call, Projections, watched_modules
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.exporters.huggingface import export
from lcc_lens.models.hooked.activations import Positions
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.pruning.jobs import prune
from lcc_lens.restoration.injections.constants import MeanShift
from lcc_lens.restoration.restore import restore
from lcc_lens.restoration.training.config import TrainConfig

#: Causes of attention beside the input, in the order of combinations.
_OWN = {"pattern": ("q_proj", "k_proj"), "value": ("v_proj",)}


@pytest.fixture(scope="module")
def divided(pair: Pair, question_file: Path) -> Scan:
    return scan(pair, load_data(str(question_file), n=9), causes=True, display=0)


def pruned_only(folder: Path, change) -> Pair:
    """A pair whose second model differs by one change."""
    model = build_model(3)
    save_model(model, folder / "dense")
    with torch.no_grad():
        change(model.model.layers)
    save_model(model, folder / "pruned")
    return load_pair(folder / "dense", folder / "pruned")


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8))
def test_shapley_parts_sum_to_the_difference_whatever_the_function(values: list[float]) -> None:
    outputs = {c: torch.tensor(v, dtype=torch.float64) for c, v in zip(COMBINATIONS, values, strict=True)}
    parts = shapley_parts(outputs)
    assert float(parts.sum()) == pytest.approx(values[-1] - values[0], abs=1e-9)


def test_shapley_parts_of_a_product_share_what_two_causes_do_together() -> None:
    outputs = {(a, b, c): torch.tensor(float((1 + 2 * a) * (1 + 4 * b))) for a, b, c in COMBINATIONS}
    assert shapley_parts(outputs).tolist() == pytest.approx([6.0, 8.0, 0.0])  # (2 + 10) / 2, (4 + 12) / 2


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
def test_parts_sum_to_the_difference_of_the_scan(families, family: str) -> None:
    pair = families(family)
    found = scan(pair, [f"what is {i} plus {i}?" * (1 + i % 3) for i in range(6)], causes=True, selectors=())
    assert found.causes is not None
    heads, mlp = found.causes.heads, found.causes.mlp
    assert heads.causes == HEAD_CAUSES
    difference = found.heads.mean_difference
    assert float((heads.mean.sum(2) - difference).abs().max()) < 1e-5 * max(1.0, float(difference.abs().max()))
    assert torch.allclose(heads.squared_difference, found.heads.squared_difference, rtol=1e-4)
    assert torch.allclose(heads.fraction.sum(-1), torch.ones(3, pair.n_heads), atol=1e-5)
    assert float(heads.fraction[0, :, 0].abs().max()) < 1e-6  # the first layer reads the same embeddings
    assert float(heads.fraction[1:, :, 0].abs().max()) > 0.1
    assert mlp is not None
    assert mlp.causes == MLP_CAUSES
    assert torch.allclose(mlp.fraction.sum(-1), torch.ones(3, 1), atol=1e-5)


def test_parts_equal_plain_attention_with_swapped_weights(
    divided: Scan, pair: Pair, dense_dir: Path, pruned_dir: Path, question_file: Path
) -> None:
    sequences = encode(load_data(str(question_file), n=9), pair.tokenizer)
    heads, mlp = plain_parts(dense_dir, pruned_dir, [s.tokens for s in sequences])
    found = divided.causes
    assert found is not None
    assert found.mlp is not None
    for expected, statistics in ((heads, found.heads), (mlp, found.mlp)):
        difference = expected.sum(0)
        squared = difference.square().sum((1, -1))
        along = (expected * difference).sum((2, -1)).movedim(0, -1)
        assert torch.allclose(statistics.fraction, (along / squared[..., None]).float(), atol=1e-4)
        assert torch.allclose(statistics.mean, expected.mean(2).movedim(0, 2).float(), atol=1e-4)
        assert torch.allclose(statistics.squared, expected.square().sum((2, -1)).movedim(0, -1).float(), rtol=1e-3)
    stacked = heads.permute(1, 3, 0, 2, 4)  # layer, head, cause, sample, d_head
    assert torch.allclose(found.heads.singular_values, torch.linalg.svdvals(stacked).float(), rtol=1e-3, atol=1e-2)
    own = heads[1:].sum(0).square().mean((1, -1)).float()
    assert torch.allclose(found.heads.own, own, rtol=1e-3)


def test_projections_of_the_same_input_by_the_same_weights_are_computed_once(pair: Pair) -> None:
    weights, x = AttentionWeights(pair, 1), torch.randn(2, 7, D_MODEL)
    calls: list[Call] = []
    with watched_modules(pair.pruned, lambda part, layer, call, _: calls.append(call) if layer == 1 else None):
        pair.pruned(torch.arange(14).reshape(2, 7))
    own = {parameter.owner for parameter in weights.plain.parameters.values()}
    wrapped = next(iter(own))
    wrapped.forward = kept = wrapped.forward  # as accelerate wraps a module that lies on another device
    computed, combinations = Projections(), [(qk, v) for qk in (False, True) for v in (False, True)]
    with torch.no_grad():
        for qk, v in combinations:
            chosen = weights.chosen(qk_dense=qk, v_dense=v)
            again = weights.plain.before_output(calls[0], x, chosen, computed)
            assert again.equal(weights.plain.before_output(calls[0], x, chosen))
    assert len(computed) == 2 * 3  # of queries, keys and values by the weights of both models, not 4 * 3
    assert {owner: owner.__dict__.get("forward") for owner in own} == {**dict.fromkeys(own), wrapped: kept}
    del wrapped.forward


def test_a_call_is_repeated_without_its_cache_whatever_its_name() -> None:
    from transformers import DynamicCache

    x, y, mask = torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 1, 2, 2)
    call = Call((x,), {"attention_mask": mask, "cache": DynamicCache(), "kv": DynamicCache(), "use_cache": True})
    args, options = call.on(y)
    assert args[0] is y
    assert options == {"attention_mask": mask, "use_cache": False}


def plain_parts(dense_dir: Path, pruned_dir: Path, sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Parts ``[cause, layer, sample, head, d_head]`` of head outputs, and of MLP outputs, by plain modules."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager") for path in (pruned_dir, dense_dir)
    ]
    heads, mlps = [], []
    for tokens in sequences:
        calls = [plain_calls(model, tokens) for model in models]
        by_layer = [plain_layer(models, layer, [c[layer] for c in calls]) for layer in range(N_LAYERS)]
        heads.append(torch.stack([h for h, _ in by_layer], dim=1))
        mlps.append(torch.stack([m for _, m in by_layer], dim=1))
    return torch.cat(heads, dim=2), torch.cat(mlps, dim=2)


def plain_calls(model, tokens: Tensor) -> list[dict]:
    """By layer, what a plain model calls attention and MLP with."""
    calls: list[dict] = [{} for _ in range(N_LAYERS)]
    handles = []
    for layer, kept in zip(model.model.layers, calls, strict=True):
        keep = lambda module, args, kwargs, kept=kept: kept.update(kwargs)  # noqa: E731
        handles.append(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True))
        handles.append(layer.mlp.register_forward_pre_hook(lambda m, args, kept=kept: kept.update(mlp=args[0])))
    with torch.no_grad():
        model(tokens[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def plain_layer(models: list, layer: int, calls: list[dict]) -> tuple[Tensor, Tensor]:
    """The Shapley parts of one layer, by the textbook formula over orders."""
    import copy
    from itertools import permutations

    z, out = {}, {}
    for combination in COMBINATIONS:
        chosen, pattern, value = (int(is_dense) for is_dense in combination)
        attention = copy.deepcopy(models[0].model.layers[layer].self_attn)
        for source, names in ((pattern, _OWN["pattern"]), (value, _OWN["value"])):
            for name in names:
                state = getattr(models[source].model.layers[layer].self_attn, name).state_dict()
                getattr(attention, name).load_state_dict(state)
        attention.o_proj = torch.nn.Identity()
        call = {k: v for k, v in calls[chosen].items() if k != "mlp"}
        with torch.no_grad():
            z[combination] = attention(**call)[0][0].double().unflatten(-1, (N_HEADS, D_HEAD))
            gates, down = models[pattern].model.layers[layer].mlp, models[value].model.layers[layer].mlp
            hidden = calls[chosen]["mlp"][0]
            post = torch.nn.functional.silu(linear(hidden, gates.gate_proj.weight)) * linear(
                hidden, gates.up_proj.weight
            )
            out[combination] = linear(post, down.down_proj.weight).double()[:, None]
    parts = [[torch.zeros(()).double()] * 3 for _ in range(2)]
    for order in permutations(range(3)):
        for which, outputs in enumerate((z, out)):
            present: tuple[bool, ...] = (False, False, False)
            for cause in order:
                after = tuple(p or i == cause for i, p in enumerate(present))
                parts[which][cause] = parts[which][cause] + (outputs[after] - outputs[present]) / 6
                present = after
    return torch.stack(parts[0]), torch.stack(parts[1])


def test_fractions_and_errors_are_those_of_a_ratio_over_examples(
    divided: Scan, pair: Pair, question_file: Path
) -> None:
    sequences = encode(load_data(str(question_file), n=9), pair.tokenizer)
    alone = [find_causes(pair, [sequence]).heads for sequence in sequences]
    squared = torch.stack([a.squared_difference for a in alone]).double()[..., None]
    along = torch.stack([a.fraction for a in alone]).double() * squared
    ratio = along.sum(0) / squared.sum(0)
    n = len(sequences)
    expected = ((along - ratio * squared).square().sum(0) * n / (n - 1)).sqrt() / squared.sum(0)
    assert divided.causes is not None
    assert torch.allclose(divided.causes.heads.fraction, ratio.float(), atol=1e-5)
    assert torch.allclose(divided.causes.heads.stderr, expected.float(), rtol=1e-2, atol=1e-5)
    assert bool(alone[0].stderr.isnan().all())


def test_pruning_values_alone_gives_value_parts_there_and_inherited_parts_above(tmp_path: Path) -> None:
    def change(layers) -> None:
        layers[1].self_attn.v_proj.weight[::2] = 0

    pair = pruned_only(tmp_path, change)
    heads = find_causes(pair, encoded(pair, 4)).heads
    assert bool((heads.squared_difference[0] == 0).all())
    assert bool(heads.fraction[0].isnan().all())
    assert torch.allclose(heads.fraction[1], torch.tensor([0.0, 0.0, 1.0]).expand(5, 3), atol=1e-6)
    assert torch.allclose(heads.fraction[2], torch.tensor([1.0, 0.0, 0.0]).expand(5, 3), atol=1e-6)
    assert float(heads.squared_difference[1:].min()) > 1e-3


def test_pruning_an_mlp_alone_gives_inherited_parts_alone(tmp_path: Path) -> None:
    def change(layers) -> None:
        layers[1].mlp.down_proj.weight[:, ::2] = 0

    pair = pruned_only(tmp_path, change)
    causes = find_causes(pair, encoded(pair, 4))
    assert bool((causes.heads.squared_difference[:2] == 0).all())
    assert torch.allclose(causes.heads.fraction[2], torch.tensor([1.0, 0.0, 0.0]).expand(5, 3), atol=1e-6)
    assert causes.mlp is not None
    assert causes.mlp.fraction[1].flatten().tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert causes.mlp.fraction[2].flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-6)


def test_equal_models_lost_nothing(dense_dir: Path) -> None:
    pair = load_pair(dense_dir, dense_dir)
    causes = find_causes(pair, encoded(pair, 3))
    assert float(causes.heads.squared.max()) == float(causes.heads.own.max()) == 0
    assert bool(causes.heads.fraction.isnan().all())
    assert causes.mlp is not None
    assert float(causes.mlp.squared.max()) == 0


def test_positions_are_those_of_the_scan(pair: Pair, question_file: Path) -> None:
    data = load_data(str(question_file), n=5)
    found = scan(pair, data, positions="response", causes=True, selectors=(), display=0)
    assert found.causes is not None
    assert torch.allclose(found.causes.heads.mean.sum(2), found.heads.mean_difference, atol=1e-5)
    assert found.causes.heads.n_samples == found.record.n_samples


@pytest.mark.parametrize("positions", ["all", "last", "response", (-1, 200)])
def test_a_scan_finds_them_in_its_own_passes_whatever_else_these_read(
    pair: Pair, question_file: Path, positions: Positions
) -> None:
    data = load_data(str(question_file), n=14)
    found = scan(pair, data, positions=positions, causes=True, selectors=("interaction",), display=0, batch_tokens=90)
    assert data.examples[0].wrong is not None  # its tokens count for the selector alone
    assert found.causes is not None
    alone = find_causes(pair, encode(data, pair.tokenizer), positions=positions).tensors()
    for name, tensor in found.causes.tensors().items():
        assert torch.allclose(tensor, alone[name], rtol=1e-3, atol=1e-4, equal_nan=True), name
    plain = scan(pair, data, positions=positions, selectors=("interaction",), display=0, batch_tokens=90)
    assert torch.allclose(found.relative_loss, plain.relative_loss, rtol=1e-4)
    assert torch.allclose(found.scores("interaction").value, plain.scores("interaction").value, rtol=1e-3, atol=1e-5)


def test_a_sliced_model_is_divided_over_the_heads_that_both_have(tmp_path: Path, text_file: Path) -> None:
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    dense = save_model(build_model(5, **shape), tmp_path / "dense")
    prune(
        dense, tmp_path / "out", method="slimgpt", sparsity=0.5, sliced=True, calibration=str(text_file),
        n_samples=4, seq_len=48,
    )  # fmt: skip
    pair = load_pair(dense, tmp_path / "out")
    assert pair.n_heads < 6
    found = scan(pair, load_data(str(text_file)), max_length=40, limit=4, causes=True, selectors=())
    assert found.causes is not None
    assert torch.allclose(found.causes.heads.mean.sum(2), found.heads.mean_difference, atol=1e-5)
    assert found.causes.mlp is None  # its neurons are others


def test_causes_are_saved_and_stand_in_the_table(divided: Scan, found: Scan, tmp_path: Path) -> None:
    divided.save(tmp_path / "run")
    again = Scan.load(tmp_path / "run").causes
    assert again is not None
    assert divided.causes is not None
    for name, tensor in divided.causes.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    table = again.table()
    assert divided.table()[["inherited", "pattern", "value"]].equals(table[["inherited", "pattern", "value"]])
    assert table[list(HEAD_CAUSES)].sum(axis=1).tolist() == pytest.approx([1.0] * 15, abs=1e-5)
    assert len(again.mlp_table()) == N_LAYERS
    assert again.mlp is not None
    assert again.mlp.mean.shape == (N_LAYERS, 1, 3, D_MODEL)
    assert "inherited" not in found.table().columns
    assert "inherited" in repr(again)
    found.save(tmp_path / "old")
    assert Scan.load(tmp_path / "old").causes is None


def test_the_selector_own_scores_by_own_parts(pair: Pair, question_file: Path, divided: Scan) -> None:
    scored = scan(pair, load_data(str(question_file), n=9), selectors=("own",), display=0)
    assert scored.causes is not None
    assert divided.causes is not None
    assert torch.equal(scored.scores("own").value, divided.causes.heads.own)
    assert torch.allclose(scored.scores("own").value[0], scored.scores("mse").value[0], rtol=1e-4)
    assert float((scored.scores("own").value[2] - scored.scores("mse").value[2]).abs().max()) > 1e-4


def test_attention_that_takes_no_other_weights_is_named_and_the_rest_still_comes(
    pair: Pair, question_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lcc_lens.analysis.causes.division.attention_refusal", lambda model: "one matrix for all")
    data = load_data(str(question_file), n=5)
    found = scan(pair, data, causes=True, selectors=(), display=0)
    assert found.causes is None
    assert bool((found.relative_loss > 0).all())
    assert "no causes: expected attention that can be given other weights" in caplog.text
    assert "one matrix for all" in caplog.text
    with pytest.raises(RequestError, match="expected attention that can be given other weights"):
        scan(pair, data, selectors=("own",))
    with pytest.raises(RequestError, match="one matrix for all"):
        find_causes(pair, encoded(pair, 2))


def test_values_that_are_not_told_apart_are_found_out(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair(dense_dir, dense_dir)
    monkeypatch.setattr("lcc_lens.analysis.causes.attention_weights._SEPARATE", ("v_proj", "k_proj", "q_proj"))
    assert "not told apart" in (causes_refusal(pair) or "")


def test_one_model_at_a_time_is_refused(dense_dir: Path, pruned_dir: Path) -> None:
    alone = load_pair(dense_dir, pruned_dir, one_at_a_time=True)
    assert "both models in memory" in (causes_refusal(alone) or "")


def test_a_restoration_leaves_own_parts_and_its_own_constant(pair: Pair, question_file: Path, divided: Scan) -> None:
    data, heads = load_data(str(question_file), n=9), [Head(0, 1), Head(0, 3)]
    shift = MeanShift(divided.components, heads)
    with shift.applied_to(pair.pruned):
        restored = scan(pair, data, causes=True, selectors=(), display=0)
    left = divided.against(restored)
    assert left.before is not None
    assert left.after is not None
    remaining = restored.heads.squared_difference / divided.heads.squared_difference
    assert torch.allclose(left.remaining, remaining, rtol=1e-4)
    assert torch.allclose(torch.stack(list(left.before.values())).sum(0), torch.ones(3, 5), atol=1e-5)
    assert torch.allclose(torch.stack(list(left.after.values())).sum(0), remaining, atol=1e-4)
    for head in heads:  # the constant hides what its own weights lost, which stays as it was
        assert float(left.remaining[head]) == pytest.approx(1 - float(divided.constant_share[head]), abs=1e-4)
        assert float(left.after["pattern"][head]) == pytest.approx(float(left.before["pattern"][head]), abs=1e-4)
        assert float(left.after["constant"][head]) == pytest.approx(-float(divided.constant_share[head]), abs=1e-4)
    assert float(left.after["constant"][1:].abs().max()) < 1e-4
    assert float((left.after["inherited"][1:] - left.before["inherited"][1:]).abs().max()) > 1e-3
    assert len(left.table()) == 15
    assert "remaining" in repr(left)


def test_an_exported_restoration_is_scanned_like_a_pruned_model(
    dense_dir: Path, pruned_dir: Path, pair: Pair, question_file: Path, divided: Scan, tmp_path: Path
) -> None:
    data, heads = load_data(str(question_file), n=9), [Head(0, 1), Head(0, 3)]
    restoration = restore(pair, divided, heads, data, method="mean-shift")
    export(restoration, pruned_dir, tmp_path / "out")
    restored = scan(load_pair(dense_dir, tmp_path / "out"), data, causes=True, selectors=(), display=0)
    left = divided.against(restored)
    assert left.after is not None
    assert torch.allclose(left.remaining[0], torch.ones(5), atol=1e-4)  # the bias acts behind the head
    assert float(left.after["constant"].abs().max()) < 1e-4
    with restoration.applied_to(pair.pruned):
        hooked = scan(pair, data, causes=True, selectors=(), display=0)
    assert torch.allclose(left.remaining[1:], divided.against(hooked).remaining[1:], atol=1e-4)


def test_changed_weights_are_divided_under_hooks_as_exported(
    dense_dir: Path, pruned_dir: Path, pair: Pair, question_file: Path, divided: Scan, tmp_path: Path
) -> None:
    data = load_data(str(question_file), n=9)
    restoration = restore(pair, None, [], data, method="low-rank", config=TrainConfig(lr=0.05))
    export(restoration, pruned_dir, tmp_path / "out")
    exported = divided.against(scan(load_pair(dense_dir, tmp_path / "out"), data, causes=True, selectors=(), display=0))
    with restoration.applied_to(pair.pruned):
        hooked = divided.against(scan(pair, data, causes=True, selectors=(), display=0))
    assert float((hooked.remaining - 1).abs().max()) > 1e-2
    assert torch.allclose(hooked.remaining, exported.remaining, atol=1e-3)
    assert hooked.after is not None
    assert exported.after is not None
    for cause, left in exported.after.items():
        assert torch.allclose(hooked.after[cause], left, atol=1e-3), cause


def test_removed_heads_count_in_no_mean(dense_dir: Path, tmp_path: Path, question_file: Path) -> None:
    """A layer's heads share their values, which are halved; nothing reads the output of the head that is removed."""
    model = build_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 0.5
        model.model.layers[1].self_attn.o_proj.weight[:, 3 * D_HEAD : 4 * D_HEAD] = 0
    pair, data = load_pair(dense_dir, save_model(model, tmp_path / "pruned")), load_data(str(question_file), n=3)
    with_removed = scan(pair, data, causes=True, selectors=(), display=0)
    assert pair.head_map.removed == ((), (3,), ())
    assert with_removed.causes is not None
    alone = find_causes(pair, encode(data, pair.tokenizer)).heads.fraction
    for fraction in (with_removed.causes.heads.fraction, alone):
        assert fraction[1:].isnan().any(-1).nonzero().tolist() == [[0, 3]]
    left = with_removed.against(with_removed)
    assert left.remaining[1:].isnan().nonzero().tolist() == [[0, 3]]
    assert float(left.remaining.nanmean()) == 1
    assert left.before is not None
    assert float(left.before["value"][1].nanmean()) == pytest.approx(1, abs=1e-4)


def test_scans_of_other_data_are_not_compared(pair: Pair, found: Scan, question_file: Path, divided: Scan) -> None:
    with pytest.raises(RequestError, match="expected two scans of the same n_examples"):
        divided.against(found)
    assert divided.against(scan(pair, load_data(str(question_file), n=9), selectors=(), display=0)).before is None
    first, second = (scan(pair, [text], selectors=(), display=0) for text in ("hello world", "goodbye you"))
    with pytest.raises(RequestError, match="expected two scans of the same examples of 1 prompts, got others"):
        first.against(second)


def test_scans_of_other_tokens_are_told_by_the_dense_model(pair: Pair) -> None:
    """A record of an earlier version may not name its examples; what the dense model computed tells them apart."""
    scans = []
    for texts in (["one two three"], ["three two one"]):
        one = scan(pair, texts, selectors=(), display=0)
        scans.append(dataclasses.replace(one, record=dataclasses.replace(one.record, groups=())))
    with pytest.raises(
        RequestError, match="expected two scans of the same tokens of 1 prompts, got others; scan alike"
    ):
        scans[0].against(scans[1])


def test_the_command_divides_differences(
    dense_dir: Path, pruned_dir: Path, question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", question_file, "--examples", 6, "--selectors", "own", "--causes"]
    assert call("scan", dense_dir, pruned_dir, tmp_path / "run", *words, "--out", tmp_path / "heads.csv") == 0
    assert "heads that changed most" in capsys.readouterr().out
    columns = (tmp_path / "heads.csv").read_text().splitlines()[0].split(",")
    assert {"own", "inherited", "pattern", "value", "value_stderr", "value_constant"} <= set(columns)
    assert Scan.load(tmp_path / "run").causes is not None


def test_attention_with_other_parameters_is_named(tmp_path: Path, dense_dir: Path) -> None:
    save_model(build_model(0, attention_bias=True), tmp_path / "biased")
    with_more = load_pair(dense_dir, tmp_path / "biased")  # biases that the dense model lacks count as zeros
    assert causes_refusal(with_more) is None
    with_fewer = load_pair(tmp_path / "biased", dense_dir)
    assert "expected k_proj.bias of layer 0 in the same shape in both models" in (causes_refusal(with_fewer) or "")


@NEEDS_TL4
def test_weights_on_disk_are_refused(dense_dir: Path, pruned_dir: Path) -> None:
    pair = load_pair(dense_dir, pruned_dir, device_map="disk")
    assert "expected all weights in memory to find causes" in (causes_refusal(pair) or "")
