"""The KV store against running Mooncake services, as SGLang's script of the same name checks its own.

    MOONCAKE_TE_META_DATA_SERVER="http://127.0.0.1:8080/metadata" MOONCAKE_MASTER=127.0.0.1:50051 \\
    MOONCAKE_PROTOCOL=tcp MOONCAKE_GLOBAL_SEGMENT_SIZE=16777216 python3 test/compat/test_mooncake_store.py

Needs a running `mooncake_master`, and `python -m mooncake.http_metadata_server` when the metadata server is named.
Under pytest it starts both by itself.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Load, Probe, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome
from moonlang.storage.channel import StoreOptions
from moonlang.storage.mooncake import BACKEND

PAGES = 64
SCHEMA = KvSchema(num_layers=4, num_kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16", itemsize=2)
PATIENCE_NS = 30 * NS_PER_S


class Client:
    """A pool of pages and the store."""

    def __init__(self) -> None:
        self.pool = np.zeros((PAGES, SCHEMA.page_bytes), np.uint8)
        self.channel = BACKEND(StoreOptions(model=f"test-{os.getpid()}"))
        region = KvRegion(address=self.pool.ctypes.data, stride=SCHEMA.page_bytes, num_pages=PAGES, schema=SCHEMA)
        self.channel.register([region])

    def do(self, op: StoreOp) -> Completion:
        self.channel.submit(op)
        assert select.select([self.channel.fileno()], [], [], PATIENCE_NS / NS_PER_S)[0], "the store does not answer"
        (done,) = self.channel.poll()
        assert done.outcome is Outcome.OK, done.error
        return done

    def load(self, keys: Sequence[bytes], pages: Sequence[int]) -> int:
        deadline_ns = monotonic_ns() + PATIENCE_NS
        return self.do(Load(keys=tuple(keys), pages=tuple(pages), deadline_ns=deadline_ns)).count


def check_single_page(client: Client) -> None:
    """One page goes out and comes back."""
    keys = PageKeys(4, os.urandom(8).hex()).upto(list(range(4)), 1)
    client.pool[0] = content = np.random.default_rng().integers(0, 256, SCHEMA.page_bytes, np.uint8)
    assert client.do(Probe(keys=tuple(keys))).count == 0
    assert client.do(Save(keys=tuple(keys), pages=(0,))).count == 1
    assert client.do(Probe(keys=tuple(keys))).count == 1
    assert client.load(keys, [1]) == 1
    np.testing.assert_array_equal(client.pool[1], content)


def check_batch(client: Client) -> None:
    """A batch comes back in order, up to the first page that is missing."""
    keys = PageKeys(4, os.urandom(8).hex()).upto(list(range(4 * 30)), 30)
    client.pool[:30] = content = np.random.default_rng().integers(0, 256, (30, SCHEMA.page_bytes), np.uint8)
    stored = [*range(20), *range(21, 30)]
    assert client.do(Save(keys=tuple(keys[i] for i in stored), pages=tuple(stored))).count == 29
    assert client.do(Probe(keys=tuple(keys))).count == 20
    assert client.load(keys, range(30, 60)) == 20
    np.testing.assert_array_equal(client.pool[30:50], content[:20])


CHECKS = (check_single_page, check_batch)


def run_script(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_documented_script(tmp_path: Path) -> None:
    """The script as a user runs it, with the environment of the documentation."""
    import mooncake_services  # a helper of the tests, not there when this is a script

    metadata_port, *_ = mooncake_services.free_ports(1)
    command = [sys.executable, "-m", "mooncake.http_metadata_server", "--host=127.0.0.1", f"--port={metadata_port}"]
    mooncake_services.program("mooncake_master")
    with mooncake_services.master(tmp_path) as master, (tmp_path / "metadata.log").open("wb") as log:
        metadata = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            mooncake_services.wait_for_port(metadata_port, metadata)
            environ = os.environ | {
                "MOONCAKE_TE_META_DATA_SERVER": f"http://127.0.0.1:{metadata_port}/metadata",
                "MOONCAKE_MASTER": master.address,
                "MOONCAKE_PROTOCOL": "tcp",
                "MOONCAKE_DEVICE": "",
                "MOONCAKE_GLOBAL_SEGMENT_SIZE": "16777216",
            }
            run = run_script(environ)
        finally:
            metadata.kill()
            metadata.wait()
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "✅ All tests passed"


def test_without_a_master_it_says_what_to_start() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MOONCAKE")}
    run = run_script(environ)
    assert run.returncode == 2
    assert "MOONCAKE_MASTER" in run.stderr


def main() -> int:
    try:
        client = Client()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    for check in CHECKS:
        check(client)
        print(f"{check.__name__}: passed")
    client.channel.close()
    print("✅ All tests passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
