"""The hierarchical cache in arguments: what its flags may be, and the extra config of the storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moonlang.base.errors import ConfigError

if TYPE_CHECKING:
    from moonlang.config.server_args import ServerArgs

WRITE_POLICIES = ("write_through", "write_through_selective", "write_back")
PREFETCH_POLICIES = ("timeout", "best_effort", "wait_complete")
STORAGE_BACKENDS = ("file", "mooncake", "dynamic", "memory", "null")
DEFAULT_RATIO = 2.0

_FLAG = "--hicache-storage-backend-extra-config"


def extra_config(args: ServerArgs) -> dict[str, Any]:
    """The storage's own settings: JSON, or @ and a file of JSON or YAML."""
    text = args.hicache_storage_backend_extra_config
    if not text:
        return {}
    source = _FLAG
    if text.startswith("@"):
        source = text[1:]
        try:
            text = Path(source).read_text()
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror}.", hint=f"Correct {_FLAG}.") from error
    try:
        found = yaml.safe_load(text) if source.endswith((".yaml", ".yml")) else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{source} cannot be parsed: {error}.", hint="Give a JSON object.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{source} is not an object.", hint='For example: {"master_server_address": "HOST:50051"}.')
    return found


def check(args: ServerArgs, cuda: bool = False) -> None:
    """ConfigError when flags of the hierarchical cache contradict each other or others."""
    offloads = args.disaggregation_decode_enable_offload_kvcache
    if offloads and (args.disaggregation_mode != "decode" or args.hicache_storage_backend is None):
        raise ConfigError(
            "--disaggregation-decode-enable-offload-kvcache lets a decode server hand finished turns to a storage.",
            hint="Use it with --disaggregation-mode decode and --hicache-storage-backend; elsewhere leave it out.",
        )
    if not (args.enable_hierarchical_cache or offloads):
        if args.hicache_storage_backend is not None:
            raise ConfigError(
                "--hicache-storage-backend needs --enable-hierarchical-cache.", hint="Add it, or leave both out."
            )
        return
    if cuda:
        raise ConfigError(
            "--enable-hierarchical-cache works where the device pool is host memory: on a CPU.",
            hint="Leave it out, or add --device cpu.",
        )
    if args.disable_radix_cache:
        raise ConfigError(
            "--enable-hierarchical-cache keeps what the prefix cache holds, and --disable-radix-cache turns that off.",
            hint="Leave one of them out.",
        )
    if args.hicache_ratio is not None and args.hicache_ratio <= 1 and not args.hicache_size:
        raise ConfigError(
            f"--hicache-ratio {args.hicache_ratio:g} makes a host pool no larger than the device pool.",
            hint=f"Use more than 1 (the default is {DEFAULT_RATIO:g}), or --hicache-size in GB.",
        )
    if args.nnodes > 1:
        raise ConfigError(
            "--enable-hierarchical-cache moves the pages of all ranks from one process: they must share a host.",
            hint="Leave it out, or use --nnodes 1.",
        )
    extra_config(args)
