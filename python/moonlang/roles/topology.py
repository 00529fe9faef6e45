"""Which roles an engine consists of and where their mailboxes are. Pure."""

from __future__ import annotations

from pathlib import PurePath

API = "api"  # the process that the user started; it owns the others
SCHEDULER = "scheduler"
DETOKENIZER = "detokenizer"

CHILDREN = (SCHEDULER, DETOKENIZER)  # in the order they are started: the slow one first
ROLES = (API, *CHILDREN)


def addresses(directory: PurePath) -> dict[str, str]:
    """The mailbox of every role as a socket in the run directory."""
    return {role: f"ipc://{directory / role}.sock" for role in ROLES}


def title(role: str) -> str:
    """The process title of a role."""
    return f"moonlang::{role}"
