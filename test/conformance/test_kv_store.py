"""One suite for every KvStore: memory, file, null, mooncake; and what a store does on a bad day is a miss."""

from __future__ import annotations

import ctypes
import os
import select
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import mooncake_services
import msgspec
import numpy as np
import pytest
from mooncake_services import Master

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.config.shard import Shard
from moonlang.config.stage import Stage
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Clear, Load, Probe, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome
from moonlang.mooncake import store_config
from moonlang.mooncake.config import Hardware
from moonlang.mooncake.kv_store import MooncakeStore
from moonlang.storage.channel import PageStore, StoreChannel, StoreOptions
from moonlang.storage.faulty import Faults, FaultyStore
from moonlang.storage.file import FileStore
from moonlang.storage.manifest import HEADER_BYTES
from moonlang.storage.memory import MemoryStore
from moonlang.storage.null import NullStore

DEADLINE_NS = 90 * NS_PER_S
PAGES = 32
OPTIONS = StoreOptions(model="org/model", batch_pages=8)


class Engine:
    """A device pool and a channel to the store under test.

    pool: [P, page bytes] of the first rank. ranks: how many share the heads, in each of `stages` that share the
    layers; pools: [P, piece bytes] of each.
    """

    def __init__(
        self,
        store: PageStore,
        options: StoreOptions = OPTIONS,
        clock: Callable[[], int] = monotonic_ns,
        ranks: int = 1,
        stages: int = 1,
        **schema: object,
    ) -> None:
        fields = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8, "page_size": 16, "dtype": "bfloat16"}
        self.schema = KvSchema(**{**fields, "itemsize": 2, "fingerprint": "weights", **schema})  # type: ignore[arg-type]
        heads = [Shard(rank, ranks).kv_part(self.schema.num_kv_heads) for _ in range(stages) for rank in range(ranks)]
        layers = [Stage(at, stages).layers(self.schema.num_layers) for at in range(stages) for _ in range(ranks)]
        shards = [
            msgspec.structs.replace(self.schema, num_kv_heads=len(mine), num_layers=len(own))
            for mine, own in zip(heads, layers, strict=True)
        ]
        self.pools = [np.zeros((PAGES, shard.page_bytes), np.uint8) for shard in shards]
        self.pool = self.pools[0]
        self.channel = StoreChannel(store, options, clock=clock)
        self.channel.register(
            [
                KvRegion(
                    address=pool.ctypes.data,
                    stride=shard.page_bytes,
                    num_pages=PAGES,
                    schema=shard,
                    first_head=mine.start,
                    first_layer=own.start,
                )
                for pool, shard, mine, own in zip(self.pools, shards, heads, layers, strict=True)
            ]
        )

    def do(self, op: StoreOp) -> Completion:
        ticket = self.channel.submit(op)
        deadline_ns = monotonic_ns() + DEADLINE_NS
        while monotonic_ns() < deadline_ns:
            if select.select([self.channel.fileno()], [], [], 1.0)[0]:
                for done in self.channel.poll():
                    assert done.ticket == ticket, "an op completed twice, or one that nobody submitted"
                    return done
        raise AssertionError(f"{op} never completed")

    def save(self, keys: Sequence[bytes], pages: Sequence[int]) -> Completion:
        return self.do(Save(keys=tuple(keys), pages=tuple(pages)))

    def load(self, keys: Sequence[bytes], pages: Sequence[int]) -> Completion:
        return self.do(Load(keys=tuple(keys), pages=tuple(pages), deadline_ns=monotonic_ns() + DEADLINE_NS))


Opener = Callable[[], PageStore]


def open_mooncake(master: str, segment: str = "0", **more: object) -> MooncakeStore:
    """more: of the extra config."""
    extra = {"master_server_address": master, "global_segment_size": segment, "local_buffer_size": "1mb", **more}
    return MooncakeStore(store_config.read(extra | {"protocol": "tcp"}, {}, Hardware(), host="127.0.0.1"))


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master, and a provider of memory that lives as long."""
    with mooncake_services.master(tmp_path_factory.mktemp("master")) as running:
        provider = open_mooncake(running.address, segment="16mb")
        yield running
        provider.close()


@pytest.fixture(params=["memory", "file", "mooncake"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same store again and again, as several engines do. Keys are fresh for each test."""
    if request.param == "mooncake":
        return partial(open_mooncake, request.getfixturevalue("master").address)
    if request.param == "memory":
        objects: OrderedDict[str, bytes] = OrderedDict()
        return lambda: MemoryStore(1 << 20, objects)
    return lambda: FileStore(tmp_path, 1 << 20)


@pytest.fixture
def engine(opener: Opener) -> Iterator[Callable[..., Engine]]:
    """Makes engines on the store, `through` a wrapper if given, and closes them."""
    opened: list[Engine] = []

    def make(through: Callable[[PageStore], PageStore] = lambda store: store, **changes: object) -> Engine:
        opened.append(Engine(through(opener()), **changes))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for one in opened:
        one.channel.close()


def fill(engine: Engine, pages: Sequence[int], seed: int) -> np.ndarray:
    content = np.random.default_rng(seed).integers(0, 256, (len(pages), engine.schema.page_bytes), np.uint8)
    engine.pool[list(pages)] = content
    return content


@pytest.fixture(autouse=True)
def fresh_names() -> None:
    """A store outlives a test: no test may find another's pages."""
    _salt.append(os.urandom(8).hex())


_salt = [""]


def keys(count: int, seed: int = 1) -> list[bytes]:
    tokens = np.random.default_rng(seed).integers(0, 1000, count * 4).tolist()
    return PageKeys(4, _salt[-1]).upto(tokens, count)


def test_what_one_engine_saves_another_loads(engine: Callable[..., Engine]) -> None:
    first, second = engine(), engine()
    content = fill(first, range(20), 1)
    assert first.save(keys(20), range(20)).count == 20
    assert second.do(Probe(keys=tuple(keys(20)))).count == 20
    done = second.load(keys(20), range(5, 25))
    assert (done.outcome, done.count, done.bytes) == (Outcome.OK, 20, 20 * first.schema.page_bytes)
    np.testing.assert_array_equal(second.pool[5:25], content)


HEADS = 4  # of the model, in the tests with several ranks


def rows(engine: Engine, rank: int) -> np.ndarray:
    """[P, layers and halves, heads of the rank, bytes of a head]: a view."""
    return engine.pools[rank].reshape(PAGES, 2 * engine.schema.num_layers, -1, engine.schema.page_size * 16)


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (1, 8), (8, 1), (8, 4)])
def test_instances_with_other_numbers_of_ranks_share(engine: Callable[..., Engine], writers: int, readers: int) -> None:
    """Eight ranks have four heads: two each hold the same."""
    first, second = (engine(ranks=ranks, num_kv_heads=HEADS) for ranks in (writers, readers))
    content = np.random.default_rng(1).integers(0, 256, (12, 4, HEADS, first.schema.page_size * 16), np.uint8)
    for rank in range(writers):
        mine = Shard(rank, writers).kv_part(HEADS)
        rows(first, rank)[:12] = content[:, :, mine.start : mine.stop]
    assert first.save(keys(12), range(12)).count == 12
    assert second.load(keys(12), range(20, 32)).count == 12
    for rank in range(readers):
        mine = Shard(rank, readers).kv_part(HEADS)
        np.testing.assert_array_equal(rows(second, rank)[20:], content[:, :, mine.start : mine.stop])


@pytest.mark.parametrize(
    ("writers", "readers"), [((1, 2), (1, 1)), ((1, 1), (1, 3)), ((2, 2), (4, 1)), ((4, 3), (2, 2))]
)
def test_stages_do_not_show_outside(
    engine: Callable[..., Engine], writers: tuple[int, int], readers: tuple[int, int]
) -> None:
    """(ranks of a stage, stages): three layers in two stages are one and two."""
    schema = {"num_kv_heads": HEADS, "num_layers": 3}
    first, second = (engine(ranks=ranks, stages=stages, **schema) for ranks, stages in (writers, readers))
    content = np.random.default_rng(1).integers(0, 256, (12, 6, HEADS, first.schema.page_size * 16), np.uint8)
    for pool, mine in zip(first.pools, _slices(content, *writers), strict=True):
        pool[:12] = mine
    assert first.save(keys(12), range(12)).count == 12
    assert second.load(keys(12), range(20, 32)).count == 12
    for pool, mine in zip(second.pools, _slices(content, *readers), strict=True):
        np.testing.assert_array_equal(pool[20:], mine)


def _slices(content: np.ndarray, ranks: int, stages: int) -> list[np.ndarray]:
    """[P, piece bytes] of each rank. content: [P, layers and halves, heads, bytes of a head]."""
    found: list[np.ndarray] = []
    for stage in range(stages):
        layers = Stage(stage, stages).layers(content.shape[1] // 2)
        for rank in range(ranks):
            mine = Shard(rank, ranks).kv_part(HEADS)
            piece = content[:, 2 * layers.start : 2 * layers.stop, mine.start : mine.stop]
            found.append(piece.reshape(len(content), -1))
    return found


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (4, 1), (2, 4)])
def test_latents_are_whole_in_every_rank(engine: Callable[..., Engine], writers: int, readers: int) -> None:
    first, second = (engine(ranks=ranks, latent=True) for ranks in (writers, readers))
    content = fill(first, range(12), 1)
    assert first.save(keys(12), range(12)).count == 12
    assert second.load(keys(12), range(20, 32)).count == 12
    for pool in second.pools:
        np.testing.assert_array_equal(pool[20:], content)


def test_damage_in_any_shard_is_found(engine: Callable[..., Engine]) -> None:
    writer = engine(ranks=4, num_kv_heads=HEADS)
    for pool in writer.pools:
        pool[:] = np.random.default_rng(1).integers(0, 256, pool.shape, np.uint8)
    reader = engine(lambda store: FaultyStore(store, Faults(flip=1.0)), ranks=4, num_kv_heads=HEADS)
    for i in range(8):
        writer.save(keys(1, seed=i), [0])
        assert reader.load(keys(1, seed=i), [1]).count == 0


def test_a_probe_counts_leading_keys(engine: Callable[..., Engine]) -> None:
    one = engine()
    names = keys(6)
    fill(one, range(6), 1)
    one.save([*names[:3], *names[4:]], [0, 1, 2, 4, 5])
    assert one.do(Probe(keys=tuple(names))).count == 3
    assert one.load(names, range(6, 12)).count == 3
    assert one.load(names[3:], range(6, 9)).count == 0


def test_saving_again_changes_nothing(engine: Callable[..., Engine]) -> None:
    one = engine()
    content = fill(one, [0], 1)
    one.save(keys(1), [0])
    fill(one, [1], 2)
    assert one.save(keys(1), [1]).count == 1
    assert one.load(keys(1), [2]).count == 1
    np.testing.assert_array_equal(one.pool[[2]], content)


@pytest.mark.parametrize("change", [{"fingerprint": "others"}, {"dtype": "float16"}, {"num_kv_heads": 2}])
def test_other_weights_dtype_or_layout_find_nothing(engine: Callable[..., Engine], change: dict[str, object]) -> None:
    one, other = engine(), engine(**change)
    fill(one, range(4), 1)
    one.save(keys(4), range(4))
    assert other.do(Probe(keys=tuple(keys(4)))).count == 0
    assert other.load(keys(4), range(4)).count == 0


def test_clear_forgets_this_model_only(engine: Callable[..., Engine]) -> None:
    one, other = engine(), engine(fingerprint="others")
    for each in (one, other):
        fill(each, range(4), 1)
        each.save(keys(4), range(4))
    one.do(Clear())
    assert one.do(Probe(keys=tuple(keys(4)))).count == 0
    assert other.do(Probe(keys=tuple(keys(4)))).count == 4


@pytest.mark.parametrize("fault", ["flip", "header", "cut", "swap", "replay", "drop", "fail"])
def test_a_lying_store_is_never_believed(engine: Callable[..., Engine], fault: str) -> None:
    """Every page that counts holds the right bytes, on fresh faults each time; and some do get through."""
    writer = engine()
    content = fill(writer, range(16), 3)
    writer.save(keys(16), range(16))
    names = [f"org-model_{writer.schema.digest()[:16]}_{key.hex()}" for key in keys(16)]
    faults = Faults(seed=1, **{fault: 0.1})
    reader = engine(lambda store: FaultyStore(store, faults, known=names))
    good = refused = 0
    for _ in range(30):
        writer.save(keys(16), range(16))  # what was found damaged has been removed
        reader.pool[:] = 0
        done = reader.load(keys(16), range(16))
        np.testing.assert_array_equal(reader.pool[: done.count], content[: done.count])
        good += done.count
        refused += done.count < 16
    assert good > 0, "nothing ever came through"
    assert refused > 0, "no fault ever struck"


def test_a_store_that_hangs_fails_new_ops_at_once(opener: Opener) -> None:
    release = threading.Event()
    options = StoreOptions(model="m", patience_ns=NS_PER_S // 20)
    one = Engine(FaultyStore(opener(), Faults(slow=1.0), lambda: bool(release.wait(90)) or None), options)
    hanging = one.channel.submit(Probe(keys=tuple(keys(1))))
    deadline_ns = monotonic_ns() + DEADLINE_NS
    while True:  # until the first op is overdue, later ones queue behind it
        assert monotonic_ns() < deadline_ns
        ticket = one.channel.submit(Probe(keys=tuple(keys(1))))
        failed = [done for done in one.channel.poll() if done.ticket == ticket]
        if failed:
            assert failed[0].outcome is Outcome.FAILED
            break
        one.channel.cancel(ticket)
        threading.Event().wait(0.02)
    release.set()
    seen = [done.ticket for done in one.channel.poll()]
    while hanging not in seen:
        assert select.select([one.channel.fileno()], [], [], 90)[0], "the op that hung never completed"
        seen += [done.ticket for done in one.channel.poll()]
    one.channel.close()


def test_a_failing_store_is_left_alone_for_a_while(opener: Opener) -> None:
    one = Engine(FaultyStore(opener(), Faults(fail=1.0)))
    assert [one.do(Probe(keys=tuple(keys(1)))).outcome for _ in range(5)] == [Outcome.FAILED] * 5
    assert one.channel.totals.failures == {"error": 2, "paused": 3}, "what is left alone is not asked"
    one.channel.close()


def test_ops_that_wait_behind_one_that_hangs_fail(opener: Opener) -> None:
    release = threading.Event()
    options = StoreOptions(model="m", patience_ns=NS_PER_S // 20)
    one = Engine(FaultyStore(opener(), Faults(slow=1.0), lambda: bool(release.wait(90)) or None), options)
    hanging = one.channel.submit(Probe(keys=tuple(keys(1))))
    behind = one.channel.submit(Load(keys=tuple(keys(1)), pages=(0,), deadline_ns=monotonic_ns() + DEADLINE_NS))
    deadline_ns = monotonic_ns() + DEADLINE_NS
    done: list[Completion] = []
    while not done:
        assert monotonic_ns() < deadline_ns
        done += one.channel.poll()
        threading.Event().wait(0.01)
    assert [(end.ticket, end.outcome) for end in done] == [(behind, Outcome.FAILED)]
    release.set()
    while hanging not in [end.ticket for end in done]:
        assert select.select([one.channel.fileno()], [], [], 90)[0], "the op that hung never completed"
        done += one.channel.poll()
    one.channel.close()


def test_who_looks_something_up_does_not_wait_for_what_is_being_stored(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    store = opener()
    one = Engine(store)
    fill(one, [0], 1)
    one.save(keys(1), [0])
    monkeypatch.setattr(store, "write", lambda names, pages: len(names) if release.wait(90) else 0)
    hanging = one.channel.submit(Save(keys=tuple(keys(1, seed=2)), pages=(0,)))
    assert one.do(Probe(keys=tuple(keys(1)))).count == 1
    assert one.load(keys(1), [1]).count == 1
    release.set()
    assert select.select([one.channel.fileno()], [], [], 90)[0], "the op that hung never completed"
    assert [done.ticket for done in one.channel.poll()] == [hanging]
    one.channel.close()


def test_one_that_lies_is_not_asked_any_more_but_still_written_to(opener: Opener) -> None:
    one = Engine(FaultyStore(opener(), Faults(flip=1.0)))
    fill(one, range(4), 1)
    one.save(keys(4), range(4))
    for i in range(2):
        assert one.do(Probe(keys=tuple(keys(4)[i:]))).count == 4 - i
        assert one.load(keys(4)[i:], range(4, 8 - i)).count == 0
    assert one.do(Probe(keys=tuple(keys(4)[2:]))).outcome is Outcome.FAILED
    assert one.save(keys(2, seed=2), range(2)).count == 2
    assert one.channel.totals.failures == {"checksum": 2, "paused": 1}
    one.channel.close()


def test_a_damaged_page_makes_room_for_a_good_one(engine: Callable[..., Engine]) -> None:
    one = engine()
    liar = engine(lambda store: FaultyStore(store, Faults(flip=1.0)))
    fill(one, [0], 1)
    one.save(keys(1), [0])
    assert liar.load(keys(1), [1]).count == 0
    assert one.do(Probe(keys=tuple(keys(1)))).count == 0


def test_whatever_a_store_raises_is_a_failure_of_that_op(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opener()
    one = Engine(store)
    monkeypatch.setattr(store, "read", lambda names, pages: 1 // 0)
    assert one.save(keys(1), [0]).count == 1
    assert one.load(keys(1), [1]).outcome is Outcome.FAILED
    assert one.do(Probe(keys=tuple(keys(1)))).count == 1
    one.channel.close()


def test_the_same_complaint_is_logged_once(opener: Opener, caplog: pytest.LogCaptureFixture) -> None:
    now_ns = [0]
    one = Engine(FaultyStore(opener(), Faults(fail=1.0)), clock=lambda: now_ns[0])
    for _ in range(20):
        one.do(Probe(keys=tuple(keys(1))))
        now_ns[0] += 2 * NS_PER_S
    assert len([record for record in caplog.records if "asked for" in record.message]) == 1
    one.channel.close()


def test_pages_stay_with_a_writer_that_has_room(master: Master) -> None:
    """Then writing is a copy in memory, and they go when it does."""
    one, other = (Engine(open_mooncake(master.address, segment="16mb")) for _ in range(2))
    fill(one, range(16), 1)
    assert one.save(keys(16), range(16)).count == 16
    assert other.do(Probe(keys=tuple(keys(16)))).count == 16
    one.channel.close()
    assert other.do(Probe(keys=tuple(keys(16)))).count == 0
    other.channel.close()


def test_what_lies_in_the_own_segment_is_verified_as_it_is_copied(master: Master) -> None:
    """The bytes that are copied are the ones that are summed, and damage in the segment is a miss."""
    store = open_mooncake(master.address, segment="16mb")
    engine = Engine(store, ranks=2, num_kv_heads=2)
    for pool in engine.pools:
        pool[:] = np.random.default_rng(1).integers(0, 256, pool.shape, np.uint8)
    assert engine.save(keys(8), range(8)).count == 8
    assert engine.load(keys(8), range(8, 16)).count == 8
    headers = engine.channel._pages.headers
    assert headers.summed.all()
    for pool in engine.pools:
        np.testing.assert_array_equal(pool[8:16], pool[:8])
    names = engine.channel._pages.names(keys(8))
    assert store._near is not None
    (address,) = store._near.addresses(names[5:6], HEADER_BYTES + engine.schema.page_bytes)
    last = address + HEADER_BYTES + engine.schema.page_bytes - 1  # of the second rank's slice
    (ctypes.c_uint8 * 1).from_address(last)[0] ^= 4
    assert engine.load(keys(8), range(16, 24)).count == 5
    assert engine.channel.totals.failures["checksum"] == 1
    assert engine.do(Probe(keys=tuple(keys(8)))).count == 5, "it has been removed"
    engine.channel.close()


def test_pages_of_two_owners_are_read_together(master: Master) -> None:
    """Those of the own segment are copied, the others travel, whatever their order; only a real gap ends the count."""
    one, other = (Engine(open_mooncake(master.address, segment="16mb")) for _ in range(2))
    names = keys(8)
    content = fill(one, range(8), 1)
    other.pool[:8] = content
    assert one.save(names[:3], range(3)).count == other.save(names[3:5], range(3, 5)).count + 1 == 3
    assert one.save(names[5:], range(5, 8)).count == 3
    for engine in (one, other):
        assert engine.load(names, range(16, 24)).count == 8
        np.testing.assert_array_equal(engine.pool[16:24], content)
    missing = PageKeys(16, "missing").upto(list(range(16)), 1)
    assert one.load([*names[:4], *missing, *names[4:]], range(16, 25)).count == 4
    for engine in (one, other):
        engine.channel.close()


def test_pages_whose_lease_ran_out_while_they_were_read_count(tmp_path: Path) -> None:
    """They are whole, and verified like all others. On a slow network every read of a big batch takes longer."""
    with mooncake_services.master(tmp_path, "--default_kv_lease_ttl=0") as master:
        writer, reader = (Engine(open_mooncake(master.address, segment=size)) for size in ("64mb", "0"))
        content = fill(writer, range(16), 1)
        assert writer.save(keys(16), range(16)).count == 16
        assert reader.load(keys(16), range(16)).count == 16
        np.testing.assert_array_equal(reader.pool[:16], content)
        missing = PageKeys(16, "missing").upto(list(range(16)), 1)
        assert reader.load([*keys(4), *missing], range(5)).count == 4
        reader.channel.close()
        writer.channel.close()


def test_tenants_of_a_master_have_nothing_in_common(tmp_path: Path) -> None:
    """The same names mean other pages, one tenant's quota costs nobody else a page, and a stranger gets misses."""
    quotas = tmp_path / "quotas.yaml"
    quotas.write_text("version: 1\n\ntenants:\n  - name: small\n    quota: 64KB\n  - name: big\n    quota: 16MB\n")
    options = "--enable_multi_tenants=true", f"--tenant_quota_connector_uri={quotas}"
    with mooncake_services.master(tmp_path, *options) as master:
        small, big, stranger = (
            Engine(open_mooncake(master.address, segment="16mb", tenant_id=name)) for name in ("small", "big", "no")
        )
        theirs, ours = fill(small, range(4), 1), fill(big, range(4), 2)
        assert small.save(keys(4), range(4)).count == 4
        assert big.do(Probe(keys=tuple(keys(4)))).count == 0
        assert big.save(keys(4), range(4)).count == 4
        for engine, content in ((small, theirs), (big, ours)):
            assert engine.load(keys(4), range(8, 12)).count == 4
            np.testing.assert_array_equal(engine.pool[8:12], content)
        for at in range(0, 256, 8):  # 1 MB through a quota of 64 KB
            small.save(keys(256)[at : at + 8], range(8))
        assert big.load(keys(4), range(8, 12)).count == 4
        assert stranger.save(keys(4), range(4)).outcome is Outcome.FAILED
        assert stranger.load(keys(4), range(4)).count == 0
        for engine in (stranger, big, small):
            engine.channel.close()


def test_a_service_that_is_killed_while_pages_are_read(tmp_path: Path) -> None:
    """What had arrived whole counts, the rest is a miss, and nothing hangs."""
    with (
        mooncake_services.master(tmp_path) as master,
        mooncake_services.store_service(tmp_path, master.address, "256mb") as service,
    ):
        reader = Engine(open_mooncake(master.address), num_layers=28, num_kv_heads=8, head_dim=128)
        content = fill(reader, range(32), 1)  # 59 MB, which take some 45 ms to read
        assert reader.save(keys(32), range(32)).count == 32
        reader.pool[:] = 0
        killer = threading.Timer(0.01, service.process.kill)
        killer.start()
        done = reader.load(keys(32), range(32))  # on a busy machine it may be too late for the last ones
        killer.join()
        assert np.array_equal(reader.pool[: done.count], content[: done.count])
        assert reader.load(keys(32), range(32)).count == 0
        reader.channel.close()


def test_a_client_of_the_host_holds_the_pages(tmp_path: Path) -> None:
    """What is written stays when the engine has gone; and a client that is gone is a miss."""
    with mooncake_services.master(tmp_path) as master:
        with mooncake_services.client(tmp_path, master.address, "64MB") as address:
            extra = {"standalone_storage": True, "client_server_address": address, "global_segment_size": "16mb"}
            config = store_config.read({**extra, "protocol": "tcp"}, {}, Hardware(), host="127.0.0.1")
            first = Engine(MooncakeStore(config), ranks=2, num_kv_heads=2)
            for pool in first.pools:
                pool[:] = np.random.default_rng(1).integers(0, 256, pool.shape, np.uint8)
            assert first.save(keys(12), range(12)).count == 12
            first.channel.close()
            second = Engine(MooncakeStore(config), ranks=2, num_kv_heads=2)
            assert second.load(keys(12), range(12, 24)).count == 12
            for mine, theirs in zip(second.pools, first.pools, strict=True):
                np.testing.assert_array_equal(mine[12:24], theirs[:12])
        assert second.load(keys(12), range(12)).count == 0
        second.channel.close()


def test_null_takes_everything_and_has_nothing() -> None:
    one = Engine(NullStore())
    assert one.save(keys(3), range(3)).count == 3
    assert one.do(Probe(keys=tuple(keys(3)))).count == 0
    assert one.load(keys(3), range(3)).count == 0
    one.channel.close()


def test_files_of_another_server_that_were_damaged_or_cut_are_misses(tmp_path: Path) -> None:
    one = Engine(FileStore(tmp_path, 1 << 20))
    fill(one, range(3), 1)
    one.save(keys(3), range(3))
    files = sorted(tmp_path.glob("*.page"))
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])
    assert one.load(keys(3), range(3)).count == 0
    one.channel.close()


def test_the_directory_is_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    one = Engine(FileStore(tmp_path, 10 * 1200))
    for i in range(4):
        fill(one, range(8), i)
        one.save(keys(8, seed=i), range(8))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.page")) <= 10 * 1200
    assert one.do(Probe(keys=tuple(keys(8, seed=0)))).count == 0
    assert one.do(Probe(keys=tuple(keys(8, seed=3)))).count > 0
    assert not list(tmp_path.glob("*.draft"))
    one.channel.close()


def test_drafts_of_servers_that_were_killed_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "a.1.draft", tmp_path / "a.2.draft"
    for draft in (old, new):
        draft.write_bytes(b"half a page")
    os.utime(old, (0, 0))
    FileStore(tmp_path, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]
