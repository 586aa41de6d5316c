"""What enters a layer in the original and in the model that is being quantized, on the same calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from featherweight.data import batches, example_inputs, forward, tensors
from featherweight.edits import module_at
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.moments import ROWS, Enough, Part, entering, hooked
from featherweight.techniques.ranges import Grid, on_grid


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


def waves(model: nn.Module, context: Context, paths: Iterable[str]) -> list[list[str]]:
    """Return the paths of layers in the order of their first calls; those that read the very same tensor come together.

    Layers that the example does not reach are left out.
    """
    found: dict[str, Tensor] = {}

    def remember(path: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, next(tensors((args, kwargs))))

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
    return grouped


def paired_moments(
    original: nn.Module,
    model: nn.Module,
    context: Context,
    paths: Iterable[str],
    count: int,
    grids: Mapping[str, Grid] | None = None,
) -> dict[str, Pair]:
    """Return the moments at each path; a layer that calibration data never reached has none.

    Of a convolution with many positions an even part is taken, other ones in each batch.

    Args:
        original: has linear layers and convolutions at these paths; both models come back as they were.
        model: the same layers, not yet quantized, behind others that are.
        context: gives the calibration loader and the device.
        paths: dotted paths.
        count: batches to read.
        grids: of what enters the layers of `model`, by path, where it is rounded.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """
    sums = _Sums({path: module_at(original, path) for path in paths}, grids or {})
    first, second = hooked(original, sums.hooks(sums.first)), hooked(model, sums.hooks(sums.second))
    with first, second, evaluating(original), evaluating(model):
        some = islice(batches(context.data.calibrate, "calibrate", context.device), count)
        for turn, (inputs, _) in enumerate(some):
            sums.turn = turn
            for network in (original, model):
                sums.calls = 0
                with suppress(Enough):
                    forward(network, inputs)
                sums.usual = sums.usual or sums.calls
    return sums.pairs()


class _Sums:
    """Adds moments up while both models run; what the original's layers were given waits for the other's."""

    def __init__(self, layers: dict[str, nn.Module], grids: Mapping[str, Grid]) -> None:
        self.layers, self.grids = layers, grids
        self.waiting: dict[str, list[Tensor]] = {path: [] for path in layers}
        self.totals: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.samples: dict[str, int] = {}
        self.turn, self.calls, self.usual = 0, 0, 0

    def hooks(self, see: Callable[[str, Tensor], None]) -> dict[str, Callable[..., None]]:
        def hook(path: str) -> Callable[..., None]:
            def called(_: nn.Module, args: Any, kwargs: Any) -> None:
                see(path, next(tensors((args, kwargs))))
                self.calls += 1
                if self.calls == self.usual:
                    raise Enough

            return called

        return {path: hook(path) for path in self.layers}

    def first(self, path: str, value: Tensor) -> None:
        self.waiting[path].append(value.clone())  # what comes later may change it in place

    def second(self, path: str, value: Tensor) -> None:
        layer, before = self.layers[path], self.waiting[path].pop(0)
        if path in self.grids:
            value = on_grid(value, self.grids[path])
        part = Part(ROWS + layer.get_parameter("weight")[0].numel(), self.turn)
        pairs = zip(entering(layer, (before,), {}, part), entering(layer, (value,), {}, part), strict=True)
        for (_, old), (_, new) in pairs:
            old, new = old.float(), new.float()
            found = [old.sum(1), new.sum(1), new.transpose(1, 2) @ new, old.transpose(1, 2) @ new]
            found = [value.double() for value in found]
            known = self.totals.get(path)
            self.totals[path] = found if known is None else [a + b for a, b in zip(known, found, strict=True)]
            self.counts[path] = self.counts.get(path, 0) + old.shape[1]
        self.samples[path] = self.samples.get(path, 0) + len(value)

    def pairs(self) -> dict[str, Pair]:
        pairs = {}
        for path, totals in self.totals.items():
            mean, changed, second, cross = (value / self.counts[path] for value in totals)
            pairs[path] = Pair(mean, changed, second, cross, self.samples[path])
        return pairs
