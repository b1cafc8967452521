"""Merits of prompts: laws for any text, and what lowers each of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import call, refused

from lcc_lens.core.errors import RequestError
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.prompting.likelihoods import token_log_likelihoods
from lcc_lens.prompting.merits import MERITS, merits
from lcc_lens.prompting.rewriting.preference_files import Preference, read_preferences, write_preferences
from lcc_lens.prompting.wording import n_words, overlap

TEXTS = st.text(min_size=1, max_size=120).map(lambda text: f"{text} go")
NUMBERED = st.lists(st.sampled_from(["add", "12", "river", "3.5", "the", "1999", "and"]), min_size=1, max_size=12)


@given(TEXTS, TEXTS)
def test_merits_lie_in_zero_to_one_and_a_prompt_preserves_itself(text: str, original: str) -> None:
    found = merits(text, original)
    assert all(0 <= score <= 1 for score in found.scores.values())
    assert merits(text, text).preservation == 1
    assert set(found.scores) == set(MERITS)


@given(NUMBERED)
def test_deleting_a_number_lowers_preservation(spelled: list[str]) -> None:
    spelled = [*spelled, "7"]
    whole, without = " ".join(["go", *spelled]), " ".join(["go", *spelled[:-1]])
    assert merits(without, whole).preservation < 1
    assert "lost numbers 7" in merits(without, whole).reasons


@pytest.mark.parametrize("original", ["List three rivers step by step.", "List three rivers."])
def test_filler_never_raises_a_concise_chain_of_thought(original: str) -> None:
    filler = "The harbour was quiet and a grey ship lay still that morning. "
    scores = [merits(filler * n + original, original).concise_cot for n in range(4)]
    assert scores == sorted(scores, reverse=True)


def test_what_lowers_a_merit_is_named() -> None:
    good = merits('Think step by step and list exactly 3 rivers as a table, without "Nile".')
    poor = merits("plzzz tell me me something about stuff and things")
    assert all(good.scores[name] > poor.scores[name] for name in ("clarity", "precision", "concise_cot"))
    for word in ("misspelt plzzz", "me me", "vague something", "no hint", "no number"):
        assert word in poor.reasons
    assert "clarity" in repr(poor)


def test_a_lost_quotation_and_a_lost_word_lower_preservation() -> None:
    original = 'Translate "good day" into French for a child.'
    assert merits('For a child, translate "good day" into French.', original).preservation == 1
    lost = merits("Translate this into French.", original)
    assert "quotations good day" in lost.reasons
    assert lost.preservation < 0.5


@pytest.mark.parametrize(
    "text",
    [
        "三つの川を挙げてください",
        "列出三条河流",
        "Назови три реки",
        "اذكر ثلاثة أنهار",
        "ตั้งชื่อแม่น้ำ",
        "नदियाँ बताओ",
        "🍎 + 🍎",
    ],
)
def test_other_scripts_have_words(text: str) -> None:
    assert n_words(text) > 0
    assert merits(text, text).preservation == 1
    assert merits("go", text).preservation == 0


def test_signs_within_words_do_not_part_them() -> None:
    assert (n_words("नदियाँ बताओ"), n_words("ตั้งชื่อแม่น้ำ"), n_words("cafe\u0301 noir"), n_words("مُحَمَّد")) == (2, 1, 2, 1)
    assert merits("नदी", "नदियाँ").preservation == 0


def test_a_model_adds_its_likelihoods(dense_dir: Path) -> None:
    import torch

    from lcc_lens.data.batches import TokenSequence, token_ids

    loaded = load_hooked(dense_dir)
    found = merits("list 3 rivers", "name 3 rivers", loaded)
    start = token_ids(loaded.tokenizer, "list 3 rivers\n\n")
    whole = torch.tensor([*start, *token_ids(loaded.tokenizer, "name 3 rivers")])
    expected = token_log_likelihoods(loaded.model, [TokenSequence(whole, len(start))])[0].mean()
    assert found.original_log_likelihood == pytest.approx(float(expected), rel=1e-4)
    assert found.prompt_log_likelihood is not None
    assert found.preservation == merits("list 3 rivers", "name 3 rivers").preservation
    assert "tokens per word" in found.reasons  # the tiny tokenizer reads bytes


def test_refusals(dense_dir: Path) -> None:
    for text in ("", "  ", "?!"):
        with pytest.raises(RequestError, match="expected a prompt with at least one word"):
            merits(text)
    with pytest.raises(RequestError, match="expected an original with at least one word"):
        merits("go", "")
    with pytest.raises(RequestError, match="expected a prompt of at most 512 tokens, got 600"):
        merits("a" * 600, None, dense_dir)


@pytest.mark.parametrize(("text", "original"), [("don\u2019t stop", "don't stop"), ("cafe\u0301 too", "caf\u00e9 too")])
def test_another_spelling_of_the_same_letters_loses_nothing(text: str, original: str) -> None:
    for said, known in ((text, original), (original, text), (f'"{text}"', f'"{original}"')):
        assert merits(said, known).preservation == 1
        assert overlap(said, known) == 1


def test_overlap_finds_what_a_prompt_gives_away() -> None:
    assert overlap("Name a city. It is Paris.", " Paris") == 1
    assert overlap("What is 3 plus 4?", " 7") == 0
    assert overlap("What is 7?", " 7") == 1
    response = "The river Elbe flows through Hamburg"
    assert overlap(response, response) == 1
    assert overlap("The river flows. Elbe, Hamburg!", response) == 0  # words alone are no copy
    assert overlap("anything", "") == 0


def test_preferences_are_read_and_written_as_mepo_does(tmp_path: Path) -> None:
    path = tmp_path / "preferences.json"
    instruction = "You are an expert of prompt optimization.\n\nSliver Prompt:\n'list rivers'\n\n\nThe optional ..."
    path.write_text(
        json.dumps([{"prompt": instruction, "chosen": "List 3 rivers.", "rejected": "list rivers", "score": 9}])
    )
    found = read_preferences(path)
    assert found == [Preference("list rivers", "List 3 rivers.", "list rivers")]
    write_preferences(tmp_path / "again.json", found)
    assert read_preferences(tmp_path / "again.json") == found


@pytest.mark.parametrize("after", ["Sliver Prompt Response:\n'a'", "\nThe optional Sliver Response was"])
def test_mepo_s_lines_are_read_with_the_whole_prompt(
    tmp_path: Path, after: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = "Translate 'bonjour'\n\ninto English and explain it."
    prompt = f"<|im_start|>user\nYou are an expert.\n\nSliver Prompt:\n'{raw}'\n\n{after}"
    row = {"id": 0, "chosen": "Say it.", "rejected": raw, "sliver_response": "a", "raw_prompt": raw, "prompt": prompt}
    (tmp_path / "mepo.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert read_preferences(tmp_path / "mepo.jsonl") == [Preference(raw, "Say it.", raw)] * 2
    assert call("merits", tmp_path / "mepo.jsonl") == 0
    assert "merits of 2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"prompt": "a", "chosen": "b", "rejected": "b"}]',
            "versions in entry 0 of .*, got 'b' for both",
        ),
        ('[{"prompt": "!!", "chosen": "a", "rejected": "b"}]', "expected some text in 'prompt' of entry 0"),
        ("[]", "got an empty list"),
        ('[{"prompt": "a", "chosen": " ", "rejected": "b"}]', "expected some text in 'chosen' of entry 0"),
        ('[{"prompt": "a", "chosen": "b"}]', "no field"),
        ("{", "expected JSON"),
    ],
)
def test_other_preferences_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "preferences.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        read_preferences(tmp_path / "preferences.json")


def test_the_command_scores_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], dense_dir: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("List exactly 3 rivers, step by step.\n\nstuff plzzz\n")
    assert call("merits", prompts, "--model", dense_dir, "--out", tmp_path / "merits.json") == 0
    shown = capsys.readouterr().out
    assert "merits of 2 prompts" in shown
    assert "no hint at steps or structure" in shown
    rows = json.loads((tmp_path / "merits.json").read_text())
    assert [row["concise_cot"] for row in rows] == [1.0, 0.0]
    assert all(row["prompt_log_likelihood"] < 0 for row in rows)
    write_preferences(tmp_path / "preferences.json", [Preference("list 3 rivers", "list rivers", "rivers")])
    assert call("merits", tmp_path / "preferences.json", "--out", tmp_path / "second.json") == 0
    assert json.loads((tmp_path / "second.json").read_text())[0]["preservation"] < 1
    refused(capsys, 2, "expected the file", "merits", tmp_path / "absent.txt")
