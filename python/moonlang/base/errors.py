"""The error tree. Every error a user can meet has a code, a text (what is wrong) and a hint (what to do about it).

MoonLangError
  ConfigError          a flag, file or environment variable is wrong; the process exits with status 2
  RequestError         one request is refused; becomes an HTTP status and an OpenAI-style body
  PeerError            another process or host failed; the same request may be sent again
  BugError             an invariant of this program does not hold; never caught, always reported

Inside the brain failures are values (`core.request.Finish`); exceptions live at the edges.
"""

from __future__ import annotations


class MoonLangError(Exception):
    """Base of the tree. `message` says what is wrong, `hint` what to do about it."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ConfigError(MoonLangError):
    """Start-up cannot go on with this configuration."""

    code = "config"
    exit_status = 2


class RequestError(MoonLangError):
    """A request that cannot be served. `status` is its HTTP status: 400, 404, 413, 429, 499, 500, 503 or 504."""

    code = "request"

    def __init__(self, message: str, *, status: int = 400, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class PeerError(MoonLangError):
    """A peer process or host is gone or does not answer in time; retryable."""

    code = "peer"


class BugError(MoonLangError):
    """An invariant is broken. Report it with the log; never catch it."""

    code = "bug"
