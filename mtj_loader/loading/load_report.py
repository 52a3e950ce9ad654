"""The report of a load, as text for people and JSON types for programs."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass, replace

from mtj_loader.display import counted, show_bytes
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.loading.stream import ReadStats
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import dtype_changes


@dataclass(frozen=True)
class HostTotals:
    """The report of one of several hosts, in short; see `LoadReport` for the fields."""

    host: int
    bytes_needed: int
    bytes_read: int
    seconds: float
    peak_host_bytes: int


@dataclass(frozen=True)
class LoadReport:
    """A completed load; sizes in bytes, times in seconds.

    Attributes:
      bytes_needed: bytes in the files that this host has to read, each byte once.
      bytes_read: bytes that it read.
      bytes_received: bytes that its devices hold and other hosts read.
      seconds: `plan`; `load`, from the first read to the last device; as parts of it `read` and
        `transform`, summed over the threads, `device`, the transfer to the devices, and
        `exchange`, from the last read to the last byte from other hosts, including waiting;
        `compile`, compiling or reading the programs for `warm_up`, and `overlap`, the part of it
        during the load.
        The first generation adds `first_token`, the time from the call of `load` to its first
        token.
      threads: the number of reading threads.
      parameters: the number of arrays.
      device_bytes: bytes of parameters on each device.
      peak_host_bytes: the peak memory of this process, including Python, JAX, and parameters on CPU
        devices.
      dtype_changes: how many parameters change their dtype, by "from → to".
      finite: whether all weights are finite; None without `check_finite`.
      warnings: problems that are not errors.
      skipped: the number of tensors that the map lists as unneeded.
      compilation_cache: the folder in which JAX keeps all programs that this process compiles; None
        if it keeps none.
      programs_read: the number of stored programs that are read instead of compiled.
      programs_folder: where they are; None if there are none.
      programs_unused: why stored programs are not used; None if they are, or there are none.
      ignored_settings: keys of config.json that nothing reads.
      hosts: the totals of each host if there are several; equal on all hosts.
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
    compilation_cache: str | None = None
    programs_read: int = 0
    programs_folder: str | None = None
    programs_unused: str | None = None
    ignored_settings: tuple[str, ...] = ()
    hosts: tuple[HostTotals, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        lists = {
            "warnings": list(self.warnings),
            "ignored_settings": list(self.ignored_settings),
            "hosts": [asdict(host) for host in self.hosts],
        }
        return asdict(self) | lists

    def __repr__(self) -> str:
        return f"<LoadReport: {self}>"

    def __str__(self) -> str:
        """The report in one line, plus one about compilation and one about several hosts."""
        seconds = self.seconds["load"]
        rate = self.bytes_read / seconds if seconds else 0.0
        lines = [self.start_up] if self.seconds["compile"] else []
        lines += [self._totals] if self.hosts else []
        load = (
            f"{self.parameters} parameters, {show_bytes(self.bytes_read)} read in {seconds:.2f} s "
            f"({show_bytes(rate)}/s), {show_bytes(self.device_bytes)} on each device, "
            f"peak host memory {show_bytes(self.peak_host_bytes)} with Python and JAX"
        )
        if self.compilation_cache is not None:
            load += f", compiled programs in {self.compilation_cache}"
        if self.programs_folder is not None:
            read = counted(self.programs_read, "program")
            lines.insert(0, f"{read} read from {self.programs_folder}")
        return "\n".join([load, *lines])

    @property
    def _totals(self) -> str:
        """The sum over several hosts, in one line."""
        read = sum(host.bytes_read for host in self.hosts)
        slowest = max(host.seconds for host in self.hosts)
        total = f"{len(self.hosts)} hosts: {show_bytes(read)} read in total, the slowest"
        return f"{total} took {slowest:.2f} s; the line above is for host 0"

    @property
    def start_up(self) -> str:
        """The time until the first token, in one line."""
        load, compiled, overlap = (self.seconds[key] for key in ("load", "compile", "overlap"))
        text = f"load {load:.2f} s, compile {compiled:.2f} s, overlapping for {overlap:.2f} s"
        first = self.seconds.get("first_token")
        return text if first is None else f"{text}; first token after {first:.2f} s"


def make_report(
    plan: LoadPlan, host: int, stats: ReadStats, seconds: dict[str, float], threads: int
) -> LoadReport:
    """Combines what was planned with what was measured."""
    seconds = seconds | {"read": stats.read_seconds, "transform": stats.transform_seconds}
    seconds |= {"compile": 0.0, "overlap": 0.0}
    return LoadReport(
        bytes_needed=plan.host_bytes(host),
        bytes_read=stats.bytes_read,
        bytes_received=plan.received_bytes(host),
        seconds=seconds,
        threads=threads,
        parameters=len(plan.params),
        device_bytes=plan.device_bytes,
        peak_host_bytes=peak_host_bytes(),
        dtype_changes=dtype_changes(plan.params),
        finite=not stats.nonfinite if plan.options.check_finite else None,
        warnings=plan.warnings,
        skipped=len(plan.skipped),
        ignored_settings=plan.config.ignored_settings,
    )


def with_totals(report: LoadReport, hosts: Hosts) -> LoadReport:
    """Adds the totals of every host.

    Raises:
      HostError: another host failed.
    """
    if hosts.count == 1:
        return report
    own = HostTotals(
        hosts.index,
        report.bytes_needed,
        report.bytes_read,
        report.seconds["load"],
        report.peak_host_bytes,
    )
    totals = hosts.gather("totals", json.dumps(asdict(own)).encode())
    return replace(report, hosts=tuple(HostTotals(**json.loads(one)) for one in totals))


def peak_host_bytes() -> int:
    """The peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB on Linux
