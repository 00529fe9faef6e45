"""`sglang.srt.server_args` under its SGLang name."""

from moonlang.config.server_args import ServerArgs, prepare_server_args

__all__ = ["ServerArgs", "prepare_server_args"]
