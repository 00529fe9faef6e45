"""The whole way from what the user said to what a server runs with. Touches the disk, and the network for hub names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moonlang.config.host import observe
from moonlang.config.model_config import ModelConfig, load_model_config
from moonlang.config.model_source import local_path, tokenizer_folder
from moonlang.config.resolve import resolve_args
from moonlang.config.server_args import ServerArgs


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Complete arguments, the model's configuration, and by field name why each automatic value was chosen."""

    args: ServerArgs
    model: ModelConfig
    reasons: dict[str, str]


def prepare(args: ServerArgs) -> Prepared:
    """Find the model, read its configuration and resolve the arguments. ConfigError when one of them cannot be done."""
    folder = local_path(args)
    model = load_model_config(folder, args)
    if args.tokenizer_path is not None and not args.skip_tokenizer_init:
        args = dataclasses.replace(args, tokenizer_path=tokenizer_folder(args, folder))
    host = observe()
    cpu = (args.device or ("cuda" if host.cuda else "cpu")) == "cpu"
    widened = cpu and args.dtype == "auto" and model.dtype == "float16"
    if widened:
        args, model = dataclasses.replace(args, dtype="bfloat16"), dataclasses.replace(model, dtype="bfloat16")
    resolved, reasons = resolve_args(args, model, host)
    if widened:
        reasons["dtype"] = "the checkpoint is float16, for which CPUs have no arithmetic"
    return Prepared(args=resolved, model=model, reasons=reasons)
