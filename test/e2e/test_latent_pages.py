"""DeepSeek-V3, whose pages hold latents: between servers of unequal ranks and through a store, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hicache_servers import PATIENT, PROMPT_TOKENS, CachedServer, prompt
from pd_servers import couple
from tiny_folder import write_tiny_folder

from moonlang.models import deepseek_v3

BODY = {"sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}, "return_logprob": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    changes = {"vocab_size": 258, "max_position_embeddings": 4096}
    folder = write_tiny_folder(tmp_path_factory.mktemp("deepseek"), **deepseek_v3.tiny() | changes)
    return ("--model-path", str(folder), "--load-format", "dummy")


@pytest.fixture(scope="module")
def server(model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CachedServer]:
    folder = tmp_path_factory.mktemp("store")
    with CachedServer(folder, *PATIENT, *model, backend="file", extra={"directory": str(folder / "pages")}) as one:
        yield one


def answer(found: dict[str, Any]) -> tuple[Any, ...]:
    return found["output_ids"], found["meta_info"]["output_token_logprobs"]


def test_a_pair_of_unequal_ranks(server: CachedServer, model: tuple[str, ...], tmp_path: Path) -> None:
    """Every rank of decode gets all of a page."""
    with couple(
        tmp_path, "mooncake", *model, prefill=("--chunked-prefill-size", "64"), decode=("--tp-size", "2")
    ) as both:
        for length in (5, 300):
            body = {"input_ids": prompt(length, length), **BODY}
            response = both.ask(body)
            assert response.status_code == 200, response.text
            assert answer(response.json()) == answer(server.http.post("/generate", json=body).json())
        both.wait_free()


def test_two_ranks_read_what_one_has_stored(server: CachedServer, model: tuple[str, ...], tmp_path: Path) -> None:
    cold = server.ask(prompt(1))
    server.settle()
    flags = (*PATIENT, *model, "--tp-size", "2")
    with CachedServer(tmp_path, *flags, backend="file", extra=server.extra) as two:
        found = two.ask(prompt(1))
        assert found.details["storage"] == PROMPT_TOKENS - 16
        assert found.same(cold)
