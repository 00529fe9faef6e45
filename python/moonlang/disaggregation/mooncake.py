"""Transfer by Mooncake: RDMA, TCP, or from memory to memory on one host. See mooncake.kv_transfer."""

from __future__ import annotations

from moonlang.mooncake.kv_transfer import open_transfer

BACKEND = open_transfer
