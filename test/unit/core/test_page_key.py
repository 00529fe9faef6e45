"""Page keys are SGLang's page hashes: others compute them too, so they must never change."""

from __future__ import annotations

from hashlib import sha256

import pytest

from moonlang.core.page_key import PageKeys, namespace, next_key, prompt_key


def test_the_chain_is_sha256_over_the_previous_key_and_little_endian_token_ids() -> None:
    first = sha256(bytes([1, 0, 0, 0, 2, 1, 0, 0])).digest()
    second = sha256(first + bytes([3, 0, 0, 0, 255, 255, 255, 255])).digest()
    assert PageKeys(2).upto([1, 258, 3, 0xFFFFFFFF, 9], 2) == [first, second]
    assert next_key(first, [3, 0xFFFFFFFF]) == second


def test_a_growing_sequence_keeps_its_keys() -> None:
    tokens = list(range(40))
    keys = PageKeys(4, "lora-a")
    grown = [keys.upto(tokens[:length], length // 4) for length in range(0, 41, 5)]
    whole = PageKeys(4, "lora-a").upto(tokens, 10)
    assert all(part == whole[: len(part)] for part in grown)
    assert len(dict.fromkeys(whole)) == 10


@pytest.mark.parametrize("extra_key", ["", "a", "b"])
def test_keys_of_other_namespaces_tokens_or_lengths_differ(extra_key: str) -> None:
    key = prompt_key([1, 2, 3], extra_key)
    others = [prompt_key([1, 2, 3], other) for other in ("", "a", "b") if other != extra_key]
    others += [prompt_key(tokens, extra_key) for tokens in ([1, 2], [1, 2, 4], [1, 2, 3, 0], [])]
    assert key not in others
    assert (namespace(extra_key) == b"") == (extra_key == "")
