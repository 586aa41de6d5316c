"""Spoken digits (FSDD) as 40 log-mel bands, and the baseline `lstm`: two LSTM layers of 256 and a linear one.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/speech.py

Takes 0 to 4 of each speaker and digit test, 5 to 9 validate, the rest train; or one speaker is left out to test.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from originals import folder, original
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from featherweight import Data, Task
from featherweight.scoring import evaluate
from featherweight.tasks.training import tensor_loader
from featherweight.techniques.train import Training

RATE, WINDOW, HOP, SPECTRUM = 8000, 200, 80, 512  # Hz; 25 ms, 10 ms and the transform's length in samples
BANDS, FRAMES = 40, 68  # 0.695 s; 96 % of the recordings are shorter
SEEDS = (0, 1, 2)
TRAINING = Training(epochs=40, learning_rate=2e-3, weight_decay=1e-2)


class Recogniser(nn.Module):
    """Two LSTM layers of 256 over log-mel frames and a linear layer on the last step; 834,058 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 2, batch_first=True)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, 10]` of log-mel frames `[n, frames, 40]`."""
        return self.linear(self.lstm(x)[0][:, -1])


def filterbank(bands: int, bins: int, rate: float) -> Tensor:
    """Return triangular filters `[bands, bins]`, evenly spaced in mel from 0 to `rate / 2` Hz, each of height 1."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2)[:, None] / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def fitted(sound: Tensor, length: int) -> Tensor:
    """Return `[length]` samples of a sound: the loudest stretch of a longer one, a shorter one after silence.

    So a short sound ends with the last step, which is the one that the network's answer is read from.
    """
    if len(sound) <= length:
        return nn.functional.pad(sound, (length - len(sound), 0))
    energy = nn.functional.pad(sound.double().square().cumsum(0), (1, 0))
    start = int((energy[length:] - energy[:-length]).argmax())
    return sound[start : start + length]


def log_mel(sounds: Tensor) -> Tensor:
    """Return log-mel frames `[n, frames, 40]` of sounds `[n, samples]` at 8 kHz."""
    frames = sounds.unfold(1, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(frames, SPECTRUM).abs().square()
    return torch.log(power @ filterbank(BANDS, SPECTRUM // 2 + 1, RATE).T + 1e-4)


class Augmented(TensorDataset):
    """Normalised frames `[n, frames, 40]`; a list of indices gives a batch, each sound changed at random.

    It is made up to 15 % slower or faster, moved by up to 5 frames, gets another loudness and a little noise, and loses
    up to 9 frames and up to 7 bands (SpecAugment: Park et al., 2019).
    """

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return the batch `[len(index), frames, 40]` and its labels."""
        sounds, labels = super().__getitem__(index)
        count, frames, bands = sounds.shape
        steps = torch.arange(frames) - (frames - 1)
        speed, move = 0.85 + 0.3 * torch.rand(count, 1), torch.randint(-5, 6, (count, 1))
        rows = (frames - 1 + (steps + move) * speed).round().long().clamp(0, frames - 1)
        sounds = sounds[torch.arange(count)[:, None], rows]
        sounds = sounds + 0.2 * torch.randn(count, 1, 1) + 0.1 * torch.randn(sounds.shape)
        lost = _stretch(count, frames, 9)[:, :, None] | _stretch(count, bands, 7)[:, None, :]
        return sounds.masked_fill(lost, 0.0), labels


def _stretch(count: int, size: int, most: int) -> Tensor:
    """Return `[count, size]`, true on a random stretch of 0 to `most` in each row."""
    length, place = torch.randint(0, most + 1, (count, 1)), torch.arange(size)
    start = (torch.rand(count, 1) * (size - length + 1)).long()
    return (place >= start) & (place < start + length)


def data(left_out: str | None = None, batch: int = 64) -> Data:
    """Return the data set, every band normalised by the training part.

    Args:
        left_out: a speaker whose recordings all test, and whom training and validation do not hear; None to test on takes
            0 to 4 of everyone.
        batch: sounds a batch.
    """
    with np.load(folder() / "fsdd.npz", allow_pickle=False) as arrays:
        pcm = torch.from_numpy(arrays["pcm"]).float() / 32768
        length = WINDOW + (FRAMES - 1) * HOP
        sounds = torch.stack([fitted(pcm[a:b], length) for a, b in pairwise(arrays["offset"])])
        labels = torch.from_numpy(arrays["label"]).long()
        take, speaker = torch.from_numpy(arrays["take"]), torch.from_numpy(arrays["speaker"] == left_out)
    test = speaker if left_out else take < 5
    held = ~test & (take >= 5) & (take < 10)
    kept = ~test & (take >= 10)
    frames = log_mel(sounds)
    deviation, mean = torch.std_mean(frames[kept], (0, 1))
    frames = (frames - mean) / deviation
    samples = Augmented(frames[kept], labels[kept])
    some = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:600]  # the file is sorted by digit
    return Data(
        example=frames[:1],
        train=DataLoader(
            samples, sampler=BatchSampler(RandomSampler(samples), batch, drop_last=False), batch_size=None
        ),
        calibrate=tensor_loader(frames[kept][some], labels[kept][some], batch),
        validate=tensor_loader(frames[held], labels[held], 300),
        test=tensor_loader(frames[test], labels[test], 300),
    )


def task(seed: int = 0, left_out: str | None = None) -> Task:
    """Return the LSTM, trained or read from the cache, and its data; `left_out` as in `data`."""
    spoken = data(left_out)
    name = f"lstm-without-{left_out}" if left_out else "lstm"
    return Task(original(name, seed, Recogniser, spoken, TRAINING), spoken, "lstm")


def main() -> None:
    """Train or load every seed, and print its accuracies."""
    for seed in SEEDS:
        made = task(seed)
        scores = [f"{split} {evaluate(made.model, made.data, split).value:.4f}" for split in ("validate", "test")]
        sys.stdout.write(f"lstm, seed {seed}: {', '.join(scores)}\n")


if __name__ == "__main__":
    main()
