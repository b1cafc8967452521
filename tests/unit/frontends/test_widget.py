"""The widget without a browser: messages in, actions of the session and traits out."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.tiny import D_HEAD, N_HEADS, N_LAYERS

import lcc_lens as lcc
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.datasets import load_data
from lcc_lens.frontends.session.session import RestoreSession
from lcc_lens.frontends.widget import RestoreWidget
from lcc_lens.frontends.widget.contents import curve_contents, script, style
from lcc_lens.frontends.widget.worker import Worker
from lcc_lens.models.loading.plain import load_plain

PROMPT = "is 3 plus 2 more than"


@pytest.fixture
def session(pair, found: Scan, question_file: Path) -> RestoreSession:
    return RestoreSession(pair, found, load_data(str(question_file)), batch_size=4)


@pytest.fixture
def widget(session: RestoreSession) -> RestoreWidget:
    return RestoreWidget(session, prompt=PROMPT, reads_at_once=False)


def say(widget: RestoreWidget, **message) -> None:
    """As the browser would, until all that follows is done."""
    widget._handle_custom_msg(message, [])
    assert widget.wait(60.0)


def test_everything_shown_is_small_json(widget: RestoreWidget, found: Scan) -> None:
    say(widget, do="choose", selector="mse", n=4)
    say(widget, do="train", steps=6, lr=0.05)
    shown = {name: getattr(widget, name) for name in ("fixed", "state", "curve", "live", "readout", "exported")}
    assert len(json.dumps(shown, allow_nan=False)) < 20_000
    fixed = widget.fixed
    assert (fixed["layers"], fixed["heads"], fixed["most_rank"]) == (N_LAYERS, N_HEADS, D_HEAD)
    assert {"changed", "selector-mse"} <= {view["key"] for view in fixed["views"]}
    assert fixed["views"][0]["values"] == pytest.approx((100 * found.relative_loss).flatten().tolist(), rel=1e-4)
    for name in ("mse", "random"):
        order = [Head.parse(label) for label in fixed["rankings"][name]]
        assert len(set(order)) == N_LAYERS * N_HEADS
        assert sorted(order[:4]) == found.select(name, share=4 / 15, seed=0)


@pytest.mark.parametrize("selector", ["mse", "random"])
def test_every_number_of_heads_can_be_chosen(widget: RestoreWidget, selector: str) -> None:
    for n in range(1, N_LAYERS * N_HEADS + 1):
        say(widget, do="choose", selector=selector, n=n)
        assert widget.error == ""
        assert set(widget.state["heads"]) == set(widget.fixed["rankings"][selector][:n])


def test_messages_are_actions_with_their_lines(
    widget: RestoreWidget, session: RestoreSession, pair, found, question_file
) -> None:
    say(widget, do="choose", heads=["L2H1", "L0H4"])
    assert session.heads == (Head(0, 4), Head(2, 1))
    say(widget, do="train", steps=6, lr=0.05)
    say(widget, do="rank", rank=3)
    say(widget, do="scale", scale=0.5)
    assert widget.state["history"] == list(session.history) == [
        "session.choose([lcc.Head(0, 4), lcc.Head(2, 1)])", "session.train(6, lr=0.05)", "session.set_rank(3)",
        "session.set_scale(0.5)",
    ]  # fmt: skip
    assert (widget.state["rank"], widget.state["scale"], widget.state["n_steps"]) == (3, 0.5, 6)
    assert float(session.constants.abs().max()) > 0
    again = RestoreSession(pair, found, load_data(str(question_file)), batch_size=4)
    for line in widget.state["history"]:
        exec(line, {"session": again, "lcc": lcc})
    assert torch.equal(again.constants, session.constants)
    key = widget.state["key"]
    assert not widget.state["can_redo"]
    say(widget, do="undo")
    assert widget.state["scale"] == 1.0
    assert widget.state["can_redo"]
    assert widget.state["key"] != key
    say(widget, do="redo")
    assert widget.state["key"] == key
    assert widget.error == ""


def test_choosing_runs_no_model(widget: RestoreWidget, pair, monkeypatch) -> None:
    passes = []
    hooks = [
        model.original_model.register_forward_pre_hook(lambda *_: passes.append(1))
        for model in (pair.dense, pair.pruned)
    ]
    said = []
    widget.observe(lambda change: said.append(change["new"]), "busy")
    say(widget, do="choose", selector="mse", n=4)
    say(widget, do="rank", rank=2)
    say(widget, do="undo")
    assert said == passes == []
    say(widget, do="read", prompt=PROMPT)
    assert said == ["reading", ""]
    assert len(passes) > 0
    for hook in hooks:
        hook.remove()


def test_training_shows_every_step_and_then_what_came_of_it(widget: RestoreWidget, session: RestoreSession) -> None:
    live, busy = [], []
    widget.observe(lambda change: live.append(list(change["new"])), "live")
    widget.observe(lambda change: busy.append(change["new"]), "busy")
    say(widget, do="choose", selector="mse", n=15)
    say(widget, do="train", steps=12, lr=0.05)
    assert busy == ["training", "reading", ""]
    assert [len(points) for points in live] == [*range(1, 13), 0]
    assert live[11] == widget.curve
    assert [point[0] for point in widget.curve] == list(range(1, 13))
    assert [point[2] for point in widget.curve if point[2] is not None] == pytest.approx(
        [step.validation_loss for step in session.steps if step.validation_loss is not None], rel=1e-4
    )
    assert widget.readout["losses"] == session.loss()
    assert widget.readout["losses"]["restored"] < widget.readout["losses"]["pruned"] - 0.1
    assert widget.readout["key"] == widget.state["key"]
    assert widget.readout["texts"] == session.generate(PROMPT, 32)
    assert widget.readout["seen"]["tokens"] == session.next_tokens(PROMPT, 4).to_dict("records")
    changed = 100 * session.compare_prompt(PROMPT).change("restored")
    assert widget.readout["seen"]["changes"]["restored"] == pytest.approx(changed.flatten().tolist(), rel=1e-3)
    assert widget.readout["seconds"] == session.time_step()
    assert "below the dense one's" in widget.readout["warning"]  # the task was learned
    say(widget, do="train", steps=2)
    assert [point[0] for point in widget.curve] == list(range(1, 15))


def test_stop_arrives_while_training_and_keeps_the_best(widget: RestoreWidget, session: RestoreSession) -> None:
    say(widget, do="choose", selector="mse", n=15)
    threads = []

    def stop(change) -> None:  # runs in the worker, with the step just done
        threads.append(threading.current_thread())
        if len(change["new"]) == 7:
            assert widget.busy == "training"
            other = threading.Thread(target=widget._handle_custom_msg, args=({"do": "stop"}, []))
            other.start()
            other.join()

    widget.observe(stop, "live")
    say(widget, do="train", steps=400, lr=0.05)
    assert threading.main_thread() not in threads
    assert session.history[-1] == "session.train(400, lr=0.05, stop_after=7)"
    measured = [point[2] for point in widget.curve if point[2] is not None]
    assert widget.readout["losses"]["restored"] == pytest.approx(min(measured), rel=1e-4)
    say(widget, do="train", steps=3)  # an old stop ends no new training
    assert session.history[-1] == "session.train(3)"


def test_a_stop_before_the_first_step_is_not_lost(widget: RestoreWidget, session: RestoreSession, monkeypatch) -> None:
    say(widget, do="choose", heads=["L1H2"])
    train = session.train

    def stopped_first(*args, **settings):
        widget._handle_custom_msg({"do": "stop"}, [])
        return train(*args, **settings)

    monkeypatch.setattr(session, "train", stopped_first)
    say(widget, do="train", steps=400)
    assert session.history[-1] == "session.train(400, stop_after=1)"


def test_work_in_progress_refuses_the_rest_and_stays_alive(widget: RestoreWidget, session: RestoreSession) -> None:
    say(widget, do="choose", heads=["L1H2"])
    errors = []

    def disturb(change) -> None:
        if len(change["new"]) == 2:
            for message in ({"do": "choose", "heads": ["L0H0"]}, {"do": "export", "out": "x"}, {"do": "undo"}):
                widget._handle_custom_msg(message, [])
                errors.append(widget.error)

    widget.observe(disturb, "live")
    say(widget, do="train", steps=4)
    assert len(errors) == 3
    assert all("running" in error for error in errors)
    assert session.history == ("session.choose([lcc.Head(1, 2)])", "session.train(4)")
    assert widget.busy == ""


def test_a_reading_that_somebody_waits_for_is_cut_short(widget: RestoreWidget, session: RestoreSession) -> None:
    say(widget, do="read")
    assert {"losses", "seen", "texts"} <= set(widget.readout)
    say(widget, do="choose", heads=["L1H2"])
    parts = []

    def skip(change) -> None:
        parts.append(set(change["new"]) - {"key", "method", "prompt"})
        if len(parts) == 2:
            widget._handle_custom_msg({"do": "skip"}, [])

    widget.observe(skip, "readout")
    say(widget, do="read")
    assert parts == [{"losses"}, {"losses", "levels"}]
    say(widget, do="read")
    assert parts[-1] == {"losses", "levels", "seen", "texts", "seconds", "to_refit"}


def test_what_is_asked_during_a_reading_cuts_it_short_and_is_done(
    widget: RestoreWidget, session: RestoreSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The browser may ask before it hears that a reading has begun; nothing that it asks is lost."""
    begun, loss = threading.Event(), session.loss

    def slow() -> dict[str, float]:
        begun.set()
        assert widget._skipped.wait(60)
        return loss()

    say(widget, do="choose", heads=["L1H2"])
    monkeypatch.setattr(session, "loss", slow)
    widget._handle_custom_msg({"do": "read"}, [])
    assert begun.wait(60)
    widget._handle_custom_msg({"do": "choose", "heads": ["L2H3"]}, [])
    assert widget.error == ""
    assert widget.state["heads"] == ["L2H3"]
    assert "seen" not in widget.readout
    assert widget.busy == ""


def test_undo_and_redo_show_what_was_read_before(session: RestoreSession, monkeypatch: pytest.MonkeyPatch) -> None:
    widget = RestoreWidget(session, prompt=PROMPT, reads_at_once=True)
    say(widget, do="choose", selector="mse", n=8)
    say(widget, do="train", steps=4, lr=0.05)
    trained = widget.readout
    busy: list[str] = []
    widget.observe(lambda change: busy.append(change["new"]), "busy")
    say(widget, do="undo")
    assert widget.readout["losses"]["restored"] == widget.readout["losses"]["pruned"] != trained["losses"]["restored"]
    say(widget, do="redo")
    assert widget.readout == trained
    assert busy == []
    say(widget, do="read", prompt="is 1")  # another prompt is read
    assert busy == ["reading", ""]


def test_a_stopped_reading_ends_within_a_pass(widget: RestoreWidget, session: RestoreSession, monkeypatch) -> None:
    loss = session.loss

    def stopped_first() -> dict[str, float]:
        widget._handle_custom_msg({"do": "stop"}, [])
        return loss()

    monkeypatch.setattr(session, "loss", stopped_first)
    say(widget, do="read")
    assert (widget.error, widget.busy, widget.readout) == ("", "", {})
    assert not session.is_at_work
    monkeypatch.setattr(session, "loss", loss)
    say(widget, do="read")
    assert widget.readout["losses"].keys() == {"dense", "pruned", "restored"}


def test_methods_are_chosen_with_what_they_cost(widget: RestoreWidget, session: RestoreSession) -> None:
    offered = {method["name"]: method["does"] for method in widget.fixed["methods"]}
    assert {"lcc", "best", "gain", "norms", "low-rank"} < offered.keys()
    assert "Trains d_head per head, folds into existing weights" in offered["gain"]
    assert "a least-squares refit, then" in offered["best"]
    say(widget, do="choose", heads=["L1H2", "L0H3"])
    say(widget, do="method", method="gain")
    assert widget.state["n_trained"] == 2 * D_HEAD
    assert (widget.state["on_heads"], widget.state["has_scale"]) == (True, False)
    say(widget, do="method", method="norms")
    assert (widget.state["on_heads"], widget.state["heads"]) == (False, [])
    say(widget, do="undo")
    assert widget.state["heads"] == ["L0H3", "L1H2"]


def test_best_refits_before_it_trains_and_shows_how_far_it_is(pair, found: Scan, question_file: Path) -> None:
    data = load_data(str(question_file))
    session = RestoreSession(pair, found, data, batch_size=4, refitting=lcc.RefitRequest(data, 4, 32))
    widget = RestoreWidget(session, prompt="", reads_at_once=True)
    jobs, progress = [], []
    widget.observe(lambda change: jobs.append(change["new"]), "busy")
    widget.observe(lambda change: progress.append(change["new"]), "progress")
    say(widget, do="method", method="best")
    assert widget.readout["to_refit"] > 0 < widget.readout["seconds"]
    assert widget.readout["levels"]["pruned"] != widget.readout["losses"]["pruned"]  # the levels of its own objective
    del jobs[:]
    say(widget, do="train", steps=4)
    assert widget.error == ""
    assert jobs == ["refitting", "training", "reading", ""]
    assert f"refitting layers {N_LAYERS}/{N_LAYERS}" in progress
    assert progress[-1] == ""
    assert widget.state["history"][1:] == ["session.refit()", "session.train(4)"]
    assert widget.readout["losses"]["restored"] < widget.readout["losses"]["pruned"]
    say(widget, do="undo")
    say(widget, do="train", steps=1)
    assert jobs[4:] == ["reading", "", "training", "reading", ""]  # the refit is there already


def test_sessions_are_saved_loaded_and_compared(widget: RestoreWidget, session: RestoreSession, tmp_path: Path) -> None:
    say(widget, do="choose", selector="mse", n=8)
    say(widget, do="train", steps=4, lr=0.05)
    losses = widget.readout["losses"]
    say(widget, do="save", run=str(tmp_path))
    say(widget, do="undo")
    say(widget, do="pin", run=str(tmp_path))
    assert widget.error == ""
    assert widget.readout["losses"]["pinned"] == pytest.approx(losses["restored"], abs=1e-5)
    assert widget.readout["seen"]["models"][3] == "pinned"
    say(widget, do="unpin")
    assert "pinned" not in widget.readout["losses"]
    say(widget, do="load", run=str(tmp_path))
    say(widget, do="read")
    assert widget.readout["losses"]["restored"] == pytest.approx(losses["restored"], abs=1e-6)


def test_reading_follows_every_action_if_wanted(session: RestoreSession) -> None:
    widget = RestoreWidget(session, prompt="", reads_at_once=True)
    say(widget, do="choose", heads=["L1H2"])
    assert widget.readout["key"] == widget.state["key"]
    losses = widget.readout["losses"]
    assert losses["restored"] == losses["pruned"]
    assert "seen" not in widget.readout


def test_export_is_verified_and_loads(widget: RestoreWidget, session: RestoreSession, tmp_path: Path) -> None:
    say(widget, do="choose", selector="mse", n=8)
    say(widget, do="train", steps=6, lr=0.05)
    out = tmp_path / "out"
    say(widget, do="export", out=str(out))
    assert widget.error == ""
    assert widget.exported["path"] == str(out)
    assert widget.exported["line"] == f"session.export({str(out)!r})"
    assert widget.exported["difference"] < 1e-4 < 1e-3 < widget.exported["effect"]
    tokens = torch.arange(1, 25)[None]
    with session.applied() as restored, torch.no_grad():
        assert torch.allclose(
            load_plain(out, dtype=torch.float32, attention="eager")(tokens).logits, restored(tokens), atol=1e-4
        )
    say(widget, do="export", out=str(out))
    assert "exists already; name another folder" in widget.error
    say(widget, do="export", out=str(out), overwrite=True)
    assert widget.error == ""
    assert widget.exported["line"].endswith(", overwrite=True)")


@pytest.mark.parametrize(("message", "line"), [
    ({"do": "train", "steps": 3}, "expected heads to restore, got none; choose some first"),
    ({"do": "choose", "heads": []}, "expected heads to restore, got none; name heads or a selector"),
    ({"do": "choose", "heads": ["<b>"]}, "expected a head such as L12H3, got '<b>'"),
    ({"do": "choose", "selector": "patching", "n": 3}, "patching"),
    ({"do": "train", "steps": "many"}, "ValueError: invalid literal"),
    ({"do": "export", "out": " "}, "expected the name of a folder to export to, got none"),
    ({"do": "export", "out": "x"}, "expected heads to restore, got none"),
    ({"do": "undo"}, "expected an action to undo, got none"),
    ({"do": "rank"}, "KeyError: 'rank'"),
    ({"do": "fly"}, "stop, skip), got 'fly'"),
    ({}, "expected an action of the widget (choose, "),
])  # fmt: skip
def test_errors_are_one_line_and_leave_the_widget_at_work(
    widget: RestoreWidget, session, message: dict, line: str
) -> None:
    answers = []
    widget.send = answers.append
    say(widget, **message)
    assert line in widget.error
    assert "\n" not in widget.error
    assert widget.busy == ""
    assert answers == [{"done": message.get("do")}]
    assert session.history == ()
    say(widget, do="choose", heads=["L1H2"])
    assert widget.error == ""
    assert session.heads == (Head(1, 2),)


def test_calls_from_cells_are_shown_when_asked_for(widget: RestoreWidget, session: RestoreSession) -> None:
    session.choose("mse", share=0.5)
    assert widget.state["heads"] == []
    widget.refresh()
    assert widget.state["heads"] == [str(head) for head in session.heads]


def test_a_method_without_heads_has_no_map(pair, question_file: Path) -> None:
    widget = RestoreWidget(RestoreSession(pair, None, load_data(str(question_file)), method="norms", batch_size=4))
    assert widget.fixed["layers"] == 0
    assert not widget.state["has_scale"]
    assert [m["name"] for m in widget.fixed["methods"]] == ["norms", "best", "low-rank"]
    say(widget, do="train", steps=5)
    assert widget.error == ""
    assert widget.readout["losses"]["restored"] < widget.readout["losses"]["pruned"]
    say(widget, do="choose", selector="mse", n=2)
    assert widget.error == "expected a scan to choose heads by, got none; name the heads"


def test_closing_ends_a_training(widget: RestoreWidget, session: RestoreSession) -> None:
    say(widget, do="choose", heads=["L1H2"])
    widget.observe(lambda change: widget.close() if len(change["new"]) == 3 else None, "live")
    say(widget, do="train", steps=400)
    assert session.history[-1] == "session.train(400, stop_after=3)"


def test_a_long_curve_is_thinned_and_keeps_what_was_measured() -> None:
    steps = [lcc.Step(n, 5000, 1.0, 0.1, 4, 0.0, 0.5 if n % 100 == 0 else None) for n in range(1, 5001)]
    points = curve_contents(steps)
    assert len(points) < 500
    assert sum(point[2] is not None for point in points) == 50
    assert all(one[0] < other[0] for one, other in itertools.pairwise(points))


def test_the_worker_does_one_list_at_a_time() -> None:
    gate, lines = threading.Event(), []
    worker = Worker(lines.append, lines.append)
    worker.begin([("waiting", lambda: gate.wait(60.0))])
    with pytest.raises(RequestError, match="expected an idle widget, got one that is running"):
        worker.begin([("more", lambda: None)])
    assert not worker.wait(0.0)
    gate.set()
    assert worker.wait(60.0)
    assert lines == ["waiting", "waiting", ""]


def test_who_hears_of_an_end_may_begin_anew() -> None:
    done, told = threading.Event(), []

    def tell(word: str) -> None:
        told.append(word)
        if told == ["first", "first", ""]:
            worker.begin([("second", done.set)])

    worker = Worker(tell, told.append)
    worker.begin([("first", lambda: None)])
    assert done.wait(60)
    assert worker.wait(60.0)
    assert told == ["first", "first", "", "second", "second", ""]


def test_the_browser_side_fetches_nothing_and_stays_in_its_place() -> None:
    code = script()
    assert code.count("export default") == 1
    for sign in ("import ", "fetch(", "innerHTML", "eval(", "https:"):
        assert sign not in code
    assert code.count("http://") == 1  # the name of SVG, which nobody fetches
    assert "url(" not in style()
    assert "@import" not in style()


@pytest.mark.slow
def test_without_anywidget_the_widget_is_refused_in_one_line() -> None:
    code = (
        "import sys; sys.modules['anywidget'] = None\n"
        "import lcc_lens as lcc\n"
        "try:\n    lcc.RestoreWidget(object())\n"
        "except lcc.RequestError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "expected anywidget for the widget, got none; run pip install 'lcc-lens[notebook]'\n"


def test_versions_of_the_prompt_are_shown_with_their_merits(
    widget: RestoreWidget, session: RestoreSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", "S_P:")
    say(widget, do="rewrite", prompt="name 3 rivers")
    assert widget.error == ""
    found = session.rewrites("name 3 rivers")
    assert widget.rewrites["verdict"] == found.verdict
    assert [row["text"] for row in widget.rewrites["rows"]] == [c.text for c in found.candidates]
    assert sum(row["chosen"] for row in widget.rewrites["rows"]) == 1
    assert all(len(row["merits"]) == len(widget.rewrites["names"]) == 4 for row in widget.rewrites["rows"])
    json.dumps(widget.rewrites, allow_nan=False)
    say(widget, do="rewrite", prompt="")
    assert "expected a prompt with at least one word" in widget.error
