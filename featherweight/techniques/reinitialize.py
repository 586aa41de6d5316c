"""All weights drawn anew: what a network of this form is worth when nothing is inherited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from featherweight.edits import Write, named_tensors
from featherweight.technique import Context, Edits, Technique
from featherweight.techniques.seeding import seeded


@final
@dataclass(frozen=True)
class Reinitialize(Technique):
    """Draw the parameters anew by each layer's own initialisation, and set running statistics back.

    Parameters that the user's own module holds directly, which no `reset_parameters` knows of, are drawn from a normal
    distribution of the mean and deviation that they have. Quantized and other layers of ours are left alone.

    Paper: Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019, whose "scratch" baselines this makes.
    Use when: a cut network is to be compared with the same small one trained from scratch; follow it with `distill`.
    Costs: nothing, but everything that was learnt.
    """

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write of every tensor in scope that has an initialisation."""
        held = {name: value.detach().clone() for name, value in named_tensors(model).items()}
        drawn: dict[str, Tensor] = {}
        try:
            with seeded(context.draw("initialisation")), torch.no_grad():
                for path, module in model.named_modules():
                    if context.in_scope(path):
                        drawn |= _drawn(path, module)
        finally:
            with torch.no_grad():
                for name, value in named_tensors(model).items():
                    value.copy_(held[name])
        changed = {name: value for name, value in drawn.items() if not torch.equal(value, held[name])}
        if changed:
            yield Write(changed)


def _drawn(path: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own tensors, drawn anew, by their names in the model; the module holds them afterwards."""
    if type(module).__module__.startswith("featherweight."):
        return {}
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    own: dict[str, Tensor] = {name: value for name, value in module._parameters.items() if value is not None}
    if callable(reset):
        reset()
        own |= {
            name: value
            for name, value in module._buffers.items()
            if value is not None and name not in module._non_persistent_buffers_set
        }
    else:
        for value in own.values():
            if value.is_floating_point() and value.numel() > 1:
                value.normal_(float(value.mean()), float(value.std()))
    return {f"{path}.{name}" if path else name: value.detach().clone() for name, value in own.items()}
