"""The Mooncake store. See mooncake.kv_store."""

from __future__ import annotations

from moonlang.mooncake.kv_store import how_to_get, open_store

BACKEND = open_store
PROBE = how_to_get
