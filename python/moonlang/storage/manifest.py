"""What is stored with a page, so that nobody ever reads another page's bytes, stale ones or damaged ones.

The header lies before the page in the same object: magic and version, size of the page, digest of the schema (weights,
dtype, layout), key of the page, checksum of its bytes and the method it was taken with, the shards that lie one after
the other (one for each rank of the writer that has heads of its own), checksum of the header.
"""

from __future__ import annotations

import struct
import zlib
from enum import StrEnum

from moonlang.core.page_key import KEY_BYTES

HEADER_BYTES = 128
_LAYOUT = struct.Struct("<8sQ32s32s8sQI")  # magic, page bytes, schema digest, key, checksum method, checksum, shards
_CRC = struct.Struct("<I")
_MAGIC = b"MLpage\x00\x02"


class Fault(StrEnum):
    """Why a page must not be used. The names are metric labels, in small letters."""

    HEADER = "its header is damaged"
    VERSION = "it was written by another version"
    SCHEMA = "it belongs to another model, dtype or layout"
    KEY = "it is another page"
    METHOD = "its checksum was taken by a method that is not available here"
    CHECKSUM = "its checksum does not hold"


class Manifest:
    """Writes and checks the headers of one pool's pages. digest: KvSchema.digest() of a whole page; shards: how many
    it is cut into here."""

    def __init__(self, digest: str, page_bytes: int, method: str, shards: int) -> None:
        self._digest = bytes.fromhex(digest)
        self._page_bytes = page_bytes
        self._shards = shards
        self._method = method.encode()[:8].ljust(8, b"\0")

    def header(self, key: bytes, checksum: int) -> bytes:
        """HEADER_BYTES to store before the page."""
        assert len(key) == KEY_BYTES
        body = _LAYOUT.pack(_MAGIC, self._page_bytes, self._digest, key, self._method, checksum, self._shards)
        return (body + _CRC.pack(zlib.crc32(body))).ljust(HEADER_BYTES, b"\0")

    def fault(self, header: bytes, key: bytes, checksum: int) -> Fault | None:
        """Why a page that was read with this header must not be used; None when it may.

        checksum: of the bytes as they lie in memory now.
        """
        body = header[: _LAYOUT.size]
        if len(header) < HEADER_BYTES or _CRC.unpack_from(header, _LAYOUT.size)[0] != zlib.crc32(body):
            return Fault.HEADER
        magic, size, digest, stored_key, method, stored, _ = _LAYOUT.unpack(body)
        if magic != _MAGIC:
            return Fault.VERSION
        if digest != self._digest or size != self._page_bytes:
            return Fault.SCHEMA
        if stored_key != key:
            return Fault.KEY
        if method != self._method:
            return Fault.METHOD
        return None if stored == checksum else Fault.CHECKSUM


def shards(header: bytes) -> int:
    """How the page behind a header without fault is cut."""
    return int(_LAYOUT.unpack(header[: _LAYOUT.size])[-1])
