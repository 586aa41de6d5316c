"""Weight-only quantization: integer codes of 2 to 8 bits with a scale a channel, a tensor or a group of inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, final

from torch import nn

from featherweight.data import batches
from featherweight.errors import RecipeError
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.damage import Damage
from featherweight.techniques.guard import guarded
from featherweight.techniques.own_values import matched, read_own
from featherweight.techniques.recurrent import recurrent_moments, recurrent_swaps
from featherweight.techniques.sequential import sequential_swaps
from featherweight.techniques.spare_bits import spread
from featherweight.techniques.swaps import quantizable, quantized_swap

_HELD = 5  # of so many calibration batches one judges what was fitted to the others


@final
@dataclass(frozen=True)
class QuantizeWeights(Technique):
    """Store the weights of every layer that has a matrix as integers; activations stay float.

    These are linear layers, convolutions, transposed ones too, embeddings (a scale a row), attention and recurrent layers;
    the last two are first taken apart into linear layers. `group` gives every so many consecutive inputs of a row of a linear
    layer a scale of their own, whatever `per_channel` says, for 2 and 3 bits; it costs 32 bits in memory and about 12 in the
    file for each.

    `rounding`: `nearest` takes the step with the least squared error, and needs no data; `compensated` goes through the layers in
    the order of their calls and finds the codes, scales and bias of each that keep its outputs on calibration data, given what
    reaches it through the layers before. Follow it with `distill` for quantization-aware training.

    `spare`: bits on top, as a share of all, that go to the layers whose rounding alone costs the outputs most for their size,
    before anything is rounded: of a mobile network the first and the depthwise ones, which are small.

    `widths` gives layers widths of their own by path, such as `"head 8, lstm.hidden.* 3"`; those that no pattern matches have `bits`.
    The matrices of an `nn.LSTM`, `nn.GRU` or `nn.RNN` go by the paths that they get: `incoming.0`, `hidden.0`, `incoming.1`, ...

    With a `tolerance`, layers that hurt fall back to 8 bits, and are listed, until outputs on calibration data differ by no more
    (Kullback-Leibler divergence in nats for classes, a share of the variance for values); `compensated` rounding then leaves the
    last fifth of the batches unread, since on those it was fitted to outputs always look near.

    Paper: Frantar et al., "GPTQ", ICLR 2023, with act-order; Li et al., "GPTAQ", ICML 2025; Behdin et al., "QuantEase", 2023;
        Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference", 2021.
    Use when: bytes on disk matter more than speed; `compensated` wherever there is calibration data and nothing is trained after.
    Costs: one pass over each tensor; `compensated` two passes over `batches` calibration batches, which wait at
        every layer and take up to 4 GiB, and a few matrices `[in, in]` in float64.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    bits: int = setting(4, low=2, high=8)
    per_channel: bool = setting(True)
    group: int = setting(0, low=0, high=100_000)
    rounding: str = setting("nearest", choices=("nearest", "compensated"))
    batches: int = setting(8, low=1, high=100_000)
    tolerance: float = setting(0.0, low=0.0, high=100.0)
    spare: float = setting(0.0, low=0.0, high=1.0)
    widths: str = setting("")

    def __post_init__(self) -> None:
        """Refuse widths that cannot be read, or that `spare` would choose.

        Raises:
            RecipeError: they are so.
        """
        super().__post_init__()
        if self.widths and self.spare:
            raise RecipeError("quantize_weights: spare bits choose widths themselves; give one of spare and widths")
        self._own()

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Calibration data, where rounding is compensated or outputs are compared."""
        read = self.rounding == "compensated" or self.tolerance or self.spare
        return frozenset({"calibrate"} if read else ())

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, and before them one for each attention and recurrent layer."""
        per_channel = self.per_channel or self.group > 0
        yield from layer_swaps(model, context)
        compensated = self.rounding == "compensated"
        fitted = self._fitted(context) if compensated and self.tolerance else self.batches
        known = recurrent_moments(model, context, fitted) if compensated else {}
        yield from recurrent_swaps(model, context)
        layers = quantizable(model, context, self.bits, per_channel, self.group)
        unread = fitted if fitted < self.batches else 0  # from there on, where some were held back
        damage = Damage(model, context, self.batches, skip=unread) if self.tolerance else None
        widths = {path: self.bits for path, _ in layers}
        widths |= self._given(widths, [item.path for item in context.untouched])
        if self.spare:
            widths = spread(model, context, layers, self.bits, self.spare)
        if compensated:
            yield from sequential_swaps(model, context, layers, widths, per_channel, fitted, self.group, known=known)
        else:
            yield tuple(
                quantized_swap(path, layer, widths[path], per_channel, group=self.group) for path, layer in layers
            )
        if damage is not None:
            yield from guarded(model, damage, context, dict(layers), self.tolerance)

    def _own(self) -> dict[str, float]:
        """Widths by pattern of a layer's path."""
        wanted = "path and width from 2 to 8, such as 'lstm.hidden.* 3', in quantize_weights' widths"
        return read_own(self.widths, lambda bits: bits in range(2, 9), wanted)

    def _given(self, paths: Collection[str], left: Sequence[str]) -> dict[str, int]:
        """The widths of single layers; a layer that was left whole has no parts to name."""
        parts = tuple(f"{path}." if path else "" for path in left)
        own = {pattern: bits for pattern, bits in self._own().items() if not pattern.startswith(parts)}
        found = matched(own, [*paths, *left], "layer")
        return {path: int(found[path]) for path in paths if path in found}

    def _fitted(self, context: Context) -> int:
        """How many batches rounding may read where the others are to judge it; all where there are too few to hold any back."""
        count = sum(1 for _ in islice(batches(context.data.calibrate, "calibrate", context.device), self.batches))
        return count - count // _HELD if count >= _HELD else self.batches

    def mildest(self) -> Technique:
        """Return 8 bits a channel."""
        return QuantizeWeights(bits=8)
