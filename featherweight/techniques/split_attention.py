"""Take attention apart into the layers that it is made of, which every later step can then name one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.technique import Context, Edits, Stage, Technique
from featherweight.techniques.attention import attention_swaps


@final
@dataclass(frozen=True)
class SplitAttention(Technique):
    """Swap each `nn.MultiheadAttention` for linear layers `query`, `key`, `value` and `out` around the same product.

    Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2, for the layers.
    Use when: one recipe is to cut, factor, prune and round the parts of attention, each by its name; steps that need them
        apart take attention apart by themselves.
    Costs: nothing; it changes nothing but rounding.
    """

    stage: ClassVar[Stage | None] = Stage.FOLD

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap of each attention in scope, and a Write where weights of it were sparse."""
        yield from attention_swaps(model, context)
