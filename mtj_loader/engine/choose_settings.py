"""The sizes with which an engine starts, and the stored programs that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from mtj_loader.distributed.hosts import Hosts
from mtj_loader.engine.cache_memory import default_limit
from mtj_loader.engine.compile_ahead import Shape, sizes_for
from mtj_loader.engine.find_programs import FoundPrograms, find_programs
from mtj_loader.engine.runner import EngineSettings
from mtj_loader.engine.sizes import Sizes
from mtj_loader.models.forward import Forward


def choose_settings(
    forward: Forward,
    max_context: int,
    shapes: Sequence[Shape],
    slots: int | None,
    context: int | None,
) -> EngineSettings:
    """The sizes that were asked for, or what the requests turn out to need.

    Args:
      forward: the model.
      max_context: the longest of a request.
      shapes: of the requests that are known.
      slots: of all groups, if given.
      context: tokens of each slot, if given.
    """
    groups = forward.mesh.shape["dp"]
    limit = default_limit(forward, max_context)
    if slots is not None:
        limit = Sizes(groups, -(-slots // groups), limit.context)
    start = Sizes(
        groups, 1 if slots is None else limit.slots, 1 if context is None else limit.context
    )
    return EngineSettings(sizes_for(shapes, start, limit), limit)


def use_stored_programs(
    forward: Forward,
    settings: EngineSettings,
    shapes: Sequence[Shape],
    folder: str | PathLike[str] | None,
    hosts: Hosts,
    *,
    fixed_slots: bool,
    fixed_context: bool,
) -> tuple[EngineSettings, FoundPrograms]:
    """Finds stored programs; an engine that was not given its sizes takes theirs.

    Args:
      forward: the model.
      settings: of the engine without stored programs.
      shapes: of the requests that are known; they must fit.
      folder: that the user has named; None for the user's cache.
      hosts: several hosts compile their own programs.
      fixed_slots: whether the number of slots was given.
      fixed_context: whether the context was given.

    Raises:
      UsageError, ProgramError: see `find_programs`.
    """
    limit = settings.limit

    def has_room(sizes: Sizes) -> bool:
        return (
            (sizes.slots == limit.slots or not fixed_slots)
            and (sizes.context == limit.context or not fixed_context)
            and sizes.context <= limit.context
            and all(_holds(sizes, shape, limit) for shape in shapes)
        )

    if hosts.count > 1:
        why = "compiled programs are not used on several hosts" if folder is not None else None
        return settings, FoundPrograms(settings.sizes, unused=why)
    found = find_programs(forward, settings.sizes, has_room, folder)
    sizes = found.sizes
    most_slots = max(sizes.slots, limit.slots)
    return EngineSettings(sizes, Sizes(sizes.groups, most_slots, limit.context)), found


def _holds(sizes: Sizes, shape: Shape, limit: Sizes) -> bool:
    """Whether an engine runs this batch without growing."""
    batch, longest, new = shape
    slots = min(-(-batch // sizes.groups), limit.slots)
    return slots <= sizes.slots and longest + new <= sizes.context
