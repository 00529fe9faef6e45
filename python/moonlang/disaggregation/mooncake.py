"""Transfer by Mooncake: RDMA, TCP, or from memory to memory on one host. See mooncake.kv_transfer."""

from __future__ import annotations

from moonlang.mooncake.kv_transfer import how_to_get, open_transfer

BACKEND = open_transfer
PROBE = how_to_get
