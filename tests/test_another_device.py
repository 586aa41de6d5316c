"""Every technique on a device that is not there, see `another_device`: what it makes lies where the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from another_device import another_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featherweight import Context, Data, Recipe, run
from featherweight.scoring import evaluate
from featherweight.supernet import Supernet
from featherweight.technique import Technique
from featherweight.techniques import (
    TECHNIQUES,
    FactorRecurrent,
    FoldBatchNorm,
    PenalizeEntropy,
    PruneDeadUnits,
    PruneWeights,
    QuantizeAware,
)

FIRST: dict[type[Technique], Technique] = {
    PruneDeadUnits: PruneWeights(ratio=0.9, epochs=1),
    PenalizeEntropy: PruneWeights(ratio=0.5, epochs=1),
}


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0][:, -1])


def seer() -> nn.Module:
    inner = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*inner, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


def built(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    samples = TensorDataset(torch.randn(32, *shape), torch.randint(0, 4, (32,)))
    train, calibrate, validate, test = (DataLoader(samples, batch_size=16) for _ in range(4))
    return build().eval(), Data(samples[:1][0], train=train, calibrate=calibrate, validate=validate, test=test)


def carried_out(technique: Technique, build: Callable[[], nn.Module], *shape: int) -> None:
    with another_device() as device:
        model, data = built(build, *shape)
        context = Context(data, built(build, *shape)[0].to(device), device)
        small, _ = run(technique, model, context)
        evaluate(small, data, "test", device)
        assert all(tensor.device == device for tensor in small.state_dict().values())
    wrong = [left.reason for left in context.untouched if "both sides" in left.reason]
    assert not wrong, wrong


@pytest.mark.parametrize("kind", TECHNIQUES, ids=lambda kind: kind.__name__)
def test_each_technique_works_where_the_model_lies(kind: Any) -> None:
    step = kind(epochs=1) if hasattr(kind, "epochs") else kind()
    before = FIRST.get(kind)
    carried_out(step if before is None else Recipe((before, step)), seer, 1, 8, 8)


@pytest.mark.parametrize(
    "technique",
    [FactorRecurrent(rank="ratio", hidden="shared"), QuantizeAware(bits=4, activations=4, epochs=1)],
    ids=str,
)
def test_a_recurrent_network_too(technique: Technique) -> None:
    carried_out(technique, Listener, 6, 8)


def test_a_supernet_trains_there() -> None:
    with another_device() as device:
        model, data = built(seer, 1, 8, 8)
        supernet = Supernet(run(FoldBatchNorm(), model, Context(data)).model, Context(data, None, device))
        supernet.train(1, 1e-3)
        small = supernet.extracted(supernet.smallest).model
        assert all(tensor.device == device for tensor in small.state_dict().values())


def test_what_a_gpu_refuses_is_refused() -> None:
    with another_device() as device, pytest.raises(RuntimeError, match="both sides"):
        torch.zeros(3).to(device) + torch.zeros(3)
    with another_device() as device, pytest.raises(TypeError, match="numpy"):
        torch.zeros(3).to(device).numpy()
