"""Tensors of any model to one small file and back: lossless, or with an error that is stated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featherweight.artifact import Artifact, load
from featherweight.budget import Limit
from featherweight.errors import ArtifactError, BudgetError
from featherweight.layers.quantized import round_mantissa

_FINEST, _COARSEST = 2.0**-14, 8.0  # steps in root mean squares of a tensor
_ROUNDS = 12  # of bisection
_LARGEST = 2**31 - 1


def pack(
    tensors: Mapping[str, Tensor],
    sqnr: float | None = None,
    size: int | None = None,
    facts: dict[str, Any] | None = None,
) -> Artifact:
    """Return tensors as a file without a graph.

    Lossy packing rounds every floating matrix or kernel to whole steps, one step a tensor and all of them the same share of the
    tensor's root mean square, so that every tensor has about the same signal-to-noise ratio; vectors and integers stay exact.

    Args:
        tensors: by name, of types that safetensors holds.
        sqnr: least ratio of signal to rounding noise of each tensor, in dB; None asks for nothing.
        size: most bytes of the file; the finest step that fits is taken.
        facts: more to keep in the file, JSON-able.

    Returns:
        The file to save; lossless where neither `sqnr` nor `size` is given, or where the lossless one fits `size`.

    Raises:
        BudgetError: both are given, or no step gives a file this small.
    """
    if sqnr is not None and size is not None:
        raise BudgetError("say how good (sqnr) or how small (size), and not both")
    extra = facts or {}
    exact = _artifact(dict(tensors), {}, extra)
    if sqnr is not None:
        return _with_noise(tensors, sqnr, extra)
    if size is None or len(exact.to_bytes()) <= size:
        return exact
    return _of_size(tensors, size, extra)


def unpack(artifact: Artifact) -> dict[str, Tensor]:
    """Return the tensors of a packed file by name, in the types they had.

    Raises:
        ArtifactError: the file was not made by `pack`.
    """
    rounded = artifact.facts.get("packed")
    if not isinstance(rounded, dict):
        raise ArtifactError(
            f"{artifact.path or 'the artifact'} is a model and no packed tensors: load it, or inspect it"
        )
    found: dict[str, Tensor] = {}
    for name, value in artifact.state.items():
        owner, _, kind = name.rpartition(".")
        if owner in rounded and kind == "codes":
            step, dtype = artifact.state.get(f"{owner}.step"), getattr(torch, str(rounded[owner]), None)
            if not isinstance(dtype, torch.dtype) or step is None or step.numel() != 1:
                raise ArtifactError(f"{artifact.path or 'the artifact'}: {owner} has no type or no step")
            found[owner] = (value.double() * step.double()).to(dtype)
        elif owner not in rounded or kind != "step":
            found[name] = value
    return found


def ratio(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return the least signal-to-noise ratio of any tensor, in dB; infinite where nothing differs."""
    return min((_sqnr(value, after[name]) for name, value in before.items()), default=math.inf)


def packed_file(source: Path, out: Path, sqnr: float | None, size: Limit | None) -> dict[str, Any]:
    """Pack a safetensors file, metadata and all, and return what came of it.

    Args:
        source: the tensors.
        out: the file to write.
        sqnr: as of `pack`.
        size: limit on the file; shares and factors are of the tensors' bytes.

    Raises:
        ArtifactError: a file cannot be read or written.
        BudgetError: as of `pack`.
    """
    try:
        with safe_open(source, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            metadata = dict(stored.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{source} is no safetensors file that can be read: {error}") from error
    whole = sum(tensor.nbytes for tensor in tensors.values())
    most = None if size is None else int(size.allowed(whole))
    artifact = pack(tensors, sqnr, most, {"metadata": metadata} if metadata else {})
    length, least = artifact.save(out), ratio(tensors, unpack(artifact))
    values = sum(tensor.numel() for tensor in tensors.values())
    return {
        "file": str(out),
        "file_bytes": length,
        "tensor_bytes": whole,
        "ratio": round(whole / max(1, length), 2),
        "bits_per_value": round(8 * length / max(1, values), 3),
        "least_sqnr_db": "lossless" if least == math.inf else round(least, 2),
    }


def unpacked_file(source: Path, out: Path) -> dict[str, Any]:
    """Unpack a file into a safetensors file, and return what was written.

    Raises:
        ArtifactError: a file cannot be read or written, or was not made by `pack`.
    """
    artifact = load(source)
    tensors, metadata = unpack(artifact), artifact.facts.get("metadata", {})
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out, metadata or None)
    except (OSError, SafetensorError, TypeError) as error:
        raise ArtifactError(f"{out} cannot be written: {error}") from error
    return {"file": str(out), "file_bytes": out.stat().st_size, "tensors": len(tensors)}


def _artifact(state: dict[str, Tensor], rounded: dict[str, str], facts: dict[str, Any]) -> Artifact:
    return Artifact([], {"packed": rounded, **facts}, state, {}, None)


def _rounded(tensors: Mapping[str, Tensor], share: float, facts: dict[str, Any]) -> Artifact:
    """The file whose steps are a share of each tensor's root mean square."""
    state: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, value in tensors.items():
        power = float(value.double().square().mean().sqrt()) if value.is_floating_point() and value.dim() > 1 else 0.0
        clash = f"{name}.codes" in tensors or f"{name}.step" in tensors
        step = round_mantissa(torch.tensor(power * share, dtype=torch.float32), 8)
        if clash or not 0 < power < math.inf or float(value.abs().max()) / float(step) > _LARGEST:
            state[name] = value
            continue
        codes = torch.round(value.double() / step.double())
        largest = float(codes.abs().max())
        narrow = next(kind for kind in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(kind).max)
        state[f"{name}.codes"], state[f"{name}.step"] = codes.to(narrow), step
        kinds[name] = str(value.dtype).removeprefix("torch.")
    return _artifact(state, kinds, facts)


def _with_noise(tensors: Mapping[str, Tensor], sqnr: float, facts: dict[str, Any]) -> Artifact:
    """The coarsest steps under which every tensor keeps the ratio."""
    # noise is about a twelfth of the square of a step, and at most a quarter: half the step of the former is fine enough
    usual = 0.5 * math.log2(12) - sqnr * math.log2(10) / 20
    low, high = usual - 1, math.log2(_COARSEST)
    best = None
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        tried = _rounded(tensors, 2.0**middle, facts)
        if ratio(tensors, unpack(tried)) >= sqnr:
            best, low = tried, middle
        else:
            high = middle
    return best or _artifact(dict(tensors), {}, facts)


def _of_size(tensors: Mapping[str, Tensor], size: int, facts: dict[str, Any]) -> Artifact:
    """The finest steps whose file fits."""
    low, high = math.log2(_FINEST), math.log2(_COARSEST)
    best, least = None, math.inf
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        tried = _rounded(tensors, 2.0**middle, facts)
        length = len(tried.to_bytes())
        least = min(least, length)
        if length <= size:
            best, high = tried, middle
        else:
            low = middle
    if best is None:
        raise BudgetError(
            f"no rounding of these tensors fits {size:,} bytes: the coarsest takes {least:,}; compress the model first"
        )
    return best


def _sqnr(before: Tensor, after: Tensor) -> float:
    noise = float((before.double() - after.double()).square().sum()) if before.numel() else 0.0
    signal = float(before.double().square().sum()) if before.numel() else 0.0
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
