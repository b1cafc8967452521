"""The template around what a user wrote: the model's own, a well-known one, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.commands import refused

from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.models.loading.hooked import load_tokenizer
from lcc_lens.models.pair import load_pair
from lcc_lens.prompting.frames import split_prompt
from lcc_lens.prompting.rewriting.preferences import preference_pairs
from lcc_lens.prompting.rewriting.rewriter import rewrite_prompt
from lcc_lens.prompting.rewriting.writing import candidate_prompts
from lcc_lens.prompting.variants import prompt_variants

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.mark.parametrize(
    ("prompt", "core"),
    [
        ("Below is.\n\n### Instruction:\nSay 1.\n\n### Response:\n", "Say 1."),
        ("Below is.\n\n### Instruction:\nSay 1.\n\n### Response:", "Say 1."),
        ("Below is.\n\n### Instruction:\nSay 1.\n### Response:\n", "Say 1."),
        ("Below is.\n\n### Instruction:\nSay 1.\n\n### Input:\nloudly\n\n### Response:\n", "Say 1."),
        ("A passage.\nQuestion: is it?\nAnswer:", "is it?"),
        ("Question: is it?\nAnswer: no\n\nQuestion: is it,\nor not?\nAnswer:", "is it,\nor not?"),
        ("<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\nSay 1.<|im_end|>\n<|im_start|>assistant\n", "Say 1."),
        ("<|im_start|>user<|im_sep|>Say 1.<|im_end|><|im_start|>assistant<|im_sep|>", "Say 1."),
        ("<start_of_turn>user\nSay 1.<end_of_turn>\n<start_of_turn>model\n", "Say 1."),
        ("<|turn>user\nSay 1.<turn|>\n<|turn>model\n", "Say 1."),
        ("<|system|>\nBe kind.<|end|>\n<|user|>\nSay 1.<|end|>\n<|assistant|>\n", "Say 1."),
        ("<|system|>\nBe kind.</s>\n<|user|>\nSay 1.</s>\n<|assistant|>\n", "Say 1."),
        ("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nSay 1. [/INST]", "Say 1."),
        ("[INST]<<SYS>>\nBe kind.\n<</SYS>>\n\nSay 1.[/INST]", "Say 1."),
        ("<|start|>system<|message|>Hi<|end|><|start|>user<|message|>Say 1.<|end|><|start|>assistant", "Say 1."),
        ("<|start_of_role|>user<|end_of_role|>Say 1.<|end_of_text|>\n<|start_of_role|>assistant", "Say 1."),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Say 1.<|END_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "Say 1."),
        ("<｜begin▁of▁sentence｜>Be kind.<｜User｜>Say 1.<｜Assistant｜>", "Say 1."),
        ("A chat. USER: Hi ASSISTANT: Hi.</s>USER: Say 1. ASSISTANT:", "Say 1."),
        ("User: Hi\n\nAssistant: Hi.\n\nUser: Say 1.\n\nAssistant:", "Say 1."),
        ("  Say 1.\n", "Say 1."),
        ("", ""),
    ],
)
def test_a_template_stays_around_what_the_user_wrote(prompt: str, core: str) -> None:
    framed = split_prompt(prompt)
    assert framed.core == core
    assert framed.having(core) == prompt


def template(turn: str, *, asked: str = "", first: str = "", system: str = "{{ m.content }}") -> str:
    """A chat template: how a user's turn is written, what asks for an answer, the beginning, a system's turn."""
    return (
        f"{first}{{% for m in messages %}}{{% if m.role == 'user' %}}{turn}{{% elif m.role == 'system' %}}{system}"
        f"{{% else %}}{asked}{{{{ m.content }}}}(end){{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asked}{{% endif %}}"
    )


TEMPLATES = {
    "brackets": template("[|user|]{{ m.content }}\n", asked="[|model|]", system="[|system|]{{ m.content }}[|done|]\n"),
    "words": template(" HUMAN: {{ m.content }}", asked=" MODEL:", first="A chat of two."),
    "dated": template("(me){{ m.content }}(end)", asked="(it)", first="(today){{ range(9) | random }}(end)"),
    "within": (
        "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}(me) "
        "{% if loop.index0 == 1 and messages[0].role == 'system' %}(rule){{ messages[0].content }}(/rule) {% endif %}"
        "{{ m.content }} (/me){% else %} {{ m.content }}(end){% endif %}{% endfor %}"
    ),
    "no system": template("(me){{ m.content }}(end)", asked="(it)", system="{{ raise_exception('no system turn') }}"),
    "one turn": "{% if messages[1:] %}{{ raise_exception('one') }}{% endif %}<u>{{ messages[0].content }}</u>",
}
CHATS = {
    "u": [("user", "Name 3 rivers: now,\n\n or HUMAN: later")],
    "su": [("system", "Be kind."), ("user", "Name rivers.")],
    "uau": [("user", "Hi."), ("assistant", "Hello!"), ("user", "Name rivers.")],
    "suau": [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello!"), ("user", "Name rivers.")],
}


@pytest.fixture
def tokenizer(dense_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(dense_dir)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_model_s_own_template_is_found(tokenizer: PreTrainedTokenizerBase, name: str, chat: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    turns = [{"role": role, "content": content} for role, content in CHATS[chat]]
    if (name == "one turn" and len(turns) > 1) or (name == "no system" and "s" in chat):
        return
    prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    framed = split_prompt(prompt, tokenizer)
    assert framed.core == turns[-1]["content"]
    assert framed.having(framed.core) == prompt
    tokenizer.chat_template = None
    assert split_prompt(prompt, tokenizer).core != framed.core


def test_prompts_in_the_own_template_are_varied_and_rewritten_within_it(dense_dir: Path, pruned_dir: Path) -> None:
    pair = load_pair(dense_dir, pruned_dir)
    pair.tokenizer.chat_template = TEMPLATES["brackets"]
    prompt = "[|system|]Be kind.[|done|]\n[|user|]Name 3 rivers.\n[|model|]"
    data = Data("made", "instruction", (Example(prompt, " Elbe, Rhine, Oder" * 3, "g"),), "here")
    varied = prompt_variants(data, ["raw", "filler"], pair.tokenizer)["filler"].examples[0].prompt
    assert varied.startswith("[|system|]Be kind.[|done|]\n[|user|]The harbour was")
    found = rewrite_prompt(pair, prompt, ["list rivers"], response=" Elbe", rules=())
    other = "[|system|]Be kind.[|done|]\n[|user|]list rivers\n[|model|]"
    assert {c.ranked.prompt for c in found.candidates} == {prompt, other}
    ((version, *_),) = candidate_prompts(pair, data, 1)
    assert version.endswith("here: Name 3 rivers.")
    kept = preference_pairs(pair, data, [[letter * 30 for letter in "abcdefghij"]]).pairs[0]
    assert "[|" not in kept.prompt + kept.chosen + kept.rejected


def test_control_tokens_in_no_known_template_are_refused(
    dense_dir: Path, pruned_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "<|human|>Name 3 rivers.<|bot|>"
    data = Data("made", "instruction", (Example(prompt, "Elbe", "g"),), "here")
    message = r"got the control token '<\|human\|>' in '<\|human\|>Name 3 rivers.<\|bot\|>'; name a model that has this"
    with pytest.raises(RequestError, match=message):
        prompt_variants(data, ["raw"])
    with pytest.raises(RequestError, match=message):
        rewrite_prompt(load_pair(dense_dir, pruned_dir), prompt, ["list rivers"])
    (tmp_path / "prompts.txt").write_text(prompt)
    refused(capsys, 2, "expected a bare prompt or one in a known chat template", "merits", tmp_path / "prompts.txt")
