"""Fold batch normalization into the convolution or linear layer in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap, module_at
from featherweight.errors import ModelError
from featherweight.layers.plain import convolution_options
from featherweight.technique import Context, Edits, Stage, Technique
from featherweight.techniques.targets import norm_pairs

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
@dataclass(frozen=True)
class FoldBatchNorm(Technique):
    """Merge each batch norm in evaluation mode into the layer that alone feeds it: `W' = W g/s`, `b' = (b - m) g/s + c`.

    Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        CVPR 2018, section 3.2.
    Use when: always before quantizing; it changes nothing but rounding.
    Costs: nothing; later training runs without normalization.
    """

    stage: ClassVar[Stage | None] = Stage.FOLD

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap of each layer (with a bias), and then one of each norm by an identity."""
        if not any(context.targets(model, *_NORMS)):
            return  # and the model need not be traced
        try:
            pairs = dict(norm_pairs(model, context))
        except ModelError as error:
            for path, _ in context.targets(model, *_NORMS):
                context.leave(path, str(error))
            return
        folded: dict[str, tuple[str, nn.Module]] = {}
        swaps: list[Swap] = []
        for norm_path, norm in list(context.targets(model, *_NORMS)):
            if norm_path not in pairs:
                context.leave(norm_path, "no convolution or linear layer feeds it alone")
                continue
            path = pairs[norm_path]
            layer = module_at(model, path)
            obstacle = _obstacle(model, path, layer, norm, context)
            if obstacle:
                context.leave(norm_path, obstacle)
                continue
            folded[norm_path] = path, layer
            swaps.append(_with_bias(path, layer, *_folded(layer, norm)))
        yield tuple(swaps)
        merged = [norm_path for norm_path, (path, layer) in folded.items() if module_at(model, path) is not layer]
        norms = {norm_path: module_at(model, norm_path) for norm_path in merged}
        if (yield tuple(Swap(norm_path, "identity", {}, {}) for norm_path in merged)):
            return
        for norm_path in merged:
            if module_at(model, norm_path) is norms[norm_path]:
                path, layer = folded[norm_path]
                weight = layer.get_parameter("weight").detach()
                bias = (
                    layer.bias.detach() if isinstance(layer.bias, Tensor) else torch.zeros_like(weight.flatten(1)[:, 0])
                )
                yield _with_bias(path, layer, weight, bias)

    def mildest(self) -> Technique:
        """Return itself: folding only rounds."""
        return self


def _obstacle(model: nn.Module, path: str, layer: nn.Module, norm: nn.Module, context: Context) -> str:
    """Why the layer in front of a norm cannot take it in, or an empty string."""
    if not context.in_scope(path):
        return f"{path} in front of it is out of scope"
    if type(layer) not in _LAYERS:
        return f"{path or 'the layer'} in front of it is a {type(layer).__name__} of its own"
    if getattr(norm, "running_mean", None) is None:
        return "it keeps no statistics"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"{path} in front of it pads in its own way"
    weight = layer.get_parameter("weight")
    if sum(other is weight for module in model.modules() for other in module._parameters.values()) > 1:
        return f"the weight of {path} in front of it is tied"
    return ""


def _folded(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    kind = layer.get_parameter("weight").dtype
    weight = layer.get_parameter("weight").detach().double()
    mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    gain = norm.weight.detach().double() if norm.affine else torch.ones_like(mean)
    shift = norm.bias.detach().double() if norm.affine else torch.zeros_like(mean)
    factor = gain / torch.sqrt(variance + norm.eps)
    old_bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else torch.zeros_like(mean)
    new = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return new.to(kind), ((old_bias - mean) * factor + shift).to(kind)


def _with_bias(path: str, layer: nn.Module, weight: Tensor, bias: Tensor) -> Swap:
    state = {"weight": weight, "bias": bias}
    if isinstance(layer, nn.Linear):
        return Swap(path, "linear", {"in_features": layer.in_features, "out_features": layer.out_features}, state)
    return Swap(path, "convolution", convolution_options(layer), state)  # type: ignore[arg-type]
