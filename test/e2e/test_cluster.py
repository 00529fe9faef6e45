"""`moonlang up`: one command, and what others do with what it starts. The tests share a cluster, in this order."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest
from live_cluster import LiveCluster

import moonlang
from moonlang.base.errors import ConfigError
from moonlang.mooncake import lib

TOKEN = "a-secret"
PAIR = ("--prefill", "1", "--decode", "1", "--token", TOKEN, "--max-total-tokens", "20000")
LONG = "Once upon a time there was a fox who lived by the river. " * 40

pytestmark = pytest.mark.skipif(bool(lib.how_to_get()), reason=lib.how_to_get() or "-")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with LiveCluster(*PAIR, "--store", "64mb") as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def guest(cluster: LiveCluster) -> Iterator[LiveCluster]:
    """A second supervisor on the same host, which brings a decode server."""
    address = cluster.url.removeprefix("http://")
    with LiveCluster("--join", address, "--token", TOKEN, "--decode", "1", name="guest") as running:
        running.wait_ready()
        yield running


class Clients(threading.Thread):
    """Asks one question after the other, streamed and not, until it is told to stop. failures: all that went wrong."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.answers = 0
        self.failures: list[str] = []
        self._url = url
        self._stop_it = threading.Event()
        self.start()

    def run(self) -> None:
        sampling = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=self._url, timeout=120) as http:
            while not self._stop_it.wait(0.03):
                stream = bool(self.answers % 2)
                body = {"text": "Hello", "sampling_params": sampling, "stream": stream}
                try:
                    reply = http.post("/generate", json=body)
                except (httpx.RemoteProtocolError, httpx.ReadError) as error:  # who answered is dead
                    self.failures.append(f"cut off: {error}")
                    continue
                whole = not stream or reply.text.rstrip().endswith("[DONE]")
                if reply.status_code != 200 or "error" in reply.text or not whole:
                    self.failures.append(f"{reply.status_code} {reply.text[-300:]}")
                self.answers += 1

    def stop(self) -> None:
        self._stop_it.set()
        self.join(150)
        assert not self.is_alive()


def test_it_answers_and_says_how_it_is(cluster: LiveCluster) -> None:
    assert cluster.ask().status_code == 200
    status = cluster.status()
    assert (status["state"], status["url"], status["join"]) == ("ready", cluster.url, "")
    assert {unit["name"]: unit["role"] for unit in status["units"]} == {
        "router": "router",
        "store": "master",
        "server-0": "prefill",
        "server-1": "decode",
    }
    assert "server-1" in cluster.command("status")
    workers = cluster.http.get(f"{cluster.url}/workers").json()["workers"]
    found = sorted((worker["name"], worker["is_usable"]) for worker in workers)
    assert found == [("server-0", True), ("server-1", True)]
    assert TOKEN not in cluster.said


def test_nothing_but_the_public_port_was_chosen_in_advance(cluster: LiveCluster) -> None:
    ports = {unit["url"].rpartition(":")[2] for unit in cluster.status()["units"] if unit["url"]}
    assert len(ports) == 3
    assert cluster.port_trouble() == []


def test_the_store_gets_pages(cluster: LiveCluster) -> None:
    assert cluster.ask(LONG).status_code == 200

    def saved() -> int:
        infos = cluster.http.get(f"{cluster.url}/server_info").json()["internal_states"]
        return sum(info["load"]["tiers"]["total_saved_tokens"] for info in infos)

    cluster.until(lambda: saved() > 0)


def test_logs(cluster: LiveCluster) -> None:
    assert re.search(r"Worker http://\S+ \(prefill\) is up", cluster.command("logs", "router"))
    lines = cluster.command("logs", "decode", "-n", "5").splitlines()
    assert 0 < len(lines) <= 5
    assert all(not line.startswith("server-") for line in lines), "only one process: no need to say which"
    assert "server-0 (prefill)" in cluster.command("logs", "nobody", fails=True)


def test_the_last_of_its_kind_is_not_taken_away(cluster: LiveCluster) -> None:
    assert "last decode server" in cluster.command("switch", "server-1", "prefill", fails=True)
    assert "server-0, server-1" in cluster.command("switch", "server-9", "prefill", fails=True)
    assert "already" in cluster.command("switch", "server-1", "decode", fails=True)
    assert cluster.ask().status_code == 200


def test_without_the_token_nobody_joins(cluster: LiveCluster) -> None:
    address = cluster.url.removeprefix("http://")
    text = cluster.command("up", "--join", address, "--token", "guess", "--decode", "1", fails=True)
    assert "another token" in text
    assert httpx.get(f"{cluster.url}/cluster").status_code == 401
    assert httpx.post(f"{cluster.url}/workers", json={"url": "http://127.0.0.1:9"}).status_code == 401
    text = cluster.command("up", "--join", address, "--token", TOKEN, "--replicas", "1", fails=True)
    assert "--prefill N or --decode N" in text


def test_roles_are_switched_without_losing_a_request(cluster: LiveCluster, guest: LiveCluster) -> None:
    cluster.until(lambda: [one["healthy"] for one in cluster.status()["guests"]] == [True])
    clients = [Clients(cluster.url) for _ in range(2)]
    assert "is a prefill server now" in cluster.command("switch", "--name", "test", "server-1", "prefill")
    assert "is a decode server now" in cluster.command("switch", "--name", "test", "server-0", "decode")
    before = sum(each.answers for each in clients)
    cluster.until(lambda: sum(each.answers for each in clients) > before + 10)
    for each in clients:
        each.stop()
    assert [failure for each in clients for failure in each.failures] == []
    roles = {unit["name"]: unit["role"] for unit in cluster.status()["units"]}
    assert (roles["server-0"], roles["server-1"]) == ("decode", "prefill")
    assert cluster.unit("server-1")["deaths"] == 0


def test_a_guest_leaves_without_losing_a_request(cluster: LiveCluster, guest: LiveCluster) -> None:
    clients = [Clients(cluster.url) for _ in range(2)]
    cluster.until(lambda: all(each.answers > 2 for each in clients))
    assert guest.stop() == 0
    before = sum(each.answers for each in clients)
    cluster.until(lambda: sum(each.answers for each in clients) > before + 10)
    for each in clients:
        each.stop()
    assert [failure for each in clients for failure in each.failures] == []
    assert cluster.status()["guests"] == []
    assert guest.left_behind() == []


@pytest.mark.parametrize("name", ["store", "router", "server-0"])
def test_what_dies_starts_again(cluster: LiveCluster, name: str) -> None:
    """Whoever asks meanwhile gets an answer or an error that says to try again, and is not kept waiting."""
    clients = Clients(cluster.url)
    cluster.until(lambda: clients.answers > 2)
    os.kill(cluster.unit(name)["pid"], signal.SIGKILL)
    cluster.until(lambda: cluster.unit(name)["deaths"] == 1)
    cluster.until(lambda: cluster.status()["state"] == "ready")
    before = clients.answers
    cluster.until(lambda: clients.answers > before + 2)
    clients.stop()
    assert cluster.ask().status_code == 200
    clear = re.compile("^503 |retryable|cut off" if name == "router" else "^503 |retryable")
    assert [failure for failure in clients.failures if not clear.search(failure)] == []
    assert name != "store" or not clients.failures, "a store that is away costs no request"


def test_another_cluster_beside_it_from_python(cluster: LiveCluster) -> None:
    with moonlang.Cluster(replicas=1, max_total_tokens=5000, api_key="key", served_model_name="moon") as other:
        assert other.url != cluster.url
        client = other.client()
        assert [model.id for model in client.models.list()] == ["moon"]
        message = {"role": "user", "content": "Hello"}
        answer = client.chat.completions.create(model="moon", messages=[message], max_tokens=3)
        assert answer.usage.completion_tokens == 3
        client.close()
        pids = [unit.pid for unit in other.status().units]
        assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))
    with pytest.raises(ConfigError, match="--tp-size"):
        moonlang.Cluster(replicas=1, tp_sise=2)


def test_down_ends_everything(cluster: LiveCluster) -> None:
    assert len(cluster.members()) >= 8
    assert "has ended" in cluster.command("down")
    assert cluster.process.wait(60) == 0
    assert cluster.left_behind() == []
    assert "No cluster of yours" in cluster.command("status")
