"""Bags of embeddings: the rows of several indices, summed, averaged or the largest of each, over an ordinary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingBag(nn.Module):
    """`nn.EmbeddingBag` over an `nn.Embedding`; what it is called with and what it returns are the same.

    Args:
        num_embeddings: rows, 1 or more.
        embedding_dim: width of a row, 1 or more.
        mode: `sum`, `mean` or `max`.
        padding_idx: the row that does not count; None for none.
        include_last_offset: whether the last offset is the end of the last bag.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> None:
        super().__init__()
        self.mode, self.padding_idx, self.include_last_offset = mode, padding_idx, include_last_offset
        self.rows = nn.Embedding(num_embeddings, embedding_dim, padding_idx)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return `[bags, width]`.

        Args:
            input: indices `[bags, count]`, or `[count]` of all bags behind each other.
            offsets: where in a row of all indices each bag begins, `[bags]`.
            per_sample_weights: factors on the rows, shaped like the input, for `sum`.
        """
        return _pooled(self, self.rows(input), input, offsets, per_sample_weights)


@contextmanager
def over_rows() -> Iterator[None]:
    """Run a block, such as an export, with every `nn.EmbeddingBag` as rows that are looked up and pooled, which graphs have."""

    def forward(self: nn.EmbeddingBag, input: Tensor, offsets: Any = None, per_sample_weights: Any = None) -> Tensor:
        return _pooled(self, F.embedding(input, self.weight), input, offsets, per_sample_weights)

    before = nn.EmbeddingBag.forward
    try:
        nn.EmbeddingBag.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        nn.EmbeddingBag.forward = before  # type: ignore[method-assign]


def _pooled(bag: Any, rows: Tensor, input: Tensor, offsets: Tensor | None, factors: Tensor | None) -> Tensor:
    """The rows `[..., width]` of the indices, pooled as a bag is."""
    rows = rows if factors is None else rows * factors[..., None]
    if bag.padding_idx is None:
        counts = None
    else:
        counts = (input != bag.padding_idx)[..., None].to(rows.dtype)
        rows = rows.where(counts > 0, -torch.inf) if bag.mode == "max" else rows * counts
    if offsets is not None:
        return _in_a_row(bag, rows, offsets, counts)
    if bag.mode == "max":
        return rows.amax(1) if counts is None else _finite(rows.amax(1))
    if bag.mode == "sum":
        return rows.sum(1)
    return rows.mean(1) if counts is None else rows.sum(1) / counts.sum(1).clamp(min=1)


def _in_a_row(bag: Any, rows: Tensor, offsets: Tensor, counts: Tensor | None) -> Tensor:
    """The same for bags that stand behind each other, `[count, width]`."""
    bags = len(offsets) - int(bag.include_last_offset)
    places = (torch.arange(len(rows), device=rows.device)[:, None] >= offsets[:bags]).sum(1) - 1
    if bag.mode == "max":
        empty = rows.new_full((bags, rows.shape[1]), -torch.inf)
        return _finite(empty.scatter_reduce(0, places[:, None].expand_as(rows), rows, "amax"))
    total = rows.new_zeros(bags, rows.shape[1]).index_add(0, places, rows)
    if bag.mode == "sum":
        return total
    counts = rows.new_ones(len(rows), 1) if counts is None else counts
    return total / rows.new_zeros(bags, 1).index_add(0, places, counts).clamp(min=1)


def _finite(largest: Tensor) -> Tensor:
    """The largest of each bag, and zeros for a bag of which nothing counts."""
    return largest.where(largest > -torch.inf, 0.0)
