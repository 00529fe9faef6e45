"""--kv-events-config: SGLang's names, one port per replica, and clear words for what cannot be."""

from __future__ import annotations

import pytest

from moonlang.base.errors import ConfigError
from moonlang.config.kv_events import KvEventsConfig, of_replica, parse
from moonlang.config.server_args import ServerArgs


def test_nobody_is_told_by_default() -> None:
    assert parse(None) is None
    assert parse("") is None
    assert parse("{}") is None
    assert parse('{"publisher": "null", "endpoint": "tcp://*:1"}') is None


def test_each_replica_has_ports_of_its_own() -> None:
    text = '{"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "ipc:///tmp/x", "topic": "t"}'
    assert of_replica(text, 0) == text
    assert parse(of_replica(text, 2)) == KvEventsConfig(
        publisher="zmq", endpoint="tcp://*:5559", replay_endpoint="ipc:///tmp/x-2", topic="t", dp_rank=2
    )
    assert of_replica(None, 2) is None


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"publisher": "kafka"}', '{"endpont": "tcp://*:1"}', '{"endpoint": "*:1"}', '{"buffer_steps": 0}'],
)
def test_what_cannot_be_is_refused_at_start(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-events-config"):
        ServerArgs.create(model_path="m", kv_events_config=text)


def test_without_a_tree_there_is_nothing_to_tell() -> None:
    with pytest.raises(ConfigError, match="--disable-radix-cache"):
        ServerArgs.create(model_path="m", kv_events_config='{"publisher": "zmq"}', disable_radix_cache=True)
