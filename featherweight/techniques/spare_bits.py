"""A few more bits than asked for, for the layers where they help most: small ones whose rounding the outputs feel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from featherweight.technique import Context
from featherweight.techniques.damage import damage_table
from featherweight.techniques.swaps import quantized_swap

_READ = 1  # calibration batches, which tell layers apart well enough
_WIDEST = 8


def spread(
    model: nn.Module, context: Context, layers: Sequence[tuple[str, nn.Module]], bits: int, spare: float
) -> dict[str, int]:
    """Return the width of each path: `bits`, or up to 8 where one layer alone costs the network's outputs most for its size.

    What rounding a layer to the nearest codes costs is measured; each further bit is taken to leave a quarter of it, as of a squared
    error, and goes to the layer that gains most for each of its weights, until none fits.

    Args:
        model: comes back as it was.
        context: calibration data, loss and device.
        layers: `(path, layer)`.
        bits: width without any of these, 2 to 8.
        spare: bits to spend on top, as a share of those of all weights at `bits`, 0 or more.

    Raises:
        DataError: there is no calibration data.
    """
    treatments = [(path, "", [quantized_swap(path, layer, bits, per_channel=True)], 0) for path, layer in layers]
    damages = {row["path"]: row["damage"] for row in damage_table(model, context, treatments, _READ)}
    weights = {path: layer.get_parameter("weight").numel() for path, layer in layers}
    widths, left = dict.fromkeys(weights, bits), spare * bits * sum(weights.values())
    while fitting := [path for path in widths if widths[path] < _WIDEST and weights[path] <= left]:
        path = max(fitting, key=lambda path: damages[path] / weights[path])
        widths[path] += 1
        damages[path] /= 4
        left -= weights[path]
    return widths
