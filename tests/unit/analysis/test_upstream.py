"""Whose fault: what a head inherits, traced to the heads and MLPs that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pairs import FAMILIES
from support.tiny import PARAGRAPHS, build_model, save_model

from lcc_lens.analysis.causes.upstream import _Tracer, trace_upstream
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.batches import pad
from lcc_lens.data.datasets import encode
from lcc_lens.data.in_memory import as_data
from lcc_lens.models.pair import load_pair

TEXTS = [text[: 30 + 5 * i] for i, text in enumerate(PARAGRAPHS[:5])]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_writers_changes_sum_to_that_of_the_stream(families, family: str) -> None:
    pair = families(family)
    tracer = _Tracer(pair, Head(2, 1))
    seen = {}
    measure = tracer._measure

    def check(call, x_dense, streams, valid, patched):
        changes = [change for _, change in tracer._changes(*streams)]
        seen["sum"], seen["stream"] = torch.stack(changes).sum(0), streams[0].resid[2] - streams[1].resid[2]
        seen["parts"] = changes
        return measure(call, x_dense, streams, valid, patched)

    tracer._measure = check
    sequences = encode(as_data(TEXTS), pair.tokenizer, max_length=40)
    tracer.effects(pad(sequences, range(len(sequences))), None)
    assert torch.allclose(seen["sum"], seen["stream"], atol=1e-4)
    assert len(seen["parts"]) == 1 + 2 * (pair.n_heads + 1) == len(tracer.writers)
    if family != "gpt2":  # the rest of a layer is its MLP, so it changes where the MLP does
        assert min(float(part.abs().max()) for part in seen["parts"][1:]) > 1e-3
    assert float(seen["parts"][0].abs().max()) == 0  # the embedding is the same


def test_an_mlp_alone_is_blamed_alone_and_exactly(tmp_path: Path) -> None:
    model = build_model(3)
    save_model(model, tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, ::2] = 0
    save_model(model, tmp_path / "pruned")
    pair = load_pair(tmp_path / "dense", tmp_path / "pruned")
    found = trace_upstream(pair, (1, 2), TEXTS, exact=2)
    table = found.table()
    assert table["writer"][0] == "MLP 0"
    assert table["exact"][0] == pytest.approx(1, abs=1e-4)  # patched alone, it gives all that the head inherited
    assert table["direct"][0] == pytest.approx(1, abs=0.5)
    assert table["direct"][1:].abs().max() < 1e-4
    assert table["exact"][2:].isna().all()
    assert table["stderr"][0] > 0
    assert "MLP 0" in repr(found)


def test_exact_effects_equal_path_patching_by_hand(pair) -> None:
    head = Head(1, 3)
    found = trace_upstream(pair, head, TEXTS[:1], exact=7, max_length=30)
    (sequence,) = encode(as_data(TEXTS[:1]), pair.tokenizer, max_length=30)
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"]
    caches = [m.run_with_cache(sequence.tokens[None], names_filter=names)[1] for m in (pair.dense, pair.pruned)]
    weights = [m.blocks[0].attn.o.original_component.weight.reshape(-1, 5, 6) for m in (pair.dense, pair.pruned)]

    def z_with(resid):
        with pair.pruned.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: resid)]):
            return pair.pruned.run_with_cache(sequence.tokens[None], names_filter=names)[1]["blocks.1.attn.hook_z"]

    before, after = (cache["blocks.1.hook_resid_pre"] for cache in (caches[1], caches[0]))
    own = caches[1]["blocks.1.attn.hook_z"][:, :, head.head]
    lost = z_with(after)[:, :, head.head] - own
    written = [
        torch.einsum("bphd,mhd->bphm", c["blocks.0.attn.hook_z"], w) for c, w in zip(caches, weights, strict=True)
    ]
    for place in range(5):
        effect = z_with(before + (written[0] - written[1])[:, :, place])[:, :, head.head] - own
        expected = float((effect * lost).sum() / lost.square().sum())
        assert float(found.exact[found.writers.index((0, place))]) == pytest.approx(expected, abs=1e-4)
    assert int(found.exact.isfinite().sum()) == 7
    assert bool(found.stderr.isnan().all())  # a single text


def test_what_cannot_be_traced_is_refused(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="expected heads within 3 layers x 5 heads"):
        trace_upstream(pair, (3, 0), TEXTS)
    first = trace_upstream(pair, (0, 0), TEXTS[:2])
    assert first.labels() == ["embedding"]
    assert float(first.direct) == 0
    monkeypatch.setattr("lcc_lens.analysis.causes.division.attention_refusal", lambda model: "one matrix for all")
    with pytest.raises(RequestError, match="one matrix for all"):
        trace_upstream(pair, (1, 0), TEXTS)
