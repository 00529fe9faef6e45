"""Telling checkpoints apart, cheaply: pages computed by one model must never be read by another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.model_loader.checkpoint import safetensors_files

_SAMPLES = 64  # per file
_SAMPLE_BYTES = 4096


def fingerprint(config: ModelConfig, load_format: str = "auto", seed: int = 0) -> str:
    """Hex sha256 of what decides the numbers in a KV page, stable across hosts, paths and restarts.

    It covers config.json as resolved (overrides included), the dtype, how weights are quantised, and of each
    safetensors file its size, its header (names, shapes, dtypes) and 64 samples of 4 KiB spread evenly over its
    tensors: about a millisecond per file however large it is. A fine-tuned model differs everywhere and is told apart;
    a patch of a few weights between two samples is not, which `--revision` names or a changed config.json can make up
    for. Dummy weights are named by their seed.
    """
    digest = hashlib.sha256()
    method = config.quantization.method if config.quantization is not None else None
    digest.update(json.dumps([config.hf, config.dtype, method], sort_keys=True).encode())
    if load_format == "dummy":
        digest.update(f"dummy {seed}".encode())
        return digest.hexdigest()
    for path in safetensors_files(config.path):
        _add_file(digest, path)
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            raise ConfigError(f"{path} is cut short: {size} bytes.", hint="Fetch this file again.")
        digest.update(f"{path.name} {size} ".encode())
        digest.update(file.read(header))
        start = 8 + header
        step = max(_SAMPLE_BYTES, (size - start) // _SAMPLES)
        for at in range(start, size, step):
            file.seek(at)
            digest.update(file.read(_SAMPLE_BYTES))
