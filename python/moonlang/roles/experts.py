"""Opens what carries tokens to their experts, before weights are loaded: what does not work is said at once."""

from __future__ import annotations

from moonlang.base import log, registry
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.models.spec import torch_dtype
from moonlang.moe.exchange.port import ExchangeSpec, ExpertExchange

_log = log.get(__name__)

_OVERLAPPED = 2


def open_exchange(args: ServerArgs, model: ModelConfig, seat: Seat, group: Group) -> ExpertExchange | None:
    """What --moe-a2a-backend says, among the ranks of `group`; None: nothing has to travel.

    ConfigError when it cannot work on this machine, PeerError when the ranks do not reach each other.
    """
    spec = exchange_spec(args, model)
    if spec is None:
        return None
    return registry.find("moe.exchange", args.moe_a2a_backend).BACKEND(spec, seat, group)


def check_exchange(args: ServerArgs, model: ModelConfig) -> None:
    """The same for one rank, which has no others: ConfigError when the backend could not work on this machine."""
    spec = exchange_spec(args, model)
    if spec is not None:
        registry.find("moe.exchange", args.moe_a2a_backend).check(spec)
        _log.info("One rank holds all experts: nothing travels by --moe-a2a-backend %s.", args.moe_a2a_backend)


def exchange_spec(args: ServerArgs, model: ModelConfig) -> ExchangeSpec | None:
    """What travels between ranks; None when nothing does."""
    if not model.num_experts:
        if args.moe_a2a_backend != "none":
            _log.warning("--moe-a2a-backend %s has no effect: a dense model has no experts.", args.moe_a2a_backend)
        return None
    if args.moe_a2a_backend == "none":
        return None
    return ExchangeSpec(
        experts=model.num_experts,
        per_token=model.experts_per_token,
        columns=model.hidden_size,
        dtype=torch_dtype(model.dtype),
        lanes=_OVERLAPPED if args.enable_two_batch_overlap else 1,
        devices=args.mooncake_ib_device,
        payload="int8" if args.deepep_dispatcher_output_dtype == "int8" else "plain",
    )
