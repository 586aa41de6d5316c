"""`model.fw`: one file with manifest, graph and entropy-coded weights, that a fresh process runs without the user's code.

Sections of the container: the manifest, the graph, then one stream a tensor. The manifest is JSON with short keys, packed
with a dictionary; it holds structure and reproducible facts only, never a time, a date or a path, so that one seed gives
one file. Nothing in the file is ever executed or unpickled, and every size is checked before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import tensor_table
from featherweight.coding import Sections, decode_tensor, deflate, encode_tensor, inflate, pack, unpack
from featherweight.edits import Cut, Edit, Keep, Swap, Write, from_json, named_tensors, private_copy, replay, to_json
from featherweight.errors import ArtifactError, ModelError
from featherweight.portable import Graph, assemble
from featherweight.runtimes.onnxruntime import Session

_MOST_TEXT = 64 << 20
_UNREADABLE = (ModelError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)
# Likely text of a manifest, the likeliest last: it costs the file nothing.
_DICTIONARY = (
    b'{"steps":["fold_batch_norm",{"prune_channels":{"ratio":0.5,"importance":"l2"}},{"low_rank":{"energy":0.9}},'
    b'{"prune_weights":{"ratio":0.9,"epochs":20,"learning_rate":0.001}},{"quantize_static":{"range":"mse"}},'
    b'{"quantize_weights":{"bits":4,"per_channel":false}},{"distill":{"epochs":20,"learning_rate":0.0005}}]}'
    b'"kind":"linear","options":{"in_features":,"out_features":}},"kind":"identity","options":{}},"kind":"convolution",'
    b'"kind":"quantized_linear","options":{"in_features":512,"out_features":10,"bits":4,"bias":true,"per_channel":false,'
    b'"input_grid":false,"output_grid":false}},{"swap":"layer1.0.conv1","kind":"quantized_convolution","options":'
    b'{"in_channels":64,"out_channels":64,"kernel_size":[3,3],"stride":[1,1],"padding":[1,1],"dilation":[1,1],"groups":1,'
    b'"bits":8,"bias":true,"per_channel":true,"input_grid":true,"output_grid":false}}],"sparse":["features.0.weight",'
    b'"classifier.weight","running_mean","running_var","num_batches_tracked","bias","keep":[["sizes":{"'
    b'"tensors":[["0.bias","f",[10]],["0.codes","c",[64,32,3,3]],["0.scale","f",[1]],["input_scale","f",[]],["input_zero","u",[]]'
    b'"facts":{"score_before":0.9,"score_after":0.9,"score":"accuracy","original_bytes":,"parameters":,"nonzero":,"macs":,'
    b'"agreement":{"max_abs":1e-06,"sqnr_db":120.0,"top1":1.0}},"edits":[{"swap":","recipe":{"seed":0,"class":"'
)
_GRAPH_DICTIONARY = (
    b"ConvTransposeLayerNormalizationBatchNormalizationGlobalAveragePoolReduceMeanSoftmaxSigmoidTanhErfGeluMatMulTransposeGather"
    b"SliceSplitConcatUnsqueezeAveragePoolFlattenLSTMGRUCastPadSubDivMulPowSqrtClipAdd\x12\x04axisMaxPool*\x15\n\x0ckernel_shape"
    b"@\x02@\x02\xa0\x01\x07*\x10\n\x07strides@\x02@\x02\xa0\x01\x07*\x11\n\x04pads@\x01@\x01@\x01@\x01\xa0\x01\x07"
    b'"\x07Reshape*\x11\n\nvalue_ints@\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\xa0\x01\x07"\x08Constant'
    b'"\x05Shape*\x0b\n\x03end\x18\x01\xa0\x01\x02*\r\n\x05start\x18\x00\xa0\x01\x02"\x07Squeeze"\x06Expand'
    b'"\x10QuantizeLinear"\x11DequantizeLinear*\x0b\n\x04axis\x18\x00\xa0\x01\x02"\x04Conv*\x15\n\x0ckernel_shape@\x03@\x03\xa0\x01\x07'
    b'*\x11\n\x04pads@\x01@\x01@\x01@\x01\xa0\x01\x07"\x04Relu"\x04Gemm*\r\n\x06transB\x18\x01\xa0\x01\x02\x12\x01g*\x04B\x02w0*\x04B\x02w1'
    b"*\x04B\x02w2*\x04B\x02w3*\x04B\x02w4*\x04B\x02w5Z\x1a\n\x05input\x12\x11\n\x0f\x08\x01\x12\x0b\n\x07\x12\x05batch"
    b"b\x1a\n\x06linear\x12\x10\n\x0e\x08\x01\x12\n\n\x05\x12\x03s31\n\x02\x08\n\x10\n"
)


@dataclass
class Artifact:
    """A compressed model: what the file holds, and what was learnt while making it.

    Attributes:
        edits: what turns the original class into this model, structure only.
        facts: reproducible facts: recipe, seed, class, scores, parameters, MACs, agreement.
        state: the tensors by their first state-dict name.
        aliases: further names of tied tensors, to the first.
        graph: the ONNX graph without weights, or None when it was left out.
        path: the file, once saved or loaded.
        report: what may differ from run to run (times, sizes, machine), or None; never in the file.
    """

    edits: list[Edit]
    facts: dict[str, Any]
    state: dict[str, Tensor]
    aliases: dict[str, str]
    graph: Graph | None
    path: Path | None = None
    report: Any = None
    _session: Session | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # which no other process could use

    def run(self, inputs: Any, threads: int = 1) -> list[np.ndarray[Any, Any]]:
        """Return the model's outputs on ONNX Runtime.

        Args:
            inputs: a tensor or array, a tuple of them, or a mapping by input name; any batch size.
            threads: of the first call's session.

        Raises:
            ArtifactError: the file holds no graph and needs the original class: `load(path, into=model)`.
            DataError: an input does not fit.
        """
        return self.session(threads).run(inputs)

    def session(self, threads: int = 1) -> Session:
        """Return the ONNX Runtime session, made at the first call.

        Raises:
            ArtifactError: the file holds no graph.
        """
        if self._session is None:
            self._session = Session(self.onnx_bytes(), threads)
        return self._session

    def onnx_bytes(self) -> bytes:
        """Return the whole model as serialized ONNX, weights included.

        Raises:
            ArtifactError: the file holds no graph.
        """
        if self.graph is None:
            raise ArtifactError(
                f"{self.path or 'the artifact'} holds no graph: it needs the original class, load(path, into=model)"
            )
        return assemble(self.graph, self._named())

    def _named(self) -> dict[str, Tensor]:
        """Every tensor under all of its names."""
        return {**self.state, **{name: self.state[first] for name, first in self.aliases.items()}}

    def into(self, model: nn.Module, keep: bool = True) -> nn.Module:
        """Return a trainable copy of `model`, an instance of the original class, with the edits replayed and these weights.

        Args:
            model: of the class the file was made from; it is not changed.
            keep: False gives the artifact's own tensors away, which saves the memory of a copy; it is of no use after.

        Raises:
            ModelError: it is not the class this file was made from; the message names the first tensor that differs.
        """
        copied, _ = private_copy(model, values=False)
        with torch.device("meta"):  # sizes in a hostile file must not cost memory
            replay(copied, self.edits)
        tensors = named_tensors(copied)
        wanted = self._named()
        persistent = set(copied.state_dict())
        for name in sorted(persistent ^ set(wanted)):
            where = "the file has no tensor" if name in persistent else f"{type(model).__name__} has no tensor"
            raise ModelError(f"{self.path or 'the artifact'} does not fit {type(model).__name__}: {where} {name!r}")
        for name, value in wanted.items():
            if tensors[name].shape != value.shape:
                raise ModelError(
                    f"{self.path or 'the artifact'} does not fit {type(model).__name__}: "
                    f"{name} is {list(tensors[name].shape)} there and {list(value.shape)} in the file"
                )
        own = {name: value.clone() if keep else value for name, value in wanted.items()}
        copied.load_state_dict(own, strict=True, assign=True)
        for first, name in ((first, name) for name, first in self.aliases.items()):
            _tie(copied, first, name)
        for name, parameter in copied.named_parameters():
            if parameter.is_meta:
                raise ModelError(
                    f"{self.path or 'the artifact'} leaves {name} of {type(model).__name__} without values"
                )
        return copied

    def to_bytes(self, graph: bool = True) -> bytes:
        """Return the file's bytes.

        Args:
            graph: False leaves the graph out: smaller, but it then loads into the original class only.
        """
        kept = self.graph if graph else None
        tensors = tensor_table.written(self.state, self.edits)
        manifest: dict[str, Any] = {"facts": self.facts, "edits": to_json(self.edits), "tensors": tensors}
        if self.aliases:
            manifest["aliases"] = self.aliases
        streams = [encode_tensor(value) for value in self.state.values()]
        if kept is not None:
            order = {name: place for place, name in enumerate(self.state)}
            manifest["graph"] = [order[self.aliases.get(name, name)] for name in kept.weights]
            if kept.constants:
                manifest["constants"] = [tensor_table.entry("constant", value)[1:] for value in kept.constants]
                streams += [encode_tensor(value) for value in kept.constants]
        text = json.dumps(manifest, separators=(",", ":"), allow_nan=False).encode()
        skeleton = deflate(kept.skeleton, _GRAPH_DICTIONARY) if kept is not None else b""
        return pack([deflate(text, _DICTIONARY), skeleton, *streams])

    def save(self, path: str | Path, graph: bool = True) -> int:
        """Write the file, all or nothing, and return its length in bytes.

        Raises:
            ArtifactError: the path cannot be written.
        """
        path = Path(path)
        data = self.to_bytes(graph)
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
        self.path = path
        return len(data)

    def bytes_by_part(self) -> dict[str, int]:
        """Return how many bytes of the file each part takes: manifest, graph, container, and each tensor by name."""
        data = self.to_bytes()
        sections = [len(section) for section in unpack(data, "the artifact")]
        names = [*self.state, *(f"constant {i}" for i in range(len(sections) - 2 - len(self.state)))]
        parts = {"manifest": sections[0], "graph": sections[1], **dict(zip(names, sections[2:], strict=True))}
        return {**parts, "container": len(data) - sum(sections)}


def package(model: nn.Module, edits: list[Edit], facts: dict[str, Any], graph: Graph | None) -> Artifact:
    """Return the artifact of a plain compressed model.

    Args:
        model: plain; its state dict is copied.
        edits: what led to it from the original class.
        facts: JSON-able and reproducible.
        graph: from `export_graph(model, ...)`, or None.
    """
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...], int], str] = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.storage_offset())
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            state[name] = value.detach().cpu().clone()
    return Artifact(compact(edits), facts, state, aliases, graph)


def compact(edits: list[Edit]) -> list[Edit]:
    """Return the shortest edits with the same effect on structure: the last cut of each dimension, Swaps that last.

    A Swap ends what earlier edits did below its path, since its options alone build the new layer.
    """
    kept: list[Edit] = []
    swapped: set[str] = set()
    sparse: set[str] = set()
    cuts: dict[tuple[str, int], Cut] = {}
    sizes: dict[str, int] = {}
    for edit in reversed(edits):
        if isinstance(edit, Swap):
            if not _below(edit.path, swapped):
                kept.insert(0, Swap(edit.path, edit.kind, edit.options))
                swapped.add(edit.path)
        elif isinstance(edit, Keep):
            for cut in edit.cuts:
                if not _below(cut.tensor.rpartition(".")[0], swapped):
                    cuts.setdefault((cut.tensor, cut.dim), Cut(cut.tensor, cut.dim, tuple(range(len(cut.index)))))
            for path, size in edit.sizes:
                if not _below(path.rpartition(".")[0], swapped):
                    sizes.setdefault(path, size)
        else:
            sparse.update(edit.sparse)
    if cuts or sizes:  # heads stay cut where all that was sliced has been swapped since
        kept.append(Keep(tuple(cuts[key] for key in sorted(cuts)), tuple(sorted(sizes.items()))))
    if sparse:
        kept.append(Write(None, tuple(sorted(sparse))))
    return kept


def _below(path: str, swapped: set[str]) -> bool:
    return any(path == other or path.startswith(other + ".") for other in swapped)


def load(path: str | Path, into: nn.Module | None = None) -> Any:
    """Read a `.fw` file.

    Args:
        path: the file.
        into: an instance of the original class; the result is then a trainable `nn.Module`, and `into` is not changed.

    Returns:
        an `Artifact`, which runs on ONNX Runtime, or the module when `into` is given.

    Raises:
        ArtifactError: the file cannot be read, is damaged or foreign, or its parts do not fit each other.
        ModelError: `into` is not of the class the file was made from.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            artifact = _parse(Sections(file, str(path)).check(), str(path))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    artifact.path = path
    return artifact if into is None else artifact.into(into, keep=False)


def _parse(sections: Sections, source: str) -> Artifact:
    if len(sections) < 2:
        raise ArtifactError(f"{source} has {len(sections)} sections where a model has a manifest and a graph at least")
    try:
        manifest = json.loads(inflate(sections[0], _MOST_TEXT, _DICTIONARY))
        edits, facts = from_json(manifest["edits"]), dict(manifest["facts"])
        table = tensor_table.read(manifest["tensors"], edits)
        constants = [tensor_table.described(letter, shape) for letter, shape in manifest.get("constants", [])]
        places = [int(place) for place in manifest.get("graph", [])]
        aliases = {str(name): str(first) for name, first in manifest.get("aliases", {}).items()}
        names = [name for name, _, _ in table]
        weights = tuple(names[place] for place in places if place >= 0)
    except ArtifactError:
        raise
    except _UNREADABLE as error:
        raise ArtifactError(f"{source} has a manifest that cannot be read: {type(error).__name__}: {error}") from error
    if (
        len(sections) != 2 + len(table) + len(constants)
        or not set(aliases.values()) <= set(names)
        or len(set(names)) != len(names)
    ):
        raise ArtifactError(f"{source} does not hold the {len(table)} tensors that its manifest lists")
    shapes = [shape for *_, shape in table] + [shape for _, shape in constants]
    if sum(map(math.prod, shapes)) > tensor_table.MOST_ELEMENTS:
        raise ArtifactError(f"{source} asks for more than {tensor_table.MOST_ELEMENTS} values")
    streams = (sections[place] for place in range(2, len(sections)))
    state = {name: decode_tensor(next(streams), dtype, shape) for name, dtype, shape in table}
    loose = tuple(decode_tensor(next(streams), dtype, shape) for dtype, shape in constants)
    skeleton = sections[1]
    graph = Graph(inflate(skeleton, _MOST_TEXT, _GRAPH_DICTIONARY), weights, loose) if skeleton else None
    return Artifact(edits, facts, state, aliases, graph)


def _tie(model: nn.Module, first: str, other: str) -> None:
    path, _, attribute = other.rpartition(".")
    owner = model.get_submodule(path)
    table: Mapping[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
    table[attribute] = named_tensors(model)[first]  # type: ignore[index]
