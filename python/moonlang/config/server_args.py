"""`ServerArgs`: one annotated line per flag. The command line, the reference and the checks are made from these lines.

A field's name is the flag's name with underscores, as in SGLang. Aliases, and the flags of SGLang that this version
accepts without effect or refuses, are rows of `sglang_flags.json`; a field whose row says "refused" waits there for its
version. No `from __future__ import annotations` here: the annotations are read at run time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from moonlang.config.flag import Flag
from moonlang.config.hicache import PREFETCH_POLICIES, STORAGE_BACKENDS, WRITE_POLICIES

if TYPE_CHECKING:
    from moonlang.config.model_config import ModelConfig
    from moonlang.config.resolve import HostFacts

QUANTIZATIONS = (
    *("gptq", "awq", "fp8", "mxfp4", "int8", "int4", "w8a8_int8"),
    *("compressed-tensors", "gptq_marlin", "awq_marlin"),  # other names for these
)
LOAD_FORMATS = ("auto", "safetensors", "dummy")
MODEL_IMPLS = ("auto", "moonlang", "sglang", "transformers")
KV_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8")
POLICIES = ("lpm", "random", "fcfs", "dfs-weight", "lof", "priority")
PD_MODES = ("null", "prefill", "decode")
PD_BACKENDS = ("mooncake", "mooncake_tcp", "local", "fake")
LOAD_BALANCE_METHODS = ("auto", "round_robin", "follow_bootstrap_room", "total_requests", "total_tokens")
MESSAGING_BACKENDS = ("auto", "mooncake", "zmq", "inproc")
A2A_BACKENDS = ("none", "torch", "mooncake")
EPLB_ALGORITHMS = ("auto", "greedy")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerArgs:
    """All that can be set at start. Build it with `parse` or `create`: they validate, the constructor does not."""

    # Model and weights
    model_path: Annotated[str | None, Flag("Folder or hub name; left out: moonlang-tiny")] = None
    load_format: Annotated[str, Flag("Source of weights; dummy: random", LOAD_FORMATS)] = "auto"
    trust_remote_code: Annotated[bool, Flag("Allow code that comes with the checkpoint")] = False
    context_length: Annotated[int | None, Flag("Longest sequence in tokens; default: the model's", low=1)] = None
    revision: Annotated[str | None, Flag("Branch, tag or commit on the hub")] = None
    download_dir: Annotated[str | None, Flag("Folder for what is fetched from the hub")] = None
    model_impl: Annotated[str, Flag("Own model file, or that of transformers", MODEL_IMPLS)] = "auto"
    json_model_override_args: Annotated[str, Flag("JSON object merged over config.json")] = "{}"
    dtype: Annotated[str, Flag("Type of weights and activations; auto: the checkpoint's")] = "auto"
    quantization: Annotated[str | None, Flag("Form of the weights; of a float checkpoint: made", QUANTIZATIONS)] = None
    kv_cache_dtype: Annotated[str, Flag("Type of the KV cache; auto: the model's", KV_DTYPES)] = "auto"

    # Tokenizer, HTTP and the API
    tokenizer_path: Annotated[str | None, Flag("Folder of the tokenizer; default: the model's")] = None
    tokenizer_mode: Annotated[str, Flag("auto: the fast tokenizer; slow: the one in Python")] = "auto"
    tokenizer_worker_num: Annotated[int, Flag("Processes that answer HTTP requests and tokenize", low=1)] = 1
    detokenizer_worker_num: Annotated[int, Flag("Processes that turn token ids into text", low=1)] = 1
    skip_tokenizer_init: Annotated[bool, Flag("Token ids in, token ids out, no text")] = False
    host: Annotated[str, Flag("Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Flag("Port to listen on; 0: a free one", low=0, high=65535)] = 30000
    fastapi_root_path: Annotated[str, Flag("Path prefix that a proxy in front strips")] = ""
    skip_server_warmup: Annotated[bool, Flag("Send no warm-up request at start")] = False
    ssl_keyfile: Annotated[str | None, Flag("TLS key file")] = None
    ssl_certfile: Annotated[str | None, Flag("TLS certificate file")] = None
    ssl_ca_certs: Annotated[str | None, Flag("File with the certificates of trusted authorities")] = None
    ssl_keyfile_password: Annotated[str | None, Flag("Password of the TLS key file")] = None
    api_key: Annotated[str | None, Flag("Bearer key that clients must send")] = None
    admin_api_key: Annotated[str | None, Flag("Key of the management routes, in place of --api-key")] = None
    served_model_name: Annotated[str | None, Flag("Name in /v1/models; default: the model path")] = None
    weight_version: Annotated[str, Flag("Label of the weights, shown in every answer's meta_info")] = "default"
    chat_template: Annotated[str | None, Flag("Jinja file or text in place of the model's template")] = None
    hf_chat_template_name: Annotated[str | None, Flag("Which of several named templates of the tokenizer")] = None
    default_chat_template_kwargs: Annotated[dict[str, Any] | None, Flag("Defaults of chat_template_kwargs")] = None
    enable_cache_report: Annotated[bool, Flag("Report cached tokens in usage.prompt_tokens_details")] = False
    sampling_defaults: Annotated[str, Flag("Defaults of sampling: generation_config.json, or OpenAI's")] = "model"
    preferred_sampling_params: Annotated[dict[str, Any] | None, Flag("Sampling parameters under a request's")] = None
    allow_auto_truncate: Annotated[bool, Flag("Cut a prompt that is too long instead of refusing it")] = False
    stream_interval: Annotated[int, Flag("Tokens per streamed piece", low=1)] = 1
    stream_response_default_include_usage: Annotated[bool, Flag("End every OpenAI stream with a usage chunk")] = False
    incremental_streaming_output: Annotated[bool, Flag("/generate streams what is new instead of all so far")] = False

    # Scheduling and memory
    mem_fraction_static: Annotated[float | None, Flag("Share of memory for weights and KV", low=0.01, high=1)] = None
    max_running_requests: Annotated[int | None, Flag("Most requests that run at once", low=1)] = None
    max_queued_requests: Annotated[int | None, Flag("Most requests that wait; beyond it 503", low=1)] = None
    max_total_tokens: Annotated[int | None, Flag("Ceiling of the KV cache in tokens", low=1)] = None
    chunked_prefill_size: Annotated[int | None, Flag("Most prompt tokens per step; -1: no chunking", low=-1)] = None
    max_prefill_tokens: Annotated[int, Flag("Most prompt tokens of all requests in one step", low=1)] = 16384
    prefill_max_requests: Annotated[int | None, Flag("Most requests that prefill in one step", low=1)] = None
    schedule_policy: Annotated[str, Flag("Order of waiting requests", POLICIES)] = "fcfs"
    schedule_conservativeness: Annotated[float, Flag("Scales the estimate of output to come", low=0)] = 1.0
    enable_priority_scheduling: Annotated[bool, Flag("Order by the priority of requests, with preemption")] = False
    disable_priority_preemption: Annotated[bool, Flag("Priorities order the queue only, nobody is preempted")] = False
    default_priority_value: Annotated[int | None, Flag("Priority of a request that brings none")] = None
    abort_on_priority_when_disabled: Annotated[bool, Flag("Refuse a priority when priorities are off")] = False
    schedule_low_priority_values_first: Annotated[bool, Flag("A low value is urgent")] = False
    priority_scheduling_preemption_threshold: Annotated[int, Flag("How much more urgent to preempt", low=0)] = 10
    page_size: Annotated[int | None, Flag("Tokens per page of the KV cache", low=1, high=1024)] = None
    disable_overlap_schedule: Annotated[bool, Flag("Plan a step only when the one before is done")] = False
    radix_eviction_policy: Annotated[str, Flag("What leaves the prefix cache first", ("lru", "lfu"))] = "lru"
    disable_radix_cache: Annotated[bool, Flag("No prefix cache")] = False

    # Kernels, grammars, sampling, device
    device: Annotated[str | None, Flag("Where the model runs; default: a GPU if there is one", ("cpu", "cuda"))] = None
    attention_backend: Annotated[str | None, Flag("Attention kernels", ("cpu", "torch_native"))] = None
    sampling_backend: Annotated[str | None, Flag("Sampling kernels", ("pytorch",))] = None
    grammar_backend: Annotated[str | None, Flag("Engine for JSON schemas, regexes, EBNF", ("xgrammar", "none"))] = None
    constrained_json_disable_any_whitespace: Annotated[bool, Flag("JSON output without optional spaces")] = False
    constrained_json_max_whitespace_cnt: Annotated[int | None, Flag("Most spaces in a row in JSON", low=0)] = None
    enable_custom_logit_processor: Annotated[bool, Flag("Let requests bring code that changes logits")] = False
    random_seed: Annotated[int | None, Flag("Seed of requests that bring none; default: drawn at start")] = None
    watchdog_timeout: Annotated[float, Flag("Seconds until a step that hangs ends the server", low=0)] = 300.0

    # Prefill/decode disaggregation
    disaggregation_mode: Annotated[str, Flag("Whole server, prefill only or decode only", PD_MODES)] = "null"
    disaggregation_transfer_backend: Annotated[str, Flag("How KV pages travel", PD_BACKENDS)] = "mooncake"
    disaggregation_bootstrap_port: Annotated[int, Flag("Where both halves meet; 0: any", low=0, high=65535)] = 8998
    disaggregation_ib_device: Annotated[str | None, Flag("RDMA cards for KV pages: one, a list, or JSON")] = None
    disaggregation_enable_kv_checksum: Annotated[bool, Flag("Check KV pages that have travelled")] = True
    disaggregation_decode_extra_slots: Annotated[int | None, Flag("Requests that wait with pages", low=0)] = None
    num_reserved_decode_tokens: Annotated[int, Flag("Output tokens to keep room for on decode servers", low=0)] = 512
    disaggregation_decode_fallback: Annotated[bool, Flag("Decode prefills by itself when its peer fails")] = False
    disaggregation_layer_groups: Annotated[int, Flag("Parts of a step that leave early; 1: none", low=1)] = 8
    disaggregation_decode_enable_offload_kvcache: Annotated[bool, Flag("Decode keeps its pages in the storage")] = False
    disaggregation_timeout_s: Annotated[float, Flag("Longest wait for the other half", low=0.001)] = 120.0

    # Hierarchical cache
    enable_hierarchical_cache: Annotated[bool, Flag("KV pages in host memory and storage too")] = False
    hicache_ratio: Annotated[float | None, Flag("Host pool over device pool; default: 2", low=0)] = None
    hicache_size: Annotated[int, Flag("Host pool in GB, before the ratio", low=0)] = 0
    hicache_host_memory_fraction: Annotated[float, Flag("Most of the spare memory for it", low=0, high=1)] = 0.8
    hicache_write_policy: Annotated[str, Flag("When pages go down", WRITE_POLICIES)] = "write_through"
    hicache_storage_backend: Annotated[str | None, Flag("Store that servers share", STORAGE_BACKENDS)] = None
    hicache_storage_prefetch_policy: Annotated[str, Flag("When loading stops", PREFETCH_POLICIES)] = "timeout"
    hicache_storage_backend_extra_config: Annotated[str | None, Flag("JSON, or @file, for the storage")] = None

    # Logs and metrics
    log_level: Annotated[str, Flag("Level of the log", LOG_LEVELS)] = "info"
    log_level_http: Annotated[str | None, Flag("Level of the HTTP log; default: --log-level", LOG_LEVELS)] = None
    log_requests: Annotated[bool, Flag("Log every request")] = False
    log_requests_level: Annotated[int, Flag("How much of a request is logged")] = 2
    log_requests_format: Annotated[str, Flag("Form of that log")] = "text"
    uvicorn_access_log_exclude_prefixes: Annotated[tuple[str, ...], Flag("Paths left out of the access log")] = ()
    enable_metrics: Annotated[bool, Flag("Prometheus metrics on /metrics")] = False
    extra_metric_labels: Annotated[dict[str, Any] | None, Flag("Labels of every metric")] = None
    bucket_time_to_first_token: Annotated[tuple[float, ...] | None, Flag("Buckets in seconds, first token")] = None
    bucket_inter_token_latency: Annotated[tuple[float, ...] | None, Flag("Buckets in seconds, between tokens")] = None
    bucket_e2e_request_latency: Annotated[tuple[float, ...] | None, Flag("Buckets in seconds, whole request")] = None
    decode_log_interval: Annotated[int, Flag("Steps between two Decode batch lines", low=1)] = 40
    kv_events_config: Annotated[str | None, Flag("JSON: where to publish what the prefix tree gains and loses")] = None
    enable_request_time_stats_logging: Annotated[bool, Flag("Log the times of every request")] = False

    # MoonLang's own
    messaging_backend: Annotated[str, Flag("How messages travel between roles", MESSAGING_BACKENDS)] = "auto"
    in_process: Annotated[bool, Flag("Run all roles as threads of one process, for debugging")] = False
    request_timeout_s: Annotated[float | None, Flag("Longest life of a request, then 504", low=0.001)] = None

    # Mixtures of experts over several ranks
    ep_size: Annotated[
        int, Flag("Ranks that share the experts, each whole; they are the ranks of --tp-size", low=1)
    ] = 1
    moe_a2a_backend: Annotated[
        str, Flag("How tokens travel to their experts; none: all ranks have them", A2A_BACKENDS)
    ] = "none"
    mooncake_ib_device: Annotated[str | None, Flag("RDMA cards for tokens of other hosts: one, a list, or JSON")] = None
    deepep_dispatcher_output_dtype: Annotated[
        str, Flag("Form in which tokens travel to their experts; int8: half the bytes, other bits", ("auto", "int8"))
    ] = "auto"
    ep_num_redundant_experts: Annotated[
        int, Flag("Slots for further copies of experts, over all ranks; copies share an expert's tokens", low=0)
    ] = 0
    enable_eplb: Annotated[bool, Flag("Place experts anew while serving, by how often they are chosen")] = False
    eplb_algorithm: Annotated[str, Flag("How experts are balanced; greedy is the one there is", EPLB_ALGORITHMS)] = (
        "auto"
    )
    eplb_rebalance_num_iterations: Annotated[int, Flag("Steps between two looks at the load of experts", low=1)] = 1000
    eplb_rebalance_layers_per_chunk: Annotated[
        int | None, Flag("Layers whose experts move at a time; all when left out", low=1)
    ] = None
    eplb_min_rebalancing_utilization_threshold: Annotated[
        float, Flag("Ranks whose mean load is more than this part of the highest are left as they are", low=0)
    ] = 1.0
    moe_dense_tp_size: Annotated[int | None, Flag("1: each rank has the dense layers whole", low=1, high=1)] = None
    elastic_ep_backend: Annotated[
        str | None, Flag("mooncake: a lost rank does not end the server", ("none", "mooncake"))
    ] = None
    enable_two_batch_overlap: Annotated[bool, Flag("Half of the tokens travel while others are computed")] = False

    # Of later versions: accepted without effect or refused, as their rows in the flag table say
    enable_mixed_chunk: Annotated[bool, Flag("Prefill and decode share a step")] = False
    retraction_policy: Annotated[str, Flag("Who gives way when KV is full", ("length", "priority"))] = "length"
    constrained_json_whitespace_pattern: Annotated[str | None, Flag("Whitespace of JSON output")] = None
    file_storage_path: Annotated[str | None, Flag("Folder for uploaded files")] = None
    warmups: Annotated[str | None, Flag("Named warm-ups")] = None
    tool_call_parser: Annotated[str | None, Flag("Parser of tool calls")] = None
    reasoning_parser: Annotated[str | None, Flag("Parser of reasoning")] = None
    enable_deterministic_inference: Annotated[bool, Flag("Kernels whose result does not depend on the batch")] = False
    # - several devices
    tp_size: Annotated[int, Flag("Tensor parallel size", low=1)] = 1
    dist_timeout: Annotated[int | None, Flag("Seconds that a rank which lives is waited for (300)", low=1)] = None
    pp_size: Annotated[int, Flag("Stages of a pipeline, each with some of the layers", low=1)] = 1
    pp_max_micro_batch_size: Annotated[int | None, Flag("Requests in one step of a pipeline", low=1)] = None
    pp_async_batch_depth: Annotated[int, Flag("Steps in flight beyond one per stage", low=0, high=8)] = 0
    dp_size: Annotated[int, Flag("Copies of the model behind one address", low=1)] = 1
    attn_dp_size: Annotated[int, Flag("The same as --dp-size with --enable-dp-attention", low=1)] = 1
    enable_dp_attention: Annotated[bool, Flag("Copies of --dp-size share the experts of --tp-size")] = False
    load_balance_method: Annotated[str, Flag("Which copy serves a request", LOAD_BALANCE_METHODS)] = "auto"
    nnodes: Annotated[int, Flag("Number of nodes", low=1)] = 1
    node_rank: Annotated[int, Flag("Rank of this node", low=0)] = 0
    dist_init_addr: Annotated[str | None, Flag("host:port where the nodes meet")] = None
    base_gpu_id: Annotated[int, Flag("First GPU", low=0)] = 0
    gpu_id_step: Annotated[int, Flag("Step from one GPU to the next", low=1)] = 1
    # - mixture of experts
    moe_runner_backend: Annotated[str, Flag("Kernels of the experts")] = "auto"
    ep_dispatch_algorithm: Annotated[str | None, Flag("Which copy of an expert serves a token")] = None
    # - LoRA and speculative decoding
    enable_lora: Annotated[bool | None, Flag("LoRA adapters")] = None
    lora_paths: Annotated[tuple[str, ...] | None, Flag("Adapters at start: path, name=path or JSON")] = None
    max_lora_rank: Annotated[int | None, Flag("Largest rank of an adapter", low=1)] = None
    lora_target_modules: Annotated[tuple[str, ...] | None, Flag("Modules that adapters change")] = None
    max_loaded_loras: Annotated[int | None, Flag("Most adapters in memory", low=1)] = None
    max_loras_per_batch: Annotated[int, Flag("Most adapters in a step", low=1)] = 8
    lora_backend: Annotated[str, Flag("Kernels of adapters")] = "csgmv"
    speculative_algorithm: Annotated[str | None, Flag("How tokens are guessed ahead")] = None
    speculative_draft_model_path: Annotated[str | None, Flag("Model that guesses")] = None
    speculative_num_steps: Annotated[int | None, Flag("Steps of guessing", low=1)] = None
    speculative_eagle_topk: Annotated[int | None, Flag("Branches per step of guessing", low=1)] = None
    speculative_num_draft_tokens: Annotated[int | None, Flag("Tokens checked per step", low=1)] = None

    @classmethod
    def create(cls, **values: Any) -> "ServerArgs":
        """The arguments with these values, validated as on the command line. ConfigError says what is wrong."""
        from moonlang.config.build import build

        return build(values)


def parse(argv: Sequence[str]) -> ServerArgs:
    """Read a command line (without the program's name). Prints help and exits on --help; ConfigError on bad input."""
    from moonlang.config.command_line import read

    return read(argv)


prepare_server_args = parse  # SGLang's name for it


def resolve(
    args: ServerArgs, model: "ModelConfig", host: "HostFacts | None" = None
) -> tuple[ServerArgs, dict[str, str]]:
    """Fill in every value left to the engine; the dict says why, by field name. Pure: see `config.resolve`."""
    from moonlang.config.resolve import resolve_args

    return resolve_args(args, model, host)
