"""Links of a prefill and a decode instance in one process, and a bootstrap server that knows the former."""

from __future__ import annotations

import http.server
import json
import select
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from moonlang.base import clock
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard, PairEvent
from moonlang.disaggregation.link import LinkOptions, TcpLink
from moonlang.disaggregation.peers import Reach

T = TypeVar("T")

SCHEMA = KvSchema(
    num_layers=2, num_kv_heads=2, head_dim=4, page_size=2, dtype="float32", itemsize=4, fingerprint="weights"
)
PATIENCE_S = 60.0


def card(instance: str, schema: KvSchema = SCHEMA, backend: str = "local") -> KvCard:
    region = KvRegion(address=0, stride=schema.page_bytes, num_pages=4, schema=schema)
    return KvCard(instance=instance, backend=backend, host="h", regions=(region,), sessions=("",), handles=("",))


class Bootstrap:
    """Answers GET /route with `routes` (instance, host, port)."""

    def __init__(self) -> None:
        self.routes: list[tuple[str, str, int]] = []
        known = self.routes

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                names = ("instance", "host", "port")
                body = json.dumps({"instances": [dict(zip(names, route, strict=True)) for route in known]}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.port = self._server.server_address[1]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Station:
    """A link and what it has said."""

    def __init__(self, instance: str, role: str, *, token: str = "", host: str = "127.0.0.1", **kwargs: Any) -> None:
        self.card = card(instance, **kwargs)
        self.reach = Reach()
        self.link = TcpLink(self.card, LinkOptions(role=role, host=host, token=token), self.reach)
        self.events: list[PairEvent] = []

    @property
    def route(self) -> tuple[str, str, int]:
        return (self.card.instance, *self.link.address)

    def wait(self, find: Callable[[PairEvent], T | None], patience_s: float = PATIENCE_S) -> T:
        """The first event, past ones included, that `find` gives something for; it is taken out with those before."""
        deadline_ns = clock.monotonic_ns() + int(patience_s * clock.NS_PER_S)
        while True:
            self.events += self.link.recv()
            while self.events:
                found = find(self.events.pop(0))
                if found is not None:
                    return found
            left_s = (deadline_ns - clock.monotonic_ns()) / clock.NS_PER_S
            assert left_s > 0, "it has not happened"
            select.select([self.link.fileno()], [], [], left_s)

    def wait_for(self, kind: type[T], patience_s: float = PATIENCE_S) -> T:
        return self.wait(lambda event: event if isinstance(event, kind) else None, patience_s)

    def close(self) -> None:
        self.link.close()
