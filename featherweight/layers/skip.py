"""What a block leaves behind when it is taken out: its input, in the form its output had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from featherweight.data import tensors
from featherweight.errors import ModelError
from featherweight.layers.attention import Unfused, UnfusedLayer

_SEQUENCES: dict[str, type[tuple[Any, ...]] | type[list[Any]]] = {"tuple": tuple, "list": list}


class SkippedAttention:
    """What `nn.TransformerEncoder` and `nn.TransformerDecoder` read from the attention of their first layer."""

    in_proj_weight = in_proj_bias = Unfused()
    out_proj = UnfusedLayer()

    def __init__(self, batch_first: bool) -> None:
        self.batch_first = batch_first


class Skip(nn.Module):
    """Returns its first tensor argument in the structure of the block it stands for; accepts any call.

    Args:
        structure: of the block's output, as `output_structure` gives it: `"tensor"` is where the input goes, None stays
            None, and `["tuple", ...]` or `["list", ...]` holds further ones.
        batch_first: for a layer of `nn.TransformerEncoder` or `nn.TransformerDecoder`, which ask their first layer how its
            attention wants its tensors; None elsewhere.

    Raises:
        ValueError: `structure` is none of these.
    """

    norm1: ClassVar[UnfusedLayer] = UnfusedLayer()
    norm2: ClassVar[UnfusedLayer] = norm1
    linear1: ClassVar[UnfusedLayer] = norm1
    linear2: ClassVar[UnfusedLayer] = norm1

    def __init__(self, structure: Any = "tensor", batch_first: bool | None = None) -> None:
        super().__init__()
        self.structure = _checked(structure)
        if batch_first is not None:
            self.self_attn = SkippedAttention(batch_first)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor of the call, any shape.

        Raises:
            ModelError: no argument is a tensor.
        """
        given = first_tensor(args, kwargs)
        if given is None:
            raise ModelError("a skipped block was called without a tensor, and there is nothing it could pass on")
        return _filled(self.structure, given)

    def extra_repr(self) -> str:
        """Show the structure."""
        return f"structure={self.structure}"


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first argument of a call that is a tensor, positional ones first."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def output_structure(output: Any) -> Any:
    """Return the JSON-able structure of a block's output, for `Skip`.

    Raises:
        ValueError: the output holds anything but one tensor, None, and tuples and lists of them.
    """
    count = sum(1 for _ in tensors(output))
    if count != 1:
        raise ValueError(f"its output holds {count} tensors and not one")
    return _described(output)


def _described(output: Any) -> Any:
    if isinstance(output, Tensor):
        return "tensor"
    if output is None:
        return None
    for name, kind in _SEQUENCES.items():
        if type(output) is kind:
            return [name, *map(_described, output)]
    raise ValueError(f"its output holds a {type(output).__name__}")


def _checked(structure: Any) -> Any:
    if structure is None or structure == "tensor":
        return structure
    kind, *parts = structure
    if kind not in _SEQUENCES:
        raise ValueError(
            f"structure {structure!r} is neither 'tensor', None nor a list that starts with 'tuple' or 'list'"
        )
    return (kind, *map(_checked, parts))


def _filled(structure: Any, given: Tensor) -> Any:
    if structure is None:
        return None
    if structure == "tensor":
        return given
    kind, *parts = structure
    return _SEQUENCES[kind](_filled(part, given) for part in parts)
