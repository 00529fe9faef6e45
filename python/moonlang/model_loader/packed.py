"""Which packed weights belong to a checkpoint: the key under which `sgl_kernel.cache` keeps them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import msgspec
import sgl_kernel
from sgl_kernel.cache import PackedCache, PackedWeights, Unkept

from moonlang.base.errors import BugError
from moonlang.config.model_config import ModelConfig
from moonlang.model_loader.checkpoint import safetensors_files
from moonlang.model_loader.identity import content_id

_WORTH_BYTES = 64 << 20  # smaller checkpoints are packed faster than a file is found and verified
_CODE = ("sgl_kernel", "moonlang.kernels", "moonlang.layers", "moonlang.models", "moonlang.model_loader")


def packed_weights(
    config: ModelConfig, load_format: str, cache: PackedCache | None = None, worth_bytes: int = _WORTH_BYTES
) -> PackedWeights:
    """The packed weights of a checkpoint from the cache, or those that are to be packed and kept there.

    cache: the user's when None. Checkpoints of less than `worth_bytes`, and random weights, are packed every time.
    """
    cache = cache or PackedCache()
    if load_format == "dummy" or cache.limit_bytes <= 0:
        return Unkept()
    files = safetensors_files(config.path)
    if sum(path.stat().st_size for path in files) < worth_bytes:
        return Unkept()
    key = _key(config, files, cache.folder)
    return cache.open(key, confirm=lambda: _key(config, files, cache.folder) == key)


def _key(config: ModelConfig, files: list[Path], records: Path) -> str:
    """Hex SHA-256 of everything that decides the bytes: the content of the checkpoint and its config.json, the dtype
    and quantisation asked for, the shard and the stage, the instruction set, and the code that makes them."""
    experts = config.expert_shard, config.copied_experts, config.expert_slots
    held = (config.shard, experts, config.stage, config.dense_whole)
    settings = (config.hf, config.dtype, config.quantization, held, sgl_kernel.isa())
    digest = hashlib.sha256(msgspec.json.encode(settings, order="deterministic"))
    for path in files:
        digest.update(f" {path.name} {content_id(path, records)}".encode())
    for package in _CODE:
        digest.update(_code(package))
    return digest.hexdigest()


def _code(package: str) -> bytes:
    """The digest of a package's modules, compiled ones included."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BugError(f"{package} has no files.")
    digest = hashlib.sha256()
    folder = Path(spec.origin).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.so")]):
        digest.update(f"{path.relative_to(folder)} ".encode())
        digest.update(path.read_bytes())
    return digest.digest()
