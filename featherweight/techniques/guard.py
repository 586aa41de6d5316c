"""The accuracy guard: layers whose quantization hurts most fall back until the network's outputs are near enough again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from featherweight.edits import Swap, module_at
from featherweight.layers import QuantizedLayer
from featherweight.technique import Context, Edits
from featherweight.techniques.damage import Damage
from featherweight.techniques.swaps import quantized_swap

WIDTH = 8  # bits of the weights of a layer that fell back; its inputs are float


def guarded(
    model: nn.Module, damage: Damage, context: Context, layers: Mapping[str, nn.Module], tolerance: float
) -> Edits:
    """Yield Swaps that give layers 8-bit weights and float inputs, the most helpful first, until outputs are near enough.

    Each that falls back is recorded with what it cost.

    Args:
        model: quantized; read when each Swap is asked for.
        damage: made of what it was before.
        context: where to record.
        layers: what may fall back: the float layer of each path.
        tolerance: how far outputs may be from the original's, see `Damage`.
    """
    lost = damage.of(model, tolerance)
    if lost <= tolerance:
        return
    swaps = {path: swap for path in layers if (swap := _milder(model, path, layers[path])) is not None}
    left = {path: damage.of_edits(model, [swap]) for path, swap in swaps.items()}
    for path in sorted(swaps, key=lambda path: left[path]):
        more = _bytes(layers[path], WIDTH) - _bytes(layers[path], _bits(model, path))
        if not (yield swaps[path]):
            continue
        before, lost = lost, damage.of(model)
        context.leave(
            path,
            f"fell back to {WIDTH}-bit weights and float inputs: outputs differed by {before:.2g} with it and {lost:.2g} without, "
            f"where {tolerance:g} is the tolerance; {more:,} bytes more",
        )
        if lost <= tolerance:
            return
    context.leave("", f"outputs differ by {lost:.2g}, and nothing is left that could fall back to reach {tolerance:g}")


def _milder(model: nn.Module, path: str, layer: nn.Module) -> Swap | None:
    """The Swap of a quantized layer by a milder one; None where it is as mild."""
    now = module_at(model, path)
    if not isinstance(now, QuantizedLayer) or (now.bits >= WIDTH and not now.input_grid):
        return None
    return quantized_swap(path, layer, WIDTH, per_channel=True)


def _bits(model: nn.Module, path: str) -> int:
    now = module_at(model, path)
    return now.bits if isinstance(now, QuantizedLayer) else WIDTH


def _bytes(layer: nn.Module, bits: int) -> int:
    return -(-bits * layer.get_parameter("weight").numel() // 8)
