"""Structured matrices over ordinary layers: tensor trains, Kronecker products, block-diagonal pairs, blocks of circulants."""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tensorized(nn.Module):
    """What the linear kinds share: a product that is never multiplied out, and a bias of its own.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one, `[out_features]`.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """Multiply `[n, in_features]` by the matrix, without the bias: `[n, out_features]`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `[..., in_features]`."""
        if not isinstance(input, Tensor):  # a recurrent layer reads its matrix off the linear ones
            like = next(self.parameters())
            matrix = self.product(torch.eye(self.in_features, dtype=like.dtype, device=like.device)).T
            return F.linear(input, matrix, self.bias)
        output = self.product(input.reshape(-1, self.in_features)).reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class TensorTrainLinear(Tensorized):
    """`nn.Linear` over a tensor train (Novikov et al., "Tensorizing Neural Networks", NeurIPS 2015).

    The matrix is `sum over ranks of G_1[i_1, j_1] ... G_d[i_d, j_d]` for an output `(i_1 ... i_d)` and an input
    `(j_1 ... j_d)`. Two cores make a sum of `rank` Kronecker products. Each core is a linear layer from its input and the
    rank after it to the rank before it and its output, so that other techniques reach it.

    Args:
        in_shape: factors of the input's width, one a core.
        out_shape: factors of the output's width, one a core.
        ranks: between one core and the next, one fewer.
        bias: whether there is one.

    Raises:
        ValueError: the lengths do not fit.
    """

    def __init__(self, in_shape: list[int], out_shape: list[int], ranks: list[int], bias: bool = True) -> None:
        super().__init__(math.prod(in_shape), math.prod(out_shape), bias)
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        self.ranks = _bonds(ranks, len(in_shape), len(out_shape))
        self.cores = nn.ModuleList(
            nn.Linear(n * after, before * m, bias=False)
            for n, m, (before, after) in zip(in_shape, out_shape, pairwise(self.ranks), strict=True)
        )

    def product(self, rows: Tensor) -> Tensor:
        """As of every linear kind: one core after another, the last first."""
        made = 1
        state = rows.reshape(-1, 1, self.in_features)
        for place in reversed(range(len(self.cores))):
            width, after, before = self.in_shape[place], self.ranks[place + 1], self.ranks[place]
            # what is open of the input, this core's part of it with its rank, what is made of the output
            state = self.cores[place](state.reshape(-1, width * after, made).transpose(1, 2))
            state = state.reshape(-1, made, before * self.out_shape[place]).transpose(1, 2)
            made *= self.out_shape[place]
        return state.reshape(-1, self.out_features)

    def extra_repr(self) -> str:
        """Show the shapes and ranks."""
        return f"{self.in_shape} -> {self.out_shape}, ranks={self.ranks[1:-1]}"


class TensorTrainEmbedding(nn.Module):
    """`nn.Embedding` over a tensor train (Khrulkov et al., "Tensorized Embedding Layers", 2019).

    A row's number is written in digits, one a core; each looks up a matrix, and the row is their product.

    Args:
        row_shape: factors whose product is at least the number of rows.
        out_shape: factors of the width.
        ranks: between one core and the next, one fewer.
        num_embeddings: rows that there are.

    Raises:
        ValueError: the lengths do not fit.
    """

    def __init__(self, row_shape: list[int], out_shape: list[int], ranks: list[int], num_embeddings: int) -> None:
        super().__init__()
        self.row_shape, self.out_shape = tuple(row_shape), tuple(out_shape)
        self.num_embeddings, self.embedding_dim = num_embeddings, math.prod(out_shape)
        self.ranks = _bonds(ranks, len(row_shape), len(out_shape))
        self.cores = nn.ModuleList(
            nn.Embedding(rows, before * width * after)
            for rows, width, (before, after) in zip(row_shape, out_shape, pairwise(self.ranks), strict=True)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows `[..., width]` of indices `[...]`."""
        index = input.reshape(-1)
        after = math.prod(self.row_shape)
        state = torch.ones(len(index), 1, 1, dtype=next(self.parameters()).dtype, device=index.device)
        for place, core in enumerate(self.cores):
            after //= self.row_shape[place]
            digit = torch.div(index, after, rounding_mode="floor") % self.row_shape[place]
            found = core(digit).reshape(-1, self.ranks[place], self.out_shape[place] * self.ranks[place + 1])
            state = (state @ found).reshape(-1, state.shape[1] * self.out_shape[place], self.ranks[place + 1])
        return state.reshape(*input.shape, self.embedding_dim)


class GroupLinear(Tensorized):
    """`nn.Linear` as two block-diagonal matrices with a shuffle between them.

    Each of `groups` parts of the input reaches each part of the output through `rank` values of its own: low-rank blocks
    (Rajbhandari et al., "AntMan", 2019); with a rank of 1 a monarch matrix (Dao et al., ICML 2022).

    Args:
        in_features: width of the input, a multiple of `groups`.
        out_features: width of the output, a multiple of `groups`.
        groups: parts of both.
        rank: of each block.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, rank: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.groups, self.rank = groups, rank
        inner = groups * groups * rank
        self.first = nn.Conv1d(in_features, inner, 1, groups=groups, bias=False)
        self.second = nn.Conv1d(inner, out_features, 1, groups=groups, bias=False)

    def product(self, rows: Tensor) -> Tensor:
        """As of every linear kind."""
        inner = self.first(rows.T[None]).reshape(self.groups, self.groups, self.rank, -1)
        shuffled = inner.transpose(0, 1).reshape(1, self.groups * self.groups * self.rank, -1)
        made: Tensor = self.second(shuffled)[0].T
        return made

    def extra_repr(self) -> str:
        """Show the parts."""
        return f"groups={self.groups}, rank={self.rank}"


class CirculantLinear(Tensorized):
    """`nn.Linear` whose matrix is made of circulant blocks, multiplied among their frequencies.

    Row `i + 1` of a block is row `i` moved by one, so a Fourier transform makes of a block one complex factor for each
    frequency. The transforms are products with a small matrix, which every runtime has, and between them stand two grouped
    pointwise convolutions that other techniques reach. In float32 on one thread, blocks of 16 took 0.2 to 0.9 of a dense
    layer's time at 1,024 and 2,048 wide in ONNX Runtime and OpenVINO, for 1 and 32 rows, and 1 to 3 times it at 256 and 512.

    Paper: Cheng et al., "An Exploration of Parameter Redundancy in Deep Networks with Circulant Projections", ICCV 2015;
        blocks: Ding et al., "CirCNN", MICRO 2017.

    Args:
        in_features: width of the input, a multiple of `block`.
        out_features: width of the output, a multiple of `block`.
        block: rows and columns of each circulant.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, block: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.block, self.frequencies = block, block // 2 + 1
        given, made = (self.frequencies * width // block for width in (in_features, out_features))
        self.real = nn.Conv1d(given, made, 1, groups=self.frequencies, bias=False)
        self.imaginary = nn.Conv1d(given, made, 1, groups=self.frequencies, bias=False)

    def product(self, rows: Tensor) -> Tensor:
        """As of every linear kind."""
        there, back = self._transforms(rows)
        parts = F.linear(rows.reshape(-1, self.in_features // self.block, self.block), there)
        waves = parts.reshape(-1, parts.shape[1], 2, self.frequencies).permute(2, 3, 1, 0)
        waves = waves.reshape(2, self.frequencies * parts.shape[1], -1)
        real, imaginary = self.real(waves), self.imaginary(waves)
        made = torch.stack((real[0] - imaginary[1], real[1] + imaginary[0]))
        made = made.reshape(2, self.frequencies, self.out_features // self.block, -1).permute(3, 2, 0, 1)
        return F.linear(made.reshape(-1, made.shape[1], 2 * self.frequencies), back).reshape(-1, self.out_features)

    def _transforms(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The Fourier transform of a real part, `[2 * frequencies, block]`, and its inverse; both keep norms."""
        place = torch.arange(self.block, dtype=like.dtype, device=like.device)
        frequency = torch.arange(self.frequencies, dtype=like.dtype, device=like.device)
        angle = frequency[:, None] * place * (2 * math.pi / self.block)
        there = torch.cat((angle.cos(), -angle.sin())) / math.sqrt(self.block)
        # all but the constant and, of an even block, the alternating wave stand for their mirror image too
        mirrored = (2 * frequency % self.block != 0).to(like.dtype) + 1
        return there, (there * mirrored.repeat(2)[:, None]).T

    def extra_repr(self) -> str:
        """Show the blocks."""
        return f"block={self.block}"


def _bonds(ranks: list[int], *cores: int) -> tuple[int, ...]:
    """The ranks with a 1 at both ends."""
    if any(count != len(ranks) + 1 for count in cores):
        raise ValueError(f"{len(ranks)} ranks stand between {len(ranks) + 1} cores, and there are {cores}")
    return (1, *ranks, 1)
