"""Swap `nn.MultiheadAttention` for our attention: its parts become layers that can be cut, factored and quantized."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.technique import Context, Edits
from featherweight.techniques.wholes import holder, taken_apart

_PARTS = ("query", "key", "value")


def attention_swaps(model: nn.Module, context: Context) -> Edits:
    """Yield the Swap by the kind `attention` for every `nn.MultiheadAttention` in scope; others are recorded.

    The model computes the same after it, but for rounding. Left alone are layers with `add_bias_kv` or `add_zero_attn`, which
    the kind does not have, and layers that share a weight, which would come apart.

    Args:
        model: the model as it stands; it is read when each Swap is asked for.
        context: its scope, and where to record.
    """
    for path, layer in context.targets(model, nn.MultiheadAttention):
        tied = holder(model, layer)
        if layer.bias_k is not None or layer.add_zero_attn:
            context.leave(path, "attention with add_bias_kv or add_zero_attn attends to more than its input")
        elif tied is not None:
            context.leave(path, f"its weights are tied to {tied}")
        else:
            whole = layer.in_proj_weight is not None
            origins = {f"{part}.weight": "in_proj_weight" if whole else f"{part[0]}_proj_weight" for part in _PARTS}
            yield from taken_apart(attention_swap(path, layer), origins | {"out.weight": "out_proj.weight"}, context)


def attention_swap(path: str, layer: nn.MultiheadAttention) -> Swap:
    """Return the Swap of one `nn.MultiheadAttention` by the kind `attention`, with its weights.

    Args:
        path: where the layer is.
        layer: without `add_bias_kv` and `add_zero_attn`.
    """
    options = {
        "width": layer.embed_dim,
        "heads": layer.num_heads,
        "head_width": layer.head_dim,
        "key_width": layer.kdim,
        "value_width": layer.vdim,
        "bias": layer.in_proj_bias is not None,
        "dropout": layer.dropout,
        "batch_first": layer.batch_first,
    }
    separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    weights = separate if layer.in_proj_weight is None else layer.in_proj_weight.chunk(3)
    state: dict[str, Tensor] = dict(zip((f"{part}.weight" for part in _PARTS), weights, strict=True))
    if layer.in_proj_bias is not None:
        state |= zip((f"{part}.bias" for part in _PARTS), layer.in_proj_bias.chunk(3), strict=True)
        state["out.bias"] = layer.out_proj.bias
    state["out.weight"] = layer.out_proj.weight
    return Swap(path, "attention", options, {name: value.detach() for name, value in state.items()})
