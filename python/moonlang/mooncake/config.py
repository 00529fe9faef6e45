"""How Mooncake is to be set up here: from flags, mooncake.json and environment variables to one frozen value.

For every key the first that has it wins: a flag, the file named by MOONCAKE_CONFIG_PATH, the environment, the default.
Pure, apart from reading that file: what there is on this machine comes in as `Hardware`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from moonlang.base.errors import ConfigError

P2P: Final = "P2PHANDSHAKE"  # no metadata server: peers are found by address
CONFIG_PATH: Final = "MOONCAKE_CONFIG_PATH"
Protocol = Literal["tcp", "rdma"]
PROTOCOLS: Final = get_args(Protocol)

# Key of mooncake.json -> environment variables that mean the same.
KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "local_hostname": ("MOONCAKE_LOCAL_HOSTNAME", "LOCAL_HOSTNAME"),
    "metadata_server": ("MOONCAKE_TE_META_DATA_SERVER",),
    "protocol": ("MOONCAKE_PROTOCOL",),
    "device_name": ("MOONCAKE_DEVICE",),
}
# Keys of the same file that belong to the store: legal here, and read where the store is set up.
STORE_KEYS: Final = frozenset(
    """
    check_server client_server_address enable_group_semantics enable_ssd_offload global_segment_size local_buffer_size
    master_metrics_port master_server_address ssd_offload_path standalone_storage storage_root_dir tenant_id
    """.split()
)

_ADDRESS = re.compile(r"^[\w.-]+:\d{1,5}$|^\[[\da-fA-F:.]+\]:\d{1,5}$")
_HTTP = re.compile(r"^https?://[^\s/]+(/\S*)?$")
_METADATA_EXAMPLES = f"Use {P2P} (no server), http://HOST:PORT/metadata, or etcd://HOST:2379 (several: with commas)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What there is on this machine. infiniband: names of the network cards that can do RDMA."""

    infiniband: tuple[str, ...] = ()
    verbs: bool = False  # libibverbs can be loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeConfig:
    """Checked and complete. device_name: comma list of network cards, "" for all of them."""

    local_hostname: str
    metadata_server: str = P2P
    protocol: Protocol = "tcp"
    device_name: str = ""

    @property
    def metadata_kind(self) -> str:
        """ "p2p", or the scheme of the metadata server: "http", "https", "etcd", "redis"."""
        return "p2p" if self.metadata_server == P2P else self.metadata_server.partition("://")[0]


def read(
    environ: Mapping[str, str],
    hardware: Hardware,
    *,
    host: str,
    ib_device: str | None = None,
    rank: int = 0,
    force_tcp: bool = False,
) -> MooncakeConfig:
    """Put the configuration of this process together; ConfigError names the key, its source and the legal values.

    host: where peers reach this process when nothing else is said. ib_device: --disaggregation-ib-device or
    --mooncake-ib-device, for the accelerator `rank`. force_tcp: backend mooncake_tcp.
    """
    given = _values(environ)
    if ib_device is not None:
        given["device_name"] = ib_device, "the flag for network cards"
    devices = _devices(*given["device_name"], rank) if "device_name" in given else ()
    if force_tcp or environ.get("MC_FORCE_TCP") == "1":
        protocol, devices = "tcp", ()
    else:
        protocol = _protocol(given, devices, hardware)
    if protocol == "rdma":
        _check_rdma(devices, hardware)
    name, source = given.get("local_hostname", (host, "the default"))
    if not name or any(c.isspace() or c in "/@," for c in name):
        raise ConfigError(f"local_hostname {name!r} of {source} is not a host.", hint="Give a name or an IP address.")
    return MooncakeConfig(
        local_hostname=name,
        metadata_server=metadata_server(*given.get("metadata_server", (P2P, "the default"))),
        protocol=protocol,
        device_name=",".join(devices) if protocol == "rdma" else "",
    )


def metadata_server(text: str, source: str = "the caller") -> str:
    """Normal form of a metadata server: P2PHANDSHAKE, http(s)://..., etcd://a:1,b:2 or redis://a:1."""
    text = text.strip()
    if not text or text.upper() == P2P:
        return P2P
    scheme, separator, rest = text.partition("://")
    if separator and scheme in ("http", "https") and _HTTP.match(text):
        return text
    if not separator:
        scheme, rest = "etcd", text
    addresses = [part.removeprefix("etcd://") for part in re.split("[,;]", rest)]
    if scheme in ("etcd", "redis") and all(map(_ADDRESS.match, addresses)):
        return f"{scheme}://{','.join(addresses)}"
    raise ConfigError(f"metadata_server {text!r} of {source} is not understood.", hint=_METADATA_EXAMPLES)


def _values(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Key -> (value, where it came from)."""
    found: dict[str, tuple[str, str]] = {}
    for key, names in KEYS.items():
        for name in names:
            if environ.get(name):
                found.setdefault(key, (environ[name], f"the environment variable {name}"))
    path = environ.get(CONFIG_PATH)
    if path:
        for key, value in _file(Path(path)).items():
            if not isinstance(value, str) and key != "device_name":
                raise ConfigError(f"{key} in {path} must be a string, got {value!r}.")
            found[key] = value if isinstance(value, str) else json.dumps(value), path
    return found


def _file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path} cannot be read: {reason}.", hint=f"Correct {CONFIG_PATH}, or unset it.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    legal = f"Legal keys: {', '.join([*KEYS, *sorted(STORE_KEYS)])}."
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object.", hint=legal)
    if unknown := sorted(content.keys() - KEYS.keys() - STORE_KEYS):
        raise ConfigError(f"{path} has unknown keys: {', '.join(unknown)}.", hint=legal)
    return {key: value for key, value in content.items() if key in KEYS and value not in ("", None)}


def _devices(text: str, source: str, rank: int) -> tuple[str, ...]:
    """Network cards for one accelerator: "a,b", or JSON {"0": "a", "1": "b,c"}, or a file that holds such JSON."""
    text = text.strip()
    if text.endswith(".json"):
        source = text
        try:
            text = Path(text).read_text()
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror}.") from error
    if text.lstrip().startswith("{"):
        try:
            by_rank = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"The network cards of {source} are not JSON: {error}.") from error
        if str(rank) not in by_rank:
            raise ConfigError(f"The network cards of {source} say nothing of accelerator {rank}.")
        text = str(by_rank[str(rank)])
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _protocol(given: Mapping[str, tuple[str, str]], devices: tuple[str, ...], hardware: Hardware) -> Protocol:
    """As said; otherwise RDMA where cards are named or present."""
    if "protocol" not in given:
        return "rdma" if devices or (hardware.infiniband and hardware.verbs) else "tcp"
    text, source = given["protocol"]
    for legal in PROTOCOLS:
        if text.strip().lower() == legal:
            return legal
    raise ConfigError(f"protocol {text!r} of {source} is not supported.", hint=f"Use one of: {', '.join(PROTOCOLS)}.")


def _check_rdma(devices: tuple[str, ...], hardware: Hardware) -> None:
    use_tcp = 'Or set "protocol": "tcp" (MOONCAKE_PROTOCOL=tcp) and name no network card.'
    if not hardware.verbs:
        raise ConfigError("RDMA needs libibverbs.", hint=f"Run `apt-get install libibverbs1`. {use_tcp}")
    if not hardware.infiniband:
        text = "RDMA needs a network card that can do it, and /sys/class/infiniband has none."
        raise ConfigError(text, hint=f"Load the card's driver. {use_tcp}")
    if unknown := [name for name in devices if name not in hardware.infiniband]:
        text = f"There is no network card {', '.join(unknown)}."
        raise ConfigError(text, hint=f"There are: {', '.join(hardware.infiniband)}. {use_tcp}")
