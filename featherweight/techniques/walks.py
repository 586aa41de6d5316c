"""A forward that stops where it meets a layer, and goes on through whatever stands there by then.

Rounding one layer after the other wants the inputs of each with those before it rounded. Run from the start for each layer, a
network of many layers is run many times over; a forward that waits for its layers runs once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from featherweight.data import forward, tensors
from featherweight.edits import module_at

_THREAD = threading.local()


class Walk:
    """One forward, in a thread of its own that runs only within `on`, so that never two run at once.

    Args:
        model: in evaluation mode whenever `on` is called.
        inputs: of one batch.

    Attributes:
        model: which may change between two calls of `on`.
        path: of the layer that it stands before, or stood last.
        value: that is about to enter there.
        over: whether it has come to its end.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.path = ""
        self.value = torch.empty(0)
        self.over = False
        self.model, self._inputs = model, inputs
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._leaving, self._failure = False, list[BaseException]()
        # such as `with torch.device(...)`: a thread's own too
        self._modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def on(self) -> bool:
        """Go on to the next layer at which `stopping` says to stop, or to the end; return whether there was one.

        What the forward raises, this raises.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._failure:
            raise self._failure.pop()
        return not self.over

    def leave(self) -> None:
        """Leave the rest of the forward alone."""
        self._leaving = True
        if self._thread.ident is not None and not self.over:
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        _THREAD.walk = self
        try:
            with torch.no_grad(), ExitStack() as stack:  # gradients are a thread's own
                for mode in self._modes:
                    stack.enter_context(mode)
                forward(self.model, self._inputs)
        except _Left:
            pass
        except BaseException as error:
            self._failure.append(error)
        self.over, self._inputs, self.value = True, None, torch.empty(0)
        self._back.release()

    def wait(self, path: str, value: Tensor) -> None:
        """Wait before a layer, in the walk's own thread."""
        self.path, self.value = path, value
        self._back.release()
        self._go.acquire()
        if self._leaving:
            raise _Left


class _Left(BaseException):
    """Ends a forward; no `except Exception` of a user's model takes it for a failure."""


@contextmanager
def stopping(layers: Mapping[str, nn.Module], paths: Collection[str]) -> Iterator[None]:
    """Let walks stop before the layers at these paths, and pass through whatever stands by then at the paths of all.

    A forward may hold on to a layer that is no longer in the model: `self.second(self.first(x))` looks `second` up before `first`
    is called. To any forward that is no walk the layers are as they were.

    Args:
        layers: by path, as they were when the walks began.
        paths: some of theirs.
    """
    own = {path: vars(layer).get("forward") for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            vars(layer)["forward"] = _met(path, layer, layer.forward, path in paths)
        yield
    finally:
        for path, layer in layers.items():
            vars(layer)["forward"] = own[path]
            if own[path] is None:
                del vars(layer)["forward"]


def _met(path: str, layer: nn.Module, whole: Callable[..., Any], stops: bool) -> Callable[..., Any]:
    def met(*args: Any, **kwargs: Any) -> Any:
        walk: Walk | None = getattr(_THREAD, "walk", None)
        if walk is None:
            return whole(*args, **kwargs)
        if stops:
            walk.wait(path, next(tensors((args, kwargs))))
        now = module_at(walk.model, path)
        return whole(*args, **kwargs) if now is layer else now(*args, **kwargs)

    return met
