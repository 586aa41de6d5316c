"""Weight sharing: each layer's weights become a few values, chosen by k-means and trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap, Write
from featherweight.layers.quantized import round_mantissa, round_together, significant_bits
from featherweight.layers.shared import LEARNT, nearest
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.clusters import entropy_constrained, kmeans
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.techniques.sensitivity import curvatures
from featherweight.techniques.swaps import fresh_kind, quantizable
from featherweight.techniques.train import Training, fit

_OF_A_GRID = ("bits", "per_channel", "input_grid", "output_grid")


@final
@dataclass(frozen=True)
class ShareWeights(Technique):
    """Give each layer `clusters` values, and each weight one of them; train the values with the original as teacher.

    Values are found by k-means from even distances over the range; `rate` above 0 makes them entropy-constrained: an index that
    is rare costs `rate` times its bits, in units of the mean squared error of plain k-means. `sensitivity` `fisher` weighs
    each weight's error by what it costs the output. Zeros of pruned tensors stay zero: they have an entry of their own.

    `learn`: `centroids` trains the values, with the mean gradient of their weights, which keep their places; `points` also gives
    each weight the value nearest to what it was (differentiable quantization); `weights` trains float latents too (quantized
    distillation on learned levels). With 3 clusters and `weights` it is trained ternary quantization. 0 `epochs` train nothing;
    the best epoch on validation data comes back, the start included.

    Paper: Han, Mao & Dally, "Deep Compression", ICLR 2016; Choi, El-Khamy & Lee, "Towards the Limit of Network Quantization",
        ICLR 2017; Polino, Pascanu & Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018.
    Use when: a runtime that reads codebooks is the target, or weights are far from evenly spread; after `prune_weights`.
    Costs: sorting each tensor; `rate` 50 passes over each with all clusters; `fisher` `batches` forward and backward passes;
        `epochs` of training.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    clusters: int = setting(16, low=2, high=256)
    rate: float = setting(0.0, low=0.0, high=1000.0)
    sensitivity: str = setting("none", choices=("none", "fisher"))
    learn: str = setting("centroids", choices=LEARNT)
    epochs: int = setting(10, low=0, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)
    batches: int = setting(8, low=1, high=100_000)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What it reads: data to train on where it trains, and calibration data where errors are weighed."""
        trains, weighs = {"train", "validate"} if self.epochs else set(), self.sensitivity == "fisher"
        return frozenset(trains | ({"calibrate"} if weighs else set()))

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, train in place, and yield one Write that says so."""
        yield from layer_swaps(model, context)
        yield from recurrent_swaps(model, context)
        bits = (self.clusters - 1).bit_length()
        found = quantizable(model, context, bits, per_channel=False)
        weights = {_name(path): layer.get_parameter("weight") for path, layer in found}
        weighed = self.sensitivity == "fisher" and weights
        worth = curvatures(model, weights, context, self.batches) if weighed else {}
        shared, latents = False, dict[str, Tensor]()
        for path, layer in found:
            name, weight = _name(path), layer.get_parameter("weight").detach().clone()
            if bits * weight.numel() + 32 * self.clusters >= 32 * weight.numel():
                context.leave(path, f"{self.clusters} values would outweigh what {weight.numel()} weights save")
                continue
            held = name in context.sparse or getattr(layer, "padding_idx", None) is not None
            codebook, places = self._shared(weight, worth.get(name), held)
            kept = yield _swap(path, layer, codebook, places, self.learn)
            shared = shared or kept
            if kept and self.learn != "centroids":
                latents[name] = weight
        if self.epochs and shared:
            training = Training(self.epochs, self.learning_rate, self.teacher_share)
            fit(model, context, training, latents=latents, settle=1 / 3)
            yield Write(None)

    def _shared(self, weight: Tensor, worth: Tensor | None, held: bool) -> tuple[Tensor, Tensor]:
        """The codebook `[clusters]` and the place of each weight in it; where zeros are held they have an entry alone."""
        values = weight.cpu().double().flatten()
        costs = torch.ones_like(values) if worth is None else worth.reshape(-1) / worth.mean()
        free = values != 0 if held else torch.ones_like(values, dtype=torch.bool)
        count = self.clusters - held
        if not bool(free.any()):
            return torch.zeros(self.clusters), torch.zeros(weight.shape, dtype=torch.long)
        centroids = kmeans(values[free], costs[free], count)
        places = torch.zeros(len(values), dtype=torch.long)
        places[free] = nearest(values[free], centroids)
        if self.rate:
            error = (costs[free] * (values[free] - centroids[places[free]]).square()).mean()
            centroids, places[free] = entropy_constrained(
                values[free], costs[free], centroids, self.rate * float(error)
            )
        codebook = round_mantissa(centroids.float(), significant_bits((self.clusters - 1).bit_length()))
        if held:
            zero = int((codebook < 0).sum())
            codebook = torch.cat([codebook[:zero], codebook.new_zeros(1), codebook[zero:]])
            places = torch.where(free, places + (places >= zero).long(), zero)
        return codebook, places.reshape(weight.shape)


def _name(path: str) -> str:
    return f"{path}.weight".lstrip(".")


def _swap(path: str, layer: nn.Module, codebook: Tensor, places: Tensor, learn: str) -> Swap:
    """The Swap of a layer by its kind with a codebook; the code of the entry nearest to zero is 0 where 8 bits allow it."""
    kind, options, _ = fresh_kind(layer, 8, per_channel=False, group=0)
    clusters = len(codebook)
    origin = min(max(int(codebook.abs().argmin()), clusters - 128), 128)
    options = {key: value for key, value in options.items() if key not in _OF_A_GRID}
    options |= {"clusters": clusters, "origin": origin} | ({} if learn == "centroids" else {"learn": learn})
    state = {"codes": (places - origin).to(torch.int8), "codebook": codebook}
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        state["bias"] = round_together(bias.detach(), significant_bits((clusters - 1).bit_length()))
    return Swap(path, kind.replace("quantized", "shared"), options, state)
