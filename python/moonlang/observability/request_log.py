"""--log-requests and --enable-request-time-stats-logging: a line per request and event. Prompt text never appears."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from moonlang.core.messages import Generate

LEVEL_SAMPLING = 1  # from here on with the sampling parameters


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has ended. Times in seconds: waiting for admission, arrival to first token, arrival to end."""

    rid: str
    finish: str
    message: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float | None
    e2e_s: float


class RequestLog:
    """level: --log-requests-level, None without --log-requests. form: text or json. times: a line of times, too."""

    def __init__(self, logger: logging.Logger, level: int | None, form: str, *, times: bool = False) -> None:
        self._logger = logger
        self._level = level
        self._json = form == "json"
        self._times = times

    def received(self, message: Generate) -> None:
        if self._level is None:
            return
        fields: dict[str, Any] = {"rid": message.rid, "prompt_tokens": len(message.input_ids), "stream": message.stream}
        if self._level >= LEVEL_SAMPLING:
            fields["sampling_params"] = msgspec.to_builtins(message.sampling, str_keys=True)
        self._write("Receive", fields)

    def finished(self, end: Finished) -> None:
        fields = msgspec.to_builtins(end)
        times = {name: fields.pop(name) for name in ("queue_s", "first_token_s", "e2e_s")}
        if self._level is not None:
            self._write("Finish", fields)
        if self._times:
            shown = {name: value if value is None else round(value, 6) for name, value in times.items()}
            self._write("Times", {"rid": end.rid, "completion_tokens": end.completion_tokens, **shown})

    def _write(self, what: str, fields: dict[str, Any]) -> None:
        if self._json:
            self._logger.info("%s", msgspec.json.encode({"event": what.lower(), **fields}).decode())
        else:
            self._logger.info("%s: %s", what, ", ".join(f"{name}={value}" for name, value in fields.items()))
