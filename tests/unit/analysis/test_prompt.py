"""One prompt in three models: against plain transformers, on several architectures, and as text."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.pairs import FAMILIES
from support.tiny import D_HEAD, N_HEADS, N_LAYERS, with_an_end
from transformers import AutoModelForCausalLM

import lcc_lens as lcc
from lcc_lens.analysis.lens.prompt import compare_prompt
from lcc_lens.analysis.lens.readings import has_patterns, in_pruned_order, read_text
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, HeadMap
from lcc_lens.restoration.injections.constants import MeanShift

PROMPT = "is 3 plus 2 more than"


@pytest.fixture(scope="module")
def shift(found: Scan) -> MeanShift:
    return MeanShift(found.components, [Head(2, 1), Head(0, 4)])


@pytest.fixture(scope="module")
def seen(pair, shift: MeanShift):
    return compare_prompt(pair, PROMPT, restoration=shift)


def plain_reading(path, tokens: torch.Tensor):
    """Head outputs, attention patterns and next-token probabilities of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    z: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: z.append(inputs[0][0].clone()))
    with torch.no_grad():
        out = model(tokens, output_attentions=True)
    heads = torch.stack(z, 1).reshape(tokens.shape[1], N_LAYERS, N_HEADS, D_HEAD)
    return heads, torch.stack(out.attentions)[:, 0], out.logits[0, -1].softmax(-1)


def test_readings_are_those_of_plain_transformers(seen, dense_dir, pruned_dir, pair) -> None:
    tokens = torch.tensor([pair.tokenizer(PROMPT)["input_ids"]])
    (dense, *of_dense), (pruned, *of_pruned) = (plain_reading(path, tokens) for path in (dense_dir, pruned_dir))
    torch.testing.assert_close(seen.norm[0], dense.norm(dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.difference[1], (pruned - dense).norm(dim=-1), atol=1e-4, rtol=1e-4)
    for place, (patterns, probabilities) in enumerate((of_dense, of_pruned)):
        torch.testing.assert_close(seen.patterns[place], patterns, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.probabilities[place], probabilities, atol=1e-4, rtol=1e-4)
    change = ((pruned - dense).square().sum((0, 3)) / dense.square().sum((0, 3))).sqrt()
    torch.testing.assert_close(seen.change(), change, atol=1e-4, rtol=1e-4)
    assert float(change.min()) > 0


def test_the_restored_model_differs_where_it_is_restored(seen) -> None:
    assert seen.models == ("dense", "pruned", "restored")
    moved = (seen.change("restored") - seen.change("pruned")).abs() > 1e-6
    assert moved[0].nonzero().flatten().tolist() == [4]  # in the first layer nothing but the head itself
    assert moved[2, 1]
    assert not torch.equal(seen.probabilities[1], seen.probabilities[2])
    recovered = seen.recovered()[0]
    assert recovered[:4].abs().max() < 1e-5 < recovered[4].abs()


def test_tables_hold_what_the_tensors_say(seen) -> None:
    table = seen.table()
    assert len(table) == N_LAYERS * N_HEADS
    assert table["pruned"].tolist() == pytest.approx(seen.change().flatten().tolist())
    at_end = (seen.difference[2, -1] / seen.norm[0, -1]).flatten()
    assert table["restored_at_end"].tolist() == pytest.approx(at_end.tolist(), rel=1e-4)
    tokens = seen.next_tokens(4)
    assert list(tokens.columns) == ["token", "dense", "pruned", "restored"]
    assert tokens["dense"].is_monotonic_decreasing
    for name, probabilities in zip(seen.models, seen.probabilities, strict=True):
        assert tokens[name].max() == pytest.approx(float(probabilities.max()))


def test_without_a_restoration_two_models_are_compared(pair, seen) -> None:
    two = compare_prompt(pair, PROMPT, patterns=False)
    assert two.models == ("dense", "pruned")
    assert two.patterns is None
    torch.testing.assert_close(two.change(), seen.change(), atol=1e-4, rtol=1e-4)  # fused attention, stepwise attention
    assert "restored" not in two.table().columns
    assert "restored" not in repr(two)
    with pytest.raises(RequestError, match=r"expected a model of this comparison \(dense, pruned\), got 'restored'"):
        two.recovered()


def test_nothing_comes_after_the_prompt(pair, seen) -> None:
    ending = with_an_end(pair.tokenizer)
    assert len(ending(PROMPT)["input_ids"]) == len(seen.pieces) + 1
    again = compare_prompt(dataclasses.replace(pair, tokenizer=ending), PROMPT)
    assert again.pieces == seen.pieces
    torch.testing.assert_close(again.probabilities, seen.probabilities[:2])


def test_it_is_read_in_fifteen_lines(seen) -> None:
    worst = seen.table().sort_values("pruned", ascending=False).iloc[0]
    name = f"L{worst['layer']:.0f}H{worst['head']:.0f}"
    lines = repr(seen).splitlines()
    assert len(lines) <= 15
    assert PROMPT in lines[0]
    assert any(name in line and f"{worst['pruned']:.1%}" in line for line in lines)
    page = seen._repr_html_()
    assert name in page
    assert page.count("<table>") == 2


def test_markup_in_a_prompt_is_text(pair) -> None:
    assert "<b>" not in compare_prompt(pair, "<b>", patterns=False)._repr_html_()


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_there_in_every_family(families, family: str) -> None:
    pair = families(family)
    found = compare_prompt(pair, PROMPT)
    assert found.patterns is not None
    assert found.patterns.shape[:3] == (2, pair.n_layers, pair.n_heads)
    torch.testing.assert_close(found.patterns.sum(-1), torch.ones(found.patterns.shape[:-1]), atol=1e-4, rtol=0.0)
    assert float(found.patterns.triu(1).abs().max()) == 0
    assert not torch.equal(found.patterns[0], found.patterns[1])


def test_a_model_without_the_hook_point_has_no_patterns(pair) -> None:
    points = {name: point for name, point in pair.pruned.hook_dict.items() if not name.endswith("hook_pattern")}
    unused = dict.fromkeys(("run_with_hooks", "run_with_cache", "hooks"), print)
    bare = SimpleNamespace(hook_dict=points, cfg=pair.pruned.cfg, **unused)
    assert has_patterns(pair.pruned)
    assert not has_patterns(bare)


def test_sliced_heads_are_compared_with_their_dense_ones(pair) -> None:
    tokens = torch.tensor(pair.tokenizer(PROMPT)["input_ids"])
    whole = read_text(pair.dense, tokens)
    kept = ((1, 4), (0, 2), (3, 4))
    fewer = dataclasses.replace(pair, head_map=HeadMap(kept, ((),) * N_LAYERS))
    found = in_pruned_order(fewer, whole)
    assert torch.equal(found.z[:, 2], whole.z[:, 2, [3, 4]])
    assert torch.equal(found.patterns[0], whole.patterns[0, [1, 4]])


@pytest.mark.parametrize(("ask", "message"), [
    (lambda pair, seen: compare_prompt(pair, ""), "expected a prompt with at least one token, got none"),
    (lambda pair, seen: compare_prompt(pair, "a" * 513), "expected a prompt of at most 512 tokens, got 513; shorten"),
    (lambda pair, seen: seen.next_tokens(0), "expected k of at least 1, got 0"),
    (lambda pair, seen: seen.change("mended"), "expected a model of this comparison"),
    (lambda pair, seen: seen.change(position=99), "expected a token from -21 to 20, got 99"),
    (lambda pair, seen: lcc.plot_attention(seen, (3, 0)), "expected heads within 3 layers x 5 heads"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(pair, seen, ask, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(pair, seen)
