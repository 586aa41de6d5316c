"""Which layers a technique may replace one by one."""

from __future__ import annotations

from torch import nn

from featherweight.technique import Context, Layer


def first_paths(model: nn.Module) -> dict[str, str]:
    """Return, for every path of a module, its first one: a trace names a shared module by the path it was called by."""
    first = {id(module): path for path, module in model.named_modules()}
    return {path: first[id(module)] for path, module in model.named_modules(remove_duplicate=False)}


def untied(model: nn.Module, context: Context, *types: type[Layer]) -> list[tuple[str, Layer]]:
    """Return `(path, layer)` in scope whose weight no other module holds; tied ones are recorded as left alone.

    Replacing one holder of a tied weight would leave the other with a copy, and the model would grow.
    """
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    free: list[tuple[str, Layer]] = []
    for path, layer in context.targets(model, *types):
        shared = [other for other in holders[id(layer.get_parameter("weight"))] if other != path]
        if shared:
            context.leave(path, f"its weight is tied to {shared[0]}")
        else:
            free.append((path, layer))
    return free
