"""Poor data, broken models and wrong requests: what holds is given, what does not is named."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import D_HEAD, N_HEADS, N_LAYERS, build_model, save_model

from lcc_lens.analysis.causes.division import find_causes
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.analysis.selectors.evidence import ScoreSettings
from lcc_lens.analysis.selectors.linear_probe import linear_probe_scores
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.data.checks import check_role
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.data.prompts import Example
from lcc_lens.models.hooked.activations import SITES
from lcc_lens.models.pair import Pair, load_pair


def made_up(*triples: tuple[str, str, str | None]) -> Data:
    examples = tuple(Example(prompt, response, prompt, wrong) for prompt, response, wrong in triples)
    return Data("made up", "contrastive" if triples[0][2] else "instruction", examples, "this file")


def all_finite(found: Scan) -> bool:
    return all(bool(t.isfinite().all()) for t in found._tensors().values())


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=8)


def test_fewer_samples_than_coordinates_leave_directions_open(
    pair: Pair, question_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = scan(pair, load_data(str(question_file), n=4), positions="last")
    assert f"expected at least {D_HEAD} samples to determine every direction, got 4" in caplog.text
    assert "the last 2 directions of each head are arbitrary; all other statistics hold" in caplog.text
    assert found.components.n_determined == 4
    assert float(found.components.singular_values[..., 4:].max()) < 1e-2 * float(found.components.singular_values.max())
    assert torch.allclose(found.components.component(), found.mean_difference, atol=1e-5)
    assert all_finite(found)
    caplog.clear()
    scan(pair, load_data(str(question_file), n=D_HEAD), positions="last")
    assert "arbitrary" not in caplog.text


def test_one_class_costs_the_probe_scores(pair: Pair, data: Data, caplog: pytest.LogCaptureFixture) -> None:
    same = tuple(dataclasses.replace(e, response=" true", wrong=" false") for e in data.examples)
    one_sided = dataclasses.replace(data, examples=same)
    found = scan(pair, one_sided)
    assert list(found.selected_by) == ["attribution"]
    assert found.record.n_examples == 8
    assert "no probe scores: expected questions of both labels, got only ' true' in 8" in caplog.text
    with pytest.raises(RequestError, match="expected questions of both labels, got only ' true' in 8"):
        scan(pair, one_sided, selectors=("probe",))
    assert set(scan(pair, one_sided, selectors=("gradient", "mse")).selected_by) == {"gradient"}


def test_too_few_pairs_cost_only_the_probe(pair: Pair, question_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = load_data(str(question_file), n=3)
    found = scan(pair, few)
    assert list(found.selected_by) == ["attribution"]
    assert found.record.n_examples == 3
    assert "no probe scores: expected at least 4 pairs, got 3" in caplog.text
    assert float(found.relative_loss.max()) > 0
    with pytest.raises(RequestError, match="expected at least 4 pairs, got 3; scan more examples"):
        scan(pair, few, selectors=("mse", "interaction"))


@pytest.mark.parametrize("name", ["probe", "interaction", "kl"])
def test_text_has_no_answers_to_probe(pair: Pair, text_file: Path, name: Any) -> None:
    with pytest.raises(
        RequestError, match=r"expected questions with right and wrong answers, got none in .*; scan other data"
    ):
        scan(pair, load_data(str(text_file)), selectors=("gradient", name), limit=3)


def test_limit_above_the_context_is_refused(pair: Pair, data: Data) -> None:
    with pytest.raises(RequestError, match="within the models' context of 512 tokens, got 513; lower --max-length"):
        scan(pair, data, max_length=513)
    assert scan(pair, data, max_length=512).record.max_length == scan(pair, data).record.max_length == 512


def test_pairs_that_do_not_fit_are_left_out(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The second question fills the limit; the third one's answers differ only beyond it."""
    longer = made_up(
        ("a?", " yes", " no"), ("b" * 12, " yes", " no"), ("c" * 6, " is so", " is not"), ("d?", " 1", " 2")
    )
    found = scan(pair, longer, max_length=10)
    assert found.record.n_examples == 2
    assert "skipped 2 of 4 pairs longer than 10 tokens" in caplog.text
    kept = scan(pair, made_up(("a?", " yes", " no"), ("d?", " 1", " 2")), max_length=10)
    assert torch.equal(found.mean_difference, kept.mean_difference)
    with pytest.raises(
        RequestError, match=r"no contrastive pairs of at most 2 tokens in made up \(shortest: 4\); raise --max-length"
    ):
        scan(pair, longer, max_length=2)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Memory that nothing was written to holds NaN, which no statistic hides."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_positions_outside_some_or_all_sequences(pair: Pair, unwritten_is_nan: None) -> None:
    unequal = made_up(("short", " one", None), ("rather a lot longer", " than that", None), ("brief", " too", None))
    found = scan(pair, unequal, positions=(12, 14))
    assert found.record.n_samples == 2
    alone = scan(pair, Data("made up", "instruction", unequal.examples[1:2], "this file"), positions=(12, 14))
    assert torch.allclose(found.mean_difference, alone.mean_difference, atol=1e-6)
    assert torch.allclose(found.heads.squared_difference, alone.heads.squared_difference, rtol=1e-4)
    assert bool(found.heads.mse_stderr.isnan().all())  # both of one example
    with pytest.raises(RequestError, match="expected at least 2 positions to compare, got 0; scan more examples"):
        scan(pair, unequal, positions=(100,))
    with pytest.raises(RequestError, match="expected at least 2 positions to compare, got 1"):
        scan(pair, unequal, positions="end", limit=1)


def test_silent_head_is_named_and_all_numbers_stay_finite(
    pair: Pair, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    def silence(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    with pair.pruned.hooks(fwd_hooks=[("blocks.1.attn.hook_z", silence)]):
        found = scan(pair, data, selectors=("probe", "interaction", "kl", "attribution", "gradient", "patching"))
    assert "1 heads output only zeros in the pruned model: L1H2" in caplog.text
    assert (float(found.relative_loss[1, 2]), float(found.cosine[1, 2])) == (1, 0)
    assert found.heads.is_silent.nonzero().tolist() == [[1, 2]]
    assert all_finite(found)
    assert bool(torch.isfinite(torch.tensor(found.table().select_dtypes("number").values)).all())


def test_model_without_a_layers_values_is_scanned(
    dense_dir: Path, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model()
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight[:, 3 * D_HEAD : 4 * D_HEAD] = 0  # a head that goes nowhere
    found = scan(load_pair(dense_dir, save_model(model, tmp_path / "pruned")), data)
    assert "5 heads output only zeros in the pruned model: L2H0, L2H1, L2H2, L2H3, L2H4" in caplog.text
    assert all_finite(found)
    assert float(found.relative_loss[0].max()) == 0  # what a head puts out before the projection is unchanged
    assert found.head_map.removed == ((3,), (), ())
    assert len(found.select("mse", share=1.0)) == N_LAYERS * N_HEADS - 1
    assert found.table().is_removed.sum() == 1


@pytest.mark.parametrize(("of", "value"), [("dense", float("nan")), ("pruned", float("inf"))])
@pytest.mark.parametrize(
    ("point", "place"),
    [
        ("attn.hook_z", "head L1H3"),
        ("mlp.hook_post", "the MLP's post-activation of layer 1"),
        ("hook_resid_post", "the residual stream of layer 1"),
    ],
)
def test_activation_that_is_not_finite_names_its_place(
    pair: Pair, data: Data, of: str, value: float, point: str, place: str
) -> None:
    def spoil(x: torch.Tensor, hook: object) -> torch.Tensor:
        x = x.clone()
        x[:, :, 3] = value
        return x

    model = getattr(pair, of)
    with (
        model.hooks(fwd_hooks=[(f"blocks.1.{point}", spoil)]),
        pytest.raises(LensError, match=f"NaN or infinity in {place}; check the weights"),
    ):
        scan(pair, data)


def test_unknown_names_are_refused(pair: Pair, data: Data, found: Scan) -> None:
    """Users run without the type checks of these tests, which would refuse first."""
    with pytest.raises(RequestError, match=r"expected a selector \(probe, interaction, .*\), got 'guess'"):
        unwrap(scan)(pair, data, selectors=("probe", "guess"))
    settings = ScoreSettings()
    object.__setattr__(settings, "solver", "guess")
    for check in (settings.__post_init__, lambda: unwrap(linear_probe_scores)([], found.components, solver="guess")):
        with pytest.raises(RequestError, match=r"expected a probe solver \(newton, published\), got 'guess'"):
            check()
    for options in ({"sites": ("z", "nose")}, {"spectra": ("nose",)}):
        with pytest.raises(RequestError, match="expected sites among z, mlp, resid, got 'nose'"):
            unwrap(scan)(pair, data, **options)
    with pytest.raises(RequestError, match=r"expected a selector \(probe, interaction, .*\), got 'guess'"):
        unwrap(Scan.scores)(found, "guess")


@pytest.mark.parametrize("positions", [range(3), {0, 1, 2}, [0, 1, 2], torch.arange(3)])
def test_whole_numbers_in_any_form_are_positions(pair: Pair, data: Data, tmp_path: Path, positions: Any) -> None:
    found = unwrap(scan)(pair, data, positions=positions, selectors=(), display=0, run=tmp_path)
    assert found.record.positions == Scan.load(tmp_path).record.positions == (0, 1, 2)
    assert found.record.n_samples == 24


@pytest.mark.parametrize("positions", ["Last", 3, (), (0, "x"), (0, 1.5), (True, 0), ("0", "1"), None])
def test_what_are_no_positions_is_refused(pair: Pair, data: Data, tmp_path: Path, positions: Any) -> None:
    message = "expected positions all, last, end, response or whole numbers, got .*; name some"
    with pytest.raises(RequestError, match=message):
        unwrap(scan)(pair, data, positions=positions, run=tmp_path / "run")
    with pytest.raises(RequestError, match=message):
        unwrap(find_causes)(pair, [], positions=positions)
    assert not (tmp_path / "run").exists()


def test_heads_are_always_scanned_and_other_sites_as_asked(pair: Pair, data: Data, found: Scan) -> None:
    options: tuple[Any, ...] = ((), ("resid",), SITES)
    scans = [scan(pair, data, sites=sites, spectra=(*sites, "z"), selectors=(), display=0) for sites in options]
    for sites, some in zip(options, scans, strict=True):
        assert set(some.others) == set(sites) - {"z"}
        assert all(statistics.singular_values is not None for statistics in some.others.values())
        assert torch.equal(some.mean_difference, scans[0].mean_difference)
    assert found.others["mlp"].singular_values is None  # not unless asked for
    asked = scan(pair, data, sites=("z",), spectra=("mlp",), selectors=(), display=0)
    assert set(asked.others) == {"mlp"}
    assert asked.others["mlp"].singular_values is not None


def test_what_cannot_be_scored_is_refused_before_any_pass(
    pair: Pair, question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["lcc_lens.analysis.scan.scan"], "_run", lambda *plan: pytest.fail("it ran"))
    data = load_data(str(question_file), n=8)
    for request, message in (
        ({"positions": (9999,)}, r"at least 2 positions to compare, got 0; .*the longest example has \d+ tokens"),
        ({"probe_folds": 9}, r"at most 8 folds \(the number of pairs\), got 9"),
        ({"probe_rank": 7}, "a probe rank of at most d_head = 6, got 7"),
        ({"probe_rank": 7, "selectors": ("interaction",)}, "a probe rank of at most d_head = 6, got 7"),
        (
            {"selector_examples": 1, "selectors": ("gradient", "attribution", "patching")},
            "at least 2 examples for gradient, attribution, got 1; raise --selector-examples",
        ),
        ({"limit": 1, "selectors": ("attribution",)}, "at least 2 examples for attribution, got 1"),
    ):
        with pytest.raises(RequestError, match=message):
            scan(pair, data, **request)


def test_one_example_for_selectors_costs_the_gradients_alone(pair: Pair, data: Data) -> None:
    assert set(scan(pair, data, selector_examples=1, display=0).selected_by) == {"probe", "interaction"}
    found = scan(pair, data, selector_examples=1, selectors=("patching",), display=0)
    assert found.scores("patching").n_examples == 1


def test_prompts_are_scanned_as_they_are_given(pair) -> None:
    prompts = ["The capital of France is", "two and two make four"]
    found = scan(pair, prompts)
    assert found.record.n_examples == 2
    assert found.record.n_samples == sum(len(pair.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert len(found.ranking("attribution")) == 15
    assert scan(pair, prompts[0]).record.n_examples == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "name some prompts"),
        (["a", ""], "name some prompts"),
        ("boolq", r"pass load_data\('boolq', role='probe'\)"),
        (Path("own.jsonl"), r"pass load_data\('own.jsonl', role='probe'\)"),
    ],
)
def test_what_is_no_prompt_is_refused(pair, given: list[str] | str | Path, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        scan(pair, given)


def test_a_wrong_role_names_the_right_ones() -> None:
    with pytest.raises(RequestError, match=r"expected a role \(calibration, probe, train, held-out\), .* 'train'"):
        check_role("training")
