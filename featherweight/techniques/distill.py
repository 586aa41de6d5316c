"""Fine-tune with the original model as teacher: what heals every other step, quantized layers included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.edits import Write
from featherweight.technique import Context, Edits, Technique, setting
from featherweight.techniques.guidance import Guidance
from featherweight.techniques.matching import terms
from featherweight.techniques.train import Training, fit


@final
@dataclass(frozen=True)
class Distill(Technique):
    """Train on the task's loss and the original model's outputs together; the best validation epoch wins.

    Quantized layers train through float latents with learned scales and come back quantized, so that the same step is
    quantization-aware training. Zeros of pruned tensors stay zero. Without labels the teacher alone is followed.

    `loss` is a sum such as `"dkd + 0.5 * hint layer2 -> layer3"`. On outputs: `soft_targets`, `logits` (squared error), `dkd`
    (without labels the teacher's best class is its target; it warms up over the first twelfth), `dist`, `none`; outputs that
    are no classes or labels of yes or no are compared by squared error. On what a module of the student and one of the
    teacher give, by their paths: `hint` (squared error), `attention` (maps of feature maps), `relational` (distances and
    angles between samples), `relations` (of the steps' queries, keys and values, in attention modules that have these three
    as layers). Where sizes differ a linear projection is trained along, and dropped.

    `mixing` with the task's loss: `fixed` at `teacher_share`, `falling` from 1 to it, `rising` from it to 1, or `learnt`
    from there, which drifts towards the smaller of the two losses. A `Data.step` replaces all of this.

    Paper: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015; Zhao et al., DKD, CVPR 2022; Huang et
        al., DIST, NeurIPS 2022; Romero et al., FitNets, ICLR 2015; Zagoruyko & Komodakis, attention transfer, ICLR 2017; Park
        et al., RKD, CVPR 2019; Wang et al., MiniLMv2, 2021; Jiao et al., TinyBERT, 2020; `learnt`: Zhao, Li, Peng & Li,
        Electronics 11(7), 2022; Esser et al., LSQ, ICLR 2020.
    Use when: after anything that cost accuracy.
    Costs: `epochs` of training with one more forward, of the teacher; `relational` takes floats of the batch size cubed.

    Raises:
        RecipeError: `loss` cannot be read.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    epochs: int = setting(10, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)
    temperature: float = setting(3.0, low=0.1, high=100.0)
    weight_decay: float = setting(1e-4, low=0.0, high=1.0)
    patience: int = setting(0, low=0, high=1000)
    loss: str = setting("soft_targets")
    mixing: str = setting("fixed", choices=("fixed", "falling", "rising", "learnt"))

    def __post_init__(self) -> None:
        super().__post_init__()
        terms(self.loss)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Train in place, and yield one Write that says so."""
        training = Training(
            self.epochs, self.learning_rate, self.teacher_share, self.temperature, self.weight_decay, self.patience
        )
        fit(model, context, training, guidance=Guidance(self.loss, self.mixing))
        yield Write(None)
