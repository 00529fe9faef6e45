"""The public port is found without a race, and only an explicit one can be taken."""

from __future__ import annotations

import pytest

from moonlang.base.errors import ConfigError
from moonlang.cluster import network


def test_the_next_free_port_is_taken() -> None:
    first = network.public_socket("127.0.0.1", None)
    second = network.public_socket("127.0.0.1", None)
    with first, second:
        ports = [one.getsockname()[1] for one in (first, second)]
    assert ports[0] != ports[1]
    assert all(network.FIRST_PORT <= port <= network.LAST_PORT for port in ports)


def test_a_port_that_was_asked_for_must_be_free() -> None:
    with network.public_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            network.public_socket("127.0.0.1", port)


def test_addresses() -> None:
    assert network.own_address("localhost") in ("127.0.0.1", "::1")
    assert network.own_address("10.1.2.3") == "10.1.2.3"
    assert network.address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert network.own_address("0.0.0.0") != "0.0.0.0"
    assert network.is_loopback("127.0.0.1")
    assert not network.is_loopback("10.1.2.3")
    with pytest.raises(ConfigError, match="--host"):
        network.own_address("no.such.host.invalid")
