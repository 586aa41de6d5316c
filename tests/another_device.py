"""A device that is not there: tensors moved to it stay on the CPU, and every operation is held to the rules of a GPU.

It finds what only a GPU would: a tensor made on the CPU that meets one on the device, and `.numpy()` of one that was never
brought back. Tensors that autograd makes out of sight belong to no side, and are let pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

DEVICE, HOST = torch.device("cuda"), torch.device("cpu")
_MAKERS = {
    getattr(torch, name)
    for name in (
        *("tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "logspace"),
        *("rand", "randn", "randint", "randperm", "eye", "as_tensor", "from_numpy"),
    )
}
_LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}  # by tensors of either side
_FREE = [Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__, torch._has_compatible_shallow_copy_type]


class AnotherDevice(TorchFunctionMode):
    """Within it, `DEVICE` can be named wherever torch takes a device."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: Any = WeakIdKeyDictionary()

    def side(self, tensor: Tensor) -> torch.device | None:
        """Return where a tensor lies, or None where nobody knows."""
        return self.sides.get(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry an operation out on the CPU, and refuse what a GPU would."""
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.side(args[0]) or func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.side(args[0]) == DEVICE
        given = list(_tensors((args, kwargs)))
        if func == Tensor.data.__set__ or func == Tensor.grad.__set__:
            out = func(*args)
            if isinstance(args[1], Tensor) and func == Tensor.data.__set__:
                self._put(args[0], self.side(args[1]))
            return out
        if func is Tensor.numpy and self.side(args[0]) == DEVICE:
            raise TypeError("can't convert a tensor on the device to numpy")
        target: torch.device | None = None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda) or func in _MAKERS or func in _LIKE or "device" in kwargs:
            target, args, kwargs = self._aimed(func, args, kwargs)
        else:
            self._agree(func, args, given)
        out = func(*args, **kwargs)
        if target is not None and any(out is one for one in given) and self.side(out) != target:
            out = out.clone()  # moved, where there was nothing to move
        known = [self.side(one) for one in given]
        home = target or (DEVICE if DEVICE in known else HOST if HOST in known else None)
        if func == Tensor.grad.__get__ and isinstance(out, Tensor):
            home = self.side(args[0])
        for one in _tensors(out):
            if home is not None and not (one in self.sides and target is None):
                self._put(one, home)
        return out

    def follow(self, new: Tensor, old: Tensor | None) -> None:
        """Lay a tensor where another lies."""
        if old is not None:
            self._put(new, self.side(old))

    def _put(self, tensor: Tensor, side: torch.device | None) -> None:
        if side is not None:
            self.sides[tensor] = side

    def _aimed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return where the result lies, and arguments that name the CPU."""
        like = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.cpu:
            return HOST, args, kwargs
        named: torch.device | None = None

        def lay(value: Any) -> Any:
            nonlocal named
            if isinstance(value, torch.device) or (
                isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu", "meta")
            ):
                named = torch.device(value)
                if named.type == "cuda":
                    named = DEVICE
                    return HOST
            return value

        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return self.side(args[1]), args, kwargs
        if func is not torch.full and func not in _MAKERS:
            args = (args[0], *map(lay, args[1:])) if args else args
        kwargs = {key: lay(value) if key == "device" else value for key, value in kwargs.items()}
        if named is None:
            named = self.side(like) if like is not None and func not in (torch.tensor,) else HOST
        return named, args, kwargs

    def _agree(self, func: Any, args: Any, given: list[Tensor]) -> None:
        if func in _FREE:
            return
        watched = list(_tensors(args[:1])) + list(_tensors(args[2:])) if func in _INDEXED else given
        if func is Tensor.__getitem__ and self.side(args[0]) == HOST:
            watched = given
        sides = {self.side(one) for one in watched if one.dim() or self.side(one) == DEVICE} - {None}
        if len(sides) > 1:
            shapes = [(tuple(one.shape), str(self.side(one))) for one in watched]
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors on both sides, {shapes}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def another_device() -> Iterator[torch.device]:
    """Yield the device, while it is there."""
    mode = AnotherDevice()
    made = nn.Parameter.__new__

    def parameter(cls: Any, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        new = made(cls, data, requires_grad)
        mode.follow(new, data)
        return new

    nn.Parameter.__new__ = staticmethod(parameter)  # type: ignore[method-assign]  # torch makes parameters out of sight
    try:
        with mode:
            yield DEVICE
    finally:
        nn.Parameter.__new__ = made  # type: ignore[method-assign]
