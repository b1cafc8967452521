"""Rewriters: saved, loaded, refused for other models, and the two commands."""

from __future__ import annotations

import dataclasses
import json
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
from support.commands import call, refused
from support.places import ROOT
from support.small_sets import write_sets
from support.tiny import build_model, save_model

from lcc_lens.core.errors import RequestError
from lcc_lens.models.loading import hooked
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.prompting.rewriting import rewrites
from lcc_lens.prompting.rewriting.fitting import fit_rewriter
from lcc_lens.prompting.rewriting.preference_files import Preference
from lcc_lens.prompting.rewriting.preferences import Preferences
from lcc_lens.prompting.rewriting.recipe import read_rewriter_recipe
from lcc_lens.prompting.rewriting.rewriter import Rewriter
from lcc_lens.prompting.rewriting.rewrites import rewrite_prompt, written_by
from lcc_lens.prompting.rewriting.settings import RewriterSettings

PAIRS = [Preference(f"river {i}", f"List {i} rivers", f"rivers {i}") for i in range(6)]
RESPONSE = "It is the Elbe, and a dozen other rivers."
BEST = "the raw prompt is already the best"


@pytest.fixture(autouse=True)
def short_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", "S_P:")


@pytest.fixture(scope="module")
def rewriter(pair: Pair) -> Rewriter:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcc_lens.prompting.rewriting.writing.INSTRUCTION", "S_P:")
        return fit_rewriter(pair, Preferences(tuple(PAIRS)), settings=RewriterSettings(lr=0.05, steps=4))


def test_versions_are_ranked_with_their_merits(pair: Pair, rewriter: Rewriter) -> None:
    found = rewriter.rewrite("name 3 rivers", pair, n=3, response=RESPONSE, max_new_tokens=12)
    likelihoods = [c.ranked.log_likelihood for c in found.candidates]
    assert likelihoods == sorted(likelihoods, reverse=True)
    sources = [c.source for c in found.candidates]
    assert sources.count("raw") == 1
    assert {"clear", "precise", "concise-cot", "merits", "rewriter"} <= set(sources)
    assert found.chosen is (found.candidates[0] if found.candidates[0].ranked.is_better else found.chosen)
    assert list(found.table()["chosen"]).count(True) == 1
    assert found.table().set_index("source").loc["concise-cot", "concise_cot"] > 0
    assert rewriter.rewrite("name 3 rivers", pair, n=3, response=RESPONSE, max_new_tokens=12) == found


def test_a_rewriter_drops_nothing_out_whatever_its_training_did(pair: Pair, rewriter: Rewriter) -> None:
    assert rewriter.record.settings.dropout > 0
    record = dataclasses.replace(rewriter.record, settings=RewriterSettings(dropout=0.0))
    sure = dataclasses.replace(rewriter, record=record)
    versions = [r.rewrite("name 3 rivers", pair, n=3, response=RESPONSE, max_new_tokens=12) for r in (rewriter, sure)]
    assert versions[0] == versions[1]


def test_the_raw_prompt_may_stay(pair: Pair) -> None:
    alone = rewrite_prompt(pair, "name 3 rivers", [], response=RESPONSE, rules=())
    assert alone.verdict == BEST
    assert [c.source for c in alone.candidates] == ["raw"]
    others = [rewrite_prompt(pair, t, [], response=RESPONSE) for t in ("name 3 rivers", "river", "Elbe?", "so")]
    for found in others:
        is_better = found.candidates[0].ranked.is_better
        assert found.verdict.startswith(BEST) == (not is_better)
        assert (found.verdict == BEST) == (found.candidates[0].source == "raw")
        assert found.chosen.source == "raw" or found.chosen is found.candidates[0]


def test_a_template_stays_around_the_versions(pair: Pair) -> None:
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nname rivers<|im_end|>\n<|im_start|>assistant\n"
    found = rewrite_prompt(pair, chat, ["list rivers"], response=RESPONSE)
    assert {c.text: c.source for c in found.candidates}["list rivers"] == "user"
    assert all(c.ranked.prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>") for c in found.candidates)
    assert all(c.ranked.prompt.endswith("<|im_start|>assistant\n") for c in found.candidates)


def test_a_bare_prompt_gets_the_chat_template(dense_dir: Path, pruned_dir: Path) -> None:
    pair = load_pair(dense_dir, pruned_dir)
    pair.tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    found = rewrite_prompt(pair, "name rivers", ["list rivers"], response=RESPONSE, rules=())
    assert {c.ranked.prompt for c in found.candidates} == {
        "[user]name rivers[assistant]", "[user]list rivers[assistant]"
    }  # fmt: skip


def test_without_a_chat_template_the_answer_begins_on_a_line_of_its_own(pair: Pair) -> None:
    found = rewrite_prompt(pair, "name rivers", ["list rivers"], response=RESPONSE, rules=())
    assert {c.ranked.prompt for c in found.candidates} == {"name rivers\n", "list rivers\n"}


@pytest.mark.parametrize("prompt", ["说出三条河流", "اذكر ثلاثة أنهار", "🍎🍎 + 🍎 = ?", "नदियाँ बताओ"])
def test_prompts_in_any_script_are_rewritten(pair: Pair, rewriter: Rewriter, prompt: str) -> None:
    found = rewriter.rewrite(prompt, pair, n=2, max_new_tokens=12)
    raw = next(c for c in found.candidates if c.source == "raw")
    assert (raw.text, raw.merits.preservation) == (prompt, 1)
    assert {"raw", "clear", "precise", "concise-cot", "merits"} <= {c.source for c in found.candidates}


def test_versions_that_give_the_response_away_are_dropped_and_counted(pair: Pair) -> None:
    given = ["list rivers", "Say: it is the Elbe", "Elbe"]
    found = rewrite_prompt(pair, "name rivers", given, response=RESPONSE, rules=())
    assert {c.text for c in found.candidates} == {"name rivers", "list rivers", "Elbe"}
    assert found.n_copies == 1
    assert found.verdict.endswith("; 1 dropped that give the response away")
    kept = rewrite_prompt(pair, "It is the Elbe?", given[1:2], response=RESPONSE, rules=())
    assert kept.n_copies == 0  # the raw prompt gives as much away


def test_without_a_response_the_dense_model_answers(pair: Pair) -> None:
    found = rewrite_prompt(pair, "name 3 rivers", ["list rivers"], response_tokens=40, rules=())
    assert found.response
    assert found.response == rewrite_prompt(pair, "name 3 rivers", [], response_tokens=40, rules=()).response


def test_saved_rewriters_are_the_same(pair: Pair, rewriter: Rewriter, tmp_path: Path) -> None:
    rewriter.save(tmp_path)
    loaded = Rewriter.load(tmp_path)
    assert loaded.record == rewriter.record
    assert "held-out pairs ranked right" in repr(loaded)
    given = {"n": 2, "response": RESPONSE, "max_new_tokens": 8}
    assert loaded.rewrite("name rivers", pair, **given) == rewriter.rewrite("name rivers", pair, **given)
    content = bytearray((tmp_path / "rewriter.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "rewriter.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match="got a changed file"):
        Rewriter.load(tmp_path)


def test_refusals(pair: Pair, rewriter: Rewriter, tmp_path: Path) -> None:
    for prompt in ("", "  \n"):
        with pytest.raises(RequestError, match="expected a prompt with at least one word"):
            rewriter.rewrite(prompt, pair)
    with pytest.raises(RequestError, match="expected a request to rewrite of at most 464 tokens, got 618"):
        rewriter.rewrite("a" * 600, pair)
    with pytest.raises(RequestError, match="expected a prompt of at most 480 tokens, got 501"):
        rewrite_prompt(pair, "a" * 500, [])
    with pytest.raises(RequestError, match="expected prompts with at least one word, got ' '"):
        rewrite_prompt(pair, "name rivers", [" "], response=RESPONSE)
    chatting = load_pair(pair.dense_id.path, pair.pruned_id.path)
    chatting.tokenizer.chat_template = "{% for m in messages %}user: {{ m['content'] }}{% endfor %}"
    with pytest.raises(RequestError, match="expected prompts with at least one word, got ' '"):
        rewrite_prompt(chatting, "name rivers", [" "], response=RESPONSE)  # the template has words
    with pytest.raises(RequestError, match="expected a response to rank prompts by"):
        rewrite_prompt(pair, "name rivers", [], response=" ")
    other = dataclasses.replace(rewriter, record=dataclasses.replace(rewriter.record, model_sha256="0" * 64))
    with pytest.raises(RequestError, match="expected the rewriter's model"):
        other.rewrite("name rivers", pair)
    with pytest.raises(RequestError, match="make it with lcc-lens rewrite fit"):
        Rewriter.load(tmp_path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"target": "restored"}, "expected the target dense or pruned, got 'restored'"),
        ({"rules": ["claer"]}, "expected rules among the variants .*, got 'claer'; did you mean 'clear'"),
        ({"rules": ["soft"]}, "expected rules among the variants .*, got 'soft'"),
    ]
    for options, message in wrong:
        with pytest.raises(RequestError, match=message):
            unwrap(rewrite_prompt)(pair, "name rivers", [], **{"response": RESPONSE, **options})
    with pytest.raises(RequestError, match="expected response_tokens of at least 1, got 0"):
        rewrite_prompt(pair, "name rivers", [], response=RESPONSE, response_tokens=0)
    with pytest.raises(RequestError, match="expected n of at least 1, got 0"):
        written_by(pair, "name rivers", 0)
    with pytest.raises(RequestError, match="expected the target dense or pruned, got 'foo'"):
        unwrap(fit_rewriter)(pair, Preferences(tuple(PAIRS)), target="foo", run=tmp_path / "run")
    with pytest.raises(RequestError, match="expected two versions in entry 1, got 'b' for both"):
        fit_rewriter(pair, Preferences((PAIRS[0], Preference("a", "b", "b"))))


def test_the_commands_fit_and_rewrite(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "instructions.jsonl", tmp_path / "run"
    rows = ({"instruction": f"Say {i}.", "output": f"It is {i}, and {i} it stays, whatever else."} for i in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit = ["rewrite", "fit", dense_dir, pruned_dir, run]
    refused(capsys, 2, "expected preferences to go on with in", *fit, "--resume")
    fit += ["--data", data, "--examples", 6, "--candidates", 4, "--version-tokens", 8]
    fit += ["--steps", 3, "--lr", 0.05, "--batch-size", 2]
    assert call(*fit) == 0
    assert "held-out loss" in capsys.readouterr().out
    preferences = json.loads((run / "rewriter" / "preferences.json").read_text())
    assert {"prompt", "chosen", "rejected", "margin"} == preferences[0].keys()
    first = Rewriter.load(run / "rewriter")
    assert call(*fit, "--resume") == 0
    assert Rewriter.load(run / "rewriter").record == first.record
    capsys.readouterr()
    table = tmp_path / "table.json"
    assert call("rewrite", run, "name 3 rivers", "--n", 2, "--max-new-tokens", 8, "--out", table) == 0
    shown = capsys.readouterr().out
    assert "the raw prompt is already the best" in shown or "chosen: " in shown
    rows = json.loads(table.read_text())
    assert sum(row["chosen"] for row in rows) == 1
    assert {"clarity", "precision", "concise_cot", "preservation", "log_likelihood"} <= rows[0].keys()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("name 3 rivers\n\nsay so\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcc_lens.models.loading.hooked.load_hooked", None)  # the pair has that model already
        shorter = ("--n", 1, "--max-new-tokens", 8, "--out", table)
        assert call("rewrite", run, prompts, "--rewriter", dense_dir, *shorter) == 0
    assert {"raw", "dense"} <= {row["source"] for row in json.loads(table.read_text())}


def test_the_commands_refuse(dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "expected a rewriter or a scan in", "rewrite", tmp_path, "name rivers")
    refused(capsys, 2, "expected the file", "rewrite", tmp_path, tmp_path / "absent.txt")
    (tmp_path / "empty.json").write_text("[]")
    fit = ["rewrite", "fit", dense_dir, dense_dir, tmp_path / "run"]
    refused(capsys, 2, "got an empty list", *fit, "--preferences", tmp_path / "empty.json")
    refused(capsys, 2, "did you mean 'alpaca'", *fit, "--data", "alpacca")
    assert not (tmp_path / "run").exists()


def test_all_prompts_of_a_file_are_checked_first(
    pair: Pair, rewriter: Rewriter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewriter.save(tmp_path / "run" / "rewriter")
    prompts, table = tmp_path / "prompts.txt", tmp_path / "table.json"
    command = ["rewrite", tmp_path / "run", prompts, "--n", 1, "--max-new-tokens", 8, "--out", table]
    for wrong, message in (("???", "at least one word in prompt 2 of"), ("a" * 600, "tokens in prompt 2 of")):
        prompts.write_text(f"name rivers\n\n{wrong}\n\nsay so\n")
        refused(capsys, 2, message, *command)
    prompts.write_text("name rivers\n\nsay so\n")
    answer = rewrites.answers

    def silent(model: Any, tokenizer: Any, tokens: Any, **options: Any) -> list[str]:
        return [""] if "name" in tokenizer.decode(tokens) else answer(model, tokenizer, tokens, **options)

    monkeypatch.setattr(rewrites, "answers", silent)
    refused(capsys, 1, "got those of 1; prompt 1: expected a response to rank prompts by", *command)
    assert {row["raw"] for row in json.loads(table.read_text())} == {"say so"}


def test_the_model_s_own_template_around_the_prompts_of_a_file_is_known(
    rewriter: Rewriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewriter.save(tmp_path / "run" / "rewriter")
    load = hooked.load_tokenizer

    def with_a_template(path: Path) -> Any:
        tokenizer = load(path)
        tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
        return tokenizer

    monkeypatch.setattr(hooked, "load_tokenizer", with_a_template)
    prompts, table = tmp_path / "prompts.txt", tmp_path / "table.json"
    prompts.write_text("[user]name rivers[assistant]\n\nsay so\n")
    assert call("rewrite", tmp_path / "run", prompts, "--n", 1, "--max-new-tokens", 8, "--out", table) == 0
    assert {row["raw"] for row in json.loads(table.read_text())} == {"name rivers", "say so"}


def test_a_prompt_may_end_like_the_name_of_a_file(
    rewriter: Rewriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewriter.save(tmp_path / "run" / "rewriter")
    table, named = tmp_path / "table.json", tmp_path / "my preferences.json"
    command = ["rewrite", tmp_path / "run", "--n", 1, "--max-new-tokens", 8, "--out", table]
    assert call(*command, "what belongs into requirements.txt") == 0
    assert json.loads(table.read_text())[0]["raw"] == "what belongs into requirements.txt"
    Preferences((*PAIRS[:2], Preference("river 1", "Rivers?", "river 1"))).save(named)
    assert call(*command, named) == 0
    assert {row["raw"] for row in json.loads(table.read_text())} == {"river 0", "river 1"}
    refused(capsys, 2, "expected the file absent.json", *command, "absent.json")


def test_the_recipe_of_the_paper_s_size_runs_on_a_tiny_qwen2(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = families("qwen2")
    monkeypatch.setenv("LCC_LENS_DATA", str(write_sets(tmp_path / "sets")))
    recipe = ROOT / "recipes" / "prompts" / "mepo_qwen2.5_7b.json"
    fit = ["rewrite", "fit", pair.dense_id.path, pair.pruned_id.path, tmp_path / "run"]
    assert call(*fit, "--recipe", recipe, "--dry-run") == 0
    record = Rewriter.load(tmp_path / "run" / "rewriter").record
    assert record.steps == 2
    assert (record.settings.beta, record.settings.lr, record.settings.rank) == (0.01, 1e-6, 8)
    assert read_rewriter_recipe(recipe).training == RewriterSettings()
    capsys.readouterr()
    refused(capsys, 2, "expected a recipe to try, got none", *fit, "--dry-run")
    (tmp_path / "other.json").write_text(recipe.read_text().replace('"title"', '"tittle"'))
    refused(capsys, 2, "no field title", *fit, "--recipe", tmp_path / "other.json")


def test_mepo_s_preferences_train_a_rewriter(dense_dir: Path, tmp_path: Path) -> None:
    pruned = save_model(build_model(seed=1), tmp_path / "other")
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    (tmp_path / "mepo.json").write_text(json.dumps(rows))
    run = tmp_path / "run"
    assert call("rewrite", "fit", dense_dir, pruned, run, "--preferences", tmp_path / "mepo.json", "--steps", 1) == 0
    assert Rewriter.load(run / "rewriter").record.pairs == len(PAIRS)
