"""Ranks with a GPU each, through torch.distributed's NCCL."""

from __future__ import annotations

from moonlang.distributed.torch_group import TorchGroup

BACKEND = TorchGroup.over("nccl")
