"""What the doctor says of what RDMA and Mooncake want of the machine: cards, locked memory, ports, segments."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from moonlang.cli.check import Check
from moonlang.mooncake.engine import MIN_PORTS

# The range in which Mooncake draws its ports unless MC_MIN_RPC_PORT and MC_MAX_RPC_PORT say another.
PORTS = (15000, 17000)
_SEGMENT = re.compile(r"mcss_(\d+)_")
_UNSET_GID = re.compile(r"[0:]*")


def run(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Iterator[Check]:
    """root: where /sys, /proc and /dev are; other than / in tests."""
    cards = list(_cards(root / "sys/class/infiniband"))
    yield from cards or [Check("rdma", "ok", "no card; transfers between hosts go through TCP")]
    yield _locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], needed=bool(cards))
    yield _ports(environ, root / "proc/net")
    yield _segments(root / "dev/shm", root / "proc")


def _cards(folder: Path) -> Iterator[Check]:
    """One line per port of each card: its state, and the addresses (GIDs) under which peers reach it."""
    for card in sorted(folder.iterdir()) if folder.is_dir() else ():
        for port in sorted((card / "ports").iterdir()):
            yield _card_port(f"rdma {card.name}:{port.name}", port)


def _card_port(name: str, port: Path) -> Check:
    state = _word(port / "state").rpartition(" ")[2]  # "4: ACTIVE"
    layer = _word(port / "link_layer")
    gids = sorted((port / "gids").iterdir(), key=lambda file: int(file.name))
    used = [file.name for file in gids if not _UNSET_GID.fullmatch(_word(file))]
    kinds = [f"{index} {_word(port / 'gid_attrs/types' / index) or '?'}" for index in used]
    text = f"{state or 'unknown'}, {layer or 'unknown layer'}, GIDs: {', '.join(kinds) or 'none'}"
    if state != "ACTIVE":
        fix = "Plug in its cable and bring the link up (`ip link set DEVICE up`), or name another card."
        return Check(name, "warning", text, fix)
    if not used:
        return Check(name, "warning", text, "Give the network device of this port an IP address: that makes its GIDs.")
    return Check(name, "ok", text)


def _locked_memory(limit: int, *, needed: bool) -> Check:
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "no limit")
    text = f"at most {limit / (1 << 20):.0f} MiB"
    if not needed:
        return Check("locked memory", "ok", f"{text}; matters to RDMA only")
    fix = "RDMA pins the whole KV pool: `ulimit -l unlimited`, or in a container --ulimit memlock=-1."
    return Check("locked memory", "warning", text, fix)


def _ports(environ: Mapping[str, str], net: Path) -> Check:
    """How many of the ports that Mooncake draws from are free."""
    words = [environ.get("MC_MIN_RPC_PORT", ""), environ.get("MC_MAX_RPC_PORT", "")]
    low, high = (int(word) if word.isdigit() else usual for word, usual in zip(words, PORTS, strict=True))
    free = max(0, high - low + 1) - len({port for port in _taken(net) if low <= port <= high})
    text = f"{free} of {low} to {high} are free"
    if free < MIN_PORTS:
        fix = f"A process takes four, and those of a crash for a minute: give MC_MIN_RPC_PORT and MC_MAX_RPC_PORT more \
than {MIN_PORTS}."
        return Check("mooncake ports", "warning", text, fix)
    return Check("mooncake ports", "ok", text)


def _taken(net: Path) -> Iterator[int]:
    """Local ports of all TCP sockets, whatever their state; a port in TIME_WAIT cannot be bound either."""
    for file in (net / "tcp", net / "tcp6"):
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            yield int(line.split()[1].rpartition(":")[2], 16)


def _segments(shm: Path, proc: Path) -> Check:
    """Files of Mooncake's SharedSegment whose owner was killed. Ours have no name, but other engines' may lie here."""
    left = []
    for file in sorted(shm.glob("mcss_*")) if shm.is_dir() else ():
        owner = _SEGMENT.match(file.name)
        if owner and not (proc / owner[1]).exists():
            left.append(file)
    if not left:
        return Check("segments", "ok", f"no segment of a dead process in {shm}")
    size = sum(file.stat().st_size for file in left) / (1 << 20)
    text = f"{len(left)} segments of dead processes hold {size:.0f} MiB in {shm}"
    shown = " ".join(map(str, left[:8]))
    return Check("segments", "warning", text, f"If no container shares {shm} with this one: rm {shown}")


def _word(file: Path) -> str:
    """The content of a small file; "" when it cannot be read, as the attributes of a GID that is not set."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
