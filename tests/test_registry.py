from __future__ import annotations

import pytest

import lightning_memopt as lm
from lightning_memopt._registry import Registry, unknown


@pytest.fixture
def colours():
    registry: Registry[int] = Registry("colour")
    for number, name in enumerate(("red", "green", "dark_blue")):
        registry.register(name)(number)
    return registry


def test_get_and_names_in_order(colours):
    assert colours.names() == ["red", "green", "dark_blue"]
    assert colours.get("green") == 1
    assert "green" in colours
    assert "mauve" not in colours


def test_register_returns_what_it_registers(colours):
    marker = object()
    assert colours.register("marker")(marker) is marker
    assert colours.get("marker") is marker


def test_a_name_is_given_once(colours):
    with pytest.raises(ValueError, match="The colour 'red' is registered already; choose another name"):
        colours.register("red")(7)
    assert colours.get("red") == 0


def test_unknown_name_lists_what_exists_and_suggests(colours):
    with pytest.raises(
        ValueError, match=r"Unknown colour 'gren'\. Did you mean 'green'\? Available: red, green, dark_blue\."
    ):
        colours.get("gren")


@pytest.mark.parametrize("name", [None, 3, ["red"], {}], ids=repr)
def test_a_name_that_is_no_string(colours, name):
    with pytest.raises(ValueError, match="Unknown colour"):
        colours.get(name)


def test_unknown_without_a_close_match():
    assert unknown("shape", "zzz", ["circle", "square"]) == "Unknown shape 'zzz'. Available: circle, square."


def test_registries_are_separate():
    one, two = Registry("one"), Registry("two")
    one.register("x")(1)
    assert two.names() == []


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_memopt' has no attribute 'nothing'"):
        lm.nothing  # noqa: B018
