"""What is compared: by case the checkpoint, the work of a round, the figures that count and what they must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from load import Load

LESS_IS_BETTER = ("ttft_p50_ms", "tpot_p50_ms", "token_p50_ms", "start_s", "beyond_mb")


@dataclass(frozen=True, slots=True)
class Demand:
    """times: by how much MoonLang must be better than `than`, a peer. at_most: the largest value allowed."""

    times: float = 1.0
    than: str = "vllm"
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """figures: by name, of `load.Figures`. options: MoonLang runs once more for each of these, by name, on the same
    work, and is compared with itself; peers do not take part then."""

    shape: str
    load: Load
    figures: Mapping[str, Demand]
    options: Mapping[str, str] = field(default_factory=dict)


def _latency(ttft: Demand, tpot: Demand) -> dict[str, Demand]:
    return {"ttft_p50_ms": ttft, "tpot_p50_ms": tpot}


def _rate(times: float) -> dict[str, Demand]:
    return {"tokens_per_s": Demand(times)}


CASES: dict[str, Case] = {
    "M-512": Case(
        "M",
        Load(requests=3, concurrency=1, input_len=512, output_len=32),
        _latency(Demand(1.15), Demand(1.8, at_most=28)),
    ),
    "M-2048": Case(
        "M", Load(requests=2, concurrency=1, input_len=2048, output_len=16), _latency(Demand(1.25), Demand())
    ),
    "M-offline": Case("M", Load(requests=32, concurrency=32, input_len=256, output_len=64, stream=False), _rate(1.35)),
    "M-online": Case(
        "M", Load(requests=16, concurrency=8, input_len=256, output_len=64), _rate(1.5) | _latency(Demand(), Demand())
    ),
    "M-prefix": Case(
        "M",
        Load(requests=16, concurrency=16, input_len=1056, output_len=32, shared_prefix=1024, stream=False),
        _rate(1.6),
    ),
    "M-quantized": Case(
        "M",
        Load(requests=2, concurrency=1, input_len=512, output_len=32),
        {"tpot_p50_ms": Demand()},
        {"int8": "--quantization int8", "int4": "--quantization int4"},
    ),
    "E-offline": Case("E", Load(requests=32, concurrency=32, input_len=128, output_len=64, stream=False), _rate(1.3)),
    "E-single": Case(
        "E",
        Load(requests=3, concurrency=1, input_len=512, output_len=64),
        _latency(Demand(), Demand(than="llama")),
    ),
    "S-offline": Case("S", Load(requests=64, concurrency=64, input_len=128, output_len=128, stream=False), _rate(1.3)),
    "S-single": Case("S", Load(requests=3, concurrency=1, input_len=128, output_len=128), _latency(Demand(), Demand())),
    "T64": Case("T", Load(requests=128, concurrency=64, input_len=32, output_len=128), _rate(1.3)),
    "T1": Case(
        "T",
        Load(requests=4, concurrency=1, input_len=32, output_len=128),
        {"token_p50_ms": Demand(at_most=0.5)},
    ),
}
# Of a variant against MoonLang without its option.
VARIANTS = {"int8": 1.6, "int4": 2.4}
# Of every checkpoint's servers: seconds to /health, and megabytes beyond the weights before the first request.
STARTUP = {"start_s": Demand(at_most=4), "beyond_mb": Demand(at_most=1000)}
WARM_UP = (
    Load(requests=1, concurrency=1, input_len=600, output_len=4, seed=10_000),
    Load(requests=8, concurrency=8, input_len=64, output_len=8, seed=10_001),
)
