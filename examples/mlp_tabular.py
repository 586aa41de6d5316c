"""An MLP on a table: train it as usual, name a budget, get a file, and ask the file about new rows."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from featherweight import Data, compress, load

table = load_breast_cancer()
rows = torch.tensor(table.data).float()
rows = (rows - rows.mean(0)) / rows.std(0)
labels = torch.tensor(table.target).long()
order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
train, validate, test = order[:369].split(41), order[369:469].split(100), order[469:].split(100)


def batches(parts):
    return [(rows[part], labels[part]) for part in parts]


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
for _ in range(20):
    for inputs, target in batches(train):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()

data = Data(example=rows[:1], train=batches(train), validate=batches(validate), test=batches(test))
artifact = compress(model.eval(), data, "size<=10%, drop<=2pt", trials=1, out="cancer.fw")
print(artifact.report.verdict["text"])
print("classes of three rows:", load("cancer.fw").run(rows[:3])[0].argmax(1))
