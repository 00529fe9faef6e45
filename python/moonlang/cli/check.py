"""One line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """failed: a server cannot start. warning: it can, with less speed or fewer features. `fix` says what to do."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    fix: str = ""
