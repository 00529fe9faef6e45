"""Pages whose layers lie in different stages: between the halves of a pair and through a store, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import pytest
from hicache_servers import PATIENT, PROMPT_TOKENS, prompt
from live_server import LiveServer, free_port
from pd_servers import Couple, PdServer
from ranked_answers import STORY, answers, sampled

PREFILLS = {"one rank": (), "two stages of two ranks": ("--pp-size", "2", "--tp-size", "2")}
DECODES = {"two stages": ("--pp-size", "2"), "two ranks": ("--tp-size", "2")}
PAIRS = [
    ("one rank", "two stages"),
    ("two stages of two ranks", "two ranks"),
    ("two stages of two ranks", "two stages"),
]


@dataclass(frozen=True)
class Servers:
    """Prefill servers with a hierarchical cache over one store, by name with the port that decode looks for; decode
    servers by name."""

    prefills: dict[str, tuple[PdServer, int]]
    decodes: dict[str, PdServer]

    def pair(self, prefill: str, decode: str) -> closing[Couple]:
        server, port = self.prefills[prefill]
        return closing(Couple(server, self.decodes[decode], port))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("stages")
    extra = json.dumps({"directory": str(folder / "store")})
    cached = ("--enable-hierarchical-cache", "--hicache-storage-backend", "file", *PATIENT)
    cached = (*cached, "--hicache-storage-backend-extra-config", extra, "--enable-cache-report")
    with ExitStack() as stack:
        prefills = {}
        for name, flags in PREFILLS.items():
            port = free_port()
            prefills[name] = PdServer(folder, "prefill", port, "mooncake", *cached, *flags), port
        decodes = {name: PdServer(folder, "decode", free_port(), "mooncake", *each) for name, each in DECODES.items()}
        for server in (*(one for one, _ in prefills.values()), *decodes.values()):
            stack.enter_context(server)
        yield Servers(prefills, decodes)


def paired(pair: Couple, body: dict[str, Any]) -> list[tuple[Any, ...]]:
    """As `answers` has them: prefill knows the prompt's log probabilities, decode those of the output."""
    first, second = (future.result() for future in pair.submit(body))
    assert first.status_code == second.status_code == 200, (first.text, second.text)
    prompt, output = first.json()["meta_info"], second.json()
    return [(output["output_ids"], output["meta_info"]["output_token_logprobs"], prompt["input_top_logprobs"])]


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_pairs_of_unequal_stages(server: LiveServer, servers: Servers, prefill: str, decode: str) -> None:
    bodies = [sampled(STORY * (i % 4) + f"Chapter {i}: ", temperature=i % 2, sampling_seed=i) for i in range(8)]
    with servers.pair(prefill, decode) as pair, ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: paired(pair, body), bodies))
        pair.wait_free()
    assert found == [answers(server, body) for body in bodies]


@pytest.mark.parametrize("names", [tuple(PREFILLS), tuple(reversed(PREFILLS))], ids=" to ".join)
def test_what_one_writes_the_other_reads(server: LiveServer, servers: Servers, names: tuple[str, str]) -> None:
    """Then decode gets pages that its prefill server has from the store."""
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt(len(names[0])), "sampling_params": params, "return_logprob": True}
    expected = answers(server, body)
    with servers.pair(names[0], "two stages") as writer, servers.pair(names[1], "two stages") as reader:
        first = [future.result().json() for future in writer.submit(body)]
        assert first[0]["meta_info"]["cached_tokens_details"]["storage"] == 0
        wait_stored(writer.prefill)
        second = [future.result().json() for future in reader.submit(body)]
    assert second[0]["meta_info"]["cached_tokens_details"]["storage"] == PROMPT_TOKENS - 16
    for at_decode in (first[1], second[1]):
        assert (at_decode["output_ids"], at_decode["meta_info"]["output_token_logprobs"]) == expected[0][:2]


def wait_stored(server: PdServer) -> None:
    """Until nothing is on its way to the store."""

    def is_moving() -> bool:
        tiers: dict[str, Any] = server.load()["tiers"]  # type: ignore[assignment]
        return bool(tiers["fetching"] or tiers["queued_pages"])

    server.wait_free()
    server.until(lambda: not is_moving())
