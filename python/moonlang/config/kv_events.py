"""--kv-events-config: who is told what the prefix tree holds. JSON, with SGLang's names."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from moonlang.base.errors import ConfigError

_PORT = re.compile(r":(\d+)$")


class KvEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """endpoint: of the PUB socket, and replay_endpoint of the ROUTER socket that sends again what is among the last
    `buffer_steps` batches; a replica adds its number to both ports. hwm: messages that may wait for one subscriber.
    max_queue_size: batches that may wait to be sent. dp_rank: the replica; set by the supervisor."""

    publisher: Literal["zmq", "null"] = "null"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    dp_rank: int = 0


def parse(text: str | None) -> KvEventsConfig | None:
    """None when nobody is to be told. ConfigError when it cannot be understood."""
    if not text:
        return None
    try:
        found = msgspec.json.decode(text, type=KvEventsConfig)
    except (msgspec.DecodeError, UnicodeError) as error:
        hint = """Like '{"publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv-events"}'."""
        raise ConfigError(f"--kv-events-config: {error}.", hint=hint) from error
    for address in (found.endpoint, found.replay_endpoint):
        if address is not None and not address.startswith(("tcp://", "ipc://", "inproc://")):
            raise ConfigError(f"--kv-events-config: {address!r} is no address.", hint="Use tcp://HOST:PORT or ipc://.")
    if min(found.buffer_steps, found.hwm, found.max_queue_size) < 1:
        raise ConfigError("--kv-events-config: buffer_steps, hwm and max_queue_size are at least 1.")
    return found if found.publisher == "zmq" else None


def of_replica(text: str | None, replica: int) -> str | None:
    """The configuration of replica `replica`, whose sockets are its own."""
    found = parse(text)
    if found is None or not replica:
        return text
    replay = None if found.replay_endpoint is None else _shifted(found.replay_endpoint, replica)
    own = msgspec.structs.replace(
        found, endpoint=_shifted(found.endpoint, replica), replay_endpoint=replay, dp_rank=replica
    )
    return msgspec.json.encode(own).decode()


def _shifted(address: str, by: int) -> str:
    if _PORT.search(address):
        return _PORT.sub(lambda found: f":{int(found[1]) + by}", address)
    return f"{address}-{by}"
