"""DeepSeek-V3 and R1 (and Kimi K2): V2 with sigmoids for scores, and a correction to them that balances the experts.

The layers behind the last one that checkpoints hold for multi-token prediction are not loaded.
"""

from __future__ import annotations

from typing import Any

import torch

from moonlang.config.model_config import ModelConfig
from moonlang.models import deepseek_v2
from moonlang.models.blocks import Decoder
from moonlang.models.deepseek_v2 import WEIGHTS, latent_decoder, sparse_mlps
from moonlang.models.spec import ModelSpec
from moonlang.moe.topk import Gating


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    hf = config.hf
    gating = Gating(
        experts_per_token=hf.get("num_experts_per_tok") or 8,
        normalise=bool(hf.get("norm_topk_prob", True)),
        sigmoid=True,
        scale=float(hf.get("routed_scaling_factor", 2.5)),
        groups=hf.get("n_group") or 1,
        groups_kept=hf.get("topk_group") or 1,
    )
    return latent_decoder(config, dtype, sparse_mlps(config, dtype, gating, corrected=True))


def tiny() -> dict[str, Any]:
    changes = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": 48,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "attention_bias": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    return deepseek_v2.tiny() | changes


SPEC = ModelSpec(architectures=("DeepseekV3ForCausalLM",), build=build, tiny=tiny, weights=WEIGHTS)
