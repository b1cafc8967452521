"""The name of a cache of keys and values in calls of transformers' models."""

from __future__ import annotations

from types import SimpleNamespace

from lcc_lens.models.architecture.caches import cache_name, cache_of


def test_a_cache_has_the_name_that_the_function_has_for_it() -> None:
    assert cache_name(lambda tokens, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda tokens, cache=None: None) == "cache"
    assert cache_name(lambda tokens, **options: None) == "past_key_values"


def test_a_cache_is_read_under_either_name() -> None:
    assert cache_of(SimpleNamespace(past_key_values="old")) == "old"
    assert cache_of(SimpleNamespace(cache="new")) == "new"
    assert cache_of(SimpleNamespace(logits=0)) is None
