"""Recurrent operators that read each sample up to its length, for runtimes whose operators read every step.

Forwards, the steps behind a sample's end change nothing before it, so only the final state is taken elsewhere: at its last step.
Backwards, a sample is turned within its length, read forwards, and turned again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from featherweight.errors import ExportError
from featherweight.integer_graph import constant
from featherweight.packed_graph import LAYERS, LENGTHS

_PER_DIRECTION = (1, 2, 3, 5, 6, 7)  # inputs with a first dimension of directions: all but the steps and the lengths


def without_lengths(model: bytes) -> bytes:
    """Return the model with its recurrent operators reading every step, and the same results.

    Args:
        model: serialized ONNX, weights included; where no operator has lengths it is returned as it is.

    Raises:
        ExportError: a final cell state is read, which no step gives out.
    """
    whole = ir.from_proto(onnx.load_model_from_string(model))
    found = [
        node
        for node in whole.graph
        if node.op_type in LAYERS and len(node.inputs) > LENGTHS and node.inputs[LENGTHS] is not None
    ]
    for node in found:
        _Rewriting(whole.graph, node).run()
    return bytes(ir.to_proto(whole).SerializeToString()) if found else model


class _Rewriting:
    """One operator, as one for each direction without lengths."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.ways = 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1
        self.lengths = self._added("Cast", [node.inputs[LENGTHS]], to=int(ir.DataType.INT64))

    def run(self) -> None:
        """Put the new operators in the place of the old one.

        Raises:
            ExportError: its final cell state is read.
        """
        steps, state, cell = (*self.node.outputs, None, None)[:3]
        if cell is not None and (cell.uses() or cell.is_graph_output()):
            raise ExportError(
                f"the final cell state of {self.node.name} over packed sequences is known to ONNX Runtime alone"
            )
        made = [self._one_way(place) for place in range(self.ways)]
        self._become(steps, [self._added("Unsqueeze", [one, self._axis(1)]) for one, _ in made], 1)
        if state is not None and (state.uses() or state.is_graph_output()):
            first = constant(self.graph, "first_step", np.array([0]))
            self._become(state, [self._added("Gather", [turned, first], axis=0) for _, turned in made], 0)
        self.graph.remove(self.node, safe=True)

    def _one_way(self, place: int) -> tuple[ir.Value, ir.Value]:
        """The steps `[time, batch, units]` of a direction, 1 is backwards, and the same in the order whose first is the final state."""
        inputs = [
            self._part(value, place) if at in _PER_DIRECTION and value is not None else value
            for at, value in enumerate(self.node.inputs)
        ]
        inputs[0] = self._turned(inputs[0]) if place else inputs[0]
        inputs[LENGTHS] = None
        attributes = dict(self.node.attributes)
        if "activations" in attributes:  # each direction has its own
            functions = list(attributes["activations"].as_strings())
            each = len(functions) // self.ways
            attributes["activations"] = ir.AttrStrings("activations", functions[place * each : (place + 1) * each])
        attributes["direction"] = ir.AttrString("direction", "forward")
        name = f"{self.node.name}/reverse" if place else self.node.name
        node = ir.Node("", self.node.op_type, inputs, list(attributes.values()), name=name)
        node.outputs[0].name = f"{name}.steps"
        self.graph.insert_before(self.node, node)
        read = self._added("Squeeze", [node.outputs[0], self._axis(1)])
        turned = self._turned(read)
        return turned if place else read, turned

    def _turned(self, value: ir.Value | None) -> ir.Value:
        return self._added("ReverseSequence", [value, self.lengths], batch_axis=1, time_axis=0)

    def _part(self, value: ir.Value, place: int) -> ir.Value:
        """What belongs to one direction."""
        if self.ways == 1:
            return value
        return self._added("Gather", [value, constant(self.graph, f"direction_{place}", np.array([place]))], axis=0)

    def _become(self, old: ir.Value, parts: list[ir.Value], axis: int) -> None:
        """Put parts, joined along an axis, in the place of an output of the old operator."""
        whole = self._added("Concat", parts, axis=axis) if len(parts) > 1 else parts[0]
        ir.convenience.replace_all_uses_with(old, whole, replace_graph_outputs=True)

    def _axis(self, axis: int) -> ir.Value:
        return constant(self.graph, f"axis_{axis}", np.array([axis]))

    def _added(self, kind: str, inputs: Any, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].name = f"{self.node.name}.{kind}{len(self.graph)}"
        self.graph.insert_before(self.node, node)
        return node.outputs[0]


__all__ = ["without_lengths"]
