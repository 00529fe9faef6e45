"""Mailboxes over rings in shared memory, and over Mooncake's transfer engine between hosts. See mooncake.endpoint."""

from __future__ import annotations

from moonlang.mooncake.endpoint import open_mailbox

BACKEND = open_mailbox
