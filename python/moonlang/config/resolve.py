"""Fills in what the user left to the engine. Pure: the same arguments, model and host give the same result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moonlang.base.errors import ConfigError
from moonlang.config import experts, hicache, replicas
from moonlang.config.model_config import ModelConfig
from moonlang.config.model_source import EMBEDDED_NAME
from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import obstacle

PAGE_TOKENS = 16
CPU_CHUNK_TOKENS = 1024
CUDA_CHUNK_TOKENS = 8192
CPU_RUNNING_REQUESTS = 256
CUDA_RUNNING_REQUESTS = 1024
QUEUED_REQUESTS = 32768
CPU_MEMORY_SHARE = 0.5
CUDA_MEMORY_SHARE = 0.88
SEED = 0x5EED
MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What `resolve` may know of the machine; `config.host.observe` finds it out. `seed` was drawn by the caller."""

    cuda: bool = False
    cpu_kernels: str = ""  # their instruction set; "" when they are not installed
    rings: bool = False  # processes can exchange messages through rings in shared memory
    seed: int = SEED


def resolve_args(
    args: ServerArgs, model: ModelConfig, host: HostFacts | None = None
) -> tuple[ServerArgs, dict[str, str]]:
    """The complete arguments, and by field name why each was chosen. A second pass changes nothing.

    ConfigError when explicit values contradict each other or the model.
    """
    host = host or HostFacts()
    spread = replicas.choices(args)
    args = dataclasses.replace(args, **{name: value for name, value, _ in spread})
    chosen: dict[str, Any] = {}
    reasons: dict[str, str] = {name: reason for name, _, reason in spread}

    def choose(name: str, value: Any, reason: str) -> Any:
        if value != getattr(args, name):
            chosen[name] = value
            reasons[name] = reason
        return value

    for name, value, reason in _automatic(args, model, host):
        choose(name, value, reason)
    cuda = chosen.get("device", args.device) == "cuda"
    page = args.page_size or choose(
        "page_size", PAGE_TOKENS, "a good size for prefix hits and for the copies of the cache"
    )
    for name, value, reason in _sizes(args, model, page, cuda):
        choose(name, value, reason)
    _check(args, model, page, cuda)
    replicas.check(args, model)
    _check_fronts(args)
    _check_shards(args, model)
    _check_stages(args, model)
    _check_pairs(args, cuda)
    _check_kv_dtype(args, model, chosen.get("attention_backend", args.attention_backend))
    return dataclasses.replace(args, **chosen), reasons


Choice = tuple[str, Any, str]


def _automatic(args: ServerArgs, model: ModelConfig, host: HostFacts) -> list[Choice]:
    """Values that stand in for None or auto and do not depend on each other."""
    choices: list[Choice] = [
        ("dtype", model.dtype, "the checkpoint's" if args.dtype == "auto" else "the full name of what was asked for"),
        ("kv_cache_dtype", *_kv_dtype(args, model)),
        ("context_length", model.context_length, "what the model was made for"),
    ]
    if args.model_path is None:
        choices.append(("model_path", model.path, "the embedded model: no --model-path was given"))
    defaults: list[Choice] = [
        ("served_model_name", args.model_path or EMBEDDED_NAME, "the model path"),
        ("tokenizer_path", model.path, "the tokenizer lies with the model"),
        ("device", "cuda" if host.cuda else "cpu", "a GPU is there" if host.cuda else "no GPU is there"),
        ("attention_backend", *_attention(args, host)),
        ("sampling_backend", "pytorch", "the only sampling kernels of this version"),
        ("grammar_backend", "xgrammar", "it knows JSON schemas, regexes and EBNF"),
        ("random_seed", host.seed, "drawn at start"),
        ("log_level_http", args.log_level, "follows --log-level"),
        ("max_queued_requests", QUEUED_REQUESTS, "every queue has a bound"),
        ("default_priority_value", 0, "the middle of all priorities"),
    ]
    choices += [choice for choice in defaults if getattr(args, choice[0]) is None]
    if args.quantization is None and model.quantization is not None:
        choices.append(("quantization", model.quantization.method, "config.json says so"))
    if args.disaggregation_decode_enable_offload_kvcache and not args.enable_hierarchical_cache:
        choices.append(("enable_hierarchical_cache", True, "--disaggregation-decode-enable-offload-kvcache needs it"))
    choices.append(("ep_size", *experts.ep_size(args, model)))
    if args.load_balance_method == "auto":
        choices.append(("load_balance_method", *_balance(args)))
    if args.messaging_backend == "auto":
        choices.append(("messaging_backend", *_messaging(args, host)))
    return choices


def _kv_dtype(args: ServerArgs, model: ModelConfig) -> tuple[str, str]:
    if args.kv_cache_dtype == "auto":
        return model.dtype, "that of the model"
    return {"bf16": "bfloat16"}.get(args.kv_cache_dtype, args.kv_cache_dtype), "the full name of what was asked for"


def _balance(args: ServerArgs) -> tuple[str, str]:
    if args.disaggregation_mode == "prefill":
        return "follow_bootstrap_room", "decode servers may work out the replica from the room"
    return "round_robin", "replicas are alike"


def _messaging(args: ServerArgs, host: HostFacts) -> tuple[str, str]:
    """As measured on one host: docs/explanation/messaging.md."""
    if args.in_process:
        return "inproc", "roles are threads"
    if host.rings:
        return (
            "mooncake",
            "rings in shared memory: no slower than zmq, and a first token sooner, when measured on one host",
        )
    return "zmq", "rings in shared memory (mooncake) need Linux on x86-64"


def _attention(args: ServerArgs, host: HostFacts) -> tuple[str, str]:
    if (args.device or ("cuda" if host.cuda else "cpu")) != "cpu":
        return "torch_native", "the only attention kernels for a GPU in this version"
    if host.cpu_kernels:
        return "cpu", f"sgl-kernel is installed and has {host.cpu_kernels} kernels for this machine"
    return "torch_native", "sgl-kernel is not installed"


def _sizes(args: ServerArgs, model: ModelConfig, page: int, cuda: bool) -> list[Choice]:
    """Budgets, from the device and the page size."""
    where = "a GPU" if cuda else "a CPU"
    choices: list[Choice] = []
    if args.chunked_prefill_size is None:
        chunk = CUDA_CHUNK_TOKENS if cuda else CPU_CHUNK_TOKENS
        chunk = max(page, chunk // page * page)
        choices.append(("chunked_prefill_size", chunk, f"keeps a step short on {where}; a multiple of the page size"))
    if args.max_prefill_tokens < model.context_length:
        choices.append(("max_prefill_tokens", model.context_length, "one sequence of full length must fit"))
    if args.max_running_requests is None:
        running = CUDA_RUNNING_REQUESTS if cuda else CPU_RUNNING_REQUESTS
        choices.append(("max_running_requests", running, f"more rows do not make {where} faster"))
    if args.mem_fraction_static is None:
        share = CUDA_MEMORY_SHARE if cuda else CPU_MEMORY_SHARE
        why = "the rest is for activations" if cuda else "the memory of a CPU is shared with everything else that runs"
        choices.append(("mem_fraction_static", share, why))
    return choices


def _check(args: ServerArgs, model: ModelConfig, page: int, cuda: bool) -> None:
    hicache.check(args, cuda)
    experts.check(args, cuda)
    chunk = args.chunked_prefill_size
    if chunk is not None and chunk > 0 and chunk % page:
        near = max(page, chunk // page * page)
        raise ConfigError(
            f"--chunked-prefill-size {chunk} is not a multiple of the page size {page}.",
            hint=f"Use {near} or {near + page}, or change --page-size.",
        )
    if args.max_total_tokens is not None and args.max_total_tokens < page:
        raise ConfigError(
            f"--max-total-tokens {args.max_total_tokens} is less than one page ({page}).", hint="Raise it."
        )


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port". ConfigError when it is neither."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < MAX_PORT - 1:
        raise ConfigError(
            f"--dist-init-addr {address or '(none)'} is no address of the first node.",
            hint="Give every node the same, like 10.0.0.1:5000; that port and the next two are used.",
        )
    return host, int(port)


def _check_nodes(args: ServerArgs) -> None:
    if args.nnodes == 1 and args.node_rank == 0:
        return
    split_address(args.dist_init_addr or "")
    if not 0 <= args.node_rank < args.nnodes:
        raise ConfigError(f"--node-rank {args.node_rank} is not one of --nnodes {args.nnodes}.", hint="Count from 0.")
    if args.tp_size * args.pp_size % args.nnodes:
        raise ConfigError(
            f"--tp-size {args.tp_size} x --pp-size {args.pp_size} cannot be spread evenly over --nnodes {args.nnodes}.",
            hint="Change one of them.",
        )
    if args.disaggregation_mode != "null":
        raise ConfigError(
            "--disaggregation-mode and --nnodes do not go together in this version.", hint="Use one node for each half."
        )


def _check_fronts(args: ServerArgs) -> None:
    if not args.in_process:
        return
    for name, number in (("tokenizer", args.tokenizer_worker_num), ("detokenizer", args.detokenizer_worker_num)):
        if number > 1:
            raise ConfigError(
                f"--{name}-worker-num {number} does not go with --in-process.", hint="Leave one of them out."
            )


def _check_shards(args: ServerArgs, model: ModelConfig) -> None:
    _check_nodes(args)
    size = replicas.attention_ranks(args)
    if size == 1:
        return
    why = obstacle(
        size,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.value_dim,
        inner=None if model.dense_whole and model.num_experts else model.hf.get("intermediate_size"),
        experts=model.num_experts,
        quantized=model.quantization is not None,
    )
    if args.in_process:
        why = why or "--in-process has one process"
    if why:
        raise ConfigError(
            f"{_ranks(args)} does not go with {', '.join(model.architectures)}: {why}.",
            hint="Choose a smaller --tp-size, or 1.",
        )


def _ranks(args: ServerArgs) -> str:
    """Of a copy of the model, as the user has asked for them."""
    return f"--tp-size {args.tp_size}" + (f" for --dp-size {args.dp_size}" if args.enable_dp_attention else "")


def _check_stages(args: ServerArgs, model: ModelConfig) -> None:
    if args.pp_size == 1:
        return
    if args.pp_size > model.num_layers:
        raise ConfigError(
            f"--pp-size {args.pp_size} is more than the {model.num_layers} layers of {', '.join(model.architectures)}.",
            hint="A stage of a pipeline has one layer at least.",
        )
    others = {
        "--in-process": args.in_process,
        "--enable-dp-attention": args.enable_dp_attention,
    }
    wrong = [name for name, used in others.items() if used]
    if wrong:
        raise ConfigError(
            f"--pp-size {args.pp_size} does not go with {' and '.join(wrong)} in this version.",
            hint="--tp-size does.",
        )


def _check_pairs(args: ServerArgs, cuda: bool) -> None:
    if cuda and args.disaggregation_mode != "null" and replicas.attention_ranks(args) * args.pp_size > 1:
        raise ConfigError(
            "--disaggregation-mode moves the pages of several ranks where they are host memory: on a CPU.",
            hint="Use one GPU for each half, or add --device cpu.",
        )


def _check_kv_dtype(args: ServerArgs, model: ModelConfig, attention: str | None) -> None:
    if _kv_dtype(args, model)[0] != model.dtype and attention != "cpu":
        raise ConfigError(
            f"--kv-cache-dtype {args.kv_cache_dtype} needs the CPU kernels: {attention} attention reads keys and values"
            f" in the type of the model, {model.dtype}.",
            hint="Leave it at auto, or on a CPU install sgl-kernel (scripts/setup); for bfloat16 set --dtype too.",
        )
    if model.latent and args.kv_cache_dtype == "int8":
        raise ConfigError(
            f"--kv-cache-dtype int8 does not go with the latents of {', '.join(model.architectures)}.",
            hint="Take fp8_e4m3, which needs as little memory.",
        )
