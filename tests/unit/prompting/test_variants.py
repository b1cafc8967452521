"""Variants of prompts keep group, response and role, and depend on the prompt alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import Data, load_data
from lcc_lens.data.prompts import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT, Example
from lcc_lens.prompting.merits import merits
from lcc_lens.prompting.variants import VARIANTS, prompt_variants
from lcc_lens.prompting.wording import n_words

INSTRUCTION = "Compare the 3 longest rivers of northern Europe by length, and name every large town beside them"


def instructions(n: int = 40) -> Data:
    prompts = [ALPACA_PROMPT.format(instruction=f"{INSTRUCTION}, case {i}.") for i in range(n)]
    return Data(
        "made", "instruction", tuple(Example(p, "yes", f"g{i}") for i, p in enumerate(prompts)), "here", "train"
    )


def test_variants_keep_everything_but_the_prompt() -> None:
    data = instructions(4)
    variants = prompt_variants(data, list(VARIANTS))
    assert variants["raw"] == variants["soft"] == data
    for name, varied in variants.items():
        assert [(e.group, e.response) for e in varied.examples] == [(e.group, e.response) for e in data.examples]
        assert varied.role == "train"
        assert all(e.prompt.endswith("\n\n### Response:\n") for e in varied.examples)
        assert all(e.prompt.startswith("Below is an instruction") for e in varied.examples)
        assert (varied != data) == (name not in ("raw", "soft"))
    assert prompt_variants(data, list(VARIANTS)) == variants


def test_fillers_have_the_length_of_what_they_control_for() -> None:
    variants = prompt_variants(instructions(1), list(VARIANTS))
    length = {name: n_words(data.examples[0].prompt) for name, data in variants.items()}
    assert length["filler"] == length["clear"] == length["precise"] == length["concise-cot"] > length["raw"]
    assert length["filler-long"] == length["verbose"] > length["merits"] > length["filler"]


def test_each_variant_raises_its_own_merit() -> None:
    texts = {name: VARIANTS[name]("Name rivers.", "g") for name in VARIANTS}
    scored = {name: merits(text, "Name rivers.") for name, text in texts.items()}
    assert scored["concise-cot"].concise_cot > 0.5
    assert scored["precise"].precision > scored["filler"].precision
    assert scored["filler"].concise_cot == scored["raw"].concise_cot == 0
    assert scored["degraded"].preservation < 1 == scored["verbose"].preservation


def test_degraded_prompts_lose_what_mepo_s_lose() -> None:
    data, degraded = (prompt_variants(instructions(200), ["raw", "degraded"])[name] for name in ("raw", "degraded"))
    cores = [(a.prompt, b.prompt) for a, b in zip(data.examples, degraded.examples, strict=True)]
    keep_numbers = sum("3" in after for _, after in cores) / len(cores)
    assert 0.45 < keep_numbers < 0.7
    assert all(" Europe" not in after or " towns" not in after or "Compare" not in after for _, after in cores)


@pytest.mark.parametrize(
    "prompt",
    ["请按长度列出欧洲最长的三条河流", "ヨーロッパでいちばん長い川を教えてください", "บอกชื่อแม่น้ำที่ยาวที่สุดในยุโรป"],
)
def test_degraded_prompts_of_scripts_without_blanks_lose_letters(prompt: str) -> None:
    degraded = VARIANTS["degraded"](prompt, "g")
    assert 0.2 * len(prompt) < len(degraded) < 0.45 * len(prompt)
    assert {*degraded} <= {*prompt}


def test_an_input_and_a_system_turn_stay() -> None:
    with_input = ALPACA_PROMPT_WITH_INPUT.format(instruction="Sum up.", input="Ten words of text that matter.")
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nSum up.<|im_end|>\n<|im_start|>assistant\n"
    data = Data("made", "instruction", (Example(with_input, "a", "1"), Example(chat, "b", "2")), "here")
    for name in VARIANTS:
        first, second = (e.prompt for e in prompt_variants(data, [name])[name].examples)
        assert "\n\n### Input:\nTen words of text that matter.\n\n### Response:\n" in first
        assert second.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
        assert second.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_refusals(text_file: Path, tmp_path: Path) -> None:
    data = instructions(1)
    with pytest.raises(RequestError, match="got 'fillr'; did you mean 'filler'"):
        prompt_variants(data, ["raw", "fillr"])
    for names in ([], ["raw", "raw"]):
        with pytest.raises(RequestError, match="expected variants of prompts, each once"):
            prompt_variants(data, names)
    with pytest.raises(RequestError, match="got the running text"):
        prompt_variants(load_data(str(text_file)), ["raw"])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "三つの川を挙げてください", "response": "エルベ"}) + "\n")
    assert prompt_variants(load_data(str(other)), ["clear"])["clear"].examples[0].prompt.endswith("ください")
