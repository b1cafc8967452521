"""Tasks with a known circuit: prompts for any tokenizer, logit differences, and the effect of every head."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.tiny import build_model, with_an_end

from lcc_lens.analysis.head_types.circuit_prompts import circuit_prompts
from lcc_lens.analysis.head_types.circuit_task import CircuitTask, circuit_task
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.models.pair import Pair, load_pair
from lcc_lens.restoration.injections.constants import MeanShift


def word_tokenizer():
    """Words with the space before them, and years of two tokens, a century and the rest."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lcc_lens.analysis.head_types import circuit_prompts as made

    texts = [*made._SENTENCES, *(f" {name}" for name in made._NAMES), "The lasted from the year to the year"]
    words = {w for text in [*texts, *made._NOUNS] for w in re.findall(r" ?[A-Za-z]+|,", re.sub(r"\{.\}", "", text))}
    words |= {f" {noun}" for noun in made._NOUNS} | {f"{n:02d}" for n in range(100)} | {f" {c}" for c in range(11, 18)}
    vocabulary = {"<end>": 0, **{word: i + 1 for i, word in enumerate(sorted(words))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d\d|,"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, model = tmp_path_factory.mktemp("words"), build_model(4)
    for name in ("dense", "pruned"):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight[::2] = 0
    return load_pair(folder / "dense", folder / "pruned")


@pytest.fixture(scope="module")
def task(words: Pair) -> CircuitTask:
    return circuit_task(words, "indirect-object", n=5)


def test_indirect_objects_are_the_other_name() -> None:
    tokenizer = word_tokenizer()
    for prompt in circuit_prompts("indirect-object", tokenizer, 12, 0):
        first, second, giver = re.findall(r"(?<!^)\b[A-Z][a-z]+\b", prompt.text)
        assert {first, second} == {giver, tokenizer.decode(prompt.right).strip()}
        assert tokenizer.decode(prompt.wrong).strip() == giver
        changed = prompt.tokens != prompt.corrupted
        assert int(changed.sum()) == 3  # the names, and nothing else
        assert not set(prompt.corrupted[changed].tolist()) & {*prompt.right, *prompt.wrong}
    drawn = [[p.text for p in circuit_prompts("indirect-object", tokenizer, 4, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_years_after_the_first_one_are_right() -> None:
    tokenizer = word_tokenizer()
    for prompt in circuit_prompts("greater-than", tokenizer, 12, 0):
        century, number = re.search(r"year (\d\d)(\d\d) to the year (\d\d)$", prompt.text).groups()[:2]
        assert {int(tokenizer.decode([t])) for t in prompt.right} == set(range(int(number) + 1, 100))
        assert {int(tokenizer.decode([t])) for t in prompt.wrong} == set(range(2, int(number) + 1))
        assert f"{century}01" in tokenizer.decode(prompt.corrupted)


@pytest.mark.parametrize("task", ["indirect-object", "greater-than"])
def test_prompts_end_before_their_answer(task: str) -> None:
    tokenizer = word_tokenizer()
    plain, ended = (circuit_prompts(task, each, 3, 0) for each in (tokenizer, with_an_end(tokenizer)))
    for first, second in zip(plain, ended, strict=True):
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.corrupted, second.corrupted)


def test_differences_and_effects_equal_plain_runs(words: Pair, task: CircuitTask) -> None:
    prompts = circuit_prompts("indirect-object", words.tokenizer, 5, 0)
    for place, model in enumerate((words.dense, words.pruned)):
        ends = [model(p.tokens[None])[0, -1] for p in prompts]
        plain = torch.stack([e[p.right[0]] - e[p.wrong[0]] for e, p in zip(ends, prompts, strict=True)])
        assert torch.allclose(task.difference[place], plain, atol=1e-4)
        for head in (Head(0, 1), Head(2, 3)):
            name, patched = f"blocks.{head.layer}.attn.hook_z", []
            for prompt in prompts:
                z = model.run_with_cache(prompt.corrupted[None], names_filter=name)[1][name]

                def patch(value, hook, z=z, head=head):
                    value = value.clone()
                    value[:, :, head.head] = z[:, :, head.head]
                    return value

                end = model.run_with_hooks(prompt.tokens[None], fwd_hooks=[(name, patch)])[0, -1]
                patched.append(end[prompt.right[0]] - end[prompt.wrong[0]])
            expected = plain.mean() - torch.stack(patched).mean()
            assert task.effect is not None
            assert float(task.effect[place][head]) == pytest.approx(float(expected), abs=1e-4)
    assert float(task.effect.abs().max()) > 1e-2


def test_a_restoration_is_a_third_model(words: Pair, task: CircuitTask, found: Scan) -> None:
    shift = MeanShift(found.components, [Head(0, 1), Head(1, 1)])
    three = circuit_task(words, "indirect-object", shift, n=5, effects=False)
    assert three.models == ("dense", "pruned", "restored")
    assert torch.allclose(three.difference[:2], task.difference)
    assert float((three.difference[2] - three.difference[1]).abs().max()) > 1e-3
    assert three.table()["model"].tolist() == ["dense", "pruned", "restored"]
    assert "restored" in repr(three)


def test_table_has_the_strongest_head_first(task: CircuitTask) -> None:
    table = task.table()
    assert len(table) == 15
    assert abs(table["dense"][0]) == pytest.approx(float(task.effect[0].abs().max()))


def test_tokenizers_that_split_names_or_numbers_are_refused(pair: Pair, dense_dir: Path) -> None:
    with pytest.raises(RequestError, match="expected names of one token for indirect objects, got 0 of 24"):
        circuit_task(pair)
    with pytest.raises(RequestError, match="expected years of two tokens, such as 17 and 32, for greater-than"):
        circuit_task(pair, "greater-than")
    with pytest.raises(RequestError, match="expected one of indirect-object, greater-than, got 'ioi'"):
        circuit_task(pair, "ioi")
