"""What a rank's model holds of the checkpoint's tensors."""

from __future__ import annotations

from torch import nn

from moonlang.layers.cut import Cut, Cuts
from moonlang.layers.linear import Projection
from moonlang.layers.sinks import Sinks
from moonlang.moe.experts import Experts


def cuts_of(model: nn.Module) -> dict[str, Cuts]:
    """By parameter, the parts of the tensors that make it up; parameters that are whole are left out.

    The parameters of experts are cut as one tensor [E, ...], of which the rank has some of the E, in any order.
    """
    found: dict[str, Cuts] = {}
    for name, module in model.named_modules():
        if isinstance(module, Projection | Sinks) and module.cuts:
            found[f"{name}.weight"] = module.cuts
            if module.bias is not None and module.cuts[0].axis == 0:
                found[f"{name}.bias"] = module.cuts
        elif isinstance(module, Experts) and module.held != tuple(range(module.count)):
            cut = (Cut(0, module.held, module.count),)
            found |= {f"{name}.{parameter}": cut for parameter, _ in module.named_parameters(recurse=False)}
    return found
