"""What a load did, for people and for programs."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass

from mtj_loader.display import show_bytes
from mtj_loader.loading.changes import dtype_changes
from mtj_loader.loading.plan import LoadPlan
from mtj_loader.loading.stream import Tally


@dataclass(frozen=True)
class LoadReport:
    """A finished load; all sizes in bytes, all times in seconds.

    Attributes:
      bytes_needed: weights that this host's devices hold, each byte once, as the files have them.
      bytes_read: weights that were read.
      seconds: `plan`, `load` (from the first read to the last device), and inside it `read` and
        `transform`, summed over the threads, and `device`, the hand-over.
      threads: how many read at once.
      parameters: number of arrays.
      device_bytes: parameters on each device.
      peak_host_bytes: the most memory that this process ever held, parameters on CPU devices
        included.
      dtype_changes: "F32 → bfloat16" and how many tensors.
      finite: True or False if `check_finite` looked, None if nobody did.
      warnings: what was noticed and is no error.
      skipped: how many tensors the map names as not needed.
    """

    bytes_needed: int
    bytes_read: int
    seconds: dict[str, float]
    threads: int
    parameters: int
    device_bytes: int
    peak_host_bytes: int
    dtype_changes: dict[str, int]
    finite: bool | None
    warnings: tuple[str, ...]
    skipped: int

    def to_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        return {**asdict(self), "warnings": list(self.warnings)}

    def __str__(self) -> str:
        """The report in a line."""
        seconds = self.seconds["load"]
        rate = self.bytes_read / seconds if seconds else 0.0
        return (
            f"{self.parameters} parameters, {show_bytes(self.bytes_read)} read in {seconds:.2f} s "
            f"({show_bytes(rate)}/s), {show_bytes(self.device_bytes)} on each device, "
            f"peak host memory {show_bytes(self.peak_host_bytes)}"
        )


def make_report(
    plan: LoadPlan, host: int, tally: Tally, seconds: dict[str, float], threads: int
) -> LoadReport:
    """Puts together what the plan promised and what the threads counted."""
    seconds = seconds | {"read": tally.read_seconds, "transform": tally.transform_seconds}
    return LoadReport(
        bytes_needed=plan.host_bytes(host),
        bytes_read=tally.bytes_read,
        seconds=seconds,
        threads=threads,
        parameters=len(plan.params),
        device_bytes=plan.device_bytes,
        peak_host_bytes=peak_host_bytes(),
        dtype_changes=dtype_changes(plan.params),
        finite=not tally.nonfinite if plan.options.check_finite else None,
        warnings=plan.warnings,
        skipped=len(plan.skipped),
    )


def peak_host_bytes() -> int:
    """The most resident memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
