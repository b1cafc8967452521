"""Caches of keys and values: their name in calls of transformers' models, and models that go on from one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.families import FAMILIES, FORGETFUL, family
from support.tiers import mostly_slow
from transformers import Cache

from lcc_lens.frontends.session.side_by_side import generate
from lcc_lens.models.architecture.caches import cache_name, cache_of
from lcc_lens.models.hooked.kv_cache import can_continue
from lcc_lens.models.pair import load_pair


def test_a_cache_has_the_name_that_the_function_has_for_it() -> None:
    assert cache_name(lambda tokens, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda tokens, cache=None: None) == "cache"
    assert cache_name(lambda tokens, **options: None) == "past_key_values"


def test_a_cache_is_read_under_either_name() -> None:
    assert cache_of(SimpleNamespace(past_key_values="old")) == "old"
    assert cache_of(SimpleNamespace(cache="new")) == "new"
    assert cache_of(SimpleNamespace(logits=0)) is None


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, "llama", "mistral, 4"))
def test_models_go_on_from_their_own_cache(name: str, tmp_path: Path) -> None:
    assert can_continue(family(name, tmp_path)) == (name not in FORGETFUL)


def test_a_model_that_forgets_its_cache_generates_without_one(dense_dir: Path, pruned_dir: Path) -> None:
    sound, faulty = load_pair(dense_dir, pruned_dir), load_pair(dense_dir, pruned_dir)
    for block in faulty.dense.blocks:
        forward = block.attn.original_component.forward
        block.attn.original_component.forward = lambda *args, forward=forward, **options: forward(
            *args, **{name: None if isinstance(value, Cache) else value for name, value in options.items()}
        )
    expected = generate(sound, {}, "what is two plus two?", 8)
    assert not can_continue(faulty.dense)
    assert can_continue(faulty.pruned)
    assert generate(faulty, {}, "what is two plus two?", 8) == expected
