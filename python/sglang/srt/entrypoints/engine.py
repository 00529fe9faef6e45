"""`sglang.srt.entrypoints.engine` under its SGLang name."""

from moonlang.entrypoints.engine import Engine

__all__ = ["Engine"]
