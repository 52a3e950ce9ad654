"""The options of a load: defined once, and known to Python, to type checkers and to commands."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest

import mtj_loader
from mtj_loader.cli.shared_options import option_hints
from mtj_loader.errors import UsageError
from mtj_loader.options import Keywords, LoadOptions, Source, descriptions, weighted

OPTIONS = {f.name: f for cls in (LoadOptions, Source) for f in fields(cls) if f.name != "path"}


@pytest.mark.parametrize("function", [mtj_loader.plan, mtj_loader.load])
def test_signature_and_help_have_every_option(function) -> None:
    parameters = inspect.signature(function).parameters
    documentation = inspect.getdoc(function)
    assert documentation is not None
    assert "{" not in documentation
    for name, field in OPTIONS.items():
        assert field.default is not MISSING
        assert parameters[name].default == field.default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"\n  {name}: {descriptions()[name][:20]}" in documentation


@pytest.mark.parametrize("function", [mtj_loader.plan, mtj_loader.load])
def test_a_misspelled_keyword_is_a_type_error(function) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) .*'dtpe'"):
        function("model", dtpe="float32")


def test_the_keywords_for_type_checkers_are_the_options() -> None:
    expected = {**get_type_hints(LoadOptions), **get_type_hints(Source)}
    assert get_type_hints(Keywords) | {"path": expected["path"]} == expected


@pytest.mark.parametrize("group", [LoadOptions, Source])
def test_commands_have_every_option_with_its_description(group: type) -> None:
    for name, hint in option_hints(group).items():
        text = hint.__metadata__[0].help.replace("\\[", "[")
        assert text == descriptions()[name] or name == "adapter"  # DIR=WEIGHT there


def test_host_memory_is_read_and_checked() -> None:
    assert LoadOptions().host_memory_bytes == 1 << 30
    assert LoadOptions(host_memory=64 << 20).host_memory_bytes == 64 << 20
    for size, words in {"63MiB": "too small", "much": "cannot read a size"}.items():
        with pytest.raises(UsageError, match=words):
            LoadOptions(host_memory=size).check()


def test_adapters_have_weights() -> None:
    assert weighted(None) == []
    assert weighted("folder") == [("folder", 1.0)]
    assert weighted([("one", 0.5), ("two", 2)]) == [("one", 0.5), ("two", 2.0)]
    for wrong in (3, ["folder"], [("folder", float("nan"))]):
        with pytest.raises(UsageError, match="not an adapter"):
            weighted(wrong)  # pyright: ignore[reportArgumentType]
