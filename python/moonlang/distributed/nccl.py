"""Ranks with a GPU each, through torch.distributed's NCCL."""

from __future__ import annotations

from torch import distributed

from moonlang.distributed.torch_group import TorchGroup, abandon

__all__ = ["BACKEND", "PROBE", "abandon"]


def _why_not() -> str:
    return "" if distributed.is_nccl_available() else "this torch was built without NCCL"


BACKEND = TorchGroup.over("nccl")
PROBE = _why_not
