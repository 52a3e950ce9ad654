"""The instruction sets of this machine's processor.

XLA compiles for the processor it runs on. When it loads a program for a processor with other
features, it only logs an error, and the program may end the process with SIGILL. So the features
are compared before a program is loaded.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPU_FEATURES = "cpu_features"  # the key among the facts

_CPU_INFO = Path("/proc/cpuinfo")
_FEATURE_LINES = ("flags", "features")  # on x86, on ARM


@cache
def cpu_features() -> str:
    """The architecture and the features, sorted, separated by spaces; "" if they are unknown.

    Only Linux is supported: the kernel lists the features of each processor.
    """
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    found = [set(v.split()) for k, _, v in fields if k.strip().lower() in _FEATURE_LINES]
    if not found:
        return ""
    # A thread may run on any processor, so a feature counts if all have it.
    return " ".join([platform.machine(), *sorted(set.intersection(*found))])
