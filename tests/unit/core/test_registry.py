"""Registries: names are unique, unknown ones suggest the nearest, and plug-ins are imported when first used."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from lcc_lens.core import registry as module
from lcc_lens.core.errors import RequestError
from lcc_lens.core.registry import Registry


@pytest.fixture
def colours() -> Registry[int]:
    return Registry("colour", {"red": 1, "green": 2})


def test_what_is_registered_is_listed_after_the_built_in(colours: Registry[int]) -> None:
    colours.register("blue", 3)
    assert list(colours) == ["red", "green", "blue"]
    assert (colours["blue"], len(colours), "blue" in colours) == (3, 3, True)


def test_a_taken_name_is_replaced_only_when_asked(colours: Registry[int]) -> None:
    with pytest.raises(RequestError, match="expected a new colour name, got 'red', which is taken; pass replace=True"):
        colours.register("red", 4)
    colours.register("red", 4, replace=True)
    assert colours["red"] == 4


@pytest.mark.parametrize("name", ["", "Red", "a b", "a+b", "1a", "a:b"])
def test_a_name_that_the_command_line_could_not_take_is_refused(colours: Registry[int], name: str) -> None:
    with pytest.raises(RequestError, match="lower-case letters"):
        colours.register(name, 4)


def test_an_unknown_name_suggests_the_nearest(colours: Registry[int]) -> None:
    with pytest.raises(RequestError, match=r"expected a colour \(red, green\), got 'gren'; did you mean 'green'\?"):
        colours["gren"]
    with pytest.raises(RequestError, match="choose one of these"):
        colours["zzz"]
    assert "zzz" not in colours


def test_a_plug_in_is_imported_when_it_is_used(colours: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    def installed(group: str) -> list[EntryPoint]:
        groups.append(group)
        return [EntryPoint("pi", "math:pi", group), EntryPoint("bad", "no_such_module:x", group)]

    monkeypatch.setattr(module, "entry_points", installed)
    assert list(colours) == ["red", "green", "pi", "bad"]
    assert int(colours["pi"]) == 3
    assert groups == ["lcc_lens.colours"]
