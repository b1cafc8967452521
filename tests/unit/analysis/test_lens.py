"""The lens: each reading against the same mathematics in plain, slow code on plain transformers."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import D_HEAD, N_HEADS, N_LAYERS, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lcc_lens.analysis.lens.answers import answer_streams
from lcc_lens.analysis.lens.direct import direct_effect
from lcc_lens.analysis.lens.exciting import exciting_examples
from lcc_lens.analysis.lens.gain import logit_gain
from lcc_lens.analysis.lens.output_relation import relation_to_W_O
from lcc_lens.analysis.lens.similarity import component_similarity
from lcc_lens.analysis.lens.tokens import promoted_tokens
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import Head, HeadMap, all_heads, head_indices
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.data.prompts import Example
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.loading.hooked import load_hooked

HEADS = [Head(2, 4), Head(0, 1), Head(1, 3)]


@pytest.fixture(scope="module")
def data(question_file: Path) -> Data:
    return load_data(str(question_file), n=12)


@pytest.fixture(scope="module")
def plain(pruned_dir: Path):
    return AutoModelForCausalLM.from_pretrained(pruned_dir, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def runs(plain, data: Data) -> list[tuple[torch.Tensor, list[torch.Tensor], int, int]]:
    """For every question the last residual vector, each layer's z at the end, and the two answers' first tokens."""
    tokenizer, found = tiny_tokenizer(), []
    for example in data.examples:
        ids = [tokenizer(text)["input_ids"] for text in (example.prompt, example.response, str(example.wrong))]
        differ = next(i for i in range(9) if ids[1][i] != ids[2][i])
        seen: list[torch.Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0][0, -1].clone()))
            for module in (*(layer.self_attn.o_proj for layer in plain.model.layers), plain.model.norm)
        ]
        with torch.no_grad():
            plain(torch.tensor([ids[0] + ids[1][:differ]]))
        for hook in hooks:
            hook.remove()
        found.append((seen[-1], [z.reshape(N_HEADS, D_HEAD) for z in seen[:-1]], ids[1][differ], ids[2][differ]))
    return found


def W_O(plain, head: Head) -> torch.Tensor:
    weight = plain.model.layers[head.layer].self_attn.o_proj.weight.detach()
    return weight[:, head.head * D_HEAD : (head.head + 1) * D_HEAD].T


def constants(found, heads: list[Head]) -> torch.Tensor:
    return found.components.component(1)[head_indices(heads)]


def test_direct_effect_is_what_adding_to_the_last_stream_does_with_the_norm_frozen(
    pair, found, data: Data, plain, runs
) -> None:
    result = direct_effect(pair, data, HEADS, constants(found, HEADS))
    W_U, gain = plain.lm_head.weight.detach(), plain.model.norm.weight.detach()
    for n, (resid, _, right, wrong) in enumerate(runs):
        fixed = (resid.square().mean() + 1e-6).sqrt()

        def difference(stream: torch.Tensor, fixed=fixed, right=right, wrong=wrong) -> torch.Tensor:
            return (W_U[right] - W_U[wrong]) @ (gain * stream / fixed)

        assert torch.allclose(result.pruned[n], difference(resid), atol=1e-4)
        for i, head in enumerate(HEADS):
            moved = difference(resid + constants(found, HEADS)[i] @ W_O(plain, head)) - difference(resid)
            assert torch.allclose(result.effects[n, i], moved, atol=1e-4)
    assert result.heads == tuple(HEADS)
    assert float(result.effects.abs().max()) > 1e-3
    table = result.table()
    assert table["effect"].tolist() == pytest.approx(result.effects.mean(0).tolist())
    assert table["stderr"].tolist() == pytest.approx((result.effects.std(0) / math.sqrt(12)).tolist())
    assert result.total[0] == pytest.approx(float(table["effect"].sum()), abs=1e-6)


def test_direct_effect_takes_a_restorations_constants_and_one_example(pair, found, data: Data) -> None:
    single = replace(data, examples=data.examples[:1])
    result = direct_effect(pair, single, [(0, 1)], constants(found, [Head(0, 1)]))
    assert result.effects.shape == (1, 1)
    assert math.isnan(result.total[1])


def test_direct_effect_agrees_with_transformer_lens_attribution(pruned_dir: Path) -> None:
    from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

    ours, theirs = load_hooked(pruned_dir).model, load_hooked(pruned_dir).model
    tokens, answers = torch.arange(5, 20)[None], torch.tensor([[40, 77]])
    with torch.no_grad():
        _, cache = ours.run_with_cache(tokens)
    theirs.enable_compatibility_mode(disable_warnings=True)
    wanted = direct_logit_attribution(theirs, tokens, 40, 77, unit="head")
    readout, writer = Unembedding.of(ours), OutputProjections.of(ours)
    for head in all_heads(N_LAYERS, N_HEADS):
        z = cache[f"blocks.{head.layer}.attn.hook_z"][0, -1, head.head]
        logits = readout.direct(writer.output(head, z)[None], cache["blocks.2.hook_resid_post"][0, -1:], answers)
        value = wanted.attribution[wanted.labels.index(f"L{head.layer}H{head.head}")]
        assert torch.allclose(logits[0, 0, 0] - logits[0, 0, 1], value.squeeze(), atol=1e-3)


@pytest.mark.parametrize("cumulative", [False, True])
def test_logit_gain_is_the_papers(pair, found, data: Data, plain, runs, cumulative: bool) -> None:
    head, components = Head(1, 3), found.components
    result = logit_gain(pair, data, head, components, cumulative=cumulative)
    for n, (_, z, right, wrong) in enumerate(runs):
        for i in range(D_HEAD):
            first = 0 if cumulative else i
            edit = sum(components.coefficients[head][j] * components.directions[head][j] for j in range(first, i + 1))
            differences = []
            for output in (z[head.layer][head.head] + edit, z[head.layer][head.head]):
                with torch.no_grad():
                    p = plain.lm_head(plain.model.norm(output @ W_O(plain, head)))
                differences.append(p[right] - p[wrong])
            assert torch.allclose(result.gains[n, i], differences[0] - differences[1], atol=1e-4)
            assert torch.allclose(result.pruned[n], differences[1], atol=1e-4)
    assert float(result.gains.abs().max()) > 1e-2
    assert list(result.table().columns) == ["rank" if cumulative else "component", "gain", "stderr"]
    assert result.table()["gain"].tolist() == pytest.approx(result.mean.tolist())


def test_promoted_tokens_of_a_vector_alone_are_eq_6(pair, found, plain) -> None:
    head, vector = Head(1, 3), found.components.directions[1, 3, 0]
    said = promoted_tokens(pair.pruned, pair.tokenizer, head, vector, k=5)
    with torch.no_grad():
        logits = plain.lm_head(plain.model.norm(vector @ W_O(plain, head)))
    order = logits.argsort(descending=True).tolist()
    assert [token.token for token in said.tokens] == order[:5] + order[:-6:-1]
    assert [token.logit for token in said.tokens] == pytest.approx(
        [float(logits[token.token]) for token in said.tokens], abs=1e-4
    )
    assert said.table()["side"].tolist() == ["promoted"] * 5 + ["suppressed"] * 5
    assert said.tokens[0].text == tiny_tokenizer().decode([order[0]])


def test_promoted_tokens_at_a_stream_are_its_mean_direct_effect(pair, found, data: Data) -> None:
    head, vector = Head(1, 3), found.components.directions[1, 3, 0]
    streams = answer_streams(pair, data)
    said = promoted_tokens(pair.pruned, pair.tokenizer, head, vector, k=257, at=streams)
    readout, written = Unembedding.of(pair.pruned), OutputProjections.of(pair.pruned).output(head, vector)
    ids = torch.tensor([[token.token for token in said.tokens[:257]]]).expand(len(streams.resid), -1)
    expected = readout.direct(written[None], streams.resid, ids).mean((0, 1))
    assert torch.allclose(torch.tensor([token.logit for token in said.tokens[:257]]), expected, atol=1e-4)
    assert said.reading == "direct"
    twice = promoted_tokens(pair.pruned, pair.tokenizer, head, 2 * vector, k=1, at=streams)
    assert twice.tokens[0].logit == pytest.approx(2 * said.tokens[0].logit, rel=1e-4)


def test_the_unembeddings_bias_promotes_nothing(pair, found, pruned_dir: Path) -> None:
    model, vector = load_hooked(pruned_dir).model, found.components.directions[1, 3, 0]
    before = promoted_tokens(model, pair.tokenizer, Head(1, 3), vector)
    model.unembed.original_component.bias[9] = 1000.0
    assert Unembedding.of(model).logits(torch.randn(40)).argmax() == 9
    assert promoted_tokens(model, pair.tokenizer, Head(1, 3), vector) == before


def test_answers_are_compared_where_they_first_differ(pair, found, caplog: pytest.LogCaptureFixture) -> None:
    def made(*answers: tuple[str, str]) -> Data:
        examples = [Example("so it is", right, f"g{i}", wrong) for i, (right, wrong) in enumerate(answers)]
        return Data("made", "contrastive", tuple(examples), "made here")

    values = constants(found, HEADS)
    result = direct_effect(pair, made((" tea", " tree")), HEADS, values)
    longer = Data("made", "contrastive", (Example("so it is t", "ea", "g", "ree"),), "made here")
    assert torch.allclose(result.effects, direct_effect(pair, longer, HEADS, values).effects, atol=1e-5)
    with caplog.at_level(logging.WARNING):
        some = direct_effect(pair, made((" tea", " tree"), (" tea", " tea"), (" tea", " teas")), HEADS, values)
    assert "skipped 2 of 3 pairs" in caplog.text
    assert torch.allclose(some.effects, result.effects, atol=1e-5)
    with pytest.raises(RequestError, match="expected pairs that differ within 512 tokens from made here, got none"):
        direct_effect(pair, made((" tea", " tea")), HEADS, values)
    without = replace(longer, examples=(Example("a", " b", "g"),))
    with pytest.raises(RequestError, match="expected right and wrong answers, got made"):
        logit_gain(pair, without, HEADS[0], found.components)


@pytest.mark.parametrize("which", ["dense", "pruned", "difference"])
def test_exciting_examples_are_the_best_of_all_tokens(pair, data: Data, dense_dir, pruned_dir, which: str) -> None:
    from support.reference import head_outputs

    direction = torch.randn(D_HEAD, generator=torch.Generator().manual_seed(3))
    head, tokenizer = Head(2, 1), pair.tokenizer
    # Each text begins differently: a shared beginning would tie
    distinct = tuple(
        replace(example, prompt="pqrstuvwxyzk"[n] + example.prompt) for n, example in enumerate(data.examples)
    )
    data = replace(data, examples=distinct)
    texts = [example.prompt + example.response for example in data.examples]
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    dense, pruned = (head_outputs(path, tokens, N_HEADS) for path in (dense_dir, pruned_dir))
    best = []
    for n, (z_dense, z_pruned) in enumerate(zip(dense, pruned, strict=True)):
        z = {"dense": z_dense, "pruned": z_pruned, "difference": z_dense - z_pruned}[which]
        scores = z[:, 2, 1] @ direction / direction.norm()
        best.append((float(scores.max()), n, int(scores.argmax())))
    best = sorted(best, reverse=True)[:4]
    result = exciting_examples(pair, data, head, direction, k=4, model=which, batch_tokens=80, context=3)
    assert [(t.example, t.position) for t in result.tokens] == [(n, position) for _, n, position in best]
    assert [t.score for t in result.tokens] == pytest.approx([score for score, _, _ in best], abs=1e-4)
    for t in result.tokens:
        i = t.position
        assert (t.before, t.token, t.after) == (
            texts[t.example][max(0, i - 3) : i], texts[t.example][i], texts[t.example][i + 1 : i + 4],
        )  # fmt: skip
    assert list(result.table().columns) == ["score", "example", "position", "before", "token", "after"]


def test_exciting_examples_follow_the_head_map_and_take_text(pair, text_file: Path) -> None:
    data, direction = load_data(str(text_file)), torch.ones(D_HEAD)
    order = (3, 1, 0, 4, 2)
    moved = replace(pair, head_map=HeadMap((order,) * N_LAYERS, ((),) * N_LAYERS))
    options = {"k": 50, "model": "dense", "max_length": 64, "limit": 5}
    expected = exciting_examples(pair, data, Head(1, 3), direction, **options)
    got = exciting_examples(moved, data, Head(1, 0), direction, **options)
    assert got.table().iloc[:, 1:].equals(expected.table().iloc[:, 1:])
    assert got.table()["score"].tolist() == pytest.approx(expected.table()["score"].tolist(), abs=1e-5)
    assert sorted(token.example for token in got.tokens) == [0, 1, 2, 3, 4]


def test_component_similarity_is_the_cosine_in_the_residual_stream(pair, found, plain) -> None:
    result = component_similarity(pair.pruned, found.components, rank=2)
    c = found.components.component(2)
    first, second, near = Head(0, 1), Head(2, 4), Head(0, 3)
    a, b = c[first] @ W_O(plain, first), c[second] @ W_O(plain, second)
    index = {head: i for i, head in enumerate(result.heads)}
    got = result.resid[index[first], index[second]]
    assert torch.allclose(got, torch.cosine_similarity(a, b, dim=0), atol=1e-5)
    assert torch.allclose(
        result.raw[index[first], index[near]], torch.cosine_similarity(c[first], c[near], dim=0), atol=1e-5
    )
    assert bool(result.raw[index[first], index[second]].isnan())
    assert result.table().loc["L0H1", "L2H4"] == pytest.approx(float(got))


def test_a_head_that_lost_nothing_has_no_similarity(pair, found) -> None:
    coefficients = found.components.coefficients.clone()
    coefficients[1, 2] = 0
    result = component_similarity(pair.pruned, replace(found.components, coefficients=coefficients))
    assert bool(result.resid[7].isnan().all())
    assert int(result.resid.isnan().all(1).sum()) == 1


def test_relation_to_W_O_finds_what_it_ignores(dense_dir: Path) -> None:
    model, head = load_hooked(dense_dir).model, Head(1, 3)
    weight = model.blocks[1].attn.o.original_component.weight
    with torch.no_grad():
        weight[:, 3 * D_HEAD + 2] = 0  # nothing reads the head's coordinate 2
        weight[:, 3 * D_HEAD + 4] *= 1e-4
        weight[:, :D_HEAD] = 0  # nothing reads head 0 at all
    unit = torch.eye(D_HEAD)
    vectors = torch.stack([unit[2], unit[0], unit[2] + unit[0], unit[4], unit[1]])
    heads = [head, head, head, head, Head(1, 0)]
    result = relation_to_W_O(model, heads, 7 * vectors)
    W = weight.detach()[:, 3 * D_HEAD : 4 * D_HEAD].T.double()
    assert result.null_share.tolist() == pytest.approx([1, 0, 0.5, 0, 1], abs=1e-6)
    assert result.weak_share.tolist() == pytest.approx([1, 0, 0.5, 1, 1], abs=1e-3)
    largest = torch.linalg.matrix_norm(W, 2)
    assert float(result.gain[1]) == pytest.approx(float(W[0].norm() / largest))
    assert float(result.gain[0]) == float(result.gain[4]) == 0
    assert float(result.gain_over_random[1]) == pytest.approx(float(W[0].norm() / (W.square().sum() / D_HEAD).sqrt()))
    assert torch.allclose(result.energy.sum(-1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose((result.energy * result.singular_values.square()).sum(-1).sqrt() / largest, result.gain)
    assert list(result.table().columns) == ["layer", "head", "null_share", "weak_share", "gain", "gain_over_random"]


def test_random_vectors_have_the_gain_of_random_vectors(pair) -> None:
    vectors = torch.randn(800, D_HEAD, generator=torch.Generator().manual_seed(0))
    result = relation_to_W_O(pair.pruned, [Head(0, 0)] * 800, vectors)
    assert float(result.gain_over_random.square().mean()) == pytest.approx(1, abs=0.06)


def test_vectors_with_nothing_to_read_are_refused(pair, found, data: Data, dense_dir: Path) -> None:
    zero, ones, head = torch.zeros(D_HEAD), torch.ones(D_HEAD), Head(0, 0)
    with pytest.raises(RequestError, match="expected a finite vector other than zero, got zeros"):
        promoted_tokens(pair.pruned, pair.tokenizer, head, zero)
    with pytest.raises(RequestError, match="other than zero"):
        exciting_examples(pair, data, head, zero)
    with pytest.raises(RequestError, match="other than zero"):
        relation_to_W_O(pair.pruned, [head], zero[None])
    with pytest.raises(RequestError, match="expected a vector of d_head = 6 numbers, got 5"):
        promoted_tokens(pair.pruned, pair.tokenizer, head, ones[:5])
    model = load_hooked(dense_dir).model
    with torch.no_grad():
        model.blocks[0].attn.o.original_component.weight.zero_()
    with pytest.raises(RequestError, match="that L0H0's output projection uses, got one that it maps to zero"):
        promoted_tokens(model, pair.tokenizer, head, ones)


def test_wrong_requests_are_refused(pair, found, data: Data) -> None:
    ones, components = torch.ones(D_HEAD), found.components
    with pytest.raises(RequestError, match="got L3H0"):
        promoted_tokens(pair.pruned, pair.tokenizer, Head(3, 0), ones)
    with pytest.raises(RequestError, match="expected between 1 and 257 tokens, got k = 0"):
        promoted_tokens(pair.pruned, pair.tokenizer, Head(0, 0), ones, k=0)
    with pytest.raises(RequestError, match="got L0H5"):
        direct_effect(pair, data, [Head(0, 5)], ones[None])
    with pytest.raises(RequestError, match=r"expected constants of shape \(2, 6\), one per head, got \(1, 6\)"):
        direct_effect(pair, data, HEADS[:2], ones[None])
    with pytest.raises(RequestError, match="got L9H0"):
        logit_gain(pair, data, Head(9, 0), components)
    other = replace(components, **{
        name: getattr(components, name)[:2] for name in ("directions", "singular_values", "coefficients")
    })  # fmt: skip
    with pytest.raises(RequestError, match=r"expected components of .* \(3, 5, 6\), got \(2, 5, 6\)"):
        logit_gain(pair, data, Head(0, 0), other)
    with pytest.raises(RequestError, match="expected components of"):
        component_similarity(pair.pruned, other)
    with pytest.raises(RequestError, match="expected k of at least 1, got 0"):
        exciting_examples(pair, data, Head(0, 0), ones, k=0)
    with pytest.raises(RequestError, match="expected sequences of up to 4 tokens"):
        exciting_examples(pair, data, Head(0, 0), ones, max_length=4)
    with pytest.raises(RequestError, match="expected one vector per head, got 1 for 2 heads"):
        relation_to_W_O(pair.pruned, HEADS[:2], ones[None])


@pytest.mark.parametrize(
    ("name", "number"),
    [("k", 1.5), ("context", -1), ("limit", -1), ("max_length", -1), ("batch_tokens", 0), ("batch_tokens", -5)],
)
def test_numbers_outside_their_ranges_are_refused(pair, found, data: Data, name: str, number: Any) -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = [(exciting_examples, (pair, data, Head(0, 0), torch.ones(D_HEAD)))]
    if name in ("max_length", "batch_tokens"):
        calls += [
            (logit_gain, (pair, data, Head(0, 0), found.components)),
            (direct_effect, (pair, data, [Head(0, 0)], torch.ones(1, D_HEAD))),
            (answer_streams, (pair, data)),
        ]
    for function, arguments in calls:
        with pytest.raises(RequestError, match=rf"expected (a whole number for )?{name}"):
            function(*arguments, **{name: number})


def test_prompts_are_read_as_data(pair, found) -> None:
    best = exciting_examples(pair, ["one text", "another"], Head(0, 0), torch.ones(D_HEAD))
    assert sorted(token.example for token in best.tokens) == [0, 1]
    for read in (
        lambda: logit_gain(pair, ["text"], Head(0, 0), found.components),
        lambda: direct_effect(pair, "text", [Head(0, 0)], torch.ones(1, D_HEAD)),
        lambda: answer_streams(pair, ["text"]),
    ):
        with pytest.raises(RequestError, match="expected right and wrong answers, got 1 prompts"):
            read()


def test_activations_that_are_not_finite_are_named(pair, data: Data) -> None:
    def poison(z, hook):
        return z * float("nan") if z.shape[1] > 16 else z  # not on the short sequence that models are checked with

    named = pytest.raises(LensError, match=r"got NaN or infinity at blocks\.2\.hook_resid_post")
    with pair.pruned.hooks(fwd_hooks=[("blocks.1.attn.hook_z", poison)]), named:
        direct_effect(pair, data, [Head(0, 0)], torch.ones(1, D_HEAD))
