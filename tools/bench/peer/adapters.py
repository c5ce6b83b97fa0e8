"""Low-rank adapters of dense layers in PyTorch, as PEFT applies them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdaptedLinear(nn.Module):
    """A frozen dense layer plus a product of two small matrices, which are kept in float32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        like: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W + x A B * scale; the matrices are cast to the type of x."""
        inner = functional.linear(x, self.down.to(x.dtype)) * self.scale
        return self.base(x) + functional.linear(inner, self.up.to(x.dtype))


def add_adapters(model: nn.Module, rank: int, scale: float) -> list[nn.Parameter]:
    """Replaces the projections of all layers by adapted ones; returns what is trained."""
    adapted: list[nn.Parameter] = []
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if name in TARGETS and isinstance(layer, nn.Linear):
                replacement = AdaptedLinear(layer, rank, scale)
                setattr(module, name, replacement)
                adapted += [replacement.down, replacement.up]
    return adapted
