"""Makes one variant, loads it, and says what became of it."""

from __future__ import annotations

import resource
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from mtj_loader.errors import MemoryLimitError, MtjLoaderError
from tests.fuzz.targets import TARGETS

_MAX_GROWTH_KB = 1 << 20  # the inputs are a few kilobytes


@dataclass(frozen=True)
class Outcome:
    """What became of a variant.

    Attributes:
      kind: "refused" (one of our errors), "loaded" (and right), or "failed".
      detail: the error's name, or the traceback of a failure.
    """

    kind: str
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        """As JSON types."""
        return asdict(self)


def run_variant(target: str, seed: int, number: int) -> Outcome:
    """Runs one variant; the same arguments always make the same one."""
    before = _peak_kb()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        outcome = _run(target, Random(f"{target} {seed} {number}"), Path(scratch))
    growth = _peak_kb() - before
    if growth > _MAX_GROWTH_KB:
        return Outcome("failed", f"memory grew by {growth:,} kB")
    return outcome


def _run(name: str, random: Random, folder: Path) -> Outcome:
    target = TARGETS[name]
    expected = target.change(folder, random)
    try:
        target.check(folder, expected, target.load(folder, expected))
    except MemoryLimitError:  # these inputs are small
        return Outcome("failed", traceback.format_exc())
    except MtjLoaderError as error:
        return Outcome("refused", type(error).__name__)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - panics of libraries are BaseExceptions
        return Outcome("failed", traceback.format_exc())
    return Outcome("loaded")


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
