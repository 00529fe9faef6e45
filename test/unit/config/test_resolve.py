"""What is left to the engine is chosen, with a reason, and choosing twice changes nothing."""

import dataclasses

import pytest

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.config.resolve import HostFacts
from moonlang.config.server_args import ServerArgs, resolve

MODEL = ModelConfig(
    path="/m", hf={}, architectures=("LlamaForCausalLM",), model_type="llama", vocab_size=100, hidden_size=64,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, context_length=2048, dtype="bfloat16",
    eos_token_ids=(2,), generation={},
)  # fmt: skip


def test_every_automatic_value_has_a_reason():
    args, reasons = resolve(ServerArgs(), MODEL)
    changed = [
        field.name
        for field in dataclasses.fields(ServerArgs)
        if getattr(args, field.name) != getattr(ServerArgs(), field.name)
    ]
    assert sorted(changed) == sorted(reasons)
    assert all(reasons.values())
    assert (args.page_size, args.chunked_prefill_size, args.device) == (16, 1024, "cpu")
    assert (args.attention_backend, args.sampling_backend, args.grammar_backend) == (
        "torch_native",
        "pytorch",
        "xgrammar",
    )
    with_kernels, reasons = resolve(ServerArgs(), MODEL, HostFacts(cpu_kernels="avx2"))
    assert with_kernels.attention_backend == "cpu"
    assert "avx2" in reasons["attention_backend"]
    assert resolve(ServerArgs(), MODEL, HostFacts(cpu_kernels="avx2", cuda=True))[0].attention_backend == "torch_native"
    assert (args.served_model_name, args.tokenizer_path, args.dtype) == ("moonlang-tiny", "/m", "bfloat16")
    assert (args.context_length, args.max_prefill_tokens, args.messaging_backend) == (2048, 16384, "zmq")
    assert resolve(ServerArgs(), MODEL, HostFacts(rings=True))[0].messaging_backend == "mooncake"


@pytest.mark.parametrize(
    "given", [{}, {"page_size": 24}, {"in_process": True}, {"dtype": "half"}, {"model_path": "a/b"}]
)
@pytest.mark.parametrize("host", [HostFacts(), HostFacts(cuda=True, seed=7)])
def test_idempotent(given, host):
    first, _ = resolve(ServerArgs.create(**given), MODEL, host)
    again, reasons = resolve(first, MODEL, host)
    assert again == first
    assert reasons == {}


def test_what_was_given_stays():
    given = ServerArgs.create(
        page_size=4, chunked_prefill_size=64, device="cpu", random_seed=3, max_running_requests=2, served_model_name="x"
    )
    args, reasons = resolve(given, MODEL, HostFacts(cuda=True, seed=9))
    assert not reasons.keys() & {"page_size", "chunked_prefill_size", "device", "random_seed", "served_model_name"}
    assert (args.device, args.random_seed) == ("cpu", 3)


def test_the_host_decides_device_and_seed():
    args, _ = resolve(ServerArgs(), MODEL, HostFacts(cuda=True, seed=9))
    assert (args.device, args.random_seed, args.chunked_prefill_size) == ("cuda", 9, 8192)


@pytest.mark.parametrize("page", [1, 3, 16, 100, 1024])
def test_the_automatic_chunk_is_a_multiple_of_the_page(page):
    args, _ = resolve(ServerArgs.create(page_size=page), MODEL)
    assert args.chunked_prefill_size % page == 0
    assert args.chunked_prefill_size > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"page_size": 16, "chunked_prefill_size": 40}, "Use 32 or 48"),
        ({"page_size": 16, "chunked_prefill_size": 8}, "Use 16 or 32"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "--dtype"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "needs the CPU kernels"),
        ({"kv_cache_dtype": "int8", "attention_backend": "torch_native"}, "scripts/setup"),
        ({"page_size": 16, "max_total_tokens": 15}, "one page"),
    ],
)
def test_contradictions(given, says):
    args = ServerArgs.create(**given)
    model = dataclasses.replace(MODEL, dtype=args.dtype) if args.dtype != "auto" else MODEL
    with pytest.raises(ConfigError) as caught:
        resolve(args, model)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_the_cpu_kernels_keep_keys_and_values_in_narrow_types(name):
    given = ServerArgs.create(kv_cache_dtype=name)
    args, _ = resolve(given, MODEL, HostFacts(cpu_kernels="avx512"))
    assert args.kv_cache_dtype == name
    with pytest.raises(ConfigError):
        resolve(given, MODEL, HostFacts(cuda=True, cpu_kernels="avx512"))


def test_latents_have_no_scale_for_a_part_of_a_row():
    latents = dataclasses.replace(MODEL, hf={"v_head_dim": 16}, num_kv_heads=1, head_dim=40, latent=True)
    with pytest.raises(ConfigError, match="Take fp8_e4m3"):
        resolve(ServerArgs.create(kv_cache_dtype="int8"), latents, HostFacts(cpu_kernels="avx512"))
    args, _ = resolve(ServerArgs.create(kv_cache_dtype="fp8_e4m3"), latents, HostFacts(cpu_kernels="avx512"))
    assert args.kv_cache_dtype == "fp8_e4m3"


def test_the_cache_type_gets_its_full_name():
    args, reasons = resolve(ServerArgs.create(kv_cache_dtype="bf16"), MODEL)
    assert (args.kv_cache_dtype, reasons["kv_cache_dtype"]) == ("bfloat16", "the full name of what was asked for")


def test_chunking_can_be_off():
    args, _ = resolve(ServerArgs.create(chunked_prefill_size=-1), MODEL)
    assert args.chunked_prefill_size == -1


def test_prefill_budget_fits_the_longest_sequence():
    args, _ = resolve(ServerArgs(), dataclasses.replace(MODEL, context_length=40000))
    assert args.max_prefill_tokens == 40000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tp_size": 3}, "1, 2, 4 or 8"),
        ({"tp_size": 2, "in_process": True}, "--in-process"),
        ({"pp_size": 2, "in_process": True}, "--in-process"),
        ({"pp_size": 99}, "more than the"),
        ({"tp_size": 2, "nnodes": 2}, "--dist-init-addr"),
        ({"tp_size": 2, "nnodes": 2, "dist_init_addr": "host"}, "no address"),
        ({"tp_size": 2, "nnodes": 2, "node_rank": 2, "dist_init_addr": "h:1"}, "Count from 0"),
        ({"tp_size": 2, "nnodes": 4, "dist_init_addr": "h:1"}, "spread evenly"),
    ],
)
def test_ranks_that_cannot_be(given, says):
    with pytest.raises(ConfigError) as caught:
        resolve(ServerArgs.create(**given), MODEL)
    assert says in str(caught.value)


@pytest.mark.parametrize("given", [{"tp_size": 2}, {"pp_size": 2}])
def test_pages_of_several_gpus_do_not_move(given):
    pair = ServerArgs.create(disaggregation_mode="prefill", **given)
    with pytest.raises(ConfigError, match="host memory"):
        resolve(pair, MODEL, HostFacts(cuda=True))
    resolve(pair, MODEL)


def test_mooncake_does_not_carry_tokens_of_gpus():
    given = ServerArgs.create(tp_size=2, moe_a2a_backend="mooncake")
    with pytest.raises(ConfigError, match="--moe-a2a-backend torch"):
        resolve(given, MODEL, HostFacts(cuda=True))
    resolve(given, MODEL)


EXPERTS = dataclasses.replace(MODEL, hf={"num_local_experts": 8})


def test_experts_are_spread_over_all_ranks():
    """Also when --ep-size says fewer: they are never cut."""
    for given in ({"ep_size": 2}, {"ep_size": 4}, {"moe_a2a_backend": "mooncake"}):
        args, reasons = resolve(ServerArgs(tp_size=4, **given), EXPERTS)
        assert args.ep_size == 4
        assert "ep_size" not in reasons or "whole" in reasons["ep_size"]
    assert resolve(ServerArgs(tp_size=2), EXPERTS)[0].ep_size == 1
    assert resolve(ServerArgs(tp_size=2, ep_size=2), MODEL)[0].ep_size == 2
    with pytest.raises(ConfigError, match="--ep-size 4 does not divide --tp-size 2"):
        resolve(ServerArgs(tp_size=2, ep_size=4), EXPERTS)


def test_experts_move_where_tokens_travel():
    for given in ({"enable_eplb": True}, {"ep_num_redundant_experts": 2}):
        with pytest.raises(ConfigError, match=r"needs tokens that travel.* Add --moe-a2a-backend"):
            resolve(ServerArgs(tp_size=2, **given), EXPERTS)
        assert resolve(ServerArgs(tp_size=2, moe_a2a_backend="torch", **given), EXPERTS)
        assert resolve(ServerArgs(tp_size=2, dp_size=2, enable_dp_attention=True, **given), MIXTURE)


def test_int8_travels_by_mooncake_only():
    with pytest.raises(ConfigError, match="--deepep-dispatcher-output-dtype int8"):
        resolve(ServerArgs(tp_size=2, deepep_dispatcher_output_dtype="int8"), EXPERTS)


def test_an_elastic_server_is_a_plain_one():
    plain = ServerArgs(tp_size=2, elastic_ep_backend="mooncake")
    resolve(plain, EXPERTS)
    resolve(dataclasses.replace(plain, dp_size=2), EXPERTS)
    for other, name in (({"disaggregation_mode": "prefill"}, "--disaggregation-mode"), ({"pp_size": 2}, "--pp-size")):
        with pytest.raises(ConfigError, match=name):
            resolve(dataclasses.replace(plain, **other), EXPERTS)


def test_elastic_copies_that_share_experts_are_one_rank_each():
    shared = ServerArgs(tp_size=2, dp_size=2, enable_dp_attention=True, elastic_ep_backend="mooncake")
    resolve(shared, MIXTURE)
    with pytest.raises(ConfigError, match="copies of one rank each"):
        resolve(dataclasses.replace(shared, tp_size=4), MIXTURE)


def test_ranks_that_can_be():
    given = {"tp_size": 2, "nnodes": 2, "node_rank": 1, "dist_init_addr": "[::1]:5000"}
    args, _ = resolve(ServerArgs.create(**given), MODEL)
    assert (args.tp_size, args.nnodes, args.node_rank) == (2, 2, 1)


MIXTURE = dataclasses.replace(MODEL, architectures=("MixtralForCausalLM",), hf={"num_local_experts": 4})
MANY = dataclasses.replace(MIXTURE, hf={"num_local_experts": 16})


@pytest.mark.parametrize(
    "given", [{"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, {"tp_size": 2, "attn_dp_size": 2}]
)
def test_replicas_that_share_experts(given):
    args, reasons = resolve(ServerArgs(**given), MIXTURE)
    assert (args.tp_size, args.dp_size, args.enable_dp_attention, args.moe_a2a_backend) == (2, 2, True, "torch")
    assert "travel" in reasons["moe_a2a_backend"]
    assert resolve(args, MIXTURE)[0] == args
    assert resolve(ServerArgs(moe_a2a_backend="mooncake", **given), MIXTURE)[0].moe_a2a_backend == "mooncake"


@pytest.mark.parametrize(("ranks", "replicas"), [(4, 2), (8, 4), (8, 2), (4, 4)])
def test_replicas_of_several_ranks_that_share_experts(ranks, replicas):
    args, _ = resolve(ServerArgs(tp_size=ranks, dp_size=replicas, enable_dp_attention=True), MANY)
    assert (args.tp_size, args.dp_size, args.moe_a2a_backend) == (ranks, replicas, "torch")


def test_dense_layers_that_are_whole_need_not_be_cut():
    odd = dataclasses.replace(MANY, hf={**MANY.hf, "intermediate_size": 20})
    with pytest.raises(ConfigError, match="the 20 columns of feed-forward"):
        resolve(ServerArgs(tp_size=2), odd)
    assert resolve(ServerArgs(tp_size=2), dataclasses.replace(odd, dense_whole=True))[0].tp_size == 2


def test_one_replica_shares_experts_with_nobody():
    args, reasons = resolve(ServerArgs(tp_size=2, enable_dp_attention=True), MIXTURE)
    assert (args.enable_dp_attention, args.moe_a2a_backend) == (False, "none")
    assert "nobody" in reasons["enable_dp_attention"]


@pytest.mark.parametrize(
    ("given", "model", "why"),
    [
        ({"tp_size": 2, "attn_dp_size": 2}, MODEL, "has none"),
        ({"tp_size": 8, "attn_dp_size": 8}, MIXTURE, "cannot share the 4 experts"),
        ({"tp_size": 8, "attn_dp_size": 2}, MIXTURE, "cannot share the 4 experts"),
        ({"tp_size": 3, "dp_size": 2, "enable_dp_attention": True}, MIXTURE, "--tp-size 3, and --dp-size 2 does not"),
        ({"tp_size": 2, "dp_size": 4, "enable_dp_attention": True}, MIXTURE, "--tp-size 2, and --dp-size 4 does not"),
        ({"tp_size": 2, "dp_size": 2, "attn_dp_size": 4}, MIXTURE, "--attn-dp-size 4 is not --dp-size 2"),
        ({"tp_size": 6, "attn_dp_size": 2}, MANY, "--tp-size 6 for --dp-size 2 does not go with .*: ranks number 1, 2"),
        ({"dp_size": 2, "nnodes": 2, "dist_init_addr": "h:5000"}, MODEL, "does not go with --nnodes"),
        ({"dp_size": 2, "in_process": True}, MODEL, "does not go with --in-process"),
        ({"tokenizer_worker_num": 2, "in_process": True}, MODEL, "--tokenizer-worker-num 2 does not go with"),
        ({"load_balance_method": "follow_bootstrap_room"}, MODEL, "needs rooms"),
    ],
)
def test_replicas_that_cannot_be(given, model, why):
    with pytest.raises(ConfigError, match=why):
        resolve(ServerArgs(**given), model)
