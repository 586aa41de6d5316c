"""Post-training quantization for few bytes: codes at the least sum of what their errors cost and what their bits cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap, module_at
from featherweight.layers.quantized import limit, round_mantissa, round_together, significant_bits
from featherweight.layers.recurrent import SplitRecurrent
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.attention import attention_swaps
from featherweight.techniques.importance import digest
from featherweight.techniques.moments import LAYERS, moments
from featherweight.techniques.rate_distortion import HIGHEST, Rounding, codes_of, refitted_step
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.techniques.sensitivity import curvatures
from featherweight.techniques.swaps import quantizable, quantized_swap

_AT_ONCE = 1 << 31  # bytes of second moments that one pass over the calibration data may gather
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TINY = 1e-30

Moments = dict[str, tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True)
class QuantizeRateDistortion(Technique):
    """Store weights as the integers that minimise `sensitivity (w - q step)^2 + rate bits(q)`; activations stay float.

    Bits are those of an adaptive coder like that of the file, so that zeros gather where they are cheap. One setting, `step`,
    is the mean step over the root mean square of the weights; each layer's (or, `per_channel`, each channel's) follows
    `1 / sqrt(sensitivity)`, the best allocation at high rates. `rate` is what a bit may cost, as a share of the square of a
    step; 0.1 is about where a finer step costs as much. Every scale is refitted to its codes.

    `sensitivity`: `fisher`, of what the model itself predicts on calibration data, without labels; `inputs`, energy of each
    input relative to the layer's output; `none`, errors relative to the layer's weights. `compensate` moves the error of each
    code to the later inputs of its row, and corrects biases for what is left; layers without second moments of inputs
    (embeddings) go without. Exact zeros of pruned tensors stay.

    Paper: Wiedemann et al., "DeepCABAC", 2019; compensated: Conzelmann & Bamler, CERWU, 2025, after Frantar et al., GPTQ,
        ICLR 2023; steps: Choi, El-Khamy & Lee, "Towards the Limit of Network Quantization", ICLR 2017.
    Use when: bytes on disk matter most and nothing is trained. `reestimate_norms` should follow where steps are large and
        calibration data is like the training data, augmentation included.
    Costs: `batches` forward and backward passes; `compensate` an inverse of `[in, in]` float64 for each layer and up to 2 GiB.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    step: float = setting(0.5, low=1e-3, high=10.0)
    rate: float = setting(0.1, low=0.0, high=10.0)
    sensitivity: str = setting("fisher", choices=("fisher", "inputs", "none"))
    compensate: bool = setting(False)
    per_channel: bool = setting(False)
    batches: int = setting(8, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, and before them one for each attention and recurrent layer."""
        yield from attention_swaps(model, context)
        yield from recurrent_swaps(model, context)
        found = quantizable(model, context, 8, self.per_channel)
        weights = {_name(path): layer.get_parameter("weight") for path, layer in found}
        sensitivities = self._sensitivities(model, weights, context)
        unit = self._unit(weights, sensitivities)
        for part in _parts(found):
            seen = self._moments(model, context, [path for path, _ in part]) if self.compensate else {}
            for path, layer in part:
                name = _name(path)
                worth = sensitivities[name] / unit**2
                yield self._swap(path, layer, worth, context, seen.get(name))

    def mildest(self) -> Technique:
        """Return a thousandth of the weights' size as the step, which 8 bits widen."""
        return QuantizeRateDistortion(step=1e-3, rate=0.0, per_channel=True)

    def _sensitivities(self, model: nn.Module, weights: dict[str, nn.Parameter], context: Context) -> dict[str, Tensor]:
        """What the square of an error costs at each weight, `[out, rest]` float64 on the CPU, comparable over layers."""
        matrices = {name: weight.detach().cpu().double().flatten(1) for name, weight in weights.items()}
        plain = {
            name: torch.ones_like(matrix) / matrix[matrix != 0].square().mean().nan_to_num(1.0).clamp_min(_TINY)
            for name, matrix in matrices.items()
        }
        if self.sensitivity == "none" or not weights:
            return plain
        if self.sensitivity == "fisher":
            known = curvatures(model, weights, context, self.batches)
        else:
            seen = self._moments(model, context, [name.rpartition(".")[0] for name in weights])
            known = {}
            for name, (_, second) in seen.items():
                energy = second.diagonal(dim1=1, dim2=2).cpu()
                rows = energy.repeat_interleave(len(matrices[name]) // len(energy), 0)
                known[name] = rows / (rows * matrices[name].square()).mean().clamp_min(_TINY)
        # what calibration data never reached is taken for as sensitive as the others
        usual = [float((known[name] * matrices[name].square()).mean()) for name in known]
        level = sum(usual) / len(usual) if usual else 1.0
        return {name: known.get(name, plain[name] * level).clamp_min(_TINY) for name in weights}

    def _unit(self, weights: dict[str, nn.Parameter], sensitivities: dict[str, Tensor]) -> float:
        """The step times the root of the sensitivity, the same everywhere."""
        logs, count = 0.0, 0
        for name, weight in weights.items():
            values = weight.detach().double()[weight.detach() != 0]
            if len(values):
                size = float(values.square().mean().sqrt()) * float(sensitivities[name].mean().sqrt())
                logs, count = logs + weight.numel() * math.log(max(size, _TINY)), count + weight.numel()
        return self.step * math.exp(logs / max(1, count))

    def _moments(self, model: nn.Module, context: Context, paths: list[str]) -> Moments:
        """First and second moments of inputs; those of the last weights are kept, for trials on the same."""
        inside = tuple(path for path, module in model.named_modules() if isinstance(module, SplitRecurrent))
        paths = [
            path  # the matrices of a recurrent layer are read off, and meet no inputs
            for path in paths
            if isinstance(module_at(model, path), LAYERS) and not path.startswith(tuple(f"{one}." for one in inside))
        ]
        known, now = ("moments", tuple(paths), self.batches), digest(model)
        if known not in context.memory or context.memory[known][0] != now:
            context.memory[known] = (now, moments(model, context, paths, self.batches))
        kept: Moments = context.memory[known][1]
        return kept

    def _swap(
        self, path: str, layer: nn.Module, worth: Tensor, context: Context, seen: tuple[Tensor, Tensor] | None
    ) -> Swap:
        weight = layer.get_parameter("weight").detach()
        matrix = weight.cpu().double().flatten(1)
        held = matrix == 0 if _name(path) in context.sparse else torch.zeros_like(matrix, dtype=torch.bool)
        side = weight.shape[-1] if weight.dim() > 2 else 1
        made = Rounding(matrix, worth, held, side, self.rate, seen[1] if seen is not None else None)
        each = self.per_channel and not isinstance(layer, _TRANSPOSED)  # whose rows are no outputs
        mean = worth.mean(1, keepdim=True) if each else worth.mean().reshape(1, 1)
        largest = matrix.abs().amax(1, keepdim=True) if each else matrix.abs().max().reshape(1, 1)
        step = torch.maximum(mean.rsqrt(), largest / HIGHEST)
        codes = codes_of(made, step)
        bits = next(bits for bits in range(2, 9) if limit(bits) >= float(codes.abs().max()))
        scale = round_mantissa(refitted_step(made, codes, step).flatten().float(), significant_bits(bits))
        swap = quantized_swap(path, layer, bits, each, scale=scale.to(weight.device))
        state = {**(swap.state or {}), "codes": codes.reshape(weight.shape).to(weight.device, torch.int8)}
        if seen is not None and isinstance(layer.bias, Tensor):
            groups = seen[0].cpu()
            lost = (matrix - codes * scale.double().reshape(-1, 1)).reshape(len(groups), -1, groups.shape[1])
            bias = layer.bias.detach() + (lost @ groups[..., None]).flatten().to(layer.bias)
            state["bias"] = round_together(bias, significant_bits(bits))
        return dataclasses.replace(swap, state=state)


def _name(path: str) -> str:
    return f"{path}.weight".lstrip(".")


def _parts(found: list[tuple[str, nn.Module]]) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield layers in order, as many at once as have room for the second moments of their inputs."""
    part: list[tuple[str, nn.Module]] = []
    room = 0
    for path, layer in found:
        need = 8 * layer.get_parameter("weight")[0].numel() ** 2 * getattr(layer, "groups", 1)
        if part and room + need > _AT_ONCE:
            yield part
            part, room = [], 0
        part.append((path, layer))
        room += need
    if part:
        yield part
