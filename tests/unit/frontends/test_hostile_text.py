"""What comes from files, models and other programs is shown as text: on the terminal, in the log, in the model card."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.commands import call
from support.places import ROOT

from lcc_lens.core.errors import RequestError
from lcc_lens.core.text import code, markdown, visible
from lcc_lens.exporters.model_card import model_card
from lcc_lens.frontends.cli import main
from lcc_lens.frontends.cli.show import console, show_table
from lcc_lens.restoration.result import Restoration, RestorationRecord

HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202egnp\x9b2J [/x] [red] :smile: <b onclick=x>|`\r\nsecond"


@given(st.text())
def test_shown_text_holds_nothing_that_acts_and_nothing_is_lost(text: str) -> None:
    shown = visible(text)
    assert all(char.isprintable() or char in "\n\xa0" or char.isspace() for char in shown)
    assert not any(0xD800 <= ord(char) < 0xE000 or ord(char) in (0x1B, 0x9B, 0x202E) for char in shown)
    assert shown.encode().decode() == shown
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zs", "Zl", "Zp", "Co", "Cn"]), min_size=1))
def test_markdown_renders_as_the_text(text: str) -> None:
    for written in (f"x {markdown(text)} x", f"x {code(text)} x"):
        (paragraph,) = (token for token in MarkdownIt("commonmark").parse(written) if token.type == "inline")
        assert "".join(part.content for part in paragraph.children) == f"x {text} x"
        assert {part.type for part in paragraph.children} <= {"text", "text_special", "code_inline"}


def test_tables_and_lines_show_brackets_and_controls(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(HOSTILE, [HOSTILE], [[HOSTILE]])
    console().print(HOSTILE, soft_wrap=True)
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(out)
    assert "[/x] [red] :smile: <b onclick=x>" in out
    assert r"\x1b]0;owned\x07" in out


def test_errors_and_notes_are_one_visible_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(run: object) -> None:
        raise RequestError(f"expected a name, got {HOSTILE}")

    monkeypatch.setattr(main.COMMANDS["doctor"], "execute", refuse)
    assert call("doctor", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
    record = logging.LogRecord("lcc_lens", logging.WARNING, "", 0, "skipped %s", (HOSTILE,), None)
    assert "\x1b" not in main._Formatter("lcc-lens: %(message)s").format(record)


@pytest.mark.parametrize("arguments", [["doctor", "a", HOSTILE], ["doctor", "a", f"--{HOSTILE}"], [HOSTILE]])
def test_wrong_usage_repeats_no_control_characters(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert "owned" in error
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(error)


def test_a_name_does_not_enter_the_card(tmp_path: Path) -> None:
    record = RestorationRecord(
        HOSTILE, "out/<img src=x onerror=alert(1)>|`|", "", HOSTILE, "lcc", HOSTILE, 3, 0, losses={"a|<i>": 1.0}
    )  # fmt: skip
    nothing = torch.zeros(0, 0)
    card = model_card(Restoration(record, (), nothing, nothing, nothing), {HOSTILE: {"<s>": HOSTILE}}, 0.0)
    assert card.startswith("---\nlibrary_name: transformers\ntags: [pruned, restorelcc, lcc-lens]\n---\n")
    body = card.split("---\n", 2)[2]
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert not any(f"<{tag}" in html for tag in ("img", "b ", "i>", "s>"))
    assert html.count("<tr>") == body.count("\n|") - html.count("<table>")  # no row more, no column line
    assert "\x1b" not in card
    plain = replace(record, pruned="out/wanda50")
    assert "# wanda50, restored" in model_card(Restoration(plain, (), nothing, nothing, nothing), {}, 0.0)


def test_a_locale_without_signs_is_served(tmp_path: Path) -> None:
    (tmp_path / "déjà.txt").write_text("x")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lcc_lens", "doctor", "déjà.txt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    assert done.stderr.count(b"\n") == 1
