"""What a load did, for people and for programs."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass, replace

from mtj_loader.display import show_bytes
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.loading.stream import ReadStats
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import dtype_changes


@dataclass(frozen=True)
class HostTotals:
    """What one of several hosts did; see LoadReport for the fields."""

    host: int
    bytes_needed: int
    bytes_read: int
    seconds: float
    peak_host_bytes: int


@dataclass(frozen=True)
class LoadReport:
    """A finished load; all sizes in bytes, all times in seconds.

    Attributes:
      bytes_needed: weights that this host has to read, each byte once, as the files have them.
      bytes_read: weights that were read.
      bytes_received: weights that its devices hold and other hosts read.
      seconds: `plan`, `load` (from the first read to the last device), and inside it `read` and
        `transform`, summed over the threads, `device`, the hand-over, and `exchange`, from the
        last read to the last byte of other hosts, waiting included. `compile` is what
        `warm_up` took, and `overlap` the part of it during the load. `first_token` is added with
        the first token that is made: how long after the call of `load`.
      threads: how many read at once.
      parameters: number of arrays.
      device_bytes: parameters on each device.
      peak_host_bytes: the most memory that this process ever held, parameters on CPU devices
        included.
      dtype_changes: "F32 → bfloat16" and how many tensors.
      finite: True or False if `check_finite` looked, None if nobody did.
      warnings: what was noticed and is no error.
      skipped: how many tensors the map names as not needed.
      hosts: what each host did, where there are several; the same on all.
    """

    bytes_needed: int
    bytes_read: int
    bytes_received: int
    seconds: dict[str, float]
    threads: int
    parameters: int
    device_bytes: int
    peak_host_bytes: int
    dtype_changes: dict[str, int]
    finite: bool | None
    warnings: tuple[str, ...]
    skipped: int
    hosts: tuple[HostTotals, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        lists = {"warnings": list(self.warnings), "hosts": [asdict(host) for host in self.hosts]}
        return asdict(self) | lists

    def __str__(self) -> str:
        """The report in a line, and one more where something was compiled."""
        seconds = self.seconds["load"]
        rate = self.bytes_read / seconds if seconds else 0.0
        compiled = f"\n{self.start_up}" if self.seconds["compile"] else ""
        return (
            f"{self.parameters} parameters, {show_bytes(self.bytes_read)} read in {seconds:.2f} s "
            f"({show_bytes(rate)}/s), {show_bytes(self.device_bytes)} on each device, "
            f"peak host memory {show_bytes(self.peak_host_bytes)}{compiled}"
            f"{self._of_hosts}"
        )

    @property
    def _of_hosts(self) -> str:
        """Another line where there are several hosts: their sum."""
        if not self.hosts:
            return ""
        read = sum(host.bytes_read for host in self.hosts)
        slowest = max(host.seconds for host in self.hosts)
        words = f"{len(self.hosts)} hosts: {show_bytes(read)} read in all, the slowest"
        return f"\n{words} took {slowest:.2f} s; the line above is for host 0"

    @property
    def start_up(self) -> str:
        """What was waited for until there was text, in a line."""
        load, compiled, both = (self.seconds[key] for key in ("load", "compile", "overlap"))
        words = f"load {load:.2f} s, compile {compiled:.2f} s, both at once {both:.2f} s"
        first = self.seconds.get("first_token")
        return words if first is None else f"{words}; first token after {first:.2f} s"


def make_report(
    plan: LoadPlan, host: int, tally: ReadStats, seconds: dict[str, float], threads: int
) -> LoadReport:
    """Puts together what the plan promised and what the threads counted."""
    seconds = seconds | {"read": tally.read_seconds, "transform": tally.transform_seconds}
    seconds |= {"compile": 0.0, "overlap": 0.0}
    return LoadReport(
        bytes_needed=plan.host_bytes(host),
        bytes_read=tally.bytes_read,
        bytes_received=plan.received_bytes(host),
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


def with_totals(report: LoadReport, hosts: Hosts) -> LoadReport:
    """The report with what every host did.

    Raises:
      HostError: another host failed.
    """
    if hosts.count == 1:
        return report
    mine = HostTotals(
        hosts.index,
        report.bytes_needed,
        report.bytes_read,
        report.seconds["load"],
        report.peak_host_bytes,
    )
    totals = hosts.gather("totals", json.dumps(asdict(mine)).encode())
    return replace(report, hosts=tuple(HostTotals(**json.loads(one)) for one in totals))


def peak_host_bytes() -> int:
    """The most resident memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
