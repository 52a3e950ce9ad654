"""Which requests bring the byte runs that are needed: joined where near, cut where long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_WASTE = 50  # one byte in so many may lie in a gap between runs: 2 %

Run = tuple[str, int, int]  # file, first byte, byte after the last


@dataclass(frozen=True)
class Range:
    """One request for bytes [start, stop) of a file.

    Attributes:
      file: see `Run`.
      start: see `Run`.
      stop: see `Run`.
      parts: the needed bytes in it: first byte, byte after the last, and where its run ends.
    """

    file: str
    start: int
    stop: int
    parts: tuple[tuple[int, int, int], ...]

    @property
    def needed_bytes(self) -> int:
        """Without the gaps."""
        return sum(stop - start for start, stop, _ in self.parts)


def merged(runs: Iterable[Run], most_bytes: int) -> Iterator[Range]:
    """Joins runs that follow each other in a file, and cuts what is too long.

    Runs keep their order; of each range at most one byte in `_WASTE` lies in gaps.

    Args:
      runs: in the order of their use.
      most_bytes: of a range.
    """
    growing = None
    for file, first, stop in runs:
        start = first
        while start < stop:
            if growing is None or not growing.takes(file, start, stop):
                if growing is not None:
                    yield growing.range()
                growing = _Growing(file, start, start + most_bytes)
            start = growing.add(start, stop)
    if growing is not None:
        yield growing.range()


@dataclass
class _Growing:
    """A range that is being put together, and the last byte it may have."""

    file: str
    start: int
    limit: int
    needed_bytes: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def takes(self, file: str, start: int, stop: int) -> bool:
        """Whether it can go on with a run: no step back, not too long, little waste."""
        end = min(stop, self.limit)
        if file != self.file or start < self.parts[-1][1] or start >= end:
            return False
        needed = self.needed_bytes + end - start
        return (end - self.start - needed) * _WASTE <= needed

    def add(self, start: int, stop: int) -> int:
        """Goes on with as much of a run as it holds; returns where that ends."""
        end = min(stop, self.limit)
        self.parts.append((start, end, stop))
        self.needed_bytes += end - start
        return end

    def range(self) -> Range:
        """What it has become."""
        return Range(self.file, self.start, self.parts[-1][1], tuple(self.parts))
