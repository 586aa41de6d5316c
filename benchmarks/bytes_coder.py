"""Code the quantized weights of six trained networks: order-0 entropy, nncodec 2.1.3, xz -9 and zstd -19 beside ours.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/bytes_coder.py

Needs the extras `bench` and `speed`. nncodec is built from its registry's source into the cache of the originals, without
its dependencies: only its C++ coder is called, as its own `nnc_core` calls it, on the same integers. Times are seconds of
one processor, of which other work on the machine takes none, median of several rounds in turn. Sizes that are done are kept.
"""

from __future__ import annotations

import importlib.util
import lzma
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import zstandard
from networks import resnet56, vgg19
from originals import cache, folder
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Context, Recipe
from featherweight.coding import decode_tensor, encode_tensor
from featherweight.running import run
from featherweight.tasks.mnist import data, lenet300
from featherweight.tasks.training import trained
from featherweight.techniques import PruneWeights
from featherweight.techniques.rounding import grid_scale, to_codes

NAME = "bytes_coder"
ROUNDS = 5
ALLOWANCE = 64  # bytes a network that the protocol leaves to the networks that are not dense
DENSE = ("dense 8-bit ResNet-56", "dense 4-bit VGG-19")
Codes = dict[str, Tensor]


def weights(model: nn.Module) -> Codes:
    """Return the matrices and kernels of a network by name."""
    return {name: value.detach() for name, value in model.state_dict().items() if value.dim() > 1}


def quantized(tensors: Codes, bits: int, per_channel: bool = True) -> Codes:
    """Return the integers of `QuantizeWeights`."""
    return {name: to_codes(value, grid_scale(value, bits, per_channel), bits) for name, value in tensors.items()}


def pruned(tensors: Codes, share: float) -> Codes:
    """Return the tensors without the `share` of smallest magnitude over all of them."""
    magnitudes = torch.cat([value.abs().flatten() for value in tensors.values()])
    least = magnitudes.kthvalue(int(share * len(magnitudes))).values
    return {name: torch.where(value.abs() > least, value, 0.0) for name, value in tensors.items()}


def ternary(value: Tensor) -> Tensor:
    """Return -1, 0 and 1 by the threshold of ternary weight networks (Li & Liu, 2016), 0.7 of the mean magnitude."""
    return (value.sign() * (value.abs() > 0.7 * value.abs().mean())).to(torch.int8)


def indices(value: Tensor, centres: int, rounds: int = 20) -> Tensor:
    """Return the places of the weights in a sorted k-means codebook (Lloyd, 1957, from quantiles)."""
    flat = value.flatten().double()
    order = flat.sort().values
    book = order[((torch.arange(centres) + 0.5) / centres * len(flat)).long()]
    for _ in range(rounds):
        nearest = torch.bucketize(flat, (book[1:] + book[:-1]) / 2)
        sums = torch.zeros(centres, dtype=torch.float64).index_add_(0, nearest, flat)
        counts = torch.bincount(nearest, minlength=centres)
        book = torch.where(counts > 0, sums / counts.clamp_min(1), book).sort().values
    return torch.bucketize(flat, (book[1:] + book[:-1]) / 2).reshape(value.shape).to(torch.int8)


def tiny() -> Codes:
    """Return LeNet-300-100 after eight epochs, pruned to 3 % in eight more, 4 bits a tensor."""
    mnist = data()
    model = trained(lenet300, mnist, epochs=8, learning_rate=1e-3, seed=0, weight_decay=5e-2)
    small, _ = run(Recipe((PruneWeights(ratio=0.97, epochs=8),)), model, Context(data=mnist))
    return quantized(weights(small), 4, per_channel=False)


def networks() -> dict[str, Callable[[], Codes]]:
    """Return what makes each network's integers; the last is beside the six."""
    vgg, resnet = (lambda: weights(vgg19(folder()))), (lambda: weights(resnet56(folder())))
    return {
        "dense 8-bit ResNet-56": lambda: quantized(resnet(), 8),
        "dense 4-bit VGG-19": lambda: quantized(vgg(), 4),
        "95 % sparse 4-bit VGG-19": lambda: quantized(pruned(vgg(), 0.95), 4),
        "ternary ResNet-56": lambda: {name: ternary(value) for name, value in resnet().items()},
        "codebook of 32 ResNet-56": lambda: {name: indices(value, 32) for name, value in resnet().items()},
        "97 % sparse 4-bit LeNet-300-100": tiny,
        "beside: 95 % sparse 4-bit ResNet-56": lambda: quantized(pruned(resnet(), 0.95), 4),
    }


def entropy(codes: Tensor) -> float:
    """Return the bytes of a tensor's order-0 entropy, its table not counted."""
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return float(-(shares * shares.log2()).sum()) * codes.numel() / 8


class Peer:
    """nncodec's coder: contexts, adaptive rates chosen by the encoder, no dependent quantization, no header counted.

    Raises:
        subprocess.CalledProcessError: it cannot be built.
    """

    def __init__(self) -> None:
        place = cache() / "nncodec-2.1.3"
        if not list(place.glob("nncodec/extensions/deepCABAC*.so")):
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
            subprocess.run([*install, "nncodec==2.1.3"], check=True)
        library = next(place.glob("nncodec/extensions/deepCABAC*.so"))
        spec = importlib.util.spec_from_file_location("deepCABAC", library)
        assert spec is not None
        assert spec.loader is not None
        self.coder: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.coder)
        self.off = (self.coder.HdspMode.AlwaysOff, np.zeros(2, np.int8))

    def encode(self, codes: Tensor) -> Any:
        """Return the stream of one tensor."""
        encoder = self.coder.Encoder()
        encoder.initCtxModels(11, 1)
        values = np.ascontiguousarray(codes.numpy(), np.int32)
        encoder.encodeLayer(values, 0, 0, 0, 0, 0, np.zeros(len(values), np.int32), *self.off, 0, 0)
        return encoder.finish()

    def decode(self, stream: Any, shape: tuple[int, ...]) -> Any:
        """Return the values of one tensor."""
        decoder = self.coder.Decoder()
        decoder.setStream(stream)
        decoder.initCtxModels(11)
        values = np.zeros(shape, np.int32)
        decoder.decodeLayer(values, 0, 0, 0, 0, *self.off, 0, 0)
        return values


def sizes(codes: Codes, peer: Peer) -> dict[str, float]:
    """Return the bytes of each coder, ours and nncodec's checked to come back."""
    ours = {name: encode_tensor(value) for name, value in codes.items()}
    theirs = {name: peer.encode(value) for name, value in codes.items()}
    for name, value in codes.items():
        assert torch.equal(decode_tensor(ours[name], value.dtype, value.shape), value)
        assert np.array_equal(peer.decode(theirs[name], tuple(value.shape)), value.numpy())
    flat = b"".join(value.numpy().tobytes() for value in codes.values())
    return {
        "symbols": sum(value.numel() for value in codes.values()),
        "tensors": len(codes),
        "entropy": sum(map(entropy, codes.values())),
        "ours": sum(map(len, ours.values())),
        "nncodec": sum(map(len, theirs.values())),
        "xz -9": len(lzma.compress(flat, preset=9)),
        "zstd -19": len(zstandard.compress(flat, 19)),
    }


def speeds(codes: Codes, peer: Peer) -> dict[str, float]:
    """Return the median speeds of both coders, in turn, in million symbols a second."""
    million = sum(value.numel() for value in codes.values()) / 1e6
    taken: dict[str, list[float]] = {name: [] for name in ("encode", "decode", "nncodec encode", "nncodec decode")}

    def timed(name: str, work: Iterator[Any]) -> list[Any]:
        start = time.process_time()
        done = list(work)
        taken[name].append(time.process_time() - start)
        return done

    for _ in range(ROUNDS + 1):  # the first loads the compiler, and does not count
        ours = timed("encode", map(encode_tensor, codes.values()))
        timed("decode", (decode_tensor(a, b.dtype, b.shape) for a, b in zip(ours, codes.values(), strict=True)))
        theirs = timed("nncodec encode", map(peer.encode, codes.values()))
        timed("nncodec decode", (peer.decode(a, tuple(b.shape)) for a, b in zip(theirs, codes.values(), strict=True)))
    return {name: million / statistics.median(seconds[1:]) for name, seconds in taken.items()}


def main() -> None:
    """Measure what is missing and write the rows."""
    torch.set_num_threads(1)
    peer, done, made = Peer(), kept(NAME), networks()
    for name, make in made.items():
        if name not in done:
            done[name] = sizes(make(), peer)
            keep(NAME, done)
    table = {name: done[name] for name in made}
    six = {name: row for name, row in table.items() if not name.startswith("beside")}
    dense = {name: six[name]["ours"] / six[name]["entropy"] for name in DENSE}
    other = {name: (row["ours"] - ALLOWANCE) / row["entropy"] for name, row in six.items() if name not in DENSE}
    peers = {name: row["ours"] / row["nncodec"] for name, row in six.items()}
    beside = {name: row["ours"] / row["nncodec"] for name, row in table.items() if name not in six}
    _row("order0_dense", max(dense.values()), _listed(dense), table)
    _row("order0_other", max(other.values()), _listed(other), table)
    _row("over_nncodec", max(peers.values()), _listed({**peers, **beside}), table)
    speed = speeds(made["dense 4-bit VGG-19"](), peer)
    note = (
        "million symbols a second of one processor (CPU time, the machine was shared), every tensor of the dense 4-bit VGG-19, "
        + ", ".join(f"{name} {value:.1f}" for name, value in speed.items())
    )
    _row("encode", speed["encode"], note, speed)
    _row("decode", speed["decode"], note, speed)
    _row("decode_over_nncodec", speed["decode"] / speed["nncodec decode"], note, speed)


def _listed(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name}: {ratio:.4f}" for name, ratio in ratios.items())


def _row(figure: str, got: float, note: str, details: Any) -> None:
    record(NAME, f"bytes.coder.{figure}", round(got, 4 if got < 2 else 1), 1, note, details)


if __name__ == "__main__":
    main()
