"""Post-training quantization for few bytes: codes at the least sum of what their errors cost and what their bits cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap, module_at
from featherweight.layers.quantized import limit, round_mantissa, round_together, significant_bits
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.compensated_rounding import damped, least_squares, moved_bias, rows_of
from featherweight.techniques.moments import input_energy, inverse_factor
from featherweight.techniques.paired import Pair
from featherweight.techniques.rate_distortion import HIGHEST, Rounding, codes_of, refitted_step, uncompensated
from featherweight.techniques.recurrent import recurrent_moments, recurrent_swaps
from featherweight.techniques.sensitivity import curvatures
from featherweight.techniques.sequential import inside_recurrent, reached
from featherweight.techniques.swaps import COMPUTING, quantizable, quantized_swap

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ALONE = 5  # by how much less a bit may cost where nothing makes good for errors towards zero
_TINY = 1e-30

Reached = tuple[str, nn.Module, Pair | None]


@final
@dataclass(frozen=True)
class QuantizeRateDistortion(Technique):
    """Store weights as the integers that minimise `sensitivity (w - q step)^2 + rate bits(q)`; activations stay float.

    Bits are those of an adaptive coder like that of the file, so that zeros gather where they are cheap. One setting, `step`,
    is the mean step over the root mean square of the weights; each layer's (or, `per_channel`, each channel's) follows
    `1 / sqrt(sensitivity)`, the best allocation at high rates. `rate` is what a bit may cost, as a share of the square of a
    step; 0.1 is about where a finer step costs as much, and a fifth of it is taken where errors are not compensated, since those
    towards zero add up over a layer. Every scale is refitted to its codes.

    `sensitivity`: `fisher`, of what the model itself predicts on calibration data, without labels; `inputs`, energy of each
    input relative to the layer's output; `none`, errors relative to the layer's weights. `compensate` goes through the layers
    in the order of their calls: the weight that keeps a layer's outputs, given what reaches it through those before, takes the
    place of its own, the error of each code moves to the later inputs of its row, and biases take what is left; steps grow as
    errors shrink by it. Layers whose inputs are not watched (embeddings) go without. Exact zeros of pruned tensors stay.

    Paper: Wiedemann et al., "DeepCABAC", 2019; compensated: Conzelmann & Bamler, CERWU, 2025, after Frantar et al., GPTQ,
        ICLR 2023, and Li et al., GPTAQ, ICML 2025; steps: Choi, El-Khamy & Lee, "Towards the Limit of Network Quantization", ICLR 2017.
    Use when: bytes on disk matter most and nothing is trained. `reestimate_norms` should follow where there are batch norms.
    Costs: `batches` forward and backward passes; `compensate` two more, and a few matrices `[in, in]` in float64.
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
        yield from layer_swaps(model, context)
        known = recurrent_moments(model, context, self.batches) if self.compensate else {}
        yield from recurrent_swaps(model, context)
        found = quantizable(model, context, 8, self.per_channel)
        weights = {_name(path): layer.get_parameter("weight") for path, layer in found}
        sensitivities = self._sensitivities(model, weights, context)
        for name in [_name(path) for path, layer in found if isinstance(layer, nn.Embedding)]:
            sensitivities[name] = _seldom_met(sensitivities[name])
        unit = self._unit(weights, sensitivities)
        alone: Iterable[Reached] = ((path, layer, None) for path, layer in found)
        for path, layer, pair in (
            reached(model, context, found, self.batches, known=known) if self.compensate else alone
        ):
            yield self._swap(path, layer, sensitivities[_name(path)] / unit**2, context, pair)

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
            inside = inside_recurrent(model)
            watched = [name.rpartition(".")[0] for name in weights]
            watched = [path for path in watched if isinstance(module_at(model, path), COMPUTING)]
            watched = [path for path in watched if not path.startswith(inside)]
            known = {
                name: energy.cpu() / (energy.cpu() * matrices[name].square()).mean().clamp_min(_TINY)
                for name, energy in input_energy(model, context, watched, self.batches).items()
            }
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

    def _swap(self, path: str, layer: nn.Module, worth: Tensor, context: Context, pair: Pair | None) -> Swap:
        weight, bias = layer.get_parameter("weight").detach(), layer._parameters.get("bias")
        matrix = weight.cpu().double().flatten(1)
        held = matrix == 0 if _name(path) in context.sparse else torch.zeros_like(matrix, dtype=torch.bool)
        side = weight.shape[-1] if weight.dim() > 2 else 1
        made = Rounding(matrix, worth, held, side, self.rate / (1 if pair is not None else _ALONE))
        if pair is not None:
            made = _compensated(made, rows_of(weight, pair), pair, bias is not None)
        each = self.per_channel and not isinstance(layer, _TRANSPOSED)  # whose rows are no outputs
        mean = made.worth.mean(1, keepdim=True) if each else made.worth.mean().reshape(1, 1)
        sizes = made.weight.abs()
        largest = sizes.amax(1, keepdim=True) if each else sizes.max().reshape(1, 1)
        step = torch.maximum(mean.rsqrt(), largest / HIGHEST)
        codes = codes_of(made, step)
        bits = next(bits for bits in range(2, 9) if limit(bits) >= float(codes.abs().max()))
        scale = round_mantissa(refitted_step(made, codes, step).flatten().float(), significant_bits(bits))
        swap = quantized_swap(path, layer, bits, each, scale=scale.to(weight.device))
        state = {**(swap.state or {}), "codes": codes.reshape(weight.shape).to(weight.device, torch.int8)}
        if pair is not None and bias is not None:
            rows, values = rows_of(weight, pair), codes * scale.double().reshape(-1, 1)
            moved = moved_bias(bias, rows, values.to(rows).reshape(rows.shape), pair)
            state["bias"] = round_together(moved, significant_bits(bits))
        return dataclasses.replace(swap, state=state)


def _compensated(made: Rounding, rows: Tensor, pair: Pair, biased: bool) -> Rounding:
    """The same with errors compensated: a row's weights share what an error of its output costs by their inputs' energy.

    Their worth is what compensation leaves of it. Inputs that are much alike leave little, and so allow a coarser step.
    """
    second, cross = damped(pair, biased)
    energy = pair.second.diagonal(dim1=1, dim2=2).mean(1).cpu().clamp_min(_TINY)
    gain = made.worth.mean(1, keepdim=True) / energy.repeat_interleave(rows.shape[1])[:, None]
    target = least_squares(rows, second, cross, pair.samples).cpu().reshape(made.weight.shape)
    factor = inverse_factor(second, 0.0).cpu()
    worth = made.worth * (uncompensated(factor).mean() / energy.mean())
    weight = target.masked_fill(made.held, 0.0)
    return dataclasses.replace(made, weight=weight, worth=worth, moment=second, factor=factor, gain=gain)


def _seldom_met(worth: Tensor) -> Tensor:
    """The geometric mean of each row's worth and the table's: a few batches meet few of the words that will come."""
    rows = worth.mean(1, keepdim=True)
    return worth * (rows.mean() / rows).sqrt()


def _name(path: str) -> str:
    return f"{path}.weight".lstrip(".")
