"""Transfer by Mooncake that leaves RDMA cards alone. See mooncake.kv_transfer."""

from __future__ import annotations

from moonlang.mooncake.kv_transfer import open_tcp_transfer

BACKEND = open_tcp_transfer
