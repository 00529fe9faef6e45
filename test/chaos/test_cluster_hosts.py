"""A cluster over two network namespaces: a host joins, serves, and its cable is pulled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from live_cluster import LiveCluster
from two_hosts import HOSTS, TwoHosts, two_hosts, why_not

from moonlang.mooncake import lib

pytestmark = pytest.mark.skipif(bool(why_not() or lib.how_to_get()), reason=why_not() or lib.how_to_get() or "-")
FLAGS = ("--max-total-tokens", "20000")


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as found:
        yield found


def test_a_host_joins_and_takes_over(hosts: TwoHosts) -> None:
    with ExitStack() as stack:
        at = [("ip", "netns", "exec", name) for name in hosts.names]
        head = stack.enter_context(
            LiveCluster(
                "--host",
                HOSTS[0],
                "--prefill",
                "1",
                *FLAGS,
                "--for-decode=--disaggregation-decode-fallback",
                name="head",
                before=at[0],
            )
        )
        head.wait_ready()
        join = str(head.status()["join"])
        assert re.fullmatch(rf"moonlang up --join {HOSTS[0]}:\d+ --token \S+ --decode 1", join)
        guest = stack.enter_context(LiveCluster(*join.split()[2:], name="guest", before=at[1]))
        guest.wait_ready()
        head.until(lambda: [one["healthy"] for one in head.status()["guests"]] == [True])
        assert head.status()["guests"][0]["name"] == f"server-0@{HOSTS[1]}"
        # With the decode server here taken away, every request goes over the cable.
        assert "is a prefill server now" in head.command("switch", "server-1", "prefill")
        body = (
            f"import json, urllib.request as r; q = r.Request('{head.url}/generate', json.dumps({{'text': 'x', "
            "'sampling_params': {'max_new_tokens': 3}}).encode(), {'Content-Type': 'application/json'}); "
            "print(r.urlopen(q, timeout=120).status)"
        )
        client = hosts.python(1, ["-c", body], stdout=-1)
        assert client.communicate(timeout=150)[0] == "200\n"
        assert guest.stop() == 0
        head.until(lambda: head.status()["guests"] == [])
        assert guest.left_behind() == []
        assert head.stop() == 0
        assert head.left_behind() == []
