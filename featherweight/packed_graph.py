"""Packed sequences in a graph: padded steps and the lengths, as ONNX's recurrent operators take them.

A packed sequence holds the steps of all samples in one row, whose length depends on values; no exporter takes that. While a model is
exported, `padded` has `pack_padded_sequence` keep the steps padded, and a recurrent layer that reads them gives its input to the
operator `until` together with the lengths. `with_lengths` then hands those to the LSTM, GRU and RNN operators of the ONNX graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset18
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from featherweight.errors import ExportError

DOMAIN = "featherweight"
LAYERS = ("LSTM", "GRU", "RNN")
LENGTHS = 4
"""The place of the lengths among the inputs of each of them."""
_BETWEEN = ("Transpose", "Reshape", "Squeeze")  # what stands between the layers of one module
_INT32 = 6


@torch.library.custom_op(f"{DOMAIN}::until", mutates_args=())
def until(steps: Tensor, lengths: Tensor) -> Tensor:
    """Mark steps `[time, batch, features]` as counting for as many steps as each sample is long: `lengths` is `[batch]`.

    Raises:
        NotImplementedError: it is computed; only the lengths' way into an ONNX graph is known.
    """
    raise NotImplementedError("packed sequences run on runtimes that read ONNX; this one does not")


@until.register_fake
def _(steps: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(steps)


def translated(steps: Any, lengths: Any) -> Any:
    """Return the marker as a node of a graph, for `torch.onnx.export`."""
    return Op(Opset(DOMAIN, 1), "Until", _SCHEMA)(steps, opset18.Cast(lengths, to=_INT32))


_PARTS = [
    OpSchema.FormalParameter(name, kind) for name, kind in (("steps", "T"), ("lengths", "tensor(int32)"), ("same", "T"))
]
_KINDS = [("T", ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"], "of the steps")]
_SCHEMA = OpSchema("Until", DOMAIN, 1, "", inputs=_PARTS[:2], outputs=_PARTS[2:], type_constraints=_KINDS)


class _Padded(TorchFunctionMode):
    """Packs nothing: the steps of a packed sequence stay `[time, batch, ...]`, and it is known how many of them count.

    The sizes of the batch at each step, which a packed sequence carries, are right, and tell which sequence it is.

    Args:
        trimmed: see `padded`.
    """

    def __init__(self, trimmed: bool) -> None:
        super().__init__()
        self._trimmed = trimmed
        self._known: list[tuple[Tensor, Tensor]] = []

    def lengths(self, sizes: Tensor) -> Tensor | None:
        """Return the lengths of the samples of a sequence, longest first, or None where it was packed elsewhere."""
        return next((lengths for known, lengths in self._known if known is sizes), None)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the place of PyTorch's own packing and padding."""
        if function == torch._C._VariableFunctions._pack_padded_sequence:
            return self._pack(*args)
        if function == torch._C._VariableFunctions._pad_packed_sequence and self.lengths(args[1]) is not None:
            return self._pad(*args)
        return function(*args, **(kwargs or {}))

    def _pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        steps = input.transpose(0, 1) if batch_first else input
        longest: Any = steps.shape[0]
        if self._trimmed:
            longest = lengths.max().item()
            torch._check(longest >= 1)  # type: ignore[no-untyped-call]
            torch._check(longest <= steps.shape[0])  # type: ignore[no-untyped-call]
        sizes = (lengths > torch.arange(longest)[:, None]).sum(1)
        self._known.append((sizes, lengths))
        return steps, sizes

    def _pad(self, steps: Tensor, sizes: Tensor, batch_first: bool, value: float, total: Any) -> tuple[Tensor, Tensor]:
        lengths: Any = self.lengths(sizes)
        longest = sizes.shape[0]
        inside = torch.arange(longest)[:, None] < lengths
        kept = steps[:longest]
        values = torch.where(inside.reshape(*inside.shape, *[1] * (steps.dim() - 2)), kept, value)
        if str(total) != str(longest):  # comparing them would ask what no trace knows
            values = torch.cat([values, values.new_full((total - longest, *values.shape[1:]), value)])
        return values.transpose(0, 1) if batch_first else values, lengths


@contextmanager
def padded(trimmed: bool = True) -> Iterator[None]:
    """Run a block, such as an export, with packed sequences as padded steps and lengths.

    Args:
        trimmed: let `pad_packed_sequence` return as many steps as the longest sample has, a size that depends on values; otherwise
            as many as there are, for a trace that is only looked at.
    """
    before = {kind: kind.forward for kind in (nn.LSTM, nn.GRU, nn.RNN)}
    mode = _Padded(trimmed)
    try:
        for kind, forward in before.items():
            kind.forward = _reading(mode, forward)  # type: ignore[method-assign]
        with mode:
            yield
    finally:
        for kind, forward in before.items():
            kind.forward = forward  # type: ignore[method-assign]


def _reading(mode: _Padded, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer's forward that takes padded steps for a packed sequence."""

    def read(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        lengths = mode.lengths(input.batch_sizes) if isinstance(input, PackedSequence) else None
        if lengths is None:
            return forward(self, input, hx)
        first, self.batch_first = self.batch_first, False
        try:
            start = None if hx is None else self.permute_hidden(hx, input.sorted_indices)
            values, final = forward(self, until(input.data, lengths), start)
        finally:
            self.batch_first = first
        return input._replace(data=values), self.permute_hidden(final, input.unsorted_indices)

    return read


def with_lengths(model: ir.Model) -> None:
    """Give recurrent operators the lengths that their input was marked with, in place.

    Args:
        model: as exported.

    Raises:
        ExportError: something else reads marked steps.
    """
    graph = model.graph
    for node in [node for node in graph if node.domain == DOMAIN]:
        steps, lengths = node.inputs
        marked = node.outputs[0]
        for reader in [reader for reader, _ in marked.uses()]:
            if reader.op_type not in LAYERS:
                raise ExportError(
                    "this recurrent layer cannot read packed sequences in ONNX: one with projections has no operator there"
                )
            reader.replace_input_with(0, steps)
            _limit(reader, lengths)
        graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def _limit(layer: ir.Node, lengths: ir.Value | None) -> None:
    """Give one operator the lengths, and those that stand for the further layers of the same module."""
    if len(layer.inputs) <= LENGTHS:
        layer.resize_inputs(LENGTHS + 1)
    layer.replace_input_with(LENGTHS, lengths)
    reached = [layer.outputs[0]]
    while reached:
        for reader, place in reached.pop().uses():
            if reader.op_type in LAYERS and place == 0:
                _limit(reader, lengths)
            elif reader.op_type in _BETWEEN:
                reached.append(reader.outputs[0])
