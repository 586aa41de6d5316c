"""The reference for every cut: the whole model with the removed channels switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.edits import Keep, Write, apply, masked_state, named_tensors


@contextmanager
def masked(model: nn.Module, edit: Keep) -> Iterator[None]:
    """Zero the slices that a cut removes for a while, and let norms see the channels that stay: what a sound cut must equal.

    A layer norm of the cut model takes its mean and variance over fewer channels, so its reference must too. The zeros are
    written in place and taken back, because `functional_call` corrupts a model that registers one module twice.

    Args:
        model: not yet cut; it comes back as it was.
        edit: the cut.

    Raises:
        ModelError: the cut does not fit the model.
    """
    undo = apply(model, Write(masked_state(model, edit)))
    try:
        with _NormsOverKept(model, edit):
            yield
    finally:
        undo()


class _NormsOverKept(TorchFunctionMode):
    """While active, norms whose gains are cut see the kept channels only, and give zero for the others."""

    def __init__(self, model: nn.Module, edit: Keep) -> None:
        super().__init__()
        tensors = named_tensors(model)
        self.kept: dict[int, dict[int, Tensor]] = {}
        self.removed: dict[tuple[int, int], Tensor] = {}  # by old and new size
        for cut in edit.cuts:
            size = tensors[cut.tensor].shape[cut.dim]
            gone = torch.ones(size, dtype=torch.bool).index_fill(0, torch.tensor(cut.index, dtype=torch.long), False)
            self.removed[size, len(cut.index)] = gone.nonzero().flatten()
            self.kept.setdefault(id(tensors[cut.tensor]), {})[cut.dim] = torch.tensor(cut.index, dtype=torch.long)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take over the norms; everything else goes its way."""
        if func in (torch.Tensor.mean, torch.mean):
            return self._mean(func, args, kwargs or {})
        rule = _NORMS.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        given = dict(zip(rule, args, strict=False)) | (kwargs or {})
        kept = self.kept.get(id(given.get("weight")))
        if not kept:
            return func(*args, **(kwargs or {}))
        x = given["input"]
        first = 1 if func is F.group_norm else x.dim() - given["weight"].dim()
        places = {first + dim: index.to(x.device) for dim, index in kept.items()}
        given["input"] = _take(x, places)
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                given[name] = _take(given[name], {dim: index.to(x.device) for dim, index in kept.items()})
        if "normalized_shape" in given:
            given["normalized_shape"] = tuple(given["weight"].shape)
        elif given["num_groups"] == x.shape[1]:
            given["num_groups"] = given["input"].shape[1]
        return _put(func(**given), x, places)

    def _mean(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The mean square of a norm written by hand: over the channels that stay, where those removed are all zero."""
        whole = func(*args, **kwargs)
        given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        if not given.get("keepdim") or len(dims) != 1:
            return whole
        size = given["input"].shape[dims[0]]
        for (old, new), gone in self.removed.items():
            if old == size and not given["input"].index_select(dims[0], gone.to(whole.device)).any():
                return whole * (old / new)
        return whole


_NORMS = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
}


def _take(value: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    for dim, index in places.items():
        value = value.index_select(dim, index)
    return value


def _put(value: Tensor, like: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    """Spread the kept channels over zeros of the full shape."""
    for dim, index in places.items():
        shape = list(value.shape)
        shape[dim] = like.shape[dim]
        value = value.new_zeros(shape).index_copy(dim, index, value)
    return value
