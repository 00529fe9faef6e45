"""The grammar engine that the arguments ask for."""

from __future__ import annotations

from moonlang.base import registry
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.ports import GrammarEngine


def grammar_engine(args: ServerArgs, model: ModelConfig) -> GrammarEngine:
    backend = registry.find("constrained", args.grammar_backend or "none").BACKEND
    return backend(
        args.tokenizer_path or model.path,
        model.vocab_size,
        model.eos_token_ids,
        any_whitespace=not args.constrained_json_disable_any_whitespace,
        max_whitespace=args.constrained_json_max_whitespace_cnt,
    )
