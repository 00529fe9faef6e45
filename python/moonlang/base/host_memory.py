"""How much memory a process may still take on this machine."""

from __future__ import annotations

from pathlib import Path

from moonlang.base.errors import ConfigError


def free_bytes(root: Path = Path("/")) -> int:
    """The least of what the host and the process's control group (a container's) leave. root: other than / in tests."""
    return max(0, min([_host_available(root), *_cgroup_left(root)]))


def _host_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable.", hint="Set --max-total-tokens.")


def _cgroup_left(root: Path) -> list[int]:
    """Limit less use of the process's control group, version 2 or 1; nothing when there is no limit."""
    group = root / "sys/fs/cgroup"
    files = [
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ]
    left = []
    for limit, use in files:
        if limit.is_file() and use.is_file() and (text := limit.read_text().strip()).isdigit():
            left.append(int(text) - int(use.read_text()))
    return left
