"""A linear layer whose input channels are scaled first, so that they fit one grid: where no layer in front can take the factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledLinear(nn.Module):
    """`inner(input * factors)`, with factors `[in_features]` that are not trained.

    Paper: Xiao et al., "SmoothQuant", ICML 2023.
    """

    factors: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("factors", torch.ones(in_features))
        self.inner = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., out_features]`; the input is named as `nn.Linear` names it, for calls by keyword."""
        result: Tensor = self.inner(input * self.factors)
        return result
