"""What a stranger may send before it has proved anything: every malformed frame is a PeerError and nothing else."""

from __future__ import annotations

import random
import struct

import pytest

from moonlang.base.errors import PeerError
from moonlang.disaggregation.frames import MAX_GREETING_BYTES, Ask, Rejected, Unpacker, encode


def test_frames_come_out_however_the_bytes_are_cut() -> None:
    sent = [Ask(), Rejected("no"), Ask()]
    stream = b"".join(map(encode, sent))
    unpacker = Unpacker()
    assert [frame for byte in stream for frame in unpacker.feed(bytes([byte]))] == sent


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack("<I", MAX_GREETING_BYTES + 1),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        encode(Rejected("abcd")).replace(b"abcd", b"\xff\xfe\xfd\xfc"),  # a text that is not Unicode
        struct.pack("<I", 60_000) + b"\x91" * 60_000,  # nested without end
    ],
)
def test_malformed_frames_are_refused(bad: bytes) -> None:
    with pytest.raises(PeerError):
        Unpacker().feed(bad)


def test_damaged_frames_never_raise_anything_else() -> None:
    draw = random.Random(5)
    good = encode(Rejected("The page sizes differ: 16 here, 32 there."))
    for _ in range(5000):
        body = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        try:
            Unpacker().feed(bytes(body))
        except PeerError:
            continue
