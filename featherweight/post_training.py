"""Post-training quantization without thinking: the steps, in order, with the settings that were best on every benchmark."""

from __future__ import annotations

from featherweight.errors import RecipeError
from featherweight.technique import Recipe
from featherweight.techniques import FoldBatchNorm, MixPrecisions, QuantizeStatic, QuantizeWeights, SmoothActivations

_SPARE = 0.1  # of the bits, on top, for the layers that need them most; at 4 bits entropy coding saves more


def post_training(bits: float = 8, integers: bool = True, batches: int = 8) -> Recipe:
    """Return the recipe that quantizes a trained model with calibration data alone, without labels.

    Batch norms are folded, and channels scaled where activations then round better; then every layer in turn gets the codes,
    scales and bias that keep its outputs, given what reaches it. Layers that hurt fall back and are listed in the report.

    Args:
        bits: of the weights, 2 to 8. Where activations are float, a whole number is of most layers, and a tenth more goes to those whose
            rounding the outputs feel most; of a fraction each layer gets a width of its own, so many on average.
        integers: whether activations are 8-bit integers too, for runtimes with integer kernels.
        batches: calibration batches to read; about 1,000 samples are enough.

    Raises:
        RecipeError: bits are out of range, or a fraction together with `integers`.

    Example:
        >>> small = run(post_training(bits=4, integers=False), model, Context(data=data)).model
    """
    whole = bits == int(bits)
    if integers and not whole:
        raise RecipeError(
            f"post_training: bits={bits} with integers=True: widths of layers differ only where activations are float"
        )
    if integers:
        quantize = QuantizeStatic(batches=batches, weight_bits=int(bits), rounding="compensated")
        return FoldBatchNorm() + SmoothActivations(multiply=True) + quantize
    if whole:
        spare = _SPARE if bits < 8 else 0.0
        return FoldBatchNorm() + QuantizeWeights(bits=int(bits), batches=batches, rounding="compensated", spare=spare)
    return FoldBatchNorm() + MixPrecisions(bits=bits, batches=batches)
