"""The nearest structured weights in squared error: trains, low-rank and circulant blocks, canonical forms. Float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RIDGE = 1e-7  # of the mean diagonal; keeps alternating least squares from diverging (Phan et al., ECCV 2020)


def balanced(width: int, count: int) -> list[int] | None:
    """Return `count` factors of a width, each at least 2, as near to one another as its divisors allow, largest last.

    None where there are no such factors, as for a prime.
    """
    if count == 1:
        return [width] if width > 1 else None
    wanted = width ** (1 / count)
    for first in sorted(
        (d for d in range(2, width // 2 + 1) if width % d == 0), key=lambda d: abs(math.log(d / wanted))
    ):
        rest = balanced(width // first, count - 1)
        if rest is not None:
            return sorted([first, *rest])
    return None


def train_cores(tensor: Tensor, rank: int) -> list[Tensor]:
    """Return the cores `[before, k, after]` of a tensor train that stands for a tensor `[k_1, ..., k_d]`.

    Each cut keeps the `rank` largest singular values, and its cores share their size evenly.

    Paper: Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 2011.
    """
    cores, before, rest = [], 1, tensor
    for k in tensor.shape[:-1]:
        left, values, right = torch.linalg.svd(rest.reshape(before * k, -1), full_matrices=False)
        after = min(rank, len(values))
        root = values[:after].sqrt()
        cores.append((left[:, :after] * root).reshape(before, k, after))
        rest, before = root[:, None] * right[:after], after
    return [*cores, rest.reshape(before, -1, 1)]


def bonds(sizes: Sequence[int], rank: int) -> list[int]:
    """Return the ranks that `train_cores` keeps for sides of these sizes: at most `rank`, and what the sides allow."""
    found, before = [], 1
    for place, k in enumerate(sizes[:-1]):
        before = min(rank, before * k, math.prod(sizes[place + 1 :]))
        found.append(before)
    return found


def block_factors(weight: Tensor, groups: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two block-diagonal factors of a matrix `[out, in]` whose `groups` by `groups` blocks have a rank each.

    Every block takes its own best approximation, so the whole is the nearest there is.

    Returns:
        `[groups * groups * rank, in / groups]`, rows by input part, then output part; and
        `[out, groups * rank]`, columns by input part: the weights of two grouped pointwise convolutions.

    Paper: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022.
    """
    out, inside = weight.shape
    blocks = weight.reshape(groups, out // groups, groups, inside // groups).transpose(1, 2)  # [j, k, out, in]
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    root = values[..., :rank].sqrt()
    first = (root[..., None] * right[..., :rank, :]).transpose(0, 1).reshape(-1, inside // groups)
    second = (left[..., :rank] * root[..., None, :]).transpose(1, 2).reshape(out, groups * rank)
    return first, second


def circulant_waves(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the spectra of the circulant blocks nearest to a matrix `[out, in]`.

    A value of a block is the mean of the diagonal, wrapped around, that it stands for.

    Returns:
        Real and imaginary parts of what multiplies each frequency of the input, `[frequencies * out / block, in / block]`, rows
        by frequency: the weights of two grouped pointwise convolutions.

    Paper: Cheng et al., "An Exploration of Parameter Redundancy in Deep Networks with Circulant Projections", ICCV 2015.
    """
    out, inside = weight.shape
    blocks = weight.reshape(out // block, block, inside // block, block).transpose(1, 2)
    row = torch.arange(block, device=weight.device)
    first = blocks[..., row[:, None], (row[:, None] + row) % block].mean(-2)
    spectrum = torch.fft.rfft(first).conj().movedim(-1, 0).flatten(0, 1)
    return spectrum.real, spectrum.imag


def canonical_factors(tensor: Tensor, rank: int, sweeps: int, generator: torch.Generator) -> list[Tensor]:
    """Return factors `[k_i, rank]` whose outer products add up to nearly a tensor `[k_1, ..., k_d]`, of equal norms.

    Alternating least squares from leading singular vectors, with random ones where the rank asks for more.

    Paper: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", ICLR 2015.
    """
    factors = []
    for side, k in enumerate(tensor.shape):
        left, _, _ = torch.linalg.svd(tensor.movedim(side, 0).reshape(k, -1), full_matrices=False)
        some = left[:, : min(rank, left.shape[1])]
        more = torch.randn(k, rank - some.shape[1], generator=generator, dtype=tensor.dtype) / math.sqrt(k)
        factors.append(torch.cat((some, more.to(tensor.device)), 1))
    for _ in range(sweeps):
        for side in range(tensor.dim()):
            others = [factor for place, factor in enumerate(factors) if place != side]
            gram = torch.ones(rank, rank, dtype=tensor.dtype, device=tensor.device)
            for factor in others:
                gram = gram * (factor.T @ factor)
            gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
            letters = "abcdefg"[: tensor.dim()]
            rest = letters.replace(letters[side], "")
            seen = torch.einsum(f"{letters},{','.join(c + 'z' for c in rest)}->{letters[side]}z", tensor, *others)
            factors[side] = torch.linalg.solve(gram, seen.T).T
    norms = torch.stack([factor.norm(dim=0).clamp_min(1e-30) for factor in factors])
    shared = norms.log().mean(0).exp()
    return [factor / norm * shared for factor, norm in zip(factors, norms, strict=True)]
