"""From the architecture in config.json to the file that implements it."""

from __future__ import annotations

import importlib

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.models.spec import ModelSpec

# Imported only when asked for: a server loads one model.
_FILES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}


def spec_for(config: ModelConfig, impl: str = "auto") -> ModelSpec:
    """The spec that serves `config`.

    impl, as in --model-impl: auto takes the own file, or the `transformers` fallback when there is none; moonlang (or
    sglang) insists on the own file; transformers always takes the fallback. ConfigError when there is no such file.
    """
    if impl not in ("auto", "moonlang", "sglang", "transformers"):
        raise ConfigError(f"There is no model implementation {impl!r}.", hint="Choose auto, moonlang or transformers.")
    own = _own_file(config)
    if impl == "transformers" or (own is None and impl == "auto"):
        return _spec("transformers")
    if own is None:
        raise ConfigError(
            f"No own implementation of {', '.join(config.architectures) or 'an unnamed architecture'}"
            f" (there are: {', '.join(_FILES)}).",
            hint="Use --model-impl auto to fall back to transformers.",
        )
    return _spec(own)


def has_own_file(config: ModelConfig, impl: str = "auto") -> bool:
    """Whether `spec_for` takes a file of this package, found out without importing it."""
    return impl != "transformers" and _own_file(config) is not None


def _own_file(config: ModelConfig) -> str | None:
    return next((_FILES[name] for name in config.architectures if name in _FILES), None)


def specs() -> dict[str, ModelSpec]:
    """Every own model file by name: for tests and documentation."""
    return {file: _spec(file) for file in dict.fromkeys(_FILES.values())}


def _spec(file: str) -> ModelSpec:
    return importlib.import_module(f"moonlang.models.{file}").SPEC
