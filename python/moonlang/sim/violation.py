"""What a run of the simulator ends with when something is wrong."""

from __future__ import annotations


class Violation(Exception):  # noqa: N818 - a finding, not a fault of the program
    """A property does not hold. `checker` names the file in `sim/checkers` (or "executor", "crash") that saw it."""

    def __init__(self, checker: str, message: str) -> None:
        super().__init__(checker, message)
        self.checker = checker
        self.message = message

    def __str__(self) -> str:
        return f"{self.checker}: {self.message}"
