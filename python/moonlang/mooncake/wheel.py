"""The calls of Mooncake's transfer engine that MoonLang uses, as the wheel has them. `engine` knows how to use them."""

from __future__ import annotations

from typing import Final, Protocol

PENDING: Final = 0
DONE: Final = 1
FAILED: Final = -1
TIMED_OUT: Final = -2  # given up by the library; the handle lives on
NO_HANDLES: Final = (0, (1 << 64) - 1)  # what a submit that failed returns


class Wheel(Protocol):
    """One transfer engine of the wheel. Results are 0 for success unless said otherwise."""

    def initialize(self, local_name: str, metadata_server: str, protocol: str, device_name: str, /) -> int: ...

    def get_rpc_port(self) -> int: ...

    def register_memory(self, address: int, size: int, /) -> int: ...

    def unregister_memory(self, address: int, /) -> int: ...

    def transfer_sync_read(self, peer: str, local: int, remote: int, size: int, /) -> int: ...

    def transfer_submit_write(self, peer: str, local: int, remote: int, size: int, /) -> int:
        """A handle, or one of NO_HANDLES."""
        ...

    def transfer_check_status(self, handle: int, /) -> int:
        """PENDING, DONE, FAILED or TIMED_OUT. The first DONE or FAILED frees the handle: never ask again."""
        ...
