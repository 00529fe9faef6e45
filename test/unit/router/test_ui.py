"""The page's data through a router: every worker's own account, whoever answers."""

from __future__ import annotations

from typing import Any

from fake_worker import FakeWorker, Routed, run_routed

KEY = {"authorization": "Bearer key"}


def telling(name: str, mode: str = "null") -> FakeWorker:
    """A worker with a page of its own."""
    worker = FakeWorker(name, mode)
    instance: dict[str, Any] = {"id": "0", "kind": "regular", "load": {"num_running": 3}, "figures": {}}
    worker.pages["/ui/state"] = {"model": name, "bounds": {"seconds": [1]}, "instances": [instance]}
    worker.pages["/ui/tree"] = {"parent": [-1], "of": name}
    return worker


def test_the_state_holds_every_worker_and_what_the_router_knows() -> None:
    async def case(it: Routed) -> None:
        found = (await it.http.get("/ui/state")).json()
        assert (found["kind"], found["model"], found["left_out"]) == ("router", "a", 0)
        shown = [(one["id"], f"http://{one['name']}", one["up"], one["breaker"]) for one in found["instances"]]
        assert shown == [(w.id, w.url, True, "closed") for w in it.parts.workers]
        assert [one["load"] for one in found["instances"]] == [{"num_running": 3}, None]  # b is of another kind

    run_routed(case, lambda: telling("a"), lambda: FakeWorker("b"))


def test_each_replica_of_a_worker_is_an_instance() -> None:
    async def case(it: Routed) -> None:
        page = it.workers[0].pages["/ui/state"]
        page["instances"] *= 2
        found = (await it.http.get("/ui/state")).json()["instances"]
        assert [one["id"] for one in found] == ["1.0", "1.1"]
        assert [one["name"].partition(" ")[2] for one in found] == ["replica 0", "replica 1"]

    run_routed(case, lambda: telling("a"))


def test_a_worker_that_is_down_is_shown_all_the_same() -> None:
    async def case(it: Routed) -> None:
        await it.workers[1].stop()
        await it.until(lambda: not list(it.parts.workers)[1].up)
        found = (await it.http.get("/ui/state")).json()["instances"]
        assert [(one["up"], one["kind"]) for one in found] == [(True, "prefill"), (False, "decode")]

    run_routed(case, lambda: telling("p", "prefill"), lambda: telling("d", "decode"))


def test_the_tree_of_one_worker() -> None:
    async def case(it: Routed) -> None:
        assert (await it.http.get("/ui/tree?instance=2")).json()["of"] == "b"
        assert (await it.http.get("/ui/tree?instance=2.1&nodes=7")).json()["of"] == "b"
        asked = [one for one in it.workers[1].asked if "tree" in one]
        assert asked == ["GET /ui/tree?nodes=500&instance=0", "GET /ui/tree?nodes=7&instance=1"]
        assert not [one for one in it.workers[0].asked if "tree" in one]
        assert (await it.http.get("/ui/tree?instance=9")).status_code == 404
        assert (await it.http.get("/ui/tree?instance=1&nodes=none")).status_code == 400
        await it.workers[0].stop()
        assert (await it.http.get("/ui/tree?instance=1")).status_code == 503

    run_routed(case, lambda: telling("a"), lambda: telling("b"))


def test_the_page_is_open_and_data_needs_the_key_that_goes_on_to_workers() -> None:
    async def case(it: Routed) -> None:
        assert (await it.http.get("/ui")).status_code == 200
        for path in ("/ui/state", "/ui/tree?instance=1"):
            assert (await it.http.get(path)).status_code == 401
            assert (await it.http.get(path, headers=KEY)).status_code == 200
            assert it.workers[0].headers[-1]["authorization"] == "Bearer key"
            strange = await it.http.get(path, headers=KEY | {"origin": "http://evil.example"})
            assert strange.status_code == 403

    run_routed(case, lambda: telling("a"), api_key="key")
