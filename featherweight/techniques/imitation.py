"""How far a student is from its teacher: losses on outputs and on features, functions of tensors and nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUT_LOSSES = ("soft_targets", "logits", "dkd", "dist", "none")
_MOST_NON_TARGET = 8.0  # weight of DKD's non-target part for 100 classes (Zhao et al., 2022); 2 for ten
_CLASSES = ("cross_entropy", F.cross_entropy, F.nll_loss)
_BINARY = ("binary_cross_entropy", F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)
_TINY = 1e-12


def output_kind(loss: Any) -> str:
    """Return what a loss takes the output for: `"classes"` on dimension 1, `"labels"` of yes or no each, or `"values"`.

    Args:
        loss: `Data.loss`: a name, a function of `torch.nn.functional`, a loss module, or any callable, which gives `"values"`.
    """
    if loss in _CLASSES or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return "classes"
    if loss in _BINARY or isinstance(loss, nn.BCEWithLogitsLoss | nn.MultiLabelSoftMarginLoss):
        return "labels"
    return "values"


def imitation(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    temperature: float,
    loss: str = "soft_targets",
    target: Any = None,
    warmth: float = 1.0,
) -> Tensor:
    """Return how far the student's output is from the teacher's.

    Values are compared by squared error whatever the loss; for labels of yes or no each, which have no classes beside the
    target, `dkd` is `soft_targets`.

    Args:
        student: `[batch, classes, ...]` or `[batch]`.
        teacher: the same shape.
        kind: see `output_kind`.
        temperature: divides the logits, above 0; losses on probabilities are scaled by its square (Hinton et al., 2015).
        loss: one of `OUTPUT_LOSSES`; `"none"` gives zero.
        target: `[batch, ...]` class indices for `dkd`; where there are none, or one is negative, the teacher's best class is it.
        warmth: 0 to 1, factor on `dkd` early in training.
    """
    if loss == "none":
        return 0.0 * student.sum()  # a loss that nothing could be trained on would be an error
    if kind == "values" or loss == "logits" or (kind == "classes" and student.dim() < 2):
        return F.mse_loss(student, teacher)
    if kind == "labels" and loss != "dist":
        wanted = torch.sigmoid(teacher / temperature)
        return F.binary_cross_entropy_with_logits(student / temperature, wanted) * temperature**2
    given, wanted = _rows(student), _rows(teacher)
    if loss == "dist":
        squash = torch.sigmoid if kind == "labels" else lambda logits: F.softmax(logits, 1)
        return dist(squash(given / temperature), squash(wanted / temperature)) * temperature**2
    if loss == "dkd":
        best = wanted.argmax(1)
        known = isinstance(target, Tensor) and not target.is_floating_point() and target.numel() == len(best)
        labels = torch.where(target.flatten() < 0, best, target.flatten()) if known else best
        return warmth * dkd(given, wanted, labels, temperature, beta=non_target_weight(given.shape[1]))
    return soft_targets(given, wanted, temperature)


def _rows(output: Tensor) -> Tensor:
    """`[batch, classes, ...]` to `[samples, classes]`."""
    return output.movedim(1, -1).reshape(-1, output.shape[1])


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy with the teacher's softened probabilities, times the square of the temperature.

    Its gradient is that of their Kullback-Leibler divergence. Hinton, Vinyals & Dean, 2015.

    Args:
        student: logits `[samples, classes]`.
        teacher: the same.
        temperature: above 0.
    """
    wanted = F.softmax(teacher / temperature, 1)
    return -(wanted * F.log_softmax(student / temperature, 1)).sum(1).mean() * temperature**2


def non_target_weight(classes: int) -> float:
    """Return the weight of DKD's non-target part: 8 from 40 classes on, 2 for ten, and never below 1."""
    return min(_MOST_NON_TARGET, max(1.0, classes / 5))


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Return decoupled distillation: `alpha` times target-class and `beta` times non-target-class divergence.

    Zhao, Cui, Song, Qiu & Liang, "Decoupled Knowledge Distillation", CVPR 2022. With two classes the second part is 0.

    Args:
        student: logits `[samples, classes]`.
        teacher: the same.
        target: class indices `[samples]`.
        temperature: above 0; the loss is scaled by its square.
        alpha: weight of the divergence between target and all others.
        beta: weight of the divergence among the others.
    """
    mask = F.one_hot(target, student.shape[1]).bool()
    given, wanted = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    among = [F.log_softmax(part[~mask].view(len(target), -1), 1) for part in (given, wanted)]
    others = [part.masked_fill(mask, -math.inf).logsumexp(1) for part in (given, wanted)]
    binary = [torch.stack([part[mask], other], 1) for part, other in zip((given, wanted), others, strict=True)]
    return (alpha * _divergence(*binary) + beta * _divergence(*among)) * temperature**2


def _divergence(given: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence from log probabilities `[samples, classes]`, mean over the samples."""
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def dist(student: Tensor, teacher: Tensor, between: float = 1.0, within: float = 1.0) -> Tensor:
    """Return one minus the correlation of each sample's probabilities, plus one minus that of each class over the batch.

    Huang, You, Wang, Qian & Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. Wants 64 samples or more.

    Args:
        student: probabilities `[samples, classes]`.
        teacher: the same.
        between: weight of the relations between the classes of a sample.
        within: weight of those within a class over the samples; left out for a single sample.
    """
    loss = between * (1 - _correlations(student, teacher).mean())
    return loss + within * (1 - _correlations(student.t(), teacher.t()).mean()) if len(student) > 1 else loss


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row."""
    return F.cosine_similarity(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True), 1)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of features, any shape.

    Romero et al., "FitNets", ICLR 2015; hidden states and embeddings of Transformers: Jiao et al., "TinyBERT", 2020.
    """
    return F.mse_loss(student, teacher)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of the normalized attention maps, mean over the batch, 0 to 2.

    A map is the mean of the squared channels at each place. Zagoruyko & Komodakis, "Paying More Attention to Attention",
    ICLR 2017.

    Args:
        student: feature maps `[batch, channels, ...]`; how many channels does not matter.
        teacher: the same with as many places.
    """
    given, wanted = (F.normalize(part.square().mean(1).flatten(1), dim=1) for part in (student, teacher))
    return (given - wanted).square().sum(1).mean()


def relational(student: Tensor, teacher: Tensor, angles: float = 2.0) -> Tensor:
    """Return how far the distances between samples, and `angles` times the angles among three of them, are from the teacher's.

    Distances are divided by their mean; both parts are Huber losses. Park, Kim, Lu & Cho, "Relational Knowledge
    Distillation", CVPR 2019. Takes `batch ** 3` floats.

    Args:
        student: features `[batch, ...]`; their width does not matter.
        teacher: the same batch.
        angles: weight of the angles.
    """
    (near, turned), (wanted_near, wanted_turned) = (_relations(part.flatten(1)) for part in (student, teacher))
    return F.smooth_l1_loss(near, wanted_near) + angles * F.smooth_l1_loss(turned, wanted_turned)


def _relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances `[n, n]` divided by the mean of those between two samples, and cosines `[n, n, n]` of the angle at `j`."""
    products = (features - features.mean(0)) @ (features - features.mean(0)).t()
    norms = products.diagonal()
    squares = (norms[:, None] + norms - 2 * products).clamp_min(0)
    apart = squares > _TINY * norms.max()
    distances = torch.where(apart, squares, 1.0).sqrt() * apart  # a root has no gradient at zero
    mean = distances.sum() / apart.sum().clamp_min(1)
    # (x_i - x_j)(x_k - x_j) at [i, j, k]
    inner = products[:, None] - products[:, :, None] - products[None] + norms[None, :, None]
    inverse = torch.where(apart, 1 / distances.clamp_min(_TINY**0.5), 0.0)
    return distances / mean.clamp_min(_TINY), inner * inverse[:, :, None] * inverse[None]


def self_relation(student: Tensor, teacher: Tensor, heads: int = 1) -> Tensor:
    """Return the divergence of the softmax of scaled products of each step's vector with every other's, in `heads` parts.

    Applied to queries, keys and values. Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation", 2021.

    Args:
        student: `[batch, steps, width]`, the width divisible by `heads`.
        teacher: the same with any width divisible by `heads`.
        heads: relation heads, 1 or more; the networks' own heads need not agree.
    """
    given, wanted = (
        split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
        for split in (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (student, teacher))
    )
    return _divergence(F.log_softmax(given, -1).flatten(0, 2), F.log_softmax(wanted, -1).flatten(0, 2))
