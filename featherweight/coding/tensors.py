"""Tensors of any real type to few bytes and back, bit for bit.

Integers are coded as symbols. Floats are split into planes, the first bytes of all values, the second bytes, …, so that
planes without information (float32 that holds bfloat16 values) cost nothing; zeros may be told apart by a mask. Floats that
are small multiples of one number, such as rounded scales and biases or parameters on a grid, are coded as those multiples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.coding.symbols import LIMIT, decode_symbols, encode_symbols
from featherweight.coding.varint import Bytes, Reader, framed, signed_varint, varint
from featherweight.errors import ArtifactError

_SYMBOLS, _PLANES, _MASKED, _MULTIPLES, _STEPS = range(5)
_MASK_SHARE = 0.1  # of exact zeros, from which on a mask is tried
_MOST_BITS = 16  # of a multiple
_MOST_STEP = 24  # bits of the number that they are multiples of: a mantissa's
_MOST_OCTAVES = 1100  # from one to the smallest and the largest double
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def encode_tensor(tensor: Tensor) -> bytes:
    """Code a tensor losslessly: the bit patterns of NaN, -0.0 and subnormals survive.

    Args:
        tensor: bool, integer or floating, any shape, any device.

    Returns:
        A stream; type and shape are not in it.

    Raises:
        ArtifactError: the tensor is complex, quantized, or not strided.
    """
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise ArtifactError(f"a {tensor.layout} tensor of {tensor.dtype} cannot be written: convert it to real, dense")
    tensor = tensor.detach().cpu().contiguous()
    matrix, period = _matrix(tuple(tensor.shape)), math.prod(tensor.shape[2:])
    if tensor.dtype in _INTEGERS:
        values = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).numpy().reshape(matrix)
        if not values.size or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31):
            return bytes([_SYMBOLS]) + encode_symbols(values, period)
    patterns = _patterns(tensor)
    candidates = [bytes([_PLANES]) + _encode_planes(patterns, matrix, period)]
    filled = patterns.any(1)
    if patterns.size and filled.mean() <= 1 - _MASK_SHARE:
        mask = framed(encode_symbols(filled.astype(np.int8).reshape(matrix), period))
        survivors = patterns[filled]
        candidates.append(bytes([_MASKED]) + mask + _encode_planes(survivors, (1, len(survivors)), 1))
    if tensor.is_floating_point() and (found := _multiples(tensor)) is not None:
        octave, step, multiples = found
        way = bytes([_MULTIPLES]) if step == 1 else bytes([_STEPS]) + varint(step)
        candidates.append(way + signed_varint(octave) + encode_symbols(multiples.reshape(matrix), period))
    return min(candidates, key=len)


def decode_tensor(data: Bytes, dtype: torch.dtype, shape: Sequence[int], limit: int = LIMIT) -> Tensor:
    """Read a tensor that `encode_tensor` wrote.

    Args:
        data: the stream.
        dtype: the tensor's type.
        shape: the tensor's shape.
        limit: most elements to make room for.

    Returns:
        The tensor, `[*shape]`, on the CPU.

    Raises:
        ArtifactError: the bytes are no such stream, the shape exceeds the limit, or a value the type.
    """
    count = math.prod(shape)
    if dtype not in _INTEGERS and not (dtype.is_floating_point or dtype in _UNSIGNED):
        raise ArtifactError(f"tensor stream: {dtype} is not a type that is ever written")
    if min(shape, default=0) < 0 or count > min(limit, LIMIT):
        raise ArtifactError(f"tensor stream: shape {list(shape)} exceeds {min(limit, LIMIT)} elements")
    reader, matrix = Reader(data, "tensor stream"), _matrix(tuple(shape))
    way = reader.byte()
    if way == _SYMBOLS and dtype in _INTEGERS:
        return _decode_integers(reader.rest(), dtype, matrix).reshape(tuple(shape))
    if way in (_MULTIPLES, _STEPS) and dtype.is_floating_point:
        step = reader.varint(2**_MOST_STEP) if way == _STEPS else 1
        octave = reader.signed_varint(_MOST_OCTAVES)
        multiples = decode_symbols(reader.rest(), matrix).astype(np.float64) * step
        return torch.from_numpy(np.ldexp(multiples, octave)).to(dtype).reshape(tuple(shape))
    patterns = np.zeros((count, dtype.itemsize), np.uint8)
    if way == _MASKED:
        mask = decode_symbols(reader.framed(), matrix, np.uint8).reshape(-1) > 0
        patterns[mask] = _decode_planes(reader, (1, int(mask.sum())), dtype.itemsize)
    elif way == _PLANES:
        patterns = _decode_planes(reader, matrix, dtype.itemsize)
    else:
        raise ArtifactError(f"tensor stream: way {way} does not fit {dtype}")
    if dtype == torch.bool and patterns.max(initial=0) > 1:
        raise ArtifactError("tensor stream: a truth value other than 0 and 1")
    if count == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.from_numpy(patterns).view(dtype).reshape(tuple(shape))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns under which a tensor of this shape is coded: its first axis against the rest."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _multiples(tensor: Tensor) -> tuple[int, int, NDArray[np.int64]] | None:
    """Return an exponent, a step, and the whole multiples of the step times two to the exponent that the values are.

    None where the multiples are large.
    """
    for part in (tensor.reshape(-1)[:256], tensor):  # most tensors show at once that they are not
        values = part.double().numpy()
        used = values[values != 0]
        if not np.isfinite(used).all() or np.signbit(values[values == 0]).any():
            return None
        mantissas, exponents = np.frexp(used)
        whole = np.ldexp(mantissas, 53).astype(np.int64)
        lowest = np.frexp((whole & -whole).astype(np.float64))[1] - 1  # place of the last bit that is one
        octave = int((exponents - 53 + lowest).min(initial=0 if not used.size else _MOST_OCTAVES))
        if int(exponents.max(initial=octave)) - octave > _MOST_STEP:
            return None
        multiples = np.ldexp(values, -octave).astype(np.int64)
        step = max(1, int(np.gcd.reduce(multiples, axis=None, initial=0)))
        if int(np.abs(multiples).max(initial=0)) > step << _MOST_BITS:
            return None
    return octave, step, multiples // step


def _patterns(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of each value, lowest first as on every machine torch runs on, `[values, bytes a value]`."""
    flat = tensor.reshape(-1, 1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros((0, tensor.element_size()), np.uint8)


def _encode_planes(patterns: NDArray[np.uint8], matrix: tuple[int, int], period: int) -> bytes:
    return b"".join(framed(encode_symbols(plane.reshape(matrix), period)) for plane in patterns.T)


def _decode_planes(reader: Reader, matrix: tuple[int, int], width: int) -> NDArray[np.uint8]:
    """Return the bytes of each value, `[values, width]`."""
    planes = [decode_symbols(reader.framed(), matrix, np.uint8).reshape(-1) for _ in range(width)]
    reader.end()
    return np.ascontiguousarray(np.stack(planes, 1).astype(np.uint8))


def _decode_integers(data: Bytes, dtype: torch.dtype, matrix: tuple[int, int]) -> Tensor:
    if dtype == torch.bool:
        values = decode_symbols(data, matrix, np.uint8)
        if values.max(initial=0) > 1:
            raise ArtifactError(f"tensor stream: {values.max()} does not fit {dtype}")
        return torch.from_numpy(values).to(dtype)
    return torch.from_numpy(decode_symbols(data, matrix, torch.empty(0, dtype=dtype).numpy().dtype))
