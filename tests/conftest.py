"""What holds for every test: eight virtual CPU devices, and no network beyond this machine."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from hypothesis import settings

# Before JAX starts; subprocesses of tests inherit both.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling tiny programs, each run once or twice: optimizing them less
# saves a third of it.
_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # not into the cache of who runs the tests

# A parent that ignores Ctrl-C (nohup, a job in the background) must not change what tests of it see.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first example of a property pays for imports and compilation.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")

_LOCAL_HOSTS = {None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1"}


def _refuse_network(event: str, args: tuple) -> None:
    """Audit hook: Python raises these events before it resolves a name or sends a packet."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in {"socket.connect", "socket.sendto"}:
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket's is a path
    else:
        return
    if host not in _LOCAL_HOSTS:
        raise AssertionError(f"a test may not reach the network: {event} {host!r}")


sys.addaudithook(_refuse_network)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of hosts come first: they mostly wait, and the others use the time."""
    items.sort(key=lambda item: item.path.name != "test_hosts.py")
