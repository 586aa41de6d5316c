"""The table of rules by operator name, and `apply`, which finds the rule of a call."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from featherweight import packed_graph
from featherweight.graph.channelwise import along, gate, group_norm, layer_norm, local, per_channel, reduction
from featherweight.graph.labels import Call, Value, pointwise, unknown
from featherweight.graph.movement import (
    concatenate,
    expand,
    identity,
    index,
    move,
    pad,
    pick,
    pieces,
    reshape,
    shift,
    shuffle,
)
from featherweight.graph.products import attention, batched_product, convolution, einsum, embedding, product
from featherweight.graph.recurrent import recurrent

RULES: dict[str, Callable[[Call], Any]] = {}
for _rule, _names in (
    (pointwise, "add sub mul div pow where clamp fmod remainder rsub multiply divide subtract negative true_divide"),
    (pointwise, "hardswish log_sigmoid softplus masked_fill copy fill zero floor_divide logical_not isfinite"),
    (per_channel, "batch_norm prelu instance_norm"),
    (group_norm, "group_norm"),
    (layer_norm, "layer_norm rms_norm"),
    (convolution, "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"),
    (product, "linear addmm mm matmul"),
    (batched_product, "bmm baddbmm"),
    (einsum, "einsum"),
    (attention, "scaled_dot_product_attention"),
    (recurrent, "lstm gru rnn_tanh rnn_relu"),
    (embedding, "embedding"),
    (reduction, "mean sum amax amin max min prod var std norm linalg_vector_norm logsumexp argmax argmin any all"),
    (reduction, "var_mean std_mean nanmean median"),
    (along, "softmax log_softmax _softmax _log_softmax cumsum cumprod sort argsort topk"),
    (gate, "glu"),
    (move, "permute transpose t numpy_T mT movedim moveaxis swapaxes swapdims flip repeat tile repeat_interleave"),
    (move, "pixel_unshuffle"),
    (reshape, "view reshape _unsafe_view flatten unflatten view_as reshape_as squeeze unsqueeze"),
    (expand, "expand expand_as broadcast_to"),
    (identity, "clone contiguous detach to _to_copy type_as alias lift_fresh_copy float half bfloat16"),
    (identity, "dropout feature_dropout alpha_dropout feature_alpha_dropout until"),
    (identity, "zeros_like ones_like full_like empty_like rand_like randn_like"),
    (pieces, "slice narrow split split_with_sizes chunk"),
    (pick, "select unbind"),
    (shift, "roll index_select"),
    (index, "index"),
    (concatenate, "cat concat concatenate stack"),
    (pad, "pad constant_pad_nd"),
    (shuffle, "pixel_shuffle channel_shuffle"),
):
    RULES.update(dict.fromkeys(_names.split(), _rule))
_BLANK = ("zeros", "new_zeros")
LOCAL = re.compile(r"(adaptive_)?(avg|max)_pool\dd(_with_indices)?|_?upsample_(\w+?)\dd")


def apply(call: Call) -> Any:
    """Return the labelled result, a `Value` or a tuple of them, of one operator."""
    tags = getattr(call.operator, "tags", ())
    if not call.values() or call.name.startswith("new_"):
        values = tuple(Value(shape, static=True, blank=call.name in _BLANK) for shape in call.shapes)
        return values if len(values) > 1 else values[0]
    if torch.Tag.pointwise in tags:
        return pointwise(call)
    if getattr(call.operator, "namespace", "") in ("aten", packed_graph.DOMAIN):
        rule = local if LOCAL.fullmatch(call.name) else RULES.get(call.name)
        if rule:
            return rule(call)
    return unknown(call)
