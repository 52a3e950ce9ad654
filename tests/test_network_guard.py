"""The guard of conftest.py: tests may connect to this machine only."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "example.com"])  # 192.0.2.1: RFC 5737, is not routed
def test_connection_to_another_machine_is_refused(host: str):
    with pytest.raises(AssertionError, match=f"must not use the network: .*{host}"):
        socket.create_connection((host, 80), timeout=1)


def test_datagram_to_another_machine_is_refused():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        pytest.raises(AssertionError, match="must not use the network"),
    ):
        sender.sendto(b"", ("192.0.2.1", 9))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_connection_to_this_machine_works(host: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
