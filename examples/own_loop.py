"""A training loop of one's own with single steps inside it: cut, train as ever, cut again, quantize, and save the file."""

import torch
from torch import nn

from featherweight import Context, Data, load, run
from featherweight.artifact import package
from featherweight.portable import export_graph
from featherweight.techniques import PruneChannels, QuantizeWeights


def samples(count, seed):
    """Return points `[count, 8]` and the number of the nearest of five centres."""
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    points = 1.5 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return points, torch.cdist(points, centres).argmin(1)


train, test = [samples(64, seed) for seed in range(1, 31)], samples(500, 99)


def epochs(model, count):
    """Whatever you do to train: nothing in here knows of compression."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(count):
        for inputs, target in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    model.eval()


def accuracy(model):
    return float((model(test[0]).argmax(1) == test[1]).float().mean())


torch.manual_seed(0)
original = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 5))
epochs(original, 6)
print(f"original: {accuracy(original):.3f}")

data = Data(example=test[0][:1], train=train, calibrate=train, validate=[samples(500, 98)])
model, edits = original, []
for step in (PruneChannels(ratio=0.3), PruneChannels(ratio=0.3), QuantizeWeights(bits=8)):
    model, done = run(step, model, Context(data=data, teacher=original))
    edits += done  # what turns the original's class into this model, for the file
    if not isinstance(step, QuantizeWeights):
        epochs(model, 3)
    print(f"{step}: {accuracy(model):.3f}")

size = package(model, edits, {}, export_graph(model, data)).save("points.fw")
print(f"{size:,} bytes; from the file: {(load('points.fw').run(test[0])[0].argmax(1) == test[1].numpy()).mean():.3f}")
