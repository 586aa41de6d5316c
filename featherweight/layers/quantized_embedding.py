"""An embedding that stores integer codes, of which only the rows that are looked up become floats."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from featherweight.layers.quantized import QuantizedLayer


class QuantizedEmbedding(QuantizedLayer):
    """`nn.Embedding` over codes `[num_embeddings, embedding_dim]`, with one scale a row or one in all.

    Gradients are dense, and not divided by how often a row is read. The row at `padding_idx` gets none, as of `nn.Embedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        padding_idx: int | None = None,
        per_channel: bool = True,
        **grid: Any,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), bits=bits, bias=False, per_channel=per_channel, **grid)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Look `[...]` integers up: `[..., embedding_dim]`."""
        if self.codes is None and not self.training:
            return F.embedding(input, self.dequantized(), self.padding_idx)
        steps = self.scale if self.scale.numel() == 1 else F.embedding(input, self.scale[:, None])
        if self.codes is None:  # a table is much larger than what a batch reads of it
            return self._trained(F.embedding(input, self.get_parameter("weight"), self.padding_idx), steps)
        return F.embedding(input, self.codes).to(self.scale.dtype) * steps
