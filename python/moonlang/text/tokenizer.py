"""Text to token ids and back: the `tokenizers` library; `transformers` only where there is no tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from moonlang.base.errors import ConfigError, RequestError
from moonlang.text.pieces import Pieces

_PARALLEL_CHARS = 4096  # from here on encoding is worth a call that lets other threads run meanwhile
_AROUND_BY_CONFIG = ("Llama", "CodeLlama", "Gemma", "Cohere")  # classes that heed add_bos_token and add_eos_token
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer(Protocol):
    """What the server needs of a tokenizer. Safe to share between threads.

    special_tokens: texts of the tokens with a role ("bos_token", "eos_token", ...), as chat templates want them.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_tokens: dict[str, str]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def id_to_token(self, token: int) -> str | None: ...

    def token_to_id(self, text: str) -> int | None: ...

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """What each token stands for by itself; None when only whole texts can be decoded."""
        ...


class FastTokenizer:
    """A tokenizer.json with what tokenizer_config.json says about it."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"{folder}/tokenizer.json cannot be read: {error}.") from error
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = _special_tokens(folder, config)
        _add_tokens(backend, config, self.special_tokens)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._decoder = _decoder(backend)
        self._around = self._explicit(config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids. RequestError: not Unicode."""
        add_by_backend = add_special_tokens and self._around is None
        try:
            if len(text) < _PARALLEL_CHARS:
                ids = self._backend.encode(text, add_special_tokens=add_by_backend).ids
            else:
                ids = self._backend.encode_batch_fast([text], add_special_tokens=add_by_backend)[0].ids
        except TypeError as error:  # of all strings, the library refuses only these
            raise RequestError("The text holds a lone surrogate, which is not a character.") from error
        if add_special_tokens and self._around is not None:
            before, after = self._around
            return before + ids + after
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. Ids outside the vocabulary stand for nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token: int) -> str | None:
        return self._backend.id_to_token(token)

    def token_to_id(self, text: str) -> int | None:
        return self._backend.token_to_id(text)

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return Pieces.of(self._decoder, self._backend.id_to_token, skipped)

    def _explicit(self, config: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        """Ids around each text where the config has the say; None where the post-processor of tokenizer.json has it."""
        add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
        by_config = str(config.get("tokenizer_class", "")).startswith(_AROUND_BY_CONFIG)
        if not by_config or (add_bos is None and add_eos is None):
            return None
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_eos and self.eos_id is not None else []
        return before, after

    def _named_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self._backend.token_to_id(text)


class TransformersTokenizer:
    """Any tokenizer that only `transformers` can load: slow to import, and decoded by whole texts."""

    def __init__(self, folder: Path, *, trust_remote_code: bool, use_fast: bool) -> None:
        from transformers import AutoTokenizer

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, use_fast=use_fast
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"No tokenizer could be loaded from {folder}: {error}",
                hint="Give its folder by --tokenizer-path, or serve token ids with --skip-tokenizer-init.",
            ) from error
        self.vocab_size = len(self._inner)
        self.bos_id: int | None = self._inner.bos_token_id
        self.eos_id: int | None = self._inner.eos_token_id
        named = self._inner.special_tokens_map
        self.special_tokens = {role: str(named[role]) for role in _NAMED if named.get(role) is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._inner.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self._inner.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def id_to_token(self, token: int) -> str | None:
        return self._inner.convert_ids_to_tokens(token) if 0 <= token < self.vocab_size else None

    def token_to_id(self, text: str) -> int | None:
        return self._inner.get_vocab().get(text)

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        return None


def load_tokenizer(folder: str, trust_remote_code: bool = False, mode: str = "auto") -> Tokenizer:
    """The tokenizer in `folder`. mode "slow": the one of transformers, in Python. ConfigError when there is none."""
    path = Path(folder)
    if mode != "slow" and (path / "tokenizer.json").is_file():
        return FastTokenizer(path)
    return TransformersTokenizer(path, trust_remote_code=trust_remote_code, use_fast=mode != "slow")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a JSON object: {error}.") from error


def _text_of(token: Any) -> str | None:
    """A token in a config is a string or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Role -> text. special_tokens_map.json is what older checkpoints have."""
    merged = _read_json(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    texts = {role: _text_of(merged.get(role)) for role in _NAMED}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _add_tokens(backend: Backend, config: dict[str, Any], special: dict[str, str]) -> None:
    """Tokens that the config knows and tokenizer.json does not, or not as special."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    entries = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    for _, entry in entries:
        flags = {
            name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        if entry["content"] not in known:
            backend.add_tokens([AddedToken(entry["content"], **flags)])
            known[entry["content"]] = flags["special"]
    for text in special.values():
        if not known.get(text, False):
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _decoder(backend: Backend) -> dict[str, Any] | None:
    """The decoder section of the tokenizer. Its repr-like state is JSON."""
    if backend.decoder is None:
        return None
    return msgspec.json.decode(backend.decoder.__getstate__())
