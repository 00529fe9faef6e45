"""Transfer by Mooncake over TCP, also where there is RDMA or a shorter way. See mooncake.kv_transfer."""

from __future__ import annotations

from moonlang.mooncake.kv_transfer import open_tcp_transfer

BACKEND = open_tcp_transfer
