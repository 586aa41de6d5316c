"""One trace of a model as an ATen graph, and names for what is in it."""

from __future__ import annotations

import logging
import os
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from featherweight.errors import ModelError
from featherweight.layers.bags import over_rows
from featherweight.modes import evaluating
from featherweight.packed_graph import padded
from featherweight.recurrent_graph import AnySteps


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> ExportedProgram:
    """Export the model in evaluation mode with batch size 2, or with the example as given where the model insists on it.

    Args:
        model: any module; it comes back as it was.
        args: example positional inputs.
        kwargs: example keyword inputs.

    Raises:
        ModelError: the model cannot be exported; the message has the reason.
    """
    pairs = pytree.tree_map(_two, (args, kwargs or {}))
    failure: Exception | None = None
    for example, strict in ((pairs, False), (pairs, True), ((args, kwargs or {}), False)):
        try:
            with evaluating(model), unfused(), traceable(strict, trimmed=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(model, example[0], example[1], strict=strict)
        except Exception as error:  # the exporter raises whatever the model's own code raises
            failure = error
    reason = f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), 'no message')}"
    raise ModelError(
        f"{type(model).__name__} cannot be traced, so its layers cannot be followed: {reason}{line_of(failure)}. "
        "Check the example inputs, or leave steps that need the graph out of the recipe."
    ) from failure


@contextmanager
def traceable(strict: bool, trimmed: bool = True, any_number: bool = False) -> Iterator[None]:
    """Run a block with layers that no tracer follows as graphs have them.

    Args:
        strict: leave all as it is, a strict tracer looks into every function itself; but it logs what it fails at, which is hidden.
        trimmed: as of `packed_graph.padded`.
        any_number: let recurrent layers take any number of steps.
    """
    with ExitStack() as stack:
        if strict:
            stack.enter_context(unlogged("torch._guards"))
            stack.enter_context(unlogged("torch.fx.experimental.symbolic_shapes"))
        else:
            stack.enter_context(over_rows())
            stack.enter_context(padded(trimmed))
            stack.enter_context(AnySteps() if any_number else nullcontext())
        yield


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Run a block without what a logger says."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def unfused() -> Iterator[None]:
    """Switch the fused encoder layer off: it would hide its hidden units in one operator, and calls no hooks of its children."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _two(item: Any) -> Any:
    """Return an example tensor with batch size 2, because size 1 would look like broadcasting."""
    if isinstance(item, Tensor) and item.ndim and len(item):
        return item[:2] if len(item) > 1 else torch.cat((item, item))
    return item


def module_path(node: Node) -> str:
    """Return the dotted path of the innermost module whose forward made this node; empty for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def line_of(error: BaseException | None) -> str:
    """Return ` (at model.py:7: the line)` for the innermost line of the user's own, or of another package's, that led to an error.

    Args:
        error: raised, and caught where the model was called; None gives an empty text.
    """
    ours = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    library = sysconfig.get_path("stdlib")
    for frame in reversed(traceback.extract_tb(error.__traceback__ if error is not None else None)):
        name = frame.filename
        if name.startswith((*ours, "<")) or (name.startswith(library) and "site-packages" not in name):
            continue
        return f" (at {os.path.basename(name)}:{frame.lineno}: {frame.line})"
    return ""


def where(node: Node) -> str:
    """Return file, line and layer of a node: the innermost frame that is not PyTorch's own."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    torch_folder = os.path.dirname(torch.__file__)
    own = [frame for frame in frames if not frame[0].startswith(torch_folder)] or frames
    place = f"at {os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""
    path = module_path(node)
    return f"{place} ({path})" if path else place
