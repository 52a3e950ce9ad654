"""The environment of every test: eight virtual CPU devices, and no network except this machine."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

# Set before JAX is imported; subprocesses of tests inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # subprocesses must not change the user's cache
# Tests mostly compile tiny programs and run each once or twice. All flags but the first make
# compilation three to four times faster, and the programs slower.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones end the process at this flag
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)

import jax
import pytest
from hypothesis import settings

# Workers share compiled programs and keep them for the next run; `make clean` removes them.
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tests of signals must pass even if the parent process ignores them (nohup, a background job).
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No deadline: the first example of a property includes imports and compilation.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")

_LOCAL_HOSTS = {None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1"}


def _refuse_network(event: str, args: tuple) -> None:
    """Audit hook: Python raises these events before it resolves a name or sends a packet."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in {"socket.connect", "socket.sendto"}:
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # else a path
    else:
        return
    if host not in _LOCAL_HOSTS:
        raise AssertionError(f"tests must not use the network: {event} {host!r}")


sys.addaudithook(_refuse_network)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests of several hosts first: they mostly wait, so other workers can use the cores."""
    items.sort(key=lambda item: item.path.name != "test_hosts.py")
