"""--log-requests: one line when a request is sent to the engine and one when it ends. Prompt text never appears."""

from __future__ import annotations

import logging
from typing import Any, Literal

import msgspec

from moonlang.core.messages import Generate
from moonlang.core.request import Finish

LEVEL_SAMPLING = 1  # from here on with the sampling parameters


class RequestLog:
    """level: --log-requests-level. form: text or json."""

    def __init__(self, logger: logging.Logger, level: int, form: Literal["text", "json"] | str) -> None:
        self._logger = logger
        self._level = level
        self._json = form == "json"

    def received(self, message: Generate) -> None:
        fields: dict[str, Any] = {"rid": message.rid, "prompt_tokens": len(message.input_ids), "stream": message.stream}
        if self._level >= LEVEL_SAMPLING:
            fields["sampling_params"] = msgspec.to_builtins(message.sampling, str_keys=True)
        self._write("Receive", fields)

    def finished(self, rid: str, finish: Finish, *, prompt: int, cached: int, output: int, e2e_s: float) -> None:
        """Token counts, and seconds from arrival to the end."""
        fields: dict[str, Any] = {
            "rid": rid,
            "finish": finish.kind,
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "completion_tokens": output,
            "e2e_latency": round(e2e_s, 6),
        }
        if finish.kind == "abort":
            fields["message"] = finish.message
        self._write("Finish", fields)

    def _write(self, what: str, fields: dict[str, Any]) -> None:
        if self._json:
            self._logger.info("%s", msgspec.json.encode({"event": what.lower(), **fields}).decode())
        else:
            self._logger.info("%s: %s", what, ", ".join(f"{name}={value}" for name, value in fields.items()))
