"""All selectors behind one interface: asked for by name, scored from one scan, kept with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import D_HEAD, N_HEADS, N_LAYERS

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.scan import Scan, scan
from lcc_lens.analysis.selectors.attribution_patching import score_attribution_patching
from lcc_lens.analysis.selectors.backward import response_gradients
from lcc_lens.analysis.selectors.evidence import Evidence, ScoreSettings
from lcc_lens.analysis.selectors.names import ALWAYS_SCORED, DEFAULT_SELECTOR, SCORED_BY_DEFAULT, SELECTORS
from lcc_lens.analysis.selectors.registry import REGISTRY, check_selectors, named_selector, register_selector, score
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import Data, encode, load_data
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.frontends.cli.main import run


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=12)


@pytest.fixture(scope="module")
def scored(pair, data: Data) -> Scan:
    return scan(pair, data, selectors=SELECTORS, selector_examples=5)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_scores_every_head(scored: Scan, name: Any) -> None:
    scores = scored.scores(name)
    assert scores.selector == name
    assert scores.value.shape == scores.stderr.shape == (N_LAYERS, N_HEADS)
    assert bool(scores.value.isfinite().all())
    assert bool(scores.stderr.isfinite().all())
    assert float(scores.stderr.min()) >= 0
    assert len(scores.value.unique()) > 1  # it tells heads apart
    assert (scores.n_examples > 0) == (name != "random")
    chosen = scored.select(name, share=0.4)
    assert len(chosen) == 6
    assert chosen == sorted(set(chosen))


def test_scores_survive_save_and_load(scored: Scan, tmp_path: Path) -> None:
    scored.save(tmp_path)
    again = Scan.load(tmp_path)
    assert set(again.selected_by) == set(SELECTORS) - set(ALWAYS_SCORED)
    for name in SELECTORS:
        before, after = scored.scores(name), again.scores(name)
        assert torch.equal(after.value, before.value), name
        assert torch.equal(after.stderr, before.stderr), name
        assert (after.selector, after.n_examples, after.settings) == (name, before.n_examples, before.settings)
        assert again.select(name, share=0.3) == scored.select(name, share=0.3)
    columns = again.table().columns
    assert {*again.selected_by, "mse"} <= set(columns)
    assert {f"{name}_stderr" for name in [*again.selected_by, "mse"]} <= set(columns)


def test_scores_say_how_many_examples_they_saw(scored: Scan) -> None:
    seen = {name: scored.scores(name).n_examples for name in SELECTORS}
    assert seen["mse"] == seen["interaction"] == 12
    assert seen["kl"] == seen["attribution"] == seen["gradient"] == seen["patching"] == 5
    assert seen["probe"] == 4  # held-out pairs: 0.3 x 12 rounded up


def test_scan_and_selector_by_hand_agree(pair, data: Data, scored: Scan) -> None:
    sequences = encode(data, pair.tokenizer)[:5]
    by_hand = score_attribution_patching(response_gradients(pair, sequences))
    assert torch.allclose(scored.scores("attribution").value, by_hand.value, atol=1e-6)


def test_one_backward_pass_serves_both_gradient_selectors(
    pair, data: Data, scored: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(pair_: Any, sequences: Any, **options: Any) -> Any:
        calls.append(len(sequences))
        return response_gradients(pair_, sequences, **options)

    monkeypatch.setattr("lcc_lens.analysis.selectors.evidence.response_gradients", counting)
    sequences = encode(data, pair.tokenizer)
    evidence = Evidence(pair, sequences, scored.heads, scored.components, settings=ScoreSettings(examples=3))
    found = score(("attribution", "gradient", "mse"), evidence)
    assert list(found) == ["attribution", "gradient", "mse"]
    assert calls == [3]
    with pytest.raises(RequestError, match="expected questions with right and wrong answers, got none in data"):
        score(("probe",), evidence)


def test_a_scan_has_the_scores_that_heads_are_chosen_by(pair, data: Data) -> None:
    found = scan(pair, data)
    assert tuple(found.selected_by) == SCORED_BY_DEFAULT
    assert found.select() == found.select(DEFAULT_SELECTOR)
    assert not scan(pair, data, selectors=()).selected_by
    assert not scan(pair, data, selectors=("mse", "random")).selected_by


def test_scores_of_another_selector_can_be_added(scored: Scan, tmp_path: Path) -> None:
    value = torch.arange(N_LAYERS * N_HEADS).reshape(N_LAYERS, N_HEADS).float()
    more = scored.with_scores([HeadScores("patching", value, torch.ones_like(value), 3, {"by": "hand"})])
    assert torch.equal(more.scores("patching").value, value)
    assert [h.layer for h in more.select("patching", share=1 / 3)] == [2] * N_HEADS
    assert set(more.selected_by) == set(scored.selected_by)
    assert not torch.equal(scored.scores("patching").value, value)  # the scan itself is frozen
    more.save(tmp_path)
    assert Scan.load(tmp_path).scores("patching").settings == {"by": "hand"}


def test_probe_settings_reach_the_probe(pair, data: Data, scored: Scan) -> None:
    found = scan(pair, data, probe_folds=4, probe_rank=3, probe_solver="published", seed=2, selectors=("probe",))
    settings = found.scores("probe").settings
    assert (settings["folds"], settings["rank"], settings["solver"], settings["seed"]) == (4, 3, "published", 2)
    assert found.scores("probe").n_examples == 12  # every pair is held out once
    with pytest.raises(RequestError, match=f"expected a probe rank of at most d_head = {D_HEAD}, got 99"):
        scan(pair, data, probe_rank=99, selectors=("probe",))
    assert scored.scores("random", seed=1).rank_correlation(scored.scores("random", seed=2)) < 0.99


@pytest.mark.parametrize(
    ("names", "hint"),
    [(("guess",), "choose one of these"), (("mse", "Probe"), "did you mean 'probe'"), (("",), "choose one of these")],
)
def test_unknown_selector_is_refused_with_the_nearest_name(names: tuple[str, ...], hint: str) -> None:
    with pytest.raises(RequestError, match=rf"expected a selector \(probe, .*\), got '{names[-1]}'; {hint}"):
        check_selectors(names)


def test_names_count_once_and_in_order() -> None:
    assert check_selectors(["mse", "probe", "mse"]) == ("mse", "probe")
    assert tuple(REGISTRY)[: len(SELECTORS)] == SELECTORS
    assert not set(SCORED_BY_DEFAULT) & set(ALWAYS_SCORED)
    assert [set(named_selector(name).needs) for name in SCORED_BY_DEFAULT] == [
        {"models", "gradients"}, {"pairs"}, {"pairs"},
    ]  # fmt: skip


@pytest.fixture
def no_more_selectors() -> Iterator[None]:
    """Forget what a test registers."""
    entries = dict(REGISTRY._entries)
    yield
    REGISTRY._entries = entries


def score_later_heads(evidence: Evidence) -> HeadScores:
    value = torch.arange(evidence.heads.mse.numel()).reshape(evidence.heads.mse.shape).float()
    return HeadScores("toy", value, torch.ones_like(value), len(evidence.sequences), {"by": "hand"})


@pytest.mark.usefixtures("no_more_selectors")
def test_registered_selector_works_like_a_built_in_one(pair, data: Data, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a selector"):
        scan(pair, data, selectors=["later"])
    register_selector("later", score_later_heads)
    found = scan(pair, data, selectors=["later"], run=tmp_path)
    assert found.scores("later").selector == "later"
    last = [Head(N_LAYERS - 1, head) for head in range(N_HEADS)]
    assert found.select("later", share=1 / N_LAYERS) == last
    assert "later_stderr" in found.table().columns
    assert CompareConfig(selector="later").selector == "later"
    REGISTRY._entries.pop("later")  # a saved scan does not need the function any more
    again = Scan.load(tmp_path)
    assert again.select("later", share=1 / N_LAYERS) == last
    assert again.scores("later").settings == {"by": "hand"}
    with pytest.raises(RequestError, match=r"expected a selector .*, got 'later'"):
        CompareConfig(selector="later")


@pytest.mark.usefixtures("no_more_selectors")
def test_registering_refuses_taken_names_and_scores_of_another_shape(scored: Scan, pair, data: Data) -> None:
    for replace in (False, True):  # built-in selectors stay
        with pytest.raises(RequestError, match="expected a new selector name, got 'mse'"):
            register_selector("mse", score_later_heads, replace=replace)
    register_selector("later", score_later_heads)
    with pytest.raises(RequestError, match="pass replace=True"):
        register_selector("later", score_later_heads)
    register_selector("later", lambda evidence: HeadScores("x", torch.zeros(1, 2), torch.zeros(1, 2), 1), replace=True)
    evidence = Evidence(pair, encode(data, pair.tokenizer), scored.heads, scored.components)
    with pytest.raises(
        RequestError, match=r"expected HeadScores of shape \[3, 5\] from the selector 'later', got \[1, 2\]"
    ):
        score(["later"], evidence)


@pytest.mark.usefixtures("no_more_selectors")
def test_a_registered_selector_whose_needs_are_not_met_is_refused_before_the_passes(
    pair, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {i} of a text without answers" for i in range(40)))
    text = load_data(str(tmp_path / "text.txt"))
    register_selector("paired", score_later_heads, needs=["pairs"])
    register_selector("running", score_later_heads, needs=["models"])
    with pytest.raises(RequestError, match="expected needs among pairs, models, gradients, causes, got 'gradient'"):
        register_selector("other", score_later_heads, needs=["gradient"])
    assert scan(pair, data, selectors=["paired", "running"], display=0).scores("paired").settings == {"by": "hand"}
    monkeypatch.setattr("lcc_lens.analysis.scan.scan._run", lambda *_: pytest.fail("the passes began"))
    with pytest.raises(RequestError, match="expected questions with right and wrong answers, got none"):
        scan(pair, text, selectors=["paired"])
    monkeypatch.setattr(type(pair), "one_at_a_time", True)
    with pytest.raises(RequestError, match="expected both models in memory for running, got one at a time"):
        scan(pair, data, selectors=["running"])


@pytest.mark.parametrize("command", ["compare", "restore", "scan"])
def test_help_of_the_command_line_names_every_selector(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert not [name for name in SELECTORS if name not in text]
