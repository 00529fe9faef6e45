"""Bells wake ranks for a phase, and only for that one."""

from __future__ import annotations

import select
from pathlib import Path

from moonlang.distributed.bells import Bells


def test_a_bell_is_for_its_phase(tmp_path: Path) -> None:
    first, second = (Bells(str(tmp_path / "plans"), rank, 2) for rank in (0, 1))
    assert not second.heard(0)
    for phase in range(3):
        first.ring(phase)
        assert select.select([second], [], [], 5)[0]
        assert second.heard(phase)
        assert not second.heard(phase + 1)
        assert not select.select([second], [], [], 0)[0]  # what has been heard rings no more
    assert not first.heard(0)
    second.close()
    first.ring(3)  # nobody is there, which others say
    first.close()
    assert not list(tmp_path.iterdir())


def test_bells_that_nobody_listens_to_hold_up_nobody(tmp_path: Path) -> None:
    """A rank with work of its own does not wait, and its bells pile up until it does."""
    first, second = (Bells(str(tmp_path / "plans"), rank, 2) for rank in (0, 1))
    for phase in range(1000):
        first.ring(phase)
    assert second.heard(999)
    assert not second.heard(1000)
    second.close()
    first.close()
