"""Multi-head attention over plain linear layers, so that heads can leave and every technique reaches the projections."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import ModelError


class Unfused:
    """What stands where PyTorch's encoder reads a weight to fuse it: an object that overrides operators is never fused."""

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """Refuse to be computed with."""
        raise ModelError(f"{function} read a weight that is not there: it belongs to a layer that was replaced")


class UnfusedLayer:
    """A linear or normalization layer without weights, for the same purpose."""

    weight = bias = Unfused()


class MultiHeadAttention(nn.Module):
    """`nn.MultiheadAttention` as four linear layers; what it is called with and what it returns are the same.

    Heads leave by slicing the rows of `query`, `key` and `value` and the columns of `out` and setting `heads`; the width of
    a head is read from the weights, and `scale` stays. Inside `nn.TransformerEncoderLayer` and its stacks it is always
    called: what they would need to fuse it is not there.

    Args:
        width: of the query and the output, `embed_dim` of `nn.MultiheadAttention`, 1 or more.
        heads: 1 or more.
        head_width: width of one head, 1 or more; `heads * head_width` need not be `width`.
        key_width: of the key; `width` when None.
        value_width: of the value; `width` when None.
        bias: of all four layers.
        dropout: of the attention weights while training, 0 to 1.
        batch_first: whether tensors are `[batch, steps, width]` and not `[steps, batch, width]`.
        scale: factor on the products of query and key; `head_width ** -0.5` when None.
    """

    in_proj_bias: ClassVar[None] = None
    in_proj_weight: ClassVar[Unfused] = UnfusedLayer.weight
    out_proj: ClassVar[UnfusedLayer] = UnfusedLayer()
    _qkv_same_embed_dim: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        key_width: int | None = None,
        value_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.scale = float(head_width**-0.5 if scale is None else scale)
        self.dropout = float(dropout)
        self.batch_first = batch_first
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(width if key_width is None else key_width, inner, bias=bias)
        self.value = nn.Linear(width if value_width is None else value_width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)

    @property
    def num_heads(self) -> int:
        """The number of heads under the name `nn.MultiheadAttention` gives it."""
        return self.heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are named and shaped as those of `nn.MultiheadAttention`.

        Args:
            query: `[batch, steps, width]`, `[steps, batch, width]` or, without a batch, `[steps, width]`.
            key: the same with `sources` steps of `key_width`.
            value: the same with `sources` steps of `value_width`.
            key_padding_mask: `[batch, sources]`, or `[sources]`; True is left out, floats are added to the products.
            need_weights: whether to return the attention weights too.
            attn_mask: `[steps, sources]` or `[batch * heads, steps, sources]`, bool or float as above.
            average_attn_weights: return `[batch, steps, sources]` and not `[batch, heads, steps, sources]`.
            is_causal: says that `attn_mask` is the causal one, which need not be read then.

        Raises:
            ModelError: `is_causal` without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise ModelError("is_causal says what attn_mask is and needs it: give attn_mask=[steps, sources]")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        queries, keys = self._split(self.query(query)), self._split(self.key(key))
        values = self._split(self.value(value))
        dropout = self.dropout if self.training else 0.0
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, queries.dtype)
        weights = None
        if need_weights:
            products = (queries * self.scale) @ keys.transpose(-2, -1)
            weights = F.softmax(products if mask is None else products + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, mask, dropout, is_causal=causal, scale=self.scale
            )
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _split(self, steps: Tensor) -> Tensor:
        """`[batch, steps, heads * head]` to `[batch, heads, steps, head]`."""
        return steps.reshape(*steps.shape[:2], self.heads, -1).transpose(1, 2)

    def _mask(self, attend: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The sum of both masks as floats that broadcast to `[batch, heads, steps, sources]`."""
        if attend is not None:
            attend = _additive(attend, dtype)
            attend = attend.reshape(-1, self.heads, *attend.shape[1:]) if attend.dim() == 3 else attend
        if padding is None:
            return attend
        padding = _additive(padding, dtype).unsqueeze(-2).unsqueeze(-2)
        return padding if attend is None else attend + padding

    def extra_repr(self) -> str:
        """Show what the children do not."""
        return f"heads={self.heads}, scale={self.scale:.4g}, dropout={self.dropout}, batch_first={self.batch_first}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
