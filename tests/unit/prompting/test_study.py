"""The study of prompts: exact zeros, the patching identity of rotary models, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.restorations import restoration_of

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, batches, pad
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.data.prompts import Example
from lcc_lens.frontends.plotting.run_figures import run_figures
from lcc_lens.frontends.plotting.studies import plot_prompt_study
from lcc_lens.models.hooked.hooks import z_name
from lcc_lens.models.pair import Pair
from lcc_lens.prompting.measuring import prompt_study
from lcc_lens.prompting.reactions import aligned_outputs, head_reactions
from lcc_lens.prompting.soft_prompt import fit_soft_prompt
from lcc_lens.prompting.study import PromptStudy, joined_studies
from lcc_lens.prompting.variants import prompt_variants
from lcc_lens.restoration.injections.base import Injection

NAMES = ["raw", "clear", "filler", "degraded"]


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=6)


@pytest.fixture(scope="module")
def study(pair: Pair, data: Data, pruned_dir: Path) -> PromptStudy:
    return prompt_study(pair, prompt_variants(data, NAMES), restoration_of(pruned_dir), heads=["clear"])


def test_the_raw_prompt_gains_exactly_nothing(study: PromptStudy) -> None:
    table = study.table().set_index("variant")
    for column in table.columns[table.columns.str.match("gain|pruned_minus")]:
        assert table.loc["raw", column] == 0
        assert table.loc["clear", column] != 0
    assert (study.interaction().set_index("variant").loc["raw", ["interaction", "interaction_high"]] == 0).all()


def test_no_restoration_means_no_interaction(pair: Pair, data: Data) -> None:
    study = prompt_study(pair, prompt_variants(data, NAMES), Injection())
    assert torch.equal(study.log_likelihood[1], study.log_likelihood[2])
    assert (study.interaction()["interaction"] == 0).all()
    assert study.gain("pruned", "clear").abs().min() > 0


def test_a_restoration_changes_what_the_prompt_does(study: PromptStudy) -> None:
    assert study.models == ("dense", "pruned", "restored")
    assert (study.interaction().set_index("variant").loc["clear", "interaction"]) != 0
    sensitivity = study.sensitivity().set_index("model")
    assert (sensitivity["sensitivity"] > 0).all()
    assert sensitivity.loc["dense", "over_dense"] == 0
    expected = study.log_likelihood[1].double().std(0).mean() - study.log_likelihood[0].double().std(0).mean()
    assert sensitivity.loc["pruned", "over_dense"] == pytest.approx(float(expected))


def test_intervals_are_paired(study: PromptStudy) -> None:
    row = study.table().set_index("variant").loc["filler"]
    likelihood = study.log_likelihood.double()
    difference = (likelihood[1, 2] - likelihood[1, 0]) - (likelihood[0, 2] - likelihood[0, 0])
    assert row["pruned_minus_dense"] == pytest.approx(float(difference.mean()))
    assert row["pruned_minus_dense_low"] <= row["pruned_minus_dense"] <= row["pruned_minus_dense_high"]


def test_a_single_example_has_no_interval(pair: Pair, data: Data) -> None:
    study = prompt_study(pair, prompt_variants(replace(data, examples=data.examples[:1]), NAMES))
    assert study.table().filter(regex="low|high").isna().all(axis=None)
    assert study.sensitivity().filter(regex="low|high").isna().all(axis=None)
    assert not study.table().filter(regex="gain_.*d$|dense$").isna().any(axis=None)


def test_questions_have_accuracies(study: PromptStudy, pair: Pair, data: Data) -> None:
    assert study.is_right is not None
    assert study.is_right.shape == (3, len(NAMES), len(data))
    expected = []
    for example in data.examples:
        sums = []
        for answer in (example.response, example.wrong or ""):
            ids = torch.tensor(pair.tokenizer(example.prompt + answer)["input_ids"])
            logits = torch.log_softmax(pair.dense.run_with_hooks(ids[None], fwd_hooks=[])[0].double(), -1)
            start = len(pair.tokenizer(example.prompt)["input_ids"])
            sums.append(float(logits[range(start - 1, len(ids) - 1), ids[start:]].sum()))
        expected.append(sums[0] > sums[1])
    assert study.is_right[0, 0].tolist() == expected
    assert study.table()["accuracy_dense"][0] == pytest.approx(sum(expected) / len(expected))


def test_a_study_is_saved_and_joined(study: PromptStudy, pair: Pair, data: Data, tmp_path: Path) -> None:
    study.save(tmp_path)
    loaded = PromptStudy.load(tmp_path)
    assert loaded.record == study.record
    assert torch.equal(loaded.log_likelihood, study.log_likelihood)
    assert torch.equal(loaded.reactions["clear"], study.reactions["clear"])
    assert loaded.table().equals(study.table())
    assert len(joined_studies([study, loaded]).record.groups) == len(data)  # the same examples count once
    assert joined_studies([study, loaded]).table().equals(study.table())
    with pytest.raises(RequestError, match="expected studies of the same models"):
        joined_studies([study, prompt_study(pair, prompt_variants(data, ["raw", "clear"]))])
    content = bytearray((tmp_path / "prompts.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "prompts.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match="got a changed file"):
        PromptStudy.load(tmp_path)


def patched_logits(pair: Pair, source: TokenSequence, target: TokenSequence) -> tuple[Any, Any, Any]:
    """Logits at the response: of the source's run, of the target's, and of the target's with all heads patched."""
    batch, model = pad([target], [0]), pair.pruned
    z = aligned_outputs(model, pad([source], [0]), batch)
    start = target.loss_from - 1

    def patch(layer: int) -> Any:
        def put(own: torch.Tensor, hook: Any) -> torch.Tensor:
            own = own.clone()
            own[:, start:] = z[layer][:, start:]
            return own

        return put

    hooks = [(z_name(layer), patch(layer)) for layer in range(pair.n_layers)]
    with torch.inference_mode():
        patched = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)[0, start:]
        plain = model.run_with_hooks(batch.tokens, fwd_hooks=[])[0, start:]
        other = model.run_with_hooks(source.tokens[None], fwd_hooks=[])[0, source.loss_from - 1 :]
    return other, plain, patched


def sequences(pair: Pair, *prompts: str) -> list[TokenSequence]:
    encoded = [pair.tokenizer(prompt)["input_ids"] for prompt in prompts]
    answer = pair.tokenizer(" yes!")["input_ids"]
    return [TokenSequence(torch.tensor(ids + answer), len(ids)) for ids in encoded]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_patching_every_head_gives_the_other_prompt_s_logits(families: Any, family: str) -> None:
    pair = families(family)
    source, target = sequences(pair, "Think first. Is 3 odd?\nAnswer:", "Is 3 odd?\nAnswer:")
    other, plain, patched = patched_logits(pair, source, target)
    torch.testing.assert_close(patched, other, rtol=1e-4, atol=1e-4)
    assert (plain - other).abs().max() > 1e-2


def test_learned_absolute_positions_are_refused(families: Any) -> None:
    pair = families("gpt2")
    source, target = sequences(pair, "Think first. Is 3 odd?\nAnswer:", "Is 3 odd?\nAnswer:")
    other, _, patched = patched_logits(pair, source, target)
    assert (patched - other).abs().max() > 1e-2  # why they are refused
    with pytest.raises(RequestError, match="got learned absolute ones"):
        head_reactions(pair.pruned, [source], [target])
    questions = Data("made", "instruction", (Example("Question: Is 3 odd?\nAnswer:", " yes", "g"),), "here")
    with pytest.raises(RequestError, match="got learned absolute ones"):
        prompt_study(pair, prompt_variants(questions, ["raw", "clear"]), heads=["clear"])


def test_one_head_s_reaction_is_a_patched_run(pair: Pair) -> None:
    sources = sequences(pair, "Think first. Is 3 odd?\nAnswer:", "Do not. Is 45 odd?\nAnswer:")
    targets = sequences(pair, "Is 3 odd?\nAnswer:", "Is 45 odd?\nAnswer:")
    found = head_reactions(pair.pruned, sources, targets, batch_tokens=60)
    assert found.shape == (2, 3, 5)
    for i, (layer, head) in enumerate([(0, 2), (2, 4)]):
        source, target = sources[i], targets[i]
        (batch,) = batches([target])
        z, start = aligned_outputs(pair.pruned, pad([source], [0]), batch), target.loss_from - 1

        def likelihood(hooks: list[Any], target: TokenSequence = target, start: int = start) -> float:
            with torch.inference_mode():
                logits = pair.pruned.run_with_hooks(target.tokens[None], fwd_hooks=hooks)[0]
            log = torch.log_softmax(logits, -1)[start:-1]
            return float(log.gather(1, target.tokens[start + 1 :, None]).mean())

        def put(
            own: torch.Tensor, hook: Any, z: Any = z, layer: int = layer, head: int = head, start: int = start
        ) -> Any:
            own = own.clone()
            own[:, start:, head] = z[layer][:, start:, head]
            return own

        expected = likelihood([(z_name(layer), put)]) - likelihood([])
        assert float(found[i, layer, head]) == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-6


def test_gains_are_drawn(study: PromptStudy, pair: Pair, data: Data, tmp_path: Path) -> None:
    figure = plot_prompt_study(study)
    drawn = figure.data[1]
    assert list(drawn.text) == NAMES[1:]
    row = study.table().set_index("variant").loc["clear"]
    assert (drawn.x[0], drawn.y[0]) == pytest.approx((row["gain_dense"], row["gain_pruned"]), rel=1e-4)
    assert drawn.error_y.array[0] == pytest.approx(row["gain_pruned_high"] - row["gain_pruned"], rel=1e-4)
    assert list(drawn.marker.color) == pytest.approx(study.table()["words"][1:].tolist(), rel=1e-4)
    study.save(tmp_path)
    assert run_figures(tmp_path)[0]["prompts"].data[1].x == drawn.x
    alone = plot_prompt_study(prompt_study(pair, prompt_variants(replace(data, examples=data.examples[:1]), NAMES)))
    assert alone.data[1].error_x.array == (0, 0, 0)
    with pytest.raises(RequestError, match="expected variants beside the raw prompt"):
        plot_prompt_study(prompt_study(pair, prompt_variants(data, ["raw"])))


def test_heads_of_a_variant(study: PromptStudy) -> None:
    scores = study.heads("clear")
    assert scores.value.shape == (3, 5)
    assert scores.n_examples == len(study.record.groups)
    with pytest.raises(RequestError, match="expected a variant with measured heads"):
        study.heads("filler")


def test_a_soft_prompt_is_trained_and_measured(pair: Pair, question_file: Path, data: Data) -> None:
    train_on = load_data(str(question_file))
    soft = fit_soft_prompt(pair, train_on, n_tokens=3, epochs=2)
    study = prompt_study(pair, prompt_variants(data, ["raw", "soft"]), soft_prompt=soft)
    assert study.gain("pruned", "soft").mean() > 0.05
    sequence = TokenSequence(torch.tensor([5, 6, 7]), 2)
    assert soft.behind(sequence).tokens.tolist() == [0, 0, 0, 5, 6, 7]
    assert soft.behind(sequence).loss_from == 5
    with pytest.raises(RequestError, match="expected a trained soft prompt"):
        prompt_study(pair, prompt_variants(data, ["raw", "soft"]))


def test_a_soft_prompt_fits_into_the_context_with_its_sequences(families: Any) -> None:
    pair = families("gpt2")
    examples = tuple(Example("a" * 100, "b" * 60, f"g{i}") for i in range(4))
    soft = fit_soft_prompt(pair, Data("made", "instruction", examples, "here"), n_tokens=5)
    assert len(soft) == 5
    with pytest.raises(RequestError, match="expected responses that begin within 1 tokens"):
        fit_soft_prompt(pair, Data("made", "instruction", examples, "here"), n_tokens=128)


def test_refusals(pair: Pair, data: Data, caplog: pytest.LogCaptureFixture) -> None:
    variants = prompt_variants(data, ["raw", "clear"])
    with pytest.raises(RequestError, match="expected the variant 'raw' to compare with, got clear"):
        prompt_study(pair, {"clear": variants["clear"]})
    with pytest.raises(RequestError, match="expected the same examples in every variant, got others in 'clear'"):
        prompt_study(pair, {**variants, "clear": prompt_variants(load_data(data.source, n=5), ["clear"])["clear"]})
    with pytest.raises(RequestError, match="expected prompts with their responses of up to 8 tokens, got none"):
        prompt_study(pair, variants, max_length=8)
    with pytest.raises(RequestError, match="lower --max-length"):
        prompt_study(pair, variants, max_length=4096)
    with pytest.raises(RequestError, match="expected heads for written variants of the study, got 'verbose'"):
        prompt_study(pair, variants, heads=["verbose"])
    with pytest.raises(RequestError, match="expected a model of this study"):
        prompt_study(pair, variants).interaction()
    some = [Example("Is 3 odd?", response, f"g{i}") for i, response in enumerate((" yes", "", "", " no", "a" * 600))]
    mixed = prompt_variants(Data("made", "instruction", tuple(some), "here"), ["raw", "clear"])
    assert len(prompt_study(pair, mixed, response_tokens=600).record.groups) == 2
    assert caplog.messages[-2:] == [
        "skipped 2 of 5 examples without a response", "skipped 1 of 5 examples longer than 512 tokens in a variant",
    ]  # fmt: skip
    empty = Data("made", "instruction", tuple(some[1:3]), "here")
    with pytest.raises(RequestError, match="expected responses in here, got 2 empty ones; fill them in"):
        prompt_study(pair, prompt_variants(empty, ["raw", "clear"]))
    blank = Data("made", "instruction", (Example("  ", "yes", "g"),), "here")
    with pytest.raises(RequestError, match="got an empty one in 'raw' \\(example 0\\)"):
        prompt_study(pair, {"raw": blank})
