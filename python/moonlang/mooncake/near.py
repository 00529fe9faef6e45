"""Objects of the store that lie in the memory of this process, and can be copied from there.

The library copies them too, but says nothing of their bytes: those would have to be read again for their checksums.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from moonlang.mooncake import lib, segment

_OK = 0
_PROOF_BYTES = 64


class Near:
    """`store`: a client that is set up and contributes a segment. placement: puts objects into it."""

    def __init__(self, store: Any, placement: Any) -> None:
        self._store = store
        self._complete = lib.complete()
        self._endpoint = ""  # what the store calls this process; "": nothing is near
        self._range: segment.Range = (0, 0)
        self._find(placement)

    def addresses(self, names: Sequence[str], size: int) -> list[int]:
        """Where the first of these objects lie whole, as far as they are here. The store leases them to us for a while;
        what is overwritten after that fails its check like anything else."""
        found: list[int] = []
        if self._endpoint:
            replicas = self._store.batch_get_replica_desc(list(names))
            for name in names:
                address = next((at for at in self._places(replicas.get(name, ()), size)), None)
                if address is None:
                    break
                found.append(address)
        return found

    def _places(self, replicas: Sequence[Any], size: int) -> Iterator[int]:
        start, end = self._range
        for replica in replicas:
            if self._is_readable(replica):
                place = replica.get_memory_descriptor().buffer_descriptor
                at = int(place.buffer_address)
                if place.transport_endpoint == self._endpoint and place.size == size and start <= at <= end - size:
                    yield at

    def _is_readable(self, replica: Any) -> bool:
        return replica.is_memory_replica() and replica.status == self._complete

    def _find(self, placement: Any) -> None:
        """Ask about an object that is put here. Its bytes prove that it is: an address alone may be another's."""
        name, content = f"moonlang-near-{uuid.uuid4().hex}", os.urandom(_PROOF_BYTES)
        if self._store.put(name, content, placement) != _OK:
            return
        ranges = segment.mapped()
        for replica in self._store.batch_get_replica_desc([name]).get(name, ()):
            if not self._is_readable(replica):
                continue
            place = replica.get_memory_descriptor().buffer_descriptor
            at = int(place.buffer_address)
            around = next((one for one in ranges if one[0] <= at <= one[1] - _PROOF_BYTES), None)
            if around is not None and ctypes.string_at(at, _PROOF_BYTES) == content:
                self._endpoint, self._range = place.transport_endpoint, around
        self._store.remove(name, True)
