"""Least-squares reconstruction: after a cut, the layers behind it make the best of the inputs that are left.

Papers: He, Zhang & Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017; Luo et al., "ThiNet", 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.edits import Cut, Keep, module_at
from featherweight.technique import Context
from featherweight.techniques.moments import ROWS, second_moments

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RIDGE = 1e-3  # of the mean second moment; pulls towards the weights as they are, so no error can grow
_WIDEST = 8192  # inputs; their second moments take half a gigabyte


def reconstructed(model: nn.Module, context: Context, keep: Keep, count: int) -> dict[str, Tensor]:
    """Return new weights, shaped as after the cut, of the layers in scope that lose inputs by it.

    Args:
        model: as it is before the cut.
        context: calibration data and scope.
        keep: the cut to come.
        count: calibration batches to read.

    Raises:
        DataError: there is no calibration data.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    cuts: dict[str, dict[int, Cut]] = {}
    for cut in keep.cuts:
        cuts.setdefault(cut.tensor, {})[cut.dim] = cut
    paths = []
    for name, dims in cuts.items():
        path, _, attribute = name.rpartition(".")
        layer = module_at(model, path)
        fits = 1 in dims and attribute == "weight" and type(layer) in _LAYERS and context.in_scope(path)
        if not fits or getattr(layer, "groups", 1) > 1 or holders[id(layer.weight)] > 1:
            continue
        if layer.get_parameter("weight")[0].numel() > _WIDEST:
            context.leave(path, f"its inputs are cut, but more than {_WIDEST} are not refitted")
        else:
            paths.append(path)
    if not paths:
        return {}
    moments = second_moments(model, context, paths, count, ROWS)
    weights: dict[str, Tensor] = {}
    for name, moment in moments.items():
        weight = module_at(model, name.rpartition(".")[0]).get_parameter("weight").detach()
        rows = torch.tensor(cuts[name][0].index) if 0 in cuts[name] else torch.arange(weight.shape[0])
        weights[name] = refitted(weight[rows], torch.tensor(cuts[name][1].index), moment[0])
    return weights


def refitted(weight: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
    """Return the weight on the kept inputs whose outputs are closest to those of `weight` on all of them.

    Args:
        weight: `[out, in, *kernel]`.
        kept: indices into `in`, `[kept]`.
        moment: second moment of the flattened inputs, `[in * kernel, in * kernel]`.

    Returns:
        `[out, kept, *kernel]`: the minimum of the squared output error plus a ridge around the weights as they are.
    """
    area = weight[0, 0].numel()
    stays = torch.zeros(weight.shape[1], area, dtype=torch.bool)
    stays[kept] = True
    mask = stays.flatten().to(moment.device)
    flat = weight.flatten(1).to(moment)
    order = (kept[:, None] * area + torch.arange(area)).flatten().to(moment.device)
    inner = moment[order][:, order]
    inner = inner + _RIDGE * inner.diagonal().mean().clamp_min(1e-30) * torch.eye(len(order)).to(moment)
    lost = flat[:, ~mask] @ moment[~mask][:, order]
    fitted: Tensor = flat[:, order] + torch.linalg.solve(inner, lost.T).T
    return fitted.reshape(weight.shape[0], len(kept), *weight.shape[2:]).to(weight)
