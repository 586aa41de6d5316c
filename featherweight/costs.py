"""Multiply-accumulates of a call, counted operator by operator; what cannot be counted is named, never taken as zero.

One multiply with its addition is 1 MAC. Biases, pointwise work, norms, pooling and resampling cost no MACs; causal
masks and sparse weights give no discount, because the dense kernels compute those products. Formulas come from
PyTorch's own registry (`torch.utils.flop_counter`, halved), with ours in front for what it leaves out; whoever
registers a formula for a custom operator with `torch.utils.flop_counter.register_flop_formula` has it counted here.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight.errors import ModelError

BYTES_PER_ELEMENT = 4  # the original is taken as float32, whatever its dtype (DESIGN.md, section 6.10)


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        macs: multiply-accumulates, >= 0.
        bytes_moved: bytes of the distinct inputs and of the outputs of the operators counted in `macs`, >= 0.
        uncounted: `{operator name: calls}` of operators with unknown cost, for example `{"aten._fft_r2c": 2}`.
        by_operator: `{operator name: MACs}`, for example `{"aten.convolution": 118013952}`; sums to `macs`.
    """

    macs: int
    bytes_moved: int
    uncounted: dict[str, int]
    by_operator: dict[str, int]


def count_macs(call: Callable[[], object]) -> Cost:
    """Run `call` once, without gradients, and count the multiply-accumulates of every operator it dispatches.

    Counting is by shape, so it works the same for every dtype and device, the meta device included, and for the fused
    fast paths of recurrent and attention layers. Whatever `call` raises passes through.

    Args:
        call: runs what is to be counted, for example `lambda: model(*example)`; its result is dropped.
    """
    counting = _Counting()
    with torch.no_grad(), counting:
        call()
    macs = dict(counting.macs)
    return Cost(sum(macs.values()), counting.bytes_moved, dict(counting.uncounted), macs)


def parameters(model: nn.Module) -> tuple[int, int]:
    """Count the elements a model must store, and those of them that are not zero.

    Counted are all parameters and the persistent buffers (a quantized layer's `codes` included), each storage once, so
    that tied tensors count once. Left out are boolean masks, and buffers outside the state dict, which no file holds.

    Returns:
        `(elements, nonzero)`, with `0 <= nonzero <= elements`.

    Raises:
        ModelError: a lazy parameter has no shape yet, or a tensor is on the meta device and has no values to look at.
    """
    elements = nonzero = 0
    for name, tensor in _stored(model):
        if tensor.is_meta:
            raise ModelError(
                f"{name} {list(tensor.shape)} of {type(model).__name__} is on the meta device and has no values; "
                "materialize the model first (to_empty, then load_state_dict)"
            )
        elements += tensor.numel()
        nonzero += int(torch.count_nonzero(tensor.detach()))
    return elements, nonzero


def original_bytes(model: nn.Module) -> int:
    """Return the bytes of the model as plain float32: 4 for each element that `parameters` counts.

    Raises:
        ModelError: a lazy parameter has no shape yet.
    """
    return BYTES_PER_ELEMENT * sum(tensor.numel() for _, tensor in _stored(model))


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, tensor)` for what `parameters` counts, each stretch of storage once."""
    persistent = model.state_dict(keep_vars=True)
    buffers = [
        (name, buffer)
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in persistent and buffer.dtype != torch.bool
    ]
    seen: set[tuple[int, int, int]] = set()
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *buffers]:
        if nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"{name} of {type(model).__name__} has no shape yet: run the model once on an example first"
            )
        # A tie can be a transposed view, so the shape is no part of the identity; slices of one flat storage differ.
        place = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel())
        if place not in seen:
            seen.add(place)
            yield name, tensor


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what passes through PyTorch's dispatcher."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.bytes_moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = getattr(func, "overloadpacket", func)
        known = operator in COUNTERS or operator in flop_counter.flop_registry
        free = not known and isinstance(func, torch._ops.OpOverload) and is_free(func)
        if not known and not free and isinstance(func, torch._ops.OpOverload):
            with self:  # inference mode hands composite operators over whole: count what they are made of
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if known:
            self.macs[str(operator)] += _macs(operator, args, kwargs, out)
            inputs = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.bytes_moved += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs.values(), *outputs])
        elif not free:
            self.uncounted[str(operator)] += 1
        return out


def _macs(operator: Any, args: Any, kwargs: Any, out: Any) -> int:
    if operator in COUNTERS:
        return COUNTERS[operator](out, *args)
    return int(flop_counter.flop_registry[operator](*args, **kwargs, out_val=out)) // 2


def _attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """`[B, heads, T, D]`: scores, then their product with the values."""
    return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(out: Any, value: Tensor, weight: Tensor, hidden_weight: Tensor, *rest: Any) -> int:
    """One direction of one layer over `[T, B, I]`: `[gates*H, I]` and `[gates*H, H]` at each step."""
    return value.numel() // value.shape[-1] * (weight.numel() + hidden_weight.numel())


def _cudnn_recurrent(out: Any, value: Tensor, weights: list[Tensor], *rest: Any) -> int:
    """All layers and directions at once; the list holds matrices and biases."""
    return value.numel() // value.shape[-1] * sum(matrix.numel() for matrix in weights if matrix.dim() == 2)


def _lengths(sequences: Tensor) -> list[int]:
    """Time steps of each sequence in `[B, T, D]`, padded or nested."""
    if sequences.is_nested:
        return [int(length) for length in sequences._nested_tensor_size()[:, 0]]
    return [sequences.shape[1]] * sequences.shape[0]


def _multihead(out: Any, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *rest: Any) -> int:
    """The fast path of `nn.MultiheadAttention`: input projections, scores, values, output projection."""
    times = list(zip(_lengths(query), _lengths(key), strict=True))
    projections = sum(2 * asked + 2 * looked_at for asked, looked_at in times) * width * width
    return projections + sum(2 * asked * looked_at for asked, looked_at in times) * width


def _encoder_layer(out: Any, value: Tensor, width: int, heads: int, *rest: Any) -> int:
    """The fast path of `nn.TransformerEncoderLayer`: attention and feed-forward matrices `[F, D]`, `[D, F]`."""
    lengths = _lengths(value)
    # Fifteen settings stand before the mask; its matrices: qkv [3D, D], projection [D, D] and the two above.
    matrices = sum(weight.numel() for weight in rest[:15] if isinstance(weight, Tensor) and weight.dim() == 2)
    return sum(lengths) * matrices + sum(2 * length * length for length in lengths) * width


def _counters() -> dict[Any, Callable[..., int]]:
    by_name: dict[str, Callable[..., int]] = {
        # [..., K] times a matrix or vector: K for each element of the result
        "mv dot vdot _int_mm _weight_int8pack_mm mkldnn_linear _euclidean_dist _cdist_forward": (
            lambda out, left, *rest: out.numel() * left.shape[-1]
        ),
        "addmm_ baddbmm_ addmv addmv_ _addmm_activation": lambda out, bias, left, *rest: out.numel() * left.shape[-1],
        "addbmm addbmm_": lambda out, bias, left, *rest: out.numel() * left.shape[0] * left.shape[2],
        "addr addr_": lambda out, *rest: out.numel(),
        # weight [C_out, C_in / groups, *kernel]: one filter for each element of the result
        "cudnn_convolution mkldnn_convolution _slow_conv2d_forward _conv_depthwise2d": (
            lambda out, value, weight, *rest: out.numel() * weight[0].numel()
        ),
        "_trilinear": lambda out, left, weight, *rest: left.shape[0] * weight.numel(),
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable": _attention,
        "mkldnn_rnn_layer": _recurrent,
        "_cudnn_rnn": _cudnn_recurrent,
        "_native_multi_head_attention": _multihead,
        "_transformer_encoder_layer_fwd": _encoder_layer,
    }
    pairs = ((name, counter) for names, counter in by_name.items() for name in names.split())
    return {getattr(torch.ops.aten, name): counter for name, counter in pairs if hasattr(torch.ops.aten, name)}


COUNTERS = _counters()
# A word that ends in * stands for a family. In turn: views and data movement; creation and random; reductions,
# comparison, order and losses; normalization, resampling, pooling, and activations that lack the pointwise tag.
FREE = """
_unsafe_* _reshape_alias unsafe_* _to copy _pin_memory cat stack constant_pad_nd repeat repeat_interleave roll flip
gather take embedding _embedding_bag _embedding_bag_forward_only masked_* *_scatter scatter* index* im2col col2im tril
triu diag_embed nonzero nonzero_static lift lift_fresh _local_scalar_dense item *_shuffle *_unshuffle resize set complex
polar dequantize quantize_per_* fake_quantize_* _pack_padded_sequence to_padded_tensor _to_dense _nested_* is_* sym_*
_assert* reflection_pad* replication_pad*
arange linspace logspace eye full* zero* ones* empty* new_* rand* scalar_tensor fill *_indices one_hot normal uniform
bernoulli exponential multinomial poisson native_dropout _fused_dropout rrelu_with_noise* affine_grid_generator
cumsum cumprod logcumsumexp cummax cummin _cummax_helper _cummin_helper median nanmedian mode kthvalue topk sort argsort
msort searchsorted bucketize bincount histc trace segment_reduce isin unique* _unique* nll_loss*_forward mse_loss
smooth_l1_loss huber_loss binary_cross_entropy* allclose
*_softmax *native_batch_norm* _batch_norm_* cudnn_batch_norm native_layer_norm native_group_norm _fused_rms_norm
_weight_norm_interface renorm upsample_* _upsample_* grid_sampler_* adaptive_* _adaptive_* avg_pool* max_pool*
max_unpool* fractional_max_pool* glu prelu _prelu_kernel log_sigmoid_forward hardswish _add_relu _thnn_fused_*_cell
"""


@functools.cache
def is_free(func: torch._ops.OpOverload) -> bool:
    """Tell whether an operator has no multiply-accumulates worth counting, by PyTorch's tags or by name."""
    packet = func.overloadpacket
    tags = {tag for name in packet.overloads() for tag in getattr(packet, name).tags}
    if func.is_view or tags & {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy, torch.Tag.inplace_view}:
        return True
    if func.namespace != "aten":  # quantize and dequantize are conversions
        return func.namespace in ("quantized_decomposed", "prim")
    name = packet.__name__.removesuffix("_").removesuffix("_copy")
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FREE.split())
