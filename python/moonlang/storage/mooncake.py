"""The Mooncake store. See mooncake.kv_store."""

from __future__ import annotations

from moonlang.mooncake.kv_store import open_store

BACKEND = open_store
