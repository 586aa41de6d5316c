"""Quantization-aware training with learned steps, of weights and of activations, at 2 to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.guidance import Guidance
from featherweight.techniques.latents import Widths, train_quantized
from featherweight.techniques.matching import terms
from featherweight.techniques.train import Training


@final
@dataclass(frozen=True)
class QuantizeAware(Technique):
    """Train with quantized weights and inputs, with learned steps and the original as teacher; never worse than without.

    Every layer that has a matrix gets codes of `bits` bits with a step a channel, at first that of least squared error; with
    `activations` the inputs of linear layers and convolutions are rounded to that width too, 0 leaves them float. The first
    and the last of these layers have weights of `edges` bits and inputs of 8. Rounding passes gradients straight through to
    float latents, which is also the quantized distillation of Polino et al. Layers that an earlier step has quantized are
    trained as they are. Batch norms stay in their places and keep their statistics over the last third of the epochs;
    `fold_batch_norm` before it trains without them. Dropout is off where the teacher alone is followed (`teacher_share` 1).
    The best epoch on validation data comes back, the start included. `loss` is how the teacher is followed, as `distill` reads it.

    Paper: Esser et al., "Learned Step Size Quantization", ICLR 2020; Polino, Pascanu & Alistarh, "Model Compression via
        Distillation and Quantization", ICLR 2018.
    Use when: weights of 4 bits or fewer, or activations below 8, and there are epochs to spend.
    Costs: `epochs` of training with one more forward, of the teacher, and some 10 operations on each weight and input.

    Raises:
        RecipeError: `loss` cannot be read.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    bits: int = setting(4, low=2, high=8)
    activations: int = setting(0, low=0, high=8)
    edges: int = setting(8, low=2, high=8)
    epochs: int = setting(10, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)
    batches: int = setting(8, low=1, high=100_000)
    loss: str = setting("soft_targets")

    def __post_init__(self) -> None:
        super().__post_init__()
        terms(self.loss)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What it reads: calibration data only for the ranges of inputs."""
        return frozenset({"train", "validate"} | ({"calibrate"} if self.activations else set()))

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each float layer, train in place, and yield one Write that says so."""
        grid = {"full": True} if self.bits < 8 else {}
        widths = Widths(self.bits, self.activations, self.edges, self.batches, grid)
        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        yield from train_quantized(model, context, widths, training, Guidance(self.loss))

    def mildest(self) -> Technique:
        """Return 8 bits a weight."""
        return QuantizeAware(bits=8, epochs=1, learning_rate=0.0)
