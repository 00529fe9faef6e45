"""Copies of a model, and ranks that share nothing but its experts, in the arguments. Pure."""

from __future__ import annotations

from typing import Any

from moonlang.base.errors import ConfigError
from moonlang.config.experts import is_elastic
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs

Choice = tuple[str, Any, str]


def attention_ranks(args: ServerArgs) -> int:
    """How many ranks share the attention of a copy, and all else of it but its experts."""
    return args.tp_size // args.dp_size if args.enable_dp_attention else args.tp_size


def choices(args: ServerArgs) -> list[Choice]:
    """What --enable-dp-attention and --attn-dp-size, its newer spelling, make of the other flags."""
    found: list[Choice] = []
    if args.enable_dp_attention and max(args.attn_dp_size, args.dp_size) == 1:
        found.append(("enable_dp_attention", False, "one copy has nobody to share experts with: see --dp-size"))
    if args.attn_dp_size > 1 and not args.enable_dp_attention:
        found.append(("enable_dp_attention", True, "--attn-dp-size asks for it"))
    if args.attn_dp_size > 1 and args.dp_size == 1:
        found.append(("dp_size", args.attn_dp_size, "--attn-dp-size asks for it"))
    if args.moe_a2a_backend == "none" and max(args.attn_dp_size, args.dp_size * args.enable_dp_attention) > 1:
        found.append(("moe_a2a_backend", "torch", "tokens have to travel; mooncake is faster where it is installed"))
    return found


def check(args: ServerArgs, model: ModelConfig) -> None:
    """args: with those choices. ConfigError when they contradict each other or the model."""
    if args.load_balance_method == "follow_bootstrap_room" and args.disaggregation_mode == "null":
        raise ConfigError(
            "--load-balance-method follow_bootstrap_room needs rooms, which this server does not have.",
            hint="Leave it out; it belongs to servers with --disaggregation-mode.",
        )
    if args.dp_size == 1:
        return
    wrong = ""
    if args.nnodes > 1:
        wrong, hint = "--nnodes", "Start one server per node, with a router in front."
    elif args.in_process:
        wrong, hint = "--in-process", "Leave one of them out: every replica is a process."
    if wrong:
        raise ConfigError(f"--dp-size {args.dp_size} does not go with {wrong} in this version.", hint=hint)
    if args.enable_dp_attention:
        _check_attention(args, model)


def _check_attention(args: ServerArgs, model: ModelConfig) -> None:
    names, experts = ", ".join(model.architectures), model.num_experts
    if experts is None:
        raise ConfigError(
            f"--enable-dp-attention spreads experts, and {names} has none.", hint="Leave it out: --dp-size works alone."
        )
    if experts < args.tp_size:
        raise ConfigError(
            f"The {args.tp_size} ranks of --tp-size cannot share the {experts} experts of {names}.",
            hint="Choose a smaller --tp-size.",
        )
    if is_elastic(args) and args.tp_size != args.dp_size:
        raise ConfigError(
            f"--elastic-ep-backend takes copies of one rank each, not --tp-size {args.tp_size} for "
            f"--dp-size {args.dp_size}.",
            hint="Give both the same number, or leave out --elastic-ep-backend.",
        )
    if args.attn_dp_size not in (1, args.dp_size):
        raise ConfigError(
            f"--attn-dp-size {args.attn_dp_size} is not --dp-size {args.dp_size}.", hint="One of them is enough."
        )
    if args.tp_size % args.dp_size:
        raise ConfigError(
            f"--enable-dp-attention deals out the ranks of --tp-size {args.tp_size}, and --dp-size {args.dp_size} does "
            "not divide them.",
            hint="Every copy has as many ranks: give both the same number, or --tp-size a multiple of --dp-size.",
        )
