"""Fine-tune with the original model as teacher: what heals every other step, quantized layers included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.edits import Write
from featherweight.technique import Context, Edits, Technique, setting
from featherweight.techniques.train import Training, fit


@final
@dataclass(frozen=True)
class Distill(Technique):
    """Train on the task's loss and the original model's outputs together; the best validation epoch wins.

    Quantized layers train through float latents with learned scales and come back quantized, so that the same step is
    quantization-aware training. Zeros of pruned tensors stay zero. Without labels the teacher alone is followed.

    Paper: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015; Esser et al., LSQ, ICLR 2020.
    Use when: after anything that cost accuracy.
    Costs: `epochs` of training with one more forward, of the teacher.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    epochs: int = setting(10, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)
    temperature: float = setting(3.0, low=0.1, high=100.0)
    weight_decay: float = setting(1e-4, low=0.0, high=1.0)
    patience: int = setting(0, low=0, high=1000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Train in place, and yield one Write that says so."""
        training = Training(
            self.epochs, self.learning_rate, self.teacher_share, self.temperature, self.weight_decay, self.patience
        )
        fit(model, context, training)
        yield Write(None)
