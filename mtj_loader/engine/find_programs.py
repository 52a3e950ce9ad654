"""Finding the stored programs that an engine can use instead of compiling its own.

They are in the user's cache, or in a folder that the user names; never in a checkpoint's folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike

from mtj_loader.engine.compile_ahead import CompiledPrograms
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.keys import Key, all_keys
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import ProgramError
from mtj_loader.loading.load_report import LoadReport
from mtj_loader.models.forward import Forward
from mtj_loader.programs import (
    ProgramFacts,
    StoredPrograms,
    default_programs_folder,
    differences,
    open_programs,
)

_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class FoundPrograms:
    """The stored programs of an engine, or why there are none.

    Attributes:
      sizes: of the engine.
      stored: its programs; None if there are none.
      unused: why stored programs are not used; None if none are stored, or they are used.
    """

    sizes: Sizes
    stored: StoredPrograms | None = None
    unused: str | None = None

    def keys_to_read(self, programs: Programs, needed: Sequence[Key]) -> tuple[Key, ...]:
        """What to read or compile during the load: what is needed, or else all that is stored.

        Args:
          programs: of the engine; they read what is stored from now on.
          needed: by requests that are known.
        """
        if self.stored is not None:
            programs.use_stored(self.sizes, self.stored)
        stored = (key for key in all_keys(self.sizes) if programs.is_stored(self.sizes, key))
        return tuple(needed or stored)

    def add_to(
        self, report: LoadReport, programs: Programs, compiled: CompiledPrograms
    ) -> LoadReport:
        """Adds how many programs were read, and why others were not."""
        keys = [key for key in compiled.keys if programs.is_stored(self.sizes, key)]
        reasons = [] if self.unused is None else [self.unused]
        reasons += [f"program {key} is compiled: {why}" for key, why in programs.unreadable.items()]
        return replace(
            report,
            programs_read=sum(key not in programs.unreadable for key in keys),
            programs_folder=None if self.stored is None else str(self.stored.folder),
            programs_unused=self.unused,
            warnings=(*report.warnings, *reasons),
        )


def collect_facts(forward: Forward, sizes: Sizes) -> ProgramFacts:
    """What the programs of an engine depend on."""
    return ProgramFacts.collect(
        forward.config,
        forward.mesh,
        dtype=forward.dtype,
        slots=sizes.total_slots,
        context=sizes.context,
        transposed_linear=forward.transposed_linear,
    )


def find_programs(
    forward: Forward,
    sizes: Sizes,
    has_room: Callable[[Sizes], bool],
    folder: str | PathLike[str] | None = None,
) -> FoundPrograms:
    """Finds stored programs.

    Args:
      forward: the model.
      sizes: of the engine if there are none.
      has_room: whether the engine may have other sizes, for which programs are stored.
      folder: that the user has named; None for the user's cache.

    Raises:
      UsageError: the folder is a URL.
      ProgramError: the named folder has no programs, or others may write to it.
    """
    if folder is not None:
        return _choose(forward, sizes, has_room, open_programs(folder))
    try:
        return _find_in_cache(forward, sizes, has_room)
    except ProgramError as error:
        return FoundPrograms(sizes, unused=str(error))
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return FoundPrograms(sizes)


def _find_in_cache(
    forward: Forward, sizes: Sizes, has_room: Callable[[Sizes], bool]
) -> FoundPrograms:
    """The smallest programs with enough room."""
    facts = collect_facts(forward, sizes)
    folders = [path for path in default_programs_folder(facts).parent.iterdir() if path.is_dir()]
    known = [(found, path) for path in folders if (found := _sizes_of(path.name, sizes.groups))]
    usable = [(found, path) for found, path in known if found == sizes or has_room(found)]
    if not usable:
        stored = ", ".join(sorted(path.name for _, path in known))
        return FoundPrograms(sizes, unused=_describe(stored) if stored else None)
    _, smallest = min(usable, key=lambda one: (one[0].total_slots * one[0].context, one[1].name))
    return _choose(forward, sizes, has_room, open_programs(smallest))


def _choose(
    forward: Forward, sizes: Sizes, has_room: Callable[[Sizes], bool], stored: StoredPrograms
) -> FoundPrograms:
    """The programs of a folder, if they were compiled for what is here."""
    name = "x".join(stored.facts.sizes)
    found = _sizes_of(name, sizes.groups)
    fits = found is not None and (found == sizes or has_room(found))
    wanted = found if found is not None and fits else sizes
    facts = collect_facts(forward, sizes).with_sizes(wanted.total_slots, wanted.context)
    reasons = differences(stored.facts.with_sizes(wanted.total_slots, wanted.context), facts)
    if not fits:
        reasons.append(_describe(name))
    if reasons:
        why = f"the compiled programs in {stored.folder} are not used: {'; '.join(reasons)}"
        return FoundPrograms(sizes, unused=why)
    return FoundPrograms(wanted, stored)


def _sizes_of(name: str, groups: int) -> Sizes | None:
    """The sizes that a text such as "16x2048" states; None if there are no such sizes."""
    slots, _, context = name.partition("x")
    if not (_NUMBER.fullmatch(slots) and _NUMBER.fullmatch(context)) or int(slots) % groups:
        return None
    return Sizes(groups, int(slots) // groups, int(context))


def _describe(stored: str) -> str:
    return f"compiled for {stored} (slots x tokens), not for the given sizes and requests"
