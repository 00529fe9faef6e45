"""What a grammar engine must know of a tokenizer, read from tokenizer.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """tokens: by id, "" where an id has none. encoding: how tokens spell bytes. prefix_space: " " goes before text."""

    tokens: list[str]
    encoding: Literal["byte_level", "byte_fallback"]
    prefix_space: bool


def read_vocabulary(folder: str, vocab_size: int) -> Vocabulary | None:
    """The vocabulary of the tokenizer in `folder`, cut or padded to the model's `vocab_size`.

    None when tokenizer.json is missing or spells its tokens in neither of the two known ways.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    spec = json.loads(path.read_text("utf-8"))
    decoder = {part.get("type") for part in _parts(spec.get("decoder"), "decoders")}
    vocab = spec.get("model", {}).get("vocab")
    if not isinstance(vocab, dict) or not decoder & {"ByteLevel", "ByteFallback"}:
        return None
    tokens = [""] * vocab_size
    entries = [*vocab.items(), *((added["content"], added["id"]) for added in spec.get("added_tokens", ()))]
    for token, index in entries:
        if index < vocab_size:
            tokens[index] = token
    return Vocabulary(
        tokens=tokens,
        encoding="byte_level" if "ByteLevel" in decoder else "byte_fallback",
        prefix_space=_prefix_space(spec),
    )


def _parts(section: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A pipeline stage of tokenizer.json as a list: a Sequence is taken apart."""
    if section is None:
        return []
    return section[name] if section.get("type") == "Sequence" else [section]


def _prefix_space(spec: dict[str, Any]) -> bool:
    before = _parts(spec.get("pre_tokenizer"), "pretokenizers")
    normal = _parts(spec.get("normalizer"), "normalizers")
    return any(
        (part.get("type") == "ByteLevel" and part.get("add_prefix_space", False))
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        or part.get("type") == "Prepend"
        for part in [*before, *normal]
    )
