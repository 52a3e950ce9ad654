"""The options of a load: defined once, and known to Python, to type checkers and to commands."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest

import mtj_loader
from mtj_loader.cli.shared_options import option_hints
from mtj_loader.errors import MeshError, UsageError
from mtj_loader.options import Keywords, LoadOptions, Source, descriptions, weighted
from tests.support import neox

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


def test_convert_has_the_options_of_a_source() -> None:
    parameters = inspect.signature(mtj_loader.convert).parameters
    assert {f.name for f in fields(Source)} <= parameters.keys()
    assert not parameters.keys() & {"transposed_linear", "keywords"}
    for name in ("path", "stream"):
        assert f"\n  {name}: {descriptions()[name][:20]}" in (
            inspect.getdoc(mtj_loader.convert) or ""
        )


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


@pytest.mark.parametrize("name", OPTIONS)
def test_a_plan_is_not_combined_with_options_of_its_own(tmp_path: Path, name: str) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2")
    with pytest.raises(UsageError, match="a plan has these options already") as error:
        mtj_loader.load(plan=plan, **{name: OPTIONS[name].default})
    assert error.value.key == name
    assert error.value.hint == "pass them to mtj_loader.plan instead"


def test_a_plan_is_combined_with_what_it_does_not_contain(tmp_path: Path) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2", dtype="float32")
    more = {"progress": False, "host_timeout": 9.0, "warm_up": [], "compilation_cache": False}
    for mesh in ("mp=2", mtj_loader.make_mesh("mp=2"), mtj_loader.make_abstract_mesh("mp=2")):
        assert mtj_loader.load(plan=plan, mesh=mesh, **more).plan is plan


@pytest.mark.parametrize(
    ("mesh", "found"),
    [
        ("mp=1", "dp=1, mp=1"),
        ("mp=16", "dp=1, mp=16"),  # more devices than there are
        (mtj_loader.make_abstract_mesh("dp=2,mp=2"), "dp=2, mp=2"),
    ],
)
def test_a_plan_is_not_loaded_on_another_mesh(tmp_path: Path, mesh, found: str) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2")
    with pytest.raises(MeshError, match="the plan is for another mesh") as error:
        mtj_loader.load(plan=plan, mesh=mesh)
    assert (str(error.value.expected), str(error.value.found)) == ("dp=1, mp=2", found)
