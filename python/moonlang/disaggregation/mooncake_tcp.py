"""Transfer by Mooncake over TCP, also where there is RDMA or a shorter way. See mooncake.kv_transfer."""

from __future__ import annotations

from moonlang.mooncake.kv_transfer import how_to_get, open_tcp_transfer

BACKEND = open_tcp_transfer
PROBE = how_to_get
