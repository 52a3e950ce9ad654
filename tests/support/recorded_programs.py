"""The programs of an engine, with a record of what is started and traced."""

from __future__ import annotations

from collections.abc import Callable

from mtj_loader.engine.engine_programs import Program, Programs
from mtj_loader.engine.keys import Key
from mtj_loader.engine.sizes import Sizes


class RecordedPrograms(Programs):
    """Programs that note what an engine does with them.

    Attributes:
      started: the program of every start, in order.
      traced: the sizes and program of every trace.
      replace: returns what runs instead of a program.
    """

    def __init__(self, forward: object, params: object) -> None:
        super().__init__(forward, params)  # pyright: ignore[reportArgumentType]
        self.started: list[Key] = []
        self.traced: list[tuple[Sizes, Key]] = []
        self.replace: Callable[[Key, Program], Program] = lambda _, program: program

    def get(self, sizes: Sizes, key: Key) -> Program:
        self.started.append(key)
        return self.replace(key, super().get(sizes, key))

    def lower(self, sizes: Sizes, key: Key):
        self.traced.append((sizes, key))
        return super().lower(sizes, key)

    def count(self, kind: str) -> int:
        """How many programs of a kind were started."""
        return sum(key.kind == kind for key in self.started)
