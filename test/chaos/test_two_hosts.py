"""Messages over Mooncake's transfer engine between two network namespaces: a server in both, a cable that is pulled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tiny_folder import write_tiny_folder
from two_hosts import HOSTS, TwoHosts, two_hosts, why_not

from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs, resolve
from moonlang.mooncake import lib
from moonlang.roles import topology
from moonlang.roles.process import Job, job_file

END_S = 90.0

pytestmark = pytest.mark.skipif(bool(why_not() or lib.how_to_get()), reason=why_not() or lib.how_to_get() or "-")

_API = """
import sys, msgspec
from moonlang.core.messages import Generate, Ready, TextBatch
from moonlang.core.sampling import SamplingParams
from moonlang.mooncake.endpoint import MooncakeEndpoint
mailbox = MooncakeEndpoint("api", msgspec.json.decode(sys.argv[1]), token="cluster")
ready, tokens = set(), 0
def messages():
    mailbox.wait(10**11)
    return [envelope.body for envelope in mailbox.recv()]
while len(ready) < 2:
    ready |= {body.role for body in messages() if isinstance(body, Ready)}
print("ready", flush=True)
sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
mailbox.send("scheduler", Generate("r", [1, 2, 3], sampling, True))
while tokens < 8:
    for body in messages():
        if isinstance(body, TextBatch):
            tokens += sum(len(item.tokens) for item in body.items)
print("tokens", tokens, flush=True)
mailbox.close()
"""

_COUNT = """
import sys, msgspec
from moonlang.base.clock import sleep_s
from moonlang.base.errors import PeerError
from moonlang.core.messages import StopHit
from moonlang.mooncake.endpoint import MooncakeEndpoint
name, addresses, part = sys.argv[1], msgspec.json.decode(sys.argv[2]), int(sys.argv[3])
mailbox = MooncakeEndpoint(name, addresses, token="cluster")
def is_sent(text):
    try:
        mailbox.send("b", StopHit(text))
    except PeerError:
        return False
    return True
def received():
    mailbox.wait(10**9)
    return [envelope.body.rid for envelope in mailbox.recv()]
if name == "a":
    sent, goal = 0, None  # until a part more has been sent than when the peer was out of reach
    while goal is None or sent < goal:
        if is_sent(str(sent)):
            sent += 1
        else:
            if goal is None:
                print("out of reach", flush=True)
            goal = sent + part
        if sent == part and goal is None:
            print("a part", flush=True)
        sleep_s(0.001)
    while not is_sent("last"):
        sleep_s(0.01)
    while not received():
        pass
else:
    got = []
    while "last" not in got:
        got += received()
    print("in order", got[:-1] == [str(number) for number in range(len(got) - 1)], flush=True)
    mailbox.send("a", StopHit("all"))
mailbox.close()
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as found:
        yield found


def test_api_server_here_scheduler_there(hosts: TwoHosts, tmp_path: Path) -> None:
    model_path = write_tiny_folder(tmp_path / "model")
    given = ServerArgs.create(
        model_path=str(model_path), load_format="dummy", max_total_tokens=2000, messaging_backend="mooncake"
    )
    model = load_model_config(str(model_path), given)
    args, _ = resolve(given, model)
    places = {topology.API: 0, topology.DETOKENIZER: 0, topology.SCHEDULER: 1}
    addresses = {role: f"tcp://{HOSTS[host]}:{7000 + number}" for number, (role, host) in enumerate(places.items())}
    processes: list[subprocess.Popen[str]] = []
    try:
        for role in topology.CHILDREN:
            job = Job(role=role, parent_pid=os.getpid(), addresses=addresses, token="cluster", args=args, model=model)
            job_file(tmp_path, role).write_bytes(msgspec.json.encode(job))
            arguments = ("-m", "moonlang.roles.process", str(job_file(tmp_path, role)))
            processes.append(hosts.python(places[role], arguments))
        text = msgspec.json.encode(addresses).decode()
        processes.append(hosts.python(0, ("-c", _API, text), stdout=subprocess.PIPE))
        said, _ = processes[-1].communicate(timeout=END_S)
        assert said.split("\n")[:2] == ["ready", "tokens 8"]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(END_S)


def test_the_doctors_of_two_hosts_meet(hosts: TwoHosts) -> None:
    where = f"{HOSTS[1]}:7200"
    with hosts.python(1, ("-m", "moonlang", "doctor", "--listen", where), stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        token = listener.stdout.readline().split()[-1]
        arguments = ("-m", "moonlang", "doctor", "--json", "--port", "0", "--peer", where, "--token", token)
        said, _ = hosts.python(0, arguments, stdout=subprocess.PIPE).communicate(timeout=END_S)
        listener.kill()
    found = {check["name"]: check["status"] for check in msgspec.json.decode(said)["checks"]}
    assert [found[f"{way} {where}"] for way in ("to", "from", "data from", "data to")] == ["ok"] * 4


_ASK = """
import json, sys, urllib.request
body = json.dumps({"text": "x", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}).encode()
request = urllib.request.Request(sys.argv[1] + "/generate", body, {"Content-Type": "application/json"})
print(len(json.load(urllib.request.urlopen(request, timeout=90))["output_ids"]))
"""


def test_two_ranks_on_two_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    """Here gloo may not take what the host's name stands for: no other host reaches it."""
    model = write_tiny_folder(tmp_path / "model")
    flags = ("--model-path", str(model), "--load-format", "dummy", "--max-total-tokens", "2000", "--tp-size", "2")
    nodes = ("--nnodes", "2", "--dist-init-addr", f"{HOSTS[0]}:5000", "--messaging-backend", "mooncake")
    environ = os.environ | {"MOONLANG_CLUSTER_TOKEN": "secret"}
    servers: list[subprocess.Popen[str]] = []
    try:
        for rank in (1, 0):
            command = ("-m", "moonlang.launch_server", *flags, *nodes, "--node-rank", str(rank), "--port", "7200")
            servers.append(hosts.python(rank, command, env=environ, stderr=subprocess.PIPE))
        follower, first = servers
        assert first.stderr is not None
        lines = iter(first.stderr.readline, "")
        assert any("ready to roll" in line for line in lines)
        asked = hosts.python(0, ("-c", _ASK, "http://127.0.0.1:7200"), stdout=subprocess.PIPE)
        assert asked.communicate(timeout=END_S)[0] == "4\n"
        first.terminate()
        assert follower.wait(END_S) == 1  # it ends with the first
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def test_a_cable_that_is_pulled_for_a_moment_loses_and_repeats_nothing(hosts: TwoHosts) -> None:
    addresses = {name: f"tcp://{host}:7100" for name, host in zip("ab", HOSTS, strict=True)}
    text = msgspec.json.encode(addresses).decode()
    b = hosts.python(1, ("-c", _COUNT, "b", text, "500"), stdout=subprocess.PIPE)
    a = hosts.python(0, ("-c", _COUNT, "a", text, "500"), stdout=subprocess.PIPE)
    try:
        assert a.stdout is not None
        assert a.stdout.readline() == "a part\n"
        hosts.cut()
        assert a.stdout.readline() == "out of reach\n"
        hosts.mend()
        said, _ = b.communicate(timeout=END_S)
        assert said == "in order True\n"
        assert a.wait(END_S) == 0
    finally:
        for process in (a, b):
            process.kill()
            process.communicate()
