"""How the Mooncake store is to be reached, from three places: the extra config, a JSON file, the environment.

For every key the first that has it wins, in this order: --hicache-storage-backend-extra-config, the file named by
SGLANG_HICACHE_MOONCAKE_CONFIG_PATH, the environment, the default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moonlang.base.errors import ConfigError
from moonlang.base.units import parse_bytes
from moonlang.mooncake import config
from moonlang.mooncake.config import Hardware, MooncakeConfig

STORE_CONFIG_PATH: Final = "SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"
_KEYS: Final[Mapping[str, str]] = {
    "local_hostname": "MOONCAKE_LOCAL_HOSTNAME",
    "metadata_server": "MOONCAKE_TE_META_DATA_SERVER",
    "master_server_address": "MOONCAKE_MASTER",
    "global_segment_size": "MOONCAKE_GLOBAL_SEGMENT_SIZE",
    "local_buffer_size": "MOONCAKE_LOCAL_BUFFER_SIZE",
    "protocol": "MOONCAKE_PROTOCOL",
    "device_name": "MOONCAKE_DEVICE",
    "tenant_id": "MOONCAKE_TENANT_ID",
    "standalone_storage": "MOONCAKE_STANDALONE_STORAGE",
    "client_server_address": "MOONCAKE_CLIENT",
    "enable_ssd_offload": "MOONCAKE_ENABLE_SSD_OFFLOAD",
    "ssd_offload_path": "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH",
}
# Legal in the same places and without a meaning here: SGLang's own, and those of other programs that share the file.
_OTHERS: Final = frozenset(
    """
    backend_name check_server enable_group_semantics extra_backend_tag hicache_storage_pass_prefix_keys interface_v1
    master_metrics_port prefetch_threshold prefetch_timeout_base prefetch_timeout_per_ki_token storage_root_dir
    tp_lcm_size
    """.split()
)
_DEFAULTS: Final[Mapping[str, Any]] = {
    "global_segment_size": "4gb",
    "local_buffer_size": "16mb",
    "tenant_id": "default",
}
_LEAST_SEGMENT: Final = 16 << 20  # the library refuses less
_HOW = (
    "Start one with `mooncake_master`, and name it by MOONCAKE_MASTER=HOST:50051 or by "
    '--hicache-storage-backend-extra-config \'{"master_server_address": "HOST:50051"}\'.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Checked and complete. segment_bytes: memory this process contributes to the store, 0: none.

    client: address of a `mooncake_client` on this host that is to be used instead of one in this process; "": none.
    """

    transfer: MooncakeConfig
    master: str
    segment_bytes: int
    buffer_bytes: int
    tenant: str = "default"
    client: str = ""
    ssd_path: str = ""


def read(extra: Mapping[str, Any], environ: Mapping[str, str], hardware: Hardware, *, host: str) -> StoreConfig:
    """Put the configuration together; ConfigError names the key and what it may be. host: where this process is."""
    values: dict[str, Any] = dict(_DEFAULTS)
    for key, name in _KEYS.items():
        if environ.get(name):
            values[key] = environ[name]
    path = environ.get(STORE_CONFIG_PATH)
    if path:
        values |= _known(_file(Path(path)), path)
    values |= _known(extra, "--hicache-storage-backend-extra-config")
    client = str(values.get("client_server_address", "")) if _truth(values, "standalone_storage") else ""
    master = str(values.get("master_server_address", ""))
    if not master and not client:
        raise ConfigError("The Mooncake store needs the address of its master.", hint=_HOW)
    segment = parse_bytes(_number(values["global_segment_size"]), "global_segment_size")
    if 0 < segment < _LEAST_SEGMENT:
        raise ConfigError(
            f"global_segment_size is {segment} bytes.",
            hint=f"Use 0 to contribute no memory to the store, or at least {_LEAST_SEGMENT} bytes (16mb).",
        )
    return StoreConfig(
        transfer=_transfer(values, hardware, host),
        master=master,
        segment_bytes=segment,
        buffer_bytes=parse_bytes(_number(values["local_buffer_size"]), "local_buffer_size"),
        tenant=str(values["tenant_id"]),
        client=client,
        ssd_path=str(values.get("ssd_offload_path", "")) if _truth(values, "enable_ssd_offload") else "",
    )


def _transfer(values: Mapping[str, Any], hardware: Hardware, host: str) -> MooncakeConfig:
    """The part that PD knows too, by its rules."""
    names = {name: str(values[key]) for key, (name, *_) in config.KEYS.items() if values.get(key)}
    return config.read(names, hardware, host=host)


def _known(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    unknown = sorted(given.keys() - _KEYS.keys() - _OTHERS)
    if unknown:
        raise ConfigError(
            f"{source} has unknown keys: {', '.join(unknown)}.", hint=f"Legal keys: {', '.join(sorted(_KEYS))}."
        )
    return {key: value for key, value in given.items() if key in _KEYS and value is not None}


def _file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.", hint=f"Correct {STORE_CONFIG_PATH}, or unset it."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object.")
    return content


def _number(value: Any) -> Any:
    """What the environment gives as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _truth(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    return value if isinstance(value, bool) else str(value).lower() in ("1", "true", "yes", "on")
