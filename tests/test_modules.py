"""The modules of mtj_loader form no import cycles, and no name occurs twice."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mtj_loader

ROOT = Path(mtj_loader.__file__).parent
SPECIAL = {"__init__", "__main__"}


def modules() -> dict[str, Path]:
    """Module name → its file. The package root is left out: it imports its public names lazily."""
    paths = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
    parts = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path in paths}
    return {".".join(names).removesuffix(".__init__"): path for path, names in parts.items()}


def imports(source: str, known: set[str]) -> Iterator[str]:
    """Modules of mtj_loader that a source imports anywhere: lazily and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names if alias.name in known)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                targets = (f"{module}.{alias.name}" for alias in names)
                found = {target if target in known else module for target in targets}
                yield from found & known
            case ast.ImportFrom():
                pytest.fail("a relative import")


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_modules_form_no_cycle() -> None:
    files = modules()
    known = set(files)
    graph = {name: set(imports(path.read_text(), known)) for name, path in files.items()}
    assert sum(map(len, graph.values())) > len(graph)  # the imports were found
    assert find_cycle(graph) is None


def test_no_module_name_occurs_twice() -> None:
    names = [path.stem for path in ROOT.rglob("*.py") if path.stem not in SPECIAL]
    names += [path.parent.name for path in ROOT.rglob("__init__.py")]
    assert {name: count for name, count in Counter(names).items() if count > 1} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import p.a",
        "from p import a",
        "from p.a import x",
        "def f():\n    from p.a import x",
        "if TYPE_CHECKING:\n    from p.a import x",
    ],
)
def test_every_kind_of_import_counts(source: str) -> None:
    found = set(imports(source, {"p.a", "p.b"}))
    assert found == {"p.a"}
    assert find_cycle({"p.a": {"p.b"}, "p.b": found}) is not None
