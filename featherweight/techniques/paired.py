"""What enters a layer in the original and in the model that is being quantized, on the same calibration samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from featherweight.data import batches, example_inputs, forward, tensors
from featherweight.edits import module_at
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.moments import ROWS, Part, entering, hooked
from featherweight.techniques.ranges import Grid, on_grid
from featherweight.techniques.walks import Walk, stopping
from featherweight.trace import unfused

_ROOM = 1 << 32  # bytes
_LIVE = 2  # values as large as the one that enters a layer which live then, at about


@dataclass(frozen=True)
class Pair:
    """Moments of what entered a layer, in the original `x` and in the changed model `y`.

    Attributes:
        mean: `E[x]`, `[groups, in]` float64.
        changed: `E[y]`, the same.
        second: `E[y y^T]`, `[groups, in, in]` float64.
        cross: `E[x y^T]`, the same.
        samples: that the inputs come from: positions of one sample are much alike.
    """

    mean: Tensor
    changed: Tensor
    second: Tensor
    cross: Tensor
    samples: int = 1 << 30

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return `second` and `cross` about the means."""
        columns = self.changed[:, None]
        return self.second - self.changed[..., None] * columns, self.cross - self.mean[..., None] * columns


class Wave(NamedTuple):
    """Layers that read the very same tensor.

    Attributes:
        paths: of the layers.
        again: whether one of them is called more than once in a forward.
    """

    paths: tuple[str, ...]
    again: bool = False


def waves(model: nn.Module, context: Context, paths: Iterable[str]) -> list[Wave]:
    """Return layers in the order of their first calls; those that the example does not reach are left out."""
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def remember(path: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, next(tensors((args, kwargs))))
            calls[path] += 1

        return see

    with hooked(model, {path: remember(path) for path in paths}), evaluating(model):
        forward(model, example_inputs(context.data, context.device))
    grouped: list[list[str]] = []
    last: Tensor | None = None
    for path, entered in found.items():
        if entered is last:
            grouped[-1].append(path)
        else:
            grouped.append([path])
        last = entered
    return [Wave(tuple(together), any(calls[path] > 1 for path in together)) for together in grouped]


class Pairs:
    """Reads what enters the layers of a model, wave after wave, while those behind it change, and in the original.

    Each batch is run once, in both models, and waits at every layer. What waits takes memory: batches beyond 4 GiB of it are
    run from the start for each wave. Of a convolution with many positions an even part is taken, other ones in each batch.

    Args:
        original: has linear layers and convolutions at all paths; both models come back as they were.
        model: the same, to be changed between two waves.
        context: gives the calibration loader and the device.
        waves: that will be asked for, in their order.
        count: batches to read.
        grids: of what enters the layers of `model`, by path, where it is rounded.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        context: Context,
        waves: Iterable[Wave],
        count: int,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        self._models, self._grids = (original, model), grids or {}
        paths = [path for wave in waves for path in wave.paths]
        self._layers = [{path: module_at(network, path) for path in paths} for network in self._models]
        read = islice(batches(context.data.calibrate, "calibrate", context.device), count) if paths else ()
        self._batches = [inputs for inputs, _ in read]
        self._waiting: dict[int, tuple[Walk, ...]] = {}

    def __enter__(self) -> Pairs:
        return self

    def __exit__(self, *_: object) -> None:
        for walks in self._waiting.values():
            _leave(walks)

    def at(self, wave: Wave) -> dict[str, Pair]:
        """Return the moments at each path of the next wave; a layer that calibration data never reached has none."""
        sums = {path: _Sums(self._layers[0][path], self._grids.get(path)) for path in wave.paths}
        held = 0
        with ExitStack() as stack:
            for model, layers in zip(self._models, self._layers, strict=True):
                stack.enter_context(stopping(layers, wave.paths))
                stack.enter_context(evaluating(model))
            stack.enter_context(unfused())
            for turn, inputs in enumerate(self._batches):
                # where all calls count, those that wait are not to go through the layer before it has changed
                waiting = None if wave.again else self._waiting.pop(turn, None)
                walks = waiting or tuple(Walk(model, inputs) for model in self._models)
                try:
                    self._walked(walks, wave, sums, turn)
                except BaseException:  # a thread must not be left waiting for ever
                    _leave(walks)
                    raise
                held += sum(_LIVE * walk.value.numel() * walk.value.element_size() for walk in walks)
                if wave.again or held > _ROOM or any(walk.over for walk in walks):
                    _leave(walks)
                else:
                    self._waiting[turn] = walks
        return {path: found.pair() for path, found in sums.items() if found.count}

    def _walked(self, walks: Sequence[Walk], wave: Wave, sums: Mapping[str, _Sums], turn: int) -> None:
        """Go on to a wave, or to every call of its layers, and add what enters there."""
        first, second = walks
        while all(walk.on() for walk in walks):
            for path in [first.path] if wave.again else wave.paths:
                sums[path].add(first.value, second.value, turn)
            if not wave.again:
                break


def _leave(walks: Iterable[Walk]) -> None:
    for walk in walks:
        walk.leave()


class _Sums:
    """Moments of one layer, added up."""

    def __init__(self, layer: nn.Module, grid: Grid | None) -> None:
        self._layer, self._grid = layer, grid
        self._totals: list[Tensor] = []
        self.count, self._samples = 0, 0

    def add(self, before: Tensor, value: Tensor, turn: int) -> None:
        """Add what enters the layer in the original, and in the changed model."""
        if self._grid is not None:
            value = on_grid(value, self._grid)
        part = Part(ROWS + self._layer.get_parameter("weight")[0].numel(), turn)
        pairs = zip(entering(self._layer, (before,), {}, part), entering(self._layer, (value,), {}, part), strict=True)
        for (_, old), (_, new) in pairs:
            old, new = old.float(), new.float()
            found = [old.sum(1), new.sum(1), new.transpose(1, 2) @ new, old.transpose(1, 2) @ new]
            found = [value.double() for value in found]
            self._totals = [a + b for a, b in zip(self._totals, found, strict=True)] if self._totals else found
            self.count += old.shape[1]
        self._samples += len(value)

    def pair(self) -> Pair:
        """Return their means."""
        mean, changed, second, cross = (value / self.count for value in self._totals)
        return Pair(mean, changed, second, cross, self._samples)
