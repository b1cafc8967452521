"""Head types: known attention patterns, copying and behaviour, in the dense, the pruned and the restored model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.tiny import N_HEADS, N_LAYERS, save_model
from torch import Tensor

from lcc_lens.analysis.head_types.behaviour import repeated_tokens
from lcc_lens.analysis.head_types.copying import copying_scores
from lcc_lens.analysis.head_types.head_types import head_types
from lcc_lens.analysis.head_types.patterns import detection_masks
from lcc_lens.analysis.head_types.result import HeadTypes
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.restoration.injections.constants import MeanShift

LENGTH = 12


@pytest.fixture(scope="module")
def types(pair: Pair, text_file: Path) -> HeadTypes:
    return head_types(pair, data=load_data(str(text_file)), n_sequences=3, length=LENGTH, max_length=30, limit=4)


@pytest.mark.parametrize("model", ["dense", "pruned"])
def test_scores_equal_the_head_detector_of_transformer_lens(pair: Pair, types: HeadTypes, model: str) -> None:
    from transformer_lens.head_detector import detect_head

    sequences, n_prefix = repeated_tokens(pair, 3, LENGTH, 0)
    assert n_prefix == 0
    hooked = getattr(pair, model)
    place = types.record.models.index(model)
    for name, kind in (("previous", "previous_token"), ("duplicate", "duplicate_token"), ("induction", "induction")):
        scores = []
        for sequence in sequences:
            hooked_tokens = sequence.tokens[None]
            _, cache = hooked.run_with_cache(hooked_tokens, remove_batch_dim=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(hooked), "to_tokens", lambda self, text, t=hooked_tokens: t)
                scores.append(detect_head(hooked, "", f"{kind}_head", cache=cache))
        expected = torch.stack(scores).mean(0)
        assert torch.allclose(types.value[name][place], expected, atol=1e-5), name
        assert float(expected.max()) > 0.01


def test_masks_are_those_of_transformer_lens() -> None:
    from transformer_lens import head_detector

    tokens = torch.tensor([[5, 5, 3, 5, 3, 4, 4, 5, 3]])
    masks = detection_masks(tokens)
    for name, kind in (("previous", "previous_token"), ("duplicate", "duplicate_token"), ("induction", "induction")):
        expected = getattr(head_detector, f"get_{kind}_head_detection_pattern")(tokens)
        assert torch.equal(masks[name][0].float(), expected), name


def test_measures_of_patterns_equal_sums_over_plain_attentions(
    pair: Pair, types: HeadTypes, dense_dir: Path, pruned_dir: Path, text_file: Path
) -> None:
    from transformers import AutoModelForCausalLM

    sequences = encode(load_data(str(text_file)), pair.tokenizer, max_length=30, limit=4)
    patterns = []
    for path in (dense_dir, pruned_dir):
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        with torch.no_grad():
            runs = [model(s.tokens[None], output_attentions=True).attentions for s in sequences]
        patterns.append([torch.cat(run).double() for run in runs])  # [layer, head, query, key]
    for place, model_patterns in enumerate(patterns):
        by_name: dict[str, list[Tensor]] = {}
        for p, dense in zip(model_patterns, patterns[0], strict=True):
            p, dense = p[:, :, 1:], dense[:, :, 1:]
            query, key = torch.arange(1, p.shape[-1])[:, None], torch.arange(p.shape[-1])
            middle = (p + dense) / 2
            kl = [(x * (x / middle).log().nan_to_num()).sum(-1) for x in (p, dense)]
            measures = {
                "sink": p[..., 0], "entropy": -(p * p.log().nan_to_num(neginf=0)).sum(-1),
                "distance": (p * (query - key).clamp_min(0)).sum(-1),
                "total_variation": (p - dense).abs().sum(-1) / 2, "jensen_shannon": (kl[0] + kl[1]) / 2,
            }  # fmt: skip
            for name, values in measures.items():
                by_name.setdefault(name, []).append(values.mean(-1))
        for name, values in by_name.items():
            expected = torch.stack(values)
            assert torch.allclose(types.value[name][place].double(), expected.mean(0), atol=1e-4), name
            stderr = expected.std(0) / len(expected) ** 0.5
            assert torch.allclose(types.stderr[name][place].double(), stderr, atol=1e-4), name
    assert float(types.value["total_variation"][0].abs().max()) < 1e-6
    assert float(types.value["total_variation"][1].min()) > 1e-3


def test_copying_is_that_of_the_eigenvalues_over_the_whole_vocabulary(pair: Pair, dense_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight * model.model.norm.weight
    found = copying_scores(pair.dense)
    for layer, block in enumerate(model.model.layers):
        for head in range(N_HEADS):
            written = block.self_attn.o_proj.weight[:, 6 * head : 6 * head + 6]
            read = block.self_attn.v_proj.weight * block.input_layernorm.weight
            eigenvalues = torch.linalg.eigvals((unembedding @ written @ read @ embedding.T).detach().double())
            expected = eigenvalues.real.sum() / eigenvalues.abs().sum()
            assert float(found[layer, head]) == pytest.approx(float(expected), abs=1e-3)


def hand_built_model():
    """A GPT-2 of one-hot tokens and positions: head L0H0 attends to the previous token, L1H1 is an induction head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n_vocab, n_pos = 257, 40
    width = 2 * n_vocab + n_pos  # the token, the token before it, and the position
    width += width % 2
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=n_vocab, n_embd=width, n_head=2, n_layer=2, n_positions=n_pos, n_inner=4,
                   bos_token_id=0, eos_token_id=0, pad_token_id=0)
    ).eval()  # fmt: skip
    d_head = width // 2
    token, before, place = slice(0, n_vocab), slice(n_vocab, 2 * n_vocab), slice(2 * n_vocab, 2 * n_vocab + n_pos)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.zero_()
        for norm in [model.transformer.ln_f, *(m for h in model.transformer.h for m in (h.ln_1, h.ln_2))]:
            norm.weight.fill_(1)
            norm.bias.zero_()
        model.transformer.wte.weight.copy_(torch.eye(n_vocab, width))
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, place] = torch.eye(n_pos)
        first, second = (h.attn for h in model.transformer.h)
        first.c_attn.weight[place, :n_pos] = 3 * torch.eye(n_pos)
        first.c_attn.weight[place, width : width + n_pos] = torch.eye(n_pos).roll(1, 1)  # keys move one on
        first.c_attn.weight[token, 2 * width : 2 * width + n_vocab] = torch.eye(n_vocab)
        first.c_proj.weight[:n_vocab, before] = 0.1 * torch.eye(n_vocab)
        second.c_attn.weight[token, d_head : d_head + n_vocab] = 3 * torch.eye(n_vocab)
        second.c_attn.weight[before, width + d_head : width + d_head + n_vocab] = torch.eye(n_vocab)
        second.c_attn.weight[token, 2 * width + d_head : 2 * width + d_head + n_vocab] = torch.eye(n_vocab)
        second.c_proj.weight[d_head : d_head + n_vocab, token] = torch.eye(n_vocab)
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("built")
    model = hand_built_model()
    save_model(model, folder / "dense")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, : 2 * model.config.n_embd] = 0  # the second layer's patterns
    save_model(model, folder / "pruned")
    return load_pair(folder / "dense", folder / "pruned")


def test_a_hand_built_induction_head_is_found_and_found_lost(built: Pair) -> None:
    found = head_types(built, n_sequences=3, length=15)
    assert found.record.models == ("dense", "pruned")
    assert float(found.value["previous"][0, 0, 0]) > 0.85
    assert float(found.value["previous"][1, 0, 0]) > 0.85  # the first layer is intact
    strongest = found.strongest("induction", n=3)
    assert (strongest["layer"][0], strongest["head"][0]) == (1, 1)
    assert strongest["induction_dense"][0] > 0.4  # the second half of the tokens has a match
    assert strongest["left_pruned"][0] < 0.5
    assert float(found.value["copying"][0, 1, 1]) > 0.9
    assert float(found.losses[0, 1]) < float(found.losses[0, 0]) - 1  # only the dense model expects the repetition
    assert float(found.losses[1, 1]) > float(found.losses[0, 1]) + 1
    assert float(found.value["total_variation"][1, 1, 1]) > 0.3
    assert float(found.value["total_variation"][1, 0].abs().max()) < 1e-5


def test_a_restoration_is_a_third_model(pair: Pair, types: HeadTypes, found: Scan) -> None:
    injection = MeanShift(found.components, [Head(0, 1), Head(1, 2)])
    three = head_types(pair, injection, n_sequences=3, length=LENGTH)
    assert three.record.models == ("dense", "pruned", "restored")
    assert three.record.data == "repeated random tokens"
    for name in ("previous", "duplicate", "induction", "copying"):
        assert torch.allclose(three.value[name][:2], types.value[name], atol=1e-5), name
    assert torch.allclose(three.value["induction"][2, 0], three.value["induction"][1, 0])  # nothing below changed
    assert float((three.value["induction"][2] - three.value["induction"][1]).abs().max()) > 1e-4
    assert "left_restored" in three.strongest("previous", n=2).columns
    assert three.behaviour()["model"].tolist() == ["dense", "pruned", "restored"]


def test_types_are_saved_and_shown(types: HeadTypes, tmp_path: Path) -> None:
    types.save(tmp_path)
    again = HeadTypes.load(tmp_path)
    assert again.record == types.record
    assert again.table().equals(types.table())
    assert torch.equal(again.losses, types.losses)
    assert len(again.table()) == N_LAYERS * N_HEADS
    assert "strongest induction" in repr(again)
    for kind in ("inducton", "total_variation", "jensen_shannon"):
        with pytest.raises(RequestError, match=f"expected one of .* entropy, distance, copying, got '{kind}'"):
            again.strongest(kind)
    for n in (-1, 0):
        with pytest.raises(RequestError, match="expected n of at least 1, got"):
            again.strongest("sink", n)
    with pytest.raises(RequestError, match="make it with HeadTypes"):
        HeadTypes.load(tmp_path / "elsewhere")


def test_what_does_not_fit_is_refused(pair: Pair, dense_dir: Path, pruned_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected a context of 600 tokens for a repeated sequence, got 512"):
        head_types(pair, length=300)
    with pytest.raises(RequestError, match="different tokens, got a vocabulary of 256"):
        repeated_tokens(dataclasses.replace(pair, context=2048), 1, 257, 0)
    with pytest.raises(RequestError, match="expected both models in memory for head types"):
        head_types(load_pair(dense_dir, pruned_dir, one_at_a_time=True))
