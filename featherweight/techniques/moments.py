"""What enters each weight matrix on calibration data: second moments, and the energy that meets each weight.

A convolution's inputs are its unfolded patches, an attention's output projection sees the mixed values, and a recurrent
weight sees the hidden states of its own layer and direction, layer after layer.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import batches as read
from featherweight.data import example_inputs, forward, tensors
from featherweight.edits import module_at
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.matrices import matrices
from featherweight.techniques.recurrence import recurrent_inputs
from featherweight.trace import unfused

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
LAYERS = (nn.Linear, *CONVOLUTIONS, *RECURRENT, nn.MultiheadAttention, nn.Embedding)
ROWS = 4096  # inputs of a layer, of each batch and beside one for each of its columns, that moments are well known from
_VALUES = 1 << 24  # of unfolded patches held at once
_LEAST = 1e-8  # share of the mean that is added first where none was asked for
Seen = Callable[[nn.Module, str, Tensor], None]
"""Takes a layer, the attribute path of its weight, and what entered it: `[groups, n, in]`, or tokens for an embedding."""


@dataclass(frozen=True)
class Part:
    """Some of a layer's inputs, evenly spread.

    Attributes:
        most: inputs of one call at about.
        turn: number of the call, so that others are met each time.
    """

    most: int
    turn: int

    def of(self, count: int, axes: int) -> slice:
        """Return which places to take along each of so many axes that hold `count` inputs together."""
        every = max(1, math.ceil((count / self.most) ** (1 / axes)))
        return slice(self.turn % every, None, every)


def second_moments(
    model: nn.Module, context: Context, paths: Iterable[str], batches: int, most: int | None = None
) -> dict[str, Tensor]:
    """Return `E[x x^T]` of the flattened inputs of each weight matrix, by the first name of its tensor.

    The weight reshaped to `[groups, out, in]` multiplies inputs `[groups, in]`: grouped convolutions have their groups,
    `in_proj_weight` of an attention has three (query, key, value), all others one. An embedding has no entry, since its
    one-hot inputs never meet (`input_energy` counts them); neither has a layer that calibration data never reached.

    Args:
        model: run in evaluation mode as it is; its hooks are removed again, also on error.
        context: gives the calibration loader and the device.
        paths: dotted paths of layers of the types in `LAYERS`.
        batches: how many batches to read.
        most: inputs of a linear layer or a convolution in each batch, at about and beside one for each column; all when None.

    Returns:
        `[groups, in, in]` tensors in float64 on the context's device.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """
    return {name: second for name, (_, second) in moments(model, context, paths, batches, most).items()}


def moments(
    model: nn.Module, context: Context, paths: Iterable[str], batches: int, most: int | None = None, exact: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `E[x]` and `E[x x^T]` of what `second_moments` describes, `[groups, in]` and `[groups, in, in]`.

    Args:
        model: as for `second_moments`.
        context: as for `second_moments`.
        paths: as for `second_moments`.
        batches: as for `second_moments`.
        most: as for `second_moments`.
        exact: inputs of layers with so many columns are added up in double precision even where they are few.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """
    names = first_names(model)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, int] = {}

    def seen(layer: nn.Module, weight: str, inputs: Tensor) -> None:
        if isinstance(layer, nn.Embedding):
            return
        name = names[id(layer.get_parameter(weight))]
        # few are added up well enough in single precision
        wide = inputs.double() if most is None or inputs.shape[-1] <= exact else inputs.float()
        first, second = wide.sum(1).double(), (wide.transpose(1, 2) @ wide).double()
        before = sums.get(name, (0.0, 0.0))
        sums[name] = first + before[0], second + before[1]
        counts[name] = counts.get(name, 0) + inputs.shape[1]

    _watch(model, context, paths, batches, seen, most)
    return {name: (first / counts[name], second / counts[name]) for name, (first, second) in sums.items()}


def input_energy(model: nn.Module, context: Context, paths: Iterable[str], batches: int) -> dict[str, Tensor]:
    """Return the sum of squares of the inputs that met each weight, by the first name of its tensor.

    A row of an embedding meets a one each time its token is read. A tied weight sums over its uses.

    Args:
        model: as for `second_moments`.
        context: as for `second_moments`.
        paths: as for `second_moments`.
        batches: as for `second_moments`.

    Returns:
        `[rows, columns]` tensors in float64, of the shape of the weight flattened after its first dimension.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """
    names = first_names(model)
    sums: dict[str, Tensor] = {}

    def seen(layer: nn.Module, weight: str, inputs: Tensor) -> None:
        parameter = layer.get_parameter(weight)
        rows = parameter.shape[0]
        if isinstance(layer, nn.Embedding):
            energy = torch.bincount(inputs.flatten(), minlength=rows).double()[:, None].expand(parameter.shape)
        else:
            energy = inputs.double().square().sum(1).repeat_interleave(rows // inputs.shape[0], 0)
        name = names[id(parameter)]
        sums[name] = sums[name] + energy if name in sums else energy

    _watch(model, context, paths, batches, seen)
    return sums


def first_names(model: nn.Module) -> dict[int, str]:
    """Return the first dotted name of each parameter, by its identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def in_call_order(model: nn.Module, context: Context) -> list[list[str]]:
    """Return the paths of the layers in scope whose inputs can be watched, in the order of their first calls.

    Layers that share a weight come together. Those never called come last; transposed convolutions are recorded as left.
    """
    for path, _ in context.targets(model, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        context.leave(path, "a transposed convolution has no row of inputs for each output")
    wanted, order = [path for path, _ in context.targets(model, *LAYERS)], list[str]()

    def remember(path: str) -> Callable[..., None]:
        return lambda *_: order.append(path)

    with hooked(model, {path: remember(path) for path in wanted}), evaluating(model):
        forward(model, example_inputs(context.data, context.device))
    groups: list[tuple[list[str], set[int]]] = []
    for path in dict.fromkeys([*order, *wanted]):
        held = {id(parameter) for parameter in module_at(model, path).parameters()}
        for paths, known in groups:
            if held & known:
                paths.append(path)
                known |= held
                break
        else:
            groups.append(([path], held))
    return [paths for paths, _ in groups]


def weights_of(model: nn.Module, context: Context, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return the weight matrices in scope of the layers at these paths, by their first names."""
    held = {id(parameter) for path in paths for parameter in module_at(model, path).parameters()}
    return {name: weight for name, weight in matrices(model, context).items() if id(weight) in held}


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped second moment, `[groups, in, in]`.

    Args:
        moment: `[groups, in, in]`, float64.
        damping: share of the mean of the diagonal that is added to it; ten times more each time the inverse fails.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    while True:
        added = torch.where(diagonal == 0, 1.0, 0.0) + damping * mean
        lower, failed = torch.linalg.cholesky_ex(moment + torch.diag_embed(added))
        if not failed.any():
            inverse = torch.cholesky_solve(eye.expand_as(moment), lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                return upper
        damping = max(10 * damping, _LEAST)


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Callable[..., None]]) -> Iterator[None]:
    """Hooks before the forward of the modules at these paths; PyTorch's fused attention, which calls none, is off."""
    handles = []
    try:
        for path, hook in hooks.items():
            handles.append(module_at(model, path).register_forward_pre_hook(hook, with_kwargs=True))
        with unfused():
            yield
    finally:
        for handle in handles:
            handle.remove()


class Enough(BaseException):
    """Ends a forward whose rest is of no interest; no `except Exception` of a user's model takes it for a failure."""


def _watch(
    model: nn.Module, context: Context, paths: Iterable[str], count: int, seen: Seen, most: int | None = None
) -> None:
    calls, usual, turn = 0, 0, 0

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        part = None
        if most is not None and isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            part = Part(most + layer.weight[0].numel(), turn)
        for weight, inputs in entering(layer, args, kwargs, part):
            seen(layer, weight, inputs)
        calls += 1
        if calls == usual:
            raise Enough

    with hooked(model, dict.fromkeys(paths, hook)), evaluating(model):
        some = islice(read(context.data.calibrate, "calibrate", context.device), count)
        for inputs, _ in some:
            calls = 0
            with suppress(Enough):
                forward(model, inputs)
            usual = usual or calls  # as often as on the first batch, which is run to its end
            turn += 1


def entering(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], part: Part | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the attribute path of each weight of a layer and what enters it, `[groups, n, in]`, some samples at a time.

    Args:
        layer: of a type in `LAYERS`.
        args: what it is called with.
        kwargs: what it is called with by name.
        part: of a linear layer or a convolution, which of its inputs; all when None.
    """
    if isinstance(layer, nn.MultiheadAttention):
        yield from _attention_inputs(layer, args, kwargs)
    elif isinstance(layer, RECURRENT):
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        yield from recurrent_inputs(layer, given["input"], given.get("hx"))
    elif isinstance(layer, CONVOLUTIONS):
        for patches in _patches(layer, next(tensors((args, kwargs))), part):
            yield "weight", patches
    elif isinstance(layer, nn.Embedding):
        yield "weight", next(tensors((args, kwargs)))
    else:
        value = next(tensors((args, kwargs)))
        rows = value.reshape(1, -1, value.shape[-1])
        yield "weight", rows if part is None else rows[:, part.of(rows.shape[1], 1)]


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, images: Tensor, part: Part | None) -> Iterator[Tensor]:
    """Yield the unfolded inputs of a convolution, `[groups, samples * positions, in / groups * taps]`."""
    axes = len(layer.kernel_size)
    images = images if images.dim() == axes + 2 else images[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = F.pad(images, layer._reversed_padding_repeated_twice, mode)
    windows = images
    for axis in range(axes):
        reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        windows = windows.unfold(axis + 2, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    if part is not None:
        places = part.of(len(windows) * math.prod(windows.shape[2 : 2 + axes]), axes)
        windows = windows[(slice(None), slice(None), *[places] * axes)]
    step = max(1, _VALUES // max(1, windows[0].numel()))
    for some in torch.split(windows, step):
        # [n, groups, channels, positions..., taps...]
        by_group = some.reshape(len(some), layer.groups, -1, *some.shape[2:])
        last = by_group.movedim(2, 2 + axes)  # [n, groups, positions..., channels, taps...]
        yield last.transpose(0, 1).reshape(layer.groups, -1, layer.weight[0].numel())


def _attention_inputs(
    layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    parts = {name: given[name].reshape(-1, given[name].shape[-1]) for name in ("query", "key", "value")}
    if layer.in_proj_weight is None:
        for name, inputs in parts.items():
            yield f"{name[0]}_proj_weight", inputs[None]
    else:
        yield "in_proj_weight", _stacked(list(parts.values()))
    bare = copy.copy(layer)  # the same attention with an identity behind it gives what the output projection sees
    identity = nn.Linear(layer.embed_dim, layer.embed_dim, bias=False).to(layer.out_proj.weight)
    identity.weight.copy_(torch.eye(layer.embed_dim))
    bare._modules = {"out_proj": identity}
    mixed = bare.forward(*args, **kwargs)[0]
    yield "out_proj.weight", mixed.reshape(1, -1, layer.embed_dim)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Query, key and value as `[3, n, in]`; where keys are fewer or more, zero rows leave the sums as they are."""
    longest = max(len(part) for part in parts)
    return torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])
