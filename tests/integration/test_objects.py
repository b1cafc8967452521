"""What users hold shows itself in a few useful lines, and has a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.restorations import restoration_of, with_mlp

import lcc_lens as lcc
from lcc_lens.core.heads import Head
from lcc_lens.core.showing import Shown


@pytest.fixture(scope="module")
def objects(pair, found, text_file: Path, question_file: Path, dense_dir: Path, pruned_dir: Path) -> dict[str, Shown]:
    data = lcc.load_data(str(question_file))
    session = lcc.RestoreSession(pair, found, lcc.load_data(str(text_file)), batch_size=4, max_length=24)
    heads = session.choose("mse", share=0.5)
    steps = session.train(2)
    component = found.components.component(1)[1, 2]
    return {
        "pair": pair, "scan": found, "data": data, "selected": found.select("mse"), "chosen": heads, "steps": steps,
        "session": session, "restoration": session.restoration(),
        "with MLPs": with_mlp(restoration_of(pruned_dir), pruned_dir),
        "components": found.components, "scores": found.scores("mse"), "statistics": found.heads,
        "record": found.record, "report": lcc.report([dense_dir, pruned_dir], latency=False),
        "doctor": lcc.examine(pruned_dir), "evaluation": lcc.evaluate([dense_dir], [str(question_file)], length=64),
        "tokens": lcc.promoted_tokens(pair.pruned, pair.tokenizer, Head(1, 2), component),
        "similarity": lcc.component_similarity(pair.pruned, found.components),
        "relation": lcc.relation_to_W_O(pair.pruned, [Head(1, 2)], component[None]),
    }  # fmt: skip


def test_everything_shows_itself_in_15_short_lines_and_has_a_table(objects: dict[str, Shown]) -> None:
    for name, shown in objects.items():
        lines = repr(shown).splitlines()
        assert 2 <= len(lines) <= 15, name
        assert max(map(len, lines)) <= 160, name
        assert not any(word in repr(shown) for word in ("tensor(", " at 0x", "Linear(")), name
        assert shown._repr_html_().startswith("<table>"), name
        assert len(shown.table()), name


def test_lines_say_what_matters(objects: dict[str, Shown], pair, found) -> None:
    assert f"dense        {pair.dense_id.reference}" in repr(objects["pair"])
    worst = found.table().sort_values("relative_loss").iloc[-1]
    assert f"changed most  L{worst.layer:.0f}H{worst['head']:.0f} {worst.relative_loss:.0%}" in repr(objects["scan"])
    assert "recovered" in repr(objects["restoration"])
    assert "nats per token" in repr(objects["restoration"])
    assert "best" in repr(objects["steps"])
    assert "session.train(2)" in repr(objects["session"])
    assert len(objects["steps"].table()) == 2
    restoration = objects["with MLPs"]
    assert list(restoration.table()["part"][-2:]) == ["L0 MLP", "L2 MLP"]
    assert restoration.table()["norm"][0] == pytest.approx(float(restoration.constants[0].norm()))
