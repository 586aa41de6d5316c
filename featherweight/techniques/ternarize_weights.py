"""Ternary weights: minus, zero and plus a learned step a channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.latents import Widths, train_quantized
from featherweight.techniques.train import Training


@final
@dataclass(frozen=True)
class TernarizeWeights(Technique):
    """Train weights that are -1, 0 or 1 times a learned step a channel, with the original as teacher.

    At first the step and the threshold, half of it, have the least squared error; then both follow the loss. The coder spends
    at most log2(3) = 1.585 bits on a weight, fewer where zeros prevail. All else is as in `quantize_aware`: the first and the
    last layer, `activations`, layers that are quantized already, batch norms, and the best epoch, the start included. Two
    steps, one for each sign, are `share_weights` with 3 clusters.

    Paper: Li, Zhang & Liu, "Ternary Weight Networks", 2016; Zhu, Han, Mao & Dally, "Trained Ternary Quantization", ICLR 2017,
        with the learned step of Esser et al., LSQ, ICLR 2020.
    Use when: a file of a twentieth is wanted, and there are epochs to spend; after pruning, whose zeros it keeps.
    Costs: `epochs` of training with one more forward, of the teacher.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    activations: int = setting(0, low=0, high=8)
    edges: int = setting(8, low=2, high=8)
    epochs: int = setting(20, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)
    batches: int = setting(8, low=1, high=100_000)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What it reads: calibration data only for the ranges of inputs."""
        return frozenset({"train", "validate"} | ({"calibrate"} if self.activations else set()))

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each float layer, train in place, and yield one Write that says so."""
        widths = Widths(2, self.activations, self.edges, self.batches)
        yield from train_quantized(
            model, context, widths, Training(self.epochs, self.learning_rate, self.teacher_share)
        )
