"""Compiling all programs of an engine, and storing them for later processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.find_programs import collect_facts
from mtj_loader.engine.keys import all_keys
from mtj_loader.engine.sizes import Sizes
from mtj_loader.models.forward import Forward, Tree
from mtj_loader.programs import (
    CompiledProgram,
    compile_all,
    default_programs_folder,
    open_programs,
    prepare_folder,
    save_programs,
)


@dataclass(frozen=True)
class StoredEngine:
    """The programs of an engine in a folder.

    Attributes:
      folder: where they are.
      sizes: of the engine.
      seconds: for all of them, tracing and saving included.
      compile_seconds: that XLA took for each program, by name.
      bytes: of each program's file.
    """

    folder: Path
    sizes: Sizes
    seconds: float
    compile_seconds: dict[str, float]
    bytes: dict[str, int]


def store_programs(
    forward: Forward,
    params: Tree,
    sizes: Sizes,
    folder: Path | None = None,
    done: Callable[[str, float], None] = lambda _name, _seconds: None,
) -> StoredEngine:
    """Compiles every program that an engine of these sizes can need, and stores them.

    Args:
      forward: the model, on devices that need not exist.
      params: shapes, dtypes and shardings of its parameters.
      sizes: of the engine.
      folder: where to store them; by default the user's cache.
      done: gets the name and the seconds of each program when XLA has compiled it.

    Raises:
      ProgramError: the folder holds anything but programs, or others may write to it.
      StorageError: writing failed.
    """
    start = time.perf_counter()
    facts = collect_facts(forward, sizes)
    folder = default_programs_folder(facts) if folder is None else folder
    prepare_folder(folder)
    programs, keys = Programs(forward, params), all_keys(sizes)
    seconds: dict[str, float] = {}

    def note(name: str, taken: float) -> None:
        seconds[name] = taken
        done(name, taken)

    compiled = compile_all({str(key): partial(programs.lower, sizes, key) for key in keys}, note)
    signatures = {str(key): programs.signature(sizes, key) for key in keys}
    saved = {name: CompiledProgram(compiled[name], signatures[name]) for name in compiled}
    save_programs(folder, saved, facts)
    records = open_programs(folder).records
    return StoredEngine(
        folder,
        sizes,
        time.perf_counter() - start,
        {name: seconds[name] for name in compiled},
        {name: records[name].size_bytes for name in compiled},
    )
