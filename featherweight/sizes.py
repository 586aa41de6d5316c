"""Which integer attributes of a model follow from a cut: `out_channels`, `hidden_size`, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from featherweight.edits import Cut, module_at, named_tensors


def following_sizes(model: nn.Module, cuts: Sequence[Cut]) -> list[tuple[str, int]]:
    """Return `(dotted path, value)` of the integer attributes of `torch.nn` layers that follow from cut shapes."""
    shapes: dict[str, list[int]] = {}
    for cut in cuts:
        shape = shapes.setdefault(cut.tensor, list(named_tensors(model)[cut.tensor].shape))
        shape[cut.dim] = len(cut.index)
    sizes: dict[str, int] = {}
    for tensor, shape in shapes.items():
        path, _, attribute = tensor.rpartition(".")
        layer = module_at(model, path)
        if isinstance(layer, nn.modules.conv._ConvNd) and attribute == "weight":
            first, second = (1, 0) if layer.transposed else (0, 1)
            depthwise = layer.groups > 1 and layer.in_channels == layer.groups
            groups = layer.groups * shape[0] // layer.weight.shape[0] if depthwise else layer.groups
            sizes |= {f"{path}.groups": groups}
            sizes[f"{path}.out_channels"] = shape[first] * (groups if layer.transposed else 1)
            sizes[f"{path}.in_channels"] = shape[second] * (1 if layer.transposed else groups)
        elif isinstance(layer, nn.Linear) and attribute == "weight":
            sizes |= {f"{path}.out_features": shape[0], f"{path}.in_features": shape[1]}
        elif isinstance(layer, nn.modules.batchnorm._NormBase) and attribute in ("weight", "running_mean"):
            sizes[f"{path}.num_features"] = shape[0]
        elif isinstance(layer, nn.Embedding):
            sizes[f"{path}.embedding_dim"] = shape[1]
    return sorted(sizes.items())
