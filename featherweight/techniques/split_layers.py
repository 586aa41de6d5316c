"""Take layers apart into the ordinary ones that they are made of, which every later step can then name one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.technique import Context, Edits, Stage, Technique
from featherweight.techniques.apart import layer_swaps


@final
@dataclass(frozen=True)
class SplitLayers(Technique):
    """Swap attention, recurrent cells and bags of embeddings for linear layers and embeddings that compute the same.

    `nn.MultiheadAttention` has `query`, `key`, `value` and `out` then; `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell` have
    `incoming` and `hidden`; `nn.EmbeddingBag` has `rows`.

    Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2, for the layers of attention.
    Use when: one recipe is to cut, factor, prune and round the parts of such layers, each by its name; steps that need them
        apart take them apart by themselves.
    Costs: nothing; it changes nothing but rounding.
    """

    stage: ClassVar[Stage | None] = Stage.FOLD

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap of each such layer in scope, and a Write where weights of it were sparse."""
        yield from layer_swaps(model, context)
