"""Do two hosts reach each other, both ways, with messages and with data? `moonlang doctor --listen` on one of them,
`moonlang doctor --peer` on the other.

    peer    <-  Challenge   prove that you know the token
    asker   ->  Ask         here is the proof; call me back at this port; write to this card
    peer    <-  Answer      whether both went well; write to this card
    asker   ->  Wrote       what you should have now
    peer    <-  Arrived     whether I have it

Lines of JSON. The token never travels; whoever does not know it makes the listener do nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final, TypeVar

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError, MoonLangError, PeerError
from moonlang.cli.check import Check
from moonlang.mooncake import lib
from moonlang.mooncake.trial import BUFFER_BYTES, Card, Trial

WAIT_S: Final = 20.0  # for a line of the other side; a first contact and a slow network have room
CALL_BACK_S: Final = 5.0
MAX_LINE_BYTES: Final = 64 << 10
_TOKEN_BYTES = 12
FIREWALL: Final = "Let MC_MIN_RPC_PORT to MC_MAX_RPC_PORT, by default 15000 to 17000, through the firewalls."


class Challenge(msgspec.Struct, frozen=True):
    nonce: bytes


class Ask(msgspec.Struct, frozen=True):
    """proof: HMAC-SHA-256 of the nonce under the token. card: None where Mooncake is not usable."""

    proof: bytes
    port: int
    card: Card | None


class Answer(msgspec.Struct, frozen=True):
    """back: why the listener does not reach the asker, "" when it does. data: the same of data.
    seconds, digest: of the bytes that it wrote."""

    back: str
    data: str
    seconds: float
    digest: int
    card: Card | None


class Wrote(msgspec.Struct, frozen=True):
    digest: int


class Arrived(msgspec.Struct, frozen=True):
    ok: bool


_Line = TypeVar("_Line", bound=msgspec.Struct)


def address(text: str, *, listen: bool = False) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; with `listen` also of "PORT", which means all interfaces."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535 or not (host or listen):
        raise ConfigError(f"{text!r} is no address.", hint="Give HOST:PORT, as the other host's doctor has printed it.")
    return host.strip("[]") or "0.0.0.0", int(port)


class Listener:
    """Answers the doctors of other hosts."""

    def __init__(self, host: str, port: int, token: str) -> None:
        """ConfigError when it cannot listen there."""
        self.token = token
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {host}:{port}: {error.strerror}.", hint="Give another port."
            ) from error
        self.port: int = self._socket.getsockname()[1]

    def serve_one(self) -> str:
        """Wait for one doctor and answer it; what to tell the user."""
        connection, who = self._socket.accept()
        with closing(connection):
            connection.settimeout(WAIT_S)
            try:
                self._answer(_Lines(connection), who[0])
            except (OSError, MoonLangError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                return f"{who[0]}: {error}"
        return f"{who[0]}: answered"

    def close(self) -> None:
        self._socket.close()

    def _answer(self, lines: _Lines, asker: str) -> None:
        nonce = secrets.token_bytes(32)
        lines.write(Challenge(nonce))
        ask = lines.read(Ask)
        if not hmac.compare_digest(ask.proof, _proof(self.token, nonce)):
            raise PeerError("it does not know the token.")
        with _trial(lines.own_host) as trial:
            back = _call_back(asker, ask.port)
            data, seconds, digest = _write(trial, ask.card)
            lines.write(Answer(back, data, seconds, digest, trial.card if trial else None))
            if trial and ask.card:
                lines.write(Arrived(lines.read(Wrote).digest == trial.received()))


def checks(peer: str, token: str) -> Iterator[Check]:
    """The lines of the doctor about one peer. ConfigError for an address that is none."""
    host, port = address(peer)
    begin_ns = monotonic_ns()
    try:
        connection = socket.create_connection((host, port), CALL_BACK_S)
    except OSError as error:
        fix = "Run `moonlang doctor --listen` there, and let this port through its firewall."
        yield Check(f"to {peer}", "failed", f"cannot be reached: {error}", fix)
        return
    with closing(connection):
        connection.settimeout(WAIT_S)
        took_ms = (monotonic_ns() - begin_ns) / NS_PER_S * 1e3
        yield Check(f"to {peer}", "ok", f"connected in {took_ms:.1f} ms")
        try:
            yield from _ask(_Lines(connection), peer, token)
        except (OSError, MoonLangError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            fix = "Is it the address and the token that `moonlang doctor --listen` has printed there?"
            yield Check(f"from {peer}", "failed", f"it does not answer: {error or 'silence'}", fix)


def _ask(lines: _Lines, peer: str, token: str) -> Iterator[Check]:
    proof = _proof(token, lines.read(Challenge).nonce)
    with _trial(lines.own_host) as trial, socket.create_server((lines.own_host, 0), family=lines.family) as door:
        lines.write(Ask(proof, door.getsockname()[1], trial.card if trial else None))
        answer = lines.read(Answer)
        if answer.back:
            fix = f"Let connections from {peer} to {lines.own_host} through the firewall here."
            yield Check(f"from {peer}", "failed", f"cannot call back: {answer.back}", fix)
        else:
            yield Check(f"from {peer}", "ok", "calls back")
        if trial is None or answer.card is None:
            where = peer if trial else "this host"
            fix = f"Run `moonlang doctor` on {where}: it says what is missing."
            yield Check(f"data {peer}", "warning", f"not tried: Mooncake is not usable on {where}", fix)
            return
        yield _data(f"data from {peer}", answer.data, answer.seconds, arrived=trial.received() == answer.digest)
        why, seconds, digest = _write(trial, answer.card)
        lines.write(Wrote(digest))
        yield _data(f"data to {peer}", why, seconds, arrived=lines.read(Arrived).ok)


def _data(name: str, why: str, seconds: float, *, arrived: bool) -> Check:
    if why:
        return Check(name, "failed", why, FIREWALL)
    if not arrived:
        return Check(name, "failed", "other bytes arrived than were sent", "Do not use this network for KV pages.")
    rate = BUFFER_BYTES / seconds / 1e9
    return Check(name, "ok", f"{BUFFER_BYTES >> 20} MiB by Mooncake's transfer engine, verified, {rate:.2f} GB/s")


def _write(trial: Trial | None, card: Card | None) -> tuple[str, float, int]:
    """Why it failed, or ""; how long it took; the checksum of what should be there now."""
    if trial is None or card is None:
        return "not tried", 0.0, 0
    try:
        return "", *trial.write(card)
    except PeerError as error:
        return error.message, 0.0, 0


def _call_back(host: str, port: int) -> str:
    """Why the asker's door cannot be reached, or ""."""
    try:
        socket.create_connection((host, port), CALL_BACK_S).close()
    except OSError as error:
        return str(error)
    return ""


def _proof(token: str, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), nonce, hashlib.sha256)


@contextmanager
def _trial(host: str) -> Iterator[Trial | None]:
    """A Trial for as long as the block runs, or None where Mooncake is not usable."""
    if lib.how_to_get():
        yield None
        return
    with closing(Trial(host)) as trial:
        yield trial


class _Lines:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")
        self.family = connection.family
        self.own_host: str = connection.getsockname()[0]

    def write(self, line: msgspec.Struct) -> None:
        self._connection.sendall(msgspec.json.encode(line) + b"\n")

    def read(self, kind: type[_Line]) -> _Line:
        """PeerError at the end of the connection; msgspec.MsgspecError on anything else than such a line."""
        line = self._reader.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise PeerError("the connection has ended.")
        return msgspec.json.decode(line, type=kind)


def listen(where: str, token: str) -> int:
    """Answer doctors of other hosts until Ctrl-C; prints what to run there."""
    # In hexadecimals, for a command line takes a word that begins with "-" for a flag.
    listener = Listener(*address(where, listen=True), token or secrets.token_hex(_TOKEN_BYTES))
    host = socket.gethostname()
    print(f"On the other host: moonlang doctor --peer {host}:{listener.port} --token {listener.token}", flush=True)
    with closing(listener), suppress(KeyboardInterrupt):
        while True:
            print(listener.serve_one(), flush=True)
    return 0
