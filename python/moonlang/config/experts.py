"""What the flags for mixtures of experts come to. Pure."""

from __future__ import annotations

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs


def is_elastic(args: ServerArgs) -> bool:
    """Whether the server goes on when a rank is lost."""
    return args.elastic_ep_backend not in (None, "none")


def check(args: ServerArgs, cuda: bool = False) -> None:
    """ConfigError when flags for experts do not go with others, or with a GPU (`cuda`)."""
    others = {
        "--pp-size": args.pp_size > 1,
        "--nnodes": args.nnodes > 1,
        "--disaggregation-mode": args.disaggregation_mode != "null",
        "--enable-hierarchical-cache": args.enable_hierarchical_cache,
    }
    given = ", ".join(name for name, used in others.items() if used)
    if is_elastic(args) and given:
        raise ConfigError(
            f"--elastic-ep-backend does not go with {given} in this version.", hint="Leave out one of the two."
        )
    given = ", ".join(name for name, used in _placing(args).items() if used)
    if args.moe_a2a_backend == "none" and given:
        raise ConfigError(
            f"{given} needs tokens that travel to their experts.",
            hint="Add --moe-a2a-backend mooncake (or torch), and --tp-size or --enable-dp-attention.",
        )
    if cuda and args.moe_a2a_backend == "mooncake":
        raise ConfigError(
            "--moe-a2a-backend mooncake carries tokens that are in host memory: on a CPU.",
            hint="On GPUs take --moe-a2a-backend torch, which uses NCCL, or add --device cpu.",
        )
    if args.deepep_dispatcher_output_dtype == "int8" and args.moe_a2a_backend != "mooncake":
        raise ConfigError(
            f"--deepep-dispatcher-output-dtype int8 does nothing with --moe-a2a-backend {args.moe_a2a_backend}.",
            hint="Add --moe-a2a-backend mooncake.",
        )


def _placing(args: ServerArgs) -> dict[str, bool]:
    """Flags about where experts are, and whether they are given."""
    return {
        "--ep-num-redundant-experts": args.ep_num_redundant_experts > 0,
        "--enable-eplb": args.enable_eplb,
    }


def ep_size(args: ServerArgs, model: ModelConfig) -> tuple[int, str]:
    """--ep-size as it is, and why. ConfigError when it does not go with --tp-size.

    Experts are never cut, so that a token's result does not depend on the number of ranks: every rank of tensor
    parallelism has its share of them, each whole, whatever the flag says.
    """
    if args.tp_size % args.ep_size:
        raise ConfigError(
            f"--ep-size {args.ep_size} does not divide --tp-size {args.tp_size}.",
            hint="The ranks that share the experts are those of --tp-size: give both the same value.",
        )
    if model.num_experts and (args.ep_size > 1 or args.moe_a2a_backend != "none"):
        return args.tp_size, "experts are whole, and spread over all ranks of --tp-size"
    return args.ep_size, ""
