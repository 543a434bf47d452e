"""The checks before the start. Those of keys and versions are in test_command.py and test_app.py."""

from __future__ import annotations

import socket

import pytest

from serve.config import InvalidInput, ServeConfig
from serve.preflight import check_port, check_resources


def test_a_taken_port_is_refused_on_every_address_it_is_taken_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(InvalidInput, match=f"port {port} on {host} is taken"):
                check_port(host, port)
    check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidInput, match="cannot listen on port 8000 of 192"):
        check_port("192.0.2.1", 8000)


def test_replicas_that_would_never_start_are_refused() -> None:
    config = ServeConfig(store="s", replicas=2)
    check_resources(config, 1, {"CPU": 2.0})
    with pytest.raises(InvalidInput, match="need 4 CPUs in all, and this machine has 2"):
        check_resources(config, 2, {"CPU": 2.0})
    with pytest.raises(InvalidInput, match="lower --gpus-per-replica"):
        check_resources(ServeConfig(store="s", gpus_per_replica=1), 1, {"CPU": 2.0})
