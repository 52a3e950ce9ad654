"""This process's memory: how much more it can have, and when garbage is collected."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
# Files of a memory cgroup, version 2 and version 1: the limit, the usage, and the part of the usage
# that is page cache, which the kernel frees when memory is short.
_CGROUP_2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_CGROUP_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disables garbage collection, for code that creates many long-lived objects and no cycles.

    A collection would traverse all of JAX's objects while every thread waits: 60 to 130 ms.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def available() -> Iterator[tuple[str, int]]:
    """Each known limit on this process's memory, and the bytes left within it."""
    meminfo = _table(_PROC / "meminfo")
    swap = meminfo.get("SwapFree:", 0) << 10  # in KiB
    if "MemAvailable:" in meminfo:
        yield "the machine's free memory", (meminfo["MemAvailable:"] << 10) + swap
    for free in _cgroup_free():
        yield "the container's limit (cgroup)", max(free, 0) + swap
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _words(_PROC / "self/statm")
    if limit != resource.RLIM_INFINITY and pages:
        used = int(pages[0]) * resource.getpagesize()
        yield "the limit of the address space (ulimit -v)", max(limit - used, 0)


def _cgroup_free() -> Iterator[int]:
    """Free bytes of each memory cgroup that contains this process, up to the root."""
    for line in _lines(_PROC / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUP, _CGROUP_2
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", _CGROUP_1
        else:
            continue
        relative = PurePosixPath(path).relative_to("/")
        for folder in (relative, *relative.parents):
            yield from _free(root / folder, *names)


def _free(folder: Path, limit: str, used: str, cached: tuple[str, str]) -> Iterator[int]:
    """The limit less the usage, if there is a limit."""
    limits, usages = _words(folder / limit), _words(folder / used)
    if limits and usages and limits[0] != "max":
        stat = _table(folder / "memory.stat")
        yield int(limits[0]) - int(usages[0]) + sum(stat.get(name, 0) for name in cached)


def _table(path: Path) -> dict[str, int]:
    """Lines with a name and a number."""
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """A file's lines; none if there is no such file, because other systems have no /proc."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
