"""What a server says of itself: the bodies of /model_info and /server_info, for `Engine` as well."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec

from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.entrypoints import loads
from moonlang.entrypoints.client import EngineClient
from moonlang.version import __version__

SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")


def served_name(args: ServerArgs, model: ModelConfig) -> str:
    """The model's name towards clients."""
    return args.served_model_name or args.model_path or model.path


def model_info(client: EngineClient) -> dict[str, Any]:
    """What is served."""
    args, model = client.args, client.model
    return {
        "model_path": args.model_path or model.path,
        "served_model_name": served_name(args, model),
        "tokenizer_path": args.tokenizer_path or model.path,
        "is_generation": True,
        "preferred_sampling_params": args.preferred_sampling_params,
        "weight_version": args.weight_version,
        "load_format": args.load_format,
        "reasoning_parser": args.reasoning_parser,
        "tool_call_parser": args.tool_call_parser,
        "disaggregation_mode": args.disaggregation_mode,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": model.model_type,
        "architectures": list(model.architectures),
    }


async def server_info(client: EngineClient) -> dict[str, Any]:
    """Every resolved argument by name, sizes, and what the engine is doing; flat, and without secrets.

    RequestError 503 or 504 when the engine does not answer.
    """
    found = await loads.report(client)
    ready = client.ready.get("scheduler", {})
    arguments: dict[str, Any] = msgspec.to_builtins(client.args)
    command = shlex.join(client.command)
    for name in SECRETS:
        if arguments.get(name):
            command = command.replace(arguments[name], "***")
            arguments[name] = None
    states = [
        {
            "world_size": 1,
            "effective_max_running_requests_per_dp": ready.get("max_running_requests"),
            "last_gen_throughput": one["gen_throughput"],
            "memory_usage": {
                "kvcache": ready.get("kv_page_bytes", 0) * one["num_pages"] / 1e9,
                "token_capacity": one["max_total_tokens"],
            },
            "load": one,
        }
        for one in found.values()
    ]
    return {
        **arguments,
        "launch_command": command,
        "status": "ready",
        "startup_time": client.start_s,
        "version": __version__,
        "frontend": "fastapi",
        "max_total_num_tokens": next(iter(found.values()))["max_total_tokens"],
        "max_req_input_len": ready.get("max_req_input_len"),
        "kv_pool_reason": ready.get("kv_pool_reason"),
        "internal_states": [{**arguments, **state} for state in states],
    }
