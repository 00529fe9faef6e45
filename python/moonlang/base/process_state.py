"""Whether another process of this host can run, as the kernel sees it."""

from __future__ import annotations

from pathlib import Path

_CANNOT_RUN = "TtZXx"  # stopped, traced, dead: see proc(5)


def can_run(pid: int) -> bool:
    """False when process `pid` is stopped or gone. True does not mean that it gets a core."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in _CANNOT_RUN
