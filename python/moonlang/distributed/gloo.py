"""Ranks anywhere that TCP reaches, through torch.distributed's gloo: the reference, and what goes beyond one host."""

from __future__ import annotations

from moonlang.distributed.torch_group import TorchGroup, abandon

__all__ = ["BACKEND", "abandon"]

BACKEND = TorchGroup.over("gloo")
