"""What commands print: brackets stay as they are, text to the left and numbers to the right."""

from __future__ import annotations

import pytest

from lcc_lens.frontends.cli.show import console, show_comparison, show_recovery, show_table


def test_brackets_of_a_message_are_no_markup(
    tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    remedy = "pip install 'lcc-lens[baselines]'"
    show_comparison({}, [{"entry": "lora", "failed": 1, "errors": [remedy]}], tmp_path)
    show_table(f"a {remedy}", ["[b]", remedy], [[remedy, f"[bold]{remedy}[/bold]"]])
    console().print(remedy)
    found = " ".join(capsys.readouterr().out.split())
    assert found.count(remedy) == 6
    assert "[bold]pip" in found
    assert "[b]" in found


def test_text_is_left_aligned_and_numbers_are_right_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("", ["name", "share", "why"], [["a", "5.0 %", "short"], ["b", "–", "a longer reason"], ["c", "-12", ""]])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[1] for row in rows] == [" 5.0 % ", "     – ", "   -12 "]
    assert rows[0][2] == " short           "


@pytest.mark.parametrize(("share", "says"), [(0.8, False), (8.51, True)])
def test_a_task_recovered_beyond_100_per_cent_was_learned(
    share: float, says: bool, tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    scores = {"tasks": {"rte": {"acc": 0.5, "stderr": 0.1, "n": 20}}}
    found = {
        "models": {"pruned": scores}, "task": "rte", "text": "wikitext", "gain": 0.1, "gain_interval": (0.0, 0.2),
        "share_recovered": share, "share_interval": (share - 0.1, share + 0.1),
    }  # fmt: skip
    show_recovery(found, tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{share:.0%}" in printed
    assert ("also taught the task" in printed) == says
