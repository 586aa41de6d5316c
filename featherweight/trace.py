"""One trace of a model as an ATen graph, and names for what is in it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from featherweight.data import Inputs, as_call
from featherweight.errors import ModelError


def trace(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Return the exported program of a copy of the model in evaluation mode; sizes are those of `inputs`.

    Raises:
        ModelError: neither the non-strict nor the strict tracer can follow the forward; the message has its reason.
    """
    args, kwargs = as_call(inputs)
    copied = copy.deepcopy(model).eval()
    reasons = []
    for strict in (False, True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(copied, args, kwargs, strict=strict)
        except Exception as error:  # whatever the tracer or the user's forward raises
            reasons.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    raise ModelError(f"{type(model).__name__} cannot be traced: {reasons[0]}")


def tensor_names(program: ExportedProgram) -> dict[str, str]:
    """Return the state-dict name of each parameter and buffer placeholder, by node name."""
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def module_path(node: Node) -> str:
    """Return the dotted path of the innermost module whose forward made this node; empty for the root."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path)


def user_line(node: Node) -> str:
    """Return `file.py:line` of the user's code that made this node, or an empty string."""
    text = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    parts = lines[-1].split('"')
    number = lines[-1].partition("line ")[2].partition(",")[0]
    return f"{parts[1].rpartition('/')[2]}:{number}"
