"""How much memory this process can still have, and what bounds it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
# Files of a memory cgroup, version 2 and version 1: the limit, what is used, and of that the page
# cache, which the kernel gives back when memory is short.
_CGROUP_2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_CGROUP_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


def available() -> Iterator[tuple[str, int]]:
    """What bounds this process's memory, and the bytes that it leaves; nothing where unknown."""
    meminfo = _table(_PROC / "meminfo")
    swap = meminfo.get("SwapFree:", 0) << 10  # in KiB
    if "MemAvailable:" in meminfo:
        yield "what the machine has free", (meminfo["MemAvailable:"] << 10) + swap
    for free in _cgroup_free():
        yield "the limit of this container (cgroup)", max(free, 0) + swap
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _words(_PROC / "self/statm")
    if limit != resource.RLIM_INFINITY and pages:
        used = int(pages[0]) * resource.getpagesize()
        yield "the limit of its address space (ulimit -v)", max(limit - used, 0)


def _cgroup_free() -> Iterator[int]:
    """Free bytes of each memory cgroup that this process is in, up to the root."""
    for line in _lines(_PROC / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUP, _CGROUP_2
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", _CGROUP_1
        else:
            continue
        below = PurePosixPath(path).relative_to("/")
        for folder in (below, *below.parents):
            yield from _free(root / folder, *names)


def _free(folder: Path, limit: str, used: str, cached: tuple[str, str]) -> Iterator[int]:
    """Limit less use, where there is a limit."""
    most, now = _words(folder / limit), _words(folder / used)
    if most and now and most[0] != "max":
        stat = _table(folder / "memory.stat")
        yield int(most[0]) - int(now[0]) + sum(stat.get(name, 0) for name in cached)


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """A file's lines; none where there is no such file: other systems have no /proc."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
