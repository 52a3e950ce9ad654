"""Why a load ends on all hosts: written down by the first to notice, read by the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mtj_loader.errors import INTERRUPTED, UNEXPECTED, HostError, MachineError, MtjLoaderError


@dataclass(frozen=True)
class Failure:
    """What happened, on which host, and what the command line there exits with."""

    what: str
    host: int
    exit_code: int = MachineError.exit_code

    def error(self) -> HostError:
        """The same, to be raised."""
        return HostError(self.what, host=self.host, exit_code=self.exit_code)

    def pack(self) -> bytes:
        """As bytes, for `unpack`."""
        return json.dumps(asdict(self)).encode()


def unpack(packed: bytes) -> Failure:
    """What `Failure.pack` gave."""
    return Failure(**json.loads(packed))


def of_error(host: int, phase: str, error: BaseException) -> Failure:
    """What the others say of an error on one host."""
    if isinstance(error, MtjLoaderError):
        return Failure(f"host {host} failed in {phase!r}: {error}", host, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure(f"host {host} was interrupted in {phase!r}", host, INTERRUPTED)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else UNEXPECTED
        return Failure(f"host {host} was ended in {phase!r}", host, code)
    code = MachineError.exit_code if isinstance(error, MemoryError) else UNEXPECTED
    what = f"host {host} failed in {phase!r}: {type(error).__name__}: {error}"
    return Failure(what, host, code)


def of_lateness(hosts: Sequence[int], phase: str, seconds: float, waiting: int) -> Failure:
    """What one host says when it waited for others in vain."""
    noun = "host" if len(hosts) == 1 else "hosts"
    names = ", ".join(map(str, hosts))
    what = f"{noun} {names} did not finish {phase!r} within {seconds:g} s of host {waiting}"
    return Failure(what, hosts[0])


def of_silence(host: int, seconds: float) -> Failure:
    """What process 0 says of a host whose heart it does not hear."""
    causes = "its process died or is stopped, or the network is down"
    return Failure(f"host {host} has not been heard of for {seconds:g} s: {causes}", host)
