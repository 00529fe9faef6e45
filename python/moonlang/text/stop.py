"""Stop strings and stop expressions over growing text: found as soon as they are complete, never half shown."""

from __future__ import annotations

from dataclasses import dataclass

import regex

from moonlang.base.errors import RequestError

REGEX_WINDOW_CHARS = 1024  # a match of a stop expression is not longer than this
REGEX_TIMEOUT_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A stop that was found. text: what may still be shown. matched: the stop string or the pattern."""

    text: str
    matched: str


class StopMatcher:
    """The stops of one sequence. The match that begins first wins; among those, the first in the request's order.

    trim: cut the text before the match, else behind it.
    """

    def __init__(self, strings: tuple[str, ...], patterns: tuple[str, ...] = (), *, trim: bool = True) -> None:
        self._strings = tuple(string for string in strings if string)
        self._patterns = [(pattern, _compile(pattern)) for pattern in patterns if pattern]
        self._trim = trim
        self._text = ""
        self._shown = 0  # characters of _text that have been shown

    def push(self, text: str) -> str | Hit:
        """Take the next text; return what can be shown now, or the hit. RequestError: an expression takes too long."""
        self._text += text
        hit = self._search()
        if hit is not None:
            return hit
        until = self._safe_end()
        shown = self._text[self._shown : until]
        self._shown = until
        self._forget()
        return shown

    def finish(self) -> str:
        """What was held back as the possible beginning of a stop, now that no more text comes."""
        rest = self._text[self._shown :]
        self._shown = len(self._text)
        return rest

    def _search(self) -> Hit | None:
        best: tuple[int, int, str] | None = None  # start, end, matched
        for string in self._strings:
            start = self._text.find(string, self._shown)
            if start >= 0 and (best is None or start < best[0]):
                best = (start, start + len(string), string)
        for pattern, compiled in self._patterns:
            found = self._match(pattern, compiled, partial=False)
            if found is not None and (best is None or found.start() < best[0]):
                best = (found.start(), found.end(), pattern)
        if best is None:
            return None
        start, end, matched = best
        return Hit(text=self._text[self._shown : start if self._trim else end], matched=matched)

    def _safe_end(self) -> int:
        """Where the earliest unfinished stop begins."""
        end = len(self._text)
        for string in self._strings:
            start = max(self._shown, len(self._text) - len(string) + 1)
            while (start := self._text.find(string[0], start, end)) >= 0:
                if string.startswith(self._text[start:]):
                    end = start
                    break
                start += 1
        for pattern, compiled in self._patterns:
            found = self._match(pattern, compiled, partial=True)
            if found is not None:
                end = min(end, max(found.start(), len(self._text) - REGEX_WINDOW_CHARS))
        return max(end, self._shown)

    def _match(self, pattern: str, compiled: regex.Pattern[str], *, partial: bool) -> regex.Match[str] | None:
        try:
            return compiled.search(self._text, self._shown, partial=partial, timeout=REGEX_TIMEOUT_S)
        except TimeoutError:
            raise RequestError(f"stop_regex {pattern!r} takes too long to match.") from None

    def _forget(self) -> None:
        """Drop text that no expression can look back to; without expressions all that was shown.

        One character stays, so that `^` does not match where the text was cut.
        """
        keep = REGEX_WINDOW_CHARS if self._patterns else 0
        drop = self._shown - keep
        if drop > keep:
            self._text = self._text[drop:]
            self._shown -= drop


def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise RequestError(f"stop_regex {pattern!r} is not a regular expression: {error}.") from error
