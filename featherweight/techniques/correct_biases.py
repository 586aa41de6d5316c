"""Empirical bias correction: what compressing has shifted in the mean of each layer's outputs goes back through its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.data import batches, forward
from featherweight.edits import Write, module_at
from featherweight.errors import ModelError
from featherweight.layers import QuantizedConv, QuantizedLayer, QuantizedLinear
from featherweight.layers.quantized import round_together, significant_bits
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits, Technique, setting
from featherweight.techniques.moments import Enough
from featherweight.techniques.targets import norm_pairs
from featherweight.trace import unfused

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, QuantizedLinear, QuantizedConv)
_ALIKE = 0.5  # least correlation of what a layer gives with what the original's gives

Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation of each channel, `[out]`."""


@final
@dataclass(frozen=True)
class CorrectBiases(Technique):
    """Move each bias so that the mean of every output channel on calibration data is again that of the original model.

    Layers go in the order of their calls, each on what reaches it after the corrections before. Where a batch norm was folded into
    a layer, the norm's output is what counts. A layer whose outputs are on another scale than the original's (because it was
    equalized, say) is left as it is.

    Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2 and
        appendix D.
    Use when: after quantizing to the nearest codes, pruning or factorizing, where nothing is trained; `compensated` rounding has done
        it already.
    Costs: one pass over `batches` calibration batches for each layer.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    batches: int = setting(4, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Write of each bias."""
        if context.teacher is None:
            context.leave("", "there is no original model to compare with")
            return
        wanted = self._wanted(context.teacher, context)
        paths = [path for path, layer in context.targets(model, *_LAYERS) if isinstance(layer.bias, Tensor)]
        for path in _moments(model, context, paths, self.batches):  # in the order of their calls
            if path not in wanted:
                context.leave(path, "the original has no such layer")
                continue
            given = _moments(model, context, [path], self.batches)[path]
            mean, spread = wanted[path]
            if len(mean) != len(given[0]) or not _same_scale(spread, given[1]):
                context.leave(path, "its outputs are on another scale than the original's")
                continue
            layer = module_at(model, path)
            bias = layer.get_parameter("bias").detach()
            moved = bias + (mean - given[0]).to(bias)
            if isinstance(layer, QuantizedLayer):
                moved = round_together(moved, significant_bits(layer.bits))
            yield Write({f"{path}.bias".lstrip("."): moved})

    def _wanted(self, original: nn.Module, context: Context) -> dict[str, Moments]:
        """What the original's layers give, or the batch norm behind each."""
        everything = Context(data=context.data, device=context.device)
        try:
            norms = {layer: norm for norm, layer in norm_pairs(original, everything)}
        except ModelError:
            norms = {}
        paths = [path for path, _ in everything.targets(original, *_LAYERS)]
        seen = _moments(original, context, {*paths, *norms.values()}, self.batches)
        return {path: seen[norms.get(path, path)] for path in paths if norms.get(path, path) in seen}


def _same_scale(wanted: Tensor, given: Tensor) -> bool:
    """Whether spreads are alike, as far as channels are alive."""
    ratio = float((wanted * given).sum() / wanted.square().sum().clamp_min(1e-12))
    alike = float(torch.nn.functional.cosine_similarity(wanted, given, dim=0))
    return 0.5 < ratio < 2 and alike > _ALIKE


def _moments(model: nn.Module, context: Context, paths: Iterable[str], count: int) -> dict[str, Moments]:
    """Mean and spread of each output channel, by path, in the order of the first calls; the model comes back as it was."""
    sums: dict[str, list[Tensor]] = {}
    seen, usual = 0, 0

    def hook(path: str) -> Callable[..., None]:
        def see(layer: nn.Module, _: Any, output: Tensor) -> None:
            nonlocal seen
            axes = len(getattr(layer, "kernel_size", ())) or max(0, output.dim() - 2) * isinstance(
                layer, nn.modules.batchnorm._BatchNorm
            )
            flat = output.detach().double().movedim(-1 - axes, 0).flatten(1)
            found = [torch.tensor(float(flat.shape[1])), flat.sum(1), flat.square().sum(1)]
            sums[path] = [a + b for a, b in zip(sums[path], found, strict=True)] if path in sums else found
            seen += 1
            if seen == usual:
                raise Enough

        return see

    handles = [module_at(model, path).register_forward_hook(hook(path)) for path in paths]
    try:
        with evaluating(model), unfused():
            for inputs, _ in islice(batches(context.data.calibrate, "calibrate", context.device), count):
                seen = 0
                with suppress(Enough):
                    forward(model, inputs)
                usual = usual or seen
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: (first / number, (second / number - (first / number).square()).clamp_min(0).sqrt())
        for path, (number, first, second) in sums.items()
    }
