"""A CNN on images: a recipe of one's own, which removes channels and then makes weights and activations eight bits wide."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from featherweight import Data, compress, load
from featherweight.techniques import Distill, FoldBatchNorm, PruneChannels, QuantizeStatic

bunch = load_digits()
images, labels = torch.tensor(bunch.images).float()[:, None] / 16, torch.tensor(bunch.target).long()
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))


def batches(part, size=64):
    return [(images[some], labels[some]) for some in part.split(size)]


class Network(nn.Module):
    """Any module of one's own; it is found again in the file without this class."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48), nn.ReLU()),
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


torch.manual_seed(0)
model = Network()
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for _ in range(12):
    for inputs, target in batches(order[:1200]):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()

data = Data(
    example=images[:1],
    train=batches(order[:1200]),
    validate=batches(order[1200:1500]),
    test=batches(order[1500:]),
)
recipe = FoldBatchNorm() + PruneChannels(ratio=0.25, importance="taylor") + Distill(epochs=4) + QuantizeStatic()
artifact = compress(model.eval(), data, "size<=30%, drop<=3pt", recipe, out="digits.fw")
print(artifact.report.verdict["text"])
smaller = load("digits.fw", into=model)  # the same class again, with fewer channels, trainable
print(smaller.features[0])
