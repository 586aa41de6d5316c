"""An LSTM on sounds: units leave the recurrent layer, its matrices become factors, their numbers integers.

The sounds are made up, rising, falling or steady tones in noise, so that the example runs anywhere.
"""

import torch
from torch import nn

from featherweight import Data, compress
from featherweight.techniques import Distill, FactorRecurrent, PruneChannels, QuantizeWeights

FRAMES, BANDS = 20, 16


def sounds(count, seed):
    """Return frames `[count, 20, 16]` of tones that rise, stay or fall, and which of the three."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (count,), generator=draw)
    start = 5 + 6 * torch.rand(count, 1, generator=draw)
    pitch = start + (label[:, None] - 1) * torch.linspace(0, 4, FRAMES)
    bands = torch.exp(-((torch.arange(BANDS) - pitch[:, :, None]) ** 2))
    return bands + 0.3 * torch.randn(bands.shape, generator=draw), label


def batches(count, seed):
    return [sounds(64, seed + place) for place in range(count)]


class Recogniser(nn.Module):
    """Two LSTM layers, and what the last step says."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 48, 2, batch_first=True)
        self.linear = nn.Linear(48, 3)

    def forward(self, x):
        return self.linear(self.lstm(x)[0][:, -1])


torch.manual_seed(0)
model, train = Recogniser(), batches(20, 0)
optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
for _ in range(3):
    for inputs, target in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()

data = Data(example=train[0][0][:1], train=train, validate=batches(4, 1000), test=batches(4, 2000))
recipe = PruneChannels(ratio=0.4) + FactorRecurrent(energy=0.95) + QuantizeWeights(bits=6) + Distill(epochs=3)
artifact = compress(model.eval(), data, "size<=15%, drop<=3pt", recipe, out="tones.fw")
print(artifact.report.verdict["text"])
