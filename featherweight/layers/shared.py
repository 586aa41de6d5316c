"""Layers whose weights are a few values: they store which, and the values; a runtime expands them once, at load."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.layers.quantized import QuantizedLayer, QuantizedLinear, round_mantissa, significant_bits, slowed
from featherweight.layers.quantized_convolutions import QuantizedConv, QuantizedTransposedConv
from featherweight.layers.quantized_embedding import QuantizedEmbedding

LEARNT = ("centroids", "points", "weights")


class SharedLayer(QuantizedLayer):
    """What the kinds with a codebook share, in place of a grid and its scale.

    Buffers: `codes` int8 shaped like the float weight, `code + origin` being a place in `codebook` float32 `[clusters]`, in any
    order. An entry that is exactly zero stays zero.

    Args:
        shape: sizes, as the quantized kind takes them.
        clusters: entries of the codebook, 2 to 256.
        origin: place of the entry with code 0; codes are at least -128 and at most 127.
        learn: what training changes. `centroids`: the entries, each weight keeps its own (Han et al., Deep Compression, 2016).
            `points`: the entries, while each weight takes the one nearest to what it was at first (differentiable
            quantization: Polino et al., 2018). `weights`: float latents too, with straight-through gradients.
        options: of the quantized kind.
    """

    codebook: Tensor

    def __init__(self, *shape: Any, clusters: int, origin: int, learn: str = "centroids", **options: Any) -> None:
        super().__init__(*shape, bits=(clusters - 1).bit_length(), per_channel=False, **options)
        self.clusters, self.origin, self.learn = clusters, origin, learn
        del self.scale
        self.register_buffer("codebook", torch.zeros(clusters))

    def dequantized(self, integers: bool = False) -> Tensor:
        """The float weight that the codes stand for, shaped like them."""
        if self.codes is not None:
            return self.codebook[self.codes.long() + self.origin]
        places = self._places()
        if not self.training:
            return self._stored()[places]
        # the mean gradient over a cluster, where the sum would grow with its size; zero stays zero
        share = 1.0 / torch.bincount(places.flatten(), minlength=self.clusters).clamp_min(1).to(self.codebook.dtype)
        shared = slowed(self.codebook, share * (self.codebook.detach() != 0))[places]
        if self.learn != "weights":
            return shared
        weight = self.get_parameter("weight")
        return shared + (weight - weight.detach())

    def thaw(self) -> None:
        """Make the codebook trainable, and put what `learn` needs in the place of the codes."""
        weight, codes = self.dequantized().detach().clone(), self.codes
        self.codes = None
        if self.learn == "centroids":
            self.register_buffer("assigned", codes)
        else:
            self.register_parameter("weight", nn.Parameter(weight, requires_grad=self.learn == "weights"))
        codebook = self.codebook.clone()
        del self.codebook
        self.register_parameter("codebook", nn.Parameter(codebook))

    def freeze(self) -> None:
        """Store the nearest entries, and the codebook and the bias with the bits they are stored with."""
        codes, codebook = (self._places() - self.origin).to(torch.int8).contiguous(), self._stored()
        self._round_bias()
        del self.codebook
        if self.learn == "centroids":
            del self.assigned
        else:
            del self.weight
        self.register_buffer("codebook", codebook)
        self.codes = codes

    def steps_in_training(self) -> list[nn.Parameter]:
        """The codebook of a thawed layer, which wants a smaller learning rate than weights."""
        return [self.get_parameter("codebook")]

    def _places(self) -> Tensor:
        """The place in the codebook of each weight of a thawed layer, int64."""
        if self.learn == "centroids":
            return self.get_buffer("assigned").long() + self.origin
        return nearest(self.get_parameter("weight").detach(), self._stored())

    def _stored(self) -> Tensor:
        return round_mantissa(self.codebook.detach(), significant_bits(self.bits))

    def extra_repr(self) -> str:
        """Show the size of the codebook."""
        return f"clusters={self.clusters}, learn={self.learn}"


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the places of the entries nearest to values, int64, shaped like them.

    Args:
        values: any shape.
        codebook: `[clusters]`, in any order.
    """
    ordered, order = codebook.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]


class SharedLinear(SharedLayer, QuantizedLinear):
    """`nn.Linear` with a codebook."""


class SharedConv(SharedLayer, QuantizedConv):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with a codebook."""


class SharedTransposedConv(SharedLayer, QuantizedTransposedConv):
    """`nn.ConvTranspose1d/2d/3d` with a codebook."""


class SharedEmbedding(SharedLayer, QuantizedEmbedding):
    """`nn.Embedding` with a codebook."""

    def forward(self, input: Tensor) -> Tensor:
        """Look `[...]` integers up: `[..., embedding_dim]`."""
        if self.codes is None:
            return F.embedding(input, self.dequantized(), self.padding_idx)
        return self.codebook[F.embedding(input, self.codes).long() + self.origin]
