"""Binary weights, and inputs if wanted: signs times a learned step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.layers.signs import SURROGATES
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.latents import Widths, train_quantized
from featherweight.techniques.train import Training


@final
@dataclass(frozen=True)
class BinarizeWeights(Technique):
    """Train weights that are -1 or 1 times a learned step a channel, with the original as teacher.

    The step is the mean magnitude at first. `activations` 1 makes the network binary: inputs that can be negative become signs
    times a learned step, others 0 or the step. `gradient` is what passes a sign in the backward pass: that of the identity
    (`straight_through`), of two parabolas (`polynomial`), or of the first terms of a square wave's Fourier series
    (`frequency`). All else is as in `quantize_aware`: the first and the last layer, layers that are quantized already, batch
    norms, and the best epoch, the start included. Zeros of pruned tensors could not stay.

    Paper: Rastegari et al., "XNOR-Net", ECCV 2016; Liu et al., "Bi-Real Net", ECCV 2018; Xu et al., "Learning Frequency Domain
        Approximation for Binary Neural Networks", NeurIPS 2021; binary inputs of 0 and 1: Zhou et al., DoReFa-Net, 2016.
    Use when: a file of a thirtieth is wanted, and there are many epochs to spend.
    Costs: `epochs` of training with one more forward, of the teacher; a few points of accuracy.

    Raises:
        RecipeError: a tensor whose zeros must stay would become signs.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    activations: int = setting(0, low=0, high=8)
    gradient: str = setting("straight_through", choices=tuple(SURROGATES))
    edges: int = setting(8, low=2, high=8)
    epochs: int = setting(30, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)
    batches: int = setting(8, low=1, high=100_000)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What it reads: calibration data only for the ranges of inputs."""
        return frozenset({"train", "validate"} | ({"calibrate"} if self.activations else set()))

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each float layer, train in place, and yield one Write that says so."""
        grid = {} if self.gradient == "straight_through" else {"gradient": self.gradient}
        widths = Widths(1, self.activations, self.edges, self.batches, grid)
        yield from train_quantized(
            model, context, widths, Training(self.epochs, self.learning_rate, self.teacher_share)
        )
